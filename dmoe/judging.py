"""Judging answers with the weights on disk: in fp64, off the event loop.

Owns: which weights a verdict needs, and getting a shard that is not here, within bounds. Does not own: the verdict
(``core/verdict``), what follows from it (``audit``).

Fails with IntegrityError or LocalError where weights are not here or damaged; whoever judges then cannot tell.
"""

import threading
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from dmoe.core import evidence
from dmoe.core.evidence import Asked, Evidence, Judgement
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.verdict import Expert
from dmoe.runtime import expert_weights, merged
from dmoe.shardfile import ShardFile

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

    def judge(self, found: Evidence) -> Judgement:
        """The verdict on evidence whose receipt holds."""
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
