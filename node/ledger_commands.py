"""``rios ledger``: asks the running daemon; what only reads works on the file too when no daemon runs.

Amounts are integers of microcredits in JSON, credits with six decimals for people; CSV has both.
"""

import csv
import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from config.errors import EXIT_FAILED, EXIT_OK, LocalError, RiosError
from config.vocabulary import format_credits
from node import control
from node.cli import Context, Output, parse_credits
from node.table import table

if TYPE_CHECKING:
    from dmoe.core.evidence import Evidence
    from ledger.core.genesis import Genesis

EVIDENCE_FILES_MAX = 10_000
_CREDITS = {"amount", "balance", "cumulative", "lock", "promised", "paid", "total"}
"""Columns that hold microcredits."""


def _ask(context: Context, command: str, **args: Any) -> Any:  # noqa: ANN401 - JSON
    return control.ask(context.paths().control, f"ledger.{command}", args)


def _either(context: Context, command: str, offline: Callable[[], Any], **args: Any) -> Any:  # noqa: ANN401 - JSON
    """The daemon's answer, or what the file says if no daemon runs."""
    try:
        return _ask(context, command, **args)
    except RiosError as error:
        if error.code != "not_running":
            raise
    return offline()


def _file(context: Context) -> tuple[Path, "Genesis"]:
    """The ledger's file and its network. Raises LocalError ``not_found`` where there is none."""
    from node import founding  # noqa: PLC0415 - only without a daemon

    loaded = context.settings()
    paths = context.paths(loaded)
    genesis = founding.in_force(loaded.settings, paths)
    if genesis is None or not paths.ledger.exists():
        raise LocalError("not_found", f"there is no ledger {paths.ledger}", "rios init, then rios run")
    return paths.ledger, genesis


def _account(context: Context, given: str) -> bytes:
    """The account that was named, or this node's (its key file names it in the clear)."""
    from node.ledger_answers import account_of  # noqa: PLC0415
    from p2p.core.identity import public_key_of  # noqa: PLC0415

    return public_key_of(account_of({"account": given}, "account", "" if given else own_peer_id(context)))


def own_peer_id(context: Context) -> str:
    """This node's peer id, also where its key is encrypted. Raises LocalError where there is no key."""
    from p2p import keyfile  # noqa: PLC0415

    return keyfile.peer_id(context.paths().key)


# --- reading


def balance(context: Context) -> Output:
    """``rios ledger balance``"""

    def offline() -> Any:  # noqa: ANN401 - JSON
        from ledger import reading  # noqa: PLC0415

        return reading.balance_in(*_file(context), _account(context, context.args.account))

    data = _either(context, "balance", offline, account=context.args.account)
    text = f"{data['account']}\n  {format_credits(data['balance'])} credits free"
    return Output(data, text + f", {format_credits(data['locked'])} locked in channels")


def statement(context: Context) -> Output:
    """``rios ledger statement``"""

    def offline() -> Any:  # noqa: ANN401 - JSON
        from ledger import reading  # noqa: PLC0415

        lines = reading.statement(*_file(context), _account(context, context.args.account))
        return [asdict(line) for line in lines]

    data = _either(context, "statement", offline, account=context.args.account)
    if context.args.csv:
        return Output(data, _csv(data, ("seen_ms", "kind", "amount", "balance", "peer_id", "reference")))
    rows = [["WHEN", "WHAT", "AMOUNT", "BALANCE", "COUNTERPARTY", "REFERENCE"]]
    for line in data:
        amount = format_credits(line["amount"])
        rows.append(
            [
                _when(line["seen_ms"]),
                line["kind"],
                amount if amount.startswith("-") else f"+{amount}",
                format_credits(line["balance"]),
                line["peer_id"],
                line["reference"],
            ]
        )
    return Output(data, table(rows) if data else "nothing yet")


def _when(ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(ms / 1000))


def find_entry(context: Context, name: str) -> Any:  # noqa: ANN401 - JSON
    """One object with its certificate. Raises RiosError ``not_found``."""

    def offline() -> Any:  # noqa: ANN401 - JSON
        from ledger import reading  # noqa: PLC0415

        return reading.entry(*_file(context), name)

    return _either(context, "entry", offline, name=name)


def entry(context: Context) -> Output:
    """``rios ledger entry``"""
    data = find_entry(context, context.args.entry)
    lines = [f"{data['kind']} {data['id']}", f"  by {data['account']}, number {data['seq']}, {data['state']}"]
    if data["kind"] == "claim":
        lines.append(f"  channel {data['channel']}: {format_credits(data['cumulative'])} credits in all")
    for op in data.get("ops", ()):
        lines.append("  " + _op_text(op))
    return Output(data, "\n".join([*lines, *_votes_text(data["certificate"])]), _certified(data["certificate"]))


def _op_text(op: Mapping[str, Any]) -> str:
    parts = []
    for name, value in op.items():
        if name in _CREDITS:
            parts.append(f"{name} {format_credits(value)}")
        elif name != "op":
            parts.append(f"{name} {', '.join(value) if isinstance(value, list) else value}")
    return f"{op['op']}: {', '.join(parts)}"


def _votes_text(certificate: Mapping[str, Any] | None) -> list[str]:
    if certificate is None:
        return []
    verdict = "valid" if certificate["valid"] else f"NOT VALID: {certificate['problem']}"
    lines = [f"  certificate of epoch {certificate['epoch']}, {len(certificate['votes'])} votes, {verdict}"]
    return lines + [
        f"    {vote['witness']} batch {vote['batch']} place {vote['place']}" for vote in certificate["votes"]
    ]


def _certified(certificate: Mapping[str, Any] | None) -> int:
    return EXIT_OK if certificate is None or certificate["valid"] else EXIT_FAILED


def verify(context: Context) -> Output:
    """``rios ledger verify``"""

    def offline() -> Any:  # noqa: ANN401 - JSON
        from ledger.verify import verify_file  # noqa: PLC0415

        return verify_file(*_file(context)).as_dict()

    data = _either(context, "verify", offline)
    verdict = "verified" if data["verified"] else "NOT VERIFIED: " + "; ".join(data["problems"])
    text = f"{verdict}\n  {data['entries']} entries, {data['claims']} settlements, {data['certificates']} certificates"
    if data["below_checkpoint"]:
        text += f", and a checkpoint of {data['below_checkpoint']} entries that are not here"
    text += f"\n  sums {'add up' if data['sum_ok'] else 'DO NOT ADD UP'}, digest {data['digest']}"
    return Output(data, text, EXIT_OK if data["verified"] and data["sum_ok"] else EXIT_FAILED)


def channels(context: Context) -> Output:
    """``rios ledger channels``"""

    def offline() -> Any:  # noqa: ANN401 - JSON
        from ledger import reading  # noqa: PLC0415

        return reading.channels(*_file(context), _account(context, context.args.account))

    data = _either(context, "channels", offline, account=context.args.account)
    if context.args.csv:
        names = ("channel", "side", "payer", "payee", "lock", "promised", "paid", "calls", "stopped")
        return Output(data, _csv(data, names))
    rows = [["CHANNEL", "PAYER", "PAYEE", "LOCKED", "PROMISED", "SETTLED", "STATE"]]
    for each in data:
        amounts = [format_credits(each[key]) for key in ("lock", "promised", "paid")]
        state = f"stopped: {each['stopped']}" if each["stopped"] else "closed" if each.get("closed") else "open"
        rows.append([each["channel"][:12], each["payer"][-12:], each["payee"][-12:], *amounts, state])
    return Output(data, table(rows) if data else "no channels")


# --- offences


def audit(context: Context) -> Output:
    """``rios ledger audit PEER``: exit code 1 if something is proved against it."""
    peer = context.args.peer

    def offline() -> Any:  # noqa: ANN401 - JSON
        from dmoe.trust import Trust  # noqa: PLC0415
        from ledger import reading  # noqa: PLC0415

        _account(context, peer)
        found = reading.offences(*_file(context), peer)
        return {**found, "answers": Trust(context.paths().trust).table().get(peer)}

    data = _either(context, "audit", offline, peer=peer)
    data["evidence"] = _evidence_against(context.paths().evidence, data["peer_id"])
    lines = [f"{data['peer_id']}{' (a witness)' if data['witness'] else ''}"]
    for each in data["equivocations"]:
        proof = "both signed by it" if each["proved"] else "NOT PROVED"
        lines.append(f"  two entries number {each['seq']}, {proof}: {', '.join(e['id'] for e in each['entries'])}")
    for each in data["double_batches"]:
        proof = "both signed by it" if each["proved"] else "NOT PROVED"
        lines.append(f"  two batches of votes number {each['batch']} in epoch {each['epoch']}, {proof}")
    for each in data["stopped_channels"]:
        lines.append(f"  channel {each['channel'][:16]} stopped: {each['why']}")
    answers = data["answers"]
    if answers:
        lines.append(f"  {answers['audits']} answers audited, {answers['guilty']} wrong, {answers['unclear']} unclear")
    lines += [f"  evidence of a wrong answer: {file} (rios audit verify)" for file in data["evidence"]]
    proved = any(e["proved"] for e in (*data["equivocations"], *data["double_batches"])) or bool(data["evidence"])
    if len(lines) == 1:
        lines.append("  nothing is held against it here")
    return Output(data, "\n".join(lines), EXIT_FAILED if proved else EXIT_OK)


def _evidence_against(folder: Path, peer_id: str) -> list[str]:
    """Files of evidence about a peer's answers; whether one proves guilt says ``rios audit verify``."""
    return [
        str(file)
        for file in sorted(folder.glob("*.evidence"))[:EVIDENCE_FILES_MAX]
        if (found := _read_evidence(file)) is not None and found.worker == peer_id
    ]


def _read_evidence(file: Path) -> "Evidence | None":
    from dmoe.core import evidence  # noqa: PLC0415

    try:
        if file.stat().st_size > evidence.EVIDENCE_BYTES_MAX:
            return None
        return evidence.read(file.read_bytes())
    except (OSError, RiosError):
        return None  # somebody else's file; `rios audit verify` says what is wrong with it


# --- paying


def settle(context: Context) -> Output:
    """``rios ledger settle``"""
    data = _ask(context, "settle")
    return Output(data, f"settled: {format_credits(data['microcredits'])} credits paid out to this node")


def grant(context: Context) -> Output:
    """``rios ledger grant``"""
    return _pay(context, "grant", "granted")


def transfer(context: Context) -> Output:
    """``rios ledger transfer``"""
    return _pay(context, "transfer", "sent")


def _pay(context: Context, command: str, verb: str) -> Output:
    amount = parse_credits(context.args.credits)
    data = _ask(context, command, to=context.args.to, microcredits=amount)
    return Output(data, f"{verb} {format_credits(amount)} credits to {context.args.to}; entry {data['entry']}")


# --- checkpoints


def checkpoint(context: Context) -> Output:
    """``rios ledger checkpoint``"""

    def offline() -> Any:  # noqa: ANN401 - JSON
        from ledger import reading  # noqa: PLC0415

        return reading.checkpoint(*_file(context))

    doing = context.args.do
    data = _ask(context, "checkpoint", do=doing) if doing else _either(context, "checkpoint", offline)
    newest, base = data["newest"], data["base"]
    if newest is None:
        return Output(data, "there is no checkpoint on this disk; make one: rios ledger checkpoint --new")
    text = f"checkpoint {newest['root']}\n  {newest['entries']} entries, epoch {newest['epoch']}, "
    text += f"{format_credits(newest['supply'])} credits, signed by {len(newest['witnesses'])} witnesses"
    text += f"\n  frontier {newest['frontier']}"
    if base is not None:
        text += f"\n  what lies below {base['entries']} entries is not kept here"
    if data.get("freed_bytes") is not None:
        text += f"\n  {data['freed_bytes']} bytes freed"
    return Output(data, text)


# --- everything


def export(context: Context) -> Output | int:
    """``rios ledger export``: straight from the file, also beside a running daemon, row by row."""
    from ledger import reading  # noqa: PLC0415

    path, genesis = _file(context)
    account = _account(context, context.args.account) if context.args.account else None
    rows = reading.rows(path, genesis, account)
    if not context.args.output:
        _write(sys.stdout, rows, as_csv=context.args.csv)
        return EXIT_OK
    target = Path(context.args.output)
    try:
        with target.open("x", encoding="utf-8", newline="") as out:
            count = _write(out, rows, as_csv=context.args.csv)
    except FileExistsError as error:
        raise LocalError("conflict", f"{target} exists already", "choose another name") from error
    except OSError as error:
        raise LocalError("local", f"cannot write {target}: {error.strerror}") from error
    return Output({"file": str(target), "objects": count}, f"wrote {count} objects to {target}")


EXPORT_COLUMNS = (
    "id", "kind", "account", "seq", "op_index", "op", "counterparty", "channel", "amount", "credits", "epoch", "seen_ms"
)  # fmt: skip


def _write(out: TextIO, rows: Iterable[Mapping[str, Any]], *, as_csv: bool) -> int:
    """JSON, one object a line with its certificate; or CSV, one line for every op. How many objects."""
    count = 0
    lines = csv.writer(out, lineterminator="\n") if as_csv else None
    if lines is not None:
        lines.writerow(EXPORT_COLUMNS)
    for row in rows:
        count += 1
        if lines is None:
            out.write(json.dumps(row, separators=(",", ":")) + "\n")
        else:
            lines.writerows([each.get(name, "") for name in EXPORT_COLUMNS] for each in _flat(row))
    return count


def _flat(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if row["kind"] == "claim":
        return [{**row, "op": "claim", "amount": row["cumulative"], "credits": format_credits(row["cumulative"])}]
    flat: list[Mapping[str, Any]] = []
    for index, op in enumerate(row["ops"]):
        amount = op.get("amount", op.get("total"))
        credits = "" if amount is None else format_credits(amount)
        to = op.get("to") or op.get("payout") or op.get("key") or ""
        flat.append({**row, **op, "op_index": index, "counterparty": to, "amount": amount, "credits": credits})
    return flat


def _csv(data: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Columns of rows; a column of microcredits is followed by the same in credits."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(
        [text for name in names for text in ((f"{name}_microcredits", name) if name in _CREDITS else (name,))]
    )
    for row in data:
        cells: list[Any] = []
        for name in names:
            cells += [row[name], format_credits(row[name])] if name in _CREDITS else [row[name]]
        lines.writerow(cells)
    return out.getvalue().rstrip("\n")
