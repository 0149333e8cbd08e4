"""Rows of what a plan must keep to, whatever it costs: fewest replicas, and what stands on premises first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pertoken.plan._builder import INF, Builder, Program
from pertoken.plan._goal import AMPLE, Goal
from pertoken.plan._instance import Floats, Instance, Ints

if TYPE_CHECKING:
    from pertoken.plan._solve import Session

_LITTLE_GPUS = 0.01
"""Less than any two unit sizes differ by: room short of a unit by this much is no room."""

_LITTLE_LOAD = 0.001
"""Load of a unit that does something."""


@dataclass(frozen=True)
class Group:
    """A workload or a job that may run on premises and beyond: flows there (`own`) and elsewhere (`burst`), and the
    pools on premises that must be full before it goes elsewhere."""

    name: str
    own: Ints
    burst: Ints
    pools: Ints
    job: int


def groups(i: Instance) -> list[Group]:
    """Who the policy binds. A pool that could not do a job alone within its window does not keep the job from going
    elsewhere: one job is never split over pools."""
    if i.on_prem is None:
        return []
    found = []
    workload = np.array(i.class_workload)[np.maximum(i.flow_class, 0)] if i.class_names else i.flow_class
    for name in dict.fromkeys(i.class_workload):
        flows = np.flatnonzero((i.flow_class >= 0) & (workload == name))
        found.append(_group(i, name, flows, -1))
    for j, name in enumerate(i.job_names):
        hours = int(i.job_deadline[j] - i.job_release[j])
        flows = np.flatnonzero(i.flow_job == j)
        able = ~i.on_prem[i.flow_pool[flows]] | (i.useful()[flows] * hours >= i.job_tokens[j])
        found.append(_group(i, name, flows[able], j))
    return [g for g in found if len(g.own) and len(g.burst)]


def _group(i: Instance, name: str, flows: Ints, job: int) -> Group:
    assert i.on_prem is not None
    here = i.on_prem[i.flow_pool[flows]] & (i.held_most + i.rented_most.max(axis=1) > 0)[i.flow_pool[flows]]
    beyond = ~i.on_prem[i.flow_pool[flows]]
    return Group(name, flows[here], flows[beyond], np.unique(i.flow_pool[flows[here]]), job)


def policy_variables(b: Builder, i: Instance) -> None:
    """any[w,t]: 1 where replicas answer workload w; full[g,t]: 1 where no more of g fits on premises."""
    least = {w: n for w, n in i.minimum.items() if n > 1 and len(_replicas(i, w))}
    asked = np.zeros((len(least), len(i.hours)))
    for number, w in enumerate(least):
        of = np.array([c == w for c in i.class_workload])
        api = (i.flow_unit < 0) & (i.flow_class >= 0) & of[np.maximum(i.flow_class, 0)]
        if not api.any() and not i.slack_hours[of].any():
            asked[number] = i.requests[of].sum(axis=0) > 0
    b.variable("any", np.ones(asked.shape), lower=asked, integer=True)
    b.variable("full", np.ones((len(groups(i)), len(i.hours))), integer=True)


def _replicas(i: Instance, workload: str) -> Ints:
    """Whole units of a workload."""
    of = np.array([c == workload for c in i.class_workload])
    flows = np.flatnonzero((i.flow_class >= 0) & (i.flow_unit >= 0))
    units = np.unique(i.flow_unit[flows[of[i.flow_class[flows]]]])
    return np.asarray(units[i.unit_whole[units]], dtype=np.int64)


def _most_served(i: Instance, goal: Goal) -> Floats:
    """Most requests of each class that can be served in each hour, shape (D, T): what comes and what waits."""
    waits = i.waiting_most()
    before = np.where(i.previous >= 0, waits[:, np.maximum(i.previous, 0)], 0.0)
    if i.initial_backlog is not None:
        before[:, i.previous < 0] = i.initial_backlog[:, None]
    return (i.requests + before) * (AMPLE if goal.objective == "tokens" else goal.scale)


def minimum_rows(b: Builder, i: Instance, goal: Goal) -> None:
    """An hour in which replicas answer a workload has at least so many of them; hours an API answers alone, none."""
    names = [w for w, n in i.minimum.items() if n > 1 and len(_replicas(i, w))]
    served = _most_served(i, goal) if names else np.zeros((0, 0))
    for w, answers in zip(names, b.columns["any"], strict=True):
        units = _replicas(i, w)
        of = np.array([c == w for c in i.class_workload])
        flows = np.flatnonzero(np.isin(i.flow_unit, units) & (i.flow_class >= 0))
        most = served[of].sum(axis=0)
        size = max(float(most.mean()), 1e-9)
        rows = b.constraint("minimum", [w], -INF, np.zeros((1, len(i.hours))), "replicas")
        b.add(rows, answers[None], float(i.minimum[w]))
        b.add(rows, b.columns["units"][units], -1.0)
        rows = b.constraint("answers", [w], -INF, np.zeros((1, len(i.hours))), "requests", np.array([size]))
        b.add(rows, b.columns["y"][flows], (i.useful()[flows] / size)[:, None])
        b.add(rows, answers[None], -most / size)


def on_prem_rows(b: Builder, i: Instance, goal: Goal) -> None:
    """What runs elsewhere in an hour leaves no room on premises in it: no further unit fits, those there are loaded."""
    served = _most_served(i, goal)
    for g, full in zip(groups(i), b.columns["full"], strict=True):
        _burst(b, i, goal, g, full, served)
        for p in g.pools:
            mine = g.own[i.flow_pool[g.own] == p]
            _room(b, i, g, int(p), mine, full)
            if g.job < 0:
                _loaded(b, i, g, int(p), mine, full)
            _no_stand_ins(b, i, g, int(p), mine if g.job < 0 else mine[:0], full)


def settle_full(i: Instance, program: Program, session: Session) -> bool:
    """Fix full[g,t] where the work of the hour is more than what on premises is left for it; False where that is
    infeasible. What others have there in the relaxation is taken."""
    columns = program.columns["full"]
    if not columns.size:
        return True
    x = session.x
    held = _at(x, program.columns["held"])
    units, y = _at(x, program.columns["units"]), _at(x, program.columns["y"])
    for g, full in zip(groups(i), columns, strict=True):
        fits = np.zeros(len(i.hours))
        for p in g.pools:
            mine = g.own[i.flow_pool[g.own] == p]
            others = np.flatnonzero(
                (i.unit_pool == p) & i.unit_whole & ~np.isin(np.arange(len(i.unit_pool)), i.flow_unit[mine])
            )
            left = (held[p] + i.rented_most[p]) * i.machine_gpus[p] - (
                units[others] * i.unit_gpus[others][:, None]
            ).sum(axis=0)
            size = i.unit_gpus[i.flow_unit[mine]] * i.flow_reserve[mine]
            if g.job >= 0:
                fits += left >= size.min() - _LITTLE_GPUS
            else:
                # In units of the load that came: what all of this hour's requests would take here.
                fits += np.floor(left / i.unit_gpus[i.flow_unit[mine]].min() + _LITTLE_GPUS)
        if g.job >= 0:
            burst = y[g.burst].sum(axis=0) > 1e-6
            value = np.where(burst & (fits < 0.5), 1.0, 0.0)
        else:
            value = (_units_asked(i, g) > fits + 1e-9).astype(np.float64)
        session.bounds(full, value, value)
    return session.relax()


def _at(x: Floats, columns: Ints) -> Floats:
    return np.where(columns >= 0, x[np.maximum(columns, 0)], 0.0)


def _units_asked(i: Instance, g: Group) -> Floats:
    """Replicas on premises that all requests of a workload would take in each hour, at the smallest size there."""
    small = i.unit_gpus[i.flow_unit[g.own]].min()
    mine = g.own[i.unit_gpus[i.flow_unit[g.own]] == small]
    total = np.zeros(len(i.hours))
    for d in np.unique(i.flow_class[mine]):
        each = (i.flow_reserve[mine] / i.useful()[mine])[i.flow_class[mine] == d].min()
        total += i.requests[d] * each
    return total


def _burst(b: Builder, i: Instance, goal: Goal, g: Group, full: Ints, served: Floats) -> None:
    """on_prem_first[g,t]: work of g elsewhere ≤ most·full[g,t]."""
    T = len(i.hours)
    if g.job >= 0:
        scale = AMPLE if goal.objective == "tokens" else goal.scale
        single = bool((i.flow_unit[g.burst] >= 0).all() and (i.unit_most[i.flow_unit[g.burst]] <= 1).all())
        most = float(i.useful()[g.burst].max()) if single else float(i.job_tokens[g.job]) * scale
        limit = np.full(T, max(most, 1e-9))
    else:
        of = np.unique(i.flow_class[g.burst])
        limit = np.maximum(served[of].sum(axis=0), 1e-9)
    size = max(float(limit.mean()), 1e-9)
    unit = "tokens" if g.job >= 0 else "requests"
    rows = b.constraint("on_prem_first", [g.name], -INF, np.zeros((1, T)), unit, np.array([size]))
    b.add(rows, b.columns["y"][g.burst], (i.useful()[g.burst] / size)[:, None])
    b.add(rows, full[None], -limit / size)


def _room(b: Builder, i: Instance, g: Group, p: int, mine: Ints, full: Ints) -> None:
    """GPUs of p that nothing runs on are fewer than a unit of g takes, where full; held and rented machines count."""
    gpus = float(i.machine_gpus[p])
    here = np.flatnonzero(i.unit_pool == p)
    whole = here[i.unit_whole[here]]
    part = np.flatnonzero((i.flow_pool == p) & (i.flow_unit >= 0))
    part = part[~i.unit_whole[i.flow_unit[part]]]
    sizes = i.unit_gpus[np.unique(i.flow_unit[mine])]
    small = float(sizes.min()) - _LITTLE_GPUS if i.unit_whole[i.flow_unit[mine]].all() else 0.0
    rentable = i.rented_most[p] * gpus
    most = float(i.held_most[p]) * gpus + rentable
    if (most <= small).all():
        return
    # held·gpus + rentable − Σ gpus·units ≤ small + (most − small)·(1 − full)
    rows = b.constraint(
        "room", [f"{g.name} on {i.pool_names[p]}"], -INF, ((most - rentable) / gpus)[None], "machines"
    )
    b.add(rows, b.columns["held"][p : p + 1][:, None], 1.0)
    b.add(rows, b.columns["units"][whole], -(i.unit_gpus[whole] / gpus)[:, None])
    b.add(
        rows, b.columns["y"][part], -(i.unit_gpus[i.flow_unit[part]] * i.flow_reserve[part] / gpus)[:, None]
    )
    b.add(rows, full[None], (most - small) / gpus)


def _loaded(b: Builder, i: Instance, g: Group, p: int, mine: Ints, full: Ints) -> None:
    """Replicas of g on p are there for the whole hour and have no load to spare, where full."""
    mine = mine[i.unit_whole[i.flow_unit[mine]]]
    units = np.unique(i.flow_unit[mine])
    if not len(units):
        return
    most = float((i.held_most[p] + i.rented_most[p].max()) * i.machine_gpus[p] / i.unit_gpus[units].min())
    rows = b.constraint(
        "loaded", [f"{g.name} on {i.pool_names[p]}"], -INF, np.full((1, len(i.hours)), most), "units"
    )
    b.add(rows, b.columns["units"][units], 1.0)
    b.add(rows, b.columns["y"][mine], -i.flow_reserve[mine][:, None])
    b.add(rows, full[None], most)


def _no_stand_ins(b: Builder, i: Instance, g: Group, p: int, mine: Ints, full: Ints) -> None:
    """Others' units on p all do something, where full: none is there only to take the room."""
    others = np.setdiff1d(np.flatnonzero(i.unit_whole & (i.unit_pool == p)), i.flow_unit[mine])
    for k in others:
        flows = np.flatnonzero(i.flow_unit == k)
        least = max((i.minimum.get(i.class_workload[d], 1) for d in i.flow_class[flows] if d >= 0), default=1)
        most = float((i.held_most[p] + i.rented_most[p].max()) * i.machine_gpus[p] / i.unit_gpus[k])
        idle = least - _LITTLE_LOAD
        if most <= idle:
            continue
        entity = f"{g.name} on {i.pool_names[p]}"
        rows = b.constraint("loaded", [entity], -INF, np.full((1, len(i.hours)), most), "units")
        b.add(rows, b.columns["units"][k : k + 1], 1.0)
        b.add(rows, b.columns["y"][flows], -i.flow_reserve[flows][:, None])
        b.add(rows, full[None], most - idle)
