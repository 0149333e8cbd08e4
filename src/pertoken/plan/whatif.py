"""What if: volumes at which options cost the same, extra tokens, time against cost, and what moves the figure most.

All by Σ quantity × rate over the options' usage (`Market.cost_usd`), the product the ledger closes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from pertoken.plan._pricing import usd_per_gpu
from pertoken.plan._serving import mean_tokens
from pertoken.plan._training import jobs, runs_asked
from pertoken.plan._usage import total_usd
from pertoken.plan.options import Market, Option, evaluate
from pertoken.rates.capital import payback_years
from pertoken.scenario import Bought, Scenario, Training, Workload, requests_per_hour
from pertoken.tables import Floats
from pertoken.units import HOURS_PER_MONTH, MONTHS_PER_YEAR, TOKENS_PER_MTOK

VOLUMES = np.geomspace(0.02, 50.0, 35)
"""Volumes tried for a break-even, relative to the scenario's."""
SWING = 0.2
"""A sensitivity moves each input up and down by this fraction."""


@dataclass(frozen=True)
class BreakEven:
    """Volumes [tokens per month] at which an option costs no more than another.

    ranges: (from, to) pairs, smallest volumes first; the last reaches up_to_tokens_per_month where the option stays
    cheaper at the highest volume both can carry. tokens_per_month: the lower end of that last range (0: at every
    volume tried; infinity: there is none).
    """

    other: str
    tokens_per_month: float
    up_to_tokens_per_month: float
    ranges: tuple[tuple[float, float], ...] = ()


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
        tokens = sum(asked for _, _, asked in runs_asked(scenario, workload))
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
    """Where `option` costs no more than the pool `other`, from `volume_costs` of both.

    Between two tried volumes of different answer the crossing is bisected to 1 %; a window that opens and closes
    between two tried volumes is not seen.
    """
    unit = tokens_per_month(market.scenario, market.scenario.workloads[option.workload])
    gap = costs[option.pool] - costs[other]
    both = np.flatnonzero(np.isfinite(gap))
    if not len(both):
        return BreakEven(other, math.inf, 0.0)
    up_to = float(VOLUMES[both[-1]]) * unit
    ranges: list[tuple[float, float]] = []
    opened = float(VOLUMES[both[0]]) if gap[both[0]] <= 0 else None
    for left, right in itertools.pairwise(both):
        if (gap[left] <= 0) == (gap[right] <= 0):
            continue
        at = _crossing(market, option, other, float(VOLUMES[left]), float(VOLUMES[right]))
        if opened is None:
            opened = at
        else:
            ranges.append((opened * unit, at * unit))
            opened = None
    if opened is None:
        return BreakEven(other, math.inf, up_to, tuple(ranges))
    always = not ranges and gap[both[0]] <= 0
    ranges.append((opened * unit, up_to))
    return BreakEven(other, 0.0 if always else opened * unit, up_to, tuple(ranges))


def _crossing(market: Market, option: Option, other: str, low: float, high: float) -> float:
    """The volume between two, relative to the scenario's, at which the dearer of two pools changes."""

    def cheaper(scale: float) -> bool:
        own, its = (evaluate(market, option.workload, pool, scale=scale) for pool in (option.pool, other))
        if own.refused or its.refused:
            return not own.refused
        return market.cost_usd(own) <= market.cost_usd(its)

    at_low = cheaper(low)
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        if cheaper(middle) == at_low:
            low = middle
        else:
            high = middle
    return high


def payback_months(market: Market, option: Option, purchase_usd: float, alternative: Option) -> float:
    """Months until what was bought has saved its price against an alternative, at the pool's cost of capital.

    The saving leaves out the option's own capital cost. Infinity where it never does.
    """
    price = market.scenario.pools[option.pool].price
    assert isinstance(price, Bought)
    prices = {k: v for k, v in market.prices(option.pool).items() if k[2] != "capital"}
    running = total_usd(option.uses, prices)
    saving_usd_per_hour = (market.cost_usd(alternative) - running) / len(market.hours)
    years = payback_years(purchase_usd, saving_usd_per_hour, wacc_fraction=price.wacc_fraction)
    return years * MONTHS_PER_YEAR


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

    Throughput and utilisation (the volume of requests on the same hardware rules), GPU or token price (rent,
    commitment, API), power price (energy and demand charge), PUE, capital price (with maintenance and cooling),
    life, WACC and staff. An input that moves nothing in this option is left out.
    """
    found = []
    for parameter in (
        "throughput",
        "utilisation",
        "GPU or token price",
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


_PRICED = {
    "GPU or token price": ("rent", "commitment", "api"),
    "power price": ("energy_charge", "demand_charge"),
    "staff": ("staff",),
}
"""Inputs that are rates: the components they scale."""


def _moved(market: Market, option: Option, parameter: str, by: float) -> float | None:
    """USD per M tokens with a parameter multiplied, None where the option cannot run then."""
    tokens = _horizon_tokens(market, option)
    if parameter in ("throughput", "utilisation"):
        factor, scale = (by, 1.0) if parameter == "throughput" else (1.0, by)
        moved = evaluate(market, option.workload, option.pool, factor=factor, scale=scale)
        return None if moved.refused else market.cost_usd(moved) / (tokens * scale) * TOKENS_PER_MTOK
    if parameter in _PRICED:
        components = _PRICED[parameter]
        prices = {k: v * (by if k[2] in components else 1.0) for k, v in market.prices(option.pool).items()}
        return total_usd(option.uses, prices) / tokens * TOKENS_PER_MTOK
    changed = _changed(market.scenario, option.pool, parameter, by)
    if changed is None:
        return None
    other = Market(changed)
    moved = evaluate(other, option.workload, option.pool)
    return None if moved.refused else other.cost_usd(moved) / tokens * TOKENS_PER_MTOK


def _changed(scenario: Scenario, name: str, parameter: str, by: float) -> Scenario | None:
    pool = scenario.pools[name]
    if parameter == "PUE":
        if not pool.site:
            return None
        site = scenario.sites[pool.site]
        moved = site.model_copy(update={"pue": max(1.0, site.pue * by)})
        return scenario.model_copy(update={"sites": {**scenario.sites, pool.site: moved}})
    price = pool.price
    if not isinstance(price, Bought):
        return None
    update = {
        "life": {"life_years": price.life_years * by},
        "WACC": {"wacc_fraction": price.wacc_fraction * by},
        "capital price": {
            "usd_per_gpu": usd_per_gpu(pool, price, scenario.horizon.start)[0] * by,
            "cooling_usd_per_kw": price.cooling_usd_per_kw * by,
        },
    }[parameter]
    changed = pool.model_copy(update={"price": price.model_copy(update=update)})
    return scenario.model_copy(update={"pools": {**scenario.pools, name: changed}})


def _pue(market: Market, option: Option) -> float:
    site = market.scenario.pools[option.pool].site
    return market.scenario.sites[site].pue if site else math.inf


def _horizon_tokens(market: Market, option: Option) -> float:
    workload = market.scenario.workloads[option.workload]
    return tokens_per_month(market.scenario, workload) * len(market.hours) / HOURS_PER_MONTH


def life_costs_usd_per_gpu_hour(market: Market, pool_name: str) -> dict[int, float]:
    """Capital per GPU hour if the hardware lasts 3, 4, 5 or 6 years, all else as written; empty where rented."""
    pool = market.scenario.pools[pool_name]
    if not isinstance(pool.price, Bought):
        return {}
    found = {}
    for years in (3, 4, 5, 6):
        price = pool.price.model_copy(update={"life_years": float(years)})
        changed = pool.model_copy(update={"price": price})
        other = Market(
            market.scenario.model_copy(update={"pools": {**market.scenario.pools, pool_name: changed}})
        )
        found[years] = float(other.prices(pool_name)[pool_name, "gpu_hours", "capital"][0])
    return found
