"""Takes the pictures of docs/dashboard: ``python tests/e2e/dashboard_pictures.py``.

Of a real swarm, the demo's: three processes, the bundled model, answers and payments as they happen. One of them is
killed for the picture of a swarm that lost a node.
"""

import json
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
from rich.console import Console

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from browser_rig import CHROMIUM  # noqa: E402

from node.demo import QUESTION, Demo  # noqa: E402
from node.rig import Swarm, rios  # noqa: E402

PICTURES = HERE.parents[1] / "docs" / "dashboard"
PASSWORD = "correct horse battery staple"
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
SETTLE_MS = 6000


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with Swarm() as swarm:
        demo = Demo(swarm, Console(stderr=True))
        demo.start_nodes()
        demo.place_model()
        node = demo.orchestrator
        rios(node, "gateway", "user", "create", "ada", "--role", "admin", "--email", "ada@example.com")
        rios(node, "gateway", "user", "credit", "ada", "100")
        token = json.loads(rios(node, "gateway", "user", "invite", "ada", "--json"))["token"]
        url = str(node.ask("status")["gateway"]["url"])
        httpx.post(f"{url}/v1/auth/accept", json={"token": token, "password": PASSWORD}, timeout=20).raise_for_status()
        for _ in range(3):
            demo.ask(QUESTION)
        for worker in demo.workers:
            worker.ask("ledger.settle")
        take(demo, url)
        demo.aside.shutdown()


def take(demo: Demo, url: str) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])

        def window(scheme: str, size: dict[str, int], **more: Any) -> Any:
            made = chromium.new_context(viewport=size, color_scheme=scheme, **more).new_page()
            made.goto(f"{url}/dashboard/sign-in")
            made.get_by_label("E-mail").fill("ada@example.com")
            made.get_by_label("Password").fill(PASSWORD)
            made.get_by_role("button", name="Sign in").click()
            made.wait_for_url("**/dashboard")
            return made

        def picture(page: Any, path: str, name: str) -> None:
            page.goto(f"{url}/dashboard{path}")
            page.wait_for_timeout(SETTLE_MS)
            page.screenshot(path=PICTURES / f"{name}.png")

        light, dark = window("light", DESKTOP), window("dark", DESKTOP)
        phone = window("dark", PHONE, device_scale_factor=1.5, is_mobile=True, has_touch=True)
        asking = Thread(target=demo.ask, args=(QUESTION,), daemon=True)
        asking.start()
        picture(light, "", "overview-light")
        asking.join()
        picture(phone, "", "overview-phone")
        picture(light, "/ledger", "ledger-light")
        dark.goto(f"{url}/dashboard/chat")
        dark.get_by_label("Message", exact=True).fill("What is the capital of France?")
        dark.keyboard.press("Enter")
        dark.locator(".assistant .figures").wait_for(timeout=60_000)
        dark.screenshot(path=PICTURES / "chat-dark.png")
        limit(url)
        picture(light, "/billing", "billing-light")
        demo.workers[0].kill()
        dark.goto(f"{url}/dashboard/swarm")
        dark.locator("#sky [data-health=gone]").wait_for(timeout=60_000)
        time.sleep(SETTLE_MS / 1000)
        dark.screenshot(path=PICTURES / "swarm-dark.png")
        picture(phone, "/swarm", "swarm-phone")
        chromium.close()


def limit(url: str) -> None:
    """A budget of which two thirds are used."""
    with httpx.Client(base_url=url, timeout=20) as http:
        signed_in = http.post("/v1/auth/login", json={"email": "ada@example.com", "password": PASSWORD}).json()
        http.headers["authorization"] = f"Bearer {signed_in['access_token']}"
        spent = sum(row["microcredits"] for row in http.get("/v1/billing/usage").json()["data"])
        http.put("/v1/billing/budgets", json={"microcredits": spent * 3 // 2}).raise_for_status()


if __name__ == "__main__":
    main()
