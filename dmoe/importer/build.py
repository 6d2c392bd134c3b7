"""Make a model's shards, manifest and golden logits out of a GGUF file or a folder in Hugging Face layout.

Owns: how a model is cut into shards and files. One shard file is in memory at a time. Everything is written to a
temporary folder inside the store, which becomes the model in one rename: a failed import leaves nothing behind.
"""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import trio
from msgspec.structs import replace
from numpy.typing import NDArray

from config.errors import IntegrityError, LocalError
from config.vocabulary import ShardId
from dmoe.core.linear import Linear, join_rows
from dmoe.core.manifest import (
    CHUNK_BYTES,
    Architecture,
    Golden,
    Manifest,
    ModelFile,
    Quantisation,
    Shard,
    Source,
)
from dmoe.golden import compute_golden
from dmoe.importer.architectures import Family, architecture_of, family_of
from dmoe.importer.families import hf_architecture_of, hf_family_of
from dmoe.importer.folder import FolderSource, FolderText, folder_text
from dmoe.importer.sources import GgufSource
from dmoe.importer.tokenizer import chat_template, stop_tokens, tokenizer_json
from dmoe.runtime import RuntimeOptions
from dmoe.shardfile import ShardFile, to_bytes
from dmoe.store import IMPORTING_PREFIX, ModelStore, disk_errors
from p2p.core.identity import Identity

Array = NDArray[Any]
Progress = Callable[[int, int, str], None]
"""``(files done, files in all, what is being made)``."""

_NUMBER = re.compile(r"\.(\d{1,6})\.")
"""A layer's or an expert's number in a tensor's name."""
LAYERS_PER_SHARD_MAX = 10
GROUPS_MAX = 4
_RUNTIME_OVERHEAD_BYTES = 200_000
"""Memory of one ONNX Runtime session beside its weights."""


@dataclass(frozen=True, slots=True)
class _Model:
    """What a source was found to hold, before anything of it is written."""

    source: GgufSource | FolderSource
    family: Family
    architecture: Architecture
    name: str
    licence: str
    text: FolderText


@dataclass(frozen=True, slots=True)
class _Part:
    """A file to be made and what it holds."""

    path: str
    layers: tuple[int, int]
    group: int
    holds_ends: bool = False


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
    return _import(lambda: _read_gguf(GgufSource(path)), store, identity, name, quantisation, progress, threads)


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
    return _import(lambda: _read_folder(FolderSource(path)), store, identity, name, quantisation, progress, threads)


def _import(
    read: Callable[[], _Model],
    store: ModelStore,
    identity: Identity,
    name: str,
    quantisation: Quantisation,
    progress: Progress,
    threads: int,
) -> Manifest:
    model = read()
    _sweep(store.root)
    folder = Path(tempfile.mkdtemp(dir=store.root, prefix=IMPORTING_PREFIX))
    claim = _claim(folder)
    try:
        _check_space(store.root, model.source.bytes_needed(quantisation))
        with disk_errors(folder):
            manifest = _Import(model, folder, name, quantisation, progress).run(identity, threads)
        store.adopt(folder, manifest)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already after a success
        os.close(claim)
    return manifest


def _read_gguf(source: GgufSource) -> _Model:
    metadata, family = source.metadata, family_of(source.metadata)[1]
    _check_tensors(source, family)
    vocab, _ = _matrix_shape(source, family.embedding)
    return _Model(
        source=source,
        family=family,
        architecture=architecture_of(metadata, vocab, tied=not source.has(family.head)),
        name=str(metadata.get("general.basename") or metadata.get("general.name") or source.path.stem),
        licence=str(metadata.get("general.license", "unknown")),
        text=FolderText(tokenizer_json(metadata), chat_template(metadata), stop_tokens(metadata)),
    )


def _read_folder(source: FolderSource) -> _Model:
    family = hf_family_of(source.config)[1].tensors
    _check_tensors(source, family)
    vocab, _ = _matrix_shape(source, family.embedding)
    architecture = hf_architecture_of(source.config, vocab)
    _check_numbers(source, architecture)
    return _Model(
        source=source,
        family=family,
        architecture=architecture,
        name=source.path.resolve().name,
        licence="unknown",
        text=folder_text(source.path, vocab),
    )


def _claim(folder: Path) -> int:
    """A lock on an import's folder that ends with its process, however that ends. The caller closes it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _sweep(root: Path) -> None:
    """Remove what imports that were killed left behind."""
    for folder in root.glob(f"{IMPORTING_PREFIX}*"):
        try:
            claim = _claim(folder)
        except OSError:
            continue  # that import is still going on
        shutil.rmtree(folder, ignore_errors=True)
        os.close(claim)


class _Import:
    def __init__(self, model: _Model, folder: Path, name: str, quantisation: Quantisation, progress: Progress) -> None:
        self.model = model
        self.source = model.source
        self.folder = folder
        self.quantisation = quantisation
        self.progress = progress
        self.family = model.family
        self.arch = model.architecture
        self.name = (name or model.name)[:200]
        self.groups = _sum_groups(self.arch.router.experts)

    def run(self, identity: Identity, threads: int) -> Manifest:
        trunk_parts, expert_parts = self._parts()
        total = len(trunk_parts) + len(expert_parts) + 2
        files: dict[str, ModelFile] = {}
        tensors: dict[str, int] = {}
        for part in (*trunk_parts, *expert_parts):
            self.progress(len(files), total, part.path)
            content = dict(self._tensors(part))
            tensors[part.path] = sum(_weight_count(key, tensor) for key, tensor in content.items())
            files[part.path] = _write(self.folder, part.path, to_bytes(content))
        self.progress(len(files), total, "tokenizer.json")
        tokenizer = _write(self.folder, "tokenizer.json", [self.model.text.tokenizer])
        trunk = self._trunk_shard([files[part.path] for part in trunk_parts], sum(tensors[p.path] for p in trunk_parts))
        experts = [self._expert_shard(part, files[part.path], tensors[part.path]) for part in expert_parts]
        manifest = self._manifest(identity, (*experts, trunk), tokenizer)
        self.progress(total - 1, total, "golden logits")
        options = RuntimeOptions(device="cpu", threads=threads)
        golden = trio.run(compute_golden, manifest, _Folder(self.folder), options)
        self.progress(total, total, "done")
        return replace(manifest, golden=golden).sign(identity)

    def _manifest(self, identity: Identity, shards: tuple[Shard, ...], tokenizer: ModelFile) -> Manifest:
        return Manifest(
            name=self.name,
            licence=self.model.licence[:200],
            source=Source(name=self.source.path.name, sha256=self.source.sha256()),
            architecture=self.arch,
            quantisation=self.quantisation,
            sum_groups=self.groups,
            shards=shards,
            tokenizer=tokenizer,
            chat_template=self.model.text.chat_template,
            stop_tokens=self.model.text.stop_tokens,
            golden=Golden(prompt=(0,), tokens=(), logits=(), tolerance=0.0),
            publisher=identity.peer_id,
        )

    def _parts(self) -> tuple[list[_Part], list[_Part]]:
        spans = list(_spans(self.arch.layers))
        trunk = [_Part("trunk/ends.safetensors", (0, -1), -1, holds_ends=True)]
        trunk += [_Part(f"trunk/l{first:02d}-{last:02d}.safetensors", (first, last), -1) for first, last in spans]
        experts = [
            _Part(f"experts/l{first:02d}-{last:02d}-g{group}.safetensors", (first, last), group)
            for first, last in spans
            for group in range(len(self.groups))
        ]
        return trunk, experts

    def _tensors(self, part: _Part) -> Iterator[tuple[str, Array]]:
        if part.holds_ends:
            yield from self._ends()
        for layer in range(part.layers[0], part.layers[1] + 1):
            if part.group < 0:
                yield from self._attention(layer)
            else:
                for expert in self.groups[part.group]:
                    gate_up, down = self._expert(layer, expert)
                    yield from gate_up.tensors(f"layer.{layer}.expert.{expert}.gate_up").items()
                    yield from down.tensors(f"layer.{layer}.expert.{expert}.down").items()

    def _ends(self) -> Iterator[tuple[str, Array]]:
        arch, family = self.arch, self.family
        shape = (arch.vocab, arch.hidden)
        yield from self.source.linear(family.embedding, shape, self.quantisation).tensors("embed").items()
        if not arch.tie_embeddings:
            yield from self.source.linear(family.head, shape, self.quantisation).tensors("head").items()
        yield "norm", self.source.vector(family.norm, arch.hidden)

    def _attention(self, layer: int) -> Iterator[tuple[str, Array]]:
        arch, family, prefix = self.arch, self.family, f"layer.{layer}"
        width, kv_width = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim

        def read(name: str, rows: int, columns: int) -> Linear:
            return self.source.linear(name.format(l=layer), (rows, columns), self.quantisation)

        yield f"{prefix}.norm_attention", self.source.vector(family.norm_attention.format(l=layer), arch.hidden)
        yield f"{prefix}.norm_experts", self.source.vector(family.norm_experts.format(l=layer), arch.hidden)
        rows = ((family.queries, width), (family.keys, kv_width), (family.values, kv_width))
        qkv = join_rows(_alike([read(name, size, arch.hidden) for name, size in rows]))
        yield from qkv.tensors(f"{prefix}.qkv").items()
        yield from read(family.output, arch.hidden, width).tensors(f"{prefix}.output").items()
        if arch.router.kind != "all":
            shape = (arch.router.experts, arch.hidden)
            router = self.source.linear(family.router.format(l=layer), shape, "fp32")
            yield from router.tensors(f"{prefix}.router").items()

    def _expert(self, layer: int, expert: int) -> tuple[Linear, Linear]:
        """gate|up and down of an expert; of a dense model, of a block of neurons."""
        arch, family, q = self.arch, self.family, self.quantisation
        width, hidden, count = arch.intermediate, arch.hidden, arch.router.experts
        if arch.router.kind == "all":
            block, every = slice(expert * width, (expert + 1) * width), slice(None)
            wide, tall = (count * width, hidden), (hidden, count * width)
            gate = self.source.linear(family.gate.format(l=layer), wide, q, (block, every))
            up = self.source.linear(family.up.format(l=layer), wide, q, (block, every))
            down = self.source.linear(family.down.format(l=layer), tall, q, (every, block))
        else:
            stack, stack_down = (count, width, hidden), (count, hidden, width)
            gate = self.source.linear_of(family.gate_experts.format(l=layer), expert, stack, q)
            up = self.source.linear_of(family.up_experts.format(l=layer), expert, stack, q)
            down = self.source.linear_of(family.down_experts.format(l=layer), expert, stack_down, q)
        return join_rows(_alike([gate, up])), down

    def _trunk_shard(self, files: list[ModelFile], params: int) -> Shard:
        arch = self.arch
        return Shard(
            id=ShardId("trunk"),
            kind="trunk",
            layers=(0, arch.layers - 1),
            group=-1,
            experts=(),
            files=tuple(files),
            params=params,
            flops_per_row=2 * arch.hidden * (arch.qkv_width + arch.heads * arch.head_dim),
            ram_bytes=sum(file.size_bytes for file in files) + arch.layers * _RUNTIME_OVERHEAD_BYTES,
            dtype=self.quantisation,
        )

    def _expert_shard(self, part: _Part, file: ModelFile, params: int) -> Shard:
        first, last = part.layers
        experts = self.groups[part.group]
        sessions = len(experts) * (last - first + 1)
        return Shard(
            id=ShardId(f"expert-l{first:02d}-{last:02d}-g{part.group}"),
            kind="expert",
            layers=part.layers,
            group=part.group,
            experts=experts,
            files=(file,),
            params=params,
            flops_per_row=2 * 3 * len(experts) * self.arch.hidden * self.arch.intermediate,
            ram_bytes=file.size_bytes + sessions * _RUNTIME_OVERHEAD_BYTES,
            dtype=self.quantisation,
        )


@dataclass(frozen=True, slots=True)
class _Folder:
    """An import's files, before they belong to a store."""

    root: Path

    def open_shard(self, manifest: Manifest, shard: Shard) -> list[ShardFile]:
        return [ShardFile(self.root / file.path) for file in shard.files]


def _alike(layers: list[Linear]) -> list[Linear]:
    """Layers that are to be joined but were stored in different forms become fp32."""
    if len({layer.form for layer in layers}) == 1:
        return layers
    return [Linear({"w": layer.dequantised()}) for layer in layers]


def _spans(layers: int) -> Iterator[tuple[int, int]]:
    count = -(-layers // LAYERS_PER_SHARD_MAX)
    size = -(-layers // count)
    for first in range(0, layers, size):
        yield first, min(first + size, layers) - 1


def _sum_groups(experts: int) -> tuple[tuple[int, ...], ...]:
    count = min(GROUPS_MAX, experts)
    parts = np.array_split(np.arange(experts), count)
    return tuple(tuple(int(expert) for expert in part) for part in parts)


def _weight_count(name: str, tensor: Array) -> int:
    """How many of the model's parameters a stored tensor holds; scales and offsets are none."""
    if name.endswith((".s", ".c")):
        return 0
    return tensor.size * (2 if name.endswith(".q4") else 1)


def _check_tensors(source: GgufSource | FolderSource, family: Family) -> None:
    """Refuse what this family's graphs would silently leave out."""
    patterns = [value for value in _names(family) if isinstance(value, str)]
    known = {pattern.replace("{l}", "").replace("{{e}}", "") for pattern in patterns}
    for name in source.names():
        if _NUMBER.sub("..", name) not in known:
            raise IntegrityError(
                "integrity", f"{source.path}: tensor {name[:80]!r} is not part of a supported model of this family"
            )


def _check_numbers(source: FolderSource, arch: Architecture) -> None:
    """Refuse layers and experts beyond those that the configuration counts."""
    most = (arch.layers, arch.router.experts)
    for name in source.names():
        if any(int(number) >= count for number, count in zip(_NUMBER.findall(name), most, strict=False)):
            raise IntegrityError("integrity", f"{source.path}: tensor {name[:80]!r} is beyond what config.json counts")


def _names(family: Family) -> list[object]:
    return [getattr(family, key) for key in family.__slots__]


def _matrix_shape(source: GgufSource | FolderSource, name: str) -> tuple[int, int]:
    shape = source.shape(name)
    if len(shape) != 2:
        raise IntegrityError("integrity", f"{source.path}: tensor {name} has shape {list(shape)}, not a matrix")
    return shape[0], shape[1]


def _check_space(root: Path, need: int) -> None:
    free = shutil.disk_usage(root).free
    if free < need:
        raise LocalError(
            "disk_full", f"the import needs about {need >> 20} MiB in {root}, {free >> 20} MiB are free", "free some"
        )


def _write(folder: Path, name: str, pieces: list[bytes | memoryview]) -> ModelFile:
    """Write a file; hash it whole and by chunk on the way."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    whole, chunks, size = sha256(), [], 0
    chunk, room = sha256(), CHUNK_BYTES
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            whole.update(piece)
            size += len(piece)
            start = 0
            while start < len(piece):
                taken = piece[start : start + room]
                chunk.update(taken)
                start += len(taken)
                room -= len(taken)
                if not room:
                    chunks.append(chunk.hexdigest())
                    chunk, room = sha256(), CHUNK_BYTES
    if room < CHUNK_BYTES:
        chunks.append(chunk.hexdigest())
    return ModelFile(path=name, sha256=whole.hexdigest(), size_bytes=size, chunks=tuple(chunks))
