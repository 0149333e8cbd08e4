"""`simulate`: a scenario's workload on one of its pools, request by request, closed by the ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from pertoken import catalog
from pertoken.errors import CannotServeError, InputError, nearest
from pertoken.ledger import open_ledger
from pertoken.plan._bursts import times_of
from pertoken.plan._serving import Operation, operations
from pertoken.plan._usage import Use, rows, uses_of
from pertoken.plan.options import Market, Option, allowed, evaluate, with_site
from pertoken.report._compare_table import table, usd
from pertoken.report._page import Block, Figure, Table, html_page, write_whole
from pertoken.report._page import Text as Words
from pertoken.scenario import Api, Scenario, Serving, load, requests_per_hour
from pertoken.units import HOURS_PER_DAY, SECONDS_PER_HOUR

if TYPE_CHECKING:
    from pertoken.perf.simulate import Found, Simulation, Slo, Source

METRICS = (
    "usd_per_mtok_total",
    "usd_per_mtok_in_slo",
    "usd_per_mtok_input_with_idle",
    "usd_per_mtok_output_with_idle",
    "joule_per_token_output",
    "utilisation",
    "slo_attainment",
)


@dataclass(frozen=True)
class Replay:
    """A simulation with what it cost: metrics of its book, read back from the ledger."""

    workload: str
    pool: str
    operation: Operation
    result: Simulation
    found: Found | None
    metrics: dict[str, float | None]
    usd: float

    def _report(self) -> tuple[RenderableType, dict[str, Any], list[Figure]]:
        from pertoken.report.simulate import simulate_report

        return simulate_report(self.result, self.found)

    def __rich__(self) -> RenderableType:
        layout = self.operation.candidate.layout
        title = (
            f"{self.workload} on {self.pool}: replicas of {layout.gpus} GPU, "
            f"{self.operation.candidate.precision}, up to {self.operation.candidate.concurrency:,.0f} requests each"
        )
        made = table("Cost of what was simulated, overheads included", "metric", "value")
        for name, value in self.metrics.items():
            made.add_row(name, usd(value))
        made.add_row("USD in all", usd(self.usd))
        return Group(Text(title, style="bold"), self._report()[0], made)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "workload": self.workload,
            "pool": self.pool,
            "gpus_per_replica": self.operation.candidate.layout.gpus,
            "precision": self.operation.candidate.precision,
            "basis": self.operation.basis,
            **self._report()[1],
            "metrics": self.metrics,
            "usd": self.usd,
        }

    def to_html(self, path: Path) -> None:
        """One self-contained page with the figures."""
        cells = [[name, usd(value)] for name, value in self.metrics.items()]
        blocks: list[Block] = [
            *self._report()[2],
            Table("Cost, read back from the ledger", ["metric", "value"], cells, (1,)),
            Words("", [f"Step times are {self.operation.basis}: {self.operation.source}"]),
        ]
        title = f"{self.workload} on {self.pool}, request by request"
        write_whole(path, html_page(title, "Latency, load and queue over time.", blocks))


def replay(
    scenario: str | Path | Scenario,
    *,
    workload: str = "",
    pool: str = "",
    trace: Path | None = None,
    replicas: int = 0,
    find: bool = False,
    days: int = 7,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Replay:
    """Simulate a serving workload of a scenario on one pool.

    Parameters: workload and pool (empty: the first that fit); trace: requests with arrival times (empty: the
    workload's own, else seeded traffic of its shape, for so many `days` from the horizon's start); replicas (0: what
    `compare` would hold); find: the fewest that keep the SLO at its percentile. Raises InputError,
    CannotServeError, InfeasibleError.
    """
    from pertoken.perf.simulate import ReplicaGroup, find_replicas, serving_slo, simulate

    read = scenario if isinstance(scenario, Scenario) else load(scenario)
    name, served = _workload(read, workload)
    if trace is not None:
        served = served.model_copy(update={"trace": trace})
    market = Market(read)
    pool_name = _pool(read, name, pool)
    slo = serving_slo(served)
    if find and slo is None:
        raise InputError(f"workload {name!r} has no slo: --find needs one to keep")
    if replicas < 0:
        raise InputError(f"--replicas {replicas} must be 1 or more")
    if find or replicas:
        operation, count = _operation(market, served, pool_name), replicas
    else:
        operation, count = _compared(market, name, pool_name)
    group = ReplicaGroup(pool_name, times_of(served, read.pools[pool_name], operation))
    source = _source(read, served, days, seed)
    found: Found | None = None
    if find and slo is not None:
        found = find_replicas(source, group, slo=slo, progress=progress)
        result = found.simulation
    else:
        result = simulate(source, [replace(group, replicas=count)], slo=slo or _no_bound(), progress=progress)
    metrics, cost = _close(market, name, served, pool_name, operation, result)
    return Replay(name, pool_name, operation, result, found, metrics, cost)


def _source(scenario: Scenario, workload: Serving, days: int, seed: int) -> Source:
    from pertoken.perf.simulate import serving_source

    per_hour = requests_per_hour(scenario, workload)[: days * HOURS_PER_DAY]
    return serving_source(workload, [float(n) for n in per_hour], seed=seed)


def _no_bound() -> Slo:
    from pertoken.perf.simulate import Slo

    return Slo()


def _workload(scenario: Scenario, name: str) -> tuple[str, Serving]:
    serving = {n: w for n, w in scenario.workloads.items() if isinstance(w, Serving)}
    if not serving:
        raise InputError(f"scenario {scenario.name!r} serves nothing: it has no serving workload to simulate")
    if not name:
        return next(iter(serving.items()))
    if name not in serving:
        hint = ", ".join(nearest(name, serving)) or ", ".join(serving)
        raise InputError(f"no serving workload {name!r} in scenario {scenario.name!r}: there is {hint}")
    return name, serving[name]


def _pool(scenario: Scenario, workload: str, name: str) -> str:
    pools = [p for p in allowed(scenario, workload) if not isinstance(scenario.pools[p].price, Api)]
    if name and name not in pools:
        hint = ", ".join(nearest(name, pools)) or ", ".join(pools) or "none"
        raise InputError(f"no GPU pool {name!r} that may run {workload!r}: there is {hint}")
    if name:
        return name
    reasons = []
    for pool in pools:
        try:
            operations(scenario.workloads[workload], scenario.pools[pool])  # type: ignore[arg-type]
        except CannotServeError as error:
            reasons.append(f"{pool}: {error}")
        else:
            return pool
    raise CannotServeError(f"no GPU pool can run {workload!r}: {'; '.join(reasons) or 'there is none'}")


def _operation(market: Market, workload: Serving, pool: str) -> Operation:
    """The operating point with the most requests per GPU among those of the pool."""
    found = operations(workload, market.scenario.pools[pool])
    return max(found, key=lambda o: o.requests_per_s / o.candidate.layout.gpus)


def _compared(market: Market, workload: str, pool: str) -> tuple[Operation, int]:
    """The operating point and the replicas that `compare` would hold."""
    option = evaluate(market, workload, pool)
    if option.machines is None or option.operation is None:
        raise CannotServeError(f"{pool}: {option.refused}; say --replicas, or --find")
    return option.operation, option.machines.replicas


def _close(
    market: Market, name: str, workload: Serving, pool_name: str, operation: Operation, result: Simulation
) -> tuple[dict[str, float | None], float]:
    """Post the run to a book of its own, from the horizon's first hour on, and read its metrics."""
    scenario = market.scenario
    pool = scenario.pools[pool_name]
    gpu, site = catalog.gpu(pool.gpu), scenario.sites[pool.site]
    host_w = gpu.host_idle_w + (gpu.host_busy_w - gpu.host_idle_w) * result.utilisation
    first = scenario.hours[0]
    start = datetime.fromisoformat(str(first)).replace(tzinfo=UTC)
    book = f"plan:simulate:{name}@{pool_name}"
    posted = result.usage_rows(
        start=start, book=book, model="", tenant=workload.tenant or name, host_power_w=host_w, pue=site.pue
    )
    lasted = int(np.ceil(result.end_s / SECONDS_PER_HOUR))
    last = start + timedelta(hours=max(lasted, 1))
    days = -(-max(lasted, 1) // HOURS_PER_DAY)
    horizon = scenario.horizon.model_copy(update={"days": max(days, scenario.horizon.days)})
    wide = Market(scenario.model_copy(update={"horizon": horizon}))
    uses = uses_of(posted, wide.hours)
    base = Option(name, pool_name)
    whole, _ = with_site(wide, base, uses)
    ended = np.datetime64(last.replace(tzinfo=None), "h")
    within = [_cut(use, wide.hours < ended) for use in whole]
    ledger = open_ledger()
    ledger.add_usage(rows(within, wide.hours, book))
    ledger.add_rates(wide.pool_rates(pool_name))
    ledger.add_rates(wide.site_rates(pool.site))
    ledger.close(book)
    metrics = ledger.metric(*METRICS, where={"book": book}).to_pylist()[0]
    cost = float(ledger.cost(where={"book": book}).to_pylist()[0]["cost_usd"])
    ledger.shut()
    return metrics, cost


def _cut(use: Use, hours: np.ndarray[Any, np.dtype[np.bool_]]) -> Use:
    return replace(use, quantities={key: np.where(hours, q, 0.0) for key, q in use.quantities.items()})
