"""Content-addressed files between peers: serve chunks, fetch files from several peers at once.

Invariants:
1. A chunk is verified before it is written, the whole file before it gets its name; the file is synced before that.
2. A fetch that was ended in any way (also kill -9) goes on from its ``.part`` file: whatever verifies in it is kept.
3. A peer that sent wrong bytes is not asked again in this fetch.
"""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import trio

from config.errors import BusyError, IntegrityError, LocalError, RemoteError, RiosError
from config.vocabulary import PeerId
from p2p.core.chunks import CHUNK_BYTES, Plan, chunk_count, chunk_span
from p2p.face import BlobSource, Buffer, Call, ContentFile, Header, Reply

log = logging.getLogger(__name__)

PER_PEER_MAX = 3
PEERS_MAX = 8
READS_MAX = 4
CHUNK_DEADLINE_MS = 20_000
FAILURES_MAX = 2
BUSY_MAX = 30
"""Times in a row a peer may say busy before it is left for a round."""
ROUNDS_S = (0.3, 1.0, 2.0)
"""Pauses after which providers are asked again while none of them gives anything."""


class Caller(Protocol):
    """What blobs need of the network."""

    async def call(
        self, peer_id: PeerId, method: str, header: Header, buffers: Sequence[Buffer] = (), *, deadline_ms: int
    ) -> Reply:
        """Call a peer."""


class PeerBlobs:
    """:class:`p2p.face.Blobs` over calls."""

    def __init__(self, caller: Caller, own: PeerId) -> None:
        self._caller = caller
        self._own = own
        self._sources: list[BlobSource] = []
        self._reads = trio.CapacityLimiter(READS_MAX)
        self.served_bytes = 0
        self.fetched_bytes = 0

    def offer(self, source: BlobSource) -> None:
        """Serve what ``source`` holds."""
        self._sources.append(source)

    async def serve_get(self, call: Call) -> Reply:
        """``blob.get``: the chunk with ``digest``, or ``not_found``."""
        digest = call.header.get("digest")
        if not isinstance(digest, bytes) or len(digest) != 32:
            raise IntegrityError("protocol", "blob.get: 'digest' must be 32 bytes")
        for source in self._sources:
            chunk = await trio.to_thread.run_sync(source.read_chunk, digest, limiter=self._reads)
            if chunk is not None:
                self.served_bytes += len(chunk)
                return Reply({}, [chunk])
        raise RemoteError("not_found", f"this node has no chunk {digest.hex()}")

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
        if await trio.to_thread.run_sync(_is_complete, target, file):
            progress(file.size_bytes)
            return
        part = target.with_name(target.name + ".part")
        with _disk(part, file.size_bytes):
            handle, missing = await trio.to_thread.run_sync(_open_part, part, file)
            try:
                progress(file.size_bytes - sum(chunk_span(index, file.size_bytes)[1] for index in missing))
                await _Fetch(self, file, target, handle, missing, providers, progress).run()
                await trio.to_thread.run_sync(_finish, handle, part, target, file)
            finally:
                os.close(handle)

    async def get(self, peer_id: PeerId, digest: bytes) -> memoryview:
        """One chunk from one peer, not verified."""
        reply = await self._caller.call(peer_id, "blob.get", {"digest": digest}, deadline_ms=CHUNK_DEADLINE_MS)
        if len(reply.buffers) != 1:
            raise IntegrityError("protocol", f"{peer_id} answered blob.get with {len(reply.buffers)} buffers")
        return memoryview(reply.buffers[0])

    def is_own(self, peer_id: PeerId) -> bool:
        """Whether this is the node itself."""
        return peer_id == self._own


class _Fetch:
    """One file on its way."""

    def __init__(
        self,
        blobs: PeerBlobs,
        file: ContentFile,
        target: Path,
        handle: int,
        missing: Sequence[int],
        providers: Callable[[], Sequence[PeerId]],
        progress: Callable[[int], None],
    ) -> None:
        self._blobs = blobs
        self._file = file
        self._target = target
        self._handle = handle
        self._plan: Plan[PeerId] = Plan(missing, per_peer_max=PER_PEER_MAX)
        self._providers = providers
        self._progress = progress
        self._liars: set[PeerId] = set()
        self._failures: dict[PeerId, int] = {}
        self._in_vain: dict[PeerId, int] = {}
        """Rounds in which a peer was asked and gave nothing."""
        self._asked: set[PeerId] = set()
        self._gave: set[PeerId] = set()
        self._freed = trio.Event()
        self._last_error = "no provider is known"

    async def run(self) -> None:
        """Until nothing is missing; RemoteError ``unavailable`` if nobody gives anything for a while."""
        fruitless = 0
        while not self._plan.done:
            before = len(self._plan.missing)
            peers = self._next_peers()
            self._asked.clear()
            self._gave.clear()
            async with trio.open_nursery() as nursery:
                for peer_id in peers:
                    self._plan.add(peer_id)
                    self._failures[peer_id] = 0
                    for _ in range(PER_PEER_MAX):
                        nursery.start_soon(self._work, peer_id)
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
                count = len(self._plan.missing)
                message = f"{self._target.name}: {count} chunks are with no peer that answers ({self._last_error})"
                raise RemoteError("unavailable", message, "it goes on where it stopped once a provider is back")
            await trio.sleep(ROUNDS_S[max(0, fruitless - 1)])

    def _next_peers(self) -> list[PeerId]:
        """Whom to ask in a round: those who gave nothing so far stand behind, so that they do not crowd others out."""
        peers = [p for p in self._providers() if p not in self._liars and not self._blobs.is_own(p)]
        return sorted(peers, key=lambda peer: self._in_vain.get(peer, 0))[:PEERS_MAX]

    async def _work(self, peer_id: PeerId) -> None:
        """Ask one peer for chunk after chunk until it has no more for us or fails."""
        busy = 0
        while self._failures[peer_id] < FAILURES_MAX:
            index = self._plan.take(peer_id)
            if index is None:
                if not self._plan.may_get(peer_id):
                    return
                await self._freed.wait()  # what another peer does not give falls to this one
                continue
            self._asked.add(peer_id)
            try:
                await self._bring(peer_id, index)
                self._failures[peer_id] = busy = 0
                self._gave.add(peer_id)
            except BusyError as error:
                self._plan.again(index)
                self._last_error = error.message
                busy += 1
                if busy >= BUSY_MAX:
                    break
                self._wake()
                await trio.sleep(min(max(error.retry_after_ms, 20), 2000) / 1000)
            except IntegrityError as error:
                log.warning("peer %s sends wrong chunks: %s", peer_id, error)
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
                    self._plan.again(index)
                    self._failures[peer_id] += 1
            finally:
                self._wake()
        self._plan.drop(peer_id)
        self._wake()

    def _wake(self) -> None:
        event, self._freed = self._freed, trio.Event()
        event.set()

    async def _bring(self, peer_id: PeerId, index: int) -> None:
        digest = self._file.chunks[index]
        at, size = chunk_span(index, self._file.size_bytes)
        chunk = await self._blobs.get(peer_id, digest)
        if len(chunk) != size:
            raise IntegrityError(
                "integrity", f"chunk {index} of {self._target.name} has {len(chunk)} bytes, not {size}"
            )
        await trio.to_thread.run_sync(partial(_write_verified, self._handle, at, chunk, digest))
        self._plan.arrived(index)
        self._blobs.fetched_bytes += size
        self._progress(size)


class _disk:
    """Maps what the file system raises."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        flat = _leaf(error)
        if isinstance(flat, OSError):
            if flat.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                message = f"the disk is full: {self._path} needs {self._size_bytes} bytes"
                raise LocalError("disk_full", message, "free some space; the download goes on from there") from error
            raise LocalError("local", f"cannot write {self._path}: {flat.strerror or flat}") from error
        if isinstance(flat, RiosError) and flat is not error:
            raise flat from error


def _leaf(error: BaseException | None) -> BaseException | None:
    """The one error inside nested exception groups (the first of several)."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _is_complete(target: Path, file: ContentFile) -> bool:
    try:
        if target.stat().st_size != file.size_bytes:
            return False
        with target.open("rb") as handle:
            return _digest(handle.fileno()) == file.sha256
    except FileNotFoundError:
        return False


def _digest(handle: int) -> str:
    hasher, at = sha256(), 0
    while data := os.pread(handle, CHUNK_BYTES, at):
        hasher.update(data)
        at += len(data)
    return hasher.hexdigest()


def _open_part(part: Path, file: ContentFile) -> tuple[int, list[int]]:
    """The file being written and the chunks it still lacks."""
    part.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        have = os.fstat(handle)
        if have.st_size > file.size_bytes:
            os.ftruncate(handle, file.size_bytes)
        missing = []
        for index, digest in enumerate(file.chunks):
            at, size = chunk_span(index, file.size_bytes)
            if at >= have.st_size or sha256(os.pread(handle, size, at)).digest() != digest:
                missing.append(index)
        needed = sum(chunk_span(index, file.size_bytes)[1] for index in missing)
        if shutil.disk_usage(part.parent).free + have.st_blocks * 512 < needed:
            raise OSError(errno.ENOSPC, "not enough space")
    except BaseException:
        os.close(handle)
        raise
    return handle, missing


def _write_verified(handle: int, at: int, chunk: memoryview, digest: bytes) -> None:
    if sha256(chunk).digest() != digest:
        raise IntegrityError("integrity", f"a chunk does not have the hash {digest.hex()}")
    while chunk:
        count = os.pwrite(handle, chunk, at)
        at, chunk = at + count, chunk[count:]


def _finish(handle: int, part: Path, target: Path, file: ContentFile) -> None:
    """Verify the whole, sync it, give it its name."""
    os.ftruncate(handle, file.size_bytes)
    if _digest(handle) != file.sha256:
        part.unlink(missing_ok=True)
        raise IntegrityError("integrity", f"{target.name}: the chunks do not make the file {file.sha256}")
    os.fsync(handle)
    os.replace(part, target)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
