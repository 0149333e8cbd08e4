"""The figures of the first page: the ledger's own, wherever their sums come from."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pertoken.fleet import load_fleet
from pertoken.report._written import shown
from pertoken.report.books import Books, open_books
from pertoken.report.now import TILES, Day, Sums, Tile, closed_day, lately_sums, so_far_sums
from tests.report.test_so_far import FLEET, HOUR, START, record, scraped

BY_NAME = {tile.name: tile for tile in TILES}


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET)
    with open_books(load_fleet(path), tmp_path / "data") as found:
        yield found


@pytest.fixture
def day(books: Books) -> Day:
    for back in (3, 1):
        scraped(books, START - back * HOUR, 60, kwh=0.01 * back)
    books.close_due(START)
    return closed_day(books.ledger, {}, START)


def near(value: float | None, tile: Tile) -> Any:
    return None if value is None else pytest.approx(tile.times * value, rel=1e-9)


@pytest.mark.parametrize(
    "where", [{}, {"pool": ["owned"]}, {"tenant": ["t"]}, {"pool": ["api", "cloud"], "model": ["m"]}]
)
def test_every_metric_is_the_ledgers(books: Books, day: Day, where: dict[str, list[str]]) -> None:
    found = closed_day(books.ledger, where, START)
    names = [tile.metric for tile in TILES if tile.metric]
    asked: dict[str, Any] = {"where": {"book": "actual", **where}, "start": found.start, "end": found.end}
    [whole] = books.ledger.metric(*names, **asked).to_pylist()
    by_hour = {r["hour"]: r for r in books.ledger.metric(*names, by=["hour"], **asked).to_pylist()}
    for tile in (t for t in TILES if t.metric):
        assert found.total.value(tile) == near(whole[tile.metric], tile), tile.name
        for hour, value in found.series(tile):
            want = by_hour[hour][tile.metric] if hour in by_hour else None
            assert value == near(want, tile), (tile.name, hour)


def test_rates_are_of_the_hours_that_have_something(day: Day) -> None:
    total = day.total
    assert total.seconds == 3 * 3600  # the one between was metered, and nothing came
    tokens = 2 * (sum(range(51, 111)) + 60 * 1010)
    assert total.value(BY_NAME["output_per_s"]) == pytest.approx(tokens / 10_800)
    # Owned 2 USD, staff and network 1 USD each; in two of them rent of 3 USD and an API's tokens; no demand charge.
    api_usd = 60 * (1000 * 15e-6 + 10 * 3e-6)
    energy_usd = sum(q for (m, _), q in total.usage.items() if m == "energy_kwh") * 0.1
    want_usd = 3 * 4 + 2 * (3 + api_usd) + energy_usd
    assert total.value(BY_NAME["usd_per_hour"]) == pytest.approx(want_usd / 3)
    assert len(day.series(BY_NAME["power_w"])) == 24
    assert [hour for hour, value in day.series(BY_NAME["power_w"]) if value] == [
        START - 3 * HOUR,
        START - HOUR,
    ]


def test_an_hour_in_which_a_tenant_did_nothing_has_gone_by_all_the_same(books: Books, day: Day) -> None:
    for where in ({"tenant": ["t"]}, {"pool": ["api"]}):
        found = closed_day(books.ledger, where, START, until=books.closed_until)
        rows = books.ledger.cost(where={"book": "actual", **where}, start=found.start, end=START).to_pylist()
        assert found.total.seconds == day.total.seconds == 3 * 3600
        assert found.total.value(BY_NAME["usd_per_hour"]) == pytest.approx(float(rows[0]["cost_usd"]) / 3)
    # An hour that is not closed yet has not told anything: it is no hour of nothing.
    late = closed_day(books.ledger, {"tenant": ["t"]}, START + 2 * HOUR, until=books.closed_until)
    assert late.total.seconds == 3 * 3600


def test_an_hour_without_a_price_counts_in_no_cost(books: Books) -> None:
    scraped(books, START - 2 * HOUR, 60)
    scraped(books, START - HOUR, 60)
    books.journal.append(record(START - HOUR, "training/run", "api", training_tokens=5))
    books.close_due(START)
    day = closed_day(books.ledger, {}, START, books.unpriced)
    assert day.unpriced == (START - HOUR,)
    before = closed_day(books.ledger, {}, START - HOUR)
    for name in ("usd_per_mtok_output", "usd_per_hour", "output_per_s"):
        assert day.total.value(BY_NAME[name]) == before.total.value(BY_NAME[name])
    assert dict(day.series(BY_NAME["usd_per_hour"]))[START - HOUR] is None
    assert dict(day.series(BY_NAME["output_per_s"]))[START - HOUR] is not None


def test_the_last_minute_and_the_hour_so_far_agree_on_a_steady_load(books: Books) -> None:
    scraped(books, START, 30)
    now = START + timedelta(minutes=30)
    minute = lately_sums(books.lately(now), {})
    so_far = books.so_far(now)
    hour = so_far_sums(so_far.ledger, {}, START, 1800.0, bool(so_far.unpriced))
    assert not minute.unpriced
    for name in ("power_w", "usd_per_hour", "utilisation", "input_per_s"):
        assert minute.value(BY_NAME[name]) == pytest.approx(hour.value(BY_NAME[name]), rel=1e-3), name


def test_a_filter_holds_for_the_last_minute(books: Books) -> None:
    scraped(books, START, 10)
    lately = books.lately(START + timedelta(minutes=10))
    mine = lately_sums(lately, {"tenant": ["t"]})
    assert mine.value(BY_NAME["output_per_s"]) == pytest.approx(1000 / 60)
    assert {component for _, component in mine.cost_usd} == {"api"}
    assert lately_sums(lately, {"tenant": ["nobody"]}).value(BY_NAME["output_per_s"]) is None
    assert lately_sums(lately, {"pool": ["cloud"], "model": ["m"]}).value(BY_NAME["output_per_s"]) == 10 / 60


def test_silence_is_known_from_idleness(books: Books) -> None:
    now = START + timedelta(minutes=5)
    silent = books.lately(now)
    assert not silent.heard
    sums = lately_sums(silent, {})
    assert not sums.told
    assert sums.value(BY_NAME["utilisation"]) == 0  # its GPUs are held all the same
    books.journal.append(
        record(now - timedelta(seconds=5), "engine/e", "owned", seen_seconds=15, running_seconds=0)
    )
    assert books.lately(now).heard


def test_usage_without_a_price_has_no_live_cost(books: Books) -> None:
    scraped(books, START, 5)
    moment = START + timedelta(minutes=4, seconds=30)
    books.journal.append(record(moment, "training/run", "api", training_tokens=5))
    lately = books.lately(START + timedelta(minutes=5))
    assert lately.unpriced == "no rate for training_tokens in pool 'api'"
    sums = lately_sums(lately, {})
    assert sums.value(BY_NAME["usd_per_hour"]) is sums.value(BY_NAME["usd_per_mtok_total"]) is None
    assert sums.value(BY_NAME["output_per_s"]) is not None


def test_what_was_not_metered_is_a_dash() -> None:
    assert {shown(Sums().value(tile)) for tile in TILES} == {"–"}
    assert shown(datetime(2026, 1, 1, tzinfo=UTC).hour * 1.0) == "0"
