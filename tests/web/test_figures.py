"""Every figure and each of its twins: the ledger's own sums, to each tenant its own rows, drawn in a browser."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser

from pertoken.tables import usage_rows
from pertoken.units import METRICS
from pertoken.web.figures import TWINS
from pertoken.web.tokens import Tokens
from tests.web.conftest import DARK_PHONE, LIGHT, Client, serving, watched
from tests.web.test_ingest import WINDOW, event
from tests.web.test_who import bearer


def fill(client: Client, **headers: str) -> None:
    sent = [event("1", 3_000_000), event("2", 1_000_000, tenant="<b>'x")]
    assert client.post("/v1/events", json=sent, headers=headers).status_code == 200
    assert client.post("/v1/close", json=WINDOW, headers=headers).status_code == 200


@pytest.fixture
def filled(client: Client) -> Client:
    fill(client)
    return client


def costs(client: Client, address: str) -> Decimal:
    rows = client.get(address).json()["rows"]
    return sum((Decimal(r["cost_usd"]) for r in rows), Decimal(0))


def test_a_cost_is_the_ledgers_and_is_behind_its_link(filled: Client) -> None:
    # 3 M and 1 M output tokens at 15 USD per M.
    answer = filled.get("/figure/cost_usd.json?by=tenant&pool=api").json()
    assert {r["tenant"]: Decimal(r["cost_usd"]) for r in answer["rows"]} == {"a": 45, "<b>'x": 15}
    assert costs(filled, answer["rows_behind"][0]) == 60
    assert filled.get(answer["url"]).status_code == 200
    rows = list(csv.DictReader(io.StringIO(filled.get("/figure/cost_usd.csv?by=tenant&pool=api").text)))
    assert rows == answer["rows"]


@pytest.mark.parametrize("name", ["cost_usd", *METRICS])
@pytest.mark.parametrize("query", ["", "by=tenant", "by=hour,model&tenant=%3Cb%3E'x&from=2026-11-24T08:00Z"])
def test_the_sql_gives_the_same_rows(filled: Client, name: str, query: str) -> None:
    sql = filled.get(f"/figure/{name}.sql?{query}").text.rstrip(";\n")
    ledger = filled.app.state.service.books.ledger  # type: ignore[attr-defined]
    got = [r[name] for r in ledger._engine.query(sql).to_pylist()]
    want = [r[name] for r in filled.get(f"/figure/{name}.json?{query}").json()["rows"]]
    assert [None if g is None else float(g) for g in got] == [None if w is None else float(w) for w in want]


def test_the_page_shows_six_digits_and_its_twins_all(filled: Client) -> None:
    # A kWh over 23 tokens: 1e6 / 23.
    service = filled.app.state.service  # type: ignore[attr-defined]
    rows = usage_rows(
        np.array(["2026-11-24T07"], "datetime64[h]"), {("output", "output_tokens"): 23, ("output", "energy_kwh"): 1.0},
        book="actual", pool="p", model="m", tenant="t", basis="measured",
    )  # fmt: skip
    service.books.ledger.add_usage(rows)
    address = "/figure/kwh_per_mtok_total"
    (row,) = filled.get(f"{address}.json?tenant=t").json()["rows"]
    assert row["kwh_per_mtok_total"] == pytest.approx(1e6 / 23, rel=1e-12)
    assert str(row["kwh_per_mtok_total"]) in filled.get(f"{address}.csv?tenant=t").text
    assert '<td class="number">43,478.3</td>' in filled.get(f"{address}?tenant=t").text


def test_pools_whose_energy_nobody_measured_are_named(filled: Client) -> None:
    ledger = filled.app.state.service.books.ledger  # type: ignore[attr-defined]
    for pool, kwh in (("p", {("output", "energy_kwh"): 1.0}), ("api", {})):
        rows = usage_rows(
            np.array(["2026-11-24T08"], "datetime64[h]"), {("output", "output_tokens"): 23, **kwh},
            book="actual", pool=pool, model="m", tenant="t", basis="measured",
        )  # fmt: skip
        ledger.add_usage(rows)
    for address in ("/figure/joule_per_token_output", "/by?measure=joule_per_token_output&window=24h", "/"):
        text = filled.get(address).text
        assert "too small: it counts api, where" in text.lower(), address
        link = re.search(r'measured. <a href="([^"]+)">Without it', text)
        assert link
        without = filled.get(html.unescape(link[1])).text
        assert "too small" not in without.lower()
        assert "156,522" in without or "1.565e+05" in without, address  # 3.6e6 / 23 J
    assert "too small" not in filled.get("/figure/joule_per_token_output?by=pool").text.lower()
    assert filled.get("/figure/joule_per_token_output.json").json()["unmeasured_pools"] == ["api"]
    assert filled.get("/figure/joule_per_token_output.json?pool=p").json()["unmeasured_pools"] == []
    assert "too small" not in filled.get("/figure/usd_per_mtok_output").text.lower()


def test_a_long_figure_shows_its_first_rows_and_says_so(filled: Client) -> None:
    service = filled.app.state.service  # type: ignore[attr-defined]
    hours = np.arange("2026-10-01T00", "2026-10-31T00", dtype="datetime64[h]")
    service.books.ledger.add_usage(
        usage_rows(
            hours, {("output", "output_tokens"): 23, ("output", "energy_kwh"): 1.0},
            book="actual", pool="p", model="m", tenant="t", basis="measured",
        )
    )  # fmt: skip
    text = filled.get("/figure/joule_per_token_output?by=hour&tenant=t").text
    assert "The first 500 of 720 rows; .csv has them all" in text
    assert text.count('<td class="hour">') == 500
    assert filled.get("/figure/joule_per_token_output.csv?by=hour&tenant=t").text.count("\n") == 721


def test_hours_are_of_24_and_a_scale_is_written_out(filled: Client) -> None:
    assert "<dd>1,000,000 × Σ (" in filled.get("/figure/usd_per_mtok_output").text
    assert "<dd>1 × Σ (" in filled.get("/figure/utilisation").text
    x = filled.get("/figure/cost_usd.vl.json?by=hour").json()["encoding"]["x"]
    assert x["title"] == "hour (UTC)"
    assert "'%H:%M'" in x["axis"]["labelExpr"]


def test_nothing_to_draw_is_said_in_words(client: Client) -> None:
    page = client.get("/figure/cost_usd?by=tenant").text
    assert "the ledger has nothing of that" in page
    assert 'class="figure"' not in page


def test_what_has_no_name_is_said_and_what_has_no_figure_is_not_drawn(filled: Client) -> None:
    assert "no model" in filled.get("/figure/cost_usd?by=model").text
    drawn = filled.get("/figure/cost_usd.vl.json?by=model").json()["data"]["values"]
    assert "no model" in {row["model"] for row in drawn}
    page = filled.get("/figure/usd_per_mtok_output?by=hour&by=model").text
    assert "no model" in page
    spec = filled.get("/figure/usd_per_mtok_output.vl.json?by=hour&by=model").json()
    assert spec["data"]["values"]
    assert "no model" not in {row["model"] for row in spec["data"]["values"]}


def test_names_are_escaped_and_the_policy_is_strict(filled: Client) -> None:
    page = filled.get("/figure/usd_per_mtok_output?by=tenant")
    assert "<b>" not in page.text
    assert "&lt;b&gt;" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_what_cannot_be_shown_is_refused(filled: Client) -> None:
    for address, status in {
        "/figure/nothing": 404,
        "/figure/cost_usd.exe": 404,
        "/figure/cost_usd?by=hour,pool,model": 400,
        "/figure/cost_usd?by=rate": 400,
        "/figure/cost_usd?from=yesterday": 422,
        "/static/figures.py": 404,
    }.items():
        assert filled.get(address).status_code == status, address


def test_a_script_is_kept_by_the_browser(client: Client) -> None:
    answer = client.get("/static/vega.js")
    assert answer.headers["cache-control"] == "public, max-age=86400"
    again = client.get("/static/vega.js", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/v1/cost").headers["cache-control"] == "no-store"


@pytest.mark.parametrize("twin", ["", *TWINS])
@pytest.mark.parametrize("name", ["cost_usd", "usd_per_mtok_output"])
def test_a_tenants_token_sees_its_own_rows_alone(
    client_of: Callable[..., Client], tmp_path: Path, name: str, twin: str
) -> None:
    client = client_of(require_tokens=True)
    tokens = Tokens(tmp_path / "data")
    boss = bearer(tokens.add("boss", ("admin",)))
    mine = bearer(tokens.add("shop", ("read",), tenant="a"))
    writes = bearer(tokens.add("w", ("write",)))
    fill(client, **boss)
    address = f"/figure/{name}{twin}"
    assert client.get(address).status_code == 401
    assert client.get(address, headers=writes).status_code == 403
    plain = client.get(address, params={"by": "tenant"}, headers=mine)
    asked = client.get(address, params={"by": "tenant", "tenant": "<b>'x"}, headers=mine)
    assert plain.status_code == asked.status_code == 200
    assert plain.content == asked.content
    for other in (b"<b>", b"&lt;b", b"%3Cb"):
        assert other not in plain.content


@pytest.mark.parametrize("looks", [LIGHT, DARK_PHONE], ids=["light", "dark phone"])
def test_a_browser_draws_it_and_drills_down_to_the_same_sum(
    filled: Client, browser: Browser, looks: dict[str, Any]
) -> None:
    with serving(filled) as served, watched(browser, served, **looks) as page:
        page.goto(f"{served}/figure/cost_usd?by=tenant&by=pool&pool=api")
        page.wait_for_selector(".figure svg path", state="attached")
        row = page.locator("tbody tr", has_text="api").first
        value = row.locator(".number").inner_text()
        row.get_by_role("link").click()
        page.wait_for_url("**/figure/cost_usd?*tenant=*")
        assert page.locator("tbody .number").all_inner_texts() == [value]
        page.wait_for_selector(".figure svg path", state="attached")
