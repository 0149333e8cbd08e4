"""The training predictor: seconds of an optimiser step from counted work and fitted efficiencies; restarts.

A GPU's step is counted in seconds at datasheet peaks (`TrainingWork`) and weighed with efficiencies fitted on
measured runs (`Efficiencies`, ``data/training.json``, made by ``bench/fit/training.py``):

    step = (GEMM / e + experts / (e × e_moe) + attention / e_attn + memory traffic) × (1 + recompute share)
           + tensor and context parallel messages + expert dispatch + launches, × pipeline bubble × scale
    exposed = data-parallel messages not hidden behind the step
    tokens_per_s = global batch × sequence / (step + exposed)

>>> from pertoken.catalog.gpus import gpu
>>> from pertoken.catalog.models import model
>>> run = predict_training(model("Llama-3.1-8B"), gpu("H100"), TrainingPoint(64, 8192, 128, precision="fp8"))
>>> bool(run.tokens_per_s.low < run.tokens_per_s.value < run.tokens_per_s.high)
True
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from pertoken.catalog.gpus import Gpu
from pertoken.catalog.models import Model
from pertoken.errors import CannotServeError, InputError
from pertoken.perf._points import MeasuredRow
from pertoken.perf._training_work import (
    CHECKPOINTING,
    KINDS,
    TrainingLayout,
    TrainingWork,
    check_state,
    counted_precision,
    training_layout,
    training_precision,
    training_work,
)
from pertoken.perf.point import FloatLike, Interval, TrainingPoint, TrainingPrediction
from pertoken.perf.power import gpu_power_w, power_log_spread
from pertoken.units import TERA

FAMILY = {"blackwell-ultra": "blackwell"}
"""Architectures whose training efficiency is that of another: the same tensor cores at training
precisions."""


MOST_OF_PEAK = 0.8
"""Share of the bf16 peak that no GPU's GEMMs go beyond, however many watts it has per FLOP: the best measured (A100,
B300) reach 0.74. Cards with much memory or graphics beside few tensor cores (H20, A40, RTX 3090) draw their watts for
those."""


class Efficiencies(NamedTuple):
    """How far from ideal each part is; a field is a float, or an array of rows."""

    gemm: FloatLike
    attention: FloatLike
    hidden_half: FloatLike
    """Hidden size at which GEMMs reach half of `gemm`."""
    expert: FloatLike
    memory: FloatLike
    recompute: FloatLike
    parallel: FloatLike
    dispatch: FloatLike
    reduce: FloatLike
    layer_s: FloatLike
    expert_layer_s: FloatLike
    bubble: FloatLike
    scale: FloatLike


def step_seconds(work: TrainingWork, e: Efficiencies) -> FloatLike:
    """Seconds of one optimiser step.

    Parameters: work; e, floats or arrays that broadcast. Formula: see the module; data-parallel messages x
    hide behind a step of c seconds except x²/(x + c): all of it where they dominate, almost none where they
    are short.
    """
    gemm = e.gemm * (work.hidden / (work.hidden + e.hidden_half))
    compute = work.gemm_s / gemm + work.expert_gemm_s / (gemm * e.expert) + work.attention_s / e.attention
    step = (
        (compute + e.memory * work.memory_s) * (1 + e.recompute * work.recompute_share)
        + e.parallel * work.parallel_s
        + e.dispatch * work.dispatch_s
        + e.layer_s * work.layer_passes
        + e.expert_layer_s * work.expert_layer_passes
    )
    step = step * (1 + e.bubble * work.bubble) * (1 + e.scale * work.doublings)
    messages = e.reduce * work.reduce_s
    return step + messages * messages / (messages + step)


def predict_training(model: Model, gpu: Gpu, point: TrainingPoint) -> TrainingPrediction:
    """Tokens per second of a training job, its MFU and the power of one GPU, each with an 80 % interval.

    Parameters: model; gpu; point (degrees of 0 are chosen: the narrowest tensor parallelism that holds the
    weights and splits no sample further than the global batch demands). MFU follows the published convention
    (PaLM): 6 × parameters used per token + attention counted without the causal half, over the dense peak;
    for ``fp4`` over the fp8 peak, since part of its GEMMs run there. LoRA counts 4 × parameters: the base's
    weights get no gradients. Raises InputError on a point that makes no sense; CannotServeError where the GPU
    lacks the precision or weights, gradients, optimiser and activations do not fit, saying by how much.
    Source: ``data/training.json`` names rows and date of the fit.

    >>> from pertoken.catalog.gpus import gpu
    >>> from pertoken.catalog.models import model
    >>> predict_training(model("Llama-3.1-8B"), gpu("L4"), TrainingPoint(1))
    Traceback (most recent call last):
    pertoken.errors.CannotServeError: pretraining meta-llama/Llama-3.1-8B needs 112.4 GB for weights, \
gradients and optimiser; 1 × L4 holds 18.2 GB of it: at least 7 GPUs are needed
    """
    precision = training_precision(point.precision)
    _check(model, gpu, point, precision)
    layout = training_layout(model, gpu, point)
    work = training_work(model, gpu, point, layout)
    fit = _fit()
    found = efficiencies(fit, gpu, precision, point.kind)
    step_s = step_seconds(work, found)
    tokens_per_s = layout.global_batch * point.sequence_tokens / step_s
    peak = gpu.flops[counted_precision(precision)]
    mfu = tokens_per_s * model_flops(model, point) / (point.gpus * peak)
    spread, basis = _spread(fit, gpu, model, precision)
    return TrainingPrediction(
        tokens_per_s=_interval(tokens_per_s, spread),
        mfu=_interval(mfu, spread),
        gpu_power_w=_power(gpu, model, point, work, found, step_s),
        basis=basis,
        source=_source(fit, point, layout),
    )


def training_point(row: MeasuredRow) -> TrainingPoint:
    """The configuration of a measured training run; raises InputError on an unknown precision."""
    training_precision(row.precision)
    return TrainingPoint(
        gpus=int(row.gpus),
        sequence_tokens=row.input_tokens,
        global_batch=row.global_batch,
        precision=row.precision,
        kind=row.training,
        checkpointing=row.checkpointing,
        **row.degrees,
    )


def model_flops(model: Model, point: TrainingPoint) -> float:
    """FLOPs of the model per trained token [FLOP], by the published convention.

    (6 for a trained, 4 for a frozen base) × active parameters + 3 × attention over the whole sequence.

    >>> from pertoken.catalog.models import model
    >>> round(model_flops(model("Llama-3.1-8B"), TrainingPoint(8, 8192)) / 1e9, 1)   # 6 × 8.03 + 12.9
    61.1
    """
    factor = 4.0 if point.kind == "lora" else 6.0
    attention = float(model.attention_flops(float(point.sequence_tokens), prefill=True))
    return factor * (model.gemm_parameters + _embedding(model)) + 3 * attention


def _embedding(model: Model) -> float:
    return 0.0 if model.tied_embedding else model.embedding_parameters


def _check(model: Model, gpu: Gpu, point: TrainingPoint, precision: str) -> None:
    if point.kind not in KINDS:
        raise InputError(f"unknown kind of training {point.kind!r}: one of {', '.join(KINDS)}")
    if point.checkpointing not in CHECKPOINTING:
        raise InputError(
            f"unknown activation checkpointing {point.checkpointing!r}: one of none, selective, full"
        )
    for name, value, least in (
        ("gpus", point.gpus, 1),
        ("sequence_tokens", point.sequence_tokens, 1),
        ("global_batch", point.global_batch, 0),
        *((degree, getattr(point, degree), 0) for degree in ("tp", "pp", "cp", "ep")),
    ):
        if not math.isfinite(value) or value < least:
            raise InputError(f"{name} is {value}: a number of at least {least} is needed")
    if precision not in gpu.flops or counted_precision(precision) not in gpu.flops:
        raise CannotServeError(f"{gpu.name} has no {precision}: it computes in {', '.join(gpu.flops)}")
    check_state(model, gpu, point)


def efficiencies(fit: Mapping[str, Any], gpu: Gpu, precision: str, kind: str) -> Efficiencies:
    """Efficiencies of a GPU at a precision: its architecture's, its own where it was measured, and its power
    budget.

    log e = base + architecture + GPU + precision + power × log(watts per FLOP relative to the architecture's
    reference), the first three and the last at most log `MOST_OF_PEAK`; an architecture nobody measured takes its
    vendor's value.
    """
    shared, family = fit["shared"], family_of(gpu)
    own = fit["architecture"].get(family, fit["vendor"].get(gpu.vendor, fit["vendor"]["other"]))
    own += fit["gpu"].get(gpu.name, 0.0) + shared["power"] * _watts_log_ratio(fit, gpu, family)
    own = min(own, math.log(MOST_OF_PEAK) - shared["base"])
    log_gemm = shared["base"] + own + fit["precision"][precision]
    if kind == "lora" and precision == "fp4":
        log_gemm += shared["lora_fp4"]
    names = (f for f in Efficiencies._fields if f not in ("gemm", "attention"))
    return Efficiencies(
        gemm=math.exp(log_gemm),
        attention=math.exp(shared["attention"] + own),
        **{name: math.exp(shared[name]) for name in names},
    )


def family_of(gpu: Gpu) -> str:
    """The architecture whose training efficiencies apply."""
    return FAMILY.get(gpu.architecture, gpu.architecture)


def watts_per_tflops(gpu: Gpu) -> float:
    """Board power per dense bf16 TFLOP/s [W]: what clocks under load depend on.

    >>> from pertoken.catalog.gpus import gpu
    >>> round(watts_per_tflops(gpu("MI325X")) / watts_per_tflops(gpu("MI300X")), 3)   # 1,000 W / 750 W
    1.333
    """
    return gpu.tdp_w / (gpu.flops["bf16"] / TERA)


def _watts_log_ratio(fit: Mapping[str, Any], gpu: Gpu, family: str) -> float:
    reference = fit["reference_watts_per_tflops"].get(family)
    return math.log(watts_per_tflops(gpu) / reference) if reference else 0.0


def _spread(fit: Mapping[str, Any], gpu: Gpu, model: Model, precision: str) -> tuple[float, str]:
    """Half-width of the 80 % interval in log space and the basis: by what of GPU, precision and model was
    measured."""
    spread = fit["spread"]
    if family_of(gpu) not in fit["architecture"]:
        return spread["architecture"], "roofline"
    if gpu.name not in fit["rows_by_gpu"] or f"{family_of(gpu)} {precision}" not in fit["rows_by_precision"]:
        return spread["gpu"], "fitted"
    return (spread["point"] if model.name in fit["rows_by_model"] else spread["model"]), "fitted"


def _interval(value: FloatLike, spread: float) -> Interval:
    array = np.asarray(value, dtype=np.float64)
    return Interval(array, array * math.exp(-spread), array * math.exp(spread))


def _power(
    gpu: Gpu, model: Model, point: TrainingPoint, work: TrainingWork, e: Efficiencies, step_s: FloatLike
) -> Interval:
    """Power from the shares of compute, bandwidth and links in use; fitted on serving, where the shares are lower."""
    compute = (work.gemm_s + work.expert_gemm_s) * (1 + np.asarray(work.recompute_share)) + work.attention_s
    sent = work.parallel_s + work.dispatch_s + work.reduce_s
    shares = (compute, e.memory * np.asarray(work.memory_s), sent)
    c, m, links = (np.clip(np.asarray(s) / step_s, 0.0, 1.0) for s in shares)
    precision = counted_precision(training_precision(point.precision))
    power_w = gpu_power_w(gpu, c, m, links, precision, model=model, gpus=point.gpus)
    spread = power_log_spread(gpu, precision)
    low, high = (np.clip(power_w * math.exp(s), gpu.idle_w, gpu.tdp_w) for s in (-spread, spread))
    return Interval(power_w, low, high)


def _source(fit: Mapping[str, Any], point: TrainingPoint, layout: TrainingLayout) -> str:
    text = (
        f"fitted {fit['date']} on {fit['rows']} measured runs; tp {layout.tp} cp {layout.cp} pp {layout.pp} "
        f"ep {layout.ep}, {layout.micro_batches:.0f} micro-batches"
    )
    if not point.global_batch:
        text += f"; global batch of {layout.global_batch:.0f} samples assumed"
    return text


@lru_cache(maxsize=1)
def _fit() -> Mapping[str, Any]:
    text = resources.files("pertoken.perf").joinpath("data/training.json").read_text(encoding="utf-8")
    fit: Mapping[str, Any] = json.loads(text)
    return fit


def best_checkpoint_minutes(mtbf_hours: FloatLike, checkpoint_cost_minutes: FloatLike) -> FloatLike:
    """Minutes between checkpoints that lose least: Young's √(2 × cost × mean time between failures).

    Parameters: mtbf_hours [h] of the whole job; checkpoint_cost_minutes [min] the job stands still per
    checkpoint. Raises InputError where either is not positive. Source: Young 1974, doi 10.1145/361147.361115.

    >>> best_checkpoint_minutes(10.0, 3.0)   # √(2 × 3 × 600)
    60.0
    """
    cost, mtbf_minutes = np.asarray(checkpoint_cost_minutes, float), np.asarray(mtbf_hours, float) * _MINUTES
    if not ((cost > 0) & (mtbf_minutes > 0)).all():
        raise InputError("best_checkpoint_minutes: mtbf_hours and checkpoint_cost_minutes must be above 0")
    return _plain(np.sqrt(2 * cost * mtbf_minutes))


def retained_fraction(
    mtbf_hours: FloatLike,
    checkpoint_minutes: FloatLike,
    checkpoint_cost_minutes: FloatLike,
    restart_minutes: FloatLike,
) -> FloatLike:
    """Share of wall time whose training steps are kept, with failures and checkpoints at a fixed interval.

    Parameters, each a float or arrays that broadcast: mtbf_hours [h] mean time between failures of the whole
    job (one GPU's over their count; infinity: never); checkpoint_minutes [min] of training between
    checkpoints; checkpoint_cost_minutes [min] the job stands still for one; restart_minutes [min] to detect,
    reschedule and reload. Formula (Daly's exact expectation for exponential failures, interval τ, cost δ,
    restart R, mean M): τ / (M × e^(R/M) × (e^((τ+δ)/M) − 1)); without failures τ / (τ + δ).
    Raises InputError where the interval or mtbf is not positive or a cost is negative.
    Source: J. T. Daly, Future Generation Computer Systems 22 (2006), doi 10.1016/j.future.2004.11.016.

    >>> round(retained_fraction(float("inf"), 57.0, 3.0, 10.0), 4)   # only the checkpoints: 57 / 60
    0.95
    >>> round(retained_fraction(10.0, 57.0, 3.0, 10.0), 4)   # 57 / (600 × e^(1/60) × (e^0.1 − 1))
    0.8884
    """
    mtbf_minutes = np.asarray(mtbf_hours, float) * _MINUTES
    interval, cost, restart = (
        np.asarray(v, float) for v in (checkpoint_minutes, checkpoint_cost_minutes, restart_minutes)
    )
    if not ((mtbf_minutes > 0) & (interval > 0) & (cost >= 0) & (restart >= 0)).all():
        raise InputError(
            "retained_fraction: mtbf_hours and checkpoint_minutes must be above 0, costs not negative; found "
            f"{mtbf_hours}, {checkpoint_minutes}, {checkpoint_cost_minutes}, {restart_minutes}"
        )
    failures = 1 / mtbf_minutes
    # expm1(x) / failures is the wall time of x minutes of work; its limit without failures is the work
    # itself.
    segment = interval + cost
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        wall = np.exp(restart * failures) * np.where(
            failures > 0, np.expm1(segment * failures) / failures, segment
        )
    return _plain(interval / wall)


_MINUTES = 60.0


def _plain(value: Any) -> FloatLike:
    array = np.asarray(value, dtype=np.float64)
    return array if array.ndim else float(array)
