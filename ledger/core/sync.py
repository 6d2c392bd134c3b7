"""Digests for anti-entropy: which parts of two copies of the ledger differ.

256 buckets by the first byte of the key; a bucket covers (account, seq, head) and (channel, paid). Buckets are
recomputed only when something in them changed.
"""

from collections.abc import Iterable
from hashlib import sha256
from typing import Annotated

import msgspec
from msgspec import Meta

from ledger.core.objects import Count, Key
from ledger.core.state import State

BUCKETS = 256
DIGEST_BYTES = 16
LINES_MAX = 200_000


class Heads(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """What a node has in some buckets: accounts with their last applied seq, channels with what was paid."""

    accounts: Annotated[list[tuple[Key, Count]], Meta(max_length=LINES_MAX)]
    channels: Annotated[list[tuple[Key, Count]], Meta(max_length=LINES_MAX)]


class Digests:
    """Bucket digests of one state."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._members: list[set[bytes]] = [set() for _ in range(BUCKETS)]
        self._cached = [bytes(DIGEST_BYTES)] * BUCKETS
        for key in (*state.accounts, *state.channels):
            self._members[key[0]].add(key)
        self._refresh(range(BUCKETS))

    def buckets(self) -> bytes:
        """All digests, one after the other."""
        touched, self._state.touched = self._state.touched, set()
        for key in touched:
            self._members[key[0]].add(key)
        self._refresh({key[0] for key in touched})
        return b"".join(self._cached)

    def _refresh(self, buckets: Iterable[int]) -> None:
        state = self._state
        for bucket in buckets:
            total = sha256()
            for key in sorted(self._members[bucket]):
                account = state.accounts.get(key)
                if account is not None and account.seq:
                    total.update(b"a" + key + account.seq.to_bytes(8, "big") + account.head)
                channel = state.channels.get(key)
                if channel is not None:
                    total.update(b"c" + key + channel.paid.to_bytes(8, "big"))
            self._cached[bucket] = total.digest()[:DIGEST_BYTES]

    def heads(self, buckets: Iterable[int]) -> Heads:
        """What this state has in some buckets."""
        self.buckets()
        accounts, channels = [], []
        for bucket in buckets:
            for key in sorted(self._members[bucket]):
                account, channel = self._state.accounts.get(key), self._state.channels.get(key)
                if account is not None and account.seq:
                    accounts.append((key, account.seq))
                if channel is not None:
                    channels.append((key, channel.paid))
        return Heads(accounts[:LINES_MAX], channels[:LINES_MAX])


def differing(mine: bytes, theirs: bytes) -> list[int]:
    """The numbers of the buckets whose digests differ."""
    size = DIGEST_BYTES
    return [i for i in range(BUCKETS) if mine[i * size : i * size + size] != theirs[i * size : i * size + size]]


def behind(mine: Heads, theirs: Heads) -> tuple[list[tuple[bytes, int, int]], list[bytes]]:
    """What ``theirs`` has and ``mine`` lacks: ranges (account, first seq, last seq) and channels with higher claims."""
    have, paid = dict(mine.accounts), dict(mine.channels)
    ranges = [(key, have.get(key, 0) + 1, seq) for key, seq in theirs.accounts if seq > have.get(key, 0)]
    channels = [key for key, amount in theirs.channels if amount > paid.get(key, 0)]
    return ranges, channels
