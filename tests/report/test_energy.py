"""Energy of a window: the ledger's sums at each boundary, the tariff of the site's own day, the peak and its cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pertoken.fleet import load_fleet
from pertoken.report.books import Books, open_books
from pertoken.report.energy import BOUNDARIES, SiteFacts, energy_of, site_facts
from tests.report.test_so_far import FLEET, HOUR, START, scraped

FLAT = "{usd_per_kwh: 0.1, demand_usd_per_kw: 10}"
TEXT = FLEET.replace("pue: 1.0", "pue: 1.25\n    carbon_g_per_kwh: 300")


@pytest.fixture
def books_of(tmp_path: Path) -> Iterator[Any]:
    opened: list[Books] = []

    def make(text: str = TEXT, kwh: tuple[float, ...] = (0.02, 0.05, 0.01)) -> Books:
        path = tmp_path / "fleet.yaml"
        path.write_text(text)
        books = open_books(load_fleet(path), tmp_path / "data")
        opened.append(books)
        for back, per_minute in enumerate(kwh, 1):
            scraped(books, START - back * HOUR, 60, kwh=per_minute)
        books.close_due(START)
        return books

    yield make
    for books in opened:
        books.shut()


Make = Callable[..., Books]


def facts(books: Books, now: datetime = START) -> SiteFacts:
    [found] = site_facts(books.ledger, books.fleet, books.so_far(now), now)
    return found


@pytest.mark.parametrize("where", [{}, {"pool": ["owned"]}, {"phase": ["output"]}, {"model": ["m"]}])
def test_sums_are_the_ledgers(books_of: Make, where: dict[str, list[str]]) -> None:
    books = books_of()
    found = energy_of(books.ledger, where, None, START)
    for boundary in BOUNDARIES:
        [row] = books.ledger.usage(where={"book": "actual", "meter": boundary, **where}).to_pylist()
        assert found.kwh(boundary) == pytest.approx(float(row["quantity"]), rel=1e-12)
    assert sum(kwh for _, _, kwh in found.series) == pytest.approx(found.kwh(), rel=1e-12)
    assert found.step == "hour"


def test_joules_are_the_metrics_and_boundaries_differ_by_the_pue(books_of: Make) -> None:
    books = books_of()
    found = energy_of(books.ledger, {}, None, None)
    names = {"output": "output", "input": "input", "input + output": "total"}
    for kind, name in names.items():
        metric = f"joule_per_token_{name}"
        [row] = books.ledger.metric(metric, where={"book": "actual"}).to_pylist()
        assert found.joule_per_token(kind) == pytest.approx(row[metric], rel=1e-12)
        plug, board = (found.joule_per_token(kind, b) for b in ("it_energy_kwh", "gpu_energy_kwh"))
        assert plug is not None
        assert board is not None
        assert found.joule_per_token(kind) == pytest.approx(1.25 * plug, rel=1e-5)
        assert board < plug
    assert found.pue() == pytest.approx(1.25, rel=1e-6)
    assert found.joule_per_token("retained training") is None
    kwh = found.kwh()
    assert kwh is not None
    assert found.co2e_kg == pytest.approx(0.3 * kwh, rel=1e-6)


def test_pools_whose_energy_nobody_measured_are_named(books_of: Make) -> None:
    books = books_of()
    found = energy_of(books.ledger, {}, None, None)
    # The API's tokens and the rented pool's count in J per token, and no energy of theirs is known.
    for boundary in BOUNDARIES:
        assert found.unmeasured(boundary) == ["api", "cloud"]
    assert energy_of(books.ledger, {"pool": ["owned"]}, None, None).unmeasured("energy_kwh") == []


def test_a_tenant_has_its_own_alone(books_of: Make) -> None:
    books = books_of()
    assert energy_of(books.ledger, {"tenant": ["t"]}, None, None).kwh() is None
    mine = energy_of(books.ledger, {"tenant": [""]}, None, None)
    idle = energy_of(books.ledger, {"tenant": ["(idle)"]}, None, None)
    whole = energy_of(books.ledger, {}, None, None).kwh()
    assert (mine.kwh() or 0) + (idle.kwh() or 0) == pytest.approx(whole)


def test_a_long_window_is_drawn_by_day(books_of: Make) -> None:
    books = books_of()
    long_ago = START - timedelta(days=40)
    scraped(books, long_ago, 60)
    books.close([long_ago])
    found = energy_of(books.ledger, {}, None, None)
    assert found.step == "day"
    assert [at for at, _, _ in found.series] == [
        datetime(2026, 10, 15, tzinfo=UTC), datetime(2026, 11, 24, tzinfo=UTC)
    ]  # fmt: skip
    assert sum(kwh for _, _, kwh in found.series) == pytest.approx(found.kwh())


def test_the_peak_is_the_highest_hour_and_costs_what_is_booked(books_of: Make) -> None:
    books = books_of()
    found = facts(books)
    [peak] = found.peaks
    assert (peak.charge, peak.at, peak.local) == ("flat", START - 2 * HOUR, "2026-11-23 22:00")
    [kwh] = books.ledger.usage(
        where={"meter": "energy_kwh", "book": "actual"}, start=START - 2 * HOUR, end=START - HOUR
    )["quantity"].to_pylist()
    assert peak.metered_kw == peak.billed_kw == float(str(kwh))
    [usd] = books.ledger.cost(where={"component": "demand_charge"})["cost_usd"].to_pylist()
    assert peak.cost_usd == pytest.approx(float(str(usd)), abs=1e-9)
    assert (peak.more_kw, peak.more_usd, found.month) == (0.0, 0.0, "2026-11")
    # An hour that already draws more raises it, and says by how much.
    scraped(books, START, 40, kwh=0.2)
    now = START + timedelta(minutes=40)
    [higher] = facts(books, now).peaks
    assert higher.at == START
    assert higher.billed_kw == peak.billed_kw
    assert higher.metered_kw == pytest.approx(higher.billed_kw + higher.more_kw)
    assert higher.more_usd == pytest.approx(10 * higher.more_kw)
    assert higher.more_kw > 0


def test_bands_and_tiers_of_a_real_tariff(books_of: Make) -> None:
    books = books_of(TEXT.replace(FLAT, "SMUD CI-TOD4"))
    found = facts(books)
    assert len(found.prices) == 24
    assert [p.local for p in found.prices] == [f"{hour:02}:00" for hour in range(24)]
    assert [p.at for p in found.prices if p.now] == [START]
    by_local = {p.local: (p.band, round(p.usd_per_kwh, 4)) for p in found.prices}
    # A winter weekday: cheap from nine, dear from sixteen.
    assert by_local["09:00"] == ("winter-saver", 0.0768)
    assert by_local["16:00"][0] == "winter-peak"
    assert by_local["16:00"][1] > by_local["00:00"][1] > by_local["09:00"][1]
    usd = books.ledger.cost(where={"component": "demand_charge"})["cost_usd"].to_pylist()
    assert sum(p.cost_usd for p in found.peaks) == pytest.approx(float(str(usd[0])), abs=1e-6)


def test_a_day_of_a_clock_change_has_its_hours(books_of: Make) -> None:
    books = books_of()
    autumn = datetime(2026, 11, 1, 20, tzinfo=UTC)
    prices = site_facts(books.ledger, books.fleet, books.so_far(autumn), autumn)[0].prices
    assert len(prices) == 25
    assert [p.local for p in prices].count("01:00") == 2


def test_a_site_without_a_tariff_or_whose_prices_end(books_of: Make, tmp_path: Path) -> None:
    hourly = tmp_path / "prices.csv"
    hourly.write_text("hour,usd_per_kwh\n2026-11-24T07:00Z,0.1\n")
    text = (
        TEXT.replace(FLAT, FLAT)
        + "  rented: {gpu: L4, site: lab, price: {term: on_demand, usd_per_gpu_hour: 1}}\n"
    )
    text = text.replace("sites:\n", "sites:\n  lab: {timezone: UTC, pue: 1.1}\n")
    books = books_of(text)
    lab, dc = site_facts(books.ledger, books.fleet, books.so_far(START), START)
    assert (lab.name, lab.tariff, lab.prices, lab.peaks, lab.problem) == ("lab", "", (), (), "")
    assert dc.tariff
