"""A witness that stops while it collects handovers goes on where it was."""

import trio

from config.settings import LedgerSettings
from ledger.core.objects import parse
from ledger.core.witness import VOTING
from ledger.ledger import open_ledger
from ledger.promises import Handed
from ledger.store import Final, Store
from p2p.memory import MemoryHub
from tests.unit.ledger.committee_kit import Net, member


async def test_handovers_collected_before_a_restart_are_enough_to_begin(tmp_path, autojump_clock):
    net = Net()
    net.fund()
    net.change(1)
    store = Store(tmp_path / "ledger.db", net.genesis.net)
    store.commit([Final(parse(certificate.object), certificate, 0) for certificate in net.final])
    handovers = zip(net.keys[0], net.handovers(0, range(3)), strict=False)
    store.commit([Handed(0, key.public_key, signed) for key, signed in handovers])
    store.close()
    identity = member(1, 0)
    async with trio.open_nursery() as nursery:
        ledger = await open_ledger(
            MemoryHub(1).add(identity),
            identity,
            net.genesis,
            tmp_path / "ledger.db",
            LedgerSettings(witness=True),
            nursery=nursery,
            in_thread=False,
        )
        with trio.move_on_after(60):
            while ledger.seats.witness.phase != VOTING:  # noqa: ASYNC110
                await trio.sleep(0.5)
        assert ledger.seats.witness.phase == VOTING, "nothing new comes in: it would wait for ever"
        await ledger.aclose()
        nursery.cancel_scope.cancel()
