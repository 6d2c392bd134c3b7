"""Secrets at rest: sealed with a key that is a file of the gateway, never in the database.

Owns the key file. Invariants: it is readable by its owner only, or refused; what was sealed for one purpose does not
open for another (the purpose is authenticated); what another key sealed is told from what is broken.
"""

import hashlib
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from config.errors import ConfigError, IntegrityError, LocalError

KEY_FILE = "gateway.key"
"""In the data folder, where the settings name no other file."""
_KEY_BYTES = 32
_NAME_BYTES = 8
_NONCE_BYTES = 12


@dataclass(frozen=True, slots=True)
class Vault:
    """AES-256-GCM under one key. A sealed value: name of the key (8 bytes), nonce (12), ciphertext and tag."""

    key: bytes = field(repr=False)

    @property
    def name(self) -> bytes:
        """Tells keys apart, and says nothing else about them."""
        return hashlib.sha256(b"rios vault\0" + self.key).digest()[:_NAME_BYTES]

    def seal(self, secret: bytes, purpose: str) -> bytes:
        """What may be stored, or shown, of a secret."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - 7 MB, when it is used

        nonce = secrets.token_bytes(_NONCE_BYTES)
        return self.name + nonce + AESGCM(self.key).encrypt(nonce, secret, purpose.encode())

    def has_sealed(self, sealed: bytes) -> bool:
        """Whether it claims to be of this key."""
        return sealed.startswith(self.name)

    def unseal(self, sealed: bytes, purpose: str) -> bytes:
        """The secret. Raises LocalError if another key sealed it, IntegrityError if it is not what was sealed."""
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415

        if not self.has_sealed(sealed):
            hint = f"copy the {KEY_FILE} of the gateway that made it here, or name it in gateway.identity_key_file"
            raise LocalError("local", "a secret in the accounts database was sealed with another key file", hint)
        nonce, rest = sealed[_NAME_BYTES:][:_NONCE_BYTES], sealed[_NAME_BYTES + _NONCE_BYTES :]
        try:
            return AESGCM(self.key).decrypt(nonce, rest, purpose.encode())
        except (InvalidTag, ValueError) as error:
            raise IntegrityError("integrity", "a sealed secret is damaged, or was moved to another place") from error


def open_vault(named: str, data_dir: Path) -> Vault:
    """The vault of the key file that the settings name, or of the data folder's own, which is made if it is not there.

    Raises ConfigError for a file that is missing, open to others or no key, LocalError if it cannot be read or written.
    """
    path = Path(named) if named else data_dir / KEY_FILE
    try:
        if not named:
            _make(path)
    except OSError as error:
        raise LocalError("local", f"cannot write {path}: {error.strerror}") from error
    return Vault(_key(path, read_private(path, "gateway.identity_key_file")))


def read_private(path: Path, setting: str) -> bytes:
    """A small file that only its owner may read.

    Raises ConfigError if it is missing or open to others, LocalError if it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if os.fstat(descriptor).st_mode & 0o077:
                raise ConfigError("config", f"{path} is open to others than its owner", f"chmod 600 {path}")
            return file.read(4096)
    except FileNotFoundError as error:
        hint = f"put it there (for a key of the gateway: a copy of the first gateway's {KEY_FILE})"
        raise ConfigError("config", f"{setting} {path} does not exist", hint) from error
    except OSError as error:
        raise LocalError("local", f"cannot read {path}: {error.strerror}") from error


def _key(path: Path, text: bytes) -> bytes:
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        hint = "restore it from a backup; without it, second factors must be set up again"
        raise ConfigError("config", f"{path} is not a key of {2 * _KEY_BYTES} hex digits", hint)
    return key


def _make(path: Path) -> None:
    """Write a fresh key, unless there is one. Others see all of it or nothing."""
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{secrets.token_hex(_KEY_BYTES)}\n")
            file.flush()
            os.fsync(descriptor)
        try:
            os.link(new, path)  # unlike a rename, it never replaces the key of a gateway that was faster
        except FileExistsError:
            return
    finally:
        new.unlink(missing_ok=True)
