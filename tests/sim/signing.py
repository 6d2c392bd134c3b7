"""A keyed hash in the place of Ed25519's curve arithmetic, so that a seed costs tenths of a second.

Only libsodium's two calls are replaced: everything above them (length checks, the test for hostile keys, ids, tags) is
the real code, and public keys are real ones. The key of the hash follows from the public key; nobody in the simulation
signs with a key that is not its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b, sha256
from hmac import compare_digest
from typing import Any

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey

from p2p.core import identity as identities
from p2p.core.identity import Identity


@dataclass(frozen=True, slots=True)
class _Signature:
    signature: bytes


class FastKey:
    """Signs and verifies for one public key."""

    __slots__ = ("_secret", "_seed")

    def __init__(self, public_key: bytes, seed: bytes = b"") -> None:
        self._secret = sha256(b"simulated signature" + public_key).digest()
        self._seed = seed

    def __bytes__(self) -> bytes:
        return self._seed

    def sign(self, message: bytes) -> _Signature:
        """Like nacl's SigningKey.sign."""
        return _Signature(blake2b(message, key=self._secret).digest())

    def verify(self, message: bytes, signature: bytes) -> bytes:
        """Like nacl's VerifyKey.verify."""
        if not compare_digest(blake2b(message, key=self._secret).digest(), signature):
            raise BadSignatureError("signature was forged")
        return message


_fast_keys: dict[bytes, FastKey] = {}


def _fast_verify_key(public_key: bytes) -> FastKey:
    found = _fast_keys.get(public_key)
    if found is None:
        if len(_fast_keys) > 4096:
            _fast_keys.clear()
        found = _fast_keys[public_key] = FastKey(public_key)
    return found


@contextmanager
def signer(*, real: bool) -> Iterator[None]:
    """Within it, signatures are Ed25519 or the keyed hash."""
    before: Any = identities._verify_key
    if not real:
        identities._verify_key = _fast_verify_key  # type: ignore[assignment]
    try:
        yield
    finally:
        identities._verify_key = before


_made: dict[tuple[bytes, bool], Identity] = {}


def identity(name: str, *, real: bool) -> Identity:
    """The identity called ``name``."""
    seed = sha256(name.encode()).digest()
    found = _made.get((seed, real))
    if found is None:
        found = Identity(SigningKey(seed), *_public(seed))
        if not real:
            fast: Any = FastKey(found.public_key, seed)
            found = Identity(fast, found.public_key, found.peer_id)
        _made[seed, real] = found
    return found


def _public(seed: bytes) -> tuple[Any, Any]:
    real = Identity.from_seed(seed)
    return real.public_key, real.peer_id
