"""Sums kept beside the hourly rows give the same answers, to the digit, whatever was written in between."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pertoken.errors import MissingRateError
from pertoken.ledger import Ledger, open_ledger
from pertoken.ledger._sums import ALONE, BY_DAY, BY_HOUR, BY_MONTH, BY_TENANT, BY_TENANT_HOUR, _choice
from pertoken.tables import USAGE, Hours, concat, rate_rows, usage_rows

START = datetime(2026, 1, 27, tzinfo=UTC)
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
SPAN: Hours = np.arange("2026-01-27T00", "2026-03-04T00", dtype="datetime64[h]")  # three months, one whole
POOLS, MODELS, TENANTS = ("a", "b"), ("m", "n"), ("x", "y", "")
QUESTIONS: list[dict[str, Any]] = [
    {"by": by, "where": where}
    for by in ([], ["book", "pool"], ["tenant"], ["model", "tenant"], ["hour"], ["hour", "tenant"])
    for where in ({}, {"book": "actual"}, {"book": ["actual", "plan:p"], "tenant": "x"}, {"model": ["m"]})
]
METRICS = ("usd_per_mtok_output", "usd_per_mtok_total", "utilisation", "joule_per_token_total")


def usage(hours: Hours, book: str, seed: int) -> pa.Table:
    """Some rows of each hour, quantities that no float holds exactly."""
    dice = random.Random(seed)
    return concat(
        [
            usage_rows(
                hours,
                {
                    ("output", "gpu_hours"): 0.1 * dice.randint(1, 9),
                    ("idle", "gpu_hours"): 0.3,
                    ("output", "output_tokens"): float(dice.randint(1, 10**6)),
                    ("output", "energy_kwh:tier2"): 0.7,
                },
                book=book, pool=pool, model=model, tenant=dice.choice(TENANTS), basis=basis,
            )
            for pool in POOLS
            for model in MODELS
            for basis in ("measured", "assumed")
        ],
        USAGE,
    )  # fmt: skip


def rates(hours: Hours) -> pa.Table:
    return concat(
        [
            rate_rows(hours, usd, pool=pool, meter=meter, component=component, basis="quoted", source="test")
            for pool in POOLS
            for meter, component, usd in (
                ("gpu_hours", "rent", 1.234567890123), ("energy_kwh:tier2", "energy_charge", 0.11)
            )
        ],
        rate_rows(hours, 1.0, pool="a", meter="gpu_hours", component="rent", basis="quoted", source="t").schema,
    )  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = open_ledger(tmp_path / "ledger.duckdb")
    made.add_rates(rates(SPAN))
    made.add_usage(usage(SPAN, "actual", 1))
    made.close()
    yield made
    made.shut()


FEW = [q for q in QUESTIONS if q["by"] in ([], ["tenant"], ["model", "tenant"], ["hour"])][::4]


def same(ledger: Ledger, questions: Sequence[dict[str, Any]] = FEW, window: Any = None) -> None:
    """Every question is answered as from the hourly rows alone."""
    plain, window = Ledger(ledger._engine), window or {}
    for question in questions:
        by, where = question["by"], question["where"]
        for kept, hourly in (
            (ledger.metric(*METRICS, **question, **window), plain.metric(*METRICS, **question, **window)),
            (ledger.cost(*by, "component", where=where, **window),
             plain.cost(*by, "component", where=where, **window)),
            (ledger.usage(*by, "phase", "meter", where={**where, "meter": "energy_kwh"}, **window),
             plain.usage(*by, "phase", "meter", where={**where, "meter": "energy_kwh"}, **window)),
            (ledger.page("cost_usd", by=by, where=where, limit=7, **window),
             plain.page("cost_usd", by=by, where=where, limit=7, **window)),
        ):  # fmt: skip
            assert kept == hourly, (question, window)
    assert ledger.books() == plain.books()
    assert ledger.unpriced(**window) == plain.unpriced(**window)
    for book in ("actual", "plan:p", "none"):
        for besides in ((), ("gpu_hours", "output_tokens")):
            assert ledger.first_hour(book, besides=besides) == plain.first_hour(book, besides=besides)


WINDOWS = [
    {},
    {"start": START + 3 * DAY, "end": START + 35 * DAY},
    {"start": START + 5 * HOUR, "end": START + 33 * DAY + 7 * HOUR},
    {"start": START + 30 * HOUR, "end": START + 31 * HOUR},
    {"start": START + 400 * DAY},
]


def read_from(ledger: Ledger, *needed: str) -> str:
    """The FROM clause of a question about the book of what happened."""
    assert ledger._sums is not None
    return ledger._sums.source("usage", needed, ["actual"], (None, None)).sql


@pytest.mark.parametrize("window", WINDOWS)
def test_sums_give_what_hours_give(ledger: Ledger, window: dict[str, datetime]) -> None:
    ledger.put_book("plan:p", usage(SPAN[:200], "plan:p", 2), rates(SPAN[:200]))
    same(ledger, QUESTIONS, window)


def test_the_smallest_sums_that_can_tell_are_read(ledger: Ledger) -> None:
    assert _choice(["book", "hour"]) is ALONE
    assert _choice(["book", "pool"]) is BY_DAY
    assert _choice(["hour", "model"]) is BY_HOUR
    assert _choice(["tenant"]) is BY_TENANT
    assert _choice(["tenant", "model"]) is BY_MONTH
    assert _choice(["hour", "tenant"]) is BY_TENANT_HOUR
    assert _choice(["hour", "tenant", "pool"]) is None
    for needed, table in (
        (["pool"], "usage_by_day"),
        (["tenant"], "usage_by_tenant_day"),
        (["tenant", "hour"], "usage_by_tenant_hour"),
    ):
        assert table in read_from(ledger, *needed)
    assert read_from(ledger, "hour", "tenant", "model") == "usage_hourly"
    # The sums are there: most rows of a question come from them.
    kept = ledger._engine.query("SELECT COUNT(*) AS n FROM summed WHERE grain = 'day'")["n"][0].as_py()
    assert kept == len(SPAN) / 24 - 1
    months = ledger._engine.query("SELECT start FROM summed WHERE grain = 'month'")["start"].to_pylist()
    assert sorted(str(m)[:7] for m in months) == ["2026-01", "2026-02"]


def test_what_changes_is_seen_at_once_and_summed_again(ledger: Ledger) -> None:
    day = SPAN[24 * 9 : 24 * 10]
    moments = [START + 9 * DAY + n * HOUR for n in range(24)]
    # Usage alone, not yet closed again.
    ledger.replace_usage("actual", moments, usage(day, "actual", 5))
    assert "usage_hourly" in read_from(ledger, "pool")
    same(ledger)
    ledger.close("actual", START + 9 * DAY, START + 10 * DAY)
    same(ledger)
    # Rates alone: closed at another price.
    ledger.add_rates(rates(day).set_column(5, "usd_per_unit", pa.array([7] * 96, pa.decimal128(18, 12))))
    ledger.close("actual", START + 9 * DAY, START + 10 * DAY)
    same(ledger)
    # Usage that nothing prices, in a day that is summed.
    ledger.add_usage(
        usage_rows(
            day,
            {("output", "egress_gb"): 1.0},
            book="actual",
            pool="a",
            model="m",
            tenant="x",
            basis="measured",
        )
    )
    ledger.sum_up()
    assert [(r["meter"], r["hours"]) for r in ledger.unpriced("actual")] == [("egress_gb", 24)]
    same(ledger)
    # A day that nobody used before, within a month that is summed; and one that nobody uses any more.
    # Closing another day meanwhile sums its month up, with costs of a day that has no usage any more.
    ledger.replace_usage("actual", moments, USAGE.empty_table())
    ledger.close("actual", START, START + HOUR)
    same(ledger)
    ledger.close("actual", START + 9 * DAY, START + 10 * DAY)
    same(ledger)
    ledger.add_usage(usage(day, "actual", 6))
    same(ledger)
    ledger.close()
    same(ledger)


def test_books_come_and_go(ledger: Ledger) -> None:
    for seed in (3, 4):
        ledger.put_book("plan:p", usage(SPAN[: 240 + 24 * seed], "plan:p", seed), rates(SPAN))
        same(ledger)
    ledger.drop_book("plan:p")
    same(ledger)
    assert ledger.books() == [("actual", START, START + (len(SPAN) - 1) * HOUR)]
    ledger.drop_book("actual")
    assert ledger.books() == []
    assert ledger._engine.query("SELECT COUNT(*) AS n FROM cost_by_month")["n"][0].as_py() == 0


def test_a_refused_change_leaves_the_sums(ledger: Ledger) -> None:
    with pytest.raises(Exception, match="no rate for energy_kwh:tier2"):
        ledger.put_book("plan:p", usage(SPAN[:48], "plan:p", 1), rates(SPAN[:24]))
    assert ledger._sums is not None
    assert ledger._sums.stamp % 2 == 0
    assert "usage_by_day" in read_from(ledger, "pool")
    same(ledger)


def test_sums_are_found_again_and_made_for_a_ledger_without(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.duckdb"
    ledger.shut()
    again = open_ledger(path)
    assert "usage_by_day" in read_from(again, "pool")
    same(again)
    again._engine.execute("DROP TABLE cost_by_hour_alone")  # as a ledger of before may have none
    again.shut()
    older = open_ledger(path)
    assert read_from(older, "pool") == "usage_hourly"
    same(older)
    older.close("actual", START, START + HOUR)
    assert "usage_by_day" in read_from(older, "pool")
    same(older)
    older.shut()


def test_many_holes_are_read_by_the_hour(ledger: Ledger) -> None:
    for number in range(0, 36, 2):
        ledger.add_usage(usage(SPAN[24 * number : 24 * number + 1], "actual", number))
    assert read_from(ledger, "pool").count("usage_by_day") == 16
    same(ledger)


def read_meanwhile(read: Callable[[], Any], change: Callable[[int], None]) -> set[Any]:
    """What two readers saw while the ledger was changed eight times; at least once, and never an error."""
    seen: list[Any] = []
    failed: list[BaseException] = []
    stop = threading.Event()

    def reading() -> None:
        try:
            while not stop.is_set():
                seen.append(read())
        except BaseException as error:
            failed.append(error)

    readers = [threading.Thread(target=reading) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(8):
        change(turn)
    stop.set()
    for reader in readers:
        reader.join()
    assert not failed
    assert seen
    return set(seen)


def test_readers_never_see_half_a_change(ledger: Ledger) -> None:
    """While days are struck off and summed again, every answer is one of the two that are right."""
    hours: Hours = SPAN[24 * 9 : 24 * 10]
    moments = [START + 9 * DAY + n * HOUR for n in range(24)]
    versions = [usage(hours, "actual", seed) for seed in (21, 22)]

    def cost() -> Any:
        return ledger.cost(where={"book": "actual"})["cost_usd"][0].as_py()

    def tokens() -> Any:
        return ledger.usage(where={"book": "actual", "meter": "output_tokens"})["quantity"][0].as_py()

    right = set()
    for version in versions:
        ledger.replace_usage("actual", moments, version)
        right.add(tokens())
        ledger.close()

    def read() -> Any:
        found = tokens()
        cost()
        return found

    def turn(number: int) -> None:
        ledger.replace_usage("actual", moments, versions[number % 2])
        ledger.close("actual", START + 9 * DAY, START + 10 * DAY)

    assert read_meanwhile(read, turn) <= right
    same(ledger)


def test_what_is_changed_together_is_seen_together(ledger: Ledger) -> None:
    """Whoever asks meanwhile sees the old tokens at the old cost or the new ones at the new, and no sum of both."""
    day = 9
    moments = [START + day * DAY + n * HOUR for n in range(24)]
    versions = [usage(SPAN[24 * day : 24 * (day + 1)], "actual", seed) for seed in (21, 22)]

    def figures() -> Any:
        found = ledger.metric("usd_per_mtok_output", "joule_per_token_output", where={"book": "actual"})
        return tuple(found.to_pylist()[0].values())

    def change(to: pa.Table) -> None:
        with ledger.together():
            ledger.replace_usage("actual", moments, to)
            ledger.close("actual", START + day * DAY, START + (day + 1) * DAY)

    right = set()
    for version in versions:
        change(version)
        right.add(figures())
    assert read_meanwhile(figures, lambda turn: change(versions[turn % 2])) <= right
    assert "usage_by_day" in read_from(ledger, "pool")
    same(ledger)


def test_what_fails_together_is_undone_together(ledger: Ledger) -> None:
    before = ledger.cost("hour", "pool").to_pylist(), ledger.usage("hour", "meter").to_pylist()

    def change_and_fail() -> None:
        with ledger.together():
            ledger.replace_usage("actual", [START], usage(SPAN[:1], "actual", 5))
            ledger.close("actual", START, START + HOUR)
            raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here"):
        change_and_fail()
    assert (ledger.cost("hour", "pool").to_pylist(), ledger.usage("hour", "meter").to_pylist()) == before
    assert ledger._sums is not None
    assert ledger._sums.stamp % 2 == 0
    same(ledger)
    ledger.close("actual", START, START + HOUR)
    assert "usage_by_day" in read_from(ledger, "pool")
    same(ledger)


def test_hours_that_lack_a_rate_spare_the_others_done_together(ledger: Ledger) -> None:
    strange = usage_rows(
        SPAN[1:2], {("output", "energy_kwh:tier9"): 1.0},
        book="actual", pool="a", model="m", tenant="x", basis="measured",
    )  # fmt: skip
    with ledger.together():
        ledger.replace_usage(
            "actual", [START, START + HOUR], concat([usage(SPAN[:1], "actual", 5), strange], USAGE)
        )
        with pytest.raises(MissingRateError, match="no rate for energy_kwh:tier9"):
            ledger.close("actual", START, START + 2 * HOUR)
        ledger.close("actual", START, START + HOUR)
    assert [row["first_hour"] for row in ledger.unpriced("actual")] == [START + HOUR]
    same(ledger)
