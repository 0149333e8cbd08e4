"""Rows of power: each site's meter, its cap, and the peaks that are billed, with their ratchets and tiers."""

from __future__ import annotations

import numpy as np

from pertoken.errors import InputError
from pertoken.plan._builder import INF, Builder
from pertoken.plan._goal import coefficients
from pertoken.plan._instance import Floats, Instance, Peak


def peak_variables(b: Builder, i: Instance) -> None:
    """peak[i,k]: kW billed in each tier; metered[i]: highest kw where later months look back on it; tier[i,k]: 1 where
    the tier before k is full, for charges whose price falls from tier to tier."""
    tiers = max((len(peak.meters) for peak in i.peaks), default=1)
    width, already = np.zeros((len(i.peaks), tiers)), np.zeros((len(i.peaks), tiers))
    falls, reached = np.zeros(width.shape, dtype=np.bool_), np.zeros(width.shape)
    for number, peak in enumerate(i.peaks):
        mine = slice(0, len(peak.meters))
        width[number, mine], already[number, mine] = peak.tiers(INF), peak.tiers(peak.already_kw)
        if _falls(i, peak):
            falls[number, 1 : len(peak.meters)] = True
            reached[number] = already[number] > 0
    b.variable("peak", width, exists=width > 0, lower=already)
    looked = np.zeros(len(i.peaks), dtype=np.bool_)
    looked[[q for k in i.peaks if not k.ratchet_billed for q, _ in k.ratchets]] = True
    seen = np.array([k.so_far_kw for k in i.peaks], dtype=np.float64)
    b.variable("metered", np.full(len(i.peaks), INF), exists=looked, lower=seen)
    b.variable("tier", np.ones(width.shape), exists=falls, lower=reached, integer=True)


def _falls(i: Instance, peak: Peak) -> bool:
    """Whether a kW gets cheaper with more of them: then tiers are not filled in order by themselves."""
    return bool((np.diff(i.peak_prices(peak)) < -1e-12).any())


def power_rows(b: Builder, i: Instance) -> None:
    kw = b.columns["kw"]
    sites = np.flatnonzero((kw >= 0).any(axis=1))
    if not len(sites):
        return
    c = coefficients(i)
    position = np.full(len(i.site_names), -1, dtype=np.int64)
    position[sites] = np.arange(len(sites))
    by_load, by_unit = drawn_kwh(i)
    base = -i.site_base_kw[sites]
    rows = b.constraint("power", [i.site_names[s] for s in sites], base, base, "kW")
    b.add(rows, kw[sites], -1.0)
    here = np.isin(i.pool_site, sites)
    pools = np.flatnonzero(here)
    mine = rows[position[i.pool_site[pools]]]
    b.add(mine, b.columns["machines"][pools], c.energy_machines[pools])
    b.add(mine, b.columns["starts"][pools], c.energy_starts[pools])
    b.add(mine, b.columns["held"][pools][:, None], c.energy_off[pools])
    b.add(mine, b.columns["rented"][pools], c.energy_off[pools])
    flows = np.flatnonzero(here[i.flow_pool])
    b.add(rows[position[i.pool_site[i.flow_pool[flows]]]], b.columns["y"][flows], by_load[flows])
    units = np.flatnonzero(here[i.unit_pool])
    b.add(rows[position[i.pool_site[i.unit_pool[units]]]], b.columns["units"][units], by_unit[units])
    for number, band in enumerate(i.peaks):
        _peak_rows(b, i, number, band)


def drawn_kwh(i: Instance) -> tuple[Floats, Floats]:
    """Energy at the meter per unit of load (F, T) and per unit that runs (K, T), as the program has it [kWh].

    On the line below a unit's curve P; where `part_load` x is given, on the tangent there, which lies over it:
    n·P(y/n) ≤ n·(P(x) − P'(x)·x) + P'(x)·y.
    """
    by_load, by_unit = i.line_kw().copy(), np.zeros((len(i.unit_pool), len(i.hours)))
    if i.part_load is not None:
        for k, curve in enumerate(i.unit_curve):
            if curve is not None and i.unit_whole[k]:
                rest, slope = tangent(curve.load, curve.kw, i.part_load[k])
                by_unit[k], by_load[i.flow_unit == k] = rest, slope
    return by_load * i.pue[i.flow_pool], by_unit * i.pue[i.unit_pool]


def tangent(load: Floats, kw: Floats, at: Floats) -> tuple[Floats, Floats]:
    """A line over a curve, near it at the loads `at` (T,): kW at no load, and kW per unit of load.

    >>> rest, slope = tangent(np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.4, 0.5]), np.array([0.25, 0.75]))
    >>> rest.round(3).tolist(), slope.round(3).tolist()
    ([0.0, 0.3], [0.8, 0.2])
    """
    right = np.clip(np.searchsorted(load, at), 1, len(load) - 1)
    slope = (kw[right] - kw[right - 1]) / (load[right] - load[right - 1])
    rest = (kw[None, :] - slope[:, None] * load[None, :]).max(axis=1)
    return np.asarray(rest, dtype=np.float64), np.asarray(slope, dtype=np.float64)


def _peak_rows(b: Builder, i: Instance, number: int, band: Peak) -> None:
    """The peak of one charge and month: what its hours draw, what earlier months ratchet, tiers filled in order."""
    kw, peak, metered = b.columns["kw"], b.columns["peak"], b.columns["metered"]
    hours = np.flatnonzero(band.hours)
    name = f"{i.site_names[band.site]} {band.meters[0]}"
    billed = peak[number][peak[number] >= 0]
    rows = b.constraint("peak", [name], -INF, np.zeros((1, len(hours))), "kW")
    b.add(rows, kw[band.site, hours], 1.0)
    if metered[number] >= 0:
        b.add(rows, metered[number], -1.0)
        rows = b.constraint("peak", [name], -INF, np.zeros((1, 1)), "kW")
        b.add(rows, metered[number], 1.0)
    b.add(rows, billed[:, None, None], -1.0)
    for earlier, fraction in band.ratchets:
        before = peak[earlier][peak[earlier] >= 0] if band.ratchet_billed else metered[earlier : earlier + 1]
        rows = b.constraint("ratchet", [name], -INF, np.zeros((1, 1)), "kW")
        b.add(rows, before[:, None, None], fraction)
        b.add(rows, billed[:, None, None], -1.0)
    _tier_rows(b, i, number, band, name)


def _tier_rows(b: Builder, i: Instance, number: int, band: Peak, name: str) -> None:
    """width·tier[k] ≤ peak[k−1] and peak[k] ≤ most·tier[k]: a tier is used only once the one before it is full."""
    peak, tier = b.columns["peak"][number], b.columns["tier"][number]
    width = band.tiers(INF)
    for k in np.flatnonzero(tier >= 0):
        most = min(float(width[k]), _most_kw(i, band))
        rows = b.constraint("tier", [name], -INF, np.zeros((2, 1)), "kW")
        b.add(rows[0], tier[k : k + 1], float(width[k - 1]))
        b.add(rows[0], peak[k - 1 : k], -1.0)
        b.add(rows[1], peak[k : k + 1], 1.0)
        b.add(rows[1], tier[k : k + 1], -most)


def _most_kw(i: Instance, band: Peak) -> float:
    """More kW than a site can draw, or is billed already."""
    most_kw = float(np.minimum(most_kw_of(i, band.site), i.site_cap_kw[band.site]).max())
    if not np.isfinite(most_kw):
        raise InputError(
            f"site {i.site_names[band.site]!r}: its demand charge gets cheaper per kW with each tier, and nothing "
            "limits its power: give it a power_cap_kw"
        )
    return max(most_kw, band.already_kw)


def most_kw_of(i: Instance, site: int) -> Floats:
    """More kW than a site's machines and what else its meter sees can draw in each hour (T,)."""
    total, (by_load, by_unit) = i.site_base_kw[site].copy(), drawn_kwh(i)
    for p in np.flatnonzero(i.pool_site == site):
        flows = np.flatnonzero((i.flow_pool == p) & (i.flow_unit >= 0))
        units = i.flow_unit[flows]
        per_gpu = ((by_load[flows] + by_unit[units]) / i.unit_gpus[units][:, None]).max(axis=0, initial=0.0)
        each = max(float(i.machine_kw[p]), float(i.off_kw[p])) + i.start_kwh[p]
        most = np.maximum(np.minimum(i.held_most[p] + i.rented_most[p], i.machines_most[p]), i.held_most[p])
        total = total + most * (i.pue[p] * each + per_gpu * i.machine_gpus[p])
    return np.asarray(total, dtype=np.float64)


def peak_prices(i: Instance, shape: tuple[int, ...]) -> Floats:
    prices = np.zeros(shape)
    for number, peak in enumerate(i.peaks):
        found = i.peak_prices(peak)
        prices[number, : len(found)] = found
    return prices


def billed_kw(i: Instance, site_kw: Floats) -> Floats:
    """kW billed of each peak for a load [kW, (S, T)]: the highest of metered, already due, and earlier months'
    ratchets."""
    metered, billed = np.zeros(len(i.peaks)), np.zeros(len(i.peaks))
    for number, k in enumerate(i.peaks):
        metered[number] = max(k.so_far_kw, float(site_kw[k.site][k.hours].max(initial=0.0)))
        before = billed if k.ratchet_billed else metered
        due = max((fraction * float(before[q]) for q, fraction in k.ratchets), default=0.0)
        billed[number] = max(k.already_kw, metered[number], due)
    return billed
