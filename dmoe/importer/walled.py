"""An import whose reading happens behind walls: :func:`dmoe.importer.build.import_model` for files of strangers.

Owns: opening the source's files and making the model's, the process in between (``dmoe/importer/walledwork``), signing
and adopting what it made. Does not own: fetching a source (``hub``, ``bundled``), reading it.

Invariants:
1. What a stranger made is read by a process without network, file system and keys: it gets descriptors, of the source
   for reading and of new files in the import's own folder.
2. The folder gets no file but those that the process asked for by plain names, and no more bytes than it announced.
3. It ends with the process, whatever ends that; nothing stays of an import that failed.
4. A process that says nothing for :data:`SILENT_SECONDS_MAX` is killed.

Fails as ``import_model`` does; IntegrityError where the process ended by itself.
"""

import os
import re
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import psutil

from config.errors import IntegrityError, LocalError, RiosError
from dmoe.cells import launch
from dmoe.cells.frames import DESCRIPTORS_MAX, frame, receive
from dmoe.cells.sandbox import FILES_MAX, Wall
from dmoe.core.manifest import MANIFEST_BYTES_MAX, Manifest
from dmoe.importer.build import Progress, Wishes, check_wishes
from dmoe.importer.files import DiskFiles, SourceFiles, size_of
from dmoe.importer.scratch import scratch
from dmoe.importer.sources import part_names
from dmoe.importer.walledwork import FAMILIES, TEXT_SECONDS, Setup
from dmoe.importer.write import FolderTarget
from dmoe.store import ModelStore, disk_errors
from p2p.core.identity import Identity

START_SECONDS = 60.0
SILENT_SECONDS_MAX = 900.0
"""A layer of a large model takes a slow disk minutes."""
SOURCE_FILES_MAX = FILES_MAX // 2
FILE_TIMES_MAX = 8
"""A model's file may have so many times the bytes of its whole source: 4-bit weights as fp32."""
FILE_BYTES_MIN = 1 << 30
_MESSAGE_BYTES_MAX = MANIFEST_BYTES_MAX + (1 << 20)
_ENDINGS = (".json", ".jinja", ".safetensors", ".model")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}){0,3}")
_BOOT = launch.boot("dmoe.importer.walledwork")

Walls = Callable[[tuple[Wall, ...]], None]
"""Told once which walls are in force."""


def import_walled(
    path: Path,
    store: ModelStore,
    identity: Identity,
    wishes: Wishes,
    *,
    progress: Progress = lambda done, total, what: None,
    threads: int = 0,
    demanded: bool = False,
    walls: Walls = lambda walls: None,
) -> Manifest:
    """See the file's docstring; arguments as :func:`dmoe.importer.build.import_model`. ``demanded``: not without walls;
    then LocalError says what is missing."""
    check_wishes(wishes)
    files = DiskFiles(path) if path.is_dir() else DiskFiles(path.parent, path.name)
    names = _names(path, files)
    opened: list[int] = []
    try:
        opened += (files.open(name) for name in names)
        source_bytes = sum(size_of(files, name) for name in names)
        setup = Setup(
            path=str(path),
            name=path.resolve().name,
            is_folder=path.is_dir(),
            names=names,
            wishes=wishes,
            publisher=identity.peer_id,
            threads=threads,
            data_bytes=_memory_bytes(),
            file_bytes=FILE_BYTES_MIN + FILE_TIMES_MAX * source_bytes,
            demanded=demanded,
        )
        with _process(path) as (line, process):
            _send(line, setup, opened)
            told = partial(_tell, walls, process)
            return _Parent(line, store, identity, progress, told).run()
    finally:
        for descriptor in opened:
            os.close(descriptor)


def trial() -> tuple[Wall, ...]:
    """The walls of a process that gets nothing to read. Raises RiosError if it does not start."""
    setup = Setup(
        path="",
        name="",
        is_folder=False,
        names=[],
        wishes=Wishes(),
        publisher="",
        threads=1,
        data_bytes=_memory_bytes(),
        file_bytes=0,
        demanded=False,
    )
    with _process(Path("a trial")) as (line, process):
        _send(line, setup, [])
        kind, value = heard(line)
        if kind != "walls":
            raise _nonsense(f"it says {kind[:80]!r}")
        return (*process.outer_walls, *(Wall(**wall) for wall in value))


def _names(path: Path, files: SourceFiles) -> list[str]:
    """What an import may want to read."""
    if not path.is_dir():
        names = part_names(path, files)
        if not files.has(names[0]):
            raise LocalError("not_found", f"{path} is not a file", "give the path of a .gguf file")
    else:
        names = [name for name in files.names() if name.endswith(_ENDINGS)]
    if len(names) > SOURCE_FILES_MAX:
        raise IntegrityError("integrity", f"{path} has {len(names)} files, more than {SOURCE_FILES_MAX}")
    return names


def _memory_bytes() -> int:
    """A stranger's file shall not take the memory that this machine's other work needs: seven eighths of it at most.
    Files that are mapped do not count."""
    most = int(psutil.virtual_memory().total) * 7 // 8
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    return most if hard == resource.RLIM_INFINITY else min(most, hard)


@contextmanager
def _process(path: Path) -> Iterator[tuple[socket.socket, launch.Process]]:
    """The process, for as long as the block, and its socket."""
    line, theirs = socket.socketpair()
    with line:
        with theirs:
            process = launch.start(_BOOT, [theirs.fileno()], [theirs.fileno()], memory_bytes=_memory_bytes())
        try:
            yield line, process
        except TimeoutError as error:
            what = f"reading {path} made no step for {line.gettimeout():.0f} s and was stopped"
            raise IntegrityError("integrity", what, "get the model from another publisher") from error
        except (EOFError, ConnectionError) as error:
            what = f"reading {path} ended its process (time, memory, or a fault in a library)"
            raise IntegrityError("integrity", what, "free some memory, or get the model elsewhere") from error
        finally:
            process.kill()
            process.wait()


def _tell(walls: Walls, process: launch.Process, inner: tuple[Wall, ...]) -> None:
    walls((*process.outer_walls, *inner))


def _send(line: socket.socket, setup: Setup, descriptors: list[int]) -> None:
    line.settimeout(START_SECONDS)
    line.sendall(frame(msgspec.msgpack.encode(setup)))
    for start in range(0, len(descriptors), DESCRIPTORS_MAX):
        socket.send_fds(line, [frame(b"files")], descriptors[start : start + DESCRIPTORS_MAX])


class _Parent:
    """Does what the process asks for, as far as it may."""

    def __init__(
        self, line: socket.socket, store: ModelStore, identity: Identity, progress: Progress, walls: Walls
    ) -> None:
        self._line = line
        self._store = store
        self._identity = identity
        self._progress = progress
        self._walls = walls
        self._left = 0

    def run(self) -> Manifest:
        """Until there is a manifest."""
        need = self._before()
        with scratch(self._store.root, need) as folder:
            self._left = need
            self._answer()
            with disk_errors(folder):
                manifest = self._made(folder)
            self._store.adopt(folder, manifest)
        return manifest

    def _before(self) -> int:
        """How many bytes it will write."""
        self._line.settimeout(START_SECONDS)
        while True:
            kind, value = heard(self._line)
            self._line.settimeout(SILENT_SECONDS_MAX)
            if kind == "text":  # a tokenizer is being read, or was
                self._line.settimeout(TEXT_SECONDS if value else SILENT_SECONDS_MAX)
            elif kind == "walls":
                self._walls(tuple(Wall(**wall) for wall in value))
            elif kind == "need":
                return int(value)
            else:
                self._show(kind, value)

    def _made(self, folder: Path) -> Manifest:
        target, made = FolderTarget(folder), set[str]()
        while True:
            kind, value = heard(self._line)
            if kind == "create":
                name, size = str(value[0]), int(value[1])
                self._check(name, size, made)
                made.add(name)
                with target.create(name, size) as file:
                    self._answer(file.fileno())
            elif kind == "written":
                if value not in made:
                    raise _nonsense(f"it asks for {str(value)[:80]!r}")
                with (folder / value).open("rb") as file:
                    self._answer(file.fileno())
            elif kind == "manifest":
                return self._signed(value)
            else:
                self._show(kind, value)

    def _check(self, name: str, size: int, made: set[str]) -> None:
        if not _NAME.fullmatch(name) or name in made:
            raise _nonsense(f"it names a file {name[:80]!r}")
        self._left -= size
        if size < 0 or self._left < 0:
            raise _nonsense("it writes more than it said")

    def _signed(self, data: bytes) -> Manifest:
        try:
            manifest = msgspec.json.decode(data, type=Manifest)
        except (msgspec.DecodeError, TypeError) as error:
            raise _nonsense("it made no manifest") from error
        if manifest.publisher != self._identity.peer_id:
            raise _nonsense("it names another publisher")
        signed = manifest.sign(self._identity)
        signed.check()
        return signed

    def _show(self, kind: str, value: Any) -> None:  # noqa: ANN401 - msgpack
        if kind != "progress":
            raise _nonsense(f"it says {kind[:80]!r}")
        done, total, what = value
        self._progress(int(done), int(total), str(what)[:200])

    def _answer(self, *descriptors: int) -> None:
        socket.send_fds(self._line, [frame(msgspec.msgpack.encode([]))], list(descriptors))


def heard(line: socket.socket) -> tuple[str, Any]:
    """The process's next message. Raises the error that it tells of."""
    try:
        message = msgspec.msgpack.decode(receive(line, _MESSAGE_BYTES_MAX)[0], type=dict[str, Any])
        ((kind, value),) = message.items()
    except (msgspec.DecodeError, ValueError) as error:
        raise _nonsense("it says nonsense") from error
    if kind != "error":
        return kind, value
    family, code, text, hint = value
    raise _said(FAMILIES.get(str(family), IntegrityError), str(code), str(text), str(hint))


def _said(family: type[RiosError], code: str, text: str, hint: str) -> RiosError:
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:1000])
    return family(code, shown, hint[:500])


def _nonsense(why: str) -> IntegrityError:
    return IntegrityError("integrity", f"the process that read the model broke the rules: {why}", "get it elsewhere")
