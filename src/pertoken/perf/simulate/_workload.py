"""A scenario's serving workload as a source of requests. Structural types: the scenario lies above this floor."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pertoken.perf.point import StepTimes
from pertoken.perf.simulate._requests import Source, Traffic
from pertoken.perf.simulate._result import Slo
from pertoken.perf.simulate._traces import read_trace
from pertoken.units import HOURS_PER_DAY, SECONDS_PER_HOUR

_PERCENT = 100.0


class _Tokens(Protocol):
    @property
    def mean(self) -> float: ...
    @property
    def cv(self) -> float: ...


class _Slo(Protocol):
    @property
    def ttft_s(self) -> float: ...
    @property
    def tpot_s(self) -> float: ...
    @property
    def percentile(self) -> float: ...


class Workload(Protocol):
    """What is read of a scenario's serving workload."""

    @property
    def input_tokens(self) -> float | _Tokens: ...
    @property
    def output_tokens(self) -> float | _Tokens: ...
    @property
    def cached_fraction(self) -> float: ...
    @property
    def slo(self) -> _Slo | None: ...
    @property
    def trace(self) -> Path | None: ...


def serving_source(
    workload: Workload, requests_per_hour: npt.ArrayLike, *, burstiness: float = 1.0, seed: int = 0
) -> Source:
    """The workload's trace where it names one, else seeded traffic of its shape and lengths.

    Parameters: requests_per_hour [requests, shape (T,)]: of each hour simulated, from the first (as
    `scenario.requests_per_hour` gives them); burstiness: squared coefficient of variation of the gaps between
    requests. Lengths are log-normal with the workload's mean and coefficient of variation.
    """
    if workload.trace is not None:
        return read_trace(workload.trace)
    per_hour = tuple(np.asarray(requests_per_hour, np.float64).tolist())
    input_mean, input_sigma = _lengths(workload.input_tokens)
    output_mean, output_sigma = _lengths(workload.output_tokens)
    return Traffic(
        requests_per_day=sum(per_hour) / max(len(per_hour), 1) * HOURS_PER_DAY,
        duration_s=float(len(per_hour) * SECONDS_PER_HOUR),
        input_mean_tokens=input_mean,
        output_mean_tokens=output_mean,
        input_log_sigma=input_sigma,
        output_log_sigma=output_sigma,
        per_hour=per_hour,
        burstiness=burstiness,
        cached_fraction=workload.cached_fraction,
        seed=seed,
    )


def serving_slo(workload: Workload) -> Slo | None:
    """The workload's SLO: its percentile is the share of requests that must keep both bounds."""
    if workload.slo is None:
        return None
    return Slo(workload.slo.ttft_s, workload.slo.tpot_s, met_fraction=workload.slo.percentile / _PERCENT)


def per_accepted_token(times: StepTimes, accepted_per_step: float, draft_fraction: float = 0.0) -> StepTimes:
    """Step times of one token kept, where a step keeps several: decode × (1 + draft_fraction) / accepted_per_step.

    Parameters as in a Point; `times` are those of a step that verifies the draft.
    """
    factor = (1.0 + draft_fraction) / accepted_per_step
    return replace(times, decode_s=times.decode_s * factor, context_s=times.context_s * factor)


def _lengths(tokens: float | _Tokens) -> tuple[float, float]:
    """Mean [token] and log standard deviation: σ² = ln(1 + cv²)."""
    if isinstance(tokens, (int, float)):
        return float(tokens), 0.0
    return tokens.mean, math.sqrt(math.log1p(tokens.cv**2))
