"""Files and batches, with OpenAI's own client, on both databases; a gateway that dies in the middle of a batch."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import openai
import pytest
import sqlalchemy as sa
import trio
from fake_engine import ANSWER, FakeEngine
from gateway_rig import Rig, serving
from test_rights import client, key_of

from config.errors import BusyError, LocalError
from gateway import books
from gateway.audit import OPERATOR
from gateway.billing import budgets
from gateway.db import stamps
from gateway.db.jobs import batch_lines, file_chunks
from gateway.db.models import idempotency, usages
from gateway.db.session import Database
from gateway.jobs import batches, files
from gateway.money import Refused

CHAT, EMBED = "/v1/chat/completions", "/v1/embeddings"
TEXT = "".join(ANSWER)


def line(number: int, url: str = CHAT, **body: object) -> bytes:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": f"question {number}"}], **body}
    if url == EMBED:
        asked = {"model": "tiny", "input": "two words", **body}
    return json.dumps({"custom_id": f"c{number}", "method": "POST", "url": url, "body": asked}).encode()


def upload(api: openai.OpenAI, data: bytes, purpose: str = "batch") -> str:
    return api.files.create(file=("lines.jsonl", io.BytesIO(data)), purpose=purpose).id  # type: ignore[arg-type]


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    with trio.fail_after(20):
        while not await condition():  # noqa: ASYNC110 - it looks at what tells nobody
            await trio.sleep(0.03)


async def ended(rig: Rig, batch_id: str, seconds: float = 30) -> object:
    with trio.fail_after(seconds):
        while True:
            batch = await rig.with_openai(lambda api: api.batches.retrieve(batch_id))
            if batch.status in ("completed", "failed", "cancelled", "expired"):
                return batch
            await trio.sleep(0.05)


async def rows(rig: Rig, query: sa.Select) -> list:
    def fetch() -> list:
        with rig.accounts.database.read() as connection:
            return list(connection.execute(query).mappings())

    return await trio.to_thread.run_sync(fetch)


async def test_a_file_goes_in_and_comes_back(tmp_path: Path, database: str) -> None:
    data = bytes(range(256)) * 4000  # four pieces
    async with serving(tmp_path, database=database) as rig:

        def use(api: openai.OpenAI) -> None:
            made = api.files.create(file=("../über.bin", io.BytesIO(data)), purpose="user_data")
            assert (made.bytes, made.filename, made.purpose) == (len(data), "über.bin", "user_data")
            assert api.files.retrieve(made.id) == made
            assert api.files.content(made.id).read() == data
            other = upload(api, b"{}\n")
            assert [file.id for file in api.files.list()] == [other, made.id]
            assert [file.id for file in api.files.list(order="asc", limit=1)] == [made.id, other]
            assert [file.id for file in api.files.list(purpose="batch")] == [other]
            assert api.files.delete(made.id).deleted
            with pytest.raises(openai.NotFoundError):
                api.files.content(made.id)

        await rig.with_openai(use)
        assert len(await rows(rig, sa.select(file_chunks.c.place))) == 1
        async with client(rig, await key_of(rig, "bob")) as bob:
            (mine,) = await rig.with_openai(lambda api: list(api.files.list()))
            for path in (f"/v1/files/{mine.id}", f"/v1/files/{mine.id}/content"):
                assert (await bob.get(path)).status_code == 404
            assert (await bob.delete(f"/v1/files/{mine.id}")).status_code == 404
            stolen = {"input_file_id": mine.id, "endpoint": CHAT, "completion_window": "24h"}
            assert (await bob.post("/v1/batches", json=stolen)).status_code == 404


async def test_a_batch_is_answered_line_by_line_and_charged_once(tmp_path: Path, database: str) -> None:
    lines = [
        line(1),
        b"",
        line(2, max_tokens=2),
        line(3, model="nowhere"),
        line(4, temperature=9),
        line(5, stream=True),
    ]
    async with serving(tmp_path, database=database) as rig:

        def begin(api: openai.OpenAI) -> str:
            file = upload(api, b"\n".join(lines))
            made = api.batches.create(
                input_file_id=file, endpoint=CHAT, completion_window="24h", metadata={"for": "a test"}
            )
            assert made.status == "validating"
            return made.id

        batch = await ended(rig, await rig.with_openai(begin))
        assert (batch.status, batch.metadata) == ("completed", {"for": "a test"})
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (5, 2, 3)

        def results(api: openai.OpenAI) -> list[dict[str, dict]]:
            texts = (api.files.content(name).text for name in (batch.output_file_id, batch.error_file_id))
            return [{row["custom_id"]: row["response"] for row in map(json.loads, t.splitlines())} for t in texts]

        good, bad = await rig.with_openai(results)
        assert good["c1"]["body"]["choices"][0]["message"]["content"] == TEXT
        assert good["c2"]["body"]["usage"]["completion_tokens"] == 2
        assert {name: (row["status_code"], row["body"]["error"]["param"]) for name, row in bad.items()} == {
            "c3": (404, "model"),
            "c4": (400, "temperature"),
            "c5": (400, "stream"),
        }
        charged = await rows(rig, sa.select(usages))
        assert sorted(row["request_id"] for row in charged) == [f"{batch.id}/1", f"{batch.id}/3"]
        assert (await rig.balance()).balance == 1_000_000 - sum(row["microcredits"] for row in charged)
        assert await rows(rig, sa.select(batch_lines.c.place)) == []
        assert await rows(rig, sa.select(idempotency.c.id)) == []


@pytest.mark.parametrize(
    ("data", "code", "number"),
    [
        (b"", "empty_file", None),
        (line(1) + b"\nnot json\n", "invalid_json_line", 2),
        (b"[" * 100_000, "invalid_json_line", 1),
        (line(1) + b"\n\n" + line(1), "duplicate_custom_id", 3),
        (line(1, EMBED), "mismatched_url", 1),
        (b'{"custom_id": "", "url": "/v1/chat/completions", "body": {}}', "invalid_custom_id", 1),
        (b'{"custom_id": "x", "url": "/v1/chat/completions", "body": []}', "invalid_json_line", 1),
        (line(1).replace(b"c1", b"c\\u0000"), "invalid_custom_id", 1),
        (b'"' + b"x" * (2 << 20), "line_too_long", 1),
        (b"\xff\xfe\n", "invalid_json_line", 1),
    ],
)
async def test_an_input_that_is_no_batch_fails_as_a_whole(tmp_path: Path, data: bytes, code: str, number: int) -> None:
    async with serving(tmp_path) as rig:

        def begin(api: openai.OpenAI) -> str:
            return api.batches.create(input_file_id=upload(api, data), endpoint=CHAT, completion_window="24h").id

        batch = await ended(rig, await rig.with_openai(begin))
        assert batch.status == "failed"
        assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, number)
        assert (await rig.balance()).balance == 1_000_000


async def test_vectors_and_completions_come_in_batches_too(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:

        def begin(api: openai.OpenAI) -> list[str]:
            vectors = upload(api, b"\n".join(line(number, EMBED) for number in range(3)))
            ask = {"custom_id": "x", "url": "/v1/completions", "body": {"model": "tiny", "prompt": "once upon"}}
            texts = upload(api, json.dumps(ask).encode())
            pairs = ((vectors, EMBED), (texts, "/v1/completions"))
            return [
                api.batches.create(input_file_id=f, endpoint=e, completion_window="24h").id  # type: ignore[arg-type]
                for f, e in pairs
            ]

        done = [await ended(rig, name) for name in await rig.with_openai(begin)]
        assert [batch.request_counts.completed for batch in done] == [3, 1]
        outputs = await rig.with_openai(lambda api: [api.files.content(batch.output_file_id).text for batch in done])
        assert json.loads(outputs[0].splitlines()[0])["response"]["body"]["data"][0]["embedding"] == [1.0, 0.0]
        assert json.loads(outputs[1])["response"]["body"]["choices"][0]["text"] == TEXT


async def test_batches_of_the_same_file_run_side_by_side(tmp_path: Path) -> None:
    async with serving(tmp_path, engine=FakeEngine(pause_seconds=0.03)) as rig:

        def begin(api: openai.OpenAI) -> list[str]:
            file = upload(api, b"\n".join(line(number) for number in range(4)))
            return [api.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h").id for _ in range(2)]

        done = [await ended(rig, name) for name in await rig.with_openai(begin)]
        assert [batch.request_counts.completed for batch in done] == [4, 4]


async def test_a_cancelled_batch_keeps_what_was_answered(tmp_path: Path, database: str) -> None:
    engine = FakeEngine(pause_seconds=0.03)
    async with serving(tmp_path, database=database, engine=engine, batch_lines_at_once=1) as rig:

        def begin(api: openai.OpenAI) -> str:
            file = upload(api, b"\n".join(line(number) for number in range(200)))
            return api.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h").id

        name = await rig.with_openai(begin)
        await until(lambda: rig.with_openai(lambda api: api.batches.retrieve(name).request_counts.completed))
        await rig.with_openai(lambda api: api.batches.cancel(name))
        batch = await ended(rig, name)
        assert batch.status == "cancelled"
        text = await rig.with_openai(lambda api: api.files.content(batch.output_file_id).text)
        assert len(text.splitlines()) == batch.request_counts.completed < 200
        rest = (await rig.with_openai(lambda api: api.files.content(batch.error_file_id).text)).splitlines()
        assert {json.loads(each)["error"]["code"] for each in rest} == {"batch_cancelled"}
        assert len(rest) == batch.request_counts.failed == 200 - batch.request_counts.completed
        assert (await rig.balance()).reserved == 0


async def test_a_batch_whose_time_is_over_ends_whatever_state_it_is_in(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_given: object) -> None:
        raise LocalError("local", "its lines cannot be written")

    monkeypatch.setattr("gateway.jobs.batches.validate", fail)
    monkeypatch.setattr("gateway.jobs.batches._WINDOW_MS", {"24h": 500})
    monkeypatch.setattr("gateway.jobs.runner._PAUSE_SECONDS", 0.05)
    async with serving(tmp_path, database=database) as rig:

        def begin(api: openai.OpenAI) -> str:
            return api.batches.create(input_file_id=upload(api, line(1)), endpoint=CHAT, completion_window="24h").id

        assert (await ended(rig, await rig.with_openai(begin))).status == "expired"
        assert (await rig.balance()).balance == 1_000_000


async def test_what_cannot_be_answered_now_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.jobs.runner._PAUSE_SECONDS", 0.05)
    engine = FakeEngine(fail_at=1, error=BusyError("no room", retry_after_ms=10))
    async with serving(tmp_path, engine=engine) as rig:

        def begin(api: openai.OpenAI) -> str:
            return api.batches.create(input_file_id=upload(api, line(1)), endpoint=CHAT, completion_window="24h").id

        name = await rig.with_openai(begin)
        with trio.fail_after(10):
            while len(engine.requests) < 3:  # noqa: ASYNC110 - the fake tells nobody
                await trio.sleep(0.01)
        engine.fail_at = None
        assert (await ended(rig, name)).request_counts.completed == 1


async def test_a_batch_keeps_to_the_limits_of_its_key(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig:
        key, data = rig.key.split("_")[1], b"\n".join(line(n, max_tokens=8) for n in range(12))
        set_limits = partial(budgets.set_key_limits, rig.accounts.database, OPERATOR, key, 0, 20)
        await trio.to_thread.run_sync(set_limits)

        def begin(api: openai.OpenAI) -> str:
            return api.batches.create(input_file_id=upload(api, data), endpoint=CHAT, completion_window="24h").id

        name = await rig.with_openai(begin)
        with trio.fail_after(20):
            while not rig.engine.produced:  # noqa: ASYNC110 - the fake tells nobody
                await trio.sleep(0.01)
        await trio.sleep(1.5)
        assert rig.engine.produced <= 2 * len(ANSWER)  # a line may take 10 tokens
        async with rig.http() as http:
            answer = await http.post(CHAT, json=json.loads(line(1, max_tokens=8))["body"])
        assert (answer.status_code, answer.headers["x-ratelimit-limit-tokens"]) == (429, "20")
        await rig.with_openai(lambda api: api.batches.cancel(name))


async def test_forms_that_are_none_and_files_that_are_too_large(tmp_path: Path) -> None:
    async with serving(tmp_path, file_bytes_max=100_000) as rig, rig.http() as http:

        async def post(data: bytes, kind: str = 'multipart/form-data; boundary="b"') -> tuple[int, str | None]:
            answer = await http.post("/v1/files", content=data, headers={"content-type": kind})
            return answer.status_code, answer.json()["error"]["param"]

        head = b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'
        end = b"\r\n--b--\r\n"
        purpose = b'\r\n--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\n'
        assert await post(b"{}", "application/json") == (400, None)
        assert await post(b"no form at all") == (400, None)
        assert await post(head + b"data") == (400, None)
        assert await post(b"--b--\r\n") == (400, "file")
        assert await post(head + b"data" + end) == (400, "purpose")
        assert await post(head + b"data" + purpose + b"nonsense" + end) == (400, "purpose")
        assert await post(head + b"data" + purpose + b"x" * 5000 + end) == (400, None)
        assert (await post(head + b"x" * 150_000 + purpose + b"batch" + end))[0] == 413
        assert (await post(head + b"x" * 500_000 + purpose + b"batch" + end))[0] == 413
        assert (await http.get("/v1/files")).json()["data"] == []
        assert await rows(rig, sa.select(file_chunks.c.place)) == []


async def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        stream = await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port)
        head = f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {rig.key}\r\ncontent-length: 900000\r\n"
        head += 'content-type: multipart/form-data; boundary="b"\r\n\r\n'
        part = b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'
        await stream.send_all(head.encode() + part + bytes(600_000))
        await until(lambda: rows(rig, sa.select(file_chunks.c.place)))
        await stream.aclose()

        async def gone() -> bool:
            return not await rows(rig, sa.select(file_chunks.c.place))

        await until(gone)
        await trio.to_thread.run_sync(files.sweep, rig.accounts.database)


async def test_a_batch_survives_the_gateway_that_worked_on_it(tmp_path: Path, database: str) -> None:
    program = Path(__file__).with_name("gateway_process.py")
    command = [sys.executable, str(program), str(tmp_path), database]
    count = 30
    started = await trio.to_thread.run_sync(
        lambda: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    )
    try:
        assert started.stdout is not None
        port, key = (await trio.to_thread.run_sync(started.stdout.readline)).decode().split()

        def begin() -> str:
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0) as api:
                few = b"\n".join(line(number, max_tokens=3) for number in range(count))
                hanging = b"\n".join(line(number) for number in range(count, count + 8))
                file = upload(api, few + b"\n" + hanging)
                made = api.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h").id
                while (batch := api.batches.retrieve(made)).request_counts.completed < count // 2:
                    time.sleep(0.05)  # the last lines hang at their fourth token
                assert batch.status == "in_progress"
                assert batch.request_counts.completed <= count
                return made

        with trio.fail_after(30):
            name = await trio.to_thread.run_sync(begin, abandon_on_cancel=True)
    finally:
        started.kill()
        started.communicate()
    async with serving(tmp_path, database=database) as rig:
        batch = await ended(rig, name, 60)
        assert batch.request_counts.completed == count + 8
        text = await rig.with_openai(lambda api: api.files.content(batch.output_file_id).text)
        assert len({json.loads(row)["custom_id"] for row in text.splitlines()}) == count + 8
        charged = [row for row in await rows(rig, sa.select(usages)) if row["microcredits"]]
        assert len(charged) == len({row["request_id"] for row in charged}) == count + 8
        paid = 1_000_000 - (await rig.balance()).balance
        assert paid == sum(row["microcredits"] for row in charged)


async def vectors_once(rig: Rig, count: int = 1) -> None:
    """A batch of lines for vectors ends well, and each was paid once."""

    def begin(api: openai.OpenAI) -> str:
        file = upload(api, b"\n".join(line(number, EMBED) for number in range(count)))
        return api.batches.create(input_file_id=file, endpoint=EMBED, completion_window="24h").id

    batch = await ended(rig, await rig.with_openai(begin))
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", count, 0)
    balance = await rig.balance()
    assert (balance.balance, balance.reserved) == (1_000_000 - 2 * count, 0)
    charged = [row["request_id"] for row in await rows(rig, sa.select(usages)) if row["microcredits"]]
    assert sorted(charged) == [f"{batch.id}/{place}" for place in range(1, count + 1)]


@pytest.mark.parametrize("code", ["unavailable", "disk_full", "local"])
async def test_vectors_whose_answer_could_not_be_noted_are_paid_once(
    tmp_path: Path, database: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.jobs.runner._PAUSE_SECONDS", 0.05)
    note, failures = batches.answered, [LocalError(code, "it cannot be noted") for _ in range(3)]
    monkeypatch.setattr("gateway.jobs.batches.now_ms", lambda: stamps.now_ms() + 60_000)  # by the clock of another host

    def answered(*arguments: object, **more: object) -> bool:
        if failures:
            raise failures.pop()
        return note(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("gateway.jobs.batches.answered", answered)
    async with serving(tmp_path, database=database) as rig:
        await vectors_once(rig, count=2)


@pytest.mark.parametrize("code", ["unavailable", "disk_full"])
async def test_vectors_whose_charge_is_booked_late_are_paid_once(
    tmp_path: Path, database: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.jobs.runner._PAUSE_SECONDS", 0.05)
    write, failures = books.write_batch, [LocalError(code, "it cannot be booked") for _ in range(3)]

    def write_batch(database: Database, batch: books.Batch, *more: object, **ways: bool) -> dict[str, Refused]:
        if failures and batch.settle:
            raise failures.pop()
        return write(database, batch, *more, **ways)

    monkeypatch.setattr("gateway.books.write_batch", write_batch)
    async with serving(tmp_path, database=database) as rig:
        await vectors_once(rig)
