"""Consecutive layers of a model in this process, with the caches of the sequences that pass through them.

Owns: the layer loop, which rows go through attention together, bound memory. Does not own: where experts are (an
:class:`Experts`), embedding and head (``dmoe/layers``), the memory of caches (``dmoe/kv``).

The node that answers and a stage's host run the same two kinds: :class:`FusedSegment`, one graph, for dense models
without roundings; :class:`PieceSegment`, layer by layer, with its experts anywhere.

Invariants:
1. Every operator but attention sees the rows of all sequences as one matrix; attention takes short parts together, and
   each long one (a piece of a prompt) by itself, so that nothing is padded to the longest.
2. A pass that fails leaves every cache's length as it was.
3. One pass at a time: ``run`` and ``open`` wait for each other.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import trio
from numpy.typing import NDArray

from config.errors import LocalError
from dmoe.attention import Places, cache_parts
from dmoe.core import linear
from dmoe.core.linear import Linear
from dmoe.core.manifest import Manifest
from dmoe.core.rope import rope_tables
from dmoe.core.routing import Routing, route
from dmoe.graphs import attention_graph, fused_graph
from dmoe.kv import Cache, KvPool
from dmoe.runner import FloatRows
from dmoe.runtime import (
    Binding,
    RuntimeOptions,
    attention_threads,
    expert_weights,
    layer_weights,
    merged,
    open_session,
    release,
)
from dmoe.shardfile import ShardFile, Spool

Array = NDArray[Any]

INLINE_FLOPS_MAX = 60_000_000
"""A piece of so little work (a few ms) runs on the event loop; more goes to a thread, so that the loop never waits."""
SHORT_ROWS_MAX = 8
"""Parts of up to so many rows go through attention together: single tokens, with their drafts."""
_BOUND_MAX = 32
"""Shapes of a pass whose bound memory is kept."""
_FUSED_SPIN_US = 50
"""Longer than the gaps between one pass's operators, too short to take a core from a neighbour: spinning without end
is 10 % faster on idle cores and half as fast on shared ones."""


class Experts(Protocol):
    """Where a layer's experts are, behind one call."""

    async def run(self, layer: int, h: FloatRows, routing: Routing) -> FloatRows:
        """The layer's experts on ``h f32[N, H]``: group partials, each rounded to the wire dtype, added in group
        order. ``h`` is overwritten after the call returned."""


@runtime_checkable
class HereExperts(Experts, Protocol):
    """Experts in this process, which need no event loop."""

    def compute(self, layer: int, h: FloatRows, routing: Routing) -> FloatRows:
        """As :meth:`Experts.run`, in the calling thread."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one sequence contributes to a pass: its next ``rows`` rows."""

    cache: Cache
    rows: int


class Segment(Protocol):
    """Layers ``first..last`` in this process."""

    first: int
    last: int
    pool: KvPool
    is_here: bool
    """Whether ``compute`` works: nothing is elsewhere."""

    async def open(self, capacity: int, like: Cache | None = None, length: int = 0) -> Cache:
        """An empty cache for ``capacity`` positions, or one with the first ``length`` positions of ``like``. Raises
        RequestError if the model's context is shorter."""

    async def run(self, x: FloatRows, parts: Items[Part]) -> FloatRows:
        """The residual stream ``f32[N, H]`` through the layers; each part's rows are appended to its cache.

        All or nothing. Raises whatever experts elsewhere raise. The answer is overwritten by the next pass.
        """

    def compute(self, x: FloatRows, parts: Items[Part]) -> FloatRows:
        """As :meth:`run`, in the calling thread, which sees to it that nothing else uses the segment meanwhile."""


class _Group:
    """Rows that go through attention in one batch: of neighbouring slots."""

    __slots__ = ("first", "parts", "rows", "shape", "slot")

    def __init__(self, first: int, parts: list[Part], keys_min: int) -> None:
        slots = [part.cache.slot for part in parts]
        self.first = first
        self.parts = parts
        self.rows = sum(part.rows for part in parts)
        self.slot = min(slots)
        rows_max = max(part.rows for part in parts)
        is_short = any(part.cache.length + part.rows < keys_min for part in parts)
        self.shape = (first, self.slot, max(slots), rows_max, self.rows, keys_min if is_short else 1)

    def places(self) -> Places:
        """Memory for where its rows stand."""
        _, first, last, rows_max, rows, keys_min = self.shape
        return Places(last - first + 1, rows_max, rows, keys_min)

    def fill(self, places: Places) -> None:
        """Say where its rows stand now."""
        rows = tuple((part.cache.slot - self.slot, part.rows) for part in self.parts)
        places.fill(rows, [part.cache.length for part in self.parts])


@dataclass(frozen=True, slots=True, eq=False)
class _Bound:
    """A group's bound memory: one binding (fused), or one per layer."""

    places: Places
    bindings: list[Binding]


class _Layers(ABC):
    """What both kinds of segments share: caches, groups, memory."""

    is_here = True

    def __init__(self, manifest: Manifest, first: int, last: int) -> None:
        self.manifest = manifest
        self.architecture = arch = manifest.architecture
        assert 0 <= first <= last < arch.layers
        self.first, self.last = first, last
        # short parts are padded to the longest of them
        spare = max(SHORT_ROWS_MAX + 1, arch.keys_min)
        self.pool = KvPool([cache_parts(arch, layer) for layer in range(first, last + 1)], arch.context, spare)
        self._lock = trio.Lock()
        self._bound: dict[tuple[int, ...], _Bound] = {}
        self._generation = -1
        self._rows = 0
        self._rope: tuple[Array, Array] = rope_tables(arch, 1)

    async def open(self, capacity: int, like: Cache | None = None, length: int = 0) -> Cache:
        """See :class:`Segment`."""
        async with self._lock:
            return self.pool.open(capacity, like, length)

    async def run(self, x: FloatRows, parts: Items[Part]) -> FloatRows:
        """See :class:`Segment`."""
        async with self._lock:
            if self.is_here:
                return await trio.to_thread.run_sync(self.compute, x, parts)
            with self._pass(x, parts) as groups:
                return await self._run(x, groups)

    def compute(self, x: FloatRows, parts: Items[Part]) -> FloatRows:
        """See :class:`Segment`."""
        with self._pass(x, parts) as groups:
            return self._compute(x, groups)

    @contextmanager
    def _pass(self, x: FloatRows, parts: Items[Part]) -> Iterator[list[_Group]]:
        """Its groups. Once the body is through, the parts are in their caches."""
        assert len(x) == sum(part.rows for part in parts)
        assert all(part.cache.pool is self.pool and part.cache.is_open for part in parts)
        self.pool.busy = True
        try:
            self._prepare(len(x), max(part.cache.length + part.rows for part in parts))
            short = [part.cache for part in parts if part.rows <= SHORT_ROWS_MAX]
            if len(short) > 1:
                self.pool.bring_together(short)
            yield list(_groups(parts, self.architecture.keys_min))
            for part in parts:
                part.cache.length += part.rows
        finally:
            self.pool.end_pass()

    async def _run(self, x: FloatRows, groups: list[_Group]) -> FloatRows:
        """All rows through the layers; where others take part, this waits for them."""
        return self._compute(x, groups)

    @abstractmethod
    def _compute(self, x: FloatRows, groups: list[_Group]) -> FloatRows:
        """All rows through the layers, in the calling thread."""

    @abstractmethod
    def _allocate(self, rows: int) -> None:
        """Make room for so many rows."""

    @abstractmethod
    def _bind(self, group: _Group, places: Places) -> list[Binding]:
        """Sessions and memory for groups of this shape."""

    def _prepare(self, rows: int, positions: int) -> None:
        self.pool.reserve(positions)
        if rows > self._rows:
            self._rows = rows if rows <= SHORT_ROWS_MAX else 2 * rows
            self._allocate(self._rows)
            self._bound.clear()
        if self.pool.generation != self._generation:
            self._generation = self.pool.generation
            self._rope = rope_tables(self.architecture, self.pool.positions + self.pool.spare)
            self._bound.clear()

    def _bindings(self, group: _Group) -> list[Binding]:
        """The group's bindings, ready to run."""
        bound = self._bound.pop(group.shape, None)
        if bound is None:
            places = group.places()
            bound = _Bound(places, self._bind(group, places))
            if len(self._bound) >= _BOUND_MAX:
                del self._bound[next(iter(self._bound))]
        self._bound[group.shape] = bound
        group.fill(bound.places)
        return bound.bindings

    def _shared(self, places: Places) -> dict[str, Array]:
        return {**places.inputs(), "rope_cos": self._rope[0], "rope_sin": self._rope[1]}

    def _cache(self, group: _Group, layer: int, prefix: str) -> tuple[dict[str, Array], dict[str, Array]]:
        """A layer's cache as a session's inputs and outputs."""
        _, first, last, *_ = group.shape
        parts = cache_parts(self.architecture, layer)
        held = list(zip(parts, self.pool.view(layer - self.first, first, last), strict=True))
        past = {f"{prefix}past_{part.name}": view for part, view in held}
        return past, {f"{prefix}{name}": view for part, view in held for name in part.outputs}


class FusedSegment(_Layers):
    """Layers of a dense model as one graph, the neuron blocks of each layer joined again, without wire roundings."""

    def __init__(
        self,
        manifest: Manifest,
        files: Items[ShardFile],
        options: RuntimeOptions,
        first: int = 0,
        last: int | None = None,
        spool: Spool | None = None,
    ) -> None:
        """``files`` hold at least these layers' trunk and experts. ``last``: None is the model's last layer. ``spool``:
        where joined weights lie; None: beside the files. Raises LocalError for a sparse model."""
        super().__init__(manifest, first, manifest.architecture.layers - 1 if last is None else last)
        arch = self.architecture
        if arch.router.kind != "all":
            raise LocalError(
                "local", f"{manifest.name}: only dense models have a fused graph", "use the route experts or local"
            )
        tensors = merged(files)
        spool = spool or Spool(files[0].path.parent)
        layers = [
            (layer_weights(arch, tensors, layer), *_joined(manifest, tensors, layer, spool))
            for layer in range(first, self.last + 1)
        ]
        graph = fused_graph(arch, first, layers)
        self._session = open_session(graph, threads=options.thread_count, spin_us=_FUSED_SPIN_US)
        release(files)
        spool.release_pages()

    def _compute(self, x: FloatRows, groups: list[_Group]) -> FloatRows:
        self._x[: len(x)] = x
        for group in groups:
            self._bindings(group)[0].run()
        return self._out[: len(x)]

    def _allocate(self, rows: int) -> None:
        self._x, self._out = (np.zeros((rows, self.architecture.hidden), np.float32) for _ in range(2))

    def _bind(self, group: _Group, places: Places) -> list[Binding]:
        rows = slice(group.first, group.first + group.rows)
        inputs, outputs = {**self._shared(places), "x": self._x[rows]}, {"out": self._out[rows]}
        for layer in range(self.first, self.last + 1):
            past, present = self._cache(group, layer, f"{layer}.")
            inputs |= past
            outputs |= present
        return [Binding(self._session, inputs, outputs)]


class Pieces:
    """The sessions of layers one by one: attention, norms and router, without experts. Several segments may share
    them."""

    def __init__(
        self,
        manifest: Manifest,
        files: Items[ShardFile],
        options: RuntimeOptions,
        first: int = 0,
        last: int | None = None,
    ) -> None:
        """``files`` hold at least these layers' trunk. ``last``: None is the model's last layer."""
        arch, tensors = manifest.architecture, merged(files)
        self.first, self.last = first, arch.layers - 1 if last is None else last
        weights = [layer_weights(arch, tensors, layer) for layer in range(first, self.last + 1)]
        threads = attention_threads(weights, options)
        self.sparse = [layer.is_sparse for layer in weights]
        self.choice_biases = [layer.choice_bias for layer in weights]
        self.sessions = [
            open_session(attention_graph(arch, index, layer), threads=threads)
            for index, layer in enumerate(weights, first)
        ]
        release(files)


class PieceSegment(_Layers):
    """Layers one by one: attention and router here, experts wherever ``experts`` has them."""

    def __init__(self, manifest: Manifest, pieces: Pieces, experts: Experts) -> None:
        super().__init__(manifest, pieces.first, pieces.last)
        arch = self.architecture
        self.pieces, self.sessions = pieces, pieces.sessions
        self._experts = experts
        self._here = experts if isinstance(experts, HereExperts) else None
        self.is_here = self._here is not None
        self._flops_per_row = 2 * max(map(arch.trunk_weights, range(self.first, self.last + 1)))

    async def _run(self, x: FloatRows, groups: list[_Group]) -> FloatRows:
        count = len(x)
        bindings = self._begin(x, groups)
        inline = count * self._flops_per_row <= INLINE_FLOPS_MAX
        for step, layer in enumerate(range(self.first, self.last + 1)):
            if inline:
                _attend(bindings, step)
            else:
                await trio.to_thread.run_sync(_attend, bindings, step)
            self._y[:count] = 0
            if self.pieces.sparse[step]:
                self._y[:count] = await self._experts.run(layer, self._h[:count], self._routing(step, count))
        return self._end(count)

    def _compute(self, x: FloatRows, groups: list[_Group]) -> FloatRows:
        experts = self._here
        assert experts is not None
        count = len(x)
        bindings = self._begin(x, groups)
        h, y = self._h[:count], self._y[:count]
        for step, layer in enumerate(range(self.first, self.last + 1)):
            _attend(bindings, step)
            y[:] = experts.compute(layer, h, self._routing(step, count)) if self.pieces.sparse[step] else 0
        return self._end(count)

    def steps(
        self, x: FloatRows, parts: Items[Part]
    ) -> Generator[tuple[int, FloatRows, Routing], FloatRows, FloatRows]:
        """:meth:`run` for somebody who has the experts: yields each sparse layer with its input and the router's
        choice, and takes the experts' sum. One that is closed in between has changed nothing."""
        with self._pass(x, parts) as groups:
            count = len(x)
            bindings = self._begin(x, groups)
            h, y = self._h[:count], self._y[:count]
            for step, layer in enumerate(range(self.first, self.last + 1)):
                _attend(bindings, step)
                y[:] = (yield layer, h, self._routing(step, count)) if self.pieces.sparse[step] else 0
            return self._end(count)

    def _begin(self, x: FloatRows, groups: list[_Group]) -> list[list[Binding]]:
        self._streams[0][: len(x)] = x
        self._y[: len(x)] = 0
        return [self._bindings(group) for group in groups]

    def _routing(self, step: int, count: int) -> Routing:
        return route(self.architecture.router, self._scores[:count], self.pieces.choice_biases[step])

    def _end(self, count: int) -> FloatRows:
        out = self._streams[len(self.sessions) % 2][:count]
        out += self._y[:count]
        return out

    def _allocate(self, rows: int) -> None:
        arch = self.architecture
        # the residual stream goes back and forth between two buffers
        self._streams = tuple(np.zeros((rows, arch.hidden), np.float32) for _ in range(2))
        self._y, self._h = (np.zeros((rows, arch.hidden), np.float32) for _ in range(2))
        self._scores = np.zeros((rows, arch.router.experts), np.float32)

    def _bind(self, group: _Group, places: Places) -> list[Binding]:
        rows = slice(group.first, group.first + group.rows)
        shared = {**self._shared(places), "y": self._y[rows]}
        bindings = []
        for step, session in enumerate(self.sessions):
            past, present = self._cache(group, self.first + step, "")
            inputs = {**shared, **past, "x": self._streams[step % 2][rows]}
            outputs = {**present, "x2": self._streams[(step + 1) % 2][rows]}
            if self.pieces.sparse[step]:
                outputs["h"] = self._h[rows]
                if self.architecture.router.kind != "all":
                    outputs["scores"] = self._scores[rows]
            bindings.append(Binding(session, inputs, outputs))
        return bindings


def _attend(bindings: list[list[Binding]], step: int) -> None:
    for group in bindings:
        group[step].run()


def _groups(parts: Items[Part], keys_min: int) -> Iterator[_Group]:
    """Runs of short parts, and long parts by themselves."""
    first, short = 0, list[Part]()
    for part in parts:
        assert part.rows > 0
        if part.rows <= SHORT_ROWS_MAX:
            short.append(part)
            continue
        if short:
            yield _Group(first, short, keys_min)
            first, short = first + sum(one.rows for one in short), []
        yield _Group(first, [part], keys_min)
        first += part.rows
    if short:
        yield _Group(first, short, keys_min)


def _joined(manifest: Manifest, tensors: Mapping[str, Array], layer: int, spool: Spool) -> tuple[Linear, Linear]:
    """gate|up and down of a layer's whole feed-forward part."""
    arch = manifest.architecture
    width = arch.intermediate
    blocks = [expert_weights(arch, tensors, layer, expert) for expert in range(arch.router.experts)]
    gates = [gate_up.take_rows(slice(0, width)) for gate_up, _ in blocks]
    ups = [gate_up.take_rows(slice(width, 2 * width)) for gate_up, _ in blocks]
    joined = linear.join_rows([*gates, *ups]), linear.join_columns([down for _, down in blocks])
    gate_up, down = (Linear({k: spool.keep(part) for k, part in both.parts.items()}) for both in joined)
    return gate_up, down
