"""Where a webhook may point: public addresses, and networks that the operator allows. Pure.

Users choose the addresses, and the gateway stands inside the operator's network: without this they could reach what
only it can (SSRF). An address inside an address (IPv4 in IPv6, by mapping or a translator) counts as what it is.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import SplitResult, urlsplit

from config.errors import ConfigError
from gateway.errors import ApiError, invalid

URL_CHARACTERS_MAX = 2048
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
_COMPATIBLE = ipaddress.ip_network("::/96")
_NEVER = tuple(
    map(
        ipaddress.ip_network,
        # what Python's is_global takes for public, or knew differently before: clouds' metadata, relays, benchmarks
        (
            "168.63.129.16/32",
            "192.0.0.0/24",
            "192.88.99.0/24",
            "198.18.0.0/15",
            "2002::/16",
            "2001::/32",
            "fec0::/10",
            "5f00::/16",
        ),
    )
)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Rules:
    """``allowed``: networks that may be reached though they are not public. ``http``: also without TLS."""

    allowed: Sequence[Network] = ()
    http: bool = False

    def is_allowed(self, text: str) -> bool:
        """Whether a webhook may connect to an address."""
        try:
            address = ipaddress.ip_address(text.partition("%")[0])
        except ValueError:
            return False
        inner = _inside(address)
        if any(_is_in(each, network) for each in (address, inner) for network in self.allowed):
            return True
        return _is_public(inner) and (inner == address or isinstance(inner, IPv4Address))


def rules_of(networks: Sequence[str], *, http: bool) -> Rules:
    """From the settings. Raises ConfigError."""
    try:
        return Rules(tuple(ipaddress.ip_network(each) for each in networks), http)
    except ValueError as error:
        hint = "write e.g. 10.1.0.0/16"
        raise ConfigError("config", f"gateway.webhook_allow_networks: {error}", hint) from error


@dataclass(frozen=True, slots=True)
class Target:
    """A webhook's URL, taken apart. ``path`` has the query."""

    secure: bool
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def target_of(url: str, rules: Rules) -> Target:
    """A URL, checked as far as it can be without resolving it. Raises ApiError."""
    if len(url) > URL_CHARACTERS_MAX or not url.isascii() or any(c <= " " or c in '\\"<>`\x7f' for c in url):
        raise invalid("url", f"url is up to {URL_CHARACTERS_MAX} visible ASCII characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise invalid("url", f"url is none: {error}") from error
    if parts.scheme != "https" and not (rules.http and parts.scheme == "http"):
        raise invalid("url", "url begins with https://")
    host = _host(parts)
    if not host or parts.username is not None or parts.password is not None or port == 0:
        raise invalid("url", "url names a host, and neither user nor password")
    target = Target(parts.scheme == "https", host, port or (443 if parts.scheme == "https" else 80), _path(parts))
    if _is_literal(host) and not rules.is_allowed(host):
        raise forbidden(host)
    return target


def forbidden(host: str) -> ApiError:
    """An address that webhooks may not reach."""
    hint = "an operator can allow its network in gateway.webhook_allow_networks"
    return ApiError("invalid_request", f"{host:.80} is not a public address", hint, param="url")


def _host(parts: SplitResult) -> str:
    return (parts.hostname or "").rstrip(".")


def _path(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _inside(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, if it does."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if any(address in network for network in (*_NAT64, _COMPATIBLE)) and int(address) > 0xFFFF:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _is_public(address: Address) -> bool:
    odd = address.is_multicast or address.is_reserved or address.is_unspecified or address.is_loopback
    return address.is_global and not odd and not any(_is_in(address, network) for network in _NEVER)


def _is_in(address: Address, network: Network) -> bool:
    return address.version == network.version and address in network
