"""Finds out whether others can dial this node, and tells them where.

Owns: rounds of questions, dial-backs for others, the router's mapping, the advert's ``reach`` and ``addresses``. Does
not own: the judgement (``core.reach``), relays (``relay``).

A round: a few linked peers say which host they see this node come from (``reach.observed``), then dial the candidates
with that very host (``reach.probe``) and show the secret of the question, which proves that the address leads here.

Invariants:
1. Nobody is dialled for a peer but the host its own connection comes from, :data:`PROBE_BURST` times at most, then one
   in :data:`PROBE_EVERY_S`; :data:`PROBES_MAX` at a time. What is sent there is 24 bytes.
2. An address is advertised as working only if its secret came in here.
"""

import logging
import random
import socket as plain_socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from os import urandom
from typing import Any, Protocol

import trio

from config.errors import BusyError, IntegrityError, RiosError
from config.vocabulary import PeerId
from p2p.core import addresses, reach
from p2p.core.buckets import Bucket
from p2p.face import Buffer, Call, Header, Reply
from p2p.front import PROBE, Arrival, preamble
from p2p.upnp import Mapping

log = logging.getLogger(__name__)

ASKED_MAX = 3
PROBES_MAX = 8
PROBE_EVERY_S, PROBE_BURST = 5.0, 4.0
HOSTS_MAX = 4096
DIAL_S = 3.0
ASK_MS = 7000
SECRET_BYTES = 16
FIRST_S = 1.0
"""After the first link: more of them may come, and with them better answers."""
LOOK_S = 20.0
"""Between looks at this machine's own addresses."""
MAPPING_S = 60.0
"""Between two tries to have a mapping."""


class Neighbours(Protocol):
    """What is needed of the network."""

    def peers(self) -> Sequence[PeerId]:
        """Linked peers."""

    def host_of(self, peer_id: PeerId) -> str:
        """The host at the other end of the direct link to a peer; empty if it is relayed or there is none."""

    async def call(
        self, peer_id: PeerId, method: str, header: Header, buffers: Sequence[Buffer] = (), *, deadline_ms: int
    ) -> Reply:
        """Call one."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where this node listens: bare multiaddrs as configured, its port, and what the operator announces instead."""

    listening: Callable[[], tuple[str, ...]]
    port: int
    announce: tuple[str, ...]
    loopback: bool
    upnp: bool


class Reach:
    """This node's standing in the world. ``changed`` is called after every change of :attr:`state`."""

    def __init__(self, own: PeerId, net: Neighbours, place: Place, changed: Callable[[], None]) -> None:
        self._own = own
        self._net = net
        self._place = place
        self._changed = changed
        declared = place.announce or (place.listening() if place.loopback else ())
        self.state = reach.State(reach.PUBLIC, declared) if declared else reach.State()
        self.mapping = Mapping(place.port)
        self.rounds = 0
        self.probes = 0
        self._mapped_at = float("-inf")
        self._secrets: dict[bytes, bool] = {}
        self._wake = trio.Event()
        self._probing = 0
        self._askers: dict[str, Bucket] = {}

    @property
    def declared(self) -> bool:
        """Whether there is nothing to find out."""
        return bool(self._place.announce) or self._place.loopback

    def listening(self) -> tuple[str, ...]:
        """Where this node listens now."""
        return self._place.listening()

    def link_up(self) -> None:
        """A peer that can be asked came. The first one: this node may have been cut off, and come back elsewhere."""
        if self.state.reach == reach.UNKNOWN or len(self._net.peers()) <= 1:
            self._wake.set()

    # -- this node's own rounds

    async def run(self) -> None:
        """Rounds for ever: at once when something changes, rarely otherwise."""
        if self.declared:
            return
        await self._wake.wait()
        await trio.sleep(FIRST_S)
        try:
            while True:
                self._wake = trio.Event()
                await self._round()
                await self._until_next()
        finally:
            await self.mapping.take_back()

    async def _until_next(self) -> None:
        """Return when the next round is due: in time, or because this machine's addresses changed."""
        before = self._place.listening()
        with trio.move_on_after(reach.next_round_s(self.state) * random.uniform(0.8, 1.2)):
            while self._place.listening() == before:
                with trio.move_on_after(LOOK_S):
                    await self._wake.wait()
                    await trio.sleep(FIRST_S)
                    return
            # what was settled was settled elsewhere: the next round alone decides
            self.state = replace(self.state, doubts=reach.DOUBTS)
            self._changed()

    async def _round(self) -> None:
        verdicts = await self._ask_some()
        listening = self._place.listening()
        # judged by this round alone: a mapping that was lost with the router's memory is made anew at once
        hidden = reach.settle(reach.State(), verdicts, listening).reach == reach.PRIVATE
        if hidden and self._place.upnp and await self._mapped():
            verdicts = await self._ask_some() or verdicts
        after = reach.settle(self.state, verdicts, listening)
        self.rounds += 1
        before, self.state = self.state, after
        if (before.reach, before.addresses) != (after.reach, after.addresses):
            log.info("reach: %s (%d asked, seen as %s)", after.reach, after.asked, after.observed or "nobody")
            self._changed()

    async def _mapped(self) -> bool:
        """Whether there is a mapping to be tried."""
        now = trio.current_time()
        if self._mapped_at + MAPPING_S > now:
            return False
        self._mapped_at = now
        return await self.mapping.make()

    async def _ask_some(self) -> list[reach.Verdict]:
        verdicts: list[reach.Verdict] = []
        async with trio.open_nursery() as nursery:
            for peer_id in self._helpers():
                nursery.start_soon(self._ask, peer_id, verdicts)
        return verdicts

    def _helpers(self) -> list[PeerId]:
        """Peers to ask, of different networks first."""
        direct = [peer for peer in self._net.peers() if self._net.host_of(peer)]
        random.shuffle(direct)
        seen: set[str] = set()
        first: list[PeerId] = []
        more: list[PeerId] = []
        for peer_id in direct:
            network = self._net.host_of(peer_id).rpartition(".")[0]
            (more if network in seen else first).append(peer_id)
            seen.add(network)
        return (first + more)[:ASKED_MAX]

    async def _ask(self, peer_id: PeerId, verdicts: list[reach.Verdict]) -> None:
        secret = urandom(SECRET_BYTES)
        self._secrets[secret] = False
        try:
            seen = (await self._net.call(peer_id, "reach.observed", {}, deadline_ms=ASK_MS)).header.get("host")
            if not isinstance(seen, str) or not seen:
                return
            wanted = reach.candidates(self._place.listening(), (seen,), self._place.port, self.mapping.port)
            asked = {"addresses": list(wanted), "secret": secret}
            answer = (await self._net.call(peer_id, "reach.probe", asked, deadline_ms=ASK_MS)).header.get("reached")
            reached = tuple(a for a in wanted if isinstance(answer, list) and a in answer)
            verdicts.append(reach.Verdict(peer_id, seen, reached if self._secrets[secret] else ()))
        except RiosError as error:
            log.debug("reach: %s cannot be asked: %s", peer_id, error)
        finally:
            del self._secrets[secret]

    async def on_probe(self, arrival: Arrival) -> None:
        """Somebody dialled back: answer if it is about a question of ours (a handler of the front)."""
        secret = b""
        with trio.move_on_after(DIAL_S):
            while len(secret) < SECRET_BYTES:
                part = await arrival.socket.recv(SECRET_BYTES - len(secret))
                if not part:
                    return
                secret += part
            if secret in self._secrets:
                self._secrets[secret] = True
                await arrival.socket.send(_answer(secret, self._own))

    # -- for others

    async def serve_observed(self, call: Call) -> Reply:
        """``reach.observed``: the host that the caller's connection comes from."""
        await trio.lowlevel.checkpoint()
        return Reply({"host": self._net.host_of(call.peer_id)})

    async def serve_probe(self, call: Call) -> Reply:
        """``reach.probe``: dial the caller back and tell which addresses led to it."""
        wanted, secret = call.header.get("addresses"), call.header.get("secret")
        if not isinstance(wanted, list) or not isinstance(secret, bytes) or len(secret) != SECRET_BYTES:
            raise IntegrityError("protocol", "reach.probe: 'addresses' must be a list and 'secret' 16 bytes")
        host = self._net.host_of(call.peer_id)
        self._admit(host)
        reached: list[str] = []
        self._probing += 1
        try:
            async with trio.open_nursery() as nursery:
                for address in reach.allowed(wanted, host):
                    nursery.start_soon(partial(_dial_back, address, secret, call.peer_id, reached.append))
        finally:
            self._probing -= 1
        self.probes += 1
        return Reply({"reached": reached})

    def _admit(self, host: str) -> None:
        """Raise BusyError when a host, or everybody together, asks for too much."""
        now = trio.current_time()
        if len(self._askers) >= HOSTS_MAX:
            self._askers = {each: bucket for each, bucket in self._askers.items() if not bucket.idle(now)}
        if self._probing >= PROBES_MAX or len(self._askers) >= HOSTS_MAX:
            raise BusyError(f"{PROBES_MAX} dial-backs are under way (limit: dial-backs at a time)", "ask another peer")
        if not self._askers.setdefault(host, Bucket(1 / PROBE_EVERY_S, PROBE_BURST)).take(1, now):
            raise BusyError("too many questions from one host (limit: dial-backs per host)", "ask another peer")

    # -- for people

    def statistics(self) -> dict[str, Any]:
        """Numbers for status and metrics."""
        return {
            "rounds": self.rounds,
            "dial_backs_for_others": self.probes,
            "observed": self.state.observed,
            "upnp_port": self.mapping.port,
            "upnp": self.mapping.why_not if self._place.upnp else "off",
        }


def _answer(secret: bytes, peer_id: PeerId) -> bytes:
    return sha256(b"rios/probe/1\0" + secret + peer_id.encode()).digest()[:SECRET_BYTES]


async def _dial_back(address: str, secret: bytes, peer_id: PeerId, reached: Callable[[str], object]) -> None:
    parsed = addresses.parse(address)
    assert parsed is not None
    family = plain_socket.AF_INET6 if parsed.kind == "ip6" else plain_socket.AF_INET
    with trio.socket.socket(family, plain_socket.SOCK_STREAM) as socket, trio.move_on_after(DIAL_S):
        try:
            await socket.connect((parsed.host, parsed.port))
            await socket.send(preamble(PROBE) + secret)
            if await socket.recv(SECRET_BYTES) == _answer(secret, peer_id):
                reached(address)
        except OSError as error:
            log.debug("dial-back to %s: %s", address, error)
