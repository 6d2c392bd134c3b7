"""Judging answers with the weights on disk: in fp64, off the event loop.

Owns: which weights a verdict needs, and getting a shard that is not here, within bounds. Does not own: the verdict
(``core/verdict``), what follows from it (``audit``).

Fails with IntegrityError or LocalError where weights are not here or damaged; whoever judges then cannot tell.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dmoe.core import evidence, linear, wire
from dmoe.core.evidence import Asked, Evidence, Judgement
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.stageevidence import StageEvidence
from dmoe.core.verdict import Expert
from dmoe.runtime import expert_weights, merged, open_files
from dmoe.shardfile import ShardFile
from dmoe.stages.retrace import Layer, retrace
from dmoe.weights import layer_weights

VERDICT_ROWS_MAX, VERDICT_NUMBERS_MAX = 2048, 1 << 21
"""Of a sequence: what is longer is not judged (some 2 GiB of memory, minutes)."""
KEPT_MAX = 4
"""Groups of a layer whose weights stay mapped: they cost address space, hardly memory."""


class Shards(Protocol):
    """What is needed of :class:`dmoe.store.ModelStore`."""

    def manifest(self, model_id: str) -> Manifest: ...
    def has_shard(self, model_id: str, shard_id: str) -> bool: ...
    def open_shard(self, manifest: Manifest, shard: Shard) -> list[ShardFile]: ...


class Judging:
    """Verdicts with the shards of a store. Methods block: call them in a thread."""

    def __init__(self, store: Shards) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, int, int], Mapping[int, Expert]] = {}

    def has(self, manifest: Manifest, layer: int, groups: tuple[int, ...]) -> bool:
        """Whether the weights are here, whole and unaltered."""
        shards = (manifest.expert_shard(layer, group) for group in groups)
        return all(self._store.has_shard(manifest.model_id, shard.id) for shard in shards)

    def experts(self, manifest: Manifest, layer: int, group: int) -> Mapping[int, Expert]:
        """The weights of a sum group. Raises IntegrityError or LocalError if they are not here."""
        key = (manifest.model_id, layer, group)
        with self._lock:
            found = self._kept.get(key)
        if found is not None:
            return found
        shard = manifest.expert_shard(layer, group)
        tensors = merged(self._store.open_shard(manifest, shard))
        arch = manifest.architecture
        found = {expert: Expert(*expert_weights(arch, tensors, layer, expert)) for expert in shard.experts}
        with self._lock:
            self._kept[key] = found
            while len(self._kept) > KEPT_MAX:
                del self._kept[next(iter(self._kept))]
        return found

    def judge(self, found: Evidence | StageEvidence) -> Judgement:
        """The verdict on evidence whose receipt holds."""
        if isinstance(found, StageEvidence):
            return self.judge_stage(found)
        manifest = self._store.manifest(found.model_id.hex())
        return evidence.judge(found, manifest, lambda group: self.experts(manifest, found.layer, group))

    def worst(
        self, manifest: Manifest, layer: int, group: int, asked: Asked, answer: np.ndarray, rows: list[int]
    ) -> float:
        """The largest distance over its bound among some rows of a group's answer ``f32[N, H]``."""
        weights = self.experts(manifest, layer, group)
        return float(evidence.ratios(manifest, group, weights, asked, answer, rows).max(initial=0.0))

    def knows(self, manifest: Manifest, layer: int, group: int, device: str) -> bool:
        """Whether answers of a device class can be judged."""
        return evidence.is_known(device, self.experts(manifest, layer, group))

    # --- stages

    def has_stage(self, manifest: Manifest, stage: Shard) -> bool:
        """Whether a stage's weights are here, whole and unaltered."""
        return self._store.has_shard(manifest.model_id, stage.id)

    def knows_stage(self, manifest: Manifest, stage: Shard, device: str) -> bool:
        """Whether answers of a device class can be judged."""
        tensors, (first, last) = self._tensors(manifest, stage), stage.layers
        quantised = any(stage_layer(manifest, tensors, layer).has_codes() for layer in range(first, last + 1))
        return evidence.is_known_class(device, quantised=quantised)

    def stage_ratios(
        self, manifest: Manifest, stage: Shard, came: wire.FloatRows, went: wire.FloatRows, seed: bytes
    ) -> NDArray[np.float64]:
        """Distance over bound of every row of a sequence that a stage had from position 0 on; above 1 is guilty, 0
        where nobody can tell. ``seed`` makes the verdict the same wherever it is made. Minutes for a long sequence."""
        tensors = self._tensors(manifest, stage)
        random = np.random.default_rng(int.from_bytes(seed, "little"))
        made = retrace(manifest, stage.layers, lambda layer: stage_layer(manifest, tensors, layer), came, random)
        return made.ratios(went, manifest.wire_dtype)

    def judge_stage(self, found: StageEvidence) -> Judgement:
        """The verdict on evidence whose receipt holds."""
        manifest = self._store.manifest(found.model_id.hex())
        stage = found.stage(manifest)
        came, went = found.numbers(manifest)
        if found.rows > rows_max(manifest):
            return Judgement("cannot tell", f"{found.rows} rows are more than the {rows_max(manifest)} that are judged")
        if not self.knows_stage(manifest, stage, found.device):
            return Judgement("cannot tell", f"how machines of class {found.device or 'unknown'!r} round is not known")
        ratios = self.stage_ratios(manifest, stage, came, went, found.leaf_of(manifest))
        worst = float(ratios.max(initial=0.0))
        if worst > 1:
            where = f"{found.what}, position {int(ratios.argmax())}"
            why = f"{where} is {worst:.3g} times as far off as honest machines' answers may be"
            return Judgement("guilty", why, worst)
        why = f"every row that can be judged is as near as honest machines are (at most {worst:.2g} of the bound)"
        return Judgement("not guilty", why, worst)

    def _tensors(self, manifest: Manifest, stage: Shard) -> Mapping[str, np.ndarray]:
        return merged(open_files(manifest, self._store, [stage]))


def rows_max(manifest: Manifest) -> int:
    """Of how many positions a sequence may be that is judged."""
    return min(VERDICT_ROWS_MAX, VERDICT_NUMBERS_MAX // manifest.architecture.hidden)


def stage_layer(manifest: Manifest, tensors: Mapping[str, np.ndarray], layer: int) -> Layer:
    """A layer's weights as a verdict reads them."""
    arch = manifest.architecture
    trunk = layer_weights(arch, tensors, layer)
    numbers = range(arch.router.experts) if trunk.is_sparse else ()
    found = {expert: Expert(*expert_weights(arch, tensors, layer, expert)) for expert in numbers}
    if arch.router.kind == "all":
        found = {0: _joined([found[expert] for expert in sorted(found)], arch.intermediate)}
    return Layer(trunk, found)


def _joined(blocks: Sequence[Expert], width: int) -> Expert:
    """The neuron blocks of a dense layer as one feed-forward part, as a stage runs them."""
    gates = [block.gate_up.take_rows(slice(0, width)) for block in blocks]
    ups = [block.gate_up.take_rows(slice(width, 2 * width)) for block in blocks]
    return Expert(linear.join_rows([*gates, *ups]), linear.join_columns([block.down for block in blocks]))
