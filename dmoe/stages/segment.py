"""What stages need of the layer loop: whole layers in this process, and a sequence's key/value cache in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dmoe.core.wire import FloatRows


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

    def open(self, capacity: int, *, like: Cache | None = None, length: int = 0) -> Cache:
        """A cache for ``capacity`` positions; with ``like`` it starts with the first ``length`` ones of that one."""

    async def run(self, x: FloatRows, parts: Sequence[Rows]) -> FloatRows:
        """The residual stream ``f32[N, H]`` in and out; appends the rows of each part to its cache. A row's bits depend
        on its sequence alone. If it raises, no cache has changed."""

    def close(self) -> None:
        """Free everything."""
