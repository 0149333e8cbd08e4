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

So the sliced problem is not solved as it is written. GPUs for any share come first: their cost is a bound. With
those GPUs the shares that leave most capacity free are a vertex of a linear program: no more buckets are cut than
there are GPU types, and the few cut ones are given out in slices. Where that fits, and mostly it does, the sliced
optimum is found and proven; else the whole program is solved with its slices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pertoken.errors import CannotServeError, InputError, PerTokenError
from pertoken.plan._instance import Bools, Floats, Ints
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
    watch = Watch(time_limit_s)
    counts, part, bound = _solved(usd_per_hour, rate[:, used], requests[used], 0, most, gap, watch)
    if slices:
        cut = _in_slices(counts, rate[:, used], requests[used], slices)
        if cut is None:
            counts, part, bound = _solved(
                usd_per_hour, rate[:, used], requests[used], slices, most, gap, watch
            )
        else:
            part = cut
    share = np.zeros(rate.shape)
    share[:, used] = part
    return Mix(counts, share, float(usd_per_hour @ counts), bound)


def _solved(
    usd_per_hour: Floats,
    rate: Floats,
    requests: Floats,
    slices: int,
    most: Floats | None,
    gap: float,
    watch: Watch,
) -> tuple[Ints, Floats, float]:
    """GPUs of each type, shares, and the bound in USD per hour."""
    G = len(usd_per_hour)
    session = Session(_program(usd_per_hour, rate, requests, slices, most), watch)
    if not session.integer(gap, None, watch.left_s()):
        if session.status == "infeasible":
            raise CannotServeError("there are too few GPUs of every type to serve all requests")
        raise PerTokenError(f"no GPU mix found within {watch.time_limit_s:g} s ({session.status})")
    counts = np.round(session.x[:G]).astype(np.int64)
    return counts, session.x[G:].reshape(rate.shape) / max(slices, 1), session.mip_bound


def _in_slices(counts: Ints, rate: Floats, requests: Floats, slices: int) -> Floats | None:
    """Shares in whole slices that these GPUs carry; None where rounding finds none.

    Parameters: counts: GPUs of each type [(G,)]; rate [1/s, (G, B)]; requests [1/s, (B,)].
    """
    on = np.flatnonzero(counts > 0)
    can = rate[on] > 0
    load = np.where(can, requests / np.where(can, rate[on], 1.0), 0.0) / counts[on][:, None]
    wide = _most_free(load, can)
    if wide is None:
        return None
    whole = np.floor(wide * slices + _ALMOST)
    free = 1.0 - (whole * load).sum(axis=1) / slices
    each = np.where(can, load, np.inf) / slices
    left = np.round(slices - whole.sum(axis=0)).astype(np.int64)
    # What fits worst is given out first: the slices that weigh most even where they weigh least.
    for b in sorted(np.flatnonzero(left), key=lambda b: -float(each[:, b].min())):
        for _ in range(int(left[b])):
            g = int(np.argmax(free - each[:, b]))
            whole[g, b] += 1
            free[g] -= each[g, b]
    if (free < -_ALMOST).any():
        return None
    found = np.zeros(rate.shape)
    found[on] = whole / slices
    return found


_ALMOST = 1e-9


def _most_free(load: Floats, can: Bools) -> Floats | None:
    """Shares at a vertex that leave the fullest type as free as can be, shape (G, B); None where none exist."""
    G, B = load.shape
    share = 1 + np.arange(G * B).reshape(G, B)
    # Column 0 is the load of the fullest type; rows as in `_program`.
    full = np.zeros((G, 1), dtype=np.int64)
    index = np.concatenate([np.concatenate([full, share], axis=1).ravel(), share.T.ravel()])
    value = np.concatenate([np.concatenate([-np.ones((G, 1)), load], axis=1).ravel(), np.ones(G * B)])
    start = np.concatenate([np.arange(G) * (B + 1), G * (B + 1) + np.arange(B + 1) * G])
    cost, none = np.eye(1, 1 + G * B)[0], np.zeros(1 + G * B)
    program = Program(
        cost=cost, cost_offset=0.0, carbon=none, tokens=none, objective=cost, objective_offset=0.0, maximise=False,
        lower=none, upper=np.concatenate([[INF], can.ravel().astype(np.float64)]),
        integer=np.zeros(1 + G * B, dtype=np.bool_),
        row_lower=np.concatenate([np.full(G, -INF), np.ones(B)]),
        row_upper=np.concatenate([np.zeros(G), np.ones(B)]),
        start=start.astype(np.int32), index=index.astype(np.int32), value=value,
        columns={"share": share}, blocks=(), class_scale=np.ones(B),
    )  # fmt: skip
    session = Session(program, Watch(10.0))
    if not session.relax():
        return None
    return np.asarray(session.x[1:].reshape(G, B), dtype=np.float64)


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
