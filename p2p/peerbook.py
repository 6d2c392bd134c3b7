"""Peers met before, so that a restarted node finds the swarm even if every seed is dead.

One JSON file, written atomically: ``{"peers": {peer id: {"addresses": [...], "lane": protocol id}}}``. A damaged or
missing file is an empty book: the seeds remain; a damaged entry is left out. What it says is tried, never believed.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.vocabulary import PeerId
from p2p.core import addresses as multiaddrs

log = logging.getLogger(__name__)

PEERS_MAX = 1000
ADDRESSES_MAX = 8
FILE_BYTES_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class Met:
    """Where a peer was, and which direct lane it spoke (empty: none)."""

    addresses: tuple[str, ...]
    lane: str = ""


class Peerbook:
    """Peers by id, the one met last at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._peers = _load(path)
        self._dirty = False

    def peers(self) -> Mapping[PeerId, Met]:
        """Everybody met, the most recent first."""
        return dict(reversed(self._peers.items()))

    def get(self, peer_id: PeerId) -> Met | None:
        """One peer."""
        return self._peers.get(peer_id)

    def met(self, peer_id: PeerId, addresses: Sequence[str], lane: str = "") -> None:
        """Remember a peer that was reached."""
        addresses = [text for text in addresses if multiaddrs.parse(text) is not None]
        if addresses:
            known = self._peers.pop(peer_id, None)
            self._peers[peer_id] = now = Met(tuple(addresses)[:ADDRESSES_MAX], lane)
            while len(self._peers) > PEERS_MAX:
                del self._peers[next(iter(self._peers))]
            self._dirty = self._dirty or known != now

    def save(self) -> None:
        """Write the book if it changed. Blocking; a failure is logged, the book is only a convenience."""
        if not self._dirty:
            return
        peers = {peer: {"addresses": met.addresses, "lane": met.lane} for peer, met in list(self._peers.items())}
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps({"peers": peers}, indent=1))
            os.replace(temporary, self._path)
            self._dirty = False
        except OSError as error:
            log.warning("cannot write the peer book %s: %s", self._path, error.strerror or error)


def _load(path: Path) -> dict[PeerId, Met]:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ValueError("it is too large")
        peers = json.loads(path.read_text())["peers"]
        read = ((PeerId(peer), _entry(entry)) for peer, entry in list(peers.items())[-PEERS_MAX:])
        return {peer: met for peer, met in read if met is not None}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("the peer book %s cannot be read (%s); starting an empty one", path, error)
        return {}


def _entry(entry: Any) -> Met | None:  # noqa: ANN401 - JSON
    """One peer's entry; the first version had only the list of addresses."""
    found = entry if isinstance(entry, list) else entry.get("addresses") if isinstance(entry, dict) else None
    lane = entry.get("lane") if isinstance(entry, dict) else ""
    if not isinstance(found, list):
        return None
    usable = tuple(text for text in found if isinstance(text, str) and multiaddrs.parse(text) is not None)
    return Met(usable[:ADDRESSES_MAX], lane if isinstance(lane, str) else "") if usable else None
