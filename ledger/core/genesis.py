"""The constants a network is founded on.

Owns the genesis object, its file for people (JSON, keys as peer ids) and its canonical bytes; ``net``, the first 16
bytes of their sha256, stands in every signed body.

Invariants: ``n = 3f + 1`` exactly; witness keys distinct and valid. With ``f = 0`` one witness decides alone: the
same code, but no Byzantine tolerance.
"""

import json
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Annotated

from msgspec import Meta

from config.errors import ConfigError, IntegrityError
from config.vocabulary import Account
from ledger.core import quorums
from ledger.core.objects import AMOUNT_MAX, Amount, Key, _Array
from ledger.core.quorums import COMMITTEE_MAX, F_MAX
from p2p.core import codec
from p2p.core.identity import is_valid_key, peer_id_of, public_key_of

FORMAT = "rios-genesis/1"
GENESIS_BYTES_MAX = 64 << 10
_AMOUNTS = ("max_supply", "min_amount", "min_lock", "min_claim_step")


class _Body(_Array, frozen=True):
    issuer: Key
    root: Key
    witnesses: Annotated[tuple[Key, ...], Meta(min_length=1, max_length=COMMITTEE_MAX)]
    f: Annotated[int, Meta(ge=0, le=F_MAX)]
    max_supply: Amount
    min_amount: Amount
    min_lock: Amount
    min_claim_step: Amount


@dataclass(frozen=True, slots=True, kw_only=True)
class Genesis:
    """A network's constants. Amounts are microcredits."""

    issuer: Account
    root: Account
    witnesses: tuple[Account, ...]
    f: int = 0
    max_supply: int = 10**15
    min_amount: int = 1
    min_lock: int = 5_000_000
    min_claim_step: int = 1_000
    net: bytes = field(init=False)

    def __post_init__(self) -> None:
        """Refuse a genesis that breaks an invariant (:class:`ConfigError`)."""
        n = len(self.witnesses)
        if not quorums.is_exact(n, self.f):
            raise _wrong(
                f"f = {self.f} needs exactly {3 * self.f + 1} witnesses, not {n}", f"f is 0..{F_MAX}, n = 3f+1"
            )
        if len(set(self.witnesses)) != n:
            raise _wrong("a witness stands in it twice", "list distinct keys")
        for key in (self.issuer, self.root, *self.witnesses):
            if not is_valid_key(key):
                raise _wrong(f"{key.hex()} is not a valid Ed25519 public key", "use the peer id of a node")
        for name in _AMOUNTS:
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= AMOUNT_MAX:
                raise _wrong(f"{name} = {value!r} is not an amount", "microcredits, 1..2**62")
        object.__setattr__(self, "net", sha256(self.canonical()).digest()[:16])

    def canonical(self) -> bytes:
        """The bytes the network id is made of."""
        return codec.encode(
            _Body(
                self.issuer,
                self.root,
                tuple(self.witnesses),
                self.f,
                self.max_supply,
                self.min_amount,
                self.min_lock,
                self.min_claim_step,
            )
        )

    @property
    def quorum(self) -> int:
        """How many distinct witnesses make an object final."""
        return quorums.quorum_of(self.f)

    @property
    def tolerance(self) -> str:
        """What the committee withstands, for people."""
        return tolerance_of(len(self.witnesses), self.f)

    def to_json(self) -> str:
        """The genesis file."""
        record = {
            "format": FORMAT,
            "issuer": peer_id_of(self.issuer),
            "root": peer_id_of(self.root),
            "witnesses": [peer_id_of(key) for key in self.witnesses],
            "f": self.f,
            **{name: getattr(self, name) for name in _AMOUNTS},
        }
        return json.dumps(record, indent=2) + "\n"


def tolerance_of(n: int, f: int) -> str:
    """What ``n`` witnesses of which ``f`` may lie withstand, for people."""
    return f"{n} witnesses, {f} may fail or lie" if f else "one witness, no Byzantine tolerance"


def _wrong(what: str, hint: str) -> ConfigError:
    return ConfigError("config", f"genesis: {what}", hint)


def from_json(text: str) -> Genesis:
    """Read a genesis file.

    Raises :class:`ConfigError` that says what is wrong.
    """
    if len(text) > GENESIS_BYTES_MAX:
        raise _wrong(f"longer than {GENESIS_BYTES_MAX} bytes", "is this the right file?")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"not JSON: {error}", "get the file from whoever founded the network") from error
    wanted = {"format", "issuer", "root", "witnesses", "f", *_AMOUNTS}
    if not isinstance(record, dict) or set(record) != wanted:
        odd = sorted(wanted ^ set(record)) if isinstance(record, dict) else ["(not an object)"]
        raise _wrong(f"missing or unknown: {', '.join(odd)}", f"it has exactly {', '.join(sorted(wanted))}")
    if record["format"] != FORMAT:
        raise _wrong(f"format {record['format']!r}", f"this program reads {FORMAT}")
    witnesses = record["witnesses"]
    if not isinstance(witnesses, list) or len(witnesses) > COMMITTEE_MAX or type(record["f"]) is not int:
        raise _wrong("witnesses must be a list of peer ids and f a number", f"at most {COMMITTEE_MAX} witnesses")
    try:
        keys = [public_key_of(str(text)) for text in (record["issuer"], record["root"], *witnesses)]
    except IntegrityError as error:
        raise _wrong(error.message, "keys are written as peer ids, 12D3KooW...") from error
    amounts = {name: record[name] for name in _AMOUNTS}
    return Genesis(issuer=keys[0], root=keys[1], witnesses=tuple(keys[2:]), f=record["f"], **amounts)
