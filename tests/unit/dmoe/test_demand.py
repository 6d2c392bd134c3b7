"""When a queue counts as long and a shard as idle: hysteresis over samples."""

from dmoe.core.demand import Demand, Use

KEY, OTHER = ("a" * 64, 1), ("a" * 64, 2)
STEP_MS = 500
LONG_MS, IDLE_MS = 5_000, 20_000


class Clock:
    """Feeds a :class:`Demand` with one sample every half second."""

    def __init__(self) -> None:
        self.demand = Demand(LONG_MS, IDLE_MS)
        self.now_ms = self.rows = 0

    def run(self, seconds: float, *, waiting: int, busy: float = 0.0) -> None:
        for _ in range(int(seconds * 1000 / STEP_MS)):
            self.now_ms += STEP_MS
            self.rows += int(busy * STEP_MS)  # a row takes a millisecond
            self.demand.observe({KEY: Use(waiting, self.rows, 1000.0), OTHER: Use(0, 0, 1000.0)}, self.now_ms)

    @property
    def long(self) -> list:
        return self.demand.long(self.now_ms)


def test_a_queue_is_long_after_its_time_and_not_before_or_after_a_break():
    clock = Clock()
    clock.run(4, waiting=200, busy=1.0)
    assert clock.long == []
    clock.run(3, waiting=200, busy=1.0)
    assert clock.long == [KEY]
    clock.run(5, waiting=0, busy=0.5)
    assert clock.long == []
    clock.run(4, waiting=200, busy=1.0)
    assert clock.long == [], "the break counts"


def test_a_short_wait_is_no_long_queue():
    clock = Clock()
    clock.run(60, waiting=20, busy=1.0)
    assert clock.long == []


def test_help_has_time_to_come():
    clock = Clock()
    clock.run(8, waiting=200, busy=1.0)
    assert clock.long == [KEY]
    clock.demand.asked(KEY, clock.now_ms)
    clock.run(4, waiting=200, busy=1.0)
    assert clock.long == []
    clock.run(2, waiting=200, busy=1.0)
    assert clock.long == [KEY], "still long: one more"


def test_a_shard_is_idle_after_its_time_and_work_starts_it_anew():
    clock = Clock()
    assert not clock.demand.idle(KEY, 0), "nothing is known of it"
    clock.run(19, waiting=0, busy=0.05)
    assert not clock.demand.idle(KEY, clock.now_ms)
    clock.run(2, waiting=0, busy=0.05)
    assert clock.demand.idle(KEY, clock.now_ms)
    clock.run(3, waiting=0, busy=0.5)
    assert not clock.demand.idle(KEY, clock.now_ms)
    clock.run(19, waiting=0, busy=0.02)
    assert not clock.demand.idle(KEY, clock.now_ms)
    clock.run(5, waiting=0, busy=0.02)
    assert clock.demand.idle(KEY, clock.now_ms)


def test_between_the_bounds_nothing_changes():
    idle = Clock()
    idle.run(25, waiting=0, busy=0.02)
    idle.run(60, waiting=0, busy=0.15)
    assert idle.demand.idle(KEY, idle.now_ms)
    busy = Clock()
    busy.run(5, waiting=0, busy=0.5)
    busy.run(60, waiting=0, busy=0.15)
    assert not busy.demand.idle(KEY, busy.now_ms)


def test_a_shard_that_went_is_forgotten():
    clock = Clock()
    clock.run(8, waiting=200, busy=1.0)
    clock.demand.observe({OTHER: Use(0, 0, 1.0)}, clock.now_ms)
    assert clock.long == []
    assert not clock.demand.idle(KEY, clock.now_ms + IDLE_MS)
