"""`plan`: the cheapest schedule of machines, loads and jobs, its proof, and what it would take to do better.

>>> from pertoken.plan.schedule import plan          # doctest: +SKIP
>>> found = plan(scenario, gap=0.01)                 # doctest: +SKIP
>>> found.cost_usd, found.gap                        # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from pertoken.errors import InfeasibleError, InputError, PerTokenError
from pertoken.plan import _infeasible
from pertoken.plan._against import Alternative, alternatives, only
from pertoken.plan._instance import Floats, Instance, Rate
from pertoken.plan._outcome import Cost, Entry, Schedule, carbon_kg, costs, entries, schedule, total_usd
from pertoken.plan._program import INF, Goal, Program, build
from pertoken.plan._search import Found, rough, search
from pertoken.plan._solve import Progress, Report, Session, Watch, gap, stoppable
from pertoken.units import COMPONENTS, HOURS_PER_DAY, TOKENS_PER_MTOK, base_meter, site_pool

if TYPE_CHECKING:
    import pyarrow as pa

    from pertoken.scenario import Scenario

Objective = Literal["cost", "tokens", "carbon", "time"]
OBJECTIVES: dict[str, str] = {
    "cost": "least total cost",
    "tokens": "most tokens within the budget: the greatest multiple of all demand",
    "carbon": "least greenhouse gas within the budget",
    "time": "training finished soonest within the budget",
}

__all__ = ["OBJECTIVES", "Instance", "Plan", "Progress", "plan"]


@dataclass(frozen=True)
class Plan:
    """A schedule, what it costs, and how good it is proven to be.

    objective and bound are in the objective's unit (USD; a multiple of the demand; kgCO2e; hours); gap is
    their relative distance, None where no bound is known. status: ``optimal`` (within the asked gap), ``time
    limit``, ``stopped``, or ``heuristic`` (a long horizon whose stated gap is wider than asked).
    """

    instance: Instance
    schedule: Schedule
    objective_name: str
    objective: float
    bound: float
    status: str
    method: str
    scale: float = 1.0
    elapsed_s: float = 0.0
    first_feasible_s: float | None = None
    solver_cost_usd: float = 0.0
    completion_hours: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()
    """Price term of each pool, where the plan is of a scenario."""

    @property
    def gap(self) -> float | None:
        """Relative distance of the objective from the bound."""
        return gap(self.objective, self.bound)

    @cached_property
    def _entries(self) -> list[Entry]:
        return list(entries(self.instance, self.schedule))

    @cached_property
    def costs(self) -> list[Cost]:
        """Cost of every use by hour: usage × the rates of the instance."""
        return costs(self.instance, iter(self._entries))

    @cached_property
    def cost_usd(self) -> float:
        """The whole cost over the horizon [USD]."""
        return float(sum(c.usd.sum() for c in self.costs))

    @property
    def carbon_kg(self) -> float:
        """Greenhouse gas of the energy over the horizon [kgCO2e]; NaN where a grid's intensity is unknown."""
        return carbon_kg(self.instance, self.schedule)

    @property
    def switches(self) -> int:
        """Machines and units started over the horizon."""
        i = self.instance
        whole = i.unit_whole if len(i.unit_whole) else np.zeros(0, dtype=np.bool_)
        return int(self.schedule.starts.sum() + self.schedule.loads[whole].sum())

    def by_component(self) -> dict[str, float]:
        """USD over the horizon by component of cost, largest first."""
        total: dict[str, float] = {}
        for cost in self.costs:
            total[cost.component] = total.get(cost.component, 0.0) + float(cost.usd.sum())
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def by_category(self) -> dict[str, float]:
        """USD over the horizon by category of cost."""
        total: dict[str, float] = {}
        for component, usd in self.by_component().items():
            total[COMPONENTS[component]] = total.get(COMPONENTS[component], 0.0) + usd
        return total

    def usage(self) -> list[Entry]:
        """Quantities by pool, model, tenant, phase and meter, one array over the hours each."""
        return self._entries

    def usage_rows(self, book: str = "") -> pa.Table:
        """Usage rows of the plan, in book ``plan:<name>`` unless told otherwise; the ledger closes them."""
        from pertoken.tables import USAGE, concat, usage_rows

        name, merged = book or f"plan:{self.instance.name}", self._merged()
        tables = [
            usage_rows(
                self.instance.hours, quantities, book=name, pool=pool, model=model, tenant=tenant, basis=basis
            )
            for (pool, model, tenant, basis), quantities in merged.items()
        ]
        return concat([t for t in tables if t.num_rows], USAGE)

    def _merged(self) -> dict[tuple[str, str, str, str], dict[tuple[str, str], Floats]]:
        merged: dict[tuple[str, str, str, str], dict[tuple[str, str], Floats]] = {}
        for e in self._entries:
            quantities = merged.setdefault((e.pool, e.model, e.tenant, e.basis), {})
            known = quantities.get((e.phase, e.meter))
            quantities[e.phase, e.meter] = e.quantity if known is None else known + e.quantity
        return merged

    def rate_rows(self) -> pa.Table:
        """The instance's rates as rows of the rates table: for an instance that came from no scenario."""
        from pertoken.tables import RATES, concat, rate_rows

        return concat(
            [
                rate_rows(self.instance.hours, _posted(self.instance, r), pool=r.pool, meter=r.meter,
                          component=r.component, basis=r.basis, source=r.source)
                for r in self.instance.rates
            ],
            RATES,
        )  # fmt: skip

    def tokens(self) -> dict[str, float]:
        """Tokens over the horizon by meter."""
        total: dict[str, float] = {}
        for e in self._entries:
            meter = base_meter(e.meter)
            if meter.endswith("_tokens") and e.phase != "waste":
                total[meter] = total.get(meter, 0.0) + float(e.quantity.sum())
        return total

    def usd_per_mtok(self) -> float:
        """All cost over all tokens delivered or trained [USD per M tokens]."""
        return self.cost_usd / max(sum(self.tokens().values()), 1e-9) * TOKENS_PER_MTOK


def _posted(instance: Instance, rate: Rate) -> Floats:
    """A rate's hours; a demand charge's only where it is posted."""
    if base_meter(rate.meter) != "peak_kw":
        return rate.usd_per_unit
    usd = np.full(len(instance.hours), np.nan)
    for peak in instance.peaks:
        if rate.meter in peak.meters and rate.pool == site_pool(instance.site_names[peak.site]):
            usd[peak.at] = rate.usd_per_unit[peak.at]
    return usd


def plan(
    problem: Instance | Scenario,
    objective: Objective = "cost",
    *,
    gap: float = 0.01,
    time_limit_s: float = 120.0,
    budget_usd: float = INF,
    budget_tokens: float = INF,
    budget_kgco2e: float = INF,
    scale: float = 1.0,
    fewest_switches: bool = False,
    case: str = "expected",
    keep: bool = False,
    progress: Report | None = None,
) -> Plan:
    """The best schedule within the gap and the time limit; Ctrl-C returns the best so far.

    Parameters: objective: see `OBJECTIVES`; gap: relative distance from the bound that is good enough;
    budgets over the horizon [USD, tokens, kgCO2e]; scale: a multiple of all demand; fewest_switches: among
    plans of that cost the one that starts fewest machines. Of a scenario also case: where in the predictor's
    interval throughput is; keep: machines owned, colocated or reserved are there and paid for, not to be
    chosen. Raises InfeasibleError (with `causes`) where no schedule meets every constraint, InputError where
    the objective needs numbers the instance lacks, PerTokenError where the time limit ran out before any plan
    was found.
    """
    if objective not in OBJECTIVES:
        raise InputError(f"unknown objective {objective!r}: one of {', '.join(OBJECTIVES)}")
    if not 0 <= gap < 1 or time_limit_s <= 0:
        raise InputError(f"gap must be 0 to 1 and the time limit positive, found {gap} and {time_limit_s}")
    watch = Watch(time_limit_s, progress)
    goal = Goal("cost", budget_usd, budget_tokens, budget_kgco2e, scale, fewest_switches)
    with stoppable(watch):
        if isinstance(problem, Instance):
            return _to(problem, objective, goal, gap, watch)
        budget = problem.budget
        goal = replace(
            goal,
            budget_usd=min(budget_usd, budget.usd or INF),
            budget_tokens=min(budget_tokens, budget.tokens or INF),
            budget_kgco2e=min(budget_kgco2e, budget.kgco2e or INF),
        )
        return _of_scenario(problem, objective, goal, gap, watch, case, keep)


def _to(instance: Instance, objective: Objective, goal: Goal, gap_fraction: float, watch: Watch) -> Plan:
    """The plan of an instance for any objective."""
    notes: tuple[str, ...] = ()
    if objective == "carbon" or np.isfinite(goal.budget_kgco2e):
        instance, notes = _known_carbon(instance)
    if objective == "time":
        found = _soonest(instance, goal, gap_fraction, watch)
    elif objective == "tokens" and not np.isfinite(goal.budget_usd):
        raise InputError("the objective 'tokens' needs a budget in USD: without one there is no end to it")
    else:
        found = _solve(instance, replace(goal, objective=objective), gap_fraction, watch)
    return replace(found, notes=found.notes + notes)


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


_TIER_ROUNDS = 4


def _of_scenario(
    scenario: Scenario,
    objective: Objective,
    goal: Goal,
    gap_fraction: float,
    watch: Watch,
    case: str,
    keep: bool,
) -> Plan:
    """The plan of a scenario; where a tariff has energy tiers, solved again until each hour is in the tier it
    pays."""
    from pertoken.plan._bills import with_tiers
    from pertoken.plan._from_scenario import instance_from_scenario
    from pertoken.plan.options import Market

    market = Market(scenario)
    instance, notes = instance_from_scenario(scenario, case=case, keep=keep, market=market)
    best: Plan | None = None
    for _ in range(_TIER_ROUNDS if instance.tier_shares else 1):
        found = _to(instance, objective, goal, gap_fraction, watch)
        again = with_tiers(found.instance, found.schedule, market)
        billed = replace(found, instance=again, solver_cost_usd=found.solver_cost_usd)
        if objective == "cost" and instance.tier_shares:
            billed = replace(billed, objective=billed.cost_usd)
        if best is None or billed.cost_usd < best.cost_usd or objective != "cost":
            best = billed
        if watch.over or _same_tiers(instance, again):
            break
        instance = replace(instance, tier_shares=again.tier_shares)
    assert best is not None
    if instance.tier_shares:
        notes += ("energy tiers: the bound holds for the tier each hour falls in",)
    terms = tuple(scenario.pools[name].price.term for name in best.instance.pool_names)
    return replace(best, notes=best.notes + notes, terms=terms, elapsed_s=watch.elapsed_s())


def _same_tiers(a: Instance, b: Instance) -> bool:
    return all(np.allclose(a.tier_shares[s], b.tier_shares[s], atol=1e-6) for s in a.tier_shares)


def savings(found: Plan, *, gap: float = 0.02, time_limit_s: float = 60.0) -> list[Alternative]:
    """What else could be done and what it would cost: the best single pool, always cloud, ignoring the
    tariff."""
    watch = Watch(time_limit_s)

    def solve(instance: Instance) -> Schedule:
        share = Watch(max(watch.left_s() / 2, 1.0), stop=watch.stop)
        return _solve(instance, Goal(scale=found.scale), gap, share).schedule

    with stoppable(watch):
        return alternatives(found.instance, solve, found.terms)


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


def completion_hours(found: Plan) -> dict[str, int]:
    """Hours from the start of the horizon until each job's last token."""
    i, done = found.instance, {}
    for j, name in enumerate(i.job_names):
        running = found.schedule.load[i.flow_job == j].sum(axis=0) > 1e-9
        done[name] = int(np.flatnonzero(running)[-1]) + 1 if running.any() else 0
    return done


def frontier(
    problem: Instance,
    against: Literal["deadline", "tokens", "carbon"],
    values: Sequence[float],
    **options: object,
) -> list[tuple[float, Plan | None]]:
    """The least cost at each value of a second goal; None where no plan exists there.

    against: ``deadline`` (hours from the start for all jobs), ``tokens`` (multiples of the demand),
    ``carbon`` (kgCO2e over the horizon).
    """
    found: list[tuple[float, Plan | None]] = []
    for value in values:
        try:
            found.append((float(value), _at(problem, against, float(value), options)))
        except InfeasibleError:
            found.append((float(value), None))
    return found


def _at(problem: Instance, against: str, value: float, options: dict[str, object]) -> Plan:
    chosen = dict(options)
    if against == "deadline":
        problem = replace(problem, job_deadline=np.full_like(problem.job_deadline, int(value)))
    elif against == "tokens":
        chosen["scale"] = value
    elif against == "carbon":
        chosen["budget_kgco2e"] = value
    else:
        raise InputError(f"a frontier runs against deadline, tokens or carbon, not {against!r}")
    return plan(problem, **chosen)  # type: ignore[arg-type]
