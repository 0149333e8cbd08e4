"""The page in a real browser: it draws, asks nobody for anything, and reads in the dark and on a phone."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from pertoken.report.compare import compare

SHOP = Path(__file__).parents[2] / "examples" / "shop.yaml"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "shop.html"
    compare(SHOP, sensitivity=True).to_html(path)
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_are_drawn_without_a_request_or_an_error(
    browser: Browser, page_file: Path, scheme: str
) -> None:
    context = browser.new_context(color_scheme="dark" if scheme == "dark" else "light")
    page = context.new_page()
    problems: list[str] = []
    requests: list[str] = []
    page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("request", lambda r: requests.append(r.url))
    page.goto(page_file.as_uri())
    figures = page.locator("figure .figure")
    page.wait_for_function(
        "document.querySelectorAll('figure svg').length === document.querySelectorAll('figure').length"
    )
    assert figures.count() >= 6
    assert all(figures.nth(i).get_attribute("aria-label") for i in range(figures.count()))
    assert problems == []
    assert [u for u in requests if not u.startswith(("file:", "data:", "blob:"))] == []
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert contrast(ink, paper) >= 7
    context.close()


def test_a_phone_scrolls_down_and_not_sideways(browser: Browser, page_file: Path) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.goto(page_file.as_uri())
    page.wait_for_function("document.querySelectorAll('figure svg').length > 0")
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0
    context.close()


def contrast(one: str, other: str) -> float:
    """WCAG contrast ratio of two `rgb(r, g, b)` colours."""

    def luminance(colour: str) -> float:
        channels = [int(c) / 255 for c in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
