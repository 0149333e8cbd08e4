"""The three tables, declared once: what a floor returns and what the ledger stores.

Quantities are DECIMAL(19, 6) and rates DECIMAL(18, 12): their product is exact in 38 digits on every engine,
so the same query gives the same sums to the digit. `close` rounds that product once, to DECIMAL(20, 9) USD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pertoken.errors import InputError
from pertoken.units import COMPONENTS, METERS, PHASES, base_meter

HOUR: pa.DataType = pa.timestamp("us", tz="UTC")
QUANTITY: pa.DataType = pa.decimal128(19, 6)
RATE: pa.DataType = pa.decimal128(18, 12)
QUANTITY_STEPS = 1e6
"""Steps of the quantity column per unit."""
COST: pa.DataType = pa.decimal128(20, 9)

USAGE = pa.schema(
    [
        ("book", pa.string()),
        ("hour", HOUR),
        ("pool", pa.string()),
        ("model", pa.string()),
        ("tenant", pa.string()),
        ("phase", pa.string()),
        ("meter", pa.string()),
        ("quantity", QUANTITY),
        ("basis", pa.string()),
    ]
)
RATES = pa.schema(
    [
        ("hour", HOUR),
        ("pool", pa.string()),
        ("meter", pa.string()),
        ("category", pa.string()),
        ("component", pa.string()),
        ("usd_per_unit", RATE),
        ("basis", pa.string()),
        ("source", pa.string()),
    ]
)
COSTS = pa.schema(
    [
        ("book", pa.string()),
        ("hour", HOUR),
        ("pool", pa.string()),
        ("model", pa.string()),
        ("tenant", pa.string()),
        ("phase", pa.string()),
        ("category", pa.string()),
        ("component", pa.string()),
        ("cost_usd", COST),
    ]
)

Hours = npt.NDArray[np.datetime64]
Floats = npt.NDArray[np.float64]


def usage_rows(
    hours: Hours,
    quantities: Mapping[tuple[str, str], float | Floats],
    *,
    book: str,
    pool: str,
    model: str,
    tenant: str,
    basis: str,
) -> pa.Table:
    """Usage rows of one book, pool, model and tenant.

    Parameters: hours [UTC, shape (T,)]; quantities by (phase, meter), each a scalar or shape (T,) in the
    meter's unit. Zero quantities leave no row. Tokens and requests are rounded to whole numbers, all else to the
    table's six decimals, so that the running sum never strays by more than half a step. Raises InputError on a
    quantity that is not finite or is negative, on an unknown phase or meter.
    """
    kept: list[tuple[str, str, Floats, npt.NDArray[np.bool_]]] = []
    for (phase, meter), quantity in quantities.items():
        if phase not in PHASES:
            raise InputError(f"unknown phase {phase!r}: one of {', '.join(PHASES)}")
        known = METERS.get(base_meter(meter))
        if known is None:
            raise InputError(f"unknown meter {meter!r}: one of {', '.join(METERS)}")
        values = np.broadcast_to(np.asarray(quantity, dtype=np.float64), hours.shape)
        if not np.isfinite(values).all() or (values < 0).any():
            raise InputError(
                f"{meter} of pool {pool!r}, phase {phase!r} has a negative or non-finite quantity"
            )
        # Rounding the running sum and not each hour: small quantities add up instead of vanishing.
        steps = 1.0 if known.unit in ("token", "request") else QUANTITY_STEPS
        values = np.diff(np.round(np.cumsum(values) * steps), prepend=0.0) / steps
        keep = values > 0
        if keep.any():
            kept.append((phase, meter, values[keep], keep))
    if not kept:
        return USAGE.empty_table()
    counts = [len(values) for _, _, values, _ in kept]
    constant = {"book": book, "pool": pool, "model": model, "tenant": tenant, "basis": basis}
    columns: dict[str, Any] = {k: pa.repeat(v, sum(counts)) for k, v in constant.items()}
    columns["phase"] = pa.concat_arrays([pa.repeat(k[0], n) for k, n in zip(kept, counts, strict=True)])
    columns["meter"] = pa.concat_arrays([pa.repeat(k[1], n) for k, n in zip(kept, counts, strict=True)])
    at = np.concatenate([hours[keep] for *_, keep in kept])
    columns["hour"] = pa.array(at.astype("datetime64[us]")).cast(HOUR)
    columns["quantity"] = decimals(np.concatenate([values for _, _, values, _ in kept]), QUANTITY)
    return pa.table([columns[name] for name in USAGE.names], schema=USAGE)


def rate_rows(
    hours: Hours,
    usd_per_unit: float | Floats,
    *,
    pool: str,
    meter: str,
    component: str,
    basis: str,
    source: str,
) -> pa.Table:
    """Rate rows of one pool, meter and component: USD per unit, scalar or shape (T,), by hour [UTC, (T,)].

    Zero is a rate ("included in the rent"), a negative one a credit or a wholesale price below zero; NaN leaves the
    hour without a rate. Raises InputError on an infinite rate, an unknown meter or component.
    """
    if component not in COMPONENTS:
        raise InputError(f"unknown component {component!r}: one of {', '.join(COMPONENTS)}")
    if base_meter(meter) not in METERS:
        raise InputError(f"unknown meter {meter!r}: one of {', '.join(METERS)}")
    values = np.broadcast_to(np.asarray(usd_per_unit, dtype=np.float64), hours.shape)
    keep = ~np.isnan(values)
    if np.isinf(values).any():
        raise InputError(f"rate of {meter} ({component}) in pool {pool!r} is infinite")
    count = int(keep.sum())
    constant = {
        "pool": pool, "meter": meter, "category": COMPONENTS[component], "component": component,
        "basis": basis, "source": source,
    }  # fmt: skip
    columns: dict[str, Any] = {k: pa.repeat(v, count) for k, v in constant.items()}
    columns["hour"] = pa.array(hours[keep].astype("datetime64[us]")).cast(HOUR)
    columns["usd_per_unit"] = decimals(values[keep], RATE)
    return pa.table([columns[name] for name in RATES.names], schema=RATES)


def concat(tables: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    """All rows of the tables, in order; an empty table of the schema where there are none."""
    return pa.concat_tables(tables) if tables else schema.empty_table()


def decimals(values: Floats, kind: pa.DataType) -> Any:
    """Floats rounded half to even at the decimal type's scale. Raises InputError on overflow."""
    try:
        return pa.array(values).cast(kind)
    except pa.ArrowInvalid as error:
        raise InputError(f"a number does not fit {kind}: {error}") from error
