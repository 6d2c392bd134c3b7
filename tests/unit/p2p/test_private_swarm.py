"""Private swarms over real hosts: members work as everywhere, strangers get nowhere."""

from hashlib import sha256

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from config.errors import ConfigError, RemoteError
from config.settings import P2pSettings
from p2p import front
from p2p.core.identity import Identity
from p2p.face import Call, Reply
from p2p.network import PeerNetwork, open_network

ANY = ("/ip4/127.0.0.1/tcp/0",)
KEY, OTHER_KEY = b"k" * 32, b"o" * 32


def identity_of(name: str) -> Identity:
    return Identity.from_seed(sha256(name.encode()).digest())


async def echo(call: Call) -> Reply:
    return Reply({"from": call.peer_id}, call.buffers)


@pytest.fixture
async def nodes(tmp_path, nursery):
    async def run(name, settings, key, task_status=trio.TASK_STATUS_IGNORED) -> None:
        async with open_network(
            identity_of(name), settings, data_dir=tmp_path / name, version="1", swarm_key=key
        ) as network:
            network.serve("echo", echo)
            task_status.started(network)
            await trio.sleep_forever()

    async def start(name: str, key: bytes | None, *seeds: PeerNetwork, **settings: object) -> PeerNetwork:
        every = P2pSettings(listen=ANY, seeds=tuple(s.addresses[0] for s in seeds), **settings)
        return await nursery.start(run, name, every, key)

    return start


async def until(condition, seconds: float = 15) -> None:
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for is in another node
            await trio.sleep(0.02)


async def test_members_find_and_call_each_other(nodes):
    a = await nodes("a", KEY)
    b = await nodes("b", KEY, a)
    c = await nodes("c", KEY, a)
    await until(lambda: all(len(node.directory.adverts()) == 3 for node in (a, b, c)))
    reply = await b.call(c.peer_id, "echo", {}, [bytes(300_000)], deadline_ms=5000)
    assert (reply.header["from"], len(reply.buffers[0])) == (b.peer_id, 300_000)


async def refused(node: PeerNetwork, target: PeerNetwork) -> str:
    """What a call to ``target`` says; it must fail, and leave no trace at either end."""
    node._host.learn(target.peer_id, target.addresses)
    with pytest.raises(RemoteError) as error:
        await node.call(target.peer_id, "echo", {}, deadline_ms=8000)
    assert error.value.code == "unavailable"
    for one, other in ((node, target), (target, node)):
        assert other.peer_id not in one.directory.adverts()
        assert other.peer_id not in one.peers()
        assert other.peer_id not in one._host.connected()
    return error.value.message


async def test_strangers_get_nowhere_and_are_told_what_to_do(nodes, caplog):
    member, second = await nodes("a", KEY), await nodes("b", KEY)
    public, other = await nodes("c", None), await nodes("d", OTHER_KEY)
    assert "this swarm needs a key: ask one of its members for an invite" in await refused(public, member)
    assert "it has another one" in await refused(other, member)
    assert "not in this node's private swarm" in await refused(member, public)
    assert "it has another one" in await refused(member, other)
    assert member.doors.statistics()["refused"]["swarm_key"] >= 2, "who knocked without the key is counted"
    late = await nodes("e", None, member)
    await until(lambda: "this swarm needs a key" in caplog.text)  # the seed's warning
    assert set(late.directory.adverts()) == {late.peer_id}
    second._host.learn(member.peer_id, member.addresses)
    assert (await second.call(member.peer_id, "echo", {}, deadline_ms=5000)).header["from"] == second.peer_id
    for secret in (KEY, OTHER_KEY):
        assert secret.hex() not in caplog.text
        assert secret.decode() not in caplog.text


async def test_a_stock_libp2p_host_gets_nowhere(nodes):
    member = await nodes("a", KEY)
    host = new_host(key_pair=create_new_key_pair(b"s" * 32))
    target = PeerInfo(ID.from_base58(member.peer_id), [Multiaddr(member.addresses[0].partition("/p2p/")[0])])
    async with host.run([Multiaddr(ANY[0])]):
        with pytest.raises(Exception, match=r"failed|unable"), trio.fail_after(10):
            await host.connect(target)
        assert target.peer_id not in host.get_connected_peers()
    assert str(host.get_id()) not in member._host.connected()


LIBP2P = b"\x13/multistream/1.0.0\n\x16/rios/noise-psk/1.0.0\n"


@pytest.mark.parametrize("hello", [LIBP2P, front.preamble(front.LANE)], ids=["libp2p", "lane"])
@pytest.mark.parametrize("size", [32, 48], ids=["no key", "another key"])
async def test_the_first_message_of_a_stranger_ends_the_handshake(nodes, hello, size):
    """Somebody who speaks the protocol but has no key learns nothing: no identity, no answer."""
    member = await nodes("a", KEY)
    port = int(member.addresses[0].split("/tcp/")[1].split("/")[0])
    heard = b""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(hello + size.to_bytes(2, "big") + bytes(range(size)))
        with trio.fail_after(10):
            async for data in stream:
                heard += data
    assert heard == (LIBP2P if hello == LIBP2P else b"")  # multistream repeats what was agreed on


async def test_members_use_the_lane_with_their_key(nodes):
    a = await nodes("a", KEY)
    b = await nodes("b", KEY, a)
    await b.call(a.peer_id, "echo", {}, deadline_ms=5000)
    await until(lambda: b.links.ready(a.peer_id).carrier.kind == "lane")
    other = await nodes("c", OTHER_KEY)
    for stranger in (other, await nodes("d", None)):
        with pytest.raises(RemoteError, match="hung up during the handshake"):
            await stranger.lanes.dial(a.peer_id, a.addresses)
    assert a.lanes.refused >= 2


async def test_an_allow_list_admits_whom_it_names(nodes):
    allowed, left_out = identity_of("b").peer_id, identity_of("c").peer_id
    a = await nodes("a", KEY, allow=(allowed,))
    b = await nodes("b", KEY, a)
    c = await nodes("c", KEY)
    await until(lambda: b.peer_id in a.directory.adverts())
    assert "its p2p.allow does not list it" in await refused(c, a)
    assert "p2p.allow of this node does not list it" in await refused(a, c)
    d = await nodes("d", KEY, a, allow=(left_out,))  # one's own seeds are admitted, but a does not list d
    assert "its p2p.allow does not list it" in await refused(d, a)


@pytest.mark.parametrize("lane", [True, False])
async def test_who_is_not_listed_takes_nobody_s_place(nodes, lane):
    a = await nodes("a", KEY, allow=(identity_of("b").peer_id,), peers_max=1)
    b = await nodes("b", KEY, a)
    await until(lambda: b.peer_id in a.peers())
    a.doors._pinned.clear()  # as if it were an ordinary peer, worth less than the one that comes
    a.doors.standing.linked(identity_of("c").peer_id, 24 * 3600_000, 0)
    c = await nodes("c", KEY, lane=lane)
    assert "its p2p.allow does not list it" in await refused(c, a)
    assert a.doors.statistics()["refused"] == {}
    assert a.doors.faults == {}
    assert b.peer_id in a.peers()


async def test_a_wrong_allow_list_is_named(tmp_path):
    settings = P2pSettings(listen=ANY, allow=("nonsense",))
    with pytest.raises(ConfigError, match=r"p2p\.allow.*nonsense"):
        async with open_network(identity_of("a"), settings, data_dir=tmp_path, version="1"):
            pass
