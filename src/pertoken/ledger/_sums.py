"""Sums kept beside the hourly rows, so that a question over a year need not read each of its rows.

Every sum here is one that the hourly rows give too, to the digit: quantities and costs are decimals, and adding up days
is adding up their hours. A day (or month) of a book whose rows change is struck off the list of what is summed, in the
same transaction; from then on questions read its hourly rows, until it is summed again. The newest day of a book stays
unsummed: it changes with every close.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

import pyarrow as pa

from pertoken.ledger._engine import Engine
from pertoken.units import MONTHS_PER_YEAR

Grain = Literal["hour", "day", "month"]
Fact = Literal["usage", "cost"]
Window = tuple[datetime | None, datetime | None]

_DAY = timedelta(days=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MOST_RUNS = 16
"""Runs of summed days that one question reads; with more holes than that the smallest runs are read by the hour."""
_COLUMNS: dict[Fact, tuple[str, ...]] = {
    "usage": ("phase", "meter", "quantity"),
    "cost": ("phase", "category", "component", "cost_usd"),
}
_TEXT = "VARCHAR"
_KINDS = {"quantity": "DECIMAL(38, 6)", "cost_usd": "DECIMAL(38, 9)", "hour": "TIMESTAMP WITH TIME ZONE"}


@dataclass(frozen=True)
class Sums:
    """One kept sum: of which grain, by which of pool, model and tenant, and whether whole months of it are made."""

    name: str
    grain: Grain
    dimensions: tuple[str, ...]
    by_the_month: bool = False

    def table(self, fact: Fact) -> str:
        """Where it is kept; the column ``hour`` holds the first hour of the day or month."""
        return f"{fact}_{self.name}"

    def columns(self, fact: Fact) -> tuple[str, ...]:
        """Its columns, the sum last."""
        return ("book", "hour", *self.dimensions, *_COLUMNS[fact])


BY_HOUR = Sums("by_hour", "hour", ("pool", "model"))
BY_DAY = Sums("by_day", "day", ("pool", "model"))
BY_TENANT = Sums("by_tenant_day", "day", ("tenant",))
BY_MONTH = Sums("by_month", "month", ("pool", "model", "tenant"), by_the_month=True)
BY_TENANT_HOUR = Sums("by_tenant_hour", "hour", ("tenant",), by_the_month=True)
"""A month of it lies in order of tenants, so that reading one of them passes over the others."""
ALONE = Sums("by_hour_alone", "hour", ())
KEPT = (ALONE, BY_HOUR, BY_DAY, BY_TENANT, BY_MONTH, BY_TENANT_HOUR)
FACTS: tuple[Fact, ...] = ("usage", "cost")

SUM_TABLES = (
    "CREATE TABLE IF NOT EXISTS summed (book VARCHAR, grain VARCHAR, start TIMESTAMP WITH TIME ZONE)",
    *(
        f"CREATE TABLE IF NOT EXISTS {sums.table(fact)} "
        f"({', '.join(f'{name} {_KINDS.get(name, _TEXT)}' for name in sums.columns(fact))})"
        for sums in KEPT
        for fact in FACTS
    ),
)


def prepare(engine: Engine) -> None:
    """Make the tables of sums where they are missing; nothing counts as summed where one of them was."""
    there = set(engine.query("SELECT table_name FROM information_schema.tables")["table_name"].to_pylist())
    for statement in SUM_TABLES:
        engine.execute(statement)
    if any(sums.table(fact) not in there for sums in KEPT for fact in FACTS):
        engine.execute("DELETE FROM summed")


@dataclass(frozen=True)
class Source:
    """A FROM clause, and its parameters."""

    sql: str
    parameters: tuple[object, ...] = ()


@dataclass
class _Book:
    """Days and months of a book, as numbers: those with usage, and those that are summed."""

    # Frozen: a reader goes through one while the writer puts another in its place.
    days: frozenset[int] = frozenset()
    summed: frozenset[int] = frozenset()
    months: frozenset[int] = frozenset()


class Summed:
    """What of a ledger is summed, kept in step with its rows; for one writer and any number of readers.

    `stamp` is even while what is said here is so, and odd while a transaction that strikes something off is under way.
    What a transaction struck off that came to nothing stays struck off here: its hourly rows are read, which say the
    same, until they are summed again.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.stamp = 0
        self._held = False
        self._books: dict[str, _Book] = {}
        for row in engine.query("SELECT book, grain, start FROM summed").to_pylist():
            known = self._books.setdefault(row["book"], _Book())
            if row["grain"] == "day":
                known.summed |= {_day(row["start"])}
            else:
                known.months |= {_month(row["start"])}
        self._looked = False

    # -- reading

    def source(
        self, fact: Fact, needed: Collection[str], books: Sequence[str] | None, window: Window
    ) -> Source:
        """Where a question reads: hourly rows, or sums where they give the same.

        Parameters: needed, the dimensions it groups or filters by (``hour``, ``pool``, ``model``, ``tenant``); books it
        asks for, None for all; its window [UTC].
        """
        base = f"{fact}_hourly"
        kept = _choice(needed)
        if kept is None:
            return Source(base)
        of = [(name, known) for name, known in list(self._books.items()) if books is None or name in books]
        runs = {name: found for name, known in of if (found := _runs(known, kept, window))}
        if not runs:
            return Source(base)
        columns = ", ".join(dict.fromkeys(("book", "hour", *(d for d in kept.dimensions), *_COLUMNS[fact])))
        parts: list[str] = []
        parameters: list[object] = []

        def read(table: str, book: str, start: datetime | None, end: datetime | None) -> None:
            tests, values = _between(book, start, end)
            parts.append(f"SELECT {columns} FROM {table} WHERE {tests}")
            parameters.extend(values)

        for book, spans in runs.items():
            at = window[0]
            for start, end in spans:
                if at is None or at < start:
                    read(base, book, at, start)
                read(kept.table(fact), book, start, end)
                at = end
            if window[1] is None or (at is not None and at < window[1]):
                read(base, book, at, window[1])
        for book in books or ():
            if book not in runs:
                read(base, book, *window)
        if books is None:
            parts.append(f"SELECT {columns} FROM {base} WHERE book NOT IN ({', '.join('?' for _ in runs)})")
            parameters += runs
        return Source(f"({' UNION ALL '.join(parts)}) AS {base}", tuple(parameters))

    def edges(self) -> Source:
        """Hourly rows among which each book's first and last are: of the summed days, those at the ends alone."""
        parts: list[str] = []
        parameters: list[object] = []
        books = {name: known.summed for name, known in list(self._books.items()) if known.summed}
        for book, summed in books.items():
            ends = sorted({min(summed), max(summed)})
            spans: list[Window] = [(_day_start(d), _day_start(d + 1)) for d in ends]
            at: datetime | None = None
            for first, last in _consecutive(sorted(summed)):
                spans.append((at, _day_start(first)))
                at = _day_start(last + 1)
            for start, end in [*spans, (at, None)]:
                tests, values = _between(book, start, end)
                parts.append(f"SELECT book, hour FROM usage_hourly WHERE {tests}")
                parameters += values
        if not books:
            return Source("usage_hourly")
        parts.append(
            f"SELECT book, hour FROM usage_hourly WHERE book NOT IN ({', '.join('?' for _ in books)})"
        )
        return Source(f"({' UNION ALL '.join(parts)}) AS usage_hourly", (*parameters, *books))

    # -- writing

    @contextmanager
    def striking(self, changed: Mapping[str, Iterable[int]]) -> Iterator[None]:
        """One transaction, inside which these days of books change: they are no longer summed, nor are their months."""
        days = {book: frozenset(d) for book, d in changed.items()}
        gone = {
            book: (known.summed & days[book], known.months & set(map(_month_of, days[book])))
            for book, known in self._books.items()
            if book in days
        }
        with self._stamped(any(d or m for d, m in gone.values())):
            with self._engine.transaction():
                for book, (struck, months) in gone.items():
                    self._forget(book, "day", map(_day_start, sorted(struck)))
                    self._forget(book, "month", map(_month_start, sorted(months)))
                yield
            for book, these in days.items():
                known = self._books.setdefault(book, _Book())
                known.days |= these
                known.months -= frozenset(map(_month_of, these))
                known.summed -= these

    @contextmanager
    def dropping(self, book: str) -> Iterator[None]:
        """One transaction, inside which all rows of a book change: its sums go."""
        with self._stamped(book in self._books):
            with self._engine.transaction():
                for table in ("summed", *(sums.table(fact) for sums in KEPT for fact in FACTS)):
                    self._engine.execute(f"DELETE FROM {table} WHERE book = ?", [book])
                yield
            self._books.pop(book, None)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """One transaction that those inside are parts of."""
        self._held = True
        try:
            with self._engine.transaction():
                yield
        finally:
            self._held = False
            self.stamp += self.stamp % 2

    @contextmanager
    def _stamped(self, anything: bool) -> Iterator[None]:
        """`stamp` odd meanwhile; where a transaction is held, to its end."""
        self.stamp += anything and self.stamp % 2 == 0
        try:
            yield
        finally:
            self.stamp += not self._held and self.stamp % 2

    def _forget(self, book: str, grain: Grain, starts: Iterable[datetime]) -> None:
        these = list(starts)
        if these:
            marks = ", ".join("?" for _ in these)
            self._engine.execute(
                f"DELETE FROM summed WHERE book = ? AND grain = ? AND start IN ({marks})",
                [book, grain, *these],
            )

    def within(self, book: str | None, window: Window) -> dict[str, list[int]]:
        """Days of a book (None: of all) that a window touches and that are in a sum: their own, or their month's.

        A month sums all its days, those without usage too: they may have costs that a close has yet to take away.
        """
        start, end = window
        found: dict[str, list[int]] = {}
        for name, known in self._books.items():
            if book in (None, name):
                of_months = {
                    d for m in known.months for d in range(_day(_month_start(m)), _day(_month_start(m + 1)))
                }
                found[name] = [
                    d for d in known.summed | of_months
                    if (start is None or _day_start(d + 1) > start) and (end is None or _day_start(d) < end)
                ]  # fmt: skip
        return found

    def sum_up(self, most_months: int | None = None) -> None:
        """Sum what is not: full days of every book but its newest, and full months of such days.

        One transaction a month of a book, the newest first, at most `most_months` of each book (None: all); what is
        summed is told as soon as it is committed.
        """
        if not self._looked:
            rows = self._engine.query(
                "SELECT DISTINCT book, date_trunc('day', hour) AS day FROM usage_hourly"
            )
            for row in rows.to_pylist():
                self._books.setdefault(row["book"], _Book()).days |= {_day(row["day"])}
            self._looked = True
        for book, known in list(self._books.items()):
            due: dict[int, list[int]] = defaultdict(list)
            newest = max(known.days, default=0)
            for day in sorted(known.days - known.summed - {newest}):
                due[_month_of(day)].append(day)
            for month in {_month_of(day) for day in known.days} - known.months - {_month_of(newest)}:
                due.setdefault(month, [])
            for month, days in sorted(due.items(), reverse=True)[:most_months]:
                self._sum_month(book, known, month, days, whole=month != _month_of(newest))

    def _sum_month(self, book: str, known: _Book, month: int, days: list[int], whole: bool) -> None:
        there: set[int] = set()
        with self._engine.transaction():
            for first, last in _consecutive(days):
                span = (_day_start(first), _day_start(last + 1))
                for sums in KEPT:
                    if not sums.by_the_month:
                        self._fill(sums, book, span)
                there |= self._with_usage(book, span)
            if whole:
                for sums in KEPT:
                    if sums.by_the_month:
                        self._fill(sums, book, (_month_start(month), _month_start(month + 1)))
            marks: list[tuple[str, datetime]] = [("day", _day_start(d)) for d in sorted(there)]
            marks += [("month", _month_start(month))] if whole else []
            self._engine.execute(
                "DELETE FROM summed WHERE book = ? AND grain = 'month' AND start = ?",
                [book, _month_start(month)],
            )
            if marks:
                self._engine.load("summed", _marks(book, marks))
        known.days -= frozenset(days) - there
        known.summed |= there
        if whole:
            known.months |= {month}

    def _with_usage(self, book: str, span: tuple[datetime, datetime]) -> set[int]:
        found = self._engine.query(
            f"SELECT DISTINCT hour FROM {BY_TENANT.table('usage')} WHERE book = ? AND hour >= ? AND hour < ?",
            [book, *span],
        )
        return {_day(hour) for hour in found["hour"].to_pylist() if hour is not None}

    def _fill(self, sums: Sums, book: str, span: tuple[datetime, datetime]) -> None:
        """Sums of a book over full days (or months), in place of what was there."""
        start = "hour" if sums.grain == "hour" else f"date_trunc('{sums.grain}', hour)"
        for fact in FACTS:
            keys = ", ".join(sums.columns(fact)[2:-1])
            order = "tenant, start" if sums is BY_TENANT_HOUR else f"start, {keys}"
            column = _COLUMNS[fact][-1]
            self._engine.execute(
                f"DELETE FROM {sums.table(fact)} WHERE book = ? AND hour >= ? AND hour < ?", [book, *span]
            )
            self._engine.execute(
                f"INSERT INTO {sums.table(fact)} SELECT book, {start} AS start, {keys}, SUM({column}) "
                f"FROM {fact}_hourly WHERE book = ? AND hour >= ? AND hour < ? GROUP BY book, start, {keys} "
                f"ORDER BY {order}",
                [book, *span],
            )


def _between(book: str, start: datetime | None, end: datetime | None) -> tuple[str, list[object]]:
    tests = ["book = ?", *(["hour >= ?"] if start else []), *(["hour < ?"] if end else [])]
    return " AND ".join(tests), [book, *(moment for moment in (start, end) if moment)]


def days_in(rows: pa.Table) -> dict[str, list[int]]:
    """Days by book that usage rows stand in."""
    import pyarrow.compute as pc

    day = pc.floor_temporal(rows["hour"], unit="day")
    pairs = pa.table({"book": rows["book"], "day": day}).group_by(["book", "day"]).aggregate([])
    found: dict[str, list[int]] = defaultdict(list)
    for row in pairs.to_pylist():
        found[str(row["book"])].append(_day(row["day"]))
    return dict(found)


def days_of(hours: Iterable[datetime]) -> list[int]:
    """Days that hours (UTC) stand in."""
    return sorted({_day(hour) for hour in hours})


def _runs(known: _Book, kept: Sums, window: Window) -> list[tuple[datetime, datetime]]:
    """Spans of a book inside the window that the kept sums cover, oldest first."""
    at = _month_start if kept.by_the_month else _day_start
    numbers = sorted(known.months if kept.by_the_month else known.summed)
    start, end = window
    inside = [n for n in numbers if (start is None or at(n) >= start) and (end is None or at(n + 1) <= end)]
    spans = [(first, last + 1) for first, last in _consecutive(inside)]
    if len(spans) > _MOST_RUNS:
        spans = sorted(sorted(spans, key=lambda s: s[0] - s[1])[:_MOST_RUNS])
    return [(at(first), at(last)) for first, last in spans]


def _choice(needed: Collection[str]) -> Sums | None:
    """The smallest sums that have what a question needs; None: the hourly rows."""
    these = {"pool", "model", "tenant"}.intersection(needed)
    if not these:
        return ALONE
    if "hour" in needed:
        return BY_HOUR if "tenant" not in these else BY_TENANT_HOUR if these == {"tenant"} else None
    if "tenant" not in these:
        return BY_DAY
    return BY_TENANT if these == {"tenant"} else BY_MONTH


def _marks(book: str, marks: Sequence[tuple[str, datetime]]) -> pa.Table:
    grains, starts = [list(column) for column in zip(*marks, strict=True)]
    return pa.table(
        {
            "book": pa.repeat(book, len(marks)),
            "grain": pa.array(grains),
            "start": pa.array(starts, pa.timestamp("us", "UTC")),
        }
    )


def _consecutive(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers.

    >>> _consecutive([1, 2, 3, 7, 9, 10])
    [(1, 3), (7, 7), (9, 10)]
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return [(first, last) for first, last in runs]


def _day(moment: datetime) -> int:
    return (moment - _EPOCH) // _DAY


def _day_start(day: int) -> datetime:
    return _EPOCH + day * _DAY


def _month(moment: datetime) -> int:
    utc = moment.astimezone(UTC)
    return utc.year * MONTHS_PER_YEAR + utc.month - 1


def _month_of(day: int) -> int:
    return _month(_day_start(day))


def _month_start(month: int) -> datetime:
    year, index = divmod(month, MONTHS_PER_YEAR)
    return datetime(year, index + 1, 1, tzinfo=UTC)
