"""The billing page in a real Chromium: budgets and how full they are, what was booked, invoices; an admin's top-up."""

import csv
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from browser_rig import NEEDED, PHONE, Browser, dashboard, look, people
from gateway_rig import Rig
from identity_rig import PASSWORD
from test_dashboard import CHECKS

from gateway import audit
from gateway.billing import invoices
from gateway.dashboard.billing import TRANSACTIONS, fill_of

pytestmark = NEEDED

ASK = {"model": "tiny", "prompt": "one two three", "max_tokens": 7}
COST = 3 * 1 + 7 * 2
"""Microcredits of one of them."""
BUDGET, CREDITS = 60, "0.00006"
"""A budget that three of them fill to 85 %: in microcredits, and as it is typed."""


async def spend(rig: Rig, times: int, key: str = "") -> None:
    async with rig.http() as http:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        for _ in range(times):
            assert (await http.post("/v1/completions", json=ASK, headers=headers)).status_code == 200


async def grace_with(rig: Rig, microcredits: int) -> str:
    """A developer with money; a key of theirs."""
    await people(rig, ("grace", "developer"))

    def make() -> str:
        rig.accounts.credit("grace", microcredits)
        return rig.accounts.create_key("grace", "nightly").secret

    return await trio.to_thread.run_sync(make)


async def test_a_budget_is_set_fills_and_is_removed(tmp_path: Path) -> None:
    async with dashboard(tmp_path) as rig:
        key = await grace_with(rig, 1_000_000)

        def begin(seen: Browser) -> None:
            page = seen.page
            seen.sign_in("grace")
            seen.open("/billing")
            assert page.get_by_role("button", name="Top up").count() == 0, "only admins pay in"
            page.get_by_text("No budget").wait_for()
            for target, amount in (("All requests", CREDITS), ("Key nightly", "3")):
                page.get_by_role("button", name="Set a budget").click()
                page.locator("#limit").get_by_label("For").select_option(label=target)
                page.locator("#limit").get_by_label("Credits a month").fill(amount)
                page.get_by_role("button", name="Set budget", exact=True).click()
                page.locator("[data-budget]").filter(has_text=target).wait_for()

        def end(seen: Browser) -> None:
            page = seen.page
            seen.sign_in("grace")
            seen.open("/billing")
            row = page.locator("[data-budget]").filter(has_text="All requests")
            assert f"{100 * 3 * COST // BUDGET} %" in row.text_content()
            meter = row.locator("svg.meter")
            assert meter.get_attribute("data-state") == "degraded"
            width = float(meter.locator("rect").first.get_attribute("width"))
            assert width == pytest.approx(100 * 3 * COST / BUDGET, abs=0.2)
            assert row.locator(".badge").all_text_contents() == ["50 %", "75 %"]
            row.get_by_role("button", name="Remove").click()
            page.locator("#confirm").get_by_role("button", name="Remove").click()
            row.wait_for(state="detached")
            assert page.locator("[data-budget]").count() == 1
            assert re.search(r"You spent in [0-9-]+\s+0\.000051", page.locator("dl.stats").inner_text())

        await look(rig, begin)
        await spend(rig, 3, key)
        await look(rig, end)


async def test_transactions_come_in_pages_and_are_ones_own(tmp_path: Path) -> None:
    async with dashboard(tmp_path) as rig:
        key = await grace_with(rig, 1_000_000)
        await spend(rig, 1)  # ada's
        await spend(rig, TRANSACTIONS + 2, key)

        def use(seen: Browser) -> None:
            page = seen.page
            seen.sign_in("grace")
            seen.open("/billing?of=all")
            assert page.get_by_role("link", name="Everybody").count() == 0
            moves = page.locator("section[aria-labelledby=t-moves] tbody tr")
            assert moves.count() == TRANSACTIONS
            first = moves.all_text_contents()
            assert all("charge" in each and f"-0.0000{COST}" in each for each in first)
            page.get_by_role("link", name="Older transactions").click()
            page.wait_for_url("**after=*")
            assert moves.count() == 3, "two charges and the credit, and nothing of ada's"
            assert "credit" in moves.last.text_content()
            assert "+1.00" in moves.last.text_content()
            assert page.get_by_role("link", name="Older transactions").count() == 0

        await look(rig, use)


async def test_invoices_are_downloaded_as_json_and_csv(tmp_path: Path) -> None:
    async with dashboard(tmp_path) as rig:
        key = await grace_with(rig, 1_000_000)
        await spend(rig, 1)
        await spend(rig, 2, key)
        later = int(time.time() * 1000) + 32 * 86_400_000
        assert await trio.to_thread.run_sync(invoices.close_months, rig.accounts.database, audit.GATEWAY, later) == 2

        def use(seen: Browser) -> list[str]:
            seen.sign_in("grace")
            seen.open("/billing")
            assert seen.page.locator("section[aria-labelledby=t-bills] tbody tr").count() == 1, "ada's is ada's"
            found = []
            for kind in ("CSV", "JSON"):
                with seen.page.expect_download() as download:
                    seen.page.get_by_role("link", name=f"as {kind}").click()
                assert download.value.suggested_filename.endswith(f".{kind.lower()}")
                found.append(Path(download.value.path()).read_text())
            return found

        table, data = await look(rig, use)
        assert list(csv.reader(io.StringIO(table)))[-1][-1] == str(2 * COST)
        assert json.loads(data)["microcredits"] == 2 * COST


async def test_an_admin_tops_a_user_up_and_sets_what_that_user_cannot_lift(tmp_path: Path) -> None:
    async with dashboard(tmp_path) as rig:
        await people(rig, ("root", "admin"), ("grace", "developer"))

        def pay(seen: Browser) -> None:
            page = seen.page
            seen.sign_in("root")
            seen.open("/billing")
            page.get_by_role("button", name="Top up").click()
            page.locator("#pay").get_by_label("User").select_option(label="grace")
            page.locator("#pay").get_by_label("Credits").fill("2.5")
            page.locator("#pay").get_by_label("Reference").fill("bank 77")
            page.keyboard.press("Enter")
            page.get_by_role("row").filter(has_text="grace").filter(has_text="bank 77").filter(
                has_text="+2.50"
            ).wait_for()
            page.get_by_role("button", name="Top up").click()
            page.locator("#pay").get_by_label("User").select_option(label="grace")
            page.locator("#pay").get_by_label("Credits").fill("2.5")
            page.locator("#pay").get_by_label("Reference").fill("bank 77")
            page.keyboard.press("Enter")
            page.locator(".toast.bad.on").wait_for()  # the reference counts once
            page.get_by_role("button", name="Cancel").last.click()
            page.get_by_role("button", name="Set a budget").click()
            page.locator("#limit").get_by_label("For").select_option(label="All requests of grace")
            page.locator("#limit").get_by_label("Credits a month").fill("1")
            page.get_by_role("button", name="Set budget", exact=True).click()
            page.locator("[data-budget]").filter(has_text="of grace").wait_for()

        def told(seen: Browser) -> None:
            seen.sign_in("grace")
            seen.open("/billing")
            seen.page.locator("[data-budget]").filter(has_text="Set by an admin").wait_for()
            assert seen.page.get_by_role("button", name="Remove").count() == 0

        await look(rig, _but_conflicts(pay))
        assert (await rig.balance("grace")).balance == 2_500_000
        await look(rig, told)


def _but_conflicts(use: Any) -> Any:
    """A browser writes of every refusal of the API to its console; here one is asked for."""

    def run(seen: Browser) -> Any:
        found = use(seen)
        seen.problems[:] = [each for each in seen.problems if "a status of 409" not in each]
        return found

    return run


@pytest.mark.parametrize(("scheme", "size"), [("light", None), ("dark", None), ("light", PHONE), ("dark", PHONE)])
async def test_a_full_page_keeps_labels_contrast_and_width(tmp_path: Path, scheme: str, size: Any) -> None:
    async with dashboard(tmp_path) as rig:
        await people(rig, ("root", "admin"))
        key = await grace_with(rig, 1_000_000)
        async with rig.http() as http:
            limit = {"microcredits": 2 * COST}
            assert (await http.put("/v1/billing/budgets", json=limit)).status_code == 200
        await spend(rig, 2)
        await spend(rig, 1, key)
        later = int(time.time() * 1000) + 32 * 86_400_000
        await trio.to_thread.run_sync(invoices.close_months, rig.accounts.database, audit.GATEWAY, later)

        def use(seen: Browser) -> list[str]:
            if size:
                seen.page.set_viewport_size(size)
            seen.sign_in("root")
            seen.open("/billing")
            found: list[str] = seen.page.evaluate(CHECKS)
            for opener, dialog in (("Top up", "#pay"), ("Set a budget", "#limit")):
                seen.page.get_by_role("button", name=opener).click()
                assert seen.page.locator(dialog).is_visible()
                found += seen.page.evaluate(CHECKS)
                seen.page.keyboard.press("Escape")
                seen.page.locator(dialog).wait_for(state="hidden")
            return found

        assert await look(rig, use, color_scheme=scheme) == []


async def test_a_viewer_looks_and_other_sites_change_nothing(tmp_path: Path) -> None:
    async with dashboard(tmp_path) as rig:
        await people(rig, ("view", "viewer"), ("root", "admin"))
        async with httpx.AsyncClient(base_url=rig.gateway.url) as http:
            for name in ("view", "root"):
                body = {"email": f"{name}@example.com", "password": PASSWORD, "cookie": True}
                await http.post("/v1/auth/login", json=body)
                page = await http.get("/dashboard/billing")
                assert page.status_code == 200
                assert ("Set a budget" in page.text) == ("Top up" in page.text) == (name == "root")
            for method, path in (("PUT", "/v1/billing/budgets"), ("POST", "/v1/billing/topups")):
                answer = await http.request(method, path, json={"microcredits": 1, "user_id": "x"})
                assert answer.status_code == 403, "no CSRF token"
            for cursor in ("after", "invoice", "budget"):
                for wrong in ("x", "%00", "9" * 200, "a:b:c", "'", "7"):
                    answer = await http.get(f"/dashboard/billing?{cursor}={wrong}")
                    assert answer.status_code == (400 if wrong == "%00" else 200)


@pytest.mark.parametrize(
    ("spent", "held", "limit", "filled"),
    [
        (0, 0, 100, (0.0, 0.0, 0, "ready")),
        (40, 20, 100, (40.0, 20.0, 40, "ready")),
        (75, 0, 100, (75.0, 0.0, 75, "degraded")),
        (89, 90, 100, (89.0, 11.0, 89, "degraded")),
        (90, 0, 100, (90.0, 0.0, 90, "failed")),
        (300, 0, 100, (100.0, 0.0, 300, "failed")),
        (0, 0, 0, (100.0, 0.0, 100, "failed")),
    ],
)
def test_how_full_a_budget_is(spent: int, held: int, limit: int, filled: tuple[float, float, int, str]) -> None:
    found = fill_of({"spent": spent, "reserved": held, "microcredits": limit})
    assert (found.spent, found.held, found.percent, found.state) == filled
