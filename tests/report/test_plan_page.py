"""The times under a plan's figures: local, of 24 hours, and few."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pertoken.rates._local import local_hours
from pertoken.report._plan_page import _time_axis


def ticks(start: str, hours: int, timezone: str) -> dict[int, str]:
    """By an hour's place, what is written under it."""
    first = np.datetime64(start, "h")
    axis = _time_axis(local_hours(np.arange(first, first + hours), timezone), timezone)["axis"]
    names = re.findall(r"'([^']*)'", axis["labelExpr"])
    return dict(zip(axis["values"], names, strict=True))


def test_two_days_have_hours_and_dates() -> None:
    # Midnight of Los Angeles in winter is 08:00 UTC.
    assert ticks("2027-02-01T08", 48, "America/Los_Angeles") == {
        0: "02-01", 6: "06:00", 12: "12:00", 18: "18:00", 24: "02-02", 30: "06:00", 36: "12:00", 42: "18:00"
    }  # fmt: skip


def test_a_fortnight_has_days_and_a_clock_that_goes_back_moves_them() -> None:
    # On 2027-11-07 Los Angeles has 25 hours.
    found = ticks("2027-11-01T07", 14 * 24 + 1, "America/Los_Angeles")
    assert list(found.values()) == [f"11-{day:02d}" for day in range(1, 15)]
    assert [at for at, name in found.items() if name in ("11-07", "11-08")] == [6 * 24, 7 * 24 + 1]


@pytest.mark.parametrize(
    ("days", "count", "second"), [(31, 5, "01-08"), (90, 13, "01-08"), (365, 12, "02-01"), (1, 4, "06:00")]
)
def test_longer_ones_have_weeks_then_months(days: int, count: int, second: str) -> None:
    found = ticks("2027-01-01T00", days * 24, "UTC")
    assert (len(found), list(found.values())[:2]) == (count, ["01-01", second])


def test_a_zone_half_an_hour_off_has_the_hour_it_begins_in() -> None:
    assert ticks("2027-02-01T18", 12, "Asia/Kolkata") == {0: "02-01", 1: "02-02", 7: "06:00"}
