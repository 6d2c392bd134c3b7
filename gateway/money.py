"""What requests cost, and the records that move their money. Pure: no clock, no database.

Amounts are integer microcredits. A request's charge is rounded down once, over the whole request, so a reservation
(the same formula on the most it can use) always covers it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from config.accountbook import Spent

PRICE_UNIT_TOKENS = 1_000_000
"""Prices are microcredits per this many tokens."""


EMBEDDED = "embedded"
"""The outcome of a request for vectors: its prompt is what is paid for."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Microcredits per million tokens."""

    input: int
    output: int

    def charge(self, prompt_tokens: int, completion_tokens: int) -> int:
        """Microcredits for a request, rounded down."""
        return (prompt_tokens * self.input + completion_tokens * self.output) // PRICE_UNIT_TOKENS


FREE = Prices(0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A request's worst case, held back on its payer's account until the request is settled."""

    id: str
    instance: str
    """The gateway that runs the request."""
    account_id: str
    user_id: str
    key_id: str | None
    request_id: str
    """What the client calls the request; not unique."""
    endpoint: str
    model: str
    prompt_tokens: int
    max_tokens: int
    prices: Prices
    idempotency_id: str = ""
    """The request's idempotency key in the database: a crash charges nothing then, as the retry is charged."""
    holder: str = ""
    """As whom this gateway holds that key."""
    route: str = ""
    """How the answer is computed, kept with the key."""
    synced: bool = True
    """Durable before it begins. Not needed where nothing is told of the answer before its settlement is durable."""
    another_pays: bool = False
    """If it is cut off, its prompt is paid with another answer to the same one."""

    @property
    def prompt_if_cut_off(self) -> int:
        """Tokens of the prompt that are paid if it is cut off."""
        return 0 if self.another_pays else self.prompt_tokens

    @property
    def microcredits(self) -> int:
        """The amount held back."""
        return self.prices.charge(self.prompt_tokens, self.max_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """How a reserved request ended."""

    reservation: Reservation
    prompt_tokens: int
    completion_tokens: int
    outcome: str
    """``stop``, ``length``, ``tool_calls``, ``embedded`` (vectors, which have no tokens of their own), ``cancelled``
    (the client left), ``failed``, ``recovered`` (after a crash)."""

    @property
    def microcredits(self) -> int:
        """What the payer pays. Nothing produced costs nothing; never more than was reserved."""
        if self.completion_tokens == 0 and self.outcome != EMBEDDED:
            return 0
        charge = self.reservation.prices.charge(self.prompt_tokens, self.completion_tokens)
        return min(charge, self.reservation.microcredits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """The answers to a request under an idempotency key, charged and kept in one transaction. ``answer`` is
    compressed."""

    settlements: tuple[Settlement, ...]
    idempotency_id: str
    holder: str
    status: int
    content_type: str
    answer: bytes


@dataclass(frozen=True, slots=True)
class Costs:
    """What the swarm is paid: sums that changed. ``run``: under which name those of no request are kept."""

    run: str
    spent: Sequence[Spent] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a running request came: ``completion_tokens`` were delivered."""

    reservation_id: str
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A reservation that its payer's balance, or the budget named, does not cover. ``available`` is what is left,
    microcredits."""

    available: int
    needed: int
    budget: str = ""
