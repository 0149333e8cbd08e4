"""Rows of machines and units: replicas, capacity, what is held, starts and minimum runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pertoken.plan._builder import INF, Builder
from pertoken.plan._cuts import per_machine
from pertoken.plan._instance import Instance, Ints


def machine_rows(b: Builder, i: Instance) -> None:
    n, T = i.sizes, len(i.hours)
    machines, starts, rented, held = (b.columns[k] for k in ("machines", "starts", "rented", "held"))
    units, loads, y = b.columns["units"], b.columns["loads"], b.columns["y"]
    whole = np.flatnonzero(i.unit_whole)
    on_unit = i.flow_unit >= 0
    of_whole = on_unit & np.isin(i.flow_unit, whole)
    if len(whole):
        position = np.full(n["K"], -1, dtype=np.int64)
        position[whole] = np.arange(len(whole))
        names = [i.unit_names[k] for k in whole]
        rows = b.constraint("replica", names, -INF, np.zeros((len(whole), T)), "units")
        b.add(rows[position[i.flow_unit[of_whole]]], y[of_whole], i.flow_reserve[of_whole][:, None])
        b.add(rows, units[whole], -1.0)
        b.add(rows, loads[whole], i.unit_start_hours[whole][:, None])
    pools = np.flatnonzero(i.machine_gpus > 0)
    position = np.full(n["P"], -1, dtype=np.int64)
    position[pools] = np.arange(len(pools))
    names = [i.pool_names[p] for p in pools]
    size = i.machine_gpus[pools].astype(np.float64)
    rows = b.constraint("capacity", names, -INF, np.zeros((len(pools), T)), "machines")
    if len(whole):
        b.add(rows[position[i.unit_pool[whole]]], units[whole], per_machine(i, whole)[:, None])
    part = on_unit & ~of_whole
    b.add(
        rows[position[i.flow_pool[part]]],
        y[part],
        (per_machine(i, i.flow_unit[part]) * i.flow_reserve[part])[:, None],
    )
    b.add(rows, machines[pools], -1.0)
    b.add(rows, starts[pools], i.start_hours[pools][:, None])
    rows = b.constraint("held", names, -INF, np.zeros((len(pools), T)), "machines")
    b.add(rows, machines[pools], 1.0)
    b.add(rows, rented[pools], -1.0)
    b.add(rows, held[pools][:, None], -1.0)
    assert len(size) == len(pools)
    _unit_limits(b, i, part)
    for group in np.unique(i.unit_single[i.unit_single >= 0]):
        mine = np.flatnonzero(i.unit_single == group)
        if len(mine) > 1:
            rows = b.constraint("one_size", [i.unit_names[mine[0]]], -INF, np.ones((1, T)), "units")
            b.add(rows, units[mine], 1.0)


def _unit_limits(b: Builder, i: Instance, part: npt.NDArray[np.bool_]) -> None:
    """Units that are not whole but limited in number, where more than one flow shares the limit."""
    flows_of = (
        np.bincount(i.flow_unit[part], minlength=len(i.unit_pool))
        if part.any()
        else np.zeros(len(i.unit_pool))
    )
    shared = np.flatnonzero((flows_of > 1) & np.isfinite(i.unit_most) & ~i.unit_whole)
    if not len(shared):
        return
    T = len(i.hours)
    position = np.full(len(i.unit_pool), -1, dtype=np.int64)
    position[shared] = np.arange(len(shared))
    limit = np.broadcast_to(i.unit_most[shared][:, None], (len(shared), T)).astype(np.float64)
    rows = b.constraint("replica", [i.unit_names[k] for k in shared], -INF, limit, "units")
    mine = part & np.isin(i.flow_unit, shared)
    b.add(rows[position[i.flow_unit[mine]]], b.columns["y"][mine], 1.0)


def start_rows(b: Builder, i: Instance) -> None:
    for name, on, started, names, initial, least in (
        ("start", "machines", "starts", i.pool_names, i.initial_on, i.min_run),
        ("load", "units", "loads", i.unit_names, i.initial_units, i.unit_min_run),
    ):
        count, begun = b.columns[on], b.columns[started]
        here = np.flatnonzero((begun >= 0).any(axis=1))
        if not len(here):
            continue
        T = len(i.hours)
        right = np.zeros((len(here), T))
        first = i.previous < 0
        right[:, first] = INF if initial is None else initial[here][:, None]
        rows = b.constraint(name, [names[k] for k in here], -INF, right, on)
        b.add(rows, count[here], 1.0)
        b.add(rows, begun[here], -1.0)
        known = i.previous >= 0
        b.add(rows[:, known], count[here][:, i.previous[known]], -1.0)
        keeps = here[least[here] > 1]
        if len(keeps):
            _min_run(b, i, f"run_{on}", names, keeps, count, begun, least)


def _min_run(
    b: Builder,
    i: Instance,
    name: str,
    names: Sequence[str],
    keeps: Ints,
    count: Ints,
    begun: Ints,
    least: Ints,
) -> None:
    rows = b.constraint(name, [names[k] for k in keeps], -INF, np.zeros((len(keeps), len(i.hours))), "hours")
    b.add(rows, count[keeps], -1.0)
    at = np.arange(len(i.hours))
    seen = np.zeros((len(i.hours), 0), dtype=np.int64)
    for step in range(min(int(least[keeps].max()), len(i.hours))):  # a longer run fills all of them
        fresh = (at >= 0) & ~(seen == at[:, None]).any(
            axis=1
        )  # a cyclic day shorter than the run counts once
        use = (least[keeps] > step)[:, None] & fresh[None, :]
        b.add(rows, np.where(use, begun[keeps][:, np.maximum(at, 0)], -1), 1.0)
        seen = np.concatenate([seen, at[:, None]], axis=1)
        at = np.where(at >= 0, i.previous[np.maximum(at, 0)], -1)
