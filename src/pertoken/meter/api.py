"""API pools: which calls are theirs, and their token prices at the date of the call."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime

import numpy as np
import pyarrow as pa

from pertoken import catalog
from pertoken.errors import InputError
from pertoken.scenario import Api, Fleet
from pertoken.tables import RATES, USAGE, concat, rate_rows
from pertoken.units import TOKENS_PER_MTOK

_PROMPT = ("input_tokens", "cached_input_tokens")


def api_pools(fleet: Fleet) -> dict[tuple[str, str], str]:
    """The fleet's API pools by (provider, model): what `files.Where.pools` wants."""
    return {
        (pool.price.provider, pool.price.model): name
        for name, pool in fleet.pools.items()
        if isinstance(pool.price, Api)
    }


def api_rates(usage: pa.Table, fleet: Fleet) -> pa.Table:
    """Rates (`tables.RATES`) of the API pools in usage rows, hour by hour.

    Parameters: usage (`tables.USAGE`); the fleet, whose written prices hold where there are any. Else genai-prices
    at the UTC date of the hour, in the step that the hour's mean prompt (prompt tokens ÷ requests) falls in.
    Raises InputError on usage of another schema, UnknownNameError and NoEvidenceError for a model without a price.
    """
    if usage.schema.names != USAGE.names:
        raise InputError(f"usage has the columns {usage.schema.names}, it needs {USAGE.names}")
    sums: dict[tuple[str, datetime], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for hour, pool, meter, quantity in zip(
        *(usage.column(name).to_pylist() for name in ("hour", "pool", "meter", "quantity")), strict=True
    ):
        if pool in fleet.pools and isinstance(fleet.pools[pool].price, Api):
            sums[pool, hour][meter] += float(quantity)
    parts = [
        rate_rows(
            np.array([hour.replace(tzinfo=None)], "datetime64[h]"),
            usd_per_mtok / TOKENS_PER_MTOK,
            pool=pool,
            meter=meter,
            component="api",
            basis="quoted",
            source=source,
        )
        for (pool, hour), counts in sorted(sums.items())
        for meter, usd_per_mtok, source in _prices(fleet, pool, hour, counts)
    ]
    return concat(parts, RATES)


def _prices(
    fleet: Fleet, pool: str, hour: datetime, counts: dict[str, float]
) -> list[tuple[str, float, str]]:
    """(meter, USD per M tokens, source) of a pool's tokens in an hour."""
    price = fleet.pools[pool].price
    assert isinstance(price, Api)
    if price.input_usd_per_mtok is not None and price.output_usd_per_mtok is not None:
        cached = price.cached_input_usd_per_mtok
        written = (price.input_usd_per_mtok, price.input_usd_per_mtok if cached is None else cached)
        return [(m, v, "fleet") for m, v in zip(_PROMPT, written, strict=True)] + [
            ("output_tokens", price.output_usd_per_mtok, "fleet")
        ]
    requests = counts.get("requests", 0.0)
    prompt = sum(counts.get(m, 0.0) for m in _PROMPT) / requests if requests else 0.0
    found = catalog.api_price(price.provider, price.model, hour.date(), input_tokens=prompt)
    return [
        ("input_tokens", found.input_usd_per_mtok, found.source),
        ("cached_input_tokens", found.cached_input_usd_per_mtok, found.source),
        ("output_tokens", found.output_usd_per_mtok, found.source),
    ]
