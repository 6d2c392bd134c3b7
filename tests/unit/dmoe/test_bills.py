"""Who pays for what: sequences of a shared pass, answers that fail, answers that come late."""

import numpy as np
import pytest

from config.errors import RiosError
from dmoe.bills import Bills
from tests.unit.dmoe.swarm_kit import ALL, LAYERS, QUOTE, CountingBuyer, CountingSeller, Routing, make_manifest
from tests.unit.dmoe.test_calling import answer, rows, swarm


def nano_of(bill) -> int:
    return sum(cost.nano for cost in bill.costs())


async def paid(s, manifest, groups, **options):
    """A session that pays one worker for these shards."""
    buyer, seller = CountingBuyer(), CountingSeller()
    await s.node(())  # who asks
    worker = await s.node(groups, quote=QUOTE, seller=seller)
    buyer.sellers[worker.peer_id] = seller
    bills = Bills()
    session = (await s.caller(buyer=buyer, bills=bills, **options)).session(manifest)
    await session.open()
    return session, bills, buyer, worker


async def test_a_shared_pass_is_paid_by_all_who_take_part_and_by_nobody_else() -> None:
    manifest = make_manifest(top_k=2, experts_per_group=3)
    async with swarm(manifest) as s:
        session, bills, buyer, worker = await paid(s, manifest, range(8))
        one, two = bills.of("one"), bills.of("two")
        session.begin([one, two, None], [1, 2, 1])
        experts = np.array([[0, 4], [11, 10], [5, 6], [1, 2]], np.int32)
        await answer(session, manifest, rows(4), Routing(experts, np.ones((4, 2), np.float32)))
        whole = buyer.kflop[worker.peer_id] * QUOTE.microcredits_per_tflop
        parts = [nano_of(each) for each in (one, two, bills.purpose("kept"))]
        assert sum(parts) == whole > 0
        assert parts[1] == pytest.approx(whole / 2, rel=0.01)
        assert parts[0] == pytest.approx(parts[2], rel=0.01)
        assert [cost.calls for cost in one.costs()] == [LAYERS]
        session.begin([two], [1])
        await answer(session, manifest, rows(1), Routing(experts[:1], np.ones((1, 2), np.float32)))
        assert nano_of(one) == parts[0]
        assert nano_of(two) > parts[1]


async def test_what_a_failed_pass_cost_is_paid_by_those_it_was_for() -> None:
    manifest = make_manifest()
    async with swarm(manifest) as s:
        session, bills, buyer, worker = await paid(s, manifest, range(4), call_timeout_ms=300)  # no layers 2 and 3
        bill = bills.of("one")
        session.begin([bill], [2])
        with pytest.raises(RiosError):
            await answer(session, manifest, rows(2), ALL)
        assert nano_of(bill) == buyer.kflop[worker.peer_id] * QUOTE.microcredits_per_tflop > 0
