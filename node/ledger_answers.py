"""What the running node answers about its ledger on the control socket, and what it does when asked to."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from config.errors import ConfigError, IntegrityError, LocalError
from ledger import reading
from ledger.ledger import Ledger
from node.control import Send
from p2p.core.identity import public_key_of

if TYPE_CHECKING:
    from node.daemon import Node

Args = Mapping[str, Any]


def _ledger(node: "Node") -> Ledger:
    if node.ledger is None:
        raise LocalError(
            "unavailable",
            f"this node has no ledger: there is no genesis file {node.paths.genesis}",
            "get the network's genesis file, or start a network: rios init --new-network",
        )
    return node.ledger


def account_of(args: Args, name: str, default: str) -> str:
    """An account out of a command's arguments. Raises ConfigError ``usage`` for what is none."""
    peer_id = str(args.get(name) or default)
    try:
        public_key_of(peer_id)
    except IntegrityError as error:
        raise ConfigError("usage", f"{name}: {error.message}", "e.g. 12D3KooW..., as printed by rios id") from error
    return peer_id


def _amount(args: Args) -> int:
    amount = args.get("microcredits")
    if type(amount) is not int or amount <= 0:
        raise ConfigError("usage", f"{amount!r} is not an amount", "a whole number of microcredits above 0")
    return amount


async def _balance(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    account = account_of(args, "account", node.identity.peer_id)
    return reading.balance(_ledger(node).book.state, public_key_of(account))


async def _statement(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    account = account_of(args, "account", node.identity.peer_id)
    return [asdict(line) for line in await _ledger(node).statement(public_key_of(account))]


async def _entry(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    return await _ledger(node).entry(str(args.get("name", "")))


async def _verify(node: "Node", _args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    return (await _ledger(node).verify()).as_dict()


async def _audit(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    found = await _ledger(node).offences(account_of(args, "peer", ""))
    audit = node.caller.audit
    table = audit.trust.table() if audit is not None else {}
    return {**found, "answers": table.get(found["peer_id"])}


async def _channels(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    if args.get("account"):
        return await _ledger(node).channels_of(public_key_of(account_of(args, "account", "")))
    me = node.identity.peer_id
    rows = []
    for each in _ledger(node).channels():
        sold = each["side"] == "sell"
        rows.append({**each, "payer": each["peer_id"] if sold else me, "payee": me if sold else each["peer_id"]})
    return rows


async def _settle(node: "Node", _args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    return {"microcredits": await _ledger(node).settle_all()}


async def _grant(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    to = account_of(args, "to", "")
    item = await _ledger(node).grant(public_key_of(to), _amount(args))
    return {"entry": item.id.hex()}


async def _transfer(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    to = account_of(args, "to", "")
    item = await _ledger(node).transfer(public_key_of(to), _amount(args))
    return {"entry": item.id.hex()}


async def _checkpoint(node: "Node", args: Args, _send: Send) -> Any:  # noqa: ANN401 - JSON
    ledger = _ledger(node)
    doing, freed = args.get("do", ""), None
    if doing == "new":
        await ledger.checkpoints.propose()
    elif doing == "fetch":
        await ledger.checkpoints.obtain()
    elif doing == "prune":
        _, freed = await ledger.checkpoints.prune()
    return {**ledger.checkpoint(), "freed_bytes": freed}


COMMANDS: Mapping[str, Callable[["Node", Args, Send], Awaitable[Any]]] = {
    "ledger.balance": _balance,
    "ledger.statement": _statement,
    "ledger.entry": _entry,
    "ledger.verify": _verify,
    "ledger.audit": _audit,
    "ledger.channels": _channels,
    "ledger.settle": _settle,
    "ledger.grant": _grant,
    "ledger.transfer": _transfer,
    "ledger.checkpoint": _checkpoint,
}
"""Every command of the ledger by name, for ``operator``."""
