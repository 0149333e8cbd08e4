"""The billing month in which metering began: the peak that was set before counts in it, and in no other."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from pertoken import catalog
from pertoken.report.books import HOUR, Books
from tests.report.test_books import PLAIN, START, Make, peaks, told, usd

FIRST = datetime(2026, 11, 1, 7, tzinfo=UTC)  # midnight in Los Angeles, summer time
DECEMBER = datetime(2026, 12, 1, 8, tzinfo=UTC)


def with_peak(kw: float) -> str:
    return PLAIN.replace("pue: 1.0", f"pue: 1.0, peak_so_far_kw: {{flat: {kw}}}")


@pytest.mark.parametrize(("so_far", "billed"), [(20.0, 20), (5.0, 9)])
def test_the_peak_before_metering_began_is_billed(books_of: Make, so_far: float, billed: int) -> None:
    books = books_of(with_peak(so_far))
    told(books, START, "it_energy_kwh", 9, "node/pdu")
    books.close_due(START + HOUR)
    assert peaks(books) == [(FIRST, Decimal(billed))]
    assert usd(books)["demand_charge"] == 10 * billed
    # What nobody here drew is nobody's: phase idle.
    rows = books.ledger.cost("phase", where={"component": "demand_charge", "book": "actual"}).to_pylist()
    assert sum(r["cost_usd"] for r in rows) == 10 * billed
    # The month after knows its own peaks alone.
    told(books, DECEMBER, "it_energy_kwh", 3, "node/pdu")
    books.close([DECEMBER])
    assert peaks(books) == [(FIRST, Decimal(billed)), (DECEMBER, Decimal(3))]
    # Closed again, in whatever order, it is the same.
    books.close([START])
    assert peaks(books) == [(FIRST, Decimal(billed)), (DECEMBER, Decimal(3))]


def under_a_ratchet(extra: str = "") -> str:
    """A site whose demand charge bills at least 75 % of what was billed in any of the eleven months before."""
    text = PLAIN.replace("{usd_per_kwh: 0.1, demand_usd_per_kw: 10}", "Osage Large Industrial")
    return text.replace("America/Los_Angeles", "America/Chicago").replace("pue: 1.0", f"pue: 1.0{extra}")


def billed(books: Books, *months: tuple[datetime, float]) -> list[Decimal]:
    """kW billed by month, once an hour of each was closed."""
    for hour, kwh in months:
        told(books, hour, "it_energy_kwh", kwh, "node/pdu")
        books.close([hour])
    rows = books.ledger.usage("hour", where={"meter": "peak_kw", "book": "actual"}).to_pylist()
    return [r["quantity"] for r in sorted(rows, key=lambda r: str(r["hour"]))]


def test_a_ratchet_looks_back_on_the_peak_before_metering_began(books_of: Make) -> None:
    ratchet = catalog.tariff("Osage Large Industrial").demand[0].ratchet
    assert ratchet is not None
    assert (ratchet.fraction, ratchet.peaks) == (0.75, "billed")
    july, august = datetime(2026, 7, 10, 20, tzinfo=UTC), datetime(2026, 8, 10, 20, tzinfo=UTC)
    least = catalog.tariff("Osage Large Industrial").demand[0].minimum_kw
    assert least < 400
    plain = billed(books_of(under_a_ratchet(), "one"), (july, 4000.0), (august, 600.0))
    assert plain == [4000, 3000]
    raised = billed(
        books_of(under_a_ratchet(", peak_so_far_kw: {flat: 8000}"), "two"), (july, 4000.0), (august, 600.0)
    )
    assert raised == [8000, 6000]
    # A late hour of July moves August, too.
    late = billed(books_of(under_a_ratchet(), "three"), (july, 400.0), (august, 60.0), (july + HOUR, 6000.0))
    assert late == [6000, 4500]
