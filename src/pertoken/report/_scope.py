"""The rows that a budget is of: closed hours out of a ledger, the hour so far read once for all budgets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

from pertoken.fleet import COUNTED, Budget
from pertoken.ledger import Ledger
from pertoken.meter.attribute import BOOK
from pertoken.report._spread import share_of
from pertoken.report.so_far import SoFar
from pertoken.units import IDLE, base_meter

_DEMAND = "demand_charge"
_NANO = Decimal("1e-9")
ByHour = dict[datetime, Decimal]
Weights = Mapping[str, dict[str, Fraction]]


@dataclass(frozen=True)
class Scope:
    """The rows of a ledger that a budget is of."""

    ledger: Ledger
    budget: Budget
    weights: Weights

    def by_hour(self, start: datetime, end: datetime | None, component: str = "") -> ByHour:
        """What each hour came to; `component`: of that component alone."""
        found: dict[datetime, Decimal] = defaultdict(Decimal)
        for hour, _, amount in self._rows(start, end, component):
            found[hour] += amount
        return {hour: amount for hour, amount in found.items() if amount}

    def demand(self, start: datetime, end: datetime) -> dict[tuple[str, datetime], Decimal]:
        """Demand charges by pool and first hour of their months."""
        found: dict[tuple[str, datetime], Decimal] = defaultdict(Decimal)
        if self.budget.usd is not None:
            for hour, pool, amount in self._rows(start, end, _DEMAND, by_pool=True):
                found[pool, hour] += amount
        return {key: amount for key, amount in found.items() if amount}

    def _rows(
        self, start: datetime, end: datetime | None, component: str, by_pool: bool = False
    ) -> Iterator[tuple[datetime, str, Decimal]]:
        budget = self.budget
        where: dict[str, Any] = {"book": BOOK}
        where |= {k: v for k, v in (("model", budget.models), ("pool", budget.pools)) if v}
        if budget.usd is None:
            meters = COUNTED[budget.counts]
            where |= {"meter": meters} | ({"tenant": budget.tenant} if budget.tenant else {})
            for row in self.ledger.usage("hour", where=where, start=start, end=end).to_pylist():
                yield row["hour"], "", row["quantity"]
            return
        where |= {"component": component} if component else {}
        keys = ("hour", "pool") if by_pool else ("hour",)

        def cost(tenant: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
            asked = where | ({"tenant": tenant} if tenant else {})
            rows: list[dict[str, Any]] = self.ledger.cost(
                *keys, where=asked, start=start, end=end
            ).to_pylist()
            return rows

        for row in cost(budget.tenant, keys):
            yield row["hour"], row.get("pool", ""), row["cost_usd"]
        if budget.tenant and budget.with_idle:
            shares = {pool: share_of(self.weights, pool, budget.tenant) for pool in self.weights}
            for row in cost(IDLE, ("hour", "pool")):
                if share := shares.get(row["pool"]):
                    yield row["hour"], row["pool"], exact(Fraction(row["cost_usd"]) * share)
        elif not budget.tenant and not budget.with_idle:
            for row in cost(IDLE, keys):
                yield row["hour"], row.get("pool", ""), -row["cost_usd"]


@dataclass(frozen=True)
class Running:
    """What the hour so far adds, by tenant: asked once for all budgets."""

    hour: datetime
    until: datetime
    cost: Mapping[str, list[tuple[datetime, str, str, Decimal]]]
    """Hour, pool, model, USD: a demand charge stands at its month's first hour."""
    tokens: Mapping[str, list[tuple[str, str, str, Decimal]]]
    """Pool, model, meter, tokens."""
    demand: Mapping[str, list[tuple[datetime, str, str, Decimal]]] = field(default_factory=dict)
    """What of `cost` is demand charges: by how much the hour raises its month's."""

    def sum_of(self, budget: Budget, weights: Weights, start: datetime) -> Decimal:
        """What of it a budget bears, of hours from `start` on [the budget's unit]."""
        if budget.usd is None:
            meters = COUNTED[budget.counts]
            tenants = [budget.tenant] if budget.tenant else [*self.tokens]
            rows = (row for tenant in tenants for row in self.tokens.get(tenant, ()))
            return sum(
                (q for pool, model, meter, q in rows if meter in meters and _within(budget, pool, model)),
                Decimal(0),
            )
        return self._usd(self.cost, budget, weights, start)

    def demand_of(self, budget: Budget, weights: Weights, start: datetime) -> Decimal:
        """What of it are demand charges [USD]; 0 for a budget of tokens."""
        return Decimal(0) if budget.usd is None else self._usd(self.demand, budget, weights, start)

    def _usd(
        self,
        cost: Mapping[str, list[tuple[datetime, str, str, Decimal]]],
        budget: Budget,
        weights: Weights,
        start: datetime,
    ) -> Decimal:
        total = Decimal(0)
        for tenant in [budget.tenant] if budget.tenant else [*cost]:
            if tenant == IDLE and not budget.with_idle and not budget.tenant:
                continue
            for hour, pool, model, usd in cost.get(tenant, ()):
                if hour >= start and _within(budget, pool, model):
                    total += usd
        if budget.tenant and budget.with_idle:
            for hour, pool, model, usd in cost.get(IDLE, ()):
                if hour >= start and _within(budget, pool, model):
                    total += exact(Fraction(usd) * share_of(weights, pool, budget.tenant))
        return total


def _within(budget: Budget, pool: str, model: str) -> bool:
    return (not budget.pools or pool in budget.pools) and (not budget.models or model in budget.models)


def running_of(so_far: SoFar) -> Running:
    """The hour so far, read once out of its ledger."""

    def usd(**where: str) -> dict[str, list[tuple[datetime, str, str, Decimal]]]:
        found: dict[str, list[tuple[datetime, str, str, Decimal]]] = defaultdict(list)
        asked = {"book": BOOK, **where}
        for row in so_far.ledger.cost("hour", "pool", "model", "tenant", where=asked).to_pylist():
            found[row["tenant"]].append((row["hour"], row["pool"], row["model"], row["cost_usd"]))
        return dict(found)

    tokens: dict[str, list[tuple[str, str, str, Decimal]]] = defaultdict(list)
    counted = {"book": BOOK, "meter": [m for meters in COUNTED.values() for m in meters]}
    for row in so_far.ledger.usage("pool", "model", "tenant", "meter", where=counted).to_pylist():
        tokens[row["tenant"]].append((row["pool"], row["model"], base_meter(row["meter"]), row["quantity"]))
    return Running(so_far.hour, so_far.until, usd(), dict(tokens), usd(component=_DEMAND))


def exact(value: Fraction) -> Decimal:
    """To the ledger's last digit."""
    return (Decimal(value.numerator) / Decimal(value.denominator)).quantize(_NANO)
