"""A fault ends the task that has it, and nothing else."""

import trio

from p2p.guarded import Guarded


async def test_a_fault_ends_its_task_only(no_hidden_faults, autojump_clock):
    turns = []

    async def once():
        raise ValueError("nobody expected this")

    async def for_ever():
        turns.append(trio.current_time())
        if len(turns) < 3:
            raise UnicodeError("nor this")

    async with trio.open_nursery() as nursery:
        guarded = Guarded(nursery)
        guarded.start_soon(once)
        guarded.keep(for_ever)
    assert guarded.faults == 3
    assert len(turns) == 3
    assert [fault.exc_info[0] for fault in no_hidden_faults].count(UnicodeError) == 2
    no_hidden_faults.clear()
