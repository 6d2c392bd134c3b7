"""A real Chromium, signed in at the gateway, on a page of somebody else: what that page can make it do."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trio
from gateway_rig import Rig, serving
from identity_rig import PASSWORD, add_user

ATTACKS = """
async ([gateway, body, password]) => {
  const seen = [];
  const send = async (path, options) => {
    try {
      const answer = await fetch(gateway + path, {method: "POST", credentials: "include", mode: "no-cors", ...options});
      seen.push(answer.type);
    } catch (error) { seen.push(String(error)); }
  };
  await send("/v1/chat/completions", {body});
  await send("/v1/auth/logout", {});
  await send("/v1/auth/login", {body: JSON.stringify({email: "mallory@example.com", password, cookie: true})});
  await send("/v1/chat/completions", {mode: "cors", body, headers: {"content-type": "application/json"}});
  const form = document.createElement("form");
  form.method = "post"; form.enctype = "text/plain"; form.target = "frame";
  form.action = gateway + "/v1/chat/completions";
  const field = document.createElement("input"); field.name = body.slice(0, -1) + ', "user": "'; field.value = '"}';
  form.append(field);
  const frame = document.createElement("iframe"); frame.name = "frame";
  document.body.append(frame, form);
  const loaded = new Promise(done => frame.addEventListener("load", done));
  form.submit();
  await loaded;
  return seen;
}
"""
CHROMIUM = "/usr/bin/chromium"
BODY = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]})


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>free kittens</title><body>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[int]:
    """The port of another web server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def attack(rig: Rig, port: int) -> tuple[dict[str, object], int]:
    """Who the browser is afterwards, and the status of its own use of the gateway."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{rig.gateway.url}/dashboard/sign-in")
        signed = page.evaluate(
            """async ([email, password]) => (await fetch("/v1/auth/login", {
                method: "POST", body: JSON.stringify({email, password, cookie: true})})).json()""",
            ["grace@example.com", PASSWORD],
        )
        for host in ("127.0.0.1", "localhost"):  # the same site at another port, and another site
            page.goto(f"http://{host}:{port}/")
            page.evaluate(ATTACKS, [rig.gateway.url, BODY, PASSWORD])
        page.goto(f"{rig.gateway.url}/dashboard/sign-in")
        assert page.evaluate("document.cookie") == "", "scripts do not see the cookie"
        me = page.evaluate("async () => (await fetch('/v1/auth/me')).json()")
        own = page.evaluate(
            """async ([body, token]) => (await fetch("/v1/chat/completions", {
                method: "POST", body, headers: {"x-csrf-token": token}})).status""",
            [BODY, signed["csrf_token"]],
        )
        browser.close()
    return me, own


def answers(rig: Rig, route: str) -> dict[str, int]:
    """How often the gateway answered how."""
    samples = [sample for metric in rig.registry.collect() for sample in metric.samples]
    mine = [s for s in samples if s.name == "rios_gateway_requests_total" and s.labels["route"] == route]
    return {sample.labels["status"]: int(sample.value) for sample in mine}


@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="there is no Chromium here")
@pytest.mark.parametrize("require_key", [True, False])
async def test_pages_of_others_change_nothing(
    tmp_path: Path, elsewhere: int, cheap_hashes: None, require_key: bool
) -> None:
    async with serving(tmp_path, require_key=require_key) as rig:
        for name in ("grace", "mallory"):
            await trio.to_thread.run_sync(add_user, rig, name)
        await trio.to_thread.run_sync(rig.accounts.credit, "grace", 100_000)
        me, own = await trio.to_thread.run_sync(attack, rig, elsewhere)
        assert me["name"] == "grace"
        assert own == 200
        assert len(rig.engine.requests) == 1
        # The attacks came as far as the gateway: a request without CORS and a form from each site. The browser sends no
        # cookie from another site, so there it is nobody.
        nobody = {"401": 2} if require_key else {}
        assert answers(rig, "/v1/chat/completions") == {"200": 1, "403": 2 if require_key else 4, **nobody}
        assert answers(rig, "/v1/auth/login") == {"200": 1, "403": 2}
        assert sum(answers(rig, "/v1/auth/logout").values()) == 2
        assert set(answers(rig, "/v1/auth/logout")) <= {"401", "403"}
        assert answers(rig, "other")["405"] == 2, "preflights: other sites are never allowed"
