"""What an option uses, hour by hour, before it becomes rows: quantities by phase and meter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from pertoken.tables import USAGE, Floats, Hours, concat, usage_rows

Quantities = dict[tuple[str, str], Floats]
"""(phase, meter) to quantity per hour in the meter's unit, shape (T,)."""
Prices = dict[tuple[str, str, str], Floats]
"""(pool, meter, component) to USD per unit by hour, shape (T,)."""


@dataclass(frozen=True)
class Use:
    """Quantities of one pool, model and tenant."""

    pool: str
    model: str
    tenant: str
    basis: str
    quantities: Mapping[tuple[str, str], Floats]


def rows(uses: Iterable[Use], hours: Hours, book: str) -> pa.Table:
    """The usage rows of a book."""
    tables = [
        usage_rows(hours, u.quantities, book=book, pool=u.pool, model=u.model, tenant=u.tenant, basis=u.basis)
        for u in uses
    ]
    return concat(tables, USAGE)


def uses_of(table: pa.Table, hours: Hours) -> list[Use]:
    """Usage rows as arrays over consecutive hours; rows outside of them are an error of the caller's."""
    index = np.searchsorted(hours, table["hour"].to_numpy(zero_copy_only=False).astype("datetime64[h]"))
    found: dict[tuple[str, str, str, str], Quantities] = {}
    for i, row in zip(index, table.to_pylist(), strict=True):
        key = (row["pool"], row["model"], row["tenant"], row["basis"])
        quantities = found.setdefault(key, {})
        array = quantities.setdefault((row["phase"], row["meter"]), np.zeros(len(hours)))
        array[i] += float(row["quantity"])
    return [Use(*key, quantities) for key, quantities in found.items()]


def prices_of(rates: pa.Table, hours: Hours) -> Prices:
    """Rate rows as arrays over the horizon's hours; rows of one pool, meter and component are added up."""
    found: Prices = {}
    index = np.searchsorted(hours, rates["hour"].to_numpy(zero_copy_only=False).astype("datetime64[h]"))
    values = rates["usd_per_unit"].cast(pa.float64()).to_numpy(zero_copy_only=False)
    columns = (rates[name].to_pylist() for name in ("pool", "meter", "component"))
    keys = list(zip(*columns, strict=True))
    starts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    for start, end in pairwise([*starts, len(keys)]):
        array = found.setdefault(keys[start], np.zeros(len(hours)))
        np.add.at(array, index[start:end], values[start:end])
    return found


def total_usd(uses: Iterable[Use], prices: Prices) -> float:
    """Σ quantity × rate [USD] over all uses: what `close` would post, before it rounds.

    For searching over volumes; every figure that is shown is read from the ledger.
    """
    by_meter: dict[tuple[str, str], Floats] = {}
    for (pool, meter, _), array in prices.items():
        known = by_meter.get((pool, meter))
        by_meter[pool, meter] = array if known is None else known + array
    total = 0.0
    for use in uses:
        for (_, meter), quantity in use.quantities.items():
            price = by_meter.get((use.pool, meter))
            if price is not None:
                total += float(np.sum(quantity * price))
    return total
