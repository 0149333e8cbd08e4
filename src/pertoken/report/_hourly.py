"""What a pool or a site owes for every hour, whoever was there: overheads that are paid by the hour."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa

from pertoken.fleet import RunningFleet
from pertoken.meter._split import MICRO, split
from pertoken.meter.attribute import BOOK
from pertoken.rates.site import UTILITY_HOURS
from pertoken.report._terms import hours_between
from pertoken.scenario import Api
from pertoken.tables import usage_rows
from pertoken.units import IDLE, base_meter, site_pool

HOUR = timedelta(hours=1)
Priced = set[tuple[Any, Any, Any]]
"""Pool, hour and meter of what is paid by the hour."""


def priced_by_the_hour(rates: pa.Table) -> Priced:
    """What of these rates is paid by the hour."""
    columns = (rates[name].to_pylist() for name in ("pool", "hour", "meter"))
    return {row for row in zip(*columns, strict=True) if base_meter(str(row[2])) == "site_hours"}


def paid_by_the_hour(
    fleet: RunningFleet, hour: datetime, usage: pa.Table, priced: Priced, micro: int = MICRO
) -> list[pa.Table]:
    """One hour, or `micro` millionths of it, of every site and pool whose overheads are paid by the hour.

    A pool's hour goes to whoever held its GPUs (an API's: to whoever used its tokens); a site's is nobody's.
    """
    hours = hours_between(hour, hour + HOUR)
    gone = micro / MICRO
    tables = [
        usage_rows(
            hours,
            {("idle", name): gone},
            book=BOOK,
            pool=site_pool(site),
            model="",
            tenant=IDLE,
            basis="measured",
        )
        for site in fleet.sites
        for name in ("site_hours", UTILITY_HOURS)
        if (site_pool(site), hour, name) in priced
    ]
    pools = [p for p in fleet.pools if (p, hour, "site_hours") in priced]
    weights: dict[str, dict[tuple[str, str, str], float]] = defaultdict(lambda: defaultdict(float))
    if pools:
        for row in usage.select(["pool", "model", "tenant", "phase", "meter", "quantity"]).to_pylist():
            api = isinstance(fleet.pools[row["pool"]].price, Api)
            if base_meter(row["meter"]).endswith("_tokens") if api else row["meter"] == "gpu_hours":
                weights[row["pool"]][row["model"], row["tenant"], row["phase"]] += float(row["quantity"])
    for pool in pools:
        parts = split(micro, weights.get(pool) or {("", IDLE, "idle"): 1.0})
        tables += [
            usage_rows(
                hours,
                {(phase, "site_hours"): part / MICRO},
                book=BOOK,
                pool=pool,
                model=model,
                tenant=tenant,
                basis="measured:gpu_hours",
            )
            for (model, tenant, phase), part in parts.items()
        ]
    return tables
