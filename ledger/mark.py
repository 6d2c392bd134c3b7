"""A counter outside the database: how a node notices that its database came from a backup (rule 9).

A small file beside the database says which database it belongs to (a random lineage), how many promises (batches of
votes, freezes, handovers) this node has given as a witness, and up to which entry it has signed. It is written after
the database's commit and synced at every start only: it may lag behind the database (power loss) but never be ahead of
it, unless the database is an older copy, or the start that noticed one has not written that down yet.

What it cannot see is a copy of the whole folder put back; then the batches and entries that peers know tell
(``seats``, ``recovering``). Fails as: a file that cannot be written -> LocalError.
"""

import os
from pathlib import Path
from struct import Struct
from zlib import crc32

from config.errors import LocalError

_RECORD = Struct(">16sQQ")
_CHECK = Struct(">I")
_DAMAGED = b"damaged"
NEW, INTACT, RESTORED = "new", "intact", "restored"
AHEAD = 2**64 - 1
"""More than any database has."""


class Mark:
    """The file ``<database>.mark``; none for a database in memory."""

    def __init__(self, database: Path | str) -> None:
        self.path = None if str(database) == ":memory:" else Path(f"{database}.mark")
        self.lineage = bytes(16)
        self.promises = self.entries = 0
        self._handle: int | None = None

    def open(self, lineage: bytes | None, promises: int, entries: int) -> str:
        """Compare with what the database says (``lineage`` None: it never had a mark).

        :data:`NEW`, :data:`INTACT` or :data:`RESTORED`. The caller calls :meth:`follow`, makes :attr:`lineage` and a
        restoration durable in the database, then calls :meth:`settle`.
        """
        known = self._read()
        if lineage is None:
            begun = known is not None and (known[0] == _DAMAGED or known[1:] != (0, 0))
            verdict = RESTORED if begun else NEW
        elif self.path is None:
            verdict = INTACT
        elif known is None or known[0] != lineage or known[1] > promises or known[2] > entries:
            verdict = RESTORED
        else:
            verdict = INTACT
        # until the database says so itself, the counters say it: a start that dies in between must not hide it
        self.promises, self.entries = {RESTORED: (AHEAD, AHEAD), NEW: (0, 0)}.get(verdict, (promises, entries))
        self.lineage = lineage if verdict == INTACT and lineage is not None else os.urandom(16)
        return verdict

    def follow(self) -> None:
        """Begin to write, with the new :attr:`lineage`. This once it is synced: a file that a power loss left empty, or
        took away, would look like somebody else's."""
        self._write()
        self._sync()

    def settle(self, promises: int, entries: int) -> None:
        """The database knows the new lineage and the verdict: count as it does from now on. Synced as well: what stood
        here before would look like a restoration."""
        self.promises, self.entries = promises, entries
        self.follow()

    def promised(self, promises: int) -> None:
        """So many promises are durable."""
        if promises > self.promises:
            self.promises = promises
            self._write()

    def signed(self, seq: int) -> None:
        """The own entry ``seq`` is durable."""
        if seq > self.entries:
            self.entries = seq
            self._write()

    def close(self) -> None:
        """Close the file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _read(self) -> tuple[bytes, int, int] | None:
        if self.path is None or not self.path.exists():
            return None
        data = self.path.read_bytes()
        if not data:
            return None  # made, but there was no room, or no time, to write it: no database has its lineage
        body = data[: _RECORD.size]
        if len(data) != _RECORD.size + _CHECK.size or _CHECK.unpack(data[_RECORD.size :])[0] != crc32(body):
            return (_DAMAGED, 0, 0)
        lineage, promises, entries = _RECORD.unpack(body)
        return lineage, promises, entries

    def _write(self) -> None:
        if self.path is None:
            return
        body = _RECORD.pack(self.lineage, self.promises, self.entries)
        try:
            if self._handle is None:
                self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.pwrite(self._handle, body + _CHECK.pack(crc32(body)), 0)
        except OSError as error:
            raise self._unwritable(error) from error

    def _sync(self) -> None:
        if self.path is None or self._handle is None:
            return
        try:
            os.fsync(self._handle)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> LocalError:
        hint = "check the folder's permissions and free space"
        return LocalError("local", f"cannot write {self.path}: {error.strerror or error}", hint)
