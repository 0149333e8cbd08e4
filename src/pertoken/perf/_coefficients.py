"""Fitted slowdowns over the ideal roofline: effects by architecture, engine, precision, model, summed in log
space.

A configuration's coefficient is base × exp(Σ effects of the levels it belongs to). A level never measured
has no effect: an unseen GPU keeps its architecture's or vendor's, an unseen model what its GPU, engine and
precision share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from pertoken.catalog.gpus import Gpu
from pertoken.catalog.models import Model
from pertoken.perf._work import engine_family, formats, precision_name
from pertoken.perf.point import FloatLike, Floats


@dataclass(frozen=True)
class Coefficients:
    """How much longer than ideal each part of a step takes; floats, or arrays of one entry per row.

    The first group are ratios (1: datasheet peak), the second group times in their own unit. The values here
    are what the fit starts from and is drawn to where rows say little.
    """

    always: FloatLike = 1.2
    """Weights read every step."""
    routed: FloatLike = 1.2
    """Routed experts' weights: grouped GEMMs at small batch, imbalance between GPUs."""
    cache: FloatLike = 1.6
    gemm: FloatLike = 1.8
    """GEMM FLOPs of decode."""
    prefill: FloatLike = 1.4
    """GEMM FLOPs of prefill."""
    grouped: FloatLike = 4.0
    """Further factor on decode FLOPs in routed experts: tiles filled with few tokens each."""
    grouped_prefill: FloatLike = 4.0
    """The same in prefill, where experts see many tokens."""
    attention: FloatLike = 5.0
    links: FloatLike = 1.6
    step_ms: FloatLike = 0.4
    """Scheduler and launch, per step."""
    kernel_us: FloatLike = 5.0
    """Latency of one kernel, beyond its traffic and FLOPs."""
    expert_us: FloatLike = 20.0
    """Router and grouped GEMM's latency, per MoE layer."""
    message_us: FloatLike = 3.0
    """One collective."""
    sequence_us: FloatLike = 5.0
    """Sampling, detokenising, scheduling: per sequence of a rank and step."""
    request_ms: FloatLike = 2.0
    """Admission of a request: engine time."""
    first_ms: FloatLike = 15.0
    """Front end and streaming, until the first token: latency alone."""
    eager: FloatLike = 5.0
    """A prompt's kernels are launched one by one, not from a graph: their latency relative to decode's."""
    stall: FloatLike = 1.0
    """A prompt's kernels delay the running sequences too: relative to a decode step's latency."""
    row_us: FloatLike = 0.02
    """Work of one sequence in one kernel."""
    gather: FloatLike = 0.3
    """Bytes of one-shot all-reduces, in which every GPU reads all others'."""
    first_steps: FloatLike = 0.5
    """Steps until the first token is seen: waiting for the running step, streaming in intervals."""
    slot: FloatLike = 0.02
    """Requests that wait while a finished one's slot is handed on."""
    seats: FloatLike = 4096.0
    """Requests an engine runs at once by its own setting, whatever fits memory."""
    queue: FloatLike = 0.5
    """Waiting for other prompts, relative to half of all prompts in flight."""


NAMES = tuple(f.name for f in fields(Coefficients))
DIRECTIONS: Mapping[str, tuple[str, ...]] = {
    "reading": ("always", "routed", "cache"),
    "computing": ("gemm", "prefill", "attention"),
    "latency": ("step_ms", "kernel_us", "expert_us", "message_us"),
    "handling": ("sequence_us", "row_us", "request_ms", "stall", "first_ms", "eager"),
} | {name: (name,) for name in NAMES}
"""What one effect moves: a single coefficient, or several that share a cause, together."""

HARDWARE: Mapping[str, Mapping[str, float]] = {
    "volta": {"computing": 0.20},
    "turing": {"computing": 0.20},
    "ampere": {"reading": 0.0, "computing": -0.10},
    "ada": {"reading": 0.0, "computing": 0.15},
    "blackwell-rtx": {"computing": 0.15},
    "cdna2": {"reading": 0.15, "computing": 0.55, "latency": 0.40, "handling": 0.2},
    "cdna3": {"reading": 0.10, "computing": 0.45, "latency": 0.40, "handling": 0.2},
    "cdna4": {"reading": 0.10, "computing": 0.25, "latency": 0.40, "handling": 0.2},
    "gaudi2": {"reading": 0.15, "computing": 0.35, "latency": 0.60},
    "gaudi3": {"reading": 0.15, "computing": 0.35, "latency": 0.60},
    "tpu": {"reading": 0.15, "computing": 0.25, "latency": 0.30},
    "trainium": {"reading": 0.15, "computing": 0.45, "latency": 0.60},
    "apple-m3": {"reading": 0.05, "computing": 0.10},
}
"""Log offsets an architecture starts from, before any row of ours: the share of datasheet peak that matrix and
copy benchmarks reach against Hopper's, and the maturity of its kernels. Assumed, guided by what SemiAnalysis
(2024-12) and Chips and Cheese (2024-06) report of MI300X against H100 (about 47 and 73 % of the bf16 peak);
neither was read again for this table; the offsets of latency and handling, and those of architectures no row of
ours was measured on, are judgement."""


class Spread(NamedTuple):
    """Half-widths of the 80 % interval in log space, by quantity."""

    tokens_per_s: float
    ttft_s: float
    tpot_s: float


class Lookup(NamedTuple):
    """Coefficients of one configuration, the interval they deserve and where they come from."""

    coefficients: Coefficients
    spread: Spread
    basis: str
    source: str
    fewest: float = 0.0
    """Requests in flight between which the configuration's rows lie."""
    most: float = math.inf
    far: Spread = Spread(0.0, 0.0, 0.0)
    """Half-width that each e-fold beyond them adds in quadrature."""

    def spread_at(self, concurrency: FloatLike) -> tuple[Floats, Floats, Floats]:
        """Half-widths of the interval at a number of requests in flight: wider beyond those measured.

        Formula: √(spread² + (far × e-folds beyond the rows)²).
        """
        asked = np.maximum(np.asarray(concurrency, dtype=np.float64), 1.0)
        beyond = np.maximum(np.log(asked / self.most), 0.0) if math.isfinite(self.most) else 0.0
        beyond = beyond + np.maximum(np.log(max(self.fewest, 1.0) / asked), 0.0)
        tokens, ttft, tpot = (
            np.hypot(own, far * beyond) for own, far in zip(self.spread, self.far, strict=True)
        )
        return tokens, ttft, tpot


UNFITTED = Spread(0.5, 0.9, 0.5)


@lru_cache(maxsize=1)
def fitted() -> Mapping[str, Any]:
    """The shipped coefficient file, read once; empty where it is absent."""
    path = resources.files("pertoken.perf") / "data" / "serving.json"
    if not path.is_file():
        return {}
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def signature(model: Model) -> str:
    """An architecture by its sizes, so that tunes and renamed copies of a model share what was measured.

    >>> from pertoken.catalog.models import model
    >>> signature(model("meta-llama/Llama-3.1-8B"))
    '8.0B-A7.5B'
    """
    scale = 1e9
    return f"{model.parameters / scale:.1f}B-A{model.gemm_parameters / scale:.1f}B"


def level_keys(model: Model, gpu: Gpu, engine: str, precision: str, *, split: bool = False) -> dict[str, str]:
    """The key of a configuration at each level of effects; `split`: prefill and decode on GPUs of their own."""
    precision = precision_name(precision)
    family = engine_family(engine)
    native = formats(gpu, precision).compute == precision
    kind = precision if native else f"{precision}-weights"
    own = f"{kind}|{signature(model)}" + ("|split" if split else "")
    return {
        "all": "all",
        "vendor": gpu.vendor.lower(),
        "architecture": gpu.architecture,
        "engine": family,
        "engine|precision": f"{family}|{kind}",
        "precision": kind,
        "architecture|engine": f"{gpu.architecture}|{family}",
        "architecture|precision": f"{gpu.architecture}|{kind}",
        "architecture|engine|precision": f"{gpu.architecture}|{family}|{kind}",
        "gpu": gpu.name,
        "model": signature(model),
        "engine|model": f"{family}|{signature(model)}",
        "configuration": f"{gpu.name}|{family}|{own}",
        "release": f"{gpu.name}|{engine.lower()}|{own}",
    }


def coefficients_of(file: Mapping[str, Any], keys: Mapping[str, str]) -> Coefficients:
    """base × exp(hardware prior + Σ effects) for a configuration's keys."""
    base = file["base"] if file else {name: getattr(Coefficients(), name) for name in NAMES}
    logs = {name: math.log(base[name]) for name in NAMES}
    moves = [HARDWARE.get(keys["architecture"], {})]
    moves += [file["effects"].get(level, {}).get(key, {}) for level, key in keys.items()] if file else []
    for move in moves:
        for direction, value in move.items():
            for name in DIRECTIONS[direction]:
                logs[name] += value
    return Coefficients(**{name: math.exp(value) for name, value in logs.items()})


NOVELTY: Mapping[str, str] = {
    "none": "measured on this GPU with this engine and precision",
    "engine": "this architecture was measured, not with this engine and precision",
    "gpu": "this GPU was not measured, its architecture was",
    "architecture": "this architecture was not measured: its prior applies",
    "vendor": "no GPU of this vendor was measured: priors alone",
}
"""What a configuration's hardware and engine have in common with the rows of the fit, nearest first."""


def novelty_of(seen: Mapping[str, Any], keys: Mapping[str, str]) -> str:
    """Which entry of NOVELTY a configuration falls under."""
    for level, name in (
        ("vendor", "vendor"),
        ("architecture", "architecture"),
        ("gpu", "gpu"),
        ("architecture|engine|precision", "engine"),
    ):
        if keys[level] not in seen[level]:
            return name
    return "none"


def _spread(file: Mapping[str, Any], novelty: str, new_model: bool) -> Spread:
    """The interval of a configuration: that of its hardware, and in quadrature what a model not measured
    there adds."""
    widths = []
    for quantity in Spread._fields:
        own, known, model = (float(file["spread"][name][quantity]) for name in (novelty, "none", "model"))
        extra = max(model**2 - known**2, 0.0) if new_model else 0.0
        widths.append(math.sqrt(own**2 + extra))
    return Spread(*widths)


@lru_cache(maxsize=512)
def _lookup(keys: tuple[tuple[str, str], ...]) -> Lookup:
    file, named = fitted(), dict(keys)
    found = coefficients_of(file, named)
    label = f"{named['architecture']}, {named['engine']}, {named['precision']}"
    if not file:
        return Lookup(found, UNFITTED, "roofline", f"roofline with assumed efficiencies ({label})")
    novelty = novelty_of(file["seen"], named)
    measured = novelty in ("none", "engine")
    new_model = (
        named["configuration"] not in file["spread_own"]
        if measured
        else named["model"] not in file["seen"]["model"]
    )
    basis = "roofline" if novelty in ("architecture", "vendor") else "fitted"
    text = f"roofline fitted {file['date']} to {file['rows']} measured points ({label}): {NOVELTY[novelty]}"
    if new_model:
        aside = measured and named["configuration"] in file["range"]
        text += "; this model there in rows at low weight alone" if aside else "; not this model there"
    own = None if new_model or novelty != "none" else file["spread_own"].get(named["configuration"])
    low, high = file["range"].get(named["configuration"], (0.0, math.inf))
    far = Spread(*(file["far"][quantity] for quantity in Spread._fields))
    spread = Spread(*own) if own else _spread(file, novelty, new_model)
    return Lookup(found, spread, basis, text, low, high, far)


def lookup(model: Model, gpu: Gpu, engine: str, precision: str, *, split: bool = False) -> Lookup:
    """Coefficients for a configuration, the interval they deserve and what supports them."""
    return _lookup(tuple(level_keys(model, gpu, engine, precision, split=split).items()))


def stack(items: list[Coefficients]) -> Coefficients:
    """Coefficients of several configurations as one whose fields are arrays of shape (len(items),)."""
    return Coefficients(**{n: np.array([getattr(c, n) for c in items], dtype=np.float64) for n in NAMES})
