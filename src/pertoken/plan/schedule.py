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

from pertoken.errors import InfeasibleError, InputError, NoPlanError
from pertoken.plan._against import Alternative, Bill, Rival, alternatives
from pertoken.plan._goal import AMPLE
from pertoken.plan._instance import Floats, Instance
from pertoken.plan._objectives import OBJECTIVES, Objective, aim
from pertoken.plan._outcome import Schedule, job_hours
from pertoken.plan._plan import Origin, Plan
from pertoken.plan._program import INF, Goal, build
from pertoken.plan._rounds import OF_THE_GAP, bill_of, in_rounds, keeps, passed
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
    was found, or where none was found within caps and budgets (NoPlanError), which does not prove that none exists.
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
    """The plan of a scenario, its instance changed first."""
    instance, notes = _with_room(origin, objective, goal, watch, every_size)
    found = in_rounds(origin, change(instance), objective, goal, gap_fraction, watch)
    pools = origin.market.scenario.pools
    terms = tuple(pools[name].price.term for name in found.instance.pool_names)
    return replace(found, notes=found.notes + notes, terms=terms, origin=origin)


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


def held_against(
    found: Plan, *, gap: float = 0.02, time_limit_s: float = 60.0
) -> tuple[Plan, list[Alternative]]:
    """What else could be done and what it would cost: the best single pool, always cloud, ignoring the tariff; within
    the plan's power caps and carbon budget. And the plan, never dearer than any of them: one found to be cheaper, which
    can only be within the plan's gap, is taken for it.

    A plan with `on_prem_first` stays as it is: its rivals are free of that policy.
    """
    watch, bill = Watch(time_limit_s), bill_of(found.origin)

    def solve(instance: Instance, to_come: int) -> Schedule:
        share = Watch(max(watch.left_s() / (to_come + 1), 1.0), stop=watch.stop)
        return in_rounds(found.origin, instance, "cost", found.beside(), gap, share).schedule

    with stoppable(watch):
        rivals = alternatives(found.instance, solve, bill, found.terms)
    return _cheapest(found, rivals, bill), [rival.told for rival in rivals]


def savings(found: Plan, *, gap: float = 0.02, time_limit_s: float = 60.0) -> list[Alternative]:
    """What else could be done and what it would cost, as `held_against` has it."""
    return held_against(found, gap=gap, time_limit_s=time_limit_s)[1]


def _cheapest(found: Plan, rivals: Sequence[Rival], bill: Bill) -> Plan:
    """A plan of least cost, or its cheapest rival where that is cheaper (or keeps limits the plan does not)."""
    if found.objective_name != "cost" or found.instance.on_prem is not None:
        return found
    best, name = found, ""
    for rival in rivals:
        if rival.schedule is not None:
            made = _adopted(found, rival.schedule, bill)
            better = made.cost_usd < best.cost_usd * (1 - _SAME)
            if keeps(made) and (better or not keeps(best)):
                best, name = made, rival.told.name
    if best is found:
        return found
    stale = passed(found)
    notes = tuple(n for n in found.notes if n not in stale and not n.startswith(OF_THE_GAP))
    less = found.cost_usd - best.cost_usd
    why = (
        f"{less:,.2f} USD less than the first found" if less > 0 else "it keeps limits the first found passes"
    )
    return replace(best, notes=(*notes, f"the schedule is that of {name!r}: {why}"))


_SAME = 1e-9
"""Relative difference of cost that is none."""


def _adopted(found: Plan, made: Schedule, bill: Bill) -> Plan:
    """The plan with another schedule of its instance, under its bound."""
    plan = replace(found, instance=bill(found.instance, made), schedule=made)
    return replace(plan, objective=plan.cost_usd, solver_cost_usd=plan.cost_usd)


def completion_hours(found: Plan) -> dict[str, int]:
    """Hours from the start of the horizon until each job's last token."""
    return job_hours(found.instance, found.schedule)


def frontier(
    problem: Instance | Plan,
    against: Against,
    values: Sequence[float],
    *,
    gap: float = 0.01,
    time_limit_s: float = 120.0,
) -> list[tuple[float, Plan | None]]:
    """The least cost at each value of a second goal; None where none exists or was found there.

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
        except (InfeasibleError, NoPlanError):
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
