"""A witness goes on collecting: after a restart, and after it has begun."""

from contextlib import asynccontextmanager

import pytest
import trio

from config.errors import LocalError
from config.settings import LedgerSettings
from ledger.core.objects import Transfer, parse
from ledger.core.witness import VOTING
from ledger.ledger import open_ledger
from ledger.promises import Handed
from ledger.records import Final
from ledger.store import Store
from p2p.memory import MemoryHub
from tests.unit.ledger.committee_kit import OTHER, PAYER, Net, full_disk, member


@asynccontextmanager
async def restarted(tmp_path, net, final, handovers):
    """The first witness of epoch 1, started on a disk that holds these."""
    store = Store(tmp_path / "ledger.db", net.genesis.net)
    store.commit([Final(parse(certificate.object), certificate, 0) for certificate in final])
    keys = [key.public_key for key in net.keys[0]]
    store.commit([Handed(0, key, signed) for key, signed in zip(keys, handovers, strict=False)])
    store.close()
    identity, settings = member(1, 0), LedgerSettings(witness=True)
    network = MemoryHub(1).add(identity)
    async with trio.open_nursery() as nursery:
        path = tmp_path / "ledger.db"
        ledger = await open_ledger(network, identity, net.genesis, path, settings, nursery=nursery, in_thread=False)
        yield ledger
        await ledger.aclose()
        nursery.cancel_scope.cancel()


async def soon(condition) -> bool:
    with trio.move_on_after(60):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.5)
    return condition()


async def test_handovers_collected_before_a_restart_are_enough_to_begin(tmp_path, autojump_clock):
    net = Net()
    net.fund()
    net.change(1)
    async with restarted(tmp_path, net, net.final, net.handovers(0, range(3))) as ledger:
        assert await soon(lambda: ledger.seats.witness.phase == VOTING), "nothing new comes: it would wait for ever"


async def test_a_handover_counts_once_its_frontier_is_reached_also_after_the_beginning(tmp_path, autojump_clock):
    net = Net()
    net.fund()
    net.change(1)
    early, final = net.handovers(0, range(3)), list(net.final)
    net.begin(1, early)
    net.settle(net.entry(PAYER, Transfer(OTHER.public_key, 5)), epoch=1)
    late = net.handover_by(net.keys[0][3], 0)  # of a witness that knew that entry when it handed over
    async with restarted(tmp_path, net, final, [*early, late]) as ledger:
        assert await soon(lambda: ledger.seats.witness.phase == VOTING)
        assert ledger.seats.witness.inheritance.counted == 3
        await ledger.book.learn(net.final[-1:])
        assert await soon(lambda: ledger.seats.witness.inheritance.counted == 4), "what liars invented would stay"


async def test_a_handover_that_a_full_disk_refused_is_asked_for_again(tmp_path, autojump_clock):
    """Seed 2539: it counted as received, but nobody looked at it any more, and nothing new could become final."""
    net = Net()
    net.fund()
    net.change(1)
    handovers = net.handovers(0, range(3))
    async with restarted(tmp_path, net, net.final, handovers[:2]) as ledger:
        seats, store = ledger.seats, ledger.book.store
        with full_disk(store), pytest.raises(LocalError):
            await seats.receive(seats.witness, handovers[2])
        assert net.keys[0][2].public_key not in seats.witness.inheritance.received
        await seats.receive(seats.witness, handovers[2])
        assert await soon(lambda: seats.witness.phase == VOTING)
        assert store.promises.handovers(0).keys() == {key.public_key for key in net.keys[0][:3]}
