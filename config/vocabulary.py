"""Ids, units and small types shared by every package.

Owns names only: nothing here does I/O or depends on another package.
"""

from dataclasses import dataclass
from typing import NewType

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58 (``12D3KooW...``)."""

Account = NewType("Account", bytes)
"""A ledger account: a raw Ed25519 public key, 32 bytes. A node's account is the public key of its peer id."""

ModelId = NewType("ModelId", str)
"""sha256 of a manifest's canonical body, 64 hex digits."""

ShardId = NewType("ShardId", str)
"""The name of a shard inside its manifest, e.g. ``expert-l10-19-g2``."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

MICROCREDITS_PER_CREDIT = 1_000_000
KFLOP_PER_TFLOP = 1_000_000_000
"""Work is counted in kFLOP; prices are quoted per TFLOP."""


@dataclass(frozen=True, slots=True, order=True)
class ExpertId:
    """One expert: the FFN number ``index`` of MoE layer ``layer``."""

    layer: int
    index: int


def format_credits(microcredits: int) -> str:
    """Microcredits as credits with six decimals, for people: ``-1500000`` is ``-1.500000``."""
    sign = "-" if microcredits < 0 else ""
    whole, part = divmod(abs(microcredits), MICROCREDITS_PER_CREDIT)
    return f"{sign}{whole}.{part:06d}"
