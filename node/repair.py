"""``rios ledger repair``: a new ledger file from what can be read of the old one and from peers, and what was done.

The daemon must be stopped. The damaged file is moved beside the new one and kept. This node then joins its network for
as long as it takes (without serving anything but the ledger), fetches what is missing and ends.

A repair that dies after it moved the old file leaves none in its place: until the next repair has put it back and begun
again, no node starts there, which would begin without its votes, vouchers and chain. (There is always a moment without
a file: a write-ahead log of the old one beside the new one would be taken for the new one's.)
"""

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from config.errors import EXIT_FAILED, EXIT_OK, LocalError, RiosError
from node import founding, locks
from node.cli import VERSION, Context, Output

if TYPE_CHECKING:
    from ledger.core.genesis import Genesis
    from ledger.ledger import Ledger

SECONDS_FOR_PEERS = 20.0
PEERS_ASKED_MAX = 8
ASIDE = ".damaged-"


def repair(context: Context) -> Output:
    """``rios ledger repair``"""
    paths = context.paths()
    with locks.data_folder(paths.lock):
        genesis = founding.in_force(context.settings().settings, paths)
        if genesis is None:
            raise LocalError("not_found", f"there is no genesis file {paths.genesis}", "get it from the network")
        why = _what_is_wrong(paths.ledger, genesis)
        if not why and not context.args.force:
            return Output(
                {"repaired": False, "problem": ""}, "nothing is wrong with the ledger file; it stays as it is"
            )
        report: dict[str, Any] = {"repaired": True, "problem": why or "none; told to repair all the same"}
        report |= _rebuild(paths.ledger, genesis)
        report |= trio.run(_fetch, context, genesis, context.args.seconds)
        after = _what_is_wrong(paths.ledger, genesis)
        report["verified"], report["still_wrong"] = not after, after
    return Output(report, _told(report), EXIT_OK if not after else EXIT_FAILED)


def _what_is_wrong(path: Path, genesis: "Genesis") -> str:
    """What verifying the file complains about; empty if nothing."""
    from ledger.salvage import own_damage  # noqa: PLC0415
    from ledger.verify import verify_file  # noqa: PLC0415

    if not path.exists():
        return f"there is no file {path}" + (", a repair moved it away and died" if _aside(path) else "")
    try:
        report = verify_file(path, genesis)
        own = [f"a row of {table} is not what was written" for table in own_damage(path, genesis)]
    except RiosError as error:
        if error.code not in ("integrity", "local"):
            raise
        return error.message
    return "; ".join([*report.problems, *own])


def _rebuild(path: Path, genesis: "Genesis") -> dict[str, Any]:
    """Salvage what can be read, put the old file aside."""
    from ledger.salvage import Salvaged, salvage  # noqa: PLC0415

    _put_back(path)
    if not path.exists():
        return {"moved_to": "", "salvaged": asdict(Salvaged())}
    fresh = path.with_name(f"{path.name}.repaired")
    for old in (fresh, *_beside(fresh)):
        old.unlink(missing_ok=True)
    found: Salvaged = salvage(path, fresh, genesis)
    if _beside(fresh)[0].exists():
        raise LocalError("local", f"{fresh} could not be written to its end", "is the disk full?")
    aside = path.with_name(f"{path.name}{ASIDE}{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}")
    _sync(fresh)
    _move(path, aside)
    fresh.rename(path)
    _sync(path.parent)
    return {"moved_to": str(aside), "salvaged": {**asdict(found), "own_is_whole": found.own_is_whole}}


def check_not_half_repaired(path: Path) -> None:
    """Raises LocalError if a repair died when it had moved the old file and not yet the new one."""
    aside = _aside(path)
    if aside is not None and not path.exists():
        raise LocalError(
            "local",
            f"{path} is missing, and {aside.name} lies beside it: a repair did not come to its end",
            f"run it again: rios ledger repair (or, to begin without what is in that file, move {aside} elsewhere)",
        )


def _put_back(path: Path) -> None:
    aside = _aside(path)
    if aside is not None and not path.exists():
        # the file last: until it is there, this is done again
        for source, target in zip((*_beside(aside), aside), (*_beside(path), path), strict=True):
            if source.exists():
                source.rename(target)
        _sync(path.parent)


def _move(path: Path, aside: Path) -> None:
    """The file first: without it nobody takes what it had beside it for another's."""
    for source, target in zip((path, *_beside(path)), (aside, *_beside(aside)), strict=True):
        if source.exists():
            source.rename(target)
    _sync(path.parent)


def _aside(path: Path) -> Path | None:
    """The newest file that a repair moved away."""
    found = path.parent.glob(f"{path.name}{ASIDE}*")
    return max((each for each in found if not each.name.endswith(("-wal", "-shm"))), default=None)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")


async def _fetch(context: Context, genesis: "Genesis", seconds: float) -> dict[str, Any]:
    """Bring what is missing from peers."""
    before, agreed, failures = 0, [], {}
    async with _joined(context, genesis) as ledger:
        before = ledger.book.state.applied
        network = ledger.replicator.network
        with trio.move_on_after(SECONDS_FOR_PEERS):
            while not network.peers():  # noqa: ASYNC110 - links come whenever they come
                await trio.sleep(0.1)
        with trio.move_on_after(seconds):
            for peer_id in list(network.peers())[:PEERS_ASKED_MAX]:
                try:
                    await ledger.checkpoints.start()
                    if await ledger.replicator.sync_with(peer_id):
                        agreed.append(peer_id)
                except RiosError as error:
                    failures[peer_id] = error.message
        state, silent = ledger.book.state, ledger.is_restored
        return {
            "entries": state.applied,
            "fetched": state.applied - before,
            "waiting": state.waiting(),
            "agrees_with": agreed,
            "failed": failures,
            "restored": silent,
            "digest": state.digest().hex(),
        }


@asynccontextmanager
async def _joined(context: Context, genesis: "Genesis") -> AsyncIterator["Ledger"]:
    """This node's network and ledger, and nothing else of it."""
    from dataclasses import replace  # noqa: PLC0415

    from ledger.keys import EpochKeys  # noqa: PLC0415
    from ledger.ledger import open_ledger  # noqa: PLC0415 - loads everything
    from node import membership  # noqa: PLC0415
    from p2p import keyfile, swarmfile  # noqa: PLC0415
    from p2p.network import open_network  # noqa: PLC0415

    loaded = context.settings()
    settings, paths = loaded.settings, context.paths(loaded)
    passphrase = context.passphrase()
    identity = keyfile.load(paths.key, passphrase=passphrase)
    keys = EpochKeys(identity, paths.epoch_keys, passphrase)  # they are silent if promises are lost
    swarm = swarmfile.load(paths.swarm)
    seeds = membership.seeds_of(settings.p2p, paths.config_file.parent, swarm)
    p2p = replace(
        settings.p2p, seeds=seeds, seeds_file="", allow=(*settings.p2p.allow, *(swarm.allow if swarm else ()))
    )
    # a witness does not vote meanwhile; what the ledger's file says about its seats is read at its next start
    quiet = replace(settings.ledger, witness=False, sync_seconds=3600)
    with locks.key(identity.peer_id):
        async with (
            open_network(
                identity, p2p, data_dir=paths.network, version=VERSION, swarm_key=swarm.key if swarm else None
            ) as network,
            trio.open_nursery() as nursery,
        ):
            ledger = await open_ledger(
                network, identity, genesis, paths.ledger, quiet, nursery=nursery, epoch_keys=keys
            )
            try:
                yield ledger
            finally:
                await ledger.aclose()
                nursery.cancel_scope.cancel()


def _told(report: dict[str, Any]) -> str:
    salvaged = report["salvaged"]
    lines = [f"problem: {report['problem']}"]
    if report["moved_to"]:
        lines.append(f"the old file is kept as {report['moved_to']}")
    own = {name: count for name, count in salvaged["rows"].items() if count and name != "meta"}
    lines.append(f"saved from it: {salvaged['entries']} entries, {salvaged['claims']} claims with valid certificates")
    lines.append("own things saved: " + (", ".join(f"{count} {name}" for name, count in own.items()) or "none"))
    if salvaged["unreadable"]:
        lines.append(f"not readable to the end, or not what was written: {', '.join(salvaged['unreadable'])}")
    if salvaged["refused"]:
        lines.append(f"{salvaged['refused']} objects did not verify and were left out")
    lines.append(
        f"from peers: {report['fetched']} entries; {len(report['agrees_with'])} peers have the same ledger now"
    )
    lines += [f"  {peer}: {why}" for peer, why in report["failed"].items()]
    if not report["agrees_with"]:
        lines.append("no peer could confirm that this is all: start the node, it fetches the rest")
    if report["restored"]:
        lines.append("promises may be lost: a witness here stays silent for its epoch, the wallet asks before it signs")
    lines.append("verified" if report["verified"] else f"STILL WRONG: {report['still_wrong']}")
    return "\n".join(lines)
