"""What stages need of the layer loop: whole layers in this process, and a sequence's key/value cache in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dmoe.core.wire import FloatRows
from dmoe.runner import Want


class Cache(Protocol):
    """A sequence's key/value cache in a segment: ``length`` of ``capacity`` positions are in it."""

    @property
    def length(self) -> int: ...
    @property
    def capacity(self) -> int: ...

    def truncate(self, length: int) -> None:
        """Forget the positions from ``length`` on."""

    def close(self) -> None:
        """Free the memory at once."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The next ``rows`` rows of a pass belong to ``cache``'s sequence."""

    cache: Cache
    rows: int


class Segment(Protocol):
    """Layers ``first`` to ``last``, loaded."""

    ram_bytes: int

    async def open(self, capacity: int, like: Cache | None = None, length: int = 0) -> Cache:
        """A cache for ``capacity`` positions; with ``like`` it starts with the first ``length`` ones of that one."""

    async def run(self, x: FloatRows, parts: Sequence[Rows]) -> FloatRows:
        """The residual stream ``f32[N, H]`` in and out; appends the rows of each part to its cache. A row's bits depend
        on its sequence alone. If it raises, no cache has changed. The answer is overwritten by the next pass."""

    def close(self) -> None:
        """Free everything."""


class Ends(Protocol):
    """What stands before the first layer and behind the last."""

    def embed(self, tokens: Sequence[int]) -> FloatRows:
        """``f32[N, H]``. Raises RequestError for a token that does not exist."""

    async def head(self, x: FloatRows, want: Want) -> FloatRows:
        """The last norm and, for ``logits``, the head: ``f32[N, H] -> f32[N, V or H]``."""
