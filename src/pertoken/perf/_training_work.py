"""What a training job asks of one GPU per optimiser step: layout, memory, counted work. No efficiency in
here."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

from pertoken.catalog.gpus import Gpu
from pertoken.catalog.models import Model
from pertoken.errors import CannotServeError, InputError
from pertoken.perf.point import FloatLike, TrainingPoint
from pertoken.units import BYTES_PER_GB

KINDS = ("pretrain", "full", "lora")
CHECKPOINTING = ("", "none", "selective", "full")
PRECISION_NAMES = {
    "bf16": "bf16", "bfloat16": "bf16", "fp16": "bf16", "float16": "bf16", "half": "bf16",
    "fp8": "fp8", "float8": "fp8", "mxfp8": "fp8", "fp4": "fp4", "nvfp4": "fp4", "mxfp4": "fp4",
}  # fmt: skip
"""Foreign name of a training precision to ours, without what `_RECIPE` strips; ``fp4`` is what is run under that
name: GEMMs in four and eight bits mixed, so its work is counted at the eight-bit peak and the gain is a fitted
factor."""
_RECIPE = re.compile(
    r"^(torch\.|amp_)|(?<=8)[-_ ](cs|mx|sc|ds|current|delayed|block|blockwise|tensorwise|rowwise|hybrid|e4m3|e4m3fn)$"
)
"""What frameworks put around a precision: a namespace before it, how FP8 is scaled after it."""

MEMORY_FRACTION = 0.92
"""Share of a GPU's memory a training process may fill."""
WORKSPACE_BYTES = 4e9
"""Communication buffers, graphs and fragmentation of one GPU."""
RESIDENT_SHARE = 0.55
"""Share of memory that weights and gradients may take before tensor parallelism is widened; the rest is for
activations and optimiser state."""
STATE_BYTES = {"weights": 2.0, "gradients": 4.0}
"""Bytes per weight that stay on each model replica: bf16 weight, fp32 gradient; the optimiser is sharded."""
LEAST_STATE_BYTES = 14.0
"""Bytes per weight a job holds at the least, fully sharded: fp32 weight, Adam's two moments, bf16 gradient."""
DEFAULT_STEP_TOKENS = 16_384
"""Tokens per GPU and optimiser step where no global batch is given."""
MICRO_BATCH_TOKENS = 8_192
"""Tokens per micro-batch and model replica where none is given (at least one sequence)."""
LAYER_BYTES = 34.0
"""Bytes per value of the residual stream that one layer's intermediates take with flash attention (Korthikanti et al.,
arXiv 2205.05198)."""
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


def training_precision(name: str) -> str:
    """Our name of a training precision as frameworks and benchmarks write it: ``bf16``, ``fp8`` or ``fp4``.

    Raises InputError for a name that is none.

    >>> [training_precision(n) for n in ("amp_bf16", "FP8-MX", "fp8/fp4 mixed (see submission config)")]
    ['bf16', 'fp8', 'fp4']
    """
    text = _RECIPE.sub("", name.strip().lower())
    if "mixed" in text and "fp4" in text:
        return "fp4"
    if (found := PRECISION_NAMES.get(text)) is None:
        raise InputError(f"unknown training precision {name!r}: one of bf16, fp8, fp4")
    return found


def counted_precision(precision: str) -> str:
    """The precision whose datasheet peak counts the work: fp8 for ``fp4``, which mixes the two."""
    return "fp8" if precision == "fp4" else precision


def check_state(model: Model, gpu: Gpu, point: TrainingPoint) -> None:
    """Weights, gradients and optimiser, spread over all GPUs, must fit whatever the layout."""
    need = model.parameters * _state_bytes(model, point)
    room = _usable_bytes(gpu)
    if need > room * point.gpus:
        what = "weights" if point.kind == "lora" else "weights, gradients and optimiser"
        verb = {"lora": "LoRA of", "full": "fine-tuning", "pretrain": "pretraining"}[point.kind]
        fewest = math.ceil(need / room)
        raise CannotServeError(
            f"{verb} {model.name} needs {need / BYTES_PER_GB:.1f} GB for {what}; {point.gpus} × {gpu.name} "
            f"holds {room * point.gpus / BYTES_PER_GB:.1f} GB of it: at least {fewest} GPUs are needed"
        )


def _usable_bytes(gpu: Gpu) -> float:
    return max((gpu.memory_bytes or gpu.memory_gb * BYTES_PER_GB) * MEMORY_FRACTION - WORKSPACE_BYTES, 1.0)


def _state_bytes(model: Model, point: TrainingPoint) -> float:
    """Bytes per weight a job holds somewhere: the frozen base alone with LoRA, else Adam in mixed precision,
    fully sharded."""
    if point.kind == "lora":
        return 2.0 if training_precision(point.precision) == "bf16" else 1.0
    return LEAST_STATE_BYTES


def training_layout(model: Model, gpu: Gpu, point: TrainingPoint) -> TrainingLayout:
    """The layout of a job, chosen where the point leaves it open.

    Tensor × context parallelism is as wide as gpus / global_batch (no fewer GPUs can share a sample) and, in
    dense models, as the weights with their gradients need, at most 8 within the scale-up domain; the rest of
    the need becomes pipeline stages (small experts are never sliced). Experts spread over the domain. Raises
    CannotServeError where a replica needs more GPUs than there are or one sequence's activations do not fit.
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
    sliced = 1.0 if model.moe_layers else groups
    tp = point.tp or min(_power_of_two(max(sliced, batch_ways / cp)), _power_of_two_below(min(domain, 8)))
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
    _check_activations(model, gpu, point, tp * cp, pp)
    return TrainingLayout(tp, cp, pp, ep, replicas, batch, per_replica / micro, point.checkpointing == "full")


def _check_activations(model: Model, gpu: Gpu, point: TrainingPoint, ways: int, pp: int) -> None:
    """Raises CannotServeError where state and one sequence's activations do not fit, recomputed in full unless the
    point says that nothing is recomputed.

    A sequence keeps its layers' inputs (2 bytes × hidden × layers; two micro-batches in flight with pipeline
    stages), or without checkpointing all of their intermediates (34 bytes × hidden × layers, flash attention),
    one layer's intermediates and its logits (2 bytes × vocabulary).
    """
    state = model.parameters * _state_bytes(model, point) / point.gpus
    tokens = point.sequence_tokens / ways
    whole = point.checkpointing == "none"
    inputs = (LAYER_BYTES if whole else 2.0) * model.hidden * model.layers / pp * min(pp, 2)
    kept = tokens * (inputs + LAYER_BYTES * model.hidden + 2.0 * model.vocabulary)
    room = _usable_bytes(gpu)
    if state + kept > room:
        need, held, live, can = (v / BYTES_PER_GB for v in (state + kept, state, kept, room))
        raise CannotServeError(
            f"training {model.name} on {point.gpus} × {gpu.name} needs {need:.1f} GB per GPU "
            f"({held:.1f} state, {live:.1f} activations of one sequence of {point.sequence_tokens:.0f} tokens "
            f"over {ways} GPUs); {can:.1f} GB can be used: more GPUs, tp or cp are needed"
            + (", or activation checkpointing" if whole else "")
        )


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
    peak = gpu.flops[counted_precision(training_precision(point.precision))]
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
