"""A deployment: the signed wish that a model be served by so many nodes, and the book of all that are known.

Owns: the record, its canonical bytes, which of two wins, whose count. Does not own: how records spread.

Invariants:
1. A record counts only with a valid signature of the deployer it names, and only if that deployer is allowed here.
2. Of two records of one deployer for one model the higher ``seq`` wins; ``replicas == 0`` takes the deployment back.
3. Deployers do not overrule each other: a model gets the most replicas that any allowed one asks for.
4. The book is bounded: at most ``RECORDS_MAX`` records, at most ``PER_DEPLOYER_MAX`` of one deployer.
5. A record without a ``mode`` has the same bytes as before modes were known; what a later version appends is skipped.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from config.errors import IntegrityError
from config.vocabulary import PeerId
from p2p.core import codec
from p2p.core.identity import Identity, public_key_of, verify

TAG = b"rios/deployment/1\0"
RECORD_BYTES_MAX = 1024
RECORDS_MAX = 1024
PER_DEPLOYER_MAX = 64
REPLICAS_MAX = 64
ANYBODY = "*"

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Mode = Literal["experts", "stages", "both"]
"""Which of a model's shards are wanted: groups of experts, whole layers, or both kinds; the trunk with each."""
DEFAULT_MODE: Mode = "experts"
_KINDS: Mapping[str, frozenset[str]] = {
    "experts": frozenset(("trunk", "expert")),
    "stages": frozenset(("trunk", "stage")),
    "both": frozenset(("trunk", "expert", "stage")),
}


class Deployment(msgspec.Struct, array_like=True, frozen=True):
    """``deployer`` wants ``replicas`` of every shard of a model that ``mode`` speaks of. ``seq`` is the unix time in ms
    when it was signed. A mode that is not known here counts as the default one."""

    model_id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    manifest_sha256: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    replicas: Annotated[int, msgspec.Meta(ge=0, le=REPLICAS_MAX)]
    deployer: Annotated[str, msgspec.Meta(max_length=64)]
    seq: Count
    mode: Annotated[str, msgspec.Meta(max_length=16)] = DEFAULT_MODE

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of shards it speaks of."""
        return _KINDS.get(self.mode, _KINDS[DEFAULT_MODE])


class _Envelope(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    body: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class SignedDeployment:
    """A record and the bytes that prove it."""

    record: Deployment
    data: bytes


def sign(identity: Identity, record: Deployment) -> SignedDeployment:
    """Sign one's own record."""
    assert record.deployer == identity.peer_id
    fields = msgspec.structs.astuple(record)
    body = codec.encode(fields[:-1] if record.mode == DEFAULT_MODE else fields)
    return SignedDeployment(record, codec.encode(_Envelope(body, identity.sign(TAG, body))))


def open_record(data: bytes) -> SignedDeployment:
    """Decode and check a record somebody sent. Raises IntegrityError naming what is wrong."""
    envelope = codec.decode(_Envelope, data, bytes_max=RECORD_BYTES_MAX)
    record = codec.decode_open(Deployment, envelope.body, bytes_max=RECORD_BYTES_MAX)
    if not verify(public_key_of(record.deployer), TAG, envelope.body, envelope.signature):
        raise IntegrityError("integrity", f"deployment of {record.model_id[:12]} has a wrong signature")
    return SignedDeployment(record, data)


def check_record(key: str, data: bytes) -> None:
    """Raise IntegrityError unless ``data`` is a deployment of the model ``key`` (the DHT's rule)."""
    if open_record(data).record.model_id != key:
        raise IntegrityError("integrity", f"a deployment of another model under {key[:12]}")


def newest(_key: str, records: Sequence[bytes]) -> int:
    """Which of several valid records the DHT keeps: the last one signed."""
    return max(range(len(records)), key=lambda index: open_record(records[index]).record.seq)


def is_allowed(peer_id: str, me: str, allowed: Collection[str]) -> bool:
    """Whether models and deployments of this peer are taken here."""
    return peer_id == me or peer_id in allowed or ANYBODY in allowed


@dataclass(slots=True)
class Book:
    """Every record that counts here."""

    me: PeerId
    allowed: frozenset[str]
    _records: dict[tuple[str, str], SignedDeployment] = field(default_factory=dict)

    def add(self, signed: SignedDeployment) -> bool:
        """Take a verified record in. False if it is not news, not allowed, or there is no room."""
        record = signed.record
        key = (record.model_id, record.deployer)
        known = self._records.get(key)
        if known is not None and known.record.seq >= record.seq:
            return False
        if not is_allowed(record.deployer, self.me, self.allowed):
            return False
        if known is None:
            own = sum(1 for _, deployer in self._records if deployer == record.deployer)
            if len(self._records) >= RECORDS_MAX or own >= PER_DEPLOYER_MAX:
                return False
        self._records[key] = signed
        return True

    def __iter__(self) -> Iterator[SignedDeployment]:
        return iter(self._records.values())

    def own(self, model_id: str) -> Deployment | None:
        """This node's own record for a model."""
        signed = self._records.get((model_id, self.me))
        return signed.record if signed else None

    def replicas(self) -> dict[str, int]:
        """Model id -> replicas wanted (0: it was deployed once and is not any more)."""
        wanted: dict[str, int] = {}
        for signed in self._records.values():
            record = signed.record
            wanted[record.model_id] = max(wanted.get(record.model_id, 0), record.replicas)
        return wanted

    def wanted(self, model_id: str, kind: str) -> int:
        """Replicas wanted of a model's shards of one kind."""
        records = (signed.record for (model, _), signed in self._records.items() if model == model_id)
        return max((record.replicas for record in records if kind in record.kinds), default=0)

    def mode(self, model_id: str) -> Mode:
        """Which kinds of shards all deployments of a model together speak of."""
        stages, experts = self.wanted(model_id, "stage") > 0, self.wanted(model_id, "expert") > 0
        if stages:
            return "both" if experts else "stages"
        return "experts"

    def deployers(self, model_id: str) -> list[PeerId]:
        """Who deployed a model: they can be asked for its manifest."""
        return [PeerId(deployer) for model, deployer in self._records if model == model_id]
