"""The DHT as the host tames it: look-ups for the keys of records walk on beyond the nodes that one knows."""

from contextlib import AsyncExitStack

import trio

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
