"""From a scenario to a planning instance: operating points from `perf`, prices from `rates`, demand from the
profile.

What a replica does is exactly what `compare` says it does (the same operations and jobs), so that the plan
can repeat any option of `compare` and never has to be dearer.

- A serving workload runs on each pool in up to three replica sizes: the smallest that works, the one with
  most requests per GPU, and the one `compare` would take.
- Where its token counts have a spread (`cv`), its requests fall into three size buckets of equal number,
  prompt and answer taken to grow together; a bucket's work is the predicted work of its own mean, scaled so
  that all buckets together are the work `compare` predicts.
- Power is a line in load that lies under every curve `compare` bills by; what is above it is billed, and given.
- Owned, colocated and reserved machines are the planner's to take or leave, for the whole horizon, up to the
  count written; what is taken is paid used or not.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from pertoken import catalog
from pertoken.plan._bills import money
from pertoken.plan._instance import Instance, Limit
from pertoken.plan._offers import Class, Rows, classes_of, job_rows_of, serve, train
from pertoken.plan._serving import committed, mean_tokens, resolve_model
from pertoken.plan.options import Market, allowed
from pertoken.scenario import Api, Batch, Scenario, Serving, Spot, Training, requests_per_hour
from pertoken.units import BYTES_PER_GB, MINUTES_PER_HOUR, WATTS_PER_KILOWATT


def instance_from_scenario(
    scenario: Scenario,
    *,
    case: str = "expected",
    keep: bool = False,
    market: Market | None = None,
    room: float = 1.0,
    every_size: bool = False,
    scaled: bool = False,
) -> tuple[Instance, tuple[str, ...]]:
    """The planning instance of a scenario, and notes on what it leaves out.

    Parameters: case: where in the predictor's 80 % interval throughput is (``low``, ``expected``, ``high``);
    keep: owned, colocated and reserved machines are there and paid for, not to be chosen; room: the multiple
    of the demand that endless pools have machines for; every_size: jobs may take any size that meets their
    deadline, not the few smallest of these; scaled: the program may multiply the demand, so that no hour
    bounds the load of a replica. Raises CannotServeError where a workload runs on none of its pools.
    """
    market = market or Market(scenario)
    pools = list(scenario.pools)
    classes = [c for w in scenario.workloads for c in classes_of(scenario, w)]
    job_rows = [j for w in scenario.workloads for j in job_rows_of(scenario, w)]
    rows = Rows()
    for name, workload in scenario.workloads.items():
        if isinstance(workload, Training):
            sized_for = 1.0 if every_size else room
            train(rows, scenario, name, workload, pools, job_rows, case, sized_for, every_size)
        else:
            most = math.inf if scaled else room
            serve(rows, scenario, name, workload, pools, classes, case, most)
    machines = _machines(scenario, pools, rows, classes, keep, room)
    work = _work(scenario, classes, job_rows)
    bought = money(scenario, market, pools)
    units = _columns(rows.units, _UNIT_KINDS)
    flows = _columns(rows.flows, _FLOW_KINDS)
    hourly = [f.get("flow_hour_kw", np.full(len(scenario.hours), f["flow_kw"])) for f in rows.flows]
    instance = Instance(
        hours=scenario.hours, previous=np.arange(len(scenario.hours)) - 1, weight=np.ones(len(scenario.hours)),
        name=scenario.name, flow_hour_kw=np.array(hourly).reshape(len(rows.flows), -1),
        minimum=_minimum(scenario), on_prem=_on_prem(scenario, pools),
        **machines, **units, **flows, **work, **bought,
    )  # fmt: skip
    return _limited(instance, scenario, classes), tuple(dict.fromkeys(rows.notes + _notes(scenario)))


def _minimum(scenario: Scenario) -> dict[str, int]:
    """Fewest replicas of each workload that asks for more than one."""
    serving = {n: w for n, w in scenario.workloads.items() if isinstance(w, Serving)}
    return {n: w.minimum_replicas for n, w in serving.items() if w.minimum_replicas > 1}


def _on_prem(scenario: Scenario, pools: list[str]) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
    """Pools that are filled before anything runs elsewhere, where the policy says so."""
    if not scenario.policy.on_prem_first:
        return None
    found = []
    for name in pools:
        pool = scenario.pools[name]
        stands = pool.price.term in ("owned", "colocated") and isinstance(pool.count, int)
        found.append(stands if pool.on_prem is None else pool.on_prem)
    return np.array(found, dtype=np.bool_)


_UNIT_KINDS = {
    "unit_pool": int, "unit_names": str, "unit_gpus": float, "unit_whole": bool, "unit_most": float,
    "unit_start_hours": float, "unit_min_run": int, "unit_single": int, "unit_curve": object,
}  # fmt: skip
_FLOW_KINDS = {
    "flow_unit": int, "flow_pool": int, "flow_class": int, "flow_job": int, "flow_per_hour": float, "flow_kw": float,
    "flow_gpu_kw": float, "flow_reserve": float, "flow_loss": float, "flow_prefill": float,
    "flow_step": str,
}  # fmt: skip


def _columns(rows: list[dict[str, Any]], kinds: dict[str, type]) -> dict[str, Any]:
    return {
        name: tuple(r[name] for r in rows)
        if kind in (str, object)
        else np.array([r[name] for r in rows], dtype={int: np.int64, float: np.float64, bool: np.bool_}[kind])
        for name, kind in kinds.items()
    }


def _machines(
    scenario: Scenario, pools: list[str], rows: Rows, classes: list[Class], keep: bool, room: float
) -> dict[str, Any]:
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
        need = _need(scenario, p, rows, classes, room)
        most = pool.count // pool.machine_gpus if isinstance(pool.count, int) else need
        if pool.price.term in ("owned", "colocated", "reserved"):
            held[p] = most
        else:
            rented[p] = most
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


def _need(scenario: Scenario, p: int, rows: Rows, classes: list[Class], room: float) -> int:
    """Machines of a pool that would carry everything at once, `room` times over: more are never needed."""
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
            peak = float(requests_per_hour(scenario, workload).max()) * c.fraction * max(room, 1.0)
            total += peak / f["flow_per_hour"] / (1 - f["flow_loss"]) * f["flow_reserve"] * unit["unit_gpus"]
        total += unit["unit_gpus"]
    name = list(scenario.pools)[p]
    return max(1, math.ceil(total / scenario.pools[name].machine_gpus) + 1)


def _work(scenario: Scenario, classes: list[Class], job_rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Demand by class and hour, and the jobs."""
    serving = [scenario.workloads[c.workload] for c in classes]
    requests = np.zeros((len(classes), len(scenario.hours)))
    found: dict[str, list[Any]] = {
        key: [] for key in ("in", "cached", "out", "egress", "slack", "model", "tenant")
    }
    for d, (c, workload) in enumerate(zip(classes, serving, strict=True)):
        assert isinstance(workload, Serving)
        requests[d] = requests_per_hour(scenario, workload) * c.fraction
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


def _limited(instance: Instance, scenario: Scenario, classes: list[Class]) -> Instance:
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
    for name, workload in scenario.workloads.items():
        if not isinstance(workload, Training) and workload.slo is not None:
            apis = [p for p in allowed(scenario, name) if isinstance(scenario.pools[p].price, Api)]
            if apis:
                notes.append(
                    f"{', '.join(apis)}: taken to keep the SLO of {name!r}; no API's latency is known here"
                )
    for name, pool in scenario.pools.items():
        if pool.startup_minutes > MINUTES_PER_HOUR:
            notes.append(
                f"startup of pool {name!r} is counted as one hour, not {pool.startup_minutes:g} minutes"
            )
    return notes
