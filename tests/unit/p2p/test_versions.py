"""A node of the next version talks to this one: what is not understood is ignored, or refused by name."""

from hashlib import sha256

import msgspec
import pytest
import trio

from config.errors import RemoteError
from config.settings import P2pSettings
from config.vocabulary import PeerId
from p2p import front
from p2p.core import advert as adverts
from p2p.core import codec
from p2p.core.identity import Identity
from p2p.face import Call, Reply
from p2p.handshake import Keys, shake
from p2p.host import RPC_PROTOCOL, _id
from p2p.lanes import PROTOCOL, connect
from p2p.network import PeerNetwork, open_network
from p2p.streams import Channel

ANY = ("/ip4/127.0.0.1/tcp/0",)


async def echo(call: Call) -> Reply:
    return Reply({"seen": sorted(call.header), "from_the_future": 1}, call.buffers)


@pytest.fixture
async def nodes(tmp_path, nursery):
    async def run(name: str, settings: P2pSettings, task_status=trio.TASK_STATUS_IGNORED) -> None:
        identity = Identity.from_seed(sha256(name.encode()).digest())
        async with open_network(identity, settings, data_dir=tmp_path / name, version="1") as network:
            network.serve("echo", echo)
            task_status.started(network)
            await trio.sleep_forever()

    async def start(name: str, *known: PeerNetwork, **settings: object) -> PeerNetwork:
        network = await nursery.start(run, name, P2pSettings(listen=ANY, **settings))
        for other in known:
            network._host.learn(other.peer_id, other.addresses)
        return network

    return start


async def test_unknown_methods_are_refused_by_name_and_unknown_header_fields_ignored(nodes):
    a = await nodes("a")
    b = await nodes("b", a)
    with pytest.raises(RemoteError) as unknown:
        await b.call(a.peer_id, "expert.run2", {}, deadline_ms=5000)
    assert unknown.value.code == "not_found"
    assert "'expert.run2' is not served here" in unknown.value.message
    async with b.stream(a.peer_id, "expert.flow", {}, deadline_ms=5000) as items:
        with pytest.raises(RemoteError, match=r"'expert\.flow' is not served here"):
            await anext(aiter(items))
    future = {"from_the_future": {"a": [1, None]}, "~": b"x"}
    for method, header, answer in (
        ("clock.read", {}, "unix_ms"),
        ("advert.exchange", {"known": {}}, "want"),
        ("echo", {"old": 1}, "seen"),
    ):
        reply = await b.call(a.peer_id, method, {**header, **future}, deadline_ms=5000)
        assert answer in reply.header
    assert not a.doors.faults


async def test_a_newer_stream_protocol_is_offered_first_and_both_agree_on_the_old_one(nodes):
    a = await nodes("a", lane=False)
    b = await nodes("b", a, lane=False)
    offered: list[str] = []

    async def open_channel(peer_id: PeerId, *, bulk: bool = False) -> Channel:
        offer = ["/rios/rpc/1.1.0", RPC_PROTOCOL]
        stream = await b._host._host.new_stream(_id(peer_id), offer)
        offered.extend(offer)
        assert stream.get_protocol() == RPC_PROTOCOL
        return Channel(stream)

    b._host.open_channel = open_channel
    reply = await b.call(a.peer_id, "echo", {}, [b"x" * 70_000], deadline_ms=5000)
    assert len(reply.buffers[0]) == 70_000
    assert offered
    assert not a.doors.faults


async def test_a_newer_advert_is_taken_in_and_its_unknown_lane_left_alone(nodes):
    a = await nodes("a")
    b = await nodes("b", a)
    own = b.directory.own()
    own = msgspec.structs.replace(own, lane="/rios/lane/2.0.0", seq=own.seq + 5000)
    body = codec.encode(own)
    fields = msgspec.msgpack.decode(body)
    body = msgspec.msgpack.encode([*fields, "a field of the next version", [1, 2]])
    envelope = msgspec.msgpack.encode([body, b.identity.sign(adverts.TAG, body)])
    assert await b.call(a.peer_id, "advert.push", {}, [envelope], deadline_ms=5000)
    taken = a.directory.adverts()[b.peer_id]
    assert (taken.lane, taken.addresses) == ("/rios/lane/2.0.0", b.addresses)
    assert a._takes_lanes(b.peer_id) is False
    assert not a.doors.faults


@pytest.mark.parametrize(("version", "kind"), [(front.VERSION + 1, front.LANE), (front.VERSION, 77)])
async def test_a_preamble_that_is_not_known_is_answered_with_this_version(nodes, version, kind):
    a = await nodes("a")
    port = int(a.addresses[0].split("/tcp/")[1].split("/")[0])
    socket = await connect("127.0.0.1", port)
    with socket, trio.fail_after(5):
        await socket.send(front.PREAMBLE.pack(front.MAGIC, version, kind, 0))
        answer = b""
        while part := await socket.recv(100):
            answer += part
    assert front.PREAMBLE.unpack(answer) == (front.MAGIC, front.VERSION, front.REFUSED, 0)
    assert a.statistics()["front"]["refused"] == 1
    assert not a.doors.faults, "asking is no fault"


async def test_a_dialler_reads_why_a_newer_or_laneless_node_refuses(nodes, nursery):
    """The other way round: this node is the older one."""
    plain = await nodes("a", lane=False)
    b = await nodes("b", plain)
    with pytest.raises(RemoteError, match="takes no lanes"):
        await b.lanes.dial(plain.peer_id, plain.addresses)
    assert (await b.call(plain.peer_id, "echo", {}, deadline_ms=5000)).header["seen"] == []

    async def newer(stream: trio.SocketStream) -> None:
        await stream.receive_some(8)
        await stream.send_all(front.PREAMBLE.pack(front.MAGIC, 9, front.REFUSED, 0))
        await stream.aclose()

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, newer, listeners)
    socket = await connect("127.0.0.1", listeners[0].socket.getsockname()[1])
    with socket:
        await socket.send(front.preamble(front.LANE))
        with pytest.raises(RemoteError, match=r"speaks version 9 .* this node speaks version 1"):
            await shake(socket, Keys(b.identity), initiator=True, expected=plain.peer_id)
    assert b.directory.own().lane == PROTOCOL
