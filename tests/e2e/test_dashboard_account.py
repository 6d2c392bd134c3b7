"""Signing in with one's organisation, as a person in a browser sees it."""

from pathlib import Path

import pytest
from browser_rig import NEEDED, Browser, look, people
from fake_swarm import FakeLedger, FakeSwarm
from identity_rig import PASSWORD
from oidc_rig import Provider, served

pytestmark = [NEEDED, pytest.mark.usefixtures("cheap_hashes")]


async def test_link_sign_in_with_a_code_and_unlink(tmp_path: Path, provider: Provider) -> None:
    dashboard = {"swarm": FakeSwarm(), "ledger_view": FakeLedger()}
    async with served(tmp_path, provider, oidc_sign_up=False, **dashboard) as rig:
        await people(rig, ("grace", "developer"))

        def use(seen: Browser) -> None:
            page, seen.elsewhere = seen.page, provider.issuer
            seen.sign_in("grace")
            seen.open("/account")
            page.get_by_role("button", name="Link an identity").click()
            page.locator("#link").get_by_label("Your password").fill("wrong")
            page.get_by_role("button", name="Go there").click()
            page.get_by_text("password is wrong").wait_for()
            page.locator("#link").get_by_label("Your password").fill(PASSWORD)
            page.get_by_role("button", name="Go there").click()
            page.get_by_text(provider.issuer).wait_for()
            assert page.url == f"{seen.url}/dashboard/account"
            recovery = seen.set_up_second_factor()
            page.get_by_role("button", name="Sign out").click()
            page.wait_for_url("**/dashboard/sign-in")
            seen.open("/account")
            page.get_by_role("link", name="Sign in with your organisation").click()
            page.wait_for_url("**/dashboard/sign-in?code=1")
            assert page.get_by_label("E-mail").is_hidden()
            code = page.get_by_label("Code of your authenticator")
            code.fill("000000")
            page.get_by_role("button", name="Sign in").click()
            page.get_by_role("alert").filter(has_text="code").wait_for()
            code.fill(recovery[0])
            page.get_by_role("button", name="Sign in").click()
            page.wait_for_url(f"{seen.url}/dashboard/account")
            page.get_by_role("button", name="Unlink").click()
            page.get_by_text("link who you are there first").wait_for()
            assert page.get_by_text(provider.issuer).count() == 0

        await look(rig, use)
