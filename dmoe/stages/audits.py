"""Audits of stages: some sequences are computed again, stage by stage, and what comes out otherwise is looked at.

Owns: which sequences are looked at, against what, what a difference leads to. Does not own: the verdict (``retrace``),
reputations and punishment (``dmoe.audit``), first tries (``probing``).

A host answers for all rows of a sequence at once: the newest leaf stands for everything that came and went
(``core/history``). So a whole sequence is audited, from its tokens on, through other replicas or stages loaded here.
The price is that of a prompt as long as the sequence: a pass of ``r`` rows that ends at position ``n`` is picked with
probability ``share * r / n``, and audits cost ``share`` of the rows computed.

What hosts hand to each other is not seen here. Of a picked sequence the caches are forked at once, which freezes what
each host has; it has told its digests already, and shows its rows only if they differ from what others computed.

Invariants:
1. Nobody is guilty because others disagree: a difference is a reason to compute the answer here, in fp64.
2. Audits wait in a bounded queue; what does not fit is not audited.
3. Rows are shown to those alone whom the privacy rule of their sequence allows.
4. Evidence of prompts stays here. It holds rows of the audited sequence and of no other.
5. A host that shows or sends other rows than it signs for is doubted (three times: not used any more), for nobody else
   can check that.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from time import perf_counter

import numpy as np
import trio

from config.errors import RemoteError, RiosError
from config.vocabulary import PeerId
from dmoe.audit import FETCH_BYTES_MAX, FETCH_SECONDS, LOCAL_SHARE, Auditor
from dmoe.core import history
from dmoe.core.evidence import is_known_class
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.privacy import Privacy
from dmoe.core.verdict import Likeness, alike
from dmoe.core.wire import FloatRows
from dmoe.court import Case
from dmoe.judging import rows_max
from dmoe.stages.asking import Answered, Asking
from dmoe.stages.loaded import LoadedStage
from dmoe.stages.sequence import Heard, StageSequence
from p2p.face import Network

log = logging.getLogger(__name__)
security = logging.getLogger("rios.security.trust")

QUEUE_MAX = 16
HEARD_SECONDS = 2.0
"""So long after a pass the hosts may take to say what they did."""
FORK_SECONDS = 10.0
FEW = 16
"""A row of which fewer than one number in so many differs was altered by hand: roundings move all numbers of a row."""


@dataclass(frozen=True, slots=True, eq=False)
class Leg:
    """A stage of a picked sequence. ``peer`` None: it was computed in this node, by the layers ``here``."""

    stage: int
    peer: PeerId | None
    ticket: bytes
    here: LoadedStage | None = None


@dataclass(slots=True, eq=False)
class Taken:
    """A picked sequence as it was. ``rows f32[N, H]``: its embedded tokens, as they travelled."""

    manifest: Manifest
    privacy: Privacy
    rows: FloatRows
    legs: tuple[Leg, ...]
    sequence: StageSequence
    cuts: int
    heard: dict[int, Heard] = field(default_factory=dict)
    forks: dict[int, bytes] = field(default_factory=dict)
    sure: set[int] = field(default_factory=set)
    """Stages whose fork was made before anything was taken back: it has the rows that were signed for."""
    all_heard: trio.Event = field(default_factory=trio.Event)
    over: bool = False
    """It was looked at."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the sequence was taken back since."""
        return self.cuts == self.sequence.cuts


class StageAudits:
    """The audits of stages of a node. :meth:`run` must be running."""

    def __init__(
        self, network: Network, auditor: Auditor, asking: Asking, device: str, random: Random | None = None
    ) -> None:
        self.asking, self.auditor = asking, auditor
        asking.watch = self._watch
        auditor.stages = self.statistics
        self.rows_audited = self.rows_asked = 0
        """Rows times layers: computed again, and of all passes."""
        self._network, self._device = network, device
        self._random = random or Random()
        self._manifests: dict[str, Manifest] = {}
        self._next_fetch = 0.0
        self.unfinished = 0
        """Audits that wait or are being made."""
        self._put, self._queue = trio.open_memory_channel[Taken](QUEUE_MAX)
        self._holding: dict[bytes, trio.Event] = {}
        """Tickets that are about to be forked."""
        self._nursery: trio.Nursery | None = None

    def know(self, manifest: Manifest) -> None:
        """Stages of this model may be audited."""
        self._manifests[manifest.model_id] = manifest
        self.auditor.know_stages(manifest)

    def models(self) -> Sequence[Manifest]:
        """The models whose stages may be audited."""
        return tuple(self._manifests.values())

    def statistics(self) -> dict[str, int]:
        """Rows times layers that were computed for audits, and in all passes elsewhere."""
        return {"rows_audited": self.rows_audited, "rows": self.rows_asked}

    # --- picking

    def picks(self, sequence: StageSequence, rows: int, manifest: Manifest) -> bool:
        """Whether a sequence is to be looked at once the next ``rows`` rows are computed, none of them a guess. If so,
        signatures are kept from now on: receipts may come before the pass is over."""
        if self._random.random() * (sequence.length + rows) >= self.auditor.rules.share * rows:
            return False
        sequence.hearing = lambda heard: self._watch(heard, manifest)
        return True

    def count(self, sequence: StageSequence, rows: int) -> None:
        """So many rows of a sequence were computed."""
        for leg in sequence.legs.values():
            if leg.here is None:
                self.rows_asked += rows * (leg.link.layers[1] - leg.link.layers[0] + 1)

    def take(
        self, sequence: StageSequence, manifest: Manifest, privacy: Privacy, embed: Callable[[int], FloatRows]
    ) -> None:
        """Look at a sequence that was picked. ``embed``: its first tokens, as they travel."""
        away = [leg.link for leg in sequence.legs.values() if leg.here is None]
        sequence.hearing = None
        if not away:
            return
        length = _length(sequence, rows_max(manifest), [link.stage for link in away])
        if not length or self._nursery is None:
            self.auditor.counts["stage too long"] += 1
            return
        legs = []
        for stage in sorted(sequence.legs):
            leg = sequence.legs[stage]
            if leg.here is None:
                legs.append(Leg(stage, leg.link.peer, leg.ticket))
            else:
                legs.append(Leg(stage, None, leg.ticket, leg.here.stage))
        taken = Taken(manifest, privacy, embed(length), tuple(legs), sequence, sequence.cuts)
        self._listen(taken)
        try:
            self._put.send_nowait(taken)
        except trio.WouldBlock:
            self.auditor.counts["dropped"] += 1
            return
        self.unfinished += 1
        forked = trio.Event()
        self._holding.update((leg.ticket, forked) for leg in taken.legs if leg.peer is not None)
        self._nursery.start_soon(self._fork, taken, forked)

    def _listen(self, taken: Taken) -> None:
        """Take what the hosts say about this pass: it may be here, or come any moment."""
        wanted = {leg.stage: leg.ticket for leg in taken.legs if leg.peer is not None}
        sequence, length = taken.sequence, len(taken.rows)

        def hear(heard: Heard) -> None:
            stage = heard.link.stage
            if heard.end != length or wanted.get(stage) != heard.part.ticket or not taken.is_whole:
                return
            taken.heard[stage] = heard
            self._watch(heard, taken.manifest)
            if len(taken.heard) == len(wanted):
                taken.all_heard.set()
                sequence.hearing = None

        sequence.hearing = hear
        for stage in wanted:
            if (known := sequence.heard.get((stage, length))) is not None:
                hear(known)

    def _watch(self, heard: Heard, manifest: Manifest) -> None:
        notary, channel = self.auditor.notary, heard.link.channel
        if notary is not None and channel:
            notary.watch(channel, heard.leaf(manifest.model_id))

    def _drop(self, heard: Heard, manifest: Manifest) -> None:
        notary, channel = self.auditor.notary, heard.link.channel
        if notary is not None and channel:
            notary.forget(channel, heard.leaf(manifest.model_id))

    async def released(self, ticket: bytes) -> None:
        """Wait until a ticket is not needed for an audit any more (soon)."""
        if (forked := self._holding.get(ticket)) is not None:
            await forked.wait()

    async def _fork(self, taken: Taken, forked: trio.Event) -> None:
        """Freeze what the hosts have: sequences go on, and take drafts back."""

        async def one(leg: Leg) -> None:
            assert leg.peer is not None
            try:
                with trio.move_on_after(HEARD_SECONDS):
                    await taken.all_heard.wait()
                heard = taken.heard.get(leg.stage)
                if heard is not None:
                    ticket = await self.asking.ticket(heard.link, taken.manifest, len(taken.rows), leg.ticket)
                    if taken.over:
                        await self.asking.close(leg.peer, ticket)
                    else:
                        taken.forks[leg.stage] = ticket
                        if taken.is_whole:
                            taken.sure.add(leg.stage)
            except RiosError as error:
                log.debug("%s forks no cache: %s", leg.peer, error)

        try:
            with trio.move_on_after(FORK_SECONDS):
                async with trio.open_nursery() as nursery:
                    for leg in taken.legs:
                        if leg.peer is not None:
                            nursery.start_soon(one, leg)
        finally:
            for leg in taken.legs:
                self._holding.pop(leg.ticket, None)
            forked.set()

    # --- one audit

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Audit until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            async for taken in self._queue:
                try:
                    await self._audit(taken)
                except RiosError as error:
                    self.auditor.counts["failed"] += 1
                    log.debug("an audit of %s failed: %s", taken.manifest.name, error)
                finally:
                    taken.over = True
                    for stage, ticket in taken.forks.items():
                        nursery.start_soon(self.asking.close, taken.heard[stage].link.peer, ticket)
                    for heard in taken.heard.values():
                        if self.auditor.trust.trusted(heard.link.peer):
                            self._drop(heard, taken.manifest)
                    self.unfinished -= 1

    async def _audit(self, taken: Taken) -> None:
        """From the first stage on, as long as it is known what came into each."""
        with trio.move_on_after(HEARD_SECONDS):
            await taken.all_heard.wait()
        x: FloatRows | None = taken.rows
        for leg in taken.legs:
            if x is None:
                return
            if leg.here is not None:
                x = await self.asking.through(leg.here, taken.manifest, x)
                continue
            heard = taken.heard.get(leg.stage)
            if heard is None:
                self.auditor.counts["stage unheard"] += 1
                return
            if history.digest(x) != heard.said.came:
                # it got other rows, or says so; its neighbour may be the liar (``Chains.contradicted``)
                self.auditor.counts["stage contradicted"] += 1
                return
            x = await self._stage(taken, heard, x)

    async def _stage(self, taken: Taken, heard: Heard, x: FloatRows) -> FloatRows | None:
        """Look at one stage's answer to ``x f32[N, H]``: its rows, if they are what the next stage got."""
        manifest, stage, peer = taken.manifest, heard.link.stage, heard.link.peer
        if not self.auditor.trust.trusted(peer):
            return None
        reference = await self._reference(manifest, stage, x, taken.privacy, peer)
        if reference is None:
            return await self._alone(taken, heard, x)
        rows, other = reference
        if history.digest(rows) == heard.said.went:
            if await self._spot_check(manifest, stage):
                answer = await self._own_rows(taken, heard, x)
                if answer is not None and await self.judge(answer):
                    return None
            self._passed(peer, other)
            return rows
        answer = await self._own_rows(taken, heard, x)
        if answer is None:
            return None
        await self._weigh(answer, rows, other)
        return answer.went if answer.heard is heard else None

    async def _reference(
        self, manifest: Manifest, stage: int, x: FloatRows, privacy: Privacy, suspect: PeerId
    ) -> tuple[FloatRows, Answered | None] | None:
        """The same rows computed by somebody else: here (a quarter of the times, or if there is nobody), or at another
        replica. None: nobody can."""
        layers = manifest.stages[stage].layers
        self.rows_audited += len(x) * (layers[1] - layers[0] + 1)
        if self._random.random() < LOCAL_SHARE and (rows := await self.asking.here(manifest, stage, x)) is not None:
            return rows, None
        for peer in self.replicas(manifest, stage, privacy, suspect):
            try:
                answer = await self.asking.at(peer, manifest, stage, x)
            except RiosError as error:
                log.debug("%s is asked for no comparison: %s", peer, error)
                continue
            return answer.went, answer
        rows = await self.asking.here(manifest, stage, x)
        if rows is None:
            self.rows_audited -= len(x) * (layers[1] - layers[0] + 1)
            return None
        return rows, None

    def replicas(self, manifest: Manifest, stage: int, privacy: Privacy, but: PeerId) -> Iterator[PeerId]:
        """Other peers that have a stage and may see these rows, in any order; two at most."""
        adverts, layers = self._network.directory.adverts(), manifest.stages[stage].layers
        index = manifest.shard_index(manifest.stages[stage].id)
        found = [
            peer
            for peer in self._network.directory.providers(manifest.model_id, index)
            if peer not in (but, self._network.peer_id)
            and peer in adverts
            and not adverts[peer].paused
            and self.auditor.trust.trusted(peer)
            and privacy.allows(peer, *layers, manifest.architecture.layers)
        ]
        return iter(self._random.sample(sorted(found), min(2, len(found))))

    async def _alone(self, taken: Taken, heard: Heard, x: FloatRows) -> FloatRows | None:
        """There is nothing to compare with: with the files here the answer is judged at once, if time allows."""
        manifest, stage = taken.manifest, taken.manifest.stages[heard.link.stage]
        here = await trio.to_thread.run_sync(self.auditor.judging.has_stage, manifest, stage)
        looked = (here or await self._spot_check(manifest, heard.link.stage)) and self.auditor.may_compute()
        if not looked:
            self.auditor.counts["no replica"] += 1
        answer = await self._own_rows(taken, heard, x)
        if answer is None or (looked and await self.judge(answer)):
            return None
        if looked:
            self._passed(heard.link.peer, None)
        return answer.went if answer.heard is heard else None  # the stages behind it can be looked at

    async def _spot_check(self, manifest: Manifest, stage: int) -> bool:
        """Now and then a small stage is fetched, so that replicas that lie alike are found out too."""
        shard, now = manifest.stages[stage], perf_counter()
        if self.auditor.fetch is None or now < self._next_fetch or shard.size_bytes > FETCH_BYTES_MAX:
            return False
        self._next_fetch = now + FETCH_SECONDS
        try:
            await self._bring(manifest, shard)
        except RiosError as error:
            log.debug("%s is not fetched for a spot check: %s", shard.id, error)
            return False
        return True

    async def _own_rows(self, taken: Taken, heard: Heard, x: FloatRows) -> Answered | None:
        """The rows that a host sent: as it shows them, or as it answers once more. None: it shows others than it
        signed for, or none at all."""
        manifest, stage, peer = taken.manifest, heard.link.stage, heard.link.peer
        self.auditor.counts["shown"] += 1
        fork = taken.forks.get(stage)
        if fork is not None:
            try:
                shown = await self.asking.shown(peer, fork, len(x), manifest)
            except RiosError as error:
                log.info("%s does not show what it sent: %s", peer, error)
            else:
                if history.digest(shown) == heard.said.went:
                    return Answered(manifest, heard, x, shown)
                if stage in taken.sure:
                    self.doubt(peer, "it shows other rows than those it signed for")
                return None
        again = await self.asking.at(peer, manifest, stage, x)
        # a machine of a known class gives the same rows for the same rows, whatever runs beside them
        known = is_known_class(heard.device, quantised=manifest.is_quantised)
        if known and again.heard.said.went != heard.said.went:
            self.doubt(peer, "it does not show the rows it signed for, and gives others when asked again")
            return None
        return again

    # --- what a difference leads to

    def doubt(self, peer: PeerId, why: str) -> None:
        """A peer contradicts itself before this node alone."""
        self.auditor.counts["unclear"] += 1
        self.auditor.trust.unclear(peer)
        security.warning("%s: %s", peer, why)

    def _passed(self, peer: PeerId, other: Answered | None) -> None:
        self.auditor.counts["passed"] += 1
        self.auditor.trust.passed(peer)
        if other is not None:
            self.auditor.trust.passed(other.peer)
            self._drop(other.heard, other.manifest)

    async def compare(self, answer: Answered) -> bool:
        """Look at an answer to rows of this node's own making (a probe). False: there is nothing to look at it with."""
        manifest, stage = answer.manifest, answer.heard.link.stage
        rows = await self.asking.here(manifest, stage, answer.came)
        if rows is None and await trio.to_thread.run_sync(
            self.auditor.judging.has_stage, manifest, manifest.stages[stage]
        ):
            if not await self.judge(answer):
                self._passed(answer.peer, None)
            return True
        other = None
        if rows is None:
            for peer in self.replicas(manifest, stage, Privacy(), answer.peer):
                try:
                    other = await self.asking.at(peer, manifest, stage, answer.came, synthetic=True)
                except RiosError:
                    continue
                rows = other.went
                break
        if rows is None:
            return False
        if history.digest(rows) == answer.heard.said.went:
            self._passed(answer.peer, other)
        else:
            await self._weigh(answer, rows, other)
        return True

    async def _weigh(self, answer: Answered, rows: FloatRows, other: Answered | None) -> None:
        """Two answers to the same: ``other`` is the second one if a peer gave it, None if it was computed here."""
        manifest = answer.manifest
        device = self._device if other is None else other.heard.device
        same = bool(device) and device == answer.heard.device
        kinds = alike(answer.went, rows, same_class=same, quantised=manifest.is_quantised)
        if Likeness.SUSPICIOUS not in kinds:
            self._passed(answer.peer, other)
            return
        self.auditor.counts["differed"] += 1
        await self._bring(manifest, manifest.stages[answer.heard.link.stage])
        for each in (answer, other):
            if each is not None and await self.judge(each):
                return
        if same and other is None and _by_hand(answer.went, rows):
            self.doubt(answer.peer, "a few numbers of its rows differ from what the same kind of machine computes")

    async def _bring(self, manifest: Manifest, stage: Shard) -> None:
        """A stage's files, fetched if they are not here. Raises RiosError if they cannot be had."""
        if await trio.to_thread.run_sync(self.auditor.judging.has_stage, manifest, stage):
            return
        if self.auditor.fetch is None:
            raise RemoteError("unavailable", f"the weights of {stage.id} are not here")
        await self.auditor.fetch(manifest, stage)

    async def judge(self, answer: Answered) -> bool:
        """Compute an answer here, in fp64; whether its host is guilty."""
        manifest, heard = answer.manifest, answer.heard
        stage, judging = manifest.stages[heard.link.stage], self.auditor.judging

        def work() -> tuple[float, int, bool]:
            knows = judging.knows_stage(manifest, stage, heard.device)
            ratios = judging.stage_ratios(manifest, stage, answer.came, answer.went, answer.leaf())
            return float(ratios.max(initial=0.0)), int(ratios.argmax()), knows

        begun = perf_counter()
        worst, row, knows = await trio.to_thread.run_sync(work)
        self.auditor.busy_seconds += perf_counter() - begun
        if worst <= 1:
            return False
        what = f"layers {stage.layers[0]} to {stage.layers[1]} of {manifest.name}, position {row}"
        if not knows:
            self.doubt(answer.peer, f"{what} is off by {worst:.3g}, but how {heard.device!r} rounds is not known")
            return False
        why = f"{what}: {worst:.3g} times as far off as honest machines' answers may be"
        case = Case(answer.peer, heard.link.channel, answer.leaf(), answer.evidence, answer.synthetic)
        self.auditor.court.convict(case, why)
        return True


def _length(sequence: StageSequence, most: int, stages: Sequence[int]) -> int:
    """How many positions can be looked at: all, or as many of a long sequence as a host has signed for at once; 0: that
    is not known of all ``stages``."""
    if sequence.length <= most:
        return sequence.length
    ends = [{end for stage, end in sequence.heard if stage == each and end <= most} for each in stages]
    return max(set[int].intersection(*ends), default=0)


def _by_hand(one: FloatRows, other: FloatRows) -> bool:
    """Whether in some row a few numbers alone differ, by more than a rounding: no honest machine does that."""
    differ = one != other
    counts = differ.sum(axis=1)
    few = (counts > 0) & (counts * FEW < one.shape[1])
    apart = np.abs(one - other) > np.abs(one) * 2.0**-9
    return bool((few & (apart & differ).any(axis=1)).any())
