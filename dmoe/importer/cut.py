"""How a model is cut into files and shards.

Owns: which layers and experts share a file, the sum groups, which tensors a file holds. Does not own: where the numbers
come from (``sources``, ``folder``) or how they are written (``write``). Matrices are named here, not read: what a part
holds are :class:`Rows`, which the writer reads block by block.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.errors import ConfigError
from config.vocabulary import ShardId
from dmoe.core.linear import Linear
from dmoe.core.manifest import ModelFile, Quantisation, Shard
from dmoe.importer.model import Model
from dmoe.importer.rows import Rows, joined
from dmoe.importer.write import Entries

Array = NDArray[Any]

LAYERS_PER_SHARD_MAX = 10
GROUPS_MAX = 4
_ALL = slice(None)
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
        self.source = model.source
        self.quantisation = quantisation
        self.family = model.family
        self.arch = model.architecture
        sizes.check(self.arch.layers, self.arch.router.experts)
        self.groups = sizes.groups(self.arch.router.experts)
        spans = sizes.spans(self.arch.layers)
        self.stages = sizes.stages(spans)
        self.trunk = [Part("trunk/ends.safetensors", (0, -1), -1, holds_ends=True)]
        self.trunk += [Part(f"trunk/l{first:02d}-{last:02d}.safetensors", (first, last), -1) for first, last in spans]
        self.experts = [
            Part(f"experts/l{first:02d}-{last:02d}-g{group}.safetensors", (first, last), group)
            for first, last in spans
            for group in range(len(self.groups))
        ]

    @property
    def parts(self) -> list[Part]:
        """All files, in the order they are made."""
        return [*self.trunk, *self.experts]

    def entries(self, part: Part) -> Entries:
        """What a file holds. Raises IntegrityError naming a tensor that is missing or wrong."""
        return list(self._entries(part))

    def _entries(self, part: Part) -> Iterator[tuple[str, Rows | Array]]:
        if part.holds_ends:
            yield from self._ends()
        for layer in range(part.layers[0], part.layers[1] + 1):
            if part.group < 0:
                yield from self._attention(layer)
            else:
                for expert in self.groups[part.group]:
                    gate_up, down = self._expert(layer, expert)
                    yield f"layer.{layer}.expert.{expert}.gate_up", gate_up
                    yield f"layer.{layer}.expert.{expert}.down", down

    def _matrix(self, name: str, rows: int, columns: int, quantisation: Quantisation | None = None) -> Rows:
        """A matrix of the source in the wanted form."""
        return self._part(name, (rows, columns), slice(0, rows), _ALL, quantisation)

    def _part(
        self,
        name: str,
        shape: tuple[int, int],
        rows: slice,
        columns: slice,
        quantisation: Quantisation | None = None,
    ) -> Rows:
        """Some rows and columns of a matrix of ``shape``."""
        wanted = quantisation or self.quantisation

        def read(block: slice) -> Linear:
            inside = slice(rows.start + block.start, rows.start + block.stop)
            return self.source.linear(name, shape, wanted, (inside, columns))

        width = shape[1] if columns == _ALL else columns.stop - columns.start
        return Rows(rows.stop - rows.start, width, name, read)

    def _member(self, name: str, index: int, shape: tuple[int, int, int]) -> Rows:
        """Matrix ``index`` of a stack of ``shape``: one expert's."""
        return Rows(*shape[1:], name, lambda rows: self.source.linear_of(name, index, shape, self.quantisation, rows))

    def _ends(self) -> Iterator[tuple[str, Rows | Array]]:
        arch, family = self.arch, self.family
        yield "embed", self._matrix(family.embedding, arch.vocab, arch.hidden)
        if not arch.tie_embeddings:
            yield "head", self._matrix(family.head, arch.vocab, arch.hidden)
        yield "norm", self.source.vector(family.norm, arch.hidden)

    def _attention(self, layer: int) -> Iterator[tuple[str, Rows | Array]]:
        arch, family, prefix = self.arch, self.family, f"layer.{layer}"
        width, kv_width = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        yield f"{prefix}.norm_attention", self.source.vector(family.norm_attention.format(l=layer), arch.hidden)
        yield f"{prefix}.norm_experts", self.source.vector(family.norm_experts.format(l=layer), arch.hidden)
        rows = ((family.queries, width), (family.keys, kv_width), (family.values, kv_width))
        yield f"{prefix}.qkv", joined([self._matrix(name.format(l=layer), size, arch.hidden) for name, size in rows])
        yield f"{prefix}.output", self._matrix(family.output.format(l=layer), arch.hidden, width)
        if arch.router.kind != "all":
            router = self._matrix(family.router.format(l=layer), arch.router.experts, arch.hidden, "fp32")
            yield f"{prefix}.router", router

    def _expert(self, layer: int, expert: int) -> tuple[Rows, Rows]:
        """gate|up and down of an expert; of a dense model, of a block of neurons."""
        arch, family = self.arch, self.family
        width, hidden, count = arch.intermediate, arch.hidden, arch.router.experts
        if arch.router.kind == "all":
            block, every = slice(expert * width, (expert + 1) * width), slice(0, hidden)
            wide, tall = (count * width, hidden), (hidden, count * width)
            gate = self._part(family.gate.format(l=layer), wide, block, _ALL)
            up = self._part(family.up.format(l=layer), wide, block, _ALL)
            down = self._part(family.down.format(l=layer), tall, every, block)
        else:
            stack, stack_down = (count, width, hidden), (count, hidden, width)
            gate = self._member(family.gate_experts.format(l=layer), expert, stack)
            up = self._member(family.up_experts.format(l=layer), expert, stack)
            down = self._member(family.down_experts.format(l=layer), expert, stack_down)
        return joined([gate, up]), down

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
            flops_per_row=2 * arch.hidden * (arch.qkv_width + arch.heads * arch.head_dim),
            ram_bytes=sum(file.size_bytes for file in files) + arch.layers * _RUNTIME_OVERHEAD_BYTES,
            dtype=self.quantisation,
        )

    def expert_shard(self, part: Part, file: ModelFile, params: int) -> Shard:
        """The shard of one expert file."""
        first, last = part.layers
        experts = self.groups[part.group]
        sessions = len(experts) * (last - first + 1)
        return Shard(
            id=ShardId(f"expert-l{first:02d}-{last:02d}-g{part.group}"),
            kind="expert",
            layers=part.layers,
            group=part.group,
            experts=experts,
            files=(file,),
            params=params,
            flops_per_row=2 * 3 * len(experts) * self.arch.hidden * self.arch.intermediate,
            ram_bytes=file.size_bytes + sessions * _RUNTIME_OVERHEAD_BYTES,
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
            ram_bytes=sum(files[path].size_bytes for path in paths) + sessions * _RUNTIME_OVERHEAD_BYTES,
            dtype=self.quantisation,
        )
