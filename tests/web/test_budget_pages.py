"""The pages of budgets and statements: figures with their twins, to each tenant its own, in a browser and on paper."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from pertoken.fleet import RunningFleet, load_fleet
from pertoken.report._terms import hours_between, rates_of
from pertoken.tables import usage_rows
from pertoken.web._question import split_names
from pertoken.web.pages.budgets import STATEMENT_TWINS, TWINS
from pertoken.web.service import Service
from pertoken.web.tokens import Tokens
from tests.web.conftest import DARK_PHONE, FLEET, LIGHT, NOW_S, Client, Clock, serving, watched
from tests.web.test_who import bearer

NOW = datetime.fromtimestamp(NOW_S, UTC)
OTHER = "<b>'x"
BUDGETS = """
budgets:
  - {name: everything, usd: 9000}
  - {name: team-blue, tenant: blue, usd: 400, hard: true, idle: true}
  - {name: tokens, tenant: blue, tokens: 60000000, counts: output, period: week}
  - {name: red, tenant: "<b>'x", usd: 3000}
  - {name: next-year, tenant: blue, usd: 5, start: 2027-01-01}
chargeback: {spread_idle: by_gpu_hours}
"""


@pytest.fixture
def fleet(tmp_path: Path) -> RunningFleet:
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET + BUDGETS)
    return load_fleet(path)


def fill(service: Service) -> None:
    """Five weeks of days and nights of two tenants on 8 GPUs and an API."""
    start = NOW - timedelta(weeks=5)
    hours, ledger = hours_between(start, NOW), service.books.ledger
    ledger.add_rates(rates_of(service.fleet, start, NOW))
    t = np.arange(len(hours))
    draw = np.random.default_rng(5)
    busy = (1 + 0.6 * np.sin(2 * np.pi * ((t + start.hour) % 24) / 24)) * draw.lognormal(0, 0.2, len(t))

    def put(pool: str, tenant: str, amounts: dict[tuple[str, str], Any]) -> None:
        model = "" if tenant == "(idle)" else "llama"
        ledger.add_usage(
            usage_rows(hours, amounts, book="actual", pool=pool, model=model, tenant=tenant, basis="measured")
        )

    for tenant, size in (("blue", 0.5), (OTHER, 1.5)):
        held = np.minimum(busy * size, 3)
        put("h100", tenant, {("output", "gpu_hours"): held, ("output", "output_tokens"): held * 5e5,
                             ("output", "energy_kwh"): held})  # fmt: skip
    put("h100", "(idle)", {("idle", "gpu_hours"): 3.0})
    put("api", OTHER, {("output", "output_tokens"): 20_000.0})
    ledger.close()
    service.close_due()
    service.budgets.closed()
    service.budgets.refresh()


@pytest.fixture
def grace_s() -> float:
    return 60.0


@pytest.fixture
def client_of(client_of: Callable[..., Client], clock: Clock) -> Callable[..., Client]:
    """Makes a client of a service with five weeks behind it."""

    def make(**options: Any) -> Client:
        clock.at_s = NOW_S + 120
        client = client_of(**options)
        fill(client.app.state.service)  # type: ignore[attr-defined]
        return client

    return make


@pytest.fixture
def client(client_of: Callable[..., Client]) -> Client:
    return client_of()


@pytest.mark.parametrize("name", ["everything", "team-blue", "tokens", "red"])
def test_a_budgets_statements_give_what_is_spent(client: Client, name: str) -> None:
    ledger = client.app.state.service.books.ledger  # type: ignore[attr-defined]
    own, *idle = client.get(f"/budgets/{name}.sql").text.rstrip(";\n").split(";\n")
    found = client.get(f"/budgets/{name}.json").json()
    spent = sum(
        next(v for k, v in row.items() if k != "hour") for row in ledger._engine.query(own).to_pylist()
    )
    assert len(idle) == (name == "team-blue")
    for statement in idle:  # three in four of the hours held were another's
        spent += sum(row["cost_usd"] for row in ledger._engine.query(statement).to_pylist()) / 4
    assert float(spent) == pytest.approx(float(found["spent_closed"]), rel=0.05 if idle else 1e-12)


def test_a_budgets_figure_and_its_twins_say_the_same(client: Client) -> None:
    found = client.get("/budgets/team-blue.json").json()
    listed = next(b for b in client.get("/v1/budgets").json() if b["name"] == "team-blue")
    assert {k: found[k] for k in listed} == listed
    rows = list(csv.DictReader(io.StringIO(client.get("/budgets/team-blue.csv").text)))
    assert [r["at"] for r in rows] == [r["at"] for r in found["path"]]
    actual = [r for r in found["path"] if r["actual"] is not None]
    assert Decimal(actual[-1]["actual"]) == Decimal(found["spent_closed"])
    assert Decimal(found["path"][-1]["expected"]) == Decimal(found["forecast"]["expected"])
    assert Decimal(found["path"][-1]["low"]) == Decimal(found["forecast"]["low"])
    again = client.get(found["url"].replace("?", ".json?")).json()
    assert again["spent_closed"] == found["spent_closed"]
    spec = client.get("/budgets/team-blue.vl.json").json()
    drawn = spec["data"]["values"]
    assert len(drawn) < 500
    assert (drawn[0]["actual"], drawn[-1]["at"]) == (0, "2026-12-01T00:00:00Z")
    png = client.get("/budgets/team-blue.png")
    assert png.content.startswith(b"\x89PNG")
    behind = re.search(r'href="(/v1/cost\?[^"]+)"', client.get("/budgets/everything").text)
    assert behind
    rows = client.get(behind.group(1).replace("&amp;", "&")).json()["rows"]
    whole = client.get("/budgets/everything.json").json()
    assert sum(Decimal(r["cost_usd"]) for r in rows) == Decimal(whole["spent_closed"])


def test_a_budgets_links_keep_its_names_whole_and_its_month(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = client.app.state.service.budgets  # type: ignore[attr-defined]
    found = next(s for s in watch.standings if s.budget.name == "team-blue")
    odd = {"tenant": 'a,"b"', "models": ["m,n"], "pools": ["h100", '"q"']}
    # The month of a zone ahead of UTC begins in the UTC month before.
    period = replace(found.ground.period, start=datetime(2026, 10, 31, 15, tzinfo=UTC))
    ground = replace(found.ground, period=period, budget=found.budget.model_copy(update=odd))
    shown = replace(found, ground=ground)
    monkeypatch.setattr("pertoken.web.pages.budgets._standing", lambda *_: shown)
    links = [
        html.unescape(link) for link in re.findall(r'href="([^"]+)"', client.get("/budgets/team-blue").text)
    ]
    asked = parse_qs(next(link for link in links if link.startswith("/v1/cost?")).partition("?")[2])
    assert split_names(asked["tenant"]) == [odd["tenant"]]
    assert split_names(asked["model"]) == odd["models"]
    assert split_names(asked["pool"]) == odd["pools"]
    (charged,) = (link for link in links if link.startswith("/statement/"))
    assert charged.endswith("?month=2026-11")


def test_a_time_no_clock_tells_is_refused(client: Client) -> None:
    for at in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
        for path, name in (("/v1/cost", "start"), ("/figure/cost_usd", "from"), ("/budgets/team-blue", "at"),
                           ("/where", "hour"), ("/variance", "from"), ("/v1/report?book=a&book=b", "end")):  # fmt: skip
            answer = client.get(path, params={**dict(parse_qsl(path.partition("?")[2])), name: at})
            assert answer.status_code == 400, path
            assert "is no time in UTC" in answer.json()["detail"]
        window = {"start": at, "end": "2026-11-24T01:00:00Z"}
        assert client.post("/v1/close", json=window).status_code == 400
    assert "before any hour" in client.get("/budgets/team-blue?at=0002-01-01T00:00Z").json()["detail"]


def test_a_permalink_goes_back_in_time(client: Client) -> None:
    # A week's Monday: one hour of a day and night is in it.
    back = client.get("/budgets/tokens.json", params={"at": "2026-11-16T01:30Z"}).json()
    assert (back["period_start"], back["period_end"]) == ("2026-11-16T00:00:00Z", "2026-11-23T00:00:00Z")
    usage = client.get(
        "/v1/usage", params={"tenant": "blue", "start": "2026-11-16T00:00Z", "end": "2026-11-16T01:00Z"}
    ).json()["rows"]
    (tokens,) = (Decimal(r["quantity"]) for r in usage if r["meter"] == "output_tokens")
    assert Decimal(back["spent"]) == tokens
    assert client.get("/budgets/tokens", params={"at": "2027-01-01T00:00Z"}).status_code == 400
    assert client.get("/budgets/next-year").status_code == 400
    assert client.get("/budgets/nothing").status_code == 404
    assert client.get("/budgets/tokens.exe").status_code == 404


def test_statements_are_the_ledger(client: Client) -> None:
    whole = client.get("/statement.json?month=2026-11").json()
    cost = client.get("/v1/cost", params={"start": "2026-11-01T00:00Z"}).json()["rows"]
    assert Decimal(whole["ledger_usd"]) == sum(Decimal(r["cost_usd"]) for r in cost)
    total = Decimal(0)
    for share in whole["tenants"]:
        one = client.get("/statement/" + share["tenant"].replace("<", "%3C") + ".json?month=2026-11").json()
        assert one["usd"] == share["usd"]
        total += sum(Decimal(line["usd"]) for line in one["lines"])
    total += sum(Decimal(share["usd"]) for share in whole["nobodys"])
    assert total == Decimal(whole["ledger_usd"])
    blue = client.get("/statement/blue?month=2026-11")
    assert "by the GPU hours each held" in blue.text
    assert "Provisional" in blue.text
    rows = list(csv.DictReader(io.StringIO(client.get("/statement/blue.csv?month=2026-11").text)))
    assert {row["tenant"] for row in rows} == {"blue"}
    assert {row["what"] for row in rows} == {"own", "idle"}
    assert "nothing was charged to" in client.get("/statement/blue?month=2026-01").text
    assert client.get("/statement/blue.csv?month=2026-01").status_code == 400
    assert client.get("/statement?month=2026-13").status_code == 400
    assert client.get("/statement.exe").status_code == 404
    assert "Nothing was metered" in client.get("/statement?month=2026-01").text


def test_a_tenant_whose_name_ends_as_a_twin_has_a_statement(
    client_of: Callable[..., Client], tmp_path: Path
) -> None:
    whole = bearer(Tokens(tmp_path / "data").add("all", ("admin",)))
    mine = bearer(Tokens(tmp_path / "data").add("own", ("read",), tenant="blue.json"))
    client = client_of(require_tokens=True)
    client.headers.update(whole)
    event = {"key": "k", "ts": NOW_S - 600, "pool": "api", "model": "m", "tenant": "blue.json",
             "meter": "output_tokens", "quantity": 1_000_000}  # fmt: skip
    assert client.post("/v1/events", json=[event]).status_code == 200
    window = {"start": "2026-11-24T08:00Z", "end": "2026-11-24T09:00Z"}
    assert client.post("/v1/close", json=window).status_code == 200
    month = "month=2026-11"
    page = client.get(f"/statement?{month}").text
    assert f"/statement/blue.json?{month}&amp;as=page" in page
    named = client.get(f"/statement/blue.json?{month}&as=page")
    assert "Statement of blue.json" in named.text
    assert f"/statement/blue.json?{month}&amp;as=csv" in named.text
    told = client.get(f"/statement/blue.json?{month}&as=json").json()
    assert (told["tenant"], told) == ("blue.json", client.get(f"/statement/blue.json.json?{month}").json())
    rows = list(csv.DictReader(io.StringIO(client.get(f"/statement/blue.json?{month}&as=csv").text)))
    assert {row["tenant"] for row in rows} == {"blue.json"}
    # Without `as` the address is what it always was: the twin of blue. To the tenant's own token it is itself.
    assert client.get(f"/statement/blue.json?{month}").json()["tenant"] == "blue"
    assert "Statement of blue.json" in client.get(f"/statement/blue.json?{month}", headers=mine).text
    for other in (f"blue?{month}&as=json", f"blue.csv?{month}", f"blue?{month}"):
        assert client.get(f"/statement/{other}", headers=mine).status_code == 403


PAGES = ["/budgets", "/budgets/team-blue", "/statement/blue?month=2026-11"]


def test_a_tenants_token_sees_its_own_alone(client_of: Callable[..., Client], tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / "data")
    mine = bearer(tokens.add("blue", ("read",), tenant="blue"))
    writes = bearer(tokens.add("w", ("write",)))
    client = client_of(require_tokens=True)
    own = [*PAGES, *(f"/budgets/{name}{twin}" for name in ("team-blue", "tokens") for twin in TWINS)]
    own += [f"/statement/blue{twin}?month=2026-11" for twin in STATEMENT_TWINS]
    for path in own:
        answer = client.get(path, headers=mine)
        assert answer.status_code == 200, path
        for other in (b"everything", b"&lt;b&gt;", b"<b>", b'"red"', b"/budgets/red", b"/statement?"):
            assert other not in answer.content, (path, other)
        assert client.get(path).status_code == 401, path
        assert client.get(path, headers=writes).status_code == 403, path
    foreign = [f"/budgets/{name}{twin}" for name in ("everything", "red") for twin in ("", *TWINS)]
    for path in foreign:
        assert client.get(path, headers=mine).status_code == 404, path
    for path in (
        "/statement",
        "/statement.csv",
        "/statement.json",
        "/statement/red",
        "/statement/red.csv",
        "/statement/",
    ):
        assert client.get(path, headers=mine).status_code == 403, path


def test_without_budgets_the_page_says_what_to_do(
    client_of: Callable[..., Client], fleet: RunningFleet
) -> None:
    fleet.budgets.clear()
    text = client_of().get("/budgets").text
    assert "The fleet file has no budget" in text
    assert "Nobody is told" in text


def test_before_any_forecast_the_figure_draws_what_is_there(
    client_of: Callable[..., Client], browser: Browser
) -> None:
    with serving(client_of()) as served, watched(browser, served, **LIGHT) as page:
        page.goto(f"{served}/budgets")
        page.wait_for_selector(".figure svg path", state="attached")
        assert page.locator("tbody").first.locator("tr").count() == 4


@pytest.mark.parametrize("looks", [LIGHT, DARK_PHONE], ids=["light", "dark phone"])
def test_in_a_browser(client: Client, browser: Browser, looks: dict[str, Any]) -> None:
    with serving(client) as served, watched(browser, served, **looks) as page:
        page.goto(f"{served}/budgets")
        page.wait_for_selector(".figure svg path", state="attached")
        assert page.locator("tbody").first.locator("tr").count() == 4
        page.get_by_role("link", name="team-blue", exact=True).first.click()
        page.wait_for_url("**/budgets/team-blue")
        page.wait_for_selector(".figure svg path", state="attached")
        assert "hour-of-week means of 5 weeks" in page.content()
        page.goto(f"{served}/statement?month=2026-11")
        page.get_by_role("link", name="blue", exact=True).click()
        page.wait_for_url("**/statement/blue?month=2026-11")
        assert (
            page.locator("tfoot td.number").all_inner_texts()[-1] == page.locator(".tile .value").inner_text()
        )


@pytest.mark.parametrize("looks", [LIGHT, DARK_PHONE], ids=["light", "dark phone"])
def test_axe_finds_nothing(client: Client, browser: Browser, looks: dict[str, Any]) -> None:
    with serving(client) as served, watched(browser, served, **looks) as page:
        for path in (*PAGES, "/statement?month=2026-11"):
            page.goto(f"{served}{path}")
            page.wait_for_function("document.querySelectorAll('.figure:not(:has(svg))').length === 0")
            found = Axe().run(page).response
            assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in found["violations"]] == [], path


def test_a_statement_prints(client: Client, browser: Browser) -> None:
    with serving(client) as served:
        page = browser.new_page()
        page.goto(f"{served}/statement/blue?month=2026-11")
        page.emulate_media(media="print", color_scheme="dark")
        warned = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--bad')")
        assert warned == "#a3211f"  # dark enough on paper
        for hidden in ("header", "main nav"):
            assert not page.locator(hidden).first.is_visible()
        assert page.locator("h1").is_visible()
        paper = page.pdf(format="A4")
        page.close()
    assert paper.startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type\s*/Page[^s]", paper)) <= 3
