"""Forecast against actual: the four drivers by hand, and always their exact sum."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pertoken.errors import InputError, UnknownNameError
from pertoken.ledger import Ledger, open_ledger
from pertoken.report.actual import DRIVERS, Facts, LedgerSource, Variance, compare_books, variance
from pertoken.tables import rate_rows, usage_rows
from pertoken.web.serve import report

START, END = datetime(2026, 12, 1, tzinfo=UTC), datetime(2026, 12, 2, tzinfo=UTC)
HOURS = np.arange("2026-12-01T00", "2026-12-02T00", dtype="datetime64[h]")


def facts(*rows: tuple[str, str, str, str, float, float], tokens: dict[str, float]) -> Facts:
    """Rows of (pool, phase, component, meter, quantity, USD), and output tokens by pool."""
    costs = [
        {"pool": p, "phase": phase, "component": c, "cost_usd": str(usd)} for p, phase, c, _, _, usd in rows
    ]
    usage = [{"pool": p, "phase": phase, "meter": m, "quantity": str(q)} for p, phase, _, m, q, _ in rows]
    usage += [
        {"pool": p, "phase": "output", "meter": "output_tokens", "quantity": str(n)}
        for p, n in tokens.items()
    ]
    return Facts.of(["pool"], costs, usage)


def compared(forecast: Facts, actual: Facts) -> Variance:
    return variance(forecast, actual, by=["pool"], start=START, end=END)


def drivers(found: Variance, pool: str) -> dict[str, Decimal]:
    (line,) = (line for line in found.lines if line.group == (pool,))
    return {name: getattr(line, f"{name}_usd") for name in DRIVERS}


def test_each_driver_alone() -> None:
    # 100 GPU hours at 2 USD make 1,000 tokens.
    plan = facts(("h100", "output", "rent", "gpu_hours", 100, 200), tokens={"h100": 1000})
    for change, cost, expected in (
        ((100, 1000), 300, {"price": 100}),  # 3 USD an hour
        ((150, 1500), 300, {"volume": 100}),  # half as many tokens again, each as before
        ((150, 1000), 300, {"efficiency": 100}),  # the same tokens took half as many hours again
    ):
        now = facts(("h100", "output", "rent", "gpu_hours", change[0], cost), tokens={"h100": change[1]})
        found = drivers(compared(plan, now), "h100")
        assert found == {**dict.fromkeys(DRIVERS, Decimal(0)), **{k: Decimal(v) for k, v in expected.items()}}


def test_tokens_that_move_between_pools_are_mix() -> None:
    both = (("cheap", 100, 100), ("dear", 100, 300))
    plan = facts(
        *((p, "output", "rent", "gpu_hours", h, usd) for p, h, usd in both),
        tokens={"cheap": 500, "dear": 500},
    )
    now = facts(
        ("cheap", "output", "rent", "gpu_hours", 50, 50),
        ("dear", "output", "rent", "gpu_hours", 150, 450),
        tokens={"cheap": 250, "dear": 750},
    )
    found = compared(plan, now)
    assert drivers(found, "cheap")["mix"] == -50
    assert drivers(found, "dear")["mix"] == 150
    assert found.total.mix_usd == found.total.variance_usd == 100
    assert found.total.price_usd == found.total.volume_usd == found.total.efficiency_usd == 0


def test_idle_hours_and_new_pools_have_a_place() -> None:
    plan = facts(("h100", "output", "rent", "gpu_hours", 100, 200), tokens={"h100": 1000})
    now = facts(
        ("h100", "output", "rent", "gpu_hours", 100, 200),
        ("h100", "idle", "rent", "gpu_hours", 20, 40),
        ("l4", "output", "rent", "gpu_hours", 10, 5),
        ("(site:dc)", "idle", "staff", "site_hours", 24, 48),
        tokens={"h100": 1000, "l4": 100},
    )
    found = compared(plan, now)
    assert drivers(found, "h100") == {"price": 0, "volume": 20, "efficiency": 40, "mix": -20}
    assert drivers(found, "l4") == {"price": 0, "volume": 0, "efficiency": 0, "mix": 5}
    assert drivers(found, "(site:dc)") == {"price": 0, "volume": 0, "efficiency": 48, "mix": 0}
    assert found.total.variance_usd == 93


AMOUNTS = st.decimals(0, 10**6, places=6)
CELLS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(["input", "output", "idle", "waste"]),
        st.sampled_from(
            [
                ("rent", "gpu_hours"),
                ("energy_charge", "energy_kwh:tier2"),
                ("staff", "site_hours"),
                ("api", "output_tokens"),
                ("demand_charge", "peak_kw:flat"),
            ]
        ),
        AMOUNTS,
        AMOUNTS,
    ),
    max_size=8,
)


@given(CELLS, CELLS)
def test_the_drivers_sum_to_the_difference_exactly(
    plan: list[tuple[str, str, tuple[str, str], Decimal, Decimal]],
    now: list[tuple[str, str, tuple[str, str], Decimal, Decimal]],
) -> None:
    books = [
        Facts.of(
            ["pool"],
            [{"pool": p, "phase": ph, "component": c, "cost_usd": usd} for p, ph, (c, _), _, usd in book],
            [{"pool": p, "phase": ph, "meter": m, "quantity": q} for p, ph, (_, m), q, _ in book],
        )
        for book in (plan, now)
    ]
    found = compared(*books)
    for line in [*found.lines, found.total]:
        parts = [getattr(line, f"{name}_usd") for name in DRIVERS]
        assert sum(parts, Decimal(0)) == line.variance_usd
    spent = [sum((usd for *_, usd in book), Decimal(0)) for book in (plan, now)]
    assert found.total.variance_usd == spent[1] - spent[0]


@pytest.fixture
def two_books(tmp_path: Path) -> Path:
    """A data folder whose ledger holds a plan and what happened: dearer, and for more tokens."""
    ledger = open_ledger(tmp_path / "ledger.duckdb")
    for book, usd, tokens in (("plan:shop", 2.0, 1000), ("actual", 2.5, 1500)):
        add(ledger, book, usd, tokens)
    ledger.shut()
    return tmp_path


def add(ledger: Ledger, book: str, usd: float, tokens: float, model: str = "m") -> None:
    ledger.add_usage(
        usage_rows(
            HOURS,
            {("output", "gpu_hours"): 1.0, ("output", "output_tokens"): tokens},
            book=book,
            pool="h100",
            model=model,
            tenant="shop",
            basis="measured",
        )
    )
    ledger.add_rates(
        rate_rows(HOURS, usd, pool="h100", meter="gpu_hours", component="rent", basis="quoted", source="x")
    )
    ledger.close(book)


def test_from_the_ledger_and_in_words(two_books: Path) -> None:
    found = report(two_books, ["plan:shop", "actual"], ["pool", "model"])
    assert (found.forecast, found.actual) == ("plan:shop", "actual")
    assert (found.start, found.end) == (START, END)
    (line,) = found.lines
    # 48 USD planned, 60 spent: half as many tokens again, in no more hours, at a quarter more an hour.
    assert [line.forecast_usd, line.actual_usd] == [Decimal(48), Decimal(60)]
    found_drivers = [line.volume_usd, line.efficiency_usd, line.price_usd, line.mix_usd]
    assert found_drivers == [Decimal(24), Decimal(-24), Decimal(12), Decimal(0)]
    text = str(found)
    assert "actual against plan:shop, 2026-12-01 00:00 to 2026-12-02 00:00 UTC; USD" in text
    assert "+12.00" in text
    assert found.to_dict()["total"]["variance_usd"] == "12.000000000"


def test_one_model_under_two_names_is_said(tmp_path: Path) -> None:
    """The plan has the catalogue's name, the engine its own: two lines, and a word on how they become one."""
    ledger = open_ledger(tmp_path / "ledger.duckdb")
    for book, model in (
        ("plan:shop", "meta-llama/Llama-3.3-70B-Instruct"),
        ("actual", "llama-3.3-70b"),
        ("actual", "m"),
    ):
        add(ledger, book, 2.0, 1000, model)
    ledger.shut()
    found = report(tmp_path, ["plan:shop", "actual"], ["model"])
    assert [line.group for line in found.lines] == [
        ("llama-3.3-70b",),
        ("m",),
        ("meta-llama/Llama-3.3-70B-Instruct",),
    ]
    assert found.notes == (
        "'llama-3.3-70b' of actual and 'meta-llama/Llama-3.3-70B-Instruct' of plan:shop are one model: give its "
        "sources names: {llama-3.3-70b: meta-llama/Llama-3.3-70B-Instruct} and close the hours again",
    )
    assert not report(tmp_path, ["plan:shop", "actual"], ["pool"]).notes


def test_what_cannot_be_compared_is_said(two_books: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean plan:shop"):
        report(two_books, ["actual", "plan:shopp"], ["pool"])
    with pytest.raises(InputError, match="two books"):
        report(two_books, ["actual"], ["pool"])
    with pytest.raises(InputError, match="cannot group by 'gpu'"):
        report(two_books, ["actual", "plan:shop"], ["gpu"])
    with pytest.raises(InputError, match="no hours in common"):
        report(two_books, ["actual", "plan:shop"], ["pool"], start=END)
    with pytest.raises(InputError, match="no ledger at"):
        report(two_books / "elsewhere", ["actual", "plan:shop"], ["pool"])


def test_the_plan_may_be_in_a_ledger_of_its_own(two_books: Path, tmp_path: Path) -> None:
    plan = open_ledger(tmp_path / "plan.duckdb")
    add(plan, "plan:other", 1.0, 1500)
    plan.shut()
    found = report(two_books, ["actual", "plan:other"], ["pool"], plan=tmp_path / "plan.duckdb")
    assert found.total.price_usd == found.total.variance_usd == 36


def test_a_demand_charge_on_one_side_alone_is_noted(two_books: Path) -> None:
    ledger = open_ledger(two_books / "ledger.duckdb")
    month = HOURS[:1]
    ledger.add_usage(
        usage_rows(month, {("idle", "peak_kw:flat"): 10.0}, book="actual", pool="(site:dc)", model="",
                   tenant="(idle)", basis="measured")
    )  # fmt: skip
    ledger.add_rates(
        rate_rows(month, 5.0, pool="(site:dc)", meter="peak_kw:flat", component="demand_charge", basis="quoted",
                  source="x")
    )  # fmt: skip
    ledger.close("actual")
    source = LedgerSource(ledger)
    found = compare_books(lambda _: source, books=["actual", "plan:shop"], by=["pool"])
    ledger.shut()
    assert found.notes == (
        "only the actual has a demand charge in these hours: it stands at the first hour of its billing month; "
        "choose whole months to compare it",
    )
    assert "choose whole months" in str(found)
