"""The predictor for a benchmark's task on its own serving stack: what the roofline knows, and the time the host
takes.

ML.ENERGY measured throughput and power of its tasks with vLLM 0.11.1. A step of that stack takes the GPU's time,
scaled, and a time of the host that no GPU shortens: 20 to 30 ms on one B200 where images are prepared, a millisecond
or two at chat. Which of the two rules cannot be told from the hardware, so the task is asked by name, its effects
are learned from the rows of the task, and drawn to what all rows share where little was measured.

    seconds = (decode + prefill × exp(p)) × exp(w) + 1 ms × exp(h),   times exp(curve) where this series was measured

A GPU that none of the rows measured has a host that nobody timed: its answer is the mean of tokens per second and
of watts over the prior of h, which shortens no step below the GPU's own.

Decode and prefill are the roofline's, without its effects of single configurations. p, w and h are sums of effects
by GPU, kind of model, model, task, hosts (one GPU or several) and configuration, in ``data/power.json`` under
``task``, made by ``bench/fit/power.py``. Without a task `predict` answers as before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from pertoken.catalog.gpus import Gpu
from pertoken.catalog.models import Model
from pertoken.errors import InputError, NoEvidenceError
from pertoken.perf._coefficients import coefficients_of, fitted, level_keys, signature
from pertoken.perf._points import TASK_MEDIA
from pertoken.perf._steps import Loop, closed_loop, utilisation
from pertoken.perf._work import engine_family, formats, precision_name, work
from pertoken.perf.point import FloatLike, Floats, Interval, Point, Prediction
from pertoken.perf.power import _fit, curve, gpu_power_w, power_log_spread, series_key
from pertoken.perf.roofline import checked_layout, checked_point, predict, requests_of

ENGINE = "vllm"
"""The engine family whose host time was measured."""
HOST_S = 0.001
"""Host seconds per step before any effect."""
NODES = 9
"""Host times that stand for the prior of a host nobody timed."""
BATCHES = (8.0, 4096.0)
"""Requests in flight that were measured; beyond, effects stay what they are at the end."""
PARTICULAR = frozenset({"configuration", "release"})
"""Levels of the serving predictor's effects that a task's own take the place of."""
FEW = {"at 8": 0, "at 16": 1, "at 32": 2}
FEW_REQUESTS = (8.0, 16.0, 32.0, 128.0)
"""Requests in flight up to which a host may do otherwise than its line says: one that prepares images keeps up with
8 of them and not with 16."""
TERMS: tuple[tuple[str, str, str], ...] = (
    ("all", "work", "level"), ("gpu", "work", "level"), ("all", "work", "batch"), ("gpu", "work", "batch"),
    ("kind", "work", "level"), ("kind|precision", "work", "level"), ("kind", "work", "batch"),
    ("model", "work", "level"), ("model", "work", "batch"),
    ("task", "prefill", "level"), ("model|task", "prefill", "level"),
    ("all", "host", "level"), ("gpu", "host", "level"), ("hosts", "host", "level"), ("hosts|task", "host", "level"),
    ("hosts|task", "host", "batch"),
    ("hosts|task", "host", "at 8"), ("hosts|task", "host", "at 16"), ("hosts|task", "host", "at 32"),
    ("configuration", "work", "level"), ("configuration", "work", "batch"), ("series", "host", "level"),
)  # fmt: skip
"""Effects: the level whose key they belong to, the part they move, and how with the requests in flight (`shape_of`).
``work`` moves prefill too."""


def task_names() -> list[str]:
    """The tasks that were measured."""
    return sorted(_fit()["task"]["effects"][term_name("task", "prefill", "level")])


def predict_task(model: Model, gpu: Gpu, point: Point, task: str) -> Prediction:
    """What one replica does with a benchmark's task on its serving stack (vLLM 0.11.1).

    Parameters, shapes and errors as `predict`; task: a name of `task_names`. Formula: see the module; throughput is
    divided and times are multiplied by the same factor, so that C = rate × (TTFT + output × TPOT) stays true.
    Raises InputError on another task, NoEvidenceError for other engines and disaggregated points.
    Source: ``data/power.json`` names rows, date and residuals.
    """
    if task not in task_names():
        raise InputError(f"unknown task {task!r}: one of {', '.join(task_names())}")
    if engine_family(point.engine) != ENGINE or point.prefill_gpus:
        raise NoEvidenceError(
            f"task {task} was measured with vLLM, prompts and outputs on the same GPUs: no rows of {point.engine}"
            f"{' with GPUs that only prefill' if point.prefill_gpus else ''}; leave the task out"
        )
    base, file = predict(model, gpu, point), _fit()["task"]
    loop, compute, memory = _in_general(model, gpu, point)
    precision, gpus = precision_name(point.precision), point.layout.gpus
    keys = task_keys(model, gpu, precision, gpus, task)
    concurrency = np.broadcast_to(
        np.asarray(point.concurrency, dtype=np.float64), base.tokens_per_s.value.shape
    )
    seconds = loop.admitted / loop.tokens_per_s
    parts = _parts(file, keys, concurrency, seconds, loop.prefill_fraction)
    cases = [(w, s / seconds, host) for w, s, host in _cases(file, keys, concurrency, parts)]
    factor = np.asarray(1 / sum(weight / each for weight, each, _ in cases))
    measured, width = (
        keys["series"] in file["curves"],
        float(file["spread"]["tokens_per_s"][_known(file, keys)]),
    )
    ttft_s = loop.ttft_s * factor
    return replace(
        base,
        tokens_per_s=_around(loop.tokens_per_s / factor, width),
        ttft_s=Interval(
            ttft_s, *(ttft_s * end / base.ttft_s.value for end in (base.ttft_s.low, base.ttft_s.high))
        ),
        tpot_s=_around(loop.tpot_s * factor, width),
        gpu_power_w=_power(model, gpu, point, task, [(w, compute / f, memory / f, h) for w, f, h in cases]),
        prefill_fraction=parts[1] / (parts[0] + parts[1]),
        basis="fitted" if _timed(file, keys) else base.basis,
        source=f"task {task} with ML.ENERGY's stack, vLLM 0.11.1, fitted {_fit()['date']} to {_fit()['rows']} points"
        f"{'' if measured else ' (not this task on this configuration)'}; {base.source}",
    )


def _in_general(model: Model, gpu: Gpu, point: Point) -> tuple[Loop, Floats, Floats]:
    """The roofline's loop and its shares of compute and memory in use, without effects of single configurations:
    those of a task's rows take their place."""
    w = work(model, gpu, checked_layout(point.layout), formats(gpu, point.precision, point.kv_precision))
    keys = level_keys(model, gpu, point.engine, point.precision)
    c = coefficients_of(fitted(), {level: key for level, key in keys.items() if level not in PARTICULAR})
    n_in, cached, out, concurrency = checked_point(model, point)
    requests = requests_of(point, n_in, cached, out)
    loop = closed_loop(w, c, requests, concurrency)
    # A share of all GPUs that decode has one entry where all else has the point's shape.
    compute, memory, _ = (np.reshape(share, n_in.shape) for share in utilisation(w, requests, loop))
    return loop, compute, memory


def _power(
    model: Model, gpu: Gpu, point: Point, task: str, used: list[tuple[float, Floats, Floats, Floats]]
) -> Interval:
    """Board power of one GPU at these shares of compute, memory and the host's time, each case with its weight."""
    precision, gpus, media = precision_name(point.precision), point.layout.gpus, TASK_MEDIA.get(task, "")
    cases = [
        weight * gpu_power_w(
            gpu, np.minimum(compute, 1.0), np.minimum(memory, 1.0), 0.0, precision, model=model, gpus=gpus,
            media=media, task=task, requests=point.concurrency, host_fraction=host,
        )
        for weight, compute, memory, host in used
    ]  # fmt: skip
    power = np.asarray(sum(cases))
    half = power_log_spread(gpu, precision, model, gpus, task=task)
    low, high = np.maximum(power * np.exp(-half), gpu.idle_w), np.minimum(power * np.exp(half), gpu.tdp_w)
    return Interval(power, np.minimum(low, power), np.maximum(high, power))


def term_name(level: str, part: str, shape: str) -> str:
    """The name of a kind of effect in the coefficient file."""
    return f"{level}: {part}{ {'level': '', 'batch': ' × batch'}.get(shape, f' {shape}') }"


def shape_of(shape: str, requests: FloatLike) -> Floats:
    """What an effect is multiplied by at so many requests in flight: 1, their logarithm, or a hat of height 1 over
    few of them.

    >>> [shape_of("at 16", n).round(2).tolist() for n in ([8.0, 16.0], [24.0, 128.0])]
    [[0.0, 1.0], [0.42, 0.0]]
    """
    if shape in FEW:
        hat = np.eye(len(FEW_REQUESTS))[FEW[shape]]
        return np.asarray(np.interp(np.log(requests), np.log(FEW_REQUESTS), hat), dtype=np.float64)
    return batch_log(requests) if shape == "batch" else np.ones(np.shape(requests))


def task_keys(model: Model, gpu: Gpu, precision: str, gpus: int, task: str) -> dict[str, str]:
    """The key of a task on a configuration at each level of effects."""
    linear = any(a.kind == "linear" for a in model.attention)
    kind = "hybrid" if linear else "experts" if model.moe_layers else "dense"
    hosts = f"{gpu.name}|{'one' if gpus == 1 else 'several'}"
    sizes = signature(model)
    return {
        "all": "all",
        "gpu": gpu.name,
        "kind": kind,
        "kind|precision": f"{kind}|{precision}",
        "model": sizes,
        "task": task,
        "model|task": f"{sizes}|{task}",
        "hosts": hosts,
        "hosts|task": f"{hosts}|{task}",
        "configuration": f"{gpu.name}|{precision}|{gpus}|{sizes}",
        "series": series_key(gpu, precision, model, gpus, task),
    }


def batch_log(requests: FloatLike) -> Floats:
    """Logarithm of the requests in flight that effects grow with: 0 at 64, 1 at 512."""
    return np.asarray(np.log(np.clip(requests, *BATCHES) / 64) / math.log(8), dtype=np.float64)


def _parts(
    file: Mapping[str, Any], keys: Mapping[str, str], concurrency: Floats, seconds: Floats, prefill: Floats
) -> tuple[Floats, Floats, Floats]:
    """Seconds per token of one request: decoding, prefilling and waiting for the host."""
    moves = {part: np.zeros_like(seconds) for part in ("work", "prefill", "host")}
    for level, part, shape in TERMS:
        value = float(file["effects"][term_name(level, part, shape)].get(keys[level], 0.0))
        if value:
            moves[part] = moves[part] + value * shape_of(shape, concurrency)
    work = np.exp(moves["work"])
    return (
        seconds * (1 - prefill) * work,
        seconds * prefill * work * np.exp(moves["prefill"]),
        HOST_S * np.exp(moves["host"]),
    )


def _cases(
    file: Mapping[str, Any],
    keys: Mapping[str, str],
    concurrency: Floats,
    parts: tuple[Floats, Floats, Floats],
) -> list[tuple[float, Floats, Floats]]:
    """Seconds per token of one request at each host time that is possible, with its weight and the host's share: one
    where the GPU was measured, the prior's where it was not."""
    gpu_s, host_s = parts[0] + parts[1], parts[2]
    bend = np.exp(curve(file["curves"].get(keys["series"], [0.0]), concurrency))
    nodes: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    deviation: FloatLike = 0.0
    if not _timed(file, keys):
        nodes, deviation = normal_nodes(), host_deviation(file["host deviation"], concurrency)
    hosts_s = [(weight, host_s * np.exp(at * deviation)) for at, weight in nodes]
    return [(weight, (gpu_s + host) * bend, host / (gpu_s + host)) for weight, host in hosts_s]


def _timed(file: Mapping[str, Any], keys: Mapping[str, str]) -> bool:
    """Whether the GPU's hosts were measured."""
    return keys["gpu"] in file["effects"][term_name("gpu", "host", "level")]


def host_deviation(parts: Mapping[str, float], requests: FloatLike) -> Floats:
    """Standard deviation of the logarithm of the host seconds of a GPU that was not measured, at so many requests."""
    return np.sqrt(sum((sd * shape_of(shape, requests)) ** 2 for shape, sd in parts.items()))


@lru_cache(maxsize=1)
def normal_nodes() -> tuple[tuple[float, float], ...]:
    """Places and weights whose sums are means over the standard normal distribution (Gauss-Hermite).

    >>> round(sum(weight * at**2 for at, weight in normal_nodes()), 6)
    1.0
    """
    at, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return tuple(zip(at.tolist(), (weights / weights.sum()).tolist(), strict=True))


def _known(file: Mapping[str, Any], keys: Mapping[str, str]) -> str:
    """What the interval of a task's throughput rests on: its own series, its GPU's, or other GPUs'."""
    if keys["series"] in file["curves"]:
        return "series"
    return "model" if _timed(file, keys) else "gpu"


def _around(value: Floats, half_width: float) -> Interval:
    return Interval(value, value * np.exp(-half_width), value * np.exp(half_width))
