"""What the operating system says of addresses: this machine's own, its networks, the other end of a socket."""

import socket
from collections.abc import Sequence

import psutil
import trio


def own_networks() -> tuple[str, ...]:
    """The IPv4 networks of this machine's interfaces, as ``address/netmask``."""
    return tuple(
        f"{each.address}/{each.netmask}"
        for every in psutil.net_if_addrs().values()
        for each in every
        if each.family == socket.AF_INET and each.netmask
    )


def filled_in(addresses: Sequence[str]) -> tuple[str, ...]:
    """Listen addresses with every interface filled in for 0.0.0.0 (loopback only if there is nothing else)."""
    found: list[str] = []
    for address in addresses:
        if not address.startswith(("/ip4/0.0.0.0/", "/ip6/::/")):
            found.append(address)
            continue
        _, family, _, rest = address.split("/", 3)
        kind = socket.AF_INET if family == "ip4" else socket.AF_INET6
        names = [a.address for every in psutil.net_if_addrs().values() for a in every if a.family == kind]
        outer = [name for name in names if not name.startswith(("127.", "::1", "fe80"))] or names
        found += [f"/{family}/{name}/{rest}" for name in outer]
    return tuple(dict.fromkeys(found))


def peer_host(connected: trio.socket.SocketType) -> str:
    """The IP address a socket is connected to, an IPv4 one as such; empty if it is not any more."""
    try:
        return str(connected.getpeername()[0]).removeprefix("::ffff:")
    except (OSError, trio.ClosedResourceError):
        return ""
