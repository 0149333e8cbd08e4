"""Local time of UTC hours: the one place where a tariff's local windows meet the UTC clock."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import numpy.typing as npt

from pertoken.catalog.holidays import DAYS_PER_WEEK, holiday_dates
from pertoken.errors import InputError
from pertoken.units import HOURS_PER_DAY, MONTHS_PER_YEAR, SECONDS_PER_HOUR

Hours = npt.NDArray[np.datetime64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MINUTES_PER_HOUR = 60
_EPOCH_YEAR = 1970
_EPOCH_WEEKDAY = 3  # 1970-01-01 was a Thursday; Monday is 0
_SATURDAY = 5


@dataclass(frozen=True)
class LocalHours:
    """Local calendar of UTC hours, arrays of shape (T,): year, month (1 to 12), day of month, hour (0 to
    23), and `weekend` (Saturday, Sunday or a holiday that counts as one)."""

    year: Ints
    month: Ints
    day: Ints
    hour: Ints
    weekend: Bools


def local_hours(
    hours_utc: Hours, timezone: str, holidays: tuple[str, ...] = (), observed: str = "none"
) -> LocalHours:
    """The local calendar of each UTC hour [shape (T,)].

    An hour belongs to the local hour it begins in; days of 23 and 25 hours come out as the clocks have them.
    In a zone half an hour off UTC an hour straddles two local ones and counts as the first.
    Raises InputError on an unknown time zone.

    >>> at = local_hours(np.array(["2026-07-01T00"], "datetime64[h]"), "America/Los_Angeles")
    >>> int(at.month[0]), int(at.day[0]), int(at.hour[0])
    (6, 30, 17)
    """
    local_minutes = hours_utc.astype("datetime64[m]") + offsets_minutes(hours_utc, timezone)
    days = local_minutes.astype("datetime64[D]")
    months = local_minutes.astype("datetime64[M]").astype(np.int64)
    day_number = days.astype(np.int64)
    weekend = (day_number + _EPOCH_WEEKDAY) % DAYS_PER_WEEK >= _SATURDAY
    if holidays and len(hours_utc):
        years = np.unique(months // MONTHS_PER_YEAR) + _EPOCH_YEAR
        dates = [d for year in years for d in holiday_dates(int(year), holidays, observed)]
        weekend = weekend | np.isin(days, np.array(dates, dtype="datetime64[D]"))
    first = local_minutes.astype("datetime64[M]").astype("datetime64[D]")
    return LocalHours(
        year=months // MONTHS_PER_YEAR + _EPOCH_YEAR,
        month=months % MONTHS_PER_YEAR + 1,
        day=(days - first).astype(np.int64) + 1,
        hour=(local_minutes.astype(np.int64) // MINUTES_PER_HOUR) % HOURS_PER_DAY,
        weekend=weekend,
    )


def offsets_minutes(hours_utc: Hours, timezone: str) -> Ints:
    """Minutes that local time is ahead of UTC at each hour, shape (T,)."""
    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InputError(f"time zone {timezone!r} is no IANA name such as America/Los_Angeles") from error
    if not len(hours_utc):
        return np.zeros(0, dtype=np.int64)

    def offset(hour_number: int) -> int:
        at = dt.datetime.fromtimestamp(hour_number * SECONDS_PER_HOUR, tz=zone)
        delta = at.utcoffset() or dt.timedelta(0)
        return int(delta.total_seconds()) * MINUTES_PER_HOUR // SECONDS_PER_HOUR

    numbers = hours_utc.astype("datetime64[h]").astype(np.int64)
    days, inverse = np.unique(numbers // HOURS_PER_DAY, return_inverse=True)
    at_start = {int(d): offset(int(d) * HOURS_PER_DAY) for d in {*days.tolist(), *(days + 1).tolist()}}
    per_day = np.array([at_start[int(d)] for d in days], dtype=np.int64)
    result = per_day[inverse]
    # Clocks change inside a UTC day only where the next day begins with another offset: look hour by hour
    # there.
    changing = np.array([at_start[int(d)] != at_start[int(d) + 1] for d in days])
    for index in np.flatnonzero(changing[inverse]):
        result[index] = offset(int(numbers[index]))
    return result


def month_bounds(year: int, month: int, timezone: str) -> tuple[int, int]:
    """First UTC hour number (since 1970) of a local calendar month, and of the month after it."""
    zone = ZoneInfo(timezone)
    after = (year + month // MONTHS_PER_YEAR, month % MONTHS_PER_YEAR + 1)

    def first_hour(y: int, m: int) -> int:
        # A month that begins off the hour (half-hour zones) begins, for us, with the first full UTC hour
        # in it.
        return -int(-dt.datetime(y, m, 1, tzinfo=zone).timestamp() // SECONDS_PER_HOUR)

    return first_hour(year, month), first_hour(*after)
