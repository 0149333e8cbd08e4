"""The ledger row by row: what a cost is the product of, and long answers in pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import pyarrow as pa

from pertoken.errors import InputError
from pertoken.ledger._engine import Engine
from pertoken.ledger._metric import Filter, where_clause

LINE_DIMENSIONS = ("model", "tenant", "phase", "category", "component")
_HOUR = timedelta(hours=1)
_FIRST_HOURS = 6 * _HOUR
"""Hours a page looks at first; twice as many each time until it is full."""
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

Window = tuple[datetime | None, datetime | None]


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
    NULL stands last.
    """
    values: list[object] = list(parameters)
    where = "TRUE"
    if after is not None:
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


@dataclass(frozen=True)
class Walk:
    """Reads a page piece by piece along its leading keys, so that a page of a long answer does not sum up all of it.

    Parameters: piece, rows of the whole answer narrowed by a filter and a window, after a key, at most so many;
    names, the names of one key in order under a filter and a window; spans, the first and last hour of each book.
    """

    by: Sequence[str]
    piece: Callable[[Filter, Window, Sequence[object] | None, int], pa.Table]
    names: Callable[[str, Filter, Window], list[object]]
    spans: Callable[[], list[tuple[str, datetime, datetime]]]

    def page(self, where: Filter, window: Window, after: Sequence[object] | None, limit: int) -> pa.Table:
        """At most `limit` rows after the keys `after`, in order of the keys.

        Raises InputError where `after` has not a value per key.
        """
        if after is not None and len(after) != len(self.by):
            raise InputError(f"a page begins after {len(self.by)} keys, found {len(after)}")
        free = next((key for key in self.by if key == "meter" or len(_list(where.get(key, ()))) != 1), None)
        if free == "hour":
            return self._by_hours(where, window, after, limit)
        # A filter on a meter holds for its tiers too, which are names of their own here.
        names = self.names(free, where, window) if free and free != "meter" else []
        first = after[self.by.index(free)] if after and free else None
        if not names or None in names or (after and first is None):  # no filter finds what is NULL
            return self.piece(where, window, after, limit)
        left = [name for name in names if first is None or str(name) >= str(first)]
        parts: list[pa.Table] = []
        at, size = 0, 1
        while at < len(left) and (missing := limit - sum(map(len, parts))) > 0:
            some = left[at : at + size]
            inside: Filter = {**where, str(free): [str(name) for name in some]}
            edge = after if first in some else None
            parts.append((self.page if size == 1 else self.piece)(inside, window, edge, missing))
            at, size = at + size, size * 2
        return pa.concat_tables(parts) if parts else self.piece(where, window, after, limit)

    def _by_hours(
        self, where: Filter, window: Window, after: Sequence[object] | None, limit: int
    ) -> pa.Table:
        books = _list(where.get("book", ()))
        spans = [span for span in self.spans() if not books or span[0] in books]
        edge = after[self.by.index("hour")] if after else None
        first = max([t for t in (window[0], edge) if isinstance(t, datetime)], default=None)
        start = max([t for t in (first, min((s[1] for s in spans), default=None)) if t], default=None)
        last = max((s[2] for s in spans), default=None)
        end = min([t for t in (window[1], last + _HOUR if last else None) if t], default=None)
        parts: list[pa.Table] = []
        step = _FIRST_HOURS
        while start and end and start < end and (missing := limit - sum(map(len, parts))) > 0:
            until = min(start + step, end)
            parts.append(self.piece(where, (start, until), after, missing))
            start, step = until, step * 2
        return pa.concat_tables(parts) if parts else self.piece(where, window, after, limit)


def _list(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names
