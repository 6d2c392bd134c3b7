"""What a model's layers are made of, tensor by tensor: our name, and the rows of the source that become it.

Owns: which tensors an architecture has and how a source's become ours (joined, split, turned). Does not own: which
file they go to (``cut``), how a source is read (``sources``, ``folder``), what a family calls them (``families``,
``architectures``).

Matrices are :class:`Rows`, read block by block by whoever writes them.
Invariant: a source's tensor that nothing was made of is an error (:meth:`Tensors.check_all_used`): what is left out
silently makes a wrong model.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.errors import IntegrityError
from dmoe.core.linear import Linear
from dmoe.core.manifest import Quantisation
from dmoe.core.variant import Latent
from dmoe.importer.folder import FolderSource
from dmoe.importer.model import Model
from dmoe.importer.quantise import convert
from dmoe.importer.rows import Rows, joined

Array = NDArray[Any]
Entry = tuple[str, Rows | Array]

_ALL = slice(None)
_NUMBER = re.compile(r"\.(\d{1,6})\.")
"""A layer's or an expert's number in a tensor's name."""
_NEEDLESS = re.compile(r".*\.rotary_emb\.inv_freq|rope_freqs\.weight|lm_head\.weight|output\.weight")
"""Follows from the configuration, or became part of it; a head beside tied embeddings is the embedding again."""


class Tensors:
    """A source's tensors as ours, in the wanted form. ``used``: what of the source something was made of."""

    def __init__(self, model: Model, quantisation: Quantisation) -> None:
        self.source = model.source
        self.family = model.family
        self.arch = model.architecture
        self.traits = model.architecture.traits
        self.drafts = model.drafts
        self.quantisation = quantisation
        self.used: set[str] = set()

    def ends(self) -> Iterator[Entry]:
        """Embedding, head and last norm."""
        arch, family = self.arch, self.family
        # 4 bits for the vocabulary would cost more of the text's quality than all layers together
        wanted: Quantisation = "int8" if self.quantisation == "int4" else self.quantisation
        yield "embed", self._matrix(family.embedding, arch.vocab, arch.hidden, None, wanted)
        if not arch.tie_embeddings:
            yield "head", self._matrix(family.head, arch.vocab, arch.hidden, None, wanted)
        yield "norm", self._vector(family.norm, arch.hidden)

    def trunk(self, layer: int) -> Iterator[Entry]:
        """A layer's share of the trunk."""
        arch, family, prefix = self.arch, self.family, f"layer.{layer}"
        yield f"{prefix}.norm_attention", self._vector(family.norm_attention, arch.hidden, layer)
        yield f"{prefix}.norm_experts", self._vector(family.norm_experts, arch.hidden, layer)
        for name, entry in self._latent(layer, self.traits.latent) if self.traits.latent else self._attention(layer):
            yield f"{prefix}.{name}", entry
        yield f"{prefix}.output", self._matrix(family.output, arch.hidden, arch.output_width, layer)
        if self.traits.output_bias:
            yield f"{prefix}.output.bias", self._vector(family.output_bias, arch.hidden, layer)
        for name, entry in self._feed_forward(layer):
            yield f"{prefix}.{name}", entry

    def expert(self, layer: int, expert: int) -> Iterator[Entry]:
        """gate|up and down of an expert; of a dense model, of a block of neurons."""
        prefix = f"layer.{layer}.expert.{expert}"
        gate_up, down = self._block(layer, expert) if self.arch.router.kind == "all" else self._member(layer, expert)
        yield f"{prefix}.gate_up", gate_up
        yield f"{prefix}.down", down
        if self.traits.expert_bias:
            wide, narrow = self._biases(layer, expert)
            yield f"{prefix}.gate_up.bias", wide
            yield f"{prefix}.down.bias", narrow

    def check_all_used(self) -> None:
        """Refuse a source that holds more than was asked for. Raises IntegrityError naming a tensor."""
        patterns = {_NUMBER.sub("..", name) for name in self.used}
        for name in self.source.names():
            if name in self.used or _NEEDLESS.fullmatch(name) or self._predicts(name):
                continue
            known = _NUMBER.sub("..", name) in patterns
            fault = "is beyond what its configuration counts" if known else "is not part of a supported model"
            raise IntegrityError("integrity", f"{self.source.path}: tensor {name[:80]!r} {fault}")

    def _predicts(self, name: str) -> bool:
        """A layer behind the last one only drafts further tokens (DeepSeek-V3): the model is whole without it."""
        number = _NUMBER.search(name)
        return self.drafts and number is not None and int(number[1]) == self.arch.layers

    # --- parts of a layer

    def _attention(self, layer: int) -> Iterator[Entry]:
        arch, family, traits = self.arch, self.family, self.traits
        width, kv_width = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        rows = ((family.queries, width), (family.keys, kv_width), (family.values, kv_width))
        yield "qkv", joined([self._matrix(name, size, arch.hidden, layer) for name, size in rows])
        if traits.qkv_bias:
            biases = ((family.queries_bias, width), (family.keys_bias, kv_width), (family.values_bias, kv_width))
            yield "qkv.bias", np.concatenate([self._vector(name, size, layer) for name, size in biases])
        if traits.qk_norm != "none":
            whole = traits.qk_norm == "whole"
            yield "query_norm", self._vector(family.query_norm, width if whole else arch.head_dim, layer)
            yield "key_norm", self._vector(family.key_norm, kv_width if whole else arch.head_dim, layer)
        if traits.sinks:
            yield "sinks", self._vector(family.sinks, arch.heads, layer)

    def _latent(self, layer: int, latent: Latent) -> Iterator[Entry]:
        arch, family, queries = self.arch, self.family, self.arch.heads * self.arch.head_dim
        if latent.query_rank:
            yield "query_down", self._matrix(family.query_down, latent.query_rank, arch.hidden, layer)
            yield "query_norm", self._vector(family.query_down_norm, latent.query_rank, layer)
            yield "query", self._matrix(family.query_up, queries, latent.query_rank, layer)
        else:
            yield "query", self._matrix(family.queries, queries, arch.hidden, layer)
        yield "latent_down", self._matrix(family.latent_down, latent.width, arch.hidden, layer)
        yield "latent_norm", self._vector(family.latent_norm, latent.rank, layer)
        yield "key_up", self._key_up(layer, latent)
        yield "value_up", self._value_up(layer, latent)

    def _key_up(self, layer: int, latent: Latent) -> Rows:
        """``[heads * rank, plain]``: per head, from a query without position to what it looks for in latents. The
        source has the way back, from latents to keys."""
        if self.source.has(self.family.key_up.format(l=layer)):
            return self._matrix(self.family.key_up, self.arch.heads * latent.rank, latent.plain, layer)
        name, shape = self._name(self.family.latent_up, layer), self._up_shape(latent)

        def read(rows: slice) -> Linear:
            first, last = rows.start // latent.rank, -(-rows.stop // latent.rank)
            heads = []
            for head in range(first, last):
                start = head * (latent.plain + latent.value)
                keys = self.source.linear(name, shape, "fp32", (slice(start, start + latent.plain), _ALL))
                heads.append(keys.dequantised().T)
            found = np.concatenate(heads)[rows.start - first * latent.rank : rows.stop - first * latent.rank]
            return convert(Linear({"w": np.ascontiguousarray(found)}), self.quantisation)

        return Rows(self.arch.heads * latent.rank, latent.plain, name, read)

    def _value_up(self, layer: int, latent: Latent) -> Rows:
        """``[heads * value, rank]``: per head, from latents to values."""
        if self.source.has(self.family.value_up.format(l=layer)):
            return self._matrix(self.family.value_up, self.arch.heads * latent.value, latent.rank, layer)
        heads, size = range(self.arch.heads), latent.plain + latent.value
        shape = self._up_shape(latent)
        parts = [slice(head * size + latent.plain, (head + 1) * size) for head in heads]
        return joined([self._part(self.family.latent_up, shape, part, _ALL, layer) for part in parts])

    def _up_shape(self, latent: Latent) -> tuple[int, int]:
        return self.arch.heads * (latent.plain + latent.value), latent.rank

    def _feed_forward(self, layer: int) -> Iterator[Entry]:
        """What of a layer's feed-forward part belongs to the trunk."""
        arch, family, traits = self.arch, self.family, self.traits
        if layer in traits.dense_layers:
            yield from self._own("ffn", (family.gate, family.up, family.down), traits.dense_intermediate, layer)
            return
        if traits.shared_intermediate:
            names = (family.shared_gate, family.shared_up, family.shared_down)
            yield from self._own("shared", names, traits.shared_intermediate, layer)
        if traits.shared_gate:
            yield "shared.gate", self._matrix(family.shared_gate_weight, 1, arch.hidden, layer, "fp32")
        if arch.router.kind != "all":
            yield "router", self._matrix(family.router, arch.router.experts, arch.hidden, layer, "fp32")
        if traits.router_bias:
            yield "router.bias", self._vector(family.router_bias, arch.router.experts, layer)

    def _own(self, kind: str, names: tuple[str, str, str], width: int, layer: int) -> Iterator[Entry]:
        gate, up, down = names
        wide = [self._matrix(name, width, self.arch.hidden, layer) for name in (gate, up)]
        yield f"{kind}.gate_up", joined(wide)
        yield f"{kind}.down", self._matrix(down, self.arch.hidden, width, layer)

    def _block(self, layer: int, block: int) -> tuple[Rows, Rows]:
        arch, family = self.arch, self.family
        width, hidden, count = arch.intermediate, arch.hidden, arch.router.experts
        inside, every = slice(block * width, (block + 1) * width), slice(0, hidden)
        wide, tall = (count * width, hidden), (hidden, count * width)
        gate = self._part(family.gate, wide, inside, _ALL, layer)
        up = self._part(family.up, wide, inside, _ALL, layer)
        return joined([gate, up]), self._part(family.down, tall, every, inside, layer)

    def _member(self, layer: int, expert: int) -> tuple[Rows, Rows]:
        arch, family = self.arch, self.family
        width, hidden = arch.intermediate, arch.hidden
        if family.in_turns:
            turns = np.arange(2 * width).reshape(width, 2).T.ravel()  # gates, then ups
            gate_up = self._turned(family.gate_up_experts, layer, expert, turns, hidden)
            return gate_up, self._turned(family.down_experts, layer, expert, np.arange(hidden), width)
        down = self._stacked(family.down_experts, layer, expert, hidden, width)
        if family.gate_up_experts:
            return self._stacked(family.gate_up_experts, layer, expert, 2 * width, hidden), down
        both = [self._stacked(name, layer, expert, width, hidden) for name in (family.gate_experts, family.up_experts)]
        return joined(both), down

    def _biases(self, layer: int, expert: int) -> tuple[Array, Array]:
        arch, family = self.arch, self.family
        down = self._row(family.down_experts_bias, layer, expert, arch.hidden)
        if family.gate_up_experts_bias:
            both = self._row(family.gate_up_experts_bias, layer, expert, 2 * arch.intermediate)
            return np.concatenate([both[0::2], both[1::2]]), down
        parts = (family.gate_experts_bias, family.up_experts_bias)
        return np.concatenate([self._row(name, layer, expert, arch.intermediate) for name in parts]), down

    # --- reading

    def _name(self, pattern: str, layer: int | None, expert: int | None = None) -> str:
        """A source's name of a tensor, noted as used."""
        name = pattern.format(l=layer)
        self.used.add(name.replace("{e}", str(expert)))
        return name

    def _vector(self, pattern: str, size: int, layer: int | None = None) -> Array:
        return self.source.vector(self._name(pattern, layer), size)

    def _matrix(
        self,
        pattern: str,
        rows: int,
        columns: int,
        layer: int | None = None,
        quantisation: Quantisation | None = None,
    ) -> Rows:
        """A matrix of the source in the wanted form."""
        return self._part(pattern, (rows, columns), slice(0, rows), _ALL, layer, quantisation)

    def _part(
        self,
        pattern: str,
        shape: tuple[int, int],
        rows: slice,
        columns: slice,
        layer: int | None,
        quantisation: Quantisation | None = None,
    ) -> Rows:
        """Some rows and columns of a matrix of ``shape``."""
        name, wanted = self._name(pattern, layer), quantisation or self.quantisation

        def read(block: slice) -> Linear:
            inside = slice(rows.start + block.start, rows.start + block.stop)
            return self.source.linear(name, shape, wanted, (inside, columns))

        width = shape[1] if columns == _ALL else columns.stop - columns.start
        return Rows(rows.stop - rows.start, width, name, read)

    def _row(self, pattern: str, layer: int, expert: int, size: int) -> Array:
        """One expert's row of a matrix."""
        shape, name = (self.arch.router.experts, size), self._name(pattern, layer)
        found: Array = self.source.linear(name, shape, "fp32", (slice(expert, expert + 1), _ALL)).dequantised()[0]
        return found

    def _turned(self, pattern: str, layer: int, expert: int, order: Array, columns: int) -> Rows:
        """One expert's matrix of a transposed stack, its rows in another order."""
        source, name, stack = self.source, self._name(pattern, layer), (self.arch.router.experts, len(order), columns)
        assert isinstance(source, FolderSource), "only this layout turns matrices"
        self.used.update(source.names_of(name))
        return Rows(
            len(order),
            columns,
            name,
            lambda part: source.turned_of(name, expert, stack, self.quantisation, order[part]),
        )

    def _stacked(self, pattern: str, layer: int, expert: int, rows: int, columns: int) -> Rows:
        """One expert's matrix, of a stack or of its own name."""
        name, stack = self._name(pattern, layer, expert), (self.arch.router.experts, rows, columns)
        return Rows(
            rows, columns, name, lambda part: self.source.linear_of(name, expert, stack, self.quantisation, part)
        )
