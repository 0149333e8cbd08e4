"""From work and coefficients to times: one decode step, one prompt, and the closed loop of requests between
them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pertoken.perf._coefficients import Coefficients
from pertoken.perf._work import Work, mean_min
from pertoken.perf.point import FloatLike, Floats
from pertoken.units import MILLISECONDS_PER_SECOND, TOKENS_PER_MTOK

MICRO = 1 / TOKENS_PER_MTOK
MILLI = 1 / MILLISECONDS_PER_SECOND
QUEUE_ROUNDS = 3
"""Fixed-point rounds of the closed loop; the fourth changes the result by less than one part in a
thousand."""


class Requests(NamedTuple):
    """What one request asks: prompt tokens computed and cached, output tokens, tokens kept per step, tokens
    checked per step, cost of a draft relative to a step."""

    computed: FloatLike
    cached: FloatLike
    output: FloatLike
    accepted: FloatLike
    verified: FloatLike
    draft: FloatLike
    held: FloatLike
    """Share of the output whose cache memory a running request holds, averaged over its life."""


class Loop(NamedTuple):
    """The closed loop's answer, arrays of one shape."""

    tokens_per_s: Floats
    ttft_s: Floats
    tpot_s: Floats
    prefill_fraction: Floats
    max_concurrency: Floats
    step_s: Floats
    cycle_s: Floats
    """A request's life: all admitted ones finish one request each in it."""
    admitted: Floats
    decoding: Floats
    decode_share: Floats
    """The layout's GPUs over all of the replica's: below 1 where others only prefill."""


class Context(NamedTuple):
    """Mean cached tokens attended to while decoding: all, within the window, within the top-k."""

    full: FloatLike
    window: FloatLike
    top: FloatLike


def decode_context(work: Work, requests: Requests) -> Context:
    """Contexts averaged over a request's decode steps."""
    low = np.asarray(requests.computed) + requests.cached
    high = low + requests.output
    return Context((low + high) / 2, mean_min(low, high, work.window), mean_min(low, high, work.top))


def cache_per_sequence_s(work: Work, context: Context) -> FloatLike:
    """Ideal seconds to read one sequence's cache for one step."""
    return (
        work.kv_full_s * context.full
        + work.kv_window_s * context.window
        + work.kv_top_s * context.top
        + work.kv_state_s
    )


def attention_per_token_s(work: Work, context: Context) -> FloatLike:
    """Ideal seconds of attention's FLOPs for one new token."""
    return (
        work.attention_full_s * context.full
        + work.attention_window_s * context.window
        + work.attention_top_s * context.top
    )


ALIKE = 0.85
"""Power of a step's tokens that choose experts as if each chose for itself: tokens of one batch resemble each other and
visit fewer experts than independent draws would. Chosen with models left out."""


def covered(work: Work, tokens: FloatLike) -> FloatLike:
    """Share of routed experts that a step of that many tokens visits: 1 − (1 − k/E)^(tokens^ALIKE)."""
    return -np.expm1(work.log_miss * np.maximum(tokens, 1.0) ** ALIKE)


def visited_s(work: Work, tokens: FloatLike) -> FloatLike:
    """Ideal seconds to read the routed experts that a step of that many tokens visits."""
    if not np.any(work.routed_s):
        return 0.0  # dense: a power and an exponential less per point
    return work.routed_s * covered(work, tokens)


def latency_s(work: Work, c: Coefficients) -> FloatLike:
    """Seconds of a step that no amount of bandwidth removes."""
    return c.step_ms * MILLI + MICRO * (
        c.kernel_us * work.kernels + c.expert_us * work.moe_layers + c.message_us * work.messages
    )


def decode_step_s(
    work: Work,
    c: Coefficients,
    sequences: FloatLike,
    verified: FloatLike,
    cache_s: FloatLike,
    attention_s: FloatLike,
) -> Floats:
    """Seconds for one decode step of `sequences` running requests of the replica (all ranks).

    Formula: reads of weights + GEMM FLOPs + cache reads + attention FLOPs + links + latency + per-sequence
    work, and never less than reading weights and caches at the datasheet's bandwidth takes. A pipeline of p
    stages runs p micro-batches.
    """
    micro = np.maximum(sequences / work.pp, 1.0)
    tokens = micro * verified
    rank = np.maximum(micro / work.dp, np.minimum(micro, 1.0))
    gemm = c.gemm * tokens * (work.dense_gemm_s + c.grouped * work.routed_gemm_s)
    visited = visited_s(work, tokens)
    read = c.always * work.always_s + c.routed * visited
    attend = rank * (c.cache * cache_s + c.attention * verified * attention_s)
    seconds: Floats = (
        read
        + gemm
        + attend
        + c.links * work.message_s * tokens
        + latency_s(work, c)
        + MICRO * rank * (c.sequence_us + c.row_us * work.kernels)
        + c.gather * work.gather_s * tokens
    )
    return np.maximum(seconds, work.always_s + visited + rank * cache_s)


def prompt_s(work: Work, c: Coefficients, requests: Requests) -> tuple[FloatLike, FloatLike]:
    """Seconds of the replica one prompt takes, and seconds until its own first token on an idle replica."""
    n, start = requests.computed, requests.cached
    end = np.asarray(n) + start
    context = Context((start + end) / 2, mean_min(start, end, work.window), mean_min(start, end, work.top))
    attention = (
        work.prompt_full_s * context.full
        + work.prompt_window_s * context.window
        + work.prompt_top_s * context.top
    )
    flops = c.prefill * (work.dense_gemm_s + c.grouped_prefill * work.routed_gemm_s)
    per_token = flops + c.attention * attention / work.dp + c.links * work.message_s
    request = c.request_ms * MILLI / work.dp
    shared = n * per_token / work.pp + request + c.stall * latency_s(work, c) / work.pp
    alone = n * per_token + request * work.dp
    read = c.always * work.always_s + c.routed * visited_s(work, n)
    return shared, np.maximum(alone, read) + c.eager * latency_s(work, c) + c.first_ms * MILLI


def max_sequences(work: Work, requests: Requests) -> Floats:
    """Requests whose caches fit in memory, all ranks together, by the memory they hold."""
    length = np.asarray(requests.computed) + requests.cached + np.asarray(requests.output) * requests.held
    per_sequence = (
        work.kv_full_bytes * length
        + work.kv_window_bytes * np.minimum(length, work.window)
        + work.kv_state_bytes
    )
    return np.asarray(np.maximum(np.floor(work.kv_memory_bytes / per_sequence), 0.0) * work.dp)


def running(c: Coefficients, concurrency: FloatLike, limit: FloatLike) -> Floats:
    """Requests an engine runs at once: those in flight less the slots being handed on, as far as memory and the
    engine's own limit allow."""
    asked = np.asarray(concurrency, dtype=np.float64)
    handed = c.slot * (1 - 1 / np.maximum(asked, 1.0))
    return np.maximum(np.minimum(np.minimum(asked - handed, limit), c.seats), 1.0)


def closed_loop(work: Work, c: Coefficients, requests: Requests, concurrency: FloatLike) -> Loop:
    """C requests in flight share the replica: each lives OSL decode steps, in which C prompts are computed
    too.

    Formulas: cycle = OSL/accepted × step(B) + R × prompt, R = min(C, KV limit), throughput = R × OSL /
    cycle; time to first token = own prompt + wait for others + wait for memory; B = R less those waiting for
    their first token; time per output token from Little's law, C = rate × (TTFT + OSL × TPOT).
    """
    limit = max_sequences(work, requests)
    admitted = running(c, concurrency, limit)
    context = decode_context(work, requests)
    cache_s, attention_s = cache_per_sequence_s(work, context), attention_per_token_s(work, context)
    shared, alone = prompt_s(work, c, requests)
    steps = np.asarray(requests.output) / requests.accepted
    decoding: Floats = np.asarray(admitted, dtype=np.float64)
    first: FloatLike = 0.0
    for _ in range(QUEUE_ROUNDS):
        step = decode_step_s(work, c, decoding, requests.verified, cache_s, attention_s) * (
            1 + requests.draft
        )
        cycle = steps * step + admitted * shared
        busy = admitted * shared / cycle
        first = alone + c.first_steps * step + c.queue * busy * 0.5 * (admitted - 1) * shared
        decoding = np.maximum(admitted * (1 - np.minimum(first / cycle, 0.9)), 1.0)
    rate = admitted / cycle
    tpot = np.maximum(cycle - first, steps * step * 0.5) / np.asarray(requests.output)
    ttft = first + np.maximum(concurrency - admitted, 0.0) / rate
    return Loop(
        rate * requests.output, ttft, tpot, busy, limit, step, cycle, admitted, decoding, np.ones(1)
    )  # fmt: skip


def utilisation(work: Work, requests: Requests, loop: Loop) -> tuple[Floats, Floats, Floats]:
    """Ideal seconds of compute, memory and links over the cycle's seconds, each 0 to 1, mean over all GPUs."""
    cache_s = cache_per_sequence_s(work, decode_context(work, requests))
    flops = work.dense_gemm_s + work.routed_gemm_s
    tokens = loop.decoding * requests.verified
    steps = np.asarray(requests.output) / requests.accepted
    context = (np.asarray(requests.computed) + 2 * np.asarray(requests.cached)) / 2
    prompt = requests.computed * (flops + work.prompt_full_s * context / work.dp)
    read = work.always_s + work.routed_s * covered(work, tokens) + loop.decoding / work.dp * cache_s
    compute = steps * tokens * flops + loop.admitted * prompt
    link = work.message_s * (steps * tokens + loop.admitted * requests.computed)
    share = loop.decode_share / loop.cycle_s
    return (
        np.minimum(compute * share, 1.0),
        np.minimum(steps * read * share, 1.0),
        np.minimum(link * share, 1.0),
    )


def split_loop(
    work: Work, c: Coefficients, requests: Requests, concurrency: FloatLike, prefill_gpus: FloatLike
) -> Loop:
    """The closed loop where `prefill_gpus` GPUs only prefill and the layout's GPUs only decode.

    Two stations, C requests: rate = min(C / (TTFT + OSL × TPOT), prompts the prefill GPUs can compute per
    second); time to first token from Little's law. Prefill GPUs are laid out like the decoding ones.
    """
    limit = max_sequences(work, requests)
    context = decode_context(work, requests)
    cache_s, attention_s = cache_per_sequence_s(work, context), attention_per_token_s(work, context)
    shared, alone = prompt_s(work, c, requests)
    scale = np.asarray(work.gpus) / np.asarray(prefill_gpus, dtype=np.float64)
    service, alone = shared * scale, alone * np.maximum(scale, 1.0)
    steps = np.asarray(requests.output) / requests.accepted
    decoding: Floats = np.maximum(np.minimum(np.asarray(concurrency, dtype=np.float64), limit), 1.0)
    rate: Floats = np.zeros(1)
    busy: Floats = np.zeros(1)
    for _ in range(3 * QUEUE_ROUNDS):
        step = decode_step_s(work, c, decoding, requests.verified, cache_s, attention_s) * (
            1 + requests.draft
        )
        wait = alone + c.queue * busy * 0.5 * concurrency * service
        rate = np.minimum(
            np.minimum(concurrency / (wait + steps * step), 1 / service), limit / (steps * step)
        )
        busy = rate * service
        decoding = np.maximum(0.5 * decoding + 0.5 * rate * steps * step, 1.0)
    tpot = steps * step / np.asarray(requests.output)
    ttft = np.maximum(concurrency / rate - requests.output * tpot, alone)
    cycle = concurrency / rate
    decode_gpus = np.asarray(work.gpus)
    prefill = busy * prefill_gpus / (busy * prefill_gpus + decode_gpus)
    share = decode_gpus / (decode_gpus + prefill_gpus)
    cycle, admitted = concurrency / rate, np.asarray(concurrency, dtype=np.float64)
    return Loop(rate * requests.output, ttft, tpot, prefill, limit, step, cycle, admitted, decoding, share)
