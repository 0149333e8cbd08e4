"""Why no schedule exists: which constraint is in the way, how much is missing, what would free it.

Elastic relaxation: one family of constraints at a time may be broken at a cost of 1 per unit, all others
hold; the least that must be broken is what is missing. A family that alone makes the plan possible is one way
out; where none does, all are loosened at once and the answer names what is missing together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import highspy
import numpy as np

from pertoken.errors import InfeasibleError
from pertoken.plan._instance import Floats, Instance, Ints
from pertoken.plan._program import INF, Goal, Program, build
from pertoken.plan._solve import Session, Watch

_TINY = 1e-6
_WHOLE_GAP, _WHOLE_LIMIT_S = 0.05, 10.0
_FEW_INTEGERS = 3000
"""Whole variables up to which what is missing is sought in whole machines at once."""


@dataclass(frozen=True)
class Cause:
    """One way to make the plan possible: the constraint, whose it is, how much is missing, and in words what
    to do."""

    constraint: str
    entity: str
    missing: float
    unit: str
    remedy: str
    least: str = ""
    """``at least`` where more than that may be missing."""


@dataclass(frozen=True)
class _Slack:
    """A column that loosens rows by `value` per unit."""

    family: str
    entity: str
    rows: Ints
    values: Floats
    per_unit: float
    unit: str


def explain(instance: Instance, goal: Goal, watch: Watch) -> tuple[Cause, ...]:
    """What would free an infeasible plan: single remedies where one suffices, else those needed together.

    Where the linear relaxation is feasible, whole machines are what stands in the way, and the slacks are
    sought for whole machines too.
    """
    program = build(instance, goal)
    whole = int(program.integer.sum()) <= _FEW_INTEGERS or Session(program, watch).relax()
    slacks = _slacks(instance, program)
    alone: list[Cause] = []
    for family in sorted(dict.fromkeys(s.family for s in slacks), key=_directness):
        found = _least(instance, program, [s for s in slacks if s.family == family], whole, watch)
        if found:
            alone += _named(instance, goal, found, watch)
    if alone:
        return tuple(alone)
    together = _least(instance, program, slacks, whole, watch)
    return tuple(_named(instance, goal, together or [], watch))


def _directness(family: str) -> int:
    """What someone set comes first, then what is there, and last what is asked for: less of that always helps."""
    order = ("budget", "power_cap", "on_prem_first", "deadline", "capacity", "serve")
    return order.index(family) if family in order else order.index("deadline") - 1


def error(causes: tuple[Cause, ...]) -> InfeasibleError:
    """The error that says so, in one line per way out."""
    if not causes:
        return InfeasibleError(
            "no schedule meets every constraint, and loosening capacity, deadlines, power, limits and "
            "budget does not help"
        )
    first = causes[0]
    ways = "; or ".join(dict.fromkeys(c.remedy for c in causes))
    found = InfeasibleError(
        f"no schedule meets {first.constraint!r} of {first.entity!r}: {first.least}{_number(first.missing)} "
        f"{first.unit} missing. To fix: {ways}"
    )
    found.causes = causes  # type: ignore[attr-defined]
    return found


def _slacks(instance: Instance, program: Program) -> list[_Slack]:
    """Every way to loosen the program, in outside units."""
    found: list[_Slack] = []
    hourly = {"serve"} | {limit.name for limit in instance.limits}
    capped = {
        name
        for name, cap in zip(instance.site_names, instance.site_cap_kw, strict=True)
        if np.isfinite(cap).any()
    }
    for block in program.blocks:
        for number, entity in enumerate(block.entities):
            rows, per = block.rows[number].ravel(), float(block.per_row[number])
            down, each = -np.ones(len(rows)), np.ones(1)
            if block.name in hourly:
                sign = each if block.name == "serve" else -each
                found += [
                    _Slack(block.name, entity, rows[t : t + 1], sign, per, block.unit)
                    for t in range(len(rows))
                ]
            elif block.name == "deadline":
                found.append(_Slack("deadline", entity, rows, each, per, "training tokens"))
            elif block.name == "budget":
                found.append(_Slack("budget", entity, rows, down, per, block.unit))
            elif block.name == "held":
                paid = _paid(instance, program, entity)
                found.append(
                    _Slack(
                        "capacity",
                        entity,
                        np.append(rows, paid[0]),
                        np.append(down, paid[1]),
                        1.0,
                        "machines",
                    )
                )
            elif block.name == "on_prem_first":
                found += [
                    _Slack(block.name, entity, rows[t : t + 1], -each, per, block.unit)
                    for t in range(len(rows))
                ]
            elif block.name == "power" and entity in capped:
                over = [b.rows[b.entities.index(entity)] for b in program.blocks if b.name == "power_cap"]
                every = np.concatenate([rows, *over])
                found.append(_Slack("power_cap", entity, every, -np.ones(len(every)), 1.0, "kW"))
    return found


def _paid(instance: Instance, program: Program, pool: str) -> tuple[Ints, Floats]:
    """What one more machine of a pool takes from a budget in USD over the horizon: the budget's row, and its share."""
    budget = [b for b in program.blocks if b.name == "budget" and b.entities == ("USD",)]
    p = instance.pool_names.index(pool)
    name = instance.held_names[p] if instance.held_most[p] > 0 else pool
    usd = float((instance.price(name, "gpu_hours") * instance.weight).sum()) * float(instance.machine_gpus[p])
    rows = np.concatenate([b.rows.ravel() for b in budget]) if budget else np.zeros(0, dtype=np.int64)
    return rows, np.array([usd / float(b.per_row[0]) for b in budget])


def _least(
    instance: Instance, program: Program, slacks: list[_Slack], whole: bool, watch: Watch
) -> list[tuple[_Slack, float]] | None:
    """The least that must be loosened (each slack relative to its row), or None where that does not free the
    plan."""
    session = Session(program, watch)
    every = np.arange(len(program.lower), dtype=np.int32)
    session.highs.changeColsCost(len(every), every, np.zeros(len(every)))
    session.highs.changeObjectiveOffset(0.0)
    session.highs.changeObjectiveSense(highspy.ObjSense.kMinimize)
    if any(s.family == "capacity" for s in slacks):
        session.bounds(program.columns["machines"], 0.0, INF)
        session.bounds(program.columns["units"], 0.0, INF)
    for slack in slacks:
        session.highs.addCol(1.0, 0.0, INF, len(slack.rows), slack.rows.astype(np.int32), slack.values)
    solved = session.integer(_WHOLE_GAP, None, _WHOLE_LIMIT_S) if whole else session.relax()
    if not solved:
        return None
    used = session.x[len(program.lower) :]
    return [(s, float(v) * s.per_unit) for s, v in zip(slacks, used, strict=True) if v > _TINY]


def _named(instance: Instance, goal: Goal, found: list[tuple[_Slack, float]], watch: Watch) -> list[Cause]:
    """Causes from slacks: hours of one entity added up, with the remedy in words."""
    total: dict[tuple[str, str], float] = {}
    hours: dict[tuple[str, str], int] = {}
    # Replicas draw more than the line below their power curve, by which caps and budgets are measured here.
    limits = [goal.budget_usd, goal.budget_kgco2e, *instance.site_cap_kw.ravel()]
    low = "at least " if any(instance.unit_curve) and np.isfinite(limits).any() else ""
    units: dict[tuple[str, str], str] = {}
    for slack, amount in found:
        key = (slack.family, slack.entity)
        total[key] = total.get(key, 0.0) + amount
        hours[key] = hours.get(key, 0) + 1
        units[key] = slack.unit
    causes = []
    for (family, entity), amount in sorted(total.items(), key=lambda item: item[0]):
        remedy = _remedy(instance, goal, family, entity, amount, hours[family, entity], watch, low)
        least = low if family in ("budget", "power_cap", "serve") else ""
        causes.append(Cause(family, entity, amount, units[family, entity], remedy, least))
    return causes


_LONG_NUMBER = 1e15


def _number(value: float) -> str:
    return f"{value:,.0f}" if 100 <= value < _LONG_NUMBER else f"{value:.3g}"


def _remedy(
    instance: Instance,
    goal: Goal,
    family: str,
    entity: str,
    amount: float,
    hours: int,
    watch: Watch,
    low: str,
) -> str:
    if family == "serve":
        return (
            f"serve {low}{_number(amount)} fewer requests of {entity!r} (in {hours} hours), or let them wait"
        )
    if family == "capacity":
        count = int(np.ceil(amount - _TINY))
        return f"add {count} machine{'s' if count > 1 else ''} to pool {entity!r}"
    if family == "deadline":
        later = _hours_later(instance, goal, entity, watch)
        if later is None:
            return f"train {_number(amount)} fewer tokens in {entity!r} (no later deadline within the horizon helps)"
        return f"move the deadline of {entity!r} {later} h later, or train {_number(amount)} fewer tokens"
    if family == "power_cap":
        return f"raise the power cap of site {entity!r} by {low}{_number(amount)} kW"
    if family == "on_prem_first":
        return (
            f"let {_number(amount)} units of work of {entity!r} run elsewhere while there is room on premises "
            f"(in {hours} hours): policy.on_prem_first: false"
        )
    if family == "budget":
        return f"raise the budget by {low}{_number(amount)} {entity}"
    return f"raise the {family} limit of {entity!r} by {_number(amount)} tokens (in {hours} hours)"


def _hours_later(instance: Instance, goal: Goal, job: str, watch: Watch) -> int | None:
    """Fewest hours by which a job's deadline must move for the relaxation to be feasible; None within the
    horizon."""
    number = instance.job_names.index(job)
    low, high = 0, len(instance.hours) - int(instance.job_deadline[number])

    def works(hours: int) -> bool:
        deadline = instance.job_deadline.copy()
        deadline[number] += hours
        return Session(build(replace(instance, job_deadline=deadline), goal), watch).relax()

    if high <= 0 or not works(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high
