"""What a cell runs: it puts up its walls, then loads the shards it is given and answers calls on them.

Owns: the inside of a cell. Does not own: when it starts and ends (``cell``).

Started by exec with nothing but three sockets' worth of descriptors: the control socket and, on it, everything else.
Its first word is which walls are in force; before that it has read nothing that a stranger made.

Invariants:
1. Everything is imported, and ONNX Runtime has run once, before the walls go up; nothing is opened after.
2. It ends when the parent does: by a signal, and by the end of the control socket.
3. Whatever a call raises is answered and ends nothing; what cannot be answered ends the cell.
"""

import mmap
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np
from msgspec.structs import replace

from config.errors import LocalError, RiosError
from dmoe.cells import sandbox
from dmoe.cells.lanes import ANSWERED, CellLane, lane_bytes
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.wire import FloatRows
from dmoe.joint import BlockShard, Joints
from dmoe.kv import Cache
from dmoe.pages import Ahead
from dmoe.runtime import ExpertShard, IntRows, RuntimeOptions, ShardFiles, smoke
from dmoe.segment import Part
from dmoe.shardfile import FixedSpool, ShardFile, Spool
from dmoe.stages.loading import load_stage

MESSAGE_BYTES_MAX = 64 << 10
READY_MAX = 512
"""Calls that are kept ready, per lane: what is kept of one are addresses, whatever its rows."""


class Inside(Protocol):
    """A shard in a cell."""

    def answer(self, lane: CellLane, numbers: Sequence[int], shards: Mapping[int, "Inside"]) -> None:
        """Answer the call whose numbers these are, behind its shard's. ``shards``: all of the cell."""

    def ready(
        self, lane: CellLane, numbers: Sequence[int], shards: Mapping[int, "Inside"]
    ) -> Callable[[], None] | None:
        """What answers every call with these numbers on this lane, in its place; None: :meth:`answer` does."""

    def close(self) -> None:
        """Free everything."""


@runtime_checkable
class Keeping(Protocol):
    """A shard with caches."""

    def forget(self, number: int) -> None:
        """Free a cache."""


class Files(ShardFiles, Protocol):
    """A shard's files, a place for weights that are joined out of them, and the shards that it may run with."""

    spool: Spool | None
    joints: Joints


_Ready = dict[tuple[int, ...], Callable[[], None]]
Opener = Callable[[Manifest, Shard, Files, RuntimeOptions], Inside]


class ExpertsInside:
    """An expert shard's calls: numbers are layer, rows, width, choices per row (0: no choice), how many other shards
    shall answer behind this one, and those."""

    def __init__(self, manifest: Manifest, shard: Shard, files: Files, _options: RuntimeOptions) -> None:
        self._shard = files.joints.load(manifest, shard, files)

    def answer(self, lane: CellLane, numbers: Sequence[int], shards: Mapping[int, Inside]) -> None:
        """See :class:`Inside`."""
        layer, rows, width, top_k, _ = numbers[:5]
        h = np.frombuffer(lane.asked, np.float32, rows * width).reshape(rows, width)
        experts: IntRows | None = None
        weights: FloatRows | None = None
        if top_k:
            experts = np.frombuffer(lane.asked, np.int32, rows * top_k, h.nbytes).reshape(rows, top_k)
            at = h.nbytes + experts.nbytes
            weights = np.frombuffer(lane.asked, np.float32, rows * top_k, at).reshape(rows, top_k)
        lane.give(*self._run(self._asked(numbers, shards), layer, h, experts, weights))

    def ready(self, lane: CellLane, numbers: Sequence[int], shards: Mapping[int, Inside]) -> Callable[[], None] | None:
        """See :class:`Inside`: blocks of one company compute from one place of the lane into the other."""
        layer, rows, width, top_k, _ = numbers[:5]
        if top_k or not isinstance(self._shard, BlockShard):
            return None
        company, asked = self._shard.company, self._asked(numbers, shards)
        blocks = [shard for shard in asked if isinstance(shard, BlockShard) and shard.company is company]
        if len(blocks) < len(asked):
            return None
        h = np.frombuffer(lane.asked, np.float32, rows * width).reshape(rows, width)
        out = np.frombuffer(lane.answer, np.float32, len(asked) * h.size).reshape(len(asked), rows, width)
        bound = company.bind(layer, blocks, h, out)
        return bound.run if bound is not None else None

    def _asked(self, numbers: Sequence[int], shards: Mapping[int, Inside]) -> list[ExpertShard | BlockShard]:
        others = (shards[number] for number in numbers[5 : 5 + numbers[4]])
        return [self._shard, *(other._shard for other in others if isinstance(other, ExpertsInside))]

    def _run(
        self,
        asked: Sequence[ExpertShard | BlockShard],
        layer: int,
        h: FloatRows,
        experts: IntRows | None,
        weights: FloatRows | None,
    ) -> Iterator[FloatRows]:
        for company, some in groupby(asked, key=lambda shard: getattr(shard, "company", None)):
            if company is None:
                yield from (shard.partial(layer, h, experts, weights) for shard in some)
            else:
                yield from company.run(layer, list(some), h)

    def close(self) -> None:
        """See :class:`Inside`."""
        self._shard.close()
        if isinstance(self._shard, BlockShard):
            self._shard.tidy()


OPEN, RUN = 1, 2
"""What a stage's call asks for."""


class StageInside:
    """A stage's calls, caches included. Numbers behind the first: :data:`OPEN` cache, capacity, the cache that it
    begins like (0: none), positions of that; :data:`RUN` parts, rows, width. In front of a run's rows stand, for each
    part, its cache, position and rows as i64."""

    def __init__(self, manifest: Manifest, shard: Shard, files: Files, options: RuntimeOptions) -> None:
        self._layers = load_stage(manifest, shard, files, options, files.spool)
        self._caches: dict[int, Cache] = {}
        self._lock = threading.Lock()

    def answer(self, lane: CellLane, numbers: Sequence[int], shards: Mapping[int, Inside]) -> None:
        """See :class:`Inside`."""
        with self._lock:
            if numbers[0] == OPEN:
                self._open(*numbers[1:5])
                lane.reply(ANSWERED)
            else:
                lane.give(self._run(lane, *numbers[1:4]))

    def _open(self, number: int, capacity: int, like: int, length: int) -> None:
        pool = self._layers.opened.pool
        self._caches[number] = pool.open(capacity, self._caches[like] if like else None, length)

    def _run(self, lane: CellLane, count: int, rows: int, width: int) -> FloatRows:
        places = np.frombuffer(lane.asked, np.int64, 3 * count).reshape(count, 3).tolist()
        x = np.frombuffer(lane.asked, np.float32, rows * width, 24 * count).reshape(rows, width)
        parts = []
        for number, position, length in places:
            cache = self._caches[number]
            cache.truncate(position)
            parts.append(Part(cache, length))
        return self._layers.opened.compute(x, parts)

    def ready(self, lane: CellLane, numbers: Sequence[int], shards: Mapping[int, Inside]) -> Callable[[], None] | None:
        """See :class:`Inside`: every run is another's."""
        return None

    def forget(self, number: int) -> None:
        """Free a cache."""
        with self._lock:
            if (cache := self._caches.pop(number, None)) is not None:
                cache.close()

    def close(self) -> None:
        """See :class:`Inside`."""
        with self._lock:
            self._layers.close()
            self._caches.clear()


class _Received:
    """Files that came as open descriptors (:class:`Files`)."""

    def __init__(self, joints: Joints) -> None:
        self.spool: Spool | None = None
        self.joints = joints
        self._files: dict[str, ShardFile] = {}

    def add(self, path: str, descriptor: int, size: int) -> None:
        try:
            self._files[path] = ShardFile(Path(path), descriptor, size)
        finally:
            os.close(descriptor)

    def add_spool(self, descriptor: int, size: int) -> None:
        try:
            self.spool = FixedSpool(descriptor, size)
        finally:
            os.close(descriptor)

    def open_shard(self, manifest: Manifest, shard: Shard) -> list[ShardFile]:
        files = [self._files[file.path] for file in shard.files]
        for file in files:
            file.check_numbers()
        return files


class Program:
    """The shards of this cell. ``openers``: how each kind of shard is opened."""

    def __init__(
        self, control: socket.socket, openers: Mapping[str, Opener], options: RuntimeOptions, pages: Ahead
    ) -> None:
        self._control = control
        self._pages = pages
        self._openers = openers
        self._options = options
        self._shards: dict[int, Inside] = {}
        self._ready: list[_Ready] = []
        self._changes = 0
        self._joints = Joints(options)
        self._received = _Received(self._joints)

    def run(self) -> None:
        """Obey the parent until it is gone."""
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE_BYTES_MAX, 2)
            if not data:
                return
            message = msgspec.json.decode(data)
            try:
                self._obey(message, descriptors)
                answer: dict[str, Any] = {"ok": True}
            except RiosError as error:
                answer = {"error": error.message, "kind": type(error).__name__}
            except MemoryError:
                answer = {"error": "its memory limit was reached", "kind": "LocalError"}
            except Exception as error:  # noqa: BLE001 - said to the parent, which decides
                answer = {"error": f"{type(error).__name__}: {error}"[:500], "kind": "LocalError"}
            self._control.send(msgspec.json.encode(answer))

    def _obey(self, message: dict[str, Any], descriptors: list[int]) -> None:
        match message["do"]:
            case "file":
                self._received.add(message["path"], descriptors[0], message["size"])
            case "spool":
                self._received.add_spool(descriptors[0], message["size"])
            case "load":
                try:
                    text = mmap.mmap(descriptors[0], message["size"], access=mmap.ACCESS_READ)
                finally:
                    os.close(descriptors[0])
                manifest = msgspec.json.decode(bytes(text), type=Manifest)
                received, self._received = self._received, _Received(self._joints)
                shard = replace(manifest.shards[message["shard"]], layers=tuple(message["layers"]))
                opener = self._openers[message["form"]]
                self._shards[message["number"]] = opener(manifest, shard, received, self._options)
                self._forget_ready()
                self._pages.use_huge_pages()
            case "drop":
                if (shard_inside := self._shards.pop(message["number"], None)) is not None:
                    shard_inside.close()
                    self._forget_ready()
            case "forget":
                stage = self._shards.get(message["number"])
                if isinstance(stage, Keeping):
                    stage.forget(message["cache"])

    def serve(self, lane: CellLane) -> None:
        """Answer the calls of a lane until the parent hangs up."""
        ready: _Ready = {}
        self._ready.append(ready)
        while (numbers := lane.wait()) is not None:
            try:
                run = ready.get(numbers) or self._make_ready(lane, numbers, ready)
                if run is None:
                    self._shards[numbers[0]].answer(lane, numbers[1:], self._shards)
                else:
                    run()
                    lane.reply(ANSWERED)
            except Exception as error:  # noqa: BLE001 - said to the parent, which decides
                lane.fail(f"{type(error).__name__}: {error}")

    def _make_ready(self, lane: CellLane, numbers: tuple[int, ...], ready: _Ready) -> Callable[[], None] | None:
        changes = self._changes
        run = self._shards[numbers[0]].ready(lane, numbers[1:], self._shards)
        if run is not None and changes == self._changes:
            if len(ready) >= READY_MAX:
                ready.clear()
            ready[numbers] = run
        return run

    def _forget_ready(self) -> None:
        """Shards have come or gone: what was bound to them would keep their memory."""
        self._changes += 1
        for ready in self._ready:
            ready.clear()


OPENERS: Mapping[str, Opener] = {"expert": ExpertsInside, "stage": StageInside}


def main(arguments: Sequence[str], openers: Mapping[str, Opener] = OPENERS) -> None:
    """Run a cell. ``arguments``: the control socket's descriptor, the parent's process id, compute threads, lanes and
    the bytes of their two places."""
    number, parent, threads, count, asked, answer = map(int, arguments)
    control = socket.socket(fileno=number)
    options = RuntimeOptions(device="cpu", threads=threads)
    try:
        smoke(options)
        memory, bells = _lanes(control, count, lane_bytes(asked, answer) * count)
        pages = Ahead()
        kept = [] if pages.descriptor is None else [pages.descriptor]
        walls = sandbox.enter([number, *kept, *(bell.fileno() for bell in bells)])
        if os.getppid() not in (parent, 0):  # 0: it is outside, in other numbers
            return
        first = {"ok": True, "walls": [asdict(wall) for wall in walls]}
    except RiosError as error:
        control.send(msgspec.json.encode({"error": str(error), "kind": type(error).__name__}))
        return
    control.send(msgspec.json.encode(first))
    program = Program(control, openers, options, pages)
    for index, bell in enumerate(bells):
        lane = CellLane(memory, index * lane_bytes(asked, answer), asked, answer, bell)
        threading.Thread(target=program.serve, args=[lane], daemon=True).start()
    program.run()
    os._exit(0)


def _lanes(control: socket.socket, count: int, size: int) -> tuple[mmap.mmap, list[socket.socket]]:
    """The memory of the lanes and their bells: the first things that the parent sends."""
    _, descriptors, _, _ = socket.recv_fds(control, MESSAGE_BYTES_MAX, count + 1)
    if len(descriptors) != count + 1:
        raise LocalError("local", f"a cell got {len(descriptors)} descriptors instead of {count + 1}")
    memory = mmap.mmap(descriptors[0], size)
    os.close(descriptors[0])
    return memory, [socket.socket(fileno=descriptor) for descriptor in descriptors[1:]]


if __name__ == "__main__":
    main(sys.argv[1:])
