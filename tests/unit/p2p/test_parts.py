"""The small parts: chunk plan, peer book, seed lists, errors on the wire."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import BusyError, ConfigError, IntegrityError, RemoteError
from p2p.core import failures, headers
from p2p.core.chunks import Plan, chunk_count, chunk_span
from p2p.core.identity import Identity
from p2p.mesh import by_peer
from p2p.peerbook import Peerbook

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
    assert plan.take("b") == 3
    assert plan.take("b") is None
    first, second = plan.take("a"), plan.take("a")
    assert {first, second} <= {0, 1, 2}
    assert plan.take("a") is None  # two in flight
    plan.arrived(first)
    plan.drop("a")
    plan.add("c")
    assert {plan.take("c"), plan.take("c")} == {0, 1, 2} - {first}
    assert not plan.done
    for index in range(4):
        plan.arrived(index)
    assert plan.done


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["take", "ok", "no", "fail", "drop"])), max_size=80))
def test_a_chunk_is_in_flight_with_one_peer_only(steps):
    plan: Plan[str] = Plan(range(6), per_peer_max=2)
    flying: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for peer, step in steps:
        plan.add(peer)
        if step == "take":
            index = plan.take(peer)
            if index is not None:
                assert all(index not in held for held in flying.values())
                assert index in plan.missing
                flying[peer].append(index)
                assert len(flying[peer]) <= 2
        elif step == "drop":
            plan.drop(peer)
            flying[peer].clear()
        elif flying[peer]:
            index = flying[peer].pop()
            {"ok": plan.arrived, "no": lambda i, p=peer: plan.lacks(p, i), "fail": plan.again}[step](index)


def test_the_peer_book_survives_a_restart_and_damage(tmp_path):
    path = tmp_path / "peers.json"
    book = Peerbook(path)
    book.met(PEER, ["/ip4/127.0.0.1/tcp/1"])
    book.save()
    assert dict(Peerbook(path).peers()) == {PEER: ["/ip4/127.0.0.1/tcp/1"]}
    for damage in ("", "{", "[]", '{"peers": 3}', '{"peers": {"a": 3}}'):
        path.write_text(damage)
        assert not Peerbook(path).peers()


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
