"""United States holidays that tariffs treat as weekend days, by rule and never by list of dates."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

from pertoken.errors import InputError, nearest
from pertoken.units import MONTHS_PER_YEAR

DAYS_PER_WEEK = 7
_MONDAY, _THURSDAY = 0, 3


def _nth(month: int, weekday: int, nth: int) -> Callable[[int], dt.date]:
    def date(year: int) -> dt.date:
        if nth > 0:
            first = dt.date(year, month, 1)
            return first + dt.timedelta(
                days=(weekday - first.weekday()) % DAYS_PER_WEEK + DAYS_PER_WEEK * (nth - 1)
            )
        last = dt.date(year + month // MONTHS_PER_YEAR, month % MONTHS_PER_YEAR + 1, 1) - dt.timedelta(days=1)
        return last - dt.timedelta(days=(last.weekday() - weekday) % DAYS_PER_WEEK)

    return date


def _fixed(month: int, day: int) -> Callable[[int], dt.date]:
    return lambda year: dt.date(year, month, day)


HOLIDAYS: dict[str, Callable[[int], dt.date]] = {
    "new-year": _fixed(1, 1),
    "mlk": _nth(1, _MONDAY, 3),
    "lincoln": _fixed(2, 12),
    "presidents": _nth(2, _MONDAY, 3),
    "memorial": _nth(5, _MONDAY, -1),
    "juneteenth": _fixed(6, 19),
    "independence": _fixed(7, 4),
    "labor": _nth(9, _MONDAY, 1),
    "columbus": _nth(10, _MONDAY, 2),
    "veterans": _fixed(11, 11),
    "thanksgiving": _nth(11, _THURSDAY, 4),
    "day-after-thanksgiving": lambda year: _nth(11, _THURSDAY, 4)(year) + dt.timedelta(days=1),
    "christmas-eve": _fixed(12, 24),
    "christmas": _fixed(12, 25),
}
HOLIDAY_SETS: dict[str, tuple[str, ...]] = {
    "us-nerc": ("new-year", "memorial", "independence", "labor", "thanksgiving", "christmas"),
    "us-federal": (
        "new-year", "mlk", "presidents", "memorial", "juneteenth", "independence", "labor", "columbus",
        "veterans", "thanksgiving", "christmas",
    ),
}  # fmt: skip


def holiday_dates(year: int, names: tuple[str, ...], observed: str = "none") -> list[dt.date]:
    """Dates of United States holidays by name in a year; ``monday`` adds the Monday after one on a Sunday.

    Raises InputError on an unknown holiday.

    >>> [d.isoformat() for d in holiday_dates(2026, ("memorial", "thanksgiving"))]
    ['2026-05-25', '2026-11-26']
    """
    dates = []
    for name in names:
        if name not in HOLIDAYS:
            near = nearest(name, HOLIDAYS) or list(HOLIDAYS)
            raise InputError(f"unknown holiday {name!r}: did you mean {', '.join(near)}?")
        date = HOLIDAYS[name](year)
        dates.append(date)
        if observed == "monday" and date.weekday() == DAYS_PER_WEEK - 1:
            dates.append(date + dt.timedelta(days=1))
    return dates
