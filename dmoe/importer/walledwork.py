"""What reads a stranger's model files: a process that was given them open, and writes into files that it is given.

Started by ``dmoe/importer/walled.py``; the argument is the descriptor of its socket. It never opens a file by a name
and holds no key: the manifest goes back unsigned.

Invariants:
1. The walls (``dmoe/cells/sandbox``) go up after the imports and before the first byte of a file is looked at.
2. A tokenizer has :data:`TEXT_SECONDS`, which the parent keeps; memory has its limit, so has each file written.
3. Whatever fails is said to the parent, by the family of its error; what cannot be said ends the process.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from config.errors import ConfigError, IntegrityError, LocalError, RiosError
from config.vocabulary import PeerId
from dmoe import asidework
from dmoe.cells import sandbox
from dmoe.cells.frames import frame, receive
from dmoe.importer.build import Import, Wishes
from dmoe.importer.files import GivenFiles
from dmoe.importer.folder import FolderSource
from dmoe.importer.model import Model, read_folder, read_gguf
from dmoe.importer.sources import GgufSource
from dmoe.runtime import RuntimeOptions, smoke
from dmoe.shardfile import ShardFile
from dmoe.text import Tokenizer

TEXT_SECONDS = 60.0
PROGRESS_BYTES = 1 << 22
"""So much is done between two words about it."""
FAMILIES: Mapping[str, type[RiosError]] = {
    family.__name__: family for family in (ConfigError, IntegrityError, LocalError)
}


class Setup(msgspec.Struct, frozen=True):
    """What is to be imported: ``path`` and ``name`` for messages, the given files' ``names``, limits in bytes."""

    path: str
    name: str
    is_folder: bool
    names: list[str]
    wishes: Wishes
    publisher: str
    threads: int
    data_bytes: int
    file_bytes: int
    demanded: bool


def main(arguments: Sequence[str]) -> None:
    """Import one model."""
    (descriptor,) = map(int, arguments)
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptor)
    rehearse()
    setup = msgspec.msgpack.decode(receive(line)[0], type=Setup)  # the parent's own words
    given = _given(line, setup.names)
    profile = sandbox.Profile(
        calls=("pread64", "pwrite64"),
        memory_bytes=0,
        data_bytes=setup.data_bytes,
        file_bytes=setup.file_bytes,
        demanded=setup.demanded,
    )
    try:
        walls = sandbox.enter([descriptor, *given.values()], profile)
        _say(line, {"walls": [asdict(wall) for wall in walls]})
        _say(line, {"manifest": _run(line, setup, given)})
    except RiosError as error:
        family = type(error).__name__ if type(error).__name__ in FAMILIES else "IntegrityError"
        _say(line, {"error": [family, error.code, error.message, error.hint]})
    except MemoryError:
        _say(line, {"error": ["LocalError", "local", "not enough memory to import the model", "free some memory"]})


def rehearse() -> None:
    """Use everything once: nothing can be imported behind the walls."""
    asidework.rehearse()
    smoke(RuntimeOptions(device="cpu", threads=1))


def _given(line: socket.socket, names: Sequence[str]) -> dict[str, int]:
    """The files, in order, a few descriptors with each frame."""
    descriptors: list[int] = []
    while len(descriptors) < len(names):
        more = receive(line)[1]
        if not more:
            raise EOFError
        descriptors += more
    return dict(zip(names, descriptors, strict=True))


def _run(line: socket.socket, setup: Setup, given: Mapping[str, int]) -> bytes:
    making = Import(_model(line, setup, given), setup.wishes, _Progress(line).show)
    _asked(line, {"need": making.bytes_needed})
    try:
        return making.run(_Target(line), PeerId(setup.publisher), setup.threads).to_json()
    except OSError as error:
        raise LocalError("local", f"cannot write the model: {error.strerror}", "see that there is room") from error


def _model(line: socket.socket, setup: Setup, given: Mapping[str, int]) -> Model:
    path = Path(setup.path)
    if setup.is_folder:
        files = GivenFiles(path, given)
        return read_folder(FolderSource(path, files, name=setup.name, count_tokens=partial(_count_tokens, line)))
    return read_gguf(GgufSource(path, GivenFiles(path.parent, given)))


def _count_tokens(line: socket.socket, tokenizer_json: bytes, template: str) -> int:
    _say(line, {"text": True})
    count = Tokenizer(tokenizer_json, template).vocabulary
    _say(line, {"text": False})
    return count


class _Progress:
    """Says how far it is, now and then."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._said = (-PROGRESS_BYTES, "")

    def show(self, done: int, total: int, what: str) -> None:
        if done - self._said[0] >= PROGRESS_BYTES or what != self._said[1] or done == total:
            self._said = (done, what)
            _say(self._line, {"progress": [done, total, what]})


class _Target:
    """Files that the parent makes (:class:`dmoe.importer.write.Target`)."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._sizes: dict[str, int] = {}

    def create(self, name: str, size: int) -> BinaryIO:
        self._sizes[name] = size
        return os.fdopen(_asked(self._line, {"create": [name, size]})[0], "r+b", buffering=0)

    def written(self, name: str) -> ShardFile:
        (descriptor,) = _asked(self._line, {"written": name})
        try:
            return ShardFile(Path(name), descriptor, self._sizes[name])
        finally:
            os.close(descriptor)


def _asked(line: socket.socket, message: dict[str, Any]) -> list[int]:
    """Say something, and the descriptors that come back. Raises LocalError with what the parent says."""
    _say(line, message)
    answer, descriptors = receive(line)
    if refused := msgspec.msgpack.decode(answer):
        raise LocalError(*refused)
    return descriptors


def _say(line: socket.socket, message: dict[str, Any]) -> None:
    line.sendall(frame(msgspec.msgpack.encode(message)))
