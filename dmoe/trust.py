"""What this node knows about the honesty of peers, across restarts: one small JSON file.

Owns: audits passed and failed per peer, who is not used any more, which replicas were tried out. Does not own: bans
(p2p), payment (the ledger), how guilt is found (``audit``).

Invariants:
1. A peer found guilty here is not called again until its operator's peer says so (``rios audit forgive``).
2. A replica that was not tried out yet is used only where no other one is.
3. The table is bounded; the guilty are forgotten last. A damaged file is said and left behind: the node starts.
"""

import json
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from config.files import write_whole
from config.vocabulary import PeerId

log = logging.getLogger(__name__)

PEERS_MAX = 4096
FILE_BYTES_MAX = 4 << 20
UNCLEAR_MAX = 3
"""Answers far off the own ones by machines whose arithmetic is not known here: then others are asked instead."""


class Offering(Protocol):
    """Who offers a shard."""

    @property
    def peer_id(self) -> PeerId: ...


OfferingT = TypeVar("OfferingT", bound=Offering)


@dataclass(slots=True)
class Record:
    """``audits``: answers looked at; ``guilty``: of these proved wrong; ``unclear``: far off, and not provable;
    ``seen_s``: unix time of the last one."""

    audits: int = 0
    guilty: int = 0
    unclear: int = 0
    seen_s: int = 0
    why: str = ""


class Trust:
    """Reputations by peer. ``file`` None: for this run only. Small blocking writes on a guilty verdict."""

    def __init__(self, file: Path | None = None, *, changed: Callable[[], None] = lambda: None) -> None:
        self._file = file
        self.changed = changed
        """Called when somebody is trusted less or more than before."""
        self._peers: dict[str, Record] = {} if file is None else _load(file)
        self._probed: set[tuple[PeerId, str, int]] = set()
        self._dirty = False

    def passed(self, peer: PeerId) -> None:
        """An answer of this peer was looked at, and right."""
        record = self._record(peer)
        record.audits += 1
        self._dirty = True

    def unclear(self, peer: PeerId) -> None:
        """An answer of this peer is far off, but nobody here knows its arithmetic."""
        record = self._record(peer)
        record.audits += 1
        record.unclear += 1
        self._dirty = True
        if record.unclear == UNCLEAR_MAX:
            self.changed()

    def guilty(self, peer: PeerId, why: str) -> None:
        """An answer of this peer was proved wrong: it is not used any more. Durable at once."""
        record = self._record(peer)
        record.audits += 1
        record.guilty += 1
        record.why = why[:300]
        self._dirty = True
        self.save()
        self.changed()

    def forgive(self, peer: PeerId) -> bool:
        """The operator trusts a peer again; whether there was anything to forgive."""
        record = self._peers.pop(peer, None)
        self._dirty = True
        self.save()
        self.changed()
        return record is not None and (record.guilty > 0 or record.unclear > 0)

    def trusted(self, peer: PeerId) -> bool:
        """Whether a peer may be called."""
        record = self._peers.get(peer)
        return record is None or (not record.guilty and record.unclear < UNCLEAR_MAX)

    # --- replicas

    def probed(self, peer: PeerId, model_id: str, shard: int) -> None:
        """A replica was tried out, and right."""
        self._probed.add((peer, model_id, shard))
        self.changed()

    def is_probed(self, peer: PeerId, model_id: str, shard: int) -> bool:
        """Whether it was."""
        return (peer, model_id, shard) in self._probed

    def keep_probed(self, peers: Collection[PeerId]) -> None:
        """Forget the replicas of peers that have gone: what comes back is tried out again."""
        self._probed = {key for key in self._probed if key[0] in peers}

    def choose(self, me: PeerId, model_id: str, shard: int, found: Sequence[OfferingT]) -> Sequence[OfferingT]:
        """The replicas of a shard that may be used: trusted ones, of these the tried ones if there are any."""
        trusted = [replica for replica in found if replica.peer_id == me or self.trusted(replica.peer_id)]
        tried = [r for r in trusted if r.peer_id == me or self.is_probed(r.peer_id, model_id, shard)]
        return tried or trusted

    # --- the file

    def table(self) -> dict[str, dict[str, object]]:
        """Everything known, JSON-able."""
        return {peer: asdict(record) for peer, record in self._peers.items()}

    def save(self) -> None:
        """Write the file if something changed; a failure is logged. Blocking."""
        if self._file is None or not self._dirty:
            return
        try:
            write_whole(self._file, json.dumps({"version": 1, "peers": self.table()}, indent=1))
            self._dirty = False
        except OSError as error:
            log.warning("cannot write %s: %s", self._file, error.strerror or error)

    def _record(self, peer: PeerId) -> Record:
        record = self._peers.get(peer)
        if record is None:
            if len(self._peers) >= PEERS_MAX:
                oldest = min(self._peers, key=lambda p: (self._peers[p].guilty > 0, self._peers[p].seen_s))
                del self._peers[oldest]
            record = self._peers[peer] = Record()
        record.seen_s = int(time.time())
        return record


def _load(file: Path) -> dict[str, Record]:
    try:
        if file.stat().st_size > FILE_BYTES_MAX:
            raise ValueError("it is too large")
        data = json.loads(file.read_text(encoding="utf-8"))
        found = {}
        for peer, row in list(data["peers"].items())[:PEERS_MAX]:
            audits, guilty, unclear = int(row["audits"]), int(row["guilty"]), int(row["unclear"])
            found[str(peer)] = Record(audits, guilty, unclear, int(row["seen_s"]), str(row["why"])[:300])
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("the file of reputations %s cannot be read (%s); starting without", file, error)
        return {}
