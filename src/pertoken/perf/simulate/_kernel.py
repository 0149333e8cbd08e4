"""The event-jump kernel: between an arrival, a finish, a chunk's end and a full cache nothing changes.

So k steps are one: with b sequences decoding over c cached tokens, k decode steps take

    k × decode_s[b] + context_s × (k c + b k (k + 1) / 2)

and an arrival at time a ends the jump at the first step boundary not before a, the positive root of a quadratic.
A replica alternates between *boundary* (everything known, nothing decided) and *segment* (k steps decided). A
segment begins only once every arrival up to its beginning is known; a finish at t is visible to an arrival at t.
"""

from __future__ import annotations

from math import inf
from typing import Any

from pertoken.perf.simulate._accounts import account
from pertoken.perf.simulate._cache import evict, pin, release
from pertoken.perf.simulate._handoffs import push
from pertoken.perf.simulate._memory import (
    add,
    f64,
    float_bits,
    i32,
    i64,
    jit,
    jit_call,
    put_f64,
    put_i32,
    put_i64,
    trailing_zeros,
)
from pertoken.perf.simulate._state import (
    BOUNDARY,
    CACHED_TOKENS,
    DECODE,
    DRAINING,
    E2E_OK,
    HISTOGRAM_BINS,
    HISTOGRAM_FIRST,
    HISTOGRAM_SHIFT,
    IDLE,
    IN_SLO,
    IN_TOKENS,
    OFF,
    ONLY_PREFILL,
    OUT_TOKENS,
    OUT_TOKENS_IN_SLO,
    PREEMPTED,
    PREFILL,
    RECOMPUTED,
    REQUESTS,
    TPOT_OK,
    TTFT_OK,
    WHEEL,
    WHEEL_MASK,
    WORDS,
    group_at,
    node_at,
)

# --- the wheel of finishing steps ----------------------------------------------------------------------------


@jit
def _next_finish(w: Any, rep: Any, step: int) -> Any:
    """The first step after `step` whose bucket is not empty; there must be one."""
    start = (step + 1) & WHEEL_MASK
    word = start >> 6
    bits = i64(rep.bits_p, word) & (-1 << (start & 63))
    while bits == 0:
        word = (word + 1) & (WORDS - 1)
        bits = i64(rep.bits_p, word)
    place = (word << 6) | trailing_zeros(bits)
    return step + 1 + ((place - start) & WHEEL_MASK)


@jit
def _join(w: Any, rep: Any, i: int, steps: int, tokens: int) -> None:
    """Request i decodes from now on, for `steps` more steps, over `tokens` in the cache."""
    finish = rep.step + steps
    place = finish & WHEEL_MASK
    head = i32(rep.wheel_p, place)
    node_at(w.node_p, i).finish = finish
    node_at(w.node_p, i).next = head
    put_i32(rep.wheel_p, place, i)
    if head < 0:
        put_i64(rep.bits_p, place >> 6, i64(rep.bits_p, place >> 6) | (1 << (place & 63)))
    visit = rep.step + 1 + ((place - rep.step - 1) & WHEEL_MASK)
    if rep.batch == 0 or visit < rep.next_finish:
        rep.next_finish = visit
    rep.batch += 1
    rep.context += tokens


@jit_call
def _take_victim(w: Any, rep: Any) -> Any:
    """Remove and return the youngest request of the lowest class; frees its memory."""
    victim, before, at = rep.partial, -1, -1
    for place in range(WHEEL):
        previous, i = -1, i32(rep.wheel_p, place)
        while i >= 0:
            a, b = node_at(w.node_p, i), node_at(w.node_p, max(victim, 0))
            if victim < 0 or (
                a.priority > b.priority or (a.priority == b.priority and a.admitted > b.admitted)
            ):
                victim, before, at = i, previous, place
            previous, i = i, node_at(w.node_p, i).next
    n = node_at(w.node_p, victim)
    if at < 0:
        rep.partial = -1
        _free_memory(w, rep, victim, n.input + n.generated, rep.partial_done)
        n.reach = max(n.reach, rep.partial_done)
        return victim
    if before < 0:
        put_i32(rep.wheel_p, at, n.next)
        if n.next < 0:
            put_i64(rep.bits_p, at >> 6, i64(rep.bits_p, at >> 6) & ~(1 << (at & 63)))
    else:
        node_at(w.node_p, before).next = n.next
    n.generated = n.output - (n.finish - rep.step)
    tokens = n.input + n.generated - 1
    n.reach = tokens
    rep.batch -= 1
    rep.context -= tokens
    _free_memory(w, rep, victim, tokens, tokens)
    if rep.batch > 0:
        rep.next_finish = _next_finish(w, rep, rep.step)
    return victim


# --- one replica -------------------------------------------------------------------------------------------


@jit
def _free_memory(w: Any, rep: Any, i: int, tokens: int, computed: int) -> None:
    n = node_at(w.node_p, i)
    if w.block > 0 and n.blocks > 0 and n.prefilled == 0:
        rep.kv -= tokens - n.blocks * w.block
        release(w, rep, n.hashes, n.blocks, computed // w.block)
    else:
        rep.kv -= tokens


@jit_call
def _preempt(w: Any, rep: Any) -> None:
    """Free memory until one more step fits: the youngest of the lowest class goes back to its queue's front."""
    while rep.batch > 0 and rep.kv + rep.batch > group_at(rep.group_p, 0).capacity:
        i = _take_victim(w, rep)
        n = node_at(w.node_p, i)
        n.prefilled = 0
        n.next = i32(rep.queue_p, 2 * n.priority)
        put_i32(rep.queue_p, 2 * n.priority, i)
        if n.next < 0:
            put_i32(rep.queue_p, 2 * n.priority + 1, i)
        rep.waiting += 1
        add(rep.sums_p, PREEMPTED, 1.0)


@jit
def _admit(w: Any, rep: Any) -> Any:
    """Take the next waiting request into memory and return it; −1 if none waits or it does not fit."""
    group = group_at(rep.group_p, 0)
    priority = 0
    while i32(rep.queue_p, 2 * priority) < 0:
        priority += 1
    i = i32(rep.queue_p, 2 * priority)
    n = node_at(w.node_p, i)
    total = n.input + n.generated if n.prefilled == 0 else n.input
    alone = rep.batch == 0 and rep.fresh == 0 and rep.partial < 0
    limit = group.capacity if alone else group.limit
    block = w.block
    done = 0
    if block > 0 and n.blocks > 0 and n.prefilled == 0:
        most = min(n.blocks, (total - 1) // block)
        hits = pin(w, rep, n.hashes, n.blocks, most, rep.batch + total, limit)
        if hits < 0:
            return -1
        rep.kv += total - n.blocks * block
        evict(w, rep, 0)
        done = hits * block
    else:
        if rep.kv + rep.batch + total + n.prefilled > limit:
            return -1
        rep.kv += total
        if block > 0:
            evict(w, rep, 0)
        done = min(n.cached, total - 1)
    if n.reach == 0:
        n.cached = done
    put_i32(rep.queue_p, 2 * priority, n.next)
    if n.next < 0:
        put_i32(rep.queue_p, 2 * priority + 1, -1)
    rep.waiting -= 1
    rep.admitted += 1
    n.admitted = rep.admitted
    rep.partial = i
    rep.partial_done = done
    return i


@jit
def _prompt_tokens(w: Any, rep: Any, tokens: int, steps: int) -> None:
    """Compute steps × tokens of the partial prompt; past its end it becomes fresh, ready to decode.

    Token j costs prefill_s + prefill_context_s × its position; what had been computed before is waste.
    """
    group = group_at(rep.group_p, 0)
    i = rep.partial
    n = node_at(w.node_p, i)
    done = rep.partial_done
    count = steps * tokens
    seconds = count * (group.prefill_s + group.prefill_context_s * (done + 0.5 * count))
    again = 0
    if n.reach > done:
        again = min(count, n.reach - done)
        rep.waste_s += seconds * again / count
        add(rep.sums_p, RECOMPUTED, again)
    rep.in_s += seconds
    if done + count == n.input + n.generated:
        put_i32(rep.fresh_p, rep.fresh, i)
        rep.fresh += 1
        rep.partial = -1
    else:
        rep.partial_done = done + count


@jit
def decode_s(w: Any, rep: Any, k: int) -> Any:
    """Seconds of k decode steps of the replica's batch."""
    b = rep.batch
    grown = k * rep.context + 0.5 * b * k * (k + 1.0)
    return k * f64(group_at(rep.group_p, 0).decode_p, b) + group_at(rep.group_p, 0).context_s * grown


@jit_call
def evict_by(w: Any, rep: Any, t: float) -> None:
    """Let go of cached blocks for the whole steps of the segment that have ended by t, as each step would have.

    j of its steps take j × (step_s if nothing decodes) + prefill of j × chunk tokens + decode_s(j).
    """
    group = group_at(rep.group_p, 0)
    if rep.kv + rep.k * rep.batch + rep.unreferenced * w.block <= group.capacity:
        return
    low, high = 0, rep.k - 1
    while low < high:
        j = (low + high + 1) // 2
        tokens = j * rep.chunk_tokens
        seconds = tokens * (group.prefill_s + group.prefill_context_s * (rep.chunk_done + 0.5 * tokens))
        seconds += decode_s(w, rep, j) if rep.batch > 0 else j * group.step_s
        if rep.t + seconds <= t:
            low = j
        else:
            high = j - 1
    evict(w, rep, low * rep.batch)


@jit
def plan(w: Any, rep: Any) -> None:
    """Decide the segment that begins at the replica's boundary."""
    group = group_at(rep.group_p, 0)
    rep.in_s = 0.0
    rep.waste_s = 0.0
    rep.chunk_tokens = 0
    preempted = False
    if rep.kv + rep.batch > group.capacity:
        _preempt(w, rep)
        preempted = True
    budget = group.chunk - rep.batch
    k = 1
    worked = False
    if rep.partial >= 0:
        worked = True
        n = node_at(w.node_p, rep.partial)
        rest = n.input + n.generated - rep.partial_done
        if rest > budget:
            k = (rest - 1) // budget
            if rep.batch > 0:
                k = min(k, rep.next_finish - rep.step, (group.capacity - rep.kv) // rep.batch)
            rep.chunk_tokens = budget
            rep.chunk_done = rep.partial_done
            _prompt_tokens(w, rep, budget, k)
            budget = 0
        else:
            _prompt_tokens(w, rep, rest, 1)
            budget -= rest
    if rep.waiting > 0 and not preempted:
        while budget > 0 and rep.waiting > 0 and rep.batch + rep.fresh < group.max_batch and rep.partial < 0:
            i = _admit(w, rep)
            if i < 0:
                break
            n = node_at(w.node_p, i)
            if n.prefilled > 0:
                rep.partial = -1
                _join(w, rep, i, n.output - 1, n.input)
                budget -= 1
                continue
            tokens = min(budget, n.input + n.generated - rep.partial_done)
            _prompt_tokens(w, rep, tokens, 1)
            budget -= tokens
            worked = True
    rep.waiting_then = rep.waiting
    if worked:
        rep.kind = PREFILL
        if rep.batch == 0:
            rep.in_s += k * group.step_s
    else:
        rep.kind = DECODE
        k = 1  # who was put back may return at the next step
        if not preempted:
            k = min(rep.next_finish - rep.step, (group.capacity - rep.kv) // rep.batch)
    rep.k = k
    rep.out_s = decode_s(w, rep, k) if rep.batch > 0 else 0.0
    rep.t_end = rep.t + (rep.in_s + rep.out_s)
    put_f64(rep.key_p, 0, rep.t_end)


@jit
def commit(w: Any, rep: Any) -> None:
    """Carry the planned segment out: time, tokens, finishes, first tokens."""
    t = rep.t_end
    account(w, rep, t)
    rep.t = t
    if rep.batch > 0:
        grown = rep.batch * rep.k
        rep.step += rep.k
        rep.context += grown
        rep.kv += grown
        if w.block > 0 and rep.unreferenced > 0:
            evict(w, rep, 0)
    if rep.batch > 0 and rep.step == rep.next_finish:
        place = rep.step & WHEEL_MASK
        i, kept = i32(rep.wheel_p, place), -1
        while i >= 0:
            following = node_at(w.node_p, i).next
            if node_at(w.node_p, i).finish == rep.step:
                n = node_at(w.node_p, i)
                tokens = n.input + n.output - 1
                rep.batch -= 1
                rep.context -= tokens
                _free_memory(w, rep, i, tokens, tokens)
                _finish(w, rep, i, t)
            else:
                node_at(w.node_p, i).next = kept
                kept = i
            i = following
        put_i32(rep.wheel_p, place, kept)
        if kept < 0:
            put_i64(rep.bits_p, place >> 6, i64(rep.bits_p, place >> 6) & ~(1 << (place & 63)))
        if rep.batch > 0:
            rep.next_finish = _next_finish(w, rep, rep.step)
    if rep.fresh > 0:
        fresh = rep.fresh
        rep.fresh = 0
        for j in range(fresh):
            _first_token(w, rep, i32(rep.fresh_p, j), t)
    rep.kind = BOUNDARY
    put_f64(rep.key_p, 0, t)
    if rep.batch == 0 and rep.waiting == 0 and rep.partial < 0:
        rep.kind = IDLE
        put_f64(rep.key_p, 0, inf)
        if rep.status == DRAINING:
            rep.status = OFF


@jit
def _first_token(w: Any, rep: Any, i: int, t: float) -> None:
    """A prompt is computed and gave a token: decode on, finish, or hand over to a decode replica."""
    n = node_at(w.node_p, i)
    if n.generated == 0:
        n.first = t
        add(rep.sums_p, IN_TOKENS, n.input - n.cached)
        add(rep.sums_p, CACHED_TOKENS, n.cached)
    tokens = n.input + n.generated
    n.generated += 1
    if n.generated < n.output and rep.role != ONLY_PREFILL:
        _join(w, rep, i, n.output - n.generated, tokens)
        return
    _free_memory(w, rep, i, tokens, tokens)
    if n.generated < n.output:
        rep.outstanding -= 1
        push(w, t + w.transfer_s + w.transfer_token_s * n.input, i)
        return
    _finish(w, rep, i, t)


@jit
def _count(w: Any, row: int, seconds: float) -> None:
    place = min(max((float_bits(seconds) >> HISTOGRAM_SHIFT) - HISTOGRAM_FIRST, 0), HISTOGRAM_BINS - 1)
    place += row * HISTOGRAM_BINS
    put_i64(w.histogram_p, place, i64(w.histogram_p, place) + 1)


@jit
def _finish(w: Any, rep: Any, i: int, t: float) -> None:
    """Request i is done at t: latency, SLO, node back to the pool."""
    n, sums = node_at(w.node_p, i), rep.sums_p
    ttft_s = n.first - n.arrival
    e2e_s = t - n.arrival
    histogram = 3 * n.priority
    _count(w, histogram, ttft_s)
    _count(w, histogram + 2, e2e_s)
    met = 0
    if ttft_s <= w.ttft_s:
        add(sums, TTFT_OK, 1.0)
        met += 1
    if e2e_s <= w.e2e_s:
        add(sums, E2E_OK, 1.0)
        met += 1
    tpot_s = 0.0
    if n.output > 1:
        tpot_s = (t - n.first) / (n.output - 1)
        _count(w, histogram + 1, tpot_s)
    if tpot_s <= w.tpot_s:
        add(sums, TPOT_OK, 1.0)
        met += 1
    add(sums, REQUESTS, 1.0)
    add(sums, OUT_TOKENS, n.output)
    if met == 3:
        add(sums, IN_SLO, 1.0)
        add(sums, OUT_TOKENS_IN_SLO, n.output)
    if n.seq < w.record:
        put_f64(w.first_p, n.seq, n.first)
        put_f64(w.finish_p, n.seq, t)
    rep.outstanding -= 1
    w.clients += 1
    w.gone += 1
    w.now = t
    n.seq = -1
    n.next = w.free
    w.free = i
