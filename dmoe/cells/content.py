"""A shard on its way into a cell: its files as open descriptors, its manifest in sealed memory.

Owns: what a process is given of a shard, and what address space it may take for it.

The parent verifies the files by their hashes and opens them; it reads nothing else of them. Weights come as read-only
descriptors rather than as a copy in memory: pages that ONNX Runtime has packed can be given back, so that weights are
in memory once, as they are in this process.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from config.errors import LocalError, RemoteError
from config.vocabulary import MIB
from dmoe.cells import lanes
from dmoe.cells.link import Link
from dmoe.core.manifest import Manifest, ModelFile, Shard
from dmoe.plainfile import open_plain
from dmoe.store import disk_errors

LOAD_SECONDS_MAX = 30.0
LOAD_BYTES_PER_SECOND = 20 * MIB
"""A load may take so long on top, by its size: packing weights on a busy machine."""
SLACK_BYTES = 256 * MIB
"""Address space per shard beyond its files and twice its memory."""
SPOOL_SLACK_BYTES = 4 * MIB


class Store(Protocol):
    """Where shards lie: :class:`dmoe.store.ModelStore`."""

    def verify_shard(self, model_id: str, shard_id: str) -> None:
        """Raises IntegrityError or LocalError unless its files are here, whole and unaltered."""

    def path(self, model_id: str, file: ModelFile) -> Path:
        """Where a file of a model is."""


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """A shard that a cell holds; calls name it by ``number``."""

    number: int
    manifest: Manifest
    shard: Shard
    store: Store

    @property
    def memory_bytes(self) -> int:
        """Address space it may take: its files, maybe joined once more, and twice its memory."""
        return 2 * self.shard.size_bytes + 2 * self.shard.ram_bytes + SLACK_BYTES

    @property
    def has_caches(self) -> bool:
        """Whether it keeps sequences' keys and values."""
        return self.shard.kind == "stage"

    @property
    def needs_spool(self) -> bool:
        """Whether weights are joined for it."""
        return self.shard.kind == "stage" and self.manifest.architecture.router.kind == "all"

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Those whose files it consists of."""
        return (self.shard,)

    @property
    def form(self) -> str:
        """How it is opened."""
        return self.shard.kind

    def give(self, link: Link) -> None:
        """Load it into a process; blocking. Raises IntegrityError for files that are not what they should be,
        LocalError if it cannot be loaded, also because the process ended."""
        manifest, shard = self.manifest, self.shard
        for each in self.shards:
            self.store.verify_shard(manifest.model_id, each.id)
        try:
            for file in {file.path: file for each in self.shards for file in each.files}.values():
                with _opened(self.store.path(manifest.model_id, file)) as opened:
                    link.tell({"do": "file", "path": file.path, "size": file.size_bytes}, [opened.fileno()])
            if self.needs_spool:
                self._give_spool(link)
            self._load(link)
        except RemoteError as error:
            why = f"{shard.id}: the cell ended while it loaded ({error.message})"
            raise LocalError("local", why, "the shard may be made to harm, or memory is short") from error

    def _give_spool(self, link: Link) -> None:
        """A nameless file for weights that are joined: their pages can be given back, unlike a process's own."""
        folder = self.store.path(self.manifest.model_id, self.shard.files[0]).parent
        size = sum(shard.size_bytes for shard in self.shards) + SPOOL_SLACK_BYTES
        with disk_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is met here, not by a signal in the cell
            link.tell({"do": "spool", "size": size}, [file.fileno()])

    def _load(self, link: Link) -> None:
        text = self.manifest.to_json()
        sizes = sum(shard.size_bytes + shard.ram_bytes for shard in self.shards)
        seconds = LOAD_SECONDS_MAX + sizes / LOAD_BYTES_PER_SECOND
        index = self.manifest.shard_index(self.shard.id)
        descriptor = lanes.sealed_copy(text, "rios-manifest")
        try:
            message = {"do": "load", "number": self.number, "shard": index, "size": len(text), "form": self.form}
            link.tell({**message, "layers": self.shard.layers}, [descriptor], seconds)
        finally:
            os.close(descriptor)


def _opened(path: Path) -> BinaryIO:
    return os.fdopen(open_plain(path), "rb")
