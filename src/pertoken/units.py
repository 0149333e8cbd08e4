"""Meters, phases, categories, components and metrics as data, and the only place for unit constants.

A *meter* is a kind of quantity. Some carry a qualifier after a colon, so that a new tier or demand band is
a row and never a column: ``energy_kwh:tier2``, ``peak_kw:summer-peak``.

>>> base_meter("peak_kw:summer-peak")
'peak_kw'
>>> usd_per_mtok(2.65, 6000 * SECONDS_PER_HOUR)   # NVIDIA's cost-per-token equation, April 2026
0.12268518518518519
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SECONDS_PER_HOUR = 3600
MINUTES_PER_HOUR = 60
MICROSECONDS_PER_SECOND = 1_000_000
HOURS_PER_DAY = 24
DAYS_PER_WEEK = 7
DAYS_PER_YEAR = 365
HOURS_PER_YEAR = 8760
MONTHS_PER_YEAR = 12
HOURS_PER_MONTH = HOURS_PER_YEAR / MONTHS_PER_YEAR  # 730, an average month
WATTS_PER_KILOWATT = 1000
MILLISECONDS_PER_SECOND = 1000
GRAMS_PER_KILOGRAM = 1000
JOULES_PER_KWH = 3_600_000
TOKENS_PER_MTOK = 1_000_000
BYTES_PER_GB = 1_000_000_000
GIGA = 1_000_000_000
TERA = 1_000_000_000_000

Basis = Literal["measured", "fitted", "roofline", "quoted", "assumed"]
BASES: tuple[Basis, ...] = ("measured", "fitted", "roofline", "quoted", "assumed")

IDLE = "(idle)"
"""Tenant of what nobody used."""


def site_pool(site: str) -> str:
    """The pool of what no pool owns: a site's demand charge, its cooling, its fixed charge.

    >>> site_pool("sacramento")
    '(site:sacramento)'
    """
    return f"(site:{site})"


@dataclass(frozen=True)
class Meter:
    """One kind of quantity.

    `priced` meters are resources: usage of one must meet a rate, even if that rate is zero.
    Meters that are not priced are counts; a rate may still price them (API tokens).
    """

    name: str
    unit: str
    priced: bool
    about: str


METERS: dict[str, Meter] = {
    m.name: m
    for m in (
        Meter("input_tokens", "token", False, "prompt tokens computed by the engine (cache misses)"),
        Meter("cached_input_tokens", "token", False, "prompt tokens served from a prefix cache"),
        Meter("output_tokens", "token", False, "tokens generated, reasoning tokens included"),
        Meter("output_tokens_in_slo", "token", False, "tokens of requests that met the SLO"),
        Meter("training_tokens", "token", False, "tokens of training steps that were retained"),
        Meter("lost_training_tokens", "token", False, "tokens of training steps lost to a restart"),
        Meter("recomputed_tokens", "token", False, "tokens computed again after a preemption"),
        Meter("requests", "request", False, "requests that finished"),
        Meter("requests_in_slo", "request", False, "requests that met the SLO"),
        Meter("gpu_hours", "GPU·h", True, "hours a GPU was held, used or not"),
        Meter("energy_kwh", "kWh", True, "energy at the utility meter: GPU + host + idle, × PUE"),
        Meter("it_energy_kwh", "kWh", False, "energy at the server's plug, before PUE"),
        Meter("gpu_energy_kwh", "kWh", False, "energy at the GPU board, as NVML or DCGM reports it"),
        Meter("peak_kw", "kW", True, "highest demand at the utility meter in the billing period"),
        Meter("site_hours", "h", True, "hours a site or a service was paid for: fixed charges, staff"),
        Meter("egress_gb", "GB", True, "data sent out of the site or cloud"),
        Meter("storage_gb_hours", "GB·h", True, "storage held"),
        Meter(
            "starts",
            "start",
            False,
            "machines switched on or rented anew; priced where a start costs something",
        ),
        Meter("gco2e", "g", False, "greenhouse gas of the energy, at the grid's intensity"),
    )
}

TOKEN_METERS = ("input_tokens", "cached_input_tokens", "output_tokens", "training_tokens")
SERVED_TOKEN_METERS = ("input_tokens", "cached_input_tokens", "output_tokens")

PHASES: dict[str, str] = {
    "input": "prefill: computing prompts",
    "output": "decode: generating tokens",
    "training": "training steps that were retained",
    "idle": "held and paid for, used by nobody",
    "waste": "rejected drafts, preemptions, retries, training steps lost to a restart",
}

CATEGORIES: dict[str, str] = {
    "compute": "the GPUs and their servers, however they are paid for",
    "energy": "electricity, cooling included",
    "infrastructure": "all else that must be there",
}

COMPONENTS: dict[str, str] = {
    "capital": "compute",
    "rent": "compute",
    "commitment": "compute",
    "api": "compute",
    "energy_charge": "energy",
    "demand_charge": "energy",
    "hosting": "infrastructure",
    "network": "infrastructure",
    "storage": "infrastructure",
    "staff": "infrastructure",
    "software": "infrastructure",
    "egress": "infrastructure",
}
"""Component to the category it belongs to."""


@dataclass(frozen=True)
class Metric:
    """A named ratio of sums.

    value = scale × Σ numerator / Σ denominator. `numerator` and `denominator` are terms: a meter name, a
    phase-restricted meter ``meter@phase``, ``cost`` (all cost), ``cost@phase``, or several joined by ``+``.
    `share_of` names terms of cost; where given, the numerator is multiplied by Σ cost / Σ share_of, which
    spreads idle and waste over the phases that used the hardware, in proportion to what they cost.
    """

    name: str
    unit: str
    numerator: str
    denominator: str
    scale: float
    about: str
    share_of: str = ""


_SERVED = "input_tokens+cached_input_tokens+output_tokens"
_BUSY = "cost@input+cost@output+cost@training"

METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric(
            "usd_per_mtok_output",
            "USD per M output tokens",
            "cost@output",
            "output_tokens",
            TOKENS_PER_MTOK,
            "cost of decode over tokens generated; idle not included",
        ),
        Metric(
            "usd_per_mtok_input",
            "USD per M input tokens",
            "cost@input",
            "input_tokens+cached_input_tokens",
            TOKENS_PER_MTOK,
            "cost of prefill over prompt tokens delivered (cached ones too); idle not included",
        ),
        Metric(
            "usd_per_mtok_input_computed",
            "USD per M computed input tokens",
            "cost@input",
            "input_tokens",
            TOKENS_PER_MTOK,
            "cost of prefill over prompt tokens computed (cache misses); idle not included",
        ),
        Metric(
            "usd_per_mtok_total",
            "USD per M input + output tokens",
            "cost",
            _SERVED,
            TOKENS_PER_MTOK,
            "all cost, idle and waste included, over all tokens delivered",
        ),
        Metric(
            "usd_per_mtok_output_with_idle",
            "USD per M output tokens, idle included",
            "cost@output",
            "output_tokens",
            TOKENS_PER_MTOK,
            "cost of decode with its share of idle and waste; compare this one with an API price",
            share_of=_BUSY,
        ),
        Metric(
            "usd_per_mtok_input_with_idle",
            "USD per M input tokens, idle included",
            "cost@input",
            "input_tokens+cached_input_tokens",
            TOKENS_PER_MTOK,
            "cost of prefill with its share of idle and waste; compare this one with an API price",
            share_of=_BUSY,
        ),
        Metric(
            "usd_per_mtok_in_slo",
            "USD per M output tokens in SLO",
            "cost",
            "output_tokens_in_slo",
            TOKENS_PER_MTOK,
            "all cost over tokens of requests that met the SLO",
        ),
        Metric(
            "usd_per_mtok_trained",
            "USD per M retained training tokens",
            "cost",
            "training_tokens",
            TOKENS_PER_MTOK,
            "all cost, lost steps and idle included, over training tokens that were retained",
        ),
        Metric(
            "joule_per_token_output",
            "J per output token at the utility meter",
            "energy_kwh@output",
            "output_tokens",
            JOULES_PER_KWH,
            "energy of decode at the utility meter over tokens generated; idle not included",
        ),
        Metric(
            "joule_per_token_input",
            "J per input token at the utility meter",
            "energy_kwh@input",
            "input_tokens+cached_input_tokens",
            JOULES_PER_KWH,
            "energy of prefill at the utility meter over prompt tokens delivered; idle not included",
        ),
        Metric(
            "joule_per_token_total",
            "J per input + output token at the utility meter",
            "energy_kwh",
            _SERVED,
            JOULES_PER_KWH,
            "all energy at the utility meter, idle included, over all tokens delivered",
        ),
        Metric(
            "joule_per_token_trained",
            "J per retained training token at the utility meter",
            "energy_kwh",
            "training_tokens",
            JOULES_PER_KWH,
            "all energy at the utility meter over training tokens that were retained",
        ),
        Metric(
            "kwh_per_mtok_total",
            "kWh per M input + output tokens at the utility meter",
            "energy_kwh",
            _SERVED,
            TOKENS_PER_MTOK,
            "all energy at the utility meter, idle included, over all tokens delivered",
        ),
        Metric(
            "kwh_per_mtok_trained",
            "kWh per M retained training tokens at the utility meter",
            "energy_kwh",
            "training_tokens",
            TOKENS_PER_MTOK,
            "all energy at the utility meter over training tokens that were retained",
        ),
        Metric(
            "gco2e_per_mtok_total",
            "gCO2e per M input + output tokens",
            "gco2e",
            _SERVED,
            TOKENS_PER_MTOK,
            "greenhouse gas at the grid's intensity over all tokens delivered",
        ),
        Metric(
            "utilisation",
            "fraction of GPU hours not idle",
            "gpu_hours@input+gpu_hours@output+gpu_hours@training+gpu_hours@waste",
            "gpu_hours",
            1.0,
            "GPU hours used over GPU hours held",
        ),
        Metric(
            "slo_attainment",
            "fraction of requests in SLO",
            "requests_in_slo",
            "requests",
            1.0,
            "requests that met the SLO over requests that finished",
        ),
    )
}


def base_meter(meter: str) -> str:
    """The meter without its qualifier (tier or demand band)."""
    return meter.partition(":")[0]


def usd_per_mtok(cost_usd: float, tokens: float) -> float:
    """USD per million tokens from a cost [USD] and the tokens it bought.

    Raises ZeroDivisionError where there are no tokens: a cost without tokens has no cost per token.

    >>> usd_per_mtok(5.0, 2_000_000)
    2.5
    """
    return cost_usd / tokens * TOKENS_PER_MTOK
