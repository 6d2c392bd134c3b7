"""Where a request comes from and how, also through reverse proxies. Pure."""

import ipaddress
from collections.abc import Collection

from starlette.requests import HTTPConnection
from starlette.types import Scope

_WITH_TLS = {"http": "https", "ws": "wss"}


def client_address(request: HTTPConnection, proxies: Collection[str]) -> str:
    """The client's IP address: the peer's, or the last in ``X-Forwarded-For`` that no believed proxy put its name to.

    What stands further left, anybody may have written.
    """
    address = request.client.host if request.client else ""
    if address not in proxies:  # nearly every request: nothing is looked for in its headers
        return address
    forwarded = ",".join(request.headers.getlist("x-forwarded-for")).split(",")
    while address in proxies and forwarded:
        candidate = _address(forwarded.pop())
        if not candidate:
            break
        address = candidate
    return address


def client_scheme(scope: Scope, proxies: Collection[str]) -> str:
    """The scheme of an ASGI scope as its client spoke it: with TLS if a believed proxy says so, in the last
    ``X-Forwarded-Proto`` that it passed on."""
    scheme: str = scope["scheme"]
    if scheme in _WITH_TLS and scope["client"] and scope["client"][0] in proxies:
        said = [value for name, value in scope["headers"] if name == b"x-forwarded-proto"]
        if said and said[-1].rpartition(b",")[2].strip().lower() in (b"https", b"wss"):
            return _WITH_TLS[scheme]
    return scheme


def neighbourhood(address: str) -> str:
    """What one client can have all of: its address, or the /64 of an IPv6 address."""
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return address
    if known.version == 4 or known.ipv4_mapped:
        return str(known)
    return str(ipaddress.ip_network((known, 64), strict=False))


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text.strip().strip("[]")))
    except ValueError:
        return ""
