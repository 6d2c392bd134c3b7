"""The line before the engine: fair, bounded, and nobody's turn is lost."""

from contextlib import contextmanager
from random import Random

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from config.errors import BusyError
from gateway.errors import ApiError
from gateway.turns import BLOCKED_SECONDS_MAX, Turns


class Visits:
    """Requests that take their turn and hold it until they are told to end."""

    def __init__(self, turns: Turns, nursery: trio.Nursery) -> None:
        self.turns = turns
        self.came: list[str] = []
        self.failed: list[Exception] = []
        self._nursery = nursery
        self._ends: dict[str, trio.CancelScope] = {}

    async def start(self, name: str, weight: int = 1, *, batch: bool = False) -> None:
        """``name`` begins with its user."""
        self._nursery.start_soon(self._visit, name, weight, batch)
        await wait_all_tasks_blocked()

    async def end(self, name: str) -> None:
        self._ends.pop(name).cancel()
        await wait_all_tasks_blocked()

    async def _visit(self, name: str, weight: int, batch: bool) -> None:
        with trio.CancelScope() as self._ends[name]:
            try:
                with self.turns.place(name[0], weight, batch=batch) as turn:
                    await turn.come()
                    self.came.append(name)
                    await trio.sleep_forever()
            except Exception as failure:  # noqa: BLE001 - what a test looks at
                self.failed.append(failure)


def visits(nursery: trio.Nursery, slots: int, **bounds: float) -> Visits:
    return Visits(Turns(slots=slots, **bounds), nursery)


async def test_users_take_turns_whoever_sends_more(nursery: trio.Nursery) -> None:
    seen = visits(nursery, 1)
    for name in ("a0", "a1", "a2", "a3", "b0", "c0", "b1"):
        await seen.start(name)
    assert seen.turns.waiting == 6
    for name in ("a0", "b0", "c0", "a1", "b1", "a2"):
        assert seen.came[-1] == name
        await seen.end(name)
    assert seen.came[-1] == "a3"
    nursery.cancel_scope.cancel()


async def test_a_free_slot_goes_to_who_has_the_fewest_running(nursery: trio.Nursery) -> None:
    seen = visits(nursery, 3)
    for name in ("a0", "a1", "b0", "b1", "a2", "c0"):
        await seen.start(name)
    await seen.end("b0")
    assert seen.came[-1] == "c0", "of those who have none, who was there longest ago"
    await seen.end("a0")
    assert seen.came[-1] == "b1"
    await seen.end("a1")
    assert seen.came[-1] == "a2"
    nursery.cancel_scope.cancel()


async def test_interactive_before_batch(nursery: trio.Nursery) -> None:
    seen = visits(nursery, 1)
    await seen.start("a0", batch=True)
    await seen.start("b0", batch=True)
    await seen.start("c0")
    await seen.start("c1")
    for name in ("a0", "c0", "c1"):
        await seen.end(name)
    assert seen.came == ["a0", "c0", "c1", "b0"]
    nursery.cancel_scope.cancel()


async def test_a_batch_fills_nobodys_place_in_the_line(nursery: trio.Nursery) -> None:
    seen = visits(nursery, 1, waiting_max=2, per_user_max=2)
    for number in range(3):
        await seen.start(f"a{number}", batch=True)
    assert seen.turns.waiting == 2
    for name in ("a3", "a4", "b0"):
        await seen.start(name)
    assert [type(each) for each in seen.failed] == [BusyError], "two interactive requests wait, whoever's the batch is"
    await seen.end("a0")
    assert seen.came == ["a0", "a3"]
    nursery.cancel_scope.cancel()


async def test_ones_own_batch_does_not_count_against_one(nursery: trio.Nursery) -> None:
    seen = visits(nursery, 3)
    for number in range(3):
        await seen.start(f"a{number}", batch=True)
    await seen.start("b0")
    await seen.end("a0")
    for name in ("a3", "b1"):
        await seen.start(name)
    await seen.end("a1")
    assert seen.came[-1] == "a3", "b has an answer under way, a has none that somebody waits for"
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("lines", [0, 1, 1000])
async def test_a_wait_is_longer_by_one_line_of_a_batch_at_most(
    lines: int, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """However many wait: requests come at moments that have nothing to do with those of the lines."""
    turns, waits, seconds = Turns(slots=1), [], 4.0

    async def line() -> None:
        with turns.place("a", batch=True) as turn:
            await turn.come()
            await trio.sleep(seconds)

    async def work() -> None:
        limit = trio.CapacityLimiter(4)  # as the runner has it

        async def one() -> None:
            async with limit:
                await line()

        async with trio.open_nursery() as each:
            for _ in range(lines):
                each.start_soon(one)

    async def ask(user: str) -> None:
        begun = trio.current_time()
        with turns.place(user) as turn:
            await turn.come()
            waits.append(trio.current_time() - begun)
            await trio.sleep(1)

    nursery.start_soon(work)
    for number in range(100):
        await trio.sleep(2.7)
        await ask("ab"[number % 2])
    assert max(waits) <= (seconds if lines else 0)
    if lines == 1000:
        assert max(waits) > 0, "a line that runs is not ended"
    nursery.cancel_scope.cancel()


async def test_several_answers_take_their_turns_at_once_and_are_not_passed_over(nursery: trio.Nursery) -> None:
    seen = visits(nursery, 3)
    await seen.start("a0", 2)
    await seen.start("b0", 2)
    await seen.start("c0")
    assert seen.came == ["a0"]
    await seen.end("a0")
    assert set(seen.came) == {"a0", "b0", "c0"}
    await seen.end("b0")
    await seen.end("c0")
    await seen.start("d0", 99)
    assert seen.came[-1] == "d0", "more than there are: all of them"
    await seen.start("e0")
    assert seen.came[-1] == "d0"
    nursery.cancel_scope.cancel()


async def test_the_line_is_bounded(nursery: trio.Nursery) -> None:
    seen = visits(nursery, 1, waiting_max=3, per_user_max=2)
    for name in ("a0", "a1", "a2", "a3", "b0", "c0"):
        await seen.start(name)
    own, full = seen.failed
    assert isinstance(own, ApiError)
    assert own.code == "rate_limited"
    assert own.retry_after_ms > 0
    assert isinstance(full, BusyError)
    assert full.retry_after_ms > 0
    assert seen.turns.waiting == 3
    nursery.cancel_scope.cancel()


async def test_a_wait_is_bounded_but_not_that_of_batch_work(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    seen = visits(nursery, 1, seconds_max=30)
    await seen.start("a0")
    await seen.start("b0")
    await seen.start("c0", batch=True)
    await trio.sleep(31)
    assert [type(each) for each in seen.failed] == [BusyError]
    assert seen.turns.waiting == 1
    await trio.sleep(3600)
    await seen.end("a0")
    assert seen.came == ["a0", "c0"]
    nursery.cancel_scope.cancel()


async def test_who_leaves_the_line_blocks_nobody(nursery: trio.Nursery) -> None:
    seen = visits(nursery, 2)
    await seen.start("a0")
    await seen.start("b0", 2)
    await seen.start("c0")
    assert seen.came == ["a0"], "b waits for two"
    await seen.end("b0")
    assert seen.came == ["a0", "c0"]
    nursery.cancel_scope.cancel()


async def test_without_slots_nobody_waits(nursery: trio.Nursery) -> None:
    seen = visits(nursery, 0)
    for name in ("a0", "a1", "b0"):
        await seen.start(name)
    assert len(seen.came) == 3
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("seed", range(5))
async def test_no_turn_is_lost_in_a_crowd(seed: int, autojump_clock: MockClock) -> None:
    """Requests that come, wait, run, fail and are cancelled at any moment; at the end all turns are free."""
    random, turns = Random(seed), Turns(slots=4, waiting_max=30, per_user_max=10, seconds_max=3)
    running = 0

    @contextmanager
    def counted(weight: int):
        nonlocal running
        running += weight
        assert running <= 4
        try:
            yield
        finally:
            running -= weight

    async def visit(user: str, weight: int, batch: bool, stays: float, patience: float) -> None:
        with trio.move_on_after(patience):
            try:
                with turns.place(user, weight, batch=batch) as turn:
                    await turn.come()
                    with counted(min(weight, 4)):
                        await trio.sleep(stays)
            except (ApiError, BusyError):
                pass

    async with trio.open_nursery() as nursery:
        for _ in range(400):
            what = (random.choice("abcde"), random.choice((1, 1, 1, 2, 5)), random.random() < 0.2)
            nursery.start_soon(visit, *what, random.choice((0, 0.5, 1)), random.choice((0.5, 1, 100)))
            await trio.sleep(random.choice((0, 0, 0.1, 0.25)))
    assert (turns.waiting, turns._free) == (0, 4)
    assert [(dict(line.running), line.served) for line in (turns._interactive, turns._batch)] == [({}, {}), ({}, {})]


class FakeReader:
    """A client that has kept its answer from being written for so long."""

    def __init__(self, blocked: float) -> None:
        self.blocked = blocked
        self.given_up = trio.Event()

    def blocked_seconds(self) -> float:
        return self.blocked

    def give_up(self) -> None:
        self.given_up.set()


async def _read(turns: Turns, reader: FakeReader, weight: int = 1) -> None:
    with turns.place("a", weight, reader=reader) as turn:
        await turn.come()
        await reader.given_up.wait()


async def test_a_slow_reader_makes_room_for_who_waits(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """The slowest first, each who waits one; what it was slow at before its turn does not count."""
    turns, most = Turns(slots=3, seconds_max=10), BLOCKED_SECONDS_MAX
    readers = [FakeReader(0.0), FakeReader(5.0), FakeReader(1000.0)]
    for reader in readers:
        nursery.start_soon(_read, turns, reader)
    await wait_all_tasks_blocked()
    readers[0].blocked, readers[1].blocked = most + 1, most + 7
    await trio.sleep(3600)
    assert not any(reader.given_up.is_set() for reader in readers), "nobody waits"
    for ended in (1, 0):
        begun = trio.current_time()
        with turns.place("b") as turn:
            await turn.come()
            assert trio.current_time() - begun <= 2
            assert [number for number in (0, 1, 2) if readers[number].given_up.is_set()] == sorted({1, ended})
            nursery.start_soon(_read, turns, FakeReader(0.0))
            await wait_all_tasks_blocked()
    with pytest.raises(BusyError), turns.place("b") as turn:
        await turn.come()
    assert not readers[2].given_up.is_set()
    nursery.cancel_scope.cancel()


async def test_a_line_of_a_batch_ends_nobodys_stream(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """It waits as long as it takes, also behind somebody who reads slowly."""
    turns, slow = Turns(slots=1), FakeReader(0.0)
    seen = Visits(turns, nursery)
    nursery.start_soon(_read, turns, slow)
    await wait_all_tasks_blocked()
    slow.blocked = BLOCKED_SECONDS_MAX + 1
    await seen.start("b0", batch=True)
    await trio.sleep(3600)
    assert not slow.given_up.is_set()
    await seen.start("c0")
    await trio.sleep(2)
    assert slow.given_up.is_set(), "somebody waits for an answer"
    assert seen.came == ["c0"]
    nursery.cancel_scope.cancel()
