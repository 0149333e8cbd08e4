"""How fast the planner is: a week, a month and a year of a mixed fleet, and a GPU mix. Prints one line each.

    python bench/plan.py [week month year mix]

The fleet is generated here: 12 offers (on demand or committed) on three sites with a time-of-use price and a
demand charge, 8 workloads of which two may wait a day, starts that cost time, and a training job with a
deadline. `mix` reads instances of the format of Mélange's solver from ../shared/recipes/mix where that folder
is there.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from pertoken.plan._instance import Floats, Instance, Peak, Rate
from pertoken.plan._mix import mix
from pertoken.plan._program import build
from pertoken.plan.schedule import Progress, plan
from pertoken.units import DAYS_PER_YEAR, HOURS_PER_DAY, SECONDS_PER_HOUR

OFFERS, WORKLOADS, SITES = 12, 8, 3
WEEK = 7 * HOURS_PER_DAY
MICROSECONDS = 1_000_000


def fleet(hours: int, seed: int = 1) -> Instance:
    """A fleet of 12 offers and 8 workloads over some hours."""
    r = np.random.default_rng(seed)
    T, pools = hours, np.arange(OFFERS)
    speed = r.uniform(0.6, 4, OFFERS)
    most = r.integers(10, 60, OFFERS)
    rent = speed * r.uniform(1.8, 2.6, OFFERS) * 4
    kw = speed * r.uniform(2.0, 3.0, OFFERS) + 1
    start_usd = r.uniform(1, 6, OFFERS)
    fits = r.random((WORKLOADS, OFFERS)) < 0.7
    fits[:, :2] = True
    per_s = np.outer(r.uniform(0.5, 2, WORKLOADS), speed) * r.uniform(0.8, 1.2, (WORKLOADS, OFFERS))
    t = np.arange(T)
    size = r.uniform(8, 40, WORKLOADS)
    shape = [
        (1 + 0.6 * np.sin((t - 6 - w) / HOURS_PER_DAY * 2 * np.pi) + 0.1 * r.standard_normal(T)).clip(0.2)
        for w in range(WORKLOADS)
    ]
    flows = [(o, w) for o in range(OFFERS) for w in range(WORKLOADS) if fits[w, o]] + [
        (o, -1) for o in range(OFFERS)
    ]
    pool, work = np.array([f[0] for f in flows]), np.array([f[1] for f in flows])
    trains = work < 0
    full_kw = np.where(trains, 1.1 * kw[pool], kw[pool])
    flat = np.ones((1, T))
    return Instance(
        hours=np.datetime64("2026-01-01T00", "us") + t * np.timedelta64(SECONDS_PER_HOUR * MICROSECONDS, "us"),
        previous=t - 1, weight=np.ones(T),
        pool_names=tuple(f"offer {o}" for o in pools), held_names=tuple(f"offer {o} committed" for o in pools),
        pool_site=pools % SITES, machine_gpus=np.ones(OFFERS, dtype=np.int64),
        held_least=np.zeros(OFFERS, dtype=np.int64), held_most=most, rented_most=most[:, None] * flat,
        machines_most=most[:, None] * flat, machine_kw=0.3 * kw, machine_gpu_kw=0.2 * kw, off_kw=np.zeros(OFFERS),
        pue=np.ones((OFFERS, 1)) * flat, start_hours=start_usd / rent, start_kwh=np.zeros(OFFERS),
        min_run=np.ones(OFFERS, dtype=np.int64),
        unit_pool=pools, unit_names=tuple(f"machines of offer {o}" for o in pools), unit_gpus=np.ones(OFFERS),
        unit_whole=np.zeros(OFFERS, dtype=np.bool_), unit_most=np.full(OFFERS, np.inf),
        unit_start_hours=np.zeros(OFFERS), unit_min_run=np.ones(OFFERS, dtype=np.int64),
        unit_single=np.full(OFFERS, -1),
        flow_unit=pool, flow_pool=pool, flow_class=work, flow_job=np.where(trains, 0, -1),
        flow_per_hour=np.where(trains, speed[pool], per_s[np.maximum(work, 0), pool] * SECONDS_PER_HOUR),
        flow_kw=full_kw - 0.3 * kw[pool], flow_gpu_kw=0.7 * (full_kw - 0.3 * kw[pool]),
        flow_reserve=np.ones(len(flows)), flow_loss=np.zeros(len(flows)), flow_prefill=np.full(len(flows), 0.3),
        class_names=tuple(f"workload {w}" for w in range(WORKLOADS)), class_model=("m",) * WORKLOADS,
        class_tenant=tuple(f"team {w}" for w in range(WORKLOADS)),
        class_workload=tuple(f"workload {w}" for w in range(WORKLOADS)),
        requests=size[:, None] * np.array(shape) * SECONDS_PER_HOUR,
        input_tokens=np.full(WORKLOADS, 600.0), cached_input_tokens=np.zeros(WORKLOADS),
        output_tokens=np.full(WORKLOADS, 400.0), egress_gb=np.zeros(WORKLOADS),
        slack_hours=np.where(np.isin(np.arange(WORKLOADS), (6, 7)), HOURS_PER_DAY, 0),
        job_names=("training",), job_model=("r",), job_tenant=("lab",), job_tokens=np.array([2500.0]),
        job_release=np.array([0]), job_deadline=np.array([min(120, T)]), job_one_pool=np.array([True]),
        site_names=tuple(f"site {s}" for s in range(SITES)), site_base_kw=np.zeros((SITES, T)),
        site_cap_kw=np.full((SITES, T), np.inf), carbon_g_per_kwh=np.full((OFFERS, T), 300.0),
        rates=_rates(r, t, rent), peaks=_peaks(t), name=f"fleet of {T} h",
    )  # fmt: skip


def _rates(r: np.random.Generator, t: Any, rent: Floats) -> tuple[Rate, ...]:
    found: list[Rate] = []
    evening = (t % HOURS_PER_DAY >= 16) & (t % HOURS_PER_DAY < 21)
    price = [np.where(evening, 0.30, 0.10) * (1 + 0.2 * s) + 0.02 * r.random(len(t)) for s in range(SITES)]
    flat = np.ones(len(t))
    for o in range(OFFERS):
        found.append(Rate(f"offer {o}", "gpu_hours", "rent", rent[o] * flat))
        found.append(Rate(f"offer {o} committed", "gpu_hours", "commitment", 0.55 * rent[o] * flat))
        names = (f"offer {o}", f"offer {o} committed")
        found += [Rate(name, "energy_kwh", "energy_charge", price[o % SITES]) for name in names]
    share = min(1.0, len(t) / (30 * HOURS_PER_DAY))
    for s, usd in enumerate((15.0, 18.0, 12.0)):
        found.append(Rate(f"(site:site {s})", "peak_kw:all", "demand_charge", usd * share * flat))
    return tuple(found)


def _peaks(t: Any) -> tuple[Peak, ...]:
    months = max(1, round(len(t) / (DAYS_PER_YEAR / 12 * HOURS_PER_DAY)))
    period = np.minimum(t * months // len(t), months - 1)
    return tuple(
        Peak(s, ("peak_kw:all",), period == m, int(np.argmax(period == m)))
        for s in range(SITES)
        for m in range(months)
    )


def run(name: str, hours: int, target_s: float, limit_s: float) -> None:
    """Plan the fleet over some hours and print what it took."""
    instance = fleet(hours)
    began = time.perf_counter()
    build(instance)
    build_s = time.perf_counter() - began
    steps: list[Progress] = []
    began, used = time.perf_counter(), time.process_time()
    found = plan(instance, gap=0.01, time_limit_s=limit_s, progress=steps.append)
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - used
    first = "" if found.first_feasible_s is None else f", first plan {found.first_feasible_s:.1f} s"
    print(
        f"{name}: {wall_s:.1f} s wall, {cpu_s:.1f} s CPU (target {target_s:g} s){first}, gap {found.gap:.2%}, "
        f"{found.cost_usd:,.0f} USD, {found.method}; build {build_s:.3f} s = {build_s / wall_s:.1%}"
    )


def run_mix() -> None:
    """GPU mixes of 8 and 16 types × 240 buckets, any share and in slices of 8."""
    folder = Path(__file__).resolve().parents[1] / ".." / "shared" / "recipes" / "mix"
    if not folder.is_dir():
        print("mix: left out, ../shared/recipes/mix is not there")
        return
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        usd = np.array([g["cost"] for g in data["gpu_info"].values()])
        rate = np.array([np.ravel(g["tputs"]) for g in data["gpu_info"].values()])
        requests = np.ravel(data["workload_distribution"]) * data["total_request_rate"]
        for slices in (0, int(data["slice_factor"])):
            began, used = time.perf_counter(), time.process_time()
            found = mix(usd, rate, requests, slices=slices)
            wall_s, cpu_s = time.perf_counter() - began, time.process_time() - used
            counts = {n: int(c) for n, c in zip(data["gpu_info"], found.gpus, strict=True) if c}
            how = f"slices of 1/{slices}" if slices else "any share"
            print(
                f"mix {path.stem}, {how}: {wall_s:.2f} s wall, {cpu_s:.2f} s CPU (target 0.3 s), "
                f"{found.usd_per_hour:.2f} USD/h, {counts}"
            )


def main(names: list[str]) -> None:
    """The benchmarks named, or all."""
    runs = {"week": (WEEK, 20.0, 60.0), "month": (30 * HOURS_PER_DAY, 60.0, 180.0),
            "year": (DAYS_PER_YEAR * HOURS_PER_DAY, 180.0, 900.0)}  # fmt: skip
    for name in names or ["mix", *runs]:
        if name == "mix":
            run_mix()
        else:
            run(name, *runs[name])


if __name__ == "__main__":
    main(sys.argv[1:])
