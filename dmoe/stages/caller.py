"""Sequences over stages wherever their replicas are: embedding and head here, whole layers at their hosts.

Owns: second tries, rebuilding caches elsewhere. Does not own: a sequence's legs and what failures mean for them
(``legs``), one way through the stages (``passes``), the choice of hosts (``directions``), caches here (``host``).

Sequences whose stages are at the same peers share a pass's messages. The stream is rounded to the manifest's wire dtype
before every stage and behind the last, wherever each runs, so that all routes over the same stages give the same bits.
A sequence keeps its tokens: a cache that is lost is rebuilt by sending them again, from the first position that a stage
lacks through the stages up to that one, and nothing in the answer shows it.

Invariants:
1. A pass is all or nothing: if it raises or is cancelled, no sequence has changed.
2. Which peers compute, in one try or several, does not change a bit of the outputs.
3. No rows go to a peer that the privacy rule keeps from its stage, whoever chose it.
4. Tries are bounded, in number and in time; when nobody is left for a stage, the error names stage and layers.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from collections.abc import Sequence as Items
from functools import partial
from itertools import groupby
from random import Random

import trio

from config.errors import RequestError, RiosError
from dmoe import runner as seam
from dmoe.audit import Auditor
from dmoe.bills import Bills
from dmoe.core.dispatch import Dispatcher
from dmoe.core.manifest import Manifest
from dmoe.core.privacy import Privacy
from dmoe.core.wire import FloatRows
from dmoe.ports import Buyer
from dmoe.purse import Purse
from dmoe.runner import Feed
from dmoe.stages.asking import Asking
from dmoe.stages.audits import StageAudits
from dmoe.stages.chain import Account, Chains, StageError
from dmoe.stages.directions import Directions
from dmoe.stages.host import StageHost
from dmoe.stages.legs import Legs, Shared
from dmoe.stages.loaded import LoadedStage
from dmoe.stages.passes import StagePasses, Work, sequence_of
from dmoe.stages.probing import StageProber
from dmoe.stages.segment import Ends
from dmoe.stages.sequence import StageSequence
from p2p.face import Network

log = logging.getLogger(__name__)

TRIES_MAX = 8


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
        auditor: Auditor | None = None,
        random: Random | None = None,
        bills: Bills | None = None,
    ) -> None:
        """``auditor`` (running already): who looks at answers; None: nothing is audited. ``bills``: what is paid is put
        there."""
        purse = Purse(buyer, bills)
        chains = Chains(network, purse)
        audits = None
        self._prober: StageProber | None = None
        if auditor is not None:
            asking = Asking(network, host, chains, purse, timeout_ms)
            audits = StageAudits(network, auditor, asking, host.device, random)
            chains.disputed, directions.trust = audits.doubt, auditor.trust
            self._prober = StageProber(audits, network, random)
        self.shared = Shared(
            network, host, chains, directions, dispatcher, purse, timeout_ms, measured, may_forward, audits
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self.shared.chains.nursery = nursery
                if self.shared.audits is not None and self._prober is not None:
                    await nursery.start(self.shared.audits.run)
                    await nursery.start(self._prober.run)
                task_status.started()
                try:
                    await trio.sleep_forever()
                finally:
                    self.shared.chains.leaving = True
        finally:
            self.shared.chains.nursery = None

    def fault(self, manifest: Manifest, privacy: Privacy | None = None) -> RiosError | None:
        """Why a model cannot be run by its stages now, or None."""
        try:
            self.shared.directions.path(manifest, {}, {}, resting=True, privacy=privacy)
        except RiosError as error:
            return error
        return None

    def runner(
        self, manifest: Manifest, ends: Ends, load: Callable[[int], LoadedStage], privacy: Privacy | None = None
    ) -> "StageRunner":
        """A model by its stages. ``load`` opens one in this process (called in a thread). ``privacy``: the rule its
        sequences keep; None: the operator's."""
        if self.shared.audits is not None:
            self.shared.audits.know(manifest)
        return StageRunner(self.shared, manifest, ends, load, privacy)


class StageRunner:
    """A model over stages (:class:`dmoe.runner.Runner`)."""

    def __init__(
        self,
        shared: Shared,
        manifest: Manifest,
        ends: Ends,
        load: Callable[[int], LoadedStage],
        privacy: Privacy | None = None,
    ) -> None:
        self._manifest, self._audits = manifest, shared.audits
        self._rule = rule = shared.directions.privacy if privacy is None else privacy
        self._legs = Legs(shared, manifest, load, rule)
        self._passes = StagePasses(shared, manifest, ends, rule)

    async def open(self, capacity: int, *, like: seam.Sequence | None = None, length: int = 0) -> StageSequence:
        """See :class:`dmoe.runner.Runner`."""
        context = self._manifest.architecture.context
        if not 1 <= capacity <= context:
            message = f"{capacity} tokens do not fit the model's context of {context}"
            raise RequestError("context_length_exceeded", message)
        sequence = StageSequence(capacity, self._legs.let_go)
        if like is not None:
            assert isinstance(like, StageSequence)
            assert 0 <= length <= min(like.length, capacity)
            sequence.tokens = like.tokens[:length]
            sequence.hub = like.hub
        try:
            try:
                await self._legs.complete(sequence, like if isinstance(like, StageSequence) else None)
            except StageError as failed:
                self._legs.blame(failed, [sequence])  # the next pass tries others
        except BaseException:
            sequence.close()
            raise
        return sequence

    async def forward(self, feeds: Items[Feed]) -> list[FloatRows]:
        """See :class:`dmoe.runner.Runner`."""
        for feed in feeds:
            self._check(feed)
            self._legs.forsake(sequence_of(feed))
        audits, rule, picked = self._audits, self._rule, list[StageSequence]()
        if audits is not None:  # where more is wanted of a feed, its tokens may be guesses
            sure = [(sequence_of(feed), len(feed.tokens)) for feed in feeds if feed.outputs <= 1]
            picked = [sequence for sequence, rows in sure if audits.picks(sequence, rows, self._manifest)]
        found: dict[int, FloatRows] = {}
        todo = list(range(len(feeds)))
        limit = trio.current_time() + 2 * self._passes.pass_seconds(len(self._manifest.stages))
        for attempt in range(TRIES_MAX):
            failures: list[StageError] = []
            trying = [sequence_of(feeds[n]) for n in todo]
            for sequence in trying:
                sequence.patient = attempt > 0
            await self._ready(trying, failures)
            if not failures:
                await self._all(feeds, todo, found, failures)
            todo = [n for n in todo if n not in found]
            if not todo:
                break
            for failed in failures:
                concerned = [sequence_of(feeds[n]) for n in todo]
                if attempt == TRIES_MAX - 1 or not await self._legs.pay(failed, concerned):
                    self._legs.blame(failed, concerned)
            if attempt == TRIES_MAX - 1 or trio.current_time() > limit:
                raise self._legs.exhausted(failures)
            await self._pause(failures, attempt)
        for feed in feeds:
            sequence = sequence_of(feed)
            sequence.tokens += feed.tokens
            for leg in sequence.legs.values():
                leg.held = sequence.length
            if audits is not None:
                audits.count(sequence, len(feed.tokens))
                if sequence in picked:
                    audits.take(sequence, self._manifest, rule, partial(self._passes.embedded, sequence.tokens))
        return [found[n] for n in range(len(feeds))]

    def _check(self, feed: Feed) -> None:
        sequence = sequence_of(feed)
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
                await self._legs.complete(sequence)
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
        rows = self._passes.piece_rows(sequence, sequence.length - start)
        pieces = [
            [Work(sequence, first, tuple(sequence.tokens[first : first + rows]), 0)]
            for first in range(start, sequence.length, rows)
        ]

        def arrived(piece: int) -> None:
            (work,) = pieces[piece]
            for leg in legs:
                if leg.held == work.position:
                    leg.held += len(work.tokens)

        await self._passes.in_pieces(pieces, range(last + 1), arrived)

    async def _all(
        self, feeds: Items[Feed], todo: list[int], found: dict[int, FloatRows], failures: list[StageError]
    ) -> None:
        """One try of what is still to be done; sequences at the same peers together."""

        def key(n: int) -> tuple[object, ...]:
            sequence = sequence_of(feeds[n])
            legs = [sequence.legs[stage].link for stage in range(len(self._manifest.stages))]
            return (sequence.hub, *((link.peer, link.channel) for link in legs))

        async def group(members: list[int]) -> None:
            try:
                outputs = await self._passes.group([feeds[n] for n in members])
            except StageError as error:
                failures.append(error)
            else:
                found.update(zip(members, outputs, strict=True))

        ordered = sorted(todo, key=lambda n: (str(key(n)), n))
        groups = [list(members) for _, members in groupby(ordered, key=key)]
        await _together([partial(group, members) for members in groups])

    async def _pause(self, failures: Sequence[StageError], attempt: int) -> None:
        """Nobody is asked again at once and again."""
        if attempt:
            await trio.sleep(min(1.0, 0.02 * 2**attempt))
        else:
            await trio.lowlevel.checkpoint()


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
