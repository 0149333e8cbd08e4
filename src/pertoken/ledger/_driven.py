"""What cost lines are the price of: quantities of the meters that a component's rates are on."""

from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa

from pertoken.ledger import Ledger
from pertoken.ledger._metric import Filter, where_clause

# Rates are taken together by component first: two of them on one meter must not count its quantity twice.
_DRIVEN = """
    SELECT u.pool, u.model, u.phase, r.category, r.component, u.meter, u.basis AS quantity_basis,
           MIN(r.basis_first) AS basis_first, MAX(r.basis_last) AS basis_last, SUM(u.quantity) AS quantity
    FROM (SELECT hour, pool, model, phase, meter, basis, SUM(quantity) AS quantity
          FROM usage_hourly WHERE {used}
          GROUP BY hour, pool, model, phase, meter, basis) u
    JOIN (SELECT hour, pool, meter, category, component, MIN(basis) AS basis_first, MAX(basis) AS basis_last
          FROM rates WHERE {window}
          GROUP BY hour, pool, meter, category, component) r
        ON u.hour = r.hour AND u.pool = r.pool AND u.meter = r.meter
    GROUP BY u.pool, u.model, u.phase, r.category, r.component, u.meter, u.basis
    ORDER BY u.pool, u.model, u.phase, r.category, r.component, u.meter, u.basis"""


def driven(ledger: Ledger, where: Filter, start: datetime, end: datetime) -> pa.Table:
    """By pool, model, phase, component and meter, the quantity that the rates in force priced, and both bases.

    Of the hours from `start` up to, not with, `end`; `where` filters usage by book, pool, model, tenant. A quantity
    stands once for each component that is priced on its meter.
    """
    span = start.astimezone(UTC), end.astimezone(UTC)
    used, values = where_clause(where, ("book", "pool", "model", "tenant"), span)
    window, more = where_clause({}, (), span)
    return ledger._engine.query(_DRIVEN.format(used=used, window=window), [*values, *more])
