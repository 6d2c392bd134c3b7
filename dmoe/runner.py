"""The seam between generation and models: sequences, and passes over rows of several of them.

Owns: the Protocols. Does not own: who takes part in a pass (``dmoe/engine``), how it is computed (``dmoe/layers``).

Invariants every runner keeps:
1. A pass is all or nothing: if it raises or is cancelled, no sequence has changed.
2. A sequence's outputs have the same bits however its tokens are cut into passes, and whatever else is in them.
3. One pass at a time per runner: whoever holds a runner calls ``forward`` from one task, or in turn.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dmoe.bills import Bill

FloatRows = NDArray[np.float32]

Want = Literal["logits", "hidden"]
"""``logits``: ``f32[.., V]``. ``hidden``: the residual stream behind the last norm, ``f32[.., H]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Who computed an answer: as in :class:`config.generation.Finished`."""

    expert_rows: dict[str, int] = field(default_factory=dict)
    serving: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    retries: int = 0
    missing: tuple[tuple[int, int], ...] = ()


class Sequence(Protocol):
    """One sequence with its key/value cache: ``length`` of ``capacity`` positions are in it."""

    bill: Bill | None
    """What is paid for it is put there; None: nobody's any more, or not yet."""

    @property
    def length(self) -> int: ...
    @property
    def capacity(self) -> int: ...

    def truncate(self, length: int) -> None:
        """Forget the positions from ``length`` on."""

    def report(self) -> Report:
        """Who computed what so far."""

    def close(self) -> None:
        """Free the cache at once. Never blocks; a second call does nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """What one sequence contributes to a pass: one or more ``tokens``, appended to it."""

    sequence: Sequence
    tokens: tuple[int, ...]
    outputs: int = 1
    """Of how many of the last rows an output is wanted; 0: of none."""
    want: Want = "logits"


class Runner(Protocol):
    """A model by one route, loaded."""

    async def open(self, capacity: int, *, like: Sequence | None = None, length: int = 0) -> Sequence:
        """A sequence for ``capacity`` positions. With ``like`` it starts with the first ``length`` positions of that
        one, bit for bit as if it had computed them. Raises RequestError if the model's context is shorter."""

    async def forward(self, feeds: Items[Feed]) -> list[FloatRows]:
        """One pass over the rows of different sequences: per feed its outputs, ``f32[outputs, V or H]``.

        Raises RequestError for tokens that do not fit or do not exist, and whatever computing them raises.
        """
