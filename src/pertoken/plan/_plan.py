"""The answer of the planner: a schedule, what it costs, and how good it is proven to be."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pertoken.plan._goal import Goal
from pertoken.plan._instance import Floats, Instance, Rate
from pertoken.plan._outcome import Cost, Entry, Schedule, carbon_kg, costs, entries
from pertoken.plan._solve import gap
from pertoken.units import base_meter, site_pool

if TYPE_CHECKING:
    import pyarrow as pa

    from pertoken.plan.options import Market


@dataclass(frozen=True)
class Origin:
    """What an instance was made from: a scenario and its prices, where in the predictor's interval throughput is, and
    whether all machines that are there stay."""

    market: Market
    case: str = "expected"
    keep: bool = False


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
    goal: Goal = field(default_factory=Goal)
    """What it was asked for: its budgets hold for whatever is solved beside it."""
    notes: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()
    """Price term of each pool, where the plan is of a scenario."""
    origin: Origin | None = None
    """What its instance was made from, where that was a scenario."""

    @property
    def gap(self) -> float | None:
        """Relative distance of the objective from the bound; 0 where floats put it a hair beyond."""
        sign = -1.0 if self.objective_name == "tokens" else 1.0
        beyond = sign * (self.bound - self.objective) > 0
        return 0.0 if beyond and np.isfinite(self.bound) else gap(self.objective, self.bound)

    def beside(self) -> Goal:
        """The goal of what is solved beside the plan: least cost of the same work within the same carbon budget.

        A budget in USD or tokens is left out: it can only forbid a plan of least cost, and would hide what that is.
        """
        return Goal(scale=self.scale, budget_kgco2e=self.goal.budget_kgco2e)

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


def _posted(instance: Instance, rate: Rate) -> Floats:
    """A rate's hours; a demand charge's only where it is posted."""
    if base_meter(rate.meter) != "peak_kw":
        return rate.usd_per_unit
    usd = np.full(len(instance.hours), np.nan)
    for peak in instance.peaks:
        if rate.meter in peak.meters and rate.pool == site_pool(instance.site_names[peak.site]):
            usd[peak.at] = rate.usd_per_unit[peak.at]
    return usd
