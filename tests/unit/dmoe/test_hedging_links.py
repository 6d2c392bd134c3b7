"""Hedges over real links, where calls leave without a task of their own."""

from hashlib import sha256
from random import Random

import trio
import trio.testing

from config.settings import P2pSettings
from dmoe.caller import Caller
from dmoe.core.hedge import HedgeBudget
from dmoe.ports import Quote
from dmoe.worker import Worker
from p2p.core.identity import Identity
from p2p.network import open_network
from tests.unit.dmoe.swarm_kit import ALL, make_manifest, serve_shards
from tests.unit.dmoe.test_calling import answer, expected, rows
from tests.unit.dmoe.test_hedging import until

EVERYTHING = range(8)


class StallingWorker(Worker):
    """A worker that can stop answering without telling anybody."""

    def __init__(self, *args, **kwargs):
        self.go_on = trio.Event()
        self.go_on.set()
        self.stalled_calls = 0
        super().__init__(*args, **kwargs)

    def _quick(self, call):
        return super()._quick(call) if self.go_on.is_set() else None

    async def _serve(self, call):
        self.stalled_calls += not self.go_on.is_set()
        await self.go_on.wait()
        return await super()._serve(call)


async def test_a_peer_that_stalls_behind_a_real_link_costs_a_hedge(tmp_path, nursery):
    manifest, seeds = make_manifest(), []

    async def node(name, task_status=trio.TASK_STATUS_IGNORED):
        identity = Identity.from_seed(sha256(name.encode()).digest())
        settings = P2pSettings(listen=("/ip4/127.0.0.1/tcp/0",), seeds=tuple(seeds))
        async with open_network(identity, settings, data_dir=tmp_path / name, version="1") as network:
            task_status.started(network)
            await trio.sleep_forever()

    networks, workers = [], []
    for name in ("caller", "one", "two"):
        networks.append(await nursery.start(node, name))
        seeds.append(networks[0].addresses[0])
        workers.append(StallingWorker(networks[-1], quote=Quote(0, 0, 0)))
        await nursery.start(workers[-1].run)
    for network, worker in zip(networks[1:], workers[1:], strict=True):
        serve_shards(worker, network, manifest, EVERYTHING)
    here = networks[0]
    await until(lambda: len(here.directory.providers(manifest.model_id, 0)) == 2)
    caller = Caller(here, worker=workers[0], random=Random(5))
    await nursery.start(caller.run)
    session = caller.session(manifest)
    for token in range(15):
        await answer(session, manifest, rows(1, token))

    first, second = networks[1].peer_id, networks[2].peer_id
    await until(lambda: not any(known.in_flight for known in caller.dispatcher.peers.values()))
    caller.hedges.won, caller.hedges.budget = 0, HedgeBudget()
    retries = session.report().retries
    session._plans.clear()
    for peer, us in ((first, 100.0), (second, 20_000.0)):
        caller.dispatcher.estimate(peer).round_trip_us = us
    workers[1].go_on = trio.Event()
    h = rows(1, 77)
    assert (await session.run(0, h, ALL)).tobytes() == expected(manifest, 0, h).tobytes()
    assert workers[1].stalled_calls >= 1
    assert caller.hedges.won >= 1
    assert session.report().retries == retries
    assert caller.dispatcher.estimate(first).in_flight > 0, "its call is still open"
    workers[1].go_on.set()
    await until(lambda: not caller.dispatcher.estimate(first).in_flight)
    await answer(session, manifest, rows(1, 78))
    assert session.report().retries == retries, "what came late is no failure"
