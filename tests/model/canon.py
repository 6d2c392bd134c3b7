"""What two states of a witness must share to behave alike: the whole object graph, with names in the place of keys.

Not a test. Left out is what decides nothing: the own key, the chain of batches, proofs of equivocation. Keys of honest
witnesses of one epoch have one name: they are interchangeable (symmetry), and a handover is known by what it says.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from ledger.core.committee import CommitteeChain
from ledger.core.objects import Item, Signed, parse

_SKIPPED = {
    "_batch_no", "_bytes", "_frozen", "_head", "_identity", "_left", "_next", "_state", "_swept", "_unsaved",
    "applied", "genesis", "handover", "key", "listed", "old", "proofs", "signature", "touched",
}  # fmt: skip
Canon = Any


class Names:
    """Names of keys and ids."""

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}
        self._fields: dict[type, tuple[str, ...]] = {}
        self._kinds: dict[type, Callable[[Any], Canon]] = {
            **dict.fromkeys((int, str, bool, type(None)), lambda value: value),
            bytes: self.__getitem__,
            Item: lambda item: self[item.id],
            Signed: lambda signed: self[parse(signed).id],
            CommitteeChain: lambda chain: chain.epoch,
            **dict.fromkeys((tuple, list), lambda value: tuple(map(self.canon, value))),
            **dict.fromkeys((set, frozenset), lambda value: _unordered(map(self.canon, value))),
        }

    def give(self, key: bytes, name: str) -> None:
        """Call it so."""
        self._names[key] = name

    def __getitem__(self, key: bytes) -> str:
        return self._names.get(key) or key.hex()

    def canon(self, value: Any) -> Canon:
        """Hashable; equal for states that behave alike."""
        kind = self._kinds.get(type(value))
        if kind is not None:
            return kind(value)
        if isinstance(value, Mapping):
            return _unordered((self.canon(key), self.canon(each)) for key, each in value.items())
        fields = self._fields.get(type(value))
        if fields is None:
            fields = self._fields[type(value)] = tuple(sorted(set(_fields(value)) - _SKIPPED))
        return (type(value).__name__, *[self.canon(getattr(value, name)) for name in fields])


def _unordered(values: Iterable[Canon]) -> Canon:
    """Keys of honest witnesses have one name, so the same value may be there more than once."""
    every = list(values)
    once = frozenset(every)
    return once if len(once) == len(every) else frozenset(Counter(every).items())


def _fields(value: Any) -> Iterable[str]:
    if isinstance(value, msgspec.Struct):
        return value.__struct_fields__
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    return getattr(value, "__dict__", None) or [name for kind in type(value).__mro__ for name in _slots(kind)]


def _slots(kind: type) -> tuple[str, ...]:
    slots = getattr(kind, "__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
