"""Where a connection comes from, as far as limits care: its address and the subnet around it.

Identities are free, addresses are not: what one household or one rented server can have many of must count as one.

Invariants: an IPv4 address that comes as IPv6 (``::ffff:a.b.c.d``) is the IPv4 one; what is not an IP address is a
place of its own name.
"""

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

ADDRESS_BITS_V6 = 64
"""Whoever has one IPv6 address has 2^64 of them."""
SUBNET_BITS_V4 = 24
SUBNET_BITS_V6 = 56
"""What one household gets of its provider (RFC 6177)."""


class Place(NamedTuple):
    """An address and a subnet as keys; ``loopback`` tells this very machine."""

    address: str
    subnet: str
    loopback: bool


@lru_cache(maxsize=4096)
def place_of(host: str) -> Place:
    """The place of a peer's IP address as ``getpeername`` gives it."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return Place(host[:64], host[:64], False)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if isinstance(address, IPv4Address):
        return Place(str(address), _network(int(address), 32, SUBNET_BITS_V4), address.is_loopback)
    number = int(address)
    return Place(
        _network(number, 128, ADDRESS_BITS_V6), _network(number, 128, SUBNET_BITS_V6), bool(address.is_loopback)
    )


def _network(number: int, bits: int, kept: int) -> str:
    first = number >> (bits - kept) << (bits - kept)
    return f"{IPv4Address(first) if bits == 32 else IPv6Address(first)}/{kept}"


def subject_of(text: str) -> str | None:
    """How an operator names a place (an IP address or a subnet of the sizes above) as a key; None if it is none."""
    host, _, bits = text.strip().partition("/")
    try:
        address = ip_address(host)
    except ValueError:
        return None
    place = place_of(str(address))
    if not bits:
        return place.address
    for key in (place.address, place.subnet):
        if key.endswith(f"/{bits}"):
            return key
    return None
