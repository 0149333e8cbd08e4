"""Which GPUs, and how many of each, for one hour of requests of many sizes: the allocation problem of
Mélange.

Sets: GPU types g, size buckets b.
Variables: gpus[g] whole GPUs bought; share[g,b] of bucket b's requests that type g serves.
Objective: least Σ_g usd_per_hour[g]·gpus[g].
s.t.
  serve[b]     Σ_g share[g,b] = 1
  capacity[g]  Σ_b share[g,b]·requests[b] / rate[g,b] ≤ gpus[g]

Mélange (Griggs et al., 2024, https://arxiv.org/abs/2404.14527) cuts each bucket into `slices` equal parts and
gives every slice whole to one GPU type: a binary for each slice and type (16 × 240 × 8 = 30,720 for its
larger instance), many of them interchangeable. Here the slices of a bucket are counted, not named: one whole
number 0 to `slices` for each type and bucket; and without `slices` the share is any fraction, which a router
can do as well. Every sliced assignment is such a share, so the optimum without slices is never dearer than
the published formulation's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pertoken.errors import CannotServeError, InputError, PerTokenError
from pertoken.plan._instance import Floats, Ints
from pertoken.plan._program import INF, Program
from pertoken.plan._solve import Session, Watch


@dataclass(frozen=True)
class Mix:
    """GPUs of each type, the share of each bucket each type serves, and what the GPUs cost per hour."""

    gpus: Ints
    share: Floats
    usd_per_hour: float
    bound_usd_per_hour: float


def mix(
    usd_per_hour: Floats,
    rate: Floats,
    requests: Floats,
    *,
    slices: int = 0,
    most: Floats | None = None,
    gap: float = 0.0,
    time_limit_s: float = 60.0,
) -> Mix:
    """The cheapest whole GPUs that serve all buckets.

    Parameters: usd_per_hour [USD per GPU·h, (G,)]; rate: requests per second one GPU sustains of each bucket
    within the SLO, 0 where it cannot [1/s, (G, B)]; requests [1/s, (B,)]; slices: into how many equal parts a
    bucket may be cut (0: any share); most: GPUs there are of each type [(G,)]. Formula: see the module.
    Raises InputError on shapes or signs that cannot be meant, CannotServeError naming a bucket that no type
    serves, or where `most` is too few.

    >>> a10g_and_a100 = np.array([[2, 1, 5, 2], [20, 20, 40, 20]], dtype=float)
    >>> found = mix(np.array([1.01, 3.67]), a10g_and_a100, 30 * np.array([.2, .1, .5, .2]), slices=1)
    >>> found.gpus.tolist(), round(found.usd_per_hour, 2)
    ([3, 1], 6.7)
    """
    _check(usd_per_hour, rate, requests, slices)
    used = np.flatnonzero(requests > 0)
    dead = used[~(rate[:, used] > 0).any(axis=0)]
    if len(dead):
        raise CannotServeError(
            f"no GPU type serves bucket {int(dead[0])} within the SLO ({len(dead)} such buckets)"
        )
    program = _program(usd_per_hour, rate[:, used], requests[used], slices, most)
    session = Session(program, Watch(time_limit_s))
    if not session.integer(gap, None, time_limit_s):
        if session.status == "infeasible":
            raise CannotServeError("there are too few GPUs of every type to serve all requests")
        raise PerTokenError(f"no GPU mix found within {time_limit_s:g} s ({session.status})")
    counts = np.round(session.x[: len(usd_per_hour)]).astype(np.int64)
    share = np.zeros(rate.shape)
    share[:, used] = session.x[len(usd_per_hour) :].reshape(len(usd_per_hour), len(used)) / max(slices, 1)
    return Mix(counts, share, float(usd_per_hour @ counts), session.mip_bound)


def _check(usd_per_hour: Floats, rate: Floats, requests: Floats, slices: int) -> None:
    if rate.shape != (len(usd_per_hour), len(requests)):
        raise InputError(
            f"rates have shape {rate.shape}, expected {(len(usd_per_hour), len(requests))} (GPU types × buckets)"
        )
    for name, values in (("price", usd_per_hour), ("rate", rate), ("request", requests)):
        if not np.isfinite(values).all() or (values < 0).any():
            raise InputError(f"a {name} of the GPU mix is negative or not finite")
    if slices < 0:
        raise InputError(f"slices must be 0 (any share) or more, found {slices}")


def _program(
    usd_per_hour: Floats, rate: Floats, requests: Floats, slices: int, most: Floats | None
) -> Program:
    G, B = rate.shape
    parts = max(slices, 1)
    can = rate > 0
    need = np.where(can, requests / np.where(can, rate, 1.0), 0.0) / parts
    columns = G + G * B
    share = G + np.arange(G * B).reshape(G, B)
    # Rows: capacity of each type, then serve of each bucket; both built row by row.
    capacity_index = np.concatenate([np.arange(G)[:, None], share], axis=1)
    capacity_value = np.concatenate([-np.ones((G, 1)), need], axis=1)
    start = np.concatenate([np.arange(G) * (B + 1), G * (B + 1) + np.arange(B + 1) * G])
    upper = np.concatenate(
        [np.full(G, INF) if most is None else most, np.where(can, float(parts), 0.0).ravel()]
    )
    cost = np.concatenate([usd_per_hour, np.zeros(G * B)])
    whole = np.concatenate([np.ones(G, dtype=np.bool_), np.full(G * B, slices > 0)])
    none = np.zeros(columns)
    return Program(
        cost=cost, cost_offset=0.0, carbon=none, tokens=none, objective=cost, objective_offset=0.0, maximise=False,
        lower=none, upper=upper, integer=whole,
        row_lower=np.concatenate([np.full(G, -INF), np.full(B, float(parts))]),
        row_upper=np.concatenate([np.zeros(G), np.full(B, float(parts))]),
        start=start.astype(np.int32),
        index=np.concatenate([capacity_index.ravel(), share.T.ravel()]).astype(np.int32),
        value=np.concatenate([capacity_value.ravel(), np.ones(G * B)]),
        columns={"gpus": np.arange(G), "share": share}, blocks=(), class_scale=np.ones(B),
    )  # fmt: skip
