"""How much a key may ask for: requests and tokens per minute, and requests at the same time.

In memory, one gateway's view. Owns the buckets; whoever serves a request asks here and reports what it did not use.

Invariants: a bucket never holds more than a minute's worth and its arithmetic is exact (integers); the table of keys
is bounded, and only keys with nothing to remember (full buckets, nothing running) are dropped from it.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from gateway.errors import ApiError

_NS_PER_MINUTE = 60_000_000_000
_NS_PER_MS = 1_000_000
_KEYS_MAX = 10_000


class Bucket:
    """A token bucket that refills ``per_minute`` evenly. Its level is kept in units of 1/_NS_PER_MINUTE."""

    __slots__ = ("_level", "_updated_ns", "per_minute")

    def __init__(self, per_minute: int, now_ns: int) -> None:
        self.per_minute = per_minute
        self._level = per_minute * _NS_PER_MINUTE
        self._updated_ns = now_ns

    def take(self, count: int, now_ns: int) -> int:
        """Take ``count`` and return 0, or take nothing and return how many nanoseconds to wait.

        More than a whole minute's worth counts as a minute's worth, or it could never be served.
        """
        self._refill(now_ns)
        need = min(count, self.per_minute) * _NS_PER_MINUTE
        if need <= self._level:
            self._level -= need
            return 0
        return -(-(need - self._level) // self.per_minute)

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

    def idle(self, now_ns: int) -> bool:
        """Whether it holds nothing that a fresh one would not."""
        return not (self.running or self.requests.full_in_ns(now_ns) or self.tokens.full_in_ns(now_ns))


@dataclass(slots=True)
class Limits:
    """The limits of every key of this gateway."""

    requests_per_minute: int
    tokens_per_minute: int
    concurrent_per_key: int
    clock_ns: Callable[[], int] = time.monotonic_ns
    _quotas: dict[str, _Quota] = field(default_factory=dict)

    def take_request(self, key: str) -> None:
        """Count a request. Raises ApiError ``rate_limited``."""
        now = self.clock_ns()
        wait_ns = self._quota(key, now).requests.take(1, now)
        if wait_ns:
            raise _limited(f"more than {self.requests_per_minute} requests per minute", wait_ns)

    def take_tokens(self, key: str, count: int) -> None:
        """Count a request's worst case. Raises ApiError ``rate_limited``."""
        now = self.clock_ns()
        wait_ns = self._quota(key, now).tokens.take(count, now)
        if wait_ns:
            raise _limited(f"more than {self.tokens_per_minute} tokens per minute", wait_ns)

    def give_back_tokens(self, key: str, count: int) -> None:
        """Return the part of the worst case that was not used."""
        now = self.clock_ns()
        self._quota(key, now).tokens.give_back(count, now)

    @contextmanager
    def running(self, key: str) -> Iterator[None]:
        """Count a request as running. Raises ApiError ``rate_limited`` when too many are."""
        quota = self._quota(key, self.clock_ns())
        if quota.running >= self.concurrent_per_key:
            raise _limited(f"more than {self.concurrent_per_key} requests at the same time", 1000 * _NS_PER_MS)
        quota.running += 1
        try:
            yield
        finally:
            quota.running -= 1

    def headers(self, key: str) -> Mapping[str, str]:
        """The ``x-ratelimit-*`` headers of an answer."""
        now = self.clock_ns()
        quota = self._quota(key, now)
        return {
            "x-ratelimit-limit-requests": str(self.requests_per_minute),
            "x-ratelimit-limit-tokens": str(self.tokens_per_minute),
            "x-ratelimit-remaining-requests": str(quota.requests.remaining(now)),
            "x-ratelimit-remaining-tokens": str(quota.tokens.remaining(now)),
            "x-ratelimit-reset-requests": _span(quota.requests.full_in_ns(now)),
            "x-ratelimit-reset-tokens": _span(quota.tokens.full_in_ns(now)),
        }

    def _quota(self, key: str, now_ns: int) -> _Quota:
        quota = self._quotas.get(key)
        if quota is None:
            if len(self._quotas) >= _KEYS_MAX:
                self._quotas = {k: q for k, q in self._quotas.items() if not q.idle(now_ns)}
            quota = _Quota(Bucket(self.requests_per_minute, now_ns), Bucket(self.tokens_per_minute, now_ns))
            self._quotas[key] = quota
        return quota


def _limited(what: str, wait_ns: int) -> ApiError:
    wait_ms = -(-wait_ns // _NS_PER_MS)
    return ApiError("rate_limited", f"this key asked for {what}", f"try again in {wait_ms} ms", retry_after_ms=wait_ms)


def _span(nanoseconds: int) -> str:
    """A duration as OpenAI writes it: ``6m0s``, ``1.5s``, ``20ms``."""
    ms = -(-nanoseconds // _NS_PER_MS)
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    seconds = f"{rest / 1000:g}s"
    return f"{minutes}m{seconds}" if minutes else seconds
