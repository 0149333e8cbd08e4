"""Where replica time goes: to phases, in the time bin it falls into."""

from __future__ import annotations

from typing import Any

from pertoken.perf.simulate._memory import add, f64, jit, jit_call, put_f64
from pertoken.perf.simulate._state import (
    BATCH_S,
    FIELDS,
    IDLE_S,
    IN_S,
    KV_S,
    OUT_S,
    QUEUE_S,
    WASTE_S,
    group_at,
)


@jit_call
def _turn_bins(w: Any, rep: Any, seconds: float, batch: int, queue: float, kv: float, t: float) -> None:
    """Account a segment that ends at t beyond the current time bin: each bin gets its share of the time."""
    start = t - seconds
    rest = seconds
    in_s, out_s, waste_s, idle_s = rep.in_s - rep.waste_s, rep.out_s, rep.waste_s, 0.0
    if batch < 0:
        in_s, out_s, waste_s, idle_s, batch = 0.0, 0.0, 0.0, seconds, 0
    while True:
        part = min(rest, max(rep.bin_end - start, 0.0)) if t > rep.bin_end else rest
        share = part / rest if rest > 0.0 else 1.0
        sums = rep.sums_p
        given_in, given_out, given_waste, given_idle = (
            in_s * share,
            out_s * share,
            waste_s * share,
            idle_s * share,
        )
        given_queue = queue * share
        add(sums, IN_S, given_in)
        add(sums, OUT_S, given_out)
        add(sums, WASTE_S, given_waste)
        add(sums, IDLE_S, given_idle)
        add(sums, QUEUE_S, given_queue)
        add(sums, BATCH_S, batch * part)
        add(sums, KV_S, kv * part)
        in_s -= given_in
        out_s -= given_out
        waste_s -= given_waste
        idle_s -= given_idle
        queue -= given_queue
        rest -= part
        start += part
        if t <= rep.bin_end:
            return
        flush(w, rep)
        rep.bin += 1
        rep.bin_end = (rep.bin + 1) * w.bin_s


@jit
def flush(w: Any, rep: Any) -> None:
    """Add the replica's current sums to its group's time bin."""
    for f in range(FIELDS):
        add(group_at(rep.group_p, 0).sums_p, rep.bin * FIELDS + f, f64(rep.sums_p, f))
        put_f64(rep.sums_p, f, 0.0)


@jit
def account(w: Any, rep: Any, t: float) -> None:
    """Book the segment from the replica's t to t."""
    seconds = t - rep.t
    queue = rep.waiting_then * seconds
    if rep.late > 0:
        queue += rep.late * seconds - rep.late_s
        rep.late = 0
        rep.late_s = 0.0
    batch = rep.batch + rep.fresh + (1 if rep.partial >= 0 else 0)
    kv = rep.kv + 0.5 * rep.batch * (rep.k + 1)
    if t > rep.bin_end:
        _turn_bins(w, rep, seconds, batch, queue, kv, t)
        return
    sums = rep.sums_p
    add(sums, IN_S, rep.in_s - rep.waste_s)
    add(sums, OUT_S, rep.out_s)
    if rep.waste_s > 0.0:
        add(sums, WASTE_S, rep.waste_s)
    add(sums, BATCH_S, batch * seconds)
    add(sums, QUEUE_S, queue)
    add(sums, KV_S, kv * seconds)


@jit_call
def rest_until(w: Any, rep: Any, t: float) -> None:
    """Book idle time of a replica up to t."""
    if t > rep.t:
        if t > rep.bin_end:
            _turn_bins(w, rep, t - rep.t, -1, 0.0, 0.0, t)
        else:
            add(rep.sums_p, IDLE_S, t - rep.t)
        rep.t = t
