"""One thing of a user's for every kind of thing that the gateway's routes take an id of."""

import json
import time
from collections.abc import Awaitable, Callable
from functools import partial

import httpx
import trio
from gateway_rig import Rig
from test_rights import user_id

from gateway.audit import OPERATOR
from gateway.billing import invoices, payment
from gateway.identity import sessions
from gateway.identity.sessions import Client

MARK = "bobs-own"
"""Stands in everything that can have a name."""
CHAT = "/v1/chat/completions"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": MARK}]}
MONTH_MS = 32 * 86_400_000

Make = Callable[[Rig, httpx.AsyncClient], Awaitable[str]]
"""Makes one of bob's things; its id."""


def _good(answer: httpx.Response) -> dict:
    assert answer.is_success, (answer.request.url, answer.text)
    return answer.json()


async def _user(rig: Rig, bob: httpx.AsyncClient) -> str:
    return await user_id(rig, "bob")


async def _key(rig: Rig, bob: httpx.AsyncClient) -> str:
    return _good(await bob.post("/v1/api-keys", json={"name": MARK}))["id"]


async def _file(rig: Rig, bob: httpx.AsyncClient) -> str:
    line = {"custom_id": MARK, "method": "POST", "url": CHAT, "body": HELLO}
    upload = {"file": (f"{MARK}.jsonl", json.dumps(line).encode())}
    return _good(await bob.post("/v1/files", files=upload, data={"purpose": "batch"}))["id"]


async def _batch(rig: Rig, bob: httpx.AsyncClient) -> str:
    """One that is done, so that nothing changes by itself."""
    body = {"input_file_id": await _file(rig, bob), "endpoint": CHAT, "completion_window": "24h"}
    made = _good(await bob.post("/v1/batches", json={**body, "metadata": {"name": MARK}}))
    with trio.fail_after(20):
        while made["status"] != "completed":
            await trio.sleep(0.05)
            made = _good(await bob.get(f"/v1/batches/{made['id']}"))
    return made["id"]


async def _webhook(rig: Rig, bob: httpx.AsyncClient) -> str:
    """Of what does not happen here."""
    body = {"url": f"https://hooks.example.com/{MARK}", "types": ["webhook.disabled"]}
    return _good(await bob.post("/v1/webhooks", json=body))["id"]


async def _session(rig: Rig, bob: httpx.AsyncClient) -> str:
    owner, client = await user_id(rig, "bob"), Client(address="::1", agent=MARK)
    start = partial(sessions.start, rig.accounts.database, owner, "oidc", client, seconds=3600, cookie=True)
    made = await trio.to_thread.run_sync(start)
    assert made is not None
    return made[0].id


async def _budget(rig: Rig, bob: httpx.AsyncClient) -> str:
    return _good(await bob.put("/v1/billing/budgets", json={"microcredits": 1 << 30}))["id"]


async def _invoice(rig: Rig, bob: httpx.AsyncClient) -> str:
    """For a request that was paid from a top-up."""
    database, owner = rig.accounts.database, await user_id(rig, "bob")
    await trio.to_thread.run_sync(payment.top_up, database, OPERATOR, owner, 1_000_000, MARK)
    _good(await bob.post(CHAT, json=HELLO))
    later = int(time.time() * 1000) + MONTH_MS
    assert await trio.to_thread.run_sync(invoices.close_months, database, OPERATOR, later) == 1
    return str(_good(await bob.get("/v1/billing/invoices"))["data"][0]["number"])


async def _deployment(rig: Rig, bob: httpx.AsyncClient) -> str:
    return _good(await bob.post("/v1/deployments", json={"model": "tiny"}))["id"]


MAKERS: dict[str, Make] = {
    "/v1/billing/invoices": _invoice,  # first: it pays for the others
    "/v1/users": _user,
    "/v1/api-keys": _key,
    "/v1/files": _file,
    "/v1/batches": _batch,
    "/v1/webhooks": _webhook,
    "/v1/auth/sessions": _session,
    "/v1/billing/budgets": _budget,
    "/v1/deployments": _deployment,
}
"""By the path in front of the id."""
BODIES = {
    ("PATCH", "/v1/users/{user}"): {"name": "ada's now"},
    ("PATCH", "/v1/api-keys/{key}"): {"name": "ada's now"},
    ("PATCH", "/v1/webhooks/{webhook}"): {"types": ["key.*"]},
    ("PATCH", "/v1/deployments/{model}"): {"replicas": 1},
}
"""Good ones, of routes that take an id and a body."""
SEEN_BY_ALL = frozenset({"/v1/deployments"})
"""Who may not change these is told so (403); everything else looks as if it did not exist (404)."""
