"""A relay's books: who may be called through it, which circuits are open, what it spends on them.

Owns: reservations, tokens, every limit of relaying. Does not own: sockets, randomness, time.

A peer that nobody can dial *reserves* at a relay that it has a link to. A caller asks the relay for a *circuit*; both
ends then dial the relay with the circuit's token, and the relay passes bytes on between the two sockets.

Invariants:
1. Each end has a token of its own, told to it over its authenticated link; it serves once, before it expires.
2. What is over a limit is refused with BusyError that names the setting, and counted under its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from config.errors import BusyError, RemoteError
from config.vocabulary import PeerId
from p2p.core.buckets import Bucket

TOKEN_BYTES = 16
TOKEN_S = 10.0
RESERVATION_S = 600
PER_PEER_MAX = 16
"""Circuits of one caller, and of one reserved peer times four."""
ASKS_PER_S, ASKS_BURST = 2.0, 16.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a relay gives away. The names are those of the settings."""

    relay_reservations_max: int
    relay_circuits_max: int
    relay_bytes_per_second_max: int
    relay_circuit_bytes_max: int
    relay_circuit_seconds_max: int


@dataclass(slots=True)
class Circuit:
    """One pair of ends. ``left_bytes`` is what it may still pass on, both ways together."""

    number: int
    caller: PeerId
    target: PeerId
    expires: float
    left_bytes: int
    tokens: dict[bytes, PeerId]


@dataclass(slots=True)
class Books:
    """Everything a relay keeps count of."""

    limits: Limits
    reservations: dict[PeerId, float] = field(default_factory=dict)
    circuits: dict[int, Circuit] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    passed_bytes: int = 0
    passed_circuits: int = 0
    _numbers: int = 0
    _tokens: dict[bytes, Circuit] = field(default_factory=dict)
    _asks: dict[PeerId, Bucket] = field(default_factory=dict)

    # -- reservations

    def reserve(self, peer_id: PeerId, now: float) -> int:
        """Keep a place for a peer; the seconds it lasts. Raises BusyError."""
        self._tidy(now)
        if peer_id not in self.reservations and len(self.reservations) >= self.limits.relay_reservations_max:
            raise self._refuse("relay_reservations_max", "this relay has no place left")
        self.reservations[peer_id] = now + RESERVATION_S
        return RESERVATION_S

    def release(self, peer_id: PeerId) -> None:
        """A peer is gone, and its place with it."""
        self.reservations.pop(peer_id, None)

    def reserved(self, peer_id: PeerId, now: float) -> bool:
        """Whether a peer can be called through here."""
        return self.reservations.get(peer_id, now) > now

    # -- circuits

    def ask(self, caller: PeerId, target: PeerId, now: float) -> None:
        """Check that a caller may ask for a circuit to a peer. Raises RemoteError ``not_found``, BusyError."""
        self._tidy(now)
        if not self._asks.setdefault(caller, Bucket(ASKS_PER_S, ASKS_BURST)).take(1, now):
            raise self._refuse("relay asks per second", "too many circuits asked for")
        if not self.reserved(target, now):
            raise RemoteError("not_found", f"{target} has no reservation at this relay")
        if len(self.circuits) >= self.limits.relay_circuits_max:
            raise self._refuse("relay_circuits_max", "this relay passes on as much as it may")
        own = sum(1 for circuit in self.circuits.values() if circuit.caller == caller)
        theirs = sum(1 for circuit in self.circuits.values() if circuit.target == target)
        if own >= PER_PEER_MAX or theirs >= 4 * PER_PEER_MAX:
            raise self._refuse("circuits per peer", "too many circuits of one peer are open")

    def open(self, tokens: Mapping[bytes, PeerId], caller: PeerId, target: PeerId, now: float) -> Circuit:
        """Note a circuit whose ends are told these tokens."""
        assert [len(token) for token in tokens] == [TOKEN_BYTES, TOKEN_BYTES]
        self._numbers += 1
        most = self.limits.relay_circuit_bytes_max
        circuit = Circuit(self._numbers, caller, target, now + TOKEN_S, most, dict(tokens))
        self.circuits[circuit.number] = circuit
        self._tokens.update(dict.fromkeys(tokens, circuit))
        return circuit

    def arrive(self, token: bytes, now: float) -> tuple[Circuit, PeerId] | None:
        """An end dialled in: its circuit, and who it is, if there is one that waits for it."""
        circuit = self._tokens.get(token)
        if circuit is None or circuit.expires <= now:
            return None
        del self._tokens[token]
        peer_id = circuit.tokens.pop(token)
        if not circuit.tokens:
            circuit.expires = now + self.limits.relay_circuit_seconds_max
            self.passed_circuits += 1
        return circuit, peer_id

    def close(self, circuit: Circuit) -> None:
        """A circuit is over."""
        self.circuits.pop(circuit.number, None)
        for token in circuit.tokens:
            self._tokens.pop(token, None)

    def _tidy(self, now: float) -> None:
        for peer_id in [peer for peer, expires in self.reservations.items() if expires <= now]:
            del self.reservations[peer_id]
        for circuit in [each for each in self.circuits.values() if each.expires <= now and each.tokens]:
            self.close(circuit)
        for peer_id in [peer for peer, bucket in self._asks.items() if bucket.idle(now)]:
            del self._asks[peer_id]

    def refuse(self, limit: str) -> None:
        """Count something that a limit ended."""
        self.refused[limit] = self.refused.get(limit, 0) + 1

    def _refuse(self, limit: str, what: str) -> BusyError:
        self.refuse(limit)
        return BusyError(f"{what} (limit: {limit})", "ask another relay, or later", retry_after_ms=1000)

    def statistics(self) -> dict[str, object]:
        """Numbers for status and metrics."""
        return {
            "reservations": len(self.reservations),
            "circuits": len(self.circuits),
            "passed_circuits": self.passed_circuits,
            "passed_bytes": self.passed_bytes,
            "refused": dict(self.refused),
        }
