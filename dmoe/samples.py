"""What is looked at: an answer as numbers, a part of one, and requests made to resemble others. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from config.errors import RemoteError
from config.vocabulary import PeerId
from dmoe.core import calls, evidence, wire
from dmoe.core.calls import Bytes
from dmoe.core.evidence import Asked, Evidence
from dmoe.core.manifest import Manifest
from dmoe.core.routing import NOBODY
from dmoe.ports import Quote
from dmoe.purse import Owed
from p2p.face import Reply


@dataclass(frozen=True, slots=True)
class Sample:
    """An answer to look at: ``answer f32[G, N, H]``. ``synthetic``: nobody's prompt. ``local``: judge it here."""

    manifest: Manifest
    owed: Owed
    asked: Asked
    answer: wire.FloatRows
    synthetic: bool = False

    @property
    def groups(self) -> tuple[int, ...]:
        """The sum groups asked."""
        return tuple(place.group for place in self.owed.places)


@dataclass(frozen=True, slots=True)
class Part(Sample):
    """Some of an answer's groups."""

    places: tuple[int, ...] = ()

    @property
    def groups(self) -> tuple[int, ...]:
        """The sum groups compared."""
        return tuple(self.owed.places[place].group for place in self.places)


def sample_of(manifest: Manifest, owed: Owed, *, synthetic: bool = False) -> Sample:
    """An answer as numbers. Raises IntegrityError if its bytes are malformed."""
    asked = evidence.numbers_of(owed.asked, owed.rows, manifest)
    answer = evidence.answer_of(owed.answered, len(owed.places), owed.rows, manifest)
    return Sample(manifest, owed, asked, answer, synthetic)


def request_of(manifest: Manifest, like: Owed, row: wire.FloatRows, expert: int | None, random: Random) -> Owed:
    """What a call like another one would ask with another row ``f32[1, H]``, of one expert alone (None: there is no
    choice). It looks as any other: the row's other choices are experts of other groups, and weigh less."""
    shape, buffer = wire.encode(row, manifest.wire_dtype)
    buffers: list[calls.Buffer] = [buffer]
    experts = None
    if expert is not None:
        top_k = manifest.architecture.router.top_k
        near = {member for place in like.places for member in place.experts}
        others = [other for other in range(manifest.experts_per_layer) if other not in near]
        chosen = [expert, *random.sample(others, min(top_k - 1, len(others)))]
        scores = sorted((random.gauss(0, 1) for _ in chosen), reverse=True)
        shares = np.exp(scores) / np.exp(scores).sum()
        experts, weights = np.full((1, top_k), NOBODY, "<i4"), np.zeros((1, top_k), "<f4")
        experts[0, : len(chosen)], weights[0, : len(chosen)] = chosen, shares
        buffers += [experts.tobytes(), weights.tobytes()]
    asked = Bytes(buffers, calls.bf16_of(shape))
    return Owed(
        like.peer,
        like.channel,
        like.quote,
        like.model_id,
        like.layer,
        like.places,
        1,
        experts,
        asked,
        Bytes(()),
        privacy=like.privacy,
    )


def evidence_of(owed: Owed, proof: Any) -> Evidence:  # noqa: ANN401 - a Proof of the ledger
    """An answer and its worker's signature in one."""
    return Evidence(
        version=evidence.VERSION,
        worker=owed.peer,
        model_id=bytes.fromhex(owed.model_id),
        layer=owed.layer,
        groups=tuple(place.group for place in owed.places),
        rows=owed.rows,
        device=owed.device,
        asked=tuple(bytes(buffer) for buffer in owed.asked.buffers),
        asked_bf16=owed.asked.bf16,
        answered=bytes(owed.answered.buffers[0]),
        answered_bf16=owed.answered.bf16,
        receipt=proof.receipt,
        signature=proof.signature,
        index=proof.index,
        path=proof.path,
    )


def owed_of(peer: PeerId, channel: bytes, quote: Quote, like: Owed, places: Sequence[Any], reply: Reply) -> Owed:
    """What a peer answered to a request like another one. Raises RemoteError for an answer of another shape."""
    if len(reply.buffers) != 1:
        raise RemoteError("protocol", f"{peer} answered with {len(reply.buffers)} buffers", peer_id=peer)
    answered = Bytes((bytes(reply.buffers[0]),), calls.bf16_of(reply.header))
    device = calls.device_of(reply.header)
    what = like.model_id, like.layer, places, like.rows, like.experts
    return Owed(peer, channel, quote, *what, like.asked, answered, device, like.privacy)


def copied(owed: Owed) -> Owed:
    """With buffers of its own: those of a call are used again."""
    asked, answered = (Bytes(tuple(map(bytes, b.buffers)), b.bf16) for b in (owed.asked, owed.answered))
    experts = None if owed.experts is None else owed.experts.copy()
    what = owed.peer, owed.channel, owed.quote, owed.model_id, owed.layer, tuple(owed.places), owed.rows
    return Owed(*what, experts, asked, answered, owed.device, owed.privacy)


def part_of(sample: Sample, places: Sequence[int]) -> Sample:
    """Of an answer, what is compared: its leaf stays that of the whole."""
    if len(places) == len(sample.groups):
        return sample
    return Part(
        sample.manifest, sample.owed, sample.asked, sample.answer[list(places)], sample.synthetic, tuple(places)
    )
