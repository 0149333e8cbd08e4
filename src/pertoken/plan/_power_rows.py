"""Rows of power: each site's meter, its cap, and the peaks that are billed."""

from __future__ import annotations

import numpy as np

from pertoken.plan._builder import INF, Builder
from pertoken.plan._goal import coefficients
from pertoken.plan._instance import Floats, Instance


def power_rows(b: Builder, i: Instance) -> None:
    kw, peak = b.columns["kw"], b.columns["peak"]
    sites = np.flatnonzero((kw >= 0).any(axis=1))
    if not len(sites):
        return
    c = coefficients(i)
    position = np.full(len(i.site_names), -1, dtype=np.int64)
    position[sites] = np.arange(len(sites))
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
    b.add(rows[position[i.pool_site[i.flow_pool[flows]]]], b.columns["y"][flows], c.energy_flows[flows])
    for number, band in enumerate(i.peaks):
        hours = np.flatnonzero(band.hours)
        name = f"{i.site_names[band.site]} {band.meters[0]}"
        rows = b.constraint("peak", [name], -INF, np.zeros((1, len(hours))), "kW")
        b.add(rows, kw[band.site, hours], 1.0)
        b.add(rows, peak[number][peak[number] >= 0][:, None, None], -1.0)


def peak_prices(i: Instance, shape: tuple[int, ...]) -> Floats:
    prices = np.zeros(shape)
    for number, peak in enumerate(i.peaks):
        found = i.peak_prices(peak)
        prices[number, : len(found)] = found
    return prices
