"""Energy of a pool-hour at three boundaries, each with the weights that split it.

GPU boards are measured (DCGM, NVML). The server's plug is measured (Kepler, a PDU) or the boards plus the
host from the catalogue: W = host_idle + (host_busy − host_idle) × utilisation, per GPU. The utility meter is
measured or the plug × PUE. Idle GPU-hours take their idle power, busy ones share the rest by GPU-hours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pertoken.catalog import gpus
from pertoken.meter._tally import Tally
from pertoken.scenario import Pool, Site
from pertoken.units import WATTS_PER_KILOWATT

Rows = Mapping[tuple[str, str, str, str], float]
"""GPU-hours by (model, tenant, phase, basis)."""


class Energy(NamedTuple):
    """One meter's total, the weights that split it by row, and its basis."""

    meter: str
    total: float
    weights: dict[tuple[str, str, str, str], float]
    basis: str


def energies(tally: Tally, pool: Pool, site: Site, gpu_hours: Rows) -> list[Energy]:
    """Energy [kWh] of a pool-hour: boards, plug and utility meter, and gCO2e where the site says its
    intensity.

    A node's reading and its boards' are the same joules: the node's is taken for the plug, never their sum.
    Nothing where nothing was measured.
    """
    card = gpus.gpu(pool.gpu)
    held = sum(gpu_hours.values())
    idle = sum(h for (_, _, phase, _), h in gpu_hours.items() if phase == "idle")
    board = tally.sum("device", "gpu_energy_kwh")
    node, meter = tally.sum("node", "it_energy_kwh"), tally.sum("site", "energy_kwh")
    busy = 1 - idle / held if held else 0.0
    host_w = card.host_idle_w + (card.host_busy_w - card.host_idle_w) * busy
    plug, plug_basis = node, "measured:node"
    if not node and board:
        plug, plug_basis = board + host_w * held / WATTS_PER_KILOWATT, "measured:gpu+host"
    utility, utility_basis = meter, "measured:meter"
    if not meter and plug:
        utility, utility_basis = plug * site.pue, f"{plug_basis}×pue"
    if not plug and utility:
        plug, plug_basis = utility / site.pue, "measured:meter/pue"
    found = []
    if board:
        found.append(Energy("gpu_energy_kwh", board, _weights(gpu_hours, board, card.idle_w), "measured"))
    weights = _weights(gpu_hours, plug, card.idle_w + card.host_idle_w)
    if plug:
        found.append(Energy("it_energy_kwh", plug, weights, plug_basis))
        found.append(Energy("energy_kwh", utility, weights, utility_basis))
        if site.carbon_g_per_kwh:
            grams = utility * site.carbon_g_per_kwh
            found.append(Energy("gco2e", grams, weights, "quoted:site_intensity"))
    return found


def _weights(gpu_hours: Rows, total: float, idle_w: float) -> dict[tuple[str, str, str, str], float]:
    """Shares of an energy [kWh]: idle rows at `idle_w` per GPU, busy rows the rest by GPU-hours.

    Where that leaves busy rows less than the idle power too, all rows share by GPU-hours.
    """
    idle = sum(h for (_, _, phase, _), h in gpu_hours.items() if phase == "idle")
    busy = sum(gpu_hours.values()) - idle
    at_idle = idle * idle_w / WATTS_PER_KILOWATT
    per_busy = (total - at_idle) / busy if busy else 0.0
    if not busy or not idle or per_busy < idle_w / WATTS_PER_KILOWATT:
        return dict(gpu_hours)
    return {
        key: hours * (idle_w / WATTS_PER_KILOWATT if key[2] == "idle" else per_busy)
        for key, hours in gpu_hours.items()
    }
