"""The page Energy and its twins: the same sums, a site's facts to who may see all, to a tenant its own alone."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from playwright.sync_api import Browser

from pertoken import meter
from pertoken.fleet import RunningFleet, load_fleet
from pertoken.report.energy import BOUNDARIES
from pertoken.tables import usage_rows
from pertoken.web.pages.energy import TWINS
from pertoken.web.tokens import Tokens
from tests.web.conftest import DARK_PHONE, LIGHT, NOW_S, Client, Clock, serving, watched
from tests.web.test_who import bearer

WINDOW = {"from": "2026-11-24T05:00Z", "to": "2026-11-24T09:00Z"}


@pytest.fixture
def fleet(tmp_path: Path) -> RunningFleet:
    path = tmp_path / "fleet.yaml"
    path.write_text(
        """
sites:
  dc: {timezone: Europe/Berlin, pue: 1.2, carbon_g_per_kwh: 400, tariff: {usd_per_kwh: 0.1, demand_usd_per_kw: 10}}
pools:
  h100:
    gpu: H100-SXM
    site: dc
    count: 8
    price: {term: owned, usd_per_gpu: 35040, life_years: 4, wacc_fraction: 0, residual_fraction: 0,
            method: straight-line}
"""
    )
    return load_fleet(path)


def fill(client: Client, clock: Clock) -> None:
    """Three hours of an engine that two tenants share, and of its boards."""
    service = client.app.state.service  # type: ignore[attr-defined]
    for back in (1, 2, 3):
        at = NOW_S - 3600 * back + 1800
        rows = [
            ("engine/e", "", "prompt_tokens", 9e6), ("engine/e", "", "output_tokens", 3e6),
            ("engine/e", "", "seen_seconds", 3600), ("engine/e", "", "running_seconds", 1800),
            ("engine/e", "", "prefill_seconds", 400), ("engine/e", "", "decode_seconds", 1400),
            ("device/d", "", "gpu_energy_kwh", 1.0 * back),
            ("usage/g", "a", "output_tokens", 2e6), ("usage/g", "<b>'x", "output_tokens", 1e6),
            ("usage/g", "a", "input_tokens", 6e6), ("usage/g", "<b>'x", "input_tokens", 3e6),
        ]  # fmt: skip
        sources, tenants, meters, quantities = (list(column) for column in zip(*rows, strict=True))
        columns = {
            "ts": [at] * len(rows), "source": sources, "key": [f"{back} {n}" for n in range(len(rows))], "pool": "h100",
            "model": "m", "tenant": tenants, "meter": meters, "quantity": quantities,
        }  # fmt: skip
        service.books.take(meter.records(columns, len(rows)))
    service.books.close_due(service.now())


@pytest.fixture
def filled(client: Client, clock: Clock) -> Client:
    fill(client, clock)
    return client


def test_the_page_and_its_twins_are_the_ledgers(filled: Client) -> None:
    found = filled.get("/energy.json", params=WINDOW).json()
    ledger = filled.app.state.service.books.ledger  # type: ignore[attr-defined]
    [whole] = ledger.usage(where={"meter": "energy_kwh", "book": "actual"})["quantity"].to_pylist()
    assert sum(row["energy_kwh"] for row in found["rows"]) == pytest.approx(float(whole))
    [metric] = ledger.metric("joule_per_token_output", where={"book": "actual"}).to_pylist()
    assert found["joule_per_token"]["output"]["utility meter"] == pytest.approx(
        metric["joule_per_token_output"]
    )
    assert found["pue"] == pytest.approx(1.2, rel=1e-5)
    assert found["co2e_kg"] == pytest.approx(0.4 * float(whole), rel=1e-5)
    rows = list(csv.DictReader(io.StringIO(filled.get("/energy.csv", params=WINDOW).text)))
    assert [float(r["energy_kwh"]) for r in rows] == [r["energy_kwh"] for r in found["rows"]]
    [site] = found["sites"]
    [peak] = site["peaks"]
    # The newest hour's boards drew 1 kWh, the oldest's 3: that is the peak.
    assert peak["at"] == "2026-11-24T06:00:00Z"
    assert peak["cost_usd"] == pytest.approx(10 * peak["billed_kw"])
    behind = filled.get(found["rows_behind"]).json()["rows"]
    assert sum(float(r["quantity"]) for r in behind if r["meter"] == "energy_kwh") == pytest.approx(
        float(whole)
    )
    assert filled.get("/energy.png", params=WINDOW).content.startswith(b"\x89PNG")
    spec = filled.get("/energy.vl.json", params=WINDOW).json()
    assert [v["kwh"] for v in spec["data"]["values"]] == [r["energy_kwh"] for r in found["rows"]]
    text = filled.get("/energy", params=WINDOW).text
    assert "Site dc" in text
    assert "without them" not in text
    assert found["tokens_without_energy"] == {where: [] for where in BOUNDARIES.values()}
    assert f"{peak['cost_usd']:,.2f}" in text
    assert filled.get("/energy.exe").status_code == 404


def test_no_energy_is_said(filled: Client) -> None:
    text = filled.get("/energy", params={"from": "2025-01-01T00:00Z", "to": "2025-01-02T00:00Z"}).text
    assert "No energy was metered in these hours" in text
    assert "Price of energy" in text


@pytest.mark.parametrize("twin", ["", *(f".{twin}" for twin in TWINS)])
def test_a_tenants_token_sees_its_own_alone(
    client_of: Callable[..., Client], tmp_path: Path, clock: Clock, twin: str
) -> None:
    client = client_of(require_tokens=True)
    tokens = Tokens(tmp_path / "data")
    boss = bearer(tokens.add("boss", ("admin",)))
    mine = bearer(tokens.add("shop", ("read",), tenant="a"))
    writes = bearer(tokens.add("w", ("write",)))
    fill(client, clock)
    address = f"/energy{twin}"
    assert client.get(address).status_code == 401
    assert client.get(address, headers=writes).status_code == 403
    plain = client.get(address, headers=mine, params=WINDOW)
    asked = client.get(address, headers=mine, params={**WINDOW, "tenant": "<b>'x"})
    assert plain.status_code == asked.status_code == 200
    assert plain.content == asked.content
    whole = client.get(address, headers=boss, params=WINDOW)
    assert plain.content != whole.content
    # Nothing of the site or of others: no peak, no price, no PUE, no idle.
    for other in (
        b"<b>",
        b"&lt;b",
        b"%3Cb",
        b"PUE as booked",
        b"Site dc",
        b'"sites"',
        b'"pue"',
        b"Demand of",
        b'idle"',
    ):
        assert other not in plain.content
    if twin == ".json":
        own = client.get("/energy.json", headers=boss, params={**WINDOW, "tenant": "a"}).json()
        assert plain.json()["rows"] == own["rows"] != whole.json()["rows"]


@pytest.mark.parametrize("looks", [LIGHT, DARK_PHONE], ids=["light", "dark phone"])
def test_a_browser_draws_it(filled: Client, browser: Browser, looks: dict[str, Any]) -> None:
    with serving(filled) as served, watched(browser, served, **looks) as page:
        page.goto(f"{served}/energy?window=24h")
        page.locator(".figure svg").nth(1).wait_for(state="attached")
        assert page.locator(".figure").count() == page.locator(".figure svg").count() == 2
        if looks == LIGHT:  # on a screen nothing needs to be scrolled to
            assert page.locator(".wide").evaluate_all("all => all.every(e => e.scrollWidth <= e.clientWidth)")
        page.get_by_role("link", name="Of an output token").click()
        page.wait_for_url("**/figure/joule_per_token_output?*")
        page.wait_for_selector(".figure svg path", state="attached")
        page.go_back()
        page.locator(".figure svg").nth(1).wait_for(state="attached")


def test_tokens_without_energy_are_said(filled: Client) -> None:
    service = filled.app.state.service  # type: ignore[attr-defined]
    hours = np.array(["2026-11-24T07"], "datetime64[h]")
    amounts = {("output", "output_tokens"): 5e6}
    service.books.ledger.add_usage(
        usage_rows(hours, amounts, book="actual", pool="a,p<i", model="m", tenant="a", basis="measured")
    )
    text = filled.get("/energy", params=WINDOW).text
    assert text.count("counts tokens of a,p&lt;i, whose energy nobody measured there") == len(BOUNDARIES)
    link = html.unescape(re.findall(r'href="(/energy[^"]+)">without them', text)[0])
    assert "whose energy nobody" not in filled.get(link).text
    all_of_it, measured = (
        filled.get(url).json()["joule_per_token"]["output"]["utility meter"]
        for url in (f"/energy.json?{urlencode(WINDOW)}", link.replace("/energy?", "/energy.json?"))
    )
    assert all_of_it < measured
