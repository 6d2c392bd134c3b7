"""Finding peers on the LAN by multicast DNS, in the same event loop as all else: no threads to wait for at the end.

Owns: the sockets (one per address of this machine), when to ask and to answer. Does not own: messages (``core.mdns``),
dialling (``mesh``). IPv4 only. The library's own discovery runs threads that answer a stop late and announces no
addresses that it was not given (``docs/decisions/0009``).

Invariants:
1. Whatever arrives, it answers at most once in :data:`ANSWER_GAP_S` and looks at :data:`FINDS_PER_MINUTE` answers.
2. A machine without multicast, or with the port taken, goes on without mDNS: one warning.
"""

import logging
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address

import trio

from config.vocabulary import PeerId
from p2p.core import addresses
from p2p.core.mdns import NONCE_BYTES, Service

log = logging.getLogger(__name__)

GROUP, PORT = "224.0.0.251", 5353
ASK_S = (1.0, 60.0)
ANSWER_GAP_S = 1.0
FINDS_PER_MINUTE = 120

Found = Callable[[PeerId, Sequence[str]], None]


def wanted(setting: str, listed: Sequence[str]) -> list[str]:
    """The IPv4 addresses to speak mDNS on: none if it is off; ``auto`` takes those of private networks, ``on`` loopback
    as well."""
    hosts = [a.host for text in listed if (a := addresses.parse(text)) is not None and a.kind == "ip4"]
    near = [host for host in hosts if ip_address(host).is_private]
    if setting == "off":
        return []
    return list(dict.fromkeys(near if setting == "on" else [host for host in near if not ip_address(host).is_loopback]))


class Mdns:
    """One node's mDNS."""

    def __init__(
        self, hosts: Sequence[str], listed: Sequence[str], swarm_key: bytes | None, found: Found, *, port: int = PORT
    ) -> None:
        """``hosts``: addresses of this machine to send from; ``listed``: multiaddrs with the own peer id."""
        self._hosts = hosts
        self._listed = list(listed)
        self._service = Service(swarm_key)
        self._found = found
        self._port = port
        self._label = "".join(random.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=40))
        self._sockets: list[trio.socket.SocketType] = []
        self._answer_at = 0.0
        self._finds = 0.0
        self._finds_at = 0.0
        self.queries = 0
        self.finds = 0

    async def run(self) -> None:
        """Ask, answer and pass on, forever; or return at once where there is no multicast."""
        try:
            receiver = await self._open()
        except OSError as error:
            log.warning('no peers from the LAN: mDNS does not work here: %s (p2p.mdns = "off" silences this)', error)
            return
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._ask)
                await self._listen(receiver, nursery)
        finally:
            for each in (receiver, *self._sockets):
                each.close()

    async def _open(self) -> trio.socket.SocketType:
        """The socket that hears everybody; and one per own address to send from."""
        receiver = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            await receiver.bind(("", self._port))
            for host in self._hosts:
                member = struct.pack("4s4s", socket.inet_aton(GROUP), socket.inet_aton(host))
                receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
                self._sockets.append(await self._sender(host))
        except OSError:
            for each in (receiver, *self._sockets):
                each.close()
            raise
        return receiver

    async def _sender(self, host: str) -> trio.socket.SocketType:
        sender = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(host))
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
            await sender.bind((host, self._port))
        except OSError:
            sender.close()
            raise
        return sender

    async def _send(self, data: bytes) -> None:
        for sender in self._sockets:
            try:
                await sender.sendto(data, (GROUP, self._port))
            except OSError as error:
                log.debug("mDNS: %s", error)

    async def _ask(self) -> None:
        wait_s = ASK_S[0]
        while True:
            self.queries += 1
            await self._send(self._service.query())
            await trio.sleep(wait_s * random.uniform(0.8, 1.2))
            wait_s = min(wait_s * 3, ASK_S[1])

    async def _listen(self, receiver: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        while True:
            try:
                data, (host, *_) = await receiver.recvfrom(9001)
            except OSError as error:
                log.debug("mDNS: %s", error)
                await trio.sleep(1)
                continue
            if not ip_address(host).is_private:
                continue
            now = trio.current_time()
            if self._service.is_query(data):
                if now >= self._answer_at:
                    self._answer_at = now + ANSWER_GAP_S
                    nursery.start_soon(self._answer)
            elif self._may_find(now):
                self._pass_on(self._service.found(data))

    def _may_find(self, now: float) -> bool:
        self._finds = max(0.0, self._finds - (now - self._finds_at) * FINDS_PER_MINUTE / 60)
        self._finds_at = now
        if self._finds >= FINDS_PER_MINUTE:
            return False
        self._finds += 1
        return True

    async def _answer(self) -> None:
        await trio.sleep(random.uniform(0.02, 0.12))  # RFC 6762, section 6: so that not everybody answers at once
        await self._send(self._service.answer(self._label, self._listed, _nonces()))

    def _pass_on(self, texts: Sequence[str]) -> None:
        by_peer: dict[PeerId, list[str]] = {}
        for text in texts:
            address = addresses.parse(text)
            if address is not None:
                by_peer.setdefault(PeerId(address.peer_id), []).append(text)
        for peer_id, listed in by_peer.items():
            self.finds += 1
            self._found(peer_id, listed)


def _nonces() -> Iterator[bytes]:
    while True:
        yield os.urandom(NONCE_BYTES)
