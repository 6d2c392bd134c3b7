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
    from dmoe.core.stageevidence import StageEvidence


def verify(context: Context) -> Output:
    """``rios audit verify``: exit code 0 if the evidence proves guilt, 1 if it does not or if nobody can tell here."""
    from dmoe.core import evidence, stageevidence  # noqa: PLC0415

    file = Path(context.args.file)
    try:
        size = file.stat().st_size
        if size > evidence.EVIDENCE_BYTES_MAX:
            raise LocalError("too_large", f"{file} has {size} bytes: that is no evidence")
        data = file.read_bytes()
    except OSError as error:
        raise LocalError("local", f"cannot read {file}: {error.strerror}", "rios audit ls names the files") from error
    found = stageevidence.read(data) if stageevidence.is_stage(data) else evidence.read(data)
    judgement, cumulative, leaf = _judged(context, found)
    shown = {
        "outcome": judgement.outcome,
        "why": judgement.why,
        "worker": found.worker,
        "model_id": found.model_id.hex(),
        **_place(found),
        "rows": found.rows,
        "device": found.device,
        "worst": judgement.worst,
        "leaf": leaf.hex(),
        "receipt_cumulative": cumulative,
    }
    text = f"{judgement.outcome}: {judgement.why}\n  worker {found.worker}, signed under leaf {leaf.hex()[:16]}"
    return Output(shown, text, EXIT_OK if judgement.outcome == "guilty" else EXIT_FAILED)


def _place(found: "Evidence | StageEvidence") -> dict[str, Any]:
    """What the answer was of."""
    if found.version == 1:
        return {"layer": found.layer, "groups": list(found.groups)}  # type: ignore[union-attr]
    return {"layers": list(found.layers)}  # type: ignore[union-attr]


def _judged(context: Context, found: "Evidence | StageEvidence") -> tuple["Judgement", int, bytes]:
    """The verdict with the shards on this disk, the receipt's amount and the leaf. Raises RiosError if the evidence is
    refused, or nothing is known of the model here."""
    from dmoe.core.evidence import Judgement  # noqa: PLC0415
    from dmoe.core.stageevidence import StageEvidence  # noqa: PLC0415
    from dmoe.judging import Judging  # noqa: PLC0415
    from dmoe.store import ModelStore  # noqa: PLC0415
    from ledger.core import proof  # noqa: PLC0415

    store = ModelStore(context.paths().models)
    # what a leaf says of rows depends on the model's width
    leaf = found.leaf_of(store.manifest(found.model_id.hex())) if isinstance(found, StageEvidence) else found.leaf
    receipt = proof.check(found.worker, leaf, found.receipt, found.signature, found.index, found.path)
    try:
        return Judging(store).judge(found), receipt.cumulative, leaf
    except LocalError as error:
        why = f"the shard is not here: {error.message}"
        return Judgement("cannot tell", why), receipt.cumulative, leaf


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
