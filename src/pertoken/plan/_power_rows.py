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
    base = -_given_kw(i)[sites]
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
    b.add(rows[position[i.pool_site[i.flow_pool[flows]]]], b.columns["y"][flows], c.energy_flows[flows])
    for number, band in enumerate(i.peaks):
        _peak_rows(b, i, number, band)
    if i.part_load is not None:
        _cap_rows(b, i, i.part_load)


def _cap_rows(b: Builder, i: Instance, part_load: Floats) -> None:
    """power_cap[s,t]: what is on, at no less than its power: that of a unit, n·P(y/n), lies below any tangent of P,
    n·(P(x) − P'(x)·x) + P'(x)·y, and on it at the load x."""
    sites = np.flatnonzero(np.isfinite(i.site_cap_kw).any(axis=1))
    if not len(sites):
        return
    c, line = coefficients(i), i.line_kw()
    rows = b.constraint(
        "power_cap", [i.site_names[s] for s in sites], -INF, (i.site_cap_kw - i.site_base_kw)[sites], "kW"
    )
    for row, s in zip(rows, sites, strict=True):
        for p in np.flatnonzero(i.pool_site == s):
            b.add(row, b.columns["machines"][p], c.energy_machines[p])
            b.add(row, b.columns["starts"][p], c.energy_starts[p])
            b.add(row, b.columns["held"][p], c.energy_off[p])
            b.add(row, b.columns["rented"][p], c.energy_off[p])
        for f in np.flatnonzero((i.pool_site[i.flow_pool] == s) & (i.flow_unit >= 0)):
            unit = int(i.flow_unit[f])
            curve = i.unit_curve[unit] if i.unit_curve else None
            slope = line[f] if curve is None else tangent(curve.load, curve.kw, part_load[unit])[1]
            b.add(row, b.columns["y"][f], slope * i.pue[i.flow_pool[f]])
        for k in np.flatnonzero(i.pool_site[i.unit_pool] == s):
            curve = i.unit_curve[k] if i.unit_curve else None
            if curve is not None:
                rest = tangent(curve.load, curve.kw, part_load[k])[0]
                b.add(row, b.columns["units"][k], rest * i.pue[i.unit_pool[k]])


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


def _given_kw(i: Instance) -> Floats:
    """What a site draws whatever the program decides, shape (S, T)."""
    given = i.site_base_kw.copy()
    if i.spread_kwh is not None:
        metered = i.pool_site >= 0
        np.add.at(given, i.pool_site[metered], i.spread_kwh[metered])
    return given


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
    total = _given_kw(i)[band.site]
    for p in np.flatnonzero(i.pool_site == band.site):
        flows = np.flatnonzero((i.flow_pool == p) & (i.flow_unit >= 0))
        per_gpu = (i.line_kw()[flows].max(axis=1) / i.unit_gpus[i.flow_unit[flows]]).max(initial=0.0)
        each = max(float(i.machine_kw[p]), float(i.off_kw[p])) + i.start_kwh[p] + per_gpu * i.machine_gpus[p]
        most = np.minimum(i.held_most[p] + i.rented_most[p], i.machines_most[p])
        total = total + i.pue[p] * np.maximum(most, i.held_most[p]) * each
    most_kw = float(np.minimum(total, i.site_cap_kw[band.site]).max())
    if not np.isfinite(most_kw):
        raise InputError(
            f"site {i.site_names[band.site]!r}: its demand charge gets cheaper per kW with each tier, and nothing "
            "limits its power: give it a power_cap_kw"
        )
    return max(most_kw, band.already_kw)


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
