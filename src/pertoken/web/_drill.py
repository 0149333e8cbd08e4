"""Looking back through the ledger: a window, a book, filters one inside the other, and the way out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import Depends

from pertoken.errors import InputError, UnknownNameError
from pertoken.report.spend import ROW_KEYS, label
from pertoken.units import HOURS_PER_DAY
from pertoken.web._doors import Moment, ServiceHere
from pertoken.web._question import Looking, Question

WINDOWS = {"24h": "24 h", "7d": "7 days", "30d": "30 days", "month": "this month", "all": "all"}
"""Name of a window in an address to what it is called on a page."""
_DEFAULT = "7d"
_DAYS = {"24h": 1, "7d": 7, "30d": 30}
_HOUR = timedelta(hours=1)
_YEARS = (1970, 9000)


@dataclass(frozen=True)
class Drill:
    """What a page looks at: a question of one book, within its window perhaps one hour, and what else it keeps."""

    question: Question
    window: str = ""
    """Its name; empty where the address gave the hours themselves."""
    hour: datetime | None = None
    more: Mapping[str, str] = field(default_factory=dict)
    """Further parameters of the page, kept on the way in and out."""

    @property
    def book(self) -> str:
        """The book."""
        return self.question.where["book"][0]

    @property
    def effective(self) -> Question:
        """The question, of the one hour where there is one."""
        if self.hour is None:
            return self.question
        return replace(self.question, start=self.hour, end=self.hour + _HOUR)

    @property
    def asked(self) -> dict[str, Any]:
        """As keyword arguments of the ledger's questions."""
        return self.effective.asked

    def query(self, **changes: str | Sequence[str] | datetime | None) -> str:
        """The query string that shows the same, but for the `changes`; its hours written out, so that it stays so."""
        kept: dict[str, Any] = {**self.more, "hour": self.hour}
        if self.window == "all":
            kept["window"] = "all"
        return self.question.query(**{**kept, **changes})

    def single(self, key: str) -> str | None:
        """The one name that a dimension is narrowed to, if it is."""
        names = self.question.where.get(key, ())
        return names[0] if len(names) == 1 else None

    @property
    def open(self) -> list[str]:
        """Dimensions of a cost row that are not narrowed to one name yet, the hour last."""
        found = [key for key in ROW_KEYS if key != "hour" and self.single(key) is None]
        return found if self.hour else [*found, "hour"]

    def narrowed(self, row: Mapping[str, Any], by: Sequence[str] = ()) -> Drill:
        """Inside one row: of these names alone (and, where it has one, this hour)."""
        where = {**self.question.where, **{key: [str(row[key])] for key in row if key != "hour"}}
        hour = row.get("hour", self.hour)
        return replace(self, question=replace(self.question, where=where, by=list(by)), hour=hour)

    def widened(self, *keys: str) -> Drill:
        """Without what narrows these dimensions."""
        hour = None if "hour" in keys else self.hour
        return replace(self, question=self.question.without(*keys), hour=hour)

    def crumbs(self, fixed: str = "") -> list[tuple[str, str]]:
        """Dimension and names of each narrowing, but for the book and the dimension `fixed` by the caller's token."""
        found = [
            (key, " or ".join(label(key, name) for name in names))
            for key, names in self.question.where.items()
            if key not in ("book", fixed)
        ]
        return [*found, ("hour", label("hour", self.hour))] if self.hour else found

    def windows(self) -> list[tuple[str, str, bool]]:
        """Name, query string and whether it is the one shown, of each window."""
        plain = replace(self, question=replace(self.question, start=None, end=None), hour=None, window="")
        return [(told, plain.query(window=name), name == self.window) for name, told in WINDOWS.items()]

    @property
    def told(self) -> str:
        """The hours in words, in UTC."""
        start, end = self.effective.start, self.effective.end
        if start and end:
            return f"{start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC"
        return (
            f"from {start:%Y-%m-%d %H:%M} UTC"
            if start
            else f"up to {end:%Y-%m-%d %H:%M} UTC"
            if end
            else "all hours"
        )


def _drill(service: ServiceHere, question: Looking, window: str = "", hour: Moment | None = None) -> Drill:
    """The window is the last 7 days unless one is named, or hours are given."""
    if len(question.where.get("book", ())) != 1:
        raise InputError("choose one book: two of them summed would mean nothing")
    start, end = _utc(question.start), _utc(question.end)
    named = "" if start or end else window or _DEFAULT
    if named:
        start, end = hours_of(named, service.now())
    inside = _utc(hour)
    return Drill(replace(question, start=start, end=end), named, _full(inside) if inside else None)


def _full(moment: datetime) -> datetime:
    return moment.replace(minute=0, second=0, microsecond=0)


def _utc(moment: datetime | None) -> datetime | None:
    if moment is None:
        return None
    if not _YEARS[0] <= moment.year <= _YEARS[1]:
        raise InputError(f"the year {moment.year} is not between {_YEARS[0]} and {_YEARS[1]}")
    return moment.astimezone(UTC)


Drilling = Annotated[Drill, Depends(_drill)]


def hours_of(window: str, now: datetime) -> tuple[datetime | None, datetime | None]:
    """The full hours of a named window (UTC) up to `now`; the month that of the last of them. Raises UnknownNameError.

    The hour that is not over is in no book: with it a day would have 23 hours, and change once it closes.
    """
    if window not in WINDOWS:
        raise UnknownNameError("window", window, WINDOWS)
    end = _full(now.astimezone(UTC))
    if window == "all":
        return None, None
    if window == "month":
        return (end - _HOUR).replace(day=1, hour=0), end
    return end - _HOUR * (HOURS_PER_DAY * _DAYS[window]), end
