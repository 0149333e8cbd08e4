"""Cuts: rows that hold for every whole solution and bring the relaxation near to it."""

from __future__ import annotations

import numpy as np

from pertoken.plan._builder import INF, Builder
from pertoken.plan._instance import Floats, Instance, Ints


def add_cuts(b: Builder, i: Instance, scale: float) -> None:
    """Whole units, and machines that hold them, by what they serve of each hour's requests: cuts, not limits.

    With D units needed for all requests and x of them served here, x ≤ D and x ≤ n with n whole give, as
    their convex hull, x ≤ D − f·(⌈D⌉ − n), f = D − ⌊D⌋. For D < 1: a replica exists by at least the part it
    serves.
    """
    machines, units = b.columns["machines"], b.columns["units"]
    serving = (i.flow_class >= 0) & (i.flow_unit >= 0)
    serving[serving] = i.unit_whole[i.flow_unit[serving]] & (i.slack_hours[i.flow_class[serving]] == 0)
    of = np.array(i.class_workload)[np.maximum(i.flow_class, 0)] if len(i.class_names) else np.zeros(0)
    for workload in dict.fromkeys(i.class_workload):
        flows = np.flatnonzero(serving & (of == workload))
        for k in np.unique(i.flow_unit[flows]):
            _share(b, i, scale, flows[i.flow_unit[flows] == k], units[k], i.unit_names[k])
        for p in np.unique(i.flow_pool[flows]):
            # Units that fill whole machines share them with nobody; what else serves needs a machine of its
            # own.
            full = i.unit_whole & (i.unit_pool == p) & (i.unit_gpus % max(i.machine_gpus[p], 1) == 0)
            mine = flows[(i.flow_pool[flows] == p) & ~full[i.flow_unit[flows]]]
            if len(mine):
                _share(b, i, scale, mine, machines[p], i.pool_names[p], np.flatnonzero(full))
            here = flows[i.flow_pool[flows] == p]
            if full[i.flow_unit[here]].any():
                _share(b, i, scale, here, machines[p], i.pool_names[p], np.zeros(0, dtype=np.int64))
        pools = np.unique(i.flow_pool[flows])
        if len(pools) > 1:
            _share(b, i, scale, flows, machines[pools], workload, np.zeros(0, dtype=np.int64))


def _share(
    b: Builder, i: Instance, scale: float, flows: Ints, count: Ints, name: str, beside: Ints | None = None
) -> None:
    """The cut of one workload on one unit, or (with the units that fill machines `beside`) on the machines of
    pools."""
    useful, size = i.useful()[flows], np.ones(len(flows))
    if beside is not None:
        size = per_machine(i, i.flow_unit[flows])
    each = size * i.flow_reserve[flows] / useful
    least = np.full(len(i.class_names), INF)
    np.minimum.at(least, i.flow_class[flows], each)
    classes = np.unique(i.flow_class[flows])
    need = (i.requests[classes] * scale * least[classes][:, None]).sum(axis=0)
    part = need - np.floor(need)
    count = np.atleast_2d(count)
    hours = np.flatnonzero((part > _LITTLE) & (count >= 0).all(axis=0))
    if not len(hours):
        return
    weight = part[hours] / need[hours]
    right = 1 - weight * np.ceil(need[hours])
    rows = b.constraint("share", [name], -INF, right[None, :], "units")
    taken = (useful * least[i.flow_class[flows]])[:, None] / need[hours]
    b.add(rows, b.columns["y"][flows][:, hours][:, None, :], taken[:, None, :])
    b.add(rows, count[:, hours][:, None, :], -weight)
    if beside is not None and len(beside):
        filled = per_machine(i, beside)[:, None, None] * weight
        b.add(rows, b.columns["units"][beside][:, hours][:, None, :], filled)


_LITTLE = 0.01
"""Part of a unit below which its cut says nothing."""


def per_machine(i: Instance, units: Ints) -> Floats:
    return np.asarray(i.unit_gpus[units] / i.machine_gpus[i.unit_pool[units]], dtype=np.float64)
