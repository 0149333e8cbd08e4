"""The books: usage, rates and cost in three tables, closed idempotently, read back as metrics."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from pertoken.errors import InputError
from pertoken.ledger._book import book_rates, book_usage
from pertoken.ledger._close import TABLES, close, unpriced
from pertoken.ledger._engine import Engine, connect
from pertoken.ledger._metric import (
    COST_DIMENSIONS,
    USAGE_DIMENSIONS,
    Filter,
    columns,
    metric_sql,
    where_clause,
)
from pertoken.ledger._rows import lines_sql, page_sql
from pertoken.tables import RATES, USAGE
from pertoken.units import base_meter

__all__ = ["Ledger", "connect", "open_ledger"]


class Ledger:
    """Usage, rates and costs of any number of books on one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writing = (
            threading.RLock()
        )  # one writer at a time: two that touch the same rows would fail, not wait

    def add_usage(self, rows: pa.Table) -> None:
        """Append usage rows (`tables.USAGE`). Raises InputError on another schema."""
        with self._writing:
            self._engine.load("usage_hourly", _checked(rows, USAGE))

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
        with self._writing, self._engine.transaction():
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
        where, parameters = where_clause({"book": book} if book else {}, ("book",), (_utc(start), _utc(end)))
        with self._writing, self._engine.transaction():
            close(self._engine, where, parameters)

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
        with self._writing, self._engine.transaction():
            self._drop(book)
            self._engine.load("book_rates", priced)
            self._engine.load("usage_hourly", used)
            close(self._engine, "book = ?", [book])

    def drop_book(self, book: str) -> None:
        """Forget a book: its usage, its costs and its own rates, in one transaction."""
        with self._writing, self._engine.transaction():
            self._drop(book)

    def _drop(self, book: str) -> None:
        for table in ("usage_hourly", "cost_hourly", "book_rates"):
            self._engine.execute(f"DELETE FROM {table} WHERE book = ?", [book])

    def books(self) -> list[tuple[str, datetime, datetime]]:
        """Each book that has usage, with its first and last hour (UTC)."""
        rows = self._engine.query(
            "SELECT book, MIN(hour) AS first_hour, MAX(hour) AS last_hour FROM usage_hourly GROUP BY book ORDER BY book"
        )
        return [(r["book"], r["first_hour"], r["last_hour"]) for r in rows.to_pylist()]

    def first_hour(self, book: str, *, besides: Sequence[str] = ()) -> datetime | None:
        """The oldest hour (UTC) in which a book has usage of any meter but those `besides`; None where it has none."""
        where, parameters = where_clause({"book": book}, ("book",))
        if besides:
            term, names = where_clause({"meter": besides}, ("meter",))
            where, parameters = f"{where} AND NOT {term}", [*parameters, *names]
        found = self._engine.query(f"SELECT MIN(hour) AS hour FROM usage_hourly WHERE {where}", parameters)
        first: datetime | None = found["hour"][0].as_py()
        return first

    def unpriced(
        self, book: str | None = None, start: datetime | None = None, end: datetime | None = None
    ) -> list[dict[str, object]]:
        """Usage that no rate prices and `close` refuses: pool, meter, first_hour and hours of each."""
        where, parameters = where_clause({"book": book} if book else {}, ("book",), (_utc(start), _utc(end)))
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
        sql, parameters = metric_sql(names, by, where or {}, (_utc(start), _utc(end)))
        return self._engine.query(sql, parameters)

    def sql(
        self,
        *names: str,
        by: Sequence[str] = (),
        where: Filter | None = None,
        start: datetime | None = None,
        end: datetime | None = None,
    ) -> tuple[str, list[object]]:
        """The SELECT that `metric` runs, or with ``cost_usd`` alone the one of `cost`, and its parameters."""
        window = _utc(start), _utc(end)
        if names == ("cost_usd",):
            return _sum_sql("cost_hourly", "cost_usd", by, COST_DIMENSIONS, where or {}, window)
        return metric_sql(names, by, where or {}, window)

    def cost(
        self,
        *by: str,
        where: Filter | None = None,
        start: datetime | None = None,
        end: datetime | None = None,
    ) -> pa.Table:
        """Cost [USD] by dimensions: columns `by` then ``cost_usd``."""
        return self._sum("cost_hourly", "cost_usd", by, COST_DIMENSIONS, where or {}, (start, end))

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
        return self._sum("usage_hourly", "quantity", by, USAGE_DIMENSIONS, where or {}, (start, end))

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
        if names == ("quantity",):
            window = _utc(start), _utc(end)
            asked = _sum_sql("usage_hourly", "quantity", by, USAGE_DIMENSIONS, where or {}, window)
        else:
            asked = self.sql(*names, by=by, where=where, start=start, end=end)
        return self._engine.query(*page_sql(*asked, list(by), after, limit))

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

    def _sum(
        self,
        table: str,
        column: str,
        by: Sequence[str],
        allowed: Sequence[str],
        filters: Filter,
        window: tuple[datetime | None, datetime | None],
    ) -> pa.Table:
        moments = _utc(window[0]), _utc(window[1])
        return self._engine.query(*_sum_sql(table, column, by, allowed, filters, moments))

    def shut(self) -> None:
        """Release the engine."""
        self._engine.close()


def _sum_sql(
    table: str,
    column: str,
    by: Sequence[str],
    allowed: Sequence[str],
    filters: Filter,
    window: tuple[datetime | None, datetime | None],
) -> tuple[str, list[object]]:
    keys = ", ".join(columns(by, allowed))
    where, parameters = where_clause(filters, allowed, window)
    group = f"GROUP BY {keys} ORDER BY {keys}" if keys else ""
    prefix = f"{keys}, " if keys else ""
    return f"SELECT {prefix}SUM({column}) AS {column} FROM {table} WHERE {where} {group}", parameters


def open_ledger(where: str | Path | None = None) -> Ledger:
    """A ledger in memory (None) or in the file at `where`, its tables made where they are missing."""
    engine = connect(where)
    for statement in TABLES:
        engine.execute(statement)
    return Ledger(engine)


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
