"""Peers on the LAN: messages, what a private swarm hides, and nodes that find each other over loopback multicast."""

import os
import socket
import struct
from contextlib import AsyncExitStack

import dns.message
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from config.settings import P2pSettings
from p2p import mdns
from p2p.core.identity import Identity
from p2p.core.mdns import FOUND_MAX, MESSAGE_BYTES_MAX, Service
from p2p.network import open_network

PEER = Identity.from_seed(b"p" * 32).peer_id
NEAR = f"/ip4/192.168.1.7/tcp/4701/p2p/{PEER}"
KEY = b"k" * 32


def nonces():
    while True:
        yield os.urandom(12)


def test_a_question_and_an_answer_as_the_specification_has_them():
    service = Service()
    question = dns.message.from_wire(service.query())
    assert question.question[0].to_text() == "_p2p._udp.local. IN PTR"
    assert service.is_query(service.query())
    data = service.answer("somelabel", [NEAR], nonces())
    answer = dns.message.from_wire(data)
    assert answer.answer[0].to_text() == "_p2p._udp.local. 120 IN PTR somelabel._p2p._udp.local."
    assert answer.additional[0].to_text() == f'somelabel._p2p._udp.local. 120 IN TXT "dnsaddr={NEAR}"'
    assert service.found(data) == [NEAR]
    assert not service.is_query(data)
    assert service.found(service.query()) == []


def test_only_near_addresses_with_a_peer_id_come_out():
    service = Service()
    wrong = ["/ip4/192.168.1.7/tcp/1", f"/ip4/8.8.8.8/tcp/1/p2p/{PEER}", f"/dns4/a.local/tcp/1/p2p/{PEER}", "x"]
    assert service.found(service.answer("label", [*wrong, NEAR], nonces())) == [NEAR]
    many = [f"/ip4/192.168.1.7/tcp/{port}/p2p/{PEER}" for port in range(1, 60)]
    data = service.answer("label", many, nonces())
    assert len(data) <= MESSAGE_BYTES_MAX
    assert 0 < len(service.found(data)) <= FOUND_MAX


def test_a_private_swarm_shows_strangers_nothing():
    ours, same, others, public = Service(KEY), Service(KEY), Service(b"o" * 32), Service()
    data = ours.answer("label", [NEAR], nonces())
    assert same.found(data) == [NEAR]
    assert others.found(data) == public.found(data) == []
    assert PEER.encode() not in data
    assert b"192.168" not in data
    assert KEY.hex()[:16].encode() not in ours.query()
    assert same.is_query(ours.query())
    assert not public.is_query(ours.query())
    assert not ours.is_query(public.query())


@given(st.binary(max_size=300))
def test_noise_says_nothing(noise):
    service = Service(KEY)
    good = service.answer("label", [NEAR], nonces())
    for data in (
        noise,
        service.query() + noise,
        good[: len(noise)],
        bytes(a ^ b for a, b in zip(good, noise, strict=False)),
    ):
        service.is_query(data)
        assert service.found(data) in ([], [NEAR])


def test_which_addresses_speak_mdns():
    listed = ["/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/1", "/ip4/8.8.8.8/tcp/1", "/ip6/::1/tcp/1"]
    assert mdns.wanted("auto", listed) == ["10.0.0.1"]
    assert mdns.wanted("on", listed) == ["127.0.0.1", "10.0.0.1"]
    assert mdns.wanted("off", listed) == []


def multicast_works() -> bool:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        try:
            receiver.bind(("", 0))
            member = struct.pack("4s4s", socket.inet_aton(mdns.GROUP), socket.inet_aton("127.0.0.1"))
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
            receiver.settimeout(1)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            sender.sendto(b"x", (mdns.GROUP, receiver.getsockname()[1]))
            return receiver.recv(10) == b"x"
        except OSError:
            return False


async def test_nodes_without_seeds_find_those_of_their_swarm(tmp_path, monkeypatch):
    if not multicast_works():
        pytest.skip("no multicast on the loopback interface here")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(mdns.Mdns.__init__, "__kwdefaults__", {"port": port})
    keys = {"a": None, "b": None, "c": KEY, "d": KEY}
    async with AsyncExitStack() as stack:
        nodes = {}
        for name, key in keys.items():
            settings = P2pSettings(listen=("/ip4/127.0.0.1/tcp/0",), mdns="on")
            identity = Identity.from_seed(name.encode() * 32)
            opened = open_network(identity, settings, data_dir=tmp_path / name, version="1", swarm_key=key)
            nodes[name] = await stack.enter_async_context(opened)
        with trio.fail_after(20):
            for one, other in ("ab", "ba", "cd", "dc"):
                while nodes[other].peer_id not in nodes[one].peers():  # noqa: ASYNC110 - a link raises no event here
                    await trio.sleep(0.02)
        assert all(len(node.peers()) == 1 for node in nodes.values())
        started = trio.current_time()
    assert trio.current_time() - started < 5, "nothing hangs at the end"


async def test_a_taken_port_is_one_warning(caplog):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("0.0.0.0", 0))
        port = taken.getsockname()[1]
        await mdns.Mdns(["127.0.0.1"], [NEAR], None, lambda peer, listed: None, port=port).run()
    assert caplog.text.count("mDNS does not work here") == 1
