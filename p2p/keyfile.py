"""The node's private key on disk.

Format: one JSON object: ``version`` 1, ``peer_id`` (readable without the passphrase), ``seed`` (hex) for a plain key,
or ``salt`` and ``box`` (hex; argon2id and NaCl secretbox) for an encrypted one.

Invariants:
1. The file appears whole or not at all, with mode 0600 from its first moment; an existing one is never overwritten.
2. A file that others can read is refused, as is one whose key does not match its peer id.
3. Every failure says what, where and what to do; no message holds a secret.
"""

import json
import os
import stat
from pathlib import Path

from nacl import pwhash
from nacl.exceptions import CryptoError
from nacl.secret import SecretBox
from nacl.utils import random as random_bytes

from config.errors import ConfigError, IntegrityError, LocalError, RiosError
from p2p.core.identity import Identity, peer_id_of, public_key_of

FILE_BYTES_MAX = 4096
OPSLIMIT = pwhash.argon2id.OPSLIMIT_INTERACTIVE
MEMLIMIT = pwhash.argon2id.MEMLIMIT_INTERACTIVE


def create(path: Path, *, passphrase: str = "") -> Identity:
    """A new key in a new file. Raises LocalError, ``conflict`` if the file exists."""
    identity = Identity.from_seed(random_bytes(32))
    save(path, identity, passphrase=passphrase)
    return identity


def save(path: Path, identity: Identity, *, passphrase: str = "") -> None:
    """Write a key to a new file, atomically (also the way to import or export one)."""
    data = dumps(identity, passphrase=passphrase)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)  # unlike a rename, this never replaces an existing key
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError:
        raise LocalError("conflict", f"{path} exists already", "remove it first if you mean to replace it") from None
    except OSError as error:
        hint = "check the folder's permissions and free space"
        raise LocalError("local", f"cannot write the key file {path}: {error.strerror or error}", hint) from error


def load(path: Path, *, passphrase: str = "") -> Identity:
    """The key in a file.

    Raises LocalError (missing, unreadable, readable by others), ConfigError (passphrase missing or wrong),
    IntegrityError (damaged).
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise LocalError("not_found", f"there is no key file {path}", "make one with: rios init") from None
    except OSError as error:
        hint = "the file must belong to the user that runs rios"
        raise LocalError("local", f"cannot read the key file {path}: {error.strerror or error}", hint) from error
    if mode & 0o077:
        message = f"the key file {path} can be read by others (mode {mode:04o})"
        raise LocalError("local", message, f"run: chmod 600 {path}")
    try:
        return loads(data, passphrase=passphrase)
    except RiosError as error:
        error.message = f"key file {path}: {error.message}"
        error.args = (error.message,)
        raise


def peer_id(path: Path) -> str:
    """The peer id a key file names, which needs no passphrase. Raises LocalError or IntegrityError."""
    try:
        fields = json.loads(path.read_bytes()[:FILE_BYTES_MAX])
        return peer_id_of(public_key_of(fields["peer_id"]))
    except FileNotFoundError:
        raise LocalError("not_found", f"there is no key file {path}", "make one with: rios init") from None
    except OSError as error:
        raise LocalError("local", f"cannot read the key file {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError("integrity", f"key file {path} is damaged", "restore it from a backup") from error


def dumps(identity: Identity, *, passphrase: str = "") -> bytes:
    """A key as bytes of a key file."""
    fields: dict[str, object] = {"version": 1, "peer_id": identity.peer_id}
    if passphrase:
        salt = random_bytes(pwhash.argon2id.SALTBYTES)
        box = SecretBox(_key(passphrase, salt)).encrypt(identity.seed)
        fields |= {"salt": salt.hex(), "box": bytes(box).hex()}
    else:
        fields["seed"] = identity.seed.hex()
    return json.dumps(fields, indent=1).encode() + b"\n"


def loads(data: bytes, *, passphrase: str = "") -> Identity:
    """The key in bytes of a key file."""
    damaged = IntegrityError("integrity", "it is truncated or damaged", "restore it from a backup")
    try:
        if len(data) > FILE_BYTES_MAX:
            raise damaged
        fields = json.loads(data)
        if fields["version"] != 1:
            raise IntegrityError("integrity", f"unknown version {fields['version']!r}", "use a newer rios")
        if "box" in fields:
            seed = _open_box(bytes.fromhex(fields["salt"]), bytes.fromhex(fields["box"]), passphrase)
        else:
            seed = bytes.fromhex(fields["seed"])
        if len(seed) != 32:
            raise damaged
        identity = Identity.from_seed(seed)
        if identity.peer_id != fields["peer_id"]:
            raise damaged
    except (ValueError, KeyError, TypeError) as error:
        raise damaged from error
    return identity


def _open_box(salt: bytes, box: bytes, passphrase: str) -> bytes:
    if not passphrase:
        raise ConfigError(
            "config", "it is encrypted and no passphrase was given", "set RIOS_PASSPHRASE or RIOS_PASSPHRASE_FILE"
        )
    if len(salt) != pwhash.argon2id.SALTBYTES or len(box) < SecretBox.NONCE_SIZE + SecretBox.MACBYTES:
        raise ValueError("wrong sizes")
    try:
        return SecretBox(_key(passphrase, salt)).decrypt(box)
    except CryptoError:
        raise ConfigError(
            "config", "the passphrase is wrong", "check RIOS_PASSPHRASE or RIOS_PASSPHRASE_FILE"
        ) from None


def _key(passphrase: str, salt: bytes) -> bytes:
    return pwhash.argon2id.kdf(SecretBox.KEY_SIZE, passphrase.encode(), salt, opslimit=OPSLIMIT, memlimit=MEMLIMIT)
