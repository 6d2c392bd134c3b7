"""The DHT as the host tames it: look-ups for the keys of records walk on beyond the nodes that one knows."""

from contextlib import AsyncExitStack

import trio

from p2p import kademlia
from p2p.core.identity import Identity
from p2p.face import RecordRule
from p2p.host import Host, open_host

NAME = "a name as long as a peer id is, which makes the key longer than 50 bytes"


async def test_a_record_reaches_a_node_that_only_others_know():
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        hosts: list[Host] = []
        for name in (b"a", b"b", b"c"):
            identity = Identity.from_seed(name * 32)
            context = open_host(identity, listen=("/ip4/127.0.0.1/tcp/0",), peers_max=8, nursery=nursery)
            hosts.append(await stack.enter_async_context(context))
            hosts[-1].accept_records("test", RecordRule(lambda name, value: None, lambda name, values: 0))
        a, b, c = hosts
        for one, other in ((a, b), (c, b)):
            one.learn(other.identity.peer_id, other.addresses)
            await one.connect(other.identity.peer_id)
            await one.join(other.identity.peer_id)
        b.learn(c.identity.peer_id, c.addresses)
        await b.join(c.identity.peer_id)
        await a.put_record("test", NAME, b"value")
        assert [host.statistics()["dht_records"] for host in hosts] == [1, 1, 1]
        nursery.cancel_scope.cancel()


async def test_a_query_given_up_ends_by_itself_and_closes_its_stream(nursery):
    ended = []

    async def query() -> str:
        try:
            await trio.sleep(0.2)
            return "late"
        finally:
            ended.append(trio.current_effective_deadline())

    async def fails() -> str:
        raise ValueError

    assert await kademlia.detached(nursery.start_soon, query, seconds=0.01) is None
    with trio.move_on_after(0.01):
        await kademlia.detached(nursery.start_soon, query, seconds=5)
    assert not ended
    assert await kademlia.detached(nursery.start_soon, query, seconds=5) == "late"
    assert len(ended) == 3
    assert await kademlia.detached(nursery.start_soon, fails, seconds=5) is None


def open_queries(host: Host) -> int:
    return sum(count for (_, protocol), count in host._guards._open.items() if protocol == "/ipfs/kad/1.0.0")


async def test_look_ups_that_end_early_leave_no_streams_open(nursery):
    """Each ends at the first provider named; peers count streams that stay open against who opened them."""
    async with AsyncExitStack() as stack:
        hosts: list[Host] = []
        for name in (b"a", b"b", b"c", b"d"):
            context = open_host(
                Identity.from_seed(name * 32), listen=("/ip4/127.0.0.1/tcp/0",), peers_max=8, nursery=nursery
            )
            hosts.append(await stack.enter_async_context(context))
        a, *others = hosts
        for other in others:
            a.learn(other.identity.peer_id, other.addresses)
            await a.connect(other.identity.peer_id)
            await a.join(other.identity.peer_id)
            await other.join(a.identity.peer_id)
        key = b"\x12\x20" + bytes(32)
        for other in others:
            await other.provide(key)
        a._dht.provider_store.providers.clear()
        found: list[str] = []
        for _ in range(30):
            await a.find_providers(key, lambda peer: bool(found.append(peer)) or True)
        assert len(found) >= 30
        for number in range(30):
            with trio.move_on_after(0.0003 * number):
                await a.find_providers(key, lambda _peer: False)
        with trio.fail_after(5):  # the idle limit that would close them is longer
            while any(open_queries(other) for other in others):  # noqa: ASYNC110 - in another node
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
