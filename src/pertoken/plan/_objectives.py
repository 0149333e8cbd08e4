"""An instance planned for one objective: least cost or carbon, most tokens, or training finished soonest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np

from pertoken.errors import InfeasibleError, InputError, PerTokenError
from pertoken.plan import _infeasible
from pertoken.plan._against import only
from pertoken.plan._instance import Instance
from pertoken.plan._outcome import schedule, total_usd
from pertoken.plan._plan import Plan
from pertoken.plan._program import INF, Goal, Program, build
from pertoken.plan._search import Found, rough, search
from pertoken.plan._solve import Session, Watch, gap
from pertoken.units import HOURS_PER_DAY

Objective = Literal["cost", "tokens", "carbon", "time"]
OBJECTIVES: dict[str, str] = {
    "cost": "least total cost",
    "tokens": "most tokens within the budget: the greatest multiple of all demand",
    "carbon": "least greenhouse gas within the budget",
    "time": "training finished soonest within the budget",
}


def aim(instance: Instance, objective: Objective, goal: Goal, gap_fraction: float, watch: Watch) -> Plan:
    """The plan of an instance for any objective."""
    if objective == "carbon" or np.isfinite(goal.budget_kgco2e):
        instance, notes = _known_carbon(instance)
        if notes:
            return _with_notes(notes, lambda: _aim(instance, objective, goal, gap_fraction, watch))
    return _aim(instance, objective, goal, gap_fraction, watch)


def _with_notes(notes: tuple[str, ...], made: Callable[[], Plan]) -> Plan:
    """The plan with notes; where there is none, they are told with the reason."""
    try:
        found = made()
    except InfeasibleError as error:
        error.args = ("; ".join((str(error), *notes)),)
        raise
    return replace(found, notes=found.notes + notes)


def _aim(instance: Instance, objective: Objective, goal: Goal, gap_fraction: float, watch: Watch) -> Plan:
    if objective == "time":
        found = _soonest(instance, goal, gap_fraction, watch)
    elif objective == "tokens" and not np.isfinite(goal.budget_usd):
        raise InputError("the objective 'tokens' needs a budget in USD: without one there is no end to it")
    else:
        found = _solve(instance, replace(goal, objective=objective), gap_fraction, watch)
    return replace(found, goal=goal)


def _known_carbon(instance: Instance) -> tuple[Instance, tuple[str, ...]]:
    """The instance without pools whose energy's gas is unknown: no number, no place in a plan that counts
    it."""
    known = np.asarray(np.isfinite(instance.carbon_g_per_kwh).all(axis=1))
    if not known.any():
        raise InputError("least carbon needs the grid intensity (gCO2e per kWh) of a pool; none has one")
    if known.all():
        return instance, ()
    names = ", ".join(n for n, k in zip(instance.pool_names, known, strict=True) if not k)
    part = only(instance, known)
    zero = np.where(known[:, None], instance.carbon_g_per_kwh, 0.0)
    return replace(part, carbon_g_per_kwh=zero), (f"left out, their greenhouse gas is unknown: {names}",)


_LONG_HOURS = 21 * HOURS_PER_DAY
_LONG_CELLS = 40_000
"""Hours, and hours × flows, above which a horizon is rolled rather than solved as one program."""


def _is_long(instance: Instance, goal: Goal) -> bool:
    """Whether the horizon is rolled: long, for least cost, and nothing ties all its hours together but peaks
    and jobs."""
    T, limits = len(instance.hours), (goal.budget_usd, goal.budget_tokens, goal.budget_kgco2e)
    one_by_one = all((instance.flow_job[m.of] < 0).all() for m in instance.limits)
    return (
        T > _LONG_HOURS
        and T * len(instance.flow_unit) > _LONG_CELLS
        and goal.objective == "cost"
        and not goal.switches
        and not np.isfinite(limits).any()
        and one_by_one
    )


def _rolled(instance: Instance, goal: Goal, gap_fraction: float, watch: Watch) -> Plan:
    """The plan of a long horizon, and its gap to a bound that holds for the whole of it."""
    from pertoken.plan._horizon import roll

    found = roll(instance, goal, gap_fraction, watch)
    cost = total_usd(instance, found.schedule)
    reached = gap(cost, found.bound)
    return Plan(
        instance=instance,
        schedule=found.schedule,
        objective_name="cost",
        objective=cost,
        bound=found.bound,
        status="optimal" if reached is not None and reached <= gap_fraction else found.ended or "heuristic",
        method=found.method,
        scale=goal.scale,
        elapsed_s=watch.elapsed_s(),
        first_feasible_s=watch.elapsed_s(),
        solver_cost_usd=cost,
    )


def _solve(instance: Instance, goal: Goal, gap_fraction: float, watch: Watch) -> Plan:
    if _is_long(instance, goal):
        return _rolled(instance, goal, gap_fraction, watch)
    program = build(instance, goal)
    found = search(instance, program, gap_fraction, watch)
    if found.x is None and watch.stop.is_set() and found.status != "infeasible":
        # Stopped by hand before there was a plan: the first that rounding finds, with what bound there is.
        first = rough(instance, program, watch.finish(_EXPLAIN_S))
        bound = found.bound if np.isfinite(found.bound) else first.bound
        found = replace(first, bound=bound, status="stopped" if first.x is not None else first.status)
    if found.x is None:
        raise _nothing(instance, goal, found.status, watch)
    if goal.switches and not watch.over:
        found = _fewest_switches(program, found, watch)
    return _plan(instance, goal, program, found, watch)


def _nothing(instance: Instance, goal: Goal, status: str, watch: Watch) -> PerTokenError:
    """The error where no plan was found: infeasible with its causes, or out of time."""
    if status == "infeasible" and instance.part_load is not None:
        return PerTokenError("no plan found with power on lines above its curve; one may exist all the same")
    if status == "infeasible":
        patient = Watch(max(watch.time_limit_s, _EXPLAIN_S), watch.report)
        return _infeasible.error(_infeasible.explain(instance, goal, patient))
    if status == "unbounded":
        return InfeasibleError("the objective has no end: give a budget, or limit the pools")
    if watch.stop.is_set():
        return PerTokenError(
            f"stopped after {watch.elapsed_s():.1f} s, before a first plan was found; let it run longer"
        )
    return PerTokenError(
        f"no plan found within {watch.elapsed_s():.0f} s ({status}); raise the time limit or the gap"
    )


_EXPLAIN_S = 30.0


def _plan(instance: Instance, goal: Goal, program: Program, found: Found, watch: Watch) -> Plan:
    assert found.x is not None
    x = found.x
    times = float(x[program.columns["scale"][0]]) if goal.objective == "tokens" else goal.scale
    return Plan(
        instance=instance,
        schedule=schedule(instance, program, x),
        objective_name=goal.objective,
        objective=found.objective,
        bound=found.bound,
        status=found.status,
        method="one program",
        scale=times,
        elapsed_s=watch.elapsed_s(),
        first_feasible_s=found.first_feasible_s,
        solver_cost_usd=float(program.cost @ x) + program.cost_offset,
    )


def _fewest_switches(program: Program, found: Found, watch: Watch) -> Found:
    """The second goal: of all plans no dearer than the one found, the one that starts fewest machines and
    units."""
    assert found.x is not None
    counts = np.zeros(len(program.lower))
    for name in ("starts", "loads"):
        number = program.columns[name]
        counts[number[number >= 0]] = 1.0
    used = program.objective
    limit = float(used @ found.x)
    size = max(abs(limit), 1e-9)
    sign = -1.0 if program.maximise else 1.0
    here = np.flatnonzero(used)
    second = replace(
        program,
        objective=counts, objective_offset=0.0, maximise=False,
        row_lower=np.append(program.row_lower, -INF),
        row_upper=np.append(program.row_upper, sign * limit / size * (1 + sign * 1e-9)),
        start=np.append(program.start, program.start[-1] + len(here)).astype(np.int32),
        index=np.append(program.index, here).astype(np.int32),
        value=np.append(program.value, sign * used[here] / size),
    )  # fmt: skip
    inner = Watch(min(watch.left_s(), max(1.0, _SWITCH_SHARE * watch.elapsed_s())), None, stop=watch.stop)
    session = Session(second, inner)
    if not session.integer(0.0, found.x, inner.left_s()):
        return found
    x = session.x
    return replace(found, x=x, objective=float(used @ x) + program.objective_offset)


_SWITCH_SHARE = 2.0
"""Time given to the second goal, relative to what the first took."""


def _soonest(instance: Instance, goal: Goal, gap_fraction: float, watch: Watch) -> Plan:
    """Training finished soonest: the earliest common end of all jobs whose least cost is within the budget.

    The least cost never rises with the deadline, so the end is found by bisection: first on the linear
    relaxation, whose answer no plan can beat (the bound), then with whole machines from there on.
    """
    if not len(instance.job_names):
        raise InputError("the objective 'time' needs a training workload")
    first, last = int(instance.job_release.min()) + 1, int(instance.job_deadline.max())

    def ending(hour: int) -> Instance:
        return replace(instance, job_deadline=np.minimum(instance.job_deadline, hour))

    def possible(hour: int) -> bool:
        return Session(build(ending(hour), goal), watch).relax()

    if not possible(last):
        raise _nothing(instance, goal, "infeasible", watch)
    low, high = first - 1, last
    while high - low > 1 and not watch.over:
        middle = (low + high) // 2
        low, high = (low, middle) if possible(middle) else (middle, high)
    bound, best = high, None
    low, high = bound - 1, last
    step = 1
    while high - low > 1 or best is None:
        middle = min(low + step, high) if best is None else (low + high) // 2
        try:
            best, high = _solve(ending(middle), goal, gap_fraction, watch), middle
        except PerTokenError:
            if middle >= last or watch.over:
                raise
            low, step = middle, step * 2
        if watch.over:
            break
    assert best is not None
    return replace(best, instance=instance, objective_name="time", objective=float(high), bound=float(bound))
