"""The cheapest schedule as a mixed-integer program.

Sets: pools p, units k (on pool p(k)), flows f (of unit k(f), of class d(f) or job j(f)), classes d, jobs j,
workloads w, sites s, demand-charge bands i with tiers n, hours t with predecessor t⁻ and weight w_t, groups g: a
workload or job that may run on premises and elsewhere.

Variables
- machines[p,t]: whole machines on; rented[p,t]: machines rented by the hour; starts[p,t]: machines started
- held[p]: whole machines held over the horizon
- units[k,t]: whole units that run; loads[k,t]: units started (loading)
- y[f,t]: load, in fully loaded units; backlog[d,t]: work waiting, in mean hours of demand
- runs_on[j,p]: 1 where job j runs on pool p
- kw[s,t]: power at the site's meter; peak[i,n]: kW billed in a tier; metered[i]: highest kw, where later months look
  back on it; tier[i,n]: 1 where the tier before n is full (charges whose price falls with the tier)
- open[x]: 1 where what x stands for is paid; any[w,t]: 1 where replicas answer w; full[g,t]: 1 where no more of g fits
  on premises
- scale: multiple of the demand (objective tokens)

Objective: least Σ price × quantity, with the very rates of the ledger:

- cost = Σ_t w_t Σ_p [ gpu_hours(p,t)·(held[p] or rented[p,t]) + energy(p,t)·kwh[p,t] + start(p,t)·starts[p,t] ]
  + Σ token and egress meters + Σ_i Σ_n demand(i,n)·peak[i,n] + Σ_x fixed(x)·open[x] + fixed usage, where
- kwh[p,t] = pue·( machine_kw·machines + off_kw·(held + rented − machines) + start_kwh·starts + Σ_f flow_kw·y ),
  flow_kw the line below the power curve of replicas; in later rounds Σ_k ( rest_kw·units + slope_kw·y ), its tangent;

or least carbon = Σ intensity·kwh, or greatest scale.

s.t.
- serve[d,t]: Σ_f useful_f·y[f,t] + backlog[d,t] − backlog[d,t⁻] = scale·requests[d,t]
- wait[d,t]: backlog[d,t] ≤ what arrived within the slack: older work is served (a bound)
- replica[k,t]: Σ_{f of k} reserve_f·y[f,t] ≤ units[k,t] − start_hours·loads[k,t] (whole units)
- capacity[p,t]: Σ_k gpus_k·units[k,t] + Σ_f gpus·y[f,t] ≤ machine_gpus·(machines[p,t] − start_hours·starts[p,t])
- one_size[t]: Σ units of one job on one pool ≤ 1
- held[p,t]: machines[p,t] ≤ held[p] + rented[p,t]
- start[p,t]: starts[p,t] ≥ machines[p,t] − machines[p,t⁻]; load[k,t] likewise for units
- run[p,t]: Σ_{min run} starts ≤ machines[p,t]; and for units
- deadline[j]: Σ_{release ≤ t < deadline} w_t Σ_f useful_f·y[f,t] ≥ scale·tokens_j
- choose[j], one_pool[j,p]: Σ_p runs_on[j,p] = 1, tokens of j on p ≤ tokens_j·runs_on[j,p]
- open[x,d]: share of d (or of a job) served by pools of x ≤ open[x]; held[p] ≤ most·open[x]
- minimum[w,t]: Σ units of w ≥ minimum_w·any[w,t]; answers[w,t]: requests replicas serve ≤ most·any[w,t]
- on_prem_first[g,t]: work of g elsewhere ≤ most·full[g,t]; where full[g,t] = 1, room[g,p,t]: GPUs of p that nothing
  runs on are fewer than a unit of g takes; loaded[g,p,t]: replicas of g on p have no load to spare
- share[d,k,t]: x ≤ D − f·(⌈D⌉ − units[k,t]) (implied; a cut that tightens the relaxation)
- spot, vendor: Σ tokens by limited flows ≤ fraction·Σ tokens of that workload, by hour
- power[s,t]: kw[s,t] = base + Σ_p kwh[p,t], kw ≤ cap (a bound)
- peak[i,t]: kw[s(i),t] ≤ metered[i] ≤ Σ_n peak[i,n], peak[i] ≥ what the period has already seen
- ratchet[i,q]: Σ_n peak[i,n] ≥ fraction·(metered[q] or Σ_n peak[q,n]) of each earlier month q it looks back on
- tier[i,n]: width·tier[i,n] ≤ peak[i,n−1], peak[i,n] ≤ most·tier[i,n]
- budget: cost ≤ USD; carbon ≤ kgCO2e; tokens ≤ tokens

Why it solves: replicas are counted, never named, so that no two solutions differ by a swap; waiting work is a
state, not a variable per arrival and hour of service; a machine in use is a count, so that the relaxation
loses only the rounding of counts (0.1 to 0.3 % on fleets).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pertoken.errors import InputError
from pertoken.plan._builder import INF, Builder, Program, RowBlock
from pertoken.plan._cuts import add_cuts
from pertoken.plan._goal import (
    Coefficients,
    Goal,
    at,
    class_meters,
    class_scale,
    coefficients,
    flow_price,
    places,
)
from pertoken.plan._instance import Fixed, Floats, Instance
from pertoken.plan._machine_rows import machine_rows, start_rows
from pertoken.plan._policy_rows import minimum_rows, on_prem_rows, policy_variables
from pertoken.plan._power_rows import drawn_kwh, peak_prices, peak_variables, power_rows
from pertoken.plan._work_rows import job_rows, limit_rows, open_rows, serve_rows
from pertoken.units import GRAMS_PER_KILOGRAM

__all__ = ["INF", "Coefficients", "Goal", "Program", "RowBlock", "build", "class_meters", "coefficients"]


def build(instance: Instance, goal: Goal | None = None, *, cuts: bool = True) -> Program:
    """The program of an instance, all of it from array operations.

    cuts: with the rows `share`; they hold the demand as a number, so without them where its price is asked for.
    Raises InputError where an objective or budget needs numbers the instance lacks (carbon of an unknown
    grid).
    """
    goal = goal or Goal()
    b = Builder()
    _variables(b, instance, goal)
    scale = class_scale(instance)
    serve_rows(b, instance, goal, scale)
    machine_rows(b, instance)
    start_rows(b, instance)
    job_rows(b, instance, goal)
    limit_rows(b, instance)
    open_rows(b, instance, goal)
    minimum_rows(b, instance, goal)
    on_prem_rows(b, instance, goal)
    if cuts and goal.objective != "tokens":
        add_cuts(b, instance, goal.scale)
    power_rows(b, instance)
    return _finish(b, instance, goal, scale)


def _variables(b: Builder, i: Instance, goal: Goal) -> None:
    n, T = i.sizes, len(i.hours)
    has_machines = i.machine_gpus > 0
    every = np.ones((1, T), dtype=np.bool_)
    most = np.minimum(i.held_most[:, None] + i.rented_most, i.machines_most)
    whole = i.unit_whole & np.ones(n["K"], dtype=np.bool_)
    matters = (
        (i.start_hours > 0) | (i.start_kwh > 0) | (i.min_run > 1) | _any_price(i, "starts") | goal.switches
    )
    # Machines need no integrality of their own where whole units of whole machines imply it; a start that
    # costs something would make a part of a machine worth keeping on.
    implied = np.zeros(n["P"], dtype=np.bool_)
    for p in np.flatnonzero(has_machines):
        mine = i.unit_pool == p
        implied[p] = bool(
            whole[mine].all() and (i.unit_gpus[mine] % i.machine_gpus[p] == 0).all() and mine.any()
        )
    implied &= ~matters
    b.variable("machines", most, exists=has_machines[:, None] & every, integer=~implied[:, None] & every)
    b.variable("rented", i.rented_most, exists=has_machines[:, None] & (i.rented_most > 0))
    least, highest = i.held_least.astype(np.float64), i.held_most.astype(np.float64)
    b.variable("held", highest, exists=has_machines & (highest > 0), lower=least, integer=True)
    b.variable("starts", most, exists=(has_machines & matters)[:, None] & every)
    b.variable(
        "units", np.where(_needed(i), i.unit_most[:, None], 0.0), exists=whole[:, None] & every, integer=True
    )
    loads = whole & ((i.unit_start_hours > 0) | (i.unit_min_run > 1) | goal.switches)
    b.variable("loads", np.full((n["K"], T), INF), exists=loads[:, None] & every)
    _work_variables(b, i, goal)
    _money_variables(b, i, goal)


def _work_variables(b: Builder, i: Instance, goal: Goal) -> None:
    n = i.sizes
    b.variable("y", _load_most(i))
    waits = i.waiting_most()
    scale = class_scale(i)
    bound = np.full_like(waits, INF) if goal.objective == "tokens" else waits * goal.scale / scale[:, None]
    b.variable("backlog", bound, exists=waits > 0)
    on = np.zeros((n["J"], n["P"]), dtype=np.bool_)
    mine = i.flow_job >= 0
    on[i.flow_job[mine], i.flow_pool[mine]] = True
    b.variable("runs_on", np.ones(on.shape), exists=on & i.job_one_pool[:, None], integer=True)


def _money_variables(b: Builder, i: Instance, goal: Goal) -> None:
    every = np.ones((1, len(i.hours)), dtype=np.bool_)
    metered = np.asarray(np.isfinite(i.site_cap_kw).any(axis=1))
    metered[[peak.site for peak in i.peaks]] = True
    b.variable("kw", i.site_cap_kw, exists=metered[:, None] & every)
    peak_variables(b, i)
    policy_variables(b, i)
    b.variable("open", np.ones(len(places(i))), integer=True)
    b.variable("scale", np.full(1, INF), exists=np.array([goal.objective == "tokens"]))


def _needed(i: Instance) -> npt.NDArray[np.bool_]:
    """Hours in which a unit has work it may do, shape (K, T): a job's unit only within the job's window."""
    needed = np.ones((len(i.unit_pool), len(i.hours)), dtype=np.bool_)
    t = np.arange(len(i.hours))
    for k in range(len(i.unit_pool)):
        jobs = i.flow_job[i.flow_unit == k]
        if len(jobs) and (jobs >= 0).all():
            needed[k] = np.any([(t >= i.job_release[j]) & (t < i.job_deadline[j]) for j in jobs], axis=0)
    return needed


def _any_price(i: Instance, meter: str) -> npt.NDArray[np.bool_]:
    named = {rate.pool for rate in i.rates if rate.meter == meter and (rate.usd_per_unit > 0).any()}
    return np.array([name in named for name in i.pool_names], dtype=np.bool_)


def _load_most(i: Instance) -> Floats:
    """Upper bound of each flow's load: 0 outside a job's window, else the unit's own limit if it is not
    whole."""
    most = np.full((len(i.flow_unit), len(i.hours)), INF)
    job = i.flow_job >= 0
    if job.any():
        t = np.arange(len(i.hours))[None, :]
        release, deadline = i.job_release[i.flow_job[job]][:, None], i.job_deadline[i.flow_job[job]][:, None]
        most[job] = np.where((t >= release) & (t < deadline), INF, 0.0)
    if len(i.unit_most):
        on_unit = i.flow_unit >= 0
        limit = np.where(on_unit, at(i.unit_most, i.flow_unit), INF)
        most = np.minimum(most, limit[:, None])
    return most


def _spread(b: Builder, parts: Sequence[tuple[str, Floats | float]]) -> Floats:
    """One vector over all columns from values given per variable."""
    total = np.zeros(b.count)
    for name, values in parts:
        number = b.columns[name]
        here = number >= 0
        np.add.at(
            total, number[here], np.broadcast_to(np.asarray(values, dtype=np.float64), number.shape)[here]
        )
    return total


def _energy_parts(i: Instance, c: Coefficients, per_kwh: Floats) -> list[tuple[str, Floats | float]]:
    """Coefficients of all energy at `per_kwh` (P, T) by variable."""
    by_load, by_unit = drawn_kwh(i)
    return [
        ("machines", c.energy_machines * per_kwh),
        ("starts", c.energy_starts * per_kwh),
        ("held", (c.energy_off * per_kwh).sum(axis=1)),
        ("rented", c.energy_off * per_kwh),
        ("units", by_unit * per_kwh[i.unit_pool]),
        ("y", by_load * per_kwh[i.flow_pool]),
    ]


def _finish(b: Builder, i: Instance, goal: Goal, class_scale: Floats) -> Program:
    c, w = coefficients(i), i.weight
    gpus = i.machine_gpus[:, None].astype(np.float64)
    parts = _energy_parts(i, c, i.energy_prices(i.pool_names) * w)
    parts += [
        ("held", (gpus * i.prices(i.held_names, "gpu_hours") * w).sum(axis=1)),
        ("rented", gpus * i.prices(i.pool_names, "gpu_hours") * w),
        ("starts", i.prices(i.pool_names, "starts") * w),
        ("y", flow_price(i) * w),
        ("peak", peak_prices(i, b.columns["peak"].shape)),
        ("open", np.array([_fixed_usd(i, f) for f in places(i)])),
    ]
    cost = _spread(b, parts)
    carbon = _spread(b, _energy_parts(i, c, i.carbon_g_per_kwh / GRAMS_PER_KILOGRAM * w))
    tokens = _spread(b, [("y", c.tokens_flows[:, None] * w)])
    offset = sum(_fixed_usd(i, f) for f in i.fixed if f.only_with is None)
    _budgets(b, goal, cost, offset, carbon, tokens)
    objective = {"cost": cost, "carbon": carbon, "tokens": _spread(b, [("scale", 1.0)])}[goal.objective]
    if not np.isfinite(objective).all():
        raise InputError(
            "least carbon needs the grid intensity (gCO2e per kWh) of every pool that may run; one is missing"
        )
    rows, cols = (
        np.concatenate(b.rows or [np.zeros(0, np.int64)]),
        np.concatenate(b.cols or [np.zeros(0, np.int64)]),
    )
    order = np.argsort(rows, kind="stable")
    start = np.zeros(b.row_count + 1, dtype=np.int32)
    np.cumsum(np.bincount(rows, minlength=b.row_count), out=start[1:])
    return Program(
        cost=cost, cost_offset=offset, carbon=carbon, tokens=tokens, objective=objective,
        objective_offset=offset if goal.objective == "cost" else 0.0,
        maximise=goal.objective == "tokens",
        lower=np.concatenate(b.lower), upper=np.concatenate(b.upper), integer=np.concatenate(b.integer),
        row_lower=np.concatenate(b.row_lower), row_upper=np.concatenate(b.row_upper), start=start,
        index=cols[order].astype(np.int32), value=np.concatenate(b.values)[order], columns=b.columns,
        blocks=tuple(b.blocks), class_scale=class_scale,
    )  # fmt: skip


def _fixed_usd(i: Instance, f: Fixed) -> float:
    return float((f.quantity * i.price(f.pool, f.meter) * i.weight).sum())


def _budgets(b: Builder, goal: Goal, cost: Floats, offset: float, carbon: Floats, tokens: Floats) -> None:
    for name, limit, used, per in (
        ("USD", goal.budget_usd - offset, cost, "USD"),
        ("kgCO2e", goal.budget_kgco2e, carbon, "kgCO2e"),
        ("tokens", goal.budget_tokens, tokens, "tokens"),
    ):
        if not np.isfinite(limit):
            continue
        if not np.isfinite(used).all():
            raise InputError(
                "a carbon budget needs the grid intensity (gCO2e per kWh) of every pool; one is missing"
            )
        size = max(abs(limit), 1e-9)
        rows = b.constraint("budget", [name], -INF, np.array([limit / size]), per, np.array([size]))
        b.add(rows[:, None], np.arange(b.count)[None, :], used / size)
