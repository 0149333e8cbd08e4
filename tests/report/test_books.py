"""From journal to money: rates in force, demand and tiers of the month, hours nobody metered, closing again."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from pertoken import catalog, meter
from pertoken.errors import InputError, ScenarioError
from pertoken.fleet import RunningFleet, load_fleet
from pertoken.meter import prometheus
from pertoken.rates.energy import bill
from pertoken.report import books as module
from pertoken.report._terms import hours_between, months_of
from pertoken.report.books import Books, hours_in, open_books
from pertoken.tables import usage_rows

HOUR = timedelta(hours=1)
START = datetime(2026, 11, 24, 8, tzinfo=UTC)
PLAIN = """
sites:
  dc: {timezone: America/Los_Angeles, pue: 1.0, tariff: {usd_per_kwh: 0.1, demand_usd_per_kw: 10}}
pools:
  owned:
    gpu: L4
    site: dc
    count: 2
    price: {term: owned, usd_per_gpu: 35040, life_years: 4, wacc_fraction: 0, residual_fraction: 0,
            method: straight-line}
  cloud: {gpu: L4, site: dc, price: {term: on_demand, usd_per_gpu_hour: 3}}
"""


Make = Callable[..., Books]


def told(books: Books, hour: datetime, name: str, quantity: float, source: str, pool: str = "owned") -> None:
    """One record in the middle of an hour."""
    moment = hour + timedelta(minutes=30)
    columns = {
        "ts": [moment.timestamp()], "source": source, "key": [f"{hour.isoformat()} {name} {quantity}"], "pool": pool,
        "model": "m", "tenant": "t", "meter": name, "quantity": [float(quantity)],
    }  # fmt: skip
    books.journal.append(meter.records(columns, 1))


def usd(books: Books, **where: str) -> dict[str, Decimal]:
    """Cost by component."""
    rows = books.ledger.cost("component", where={"book": "actual", **where}).to_pylist()
    return {r["component"]: r["cost_usd"] for r in rows}


def peaks(books: Books) -> list[tuple[datetime, Decimal]]:
    rows = books.ledger.usage("hour", where={"meter": "peak_kw:flat"}).to_pylist()
    return [(r["hour"], r["quantity"]) for r in rows]


def test_a_price_holds_from_its_day_on(books_of: Make) -> None:
    books = books_of(
        PLAIN
        + """
changes:
  - {from: 2026-12-01, pool: cloud, price: {term: on_demand, usd_per_gpu_hour: 2}}
  - {from: 2026-12-01, pool: owned, count: 4}
  - {from: 2026-12-01, site: dc, tariff: {usd_per_kwh: 0.2, demand_usd_per_kw: 20}}
"""
    )
    midnight = datetime(2026, 12, 1, 8, tzinfo=UTC)  # in Los Angeles
    hours = [midnight - 2 * HOUR, midnight - HOUR, midnight, midnight + HOUR]
    for hour in hours:
        told(books, hour, "gpu_hours", 1, "bill/cloud", pool="cloud")
        told(books, hour, "it_energy_kwh", 5, "node/pdu")
    books.close(hours)
    rent = books.ledger.cost("hour", where={"pool": "cloud", "book": "actual"}).to_pylist()
    assert [(r["hour"], r["cost_usd"]) for r in rent] == list(zip(hours, [3, 3, 2, 2], strict=True))
    held = books.ledger.usage("hour", where={"pool": "owned", "meter": "gpu_hours"}).to_pylist()
    assert [r["quantity"] for r in held] == [2, 2, 4, 4]
    where = {"component": "energy_charge", "pool": "owned"}
    energy = books.ledger.cost("hour", where=where).to_pylist()
    assert [r["cost_usd"] for r in energy] == [Decimal(x) for x in ("0.5", "0.5", "1.0", "1.0")]
    demand = books.ledger.cost("hour", where={"component": "demand_charge"}).to_pylist()
    first_of_november = datetime(2026, 11, 1, 7, tzinfo=UTC)
    assert [(r["hour"], r["cost_usd"]) for r in demand] == [(first_of_november, 50), (midnight, 100)]
    # Closing each hour alone, in another order, gives the same books.
    before = books.ledger.cost("hour", "pool", "component").to_pylist()
    for hour in reversed(hours):
        books.close([hour])
    assert books.ledger.cost("hour", "pool", "component").to_pylist() == before


def test_the_months_peak_is_restated_and_charged_once(books_of: Make) -> None:
    books = books_of(PLAIN)
    first = datetime(2026, 11, 1, 7, tzinfo=UTC)  # midnight in Los Angeles, summer time
    for number, kwh in enumerate((5, 9, 7)):
        told(books, START + number * HOUR, "it_energy_kwh", kwh, "node/pdu")
        books.close_due(START + (number + 1) * HOUR)
    assert peaks(books) == [(first, Decimal(9))]
    assert usd(books)["demand_charge"] == 90
    told(books, START, "it_energy_kwh", 6, "node/late")  # 11 kWh in that hour now
    books.close_due(START + 3 * HOUR)
    assert peaks(books) == [(first, Decimal(11))]
    assert usd(books)["demand_charge"] == 110
    assert usd(books)["energy_charge"] == Decimal("2.7")


def test_a_ratchet_of_an_old_month_moves_the_later_ones(books_of: Make) -> None:
    # Hartselle GSA-2 bills at least a share of the highest peak of the twelve months before.
    text = PLAIN.replace("{usd_per_kwh: 0.1, demand_usd_per_kw: 10}", "Hartselle GSA-2").replace(
        "America/Los_Angeles", "America/Chicago"
    )
    books = books_of(text)
    tariff = books.fleet.sites["dc"].tariff
    assert isinstance(tariff, str)
    found = catalog.tariff(tariff)
    july, august = datetime(2026, 7, 10, 20, tzinfo=UTC), datetime(2026, 8, 10, 20, tzinfo=UTC)
    for hour, kwh in ((july, 400.0), (august, 60.0)):
        told(books, hour, "it_energy_kwh", kwh, "node/pdu")
        books.close([hour])
    told(books, july + HOUR, "it_energy_kwh", 600, "node/late")
    books.close([july + HOUR])
    months = months_of(books.fleet.sites["dc"], july, august + HOUR)
    hours = hours_between(months[0][0], months[-1][1])
    load = np.zeros(len(hours))
    for hour, kwh in ((july, 400.0), (july + HOUR, 600.0), (august, 60.0)):
        load[int((hour - months[0][0]) / HOUR)] = kwh
    by_hand = bill(found, hours, load, prorate=False)
    assert float(usd(books)["demand_charge"]) == pytest.approx(sum(by_hand.demand_usd.values()), abs=1e-6)
    assert float(usd(books, pool="owned")["energy_charge"]) == pytest.approx(by_hand.energy_usd, abs=1e-6)


def test_tiers_are_those_of_the_whole_month(books_of: Make) -> None:
    text = PLAIN.replace("{usd_per_kwh: 0.1, demand_usd_per_kw: 10}", "Hartselle GSA-2").replace(
        "America/Los_Angeles", "America/Chicago"
    )
    books = books_of(text)
    found = catalog.tariff("Hartselle GSA-2")
    assert found.tiers > 1
    hours = [START + n * HOUR for n in range(4)]
    for hour in hours:
        told(books, hour, "it_energy_kwh", 9000, "node/pdu")
    for hour in reversed(hours):  # whatever the order of closing
        books.close([hour])
    month = months_of(books.fleet.sites["dc"], START, START + HOUR)[0]
    span = hours_between(*month)
    load = np.zeros(len(span))
    for hour in hours:
        load[int((hour - month[0]) / HOUR)] = 9000.0
    by_hand = bill(found, span, load, prorate=False)
    assert float(usd(books, pool="owned")["energy_charge"]) == pytest.approx(by_hand.energy_usd, abs=1e-6)
    rows = books.ledger.usage("meter", where={"pool": "owned"}).to_pylist()
    by_tier = {r["meter"]: r["quantity"] for r in rows if r["meter"].startswith("energy_kwh")}
    assert len(by_tier) > 1
    assert sum(by_tier.values()) == 36_000


def test_hours_without_a_meter_are_paid_for_too(books_of: Make) -> None:
    books = books_of(PLAIN)
    books.close_due(START)
    done = books.close_due(START + 5 * HOUR + timedelta(minutes=30))
    assert len(done.hours) == 5
    assert usd(books)["capital"] == 10
    assert books.closed_until == START + 5 * HOUR
    assert not books.due(START + 5 * HOUR)


def every_row(books: Books) -> list[dict[str, object]]:
    """The costs of all hours, in order."""
    return books.ledger.cost("hour", "pool", "tenant", "phase", "component").to_pylist()


def test_an_event_of_before_the_first_close_books_every_hour_since(books_of: Make) -> None:
    """The service began, then one event came of four hours ago: what is owned was held in all four."""
    books = books_of(PLAIN)
    now = START + 6 * HOUR
    assert books.close_due(now).hours == ()
    told(books, START + 2 * HOUR, "output_tokens", 5, "usage/gw")
    assert books.due(now) == [START + n * HOUR for n in range(2, 6)]
    assert set(books.close_due(now).hours) == {START + n * HOUR for n in range(2, 6)}
    assert usd(books)["capital"] == 4 * 2
    idle = books.ledger.usage_rows({"tenant": "(idle)", "meter": "gpu_hours"}).to_pylist()
    assert {(r["hour"], r["quantity"], r["basis"]) for r in idle} == {
        (START + n * HOUR, 2, "assumed:unseen") for n in (3, 4, 5)
    }
    assert not books.due(now)
    # Still earlier: the hours between are booked as well, those that are booked are not booked again.
    told(books, START, "output_tokens", 5, "usage/gw")
    assert books.due(now) == [START, START + HOUR]
    books.close_due(now)
    assert usd(books)["capital"] == 6 * 2
    before = every_row(books)
    books.close(hours_in(START, now))
    assert every_row(books) == before
    # A late event between them closes its own hour alone.
    told(books, START + HOUR, "output_tokens", 7, "usage/gw")
    assert books.close_due(now).hours == (START + HOUR,)
    assert usd(books)["capital"] == 6 * 2


def test_hours_without_records_are_closed_after_a_restart_and_days_of_rest(books_of: Make) -> None:
    books = books_of(PLAIN)
    books.close_due(START)
    told(books, START - 30 * HOUR, "output_tokens", 5, "usage/gw")
    books.shut()  # before it could close them
    again = books_of(PLAIN)
    later = START + 50 * HOUR
    assert len(again.close_due(later).hours) == 80
    assert usd(again)["capital"] == 80 * 2
    again.shut()
    third = books_of(PLAIN)
    assert not third.due(later)
    assert (third.closed_until, third.first_hour()) == (later, START - 30 * HOUR)


def test_old_hours_are_caught_up_on_by_and_by(books_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest first, a bounded number at a time; what is over meanwhile is closed at once."""
    monkeypatch.setattr(module, "CATCH_UP_HOURS", 10)
    books = books_of(PLAIN)
    books.close_due(START)
    told(books, START - 25 * HOUR, "output_tokens", 5, "usage/gw")
    closed = [set(books.close_due(START + n * HOUR).hours) for n in range(5)]
    assert [len(hours) for hours in closed] == [10, 11, 6, 1, 1]
    assert min(closed[0]) == START - 10 * HOUR
    assert START in closed[1]
    assert not books.due(START + 4 * HOUR)
    assert usd(books)["capital"] == 29 * 2


def test_hours_of_an_api_alone_are_not_closed_again_and_again(books_of: Make) -> None:
    """They leave no rows that would tell that they were closed."""
    books = books_of("pools: {api: {price: {term: api, input_usd_per_mtok: 3, output_usd_per_mtok: 15}}}")
    books.close_due(START)
    told(books, START - 9 * HOUR, "output_tokens", 1_000_000, "usage/gw", pool="api")
    assert len(books.close_due(START).hours) == 9
    assert not books.due(START)
    assert usd(books) == {"api": 15}


def test_the_order_in_which_old_hours_close_changes_no_bill(books_of: Make) -> None:
    """Peaks, ratchets and tiers of months that are caught up on, and of the same closed from the first on."""
    text = PLAIN.replace("{usd_per_kwh: 0.1, demand_usd_per_kw: 10}", "Hartselle GSA-2").replace(
        "America/Los_Angeles", "America/Chicago"
    )
    now = datetime(2026, 8, 3, tzinfo=UTC)
    found = []
    for folder, caught_up in (("late", True), ("first", False)):
        books = books_of(text, folder)
        if caught_up:
            books.close_due(now)
        for days, kwh in ((40, 600.0), (10, 60.0), (0.1, 80.0)):
            hour = (now - timedelta(days=days)).replace(minute=0, second=0, microsecond=0)
            told(books, hour, "it_energy_kwh", kwh, "node/pdu")
        if caught_up:
            while books.due(now):
                books.close_due(now)
        else:
            first = books.first_hour()
            assert first is not None
            books.close(hours_in(first, now))
        found.append(every_row(books))
    assert found[0] == found[1]
    assert {row["component"] for row in found[0]} >= {"demand_charge", "energy_charge", "capital"}


def test_old_hours_that_have_no_price_hinder_no_others(books_of: Make) -> None:
    books = books_of(
        PLAIN.replace(
            "{term: on_demand, usd_per_gpu_hour: 3}", "{term: on_demand, provider: lambda}"
        ).replace(
            "gpu: L4, site: dc, price: {term: on_demand", "gpu: H100-SXM, site: dc, price: {term: on_demand"
        )
    )
    now = datetime(2026, 10, 2, tzinfo=UTC)
    books.close_due(now)
    told(books, datetime(2015, 1, 1, tzinfo=UTC), "output_tokens", 5, "usage/gw")
    # Lambda's first price is of 2026-09-20, and a peak is priced with its month: October is the first to close.
    assert len(books.close_due(now).hours) == 17
    assert books.stuck.startswith(
        "hours up to 2026-10-01 06:00 UTC cannot be closed: no on_demand price of H100"
    )
    assert usd(books)["capital"] == 17 * 2
    assert books.close_due(now + HOUR).hours == (now,)


def test_days_that_are_no_longer_kept_hinder_no_close(books_of: Make) -> None:
    books = books_of(PLAIN)
    told(books, START - 48 * HOUR, "output_tokens", 5, "usage/gw")
    books.close_due(START)
    assert usd(books)["capital"] == 48 * 2
    books.tidy(START, keep_days=1)
    assert str(books.kept_from) == "2026-11-23"
    told(books, START - 47 * HOUR, "output_tokens", 5, "usage/file")  # imported: nobody refused it
    told(books, START - 72 * HOUR, "output_tokens", 5, "usage/file")
    assert books.close_due(START + HOUR).hours == (START,)
    assert books.too_late() == [START - 72 * HOUR, START - 47 * HOUR]
    assert usd(books)["capital"] == 49 * 2


def test_hours_closed_by_hand_are_known_as_closed(books_of: Make) -> None:
    books = books_of(PLAIN)
    told(books, START, "output_tokens", 5, "usage/gw")
    now = START + 4 * HOUR + timedelta(minutes=20)
    books.close_span(hours_in(START, START + 2 * HOUR), now)
    assert books.closed_until == books.reached == START + 2 * HOUR
    assert books.due(now) == [START + 2 * HOUR, START + 3 * HOUR]
    books.close_span(hours_in(START + 2 * HOUR, now), now)  # the running hour too, which is not over
    assert books.closed_until == START + 4 * HOUR
    books.close_span(hours_in(START, START + HOUR), now)
    assert books.closed_until == START + 4 * HOUR
    books.close_span([START + 6 * HOUR], START + 9 * HOUR)  # not joined to the others
    assert books.closed_until == START + 4 * HOUR


def test_books_closed_before_that_was_remembered_say_how_far_they_are(books_of: Make) -> None:
    books = books_of(PLAIN)
    assert books.reached is None
    books.close([START, START + HOUR])
    assert books.closed_until is None
    assert books.reached == START + 2 * HOUR


def test_a_silent_exporter_sets_no_peak(books_of: Make) -> None:
    """dcgm-exporter is down for five hours of steady 1 kW: no hour of the month was above it, and none is billed so."""
    books = books_of(PLAIN)
    target, state = prometheus.Target("d", "owned"), meter.State(0.0)
    first = START.timestamp() - 1
    for seconds in (*range(0, 3600, 60), *range(6 * 3600, 7 * 3600 + 60, 60)):
        text = f'DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{{gpu="0"}} {seconds * 1e6}\n'
        rows, state = prometheus.read(text, target, state, now_s=first + seconds)
        books.journal.append(rows)
    books.close_due(START + 7 * HOUR)
    boards = books.ledger.usage("hour", where={"meter": "gpu_energy_kwh"}).to_pylist()
    assert [float(r["quantity"]) for r in boards if r["hour"] >= START] == pytest.approx([1.0] * 7, abs=1e-3)
    power = books.ledger.usage("hour", where={"meter": "energy_kwh"}).to_pylist()
    (peak,) = peaks(books)
    assert peak[1] == max(r["quantity"] for r in power)


def test_an_hour_nobody_heard_costs_what_is_owned_and_says_that_its_use_is_unknown(books_of: Make) -> None:
    """The engines told before and after, nothing did between: owned GPUs cost all the same, their use is not made up,
    and nobody knows what was rented."""
    books = books_of(PLAIN)
    for hour in (START, START + 2 * HOUR):
        for pool in ("owned", "cloud"):
            told(books, hour, "seen_seconds", 3600, f"engine/{pool}", pool=pool)
            told(books, hour, "held_gpus", 3600, f"engine/{pool}", pool=pool)
    hours = hours_in(START - 2 * HOUR, START + 3 * HOUR)
    assert books.metered(hours) == hours[2:]  # before the first word nobody knows what was owned
    books.close(books.metered(hours))
    held = [
        r for r in books.ledger.usage_rows({"meter": "gpu_hours"}).to_pylist() if r["hour"] == START + HOUR
    ]
    assert [(r["pool"], r["tenant"], r["phase"], r["basis"], r["quantity"]) for r in held] == [
        ("owned", "(idle)", "idle", "assumed:unseen", 2)
    ]
    assert usd(books, pool="owned")["capital"] == 6
    assert usd(books, pool="cloud") == {"rent": 6}


def test_closing_survives_a_restart(books_of: Make, tmp_path: Path) -> None:
    books = books_of(PLAIN)
    told(books, START, "output_tokens", 100, "engine/e")
    books.close_due(START + HOUR)
    books.shut()
    again = books_of(PLAIN)
    assert again.closed_until == START + HOUR
    assert not again.due(START + HOUR)
    told(again, START, "output_tokens", 1, "engine/e")
    assert again.due(START + HOUR) == [START]
    with pytest.raises(InputError, match="another process"):
        open_books(again.fleet, tmp_path / "data")


def test_unpriced_usage_keeps_its_own_hour_open_alone(books_of: Make) -> None:
    books = books_of(PLAIN + "  api: {price: {term: api, input_usd_per_mtok: 3, output_usd_per_mtok: 15}}\n")
    told(books, START, "output_tokens", 1_000_000, "usage/e", pool="api")
    told(books, START + HOUR, "training_tokens", 5, "training/run", pool="api")  # sold by nobody
    done = books.close_due(START + 3 * HOUR)
    assert list(done.unpriced) == [START + HOUR]
    assert "no rate for training_tokens in pool 'api'" in done.unpriced[START + HOUR]
    assert set(done.hours) == {START, START + 2 * HOUR}
    assert usd(books)["api"] == 15
    assert books.ledger.cost("hour", where={"pool": "owned", "component": "capital"}).num_rows == 2
    assert books.due(START + 3 * HOUR) == [START + HOUR]
    again = books.close_due(START + 3 * HOUR)
    assert list(again.unpriced) == [START + HOUR]


@pytest.mark.parametrize("name", ["input_tokens:above200000", "egress_gb", "lost_training_tokens"])
def test_any_meter_says_since_when_one_knows(books_of: Make, name: str) -> None:
    books = books_of(PLAIN)

    def booked(hour: datetime, meter_name: str) -> None:
        rows = usage_rows(
            hours_between(hour, hour + HOUR), {("input", meter_name): 5.0},
            book="actual", pool="api", model="m", tenant="t", basis="measured",
        )  # fmt: skip
        books.ledger.add_usage(rows)

    booked(START - 9 * HOUR, "peak_kw:flat")  # at its month's first hour, which nobody metered
    assert books.first_hour() is None
    assert books.metered([START]) == []
    booked(START, name)
    assert books.first_hour() == START
    assert books.metered([START - HOUR, START]) == [START]
    told(books, START - HOUR, name, 5, "usage/late", pool="api")  # a record not yet closed
    assert books.first_hour() == START - HOUR


def test_overheads_of_a_pool_go_to_who_held_it(books_of: Make) -> None:
    books = books_of(
        PLAIN.replace("count: 2", "count: 2\n    overheads: {network_usd_per_month: 730}").replace(
            "pue: 1.0", "pue: 1.0, overheads: {staff_fte: 1, usd_per_fte_year: 8760}"
        )
    )
    told(books, START, "output_tokens", 100, "engine/e")
    books.close([START])
    costs = books.ledger.cost("pool", "component", where={"book": "actual"}).to_pylist()
    found = {(r["pool"], r["component"]): r["cost_usd"] for r in costs}
    assert found["owned", "network"] == 1
    assert found["(site:dc)", "staff"] == 1
    site = books.ledger.cost("tenant", "phase", where={"pool": "(site:dc)", "component": "staff"}).to_pylist()
    assert [(r["tenant"], r["phase"]) for r in site] == [("(idle)", "idle")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("changes: [{from: 2026-12-01, pool: owend, count: 3}]", "owned"),
        ("changes: [{from: 2026-12-01, count: 3}]", "one pool or one site"),
        ("changes: [{from: 2026-12-01, pool: owned}]", "price or count"),
        ("changes: [{from: 2026-12-01, site: dc, count: 3}]", "gives tariff"),
        (
            "changes: [{from: 2026-12-01, pool: cloud, price: {term: reserved, usd_per_gpu_hour: 1}}]",
            "add a pool",
        ),
        ('sources: {scrape: [{url: "http://h/m", pool: nope}]}', "the fleet has"),
        ('sources: {scrape: [{url: "ftp://h/m", pool: owned}]}', "pattern"),
        ("sources: {written: [{instance: a, pool: owned}, {instance: a, pool: owned}]}", "given twice"),
    ],
)
def test_a_fleet_that_cannot_run_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(PLAIN + text + "\n")
    with pytest.raises(ScenarioError, match=says):
        load_fleet(path)


def test_what_was_paid_is_written_and_never_looked_up(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(
        PLAIN.replace("usd_per_gpu: 35040, ", "provider: nvidia-dgx, ").replace("gpu: L4", "gpu: H100-SXM")
    )
    with pytest.raises(ScenarioError, match="write usd_per_gpu"):
        load_fleet(path)


def test_windows_are_full_hours() -> None:
    assert hours_in(START + timedelta(minutes=20), START + timedelta(minutes=70)) == [START, START + HOUR]
    with pytest.raises(InputError, match="no zone"):
        hours_in(datetime(2026, 1, 1), START)  # noqa: DTZ001
    with pytest.raises(InputError, match="not after"):
        hours_in(START, START)
    with pytest.raises(InputError, match="hours at once"):
        hours_in(datetime(120, 1, 1, tzinfo=UTC), datetime(9554, 1, 1, tzinfo=UTC))


def test_terms_are_asked_with_a_zone(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(PLAIN)
    fleet: RunningFleet = load_fleet(path)
    with pytest.raises(InputError, match="no time zone"):
        fleet.at(datetime(2026, 1, 1))  # noqa: DTZ001


def test_past_days_are_exported_and_old_ones_cannot_be_closed_again(books_of: Make, tmp_path: Path) -> None:
    books = books_of(PLAIN)
    hours = [START, START + 24 * HOUR]
    for hour in hours:
        told(books, hour, "output_tokens", 100, "engine/e")
    books.close(hours)
    before = books.ledger.cost("hour", "pool", "component").to_pylist()
    books.tidy(START + 24 * HOUR, keep_days=30)
    days = tmp_path / "data" / "journal" / "days"
    assert [p.name for p in days.iterdir()] == ["2026-11-24.parquet"]
    told(books, START, "output_tokens", 7, "engine/late")
    books.close([START])
    tokens = books.ledger.usage("hour", where={"meter": "output_tokens"}, end=START + HOUR).to_pylist()
    assert tokens == [{"hour": START, "quantity": 107}]
    books.tidy(START + 25 * HOUR, keep_days=1)
    assert books.kept_from is None
    books.tidy(START + 48 * HOUR, keep_days=1)
    assert [p.name for p in days.iterdir()] == ["2026-11-25.parquet"]
    assert str(books.kept_from) == "2026-11-25"
    with pytest.raises(InputError, match="records before 2026-11-25 are no longer kept"):
        books.close([START])
    assert books.ledger.cost("hour", "pool", "component").to_pylist() == before
    books.close([START + 24 * HOUR])
    books.shut()
    assert str(books_of(PLAIN).kept_from) == "2026-11-25"
