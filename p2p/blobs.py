"""Content-addressed files between peers: serve chunks, fetch files (``fetch``), within this node's own limits.

Owns: the RPCs ``blob.get`` and ``blob.have``, the limits, what is being fetched. A file on its way is served as far as
it is here, so that nodes that fetch the same file help each other.

Invariants:
1. What is sent was verified when it came, or is checked against its hash when it is read (the source's promise).
2. Over any span of time no more goes out (comes in) than the limit allows and a burst: a second's worth, or a chunk,
   and one chunk more.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import trio

from config.errors import BusyError, ConfigError, IntegrityError, RemoteError
from config.vocabulary import PeerId
from p2p.core.advert import bitmap
from p2p.core.buckets import Bucket
from p2p.core.chunks import CHUNK_BYTES, chunk_count
from p2p.face import BlobSource, Buffer, Call, ContentFile, Header, Reply
from p2p.fetch import Fetch
from p2p.partfile import PartFile, is_complete

log = logging.getLogger(__name__)

READS_MAX = 4
PER_PEER_MAX = 16
"""Chunks that one peer is being given at a time: its requests are small, and what it does not read waits in memory."""
BUSY_MS = 100
LIMIT_MIN = 64 << 10
PARTS_DEADLINE_MS = 2000
UPLOAD_WAIT_SECONDS_MAX = 5.0
"""Longer than that nobody waits here for his chunk: he is told when to come again."""


class Caller(Protocol):
    """What blobs need of the network."""

    async def call(
        self,
        peer_id: PeerId,
        method: str,
        header: Header,
        buffers: Sequence[Buffer] = (),
        *,
        deadline_ms: int,
        bulk: bool = False,
    ) -> Reply:
        """Call a peer; ``bulk``: on the channel that gives way to calls."""


class PeerBlobs:
    """:class:`p2p.face.Blobs` over calls. The limits are bytes per second, 0: none. Raises ConfigError for one that is
    too small for a chunk to arrive before its deadline."""

    def __init__(
        self,
        caller: Caller,
        own: PeerId,
        *,
        upload_max: int = 0,
        download_max: int = 0,
        blame: Callable[[PeerId, str], None] = lambda peer_id, fault: None,
    ) -> None:
        self._caller = caller
        self._own = own
        self._sources: list[BlobSource] = []
        self._fetches: list[Fetch] = []
        self._giving: Counter[PeerId] = Counter()
        self._reads = trio.CapacityLimiter(READS_MAX)
        self._upload_max = upload_max
        self._upload = _bucket("p2p.blob_upload_bytes_per_second_max", upload_max)
        self._download = _bucket("p2p.blob_download_bytes_per_second_max", download_max)
        self._turn = trio.Lock()
        self.blame = blame
        self.served_bytes = 0
        self.fetched_bytes = 0
        self.limited: Counter[str] = Counter()
        """How often a limit made somebody wait, by its setting."""

    def statistics(self) -> dict[str, Any]:
        """Numbers for status and metrics."""
        return {
            "served_bytes": self.served_bytes,
            "fetched_bytes": self.fetched_bytes,
            "fetching": len(self._fetches),
            "limited": dict(self.limited),
        }

    # -- answers to others

    def offer(self, source: BlobSource) -> None:
        """Serve what ``source`` holds."""
        self._sources.append(source)

    async def serve_get(self, call: Call) -> Reply:
        """``blob.get``: the chunk with ``digest``, or ``not_found``; ``busy`` where the upload limit is far away, or
        for a peer that asks for very much at once."""
        if self._giving[call.peer_id] >= PER_PEER_MAX:
            self.limited["chunks_per_peer"] += 1
            message = f"{PER_PEER_MAX} chunks are being given to this peer (limit: chunks_per_peer)"
            raise BusyError(message, "ask for fewer at a time", retry_after_ms=BUSY_MS)
        self._giving[call.peer_id] += 1
        try:
            return await self._give(call)
        finally:
            self._giving[call.peer_id] -= 1
            if not self._giving[call.peer_id]:
                del self._giving[call.peer_id]

    async def _give(self, call: Call) -> Reply:
        digest = call.header.get("digest")
        if not isinstance(digest, bytes) or len(digest) != 32:
            raise IntegrityError("protocol", "blob.get: 'digest' must be 32 bytes")
        allowed_at = self._reserve_upload(call)
        for read in [*(fetch.part.read for fetch in self._fetches), *(s.read_chunk for s in self._sources)]:
            chunk = await trio.to_thread.run_sync(read, digest, limiter=self._reads)
            if chunk is not None:
                self._give_back(CHUNK_BYTES - len(chunk))
                await trio.sleep_until(allowed_at)
                self.served_bytes += len(chunk)
                return Reply({}, [chunk])
        self._give_back(CHUNK_BYTES)
        raise RemoteError("not_found", f"this node has no chunk {digest.hex()}")

    async def serve_have(self, call: Call) -> Reply:
        """``blob.have``: the chunks of a file that is on its way here, as a bitmap; empty if it is not."""
        name = call.header.get("file")
        for fetch in self._fetches:
            if fetch.part.file.sha256 == name:
                return Reply({"chunks": bitmap(fetch.part.held.copy())})
        return Reply({})

    def _reserve_upload(self, call: Call) -> float:
        """Set a chunk's bytes aside; the time at which they may leave. Raises BusyError if that is too late."""
        now = trio.current_time()
        if self._upload is None:
            return now
        ahead_s, chunk_s = self._upload.wait_s(now), CHUNK_BYTES / self._upload_max
        if ahead_s > min(UPLOAD_WAIT_SECONDS_MAX, max(0.0, call.deadline - now - chunk_s)):
            self.limited["blob_upload_bytes_per_second_max"] += 1
            message = "p2p.blob_upload_bytes_per_second_max of this node is used up"
            raise BusyError(message, "ask another provider", retry_after_ms=int(ahead_s * 1000))
        wait_s = self._upload.spend(CHUNK_BYTES, now)
        self.limited["blob_upload_bytes_per_second_max"] += wait_s > 0
        return now + wait_s

    def _give_back(self, size_bytes: int) -> None:
        """What was set aside and is not sent."""
        if self._upload is not None and size_bytes:
            self._upload.spend(-size_bytes, trio.current_time())

    # -- fetching

    async def fetch(
        self,
        file: ContentFile,
        target: Path,
        providers: Callable[[], Sequence[PeerId]],
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """See :meth:`p2p.face.Blobs.fetch`."""
        if len(file.chunks) != chunk_count(file.size_bytes):
            raise IntegrityError("integrity", f"{target.name}: {len(file.chunks)} chunks for {file.size_bytes} bytes")
        if await trio.to_thread.run_sync(is_complete, target, file):
            progress(file.size_bytes)
            return
        part = await trio.to_thread.run_sync(PartFile, file, target)

        def others() -> Sequence[PeerId]:
            return [peer for peer in providers() if peer != self._own]

        fetch = Fetch(self, part, others, progress)
        self._fetches.append(fetch)
        try:
            progress(file.size_bytes - sum(part.size_of(index) for index in part.missing))
            await fetch.run()
            await trio.to_thread.run_sync(part.finish)
        finally:
            self._fetches.remove(fetch)
            part.close()

    async def get(self, peer_id: PeerId, digest: bytes, deadline_s: float) -> memoryview:
        """One chunk from one peer, not verified."""
        reply = await self._caller.call(
            peer_id, "blob.get", {"digest": digest}, deadline_ms=max(1, int(deadline_s * 1000)), bulk=True
        )
        if len(reply.buffers) != 1:
            raise IntegrityError("protocol", f"{peer_id} answered blob.get with {len(reply.buffers)} buffers")
        return memoryview(reply.buffers[0])

    async def parts(self, peer_id: PeerId, sha256: str, count: int) -> frozenset[int] | None:
        """The chunks a peer has of a file that it is fetching itself; None if it is not."""
        reply = await self._caller.call(peer_id, "blob.have", {"file": sha256}, deadline_ms=PARTS_DEADLINE_MS)
        bits = reply.header.get("chunks")
        if not isinstance(bits, bytes):
            return None
        return frozenset(index for index in range(min(count, 8 * len(bits))) if bits[index // 8] >> index % 8 & 1)

    async def my_turn(self) -> None:
        """Wait until the download limit allows another chunk."""
        if self._download is None:
            return
        async with self._turn:
            while wait_s := self._download.wait_s(trio.current_time()):
                self.limited["blob_download_bytes_per_second_max"] += 1
                await trio.sleep(wait_s)

    def spend(self, size_bytes: int) -> None:
        """Count a chunk against the download limit."""
        if self._download is not None:
            self._download.spend(size_bytes, trio.current_time())

    def fetched(self, peer_id: PeerId, size_bytes: int) -> None:
        """A chunk arrived and is verified."""
        self.fetched_bytes += size_bytes


def _bucket(name: str, bytes_per_second_max: int) -> Bucket | None:
    if not bytes_per_second_max:
        return None
    if bytes_per_second_max < LIMIT_MIN:
        hint = f"{LIMIT_MIN} at least, or 0 for no limit"
        raise ConfigError("config", f"{name} = {bytes_per_second_max}: no chunk would arrive in time", hint)
    return Bucket(bytes_per_second_max, max(bytes_per_second_max, CHUNK_BYTES))
