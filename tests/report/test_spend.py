"""Looking back: parts add up to the ledger's total, ratios' totals are ratios of sums, a row is what it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pertoken.errors import InputError, UnknownNameError
from pertoken.ledger import Ledger, open_ledger
from pertoken.report import spend
from pertoken.report._waterfall import BooksHere, in_common, pair, to_vega, waterfall
from pertoken.report.actual import Line
from pertoken.report.spend import (
    BANDS,
    COST,
    METRIC_KEYS,
    ROW_KEYS,
    Others,
    breakdown,
    crossed,
    explain,
    label,
    over_time,
)
from pertoken.tables import Hours, rate_rows, usage_rows
from pertoken.units import METRICS

HOURS: Hours = np.arange("2026-11-20T00", "2026-11-22T00", dtype="datetime64[h]")
START, END = datetime(2026, 11, 20, tzinfo=UTC), datetime(2026, 11, 22, tzinfo=UTC)
ACTUAL: dict[str, Any] = {"where": {"book": ["actual"]}, "start": None, "end": None}
TENANTS = ("shop", "lab", "all others", "a,b", "")


def fill(ledger: Ledger, hours: Hours = HOURS, book: str = "actual") -> None:
    """Two pools, two models, five tenants, idle, waste and a site's staff, all at odd prices."""
    wave = 1 + 0.5 * np.sin(np.arange(len(hours)))
    for p, pool in enumerate(("h100", "h200")):
        for m, model in enumerate(("llama", "qwen")):
            for t, tenant in enumerate(TENANTS):
                size = wave * (1 + p) * (2 + m) / (1 + t)
                amounts: dict[tuple[str, str], Any] = {
                    ("input", "gpu_hours"): size / 9, ("output", "gpu_hours"): size / 7,
                    ("waste", "gpu_hours"): size / 97, ("output", "energy_kwh"): size / 3,
                    ("input", "input_tokens"): size * 3000, ("input", "cached_input_tokens"): size * 700,
                    ("output", "output_tokens"): size * 1000,
                }  # fmt: skip
                ledger.add_usage(
                    usage_rows(
                        hours, amounts, book=book, pool=pool, model=model, tenant=tenant, basis="measured"
                    )
                )
        idle: dict[tuple[str, str], Any] = {("idle", "gpu_hours"): 1.7, ("idle", "energy_kwh"): 0.3}
        ledger.add_usage(
            usage_rows(hours, idle, book=book, pool=pool, model="", tenant="(idle)", basis="measured")
        )
        for meter, component, usd in (
            ("gpu_hours", "rent", 1 / 3), ("gpu_hours", "software", 0.07), ("energy_kwh", "energy_charge", 0.1234567),
        ):  # fmt: skip
            ledger.add_rates(
                rate_rows(
                    hours,
                    usd * (1 + p),
                    pool=pool,
                    meter=meter,
                    component=component,
                    basis="quoted",
                    source="test",
                )
            )
    ledger.add_usage(
        usage_rows(
            hours, {("idle", "site_hours"): 1.0},
            book=book, pool="(site:dc)", model="", tenant="(idle)", basis="assumed",
        )
    )  # fmt: skip
    ledger.add_rates(
        rate_rows(
            hours, 3.1, pool="(site:dc)", meter="site_hours", component="staff", basis="assumed", source="us"
        )
    )
    ledger.close()


@pytest.fixture(scope="module")
def ledger() -> Iterator[Ledger]:
    book = open_ledger()
    fill(book)
    yield book
    book.shut()


def whole(ledger: Ledger, **where: str) -> Decimal:
    found: Decimal = ledger.cost(where={"book": "actual", **where})["cost_usd"][0].as_py()
    return found


def test_a_breakdowns_parts_are_the_total(ledger: Ledger) -> None:
    found = breakdown(ledger, ACTUAL)
    assert found.total.total == whole(ledger)
    assert [c.sums.name for c in found.categories] == ["compute", "energy", "infrastructure"]
    assert found.phases == ("input", "output", "idle", "waste")
    assert [s.name for s in found.categories[2].components] == ["staff", "software"]
    for category in found.categories:
        assert sum(s.total for s in category.components) == category.sums.total
        for sums in category.components:
            for phase, usd in sums.by_phase.items():
                assert usd == whole(ledger, component=sums.name, phase=phase)
    for phase, usd in found.total.by_phase.items():
        assert usd == whole(ledger, phase=phase)
    told = found.to_dict()
    assert sum(Decimal(r[COST]) for r in told["rows"]) == Decimal(told["total_usd"]) == whole(ledger)
    nothing = breakdown(ledger, {**ACTUAL, "where": {"book": ["plan:none"]}})
    assert not nothing.categories
    assert not nothing.phases
    assert nothing.total.total == 0


@pytest.mark.parametrize(
    ("days", "step"), [(1, "hour"), (15, "hour"), (16, "day"), (800, "day"), (801, "month")]
)
def test_bands_over_time_are_the_total_at_every_step(ledger: Ledger, days: int, step: str) -> None:
    found = over_time(ledger, {**ACTUAL, "start": END - timedelta(days=days), "end": END})
    assert found.step == step
    if days > 1:
        assert found.total == whole(ledger)
    by_band = {band: sum(u for _, b, u in found.rows if b == band) for band in BANDS}
    if days > 1:
        assert by_band["idle"] == whole(ledger, phase="idle")
        assert by_band["waste"] == whole(ledger, phase="waste")
        used = sum(whole(ledger, phase=p, category="compute") for p in ("input", "output"))
        assert by_band["compute"] == used
    assert [at for at, *_ in found.rows] == sorted(at for at, *_ in found.rows)
    assert {at.hour for at, *_ in found.rows} == (set(range(24)) if step == "hour" else {0})
    assert all(at.tzinfo is UTC for at, *_ in found.rows)
    spec = found.to_vega()
    assert len(spec["data"]["values"]) == len(found.rows) == len(found.to_dicts())
    assert spec["encoding"]["color"]["scale"]["domain"][-2:] == ["idle", "waste"]


def test_hours_without_a_row_have_no_bands(ledger: Ledger) -> None:
    assert over_time(ledger, {**ACTUAL, "start": END, "end": None}).rows == ()
    assert over_time(ledger, ACTUAL).total == whole(ledger)


def test_a_row_is_its_quantities_at_their_rates(ledger: Ledger) -> None:
    hour = START + timedelta(hours=5)
    keys = [key for key in ROW_KEYS if key != "hour"]
    rows = ledger.cost(*keys, where={"book": "actual"}, start=hour, end=hour + timedelta(hours=1)).to_pylist()
    assert len(rows) > 100
    for row in rows[::7]:
        found = explain(ledger, "actual", hour, {key: row[key] for key in keys})
        assert found.cost_usd == row["cost_usd"]
        assert found.adds_up
        assert found.exact_usd == sum(line.quantity * line.usd_per_unit for line in found.lines)
        assert {line.source for line in found.lines} <= {"test", "us"}
    told = found.to_dict()
    assert told["hour"] == "2026-11-20T05:00:00Z"
    assert (
        Decimal(told["lines"][0]["quantity"]) * Decimal(told["lines"][0]["usd_per_unit"]) == found.exact_usd
    )
    assert found.lines[0].unit in ("GPU·h", "kWh", "h")


def test_a_row_whose_rate_has_changed_since_says_so() -> None:
    ledger = open_ledger()
    fill(ledger, HOURS[:2])
    key = dict(zip(ROW_KEYS, ("h100", "llama", "shop", "output", "compute", "rent"), strict=False))
    assert explain(ledger, "actual", START, key).adds_up
    ledger.add_rates(
        rate_rows(
            HOURS[:1], 9.0, pool="h100", meter="gpu_hours", component="rent", basis="quoted", source="new"
        )
    )
    found = explain(ledger, "actual", START, key)
    assert not found.adds_up
    ledger.close()
    assert explain(ledger, "actual", START, key).adds_up
    none = explain(ledger, "actual", START, {**key, "tenant": "nobody"})
    assert (none.cost_usd, none.lines, none.adds_up) == (None, (), False)
    ledger.shut()


@pytest.mark.parametrize("by", [("model", "tenant"), ("hour", "pool"), ("component", "phase"), ("tenant",)])
def test_costs_by_two_dimensions_add_up_both_ways(ledger: Ledger, by: tuple[str, ...]) -> None:
    found = crossed(ledger, COST, by, ACTUAL)
    assert found.total == whole(ledger) == sum_of(found.rows.values())
    assert found.adds
    if len(by) > 1:
        assert sum_of(found.columns.values()) == found.total
        for row, total in found.rows.items():
            assert sum_of(found.cells.get((row, c)) for c in found.columns) == total
        for column, total in found.columns.items():
            assert sum_of(found.cells.get((r, column)) for r in found.rows) == total
    names = list(found.rows)
    costs = [found.rows[name] for name in names]
    assert (
        names == sorted(names, key=str)
        if by[0] == "hour"
        else costs == sorted(costs, key=str_free, reverse=True)
    )


def sum_of(values: Any) -> Any:
    return sum(value for value in values if value is not None)


def str_free(value: Any) -> Decimal:
    assert isinstance(value, Decimal)
    return value


def ratio(ledger: Ledger, name: str, **where: Any) -> float | None:
    """The metric by hand, exactly, from costs and quantities."""
    metric = METRICS[name]

    def total(terms: str) -> Fraction:
        found = Fraction(0)
        for term in terms.split("+"):
            meter, _, phase = term.partition("@")
            asked = {"book": "actual", **where} | ({"phase": phase} if phase else {})
            table = (
                ledger.cost(where=asked) if meter == "cost" else ledger.usage(where={**asked, "meter": meter})
            )
            value = table[0][0].as_py()
            found += Fraction(value) if value is not None else 0
        return found

    below = total(metric.denominator)
    if not below:
        return None
    share = total("cost") / total(metric.share_of) if metric.share_of else Fraction(1)
    return float(Fraction(metric.scale) * total(metric.numerator) / below * share)


def same(got: Any, want: Any) -> bool:
    """Equal but for the last digits of a float; nothing is nothing alone."""
    if got is None or want is None:
        return got is want
    return bool(abs(got - want) <= abs(want) * type(want)("1e-12"))


@pytest.mark.parametrize(
    "name", ["usd_per_mtok_output", "usd_per_mtok_total", "usd_per_mtok_output_with_idle", "utilisation"]
)
def test_totals_of_a_ratio_are_the_ratio_of_the_sums(ledger: Ledger, name: str) -> None:
    found = crossed(ledger, name, ("tenant", "pool"), ACTUAL)
    assert not found.adds
    assert same(found.total, ratio(ledger, name))
    for tenant, value in found.rows.items():
        assert same(value, ratio(ledger, name, tenant=tenant))
    for pool, value in found.columns.items():
        assert same(value, ratio(ledger, name, pool=pool))
    for (tenant, pool), value in found.cells.items():
        assert same(value, ratio(ledger, name, tenant=tenant, pool=pool))


@pytest.mark.parametrize("name", [COST, "usd_per_mtok_output", "utilisation"])
def test_what_is_too_much_to_show_is_in_the_totals(
    ledger: Ledger, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = crossed(ledger, name, ("model", "tenant"), ACTUAL)
    monkeypatch.setattr(spend, "COLUMNS_SHOWN", 3)
    monkeypatch.setattr(spend, "ROWS_SHOWN", 2)
    parts = [crossed(ledger, name, ("model", "tenant"), ACTUAL, first_row=at) for at in (0, 2)]
    assert [list(p.rows) for p in parts] == [list(want.rows)[:2], list(want.rows)[2:]]
    for part in parts:
        assert part.total == want.total
        assert part.rows_in_all == 3
        assert list(part.columns) == [*list(want.columns)[:2], Others.ALL]
        assert part.others == tuple(list(want.columns)[2:])
        assert set(part.others) >= {"all others"} or "all others" in part.columns
        for (row, column), value in part.cells.items():
            if column is not Others.ALL:
                assert same(value, want.cells[row, column])
            elif name == COST:
                assert value == sum_of(want.cells.get((row, c)) for c in part.others)
            else:
                assert same(value, ratio(ledger, name, model=row, tenant=list(part.others)))
        if name == COST:
            assert sum_of(part.columns.values()) == part.total
    hours = crossed(ledger, name, ("hour", "tenant"), ACTUAL, first_row=46)
    assert list(hours.rows) == [END - timedelta(hours=2), END - timedelta(hours=1)]


def test_a_figure_is_drawn_for_each_measure(ledger: Ledger) -> None:
    import vl_convert

    for measure, by in (
        (COST, ("model", "tenant")),
        ("utilisation", ("hour", "pool")),
        ("utilisation", ("pool", "tenant")),
    ):
        for heat in (False, True):
            assert "<svg" in vl_convert.vegalite_to_svg(
                {**crossed(ledger, measure, by, ACTUAL).to_vega(heat), "width": 300}
            )
    assert "<svg" in vl_convert.vegalite_to_svg(
        {**crossed(ledger, COST, ("pool",), ACTUAL).to_vega(True), "width": 300}
    )
    assert "<svg" in vl_convert.vegalite_to_svg({**over_time(ledger, ACTUAL).to_vega(), "width": 300})


def test_what_cannot_be_crossed_is_refused(ledger: Ledger) -> None:
    with pytest.raises(UnknownNameError, match="did you mean utilisation"):
        crossed(ledger, "utilization", ("pool",), ACTUAL)
    with pytest.raises(
        InputError, match="utilisation is not known by 'phase': choose of " + ", ".join(METRIC_KEYS)
    ):
        crossed(ledger, "utilisation", ("phase",), ACTUAL)
    for by in ((), ("pool", "model", "tenant")):
        with pytest.raises(InputError, match="one or two dimensions"):
            crossed(ledger, COST, by, ACTUAL)
    assert label("tenant", "") == "no tenant"
    assert label("hour", START) == "2026-11-20T00:00Z"


MONEY = st.decimals(-(10**6), 10**6, places=9)


@given(MONEY, MONEY, MONEY, MONEY, MONEY)
def test_a_waterfall_ends_at_the_actual(
    c0: Decimal, price: Decimal, volume: Decimal, efficiency: Decimal, mix: Decimal
) -> None:
    actual = c0 + price + volume + efficiency + mix
    steps = waterfall(Line(("total",), c0, actual, price, volume, efficiency, mix, 1, 1))
    assert [s.name for s in steps] == ["forecast", "price", "volume", "efficiency", "mix", "actual"]
    assert [s.usd for s in steps] == [c0, price, volume, efficiency, mix, actual]
    assert all(b.from_usd == a.to_usd for a, b in pairwise(steps[:5]))
    assert steps[4].to_usd == actual
    assert len(to_vega(steps)["data"]["values"]) == 6


def test_less_than_half_a_cent_has_no_sign() -> None:
    tiny = Decimal("0.004")
    steps = waterfall(
        Line(("total",), Decimal(10), Decimal("9.5"), -tiny, tiny, Decimal("-0.5"), Decimal(0), 1, 1)
    )
    told = [row["usd"] for row in to_vega(steps)["data"]["values"]]
    assert told == ["10.00", "0.00", "0.00", "-0.50", "0.00", "9.50"]


def test_the_plan_with_most_hours_in_common_comes_first() -> None:
    day = [datetime(2026, 11, d, tzinfo=UTC) for d in range(1, 10)]
    assert in_common((day[0], day[4]), (day[2], day[6])) == (day[2], day[4])
    assert in_common((day[0], day[2]), (day[2], day[6])) is None
    spans = {"actual": (day[0], day[5]), "plan:a": (day[4], day[8]), "plan:b": (day[2], day[8])}
    assert pair(spans, "actual") == ("plan:b", "actual")
    assert pair({k: v for k, v in spans.items() if k != "actual"}, "actual") == ("plan:a", "plan:b")
    assert pair({"actual": spans["actual"]}, "actual") is None
    assert pair({"plan:a": spans["plan:a"]}, "actual") is None
    assert pair({}, "actual") is None
    ledger = open_ledger()
    fill(ledger, HOURS[:3])
    assert BooksHere(ledger).spans() == {"actual": (START, START + timedelta(hours=3))}
    ledger.shut()
