"""The daemon's side of ``rios ledger committee``, ``issuer`` and ``allow``: who decides in this network."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from config.errors import ConfigError, IntegrityError, LocalError, RiosError
from ledger.core.committee import check_keys
from ledger.core.objects import Committee, Issuer
from ledger.ledger import Ledger
from node.control import Send
from p2p.core.identity import peer_id_of, public_key_of

if TYPE_CHECKING:
    from node.daemon import Node

Args = Mapping[str, Any]


def _ledger(node: "Node") -> Ledger:
    if node.ledger is None:
        hint = "get the network's genesis file, or start a network: rios init --new-network"
        raise LocalError("unavailable", f"this node has no ledger: there is no genesis file {node.paths.genesis}", hint)
    return node.ledger


def _key(text: object) -> bytes:
    try:
        return public_key_of(str(text))
    except IntegrityError as error:
        raise ConfigError("usage", error.message, "keys are written as peer ids, as printed by rios id") from error


def _new_committee(ledger: Ledger, args: Args) -> Committee:
    keys, f = args.get("keys"), args.get("f")
    if not isinstance(keys, list) or type(f) is not int:
        raise ConfigError("usage", "a committee is a list of keys and f", "rios ledger committee --f 1 KEY KEY KEY KEY")
    op = Committee(ledger.book.state.committees.epoch + 1, tuple(_key(key) for key in keys), f)
    try:
        check_keys(op)
    except IntegrityError as error:
        raise ConfigError("usage", error.message, "n = 3f + 1 keys, all of them different") from error
    return op


async def committee(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    """Every committee so far; with ``keys``, the change to a new one."""
    ledger = _ledger(node)
    if args.get("keys"):
        return await _change(ledger, _new_committee(ledger, args), args)
    state = ledger.book.state
    return {
        "root": peer_id_of(ledger.genesis.root),
        "issuer": peer_id_of(state.committees.issuer),
        "epochs": [
            {
                "epoch": each.epoch,
                "f": each.f,
                "tolerance": each.tolerance,
                "entry": each.entry_id.hex(),
                "witnesses": [
                    {"key": peer_id_of(key), "node": ledger.notes.peer_of(each.epoch, key)} for key in each.keys
                ],
            }
            for each in state.committees.epochs
        ],
        "witness": ledger.statistics()["witness"],
    }


async def issuer(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    """The change to a new issuer."""
    return await _change(_ledger(node), Issuer(_key(args.get("issuer"))), args)


async def _change(ledger: Ledger, op: Committee | Issuer, args: Args) -> Any:  # noqa: ANN401 - JSON
    entry_id = ledger.change_id(op)
    if args.get("submit") is True:
        await ledger.change(op)
    return {"entry": entry_id.hex(), "submitted": args.get("submit") is True}


async def trust(node: "Node", _args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    """Let the only witness of a network vote again though its database came from a backup."""
    await _ledger(node).trust_backup()
    return {"trusted": True}


async def allow(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    """List a change that this node's witness may vote for."""
    try:
        entry_id = bytes.fromhex(str(args.get("entry")))
    except ValueError:
        entry_id = b""
    if len(entry_id) != 32:
        raise ConfigError("usage", f"{str(args.get('entry'))[:80]!r} is not an entry's id", "64 hexadecimal digits")
    ledger = _ledger(node)
    if ledger.voting is None:
        raise RiosError("conflict", "this node is no witness", "set ledger.witness = true and start it again")
    await ledger.allow(entry_id)
    return {"entry": entry_id.hex()}
