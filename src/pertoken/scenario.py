"""What a human writes: a fleet (sites, pools, prices) and what is asked of it (workloads, horizon, budget).

The fleet serves plan and actual alike. Fields carry their unit in their name; what is not written is named in the
report as left out, never silently assumed to be free.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pertoken import catalog
from pertoken._yaml import load_yaml
from pertoken.errors import InputError, nearest
from pertoken.rates._local import local_hours
from pertoken.tables import Hours
from pertoken.units import HOURS_PER_DAY

Fraction = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$", max_length=64)]

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


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        str_strip_whitespace=True,
        use_attribute_docstrings=True,
    )


class ModelFile(_Strict):
    """A model described by a Hugging Face config.json on disk."""

    config: Path

    @field_validator("config")
    @classmethod
    def _found(cls, path: Path, info: ValidationInfo) -> Path:
        return _file(path, info)


class InlineTariff(_Strict):
    """A flat electricity price with an optional demand charge on the month's peak."""

    usd_per_kwh: NotNegative
    demand_usd_per_kw: NotNegative = 0.0


class TariffFile(_Strict):
    """A tariff in a file: URDB v8 JSON as published, or an hourly price series as CSV."""

    urdb: Path | None = None
    csv: Path | None = None

    @field_validator("urdb", "csv")
    @classmethod
    def _found(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return None if path is None else _file(path, info)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.urdb is None) == (self.csv is None):
            raise ValueError("give exactly one of urdb and csv")
        return self


class Overheads(_Strict):
    """What must be there beside GPUs and power. A line left out is reported as left out; write 0 where it is free."""

    staff_fte: NotNegative | None = None
    usd_per_fte_year: NotNegative = 180_000.0
    hosting_usd_per_month: NotNegative | None = None
    network_usd_per_month: NotNegative | None = None
    storage_usd_per_month: NotNegative | None = None
    software_usd_per_gpu_year: NotNegative | None = None
    egress_usd_per_gb: NotNegative | None = None


class Site(_Strict):
    """A place with an electricity meter, or a cloud region."""

    timezone: str
    tariff: str | InlineTariff | TariffFile | None = None
    pue: Annotated[float, Field(ge=1, le=4)]
    region: str = ""
    carbon_g_per_kwh: NotNegative | None = None
    fixed_charge_fraction: Fraction = 1.0
    """Share of the utility's fixed monthly charge that is the fleet's to pay; 0 where the meter is there anyway."""
    heat_reuse_fraction: Fraction = 0.0
    """Share of the energy bought that is sold as heat."""
    heat_usd_per_kwh: NotNegative = 0.0
    """What that heat earns."""
    power_cap_kw: Positive | None = None
    """Most that the fleet may draw at the utility meter."""
    peak_so_far_kw: dict[str, NotNegative] = {}
    """Demand already set this billing period, by the tariff's band."""
    previous_peaks_kw: dict[str, list[NotNegative]] = {}
    """By the tariff's demand charge: monthly peaks before the horizon, oldest first, for a ratchet."""
    overheads: Overheads = Overheads()

    @field_validator("timezone")
    @classmethod
    def _zone(cls, name: str) -> str:
        return _timezone(name)

    @field_validator("tariff")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, str):
            _in_catalogue(catalog.tariff, value)
        return value


class Bought(_Strict):
    """Hardware that was bought: annuity on price less the residual's present value, or straight line."""

    usd_per_gpu: Positive | None = None
    """Price per GPU with its share of the server; empty: the catalogue's newest purchase price of `provider`."""
    provider: str = ""
    life_years: Positive = 4.0
    wacc_fraction: Fraction = 0.08
    residual_fraction: Fraction = 0.1
    method: Literal["annuity", "straight-line"] = "annuity"
    maintenance_fraction_per_year: Fraction = 0.0
    cooling_usd_per_kw: NotNegative = 0.0
    """Capital of cooling and power distribution per kW of IT load, same life."""


class Owned(Bought):
    """Bought hardware at a site whose power and overheads are yours."""

    term: Literal["owned"]


class Colocated(Bought):
    """Bought hardware in somebody else's building, paid per kW of contracted power."""

    term: Literal["colocated"]
    usd_per_kw_month: NotNegative
    rack_usd_per_month: NotNegative = 0.0
    energy_included: bool = False


class _Rented(_Strict):
    usd_per_gpu_hour: NotNegative | None = None
    """Empty: the catalogue's newest price of `provider`, of that instance and region where they are given."""
    provider: str = ""
    instance: str = ""
    region: str = ""

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if self.usd_per_gpu_hour is None and not self.provider:
            raise ValueError("give usd_per_gpu_hour, or provider to take the catalogue's price")
        return self


class OnDemand(_Rented):
    """Rented by the hour; energy is in the rent."""

    term: Literal["on_demand"]


class Reserved(_Rented):
    """Committed for the horizon: paid used or unused; energy is in the price."""

    term: Literal["reserved"]
    commitment_years: NotNegative = 1.0


class Spot(_Rented):
    """Rented while nobody pays more; interrupted."""

    term: Literal["spot"]
    interruptions_per_hour: NotNegative
    """Per machine."""
    reload_minutes: NotNegative = 5.0
    lost_minutes: NotNegative = 0.0
    """Work lost at an interruption beyond the reload; for training: half the checkpoint interval is added."""


class Api(_Strict):
    """Tokens bought from a provider; prices from genai-prices unless written here."""

    term: Literal["api"]
    provider: str = ""
    model: str = ""
    input_usd_per_mtok: NotNegative | None = None
    cached_input_usd_per_mtok: NotNegative | None = None
    output_usd_per_mtok: NotNegative | None = None

    @model_validator(mode="after")
    def _priced(self) -> Self:
        written = (self.input_usd_per_mtok, self.output_usd_per_mtok)
        if None in written:
            if not (self.provider and self.model) or written != (None, None):
                raise ValueError(
                    "give provider and model (prices from genai-prices), or input_usd_per_mtok and output_usd_per_mtok"
                )
            _in_catalogue(lambda name: catalog.api_price(self.provider, name), self.model)
        return self


Price = Annotated[Owned | Colocated | OnDemand | Reserved | Spot | Api, Field(discriminator="term")]


class Pool(_Strict):
    """Identical GPUs at one site under one price term, or an API seen as a pool."""

    price: Price
    gpu: str = ""
    site: str = ""
    count: Annotated[int, Field(gt=0)] | Literal["as needed"] = "as needed"
    """GPUs that are there (owned, colocated, reserved), or that may be rented at most."""
    gpus_per_machine: Annotated[int, Field(gt=0, le=1024)] | None = None
    """GPUs bought or rented at a time; empty: the node of the catalogue."""
    engine: str = "vllm"
    overheads: Overheads = Overheads()
    startup_minutes: NotNegative = 5.0
    startup_usd: NotNegative = 0.0
    minimum_run_hours: NotNegative = 1.0
    vendor: str = ""
    points: Path | None = None
    """CSV of your own measured points: they beat the model near where they were measured."""

    @field_validator("gpu")
    @classmethod
    def _known(cls, name: str) -> str:
        if name:
            _in_catalogue(catalog.gpu, name)
        return name

    @field_validator("points")
    @classmethod
    def _found(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return None if path is None else _file(path, info)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if isinstance(self.price, Api):
            if self.gpu:
                raise ValueError("an API pool has no gpu")
            return self
        if not self.gpu:
            raise ValueError("give the gpu of the pool")
        if not self.site:
            raise ValueError("give the site of the pool")
        machine = self.machine_gpus
        if isinstance(self.count, int) and self.count % machine:
            raise ValueError(
                f"count {self.count} is not a whole number of machines of {machine} GPUs; "
                "set gpus_per_machine or change count"
            )
        return self

    @property
    def machine_gpus(self) -> int:
        """GPUs of one machine: what is written, else the catalogue's node, no more than the pool has."""
        if self.gpus_per_machine is not None:
            return self.gpus_per_machine
        node = catalog.gpu(self.gpu).gpus_per_node
        return min(node, self.count) if isinstance(self.count, int) else node


class Tokens(_Strict):
    """A token count per request as a distribution: log-normal with this mean and coefficient of variation."""

    mean: Positive
    cv: NotNegative = 0.0


class Slo(_Strict):
    """What a request may take. `percentile`: the share of requests that must meet it (needs simulation above 50)."""

    ttft_s: Positive
    tpot_s: Positive
    percentile: Annotated[float, Field(gt=0, lt=100)] = 50.0


class _Workload(_Strict):
    model: str | ModelFile
    precisions: list[Literal["bf16", "fp8", "fp4", "int8", "int4"]] = []
    """Precisions the owner accepts; empty: the one the checkpoint is published in, and bf16."""
    tenant: Name | None = None
    pools: list[str] = []
    """Pools that may run it; empty: all."""
    regions: list[str] = []
    """Site regions its data may be in; empty: all."""
    vendors: list[str] = []
    max_spot_fraction: Fraction = 1.0

    @field_validator("model")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, str):
            _in_catalogue(catalog.model, value)
        return value


class Serving(_Workload):
    """Requests answered as they come."""

    kind: Literal["serving"]
    requests_per_day: Positive
    input_tokens: Positive | Tokens
    """Prompt tokens per request, cached ones included."""
    output_tokens: Positive | Tokens
    cached_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of prompt tokens that a prefix cache serves."""
    profile: Literal["flat", "office", "evening", "night"] | list[NotNegative] = "flat"
    """Shape of a day by local hour: a named one, or 24 weights."""
    weekend_fraction: NotNegative = 1.0
    """Requests on a Saturday or Sunday over those on a weekday."""
    timezone: str = ""
    """Of the profile; empty: the horizon's."""
    slo: Slo | None = None
    headroom_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of capacity kept free in the busiest hour, for bursts within the hour."""
    trace: Path | None = None
    """Requests with arrival times; replaces the profile in a simulation."""
    minimum_replicas: Annotated[int, Field(ge=1)] = 1
    accepted_per_step: Annotated[float, Field(ge=1, le=16)] = 1.0
    """Tokens kept per decode step with speculative decoding; 1: none."""
    draft_fraction: Fraction = 0.0
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
    deadline_hours: Positive = 24.0


class Restarts(_Strict):
    """How a training job loses work."""

    mtbf_hours: Positive
    """Mean time between failures of one GPU's share of the job."""
    checkpoint_minutes: Positive = 30.0
    """Between checkpoints."""
    checkpoint_cost_minutes: NotNegative = 0.5
    restart_minutes: NotNegative = 10.0


class Training(_Workload):
    """Tokens a model is trained on."""

    kind: Literal["training"]
    tokens: Positive | None = None
    """All tokens within the horizon; or give tokens_per_week."""
    tokens_per_week: Positive | None = None
    sequence_tokens: Positive = 4096
    global_batch: NotNegative = 0.0
    """Samples per optimiser step; 0: chosen."""
    method: Literal["pretrain", "full", "lora"] = "pretrain"
    max_gpus: Annotated[int, Field(gt=0)] | None = None
    deadline_days: Positive | None = None
    """From the start of the horizon (with tokens), or of each week (with tokens_per_week)."""
    restarts: Restarts | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.tokens is None) == (self.tokens_per_week is None):
            raise ValueError("give exactly one of tokens and tokens_per_week")
        return self


Workload = Annotated[Serving | Batch | Training, Field(discriminator="kind")]


class Horizon(_Strict):
    """The hours that are priced: whole local days."""

    start: date
    days: Annotated[int, Field(gt=0, le=3660)] = 30
    timezone: str

    @field_validator("timezone")
    @classmethod
    def _zone(cls, name: str) -> str:
        return _timezone(name)


class Budget(_Strict):
    """A limit over the horizon, for each option alone in `compare` and for the whole plan in `plan`."""

    usd: Positive | None = None
    tokens: Positive | None = None
    """Tokens that may be bought or made: served and trained."""
    kgco2e: Positive | None = None


class Fleet(_Strict):
    """Sites and pools, with their prices."""

    sites: dict[Name, Site] = {}
    pools: Annotated[dict[Name, Pool], Field(min_length=1)]

    @model_validator(mode="after")
    def _sites_known(self) -> Self:
        for name, pool in self.pools.items():
            if pool.site and pool.site not in self.sites:
                raise ValueError(f"pool {name!r} is at {_unknown('site', pool.site, self.sites)}")
            if pool.price.term in ("owned", "colocated") and self.sites[pool.site].tariff is None:
                included = isinstance(pool.price, Colocated) and pool.price.energy_included
                if not included:
                    raise ValueError(
                        f"pool {name!r} pays for its electricity, but site {pool.site!r} has no tariff: add one"
                    )
        return self


class Scenario(Fleet):
    """A fleet and what is asked of it."""

    name: Name
    currency: Literal["USD"] = "USD"
    horizon: Horizon
    workloads: Annotated[dict[Name, Workload], Field(min_length=1)]
    budget: Budget = Budget()

    @model_validator(mode="after")
    def _pools_known(self) -> Self:
        for name, workload in self.workloads.items():
            for pool in workload.pools:
                if pool not in self.pools:
                    raise ValueError(f"workload {name!r} names {_unknown('pool', pool, self.pools)}")
        return self

    @property
    def hours(self) -> Hours:
        """UTC hours of the horizon, shape (T,); local midnight to local midnight, so 23- and 25-hour days count."""
        zone = ZoneInfo(self.horizon.timezone)
        first = datetime.combine(self.horizon.start, time(), zone).astimezone(UTC)
        last_day = self.horizon.start + timedelta(days=self.horizon.days)
        last = datetime.combine(last_day, time(), zone).astimezone(UTC)
        return np.arange(
            np.datetime64(first.replace(tzinfo=None), "h"), np.datetime64(last.replace(tzinfo=None), "h")
        )


def load(path: str | Path) -> Scenario:
    """The scenario in a YAML file.

    Raises ScenarioError with file, line and field on anything that cannot be used.
    """
    scenario: Scenario = load_yaml(Path(path), Scenario)
    return scenario


def json_schema() -> dict[str, Any]:
    """JSON Schema of a scenario file, for editors."""
    schema = Scenario.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def requests_per_hour(scenario: Scenario, workload: Serving) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Requests in each hour of the horizon, shape (T,), from the daily profile in the workload's own time zone.

    A weekday carries `requests_per_day`; a weekend day that times `weekend_fraction`.
    """
    weights = np.asarray(
        PROFILES[workload.profile] if isinstance(workload.profile, str) else workload.profile
    )
    local = local_hours(scenario.hours, workload.timezone or scenario.horizon.timezone)
    shares = weights[local.hour] / weights.sum()
    result: np.ndarray[Any, np.dtype[np.float64]] = (
        workload.requests_per_day * shares * np.where(local.weekend, workload.weekend_fraction, 1.0)
    )
    return result


def _timezone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        from zoneinfo import available_timezones

        raise ValueError(f"unknown {_unknown('time zone', name, available_timezones())}") from error
    return name


def _unknown(kind: str, name: str, known: Any) -> str:
    hits = nearest(name, known)
    return f"{kind} {name!r}" + (f": did you mean {', '.join(hits)}?" if hits else ", which is not defined")


def _in_catalogue(lookup: Any, name: str) -> None:
    try:
        lookup(name)
    except InputError as error:
        raise ValueError(str(error)) from error


def _file(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder", Path())
    full: Path = folder / path
    if not full.is_file():
        raise ValueError(f"no file at {path} (looked in {folder})")
    return full
