"""Audits: some answers are asked for again, elsewhere or here, and a wrong one has consequences.

Owns: which answers are looked at, against what, and what a difference leads to. Does not own: the verdict
(``core/verdict``), reputations (``trust``), fresh inputs before first use (``probing``), receipts (the ledger).

An audit is an ordinary ``expert.run`` in the background: the worker that is asked cannot tell it from others, and no
token waits for it. A quarter is computed here, where the shard is loaded or its files are; now and then one is fetched
for that.

Invariants:
1. Nobody is guilty because others disagree: a difference is a reason to compute the answer here, in fp64.
2. Audits wait in a bounded queue; what does not fit is not audited.
3. What was asked in a real prompt stays in this node's data folder. Only evidence over random inputs is gossiped.
4. What may not be seen by everybody is shown to nobody else for an audit.
5. What others gossip is believed after this node's own verdict, and only if it has the shard.
"""

import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import numpy as np
import trio

from config.errors import IntegrityError, RemoteError, RiosError
from config.vocabulary import MIB, PeerId
from dmoe.core import calls, evidence, stageevidence, wire
from dmoe.core.calls import Bytes
from dmoe.core.evidence import Asked, Evidence
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.routes import ModelMap
from dmoe.core.routing import NOBODY
from dmoe.core.stageevidence import StageEvidence
from dmoe.core.verdict import Likeness, alike
from dmoe.judging import Judging
from dmoe.ports import Notary, Quote
from dmoe.purse import Owed, Purse
from dmoe.replicas import Replicas
from dmoe.trust import Trust
from dmoe.worker import Worker
from p2p.face import Network, Reply

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
PROOF_SECONDS = 20.0
"""How long a receipt is waited for once an answer is known to be wrong."""
FETCH_SECONDS, FETCH_BYTES_MAX = 600.0, 256 * MIB
"""How often a shard that is not here is fetched only to look at an answer that nobody suspects, and how large."""
SAVE_SECONDS = 60.0
TOPIC = "rios/evidence/1"
GOSSIP_BYTES_MAX = 60 << 10
GOSSIP_QUEUE_MAX = 16
SEEN_MAX = 4096
FAR = 0.05
"""Answers of machines whose arithmetic is not known may be so far off (relative)."""

Fetch = Callable[[Manifest, Shard], Awaitable[None]]
Blame = Callable[[PeerId, str, str], None]


@dataclass(frozen=True, slots=True)
class Sample:
    """An answer to look at: ``answer f32[G, N, H]``. ``synthetic``: nobody's prompt. ``local``: judge it here."""

    manifest: Manifest
    owed: Owed
    asked: Asked
    answer: wire.FloatRows
    synthetic: bool = False

    @property
    def groups(self) -> tuple[int, ...]:
        """The sum groups asked."""
        return tuple(place.group for place in self.owed.places)


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
        self._blame = blame
        self._random = random or Random()
        self._dice = self._random.random
        self._manifests: dict[str, tuple[Manifest, ModelMap]] = {}
        self.stages: Callable[[], Mapping[str, int]] = dict
        """What is told of audits of stages."""
        self._staged: dict[str, Manifest] = {}
        self._begun = perf_counter()
        self._next_fetch = 0.0
        self._put, self._queue = trio.open_memory_channel[Owed](QUEUE_MAX)
        self._hear, self._heard = trio.open_memory_channel[tuple[PeerId, bytes]](GOSSIP_QUEUE_MAX)
        self._seen: dict[bytes, None] = {}
        self._nursery: trio.Nursery | None = None
        network.subscribe(TOPIC, self._on_gossip)

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
        copied = _copied(owed)
        try:
            self._put.send_nowait(copied)
        except trio.WouldBlock:
            self.counts["dropped"] += 1
            return
        self.watch(copied)

    def watch(self, owed: Owed) -> None:
        """Keep the worker's signature for an answer."""
        if self._notary is not None and owed.channel:
            self._notary.watch(owed.channel, owed.leaf())

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Audit until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._hear_evidence)
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
        return self.busy_seconds <= LOCAL_TIME_SHARE * max(1e-3, perf_counter() - self._begun)

    def statistics(self) -> dict[str, Any]:
        """Counts by outcome, JSON-able."""
        return {
            "share": self._rules.share,
            "outcomes": dict(self.counts),
            "rows": self.rows_audited,
            "busy_seconds": round(self.busy_seconds, 3),
            "stages": self.stages(),
            "peers": self.trust.table(),
        }

    # --- one audit

    async def _audit(self, sample: Sample) -> None:
        if sample.asked.experts is not None and self._dice() < SINGLE_SHARE:
            sample = await self._single(sample)
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
        other = self._other(sample)
        if other is None:
            return False
        peer, places, quote = other
        again = await self.ask(sample.manifest, peer, quote, sample.owed, places, synthetic=sample.synthetic)
        self.rows_audited += again.owed.rows * len(places)
        part = _part(sample, places)
        await self._weigh(part, again.answer, again.owed.device, again)
        return True

    def _other(self, sample: Sample) -> tuple[PeerId, list[int], Quote] | None:
        """Another peer, the places of the groups that it has too, and its price."""
        _, model = self._manifests[sample.owed.model_id]
        _, table = self._replicas.table(model, sample.owed.privacy)
        needs = table.needs[sample.owed.layer]
        held: dict[PeerId, list[int]] = {}
        for place, group in enumerate(sample.groups):
            for replica in needs[group].replicas:
                if replica.peer_id not in (sample.owed.peer, self._network.peer_id):
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
        owed = _owed_of(peer, channel, quote, like, chosen, reply)
        try:
            sample = sample_of(manifest, owed, synthetic=synthetic)
        except IntegrityError as error:
            raise RemoteError("integrity", f"{peer} answered with {error.message}", peer_id=peer) from error
        self.watch(owed)
        if channel:
            self._purse.count(owed)
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
        self._drop(sample)
        peer, quote = owed.peer, owed.quote
        return await self.ask(sample.manifest, peer, quote, like, [0], synthetic=sample.synthetic)

    # --- what a difference leads to

    async def _weigh(self, sample: Sample, other: wire.FloatRows, device: str, again: Sample | None) -> None:
        """Two answers to the same: ``again`` is the other one if a peer gave it, None if it was computed here."""
        quantised = sample.manifest.quantisation not in ("fp32", "fp16")
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
        self.convict(case, why)

    def convict(self, case: "Case", why: str) -> None:
        """This node's own verdict: the peer is not called any more; the rest once its signature is here."""
        self.counts["guilty"] += 1
        first = self.trust.trusted(case.peer)
        self.trust.guilty(case.peer, why)
        security.error("%s gave a wrong answer: %s", case.peer, why)
        if first:
            assert self._nursery is not None
            self._nursery.start_soon(self._prosecute, case, why)

    async def _prosecute(self, case: "Case", why: str) -> None:
        notary, channel = self._notary, case.channel
        proof = await notary.proof(channel, case.leaf, PROOF_SECONDS) if notary is not None and channel else None
        try:
            if proof is None:
                security.error("%s did not sign for that answer: it can be proved to nobody else", case.peer)
            else:
                data = case.write(proof)
                await self._keep(case.peer, case.leaf, data)
                if case.synthetic and len(data) <= GOSSIP_BYTES_MAX:
                    await self._network.publish(TOPIC, data)
        except RiosError as error:
            log.warning("evidence against %s: %s", case.peer, error)
        await self._punish(case.peer, why)

    async def _punish(self, peer: PeerId, why: str) -> None:
        self._blame(peer, "cheat", why)
        if self._notary is None:
            return
        try:
            await self._notary.stop(peer, f"proved wrong: {why}")
        except RiosError as error:  # it is not called any more either way, and nothing is paid without calls
            log.warning("the channel to %s could not be stopped: %s", peer, error)

    async def _keep(self, peer: PeerId, leaf: bytes, data: bytes) -> None:
        folder = self._rules.folder
        if folder is None:
            return
        file = folder / f"{peer[-12:]}-{leaf.hex()[:16]}.evidence"
        try:
            await trio.to_thread.run_sync(_write, file, data)
        except OSError as error:
            log.warning("cannot write %s: %s", file, error.strerror)
            return
        security.error("evidence against %s: %s (rios audit verify)", peer, file)

    # --- what others found

    async def _on_gossip(self, sender: PeerId, data: bytes) -> None:
        if sender == self._network.peer_id or len(data) > GOSSIP_BYTES_MAX:
            return
        try:
            self._hear.send_nowait((sender, data))
        except trio.WouldBlock:
            self.counts["gossip dropped"] += 1

    async def _hear_evidence(self) -> None:
        async for sender, data in self._heard:
            try:
                await self._verify_gossip(sender, data)
            except IntegrityError as error:
                self.counts["gossip refused"] += 1
                self._blame(sender, "bad_record", f"evidence that does not hold: {error.message}")
            except RiosError as error:
                self.counts["gossip not judged"] += 1
                log.debug("evidence of %s: %s", sender, error)

    async def _verify_gossip(self, sender: PeerId, data: bytes) -> None:
        """Raises IntegrityError if the sender should have known better."""
        found = stageevidence.read(data) if stageevidence.is_stage(data) else evidence.read(data)
        peer, manifest = PeerId(found.worker), self._manifest_of(found)
        if manifest is None or self._notary is None or not self.trust.trusted(peer):
            return
        leaf = found.leaf_of(manifest) if isinstance(found, StageEvidence) else found.leaf
        if leaf in self._seen:
            return
        self._notary.check(peer, leaf, found.receipt, found.signature, found.index, found.path)
        self._seen[leaf] = None
        if len(self._seen) > SEEN_MAX:
            del self._seen[next(iter(self._seen))]
        if peer == self._network.peer_id:
            return
        if not await trio.to_thread.run_sync(self._can_judge, manifest, found):
            self.counts["gossip not judged"] += 1
            return
        begun = perf_counter()
        judgement = await trio.to_thread.run_sync(self._judging.judge, found)
        self.busy_seconds += perf_counter() - begun
        if judgement.outcome == "not guilty":
            raise IntegrityError("integrity", f"{peer} is not guilty: {judgement.why}")
        if judgement.outcome == "guilty":
            self.counts["guilty by gossip"] += 1
            self.trust.guilty(peer, judgement.why)
            security.error("%s gave %s a wrong answer: %s", peer, sender, judgement.why)
            await self._keep(peer, leaf, data)
            await self._punish(peer, judgement.why)

    def _manifest_of(self, found: Evidence | StageEvidence) -> Manifest | None:
        model_id = found.model_id.hex()
        if isinstance(found, StageEvidence):
            return self._staged.get(model_id)
        known = self._manifests.get(model_id)
        return known[0] if known is not None else None

    def _can_judge(self, manifest: Manifest, found: Evidence | StageEvidence) -> bool:
        if isinstance(found, StageEvidence):
            return self._judging.has_stage(manifest, found.stage(manifest))
        return self._judging.has(manifest, found.layer, found.groups)


@dataclass(frozen=True, slots=True)
class Case:
    """A wrong answer, and how it is written down once its signature is here."""

    peer: PeerId
    channel: bytes
    leaf: bytes
    write: Callable[[Any], bytes]
    synthetic: bool


def sample_of(manifest: Manifest, owed: Owed, *, synthetic: bool = False) -> Sample:
    """An answer as numbers. Raises IntegrityError if its bytes are malformed."""
    asked = evidence.numbers_of(owed.asked, owed.rows, manifest)
    answer = evidence.answer_of(owed.answered, len(owed.places), owed.rows, manifest)
    return Sample(manifest, owed, asked, answer, synthetic)


def request_of(manifest: Manifest, like: Owed, row: wire.FloatRows, expert: int | None, random: Random) -> Owed:
    """What a call like another one would ask with another row ``f32[1, H]``, of one expert alone (None: there is no
    choice). It looks as any other: the row's other choices are experts of other groups, and weigh less."""
    shape, buffer = wire.encode(row, manifest.wire_dtype)
    buffers: list[calls.Buffer] = [buffer]
    experts = None
    if expert is not None:
        top_k = manifest.architecture.router.top_k
        near = {member for place in like.places for member in place.experts}
        others = [other for other in range(manifest.experts_per_layer) if other not in near]
        chosen = [expert, *random.sample(others, min(top_k - 1, len(others)))]
        scores = sorted((random.gauss(0, 1) for _ in chosen), reverse=True)
        shares = np.exp(scores) / np.exp(scores).sum()
        experts, weights = np.full((1, top_k), NOBODY, "<i4"), np.zeros((1, top_k), "<f4")
        experts[0, : len(chosen)], weights[0, : len(chosen)] = chosen, shares
        buffers += [experts.tobytes(), weights.tobytes()]
    asked = Bytes(buffers, calls.bf16_of(shape))
    return Owed(
        like.peer,
        like.channel,
        like.quote,
        like.model_id,
        like.layer,
        like.places,
        1,
        experts,
        asked,
        Bytes(()),
        privacy=like.privacy,
    )


def evidence_of(owed: Owed, proof: Any) -> Evidence:  # noqa: ANN401 - a Proof of the ledger
    """An answer and its worker's signature in one."""
    return Evidence(
        version=evidence.VERSION,
        worker=owed.peer,
        model_id=bytes.fromhex(owed.model_id),
        layer=owed.layer,
        groups=tuple(place.group for place in owed.places),
        rows=owed.rows,
        device=owed.device,
        asked=tuple(bytes(buffer) for buffer in owed.asked.buffers),
        asked_bf16=owed.asked.bf16,
        answered=bytes(owed.answered.buffers[0]),
        answered_bf16=owed.answered.bf16,
        receipt=proof.receipt,
        signature=proof.signature,
        index=proof.index,
        path=proof.path,
    )


def _owed_of(peer: PeerId, channel: bytes, quote: Quote, like: Owed, places: Sequence[Any], reply: Reply) -> Owed:
    if len(reply.buffers) != 1:
        raise RemoteError("protocol", f"{peer} answered with {len(reply.buffers)} buffers", peer_id=peer)
    answered = Bytes((bytes(reply.buffers[0]),), calls.bf16_of(reply.header))
    device = calls.device_of(reply.header)
    what = like.model_id, like.layer, places, like.rows, like.experts
    return Owed(peer, channel, quote, *what, like.asked, answered, device, like.privacy)


def _copied(owed: Owed) -> Owed:
    """With buffers of its own: those of a call are used again."""
    asked, answered = (Bytes(tuple(map(bytes, b.buffers)), b.bf16) for b in (owed.asked, owed.answered))
    experts = None if owed.experts is None else owed.experts.copy()
    what = owed.peer, owed.channel, owed.quote, owed.model_id, owed.layer, tuple(owed.places), owed.rows
    return Owed(*what, experts, asked, answered, owed.device, owed.privacy)


def _part(sample: Sample, places: Sequence[int]) -> Sample:
    """Of an answer, what is compared: its leaf stays that of the whole."""
    if len(places) == len(sample.groups):
        return sample
    return Part(
        sample.manifest, sample.owed, sample.asked, sample.answer[list(places)], sample.synthetic, tuple(places)
    )


@dataclass(frozen=True, slots=True)
class Part(Sample):
    """Some of an answer's groups."""

    places: tuple[int, ...] = ()

    @property
    def groups(self) -> tuple[int, ...]:
        """The sum groups compared."""
        return tuple(self.owed.places[place].group for place in self.places)


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    with part.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)
