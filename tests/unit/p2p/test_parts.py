"""The small parts: chunk plan, peer book, seed lists, errors on the wire."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import BusyError, ConfigError, IntegrityError, RemoteError, RequestError
from p2p.core import failures, headers
from p2p.core.advert import Advert
from p2p.core.chunks import Plan, chunk_count, chunk_span
from p2p.core.diversity import choose
from p2p.core.identity import Identity
from p2p.mesh import by_peer
from p2p.peerbook import Met, Peerbook

PEER = Identity.from_seed(b"p" * 32).peer_id


def test_chunks_cover_a_file():
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5 << 20):
        spans = [chunk_span(index, size) for index in range(chunk_count(size))]
        assert sum(length for _, length in spans) == size
        assert [at for at, _ in spans] == [index << 20 for index in range(len(spans))]


def test_the_rarest_chunk_comes_first_and_peers_fail_over():
    plan: Plan[str] = Plan(range(4), per_peer_max=2)
    plan.add("a")
    plan.add("b")
    for index in (0, 1, 2):
        plan.lacks("b", index)
    plan.lacks("a", 3)
    assert plan.take("b", 0) == 3
    assert plan.take("b", 0) is None
    first, second = plan.take("a", 0), plan.take("a", 0)
    assert {first, second} <= {0, 1, 2}
    assert plan.take("a", 0) is None  # two in flight
    assert plan.arrived(first)
    plan.drop("a")
    plan.add("c")
    assert {plan.take("c", 0), plan.take("c", 0)} == {0, 1, 2} - {first}
    assert not plan.done
    assert [plan.arrived(index) for index in range(4)] == [index != first for index in range(4)]
    assert plan.done


def test_what_few_others_have_is_asked_for_first():
    plan: Plan[str] = Plan(range(6), per_peer_max=9)
    for peer in "abcd":
        plan.add(peer)
    plan.has_only("b", {0, 1, 2, 3})
    plan.has_only("c", {0, 1, 2, 5})
    plan.has_only("d", {0, 1, 2, 3, 5})
    taken = [plan.take("a", 0) for _ in range(6)]
    assert taken[0] == 4  # nobody else has it
    assert set(taken[1:3]) == {3, 5}
    assert plan.is_partial("b")
    assert not plan.is_partial("a")
    plan.again(4, "a")
    plan.has_only("b", {4})  # it got it meanwhile
    assert plan.take("b", 0) == 4


def test_a_chunk_that_is_late_is_asked_of_a_second_peer_as_well():
    plan: Plan[str] = Plan(range(2), per_peer_max=2)
    for peer in "abc":
        plan.add(peer)
    assert {plan.take("a", 10.0), plan.take("a", 10.5)} == {0, 1}
    assert plan.take("b", 11.0) is None
    assert plan.help("b", 11.0, 2.0) is None  # not late enough yet
    late = plan.help("b", 12.2, 2.0)
    assert late is not None
    assert plan.help("a", 20.0, 2.0) is None  # it is the one that is late
    assert plan.help("c", 12.3, 2.0) is None  # that one has help already, the other is not late yet
    assert plan.help("c", 13.0, 2.0) == 1 - late
    assert plan.arrived(late)
    assert not plan.arrived(late)
    plan.drop("a")
    plan.drop("c")
    assert plan.take("b", 14.0) == 1 - late


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["take", "help", "ok", "no", "fail", "drop"])), max_size=80
    )
)
def test_a_chunk_is_in_flight_with_one_peer_and_a_helper_at_most(steps):
    plan: Plan[str] = Plan(range(6), per_peer_max=2)
    flying: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for now, (peer, step) in enumerate(steps):
        plan.add(peer)
        if step in ("take", "help"):
            index = plan.take(peer, now) if step == "take" else plan.help(peer, now, 0.5)
            if index is not None:
                holders = sum(index in held for held in flying.values())
                assert holders == (0 if step == "take" else 1)
                assert index not in flying[peer]
                assert index in plan.missing
                flying[peer].append(index)
                assert len(flying[peer]) <= 2
        elif step == "drop":
            plan.drop(peer)
            flying[peer].clear()
        elif flying[peer]:
            index = flying[peer].pop()
            if step == "ok":
                assert plan.arrived(index)
                flying = {other: [i for i in held if i != index] for other, held in flying.items()}
            elif step == "no":
                plan.lacks(peer, index)
            else:
                plan.again(index, peer)


def test_the_peer_book_survives_a_restart_and_damage(tmp_path):
    path = tmp_path / "peers.json"
    book = Peerbook(path)
    book.met(PEER, ["/ip4/127.0.0.1/tcp/1"], "/rios/lane/1.0.0")
    book.save()
    known = Peerbook(path)
    assert known.get(PEER) == Met(("/ip4/127.0.0.1/tcp/1",), "/rios/lane/1.0.0")
    before = path.stat().st_mtime_ns
    known.met(PEER, ["/ip4/127.0.0.1/tcp/1"], "/rios/lane/1.0.0")
    known.save()
    assert path.stat().st_mtime_ns == before, "nothing changed, nothing is written"
    for damage in (
        "",
        "{",
        "[]",
        '{"peers": 3}',
        '{"peers": {"a": 3, "b": [5, "x"], "c": {"addresses": 1}}}',
        "[" * 99999,
    ):
        path.write_text(damage)
        assert not Peerbook(path).peers()
    path.write_text('{"peers": {"old": ["/ip4/127.0.0.1/tcp/1"]}}')
    assert Peerbook(path).peers() == {"old": Met(("/ip4/127.0.0.1/tcp/1",))}


def test_the_peer_book_forgets_whom_it_met_longest_ago(tmp_path, monkeypatch):
    monkeypatch.setattr("p2p.peerbook.PEERS_MAX", 3)
    book = Peerbook(tmp_path / "peers.json")
    for name in "abcad":
        book.met(name, ["/ip4/127.0.0.1/tcp/1"])
    assert list(book.peers()) == ["d", "a", "c"]


def test_seeds_by_peer():
    seeds = [f"/ip4/127.0.0.1/tcp/2/p2p/{PEER}", f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}"]
    assert by_peer(seeds) == {PEER: ["/ip4/127.0.0.1/tcp/2", "/ip4/127.0.0.1/tcp/1"]}
    for bad in ("x", "/ip4/127.0.0.1/tcp/1", f"/ip4/127.0.0.1/udp/1/p2p/{PEER}", "/ip4/127.0.0.1/tcp/1/p2p/Qm"):
        with pytest.raises(ConfigError) as error:
            by_peer([bad])
        assert bad in error.value.message
        assert error.value.hint


def test_errors_travel():
    busy = failures.from_header(failures.to_header(BusyError("full", retry_after_ms=9)), PEER)
    assert isinstance(busy, BusyError)
    assert busy.retry_after_ms == 9
    wrong = failures.from_header(failures.to_header(IntegrityError("integrity", "m", "h")), PEER)
    assert isinstance(wrong, RemoteError)
    assert (wrong.code, wrong.message, wrong.hint, wrong.peer_id) == ("integrity", "m", "h", PEER)
    for hostile in ({}, {"code": 3}, {"code": "no such"}, {"code": "local", "message": 5, "hint": b"x"}):
        assert failures.from_header(hostile, PEER).code in ("protocol", "local")


@pytest.mark.parametrize(
    "data", [b"", b"\xdd\xff\xff\xff\xff", b"\x93\x01\x02\x03", b"\xdf\xff\xff\xff\xff", b"\x81" * 900]
)
def test_hostile_headers_are_refused(data):
    with pytest.raises(IntegrityError):
        headers.unpack(data)


def lists(count: int) -> bytes:
    """A header with so many lists in a list."""
    return b"\x81\xa1a\xdd" + count.to_bytes(4, "big") + b"\x91\x01" * count


def test_a_header_has_so_many_parts_for_its_size():
    assert len(headers.unpack(lists(headers.PARTS_MAX - 2))["a"]) == headers.PARTS_MAX - 2
    with pytest.raises(IntegrityError, match="too many"):
        headers.unpack(lists(headers.PARTS_MAX - 1))
    with pytest.raises(RequestError, match="too many"):
        headers.pack({"a": [[1]] * headers.PARTS_MAX})
    entries = [{"id": n, "hash": bytes(32)} for n in range(2 * headers.PARTS_MAX // 3)]
    assert headers.unpack(headers.pack({"a": entries}))["a"] == entries, "large ones may have more"


def test_of_many_peers_those_in_other_networks_are_dialled_first():
    def advert(name: str, *hosts: str) -> Advert:
        return Advert(name, 1, 1, addresses=tuple(f"/ip4/{host}/tcp/1" for host in hosts))

    crowd = {f"crowd{n}": advert(f"crowd{n}", f"10.0.0.{n}") for n in range(50)}
    others = {"b": advert("b", "10.0.1.1"), "c": advert("c", "10.0.2.1")}
    boaster = {"boaster": advert("boaster", "10.0.0.99", *(f"10.9.{n}.1" for n in range(9)))}
    linked = [advert("x", "10.0.0.200"), advert("y", "10.0.1.200")]
    dice = iter(range(1000))
    chosen = choose({**crowd, **boaster, **others}, linked, 4, lambda: next(dice))
    assert chosen[0] == "c", "nobody is linked there"
    assert len(chosen) == len(set(chosen)) == 4
    assert "b" in chosen
    assert sum(peer.startswith("crowd") for peer in chosen) <= 2
    assert len(choose(crowd, [], 99, lambda: 0.5)) == 50, "one network only is no reason to stay alone"
