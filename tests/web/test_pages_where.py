"""Where it goes, By, and Plan against actual: the ledger's sums on every page and twin, the way in and the way back."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from axe_playwright_python.sync_playwright import Axe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser, Locator, Page

from pertoken.ledger import Ledger
from pertoken.tables import RATES, USAGE, rate_rows
from pertoken.web._drill import hours_of
from pertoken.web.pages import variance, where
from pertoken.web.tokens import Tokens
from tests.report.test_spend import TENANTS, fill, whole
from tests.web.conftest import DARK_PHONE, LIGHT, Client, serving, watched
from tests.web.test_who import bearer

HOURS = np.arange("2026-11-23T18", "2026-11-24T09", dtype="datetime64[h]")
PAGES = (
    "/where",
    "/where/rows",
    "/by",
    "/by?measure=utilisation&by=hour&by=pool",
    "/by?measure=usd_per_mtok_output",
)
DATA = (*(f"/where.{twin}" for twin in where.TWINS),)
ROW = "hour=2026-11-24T05:00Z&pool=h100&model=llama&tenant={tenant}&phase=output&category=compute&component=rent"


def ledger_of(client: Client) -> Ledger:
    found: Ledger = client.app.state.service.books.ledger  # type: ignore[attr-defined]
    return found


def put_plan(ledger: Ledger, name: str = "plan:shop") -> None:
    """The actual book over again, as a plan."""
    usage = ledger.usage_rows({"book": "actual"})
    usage = usage.set_column(0, "book", pa.array([name] * len(usage))).cast(USAGE)
    ledger.put_book(name, usage, ledger.rates().cast(RATES))


@pytest.fixture
def filled(client: Client) -> Client:
    fill(ledger_of(client), HOURS)
    return client


def text_of(answer: Any) -> str:
    assert answer.status_code == 200, answer.text[:500]
    return html.unescape(answer.text)


def money(page: str) -> list[Decimal]:
    """USD to the last digit, as they stand on a page."""
    found = re.findall(r'>([-+]?[\d,]+\.\d\d)<span class="digits">(\d{7})</span>', page)
    return [Decimal((head + tail).replace(",", "")) for head, tail in found]


def test_the_tables_total_is_the_ledgers_to_the_last_digit(filled: Client) -> None:
    page = text_of(filled.get("/where"))
    table = page[page.index('<table id="breakdown"') :]
    *_, total = money(table)
    assert total == whole(ledger_of(filled))
    rows = list(csv.DictReader(io.StringIO(filled.get("/where.csv").text)))
    assert sum(Decimal(r["cost_usd"]) for r in rows) == total
    answer = filled.get("/where.json").json()
    assert Decimal(answer["total_usd"]) == total
    assert sum(Decimal(r["cost_usd"]) for r in answer["rows"]) == total
    assert sum(Decimal(r["cost_usd"]) for r in answer["over_time"]) == total
    assert filled.get(answer["url"]).status_code == 200
    assert filled.get("/where.png").content[:4] == b"\x89PNG"
    assert filled.get("/where.vl.json").json()["mark"]["type"] == "bar"
    assert filled.get("/where.exe").status_code == 404


def ran(client: Client, address: str) -> list[list[dict[str, Any]]]:
    """The rows of each statement of a page's .sql twin."""
    answer = client.get(address)
    assert answer.status_code == 200, answer.text
    engine = ledger_of(client)._engine
    return [engine.query(sql).to_pylist() for sql in answer.text.split(";\n") if sql.strip()]


def test_the_sql_of_a_page_gives_its_sums(filled: Client) -> None:
    ledger = ledger_of(filled)
    put_plan(ledger)
    for rows in ran(filled, "/where.sql?window=all"):
        assert sum(row["cost_usd"] for row in rows) == whole(ledger)
    forecast, planned, actual, used = ran(filled, "/variance.sql?window=all")
    assert sum(row["cost_usd"] for row in forecast) == sum(row["cost_usd"] for row in actual) == whole(ledger)
    assert planned == used != []
    shown = filled.get("/energy.json?window=all").json()["rows"]
    kwh, _ = ran(filled, "/energy.sql?window=all")
    assert sum(float(row["quantity"]) for row in kwh) == pytest.approx(sum(r["energy_kwh"] for r in shown))
    assert kwh


def test_a_row_shows_what_it_is_the_product_of(filled: Client) -> None:
    for tenant in TENANTS:
        quoted = '"' + tenant + '"' if tenant in ("", "a,b") else tenant
        address = "/where/row.json?" + ROW.format(tenant=quoted)
        answer = filled.get(address).json()
        assert answer["tenant"] == tenant
        (line,) = answer["lines"]
        product = Decimal(line["quantity"]) * Decimal(line["usd_per_unit"])
        assert product == Decimal(line["cost_usd"]) == Decimal(answer["exact_usd"])
        assert round(product, 9) == Decimal(answer["cost_usd"])
        assert (line["source"], line["rate_basis"], line["quantity_basis"], line["unit"]) == (
            "test", "quoted", "measured", "GPU·h",
        )  # fmt: skip
        page = text_of(filled.get(address.replace(".json", "")))
        assert "no longer the row" not in page
        lines = list(csv.DictReader(io.StringIO(filled.get(address.replace(".json", ".csv")).text)))
        assert [row["cost_usd"] for row in lines] == [line["cost_usd"]]


def test_a_row_priced_anew_and_not_closed_again_is_told(filled: Client) -> None:
    ledger_of(filled).add_rates(
        rate_rows(HOURS, 5.0, pool="h100", meter="gpu_hours", component="rent", basis="quoted", source="new")
    )
    assert "no longer the row" in text_of(filled.get("/where/row?" + ROW.format(tenant="shop")))


def test_what_cannot_be_shown_is_refused(filled: Client) -> None:
    for address, status in {
        "/where?book=actual,plan:x": 400,
        "/where?book=": 400,
        "/where?window=yesterday": 400,
        "/where?from=0001-01-01T00:00%2B14:00": 400,
        "/where?hour=9999-12-31T23:00Z": 400,
        "/where/rows?by=rate": 400,
        "/where/rows?cursor=x": 400,
        "/where/row?pool=h100": 400,
        "/where/row?" + ROW.format(tenant="nobody"): 404,
        "/where/row.png?" + ROW.format(tenant="shop"): 404,
        "/by?measure=cost_per_token": 400,
        "/by?measure=utilisation&phase=idle": 400,
        "/by?by=model&by=pool&by=tenant": 400,
        "/by?draw=pie": 400,
        "/by?row=-1": 422,
        "/variance?book=actual&book=plan:none": 400,
        "/variance.exe": 404,
        "/variance.json": 400,
    }.items():
        assert filled.get(address).status_code == status, address


def test_no_rows_are_told_and_not_drawn(client: Client) -> None:
    for address in ("/where", "/where/rows", "/by", "/by?measure=utilisation", "/where?window=all"):
        page = text_of(client.get(address))
        assert "Nothing was booked in these hours" in page
        assert 'class="figure"' not in page
    page = text_of(client.get("/variance"))
    assert "There is no plan to compare" in page
    assert "pertoken plan scenario.yaml --data" in page


def test_an_hour_is_a_whole_one(filled: Client) -> None:
    address = "/where/row.json?" + ROW.format(tenant="shop")
    assert filled.get(address.replace("05:00Z", "05:40Z")).json() == filled.get(address).json()
    assert filled.get(address.replace("05:00Z", "06:40%2B01:00")).json() == filled.get(address).json()


def test_windows_are_what_their_names_say(filled: Client) -> None:
    ledger = ledger_of(filled)
    fill(ledger, np.arange("2026-09-01T00", "2026-09-01T03", dtype="datetime64[h]"))
    totals = {
        w: Decimal(filled.get(f"/where.json?window={w}").json()["total_usd"])
        for w in ("24h", "7d", "30d", "month", "all")
    }
    assert totals["24h"] == totals["7d"] == totals["30d"] == totals["month"] < totals["all"]
    assert totals["all"] == whole(ledger)
    assert "2026-11-23 09:00 to 2026-11-24 09:00 UTC" in text_of(filled.get("/where?window=24h"))
    assert "2026-11-01 00:00 to 2026-11-24 09:00 UTC" in text_of(filled.get("/where?window=month"))
    half_past = datetime(2026, 12, 1, 0, 30, tzinfo=UTC)
    assert hours_of("month", half_past) == (
        datetime(2026, 11, 1, tzinfo=UTC),
        datetime(2026, 12, 1, tzinfo=UTC),
    )


def test_rows_come_in_pages_that_add_up(filled: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, "_PAGE_ROWS", 7)
    address = "/where/rows?by=pool&by=tenant&by=component"
    seen: list[str] = []
    total = Decimal(0)
    while address:
        page = text_of(filled.get(address))
        body = page[page.index('<table id="rows"') :]
        rows = re.findall(r"<tr><th scope=\"row\"><a.*?</tr>", body, re.DOTALL)
        assert len(rows) <= 7
        seen += [re.sub(r"<[^>]+>", "|", row) for row in rows]
        total += sum(money("".join(rows)), Decimal(0))
        *_, told = money(body)
        assert told == whole(ledger_of(filled))
        following = re.search(r'<a href="([^"]+)">Next rows', page)
        address = following[1] if following else ""
    assert len(set(seen)) == len(seen) > 14
    assert total == whole(ledger_of(filled))


def test_totals_of_by_are_those_of_the_figure(filled: Client) -> None:
    for query in ("by=model&by=tenant", "by=component&by=phase", "by=hour&by=pool", "by=tenant"):
        page = text_of(filled.get(f"/by?{query}"))
        *_, total = money(page)
        assert total == whole(ledger_of(filled)), query
    page = text_of(filled.get("/by?measure=usd_per_mtok_total&by=tenant&by=pool"))
    value = filled.get("/figure/usd_per_mtok_total.json").json()["rows"][0]["usd_per_mtok_total"]
    assert f'id="total">{value:,.4f}<' in page
    assert "Totals are the ratio of the sums over all" in page


ANYTHING = st.text(max_size=20) | st.sampled_from(
    [
        "",
        '"',
        '""',
        "a,b",
        "all",
        "7d",
        "hour",
        "pool",
        "9999-12-31T23:59Z",
        "0001-01-01T00:00+14:00",
        "2026-11-24T08:30Z",
    ]
)


@given(
    st.sampled_from(
        ["/where", "/where.json", "/where/rows", "/where/row", "/by", "/variance", "/variance.csv"]
    ),
    st.dictionaries(
        st.sampled_from(
            [
                "book",
                "pool",
                "tenant",
                "phase",
                "by",
                "from",
                "to",
                "hour",
                "window",
                "measure",
                "draw",
                "row",
                "cursor",
            ]
        ),
        ANYTHING,
        max_size=4,
    ),
)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_question_is_answered(client: Client, path: str, query: dict[str, str]) -> None:
    ledger = ledger_of(client)
    if not ledger.books():
        fill(ledger, HOURS[-2:])
        put_plan(ledger)
    answer = client.get(path, params={k: v.encode(errors="replace").decode() for k, v in query.items()})
    assert answer.status_code in (200, 400, 404, 422), answer.text


def test_hostile_names_stay_text(client: Client) -> None:
    ledger = ledger_of(client)
    fill(ledger, HOURS[-2:])
    nasty = "<script>alert(1)</script>\"'&=,"
    usage = ledger.usage_rows({"tenant": "shop"})
    ledger.add_usage(usage.set_column(4, "tenant", pa.array([nasty] * len(usage))).cast(USAGE))
    ledger.close()
    put_plan(ledger)
    for address in ("/where", "/where/rows", "/by", "/by?measure=utilisation", "/variance?by=tenant"):
        page = client.get(address)
        assert page.status_code == 200
        assert "<script>alert" not in page.text
        assert "unsafe" not in page.headers["content-security-policy"]
    listed = text_of(client.get("/where/rows?by=tenant"))
    link = next(a for a in re.findall(r'href="(/where/rows\?[^"]+)"', listed) if "script" in a)
    inside = money(text_of(client.get(link)))[0]
    assert inside == ledger.cost(where={"book": "actual", "tenant": [nasty]})["cost_usd"][0].as_py()


def test_a_tenants_token_sees_its_own_rows_alone(client_of: Callable[..., Client], tmp_path: Path) -> None:
    client = client_of(require_tokens=True)
    fill(ledger_of(client), HOURS)
    put_plan(ledger_of(client))
    tokens = Tokens(tmp_path / "data")
    boss = bearer(tokens.add("boss", ("read",)))
    mine = bearer(tokens.add("mine", ("read",), tenant="lab"))
    writes = bearer(tokens.add("w", ("write",)))
    others = ("shop", "all others", "a,b", "a%2Cb", "(idle)")
    for address in (
        *PAGES,
        *DATA,
        "/where/row?" + ROW.format(tenant="lab"),
        "/where/row.json?" + ROW.format(tenant="lab"),
    ):
        assert client.get(address).status_code == 401, address
        assert client.get(address, headers=writes).status_code == 403, address
        plain = client.get(address, headers=mine)
        assert plain.status_code == 200, address
        more = "&" if "?" in address else "?"
        for asked in ("shop", '"a,b"', '""'):
            answer = client.get(f"{address.replace('tenant=lab', '')}{more}tenant={asked}", headers=mine)
            assert answer.content == plain.content, address
        for other in others:
            assert other.encode() not in plain.content, (address, other)
        if address in PAGES[:3]:
            *_, total = money(plain.text)
            assert total == whole(ledger_of(client), tenant="lab")
    for twin in ("", *(f".{twin}" for twin in variance.TWINS)):
        assert client.get(f"/variance{twin}", headers=mine).status_code == 403
        assert client.get(f"/variance{twin}", headers=boss).status_code == 200
        assert client.get(f"/variance{twin}").status_code == 401


def test_a_variance_adds_up_on_the_page_and_in_its_twins(filled: Client) -> None:
    ledger = ledger_of(filled)
    put_plan(ledger)
    ledger.add_rates(
        rate_rows(
            HOURS, 0.5, pool="h100", meter="gpu_hours", component="rent", basis="quoted", source="dearer"
        )
    )
    ledger.close("actual")
    for query in (
        "",
        "?by=pool&by=model",
        "?by=tenant,pool,model&window=all",
        "?book=plan:shop&book=actual&window=24h",
    ):
        told = filled.get(f"/variance.json{query}").json()
        for line in (*told["lines"], told["total"]):
            drivers = sum(Decimal(line[f"{d}_usd"]) for d in ("price", "volume", "efficiency", "mix"))
            assert drivers == Decimal(line["variance_usd"])
            assert Decimal(line["forecast_usd"]) + drivers == Decimal(line["actual_usd"])
        page = text_of(filled.get(f"/variance{query}"))
        body = page[page.index('<table id="variance"') :]
        forecast, actual, difference, *drivers_shown = money(body)[-7:]
        assert (forecast, actual) == tuple(Decimal(told["total"][f"{k}_usd"]) for k in ("forecast", "actual"))
        assert forecast + difference == forecast + sum(drivers_shown) == actual
        assert actual == whole(ledger)
        rows = list(csv.DictReader(io.StringIO(filled.get(f"/variance.csv{query}").text)))
        assert rows[-1]["actual_usd"] == told["total"]["actual_usd"]
        assert sum(Decimal(r["price_usd"]) for r in rows[:-1]) == Decimal(rows[-1]["price_usd"]) > 0
    steps = filled.get("/variance.vl.json").json()["data"]["values"]
    assert [s["step"] for s in steps] == ["forecast", "price", "volume", "efficiency", "mix", "actual"]
    assert filled.get("/variance.png").content[:4] == b"\x89PNG"
    # From a line to where its money goes, in either book: the same sums.
    page = text_of(filled.get("/variance"))
    (line, *_) = filled.get("/variance.json").json()["lines"]
    links = re.findall(r'href="(/where\?book=[^"]+)"', page)[:2]
    for link, key in zip(links, ("forecast_usd", "actual_usd"), strict=True):
        *_, total = money(text_of(filled.get(link)))
        assert total == Decimal(line[key])


def test_two_plans_stand_side_by_side_and_no_shared_hours_are_told(client: Client) -> None:
    ledger = ledger_of(client)
    fill(ledger, HOURS)
    put_plan(ledger, "plan:a")
    put_plan(ledger, "plan:b")
    told = client.get("/variance.json?book=plan:a&book=plan:b").json()
    assert {told["forecast"], told["actual"]} == {"plan:a", "plan:b"}
    assert Decimal(told["total"]["variance_usd"]) == 0
    refused = client.get("/variance?book=plan:a&book=plan:b&from=2027-01-01T00:00Z")
    assert (refused.status_code, "no hours in common" in refused.text) == (400, True)


def number(cell: Locator) -> Decimal:
    return Decimal(cell.inner_text().replace(",", "").strip())


def go(page: Page, link: Locator) -> None:
    with page.expect_navigation():
        link.click()


def drill(page: Page, served: str) -> None:
    """From the total to a row of the ledger and back: each page's total is the sum that was followed to it."""
    page.goto(f"{served}/where")
    page.wait_for_selector(".figure svg path", state="attached")
    cells = page.locator("#breakdown tbody tr:not(.subtotal) td.number:not(:last-child) a")
    total = number(page.locator("#breakdown .total td.number").last)
    assert sum((number(c) for c in cells.all()), Decimal(0)) == total
    followed = number(cells.nth(2))
    go(page, cells.nth(2))
    while True:
        if page.locator("#lines").count():
            break
        assert number(page.locator("#whole")) == followed
        rows = page.locator("#rows tbody td.number a")
        assert sum((number(r) for r in rows.all()), Decimal(0)) == followed
        followed = number(rows.last)
        go(page, rows.last)
    assert number(page.locator("#cost")) == followed
    products = page.locator("#lines tbody td.number:last-child").all_inner_texts()
    exact = sum((Decimal(p.replace("= ", "").replace(",", "")) for p in products), Decimal(0))
    assert round(exact, 9) == followed
    for _ in range(2):
        page.go_back()
        page.wait_for_selector("#rows")
    go(page, page.get_by_role("link", name="all of it"))
    assert number(page.locator("#breakdown .total td.number").last) == total


def follow(page: Page, served: str) -> None:
    """By two dimensions, into a cell and out again: the same sums."""
    page.goto(f"{served}/by?by=model&by=tenant")
    page.wait_for_selector(".figure svg path", state="attached")
    total = number(page.locator("#total"))
    cells = page.locator("#crossed tbody td.number:not(:last-child) a")
    assert sum((number(c) for c in cells.all()), Decimal(0)) == total
    rows = page.locator("#crossed tbody td.number:last-child")
    assert sum((number(r) for r in rows.all()), Decimal(0)) == total
    followed = number(cells.last)
    go(page, cells.last)
    assert number(page.locator("#total")) == followed
    assert sum((number(c) for c in cells.all()), Decimal(0)) == followed
    followed = number(cells.last)
    go(page, cells.last)  # of one model, tenant, pool and hour: what is left are rows of the ledger
    assert number(page.locator("#whole")) == followed
    found = page.locator("#rows tbody td.number").all()
    assert sum((number(row) for row in found), Decimal(0)) == followed
    page.go_back()
    go(page, page.locator("#up"))
    assert number(page.locator("#total")) == total
    page.get_by_label("measure").select_option("usd_per_mtok_total")
    go(page, page.get_by_role("button", name="Show"))
    assert "measure=usd_per_mtok_total" in page.url
    page.wait_for_selector(".figure svg path", state="attached")


def compare(page: Page, served: str) -> None:
    """Plan against actual: the form changes what it is by."""
    page.goto(f"{served}/variance")
    page.wait_for_selector(".figure svg path", state="attached")
    page.get_by_label("by").first.select_option("tenant")
    go(page, page.get_by_role("button", name="Show"))
    assert "by=tenant" in page.url
    values = [number(c) for c in page.locator("#variance tfoot td.number").all()]
    assert values[0] + sum(values[3:], Decimal(0)) == values[1]
    assert values[1] - values[0] == values[2]


@pytest.mark.parametrize("looks", [LIGHT, DARK_PHONE], ids=["light", "dark phone"])
@pytest.mark.parametrize("walk", [drill, follow, compare])
def test_in_a_browser(
    filled: Client, browser: Browser, walk: Callable[[Page, str], None], looks: dict[str, Any]
) -> None:
    put_plan(ledger_of(filled))
    with serving(filled) as served, watched(browser, served, **looks) as page:
        walk(page, served)


@pytest.mark.parametrize("looks", [LIGHT, DARK_PHONE], ids=["light", "dark phone"])
def test_axe_finds_nothing_further_in(filled: Client, browser: Browser, looks: dict[str, Any]) -> None:
    put_plan(ledger_of(filled))
    row = "/where/row?" + ROW.format(tenant="shop")
    heat = "/by?measure=utilisation&by=hour&by=pool&tenant=shop"
    with serving(filled) as served, watched(browser, served, **looks) as page:
        for address in (
            "/where",
            "/where/rows",
            "/where/rows?pool=h100&by=hour",
            row,
            "/by",
            heat,
            "/variance",
        ):
            page.goto(f"{served}{address}")
            page.wait_for_function("document.querySelectorAll('.figure:not(:has(svg))').length === 0")
            told = [
                (v["id"], [n["html"] for n in v["nodes"]]) for v in Axe().run(page).response["violations"]
            ]
            assert told == [], address
