"""What is long stays within its place, at a desk and on a phone, in a real Chromium."""

from pathlib import Path
from typing import Any

import pytest
from browser_rig import NEEDED, PHONE, Browser, dashboard, look, people
from fake_swarm import FakeSwarm

pytestmark = NEEDED


@pytest.mark.parametrize("size", [None, PHONE])
@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct-of-somebody", "x" * 200])
async def test_a_long_name_stays_within_its_card(tmp_path: Path, size: Any, name: str) -> None:
    async with dashboard(tmp_path, swarm=FakeSwarm(name=name)) as rig:
        await people(rig, ("view", "viewer"))

        def use(seen: Browser) -> dict[str, float]:
            page = seen.page
            if size:
                page.set_viewport_size(size)
            seen.sign_in("view")
            page.locator("[aria-labelledby=t-dep] td.least").wait_for()
            found: dict[str, float] = page.evaluate(
                """() => {
                  const table = document.querySelector('[aria-labelledby=t-dep] table');
                  const card = table.closest('.card').getBoundingClientRect();
                  const last = document.querySelector('[aria-labelledby=t-dep] td.least');
                  const range = document.createRange();
                  range.selectNodeContents(last);
                  return { wide: table.scrollWidth - table.parentElement.clientWidth,
                           gap: card.right - range.getBoundingClientRect().right };
                }"""
            )
            return found

        found = await look(rig, use)
        assert found["wide"] <= 0
        assert found["gap"] >= 16
