"""Replicas are tried out with fresh random inputs before they are relied on.

Owns: which replica was tried, what it is asked. Does not own: the comparison and what follows (``audit``).

A probe is an ordinary call of one random row, of a random layer and expert of the shard: inputs that were published
could be learnt by heart. It is checked with the shard's weights where they are here, else against another replica.
Nobody's prompt is in it, so evidence that comes of it may be shown to everybody.

Invariants:
1. One probe at a time per peer, a few in all. One that is busy or fails is tried again later.
2. Until a shard has a replica that passed, those that were not tried yet are used.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import trio

from config.errors import RiosError
from config.vocabulary import PeerId
from dmoe.audit import Auditor
from dmoe.core.calls import Bytes
from dmoe.core.manifest import Manifest
from dmoe.core.routes import ModelMap
from dmoe.ports import Quote
from dmoe.purse import Owed
from dmoe.replicas import Replicas
from dmoe.samples import request_of

log = logging.getLogger(__name__)

AT_ONCE = 8
PROBE_SECONDS = 5.0
"""A replica that takes longer, channel included, is tried again later."""
PAUSE_SECONDS = 0.05
"""Between two probes of one peer: a new swarm is tried out at leisure."""
RETRY_SECONDS = 30.0
LOOK_SECONDS = 1.0
TRIED_MAX = 8
"""Replicas of a shard that are tried: each needs a channel, which locks money."""
SCALE_MAX = 3


@dataclass(frozen=True, slots=True)
class _Task:
    manifest: Manifest
    model: ModelMap
    peer: PeerId
    shard: int
    quote: Quote


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
        self._asked: set[PeerId] = set()
        self._later: dict[PeerId, float] = {}
        self._free = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Probe until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wake)
            task_status.started()
            while True:
                self._free = trio.Event()
                for task in self._untried():
                    self._asked.add(task.peer)
                    nursery.start_soon(self._try, task)
                with trio.move_on_after(LOOK_SECONDS):
                    await self._free.wait()

    async def _wake(self) -> None:
        while True:
            await self._replicas.changed.wait()
            self._free.set()

    async def _try(self, task: _Task) -> None:
        self._later[task.peer] = trio.current_time() + RETRY_SECONDS
        try:
            with trio.move_on_after(PROBE_SECONDS):
                await self._probe(task)
                del self._later[task.peer]
        except RiosError as error:
            log.debug("trying %s out failed: %s", task.peer, error)
        await trio.sleep(PAUSE_SECONDS)
        self._asked.discard(task.peer)
        self._free.set()

    def _untried(self) -> Iterator[_Task]:
        """Replicas to try now, one of each peer, in the order of the manifest."""
        now, trust = trio.current_time(), self._auditor.trust
        for manifest, model in self._auditor.models():
            for shard, found in self._replicas.every(model).items():
                peers = [replica.peer_id for replica in found if replica.peer_id != self._me]
                left = TRIED_MAX - sum(trust.is_probed(peer, model.model_id, shard) for peer in peers)
                for peer in peers:
                    if left <= 0 or len(self._asked) >= AT_ONCE:
                        break
                    tried = trust.is_probed(peer, model.model_id, shard) or not trust.trusted(peer)
                    if not tried and peer not in self._asked and self._later.get(peer, 0.0) <= now:
                        left -= 1
                        yield _Task(manifest, model, peer, shard, self._replicas.table(model)[1].quotes[peer])

    async def _probe(self, task: _Task) -> None:
        manifest, model, peer, shard, quote = task.manifest, task.model, task.peer, task.shard, task.quote
        layer = self._random.choice(manifest.layers_of(manifest.shards[shard]))
        place = next(place for place in model.layers[layer] if place.shard == shard)
        scale = 2.0 ** self._random.uniform(-SCALE_MAX, SCALE_MAX)
        rows = (self._noise.standard_normal((1, model.width)) * scale).astype(np.float32)
        blank = Owed(peer, b"", quote, model.model_id, layer, (place,), 1, None, Bytes(()), Bytes(()))
        expert = self._random.choice(place.experts) if model.top_k else None
        like = request_of(manifest, blank, rows, expert, self._random)
        sample = await self._auditor.ask(manifest, peer, quote, like, [0], synthetic=True)
        checked = await self._auditor.look_here(sample) or await self._auditor.compare(sample)
        self.done += 1
        if not checked:
            self._auditor.counts["probe unchecked"] += 1  # the only replica: nothing to compare it with
        if self._auditor.trust.trusted(peer):
            self._auditor.trust.probed(peer, model.model_id, shard)
