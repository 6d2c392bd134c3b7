"""libp2p's Noise handshake, in a public and in a private swarm, and who may stay after it.

Owns: which handshake is offered, the swarm key in it (``docs/decisions/0007``), what a refused one means in words. Does
not own: the session that follows (``secure``), who is kept out (``doors``, ``allow``).

Invariants:
1. A node with a swarm key speaks :data:`PSK_ID` and nothing else: whoever lacks the key gets no answer to its first
   message.
2. A peer that proved itself stays only if the doors and the allow-list let it.
"""

from collections.abc import Callable
from typing import Any

from libp2p.abc import IRawConnection, ISecureConn
from libp2p.crypto.keys import PrivateKey
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from libp2p.security.noise.patterns import IPattern, PatternXX
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.security.secure_session import SecureSession
from noise.connection import NoiseConnection  # type: ignore[import-untyped]

from config.vocabulary import PeerId
from p2p.handshake import XX_PSK
from p2p.secure import Door, Session, Spawn

PSK_ID = TProtocol("/rios/noise-psk/1.0.0")
"""libp2p's Noise with a swarm key; what strangers to a private swarm cannot speak."""
REFUSED_MAX = 1024
NEEDS_KEY = "this swarm needs a key: ask one of its members for an invite, then: rios swarm join"
OTHER_SWARM = "it is not in this node's private swarm (rios swarm show): it speaks no Noise with a swarm key"
OTHER_KEY = "it broke off at the swarm key: it has another one; compare `rios swarm show`, or ask for a new invite"
LEFT_OUT = "it hung up once it knew who calls: perhaps it banned this node, or its p2p.allow does not list it"
OTHER_PEER = "another peer answers at that address: has the node got a new key?"
NOT_LISTED = "p2p.allow of this node does not list it"
KEPT_OUT = "the doors of this node keep it out: see rios peers bans"


class Noise(NoiseTransport):
    """Noise whose sessions are :class:`Session`. With a swarm key it is another protocol, :data:`PSK_ID`: whoever
    lacks the key fails at the first message, before either side has said who it is."""

    spawn: Spawn
    swarm_key: bytes | None = None
    admits: Callable[[str], bool] = staticmethod(lambda peer_id: True)
    """Whether a peer whose identity was just proved may stay."""
    door: Door
    refused: dict[str, Exception]
    """Peer -> why the last handshake with it failed."""

    @property
    def protocol_id(self) -> TProtocol:
        """What is negotiated."""
        return NOISE_ID if self.swarm_key is None else PSK_ID

    def get_pattern(self) -> IPattern:
        """The handshake of a public or a private swarm."""
        if self.swarm_key is None:
            return super().get_pattern()
        return _PskPattern(self.local_peer, self.libp2p_privkey, self.noise_privkey, self.swarm_key)

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        """Answer a handshake."""
        plain = _plain(await super().secure_inbound(conn))
        stream: Any = conn
        socket = stream.stream.stream.socket
        self.door.proven(socket)
        session = await self._admitted(plain, conn)
        # last, as it may cost another peer its place
        if not self.door.known(socket, PeerId(str(session.remote_peer))):
            raise HandshakeFailure(KEPT_OUT)
        return session

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        """Begin a handshake with this very peer."""
        self.refused.pop(str(peer_id), None)
        try:
            session = await self._admitted(_plain(await super().secure_outbound(conn, peer_id)), conn)
            if not session.allowed():
                await session.close()
                raise HandshakeFailure(KEPT_OUT)
            return session
        except Exception as error:
            if len(self.refused) < REFUSED_MAX:  # the library reports one of several addresses' errors, or none
                self.refused[str(peer_id)] = error
            raise

    async def _admitted(self, session: SecureSession, conn: IRawConnection) -> Session:
        if not self.admits(str(session.remote_peer)):
            await session.close()
            raise HandshakeFailure(NOT_LISTED)
        return Session(session, conn, self.spawn, self.door)

    def why_refused(self, peer_id: str, error: BaseException) -> str:
        """What a failed dial says about swarm keys, in words that tell what to do; empty if nothing."""
        refused = self.refused.pop(peer_id, None)
        if isinstance(refused, PeerIDMismatchesPubkey):
            return OTHER_PEER
        if isinstance(refused, HandshakeFailure) and str(refused) in (NOT_LISTED, KEPT_OUT):
            return str(refused)
        text = f"{error} {error.__cause__} {error.__context__}"
        if "negotiate the secure protocol" in text:
            return NEEDS_KEY if self.swarm_key is None else OTHER_SWARM
        if self.swarm_key is None:
            return ""
        return OTHER_KEY if refused is not None else LEFT_OUT if "failed to upgrade mux" in text else ""


class _PskPattern(PatternXX):
    """Noise XX that mixes the swarm key in before the first message (Noise specification, section 9: ``psk0``)."""

    def __init__(self, local_peer: ID, private_key: PrivateKey, noise_key: PrivateKey, psk: bytes) -> None:
        super().__init__(local_peer, private_key, noise_key)
        self.protocol_name = XX_PSK
        self._psk = psk

    def create_noise_state(self, prologue: bytes | None = None) -> NoiseConnection:
        """A handshake that has not begun."""
        state = super().create_noise_state(prologue)
        state.set_psks(psk=self._psk)
        return state


def _plain(session: ISecureConn) -> SecureSession:
    assert isinstance(session, SecureSession)
    return session
