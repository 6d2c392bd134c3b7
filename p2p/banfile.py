"""Bans and acquaintance across restarts: one small JSON file, written whole or not at all.

A damaged or missing file is an empty one: that is said, and the node starts.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from config.files import write_whole
from p2p.core.standing import Ban

log = logging.getLogger(__name__)

FILE_BYTES_MAX = 4 << 20


def load(path: Path) -> tuple[dict[str, Ban], dict[str, int]]:
    """Bans by subject, and for how many ms each peer has been linked. Blocking."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ValueError("it is too large")
        data = json.loads(path.read_text())
        bans = {
            str(subject): Ban(int(until_ms), str(reason)[:100], int(count), bool(by_operator))
            for subject, (until_ms, reason, count, by_operator) in data["bans"].items()
        }
        return bans, {str(peer): int(tenure_ms) for peer, tenure_ms in data["tenures"].items()}
    except FileNotFoundError:
        return {}, {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("the file of bans %s cannot be read (%s); starting without", path, error)
        return {}, {}


def save(path: Path, bans: Mapping[str, Ban], tenures: Mapping[str, int]) -> bool:
    """Write the file; a failure is logged. Blocking."""
    rows = {subject: [ban.until_ms, ban.reason, ban.count, ban.by_operator] for subject, ban in bans.items()}
    try:
        write_whole(path, json.dumps({"bans": rows, "tenures": tenures}, indent=1))
    except OSError as error:
        log.warning("cannot write %s: %s", path, error.strerror or error)
        return False
    return True
