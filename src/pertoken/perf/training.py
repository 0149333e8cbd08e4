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
from pertoken.perf.point import FloatLike, Interval, TrainingPoint, TrainingPrediction
from pertoken.perf.power import gpu_power_w, power_log_spread
from pertoken.units import BYTES_PER_GB, TERA

KINDS = ("pretrain", "full", "lora")
CHECKPOINTING = ("", "none", "selective", "full")
PRECISION_NAMES = {
    "bf16": "bf16", "bfloat16": "bf16", "amp_bf16": "bf16", "fp16": "bf16", "amp_fp16": "bf16",
    "fp8": "fp8", "amp_fp8": "fp8", "fp8-cs": "fp8", "fp8-mx": "fp8", "fp8-sc": "fp8", "fp8-ds": "fp8",
    "mxfp8": "fp8", "fp4": "fp4", "nvfp4": "fp4", "mxfp4": "fp4",
}  # fmt: skip
"""Foreign name of a training precision to ours; ``fp4`` is what is run under that name: GEMMs in four and
eight bits mixed, so its work is counted at the eight-bit peak and the gain is a fitted factor."""

FAMILY = {"blackwell-ultra": "blackwell"}
"""Architectures whose training efficiency is that of another: the same tensor cores at training
precisions."""

MEMORY_FRACTION = 0.92
"""Share of a GPU's memory a training process may fill."""
WORKSPACE_BYTES = 4e9
"""Communication buffers, graphs and fragmentation of one GPU."""
RESIDENT_SHARE = 0.55
"""Share of memory that weights and gradients may take before tensor parallelism is widened; the rest is for
activations and optimiser state."""
STATE_BYTES = {"weights": 2.0, "gradients": 4.0, "optimiser": 12.0}
"""Bytes per trained weight of mixed-precision Adam: bf16 weight, fp32 gradient, fp32 master copy and two
moments."""
DEFAULT_STEP_TOKENS = 16_384
"""Tokens per GPU and optimiser step where no global batch is given."""
MICRO_BATCH_TOKENS = 8_192
"""Tokens per micro-batch and model replica where none is given (at least one sequence)."""
ATTENTION_PASSES = 3.5
"""Forward, and a backward of two and a half: flash attention computes the scores again."""
CONTEXT_POINTS = (np.arange(16) + 0.5) / 16
"""Where in a causal sequence attention is averaged: exact for full attention, close for windows."""


class TrainingWork(NamedTuple):
    """What one GPU does in one optimiser step: seconds at datasheet peaks, and counts. Floats, or arrays of
    rows."""

    step_tokens: FloatLike
    gemm_s: FloatLike
    expert_gemm_s: FloatLike
    attention_s: FloatLike
    memory_s: FloatLike
    """Each layer's residual stream read or written once per pass, at peak memory bandwidth."""
    recompute_share: FloatLike
    """A full recompute's forward pass over all passes; 0 without full activation checkpointing."""
    parallel_s: FloatLike
    """Tensor and context parallel messages at peak link bandwidth."""
    dispatch_s: FloatLike
    """Tokens sent to their experts and back, forward and backward."""
    reduce_s: FloatLike
    """Gradients reduced and weights gathered once, at peak link bandwidth."""
    layer_passes: FloatLike
    """Layers × passes × micro-batches on this GPU."""
    expert_layer_passes: FloatLike
    bubble: FloatLike
    """(pipeline stages − 1) / micro-batches."""
    doublings: FloatLike
    """log2 of how many scale-up domains the job spans."""
    hidden: FloatLike


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


class TrainingLayout(NamedTuple):
    """How a job is spread: tensor × context parallel GPUs, pipeline stages, expert parallel degree, batch
    split."""

    tp: int
    cp: int
    pp: int
    ep: int
    replicas: float
    global_batch: float
    micro_batches: float
    recompute: bool


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
    pertoken.errors.CannotServeError: pretraining meta-llama/Llama-3.1-8B needs 144.5 GB for weights, \
gradients and optimiser; 1 × L4 holds 18.2 GB of it: at least 8 GPUs are needed
    """
    precision = training_precision(point.precision)
    _check(model, gpu, point, precision)
    layout = training_layout(model, gpu, point)
    work = training_work(model, gpu, point, layout)
    fit = _fit()
    step_s = step_seconds(work, efficiencies(fit, gpu, precision, point.kind))
    tokens_per_s = layout.global_batch * point.sequence_tokens / step_s
    peak = gpu.flops[_counted(precision)]
    mfu = tokens_per_s * model_flops(model, point) / (point.gpus * peak)
    spread, basis = _spread(fit, gpu, model, precision)
    return TrainingPrediction(
        tokens_per_s=_interval(tokens_per_s, spread),
        mfu=_interval(mfu, spread),
        gpu_power_w=_power(gpu, work, step_s, precision),
        basis=basis,
        source=_source(fit, point, layout),
    )


def training_precision(name: str) -> str:
    """Our name of a training precision as frameworks and benchmarks write it: ``bf16``, ``fp8`` or ``fp4``.

    Raises InputError for a name that is none.

    >>> [training_precision(n) for n in ("amp_bf16", "FP8-MX", "fp8/fp4 mixed (see submission config)")]
    ['bf16', 'fp8', 'fp4']
    """
    text = name.strip().lower()
    if "mixed" in text and "fp4" in text:
        return "fp4"
    if (found := PRECISION_NAMES.get(text)) is None:
        raise InputError(f"unknown training precision {name!r}: one of bf16, fp8, fp4")
    return found


def training_point(row: MeasuredRow) -> TrainingPoint:
    """The configuration of a measured training run; raises InputError where the row names no known precision."""
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


def _counted(precision: str) -> str:
    """The precision whose datasheet peak counts the work."""
    return "fp8" if precision == "fp4" else precision


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
    if precision not in gpu.flops or _counted(precision) not in gpu.flops:
        raise CannotServeError(f"{gpu.name} has no {precision}: it computes in {', '.join(gpu.flops)}")
    _check_state(model, gpu, point)


def _check_state(model: Model, gpu: Gpu, point: TrainingPoint) -> None:
    """Weights, gradients and optimiser, spread over all GPUs, must fit whatever the layout."""
    need = model.parameters * _state_bytes(model, point)
    room = _usable_bytes(gpu)
    if need > room * point.gpus:
        what = "weights" if point.kind == "lora" else "weights, gradients and optimiser"
        verb = {"lora": "LoRA of", "full": "fine-tuning", "pretrain": "pretraining"}[point.kind]
        raise CannotServeError(
            f"{verb} {model.name} needs {need / BYTES_PER_GB:.1f} GB for {what}; {point.gpus} × {gpu.name} "
            f"holds {room * point.gpus / BYTES_PER_GB:.1f} GB of it: at least {math.ceil(need / room)} GPUs are "
            "needed"
        )


def _usable_bytes(gpu: Gpu) -> float:
    return max((gpu.memory_bytes or gpu.memory_gb * BYTES_PER_GB) * MEMORY_FRACTION - WORKSPACE_BYTES, 1.0)


def _state_bytes(model: Model, point: TrainingPoint) -> float:
    """Bytes per weight a job holds somewhere: the frozen base alone with LoRA, else all of mixed-precision
    Adam."""
    if point.kind == "lora":
        return 2.0 if training_precision(point.precision) == "bf16" else 1.0
    return sum(STATE_BYTES.values())


def training_layout(model: Model, gpu: Gpu, point: TrainingPoint) -> TrainingLayout:
    """The layout of a job, chosen where the point leaves it open.

    Tensor × context parallelism is as wide as gpus / global_batch (no fewer GPUs can share a sample) and as
    the weights with their gradients need, at most the scale-up domain; the rest of the need becomes pipeline
    stages. Raises CannotServeError where given degrees do not divide the GPUs or one sequence's activations
    do not fit.
    """
    resident = (
        _state_bytes(model, point)
        if point.kind == "lora"
        else STATE_BYTES["weights"] + STATE_BYTES["gradients"]
    )
    split = model.parameters - model.routed_parameters
    domain = min(gpu.scale_up_gpus, point.gpus)
    ep = point.ep or (_divisor(model.experts, domain) if model.moe_layers else 1)
    per_gpu = split + model.routed_parameters / ep
    groups = per_gpu * resident / (_usable_bytes(gpu) * RESIDENT_SHARE)
    batch_ways = math.ceil(point.gpus / point.global_batch) if point.global_batch else 1
    cp = point.cp or 1
    tp = point.tp or min(_power_of_two(max(groups, batch_ways / cp)), _power_of_two_below(min(domain, 8)))
    pp = point.pp or max(1, min(_power_of_two(groups / tp), model.layers, point.gpus // (tp * cp)))
    replicas = point.gpus / (tp * cp * pp)
    if replicas < 1:
        raise CannotServeError(f"a replica of tp {tp} × cp {cp} × pp {pp} needs more than {point.gpus} GPUs")
    if not point.global_batch:
        batch = max(replicas, point.gpus * DEFAULT_STEP_TOKENS / point.sequence_tokens)
    else:
        batch = point.global_batch
    per_replica = max(batch / replicas, 1.0)
    micro = min(max(MICRO_BATCH_TOKENS / point.sequence_tokens, 1.0), per_replica)
    recompute = _recompute(model, gpu, point, tp * cp, pp, replicas)
    return TrainingLayout(tp, cp, pp, ep, replicas, batch, per_replica / micro, recompute)


def _recompute(model: Model, gpu: Gpu, point: TrainingPoint, ways: int, pp: int, replicas: float) -> bool:
    """Whether activations are recomputed in full: as asked; raises CannotServeError where even that does not
    fit.

    One sequence keeps its layers' inputs (2 bytes × hidden × layers), one layer's intermediates (about 34
    bytes × hidden, flash attention) and its logits (6 bytes × vocabulary).
    """
    state = model.parameters * _state_bytes(model, point) / point.gpus
    tokens = point.sequence_tokens / ways
    kept = tokens * (model.hidden * (2.0 * model.layers / pp * min(pp, 2) + 34.0) + 2.0 * model.vocabulary)
    room = _usable_bytes(gpu)
    if state + kept > room:
        raise CannotServeError(
            f"training {model.name} on {point.gpus} × {gpu.name} needs {(state + kept) / BYTES_PER_GB:.1f} GB "
            f"per GPU ({state / BYTES_PER_GB:.1f} state, {kept / BYTES_PER_GB:.1f} activations of one sequence "
            f"of {point.sequence_tokens:.0f} tokens over {ways} GPUs); {room / BYTES_PER_GB:.1f} GB can be "
            "used: more GPUs, tp or cp are needed"
        )
    return point.checkpointing == "full"


def _power_of_two(value: float) -> int:
    """The smallest power of two of at least `value`."""
    return 1 << max(0, math.ceil(math.log2(max(value, 1.0)) - 1e-9))


def _power_of_two_below(value: float) -> int:
    return 1 << int(math.log2(max(value, 1)))


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` of at most `most`."""
    return max(d for d in range(1, most + 1) if number % d == 0)


def training_work(model: Model, gpu: Gpu, point: TrainingPoint, layout: TrainingLayout) -> TrainingWork:
    """The counted work of one GPU and optimiser step; no efficiency in here."""
    tokens = layout.global_batch * point.sequence_tokens / point.gpus
    passes = 2.0 if point.kind == "lora" else 3.0
    peak = gpu.flops[_counted(training_precision(point.precision))]
    routed = model.active_routed_parameters
    contexts = float(point.sequence_tokens) * CONTEXT_POINTS
    attention = float(np.mean(model.attention_flops(contexts, prefill=True)))
    values = model.hidden * model.layers * tokens
    ways = layout.tp * layout.cp
    layer_passes = passes * layout.micro_batches / layout.pp
    expert_link = gpu.intra_node_bytes_per_s if layout.ep <= gpu.scale_up_gpus else gpu.inter_node_bytes_per_s
    way_link = gpu.intra_node_bytes_per_s if ways <= gpu.scale_up_gpus else gpu.inter_node_bytes_per_s
    sent = model.moe_layers * model.experts_active * model.hidden * tokens if layout.ep > 1 else 0.0
    return TrainingWork(
        step_tokens=tokens,
        gemm_s=passes * 2 * (model.gemm_parameters - routed) * tokens / peak,
        expert_gemm_s=passes * 2 * routed * tokens / peak,
        attention_s=ATTENTION_PASSES * attention * tokens / gpu.flops["bf16"],
        memory_s=passes * 2 * values / gpu.memory_bytes_per_s,
        recompute_share=1 / passes if layout.recompute else 0.0,
        parallel_s=16 * values * (ways - 1) / way_link,
        dispatch_s=8 * sent / expert_link,
        reduce_s=_reduce_s(model, gpu, point, layout),
        layer_passes=layer_passes * model.layers,
        expert_layer_passes=layer_passes * model.moe_layers,
        bubble=(layout.pp - 1) / layout.micro_batches,
        doublings=math.log2(max(point.gpus / gpu.scale_up_gpus, 1.0)),
        hidden=float(model.hidden),
    )


def _reduce_s(model: Model, gpu: Gpu, point: TrainingPoint, layout: TrainingLayout) -> float:
    """Gradients (4 bytes) reduced and weights (2 bytes) gathered across replicas; adapters alone are nothing.

    Inside a scale-up domain each GPU moves its own shard. Across domains the domain's GPUs share the work of
    one copy, each over its own network card.
    """
    if point.kind == "lora" or layout.replicas <= 1:
        return 0.0
    moved = (STATE_BYTES["gradients"] + STATE_BYTES["weights"]) / layout.pp
    always = model.parameters - model.routed_parameters
    if point.gpus <= gpu.scale_up_gpus:
        return moved * (always / layout.tp + model.routed_parameters / layout.ep) / gpu.intra_node_bytes_per_s
    cards = gpu.inter_node_bytes_per_s * gpu.scale_up_gpus
    return moved * (always + model.routed_parameters) / cards


def efficiencies(fit: Mapping[str, Any], gpu: Gpu, precision: str, kind: str) -> Efficiencies:
    """Efficiencies of a GPU at a precision: its architecture's, its own where it was measured, and its power
    budget.

    log e = base + architecture + GPU + precision + power × log(watts per FLOP relative to the architecture's
    reference); an architecture nobody measured takes its vendor's value.
    """
    shared, family = fit["shared"], family_of(gpu)
    own = fit["architecture"].get(family, fit["vendor"].get(gpu.vendor, fit["vendor"]["other"]))
    own += fit["gpu"].get(gpu.name, 0.0) + shared["power"] * _watts_log_ratio(fit, gpu, family)
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
    >>> round(watts_per_tflops(gpu("MI325X")) / watts_per_tflops(gpu("MI300X")), 3)   # one die, 1 kW and 750 W
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


def _power(gpu: Gpu, work: TrainingWork, step_s: FloatLike, precision: str) -> Interval:
    compute = (work.gemm_s + work.expert_gemm_s) * (1 + np.asarray(work.recompute_share)) + work.attention_s
    sent = work.parallel_s + work.dispatch_s + work.reduce_s
    shares = [
        np.clip(np.asarray(s) / step_s, 0.0, 1.0) for s in (compute, 10 * np.asarray(work.memory_s), sent)
    ]
    power_w = gpu_power_w(gpu, shares[0], shares[1], shares[2], _counted(precision))
    spread = power_log_spread(gpu)
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
