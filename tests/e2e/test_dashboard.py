"""The dashboard in a real Chromium: signing in, keys, chat, the map, export; what hostile names and strangers get."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from browser_rig import NEEDED, PHONE, Browser, dashboard, look, people
from fake_engine import ANSWER, FakeEngine
from fake_swarm import ME, FakeSwarm, peer
from gateway_rig import eventually, read_until
from identity_rig import PASSWORD

from gateway.billing import sheet
from gateway.dashboard.routes import HEADERS, PAGES
from gateway.roles import ROLES, Reach, reach_of

pytestmark = NEEDED

HOSTILE = "<img src=x onerror=alert(1)>\"'</script><script>alert(2)</script>"


async def test_sign_in_with_a_second_factor_and_out_again(tmp_path: Path) -> None:
    async with dashboard(tmp_path) as rig:
        await people(rig, ("grace", "developer"))

        def use(seen: Browser) -> None:
            page = seen.page
            seen.open("/keys")
            assert page.url.endswith("/dashboard/sign-in?next=/dashboard/keys")
            page.get_by_label("E-mail").fill("grace@example.com")
            page.get_by_label("Password").fill("wrong")
            page.get_by_role("button", name="Sign in").click()
            page.get_by_role("alert").filter(has_text="e-mail or password is wrong").wait_for()
            page.get_by_label("Password").fill(PASSWORD)
            page.get_by_role("button", name="Sign in").click()
            page.wait_for_url(f"{seen.url}/dashboard/keys")
            seen.open("/account")
            recovery = seen.set_up_second_factor()
            assert len(recovery) >= 8
            page.get_by_role("button", name="Sign out").click()
            page.wait_for_url("**/dashboard/sign-in")
            seen.open()
            assert "/sign-in" in page.url, "the session is over"
            seen.sign_in("grace", recovery[0])
            assert page.get_by_role("heading", name="Overview").is_visible()
            cookies = [each for each in seen.context.cookies() if each["name"] == "rios_session"]
            assert cookies[0]["httpOnly"]
            assert cookies[0]["sameSite"] == "Lax"
            # the next time with the authenticator itself
            page.get_by_role("button", name="Sign out").click()
            page.wait_for_url("**/dashboard/sign-in")
            seen.sign_in("grace", recovery[1])

        await look(rig, use)


async def test_a_key_is_made_used_and_revoked(tmp_path: Path) -> None:
    async with dashboard(tmp_path) as rig:
        await people(rig, ("grace", "developer"))

        def use(seen: Browser) -> str:
            page = seen.page
            seen.sign_in("grace")
            seen.open("/keys")
            page.get_by_role("button", name="New key").click()
            page.get_by_label("Name").fill("nightly")
            page.get_by_text("Limit what it may do").click()
            page.get_by_label("models:read").check()
            page.get_by_label("Reuse answers to the same request").check()
            page.get_by_role("button", name="Make key").click()
            secret: str = page.locator("#secret:not(:empty)").text_content()
            assert secret.startswith("rios_")
            models = httpx.get(f"{seen.url}/v1/models", headers={"authorization": f"Bearer {secret}"})
            assert models.status_code == 200
            keys = httpx.get(f"{seen.url}/v1/billing/balance", headers={"authorization": f"Bearer {secret}"})
            assert keys.status_code == 403, "its scopes hold"
            page.keyboard.press("Escape")
            assert page.locator("#secret").is_visible(), "Escape does not lose it"
            page.get_by_role("button", name="I have kept it").click()
            page.get_by_role("cell", name="nightly answers are reused", exact=True).wait_for()
            assert secret not in page.content(), "it is shown once"
            page.get_by_role("button", name="Revoke nightly").click()
            page.locator("#confirm").get_by_role("button", name="Revoke").click()
            page.get_by_text("revoked").wait_for()
            return secret

        secret = await look(rig, use)
        with trio.fail_after(8):
            async with httpx.AsyncClient(headers={"authorization": f"Bearer {secret}"}) as http:
                while (await http.get(f"{rig.gateway.url}/v1/models")).status_code != 401:  # noqa: ASYNC110
                    await trio.sleep(0.2)


async def test_chat_streams_and_stops(tmp_path: Path) -> None:
    engine = FakeEngine(pause_seconds=0.03)
    async with dashboard(tmp_path, engine=engine) as rig:
        await people(rig, ("grace", "developer"))
        await trio.to_thread.run_sync(rig.accounts.credit, "grace", 1_000_000)

        def use(seen: Browser) -> None:
            page = seen.page
            seen.sign_in("grace")
            seen.open("/chat")
            page.evaluate(
                "new MutationObserver(() => (window.steps ??= new Set())"
                ".add(document.querySelector('.assistant .text')?.textContent))"
                ".observe(document.querySelector('#lines'), {subtree: true, childList: true, characterData: true})"
            )
            page.get_by_label("Message", exact=True).fill("What is the capital of France?")
            page.keyboard.press("Enter")
            page.locator(".assistant .figures").wait_for()
            assert page.locator(".assistant .text").text_content() == "".join(ANSWER)
            assert page.evaluate("window.steps.size") >= 4, "it came piece by piece"
            assert "tokens/s" in page.locator(".assistant .figures").text_content()
            assert page.locator("#told").text_content() == f"Answer: {''.join(ANSWER)}"
            engine.endless = True
            page.get_by_label("Message", exact=True).fill("And now for ever")
            page.get_by_role("button", name="Send").click()
            page.get_by_role("button", name="Stop").click()
            page.get_by_role("button", name="Send").wait_for()

        await look(rig, use)
        assert len(engine.requests) == 2
        assert [message.role for message in engine.requests[1].messages or ()] == ["user", "assistant", "user"]
        with trio.fail_after(5):
            await engine.stopped.wait()


async def test_a_request_that_runs_is_seen_with_its_speed(tmp_path: Path) -> None:
    engine = FakeEngine(pause_seconds=0.05, endless=True)
    async with dashboard(tmp_path, engine=engine) as rig, trio.open_nursery() as nursery:
        await people(rig, ("root", "admin"), ("eve", "developer"))

        async def ask() -> None:
            async with rig.http() as http:
                body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}
                async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                    await answer.aread()

        nursery.start_soon(ask)

        def use(seen: Browser) -> None:
            page = seen.page
            seen.sign_in("root")
            seen.open("/requests")
            row = page.locator("#running tr")
            row.wait_for()
            assert "ada" in row.text_content()
            page.wait_for_function(
                "Number(document.querySelector('#running tr b + *, #running td:nth-child(6)').textContent) > 5"
            )

        def foreign(seen: Browser) -> None:
            seen.sign_in("eve")
            seen.open("/requests")
            seen.page.locator(".live[data-on=true]").wait_for()
            seen.page.wait_for_timeout(1500)
            assert seen.page.locator("#running tr").count() == 0, "others' requests are theirs"

        await look(rig, use)
        await look(rig, foreign)
        nursery.cancel_scope.cancel()


async def test_a_node_dies_and_comes_back_on_the_map(tmp_path: Path) -> None:
    swarm = FakeSwarm(count=4, layers=4, experts=8)
    async with dashboard(tmp_path, swarm=swarm) as rig:
        await people(rig, ("view", "viewer"))

        def use(seen: Browser) -> None:
            page = seen.page
            seen.sign_in("view")
            seen.open("/swarm")
            assert page.locator("#list tr").count() == 4
            before = page.locator("#heat rect.h1, #heat rect.h0").count()
            swarm.dead = {2}
            gone = page.locator(f"#sky [data-peer='{peer(2)}'][data-health=gone]")
            gone.wait_for()
            assert page.locator("#heat rect.h1, #heat rect.h0").count() > before, "its cells have paled"
            swarm.dead = set()
            page.locator(f"#sky [data-peer='{peer(2)}'][data-health=healthy]").wait_for()
            page.wait_for_function(f"document.querySelectorAll('#heat rect.h1, #heat rect.h0').length === {before}")
            # with the keyboard: choose a node, walk over the cells
            page.locator(f"#sky [data-peer='{ME}']").focus()
            page.keyboard.press("Enter")
            assert page.locator("#chosen").text_content() == "What this node holds"
            assert page.locator("#heat rect.dim").count() > 0
            page.locator("#heat svg").focus()
            page.keyboard.press("ArrowRight")
            page.keyboard.press("ArrowDown")
            assert "Layer 1, expert 0" in page.locator("#heat .detail").text_content()

        await look(rig, use)


async def test_deploy_scale_and_take_back(tmp_path: Path) -> None:
    swarm = FakeSwarm()
    async with dashboard(tmp_path, swarm=swarm) as rig:
        await people(rig, ("grace", "developer"))

        def use(seen: Browser) -> None:
            page = seen.page
            seen.sign_in("grace")
            seen.open("/deployments")
            others = page.locator("[data-deployment]")
            assert others.count() == 1
            assert others.get_by_role("button", name="Undeploy").count() == 0, "it was made on the command line"
            page.get_by_role("button", name="Deploy a model").click()
            page.locator("#deploy").get_by_label("Model").fill("tiny")
            page.get_by_role("button", name="Deploy", exact=True).click()
            mine = page.locator("[data-model=tiny]")
            mine.get_by_role("button", name="One replica more").click()
            mine.locator(".wanted", has_text="3").wait_for()
            mine.get_by_role("button", name="Undeploy").click()
            page.locator("#confirm").get_by_role("button", name="Undeploy").click()
            mine.wait_for(state="detached")

        await look(rig, use)
        assert len(swarm.wanted) == 1


async def test_usage_is_shown_and_exported(tmp_path: Path) -> None:
    async with dashboard(tmp_path) as rig:
        await people(rig, ("grace", "developer"))
        await trio.to_thread.run_sync(rig.accounts.credit, "grace", 1_000_000)
        async with rig.http() as http:  # ada's: not to be seen by grace
            await http.post("/v1/completions", json={"model": "tiny", "prompt": "ada asks", "max_tokens": 3})

        def use(seen: Browser) -> tuple[str, str]:
            page = seen.page
            seen.sign_in("grace")
            seen.open("/chat")
            page.get_by_label("Message", exact=True).fill("hello there")
            page.keyboard.press("Enter")
            page.locator(".assistant .figures").wait_for()
            seen.open("/usage")
            assert page.locator("svg.chart rect.answer").count() == 1
            assert page.get_by_role("cell", name="tiny").is_visible()
            found = []
            for kind in ("CSV", "JSON"):
                with page.expect_download() as download:
                    page.get_by_role("link", name=kind).click()
                found.append(Path(download.value.path()).read_text())
            return found[0], found[1]

        table, data = await look(rig, use)
        rows = list(csv.DictReader(io.StringIO(table)))
        assert [(row["model"], row["prompt_tokens"], row["completion_tokens"]) for row in rows] == [("tiny", "2", "7")]
        assert [row["id"] for row in json.loads(data)] == [rows[0]["id"]]


async def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    swarm = FakeSwarm(name=HOSTILE)
    async with dashboard(tmp_path, swarm=swarm) as rig:
        await people(rig, ("root", "admin"))

        def plant() -> None:
            rig.accounts.create_user(HOSTILE, email="x@example.com")
            rig.accounts.create_key(HOSTILE, HOSTILE)
            rig.accounts.create_key("root", f"=1+1{HOSTILE}")

        await trio.to_thread.run_sync(plant)

        def use(seen: Browser) -> None:
            seen.sign_in("root")
            for page in PAGES:
                if "{" not in page.path:
                    seen.open(page.path)
                    seen.page.wait_for_timeout(400)
                    assert seen.page.locator("img, script:not([src]):not([type='application/json'])").count() == 0
            for path in (f"/chat?model={HOSTILE}", f"/usage?days={HOSTILE}&of={HOSTILE}", f"/ledger/{'0' * 64}"):
                seen.open(path)
            seen.open("/users")
            assert seen.page.get_by_text(HOSTILE).count() >= 1
            seen.open("/keys")
            assert seen.page.get_by_role("cell", name=f"=1+1{HOSTILE}", exact=True).count() == 1
            seen.open("/swarm")
            assert seen.page.get_by_text(HOSTILE).count() >= 1

        await look(rig, use)


async def test_with_the_keyboard_alone(tmp_path: Path) -> None:
    async with dashboard(tmp_path) as rig:
        await people(rig, ("grace", "developer"))

        def use(seen: Browser) -> None:
            page = seen.page

            def tab_to(name: str) -> None:
                for _ in range(60):
                    page.keyboard.press("Tab")
                    label = page.evaluate(
                        "(e => e.labels?.[0]?.textContent || e.getAttribute('aria-label') || e.textContent.trim())"
                        "(document.activeElement)"
                    )
                    if label.strip() == name:
                        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                        assert outline != "none", f"the focus on {name} is seen"
                        return
                raise AssertionError(f"Tab does not come to {name}")

            seen.open("/sign-in")
            page.keyboard.type("grace@example.com")
            tab_to("Password")
            page.keyboard.type(PASSWORD)
            page.keyboard.press("Enter")
            page.wait_for_url("**/dashboard")
            page.keyboard.press("Tab")
            page.keyboard.press("Enter")  # skip to the content
            assert page.evaluate("document.activeElement.id") == "main"
            seen.open("/keys")
            tab_to("New key")
            page.keyboard.press("Enter")
            page.keyboard.type("by hand")
            page.keyboard.press("Enter")
            page.locator("#secret:not(:empty)").wait_for()
            assert page.evaluate("document.activeElement.id") == "kept"
            page.keyboard.press("Enter")
            page.get_by_role("cell", name="by hand", exact=True).wait_for()

        await look(rig, use)


CHECKS = Path(__file__).with_name("page_checks.js").read_text().partition("\n")[2]


@pytest.mark.parametrize(("scheme", "size"), [("light", None), ("dark", None), ("dark", PHONE)])
async def test_labels_contrast_and_width(tmp_path: Path, scheme: str, size: Any) -> None:
    async with dashboard(tmp_path) as rig:
        await people(rig, ("root", "admin"))
        async with rig.http() as http:
            await http.post("/v1/completions", json={"model": "tiny", "prompt": "ada asks", "max_tokens": 3})

        def use(seen: Browser) -> dict[str, list[str]]:
            if size:
                seen.page.set_viewport_size(size)
            found = {}
            seen.open("/sign-in")
            found["/sign-in"] = seen.page.evaluate(CHECKS)
            seen.sign_in("root")
            for page in PAGES:
                seen.open(page.path.replace("{name}", "a" * 64))
                seen.page.wait_for_timeout(300)
                found[page.path] = seen.page.evaluate(CHECKS)
            return {path: problems for path, problems in found.items() if problems}

        assert await look(rig, use, color_scheme=scheme) == {}


async def test_themes_and_the_menu_of_a_phone(tmp_path: Path) -> None:
    async with dashboard(tmp_path) as rig:
        await people(rig, ("view", "viewer"))

        def use(seen: Browser) -> None:
            page = seen.page
            page.set_viewport_size(PHONE)
            seen.sign_in("view")

            def ground() -> str:
                return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

            page.get_by_role("button", name="Menu").click()
            page.get_by_role("link", name="Ledger").wait_for()
            assert page.get_by_role("link", name="Users").count() == 0, "a viewer has no page for users"
            before = ground()
            page.get_by_role("button", name="Change the theme").click()  # light
            page.get_by_role("button", name="Change the theme").click()  # dark
            dark = ground()
            assert dark != before
            page.keyboard.press("Escape")
            page.get_by_role("link", name="Ledger").wait_for(state="hidden")
            seen.open("/swarm")
            assert ground() == dark, "it is remembered"

        await look(rig, use, color_scheme="light")


async def test_every_page_asks_who_looks(tmp_path: Path) -> None:
    """Without a session: the way to sign in. With one: what the role may see, and nothing else; always the headers."""
    async with dashboard(tmp_path) as rig:
        await people(rig, *((role, role) for role in ROLES))
        for role in (None, *ROLES):
            async with httpx.AsyncClient(base_url=rig.gateway.url) as http:
                if role:
                    await http.post(
                        "/v1/auth/login",
                        json={"email": f"{role}@example.com", "password": PASSWORD, "cookie": True},
                    )
                for page in PAGES:
                    answer = await http.get(f"/dashboard{page.path}".replace("{name}", "a" * 64))
                    may = role is not None and reach_of(role, page.needs) is not Reach.NONE
                    assert answer.status_code == (200 if may else 403 if role else 303), (role, page.path)
                    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
                live = await http.send(http.build_request("GET", "/dashboard/live"), stream=True)
                assert live.status_code == (200 if role else 401)
                await live.aclose()


async def test_strangers_and_other_sites_get_nothing(tmp_path: Path) -> None:
    async with dashboard(tmp_path) as rig:
        await people(rig, ("root", "admin"))
        async with httpx.AsyncClient(base_url=rig.gateway.url) as http:
            for target in ("//evil.example", "https://evil.example", "/\\evil.example", "/dashboard/../x\\"):
                page = await http.get("/dashboard/sign-in", params={"next": target})
                assert 'data-next="/dashboard"' in page.text
            assert (await http.get("/dashboard/usage.csv")).status_code == 303
            assert (await http.get("/dashboard/static/x/..%2f..%2froutes.py")).status_code == 404
            body = {"email": "root@example.com", "password": PASSWORD, "cookie": True}
            await http.post("/v1/auth/login", json=body)
            for method, path in (
                ("POST", "/v1/api-keys"),
                ("POST", "/v1/users"),
                ("POST", "/v1/deployments"),
            ):
                answer = await http.request(method, path, json={"name": "x"})
                assert answer.status_code == 403, "no CSRF token"
        assert not [key for key in rig.accounts.list_keys() if key.name == "x"]


async def test_a_page_that_is_left_open_sees_nothing_after_sign_out(tmp_path: Path) -> None:
    async with dashboard(tmp_path) as rig, httpx.AsyncClient(base_url=rig.gateway.url, timeout=10) as http:
        await people(rig, ("root", "admin"))
        body = {"email": "root@example.com", "password": PASSWORD, "cookie": True}
        csrf = (await http.post("/v1/auth/login", json=body)).json()["csrf_token"]
        async with http.stream("GET", "/dashboard/live") as stream:
            lines = stream.aiter_lines()
            with trio.fail_after(5):
                while not (await anext(lines)).startswith("event: workers"):
                    pass
                assert (await http.post("/v1/auth/logout", headers={"x-csrf-token": csrf})).status_code == 204
                async for _ in lines:
                    pass  # it ends


async def test_a_fault_in_the_swarms_view_ends_neither_page_nor_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gateway.dashboard.live.SAMPLE_SECONDS", 0.05)

    class Faulty(FakeSwarm):
        broken = False

        def workers(self) -> Any:
            if self.broken:
                raise KeyError("a bug")
            return super().workers()

    swarm = Faulty()
    async with dashboard(tmp_path, swarm=swarm) as rig, rig.http() as http:
        stream = await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port)
        async with stream:
            head = f"GET /dashboard/live HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {rig.key}\r\n\r\n"
            await stream.send_all(head.encode())
            await read_until(stream, b"event: workers")
            swarm.broken = True
            await eventually(lambda: "could not be looked at" in caplog.text)
            swarm.broken, swarm.dead = False, {1}
            await read_until(stream, b"event: workers")
        assert (await http.get("/dashboard")).status_code == 200


def test_a_spreadsheet_runs_nothing() -> None:
    assert sheet.safe("=HYPERLINK(1)") == "'=HYPERLINK(1)"
    assert sheet.safe("-5") == "'-5"
    assert sheet.safe(-5) == -5
