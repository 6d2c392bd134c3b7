"""Spreads final objects: gossip for new ones, anti-entropy for whatever gossip missed.

Everything that comes in is verified by the book first. A round with one peer goes both ways: what this node lacks is
fetched, what the peer lacks is pushed. All requests and answers are bounded; what does not fit comes next round.
"""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TypeVar

import msgspec
import trio

from config.errors import IntegrityError, RiosError
from config.vocabulary import PeerId
from ledger.book import Book
from ledger.core import certificate as certificates
from ledger.core.objects import Certificate, Count, Key
from ledger.core.sync import BUCKETS, DIGEST_BYTES, Digests, Heads, behind, differing
from p2p.core import codec
from p2p.face import Call, Network, Reply

GOSSIP_BYTES_MAX = 60 << 10
OUTBOX_MAX = 4096
ANSWER_BYTES_MAX = 1 << 20
ANSWER_OBJECTS_MAX = 256
ASK_MAX = 1024
HEADS_BYTES_MAX = 32 << 20
PASSES_MAX = 64
DEADLINE_MS = 10_000
ROUND_SECONDS_MAX = 60.0
"""A round is given up after that, so that a slow peer does not keep the others' news away."""

_T = TypeVar("_T")

_pack = msgspec.msgpack.Encoder().encode
_ranges = msgspec.msgpack.Decoder(list[tuple[Key, Count, Count]])
_blobs = msgspec.msgpack.Decoder(list[bytes])


class Replicator:
    """Gossip and anti-entropy of one node."""

    def __init__(self, network: Network, book: Book, sync_seconds: float) -> None:
        self._network = network
        self._book = book
        self._sync_seconds = sync_seconds
        self._digests = Digests(book.state)
        self._outbox: deque[bytes] = deque(maxlen=OUTBOX_MAX)
        self._wake = trio.Event()
        self._random = random.Random()
        self.topic = f"ledger.{book.genesis.net.hex()}"
        self.rounds = 0
        self.failed_rounds = 0
        network.subscribe(self.topic, self._gossip)
        network.serve("ledger.buckets", self._serve_buckets)
        network.serve("ledger.heads", self._serve_heads)
        network.serve("ledger.fetch", self._serve_fetch)
        network.serve("ledger.push", self._serve_push)

    # gossip

    def announce(self, new: Sequence[Certificate]) -> None:
        """Send certificates formed here to everybody, soon. The oldest are dropped when too many wait."""
        for certificate in new:
            data = certificates.encode(certificate)
            if len(data) <= GOSSIP_BYTES_MAX:
                self._outbox.append(data)
        self._wake.set()

    async def run(self) -> None:
        """Gossip and anti-entropy until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_gossip)
            nursery.start_soon(self._run_sync)

    async def _run_gossip(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            for message in self._messages():
                await self._network.publish(self.topic, message)

    def _messages(self) -> Iterator[bytes]:
        group: list[bytes] = []
        size = 0
        while self._outbox:
            if group and size + len(self._outbox[0]) > GOSSIP_BYTES_MAX:
                yield _pack(group)
                group, size = [], 0
            group.append(self._outbox.popleft())
            size += len(group[-1]) + 5
        if group:
            yield _pack(group)

    async def _gossip(self, peer_id: PeerId, payload: bytes) -> None:
        try:
            await self._book.learn([certificates.decode(data) for data in _decoded(_blobs, payload)])
        except IntegrityError:
            self._book.refused += 1

    # anti-entropy, the side that asks

    async def _run_sync(self) -> None:
        while True:
            await self._book.retry()
            peers = list(self._network.peers())
            if peers:
                try:
                    with trio.move_on_after(ROUND_SECONDS_MAX):
                        await self.sync_with(self._random.choice(peers))
                except RiosError:
                    self.failed_rounds += 1
            await trio.sleep(self._sync_seconds * self._random.uniform(0.5, 1.5))

    async def sync_with(self, peer_id: PeerId) -> bool:
        """One round with a peer; whether both now have the same.

        Raises RiosError when the peer fails or sends nonsense.
        """
        self.rounds += 1
        last = b""
        for _ in range(PASSES_MAX):
            reply = await self._network.call(
                peer_id, "ledger.buckets", {"net": self._book.genesis.net}, deadline_ms=DEADLINE_MS
            )
            theirs = reply.header.get("buckets")
            if not isinstance(theirs, bytes) or len(theirs) != BUCKETS * DIGEST_BYTES:
                raise IntegrityError("integrity", f"{peer_id} sent malformed digests")
            mine = self._digests.buckets()
            different = differing(mine, theirs)
            if not different:
                return True
            if mine + theirs == last:
                return False
            last = mine + theirs
            await self._exchange(peer_id, different)
        return False

    async def _exchange(self, peer_id: PeerId, buckets: list[int]) -> None:
        reply = await self._network.call(
            peer_id, "ledger.heads", {"net": self._book.genesis.net, "buckets": buckets}, deadline_ms=DEADLINE_MS
        )
        if len(reply.buffers) != 1:
            raise IntegrityError("integrity", f"{peer_id} sent malformed heads")
        theirs = codec.decode(Heads, bytes(reply.buffers[0]), bytes_max=HEADS_BYTES_MAX)
        mine = self._digests.heads(buckets)
        ranges, channels = behind(mine, theirs)
        if ranges or channels:
            ask = {"net": self._book.genesis.net, "ranges": _pack(ranges[:ASK_MAX])}
            fetched = await self._network.call(
                peer_id, "ledger.fetch", ask | {"channels": channels[:ASK_MAX]}, deadline_ms=DEADLINE_MS
            )
            await self._book.learn([certificates.decode(bytes(data)) for data in fetched.buffers[:ANSWER_OBJECTS_MAX]])
        ranges, channels = behind(theirs, mine)
        give = list(self._collect(ranges[:ASK_MAX], channels[:ASK_MAX]))
        if give:
            await self._network.call(
                peer_id, "ledger.push", {"net": self._book.genesis.net}, give, deadline_ms=DEADLINE_MS
            )

    # anti-entropy, the side that is asked

    def _collect(self, ranges: Sequence[tuple[bytes, int, int]], channels: Sequence[bytes]) -> Iterator[bytes]:
        """Encoded certificates, as many as one answer may hold."""
        store, state, left, count = self._book.store, self._book.state, ANSWER_BYTES_MAX, ANSWER_OBJECTS_MAX
        # only what is known to be there is looked up: a stranger's ranges may name anything, at no cost to itself
        wanted = chain(
            (
                store.entry_certificate(account, seq)
                for account, first, last in ranges
                if (known := state.accounts.get(account)) is not None
                for seq in _span(first, min(last, known.seq))
            ),
            (store.claim_certificate(channel) for channel in channels if channel in state.channels),
        )
        for certificate in wanted:
            if certificate is None:
                continue
            data = certificates.encode(certificate)
            left -= len(data)
            count -= 1
            if left < 0 or count < 0:
                return
            yield data

    def _check_net(self, call: Call) -> None:
        if call.header.get("net") != self._book.genesis.net:
            raise RiosError("conflict", "this node belongs to another ledger network", "compare the genesis files")

    async def _serve_buckets(self, call: Call) -> Reply:
        self._check_net(call)
        return Reply({"buckets": self._digests.buckets()})

    async def _serve_heads(self, call: Call) -> Reply:
        self._check_net(call)
        buckets = call.header.get("buckets")
        if not isinstance(buckets, list) or not all(type(b) is int and 0 <= b < BUCKETS for b in buckets):
            raise RiosError("invalid_request", "'buckets' must be bucket numbers")
        return Reply({}, [codec.encode(self._digests.heads(sorted(set(buckets))))])

    async def _serve_fetch(self, call: Call) -> Reply:
        self._check_net(call)
        ranges = _decoded(_ranges, call.header.get("ranges"))
        channels = call.header.get("channels")
        if len(ranges) > ASK_MAX or not isinstance(channels, list) or len(channels) > ASK_MAX:
            raise RiosError("invalid_request", f"ask for at most {ASK_MAX} ranges and channels")
        if not all(isinstance(channel, bytes) for channel in channels):
            raise RiosError("invalid_request", "'channels' must be ids")
        return Reply({}, list(self._collect(ranges, channels)))

    async def _serve_push(self, call: Call) -> Reply:
        self._check_net(call)
        if len(call.buffers) > ANSWER_OBJECTS_MAX:
            raise RiosError("invalid_request", f"push at most {ANSWER_OBJECTS_MAX} objects")
        new = await self._book.learn([certificates.decode(bytes(data)) for data in call.buffers])
        return Reply({"new": len(new)})


def _span(first: int, last: int) -> range:
    first = max(1, first)
    return range(first, min(last, first + ANSWER_OBJECTS_MAX - 1) + 1)


def _decoded(decoder: "msgspec.msgpack.Decoder[list[_T]]", data: object) -> "list[_T]":
    if not isinstance(data, bytes):
        raise IntegrityError("integrity", "a field of the message is missing")
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:
        raise IntegrityError("integrity", f"malformed message: {error}") from error
