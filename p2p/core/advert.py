"""Signed adverts: what a node says about itself.

Owns the record, its bytes, its signature and the rule which of two adverts wins.

Invariants:
1. An advert is accepted only with a valid signature of the peer it names over the raw body, inside its bounds, and
   unexpired.
2. Of two adverts of one peer the higher ``seq`` wins; ``seq`` is the unix time in ms at which it was made, so a
   restarted node continues above its old adverts.
3. Hardware figures are measured by the node that signs, never typed in; others treat them as claims all the same.
4. Versions understand each other: a later version only appends fields (with defaults), here and in the records inside;
   what is appended is skipped, what is missing takes its default. Adverts are passed on as the bytes that were signed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import msgspec

from config.errors import IntegrityError
from config.vocabulary import PeerId
from p2p.core import addresses as multiaddrs
from p2p.core import codec
from p2p.core.identity import Identity, public_key_of, verify

TAG = b"rios/advert/1\0"
ADVERT_BYTES_MAX = 64 << 10
LIFE_MS_MAX = 24 * 3600 * 1000
CLOCK_SKEW_MS_MAX = 10 * 60 * 1000
PRICE_MAX = 1 << 40
"""Microcredits; the settings have the same bound."""
COORDINATE_US_MAX = 60_000_000

TEXT_CHARS_MAX = 256
Text = Annotated[str, msgspec.Meta(max_length=TEXT_CHARS_MAX)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Price = Annotated[int, msgspec.Meta(ge=0, le=PRICE_MAX)]
Microseconds = Annotated[int, msgspec.Meta(ge=-COORDINATE_US_MAX, le=COORDINATE_US_MAX)]


class BadAdvert(IntegrityError):
    """An advert that is not taken. ``kind`` says why: ``malformed``, ``too_large``, ``signature``, ``absurd``,
    ``future`` or ``expired``."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__("integrity", message)
        self.kind = kind


class _Array(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """A canonical array struct."""


class _Open(msgspec.Struct, array_like=True, frozen=True):
    """An array struct that later versions may lengthen."""


class Gpu(_Open, frozen=True):
    """One GPU: its name and its memory in bytes."""

    name: Text
    memory_bytes: Count


class Hardware(_Open, frozen=True):
    """What the node measured on itself.

    ``expert_kflop_per_s`` and ``memory_bytes_per_s`` come from a short benchmark at start.
    """

    cpu: Text = ""
    cores: Count = 0
    ram_bytes: Count = 0
    gpus: Annotated[tuple[Gpu, ...], msgspec.Meta(max_length=64)] = ()
    expert_kflop_per_s: Count = 0
    memory_bytes_per_s: Count = 0


class ModelOffer(_Open, frozen=True):
    """What a node serves of one model, and for how much.

    ``shards`` is a bitmap over the manifest's shard list (bit i of byte i // 8, least significant first);
    ``quote`` numbers the price so that a caller can name the one it accepts.
    """

    model_id: Annotated[str, msgspec.Meta(min_length=64, max_length=64)]
    shards: Annotated[bytes, msgspec.Meta(max_length=8192)]
    quote: Count
    microcredits_per_tflop: Price
    microcredits_per_kv_unit: Price

    def holds(self, index: int) -> bool:
        """Whether the shard at ``index`` of the manifest's list is ready to be called here."""
        byte, bit = divmod(index, 8)
        return byte < len(self.shards) and bool(self.shards[byte] >> bit & 1)


class Advert(_Open, frozen=True):
    """The record itself. New fields are appended, never inserted.

    ``lane`` is the protocol id of the direct carrier, spoken at every one of ``addresses``, empty if there is none;
    ``offered_bytes`` is the capacity this node offers for shards (already quantised); ``full`` means that it takes no
    more; ``load`` is the number of expert rows waiting in its queues; ``paused``: it takes no work for now. ``reach``
    is ``public``, ``relayed``, ``private`` or empty (unknown); ``relay``: it passes on what it cannot read for others;
    ``capabilities`` are protocol ids it speaks; ``coordinate`` is where it stands in the swarm's map of round trips
    (``core.coordinates``), in microseconds, empty if it does not know yet.
    """

    peer_id: Text
    seq: Count
    expires_ms: Count
    addresses: Annotated[tuple[Text, ...], msgspec.Meta(max_length=16)] = ()
    lane: Text = ""
    version: Text = ""
    region: Text = ""
    hardware: Hardware = Hardware()
    disk_bytes: Count = 0
    offered_bytes: Count = 0
    full: bool = False
    load: Count = 0
    roles: Annotated[tuple[Text, ...], msgspec.Meta(max_length=16)] = ()
    models: Annotated[tuple[ModelOffer, ...], msgspec.Meta(max_length=64)] = ()
    net: Annotated[bytes, msgspec.Meta(max_length=64)] = b""
    paused: bool = False
    reach: Annotated[str, msgspec.Meta(max_length=16)] = ""
    relay: bool = False
    capabilities: Annotated[tuple[Text, ...], msgspec.Meta(max_length=32)] = ()
    coordinate: Annotated[tuple[Microseconds, ...], msgspec.Meta(max_length=8)] = ()

    def offer(self, model_id: str) -> ModelOffer | None:
        """The offer for one model, if any."""
        return next((offer for offer in self.models if offer.model_id == model_id), None)


class _Envelope(_Array, frozen=True):
    body: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class SignedAdvert:
    """An advert together with the bytes that prove it."""

    advert: Advert
    data: bytes


def bitmap(indices: set[int] | frozenset[int]) -> bytes:
    """Indices as a bitmap, shortest form."""
    if not indices:
        return b""
    out = bytearray(max(indices) // 8 + 1)
    for index in indices:
        out[index // 8] |= 1 << (index % 8)
    return bytes(out)


def sign(identity: Identity, advert: Advert) -> SignedAdvert:
    """Sign one's own advert."""
    assert advert.peer_id == identity.peer_id
    body = codec.encode(advert)
    return SignedAdvert(advert, codec.encode(_Envelope(body, identity.sign(TAG, body))))


@dataclass(frozen=True, slots=True)
class Claim:
    """An advert as it came: nothing of it is proven."""

    advert: Advert
    data: bytes
    body: bytes
    signature: bytes


def read_advert(data: bytes) -> Claim:
    """Decode an advert somebody sent: a small part of what checking its signature costs. Raises :class:`BadAdvert`."""
    try:
        envelope = codec.decode(_Envelope, data, bytes_max=ADVERT_BYTES_MAX)
        advert = codec.decode_open(Advert, envelope.body, bytes_max=ADVERT_BYTES_MAX)
    except IntegrityError as error:
        raise BadAdvert("too_large" if error.code == "too_large" else "malformed", error.message) from error
    return Claim(advert, data, envelope.body, envelope.signature)


def check_advert(claim: Claim, *, now_ms: int) -> SignedAdvert:
    """The advert, if its signature and what it says hold. Raises :class:`BadAdvert` naming the rule it broke."""
    advert = claim.advert
    try:
        key = public_key_of(advert.peer_id)
    except IntegrityError as error:
        raise BadAdvert("malformed", error.message) from error
    if not verify(key, TAG, claim.body, claim.signature):
        raise BadAdvert("signature", f"advert of {advert.peer_id} has a wrong signature")
    for oddity in oddities(advert):
        raise BadAdvert("absurd", f"advert of {advert.peer_id}: {oddity}")
    if advert.expires_ms <= now_ms:
        raise BadAdvert("expired", f"advert of {advert.peer_id} has expired")
    if advert.expires_ms - now_ms > LIFE_MS_MAX + CLOCK_SKEW_MS_MAX or advert.seq > now_ms + CLOCK_SKEW_MS_MAX:
        raise BadAdvert("future", f"advert of {advert.peer_id} lies too far in the future")
    return SignedAdvert(advert, claim.data)


def open_advert(data: bytes, *, now_ms: int) -> SignedAdvert:
    """Decode and check an advert somebody sent. Raises :class:`BadAdvert` naming the rule it broke."""
    return check_advert(read_advert(data), now_ms=now_ms)


def oddities(advert: Advert) -> Iterator[str]:
    """What no honest node says about itself, beyond what the fields' own bounds refuse."""
    for text in advert.addresses:
        address = multiaddrs.parse(text)
        if address is None and multiaddrs.is_later_kind(text):
            continue
        if address is None:
            yield f"{text[:80]!r} is no multiaddr"
        elif address.peer_id not in ("", advert.peer_id):
            yield f"{text[:120]!r} is another peer's address"
    models = [offer.model_id for offer in advert.models]
    if len(set(models)) < len(models):
        yield "it offers one model twice"
    words = (advert.lane, advert.version, advert.region, advert.reach, advert.hardware.cpu)
    for text in (*words, *advert.roles, *advert.capabilities, *(gpu.name for gpu in advert.hardware.gpus)):
        if not text.isprintable():
            yield f"{text[:80]!r} is not printable"


def newer(a: SignedAdvert | None, b: SignedAdvert) -> SignedAdvert:
    """The one that wins; the first on a tie."""
    return b if a is None or b.advert.seq > a.advert.seq else a


def peer_of(advert: Advert) -> PeerId:
    """The advert's peer id as a typed id."""
    return PeerId(advert.peer_id)
