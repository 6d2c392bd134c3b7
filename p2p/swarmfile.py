"""The private swarm of a node, on disk: its key, its name, seeds that came with the invite, whom it admits.

Format: one JSON object: ``version`` 1, ``name``, ``key`` (64 hex digits), ``seeds``, ``allow``. A node without the file
is in a public swarm.

Invariants:
1. The file appears whole or not at all, with mode 0600 from its first moment; one that others can read is refused.
2. Every failure says what, where and what to do; no message holds the key.
"""

import json
import os
import secrets
import stat
from pathlib import Path

from config.errors import IntegrityError, LocalError
from config.files import write_whole
from p2p.core.invite import KEY_BYTES, NAME_CHARS_MAX, SEEDS_MAX, Swarm

FILE_BYTES_MAX = 64 << 10


def make(name: str = "") -> Swarm:
    """A new private swarm; not yet written."""
    return Swarm(secrets.token_bytes(KEY_BYTES), name)


def save(path: Path, swarm: Swarm) -> None:
    """Write the file, in the place of an old one too."""
    fields = {"version": 1, "name": swarm.name, "key": swarm.key.hex(), "seeds": list(swarm.seeds)}
    fields["allow"] = list(swarm.allow)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, json.dumps(fields, indent=1) + "\n")
    except OSError as error:
        hint = "check the folder's permissions and free space"
        raise LocalError("local", f"cannot write the swarm file {path}: {error.strerror or error}", hint) from error


def load(path: Path) -> Swarm | None:
    """The swarm in the file; None if there is no file.

    Raises LocalError (unreadable, readable by others), IntegrityError (damaged).
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        hint = "the file must belong to the user that runs rios"
        raise LocalError("local", f"cannot read the swarm file {path}: {error.strerror or error}", hint) from error
    if mode & 0o077:
        message = f"the swarm file {path} can be read by others (mode {mode:04o})"
        raise LocalError("local", message, f"it holds the swarm's key; run: chmod 600 {path}")
    try:
        return _parsed(json.loads(data))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        hint = "join again with an invite: rios swarm join --force"
        raise IntegrityError("integrity", f"the swarm file {path} is truncated or damaged", hint) from error


def _parsed(fields: dict[str, object]) -> Swarm:
    name, key, seeds = fields["name"], fields["key"], fields["seeds"]
    if fields["version"] != 1 or not isinstance(name, str) or not isinstance(key, str) or not isinstance(seeds, list):
        raise ValueError("wrong fields")
    allow = fields.get("allow", [])
    if not isinstance(allow, list):
        raise ValueError("wrong fields")
    swarm = Swarm(
        bytes.fromhex(key),
        name[:NAME_CHARS_MAX],
        tuple(str(seed) for seed in seeds[:SEEDS_MAX]),
        tuple(str(peer_id) for peer_id in allow),
    )
    if len(swarm.key) != KEY_BYTES:
        raise ValueError("wrong size")
    return swarm
