"""What is asked of a fleet: requests to answer, tokens to train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pertoken import catalog
from pertoken.scenario._field import (
    Fraction,
    Name,
    NotNegative,
    Positive,
    _file,
    _in_catalogue,
    _Strict,
    _timezone,
)
from pertoken.units import HOURS_PER_DAY

PROFILES: dict[str, tuple[float, ...]] = {
    "flat": (1.0,) * HOURS_PER_DAY,
    "office": (
        .1, .1, .1, .1, .1, .2, .4, .8, 1.5, 2.1, 2.3, 2.2,
        1.9, 2.1, 2.3, 2.3, 2.1, 1.6, 1.0, .6, .4, .3, .2, .2,
    ),
    "evening": (
        .5, .3, .2, .2, .2, .2, .3, .5, .7, .8, .9, 1.0,
        1.1, 1.0, 1.0, 1.0, 1.1, 1.4, 1.9, 2.3, 2.4, 2.2, 1.6, 1.0,
    ),
    "night": (
        2.4, 2.6, 2.6, 2.6, 2.4, 2.0, 1.0, .3, .2, .2, .2, .2,
        .2, .2, .2, .2, .2, .2, .3, .5, .8, 1.3, 1.8, 2.2,
    ),
}  # fmt: skip
"""Share of the day's requests by local hour, relative to the mean hour; ours, named after when they peak."""


class ModelFile(_Strict):
    """A model described by a Hugging Face config.json on disk."""

    config: Path
    """Path of the config.json, seen from this file."""

    @field_validator("config")
    @classmethod
    def _found(cls, path: Path, info: ValidationInfo) -> Path:
        return _file(path, info)


class Tokens(_Strict):
    """A token count per request as a distribution: log-normal with this mean and coefficient of variation."""

    mean: Positive
    """Mean tokens per request."""
    cv: NotNegative = 0.0
    """Standard deviation over mean; 0: all alike."""


class Slo(_Strict):
    """What a request may take. `percentile`: the share of requests that must meet it (needs simulation above 50)."""

    ttft_s: Positive
    """Time to the first token, seconds."""
    tpot_s: Positive
    """Time per output token after it, seconds."""
    percentile: Annotated[float, Field(gt=0, lt=100)] = 50.0
    """Share of requests, in %, that must meet both; above 50 it is simulated."""


class _Workload(_Strict):
    model: str | ModelFile
    """A catalogue name, or {config: path}."""
    precisions: list[Literal["bf16", "fp8", "fp4", "int8", "int4"]] = Field([])
    """Precisions the owner accepts; empty: the one the checkpoint is published in, and bf16."""
    tenant: Name | None = None
    """Who it is for; empty: the workload's name."""
    pools: list[str] = Field([])
    """Pools that may run it; empty: all."""
    regions: list[str] = Field([])
    """Site regions its data may be in; empty: all."""
    vendors: list[str] = Field([])
    """Pool vendors it may use; empty: all."""
    max_spot_fraction: Fraction = 1.0
    """Share of it that may run on spot pools."""

    @field_validator("model")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, str):
            _in_catalogue(catalog.model, value)
        return value


class Serving(_Workload):
    """Requests answered as they come."""

    kind: Literal["serving"]
    """What it is."""
    requests_per_day: Annotated[float, Field(gt=0, le=1e12)]
    """On a weekday."""
    input_tokens: Positive | Tokens
    """Prompt tokens per request, cached ones included."""
    output_tokens: Positive | Tokens
    """Tokens generated per request."""
    cached_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of prompt tokens that a prefix cache serves."""
    profile: Literal["flat", "office", "evening", "night"] | list[NotNegative] = "flat"
    """Shape of a day by local hour: a named one, or 24 weights."""
    weekend_fraction: NotNegative = 1.0
    """Requests on a Saturday or Sunday over those on a weekday."""
    timezone: str = ""
    """Of the profile; empty: the horizon's."""
    slo: Slo | None = None
    """What a request may take; empty: anything."""
    headroom_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of capacity kept free in the busiest hour, for bursts within the hour."""
    trace: Path | None = None
    """Requests with arrival times; replaces the profile in a simulation."""
    minimum_replicas: Annotated[int, Field(ge=1)] = 1
    """Fewest replicas in an hour in which replicas answer it; an hour that an API answers alone needs none."""
    accepted_per_step: Annotated[float, Field(ge=1, le=16)] = 1.0
    """Tokens kept per decode step with speculative decoding; 1: none."""
    draft_fraction: Fraction = 0.0
    """Time to draft one step over that of one decode step."""
    bytes_per_token: Positive = 5.0
    """Text sent out per output token, for egress."""

    @field_validator("profile")
    @classmethod
    def _day(cls, value: Any) -> Any:
        if isinstance(value, list) and (len(value) != HOURS_PER_DAY or not sum(value)):
            raise ValueError(f"a profile has 24 weights, not all zero; found {len(value)}")
        return value

    @field_validator("timezone")
    @classmethod
    def _zone(cls, name: str) -> str:
        return _timezone(name) if name else name

    @field_validator("trace")
    @classmethod
    def _found(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return None if path is None else _file(path, info)


class Batch(Serving):
    """Requests that may wait: answered within `deadline_hours` of their arrival."""

    kind: Literal["batch"]  # type: ignore[assignment]
    """What it is."""
    deadline_hours: Positive = 24.0
    """From arrival to answer."""


class Restarts(_Strict):
    """How a training job loses work."""

    mtbf_hours: Positive
    """Mean time between failures of one GPU's share of the job."""
    checkpoint_minutes: Positive = 30.0
    """Between checkpoints."""
    checkpoint_cost_minutes: NotNegative = 0.5
    """To write one, the job standing still."""
    restart_minutes: NotNegative = 10.0
    """From a failure to training again."""


class Training(_Workload):
    """Tokens a model is trained on."""

    kind: Literal["training"]
    """What it is."""
    tokens: Positive | None = None
    """All tokens within the horizon; or give tokens_per_week."""
    tokens_per_week: Positive | None = None
    """Again in each week of the horizon."""
    sequence_tokens: Positive = 4096
    """Per sample."""
    global_batch: NotNegative = 0.0
    """Samples per optimiser step; 0: chosen."""
    method: Literal["pretrain", "full", "lora"] = "pretrain"
    """All weights from scratch, all weights of a given model, or adapters on a frozen one."""
    max_gpus: Annotated[int, Field(gt=0)] | None = None
    """No larger job is tried."""
    deadline_days: Positive | None = None
    """From the start of the horizon (with tokens), or of each week (with tokens_per_week)."""
    restarts: Restarts | None = None
    """How work is lost; empty: none is."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.tokens is None) == (self.tokens_per_week is None):
            raise ValueError("give exactly one of tokens and tokens_per_week")
        return self


Workload = Annotated[Serving | Batch | Training, Field(discriminator="kind")]
