"""A keyed hash in the place of Ed25519's curve arithmetic, so that a seed costs tenths of a second.

Only libsodium's two calls are replaced: everything above them (length checks, the test for hostile keys, ids, tags) is
the real code, and public keys are real ones. The key of the hash follows from the public key; nobody in the simulation
signs with a key that is not its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b, sha256
from hmac import compare_digest
from typing import Any

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

    def opens(self, signed: bytes) -> bool:
        """Whether a signature and the message behind it fit."""
        return compare_digest(blake2b(signed[64:], key=self._secret).digest(), signed[:64])


@lru_cache(maxsize=4096)
def _fast_key(public_key: bytes) -> FastKey:
    return FastKey(public_key)


def _fast_opens(public_key: bytes, signed: bytes) -> bool:
    return _fast_key(public_key).opens(signed)


@contextmanager
def signer(*, real: bool) -> Iterator[None]:
    """Within it, signatures are Ed25519 or the keyed hash."""
    before = identities._opens
    if not real:
        identities._opens = _fast_opens
    try:
        yield
    finally:
        identities._opens = before


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
