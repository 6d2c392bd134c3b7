"""DNS for seeds: dnsaddr names into multiaddrs, host names in multiaddrs into numbers.

Owns: queries, their deadline, the cache. Does not own: what TXT records mean (``core.dnsaddr``).

Invariants:
1. An answer takes at most :data:`DEADLINE_S`; nothing blocks the event loop or the end of the process.
2. Answers are kept as long as their TTL says, within :data:`TTL_S`; failures are not kept. The cache is bounded.
"""

import ipaddress
import logging
import socket
from collections.abc import Sequence

import dns.asyncresolver
import dns.exception
import dns.nameserver
import dns.resolver
import trio

from config.errors import ConfigError, RemoteError
from p2p.core import addresses, dnsaddr

log = logging.getLogger(__name__)

DEADLINE_S = 5.0
TTL_S = (5.0, 3600.0)
CACHE_MAX = 256


class Names:
    """A resolver. ``servers``: ``address`` or ``address:port`` each; none: the system's."""

    def __init__(self, servers: Sequence[str] = ()) -> None:
        self._servers = [_server(text) for text in servers]
        self._cache: dict[tuple[str, str], tuple[float, list[str]]] = {}

    async def expand(self, seed: str) -> list[str]:
        """A dnsaddr's multiaddrs, each with a peer id. Raises RemoteError ``unavailable`` if there are none."""
        expansion = dnsaddr.Expansion(seed)
        problem = "its TXT records name no TCP multiaddr with a peer id"
        with trio.move_on_after(DEADLINE_S) as scope:
            while (ask := expansion.next()) is not None:
                name, wanted, depth = ask
                try:
                    expansion.answered(wanted, depth, await self._query(f"_dnsaddr.{name}", "TXT"))
                except RemoteError as error:
                    problem = error.message
        if not expansion.found:
            reason = f"no answer within {DEADLINE_S:.0f} s" if scope.cancelled_caught else problem
            hint = "dig TXT _dnsaddr.<name> shows what DNS says; p2p.dns_servers asks other servers"
            raise RemoteError("unavailable", f"{seed} cannot be resolved: {reason}", hint)
        return expansion.found

    async def numbers(self, text: str) -> list[str]:
        """A TCP multiaddr with its host name, if it has one, as numbers; without its ``/p2p`` part. Raises RemoteError
        ``unavailable``."""
        address = addresses.parse(text)
        if address is None or address.is_ip or address.relay:
            return [text.partition("/p2p/")[0]]
        families = {"dns4": ("ip4",), "dns6": ("ip6",)}.get(address.kind, ("ip4", "ip6"))
        found: list[str] = []
        problem = f"no answer within {DEADLINE_S:.0f} s"
        with trio.move_on_after(DEADLINE_S):
            for family in families:
                try:
                    hosts = await self._hosts(address.host, family)
                    found += [f"/{family}/{host}/tcp/{address.port}" for host in hosts]
                except RemoteError as error:
                    problem = error.message
        if not found:
            raise RemoteError(
                "unavailable", f"{text} cannot be resolved: {problem}", "check the name, or p2p.dns_servers"
            )
        return found

    async def _hosts(self, host: str, family: str) -> list[str]:
        if self._servers:
            return await self._query(host, "A" if family == "ip4" else "AAAA")
        kind = socket.AF_INET if family == "ip4" else socket.AF_INET6
        try:
            found = await trio.socket.getaddrinfo(host, None, family=kind, type=socket.SOCK_STREAM)
        except OSError as error:
            raise RemoteError("unavailable", f"{host}: {error}") from error
        return [str(place[0]) for *_, place in found]

    async def _query(self, name: str, kind: str) -> list[str]:
        """Records as text. Raises RemoteError ``unavailable``."""
        now = trio.current_time()
        known = self._cache.get((name, kind))
        if known is not None and now < known[0]:
            return known[1]
        try:
            answer = await self._resolver().resolve(name, kind, lifetime=DEADLINE_S, search=False)
        except (dns.exception.DNSException, OSError) as error:
            raise RemoteError("unavailable", f"{name}: {str(error)[:200]}") from error
        if kind == "TXT":
            texts = [b"".join(record.strings).decode("utf-8", "replace") for record in answer]
        else:
            texts = [record.address for record in answer]
        low, high = TTL_S
        self._cache.pop((name, kind), None)
        self._cache[name, kind] = (now + min(high, max(low, answer.rrset.ttl if answer.rrset else low)), texts)
        if len(self._cache) > CACHE_MAX:
            del self._cache[next(iter(self._cache))]
        return texts

    def _resolver(self) -> dns.asyncresolver.Resolver:
        """A fresh one each time: the system's servers may have changed."""
        made = dns.asyncresolver.Resolver(configure=not self._servers)
        if self._servers:
            made.nameservers = [dns.nameserver.Do53Nameserver(host, port) for host, port in self._servers]
        return made


def _server(text: str) -> tuple[str, int]:
    """Address and port of a DNS server. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    try:
        try:
            return str(ipaddress.ip_address(text)), 53
        except ValueError:
            host = host.removeprefix("[").removesuffix("]")
            if not colon or not 0 < int(port) < 65536:
                raise
            return str(ipaddress.ip_address(host)), int(port)
    except ValueError as error:
        hint = "write it like 9.9.9.9 or 127.0.0.1:5353"
        raise ConfigError("config", f"p2p.dns_servers: {text!r} is not the address of a DNS server", hint) from error
