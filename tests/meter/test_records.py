"""Records are checked at the door, and summed exactly in any order."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pertoken.errors import InputError, UnknownNameError
from pertoken.meter import RECORDS, TOTALS, concat, records, totals
from pertoken.meter.records import EVIDENCE, PHASE_OF, checked, refuse_times
from pertoken.units import METERS, PHASES

GOOD: dict[str, Any] = {"ts": [0.0], "source": "usage/a", "key": "k", "meter": "requests", "quantity": [1.0]}


def test_phases_and_names_are_of_the_closed_lists() -> None:
    assert set(PHASE_OF.values()) <= set(PHASES)
    assert set(PHASE_OF) <= set(METERS) | set(EVIDENCE)
    assert not set(METERS) & set(EVIDENCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantity": [-1.0]}, "-1"),
        ({"quantity": [float("nan")]}, "nan"),
        ({"quantity": [1e13]}, "between 0 and"),
        ({"quantity": ["x"]}, "quantity"),
        ({"meter": "tokens"}, "output_tokens"),
        ({"phase": "decode"}, "phase"),
        ({"basis": "guessed"}, "basis"),
        ({"source": "nobody"}, "kind/name"),
        ({"source": "oracle/a"}, "kind/name"),
        ({"source": "usage/"}, "kind/name"),
        ({"model": "m" * 600}, "512"),
        ({"key": "k" * 600}, "512"),
        ({"key": [None]}, "lack a value"),
        ({"ts": [float("inf")]}, "POSIX"),
        ({"tenant": ["\ud800"]}, "tenant"),
    ],
)
def test_what_does_not_belong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        records({**GOOD, **change}, 1)


def test_a_name_that_is_nearly_right_is_offered() -> None:
    with pytest.raises(
        InputError, match=r"unknown meter 'outputtokens': did you mean output_tokens"
    ) as caught:
        records({**GOOD, "meter": "outputtokens"}, 1)
    assert isinstance(caught.value.__cause__, UnknownNameError)
    with pytest.raises(InputError, match="unknown meter 'zzz': one of input_tokens, "):
        records({**GOOD, "meter": "zzz"}, 1)
    with pytest.raises(InputError, match="columns"):
        checked(pa.table({"a": [1]}))


@pytest.mark.parametrize("bad", [0, 1, 6, 99])
@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("quantity", -1.0, "a quantity of -1.0"),
        ("meter", "", "neither a meter nor a usage block"),
        ("phase", "zzz", "unknown phase 'zzz': one of input"),
    ],
)
def test_the_first_record_that_does_not_belong_is_named(bad: int, column: str, value: Any, says: str) -> None:
    rows = {
        "ts": [1.0] * 100, "source": "usage/a", "key": [f"k{i}" for i in range(100)], "meter": ["requests"] * 100,
        "phase": ["output"] * 100, "quantity": [1.0] * 100,
    }  # fmt: skip
    for at in (bad, 99):
        rows[column] = [*rows[column][:at], value, *rows[column][at + 1 :]]
    with pytest.raises(InputError, match=f"the record of key 'k{bad}': .*{says}"):
        records(rows, 100)


def test_a_clock_that_jumped_is_refused() -> None:
    now = datetime(2026, 11, 24, 7, tzinfo=UTC)
    rows = records({**GOOD, "ts": [now.timestamp()]}, 1)
    day = timedelta(days=1)
    assert refuse_times(rows, now - day, now + day) is rows
    assert refuse_times(concat([]), now, now).num_rows == 0
    with pytest.raises(InputError, match="clock"):
        refuse_times(rows, now + day, now + 2 * day)


_ROW = st.tuples(
    st.floats(0, 20_000),
    st.floats(0, 1e6),
    st.sampled_from(["requests", "energy_kwh"]),
    st.sampled_from(["a", "b"]),
)


@given(st.lists(_ROW, max_size=40), st.randoms(use_true_random=False))
def test_totals_are_exact_and_the_same_in_any_order(
    rows: list[tuple[float, float, str, str]], rng: random.Random
) -> None:
    def table(of: list[tuple[float, float, str, str]]) -> pa.Table:
        columns = {
            "ts": [r[0] for r in of],
            "source": "usage/a",
            "key": [str(i) for i in range(len(of))],
            "meter": [r[2] for r in of],
            "model": [r[3] for r in of],
            "quantity": [r[1] for r in of],
        }
        return records(columns, len(of))

    first = totals(table(rows))
    assert first.schema == TOTALS
    shuffled = list(rows)
    rng.shuffle(shuffled)
    assert totals(table(shuffled)).equals(first)
    exact: dict[tuple[int, str, str], Fraction] = {}
    for ts, quantity, meter, model in rows:
        key = (round(ts * 1e6) // 3_600_000_000, meter, model)
        exact[key] = exact.get(key, Fraction(0)) + Fraction(quantity)
    assert len(exact) == first.num_rows
    for row in first.to_pylist():
        key = (int(row["hour"].timestamp()) // 3600, row["meter"], row["model"])
        assert abs(Fraction(row["quantity"]) - exact[key]) < Fraction(1, 10**8)


def test_schemas_say_what_the_docs_say() -> None:
    assert RECORDS.names == [
        "ts",
        "source",
        "key",
        "pool",
        "model",
        "tenant",
        "phase",
        "meter",
        "quantity",
        "basis",
    ]
