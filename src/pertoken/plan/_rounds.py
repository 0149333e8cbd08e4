"""A scenario's plan, billed as the ledger bills it, and solved again until what it draws is within its limits.

The first program has the power of replicas on a line below its curve, and each hour's energy in the cheapest tier it
can fall in. Whatever a plan does, it costs no less: that program's bound holds, and where it has no plan there is none.

Later programs have power on tangents over the curve, at the loads of a plan at hand, and energy in the tiers that plan
falls in. What they find is within caps and budgets and no worse than that plan, but they prove nothing: not a bound,
and not that there is no plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pertoken.errors import NoPlanError, PerTokenError
from pertoken.plan._instance import Floats, Instance
from pertoken.plan._objectives import Objective, aim
from pertoken.plan._outcome import Schedule, beyond_line_usd, job_hours, loads_of
from pertoken.plan._plan import Origin, Plan
from pertoken.plan._power_rows import most_kw_of
from pertoken.plan._program import INF, Goal
from pertoken.plan._solve import Watch

_SLIGHT = 1e-6
"""Part by which a limit or gap may be passed: what floats lose."""
_LOGIC = 1e-4
"""Part by which a bound may lie beyond what was found before it is taken for a wrong one."""
_ROUNDS = 6
_LITTLE = 1e-4
"""Part by which a round must better the plan for another to be worth its time."""
OF_THE_GAP = "of the gap"
"""How the note begins that says what of a plan's gap the bound leaves out."""
_LEVELS = (0.5, 0.25, 0.75, 1.0, 0.1)
"""Loads of replicas at which the tangents lie where no plan within the limits is at hand."""


def in_rounds(
    origin: Origin | None,
    instance: Instance,
    objective: Objective,
    goal: Goal,
    gap_fraction: float,
    watch: Watch,
) -> Plan:
    """The plan of an instance (of a scenario: of its origin), billed, with a bound that holds for every plan.

    Raises InfeasibleError where there is provably none, NoPlanError where none within caps and budgets was found.
    """
    given = replace(instance, tier_shares=_cheapest_tiers(instance, origin))
    first = aim(given, objective, goal, gap_fraction, watch)
    search = _Search(origin, first, objective, goal, gap_fraction, watch)
    search.take(first)
    if _worth_another(first, objective, goal):
        search.run()
    return search.answer()


def _worth_another(first: Plan, objective: Objective, goal: Goal) -> bool:
    """Whether another round could find what the first could not: within limits or tiers, or with less gas."""
    i = first.instance
    limited = np.isfinite([goal.budget_usd, goal.budget_kgco2e]).any() or np.isfinite(i.site_cap_kw).any()
    return bool(limited or i.tier_shares or objective == "carbon")


def bill_of(origin: Origin | None) -> Callable[[Instance, Schedule], Instance]:
    """How a schedule is billed: its instance with each hour's energy in the tier it falls in."""

    def bill(instance: Instance, made: Schedule) -> Instance:
        from pertoken.plan._bills import with_tiers

        return instance if origin is None else with_tiers(instance, made, origin.market)

    return bill


def _cheapest_tiers(instance: Instance, origin: Origin | None) -> Mapping[int, Floats]:
    """By site with energy tiers: each hour's energy in the cheapest tier it can fall in."""
    from pertoken.rates.energy import tier_shares

    if origin is None:
        return instance.tier_shares
    found: dict[int, Floats] = {}
    for site, given in instance.tier_shares.items():
        resolved = origin.market.tariff(instance.site_names[site])
        assert resolved is not None
        names = tuple(n for n, s in zip(instance.pool_names, instance.pool_site, strict=True) if s == site)
        meters = ["energy_kwh", *(f"energy_kwh:tier{k + 1}" for k in range(1, len(given)))]
        usd = np.array([instance.prices(names, meter).sum(axis=0) for meter in meters])
        most_kw = np.minimum(most_kw_of(instance, site), instance.site_cap_kw[site])
        if resolved.tariff.tier_unit != "kWh/kW" and np.isfinite(most_kw).all():
            reached = tier_shares(resolved, most_kw) > 0
            last = len(given) - 1 - np.argmax(reached[::-1], axis=0)
            usd = np.where(np.arange(len(given))[:, None] <= last, usd, INF)
        found[site] = (np.arange(len(given))[:, None] == np.argmin(usd, axis=0)).astype(np.float64)
    return found


@dataclass
class _Search:
    """The best plan so far of an objective and goal, and what may better it."""

    origin: Origin | None
    first: Plan
    objective: Objective
    goal: Goal
    gap_fraction: float
    watch: Watch
    best: Plan | None = None
    first_s: float | None = None
    """When the first plan within its limits was found."""

    @property
    def done(self) -> bool:
        if self.best is None or not keeps(self.best):
            return self.watch.over
        return self.watch.over or _reached(self.best, self.gap_fraction)

    def run(self) -> None:
        """Better the plan from its own loads, then from other plans' and from loads that are the same throughout."""
        assert self.best is not None
        self._descend(loads_of(self.first.instance, self.first.schedule), self.best.instance.tier_shares)
        rolled = self.first.method != "one program"
        for loads, tiers in self._seeds():
            if self.done or (rolled and keeps(self.best)):
                return
            self._descend(loads, tiers)

    def take(self, found: Plan) -> bool:
        """Bill what was found by this search's own goal, and keep it where it is the best; whether it is."""
        billed = self._billed(found)
        value = billed.objective if np.isfinite(billed.objective) else None
        if value is None or (self.best is not None and not _better(billed, self.best)):
            return False
        self.best = billed
        if keeps(billed):
            self.first_s = self.watch.elapsed_s() if self.first_s is None else self.first_s
            self.watch.tell("as billed", best=value, bound=self.first.bound)
            self.watch.drain()
        return True

    def _billed(self, found: Plan) -> Plan:
        """A plan with energy in the tiers it falls in and power on its curve; its bound that of the first program."""
        billed = bill_of(self.origin)(replace(found.instance, part_load=None), found.schedule)
        made = replace(
            found, instance=billed, objective_name=self.objective, bound=self.first.bound, goal=self.goal
        )
        if self.objective == "time":
            ends = max(job_hours(billed, made.schedule).values(), default=0)
            return replace(made, objective=found.objective if found.objective_name == "time" else float(ends))
        value = {"cost": made.cost_usd, "carbon": made.carbon_kg, "tokens": made.scale}[self.objective]
        return replace(made, objective=value)

    def _descend(self, loads: Floats, tiers: Mapping[int, Floats]) -> None:
        """Rounds from the loads and tiers of one plan, each at those of the one before, while they better it."""
        for _ in range(_ROUNDS):
            if self.done:
                return
            before = self.best
            instance = replace(self.first.instance, part_load=loads, tier_shares=tiers)
            inner = Watch(max(self.watch.left_s() / 2, 0.5), stop=self.watch.stop)
            try:
                found = aim(instance, self.objective, self.goal, self.gap_fraction / 2, inner)
            except PerTokenError:
                return
            finally:
                self.watch.drain()
            better = self.take(found)
            assert before is not None
            assert self.best is not None
            if keeps(self.best) and (not better or (keeps(before) and _by_little(self.best, before))):
                return
            now = loads_of(found.instance, found.schedule)
            tiers = bill_of(self.origin)(instance, found.schedule).tier_shares
            if np.allclose(now, loads, atol=1e-9) and not better:
                return
            loads = now

    def _seeds(self) -> Iterator[tuple[Floats, Mapping[int, Floats]]]:
        """Loads and tiers of other plans, each taken itself where it is better; then the same load everywhere."""
        others: list[tuple[Objective, Goal]] = []
        if self.objective != "cost" or np.isfinite(self.goal.budget_usd):
            others.append(("cost", replace(self.goal, objective="cost", budget_usd=INF)))
        if np.isfinite(self.goal.budget_kgco2e):
            others.append(
                ("carbon", replace(self.goal, objective="carbon", budget_usd=INF, budget_kgco2e=INF))
            )
        for objective, goal in others:
            inner = Watch(max(self.watch.left_s() / 3, 0.5), stop=self.watch.stop)
            try:
                made = in_rounds(self.origin, self.first.instance, objective, goal, self.gap_fraction, inner)
            except PerTokenError:
                continue
            self.take(made)
            yield loads_of(made.instance, made.schedule), made.instance.tier_shares
        assert self.best is not None
        i, capped = self.first.instance, np.isfinite(self.first.instance.site_cap_kw).any()
        if capped or not keeps(self.best):
            for level in _LEVELS:
                yield np.full((len(i.unit_pool), len(i.hours)), level), self.best.instance.tier_shares

    def answer(self) -> Plan:
        """The best plan, its status and notes; raises NoPlanError where it is not within its limits."""
        best, watch = self.best, self.watch
        if best is None:
            raise NoPlanError("no plan found whose greenhouse gas is known")
        if not keeps(best) and not watch.stop.is_set():
            raise NoPlanError(
                f"no plan found that keeps its limits: in the best, {'; '.join(passed(best))}. That there is none "
                "is not proven: let it run longer, or loosen the limit by more than that"
            )
        sign = -1.0 if best.objective_name == "tokens" else 1.0
        if keeps(best) and sign * (best.bound - best.objective) > _LOGIC * max(abs(best.objective), _SLIGHT):
            raise PerTokenError(
                f"the bound {best.bound:g} lies beyond the plan found, {best.objective:g}, which cannot be: please "
                "report the scenario"
            )
        notes = self.first.notes + (() if keeps(best) else passed(best)) + self._of_gap(best)
        return replace(
            best, status=self._status(best), notes=notes, elapsed_s=watch.elapsed_s(),
            first_feasible_s=self.first.first_feasible_s if keeps(self._billed(self.first)) else self.first_s,
        )  # fmt: skip

    def _status(self, best: Plan) -> str:
        if _reached(best, self.gap_fraction):
            return "optimal"
        if self.watch.stop.is_set():
            return "stopped"
        if self.watch.over:
            return "time limit"
        return "heuristic" if self.first.status == "optimal" else self.first.status

    def _of_gap(self, best: Plan) -> tuple[str, ...]:
        """What of the gap is not for a longer search to close."""
        if best.instance.tier_shares:
            return ("energy tiers: the bound has each hour's energy in the cheapest tier it can fall in",)
        if self.objective != "cost" or _reached(best, self.gap_fraction) or best.gap is None:
            return ()
        beyond = beyond_line_usd(best.instance, best.schedule) / max(best.cost_usd, 1e-9)
        if beyond <= 0.1 * best.gap:
            return ()
        return (f"{OF_THE_GAP} {beyond:.2%} is power of replicas at part load, which the bound leaves out",)


def _reached(found: Plan, gap_fraction: float) -> bool:
    return found.gap is not None and found.gap <= gap_fraction * (1 + _SLIGHT) + _SLIGHT


def keeps(found: Plan) -> bool:
    """Whether what a plan draws, as billed, is within the caps of its sites and its budgets."""
    return _passed_by(found) <= _SLIGHT


def _passed_by(found: Plan) -> float:
    """The greatest part by which a plan passes a cap or budget [fraction]; 0 where it keeps them all."""
    i, goal = found.instance, found.goal
    capped = np.isfinite(i.site_cap_kw)
    cap_kw, kw = i.site_cap_kw[capped], found.schedule.site_kw[capped]
    parts = [float(((kw - cap_kw - _SLIGHT) / np.maximum(cap_kw, 1.0)).max(initial=0.0))]
    for used, limit in ((found.cost_usd, goal.budget_usd), (found.carbon_kg, goal.budget_kgco2e)):
        if np.isfinite(limit):
            parts.append((used - limit) / max(abs(limit), 1e-9) if np.isfinite(used) else INF)
    return max(parts)


def passed(found: Plan) -> tuple[str, ...]:
    """The limits that a plan passes, and by how much."""
    i, goal = found.instance, found.goal
    over_kw = (found.schedule.site_kw - i.site_cap_kw).max(axis=1, initial=-INF)
    notes = [
        f"site {name!r} draws up to {kw:.3g} kW more than its power cap"
        for name, kw in zip(i.site_names, over_kw, strict=True)
        if kw > _SLIGHT
    ]
    for used, limit, unit in (
        (found.cost_usd, goal.budget_usd, "USD"),
        (found.carbon_kg, goal.budget_kgco2e, "kgCO2e"),
    ):
        if used > limit * (1 + _SLIGHT):
            notes.append(f"the budget is passed by {used - limit:.3g} {unit}")
    return tuple(notes)


def _better(a: Plan, b: Plan) -> bool:
    """Whether a plan is better than another: within its limits first, and nearer to them where neither is."""
    if keeps(a) and keeps(b):
        return a.objective > b.objective if a.objective_name == "tokens" else a.objective < b.objective
    return _passed_by(a) < _passed_by(b)


def _by_little(a: Plan, b: Plan) -> bool:
    return abs(a.objective - b.objective) <= _LITTLE * max(abs(b.objective), 1e-9)
