"""Make a model's shards, manifest and golden logits out of a GGUF file or a folder in Hugging Face layout.

Owns: the order of an import's steps and its manifest. Every tensor is found and its size known before the first byte is
written; then weights go through memory in blocks, and golden logits are computed a layer at a time. Everything is
written to a temporary folder inside the store, which becomes the model in one rename: a failed import leaves nothing
behind.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from config.errors import ConfigError
from config.vocabulary import PeerId
from dmoe.core.manifest import Golden, Manifest, ModelFile, Quantisation, Shard, Source
from dmoe.golden import compute_golden
from dmoe.importer.cut import AS_USUAL, Cut, Part, Sizes
from dmoe.importer.folder import FolderSource
from dmoe.importer.model import Model, read_folder, read_gguf
from dmoe.importer.scratch import scratch
from dmoe.importer.sources import GgufSource
from dmoe.importer.write import FolderTarget, Target, shapes_of, size_of, widened_in, write_file, write_shard
from dmoe.runtime import RuntimeOptions
from dmoe.shardfile import ShardFile
from dmoe.store import ModelStore, disk_errors
from p2p.core.identity import Identity

Progress = Callable[[int, int, str], None]
"""``(done, total, what is being made)``, in bytes read and written."""
_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What whoever imports decides. ``quantisation``: ``source`` keeps the source's own weights without loss. Empty
    ``name``, ``licence`` and ``origin`` (where the model came from) are the source's own."""

    name: str = ""
    licence: str = ""
    origin: str = ""
    quantisation: Quantisation = "source"
    sizes: Sizes = AS_USUAL


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
    """:func:`import_model` of a GGUF file, or of the first of several that belong together."""
    wishes = Wishes(name=name, quantisation=quantisation)
    return _import(read_gguf(GgufSource(path)), store, identity, wishes, progress, threads)


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
    """:func:`import_model` of a folder with ``config.json``, safetensors and ``tokenizer.json``."""
    wishes = Wishes(name=name, quantisation=quantisation)
    return _import(read_folder(FolderSource(path)), store, identity, wishes, progress, threads)


def import_model(
    path: Path,
    store: ModelStore,
    identity: Identity,
    wishes: Wishes,
    *,
    progress: Progress = lambda done, total, what: None,
    threads: int = 0,
) -> Manifest:
    """Import a folder or a GGUF file into the store, signed by ``identity``. Blocking: run it in a thread or process of
    its own.

    ``threads``: for the golden logits, which depend on it by less than their tolerance; 0: all cores. Raises
    IntegrityError for a source that is broken or not supported, ConfigError for wishes that do not fit it, LocalError
    ``disk_full`` if the disk is.
    """
    model = read_folder(FolderSource(path)) if path.is_dir() else read_gguf(GgufSource(path))
    return _import(model, store, identity, wishes, progress, threads)


def _import(
    model: Model, store: ModelStore, identity: Identity, wishes: Wishes, progress: Progress, threads: int
) -> Manifest:
    check_wishes(wishes)
    making = Import(model, wishes, progress)
    with scratch(store.root, making.bytes_needed) as folder:
        with disk_errors(folder):
            manifest = making.run(FolderTarget(folder), identity.peer_id, threads).sign(identity)
        store.adopt(folder, manifest)
    return manifest


def check_wishes(wishes: Wishes) -> None:
    """Raise ConfigError for what a terminal would obey."""
    for what, text in (("name", wishes.name), ("licence", wishes.licence)):
        if not text.isprintable():
            raise ConfigError("usage", f"--{what} {text[:80]!r} has characters that cannot be shown", "use plain text")


class Import:
    """An import of a model whose source is open: every tensor was found. ``bytes_needed``: on disk."""

    def __init__(self, model: Model, wishes: Wishes, progress: Progress) -> None:
        self.model = model
        self.source = model.source
        self.wishes = wishes
        self.cut = Cut(model, wishes.quantisation, wishes.sizes)
        shapes = {part.path: shapes_of(self.cut.entries(part)) for part in self.cut.parts}
        sizes = [size_of(held) for held in shapes.values()]
        self.cut.widened = {path: widened_in(held) for path, held in shapes.items()}
        self.cut.check_all_used()
        self.source.release_pages()
        self.bytes_needed = sum(sizes) + len(model.text.tokenizer) + _MANIFEST_BYTES
        self.progress = _Bytes(progress, self.source.size_bytes + 2 * sum(sizes))

    def run(self, target: Target, publisher: PeerId, threads: int) -> Manifest:
        """Write everything; the manifest, not yet signed. Raises as :func:`import_model`, and OSError."""
        made = {part.path: self._make(target, part) for part in self.cut.parts}
        files = {path: file for path, (file, _) in made.items()}
        params = {path: count for path, (_, count) in made.items()}
        tokenizer = write_file(target, "tokenizer.json", self.model.text.tokenizer)
        trunk = self.cut.trunk_shard(
            [files[part.path] for part in self.cut.trunk], sum(params[p.path] for p in self.cut.trunk)
        )
        experts = [self.cut.expert_shard(part, files[part.path], params[part.path]) for part in self.cut.experts]
        stages = self.cut.stage_shards(files, params)
        manifest = self._manifest(publisher, (*experts, trunk, *stages), tokenizer)
        options = RuntimeOptions(device="cpu", threads=threads)
        self.progress.what = "golden logits"
        golden = compute_golden(manifest, _Written(target), options, self.progress.add)
        self.progress.end()
        return replace(manifest, golden=golden)

    def _make(self, target: Target, part: Part) -> tuple[ModelFile, int]:
        self.progress.what = part.path

        def wrote(count: int) -> None:
            self.source.release_pages()
            self.progress.add(count)

        return write_shard(target, part.path, self.cut.entries(part), wrote)

    def _manifest(self, publisher: PeerId, shards: tuple[Shard, ...], tokenizer: ModelFile) -> Manifest:
        return Manifest(
            name=self.wishes.name[:200] or _shown(self.model.name),
            licence=self.wishes.licence[:200] or _shown(self.model.licence),
            source=Source(name=self.wishes.origin or self.source.path.name, sha256=self._source_hash()),
            architecture=self.model.architecture,
            quantisation=self.wishes.quantisation,
            sum_groups=self.cut.groups,
            shards=shards,
            tokenizer=tokenizer,
            chat_template=self.model.text.chat_template,
            stop_tokens=self.model.text.stop_tokens,
            golden=Golden(prompt=(0,), tokens=(), logits=(), tolerance=0.0),
            publisher=publisher,
        )

    def _source_hash(self) -> str:
        self.progress.what = f"hash of {self.source.path.name}"
        return self.source.sha256(self.progress.add)


def _shown(text: str) -> str:
    """What a source says, without what a terminal would obey."""
    return "".join(character for character in text if character.isprintable())[:200]


class _Bytes:
    """Counts what was read and written, and shows it."""

    def __init__(self, show: Progress, total: int) -> None:
        self._show, self._total, self._done = show, total, 0
        self.what = ""

    def add(self, count: int) -> None:
        self._done += count
        self._show(min(self._done, self._total), self._total, self.what)

    def end(self) -> None:
        self._show(self._total, self._total, "done")


@dataclass(frozen=True, slots=True)
class _Written:
    """An import's files, before they belong to a store."""

    target: Target

    def open_shard(self, manifest: Manifest, shard: Shard) -> list[ShardFile]:
        return [self.target.written(file.path) for file in shard.files]
