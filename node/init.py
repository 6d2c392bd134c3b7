"""``rios init``: a config file with comments, the node's key, its network, and what hardware was found.

Invariants: nothing is written before everything that was given is read and right; a key is never replaced; files
appear whole or not at all, so a full disk leaves nothing half-made.
"""

from pathlib import Path
from typing import Any

from config import seeds
from config.errors import ConfigError
from config.files import write_whole
from config.load import load, render_file
from config.paths import Paths
from config.vocabulary import GIB
from ledger.core.genesis import Genesis
from node import founding
from node.cli import Context, Output
from p2p import keyfile
from p2p.core.identity import Identity


def init(context: Context) -> Output:
    """``rios init``"""
    args, file = context.args, context.config_file
    changes = _changes(context)
    joined = founding.read(Path(args.genesis)) if args.genesis else None
    keep = args.keep_config and file.exists()
    if keep and (args.seed or args.gateway):
        raise ConfigError("usage", "--keep-config changes nothing in the config file", f"edit it yourself: {file}")
    if file.exists() and not (args.force or keep):
        raise ConfigError(
            "usage", f"there is a config file already: {file}", "--keep-config uses it, --force replaces it"
        )
    if not keep:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(file, render_file(changes))
    loaded = context.settings()
    paths = context.paths(loaded)
    paths.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    identity, key_note = _key(context, paths)
    if joined is not None:
        founding.join(paths, joined, force=args.force)
    network, network_note = _network(context, paths, identity)
    notes = [
        f"config    {file}",
        f"data      {paths.data}",
        f"key       {identity.peer_id} ({key_note})",
        f"network   {network_note}",
        f"hardware  {_hardware()}",
        "next      rios run, then rios status",
    ]
    if network is not None and identity.public_key in network.witnesses and not loaded.settings.ledger.witness:
        notes.append(f"beware    this node is a witness of its network: set ledger.witness = true in {file}")
    if keep and context.flags:
        given = " ".join(f"--set {flag}" for flag in context.flags)
        notes.append(f"beware    {given}: for this command only; {file} was there and is unchanged")
    data = {
        "config": str(file),
        "data_dir": str(paths.data),
        "peer_id": identity.peer_id,
        "network": network.net.hex() if network else None,
    }
    return Output(data, "\n".join(notes))


def _changes(context: Context) -> dict[str, Any]:
    """What the new config file says: the flags made for it, and every ``--set``."""
    args = context.args
    given = load(None, {}, context.flags)
    names = [name for name, origin in given.origin.items() if origin != "default"]
    changes = {name: getattr(getattr(given.settings, name.split(".")[0]), name.split(".")[1]) for name in names}
    if args.seed:
        changes["p2p.seeds"] = tuple(seeds.check(seed, "--seed") for seed in args.seed)
    if args.gateway:
        changes["gateway.enabled"] = True
    if args.new_network:
        changes["ledger.witness"] = True
    return changes


def _key(context: Context, paths: Paths) -> tuple[Identity, str]:
    if paths.key.exists():
        return keyfile.load(paths.key, passphrase=context.passphrase()), "kept the key that was there"
    made = keyfile.create(paths.key, passphrase=context.passphrase())
    return made, "made a key; back it up: rios id export FILE"


def _network(context: Context, paths: Paths, identity: Identity) -> tuple[Genesis | None, str]:
    """The network this node is in, and a line about it."""
    if not paths.genesis.exists():
        if not context.args.new_network:
            return None, "none yet: --genesis FILE joins one, --new-network starts one"
        genesis = founding.found(paths, identity)
        fit = "one witness (this node), no Byzantine tolerance: fit for a swarm of your own"
        return genesis, f"{genesis.net.hex()} (new; {fit})"
    genesis = founding.read(paths.genesis)
    word = "joined" if context.args.genesis else "kept the genesis that was there"
    return genesis, f"{genesis.net.hex()} ({word}; {genesis.tolerance})"


def _hardware() -> str:
    import psutil  # noqa: PLC0415 - with the next one the slow part of this command

    from dmoe import hardware  # noqa: PLC0415

    gpus = ", ".join(f"{gpu.name} ({gpu.memory_bytes / GIB:.0f} GiB)" for gpu in hardware.gpus()) or "no GPU"
    memory = psutil.virtual_memory().total / GIB
    return f"{hardware.cpu_name()}, {hardware.usable_cores()} cores, {memory:.0f} GiB, {gpus}"
