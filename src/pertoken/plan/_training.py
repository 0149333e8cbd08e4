"""A training workload on one pool: how many GPUs, how long, what is lost to restarts, usage by hour."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pertoken import catalog
from pertoken.errors import CannotServeError, InputError
from pertoken.perf.point import TrainingPoint, TrainingPrediction
from pertoken.perf.power import server_power_w
from pertoken.perf.training import predict_training, retained_fraction
from pertoken.plan._serving import committed, energy, resolve_model, spot_loss
from pertoken.plan._usage import Quantities, Use
from pertoken.scenario import ModelFile, Pool, Scenario, Training
from pertoken.tables import Floats
from pertoken.units import DAYS_PER_WEEK, HOURS_PER_DAY, IDLE, SECONDS_PER_HOUR, WATTS_PER_KILOWATT

MAX_FLEET_GPUS = 256
"""GPUs a pool without a count is tried with at most."""


_NOTHING_KEPT = 1e-6
"""Part of a job's time at or below which what it keeps is nothing."""


@dataclass(frozen=True)
class Job:
    """One way to train: GPUs, tokens per second of the whole job and what share of its hours is retained."""

    gpus: int
    prediction: TrainingPrediction
    tokens_per_s: float
    retained_fraction: float
    precision: str


@dataclass(frozen=True)
class Runs:
    """When a job runs: share of each hour it runs (0 to 1, shape (T,)); days from start to finish of one run."""

    running: Floats
    hours_per_run: float
    days: float
    tokens: float


def throughput_of(job: Job, case: str) -> float:
    """Tokens per second of the job: ``expected``, ``low`` or ``high``."""
    interval = job.prediction.tokens_per_s
    ends = {"expected": interval.value, "low": interval.low, "high": interval.high}
    return float(ends[case])


def jobs(workload: Training, pool: Pool) -> tuple[Job, ...]:
    """The job on 1, 2, 4, … whole machines of the pool, as far as it fits, fewest GPUs first.

    Raises CannotServeError where the model cannot be trained on any of them.
    """
    machine = pool.machine_gpus
    limit = pool.count if isinstance(pool.count, int) else MAX_FLEET_GPUS
    limit = min(limit, workload.max_gpus or limit)
    sizes = [machine * 2**i for i in range(12) if machine * 2**i <= limit]
    if limit >= machine and limit // machine * machine not in sizes:
        sizes.append(limit // machine * machine)
    if not sizes:
        raise CannotServeError(f"max_gpus {workload.max_gpus} is less than one machine of {machine} GPUs")
    found: list[Job] = []
    refused: CannotServeError | None = None
    for gpus in sizes:
        try:
            prediction, precision = _best_precision(workload, pool.gpu, gpus)
        except CannotServeError as error:
            refused = error
            continue
        try:
            kept = _retained(workload, pool, gpus)
        except InputError as error:  # so many interruptions that no hour is left: not here, perhaps elsewhere
            refused = CannotServeError(str(error))
            continue
        if kept <= _NOTHING_KEPT:
            refused = CannotServeError(f"on {gpus} GPUs interruptions and failures leave no useful work")
            continue
        found.append(Job(gpus, prediction, float(prediction.tokens_per_s.value), kept, precision))
    if not found:
        assert refused is not None
        raise refused
    return tuple(found)


def _best_precision(workload: Training, gpu_name: str, gpus: int) -> tuple[TrainingPrediction, str]:
    precisions = tuple(p for p in workload.precisions if p in ("bf16", "fp8", "fp4")) or ("bf16",)
    best: tuple[TrainingPrediction, str] | None = None
    refused: CannotServeError | None = None
    for precision in precisions:
        point = TrainingPoint(
            gpus=gpus,
            sequence_tokens=workload.sequence_tokens,
            global_batch=workload.global_batch,
            precision=precision,
            kind=workload.method,
        )
        try:
            answer = _predict(workload.model, gpu_name, point)
        except CannotServeError as error:
            refused = error
            continue
        if best is None or float(answer.tokens_per_s.value) > float(best[0].tokens_per_s.value):
            best = (answer, precision)
    if best is None:
        assert refused is not None
        raise refused
    return best


@lru_cache(maxsize=4096)
def _predict(model_spec: str | ModelFile, gpu_name: str, point: TrainingPoint) -> TrainingPrediction:
    return predict_training(resolve_model(model_spec), catalog.gpu(gpu_name), point)


def _retained(workload: Training, pool: Pool, gpus: int) -> float:
    """Share of run time whose steps are kept: failures of the job's GPUs, and a spot pool's interruptions."""
    kept = 1.0
    checkpoint_minutes = 0.0
    if workload.restarts is not None:
        r = workload.restarts
        checkpoint_minutes = r.checkpoint_minutes
        kept = float(
            retained_fraction(
                r.mtbf_hours / gpus, r.checkpoint_minutes, r.checkpoint_cost_minutes, r.restart_minutes
            )
        )
    machines = gpus / pool.machine_gpus
    # One machine's interruption stops the whole job: interruptions add up over its machines.
    lost = 1 - (1 - spot_loss(pool, checkpoint_minutes / 2)) ** machines
    return float(kept * (1 - lost))


def schedule(
    scenario: Scenario,
    workload: Training,
    job: Job,
    case: str = "expected",
    factor: float = 1.0,
    scale: float = 1.0,
) -> Runs:
    """The job from the start of the horizon (or of each of its weeks) on, without a pause.

    Weeks are seven local days from the horizon's start; a part week at its end asks for its share of the tokens.
    Raises CannotServeError where a run misses its deadline, or the horizon.
    """
    speed = throughput_of(job, case) * factor * job.retained_fraction * SECONDS_PER_HOUR
    running = np.zeros(len(scenario.hours))
    longest, total = 0.0, 0.0
    for start, end, tokens in runs_asked(scenario, workload):
        needed = tokens * scale / speed
        deadline = min(end - start, (workload.deadline_days or math.inf) * HOURS_PER_DAY)
        if needed > deadline + 1e-9:
            raise CannotServeError(
                f"{tokens * scale:,.0f} tokens take {needed / HOURS_PER_DAY:.1f} days on {job.gpus} GPUs, "
                f"{deadline / HOURS_PER_DAY:.1f} days are given"
            )
        whole = int(needed)
        running[start : start + whole] = 1.0
        if needed > whole:
            running[start + whole] = needed - whole
        longest, total = max(longest, needed), total + tokens * scale
    return Runs(running, longest, longest / HOURS_PER_DAY, total)


def runs_asked(scenario: Scenario, workload: Training) -> list[tuple[int, int, float]]:
    """(first hour, hour after the last, tokens) of every run the horizon asks for, hours counted from its start."""
    hours = len(scenario.hours)
    if workload.tokens is not None:
        return [(0, hours, workload.tokens)]
    assert workload.tokens_per_week is not None
    days = scenario.horizon.days
    midnights = scenario.midnights
    found = []
    for first in range(0, days, DAYS_PER_WEEK):
        last = min(first + DAYS_PER_WEEK, days)
        share = (last - first) / DAYS_PER_WEEK
        found.append((midnights[first], midnights[last], workload.tokens_per_week * share))
    return found


def gpu_training(
    scenario: Scenario,
    name: str,
    workload: Training,
    pool_name: str,
    job: Job,
    runs: Runs,
) -> list[Use]:
    """Usage of a GPU pool that trains: hours held to whole hours where rented, always where paid for anyway."""
    pool = scenario.pools[pool_name]
    site = scenario.sites[pool.site]
    gpu = catalog.gpu(pool.gpu)
    running = runs.running
    if isinstance(pool.count, int) and committed(pool):
        held = np.full(len(running), float(pool.count))
    else:
        held = np.ceil(running) * job.gpus
    run_hours = running * job.gpus
    kept, lost = run_hours * job.retained_fraction, run_hours * (1 - job.retained_fraction)
    idle = held - run_hours
    gpu_w = float(job.prediction.gpu_power_w.value)
    plug_w = float(np.asarray(server_power_w(gpu, np.asarray(gpu_w), np.asarray(1.0))))
    quantities: Quantities = {
        ("training", "gpu_hours"): kept,
        ("waste", "gpu_hours"): lost,
        ("training", "training_tokens"): _spread(runs.tokens, running),
    }
    for phase, gpu_hours in (("training", kept), ("waste", lost)):
        quantities |= energy(
            phase,
            gpu_hours * gpu_w / WATTS_PER_KILOWATT,
            gpu_hours * plug_w / WATTS_PER_KILOWATT,
            site.pue,
            site.carbon_g_per_kwh,
        )
    if job.retained_fraction < 1:
        per_token = (1 - job.retained_fraction) / job.retained_fraction
        quantities["waste", "lost_training_tokens"] = _spread(runs.tokens * per_token, running)
    rest: Quantities = {("idle", "gpu_hours"): idle}
    rest |= energy(
        "idle",
        idle * gpu.idle_w / WATTS_PER_KILOWATT,
        idle * (gpu.idle_w + gpu.host_idle_w) / WATTS_PER_KILOWATT,
        site.pue,
        site.carbon_g_per_kwh,
    )
    model = resolve_model(workload.model).name
    basis = job.prediction.basis
    return [
        Use(pool_name, model, workload.tenant or name, basis, quantities),
        Use(pool_name, model, IDLE, basis, rest),
    ]


def _spread(total: float, running: Floats) -> Floats:
    spread: Floats = total * running / running.sum()
    return spread
