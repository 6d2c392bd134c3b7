"""``rios gateway audit verify``: is the audit log the one that was written? Works whether gateways run or not.

The chain of hashes shows every change below its head. That nobody made the whole chain anew is shown by the anchors: by
their signatures, and by the ledger's entries, which were certified when they were made.
"""

import json
import re
import time
from typing import Any

from config.errors import EXIT_FAILED, EXIT_OK, RiosError
from node.anchors import is_signed
from node.cli import Context, Output
from node.ledger_commands import find_entry
from node.local import open_books
from p2p.core.identity import peer_id_of

_ANCHORS_CHECKED_MAX = 1000
_HASH = re.compile(r"[0-9a-f]{64}")


def verify(context: Context) -> Output:
    """``rios gateway audit verify``: exit code 1 if the log is not what was written."""
    from gateway import anchoring, audit  # noqa: PLC0415

    hashes: list[str] = []
    anchors: list[audit.Row] = []

    def look(row: audit.Row) -> None:
        hashes.append(row.hash)
        if row.action == anchoring.ACTION:
            anchors.append(row)

    with open_books(context) as accounts:
        count, digest = audit.verify(accounts.database, look)
    checked = [_checked(context, row, hashes) for row in anchors[-_ANCHORS_CHECKED_MAX:]]
    wrong = [each for each in checked if each["problem"]]
    data = {"rows": count, "hash": digest.hex(), "anchors": checked}
    return Output(data, "\n".join(_lines(count, digest, checked)), EXIT_FAILED if wrong else EXIT_OK)


def _checked(context: Context, row: Any, hashes: list[str]) -> dict[str, Any]:  # noqa: ANN401 - a row, see above
    found = {"row": 0, "hash": row.target, "at_ms": row.created_at_ms, "peer_id": "", "entry": ""}
    try:
        detail = json.loads(row.detail)
        place, by, entry = int(detail["place"]), str(detail["peer_id"]), str(detail["entry"])
        signature = str(detail["signature"])
    except (ValueError, KeyError, TypeError):
        return {**found, "problem": f"row {row.place} says it is an anchor, and is none"}
    problem = _problem(context, row.target, place, by, entry, signature, hashes)
    return {**found, "row": place, "peer_id": by, "entry": entry, "problem": problem}


def _problem(context: Context, digest: str, place: int, by: str, entry: str, signature: str, hashes: list[str]) -> str:
    if not _HASH.fullmatch(digest) or not 0 < place <= len(hashes) or hashes[place - 1] != digest:
        return f"row {place} has another hash than the one that was anchored"
    if not is_signed(place, bytes.fromhex(digest), by, signature):
        return "the signature of the anchor is wrong"
    return _entry_problem(context, digest, by, entry) if entry else ""


def _entry_problem(context: Context, digest: str, by: str, entry: str) -> str:
    try:
        found = find_entry(context, entry)
    except RiosError as error:
        return f"its ledger entry {entry[:80]} is not found: {error.message}"
    paid = any(op["op"] == "transfer" and op["to"] == peer_id_of(bytes.fromhex(digest)) for op in found.get("ops", ()))
    if not paid or found["account"] != by or not found["certificate"]["valid"]:
        return f"the ledger entry {entry[:80]} does not carry this hash"
    return ""


def _lines(count: int, digest: bytes, anchors: list[dict[str, Any]]) -> list[str]:
    lines = [f"{count} rows, every hash as it must be; head {digest.hex()}"]
    for each in [each for each in anchors if each["problem"]]:
        lines.append(f"  ANCHOR of row {each['row']}: {each['problem']}")
    if not anchors:
        return [*lines, "  not anchored yet: a gateway does it once a day"]
    last = anchors[-1]
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(last["at_ms"] / 1000))
    where = f"ledger entry {last['entry']}" if last["entry"] else "signed only, not on a ledger"
    return [*lines, f"  {len(anchors)} anchors; the newest of row {last['row']}, {when}, by {last['peer_id']}: {where}"]
