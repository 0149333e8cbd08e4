"""The ledger's promises: closing twice changes nothing, unpriced usage raises, parts sum to the whole."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.errors import InputError, MissingRateError, UnknownNameError
from pertoken.ledger import Ledger, open_ledger
from pertoken.tables import USAGE, Hours, rate_rows, usage_rows

HOURS: Hours = np.arange("2026-06-01T00", "2026-06-02T00", dtype="datetime64[h]")


def used(
    ledger: Ledger, quantities: dict[tuple[str, str], float], tenant: str = "shop", pool: str = "h100"
) -> None:
    ledger.add_usage(
        usage_rows(HOURS, quantities, book="plan:x", pool=pool, model="m", tenant=tenant, basis="assumed")
    )


def priced(ledger: Ledger, meter: str, usd: float, component: str = "rent", pool: str = "h100") -> None:
    ledger.add_rates(
        rate_rows(HOURS, usd, pool=pool, meter=meter, component=component, basis="quoted", source="test")
    )


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    book = open_ledger()
    yield book
    book.shut()


def test_a_day_by_hand(ledger: Ledger) -> None:
    # 24 h × 1 GPU at 2.40 USD/h: 0.3 prefill, 0.5 decode, 0.2 idle; 1,000 input and 500 output tokens an hour.
    used(ledger, {("input", "gpu_hours"): 0.3, ("output", "gpu_hours"): 0.5})
    used(ledger, {("input", "input_tokens"): 1000, ("output", "output_tokens"): 500})
    used(ledger, {("idle", "gpu_hours"): 0.2}, tenant="(idle)")
    priced(ledger, "gpu_hours", 2.40)
    ledger.close("plan:x")
    assert ledger.cost().to_pylist() == [{"cost_usd": Decimal("57.600000000")}]
    by_phase = {row["phase"]: row["cost_usd"] for row in ledger.cost("phase").to_pylist()}
    assert by_phase == {"input": Decimal("17.28"), "output": Decimal("28.80"), "idle": Decimal("11.52")}
    row = ledger.metric(
        "usd_per_mtok_output",
        "usd_per_mtok_input",
        "usd_per_mtok_total",
        "usd_per_mtok_output_with_idle",
        "utilisation",
    ).to_pylist()[0]
    assert row["usd_per_mtok_output"] == pytest.approx(28.80 / 12_000 * 1e6)
    assert row["usd_per_mtok_input"] == pytest.approx(17.28 / 24_000 * 1e6)
    assert row["usd_per_mtok_total"] == pytest.approx(57.60 / 36_000 * 1e6)
    assert row["usd_per_mtok_output_with_idle"] == pytest.approx(36.0 / 12_000 * 1e6)
    assert row["utilisation"] == pytest.approx(0.8)


def test_closing_twice_changes_nothing(ledger: Ledger) -> None:
    used(ledger, {("output", "gpu_hours"): 1.0})
    priced(ledger, "gpu_hours", 1.23456789)
    ledger.close()
    once = ledger.cost("hour", "phase", "component").to_pylist()
    ledger.close()
    assert ledger.cost("hour", "phase", "component").to_pylist() == once
    assert len(once) == 24


def test_rates_given_twice_are_not_charged_twice(ledger: Ledger) -> None:
    used(ledger, {("output", "gpu_hours"): 1.0})
    priced(ledger, "gpu_hours", 2.0)
    priced(ledger, "gpu_hours", 3.0)
    priced(ledger, "gpu_hours", 0.5, component="software")
    ledger.close()
    costs = {row["component"]: row["cost_usd"] for row in ledger.cost("component").to_pylist()}
    assert costs == {"rent": Decimal("72"), "software": Decimal("12")}


def test_closing_a_window_leaves_the_rest(ledger: Ledger) -> None:
    used(ledger, {("output", "gpu_hours"): 1.0})
    priced(ledger, "gpu_hours", 2.0)
    noon = datetime(2026, 6, 1, 12, tzinfo=UTC)
    ledger.close("plan:x", end=noon)
    assert ledger.cost().to_pylist()[0]["cost_usd"] == Decimal(24)
    ledger.close("plan:x", start=noon)
    assert ledger.cost().to_pylist()[0]["cost_usd"] == Decimal(48)
    with pytest.raises(InputError, match="no time zone"):
        ledger.close(start=datetime(2026, 6, 1, 12))  # noqa: DTZ001


@pytest.mark.parametrize("meter", ["gpu_hours", "energy_kwh", "energy_kwh:tier2", "peak_kw:summer"])
def test_unpriced_resources_raise_and_leave_the_books_as_they_were(ledger: Ledger, meter: str) -> None:
    used(ledger, {("output", "gpu_hours"): 1.0}, pool="priced")
    priced(ledger, "gpu_hours", 2.0, pool="priced")
    ledger.close()
    used(ledger, {("output", meter): 1.0})
    with pytest.raises(MissingRateError, match=f"no rate for {meter} in pool 'h100' in 24 hours"):
        ledger.close()
    assert ledger.cost().to_pylist()[0]["cost_usd"] == Decimal(48)


def test_tokens_of_an_api_must_be_priced_each(ledger: Ledger) -> None:
    used(ledger, {("input", "input_tokens"): 10, ("output", "output_tokens"): 10}, pool="api")
    with pytest.raises(MissingRateError, match="input_tokens"):
        ledger.close()
    priced(ledger, "input_tokens", 1e-6, component="api", pool="api")
    with pytest.raises(MissingRateError, match="output_tokens"):
        ledger.close()
    priced(ledger, "output_tokens", 2e-6, component="api", pool="api")
    ledger.close()
    assert ledger.cost().to_pylist()[0]["cost_usd"] == Decimal("0.000720000")


def test_a_zero_rate_is_a_price(ledger: Ledger) -> None:
    used(ledger, {("output", "energy_kwh"): 1.0, ("output", "gpu_hours"): 1.0})
    priced(ledger, "gpu_hours", 2.0)
    priced(ledger, "energy_kwh", 0.0, component="energy_charge")
    ledger.close()
    assert ledger.cost().to_pylist()[0]["cost_usd"] == Decimal(48)


def test_names_are_from_the_closed_list(ledger: Ledger) -> None:
    with pytest.raises(UnknownNameError, match="usd_per_mtok_output"):
        ledger.metric("usd_per_mtok_outputs")
    with pytest.raises(InputError, match="cannot group or filter by"):
        ledger.cost("hour; DROP TABLE rates")
    assert ledger.cost(where={"pool": "x'; DROP TABLE rates; --"}).to_pylist() == [{"cost_usd": None}]


def test_a_group_without_tokens_has_no_cost_per_token(ledger: Ledger) -> None:
    used(ledger, {("idle", "gpu_hours"): 1.0}, tenant="(idle)")
    priced(ledger, "gpu_hours", 2.0)
    ledger.close()
    assert ledger.metric("usd_per_mtok_output", by=["tenant"]).to_pylist() == [
        {"tenant": "(idle)", "usd_per_mtok_output": None}
    ]


def test_unknown_energy_is_not_zero_energy(ledger: Ledger) -> None:
    used(ledger, {("input", "input_tokens"): 10, ("output", "output_tokens"): 10}, pool="api")
    priced(ledger, "input_tokens", 1e-6, component="api", pool="api")
    priced(ledger, "output_tokens", 2e-6, component="api", pool="api")
    used(ledger, {("output", "output_tokens"): 10, ("idle", "gpu_hours"): 1, ("idle", "energy_kwh"): 1})
    priced(ledger, "gpu_hours", 2.0)
    priced(ledger, "energy_kwh", 0.0, component="energy_charge")
    ledger.close()
    rows = ledger.metric("joule_per_token_output", "utilisation", by=["pool"]).to_pylist()
    assert rows == [
        {"pool": "api", "joule_per_token_output": None, "utilisation": None},
        {"pool": "h100", "joule_per_token_output": 0.0, "utilisation": 0.0},
    ]


def test_a_ledger_in_a_file_is_there_after_reopening(tmp_path: object) -> None:
    path = f"{tmp_path}/books.duckdb"
    first = open_ledger(path)
    used(first, {("output", "gpu_hours"): 1.0})
    priced(first, "gpu_hours", 2.0)
    first.close()
    first.shut()
    again = open_ledger(path)
    assert again.cost().to_pylist()[0]["cost_usd"] == Decimal(48)
    again.shut()


def test_a_file_that_is_no_ledger_gets_one_line(tmp_path: object) -> None:
    path = f"{tmp_path}/notes.txt"
    with open(path, "w") as file:
        file.write("not a ledger\n" * 100)
    with pytest.raises(InputError, match="cannot open the ledger"):
        open_ledger(path)


PHASES = ["input", "output", "training", "idle", "waste"]


@settings(max_examples=25)
@given(
    quantities=st.lists(st.tuples(st.sampled_from(PHASES), st.floats(0, 1e6)), min_size=1, max_size=6),
    usd=st.floats(0, 1000),
    kwh_usd=st.floats(0, 10),
)
def test_the_parts_sum_to_the_whole(quantities: list[tuple[str, float]], usd: float, kwh_usd: float) -> None:
    ledger = open_ledger()
    for i, (phase, quantity) in enumerate(quantities):
        used(ledger, {(phase, "gpu_hours"): quantity, (phase, "energy_kwh"): quantity / 3}, tenant=f"t{i}")
    priced(ledger, "gpu_hours", usd)
    priced(ledger, "energy_kwh", kwh_usd, component="energy_charge")
    ledger.close()
    whole = ledger.cost().to_pylist()[0]["cost_usd"]
    for dimension in ("phase", "tenant", "component", "category", "hour"):
        parts = [row["cost_usd"] for row in ledger.cost(dimension).to_pylist()]
        assert sum(parts) == (whole or 0)
    expected = sum(q for _, q in quantities) * (usd + kwh_usd / 3) * 24
    assert float(whole or 0) == pytest.approx(expected, rel=1e-6, abs=0.01)
    ledger.shut()


def test_an_hours_usage_is_replaced_whole(ledger: Ledger) -> None:
    used(ledger, {("output", "gpu_hours"): 1.0})
    used(ledger, {("output", "gpu_hours"): 5.0}, pool="l4")
    first = datetime(2026, 6, 1, tzinfo=UTC)
    rows = usage_rows(
        HOURS[:1],
        {("output", "gpu_hours"): 0.25},
        book="plan:x",
        pool="h100",
        model="m",
        tenant="shop",
        basis="measured",
    )
    for _ in range(2):
        ledger.replace_usage("plan:x", [first], rows)
        found = {r["pool"]: r["quantity"] for r in ledger.usage("pool").to_pylist()}
        assert found == {"h100": Decimal("23.25"), "l4": Decimal(115)}
    ledger.replace_usage("plan:x", [first], rows.slice(0, 0))
    assert ledger.usage("pool", end=datetime(2026, 6, 1, 1, tzinfo=UTC)).num_rows == 0
    with pytest.raises(InputError, match="rows of book plan:x are outside"):
        ledger.replace_usage("actual", [first], rows)
    with pytest.raises(InputError, match="rows of hour 2026-06-01 00:00:00"):
        ledger.replace_usage("plan:x", [datetime(2026, 6, 1, 1, tzinfo=UTC)], rows)


def test_a_replacement_can_be_narrowed_to_pools_and_meters(ledger: Ledger) -> None:
    used(ledger, {("output", "gpu_hours"): 1.0, ("output", "energy_kwh:tier2"): 2.0})
    used(ledger, {("output", "energy_kwh"): 3.0}, pool="l4")
    hour = datetime(2026, 6, 1, tzinfo=UTC)
    rows = usage_rows(
        HOURS[:1],
        {("output", "energy_kwh"): 1.5},
        book="plan:x",
        pool="h100",
        model="m",
        tenant="shop",
        basis="measured",
    )
    ledger.replace_usage("plan:x", [hour], rows, pools=["h100"], meters=["energy_kwh"])
    kept = ledger.usage_rows(
        {"pool": "h100"}, start=hour, end=datetime(2026, 6, 1, 1, tzinfo=UTC)
    ).to_pylist()
    assert {r["meter"]: r["quantity"] for r in kept} == {
        "gpu_hours": Decimal(1),
        "energy_kwh": Decimal("1.5"),
    }
    assert {r["basis"] for r in kept} == {"assumed", "measured"}
    assert ledger.usage("pool", where={"pool": "l4"}).to_pylist() == [{"pool": "l4", "quantity": Decimal(72)}]
    with pytest.raises(InputError, match="rows of pool h100"):
        ledger.replace_usage("plan:x", [hour], rows, pools=["l4"])
    with pytest.raises(InputError, match="rows of meter energy_kwh"):
        ledger.replace_usage("plan:x", [hour], rows, meters=["peak_kw"])


def test_figures_of_a_window_of_hours(ledger: Ledger) -> None:
    used(ledger, {("output", "gpu_hours"): 1.0, ("output", "output_tokens"): 1000})
    priced(ledger, "gpu_hours", 2.0)
    ledger.close()
    start, end = datetime(2026, 6, 1, 3, tzinfo=UTC), datetime(2026, 6, 1, 5, tzinfo=UTC)
    assert ledger.cost(start=start, end=end).to_pylist() == [{"cost_usd": Decimal(4)}]
    assert ledger.usage("meter", start=start, end=end, where={"meter": "output_tokens"}).to_pylist() == [
        {"meter": "output_tokens", "quantity": Decimal(2000)}
    ]
    rows = ledger.metric("usd_per_mtok_total", by=["hour"], start=start, end=end).to_pylist()
    assert [r["hour"] for r in rows] == [start, start.replace(hour=4)]
    assert rows[0]["usd_per_mtok_total"] == pytest.approx(2000.0)


def test_a_filter_on_a_meter_holds_for_its_qualifiers(ledger: Ledger) -> None:
    names = ("output_tokens", "output_tokens:above200000", "output_tokens_in_slo", "input_tokens:above1")
    used(ledger, {("output", name): 10.0**i for i, name in enumerate(names)})
    assert ledger.usage(where={"meter": "output_tokens"}).to_pylist() == [{"quantity": Decimal(24 * 11)}]
    assert ledger.usage_rows({"meter": ["output_tokens"]}).num_rows == 48
    step = ledger.usage("meter", where={"meter": ["output_tokens:above200000"]}).to_pylist()
    assert step == [{"meter": "output_tokens:above200000", "quantity": Decimal(240)}]
    both = ledger.usage("meter", where={"meter": ["output_tokens_in_slo", "input_tokens"]})["meter"]
    assert both.to_pylist() == ["input_tokens:above1", "output_tokens_in_slo"]
    assert ledger.usage("meter", where={"meter": "output%"}).num_rows == 0
    assert ledger.usage("meter", where={"meter": []}).num_rows == 0


def test_the_first_hour_of_a_book_besides_some_meters(ledger: Ledger) -> None:
    assert ledger.first_hour("plan:x") is None
    used(ledger, {("output", "peak_kw:flat"): 1.0})
    assert ledger.first_hour("plan:x", besides=["peak_kw"]) is None
    assert ledger.first_hour("plan:x") == datetime(2026, 6, 1, tzinfo=UTC)
    assert ledger.first_hour("actual") is None


def test_what_close_refuses_can_be_listed(ledger: Ledger) -> None:
    used(ledger, {("output", "gpu_hours"): 1.0, ("output", "egress_gb"): 0.5})
    priced(ledger, "gpu_hours", 2.0)
    first = datetime(2026, 6, 1, tzinfo=UTC)
    assert ledger.unpriced("plan:x") == [
        {"pool": "h100", "meter": "egress_gb", "first_hour": first, "hours": 24}
    ]
    assert ledger.unpriced("actual") == []
    priced(ledger, "egress_gb", 0.0)
    assert ledger.unpriced() == []


def test_a_question_without_a_metric_is_refused(ledger: Ledger) -> None:
    with pytest.raises(InputError, match="name at least one metric: usd_per_mtok_output"):
        ledger.metric()


def test_many_rates_at_once_are_all_there(ledger: Ledger) -> None:
    # DuckDB 2.0.0 lost rows of 122,880 and more from a staging table made in the same transaction.
    hours: Hours = np.arange("2020-01-01T00", "2035-01-01T00", dtype="datetime64[h]")
    rates = rate_rows(
        hours, 1.5, pool="p", meter="gpu_hours", component="rent", basis="quoted", source="test"
    )
    assert rates.num_rows > 130_000
    for _ in range(2):
        ledger.add_rates(rates)
        assert ledger.rates().num_rows == rates.num_rows


def book_of(usd: float, hours: Hours = HOURS) -> tuple[pa.Table, pa.Table]:
    """A GPU-hour and 1,000 tokens an hour, and the hour's price."""
    usage = usage_rows(
        hours, {("output", "gpu_hours"): 1.0, ("output", "output_tokens"): 1000},
        book="plan:shop", pool="h100", model="m", tenant="t", basis="fitted",
    )  # fmt: skip
    rates = rate_rows(
        hours, usd, pool="h100", meter="gpu_hours", component="rent", basis="quoted", source="plan"
    )
    return usage, rates


def costs(ledger: Ledger) -> dict[str, Decimal]:
    return {row["book"]: row["cost_usd"] for row in ledger.cost("book").to_pylist()}


def test_a_book_is_put_whole_and_leaves_others_rates_alone(ledger: Ledger) -> None:
    usage, _ = book_of(0)
    ledger.add_usage(usage.set_column(0, "book", pa.array(["actual"] * len(usage))))
    priced(ledger, "gpu_hours", 2.0)
    in_force = ledger.rates()
    for usd in (5.0, 3.0):
        ledger.put_book("plan:shop", *book_of(usd))
        ledger.close()
        assert costs(ledger) == {"actual": Decimal(48), "plan:shop": Decimal(24) * Decimal(usd)}
    assert ledger.rates() == in_force
    assert set(ledger.rates("plan:shop")["source"].to_pylist()) == {"plan"}
    assert [name for name, *_ in ledger.books()] == ["actual", "plan:shop"]
    # Closed again, alone or with all: the same cents. And its own rates price nobody else.
    ledger.close("plan:shop")
    ledger.add_usage(
        usage_rows(
            HOURS, {("output", "egress_gb"): 1.0}, book="actual", pool="h100", model="", tenant="", basis="measured"
        )
    )  # fmt: skip
    with pytest.raises(MissingRateError, match="egress_gb"):
        ledger.close()
    assert costs(ledger) == {"actual": Decimal(48), "plan:shop": Decimal(72)}
    ledger.drop_book("plan:shop")
    assert costs(ledger) == {"actual": Decimal(48)}
    assert ledger.rates("plan:shop").num_rows == 0
    assert ledger.rates() == in_force


def test_a_book_is_priced_by_its_own_rates_alone(ledger: Ledger) -> None:
    priced(ledger, "gpu_hours", 2.0)  # in force for actual, and no price of the plan's
    ledger.put_book("plan:shop", *book_of(1.0))
    usage, rates = book_of(9.0)
    with pytest.raises(MissingRateError, match="no rate for gpu_hours in pool 'h100' in 24 hours"):
        ledger.put_book("plan:shop", usage, changed(rates, "pool", "h200"))
    with pytest.raises(InputError, match="no rate row came"):
        ledger.put_book("plan:shop", usage, rates.slice(0, 0))
    assert costs(ledger) == {"plan:shop": Decimal(24)}
    assert ledger.unpriced() == []


def test_a_large_book_of_coded_texts(ledger: Ledger) -> None:
    hours: Hours = np.arange("2020-01-01T00", "2036-01-01T00", dtype="datetime64[h]")
    usage, rates = book_of(1.5, hours)
    for _ in range(2):
        ledger.put_book("plan:shop", coded(usage), coded(rates))
        assert costs(ledger) == {"plan:shop": Decimal("1.5") * len(hours)}
        assert ledger.usage_rows().num_rows == len(usage)


def coded(rows: pa.Table) -> pa.Table:
    """Texts as Arrow dictionaries of the shortest index."""
    kind = pa.dictionary(pa.int8(), pa.string())
    fields = [f.with_type(kind) if f.type == pa.string() else f for f in rows.schema]
    return rows.cast(pa.schema(fields))


def changed(rows: pa.Table, name: str, value: Any, kind: Any = None) -> pa.Table:
    at = rows.column_names.index(name)
    column = pa.array([value] * len(rows), kind or rows.schema.field(name).type)
    return rows.set_column(at, name, column)


@pytest.mark.parametrize(
    ("table", "column", "value", "kind", "says"),
    [
        ("usage", "book", "actual", None, "book 'actual' is not 'plan:shop' alone"),
        ("usage", "phase", "decode", None, "phase 'decode' is not of input, output"),
        ("usage", "meter", "output_token", None, "did you mean output_tokens"),
        ("usage", "quantity", Decimal(-1), None, "negative quantity"),
        ("usage", "quantity", None, None, "lack a value in column 'quantity'"),
        ("usage", "quantity", float("nan"), pa.float64(), "column 'quantity' of usage cannot be read"),
        ("usage", "quantity", "1", pa.string(), "is string, not a number"),
        ("usage", "quantity", 1e30, pa.float64(), "column 'quantity' of usage cannot be read"),
        ("usage", "hour", datetime(2026, 6, 1, 0, 30, tzinfo=UTC), None, "at full hours"),
        ("usage", "hour", datetime(2026, 6, 1), pa.timestamp("us"), "not a time with its zone"),  # noqa: DTZ001
        ("usage", "tenant", "a\nb", None, "is not at most 200 printable characters"),
        ("usage", "tenant", "x" * 201, None, "is not at most 200 printable characters"),
        ("usage", "tenant", 1, pa.int64(), "is int64, not text"),
        ("usage", "basis", "guessed", None, "basis 'guessed' is not of measured"),
        ("rates", "component", "rents", None, "did you mean rent"),
        ("rates", "category", "energy", None, "rent is of compute, not of 'energy'"),
        ("rates", "meter", "gpu_hour", None, "did you mean gpu_hours"),
        ("rates", "usd_per_unit", 1e9, pa.float64(), "column 'usd_per_unit' of rates cannot be read"),
    ],
)
def test_rows_that_do_not_belong_change_nothing(
    ledger: Ledger, table: str, column: str, value: Any, kind: Any, says: str
) -> None:
    ledger.put_book("plan:shop", *book_of(1.0))
    rows = dict(zip(("usage", "rates"), book_of(9.0), strict=True))
    rows[table] = changed(rows[table], column, value, kind)
    with pytest.raises(InputError, match=says):
        ledger.put_book("plan:shop", rows["usage"], rows["rates"])
    with pytest.raises(InputError, match="columns"):
        ledger.put_book("plan:shop", rows["rates"], rows["rates"])
    with pytest.raises(InputError, match="no usage row came"):
        ledger.put_book("plan:shop", USAGE.empty_table(), rows["rates"])
    assert costs(ledger) == {"plan:shop": Decimal(24)}


def test_writers_wait_for_one_another(ledger: Ledger) -> None:
    used(ledger, {("output", "gpu_hours"): 1.0})
    priced(ledger, "gpu_hours", 2.0)
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(6):
                ledger.put_book("plan:shop", *book_of(float(turn + 1)))
                ledger.close("plan:x")
                priced(ledger, "gpu_hours", 2.0 + number)
                ledger.drop_book("plan:none")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    ledger.close()
    assert costs(ledger)["plan:shop"] == 24 * 6
