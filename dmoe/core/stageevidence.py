"""Evidence about a stage: all rows of a sequence that a host had and what it made of them, with its signature.

Owns: the form of this evidence. Does not own: the verdict (``stages/retrace``), the check of the receipt (the ledger),
what follows.

Invariants (with those of ``core/evidence``):
1. The leaf is computed from the rows that are judged: other rows, another order, another stage give another leaf.
2. Nothing of any other sequence is in it, whatever ran beside this one.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from config.errors import IntegrityError
from dmoe.core import calls, history, stagecalls, wire
from dmoe.core.evidence import EVIDENCE_BYTES_MAX, Hash, Large
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.stagecalls import Part
from dmoe.core.wire import FloatRows
from p2p.core import codec

VERSION = 2
Count = Annotated[int, Meta(ge=0, le=stagecalls.POSITIONS_MAX)]


class StageEvidence(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """``part``: position, rows and outputs of the run that was signed for. ``came``, ``went``: the rows of all
    positions as they travelled, ``*_bf16`` the bitmaps of their headers. ``receipt``, ``index``, ``path`` as in
    evidence about experts."""

    version: int
    worker: Annotated[str, Meta(max_length=128)]
    model_id: Hash
    layers: tuple[Count, Count]
    part: tuple[Count, Count, Count]
    device: Annotated[str, Meta(max_length=calls.DEVICE_MAX)]
    came: Large
    came_bf16: Large
    went: Large
    went_bf16: Large
    receipt: Annotated[bytes, Meta(max_length=4096)]
    signature: Annotated[bytes, Meta(max_length=64)]
    index: Annotated[int, Meta(ge=0, le=1 << 16)]
    path: Annotated[tuple[Hash, ...], Meta(max_length=16)]

    @property
    def rows(self) -> int:
        """Positions of the sequence."""
        position, rows, _ = self.part
        return position + rows

    @property
    def what(self) -> str:
        """What it is about, for people."""
        return f"layers {self.layers[0]} to {self.layers[1]}"

    def numbers(self, manifest: Manifest) -> tuple[FloatRows, FloatRows]:
        """What came and what went, ``f32[N, H]`` each. Raises IntegrityError if they are malformed."""
        return tuple(  # type: ignore[return-value]
            wire.decode(_shape(manifest, self.rows, bitmap), rows)
            for rows, bitmap in ((self.came, self.came_bf16), (self.went, self.went_bf16))
        )

    def leaf_of(self, manifest: Manifest) -> bytes:
        """What the worker signed for, if the evidence is true. Raises IntegrityError if rows are malformed."""
        came, went = (history.digest(rows) for rows in self.numbers(manifest))
        return stagecalls.leaf(self.model_id.hex(), self.layers, Part(b"", *self.part), self.device, came, went)

    def stage(self, manifest: Manifest) -> Shard:
        """The stage it is about. Raises IntegrityError if the model has none over these layers."""
        for stage in manifest.stages:
            if stage.layers == self.layers:
                return stage
        raise IntegrityError("integrity", f"{manifest.name} has no stage over {self.what}")


def read(data: bytes) -> StageEvidence:
    """Evidence from its bytes. Raises IntegrityError if they are malformed or say what cannot be."""
    found = codec.decode(StageEvidence, data, bytes_max=EVIDENCE_BYTES_MAX)
    if found.version != VERSION:
        raise IntegrityError("integrity", f"evidence about a stage of version {found.version}; {VERSION} is known here")
    if not 1 <= found.rows <= wire.ROWS_MAX or not found.part[1] or found.part[2] > found.part[1]:
        raise IntegrityError("integrity", f"evidence about a run of {list(found.part)} rows")
    return found


def write(found: StageEvidence) -> bytes:
    """Its bytes."""
    return codec.encode(found)


def is_stage(data: bytes) -> bool:
    """Whether bytes are meant as evidence about a stage: their version says so."""
    return len(data) > 1 and data[0] == 0x90 | len(StageEvidence.__struct_fields__) and data[1] == VERSION


def _shape(manifest: Manifest, rows: int, bf16: bytes) -> dict[str, object]:
    shape: dict[str, object] = {"shape": [rows, manifest.architecture.hidden]}
    if manifest.wire_dtype != "fp16":
        shape["dtype"] = manifest.wire_dtype
    if bf16:
        shape["bf16"] = bf16
    return shape
