"""Row by row: lines multiply out to the cost they explain, and pages put together are the whole answer."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.errors import InputError
from pertoken.ledger import Ledger, open_ledger
from pertoken.ledger._rows import page_sql
from pertoken.tables import RATES, USAGE, Hours, rate_rows, usage_rows
from tests.report.test_spend import fill

HOURS: Hours = np.arange("2026-06-01T00", "2026-06-01T05", dtype="datetime64[h]")
NOON = datetime(2026, 6, 1, 3, tzinfo=UTC)


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    book = open_ledger()
    for number, tenant in enumerate(("shop", "lab", "")):
        amounts: dict[tuple[str, str], Any] = {
            ("output", "gpu_hours"): 0.123457 + number,
            ("output", "energy_kwh:tier2"): 1 / 3,
            ("output", "energy_kwh"): 2 / 3,
            ("output", "output_tokens"): 1000,
        }
        for basis in ("measured", "assumed"):
            book.add_usage(
                usage_rows(HOURS, amounts, book="actual", pool="h100", model="m", tenant=tenant, basis=basis)
            )
    for meter, component, usd in (
        ("gpu_hours", "rent", 1 / 3),
        ("gpu_hours", "software", 0.07),
        ("energy_kwh", "energy_charge", 0.1234567),
        ("energy_kwh:tier2", "energy_charge", 0.2),
    ):
        book.add_rates(
            rate_rows(
                HOURS,
                usd,
                pool="h100",
                meter=meter,
                component=component,
                basis="quoted",
                source=f"by {meter}",
            )
        )
    book.close()
    yield book
    book.shut()


def test_the_lines_of_a_cost_row_multiply_out_to_it(ledger: Ledger) -> None:
    keys = ("tenant", "phase", "component")
    costs = {
        tuple(r[k] for k in keys): r["cost_usd"]
        for r in ledger.cost(*keys, start=NOON, end=at(4)).to_pylist()
    }
    lines = ledger.lines("actual", NOON, "h100").to_pylist()
    sums: dict[tuple[str, ...], Decimal] = {}
    for line in lines:
        assert line["quantity"] * line["usd_per_unit"] == line["cost_usd"]
        assert line["source"] == f"by {line['meter']}"
        key = tuple(line[k] for k in keys)
        sums[key] = sums.get(key, Decimal(0)) + line["cost_usd"]
    assert {k: v.quantize(Decimal("1e-9")) for k, v in sums.items()} == costs
    assert {line["quantity_basis"] for line in lines} == {"measured", "assumed"}
    energy = ledger.lines(
        "actual", NOON, "h100", {"tenant": "", "component": "energy_charge", "phase": "output"}
    ).to_pylist()
    assert [(r["meter"], r["quantity_basis"]) for r in energy] == [
        ("energy_kwh", "assumed"),
        ("energy_kwh", "measured"),
        ("energy_kwh:tier2", "assumed"),
        ("energy_kwh:tier2", "measured"),
    ]
    assert ledger.lines("actual", NOON, "h200").num_rows == 0
    with pytest.raises(InputError, match="cannot group or filter by 'pool'"):
        ledger.lines("actual", NOON, "h100", {"pool": "h100"})


def test_a_books_own_rates_explain_it(ledger: Ledger) -> None:
    usage = ledger.usage_rows({"meter": "gpu_hours"})
    usage = usage.set_column(0, "book", pa.array(["plan:x"] * len(usage))).cast(USAGE)
    rates = rate_rows(
        HOURS, 9.0, pool="h100", meter="gpu_hours", component="capital", basis="assumed", source="plan"
    )
    ledger.put_book("plan:x", usage, rates.cast(RATES))
    lines = ledger.lines("plan:x", NOON, "h100").to_pylist()
    assert {(r["component"], r["usd_per_unit"], r["source"]) for r in lines} == {
        ("capital", Decimal(9), "plan")
    }
    (cost,) = ledger.cost(where={"book": "plan:x"}, start=NOON, end=at(4)).to_pylist()
    assert sum(r["cost_usd"] for r in lines) == cost["cost_usd"]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("names", "by"),
    [
        (("cost_usd",), ("hour", "tenant", "component")),
        (("quantity",), ("tenant", "meter")),
        (("usd_per_mtok_total", "utilisation"), ("tenant", "hour")),
        (("cost_usd",), ()),
    ],
)
def test_pages_put_together_are_the_whole(
    ledger: Ledger, names: tuple[str, ...], by: tuple[str, ...], size: int
) -> None:
    whole = {
        "cost_usd": lambda: ledger.cost(*by),
        "quantity": lambda: ledger.usage(*by),
    }.get(names[0], lambda: ledger.metric(*names, by=by))()
    got: list[dict[str, Any]] = []
    after: list[object] | None = None
    while True:
        part = ledger.page(*names, by=by, after=after, limit=size).to_pylist()
        got += part
        if len(part) < size or not by:
            break
        after = [part[-1][key] for key in by]
    assert got == whole.to_pylist()


VALUES = st.lists(
    st.tuples(*[st.none() | st.sampled_from(["", "a", "b", "é"])] * 3), max_size=12, unique=True
)


@given(VALUES, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_pages_hold_where_keys_are_null(rows: list[tuple[str | None, ...]], size: int) -> None:
    book = open_ledger()
    try:
        keys = ["k1", "k2", "k3"]
        book._engine.execute("CREATE TABLE t (k1 VARCHAR, k2 VARCHAR, k3 VARCHAR)")
        if rows:
            book._engine.load(
                "t",
                pa.table(
                    {k: pa.array(c, pa.string()) for k, c in zip(keys, zip(*rows, strict=True), strict=True)}
                ),
            )
        got: list[tuple[str | None, ...]] = []
        after: tuple[str | None, ...] | None = None
        while True:
            found = book._engine.query(*page_sql("SELECT * FROM t", [], keys, after, size))
            part = [tuple(r[k] for k in keys) for r in found.to_pylist()]
            got += part
            if len(part) < size:
                break
            after = part[-1]
        assert sorted(got, key=str) == sorted(rows, key=str)
        assert len(got) == len(rows)
    finally:
        book.shut()


@pytest.fixture(scope="module")
def broad() -> Iterator[Ledger]:
    book = open_ledger()
    fill(book)
    yield book
    book.shut()


KEYS = ("hour", "pool", "model", "tenant", "phase", "component", "book")


@given(
    st.lists(st.sampled_from(KEYS), min_size=1, unique=True),
    st.sampled_from([3, 40, 700, 10_000]),
    st.sampled_from(
        [{}, {"tenant": "shop"}, {"tenant": ["shop", "", "a,b"], "book": "actual"}, {"pool": []}]
    ),
    st.sampled_from(
        [
            (None, None),
            (datetime(2026, 11, 20, 7, tzinfo=UTC), None),
            (None, datetime(2026, 11, 20, 9, tzinfo=UTC)),
        ]
    ),
)
@settings(max_examples=60, deadline=None)
def test_a_page_is_the_next_part_of_the_whole(
    broad: Ledger, by: list[str], limit: int, where: Any, window: Any
) -> None:
    asked = {"where": where, "start": window[0], "end": window[1]}
    whole = broad.cost(*by, **asked).to_pylist()
    for begin in (0, len(whole) // 3, len(whole) - 1):
        after = [whole[begin - 1][key] for key in by] if begin > 0 else None
        want = whole[max(begin, 0) :][:limit]
        assert broad.page("cost_usd", by=by, after=after, limit=limit, **asked).to_pylist() == want


def test_meters_and_metrics_come_in_pages_too(broad: Ledger) -> None:
    broad.add_usage(
        usage_rows(
            HOURS,
            {("idle", "energy_kwh:tier2"): 2.0},
            book="plan:t",
            pool="p",
            model="",
            tenant="",
            basis="assumed",
        )
    )
    for where in ({}, {"meter": "energy_kwh"}, {"meter": ["energy_kwh", "gpu_hours"]}):
        for by in (["pool", "meter"], ["meter", "tenant"], ["book", "meter", "hour"]):
            whole = broad.usage(*by, where=where).to_pylist()
            got: list[dict[str, Any]] = []
            while part := broad.page(
                "quantity", by=by, where=where, limit=7, after=[got[-1][k] for k in by] if got else None
            ).to_pylist():
                got += part
            assert got == whole
    names = ("usd_per_mtok_output", "utilisation")
    metrics = broad.metric(*names, by=["tenant", "hour"]).to_pylist()
    after = [metrics[9][k] for k in ("tenant", "hour")]
    assert broad.page(*names, by=["tenant", "hour"], after=after, limit=50).to_pylist() == metrics[10:60]
    with pytest.raises(InputError, match="cannot group or filter by 'rate'"):
        broad.page("cost_usd", by=["hour", "rate"])
    with pytest.raises(InputError, match="cannot group or filter by 'rate'"):
        broad.page("cost_usd", by=["rate"])


def test_a_page_stands_where_it_stood_when_rows_come(ledger: Ledger) -> None:
    by = ("tenant", "hour")
    first = ledger.page("cost_usd", by=by, limit=6).to_pylist()
    rest = ledger.page("cost_usd", by=by, after=[first[-1][k] for k in by], limit=100).to_pylist()
    amounts = {("output", "gpu_hours"): 1.0}
    ledger.add_usage(
        usage_rows(HOURS, amounts, book="actual", pool="h100", model="m", tenant="a", basis="measured")
    )
    ledger.close()
    again = ledger.page("cost_usd", by=by, after=[first[-1][k] for k in by], limit=100).to_pylist()
    assert again == rest  # the new tenant stands before the edge: nothing behind it moved or came twice
    with pytest.raises(InputError, match="2 keys, found 1"):
        ledger.page("cost_usd", by=by, after=["x"], limit=1)


def at(hour: int) -> datetime:
    return datetime(2026, 6, 1, hour, tzinfo=UTC)
