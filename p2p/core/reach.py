"""Whether others can dial this node: what peers found out goes in, a settled state and its explanation come out.

Owns: which addresses are worth a try, which a helper may dial for somebody else, when an opinion changes. Does not own:
asking, dialling, time.

A *round* is one question to a few peers: each says from which address our connection comes to it (observed), and which
of the candidates with that very IP address it could dial. Whether a dial led here, this node knows itself: the dialler
shows a secret of this round.

Invariants:
1. Peers on the same site (private or loopback addresses) are heard only if nobody further away was asked.
2. A settled state changes after :data:`DOUBTS` contradicting rounds in a row, not after one.
3. Nobody alone talks this node into a foreign address: one that is not its own interface's counts if most of those
   asked see this node come from its host.
4. A helper dials only the IP address from which the question came, so nobody can point it at somebody else.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface, ip_network

from config.vocabulary import PeerId
from p2p.core import addresses

PUBLIC, RELAYED, PRIVATE, UNKNOWN = "public", "relayed", "private", ""

CIRCUIT = "/p2p-circuit"
DOUBTS = 2
CANDIDATES_MAX = 8
SOON_S, SETTLED_S = 10.0, 600.0
"""Between rounds while in doubt, and once settled."""

_SITES_V4 = (
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "169.254.0.0/16",
    "127.0.0.0/8",
    "0.0.0.0/8",
)
_SITES = tuple(ip_network(text) for text in (*_SITES_V4, "fc00::/7", "fe80::/10", "::/127"))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one peer found: ``observed`` is the host it sees us come from, ``reached`` what led here."""

    peer_id: PeerId
    observed: str
    reached: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class State:
    """``addresses`` are proven: somebody dialled them; ``asked`` peers, ``doubts`` contradicting rounds in a row."""

    reach: str = UNKNOWN
    addresses: tuple[str, ...] = ()
    observed: str = ""
    asked: int = 0
    doubts: int = 0


def is_ip(host: str) -> bool:
    """Whether this is an IP address, one without a zone; a peer may say anything."""
    return "%" not in host and _ip(host) is not None


def _ip(host: str) -> IPv4Address | IPv6Address | None:
    """The address; an IPv4 one that is written as IPv6 leads where the IPv4 one does."""
    try:
        found = ip_address(host)
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return mapped or found


def is_site(host: str) -> bool:
    """Whether an IP address means something on its own site only (private, shared, link-local or loopback)."""
    found = _ip(host)
    return found is not None and any(found in network for network in _SITES)


def is_loopback(host: str) -> bool:
    """Whether an address never leaves this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def multiaddr(host: str, port: int) -> str:
    """The TCP multiaddr of an IP address and a port."""
    return f"/ip{ip_address(host).version}/{host}/tcp/{port}"


def candidates(listening: Iterable[str], observed: Iterable[str], port: int, mapped_port: int) -> tuple[str, ...]:
    """Addresses worth a try: where this node listens, and its port (or the one a router maps to it) wherever peers see
    it come from."""
    found = [address.partition("/p2p/")[0] for address in listening]
    for host in filter(is_ip, observed):
        found += [multiaddr(host, each) for each in (mapped_port, port) if each]
    return tuple(dict.fromkeys(found))[:CANDIDATES_MAX]


def allowed(wanted: Sequence[str], observed: str) -> tuple[str, ...]:
    """Those of the addresses that a helper may dial for a peer that it sees come from ``observed``."""
    if not observed:
        return ()
    found = []
    for text in wanted[:CANDIDATES_MAX]:
        parsed = addresses.parse(text) if isinstance(text, str) else None
        if parsed is not None and parsed.is_ip and not parsed.relay and _same(parsed.host, observed):
            found.append(text.partition("/p2p/")[0])
    return tuple(dict.fromkeys(found))


def _same(host: str, observed: str) -> bool:
    try:
        return ip_address(host) == ip_address(observed)
    except ValueError:
        return False


def settle(state: State, verdicts: Sequence[Verdict], listening: Sequence[str] = ()) -> State:
    """The state after one round; ``listening`` are the addresses of this node's own interfaces."""
    far = [verdict for verdict in verdicts if not is_site(verdict.observed)] or list(verdicts)
    if not far:
        return state
    observed = Counter(verdict.observed for verdict in far).most_common(1)[0][0]
    believed = [_believed(verdict, observed, listening) for verdict in verdicts]
    reached = tuple(dict.fromkeys(address for some in believed for address in some))
    agree = sum(1 for verdict, some in zip(verdicts, believed, strict=True) if some and verdict in far)
    found = PUBLIC if 2 * agree >= len(far) else PRIVATE
    if state.reach not in (UNKNOWN, found) and state.doubts + 1 < DOUBTS:
        return State(state.reach, state.addresses, observed, len(far), state.doubts + 1)
    return State(found, reached, observed, len(far), 0)


def _believed(verdict: Verdict, observed: str, listening: Sequence[str]) -> tuple[str, ...]:
    return tuple(a for a in verdict.reached if a in listening or host_of(a) == observed)


def next_round_s(state: State) -> float:
    """How long until the next round."""
    return SOON_S if state.doubts or state.reach == UNKNOWN else SETTLED_S


def explain(state: State, *, relays: Sequence[str], port: int, host: str, loopback: bool) -> tuple[str, str, str]:
    """What this node is, why, and what to do about it (empty if nothing); ``host`` is this machine's own address."""
    if loopback:
        return "local", "it listens on loopback: only nodes on this machine can dial it", ""
    if state.reach == PUBLIC:
        return PUBLIC, f"peers dialled {', '.join(state.addresses)}", ""
    if state.reach == UNKNOWN:
        return "unknown", "no peer has been asked yet: none is linked", "give it a living seed (p2p.seeds)"
    seen = f", which see it as {state.observed}" if state.observed else ""
    why = f"{state.asked} peer{'s' if state.asked > 1 else ''}{seen} could not dial it: a router or firewall is between"
    fix = f"forward TCP port {port} to {host} in the router (or open it in the firewall), or enable UPnP there"
    if relays:
        return RELAYED, f"{why}; others reach it through {len(relays)} relay{'s' if len(relays) > 1 else ''}", fix
    return PRIVATE, f"{why}; no public peer passes connections on to it", fix


def advertised(state: State, listening: Sequence[str], relayed: Sequence[str]) -> tuple[str, ...]:
    """The addresses to tell others: those that work, as far as is known.

    Unknown: where this node listens. Public: the proven ones, and those that mean the same everywhere. Otherwise the
    proven ones (dialled by peers on the same site) and the ways through relays.
    """
    if state.reach == UNKNOWN:
        return tuple(listening)
    found = list(state.addresses)
    if state.reach == PUBLIC:
        site = all(is_site(host_of(address)) for address in state.addresses)
        found += [address for address in listening if site or not is_site(host_of(address))]
    return tuple(dict.fromkeys((*found, *relayed)))


def host_of(address: str) -> str:
    """The host in a TCP multiaddr, empty if it is none."""
    parsed = addresses.parse(address)
    return parsed.host if parsed else ""


def worth_dialling(advertised: Sequence[str], word: str, networks: Callable[[], Sequence[str]]) -> tuple[str, ...]:
    """The addresses of a peer to dial directly: none that it cannot be reached at, as far as it knows, unless it stands
    on one of these networks (``address/netmask`` each)."""
    direct = tuple(address for address in advertised if CIRCUIT not in address)
    if not direct or word in (UNKNOWN, PUBLIC):
        return direct
    here = networks()
    return tuple(address for address in direct if _beside(host_of(address), here))


def _beside(host: str, networks: Sequence[str]) -> bool:
    try:
        return any(ip_address(host) in ip_interface(network).network for network in networks)
    except ValueError:
        return False
