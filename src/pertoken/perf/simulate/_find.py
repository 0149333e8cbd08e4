"""The fewest replicas that meet an SLO: doubling, then bisection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pertoken.errors import InfeasibleError, InputError
from pertoken.perf.simulate._cluster import Run
from pertoken.perf.simulate._requests import Source
from pertoken.perf.simulate._result import Simulation, Slo
from pertoken.perf.simulate._settings import Engine, ReplicaGroup, Router

_MOST_REPLICAS = 4096


@dataclass(frozen=True)
class Found:
    """The fewest replicas that meet the SLO, their simulation, and each number tried with its attainment.

    Assumes that more replicas never attain less. `tried` shows it: the number below fails, this one meets.
    A run that could no longer meet the SLO was stopped, its attainment is an upper bound.
    """

    replicas: int
    simulation: Simulation
    tried: tuple[tuple[int, float], ...]


def find_replicas(
    source: Source,
    group: ReplicaGroup,
    *,
    slo: Slo,
    others: Sequence[ReplicaGroup] = (),
    engine: Engine | None = None,
    router: Router = "least-loaded",
    most: int = _MOST_REPLICAS,
    duration_s: float = 0.0,
    bin_s: float = 60.0,
    progress: Callable[[float], None] | None = None,
) -> Found:
    """The fewest replicas of the group with which the share of requests in SLO reaches slo.met_fraction.

    Doubles until the SLO is met, then bisects; a run that can no longer meet it is stopped. `others` are groups that
    stay as they are. Raises InfeasibleError if a request alone on a replica already misses too often, or if `most`
    replicas are not enough, naming the bound in the way.
    """
    engine = engine or Engine()
    total = _count_and_check_alone(source, group, slo, engine, alone=not others and group.role == "both")
    allowed = total * (1.0 - slo.met_fraction) + 1e-9 * total
    tried: list[tuple[int, float]] = []
    runs: dict[int, Run] = {}

    def meets(count: int) -> bool:
        sim = Run(source, [replace(group, replicas=count), *others], slo, engine, router, None, 0, bin_s, 0)
        met = sim.feed(None, allowed)
        tried.append((count, 1.0 - sim.misses() / total))
        if met:
            runs.clear()
            runs[count] = sim
        if progress:
            progress(1.0 - 0.5 ** len(tried))
        return met

    low, high = 0, 1
    while not meets(high):
        if high >= most:
            raise _infeasible(group, slo, most, tried[-1][1])
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if meets(middle):
            high = middle
        else:
            low = middle
    return Found(high, runs[high].result(duration_s), tuple(sorted(tried)))


def _infeasible(group: ReplicaGroup, slo: Slo, most: int, attained: float) -> InfeasibleError:
    return InfeasibleError(
        f"{most} replicas of {group.pool} are not enough: at most {attained:.2%} of requests meet {slo.text()}, "
        f"{slo.met_fraction:.2%} must; allow more replicas or a looser bound"
    )


def _count_and_check_alone(
    source: Source, group: ReplicaGroup, slo: Slo, engine: Engine, *, alone: bool
) -> int:
    """Requests of the source; raises if too many miss the SLO even with a replica to themselves.

    Alone: ttft = Σ over chunks of (step + prefill), tpot = decode_s[1] + context_s × mean context.
    """
    times, count, misses = group.times, 0, 0
    for chunk in source.chunks():
        count += len(chunk)
        if not alone or source.block_tokens:
            continue
        p, o = chunk.input_tokens.astype(np.float64), chunk.output_tokens.astype(np.float64)
        cached = 0.0 if chunk.cached_tokens is None else np.minimum(chunk.cached_tokens, p - 1)
        rest = p - cached
        ttft_s = rest * (times.prefill_s + times.prefill_context_s * (cached + 0.5 * rest))
        ttft_s += np.ceil(rest / engine.chunk_tokens) * times.step_s
        tpot_s = np.where(o > 1, times.decode_s[1] + times.context_s * (p + 0.5 * o), 0.0)
        e2e_s = ttft_s + (o - 1) * tpot_s
        ok = (ttft_s <= slo.ttft_s) & (tpot_s <= slo.tpot_s) & (e2e_s <= slo.e2e_s)
        ok &= p + o - 1 <= times.kv_capacity_tokens
        misses += int((~ok).sum())
    if count == 0:
        raise InputError("no requests: the source is empty")
    if misses > count * (1.0 - slo.met_fraction) + 1e-9 * count:
        raise InfeasibleError(
            f"no number of {group.pool} replicas meets {slo.text()}: with a replica to itself only "
            f"{1 - misses / count:.2%} of requests do, {slo.met_fraction:.2%} must; "
            "loosen the bound or take a faster GPU"
        )
    return count
