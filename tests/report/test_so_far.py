"""The hour so far: what it adds to the books is what the close will book, part by part, and it writes nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from pertoken import meter
from pertoken.errors import InputError
from pertoken.report.books import Books
from pertoken.report.so_far import Lately
from pertoken.tables import QUANTITY

HOUR = timedelta(hours=1)
START = datetime(2026, 11, 24, 8, tzinfo=UTC)
FLEET = """
sites:
  dc:
    timezone: America/Los_Angeles
    pue: 1.0
    tariff: {usd_per_kwh: 0.1, demand_usd_per_kw: 10}
    overheads: {staff_fte: 1, usd_per_fte_year: 8760}
pools:
  owned:
    gpu: L4
    site: dc
    count: 2
    overheads: {network_usd_per_month: 730}
    price: {term: owned, usd_per_gpu: 35040, life_years: 4, wacc_fraction: 0, residual_fraction: 0,
            method: straight-line}
  cloud: {gpu: L4, site: dc, price: {term: on_demand, usd_per_gpu_hour: 3}}
  api: {price: {term: api, input_usd_per_mtok: 3, output_usd_per_mtok: 15}}
"""


Make = Callable[..., Books]


def record(moment: datetime, source: str, pool: str, **quantities: float) -> pa.Table:
    """Records at one time."""
    n = len(quantities)
    columns = {
        "ts": [moment.timestamp()] * n, "source": source, "key": [f"{moment.isoformat()} {m}" for m in quantities],
        "pool": pool, "model": "m", "tenant": "t" if source.startswith("usage") else "",
        "meter": list(quantities), "quantity": [float(q) for q in quantities.values()],
    }  # fmt: skip
    return meter.records(columns, n)


def scraped(
    books: Books, hour: datetime, minutes: int, kwh: float = 0.01, gpus: float = 0.0, blocks: int = 2
) -> None:
    """An engine, its boards and an API's events, once a minute, journalled in so many blocks."""
    tables: list[pa.Table] = []
    for minute in range(1, minutes + 1):
        moment = hour + timedelta(minutes=minute) - timedelta(milliseconds=1)
        held = {"held_gpus": 60 * gpus} if gpus else {}
        engine = record(
            moment, "engine/e", "owned", prompt_tokens=100, output_tokens=50 + minute, requests=1,
            seen_seconds=60, running_seconds=30, prefill_seconds=5, decode_seconds=20, **held,
        )  # fmt: skip
        tables += [
            engine,
            record(moment, "device/d", "owned", gpu_energy_kwh=kwh, gpu_seen_seconds=120),
            record(moment, "engine/c", "cloud", output_tokens=10, seen_seconds=60, held_gpus=60),
            record(moment, "usage/x", "api", output_tokens=1000, input_tokens=10),
        ]
    step = max(1, len(tables) // blocks)
    for at in range(0, len(tables), step):
        books.journal.append(meter.concat(tables[at : at + step]))


def rows(books: Books, so_far: bool, now: datetime) -> dict[str, dict[Any, Decimal]]:
    """Usage and cost of all the books, by every dimension; with the hour so far in place of its own hour."""
    parts = [books.ledger]
    end = None
    if so_far:
        found = books.so_far(now, 0.0)
        assert found.unpriced == ""
        parts.append(found.ledger)
        end = found.hour
    sums: dict[str, dict[Any, Decimal]] = {"usage": {}, "cost": {}}
    for at, ledger in enumerate(parts):
        last = end if at == 0 else None
        usage = ledger.usage("hour", "pool", "model", "tenant", "phase", "meter", end=last).to_pylist()
        cost = ledger.cost("hour", "pool", "model", "tenant", "phase", "component", end=last).to_pylist()
        for name, found_rows, column in (("usage", usage, "quantity"), ("cost", cost, "cost_usd")):
            for row in found_rows:
                value = row.pop(column)
                key = tuple(row.values())
                sums[name][key] = sums[name].get(key, Decimal(0)) + value
    return {name: {k: v for k, v in found.items() if v} for name, found in sums.items()}


@pytest.mark.parametrize("gpus", [0.0, 1.0])
@pytest.mark.parametrize("tariff", ["{usd_per_kwh: 0.1, demand_usd_per_kw: 10}", "Hartselle GSA-2"])
def test_at_its_end_it_is_what_the_close_books(books_of: Make, gpus: float, tariff: str) -> None:
    books = books_of(FLEET.replace("{usd_per_kwh: 0.1, demand_usd_per_kw: 10}", tariff))
    for back, kwh in ((2, 0.02), (1, 0.005)):
        scraped(books, START - back * HOUR, 60, kwh=kwh, gpus=gpus)
    books.close_due(START)
    scraped(books, START, 60, kwh=0.03, gpus=gpus)
    end = START + HOUR - timedelta(microseconds=1)
    foreseen = rows(books, True, end)
    books.close_due(START + HOUR)
    booked = rows(books, False, end)
    assert foreseen.keys() == booked.keys()
    for name in booked:
        assert foreseen[name].keys() == booked[name].keys()
        # A microsecond of the hour is still to come: a millionth of anything, at most.
        for key, value in booked[name].items():
            assert abs(foreseen[name][key] - value) <= max(Decimal("1e-5"), abs(value) * Decimal("1e-5")), key


def test_pools_of_a_fixed_count_hold_the_elapsed_part(books_of: Make) -> None:
    books = books_of(FLEET)
    scraped(books, START, 15)
    found = books.so_far(START + timedelta(minutes=15))
    held = {
        r["pool"]: r["quantity"] for r in found.ledger.usage("pool", where={"meter": "gpu_hours"}).to_pylist()
    }
    assert held == {"owned": Decimal("0.5"), "cloud": Decimal("0.25")}
    assert found.elapsed_fraction == 0.25
    hours = found.ledger.usage("pool", where={"meter": "site_hours"}).to_pylist()
    assert {r["pool"]: r["quantity"] for r in hours if not r["pool"].startswith("(site:dc)")} == {
        "owned": Decimal("0.25")
    }
    costs = {r["component"]: r["cost_usd"] for r in found.ledger.cost("component").to_pylist()}
    assert costs["capital"] == Decimal("0.5")  # 35,040 USD over 4 years is 1 USD an hour
    assert costs["rent"] == Decimal("0.75")
    assert costs["staff"] == costs["network"] == Decimal("0.25")
    assert costs["api"] == 15 * 1000 * Decimal(15) / 10**6 + 15 * 10 * Decimal(3) / 10**6
    [row] = found.ledger.metric("utilisation", where={"pool": "owned"}).to_pylist()
    assert row["utilisation"] == pytest.approx(25 / 60, rel=1e-5)  # the engine's own 25 s of 60


def test_a_peak_counts_by_how_much_the_hour_raises_it(books_of: Make) -> None:
    books = books_of(FLEET)
    scraped(books, START - HOUR, 60, kwh=0.02)
    books.close_due(START)
    where = {"component": "demand_charge"}
    [before] = books.ledger.cost(where=where)["cost_usd"].to_pylist()
    scraped(books, START, 30, kwh=0.02)
    half = books.so_far(START + timedelta(minutes=30))
    assert not half.ledger.cost("hour", where=where).num_rows  # half of the energy, so half of the peak
    scraped(books, START, 60, kwh=0.06)
    now = START + HOUR - timedelta(microseconds=1)
    [more] = books.so_far(now).ledger.cost("hour", where=where).to_pylist()
    assert more["hour"] == datetime(2026, 11, 1, 7, tzinfo=UTC)  # midnight in Los Angeles
    assert more["cost_usd"] > 0
    books.close_due(START + HOUR)
    [after] = books.ledger.cost(where=where)["cost_usd"].to_pylist()
    assert before + more["cost_usd"] == pytest.approx(after, abs=Decimal("1e-4"))


def test_nothing_is_written_and_the_books_do_not_move(books_of: Make) -> None:
    books = books_of(FLEET)
    scraped(books, START, 20)
    marks, due = books.journal.marks, books.due(START + HOUR)
    books.so_far(START + timedelta(minutes=20))
    books.lately(START + timedelta(minutes=20))
    assert books.ledger.usage("hour").num_rows == books.ledger.cost("hour").num_rows == 0
    assert (books.journal.marks, books.due(START + HOUR)) == (marks, due)


def test_only_what_is_new_is_read_and_it_adds_up(books_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    books = books_of(FLEET)
    scraped(books, START, 20)
    books.so_far(START + timedelta(minutes=20))
    read: list[int] = []
    payloads = books.journal._payloads

    def counted(places: list[Any]) -> Any:
        read.append(len(places))
        return payloads(places)

    monkeypatch.setattr(books.journal, "_payloads", counted)
    scraped(books, START, 40)  # the first twenty minutes again: known, so not there a second time
    found = books.so_far(START + timedelta(minutes=40))
    assert sum(read) == 1  # of the two blocks, the first repeats what is known and is not written
    [tokens] = found.ledger.usage(where={"meter": "output_tokens", "pool": "owned"})["quantity"].to_pylist()
    assert tokens == sum(50 + minute for minute in range(1, 41))
    # A new hour begins from nothing, and one that is asked anew after a pause is read whole.
    scraped(books, START + HOUR, 5)
    again = books.so_far(START + HOUR + timedelta(minutes=5))
    assert again.ledger.usage(where={"meter": "output_tokens", "pool": "owned"})["quantity"].to_pylist() == [
        265
    ]
    fresh = Books(books.journal, books.ledger, books.fleet, books.folder)
    anew = fresh.so_far(START + timedelta(minutes=40))
    assert anew.ledger.usage(where={"meter": "output_tokens", "pool": "owned"})["quantity"].to_pylist() == [
        tokens
    ]


def test_an_answer_is_kept_for_a_while(books_of: Make) -> None:
    books = books_of(FLEET)
    now = START + timedelta(minutes=10)
    first = books.so_far(now)
    assert books.so_far(now + timedelta(seconds=1), 60.0) is first
    assert books.so_far(now - timedelta(seconds=1), 60.0) is not first  # the clock stepped back
    assert books.so_far(now + timedelta(minutes=5), 60.0) is not first
    assert books.so_far(START + HOUR + timedelta(seconds=5), 1e6).hour == START + HOUR


def test_many_threads_are_answered_while_one_computes(books_of: Make) -> None:
    books = books_of(FLEET)
    scraped(books, START, 10)
    first = books.so_far(START + timedelta(minutes=10), 0.0)
    growing = books._growing
    with growing._computing:
        assert books.so_far(START + timedelta(minutes=30), 0.0) is first
    answers: list[Decimal] = []

    def ask() -> None:
        for second in range(5):
            found = books.so_far(START + timedelta(minutes=40, seconds=second), 0.0)
            answers.append(
                found.ledger.usage(where={"meter": "output_tokens", "pool": "api"})["quantity"][0].as_py()
            )

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [10_000] * 20


def test_what_has_no_price_is_said_and_costs_nothing(books_of: Make) -> None:
    books = books_of(FLEET)
    books.journal.append(record(START, "training/run", "api", training_tokens=5))
    found = books.so_far(START + timedelta(minutes=1))
    assert "no rate for training_tokens in pool 'api'" in found.unpriced
    assert found.ledger.cost("hour").num_rows == 0
    assert found.ledger.usage("meter", where={"pool": "api"}).num_rows == 1


def test_the_first_instant_of_an_hour_is_empty(books_of: Make) -> None:
    books = books_of(FLEET)
    found = books.so_far(START)
    assert (found.hour, found.elapsed_fraction, found.ledger.usage("hour").num_rows) == (START, 0.0, 0)
    with pytest.raises(InputError, match="no time zone"):
        books.so_far(datetime(2026, 11, 24, 8))  # noqa: DTZ001


def test_the_last_minute_is_attributed_and_priced_at_its_rates(books_of: Make) -> None:
    books = books_of(FLEET)
    scraped(books, START, 30)
    found = books.lately(START + timedelta(minutes=30))
    assert found.seconds == 60
    usage: dict[Any, Decimal] = {}
    for row in found.usage.to_pylist():
        key = row["pool"], row["meter"]
        usage[key] = usage.get(key, Decimal(0)) + row["quantity"]
    assert usage["owned", "output_tokens"] == 80
    assert usage["api", "output_tokens"] == 1000
    assert usage["owned", "gpu_hours"] == pytest.approx(Decimal(2) / 60, abs=Decimal("1e-6"))
    assert usage["cloud", "gpu_hours"] == pytest.approx(Decimal(1) / 60, abs=Decimal("1e-6"))
    usd: dict[str, float] = {}
    for row in found.costs:
        usd[row["component"]] = usd.get(row["component"], 0.0) + row["cost_usd"]
    assert usd["rent"] == pytest.approx(3 / 60, rel=1e-4)
    assert usd["staff"] == pytest.approx(1 / 60, rel=1e-4)
    assert usd["api"] == pytest.approx(1000 * 15e-6 + 10 * 3e-6)
    assert usage["owned", "energy_kwh"] > Decimal("0.01")
    assert found.usage.schema.field("quantity").type == QUANTITY


def tokens_of(found: Lately, pool: str = "api") -> Decimal:
    rows = found.usage.to_pylist()
    return sum(
        (r["quantity"] for r in rows if (r["pool"], r["meter"]) == (pool, "output_tokens")), Decimal(0)
    )


def test_the_last_minute_reaches_over_the_hour(books_of: Make) -> None:
    books = books_of(FLEET)
    scraped(books, START - HOUR, 60)
    now = START + timedelta(seconds=30)
    books.journal.append(record(START + timedelta(seconds=20), "usage/x", "api", output_tokens=7))
    found = books.lately(now)
    assert tokens_of(found) == 1007
    fresh = Books(books.journal, books.ledger, books.fleet, books.folder)
    assert fresh.lately(now).usage.to_pylist() == found.usage.to_pylist()
    # What came late of the hour before is there too.
    late = record(START - timedelta(seconds=2), "usage/x", "api", output_tokens=5)
    books.journal.append(late.set_column(2, "key", pa.array(["late"])))
    assert tokens_of(books.lately(now)) == 1012


def test_a_crowd_is_kept_in_longer_pieces(books_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pertoken.meter._running._MOST_SUMS", 40)
    books = books_of(FLEET)
    for second in range(90):
        row = record(START + timedelta(seconds=second), "usage/x", "api", output_tokens=10)
        books.journal.append(row)
    now = START + timedelta(seconds=90)
    found = books.lately(now)
    assert books._growing._running._piece_s == 5
    assert found.seconds == 60
    assert tokens_of(found) == 600
    # The piece that is not over waits, and the window keeps its length.
    books.journal.append(record(START + timedelta(seconds=91), "usage/x", "api", output_tokens=1000))
    assert tokens_of(books.lately(now + timedelta(seconds=2))) == 600
    assert tokens_of(books.lately(now + timedelta(seconds=5))) == 550 + 1000
    assert sum(map(len, books._growing._running._pieces.values())) <= 40


def test_an_engine_that_reaches_us_two_ways_counts_once(books_of: Make) -> None:
    text = FLEET + "sources:\n  written: [{instance: twin, pool: owned}]\n"
    books = books_of(text)
    books.journal.append(meter.RECORDS.empty_table(), marks={"scrape/first": b"", "written/twin": b""})
    for minute in range(1, 31):
        moment = START + timedelta(minutes=minute) - timedelta(seconds=1)
        for name in ("first", "twin"):
            books.journal.append(
                record(moment, f"engine/{name}", "owned", output_tokens=100, prompt_tokens=7, seen_seconds=60)
            )
    now = START + timedelta(minutes=30)
    so_far = books.so_far(now)
    assert so_far.ledger.usage(where={"meter": "output_tokens"})["quantity"].to_pylist() == [3000]
    assert [f.kind for f in so_far.findings if f.kind == "twice"] == ["twice"]
    # A minute alone, with 100 tokens each, could not tell.
    assert tokens_of(books.lately(now), "owned") == 100
