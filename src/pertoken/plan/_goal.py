"""What a plan is after, and what one unit of each variable uses: the link between columns and meters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pertoken.plan._builder import INF
from pertoken.plan._instance import Fixed, Floats, Instance, Ints
from pertoken.units import TOKEN_METERS

Objective = Literal["cost", "tokens", "carbon"]

AMPLE = 1000.0
"""Multiple of the demand a plan is taken to serve at most where it may scale the demand."""


@dataclass(frozen=True)
class Goal:
    """What is minimised or maximised, and within what.

    scale multiplies all demand (1.5: 50 % more tokens); `switches` gives every machine and unit its starts,
    so that they can be counted.
    """

    objective: Objective = "cost"
    budget_usd: float = INF
    budget_tokens: float = INF
    budget_kgco2e: float = INF
    scale: float = 1.0
    switches: bool = False


@dataclass(frozen=True)
class Coefficients:
    """What one unit of each variable uses in each hour: the link between columns and meters."""

    energy_machines: Floats
    """kWh at the utility meter per machine on, shape (P, T), net of what it would draw when held and off."""
    energy_off: Floats
    energy_starts: Floats
    energy_flows: Floats
    """Shape (F, T)."""
    tokens_flows: Floats
    """Useful tokens per unit of load and hour, shape (F,)."""


def coefficients(instance: Instance) -> Coefficients:
    """Energy and tokens per unit of each variable."""
    useful, per_request = instance.useful(), instance.tokens_per_request()
    serving = instance.flow_class >= 0
    tokens = np.where(serving, useful * at(per_request, instance.flow_class), useful)
    return Coefficients(
        energy_machines=(instance.machine_kw - instance.off_kw)[:, None] * instance.pue,
        energy_off=instance.off_kw[:, None] * instance.pue,
        energy_starts=instance.start_kwh[:, None] * instance.pue,
        energy_flows=instance.line_kw() * instance.pue[instance.flow_pool],
        tokens_flows=tokens,
    )


def at(values: Floats, index: Ints) -> Floats:
    """values[index], 0 where the index is −1."""
    if not len(values):
        return np.zeros(len(index))
    return np.where(index >= 0, values[np.maximum(index, 0)], 0.0)


def class_meters(instance: Instance) -> dict[str, Floats]:
    """Quantity of each meter per request, shape (D,)."""
    return {
        "input_tokens": instance.input_tokens,
        "cached_input_tokens": instance.cached_input_tokens,
        "output_tokens": instance.output_tokens,
        "requests": np.ones(len(instance.class_names)),
        "egress_gb": instance.egress_gb,
    }


def stepped(meter: str, qualifier: str) -> str:
    """The meter tokens are paid on at a price step.

    >>> stepped("input_tokens", "above200000"), stepped("requests", "above200000"), stepped("input_tokens", "")
    ('input_tokens:above200000', 'requests', 'input_tokens')
    """
    return f"{meter}:{qualifier}" if qualifier and meter in TOKEN_METERS else meter


def flow_price(instance: Instance) -> Floats:
    """USD per unit of load and hour for all meters that count work (tokens, requests, egress), shape (F,
    T)."""
    useful = instance.useful()
    total = np.zeros((len(instance.flow_unit), len(instance.hours)))
    priced = {rate.meter for rate in instance.rates}
    step = np.array(instance.flow_step or ("",) * len(useful))
    for meter, per_request in class_meters(instance).items():
        for qualifier in np.unique(step):
            name, mine = stepped(meter, str(qualifier)), np.flatnonzero(step == qualifier)
            if name in priced:
                by_pool = instance.prices(instance.pool_names, name)
                each = useful[mine] * at(per_request, instance.flow_class[mine])
                total[mine] += each[:, None] * by_pool[instance.flow_pool[mine]]
    jobs = instance.flow_job >= 0
    for meter, per_hour in (
        ("training_tokens", useful),
        ("lost_training_tokens", instance.flow_per_hour - useful),
    ):
        if meter in priced:
            by_pool = instance.prices(instance.pool_names, meter)
            total += (np.where(jobs, per_hour, 0.0))[:, None] * by_pool[instance.flow_pool]
    return total


def class_scale(i: Instance) -> Floats:
    """Mean requests per hour of each class, 1 where there are none: the unit of its rows, so that all are
    near 1."""
    mean = i.requests.mean(axis=1) if i.requests.size else np.ones(len(i.class_names))
    return np.where(mean > 0, mean, 1.0)


def places(i: Instance) -> list[Fixed]:
    """What is paid only where one of its pools is used."""
    return [f for f in i.fixed if f.only_with is not None]
