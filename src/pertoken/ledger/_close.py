"""The step that turns quantities into costs: quantity × rate = cost, rounded once."""

from __future__ import annotations

from pertoken.errors import MissingRateError
from pertoken.ledger._engine import Engine
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
    SELECT hour, pool, meter, category, component, CAST(SUM(usd_per_unit) AS DECIMAL(18, 12)) AS usd_per_unit
    FROM rates
    GROUP BY hour, pool, meter, category, component"""

_CLOSE = f"""
    INSERT INTO cost_hourly
    SELECT u.book, u.hour, u.pool, u.model, u.tenant, u.phase, r.category, r.component,
           CAST(SUM(u.quantity * r.usd_per_unit) AS DECIMAL(20, 9)) AS cost_usd
    FROM ({_QUANTITIES}) u
    JOIN ({_PRICES}) r ON u.hour = r.hour AND u.pool = r.pool AND u.meter = r.meter
    GROUP BY u.book, u.hour, u.pool, u.model, u.tenant, u.phase, r.category, r.component"""

# A resource must meet a rate. Tokens need one only where no resource was held for them (an API pool), or where
# the pool prices other tokens in that hour: then a token kind without a price would pass as free.
_UNPRICED = """
    SELECT u.pool, u.meter, MIN(u.hour) AS first_hour, COUNT(*) AS hours
    FROM (SELECT DISTINCT pool, hour, meter FROM usage_hourly WHERE {window}) u
    LEFT JOIN (SELECT DISTINCT pool, hour, meter FROM rates) r
        ON u.hour = r.hour AND u.pool = r.pool AND u.meter = r.meter
    LEFT JOIN (SELECT DISTINCT pool, hour FROM usage_hourly
               WHERE {window} AND split_part(meter, ':', 1) IN ({resources})) held
        ON u.hour = held.hour AND u.pool = held.pool
    LEFT JOIN (SELECT DISTINCT pool, hour FROM rates WHERE split_part(meter, ':', 1) IN ({tokens})) priced
        ON u.hour = priced.hour AND u.pool = priced.pool
    WHERE r.meter IS NULL
      AND (split_part(u.meter, ':', 1) IN ({resources})
           OR (split_part(u.meter, ':', 1) IN ({tokens}) AND (held.pool IS NULL OR priced.pool IS NOT NULL)))
    GROUP BY u.pool, u.meter
    ORDER BY u.pool, u.meter"""


def close(engine: Engine, window: str, parameters: list[object]) -> None:
    """Rewrite the cost rows of a window (a WHERE clause over book and hour) from usage and rates.

    Idempotent: the window's old rows go and the new ones come in one transaction. Raises MissingRateError,
    changing nothing, on usage that no rate prices.
    """
    found = unpriced(engine, window, parameters)
    if found:
        first = found[0]
        more = f" (and {len(found) - 1} more pool and meter pairs)" if len(found) > 1 else ""
        raise MissingRateError(
            f"no rate for {first['meter']} in pool {first['pool']!r} in {first['hours']} hours "
            f"from {first['first_hour']:%Y-%m-%d %H:%M} UTC{more}; add a rate, zero if it is free"
        )
    with engine.transaction():
        engine.execute(f"DELETE FROM cost_hourly WHERE {window}", parameters)
        engine.execute(_CLOSE.format(window=window), parameters)


def unpriced(engine: Engine, window: str, parameters: list[object]) -> list[dict[str, object]]:
    """Pools and meters of a window whose usage no rate prices, with their first hour and number of hours."""
    resources = ", ".join(f"'{m.name}'" for m in METERS.values() if m.priced)
    tokens = ", ".join(f"'{m.name}'" for m in METERS.values() if m.name.endswith("_tokens"))
    sql = _UNPRICED.format(window=window, resources=resources, tokens=tokens)
    rows: list[dict[str, object]] = engine.query(sql, [*parameters, *parameters]).to_pylist()
    return rows
