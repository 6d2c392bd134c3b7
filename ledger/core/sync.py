"""Digests for anti-entropy: which parts of two copies of the ledger differ, and what to ask for.

256 buckets by the first byte of the key; a bucket covers (account, seq, head) and, for every open channel,
(channel, paid). A bucket's digest comes from the sum of its lines' hashes, so that a change costs one line and not the
bucket, however many accounts there are. Whoever grinds keys may make two sets of lines sum up alike: such a difference
is noticed at the next change of the bucket, at the latest by a checkpoint's root.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Annotated

import msgspec
from msgspec import Meta

from ledger.core.objects import Count, Key
from ledger.core.state import State

BUCKETS = 256
DIGEST_BYTES = 16
LINES_MAX = 200_000
LINES_PER_ANSWER = 16_384
"""An answer holds whole buckets, as many as have no more lines than this, and at least one."""
_SUM_BITS = 256


class Heads(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """What a node has in some buckets: accounts with their last applied seq, open channels with what was paid."""

    accounts: Annotated[list[tuple[Key, Count]], Meta(max_length=LINES_MAX)]
    channels: Annotated[list[tuple[Key, Count]], Meta(max_length=LINES_MAX)]


class Digests:
    """Bucket digests of one state."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._lines: list[dict[bytes, int]] = [{} for _ in range(BUCKETS)]
        self._sums = [0] * BUCKETS
        self._digests = [b""] * BUCKETS
        self._joined = b""
        self.rebuild()

    def rebuild(self) -> None:
        """Look at everything anew: the state was replaced (a checkpoint)."""
        self._lines = [{} for _ in range(BUCKETS)]
        self._sums = [0] * BUCKETS
        self._digests = [_digest(0)] * BUCKETS
        self._state.touched.clear()
        self._refresh({*self._state.accounts, *self._state.channels})

    def buckets(self) -> bytes:
        """All digests, one after the other."""
        if self._state.touched:
            touched, self._state.touched = self._state.touched, set()
            self._refresh(touched)
        return self._joined

    def _refresh(self, keys: Collection[bytes]) -> None:
        for key in keys:
            bucket = self._lines[key[0]]
            line = self._line(key)
            self._sums[key[0]] = (self._sums[key[0]] + line - bucket.get(key, 0)) % (1 << _SUM_BITS)
            if line:
                bucket[key] = line
            else:
                bucket.pop(key, None)
        for number in {key[0] for key in keys}:
            self._digests[number] = _digest(self._sums[number])
        self._joined = b"".join(self._digests)

    def _line(self, key: bytes) -> int:
        """The hash of what is known about a key; 0 for nothing."""
        account, channel = self._state.accounts.get(key), self._state.channels.get(key)
        parts = b""
        if account is not None and account.seq:
            parts = b"a" + key + account.seq.to_bytes(8, "big") + account.head
        if channel is not None and channel.closed_at is None:
            parts += b"c" + key + channel.paid.to_bytes(8, "big")
        return int.from_bytes(blake2b(parts, digest_size=_SUM_BITS // 8).digest(), "big") if parts else 0

    def heads(self, buckets: Iterable[int]) -> tuple[Heads, int]:
        """What this state has in some buckets, and how many of these buckets fit into one answer."""
        self.buckets()
        accounts: list[tuple[bytes, int]] = []
        channels: list[tuple[bytes, int]] = []
        covered = 0
        for bucket in buckets:
            keys = self._lines[bucket]
            if covered and len(accounts) + len(channels) + len(keys) > LINES_PER_ANSWER:
                break
            covered += 1
            for key in sorted(keys):
                account, channel = self._state.accounts.get(key), self._state.channels.get(key)
                if account is not None and account.seq:
                    accounts.append((key, account.seq))
                if channel is not None and channel.closed_at is None:
                    channels.append((key, channel.paid))
        return Heads(accounts[:LINES_MAX], channels[:LINES_MAX]), covered

    def maybe_closed(self, theirs: Heads, buckets: Iterable[int]) -> list[bytes]:
        """Channels in some buckets that are open here and not in ``theirs``: who closed one still has its claim,
        and what waits here may wait for the money of just that claim, the closing itself among it."""
        channels, listed = self._state.channels, {key for key, _ in theirs.channels}
        keys = (key for bucket in buckets for key in self._lines[bucket] if key in channels and key not in listed)
        return [key for key in keys if channels[key].closed_at is None]


def _digest(total: int) -> bytes:
    return blake2b(total.to_bytes(_SUM_BITS // 8, "big"), digest_size=DIGEST_BYTES).digest()


def differing(mine: bytes, theirs: bytes) -> list[int]:
    """The numbers of the buckets whose digests differ."""
    size = DIGEST_BYTES
    return [i for i in range(BUCKETS) if mine[i * size : i * size + size] != theirs[i * size : i * size + size]]


Range = tuple[bytes, int, int]
"""An account, the first and the last seq."""


def behind(mine: Heads, theirs: Heads) -> tuple[list[Range], list[bytes]]:
    """What ``theirs`` has and ``mine`` lacks: ranges (account, first seq, last seq) and channels with higher claims."""
    have, paid = dict(mine.accounts), dict(mine.channels)
    ranges = [(key, have.get(key, 0) + 1, seq) for key, seq in theirs.accounts if seq > have.get(key, 0)]
    channels = [key for key, amount in theirs.channels if amount > paid.get(key, 0)]
    return ranges, channels


def lacking(state: State, theirs: Heads) -> tuple[list[Range], list[bytes]]:
    """What ``theirs`` has and this state neither applied nor keeps waiting. A channel that is closed here, or whose
    entry is not known yet, is not asked for."""
    ranges = []
    for key, seq in theirs.accounts:
        account = state.accounts.get(key)
        first = account.seq + 1 if account is not None else 1
        waiting = state.waiting_entries.get(key, ())
        while first <= seq and first in waiting:
            first += 1
        if first <= seq:
            ranges.append((key, first, seq))
    channels = []
    for key, amount in theirs.channels:
        channel = state.channels.get(key)
        if amount > state.claimed(key) and (channel is None or channel.closed_at is None):
            channels.append(key)
    return ranges, channels


def slices(ranges: Sequence[Range], *, ranges_max: int, objects_max: int) -> Iterator[list[Range]]:
    """Ranges in requests of at most so many ranges and objects; long ranges are cut."""
    request: list[Range] = []
    room = objects_max
    for account, first, last in ranges:
        while first <= last:
            end = min(last, first + room - 1)
            request.append((account, first, end))
            room -= end - first + 1
            first = end + 1
            if not room or len(request) == ranges_max:
                yield request
                request, room = [], objects_max
    if request:
        yield request
