"""Streams that last as long as a client likes: one user does not take everybody's places."""

from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
import trio
from gateway_rig import serving
from test_events_webhooks import opening, sse
from test_rights import client, key_of
from wsproto.events import AcceptConnection, RejectConnection

from gateway import events, listeners
from gateway.dashboard import live


@pytest.mark.parametrize("path", ["/v1/events", "/dashboard/live"])
async def test_one_user_does_not_take_every_listeners_place(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listeners, "FOR_ADMINS", 1)
    monkeypatch.setattr(events, "SUBSCRIBERS_MAX", listeners.EACH_MAX + 2)
    monkeypatch.setattr(live, "WATCHERS_MAX", listeners.EACH_MAX + 2)
    async with serving(tmp_path) as rig, AsyncExitStack() as stack:
        ada = await stack.enter_async_context(rig.http())
        others = [client(rig, await key_of(rig, *who)) for who in (("bob", "viewer"), ("eve",), ("root", "admin"))]
        bob, eve, root = [await stack.enter_async_context(each) for each in others]

        async def listen(http: httpx.AsyncClient) -> httpx.Response:
            answer = await stack.enter_async_context(http.stream("GET", path))
            if answer.status_code != 200:
                await answer.aread()
            return answer

        opened = [await listen(ada) for _ in range(listeners.EACH_MAX)]
        assert {answer.status_code for answer in opened} == {200}
        refused = await listen(ada)
        assert refused.status_code == 429
        assert f"this user has {listeners.EACH_MAX}" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) == 5
        assert (await listen(bob)).status_code == 200
        assert (await listen(eve)).status_code == 503, "the last place is an admin's"
        assert (await listen(root)).status_code == 200
        for answer in opened[:2]:
            await answer.aclose()
        with trio.fail_after(10):
            while (await listen(ada)).status_code != 200:  # noqa: ASYNC110 - the gateway finds out by writing
                await trio.sleep(0.1)


async def test_a_users_places_hold_for_websockets_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners.Listeners.__init__, "__defaults__", (1,))
    async with serving(tmp_path) as rig, rig.http() as ada, sse(ada):
        async with opening(rig, authorization=f"Bearer {rig.key}") as (_, answer):
            assert isinstance(answer, RejectConnection)
            assert answer.status_code == 429
        async with opening(rig, authorization=f"Bearer {await key_of(rig, 'bob')}") as (_, answer):
            assert isinstance(answer, AcceptConnection)
