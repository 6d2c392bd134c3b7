"""Which kept sequences begin like a new prompt. Pure.

Owns: what is kept, what is let go. Does not own: the sequences themselves, which are keys here (``dmoe/passes.py``).

Invariants:

1. Kept sequences hold at most ``positions_max`` positions together; the least recently used go first.
2. A prompt meets sequences of its own scope only: what one user asked shows to no other, not even by its speed.
3. A kept sequence is not the beginning of another one of its scope: the longer serves for both.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

PREFIX_TOKENS_MIN = 16
"""A shorter beginning is computed faster than it is looked after."""

_Key = TypeVar("_Key", bound=Hashable)
Tokens = NDArray[np.int32]


def tokens_of(ids: Sequence[int]) -> Tokens:
    """Token ids as :class:`Prefixes` compares them."""
    return np.asarray(ids, np.int32)


def common(a: Tokens, b: Tokens) -> int:
    """How many first tokens are the same."""
    shorter = min(len(a), len(b))
    different = a[:shorter] != b[:shorter]
    return int(different.argmax()) if different.any() else shorter


class Prefixes(Generic[_Key]):
    """Sequences by what they begin with."""

    def __init__(self, positions_max: int) -> None:
        self._positions_max = positions_max
        self._kept: OrderedDict[_Key, tuple[str, Tokens]] = OrderedDict()
        self._positions = 0

    @property
    def positions(self) -> int:
        """Positions that are kept."""
        return self._positions

    def takes(self, positions: int) -> bool:
        """Whether a sequence of so many could be kept at all."""
        return PREFIX_TOKENS_MIN < positions <= self._positions_max

    def add(self, key: _Key, scope: str, tokens: Tokens) -> list[_Key]:
        """Keep a sequence; returns those to let go, which may be the new one itself."""
        if not self.takes(len(tokens)):
            return [key]
        gone = []
        for other, (of, kept) in self._kept.items():
            if of == scope:
                shared = common(kept, tokens)
                if shared == len(tokens):
                    self._kept.move_to_end(other)
                    return [key]
                if shared == len(kept):
                    gone.append(other)
        for other in gone:
            self.remove(other)
        self._kept[key] = (scope, tokens)
        self._positions += len(tokens)
        while self._positions > self._positions_max:
            gone.append(next(iter(self._kept)))
            self.remove(gone[-1])
        return gone

    def find(self, scope: str, tokens: Tokens) -> tuple[_Key, int] | None:
        """The kept sequence with the longest common beginning, and its length; None if that is not worth it."""
        best, length = None, PREFIX_TOKENS_MIN - 1
        for key, (of, kept) in self._kept.items():
            if of == scope and len(kept) > length and (shared := common(kept, tokens)) > length:
                best, length = key, shared
        if best is None:
            return None
        self._kept.move_to_end(best)
        return best, length

    def remove(self, key: _Key) -> None:
        """Let a sequence go."""
        _, tokens = self._kept.pop(key)
        self._positions -= len(tokens)

    def clear(self) -> list[_Key]:
        """Let all go."""
        keys = list(self._kept)
        self._kept.clear()
        self._positions = 0
        return keys
