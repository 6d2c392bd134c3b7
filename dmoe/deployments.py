"""How deployments spread: gossip for speed, a question to a random peer now and then for certainty, the DHT to start.

Owns: topic ``dmoe/deployments``, RPC ``deploy.list``, the file that keeps the records over restarts. Does not own: what
a node does about them (``hosting``).

Invariants:
1. Every record passes the book's rules, whatever way it came.
2. Two nodes that can call each other agree after one question, without gossip.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from random import Random

import trio

from config.errors import IntegrityError, LocalError, RiosError
from config.vocabulary import PeerId
from dmoe.core import deployment
from dmoe.core.deployment import DEFAULT_MODE, Book, Deployment, SignedDeployment
from dmoe.core.manifest import Manifest
from p2p.face import Call, Network, RecordRule, Reply

log = logging.getLogger(__name__)

TOPIC = "dmoe/deployments"
METHOD = "deploy.list"
NAMESPACE = "deploy"
ASK_DEADLINE_MS = 5_000
ASK_FIRST_SECONDS = 1.0
STATE_BYTES_MAX = 16 << 20
ANSWER_RECORDS_MAX = 200
"""Records in one answer: a frame holds no more than 256 buffers."""


class Deployments:
    """The book, kept in step with the other nodes and on disk. ``on_change`` is called after news."""

    def __init__(
        self,
        network: Network,
        *,
        allowed: frozenset[str],
        state_file: Path,
        on_change: Callable[[], None],
        ask_seconds: float = 10.0,
        random: Random | None = None,
    ) -> None:
        self.book = Book(network.peer_id, allowed)
        self.hosted: dict[str, list[str]] = {}
        """Model id -> ids of the shards served here when the state was saved last."""
        self._network = network
        self._state_file = state_file
        self._on_change = on_change
        self._ask_seconds = ask_seconds
        self._random = random or Random()
        self._saving = trio.Lock()
        self._dirty = False
        network.serve(METHOD, self._list)
        network.subscribe(TOPIC, self._heard)
        network.directory.accept_records(NAMESPACE, RecordRule(deployment.check_record, deployment.newest))

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ask peers in turn until cancelled."""
        await self.load()
        task_status.started()
        pause = ASK_FIRST_SECONDS
        while True:
            peers = list(self._network.peers())
            if peers:
                pause = min(self._ask_seconds, 2 * pause)
                await self.ask(self._random.choice(peers))
            if self._dirty:
                await self.save()
            await trio.sleep(pause * self._random.uniform(0.8, 1.2))

    async def announce(self, manifest: Manifest, replicas: int, mode: str = DEFAULT_MODE) -> Deployment:
        """Sign and spread this node's wish for a model; 0 takes it back."""
        old = self.book.own(manifest.model_id)
        seq = max(int(time.time() * 1000), old.seq + 1 if old else 0)
        digest = sha256(manifest.to_json()).digest()
        record = Deployment(manifest.model_id, digest, replicas, self._network.peer_id, seq, mode)
        signed = deployment.sign(self._network.identity, record)
        if not self.book.add(signed):
            limit = deployment.PER_DEPLOYER_MAX
            raise LocalError("local", f"this node has {limit} deployments already", "take one back first")
        await self.save()
        self._on_change()
        await self._best_effort(self._network.publish(TOPIC, signed.data))
        await self._best_effort(self._network.directory.put_record(NAMESPACE, record.model_id, signed.data))
        return record

    async def look_up(self, model_id: str) -> None:
        """Look for a deployment of a model in the DHT (slow)."""
        try:
            data = await self._network.directory.get_record(NAMESPACE, model_id)
        except RiosError as error:
            log.info("no deployment of %s in the DHT: %s", model_id[:12], error)
            return
        if data is not None:
            self._take([data], None)

    async def ask(self, peer: PeerId) -> None:
        """Learn every record a peer knows."""
        try:
            reply = await self._network.call(peer, METHOD, {}, deadline_ms=ASK_DEADLINE_MS)
        except RiosError as error:
            log.debug("deployments of %s: %s", peer, error)
            return
        self._take([bytes(buffer) for buffer in reply.buffers[: deployment.RECORDS_MAX]], peer)

    async def _heard(self, peer: PeerId, payload: bytes) -> None:
        self._take([payload], peer)

    def _take(self, records: list[bytes], peer: PeerId | None) -> None:
        news = 0
        for data in records:
            try:
                news += self.book.add(deployment.open_record(data))
            except IntegrityError as error:
                log.warning("a deployment from %s is refused: %s", peer or "the DHT", error)
        if news:
            self._dirty = True
            self._on_change()

    async def _list(self, call: Call) -> Reply:
        records = [signed.data for signed in self.book]
        if len(records) > ANSWER_RECORDS_MAX:  # whoever asks often enough hears all
            records = self._random.sample(records, ANSWER_RECORDS_MAX)
        return Reply({}, records)

    async def _best_effort(self, sending: object) -> None:
        try:
            await sending  # type: ignore[misc]
        except RiosError as error:
            log.info("spreading a deployment: %s; others will ask for it", error)

    # --- disk

    async def load(self) -> None:
        """Read the state file; a missing one is an empty state, a damaged one is reported and started anew."""
        try:
            records, self.hosted = await trio.to_thread.run_sync(_read_state, self._state_file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s cannot be read (%s): deployments are learnt again from peers", self._state_file, error)
            return
        for signed in records:
            self.book.add(signed)

    async def save(self) -> None:
        """Write the state file (atomically)."""
        async with self._saving:
            self._dirty = False
            state = {"deployments": [signed.data.hex() for signed in self.book], "hosted": self.hosted}
            try:
                await trio.to_thread.run_sync(_write_state, self._state_file, json.dumps(state))
            except OSError as error:
                self._dirty = True
                log.warning("%s cannot be written: %s", self._state_file, error)


def _read_state(path: Path) -> tuple[list[SignedDeployment], dict[str, list[str]]]:
    if not path.exists():
        return [], {}
    if path.stat().st_size > STATE_BYTES_MAX:
        raise ValueError(f"it is larger than {STATE_BYTES_MAX} bytes")
    state = json.loads(path.read_text())
    records = []
    for data in state["deployments"]:
        try:
            records.append(deployment.open_record(bytes.fromhex(data)))
        except IntegrityError as error:
            log.warning("%s: %s", path, error)
    hosted = {str(model): [str(shard) for shard in shards] for model, shards in state["hosted"].items()}
    return records, hosted


def _write_state(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
