"""What a cell runs for a model that its own node answers with: embedding and head, all layers, or attention alone.

Owns: the forms in which a model is loaded here, and their calls. Does not own: the program around them (``program``),
the other side (``home``).

Every form is made of all files of its shards, and computes with the classes that a node without cells uses: the bits
are the same.
"""

import threading
from collections import deque
from collections.abc import Generator, Mapping, Sequence

import numpy as np

from dmoe.cells import program
from dmoe.cells.lanes import ANSWERED, CellLane
from dmoe.cells.program import Files, Inside
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.routing import Routing
from dmoe.core.wire import FloatRows
from dmoe.kv import Cache
from dmoe.layers import Ends, local_experts
from dmoe.runner import Want
from dmoe.runtime import IntRows, RuntimeOptions, ShardFiles, open_files
from dmoe.segment import Experts, FusedSegment, Part, Pieces, PieceSegment, Segment

GATHER, OUTPUTS = 1, 2
"""What :class:`EndsInside` is asked for."""
OPEN, RUN, STEP = 1, 2, 3
"""What :class:`LayersInside` is asked for."""
WANTS: tuple[Want, ...] = ("logits", "hidden")
DONE = -1
"""In place of a layer: a pass is through."""


class EndsInside:
    """Calls of embedding and head. Numbers: :data:`GATHER` and how many token ids (i64); :data:`OUTPUTS`, rows, width,
    and which of :data:`WANTS`."""

    def __init__(self, manifest: Manifest, shard: Shard, files: ShardFiles, options: RuntimeOptions) -> None:
        self._ends = Ends(manifest, open_files(manifest, files, [manifest.trunk]), options)
        self._lock = threading.Lock()

    def answer(self, lane: CellLane, numbers: Sequence[int], shards: Mapping[int, Inside]) -> None:
        """See :class:`dmoe.cells.program.Inside`."""
        what, count, width, want = numbers[:4]
        with self._lock:
            if what == GATHER:
                lane.give(self._ends.embedding.gather(np.frombuffer(lane.asked, np.int64, count)))
            else:
                rows = np.frombuffer(lane.asked, np.float32, count * width).reshape(count, width)
                lane.give(self._ends.outputs(rows, WANTS[want]))

    def ready(self, lane: CellLane, numbers: Sequence[int], shards: Mapping[int, Inside]) -> None:
        """See :class:`dmoe.cells.program.Inside`."""

    def close(self) -> None:
        """See :class:`dmoe.cells.program.Inside`."""


class LayersInside:
    """Calls of layers, caches included. Numbers: :data:`OPEN` cache, capacity, the cache that it begins like (0: none),
    positions of that; :data:`RUN` parts, rows, width; in front of a run's rows stand, for each part, its cache,
    position and rows as i64. Where experts are elsewhere, the answer to RUN is the first sparse layer's: how it is
    called, its input and the router's choice; :data:`STEP` rows, width brings the experts' sum and gets the next."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._caches: dict[int, Cache] = {}
        self._forgotten: deque[int] = deque()
        self._steps: Generator[tuple[int, FloatRows, Routing], FloatRows, FloatRows] | None = None
        self._lock = threading.Lock()

    def answer(self, lane: CellLane, numbers: Sequence[int], shards: Mapping[int, Inside]) -> None:
        """See :class:`dmoe.cells.program.Inside`."""
        with self._lock:
            if numbers[0] == STEP:
                _, rows, width = numbers[:3]
                self._step(lane, np.frombuffer(lane.asked, np.float32, rows * width).reshape(rows, width))
                return
            self._leave()
            self._tidy()
            if numbers[0] == OPEN:
                self._open(*numbers[1:5])
                lane.reply(ANSWERED)
            else:
                self._run(lane, *numbers[1:4])

    def _open(self, number: int, capacity: int, like: int, length: int) -> None:
        self._caches[number] = self._segment.pool.open(capacity, self._caches[like] if like else None, length)

    def _run(self, lane: CellLane, count: int, rows: int, width: int) -> None:
        places = np.frombuffer(lane.asked, np.int64, 3 * count).reshape(count, 3).tolist()
        x = np.frombuffer(lane.asked, np.float32, rows * width, 24 * count).reshape(rows, width)
        parts = []
        for number, position, length in places:
            cache = self._caches[number]
            cache.truncate(position)
            parts.append(Part(cache, length))
        if isinstance(self._segment, PieceSegment) and not self._segment.is_here:
            self._steps = self._segment.steps(x, parts)
            self._step(lane, None)
        else:
            _reply(lane, DONE, self._segment.compute(x, parts))

    def _step(self, lane: CellLane, sums: FloatRows | None) -> None:
        assert self._steps is not None, "no pass is under way"
        try:
            layer, h, routing = next(self._steps) if sums is None else self._steps.send(sums)
        except StopIteration as end:
            self._steps = None
            _reply(lane, DONE, end.value)
        else:
            _reply(lane, layer, h, routing)

    def _leave(self) -> None:
        """A pass that was given up changes nothing."""
        steps, self._steps = self._steps, None
        if steps is not None:
            steps.close()

    def forget(self, number: int) -> None:
        """Free a cache, at the latest when the pass that is under way has ended: the parent does not wait for that."""
        self._forgotten.append(number)
        if self._lock.acquire(blocking=False):
            try:
                self._tidy()
            finally:
                self._lock.release()

    def _tidy(self) -> None:
        while self._forgotten:
            if (cache := self._caches.pop(self._forgotten.popleft(), None)) is not None:
                cache.close()

    def ready(self, lane: CellLane, numbers: Sequence[int], shards: Mapping[int, Inside]) -> None:
        """See :class:`dmoe.cells.program.Inside`."""

    def close(self) -> None:
        """See :class:`dmoe.cells.program.Inside`."""
        with self._lock:
            self._leave()
            self._caches.clear()


def _reply(lane: CellLane, layer: int, rows: FloatRows, routing: Routing | None = None) -> None:
    end = 0
    parts: list[FloatRows | IntRows] = [rows]
    if routing is not None and routing.experts is not None and routing.weights is not None:
        parts += [routing.experts, routing.weights]
    for part in parts:
        begin, end = end, end + part.nbytes
        np.frombuffer(lane.answer, part.dtype, part.size, begin)[:] = part.reshape(-1)
    lane.reply(ANSWERED, layer)


def _local(manifest: Manifest, shard: Shard, files: Files, options: RuntimeOptions) -> Inside:
    pieces = Pieces(manifest, open_files(manifest, files, [manifest.trunk]), options)
    return LayersInside(PieceSegment(manifest, pieces, local_experts(manifest, files, options)))


def _fused(manifest: Manifest, shard: Shard, files: Files, options: RuntimeOptions) -> Inside:
    opened = open_files(manifest, files, manifest.parts)
    return LayersInside(FusedSegment(manifest, opened, options, spool=files.spool))


def _attention(manifest: Manifest, shard: Shard, files: Files, options: RuntimeOptions) -> Inside:
    """Of the span of ``shard``'s layers."""
    pieces = Pieces(manifest, open_files(manifest, files, [manifest.trunk]), options, *shard.layers)
    return LayersInside(PieceSegment(manifest, pieces, _Elsewhere()))


class _Elsewhere(Experts):
    """Who has the experts asks for the layers one by one."""

    async def run(self, layer: int, h: FloatRows, routing: Routing) -> FloatRows:
        raise AssertionError("a cell asks nobody")


OPENERS: Mapping[str, program.Opener] = {
    **program.OPENERS,
    "ends": EndsInside,
    "local": _local,
    "fused": _fused,
    "attention": _attention,
}


def main(arguments: Sequence[str]) -> None:
    """Run a cell that knows these forms, too."""
    program.main(arguments, OPENERS)
