"""What happens is told: over SSE and WebSockets, and to webhooks; to those who may know it, once each, and safely."""

import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import h11
import httpx
import openai
import pytest
import sqlalchemy as sa
import trio
from gateway_rig import Rig, eventually, serving
from identity_rig import add_user, bearer, sign_in
from test_rights import client, key_of
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Ping, Pong, RejectConnection, Request
from wsproto.events import TextMessage as Text

from gateway import events, managing
from gateway.audit import OPERATOR
from gateway.billing import budgets
from gateway.db.jobs import deliveries
from gateway.db.jobs import events as rows
from gateway.db.jobs import webhooks as hooks
from gateway.db.models import api_keys
from gateway.errors import ApiError
from gateway.identity import tokens
from gateway.identity.vault import Vault
from gateway.jobs import webhooks
from gateway.till import Till

LOOPBACK = {"webhook_http": True, "webhook_allow_networks": ("127.0.0.0/8",)}


@asynccontextmanager
async def sse(http: httpx.AsyncClient, **how: object) -> AsyncIterator[AsyncIterator[tuple[str, dict]]]:
    """Events as (kind, JSON) as they come. On a connection of its own, which may be left at any time."""
    request = http.build_request("GET", "/v1/events", **how)
    connection = h11.Connection(h11.CLIENT)
    async with await trio.open_tcp_stream(request.url.host, request.url.port) as stream:
        head = h11.Request(method="GET", target=request.url.raw_path, headers=request.headers.raw)
        await stream.send_all(connection.send(head) + connection.send(h11.EndOfMessage()))
        async with aclosing(_events(stream, connection)) as found:
            assert await anext(found) == ("listening", {})
            yield found


async def _events(stream: trio.SocketStream, connection: h11.Connection) -> AsyncIterator[tuple[str, dict]]:
    text = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some())
        elif isinstance(event, h11.Response):
            assert event.status_code == 200
        elif isinstance(event, h11.Data):
            text += event.data
        else:
            return
        while b"\n\n" in text:
            block, _, text = text.partition(b"\n\n")
            fields = dict(line.split(": ", 1) for line in block.decode().splitlines())
            yield fields.get("event") or fields[""], json.loads(fields.get("data", "{}"))


async def ask(http: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello there"}]}
    (await http.post("/v1/chat/completions", json=body)).raise_for_status()


async def test_a_listener_hears_its_own_and_an_admin_all(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, rig.http() as ada:
        bob, root = await key_of(rig, "bob"), await key_of(rig, "root", "admin")
        await trio.to_thread.run_sync(rig.accounts.credit, "bob", 1_000_000)
        async with client(rig, bob) as bobs, client(rig, root) as roots, sse(ada) as hers, sse(roots) as alls:
            with trio.fail_after(5):
                await ask(bobs)
                await ask(ada)
                kind, told = await anext(hers)
                assert (kind, told["type"], told["data"]["endpoint"]) == (kind, "request.finished", "chat.completions")
                assert (told["data"]["prompt_tokens"], told["data"]["microcredits"]) == (2, 16)
                await ada.post("/v1/api-keys", json={"name": "another"})
                assert (await anext(hers))[0] == "key.created"
                heard = [await anext(alls) for _ in range(3)]
        assert [kind for kind, _ in heard] == ["request.finished", "request.finished", "key.created"]
        assert "secret" not in str(heard)


async def test_it_goes_on_where_it_stopped_with_only_the_kinds_asked_for(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, rig.http() as ada:
        with trio.fail_after(10):
            async with sse(ada) as heard:
                await ask(ada)
                _, first = await anext(heard)
            for name in ("one", "two"):
                await ada.post("/v1/api-keys", json={"name": name})
                await ask(ada)
            last = {"last-event-id": first["id"]}
            async with sse(ada, params={"types": "key.*"}, headers=last) as heard:
                names = [(await anext(heard))[1]["data"]["detail"]["name"] for _ in range(2)]
                await ada.post("/v1/api-keys", json={"name": "three"})
                names.append((await anext(heard))[1]["data"]["detail"]["name"])
        assert names == ["one", "two", "three"]
        for wrong in ({"after": "x"}, {"after": "-1"}, {"after": "9" * 30}, {"types": "a," * 99 + "b" * 99}):
            assert (await ada.get("/v1/events", params=wrong)).status_code == 400, wrong


async def test_events_reach_another_gateway_within_a_second(tmp_path: Path, postgresql: str) -> None:
    from postgresql import new_database

    dsn = new_database(postgresql)
    async with serving(tmp_path / "a", database=dsn) as first, serving(tmp_path / "b", database=dsn) as second:  # noqa: SIM117
        async with first.http() as here, second.http() as there, sse(there) as heard:
            await trio.sleep(0.5)
            before = trio.current_time()
            await here.post("/v1/api-keys", json={"name": "another"})
            with trio.fail_after(5):
                kind, _ = await anext(heard)
                assert kind == "key.created"
            assert trio.current_time() - before < 1.5


async def test_a_batch_tells_each_of_its_steps_to_listener_and_webhook(tmp_path: Path, database: str) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    line["body"] = {"model": "tiny", "messages": [{"role": "user", "content": "hello there"}]}

    def begin(api: openai.OpenAI) -> str:
        file = api.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
        return api.batches.create(input_file_id=file.id, endpoint=line["url"], completion_window="24h").id

    async with serving(tmp_path, database=database, **LOOPBACK) as rig, rig.http() as ada, receiver() as there:
        made = await make(ada, there.url, "batch.completed")
        with trio.fail_after(20):
            async with sse(ada, params={"types": "batch.*"}) as heard:
                batch = await rig.with_openai(begin)
                steps = [await anext(heard) for _ in range(4)]
        kinds = ["batch.validating", "batch.in_progress", "batch.finalizing", "batch.completed"]
        assert [kind for kind, _ in steps] == kinds
        assert {told["data"]["id"] for _, told in steps} == {batch}
        await settled(rig, made["id"], "delivered", 1)
        assert json.loads(there.heard[0][1])["data"] == steps[-1][1]["data"]


async def test_who_does_not_keep_up_loses_the_oldest_and_is_told(tmp_path: Path) -> None:
    subscription = events.Subscription(None, (), 0)
    for place in range(events.QUEUE_MAX + 5):
        subscription.put(events.Event(place, "key.created", None, "{}", 1))
    missed, found = await subscription.take()
    assert (missed, len(found), found[0].place) == (5, events.QUEUE_MAX, 5)


async def test_what_the_database_did_not_take_is_told_once_it_does(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert, failures = events._insert, iter(range(4))

    def fail(connection: sa.Connection, found: list[dict]) -> None:
        if next(failures, None) is not None:
            raise sa.exc.OperationalError("INSERT", None, Exception("the connection was lost"))
        insert(connection, found)

    async with serving(tmp_path, database=database) as rig, rig.http() as ada:
        wish = budgets.Wish(user_id=rig.accounts.find_user("ada").id, microcredits=50)
        budgets.set_budget(rig.accounts.database, OPERATOR, wish, None)
        monkeypatch.setattr(events, "_insert", fail)
        for _ in range(2):
            await ada.post("/v1/completions", json={"model": "tiny", "prompt": "hi there", "max_tokens": 9})
        told: list[str] = []
        with trio.move_on_after(10):
            while len(told) < 3:
                found = await trio.to_thread.run_sync(events.since, rig.accounts.database, 0, None)
                told = [event.kind for event in found if event.kind != "budget.set"]
                await trio.sleep(0.05)
    assert sorted(told) == ["budget.alert", "request.finished", "request.finished"]


async def test_of_too_much_that_waits_the_oldest_is_lost_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_BUFFER_MAX", 3)
    insert = events._insert
    async with serving(tmp_path) as rig:
        bus = events.Bus(Till(rig.accounts.database, "here"))

        def fail(connection: sa.Connection, found: list[dict]) -> None:
            trio.from_thread.run_sync(bus.publish, "new", None, {})
            raise sa.exc.OperationalError("INSERT", None, Exception("the connection was lost"))

        monkeypatch.setattr(events, "_insert", fail)
        for kind in "abcd":
            bus.publish(kind, None, {})
        await bus.flush()
        monkeypatch.setattr(events, "_insert", insert)
        await bus.flush()
        found = await trio.to_thread.run_sync(events.since, rig.accounts.database, 0, None)
    assert [event.kind for event in found] == ["c", "d", "new", events.MISSED]
    assert json.loads(found[-1].data) == {"count": 2}


async def test_listening_ends_with_the_key(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, rig.http() as ada:
        key = (await ada.post("/v1/api-keys", json={})).json()
        async with client(rig, key["secret"]) as other, sse(other) as heard, socket(rig, key["secret"]) as ws:
            await ada.delete(f"/v1/api-keys/{key['id']}")
            with trio.fail_after(5):
                assert [kind async for kind, _ in heard] in ([], ["key.revoked"])
                assert await ws.closed() == 1008


async def test_who_is_no_admin_any_more_hears_nothing_more_of_others(tmp_path: Path, database: str) -> None:
    """Also if a listener may go on listening: to less."""
    async with serving(tmp_path, database=database) as rig:
        root = await key_of(rig, "root", "admin")
        await key_of(rig, "boss", "admin")
        async with client(rig, root) as http, sse(http) as heard:
            user = await trio.to_thread.run_sync(rig.accounts.find_user, "root")
            change = managing.UserChange(role="developer")
            work = partial(managing.change_user, rig.accounts, OPERATOR, user.id, None, change)
            await trio.to_thread.run_sync(work)
            with trio.fail_after(5):
                assert [kind async for kind, _ in heard] in ([], ["user.changed"])


async def test_listening_ends_with_the_access_token(
    tmp_path: Path, database: str, cheap_hashes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    issue = tokens.Tokens.issue

    async def brief(self: tokens.Tokens, *who: str) -> str:
        self.seconds = 2
        return await issue(self, *who)

    monkeypatch.setattr(tokens, "_LEEWAY_SECONDS", 0)
    monkeypatch.setattr(tokens.Tokens, "issue", brief)
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        made = await sign_in(http, "grace")
        async with sse(http, headers=bearer(made)) as heard:
            with trio.fail_after(8):
                assert [kind async for kind, _ in heard] == []


async def test_old_events_are_forgotten_and_a_late_listener_is_told(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "ROWS_MAX", 2)
    async with serving(tmp_path, database=database) as rig, rig.http() as ada:
        for name in ("one", "two", "three", "four"):
            await ada.post("/v1/api-keys", json={"name": name})
        await trio.to_thread.run_sync(events.sweep, rig.accounts.database)
        with trio.fail_after(5):
            async with sse(ada, params={"after": "1"}) as heard:
                kinds = [await anext(heard) for _ in range(3)]
        assert [kind for kind, _ in kinds] == ["events.missed", "key.created", "key.created"]
        assert kinds[2][1]["data"]["detail"]["name"] == "four"


# --- WebSockets


class Socket:
    """A WebSocket's client side."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream, self.connection = stream, WSConnection(ConnectionType.CLIENT)

    async def send(self, event: object) -> None:
        await self.stream.send_all(self.connection.send(event))

    async def next(self) -> object:
        while True:
            for event in self.connection.events():
                if not isinstance(event, Ping):
                    return event
                await self.send(event.response())
            data = await self.stream.receive_some()
            self.connection.receive_data(data or None)

    async def hear(self) -> str:
        with trio.fail_after(5):
            text = ""
            while True:
                event = await self.next()
                assert isinstance(event, Text), event
                text += event.data
                if event.message_finished:
                    return text

    async def closed(self) -> int:
        with trio.fail_after(5):
            while True:
                event = await self.next()
                if isinstance(event, CloseConnection):
                    return event.code


@asynccontextmanager
async def opening(rig: Rig, path: str = "/v1/events", **headers: str) -> AsyncIterator[tuple[Socket, object]]:
    async with await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port) as stream:
        ws = Socket(stream)
        host = f"{rig.gateway.host}:{rig.gateway.port}"
        extra = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        await ws.send(Request(host=host, target=path, extra_headers=extra))
        with trio.fail_after(5):
            yield ws, await ws.next()


@asynccontextmanager
async def socket(rig: Rig, key: str = "", path: str = "/v1/events") -> AsyncIterator[Socket]:
    async with opening(rig, path, authorization=f"Bearer {key or rig.key}") as (ws, answer):
        assert isinstance(answer, AcceptConnection), answer
        yield ws


async def test_the_same_over_a_websocket(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, rig.http() as ada:
        async with socket(rig, path="/v1/events?types=key.*") as ws:
            await ask(ada)
            await ada.post("/v1/api-keys", json={"name": "one"})
            told = json.loads(await ws.hear())
            assert (told["type"], told["data"]["detail"]["name"]) == ("key.created", "one")
            await ws.send(Ping(payload=b"here?"))
            with trio.fail_after(5):
                answer = await ws.next()
            assert isinstance(answer, Pong)
            assert bytes(answer.payload) == b"here?"
            await ada.post("/v1/api-keys", json={"name": "two"})
            assert json.loads(await ws.hear())["data"]["detail"]["name"] == "two"
            await ws.send(CloseConnection(code=1000))
        async with socket(rig, path=f"/v1/events?types=key.*&after={told['id']}") as ws:
            assert json.loads(await ws.hear())["data"]["detail"]["name"] == "two"
            await ws.send(Text(data="listen to me"))
            assert await ws.closed() == 1008
        async with socket(rig) as ws:
            await ws.send(Text(data="x" * 100_000))
            assert await ws.closed() in (1008, 1009)
        await ask(ada)


async def test_who_says_much_to_a_websocket_keeps_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.doorway.CONNECTIONS_MAX", 2)
    async with serving(tmp_path) as rig:
        for _ in range(3):
            async with socket(rig) as ws:
                await ws.stream.send_all(b"".join(ws.connection.send(Text(data="well")) for _ in range(50)))
                assert await ws.closed() == 1008
        async with rig.http() as ada:
            assert (await ada.get("/v1/models")).status_code == 200


async def test_strangers_and_other_sites_open_no_websocket(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        for path, headers, status in (
            ("/v1/events", {}, 401),
            ("/v1/events", {"authorization": "Bearer nonsense"}, 401),
            ("/v1/events?after=x", {"authorization": f"Bearer {rig.key}"}, 400),
            ("/v1/models", {"authorization": f"Bearer {rig.key}"}, 403),
        ):
            async with opening(rig, path, **headers) as (_, answer):
                assert isinstance(answer, RejectConnection), (path, answer)
                assert answer.status_code == status, path
    async with serving(tmp_path / "open", require_key=False) as rig:
        async with opening(rig, origin="http://evil.example") as (_, answer):
            assert isinstance(answer, RejectConnection)
            assert answer.status_code == 403
        async with opening(rig) as (_, answer):
            assert isinstance(answer, AcceptConnection)


async def test_a_client_that_vanishes_leaves_nothing_behind(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, rig.http() as ada:
        for _ in range(3):
            async with socket(rig), sse(ada):
                pass
        gauge = "rios_gateway_running_requests"
        await eventually(lambda: rig.registry.get_sample_value(gauge) == 0)


# --- webhooks


@dataclass
class Receiver:
    """A webhook's other side. ``answers``: statuses in turn, then 200; None: it hangs."""

    url: str = ""
    answers: list[int | None] = field(default_factory=list)
    heard: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    location: str = ""

    async def serve(self, stream: trio.SocketStream) -> None:
        connection, headers, body = h11.Connection(h11.SERVER), {}, b""
        async with stream:
            while not isinstance(event := connection.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    connection.receive_data(await stream.receive_some())
                elif isinstance(event, h11.Request):
                    headers = {name.decode(): value.decode() for name, value in event.headers}
                elif isinstance(event, h11.Data):
                    body += event.data
                else:
                    return
            self.heard.append((headers, body))
            status = self.answers.pop(0) if self.answers else 200
            if status is None:
                await trio.sleep_forever()
            more = [("location", self.location)] if self.location else []
            fields = [("content-length", "0"), *more]
            await stream.send_all(connection.send(h11.Response(status_code=status, headers=fields)) or b"")


@asynccontextmanager
async def receiver(**how: object) -> AsyncIterator[Receiver]:
    found = Receiver(**how)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, found.serve, 0)
        port = listeners[0].socket.getsockname()[1]
        found.url = f"http://127.0.0.1:{port}/hook?a=b"
        yield found
        nursery.cancel_scope.cancel()


async def make(http: httpx.AsyncClient, url: str, *kinds: str) -> dict:
    made = await http.post("/v1/webhooks", json={"url": url, "types": list(kinds)})
    assert made.status_code == 201, made.text
    return made.json()


async def test_a_webhook_is_signed_and_delivered(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database, **LOOPBACK) as rig, rig.http() as ada, receiver() as there:
        made = await make(ada, there.url, "key.*")
        secret = base64.b64decode(made["secret"].removeprefix("whsec_"))
        assert made["secret"] not in (await ada.get(f"/v1/webhooks/{made['id']}")).text
        await ada.post("/v1/api-keys", json={"name": "one"})
        await ask(ada)
        await eventually(lambda: len(there.heard) == 1)
        headers, body = there.heard[0]
        text = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        expected = base64.b64encode(hmac.new(secret, text, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"
        told = json.loads(body)
        assert (told["type"], told["data"]["detail"]["name"]) == ("key.created", "one")
        pinged = await ada.post(f"/v1/webhooks/{made['id']}/ping")
        assert pinged.status_code == 202
        await eventually(lambda: len(there.heard) == 2)
        assert json.loads(there.heard[1][1])["type"] == "webhook.ping"
        await settled(rig, made["id"], "delivered", 2)
        listed = (await ada.get(f"/v1/webhooks/{made['id']}/deliveries")).json()["data"]
        assert {(row["status"], row["answered"], row["attempts"]) for row in listed} == {("delivered", 200, 1)}
        assert (await ada.delete(f"/v1/webhooks/{made['id']}")).json()["deleted"] is True
        assert (await ada.get(f"/v1/webhooks/{made['id']}")).status_code == 404


async def settled(rig: Rig, webhook: str, status: str, count: int) -> None:
    """Wait until so many deliveries have this status."""
    query = sa.select(sa.func.count()).where(deliveries.c.webhook_id == webhook, deliveries.c.status == status)

    def found() -> int:
        with rig.accounts.database.read() as connection:
            return connection.execute(query).scalar_one()

    with trio.fail_after(10):
        while await trio.to_thread.run_sync(found) != count:  # noqa: ASYNC110 - a database tells nobody
            await trio.sleep(0.05)


async def test_a_failure_is_tried_again_then_given_up_and_the_webhook_disabled(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "BACKOFF_MS_MIN", 20)
    monkeypatch.setattr(webhooks, "TRIES_MAX", 4)
    async with serving(tmp_path, database=database, **LOOPBACK) as rig, rig.http() as ada:
        async with receiver(answers=[500, 302, 200], location="http://127.0.0.1:1/elsewhere") as there:
            made = await make(ada, there.url)
            await ada.post(f"/v1/webhooks/{made['id']}/ping")
            await settled(rig, made["id"], "delivered", 1)
            assert len(there.heard) == 3
            assert len({headers["webhook-id"] for headers, _ in there.heard}) == 1
            assert (await ada.get(f"/v1/webhooks/{made['id']}")).json()["failing_since_ms"] is None
            there.answers = [500] * 100
            await ada.post(f"/v1/webhooks/{made['id']}/ping")
            await settled(rig, made["id"], "dead", 1)
            assert len(there.heard) == 3 + 4
            monkeypatch.setattr(webhooks, "DISABLED_AFTER_MS", 0)
            await ada.post(f"/v1/webhooks/{made['id']}/ping")
            await settled(rig, made["id"], "dead", 2)
        now = (await ada.get(f"/v1/webhooks/{made['id']}")).json()
        assert (now["enabled"], now["problem"]) == (False, "the answer was 500")
        assert (await ada.post(f"/v1/webhooks/{made['id']}/ping")).status_code == 409
        again = (await ada.patch(f"/v1/webhooks/{made['id']}", json={"enabled": True})).json()
        assert (again["enabled"], again["problem"], again["failing_since_ms"]) == (True, "", None)


async def test_who_is_shut_out_is_sent_nothing_until_they_are_let_in_again(
    tmp_path: Path, database: str, cheap_hashes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "BACKOFF_MS_MIN", 1000)
    async with (
        serving(tmp_path, database=database, **LOOPBACK) as rig,
        client(rig) as grace,
        client(rig, await key_of(rig, "root", "admin")) as root,
        receiver(answers=[500]) as there,
        receiver() as roots,
    ):
        user = await trio.to_thread.run_sync(add_user, rig, "grace")
        grace.headers.update(bearer(await sign_in(grace, "grace")))
        mine, theirs = await make(grace, there.url), await make(root, roots.url)
        await grace.post(f"/v1/webhooks/{mine['id']}/ping")
        await eventually(lambda: len(there.heard) == 1)
        assert (await root.delete(f"/v1/users/{user}")).status_code == 200
        await settled(rig, theirs["id"], "delivered", 1)
        await trio.sleep(2)  # it was due after a second, and its own end would be told
        assert len(there.heard) == 1
        await settled(rig, mine["id"], "pending", 1)
        back = await root.patch(f"/v1/users/{user}", json={"disabled": False})
        assert back.status_code == 200
        assert (await root.get(f"/v1/webhooks/{mine['id']}")).json()["failing_since_ms"] is None
        await settled(rig, mine["id"], "delivered", 2)
        told = [json.loads(body) for _, body in there.heard[1:]]
        assert sorted(each["type"] for each in told) == ["user.changed", "webhook.ping"]
        assert [each["data"]["detail"] for each in told if each["type"] == "user.changed"] == [{"disabled": False}]


async def test_a_webhook_hears_no_more_than_its_key(tmp_path: Path, database: str) -> None:
    """Else a key that may not listen hears everything of its user by a webhook, and goes on after its end."""
    async with serving(tmp_path, database=database, **LOOPBACK) as rig, rig.http() as ada, receiver() as there:
        deaf = client(rig, await key_of(rig, "ada", scopes=["webhooks:write", "webhooks:read"]))
        async with deaf:
            refused = await deaf.post("/v1/webhooks", json={"url": there.url})
            assert (refused.status_code, "events:read" in refused.text) == (403, True)
            own = await make(ada, there.url, "batch.*")
            for change in ({"url": there.url + "x"}, {"types": []}, {"enabled": True}):
                refused = await deaf.patch(f"/v1/webhooks/{own['id']}", json=change)
                assert (refused.status_code, "events:read" in refused.text) == (403, True)
            assert (await deaf.delete(f"/v1/webhooks/{own['id']}")).status_code == 200, "that tells nothing"


@pytest.mark.parametrize("by", ["revoking", "its time", "its scopes"])
async def test_a_webhook_ends_with_the_key_it_was_made_with(
    tmp_path: Path, database: str, cheap_hashes: None, by: str
) -> None:
    async with (
        serving(tmp_path, database=database, **LOOPBACK) as rig,
        client(rig) as grace,
        receiver(answers=[500]) as there,
        receiver() as others,
    ):
        await trio.to_thread.run_sync(add_user, rig, "grace")
        grace.headers.update(bearer(await sign_in(grace, "grace")))
        scopes = ["webhooks:write", "events:read"]
        key = (await grace.post("/v1/api-keys", json={"scopes": scopes})).json()
        mine = await make(grace, others.url, "key.*")
        assert mine["key_id"] is None
        async with client(rig, key["secret"]) as program:
            made = await make(program, there.url, "key.*")
            assert made["key_id"] == key["id"]
            assert (await program.post(f"/v1/webhooks/{made['id']}/ping")).status_code == 202
        await eventually(lambda: len(there.heard) == 1)
        await settled(rig, made["id"], "pending", 1)  # it is tried again after some seconds

        def end() -> None:
            values = {
                "revoking": {"revoked_at_ms": 1},
                "its time": {"expires_at_ms": 1},
                "its scopes": {"scopes": "webhooks:write events:reading"},
            }
            with rig.accounts.database.write() as connection:
                connection.execute(sa.update(api_keys).where(api_keys.c.id == key["id"]).values(**values[by]))
                connection.execute(sa.update(deliveries).values(due_at_ms=1))

        await trio.to_thread.run_sync(end)
        await grace.post("/v1/api-keys", json={"name": "after"})
        await settled(rig, mine["id"], "delivered", 1)
        assert (
            await trio.to_thread.run_sync(partial(webhooks.claim, rig.accounts.database, "x", limit=9, busy=())) == []
        )
        await settled(rig, made["id"], "pending", 1)
        assert len(there.heard) == 1
        path = f"/v1/webhooks/{made['id']}"
        for shown in ((await grace.get(path)).json(), (await grace.get("/v1/webhooks")).json()["data"][0]):
            assert "API key" in shown["problem"]
        assert (await grace.post(f"{path}/ping")).status_code == 409
        taken = (await grace.patch(path, json={"types": ["key.*"]})).json()
        assert (taken["key_id"], "API key" in taken["problem"]) == (None, False)
        await grace.post("/v1/api-keys", json={"name": "later"})
        await settled(rig, made["id"], "delivered", 2)
        names = [json.loads(body)["data"].get("detail", {}).get("name") for _, body in there.heard[1:]]
        assert sorted(map(str, names)) == ["None", "later"]


async def test_who_changes_anothers_webhook_does_not_bind_it_to_their_key(tmp_path: Path, database: str) -> None:
    async with (
        serving(tmp_path, database=database, **LOOPBACK) as rig,
        client(rig, await key_of(rig, "bob")) as bob,
        client(rig, await key_of(rig, "root", "admin")) as root,
    ):
        keyed = await make(bob, "http://127.0.0.1:9/")
        free = partial(webhooks.create, rig.accounts.database, Vault(bytes(32)), OPERATOR)
        made, _ = await trio.to_thread.run_sync(partial(free, user_id=keyed["user_id"], url="http://x/", kinds=()))
        for name, key_id in ((keyed["id"], keyed["key_id"]), (made.id, None)):
            changed = await root.patch(f"/v1/webhooks/{name}", json={"enabled": True})
            assert (changed.status_code, changed.json()["key_id"]) == (200, key_id)
        signed_in = partial(webhooks.change, rig.accounts.database, OPERATOR, keyed["id"], None, key_id=None)
        assert (await trio.to_thread.run_sync(signed_in, {"enabled": True})).key_id == keyed["key_id"]
        own = await bob.patch(f"/v1/webhooks/{made.id}", json={"enabled": True})
        assert own.json()["key_id"] == keyed["key_id"], "a user's own key takes it over"


async def test_one_ping_waits_at_a_time(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database, **LOOPBACK) as rig, rig.http() as ada, receiver() as there:
        made = await make(ada, "http://127.0.0.1:9/")
        path, found = f"/v1/webhooks/{made['id']}", []

        async def ping() -> None:
            answer = await ada.post(f"{path}/ping")
            found.append((answer.status_code, answer.json().get("error", {}).get("code")))

        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(ping)
        assert sorted(found, key=str) == [(202, None), *[(409, "conflict")] * 5]
        assert len((await ada.get(f"{path}/deliveries")).json()["data"]) == 1
        await ada.patch(path, json={"url": there.url})

        def now() -> None:
            with rig.accounts.database.write() as connection:
                connection.execute(sa.update(deliveries).values(due_at_ms=1))

        await trio.to_thread.run_sync(now)
        await settled(rig, made["id"], "delivered", 1)
        await ping()
        assert found[-1] == (202, None)


async def test_deliveries_of_who_is_shut_out_leave_the_others_their_places(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database, **LOOPBACK) as rig, rig.http() as ada, receiver() as there:
        opened = rig.accounts.database
        bob = client(rig, await key_of(rig, "bob"))
        async with bob:
            made = [await make(bob, there.url) for _ in range(3)]
            await trio.to_thread.run_sync(rig.accounts.set_disabled, "bob", True)
        for each in made:
            await trio.to_thread.run_sync(webhooks.ping, opened, each["id"], None)
        own = await make(ada, there.url)
        await ada.post(f"/v1/webhooks/{own['id']}/ping")
        await settled(rig, own["id"], "delivered", 1)
        await trio.to_thread.run_sync(webhooks.ping, opened, own["id"], None)
        claim = partial(webhooks.claim, opened, "another", limit=1, busy=())
        with trio.fail_after(5):
            while not (found := await trio.to_thread.run_sync(claim)):
                with suppress(ApiError):  # the one before is on its way
                    await trio.to_thread.run_sync(webhooks.ping, opened, own["id"], None)
        assert {due.webhook_id for due in found} == {own["id"]}


async def test_one_that_hangs_holds_up_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.jobs.posting.SECONDS_MAX", 1.0)
    async with serving(tmp_path, **LOOPBACK) as rig, rig.http() as ada:  # noqa: SIM117 - the receivers end first
        async with receiver(answers=[None] * 50) as hangs, receiver() as good:
            bad, fine = await make(ada, hangs.url, "key.*"), await make(ada, good.url, "batch.*")
            for _ in range(3):
                await ada.post("/v1/api-keys", json={})
            await settled(rig, bad["id"], "pending", 3)
            await ada.post(f"/v1/webhooks/{fine['id']}/ping")
            await settled(rig, fine["id"], "delivered", 1)
            assert len(hangs.heard) == 1

            def problem() -> str:
                with rig.accounts.database.read() as connection:
                    return connection.execute(sa.select(hooks.c.problem).where(hooks.c.id == bad["id"])).scalar_one()

            with trio.fail_after(5):
                while "no answer" not in await trio.to_thread.run_sync(problem):  # noqa: ASYNC110
                    await trio.sleep(0.05)


async def test_what_happened_before_a_kill_is_delivered_after_it(tmp_path: Path, database: str) -> None:
    async with receiver() as there:
        async with serving(tmp_path, database=database, **LOOPBACK) as rig, rig.http() as ada:
            made = await make(ada, there.url, "key.created")

            def killed() -> None:
                """As a gateway leaves it that dies between a commit and everything else."""
                with rig.accounts.database.write() as connection:
                    user = connection.execute(sa.select(hooks.c.user_id)).scalar_one()
                    events.record(connection, "key.created", user, {"id": "last words"})

            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, killed)
        async with serving(tmp_path, database=database, **LOOPBACK) as rig:
            await settled(rig, made["id"], "delivered", 1)
    assert json.loads(there.heard[0][1])["data"]["id"] == "last words"


async def test_webhooks_reach_no_place_that_only_the_gateway_can(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, rig.http() as ada:
        for url in (
            "http://example.com/",
            "https://127.0.0.1/",
            "https://[::1]/",
            "https://[::ffff:10.0.0.1]/",
            "https://[64:ff9b::7f00:1]/",
            "https://169.254.169.254/latest/meta-data",
            "https://user:pw@example.com/",
            "https://example.com:0/",
            "ftp://example.com",
            "https://exa mple.com",
            "https:///x",
            "https://example.com/\r\nx: y",
            "https://[::1",
        ):
            refused = await ada.post("/v1/webhooks", json={"url": url})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "url"), url
        bob = await key_of(rig, "bob")
        made = await make(ada, "https://example.com/hook")
        async with client(rig, bob) as bobs:
            for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/ping"), ("GET", "/deliveries")):
                hidden = await bobs.request(method, f"/v1/webhooks/{made['id']}{path}")
                assert hidden.status_code == 404, path
            assert made["id"] not in (await bobs.get("/v1/webhooks")).text


async def test_a_database_row_has_no_secret_in_clear(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, rig.http() as ada:
        made = await make(ada, "https://example.com/hook")
        secret = base64.b64decode(made["secret"].removeprefix("whsec_"))
        assert secret not in (tmp_path / "gateway.db-wal").read_bytes() + (tmp_path / "gateway.db").read_bytes()
        with rig.accounts.database.read() as connection:
            told = connection.execute(sa.select(rows.c.data)).scalars().all()
        assert made["secret"] not in str(told)
