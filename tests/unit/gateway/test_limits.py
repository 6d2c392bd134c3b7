"""Rates and concurrency per key, with a clock that tests turn."""

import pytest

from gateway.errors import ApiError
from gateway.limits import Bucket, Limits

SECOND = 1_000_000_000


class Clock:
    now = 0

    def __call__(self) -> int:
        return self.now


def limits(**changes: int) -> tuple[Limits, Clock]:
    clock = Clock()
    values = {"requests_per_minute": 3, "tokens_per_minute": 100, "concurrent_per_key": 2, **changes}
    return Limits(**values, clock_ns=clock), clock


def test_requests_refill_evenly() -> None:
    limit, clock = limits()
    for _ in range(3):
        limit.take_request("a")
    with pytest.raises(ApiError) as caught:
        limit.take_request("a")
    assert (caught.value.code, caught.value.retry_after_ms) == ("rate_limited", 20_000)
    limit.take_request("b")
    clock.now += 20 * SECOND - 1
    with pytest.raises(ApiError):
        limit.take_request("a")
    clock.now += 1
    limit.take_request("a")
    with pytest.raises(ApiError):
        limit.take_request("a")


def test_no_request_is_lost_to_rounding() -> None:
    """Seven per minute, asked at awkward times for an hour: the burst and 7 a minute, exactly."""
    bucket = Bucket(7, 0)
    step = 123_456_789
    granted = sum(bucket.take(1, now) == 0 for now in range(0, 3600 * SECOND, step))
    assert granted == 7 + 7 * 60 - 1 or granted == 7 + 7 * 60


def test_waiting_as_told_is_enough() -> None:
    bucket = Bucket(7, 0)
    now = 0
    for _ in range(50):
        wait = bucket.take(3, now)
        now += wait
        if wait:
            assert bucket.take(3, now) == 0


def test_more_than_a_minutes_worth_takes_a_full_bucket() -> None:
    limit, clock = limits()
    limit.take_tokens("a", 5000)
    with pytest.raises(ApiError):
        limit.take_tokens("a", 1)
    clock.now += 60 * SECOND
    limit.take_tokens("a", 5000)


def test_unused_tokens_come_back_but_never_more_than_a_minutes_worth() -> None:
    limit, _ = limits()
    limit.take_tokens("a", 90)
    limit.give_back_tokens("a", 80)
    limit.take_tokens("a", 90)
    limit.give_back_tokens("a", 10_000)
    assert limit.headers("a")["x-ratelimit-remaining-tokens"] == "100"


def test_concurrency() -> None:
    limit, _ = limits()
    with limit.running("a"), limit.running("a"):
        with limit.running("b"):
            pass
        with pytest.raises(ApiError), limit.running("a"):
            pass
    with limit.running("a"), limit.running("a"):
        pass


def test_headers() -> None:
    limit, _ = limits(requests_per_minute=2, tokens_per_minute=600)
    limit.take_request("a")
    limit.take_tokens("a", 3)
    assert limit.headers("a") == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-remaining-tokens": "597",
        "x-ratelimit-reset-requests": "30s",
        "x-ratelimit-reset-tokens": "300ms",
    }
    limit.take_request("a")
    assert limit.headers("a")["x-ratelimit-reset-requests"] == "1m0s"


def test_table_of_keys_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.limits._KEYS_MAX", 10)
    limit, clock = limits()
    limit.take_request("busy")
    for index in range(100):
        clock.now += SECOND // 10
        limit.headers(f"k{index}")
    assert len(limit._quotas) <= 11
    assert limit.headers("busy")["x-ratelimit-remaining-requests"] == "2"
