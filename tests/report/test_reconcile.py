"""The book beside the bill: differences to the digit, and bills that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from pertoken.errors import InputError, UnknownNameError
from pertoken.ledger import open_ledger
from pertoken.report.actual import LedgerSource, Source
from pertoken.report.reconcile import read_bill, reconcile
from pertoken.tables import rate_rows, usage_rows
from pertoken.web.serve import reconcile as from_folder

HOURS = np.arange("2026-12-01T00", "2026-12-02T00", dtype="datetime64[h]")
START, END = datetime(2026, 12, 1, tzinfo=UTC), datetime(2026, 12, 2, tzinfo=UTC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A ledger with a day of one pool: 48 USD of rent and 2.4 of software."""
    ledger = open_ledger(tmp_path / "ledger.duckdb")
    used = {("output", "gpu_hours"): 0.5, ("idle", "gpu_hours"): 0.5}
    ledger.add_usage(
        usage_rows(HOURS, used, book="actual", pool="h100", model="m", tenant="t", basis="measured")
    )
    for component, usd in (("rent", 2.0), ("software", 0.1)):
        ledger.add_rates(
            rate_rows(
                HOURS, usd, pool="h100", meter="gpu_hours", component=component, basis="quoted", source="x"
            )
        )
    ledger.close()
    ledger.shut()
    return tmp_path


@pytest.fixture
def source(folder: Path) -> Iterator[Source]:
    ledger = open_ledger(folder / "ledger.duckdb")
    yield LedgerSource(ledger)
    ledger.shut()


def bill(folder: Path, text: str) -> Path:
    path = folder / "bill.csv"
    path.write_text(text)
    return path


def test_a_bill_that_agrees_and_one_that_does_not(folder: Path) -> None:
    good = from_folder(folder, bill(folder, "pool,usd\nh100,50.40\n"), START, END)
    assert good.agrees
    assert good.lines[0].difference_usd == 0
    bad = from_folder(
        folder, bill(folder, 'pool,component,usd\nh100,rent,"1,040.00"\nh100,rent,-980\n'), START, END
    )
    assert not bad.agrees
    assert [(x.component, x.billed_usd, x.booked_usd, x.difference_usd) for x in bad.lines] == [
        ("rent", Decimal("60.00"), Decimal(48), Decimal(-12)),
        ("software", Decimal(0), Decimal("2.4"), Decimal("2.4")),
    ]
    text = str(bad)
    assert "h100  rent        60.00   48.00      -12.00  OFF" in text
    assert [line["agrees"] for line in bad.to_dict()["lines"]] == [False, False]


def test_within_the_tolerance_is_agreed(source: Source) -> None:
    billed = {("h100", ""): Decimal("50.00")}
    assert reconcile(source, billed, START, END).agrees
    assert not reconcile(source, billed, START, END, tolerance_fraction=0.001).agrees


def test_what_cannot_be_set_side_by_side(source: Source) -> None:
    with pytest.raises(UnknownNameError, match="did you mean h100"):
        reconcile(source, {("h10", ""): Decimal(1)}, START, END)
    with pytest.raises(InputError, match="whole and by component"):
        reconcile(source, {("h100", ""): Decimal(1), ("h100", "rent"): Decimal(1)}, START, END)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "found $"),
        ("pool,amount\nh100,1\n", "pool, usd and may have component; found pool, amount"),
        ("pool,usd\nh100,lots\n", r"bill\.csv:2: usd 'lots' is no number"),
        ("pool,usd\nh100,NaN\n", "no number"),
        ("pool,usd\nh100\n", "no number"),
        ("pool,component,usd\nh100,rant,1\n", r"bill\.csv:2: unknown component 'rant': did you mean rent"),
    ],
)
def test_a_bill_that_cannot_be_read(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_bill(bill(tmp_path, text))


def test_a_bill_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_bill(tmp_path / "no.csv")
