"""What the rest of RiOS sees of the network: small types and three Protocols.

``p2p/network.py`` implements them over libp2p, ``p2p/memory.py`` in memory with a seed. Nothing above ``p2p`` knows
which one it talks to.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager as AsyncContext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from config.vocabulary import PeerId
from p2p.core.advert import Advert, SignedAdvert
from p2p.core.identity import Identity

Buffer = bytes | bytearray | memoryview
Header = Mapping[str, Any]
"""msgpack map with string keys; values are None, bool, int, float, str, bytes, lists and maps of these."""


# Call and Reply are made for every call, hence not frozen: that would cost as much as the rest of the making
@dataclass(slots=True)
class Call:
    """An incoming call. ``deadline`` is a trio time; work past it is of no use to the caller. ``trace`` is the caller's
    W3C traceparent or empty; calls made while this one is served carry it on. ``followed``: more has arrived on its
    connection already and waits behind it."""

    peer_id: PeerId
    method: str
    header: dict[str, Any]
    buffers: tuple[memoryview, ...]
    deadline: float
    trace: str = ""
    followed: bool = False


@dataclass(slots=True)
class Reply:
    """An answer: a header and raw byte buffers (tensors). Buffers are not copied on their way."""

    header: Header
    buffers: Sequence[Buffer] = ()


Handler = Callable[[Call], Awaitable[Reply]]
"""Serves one unary call. A :class:`config.errors.RiosError` it raises reaches the caller with code, message and hint;
anything else is logged and reaches the caller as code ``internal``. It runs under a cancel scope that ends at the
call's deadline or when the caller cancels."""

Quick = Callable[[Call], Reply | None]
"""Serves a call at once, in the connection's reader: it must take microseconds and never block. None: let the
:data:`Handler` do it, in a task."""

StreamHandler = Callable[[Call, Callable[[Reply], Awaitable[None]]], Awaitable[Header]]
"""Serves a streaming call: sends items with its second argument (which waits while the caller is slow) and returns the
header that ends the stream. Errors, deadline and cancellation are as for :data:`Handler`."""


class Items(Protocol):
    """The answer of a streaming call, item by item."""

    end: Header | None
    """The header that ended the stream, once the iteration is over."""

    def __aiter__(self) -> AsyncIterator[Reply]:
        """Iterate over it."""

    async def __anext__(self) -> Reply:
        """The next item."""


GossipHandler = Callable[[PeerId, bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class ContentFile:
    """A file named by its content: whole-file sha256 (hex), size, and the sha256 (raw 32 bytes each) of every 1 MiB
    chunk in order (the last may be shorter)."""

    sha256: str
    size_bytes: int
    chunks: tuple[bytes, ...]


class BlobSource(Protocol):
    """Where this node's chunks are. Called in a worker thread."""

    def read_chunk(self, digest: bytes) -> bytes | None:
        """The chunk with this sha256, or None."""


class Blobs(Protocol):
    """Content-addressed files between peers."""

    def offer(self, source: BlobSource) -> None:
        """Serve what ``source`` holds."""

    async def fetch(
        self,
        file: ContentFile,
        target: Path,
        providers: Callable[[], Sequence[PeerId]],
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Bring ``file`` to ``target`` from several providers at once; resumes from ``target`` + ``.part``.

        ``providers`` is asked again whenever peers fail; ``progress`` gets the number of new bytes verified. Every
        chunk is verified before it is written, the whole file before it gets its name. Raises RemoteError
        (``unavailable``) when nobody has it, LocalError (``disk_full``) when the disk is full.
        """


@dataclass(frozen=True, slots=True)
class RecordRule:
    """What makes a DHT record of one namespace valid (raises RiosError if not), and which of several wins (index)."""

    check: Callable[[str, bytes], None]
    select: Callable[[str, Sequence[bytes]], int]


class Directory(Protocol):
    """Verified adverts: a local view that answers at once and is kept fresh in the background."""

    def adverts(self) -> Mapping[PeerId, Advert]:
        """Every unexpired advert, this node's own included. A read-only view of the moment."""

    def update(self, change: Callable[[Advert], Advert]) -> None:
        """Change this node's own advert; it is signed and published soon after (changes are collected briefly)."""

    def own(self) -> Advert:
        """This node's own advert."""

    async def wait_change(self) -> None:
        """Return after the next change of the view (not of loads alone)."""

    def providers(self, model_id: str, index: int) -> Sequence[PeerId]:
        """Who serves the shard at ``index`` of the manifest's list, as far as the local view knows: answers at once.
        Linked peers come first."""

    async def find_providers(self, model_id: str, index: int | None = None) -> Sequence[PeerId]:
        """The same (or, without ``index``, who serves anything of the model); if the view knows nobody, linked peers
        and the DHT are asked and what they name is added to the view (seconds: never on the hot path). Raises
        RequestError for what is no model id or index."""

    def distance_ms(self, peer_id: PeerId) -> float | None:
        """The round trip to a peer: measured where there is a link, else estimated; None if nothing is known."""

    def accept_records(self, namespace: str, rule: RecordRule) -> None:
        """Take part in storing records of a namespace; without a rule its records are neither put nor kept."""

    async def put_record(self, namespace: str, key: str, value: bytes) -> None:
        """Store a small value in the DHT under ``/rios/<namespace>/<key>`` (verified by the caller's own rules)."""

    async def get_record(self, namespace: str, key: str) -> bytes | None:
        """Read such a value back."""


class LeftError(Exception):
    """Raised by a wait that was left: the call goes on."""


class Pending(Protocol):
    """A call that was sent and that nobody need wait for yet."""

    answered_ns: int
    """``perf_counter_ns`` when its answer came; 0 before."""

    async def wait(self) -> Reply:
        """The answer; once. Raises as :meth:`Network.call`; a cancelled wait cancels the call."""

    def leave(self) -> None:
        """End the wait that is under way with :class:`LeftError`; the call goes on and may be waited for again. Does
        nothing once the answer has come."""

    def cancel(self) -> None:
        """Nobody wants the answer any more. Does nothing once it has come."""


class Network(Protocol):
    """Everything a node needs of the network."""

    @property
    def identity(self) -> Identity:
        """This node's key."""

    @property
    def directory(self) -> Directory:
        """Who is there."""

    @property
    def blobs(self) -> Blobs:
        """Files between peers."""

    @property
    def peer_id(self) -> PeerId:
        """This node's peer id."""

    def serve(self, method: str, handler: Handler, *, quick: Quick | None = None) -> None:
        """Register the handler of a method (``expert.run``, ``ledger.submit``, ...); ``quick`` is asked first."""

    def serve_stream(self, method: str, handler: StreamHandler) -> None:
        """Register the handler of a method that is called with :meth:`stream`."""

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
        """Call a peer. Raises RemoteError (``deadline``, ``unavailable`` if it cannot be reached or the link broke,
        or the code the peer answered with) or BusyError. Calling oneself runs the handler directly. ``bulk`` calls
        (megabytes in the background) never stand in the way of others."""

    def begin(
        self, peer_id: PeerId, method: str, header: Header, buffers: Sequence[Buffer] = (), *, deadline_ms: int
    ) -> Pending | None:
        """:meth:`call` in two steps, so that several calls are on their way without a task each: it is sent before
        this returns. None if that would have to wait, for a link or for room: then :meth:`call` does it. What is begun
        must be waited for or cancelled."""

    def stream(
        self,
        peer_id: PeerId,
        method: str,
        header: Header,
        buffers: Sequence[Buffer] = (),
        *,
        deadline_ms: int,
        bulk: bool = False,
    ) -> AsyncContext["Items"]:
        """Call a method that answers with a stream: ``async with network.stream(...) as items: async for reply in
        items: ...``. Leaving the block early cancels the call there. Errors are raised as by :meth:`call`, the peer's
        where the iteration meets them."""

    async def publish(self, topic: str, payload: bytes) -> None:
        """Gossip a small message (<= 64 KiB). Best effort: what must arrive has its own anti-entropy."""

    def subscribe(self, topic: str, handler: GossipHandler) -> None:
        """Receive a topic's messages; the peer id is the one whose signature the message carries."""

    def peers(self) -> Sequence[PeerId]:
        """Peers with a live link right now."""

    def statistics(self) -> Mapping[str, Any]:
        """Numbers for ``rios status`` and metrics, JSON-able."""


__all__ = [
    "Advert",
    "BlobSource",
    "Blobs",
    "Buffer",
    "Call",
    "ContentFile",
    "Directory",
    "GossipHandler",
    "Handler",
    "Header",
    "Items",
    "LeftError",
    "Network",
    "Pending",
    "Quick",
    "RecordRule",
    "Reply",
    "SignedAdvert",
    "StreamHandler",
]
