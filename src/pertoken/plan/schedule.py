"""`plan`: the cheapest schedule of machines, loads and jobs, its proof, and what it would take to do better.

>>> from pertoken.plan.schedule import plan          # doctest: +SKIP
>>> found = plan(scenario, gap=0.01)                 # doctest: +SKIP
>>> found.cost_usd, found.gap                        # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from pertoken.errors import InfeasibleError, InputError, PerTokenError
from pertoken.plan._against import Alternative, alternatives
from pertoken.plan._goal import AMPLE
from pertoken.plan._instance import Floats, Instance
from pertoken.plan._objectives import OBJECTIVES, Objective, aim
from pertoken.plan._outcome import Schedule, loads_of, spread_kwh
from pertoken.plan._plan import Origin, Plan
from pertoken.plan._program import INF, Goal, build
from pertoken.plan._solve import Progress, Report, Session, Watch, stoppable

if TYPE_CHECKING:
    from pertoken.scenario import Scenario

Against = Literal["deadline", "tokens", "carbon"]

__all__ = ["OBJECTIVES", "Against", "Instance", "Objective", "Plan", "Progress", "plan"]


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
        raise InputError(
            f"a gap is 0 or more and below 1, a time limit positive; found {gap:g} and {time_limit_s:g}"
        )
    if not 0 < scale < INF:
        raise InputError(f"tokens are planned as a positive multiple of the demand, found {scale:g}")
    watch = Watch(time_limit_s, progress)
    goal = Goal("cost", budget_usd, budget_tokens, budget_kgco2e, scale, fewest_switches)
    with stoppable(watch):
        if isinstance(problem, Instance):
            return aim(problem, objective, goal, gap, watch)
        budget = problem.budget
        goal = replace(
            goal,
            budget_usd=min(budget_usd, budget.usd or INF),
            budget_tokens=min(budget_tokens, budget.tokens or INF),
            budget_kgco2e=min(budget_kgco2e, budget.kgco2e or INF),
        )
        from pertoken.plan.options import Market

        return _of_scenario(Origin(Market(problem), case, keep), objective, goal, gap, watch)


def replan(
    found: Plan,
    change: Callable[[Instance], Instance],
    *,
    scale: float | None = None,
    budget_kgco2e: float | None = None,
    every_size: bool = False,
    gap: float,
    time_limit_s: float,
) -> Plan:
    """The least-cost plan of what another plan was made for, changed: its tiers, case and carbon budget stay.

    Its budgets in USD and tokens do not: what is found says what it costs. every_size: jobs may take any size that
    meets their deadline, for changes that need larger ones. Raises what `plan` raises.
    """
    goal = found.beside()
    goal = replace(
        goal,
        scale=goal.scale if scale is None else scale,
        budget_kgco2e=goal.budget_kgco2e if budget_kgco2e is None else budget_kgco2e,
    )
    if not 0 < goal.scale < INF:
        raise InputError(f"tokens are planned as a positive multiple of the demand, found {goal.scale:g}")
    watch = Watch(time_limit_s)
    with stoppable(watch):
        if found.origin is None:
            return aim(change(found.instance), "cost", goal, gap, watch)
        return _of_scenario(found.origin, "cost", goal, gap, watch, change, every_size)


_ROUNDS = 4
_SLIGHT = 1e-6
"""Part by which a limit may be passed: what floats lose."""


def _as_it_is(instance: Instance) -> Instance:
    return instance


def _of_scenario(
    origin: Origin,
    objective: Objective,
    goal: Goal,
    gap_fraction: float,
    watch: Watch,
    change: Callable[[Instance], Instance] = _as_it_is,
    every_size: bool = False,
) -> Plan:
    """The plan of a scenario, its instance changed first.

    It is billed as the ledger does: energy in the tiers its hours fall in, replicas at the power of their load. It is
    solved again until tiers hold that it was solved with, and until what it draws is within caps and budgets.
    """
    from pertoken.plan._bills import with_tiers

    scenario = origin.market.scenario
    instance, notes = _with_room(origin, objective, goal, watch, every_size)
    instance = change(instance)
    best: Plan | None = None
    for _ in range(_ROUNDS):
        try:
            found = aim(instance, objective, goal, gap_fraction, watch)
        except InfeasibleError:
            raise
        except PerTokenError:  # out of time before there was another plan
            if best is None:
                raise
            break
        billed = _billed(found, with_tiers(found.instance, found.schedule, origin.market), best)
        kept = _keeps(billed)
        if best is None or kept > _keeps(best) or (kept and _nearer(billed, best)):
            best = billed
        if watch.over or (kept and _same_tiers(instance, billed.instance)):
            break
        instance = replace(instance, tier_shares=billed.instance.tier_shares)
        if not kept:
            instance = _tightened(instance, found)
    assert best is not None
    notes += _passed(best)
    if instance.tier_shares:
        notes += ("energy tiers: the bound holds for the tier each hour falls in",)
    terms = tuple(scenario.pools[name].price.term for name in best.instance.pool_names)
    if objective == "cost" and not instance.tier_shares and best.gap is not None and best.gap > gap_fraction:
        beyond = (best.cost_usd - best.solver_cost_usd) / max(best.cost_usd, 1e-9)
        if beyond > 0.1 * best.gap:
            notes += (
                f"of the gap {beyond:.2%} is power of replicas at part load, which the bound leaves out",
            )
    reached = best.gap is not None and best.gap <= gap_fraction * (1 + _SLIGHT) + _SLIGHT
    status = "optimal" if reached else "heuristic" if best.status == "optimal" else best.status
    return replace(
        best, status=status, notes=best.notes + notes, terms=terms, elapsed_s=watch.elapsed_s(), origin=origin
    )


def _billed(found: Plan, instance: Instance, before: Plan | None) -> Plan:
    """The plan with what it costs in an instance's tiers; its bound the first round's, where nothing was given yet."""
    made = replace(found, instance=replace(instance, spread_kwh=None, part_load=None))
    if found.objective_name == "cost":
        made = replace(made, objective=made.cost_usd)
    elif found.objective_name == "carbon":
        made = replace(made, objective=made.carbon_kg)
    return made if before is None or instance.tier_shares else replace(made, bound=before.bound)


def _tightened(instance: Instance, found: Plan) -> Instance:
    """The instance with what a plan's replicas drew at part load given, and bounded from above for a site's cap."""
    spread = spread_kwh(found.instance, found.schedule)
    before = instance.spread_kwh if instance.spread_kwh is not None else np.zeros_like(spread)
    goal = found.goal
    limited = np.isfinite(goal.budget_usd) or np.isfinite(goal.budget_kgco2e)
    capped = (found.schedule.site_kw > instance.site_cap_kw).any()
    return replace(
        instance,
        spread_kwh=np.maximum(spread, before) if limited else instance.spread_kwh,
        part_load=loads_of(found.instance, found.schedule) if capped else instance.part_load,
    )


def _keeps(found: Plan) -> bool:
    """Whether what a plan draws, as billed, is within the caps of its sites and its budgets."""
    i, goal, more = found.instance, found.goal, 1 + _SLIGHT
    if (found.schedule.site_kw > i.site_cap_kw * more + _SLIGHT).any():
        return False
    usd = not np.isfinite(goal.budget_usd) or found.cost_usd <= goal.budget_usd * more
    return usd and (not np.isfinite(goal.budget_kgco2e) or found.carbon_kg <= goal.budget_kgco2e * more)


def _passed(found: Plan) -> tuple[str, ...]:
    """Notes on the limits that a plan cut short passes by what replicas at part load draw."""
    i, why = found.instance, "power of replicas at part load, found last; let it run longer"
    over_kw = (found.schedule.site_kw - i.site_cap_kw).max(axis=1, initial=0.0)
    notes = [
        f"site {name!r} draws up to {kw:.3g} kW more than its power cap: {why}"
        for name, kw in zip(i.site_names, over_kw, strict=True)
        if kw > _SLIGHT
    ]
    if not notes and not _keeps(found):
        notes.append(f"the budget is passed by a little: {why}")
    return tuple(notes)


def _nearer(a: Plan, b: Plan) -> bool:
    """Whether a plan is better than another that keeps its limits too."""
    return a.objective > b.objective if a.objective_name == "tokens" else a.objective < b.objective


def _same_tiers(a: Instance, b: Instance) -> bool:
    return all(np.allclose(a.tier_shares[s], b.tier_shares[s], atol=1e-6) for s in a.tier_shares)


_MORE_ROOM = 4.0
_ROOMY = 0.5
"""Part of the machines of an endless pool that may be taken before it is given more of them."""


def _with_room(
    origin: Origin, objective: Objective, goal: Goal, watch: Watch, every_size: bool
) -> tuple[Instance, tuple[str, ...]]:
    """The instance of a scenario, with so many machines in endless pools that they are no limit."""
    from pertoken.plan._from_scenario import instance_from_scenario

    room, scenario = max(goal.scale, 1.0), origin.market.scenario
    endless = np.array([pool.count == "as needed" for pool in scenario.pools.values()])
    while True:
        instance, notes = instance_from_scenario(
            scenario, case=origin.case, keep=origin.keep, market=origin.market, room=room,
            every_size=every_size or objective in ("tokens", "time"), scaled=objective == "tokens",
        )  # fmt: skip
        if objective != "tokens" or room >= AMPLE or not np.isfinite(goal.budget_usd):
            return instance, notes
        program = build(instance, replace(goal, objective="tokens"))
        session = Session(program, Watch(watch.left_s(), stop=watch.stop))
        if not session.relax():
            return instance, notes
        most = np.maximum(instance.held_most, instance.rented_most.max(axis=1))
        taken = np.maximum(_values(session, "held"), _values(session, "rented").max(axis=1, initial=0.0))
        if not (endless & (taken > _ROOMY * most) & (most > 0)).any():
            return instance, notes
        room *= _MORE_ROOM


def _values(session: Session, name: str) -> Floats:
    columns = session.program.columns[name]
    return np.where(columns >= 0, session.x[np.maximum(columns, 0)], 0.0)


def savings(found: Plan, *, gap: float = 0.02, time_limit_s: float = 60.0) -> list[Alternative]:
    """What else could be done and what it would cost: the best single pool, always cloud, ignoring the
    tariff; within the plan's carbon budget."""
    watch = Watch(time_limit_s)

    def solve(instance: Instance, to_come: int) -> Schedule:
        share = Watch(max(watch.left_s() / (to_come + 1), 1.0), stop=watch.stop)
        return aim(instance, "cost", found.beside(), gap, share).schedule

    def bill(instance: Instance, made: Schedule) -> Instance:
        from pertoken.plan._bills import with_tiers

        return instance if found.origin is None else with_tiers(instance, made, found.origin.market)

    with stoppable(watch):
        return alternatives(found.instance, solve, bill, found.terms)


def completion_hours(found: Plan) -> dict[str, int]:
    """Hours from the start of the horizon until each job's last token."""
    i, done = found.instance, {}
    for j, name in enumerate(i.job_names):
        running = found.schedule.load[i.flow_job == j].sum(axis=0) > 1e-9
        done[name] = int(np.flatnonzero(running)[-1]) + 1 if running.any() else 0
    return done


def frontier(
    problem: Instance | Plan,
    against: Against,
    values: Sequence[float],
    *,
    gap: float = 0.01,
    time_limit_s: float = 120.0,
) -> list[tuple[float, Plan | None]]:
    """The least cost at each value of a second goal; None where no plan exists there.

    against: ``deadline`` (whole hours each job has from its own start), ``tokens`` (multiples of the
    demand), ``carbon`` (kgCO2e over the horizon). Of a plan, by its tiers, case and carbon budget. Raises
    InputError on a value that cannot be meant.
    """
    check_values(against, values)
    found: list[tuple[float, Plan | None]] = []
    for value in values:

        def change(i: Instance, hours: float = value) -> Instance:
            if against != "deadline":
                return i
            return replace(
                i, job_deadline=np.minimum(i.job_release + min(int(hours), len(i.hours)), len(i.hours))
            )

        scale = value if against == "tokens" else None
        kgco2e = value if against == "carbon" else None
        try:
            if isinstance(problem, Plan):
                made = replan(
                    problem, change, scale=scale, budget_kgco2e=kgco2e, every_size=against == "deadline", gap=gap,
                    time_limit_s=time_limit_s,
                )  # fmt: skip
            else:
                made = plan(
                    change(problem), scale=scale or 1.0, budget_kgco2e=INF if kgco2e is None else kgco2e, gap=gap,
                    time_limit_s=time_limit_s,
                )  # fmt: skip
            found.append((float(value), made))
        except InfeasibleError:
            found.append((float(value), None))
    return found


def check_values(against: str, values: Sequence[float]) -> None:
    """Raises InputError where a value of a frontier's second goal cannot be meant."""
    if against not in get_args(Against):
        raise InputError(f"a frontier runs against deadline, tokens or carbon, not {against!r}")
    for value in values:
        if not np.isfinite(value) or value < 0 or (value == 0 and against == "tokens"):
            raise InputError(f"a frontier against {against} takes positive numbers, found {value:g}")
        if against == "deadline" and (value < 1 or value != int(value)):
            raise InputError(f"a frontier against deadline takes whole hours, found {value:g}")
