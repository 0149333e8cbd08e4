"""What the plan saves: against the best single pool, against always renting, against ignoring the tariff."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from pertoken.errors import CannotServeError, InfeasibleError, PerTokenError
from pertoken.plan._instance import Bools, Instance, Rate
from pertoken.plan._outcome import Schedule, derived, total_usd
from pertoken.units import base_meter

Solve = Callable[[Instance, int], Schedule]
Bill = Callable[[Instance, Schedule], Instance]


@dataclass(frozen=True)
class Alternative:
    """Another way to do the same: its cost, None where it cannot be done, or (`cut`) was not found in time, and why.

    limit: the one of the plan's limits that it cannot keep, where that is why.
    """

    name: str
    cost_usd: float | None
    note: str = ""
    cut: bool = False
    limit: str = ""

    @property
    def why(self) -> str:
        """In short why it has no cost; empty where it has."""
        if self.cost_usd is not None:
            return ""
        if self.cut:
            return "not found in time"
        return f"cannot keep the {self.limit}" if self.limit else "cannot be done"


@dataclass(frozen=True)
class Rival:
    """An alternative with its schedule, as one of the plan's own instance; None where it has none."""

    told: Alternative
    schedule: Schedule | None = None


def alternatives(instance: Instance, solve: Solve, bill: Bill, terms: tuple[str, ...] = ()) -> list[Rival]:
    """The plan's rivals, each solved with the same program and within the same limits.

    Parameters: solve: gives the schedule of an instance that keeps its limits as billed, or raises, knowing how many
    rivals are still to come;
    bill: the instance with energy in the tiers a schedule falls in; terms: price term of each pool (``owned``,
    ``on_demand``, ``api``, …), empty where unknown.
    """
    policed, instance = instance, replace(instance, on_prem=None)
    cloud = np.array([term not in ("owned", "colocated") for term in terms], dtype=np.bool_)
    tariffed = bool(instance.peaks) or _varies(instance)
    some = bool(cloud.any() and not cloud.all())
    singles = sum(
        not _missing(only(instance, one)) for one in np.eye(len(instance.pool_names), dtype=np.bool_)
    )
    pays = _Payer(instance, solve, bill, singles + some + tariffed + (policed.on_prem is not None))
    found = [_single(instance, pays)]
    if some:
        found.append(_restricted(instance, cloud, "always cloud", pays))
    if tariffed:
        found.append(_ignoring_tariff(instance, pays))
    if policed.on_prem is not None:
        every = np.ones(len(instance.pool_names), dtype=np.bool_)
        found.append(_restricted(instance, every, "on premises not first", pays))
    return found


def with_flows(instance: Instance, flows: Bools) -> Instance:
    """The instance with some flows alone [(F,)]."""
    names = ("unit", "pool", "class", "job", "per_hour", "kw", "gpu_kw", "reserve", "loss", "prefill")
    cut = {f"flow_{n}": getattr(instance, f"flow_{n}")[flows] for n in names}
    limits = tuple(
        replace(m, flows=m.flows[flows], of=m.of[flows]) for m in instance.limits if m.of[flows].any()
    )
    step = tuple(q for q, kept in zip(instance.flow_step, flows, strict=False) if kept)
    hourly = None if instance.flow_hour_kw is None else instance.flow_hour_kw[flows]
    return replace(instance, limits=limits, flow_step=step, flow_hour_kw=hourly, **cut)


def only(instance: Instance, pools: Bools) -> Instance:
    """The instance with some pools alone [(P,)]: what runs on others is gone, and no more of theirs is held
    than is there and paid for anyway."""
    return replace(
        with_flows(instance, pools[instance.flow_pool]),
        held_most=np.where(pools, instance.held_most, instance.held_least),
        rented_most=np.where(pools[:, None], instance.rented_most, 0.0),
    )


@dataclass
class _Payer:
    """How a rival is scheduled, and what its schedule costs; `to_come` of them are still to be solved."""

    whole: Instance
    solve: Solve
    bill: Bill
    to_come: int

    def rival(self, name: str, part: Instance, flows: Bools) -> Rival:
        """The schedule of an instance with some flows alone [(F,)], as one of the whole instance, at its rates."""
        self.to_come -= 1
        try:
            made = self.solve(part, max(self.to_come, 0))
        except PerTokenError as error:
            return _no_cost(name, error)
        load = np.zeros((len(flows), made.load.shape[1]))
        load[flows] = made.load
        made = derived(self.whole, made.machines, made.held, made.units, load, made.backlog)
        return Rival(Alternative(name, total_usd(self.bill(self.whole, made), made)), made)


def _missing(part: Instance) -> str:
    """A class or job that the pools of a part cannot run; empty where they run all."""
    for d, label in enumerate(part.class_names):
        if part.requests[d].any() and not (part.flow_class == d).any():
            return label
    for j, label in enumerate(part.job_names):
        if part.job_tokens[j] and not (part.flow_job == j).any():
            return label
    return ""


_LIMITS = {"power_cap": "power cap", "budget": "budget"}


def _no_cost(name: str, error: PerTokenError) -> Rival:
    cut = not isinstance(error, InfeasibleError | CannotServeError)
    causes = getattr(error, "causes", ())
    limit = _LIMITS.get(causes[0].constraint, "") if causes else ""
    return Rival(Alternative(name, None, str(error), cut, limit))


def _restricted(instance: Instance, pools: Bools, name: str, pays: _Payer) -> Rival:
    part = only(instance, pools)
    if missing := _missing(part):
        return Rival(Alternative(name, None, f"{missing} cannot run there"))
    return pays.rival(name, part, pools[instance.flow_pool])


def _single(instance: Instance, pays: _Payer) -> Rival:
    """The cheapest pool that can do everything alone; the note says why others have no cost."""
    tried = [
        _restricted(instance, pools, f"best single option ({name})", pays)
        for name, pools in zip(
            instance.pool_names, np.eye(len(instance.pool_names), dtype=np.bool_), strict=True
        )
    ]
    without = [(n, r.told) for n, r in zip(instance.pool_names, tried, strict=True) if r.schedule is None]
    note = "; ".join(f"{name}: {told.note}" for name, told in without)
    found = [(r.told.cost_usd, r) for r in tried if r.told.cost_usd is not None]
    if found:
        best = min(found, key=lambda pair: pair[0])[1]
        return replace(best, told=replace(best.told, note=note))
    limits = {told.limit for _, told in without}
    cut = any(told.cut for _, told in without)
    return Rival(Alternative("best single option", None, note, cut, limits.pop() if len(limits) == 1 else ""))


def _varies(instance: Instance) -> bool:
    return any(base_meter(r.meter) == "energy_kwh" and np.ptp(r.usd_per_unit) > 1e-12 for r in instance.rates)


def _ignoring_tariff(instance: Instance, pays: _Payer) -> Rival:
    """The schedule of a planner that sees one mean price per kWh and no demand charge, billed at the real
    rates."""

    def flat(rate: Rate) -> Rate:
        if base_meter(rate.meter) != "energy_kwh":
            return rate
        return replace(rate, usd_per_unit=np.full(len(instance.hours), float(rate.usd_per_unit.mean())))

    blind = replace(instance, rates=tuple(flat(r) for r in instance.rates), peaks=())
    return pays.rival("ignoring the tariff", blind, np.ones(len(instance.flow_unit), dtype=np.bool_))
