"""`compare`: every option alone, closed by the ledger, and every figure read back from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pertoken.errors import CannotServeError
from pertoken.ledger import Ledger, open_ledger
from pertoken.plan._serving import resolve_model
from pertoken.plan.options import CASES, Market, Option, evaluate, facts, options, usage
from pertoken.plan.whatif import (
    VOLUMES,
    BreakEven,
    Extra,
    Swing,
    TimeCost,
    break_even,
    extra_tokens,
    life_costs_usd_per_gpu_hour,
    payback_months,
    sensitivity,
    time_costs,
    tokens_per_month,
    volume_costs,
)
from pertoken.report._compare_notes import notes
from pertoken.scenario import Api, Bought, Scenario, Training, load
from pertoken.units import (
    CATEGORIES,
    COMPONENTS,
    GRAMS_PER_KILOGRAM,
    HOURS_PER_MONTH,
    MONTHS_PER_YEAR,
    PHASES,
    SECONDS_PER_HOUR,
    TOKEN_METERS,
    base_meter,
    usd_per_mtok,
)

SERVING_METRICS = (
    "usd_per_mtok_input",
    "usd_per_mtok_input_computed",
    "usd_per_mtok_output",
    "usd_per_mtok_total",
    "usd_per_mtok_input_with_idle",
    "usd_per_mtok_output_with_idle",
    "joule_per_token_input",
    "joule_per_token_output",
    "joule_per_token_total",
    "kwh_per_mtok_total",
    "gco2e_per_mtok_total",
    "utilisation",
)
TRAINING_METRICS = (
    "usd_per_mtok_trained",
    "joule_per_token_trained",
    "kwh_per_mtok_trained",
    "utilisation",
)

Progress = Callable[[float], None]


@dataclass
class OptionResult:
    """One option with the figures the ledger gives it; costs are USD over the horizon unless named otherwise."""

    facts: dict[str, Any]
    metrics: dict[str, float | None] = field(default_factory=dict)
    usd_per_month: float | None = None
    usd_per_month_by_component: dict[str, float] = field(default_factory=dict)
    usd_per_month_by_category: dict[str, float] = field(default_factory=dict)
    usd_per_month_by_phase: dict[str, float] = field(default_factory=dict)
    kwh_per_month: float | None = None
    kgco2e_per_month: float | None = None
    low: float | None = None
    high: float | None = None
    vendor_usd_per_mtok_output: float | None = None
    break_even: list[BreakEven] = field(default_factory=list)
    payback_months: float | None = None
    payback_against: str = ""
    life_months: float | None = None
    life_usd_per_gpu_hour: dict[int, float] = field(default_factory=dict)
    over_budget: list[str] = field(default_factory=list)

    @property
    def refused(self) -> str:
        """Why the option cannot run; empty where it can."""
        return str(self.facts.get("refused", ""))

    @property
    def headline(self) -> float:
        """The figure options are ranked by: USD per M tokens, all cost over all tokens."""
        value = self.metrics.get("usd_per_mtok_total", self.metrics.get("usd_per_mtok_trained"))
        return math.inf if value is None else value

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {k: v for k, v in asdict(self).items() if k not in ("facts", "break_even")}
        plain["low_usd_per_mtok"], plain["high_usd_per_mtok"] = plain.pop("low"), plain.pop("high")
        return {**self.facts, **plain, "break_even": [asdict(b) for b in self.break_even]}


@dataclass
class WorkloadResult:
    """All options of one workload, cheapest first, those that cannot run last."""

    name: str
    kind: str
    model: str
    tokens_per_month: float
    options: list[OptionResult]
    sensitivity: dict[str, list[Swing]] = field(default_factory=dict)
    """By pool."""
    notes: list[str] = field(default_factory=list)
    """What must be said beside the figures."""
    extra_tokens: list[tuple[str, Extra]] = field(default_factory=list)
    time_cost: list[TimeCost] = field(default_factory=list)
    volumes: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """By pool: tokens a month and what they cost a month [USD], where the pool can carry them."""


class Comparison:
    """What `compare` found: results by workload, and the books behind them as Arrow tables."""

    def __init__(self, scenario: Scenario, workloads: list[WorkloadResult], ledger: Ledger) -> None:
        self.scenario = scenario
        self.workloads = workloads
        self.ledger = ledger

    @property
    def usage(self) -> pa.Table:
        """Usage by book, pool, phase and meter over the horizon."""
        return self.ledger.usage("book", "pool", "model", "tenant", "phase", "meter")

    @property
    def costs(self) -> pa.Table:
        """Cost by book, pool, phase, category and component over the horizon [USD]."""
        return self.ledger.cost("book", "pool", "model", "tenant", "phase", "category", "component")

    @property
    def rates(self) -> pa.Table:
        """Every rate row used, with its source."""
        return self.ledger.rates()

    @property
    def table(self) -> pa.Table:
        """One row per option: its facts and metrics, USD per month in all, by category, by phase and by component
        (each of the three adds up to all)."""
        rows = []
        for workload in self.workloads:
            for option in workload.options:
                flat = {
                    k: option.facts.get(k)
                    for k in ("workload", "pool", "term", "gpu", "site", "book", "refused")
                }
                names = dict.fromkeys((*SERVING_METRICS, *TRAINING_METRICS))
                flat |= {name: option.metrics.get(name) for name in names}
                flat |= {"usd_per_month": option.usd_per_month, "low": option.low, "high": option.high}
                flat |= _parts(option)
                flat |= {"kwh_per_month": option.kwh_per_month, "kgco2e_per_month": option.kgco2e_per_month}
                rows.append(flat)
        return pa.Table.from_pylist(rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON; what is unbounded or absent is null."""
        horizon = self.scenario.horizon
        found: dict[str, Any] = _plain(
            {
                "scenario": self.scenario.name,
                "currency": self.scenario.currency,
                "horizon": {
                    "start": horizon.start.isoformat(),
                    "days": horizon.days,
                    "timezone": horizon.timezone,
                },
                "workloads": {
                    w.name: {
                        "kind": w.kind,
                        "model": w.model,
                        "tokens_per_month": w.tokens_per_month,
                        "options": [o.to_dict() for o in w.options],
                        "sensitivity": {
                            pool: [asdict(s) for s in swings] for pool, swings in w.sensitivity.items()
                        },
                        "notes": w.notes,
                        "extra_tokens": [{"pool": pool, **asdict(e)} for pool, e in w.extra_tokens],
                        "time_cost": [asdict(t) for t in w.time_cost],
                        "volumes": w.volumes,
                    }
                    for w in self.workloads
                },
            }
        )
        return found

    def __repr__(self) -> str:
        from pertoken.report._compare_table import as_text

        return as_text(self)

    def to_html(self, path: str | Path) -> None:
        """One self-contained page: tables, figures, sources."""
        from pertoken.report._compare_page import write_page

        write_page(self, Path(path))

    def to_png(self, path: str | Path) -> None:
        """The headline figure as a picture."""
        from pertoken.report._compare_page import write_picture

        write_picture(self, Path(path))

    def to_csv(self, path: str | Path) -> None:
        """The table of options as CSV."""
        import io

        from pyarrow import csv

        from pertoken.report._page import write_whole

        buffer = io.BytesIO()
        csv.write_csv(self.table, buffer)
        write_whole(Path(path), buffer.getvalue().decode())


def _parts(option: OptionResult) -> dict[str, float | None]:
    """USD per month by category, phase and component, each part of each named; nothing where it cannot run."""
    split = (
        ("", CATEGORIES, option.usd_per_month_by_category),
        ("phase_", PHASES, option.usd_per_month_by_phase),
        ("component_", COMPONENTS, option.usd_per_month_by_component),
    )
    runs = option.usd_per_month is not None
    return {
        f"usd_per_month_{prefix}{part}": found.get(part, 0.0) if runs else None
        for prefix, parts, found in split
        for part in parts
    }


def compare(
    scenario: str | Path | Scenario,
    *,
    sensitivity: bool = False,
    extra_tokens: float | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """What a million tokens cost on every pool of a scenario, each option alone.

    Parameters: scenario: a file, or one already loaded; sensitivity: also how ±20 % on each input moves the cheapest
    option of each workload; extra_tokens: also the average and marginal cost of that fraction more tokens
    (0.5 is 50 % more); progress: called with the share done. Raises ScenarioError, InputError.
    """
    read = scenario if isinstance(scenario, Scenario) else load(scenario)
    market = Market(read)
    ledger = open_ledger()
    found = _post(market, ledger, progress)
    _refuse_impossible(read, found)
    books = _read(ledger)
    results = [_workload(market, books, name, found) for name in read.workloads]
    for done, result in enumerate(results):
        _what_if(market, result, found, sensitivity, extra_tokens)
        if progress:
            progress(0.6 + 0.4 * (done + 1) / len(results))
    return Comparison(read, results, ledger)


def _refuse_impossible(scenario: Scenario, found: dict[tuple[str, str, str], Option]) -> None:
    for name in scenario.workloads:
        reasons = {o.pool: o.refused for o in found.values() if o.workload == name and o.case == "expected"}
        if all(reasons.values()):
            why = "; ".join(f"{pool}: {reason}" for pool, reason in reasons.items())
            raise CannotServeError(f"no pool can run workload {name!r}: {why or 'none is allowed to'}")


def _post(market: Market, ledger: Ledger, progress: Progress | None) -> dict[tuple[str, str, str], Option]:
    """Evaluate every option at every case, write usage and rates, close the books."""
    from pertoken.tables import RATES, USAGE, concat

    found: dict[tuple[str, str, str], Option] = {}
    share = (lambda done: progress(0.5 * done)) if progress else None
    for option in options(market, share):
        found[option.workload, option.pool, "expected"] = option
        api = isinstance(market.scenario.pools[option.pool].price, Api)
        for case in CASES[1:]:
            if not option.refused and not api:
                found[option.workload, option.pool, case] = evaluate(
                    market, option.workload, option.pool, case=case
                )
    running = [o for o in found.values() if not o.refused]
    ledger.add_usage(concat([usage(market, o) for o in running], USAGE))
    pools = list(dict.fromkeys(o.pool for o in running))
    sites = dict.fromkeys(s for p in pools if (s := market.scenario.pools[p].site))
    rates = [market.pool_rates(p) for p in pools] + [market.site_rates(s) for s in sites]
    ledger.add_rates(concat(rates, RATES))
    ledger.close()
    return found


@dataclass(frozen=True)
class _Books:
    """Everything read back from the ledger, each table once, by book."""

    metrics: dict[str, dict[str, float | None]]
    total: dict[str, float]
    by: dict[str, dict[str, dict[str, float]]]
    """Dimension (component, category, phase) to book to value to USD."""
    quantity: dict[str, dict[str, float]]
    """Book to meter, qualifiers added up, to quantity."""


def _read(ledger: Ledger) -> _Books:
    metrics = ledger.metric(*SERVING_METRICS, *TRAINING_METRICS[:-1], by=["book"]).to_pylist()
    by: dict[str, dict[str, dict[str, float]]] = {}
    for dimension in ("component", "category", "phase"):
        by[dimension] = {}
        for row in ledger.cost("book", dimension).to_pylist():
            by[dimension].setdefault(row["book"], {})[row[dimension]] = float(row["cost_usd"])
    quantity: dict[str, dict[str, float]] = {}
    for row in ledger.usage("book", "meter").to_pylist():
        of_book = quantity.setdefault(row["book"], {})
        meter = base_meter(row["meter"])
        of_book[meter] = of_book.get(meter, 0.0) + float(row["quantity"])
    return _Books(
        {row.pop("book"): row for row in metrics},
        {row["book"]: float(row["cost_usd"]) for row in ledger.cost("book").to_pylist()},
        by,
        quantity,
    )


def _workload(
    market: Market, books: _Books, name: str, found: dict[tuple[str, str, str], Option]
) -> WorkloadResult:
    workload = market.scenario.workloads[name]
    metrics = TRAINING_METRICS if isinstance(workload, Training) else SERVING_METRICS
    results = [
        _option(market, books, option, found, metrics)
        for (of, _, case), option in found.items()
        if of == name and case == "expected"
    ]
    results.sort(key=lambda r: (bool(r.refused), r.headline))
    return WorkloadResult(
        name,
        workload.kind,
        workload.model if isinstance(workload.model, str) else resolve_model(workload.model).name,
        tokens_per_month(market.scenario, workload),
        results,
    )


def _option(
    market: Market,
    books: _Books,
    option: Option,
    found: dict[tuple[str, str, str], Option],
    metrics: Sequence[str],
) -> OptionResult:
    result = OptionResult(facts(market, option))
    if option.refused:
        return result
    per_month = HOURS_PER_MONTH / len(market.hours)
    result.metrics = {name: books.metrics[option.book][name] for name in metrics}
    result.usd_per_month = books.total[option.book] * per_month
    result.usd_per_month_by_component = _scaled(books.by["component"][option.book], per_month)
    result.usd_per_month_by_category = _scaled(books.by["category"][option.book], per_month)
    result.usd_per_month_by_phase = _scaled(books.by["phase"][option.book], per_month)
    quantity = books.quantity[option.book]
    if "energy_kwh" in quantity:
        result.kwh_per_month = quantity["energy_kwh"] * per_month
    if "gco2e" in quantity:
        result.kgco2e_per_month = quantity["gco2e"] / GRAMS_PER_KILOGRAM * per_month
    headline = "usd_per_mtok_trained" if "usd_per_mtok_trained" in metrics else "usd_per_mtok_total"
    # The low end of cost is the high end of throughput.
    for case, attribute in (("high", "low"), ("low", "high")):
        end = found.get((option.workload, option.pool, case))
        if end is not None and not end.refused:
            setattr(result, attribute, books.metrics[end.book][headline])
    result.vendor_usd_per_mtok_output = _vendor_figure(market, option)
    result.over_budget = _over_budget(market, books.total[option.book], quantity)
    return result


def _over_budget(market: Market, usd: float, quantity: dict[str, float]) -> list[str]:
    """By how much an option passes each limit of the scenario's budget over the horizon."""
    budget = market.scenario.budget
    tokens = sum(quantity.get(meter, 0.0) for meter in TOKEN_METERS)
    spent = (
        ("USD", usd, budget.usd),
        ("tokens", tokens, budget.tokens),
        ("kgCO2e", quantity.get("gco2e", 0.0) / GRAMS_PER_KILOGRAM, budget.kgco2e),
    )
    return [
        f"{value:,.0f} {unit} over the horizon, the budget is {limit:,.0f}"
        for unit, value, limit in spent
        if limit is not None and value > limit
    ]


def _scaled(values: dict[str, float], by: float) -> dict[str, float]:
    return {key: value * by for key, value in values.items()}


def _vendor_figure(market: Market, option: Option) -> float | None:
    """The vendor's equation: price of a GPU hour over output tokens at full throughput, all else left out."""
    if option.operation is None:
        return None
    prices = market.prices(option.pool)
    gpu_hour = sum(
        float(array.mean())
        for (pool, meter, component), array in prices.items()
        if pool == option.pool and meter == "gpu_hours" and component in ("capital", "rent", "commitment")
    )
    per_gpu = option.operation.tokens_per_s / option.operation.candidate.layout.gpus
    return usd_per_mtok(gpu_hour, per_gpu * SECONDS_PER_HOUR)


def _what_if(
    market: Market,
    result: WorkloadResult,
    found: dict[tuple[str, str, str], Option],
    with_sensitivity: bool,
    fraction: float | None,
) -> None:
    running = [r for r in result.options if not r.refused]
    pools = [str(r.facts["pool"]) for r in running]
    costs = {pool: volume_costs(market, result.name, pool) for pool in pools}
    per_month = HOURS_PER_MONTH / len(market.hours)
    for pool, usd in costs.items():
        result.volumes[pool] = [
            (float(scale) * result.tokens_per_month, float(cost) * per_month)
            for scale, cost in zip(VOLUMES, usd, strict=True)
            if math.isfinite(cost)
        ]
    for option in running:
        own = found[result.name, str(option.facts["pool"]), "expected"]
        option.break_even = [break_even(market, own, other, costs) for other in pools if other != own.pool]
        _payback(market, option, own, running, found)
        if fraction is not None:
            result.extra_tokens.append((own.pool, extra_tokens(market, own, fraction)))
    if with_sensitivity:
        for pool in pools:
            result.sensitivity[pool] = sensitivity(market, found[result.name, pool, "expected"])
    result.notes = notes(market, result)
    if result.kind == "training":
        for pool in pools:
            result.time_cost += time_costs(market, result.name, pool)


def _payback(
    market: Market,
    result: OptionResult,
    own: Option,
    running: list[OptionResult],
    found: dict[tuple[str, str, str], Option],
) -> None:
    purchase = float(result.facts.get("purchase_usd") or 0.0)
    if not purchase:
        return
    result.life_usd_per_gpu_hour = life_costs_usd_per_gpu_hour(market, own.pool)
    # The cheapest option that buys nothing; `running` is in order of cost.
    rented = next((r for r in running if not r.facts.get("purchase_usd")), None)
    if rented is not None:
        other = found[own.workload, str(rented.facts["pool"]), "expected"]
        price = market.scenario.pools[own.pool].price
        result.life_months = price.life_years * MONTHS_PER_YEAR if isinstance(price, Bought) else None
        result.payback_months = payback_months(market, own, purchase, other)
        result.payback_against = other.pool


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
