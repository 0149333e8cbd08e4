"""What one more of something is worth: prices of the plan's constraints, and frontiers against a second goal.

All are of the linear relaxation, machines taken as divisible. Tokens are priced at the margin, of the program without
cuts, which hold the demand as a number. A machine, a kW of cap and an hour of deadline are whole steps: the difference
of two optima with cuts, as the first bit of a machine is worth more than all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pertoken.errors import PerTokenError
from pertoken.plan._instance import Floats, Instance
from pertoken.plan._outcome import loads_of
from pertoken.plan._plan import Plan
from pertoken.plan._program import Goal, Program, build
from pertoken.plan._solve import Session, Watch
from pertoken.units import TOKENS_PER_MTOK


@dataclass(frozen=True)
class ShadowPrices:
    """Values at the relaxation's optimum.

    usd_per_mtok: by class, cost of one million tokens more in each hour, at the margin, shape (T,);
    usd_per_mtok_trained: by job; usd_per_gpu: by pool, what one more machine held over the horizon would save before
    its own price, per GPU of it; usd_per_kw: by site, what one kW more of the power cap would save;
    usd_per_deadline_hour: by job, what one hour more would save.
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


def prices_of(found: Plan, *, time_limit_s: float = 60.0) -> ShadowPrices:
    """The prices of a plan's constraints; where a site's power is capped, with power at the load of its replicas.

    Raises what `shadow_prices` raises.
    """
    i = found.instance
    if np.isfinite(i.site_cap_kw).any() and any(curve is not None for curve in i.unit_curve):
        i = replace(i, part_load=loads_of(i, found.schedule))
    return shadow_prices(i, found.beside(), time_limit_s=time_limit_s)


def shadow_prices(
    instance: Instance, goal: Goal | None = None, *, time_limit_s: float = 60.0
) -> ShadowPrices:
    """The prices of an instance's constraints. Raises PerTokenError where the relaxation has no optimum."""
    goal = goal or Goal()
    per_class, per_job = _tokens(instance, goal, time_limit_s)
    program = build(instance, goal)
    session = _relaxed(program, time_limit_s)
    base = session.objective
    return ShadowPrices(
        per_class,
        per_job,
        _gpus(instance, program, session, base),
        _power(instance, program, session, base),
        _deadlines(instance, goal, base, time_limit_s),
    )


def _relaxed(program: Program, time_limit_s: float) -> Session:
    session = Session(program, Watch(time_limit_s))
    if not session.relax():
        raise PerTokenError(f"no shadow prices: the relaxation is {session.status}")
    return session


def _tokens(
    instance: Instance, goal: Goal, time_limit_s: float
) -> tuple[dict[str, Floats], dict[str, float]]:
    """Cost of a million tokens more by class and hour, and by job: duals of the demand's rows, the only ones that hold
    the demand."""
    program = build(instance, goal, cuts=False)
    dual, tokens = _relaxed(program, time_limit_s).row_dual, instance.tokens_per_request()
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
    return per_class, per_job


def _saved(session: Session, base_usd: float) -> float:
    """What the session's optimum, changed, lies below the first one; NaN where it was not found."""
    return max(0.0, base_usd - session.objective) if session.relax() else float("nan")


def _gpus(instance: Instance, program: Program, session: Session, base_usd: float) -> dict[str, float]:
    """One more machine held at no price of its own: one less is rented or bought in each hour, or one more is on."""
    found: dict[str, float] = {}
    for block in program.blocks:
        if block.name != "held":
            continue
        for name, rows in zip(block.entities, block.rows, strict=True):
            p = instance.pool_names.index(name)
            machines = program.columns["machines"][p]
            number, low = rows.astype(np.int32), np.full(len(rows), -np.inf)
            session.highs.changeRowsBounds(len(number), number, low, np.ones(len(rows)))
            session.bounds(machines, 0.0, program.upper[machines] + 1.0)
            found[name] = _saved(session, base_usd) / float(instance.machine_gpus[p])
            session.highs.changeRowsBounds(len(number), number, low, np.zeros(len(rows)))
            session.bounds(machines, 0.0, program.upper[machines])
    return {name: usd for name, usd in found.items() if np.isfinite(usd)}


def _power(instance: Instance, program: Program, session: Session, base_usd: float) -> dict[str, float]:
    """One kW more of cap."""
    found: dict[str, float] = {}
    for s, name in enumerate(instance.site_names):
        columns = program.columns["kw"][s]
        if np.isfinite(instance.site_cap_kw[s]).any() and (columns >= 0).all():
            over = [b.rows[b.entities.index(name)] for b in program.blocks if b.name == "power_cap"]
            rows = np.concatenate(over) if over else np.zeros(0, dtype=np.int64)
            number, low, cap = rows.astype(np.int32), np.full(len(rows), -np.inf), program.row_upper[rows]
            session.bounds(columns, 0.0, program.upper[columns] + 1.0)
            session.highs.changeRowsBounds(len(rows), number, low, cap + 1.0)
            found[name] = _saved(session, base_usd)
            session.bounds(columns, 0.0, program.upper[columns])
            session.highs.changeRowsBounds(len(rows), number, low, cap)
    return {name: usd for name, usd in found.items() if np.isfinite(usd)}


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
