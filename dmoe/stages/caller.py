"""Sequences over stages wherever their replicas are: embedding and head here, whole layers at their hosts.

Owns: passes over several sequences, second tries, rebuilding caches elsewhere. Does not own: one pass through a chain
(``chain``), the choice of hosts (``directions``), caches here (``host``).

Sequences whose stages are at the same peers share a pass's messages. The stream is rounded to the manifest's wire dtype
before every stage and behind the last, wherever each runs, so that all routes over the same stages give the same bits.
A sequence keeps its tokens: a cache that is lost is rebuilt by sending them again, from the first position that a stage
lacks through the stages up to that one, and nothing in the answer shows it.

Invariants:
1. A pass is all or nothing: if it raises or is cancelled, no sequence has changed.
2. Which peers compute, in one try or several, does not change a bit of the outputs.
3. Tries are bounded, in number and in time; when nobody is left for a stage, the error names stage and layers.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import trio

from config.errors import BusyError, RemoteError, RequestError, RiosError
from config.vocabulary import PeerId
from dmoe import runner as seam
from dmoe.core import stagecalls, wire
from dmoe.core.dispatch import PEER_WIDE, Dispatcher
from dmoe.core.manifest import Manifest
from dmoe.core.stagecalls import OpenCall
from dmoe.core.wire import FloatRows
from dmoe.jobs import now_us
from dmoe.ports import Buyer, Quote
from dmoe.purse import Purse
from dmoe.runner import Feed, Want
from dmoe.stages.chain import Account, Chains, Link, Rows, StageError, Way
from dmoe.stages.directions import Directions
from dmoe.stages.host import StageHost
from dmoe.stages.loaded import LoadedStage
from dmoe.stages.segment import Ends
from dmoe.stages.sequence import Leg, StageSequence, spread_report
from p2p.face import Network

log = logging.getLogger(__name__)

CHUNK_ROWS = 256
"""Rows of one sequence in one message: bounds the length of a step at a host."""
TRIES_MAX = 8
BUSY_WAIT_SECONDS_MAX = 2.0
GIVEN_UP_SECONDS = 5.0
"""So long after a pass found nobody, others do not probe again: each answer of a failed pass is tried alone, and all of
them together shall not take many times as long."""
OPEN_TIMEOUT_MS = 5_000
CLOSE_TIMEOUT_MS = 5_000
PEER_FAULTS = frozenset(("unavailable", "deadline", "protocol", "integrity", "payment_required"))
"""Failures that say something about the peer, not about one of its stages."""
CALLER_FAULTS = frozenset(("invalid_request", "context_length_exceeded", "too_large"))
LOST = frozenset(("not_found", "conflict"))
"""The peer is well, but does not have what this node thinks it has."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What all stage runners of a node use."""

    network: Network
    host: StageHost
    chains: Chains
    directions: Directions
    dispatcher: Dispatcher
    purse: Purse
    timeout_ms: int
    measured: Callable[[str, Account], None] = lambda model_id, account: None
    may_forward: bool = True


class StageCaller:
    """Makes runners. :meth:`run` must be running while they are used."""

    def __init__(
        self,
        network: Network,
        host: StageHost,
        directions: Directions,
        dispatcher: Dispatcher,
        *,
        buyer: Buyer | None = None,
        timeout_ms: int = 10_000,
        measured: Callable[[str, Account], None] = lambda model_id, account: None,
        may_forward: bool = True,
    ) -> None:
        chains = Chains(network, buyer)
        self.shared = Shared(
            network, host, chains, directions, dispatcher, Purse(buyer), timeout_ms, measured, may_forward
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self.shared.chains.nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self.shared.chains.nursery = None

    def fault(self, manifest: Manifest) -> RiosError | None:
        """Why a model cannot be run by its stages now, or None."""
        try:
            self.shared.directions.path(manifest, {}, {}, resting=True)
        except RiosError as error:
            return error
        return None

    def runner(self, manifest: Manifest, ends: Ends, load: Callable[[int], LoadedStage]) -> "StageRunner":
        """A model by its stages. ``load`` opens one in this process (called in a thread)."""
        return StageRunner(self.shared, manifest, ends, load)


class StageRunner:
    """A model over stages (:class:`dmoe.runner.Runner`)."""

    def __init__(self, shared: Shared, manifest: Manifest, ends: Ends, load: Callable[[int], LoadedStage]) -> None:
        self._shared = shared
        self._manifest = manifest
        self._ends = ends
        self._load = load
        self._me = shared.network.peer_id
        self._own: dict[int, LoadedStage] = {}
        self._loading = trio.Lock()
        self._refused: dict[int, dict[PeerId, float]] = {}
        """Stage -> peers that failed it lately, and until when they are passed over."""
        self._given_up: tuple[float, RiosError | None] = (0.0, None)
        """Until when nobody who rests is probed, and what the last tries ended with."""

    # --- sequences

    async def open(self, capacity: int, *, like: seam.Sequence | None = None, length: int = 0) -> StageSequence:
        """See :class:`dmoe.runner.Runner`."""
        context = self._manifest.architecture.context
        if not 1 <= capacity <= context:
            message = f"{capacity} tokens do not fit the model's context of {context}"
            raise RequestError("context_length_exceeded", message)
        sequence = StageSequence(capacity, self._let_go)
        if like is not None:
            assert isinstance(like, StageSequence)
            assert 0 <= length <= min(like.length, capacity)
            sequence.tokens = like.tokens[:length]
            sequence.hub = like.hub
        try:
            try:
                await self._complete(sequence, like if isinstance(like, StageSequence) else None)
            except StageError as failed:
                self._blame(failed, [sequence])  # the next pass tries others
        except BaseException:
            sequence.close()
            raise
        return sequence

    async def _complete(self, sequence: StageSequence, like: StageSequence | None = None) -> None:
        """Open the legs that a sequence lacks. Raises StageError, or RemoteError ``no_replica``."""
        stages = range(len(self._manifest.stages))
        missing = [stage for stage in stages if stage not in sequence.legs]
        if not missing:
            return
        fixed = {stage: leg.link.peer for stage, leg in (like or sequence).legs.items()}
        path = self._path(fixed)
        failed: list[StageError] = []

        async def open_leg(stage: int) -> None:
            source = like.legs.get(stage) if like is not None else None
            try:
                await self._open_leg(sequence, stage, path[stage], source)
            except StageError as error:
                failed.append(error)

        async with trio.open_nursery() as nursery:
            for stage in missing:
                nursery.start_soon(open_leg, stage)
        if failed:
            raise failed[0]

    def _path(self, fixed: dict[int, PeerId]) -> list[PeerId]:
        """A peer for every stage; where nobody else is left, one that rests after a failure: better a probe than an
        error."""
        refused = self._refused_now()
        for stage, peer in fixed.items():
            refused[stage].discard(peer)  # what stands, stands: only its own failure drops it
        try:
            return self._shared.directions.path(self._manifest, fixed, refused)
        except RemoteError:
            until, error = self._given_up
            if error is not None and trio.current_time() < until:
                raise error from None
            return self._shared.directions.path(self._manifest, fixed, {}, resting=True)

    async def _open_leg(self, sequence: StageSequence, stage: int, peer: PeerId, like: Leg | None) -> None:
        shard = self._manifest.stages[stage]
        quote = self._quote_of(peer)
        link = Link(stage, peer, shard.layers, shard.flops_per_row, b"", quote)
        if like is not None and like.link.peer == peer:
            try:
                leg = await self._ticket(sequence, link, like, min(like.held, sequence.length))
            except StageError as error:
                if error.error.code not in LOST:
                    raise
                leg = await self._ticket(sequence, link, None, 0)
        else:
            leg = await self._ticket(sequence, link, None, 0)
        sequence.legs[stage] = leg
        self._shared.directions.legs[peer] += 1

    async def _ticket(self, sequence: StageSequence, link: Link, like: Leg | None, length: int) -> Leg:
        try:
            if link.peer == self._me:
                source = like.here if like is not None else None
                token = source.token if source is not None and not source.closed else b""
                stage = await self._stage_here(link.stage)
                held = length if token else 0
                ticket = await self._shared.host.open(stage, self._me, sequence.capacity, like=token, length=held)
                return Leg(link, ticket.token, ticket, held)
            return await self._ticket_there(sequence, link, like, length)
        except RiosError as error:
            raise StageError(link, error) from error

    async def _ticket_there(self, sequence: StageSequence, link: Link, like: Leg | None, length: int) -> Leg:
        shared, channel = self._shared, b""
        with trio.move_on_after(OPEN_TIMEOUT_MS / 1000) as scope:
            channel = await shared.purse.channel(link.peer, link.quote)
            try:
                return await self._ask_ticket(sequence, link, channel, like, length)
            except RemoteError as error:
                if error.code != "payment_required" or shared.purse.buyer is None:
                    raise
            channel = await shared.purse.channel(link.peer, link.quote, reopen=True)
            return await self._ask_ticket(sequence, link, channel, like, length)
        assert scope.cancelled_caught
        raise RemoteError("deadline", f"{link.peer} gave no ticket in {OPEN_TIMEOUT_MS} ms", peer_id=link.peer)

    async def _ask_ticket(
        self, sequence: StageSequence, link: Link, channel: bytes, like: Leg | None, length: int
    ) -> Leg:
        asked = OpenCall(
            model_id=self._manifest.model_id,
            layers=link.layers,
            capacity=sequence.capacity,
            quote=link.quote.number,
            channel=channel,
            like=like.ticket if like is not None else b"",
            length=length if like is not None else 0,
        )
        header = stagecalls.open_header(asked)
        reply = await self._shared.network.call(link.peer, stagecalls.OPEN, header, deadline_ms=OPEN_TIMEOUT_MS)
        ticket = reply.header.get("ticket")
        if not isinstance(ticket, bytes) or len(ticket) != stagecalls.TICKET_BYTES:
            raise RemoteError("protocol", f"{link.peer} gave a ticket that is none", peer_id=link.peer)
        paid = Link(link.stage, link.peer, link.layers, link.flops_per_row, channel, link.quote)
        return Leg(paid, ticket, None, asked.length)

    async def _stage_here(self, index: int) -> LoadedStage:
        """A stage in this process: the one that is served, or one of this runner's own."""
        served = self._shared.host.local(self._manifest.model_id, self._manifest.stages[index].layers)
        if served is not None:
            return served
        async with self._loading:
            if index not in self._own:
                self._own[index] = await trio.to_thread.run_sync(self._load, index)
            return self._own[index]

    def _quote_of(self, peer: PeerId) -> Quote:
        advert = self._shared.network.directory.adverts().get(peer)
        offer = advert.offer(self._manifest.model_id) if advert is not None else None
        if offer is None:
            return Quote(0, 0, 0)
        return Quote(offer.quote, offer.microcredits_per_tflop, offer.microcredits_per_kv_unit)

    def _let_go(self, leg: Leg) -> None:
        """Free a leg's cache, here or there, without waiting for it."""
        legs = self._shared.directions.legs
        legs[leg.link.peer] -= 1
        if leg.here is not None:
            self._shared.host.close(leg.here)
        elif self._shared.chains.nursery is not None:
            self._shared.chains.nursery.start_soon(self._close_there, leg)

    async def _close_there(self, leg: Leg) -> None:
        header = {"tickets": [leg.ticket]}
        try:
            await self._shared.network.call(leg.link.peer, stagecalls.CLOSE, header, deadline_ms=CLOSE_TIMEOUT_MS)
        except RiosError as error:
            log.debug("closing a ticket at %s: %s; it expires there", leg.link.peer, error)

    # --- passes

    async def forward(self, feeds: Items[Feed]) -> list[FloatRows]:
        """See :class:`dmoe.runner.Runner`."""
        for feed in feeds:
            self._check(feed)
        found: dict[int, FloatRows] = {}
        todo = list(range(len(feeds)))
        limit = trio.current_time() + 2 * self._pass_seconds(len(self._manifest.stages))
        for attempt in range(TRIES_MAX):
            failures: list[StageError] = []
            await self._ready([_sequence_of(feeds[n]) for n in todo], failures)
            if not failures:
                await self._all(feeds, todo, found, failures)
            todo = [n for n in todo if n not in found]
            if not todo:
                break
            for failed in failures:
                self._blame(failed, [_sequence_of(feeds[n]) for n in todo])
            if attempt == TRIES_MAX - 1 or trio.current_time() > limit:
                raise self._exhausted(failures)
            await self._pause(failures, attempt)
        for feed in feeds:
            sequence = _sequence_of(feed)
            sequence.tokens += feed.tokens
            for leg in sequence.legs.values():
                leg.held = sequence.length
        return [found[n] for n in range(len(feeds))]

    def _check(self, feed: Feed) -> None:
        sequence = _sequence_of(feed)
        assert not sequence.closed, "the sequence is closed"
        assert 0 <= feed.outputs <= len(feed.tokens)
        vocab = self._manifest.architecture.vocab
        if not feed.tokens or min(feed.tokens) < 0 or max(feed.tokens) >= vocab:
            raise RequestError("invalid_request", f"token ids must be one or more numbers within 0..{vocab - 1}")
        total = sequence.length + len(feed.tokens)
        if total > sequence.capacity:
            message = f"{total} tokens do not fit the sequence's {sequence.capacity} positions"
            raise RequestError("context_length_exceeded", message)

    async def _ready(self, sequences: Sequence[StageSequence], failures: list[StageError]) -> None:
        """Every leg open, and everything before the pass in its cache."""
        behind = [s for s in sequences if len(s.legs) < len(self._manifest.stages) or self._lacking(s) is not None]
        if not behind:
            return

        async def ready(sequence: StageSequence) -> None:
            try:
                await self._complete(sequence)
                await self._replay(sequence)
            except StageError as error:
                failures.append(error)

        await _together([partial(ready, sequence) for sequence in behind])

    def _lacking(self, sequence: StageSequence) -> int | None:
        """The last stage whose cache lacks positions."""
        lacking = [stage for stage, leg in sequence.legs.items() if leg.held < sequence.length]
        return max(lacking, default=None)

    async def _replay(self, sequence: StageSequence) -> None:
        """Send a sequence's tokens again, through the stages up to the last that lacks some."""
        last = self._lacking(sequence)
        if last is None:
            return
        sequence.retries += 1
        legs = [sequence.legs[stage] for stage in range(last + 1)]
        start = min(leg.held for leg in legs)
        log.debug("%d positions are computed again through %d stages", sequence.length - start, last + 1)
        for first in range(start, sequence.length, CHUNK_ROWS):
            tokens = sequence.tokens[first : first + CHUNK_ROWS]
            work = _Work(sequence, first, tuple(tokens), 0)
            await self._through([work], range(last + 1), self._embedded(tokens))
            for leg in legs:
                leg.held = first + len(tokens)

    async def _all(
        self, feeds: Items[Feed], todo: list[int], found: dict[int, FloatRows], failures: list[StageError]
    ) -> None:
        """One try of what is still to be done; sequences at the same peers together."""

        def key(n: int) -> tuple[object, ...]:
            sequence = _sequence_of(feeds[n])
            legs = [sequence.legs[stage].link for stage in range(len(self._manifest.stages))]
            return (sequence.hub, *((link.peer, link.channel) for link in legs))

        async def group(members: list[int]) -> None:
            try:
                outputs = await self._group([feeds[n] for n in members])
            except StageError as error:
                failures.append(error)
            else:
                found.update(zip(members, outputs, strict=True))

        ordered = sorted(todo, key=lambda n: (str(key(n)), n))
        groups = [list(members) for _, members in groupby(ordered, key=key)]
        await _together([partial(group, members) for members in groups])

    async def _group(self, feeds: Items[Feed]) -> list[FloatRows]:
        """The outputs of feeds whose sequences are at the same peers."""
        kept: list[list[FloatRows]] = [[] for _ in feeds]
        longest = max(len(feed.tokens) for feed in feeds)
        for start in range(0, longest, CHUNK_ROWS):
            work, owners = [], []
            for n, feed in enumerate(feeds):
                tokens = feed.tokens[start : start + CHUNK_ROWS]
                if not tokens:
                    continue
                after = len(feed.tokens) - start - len(tokens)  # rows of this feed that are still to come
                outputs = max(0, min(len(tokens), feed.outputs - after))
                sequence = _sequence_of(feed)
                work.append(_Work(sequence, sequence.length + start, tokens, outputs))
                owners.append(n)
            x = self._embedded([token for each in work for token in each.tokens])
            x = await self._through(work, range(len(self._manifest.stages)), x)
            first = 0
            for n, each in zip(owners, work, strict=True):
                kept[n].append(x[first : first + each.outputs])
                first += each.outputs
        return await self._outputs(feeds, kept)

    async def _outputs(self, feeds: Items[Feed], kept: list[list[FloatRows]]) -> list[FloatRows]:
        """The head over all rows that are wanted, those of one kind together."""
        rows = [np.concatenate(each) for each in kept]
        found: list[FloatRows] = [np.zeros((0, 0), np.float32)] * len(feeds)
        wants: tuple[Want, ...] = ("logits", "hidden")
        for want in wants:
            members = [n for n, feed in enumerate(feeds) if feed.want == want]
            if not members:
                continue
            out = await self._head(np.concatenate([rows[n] for n in members]), want)
            first = 0
            for n in members:
                found[n] = out[first : first + len(rows[n])]
                first += len(rows[n])
        return found

    def _pass_seconds(self, stages: int) -> float:
        """How long one way through so many stages may take."""
        return self._shared.timeout_ms * (1 + stages) / 1000

    def _embedded(self, tokens: Items[int]) -> FloatRows:
        rows: FloatRows = self._ends.embedding.gather(np.array(tokens, np.int64))
        return rows

    async def _head(self, rows: FloatRows, want: Want) -> FloatRows:
        if self._ends.is_quick(len(rows)):
            return self._ends.outputs(rows, want)
        return await trio.to_thread.run_sync(self._ends.outputs, rows, want)

    # --- one way through the stages

    async def _through(self, work: "Sequence[_Work]", stages: range, x: FloatRows) -> FloatRows:
        """``f32[N, H]`` through these stages; the rows that each piece of work wants come out."""
        dtype = self._manifest.wire_dtype
        x = wire.rounded(x, dtype)
        deadline = trio.current_time() + self._pass_seconds(len(stages))
        for each in work:
            for stage in stages:  # until it is known that more is there, no more is
                leg = each.sequence.legs[stage]
                leg.held = min(leg.held, each.position)
        legs = work[0].sequence.legs
        runs = [list(run) for _, run in groupby(stages, key=lambda stage: legs[stage].here is not None)]
        for index, run in enumerate(runs):
            is_last = index == len(runs) - 1
            if legs[run[0]].here is not None:
                for stage in run:
                    x = await self._here(work, stage, x, deadline)
                if is_last:
                    x = _wanted(work, x)
            else:
                x = await self._there(work, run, x, deadline, is_last=is_last)
        return x

    async def _here(self, work: "Sequence[_Work]", stage: int, x: FloatRows, deadline: float) -> FloatRows:
        link = work[0].sequence.legs[stage].link
        tickets = []
        for each in work:
            ticket = each.sequence.legs[stage].here
            assert ticket is not None
            if ticket.closed:
                raise StageError(link, RemoteError("not_found", "the cache here was given up"))
            tickets.append(ticket)
        places = [(each.position, len(each.tokens)) for each in work]
        try:
            job = await self._shared.host.compute(tickets, places, x, deadline, self._shared.chains.number())
        except RiosError as error:
            raise StageError(link, error) from error
        assert job.answer is not None
        for each in work:
            if spread_report(each.sequence.legs[stage]) is None:  # else others computed it, and are told of there
                each.sequence.count(link, len(each.tokens))
        return wire.rounded(job.answer, self._manifest.wire_dtype)

    async def _there(
        self, work: "Sequence[_Work]", stages: Items[int], x: FloatRows, deadline: float, *, is_last: bool
    ) -> FloatRows:
        first = work[0].sequence
        way = Way(
            self._manifest.model_id,
            self._manifest.wire_dtype,
            self._manifest.architecture.hidden,
            tuple(first.legs[stage].link for stage in stages),
            self._shared.may_forward and not first.hub,
        )
        parts = [
            Rows(
                tuple(each.sequence.legs[stage].ticket for stage in stages),
                each.position,
                len(each.tokens),
                each.outputs if is_last else len(each.tokens),
            )
            for each in work
        ]
        for each in work:
            for stage in stages:
                each.sequence.count(each.sequence.legs[stage].link, len(each.tokens))
        return await self._shared.chains.run(way, parts, x, deadline, self._told)

    def _told(self, account: Account) -> None:
        """A host says what it did."""
        self._shared.measured(self._manifest.model_id, account)

    # --- failures

    def _refused_now(self) -> dict[int, set[PeerId]]:
        now = trio.current_time()
        dispatcher = self._shared.dispatcher
        refused = {stage: {p for p, until in peers.items() if now < until} for stage, peers in self._refused.items()}
        held = {p for p in self._shared.network.directory.adverts() if dispatcher.held(p, PEER_WIDE, now_us())}
        return {stage: refused.get(stage, set()) | held for stage in range(len(self._manifest.stages))}

    def _blame(self, failed: StageError, sequences: Sequence[StageSequence]) -> None:
        """Draw the conclusions from a failure. Raises the error if it is the caller's own."""
        link, error = failed.link, failed.error
        log.info("%s", failed)
        if error.code in CALLER_FAULTS:
            raise error
        concerned = [s for s in sequences if (leg := s.legs.get(link.stage)) and leg.link.peer == link.peer]
        if failed.between and any(not sequence.hub for sequence in concerned):
            for sequence in concerned:  # perhaps only the host before it does not reach it
                sequence.hub = True
            return
        for sequence in concerned:
            sequence.retries += 1
            at_peer = [stage for stage, leg in sequence.legs.items() if leg.link.peer == link.peer]
            for stage in at_peer if error.code in PEER_FAULTS else [link.stage]:
                sequence.drop(stage)
        if error.code in LOST and concerned:
            return
        pause = BUSY_WAIT_SECONDS_MAX
        if isinstance(error, BusyError):
            pause = min(pause, max(0.05, error.retry_after_ms / 1000))
        elif error.code in PEER_FAULTS:
            self._shared.dispatcher.failed(link.peer, (PEER_WIDE,), now_us())
        self._refused.setdefault(link.stage, {})[link.peer] = trio.current_time() + pause

    async def _pause(self, failures: Sequence[StageError], attempt: int) -> None:
        """Nobody is asked again at once and again."""
        if attempt:
            await trio.sleep(min(1.0, 0.02 * 2**attempt))
        else:
            await trio.lowlevel.checkpoint()

    def _exhausted(self, failures: Sequence[StageError]) -> RiosError:
        failed = failures[-1]
        first, last = failed.link.layers
        shard = self._manifest.stages[failed.link.stage].id
        message = f"{self._manifest.name}, {shard} (layers {first} to {last}): {failed.error.message}"
        error: RiosError = RemoteError(
            "no_replica", message, "start another node that serves it", peer_id=failed.link.peer
        )
        if isinstance(failed.error, BusyError):
            error = BusyError(message, failed.error.hint, retry_after_ms=failed.error.retry_after_ms)
        self._given_up = (trio.current_time() + GIVEN_UP_SECONDS, error)
        return error


@dataclass(frozen=True, slots=True)
class _Work:
    """What one sequence contributes to one way through the stages."""

    sequence: StageSequence
    position: int
    tokens: tuple[int, ...]
    outputs: int


def _sequence_of(feed: Feed) -> StageSequence:
    assert isinstance(feed.sequence, StageSequence)
    return feed.sequence


def _wanted(work: Sequence[_Work], x: FloatRows) -> FloatRows:
    """The rows that come out of a way."""
    kept, end = [], 0
    for each in work:
        end += len(each.tokens)
        kept.append(x[end - each.outputs : end])
    return kept[0] if len(kept) == 1 else np.concatenate(kept)


async def _together(pieces: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run them beside each other; the first RiosError of one ends the others and is raised as it is."""
    if len(pieces) == 1:
        await pieces[0]()
        return
    errors: list[RiosError] = []

    async def one(piece: Callable[[], Awaitable[None]]) -> None:
        try:
            await piece()
        except RiosError as error:
            errors.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for piece in pieces:
            nursery.start_soon(one, piece)
    if errors:
        raise errors[0]
