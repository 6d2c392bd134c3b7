"""Who this node dials by itself: seeds, peers met before, and everybody in the directory, up to a limit.

Invariants:
1. A dead seed is warned about once, tried again with backoff and jitter forever, and never stops anything.
2. Of two nodes that learn of each other at the same time the smaller peer id dials at once, the other a moment later.
"""

import logging
import random
from collections.abc import Mapping, Sequence

import trio

from config.errors import ConfigError, IntegrityError, RiosError
from config.vocabulary import PeerId
from p2p.core.identity import public_key_of
from p2p.core.reach import PRIVATE, RELAYED
from p2p.directory import PeerDirectory
from p2p.host import Host, parse_address
from p2p.links import Links
from p2p.peerbook import Peerbook

log = logging.getLogger(__name__)

SEED_RETRY_S = (1.0, 60.0)
ALONE_RETRY_S = 8.0
"""At most, while no peer at all is linked: then it may be this node's own line."""
PEER_RETRY_S = (2.0, 120.0)
DIALS_MAX = 8
SECOND_DIAL_S = 0.7
SAVE_SECONDS = 30.0


def parse_seed(text: str) -> tuple[PeerId, str]:
    """Peer id and address of a seed multiaddr. Raises ConfigError."""
    address, _, peer = text.strip().partition("/p2p/")
    try:
        public_key_of(peer)
    except IntegrityError:
        peer = ""
    if not peer or parse_address(address) is None:
        hint = "write it like /ip4/203.0.113.7/tcp/4701/p2p/12D3KooW..."
        raise ConfigError("config", f"the seed {text.strip()!r} is not a TCP multiaddr with a peer id", hint)
    return PeerId(peer), address


def by_peer(seeds: Sequence[str]) -> dict[PeerId, list[str]]:
    """Seed addresses by peer. Raises ConfigError."""
    found: dict[PeerId, list[str]] = {}
    for seed in seeds:
        peer_id, address = parse_seed(seed)
        found.setdefault(peer_id, []).append(address)
    return found


class Mesh:
    """Keeps this node connected."""

    def __init__(
        self, host: Host, links: Links, directory: PeerDirectory, book: Peerbook, seeds: Mapping[PeerId, Sequence[str]]
    ) -> None:
        self._host = host
        self._links = links
        self._directory = directory
        self._book = book
        self._own = host.identity.peer_id
        self._seeds = {peer: list(addresses) for peer, addresses in seeds.items() if peer != self._own}
        self._next_try: dict[PeerId, tuple[float, float]] = {}
        self._dialling = trio.CapacityLimiter(DIALS_MAX)
        for peer_id, addresses in {**book.peers(), **self._seeds}.items():
            host.learn(peer_id, addresses)

    async def run(self) -> None:
        """Everything, forever."""
        async with trio.open_nursery() as nursery:
            for peer_id in self._seeds:
                nursery.start_soon(self._keep_seed, peer_id)
            for peer_id in list(self._book.peers())[:DIALS_MAX]:
                if peer_id not in self._seeds and peer_id != self._own:
                    nursery.start_soon(self._try, peer_id)
            nursery.start_soon(self._save_book)
            while True:
                self._dial_known(nursery)
                with trio.move_on_after(2):
                    await self._directory.wait_change()
                await trio.sleep(0.05)

    async def _keep_seed(self, peer_id: PeerId) -> None:
        wait_s, warned = SEED_RETRY_S[0], False
        while True:
            if self._links.ready(peer_id) is None and not self._links.full:
                try:
                    if peer_id not in self._directory.adverts():
                        self._host.learn(peer_id, self._seeds[peer_id])
                    await self._links.get(peer_id)
                    wait_s, warned = SEED_RETRY_S[0], False
                except RiosError as error:
                    if not warned:
                        log.warning("seed %s does not answer; going on without it: %s", peer_id, error.message)
                        warned = True
                    wait_s = min(wait_s * 2, SEED_RETRY_S[1] if self._links.peers() else ALONE_RETRY_S)
            await trio.sleep((wait_s if self._links.ready(peer_id) is None else 5.0) * random.uniform(0.7, 1.3))

    def _dial_known(self, nursery: trio.Nursery) -> None:
        """Start dials to peers in the directory that have no link."""
        now = trio.current_time()
        for peer_id, advert in self._directory.adverts().items():
            if peer_id == self._own or self._links.ready(peer_id) is not None or not advert.addresses:
                continue
            if advert.reach in (RELAYED, PRIVATE) and not self._host.known_addresses(peer_id):
                continue  # it dials us if it can; else a call goes through its relays
            if self._links.full or self._dialling.available_tokens <= 0:
                return
            due, wait_s = self._next_try.get(peer_id, (-1.0, PEER_RETRY_S[0]))
            if due < 0 and self._own > peer_id:
                self._next_try[peer_id] = (now + SECOND_DIAL_S, wait_s)
            elif due <= now:
                self._next_try[peer_id] = (now + wait_s * random.uniform(0.7, 1.3), min(wait_s * 2, PEER_RETRY_S[1]))
                nursery.start_soon(self._try, peer_id)

    async def _try(self, peer_id: PeerId) -> None:
        async with self._dialling:
            try:
                await self._links.get(peer_id)
            except RiosError as error:
                log.debug("dialling %s: %s", peer_id, error)

    def link_up(self, peer_id: PeerId) -> None:
        """A peer was reached: remember it, and try it at once when it is lost."""
        self._next_try.pop(peer_id, None)
        advert = self._directory.adverts().get(peer_id)
        if advert is not None:
            self._book.met(peer_id, advert.addresses)

    async def _save_book(self) -> None:
        while True:
            await trio.sleep(SAVE_SECONDS)
            self.remember()
            await trio.to_thread.run_sync(self._book.save)

    def remember(self) -> None:
        """Put every linked peer's addresses into the book."""
        adverts = self._directory.adverts()
        for peer_id in self._links.peers():
            if peer_id in adverts:
                self._book.met(peer_id, adverts[peer_id].addresses)
