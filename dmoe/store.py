"""Models on disk: ``<root>/<model id>/manifest.json`` and the files it names.

Owns: the model folder, which shards are whole, reading chunks for other peers. Does not own: fetching (``hosting``)
or what is inside a file (``dmoe/shardfile``).

Invariants:
1. A file counts only if its size is right and its sha256 was verified; the verdict is remembered by size and
   modification time, so a file that is truncated or altered later is verified again and found.
2. ``manifest.json`` appears whole or not at all. One that is damaged is passed over and named (:attr:`damaged`): the
   other models work, and the model comes back once its manifest is fetched or imported again.
3. Methods are safe to call from several threads.
4. Only plain files are read, by a descriptor that stays open from the check to the use: no links, no pipes, nothing
   outside the store.
"""

import errno
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from config.errors import IntegrityError, LocalError, RiosError
from config.vocabulary import ModelId, ShardId
from dmoe.core.manifest import CHUNK_BYTES, MANIFEST_BYTES_MAX, Manifest, ModelFile, Shard
from dmoe.plainfile import open_plain
from dmoe.refused import Refused
from dmoe.shardfile import ShardFile

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
READ_BYTES_MAX = 256 << 20
IMPORTING_PREFIX = ".importing-"
"""Folders of imports that are still going on, or that died: never models."""


class ModelStore:
    """The models under ``root`` (created if missing)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.damaged: dict[Path, IntegrityError | LocalError] = {}
        """Model folders whose manifest cannot be read, and why."""
        self._lock = threading.Lock()
        self._manifests: dict[ModelId, Manifest] = {}
        self.refused = Refused()
        self._sound: set[str] = set()
        """Hashes of files whose numbers were looked at."""
        self._verified: dict[Path, tuple[int, int, str]] = {}
        self._chunks: dict[bytes, list[tuple[Path, int, int]]] | None = None
        for folder in sorted(root.iterdir()):
            if folder.is_dir() and not folder.is_symlink() and not folder.name.startswith("."):
                try:
                    self._load(folder)
                except (IntegrityError, LocalError) as error:
                    self.damaged[folder] = error
                    log.warning("%s; going on without this model", error)

    def manifests(self) -> Mapping[ModelId, Manifest]:
        """Every model known here, whether its shards are or not. A copy."""
        with self._lock:
            return dict(self._manifests)

    def manifest(self, model_id: str) -> Manifest:
        """The manifest with this id. Raises RiosError ``not_found``."""
        with self._lock:
            found = self._manifests.get(ModelId(model_id))
        if found is None:
            raise LocalError("not_found", f"model {model_id[:80]!r} is not here", "see: rios model ls")
        return found

    def find(self, name_or_id: str) -> Manifest:
        """A model by id, by an unambiguous beginning of its id (8 digits or more), or by name."""
        known = list(self.manifests().values())
        exact = [m for m in known if m.model_id == name_or_id]
        named = [m for m in known if m.name == name_or_id]
        begun = [m for m in known if len(name_or_id) >= 8 and m.model_id.startswith(name_or_id)]
        matches = exact or named or begun
        if not matches:
            names = ", ".join(sorted({m.name for m in known})) or "none"
            raise LocalError("not_found", f"model {name_or_id[:80]!r} is not here", f"models here: {names}")
        if len(matches) > 1:
            ids = ", ".join(m.model_id[:12] for m in matches)
            raise LocalError("conflict", f"{len(matches)} models are called {name_or_id[:80]!r}", f"use an id: {ids}")
        return matches[0]

    def path(self, model_id: str, file: ModelFile) -> Path:
        """Where a file of a model belongs (it may not be there yet)."""
        return self.root / model_id / file.path

    def add_manifest(self, manifest: Manifest) -> None:
        """Keep a manifest, durably: it is there whole or not at all. Checks it first."""
        with self.refused.counting("manifest"):
            manifest.check()
            manifest.verify()
        folder = self.root / manifest.model_id
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
            write_durably(folder / _MANIFEST, manifest.to_json())
        self._register(manifest)

    def adopt(self, folder: Path, manifest: Manifest) -> None:
        """Take over a finished import: ``folder`` (inside ``root``) becomes the model's folder in one step."""
        target = self.root / manifest.model_id
        with disk_errors(target):
            write_durably(folder / _MANIFEST, manifest.to_json())
            if target.exists():
                shutil.rmtree(target)
            folder.rename(target)
            _sync_folder(self.root)
        self._register(manifest)

    def has_shard(self, model_id: str, shard_id: str) -> bool:
        """Whether all files of a shard are here, whole and unaltered."""
        try:
            self.verify_shard(model_id, shard_id)
        except (IntegrityError, LocalError):
            return False
        return True

    def verify_shard(self, model_id: str, shard_id: str) -> None:
        """Raise IntegrityError naming a file that is truncated or altered, LocalError ``not_found`` for a missing
        one."""
        manifest = self.manifest(model_id)
        for file in manifest.shards[manifest.shard_index(ShardId(shard_id))].files:
            self.verify_file(manifest.model_id, file)

    def verify_file(self, model_id: str, file: ModelFile) -> None:
        """The same for one file."""
        os.close(self._open_verified(model_id, file))

    def _open_verified(self, model_id: str, file: ModelFile) -> int:
        """A descriptor of a file whose size and hash are right; the caller closes it."""
        path = self.path(model_id, file)
        with self.refused.counting("file"):
            descriptor = open_plain(path, self.root)
            try:
                self._verify(path, descriptor, file)
            except BaseException:
                os.close(descriptor)
                raise
        return descriptor

    def _verify(self, path: Path, descriptor: int, file: ModelFile) -> None:
        stat = os.fstat(descriptor)
        if stat.st_size != file.size_bytes:
            raise IntegrityError(
                "integrity",
                f"{path} has {stat.st_size} bytes instead of {file.size_bytes}: truncated or altered",
                "remove the file; it will be fetched again",
            )
        fingerprint = (stat.st_size, stat.st_mtime_ns, file.sha256)
        with self._lock:
            if self._verified.get(path) == fingerprint:
                return
        if _sha256_of(descriptor) != file.sha256:
            raise IntegrityError("integrity", f"{path} was altered: its hash is wrong", "remove it to fetch it again")
        with self._lock:
            self._verified[path] = fingerprint

    def open_shard(self, manifest: Manifest, shard: Shard) -> list[ShardFile]:
        """A shard's files, verified and mapped; the numbers in them are looked at once."""
        return [self._open(manifest, file) for file in shard.files]

    def _open(self, manifest: Manifest, file: ModelFile) -> ShardFile:
        path = self.path(manifest.model_id, file)
        descriptor = self._open_verified(manifest.model_id, file)
        with self.refused.counting("file"):
            try:
                opened = ShardFile(path, descriptor)
            finally:
                os.close(descriptor)
            if file.sha256 not in self._sound:
                opened.check_numbers()
                self._sound.add(file.sha256)
        return opened

    def read(self, manifest: Manifest, file: ModelFile) -> bytes:
        """A small file's verified bytes, e.g. the tokenizer. Raises IntegrityError if it is not small."""
        if file.size_bytes > READ_BYTES_MAX:
            raise IntegrityError("integrity", f"{file.path} has {file.size_bytes} bytes, more than {READ_BYTES_MAX}")
        with os.fdopen(self._open_verified(manifest.model_id, file), "rb") as opened:
            return opened.read()

    def read_chunk(self, digest: bytes) -> bytes | None:
        """The chunk with this sha256 from any file here, or None. Implements ``p2p.face.BlobSource``."""
        for path, index, size in self._places(digest):
            try:
                with os.fdopen(open_plain(path, self.root), "rb") as file:
                    file.seek(index * CHUNK_BYTES)
                    data = file.read(size)
            except (OSError, RiosError):
                continue  # not here yet, removed, or no plain file: another one may hold the same chunk
            if sha256(data).digest() == digest:
                return data
        return None

    def remove(self, model_id: str) -> None:
        """Forget a model and delete its files."""
        self.manifest(model_id)
        with self._lock:
            del self._manifests[ModelId(model_id)]
            self._chunks = None
        shutil.rmtree(self.root / model_id, ignore_errors=True)

    def remove_shard(self, model_id: str, shard_id: str, kept: Collection[str] = ()) -> None:
        """Delete a shard's files, except those that the shards in ``kept`` have too; keep the manifest. Raises
        LocalError."""
        manifest = self.manifest(model_id)
        needed = {file.path for shard in manifest.shards if shard.id in kept for file in shard.files}
        for file in manifest.shards[manifest.shard_index(ShardId(shard_id))].files:
            if file.path not in needed:
                path = self.path(model_id, file)
                with disk_errors(path):
                    path.unlink(missing_ok=True)

    def disk_bytes(self) -> int:
        """Bytes that all models take."""
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())

    def _places(self, digest: bytes) -> Sequence[tuple[Path, int, int]]:
        with self._lock:
            if self._chunks is None:
                self._chunks = {}
                for manifest in self._manifests.values():
                    for file in manifest.files():
                        path = self.path(manifest.model_id, file)
                        for index, chunk in enumerate(file.chunks):
                            size = min(CHUNK_BYTES, file.size_bytes - index * CHUNK_BYTES)
                            self._chunks.setdefault(bytes.fromhex(chunk), []).append((path, index, size))
            return self._chunks.get(digest, ())

    def _register(self, manifest: Manifest) -> None:
        with self._lock:
            self._manifests[manifest.model_id] = manifest
            self._chunks = None
            self.damaged.pop(self.root / manifest.model_id, None)

    def _load(self, folder: Path) -> None:
        path = folder / _MANIFEST
        hint = f"it comes back from peers where the model is deployed; else import it again, or remove {folder}"
        try:
            if not os.path.lexists(path):
                return
            with os.fdopen(open_plain(path, self.root), "rb") as file:
                data = file.read(MANIFEST_BYTES_MAX + 1)
            if len(data) > MANIFEST_BYTES_MAX:
                raise IntegrityError("integrity", f"it is longer than {MANIFEST_BYTES_MAX} bytes")
            manifest = Manifest.parse(data)
        except IntegrityError as error:
            raise IntegrityError("integrity", f"{path} is damaged: {error.message}", hint) from error
        except OSError as error:
            raise LocalError("local", f"cannot read {path}: {error.strerror}", "check its owner and mode") from error
        if manifest.model_id != folder.name:
            raise IntegrityError("integrity", f"{path} belongs to model {manifest.model_id}", hint)
        self._register(manifest)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Maps what a disk can say to LocalError: ``disk_full``, or ``local`` for anything else."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        code, hint = ("disk_full", "free some space, or set dmoe.disk_bytes_max") if full else ("local", "")
        raise LocalError(code, f"cannot write {path}: {error.strerror}", hint) from error


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it is there whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256_of(descriptor: int) -> str:
    digest, offset = sha256(), 0
    while block := os.pread(descriptor, 8 * CHUNK_BYTES, offset):
        digest.update(block)
        offset += len(block)
    return digest.hexdigest()
