"""What one more of something is worth: prices of the plan's constraints, and frontiers against a second goal.

Prices are those of the linear relaxation at its optimum: what the cost would change by for one unit more, at
the margin, machines taken as divisible. An hour of deadline is a difference of two optima, a finite step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pertoken.errors import PerTokenError
from pertoken.plan._instance import Floats, Instance
from pertoken.plan._program import Goal, Program, build
from pertoken.plan._solve import Session, Watch
from pertoken.units import TOKENS_PER_MTOK


@dataclass(frozen=True)
class ShadowPrices:
    """Marginal values at the relaxation's optimum.

    usd_per_mtok: by class, cost of one million tokens more in each hour, shape (T,); usd_per_mtok_trained: by
    job; usd_per_gpu: by pool, what one more GPU held over the horizon would save before its own price;
    usd_per_kw: by site, what one kW more of the power cap would save; usd_per_deadline_hour: by job, what one
    hour more would save.
    """

    usd_per_mtok: Mapping[str, Floats]
    usd_per_mtok_trained: Mapping[str, float]
    usd_per_gpu: Mapping[str, float]
    usd_per_kw: Mapping[str, float]
    usd_per_deadline_hour: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found: dict[str, Any] = {name: dict(getattr(self, name)) for name in self.__dataclass_fields__}
        found["usd_per_mtok"] = {name: [float(v) for v in hours] for name, hours in self.usd_per_mtok.items()}
        return found


def shadow_prices(
    instance: Instance, goal: Goal | None = None, *, time_limit_s: float = 60.0
) -> ShadowPrices:
    """The prices of an instance's constraints. Raises PerTokenError where the relaxation has no optimum."""
    goal = goal or Goal()
    program = build(instance, goal)
    session = Session(program, Watch(time_limit_s))
    if not session.relax():
        raise PerTokenError(f"no shadow prices: the relaxation is {session.status}")
    dual, reduced = session.row_dual, session.reduced_cost
    tokens = instance.tokens_per_request()
    per_class: dict[str, Floats] = {}
    per_job: dict[str, float] = {}
    for block in program.blocks:
        if block.name == "serve":
            usd = dual[block.rows] / block.per_row[:, None] / instance.weight
            each = usd / np.where(tokens > 0, tokens, 1.0)[:, None] * TOKENS_PER_MTOK
            per_class = dict(zip(block.entities, each, strict=True))
        elif block.name == "deadline":
            usd = dual[block.rows] / block.per_row * TOKENS_PER_MTOK
            per_job = {name: float(u) for name, u in zip(block.entities, usd, strict=True)}
    return ShadowPrices(
        per_class,
        per_job,
        _gpus(instance, program, dual, reduced),
        _power(instance, program, reduced),
        _deadlines(instance, goal, session.objective, time_limit_s),
    )


def _gpus(instance: Instance, program: Program, dual: Floats, reduced: Floats) -> dict[str, float]:
    """One more machine held: it relaxes ``held`` in every hour, and the limit on machines that are on."""
    found: dict[str, float] = {}
    for block in program.blocks:
        if block.name != "held":
            continue
        for name, rows in zip(block.entities, block.rows, strict=True):
            p = instance.pool_names.index(name)
            machines = program.columns["machines"][p]
            saved = -dual[rows].sum() + np.maximum(-reduced[machines[machines >= 0]], 0.0).sum()
            found[name] = float(saved) / float(instance.machine_gpus[p])
    return found


def _power(instance: Instance, program: Program, reduced: Floats) -> dict[str, float]:
    """One kW more of cap: the reduced cost of power that lies at it."""
    found: dict[str, float] = {}
    for s, name in enumerate(instance.site_names):
        columns = program.columns["kw"][s]
        if np.isfinite(instance.site_cap_kw[s]).any() and (columns >= 0).all():
            found[name] = float(np.maximum(-reduced[columns], 0.0).sum())
    return found


def _deadlines(instance: Instance, goal: Goal, cost: float, time_limit_s: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for j, name in enumerate(instance.job_names):
        if instance.job_deadline[j] >= len(instance.hours):
            continue
        later = instance.job_deadline.copy()
        later[j] += 1
        session = Session(build(replace(instance, job_deadline=later), goal), Watch(time_limit_s))
        if session.relax():
            found[name] = max(0.0, cost - session.objective)
    return found
