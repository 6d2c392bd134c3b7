"""Peers met before, so that a restarted node finds the swarm even if every seed is dead.

One JSON file, written atomically. A damaged or missing file is an empty book: the seeds remain.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from config.vocabulary import PeerId

log = logging.getLogger(__name__)

PEERS_MAX = 1000
ADDRESSES_MAX = 8
FILE_BYTES_MAX = 4 << 20


class Peerbook:
    """Addresses by peer, the one met last at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._peers = _load(path)
        self._dirty = False

    def peers(self) -> Mapping[PeerId, Sequence[str]]:
        """Everybody met, the most recent first."""
        return dict(reversed(self._peers.items()))

    def met(self, peer_id: PeerId, addresses: Sequence[str]) -> None:
        """Remember a peer that was reached."""
        if addresses:
            self._peers.pop(peer_id, None)
            self._peers[peer_id] = list(addresses)[:ADDRESSES_MAX]
            while len(self._peers) > PEERS_MAX:
                del self._peers[next(iter(self._peers))]
            self._dirty = True

    def save(self) -> None:
        """Write the book if it changed. Blocking; a failure is logged, the book is only a convenience."""
        if not self._dirty:
            return
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps({"peers": self._peers}, indent=1))
            os.replace(temporary, self._path)
            self._dirty = False
        except OSError as error:
            log.warning("cannot write the peer book %s: %s", self._path, error.strerror or error)


def _load(path: Path) -> dict[PeerId, list[str]]:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ValueError("it is too large")
        peers = json.loads(path.read_text())["peers"]
        return {
            PeerId(peer): [str(a) for a in addresses][:ADDRESSES_MAX]
            for peer, addresses in list(peers.items())[-PEERS_MAX:]
            if isinstance(peer, str) and isinstance(addresses, list)
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the peer book %s cannot be read (%s); starting an empty one", path, error)
        return {}
