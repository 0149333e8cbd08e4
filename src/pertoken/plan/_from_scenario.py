"""From a scenario to a planning instance: operating points from `perf`, prices from `rates`, demand from the
profile.

What a replica does is exactly what `compare` says it does (the same operations and jobs), so that the plan
can repeat any option of `compare` and never has to be dearer.

- A serving workload runs on each pool in up to three replica sizes: the smallest that works, the one with
  most requests per GPU, and the one `compare` would take.
- Where its token counts have a spread (`cv`), its requests fall into three size buckets of equal number,
  prompt and answer taken to grow together; a bucket's work is the predicted work of its own mean, scaled so
  that all buckets together are the work `compare` predicts.
- Load is packed: replicas work at their operating point or rest, which makes power linear in load.
- Owned, colocated and reserved machines are the planner's to take or leave, for the whole horizon, up to the
  count written; what is taken is paid used or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa

from pertoken import catalog
from pertoken.errors import CannotServeError, InputError
from pertoken.perf.power import server_power_w
from pertoken.plan import _serving, _training
from pertoken.plan._bursts import burst, is_simulated
from pertoken.plan._instance import Fixed, Floats, Instance, Limit, Peak, Rate
from pertoken.plan._outcome import Schedule
from pertoken.plan._pricing import pays_for_energy
from pertoken.plan._serving import Operation, committed, mean_tokens, operations, resolve_model, spot_loss
from pertoken.plan._training import Job, jobs, runs_asked
from pertoken.plan.options import Market, allowed
from pertoken.rates.energy import TariffHours, billed_peaks_kw, tier_shares
from pertoken.rates.site import UTILITY_HOURS, peak_meter
from pertoken.scenario import Api, Batch, Pool, Scenario, Serving, Spot, Tokens, Training, requests_per_hour
from pertoken.units import (
    BYTES_PER_GB,
    HOURS_PER_DAY,
    MINUTES_PER_HOUR,
    SECONDS_PER_HOUR,
    WATTS_PER_KILOWATT,
    site_pool,
)

_BUCKETS = 3
"""Size buckets of a workload whose token counts have a spread."""
_JOB_SIZES = 3
"""Sizes a job is offered on each pool: the smallest that meets its deadline alone, and the next larger
ones."""


@dataclass
class _Rows:
    """Units and flows, gathered one by one (there are tens of them), turned into arrays at the end."""

    units: list[dict[str, Any]] = field(default_factory=list)
    flows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Class:
    """One workload's size bucket: its share of the requests, and its tokens relative to the workload's
    mean."""

    workload: str
    name: str
    fraction: float
    input_scale: float
    output_scale: float


def instance_from_scenario(
    scenario: Scenario,
    *,
    case: str = "expected",
    demand: float = 1.0,
    keep: bool = False,
    market: Market | None = None,
) -> tuple[Instance, tuple[str, ...]]:
    """The planning instance of a scenario, and notes on what it leaves out.

    Parameters: case: where in the predictor's 80 % interval throughput is (``low``, ``expected``, ``high``);
    demand: multiple of all requests and training tokens; keep: owned, colocated and reserved machines are
    there and paid for, not to be chosen. Raises CannotServeError where a workload runs on none of its pools.
    """
    market = market or Market(scenario)
    pools = list(scenario.pools)
    classes = [c for w in scenario.workloads for c in _classes(scenario, w)]
    job_rows = [j for w in scenario.workloads for j in _job_rows(scenario, w, demand)]
    rows = _Rows()
    for name, workload in scenario.workloads.items():
        if isinstance(workload, Training):
            _train(rows, scenario, name, workload, pools, job_rows, case)
        else:
            _serve(rows, scenario, name, workload, pools, classes, case)
    machines = _machines(scenario, pools, rows, classes, job_rows, keep, demand)
    work = _work(scenario, classes, job_rows, demand)
    bought = _money(scenario, market, pools)
    units = _columns(rows.units, _UNIT_KINDS)
    flows = _columns(rows.flows, _FLOW_KINDS)
    instance = Instance(
        hours=scenario.hours, previous=np.arange(len(scenario.hours)) - 1, weight=np.ones(len(scenario.hours)),
        name=scenario.name, **machines, **units, **flows, **work, **bought,
    )  # fmt: skip
    return _limited(instance, scenario, classes), tuple(dict.fromkeys(rows.notes + _notes(scenario)))


_UNIT_KINDS = {
    "unit_pool": int, "unit_names": str, "unit_gpus": float, "unit_whole": bool, "unit_most": float,
    "unit_start_hours": float, "unit_min_run": int, "unit_single": int,
}  # fmt: skip
_FLOW_KINDS = {
    "flow_unit": int, "flow_pool": int, "flow_class": int, "flow_job": int, "flow_per_hour": float, "flow_kw": float,
    "flow_gpu_kw": float, "flow_reserve": float, "flow_loss": float, "flow_prefill": float,
}  # fmt: skip


def _columns(rows: list[dict[str, Any]], kinds: dict[str, type]) -> dict[str, Any]:
    return {
        name: tuple(r[name] for r in rows)
        if kind is str
        else np.array([r[name] for r in rows], dtype={int: np.int64, float: np.float64, bool: np.bool_}[kind])
        for name, kind in kinds.items()
    }


def _classes(scenario: Scenario, name: str) -> Iterator[_Class]:
    """The size buckets of a serving workload: one where token counts have no spread."""
    workload = scenario.workloads[name]
    if isinstance(workload, Training):
        return
    inputs, outputs = _scales(workload.input_tokens), _scales(workload.output_tokens)
    count = max(len(inputs), len(outputs))
    if count == 1:
        yield _Class(name, name, 1.0, 1.0, 1.0)
        return
    for n, label in enumerate(("short", "middle", "long")):
        yield _Class(name, f"{name} ({label})", 1 / count, (inputs * count)[n], (outputs * count)[n])


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


def _serve(
    rows: _Rows,
    scenario: Scenario,
    name: str,
    workload: Serving,
    pools: list[str],
    classes: list[_Class],
    case: str,
) -> None:
    mine = [(d, c) for d, c in enumerate(classes) if c.workload == name]
    served, refused = False, ""
    for pool_name in allowed(scenario, name):
        pool, p = scenario.pools[pool_name], pools.index(pool_name)
        if isinstance(pool.price, Api):
            requests = float(requests_per_hour(scenario, workload).mean())
            for d, c in mine:
                rows.flows.append(_flow(-1, p, d, -1, max(requests * c.fraction, 1e-9)))
            served = True
            continue
        try:
            offered = _offered(operations(workload, pool), pool, workload, scenario, case)
        except CannotServeError as error:
            refused = str(error)
            continue
        served = True
        for operation in offered:
            _replica(rows, scenario, name, pool_name, p, workload, operation, mine, case)
    if not served:
        raise CannotServeError(f"workload {name!r} runs on none of its pools: {refused or 'none is allowed'}")


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
    rows: _Rows, scenario: Scenario, name: str, pool_name: str, p: int, workload: Serving, operation: Operation,
    classes: list[tuple[int, _Class]], case: str,
) -> None:  # fmt: skip
    pool = scenario.pools[pool_name]
    gpu, size = catalog.gpu(pool.gpu), operation.candidate.layout.gpus
    per_machine = max(pool.machine_gpus // size, 1)
    k = len(rows.units)
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
        }
    )
    per_hour = _serving.throughput_of(operation, case) * SECONDS_PER_HOUR
    busy_w = float(operation.gpu_power_w[-1])
    reserve = _reserve(scenario, pool, workload, operation, case)
    for (d, c), factor in zip(classes, _work_factors(workload, pool, operation, classes), strict=True):
        del c
        rows.flows.append(
            _flow(k, p, d, -1, per_hour / factor)
            | {
                "flow_kw": size
                * (busy_w + gpu.host_busy_w - gpu.idle_w - gpu.host_idle_w)
                / WATTS_PER_KILOWATT,
                "flow_gpu_kw": size * (busy_w - gpu.idle_w) / WATTS_PER_KILOWATT,
                "flow_reserve": reserve,
                "flow_loss": spot_loss(pool),
                "flow_prefill": float(operation.prefill_fraction[-1]),
            }
        )


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
    workload: Serving, pool: Pool, operation: Operation, classes: list[tuple[int, _Class]]
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
    }  # fmt: skip


def _job_rows(scenario: Scenario, name: str, demand: float) -> Iterator[dict[str, Any]]:
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
            "tokens": tokens * demand, "release": start, "deadline": start + given,
        }  # fmt: skip


def _train(
    rows: _Rows, scenario: Scenario, name: str, workload: Training, pools: list[str], job_rows: list[dict[str, Any]],
    case: str,
) -> None:  # fmt: skip
    mine = [(j, row) for j, row in enumerate(job_rows) if row["workload"] == name]
    offered, refused = False, ""
    for pool_name in allowed(scenario, name):
        pool, p = scenario.pools[pool_name], pools.index(pool_name)
        if isinstance(pool.price, Api):
            continue
        try:
            sizes = _job_sizes(jobs(workload, pool), mine[0][1], case)
        except CannotServeError as error:
            refused = str(error)
            continue
        offered = True
        group = len(rows.units)
        for job in sizes:
            _job(rows, name, pool, pool_name, p, job, mine, group, case)
    if not offered:
        raise CannotServeError(
            f"workload {name!r} trains on none of its pools: {refused or 'none is allowed'}"
        )


def _job_sizes(found: tuple[Job, ...], row: dict[str, Any], case: str) -> list[Job]:
    """The smallest size that meets the deadline alone and the next larger ones; the largest where none
    does."""

    def hours(job: Job) -> float:
        speed = _training.throughput_of(job, case) * job.retained_fraction * SECONDS_PER_HOUR
        return float(row["tokens"]) / speed

    by_size = sorted(found, key=lambda j: j.gpus)
    enough = [n for n, job in enumerate(by_size) if hours(job) <= row["deadline"] - row["release"]]
    return by_size[enough[0] : enough[0] + _JOB_SIZES] if enough else by_size[-1:]


def _job(
    rows: _Rows, name: str, pool: Pool, pool_name: str, p: int, job: Job, mine: list[tuple[int, dict[str, Any]]],
    group: int, case: str,
) -> None:  # fmt: skip
    gpu, k = catalog.gpu(pool.gpu), len(rows.units)
    rows.units.append(
        {
            "unit_pool": p,
            "unit_names": f"{name} on {pool_name} ({job.gpus} GPUs)",
            "unit_gpus": float(job.gpus),
            "unit_whole": True,
            "unit_most": 1.0,
            "unit_start_hours": min(pool.startup_minutes / MINUTES_PER_HOUR, 1.0),
            "unit_min_run": max(1, math.ceil(pool.minimum_run_hours - 1e-9)),
            "unit_single": group,
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


def _machines(
    scenario: Scenario, pools: list[str], rows: _Rows, classes: list[_Class], job_rows: list[dict[str, Any]],
    keep: bool, demand: float,
) -> dict[str, Any]:  # fmt: skip
    """Machines of each pool: what may be held, rented, and what they draw."""
    T, P = len(scenario.hours), len(pools)
    size, held, rented = np.zeros(P, dtype=np.int64), np.zeros(P, dtype=np.int64), np.zeros(P)
    kw, gpu_kw, pue, carbon = np.zeros(P), np.zeros(P), np.ones(P), np.full(P, np.nan)
    for p, name in enumerate(pools):
        pool = scenario.pools[name]
        if isinstance(pool.price, Api):
            continue
        gpu, site = catalog.gpu(pool.gpu), scenario.sites[pool.site]
        size[p] = pool.machine_gpus
        kw[p] = (gpu.idle_w + gpu.host_idle_w) * pool.machine_gpus / WATTS_PER_KILOWATT
        gpu_kw[p] = gpu.idle_w * pool.machine_gpus / WATTS_PER_KILOWATT
        pue[p] = site.pue
        carbon[p] = np.nan if site.carbon_g_per_kwh is None else site.carbon_g_per_kwh
        need = _need(scenario, p, rows, classes, demand)
        most = pool.count // pool.machine_gpus if isinstance(pool.count, int) else need
        if pool.price.term in ("owned", "colocated", "reserved"):
            held[p] = most
        else:
            rented[p] = most
    del job_rows
    kept = np.array(
        [(keep or scenario.pools[name].have) and committed(scenario.pools[name]) for name in pools]
    )
    flat = np.ones((1, T))
    return {
        "pool_names": tuple(pools), "held_names": tuple(pools), "machine_gpus": size,
        "held_least": np.where(kept, held, 0), "held_most": held, "rented_most": rented[:, None] * flat,
        "machines_most": (held + rented)[:, None] * flat, "machine_kw": kw, "machine_gpu_kw": gpu_kw,
        "off_kw": np.zeros(P), "pue": pue[:, None] * flat, "carbon_g_per_kwh": carbon[:, None] * flat,
        "start_hours": np.zeros(P), "start_kwh": np.zeros(P), "min_run": np.ones(P, dtype=np.int64),
    }  # fmt: skip


def _need(scenario: Scenario, p: int, rows: _Rows, classes: list[_Class], demand: float) -> int:
    """Machines of a pool that would carry everything at once: more are never needed."""
    total = 0.0
    for k, unit in enumerate(rows.units):
        if unit["unit_pool"] != p:
            continue
        flows = [f for f in rows.flows if f["flow_unit"] == k]
        if flows[0]["flow_job"] >= 0:
            total += unit["unit_gpus"]
            continue
        for f in flows:
            c = classes[f["flow_class"]]
            workload = scenario.workloads[c.workload]
            assert isinstance(workload, Serving)
            peak = float(requests_per_hour(scenario, workload).max()) * c.fraction * max(demand, 1.0)
            total += peak / f["flow_per_hour"] / (1 - f["flow_loss"]) * f["flow_reserve"] * unit["unit_gpus"]
        total += unit["unit_gpus"]
    name = list(scenario.pools)[p]
    return max(1, math.ceil(total / scenario.pools[name].machine_gpus) + 1)


def _work(
    scenario: Scenario, classes: list[_Class], job_rows: list[dict[str, Any]], demand: float
) -> dict[str, Any]:
    """Demand by class and hour, and the jobs."""
    serving = [scenario.workloads[c.workload] for c in classes]
    requests = np.zeros((len(classes), len(scenario.hours)))
    found: dict[str, list[Any]] = {
        key: [] for key in ("in", "cached", "out", "egress", "slack", "model", "tenant")
    }
    for d, (c, workload) in enumerate(zip(classes, serving, strict=True)):
        assert isinstance(workload, Serving)
        requests[d] = requests_per_hour(scenario, workload) * c.fraction * demand
        prompt = mean_tokens(workload.input_tokens) * c.input_scale
        output = mean_tokens(workload.output_tokens) * c.output_scale
        found["in"].append(prompt * (1 - workload.cached_fraction))
        found["cached"].append(prompt * workload.cached_fraction)
        found["out"].append(output)
        found["egress"].append(output * workload.bytes_per_token / BYTES_PER_GB)
        # A request that comes late in its hour has all of the hours after it; one that comes early has one
        # less.
        found["slack"].append(max(0, int(workload.deadline_hours) - 1) if isinstance(workload, Batch) else 0)
        found["model"].append(resolve_model(workload.model).name)
        found["tenant"].append(workload.tenant or c.workload)
    training = [scenario.workloads[row["workload"]] for row in job_rows]
    return {
        "class_names": tuple(c.name for c in classes), "class_workload": tuple(c.workload for c in classes),
        "class_model": tuple(found["model"]), "class_tenant": tuple(found["tenant"]), "requests": requests,
        "input_tokens": np.array(found["in"], dtype=np.float64),
        "cached_input_tokens": np.array(found["cached"], dtype=np.float64),
        "output_tokens": np.array(found["out"], dtype=np.float64),
        "egress_gb": np.array(found["egress"], dtype=np.float64),
        "slack_hours": np.array(found["slack"], dtype=np.int64),
        "job_names": tuple(row["name"] for row in job_rows),
        "job_model": tuple(resolve_model(w.model).name for w in training),
        "job_tenant": tuple(w.tenant or row["workload"] for w, row in zip(training, job_rows, strict=True)),
        "job_tokens": np.array([row["tokens"] for row in job_rows], dtype=np.float64),
        "job_release": np.array([row["release"] for row in job_rows], dtype=np.int64),
        "job_deadline": np.array([row["deadline"] for row in job_rows], dtype=np.int64),
        "job_one_pool": np.ones(len(job_rows), dtype=np.bool_),
    }  # fmt: skip


def _money(scenario: Scenario, market: Market, pools: list[str]) -> dict[str, Any]:
    """Rates, sites, demand charges and what is paid with a site or pool."""
    T, sites = len(scenario.hours), list(scenario.sites)
    rates: list[Rate] = []
    for name in pools:
        rates += _rates(market.pool_rates(name), scenario)
    used = [s for s in sites if any(scenario.pools[p].site == s for p in pools)]
    for site in used:
        rates += _rates(market.site_rates(site), scenario)
    named = {(r.pool, r.meter) for r in rates}
    fixed = []
    for site in used:
        there = np.array([scenario.pools[p].site == site for p in pools])
        metered = np.array([pays_for_energy(scenario.pools[p]) for p in pools])
        for meter, who in (("site_hours", there), (UTILITY_HOURS, there & metered)):
            if (site_pool(site), meter) in named and who.any():
                fixed.append(Fixed(site_pool(site), meter, np.ones(T), who))
    for p, name in enumerate(pools):
        if (name, "site_hours") in named:
            fixed.append(Fixed(name, "site_hours", np.ones(T), np.arange(len(pools)) == p))
    paying = np.array([bool(scenario.pools[p].site) and _metered(scenario, scenario.pools[p]) for p in pools])
    shares: dict[int, Floats] = {}
    for s, site in enumerate(sites):
        tariff = market.tariff(site) if site in used else None
        if tariff is not None and tariff.tariff.tiers > 1:
            shares[s] = np.zeros((tariff.tariff.tiers, T))
            shares[s][0] = 1.0
    caps = [scenario.sites[s].power_cap_kw for s in sites]
    return {
        "site_names": tuple(sites), "site_base_kw": np.zeros((len(sites), T)),
        "site_cap_kw": np.array([[math.inf if c is None else c] * T for c in caps]).reshape(len(sites), T),
        "pool_site": np.array(
            [sites.index(scenario.pools[p].site) if pays else -1 for p, pays in zip(pools, paying, strict=True)],
            dtype=np.int64,
        ),
        "rates": tuple(rates), "fixed": tuple(fixed), "tier_shares": shares,
        "peaks": tuple(k for s, site in enumerate(sites) if site in used for k in _peaks(scenario, market, s, site)),
    }  # fmt: skip


def _metered(scenario: Scenario, pool: Pool) -> bool:
    """Whether the pool's power counts at the site's meter: its bill, or its cap."""
    if isinstance(pool.price, Api):
        return False
    return pays_for_energy(pool) or scenario.sites[pool.site].power_cap_kw is not None


def _rates(table: pa.Table, scenario: Scenario) -> Iterator[Rate]:
    """Rate rows as arrays over the horizon; rows of one pool, meter, component and source make one."""
    index = np.searchsorted(
        scenario.hours, table["hour"].to_numpy(zero_copy_only=False).astype("datetime64[h]")
    )
    values = table["usd_per_unit"].cast(pa.float64()).to_numpy(zero_copy_only=False)
    columns = [table[name].to_pylist() for name in ("pool", "meter", "component", "basis", "source")]
    found: dict[tuple[str, ...], Floats] = {}
    for at, value, key in zip(index, values, zip(*columns, strict=True), strict=True):
        found.setdefault(key, np.zeros(len(scenario.hours)))[at] += value
    for (pool, meter, component, basis, source), usd in found.items():
        yield Rate(pool, meter, component, usd, basis, source)


def _peaks(scenario: Scenario, market: Market, number: int, name: str) -> Iterator[Peak]:
    """The site's demand charges by billing period, with what is billed already."""
    site, tariff = scenario.sites[name], market.tariff(name)
    if tariff is None:
        return
    _tiers_rise(tariff, name)
    T = len(scenario.hours)
    least = billed_peaks_kw(tariff, np.zeros(T), previous_peaks_kw=site.previous_peaks_kw or None)
    unknown = set(site.peak_so_far_kw) - {charge.name for charge in tariff.demand}
    if unknown:
        raise InputError(
            f"site {name!r}: peak_so_far_kw names {min(unknown)!r}, which its tariff lacks in this horizon"
        )
    first = tariff.first_hours()
    for charge in tariff.demand:
        for period in range(tariff.periods):
            hours = charge.mask & (tariff.period == period)
            if not hours.any():
                continue
            so_far = site.peak_so_far_kw.get(charge.name, 0.0) if period == 0 else 0.0
            meters = tuple(peak_meter(charge.name, k) for k in range(len(charge.upper_kw)))
            yield Peak(
                number, meters, hours, int(first[period]), max(so_far, float(least[charge.name][period])),
                tuple(float(u) for u in charge.upper_kw),
            )  # fmt: skip


def with_tiers(instance: Instance, made: Schedule, market: Market) -> Instance:
    """The instance with each hour's energy in the tier it falls in under a schedule."""
    shares = {}
    for s in instance.tier_shares:
        tariff = market.tariff(instance.site_names[s])
        assert tariff is not None
        shares[s] = tier_shares(tariff, made.site_kw[s] - instance.site_base_kw[s])
    return replace(instance, tier_shares=shares) if shares else instance


def _tiers_rise(tariff: TariffHours, site: str) -> None:
    for charge in tariff.demand:
        if (np.diff(charge.usd_per_kw, axis=0) < -1e-12).any():
            raise InputError(
                f"site {site!r}: demand charge {charge.name!r} gets cheaper per kW with each tier; "
                "plan cannot use such a tariff (compare can)"
            )


def _limited(instance: Instance, scenario: Scenario, classes: list[_Class]) -> Instance:
    """Limits of the workloads: how much spot may serve."""
    pools = instance.pool_names
    spot = np.array([isinstance(scenario.pools[p].price, Spot) for p in pools], dtype=np.bool_)
    limits = []
    for name, workload in scenario.workloads.items():
        if workload.max_spot_fraction >= 1:
            continue
        if isinstance(workload, Training):
            names = [n == name or n.startswith(f"{name} (week ") for n in instance.job_names]
            mine = np.isin(instance.flow_job, np.flatnonzero(names))
        else:
            mine = np.isin(instance.flow_class, [d for d, c in enumerate(classes) if c.workload == name])
        if (mine & spot[instance.flow_pool]).any():
            limits.append(
                Limit("spot", name, mine & spot[instance.flow_pool], mine, workload.max_spot_fraction)
            )
    return replace(instance, limits=tuple(limits))


def _notes(scenario: Scenario) -> list[str]:
    """What the plan does not take into account, in words."""
    notes = []
    for name, pool in scenario.pools.items():
        if pool.startup_usd:
            notes.append(
                f"startup_usd of pool {name!r} is left out: starts are priced by their time and energy"
            )
        if pool.startup_minutes > MINUTES_PER_HOUR:
            notes.append(
                f"startup of pool {name!r} is counted as one hour, not {pool.startup_minutes:g} minutes"
            )
    for name, workload in scenario.workloads.items():
        if isinstance(workload, Serving) and workload.minimum_replicas > 1:
            notes.append(f"minimum_replicas of {name!r} is not enforced where its load is spread over pools")
    return notes
