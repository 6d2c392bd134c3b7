"""Replicas of stages are tried out with fresh random inputs before they are relied on.

Owns: which replica was tried, what it is asked. Does not own: the comparison and what follows (``audits``).

A probe is a short sequence of random rows, other ones each time: inputs that were published could be learnt by heart.
Nobody's prompt is in it, so evidence that comes of it may be shown to everybody.

Invariants:
1. One probe at a time per peer, a few in all. One that is busy or fails is tried again later.
2. Until a stage has a replica that passed, those that were not tried yet are used.
"""

import logging
from collections.abc import Iterator
from random import Random

import numpy as np
import trio

from config.errors import RiosError
from config.vocabulary import PeerId
from dmoe.core import wire
from dmoe.core.manifest import Manifest
from dmoe.probing import AT_ONCE, LOOK_SECONDS, PAUSE_SECONDS, RETRY_SECONDS, SCALE_MAX, TRIED_MAX
from dmoe.stages.audits import StageAudits
from p2p.face import Network

log = logging.getLogger(__name__)

PROBE_SECONDS = 20.0
"""A replica that takes longer, channel included, is tried again later."""
ROWS_MIN, ROWS_MAX, BYTES_MAX = 3, 12, 24 << 10
"""Rows of a probe; what came and what went has to fit into gossip twice over."""


class StageProber:
    """Tries out the stages that peers offer. :meth:`run` must be running."""

    def __init__(self, audits: StageAudits, network: Network, random: Random | None = None) -> None:
        self.done = 0
        """Probes that were answered and looked at."""
        self._audits = audits
        self._network = network
        self._random = random or Random()
        self._noise = np.random.default_rng(self._random.getrandbits(64))
        self._asked: set[PeerId] = set()
        self._later: dict[PeerId, float] = {}

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Probe until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                for manifest, stage, peer in self._untried():
                    self._asked.add(peer)
                    nursery.start_soon(self._try, manifest, stage, peer)
                with trio.move_on_after(PAUSE_SECONDS if self._asked else LOOK_SECONDS):
                    await self._network.directory.wait_change()
                await trio.sleep(PAUSE_SECONDS)

    def _untried(self) -> Iterator[tuple[Manifest, int, PeerId]]:
        """Replicas to try now, one of each peer, in the order of the manifest."""
        now, trust = trio.current_time(), self._audits.auditor.trust
        adverts = self._network.directory.adverts()
        for manifest in self._audits.models():
            for number, stage in enumerate(manifest.stages):
                index = manifest.shard_index(stage.id)
                peers = [
                    peer
                    for peer in self._network.directory.providers(manifest.model_id, index)
                    if peer != self._network.peer_id and peer in adverts and not adverts[peer].paused
                ]
                left = TRIED_MAX - sum(trust.is_probed(peer, manifest.model_id, index) for peer in peers)
                for peer in peers:
                    if left <= 0 or len(self._asked) >= AT_ONCE:
                        break
                    known = trust.is_probed(peer, manifest.model_id, index) or not trust.trusted(peer)
                    if not known and peer not in self._asked and self._later.get(peer, 0.0) <= now:
                        left -= 1
                        yield manifest, number, peer

    async def _try(self, manifest: Manifest, stage: int, peer: PeerId) -> None:
        self._later[peer] = trio.current_time() + RETRY_SECONDS
        try:
            with trio.move_on_after(PROBE_SECONDS):
                await self._probe(manifest, stage, peer)
                del self._later[peer]
        except RiosError as error:
            log.debug("trying %s out failed: %s", peer, error)
        await trio.sleep(PAUSE_SECONDS)
        self._asked.discard(peer)

    async def _probe(self, manifest: Manifest, stage: int, peer: PeerId) -> None:
        audits, width = self._audits, manifest.architecture.hidden
        fitting = max(1, BYTES_MAX // (width * (2 if manifest.wire_dtype == "fp16" else 4)))
        count = min(fitting, self._random.randint(ROWS_MIN, ROWS_MAX))
        scale = 2.0 ** self._random.uniform(-SCALE_MAX, SCALE_MAX)
        rows = (self._noise.standard_normal((count, width)) * scale).astype(np.float32)
        answer = await audits.asking.at(peer, manifest, stage, wire.rounded(rows, manifest.wire_dtype), synthetic=True)
        checked = await audits.compare(answer)
        self.done += 1
        if not checked:
            audits.auditor.counts["probe unchecked"] += 1  # the only replica: nothing to compare it with
        trust = audits.auditor.trust
        if trust.trusted(peer):
            trust.probed(peer, manifest.model_id, manifest.shard_index(manifest.stages[stage].id))
