"""The library's peerstore in a large swarm: it forgets who was only heard of, and nobody else."""

from contextlib import AsyncExitStack
from hashlib import sha256

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from multiaddr import Multiaddr

from config.vocabulary import PeerId
from p2p import addressbook
from p2p.addressbook import HEARD_ADDRESSES_MAX, AddressBook
from p2p.core.identity import Identity
from p2p.face import RecordRule
from p2p.host import Host, open_host

FAR = "/ip4/198.51.100.1/tcp/4701"
ONE_ADDRESS = [Multiaddr(FAR)]


def some_id(number: int) -> PeerId:
    """A peer id that nobody has the key of; making a key would take longer."""
    digest = sha256(number.to_bytes(4, "big")).digest()
    return PeerId(str(ID(b"\x00\x24\x08\x01\x12\x20" + digest)))


def lib_id(number: int) -> ID:
    return ID.from_base58(some_id(number))


async def speaks(host: Host, other: PeerId) -> bool:
    """Whether identify told what another host speaks."""
    await trio.lowlevel.checkpoint()
    store, peer = host._host.get_peerstore(), ID.from_base58(other)
    return store.has_peer(peer) and bool(store.get_protocols(peer))


async def test_a_swarm_of_three_thousand_leaves_the_dht_gossip_and_identify_alive():
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        hosts: list[Host] = []
        for name in (b"a", b"b", b"c"):
            context = open_host(
                Identity.from_seed(name * 32), listen=("/ip4/127.0.0.1/tcp/0",), peers_max=8, nursery=nursery
            )
            hosts.append(await stack.enter_async_context(context))
            hosts[-1].accept_records("test", RecordRule(lambda name, value: None, lambda name, values: 0))
        a, b, c = hosts
        a.learn(b.identity.peer_id, b.addresses)
        await a.connect(b.identity.peer_id)
        await a.join(b.identity.peer_id)
        for number in range(3000):
            a.learn(some_id(number), [FAR])
        assert a.known_addresses(b.identity.peer_id) == b.addresses
        assert all(a.known_addresses(some_id(number)) == (FAR,) for number in range(3000))
        with trio.fail_after(10):
            await a.put_record("test", "name", b"value")
            await a.publish("topic", b"x")
            c.learn(a.identity.peer_id, a.addresses)
            await c.connect(a.identity.peer_id)
            while not await speaks(c, a.identity.peer_id):  # noqa: ASYNC110 - identify raises no event
                await trio.sleep(0.02)
        assert b.statistics()["dht_records"] == 1
        nursery.cancel_scope.cancel()


def test_who_was_only_heard_of_makes_room_first(monkeypatch):
    monkeypatch.setattr(addressbook, "HEARD_MAX", 50)
    store, pair = PeerStore(), create_new_key_pair(bytes(32))
    own = ID.from_pubkey(pair.public_key)
    store.add_key_pair(own, pair)
    linked = {lib_id(1)}
    book = AddressBook(store, connected=linked.__contains__)
    store.add_protocols(lib_id(1), ["/x"])
    for number in range(2, 30):
        book.learn(lib_id(number), ONE_ADDRESS)
    book.learn(own, ONE_ADDRESS)
    for number in range(1000, 4000):  # as answers of the DHT do
        store.add_addrs(lib_id(number), ONE_ADDRESS, 3600)
    assert store.privkey(own) == pair.private_key
    assert store.get_protocols(lib_id(1)) == ["/x"]
    assert all(store.addrs(lib_id(number)) == ONE_ADDRESS for number in range(2, 30))
    assert len(store.peer_data_map) == 1 + 28 + 50
    assert store.has_peer(lib_id(3999))
    linked.clear()
    for number in range(4000, 4050):
        store.add_protocols(lib_id(number), ["/y"])
    assert not store.has_peer(lib_id(1)), "it is gone, and the latest are kept"


def test_learned_peers_are_bounded_too_and_linked_ones_stay(monkeypatch):
    monkeypatch.setattr(addressbook, "LEARNED_MAX", 50)
    monkeypatch.setattr(addressbook, "HEARD_MAX", 20)
    store = PeerStore()
    book = AddressBook(store, connected={lib_id(0)}.__contains__)
    for number in range(500):
        book.learn(lib_id(number), ONE_ADDRESS)
    assert book.addresses(lib_id(0)) == book.addresses(lib_id(499)) == tuple(ONE_ADDRESS)
    assert book.addresses(lib_id(1)) == ()
    assert len(store.peer_data_map) == 50 + 20


def test_one_peer_that_is_only_heard_of_has_few_addresses():
    store = PeerStore()
    AddressBook(store, connected=lambda peer: False)
    for port in range(1, 200):
        store.add_addrs(lib_id(1), [Multiaddr(f"/ip4/198.51.100.1/tcp/{port}")], 3600)
    assert len(store.addrs(lib_id(1))) == HEARD_ADDRESSES_MAX
