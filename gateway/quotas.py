"""Limits in memory: one gateway's view.

Invariants: bucket arithmetic is exact (integers); the table of subjects is bounded, and only those with nothing to
remember (full buckets, nothing running) are dropped from it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.limits import RUNNING_WAIT_MS, Levels, Rates, Refusal, Subject, Subjects, Verdict, back_of

_NS_PER_MINUTE = 60_000_000_000
_NS_PER_MS = 1_000_000
_SUBJECTS_MAX = 10_000


class Bucket:
    """A token bucket that refills ``per_minute`` evenly; 0: it never empties. Its level is in 1/_NS_PER_MINUTE."""

    __slots__ = ("_level", "_updated_ns", "per_minute")

    def __init__(self, per_minute: int, now_ns: int) -> None:
        self.per_minute = per_minute
        self._level = per_minute * _NS_PER_MINUTE
        self._updated_ns = now_ns

    def wait_ns(self, count: int, now_ns: int) -> int:
        """How long until ``count`` can be taken; 0: now.

        More than a whole minute's worth counts as a minute's worth, or it could never be served.
        """
        if not self.per_minute:
            return 0
        self._refill(now_ns)
        need = min(count, self.per_minute) * _NS_PER_MINUTE
        return 0 if need <= self._level else -(-(need - self._level) // self.per_minute)

    def take(self, count: int, now_ns: int) -> int:
        """Take ``count`` and return 0, or take nothing and return how many nanoseconds to wait."""
        wait = self.wait_ns(count, now_ns)
        if not wait:
            self._level -= min(count, self.per_minute) * _NS_PER_MINUTE
        return wait

    def give_back(self, count: int, now_ns: int) -> None:
        """Return what was taken and not used."""
        self._refill(now_ns)
        self._level = min(self._level + count * _NS_PER_MINUTE, self.per_minute * _NS_PER_MINUTE)

    def remaining(self, now_ns: int) -> int:
        """Whole units left."""
        self._refill(now_ns)
        return self._level // _NS_PER_MINUTE

    def full_in_ns(self, now_ns: int) -> int:
        """Nanoseconds until it is full again."""
        if not self.per_minute:
            return 0
        self._refill(now_ns)
        return -(-(self.per_minute * _NS_PER_MINUTE - self._level) // self.per_minute)

    def _refill(self, now_ns: int) -> None:
        elapsed = now_ns - self._updated_ns
        self._level = min(self._level + elapsed * self.per_minute, self.per_minute * _NS_PER_MINUTE)
        self._updated_ns = now_ns


@dataclass(slots=True)
class _Quota:
    requests: Bucket
    tokens: Bucket
    running: int = 0

    @classmethod
    def full(cls, rates: Rates, now_ns: int) -> "_Quota":
        return cls(Bucket(rates.requests_per_minute, now_ns), Bucket(rates.tokens_per_minute, now_ns))

    def idle(self, now_ns: int) -> bool:
        """Whether it holds nothing that a fresh one would not."""
        return not (self.running or self.requests.full_in_ns(now_ns) or self.tokens.full_in_ns(now_ns))

    def levels(self, now_ns: int) -> Levels:
        """As a client is told."""
        return Levels(
            requests=self.requests.remaining(now_ns),
            tokens=self.tokens.remaining(now_ns),
            requests_full_ms=-(-self.requests.full_in_ns(now_ns) // _NS_PER_MS),
            tokens_full_ms=-(-self.tokens.full_in_ns(now_ns) // _NS_PER_MS),
        )


@dataclass(slots=True)
class MemoryLimits:
    """The limits that this gateway counts alone."""

    clock_ns: Callable[[], int] = time.monotonic_ns
    _quotas: dict[str, _Quota] = field(default_factory=dict)

    async def request(self, subjects: Subjects) -> Verdict:
        """Count a request."""
        quotas, now = self.quotas(subjects), self.clock_ns()
        for subject, quota in zip(subjects, quotas, strict=True):
            wait_ns = quota.requests.wait_ns(1, now)
            if wait_ns:
                return Verdict(quotas[0].levels(now), _refusal(subject, "requests", wait_ns))
        for quota in quotas:
            quota.requests.take(1, now)
        return Verdict(quotas[0].levels(now))

    async def enter(self, subjects: Subjects, tokens: int) -> Verdict:
        """Count a generation and its worst case."""
        quotas, now = self.quotas(subjects), self.clock_ns()
        for subject, quota in zip(subjects, quotas, strict=True):
            wait_ns = quota.tokens.wait_ns(tokens, now)
            if wait_ns:
                return Verdict(quotas[0].levels(now), _refusal(subject, "tokens", wait_ns))
            if 0 < subject.rates.concurrent <= quota.running:
                return Verdict(quotas[0].levels(now), Refusal(subject, "running", RUNNING_WAIT_MS))
        for quota in quotas:
            quota.tokens.take(tokens, now)
            quota.running += 1
        return Verdict(quotas[0].levels(now), place=_Place(subjects, quotas, tokens, self.clock_ns))

    def quotas(self, subjects: Subjects) -> list[_Quota]:
        """What is counted of each, made where nothing was."""
        return [self._quota(subject) for subject in subjects]

    def _quota(self, subject: Subject) -> _Quota:
        quota = self._quotas.get(subject.name)
        if quota is None:
            now = self.clock_ns()
            if len(self._quotas) >= _SUBJECTS_MAX:
                self._quotas = {name: each for name, each in self._quotas.items() if not each.idle(now)}
            quota = self._quotas[subject.name] = _Quota.full(subject.rates, now)
        quota.requests.per_minute = subject.rates.requests_per_minute  # they may have been changed
        quota.tokens.per_minute = subject.rates.tokens_per_minute
        return quota


@dataclass(slots=True)
class _Place:
    subjects: Subjects
    quotas: list[_Quota]
    worst_case: int
    clock_ns: Callable[[], int]

    def give_back(self, tokens: int) -> int:
        now = self.clock_ns()
        back = [back_of(subject.rates, self.worst_case, tokens) for subject in self.subjects]
        for quota, count in zip(self.quotas, back, strict=True):
            quota.tokens.give_back(count, now)
        return back[0]

    def leave(self) -> None:
        for quota in self.quotas:
            quota.running -= 1


def _refusal(subject: Subject, what: str, wait_ns: int) -> Refusal:
    return Refusal(subject, what, -(-wait_ns // _NS_PER_MS))
