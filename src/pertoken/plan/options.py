"""Every option alone: one workload on one pool, as usage and rates ready for the ledger."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from pertoken import catalog
from pertoken.errors import CannotServeError
from pertoken.plan._bursts import burst, is_simulated
from pertoken.plan._pricing import (
    left_out,
    pays_for_energy,
    pool_rates,
    price_step,
    purchase_usd,
    resolved_tariff,
    site_rates,
)
from pertoken.plan._serving import (
    Machines,
    Operation,
    api_serving,
    committed,
    gpu_serving,
    load_fraction,
    machines_for,
    mean_tokens,
    operations,
    replicas_for,
    spot_loss,
)
from pertoken.plan._training import Job, Runs, gpu_training, jobs, schedule
from pertoken.plan._usage import Prices, Quantities, Use, prices_of, rows, total_usd, uses_of
from pertoken.rates.energy import TariffHours, tier_shares
from pertoken.rates.site import UTILITY_HOURS, peak_usage_rows, split_kwh
from pertoken.scenario import Api, Scenario, Serving, Training, requests_per_hour
from pertoken.tables import Floats
from pertoken.units import IDLE, SERVED_TOKEN_METERS, base_meter, site_pool

CASES = ("expected", "low", "high")
"""Where in the predictor's 80 % interval throughput is: its value, its low end, its high end."""


@dataclass(frozen=True)
class Option:
    """One workload on one pool: what it uses, or why it cannot run there (`refused`)."""

    workload: str
    pool: str
    case: str = "expected"
    uses: tuple[Use, ...] = ()
    refused: str = ""
    operation: Operation | None = None
    machines: Machines | None = None
    job: Job | None = None
    runs: Runs | None = None
    peak_kw: float = 0.0

    @property
    def book(self) -> str:
        """The book its rows are written to."""
        suffix = "" if self.case == "expected" else f":{self.case}"
        return f"plan:{self.workload}@{self.pool}{suffix}"


@dataclass(frozen=True, eq=False)
class Market:
    """A scenario's prices, computed once: tariffs by site and rate rows by pool and site."""

    scenario: Scenario
    _tariffs: dict[str, TariffHours | None] = field(default_factory=dict)
    _rates: dict[str, pa.Table] = field(default_factory=dict)
    _prices: dict[str, Prices] = field(default_factory=dict)

    def tariff(self, site: str) -> TariffHours | None:
        """The site's tariff over the horizon."""
        if site not in self._tariffs:
            self._tariffs[site] = resolved_tariff(self.scenario.sites[site], self.scenario.hours)
        return self._tariffs[site]

    def pool_rates(self, pool: str) -> pa.Table:
        """Rate rows of a pool."""
        if pool not in self._rates:
            site = self.scenario.pools[pool].site
            self._rates[pool] = pool_rates(
                self.scenario,
                pool,
                self.hours,
                self.tariff(site) if site else None,
                on=self.scenario.horizon.start,
            )
        return self._rates[pool]

    def site_rates(self, site: str) -> pa.Table:
        """Rate rows of what no pool owns at a site."""
        key = site_pool(site)
        if key not in self._rates:
            self._rates[key] = site_rates(self.scenario, site, self.hours, self.tariff(site))
        return self._rates[key]

    def prices(self, pool: str) -> Prices:
        """Rates of a pool and its site as arrays over the horizon."""
        if pool not in self._prices:
            site = self.scenario.pools[pool].site
            found = prices_of(self.pool_rates(pool), self.hours)
            self._prices[pool] = found | (prices_of(self.site_rates(site), self.hours) if site else {})
        return self._prices[pool]

    @cached_property
    def hours(self) -> np.ndarray[tuple[int], np.dtype[np.datetime64]]:
        """UTC hours of the horizon."""
        return self.scenario.hours

    def cost_usd(self, option: Option) -> float:
        """What an option costs over the horizon [USD], by the same product the ledger closes."""
        return total_usd(option.uses, self.prices(option.pool))


def usage(market: Market, option: Option) -> pa.Table:
    """The option's usage rows, in its book."""
    return rows(option.uses, market.hours, option.book)


def options(market: Market, progress: Callable[[float], None] | None = None) -> Iterator[Option]:
    """Every workload on every pool it may run on, in the scenario's order."""
    scenario = market.scenario
    pairs = [(w, p) for w in scenario.workloads for p in allowed(scenario, w)]
    for done, (workload, pool) in enumerate(pairs):
        yield evaluate(market, workload, pool)
        if progress:
            progress((done + 1) / len(pairs))


def allowed(scenario: Scenario, workload_name: str) -> list[str]:
    """Pools the workload's owner lets it run on: named pools, regions, vendors."""
    workload = scenario.workloads[workload_name]
    found = []
    for name, pool in scenario.pools.items():
        region = scenario.sites[pool.site].region if pool.site else ""
        if workload.pools and name not in workload.pools:
            continue
        if workload.regions and region not in workload.regions:
            continue
        if workload.vendors and pool.vendor not in workload.vendors:
            continue
        found.append(name)
    return found


def evaluate(
    market: Market,
    workload_name: str,
    pool_name: str,
    *,
    case: str = "expected",
    factor: float = 1.0,
    scale: float = 1.0,
    gpus: int | None = None,
) -> Option:
    """One workload alone on one pool.

    Parameters: case: see `CASES`; factor: on throughput; scale: on requests or training tokens; gpus: of a
    training job (None: the fewest that meet the deadline; all of a pool that is paid for anyway).
    What cannot run is an answer: `refused` says why.
    """
    workload = market.scenario.workloads[workload_name]
    base = Option(workload_name, pool_name, case)
    try:
        if isinstance(workload, Training):
            return _training(market, base, workload, factor, scale, gpus)
        return _serving(market, base, workload, factor, scale)
    except CannotServeError as error:
        return Option(workload_name, pool_name, case, refused=str(error))


def _serving(market: Market, base: Option, workload: Serving, factor: float, scale: float) -> Option:
    scenario = market.scenario
    pool = scenario.pools[base.pool]
    requests = requests_per_hour(scenario, workload) * scale
    if isinstance(pool.price, Api):
        step = price_step(pool.price, scenario.horizon.start, mean_tokens(workload.input_tokens))
        uses = api_serving(base.workload, workload, base.pool, requests, step)
        uses += _overhead_hours(market, base.pool, uses)
        return Option(base.workload, base.pool, base.case, tuple(uses))
    peak = float(requests.max())
    best: tuple[tuple[int, int, float], Operation, Machines] | None = None
    refused: CannotServeError | None = None
    for operation in operations(workload, pool):
        try:
            held = _held(market, base, workload, operation, peak, factor, scale)
        except CannotServeError as error:
            refused = error
            continue
        rank = (held.paid_gpus, held.gpus, -operation.requests_per_s * held.replicas)
        if best is None or rank < best[0]:
            best = (rank, operation, held)
    if best is None:
        assert refused is not None
        raise refused
    _, operation, held = best
    uses = gpu_serving(
        scenario,
        base.workload,
        workload,
        base.pool,
        operation,
        held,
        requests=requests,
        case=base.case,
        factor=factor,
    )
    whole, peak_kw = with_site(market, base, uses)
    return Option(base.workload, base.pool, base.case, whole, "", operation, held, peak_kw=peak_kw)


def _held(
    market: Market,
    base: Option,
    workload: Serving,
    operation: Operation,
    peak: float,
    factor: float,
    scale: float,
) -> Machines:
    """Machines from the busiest hour's average, or from a simulation where the workload asks for one.

    The simulation is run at the scenario's volume; at another it is scaled as the averages scale.
    """
    pool = market.scenario.pools[base.pool]
    replicas = replicas_for(operation, pool, workload, peak, base.case, factor)
    if not is_simulated(workload):
        return machines_for(operation, pool, replicas)
    # What interruptions waste is time in which nothing is served: the replica is that much slower.
    found = burst(market.scenario, workload, pool, operation, base.case, factor * (1 - spot_loss(pool)))
    at_scenario = replicas_for(operation, pool, workload, peak / scale, base.case, factor)
    needed = max(math.ceil(found.replicas * replicas / at_scenario - 1e-9), workload.minimum_replicas)
    held = machines_for(operation, pool, needed)
    return replace(
        held,
        requests_in_slo_fraction=found.requests_in_slo_fraction,
        output_tokens_in_slo_fraction=found.output_tokens_in_slo_fraction,
    )


def _training(
    market: Market, base: Option, workload: Training, factor: float, scale: float, gpus: int | None
) -> Option:
    scenario = market.scenario
    pool = scenario.pools[base.pool]
    if isinstance(pool.price, Api):
        raise CannotServeError("an API serves tokens, it trains nothing")
    found = jobs(workload, pool)
    order = sorted(found, key=lambda j: -j.tokens_per_s if committed(pool) else j.gpus)
    if gpus is not None:
        order = [j for j in found if j.gpus == gpus]
    refused = CannotServeError(f"the job does not run on {gpus} GPUs of this pool")
    for job in order:
        try:
            runs = schedule(scenario, workload, job, base.case, factor, scale)
        except CannotServeError as error:
            refused = error
            continue
        uses = gpu_training(scenario, base.workload, workload, base.pool, job, runs)
        whole, peak_kw = with_site(market, base, uses)
        return Option(base.workload, base.pool, base.case, whole, job=job, runs=runs, peak_kw=peak_kw)
    raise refused


def with_site(market: Market, base: Option, uses: list[Use]) -> tuple[tuple[Use, ...], float]:
    """The uses with energy in the tariff's tiers, the site's peaks and its hours; and the highest kW.

    Raises CannotServeError where the site's power cap is passed.
    """
    scenario = market.scenario
    pool = scenario.pools[base.pool]
    site = scenario.sites[pool.site]
    tariff = market.tariff(pool.site) if pays_for_energy(pool) else None
    by_phase = _by_phase(uses, ("energy_kwh",))
    load = np.sum(list(by_phase.values()), axis=0)
    peak_kw = float(load.max())
    if site.power_cap_kw is not None and peak_kw > site.power_cap_kw * (1 + 1e-9):
        raise CannotServeError(
            f"it draws up to {peak_kw:,.1f} kW, site {pool.site!r} has a cap of {site.power_cap_kw:,.1f} kW"
        )
    found = list(uses)
    if tariff is not None:
        if tariff.tariff.tiers > 1:
            found = [_in_tiers(use, tier_shares(tariff, load)) for use in found]
        found += _peaks(market, base, tariff, by_phase)
    found += _overhead_hours(market, base.pool, uses)
    return tuple(found), peak_kw


def _by_phase(uses: list[Use], meters: tuple[str, ...]) -> dict[str, Floats]:
    """Quantity per hour of some meters, qualifiers added up, by phase."""
    found: dict[str, Floats] = {}
    for use in uses:
        for (phase, meter), quantity in use.quantities.items():
            if base_meter(meter) in meters:
                found[phase] = found[phase] + quantity if phase in found else quantity
    return found


def _in_tiers(use: Use, shares: Floats) -> Use:
    quantities: Quantities = {}
    for (phase, meter), quantity in use.quantities.items():
        if meter == "energy_kwh":
            quantities |= {(phase, tier): part for tier, part in split_kwh(shares, quantity).items()}
        else:
            quantities[phase, meter] = quantity
    return Use(use.pool, use.model, use.tenant, use.basis, quantities)


def _peaks(market: Market, base: Option, tariff: TariffHours, by_phase: dict[str, Floats]) -> list[Use]:
    site_name = market.scenario.pools[base.pool].site
    site = market.scenario.sites[site_name]
    table = peak_usage_rows(
        base.book,
        site_name,
        tariff,
        by_phase,
        previous_peaks_kw=site.previous_peaks_kw or None,
        basis="assumed",
    )
    return uses_of(table, market.hours)


def _overhead_hours(market: Market, pool_name: str, uses: list[Use]) -> list[Use]:
    """Hours of what is paid by the hour, at the pool and its site, over the phases as its GPU hours are.

    An API holds no GPU hours for us: its tokens stand in for them.
    """
    site_name = market.scenario.pools[pool_name].site
    by_phase = _by_phase(uses, ("gpu_hours",) if site_name else SERVED_TOKEN_METERS)
    total = np.sum(list(by_phase.values()), axis=0)
    some = total > 0
    shares: Quantities = {
        (phase, "site_hours"): np.divide(part, total, out=np.zeros_like(total), where=some)
        for phase, part in by_phase.items()
    }
    # An hour in which nothing is held is still an hour of staff and network: nobody's.
    idle = shares.pop(("idle", "site_hours"), np.zeros_like(total)) + np.where(some, 0.0, 1.0)
    utility = UTILITY_HOURS if pays_for_energy(market.scenario.pools[pool_name]) else "site_hours"
    found = []
    for pool in (pool_name, site_pool(site_name)):
        named = {name for of, name, _ in market.prices(pool_name) if of == pool}
        meters = [m for m in dict.fromkeys(("site_hours", utility)) if m in named]
        whole = {("idle", meter): idle for meter in meters}
        parts = {(phase, meter): share for (phase, _), share in shares.items() for meter in meters}
        if meters:
            found.append(Use(pool, uses[0].model, uses[0].tenant, "assumed", parts))
            found.append(Use(pool, uses[0].model, IDLE, "assumed", whole))
    return found


def facts(market: Market, option: Option) -> dict[str, object]:
    """What is known of an option beside its books: hardware, operating point, what was left out, sources."""
    scenario = market.scenario
    pool = scenario.pools[option.pool]
    found: dict[str, object] = {
        "pool": option.pool,
        "workload": option.workload,
        "term": pool.price.term,
        "gpu": catalog.gpu(pool.gpu).name if pool.gpu else "",
        "site": pool.site,
        "book": option.book,
        "left_out": left_out(scenario, option.pool),
    }
    if option.refused:
        return found | {"refused": option.refused}
    if option.machines is not None and option.operation is not None:
        found |= _serving_facts(option.operation, option.machines)
        workload = scenario.workloads[option.workload]
        assert isinstance(workload, Serving)
        load = load_fraction(
            option.operation, option.machines, requests_per_hour(scenario, workload), option.case
        )
        found["capacity_used_fraction"] = float(load.mean())
    if option.job is not None and option.runs is not None:
        found |= _training_facts(option.job, option.runs)
    found["peak_kw"] = option.peak_kw
    tariff = market.tariff(pool.site) if pool.site and pays_for_energy(pool) else None
    found["tariff_misfit"] = tariff.tariff.misfit(option.peak_kw) if tariff else ""
    found["purchase_usd"] = purchase_usd(scenario, pool) * paid_gpus(scenario, option)
    return found


def _serving_facts(operation: Operation, held: Machines) -> dict[str, object]:
    best = operation.candidate
    return {
        "engine": operation.engine,
        "precision": best.precision,
        "layout": {"tp": best.layout.tp, "pp": best.layout.pp, "ep": best.layout.ep, "dp": best.layout.dp},
        "concurrency": best.concurrency,
        "replicas": held.replicas,
        "machines": held.machines,
        "gpus": held.gpus,
        "paid_gpus": held.paid_gpus,
        "spot_lost_fraction": held.lost_fraction,
        "requests_in_slo_fraction": held.requests_in_slo_fraction,
        "ttft_s": operation.ttft_s,
        "tpot_s": operation.tpot_s,
        "tokens_per_s_per_replica": operation.tokens_per_s,
        "tokens_per_s_per_replica_low": operation.tokens_per_s_low,
        "tokens_per_s_per_replica_high": operation.tokens_per_s_high,
        "requests_per_s_per_replica": operation.requests_per_s,
        "basis": operation.basis,
        "source": operation.source,
    }


def _training_facts(job: Job, runs: Runs) -> dict[str, object]:
    return {
        "precision": job.precision,
        "gpus": job.gpus,
        "tokens_per_s": job.tokens_per_s,
        "mfu": float(job.prediction.mfu.value),
        "retained_fraction": job.retained_fraction,
        "days_to_finish": runs.days,
        "basis": job.prediction.basis,
        "source": job.prediction.source,
    }


def paid_gpus(scenario: Scenario, option: Option) -> int:
    """GPUs that are paid for: all of a committed pool, else those held."""
    if option.machines is not None:
        return option.machines.paid_gpus
    if option.job is None:
        return 0
    pool = scenario.pools[option.pool]
    return pool.count if committed(pool) and isinstance(pool.count, int) else option.job.gpus
