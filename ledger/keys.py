"""The keys a witness signs with, one per epoch, each in a file of its own; erased once its epoch has handed over.

Format and protection are the identity's (``p2p/keyfile``: mode 0600, encrypted under the passphrase if there is one).
The identity itself may sit in a committee, too (most networks' first one): it cannot be erased.

Invariants: a file carries the peer id of its key as its name. Erasing overwrites the secret before the file goes; what
a file system kept elsewhere (snapshots, backups) is beyond that, so keep these files out of backups.
"""

import os
from pathlib import Path

from config.errors import LocalError
from p2p import keyfile
from p2p.core.identity import Identity, peer_id_of, public_key_of

SUFFIX = ".key"


class EpochKeys:
    """The epoch keys in ``folder`` (None: only the identity), and ``identity``."""

    def __init__(self, identity: Identity, folder: Path | None = None, passphrase: str = "") -> None:
        self._identity = identity
        self._folder = folder
        self._passphrase = passphrase
        self._made: dict[bytes, Identity] = {}

    def create(self) -> Identity:
        """A key for a committee to come. Raises LocalError if it cannot be kept."""
        if self._folder is None:
            raise LocalError("local", "this node has no folder for epoch keys", "start it as a daemon: rios run")
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = Identity.from_seed(os.urandom(32))
        keyfile.save(self._file(made.public_key), made, passphrase=self._passphrase)
        self._made[made.public_key] = made
        return made

    def public_keys(self) -> set[bytes]:
        """Every key this node could vote with."""
        return {self._identity.public_key, *self.epoch_keys()}

    def epoch_keys(self) -> set[bytes]:
        """The keys in files."""
        if self._folder is None or not self._folder.is_dir():
            return set()
        return {bytes(public_key_of(file.stem)) for file in self._folder.glob(f"*{SUFFIX}")}

    def find(self, key: bytes) -> Identity | None:
        """The private key of ``key``, if it is here. Raises LocalError or ConfigError if its file cannot be used."""
        if key == self._identity.public_key:
            return self._identity
        if key in self._made:
            return self._made[key]
        if self._folder is None or not self._file(key).exists():
            return None
        found = self._made[key] = keyfile.load(self._file(key), passphrase=self._passphrase)
        return found

    def erase(self, key: bytes) -> None:
        """Destroy an epoch key for good (not the identity). Raises LocalError if the file cannot be removed."""
        self._made.pop(key, None)
        if key == self._identity.public_key or self._folder is None or not self._file(key).exists():
            return
        try:
            with self._file(key).open("r+b") as file:
                size = os.fstat(file.fileno()).st_size
                file.write(os.urandom(size))
                file.flush()
                os.fsync(file.fileno())
            self._file(key).unlink()
            handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            hint = "remove it by hand: whoever has it can forge votes of its epoch"
            raise LocalError("local", f"cannot erase {self._file(key)}: {error.strerror or error}", hint) from error

    def _file(self, key: bytes) -> Path:
        assert self._folder is not None
        return self._folder / f"{peer_id_of(key)}{SUFFIX}"
