"""axe-core finds nothing on any page, by day, by night and on a phone."""

from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from pertoken.web._frame import NAVIGATION
from tests.web.conftest import DARK_PHONE, LIGHT, Client, serving, watched
from tests.web.test_figures import fill

PAGES = [path for path, _, _ in NAVIGATION]


@pytest.mark.parametrize("looks", [LIGHT, DARK_PHONE], ids=["light", "dark phone"])
@pytest.mark.parametrize(
    "path",
    [
        *PAGES,
        "/login",
        "/figure/cost_usd?by=tenant&by=pool",
        "/figure/usd_per_mtok_output_with_idle?by=tenant&by=pool",
    ],
)
def test_axe_finds_nothing(client: Client, browser: Browser, path: str, looks: dict[str, Any]) -> None:
    fill(client)
    with serving(client) as served, watched(browser, served, **looks) as page:
        answer = page.goto(f"{served}{path}")
        assert answer is not None
        page.wait_for_function("document.querySelectorAll('.figure:not(:has(svg))').length === 0")
        found = Axe().run(page).response
        told = [(v["id"], [n["html"] for n in v["nodes"]]) for v in found["violations"]]
        assert told == []
        assert found["passes"]
