"""What may run where: replica sizes of each workload and sizes of each job on each pool, as units and flows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np

from pertoken import catalog
from pertoken.catalog import Gpu
from pertoken.errors import CannotServeError
from pertoken.perf.power import server_power_w
from pertoken.plan import _serving, _training
from pertoken.plan._bursts import burst, is_simulated
from pertoken.plan._instance import Curve
from pertoken.plan._pricing import api_meter, price_step
from pertoken.plan._serving import Operation, mean_tokens, operations, resolve_model, spot_loss
from pertoken.plan._training import Job, jobs, runs_asked
from pertoken.plan.options import allowed
from pertoken.scenario import Api, Batch, Pool, Scenario, Serving, Tokens, Training, requests_per_hour
from pertoken.tables import Floats
from pertoken.units import HOURS_PER_DAY, MINUTES_PER_HOUR, SECONDS_PER_HOUR, WATTS_PER_KILOWATT

_BUCKETS = 3
"""Size buckets of a workload whose token counts have a spread."""
_NONE_LEFT = "its `pools`, `regions` and `vendors` leave no GPU pool or API that may"
_JOB_SIZES = 3
"""Sizes a job is offered on each pool: the smallest that meets its deadline alone, and the next larger
ones."""


@dataclass
class Rows:
    """Units and flows, gathered one by one (there are tens of them), turned into arrays at the end."""

    units: list[dict[str, Any]] = field(default_factory=list)
    flows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Class:
    """One workload's size bucket: its share of the requests, and its tokens relative to the workload's
    mean."""

    workload: str
    name: str
    fraction: float
    input_scale: float
    output_scale: float


def classes_of(scenario: Scenario, name: str) -> Iterator[Class]:
    """The size buckets of a serving workload: one where token counts have no spread."""
    workload = scenario.workloads[name]
    if isinstance(workload, Training):
        return
    inputs, outputs = _scales(workload.input_tokens), _scales(workload.output_tokens)
    count = max(len(inputs), len(outputs))
    if count == 1:
        yield Class(name, name, 1.0, 1.0, 1.0)
        return
    for n, label in enumerate(("short", "middle", "long")):
        yield Class(name, f"{name} ({label})", 1 / count, (inputs * count)[n], (outputs * count)[n])


def _scales(tokens: float | Tokens) -> list[float]:
    """Mean of each bucket of equal number of requests over the mean of all, log-normal.

    The mean of a log-normal between quantiles a and b is mean × (Φ(z_b − s) − Φ(z_a − s)) / (b − a).
    """
    if not isinstance(tokens, Tokens) or tokens.cv == 0:
        return [1.0]
    normal, s = NormalDist(), math.sqrt(math.log1p(tokens.cv**2))
    edges = [-math.inf, *(normal.inv_cdf(k / _BUCKETS) for k in range(1, _BUCKETS)), math.inf]
    reach = [0.0 if e == -math.inf else 1.0 if e == math.inf else normal.cdf(e - s) for e in edges]
    return [(b - a) * _BUCKETS for a, b in pairwise(reach)]


def serve(
    rows: Rows,
    scenario: Scenario,
    name: str,
    workload: Serving,
    pools: list[str],
    classes: list[Class],
    case: str,
    room: float,
) -> None:
    mine = [(d, c) for d, c in enumerate(classes) if c.workload == name]
    served, refused = False, ""
    for pool_name in allowed(scenario, name):
        pool, p = scenario.pools[pool_name], pools.index(pool_name)
        if isinstance(pool.price, Api):
            requests = float(requests_per_hour(scenario, workload).mean())
            above = price_step(pool.price, scenario.horizon.start, mean_tokens(workload.input_tokens))
            step = api_meter("", above).partition(":")[2]
            for d, c in mine:
                api = _flow(-1, p, d, -1, max(requests * c.fraction, 1e-9))
                rows.flows.append(api | {"flow_step": step})
            served = True
            continue
        try:
            offered = _offered(operations(workload, pool), pool, workload, scenario, case)
        except CannotServeError as error:
            refused = str(error)
            continue
        served = True
        for operation in offered:
            _replica(rows, scenario, name, pool_name, p, workload, operation, mine, case, room)
    if not served:
        raise CannotServeError(f"workload {name!r} runs on none of its pools: {refused or _NONE_LEFT}")


def _offered(
    found: tuple[Operation, ...], pool: Pool, workload: Serving, scenario: Scenario, case: str
) -> list[Operation]:
    """Replica sizes worth offering: the smallest, the most productive per GPU, and the one `compare`
    takes."""

    def size(o: Operation) -> int:
        return o.candidate.layout.gpus

    peak = float(requests_per_hour(scenario, workload).max())
    free = pool.model_copy(update={"count": "as needed"})

    def paid(o: Operation) -> tuple[int, int, float]:
        replicas = _serving.replicas_for(o, free, workload, peak, case, 1.0)
        held = _serving.machines_for(o, free, replicas)
        return held.paid_gpus, held.gpus, -o.requests_per_s * held.replicas

    chosen = [
        min(found, key=size),
        max(found, key=lambda o: o.requests_per_s / size(o)),
        min(found, key=paid),
    ]
    return list({size(o): o for o in chosen}.values())


def _replica(
    rows: Rows, scenario: Scenario, name: str, pool_name: str, p: int, workload: Serving, operation: Operation,
    classes: list[tuple[int, Class]], case: str, room: float,
) -> None:  # fmt: skip
    pool = scenario.pools[pool_name]
    gpu, size = catalog.gpu(pool.gpu), operation.candidate.layout.gpus
    per_machine = max(pool.machine_gpus // size, 1)
    k, curve = len(rows.units), _curve(operation, gpu)
    rows.units.append(
        {
            "unit_pool": p,
            "unit_names": f"{name} on {pool_name} ({size} GPU{'s' if size > 1 else ''})",
            "unit_gpus": pool.machine_gpus / per_machine,
            "unit_whole": True,
            "unit_most": math.inf,
            "unit_start_hours": min(pool.startup_minutes / MINUTES_PER_HOUR, 1.0),
            "unit_min_run": max(1, math.ceil(pool.minimum_run_hours - 1e-9)),
            "unit_single": -1,
            "unit_curve": curve,
        }
    )
    per_hour = _serving.throughput_of(operation, case) * SECONDS_PER_HOUR
    reserve = _reserve(scenario, pool, workload, operation, case)
    most = np.full(len(scenario.hours), 1 / reserve)
    if math.isfinite(room) and not isinstance(workload, Batch):
        asked = requests_per_hour(scenario, workload) * room / (per_hour * (1 - spot_loss(pool)))
        most = np.minimum(most, asked)
    line_kw = _least_slope(curve.load, curve.kw, most)
    for (d, _), factor in zip(classes, _work_factors(workload, pool, operation, classes), strict=True):
        rows.flows.append(
            _flow(k, p, d, -1, per_hour / factor)
            | {
                "flow_kw": float(line_kw.min()),
                "flow_hour_kw": line_kw,
                "flow_gpu_kw": float(_least_slope(curve.load, curve.gpu_kw, most).min()),
                "flow_reserve": reserve,
                "flow_loss": spot_loss(pool),
                "flow_prefill": float(operation.prefill_fraction[-1]),
            }
        )


def _curve(operation: Operation, gpu: Gpu) -> Curve:
    """What a replica shows of itself by load: as `compare` has it, requests spread evenly over the replicas."""
    size = operation.candidate.layout.gpus
    gpu_w = operation.gpu_power_w - operation.gpu_power_w[0]
    host_w = (gpu.host_busy_w - gpu.host_idle_w) * operation.load
    return Curve(
        size,
        operation.load,
        operation.in_flight,
        operation.prefill_fraction,
        size * (gpu_w + host_w) / WATTS_PER_KILOWATT,
        size * gpu_w / WATTS_PER_KILOWATT,
    )


def _least_slope(load: Floats, kw: Floats, most: Floats) -> Floats:
    """Least kW per unit of load up to the load a replica may have in each hour (T,): no schedule draws less than the
    program's line. Where few requests need one replica alone, the line is what it draws.

    >>> _least_slope(np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.4, 0.5]), np.array([1.0, 0.75, 0.25])).tolist()
    [0.5, 0.6, 0.8]
    """
    nodes = load > 0
    least = np.minimum.accumulate(kw[nodes] / load[nodes])
    before = np.searchsorted(load[nodes], most)
    there = np.interp(most, load, kw) / np.maximum(most, 1e-12)
    found = np.where(before > 0, np.minimum(least[np.maximum(before - 1, 0)], there), least[0])
    return np.asarray(found, dtype=np.float64)


def _reserve(scenario: Scenario, pool: Pool, workload: Serving, operation: Operation, case: str) -> float:
    """Capacity that must be there for one unit of load: the workload's headroom, or what bursts ask for."""
    headroom = 1 / (1 - workload.headroom_fraction)
    if not is_simulated(workload):
        return headroom
    found = burst(scenario, workload, pool, operation, case, 1 - spot_loss(pool))
    peak = float(requests_per_hour(scenario, workload).max())
    capacity = _serving.throughput_of(operation, case) * SECONDS_PER_HOUR * (1 - spot_loss(pool))
    return max(1.0, found.replicas * capacity / peak)


def _work_factors(
    workload: Serving, pool: Pool, operation: Operation, classes: list[tuple[int, Class]]
) -> list[float]:
    """Replica time a request of each bucket takes over that of the mean request; their mean is 1."""
    if len(classes) == 1:
        return [1.0]
    from pertoken.perf import predict

    best = operation.candidate
    scales = np.array([(c.input_scale, c.output_scale) for _, c in classes]).T
    point = replace(
        _serving._point(workload, pool),
        input_tokens=mean_tokens(workload.input_tokens) * scales[0],
        cached_input_tokens=mean_tokens(workload.input_tokens) * workload.cached_fraction * scales[0],
        output_tokens=np.maximum(mean_tokens(workload.output_tokens) * scales[1], 1.0),
        concurrency=best.concurrency,
        precision=best.precision,
        layout=best.layout,
    )
    answer = predict(resolve_model(workload.model), catalog.gpu(pool.gpu), point)
    # In one batch of all sizes a request's work is the time it takes at the batch's concurrency, its share of
    # memory aside; a bucket too long for the batch's memory falls back on its tokens.
    seconds = np.asarray(point.output_tokens) / np.maximum(answer.tokens_per_s.value, 1e-12)
    tokens = scales[0] * mean_tokens(workload.input_tokens) + scales[1] * mean_tokens(workload.output_tokens)
    seconds = np.where(np.isfinite(seconds), seconds, tokens / tokens.mean() * np.nanmean(seconds))
    share = np.array([c.fraction for _, c in classes])
    return [float(f) for f in seconds / float((share * seconds).sum())]


def _flow(unit: int, pool: int, d: int, job: int, per_hour: float) -> dict[str, Any]:
    return {
        "flow_unit": unit, "flow_pool": pool, "flow_class": d, "flow_job": job, "flow_per_hour": per_hour,
        "flow_kw": 0.0, "flow_gpu_kw": 0.0, "flow_reserve": 1.0, "flow_loss": 0.0, "flow_prefill": 0.0,
        "flow_step": "",
    }  # fmt: skip


def job_rows_of(scenario: Scenario, name: str) -> Iterator[dict[str, Any]]:
    """A training workload's jobs: one, or one a week."""
    workload = scenario.workloads[name]
    if not isinstance(workload, Training):
        return
    asked = runs_asked(scenario, workload)
    for number, (start, end, tokens) in enumerate(asked):
        given = end - start
        if workload.deadline_days is not None:
            given = min(given, int(workload.deadline_days * HOURS_PER_DAY))
        yield {
            "workload": name, "name": name if len(asked) == 1 else f"{name} (week {number + 1})",
            "tokens": tokens, "release": start, "deadline": start + given,
        }  # fmt: skip


def train(
    rows: Rows, scenario: Scenario, name: str, workload: Training, pools: list[str], job_rows: list[dict[str, Any]],
    case: str, room: float, every_size: bool,
) -> None:  # fmt: skip
    mine = [(j, row) for j, row in enumerate(job_rows) if row["workload"] == name]
    offered, refused = False, ""
    for pool_name in allowed(scenario, name):
        pool, p = scenario.pools[pool_name], pools.index(pool_name)
        if isinstance(pool.price, Api):
            continue
        try:
            sizes = _job_sizes(jobs(workload, pool), mine[0][1], case, room, every_size)
        except CannotServeError as error:
            refused = str(error)
            continue
        offered = True
        group = len(rows.units)
        for job in sizes:
            _job(rows, name, pool, pool_name, p, job, mine, group, case)
    if not offered:
        raise CannotServeError(f"workload {name!r} trains on none of its pools: {refused or _NONE_LEFT}")


def _job_sizes(
    found: tuple[Job, ...], row: dict[str, Any], case: str, room: float, every_size: bool
) -> list[Job]:
    """The smallest size that meets the deadline alone and the next larger ones (all of them with `every_size`); the
    largest where none does. `room`: the multiple of the job's tokens that is planned for."""

    def hours(job: Job) -> float:
        speed = _training.throughput_of(job, case) * job.retained_fraction * SECONDS_PER_HOUR
        return float(row["tokens"]) * room / speed

    by_size = sorted(found, key=lambda j: j.gpus)
    enough = [n for n, job in enumerate(by_size) if hours(job) <= row["deadline"] - row["release"]]
    if not enough:
        return by_size[-1:]
    return by_size[enough[0] :] if every_size else by_size[enough[0] : enough[0] + _JOB_SIZES]


def _job(
    rows: Rows, name: str, pool: Pool, pool_name: str, p: int, job: Job, mine: list[tuple[int, dict[str, Any]]],
    group: int, case: str,
) -> None:  # fmt: skip
    gpu, k = catalog.gpu(pool.gpu), len(rows.units)
    rows.units.append(
        {
            "unit_pool": p,
            "unit_names": f"{name} on {pool_name} ({job.gpus} GPU{'s' if job.gpus > 1 else ''})",
            "unit_gpus": float(job.gpus),
            "unit_whole": True,
            "unit_most": 1.0,
            "unit_start_hours": min(pool.startup_minutes / MINUTES_PER_HOUR, 1.0),
            "unit_min_run": max(1, math.ceil(pool.minimum_run_hours - 1e-9)),
            "unit_single": group,
            "unit_curve": None,
        }
    )
    gpu_w = float(job.prediction.gpu_power_w.value)
    plug_w = float(np.asarray(server_power_w(gpu, np.asarray(gpu_w), np.asarray(1.0))))
    per_hour = _training.throughput_of(job, case) * SECONDS_PER_HOUR
    for j, _ in mine:
        rows.flows.append(
            _flow(k, p, -1, j, per_hour)
            | {
                "flow_kw": job.gpus * (plug_w - gpu.idle_w - gpu.host_idle_w) / WATTS_PER_KILOWATT,
                "flow_gpu_kw": job.gpus * (gpu_w - gpu.idle_w) / WATTS_PER_KILOWATT,
                "flow_loss": 1 - job.retained_fraction,
            }
        )
