"""Make a model's shards, manifest and golden logits out of a GGUF file or a folder in Hugging Face layout.

Owns: the order of an import's steps and its manifest. One shard file is in memory at a time. Everything is written to a
temporary folder inside the store, which becomes the model in one rename: a failed import leaves nothing behind.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio
from msgspec.structs import replace

from dmoe.core.manifest import Golden, Manifest, ModelFile, Quantisation, Shard, Source
from dmoe.golden import compute_golden
from dmoe.importer.cut import Cut, weight_count
from dmoe.importer.folder import FolderSource
from dmoe.importer.model import Model, read_folder, read_gguf
from dmoe.importer.scratch import scratch
from dmoe.importer.sources import GgufSource
from dmoe.importer.write import write_file
from dmoe.runtime import RuntimeOptions
from dmoe.shardfile import ShardFile, to_bytes
from dmoe.store import ModelStore, disk_errors
from p2p.core.identity import Identity

Progress = Callable[[int, int, str], None]
"""``(files done, files in all, what is being made)``."""


def import_gguf(
    path: Path,
    store: ModelStore,
    identity: Identity,
    *,
    name: str = "",
    quantisation: Quantisation = "source",
    progress: Progress = lambda done, total, what: None,
    threads: int = 0,
) -> Manifest:
    """Import a GGUF file into the store, signed by ``identity``. Blocking: run it in a thread or a process of its own.

    ``quantisation``: ``source`` keeps the file's own weights without loss. ``threads``: for the golden logits, which
    depend on it by less than their tolerance; 0: all cores. Raises IntegrityError for a file that is
    broken or not supported, LocalError ``disk_full`` if the disk is.
    """
    return _import(read_gguf(GgufSource(path)), store, identity, name, quantisation, progress, threads)


def import_folder(
    path: Path,
    store: ModelStore,
    identity: Identity,
    *,
    name: str = "",
    quantisation: Quantisation = "source",
    progress: Progress = lambda done, total, what: None,
    threads: int = 0,
) -> Manifest:
    """As :func:`import_gguf`, of a folder with ``config.json``, safetensors and ``tokenizer.json``. 16-bit floats
    become fp32, without loss."""
    return _import(read_folder(FolderSource(path)), store, identity, name, quantisation, progress, threads)


def _import(
    model: Model,
    store: ModelStore,
    identity: Identity,
    name: str,
    quantisation: Quantisation,
    progress: Progress,
    threads: int,
) -> Manifest:
    with scratch(store.root, model.source.bytes_needed(quantisation)) as folder:
        with disk_errors(folder):
            manifest = _Import(model, folder, name, quantisation, progress).run(identity, threads)
        store.adopt(folder, manifest)
    return manifest


class _Import:
    def __init__(self, model: Model, folder: Path, name: str, quantisation: Quantisation, progress: Progress) -> None:
        self.model = model
        self.folder = folder
        self.quantisation = quantisation
        self.progress = progress
        self.name = (name or model.name)[:200]
        self.cut = Cut(model, quantisation)

    def run(self, identity: Identity, threads: int) -> Manifest:
        trunk_parts, expert_parts = self.cut.trunk, self.cut.experts
        total = len(trunk_parts) + len(expert_parts) + 2
        files: dict[str, ModelFile] = {}
        tensors: dict[str, int] = {}
        for part in (*trunk_parts, *expert_parts):
            self.progress(len(files), total, part.path)
            content = dict(self.cut.tensors(part))
            tensors[part.path] = sum(weight_count(key, tensor) for key, tensor in content.items())
            files[part.path] = write_file(self.folder, part.path, to_bytes(content))
        self.progress(len(files), total, "tokenizer.json")
        tokenizer = write_file(self.folder, "tokenizer.json", [self.model.text.tokenizer])
        trunk = self.cut.trunk_shard(
            [files[part.path] for part in trunk_parts], sum(tensors[p.path] for p in trunk_parts)
        )
        experts = [self.cut.expert_shard(part, files[part.path], tensors[part.path]) for part in expert_parts]
        stages = self.cut.stage_shards(files, tensors)
        manifest = self._manifest(identity, (*experts, trunk, *stages), tokenizer)
        self.progress(total - 1, total, "golden logits")
        options = RuntimeOptions(device="cpu", threads=threads)
        golden = trio.run(compute_golden, manifest, _Folder(self.folder), options)
        self.progress(total, total, "done")
        return replace(manifest, golden=golden).sign(identity)

    def _manifest(self, identity: Identity, shards: tuple[Shard, ...], tokenizer: ModelFile) -> Manifest:
        return Manifest(
            name=self.name,
            licence=self.model.licence[:200],
            source=Source(name=self.model.source.path.name, sha256=self.model.source.sha256()),
            architecture=self.model.architecture,
            quantisation=self.quantisation,
            sum_groups=self.cut.groups,
            shards=shards,
            tokenizer=tokenizer,
            chat_template=self.model.text.chat_template,
            stop_tokens=self.model.text.stop_tokens,
            golden=Golden(prompt=(0,), tokens=(), logits=(), tolerance=0.0),
            publisher=identity.peer_id,
        )


@dataclass(frozen=True, slots=True)
class _Folder:
    """An import's files, before they belong to a store."""

    root: Path

    def open_shard(self, manifest: Manifest, shard: Shard) -> list[ShardFile]:
        return [ShardFile(self.root / file.path) for file in shard.files]
