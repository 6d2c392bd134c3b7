"""Spreads final objects: gossip for new ones, anti-entropy for whatever gossip missed.

Everything that comes in is verified by the book first. A round with one peer goes both ways: what this node lacks is
fetched, what the peer lacks is pushed. All requests and answers are bounded; what does not fit comes next round.
"""

import random
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import msgspec
import trio

from config.errors import IntegrityError, RemoteError, RiosError
from config.vocabulary import PeerId
from ledger.book import Book
from ledger.core import certificate as certificates
from ledger.core.objects import Certificate, Count, Key
from ledger.core.sync import BUCKETS, DIGEST_BYTES, Digests, Heads, Range, behind, differing, lacking, slices
from p2p.core import codec
from p2p.face import Call, Network, Reply

GOSSIP_BYTES_MAX = 60 << 10
OUTBOX_MAX = 4096
ANSWER_BYTES_MAX = 1 << 20
ANSWER_OBJECTS_MAX = 256
ASK_MAX = 1024
HEADS_BYTES_MAX = 32 << 20
BUCKETS_AT_ONCE = 16
GIVEN_MAX = 4096
"""Objects pushed to one peer in one round."""
PASSES_MAX = 16
DEADLINE_MS = 10_000
SHUNNED_MAX = 1024
USELESS_MAX = 3
"""Answers in a row without anything new (gossip may have been faster) until a peer is taken to lie."""
PROGRESS_MIN = 1000
"""Entries in a round: a peer that gave so many before its time was over is not slow."""
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
        book.replaced.append(self._digests.rebuild)
        self._outbox: deque[bytes] = deque(maxlen=OUTBOX_MAX)
        self.before_round: Callable[[Collection[PeerId]], Awaitable[bool]] | None = None
        """Asked before every round, with the peers that said of late that they keep only what is above a checkpoint;
        False: not yet. It takes as long as it needs: a checkpoint does not come in the time of a round."""
        self._pruned: set[PeerId] = set()
        self._wake = trio.Event()
        self._random = random.Random()
        self.topic = f"ledger.{book.genesis.net.hex()}"
        self.rounds = 0
        self.failed_rounds = 0
        self.answers = 0
        self.fetched_bytes = 0
        self._shunned: dict[PeerId, tuple[int, float]] = {}
        network.subscribe(self.topic, self._gossip)
        network.serve("ledger.buckets", self._serve_buckets)
        network.serve("ledger.heads", self._serve_heads)
        network.serve("ledger.fetch", self._serve_fetch)
        network.serve("ledger.push", self._serve_push)

    @property
    def network(self) -> Network:
        """Where the peers are."""
        return self._network

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
            if self._network.peers() and await self._is_ready() and (peer_id := self._next_peer()) is not None:
                before = self._book.state.applied
                with trio.move_on_after(ROUND_SECONDS_MAX) as limit:
                    await self._try_sync(peer_id)
                if limit.cancelled_caught:
                    if self._book.state.applied - before >= PROGRESS_MIN:
                        continue  # there was much to fetch: go on, with whomever
                    self._shun(peer_id)  # slow; what came of it is kept
            await trio.sleep(self._sync_seconds * self._random.uniform(0.5, 1.5))

    async def _is_ready(self) -> bool:
        pruned, self._pruned = self._pruned, set()
        return self.before_round is None or await self.before_round(pruned)

    async def _try_sync(self, peer_id: PeerId) -> None:
        try:
            await self.sync_with(peer_id)
            self._shunned.pop(peer_id, None)
        except RiosError:
            self.failed_rounds += 1
            self._shun(peer_id)

    def _next_peer(self) -> PeerId | None:
        """A peer at random, of those that did not fail lately if there are such."""
        peers, now = list(self._network.peers()), trio.current_time()
        good = [peer for peer in peers if peer not in self._shunned or self._shunned[peer][1] < now]
        return self._random.choice(good or peers) if peers else None

    def _shun(self, peer_id: PeerId) -> None:
        """Ask others first, for longer every time. The oldest is forgotten when too many are shunned."""
        times = min(8, self._shunned.pop(peer_id, (0, 0.0))[0] + 1)
        self._shunned[peer_id] = times, trio.current_time() + self._sync_seconds * 2**times
        if len(self._shunned) > SHUNNED_MAX:
            del self._shunned[next(iter(self._shunned))]

    async def sync_with(self, peer_id: PeerId) -> bool:
        """One round with a peer; whether both now have the same.

        Raises RiosError when the peer fails or sends nonsense.
        """
        self.rounds += 1
        last = b""
        for _ in range(PASSES_MAX):
            theirs = await self._digests_of(peer_id)
            mine = self._digests.buckets()
            different = differing(mine, theirs)
            if not different:
                return True
            if mine + theirs == last:
                return False
            last = mine + theirs
            await self._exchange(peer_id, self._in_order(different))
        return False

    async def _digests_of(self, peer_id: PeerId) -> bytes:
        header = {"net": self._book.genesis.net}
        reply = await self._network.call(peer_id, "ledger.buckets", header, deadline_ms=DEADLINE_MS)
        theirs = reply.header.get("buckets")
        if not isinstance(theirs, bytes) or len(theirs) != BUCKETS * DIGEST_BYTES:
            raise IntegrityError("integrity", f"{peer_id} sent malformed digests")
        return theirs

    def _in_order(self, buckets: Sequence[int]) -> list[int]:
        """Those first from which all money and all committees come: what builds on them then need not wait."""
        committees = self._book.state.committees
        first = {self._book.genesis.root[0], *(issuer[0] for issuer in committees.issuers)}
        return sorted(buckets, key=lambda bucket: (bucket not in first, bucket))

    async def _exchange(self, peer_id: PeerId, buckets: list[int]) -> None:
        """Both ways, some buckets at a time."""
        given = 0
        while buckets:
            theirs, covered = await self._heads_of(peer_id, buckets[:BUCKETS_AT_ONCE])
            asked, buckets = buckets[:covered], buckets[covered:]
            await self._pull(peer_id, theirs, asked)
            if given < GIVEN_MAX:
                given += await self._give(peer_id, asked, theirs)

    async def _heads_of(self, peer_id: PeerId, buckets: Sequence[int]) -> tuple[Heads, int]:
        header = {"net": self._book.genesis.net, "buckets": list(buckets)}
        reply = await self._network.call(peer_id, "ledger.heads", header, deadline_ms=DEADLINE_MS)
        covered = reply.header.get("covered", len(buckets))  # an older version always answers for all of them
        if len(reply.buffers) != 1 or type(covered) is not int or not 0 < covered <= len(buckets):
            raise IntegrityError("integrity", f"{peer_id} sent malformed heads")
        return codec.decode(Heads, bytes(reply.buffers[0]), bytes_max=HEADS_BYTES_MAX), covered

    async def _pull(self, peer_id: PeerId, theirs: Heads, buckets: Sequence[int]) -> None:
        """Fetch what this node lacks of these heads. While one answer is verified the next one is on its way."""
        ranges, _ = lacking(self._book.state, theirs)
        issuers = self._book.state.committees.issuers
        ranges.sort(key=lambda each: each[0] not in issuers)
        await self._fetch_all(peer_id, ({"ranges": part} for part in _requests(ranges)))
        _, channels = lacking(self._book.state, theirs)  # some were opened by what just came
        if self._book.state.waiting_entries:
            channels += self._digests.maybe_closed(theirs, buckets)
        parts = [channels[i : i + ANSWER_OBJECTS_MAX] for i in range(0, len(channels), ANSWER_OBJECTS_MAX)]
        await self._fetch_all(peer_id, ({"channels": part} for part in parts))

    async def _fetch_all(self, peer_id: PeerId, requests: Iterable[Mapping[str, Any]]) -> None:
        """``requests`` may have no end (a peer that lies about its heads): it ends at answers that are of no use."""
        useless = 0
        send, receive = trio.open_memory_channel[Reply](1)
        failure: RiosError | None = None

        async def fetch() -> None:
            nonlocal failure
            with send:
                for request in requests:
                    try:
                        await self._fetch(peer_id, request, send)
                    except RiosError as error:
                        failure = error
                        return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch)
            with receive:
                async for reply in receive:
                    try:
                        useless = 0 if await self._take(peer_id, reply) else useless + 1
                        if useless >= USELESS_MAX or (useless and not reply.buffers):
                            raise IntegrityError("integrity", f"{peer_id} sends nothing of what it says it has")
                    except RiosError as error:
                        failure = error
                        nursery.cancel_scope.cancel()
                        break
        if failure is not None:
            raise failure  # outside of the nursery, which would wrap it

    async def _fetch(self, peer_id: PeerId, request: Mapping[str, Any], send: "trio.MemorySendChannel[Reply]") -> None:
        """One request, in as many answers as it takes: answers are bounded in bytes as well as in objects."""
        ranges, channels = list(request.get("ranges", ())), list(request.get("channels", ()))
        while ranges or channels:
            header = {"net": self._book.genesis.net, "ranges": _pack(ranges), "channels": channels}
            reply = await self._network.call(peer_id, "ledger.fetch", header, deadline_ms=DEADLINE_MS, bulk=True)
            count = len(reply.buffers)
            self.fetched_bytes += sum(map(len, reply.buffers))
            await send.send(reply)
            more = reply.header.get("more") is True
            if not more or not count:
                return
            ranges, channels = _rest(ranges, channels, count)

    async def _take(self, peer_id: PeerId, reply: Reply) -> bool:
        """Learn an answer; False if there was nothing new in it."""
        if len(reply.buffers) > ANSWER_OBJECTS_MAX:
            raise IntegrityError("integrity", f"{peer_id} sent {len(reply.buffers)} objects at once")
        self.answers += 1
        new = await self._book.learn([certificates.decode(bytes(data)) for data in reply.buffers])
        if reply.header.get("pruned") is True:
            self._pruned.add(peer_id)
            raise RemoteError("unavailable", f"{peer_id} keeps only what is above a checkpoint", peer_id=peer_id)
        return bool(new)

    async def _give(self, peer_id: PeerId, buckets: Sequence[int], theirs: Heads) -> int:
        """Push what the peer lacks in these buckets, bounded: the rest it fetches itself. How many objects."""
        mine, _ = self._digests.heads(buckets)
        ranges, channels = behind(theirs, mine)
        give = [data for data, over in self._collect(ranges[:ASK_MAX], channels[:ASK_MAX]) if not over]
        if give:
            header = {"net": self._book.genesis.net}
            await self._network.call(peer_id, "ledger.push", header, give, deadline_ms=DEADLINE_MS, bulk=True)
        return len(give)

    # anti-entropy, the side that is asked

    def _collect(
        self, ranges: Sequence[tuple[bytes, int, int]], channels: Sequence[bytes]
    ) -> Iterator[tuple[bytes, bool]]:
        """Encoded certificates, as many as one answer may hold, and whether something is left over after each."""
        store, state, left, count = self._book.store, self._book.state, ANSWER_BYTES_MAX, ANSWER_OBJECTS_MAX
        # only what is known to be there is looked up: a stranger's ranges may name anything, at no cost to itself
        wanted = chain(
            chain.from_iterable(
                store.entry_certificates(account, max(1, first), min(last, known.seq), ANSWER_OBJECTS_MAX)
                for account, first, last in ranges
                if (known := state.accounts.get(account)) is not None
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
                yield b"", True
                return
            yield data, False

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
        heads, covered = self._digests.heads(dict.fromkeys(buckets))
        return Reply({"covered": covered}, [codec.encode(heads)])

    async def _serve_fetch(self, call: Call) -> Reply:
        self._check_net(call)
        ranges = _decoded(_ranges, call.header.get("ranges"))
        channels = call.header.get("channels")
        if len(ranges) > ASK_MAX or not isinstance(channels, list) or len(channels) > ASK_MAX:
            raise RiosError("invalid_request", f"ask for at most {ASK_MAX} ranges and channels")
        if not all(isinstance(channel, bytes) for channel in channels):
            raise RiosError("invalid_request", "'channels' must be ids")
        found, more = [], False
        pruned = any(first <= self._book.pruned_below.get(account, 0) for account, first, _ in ranges)
        for data, over in self._collect(ranges, channels):
            if over:
                more = True
            else:
                found.append(data)
        return Reply({"more": more, "pruned": pruned}, found)

    async def _serve_push(self, call: Call) -> Reply:
        self._check_net(call)
        if len(call.buffers) > ANSWER_OBJECTS_MAX:
            raise RiosError("invalid_request", f"push at most {ANSWER_OBJECTS_MAX} objects")
        new = await self._book.learn([certificates.decode(bytes(data)) for data in call.buffers])
        return Reply({"new": len(new)})


def _requests(ranges: Sequence[Range]) -> Iterator[list[Range]]:
    return slices(ranges, ranges_max=ASK_MAX, objects_max=ANSWER_OBJECTS_MAX)


def _rest(ranges: list[Range], channels: list[bytes], count: int) -> tuple[list[Range], list[bytes]]:
    """What is left of a request of which the first ``count`` objects came."""
    rest: list[Range] = []
    for account, first, last in ranges:
        taken = min(count, last - first + 1)
        count -= taken
        if first + taken <= last:
            rest.append((account, first + taken, last))
    return rest, channels[count:]


def _decoded(decoder: "msgspec.msgpack.Decoder[list[_T]]", data: object) -> "list[_T]":
    if not isinstance(data, bytes):
        raise IntegrityError("integrity", "a field of the message is missing")
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:
        raise IntegrityError("integrity", f"malformed message: {error}") from error
