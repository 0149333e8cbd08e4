"""Idle over those who used the pool: a view of the books that says so, and adds up to them to the last digit.

The books leave idle GPUs and what no pool owns with nobody. A fleet's `chargeback` may ask to see it otherwise: of what
idles in a pool each tenant bears a part as large as its part of the pool's GPU hours (or cost). A pool nobody used, and
what a site has beside its pools, goes by the hours (or cost) of all pools of that site; where nobody used those either,
it stays with nobody.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from datetime import datetime
from fractions import Fraction
from typing import TypeVar

from pertoken.fleet import RunningFleet
from pertoken.ledger import Ledger
from pertoken.meter.attribute import BOOK
from pertoken.units import IDLE, site_pool

Key = TypeVar("Key")
Weights = dict[str, Fraction]
"""By tenant, what it used."""


def apportioned(total: int, weights: Mapping[Key, Fraction]) -> dict[Key, int]:
    """A whole number in whole parts, in proportion to weights, by largest remainder; equal ones in order of their key.

    Parameters: weights, not negative, one at least positive. The parts add up to the total exactly.

    >>> apportioned(100, {"a": Fraction(1), "b": Fraction(1), "c": Fraction(1)})
    {'a': 34, 'b': 33, 'c': 33}
    """
    mass = sum(weights.values(), Fraction(0))
    return rounded(total, {key: total * weight / mass for key, weight in weights.items()})


def rounded(total: int, exact: Mapping[Key, Fraction]) -> dict[Key, int]:
    """Parts rounded down, or up where most was lost, so that they add up to `total`.

    Parameters: total, the sum of the parts rounded to a whole number; exact, the parts, of either sign.

    >>> rounded(2, {"a": Fraction(2, 3), "b": Fraction(2, 3), "c": Fraction(2, 3)})
    {'a': 1, 'b': 1, 'c': 0}
    """
    parts = {key: value.numerator // value.denominator for key, value in exact.items()}
    order = sorted(exact, key=lambda key: (parts[key] - exact[key], str(key)))
    for key in order[: total - sum(parts.values())]:
        parts[key] += 1
    return parts


def weights_of(ledger: Ledger, fleet: RunningFleet, start: datetime, end: datetime) -> dict[str, Weights]:
    """By pool and by ``(site:…)``, what each tenant used of it in the hours from `start` up to, not with, `end`.

    GPU hours, or cost where the fleet's policy says so; a pool nobody used has its site's. Idle is nobody's use.
    """
    found: dict[str, Weights] = defaultdict(lambda: defaultdict(Fraction))
    if fleet.chargeback.spread_idle == "by_cost":
        table, column = ledger.cost("pool", "tenant", where={"book": BOOK}, start=start, end=end), "cost_usd"
    else:
        where = {"book": BOOK, "meter": "gpu_hours"}
        table, column = ledger.usage("pool", "tenant", where=where, start=start, end=end), "quantity"
    sites: dict[str, Weights] = defaultdict(lambda: defaultdict(Fraction))
    for row in table.to_pylist():
        amount = Fraction(row[column] or 0)
        if row["tenant"] == IDLE or amount <= 0:
            continue
        found[row["pool"]][row["tenant"]] += amount
        pool = fleet.pools.get(row["pool"])
        if pool is not None and pool.site:
            sites[pool.site][row["tenant"]] += amount
    for site, weights in sites.items():
        found[site_pool(site)] = weights
        for name, pool in fleet.pools.items():
            if pool.site == site and name not in found:
                found[name] = weights
    return {pool: dict(weights) for pool, weights in found.items()}


def share_of(weights: Mapping[str, Weights], pool: str, tenant: str) -> Fraction:
    """A tenant's part of what idles in a pool; 0 where nobody used it.

    >>> share_of({"h100": {"a": Fraction(1), "b": Fraction(3)}}, "h100", "a")
    Fraction(1, 4)
    """
    used = weights.get(pool, {})
    mass = sum(used.values(), Fraction(0))
    return used.get(tenant, Fraction(0)) / mass if mass else Fraction(0)
