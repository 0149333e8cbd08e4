"""What it costs: the rates, what is paid by the hour, energy tiers and demand charges of a planning instance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from pertoken.errors import InputError
from pertoken.plan._instance import Fixed, Floats, Instance, Peak, Rate
from pertoken.plan._outcome import Schedule
from pertoken.plan._pricing import pays_for_energy
from pertoken.plan.options import Market
from pertoken.rates.energy import DemandHours, TariffHours, billed_peaks_kw, tier_shares
from pertoken.rates.site import UTILITY_HOURS, peak_meter
from pertoken.scenario import Api, Pool, Scenario
from pertoken.units import site_pool


def money(scenario: Scenario, market: Market, pools: list[str]) -> dict[str, Any]:
    """Rates, sites, demand charges and what is paid with a site or pool."""
    T, sites = len(scenario.hours), list(scenario.sites)
    rates: list[Rate] = []
    for name in pools:
        rates += _rates(market.pool_rates(name), scenario)
    used = [s for s in sites if any(scenario.pools[p].site == s for p in pools)]
    for site in used:
        rates += _rates(market.site_rates(site), scenario)
    named = {(r.pool, r.meter) for r in rates}
    fixed = []
    for site in used:
        there = np.array([scenario.pools[p].site == site for p in pools])
        metered = np.array([pays_for_energy(scenario.pools[p]) for p in pools])
        for meter, who in (("site_hours", there), (UTILITY_HOURS, there & metered)):
            if (site_pool(site), meter) in named and who.any():
                fixed.append(Fixed(site_pool(site), meter, np.ones(T), who))
    for p, name in enumerate(pools):
        if (name, "site_hours") in named:
            fixed.append(Fixed(name, "site_hours", np.ones(T), np.arange(len(pools)) == p))
    paying = np.array([bool(scenario.pools[p].site) and _metered(scenario, scenario.pools[p]) for p in pools])
    shares: dict[int, Floats] = {}
    for s, site in enumerate(sites):
        tariff = market.tariff(site) if site in used else None
        if tariff is not None and tariff.tariff.tiers > 1:
            shares[s] = np.zeros((tariff.tariff.tiers, T))
            shares[s][0] = 1.0
    peaks: list[Peak] = []
    for s, site in enumerate(sites):
        if site in used:
            peaks += _peaks(scenario, market, s, site, len(peaks))
    caps = [scenario.sites[s].power_cap_kw for s in sites]
    return {
        "site_names": tuple(sites), "site_base_kw": np.zeros((len(sites), T)),
        "site_cap_kw": np.array([[math.inf if c is None else c] * T for c in caps]).reshape(len(sites), T),
        "pool_site": np.array(
            [sites.index(scenario.pools[p].site) if pays else -1 for p, pays in zip(pools, paying, strict=True)],
            dtype=np.int64,
        ),
        "rates": tuple(rates), "fixed": tuple(fixed), "tier_shares": shares,
        "peaks": tuple(peaks),
    }  # fmt: skip


def _metered(scenario: Scenario, pool: Pool) -> bool:
    """Whether the pool's power counts at the site's meter: its bill, or its cap."""
    if isinstance(pool.price, Api):
        return False
    return pays_for_energy(pool) or scenario.sites[pool.site].power_cap_kw is not None


def _rates(table: pa.Table, scenario: Scenario) -> Iterator[Rate]:
    """Rate rows as arrays over the horizon; rows of one pool, meter, component and source make one."""
    index = np.searchsorted(
        scenario.hours, table["hour"].to_numpy(zero_copy_only=False).astype("datetime64[h]")
    )
    values = table["usd_per_unit"].cast(pa.float64()).to_numpy(zero_copy_only=False)
    columns = [table[name].to_pylist() for name in ("pool", "meter", "component", "basis", "source")]
    found: dict[tuple[str, ...], Floats] = {}
    for at, value, key in zip(index, values, zip(*columns, strict=True), strict=True):
        found.setdefault(key, np.zeros(len(scenario.hours)))[at] += value
    for (pool, meter, component, basis, source), usd in found.items():
        yield Rate(pool, meter, component, usd, basis, source)


def _peaks(scenario: Scenario, market: Market, number: int, name: str, before: int) -> Iterator[Peak]:
    """The site's demand charges by billing period, with what is billed already; `before`: peaks of sites before it."""
    site, tariff = scenario.sites[name], market.tariff(name)
    if tariff is None:
        return
    T = len(scenario.hours)
    least = billed_peaks_kw(tariff, np.zeros(T), previous_peaks_kw=site.previous_peaks_kw or None)
    unknown = set(site.peak_so_far_kw) - {charge.name for charge in tariff.demand}
    if unknown:
        raise InputError(
            f"site {name!r}: peak_so_far_kw names {min(unknown)!r}, which its tariff lacks in this horizon"
        )
    first, at = tariff.first_hours(), before
    for charge in tariff.demand:
        numbers: dict[int, int] = {}
        for period in range(tariff.periods):
            hours = charge.mask & (tariff.period == period)
            if not hours.any():
                continue
            so_far = site.peak_so_far_kw.get(charge.name, 0.0) if period == 0 else 0.0
            meters = tuple(peak_meter(charge.name, k) for k in range(len(charge.upper_kw)))
            due = max(so_far, float(least[charge.name][period]))
            ratchet = charge.demand.ratchet
            yield Peak(
                number, meters, hours, int(first[period]), due, tuple(float(u) for u in charge.upper_kw), so_far,
                _looks_back(tariff, charge, period, numbers), ratchet is not None and ratchet.peaks == "billed",
            )  # fmt: skip
            numbers[period] = at
            at += 1


def _looks_back(
    tariff: TariffHours, charge: DemandHours, period: int, numbers: dict[int, int]
) -> tuple[tuple[int, float], ...]:
    """Earlier months of the horizon whose peak a month's ratchet looks back on: their numbers, and the fraction due."""
    ratchet = charge.demand.ratchet
    if ratchet is None or _month(tariff, period) not in ratchet.in_months:
        return ()
    return tuple(
        (n, ratchet.fraction)
        for earlier, n in numbers.items()
        if period - earlier <= ratchet.months and _month(tariff, earlier) in ratchet.of_months
    )


def _month(tariff: TariffHours, period: int) -> int:
    return int(tariff.period_names[period][-2:])


def with_tiers(instance: Instance, made: Schedule, market: Market) -> Instance:
    """The instance with each hour's energy in the tier it falls in under a schedule."""
    shares = {}
    for s in instance.tier_shares:
        tariff = market.tariff(instance.site_names[s])
        assert tariff is not None
        shares[s] = tier_shares(tariff, made.site_kw[s] - instance.site_base_kw[s])
    return replace(instance, tier_shares=shares) if shares else instance
