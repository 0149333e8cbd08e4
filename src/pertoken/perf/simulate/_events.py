"""All replicas: the router, the queue a request joins, the loop over what happens next."""

from __future__ import annotations

from math import ceil, inf, sqrt
from typing import Any

from pertoken.perf.simulate._accounts import flush, rest_until
from pertoken.perf.simulate._cache import match
from pertoken.perf.simulate._handoffs import pop
from pertoken.perf.simulate._kernel import commit, decode_s, evict_by, plan
from pertoken.perf.simulate._memory import (
    add,
    entry,
    f64,
    i32,
    i64,
    jit,
    jit_call,
    put_f64,
    put_i32,
)
from pertoken.perf.simulate._state import (
    ARRIVALS,
    BOTH,
    BOUNDARY,
    DECODE,
    DRAINING,
    IDLE,
    OFF,
    ON,
    ONLY_DECODE,
    ONLY_PREFILL,
    PREFILL,
    PREFIX_AFFINE,
    REJECTED,
    ROUND_ROBIN,
    group_at,
    node_at,
    replica_at,
)


@jit_call
def _choose(w: Any, i: int, t: float, role: int) -> Any:
    """The replica the router gives request i at time t."""
    n = node_at(w.node_p, i)
    replicas = w.replicas
    if w.router == ROUND_ROBIN and role != ONLY_DECODE:
        for _ in range(replicas):
            r = w.turn
            w.turn = r + 1 if r + 1 < replicas else 0
            rep = replica_at(w.replica_p, r)
            if rep.status == ON and rep.ready_s <= t and rep.role == role:
                return r
    best, least = -1, inf
    favourite, favourite_load, favourite_weight, hits = -1, inf, 1.0, 0
    for r in range(replicas):
        rep = replica_at(w.replica_p, r)
        if rep.status != ON or rep.ready_s > t or rep.role != role:
            continue
        weight = group_at(rep.group_p, 0).weight
        load = rep.outstanding / weight
        if load < least:
            best, least = r, load
        if w.router == PREFIX_AFFINE and n.blocks > 0 and role != ONLY_DECODE:
            if rep.k > 1 and rep.unreferenced > 0 and (rep.kind == DECODE or rep.kind == PREFILL):
                evict_by(w, rep, t)
            found = match(w, rep, n.hashes, n.blocks)
            if found > hits or (found == hits and found > 0 and load < favourite_load):
                favourite, favourite_load, favourite_weight, hits = r, load, weight, found
    if favourite >= 0 and favourite_load <= 1.5 * least + 4.0 / favourite_weight:
        return favourite
    return best


@jit
def _enqueue(w: Any, rep: Any, i: int, t: float) -> None:
    """Request i reaches replica r at t: queue it, and end a decode jump at the first boundary not before t."""
    n = node_at(w.node_p, i)
    group = group_at(rep.group_p, 0)
    if rep.waiting >= w.max_queue or n.input + n.output - 1 > group.capacity:
        add(rep.sums_p, REJECTED, 1.0)
        n.seq = -1
        n.next = w.free
        w.free = i
        w.clients += 1
        w.gone += 1
        w.now = t
        return
    first = True
    for p in range(n.priority + 1):
        if i32(rep.queue_p, 2 * p) >= 0:
            first = False
    n.next = -1
    last = i32(rep.queue_p, 2 * n.priority + 1)
    if last < 0:
        put_i32(rep.queue_p, 2 * n.priority, i)
    else:
        node_at(w.node_p, last).next = i
    put_i32(rep.queue_p, 2 * n.priority + 1, i)
    rep.waiting += 1
    rep.outstanding += 1
    if rep.kind == IDLE:
        rest_until(w, rep, t)
        rep.kind = BOUNDARY
        put_f64(rep.key_p, 0, t)
        return
    if rep.kind == BOUNDARY:
        return
    rep.late += 1
    rep.late_s += t - rep.t
    if rep.kind == DECODE and first and rep.batch < group.max_batch and rep.k > 1:
        if w.block == 0 and rep.kv + rep.batch + n.input > group.limit:
            return
        _cut(w, rep, t)


@jit
def _cut(w: Any, rep: Any, t: float) -> None:
    """End the decode jump after the fewest steps that reach t."""
    half = 0.5 * group_at(rep.group_p, 0).context_s * rep.batch
    linear = (
        f64(group_at(rep.group_p, 0).decode_p, rep.batch)
        + group_at(rep.group_p, 0).context_s * rep.context
        + half
    )
    wanted = t - rep.t
    k = ceil(2.0 * wanted / (linear + sqrt(linear * linear + 4.0 * half * wanted)))
    k = min(max(k, 1), rep.k)
    while k > 1 and rep.t + decode_s(w, rep, k - 1) >= t:
        k -= 1
    while k < rep.k and rep.t + decode_s(w, rep, k) < t:
        k += 1
    rep.k = k
    rep.out_s = decode_s(w, rep, k)
    rep.t_end = rep.t + rep.out_s
    put_f64(rep.key_p, 0, rep.t_end)


@jit
def _due(w: Any, start: int, horizon: float, lazy: bool) -> Any:
    """A replica with something to do before the horizon, or −1.

    Lazily: the next one from `start` on, each in its own time. Otherwise in the order of time over all replicas,
    ends of segments before beginnings.
    """
    replicas = w.replicas
    if lazy:
        for r in range(start, replicas):
            if f64(w.key_p, r) < horizon or (
                f64(w.key_p, r) == horizon and replica_at(w.replica_p, r).kind != BOUNDARY
            ):
                return r
        return -1
    best, best_t, best_begins = -1, horizon, True
    for r in range(replicas):
        t = f64(w.key_p, r)
        if t > best_t or t == inf:
            continue
        begins = replica_at(w.replica_p, r).kind == BOUNDARY
        if t < best_t or (best_begins and not begins):
            best, best_t, best_begins = r, t, begins
    return best


@jit
def _take(w: Any, position: int, t: float) -> Any:
    """Make a node of request `position` of the chunk, arriving at t."""
    i = w.free
    n = node_at(w.node_p, i)
    w.free = n.next
    n.arrival = t
    n.seq = w.seq
    w.seq += 1
    n.input = i32(w.input_p, position)
    n.output = i32(w.output_p, position)
    n.cached = i32(w.cached_p, position) if w.cached_p != 0 else 0
    n.priority = i32(w.priority_p, position) if w.priority_p != 0 else 0
    n.generated = 0
    n.reach = 0
    n.prefilled = 0
    n.blocks = 0
    if w.block > 0 and w.blocks_p != 0:
        n.hashes = i64(w.at_p, position)
        n.blocks = i32(w.blocks_p, position)
    return i


@entry
def run(world: Any, position: int, until: float) -> Any:
    """Advance to `until` [s], taking in requests of the chunk from `position` on; returns the first not taken in.

    Open loop: requests come at their arrival times. Closed loop: whenever a client is free.
    """
    w = world[0]
    lazy = w.closed == 0 and w.disaggregated == 0
    cursor = 0
    while True:
        arriving = inf
        if position < w.count:
            if w.closed == 0:
                arriving = f64(w.arrival_p, position)
            elif w.clients > 0:
                arriving = w.now
        elif w.count > 0 and w.closed != 0 and w.clients > 0:
            return position  # the client's next request is in the next chunk
        handing = f64(w.handoff_s_p, 0) if w.handoffs > 0 else inf
        horizon = min(arriving, handing, until)
        r = _due(w, cursor, horizon, lazy)
        if r >= 0:
            cursor = r
            rep = replica_at(w.replica_p, r)
            if rep.kind == BOUNDARY:
                plan(w, rep)
            else:
                commit(w, rep)
            continue
        cursor = 0
        role = ONLY_PREFILL if w.disaggregated != 0 else BOTH
        if handing <= horizon:
            i = pop(w)
            node_at(w.node_p, i).prefilled = 1
            t = handing
            role = ONLY_DECODE
        elif arriving <= horizon:
            i = _take(w, position, arriving)
            position += 1
            w.clients -= 1
            t = arriving
        else:
            return position
        r = _choose(w, i, t, role) if w.replicas > 1 else 0
        rep = replica_at(w.replica_p, r)
        if role != ONLY_DECODE:
            add(rep.sums_p, ARRIVALS, 1.0)
        _enqueue(w, rep, i, t)


@entry
def rest_all(world: Any, t: float) -> None:
    """Book idle time of all replicas that are held up to t, and hand over their sums."""
    w = world[0]
    for r in range(w.replicas):
        rep = replica_at(w.replica_p, r)
        if rep.status != OFF:
            rest_until(w, rep, t)
        flush(w, rep)


@entry
def switch_on(world: Any, r: int, t: float, ready: float) -> None:
    """Hold replica r from t on; it takes requests from `ready` on."""
    w = world[0]
    rep = replica_at(w.replica_p, r)
    flush(w, rep)
    rep.bin = int(t / w.bin_s)
    rep.bin_end = (rep.bin + 1) * w.bin_s
    rep.t = t
    rep.ready_s = ready
    rep.status = ON


@entry
def switch_off(world: Any, r: int, t: float) -> None:
    """Give replica r no more requests; it is let go at t, or once it has finished what it has."""
    w = world[0]
    rep = replica_at(w.replica_p, r)
    if rep.kind == IDLE:
        rest_until(w, rep, t)
        rep.status = OFF
    else:
        rep.status = DRAINING
