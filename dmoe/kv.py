"""Key/value caches: slots of fixed memory that attention updates in place.

Owns: the memory, who has which slot, taking over another sequence's positions. Does not own: what a layer keeps per
position (``dmoe/attention``), who may have how much (``dmoe/engine``).

A pool holds, per layer and part, ``f32[slots, heads, positions + spare, width]``: neighbouring slots are one batch for
the attention operator, without a copy. Both dimensions grow by doubling, so a pool is as long as its longest sequence.

Invariants:
1. Attention writes the rows of a pass, and one dummy row behind them, of the slots that take part; no other slot.
2. A free slot's memory is the system's: pages are committed when first written and given back when a slot is closed.
3. Memory moves only in :meth:`KvPool.reserve` and :meth:`KvPool.open`: ``generation`` tells. A cache changes its slot
   only in :meth:`KvPool.bring_together`.
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.errors import LocalError, RequestError

Array = NDArray[Any]

_POSITIONS_FIRST = 256
_STRANGERS_MAX = 4


@dataclass(frozen=True, slots=True)
class CachePart:
    """What a layer keeps of each position: ``f32[heads, width]`` under ``name``. ``is_both``: it is key and value, and
    the operator writes the same numbers twice."""

    name: str
    heads: int
    width: int
    is_both: bool = False

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names under which a graph gives the memory back."""
        return (f"present_{self.name}", f"present_{self.name}_again")[: 1 + self.is_both]


class Cache:
    """One sequence's slot: ``length`` of ``capacity`` positions are in it."""

    __slots__ = ("__weakref__", "capacity", "length", "pool", "slot")

    def __init__(self, pool: "KvPool", slot: int, capacity: int) -> None:
        self.pool = pool
        self.slot = slot
        self.capacity = capacity
        self.length = 0

    @property
    def is_open(self) -> bool:
        """Whether it still has its slot."""
        return self.slot >= 0

    @property
    def is_lost(self) -> bool:
        """Whether what was in it is gone, because the process that kept it ended."""
        return False

    def begin_again(self) -> None:
        """A lost one is empty, where it can be used again. Blocking."""

    def truncate(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        assert 0 <= length <= self.length
        self.length = length

    def close(self) -> None:
        """Free the slot; during a pass, as soon as that is over. A second call does nothing."""
        self.pool.close(self)


class KvPool:
    """The caches of several sequences over some layers. Not safe for several threads, except as ``busy`` says."""

    def __init__(self, layers: Sequence[Sequence[CachePart]], context: int, spare: int = 1) -> None:
        """``spare``: rows behind a slot's positions, where attention may write dummies and padding."""
        self._layers = layers
        self._context = context
        self.spare = spare
        self._caches: list[Cache | None] = []
        self._closing: list[Cache] = []
        self._memory: list[list[_Memory]] = []
        self.positions = 0
        """Per slot, without the spare ones."""
        self.generation = 0
        self.busy = False
        """A pass is under way, maybe in another thread: slots are not freed meanwhile."""

    @property
    def slots(self) -> int:
        """How many there are, free or not."""
        return len(self._caches)

    def open(self, capacity: int, like: Cache | None = None, length: int = 0) -> Cache:
        """A free slot, holding the first ``length`` positions of ``like``. Raises RequestError if the model's context
        is shorter than ``capacity``, LocalError if there is no memory. Not while ``busy``."""
        if not 1 <= capacity <= self._context:
            raise RequestError(
                "context_length_exceeded", f"{capacity} tokens do not fit the model's context of {self._context}"
            )
        if None not in self._caches:
            slots = max(1, 2 * len(self._caches))
            self._move(slots, max(self.positions, min(_POSITIONS_FIRST, self._context)))
            self._caches += [None] * (slots - len(self._caches))
        cache = Cache(self, self._caches.index(None), capacity)
        self._caches[cache.slot] = cache
        if like is not None:
            assert like.pool is self
            assert like.is_open
            assert 0 <= length <= min(like.length, capacity)
            for memory in self._all():
                memory.array[cache.slot, :, :length] = memory.array[like.slot, :, :length]
            cache.length = length
        return cache

    def close(self, cache: Cache) -> None:
        """See :meth:`Cache.close`."""
        if self.busy:
            self._closing.append(cache)
        elif cache.is_open:
            for memory in self._all():
                memory.release(cache.slot)
            self._caches[cache.slot] = None
            cache.slot = -1

    def reserve(self, positions: int) -> None:
        """Make every slot at least this long."""
        if positions > self.positions:
            self._move(len(self._caches), min(self._context, max(positions, 2 * self.positions)))

    def bring_together(self, caches: Sequence[Cache]) -> None:
        """Make the slots of these caches neighbours if too many others stand between them: attention runs over all
        from the first to the last, and each that takes no part still costs something."""
        slots = sorted(cache.slot for cache in caches)
        if slots[-1] - slots[0] + 1 <= 2 * len(slots) + _STRANGERS_MAX:
            return
        window = range(slots[0], slots[0] + len(slots))
        outside = [cache for cache in caches if cache.slot not in window]
        for cache, slot in zip(outside, sorted(set(window) - set(slots)), strict=True):
            self._swap(cache, slot)

    def _swap(self, cache: Cache, slot: int) -> None:
        other = self._caches[slot]
        length, theirs = cache.length, 0 if other is None else other.length
        for memory in self._all():
            here, there = memory.array[cache.slot], memory.array[slot]
            kept = there[:, :theirs].copy()
            there[:, :length] = here[:, :length]
            here[:, :theirs] = kept
        self._caches[cache.slot], self._caches[slot] = other, cache
        if other is not None:
            other.slot = cache.slot
        cache.slot = slot

    def end_pass(self) -> None:
        """Nothing uses the memory any more."""
        self.busy = False
        while self._closing:
            self.close(self._closing.pop())

    def view(self, layer: int, first: int, last: int) -> list[Array]:
        """A layer's parts (counted within this pool) of the slots ``first..last``."""
        return [memory.array[first : last + 1] for memory in self._memory[layer]]

    def _all(self) -> list["_Memory"]:
        return [memory for parts in self._memory for memory in parts]

    def _move(self, slots: int, positions: int) -> None:
        moved = []
        for layer, parts in enumerate(self._layers):
            new = [_Memory((slots, part.heads, positions + self.spare, part.width)) for part in parts]
            for memory, old in zip(new, self._memory[layer] if self._memory else (), strict=False):
                for cache in self._caches:
                    if cache is not None:
                        memory.array[cache.slot, :, : cache.length] = old.array[cache.slot, :, : cache.length]
            moved.append(new)
        self._memory = moved
        self.positions = positions
        self.generation += 1


class _Memory:
    """Zeroed memory whose pages exist once they are written to."""

    __slots__ = ("_map", "array")

    def __init__(self, shape: tuple[int, ...]) -> None:
        size = 4 * int(np.prod(shape))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            self._map = mmap.mmap(-1, size, flags=flags)
        except OSError as error:
            message = f"no memory for {shape[0]} caches of {shape[2]} positions: {error}"
            raise LocalError("local", message, "shorten the prompt, or let fewer answers run at once") from error
        self.array: Array = np.frombuffer(self._map, np.float32).reshape(shape)

    def release(self, slot: int) -> None:
        size = self.array[0].nbytes
        start = -(-slot * size // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (slot + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)
