"""``rios ledger genesis new``, ``epoch-key``, ``committee``, ``issuer``, ``allow``: who decides in a network."""

from pathlib import Path
from typing import Any

from config.errors import ConfigError, IntegrityError, LocalError
from config.files import write_whole
from node import control
from node.cli import Context, Output, parse_credits
from node.table import table
from p2p.core.identity import public_key_of


def genesis_new(context: Context) -> Output:
    """``rios ledger genesis new``: a network's genesis from public keys alone."""
    from ledger.core.genesis import Genesis  # noqa: PLC0415

    args, file = context.args, Path(context.args.file)
    if file.exists() and not args.force:
        raise ConfigError("usage", f"there is a file {file} already", "--force replaces it: that is another network")
    amounts = {
        name: parse_credits(getattr(args, name))
        for name in ("max_supply", "min_amount", "min_lock", "min_claim_step")
        if getattr(args, name)
    }
    made = Genesis(
        issuer=_key("--issuer", args.issuer),
        root=_key("--root", args.root),
        witnesses=tuple(_key("--witness", each) for each in args.witness),
        f=args.f,
        **amounts,
    )
    write_whole(file, made.to_json())
    lines = [f"wrote {file}: network {made.net.hex()}", f"  {made.tolerance}"]
    if not made.f:
        lines.append("  whoever holds that witness's key can spend twice: fit for a swarm of your own")
    lines.append("  give it to every node (rios init --genesis FILE); its witnesses set ledger.witness = true")
    data = {"file": str(file), "net": made.net.hex(), "f": made.f, "tolerance": made.tolerance}
    return Output(data, "\n".join(lines))


def _key(flag: str, text: str) -> Any:  # noqa: ANN401 - an account
    try:
        return public_key_of(text)
    except IntegrityError as error:
        raise ConfigError("usage", f"{flag}: {error.message}", "e.g. 12D3KooW..., as printed by rios id") from error


def epoch_key(context: Context) -> Output:
    """``rios ledger epoch-key``: a key for a committee to come."""
    from ledger.keys import EpochKeys  # noqa: PLC0415
    from node.local import own_identity  # noqa: PLC0415
    from p2p.core.identity import peer_id_of  # noqa: PLC0415

    identity, paths = own_identity(context)
    try:
        made = EpochKeys(identity, paths.epoch_keys, context.passphrase()).create()
    except OSError as error:
        raise LocalError("local", f"cannot keep a key in {paths.epoch_keys}: {error}", "free some space") from error
    text = f"{peer_id_of(made.public_key)}\n  kept in {paths.epoch_keys}; it is erased when its epoch is over"
    text += "\n  give it to whoever holds the network's root key, and set ledger.witness = true here"
    return Output({"key": peer_id_of(made.public_key)}, text)


def _ask(context: Context, command: str, **args: Any) -> Any:  # noqa: ANN401 - JSON
    return control.ask(context.paths().control, f"ledger.{command}", args)


def committee(context: Context) -> Output:
    """``rios ledger committee``"""
    args = context.args
    if args.keys:
        return _change(_ask(context, "committee", keys=list(args.keys), f=args.f, submit=args.submit), "committee")
    data = _ask(context, "committee")
    rows = [["EPOCH", "WITNESS", "NODE"]]
    for each in data["epochs"]:
        rows += [[str(each["epoch"]), seat["key"], seat["node"]] for seat in each["witnesses"]]
    newest = data["epochs"][-1]
    own = data["witness"]
    text = (
        f"{table(rows)}\nepoch {newest['epoch']}: {newest['tolerance']}\nissuer {data['issuer']}, root {data['root']}"
    )
    if own is not None:
        text += f"\nthis node: {own['phase']}" + (", RESTORED: silent until the next epoch" if own["restored"] else "")
    return Output(data, text)


def issuer(context: Context) -> Output:
    """``rios ledger issuer``"""
    return _change(_ask(context, "issuer", issuer=context.args.issuer, submit=context.args.submit), "issuer")


def _change(data: Any, what: str) -> Output:  # noqa: ANN401 - JSON
    if data["submitted"]:
        return Output(data, f"the {what} has changed; entry {data['entry']}")
    text = f"entry {data['entry']}\n  nothing is signed yet. 2f + 1 of the witnesses' operators run"
    text += f"\n  rios ledger allow {data['entry']}\n  then the same command again with --submit"
    return Output(data, text)


def allow(context: Context) -> Output:
    """``rios ledger allow``"""
    data = _ask(context, "allow", entry=context.args.entry)
    return Output(data, f"this node's witness may vote for {data['entry']}")


def trust_backup(context: Context) -> Output:
    """``rios ledger trust-backup``"""
    data = _ask(context, "trust")
    return Output(data, "this node's witness votes again; what it voted after the backup was made it does not know")
