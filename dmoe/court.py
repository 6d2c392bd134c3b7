"""What follows when an answer is wrong: no more calls, evidence on disk, the channel stopped, others told; and what is
made of evidence that others send.

Invariants: what was asked in a real prompt is written to this node's data folder and never gossiped; what others gossip
is believed after this node's own verdict, and only if it has the shard.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import trio

from config.errors import IntegrityError, RiosError
from config.vocabulary import PeerId
from dmoe.core import evidence, stageevidence
from dmoe.core.evidence import Evidence
from dmoe.core.manifest import Manifest
from dmoe.core.stageevidence import StageEvidence
from dmoe.judging import Judging
from dmoe.ports import Notary
from dmoe.trust import Trust
from p2p.face import Network

log = logging.getLogger(__name__)
security = logging.getLogger("rios.security.trust")

PROOF_SECONDS = 20.0
"""How long a receipt is waited for once an answer is known to be wrong."""
TOPIC = "rios/evidence/1"
GOSSIP_BYTES_MAX = 60 << 10
GOSSIP_QUEUE_MAX = 16
SEEN_MAX = 4096

Blame = Callable[[PeerId, str, str], None]


@dataclass(frozen=True, slots=True)
class Case:
    """A wrong answer, and how it is written down once its signature is here."""

    peer: PeerId
    channel: bytes
    leaf: bytes
    write: Callable[[Any], bytes]
    synthetic: bool


class Court:
    """Acts on verdicts. :meth:`run` must be running."""

    def __init__(
        self,
        network: Network,
        judging: Judging,
        trust: Trust,
        counts: Counter[str],
        manifest_of: Callable[[Evidence | StageEvidence], Manifest | None],
        *,
        notary: Notary | None = None,
        blame: Blame = lambda peer, fault, why: None,
        folder: Path | None = None,
    ) -> None:
        self.busy_seconds = 0.0
        """Spent on verdicts about what others sent."""
        self._network, self._judging, self._trust, self._counts = network, judging, trust, counts
        self._manifest_of, self._notary, self._blame, self._folder = manifest_of, notary, blame, folder
        self._hear, self._heard = trio.open_memory_channel[tuple[PeerId, bytes]](GOSSIP_QUEUE_MAX)
        self._seen: dict[bytes, None] = {}
        self._nursery: trio.Nursery | None = None
        network.subscribe(TOPIC, self._on_gossip)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Prosecute and hear evidence until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await self._hear_evidence()

    def convict(self, case: Case, why: str) -> None:
        """This node's own verdict: the peer is not called any more; the rest once its signature is here."""
        self._counts["guilty"] += 1
        first = self._trust.trusted(case.peer)
        self._trust.guilty(case.peer, why)
        security.error("%s gave a wrong answer: %s", case.peer, why)
        if first:
            assert self._nursery is not None
            self._nursery.start_soon(self._prosecute, case, why)

    async def _prosecute(self, case: Case, why: str) -> None:
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
        folder = self._folder
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
            self._counts["gossip dropped"] += 1

    async def _hear_evidence(self) -> None:
        async for sender, data in self._heard:
            try:
                await self._verify_gossip(sender, data)
            except IntegrityError as error:
                self._counts["gossip refused"] += 1
                self._blame(sender, "bad_record", f"evidence that does not hold: {error.message}")
            except RiosError as error:
                self._counts["gossip not judged"] += 1
                log.debug("evidence of %s: %s", sender, error)

    async def _verify_gossip(self, sender: PeerId, data: bytes) -> None:
        """Raises IntegrityError if the sender should have known better."""
        found = stageevidence.read(data) if stageevidence.is_stage(data) else evidence.read(data)
        peer, manifest = PeerId(found.worker), self._manifest_of(found)
        if manifest is None or self._notary is None or not self._trust.trusted(peer):
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
            self._counts["gossip not judged"] += 1
            return
        begun = perf_counter()
        judgement = await trio.to_thread.run_sync(self._judging.judge, found)
        self.busy_seconds += perf_counter() - begun
        if judgement.outcome == "not guilty":
            raise IntegrityError("integrity", f"{peer} is not guilty: {judgement.why}")
        if judgement.outcome == "guilty":
            self._counts["guilty by gossip"] += 1
            self._trust.guilty(peer, judgement.why)
            security.error("%s gave %s a wrong answer: %s", peer, sender, judgement.why)
            await self._keep(peer, leaf, data)
            await self._punish(peer, judgement.why)

    def _can_judge(self, manifest: Manifest, found: Evidence | StageEvidence) -> bool:
        if isinstance(found, StageEvidence):
            return self._judging.has_stage(manifest, found.stage(manifest))
        return self._judging.has(manifest, found.layer, found.groups)


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    with part.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)
