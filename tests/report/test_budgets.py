"""Budgets by hand: periods, what is spent, how fast, where it ends, when it runs out; and that intervals hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pertoken.fleet import Budget, RunningFleet, load_fleet
from pertoken.ledger import open_ledger
from pertoken.report._forecast import outlook
from pertoken.report._scope import Running, running_of
from pertoken.report._terms import hours_between
from pertoken.report.books import Books, open_books
from pertoken.report.budgets import Demand, Period, Standing, cumulative, grounds, period_at, stand
from pertoken.report.so_far import SoFar
from pertoken.tables import rate_rows, usage_rows

NOW = datetime(2026, 11, 24, 9, tzinfo=UTC)
FLEET = """
sites:
  dc: {timezone: UTC, pue: 1.2, tariff: {usd_per_kwh: 0.1}}
  annex: {timezone: UTC, pue: 1.2, tariff: {usd_per_kwh: 0.1}}
pools:
  h100: {gpu: H100-SXM, site: dc, count: 8, price: {term: reserved, usd_per_gpu_hour: 1}}
  l4: {gpu: L4, site: dc, count: 8, price: {term: reserved, usd_per_gpu_hour: 1}}
  spare: {gpu: L4, site: annex, count: 1, price: {term: reserved, usd_per_gpu_hour: 1}}
chargeback: {spread_idle: by_gpu_hours}
"""


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def budget(**more: object) -> Budget:
    amount = {} if "tokens" in more else {"usd": 1000}
    return Budget.model_validate({"name": "b", **amount, **more})


@pytest.mark.parametrize(
    ("more", "moment", "start", "end"),
    [
        ({}, "2026-11-24T09:00Z", "2026-11-01T00:00Z", "2026-12-01T00:00Z"),
        ({"period": "day"}, "2026-11-24T23:59Z", "2026-11-24T00:00Z", "2026-11-25T00:00Z"),
        ({"period": "week"}, "2026-11-24T09:00Z", "2026-11-23T00:00Z", "2026-11-30T00:00Z"),
        ({"period": "quarter"}, "2026-11-24T09:00Z", "2026-10-01T00:00Z", "2027-01-01T00:00Z"),
        # Los Angeles leaves daylight saving time on 1 November 2026: the month begins at UTC−7 and ends at UTC−8.
        ({"timezone": "America/Los_Angeles"}, "2026-11-01T07:00Z", "2026-11-01T07:00Z", "2026-12-01T08:00Z"),
        ({"timezone": "America/Los_Angeles"}, "2026-11-01T06:59Z", "2026-10-01T07:00Z", "2026-11-01T07:00Z"),
        # Kolkata's midnight is 18:30 UTC: the period begins with the first full hour after it.
        ({"timezone": "Asia/Kolkata", "period": "day"}, "2026-11-24T18:45Z", "2026-11-23T19:00Z", "2026-11-24T19:00Z"),
        ({"timezone": "Asia/Kolkata", "period": "day"}, "2026-11-24T19:00Z", "2026-11-24T19:00Z", "2026-11-25T19:00Z"),
        ({"start": "2026-01-31"}, "2026-02-28T00:00Z", "2026-02-28T00:00Z", "2026-03-31T00:00Z"),
        ({"start": "2026-01-31"}, "2026-02-27T00:00Z", "2026-01-31T00:00Z", "2026-02-28T00:00Z"),
        ({"start": "2026-02-15", "period": "quarter"}, "2026-11-14T00:00Z", "2026-08-15T00:00Z", "2026-11-15T00:00Z"),
        ({"start": "2026-02-15", "period": "quarter"}, "2026-11-15T00:00Z", "2026-11-15T00:00Z", "2027-02-15T00:00Z"),
        ({"start": "2026-11-05", "period": "week"}, "2026-11-24T09:00Z", "2026-11-19T00:00Z", "2026-11-26T00:00Z"),
    ],
)  # fmt: skip
def test_periods_by_the_calendar(more: dict[str, object], moment: str, start: str, end: str) -> None:
    assert period_at(budget(**more), at(moment)) == Period(at(start), at(end))


def test_every_hour_lies_in_one_period() -> None:
    for more in (
        {"period": "day", "timezone": "Asia/Kathmandu"},
        {"start": "2024-01-31"},
        {"period": "quarter"},
    ):
        wanted, moment = budget(**more), at("2026-01-01T00:00Z")
        period = period_at(wanted, moment)
        while moment < at("2027-01-01T00:00Z"):
            assert period is not None
            if moment == period.end:
                following = period_at(wanted, moment)
                assert following is not None
                assert following.start == period.end
                period = following
            assert period_at(wanted, moment) == period
            moment += timedelta(hours=1)


def test_before_its_start_there_is_no_period() -> None:
    assert period_at(budget(start="2026-11-25"), NOW) is None
    assert period_at(budget(start="2026-11-24"), NOW) is not None


@pytest.fixture
def fleet(tmp_path: Path) -> RunningFleet:
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET)
    return load_fleet(path)


@pytest.fixture
def books(tmp_path: Path, fleet: RunningFleet) -> Iterator[Books]:
    with open_books(fleet, tmp_path / "data") as found:
        yield found


def put(
    books: Books, start: datetime, gpus: float | npt.NDArray[np.float64], hours: int = 0, pool: str = "h100",
    tenant: str = "a", model: str = "m", tokens: float = 0.0,
) -> None:  # fmt: skip
    """GPUs held at 1 USD an hour from a moment up to 09:00, or for so many hours."""
    when = hours_between(start, start + timedelta(hours=hours) if hours else NOW)
    phase = "idle" if tenant == "(idle)" else "output"
    amounts = {(phase, "gpu_hours"): gpus, (phase, "output_tokens"): tokens}
    rows = usage_rows(when, amounts, book="actual", pool=pool, model=model, tenant=tenant, basis="measured")
    books.ledger.add_usage(rows)
    books.ledger.add_rates(
        rate_rows(when, 1.0, pool=pool, meter="gpu_hours", component="rent", basis="quoted", source="x")
    )


def of(books: Books, wanted: Budget, now: datetime = NOW) -> Standing:
    books.ledger.close()
    (ground,) = grounds(books, books.fleet, now, [wanted])
    return stand(ground, now, None)


def test_a_steady_spend_by_hand(books: Books) -> None:
    # 2 USD an hour since 2026-10-20 00:00: 35 days and 9 hours, so five whole weeks tell what comes.
    put(books, at("2026-10-20T00:00Z"), 2.0)
    found = of(books, budget(usd="1272"))
    # November: 23 days and 9 hours are over, 561 h × 2 USD; 720 h × 2 USD in all.
    assert found.spent == 1122
    assert found.remaining == 150
    assert found.ground.burn == {"1h": 2, "24h": 2, "7d": 2}
    assert found.burn_ratio("24h") == pytest.approx(2 * 720 / 1272)
    assert found.forecast is not None
    assert {found.forecast.expected, found.forecast.low, found.forecast.high} == {Decimal(1440)}
    assert found.forecast.method == "hour-of-week means of 5 weeks"
    # 150 USD last 75 hours.
    assert found.runs_out == NOW + timedelta(hours=75)
    rows = cumulative(found)
    assert (rows[0]["at"], rows[0]["actual"]) == (at("2026-11-01T00:00Z"), 0)
    assert rows[561] == {"at": NOW, "actual": 1122, "expected": 1122, "low": 1122, "high": 1122}
    assert (rows[-1]["at"], rows[-1]["expected"]) == (at("2026-12-01T00:00Z"), 1440)
    assert len(rows) == 721


def test_what_ran_out_says_when(books: Books) -> None:
    put(books, at("2026-11-01T00:00Z"), 2.0)
    found = of(books, budget(usd="100"))
    assert found.runs_out == at("2026-11-03T02:00Z")  # after 50 hours
    assert found.spent_fraction == pytest.approx(11.22)
    assert of(books, budget(usd="5000")).runs_out is None


def test_days_and_nights_tell_what_comes(books: Books) -> None:
    # 1 USD by night, 3 by day (8 to 20), for 4 days: hours of the day, since there are no two weeks.
    start = at("2026-11-20T09:00Z")
    hour = np.arange(96) + 9
    put(books, start, np.where((hour % 24 >= 8) & (hour % 24 < 20), 3.0, 1.0))
    found = of(books, budget(period="day", usd="50"))
    # 8 h × 1 + 1 h × 3 are spent; 11 h × 3 and 4 h × 1 come.
    assert found.spent == 11
    assert found.forecast is not None
    assert found.forecast.expected == 48
    assert found.forecast.method == "hour-of-day means of 4 days"


def test_without_two_days_there_is_no_forecast(books: Books) -> None:
    put(books, NOW - timedelta(hours=47), 2.0)
    found = of(books, budget())
    assert found.forecast is None
    assert found.forecast_fraction is None
    assert found.runs_out is None
    assert found.ground.burn == {"1h": 2, "24h": 2, "7d": None}
    assert found.to_dict()["forecast_missing"] == "a forecast needs two days of closed hours"
    assert all(row["expected"] is None for row in cumulative(found))


def test_scopes_and_idle(books: Books) -> None:
    start = at("2026-11-24T00:00Z")  # 9 hours
    put(books, start, 3.0, tenant="a")
    put(books, start, 1.0, tenant="b", model="n")
    put(books, start, 4.0, tenant="(idle)", model="")
    put(books, start, 2.0, tenant="a", pool="l4")
    put(books, start, 2.0, tenant="(idle)", pool="(site:dc)", model="")
    put(books, start, 5.0, tenant="(idle)", pool="spare", model="")

    def spent(**more: object) -> Decimal:
        return of(books, budget(**more)).spent

    assert spent() == 9 * 17
    assert spent(idle=False) == 9 * 6
    assert spent(pools=["h100"]) == 9 * 8
    assert spent(pools=["h100", "(site:dc)"], idle=False) == 9 * 4
    assert spent(models=["n"]) == 9
    assert spent(tenant="a") == 9 * 5
    assert spent(tenant="a", pools=["l4"]) == 9 * 2
    # Of h100's 4 idle a held 3/4; of the site's 2 it held 5/6; nobody used the annex, so its 5 stay with nobody.
    assert spent(tenant="a", idle=True) == Decimal(9) * (5 + 3) + 9 * Decimal("1.666666667")
    assert spent(tenant="a", idle=True, pools=["h100"]) == 9 * (3 + 3)
    assert spent(tenant="nobody", idle=True) == 0


def test_tokens_are_counted_as_named(books: Books) -> None:
    put(books, at("2026-11-24T00:00Z"), 1.0, tokens=1000.0)
    found = of(books, budget(tokens=10_000, counts="output", tenant="a", hard=True))
    assert (found.spent, found.remaining) == (Decimal(9000), Decimal(1000))
    assert found.budget.unit == "output tokens"
    assert found.to_dict()["spent"] == "9000"
    assert of(books, budget(tokens=10_000, counts="input")).spent == 0


def demand(books: Books, month: str, usd: float) -> None:
    when = hours_between(at(month), at(month) + timedelta(hours=1))
    books.ledger.add_usage(
        usage_rows(when, {("idle", "peak_kw:p"): usd}, book="actual", pool="(site:dc)", model="", tenant="(idle)",
                   basis="measured")
    )  # fmt: skip
    books.ledger.add_rates(
        rate_rows(
            when,
            1.0,
            pool="(site:dc)",
            meter="peak_kw:p",
            component="demand_charge",
            basis="quoted",
            source="x",
        )
    )


def test_a_demand_charge_stands_at_its_months_first_hour(books: Books) -> None:
    put(books, at("2026-09-01T00:00Z"), 1.0)
    for month, usd in (("2026-09-01", 300), ("2026-10-01", 500), ("2026-11-01", 100)):
        demand(books, f"{month}T00:00Z", usd)
    found = of(books, budget(usd="5000"))
    assert found.spent == 561 + 100
    assert found.ground.burn == {"1h": 1, "24h": 1, "7d": 1}
    assert found.forecast is not None
    # 720 hours; the month's demand, 100 so far, is expected at the mean of 300 and 500, and is between 100 and 500.
    assert found.forecast.expected == 720 + 400
    assert (found.forecast.low, found.forecast.high) == (Decimal(720 + 100), Decimal(720 + 500))
    assert "100.00 USD so far" in found.to_dict()["note"]
    quarter = of(books, budget(usd="9000", period="quarter"))
    # October's 500 and November's 100 are in; November's rise to 400 and December's 400 are expected.
    assert quarter.spent == 54 * 24 + 9 + 600
    assert quarter.forecast is not None
    assert quarter.forecast.expected == 92 * 24 + 500 + 400 + 400
    assert of(books, budget(usd="5000", idle=False)).ground.ahead.expected_usd == 0
    week = of(books, budget(usd="5000", period="week"))
    assert week.spent == 33
    assert week.forecast is not None
    assert week.forecast.expected == 168


def so_far(usd: float, pool: str = "h100", tenant: str = "a") -> Running:
    """Half of the hour from 09:00 with so much spent in it."""
    ledger = open_ledger()
    when = hours_between(NOW, NOW + timedelta(hours=1))
    ledger.add_usage(
        usage_rows(
            when,
            {("output", "gpu_hours"): usd},
            book="actual",
            pool=pool,
            model="m",
            tenant=tenant,
            basis="measured",
        )
    )
    ledger.add_rates(
        rate_rows(when, 1.0, pool=pool, meter="gpu_hours", component="rent", basis="quoted", source="x")
    )
    ledger.close()
    return running_of(SoFar(NOW, NOW + timedelta(minutes=30), ledger))


def test_the_hour_so_far_counts_and_what_is_above_its_expectation_stays(books: Books) -> None:
    put(books, at("2026-10-20T00:00Z"), 2.0)
    books.ledger.close()
    (ground,) = grounds(books, books.fleet, NOW, [budget(usd="1272")])
    half = NOW + timedelta(minutes=30)
    usual = stand(ground, half, so_far(1.0))
    assert (usual.running, usual.spent) == (Decimal(1), Decimal(1123))
    assert usual.forecast is not None
    assert usual.forecast.expected == 1440
    # 31 USD in half an hour in which 1 was expected: 30 more than usual, at the end as well.
    spike = stand(ground, half, so_far(31.0))
    assert spike.forecast is not None
    assert spike.forecast.expected == 1470
    assert spike.runs_out == NOW + timedelta(hours=60)
    over = stand(ground, half, so_far(200.0))
    assert over.remaining < 0
    assert over.runs_out == half
    assert stand(ground, half, so_far(5.0, pool="l4")).running == 5
    idle = so_far(7.0, tenant="(idle)")
    for more, running in (({}, 7), ({"idle": False}, 0), ({"tenant": "(idle)"}, 7)):
        (ground,) = grounds(books, books.fleet, NOW, [budget(**more)])  # what is closed counts them alike
        assert stand(ground, half, idle).running == running
    (other,) = grounds(books, books.fleet, NOW, [budget(pools=["spare"])])
    assert stand(other, half, so_far(5.0)).running == 0


def test_a_demand_charge_that_rises_in_this_hour_is_not_expected_twice(books: Books) -> None:
    put(books, at("2026-10-20T00:00Z"), 2.0)
    books.ledger.close()
    (ground,) = grounds(books, books.fleet, NOW, [budget()])
    ground = replace(ground, ahead=Demand(100.0, 60.0, 150.0))
    half, peak = NOW + timedelta(minutes=30), {"(idle)": [(NOW, "(site:dc)", "", Decimal(80))]}
    cost = {**peak, "a": [(NOW, "h100", "m", Decimal(1))]}
    found = stand(ground, half, Running(NOW, half, cost, {}, peak))
    assert (found.running, found.rise) == (Decimal(81), Decimal(80))
    assert found.forecast is not None
    # 1,440 USD of hours; of the 100 that the month's charge has still to rise, 80 came in this hour.
    assert found.forecast.expected == 1540
    assert (found.forecast.low, found.forecast.high) == (Decimal(1520), Decimal(1590))
    assert cumulative(found)[-1]["expected"] == 1540


def test_unpriced_hours_are_told(books: Books) -> None:
    put(books, at("2026-11-24T00:00Z"), 1.0)
    when = hours_between(NOW - timedelta(hours=2), NOW)
    books.ledger.close()
    books.ledger.add_usage(
        usage_rows(
            when,
            {("output", "energy_kwh"): 1.0},
            book="actual",
            pool="l4",
            model="m",
            tenant="a",
            basis="measured",
        )
    )
    everything, h100 = (
        stand(ground, NOW, None)
        for ground in grounds(books, books.fleet, NOW, [budget(), budget(name="c", pools=["h100"])])
    )
    assert everything.ground.unpriced_hours == 2
    assert h100.ground.unpriced_hours == 0


def seasonal(draw: np.random.Generator, hours: int) -> npt.NDArray[np.float64]:
    """Days and nights, weekends, days that are busier than others, and noise in each hour."""
    t = np.arange(hours)
    usual = 10 + 5 * np.sin(2 * np.pi * (t % 24) / 24) - 4 * (t % 168 >= 120)
    days = np.repeat(draw.normal(1, 0.15, hours // 24 + 1), 24)[:hours]
    found: npt.NDArray[np.float64] = usual * days * draw.lognormal(0, 0.2, hours)
    return found


@pytest.mark.parametrize("weeks", [3, 8])
def test_four_of_five_left_out_periods_lie_in_the_interval(weeks: int) -> None:
    past, inside, count = weeks * 168, 0, 0
    for number in range(60):
        series = seasonal(np.random.default_rng(number), past + 24 * 21)
        t = np.arange(len(series)) % 168
        seen = outlook(series[:past], t[:past], t[past:])
        assert seen is not None
        so_far = np.cumsum(series[past:])
        for ahead in (24, 24 * 7, 24 * 21):
            inside += bool(seen.low[ahead - 1] <= so_far[ahead - 1] <= seen.high[ahead - 1])
            count += 1
    assert 0.75 <= inside / count <= 0.85


def test_an_outlook_is_the_same_again() -> None:
    series = seasonal(np.random.default_rng(1), 500)
    t = np.arange(600) % 168
    first, second = (outlook(series, t[:500], t[500:]) for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.low == second.low).all()
    assert (first.low <= first.expected).all()
    assert (first.expected <= first.high).all()
