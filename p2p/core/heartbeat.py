"""Heartbeats: the few figures of an advert that change while nothing else does, signed, a few hundred bytes.

Owns the record, its bytes and signature, what it does to an advert, and when one is worth sending.

Invariants:
1. A heartbeat changes load, pause and prices only, and only of an advert that is known; it does not prolong its life.
2. It is numbered like adverts (unix ms): the higher number wins, an advert made later ends what a heartbeat said.
3. A later version may append fields; the signature covers the raw body.
4. Small changes are not sent: :func:`is_worth_sending` (hysteresis).
"""

from dataclasses import dataclass
from typing import Annotated

import msgspec

from config.errors import IntegrityError
from p2p.core import codec
from p2p.core.advert import CLOCK_SKEW_MS_MAX, Advert, BadAdvert, Count, Price, Text
from p2p.core.identity import Identity, public_key_of, verify

TAG = b"rios/heartbeat/1\0"
HEARTBEAT_BYTES_MAX = 4096
AGE_MS_MAX = CLOCK_SKEW_MS_MAX
LOAD_STEP_MIN = 16
"""Rows: a smaller difference says nothing about how long one will wait."""


class Heartbeat(msgspec.Struct, array_like=True, frozen=True):
    """``price`` (quote number, microcredits per TFLOP, per KV unit) is that of every offer; None: as advertised."""

    peer_id: Text
    seq: Count
    load: Count = 0
    paused: bool = False
    price: tuple[Count, Price, Price] | None = None

    def applied(self, advert: Advert) -> Advert:
        """The advert as it stands after this heartbeat."""
        models = advert.models
        if self.price is not None:
            quote, per_tflop, per_kv = self.price
            models = tuple(
                msgspec.structs.replace(
                    offer, quote=quote, microcredits_per_tflop=per_tflop, microcredits_per_kv_unit=per_kv
                )
                for offer in models
            )
        return msgspec.structs.replace(advert, load=self.load, paused=self.paused, models=models)


class _Envelope(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    body: bytes
    signature: Annotated[bytes, msgspec.Meta(max_length=64)]


def sign(identity: Identity, beat: Heartbeat) -> bytes:
    """The bytes to send."""
    assert beat.peer_id == identity.peer_id
    body = codec.encode(beat)
    return codec.encode(_Envelope(body, identity.sign(TAG, body)))


@dataclass(frozen=True, slots=True)
class Claim:
    """A heartbeat as it came: nothing of it is proven."""

    beat: Heartbeat
    body: bytes
    signature: bytes


def read_heartbeat(data: bytes) -> Claim:
    """Decode a heartbeat somebody sent. Raises :class:`BadAdvert`."""
    try:
        envelope = codec.decode(_Envelope, data, bytes_max=HEARTBEAT_BYTES_MAX)
        beat = codec.decode_open(Heartbeat, envelope.body, bytes_max=HEARTBEAT_BYTES_MAX)
    except IntegrityError as error:
        raise BadAdvert("too_large" if error.code == "too_large" else "malformed", error.message) from error
    return Claim(beat, envelope.body, envelope.signature)


def check_heartbeat(claim: Claim, *, now_ms: int) -> Heartbeat:
    """The heartbeat, if its signature and date hold. Raises :class:`BadAdvert` naming the rule it broke."""
    beat = claim.beat
    try:
        key = public_key_of(beat.peer_id)
    except IntegrityError as error:
        raise BadAdvert("malformed", error.message) from error
    if not verify(key, TAG, claim.body, claim.signature):
        raise BadAdvert("signature", f"heartbeat of {beat.peer_id} has a wrong signature")
    if beat.seq > now_ms + CLOCK_SKEW_MS_MAX:
        raise BadAdvert("future", f"heartbeat of {beat.peer_id} lies too far in the future")
    if beat.seq < now_ms - AGE_MS_MAX:
        raise BadAdvert("expired", f"heartbeat of {beat.peer_id} is old")
    return beat


def open_heartbeat(data: bytes, *, now_ms: int) -> Heartbeat:
    """Decode and check a heartbeat somebody sent. Raises :class:`BadAdvert` naming the rule it broke."""
    return check_heartbeat(read_heartbeat(data), now_ms=now_ms)


def is_worth_sending(told: Advert, now: Advert) -> bool:
    """Whether ``now`` differs so much from what others were told that they should hear of it: the load by half (and by
    :data:`LOAD_STEP_MIN` rows), or down to nothing, or the pause."""
    if told.paused != now.paused:
        return True
    step = abs(now.load - told.load)
    return step >= max(LOAD_STEP_MIN, told.load // 2) or (now.load == 0 and told.load > 0)
