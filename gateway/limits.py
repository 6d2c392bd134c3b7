"""How much a key, a user and an address may ask for: requests and tokens per minute, and requests at the same time.

Owns the vocabulary: what is limited (:class:`Subject`), what a request is told (:class:`Levels`), and the
:class:`Limits` that two implement: ``gateway/quotas.py`` in memory, one gateway's view; ``gateway/shared.py`` in Redis,
shared by several gateways. Whoever serves a request takes here, and gives back what it did not use.

Invariants: a request that one of its subjects refuses takes nothing of the others; giving back never waits and never
fails; a bucket never holds more than a minute's worth, and never gets back more than was taken of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from config.settings import GatewaySettings
from gateway.accounts import Principal
from gateway.address import neighbourhood
from gateway.errors import ApiError

MS_PER_MINUTE = 60_000
_BUSY_RETRY_MS = 1000


@dataclass(frozen=True, slots=True)
class Rates:
    """What one subject may ask for; 0: as much as it likes."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrent: int = 0


@dataclass(frozen=True, slots=True)
class Subject:
    """Who is limited: ``kind`` is what messages call it, ``name`` is unique among all kinds."""

    kind: str
    name: str
    rates: Rates


Subjects = Sequence[Subject]
"""The first is the one whose numbers a client is told: the key."""


@dataclass(slots=True)
class Levels:
    """What the first subject has left, and how long until it is full again."""

    requests: int
    tokens: int
    requests_full_ms: int
    tokens_full_ms: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not, and how long to wait."""

    subject: Subject
    what: str
    wait_ms: int

    def error(self) -> ApiError:
        """As clients are told."""
        rates = self.subject.rates
        asked = {
            "requests": f"{rates.requests_per_minute} requests per minute",
            "tokens": f"{rates.tokens_per_minute} tokens per minute",
            "running": f"{rates.concurrent} requests at the same time",
        }[self.what]
        wait_ms = max(1, self.wait_ms)
        message = f"this {self.subject.kind} asked for more than {asked}"
        return ApiError("rate_limited", message, f"try again in {wait_ms} ms", retry_after_ms=wait_ms)


RUNNING_WAIT_MS = _BUSY_RETRY_MS
"""Told to who has too many running: nobody knows when one of them ends."""


def back_of(rates: Rates, worst_case: int, unused: int) -> int:
    """Tokens that a subject has back of a generation: what was taken, which is a minute's worth at most, but for what
    was used."""
    return max(0, min(worst_case, rates.tokens_per_minute) - (worst_case - unused))


class Place(Protocol):
    """A generation that was let in. Both methods work at once, whatever has become of the limits' store."""

    def give_back(self, tokens: int) -> int:
        """Return the part of its worst case that was not used, when it leaves at the latest; how much of it the first
        subject has back."""

    def leave(self) -> None:
        """It runs no more."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the limits say to a request: let in (a generation: to a place), or refused."""

    levels: Levels
    refusal: Refusal | None = None
    place: Place | None = None


class Limits(Protocol):
    """The limits of every subject."""

    async def request(self, subjects: Subjects) -> Verdict:
        """Count a request."""

    async def enter(self, subjects: Subjects, tokens: int) -> Verdict:
        """Count a generation as running, and its worst case in tokens: both or neither."""


class Meter:
    """One request's view of the limits: who it is counted as, and what its headers say."""

    def __init__(self, limits: Limits, subjects: Subjects) -> None:
        self._limits = limits
        self._subjects = subjects
        self._levels: Levels | None = None

    async def request(self) -> None:
        """Count the request. Raises ApiError ``rate_limited``."""
        self._heard(await self._limits.request(self._subjects))

    async def enter(self, tokens: int) -> Place:
        """Let a generation in whose worst case is so many tokens. Raises ApiError ``rate_limited``."""
        place = self._heard(await self._limits.enter(self._subjects, tokens)).place
        assert place is not None
        return place

    def _heard(self, verdict: Verdict) -> Verdict:
        self._levels = verdict.levels
        if verdict.refusal is not None:
            raise verdict.refusal.error()
        return verdict

    def give_back(self, place: Place, tokens: int) -> None:
        """Return the part of a generation's worst case that was not used."""
        back = place.give_back(tokens)
        levels, rate = self._levels, self._subjects[0].rates.tokens_per_minute
        if levels is not None and rate:
            levels.tokens = min(rate, levels.tokens + back)
            levels.tokens_full_ms = max(0, levels.tokens_full_ms - back * MS_PER_MINUTE // rate)

    def headers(self) -> Mapping[str, str]:
        """The ``x-ratelimit-*`` headers of an answer."""
        levels, rates = self._levels, self._subjects[0].rates
        if levels is None:
            return {}
        return {
            "x-ratelimit-limit-requests": str(rates.requests_per_minute),
            "x-ratelimit-limit-tokens": str(rates.tokens_per_minute),
            "x-ratelimit-remaining-requests": str(levels.requests),
            "x-ratelimit-remaining-tokens": str(levels.tokens),
            "x-ratelimit-reset-requests": span(levels.requests_full_ms),
            "x-ratelimit-reset-tokens": span(levels.tokens_full_ms),
        }


class Metering:
    """Makes a request's meter by the settings' rules."""

    def __init__(self, limits: Limits, settings: GatewaySettings) -> None:
        self.limits = limits
        self.at_once = min(settings.concurrent_per_key, settings.user_concurrent or settings.concurrent_per_key)
        """How many answers of one caller can run at the same time."""
        self._key = Rates(settings.requests_per_minute, settings.tokens_per_minute, settings.concurrent_per_key)
        self._user = Rates(settings.user_requests_per_minute, settings.user_tokens_per_minute, settings.user_concurrent)
        self._address = Rates(settings.address_requests_per_minute)
        self._limits_users, self._limits_addresses = self._user != Rates(), self._address != Rates()

    def meter(self, principal: Principal, address: str = "") -> Meter:
        """For what this principal asks from there."""
        subjects = [Subject("key", f"k:{principal.key_id or principal.user_id}", self._rates_of(principal))]
        if self._limits_users:
            subjects.append(Subject("user", f"u:{principal.user_id}", self._user))
        if address and self._limits_addresses:
            subjects.append(Subject("address", f"a:{neighbourhood(address)}", self._address))
        return Meter(self.limits, subjects)

    def _rates_of(self, principal: Principal) -> Rates:
        """A key's own rates where it has any."""
        requests, tokens = principal.requests_per_minute, principal.tokens_per_minute
        if not requests and not tokens:
            return self._key
        usual = self._key
        return Rates(requests or usual.requests_per_minute, tokens or usual.tokens_per_minute, usual.concurrent)


def span(ms: int) -> str:
    """A duration as OpenAI writes it: ``6m0s``, ``1.5s``, ``20ms``."""
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, MS_PER_MINUTE)
    seconds = f"{rest / 1000:g}s"
    return f"{minutes}m{seconds}" if minutes else seconds
