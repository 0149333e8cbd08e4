"""What a model asks of one GPU of a replica: bytes, FLOPs, messages. Pure counting; no efficiency in here."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from pertoken.catalog.gpus import Gpu
from pertoken.catalog.models import Attention, Model
from pertoken.errors import CannotServeError, InputError
from pertoken.perf.point import FloatLike, Floats, Layout
from pertoken.units import BYTES_PER_GB

PRECISION_NAMES = {
    "bf16": "bf16", "bfloat16": "bf16", "fp16": "bf16", "float16": "bf16", "half": "bf16",
    "torch.bfloat16": "bf16", "torch.float16": "bf16",
    "fp8": "fp8", "fp8_block": "fp8", "fp8_e4m3": "fp8", "w8a8_fp8": "fp8", "fp8_e5m2": "fp8", "e4m3": "fp8",
    "float8": "fp8", "float8_e4m3fn": "fp8", "fp8_static": "fp8", "fp8_dynamic": "fp8", "fp8_kv": "fp8",
    "fp8_ootb": "fp8", "mxfp8": "fp8", "modelopt_fp8": "fp8",
    "fp4": "fp4", "nvfp4": "fp4", "mxfp4": "fp4", "w4a8_mxfp4": "fp4", "w4a16_mxfp4": "fp4",
    "w4a8_mxfp4_mxfp8": "fp4", "modelopt_fp4": "fp4",
    "int8": "int8", "w8a8": "int8", "w8a16": "int8", "w8a8_int8": "int8", "int8_sq": "int8", "sq": "int8",
    "int4": "int4", "w4a16": "int4", "awq": "int4", "gptq": "int4", "int4_wo": "int4", "int4_awq": "int4",
    "awq_int4": "int4", "w4a16_awq": "int4", "gptq_int4": "int4",
}  # fmt: skip
"""Foreign name of a precision to ours."""

WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "fp4": 0.55, "int8": 1.0, "int4": 0.55}
"""Bytes per weight, scales included: a scale per 16 or 32 values adds half to a quarter bit to four-bit
formats."""

ENGINE_FAMILIES = ("vllm", "sglang", "trt", "atom")
RESERVING_ENGINES = frozenset({"trt"})
"""Engines that reserve cache for a request's whole output when they admit it (TensorRT-LLM's default, "guaranteed no
evict"); the others fill blocks as tokens come, half of the output on average, and preempt."""
MEMORY_FRACTION = 0.92
"""Share of a GPU's memory an engine may fill (vLLM and SGLang recipes: 0.9 to 0.95)."""
WORKSPACE_BYTES = 2e9
"""Activations, graphs, communication buffers of one GPU."""
MESSAGE_BYTES = 2.0
"""Bytes per activation value sent between GPUs (bf16)."""
NVLINK_CLASS_BYTES_PER_S = 100e9
FAR_MESSAGE = 15.0
"""Messages over links slower than that (the host's PCIe) or between nodes, in messages of a fast link. Assumed: small
all-reduces take 20 to 40 µs there; no fitted row has such links."""


def precision_name(precision: str) -> str:
    """Our name of a precision as engines and benchmarks write it.

    Raises InputError for a name that is none.

    >>> precision_name("nvfp4"), precision_name("bfloat16"), precision_name("FP8-dynamic")
    ('fp4', 'bf16', 'fp8')
    """
    name = PRECISION_NAMES.get(precision.strip().lower().replace("-", "_").replace(" ", "_"))
    if name is None:
        raise InputError(f"unknown precision {precision!r}: one of bf16, fp8, fp4, int8, int4")
    return name


def engine_family(engine: str) -> str:
    """The engine family whose coefficients apply, from an engine's name and version.

    >>> engine_family("vllm-0.12.0"), engine_family("dynamo-trt"), engine_family("TensorRT-LLM")
    ('vllm', 'trt', 'trt')
    """
    name = engine.lower()
    if "trt" in name or "tensorrt" in name:
        return "trt"
    return next((family for family in ENGINE_FAMILIES if family in name), "other")


def held_fraction(engine: str) -> float:
    """Share of a request's output whose cache it holds on average while it runs.

    >>> held_fraction("trtllm-1.2.0"), held_fraction("vllm")
    (1.0, 0.5)
    """
    return 1.0 if engine_family(engine) in RESERVING_ENGINES else 0.5


class Formats(NamedTuple):
    """Formats one configuration runs in: precision of GEMMs, bytes per quantised weight and cached value,
    and a note where the weights' precision is not the GEMMs'."""

    compute: str
    weight_bytes: float
    kv_bytes: float
    note: str


def formats(gpu: Gpu, precision: str, kv_precision: str = "") -> Formats:
    """How a GPU runs a precision: natively, or as weights alone where real engines do so.

    Parameters: gpu; precision and kv_precision by name (empty kv_precision: the engine's default).
    Raises CannotServeError where neither the hardware nor an engine supports it.
    """
    precision = precision_name(precision)
    compute, note = precision, ""
    if precision == "int4":
        compute, note = "bf16", "int4 weights, bf16 compute"
    elif gpu.flops.get(precision, 0.0) < gpu.flops.get("bf16", 0.0):
        weight_only = gpu.vendor.lower() in ("nvidia", "amd", "apple") or precision == "int8"
        if "bf16" not in gpu.flops or not weight_only:
            raise CannotServeError(
                f"{gpu.name} has no {precision} and no engine emulates it there: it computes in "
                f"{', '.join(gpu.flops)}"
            )
        compute, note = "bf16", f"{gpu.name} has no fast {precision}: {precision} weights, bf16 compute"
    if compute not in gpu.flops:
        raise CannotServeError(f"{gpu.name} has no {compute}: it computes in {', '.join(gpu.flops)}")
    return Formats(compute, WEIGHT_BYTES[precision], _kv_bytes(gpu, precision, kv_precision), note)


def _kv_bytes(gpu: Gpu, precision: str, kv_precision: str) -> float:
    """Bytes per cached value. Default: fp8 where fp8 or fp4 weights run on hardware with fp8, as the
    published recipes of such checkpoints have it, else bf16."""
    if kv_precision:
        return 1.0 if precision_name(kv_precision) in ("fp8", "int8") else 2.0
    return 1.0 if precision in ("fp8", "fp4") and "fp8" in gpu.flops else 2.0


@dataclass(frozen=True)
class Work:
    """Work of one GPU of a replica at the hardware's peak; a field is a float, or an array of one entry per
    row.

    Seconds are ideal seconds (bytes ÷ bandwidth, FLOPs ÷ dense peak, bytes ÷ link rate).
    """

    gpus: FloatLike
    pp: FloatLike
    dp: FloatLike
    kernels: FloatLike
    """Kernel launches per step outside routed experts."""
    moe_layers: FloatLike
    """MoE layers, those with shared experts counted SHARED_LAYER times: their kernels come on top."""
    always_s: FloatLike
    """Reading the weights every step needs."""
    routed_s: FloatLike
    """Reading every routed expert."""
    log_miss: FloatLike
    """Logarithm of the probability that one token leaves a given expert alone: ln(1 − k/E)."""
    dense_gemm_s: FloatLike
    """Per token of a step, its share of GEMMs outside routed experts."""
    routed_gemm_s: FloatLike
    kv_full_s: FloatLike
    """Reading the cache, per sequence of a data-parallel rank and token of context."""
    kv_window_s: FloatLike
    kv_top_s: FloatLike
    kv_state_s: FloatLike
    """Reading and writing fixed-size state, per sequence."""
    attention_full_s: FloatLike
    """Attention's FLOPs of decode, per new token of a rank and token of context."""
    attention_window_s: FloatLike
    attention_top_s: FloatLike
    prompt_full_s: FloatLike
    """The same in prefill, where latent attention is expanded to heads."""
    prompt_window_s: FloatLike
    prompt_top_s: FloatLike
    window: FloatLike
    top: FloatLike
    messages: FloatLike
    """Collectives per step, weighted by hops: one over PCIe or between nodes counts FAR_MESSAGE."""
    message_s: FloatLike
    """Bytes on links, per token of a step."""
    gather_s: FloatLike
    """Bytes of decode's all-reduces done in one shot, per token of a step."""
    kv_full_bytes: FloatLike
    """Cache memory per sequence of a rank and token of context, on its fullest GPU."""
    kv_window_bytes: FloatLike
    kv_state_bytes: FloatLike
    kv_memory_bytes: FloatLike
    """Memory left for the cache on one GPU."""


def stack(works: list[Work]) -> Work:
    """Works of several configurations as one whose fields are arrays of shape (len(works),)."""
    return Work(
        **{f.name: np.array([getattr(w, f.name) for w in works], dtype=np.float64) for f in fields(Work)}
    )


def shaped(work: Work, shape: tuple[int, ...]) -> Work:
    """The same work with every array field reshaped."""
    return Work(**{f.name: np.reshape(np.asarray(getattr(work, f.name)), shape) for f in fields(Work)})


def usable_bytes(gpu: Gpu) -> float:
    """Memory an engine may fill with weights and cache, of one GPU."""
    return MEMORY_FRACTION * (gpu.memory_bytes or gpu.memory_gb * BYTES_PER_GB) - WORKSPACE_BYTES


def weight_bytes(model: Model, fmt: Formats) -> tuple[float, float, float]:
    """Bytes of the weights read at every step, of all routed experts, and of what is held but not
    read (embedding, encoder).

    Four-bit checkpoints of MoE models keep attention in eight bits or more (as published: bf16 or fp8);
    embedding and output head stay in bf16 in every format.
    """
    ffn = (
        model.dense_ffn_layers * model.dense_ffn_parameters
        + model.moe_layers * model.shared_expert_parameters
    )
    kept = _attention_format(model, fmt)
    always = (
        model.attention_parameters * (WEIGHT_BYTES[kept] if kept else fmt.weight_bytes)
        + ffn * fmt.weight_bytes
        + (model.head_parameters + model.norm_parameters) * WEIGHT_BYTES["bf16"]
    )
    embedding = 0.0 if model.tied_embedding else model.embedding_parameters
    held = (embedding + model.encoder_parameters) * WEIGHT_BYTES["bf16"]
    return always, model.routed_parameters * fmt.weight_bytes, held


def _link(gpu: Gpu, group: int) -> tuple[float, float]:
    """Link rate [bytes/s] within a group of that many GPUs, and its latency class."""
    if group <= max(gpu.scale_up_gpus, gpu.gpus_per_node):
        rate = gpu.intra_node_bytes_per_s
        return rate, 1.0 if rate >= NVLINK_CLASS_BYTES_PER_S else FAR_MESSAGE
    return gpu.inter_node_bytes_per_s, FAR_MESSAGE


def _messages(model: Model, gpu: Gpu, layout: Layout) -> tuple[float, float, float]:
    """Collectives per step, and seconds on links per token of the step.

    Tensor parallel: an all-reduce after attention and one after the feed-forward block. Attention data
    parallel with experts spread: dispatch and combine instead of the second. Pipeline: one message per
    boundary.
    """
    count, seconds, gather = 0.0, 0.0, 0.0
    group = layout.tp * layout.dp
    hidden_bytes = model.hidden * MESSAGE_BYTES
    ffn_layers = model.moe_layers + model.dense_ffn_layers
    spread = layout.dp > 1 and model.moe_layers > 0
    if layout.tp > 1:
        rate, latency = _link(gpu, layout.tp)
        reduces = len_layers(model) + (ffn_layers - model.moe_layers if spread else ffn_layers)
        count += reduces * latency
        seconds += reduces * hidden_bytes * 2 * (layout.tp - 1) / layout.tp / rate / layout.dp
        gather += reduces * hidden_bytes * (layout.tp - 1) / rate / layout.dp
    if spread:
        rate, latency = _link(gpu, group)
        ranks = group * (1 - (1 - 1 / group) ** model.experts_active) * (group - 1) / group
        count += 2 * model.moe_layers * latency
        # Dispatch in eight bits, combine in sixteen; each GPU sends its share of the step's tokens.
        seconds += model.moe_layers * ranks * hidden_bytes * 1.5 / rate / group
    if layout.pp > 1:
        rate, latency = _link(gpu, layout.gpus)
        count += (layout.pp - 1) * latency
        seconds += (layout.pp - 1) * hidden_bytes / rate
    return count, seconds, gather


KERNELS = {"full": 7, "sliding": 7, "mla": 14, "sparse": 18, "linear": 10}
"""Dependent kernels of one attention or mixer block: norm, projections, rotary, cache write, attention,
output."""
FFN_KERNELS = 4
SHARED_LAYER = 1.6


def _kernels(model: Model) -> float:
    blocks = sum(a.layers * KERNELS[a.kind] for a in model.attention)
    return float(blocks + FFN_KERNELS * model.dense_ffn_layers)


def _moe_blocks(model: Model) -> float:
    router = model.hidden * model.experts
    return model.moe_layers * (SHARED_LAYER if model.shared_expert_parameters > 2 * router else 1.0)


def _attention_format(model: Model, fmt: Formats) -> str:
    """The precision attention keeps where it is not the other weights': in four-bit checkpoints of MoE
    models."""
    if not model.moe_layers or fmt.weight_bytes >= WEIGHT_BYTES["fp8"]:
        return ""
    return model.attention_precision if model.attention_precision in WEIGHT_BYTES else "bf16"


def _dense_gemm_s(model: Model, gpu: Gpu, fmt: Formats) -> float:
    """Seconds at peak of a token's GEMMs outside routed experts, each at the precision it runs in."""
    kept = _attention_format(model, fmt)
    attention = gpu.flops.get(kept, gpu.flops["bf16"]) if kept else gpu.flops[fmt.compute]
    ffn = model.always_parameters - model.norm_parameters - model.head_parameters - model.attention_parameters
    return 2 * (
        model.attention_parameters / attention
        + ffn / gpu.flops[fmt.compute]
        + model.head_parameters / gpu.flops["bf16"]
    )


def len_layers(model: Model) -> int:
    """Attention or mixer layers."""
    return sum(a.layers for a in model.attention)


def _shards(attention: Attention, tp: int) -> float:
    """Over how many GPUs tensor parallelism splits a layer's cache."""
    if attention.kind in ("mla", "sparse") or attention.kv_heads == 0:
        return float(tp) if attention.kind == "linear" else 1.0
    return float(min(tp, attention.kv_heads))


def _window_of(groups: list[Attention]) -> float:
    total = sum(a.layers * a.kv_values_per_token for a in groups)
    return sum(a.layers * a.kv_values_per_token * a.window for a in groups) / total if total else 1.0


def work(model: Model, gpu: Gpu, layout: Layout, fmt: Formats) -> Work:
    """The work one GPU of a replica does, from the architecture, the datasheet and the layout.

    Raises CannotServeError where weights do not fit: says what is needed, what is there and how many GPUs
    would do.
    """
    always, routed, embedding = weight_bytes(model, fmt)
    group = layout.tp * layout.dp
    held = (always + embedding) / (layout.tp * layout.pp) + routed / (group * layout.pp)
    memory = usable_bytes(gpu) - held
    if memory <= 0:
        raise CannotServeError(_too_large(model, gpu, layout, held, always + routed + embedding))
    windowed = [a for a in model.attention if a.kind == "sliding"]
    topped = [a for a in model.attention if a.kind == "sparse"]
    unlimited = [a for a in model.attention if a.kind in ("full", "mla")]
    linear = [a for a in model.attention if a.kind == "linear"]

    def cached(groups: list[Attention]) -> float:
        return sum(a.layers * a.kv_values_per_token / _shards(a, layout.tp) for a in groups) * fmt.kv_bytes

    index = (
        sum(a.layers * a.index_values_per_token for a in topped) * 1.0
    )  # index keys are cached in eight bits
    state = sum(a.layers * a.state_values / _shards(a, layout.tp) for a in linear) * WEIGHT_BYTES["bf16"]
    peak, peak_attention = gpu.flops[fmt.compute], gpu.flops["bf16"]
    bandwidth = gpu.memory_bytes_per_s
    messages, message_s, gather_s = _messages(model, gpu, layout)
    full, window, top = cached(unlimited), cached(windowed), cached(topped)

    def flops(groups: list[Attention], prefill: bool = False) -> float:
        return sum(
            a.layers * ((prefill and a.prefill_flops_per_context_token) or a.flops_per_context_token)
            for a in groups
        ) / (layout.tp * peak_attention)

    index_flops = sum(a.layers * a.index_flops_per_context_token for a in topped) / (
        layout.tp * peak_attention
    )
    return Work(
        gpus=float(layout.gpus), pp=float(layout.pp), dp=float(layout.dp),
        kernels=_kernels(model), moe_layers=_moe_blocks(model),
        always_s=always / layout.tp / bandwidth, routed_s=routed / group / bandwidth,
        log_miss=math.log1p(-model.experts_active / model.experts) if model.moe_layers else -math.inf,
        dense_gemm_s=_dense_gemm_s(model, gpu, fmt) / group,
        routed_gemm_s=2 * model.active_routed_parameters / group / peak,
        kv_full_s=(full + index) / bandwidth, kv_window_s=window / bandwidth, kv_top_s=top / bandwidth,
        kv_state_s=2 * state / bandwidth,
        attention_full_s=flops(unlimited) + index_flops,
        attention_window_s=flops(windowed), attention_top_s=flops(topped),
        prompt_full_s=flops(unlimited, True) + index_flops,
        prompt_window_s=flops(windowed, True), prompt_top_s=flops(topped, True),
        window=_window_of(windowed), top=_window_of(topped),
        messages=messages, message_s=message_s, gather_s=gather_s,
        kv_full_bytes=(full + top + index) / layout.pp, kv_window_bytes=window / layout.pp,
        kv_state_bytes=state / layout.pp, kv_memory_bytes=memory,
    )  # fmt: skip


def _too_large(model: Model, gpu: Gpu, layout: Layout, held: float, total: float) -> str:
    gib = 2.0**30
    usable = usable_bytes(gpu)
    fewest = max(int(np.ceil(total / usable)) if usable > 0 else 0, layout.gpus + 1)
    return (
        f"{model.name} does not fit {layout.gpus} × {gpu.name} (tp {layout.tp}, pp {layout.pp}, dp {layout.dp})"
        ": "
        f"its weights need {held / gib:.0f} GiB per GPU, {max(usable, 0) / gib:.0f} GiB are usable; "
        f"at least {fewest} GPUs are needed (tp × pp, or experts spread)"
    )


def mean_min(low: FloatLike, high: FloatLike, cap: FloatLike) -> Floats:
    """Mean of min(x, cap) for x from low to high [tokens]; arrays broadcast. Formula: the integral in closed
    form.

    >>> float(mean_min(0.0, 10.0, 5.0))   # rises to 5 over half the way, then stays
    3.75
    """
    low, high, cap = np.asarray(low, float), np.asarray(high, float), np.asarray(cap, float)
    low_in, high_in = np.minimum(low, cap), np.minimum(high, cap)
    span = np.maximum(high - low, 1e-9)
    inside: Floats = (0.5 * (high_in**2 - low_in**2) + cap * (high - high_in - (low - low_in))) / span
    return inside
