"""A serving workload on one pool: the operating point, whole machines from the busiest hour, usage by hour."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pertoken import catalog
from pertoken.catalog import Gpu, Model
from pertoken.errors import CannotServeError
from pertoken.perf import Point, Prediction, predict, search
from pertoken.perf.measured import load_points, predict_measured
from pertoken.perf.search import Candidate
from pertoken.plan._pricing import api_meter
from pertoken.plan._usage import Quantities, Use
from pertoken.rates.capital import spot_lost_fraction
from pertoken.rates.energy import utility_kwh
from pertoken.scenario import ModelFile, Pool, Scenario, Serving, Spot, Tokens
from pertoken.tables import Floats
from pertoken.units import (
    BYTES_PER_GB,
    IDLE,
    MINUTES_PER_HOUR,
    SECONDS_PER_HOUR,
    SERVED_TOKEN_METERS,
    WATTS_PER_KILOWATT,
)

_GRID = np.unique(np.round(np.geomspace(1, 4096, 49)))


@dataclass(frozen=True)
class Operation:
    """How one replica of a model runs on a pool within the SLO, and what that gives.

    `requests_per_s` of one replica at its operating point; `load`, `in_flight`, `gpu_power_w` and `prefill_fraction`
    are a curve over the share of that capacity in use (0 to 1): mean requests held, board power, prefill's share of
    busy time.
    """

    candidate: Candidate
    engine: str
    requests_per_s: float
    requests_per_s_low: float
    requests_per_s_high: float
    tokens_per_s_low: float
    tokens_per_s: float
    tokens_per_s_high: float
    ttft_s: float
    tpot_s: float
    ttft_high_s: float
    tpot_high_s: float
    load: Floats
    in_flight: Floats
    gpu_power_w: Floats
    prefill_fraction: Floats
    basis: str
    source: str


@dataclass(frozen=True)
class Machines:
    """What is held for a serving workload: replicas and whole machines; `paid_gpus` counts all GPUs paid for."""

    replicas: int
    machines: int
    gpus: int
    paid_gpus: int
    lost_fraction: float
    requests_in_slo_fraction: float | None = None
    """Of a simulated workload; None where averages answered."""
    output_tokens_in_slo_fraction: float | None = None


def resolve_model(spec: str | ModelFile) -> Model:
    """The catalogue's model, or the one a config.json describes."""
    return catalog.model_from_config(spec.config) if isinstance(spec, ModelFile) else catalog.model(spec)


def mean_tokens(value: float | Tokens) -> float:
    """Mean tokens per request."""
    return value.mean if isinstance(value, Tokens) else value


def operations(workload: Serving, pool: Pool) -> tuple[Operation, ...]:
    """The best operating point for each replica size that fits a machine of the pool, smallest first.

    Raises CannotServeError where none holds the model, or none meets the SLO.
    """
    slo = workload.slo
    found: list[Operation] = []
    refused: CannotServeError | None = None
    size = 1
    while size <= pool.machine_gpus:
        try:
            found.append(
                _operation(
                    workload.model,
                    pool.gpu,
                    _point(workload, pool),
                    slo.ttft_s if slo else math.inf,
                    slo.tpot_s if slo else math.inf,
                    size,
                    tuple(workload.precisions),
                    str(pool.points or ""),
                )
            )
        except CannotServeError as error:
            refused = error
        size *= 2
    if not found:
        assert refused is not None
        raise refused
    return tuple(found)


def _point(workload: Serving, pool: Pool) -> Point:
    prompt = mean_tokens(workload.input_tokens)
    return Point(
        input_tokens=prompt,
        output_tokens=mean_tokens(workload.output_tokens),
        concurrency=1,
        cached_input_tokens=prompt * workload.cached_fraction,
        engine=pool.engine,
        accepted_per_step=workload.accepted_per_step,
        draft_fraction=workload.draft_fraction,
    )


@lru_cache(maxsize=4096)
def _operation(
    model_spec: str | ModelFile,
    gpu_name: str,
    point: Point,
    slo_ttft_s: float,
    slo_tpot_s: float,
    max_gpus: int,
    precisions: tuple[str, ...],
    points_csv: str,
) -> Operation:
    model, gpu = resolve_model(model_spec), catalog.gpu(gpu_name)
    precisions = precisions or tuple(dict.fromkeys((model.native_precision, "bf16")))
    found = search(
        model,
        gpu,
        point,
        slo_ttft_s=slo_ttft_s,
        slo_tpot_s=slo_tpot_s,
        max_gpus=max_gpus,
        precisions=precisions,
        engine=point.engine,
        count=1,
    )
    best = found.best[0]
    grid = np.append(_GRID[best.concurrency > _GRID], best.concurrency)
    at = replace(point, concurrency=grid, precision=best.precision, layout=best.layout)
    answer = _predicted(model, gpu, at, points_csv)
    rate = np.maximum.accumulate(answer.tokens_per_s.value)
    prefill = np.broadcast_to(answer.prefill_fraction, grid.shape)
    requests = float(rate[-1]) / float(point.output_tokens)
    ends = (float(answer.tokens_per_s.low[-1]), float(answer.tokens_per_s.high[-1]))
    return Operation(
        candidate=best,
        engine=point.engine,
        requests_per_s=requests,
        requests_per_s_low=ends[0] / float(point.output_tokens),
        requests_per_s_high=ends[1] / float(point.output_tokens),
        tokens_per_s_low=ends[0],
        tokens_per_s=float(rate[-1]),
        tokens_per_s_high=ends[1],
        ttft_s=float(answer.ttft_s.value[-1]),
        tpot_s=float(answer.tpot_s.value[-1]),
        ttft_high_s=float(answer.ttft_s.high[-1]),
        tpot_high_s=float(answer.tpot_s.high[-1]),
        load=np.concatenate([[0.0], rate / rate[-1]]),
        in_flight=np.concatenate([[0.0], grid]),
        gpu_power_w=np.concatenate([[gpu.idle_w], answer.gpu_power_w.value]),
        prefill_fraction=np.concatenate([prefill[:1], prefill]),
        basis=answer.basis,
        source=answer.source,
    )


def _predicted(model: Model, gpu: Gpu, point: Point, points_csv: str) -> Prediction:
    if points_csv:
        measured = predict_measured(load_points(Path(points_csv)), model, gpu, point, predict)
        if measured is not None:
            return measured
    return predict(model, gpu, point)


def throughput_of(operation: Operation, case: str) -> float:
    """Requests per second of one replica: ``expected``, or the ``low`` or ``high`` end of the 80 % interval."""
    return {
        "expected": operation.requests_per_s,
        "low": operation.requests_per_s_low,
        "high": operation.requests_per_s_high,
    }[case]


def replicas_for(
    operation: Operation,
    pool: Pool,
    workload: Serving,
    peak_requests_per_hour: float,
    case: str,
    factor: float,
) -> int:
    """Replicas that carry the busiest hour with the workload's headroom; `factor` scales throughput."""
    capacity = throughput_of(operation, case) * factor * SECONDS_PER_HOUR * (1 - spot_loss(pool))
    usable = capacity * (1 - workload.headroom_fraction)
    return max(workload.minimum_replicas, math.ceil(peak_requests_per_hour / usable - 1e-9))


def machines_for(operation: Operation, pool: Pool, replicas: int) -> Machines:
    """Whole machines for so many replicas. Raises CannotServeError where the pool has too few GPUs."""
    size = operation.candidate.layout.gpus
    machines = math.ceil(replicas / (pool.machine_gpus // size))
    gpus = machines * pool.machine_gpus
    if isinstance(pool.count, int) and gpus > pool.count:
        raise CannotServeError(
            f"the busiest hour needs {replicas} replicas on {gpus} GPUs, the pool has {pool.count}"
        )
    paid = pool.count if isinstance(pool.count, int) and committed(pool) else gpus
    return Machines(replicas, machines, gpus, paid, spot_loss(pool))


def spot_loss(pool: Pool, lost_minutes: float = 0.0) -> float:
    """Share of paid hours that interruptions of a spot pool waste; 0 under other terms."""
    if not isinstance(pool.price, Spot):
        return 0.0
    return spot_lost_fraction(
        pool.price.interruptions_per_hour,
        lost_work_hours=(pool.price.lost_minutes + lost_minutes) / MINUTES_PER_HOUR,
        reload_hours=pool.price.reload_minutes / MINUTES_PER_HOUR,
    )


def gpu_serving(
    scenario: Scenario,
    name: str,
    workload: Serving,
    pool_name: str,
    operation: Operation,
    held: Machines,
    *,
    requests: Floats,
    case: str = "expected",
    factor: float = 1.0,
) -> list[Use]:
    """Usage of a GPU pool that serves `requests` [per hour, shape (T,)].

    At a share x of its capacity a replica holds C(x) requests on average (the load curve read backwards), so it is
    idle for a share e^−C of the time, as a queue with room for all is; else it prefills and decodes in the measure
    the predictor gives at C. That is what an engine's counters and DCGM will show; how much of the *capacity* is
    used is another figure (`facts`). Power follows the load curve; idle energy is what idle GPU hours draw with a
    model loaded and no work. What is paid for stays switched on.
    """
    pool = scenario.pools[pool_name]
    site = scenario.sites[pool.site]
    gpu = catalog.gpu(pool.gpu)
    busy_gpus = held.replicas * operation.candidate.layout.gpus
    load = load_fraction(operation, held, requests, case, factor)
    in_flight = np.interp(load, operation.load, operation.in_flight)
    busy = busy_gpus * -np.expm1(-in_flight)
    waste = busy * held.lost_fraction
    work = busy - waste
    idle = held.paid_gpus - busy
    gpu_w = np.interp(load, operation.load, operation.gpu_power_w)
    gpu_kwh = (busy_gpus * gpu_w + (held.paid_gpus - busy_gpus) * gpu.idle_w) / WATTS_PER_KILOWATT
    host_w = gpu.host_idle_w + (gpu.host_busy_w - gpu.host_idle_w) * load
    host_kwh = (busy_gpus * host_w + (held.paid_gpus - busy_gpus) * gpu.host_idle_w) / WATTS_PER_KILOWATT
    idle_parts = (idle * gpu.idle_w / WATTS_PER_KILOWATT, idle * gpu.host_idle_w / WATTS_PER_KILOWATT)
    prefill = np.interp(load, operation.load, operation.prefill_fraction)
    used = work + waste
    parts = {
        "input": work * prefill,
        "output": work * (1 - prefill),
        "waste": waste,
    }
    quantities: Quantities = {}
    for phase, gpu_hours in parts.items():
        of_used = np.divide(gpu_hours, used, out=np.zeros_like(used), where=used > 0)
        quantities |= energy(
            phase,
            of_used * (gpu_kwh - idle_parts[0]),
            of_used * (gpu_kwh + host_kwh - sum(idle_parts)),
            site.pue,
            site.carbon_g_per_kwh,
        )
        quantities[phase, "gpu_hours"] = gpu_hours
    quantities |= token_quantities(workload, requests)
    if held.requests_in_slo_fraction is not None and held.output_tokens_in_slo_fraction is not None:
        tokens = quantities["output", "output_tokens"]
        quantities["output", "requests_in_slo"] = requests * held.requests_in_slo_fraction
        quantities["output", "output_tokens_in_slo"] = tokens * held.output_tokens_in_slo_fraction
    tenant = workload.tenant or name
    model = resolve_model(workload.model).name
    rest: Quantities = {("idle", "gpu_hours"): idle}
    rest |= energy("idle", idle_parts[0], sum(idle_parts), site.pue, site.carbon_g_per_kwh)
    return [
        Use(pool_name, model, tenant, operation.basis, quantities),
        Use(pool_name, model, IDLE, operation.basis, rest),
    ]


def load_fraction(
    operation: Operation, held: Machines, requests: Floats, case: str = "expected", factor: float = 1.0
) -> Floats:
    """Share of the replicas' capacity at the operating point that `requests` [per hour] and lost work take, 0 to 1."""
    capacity = throughput_of(operation, case) * factor * SECONDS_PER_HOUR * (1 - held.lost_fraction)
    found: Floats = np.minimum(requests / (capacity * held.replicas), 1.0)
    return found


def energy(phase: str, gpu_kwh: Any, it_kwh: Any, pue: float, carbon_g_per_kwh: float | None) -> Quantities:
    """Energy quantities of a phase at the three boundaries: GPU board, server plug, utility meter; and its carbon."""
    kwh = np.asarray(utility_kwh(np.maximum(it_kwh, 0.0), pue=pue))
    found: Quantities = {
        (phase, "gpu_energy_kwh"): np.maximum(gpu_kwh, 0.0),
        (phase, "it_energy_kwh"): np.maximum(it_kwh, 0.0),
        (phase, "energy_kwh"): kwh,
    }
    if carbon_g_per_kwh is not None:
        found[phase, "gco2e"] = kwh * carbon_g_per_kwh
    return found


def token_quantities(workload: Serving, requests: Floats) -> Quantities:
    """Tokens and requests delivered per hour, and text sent out."""
    prompt = mean_tokens(workload.input_tokens) * requests
    output = mean_tokens(workload.output_tokens) * requests
    return {
        ("input", "input_tokens"): prompt * (1 - workload.cached_fraction),
        ("input", "cached_input_tokens"): prompt * workload.cached_fraction,
        ("output", "output_tokens"): output,
        ("output", "requests"): requests,
        ("output", "egress_gb"): output * workload.bytes_per_token / BYTES_PER_GB,
    }


def api_serving(name: str, workload: Serving, pool_name: str, requests: Floats, step: int) -> list[Use]:
    """Usage of an API that answers `requests` [per hour, shape (T,)]: tokens alone, its machines are its own.

    `step`: the price step of its prompts (`_pricing.price_step`).
    """
    quantities = token_quantities(workload, requests)
    del quantities["output", "egress_gb"]
    stepped = {
        (phase, api_meter(meter, step) if meter in SERVED_TOKEN_METERS else meter): quantity
        for (phase, meter), quantity in quantities.items()
    }
    model = resolve_model(workload.model).name
    return [Use(pool_name, model, workload.tenant or name, "quoted", stepped)]


def committed(pool: Pool) -> bool:
    """Whether all GPUs of the pool are paid for, used or not."""
    return isinstance(pool.count, int) and pool.price.term in ("owned", "colocated", "reserved")
