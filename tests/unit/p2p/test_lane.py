"""The direct lane under strange and hostile hands, on real sockets: it ends, the node goes on."""

import socket as plain_socket
from contextlib import asynccontextmanager
from functools import partial
from hashlib import sha256
from os import urandom

import pytest
import trio
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from config.errors import IntegrityError, RemoteError, RiosError
from config.settings import P2pSettings
from p2p import front, handshake, links
from p2p.core import frames, payload, records
from p2p.core.identity import Identity
from p2p.deadlines import SLACK, Deadlines
from p2p.face import Call, Reply
from p2p.handshake import Keys, await_welcome, shake
from p2p.host import open_host
from p2p.lanes import connect
from p2p.network import open_network

ANY = ("/ip4/127.0.0.1/tcp/0",)


def identity(name: str) -> Identity:
    return Identity.from_seed(sha256(name.encode()).digest())


@pytest.fixture
async def start(tmp_path, nursery):
    async def run(name, settings, task_status=trio.TASK_STATUS_IGNORED):
        async with open_network(identity(name), settings, data_dir=tmp_path / name, version="1") as network:
            network.serve("echo", echo)
            task_status.started(network)
            await trio.sleep_forever()

    async def make(name, *seeds, **settings):
        return await nursery.start(
            run, name, P2pSettings(listen=ANY, seeds=tuple(s.addresses[0] for s in seeds), **settings)
        )

    return make


async def echo(call: Call) -> Reply:
    return Reply(call.header, call.buffers)


def port_of(node) -> int:
    return int(node.addresses[0].split("/")[4])


@asynccontextmanager
async def stranger(node, name: str):
    """A peer with keys of its own on a lane that it drives by hand: its socket and its secrets."""
    socket = await connect("127.0.0.1", port_of(node))
    with socket:
        await socket.send(front.preamble(front.LANE))
        secured = await shake(socket, Keys(identity(name)), initiator=True, expected=node.peer_id)
        await await_welcome(socket, secured)
        yield socket, secured


async def until_closed(socket) -> None:
    with trio.fail_after(5):
        try:
            while await socket.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass


def record(secured, kind: int, data: bytes, number: int = 0) -> bytes:
    head = (kind << 24 | len(data) + 16).to_bytes(4, "big")
    return head + secured.seal.encrypt(bytes(4) + number.to_bytes(8, "little"), data, head)


PING = frames.Machine(frame_bytes_max=1 << 20).ping(1)[0]


async def test_a_peer_of_its_own_making_is_understood(start):
    a = await start("a")
    async with stranger(a, "own") as (socket, secured):
        # a record kind of the future between two pings is ignored; pings come back as records of the main channel
        for number, (kind, data) in enumerate(((0, PING), (200, b"later"), (0, PING))):
            await socket.send(record(secured, kind, data, number))
        got = b""
        opened = []
        with trio.fail_after(5):
            while sum(p.count(b"\x08") for p in opened) < 2:
                got += await socket.recv(1 << 16)
                while len(got) >= 4 and len(got) >= 4 + (size := int.from_bytes(got[1:4], "big")):
                    nonce = bytes(4) + len(opened).to_bytes(8, "little")
                    plain = secured.open.decrypt(nonce, got[4 : 4 + size], got[:4])
                    opened.append(plain if got[0] == 0 and plain[4] == frames.PONG else b"")
                    got = got[4 + size :]
        assert secured.cipher in a.statistics()["links"][identity("own").peer_id]["cipher"]


async def hostile_records(secured):
    good = record(secured, 0, PING)
    return {
        "garbage": urandom(64),
        "damaged": good[:-1] + bytes([good[-1] ^ 1]),
        "replayed": good + good,
        "out of order": record(secured, 0, PING, 1),
        "wrong head": bytes([1]) + good[1:],
        "too long": (records.RECORD_BYTES_MAX + 17).to_bytes(4, "big"),
        "too short": (15).to_bytes(4, "big") + bytes(15),
        "unknown kind": record(secured, 9, b""),
        "bad window": record(secured, records.WINDOW, b"abc"),
        "plaintext": PING,
        "bad frame": record(secured, 0, b"\xff" * 40),
        "plain rpc in the clear": b"".join(frames.Machine(frame_bytes_max=1 << 20).request("echo", {}, [], 1000)[1]),
    }


async def test_hostile_records_end_the_lane_and_nothing_else(start):
    a = await start("a")
    b = await start("b", a)
    names = list(await hostile_records(handshake.Secured("", "", AESGCM(bytes(32)), AESGCM(bytes(32)))))
    for name in names:
        async with stranger(a, name) as (socket, secured):
            await socket.send((await hostile_records(secured))[name])
            await until_closed(socket)
        assert (await b.call(a.peer_id, "echo", {"n": name}, deadline_ms=5000)).header == {"n": name}, name
    blamed = {name for name in names if a.doors.peer(identity(name).peer_id)["fault"] == "protocol"}
    assert blamed == {"unknown kind", "bad window", "bad frame"}, "the rest could be the doing of somebody on the way"
    assert a.doors.statistics()["faults"]["handshake"] == len(names) - len(blamed)


async def test_what_is_no_lane_gets_nowhere(start, monkeypatch):
    monkeypatch.setattr(handshake, "HANDSHAKE_SECONDS", 0.5)
    monkeypatch.setattr(front, "PEEK_SECONDS", 0.5)
    a = await start("a")
    good = front.preamble(front.LANE)
    for first in (
        b"",
        b"r",
        b"GET / HTTP/1.1\r\n\r\n",
        b"riot\x01\x01\x00\x00",
        good + b"\xff\xff",
        good + b"\x00\x05hello",
        good + b"\x00\x20" + bytes(32),
        good + b"\x00\x20" + urandom(31),
        good + b"\x00\x20" + urandom(32) + b"\x10\x00" + urandom(4096),
    ):
        with await connect("127.0.0.1", port_of(a)) as socket:
            if first:
                await socket.send(first)
            await until_closed(socket)
    assert not a.peers()
    b = await start("b", a)
    assert (await b.call(a.peer_id, "echo", {}, deadline_ms=9000)).header == {}


async def test_another_peer_at_the_address_is_refused(start):
    a, b, c = await start("a"), await start("b"), await start("c")
    with pytest.raises(RemoteError) as error:
        await c.lanes.dial(b.peer_id, a.addresses)
    assert error.value.code == "unavailable"
    assert a.peer_id in error.value.message
    with pytest.raises(RemoteError):
        await c.lanes.dial(c.peer_id, c.addresses)
    assert not a.peers()


async def test_a_refusal_names_its_limit(start):
    a = await start("a", peers_max=1)
    b, c = await start("b", a), await start("c")
    with trio.fail_after(5):
        await b.links.get(a.peer_id)
    with pytest.raises(RemoteError) as error:
        await c.lanes.dial(a.peer_id, a.addresses)
    assert "peers_max" in error.value.message or "doors" in error.value.message


async def test_nothing_readable_travels(start, nursery):
    a = await start("a")
    marker = b"THE-SECRET-OF-THE-DAY" * 3
    seen = bytearray()

    async def splice(one: trio.SocketStream) -> None:
        async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
            async for data in source:
                seen.extend(data)
                await sink.send_all(data)

        other = await trio.open_tcp_stream("127.0.0.1", port_of(a))
        async with other, trio.open_nursery() as pumps:
            pumps.start_soon(pump, one, other)
            pumps.start_soon(pump, other, one)

    listeners = await nursery.start(partial(trio.serve_tcp, splice, 0, host="127.0.0.1"))
    port = listeners[0].socket.getsockname()[1]
    b = await start("b")
    made = await b.lanes.dial(a.peer_id, (f"/ip4/127.0.0.1/tcp/{port}",))
    b.links._add_lane(made)
    nursery.start_soon(b.links._read_lane, made)
    reply = await b.call(a.peer_id, "echo", {"m": marker}, [marker], deadline_ms=5000)
    assert bytes(reply.buffers[0]) == marker
    assert len(seen) > 4 * len(marker)
    assert marker[:12] not in seen
    assert b"echo" not in seen


async def test_keys_are_renewed_under_way(start, monkeypatch):
    monkeypatch.setattr(records, "REKEY_BYTES", 10_000)
    a = await start("a")
    b = await start("b", a)
    for size in (0, 100, 9000, 9000, 300_000, 5_000_000, 1):
        data = urandom(size)
        assert bytes((await b.call(a.peer_id, "echo", {}, [data], deadline_ms=9000)).buffers[0]) == data
    assert b.links.ready(a.peer_id).carrier.kind == "lane"


async def test_without_hardware_for_aes_it_is_chacha(start, monkeypatch):
    a = await start("a")
    monkeypatch.setattr(handshake, "aes_is_fast", lambda: False)
    b = await start("b", a)
    assert (await b.call(a.peer_id, "echo", {"x": 1}, deadline_ms=9000)).header == {"x": 1}
    for node, other in ((a, b), (b, a)):
        assert node.statistics()["links"][other.peer_id]["cipher"] == "ChaCha20-Poly1305"


async def test_streams_carry_calls_until_a_lane_can_be_had(start, monkeypatch):
    monkeypatch.setattr(links, "LANE_RETRY_S", (0.1, 0.1))
    monkeypatch.setattr(links, "TICK_S", 0.2)
    a = await start("a")
    closed = True
    shaken = handshake.shake

    async def shut(socket, keys, **more):
        if closed:
            raise IntegrityError("protocol", "lane: not today")
        return await shaken(socket, keys, **more)

    monkeypatch.setattr("p2p.lanes.shake", shut)
    b = await start("b", a)
    assert (await b.call(a.peer_id, "echo", {"x": 1}, deadline_ms=9000)).header == {"x": 1}
    assert b.links.ready(a.peer_id).carrier.kind == "stream"
    closed = False
    with trio.fail_after(15):
        while b.links.ready(a.peer_id).carrier.kind != "lane" or len(a.links._links[b.peer_id]) != 1:  # noqa: ASYNC110
            await trio.sleep(0.05)
    assert (await b.call(a.peer_id, "echo", {"x": 2}, deadline_ms=9000)).header == {"x": 2}
    assert b.peer_id in a._host.connected(), "libp2p's connection stays for DHT and gossip"


async def test_a_node_without_lanes_is_talked_to_over_streams(start):
    a = await start("a", lane=False)
    b = await start("b", a)
    assert (await b.call(a.peer_id, "echo", {"x": 1}, deadline_ms=9000)).header == {"x": 1}
    assert b.links.ready(a.peer_id).carrier.kind == "stream"
    assert (a.directory.own().lane, b.directory.own().lane) == ("", "/rios/lane/1.0.0")


async def test_a_libp2p_connection_gives_its_place_back(start, nursery):
    """The library keeps the task of an accepted connection, and its place in the limit, until the node stops."""
    a = await start("a", lane=False)
    limiter = a._host._swarm._inbound_limiter
    async with open_host(identity("b"), listen=ANY, peers_max=8, nursery=nursery) as host:
        host.learn(a.peer_id, a.addresses)
        for _ in range(2):
            await host.connect(a.peer_id)
            with trio.fail_after(5):
                while limiter.borrowed_tokens != 1:  # noqa: ASYNC110
                    await trio.sleep(0.02)
            await host.disconnect(a.peer_id)
            with trio.fail_after(5):
                while limiter.borrowed_tokens:  # noqa: ASYNC110
                    await trio.sleep(0.02)
    assert a.doors.statistics()["open"] == 0


@given(st.binary(max_size=300))
def test_any_payload_is_refused_as_one_of_ours(data):
    with pytest.raises(RiosError):
        payload.decode(data, bytes(32))


def test_a_payload_of_a_later_version_is_understood():
    who, key = identity("p"), bytes(range(32))
    data = payload.encode(who, key, {"aes": True, "later": [1]})
    more = payload._field(77, b"something") + payload._varint(9 << 3) + payload._varint(300)
    peer_id, offer = payload.decode(data + more, key)
    assert (peer_id, offer["aes"]) == (who.peer_id, True)
    for damaged in (data[:-1], data[:40], payload.encode(who, bytes(32), {})):
        with pytest.raises(IntegrityError):
            payload.decode(damaged, key)


async def test_one_timer_for_many_waits(nursery, autojump_clock):
    class Wait:
        over = False
        at = 0.0

        def expire(self) -> None:
            self.over, self.at = True, trio.current_time()

    timer = Deadlines()
    nursery.start_soon(timer.run)
    start = trio.current_time()
    waits = [Wait() for _ in range(5)]
    for wait, seconds in zip(waits, (5, 1, 3, 2, 4), strict=True):
        timer.add(start + seconds, wait)
    waits[2].over = True
    for _ in range(3 * SLACK):
        done = Wait()
        done.over = True
        timer.add(start + 100, done)
    assert len(timer._heap) <= 2 * SLACK + 10
    await trio.sleep(10)
    assert [round(wait.at - start) for wait in waits] == [5, 1, 0, 2, 4]


def test_the_listening_socket_is_the_only_one(tmp_path):
    async def run() -> None:
        async with open_network(identity("a"), P2pSettings(listen=ANY), data_dir=tmp_path, version="1") as network:
            assert len(network.addresses) == 1
            with plain_socket.socket() as probe:
                probe.connect(("127.0.0.1", port_of(network)))

    trio.run(run)
