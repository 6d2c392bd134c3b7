"""One file on its way here, from several peers at once.

Every peer gets a few workers; each asks for one chunk after the other, the rarest first. A worker that has nothing left
to ask for helps: it asks for a chunk that another peer keeps us waiting for, and the first answer counts.

Invariants:
1. A peer that sent wrong bytes is blamed and not asked again in this fetch.
2. How long a chunk may take follows from how long the peer's chunks took (:data:`CHUNK_SECONDS` bound it).
3. It ends: with the file complete, or with ``unavailable`` after a bounded number of rounds in which nobody gave
   anything.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from config.errors import BusyError, IntegrityError, LocalError, RemoteError, RiosError
from config.vocabulary import PeerId
from p2p.core.chunks import Plan
from p2p.partfile import PartFile

log = logging.getLogger(__name__)

PER_PEER_MAX = 3
PEERS_MAX = 8
CHUNK_SECONDS = (5.0, 20.0, 120.0)
"""Least, first and most time for one chunk."""
CHUNK_TIMES = 10.0
"""A chunk may take so many times what the peer's chunks take."""
PATIENCE_SECONDS = (0.5, 2.0)
"""When a chunk is late enough for help: at least; and where nothing is known yet."""
PATIENCE_TIMES = 3.0
FAILURES_MAX = 2
BUSY_MAX = 30
"""Times in a row a peer may say busy before it is left for a round."""
BUSY_SECONDS_MAX = 10.0
ROUNDS_S = (0.3, 1.0, 2.0)
"""Pauses after which providers are asked again while none of them gives anything."""
PARTS_SECONDS = 1.0
"""Time between questions to a peer that is fetching the same file what it has now."""
PARTS_PATIENCE_SECONDS = 5.0
"""So long such a peer may have nothing new before it is left for a round."""


class Source(Protocol):
    """Where chunks come from: :class:`p2p.blobs.PeerBlobs`."""

    async def get(self, peer_id: PeerId, digest: bytes, deadline_s: float) -> memoryview:
        """One chunk from one peer, not verified."""

    async def parts(self, peer_id: PeerId, sha256: str, count: int) -> frozenset[int] | None:
        """The chunks a peer has of a file that it is fetching itself; None if it is not."""

    async def my_turn(self) -> None:
        """Wait until the download limit allows another chunk."""

    def spend(self, size_bytes: int) -> None:
        """Count a chunk against the download limit."""

    def fetched(self, peer_id: PeerId, size_bytes: int) -> None:
        """A chunk arrived."""

    def blame(self, peer_id: PeerId, fault: str) -> None:
        """A peer misbehaved."""


class Fetch:
    """One file being fetched. :meth:`run` until it returns."""

    def __init__(
        self,
        source: Source,
        part: PartFile,
        providers: Callable[[], Sequence[PeerId]],
        progress: Callable[[int], None],
    ) -> None:
        self.part = part
        self._source = source
        self._file = part.file
        self._plan: Plan[PeerId] = Plan(part.missing, per_peer_max=PER_PEER_MAX)
        self._providers = providers
        self._progress = progress
        self._liars: set[PeerId] = set()
        self._failures: dict[PeerId, int] = {}
        self._in_vain: dict[PeerId, int] = {}
        """Rounds in which a peer was asked and gave nothing."""
        self._asked: set[PeerId] = set()
        self._gave: set[PeerId] = set()
        self._took_s: dict[PeerId, float] = {}
        """How long a peer's chunks take, smoothed."""
        self._limit_s: dict[PeerId, float] = {}
        self._scopes: dict[int, dict[PeerId, trio.CancelScope]] = {}
        self._freed = trio.Event()
        self._advanced_at = trio.current_time()
        self._last_error = "no provider is known"

    async def run(self) -> None:
        """Until nothing is missing; RemoteError ``unavailable`` if nobody gives anything for a while."""
        fruitless = 0
        while not self._plan.done:
            before = len(self._plan.missing)
            await self._round(self._next_peers())
            if self._plan.done:
                return
            for peer_id in self._plan.peers():
                self._plan.drop(peer_id)
            self._plan.forget_lacks()
            for peer_id in self._asked - self._gave:
                self._in_vain[peer_id] = self._in_vain.get(peer_id, 0) + 1
            if any(peer_id not in self._in_vain for peer_id in self._next_peers()):
                continue  # somebody was not asked yet
            fruitless = fruitless + 1 if len(self._plan.missing) == before else 0
            if fruitless > len(ROUNDS_S):
                count, name = len(self._plan.missing), self.part.target.name
                message = f"{name}: {count} chunks are with no peer that answers ({self._last_error})"
                raise RemoteError("unavailable", message, "it goes on where it stopped once a provider is back")
            await trio.sleep(ROUNDS_S[max(0, fruitless - 1)])

    def _next_peers(self) -> list[PeerId]:
        """Whom to ask in a round: those who gave nothing so far stand behind, so that they do not crowd others out."""
        peers = [p for p in self._providers() if p not in self._liars]
        return sorted(peers, key=lambda peer: self._in_vain.get(peer, 0))[:PEERS_MAX]

    async def _round(self, peers: Sequence[PeerId]) -> None:
        """Work with these peers until all is here or none of them gives any more. Raises what a disk said."""
        self._asked.clear()
        self._gave.clear()
        failures: list[LocalError] = []

        async def work(peer_id: PeerId) -> None:
            try:
                await self._work(peer_id)
            except LocalError as error:
                failures.append(error)
                workers.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as workers:
                for peer_id in peers:
                    self._plan.add(peer_id)
                    self._failures[peer_id] = 0
                    self._advanced_at = trio.current_time()
                    nursery.start_soon(self._watch_parts, peer_id)
                    for _ in range(PER_PEER_MAX):
                        workers.start_soon(work, peer_id)
            nursery.cancel_scope.cancel()
        if failures:
            raise failures[0]

    async def _watch_parts(self, peer_id: PeerId) -> None:
        """Keep up with what a peer has that is fetching the same file."""
        while peer_id in self._plan.peers():
            try:
                parts = await self._source.parts(peer_id, self._file.sha256, len(self._file.chunks))
            except RiosError as error:
                log.debug("what %s has of %s: %s", peer_id, self.part.target.name, error)
                return
            if parts is None:
                return
            self._plan.has_only(peer_id, parts)
            self._wake()
            await trio.sleep(PARTS_SECONDS)

    async def _work(self, peer_id: PeerId) -> None:
        """Ask one peer for chunk after chunk until it has no more for us or fails."""
        busy = 0
        while self._failures[peer_id] < FAILURES_MAX and not self._plan.done:
            index = await self._next_chunk(peer_id)
            if index is None:
                if not self._may_go_on(peer_id):
                    return
                with trio.move_on_after(self._patience()):
                    await self._freed.wait()  # what another peer does not give falls to this one
                continue
            self._asked.add(peer_id)
            try:
                if await self._bring(peer_id, index):
                    self._failures[peer_id] = busy = 0
                    self._gave.add(peer_id)
                else:
                    self._failed(peer_id, index)
            except BusyError as error:
                self._plan.again(index, peer_id)
                self._last_error = error.message
                busy += 1
                if busy >= BUSY_MAX:
                    break
                self._wake()
                await trio.sleep(min(max(error.retry_after_ms / 1000, 0.02), BUSY_SECONDS_MAX))
            except IntegrityError as error:
                log.warning("peer %s sends wrong chunks: %s", peer_id, error)
                self._source.blame(peer_id, "bad_chunk" if error.code == "integrity" else "protocol")
                self._last_error = error.message
                self._liars.add(peer_id)
                break
            except LocalError:
                raise
            except RiosError as error:
                self._last_error = error.message
                if error.code == "not_found":
                    self._plan.lacks(peer_id, index)
                else:
                    self._failed(peer_id, index)
            finally:
                self._wake()
        self._plan.drop(peer_id)
        self._wake()

    async def _next_chunk(self, peer_id: PeerId) -> int | None:
        await self._source.my_turn()
        now = trio.current_time()
        index = self._plan.take(peer_id, now)
        if index is None:
            index = self._plan.help(peer_id, now, self._patience())
        if index is not None:
            self._source.spend(self.part.size_of(index))
        return index

    def _may_go_on(self, peer_id: PeerId) -> bool:
        """Whether a peer that can give nothing now may be of use later in this round."""
        if self._plan.may_get(peer_id):
            return True
        late = trio.current_time() - self._advanced_at > PARTS_PATIENCE_SECONDS
        return self._plan.is_partial(peer_id) and not late

    def _patience(self) -> float:
        """After how long a chunk is late."""
        if not self._took_s:
            return PATIENCE_SECONDS[1]
        return max(PATIENCE_SECONDS[0], PATIENCE_TIMES * sorted(self._took_s.values())[len(self._took_s) // 2])

    def _failed(self, peer_id: PeerId, index: int) -> None:
        """No answer, or a later one than somebody else's."""
        self._plan.again(index, peer_id)
        self._failures[peer_id] += 1
        _, first, most = CHUNK_SECONDS
        self._limit_s[peer_id] = min(most, 2 * self._limit_s.get(peer_id, first))

    def _wake(self) -> None:
        event, self._freed = self._freed, trio.Event()
        event.set()

    async def _bring(self, peer_id: PeerId, index: int) -> bool:
        """Get a chunk from a peer; False if somebody else's came first."""
        began = trio.current_time()
        limit_s = self._limit_s.get(peer_id, CHUNK_SECONDS[1])
        scopes = self._scopes.setdefault(index, {})
        with trio.CancelScope() as scope:
            scopes[peer_id] = scope
            try:
                chunk = await self._source.get(peer_id, self._file.chunks[index], limit_s)
                await trio.to_thread.run_sync(self.part.write, index, chunk)
            finally:
                scopes.pop(peer_id, None)
        if scope.cancelled_caught:
            return False
        self._arrived(peer_id, index, trio.current_time() - began)
        return True

    def _arrived(self, peer_id: PeerId, index: int, spent_s: float) -> None:
        known = self._took_s.get(peer_id, spent_s)
        self._took_s[peer_id] = took_s = known + 0.3 * (spent_s - known)
        least, _, most = CHUNK_SECONDS
        self._limit_s[peer_id] = min(max(least, CHUNK_TIMES * took_s), most)
        if self._plan.arrived(index):
            size = self.part.size_of(index)
            self._advanced_at = trio.current_time()
            self._source.fetched(peer_id, size)
            self._progress(size)
        for other in self._scopes.pop(index, {}).values():
            other.cancel()
