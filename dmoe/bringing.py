"""Brings here what a node needs to answer requests with a model itself, whether or not it serves it to others.

Owns: finding a model by name or id, trying until its files are here, how far that is. Does not own: what is served to
others (``hosting``), a shard's way here (``taking``).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import trio

from config.errors import RiosError
from dmoe.core.manifest import Manifest, Shard
from dmoe.deployments import Deployments
from dmoe.fetching import Fetcher, Models
from dmoe.taking import RETRY_FIRST_SECONDS, Progress, Taker

log = logging.getLogger(__name__)

PAUSE_SECONDS_MAX = 30.0


@dataclass(slots=True)
class Bringing:
    """How far a model is that somebody waits for."""

    name: str = ""
    bytes_total: int = 0
    bytes_finished: int = 0
    current: Progress | None = None
    error: str = ""
    """Why the last attempt failed."""

    @property
    def bytes_done(self) -> int:
        """Bytes that are here."""
        return self.bytes_finished + (self.current.bytes_done if self.current else 0)


class Bringer:
    """Models that this node itself answers with: their files stay, whoever else has them."""

    def __init__(
        self,
        store: Models,
        fetcher: Fetcher,
        deployments: Deployments,
        taker: Taker,
        keeps: Callable[[Manifest, Shard], bool],
    ) -> None:
        """``keeps``: shards that this node needs beside the trunk to answer with a model."""
        self.pinned: set[str] = set()
        """Ids of those models."""
        self._store = store
        self._fetcher = fetcher
        self._deployments = deployments
        self._taker = taker
        self._keeps = keeps

    async def trunk(self, name_or_id: str, watched: Bringing | None = None) -> Manifest:
        """Bring here what a node needs to answer requests with a model: its trunk and its tokenizer, by id or by name.
        Tries until it succeeds (bound it with a cancel scope); raises only if the publisher is not allowed."""
        return await self._ensure(name_or_id, watched or Bringing(), whole=False)

    async def whole(self, name_or_id: str, watched: Bringing | None = None) -> Manifest:
        """The same with every shard, for a node that runs the whole model alone."""
        return await self._ensure(name_or_id, watched or Bringing(), whole=True)

    async def shard(self, manifest: Manifest, shard: Shard) -> None:
        """A shard's files, without serving them. Raises RiosError if nobody has them or there is no room."""
        await self._taker.store_only(manifest, manifest.shard_index(shard.id))

    async def _ensure(self, name_or_id: str, watched: Bringing, *, whole: bool) -> Manifest:
        pause = RETRY_FIRST_SECONDS / 4
        while True:
            try:
                manifest = await self._find(name_or_id)
                if manifest is not None:
                    self.pinned.add(manifest.model_id)
                    await self._bring(manifest, whole, watched)
                    return manifest
            except RiosError as error:
                if error.code == "forbidden":
                    raise
                watched.error = str(error)
                log.warning("%s is not here yet: %s; next try in %.0f s", name_or_id, error, pause)
            await trio.sleep(pause)
            pause = min(2 * pause, PAUSE_SECONDS_MAX)

    async def _bring(self, manifest: Manifest, whole: bool, watched: Bringing) -> None:
        wanted = {
            index: shard
            for index, shard in enumerate(manifest.shards)
            if whole or shard.kind == "trunk" or self._keeps(manifest, shard)
        }
        watched.name, watched.bytes_finished = manifest.name, 0
        watched.bytes_total = sum(shard.size_bytes for shard in wanted.values()) + manifest.tokenizer.size_bytes
        for index, shard in wanted.items():
            key = (manifest.model_id, index)
            watched.current = self._taker.progress.setdefault(key, Progress(bytes_total=shard.size_bytes))
            await self._taker.store_only(manifest, index)
            watched.current, watched.error = None, ""
            watched.bytes_finished += shard.size_bytes
        watched.bytes_finished = watched.bytes_total

    async def _find(self, name_or_id: str) -> Manifest | None:
        """A manifest by id or name, from disk, from peers, or by way of the deployments known."""
        for manifest in self._store.manifests().values():
            if name_or_id in (manifest.model_id, manifest.name):
                return manifest
        deployed = list(self._deployments.book.replicas())
        if len(name_or_id) == 64:
            if name_or_id not in deployed:
                await self._deployments.look_up(name_or_id)
            return await self._fetcher.manifest(name_or_id, self._deployments.book.deployers(name_or_id))
        for model_id in deployed:
            manifest = await self._fetcher.manifest(model_id, self._deployments.book.deployers(model_id))
            if manifest.name == name_or_id:
                return manifest
        return None
