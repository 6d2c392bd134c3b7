"""Replicas are tried out with fresh random inputs before they are relied on.

Owns: which replica was tried, what it is asked. Does not own: the comparison and what follows (``audit``).

A probe is an ordinary call of one random row, of a random layer and expert of the shard: inputs that were published
could be learnt by heart. It is checked with the shard's weights where they are here, else against another replica.
Nobody's prompt is in it, so evidence that comes of it may be shown to everybody.

Invariants:
1. One probe at a time; each waits for the last. A replica that is busy or fails is tried again later.
2. Until a shard has a replica that passed, those that were not tried yet are used.
"""

import logging
from collections.abc import Iterator
from random import Random

import numpy as np
import trio

from config.errors import RiosError
from config.vocabulary import PeerId
from dmoe.audit import Auditor, request_of
from dmoe.core.calls import Bytes
from dmoe.core.manifest import Manifest
from dmoe.core.routes import ModelMap
from dmoe.ports import Quote
from dmoe.purse import Owed
from dmoe.replicas import Replicas

log = logging.getLogger(__name__)

PAUSE_SECONDS = 0.05
"""Between two probes: a new swarm is tried out at leisure."""
RETRY_SECONDS = 30.0
LOOK_SECONDS = 1.0
SCALE_MAX = 3


class Prober:
    """Tries out what the tables of replicas offer. :meth:`run` must be running."""

    def __init__(self, auditor: Auditor, replicas: Replicas, me: PeerId, random: Random | None = None) -> None:
        self.done = 0
        """Probes that were answered and looked at."""
        self._auditor = auditor
        self._replicas = replicas
        self._me = me
        self._random = random or Random()
        self._noise = np.random.default_rng(self._random.getrandbits(64))
        self._later: dict[tuple[PeerId, str, int], float] = {}

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Probe until cancelled."""
        task_status.started()
        while True:
            found = next(self._untried(), None)
            if found is None:
                with trio.move_on_after(LOOK_SECONDS):
                    await self._replicas.changed.wait()
                continue
            manifest, model, peer, shard, quote = found
            try:
                await self._probe(manifest, model, peer, shard, quote)
                self._later.pop((peer, model.model_id, shard), None)
            except RiosError as error:
                log.debug("trying %s out failed: %s", peer, error)
                self._later[peer, model.model_id, shard] = trio.current_time() + RETRY_SECONDS
            await trio.sleep(PAUSE_SECONDS)

    def _untried(self) -> Iterator[tuple[Manifest, ModelMap, PeerId, int, Quote]]:
        """Replicas to try, in the order of the manifest."""
        now, trust = trio.current_time(), self._auditor.trust
        for manifest, model in self._auditor.models():
            for shard, found in self._replicas.every(model).items():
                for replica in found:
                    peer, key = replica.peer_id, (replica.peer_id, model.model_id, shard)
                    tried = peer == self._me or trust.is_probed(*key) or not trust.trusted(peer)
                    if not tried and self._later.get(key, 0.0) <= now:
                        quote = self._replicas.table(model)[1].quotes[peer]
                        yield manifest, model, peer, shard, quote

    async def _probe(self, manifest: Manifest, model: ModelMap, peer: PeerId, shard: int, quote: Quote) -> None:
        layer = self._random.choice(manifest.layers_of(manifest.shards[shard]))
        place = next(place for place in model.layers[layer] if place.shard == shard)
        scale = 2.0 ** self._random.uniform(-SCALE_MAX, SCALE_MAX)
        rows = (self._noise.standard_normal((1, model.width)) * scale).astype(np.float32)
        blank = Owed(peer, b"", quote, model.model_id, layer, (place,), 1, None, Bytes(()), Bytes(()))
        expert = self._random.choice(place.experts) if model.top_k else None
        like = request_of(manifest, blank, rows, expert)
        sample = await self._auditor.ask(manifest, peer, quote, like, [0], synthetic=True)
        checked = await self._auditor.look_here(sample) or await self._auditor.compare(sample)
        self.done += 1
        if not checked:
            self._auditor.counts["probe unchecked"] += 1  # the only replica: nothing to compare it with
        if self._auditor.trust.trusted(peer):
            self._auditor.trust.probed(peer, model.model_id, shard)
