"""The layer loop: tokens through trunk and experts to logits.

Owns: sequences (their key/value cache), chunked prefill, the order in which attention and experts take turns, and the
expert routes that stay in this process. Does not own: sessions (``dmoe/runtime``), remote experts (``dmoe/caller``).

Exactness, held by tests for fp32, int8 and the source's int4, on 1 and 2 threads:
1. Decoding one by one, in chunks, in one prefill, or after rebuilding the cache gives the same bits.
2. Each sum group's partial sum is rounded once to the wire dtype and added in group order, so neither placement nor
   fail-over changes a bit, and route ``local`` equals route ``experts``.
3. The fused model has no wire roundings: its own, faster class.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import trio
from numpy.typing import NDArray

from config.errors import RequestError
from dmoe.core.linear import Linear
from dmoe.core.manifest import Architecture, Manifest, Router
from dmoe.core.wire import rounded
from dmoe.runtime import Binding, ExpertShard, FusedSession, RuntimeOptions, TrunkSessions
from dmoe.store import ModelStore

Array = NDArray[Any]
FloatRows = NDArray[np.float32]
IntRows = NDArray[np.int32]

CHUNK_ROWS = 256
"""Rows of a prompt that go through the model at once: bounds the memory of attention and the length of a step."""
INLINE_ROWS_MAX = 8
"""So few rows are computed on the event loop itself; more go to a thread, so that the loop never waits long."""


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The router's choice: ``experts i32[N, k]``, ``weights f32[N, k]``. Both None: every expert, unweighted."""

    experts: IntRows | None = None
    weights: FloatRows | None = None


ALL_EXPERTS = Routing()


class Experts(Protocol):
    """Where a layer's experts are, behind one call."""

    async def run(self, layer: int, h: FloatRows, routing: Routing) -> FloatRows:
        """The layer's experts on ``h f32[N, H]``: group partials, each rounded to the wire dtype, added in group
        order. ``h`` may be overwritten after the call returns; the answer is the caller's to keep."""


class Sequence_:
    pass
