"""What dmoe needs of a billing system: a seller's side (worker) and a buyer's side (caller).

The ledger implements both, ``node`` joins them. Work is counted in exact kFLOP: ``rows * flops_per_row`` of the shard
from its manifest, rounded down per call to whole kFLOP by both sides alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from config.vocabulary import PeerId


@dataclass(frozen=True, slots=True)
class Quote:
    """A price: ``number`` is what the advert calls it (``ModelOffer.quote``)."""

    number: int
    microcredits_per_tflop: int
    microcredits_per_kv_unit: int


class Seller(Protocol):
    """A worker's side."""

    def admit(self, payer: PeerId, channel: bytes, quote: Quote) -> None:
        """May this payer's channel run one more call under this quote? Quick, in memory.

        Raises RemoteError ``payment_required`` (unknown or uncertified channel, credit exhausted, lock used up,
        expired, stopped) with a hint that says which.
        """

    async def credited(self, channel: bytes, seconds: float) -> None:
        """Wait, but not longer than this, while nothing but a newer voucher is missing for the next call: one may be on
        its way."""

    def served(self, payer: PeerId, channel: bytes, quote: Quote, kflop: int, leaf: bytes) -> None:
        """Count a call that was answered. ``leaf`` is the 32-byte digest of what was answered."""


class Buyer(Protocol):
    """A caller's side."""

    def channel(self, worker: PeerId) -> bytes | None:
        """The open, usable channel to this worker, at once, or None."""

    async def open_channel(self, worker: PeerId) -> bytes:
        """The usable channel, opened or topped up first where needed.

        Raises RiosError ``payment_required`` if the own account has too little, ``unavailable`` if no quorum of
        witnesses can be reached.
        """

    def used(self, worker: PeerId, channel: bytes, quote: Quote, kflop: int, leaf: bytes) -> None:
        """Count a call whose answer arrived (also one that was not needed any more)."""

    def lost(self, worker: PeerId, channel: bytes, quote: Quote, kflop: int) -> None:
        """A call was given up here after it had left: the worker may have answered it all the same, and count it."""


class Proof(Protocol):
    """A receipt that the worker signed, and the path from an answer's leaf to its root."""

    @property
    def receipt(self) -> bytes: ...
    @property
    def signature(self) -> bytes: ...
    @property
    def index(self) -> int: ...
    @property
    def path(self) -> tuple[bytes, ...]: ...


class Notary(Protocol):
    """What workers signed for."""

    def watch(self, channel: bytes, leaf: bytes) -> None:
        """Keep the proof of an answer when its receipt comes."""

    def forget(self, channel: bytes, leaf: bytes) -> None:
        """Nobody needs the proof of that answer."""

    async def proof(self, channel: bytes, leaf: bytes, seconds: float) -> Proof | None:
        """The proof of a watched answer; None if none comes in this time."""

    def check(
        self, worker: PeerId, leaf: bytes, receipt: bytes, signature: bytes, index: int, path: Sequence[bytes]
    ) -> object:
        """Raise RiosError naming the rule unless ``worker`` signed for the answer."""

    async def stop(self, worker: PeerId, reason: str) -> None:
        """Pay a worker no more."""
