"""Tokens of API calls put into the price step of their prompt's length, on arrival: only then is a call known whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.compute as pc

from pertoken import catalog
from pertoken.fleet import RunningFleet
from pertoken.meter.records import RECORDS, STEPPED
from pertoken.scenario import Api
from pertoken.units import SERVED_TOKEN_METERS

_PROMPT = ("input_tokens", "cached_input_tokens")


def stepped(rows: pa.Table, fleet: RunningFleet) -> pa.Table:
    """Records, the tokens of API calls under the meter of their price step (``input_tokens:above200000``).

    Parameters: rows (`records.RECORDS`); the fleet. A call is what one (source, key) tells with one of
    `requests`: its prompt is all its input, cached or not, and the whole call is charged at the step its
    prompt is longer than. Calls of pools whose price is written have no steps. Records that name no pool
    take the API pool of their model, as attribution does. The steps are those of the day of the call.
    Raises InputError where the catalogue has no price for that day.
    """
    places = _places(fleet)
    if not places or not rows.num_rows:
        return rows
    names: Any = pa.array(
        sorted({*places.values(), ""} if "" in _unique(rows, "pool") else {*places.values()})
    )
    of_usage = pc.starts_with(rows.column("source"), "usage/")
    meters: Any = pa.array([*SERVED_TOKEN_METERS, "requests"])
    chosen = pc.and_(
        of_usage, pc.and_(pc.is_in(rows.column("pool"), names), pc.is_in(rows.column("meter"), meters))
    )
    if not pc.any(chosen).as_py():
        return rows
    at: list[Any] = pc.indices_nonzero(chosen).to_pylist()
    some = rows.take(pa.array(at, pa.int64()))
    found = _meters(some.to_pylist(), places, fleet)
    new = {i: meter for i, meter in zip(at, found, strict=True) if meter}
    if not new:
        return rows
    columns = {name: rows.column(name) for name in rows.column_names}
    for name in ("meter", "basis"):
        values: list[Any] = rows.column(name).to_pylist()
        for i, meter in new.items():
            values[int(i)] = meter if name == "meter" else STEPPED
        columns[name] = pa.chunked_array([pa.array(values, RECORDS.field(name).type)])
    return pa.table([columns[name] for name in RECORDS.names], schema=RECORDS)


def _unique(rows: pa.Table, name: str) -> list[Any]:
    return pc.unique(rows.column(name)).to_pylist()


def _places(fleet: RunningFleet) -> dict[str, str]:
    """API pools with a catalogue price under any terms, by the model they are of (`model/…`) and by name."""
    prices = [(n, p.price) for n, p in fleet.pools.items()]
    prices += [(c.pool, c.price) for c in fleet.changes if c.price is not None]
    found: dict[str, str] = {}
    for name, price in prices:
        if isinstance(price, Api) and price.input_usd_per_mtok is None:
            found[f"pool/{name}"] = name
            found.setdefault(f"model/{price.model}", name)
    return found


def _meters(rows: list[dict[str, Any]], places: Mapping[str, str], fleet: RunningFleet) -> list[str]:
    """The meter of each row's step; empty where it stays."""
    prompts: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], float] = defaultdict(float)
    for row in rows:
        key = row["source"], row["key"]
        prompts[key] += row["quantity"] * (row["meter"] in _PROMPT)
        calls[key] += row["quantity"] * (row["meter"] == "requests")
    steps: dict[tuple[str, datetime], tuple[int, ...]] = {}
    result = []
    for row in rows:
        key = row["source"], row["key"]
        pool = row["pool"] or places.get(f"model/{row['model']}", "")
        if not pool or row["meter"] == "requests" or calls[key] != 1:
            result.append("")
            continue
        hour = row["ts"].replace(minute=0, second=0, microsecond=0)
        if (pool, hour) not in steps:
            steps[pool, hour] = _steps(fleet, pool, hour)
        above = max((s for s in steps[pool, hour] if prompts[key] > s), default=0)
        result.append(f"{row['meter']}:above{above}" if above else "")
    return result


def _steps(fleet: RunningFleet, pool: str, hour: datetime) -> tuple[int, ...]:
    """Lower ends [tokens] of a pool's price steps in an hour."""
    terms = fleet.at(hour)
    price, site = terms.pools[pool].price, terms.pools[pool].site
    if not isinstance(price, Api) or price.input_usd_per_mtok is not None:
        return ()
    zone = ZoneInfo(terms.sites[site].timezone) if site else UTC
    return _of_day(price.provider, price.model, hour.astimezone(zone).date())


@lru_cache(maxsize=4096)
def _of_day(provider: str, model: str, day: date) -> tuple[int, ...]:
    found = catalog.api_price(provider, model, on=day)
    return tuple(int(tier.above_input_tokens) for tier in found.tiers)
