"""`plan`: the schedule, closed by the ledger; every figure read back from it, as table, page, rows and
calendar."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pertoken.errors import InputError
from pertoken.ledger import open_ledger
from pertoken.plan._duals import ShadowPrices, prices_of
from pertoken.plan.schedule import (
    OBJECTIVES,
    Against,
    Objective,
    Plan,
    Progress,
    check_values,
    completion_hours,
    frontier,
    held_against,
    plan,
)
from pertoken.report._page import write_whole
from pertoken.report._plan_calendar import cron_rows, icalendar
from pertoken.scenario import Scenario, load
from pertoken.units import (
    COMPONENTS,
    HOURS_PER_MONTH,
    IDLE,
    TOKEN_METERS,
    base_meter,
    site_pool,
    usd_per_mtok,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from pertoken.plan._against import Alternative
    from pertoken.plan._robust import Robust

Report = Callable[[Progress], None]
AGAINST: dict[Against, str] = {
    "deadline": "hours each job has from its start",
    "tokens": "tokens, as a multiple of the scenario's",
    "carbon": "kgCO2e over the horizon",
}


@dataclass(frozen=True)
class WorkloadCost:
    """What one tenant's tokens cost in the plan [USD over the horizon].

    own_usd: what its own use of resources cost; with_idle_usd: with its share of idle, waste and overheads: those of a
    pool are for who uses the pool, those of a site for who uses its pools, what nobody uses for all, each time in
    proportion to own cost; so the workloads sum to the whole.
    """

    name: str
    model: str
    tokens: float
    own_usd: float
    with_idle_usd: float

    @property
    def usd_per_mtok(self) -> float:
        """All cost, its share of idle included, over its tokens [USD per M tokens]."""
        return usd_per_mtok(self.with_idle_usd, self.tokens) if self.tokens else math.nan


@dataclass(frozen=True)
class Planned:
    """A plan with the figures the ledger gives it; costs are USD over the horizon unless named otherwise."""

    scenario: Scenario
    found: Plan
    cost_usd: float
    by_component: dict[str, float]
    by_phase: dict[str, float]
    workloads: list[WorkloadCost]
    tokens: dict[str, float]
    kwh: float
    kgco2e: float | None
    alternatives: list[Alternative] = field(default_factory=list)
    robust: Robust | None = None
    prices: ShadowPrices | None = None
    against: str = ""
    """What the frontier is against; empty where none was asked for."""
    frontier: list[tuple[float, float | None]] = field(default_factory=list)
    """Value of the second goal and least cost there [USD], None where no plan exists."""
    progress: list[Progress] = field(default_factory=list)

    @property
    def book(self) -> str:
        """The book its usage is in."""
        return f"plan:{self.scenario.name}"

    @property
    def usd_per_month(self) -> float:
        """Cost of an average month of 730 hours."""
        return self.cost_usd / len(self.found.instance.hours) * HOURS_PER_MONTH

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: the figures, the schedule's changes, and what is proven."""
        f = self.found
        return {
            "scenario": self.scenario.name,
            "book": self.book,
            "objective": f.objective_name,
            "objective_value": f.objective,
            "bound": f.bound if np.isfinite(f.bound) else None,
            "gap_fraction": f.gap,
            "status": f.status,
            "method": f.method,
            "elapsed_s": f.elapsed_s,
            "cost_usd": self.cost_usd,
            "usd_per_month": self.usd_per_month,
            "cost_usd_by_component": self.by_component,
            "cost_usd_by_phase": self.by_phase,
            "tokens": self.tokens,
            "kwh": self.kwh,
            "kgco2e": self.kgco2e,
            "workloads": [asdict(w) | {"usd_per_mtok": w.usd_per_mtok} for w in self.workloads],
            "held_machines": {
                n: int(h) for n, h in zip(f.instance.pool_names, f.schedule.held, strict=True) if h > 0
            },
            "peak_kw": {
                f"{f.instance.site_names[k.site]} {k.meters[0]} {str(f.instance.hours[k.at])[:7]}": float(kw)
                for k, kw in zip(f.instance.peaks, f.schedule.peak_kw, strict=True)
            },
            "completion_hours": completion_hours(f),
            "alternatives": [asdict(a) for a in self.alternatives],
            "regret_usd": self._regret(),
            "shadow_prices": None if self.prices is None else self.prices.to_dict(),
            "frontier": [{"against": self.against, "value": v, "cost_usd": c} for v, c in self.frontier],
            "changes": cron_rows(f),
            "notes": list(f.notes),
        }

    def _regret(self) -> dict[str, Any] | None:
        if self.robust is None:
            return None
        names = list(self.robust.plans)
        rows = {
            plan_name: {n: (float(v) if np.isfinite(v) else None) for n, v in zip(names, row, strict=True)}
            for plan_name, row in zip(names, self.robust.regret_usd, strict=True)
        }
        return {"choice": self.robust.choice, "plans": rows}

    def as_text(self) -> str:
        """The tables as plain text of at most 100 columns."""
        from pertoken.report._plan_table import as_text

        return as_text(self)

    def write_html(self, path: Path) -> None:
        """One self-contained page."""
        from pertoken.report._plan_page import write_page

        write_page(self, path)

    def write_json(self, path: Path) -> None:
        """`to_dict` as JSON."""
        write_whole(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_csv(self, path: Path) -> None:
        """The schedule by hour and pool: machines, units, load, power, work waiting."""
        write_whole(path, _csv(schedule_rows(self.found)))

    def write_ledger(self, path: Path) -> None:
        """Rates, usage and costs in the book ``plan:<name>`` of the ledger at `path`, in place of what it held."""
        ledger = open_ledger(path)
        try:
            ledger.put_book(self.book, *self.rows())
        finally:
            ledger.shut()

    def rows(self) -> tuple[pa.Table, pa.Table]:
        """The book's usage and rates, as `Ledger.put_book` and a service take them."""
        return self.found.usage_rows(self.book), self.found.rate_rows()

    def write_calendar(self, path: Path) -> None:
        """The schedule's changes: CronJob-style rows (``.csv``), or events for people (``.ics``)."""
        if path.suffix == ".ics":
            write_whole(path, icalendar(self.found))
        else:
            write_whole(path, _csv(cron_rows(self.found)))


def run(
    scenario: Scenario | str | Path,
    *,
    objective: Objective = "cost",
    gap: float = 0.01,
    time_limit_s: float = 120.0,
    under: Sequence[str] = (),
    with_savings: bool = True,
    fewest_switches: bool = False,
    keep: bool = False,
    with_prices: bool = False,
    against: Against | None = None,
    values: Sequence[float] = (),
    progress: Report | None = None,
) -> Planned:
    """Plan a scenario and close it in a ledger of its own.

    with_prices: also shadow prices; against, values: also the least cost at each value of a second goal (see
    `schedule.frontier`).

    under: cases (``low``, ``expected``, ``high``) to plan against, with the regret of each; the other
    parameters as in `plan`. Raises what `plan` raises.
    """
    chosen = load(scenario) if isinstance(scenario, str | Path) else scenario
    if against is not None:
        check_values(against, values)
    steps: list[Progress] = []

    def watch(step: Progress) -> None:
        steps.append(step)
        if progress is not None:
            progress(step)

    found = plan(
        chosen,
        objective,
        gap=gap,
        time_limit_s=time_limit_s,
        fewest_switches=fewest_switches,
        keep=keep,
        progress=watch,
    )
    beside = (with_savings and objective == "cost", bool(under), with_prices, against is not None)
    if found.status == "stopped" and any(beside):
        # Whoever stops the solver wants what there is, now.
        with_savings, under, with_prices, against = False, (), False, None
        found = replace(
            found, notes=(*found.notes, "stopped by hand: only the plan itself, nothing beside it")
        )
    rivals: list[Alternative] = []
    if with_savings and objective == "cost":
        found, rivals = held_against(found, time_limit_s=time_limit_s)
    robust = _regret(chosen, under, keep, gap, time_limit_s) if under else None
    prices = prices_of(found, time_limit_s=time_limit_s) if with_prices else None
    front: list[tuple[float, float | None]] = []
    if against is not None:
        found, front = _front(found, against, values, gap, time_limit_s)
    closed = _closed(chosen, found, rivals, robust, steps)
    return replace(closed, prices=prices, against=AGAINST[against] if against else "", frontier=front)


def beside_rivals(planned: Planned, *, time_limit_s: float) -> Planned:
    """A plan of least cost with what it is held against; closed again where a rival is cheaper and taken for it.

    Raises what `schedule.held_against` raises.
    """
    found, rivals = held_against(planned.found, time_limit_s=time_limit_s)
    if found is planned.found:
        return replace(planned, alternatives=rivals)
    closed = _closed(planned.scenario, found, rivals, planned.robust, planned.progress)
    return replace(closed, prices=planned.prices, against=planned.against, frontier=planned.frontier)


def _regret(scenario: Scenario, under: Sequence[str], keep: bool, gap: float, time_limit_s: float) -> Robust:
    from pertoken.plan._robust import Future
    from pertoken.plan._robust import under as against_cases

    futures = {case: Future(case) for case in under}
    return against_cases(scenario, futures, keep=keep, gap=gap, time_limit_s=time_limit_s)


def _front(
    found: Plan, against: Against, values: Sequence[float], gap: float, time_limit_s: float
) -> tuple[Plan, list[tuple[float, float | None]]]:
    """Least cost at each value, and the plan with the notes of those plans that are not its own."""
    made = frontier(found, against, values, gap=gap, time_limit_s=time_limit_s)
    more = [n for _, point in made if point is not None for n in point.notes if n not in found.notes]
    notes = (*found.notes, *dict.fromkeys(f"frontier: {n}" for n in more))
    front = [(value, None if point is None else point.cost_usd) for value, point in made]
    return replace(found, notes=notes), front


def _closed(
    scenario: Scenario, found: Plan, rivals: list[Alternative], robust: Robust | None, steps: list[Progress]
) -> Planned:
    """The plan's figures, read back from a ledger that closed its rows."""
    ledger = open_ledger()
    try:
        ledger.add_rates(found.rate_rows())
        ledger.add_usage(found.usage_rows())
        ledger.close()
        total = {row["component"]: float(row["cost_usd"]) for row in ledger.cost("component").to_pylist()}
        phases = {row["phase"]: float(row["cost_usd"]) for row in ledger.cost("phase").to_pylist()}
        owners = ledger.cost("pool", "tenant", "model").to_pylist()
        used = ledger.usage("tenant", "model", "meter").to_pylist()
    finally:
        ledger.shut()
    meters: dict[str, float] = {}
    for row in used:
        meter = base_meter(row["meter"])
        meters[meter] = meters.get(meter, 0.0) + float(row["quantity"])
    return Planned(
        scenario=scenario,
        found=found,
        cost_usd=sum(total.values()),
        by_component={name: total[name] for name in COMPONENTS if total.get(name)},
        by_phase={k: v for k, v in phases.items() if v},
        workloads=_workloads(owners, used, _sites(scenario)),
        tokens={m: meters[m] for m in TOKEN_METERS if meters.get(m)},
        kwh=meters.get("energy_kwh", 0.0),
        kgco2e=found.carbon_kg if np.isfinite(found.carbon_kg) else None,
        alternatives=rivals,
        robust=robust,
        progress=steps,
    )


def _sites(scenario: Scenario) -> dict[str, list[str]]:
    """Pools at each site, by the pool of what none of them owns."""
    found: dict[str, list[str]] = {}
    for name, pool in scenario.pools.items():
        if pool.site:
            found.setdefault(site_pool(pool.site), []).append(name)
    return found


def _workloads(
    owners: list[dict[str, Any]], used: list[dict[str, Any]], sites: dict[str, list[str]]
) -> list[WorkloadCost]:
    own: dict[str, dict[tuple[str, str], float]] = {}
    shared: dict[str, float] = {}
    for row in owners:
        if row["tenant"] == IDLE:
            shared[row["pool"]] = shared.get(row["pool"], 0.0) + float(row["cost_usd"])
        else:
            own.setdefault(row["pool"], {})[row["tenant"], row["model"]] = float(row["cost_usd"])
    whole: dict[tuple[str, str], float] = {}
    for costs in own.values():
        for who, usd in costs.items():
            whole[who] = whole.get(who, 0.0) + usd
    borne = dict(whole)
    for pool, usd in shared.items():
        mine = [costs for name, costs in own.items() if name in sites.get(pool, [pool])]
        paid = sum(sum(costs.values()) for costs in mine)
        for costs in mine if paid else [whole]:
            for who, part in costs.items():
                borne[who] += usd * part / (paid or sum(whole.values()) or 1.0)
    tokens: dict[tuple[str, str], float] = {}
    for row in used:
        if base_meter(row["meter"]) in TOKEN_METERS:
            key = (row["tenant"], row["model"])
            tokens[key] = tokens.get(key, 0.0) + float(row["quantity"])
    return [
        WorkloadCost(tenant, model, tokens.get((tenant, model), 0.0), usd, borne[tenant, model])
        for (tenant, model), usd in sorted(whole.items())
    ]


def schedule_rows(found: Plan) -> list[dict[str, str]]:
    """The schedule by hour and pool, as text: hours in which a pool does nothing and holds nothing are left
    out."""
    i, s = found.instance, found.schedule
    load = np.zeros((len(i.pool_names), len(i.hours)))
    np.add.at(load, i.flow_pool, s.load)
    units = np.zeros_like(load)
    np.add.at(units, i.unit_pool, s.units)
    some = (s.machines > 0) | (load > 1e-9) | (s.held > 0)[:, None]
    return [
        {
            "hour_utc": f"{i.hours[t].astype('datetime64[m]')!s}Z",
            "pool": i.pool_names[p],
            "machines_on": f"{s.machines[p, t]:.0f}",
            "machines_held": f"{s.held[p]:.0f}",
            "machines_rented": f"{s.rented[p, t]:.0f}",
            "units": f"{units[p, t]:.0f}",
            "load_units": f"{load[p, t]:.4f}",
            "kwh": f"{s.kwh[p, t]:.4f}",
        }
        for p, t in np.argwhere(some)
    ]


def _csv(rows: Sequence[dict[str, str]]) -> str:
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out.getvalue()


def objective_named(name: str) -> Objective:
    """The objective of that name. Raises InputError."""
    for known in OBJECTIVES:
        if known == name:
            return known  # type: ignore[return-value]
    raise InputError(f"no objective {name!r}: one of {', '.join(OBJECTIVES)}")


def frontier_of(text: str) -> tuple[Against | None, list[float]]:
    """``tokens=1,1.5,2`` as the second goal and its values; (None, []) where empty. Raises InputError.

    >>> frontier_of("tokens=1,1.5")
    ('tokens', [1.0, 1.5])
    """
    if not text:
        return None, []
    name, _, values = text.partition("=")
    for known in AGAINST:
        if known == name.strip():
            try:
                numbers = [float(v) for v in values.split(",")]
            except ValueError as error:
                raise InputError(f"--frontier {text!r}: give numbers, such as {known}=1,1.5,2") from error
            check_values(known, numbers)
            return known, numbers
    raise InputError(f"--frontier {text!r}: one of {', '.join(AGAINST)}, such as tokens=1,1.5,2")


def objective_text(name: str) -> str:
    """What an objective means, in words."""
    return OBJECTIVES.get(name, name)
