"""How a model is cut into files and shards.

Owns: which layers and experts share a file, the sum groups. Does not own: which tensors a layer has (``tensors``) or
how they are written (``write``). Matrices are named here, not read: what a part holds is read block by block.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from config.errors import ConfigError
from config.vocabulary import ShardId
from dmoe.core.manifest import ModelFile, Quantisation, Shard
from dmoe.importer.model import Model
from dmoe.importer.tensors import Entry, Tensors
from dmoe.importer.write import Entries

LAYERS_PER_SHARD_MAX = 10
GROUPS_MAX = 4
_RUNTIME_OVERHEAD_BYTES = 200_000
"""Memory of one ONNX Runtime session beside its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How finely a model is cut; 0: as usual. A shard is a sum group, so ``experts_per_shard`` fixes the groups."""

    experts_per_shard: int = 0
    layers_per_shard: int = 0
    layers_per_stage: int = 0
    """A multiple of ``layers_per_shard``, because a stage lists whole files."""

    def check(self, layers: int, experts: int) -> None:
        """Raise ConfigError unless a model of so many layers and experts can be cut so."""
        limits = {"experts_per_shard": experts, "layers_per_shard": layers, "layers_per_stage": layers}
        for name, most in limits.items():
            value = getattr(self, name)
            option = "--" + name.replace("_", "-")
            if not 0 <= value <= most:
                raise ConfigError("usage", f"{option} {value} is not within 1..{most}", f"this model has {most}")
        stage, shard = self.layers_per_stage, self.layers_per_shard
        if stage and shard and stage % shard and stage < layers:
            fault = f"--layers-per-stage {stage} is no multiple of --layers-per-shard {shard}"
            raise ConfigError("usage", fault, "a stage is made of whole shards: choose a multiple, or leave one away")

    def spans(self, layers: int) -> list[tuple[int, int]]:
        """First and last layer of every file."""
        usual = -(-layers // -(-layers // LAYERS_PER_SHARD_MAX))
        size = self.layers_per_shard or self.layers_per_stage or usual
        return [(first, min(first + size, layers) - 1) for first in range(0, layers, size)]

    def stages(self, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """First and last layer of every stage."""
        size = self.layers_per_stage or spans[0][1] + 1
        count = max(1, -(-size // (spans[0][1] + 1)))
        return [(part[0][0], part[-1][1]) for part in (spans[at : at + count] for at in range(0, len(spans), count))]

    def groups(self, experts: int) -> tuple[tuple[int, ...], ...]:
        """The experts of every sum group."""
        if size := self.experts_per_shard:
            return tuple(tuple(range(at, min(at + size, experts))) for at in range(0, experts, size))
        parts = np.array_split(np.arange(experts), min(GROUPS_MAX, experts))
        return tuple(tuple(int(expert) for expert in part) for part in parts)


AS_USUAL = Sizes()


@dataclass(frozen=True, slots=True)
class Part:
    """A file to be made and what it holds."""

    path: str
    layers: tuple[int, int]
    group: int
    holds_ends: bool = False


class Cut:
    """A model cut into parts: its trunk files, and its expert files of one sum group each."""

    def __init__(self, model: Model, quantisation: Quantisation, sizes: Sizes) -> None:
        self.tensors = Tensors(model, quantisation)
        self.quantisation = quantisation
        self.arch = model.architecture
        sizes.check(self.arch.layers, self.arch.router.experts)
        self.groups = sizes.groups(self.arch.router.experts)
        spans = sizes.spans(self.arch.layers)
        self.stages = sizes.stages(spans)
        self.widened: Mapping[str, int] = {}
        """By path, what a file's weights take in memory beside its size; known once the entries are."""
        self.trunk = [Part("trunk/ends.safetensors", (0, -1), -1, holds_ends=True)]
        self.trunk += [Part(f"trunk/l{first:02d}-{last:02d}.safetensors", (first, last), -1) for first, last in spans]
        self.experts = [
            Part(f"experts/l{first:02d}-{last:02d}-g{group}.safetensors", (first, last), group)
            for first, last in spans
            if any(first <= layer <= last for layer in self.arch.sparse_layers)
            for group in range(len(self.groups))
        ]

    @property
    def parts(self) -> list[Part]:
        """All files, in the order they are made."""
        return [*self.trunk, *self.experts]

    def entries(self, part: Part) -> Entries:
        """What a file holds. Raises IntegrityError naming a tensor that is missing or wrong."""
        return list(self._entries(part))

    def _entries(self, part: Part) -> Iterator[Entry]:
        if part.holds_ends:
            yield from self.tensors.ends()
        for layer in range(part.layers[0], part.layers[1] + 1):
            if part.group < 0:
                yield from self.tensors.trunk(layer)
            elif layer in self.arch.sparse_layers:
                for expert in self.groups[part.group]:
                    yield from self.tensors.expert(layer, expert)

    def check_all_used(self) -> None:
        """Once all entries are known: refuse a source that holds what no file would."""
        self.tensors.check_all_used()

    def trunk_shard(self, files: list[ModelFile], params: int) -> Shard:
        """The trunk over its files."""
        arch = self.arch
        return Shard(
            id=ShardId("trunk"),
            kind="trunk",
            layers=(0, arch.layers - 1),
            group=-1,
            experts=(),
            files=tuple(files),
            params=params,
            flops_per_row=2 * sum(map(arch.trunk_weights, range(arch.layers))) // arch.layers,
            ram_bytes=self._ram(files) + arch.layers * _RUNTIME_OVERHEAD_BYTES,
            dtype=self.quantisation,
        )

    def _ram(self, files: Iterable[ModelFile]) -> int:
        return sum(file.size_bytes + self.widened.get(file.path, 0) for file in files)

    def expert_shard(self, part: Part, file: ModelFile, params: int) -> Shard:
        """The shard of one expert file."""
        first, last = part.layers
        experts = self.groups[part.group]
        sessions = len(experts) * sum(first <= layer <= last for layer in self.arch.sparse_layers)
        return Shard(
            id=ShardId(f"expert-l{first:02d}-{last:02d}-g{part.group}"),
            kind="expert",
            layers=part.layers,
            group=part.group,
            experts=experts,
            files=(file,),
            params=params,
            flops_per_row=2 * 3 * len(experts) * self.arch.hidden * self.arch.intermediate,
            ram_bytes=self._ram([file]) + sessions * _RUNTIME_OVERHEAD_BYTES,
            dtype=self.quantisation,
        )

    def stage_shards(self, files: Mapping[str, ModelFile], params: Mapping[str, int]) -> list[Shard]:
        """Spans of layers once more as stages, over the files they have already."""
        return [self._stage_shard(layers, files, params) for layers in self.stages]

    def _stage_shard(self, layers: tuple[int, int], files: Mapping[str, ModelFile], params: Mapping[str, int]) -> Shard:
        arch, router, (first, last) = self.arch, self.arch.router, layers
        span, dense = range(first, last + 1), router.kind == "all"
        parts = (*self.trunk, *self.experts)
        paths = [p.path for p in parts if not p.holds_ends and first <= p.layers[0] and p.layers[1] <= last]
        sparse = sum(layer in arch.sparse_layers for layer in span)
        weights = sum(map(arch.trunk_weights, span)) + sparse * 3 * router.top_k * arch.hidden * arch.intermediate
        sessions = len(span) + (0 if dense else sparse * router.experts)
        return Shard(
            id=ShardId(f"stage-l{first:02d}-{last:02d}"),
            kind="stage",
            layers=layers,
            group=-1,
            experts=tuple(range(router.experts)),
            files=tuple(files[path] for path in paths),
            params=sum(params[path] for path in paths),
            flops_per_row=2 * weights,
            ram_bytes=self._ram([files[path] for path in paths]) + sessions * _RUNTIME_OVERHEAD_BYTES,
            dtype=self.quantisation,
        )
