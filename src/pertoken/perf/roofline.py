"""The serving predictor: a roofline of prefill and decode with fitted efficiencies, closed over the requests
in flight.

>>> from pertoken.catalog.gpus import gpu
>>> from pertoken.catalog.models import model
>>> from pertoken.perf.point import Layout, Point
>>> at = Point(1000, 500, 16, precision="fp8", layout=Layout(tp=4))
>>> answer = predict(model("Llama-3.3-70B-Instruct"), gpu("H100-SXM"), at)
>>> bool(answer.tokens_per_s.low < answer.tokens_per_s.value < answer.tokens_per_s.high)
True
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import numpy.typing as npt

from pertoken.catalog.gpus import Gpu
from pertoken.catalog.models import Model
from pertoken.errors import CannotServeError, InputError
from pertoken.perf import _steps
from pertoken.perf._coefficients import Lookup, lookup
from pertoken.perf._steps import Loop, Requests
from pertoken.perf._work import Formats, Work, formats, held_fraction, precision_name, work
from pertoken.perf.point import FloatLike, Floats, Interval, Layout, Point, Prediction, StepTimes
from pertoken.perf.power import gpu_power_w, power_log_spread

BLOCK = 16_384
"""Points computed at once: small enough for the processor's cache."""


def predict(model: Model, gpu: Gpu, point: Point) -> Prediction:
    """What one replica does at an operating point: throughput, latencies, power, each with an 80 % interval.

    Parameters: model; gpu; point, whose float fields broadcast to the shape of the answer. With
    `prefill_gpus` the layout describes the decoding GPUs; the replica then has layout.gpus + prefill_gpus
    GPUs.
    Formula: `_steps.closed_loop` (or `_steps.split_loop`) over `_work.work` × fitted slowdowns.
    Raises InputError on a point that makes no sense (negative, not finite, cached beyond input),
    CannotServeError on weights or a single request that does not fit memory, a precision nothing supports, a
    context the model lacks.
    Source: the coefficient file names rows and date; the method is in docs/perf.md.
    """
    loop, used, found, fmt = _answer(model, gpu, point)
    tokens, ttft, tpot = found.spread_at(point.concurrency)
    return Prediction(
        tokens_per_s=_interval(loop.tokens_per_s, tokens),
        ttft_s=_interval(loop.ttft_s, ttft),
        tpot_s=_interval(loop.tpot_s, tpot),
        gpu_power_w=_gpu_power(model, gpu, point, used),
        prefill_fraction=loop.prefill_fraction,
        max_concurrency=loop.max_concurrency,
        basis=found.basis,
        source="; ".join(part for part in (found.source, fmt.note) if part),
    )


def utilisations(model: Model, gpu: Gpu, point: Point) -> tuple[Floats, Floats, Floats]:
    """Shares of the hardware's peak that are in use on average: (compute, memory bandwidth, links), each 0
    to 1.

    Parameters and errors as `predict`. Formula: ideal seconds of each resource over the seconds of the cycle.
    """
    return _answer(model, gpu, point)[1]


def _answer(model: Model, gpu: Gpu, point: Point) -> tuple[Loop, Used, Lookup, Formats]:
    fmt = formats(gpu, point.precision, point.kv_precision)
    layout_work = work(model, gpu, checked_layout(point.layout), fmt)
    found = lookup(model, gpu, point.engine, point.precision, split=point.prefill_gpus > 0)
    arrays = checked_point(model, point)
    shape = arrays[0].shape
    flat = [np.ravel(a) for a in arrays]
    parts = [
        _block(layout_work, found, point, *(a[i : i + BLOCK] for a in flat))
        for i in range(0, max(flat[0].size, 1), BLOCK)
    ]
    loop = Loop(*(_whole([p[0][k] for p in parts], shape) for k in range(len(Loop._fields))))
    compute, memory, link = (_whole([p[1][k] for p in parts], shape) for k in range(3))
    lacking = loop.max_concurrency < 1
    if lacking.any():
        raise CannotServeError(_no_room(model, gpu, point, arrays, lacking))
    return loop, (compute, memory, link), found, fmt


Used = tuple[Floats, Floats, Floats]
"""Shares in use: compute, memory, links."""


def _whole(parts: list[Floats], shape: tuple[int, ...]) -> Floats:
    return np.concatenate([np.atleast_1d(p) for p in parts]).reshape(shape)


def _block(
    layout_work: Work,
    found: Lookup,
    point: Point,
    n_in: Floats,
    cached: Floats,
    out: Floats,
    concurrency: Floats,
) -> tuple[tuple[Floats, ...], tuple[Floats, ...]]:
    c = found.coefficients
    requests = requests_of(point, n_in, cached, out)
    if point.prefill_gpus:
        loop = _steps.split_loop(layout_work, c, requests, concurrency, float(point.prefill_gpus))
    else:
        loop = _steps.closed_loop(layout_work, c, requests, concurrency)
    used = _steps.utilisation(layout_work, requests, loop)
    spread = [tuple(np.broadcast_to(a, n_in.shape) for a in arrays) for arrays in (loop, used)]
    return spread[0], spread[1]


def requests_of(point: Point, n_in: FloatLike, cached: FloatLike, out: FloatLike) -> Requests:
    """A point's requests. With speculative decoding a step checks the accepted tokens and one that may
    fail."""
    verified = 1.0 if point.accepted_per_step <= 1 else point.accepted_per_step + 1
    return Requests(
        np.asarray(n_in) - cached,
        cached,
        out,
        point.accepted_per_step,
        verified,
        point.draft_fraction,
        held_fraction(point.engine),
    )


def checked_layout(layout: Layout) -> Layout:
    """The layout, if its degrees are whole, positive and experts divide over its GPUs; raises InputError
    otherwise."""
    degrees = {f.name: getattr(layout, f.name) for f in fields(layout)}
    for name, degree in degrees.items():
        if degree != int(degree) or degree < 1:
            raise InputError(f"layout {name} is {degree}: a whole number of at least 1 is needed")
    if (layout.tp * layout.dp) % layout.ep:
        raise InputError(f"layout ep {layout.ep} does not divide tp × dp = {layout.tp * layout.dp}")
    return layout


def checked_point(model: Model, point: Point) -> tuple[Floats, Floats, Floats, Floats]:
    """Input, cached, output tokens and concurrency broadcast to one shape; raises InputError or
    CannotServeError."""
    named = {
        "input_tokens": point.input_tokens,
        "cached_input_tokens": point.cached_input_tokens,
        "output_tokens": point.output_tokens,
        "concurrency": point.concurrency,
    }
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in named.items()}
    least = {"output_tokens": 1.0, "concurrency": 1.0}
    for name, values in arrays.items():
        wrong = values[~(np.isfinite(values) & (values >= least.get(name, 0.0)))]
        if wrong.size:
            raise InputError(
                f"{name} must be a number of at least {least.get(name, 0.0):g}: found {wrong[0]:g}"
            )
    if point.accepted_per_step < 1 or point.draft_fraction < 0 or point.prefill_gpus < 0:
        raise InputError("accepted_per_step is at least 1, draft_fraction and prefill_gpus are not negative")
    if (arrays["cached_input_tokens"] > arrays["input_tokens"]).any():
        raise InputError(
            "cached_input_tokens cannot exceed input_tokens: it counts those of them that hit the cache"
        )
    longest = float(np.max(arrays["input_tokens"] + arrays["output_tokens"]))
    if model.max_context and longest > model.max_context:
        raise CannotServeError(
            f"{model.name} has a context of {model.max_context} tokens; {longest:.0f} were asked (in + out)"
        )
    n_in, cached, out, concurrency = np.broadcast_arrays(*arrays.values())
    return n_in, cached, out, concurrency


def _no_room(
    model: Model, gpu: Gpu, point: Point, arrays: tuple[Floats, ...], lacking: npt.NDArray[np.bool_]
) -> str:
    n_in, _, out, _ = (float(np.ravel(a)[np.ravel(lacking)][0]) for a in arrays)
    return (
        f"not one request of {n_in:.0f} + {out:.0f} tokens fits the cache memory that {model.name} leaves on "
        f"{point.layout.gpus} × {gpu.name}: more GPUs per replica, narrower kv_precision or shorter requests"
    )


def _interval(value: Floats, half_width: Floats) -> Interval:
    """A value with the same ratio up and down."""
    return Interval(value, value * np.exp(-half_width), value * np.exp(half_width))


def _gpu_power(model: Model, gpu: Gpu, point: Point, used: Used) -> Interval:
    """Board power of one GPU from what is in use of it; the interval stays between idle and the power limit."""
    precision, gpus = precision_name(point.precision), point.layout.gpus
    power = gpu_power_w(
        gpu,
        *used,
        precision,
        model=model,
        gpus=gpus,
    )
    half = power_log_spread(gpu, precision, model, gpus)
    low, high = np.maximum(power * np.exp(-half), gpu.idle_w), np.minimum(power * np.exp(half), gpu.tdp_w)
    return Interval(power, np.minimum(low, power), np.maximum(high, power))


def step_times(
    model: Model,
    gpu: Gpu,
    precision: str = "bf16",
    engine: str = "vllm",
    layout: Layout | None = None,
    *,
    kv_precision: str = "",
    max_batch: int = 256,
    context_tokens: float = 2048.0,
    prompt_tokens: float = 1024.0,
    accepted_per_step: float = 1.0,
) -> StepTimes:
    """An engine step in linear pieces, for the request-level simulator; consistent with `predict`.

    Parameters: model, gpu, precision, engine, layout as in a Point; max_batch: sequences per step [of the
    replica]; context_tokens: mean context the cache reads are linearised at (windows make them bend);
    prompt_tokens: mean prompt the power of prefill is taken at. Errors as `predict`.
    """
    layout = checked_layout(layout or Layout())
    w = work(model, gpu, layout, formats(gpu, precision, kv_precision))
    found = lookup(model, gpu, engine, precision)
    c = found.coefficients
    point = Point(prompt_tokens, 1.0, 1.0, accepted_per_step=accepted_per_step)
    verified = requests_of(point, 1.0, 0.0, 1.0).verified
    batch = np.arange(1, max_batch + 1, dtype=np.float64)

    def step(tokens: float) -> Floats:
        context = _steps.Context(tokens, np.minimum(tokens, w.window), np.minimum(tokens, w.top))
        cache, attention = _steps.cache_per_sequence_s(w, context), _steps.attention_per_token_s(w, context)
        return _steps.decode_step_s(w, c, batch, verified, cache, attention)

    low, high = 0.9 * context_tokens, 1.1 * context_tokens
    context_s = float((step(high)[-1] - step(low)[-1]) / (high - low) / batch[-1])
    at_context = step(context_tokens)
    shared, _ = _steps.prompt_s(w, c, requests_of(point, prompt_tokens, 0.0, 1.0))
    prefill_context_s = _scalar(c.attention * w.prompt_full_s / w.dp / w.pp)
    flops_s = _scalar(w.dense_gemm_s + w.routed_gemm_s)
    decode_w, prefill_w = _step_power_w(
        (model, gpu, precision_name(precision), layout),
        compute=(max_batch * flops_s / at_context[-1], prompt_tokens * flops_s / _scalar(w.pp * shared)),
        memory=(_scalar(w.always_s + w.routed_s) / at_context[-1] + PREFILL_READING, PREFILL_READING),
    )
    return StepTimes(
        decode_s=np.concatenate([[0.0], np.maximum(at_context - context_s * batch * context_tokens, 0.0)]),
        context_s=context_s,
        prefill_s=max(_scalar(shared) / prompt_tokens - prefill_context_s * prompt_tokens / 2, 0.0),
        prefill_context_s=prefill_context_s,
        step_s=_scalar(_steps.latency_s(w, c)),
        kv_capacity_tokens=_kv_capacity(model, gpu, layout, w, max_batch, context_tokens),
        idle_power_w=gpu.idle_w,
        decode_power_w=decode_w,
        prefill_power_w=prefill_w,
        gpus=layout.gpus,
        basis=found.basis,
    )


PREFILL_READING = 0.2
"""Share of memory bandwidth that activations and caches take while a GPU prefills, or decodes beside its weights."""


def _scalar(value: FloatLike) -> float:
    return float(np.asarray(value))


def _kv_capacity(
    model: Model, gpu: Gpu, layout: Layout, w: Work, max_batch: int, context_tokens: float
) -> int:
    """Tokens of context the replica's caches hold, fixed-size state of max_batch sequences set aside."""
    memory = _scalar(w.kv_memory_bytes) - max_batch / layout.dp * _scalar(w.kv_state_bytes)
    windowed = _scalar(w.kv_window_bytes) * min(1.0, _scalar(w.window) / context_tokens)
    per_token = _scalar(w.kv_full_bytes) + windowed
    capacity = memory / per_token * layout.dp if per_token else UNLIMITED
    if capacity < 1:
        raise CannotServeError(
            f"{model.name} on {layout.gpus} × {gpu.name} leaves no memory for the cache of {max_batch} sequences"
        )
    return int(min(capacity, UNLIMITED))


UNLIMITED = 2.0**62
"""Cache tokens of a model whose state does not grow with context."""


def _step_power_w(
    key: tuple[Model, Gpu, str, Layout], compute: tuple[float, float], memory: tuple[float, float]
) -> tuple[float, float]:
    """Board power of one GPU while it decodes at the largest batch, and while it prefills."""
    model, gpu, precision, layout = key
    c, m = np.clip(compute, 0.0, 1.0), np.clip(memory, 0.0, 1.0)
    decode, prefill = gpu_power_w(gpu, c, m, 0.0, precision, model=model, gpus=layout.gpus)
    return float(decode), float(prefill)
