"""What the plan saves: against the best single pool, against always renting, against ignoring the tariff."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from pertoken.errors import CannotServeError, InfeasibleError, PerTokenError
from pertoken.plan._instance import Bools, Instance, Rate
from pertoken.plan._outcome import Schedule, total_usd
from pertoken.plan._power_rows import billed_kw
from pertoken.units import base_meter

Solve = Callable[[Instance, int], Schedule]
Bill = Callable[[Instance, Schedule], Instance]


@dataclass(frozen=True)
class Alternative:
    """Another way to do the same: its cost, None where it cannot be done, or (`cut`) was not found in time, and why."""

    name: str
    cost_usd: float | None
    note: str = ""
    cut: bool = False

    @property
    def why(self) -> str:
        """In short why it has no cost; empty where it has."""
        return "" if self.cost_usd is not None else "not found in time" if self.cut else "cannot be done"


def alternatives(
    instance: Instance, solve: Solve, bill: Bill, terms: tuple[str, ...] = ()
) -> list[Alternative]:
    """The plan's rivals, each solved with the same program.

    Parameters: solve: gives the schedule of an instance, or raises, knowing how many rivals are still to come;
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
    pays = _Payer(solve, bill, singles + some + tariffed + (policed.on_prem is not None))
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

    solve: Solve
    bill: Bill
    to_come: int

    def made(self, instance: Instance) -> Schedule:
        self.to_come -= 1
        return self.solve(instance, max(self.to_come, 0))

    def least_usd(self, instance: Instance) -> float:
        made = self.made(instance)
        return total_usd(self.bill(instance, made), made)


def _missing(part: Instance) -> str:
    """A class or job that the pools of a part cannot run; empty where they run all."""
    for d, label in enumerate(part.class_names):
        if part.requests[d].any() and not (part.flow_class == d).any():
            return label
    for j, label in enumerate(part.job_names):
        if part.job_tokens[j] and not (part.flow_job == j).any():
            return label
    return ""


def _no_cost(name: str, error: PerTokenError) -> Alternative:
    return Alternative(name, None, str(error), cut=not isinstance(error, InfeasibleError | CannotServeError))


def _restricted(instance: Instance, pools: Bools, name: str, pays: _Payer) -> Alternative:
    part = only(instance, pools)
    if missing := _missing(part):
        return Alternative(name, None, f"{missing} cannot run there")
    try:
        return Alternative(name, pays.least_usd(part))
    except PerTokenError as error:
        return _no_cost(name, error)


def _single(instance: Instance, pays: _Payer) -> Alternative:
    """The cheapest pool that can do everything alone."""
    best, reasons, cut = None, [], False
    for p, name in enumerate(instance.pool_names):
        pools = np.arange(len(instance.pool_names)) == p
        tried = _restricted(instance, pools, f"best single option ({name})", pays)
        if tried.cost_usd is None:
            reasons.append(f"{name}: {tried.note}")
            cut = cut or tried.cut
        elif best is None or best.cost_usd is None or tried.cost_usd < best.cost_usd:
            best = tried
    return best or Alternative("best single option", None, "; ".join(reasons), cut)


def _varies(instance: Instance) -> bool:
    return any(base_meter(r.meter) == "energy_kwh" and np.ptp(r.usd_per_unit) > 1e-12 for r in instance.rates)


def _ignoring_tariff(instance: Instance, pays: _Payer) -> Alternative:
    """The schedule of a planner that sees one mean price per kWh and no demand charge, billed at the real
    rates."""

    def flat(rate: Rate) -> Rate:
        if base_meter(rate.meter) != "energy_kwh":
            return rate
        return replace(rate, usd_per_unit=np.full(len(instance.hours), float(rate.usd_per_unit.mean())))

    blind = replace(instance, rates=tuple(flat(r) for r in instance.rates), peaks=())
    try:
        made = pays.made(blind)
    except PerTokenError as error:
        return _no_cost("ignoring the tariff", error)
    made = replace(made, peak_kw=billed_kw(instance, made.site_kw))
    return Alternative("ignoring the tariff", total_usd(pays.bill(instance, made), made))
