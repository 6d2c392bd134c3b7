"""Batches: what is asked line by line, answered and charged exactly once, whichever gateway lives.

Blocking calls on the accounts database. Owns a batch's states and its lines; running a line is ``runner``'s.

``validating`` -> ``in_progress`` -> ``finalizing`` -> ``completed``; from the first two also ``cancelling`` ->
``cancelled``, ``failed`` (the input is no batch), ``expired`` (its window is over).

Invariants:
1. One worker of one gateway works on a batch at a time: who takes it holds it for :data:`HOLD_MS` and moves that on
   while it works. Whoever lost it cannot write its lines any more.
2. A line is answered once: its answer is written only over none.
3. Of a batch that began, each line stands in one of its files: without an answer at the end, in that of the errors.
"""

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import msgspec
import sqlalchemy as sa

from gateway import events
from gateway.db.jobs import batch_lines, batches, files
from gateway.db.models import idempotency
from gateway.db.session import Database
from gateway.db.stamps import new_id, now_ms
from gateway.errors import ApiError, invalid
from gateway.jobs.files import Upload, delete_file, lines_of, lock_files, read_chunk, require_room

HOLD_MS = 15_000
LINES_MAX = 50_000
LINE_BYTES_MAX = 1 << 20
ERRORS_MAX = 50
OPEN_MAX = 50
"""Batches of a user that have not ended, or failed a moment ago: reading their inputs costs the user nothing."""
FAILED_MINUTES = 10
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
_WINDOW_MS = {"24h": 24 * 3600 * 1000}
_LINES_AT_ONCE = 200
_ANSWERS_AT_ONCE = 20
"""An answer may be large."""
_TOKEN_BYTES = 12
_HOLDER_CHARACTERS = 64
LIVE = ("validating", "in_progress", "finalizing", "cancelling")
_UNANSWERED = {
    "expired": {"code": "batch_expired", "message": "the batch's time was over before this line was answered"},
    "cancelled": {"code": "batch_cancelled", "message": "the batch was cancelled before this line was answered"},
}
"""How a batch ends before its lines do, and what they are told then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A row of ``batches``."""

    id: str
    user_id: str
    key_id: str | None
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: str
    status: str
    errors: str
    output_file_id: str | None
    error_file_id: str | None
    total: int
    completed: int
    failed: int
    holder: str
    held_until_ms: int
    created_at_ms: int
    expires_at_ms: int
    in_progress_at_ms: int | None
    finalizing_at_ms: int | None
    cancelling_at_ms: int | None
    ended_at_ms: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A request of a batch that has no answer yet. Equal to no other: batches of one file have the same ones."""

    place: int
    custom_id: str
    body: bytes


class LineForm(msgspec.Struct):
    """A line of the input file."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


# --- what users do


def create(
    database: Database,
    *,
    user_id: str,
    key_id: str | None,
    file_id: str,
    endpoint: str,
    window: str,
    metadata: str,
) -> Batch:
    """Raises ApiError: ``not_found`` (no such file of this user), ``invalid_request``, ``conflict`` (too many, or the
    user's files are)."""
    if endpoint not in ENDPOINTS:
        raise invalid("endpoint", f"endpoint is one of {', '.join(ENDPOINTS)}")
    if window not in _WINDOW_MS:
        raise invalid("completion_window", f"completion_window is {' or '.join(_WINDOW_MS)}")
    now = now_ms()
    with database.write() as connection:
        count, size = lock_files(connection, user_id)  # first: of two at once the second sees the first
        query = sa.select(files.c.user_id, files.c.purpose).where(
            files.c.id == file_id, files.c.complete.is_(sa.true())
        )
        found = connection.execute(query).first()
        if found is None or found.user_id != user_id:
            raise ApiError(
                "not_found", f"there is no file {file_id!r:.80}", param="input_file_id", public_code="not_found"
            )
        if found.purpose != "batch":
            raise invalid("input_file_id", f"the purpose of this file is {found.purpose}, not batch")
        failed = sa.and_(batches.c.status == "failed", batches.c.ended_at_ms > now - FAILED_MINUTES * 60_000)
        mine = batches.c.user_id == user_id, sa.or_(batches.c.status.in_(LIVE), failed)
        if connection.execute(sa.select(sa.func.count()).where(*mine)).scalar_one() >= OPEN_MAX:
            most = f"a user has {OPEN_MAX} batches at most that are open or failed in the last {FAILED_MINUTES} minutes"
            raise ApiError("conflict", most, "wait for one to end")
        require_room(count, size + _open_bytes(connection, user_id))
        row = {
            "id": f"batch_{new_id()}",
            "user_id": user_id,
            "key_id": key_id,
            "endpoint": endpoint,
            "input_file_id": file_id,
            "completion_window": window,
            "metadata": metadata,
            "status": "validating",
            "errors": "[]",
            "total": 0,
            "completed": 0,
            "failed": 0,
            "holder": "",
            "held_until_ms": 0,
            "created_at_ms": now,
            "expires_at_ms": now + _WINDOW_MS[window],
        }
        connection.execute(sa.insert(batches), row)
        return _told(connection, str(row["id"]))


def _open_bytes(connection: sa.Connection, user_id: str) -> int:
    """The inputs that a user's open batches have read, or will: their lines are copies."""
    reads = sa.and_(batches.c.input_file_id == files.c.id, batches.c.user_id == user_id, batches.c.status.in_(LIVE))
    total = sa.select(sa.func.coalesce(sa.func.sum(files.c.bytes), 0)).select_from(files.join(batches, reads))
    return int(connection.execute(total).scalar_one())


def list_batches(database: Database, *, owner: str | None, limit: int, after: str) -> Sequence[Batch]:
    """Newest first: the owner's, or all."""
    query = sa.select(batches).order_by(batches.c.id.desc()).limit(limit)
    if owner is not None:
        query = query.where(batches.c.user_id == owner)
    if after:
        query = query.where(batches.c.id < after)
    with database.read() as connection:
        return [Batch(**row) for row in connection.execute(query).mappings()]


def get(database: Database, batch_id: str, owner: str | None) -> Batch:
    """Raises ApiError ``not_found``, also for batches out of reach."""
    with database.read() as connection:
        return _batch(connection, batch_id, owner)


def cancel(database: Database, batch_id: str, owner: str | None) -> Batch:
    """What is answered stays. Raises ApiError ``not_found``, ``conflict`` for one that has ended."""
    with database.write() as connection:
        batch = _batch(connection, batch_id, owner, lock=True)
        if batch.status in ("validating", "in_progress"):
            values = {"status": "cancelling", "cancelling_at_ms": now_ms()}
            connection.execute(sa.update(batches).where(batches.c.id == batch_id).values(**values))
            return _told(connection, batch_id)
        if batch.status != "cancelling":
            raise ApiError("conflict", f"this batch is {batch.status} already")
        return _batch(connection, batch_id, owner)


# --- what the gateway that works on one does


def claim(database: Database, instance: str) -> Batch | None:
    """Take a batch that nobody works on: of the user with the fewest that are worked on, then the one let go longest
    ago, then the oldest. Each claim holds under a name of its own: another of the same gateway, after a suspend or a
    step of the clock, is another holder."""
    holder, now = f"{_held_by(instance)}{secrets.token_hex(_TOKEN_BYTES)}", database.now_ms()
    turns = _at_work(batches.c.user_id, now), batches.c.held_until_ms, batches.c.created_at_ms
    query = sa.select(batches.c.id).where(_free(batches, now)).order_by(*turns).limit(1)
    with database.write() as connection:
        found = connection.execute(query.with_for_update(skip_locked=True, of=batches)).scalar()
        if found is None:
            return None
        values = {"holder": holder, "held_until_ms": now + HOLD_MS}
        connection.execute(sa.update(batches).where(batches.c.id == found).values(**values))
        return _batch(connection, found, None)


def hold(database: Database, batch: Batch) -> Batch | None:
    """Go on holding a batch, and see how it stands; None if it was lost."""
    mine = batches.c.id == batch.id, batches.c.holder == batch.holder
    with database.write() as connection:
        changed = connection.execute(sa.update(batches).where(*mine).values(held_until_ms=database.now_ms() + HOLD_MS))
        return _batch(connection, batch.id, None) if changed.rowcount else None


def _free(table: sa.FromClause, now: int) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.status.in_(LIVE), table.c.held_until_ms < now)


def _at_work(user_id: sa.ColumnElement[str] | str, now: int) -> sa.ScalarSelect[int]:
    """How many of a user's batches somebody works on."""
    held = batches.alias("held")
    its = held.c.status.in_(LIVE), held.c.held_until_ms >= now, held.c.user_id == user_id
    return sa.select(sa.func.count()).select_from(held).where(*its).scalar_subquery()


def somebody_waits(database: Database, batch: Batch) -> bool:
    """Whether a user has a batch that nobody works on, and fewer at work than the user of this one."""
    now, waiting = database.now_ms(), batches.alias("waiting")
    less = _at_work(waiting.c.user_id, now) < _at_work(batch.user_id, now)
    with database.read() as connection:
        return bool(connection.execute(sa.select(sa.exists().where(_free(waiting, now), less))).scalar())


def let_go(database: Database, batch: Batch) -> None:
    """Another worker may go on with it at once."""
    mine = batches.c.id == batch.id, batches.c.holder == batch.holder
    with database.write() as connection:
        connection.execute(sa.update(batches).where(*mine).values(holder="", held_until_ms=database.now_ms() - 1))


def let_all_go(database: Database, instance: str) -> None:
    """What a gateway held in an earlier life is free."""
    its = batches.c.holder.startswith(_held_by(instance), autoescape=True)
    with database.write() as connection:
        connection.execute(sa.update(batches).where(its).values(holder="", held_until_ms=0))


def _held_by(instance: str) -> str:
    """How the names of a gateway's claims begin; they fit their column."""
    return f"{instance[: _HOLDER_CHARACTERS - 2 * _TOKEN_BYTES - 1]}:"


def validate(database: Database, batch: Batch) -> Batch | None:
    """Read the input into lines, or say what is wrong with it. None if the batch was lost, or cancelled meanwhile.

    Looked at once as a whole, then written some lines at a time, so that no booking waits long for the database.
    """
    errors, total = _check(_lines(database, batch), batch.endpoint)
    if not errors and not _write_lines(database, batch):
        return None
    values: dict[str, Any] = {"status": "in_progress", "total": total, "in_progress_at_ms": now_ms()}
    if errors:
        values = {"status": "failed", "errors": json.dumps(errors), "ended_at_ms": now_ms(), "held_until_ms": 0}
    open_ones = batches.c.id == batch.id, batches.c.status == "validating"  # or else it was cancelled meanwhile
    with database.write() as connection:
        if not _is_mine(connection, batch):
            return None
        if not connection.execute(sa.update(batches).where(*open_ones).values(**values)).rowcount:
            return _batch(connection, batch.id, None)
        return _told(connection, batch.id)


def _lines(database: Database, batch: Batch) -> Iterator[tuple[int, bytes | None]]:
    return lines_of(partial(read_chunk, database, batch.input_file_id), LINE_BYTES_MAX)


def _check(found: Iterator[tuple[int, bytes | None]], endpoint: str) -> tuple[list[dict[str, Any]], int]:
    """What is wrong with the input, and how many lines it has."""
    errors: list[dict[str, Any]] = []
    seen: set[bytes] = set()
    for number, text in found:
        if len(errors) >= ERRORS_MAX:
            break
        if len(seen) >= LINES_MAX:
            errors.append(_error("too_many_lines", number, f"a batch has {LINES_MAX} lines at most", None))
            break
        problem = _problem(text, endpoint, seen)
        if isinstance(problem, LineForm):
            seen.add(_short(problem.custom_id))
        else:
            errors.append(_error(problem[0], number, problem[1], problem[2]))
    if not errors and not seen:
        errors.append(_error("empty_file", None, "the input file has no lines", None))
    return errors, len(seen)


def _write_lines(database: Database, batch: Batch) -> bool:
    """The lines of a checked input, over what an earlier try left; false if the batch was lost, or cancelled."""
    with database.write() as connection:
        # Who has it now may have answers in these lines, and they are paid.
        if not _is_mine(connection, batch, status="validating"):
            return False
        connection.execute(sa.delete(batch_lines).where(batch_lines.c.batch_id == batch.id))
    found = _lines(database, batch)
    while some := list(islice(found, _LINES_AT_ONCE)):
        forms = ((number, msgspec.json.decode(text or b"", type=LineForm)) for number, text in some)
        lines = [Line(number, form.custom_id, bytes(form.body)) for number, form in forms]
        with database.write() as connection:
            if not _is_mine(connection, batch):
                return False
            connection.execute(
                sa.insert(batch_lines), [{"batch_id": batch.id, "status": 0, **asdict(line)} for line in lines]
            )
    return True


def _short(custom_id: str) -> bytes:
    """Enough of a custom id to tell it from others, in little memory."""
    return hashlib.sha256(custom_id.encode("utf-8", "surrogatepass")).digest()[:16]


def _problem(text: bytes | None, endpoint: str, seen: set[bytes]) -> LineForm | tuple[str, str, str | None]:
    """A line, or code, message and field of what is wrong with it."""
    if text is None or len(text) > LINE_BYTES_MAX:
        return "line_too_long", f"a line has {LINE_BYTES_MAX} bytes at most", None
    try:
        form = msgspec.json.decode(text, type=LineForm)
        msgspec.json.decode(form.body, type=dict)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return "invalid_json_line", f"this line is no request: {error}", None
    if not 1 <= len(form.custom_id) <= 512 or "\0" in form.custom_id:  # which PostgreSQL does not take
        return "invalid_custom_id", "custom_id has 1 to 512 characters, none of them NUL", "custom_id"
    if _short(form.custom_id) in seen:
        return "duplicate_custom_id", f"custom_id {form.custom_id!r:.80} was used before", "custom_id"
    if form.method != "POST":
        return "invalid_method", f"method is POST, not {form.method!r:.20}", "method"
    if form.url != endpoint:
        return "mismatched_url", f"url is {endpoint}, as the batch says, not {form.url!r:.80}", "url"
    return form


def _error(code: str, line: int | None, message: str, param: str | None) -> dict[str, Any]:
    return {"code": code, "line": line, "message": message, "param": param}


def waiting(database: Database, batch: Batch, limit: int) -> Sequence[Line]:
    """The next lines without an answer."""
    columns = batch_lines.c.place, batch_lines.c.custom_id, batch_lines.c.body
    open_ones = batch_lines.c.batch_id == batch.id, batch_lines.c.status == 0
    query = sa.select(*columns).where(*open_ones).order_by(batch_lines.c.place).limit(limit)
    with database.read() as connection:
        return [Line(place, custom_id, bytes(body)) for place, custom_id, body in connection.execute(query)]


def answered(database: Database, batch: Batch, line: Line, status: int, answer: bytes, *, key: str) -> bool:
    """Write a line's answer, and forget its idempotency key; false if the batch was lost."""
    with database.write() as connection:
        if not _is_mine(connection, batch):
            return False
        which = batch_lines.c.batch_id == batch.id, batch_lines.c.place == line.place, batch_lines.c.status == 0
        changed = connection.execute(sa.update(batch_lines).where(*which).values(status=status, answer=answer))
        if changed.rowcount:
            count = batches.c.completed if status == 200 else batches.c.failed
            connection.execute(sa.update(batches).where(batches.c.id == batch.id).values({count: count + 1}))
        if key:
            connection.execute(sa.delete(idempotency).where(idempotency.c.id == key, idempotency.c.status != 0))
        return True


def finish(database: Database, batch: Batch, status: str) -> Batch | None:
    """Write output and error file, piece by piece; ``status`` is how it ended. None if the batch was lost."""
    rest = _count_unanswered(database, batch) if status in _UNANSWERED else 0
    made: dict[str, Any] = {}
    for name, good in (("output_file_id", True), ("error_file_id", False)):
        upload = Upload(database, batch.user_id)
        for answer in _answers(database, batch, good=good, unanswered=_UNANSWERED[status] if rest else None):
            upload.write(answer)
        if upload.size:
            filename = f"{batch.id}_{'output' if good else 'error'}.jsonl"
            made[name] = upload.finish(filename, "batch_output").id
        else:
            upload.drop()
    values = {**made, "status": status, "ended_at_ms": now_ms(), "held_until_ms": 0, "holder": ""}
    values["failed"] = batches.c.failed + rest
    with database.write() as connection:
        if _is_mine(connection, batch):
            connection.execute(sa.delete(batch_lines).where(batch_lines.c.batch_id == batch.id))
            connection.execute(sa.update(batches).where(batches.c.id == batch.id).values(**values))
            return _told(connection, batch.id)
    for file_id in made.values():  # who has the batch now writes its own
        delete_file(database, file_id, batch.user_id)
    return None


def _count_unanswered(database: Database, batch: Batch) -> int:
    open_ones = batch_lines.c.batch_id == batch.id, batch_lines.c.status == 0
    with database.read() as connection:
        if _batch(connection, batch.id, None).in_progress_at_ms is None:
            return 0  # its total is none, and its input may be read in part
        return connection.execute(sa.select(sa.func.count()).where(*open_ones)).scalar_one()


def set_finalizing(database: Database, batch: Batch) -> None:
    """All lines have answers; the files are being written."""
    which = batches.c.id == batch.id, batches.c.holder == batch.holder, batches.c.status == "in_progress"
    with database.write() as connection:
        values = {"status": "finalizing", "finalizing_at_ms": now_ms()}
        if connection.execute(sa.update(batches).where(*which).values(**values)).rowcount:
            _told(connection, batch.id)


def _told(connection: sa.Connection, batch_id: str) -> Batch:
    """A batch whose status has changed; those who listen learn of it."""
    batch = _batch(connection, batch_id, None)
    names = ("id", "status", "endpoint", "total", "completed", "failed", "output_file_id", "error_file_id")
    events.record(connection, f"batch.{batch.status}", batch.user_id, {name: getattr(batch, name) for name in names})
    return batch


def _answers(database: Database, batch: Batch, *, good: bool, unanswered: Mapping[str, str] | None) -> Iterator[bytes]:
    """The lines of the output file, or of that of the errors; ``unanswered``: the error of those without an answer."""
    place = 0
    kind = batch_lines.c.status == 200 if good else batch_lines.c.status != 200
    if unanswered is None:
        kind = sa.and_(kind, batch_lines.c.status != 0)
    columns = batch_lines.c.place, batch_lines.c.custom_id, batch_lines.c.status, batch_lines.c.answer
    query = sa.select(*columns).where(batch_lines.c.batch_id == batch.id, kind).order_by(batch_lines.c.place)
    while True:
        with database.read() as connection:
            rows = connection.execute(query.where(batch_lines.c.place > place).limit(_ANSWERS_AT_ONCE)).all()
        if not rows:
            return
        for row in rows:
            place, value = row.place, {"id": f"{batch.id}_{row.place}", "custom_id": row.custom_id}
            if row.status:
                name, body = request_id(batch.id, place), msgspec.Raw(row.answer)
                value |= {"response": {"status_code": row.status, "request_id": name, "body": body}, "error": None}
            else:
                value |= {"response": None, "error": unanswered}
            yield msgspec.json.encode(value) + b"\n"


def request_id(batch_id: str, place: int) -> str:
    """What a line's request is called in usage rows and logs. Clients cannot call theirs so: a slash is not taken."""
    return f"{batch_id}/{place}"


def _is_mine(connection: sa.Connection, batch: Batch, *, status: str = "") -> bool:
    """Whether it is held as ``batch`` says, and in this status if one is given."""
    query = sa.select(batches.c.holder, batches.c.status).where(batches.c.id == batch.id).with_for_update()
    row = connection.execute(query).first()
    return row is not None and row.holder == batch.holder and status in ("", row.status)


def _batch(connection: sa.Connection, batch_id: str, owner: str | None, *, lock: bool = False) -> Batch:
    query = sa.select(batches).where(batches.c.id == batch_id)
    row = connection.execute(query.with_for_update() if lock else query).mappings().first()
    if row is None or owner not in (None, row["user_id"]):
        raise ApiError("not_found", f"there is no batch {batch_id!r:.80}", public_code="not_found")
    return Batch(**row)
