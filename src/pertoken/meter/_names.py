"""NAME_MAP of the exposition: what engines, exporters and gateways call the things we count.

Sources (names, checked 2026-11-24): a scrape of vLLM 0.32 and vLLM's docs; SGLang docs, production metrics;
TensorRT-LLM metrics collector; Triton docs, metrics; TGI docs, metrics; llama.cpp server README; NIM for LLMs
docs, observability; Dynamo docs, metrics; dcgm-exporter's default counters; Kepler docs and its Redfish
proposal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pertoken.units import JOULES_PER_KWH, MILLISECONDS_PER_SECOND

# counter: grows, its differences count. running: a gauge, its time above zero counts. power: a gauge in W
# whose integral counts. active: a gauge, the share of time a GPU was active. start: the time its process
# started.
How = Literal["counter", "running", "power", "active", "start"]


@dataclass(frozen=True)
class Foreign:
    """How one foreign sample enters our books.

    Several samples may tell one meter: the lowest `rank` that is there counts. `only` and `never` are values
    of labels the sample must or must not have. `device` marks hardware counters, which are told apart by the
    GPU or machine and not by labels that come and go (a pod's name), and which never started with their
    process.
    """

    meter: str
    kind: str
    how: How = "counter"
    scale: float = 1.0
    rank: int = 0
    only: dict[str, tuple[str, ...]] = field(default_factory=dict)
    never: dict[str, tuple[str, ...]] = field(default_factory=dict)
    device: bool = False
    milli_trap: bool = False
    """Some versions report thousandths of the unit they name."""

    @property
    def steady(self) -> bool:
        """Whether it counts energy: what runs draws power all the time, at least its idle one."""
        return self.device and self.how == "counter"


def _engine(meter: str, how: How = "counter", **more: object) -> Foreign:
    return Foreign(meter, "engine", how, **more)  # type: ignore[arg-type]


def _gateway(meter: str, rank: int = 0) -> Foreign:
    return Foreign(meter, "gateway", rank=rank)


def _device(meter: str, how: How, scale: float, rank: int = 0, milli_trap: bool = False) -> Foreign:
    return Foreign(meter, "device", how, scale, rank, device=True, milli_trap=milli_trap)


_FAILED = ("abort", "error")
_KWH_PER_J = 1 / JOULES_PER_KWH
_KWH_PER_MJ = _KWH_PER_J / MILLISECONDS_PER_SECOND  # mJ: thousandths of a joule
_FRACTION_PER_PERCENT = 0.01

_VLLM = {
    "prompt_tokens": (_engine("prompt_tokens"),),
    "request_prompt_tokens_sum": (_engine("prompt_tokens", rank=1),),
    "prompt_tokens_cached": (_engine("cached_input_tokens"),),
    "prompt_tokens_by_source": (
        _engine("cached_input_tokens", rank=1, never={"source": ("local_compute",)}),
    ),
    "prompt_tokens_cached_by_source": (_engine("cached_input_tokens", rank=2),),
    "prefix_cache_hits": (_engine("cached_input_tokens", rank=3),),
    "gpu_prefix_cache_hits": (_engine("cached_input_tokens", rank=4),),
    "generation_tokens": (_engine("output_tokens"),),
    "request_generation_tokens_sum": (_engine("output_tokens", rank=1),),
    "request_success": (
        _engine("requests", never={"finished_reason": _FAILED}),
        _engine("aborted_requests", only={"finished_reason": _FAILED}),
    ),
    "request_prefill_time_seconds_sum": (_engine("prefill_seconds"),),
    "request_decode_time_seconds_sum": (_engine("decode_seconds"),),
    "num_preemptions": (_engine("preemptions"),),
    "spec_decode_num_draft_tokens": (_engine("drafted_tokens"),),
    "spec_decode_num_accepted_tokens": (_engine("accepted_draft_tokens"),),
    "num_requests_running": (_engine("running_seconds", "running"),),
}

_SGLANG = {
    "prompt_tokens": (_engine("prompt_tokens"),),
    "generation_tokens": (_engine("output_tokens"),),
    "cached_tokens": (_engine("cached_input_tokens"),),
    "num_requests": (_engine("requests"),),
    "e2e_request_latency_seconds_count": (_engine("requests", rank=1),),
    "time_to_first_token_seconds_count": (_engine("requests", rank=2),),
    "num_aborted_requests": (_engine("aborted_requests"),),
    "num_retracted_requests": (_engine("preemptions"),),
    "num_running_reqs": (_engine("running_seconds", "running"),),
}

_TRTLLM = {
    "prompt_tokens": (_engine("prompt_tokens"),),
    "prompt_cached_tokens": (_engine("cached_input_tokens"),),
    "generation_tokens": (_engine("output_tokens"),),
    "request_success": (
        _engine("requests", never={"finished_reason": (*_FAILED, "cancelled")}),
        _engine("aborted_requests", only={"finished_reason": (*_FAILED, "cancelled")}),
    ),
    "request_prefill_time_seconds_sum": (_engine("prefill_seconds"),),
    "request_decode_time_seconds_sum": (_engine("decode_seconds"),),
    "spec_decode_drafted_tokens": (_engine("drafted_tokens"),),
    "spec_decode_accepted_tokens": (_engine("accepted_draft_tokens"),),
    "num_requests_running": (_engine("running_seconds", "running"),),
}

_TGI = {
    "request_input_length_sum": (_engine("prompt_tokens"),),
    "request_generated_tokens_sum": (_engine("output_tokens"),),
    "request_success": (_engine("requests"),),
    "request_failure": (_engine("aborted_requests"),),
    "batch_inference_duration_sum": (
        _engine("prefill_seconds", only={"method": ("prefill",)}),
        _engine("decode_seconds", only={"method": ("decode", "next_token")}),
    ),
    "batch_current_size": (_engine("running_seconds", "running"),),
}

# llama.cpp counts the prompt tokens it computed; what its cache served is not told.
_LLAMACPP = {
    "prompt_tokens": (_engine("input_tokens"),),
    # Prompt tokens reused from its cache: `prompt_tokens` has none of them.
    "prompt_tokens_cached": (_engine("cached_input_tokens"),),
    "tokens_predicted": (_engine("output_tokens"),),
    "spec_decode_num_draft_tokens": (_engine("drafted_tokens"),),
    "spec_decode_num_accepted_tokens": (_engine("accepted_draft_tokens"),),
    "prompt_seconds": (_engine("prefill_seconds"),),
    "tokens_predicted_seconds": (_engine("decode_seconds"),),
    "requests_processing": (_engine("running_seconds", "running"),),
}

_NIM = {
    "prompt_tokens": (_engine("prompt_tokens"),),
    "generation_tokens": (_engine("output_tokens"),),
    "request_prompt_tokens_sum": (_engine("prompt_tokens", rank=1),),
    "request_generation_tokens_sum": (_engine("output_tokens", rank=1),),
    "request_success": _VLLM["request_success"],
    "request_finish": _VLLM["request_success"],
    "num_requests_running": (_engine("running_seconds", "running"),),
    "gpu_total_energy_consumption_joules": (
        _device("gpu_energy_kwh", "counter", _KWH_PER_J, milli_trap=True),
    ),
    "gpu_power_usage_watts": (_device("gpu_energy_kwh", "power", 1.0, rank=1, milli_trap=True),),
}

_DYNAMO = {
    "frontend_input_sequence_tokens_sum": (_gateway("prompt_tokens"),),
    "frontend_output_sequence_tokens_sum": (_gateway("output_tokens"),),
    "frontend_output_tokens": (_gateway("output_tokens", rank=1),),
    "frontend_requests": (
        Foreign("requests", "gateway", never={"status": ("error",)}),
        Foreign("aborted_requests", "gateway", only={"status": ("error",)}),
    ),
}

_TRITON = {
    "energy_consumption": (_device("gpu_energy_kwh", "counter", _KWH_PER_J),),
    "gpu_power_usage": (_device("gpu_energy_kwh", "power", 1.0, rank=1, milli_trap=True),),
    "gpu_utilization": (_device("active_seconds", "active", 1.0, rank=1),),
    "inference_request_success": (_engine("requests", rank=5),),
    "inference_request_failure": (_engine("aborted_requests", rank=5),),
}

_DCGM = {
    "DEV_TOTAL_ENERGY_CONSUMPTION": (_device("gpu_energy_kwh", "counter", _KWH_PER_MJ),),
    "DEV_POWER_USAGE": (_device("gpu_energy_kwh", "power", 1.0, rank=1, milli_trap=True),),
    "DEV_POWER_USAGE_INSTANT": (_device("gpu_energy_kwh", "power", 1.0, rank=2, milli_trap=True),),
    "PROF_GR_ENGINE_ACTIVE": (_device("active_seconds", "active", 1.0),),
    "DEV_GPU_UTIL": (_device("active_seconds", "active", _FRACTION_PER_PERCENT, rank=1),),
}

# Kepler's package, core and DRAM counters are parts of the platform's: only the whole machine is taken.
_KEPLER = {
    "node_platform_joules": (Foreign("it_energy_kwh", "node", scale=_KWH_PER_J, device=True),),
    "node_platform_watts": (Foreign("it_energy_kwh", "node", "power", rank=1, device=True),),
}

NAME_MAP: dict[str, tuple[Foreign, ...]] = {
    **{f"vllm:{name}": rules for name, rules in _VLLM.items()},
    **{f"sglang:{name}": rules for name, rules in _SGLANG.items()},
    **{f"trtllm_{name}": rules for name, rules in _TRTLLM.items()},
    **{f"trtllm:{name}": rules for name, rules in _TRTLLM.items()},
    **{f"tgi_{name}": rules for name, rules in _TGI.items()},
    **{f"llamacpp:{name}": rules for name, rules in _LLAMACPP.items()},
    **_NIM,
    **{f"dynamo_{name}": rules for name, rules in _DYNAMO.items()},
    **{f"nv_{name}": rules for name, rules in _TRITON.items()},
    **{f"DCGM_FI_{name}": rules for name, rules in _DCGM.items()},
    **{f"kepler_{name}": rules for name, rules in _KEPLER.items()},
    "process_start_time_seconds": (Foreign("", "engine", "start"),),
}
"""Sample name, without ``_total``, to what it means."""

MODEL_LABELS = ("model_name", "model", "served_model_name", "model_id")
DEVICE_LABELS = ("UUID", "uuid", "gpu_uuid", "gpu", "node_name", "exported_instance", "instance")
SLICE_PROFILE, SLICE_ID = "GPU_I_PROFILE", "GPU_I_ID"
SLICES_PER_GPU = 7
"""Compute slices of a GPU under MIG: ``3g.40gb`` is three of seven."""
PART_LABELS = ("mode", "source", "chassis_id")
"""Labels that split one machine's energy into parts that add up (Kepler: idle and dynamic)."""


def rules_of(name: str) -> tuple[Foreign, ...]:
    """What a sample name means; nothing where it is none of ours.

    >>> rules_of("vllm:generation_tokens_total")[0].meter, rules_of("go_goroutines")
    ('output_tokens', ())
    """
    return NAME_MAP.get(name.removesuffix("_total"), ())
