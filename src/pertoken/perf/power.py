"""Power of a GPU from how much of it is in use, of its server, and joules per token with their boundary.

Boundaries, inside out: ``gpu`` (board, as NVML and DCGM report it), ``server`` (the plug: CPUs, memory,
network, fans and conversion loss on top), ``facility`` (× PUE: the utility meter).

A busy GPU's board power lies between idle and its power limit. Its position u is logistic in the logarithms
of the shares of peak compute and memory bandwidth in use and in the share of time spent waiting for the host,
with fitted offsets for what runs (``data/power.json``, made by ``bench/fit/power.py``):

    power = idle + u × (1.03 × TDP − idle), at most TDP,   ln(u / (1 − u)) = Σ weight × multiple × term

Where a task of the benchmark is named and its series was measured on this very configuration, a curve along the
requests in flight is added to the sum: what the shares in use do not explain there.

>>> from pertoken.catalog.gpus import gpu
>>> light, heavy = gpu_power_w(gpu("H100"), [0.01, 0.4], [0.3, 0.5], 0.0)
>>> bool(gpu("H100").idle_w < light < heavy <= gpu("H100").tdp_w)
True
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

import numpy as np

from pertoken.catalog.gpus import Gpu
from pertoken.catalog.models import Model
from pertoken.errors import InputError
from pertoken.perf._coefficients import signature
from pertoken.perf.point import FloatLike, Floats
from pertoken.units import GIGA

LIMIT = 1.03
"""Asymptote of the logistic over TDP: boards reach their limit at less than full use."""
COMPUTE_FLOOR, MEMORY_FLOOR = 0.005, 0.02
"""Shares below which more idle hardware makes no difference: clocks and schedulers run all the same."""
VISITS_UNIT = 100.0
"""Routed experts visited per token, all layers together, at which the eight-bit experts' feature is zero."""

WIDENING = {"fp8": 2.0, "int8": 2.0, "fp4": 4.0, "int4": 4.0}
"""Values that come with the bytes of one sixteen-bit value: what is done per value read, not per byte, costs that much
more power at the same share of bandwidth."""

KNOTS = (8.0, 64.0, 512.0)
"""Requests in flight at which a measured series' curve has a coefficient, the first of them where it has fewer;
straight in their logarithm between."""

Boundary = Literal["gpu", "server", "facility"]
MEDIA = ("", "image", "video", "audio")


def gpu_power_w(
    gpu: Gpu,
    compute_fraction: Any,
    memory_fraction: Any,
    link_fraction: Any = 0.0,
    precision: str = "bf16",
    *,
    model: Model | None = None,
    gpus: int = 1,
    media: str = "",
    task: str = "",
    requests: FloatLike = 1.0,
    host_fraction: Any = None,
) -> Floats:
    """Mean board power of one busy GPU [W], arrays in the shape the shares broadcast to.

    Parameters: gpu; compute_fraction, memory_fraction, link_fraction [0 to 1] of dense peak at `precision`,
    of memory bandwidth and of link rate in use on average; precision of the weights; model and gpus of its
    replica where they are known (experts and measured configurations draw differently);
    media: ``image``, ``video`` or ``audio`` where prompts carry such (their preprocessing keeps the GPU
    waiting); task of the benchmark and requests in flight, where the series' own curve is meant to count;
    host_fraction [0 to 1] of time that the GPU waits for its host, None: as on average of the fitted rows.
    Formula: see the module; the links' share is not a feature, it added nothing to the fit.
    Raises InputError where a share is not between 0 and 1 or media is unknown.
    Source: ``data/power.json`` names rows, date and residuals.
    """
    compute, memory, _ = np.broadcast_arrays(
        *(
            _share(name, v)
            for name, v in (
                ("compute", compute_fraction),
                ("memory", memory_fraction),
                ("link", link_fraction),
            )
        )
    )
    if media not in MEDIA:
        raise InputError(f"unknown media {media!r}: one of image, video, audio, or empty")
    fit = _fit()
    wait = _share("host", fit["typical host fraction"] if host_fraction is None else host_fraction)
    terms = share_terms(compute, memory, wait - fit["typical host fraction"], precision)
    slopes = dict.fromkeys(terms, 0.0)
    for name, (term, multiple) in features(gpu, precision, model, gpus, media).items():
        slopes[term] += float(fit["weights"][name]) * multiple
    score = np.full(compute.shape, _effects(fit, gpu, precision, model, gpus))
    for term, slope in slopes.items():
        score = score + slope * terms[term]
    if task and model is not None:
        own = fit["curves"].get(series_key(gpu, precision, model, gpus, task))
        score = score + (curve(own, requests) if own else 0.0)
    position = 1 / (1 + np.exp(-score))
    return np.asarray(np.minimum(gpu.idle_w + position * (LIMIT * gpu.tdp_w - gpu.idle_w), gpu.tdp_w))


def share_terms(
    compute: Floats, memory: Floats, more_host: FloatLike, precision: str
) -> dict[str, FloatLike]:
    """What features are multiples of: logarithms of the shares in use, near zero at common loads; by how much the
    logarithm grows if each narrow value read counted as a wide one; and the host's share beyond its mean."""
    read, wide = memory + MEMORY_FLOOR, WIDENING.get(precision, 1.0)
    return {
        "one": 1.0,
        "compute": np.log(compute + COMPUTE_FLOOR) + 3,
        "memory": np.log(read) + 1,
        "widened": np.log((memory * wide + MEMORY_FLOOR) / read) if wide > 1 else 0.0,
        "host": more_host,
    }


def features(
    gpu: Gpu, precision: str, model: Model | None, gpus: int, media: str
) -> dict[str, tuple[str, float]]:
    """What a GPU's position between idle and limit depends on, by name; weights in ``data/power.json``.

    A feature is a term of `share_terms` and the multiple of it that counts.
    """
    experts = float(bool(model and model.moe_layers))
    blackwell = float(gpu.architecture.startswith("blackwell"))
    eight_bit = precision in ("fp8", "int8") and model is not None and model.moe_layers > 0
    visits = model.experts_active * model.moe_layers / VISITS_UNIT if model and eight_bit else 1.0
    any_media, video = float(bool(media)), float(media == "video")
    return {
        "one": ("one", 1.0),
        "compute": ("compute", 1.0),
        "memory": ("memory", 1.0),
        "widened values": ("widened", 1.0),
        "host": ("host", 1.0),
        "blackwell": ("one", blackwell),
        "blackwell memory": ("memory", blackwell),
        "blackwell, several GPUs": ("one", blackwell * (gpus > 1)),
        "experts": ("one", experts),
        "experts compute": ("compute", experts),
        "eight-bit experts": ("one", math.log(visits)),
        "four-bit": ("one", float(precision in ("fp4", "int4"))),
        "media": ("one", any_media),
        "media compute": ("compute", any_media),
        "media memory": ("memory", any_media),
        "video": ("one", video),
        "video compute": ("compute", video),
    }


def effect_keys(gpu: Gpu, precision: str, model: Model, gpus: int) -> dict[str, str]:
    """Keys of the offsets a configuration carries: its decoder's sizes, and those with GPU, precision and
    GPUs."""
    decoder = f"A{model.gemm_parameters / GIGA:.1f}B+{model.routed_parameters / GIGA:.0f}B"
    return {"decoder": decoder, "configuration": f"{gpu.name}|{precision}|{gpus}|{decoder}"}


def _effects(fit: Mapping[str, Any], gpu: Gpu, precision: str, model: Model | None, gpus: int) -> float:
    if model is None:
        return 0.0
    keys = effect_keys(gpu, precision, model, gpus)
    return sum(float(fit["effects"][level].get(key, 0.0)) for level, key in keys.items())


def series_key(gpu: Gpu, precision: str, model: Model, gpus: int, task: str) -> str:
    """Key of one measured series: a task on a configuration, at several numbers of requests in flight."""
    return f"{gpu.name}|{precision}|{gpus}|{signature(model)}|{task}"


def curve(coefficients: Sequence[float], requests: FloatLike) -> Floats:
    """A series' curve at so many requests in flight: straight between `KNOTS` in their logarithm, level outside.

    >>> curve([0.0, 1.0, 1.0], [4.0, 8.0, 64.0, 4096.0]).round(3).tolist()
    [0.0, 0.0, 1.0, 1.0]
    >>> float(curve([0.3], 100.0))   # one number is a level
    0.3
    """
    return np.interp(np.log(requests), np.log(KNOTS[: len(coefficients)]), coefficients)


def power_log_spread(
    gpu: Gpu, precision: str = "bf16", model: Model | None = None, gpus: int = 1, *, task: str = ""
) -> float:
    """Half-width of the 80 % interval of a busy GPU's power, in log space: wider where less was measured."""
    fit = _fit()
    spread = fit["task"]["spread"]["power_w"] if task else fit["spread"]
    if task and model is not None and series_key(gpu, precision, model, gpus, task) in fit["curves"]:
        return float(spread["series"])
    if gpu.name not in fit["rows_by_gpu"]:
        return float(spread["gpu"])
    known = (
        model is not None
        and effect_keys(gpu, precision, model, gpus)["configuration"] in fit["effects"]["configuration"]
    )
    return float(spread["point"] if known and not task else spread["model"])


def server_power_w(gpu: Gpu, gpu_power_w: FloatLike, busy_fraction: FloatLike = 1.0) -> Floats:
    """Power of the server per GPU at the plug [W], averaged over busy and idle time.

    Parameters: gpu; gpu_power_w [W] board power while busy; busy_fraction [0 to 1] of time the GPU is busy.
    Formula: busy × (GPU + host at load) + (1 − busy) × (idle GPU + host at rest).
    Raises InputError where busy_fraction is not between 0 and 1.

    >>> from pertoken.catalog.gpus import gpu
    >>> h100 = gpu("H100")   # idle 120 W, host 160 W at rest and 350 W at load, per GPU
    >>> float(server_power_w(h100, 600.0, 0.5))   # (600 + 350 + 120 + 160) / 2
    615.0
    """
    busy = _share("busy", busy_fraction)
    return np.asarray(
        busy * (np.asarray(gpu_power_w) + gpu.host_busy_w) + (1 - busy) * (gpu.idle_w + gpu.host_idle_w)
    )


def joules_per_token(
    gpu: Gpu,
    gpu_power_w: FloatLike,
    gpus: FloatLike,
    tokens_per_s: FloatLike,
    *,
    phase_fraction: FloatLike = 1.0,
    boundary: Boundary = "gpu",
    pue: float = 1.0,
) -> Floats:
    """Energy per token of one phase at a named boundary [J per token], while busy.

    Parameters: gpu; gpu_power_w [W] of one busy GPU; gpus of the replica or job; tokens_per_s [1/s] of the
    tokens meant (output, input or trained ones) of all of them; phase_fraction [0 to 1] of busy time charged
    to them (prefill for input, the rest for output; 1 charges all to them, as published joules per output
    token do); boundary; pue [≥ 1]. Formula: gpus × power at the boundary × phase_fraction / tokens_per_s.
    Raises InputError where pue is below 1, the boundary is unknown or tokens_per_s is not positive.

    >>> from pertoken.catalog.gpus import gpu
    >>> float(joules_per_token(gpu("H100"), 600.0, 8, 4800.0))   # 8 × 600 / 4800
    1.0
    >>> h100 = gpu("H100")   # its host draws 350 W per GPU at load
    >>> float(joules_per_token(h100, 600.0, 8, 4000.0, boundary="facility", pue=1.25))   # 8 × 1187.5 / 4000
    2.375
    """
    if boundary not in ("gpu", "server", "facility"):
        raise InputError(f"unknown energy boundary {boundary!r}: one of gpu, server, facility")
    if not pue >= 1 or not (np.asarray(tokens_per_s) > 0).all():
        raise InputError(f"joules_per_token: pue {pue} must be at least 1 and tokens_per_s above 0")
    power_w = np.asarray(gpu_power_w) if boundary == "gpu" else server_power_w(gpu, gpu_power_w)
    if boundary == "facility":
        power_w = power_w * pue
    return np.asarray(np.asarray(gpus) * power_w * phase_fraction / np.asarray(tokens_per_s))


def _share(name: str, value: Any) -> Floats:
    array = np.asarray(value, dtype=np.float64)
    if not ((array >= 0) & (array <= 1)).all():
        raise InputError(f"{name} share is {value}: a number between 0 and 1 is needed")
    return array


@lru_cache(maxsize=1)
def _fit() -> Mapping[str, Any]:
    text = resources.files("pertoken.perf").joinpath("data/power.json").read_text(encoding="utf-8")
    fit: Mapping[str, Any] = json.loads(text)
    return fit
