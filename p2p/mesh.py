"""Who this node dials by itself: seeds, peers met before or found on the LAN, and peers in the directory.

Invariants:
1. A dead seed is warned about once, tried again with backoff and jitter forever, and never stops anything. Names in
   seeds are resolved anew for every try (as far as the cache's TTL lets).
2. Of two nodes that learn of each other at the same time the smaller peer id dials at once, the other a moment later.
3. It dials until three quarters of ``peers_max`` are linked: the rest is for those who come. Of many known peers it
   takes those in networks where it has few (``core.diversity``).
"""

import logging
import random
from collections.abc import Callable, Mapping, Sequence

import trio

from config.errors import ConfigError, IntegrityError, RiosError
from config.vocabulary import PeerId
from p2p.core import dnsaddr
from p2p.core.advert import Advert
from p2p.core.diversity import choose
from p2p.core.identity import public_key_of
from p2p.core.reach import PRIVATE, RELAYED
from p2p.directory import PeerDirectory, direct
from p2p.host import Host, parse_address
from p2p.links import Links
from p2p.names import Names
from p2p.peerbook import Peerbook

log = logging.getLogger(__name__)

SEED_RETRY_S = (1.0, 60.0)
ALONE_RETRY_S = 8.0
"""At most, while no peer at all is linked: then it may be this node's own line."""
PEER_RETRY_S = (2.0, 120.0)
DIALS_MAX = 8
TRY_S = 20.0
SECOND_DIAL_S = 0.7
SAVE_SECONDS = 30.0
NAME_REFRESH_S = 600.0
BOOK_PAUSE_S = (2.0, 60.0)
CONSIDERED_MAX = 256
TRIES_MAX = 20_000


def parse_seed(text: str) -> tuple[PeerId, str]:
    """Peer id and address of a seed multiaddr. Raises ConfigError."""
    address, _, peer = text.strip().partition("/p2p/")
    try:
        public_key_of(peer)
    except IntegrityError:
        peer = ""
    if not peer or parse_address(address) is None:
        hint = "write it like /ip4/203.0.113.7/tcp/4701/p2p/12D3KooW... or /dnsaddr/example.org"
        raise ConfigError("config", f"the seed {text.strip()!r} is not a TCP multiaddr with a peer id", hint)
    return PeerId(peer), address


def by_peer(seeds: Sequence[str]) -> dict[PeerId, list[str]]:
    """Seed addresses by peer; dnsaddr seeds are left out. Raises ConfigError."""
    found: dict[PeerId, list[str]] = {}
    for seed in seeds:
        if dnsaddr.parse(seed) is None:
            peer_id, address = parse_seed(seed)
            found.setdefault(peer_id, []).append(address)
    return found


def usable(named: Sequence[str]) -> tuple[dict[PeerId, list[str]], list[ConfigError]]:
    """What DNS names, by peer, and what is wrong with the rest: one odd record costs only itself."""
    found: dict[PeerId, list[str]] = {}
    problems = []
    for text in named:
        try:
            peer_id, address = parse_seed(text)
            found.setdefault(peer_id, []).append(address)
        except ConfigError as error:
            problems.append(error)
    return found, problems


class Mesh:
    """Keeps this node connected."""

    def __init__(
        self,
        host: Host,
        links: Links,
        directory: PeerDirectory,
        book: Peerbook,
        seeds: Sequence[str],
        names: Names,
        *,
        peers_max: int,
        unwanted: Callable[[PeerId], bool],
    ) -> None:
        """``seeds``: multiaddrs with a peer id, and dnsaddrs."""
        self._host = host
        self._links = links
        self._directory = directory
        self._book = book
        self._names = names
        self._unwanted = unwanted
        self._own = host.identity.peer_id
        self._seeds = {peer: addresses for peer, addresses in by_peer(seeds).items() if peer != self._own}
        self._named = [seed for seed in seeds if dnsaddr.parse(seed) is not None]
        self._dialled_max = max(1, peers_max * 3 // 4)
        self._next_try: dict[PeerId, tuple[float, float]] = {}
        self._dialling = trio.CapacityLimiter(DIALS_MAX)
        self._nursery: trio.Nursery | None = None
        for peer_id, met in book.peers().items():
            host.learn(peer_id, direct(met.addresses))
        for peer_id, addresses in self._seeds.items():
            host.learn(peer_id, direct(addresses))

    async def run(self) -> None:
        """Everything, forever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for peer_id in self._seeds:
                nursery.start_soon(self._keep_seed, peer_id)
            for seed in self._named:
                nursery.start_soon(self._keep_name, seed)
            nursery.start_soon(self._try_book, nursery)
            nursery.start_soon(self._save_book)
            while True:
                self._dial_known(nursery)
                with trio.move_on_after(2):
                    await self._directory.wait_change()
                # a large view is gone through less often
                await trio.sleep(0.05 + len(self._directory.view) / 10_000)

    async def _try_book(self, nursery: trio.Nursery) -> None:
        """Dial peers met before, the most recent first, a few at a time until one is linked; then again and again, as
        long as this node is alone."""
        pause_s = BOOK_PAUSE_S[0]
        while True:
            peers = [peer for peer in self._book.peers() if peer not in self._seeds and peer != self._own]
            for at in range(0, len(peers), DIALS_MAX):
                for peer_id in peers[at : at + DIALS_MAX]:
                    nursery.start_soon(self._try, peer_id)
                await trio.sleep(BOOK_PAUSE_S[0] * random.uniform(0.8, 1.2))
                if self._links.peers():
                    break
            while self._links.peers():
                pause_s = BOOK_PAUSE_S[0]
                await trio.sleep(BOOK_PAUSE_S[1])
            await trio.sleep(pause_s * random.uniform(0.8, 1.2))
            pause_s = min(2 * pause_s, BOOK_PAUSE_S[1])

    # -- seeds

    async def _keep_seed(self, peer_id: PeerId) -> None:
        """Stay linked to a seed, until DNS does not name it any more."""
        wait_s, warned = SEED_RETRY_S[0], False
        while peer_id in self._seeds:
            if self._links.ready(peer_id) is None and not self._links.full:
                try:
                    await self._dial_seed(peer_id)
                    if warned:
                        log.info("seed %s is back", peer_id)
                    wait_s, warned = SEED_RETRY_S[0], False
                except RiosError as error:
                    if not warned:
                        log.warning("going on without a seed: %s", error.message)
                        warned = True
                    wait_s = min(wait_s * 2, SEED_RETRY_S[1] if self._links.peers() else ALONE_RETRY_S)
            await trio.sleep((wait_s if self._links.ready(peer_id) is None else 5.0) * random.uniform(0.7, 1.3))

    async def _dial_seed(self, peer_id: PeerId) -> None:
        if peer_id not in self._directory.view:
            addresses: list[str] = []
            problem: RiosError | None = None
            for address in self._seeds[peer_id]:
                try:
                    addresses += await self._names.numbers(address)
                except RiosError as error:
                    problem = error
            if problem is not None and not addresses:
                raise problem
            self._host.learn(peer_id, addresses)
        await self._links.get(peer_id)

    async def _keep_name(self, seed: str) -> None:
        """Follow a dnsaddr: the seeds it names are kept, those it names no more are let go."""
        wait_s, warned, odd = SEED_RETRY_S[0], False, 0
        mine: set[PeerId] = set()
        while True:
            try:
                found, problems = usable(await self._names.expand(seed))
                self._follow(found, mine)
                if len(problems) > odd:
                    log.warning("%s names %d unusable seeds, the first: %s", seed, len(problems), problems[0].message)
                warned, odd = False, len(problems)
            except RiosError as error:
                if not warned:
                    log.warning("seed %s; going on without it", error.message)
                    warned = True
            linked = any(self._links.ready(peer_id) is not None for peer_id in mine)
            wait_s = NAME_REFRESH_S if linked else min(wait_s * 2, SEED_RETRY_S[1])
            await trio.sleep(wait_s * random.uniform(0.7, 1.3))
            wait_s = SEED_RETRY_S[0] if linked else wait_s

    def _follow(self, named: Mapping[PeerId, list[str]], mine: set[PeerId]) -> None:
        assert self._nursery is not None
        for peer_id in mine - named.keys():
            mine.discard(peer_id)
            self._seeds.pop(peer_id, None)
        for peer_id, addresses in named.items():
            if peer_id in mine:
                self._seeds[peer_id] = addresses
            elif peer_id != self._own and peer_id not in self._seeds:
                mine.add(peer_id)
                self._seeds[peer_id] = addresses
                self._nursery.start_soon(self._keep_seed, peer_id)

    def found(self, peer_id: PeerId, addresses: Sequence[str]) -> None:
        """A peer was found on the LAN: dial it soon, unless it is linked or was tried a moment ago."""
        now = trio.current_time()
        due, wait_s = self._next_try.get(peer_id, (now, PEER_RETRY_S[0]))
        if self._nursery is None or peer_id == self._own or self._links.ready(peer_id) is not None or self._is_enough():
            return
        if due <= now and self._dialling.available_tokens > 0:
            self._plan_next(peer_id, now, wait_s)
            self._host.learn(peer_id, direct(addresses))
            self._nursery.start_soon(self._try, peer_id)

    # -- known peers

    def _is_enough(self) -> bool:
        return len(self._links.peers()) >= self._dialled_max

    def _plan_next(self, peer_id: PeerId, now: float, wait_s: float) -> None:
        self._next_try[peer_id] = (now + wait_s * random.uniform(0.7, 1.3), min(wait_s * 2, PEER_RETRY_S[1]))
        while len(self._next_try) > TRIES_MAX:
            del self._next_try[next(iter(self._next_try))]

    def _dial_known(self, nursery: trio.Nursery) -> None:
        """Start dials to peers in the directory that have no link."""
        free = int(self._dialling.available_tokens)
        if free <= 0 or self._is_enough():
            return
        now = trio.current_time()
        adverts = self._directory.adverts()
        due = {peer_id: adverts[peer_id] for peer_id in adverts if self._is_due(peer_id, adverts[peer_id], now)}
        if len(due) > free:
            due = {peer_id: due[peer_id] for peer_id in random.sample(list(due), min(len(due), CONSIDERED_MAX))}
        linked = [adverts[peer_id] for peer_id in self._links.peers() if peer_id in adverts]
        for peer_id in choose(due, linked, free, random.random):
            self._plan_next(peer_id, now, self._next_try.get(peer_id, (0.0, PEER_RETRY_S[0]))[1])
            nursery.start_soon(self._try, peer_id)

    def _is_due(self, peer_id: PeerId, advert: Advert, now: float) -> bool:
        """Whether a peer should be dialled now. The larger peer id waits a moment for the other's dial."""
        if peer_id == self._own or self._links.ready(peer_id) is not None or not advert.addresses:
            return False
        if advert.reach in (RELAYED, PRIVATE) and not self._host.known_addresses(peer_id):
            return False  # it dials us if it can; else a call goes through its relays
        if self._unwanted(peer_id):
            return False
        planned = self._next_try.get(peer_id)
        if planned is None and self._own > peer_id:
            self._next_try[peer_id] = (now + SECOND_DIAL_S, PEER_RETRY_S[0])
            return False
        return planned is None or planned[0] <= now

    async def _try(self, peer_id: PeerId) -> None:
        async with self._dialling:
            try:
                if not self._is_enough():
                    with trio.move_on_after(TRY_S):  # the dial goes on, but keeps no other one waiting
                        await self._links.get(peer_id)
            except RiosError as error:
                log.debug("dialling %s: %s", peer_id, error)

    def link_up(self, peer_id: PeerId) -> None:
        """A peer was reached: remember it, and try it at once when it is lost."""
        self._next_try.pop(peer_id, None)
        self._remember(peer_id)

    def _remember(self, peer_id: PeerId) -> None:
        advert = self._directory.view.get(peer_id)
        if advert is not None:
            self._book.met(peer_id, advert.addresses, advert.lane)

    async def _save_book(self) -> None:
        while True:
            await trio.sleep(SAVE_SECONDS)
            self.remember()
            await trio.to_thread.run_sync(self._book.save)

    def remember(self) -> None:
        """Put every linked peer's addresses into the book."""
        for peer_id in self._links.peers():
            self._remember(peer_id)
