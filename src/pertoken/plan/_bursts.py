"""Replicas under bursts: a workload that names a trace or a percentile SLO is simulated, not averaged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from pertoken import catalog
from pertoken.errors import CannotServeError, InfeasibleError
from pertoken.perf import StepTimes, step_times
from pertoken.plan._serving import Operation, mean_tokens, resolve_model, throughput_of
from pertoken.scenario import Pool, Scenario, Serving, requests_per_hour
from pertoken.tables import Floats
from pertoken.units import HOURS_PER_DAY, SECONDS_PER_HOUR

if TYPE_CHECKING:
    from pertoken.perf.simulate import Source

MEDIAN = 50.0
"""An SLO at or below this percentile is a statement about the typical request, which the averages answer."""


@dataclass(frozen=True)
class Burst:
    """Fewest replicas that keep the SLO in the busiest day, and the shares of that day's requests and tokens in it."""

    replicas: int
    requests_in_slo_fraction: float
    output_tokens_in_slo_fraction: float


def is_simulated(workload: Serving) -> bool:
    """Whether averages do not answer the workload: it names a trace, or an SLO above the median."""
    return workload.trace is not None or (workload.slo is not None and workload.slo.percentile > MEDIAN)


def times_of(
    workload: Serving, pool: Pool, operation: Operation, case: str = "expected", factor: float = 1.0
) -> StepTimes:
    """Step times of the operating point's replica; `case` and `factor` scale its speed as `throughput_of` does."""
    prompt, output = mean_tokens(workload.input_tokens), mean_tokens(workload.output_tokens)
    best = operation.candidate
    times = step_times(
        resolve_model(workload.model),
        catalog.gpu(pool.gpu),
        best.precision,
        operation.engine,
        best.layout,
        max_batch=max(int(best.concurrency), 1),
        context_tokens=prompt + output / 2,
        prompt_tokens=prompt,
        accepted_per_step=workload.accepted_per_step,
    )
    from pertoken.perf.simulate import per_accepted_token

    times = per_accepted_token(times, workload.accepted_per_step, workload.draft_fraction)
    slower = throughput_of(operation, "expected") / (throughput_of(operation, case) * factor)
    return replace(
        times,
        decode_s=times.decode_s * slower,
        context_s=times.context_s * slower,
        prefill_s=times.prefill_s * slower,
        prefill_context_s=times.prefill_context_s * slower,
        step_s=times.step_s * slower,
    )


def burst(
    scenario: Scenario,
    workload: Serving,
    pool: Pool,
    operation: Operation,
    case: str = "expected",
    factor: float = 1.0,
) -> Burst:
    """The fewest replicas that keep the SLO at its percentile over the busiest day of the horizon.

    The workload's trace is played at the rate that makes its mean the busiest hour's; without one, seeded traffic has
    the day's shape. Where there is no SLO, the trace must be served without a growing queue: end-to-end within the
    day. Raises CannotServeError where no number of replicas does.
    """
    day = busiest_day(requests_per_hour(scenario, workload))
    return _find(_Asked(workload, pool, operation), tuple(float(n) for n in day), case, factor)


def busiest_day(requests: Floats) -> Floats:
    """The 24 consecutive hours with the most requests, from one of the horizon's midnights on."""
    days = len(requests) // HOURS_PER_DAY
    if days == 0:
        return requests
    whole = requests[: days * HOURS_PER_DAY].reshape(days, HOURS_PER_DAY)
    found: Floats = whole[int(np.argmax(whole.sum(axis=1)))]
    return found


class _Asked:
    """Arguments hashed by what the answer depends on."""

    def __init__(self, workload: Serving, pool: Pool, operation: Operation) -> None:
        self.workload, self.pool, self.operation = workload, pool, operation
        # Speeds too: a pool's own measured points change them and not the candidate.
        speeds = (operation.requests_per_s, operation.requests_per_s_low, operation.requests_per_s_high)
        self._key = (workload.model_dump_json(), pool.gpu, operation.engine, operation.candidate, speeds)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Asked) and self._key == other._key


@lru_cache(maxsize=512)
def _find(asked: _Asked, day: tuple[float, ...], case: str, factor: float) -> Burst:
    from pertoken.perf.simulate import ReplicaGroup, Slo, find_replicas, serving_slo

    workload = asked.workload
    group = ReplicaGroup("pool", times_of(workload, asked.pool, asked.operation, case, factor))
    slo = serving_slo(workload) or Slo(e2e_s=float(HOURS_PER_DAY * SECONDS_PER_HOUR))
    try:
        found = find_replicas(_source(workload, day), group, slo=slo)
    except InfeasibleError as error:
        raise CannotServeError(str(error)) from error
    run = found.simulation
    return Burst(
        found.replicas,
        run.count("requests_in_slo") / max(run.count("requests"), 1),
        run.count("output_tokens_in_slo") / max(run.count("output_tokens"), 1),
    )


def _source(workload: Serving, day: tuple[float, ...]) -> Source:
    from pertoken.perf.simulate import read_trace, serving_source

    if workload.trace is None:
        return serving_source(workload, day)
    requests, first_s, last_s = 0, None, 0.0
    for chunk in read_trace(workload.trace).chunks():
        requests += len(chunk)
        first_s = float(chunk.arrival_s[0]) if first_s is None else first_s
        last_s = float(chunk.arrival_s[-1])
    lasted_s = last_s - (first_s or 0.0)
    if requests < 2 or lasted_s <= 0:
        raise CannotServeError(
            f"trace {workload.trace.name} has no two requests apart: its rate is not known"
        )
    per_hour = (requests - 1) / lasted_s * SECONDS_PER_HOUR
    return read_trace(workload.trace, rate_factor=max(day) / per_hour)
