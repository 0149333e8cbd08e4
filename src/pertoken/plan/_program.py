"""The cheapest schedule as a mixed-integer program.

Sets: pools p, units k (on pool p(k)), flows f (of unit k(f), of class d(f) or job j(f)), classes d, jobs j,
sites s, demand-charge bands i, hours t with predecessor t⁻ and weight w_t.

Variables
  machines[p,t]  whole machines on                        rented[p,t]  machines rented by the hour
  held[p]        whole machines held over the horizon     starts[p,t]  machines started
  units[k,t]     whole units that run                     loads[k,t]   units started (loading)
  y[f,t]         load, in fully loaded units              backlog[d,t] work waiting, in mean hours of demand
  kw[s,t]        power at the site's meter                peak[i]      highest kw in the band
  runs_on[j,p]   1 where job j runs on pool p             open[x]      1 where what x stands for is paid
  scale          multiple of the demand (objective tokens)

Objective: least  Σ price × quantity, with the very rates of the ledger:
  cost = Σ_t w_t Σ_p [ gpu_hours(p,t)·(held[p] or rented[p,t]) + energy(p,t)·kwh[p,t] ] + Σ token, egress and
         start meters + Σ_i demand(i)·peak[i] + Σ_x fixed(x)·open[x] + fixed usage
  kwh[p,t] = pue·( machine_kw·machines + off_kw·(held + rented − machines) + start_kwh·starts + Σ_f flow_kw·y
) or least carbon = Σ intensity·kwh, or greatest scale.

s.t.
  serve[d,t]     Σ_f useful_f·y[f,t] + backlog[d,t] − backlog[d,t⁻] = scale·requests[d,t]
  wait[d,t]      backlog[d,t] ≤ what arrived within the slack: older work is served (a bound)
  replica[k,t]   Σ_{f of k} reserve_f·y[f,t] ≤ units[k,t] − start_hours·loads[k,t]                   (whole
  units) capacity[p,t]  Σ_k gpus_k·units[k,t] + Σ_f gpus·y[f,t] ≤ machine_gpus·(machines[p,t] −
  start_hours·starts[p,t]) one_size[t]    Σ units of one job on one pool ≤ 1
  held[p,t]      machines[p,t] ≤ held[p] + rented[p,t]
  start[p,t]     starts[p,t] ≥ machines[p,t] − machines[p,t⁻];  load[k,t] likewise for units
  run[p,t]       Σ_{min run} starts ≤ machines[p,t];  and for units
  deadline[j]    Σ_{release ≤ t < deadline} w_t Σ_f useful_f·y[f,t] ≥ scale·tokens_j
  one_pool[j,p]  tokens of j on p ≤ tokens_j·runs_on[j,p],  Σ_p runs_on[j,p] = 1
  open[x,d]      share of d (or of a job) served by pools of x ≤ open[x];  held[p] ≤ most·open[x]
  share[d,k,t]   x ≤ D − f·(⌈D⌉ − units[k,t])      (implied; a cut that tightens the relaxation)
  spot, vendor   Σ tokens by limited flows ≤ fraction·Σ tokens of that workload, by hour
  power[s,t]     kw[s,t] = base + Σ_p kwh[p,t],  kw ≤ cap (a bound: power_cap)
  peak[i,t]      kw[s(i),t] ≤ Σ tiers of peak[i],  peak[i] ≥ what the period has already seen
  budget         cost ≤ USD;  carbon ≤ kgCO2e;  tokens ≤ tokens

Why it solves: replicas are counted, never named, so that no two solutions differ by a swap; waiting work is a
state, not a variable per arrival and hour of service; a machine in use is a count, so that the relaxation
loses only the rounding of counts (0.1 to 0.3 % on fleets).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pertoken.errors import InputError
from pertoken.plan._builder import INF, Builder, Program, RowBlock
from pertoken.plan._cuts import add_cuts, per_machine
from pertoken.plan._instance import Fixed, Floats, Instance, Ints
from pertoken.units import GRAMS_PER_KILOGRAM, METERS

Objective = Literal["cost", "tokens", "carbon"]

__all__ = ["INF", "Coefficients", "Goal", "Program", "RowBlock", "build", "class_meters", "coefficients"]


@dataclass(frozen=True)
class Goal:
    """What is minimised or maximised, and within what.

    scale multiplies all demand (1.5: 50 % more tokens); `switches` gives every machine and unit its starts,
    so that they can be counted.
    """

    objective: Objective = "cost"
    budget_usd: float = INF
    budget_tokens: float = INF
    budget_kgco2e: float = INF
    scale: float = 1.0
    switches: bool = False


@dataclass(frozen=True)
class Coefficients:
    """What one unit of each variable uses in each hour: the link between columns and meters."""

    energy_machines: Floats
    """kWh at the utility meter per machine on, shape (P, T), net of what it would draw when held and off."""
    energy_off: Floats
    energy_starts: Floats
    energy_flows: Floats
    """Shape (F, T)."""
    tokens_flows: Floats
    """Useful tokens per unit of load and hour, shape (F,)."""


def coefficients(instance: Instance) -> Coefficients:
    """Energy and tokens per unit of each variable."""
    useful, per_request = instance.useful(), instance.tokens_per_request()
    serving = instance.flow_class >= 0
    tokens = np.where(serving, useful * _at(per_request, instance.flow_class), useful)
    return Coefficients(
        energy_machines=(instance.machine_kw - instance.off_kw)[:, None] * instance.pue,
        energy_off=instance.off_kw[:, None] * instance.pue,
        energy_starts=instance.start_kwh[:, None] * instance.pue,
        energy_flows=instance.flow_kw[:, None] * instance.pue[instance.flow_pool],
        tokens_flows=tokens,
    )


def _at(values: Floats, index: Ints) -> Floats:
    """values[index], 0 where the index is −1."""
    if not len(values):
        return np.zeros(len(index))
    return np.where(index >= 0, values[np.maximum(index, 0)], 0.0)


def class_meters(instance: Instance) -> dict[str, Floats]:
    """Quantity of each meter per request, shape (D,)."""
    return {
        "input_tokens": instance.input_tokens,
        "cached_input_tokens": instance.cached_input_tokens,
        "output_tokens": instance.output_tokens,
        "requests": np.ones(len(instance.class_names)),
        "egress_gb": instance.egress_gb,
    }


def flow_price(instance: Instance) -> Floats:
    """USD per unit of load and hour for all meters that count work (tokens, requests, egress), shape (F,
    T)."""
    useful = instance.useful()
    total = np.zeros((len(instance.flow_unit), len(instance.hours)))
    priced = {rate.meter for rate in instance.rates}
    for meter, per_request in class_meters(instance).items():
        if meter in priced:
            by_pool = instance.prices(instance.pool_names, meter)
            total += (useful * _at(per_request, instance.flow_class))[:, None] * by_pool[instance.flow_pool]
    jobs = instance.flow_job >= 0
    for meter, per_hour in (
        ("training_tokens", useful),
        ("lost_training_tokens", instance.flow_per_hour - useful),
    ):
        if meter in priced:
            by_pool = instance.prices(instance.pool_names, meter)
            total += (np.where(jobs, per_hour, 0.0))[:, None] * by_pool[instance.flow_pool]
    return total


def build(instance: Instance, goal: Goal | None = None) -> Program:
    """The program of an instance, all of it from array operations.

    Raises InputError where an objective or budget needs numbers the instance lacks (carbon of an unknown
    grid).
    """
    goal = goal or Goal()
    b = Builder()
    _variables(b, instance, goal)
    class_scale = _class_scale(instance)
    _serving(b, instance, goal, class_scale)
    _machines(b, instance)
    _starts(b, instance)
    _jobs(b, instance, goal)
    _limits(b, instance)
    _open(b, instance, goal)
    if goal.objective != "tokens":
        add_cuts(b, instance, goal.scale)
    _power(b, instance)
    return _finish(b, instance, goal, class_scale)


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
    scale = _class_scale(i)
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
    tiers = max((len(peak.meters) for peak in i.peaks), default=1)
    width, already = np.zeros((len(i.peaks), tiers)), np.zeros((len(i.peaks), tiers))
    for number, peak in enumerate(i.peaks):
        mine = slice(0, len(peak.meters))
        width[number, mine], already[number, mine] = peak.tiers(INF), peak.tiers(peak.already_kw)
    b.variable("peak", width, exists=width > 0, lower=already)
    b.variable("open", np.ones(len(_places(i))), integer=True)
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


def _class_scale(i: Instance) -> Floats:
    """Mean requests per hour of each class, 1 where there are none: the unit of its rows, so that all are
    near 1."""
    mean = i.requests.mean(axis=1) if i.requests.size else np.ones(len(i.class_names))
    return np.where(mean > 0, mean, 1.0)


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
        limit = np.where(on_unit, _at(i.unit_most, i.flow_unit), INF)
        most = np.minimum(most, limit[:, None])
    return most


def _serving(b: Builder, i: Instance, goal: Goal, scale: Floats) -> None:
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
    per = _at(1 / scale, i.flow_class) * i.useful()
    b.add(rows[i.flow_class[serving]], y[serving], per[serving][:, None])
    b.add(rows, backlog, 1.0)
    known = i.previous >= 0
    b.add(rows[:, known], backlog[:, i.previous[known]], -1.0)


def _machines(b: Builder, i: Instance) -> None:
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


def _starts(b: Builder, i: Instance) -> None:
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
    for step in range(int(least[keeps].max())):
        fresh = (at >= 0) & ~(seen == at[:, None]).any(
            axis=1
        )  # a cyclic day shorter than the run counts once
        use = (least[keeps] > step)[:, None] & fresh[None, :]
        b.add(rows, np.where(use, begun[keeps][:, np.maximum(at, 0)], -1), 1.0)
        seen = np.concatenate([seen, at[:, None]], axis=1)
        at = np.where(at >= 0, i.previous[np.maximum(at, 0)], -1)


def _jobs(b: Builder, i: Instance, goal: Goal) -> None:
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


def _limits(b: Builder, i: Instance) -> None:
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


def _power(b: Builder, i: Instance) -> None:
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


def _energy_parts(c: Coefficients, per_kwh: Floats, pool_of_flow: Ints) -> list[tuple[str, Floats | float]]:
    """Coefficients of all energy at `per_kwh` (P, T) by variable."""
    return [
        ("machines", c.energy_machines * per_kwh),
        ("starts", c.energy_starts * per_kwh),
        ("held", (c.energy_off * per_kwh).sum(axis=1)),
        ("rented", c.energy_off * per_kwh),
        ("y", c.energy_flows * per_kwh[pool_of_flow]),
    ]


def _finish(b: Builder, i: Instance, goal: Goal, class_scale: Floats) -> Program:
    c, w = coefficients(i), i.weight
    gpus = i.machine_gpus[:, None].astype(np.float64)
    parts = _energy_parts(c, i.energy_prices(i.pool_names) * w, i.flow_pool)
    parts += [
        ("held", (gpus * i.prices(i.held_names, "gpu_hours") * w).sum(axis=1)),
        ("rented", gpus * i.prices(i.pool_names, "gpu_hours") * w),
        ("y", flow_price(i) * w),
        ("peak", _peak_prices(i, b.columns["peak"].shape)),
        ("open", np.array([_fixed_usd(i, f) for f in _places(i)])),
    ]
    if "starts" in METERS:
        parts.append(("starts", i.prices(i.pool_names, "starts") * w))
    cost = _spread(b, parts)
    carbon = _spread(b, _energy_parts(c, i.carbon_g_per_kwh / GRAMS_PER_KILOGRAM * w, i.flow_pool))
    tokens = _spread(b, [("y", c.tokens_flows[:, None] * w)])
    offset = sum(_fixed_usd(i, f) for f in i.fixed if f.only_with is None)
    _budgets(b, goal, cost - 0.0, offset, carbon, tokens)
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
        objective_offset=offset if goal.objective == "cost" else 0.0, maximise=goal.objective == "tokens",
        lower=np.concatenate(b.lower), upper=np.concatenate(b.upper), integer=np.concatenate(b.integer),
        row_lower=np.concatenate(b.row_lower), row_upper=np.concatenate(b.row_upper), start=start,
        index=cols[order].astype(np.int32), value=np.concatenate(b.values)[order], columns=b.columns,
        blocks=tuple(b.blocks), class_scale=class_scale,
    )  # fmt: skip


def _places(i: Instance) -> list[Fixed]:
    """What is paid only where one of its pools is used."""
    return [f for f in i.fixed if f.only_with is not None]


def _fixed_usd(i: Instance, f: Fixed) -> float:
    return float((f.quantity * i.price(f.pool, f.meter) * i.weight).sum())


def _peak_prices(i: Instance, shape: tuple[int, ...]) -> Floats:
    prices = np.zeros(shape)
    for number, peak in enumerate(i.peaks):
        found = i.peak_prices(peak)
        prices[number, : len(found)] = found
    return prices


def _open(b: Builder, i: Instance, goal: Goal) -> None:
    """What serves a share of a class or job must be open by at least that share; what is held, wholly."""
    places, held, y = _places(i), b.columns["held"], b.columns["y"]
    ample = _AMPLE if goal.objective == "tokens" else goal.scale
    demand = np.maximum((i.requests * i.weight).sum(axis=1) * ample, 1e-9)
    target = np.maximum(i.job_tokens * ample, 1e-9)
    for place, column in zip(places, b.columns["open"], strict=True):
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


_AMPLE = 1000.0
"""Multiple of the demand a plan is taken to serve at most where it may scale the demand."""


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
