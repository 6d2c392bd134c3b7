"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) as a graph: all heads read one latent per position.

Owns: the operators between the normed hidden state and the heads' outputs. Does not own: the attention operator's batch
and cache (``dmoe/attention``), the rest of a layer (``dmoe/graphs``).

The matrices that make keys and values of a latent are applied to the query and to the result instead ("absorbed"), so
a position costs ``rank + rope`` floats of cache for all heads, and the operator is grouped-query attention with one
key/value head whose key and value are the same memory: a latent behind its norm, and a turned key of ``rope`` numbers.
Of what comes out only the latent's part is used.

Invariants (with those of ``dmoe/attention``):
1. A row's query and latent depend on that row and its position alone: they are made row by row, before the batch.
2. Each head's matrices are a linear layer of their own, so every form of weights can hold them.
"""

import numpy as np

from dmoe.core.architecture import Architecture
from dmoe.core.linear import Linear
from dmoe.operators import CONTRIB, Builder, i64, linear
from dmoe.weights import LatentWeights

NORM_EPS = 1e-6
"""Of the latents' norms, whatever the model's other norms have."""


def latent_rows(builder: Builder, arch: Architecture, p: str, layer: LatentWeights, h: str) -> tuple[str, str]:
    """``h f32[N, H]`` -> queries ``f32[N, heads * (rank + rope)]`` and latents ``f32[N, rank + rope]``."""
    latent = arch.traits.latent
    assert latent is not None
    queries = h
    if layer.query_down is not None and layer.query_norm is not None:
        low = linear(builder, h, f"{p}query_down", layer.query_down, f"{p}query.low")
        queries = _norm(builder, low, builder.weight(f"{p}query_norm", layer.query_norm), f"{p}query.normed")
    wide = linear(builder, queries, f"{p}query", layer.query, f"{p}query.wide")
    per_head = builder.op("Reshape", [wide, builder.constant(i64(0, arch.heads, -1))], [f"{p}query.heads"])
    plain, turning = _split(builder, per_head, (latent.plain, latent.rope), f"{p}query")
    down = linear(builder, h, f"{p}latent_down", layer.latent_down, f"{p}latent.down")
    raw, key = _split(builder, down, (latent.rank, latent.rope), f"{p}latent")
    normed = _norm(builder, raw, builder.weight(f"{p}latent_norm", layer.latent_norm), f"{p}latent.normed")
    turned = _turned(builder, arch, p, turning, key)
    sought = _per_head(builder, f"{p}key_up", plain, layer.key_up, arch.heads)
    pairs = [name for head in range(arch.heads) for name in (sought[head], turned[head])]
    both = builder.op("Concat", pairs, [f"{p}query.absorbed"], axis=-1)
    return both, builder.op("Concat", [normed, turned[-1]], [f"{p}latent.rows"], axis=-1)


def latent_values(builder: Builder, arch: Architecture, p: str, layer: LatentWeights, rows: str) -> str:
    """The operator's result ``f32[N, heads * (rank + rope)]`` -> ``f32[N, heads * value]``."""
    latent = arch.traits.latent
    assert latent is not None
    per_head = builder.op("Reshape", [rows, builder.constant(i64(0, arch.heads, -1))], [f"{p}found.heads"])
    found, _ = _split(builder, per_head, (latent.rank, latent.rope), f"{p}found")
    values = _per_head(builder, f"{p}value_up", found, layer.value_up, arch.heads)
    return builder.op("Concat", values, [f"{p}values"], axis=-1)


def _turned(builder: Builder, arch: Architecture, p: str, queries: str, key: str) -> list[str]:
    """Queries ``f32[N, heads, rope]`` and the key ``f32[N, rope]`` turned to their positions: a name per head, the
    key's last."""
    count = arch.heads + 1
    flat = builder.op("Reshape", [queries, builder.constant(i64(0, -1))], [f"{p}turning.flat"])
    both = builder.op("Concat", [flat, key], [f"{p}turning"], axis=-1)
    one = builder.op("Unsqueeze", [both, builder.constant(i64(0))], [f"{p}turning.batch"])
    turned = builder.op(
        "RotaryEmbedding",
        [one, "positions", "rope_cos", "rope_sin"],
        [f"{p}turned.batch"],
        domain=CONTRIB,
        interleaved=int(arch.rope_interleaved),
        num_heads=count,
    )
    rows = builder.op("Squeeze", [turned, builder.constant(i64(0))], [f"{p}turned"])
    names = [f"{p}turned.{head}" for head in range(count)]
    builder.op("Split", [rows], names, axis=-1, num_outputs=count)
    return names


def _per_head(builder: Builder, name: str, x: str, layer: Linear, heads: int) -> list[str]:
    """``x f32[N, heads, K]``, each head through its own share of ``layer``'s rows."""
    flat = builder.op("Reshape", [x, builder.constant(i64(0, -1))], [f"{name}.flat"])
    parts = [f"{name}.in.{head}" for head in range(heads)]
    builder.op("Split", [flat], parts, axis=-1, num_outputs=heads)
    rows, found = layer.rows // heads, []
    for head, part in enumerate(parts):
        own = _contiguous(layer.take_rows(slice(head * rows, (head + 1) * rows)))
        found.append(linear(builder, part, f"{name}.{head}", own, f"{name}.out.{head}"))
    return found


def _contiguous(layer: Linear) -> Linear:
    return Linear({suffix: np.ascontiguousarray(part) for suffix, part in layer.parts.items()})


def _split(builder: Builder, x: str, sizes: tuple[int, int], name: str) -> tuple[str, str]:
    first, second = f"{name}.first", f"{name}.second"
    builder.op("Split", [x, builder.constant(i64(*sizes))], [first, second], axis=-1)
    return first, second


def _norm(builder: Builder, x: str, weight: str, out: str) -> str:
    return builder.op("SimplifiedLayerNormalization", [x, weight], [out], axis=-1, epsilon=NORM_EPS, stash_type=1)
