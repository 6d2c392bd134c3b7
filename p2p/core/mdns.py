"""mDNS messages after https://github.com/libp2p/specs/blob/master/discovery/mdns.md: who is on this LAN, without seeds.

A query asks for PTR records of the service name; an answer points to ``<random label>.<service name>``, whose TXT
records carry ``dnsaddr=<multiaddr with /p2p/...>``. Owns: messages as bytes. Does not own: sockets, timing.

A private swarm asks for a service name made from its key, and its addresses travel sealed (``sealed=<base64>``): who
listens on the LAN without the key learns neither peer ids nor swarm, only that somebody asks.

Invariants:
1. Reading never raises: what is no mDNS message of ours says nothing.
2. Only TCP addresses with a peer id on private networks come out, at most :data:`FOUND_MAX` of a message: nobody on the
   LAN makes a node dial the world.
"""

import binascii
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from ipaddress import ip_address

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rdataclass
import dns.rdatatype
import dns.rrset
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from p2p.core import addresses

PUBLIC_SERVICE = "_p2p._udp.local"
MESSAGE_BYTES_MAX = 1400
FOUND_MAX = 16
TTL_S = 120
NONCE_BYTES = 12


class Service:
    """The service name of a swarm, and how addresses are written under it."""

    def __init__(self, swarm_key: bytes | None = None) -> None:
        self._seal: ChaCha20Poly1305 | None = None
        self.name = PUBLIC_SERVICE
        if swarm_key is not None:
            self.name = f"_p2p-{_derived(swarm_key, b'rios mdns name').hex()[:40]}._udp.local"
            self._seal = ChaCha20Poly1305(_derived(swarm_key, b"rios mdns seal"))
        self._name = dns.name.from_text(self.name)

    def query(self) -> bytes:
        """Ask who is there."""
        message = dns.message.make_query(self._name, "PTR", flags=0)
        message.id = 0
        return message.to_wire()

    def is_query(self, data: bytes) -> bool:
        """Whether somebody asks for this service."""
        message = _read(data)
        if message is None or message.flags & dns.flags.QR:
            return False
        return any(
            q.name == self._name and q.rdtype in (dns.rdatatype.PTR, dns.rdatatype.ANY) for q in message.question
        )

    def answer(self, label: str, listed: Sequence[str], nonces: Iterator[bytes]) -> bytes:
        """Say where this node is. ``label``: random, the same for the life of the process; ``listed``: multiaddrs with
        a peer id; as many as fit are told."""
        texts: list[str] = []
        for text in listed:
            written = self._written(text, nonces)
            if len(self._message(label, [*texts, written]).to_wire(max_size=65535)) > MESSAGE_BYTES_MAX:
                break
            texts.append(written)
        return self._message(label, texts).to_wire(max_size=65535)

    def _message(self, label: str, texts: Sequence[str]) -> dns.message.Message:
        own = dns.name.Name((label.encode(), *self._name.labels))
        message = dns.message.Message(id=0)
        message.flags = dns.flags.QR | dns.flags.AA
        message.answer.append(dns.rrset.from_text(self._name, TTL_S, "IN", "PTR", own.to_text()))
        if texts:
            message.additional.append(dns.rrset.from_text(own, TTL_S, "IN", "TXT", *(f'"{text}"' for text in texts)))
        return message

    def _written(self, text: str, nonces: Iterator[bytes]) -> str:
        if self._seal is None:
            return f"dnsaddr={text}"
        nonce = next(nonces)
        return "sealed=" + b64encode(nonce + self._seal.encrypt(nonce, text.encode(), None)).decode()

    def found(self, data: bytes) -> list[str]:
        """The multiaddrs in somebody's answer."""
        message = _read(data)
        if message is None or not message.flags & dns.flags.QR:
            return []
        found: list[str] = []
        for rrset in (*message.answer, *message.additional):
            if rrset.rdtype == dns.rdatatype.TXT and rrset.name.is_subdomain(self._name):
                for record in rrset:
                    # one string per record by the spec; some implementations put several into one
                    found += [text for raw in record.strings if (text := self._opened(raw)) and _is_near(text)]
        return list(dict.fromkeys(found))[:FOUND_MAX]

    def _opened(self, raw: bytes) -> str:
        key, _, value = raw.partition(b"=")
        try:
            if key == b"dnsaddr" and self._seal is None:
                return value.decode()
            if key == b"sealed" and self._seal is not None:
                sealed = b64decode(value, validate=True)
                return self._seal.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], None).decode()
        except (ValueError, InvalidTag, binascii.Error):
            return ""
        return ""


def _derived(swarm_key: bytes, purpose: bytes) -> bytes:
    return blake2b(purpose, key=swarm_key[:64], digest_size=32).digest()


def _is_near(text: str) -> bool:
    address = addresses.parse(text)
    return address is not None and bool(address.peer_id) and address.is_ip and ip_address(address.host).is_private


def _read(data: bytes) -> dns.message.Message | None:
    if len(data) > 9000:
        return None
    try:
        return dns.message.from_wire(data, ignore_trailing=True, one_rr_per_rrset=False)
    except (dns.exception.DNSException, ValueError, IndexError, KeyError, AssertionError):
        return None
