"""Evidence: an answer that a worker signed for, with all that is needed to judge it.

Owns: the form of evidence, and the verdict on it given the weights. Does not own: weights (``dmoe/judging``), the check
of the receipt (the ledger, behind :class:`dmoe.ports.Notary`), what follows.

The model's id is a hash of the manifest that its publisher signed; so it fixes weights, shapes and dtypes, and no
further signature is needed here.

Invariants:
1. The leaf is computed from the bytes that are judged, never taken from the file.
2. Evidence has one encoding; everything in it is bounded before it is used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from config.errors import IntegrityError
from config.vocabulary import MIB
from dmoe.core import calls, verdict, wire
from dmoe.core.calls import Bytes
from dmoe.core.manifest import Manifest
from dmoe.core.verdict import Expert
from p2p.core import codec

VERSION = 1
EVIDENCE_BYTES_MAX = 64 * MIB
ROWS_AT_ONCE = 8
"""Rows judged together: the weights are read once for them, and a guilty row ends it."""

Outcome = Literal["guilty", "not guilty", "cannot tell"]
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Large = Annotated[bytes, Meta(max_length=EVIDENCE_BYTES_MAX)]


class Evidence(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """``asked``, ``answered``: buffers as they travelled, ``*_bf16`` the bitmaps of their headers. ``receipt``: the
    body that ``worker`` signed; ``path``: from the leaf to its root."""

    version: int
    worker: Annotated[str, Meta(max_length=128)]
    model_id: Hash
    layer: Annotated[int, Meta(ge=0, le=calls.LAYERS_MAX)]
    groups: Annotated[tuple[int, ...], Meta(min_length=1, max_length=calls.GROUPS_MAX)]
    rows: Annotated[int, Meta(ge=1, le=wire.ROWS_MAX)]
    device: Annotated[str, Meta(max_length=calls.DEVICE_MAX)]
    asked: Annotated[tuple[Large, ...], Meta(min_length=1, max_length=3)]
    asked_bf16: Large
    answered: Large
    answered_bf16: Large
    receipt: Annotated[bytes, Meta(max_length=4096)]
    signature: Annotated[bytes, Meta(max_length=64)]
    index: Annotated[int, Meta(ge=0, le=1 << 16)]
    path: Annotated[tuple[Hash, ...], Meta(max_length=16)]

    @property
    def leaf(self) -> bytes:
        """What the worker signed for, if the evidence is true."""
        asked, answered = Bytes(self.asked, self.asked_bf16), Bytes((self.answered,), self.answered_bf16)
        model_id = self.model_id.hex()
        return calls.leaf(model_id, self.layer, self.groups, self.rows, self.device, asked, answered)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What became of evidence; ``worst``: the largest distance over its bound (above 1: guilty)."""

    outcome: Outcome
    why: str
    worst: float = 0.0


def read(data: bytes) -> Evidence:
    """Evidence from its bytes. Raises IntegrityError if they are malformed or of another version."""
    found = codec.decode(Evidence, data, bytes_max=EVIDENCE_BYTES_MAX)
    if found.version != VERSION:
        raise IntegrityError("integrity", f"evidence of version {found.version}; {VERSION} is known here")
    return found


def write(evidence: Evidence) -> bytes:
    """Its bytes."""
    return codec.encode(evidence)


def judge(evidence: Evidence, manifest: Manifest, experts: Callable[[int], Mapping[int, Expert]]) -> Judgement:
    """The verdict on what the evidence says (its receipt is checked elsewhere). ``experts``: a sum group's weights.

    Blocking: minutes for many rows of a large model. Raises IntegrityError if it says nothing that could be judged.
    """
    layer, groups = evidence.layer, evidence.groups
    asked = numbers_of(Bytes(evidence.asked, evidence.asked_bf16), evidence.rows, manifest)
    if layer not in manifest.architecture.sparse_layers or not set(groups) <= set(range(len(manifest.sum_groups))):
        raise IntegrityError("integrity", f"layer {layer}, groups {list(groups)[:8]}: not in the model")
    answered = Bytes((evidence.answered,), evidence.answered_bf16)
    answer = answer_of(answered, len(evidence.groups), evidence.rows, manifest)
    worst, where = 0.0, ""
    for place, group in enumerate(evidence.groups):
        weights = experts(group)
        if not is_known(evidence.device, weights):
            kind = evidence.device or "unknown"
            return Judgement("cannot tell", f"how machines of class {kind!r} round is not known")
        for first in range(0, evidence.rows, ROWS_AT_ONCE):
            part = slice(first, first + ROWS_AT_ONCE)
            ratio = ratios(manifest, group, weights, asked, answer[place], part)
            if ratio.max(initial=0.0) > worst:
                worst = float(ratio.max())
                where = f"layer {evidence.layer}, group {group}, row {first + int(ratio.argmax())}"
            if worst > 1:
                why = f"{where} is {worst:.3g} times as far off as an honest machine's answer may be"
                return Judgement("guilty", why, worst)
    why = f"every row is as near as honest machines are (at most {worst:.2g} of the bound)"
    return Judgement("not guilty", why, worst)


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What was asked, as numbers."""

    rows: wire.FloatRows
    experts: calls.Indices | None
    weights: calls.Weights | None

    def part(self, rows: slice | list[int]) -> "Asked":
        """Some of the rows."""
        if self.experts is None or self.weights is None:
            return Asked(self.rows[rows], None, None)
        return Asked(self.rows[rows], self.experts[rows], self.weights[rows])


def ratios(
    manifest: Manifest,
    group: int,
    weights: Mapping[int, Expert],
    asked: Asked,
    answer: wire.FloatRows,
    part: slice | list[int],
) -> verdict.Exact:
    """Distance over bound of some rows of one group's ``answer f32[N, H]``."""
    some, traits = asked.part(part), manifest.architecture.traits
    members = manifest.sum_groups[group]
    honest = verdict.recompute(weights, members, traits, some.rows, some.experts, some.weights)
    return verdict.judge(answer[part], honest, manifest.wire_dtype).ratio


def is_known(device: str, weights: Mapping[int, Expert]) -> bool:
    """Whether it is known how honest machines of a class compute: sums of floats on any CPU, quantised products as
    ONNX Runtime multiplies them on x86-64. GPUs may shorten floats (TF32)."""
    quantised = any(layer.bits for expert in weights.values() for layer in (expert.gate_up, expert.down))
    return is_known_class(device, quantised=quantised)


def is_known_class(device: str, *, quantised: bool) -> bool:
    """The same of weights that are known to be quantised or not."""
    machine, _, provider = device.rpartition("-")
    return provider == "cpu" and (machine == "x86_64" or not quantised)


def _shape(manifest: Manifest, rows: int, bf16: bytes) -> dict[str, object]:
    header: dict[str, object] = {"shape": [rows, manifest.architecture.hidden]}
    if manifest.wire_dtype != "fp16":
        header["dtype"] = manifest.wire_dtype
    if bf16:
        header["bf16"] = bf16
    return header


def numbers_of(asked: Bytes, rows: int, manifest: Manifest) -> Asked:
    """A request's bytes as numbers. Raises IntegrityError if they are malformed."""
    top_k = 0 if manifest.architecture.router.kind == "all" else manifest.architecture.router.top_k
    if len(asked.buffers) != (3 if top_k else 1):
        raise IntegrityError("integrity", f"the request has {len(asked.buffers)} buffers")
    h = wire.decode(_shape(manifest, rows, asked.bf16), asked.buffers[0])
    if not top_k:
        return Asked(h, None, None)
    sizes = [len(buffer) for buffer in asked.buffers[1:]]
    if sizes != [rows * top_k * 4] * 2:
        raise IntegrityError("integrity", f"the routing has {sizes} bytes instead of {rows} x {top_k} numbers")
    experts = np.frombuffer(asked.buffers[1], "<i4").reshape(rows, top_k)
    weights = np.frombuffer(asked.buffers[2], "<f4").reshape(rows, top_k)
    if not wire.is_finite(weights):
        raise IntegrityError("integrity", "the routing holds a weight that is not finite")
    return Asked(h, experts, weights)


def answer_of(answered: Bytes, groups: int, rows: int, manifest: Manifest) -> wire.FloatRows:
    """An answer's bytes as ``f32[G, N, H]``. Raises IntegrityError if they are malformed."""
    found = wire.decode(_shape(manifest, groups * rows, answered.bf16), answered.buffers[0])
    return found.reshape(groups, rows, manifest.architecture.hidden)
