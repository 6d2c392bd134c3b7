"""What stages need of the layer loop: layers that can be freed, and what a model begins and ends with."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dmoe.core.wire import FloatRows
from dmoe.kv import Cache
from dmoe.runner import Want
from dmoe.segment import Part


class Segment(Protocol):
    """Layers ``first`` to ``last``, loaded."""

    ram_bytes: int

    async def open(self, capacity: int, like: Cache | None = None, length: int = 0) -> Cache:
        """A cache for ``capacity`` positions; with ``like`` it starts with the first ``length`` ones of that one."""

    async def run(self, x: FloatRows, parts: Sequence[Part]) -> FloatRows:
        """The residual stream ``f32[N, H]`` in and out; appends the rows of each part to its cache. A row's bits depend
        on its sequence alone. If it raises, no cache has changed. The answer is overwritten by the next pass."""

    def compute(self, x: FloatRows, parts: Sequence[Part]) -> FloatRows | None:
        """The same at once, in the calling thread, while nothing else uses it; None: not this kind of layers."""

    def close(self) -> None:
        """Free everything."""


class Embedding(Protocol):
    """Token ids to rows."""

    def gather(self, rows: NDArray[np.int64]) -> FloatRows:
        """``f32[N, H]``."""


class Ends(Protocol):
    """What stands before the first layer and behind the last."""

    @property
    def embedding(self) -> Embedding: ...

    def outputs(self, rows: FloatRows, want: Want) -> FloatRows:
        """The last norm and, for ``logits``, the head: ``f32[N, H] -> f32[N, V or H]``."""

    def is_quick(self, rows: int) -> bool:
        """Whether so many rows may go through the head on the event loop."""
