"""Plans that must hold in more than one future: the predictor's interval, and more or less demand.

What is decided beforehand is what is held (owned, colocated, committed); the hours are decided as they come.
So each future's own plan is tried in every other: with its machines, the rest planned again. The regret is
what that costs over the other future's own best plan; the choice is the plan whose greatest regret is least.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pertoken.errors import CannotServeError, InfeasibleError, InputError, NoPlanError
from pertoken.plan._instance import Floats, Instance
from pertoken.plan.options import CASES
from pertoken.plan.schedule import Plan, plan, replan

if TYPE_CHECKING:
    from pertoken.scenario import Scenario


@dataclass(frozen=True)
class Future:
    """One way things may turn out: where throughput is in the predictor's interval, and a multiple of the
    demand."""

    case: str = "expected"
    demand: float = 1.0


@dataclass(frozen=True)
class Robust:
    """Each future's own plan; what each plan's machines cost in each future; the regret; and the plan to
    take.

    cost_usd and regret_usd: shape (plans, futures), inf where those machines cannot do it.
    """

    plans: Mapping[str, Plan]
    cost_usd: Floats
    regret_usd: Floats
    choice: str


def under(
    scenario: Scenario,
    futures: Mapping[str, Future] | None = None,
    *,
    keep: bool = False,
    gap: float = 0.01,
    time_limit_s: float = 60.0,
) -> Robust:
    """Plans for each future, their regret in the others, and the one whose greatest regret is least.

    futures by name; None: the low, expected and high end of the predictor's interval; keep: as in `plan`.
    Where greatest regrets differ by less than the gap the plan for what is expected is taken. Raises
    InputError on an unknown case, and what `plan` raises where a future has no plan at all.
    """
    futures = futures or {case: Future(case) for case in ("low", "expected", "high")}
    plans = {}
    for name, future in futures.items():
        if future.case not in CASES:
            raise InputError(f"unknown case {future.case!r}: one of {', '.join(CASES)}")
        plans[name] = plan(
            scenario, gap=gap, time_limit_s=time_limit_s, scale=future.demand, case=future.case, keep=keep
        )
    cost = np.array(
        [
            [
                found.cost_usd if mine == other else _with_machines(found, there, gap, time_limit_s)
                for other, there in plans.items()
            ]
            for mine, found in plans.items()
        ]
    )
    regret = cost - cost.min(axis=0)[None, :]
    return Robust(
        plans, cost, regret, _least_worst(list(futures.items()), regret, gap * float(np.diag(cost).max()))
    )


def _least_worst(futures: list[tuple[str, Future]], regret: Floats, alike_usd: float) -> str:
    """The plan of least greatest regret; among those alike, that for what is expected."""
    worst = regret.max(axis=1)
    alike = [future for future, usd in zip(futures, worst, strict=True) if usd <= worst.min() + alike_usd]
    expected = [name for name, future in alike if future == Future()]
    return expected[0] if expected else futures[int(np.argmin(worst))][0]


def _with_machines(found: Plan, there: Plan, gap: float, time_limit_s: float) -> float:
    """What the future of a plan `there` costs with another plan's held machines; inf where it cannot be done so."""
    held = found.schedule.held.astype(np.int64)
    if (held == there.schedule.held).all():
        return there.cost_usd

    def change(instance: Instance) -> Instance:
        return replace(instance, held_least=held, held_most=held)

    try:
        return replan(there, change, gap=gap, time_limit_s=time_limit_s).cost_usd
    except (InfeasibleError, NoPlanError, CannotServeError):
        return float("inf")
