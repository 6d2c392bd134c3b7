"""Idempotency keys: one key, one answer, one bill, on SQLite and on PostgreSQL, whoever dies in between."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import httpx
import pytest
import sqlalchemy as sa
import trio
from fake_engine import ANSWER, FakeEngine
from gateway_rig import eventually, read_until, serving
from test_gateway_accounts import books_balance, reservation, settlement

from config.errors import RiosError
from config.generation import Delta, PlaceLogprobs, TokenLogprob, ToolDelta
from config.settings import GatewaySettings
from dmoe.importer.build import import_gguf
from dmoe.store import ModelStore
from gateway import books, idempotency
from gateway.accounts import Accounts, open_accounts
from gateway.books import Batch
from gateway.db.session import Database
from gateway.money import Closing
from gateway.openai import keyed
from p2p.core.identity import Identity
from tests.unit.dmoe.model_kit import write_gguf

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi there"}]}
STREAM = {**BODY, "stream": True}
PROMPT = {"model": "tiny", "prompt": "hi there", "max_tokens": 7}
KEY = {"idempotency-key": "order-66"}


def said(text: str) -> str:
    """The text of a streamed or whole answer."""
    if text.startswith("{"):
        choice = json.loads(text)["choices"][0]
        return choice["message"]["content"] if "message" in choice else choice["text"]
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events if event["choices"]]
    return "".join(c["delta"].get("content") or "" if "delta" in c else c["text"] for c in choices)


@pytest.fixture
def accounts(tmp_path: Path, database: str) -> Iterator[Accounts]:
    with open_accounts(GatewaySettings(database=database, starting_balance=500), tmp_path) as opened:
        opened.create_user("ada")
        yield opened


def asked(accounts: Accounts, key: str = "k", body: bytes = b"{}") -> idempotency.Wanted:
    return idempotency.wanted(f"user:{accounts.find_user('ada').id}", key, "chat.completions", body, "")


def pass_ms(monkeypatch: pytest.MonkeyPatch, passed_ms: int) -> None:
    """From now on it is so much later."""
    real = Database.now_ms
    monkeypatch.setattr(Database, "now_ms", lambda self: real(self) + passed_ms)


# --- over HTTP


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, BODY), (CHAT, STREAM), (COMPLETIONS, PROMPT), (COMPLETIONS, {**PROMPT, "stream": True})]
)
async def test_a_retry_gets_the_same_bytes_and_costs_nothing(
    tmp_path: Path, database: str, path: str, body: dict
) -> None:
    engine = FakeEngine(seeded=True)
    async with serving(tmp_path, engine=engine, database=database) as rig, rig.http() as http:
        first = await http.post(path, json=body, headers=KEY)
        spaced = json.dumps(body, indent=2).encode()
        again = await http.post(path, content=spaced, headers={**KEY, "content-type": "application/json"})
        assert first.status_code == again.status_code == 200
        assert again.content == first.content
        assert again.headers["content-type"] == first.headers["content-type"]
        assert "idempotency-replayed" not in first.headers
        assert again.headers["idempotency-replayed"] == "true"
        assert len(engine.requests) == 1
        assert (await rig.balance()).balance == 1_000_000 - 2 - 2 * 7
        assert len(rig.accounts.usage("ada")) == 1
        if "[DONE]" in first.text:
            assert first.text.endswith("data: [DONE]\n\n")


async def test_the_same_prompt_twice_has_two_answers_unless_a_seed_was_asked_for(tmp_path: Path) -> None:
    async with serving(tmp_path, engine=FakeEngine(seeded=True)) as rig, rig.http() as http:

        async def texts(key: str, **more: object) -> list[str]:
            body = {**PROMPT, "prompt": ["hi there", "hi there", "hi there"], **more}
            answer = await http.post(COMPLETIONS, json=body, headers={"idempotency-key": key})
            return [choice["text"] for choice in answer.json()["choices"]]

        assert len(set(await texts("drawn"))) > 1
        assert await texts("drawn") == await texts("drawn")
        assert len(set(await texts("asked", seed=5))) == 1


async def test_another_body_another_path_another_privacy_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, rig.http() as http:
        assert (await http.post(CHAT, json=BODY, headers=KEY)).status_code == 200
        for path, body, headers in (
            (CHAT, STREAM, {}),
            (CHAT, {**BODY, "seed": 1}, {}),
            (COMPLETIONS, PROMPT, {}),
            (CHAT, BODY, {"x-rios-privacy": "trusted"}),
        ):
            refused = await http.post(path, json=body, headers={**KEY, **headers})
            assert refused.status_code == 422
            error = refused.json()["error"]
            assert (error["type"], error["param"], error["code"]) == (
                "invalid_request_error",
                "idempotency-key",
                "idempotency_key_reused",
            )
        assert (await rig.balance()).balance == 1_000_000 - 16


async def test_a_key_belongs_to_its_account(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, rig.http() as http:
        await trio.to_thread.run_sync(rig.accounts.create_user, "eve")
        await trio.to_thread.run_sync(rig.accounts.credit, "eve", 1_000_000)
        hers = (await trio.to_thread.run_sync(rig.accounts.create_key, "eve", "hers")).secret
        other = (await trio.to_thread.run_sync(rig.accounts.create_key, "ada", "other")).secret
        first = await http.post(CHAT, json=BODY, headers=KEY)
        same = await http.post(CHAT, json=BODY, headers={**KEY, "authorization": f"Bearer {other}"})
        eves = await http.post(CHAT, json=BODY, headers={**KEY, "authorization": f"Bearer {hers}"})
        assert same.content == first.content
        assert eves.status_code == 200
        assert "idempotency-replayed" not in eves.headers
        assert (await rig.balance("ada")).balance == 1_000_000 - 16
        assert (await rig.balance("eve")).balance == 1_000_000 - 16


@pytest.mark.parametrize("key", ["", "two words", "x" * 256, "ü", "a\tb"])
async def test_keys_that_cannot_be(tmp_path: Path, key: str) -> None:
    async with serving(tmp_path) as rig, rig.http() as http:
        refused = await http.post(CHAT, json=BODY, headers=[("idempotency-key", key.encode("latin-1"))])
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "idempotency-key"
        twice = await http.post(CHAT, json=BODY, headers=[("idempotency-key", "a"), ("idempotency-key", "b")])
        assert twice.status_code == 400


async def test_retries_while_the_first_runs_join_it(tmp_path: Path, database: str) -> None:
    engine = FakeEngine(pause_seconds=0.05, seeded=True)
    async with serving(tmp_path, engine=engine, database=database) as rig, rig.http() as http:
        found: list[httpx.Response] = []

        async def one() -> None:
            found.append(await http.post(CHAT, json=STREAM, headers=KEY))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
            await eventually(lambda: engine.produced > 0)
            reused = await http.post(CHAT, json=BODY, headers=KEY)
            assert reused.status_code == 422
        assert len({answer.content for answer in found}) == 1
        assert len(engine.requests) == 1
        assert (await rig.balance()).balance == 1_000_000 - 16


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_a_client_that_leaves_finds_its_answer_when_it_comes_again(tmp_path: Path, body: dict) -> None:
    engine = FakeEngine(pause_seconds=0.05, seeded=True)
    async with serving(tmp_path, engine=engine) as rig, rig.http() as http:
        connection = await rig.raw(CHAT, body, idempotency_key="order-66")
        await eventually(lambda: engine.produced == 2)
        await connection.aclose()
        again = await http.post(CHAT, json=body, headers=KEY)
        assert again.status_code == 200
        assert len(said(again.text)) == len("Paris is the capital of France.")
        assert len(engine.requests) == 1
        await eventually(lambda: engine.running == 0)
        assert (await http.post(CHAT, json=body, headers=KEY)).content == again.content
        usage = rig.accounts.usage("ada")
        assert [(row.outcome, row.completion_tokens) for row in usage] == [("stop", 7)]


async def test_a_failure_costs_nothing_and_the_retry_goes_on_with_the_same_seed(tmp_path: Path, database: str) -> None:
    engine = FakeEngine(fail_at=3, seeded=True)
    async with serving(tmp_path, engine=engine, database=database) as rig, rig.http() as http:
        broken = await http.post(CHAT, json=STREAM, headers=KEY)
        assert '"error"' in broken.text
        assert (await rig.balance()).balance == 1_000_000
        refused = await http.post(CHAT, json=BODY, headers={"idempotency-key": "another"})
        assert refused.status_code == 503
        engine.fail_at = None
        whole = await http.post(CHAT, json=STREAM, headers=KEY)
        head = broken.text.partition('data: {"error"')[0]
        seed = engine.requests[0].sampling.seed
        assert engine.requests[-1].sampling.seed == seed is not None
        words = Random(seed).sample(ANSWER, len(ANSWER))
        assert said(head) == "".join(words[:3]), "what came before the failure reached the client"
        assert said(whole.text) == "".join(words)
        assert (await rig.balance()).balance == 1_000_000 - 16
        await trio.to_thread.run_sync(books_balance, rig.accounts)


async def test_what_is_refused_before_it_begins_leaves_the_key_free(tmp_path: Path) -> None:
    async with serving(tmp_path, credit=5) as rig, rig.http() as http:
        assert (await http.post(CHAT, json={**BODY, "model": "none"}, headers=KEY)).status_code == 404
        poor = await http.post(CHAT, json={**BODY, "max_tokens": 7}, headers=KEY)
        assert poor.status_code == 402
        await trio.to_thread.run_sync(rig.accounts.credit, "ada", 100)
        assert (await http.post(CHAT, json={**BODY, "max_tokens": 7}, headers=KEY)).status_code == 200


async def test_several_answers_are_one_bill(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, engine=FakeEngine(seeded=True), database=database) as rig, rig.http() as http:
        first = await http.post(CHAT, json={**BODY, "n": 3}, headers=KEY)
        again = await http.post(CHAT, json={**BODY, "n": 3}, headers=KEY)
        assert again.content == first.content
        assert len(first.json()["choices"]) == 3
        assert len(rig.accounts.usage("ada")) == 3
        usage = first.json()["usage"]
        assert (await rig.balance()).balance == 1_000_000 - usage["prompt_tokens"] - 2 * usage["completion_tokens"]


async def test_an_answer_too_long_to_keep_is_charged_once_and_its_key_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.openai.keyed.ANSWER_BYTES_MAX", 2000)
    engine = FakeEngine(endless=True)
    async with serving(tmp_path, engine=engine) as rig, rig.http() as http:
        body = {**STREAM, "max_tokens": 100}
        cut = await http.post(CHAT, json=body, headers=KEY)
        assert "is longer than" in cut.text
        charged = (await rig.balance()).balance
        assert 0 < 1_000_000 - charged < 202
        again = await http.post(CHAT, json=body, headers=KEY)
        assert again.status_code == 413
        assert (await rig.balance()).balance == charged
        assert len(engine.requests) == 1


@pytest.mark.parametrize("asked_for", [{"top_logprobs": 2}, {"n": 3}, {}], ids=["logprobs", "several", "text"])
async def test_a_whole_answer_too_long_to_keep_is_charged_once_and_its_key_says_so(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, asked_for: dict
) -> None:
    """What counts is how long it is as it is kept."""
    body = {**BODY, "max_tokens": 30, "logprobs": "top_logprobs" in asked_for, **asked_for}
    engine = FakeEngine(endless=True)
    async with serving(tmp_path, engine=engine, database=database) as rig, rig.http() as http:
        whole = await http.post(CHAT, json=body, headers={"idempotency-key": "short-enough"})
        assert whole.status_code == 200
        paid = 1_000_000 - (await rig.balance()).balance
        monkeypatch.setattr("gateway.openai.keyed.ANSWER_BYTES_MAX", len(whole.content) - 60)
        cut = await http.post(CHAT, json=body, headers=KEY)
        assert cut.status_code == 413
        charged = (await rig.balance()).balance
        assert 0 < 1_000_000 - charged - paid <= paid + 2 * 2
        again = await http.post(CHAT, json=body, headers=KEY)
        assert again.status_code == 413
        assert (await rig.balance()).balance == charged
        assert (await rig.balance()).reserved == 0


def test_what_is_collected_of_an_answer_is_bounded_whatever_it_is() -> None:
    token = TokenLogprob(token=1, data=b"x", logprob=-1.0)
    place = PlaceLogprobs(chosen=token, top=(token,) * 20, offset=0)
    for more in (
        {"text": "x" * 600},
        {"reasoning": "x" * 600},
        {"tool_calls": (ToolDelta(index=0, arguments="x" * 600),)},
        {"logprobs": (place,)},
        {"prompt_logprobs": (place,)},
    ):
        assert 600 <= keyed._least_bytes(Delta(**{"text": "", "tokens": (1,), **more})) <= 700


async def test_a_stopping_gateway_lets_go_of_its_keys(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, engine=FakeEngine(hang_at=3, seeded=True), database=database) as rig:
        connection = await rig.raw(CHAT, STREAM, idempotency_key="order-66")
        await read_until(connection, b'"content":" ')
    await connection.aclose()
    engine = FakeEngine(seeded=True)
    async with serving(tmp_path, engine=engine, database=database) as rig, rig.http() as http:
        assert (await rig.balance()).reserved == 0
        answer = await http.post(CHAT, json=STREAM, headers=KEY)
        assert answer.status_code == 200
        assert (await rig.balance()).balance == 1_000_000 - 16


# --- killed


@contextmanager
def gateway_process(data_dir: Path, database: str, *more: str) -> Iterator[tuple[subprocess.Popen, str, str]]:
    """A gateway of its own: the process, its address, a key."""
    command = [sys.executable, str(Path(__file__).with_name("gateway_process.py")), str(data_dir), database, *more]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        port, key = process.stdout.readline().split()
        yield process, f"http://127.0.0.1:{port}", key
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_gguf(folder / "tiny.gguf")
    import_gguf(folder / "tiny.gguf", ModelStore(folder / "store"), Identity.from_seed(b"p" * 32), name="tiny")
    return folder / "store"


@pytest.mark.parametrize("stream", [True, False])
def test_kill_9_in_the_middle_then_the_retry_has_the_same_text_and_one_bill(
    tmp_path: Path, database: str, store: Path, stream: bool
) -> None:
    """The real engine, sampled without a seed: the text is what the killed gateway would have said."""
    body = {"model": "tiny", "prompt": "hello there", "max_tokens": 60, "min_tokens": 60, "stream": stream}
    heard = ""
    with gateway_process(tmp_path, database, str(store)) as (process, url, key):
        headers = {**KEY, "authorization": f"Bearer {key}"}
        if stream:
            with httpx.stream("POST", url + COMPLETIONS, json=body, headers=headers, timeout=60) as answer:
                for piece in answer.iter_text():
                    heard += piece
                    if heard.count('"text"') >= 8:
                        process.kill()
                        break
        else:
            with pytest.raises(httpx.TransportError):  # the answer takes longer than that
                httpx.post(url + COMPLETIONS, json=body, headers=headers, timeout=0.8)
        process.kill()
        process.wait()
    with gateway_process(tmp_path, database, str(store)) as (_, url, key):
        headers = {**KEY, "authorization": f"Bearer {key}"}
        first = httpx.post(url + COMPLETIONS, json=body, headers=headers, timeout=60)
        again = httpx.post(url + COMPLETIONS, json=body, headers=headers, timeout=60)
        fresh = httpx.post(url + COMPLETIONS, json=body, headers={**headers, "idempotency-key": "b"}, timeout=60)
        assert first.status_code == fresh.status_code == 200
        assert again.content == first.content
        head = said(heard.rpartition("\n\n")[0] + "\n\n") if heard else ""
        assert said(first.text).startswith(head)
        assert said(fresh.text) != said(first.text)  # its seed is its own
        if stream:
            assert 0 < len(head) < len(said(first.text))
    with open_accounts(GatewaySettings(database=database), tmp_path) as accounts:
        paid = [row for row in accounts.usage("ada") if row.microcredits]
        assert len(paid) == 2  # one for each of the two keys
        assert {row.completion_tokens for row in paid} == {60}
        balance = accounts.balance("ada")
        assert balance.reserved == 0
        assert balance.balance == 1_000_000 - sum(row.microcredits for row in paid)
        books_balance(accounts)


def test_kill_9_before_the_seed_was_used_and_in_the_end_nothing_is_left(tmp_path: Path, database: str) -> None:
    """The killed gateway's reservation is given back at the next start, though nobody ever tries again."""
    with (
        gateway_process(tmp_path, database) as (process, url, key),
        httpx.stream(
            "POST", url + CHAT, json=STREAM, headers={**KEY, "authorization": f"Bearer {key}"}, timeout=20
        ) as answer,
    ):
        for piece in answer.iter_text():
            if " the" in piece:
                break
        process.kill()
        process.wait()
    with open_accounts(GatewaySettings(database=database), tmp_path) as accounts:
        assert accounts.balance("ada").reserved > 0

    async def start() -> None:
        async with serving(tmp_path, database=database) as rig:
            assert await rig.balance() == await rig.balance("ada")
            assert ((await rig.balance()).balance, (await rig.balance()).reserved) == (1_000_000, 0)

    trio.run(start)


# --- in the database


def test_a_key_of_a_dead_gateway_is_taken_over_and_the_dead_one_charges_nothing(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, wanted = accounts.database, asked(accounts)
    first = idempotency.begin(database, wanted, "gone", 7)
    reserved = reservation(accounts, "r1", instance="gone")
    keyed = {"idempotency_id": wanted.id, "holder": first.holder, "route": "local"}
    reserved = type(reserved)(**{name: getattr(reserved, name) for name in reserved.__slots__} | keyed)
    books.write_batch(database, Batch(reserve=[reserved]))
    with pytest.raises(RiosError, match="being answered by another gateway") as busy:
        idempotency.begin(database, wanted, "here", 8)
    assert busy.value.retry_after_ms > 0
    pass_ms(monkeypatch, books.ABANDONED_MS + 1)
    second = idempotency.begin(database, wanted, "here", 8)
    assert (second.seed, second.route, second.stored) == (7, "local", None)
    assert accounts.balance("ada").reserved == 0
    late = Closing(
        settlements=(settlement(reserved, 3),),
        idempotency_id=wanted.id,
        holder=first.holder,
        status=200,
        content_type="application/json",
        answer=b"never",
    )
    books.write_batch(database, Batch(close=[late]))  # the dead one was only slow
    slow = type(reserved)(**{name: getattr(reserved, name) for name in reserved.__slots__} | {"id": "r2"})
    books.write_batch(database, Batch(reserve=[slow]))
    again = type(late)(
        **{name: getattr(late, name) for name in late.__slots__} | {"settlements": (settlement(slow, 3),)}
    )
    books.write_batch(database, Batch(close=[again]))
    assert (accounts.balance("ada").balance, accounts.balance("ada").reserved) == (500, 0)
    assert idempotency.begin(database, wanted, "here", 9).stored is None
    books_balance(accounts)


def test_keys_are_bounded_and_forgotten_after_a_day(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    database = accounts.database
    monkeypatch.setattr(idempotency, "KEYS_MAX", 3)
    for name in "abc":
        begun = idempotency.begin(database, asked(accounts, name), "here", 1)
        idempotency.release(database, asked(accounts, name).id, begun.holder) if name == "c" else None
    idempotency.begin(database, asked(accounts, "c"), "here", 1)  # it was let go before anything was reserved
    with pytest.raises(RiosError, match="has 3 idempotency keys of the last 24 hours") as full:
        idempotency.begin(database, asked(accounts, "d"), "here", 1)
    assert full.value.code == "rate_limited"
    assert 23 * 3600 * 1000 < full.value.retry_after_ms <= 24 * 3600 * 1000
    assert idempotency.expire(database) == 0
    pass_ms(monkeypatch, 2 * idempotency.KEPT_MS + 1)
    monkeypatch.setattr(idempotency, "EXPIRED_AT_ONCE", 2)
    assert idempotency.expire(database) == 3
    with database.read() as connection:
        assert connection.execute(sa.text("SELECT COUNT(*) FROM idempotency")).scalar() == 0


def test_a_key_whose_day_is_over_stands_for_a_new_request(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    database = accounts.database
    begun = idempotency.begin(database, asked(accounts), "here", 1)
    done = Closing(
        settlements=(),
        idempotency_id=asked(accounts).id,
        holder=begun.holder,
        status=200,
        content_type="application/json",
        answer=b"x\x9c\x03\x00\x00\x00\x00\x01",
    )
    books.write_batch(database, Batch(close=[done]))
    assert idempotency.begin(database, asked(accounts), "here", 2).stored.body == b""
    pass_ms(monkeypatch, idempotency.KEPT_MS + 1)
    fresh = idempotency.begin(database, asked(accounts, body=b'{"another": 1}'), "here", 3)
    assert (fresh.seed, fresh.stored) == (3, None)
    pass_ms(monkeypatch, idempotency.KEPT_MS + 1)
    later = idempotency.begin(database, asked(accounts, body=b'{"a third": 1}'), "here", 4)  # its holder has died
    assert (later.seed, later.stored) == (4, None)
