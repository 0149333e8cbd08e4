"""The third predictor: steps timed from tables of measured kernels, where the extra ``[kernels]`` is
installed.

The tables and their interpolation are aiconfigurator-core's (NVIDIA, Apache-2.0); requests in flight are
closed over its steps as the roofline does it. NVIDIA GPUs, vLLM, SGLang and TensorRT-LLM, models whose config
the package carries.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pertoken.catalog.gpus import Gpu
from pertoken.catalog.models import Model, model
from pertoken.errors import MissingExtraError, NoEvidenceError, PerTokenError
from pertoken.perf._work import engine_family, precision_name
from pertoken.perf.point import Floats, Interval, Point, Prediction
from pertoken.perf.power import gpu_power_w
from pertoken.perf.roofline import predict, utilisations
from pertoken.units import MILLISECONDS_PER_SECOND

PACKAGE = "aiconfigurator_core"
SYSTEMS = {
    "A100-80GB-PCIe": "a100_pcie", "A100-80GB-SXM": "a100_sxm", "L4": "l4", "L40S": "l40s", "H100-PCIe": "h100_pcie",
    "H100-SXM": "h100_sxm", "H200-SXM": "h200_sxm", "B200": "b200_sxm", "B300": "b300_sxm", "GB200": "gb200",
    "GB300": "gb300", "RTX-PRO-6000-Server": "rtx_pro_6000_server",
}  # fmt: skip
"""Our GPU to the package's system."""
BACKENDS = {"vllm": "vllm", "sglang": "sglang", "trt": "trtllm"}
QUANTISED = {
    "bf16": {"gemm_quant_mode": "bfloat16", "moe_quant_mode": "bfloat16"},
    "fp8": {"gemm_quant_mode": "fp8", "moe_quant_mode": "fp8"},
    "fp4": {"gemm_quant_mode": "nvfp4", "moe_quant_mode": "nvfp4"},
    "int8": {"gemm_quant_mode": "int8_wo"},
    "int4": {"gemm_quant_mode": "int4_wo", "moe_quant_mode": "int4_wo"},
}
"""Our precision to the package's modes, where it is not the checkpoint's own."""
LOG_SPREAD, TTFT_LOG_SPREAD = 0.25, 0.45
"""Half-widths of the 80 % interval in log space: the package's mean error on published points is 13 %, its
p90 25 %; times to first token scatter about twice as much."""
ROUNDS = 3

T = TypeVar("T")
Steps = tuple[Callable[[int, int, int], float], Callable[[int, int], float]]


def predict_kernels(model: Model, gpu: Gpu, point: Point) -> Prediction:
    """What one replica does at an operating point, from measured kernels; memory is the roofline's, power the
    fitted one at the kernels' throughput.

    Parameters, shapes and errors as `predict`; also raises MissingExtraError where the extra is not installed
    and NoEvidenceError where its tables lack the GPU (all of AMD's), engine, model, precision or layout, or for
    disaggregated points. Formula: cycle = steps × decode step + R × prompt, R = min(concurrency, KV limit),
    throughput = R × output / cycle. Source: aiconfigurator-core 0.12, systems tables.
    """
    # What the tables lack is said first: installing them would not help.
    system, backend = _system(gpu), _backend(point)
    if point.prefill_gpus:
        raise NoEvidenceError("no kernel tables for disaggregated serving: use the roofline")
    if importlib.util.find_spec(PACKAGE) is None:
        raise MissingExtraError("kernels", "kernel-level prediction")
    base = predict(model, gpu, point)
    decode_ms, prompt_ms = _steps(model.name, system, backend, point)
    arrays = np.broadcast_arrays(
        *(
            np.asarray(v, dtype=np.float64)
            for v in (point.input_tokens, point.cached_input_tokens, point.output_tokens, point.concurrency)
        ),
        base.max_concurrency,
    )
    cells = [
        _closed_loop(point, decode_ms, prompt_ms, *(float(v) for v in row))
        for row in zip(*(a.ravel() for a in arrays), strict=True)
    ]
    tokens_per_s, ttft_s, tpot_s, busy = (
        np.array(column).reshape(arrays[0].shape) for column in zip(*cells, strict=True)
    )
    return replace(
        base,
        tokens_per_s=_interval(tokens_per_s, LOG_SPREAD),
        ttft_s=_interval(ttft_s, TTFT_LOG_SPREAD),
        tpot_s=_interval(tpot_s, LOG_SPREAD),
        gpu_power_w=_gpu_power(model, gpu, point, base, tokens_per_s),
        prefill_fraction=busy,
        basis="fitted",
        source=f"aiconfigurator-core {metadata.version('aiconfigurator-core')} kernel tables of {system}, {backend}; "
        "memory: roofline; power: fitted, at this throughput",
    )


def _gpu_power(model: Model, gpu: Gpu, point: Point, base: Prediction, tokens_per_s: Floats) -> Interval:
    """Board power with the hardware in use as much more than the roofline says as the throughput is higher."""
    faster = tokens_per_s / base.tokens_per_s.value
    compute, memory, link = (np.minimum(share * faster, 1.0) for share in utilisations(model, gpu, point))
    precision = precision_name(point.precision)
    value = gpu_power_w(gpu, compute, memory, link, precision, model=model, gpus=point.layout.gpus)
    ends = (base.gpu_power_w.low, base.gpu_power_w.high)
    low, high = (np.clip(value * end / base.gpu_power_w.value, gpu.idle_w, gpu.tdp_w) for end in ends)
    return Interval(value, np.minimum(low, value), np.maximum(high, value))


def _system(gpu: Gpu) -> str:
    if gpu.name not in SYSTEMS:
        raise NoEvidenceError(
            f"no kernel tables for {gpu.name}: there are some for {', '.join(SYSTEMS)}; use the roofline"
        )
    return SYSTEMS[gpu.name]


def _backend(point: Point) -> str:
    family = engine_family(point.engine)
    if family not in BACKENDS:
        raise NoEvidenceError(
            f"no kernel tables for engine {point.engine!r}: vllm, sglang and trtllm have some; use the roofline"
        )
    return BACKENDS[family]


def _steps(name: str, system: str, backend: str, point: Point) -> Steps:
    """Functions of a compiled engine: milliseconds of a decode step of (sequences per rank, input, output
    tokens), and of a prompt of (input, cached tokens)."""
    layout, precision = point.layout, precision_name(point.precision)
    kv = precision_name(point.kv_precision) if point.kv_precision else ""
    engine = _compiled(name, system, backend, layout.tp, layout.pp, layout.ep, layout.dp, precision, kv)

    def decode_ms(sequences: int, n_in: int, n_out: int) -> float:
        return _asked(
            lambda: float(engine.decode_step_latency(sequences, n_in, n_out)), name, system, backend
        )

    def prompt_ms(n_in: int, cached: int) -> float:
        return _asked(lambda: float(engine.predict_prefill_latency(1, n_in, cached)), name, system, backend)

    return decode_ms, prompt_ms


def _asked(call: Callable[[], T], name: str, system: str, backend: str) -> T:
    """The package's answer; whatever it raises becomes the one error a caller of ours expects."""
    try:
        return call()
    except PerTokenError:
        raise
    except Exception as error:
        first = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise NoEvidenceError(
            f"kernel tables of {system}, {backend} have no answer for {name}: {first}"
        ) from error


@lru_cache(maxsize=64)
def _compiled(
    name: str, system: str, backend: str, tp: int, pp: int, ep: int, dp: int, precision: str, kv: str
) -> Any:
    from aiconfigurator_core.sdk import EngineHandle

    found = model(name)
    path = _carried().get(_sizes(found))
    if path is None:
        raise NoEvidenceError(f"the kernel tables' package carries no config of {name}: use the roofline")
    # The package tells of tables it fills in by writing log lines; below the report nothing is said.
    logging.getLogger(PACKAGE).setLevel(logging.CRITICAL)
    options: dict[str, Any] = {"tp_size": tp, "pp_size": pp, "attention_dp_size": dp}
    if found.moe_layers:
        options |= {"moe_ep_size": ep, "moe_tp_size": tp * dp // ep}
    if precision != found.native_precision:
        options |= QUANTISED[precision]
    if any(a.kind == "mla" for a in found.attention):
        options |= {"kvcache_quant_mode": "bfloat16", "fmha_quant_mode": "bfloat16"}
    if kv:
        options["kvcache_quant_mode"] = {"bf16": "bfloat16"}.get(kv, kv)
    return _asked(lambda: EngineHandle.compile(path, system, backend, **options), name, system, backend)


Sizes = tuple[int, int, int, int, str]


def _sizes(found: Model) -> Sizes:
    """What makes two checkpoints the same work: tunes and renamed copies share their kernels."""
    return found.hidden, found.layers, found.vocabulary, round(found.parameters), found.native_precision


@lru_cache(maxsize=1)
def _carried() -> dict[Sizes, str]:
    """Sizes of each model whose config the package carries, to its name there."""
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(spec.origin or "").parent / "model_configs" if spec else Path()
    found: dict[Sizes, str] = {}
    for file in sorted(folder.glob("*--*_config.json")):
        path = file.name.removesuffix("_config.json").replace("--", "/", 1)
        if not path.endswith("_hf_quant"):
            with contextlib.suppress(PerTokenError):
                found.setdefault(_sizes(model(path)), path)
    return found


def _closed_loop(
    point: Point,
    decode_ms: Callable[[int, int, int], float],
    prompt_ms: Callable[[int, int], float],
    n_in: float,
    cached: float,
    n_out: float,
    concurrency: float,
    limit: float,
) -> tuple[float, float, float, float]:
    """Tokens per second, time to first token, time per output token [s] and the share of time that is
    prefill."""
    admitted = max(min(concurrency, limit), 1.0)
    steps = n_out / point.accepted_per_step
    verified = 1.0 if point.accepted_per_step <= 1 else point.accepted_per_step + 1
    alone_s = prompt_ms(round(n_in), round(cached)) / MILLISECONDS_PER_SECOND
    shared_s = alone_s / point.layout.dp
    decoding, cycle_s, first_s, busy = admitted, 1.0, 0.0, 0.0
    for _ in range(ROUNDS):
        rank = max(1, math.ceil(decoding * verified / point.layout.dp))
        step_s = (
            decode_ms(rank, round(n_in), round(n_out)) / MILLISECONDS_PER_SECOND * (1 + point.draft_fraction)
        )
        cycle_s = steps * step_s + admitted * shared_s
        busy = admitted * shared_s / cycle_s
        first_s = alone_s + 0.5 * step_s + 0.25 * busy * (admitted - 1) * shared_s
        decoding = max(admitted * (1 - min(first_s / cycle_s, 0.9)), 1.0)
    rate = admitted / cycle_s
    waiting_s = max(concurrency - limit, 0.0) / rate
    return rate * n_out, first_s + waiting_s, max(cycle_s - first_s, 0.0) / n_out, busy


def _interval(value: Floats, half_width: float) -> Interval:
    return Interval(value, value * np.exp(-half_width), value * np.exp(half_width))
