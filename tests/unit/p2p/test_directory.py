"""The directory around its view: what is blamed, what is sent when, and that a peer that hangs keeps nobody waiting."""

import json
from hashlib import sha256
from types import SimpleNamespace

import msgspec
import pytest
import trio
import trio.testing

from config.errors import BusyError
from config.settings import P2pSettings
from p2p import checks as cost
from p2p.core import advert as adverts
from p2p.core import heartbeat
from p2p.core.advert import TAG, Advert, ModelOffer, sign
from p2p.core.heartbeat import Heartbeat, open_heartbeat
from p2p.core.identity import Identity
from p2p.directory import BEAT_TOPIC, TOPIC, PeerDirectory, now_ms
from p2p.face import Call, Reply
from p2p.network import open_network

ME, OTHER, THIRD = (Identity.from_seed(letter * 32) for letter in (b"m", b"o", b"t"))


class FakeCaller:
    """Linked peers; calls to ``hung`` never end."""

    def __init__(self, *peers: str, hung: str = "") -> None:
        self.linked = peers
        self.hung = hung
        self.calls: list[tuple[str, str]] = []

    def peers(self):
        return self.linked

    def is_linked(self, peer_id):
        return peer_id in self.linked

    async def call(self, peer_id, method, header, buffers=(), *, deadline_ms):
        self.calls.append((peer_id, method))
        if peer_id == self.hung:
            await trio.sleep_forever()
        return Reply({})


def made(caller: FakeCaller, blamed: list | None = None) -> PeerDirectory:
    fake_host = SimpleNamespace(accept_records=lambda *_: None, learn=lambda *_: None, leave=lambda *_: None)
    blame = (lambda peer, fault: blamed.append((peer, fault))) if blamed is not None else lambda *_: None
    return PeerDirectory(ME, fake_host, caller, Advert(ME.peer_id, 0, 0), advert_seconds=60, blame=blame)


def advert(identity: Identity, **fields) -> bytes:
    now = now_ms()
    told = {"seq": now, "expires_ms": now + 60_000, **fields}
    return sign(identity, Advert(peer_id=identity.peer_id, **told)).data


def push(method: str, sender: Identity, *buffers: bytes) -> Call:
    """A call as it arrives, whatever else calls may carry."""
    needed = {"peer_id": sender.peer_id, "method": method, "header": {}, "buffers": buffers, "deadline": 0.0}
    return Call(**needed)


async def test_lies_are_dropped_counted_and_blamed_on_who_sent_them():
    blamed: list[tuple[str, str]] = []
    it = made(FakeCaller(), blamed)
    body = msgspec.msgpack.encode([OTHER.peer_id, now_ms(), now_ms() + 60_000])
    forged = msgspec.msgpack.encode([body, THIRD.sign(TAG, body)])
    old = advert(OTHER, expires_ms=now_ms() - 1)
    absurd = advert(OTHER, addresses=("/ip4/1.2.3.4/tcp/0",))
    future = advert(OTHER, seq=now_ms() + 10**8)
    await it.serve_push(push("advert.push", THIRD, forged, old, absurd, future, b"", bytes(70_000)))
    assert set(it.adverts()) == {ME.peer_id}
    kinds = {"signature": 1, "expired": 1, "absurd": 1, "future": 1, "malformed": 1, "too_large": 1}
    assert it.statistics()["refused"] == kinds
    assert blamed == [(THIRD.peer_id, "bad_advert")] * 4, "who passes on something old is not to blame"
    good = advert(OTHER)
    await it.serve_push(push("advert.push", THIRD, good, good))
    assert it.statistics()["refused"]["stale"] == 1
    assert len(blamed) == 4
    beat = heartbeat.sign(OTHER, Heartbeat(OTHER.peer_id, now_ms() + 5, 40))
    next_beat = heartbeat.sign(OTHER, Heartbeat(OTHER.peer_id, now_ms() + 9, 50))
    await it.serve_beat(push("advert.beat", OTHER, beat, next_beat[:-1] + bytes([next_beat[-1] ^ 1])))
    assert it.adverts()[OTHER.peer_id].load == 40
    assert blamed[4:] == [(OTHER.peer_id, "bad_advert")]


async def test_a_peer_that_hangs_does_not_hold_up_what_is_published(autojump_clock):
    caller = FakeCaller("hung", "fine", hung="hung")
    it = made(caller)
    published: list[tuple[str, bytes]] = []

    async def publish(topic: str, payload: bytes) -> None:
        published.append((topic, payload))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.run, publish)
        for region in ("x", "y", "z"):
            it.update(lambda own, region=region: msgspec.structs.replace(own, region=region))
            await trio.sleep(1)
        assert [topic for topic, _ in published] == [TOPIC] * 3
        assert caller.calls.count(("fine", "advert.push")) == 3
        nursery.cancel_scope.cancel()


async def test_changes_are_collected_and_loads_travel_as_heartbeats_at_a_bounded_rate(autojump_clock):
    it = made(FakeCaller())
    published: list[tuple[str, bytes]] = []

    async def publish(topic: str, payload: bytes) -> None:
        published.append((topic, payload))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.run, publish)
        for n in range(100):  # over a second
            it.update(lambda own, n=n: msgspec.structs.replace(own, disk_bytes=n))
            await trio.sleep(0.01)
        await trio.sleep(1)
        assert 2 <= len(published) <= 4
        assert it.own().disk_bytes == 99
        published.clear()
        for n in range(200):  # over two seconds
            it.update(lambda own, n=n: msgspec.structs.replace(own, load=1000 * (n % 7)))
            await trio.sleep(0.01)
        it.update(lambda own: msgspec.structs.replace(own, load=7777))
        await trio.sleep(2)
        assert {topic for topic, _ in published} == {BEAT_TOPIC}
        assert 2 <= len(published) <= 4
        assert open_heartbeat(published[-1][1], now_ms=now_ms()).load == 7777
        published.clear()
        it.update(lambda own: msgspec.structs.replace(own, load=7778))
        await trio.sleep(5)
        assert not published, "a small change is not worth a message"
        nursery.cancel_scope.cancel()


async def test_only_changes_that_matter_wake_those_who_wait():
    it = made(FakeCaller())
    woken = []

    async def wait() -> None:
        while True:
            await it.wait_change()
            woken.append(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        now = now_ms()
        for number, (fields, expected) in enumerate(
            [({}, 1), ({}, 1), ({"load": 5}, 1), ({"coordinate": (1, 2, 3, 4, 5)}, 1), ({"paused": True}, 2)]
        ):
            await it.take(OTHER.peer_id, [advert(OTHER, seq=now + number, **fields)])
            await trio.testing.wait_all_tasks_blocked()
            assert len(woken) == expected, fields
        nursery.cancel_scope.cancel()


async def test_a_node_alone_goes_through_its_whole_peer_book(tmp_path, monkeypatch):
    monkeypatch.setattr("p2p.mesh.BOOK_PAUSE_S", (0.3, 60.0))
    settings = P2pSettings(listen=("/ip4/127.0.0.1/tcp/0",))

    def network(name: str):
        identity = Identity.from_seed(sha256(name.encode()).digest())
        return open_network(identity, settings, data_dir=tmp_path / name, version="1")

    async with network("a") as a:
        dead = {Identity.from_seed(bytes([n]) * 32).peer_id: ["/ip4/127.0.0.1/tcp/1"] for n in range(20)}
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "peers.json").write_text(json.dumps({"peers": {a.peer_id: [a.addresses[0]], **dead}}))
        async with network("b") as b:
            with trio.fail_after(20):
                while a.peer_id not in b.peers():  # noqa: ASYNC110 - a link raises no event here
                    await trio.sleep(0.02)


@pytest.mark.parametrize("linked", [True, False])
async def test_providers_with_a_link_come_first(linked):
    caller = FakeCaller(THIRD.peer_id) if linked else FakeCaller()
    it = made(caller)
    held = (ModelOffer("ab" * 32, b"\x01", 1, 1, 1),)
    await it.take(OTHER.peer_id, [advert(OTHER, models=held), advert(THIRD, models=held)])
    found = list(it.providers("ab" * 32, 0))
    assert set(found) == {OTHER.peer_id, THIRD.peer_id}
    if linked:
        assert found[0] == THIRD.peer_id


@pytest.fixture
def checks(monkeypatch) -> list[str]:
    """A note for every signature that is checked."""
    made: list[str] = []
    for module in (adverts, heartbeat):

        def noted(key, tag, body, signature, verify=module.verify):
            made.append(tag)
            return verify(key, tag, body, signature)

        monkeypatch.setattr(module, "verify", noted)
    return made


async def test_what_is_no_news_costs_no_signature_check_and_others_run_meanwhile(checks):
    it = made(FakeCaller(THIRD.peer_id))
    ran = 0

    async def others() -> None:
        nonlocal ran
        while True:
            ran += 1
            await trio.lowlevel.checkpoint()

    now = now_ms()
    beat = heartbeat.sign(OTHER, Heartbeat(OTHER.peer_id, now + 5, 40))
    unknown = heartbeat.sign(THIRD, Heartbeat(THIRD.peer_id, now + 5, 40))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        await it.serve_push(push("advert.push", THIRD, *[advert(OTHER, seq=now)] * 200))
        await it.serve_push(push("advert.push", THIRD, *[advert(THIRD, expires_ms=now - 1)] * 200))
        assert len(checks) == 1
        await it.serve_beat(push("advert.beat", THIRD, *[beat] * 100, *[unknown] * 100))
        assert len(checks) == 2
        nursery.cancel_scope.cancel()
    assert ran > 30
    assert it.statistics()["refused"] == {"stale": 199, "expired": 200, "beat_stale": 99, "beat_unknown": 100}


async def test_a_sender_has_so_many_signatures_checked_and_no_more(autojump_clock, monkeypatch, checks):
    monkeypatch.setattr(cost, "CHECKS_PER_SECOND", 10.0)
    monkeypatch.setattr(cost, "CHECKS_BURST", 50.0)
    blamed: list[tuple[str, str]] = []
    it = made(FakeCaller(OTHER.peer_id, THIRD.peer_id), blamed)
    flood = [advert(Identity.from_seed(n.to_bytes(32, "big"))) for n in range(300)]
    await it.serve_push(push("advert.push", THIRD, *flood[:100]))
    assert 40 <= len(checks) <= 50
    assert blamed == [(THIRD.peer_id, "refused")]
    assert it.statistics()["refused"] == {"too_many": 1}
    before = len(checks)
    await it.serve_push(push("advert.push", OTHER, *flood[100:120]))
    assert len(checks) == before + 20, "others are not concerned"
    await trio.sleep(1)
    await it.serve_exchange(Call(THIRD.peer_id, "advert.exchange", {"known": {}}, tuple(flood[200:]), 0.0))
    assert len(checks) - before - 20 <= 11
    before = len(checks)
    await it.serve_beat(push("advert.beat", THIRD, *[heartbeat.sign(OTHER, Heartbeat(OTHER.peer_id, now_ms()))] * 9))
    assert len(checks) == before


async def test_authors_of_gossip_share_what_they_may_have_checked(autojump_clock, monkeypatch, checks):
    monkeypatch.setattr(cost, "GOSSIP_CHECKS_PER_SECOND", 10.0)
    it = made(FakeCaller())
    for n in range(300):
        one = Identity.from_seed(n.to_bytes(32, "big"))
        await it.on_gossip(one.peer_id, advert(one))
    assert 35 <= len(checks) <= 50


async def test_searches_look_at_nothing_for_models_nobody_offers_and_at_so_much_at_most(autojump_clock, monkeypatch):
    monkeypatch.setattr(cost, "LOOKS_PER_SECOND", 20.0)
    monkeypatch.setattr(cost, "LOOKS_BURST", 100.0)
    it = made(FakeCaller())
    held = (ModelOffer("ab" * 32, b"\x01", 1, 1, 1),)
    for n in range(19):
        it.offer(advert(Identity.from_seed(n.to_bytes(32, "big")), models=held))

    def find(model: str, index: int, sender: Identity = THIRD) -> Call:
        return Call(sender.peer_id, "advert.find", {"model": model, "shard": index}, (), 0.0)

    for _ in range(1000):
        assert not (await it.finder.serve(find("cd" * 32, 0))).buffers
    for _ in range(5):
        assert not (await it.finder.serve(find("ab" * 32, 9))).buffers
    with pytest.raises(BusyError):
        await it.finder.serve(find("ab" * 32, 9))
    with pytest.raises(BusyError):
        await it.serve_exchange(Call(THIRD.peer_id, "advert.exchange", {"known": {}}, (), 0.0))
    assert len((await it.finder.serve(find("ab" * 32, 0, OTHER))).buffers) == 8
    it.providers("ab" * 32, 0)
    assert len((await it.finder.serve(find("ab" * 32, 0))).buffers) == 8, "what this node follows is at hand"
    await trio.sleep(1)
    assert len((await it.finder.serve(find("ab" * 32, 1))).buffers) == 0
    for peer in list(it.adverts()):
        it.view.remove(peer)
    assert not any(it.view._offered), "what leaves is not counted any more"
