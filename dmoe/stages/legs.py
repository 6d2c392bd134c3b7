"""A sequence's legs: a ticket at a peer, or a cache here, for each stage; and what follows from a failure of one.

Owns: which peers are passed over after failures, opening and closing tickets. Does not own: passes (``passes``), second
tries (``caller``), the choice among hosts (``directions``).

Invariants:
1. Every leg that was opened is let go once.
2. A peer that failed a stage is passed over for a while; where nobody else is left it is probed, but not by everybody.
3. When nobody is left for a stage, the error names stage and layers, who had it and when each was last seen.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import trio

from config.errors import BusyError, RemoteError, RiosError
from config.vocabulary import PeerId
from dmoe.core import stagecalls
from dmoe.core.dispatch import PEER_WIDE, Dispatcher
from dmoe.core.manifest import Manifest
from dmoe.core.privacy import OPEN, Privacy
from dmoe.core.stagecalls import OpenCall
from dmoe.ports import Quote
from dmoe.purse import Purse
from dmoe.replicas import now_us
from dmoe.stages.audits import StageAudits
from dmoe.stages.chain import Account, Chains, Link, StageError
from dmoe.stages.directions import Directions
from dmoe.stages.host import StageHost
from dmoe.stages.loaded import LoadedStage
from dmoe.stages.sequence import Leg, StageSequence
from p2p import trace
from p2p.face import Network

log = logging.getLogger(__name__)

BUSY_WAIT_SECONDS_MAX = 2.0
GIVEN_UP_SECONDS = 5.0
"""So long after a pass found nobody, others do not probe again: each answer of a failed pass is tried alone, and all of
them together shall not take many times as long."""
OPEN_TIMEOUT_MS = 5_000
OPEN_PATIENCE_MS = 1_500
"""So long a host may take for a ticket where another could give one."""
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
    audits: StageAudits | None = None


class Legs:
    """The legs of a model's sequences. ``load`` opens a stage in this process (called in a thread)."""

    def __init__(
        self, shared: Shared, manifest: Manifest, load: Callable[[int], LoadedStage], privacy: Privacy = OPEN
    ) -> None:
        self._shared = shared
        self._manifest = manifest
        self._load = load
        self._privacy = privacy
        self._me = shared.network.peer_id
        self._own: dict[int, LoadedStage] = {}
        self._loading = trio.Lock()
        self._refused: dict[int, dict[PeerId, float]] = {}
        """Stage -> peers that failed it lately, and until when they are passed over."""
        self._given_up: tuple[float, RiosError | None] = (0.0, None)
        """Until when nobody who rests is probed, and what the last tries ended with."""

    # --- opening

    async def complete(self, sequence: StageSequence, like: StageSequence | None = None) -> None:
        """Open the legs that a sequence lacks. Raises StageError, or RemoteError ``no_replica``."""
        stages = range(len(self._manifest.stages))
        if len(sequence.legs) == len(stages):
            return
        origin = like or sequence
        fixed = {stage: leg.link.peer for stage, leg in origin.legs.items() if self._is_offered(stage, leg.link.peer)}
        for stage in set(sequence.legs) - set(fixed):
            sequence.drop(stage)  # the path could not lead by way of it
        missing = [stage for stage in stages if stage not in sequence.legs]
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

    def forsake(self, sequence: StageSequence) -> None:
        """Give up legs at peers that are not trusted any more; where two neighbours contradicted each other, rows pass
        this node from now on, which sees who of them is wrong."""
        audits = self._shared.audits
        if audits is None:
            return
        for stage in [stage for stage, leg in sequence.legs.items() if not self._is_trusted(leg.link.peer)]:
            sequence.drop(stage)
        contradicted = self._shared.chains.contradicted
        if contradicted and not sequence.hub:
            peers = [sequence.legs[stage].link.peer for stage in sorted(sequence.legs)]
            for stage, pair in enumerate(pairwise(peers)):
                if pair in contradicted:
                    sequence.hub = True
                    sequence.drop(stage)  # what they have of it is computed again
                    sequence.drop(stage + 1)

    def _is_trusted(self, peer: PeerId) -> bool:
        audits = self._shared.audits
        return audits is None or peer == self._me or audits.auditor.trust.trusted(peer)

    def _is_offered(self, stage: int, peer: PeerId) -> bool:
        """Whether a peer says that it runs a stage: one that died, paused or dropped the stage does not."""
        if peer == self._me:
            return True
        if not self._is_trusted(peer):
            return False
        manifest, advert = self._manifest, self._shared.network.directory.adverts().get(peer)
        offer = advert.offer(manifest.model_id) if advert is not None and not advert.paused else None
        return offer is not None and offer.holds(manifest.shard_index(manifest.stages[stage].id))

    def _path(self, fixed: dict[int, PeerId]) -> list[PeerId]:
        """A peer for every stage; where nobody else is left, one that rests after a failure, at last even one that
        failed just now: better a probe than an error."""
        refused, held = self._refused_now(), self._held_now()
        for stage, peer in fixed.items():
            refused[stage].discard(peer)  # what stands, stands: only its own failure drops it
        path = partial(self._shared.directions.path, privacy=self._privacy)
        try:
            without = {stage: (peers | held) - {fixed.get(stage)} for stage, peers in refused.items()}
            return path(self._manifest, fixed, without)
        except RemoteError:
            until, error = self._given_up
            if error is not None and trio.current_time() < until:
                raise error from None
        for avoided in (refused, self._refused_last(fixed)):
            try:
                return path(self._manifest, fixed, avoided, resting=True)
            except RemoteError:
                continue
        return path(self._manifest, fixed, {}, resting=True)

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
        hasty = not sequence.patient and has_spare(self._shared, self._manifest, link, self._privacy)
        left_ms = OPEN_PATIENCE_MS if hasty else OPEN_TIMEOUT_MS
        with trace.span(stagecalls.OPEN, "client", peer=str(link.peer), stage=link.stage):
            reply = await self._shared.network.call(link.peer, stagecalls.OPEN, header, deadline_ms=left_ms)
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

    def let_go(self, leg: Leg) -> None:
        """Free a leg's cache, here or there, without waiting for it."""
        legs = self._shared.directions.legs
        legs[leg.link.peer] -= 1
        if leg.here is not None:
            self._shared.host.close(leg.here)
        elif self._shared.chains.nursery is not None and not self._shared.chains.leaving:
            self._shared.chains.nursery.start_soon(self._close_there, leg)

    async def _close_there(self, leg: Leg) -> None:
        if self._shared.audits is not None:
            await self._shared.audits.released(leg.ticket)
        header = {"tickets": [leg.ticket]}
        try:
            await self._shared.network.call(leg.link.peer, stagecalls.CLOSE, header, deadline_ms=CLOSE_TIMEOUT_MS)
        except RiosError as error:
            log.debug("closing a ticket at %s: %s; it expires there", leg.link.peer, error)

    # --- failures

    async def pay(self, failed: StageError, sequences: Sequence[StageSequence]) -> bool:
        """Show a host that ran out of credit the newest voucher: receipts come apart from runs, and under load later.
        Whether it may be asked again."""
        link, purse = failed.link, self._shared.purse
        if failed.error.code != "payment_required" or purse.buyer is None or not link.channel:
            return False
        with trio.move_on_after(OPEN_TIMEOUT_MS / 1000):
            try:
                channel = await purse.channel(link.peer, link.quote, reopen=True)
            except RiosError as error:
                log.info("%s takes no voucher: %s", link.peer, error)
                return False
            if channel != link.channel:  # tickets are paid by the channel that was named when they were opened
                for sequence in sequences:
                    for stage in [stage for stage, leg in sequence.legs.items() if leg.link.peer == link.peer]:
                        sequence.drop(stage)
            return True
        return False

    def _refused_now(self) -> dict[int, set[PeerId]]:
        now = trio.current_time()
        refused = {stage: {p for p, until in peers.items() if now < until} for stage, peers in self._refused.items()}
        return {stage: refused.get(stage, set()) for stage in range(len(self._manifest.stages))}

    def _refused_last(self, fixed: dict[int, PeerId]) -> dict[int, set[PeerId]]:
        """Of each stage the peer that failed it last: those that failed before may be well again."""
        known = {stage: max(peers, key=peers.__getitem__) for stage, peers in self._refused.items() if peers}
        return {stage: {peer} - {fixed.get(stage)} for stage, peer in known.items()}

    def _held_now(self) -> set[PeerId]:
        dispatcher, now = self._shared.dispatcher, now_us()
        return {peer for peer in self._shared.network.directory.adverts() if dispatcher.held(peer, PEER_WIDE, now)}

    def blame(self, failed: StageError, sequences: Sequence[StageSequence]) -> None:
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
        is_whole = error.code in PEER_FAULTS
        for stage in range(len(self._manifest.stages)) if is_whole else (link.stage,):
            self._refused.setdefault(stage, {})[link.peer] = trio.current_time() + pause

    def exhausted(self, failures: Sequence[StageError]) -> RiosError:
        """The error that ends a pass whose tries are over; for a while it also ends those that find nobody."""
        failed = failures[-1]
        first, last = failed.link.layers
        shard = self._manifest.stages[failed.link.stage].id
        message = f"{self._manifest.name}, {shard} (layers {first} to {last}): {failed.error.message}"
        if seen := self._shared.directions.seen(self._manifest, failed.link.stage):
            message += f"; replicas: {seen}"
        error: RiosError = RemoteError(
            "no_replica", message, "start another node that serves it", peer_id=failed.link.peer
        )
        if isinstance(failed.error, BusyError):
            error = BusyError(message, failed.error.hint, retry_after_ms=failed.error.retry_after_ms)
        self._given_up = (trio.current_time() + GIVEN_UP_SECONDS, error)
        return error


def has_spare(shared: Shared, manifest: Manifest, link: Link, privacy: Privacy = OPEN) -> bool:
    """Whether somebody other than the link's peer offers its stage, and may compute it; it may rest after a failure."""
    layers = manifest.architecture.layers
    index = manifest.shard_index(manifest.stages[link.stage].id)
    adverts = shared.network.directory.adverts()
    offering = shared.network.directory.providers(manifest.model_id, index)
    return any(
        peer != link.peer
        and peer in adverts
        and not adverts[peer].paused
        and privacy.allows(peer, *link.layers, layers)
        for peer in offering
    )
