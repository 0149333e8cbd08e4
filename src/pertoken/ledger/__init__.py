"""The books: usage, rates and cost in three tables, closed idempotently, read back as metrics."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa

from pertoken.errors import InputError
from pertoken.ledger._book import book_rates, book_usage
from pertoken.ledger._close import TABLES, refuse_unpriced, rewrite, unpriced
from pertoken.ledger._engine import Engine, LedgerBrokenError, connect
from pertoken.ledger._metric import (
    USAGE_DIMENSIONS,
    Filter,
    Window,
    metric_sql,
    sum_sql,
    where_clause,
)
from pertoken.ledger._rows import Walk, lines_sql, page_sql
from pertoken.ledger._sums import Fact, Source, Summed, days_in, days_of, prepare
from pertoken.tables import RATES, USAGE
from pertoken.units import base_meter

__all__ = ["Ledger", "LedgerBrokenError", "connect", "open_ledger"]

_MONTHS_A_CLOSE = 3
"""Months of a book that a close sums: a year of a large ledger takes minutes, in which no other hour is closed."""
Query = tuple[str, list[object]]
"""A SELECT and its parameters."""


class Ledger:
    """Usage, rates and costs of any number of books on one engine."""

    def __init__(self, engine: Engine, *, keep_sums: bool = False) -> None:
        self._engine = engine
        self._sums = Summed(engine) if keep_sums else None
        self._writing = (
            threading.RLock()
        )  # one writer at a time: two that touch the same rows would fail, not wait
        self._together = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is changed inside, by this thread, is there all at once for readers and after a crash, or not at all.

        Days and months are summed once it is over.
        """
        with self._writing:
            with self._engine.transaction() if self._sums is None else self._sums.holding():
                self._together = True
                try:
                    yield
                finally:
                    self._together = False
            self.sum_up(_MONTHS_A_CLOSE)

    def add_usage(self, rows: pa.Table) -> None:
        """Append usage rows (`tables.USAGE`). Raises InputError on another schema."""
        checked = _checked(rows, USAGE)
        with self._writing, self._changing(days_in(checked) if self._sums else {}):
            self._engine.load("usage_hourly", checked)

    def replace_usage(
        self,
        book: str,
        hours: Sequence[datetime],
        rows: pa.Table,
        *,
        pools: Sequence[str] | None = None,
        meters: Sequence[str] | None = None,
    ) -> None:
        """Make `rows` all the usage a book has in those hours (UTC): what was there goes, in one transaction.

        `pools` and `meters` (without qualifiers) narrow what goes. Raises InputError on rows outside of what is
        replaced, changing nothing.
        """
        checked = _checked(rows, USAGE)
        wanted = sorted({moment for hour in hours if (moment := _utc(hour)) is not None})
        limits: tuple[tuple[str, Sequence[object] | None], ...] = (
            ("book", [book]), ("hour", wanted), ("pool", pools), ("meter", meters),
        )  # fmt: skip
        terms: list[str] = []
        parameters: list[object] = []
        for column, allowed in limits:
            if allowed is None:
                continue
            found = checked.column(column).unique().to_pylist()
            if strays := {base_meter(str(f)) if column == "meter" else f for f in found} - set(allowed):
                raise InputError(f"rows of {column} {min(map(str, strays))} are outside of what is replaced")
            name = "split_part(meter, ':', 1)" if column == "meter" else column
            terms.append(f"{name} IN ({', '.join('?' for _ in allowed)})" if allowed else "FALSE")
            parameters += allowed
        with self._writing, self._changing({book: days_of(wanted)}):
            self._engine.execute(f"DELETE FROM usage_hourly WHERE {' AND '.join(terms)}", parameters)
            self._engine.load("usage_hourly", checked)

    def usage_rows(
        self, where: Filter | None = None, start: datetime | None = None, end: datetime | None = None
    ) -> pa.Table:
        """Usage rows as they are stored (`tables.USAGE`), in no order."""
        clause, parameters = where_clause(where or {}, USAGE_DIMENSIONS, (_utc(start), _utc(end)))
        found = self._engine.query(
            f"SELECT {', '.join(USAGE.names)} FROM usage_hourly WHERE {clause}", parameters
        )
        return found.cast(USAGE)

    def add_rates(self, rows: pa.Table) -> None:
        """Add rate rows (`tables.RATES`): for every hour, pool, meter and component among them, they replace all
        that was there, so that giving changed terms again never charges twice.

        Raises InputError on another schema.
        """
        checked = _checked(rows, RATES)
        keys = ("hour", "pool", "meter", "component")
        with self._writing, self._engine.transaction():
            self._engine.execute("DELETE FROM rates_incoming")
            self._engine.load("rates_incoming", checked)
            match = " AND ".join(f"i.{k} = rates.{k}" for k in keys)
            self._engine.execute(
                f"DELETE FROM rates WHERE EXISTS (SELECT 1 FROM rates_incoming i WHERE {match})"
            )
            self._engine.execute("INSERT INTO rates SELECT * FROM rates_incoming")
            self._engine.execute("DELETE FROM rates_incoming")

    def close(
        self, book: str | None = None, start: datetime | None = None, end: datetime | None = None
    ) -> None:
        """Turn quantities into costs for a book (None: all) and the hours from `start` up to, not with, `end`.

        Idempotent. Raises MissingRateError, changing nothing, on usage that no rate prices.
        """
        window = _utc(start), _utc(end)
        where, parameters = where_clause({"book": book} if book else {}, ("book",), window)
        with self._writing:
            refuse_unpriced(self._engine, where, parameters)
            with self._changing(self._sums.within(book, window) if self._sums else {}):
                rewrite(self._engine, where, parameters)
            self.sum_up(_MONTHS_A_CLOSE)

    def sum_up(self, most_months: int | None = None) -> None:
        """Keep sums of full days and months beside the hourly rows, where a file holds them: what `close` does last,
        a few months at a time (`most_months`; None: all).

        Questions give the same with and without, sooner with them.
        """
        if self._sums is not None and not self._together:
            with self._writing:
                self._sums.sum_up(most_months)

    def _changing(self, days: Mapping[str, Iterable[int]]) -> AbstractContextManager[None]:
        """One transaction in which rows of these days of books change."""
        return self._engine.transaction() if self._sums is None else self._sums.striking(days)

    def put_book(self, book: str, usage: pa.Table, rates: pa.Table) -> None:
        """Make usage (`tables.USAGE`) and rates (`tables.RATES`) all there is of a book, closed at these rates alone.

        One transaction: the book's old rows go, the new ones come with their costs, and no other book's rates are
        touched or looked at. Texts may be coded (Arrow dictionaries). Raises InputError on rows that do not belong,
        MissingRateError on usage that none of these rates prices; then nothing changes.
        """
        used, priced = book_usage(usage, book), book_rates(rates)
        priced = priced.add_column(
            0, "book", pa.DictionaryArray.from_arrays(np.zeros(len(priced), np.int32), [book])
        )
        with self._writing:
            with self._dropping(book):
                self._engine.load("book_rates", priced)
                self._engine.load("usage_hourly", used)
                refuse_unpriced(self._engine, "book = ?", [book])
                rewrite(self._engine, "book = ?", [book])
            if self._sums is not None:
                with self._sums.striking(days_in(used)):
                    pass
                self.sum_up(_MONTHS_A_CLOSE)

    def drop_book(self, book: str) -> None:
        """Forget a book: its usage, its costs and its own rates, in one transaction."""
        with self._writing, self._dropping(book):
            pass

    @contextmanager
    def _dropping(self, book: str) -> Iterator[None]:
        """One transaction that begins with a book's end."""
        begun = self._engine.transaction() if self._sums is None else self._sums.dropping(book)
        with begun:
            for table in ("usage_hourly", "cost_hourly", "book_rates"):
                self._engine.execute(f"DELETE FROM {table} WHERE book = ?", [book])
            yield

    def books(self) -> list[tuple[str, datetime, datetime]]:
        """Each book that has usage, with its first and last hour (UTC)."""
        span = "SELECT book, MIN(hour) AS first_hour, MAX(hour) AS last_hour FROM"
        found = self._whole(lambda at: (f"{span} {at.sql} GROUP BY book ORDER BY book", [*at.parameters]))
        return [(r["book"], r["first_hour"], r["last_hour"]) for r in found.to_pylist()]

    def _whole(self, asked: Callable[[Source], Query]) -> pa.Table:
        """The rows of a question that the first and last hours of each book answer."""
        if self._sums is not None:
            stamp = self._sums.stamp
            if stamp % 2 == 0:
                found = self._engine.query(*asked(self._sums.edges()))
                if self._sums.stamp == stamp:
                    return found
        return self._engine.query(*asked(_hourly("usage")))

    def first_hour(self, book: str, *, besides: Sequence[str] = ()) -> datetime | None:
        """The oldest hour (UTC) in which a book has usage of any meter but those `besides`; None where it has none."""
        where, parameters = where_clause({"book": book}, ("book",))
        if besides:
            term, names = where_clause({"meter": besides}, ("meter",))
            where, parameters = f"{where} AND NOT {term}", [*parameters, *names]

        def first(window: Window, *needed: str) -> datetime | None:
            test, more = where_clause({}, (), window)

            def asked(at: Callable[[Fact], Source]) -> Query:
                read = at("usage")
                sql = f"SELECT MIN(hour) AS hour FROM {read.sql} WHERE {where} AND {test}"
                return sql, [*read.parameters, *parameters, *more]

            moment: datetime | None = self._read(asked, needed, {"book": book}, window)["hour"][0].as_py()
            return moment

        # Where days are summed the first answer is a day; its hours tell which.
        found = first((None, None), "tenant")
        return found and first((found, found + timedelta(days=1)), *USAGE_DIMENSIONS)

    def unpriced(
        self, book: str | None = None, start: datetime | None = None, end: datetime | None = None
    ) -> list[dict[str, object]]:
        """Usage that no rate prices and `close` refuses: pool, meter, first_hour and hours of each."""
        window = _utc(start), _utc(end)
        where, parameters = where_clause({"book": book} if book else {}, ("book",), window)
        if self._sums is not None and (stamp := self._sums.stamp) % 2 == 0:
            usage = self._sums.source("usage", ("hour", "pool"), [book] if book else None, window)
            found = unpriced(self._engine, where, parameters, usage)
            if self._sums.stamp == stamp:
                return found
        return unpriced(self._engine, where, parameters)

    def metric(
        self,
        *names: str,
        by: Sequence[str] = (),
        where: Filter | None = None,
        start: datetime | None = None,
        end: datetime | None = None,
    ) -> pa.Table:
        """Metrics (`units.METRICS`) by dimensions: one row per group, columns `by` then one per metric [its unit].

        Of the hours from `start` up to, not with, `end`. A metric without a denominator in a group is null.
        Raises UnknownNameError, InputError.
        """
        window, filters = (_utc(start), _utc(end)), where or {}
        return self._read(
            lambda at: metric_sql(names, by, filters, window, (at("cost"), at("usage"))), by, filters, window
        )

    def sql(
        self,
        *names: str,
        by: Sequence[str] = (),
        where: Filter | None = None,
        start: datetime | None = None,
        end: datetime | None = None,
    ) -> Query:
        """A SELECT over the hourly rows that gives what `metric`, or with ``cost_usd`` alone `cost`, gives, and its
        parameters."""
        return _asked(names, by, where or {}, (_utc(start), _utc(end)), _hourly)

    def cost(
        self,
        *by: str,
        where: Filter | None = None,
        start: datetime | None = None,
        end: datetime | None = None,
    ) -> pa.Table:
        """Cost [USD] by dimensions: columns `by` then ``cost_usd``."""
        return self._sum("cost", by, where or {}, (_utc(start), _utc(end)))

    def usage(
        self,
        *by: str,
        where: Filter | None = None,
        start: datetime | None = None,
        end: datetime | None = None,
    ) -> pa.Table:
        """Quantity by dimensions [the meter's unit, so group or filter by meter]: `by` then ``quantity``.

        A filter on a meter without a qualifier (``energy_kwh``) holds for all its tiers, bands and price steps.
        """
        return self._sum("usage", by, where or {}, (_utc(start), _utc(end)))

    def page(
        self,
        *names: str,
        by: Sequence[str] = (),
        where: Filter | None = None,
        start: datetime | None = None,
        end: datetime | None = None,
        after: Sequence[object] | None = None,
        limit: int = 1000,
    ) -> pa.Table:
        """At most `limit` rows of `metric`, of `cost` (``cost_usd`` alone) or of `usage` (``quantity`` alone), in order
        of `by`, beginning after the row whose `by` columns are `after` (None: at the first).

        Raises UnknownNameError, InputError.
        """

        def piece(filters: Filter, window: Window, after: Sequence[object] | None, limit: int) -> pa.Table:
            return self._read(
                lambda at: page_sql(*_asked(names, by, filters, window, at), list(by), after, limit),
                by,
                filters,
                window,
            )

        def named(key: str, filters: Filter, window: Window) -> list[object]:
            found = self._read(lambda at: _asked(names, [key], filters, window, at), [key], filters, window)
            return found[key].to_pylist()

        walk = Walk(by, piece, named, self.books)
        return walk.page(where or {}, (_utc(start), _utc(end)), after, limit)

    def lines(self, book: str, hour: datetime, pool: str, where: Filter | None = None) -> pa.Table:
        """What the cost rows of a pool in an hour are made of: quantity × usd_per_unit = cost_usd, line by line.

        One line per model, tenant, phase, meter, basis of the quantity, and rate row, with the rate's basis and source;
        ``cost_usd`` is the exact product, so that the lines of a row of `cost` sum to it before it is rounded once.
        `where` narrows model, tenant, phase, category, component. Raises InputError.
        """
        moment = _utc(hour)
        assert moment is not None
        return self._engine.query(*lines_sql(self._engine, book, moment, pool, where or {}))

    def rates(self, book: str = "") -> pa.Table:
        """Rate rows in order of pool, meter, component and hour: those in force, or a book's own (`put_book`)."""
        table, parameters = ("book_rates WHERE book = ?", [book]) if book else ("rates", [])
        return self._engine.query(
            f"SELECT {', '.join(RATES.names)} FROM {table} ORDER BY pool, meter, component, source, hour",
            parameters,
        )

    def _sum(self, fact: Fact, by: Sequence[str], filters: Filter, window: Window) -> pa.Table:
        return self._read(lambda at: sum_sql(fact, by, filters, window, at(fact)), by, filters, window)

    def _read(
        self,
        asked: Callable[[Callable[[Fact], Source]], Query],
        by: Sequence[str],
        filters: Filter,
        window: Window,
    ) -> pa.Table:
        """The rows of a question: from kept sums where they give them, unless the ledger changes meanwhile."""
        needed = {*by, *filters}
        book = filters.get("book")
        books = [book] if isinstance(book, str) else book
        if self._sums is not None:
            stamp = self._sums.stamp
            if stamp % 2 == 0:
                sums = self._sums
                found = self._engine.query(*asked(lambda fact: sums.source(fact, needed, books, window)))
                if sums.stamp == stamp:
                    return found
        return self._engine.query(*asked(_hourly))

    def shut(self) -> None:
        """Release the engine."""
        self._engine.close()


def _hourly(fact: Fact) -> Source:
    return Source(f"{fact}_hourly")


def _asked(
    names: Sequence[str], by: Sequence[str], filters: Filter, window: Window, at: Callable[[Fact], Source]
) -> Query:
    """The SELECT of metrics, of cost (``cost_usd`` alone) or of usage (``quantity`` alone)."""
    if names == ("cost_usd",):
        return sum_sql("cost", by, filters, window, at("cost"))
    if names == ("quantity",):
        return sum_sql("usage", by, filters, window, at("usage"))
    return metric_sql(names, by, filters, window, (at("cost"), at("usage")))


def open_ledger(where: str | Path | None = None) -> Ledger:
    """A ledger in memory (None) or in the file at `where`, its tables made where they are missing."""
    engine = connect(where)
    for statement in TABLES:
        engine.execute(statement)
    if where is not None:
        prepare(engine)
    return Ledger(engine, keep_sums=where is not None)


def _checked(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    if rows.schema.names != schema.names:
        raise InputError(f"rows have the columns {rows.schema.names}, the table has {schema.names}")
    return rows.cast(schema)


def _utc(moment: datetime | None) -> datetime | None:
    if moment is not None and moment.tzinfo is None:
        raise InputError(
            f"{moment.isoformat()} has no time zone: give one, such as {moment.isoformat()}+00:00"
        )
    return moment.astimezone(UTC) if moment is not None else None
