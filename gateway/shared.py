"""Limits in Redis, shared by several gateways: whichever a client's requests come to, they count once.

One script call per question, atomic in Redis and by Redis' clock, so gateways' clocks do not matter. What is given back
is sent and not waited for, and again on the next connection if the answer did not come. While Redis is away each
gateway counts alone, in memory: limits become as many times larger as there are gateways, and nobody is turned away for
it; a warning says so once a minute, and it ends by itself.

Invariants:
1. All subjects of a request are taken or none.
2. A place in Redis is a lease: a gateway that dies holds it at most ``LEASE_MS`` longer.
3. A generation leaves where it was let in: in Redis or in memory.
4. What nobody heard the answer of is undone, lease and tokens, whether Redis did it or does it later: a stall of Redis
   leaves nothing behind. Tokens go back with the lease, so however often that is sent it happens once; and what an
   earlier connection still held does nothing once the next one has begun.
"""

import hashlib
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import trio

from gateway.limits import RUNNING_WAIT_MS, Levels, Limits, Refusal, Subjects, Verdict, back_of
from gateway.resp import Redis, RedisAway, RedisRefused, Reply, Unsent

_logger = logging.getLogger("rios.gateway")

LEASE_MS = 60_000
_RENEW_SECONDS = 20.0
_TOLD_SECONDS = 60.0
_WHAT = ("requests", "tokens", "running")
_OWED_MAX = 4096
_FENCE_MS = 600_000
"""Longer than a network delivers what was sent on a connection that is closed."""

# KEYS: of each subject its buckets (a hash) and its running generations (a set of leases, scored by their ends).
# ARGV: requests, tokens, lease or "", lease ms, the gateway's fence, this connection's number; then of each subject its
# three rates. Answers nothing behind the fence: the gateway has a newer connection, and takes this for undone.
# Answers {requests and tokens the first has left, ms until each is full}, and if one refuses {which subject, which of
# _WHAT, ms to wait} behind it, both counted from 1.
_TAKE = """
if tonumber(redis.call('GET', ARGV[5]) or 0) > tonumber(ARGV[6]) then return {} end
local t = redis.call('TIME')
local now = t[1] * 1000 + t[2] / 1000
local asked, lease, lives = {tonumber(ARGV[1]), tonumber(ARGV[2])}, ARGV[3], tonumber(ARGV[4])
local levels, refusal = {}, nil
for i = 1, #KEYS / 2 do
  local at = 6 + 3 * (i - 1)
  local seen = redis.call('HMGET', KEYS[2 * i - 1], 'r', 't', 'at')
  local passed = math.max(0, now - (tonumber(seen[3]) or 0))
  levels[i] = {}
  for k = 1, 2 do
    local rate = tonumber(ARGV[at + k])
    local level = math.min(rate, (tonumber(seen[k]) or rate) + passed * rate / 60000)
    local need = math.min(asked[k], rate)
    levels[i][k] = level
    if need > level and not refusal then refusal = {i, k, math.ceil((need - level) * 60000 / rate)} end
  end
  local most = tonumber(ARGV[at + 3])
  if lease ~= '' then
    redis.call('ZREMRANGEBYSCORE', KEYS[2 * i], '-inf', now)
    if most > 0 and redis.call('ZCARD', KEYS[2 * i]) >= most and not refusal then refusal = {i, 3, 0} end
  end
end
if not refusal then
  for i = 1, #KEYS / 2 do
    local at = 6 + 3 * (i - 1)
    for k = 1, 2 do levels[i][k] = levels[i][k] - math.min(asked[k], tonumber(ARGV[at + k])) end
    redis.call('HSET', KEYS[2 * i - 1], 'r', string.format('%.17g', levels[i][1]),
      't', string.format('%.17g', levels[i][2]), 'at', string.format('%.17g', now))
    redis.call('PEXPIRE', KEYS[2 * i - 1], 61000)
    if lease ~= '' then
      redis.call('ZADD', KEYS[2 * i], now + lives, lease)
      redis.call('PEXPIRE', KEYS[2 * i], lives + 1000)
    end
  end
end
local answer = {}
for k = 1, 2 do
  local rate = tonumber(ARGV[6 + k])
  answer[k] = math.floor(levels[1][k])
  answer[k + 2] = rate > 0 and math.ceil((rate - levels[1][k]) * 60000 / rate) or 0
end
for _, n in ipairs(refusal or {}) do answer[#answer + 1] = n end
return answer
"""

# KEYS as above. ARGV: lease to end, tokens to give back to each subject that has it. A bucket that is gone is full.
_GIVE = """
for i = 1, #KEYS / 2 do
  local bucket = KEYS[2 * i - 1]
  if redis.call('ZREM', KEYS[2 * i], ARGV[1]) == 1 then
    local level = tonumber(redis.call('HGET', bucket, 't'))
    if level then redis.call('HSET', bucket, 't', string.format('%.17g', level + tonumber(ARGV[i + 1]))) end
  end
end
"""

# KEYS: sets of leases. ARGV: ms, fence and number as above; then the lease in each. One that has run out comes back:
# its generation still runs.
_RENEW = """
if tonumber(redis.call('GET', ARGV[2]) or 0) > tonumber(ARGV[3]) then return end
local t = redis.call('TIME')
local now = t[1] * 1000 + t[2] / 1000
for i = 1, #KEYS do
  redis.call('ZADD', KEYS[i], now + ARGV[1], ARGV[i + 3])
  redis.call('PEXPIRE', KEYS[i], ARGV[1] + 1000)
end
"""

# KEYS: the fence. ARGV: the number from which on connections count, ms.
_RAISE = """
if tonumber(redis.call('GET', KEYS[1]) or 0) <= tonumber(ARGV[1]) then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
end
"""


class _Script:
    """A script that Redis learns when it does not know it."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def call(self, redis: Redis, keys: list[str], *arguments: str | int) -> Reply:
        """Its answer. Raises RedisAway, RedisRefused."""
        try:
            return await redis.call("EVALSHA", self._sha, len(keys), *keys, *arguments)
        except RedisRefused as refused:
            if not str(refused).startswith("NOSCRIPT"):
                raise
        return await redis.call("EVAL", self._text, len(keys), *keys, *arguments)

    def post(
        self, redis: Redis, keys: list[str], *arguments: str | int, heard: Callable[[], None] | None = None
    ) -> None:
        """Run it without waiting. Raises Unsent."""
        redis.post("EVAL", self._text, len(keys), *keys, *arguments, heard=heard)


_take, _give, _renew, _raise = _Script(_TAKE), _Script(_GIVE), _Script(_RENEW), _Script(_RAISE)


@dataclass(frozen=True, slots=True)
class _Owed:
    """A lease to end, and tokens to give back with it; after ``until`` both have come back alone."""

    keys: list[str]
    back: Sequence[int]
    until: float


class SharedLimits:
    """Counts in Redis, and in ``alone`` while that is away. :meth:`run` must run."""

    def __init__(self, redis: Redis, alone: Limits, clock: Callable[[], float] = trio.current_time) -> None:
        self.redis = redis
        self._alone = alone
        self._clock = clock
        self._leases: dict[str, list[str]] = {}
        self._owed: dict[str, _Owed] = {}
        """By lease: what Redis has not said that it did."""
        self._fence = f"rios:limit:fence:{secrets.token_hex(8)}"
        self._connection = 0
        redis.greet = self._greet
        self._told_at = float("-inf")
        self._away = False

    async def run(self) -> None:
        """Keep the connection, and the leases of what runs here."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.redis.run)
            while True:
                await trio.sleep(_RENEW_SECONDS)
                self._pay(list(self._owed))  # if too much was under way
                self._renew()

    async def request(self, subjects: Subjects) -> Verdict:
        """Count a request."""
        try:
            return await self._ask(subjects, 1, 0, "")
        except (RedisAway, RedisRefused) as why:
            self._tell(why)
            return await self._alone.request(subjects)

    async def enter(self, subjects: Subjects, tokens: int) -> Verdict:
        """Count a generation and its worst case."""
        place = _Place(self, subjects, tokens, secrets.token_hex(8))
        unheard = True
        try:
            verdict = await self._ask(subjects, 0, tokens, place.lease)
            unheard = False
        except (RedisAway, RedisRefused) as why:
            unheard = not isinstance(why, Unsent)
            self._tell(why)
            return await self._alone.enter(subjects, tokens)
        finally:
            if unheard:
                place.give_back(tokens)
                place.leave()
        if verdict.refusal is not None:
            return verdict
        self._leases[place.lease] = keys_of(subjects)[1::2]
        return replace(verdict, place=place)

    async def _ask(self, subjects: Subjects, requests: int, tokens: int, lease: str) -> Verdict:
        rates: list[int] = []
        for subject in subjects:
            limits = subject.rates
            rates += (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent)
        fence = (self._fence, self._connection)
        answer = await _take.call(self.redis, keys_of(subjects), requests, tokens, lease, LEASE_MS, *fence, *rates)
        if not isinstance(answer, list) or len(answer) not in (4, 7) or not all(isinstance(n, int) for n in answer):
            raise RedisRefused("the limits' script answered something else than it does")
        self._well()
        levels, refused = Levels(*answer[:4]), answer[4:]
        if not refused:
            return Verdict(levels)
        which, what, wait_ms = refused
        if not (0 < which <= len(subjects) and 0 < what <= len(_WHAT)):
            raise RedisRefused("the limits' script refuses something else than it is asked")
        return Verdict(levels, Refusal(subjects[which - 1], _WHAT[what - 1], wait_ms or RUNNING_WAIT_MS))

    def end(self, lease: str, subjects: Subjects, back: Sequence[int]) -> None:
        """End a lease and give tokens back to each subject, now or when Redis is back."""
        self._leases.pop(lease, None)
        if len(self._owed) >= _OWED_MAX:
            del self._owed[next(iter(self._owed))]
        self._owed[lease] = _Owed(keys_of(subjects), back, self._clock() + LEASE_MS / 1000)
        self._pay([lease])

    def _greet(self) -> None:
        self._connection += 1
        _raise.post(self.redis, [self._fence], self._connection, _FENCE_MS)
        self._pay(list(self._owed))

    def _pay(self, leases: Sequence[str]) -> None:
        try:
            for lease in leases:
                owed = self._owed[lease]
                if owed.until < self._clock():
                    del self._owed[lease]
                    continue
                _give.post(self.redis, owed.keys, lease, *owed.back, heard=partial(self._paid, lease))
        except RedisAway as why:
            self._tell(why)

    def _paid(self, lease: str) -> None:
        self._owed.pop(lease, None)

    def _renew(self) -> None:
        pairs = [(key, lease) for lease, keys in self._leases.items() for key in keys]
        try:
            for first in range(0, len(pairs), 256):
                some = pairs[first : first + 256]
                fence = (self._fence, self._connection)
                _renew.post(self.redis, [key for key, _ in some], LEASE_MS, *fence, *(lease for _, lease in some))
        except RedisAway as why:
            self._tell(why)

    def _tell(self, why: Exception) -> None:
        self._away = True
        if self._clock() - self._told_at >= _TOLD_SECONDS:
            self._told_at = self._clock()
            reason = str(why) or "no connection"
            _logger.warning("Redis is away (%s): this gateway counts its limits alone until it is back", reason)

    def _well(self) -> None:
        if self._away:
            self._away = False
            _logger.info("Redis is back: limits are shared again")


@dataclass(slots=True)
class _Place:
    limits: SharedLimits
    subjects: Subjects
    worst_case: int
    lease: str
    back: list[int] = field(init=False)
    """Tokens that go back with the lease."""

    def __post_init__(self) -> None:
        self.back = [0] * len(self.subjects)

    def give_back(self, tokens: int) -> int:
        self.back = [back_of(subject.rates, self.worst_case, tokens) for subject in self.subjects]
        return self.back[0]

    def leave(self) -> None:
        self.limits.end(self.lease, self.subjects, self.back)


def keys_of(subjects: Subjects) -> list[str]:
    """A subject's two keys, of each."""
    return [key for each in subjects for key in (f"{_name(each.name)}:rates", f"{_name(each.name)}:running")]


def _name(subject: str) -> str:
    return f"rios:limit:{subject}"
