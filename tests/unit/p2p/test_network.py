"""The network's face over real libp2p hosts in one process."""

import resource
from collections.abc import Callable
from hashlib import sha256
from os import urandom

import msgspec
import pytest
import trio

from config.errors import BusyError, ConfigError, IntegrityError, LocalError, RemoteError, RequestError
from config.settings import P2pSettings
from p2p.core.advert import Advert, ModelOffer
from p2p.core.chunks import CHUNK_BYTES
from p2p.core.identity import Identity
from p2p.face import Call, ContentFile, Network, RecordRule, Reply
from p2p.network import PeerNetwork, open_network

ANY = ("/ip4/127.0.0.1/tcp/0",)


async def until(condition: Callable[[], bool], seconds: float = 15) -> None:
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for is in another node
            await trio.sleep(0.02)


@pytest.fixture
async def nodes(tmp_path, nursery):
    async def run(name: str, settings: P2pSettings, task_status=trio.TASK_STATUS_IGNORED) -> None:
        identity = Identity.from_seed(sha256(name.encode()).digest())
        async with open_network(identity, settings, data_dir=tmp_path / name, version="1") as network:
            task_status.started(network)
            await trio.sleep_forever()

    async def start(name: str, *seeds: PeerNetwork, **settings: object) -> PeerNetwork:
        every = P2pSettings(listen=ANY, seeds=tuple(s.addresses[0] for s in seeds), **settings)
        return await nursery.start(run, name, every)

    return start


@pytest.fixture
async def pair(nodes):
    a = await nodes("a")
    b = await nodes("b", a)
    await until(lambda: b.peer_id in a.directory.adverts() and a.peer_id in b.directory.adverts())
    return a, b


async def echo(call: Call) -> Reply:
    return Reply({"from": call.peer_id, **call.header}, call.buffers)


async def test_calls_both_ways_and_to_oneself(pair):
    for node in pair:
        node.serve("echo", echo)
    a, b = pair
    face: Network = a
    for size in (0, 1, 100, 65_000, 66_000, 5_000_000):
        data = urandom(size)
        reply = await face.call(b.peer_id, "echo", {"x": [1, None, b"y"]}, [data, b"", b"z"], deadline_ms=5000)
        assert reply.header == {"from": a.peer_id, "x": [1, None, b"y"]}
        assert [bytes(part) for part in reply.buffers] == [data, b"", b"z"]
    for target, source in ((a, b), (a, a)):
        reply = await source.call(target.peer_id, "echo", {}, [bytearray(b"q")], deadline_ms=5000)
        assert (reply.header["from"], bytes(reply.buffers[0])) == (source.peer_id, b"q")


async def test_many_calls_at_once_keep_apart(pair):
    a, b = pair
    b.serve("echo", echo)
    done = []

    async def one(number: int) -> None:
        data = bytes([number]) * (number * 2000)
        reply = await a.call(b.peer_id, "echo", {"n": number}, [data], deadline_ms=20_000)
        assert reply.header["n"] == number
        assert reply.buffers[0] == data
        done.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(one, number)
    assert len(done) == 200


async def test_errors_reach_the_caller_and_hurt_nobody_else(pair):
    a, b = pair

    async def refuse(call: Call) -> Reply:
        raise RemoteError("payment_required", "no credit", "open a channel")

    async def busy(call: Call) -> Reply:
        raise BusyError("full", retry_after_ms=70)

    async def bug(call: Call) -> Reply:
        raise KeyError("x")

    async def huge(call: Call) -> Reply:
        return Reply({}, [bytes(65 << 20)])

    for name, handler in (("refuse", refuse), ("busy", busy), ("bug", bug), ("echo", echo), ("huge", huge)):
        b.serve(name, handler)
    with pytest.raises(RemoteError) as refused:
        await a.call(b.peer_id, "refuse", {}, deadline_ms=5000)
    assert (refused.value.code, refused.value.hint, refused.value.peer_id) == (
        "payment_required",
        "open a channel",
        b.peer_id,
    )
    with pytest.raises(BusyError) as told:
        await a.call(b.peer_id, "busy", {}, deadline_ms=5000)
    assert told.value.retry_after_ms == 70
    for method, code in (("bug", "internal"), ("none", "not_found"), ("huge", "too_large")):
        with pytest.raises(RemoteError) as error:
            await a.call(b.peer_id, method, {}, deadline_ms=5000)
        assert error.value.code == code
    with pytest.raises(RequestError) as large:
        await a.call(b.peer_id, "echo", {}, [bytes(65 << 20)], deadline_ms=5000)
    assert large.value.code == "too_large"
    assert (await a.call(b.peer_id, "echo", {"still": 1}, deadline_ms=5000)).header["still"] == 1


async def test_deadline_and_cancellation_end_the_handler(pair):
    a, b = pair
    events: list[str] = []
    began, ended = trio.Event(), trio.Event()

    async def slow(call: Call) -> Reply:
        began.set()
        try:
            await trio.sleep_forever()
        finally:
            events.append(call.header["why"])
            ended.set()
        raise AssertionError

    b.serve("slow", slow)
    with pytest.raises(RemoteError) as error:
        await a.call(b.peer_id, "slow", {"why": "deadline"}, deadline_ms=100)
    assert error.value.code == "deadline"
    with trio.fail_after(5):
        await ended.wait()
    began, ended = trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:

        async def caller() -> None:
            await a.call(b.peer_id, "slow", {"why": "cancel"}, deadline_ms=60_000)

        nursery.start_soon(caller)
        await began.wait()
        nursery.cancel_scope.cancel()
    with trio.fail_after(5):
        await ended.wait()
    assert events == ["deadline", "cancel"]


async def test_a_peer_with_too_many_calls_is_told_busy(nodes):
    a = await nodes("a", calls_per_peer_max=3)
    b = await nodes("b", a)
    release = trio.Event()
    codes: list[str] = []

    async def wait(call: Call) -> Reply:
        await release.wait()
        return Reply({})

    a.serve("wait", wait)

    async def one() -> None:
        try:
            await b.call(a.peer_id, "wait", {}, deadline_ms=10_000)
            codes.append("ok")
        except BusyError as error:
            codes.append(error.code)
            release.set()

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one)
    assert len(codes) == 5
    assert codes.count("ok") >= 2  # an exchange of adverts may hold the third place


async def test_adverts_change_and_records_are_stored(nodes):
    a = await nodes("a")
    b, c = await nodes("b", a), await nodes("c", a)
    everybody = {a.peer_id, b.peer_id, c.peer_id}
    await until(lambda: all(set(n.directory.adverts()) == everybody for n in (a, b, c)))
    await until(lambda: all(len(n.peers()) == 2 for n in (a, b, c)))
    model = "ab" * 32
    offer = ModelOffer(model, b"\x01", 1, 2, 3)
    c.directory.update(lambda advert: msgspec.structs.replace(advert, load=9, models=(offer,)))
    assert c.directory.adverts()[c.peer_id].load == 9
    await until(lambda: a.directory.adverts()[c.peer_id].load == 9 and b.directory.adverts()[c.peer_id].load == 9)
    # the load alone travels as a heartbeat, if it changed much; the advert stays as it was signed
    before = a.directory.view.signed(c.peer_id)
    c.directory.update(lambda advert: msgspec.structs.replace(advert, load=20))
    c.directory.update(lambda advert: msgspec.structs.replace(advert, load=700))
    await until(lambda: a.directory.adverts()[c.peer_id].load == 700 and b.directory.adverts()[c.peer_id].load == 700)
    assert a.directory.view.signed(c.peer_id) is before

    # a record whose namespace has a rule goes through the DHT, others are refused
    rule = RecordRule(lambda name, value: _must_start(value), lambda name, values: 0)
    for node in (a, b, c):
        node.directory.accept_records("test", rule)
    await b.directory.put_record("test", "k", b"v1")
    assert await c.directory.get_record("test", "k") == b"v1"
    for namespace, value in (("test", b"x"), ("strange", b"v")):
        with pytest.raises(RequestError):
            await b.directory.put_record(namespace, "k", value)
    assert await a.directory.get_record("test", "absent") is None

    # who has lost sight of a provider finds it: a linked peer knows it, and so does the DHT
    await until(lambda: len(c.directory.announcements.announced) == 2)
    for find in (b.directory.find_providers, b.directory.finder.look_up):
        b.directory.view.remove(c.peer_id)
        assert b.directory.providers(model, 0) == ()
        with trio.fail_after(15):
            while not await find(model, 0):  # noqa: ASYNC110 - what is waited for is in another node
                await trio.sleep(0.1)
        assert b.directory.adverts()[c.peer_id].offer(model) == offer
        assert list(b.directory.providers(model, 0)) == [c.peer_id]
    assert b.directory.finder.dht_searches >= 1
    assert list(await b.directory.find_providers(model)) == [c.peer_id]
    for wrong in (("x", 0), (model, -1), (model, 1 << 20)):
        with pytest.raises(RequestError):
            await b.directory.find_providers(*wrong)


def _must_start(value: bytes) -> None:
    if not value.startswith(b"v"):
        raise IntegrityError("integrity", "it must start with v")


async def test_how_far_others_are_and_in_which_region(nodes, monkeypatch):
    monkeypatch.setattr("p2p.locating.FIRST_ROUNDS_S", 0.1)
    monkeypatch.setattr("p2p.locating.ROUND_S", 0.1)
    a = await nodes("a", advert_seconds=1)
    b = await nodes("b", a, advert_seconds=1)
    assert a.directory.distance_ms(Identity.from_seed(b"x" * 32).peer_id) is None
    a.directory.update(lambda own: msgspec.structs.replace(own, region="here"))
    await until(lambda: b.locator.regions().get(b.peer_id) == ("here", True))
    assert b.locator.regions()[a.peer_id] == ("here", False)
    assert 0 < b.directory.distance_ms(a.peer_id) < 5000
    b.locator._rtts_us.clear()
    await until(lambda: b.directory.distance_ms(a.peer_id) is not None)


async def test_gossip_reaches_others_and_is_bounded(pair):
    a, b = pair
    got: list[tuple[str, bytes]] = []

    async def broken(peer, payload):
        raise ValueError

    async def take(peer, payload):
        got.append((peer, payload))

    b.subscribe("topic", broken)
    b.subscribe("topic", take)
    with pytest.raises(RequestError):
        await a.publish("topic", bytes((64 << 10) + 1))
    with trio.fail_after(20):
        while not got:
            await a.publish("topic", b"hello")
            await trio.sleep(0.3)
    assert set(got) == {(a.peer_id, b"hello")}


class Source:
    """Chunks in memory; may lie."""

    def __init__(self, data: bytes, lie: bool = False) -> None:
        parts = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
        self.chunks = {sha256(part).digest(): (b"\0" * len(part) if lie else part) for part in parts}
        self.reads = 0

    def read_chunk(self, digest: bytes) -> bytes | None:
        self.reads += 1
        return self.chunks.get(digest)


def content(data: bytes) -> ContentFile:
    parts = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
    return ContentFile(sha256(data).hexdigest(), len(data), tuple(sha256(part).digest() for part in parts))


async def test_fetch_from_several_with_a_liar_and_resume(nodes, tmp_path):
    a = await nodes("a")
    b, c = await nodes("b", a), await nodes("c", a)
    await until(lambda: len(c.peers()) == 2)
    data = urandom(6 * CHUNK_BYTES + 77)
    good, liar = Source(data), Source(data, lie=True)
    a.blobs.offer(good)
    b.blobs.offer(liar)
    target = tmp_path / "file"
    # what an ended fetch left behind: two good chunks, one damaged
    (tmp_path / "file.part").write_bytes(data[: 2 * CHUNK_BYTES] + b"damaged" * 1000)
    done = []
    await c.blobs.fetch(content(data), target, lambda: [a.peer_id, b.peer_id], done.append)
    assert target.read_bytes() == data
    assert done[0] == 2 * CHUNK_BYTES
    assert sum(done) == len(data)
    assert good.reads == 5
    assert c.doors.faults["bad_chunk"] >= 1
    assert c.doors.peer(b.peer_id)["score"] < c.doors.peer(a.peer_id)["score"]
    assert not (tmp_path / "file.part").exists()
    await c.blobs.fetch(content(data), target, lambda: [])  # it is there already


async def test_fetch_fails_clearly(pair, tmp_path):
    a, b = pair
    data = urandom(3 * CHUNK_BYTES)
    with pytest.raises(RemoteError) as nobody:
        await b.blobs.fetch(content(data), tmp_path / "x", lambda: [a.peer_id])
    assert nobody.value.code == "unavailable"
    a.blobs.offer(Source(data))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * CHUNK_BYTES, hard))
    try:
        with pytest.raises(LocalError) as full:
            await b.blobs.fetch(content(data), tmp_path / "x", lambda: [a.peer_id])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full.value.code == "disk_full"
    assert str(tmp_path / "x") in full.value.message
    await b.blobs.fetch(content(data), tmp_path / "x", lambda: [a.peer_id])
    assert (tmp_path / "x").read_bytes() == data
    empty = content(b"")
    await b.blobs.fetch(empty, tmp_path / "empty", lambda: [])
    assert (tmp_path / "empty").read_bytes() == b""
    wrong = ContentFile("00" * 32, len(data), content(data).chunks)
    with pytest.raises(IntegrityError):
        await b.blobs.fetch(wrong, tmp_path / "y", lambda: [a.peer_id])
    assert not (tmp_path / "y").exists()


async def test_a_taken_port_and_bad_input(nodes, tmp_path):
    a = await nodes("a")
    identity = Identity.from_seed(b"z" * 32)
    taken = a.addresses[0].partition("/p2p/")[0]
    for settings, kind, code in (
        (P2pSettings(listen=(taken,)), LocalError, "port_taken"),
        (P2pSettings(listen=("/ip4/127.0.0.1/udp/1",)), ConfigError, "config"),
        (P2pSettings(listen=ANY, seeds=("/ip4/127.0.0.1/tcp/1",)), ConfigError, "config"),
        (P2pSettings(listen=ANY, seeds=("nonsense",)), ConfigError, "config"),
        (P2pSettings(listen=ANY, seeds_file=str(tmp_path / "none")), ConfigError, "config"),
        (P2pSettings(listen=ANY, announce=("x",)), ConfigError, "config"),
    ):
        with pytest.raises(kind) as error:
            async with open_network(identity, settings, data_dir=tmp_path / "z", version="1"):
                pass
        assert error.value.code == code
        assert error.value.hint or code == "config"


async def test_the_body_s_own_error_comes_out_plain(tmp_path):
    async def run() -> None:
        first = Advert(peer_id="", seq=0, expires_ms=0, region="here")
        identity, settings = Identity.from_seed(b"z" * 32), P2pSettings(listen=ANY)
        async with open_network(identity, settings, data_dir=tmp_path, version="7", advert=first) as network:
            assert (network.directory.own().version, network.directory.own().region) == ("7", "here")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run()


async def test_an_unreachable_peer_is_unavailable_at_once(pair):
    a, _ = pair
    stranger = Identity.from_seed(b"s" * 32).peer_id
    with pytest.raises(RemoteError) as error, trio.fail_after(3):
        await a.call(stranger, "echo", {}, deadline_ms=10_000)
    assert error.value.code == "unavailable"


async def test_simultaneous_dials_end_in_one_link(nodes):
    a, b = await nodes("a"), await nodes("b")
    for node in (a, b):
        node.serve("echo", echo)
    a._host.learn(b.peer_id, b.addresses)
    b._host.learn(a.peer_id, a.addresses)

    async def call(source: PeerNetwork, target: PeerNetwork) -> None:
        await source.call(target.peer_id, "echo", {}, deadline_ms=10_000)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, a, b)
        nursery.start_soon(call, b, a)
    await until(lambda: all(len(links) == 1 for node in (a, b) for links in node.links._links.values()))
    await call(a, b)
    await call(b, a)
