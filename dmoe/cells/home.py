"""A stranger's model that this node answers with: its embedding, attention, head and layers run in a cell, too.

Owns: one such cell per publisher beside the one for shards that are served (its calls may take longer, and are nobody
else's), the forms in which a model is in it, its caches. Does not own: the rule (``cells``), what happens inside
(``homeprogram``), the layer loop around it (``dmoe/layers``).

Invariants:
1. The bits are those of the same model in this process.
2. A cache's length is counted here, and every run says where its rows belong: one that failed has changed nothing.
3. Caches of a process that ended are lost, and say so; whoever runs on them first waits until the next process is up,
   and begins them again (``dmoe/layers`` feeds what was in them).
4. What nobody refers to any more is freed in the cell.
5. What a cell says is checked: shapes by their places, numbers are finite, chosen experts exist.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from time import monotonic, sleep
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
import trio
from numpy.typing import NDArray

from config.errors import LocalError, RemoteError, RequestError
from config.vocabulary import MIB
from dmoe.cells import launch
from dmoe.cells.call import Answer
from dmoe.cells.cell import Cell, Counters
from dmoe.cells.content import SLACK_BYTES, Content, Store
from dmoe.cells.homeprogram import DONE, GATHER, OPEN, OUTPUTS, RUN, STEP, WANTS
from dmoe.cells.lanes import ParentLane
from dmoe.cells.link import START_SECONDS_MAX, Options
from dmoe.cells.shard import CellShard
from dmoe.cells.stage import CellStage
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.routing import ALL_EXPERTS, NOBODY, Routing
from dmoe.core.wire import FloatRows
from dmoe.kv import Cache
from dmoe.runner import Want
from dmoe.segment import INLINE_FLOPS_MAX, Experts, Part

Form = Literal["ends", "local", "fused", "attention"]
BOOT = launch.boot("dmoe.cells.homeprogram")
LANE_BYTES = 16 * MIB
CALL_SECONDS_MIN, CALL_SECONDS_MAX = 5.0, 600.0
FLOPS_PER_SECOND_MIN = 5e8
"""A machine that computes more slowly than this on top of the minimum is stuck."""
_PLACE_BYTES = 24
_POLL_SECONDS = 0.02
_DOWN = -1


@dataclass(frozen=True, slots=True, eq=False)
class ModelContent(Content):
    """A model in a cell in some form: the files of all its ``shards``."""

    form: Form = "ends"
    shards: tuple[Shard, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """See :class:`Content`."""
        files = {file.path: file.size_bytes for shard in self.shards for file in shard.files}
        return 2 * sum(files.values()) + 2 * sum(shard.ram_bytes for shard in self.shards) + SLACK_BYTES

    @property
    def has_caches(self) -> bool:
        """See :class:`Content`."""
        return self.form != "ends"

    @property
    def needs_spool(self) -> bool:
        """See :class:`Content`."""
        return self.form == "fused"


class Home:
    """The cell of one publisher's models that are answered with here. Blocking; its own cell is started when needed."""

    def __init__(self, name: str, store: Store, options: Options, counters: Counters) -> None:
        self.cell = Cell(
            name,
            Options(
                threads=options.threads,
                call_seconds_max=CALL_SECONDS_MAX,
                kv_bytes_max=options.kv_bytes_max,
                asked_bytes=LANE_BYTES,
                answer_bytes=LANE_BYTES,
                boot=BOOT,
                gvisor=options.gvisor,
            ),
            counters,
            on_withdrawn=None,
        )
        self._store = store
        self.cell.start()

    def ends(self, manifest: Manifest) -> "HomeEnds":
        """Embedding and head. Raises as :meth:`Cell.load`."""
        return HomeEnds(self.cell, manifest, self._load(manifest, "ends", (manifest.trunk,), manifest.trunk))

    def layers(self, manifest: Manifest, form: Literal["local", "fused"]) -> "HomeLayers":
        """All layers with their experts. Raises as :meth:`Cell.load`."""
        number = self._load(manifest, form, manifest.parts, manifest.trunk)
        flops = sum(shard.flops_per_row for shard in manifest.parts)
        return HomeLayers(self.cell, manifest, number, 0, manifest.architecture.layers - 1, flops)

    def attention(
        self, manifest: Manifest, experts: Experts, first: int = 0, last: int | None = None
    ) -> "HomeAttention":
        """Layers ``first`` to ``last``, their experts elsewhere. Raises as :meth:`Cell.load`."""
        last = manifest.architecture.layers - 1 if last is None else last
        span = msgspec.structs.replace(manifest.trunk, layers=(first, last))
        number = self._load(manifest, "attention", (manifest.trunk,), span)
        return HomeAttention(self.cell, manifest, number, first, last, manifest.trunk.flops_per_row, experts)

    def stage(self, manifest: Manifest, shard: Shard) -> CellStage:
        """A stage with its experts. Raises as :meth:`Cell.load`."""
        _wait_up(self.cell)
        return CellStage(self.cell, manifest, shard, self._store)

    def experts(self, manifest: Manifest, shard: Shard) -> CellShard:
        """An expert shard. Raises as :meth:`Cell.load`."""
        _wait_up(self.cell)
        return CellShard(self.cell, manifest, shard, self._store)

    def _load(self, manifest: Manifest, form: Form, shards: Sequence[Shard], shard: Shard) -> int:
        _wait_up(self.cell)

        def content(number: int, manifest: Manifest, shard: Shard, store: Store) -> Content:
            return ModelContent(number, manifest, shard, store, form, tuple(shards))

        return self.cell.load(manifest, shard, self._store, content)

    def close(self) -> None:
        """End the cell; waits for that."""
        self.cell.close()


class _Embedding:
    def __init__(self, gather: Callable[[NDArray[np.int64]], FloatRows]) -> None:
        self.gather = gather


class HomeEnds:
    """Embedding, last norm and head in a cell (:class:`dmoe.layers.AnyEnds`)."""

    def __init__(self, cell: Cell, manifest: Manifest, number: int) -> None:
        arch = manifest.architecture
        self.widths: dict[Want, int] = {"logits": arch.vocab, "hidden": arch.hidden}
        self.embedding = _Embedding(self._gather)
        self._cell, self._number, self._hidden = cell, number, arch.hidden
        self._flops_per_row = 2 * arch.vocab * arch.hidden
        weakref.finalize(self, cell.drop, number)

    def _gather(self, rows: NDArray[np.int64]) -> FloatRows:
        step = max(1, LANE_BYTES // (4 * self._hidden))
        found = [self._gathered(rows[start : start + step]) for start in range(0, len(rows), step)]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _gathered(self, rows: NDArray[np.int64]) -> FloatRows:
        _wait_up(self._cell)
        numbers = (self._number, GATHER, len(rows), 0, 0)
        with self._cell.ask(numbers, [np.asarray(rows, np.int64)], CALL_SECONDS_MIN) as lane:
            return lane.rows(len(rows), self._hidden)

    def outputs(self, rows: FloatRows, want: Want) -> FloatRows:
        """See :class:`dmoe.layers.Ends`. Raises RemoteError ``unavailable``."""
        width = self.widths[want]
        step = max(1, LANE_BYTES // (4 * max(width, self._hidden)))
        found = [self._some(rows[start : start + step], want, width) for start in range(0, len(rows), step)]
        return np.concatenate(found) if found else np.empty((0, width), np.float32)

    def _some(self, rows: FloatRows, want: Want, width: int) -> FloatRows:
        _wait_up(self._cell)
        numbers = (self._number, OUTPUTS, len(rows), self._hidden, WANTS.index(want))
        seconds = _seconds(len(rows) * self._flops_per_row)
        with self._cell.ask(numbers, [np.asarray(rows, np.float32)], seconds) as lane:
            return lane.rows(len(rows), width)

    def is_quick(self, rows: int) -> bool:
        """See :class:`dmoe.layers.Ends`."""
        return rows * self._flops_per_row <= INLINE_FLOPS_MAX


class HomeCache(Cache):
    """A sequence's cache in a cell. ``number`` names it there, never again another."""

    __slots__ = ("_counted", "_generation", "_layers", "number")

    def __init__(self, layers: "HomeLayers", number: int, capacity: int, length: int) -> None:
        self._layers: HomeLayers | None = layers
        self._generation = layers.generation
        self._counted = length
        self.number = number
        self.capacity = capacity

    @property
    def is_open(self) -> bool:
        """Whether it was not closed."""
        return self._layers is not None

    @property
    def is_lost(self) -> bool:
        """Whether the process that made it has ended."""
        return self._layers is not None and self._generation != self._layers.generation

    @property
    def length(self) -> int:
        """Positions in it; none if it is lost."""
        return 0 if self.is_lost else self._counted

    @length.setter
    def length(self, length: int) -> None:
        self._counted = length

    def truncate(self, length: int) -> None:
        """See :class:`dmoe.kv.Cache`."""
        self._counted = min(length, self._counted)

    def begin_again(self) -> None:
        """An empty one in the process that runs now. Blocking: waits for that. Raises RiosError."""
        if self._layers is not None:
            self.number, self._generation = self._layers.made(self.capacity)
            self._counted = 0

    def make_ready(self) -> None:
        """A lost one begins again, if whoever uses it knows that it is empty; else raises RemoteError. Blocking."""
        if self.is_lost:
            if self._counted:
                raise RemoteError("unavailable", "a cell ended, and its caches with it", "ask again")
            self.begin_again()

    def close(self) -> None:
        """See :class:`dmoe.kv.Cache`."""
        layers, self._layers = self._layers, None
        if layers is not None:
            layers.forget(self.number)


class HomeLayers:
    """Layers in a cell (:class:`dmoe.layers.AnySegment`)."""

    is_here = True

    def __init__(self, cell: Cell, manifest: Manifest, number: int, first: int, last: int, flops_per_row: int) -> None:
        self.first, self.last = first, last
        self._cell, self._manifest, self._number = cell, manifest, number
        self._hidden = manifest.architecture.hidden
        self._flops_per_row = flops_per_row
        self._numbers = count(1)
        self.close = weakref.finalize(self, cell.drop, number)

    @property
    def generation(self) -> int:
        """Of the cell's processes; none while none may be asked."""
        return self._cell.generation if self._cell.is_up else _DOWN

    async def open(self, capacity: int, like: Cache | None = None, length: int = 0) -> Cache:
        """See :class:`dmoe.segment.Segment`. Raises RemoteError ``unavailable`` if the cell is down."""
        assert like is None or isinstance(like, HomeCache)
        context = self._manifest.architecture.context
        if not 1 <= capacity <= context:
            message = f"{capacity} tokens do not fit the model's context of {context}"
            raise RequestError("context_length_exceeded", message)
        return await trio.to_thread.run_sync(self._open, capacity, like, length)

    def _open(self, capacity: int, like: HomeCache | None, length: int) -> HomeCache:
        _wait_up(self._cell)
        cache = HomeCache(self, next(self._numbers), capacity, length)
        if like is not None and (like.is_lost or like.length < length):
            raise RemoteError("unavailable", "what the answer would begin like is lost", "ask again")
        self._ask_open(cache.number, capacity, 0 if like is None else like.number, length)
        return cache

    def made(self, capacity: int) -> tuple[int, int]:
        """An empty cache in the process that runs, once one does: its number, and the process's. Raises RiosError."""
        _wait_up(self._cell)
        number, generation = next(self._numbers), self.generation
        self._ask_open(number, capacity, 0, 0)
        return number, generation

    def _ask_open(self, number: int, capacity: int, like: int, length: int) -> None:
        with self._cell.ask((self._number, OPEN, number, capacity, like, length), (), CALL_SECONDS_MIN):
            return

    async def run(self, x: FloatRows, parts: Sequence[Part]) -> FloatRows:
        """See :class:`dmoe.segment.Segment`."""
        return await trio.to_thread.run_sync(self.compute, x, parts)

    def compute(self, x: FloatRows, parts: Sequence[Part]) -> FloatRows:
        """See :class:`dmoe.segment.Segment`. Raises RemoteError ``unavailable`` if the cell is down, ends, does not
        answer in time, or has lost a cache."""
        self.make_ready(parts)
        answers = []
        for rows, places in self.pieces(parts):
            numbers = (self._number, RUN, len(places), rows.stop - rows.start, self._hidden)
            with self._cell.ask(numbers, [np.array(places, np.int64), _f32(x[rows])], self.seconds(rows)) as lane:
                answers.append(lane.rows(rows.stop - rows.start, self._hidden))
        return self.through(answers, parts)

    def make_ready(self, parts: Sequence[Part]) -> None:
        """See :meth:`HomeCache.make_ready`."""
        for part in parts:
            assert isinstance(part.cache, HomeCache)
            part.cache.make_ready()

    def through(self, answers: list[FloatRows], parts: Sequence[Part]) -> FloatRows:
        """The parts are in their caches."""
        for part in parts:
            part.cache.length += part.rows
        return answers[0] if len(answers) == 1 else np.concatenate(answers)

    def seconds(self, rows: slice) -> float:
        """A call's deadline."""
        return _seconds((rows.stop - rows.start) * self._flops_per_row)

    def pieces(self, parts: Sequence[Part]) -> Iterator[tuple[slice, list[tuple[int, int, int]]]]:
        """Rows that fit a lane both ways, and for each part in them its cache, position and rows."""
        router = self._manifest.architecture.router
        most = (LANE_BYTES - _PLACE_BYTES * len(parts)) // (4 * self._hidden + 8 * max(1, router.top_k))
        start = end = 0
        places: list[tuple[int, int, int]] = []
        for part in parts:
            assert isinstance(part.cache, HomeCache)
            done = 0
            while done < part.rows:
                if end - start == most:
                    yield slice(start, end), places
                    start, places = end, []
                rows = min(most - (end - start), part.rows - done)
                places.append((part.cache.number, part.cache.length + done, rows))
                end, done = end + rows, done + rows
        yield slice(start, end), places

    def forget(self, number: int) -> None:
        """Free a cache, soon; does not block."""
        self._cell.say({"do": "forget", "number": self._number, "cache": number})


class HomeAttention(HomeLayers):
    """Attention and router in a cell, experts wherever they are."""

    is_here = False

    def __init__(
        self,
        cell: Cell,
        manifest: Manifest,
        number: int,
        first: int,
        last: int,
        flops_per_row: int,
        experts: Experts,
    ) -> None:
        super().__init__(cell, manifest, number, first, last, flops_per_row)
        self._experts = experts
        self._sparse = [layer for layer in manifest.architecture.sparse_layers if first <= layer <= last]
        self._lock = trio.Lock()

    async def run(self, x: FloatRows, parts: Sequence[Part]) -> FloatRows:
        """See :class:`dmoe.segment.Segment`."""
        async with self._lock:
            if any(part.cache.is_lost for part in parts):
                await trio.to_thread.run_sync(self.make_ready, parts)
            answers = [await self._pass(x[rows], rows, places) for rows, places in self.pieces(parts)]
            return self.through(answers, parts)

    def compute(self, x: FloatRows, parts: Sequence[Part]) -> FloatRows:
        """Others are waited for: see :meth:`run`."""
        raise AssertionError("experts are elsewhere: use run")

    async def _pass(self, x: FloatRows, rows: slice, places: list[tuple[int, int, int]]) -> FloatRows:
        """Rows through all layers."""
        size = len(x)
        numbers: tuple[int, ...] = (self._number, RUN, len(places), size, self._hidden)
        parts: list[NDArray[Any]] = [np.array(places, np.int64), _f32(x)]
        for layer in self._sparse:
            h, routing = await self._ask(numbers, parts, rows, layer)
            parts = [_f32(await self._experts.run(layer, h, routing))]
            numbers = (self._number, STEP, size, self._hidden)
        out, _ = await self._ask(numbers, parts, rows, DONE)
        return out

    async def _ask(
        self, numbers: Sequence[int], parts: Sequence[NDArray[Any]], rows: slice, layer: int
    ) -> tuple[FloatRows, Routing]:
        """The next layer's input and routing, or what comes out behind the last."""
        size = rows.stop - rows.start
        if size * self._flops_per_row <= INLINE_FLOPS_MAX * max(1, len(self._sparse)):
            await trio.lowlevel.checkpoint()
            call = None
            if not self._cell.is_late:
                with suppress(RemoteError):  # a thread may wait for a way to it, or for the next process
                    call = self._cell.begin(numbers, parts, self.seconds(rows))
            if call is not None:
                return self._taken(await call.answer(), size, layer)
        return await trio.to_thread.run_sync(self._asked, numbers, parts, rows, layer)

    def _asked(
        self, numbers: Sequence[int], parts: Sequence[NDArray[Any]], rows: slice, layer: int
    ) -> tuple[FloatRows, Routing]:
        return self._taken(self._cell.ask(numbers, parts, self.seconds(rows)), rows.stop - rows.start, layer)

    def _taken(self, answer: Answer, size: int, layer: int) -> tuple[FloatRows, Routing]:
        with answer as lane:
            _, found = lane.outcome()
            if found != layer:
                raise RemoteError("integrity", f"the cell of {self._cell.name} is at layer {found}, not {layer}")
            return lane.rows(size, self._hidden), ALL_EXPERTS if layer == DONE else self._routing(lane, size)

    def _routing(self, lane: ParentLane, size: int) -> Routing:
        router = self._manifest.architecture.router
        if router.kind == "all":
            return ALL_EXPERTS
        at, places = 4 * size * self._hidden, size * router.top_k
        experts = np.frombuffer(lane.answer, np.int32, places, at).reshape(size, -1).copy()
        weights = np.frombuffer(lane.answer, np.float32, places, at + 4 * places).reshape(size, -1).copy()
        if (experts < NOBODY).any() or (experts >= router.experts).any() or not np.isfinite(weights).all():
            raise RemoteError("integrity", f"the cell of {self._cell.name} chose experts that do not exist")
        return Routing(experts, weights)


class Rule(Protocol):
    """Which models belong in a cell: :class:`dmoe.cells.cells.Cells`."""

    counters: Counters

    def fault(self, manifest: Manifest) -> LocalError | None:
        """Why a model may not run here."""

    def holds(self, manifest: Manifest) -> bool:
        """Whether a model runs in a cell. Raises LocalError if it may not run."""


class Homes:
    """The cells of all publishers whose models are answered with here. Methods may be called from any thread."""

    def __init__(self, rule: Rule, store: Store, options: Options) -> None:
        self._rule = rule
        self._store = store
        self._options = options
        self._homes: dict[str, Home] = {}
        self._lock = threading.Lock()
        self._closed = False

    def fault(self, manifest: Manifest) -> LocalError | None:
        """Why a model may not run here, or None."""
        return self._rule.fault(manifest)

    def home(self, manifest: Manifest) -> Home | None:
        """Where a model belongs; None: into this process. Raises LocalError: nowhere."""
        if not self._rule.holds(manifest):
            return None
        publisher = manifest.publisher
        with self._lock:
            if self._closed:
                raise LocalError("local", "this node is shutting down")
            if publisher not in self._homes:
                name = f"{publisher}, for answers of this node"
                self._homes[publisher] = Home(name, self._store, self._options, self._rule.counters)
            return self._homes[publisher]

    @property
    def cells(self) -> list[Cell]:
        """All of them."""
        return [home.cell for home in list(self._homes.values())]

    def close(self) -> None:
        """End every cell; waits for that."""
        with self._lock:
            self._closed = True
            homes, self._homes = list(self._homes.values()), {}
        for home in homes:
            home.cell.stop()
        for home in homes:
            home.close()


def _wait_up(cell: Cell) -> None:
    """Until a process runs, also a new one after the last has ended. Raises RiosError, on the event loop at once."""
    if trio.lowlevel.in_trio_run():
        return  # whoever asks is told
    end = monotonic() + START_SECONDS_MAX
    while not cell.is_up and monotonic() < end:
        sleep(_POLL_SECONDS)
    if not cell.is_up:
        cell.wait_up()  # it knows why


def _seconds(flops: int) -> float:
    return CALL_SECONDS_MIN + flops / FLOPS_PER_SECOND_MIN


def _f32(rows: FloatRows) -> FloatRows:
    return np.ascontiguousarray(rows, np.float32)
