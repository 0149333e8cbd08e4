"""The ledger row by row: what a cost is the product of, and long answers in pages."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from pertoken.errors import InputError
from pertoken.ledger._engine import Engine
from pertoken.ledger._metric import Filter, where_clause

LINE_DIMENSIONS = ("model", "tenant", "phase", "category", "component")
_USED = ("model", "tenant", "phase")
_PRICED = ("category", "component")

# Not summed over rates: each rate row keeps its own basis and source. Quantities are summed as `close` sums them, by
# basis, so that the products of a cost row's lines add up to it before its one rounding.
_LINES = """
    SELECT u.model, u.tenant, u.phase, u.meter, u.quantity, u.basis AS quantity_basis,
           r.category, r.component, r.usd_per_unit, r.basis AS rate_basis, r.source,
           u.quantity * r.usd_per_unit AS cost_usd
    FROM (SELECT model, tenant, phase, meter, basis, CAST(SUM(quantity) AS DECIMAL(19, 6)) AS quantity
          FROM usage_hourly
          WHERE book = ? AND hour = ? AND pool = ? AND {used}
          GROUP BY model, tenant, phase, meter, basis) u
    JOIN (SELECT meter, category, component, usd_per_unit, basis, source
          FROM {rates} WHERE hour = ? AND pool = ? AND {priced}) r
        ON u.meter = r.meter
    ORDER BY u.model, u.tenant, u.phase, r.category, r.component, u.meter, u.basis, r.source, r.usd_per_unit"""


def lines_sql(
    engine: Engine, book: str, hour: datetime, pool: str, filters: Filter
) -> tuple[str, list[object]]:
    """The SELECT of a pool-hour's lines: usage joined to the rates that `close` priced it with, and parameters.

    Raises InputError on a filter that is none of model, tenant, phase, category, component.
    """
    used, used_values = where_clause({k: v for k, v in filters.items() if k not in _PRICED}, _USED)
    priced, priced_values = where_clause({k: v for k, v in filters.items() if k in _PRICED}, _PRICED)
    # A book that came whole is priced by its own rates alone, as `close` does it.
    own = engine.query("SELECT COUNT(*) AS rows FROM book_rates WHERE book = ?", [book])["rows"][0].as_py()
    rates = "(SELECT * FROM book_rates WHERE book = ?)" if own else "rates"
    sql = _LINES.format(used=used, priced=priced, rates=rates)
    values = [book, hour, pool, *used_values, *([book] if own else []), hour, pool, *priced_values]
    return sql, values


def page_sql(
    sql: str, parameters: Sequence[object], keys: Sequence[str], after: Sequence[object] | None, limit: int
) -> tuple[str, list[object]]:
    """A SELECT narrowed to the first `limit` rows after the one whose `keys` are `after`, in order of the keys.

    By keys and no offset: rows that come or go between two pages move no other row across their edge. A key that is
    NULL stands last. Raises InputError where `after` has not a value per key.
    """
    values: list[object] = list(parameters)
    where = "TRUE"
    if after is not None:
        if len(after) != len(keys):
            raise InputError(f"a page begins after {len(keys)} keys, found {len(after)}")
        where, more = _beyond(keys, after)
        values += more
    order = ", ".join(f"{key} ASC NULLS LAST" for key in keys)
    ordered = f" ORDER BY {order}" if keys else ""
    return f"SELECT * FROM ({sql}) found WHERE {where}{ordered} LIMIT {int(limit)}", values


def _beyond(keys: Sequence[str], after: Sequence[object]) -> tuple[str, list[object]]:
    """(k1, k2, …) > (v1, v2, …), where NULL is greater than all values."""
    terms: list[str] = []
    parameters: list[object] = []
    for at, (key, value) in enumerate(zip(keys, after, strict=True)):
        if value is None:
            continue  # nothing is greater than NULL
        same = [
            f"{k} IS NULL" if v is None else f"{k} = ?" for k, v in zip(keys[:at], after[:at], strict=True)
        ]
        terms.append(" AND ".join([*same, f"({key} > ? OR {key} IS NULL)"]))
        parameters += [*(v for v in after[:at] if v is not None), value]
    if not terms:
        return "FALSE", parameters
    return "(" + " OR ".join(f"({term})" for term in terms) + ")", parameters
