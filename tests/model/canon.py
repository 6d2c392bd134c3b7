"""What two states of a witness must share to behave alike: the whole object graph, with names in the place of keys.

Not a test. Left out is what decides nothing: the own key, the chain of batches, proofs of equivocation. Keys of honest
witnesses of one epoch have one name: they are interchangeable (symmetry), and a handover is known by what it says.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec

from ledger.core.committee import CommitteeChain
from ledger.core.objects import Item, Signed, parse

_SKIPPED = {
    "_batch_no", "_frozen", "_head", "_identity", "_left", "_next", "_state", "_unsaved", "applied", "genesis",
    "handover", "key", "listed", "old", "proofs", "signature", "touched",
}  # fmt: skip
Canon = Any


class Names:
    """Names of keys and ids."""

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}

    def give(self, key: bytes, name: str) -> None:
        """Call it so."""
        self._names[key] = name

    def __getitem__(self, key: bytes) -> str:
        return self._names.get(key) or key.hex()

    def canon(self, value: Any) -> Canon:
        """Hashable; equal for states that behave alike."""
        if value is None or isinstance(value, int | str):
            return value
        if isinstance(value, bytes):
            return self[value]
        if isinstance(value, Item):
            return self[value.id]
        if isinstance(value, Signed):
            return self[parse(value).id]
        if isinstance(value, CommitteeChain):
            return value.epoch
        if isinstance(value, Mapping):
            return _sorted((self.canon(key), self.canon(each)) for key, each in value.items())
        if isinstance(value, set | frozenset):
            return _sorted(map(self.canon, value))
        if isinstance(value, tuple | list):
            return tuple(map(self.canon, value))
        return (type(value).__name__, *(self.canon(each) for each in _fields(value)))


def _sorted(values: Any) -> tuple[Any, ...]:
    return tuple(sorted(values, key=repr))


def _fields(value: Any) -> list[Any]:
    if isinstance(value, msgspec.Struct):
        names: Any = value.__struct_fields__
    elif dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    else:
        names = getattr(value, "__dict__", None) or [n for kind in type(value).__mro__ for n in _slots(kind)]
    return [getattr(value, name) for name in sorted(names) if name not in _SKIPPED]


def _slots(kind: type) -> tuple[str, ...]:
    slots = getattr(kind, "__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
