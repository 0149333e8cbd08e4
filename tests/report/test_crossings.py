"""Thresholds fire once, and resolve for a reason."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

from pertoken.fleet import Budget
from pertoken.report._crossings import Event, Firing, crossings
from pertoken.report.budgets import Demand, Forecast, Ground, Standing, period_at

NOW = datetime(2026, 11, 24, 9, tzinfo=UTC)


def standing(spent: float, forecast: float | None = None, now: datetime = NOW, **more: object) -> Standing:
    """A budget of 100 USD a month (or as given) of which so much is spent."""
    budget = Budget.model_validate({"name": "b", "usd": 100, **more})
    period = period_at(budget, now)
    assert period is not None
    ground = Ground(
        budget, period, now, {period.start: Decimal(str(spent))}, {"1h": None, "24h": None, "7d": None},
        None, Demand(), 0, {},
    )  # fmt: skip
    expected = None if forecast is None else Decimal(str(forecast))
    seen = None if expected is None else Forecast(expected, expected, expected, "by hand")
    return Standing(ground, now, Decimal(0), seen, None)


def look(firing: Firing, *found: Standing, now: datetime = NOW) -> tuple[Firing, list[str]]:
    after, events = crossings(firing, list(found), now)
    return after, [f"{e.state} {e.key}" for e in events]


def test_a_threshold_fires_once_and_recovers() -> None:
    firing, told = look({}, standing(49.99))
    assert told == []
    firing, told = look(firing, standing(50))
    assert told == ["firing b/actual/50"]
    firing, told = look(firing, standing(79), now=NOW + timedelta(hours=1))
    assert told == []
    firing, told = look(firing, standing(101))
    assert told == ["firing b/actual/80", "firing b/actual/100"]
    firing, told = look(firing, standing(79.99))
    assert told == ["resolved b/actual/80", "resolved b/actual/100"]
    assert list(firing) == ["b/actual/50"]


def test_a_forecast_that_hovers_does_not_chatter() -> None:
    firing, told = look({}, standing(10, 100))
    assert told == ["firing b/forecast/100"]
    for figure in (99, 101, 98):
        firing, told = look(firing, standing(10, figure))
        assert told == []
    firing, told = look(firing, standing(10, None))
    assert told == []  # not known: nothing changes
    firing, told = look(firing, standing(10, 97.9))
    assert told == ["resolved b/forecast/100"]
    assert firing == {}


def test_a_new_period_begins_anew() -> None:
    firing, _ = look({}, standing(60))
    later = datetime(2026, 12, 1, 1, tzinfo=UTC)
    after, events = crossings(firing, [standing(55, now=later)], later)
    assert [(e.state, e.why, e.figure) for e in events] == [
        ("resolved", "the period is over", "60"),
        ("firing", "", "55"),
    ]
    assert after["b/actual/50"].period_start == datetime(2026, 12, 1, tzinfo=UTC)


def test_what_the_fleet_no_longer_has_is_resolved() -> None:
    firing, _ = look({}, standing(60))
    _, events = crossings(firing, [], NOW)
    assert [e.why for e in events] == ["the fleet file no longer has this threshold"]
    _, events = crossings(firing, [standing(60, alert_at={"actual_percent": [90]})], NOW)
    assert [e.why for e in events] == ["the fleet file no longer has this threshold"]
    _, events = crossings(firing, [standing(60, usd=200)], NOW)
    assert [e.why for e in events] == ["less is booked, or more allowed"]
    _, events = crossings(firing, [standing(60, tenant="t")], NOW)
    assert [(e.state, e.tenant) for e in events] == [("resolved", ""), ("firing", "t")]


def test_an_event_says_what_it_is() -> None:
    _, (event, *_) = crossings({}, [standing(120, hard=True, alert_at={"actual_percent": [100]})], NOW)
    assert event.severity == "critical"
    assert event.text == (
        "Passed 100 % of the budget b (100.00 USD): spent 120.00 USD in the period from 2026-11-01 00:00 to "
        "2026-12-01 00:00 UTC."
    )
    _, (event,) = crossings({}, [standing(1, 250.5)], NOW)
    assert event.severity == "warning"
    assert event.text.startswith(
        "Expected to pass 100 % of the budget b (100.00 USD): forecast 250.50 USD for"
    )
    same = crossings({}, [standing(1, 250.5)], NOW)[1][0]
    assert isinstance(same, Event)
    assert same.id == event.id
