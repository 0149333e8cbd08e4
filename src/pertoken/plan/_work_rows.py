"""Rows of what is asked for: requests served or waiting, jobs by their deadline, limits, and what must be open."""

from __future__ import annotations

import numpy as np

from pertoken.plan._builder import INF, Builder
from pertoken.plan._goal import AMPLE, Goal, at, coefficients, places
from pertoken.plan._instance import Floats, Instance, Ints


def serve_rows(b: Builder, i: Instance, goal: Goal, scale: Floats) -> None:
    D, T = i.requests.shape
    if not D:
        return
    demand = i.requests * goal.scale / scale[:, None]
    backlog, y = b.columns["backlog"], b.columns["y"]
    right = demand.copy()
    if i.initial_backlog is not None:
        first = i.previous < 0
        right[:, first] += (i.initial_backlog / scale)[:, None]
    if goal.objective == "tokens":
        right[:] = 0.0
    rows = b.constraint("serve", i.class_names, right, right, "requests", scale)
    if goal.objective == "tokens":
        b.add(rows, b.columns["scale"], -demand)
        waits = b.constraint("wait", i.class_names, -INF, np.zeros((D, T)), "requests", scale)
        b.add(waits, backlog, 1.0)
        b.add(waits, b.columns["scale"], -i.waiting_most() / scale[:, None])
    serving = i.flow_class >= 0
    per = at(1 / scale, i.flow_class) * i.useful()
    b.add(rows[i.flow_class[serving]], y[serving], per[serving][:, None])
    b.add(rows, backlog, 1.0)
    known = i.previous >= 0
    b.add(rows[:, known], backlog[:, i.previous[known]], -1.0)


def job_rows(b: Builder, i: Instance, goal: Goal) -> None:
    if not len(i.job_names):
        return
    y, runs_on = b.columns["y"], b.columns["runs_on"]
    target = i.job_tokens * goal.scale
    unit = np.where(i.job_tokens > 0, i.job_tokens, _at_least_one(i))
    mine = np.flatnonzero(i.flow_job >= 0)
    per = (i.useful()[mine] / unit[i.flow_job[mine]])[:, None] * i.weight
    right = np.zeros(len(target)) if goal.objective == "tokens" else target / unit
    rows = b.constraint("deadline", i.job_names, right, np.full(len(target), INF), "tokens", unit)
    b.add(rows[i.flow_job[mine]][:, None], y[mine], per)
    if goal.objective == "tokens":
        b.add(rows, b.columns["scale"], -target / unit)
    one = np.flatnonzero((runs_on >= 0).any(axis=1))
    if not len(one):
        return
    chosen = b.constraint("choose", [i.job_names[j] for j in one], 1.0, np.ones(len(one)), "pools")
    b.add(chosen[:, None], runs_on[one], 1.0)
    pairs = np.argwhere(runs_on >= 0)
    number = np.full(runs_on.shape, -1, dtype=np.int64)
    number[pairs[:, 0], pairs[:, 1]] = np.arange(len(pairs))
    names = [f"{i.job_names[j]} on {i.pool_names[p]}" for j, p in pairs]
    rows = b.constraint("one_pool", names, -INF, np.zeros(len(pairs)), "tokens", unit[pairs[:, 0]])
    at = number[i.flow_job[mine], i.flow_pool[mine]]
    keep = at >= 0
    b.add(rows[at[keep]][:, None], y[mine[keep]], per[keep])
    # The work a job may do is its target: more would be no help, so the link is as tight as it can be.
    largest = (target / unit)[pairs[:, 0]] if goal.objective != "tokens" else _most_work(i, pairs, unit)
    b.add(rows, runs_on[pairs[:, 0], pairs[:, 1]], -largest)


def _at_least_one(i: Instance) -> float:
    """A unit for the rows of a job without tokens: what the fastest flow does in an hour."""
    return float(max(i.useful().max(initial=0.0), 1.0))


def _most_work(i: Instance, pairs: Ints, unit: Floats) -> Floats:
    """An upper bound on the tokens of each (job, pool): all its machines for all the window, at the fastest
    unit."""
    work = np.zeros(len(pairs))
    for r, (j, p) in enumerate(pairs):
        flows = np.flatnonzero((i.flow_job == j) & (i.flow_pool == p))
        cut = slice(int(i.job_release[j]), int(i.job_deadline[j]))
        machines = ((i.held_most[p] + i.rented_most[p, cut]) * i.weight[cut]).sum()
        rate = max(i.useful()[f] / (i.unit_gpus[i.flow_unit[f]] / i.machine_gpus[p]) for f in flows)
        work[r] = machines * rate / unit[j]
    return work


def limit_rows(b: Builder, i: Instance) -> None:
    per = coefficients(i).tokens_flows
    y = b.columns["y"]
    T = len(i.hours)
    for limit in i.limits:
        size = max(float(per[limit.of].max(initial=0.0)), 1e-12)
        if limit.most_per_hour is not None:
            rows = b.constraint(limit.name, [limit.entity], -INF, limit.most_per_hour[None, :] / size, "tokens",
                                np.array([size]))  # fmt: skip
            b.add(rows, y[limit.flows], (per[limit.flows] / size)[:, None])
            continue
        jobs = bool((i.flow_job[limit.of] >= 0).all())
        rows = b.constraint(limit.name, [limit.entity], -INF, np.zeros((1, 1 if jobs else T)), "tokens",
                            np.array([size]))  # fmt: skip
        share = np.where(limit.flows, 1 - limit.fraction, -limit.fraction) * per / size
        b.add(rows, y[limit.of], share[limit.of][:, None] * (i.weight if jobs else 1.0))


def open_rows(b: Builder, i: Instance, goal: Goal) -> None:
    """What serves a share of a class or job must be open by at least that share; what is held, wholly."""
    here, held, y = places(i), b.columns["held"], b.columns["y"]
    ample = AMPLE if goal.objective == "tokens" else goal.scale
    demand = np.maximum((i.requests * i.weight).sum(axis=1) * ample, 1e-9)
    target = np.maximum(i.job_tokens * ample, 1e-9)
    for place, column in zip(here, b.columns["open"], strict=True):
        assert place.only_with is not None
        flows = place.only_with[i.flow_pool]
        for kind, count, amount in ((i.flow_class, len(demand), demand), (i.flow_job, len(target), target)):
            mine = np.flatnonzero(flows & (kind >= 0))
            if not len(mine):
                continue
            rows = b.constraint(
                "open", [f"{place.pool} {n}" for n in range(count)], -INF, np.zeros(count), "share"
            )
            share = (i.useful()[mine] / amount[kind[mine]])[:, None] * i.weight
            b.add(rows[kind[mine]][:, None], y[mine], share)
            b.add(rows, column[None], -1.0)
        for p in np.flatnonzero(place.only_with & (held >= 0)):
            rows = b.constraint("open", [i.pool_names[p]], -INF, np.zeros(1), "machines")
            b.add(rows, held[p : p + 1], 1.0 / i.held_most[p])
            b.add(rows, column[None], -1.0)
