"""``rios audit``: who was found to answer wrongly, and whether evidence holds.

Owns: the commands and their words. ``verify`` needs no daemon, only a store that holds the shard.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.errors import EXIT_FAILED, EXIT_OK, LocalError, RiosError
from node.cli import Context, Output
from node.table import table

if TYPE_CHECKING:
    from dmoe.core.evidence import Evidence, Judgement


def verify(context: Context) -> Output:
    """``rios audit verify``: exit code 0 if the evidence proves guilt, 1 if it does not or if nobody can tell here."""
    from dmoe.core import evidence  # noqa: PLC0415

    file = Path(context.args.file)
    try:
        size = file.stat().st_size
        if size > evidence.EVIDENCE_BYTES_MAX:
            raise LocalError("too_large", f"{file} has {size} bytes: that is no evidence")
        data = file.read_bytes()
    except OSError as error:
        raise LocalError("local", f"cannot read {file}: {error.strerror}", "rios audit ls names the files") from error
    found = evidence.read(data)
    judgement, cumulative = _judged(context, found)
    shown = {
        "outcome": judgement.outcome,
        "why": judgement.why,
        "worker": found.worker,
        "model_id": found.model_id.hex(),
        "layer": found.layer,
        "groups": list(found.groups),
        "rows": found.rows,
        "device": found.device,
        "worst": judgement.worst,
        "leaf": found.leaf.hex(),
        "receipt_cumulative": cumulative,
    }
    text = f"{judgement.outcome}: {judgement.why}\n  worker {found.worker}, signed under leaf {found.leaf.hex()[:16]}"
    return Output(shown, text, EXIT_OK if judgement.outcome == "guilty" else EXIT_FAILED)


def _judged(context: Context, found: "Evidence") -> tuple["Judgement", int]:
    """The verdict with the shards on this disk, and the receipt's amount. Raises RiosError if the evidence is
    refused."""
    from dmoe.core.evidence import Judgement  # noqa: PLC0415
    from dmoe.judging import Judging  # noqa: PLC0415
    from dmoe.store import ModelStore  # noqa: PLC0415
    from ledger.core import proof  # noqa: PLC0415

    receipt = proof.check(found.worker, found.leaf, found.receipt, found.signature, found.index, found.path)
    judging = Judging(ModelStore(context.paths().models))
    try:
        return judging.judge(found), receipt.cumulative
    except LocalError as error:
        why = f"the shard is not here: {error.message}"
        return Judgement("cannot tell", why), receipt.cumulative


def ls(context: Context) -> Output:
    """``rios audit ls``"""
    paths = context.paths()
    try:
        data = _ask(context, "audit.list")
    except RiosError as error:
        if error.code != "not_running":
            raise
        from dmoe.trust import Trust  # noqa: PLC0415 - the daemon is stopped: read the file

        data = {"peers": Trust(paths.trust).table(), "outcomes": {}}
    data["evidence"] = sorted(str(file) for file in paths.evidence.glob("*.evidence"))
    rows = [["PEER", "AUDITS", "WRONG", "UNCLEAR", "WHY"]]
    for peer, record in sorted(data["peers"].items(), key=lambda item: -int(item[1]["guilty"])):
        numbers = [str(record[name]) for name in ("audits", "guilty", "unclear")]
        rows.append([peer, *numbers, record["why"]])
    text = table(rows) if data["peers"] else "no answer was audited yet"
    if data["evidence"]:
        text += "\n\nevidence (rios audit verify FILE):\n" + "\n".join(f"  {file}" for file in data["evidence"])
    return Output(data, text)


def forgive(context: Context) -> Output:
    """``rios audit forgive``"""
    data = _ask(context, "audit.forgive", peer=context.args.peer)
    text = f"{context.args.peer} may be asked again" if data["forgiven"] else "nothing is held against it here"
    return Output(data, text + "; rios peers unban ends a ban" if data["forgiven"] else text)


def _ask(context: Context, command: str, **args: Any) -> Any:  # noqa: ANN401 - JSON
    from node import control  # noqa: PLC0415

    for kind, value in control.request(context.paths().control, command, args):
        if kind == "result":
            return value
    raise RiosError("internal", "the node sent no answer")
