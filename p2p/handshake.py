"""The lane's handshake: Noise XX over a TCP socket, each side proving its peer id as in libp2p's Noise.

Messages have a length of two bytes before them. The responder's and the initiator's payloads (:mod:`p2p.core.payload`)
travel encrypted and authenticated; so does the offer in them, which is how the cipher is agreed on: AES-256-GCM if
both sides find it the faster one here (hardware), else ChaCha20-Poly1305.

With ``psk`` it is ``XXpsk0``: whoever does not know the key fails at the first message.

Invariants:
1. It ends within :data:`HANDSHAKE_SECONDS`; no message is longer than :data:`MESSAGE_BYTES_MAX`, checked before it is
   read.
2. It returns only with a proven peer id, the expected one if there is one. Whatever the peer sends, the only errors are
   RiosErrors: IntegrityError ``protocol``, RemoteError ``unavailable``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from typing import Any

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from noise.connection import Keypair, NoiseConnection  # type: ignore[import-untyped]

from config.errors import IntegrityError, RemoteError
from config.vocabulary import PeerId
from p2p import front
from p2p.core import payload
from p2p.core.identity import Identity
from p2p.core.records import Cipher

HANDSHAKE_SECONDS = 5.0
MESSAGE_BYTES_MAX = payload.PAYLOAD_BYTES_MAX + 256
PROLOGUE = b"/rios/lane/1.0.0"
XX = b"Noise_XX_25519_ChaChaPoly_SHA256"
XX_PSK = b"Noise_XXpsk0_25519_ChaChaPoly_SHA256"

REFUSAL_BYTES_MAX = 500
_WELCOME_NONCE = b"\xff" * 12  # records never get that far


@dataclass(frozen=True, slots=True)
class Secured:
    """What a handshake leads to: the proven peer and one cipher for each direction (nonces begin at 0)."""

    peer_id: PeerId
    cipher: str
    seal: Cipher
    open: Cipher


class Keys:
    """What this node proves itself with in every handshake of this run."""

    def __init__(self, identity: Identity, psk: bytes | None = None) -> None:
        static = X25519PrivateKey.generate()
        raw = serialization.Encoding.Raw
        self.private = static.private_bytes(raw, serialization.PrivateFormat.Raw, serialization.NoEncryption())
        public = static.public_key().public_bytes(raw, serialization.PublicFormat.Raw)
        self.identity = identity
        self.psk = psk
        self.payload = payload.encode(identity, public, {"aes": aes_is_fast()})


async def shake(
    socket: trio.socket.SocketType, keys: Keys, *, initiator: bool, expected: PeerId | None = None
) -> Secured:
    """Perform the handshake on a fresh socket. ``expected`` is the peer that an initiator wants to reach."""
    with trio.move_on_after(HANDSHAKE_SECONDS):
        try:
            return await _shake(socket, keys, initiator, expected)
        except OSError as error:
            raise RemoteError("unavailable", f"lane: the handshake broke off: {error}") from error
    raise RemoteError("unavailable", f"lane: no handshake within {HANDSHAKE_SECONDS:.0f} s")


async def _shake(socket: trio.socket.SocketType, keys: Keys, initiator: bool, expected: PeerId | None) -> Secured:
    noise = NoiseConnection.from_name(XX_PSK if keys.psk else XX)
    noise.set_prologue(PROLOGUE)
    if keys.psk:
        noise.set_psks(keys.psk)
    noise.set_keypair_from_private_bytes(Keypair.STATIC, keys.private)
    (noise.set_as_initiator if initiator else noise.set_as_responder)()
    noise.start_handshake()
    state = noise.noise_protocol.handshake_state
    if initiator:
        await _write(socket, _try(noise.write_message, b""))
        answer = _try(noise.read_message, await _read(socket))
    else:
        _try(noise.read_message, await _read(socket))
        await _write(socket, _try(noise.write_message, keys.payload))
        answer = _try(noise.read_message, await _read(socket))
    peer_id, offer = payload.decode(bytes(answer), state.rs.public_bytes)
    if expected is not None and peer_id != expected:
        raise IntegrityError("protocol", f"lane: {peer_id} answered where {expected} should be")
    if peer_id == keys.identity.peer_id:
        raise IntegrityError("protocol", "lane: this node reached itself")
    if initiator:
        await _write(socket, _try(noise.write_message, keys.payload))
    protocol = noise.noise_protocol
    fast = offer.get("aes") is True and aes_is_fast()
    make: Callable[[bytes], Cipher] = AESGCM if fast else ChaCha20Poly1305
    return Secured(
        peer_id,
        "AES-256-GCM" if fast else "ChaCha20-Poly1305",
        make(protocol.cipher_state_encrypt.k),
        make(protocol.cipher_state_decrypt.k),
    )


def _try(step: Callable[[bytes], Any], message: bytes) -> bytes:
    """One step of the handshake. The library raises many things for a bad message, some only when it answers it."""
    try:
        return bytes(step(message))
    except Exception as error:
        raise IntegrityError("protocol", f"lane: a handshake message that is none: {type(error).__name__}") from error


async def _write(socket: trio.socket.SocketType, message: bytes) -> None:
    data = memoryview(len(message).to_bytes(2, "big") + message)
    while data:
        data = data[await socket.send(data) :]


async def _read(socket: trio.socket.SocketType) -> bytes:
    head = await _exactly(socket, 2)
    if head == front.MAGIC[:2]:  # no message is that long: it is a front door's answer
        _, version, _, _ = front.PREAMBLE.unpack(head + await _exactly(socket, front.PREAMBLE.size - 2))
        what = (
            "takes no lanes" if version == front.VERSION else f"speaks version {version} of the front door's preamble"
        )
        raise RemoteError("unavailable", f"lane: the peer {what}; this node speaks version {front.VERSION}")
    size = int.from_bytes(head, "big")
    if size > MESSAGE_BYTES_MAX:
        raise IntegrityError("too_large", f"lane: a handshake message of {size} bytes")
    return await _exactly(socket, size)


async def _exactly(socket: trio.socket.SocketType, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = await socket.recv(count - len(data))
        if not part:
            raise RemoteError("unavailable", "lane: the peer hung up during the handshake")
        data += part
    return data


async def welcome(socket: trio.socket.SocketType, secured: Secured, refusal: str = "") -> None:
    """The responder's last word: come in, or why not."""
    with trio.move_on_after(HANDSHAKE_SECONDS):
        try:
            await _write(socket, secured.seal.encrypt(_WELCOME_NONCE, refusal.encode()[:REFUSAL_BYTES_MAX], PROLOGUE))
        except OSError as error:
            raise RemoteError("unavailable", f"lane: the handshake broke off: {error}") from error


async def await_welcome(socket: trio.socket.SocketType, secured: Secured) -> None:
    """Hear it. Raises RemoteError ``unavailable`` with the reason for a refusal."""
    refusal = ""
    with trio.move_on_after(HANDSHAKE_SECONDS) as scope:
        try:
            refusal = secured.open.decrypt(_WELCOME_NONCE, await _read(socket), PROLOGUE).decode(errors="replace")
        except OSError as error:
            raise RemoteError("unavailable", f"lane: the handshake broke off: {error}") from error
        except InvalidTag:
            raise IntegrityError("protocol", "lane: the end of the handshake does not decrypt") from None
    if scope.cancelled_caught:
        refusal = f"no answer within {HANDSHAKE_SECONDS:.0f} s"
    if refusal:
        raise RemoteError("unavailable", f"{secured.peer_id} refused: {refusal}", peer_id=secured.peer_id)


@lru_cache(maxsize=1)
def aes_is_fast() -> bool:
    """Whether AES-256-GCM beats ChaCha20-Poly1305 here (it does where the processor has instructions for it)."""
    data = bytes(1 << 16)

    def cost(cipher: Cipher) -> float:
        times = []
        for _ in range(5):
            start = perf_counter()
            cipher.encrypt(bytes(12), data, None)
            times.append(perf_counter() - start)
        return min(times)

    return cost(AESGCM(bytes(32))) < cost(ChaCha20Poly1305(bytes(32)))
