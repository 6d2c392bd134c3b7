"""Rates and concurrency of keys, users and addresses, with a clock that tests turn; the same rules in memory and Redis.

Redis counts by its own clock, so what depends on time passing is asked of memory only, and of Redis in milliseconds.
"""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import trio

from config.errors import ConfigError
from config.settings import GatewaySettings
from gateway.accounts import LOCAL
from gateway.errors import ApiError
from gateway.limits import Levels, Limits, Metering, Place, Rates, Subject, Verdict
from gateway.quotas import Bucket, MemoryLimits
from gateway.resp import Address, Redis, RedisAway, RedisRefused, Replies
from gateway.shared import SharedLimits
from tests.redis_server import running_redis

SECOND = 1_000_000_000


class Clock:
    now = 0

    def __call__(self) -> int:
        return self.now


class Asked:
    """Limits that raise what they refuse."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    async def request(self, subjects: list[Subject]) -> Levels:
        return self._heard(await self.limits.request(subjects)).levels

    async def enter(self, subjects: list[Subject], tokens: int) -> tuple[Place, Levels]:
        verdict = self._heard(await self.limits.enter(subjects, tokens))
        assert verdict.place is not None
        return verdict.place, verdict.levels

    def _heard(self, verdict: Verdict) -> Verdict:
        if verdict.refusal is not None:
            raise verdict.refusal.error()
        return verdict

    def __getattr__(self, name: str) -> Any:
        return getattr(self.limits, name)


def key(name: str = "a", **changes: int) -> Subject:
    rates = {"requests_per_minute": 3, "tokens_per_minute": 100, "concurrent": 2, **changes}
    return Subject("key", f"k:{name}", Rates(**rates))


@pytest.fixture(scope="module")
def redis_port() -> Iterator[int]:
    with running_redis() as port:
        yield port


@pytest.fixture
async def shared(redis_port: int, nursery: trio.Nursery) -> Asked:
    return await a_shared(redis_port, nursery)


async def a_shared(port: int, nursery: trio.Nursery) -> Asked:
    limits = SharedLimits(Redis(Address.parse(f"redis://127.0.0.1:{port}")), MemoryLimits())
    nursery.start_soon(limits.run)
    await connected(limits)
    await limits.redis.call("FLUSHALL")
    return Asked(limits)


async def connected(limits: Any) -> None:
    with trio.fail_after(10):
        while not limits.redis.connected:  # noqa: ASYNC110 - it tells nobody
            await trio.sleep(0.01)


async def pid_of(shared: Asked) -> int:
    return int(re.search(rb"process_id:(\d+)", await shared.redis.call("INFO", "server"))[1])


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A Redis that stalls, as by a fork of a large one or a paused virtual machine."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture(params=["memory", "redis"])
def limits(request: pytest.FixtureRequest) -> Asked:
    return Asked(MemoryLimits(Clock())) if request.param == "memory" else request.getfixturevalue("shared")


# --- the bucket


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


# --- in memory, by a clock


async def test_requests_refill_evenly() -> None:
    clock = Clock()
    limit = Asked(MemoryLimits(clock))
    for _ in range(3):
        await limit.request([key()])
    with pytest.raises(ApiError) as caught:
        await limit.request([key()])
    assert (caught.value.code, caught.value.retry_after_ms) == ("rate_limited", 20_000)
    await limit.request([key("b")])
    clock.now += 20 * SECOND - 1
    with pytest.raises(ApiError):
        await limit.request([key()])
    clock.now += 1
    await limit.request([key()])


async def test_table_of_subjects_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.quotas._SUBJECTS_MAX", 10)
    clock = Clock()
    limit = Asked(MemoryLimits(clock))
    await limit.request([key("busy")])
    for index in range(100):
        clock.now += SECOND // 10
        limit.quotas([key(f"k{index}")])
    assert len(limit._quotas) <= 11
    assert limit.quotas([key("busy")])[0].requests.remaining(clock.now) == 2


# --- the same in memory and in Redis


async def test_a_burst_and_then_no_more(limits: Asked) -> None:
    assert [(await limits.request([key()])).requests for _ in range(3)] == [2, 1, 0]
    with pytest.raises(ApiError) as caught:
        await limits.request([key()])
    assert caught.value.code == "rate_limited"
    assert 15_000 < caught.value.retry_after_ms <= 20_000
    assert (await limits.request([key("b")])).requests == 2


async def test_more_than_a_minutes_worth_takes_a_full_bucket(limits: Asked) -> None:
    await limits.enter([key()], 5000)
    with pytest.raises(ApiError) as caught:
        await limits.enter([key()], 5000)
    assert 55_000 < caught.value.retry_after_ms <= 60_000


async def test_unused_tokens_come_back_but_never_more_than_a_minutes_worth(limits: Asked) -> None:
    place, levels = await limits.enter([key()], 90)
    assert levels.tokens == 10
    place.give_back(80)
    place.leave()
    again, levels = await limits.enter([key()], 90)
    assert 0 <= levels.tokens <= 1
    again.give_back(10_000)
    again.leave()
    assert (await limits.request([key()])).tokens == 100


async def test_a_worst_case_beyond_the_bucket_gives_back_only_what_was_taken(limits: Asked) -> None:
    """Of 5000 that it may use, 90 are used and 4910 are not; 100 were taken. The user's bucket is wider."""
    user = Subject("user", "u:ada", Rates(tokens_per_minute=1000))
    place, levels = await limits.enter([key(), user], 5000)
    assert levels.tokens == 0
    assert place.give_back(4910) == 10
    place.leave()
    assert 10 <= (await limits.request([key()])).tokens <= 11
    assert 910 <= (await limits.request([user])).tokens <= 915
    with pytest.raises(ApiError) as caught:
        await limits.enter([key()], 5000)
    assert 50_000 < caught.value.retry_after_ms <= 54_000


async def test_one_that_used_more_than_was_taken_gets_nothing_back(limits: Asked) -> None:
    place, _ = await limits.enter([key()], 5000)
    assert place.give_back(4000) == 0
    place.leave()
    assert (await limits.request([key()])).tokens <= 1


async def test_concurrency(limits: Asked) -> None:
    places = [(await limits.enter([key()], 1))[0] for _ in range(2)]
    await limits.enter([key("b")], 1)
    with pytest.raises(ApiError, match="2 requests at the same time"):
        await limits.enter([key()], 1)
    places[0].leave()
    await limits.enter([key()], 1)


async def test_one_subject_that_refuses_takes_nothing_of_the_others(limits: Asked) -> None:
    wide = key(requests_per_minute=100, concurrent=0)
    user = Subject("user", "u:ada", Rates(requests_per_minute=1, tokens_per_minute=50, concurrent=1))
    assert (await limits.request([wide, user])).requests == 99
    with pytest.raises(ApiError, match="this user asked for more than 1 requests per minute"):
        await limits.request([wide, user])
    assert (await limits.request([wide])).requests == 98
    place, _ = await limits.enter([wide, user], 40)
    place.leave()
    with pytest.raises(ApiError, match="this user asked for more than 50 tokens"):
        await limits.enter([wide, user], 40)
    assert (await limits.request([wide])).tokens == 60


async def test_no_rate_is_no_limit(limits: Asked) -> None:
    free = Subject("key", "k:free", Rates())
    for _ in range(50):
        await limits.request([free])
        await limits.enter([free], 1 << 40)


# --- in Redis


async def test_two_gateways_count_together(redis_port: int, nursery: trio.Nursery) -> None:
    one, two = await a_shared(redis_port, nursery), await a_shared(redis_port, nursery)
    assert [(await each.request([key()])).requests for each in (one, two, one)] == [2, 1, 0]
    with pytest.raises(ApiError):
        await two.request([key()])
    place, _ = await one.enter([key()], 1)
    await two.enter([key()], 1)
    with pytest.raises(ApiError):
        await one.enter([key()], 1)
    place.leave()
    await one.redis.call("PING")  # it has been told
    await two.enter([key()], 1)


async def test_simultaneous_requests_never_pass_the_limit(shared: Asked) -> None:
    granted = 0

    async def ask() -> None:
        nonlocal granted
        try:
            await shared.enter([key(concurrent=7, tokens_per_minute=1 << 20)], 1)
            granted += 1
        except ApiError:
            pass

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(ask)
    assert granted == 7


async def test_a_dead_gateways_leases_run_out(shared: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.shared.LEASE_MS", 100)
    await shared.enter([key(concurrent=1)], 1)
    with pytest.raises(ApiError):
        await shared.enter([key(concurrent=1)], 1)
    shared._renew()
    await trio.sleep(0.06)
    shared._renew()
    await trio.sleep(0.06)
    with pytest.raises(ApiError):
        await shared.enter([key(concurrent=1)], 1)
    await trio.sleep(0.12)
    await shared.enter([key(concurrent=1)], 1)


async def test_without_redis_each_counts_alone_until_it_is_back(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    with running_redis() as port:
        shared = await a_shared(port, nursery)
        place, _ = await shared.enter([key()], 10)
        assert (await shared.request([key()])).requests == 2
    with trio.fail_after(5):
        while shared.redis.connected:  # noqa: ASYNC110 - it tells nobody
            await trio.sleep(0.01)
    place.give_back(5)
    place.leave()
    for _ in range(3):
        await shared.request([key()])
    with pytest.raises(ApiError):
        await shared.request([key()])
    alone, _ = await shared.enter([key()], 10)
    with running_redis(port):
        with trio.fail_after(5):
            while not shared.redis.connected:  # noqa: ASYNC110 - it tells nobody
                await trio.sleep(0.01)
        assert (await shared.request([key()])).requests == 2
        alone.leave()  # in memory, where it was let in
        await shared.enter([key(concurrent=1)], 1)
    told = [record.message for record in caplog.records if "Redis is" in record.message]
    assert len([each for each in told if "away" in each]) == 1, told


async def test_a_redis_that_hangs_is_waited_for_half_a_second(nursery: trio.Nursery) -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    nursery.start_soon(trio.serve_listeners, silent, [listener])
    redis = Redis(Address.parse(f"redis://127.0.0.1:{listener.socket.getsockname()[1]}"))
    shared = Asked(SharedLimits(redis, MemoryLimits()))
    nursery.start_soon(shared.run)
    await trio.sleep(0.1)
    began = trio.current_time()
    assert (await shared.request([key()])).requests == 2
    assert trio.current_time() - began < 2


async def test_a_stall_leaves_neither_leases_nor_taken_tokens(nursery: trio.Nursery) -> None:
    """Eight ask while Redis stalls, are counted here, and end; Redis then does what it was asked."""
    eight = key(concurrent=8, tokens_per_minute=1000)
    user = Subject("user", "u:ada", Rates(tokens_per_minute=1000))
    with running_redis() as port:
        shared = await a_shared(port, nursery)
        place, _ = await shared.enter([eight, user], 10)
        place.give_back(10)

        async def short() -> None:
            (await shared.enter([eight, user], 100))[0].leave()

        with stopped(await pid_of(shared)):
            async with trio.open_nursery() as asking:
                for _ in range(8):
                    asking.start_soon(short)
            place.leave()  # there is no connection at this moment
        await connected(shared)
        for subject in (eight, user):
            assert (await shared.request([subject])).tokens == 1000
        for _ in range(8):
            await shared.enter([eight, user], 100)
        with pytest.raises(ApiError):
            await shared.enter([eight, user], 100)


async def test_one_that_leaves_on_a_connection_that_breaks_has_left(nursery: trio.Nursery) -> None:
    with running_redis() as port:
        shared = await a_shared(port, nursery)
        place, _ = await shared.enter([key(concurrent=1)], 60)
        place.give_back(50)
        place.leave()
        await shared.redis._break()  # what was told has not been sent yet
        await trio.sleep(0.1)
        await connected(shared)
        assert 90 <= (await shared.enter([key(concurrent=1)], 0))[1].tokens <= 91


class LateRedis:
    """A network before a real Redis that keeps what is sent to it, and delivers it after its connection has ended."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.keeps = False
        self.late = trio.Event()

    async def serve(self, stream: trio.SocketStream) -> None:
        kept = b""
        async with await trio.open_tcp_stream("127.0.0.1", self._port) as redis, trio.open_nursery() as nursery:
            nursery.start_soon(self._answer, redis, stream)
            try:
                async for data in stream:
                    if self.keeps:
                        kept += data
                    else:
                        await redis.send_all(bytes(data))
            except trio.BrokenResourceError:
                pass
            if kept:
                await self.late.wait()
                await redis.send_all(kept)
                await trio.sleep(0.3)
            nursery.cancel_scope.cancel()

    async def _answer(self, redis: trio.SocketStream, stream: trio.SocketStream) -> None:
        async for data in redis:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await stream.send_all(bytes(data))


async def test_what_an_earlier_connection_asked_does_nothing_later(redis_port: int, nursery: trio.Nursery) -> None:
    late = LateRedis(redis_port)
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    nursery.start_soon(trio.serve_listeners, late.serve, [listener])
    shared = await a_shared(listener.socket.getsockname()[1], nursery)
    (await shared.enter([key(concurrent=1)], 1))[0].leave()
    staying, _ = await shared.enter([key("b", concurrent=1)], 1)
    late.keeps = True
    shared._renew()
    await shared.enter([key(concurrent=1)], 100)
    late.keeps = False
    await connected(shared)
    staying.leave()
    await shared.redis.call("PING")
    late.late.set()
    await trio.sleep(0.2)
    for each in ("a", "b"):
        assert (await shared.enter([key(each, concurrent=1)], 99))[1].tokens <= 1


async def test_a_redis_that_stays_silent_costs_requests_nothing(nursery: trio.Nursery) -> None:
    with running_redis() as port:
        shared = await a_shared(port, nursery)
        with stopped(await pid_of(shared)):
            waits = []
            ends = trio.current_time() + 4
            while (began := trio.current_time()) < ends:
                await shared.request([key(requests_per_minute=10_000)])
                waits.append(trio.current_time() - began)
                await trio.sleep(0.02)
        assert len([wait for wait in waits if wait > 0.3]) == 1, sorted(waits)[-9:]
        await connected(shared)
        await shared.request([key("b")])
        assert await shared.redis.call("EXISTS", "rios:limit:k:b:rates") == 1


async def test_a_replica_is_left_for_whoever_the_name_means_now(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    with running_redis() as port:
        shared = await a_shared(port, nursery)
        await shared.redis.call("REPLICAOF", "127.0.0.1", 1)
        assert (await shared.request([key()])).requests == 2
        await trio.sleep(0.1)
        assert not shared.redis.connected
        assert "Redis is away (READONLY" in caplog.text
        assert (await shared.request([key()])).requests == 1


@pytest.mark.parametrize(
    "reply",
    [
        b"*7\r\n" + b":1\r\n" * 4 + b":2\r\n:1\r\n:1\r\n",
        b"*7\r\n" + b":1\r\n" * 4 + b":0\r\n:1\r\n:1\r\n",
        b"*7\r\n" + b":1\r\n" * 4 + b":1\r\n:4\r\n:1\r\n",
        b"*7\r\n" + b":1\r\n" * 4 + b":1\r\n:0\r\n:1\r\n",
        b"*4\r\n:1\r\n:1\r\n:1\r\n$1\r\nx\r\n",
        b"*0\r\n",
        b"+OK\r\n",
        b"-ERR\r\n",
    ],
)
async def test_what_the_script_never_answers_is_not_believed(nursery: trio.Nursery, reply: bytes) -> None:
    async def odd(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(b"+PONG\r\n" if b"PING" in data else reply * bytes(data).count(b"\r\nEVAL"))

    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    nursery.start_soon(trio.serve_listeners, odd, [listener])
    redis = Redis(Address.parse(f"redis://127.0.0.1:{listener.socket.getsockname()[1]}"))
    shared = Asked(SharedLimits(redis, MemoryLimits()))
    nursery.start_soon(shared.run)
    await connected(shared)
    assert (await shared.request([key()])).requests == 2
    assert (await shared.enter([key()], 30))[1].tokens == 70


async def test_passwords_and_databases(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_redis(password="open sesame") as port:
        shut = SharedLimits(Redis(Address.parse(f"redis://127.0.0.1:{port}/3")), MemoryLimits())
        nursery.start_soon(shut.run)
        await trio.sleep(0.2)
        assert not shut.redis.connected
        monkeypatch.setenv("REDISCLI_AUTH", "open sesame")
        with trio.fail_after(5):
            while not shut.redis.connected:  # noqa: ASYNC110 - it tells nobody
                await trio.sleep(0.01)
        await shut.request([key()])
        assert await shut.redis.call("EXISTS", "rios:limit:k:a:rates") == 1
        with pytest.raises(RedisRefused, match="unknown command"):
            await shut.redis.call("NONSENSE")


@pytest.mark.parametrize("url", ["http://x", "redis://", "redis://x/y", "redis://u:secret@x", "redis://x:99999"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Address.parse(url)
    assert "secret" not in str(caught.value)


# --- what comes over the wire


@pytest.mark.parametrize("step", [1, 2, 3, 1000])
def test_replies_in_pieces(step: int) -> None:
    data = b"+OK\r\n:-12\r\n$3\r\na\r\n\r\n$-1\r\n*2\r\n:1\r\n$0\r\n\r\n*0\r\n"
    replies = Replies()
    found = [reply for at in range(0, len(data), step) for reply in replies.feed(data[at : at + step])]
    assert found == [b"OK", -12, b"a\r\n", None, [1, b""], []]


@pytest.mark.parametrize(
    "data", [b"?1\r\n", b":x\r\n", b"$99999999\r\n", b"*-5\r\n", b"*1\r\n" * 9, b"+" + b"x" * 70_000]
)
def test_what_no_redis_says(data: bytes) -> None:
    with pytest.raises(RedisAway):
        list(Replies().feed(data))


# --- what clients are told


async def test_headers() -> None:
    settings = GatewaySettings(requests_per_minute=2, tokens_per_minute=600)
    meter = Metering(MemoryLimits(Clock()), settings).meter(LOCAL)
    assert meter.headers() == {}
    await meter.request()
    place = await meter.enter(10)
    meter.give_back(place, 7)
    assert meter.headers() == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-remaining-tokens": "597",
        "x-ratelimit-reset-requests": "30s",
        "x-ratelimit-reset-tokens": "300ms",
    }
    await meter.request()
    assert meter.headers()["x-ratelimit-reset-requests"] == "1m0s"


async def test_headers_of_a_worst_case_beyond_the_bucket() -> None:
    meter = Metering(MemoryLimits(Clock()), GatewaySettings(tokens_per_minute=600)).meter(LOCAL)
    await meter.request()
    meter.give_back(await meter.enter(6000), 5700)
    headers = meter.headers()
    assert headers["x-ratelimit-remaining-tokens"] == "300"
    assert headers["x-ratelimit-reset-tokens"] == "30s"


def test_who_is_counted() -> None:
    meters = Metering(MemoryLimits(), GatewaySettings(user_concurrent=1, address_requests_per_minute=5))
    kinds = [subject.kind for subject in meters.meter(LOCAL, "10.0.0.1")._subjects]
    assert kinds == ["key", "user", "address"]
    assert re.fullmatch("a:.*", meters.meter(LOCAL, "10.0.0.1")._subjects[2].name)
    names = {meters.meter(LOCAL, f"2001:db8:1:{net}::{host}")._subjects[2].name for net in (1, 2) for host in (3, 4)}
    assert len(names) == 2, "an IPv6 client has a /64"
