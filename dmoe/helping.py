"""Replicas follow demand: a holder whose queue stays long asks the next node in rank to take the shard as well.

Owns: RPC ``model.help``, the samples of the own queues, which shards are held here because somebody asked. Does not
own: the ranking (``core.placement``), what is long and what is idle (``core.demand``), the taking (``hosting``).

Invariants:
1. Nobody takes a shard on a stranger's word: who asks must advertise it, the model must be deployed by somebody
   allowed, and the shard must fit here; a shard never has more than ``ASKED_MAX`` times the replicas deployed.
2. What was taken for demand is dropped like any surplus, but only once it is idle here; nothing is remembered over a
   restart.
"""

import logging
from collections.abc import Collection
from typing import Protocol

import trio

from config.errors import RequestError, RiosError
from config.vocabulary import PeerId
from dmoe.core.demand import Demand, Key, Use
from dmoe.stages.host import StageHost
from dmoe.worker import Worker
from p2p.face import Call, Network, Reply

log = logging.getLogger(__name__)

METHOD = "model.help"
ASK_DEADLINE_MS = 5_000
SAMPLE_SECONDS = 0.5


class Holder(Protocol):
    """What :class:`dmoe.hosting.Hosting` does for this."""

    def helper(self, model_id: str, index: int) -> PeerId | None:
        """Whom to ask to take a shard; None if nobody can or enough have it."""

    def take_in(self, peer: PeerId, model_id: str, index: int) -> str:
        """Begin to take a shard because ``peer`` asks; why not, or nothing if it is taken."""


class Helping:
    """The loop and the RPC. ``long_seconds``: so long a queue must stay long; ``idle_seconds``: so long a shard taken
    for demand must be idle before it may go."""

    def __init__(
        self,
        network: Network,
        worker: Worker,
        stages: StageHost | None,
        holder: Holder,
        *,
        long_seconds: float = 15.0,
        idle_seconds: float = 180.0,
        sample_seconds: float = SAMPLE_SECONDS,
    ) -> None:
        self.extras: set[Key] = set()
        """What is held here because somebody asked."""
        self._network = network
        self._worker = worker
        self._stages = stages
        self._holder = holder
        self._sample_seconds = sample_seconds
        self._demand = Demand(int(long_seconds * 1000), int(idle_seconds * 1000))
        network.serve(METHOD, self._asked)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch the own queues and ask for help until cancelled."""
        task_status.started()
        while True:
            await trio.sleep(self._sample_seconds)
            self._demand.observe(self._uses(), _now_ms())
            for key in self._demand.long(_now_ms()):
                await self._ask(key)

    def may_go(self, model_id: str, surplus: Collection[int]) -> list[int]:
        """Of the surplus shards of a model those that nothing speaks for: taken for demand, they must be idle."""
        return [
            index
            for index in surplus
            if (model_id, index) not in self.extras or self._demand.idle((model_id, index), _now_ms())
        ]

    def _uses(self) -> dict[Key, Use]:
        uses = self._worker.uses()
        return {**uses, **self._stages.uses()} if self._stages is not None else uses

    async def _ask(self, key: Key) -> None:
        model_id, index = key
        peer = self._holder.helper(model_id, index)
        self._demand.asked(key, _now_ms())
        if peer is None:
            return
        try:
            reply = await self._network.call(
                peer, METHOD, {"model": model_id, "shard": index}, deadline_ms=ASK_DEADLINE_MS
            )
        except RiosError as error:
            log.info("help for shard %d of %s: %s does not answer: %s", index, model_id[:12], peer, error)
            return
        why = str(reply.header.get("why", ""))[:200]
        log.info("the queue of shard %d of %s stays long: %s %s", index, model_id[:12], peer, why or "takes it as well")

    async def _asked(self, call: Call) -> Reply:
        model_id, index = call.header.get("model"), call.header.get("shard")
        if not isinstance(model_id, str) or type(index) is not int:
            raise RequestError("invalid_request", "model.help: model must be a model id and shard an index")
        why = self._holder.take_in(call.peer_id, model_id, index)
        if not why:
            self.extras.add((model_id, index))
        return Reply({"why": why})


def _now_ms() -> int:
    return int(trio.current_time() * 1000)
