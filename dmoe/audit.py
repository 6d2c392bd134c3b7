"""Audits: some answers are asked for again, elsewhere or here, and a wrong one has consequences.

Owns: which answers are looked at, and against what. Does not own: the verdict (``core/verdict``), what follows from one
(``court``), reputations (``trust``), fresh inputs before first use (``probing``), receipts (the ledger).

An audit is an ordinary ``expert.run`` in the background: the worker that is asked cannot tell it from others, and no
token waits for it. A quarter is computed here, where the shard is loaded or its files are; now and then one is fetched
for that.

Invariants:
1. Nobody is guilty because others disagree: a difference is a reason to compute the answer here, in fp64.
2. Audits wait in a bounded queue; what does not fit is not audited.
3. What may not be seen by everybody is shown to nobody else for an audit.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import numpy as np
import trio

from config.errors import IntegrityError, RemoteError, RiosError
from config.vocabulary import MIB, PeerId
from dmoe.bills import Payers
from dmoe.core import calls, evidence, wire
from dmoe.core.evidence import Evidence
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.routes import ModelMap
from dmoe.core.stageevidence import StageEvidence
from dmoe.core.verdict import Likeness, alike
from dmoe.court import Blame, Case, Court
from dmoe.judging import Judging
from dmoe.ports import Notary, Quote
from dmoe.purse import Owed, Purse
from dmoe.replicas import Replicas
from dmoe.samples import Sample, copied, evidence_of, owed_of, part_of, request_of, sample_of
from dmoe.trust import Trust
from dmoe.worker import Worker
from p2p.face import Network

log = logging.getLogger(__name__)
security = logging.getLogger("rios.security.trust")

QUEUE_MAX = 64
LOCAL_SHARE = 0.25
"""Of the audits: computed here where that is possible."""
SINGLE_SHARE = 0.25
"""Of the audits of a sparse model: one expert alone, whose weight in a sum may be low."""
ROWS_JUDGED_MAX = 8
"""Rows computed in fp64 per group and answer, those that differ first."""
LOCAL_TIME_SHARE = 0.005
"""Of the time since the start: so much may be spent on computing here in fp64 what nobody suspects."""
REPLICAS_ASKED_MAX = 3
"""So many replicas are asked for the same answer until one gives it."""
FETCH_SECONDS, FETCH_BYTES_MAX = 600.0, 256 * MIB
"""How often a shard that is not here is fetched only to look at an answer that nobody suspects, and how large."""
SAVE_SECONDS = 60.0
FAR = 0.05
"""Answers of machines whose arithmetic is not known may be so far off (relative)."""

Fetch = Callable[[Manifest, Shard], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Rules:
    """``share`` of the calls is audited. ``folder``: where evidence is kept; None: nowhere."""

    share: float
    folder: Path | None = None
    call_timeout_ms: int = 10_000


class Auditor:
    """The audits of a node. :meth:`run` must be running."""

    def __init__(
        self,
        network: Network,
        purse: Purse,
        replicas: Replicas,
        worker: Worker | None,
        judging: Judging,
        trust: Trust,
        rules: Rules,
        *,
        notary: Notary | None = None,
        fetch: Fetch | None = None,
        blame: Blame = lambda peer, fault, why: None,
        random: Random | None = None,
    ) -> None:
        self.trust = trust
        self.counts: Counter[str] = Counter()
        """What became of audits, by outcome."""
        self.rows_audited = 0
        """Rows times groups asked for again."""
        self.busy_seconds = 0.0
        """Spent on verdicts here."""
        self._network, self._purse, self._replicas, self._worker = network, purse, replicas, worker
        self._judging, self._rules, self._notary, self._fetch = judging, rules, notary, fetch
        self._random = random or Random()
        self._dice = self._random.random
        self._manifests: dict[str, tuple[Manifest, ModelMap]] = {}
        self.stages: Callable[[], Mapping[str, int]] = dict
        """What is told of audits of stages."""
        self._staged: dict[str, Manifest] = {}
        self._begun = perf_counter()
        self._next_fetch = 0.0
        self._put, self._queue = trio.open_memory_channel[Owed](QUEUE_MAX)
        self.court = Court(
            network, judging, trust, self.counts, self._manifest_of, notary=notary, blame=blame, folder=rules.folder
        )

    def know(self, manifest: Manifest, model: ModelMap) -> None:
        """Calls of this model may be audited."""
        self._manifests.setdefault(manifest.model_id, (manifest, model))

    def know_stages(self, manifest: Manifest) -> None:
        """Evidence about stages of this model may be judged."""
        self._staged.setdefault(manifest.model_id, manifest)

    def models(self) -> Sequence[tuple[Manifest, ModelMap]]:
        """The models whose calls may be audited."""
        return tuple(self._manifests.values())

    def picks(self) -> bool:
        """Whether the next answer is to be looked at. On the token's path."""
        return self._dice() < self._rules.share

    def take(self, owed: Owed) -> None:
        """Look at this answer later. Its bytes are copied."""
        own = copied(owed)
        try:
            self._put.send_nowait(own)
        except trio.WouldBlock:
            self.counts["dropped"] += 1
            return
        self.watch(own)

    def watch(self, owed: Owed) -> None:
        """Keep the worker's signature for an answer."""
        if self._notary is not None and owed.channel:
            self._notary.watch(owed.channel, owed.leaf())

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Audit until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.court.run)
            nursery.start_soon(self._save)
            task_status.started()
            async for owed in self._queue:
                known = self._manifests.get(owed.model_id)
                if known is None or not self.trust.trusted(owed.peer):
                    continue
                try:
                    sample = sample_of(known[0], owed)
                    await self._audit(sample)
                except RiosError as error:
                    self.counts["failed"] += 1
                    log.debug("an audit of %s failed: %s", owed.peer, error)

    async def _save(self) -> None:
        try:
            while True:
                await trio.sleep(SAVE_SECONDS)
                await trio.to_thread.run_sync(self.trust.save)
        finally:
            self.trust.save()

    @property
    def rules(self) -> Rules:
        """What is audited."""
        return self._rules

    @property
    def judging(self) -> Judging:
        """Where verdicts are made."""
        return self._judging

    @property
    def notary(self) -> Notary | None:
        """What workers signed for."""
        return self._notary

    @property
    def fetch(self) -> Fetch | None:
        """Brings a shard."""
        return self._fetch

    def may_compute(self) -> bool:
        """Whether what nobody suspects may be computed here in fp64 now."""
        return self.busy_seconds + self.court.busy_seconds <= LOCAL_TIME_SHARE * max(1e-3, perf_counter() - self._begun)

    def statistics(self) -> dict[str, Any]:
        """Counts by outcome, JSON-able."""
        return {
            "share": self._rules.share,
            "outcomes": dict(self.counts),
            "rows": self.rows_audited,
            "busy_seconds": round(self.busy_seconds + self.court.busy_seconds, 3),
            "stages": self.stages(),
            "peers": self.trust.table(),
        }

    # --- one audit

    async def _audit(self, sample: Sample) -> None:
        if sample.asked.experts is not None and self._dice() < SINGLE_SHARE:
            try:
                sample = await self._single(sample)
            except RiosError as error:  # what it signed for is looked at all the same
                log.debug("%s gives no single answer: %s", sample.owed.peer, error)
        if self._dice() < LOCAL_SHARE and (await self.look_here(sample) or await self._spot_check(sample)):
            return
        if not await self.compare(sample) and not await self.look_here(sample):
            self.counts["no replica"] += 1
            self._drop(sample)

    async def look_here(self, sample: Sample) -> bool:
        """Judge an answer with what is here: the loaded shard, which is quick, else files. False: nothing is here."""
        worker, owed = self._worker, sample.owed
        loaded = [worker.local(owed.model_id, owed.layer, group) if worker else None for group in sample.groups]
        here = [shard for shard in loaded if shard is not None]
        if worker is not None and len(here) == len(loaded):
            deadline = trio.current_time() + self._rules.call_timeout_ms / 1000
            asked = sample.asked
            found = await worker.compute(here, owed.layer, asked.rows, asked.experts, asked.weights, deadline)
            own = np.stack([wire.rounded(part, sample.manifest.wire_dtype) for part in found])
            self.rows_audited += own.shape[0] * own.shape[1]
            await self._weigh(sample, own, worker.device, None)
            return True
        if not sample.synthetic and not self.may_compute():
            return False
        if not await trio.to_thread.run_sync(self._judging.has, sample.manifest, owed.layer, sample.groups):
            return False
        rows = self._random.sample(range(owed.rows), min(owed.rows, ROWS_JUDGED_MAX))
        for place in range(len(sample.groups)):
            if await self._judge(sample, place, rows):
                return True
        self._pass(sample)
        return True

    async def _spot_check(self, sample: Sample) -> bool:
        """Now and then a small shard is fetched, so that replicas that lie alike are found out too."""
        place = self._random.randrange(len(sample.groups))
        shard = sample.manifest.expert_shard(sample.owed.layer, sample.groups[place])
        now = perf_counter()
        if self._fetch is None or now < self._next_fetch or shard.size_bytes > FETCH_BYTES_MAX:
            return False
        self._next_fetch = now + FETCH_SECONDS
        await self._bring(sample, place)
        rows = self._random.sample(range(sample.owed.rows), min(sample.owed.rows, ROWS_JUDGED_MAX))
        if not await self._judge(sample, place, rows):
            self._pass(sample)
        return True

    async def compare(self, sample: Sample) -> bool:
        """Ask another replica the same. False: there is none that answers."""
        refused: set[PeerId] = set()
        while len(refused) < REPLICAS_ASKED_MAX and (other := self._other(sample, refused)) is not None:
            peer, places, quote = other
            try:
                again = await self.ask(sample.manifest, peer, quote, sample.owed, places, synthetic=sample.synthetic)
            except RiosError as error:
                log.debug("%s is asked for no comparison: %s", peer, error)
                refused.add(peer)
                continue
            self.rows_audited += again.owed.rows * len(places)
            part = part_of(sample, places)
            await self._weigh(part, again.answer, again.owed.device, again)
            return True
        return False

    def _other(self, sample: Sample, refused: Collection[PeerId]) -> tuple[PeerId, list[int], Quote] | None:
        """Another peer that has not ``refused``, the places of the groups that it has too, and its price."""
        _, model = self._manifests[sample.owed.model_id]
        _, table = self._replicas.table(model, sample.owed.privacy)
        needs = table.needs[sample.owed.layer]
        held: dict[PeerId, list[int]] = {}
        for place, group in enumerate(sample.groups):
            for replica in needs[group].replicas:
                if replica.peer_id not in (sample.owed.peer, self._network.peer_id, *refused):
                    held.setdefault(replica.peer_id, []).append(place)
        if not held:
            return None
        most = max(map(len, held.values()))
        peer = self._random.choice(sorted(peer for peer, places in held.items() if len(places) == most))
        return peer, held[peer], table.quotes[peer]

    async def ask(
        self, manifest: Manifest, peer: PeerId, quote: Quote, like: Owed, places: Sequence[int], *, synthetic: bool
    ) -> Sample:
        """Ask a peer what ``like`` asked (of some of its places) as in any other call; the answer is counted."""
        _, model = self._manifests[manifest.model_id]
        chosen = [like.places[place] for place in places]
        channel = self._purse.ready(peer, quote)
        if channel is None:
            channel = await self._purse.channel(peer, quote)
        shape: dict[str, Any] = {"shape": [like.rows, model.width]}
        if model.dtype != "fp16":
            shape["dtype"] = model.dtype
        if like.asked.bf16:
            shape["bf16"] = like.asked.bf16
        groups = [place.group for place in chosen]
        header = calls.build(model.model_id, like.layer, groups, quote.number, channel, shape, model.top_k)
        buffers, timeout_ms = like.asked.buffers, self._rules.call_timeout_ms
        reply = await self._network.call(peer, calls.METHOD, header, buffers, deadline_ms=timeout_ms)
        owed = owed_of(peer, channel, quote, like, chosen, reply)
        try:
            sample = sample_of(manifest, owed, synthetic=synthetic)
        except IntegrityError as error:
            raise RemoteError("integrity", f"{peer} answered with {error.message}", peer_id=peer) from error
        self.watch(owed)
        if channel:
            spare = self._purse.bills.purpose("probe" if synthetic else "audit")
            self._purse.count(owed, Payers((), (), spare))
        return sample

    async def _single(self, sample: Sample) -> Sample:
        """The same peer's answer for one row and one of the experts that it chose there, alone."""
        asked, owed = sample.asked, sample.owed
        assert asked.experts is not None
        row = self._random.randrange(owed.rows)
        members = {expert: at for at, place in enumerate(owed.places) for expert in place.experts}
        chosen = sorted(set(asked.experts[row].tolist()) & set(members))
        if not chosen:
            return sample
        expert = self._random.choice(chosen)
        owed = replace(owed, places=(owed.places[members[expert]],))
        like = request_of(sample.manifest, owed, asked.rows[row : row + 1], expert, self._random)
        single = await self.ask(sample.manifest, owed.peer, owed.quote, like, [0], synthetic=sample.synthetic)
        self._drop(sample)
        return single

    # --- what a difference leads to

    async def _weigh(self, sample: Sample, other: wire.FloatRows, device: str, again: Sample | None) -> None:
        """Two answers to the same: ``again`` is the other one if a peer gave it, None if it was computed here."""
        quantised = sample.manifest.is_quantised
        same = bool(device) and device == sample.owed.device
        suspicious = False
        for place in range(len(sample.groups)):
            kinds = alike(sample.answer[place], other[place], same_class=same, quantised=quantised)
            rows = [row for row, kind in enumerate(kinds) if kind is Likeness.SUSPICIOUS][:ROWS_JUDGED_MAX]
            if rows:
                suspicious = True
                self.counts["differed"] += 1
                await self._bring(sample, place)
                for each in (sample, again):
                    if each is not None and await self._judge(each, place, rows):
                        return
        if not suspicious:
            for each in (sample, again):
                if each is not None:
                    self._pass(each)

    async def _bring(self, sample: Sample, place: int) -> None:
        """The weights of a group, fetched if they are not here. Raises RiosError if they cannot be had."""
        manifest, owed = sample.manifest, sample.owed
        group = sample.groups[place]
        if await trio.to_thread.run_sync(self._judging.has, manifest, owed.layer, (group,)):
            return
        if self._fetch is None:
            raise RemoteError("unavailable", f"the weights of layer {owed.layer}, group {group} are not here")
        await self._fetch(manifest, manifest.expert_shard(owed.layer, group))

    async def _judge(self, sample: Sample, place: int, rows: list[int]) -> bool:
        """Compute rows of an answer here; whether the peer is guilty."""
        manifest, owed, group = sample.manifest, sample.owed, sample.groups[place]

        def work() -> tuple[float, bool]:
            knows = self._judging.knows(manifest, owed.layer, group, owed.device)
            answer = sample.answer[place]
            return self._judging.worst(manifest, owed.layer, group, sample.asked, answer, rows), knows

        begun = perf_counter()
        worst, knows = await trio.to_thread.run_sync(work)
        self.busy_seconds += perf_counter() - begun
        if worst <= 1:
            return False
        what = f"layer {owed.layer}, group {group} of {manifest.name}"
        if not knows:
            self.counts["unclear"] += 1
            self.trust.unclear(owed.peer)
            log.info("%s: %s is off by %.3g, but how %r rounds is not known", owed.peer, what, worst, owed.device)
            return False
        self._accuse(sample, f"{what}: {worst:.3g} times as far off as an honest machine's answer may be")
        return True

    def _pass(self, sample: Sample) -> None:
        self.counts["passed"] += 1
        self.trust.passed(sample.owed.peer)
        self._drop(sample)

    def _drop(self, sample: Sample) -> None:
        """Nobody needs the worker's signature for this answer."""
        if self._notary is not None and sample.owed.channel:
            self._notary.forget(sample.owed.channel, sample.owed.leaf())

    def _accuse(self, sample: Sample, why: str) -> None:
        owed = sample.owed
        case = Case(
            owed.peer,
            owed.channel,
            owed.leaf(),
            lambda proof: evidence.write(evidence_of(owed, proof)),
            sample.synthetic,
        )
        self.court.convict(case, why)

    def _manifest_of(self, found: Evidence | StageEvidence) -> Manifest | None:
        model_id = found.model_id.hex()
        if isinstance(found, StageEvidence):
            return self._staged.get(model_id)
        known = self._manifests.get(model_id)
        return known[0] if known is not None else None
