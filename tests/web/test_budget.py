"""Budgets over HTTP: how they stand, whether the next request fits, and to each tenant its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pertoken.errors import InputError
from pertoken.fleet import RunningFleet, load_fleet
from pertoken.web.service import Service
from pertoken.web.tokens import Tokens
from tests.web.conftest import FLEET, NOW_S, Client, Clock
from tests.web.test_exporter import samples, scrape, value
from tests.web.test_ingest import event
from tests.web.test_who import bearer

BUDGETS = """
budgets:
  - {name: all, usd: 10000}
  - {name: a-usd, tenant: a, usd: 100, hard: true}
  - {name: a-model, tenant: a, models: [m], tokens: 10000000, counts: output, period: day, hard: true}
  - {name: b-soft, tenant: b, usd: 10}
  - {name: rented, pools: [api], usd: 1000, idle: false}
  - {name: later, usd: 1, start: 2027-01-01}
chargeback: {spread_idle: by_cost}
"""
HOUR_S = 3600


@pytest.fixture
def fleet(tmp_path: Path) -> RunningFleet:
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET + BUDGETS)
    return load_fleet(path)


@pytest.fixture
def grace_s() -> float:
    return 60.0


def spend(client: Client, clock: Clock, **headers: str) -> None:
    """Tenant a: 3 M output tokens in a closed hour and 1 M in this one; b: 1 M in the closed hour; 15 USD per M."""
    sent = [
        event("1", 3_000_000, ts=NOW_S - HOUR_S),
        event("2", 1_000_000, ts=NOW_S - HOUR_S, tenant="b"),
        event("3", 1_000_000, ts=NOW_S + 600),
    ]
    clock.at_s = NOW_S + 1800
    assert client.post("/v1/events", json=sent, headers=headers).status_code == 200
    service: Service = client.app.state.service  # type: ignore[attr-defined]
    service.close_due()
    service.budgets.refresh()


def by_name(client: Client, **headers: str) -> dict[str, dict[str, Any]]:
    answer = client.get("/v1/budgets", headers=headers)
    assert answer.status_code == 200, answer.text
    return {row["name"]: row for row in answer.json()}


def test_how_budgets_stand(client: Client, clock: Clock) -> None:
    spend(client, clock)
    found = by_name(client)
    assert list(found) == ["all", "a-usd", "a-model", "b-soft", "rented"]
    assert (found["a-usd"]["spent_closed"], found["a-usd"]["spent_running"]) == ("45", "15")
    assert (found["a-usd"]["spent"], found["a-usd"]["remaining"]) == ("60", "40")
    assert (found["a-model"]["spent"], found["a-model"]["unit"]) == ("4000000", "output tokens")
    assert found["b-soft"]["spent"] == "15"
    assert found["b-soft"]["remaining"] == "-5"
    assert found["rented"]["spent"] == "75"
    # 8 H100 held at 1 USD each: one closed hour and half of this one.
    assert float(found["all"]["spent"]) == pytest.approx(75 + 8 + 4)
    assert found["all"]["forecast"] is None
    assert found["a-usd"]["period_end"] == "2026-12-01T00:00:00Z"
    assert found["a-usd"]["closed_until"] == "2026-11-24T09:00:00Z"


def test_whether_the_next_request_fits(client: Client, clock: Clock) -> None:
    spend(client, clock)

    def ask(tenant: str, **query: Any) -> dict[str, Any]:
        answer = client.get(f"/v1/budget/{tenant}", params=query)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    fits = ask("a")
    assert (fits["allowed"], fits["reason"], fits["budget"]) == (True, "it fits", "a-usd")
    assert (fits["remaining"], fits["unit"], fits["hard"]) == ("40", "USD", True)
    assert fits["period_end"] == "2026-12-01T00:00:00Z"
    assert {b["budget"] for b in fits["budgets"]} == {"all", "a-usd"}
    assert ask("a", usd="40")["allowed"]
    refused = ask("a", usd="40.000000001")
    assert (refused["allowed"], refused["reason"]) == (False, "the hard budget a-usd has too little left")
    assert ask("a", tokens=7_000_000)["allowed"], "no model is named, so the model's budget is not asked"
    assert ask("a", tokens=6_000_000, model="m")["allowed"]
    assert not ask("a", tokens=6_000_001, model="m")["allowed"]
    assert ask("a", tokens=6_000_001, model="n")["allowed"]
    assert {b["budget"] for b in ask("a", pool="api")["budgets"]} == {"all", "a-usd", "rented"}
    soft = ask("b", usd="1")
    assert (soft["allowed"], soft["reason"]) == (True, "a budget has too little left, and is not hard")
    assert (soft["budget"], soft["remaining"]) == ("b-soft", "-5")
    nobody = ask("zoe/with slash")
    assert (nobody["allowed"], nobody["tenant"]) == (True, "zoe/with slash")
    assert [b["budget"] for b in nobody["budgets"]] == ["all"]
    for odd in ("zoe\nand more", "zoe\n", "\n", "zoe\r\n/x", "zoe\u2028"):
        assert ask(quote(odd))["tenant"] == odd
    for query in ({"usd": "-1"}, {"usd": "nan"}, {"tokens": "-1"}, {"tokens": "1.5"}, {"usd": "x"}):
        assert client.get("/v1/budget/a", params=query).status_code == 422


def test_a_tenant_without_any_budget_is_told_so(
    client_of: Callable[..., Client], fleet: RunningFleet
) -> None:
    fleet.budgets[:] = [b for b in fleet.budgets if b.tenant == "a"]
    client = client_of()
    until = time.monotonic() + 20
    while (answer := client.get("/v1/budget/nobody")).status_code == 503:
        assert time.monotonic() < until
    assert answer.json() == {
        "tenant": "nobody", "allowed": True, "reason": "no budget applies", "budget": None, "unit": None,
        "remaining": None, "hard": None, "period_end": None, "as_of": None, "budgets": [],
    }  # fmt: skip


def test_a_tenants_token_sees_its_own_alone(
    client_of: Callable[..., Client], tmp_path: Path, clock: Clock, fleet: RunningFleet
) -> None:
    shared = fleet.budgets[0]
    fleet.budgets[0] = shared.model_copy(update={"hard": True, "usd": Decimal(50)})
    tokens = Tokens(tmp_path / "data")
    boss = bearer(tokens.add("boss", ("admin",)))
    mine = bearer(tokens.add("b", ("read",), tenant="b"))
    writes = bearer(tokens.add("w", ("write",)))
    client = client_of(require_tokens=True)
    spend(client, clock, **boss)
    for path in ("/v1/budgets", "/v1/budget/b"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers=writes).status_code == 403
    assert list(by_name(client, **mine)) == ["b-soft"]
    assert client.get("/v1/budget/a", headers=mine).status_code == 403
    own = client.get("/v1/budget/b", headers=mine).json()
    assert (own["allowed"], own["reason"]) == (False, "a budget of more than this tenant is used up")
    assert (own["budget"], own["remaining"]) == ("b-soft", "-5")
    assert own["budgets"][0] == {
        "budget": "(shared)", "fits": False, "hard": True, "shared": True, "unit": None, "remaining": None,
        "period_end": None,
    }  # fmt: skip
    whole = client.get("/v1/budget/b", headers=boss).json()
    assert (whole["budget"], whole["reason"]) == ("all", "the hard budget all has too little left")


def test_a_shared_budget_tells_a_tenant_no_remainder(
    client_of: Callable[..., Client], tmp_path: Path, clock: Clock, fleet: RunningFleet
) -> None:
    """Asking for ever closer amounts would else find it out."""
    fleet.budgets[0] = fleet.budgets[0].model_copy(update={"hard": True})
    tokens = Tokens(tmp_path / "data")
    boss, mine = bearer(tokens.add("boss", ("admin",))), bearer(tokens.add("a", ("read",), tenant="a"))
    client = client_of(require_tokens=True)
    spend(client, clock, **boss)
    for usd in ("1", "9000", "9999", "1000000"):
        shared, own = client.get("/v1/budget/a", params={"usd": usd}, headers=mine).json()["budgets"]
        assert (shared["budget"], shared["fits"]) == ("(shared)", True)
        assert own["fits"] is (usd == "1")
    (whole, _) = client.get("/v1/budget/a", params={"usd": "9999"}, headers=boss).json()["budgets"]
    assert (whole["budget"], whole["fits"]) == ("all", False)


def test_the_gap_between_an_hours_end_and_its_close_hides_nothing(client: Client, clock: Clock) -> None:
    spend(client, clock)
    watch = client.app.state.service.budgets  # type: ignore[attr-defined]
    assert watch.standings is not None
    before = watch.standings
    clock.at_s = NOW_S + HOUR_S + 30  # the hour is over, its close is owed in 30 s
    watch.refresh()
    assert watch.standings is before
    clock.at_s += 60
    client.app.state.service.close_due()  # type: ignore[attr-defined]
    watch.refresh()
    assert by_name(client)["a-usd"]["spent_closed"] == "60"
    clock.at_s += 5 * HOUR_S  # closing fails for hours: what is known is told, and until when
    watch.refresh()
    late = by_name(client)["a-usd"]
    assert (late["spent"], late["closed_until"]) == ("60", "2026-11-24T10:00:00Z")
    assert late["as_of"] == "2026-11-24T15:01:30Z"


def test_a_crossing_is_noted_and_doctor_knows_of_what_fails(
    client: Client, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    spend(client, clock)
    watch = client.app.state.service.budgets  # type: ignore[attr-defined]
    assert {e.key for e in watch.alarm.firing()} == {
        "a-usd/actual/50", "b-soft/actual/50", "b-soft/actual/80", "b-soft/actual/100",
    }  # fmt: skip

    def gone() -> None:
        raise InputError("the ledger is gone")

    monkeypatch.setattr(watch, "refresh", gone)
    watch.closed()
    until = time.monotonic() + 20
    while not watch.problem:
        assert time.monotonic() < until
        time.sleep(0.01)
    monkeypatch.setattr(watch.alarm, "problems", lambda: {"ops": "it answers 503"})
    told = [c["text"] for c in client.get("/v1/doctor").json()["complaints"] if c["kind"] == "alerts"]
    assert told == ["ops: it answers 503", "the budgets could not be looked at: the ledger is gone"]


def test_prometheus_is_told(client_of: Callable[..., Client], tmp_path: Path, clock: Clock) -> None:
    tokens = Tokens(tmp_path / "data")
    boss = bearer(tokens.add("boss", ("admin",)))
    mine = bearer(tokens.add("b", ("read",), tenant="b"))
    client = client_of(require_tokens=True)
    spend(client, clock, **boss)
    found = samples(scrape(client, **boss))
    assert value(found, "budget_limit_usd", budget="a-usd") == 100
    assert value(found, "budget_spent_usd", budget="a-usd") == 60
    assert value(found, "budget_spent_tokens", budget="a-model") == 4_000_000
    assert value(found, "budget_spent_ratio", budget="b-soft") == 1.5
    assert value(found, "budget_burn_ratio", budget="a-usd", window="1h") == 45 * 720 / 100
    assert value(found, "budget_period_end_timestamp_seconds", budget="a-model") == NOW_S + 15 * HOUR_S
    about = {"tenant": "a", "period": "day", "hard": "true", "counts": "output"}
    assert value(found, "budget_info", budget="a-model", **about) == 1
    assert value(found, "budgets_watched") == 1
    own = samples(scrape(client, **mine))
    assert {dict(labels)["budget"] for name, labels in own if name.startswith("pertoken_budget_")} == {
        "b-soft"
    }
    assert not [name for name, _ in own if name.startswith(("pertoken_budgets_", "pertoken_alerts"))]


def test_openapi_has_both(client: Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    schema = paths["/v1/budget/{tenant}"]["get"]
    assert schema["responses"]["200"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/FitAnswer"
    }
    assert {p["name"] for p in schema["parameters"]} == {"tenant", "tokens", "usd", "model", "pool"}
    assert "/v1/budgets" in paths
