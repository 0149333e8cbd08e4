"""The step that turns quantities into costs: quantity × rate = cost, rounded once."""

from __future__ import annotations

from dataclasses import dataclass

from pertoken.errors import MissingRateError
from pertoken.ledger._engine import Engine
from pertoken.ledger._sums import Source
from pertoken.units import METERS

TABLES = (
    """CREATE TABLE IF NOT EXISTS usage_hourly (
        book VARCHAR, hour TIMESTAMP WITH TIME ZONE, pool VARCHAR, model VARCHAR, tenant VARCHAR, phase VARCHAR,
        meter VARCHAR, quantity DECIMAL(19, 6), basis VARCHAR)""",
    """CREATE TABLE IF NOT EXISTS rates (
        hour TIMESTAMP WITH TIME ZONE, pool VARCHAR, meter VARCHAR, category VARCHAR, component VARCHAR,
        usd_per_unit DECIMAL(18, 12), basis VARCHAR, source VARCHAR)""",
    # Made here and not where it is filled: DuckDB 2.0.0 reads back nothing of 122,880 rows or more from a table that
    # was created in the same transaction.
    "CREATE TABLE IF NOT EXISTS rates_incoming AS SELECT * FROM rates WHERE FALSE",
    # Rates of books that came whole, beside `rates` so that no plan can change what another book is charged.
    """CREATE TABLE IF NOT EXISTS book_rates (
        book VARCHAR, hour TIMESTAMP WITH TIME ZONE, pool VARCHAR, meter VARCHAR, category VARCHAR,
        component VARCHAR, usd_per_unit DECIMAL(18, 12), basis VARCHAR, source VARCHAR)""",
    """CREATE TABLE IF NOT EXISTS cost_hourly (
        book VARCHAR, hour TIMESTAMP WITH TIME ZONE, pool VARCHAR, model VARCHAR, tenant VARCHAR, phase VARCHAR,
        category VARCHAR, component VARCHAR, cost_usd DECIMAL(20, 9))""",
)

_QUANTITIES = """
    SELECT book, hour, pool, model, tenant, phase, meter, CAST(SUM(quantity) AS DECIMAL(19, 6)) AS quantity
    FROM usage_hourly
    WHERE {window}
    GROUP BY book, hour, pool, model, tenant, phase, meter"""

_PRICES = """
    SELECT {book}hour, pool, meter, category, component, CAST(SUM(usd_per_unit) AS DECIMAL(18, 12)) AS usd_per_unit
    FROM {rates}
    GROUP BY {book}hour, pool, meter, category, component"""

_CLOSE = f"""
    INSERT INTO cost_hourly
    SELECT u.book, u.hour, u.pool, u.model, u.tenant, u.phase, r.category, r.component,
           CAST(SUM(u.quantity * r.usd_per_unit) AS DECIMAL(20, 9)) AS cost_usd
    FROM ({_QUANTITIES}) u
    JOIN ({_PRICES}) r ON u.hour = r.hour AND u.pool = r.pool AND u.meter = r.meter{{same_r}}
    GROUP BY u.book, u.hour, u.pool, u.model, u.tenant, u.phase, r.category, r.component"""

# A resource must meet a rate. Tokens need one only where no resource was held for them (an API pool), or where
# the pool prices other tokens in that hour: then a token kind without a price would pass as free.
_UNPRICED = """
    SELECT u.pool, u.meter, MIN(u.hour) AS first_hour, COUNT(DISTINCT u.hour) AS hours
    FROM (SELECT DISTINCT {book}pool, hour, meter FROM {usage} WHERE {window}) u
    LEFT JOIN (SELECT DISTINCT {book}pool, hour, meter FROM {rates}) r
        ON u.hour = r.hour AND u.pool = r.pool AND u.meter = r.meter{same_r}
    LEFT JOIN (SELECT DISTINCT {book}pool, hour FROM {usage}
               WHERE {window} AND split_part(meter, ':', 1) IN ({resources})) held
        ON u.hour = held.hour AND u.pool = held.pool{same_held}
    LEFT JOIN (SELECT DISTINCT {book}pool, hour FROM {rates}
               WHERE split_part(meter, ':', 1) IN ({tokens})) priced
        ON u.hour = priced.hour AND u.pool = priced.pool{same_priced}
    WHERE r.meter IS NULL
      AND (split_part(u.meter, ':', 1) IN ({resources})
           OR (split_part(u.meter, ':', 1) IN ({tokens}) AND (held.pool IS NULL OR priced.pool IS NOT NULL)))
    GROUP BY u.pool, u.meter
    ORDER BY u.pool, u.meter"""

_WITH_OWN = "(SELECT book FROM book_rates)"


@dataclass(frozen=True)
class _Prices:
    """Where a book's rates are: in force for all, or its own."""

    rates: str
    own: bool

    def fill(self, sql: str, window: str, **more: str) -> str:
        """The statement over the books of a window that these rates price."""
        books = f"book {'IN' if self.own else 'NOT IN'} {_WITH_OWN}"
        same = {f"same_{t}": f" AND u.book = {t}.book" if self.own else "" for t in ("r", "held", "priced")}
        return sql.format(
            window=f"{window} AND {books}",
            rates=self.rates,
            book="book, " if self.own else "",
            **same,
            **more,
        )


_IN_FORCE, _OWN = _Prices("rates", False), _Prices("book_rates", True)


def refuse_unpriced(engine: Engine, window: str, parameters: list[object]) -> None:
    """Raises MissingRateError where a window (a WHERE clause over book and hour) has usage that no rate prices."""
    found = unpriced(engine, window, parameters)
    if found:
        first = found[0]
        more = f" (and {len(found) - 1} more pool and meter pairs)" if len(found) > 1 else ""
        raise MissingRateError(
            f"no rate for {first['meter']} in pool {first['pool']!r} in {first['hours']} hours "
            f"from {first['first_hour']:%Y-%m-%d %H:%M} UTC{more}; add a rate, zero if it is free"
        )


def rewrite(engine: Engine, window: str, parameters: list[object]) -> None:
    """Rewrite the cost rows of a window (a WHERE clause over book and hour) from usage and rates.

    For the caller's transaction, once nothing in it is unpriced: the window's old rows go and the new ones come.
    Idempotent.
    """
    engine.execute(f"DELETE FROM cost_hourly WHERE {window}", parameters)
    for prices in (_IN_FORCE, _OWN):
        engine.execute(prices.fill(_CLOSE, window), parameters)


def unpriced(
    engine: Engine, window: str, parameters: list[object], usage: Source | None = None
) -> list[dict[str, object]]:
    """Pools and meters of a window whose usage no rate prices, with their first hour and number of hours.

    `usage`: where it is read, the hourly rows unless told.
    """
    read = usage or Source("usage_hourly")
    resources = ", ".join(f"'{m.name}'" for m in METERS.values() if m.priced)
    tokens = ", ".join(f"'{m.name}'" for m in METERS.values() if m.name.endswith("_tokens"))
    rows: list[dict[str, object]] = []
    for prices in (_IN_FORCE, _OWN):
        sql = prices.fill(_UNPRICED, window, resources=resources, tokens=tokens, usage=read.sql)
        rows += engine.query(sql, [*read.parameters, *parameters] * 2).to_pylist()
    return rows
