"""What a prediction is asked for and what it answers: operating points, intervals."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
FloatLike = float | Floats


@dataclass(frozen=True)
class Interval:
    """A predicted quantity: expected value and the low and high end of its 80 % interval, arrays of one
    shape."""

    value: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Layout:
    """How one replica is spread over GPUs: tensor, pipeline, expert and (attention) data parallel degrees.

    GPUs of a replica = tp × pp × dp. `ep` is over how many GPUs the routed experts are spread whole (1:
    experts are sliced by tp instead); attention data parallel (`dp` > 1) keeps each request's cache on one
    rank.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp: int = 1

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp


@dataclass(frozen=True)
class Point:
    """One operating point of a serving replica; the float fields broadcast against each other.

    input_tokens: prompt tokens per request, cached ones included; cached_input_tokens: those of them that
    hit the prefix cache; output_tokens per request; concurrency: requests in flight in the replica (closed
    loop).
    `accepted_per_step`: tokens kept per decode step with speculative decoding (1: none), `draft_fraction`:
    cost of drafting one step relative to one decode step of the model itself.
    """

    input_tokens: FloatLike
    output_tokens: FloatLike
    concurrency: FloatLike
    cached_input_tokens: FloatLike = 0.0
    precision: str = "bf16"
    kv_precision: str = ""
    """Precision of the KV cache; empty: what the engine does by default with `precision`."""
    engine: str = "vllm"
    layout: Layout = field(default_factory=Layout)
    accepted_per_step: float = 1.0
    draft_fraction: float = 0.0
    prefill_gpus: float = 0
    """Disaggregated serving: GPUs of this replica that only prefill (0: prefill and decode share); the layout is
    the decoding GPUs'. A fraction where several replicas share a prefill GPU."""


@dataclass(frozen=True)
class Prediction:
    """What a replica does at an operating point; arrays broadcast like the point's fields.

    tokens_per_s: output tokens per second of the whole replica; ttft_s, tpot_s: mean seconds (queueing at the
    closed-loop concurrency included); gpu_power_w: mean board power of one GPU while busy (GPU boundary);
    prefill_fraction: share of busy GPU time that is prefill; max_concurrency: requests that fit in KV memory.
    """

    tokens_per_s: Interval
    ttft_s: Interval
    tpot_s: Interval
    gpu_power_w: Interval
    prefill_fraction: Floats
    max_concurrency: Floats
    basis: str
    source: str


@dataclass(frozen=True)
class StepTimes:
    """Linear pieces of an engine step, for the request-level simulator.

    A step that decodes b sequences whose contexts sum to c tokens and prefills p prompt tokens at mean
    context k takes decode_s[b] + context_s × c + p × (prefill_s + prefill_context_s × k) + (step_s if b = 0).
    """

    decode_s: Floats
    """Shape (max_batch + 1,): [0] is 0."""
    context_s: float
    prefill_s: float
    prefill_context_s: float
    step_s: float
    kv_capacity_tokens: int
    idle_power_w: float
    """Per GPU."""
    decode_power_w: float
    prefill_power_w: float
    gpus: int
    basis: str


@dataclass(frozen=True)
class TrainingPoint:
    """One training configuration.

    gpus: all GPUs of the job; sequence_tokens per sample; global_batch: samples per optimiser step;
    `kind`: ``pretrain``, ``full`` (full fine-tune) or ``lora``; checkpointing: ``none``, ``selective``,
    ``full``; empty layout degrees (0) are chosen.
    """

    gpus: int
    sequence_tokens: float = 4096
    global_batch: float = 0.0
    precision: str = "bf16"
    kind: str = "pretrain"
    checkpointing: str = ""
    tp: int = 0
    pp: int = 0
    cp: int = 0
    ep: int = 0


@dataclass(frozen=True)
class TrainingPrediction:
    """tokens_per_s of the whole job, mfu [fraction of dense peak at the precision], gpu_power_w per GPU."""

    tokens_per_s: Interval
    mfu: Interval
    gpu_power_w: Interval
    basis: str
    source: str
