"""What must be said beside the figures of `compare`: break-even, assumptions, what was left out or not used."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pertoken.plan._bursts import is_simulated
from pertoken.plan._pricing import pays_for_energy
from pertoken.plan.options import Market
from pertoken.scenario import Batch, Scenario, Serving, Tokens, Training
from pertoken.units import GIGA, HOURS_PER_MONTH, TERA, TOKENS_PER_MTOK

if TYPE_CHECKING:
    from pertoken.report.compare import OptionResult, WorkloadResult


DEAREST_USD_PER_KWH, CLEANEST_G_PER_KWH = 2.0, 4.0
"""No tariff of the catalogue and no grid lies beyond."""
SLOWEST_TTFT_S, SLOWEST_TPOT_S = 300.0, 10.0
"""Nobody waits longer."""


def tokens(count: float) -> str:
    """A token count in words' length.

    >>> tokens(3.2e9), tokens(4.56e8), tokens(9.96e10)
    ('3.2 B', '456 M', '99.6 B')
    """
    for unit, size in (("T", TERA), ("B", GIGA), ("M", TOKENS_PER_MTOK)):
        if count >= size:
            value = count / size
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count:,.0f}"


def break_even_lines(options: list[OptionResult]) -> list[str]:
    """From which volume on an option costs no more than each API, and when a purchase pays back."""
    apis = {str(o.facts["pool"]) for o in options if o.facts["term"] == "api"}
    lines = []
    for option in options:
        pool = option.facts["pool"]
        if option.facts["term"] != "api":
            parts = [
                f"{p.other} {_ranges(p.ranges, p.up_to_tokens_per_month)}"
                for p in option.break_even
                if p.other in apis
            ]
            if parts:
                lines.append(f"{pool} costs no more than {'; '.join(parts)}")
        if option.payback_months is not None:
            lines.append(f"buying {pool} pays back against {option.payback_against}: {_payback(option)}")
    return lines


def _ranges(ranges: tuple[tuple[float, float], ...], up_to: float) -> str:
    if not ranges:
        return f"at no volume up to {tokens(up_to)} tokens a month"
    said = []
    for low, high in ranges:
        open_ended = math.isclose(high, up_to, rel_tol=1e-9)
        said.append(f"from {tokens(low)}" if open_ended else f"from {tokens(low)} to {tokens(high)}")
    return f"{' and '.join(said)} tokens a month"


def _payback(option: OptionResult) -> str:
    months = option.payback_months or math.inf
    if not math.isfinite(months):
        return "never"
    life = option.life_months
    late = f", not within its life of {life:,.0f}" if life is not None and months > life else ""
    return f"{months:,.0f} months, cost of capital included{late}"


def notes(market: Market, result: WorkloadResult) -> list[str]:
    """Lines about assumptions and gaps, most of them only where they matter."""
    scenario = market.scenario
    running = [o for o in result.options if not o.refused]
    workload = scenario.workloads[result.name]
    found = [
        f"USD per month is the horizon's cost × {HOURS_PER_MONTH:.0f} h ÷ {len(market.hours)} h; each option alone "
        "bears its whole pool and its site's overheads, so tables must not be added up"
    ]
    found += _left_out(running) + _machines(scenario, running) + _unlikely(scenario, workload)
    if isinstance(workload, Training):
        if workload.restarts is None:
            found.append("left out, because nobody wrote it: work lost to restarts")
        found.append("J/token includes idle")
    else:
        found += _serving_notes(scenario, workload, running)
    found += _tariffs(market, running)
    found += _not_used(scenario, result.name)
    bases = sorted({str(o.facts["basis"]) for o in running if "basis" in o.facts})
    if bases:
        found.append(
            f"throughput is {' and '.join(bases)}; 80 %: the cost at the ends of its 80 % interval, one number where "
            f"they print alike{_full(running)}; energy is at the utility meter"
        )
    return found


def _full(running: list[OptionResult]) -> str:
    """What ``full`` means, where it is printed."""
    ends = ((o.low, o.high) for o in running)
    some = any((low is None) != (high is None) for low, high in ends)
    return ", full where the pool could not carry the tokens" if some else ""


def _machines(scenario: Scenario, running: list[OptionResult]) -> list[str]:
    """Pools rented by the catalogue's machine where fewer GPUs would do."""
    found = []
    for o in running:
        pool = scenario.pools[str(o.facts["pool"])]
        whole = pool.price.term in ("on_demand", "spot", "reserved") and pool.gpus_per_machine is None
        degrees = (v for k, v in o.facts.get("layout", {}).items() if k != "ep")
        needed = o.facts.get("replicas", 0) * math.prod(degrees)
        if whole and 0 < needed < o.facts["paid_gpus"]:
            found.append(
                f"{o.facts['pool']} is rented by machines of {pool.machine_gpus} GPUs, {needed} would do: write "
                "gpus_per_machine where fewer can be had"
            )
    return found


def _unlikely(scenario: Scenario, workload: Serving | Training) -> list[str]:
    """Numbers that look like another unit's."""
    found = []
    for name, site in scenario.sites.items():
        price = getattr(site.tariff, "usd_per_kwh", 0.0)
        if price > DEAREST_USD_PER_KWH:
            found.append(f"sites.{name}.tariff.usd_per_kwh is {price:g} USD per kWh: cents?")
        if 0 < (site.carbon_g_per_kwh or 0.0) < CLEANEST_G_PER_KWH:
            found.append(f"sites.{name}.carbon_g_per_kwh is {site.carbon_g_per_kwh:g} g per kWh: kg?")
    slo = getattr(workload, "slo", None)
    for field, most in (("ttft_s", SLOWEST_TTFT_S), ("tpot_s", SLOWEST_TPOT_S)):
        if slo is not None and getattr(slo, field) > most:
            found.append(f"slo.{field} is {getattr(slo, field):g} seconds: milliseconds?")
    return found


def _serving_notes(scenario: Scenario, workload: Serving, running: list[OptionResult]) -> list[str]:
    from pertoken.report._compare_table import usd

    found = [
        "busy: share of paid GPU hours that compute; load: of the held replicas' capacity; TTFT, TPOT: of a full "
        "replica; J/out leaves out idle"
    ]
    vendor = [
        f"{o.facts['pool']} {usd(o.vendor_usd_per_mtok_output)}"
        for o in running
        if o.vendor_usd_per_mtok_output is not None
    ]
    if vendor:
        found.append(
            f"at 100 % use, GPU price alone, per M output tokens (the vendor's figure): {', '.join(vendor)}"
        )
    terms = {str(o.facts["term"]) for o in running}
    if terms & {"on_demand", "spot"}:
        found.append("rented pools hold the busiest hour's machines around the clock")
    if "api" in terms and workload.slo is not None:
        found.append("how fast an API answers is not known here: it is not held against the SLO")
    if is_simulated(workload):
        found.append(
            "replicas are those a simulation of the busiest day needs for the SLO's percentile or the trace"
        )
    elif any(isinstance(v, Tokens) and v.cv for v in (workload.input_tokens, workload.output_tokens)):
        found.append(
            "the spread (cv) of token counts is used only where an SLO percentile above 50 or a trace asks for a "
            "simulation"
        )
    return found


def _left_out(running: list[OptionResult]) -> list[str]:
    pools: dict[str, list[str]] = {}
    for o in running:
        if o.facts["left_out"]:
            pools.setdefault(", ".join(o.facts["left_out"]), []).append(str(o.facts["pool"]))
    return [
        f"left out, because nobody wrote it: {lines} ({', '.join(names)})" for lines, names in pools.items()
    ]


def _tariffs(market: Market, running: list[OptionResult]) -> list[str]:
    found = []
    seen: set[str] = set()
    for option in sorted(running, key=lambda o: -float(o.facts.get("peak_kw", 0.0))):
        pool = market.scenario.pools[str(option.facts["pool"])]
        if not pool.site or pool.site in seen or not pays_for_energy(pool):
            continue
        seen.add(pool.site)
        if option.facts.get("tariff_misfit"):
            found.append(f"{option.facts['tariff_misfit']}, unless other load makes up for it")
        tariff = market.tariff(pool.site)
        if tariff is not None:
            met = {tariff.tariff.energy[i].name for i in set(tariff.band.tolist())}
            missed = [band.name for band in tariff.tariff.energy if band.name not in met]
            if missed:
                found.append(
                    f"the horizon never meets these prices of tariff {tariff.tariff.name}: {', '.join(missed)}"
                )
    return found


def _not_used(scenario: Scenario, name: str) -> list[str]:
    """Settings somebody wrote that this verb does not look at."""
    workload = scenario.workloads[name]
    fields = []
    for pool_name, pool in scenario.pools.items():
        fields += [
            f"pools.{pool_name}.{f}"
            for f in ("startup_minutes", "startup_usd", "minimum_run_hours")
            if f in pool.model_fields_set
        ]
    fields += [f"sites.{s}.peak_so_far_kw" for s, site in scenario.sites.items() if site.peak_so_far_kw]
    if "max_spot_fraction" in workload.model_fields_set:
        fields.append(f"workloads.{name}.max_spot_fraction")
    if isinstance(workload, Batch):
        fields.append(f"workloads.{name}.deadline_hours")
    return [f"not used here, `pertoken plan` does: {', '.join(fields)}"] if fields else []
