"""Expert shards of this process that are asked together: the neuron blocks of a layer run as one session.

Owns: which loaded shards share sessions, and those sessions. Does not own: a single expert (``dmoe/runtime``), queues
(``dmoe/batches``).

Where every row goes to every expert, a call asks all blocks of a layer that are here, and runs of a session that are
as short as a block's cost a third as much again. So the blocks of a layer become one graph: the same operators, with
rows of its own for each block. Which sum groups a node holds is decided by placement, and may change: then the
sessions are made anew, layer by layer.

Invariants:
1. A block's bits are those of its own session: nothing in the graph crosses from one block to another.
2. Weights are in memory once, but for one layer's while sessions are made.
3. Calls go on while sessions are made, on those there were.
4. Who asks for some blocks pays for those alone: the others get no rows.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from config.errors import RiosError
from dmoe.core.calls import Indices, Weights
from dmoe.core.manifest import Manifest, Shard
from dmoe.graphs import blocks_graph
from dmoe.loaded import Partials, Together
from dmoe.runtime import (
    Binding,
    ExpertShard,
    FloatRows,
    RuntimeOptions,
    ShardFiles,
    expert_weights,
    merged,
    open_session,
    release,
)
from dmoe.shardfile import ShardFile

log = logging.getLogger(__name__)

KEPT_MAX = 16
"""Choices of blocks whose bound memory is kept, per layer."""

_Kept = tuple[FloatRows, FloatRows, Binding]


class Joint:
    """Some experts of one layer in one session. Thread-safe."""

    def __init__(
        self, manifest: Manifest, tensors: Mapping[str, NDArray[Any]], layer: int, experts: Sequence[int]
    ) -> None:
        """Raises IntegrityError for weights that are not what they should be, LocalError if memory is short."""
        arch = manifest.architecture
        blocks = {expert: expert_weights(arch, tensors, layer, expert) for expert in experts}
        self._session = open_session(blocks_graph(blocks, arch.traits), threads=1)
        self._experts = tuple(experts)
        self._hidden = arch.hidden
        self._none = np.empty((0, arch.hidden), np.float32)
        self._kept: dict[tuple[int, ...], list[_Kept]] = {}

    def run(self, wanted: tuple[int, ...], h: FloatRows) -> FloatRows:
        """``f32[N, H] -> f32[wanted, N, H]``; the caller may write to it."""
        if len(h) != 1:
            h = np.ascontiguousarray(h, np.float32)
            out = np.empty((len(wanted), *h.shape), np.float32)
            self.bind(wanted, h, out).run()
            return out
        kept = self._kept.get(wanted)
        try:
            row, y, binding = (kept or []).pop()
        except IndexError:  # first use, or another thread is using the one there is
            row, y = (np.empty(shape, np.float32) for shape in ((1, self._hidden), (len(wanted), 1, self._hidden)))
            binding = self.bind(wanted, row, y)
        row[:] = h
        binding.run()
        result = y.copy()
        if kept is not None or len(self._kept) < KEPT_MAX:
            self._kept.setdefault(wanted, []).append((row, y, binding))
        return result

    def warm_up(self) -> None:
        """Run once."""
        self.run(self._experts, np.zeros((1, self._hidden), np.float32))

    def bind(self, wanted: Sequence[int], h: FloatRows, out: FloatRows) -> Binding:
        """What reads ``h f32[N, H]`` and writes ``out f32[wanted, N, H]`` when it is run, by one thread at a time."""
        ours = dict(zip(wanted, out, strict=True))
        assert len(ours) == len(wanted), "a block is asked once"
        asked = {f"h.{each}": h if each in ours else self._none for each in self._experts}
        return Binding(self._session, asked, {f"y.{each}": ours.get(each, self._none) for each in self._experts})


class Company:
    """The blocks of some layers of a model that are in this process."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._members: list[BlockShard] = []
        self._layers: dict[int, Joint] = {}
        self._lock = threading.Lock()
        self._is_stale = False

    def join(self, shard: "BlockShard") -> None:
        """Take a shard in; blocking. Raises what opening it raises, and then has not taken it."""
        with self._lock:
            self._members.append(shard)
            try:
                self._make()
            except BaseException:
                self._members.remove(shard)
                raise

    def leave(self, shard: "BlockShard") -> None:
        """It is not asked any more. Its memory goes with the last, or by :meth:`tidy`."""
        self._members.remove(shard)
        self._is_stale = True
        if not self._members:
            self._layers = {}

    def tidy(self) -> None:
        """Free what only those needed that have left; blocking. If that fails, it is tried again next time."""
        with self._lock:
            if self._is_stale and self._members:
                try:
                    self._make()
                except RiosError as error:
                    log.warning("memory of shards that have gone is not free yet: %s", error)

    def bind(self, layer: int, shards: Sequence["BlockShard"], h: FloatRows, out: FloatRows) -> Binding | None:
        """As :meth:`Joint.bind`, ``out f32[shards, N, H]`` their partial sums; None where blocks have to be added."""
        wanted = tuple(expert for shard in shards for expert in shard.experts)
        return self._layers[layer].bind(wanted, h, out) if len(wanted) == len(shards) else None

    def run(self, layer: int, shards: Sequence["BlockShard"], h: FloatRows) -> Partials:
        """The partial sum of each, ``f32[N, H]``."""
        wanted = tuple(expert for shard in shards for expert in shard.experts)
        found = self._layers[layer].run(wanted, h)
        if len(wanted) == len(shards):
            return found
        sums, first = [], 0
        for shard in shards:
            total, *others = found[first : first + len(shard.experts)]
            for other in others:  # in the order of the experts
                total += other
            sums.append(total)
            first += len(shard.experts)
        return sums

    def _make(self) -> None:
        """New sessions for the members there are, one layer after the other."""
        self._is_stale = False  # until somebody leaves, also meanwhile
        members = list(self._members)
        experts = sorted({expert for shard in members for expert in shard.experts})
        files = [file for shard in members for file in shard.files]
        try:
            for layer in self._manifest.layers_of(members[0].shard):
                joint = Joint(self._manifest, merged(files), layer, experts)
                joint.warm_up()
                self._layers[layer] = joint
                release(files)
        except BaseException:
            self._is_stale = True
            raise


class BlockShard:
    """A shard of neuron blocks in this process (:class:`dmoe.loaded.Together`): bit for bit what
    :class:`dmoe.runtime.ExpertShard` is; thread-safe."""

    def __init__(self, company: Company, manifest: Manifest, shard: Shard, files: ShardFiles) -> None:
        self.manifest, self.shard = manifest, shard
        self.ram_bytes = shard.ram_bytes
        self.experts = shard.experts
        self.files: Sequence[ShardFile] = files.open_shard(manifest, shard)
        self.place: object = company
        self.company = company
        company.join(self)

    def partial(
        self, layer: int, h: FloatRows, experts: Indices | None = None, weights: Weights | None = None
    ) -> FloatRows:
        """See :meth:`dmoe.runtime.ExpertShard.partial`."""
        assert experts is None
        found: FloatRows = self.company.run(layer, (self,), h)[0]
        return found

    def partials(
        self,
        shards: Sequence[Together],
        layer: int,
        h: FloatRows,
        experts: Indices | None = None,
        weights: Weights | None = None,
    ) -> Partials:
        """See :class:`dmoe.loaded.Together`."""
        assert experts is None
        return self.company.run(layer, cast("Sequence[BlockShard]", shards), h)  # nothing else has it for its place

    def close(self) -> None:
        """It is not asked any more."""
        self.company.leave(self)

    def tidy(self) -> None:
        """See :class:`dmoe.loaded.Together`."""
        self.company.tidy()


class Joints:
    """Opens the expert shards of a process."""

    def __init__(self, options: RuntimeOptions) -> None:
        self._options = options
        self._companies: dict[tuple[str, tuple[int, int]], Company] = {}

    def load(self, manifest: Manifest, shard: Shard, files: ShardFiles) -> ExpertShard | BlockShard:
        """Open an expert shard; blocking, one at a time. Raises IntegrityError for files that are not what they should
        be, LocalError if it cannot run here."""
        if manifest.architecture.router.kind != "all" or len(self._options.providers()) > 1:
            return ExpertShard(manifest, shard, files, self._options)
        company = self._companies.setdefault((manifest.model_id, shard.layers), Company(manifest))
        return BlockShard(company, manifest, shard, files)
