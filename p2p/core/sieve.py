"""Who is not even listened to: sources that go on connecting although they are refused. Pure: time comes in.

Refusing a connection costs its listener as much as making one costs a flooder. A source that is refused more than
:data:`REFUSED_PER_SECOND` is *shunned*: for a while the kernel drops what begins a connection from there
(:func:`program`, a classic BPF program for a listening socket), which costs this node nothing and keeps the flooder
waiting for its own retransmissions. What is connected stays connected. A neighbour behind the same address comes in
when its kernel tries again.

Invariants: at most :data:`SHUNNED_MAX` are shunned at once, each for :data:`SHUN_SECONDS`, twice as long each time up
to :data:`SHUN_SECONDS_MAX`, until it has behaved for :data:`FORGIVEN_SECONDS`; memory is bounded by
:data:`KNOWN_MAX`.
"""

from collections import OrderedDict
from collections.abc import Iterable
from ipaddress import IPv4Address, ip_address
from struct import Struct

from p2p.core.buckets import Bucket
from p2p.core.places import place_of

REFUSED_PER_SECOND, REFUSED_BURST = 10.0, 50.0
SHUN_SECONDS, SHUN_SECONDS_MAX = 1.0, 4.0
FORGIVEN_SECONDS = 30.0
SHUNNED_MAX = 64
KNOWN_MAX = 1024

INSTRUCTION = Struct("=HBBI")
_LOAD, _EQUAL, _JUMP, _SHIFT, _RETURN = 0x20, 0x15, 0x05, 0x74, 0x06
_KEEP, _RECALL = 0x02, 0x60
"""Into a cell of the program's memory, and back."""
_NETWORK = 0x100000000 - 0x100000
"""Offsets from here on are into the IP header (linux/filter.h: ``SKF_NET_OFF``)."""
_SOURCE_V4, _SOURCE_V6 = 12, 8


class _Known:
    __slots__ = ("bucket", "seconds", "until")

    def __init__(self) -> None:
        self.bucket = Bucket(REFUSED_PER_SECOND, REFUSED_BURST)
        self.seconds = SHUN_SECONDS
        self.until = float("-inf")


class Shunned:
    """The sources of one listener."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._out: dict[str, float] = {}

    def refuse(self, host: str, now: float) -> bool:
        """A connection from this IP address was refused; whether that changed who is shunned."""
        host = place_of(host).address
        known = self._known.pop(host, None) or _Known()
        self._known[host] = known
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
        if known.bucket.take(1, now) or now < known.until or len(self._out) >= SHUNNED_MAX:
            return False
        if now - known.until > FORGIVEN_SECONDS:
            known.seconds = SHUN_SECONDS
        known.until = self._out[host] = now + known.seconds
        known.seconds = min(2 * known.seconds, SHUN_SECONDS_MAX)
        return True

    def out(self, now: float) -> tuple[str, ...]:
        """Who is shunned now: places (``core/places``)."""
        self._out = {host: until for host, until in self._out.items() if until > now}
        return tuple(self._out)

    def next_end(self) -> float:
        """When the first of them is listened to again; infinite if there is none."""
        return min(self._out.values(), default=float("inf"))


def program(hosts: Iterable[str]) -> bytes:
    """Instructions that drop packets of these IP addresses and let all others pass; IPv6 by /64, as limits count it.

    Kept small: a kernel gives a socket 20 KB for its filters (``net.core.optmem_max`` before Linux 6.9), which the old
    one counts towards while it is replaced, and it makes some eight instructions of each look into a packet.
    """
    v4: set[int] = set()
    v6: set[int] = set()
    for host in hosts:
        address = ip_address(place_of(host).address.partition("/")[0])
        if isinstance(address, IPv4Address):
            v4.add(int(address))
        else:
            v6.add(int(address) >> 64)
    four = [_say(_LOAD, _NETWORK + _SOURCE_V4)]
    for number in sorted(v4):
        four += [_say(_EQUAL, number, 0, 1), _DROP]
    six = [_say(_LOAD, _NETWORK + _SOURCE_V6), _say(_KEEP, 0), _say(_LOAD, _NETWORK + _SOURCE_V6 + 4), _say(_KEEP, 1)]
    for number in sorted(v6):
        six += [_say(_RECALL, 0), _say(_EQUAL, number >> 32, 0, 3)]
        six += [_say(_RECALL, 1), _say(_EQUAL, number & 0xFFFFFFFF, 0, 1), _DROP]
    # the IP header's first four bits are its version
    version = [_say(_LOAD, _NETWORK), _say(_SHIFT, 28), _say(_EQUAL, 4, 1, 0), _say(_JUMP, len(four) + 1)]
    return b"".join([*version, *four, _PASS, *six, _PASS])


def _say(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return INSTRUCTION.pack(code, if_true, if_false, operand)


_DROP, _PASS = _say(_RETURN, 0), _say(_RETURN, 0xFFFFFFFF)
