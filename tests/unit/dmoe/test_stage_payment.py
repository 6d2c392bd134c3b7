"""Stages and a real ledger: prompts at high prices wait for vouchers, calls that are left stop no channel."""

import time

import numpy as np
import trio

from dmoe.ports import Quote
from tests.unit.dmoe import stage_trust_kit
from tests.unit.dmoe.stage_trust_kit import answer, stage_trust_swarm
from tests.unit.dmoe.stages_kit import staged
from tests.unit.dmoe.trust_kit import QUOTE, Routing, trust_swarm

CALLS = 6


async def test_prompts_at_a_high_price_wait_for_vouchers(tmp_path, monkeypatch):
    """A piece of a prompt costs a third of what is lent, and pieces come faster than receipts."""
    monkeypatch.setattr(stage_trust_kit, "QUOTE", Quote(7, 1_000_000_000, 0))
    store, manifest = await trio.to_thread.run_sync(lambda: staged(tmp_path / "model", kind="F32"))
    async with stage_trust_swarm(tmp_path, store, manifest) as s:
        await s.node()
        for stage in range(3):
            await s.node(stage)
        runner = await s.runner(share=0.0)
        async with trio.open_nursery() as nursery:
            for number in range(3):
                prompt = [(7 * number + place) % 200 + 1 for place in range(300)]
                nursery.start_soon(answer, runner, prompt, 2, number)
        sold = [channel for ledger in s.ledgers[1:] for channel in ledger.seller.channels()]
        assert all(channel["earned"] > 100_000 for channel in sold)
        assert not any(channel["stopped"] for channel in sold)


async def test_calls_that_are_left_while_they_are_computed_stop_no_channel(tmp_path):
    store, manifest = await trio.to_thread.run_sync(lambda: staged(tmp_path / "model", kind="F32"))
    async with trust_swarm(tmp_path, store, manifest) as s:
        await s.node(serves=False)
        await s.node()
        caller = await s.caller(share=0.0)
        h = np.ones((1, manifest.architecture.hidden), np.float32)
        await caller.session(manifest).run(0, h, Routing())
        seller, buyer = s.ledgers[1].seller, s.ledgers[0].buyer
        with trio.fail_after(30):
            while not seller.channels()[0]["kflop"]:  # noqa: ASYNC110
                await trio.sleep(0.02)
        (sold,) = seller.channels()
        channel = bytes.fromhex(sold["channel"])
        each = sold["kflop"]
        lost, told = buyer.lost, []

        def counted(worker, key, quote, kflop):
            told.append(kflop)
            lost(worker, key, quote, kflop)

        buyer.lost = counted
        for shard in s.workers[1]._shards.values():
            slow(shard)
        for number in range(CALLS):
            with trio.move_on_after(0.5) as scope:
                await caller.session(manifest).run(0, h, Routing())
            assert scope.cancelled_caught
            # the worker was as quick as the payer's change of mind
            seller.served(caller._shared.network.peer_id, channel, QUOTE, each, bytes([number]) * 32)
        assert told == [each] * CALLS
        with trio.fail_after(10):
            while seller._channels[channel].leaves:
                await trio.sleep(0.05)
                assert not seller.channels()[0]["stopped"]
        assert not buyer.channels()[0]["stopped"]
        assert seller.channels()[0]["calls"] == 1 + CALLS


def slow(loaded):
    """A shard that takes its time."""
    honest = loaded.shard.partial

    def late(*args):
        time.sleep(1.0)
        return honest(*args)

    loaded.shard.partial = late
    loaded.row_seconds = 1.0  # so it runs in a thread
