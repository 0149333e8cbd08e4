"""What if: volumes at which options cost the same, extra tokens, time against cost, and what moves the figure most.

All by Σ quantity × rate over the options' usage (`Market.cost_usd`), the product the ledger closes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pertoken.plan._serving import mean_tokens
from pertoken.plan._training import jobs
from pertoken.plan._usage import total_usd
from pertoken.plan.options import Market, Option, evaluate
from pertoken.scenario import Bought, Pool, Scenario, Training, Workload, requests_per_hour
from pertoken.tables import Floats
from pertoken.units import DAYS_PER_WEEK, HOURS_PER_DAY, HOURS_PER_MONTH, TOKENS_PER_MTOK

VOLUMES = np.geomspace(0.02, 50.0, 35)
"""Volumes tried for a break-even, relative to the scenario's."""
SWING = 0.2
"""A sensitivity moves each input up and down by this fraction."""


@dataclass(frozen=True)
class BreakEven:
    """Where an option stops being dearer than another.

    tokens_per_month: the volume from which on it costs no more (0: at every volume tried; infinity: at none);
    up_to_tokens_per_month: the highest volume tried that both can carry.
    """

    other: str
    tokens_per_month: float
    up_to_tokens_per_month: float


@dataclass(frozen=True)
class Swing:
    """Cost per M tokens [USD] with one input moved down and up by `SWING`; `note` where it could not move in full."""

    parameter: str
    low_usd_per_mtok: float
    high_usd_per_mtok: float
    note: str = ""


@dataclass(frozen=True)
class Extra:
    """Extra tokens: average cost per M with them, and what the extra ones cost alone."""

    fraction: float
    average_usd_per_mtok: float
    marginal_usd_per_mtok: float
    refused: str = ""


@dataclass(frozen=True)
class TimeCost:
    """One point of the time-cost frontier of a training job."""

    pool: str
    gpus: int
    days: float
    usd: float
    usd_per_mtok_trained: float
    refused: str = ""


def tokens_per_month(scenario: Scenario, workload: Workload) -> float:
    """Tokens a workload asks for in an average month: input and output served, or tokens trained."""
    horizon_hours = len(scenario.hours)
    if isinstance(workload, Training):
        if workload.tokens is not None:
            tokens = workload.tokens
        else:
            tokens = (workload.tokens_per_week or 0.0) * max(
                horizon_hours // (DAYS_PER_WEEK * HOURS_PER_DAY), 1
            )
    else:
        per_request = mean_tokens(workload.input_tokens) + mean_tokens(workload.output_tokens)
        tokens = float(requests_per_hour(scenario, workload).sum()) * per_request
    return tokens / horizon_hours * HOURS_PER_MONTH


def volume_costs(market: Market, workload: str, pool: str) -> Floats:
    """USD over the horizon at each of `VOLUMES`; NaN where the pool cannot carry it."""
    costs = np.full(len(VOLUMES), np.nan)
    for i, scale in enumerate(VOLUMES):
        option = evaluate(market, workload, pool, scale=float(scale))
        if not option.refused:
            costs[i] = market.cost_usd(option)
    return costs


def break_even(market: Market, option: Option, other: str, costs: dict[str, Floats]) -> BreakEven:
    """Where `option` stops being dearer than the pool `other`, from `volume_costs` of both.

    Between two tried volumes the crossing is put where straight lines through them cross.
    """
    unit = tokens_per_month(market.scenario, market.scenario.workloads[option.workload])
    gap = costs[option.pool] - costs[other]
    both = np.flatnonzero(np.isfinite(gap))
    if not len(both):
        return BreakEven(other, math.inf, 0.0)
    up_to = float(VOLUMES[both[-1]]) * unit
    dearer = both[gap[both] > 0]
    if not len(dearer):
        return BreakEven(other, 0.0, up_to)
    last = dearer[-1]
    after = both[both > last]
    if not len(after):
        return BreakEven(other, math.inf, up_to)
    following = after[0]
    share = gap[last] / (gap[last] - gap[following])
    at = VOLUMES[last] + share * (VOLUMES[following] - VOLUMES[last])
    return BreakEven(other, float(at) * unit, up_to)


def payback_months(market: Market, option: Option, purchase_usd: float, alternative: Option) -> float:
    """Months until what was bought has saved its price against an alternative: price / saving per month.

    The saving leaves out the option's own capital cost. Infinity where it saves nothing.
    """
    scale = HOURS_PER_MONTH / len(market.hours)
    prices = {k: v for k, v in market.prices(option.pool).items() if k[2] != "capital"}
    running = total_usd(option.uses, prices)
    saving = (market.cost_usd(alternative) - running) * scale
    return purchase_usd / saving if saving > 0 else math.inf


def extra_tokens(market: Market, option: Option, fraction: float) -> Extra:
    """Average and marginal cost per M tokens of `fraction` more tokens (0.5 is 50 % more)."""
    more = evaluate(market, option.workload, option.pool, scale=1 + fraction)
    if more.refused:
        return Extra(fraction, math.nan, math.nan, more.refused)
    unit = _horizon_tokens(market, option)
    before, after = market.cost_usd(option), market.cost_usd(more)
    return Extra(
        fraction,
        after / (unit * (1 + fraction)) * TOKENS_PER_MTOK,
        (after - before) / (unit * fraction) * TOKENS_PER_MTOK,
    )


def time_costs(market: Market, workload_name: str, pool: str) -> list[TimeCost]:
    """A training job on every number of machines of a pool: days to finish against cost.

    The deadline is left aside (the horizon is not), so that the frontier shows what missing it would save.
    """
    workload = market.scenario.workloads[workload_name]
    assert isinstance(workload, Training)
    relaxed = workload.model_copy(update={"deadline_days": None})
    scenario = market.scenario.model_copy(
        update={"workloads": {**market.scenario.workloads, workload_name: relaxed}}
    )
    free = Market(scenario)
    found = []
    for job in jobs(relaxed, market.scenario.pools[pool]):
        option = evaluate(free, workload_name, pool, gpus=job.gpus)
        if option.refused or option.runs is None:
            found.append(TimeCost(pool, job.gpus, math.nan, math.nan, math.nan, option.refused))
            continue
        usd = free.cost_usd(option)
        found.append(
            TimeCost(pool, job.gpus, option.runs.days, usd, usd / option.runs.tokens * TOKENS_PER_MTOK)
        )
    return found


def sensitivity(market: Market, option: Option) -> list[Swing]:
    """Cost per M tokens with each input moved by ±20 %, the widest first.

    Throughput and utilisation (the volume of requests on the same hardware rules), power price (energy and demand
    charge), PUE, capital price, life, WACC and staff. An input the option does not have is left out.
    """
    found = []
    for parameter in (
        "throughput",
        "utilisation",
        "power price",
        "PUE",
        "capital price",
        "life",
        "WACC",
        "staff",
    ):
        ends = [_moved(market, option, parameter, 1 + sign * SWING) for sign in (-1, 1)]
        if all(end is None for end in ends):
            continue
        base = market.cost_usd(option) / _horizon_tokens(market, option) * TOKENS_PER_MTOK
        low, high = (base if e is None else e for e in ends)
        if not (math.isclose(low, base, rel_tol=1e-9) and math.isclose(high, base, rel_tol=1e-9)):
            note = "one end cannot be carried" if None in ends else ""
            if parameter == "PUE" and _pue(market, option) * (1 - SWING) < 1:
                note = "PUE no lower than 1"
            found.append(Swing(parameter, low, high, note))
    return sorted(found, key=lambda s: -abs(s.high_usd_per_mtok - s.low_usd_per_mtok))


def _moved(market: Market, option: Option, parameter: str, by: float) -> float | None:
    """USD per M tokens with a parameter multiplied, None where the option cannot run then."""
    scenario = market.scenario
    tokens = _horizon_tokens(market, option)
    if parameter in ("throughput", "utilisation"):
        factor, scale = (by, 1.0) if parameter == "throughput" else (1.0, by)
        moved = evaluate(market, option.workload, option.pool, factor=factor, scale=scale)
        return None if moved.refused else market.cost_usd(moved) / (tokens * scale) * TOKENS_PER_MTOK
    components = {
        "power price": ("energy_charge", "demand_charge"),
        "capital price": ("capital",),
        "staff": ("staff",),
    }.get(parameter)
    if components is not None:
        prices = {k: v * (by if k[2] in components else 1.0) for k, v in market.prices(option.pool).items()}
        return total_usd(option.uses, prices) / tokens * TOKENS_PER_MTOK
    pool = scenario.pools[option.pool]
    changed = _changed(scenario, option.pool, pool, parameter, by)
    if changed is None:
        return None
    other = Market(changed)
    moved = evaluate(other, option.workload, option.pool)
    return None if moved.refused else other.cost_usd(moved) / tokens * TOKENS_PER_MTOK


def _changed(scenario: Scenario, name: str, pool: Pool, parameter: str, by: float) -> Scenario | None:
    if parameter == "PUE":
        if not pool.site:
            return None
        site = scenario.sites[pool.site]
        moved = site.model_copy(update={"pue": max(1.0, site.pue * by)})
        return scenario.model_copy(update={"sites": {**scenario.sites, pool.site: moved}})
    if not isinstance(pool.price, Bought):
        return None
    field = {"life": "life_years", "WACC": "wacc_fraction"}[parameter]
    price = pool.price.model_copy(update={field: getattr(pool.price, field) * by})
    return scenario.model_copy(
        update={"pools": {**scenario.pools, name: pool.model_copy(update={"price": price})}}
    )


def _pue(market: Market, option: Option) -> float:
    site = market.scenario.pools[option.pool].site
    return market.scenario.sites[site].pue if site else math.inf


def _horizon_tokens(market: Market, option: Option) -> float:
    workload = market.scenario.workloads[option.workload]
    return tokens_per_month(market.scenario, workload) * len(market.hours) / HOURS_PER_MONTH


def life_costs_usd_per_gpu_hour(pool: Pool, usd_per_gpu: float) -> dict[int, float]:
    """Capital per GPU hour if the hardware lasts 3, 4, 5 or 6 years, all else as written; empty where rented."""
    from pertoken.rates.capital import capital_usd_per_hour

    price = pool.price
    if not isinstance(price, Bought):
        return {}
    return {
        years: capital_usd_per_hour(
            usd_per_gpu,
            life_years=years,
            wacc_fraction=price.wacc_fraction,
            residual_fraction=price.residual_fraction,
            method=price.method,
        )
        for years in (3, 4, 5, 6)
    }
