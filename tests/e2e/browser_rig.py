"""A real Chromium at a gateway's dashboard, for tests, and the people who sign in there.

Every page is watched: nothing may be written to the console, no policy may be broken, no request may leave the gateway.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pyotp
import pytest
import trio
from fake_swarm import FakeLedger, FakeSwarm
from gateway_rig import Rig, serving
from identity_rig import PASSWORD, add_user

CHROMIUM = Path("/usr/bin/chromium")
NEEDED = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}")
LOOK_SECONDS_MAX, CLOSE_SECONDS_MAX = 200, 30
PHONE = {"width": 390, "height": 844}
_POLICY = "addEventListener('securitypolicyviolation', e => console.error('policy', e.violatedDirective))"

T = TypeVar("T")


class Browser:
    """A browser with one window. ``problems``: what pages wrote to the console, asked of others (but of
    ``elsewhere``), or broke."""

    def __init__(self, url: str, context: Any) -> None:
        self.url = url
        self.context = context
        self.problems: list[str] = []
        self.elsewhere = url
        context.on("page", self._watch)
        context.add_init_script(_POLICY)
        self.page = context.new_page()
        self.page.set_default_timeout(60_000)

    def _watch(self, page: Any) -> None:
        page.on("console", lambda message: self._note(message.type, message.text))
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("dialog", lambda dialog: self.problems.append(f"a dialog: {dialog.message}") or dialog.dismiss())
        page.on("request", lambda request: self._asked(request.url))

    def _note(self, kind: str, text: str) -> None:
        expected = "the server responded with a status of 401"  # a browser says so of every refused sign-in
        if kind != "debug" and expected not in text:
            self.problems.append(f"{kind}: {text}")

    def _asked(self, url: str) -> None:
        if not url.startswith((self.url, self.elsewhere, "data:", "blob:")):
            self.problems.append(f"asked {url}")

    def open(self, path: str = "") -> None:
        self.page.goto(f"{self.url}/dashboard{path}")

    def sign_in(self, name: str, code: str = "") -> None:
        self.open("/sign-in")
        self.page.get_by_label("E-mail").fill(f"{name}@example.com")
        self.page.get_by_label("Password").fill(PASSWORD)
        self.page.get_by_role("button", name="Sign in").click()
        if code:
            self.page.get_by_label("Code of your authenticator").fill(code)
            self.page.get_by_role("button", name="Sign in").click()
        self.page.wait_for_url(f"{self.url}/dashboard")

    def set_up_second_factor(self) -> list[str]:
        """On the account's page; the recovery codes."""
        page = self.page
        page.get_by_role("button", name="Set it up").click()
        page.locator("#enrol").get_by_label("Your password").fill(PASSWORD)
        page.get_by_role("button", name="Go on").click()
        secret = page.locator("#e-secret:not(:empty)").text_content()
        assert page.locator("#e-uri").get_attribute("href").startswith("otpauth://totp/")
        page.locator("#enrol").get_by_label("Code", exact=True).fill(pyotp.TOTP(secret).now())
        page.get_by_role("button", name="Go on").click()
        codes: list[str] = page.locator("#e-codes:not(:empty)").text_content().split()
        page.get_by_role("button", name="I have kept them").click()
        page.get_by_text("Signing in needs a code").wait_for()
        return codes


class Chromium:
    """One process for many tests; each gets a profile of its own in it, new and gone afterwards. All of it happens in
    one thread: what Playwright makes belongs to the thread that made it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "chromium")
        self._stack = ExitStack()
        self._process: Any = None

    def look(self, url: str, use: Callable[[Browser], T], options: Mapping[str, Any]) -> T:
        """What ``use`` returns of a browser at ``url``; blocking. Fails the test if the pages had problems."""
        try:
            return self._thread.submit(self._look, url, use, options).result(LOOK_SECONDS_MAX)
        except TimeoutError:
            self._give_up()
            raise

    def _look(self, url: str, use: Callable[[Browser], T], options: Mapping[str, Any]) -> T:
        with self._started().new_context(viewport={"width": 1280, "height": 900}, **options) as context:
            made = Browser(url, context)
            found = use(made)
            if made.problems:
                pytest.fail("\n".join(made.problems))
            return found

    def _started(self) -> Any:
        if self._process is None or not self._process.is_connected():
            self._stack.close()
            sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
            playwright = self._stack.enter_context(sync_api.sync_playwright())
            launched = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
            self._process = self._stack.enter_context(launched)
        return self._process

    def _give_up(self) -> None:
        """It hangs: whoever waits for it learns that it is gone, and the next one begins anew."""
        for process in psutil.Process().children(recursive=True):
            if process.name() in ("node", "chromium"):  # Playwright's driver, and the browser
                process.kill()
        self._thread.shutdown(wait=False)
        self._thread, self._stack, self._process = ThreadPoolExecutor(1, "chromium"), ExitStack(), None

    def close(self) -> None:
        try:
            self._thread.submit(self._stack.close).result(CLOSE_SECONDS_MAX)
        except TimeoutError:
            self._give_up()
        self._thread.shutdown()


@cache
def chromium() -> Chromium:
    """That of this process; ``conftest`` ends it."""
    return Chromium()


async def look(rig: Rig, use: Callable[[Browser], T], **options: Any) -> T:
    """Use a browser in a thread beside the gateway."""
    return await trio.to_thread.run_sync(chromium().look, rig.gateway.url, use, options)


def dashboard(folder: Path, **options: Any) -> Any:
    options = {"swarm": FakeSwarm(), "ledger_view": FakeLedger(), **options}
    return serving(folder, **options)


async def people(rig: Rig, *names: tuple[str, str]) -> dict[str, str]:
    def make() -> dict[str, str]:
        return {name: add_user(rig, name, role=role) for name, role in names}  # type: ignore[arg-type]

    return await trio.to_thread.run_sync(make)
