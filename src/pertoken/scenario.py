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
from pertoken._yaml import MisplacedError, load_yaml
from pertoken.errors import InputError, PerTokenError, nearest
from pertoken.rates._local import local_hours
from pertoken.tables import Hours
from pertoken.units import HOURS_PER_DAY, MINUTES_PER_HOUR

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
    """Path of the config.json, seen from this file."""

    @field_validator("config")
    @classmethod
    def _found(cls, path: Path, info: ValidationInfo) -> Path:
        return _file(path, info)


class InlineTariff(_Strict):
    """A flat electricity price with an optional demand charge on the month's peak."""

    usd_per_kwh: NotNegative
    """Energy, USD per kWh, all hours alike."""
    demand_usd_per_kw: NotNegative = 0.0
    """USD per kW of the month's highest demand."""


class TariffFile(_Strict):
    """A tariff in a file: URDB v8 JSON as published, or an hourly price series as CSV."""

    urdb: Path | None = None
    """URDB v8 JSON, as OpenEI publishes it."""
    csv: Path | None = None
    """One price per UTC hour: `hour_utc,usd_per_kwh`, or `Datetime (UTC)` with `Price (USD/MWh)`."""

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
    """Full-time equivalents."""
    usd_per_fte_year: NotNegative = 180_000.0
    """Loaded cost of one."""
    hosting_usd_per_month: NotNegative | None = None
    """Rent of the room or building."""
    network_usd_per_month: NotNegative | None = None
    """Connection, switches, addresses."""
    storage_usd_per_month: NotNegative | None = None
    """Disks for weights, checkpoints and data."""
    software_usd_per_gpu_year: NotNegative | None = None
    """Licences."""
    egress_usd_per_gb: NotNegative | None = None
    """Data sent out."""


class Site(_Strict):
    """A place with an electricity meter, or a cloud region."""

    timezone: str
    """IANA name, such as America/Los_Angeles."""
    tariff: str | InlineTariff | TariffFile | None = None
    """A catalogue name, an inline price or a file."""
    pue: Annotated[float, Field(ge=1, le=4)]
    """Power of the whole site over that of its servers, at least 1."""
    region: str = ""
    """For workloads whose data must stay in one."""
    carbon_g_per_kwh: NotNegative | None = None
    """The grid's intensity, gCO2e per kWh."""
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
    """Paid once for the site."""

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

    @model_validator(mode="after")
    def _charges_known(self) -> Self:
        if isinstance(self.tariff, str):
            charges = [d.name for d in catalog.tariff(self.tariff).demand]
            for field in ("previous_peaks_kw", "peak_so_far_kw"):
                for name in getattr(self, field):
                    if name not in charges:
                        known = ", ".join(charges) or "none"
                        raise MisplacedError(
                            f"the tariff has no demand charge {name!r}: it has {known}", field, name
                        )
        return self


class Bought(_Strict):
    """Hardware that was bought: annuity on price less the residual's present value, or straight line."""

    usd_per_gpu: Positive | None = None
    """Price per GPU with its share of the server; empty: the catalogue's newest purchase price of `provider`."""
    provider: str = ""
    """Seller whose catalogue price is taken."""
    life_years: Positive = 4.0
    """Years until it is sold or scrapped."""
    wacc_fraction: Fraction = 0.08
    """Cost of capital per year; 0.08 is 8 %."""
    residual_fraction: Fraction = 0.1
    """Share of the price it is then worth."""
    method: Literal["annuity", "straight-line"] = "annuity"
    """How the price is spread over its life."""
    maintenance_fraction_per_year: Fraction = 0.0
    """Support contract, as a share of the price."""
    cooling_usd_per_kw: NotNegative = 0.0
    """Capital of cooling and power distribution per kW of IT load, same life."""


class Owned(Bought):
    """Bought hardware at a site whose power and overheads are yours."""

    term: Literal["owned"]
    """The price term."""


class Colocated(Bought):
    """Bought hardware in somebody else's building, paid per kW of contracted power."""

    term: Literal["colocated"]
    """The price term."""
    usd_per_kw_month: NotNegative
    """Per contracted kW: TDP and host at full load."""
    rack_usd_per_month: NotNegative = 0.0
    """Per machine's share of a rack."""
    energy_included: bool = False
    """Whether the price per kW holds the energy."""


class _Rented(_Strict):
    usd_per_gpu_hour: NotNegative | None = None
    """Empty: the catalogue's newest price of `provider`, of that instance and region where they are given."""
    provider: str = ""
    """Seller whose catalogue price is taken."""
    instance: str = ""
    """Its instance, where it has several."""
    region: str = ""
    """Its region, where prices differ."""

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if self.usd_per_gpu_hour is None and not self.provider:
            raise ValueError("give usd_per_gpu_hour, or provider to take the catalogue's price")
        return self


class OnDemand(_Rented):
    """Rented by the hour; energy is in the rent."""

    term: Literal["on_demand"]
    """The price term."""


class Reserved(_Rented):
    """Committed for the horizon: paid used or unused; energy is in the price."""

    term: Literal["reserved"]
    """The price term."""
    commitment_years: NotNegative = 1.0
    """Length of the commitment."""


class Spot(_Rented):
    """Rented while nobody pays more; interrupted."""

    term: Literal["spot"]
    """The price term."""
    interruptions_per_hour: NotNegative
    """Per machine."""
    reload_minutes: NotNegative = 5.0
    """To load weights and warm up again."""
    lost_minutes: NotNegative = 0.0
    """Work lost at an interruption beyond the reload; for training: half the checkpoint interval is added."""

    @model_validator(mode="after")
    def _gets_on(self) -> Self:
        lost = self.interruptions_per_hour * (self.reload_minutes + self.lost_minutes) / MINUTES_PER_HOUR
        if lost >= 1:
            raise MisplacedError(
                f"so many interruptions cost {lost:.2f} hours an hour: nothing would get done",
                "interruptions_per_hour",
            )
        return self


class Api(_Strict):
    """Tokens bought from a provider; prices from genai-prices unless written here."""

    term: Literal["api"]
    """The price term."""
    provider: str = ""
    """As genai-prices names it."""
    model: str = ""
    """As the provider names it."""
    input_usd_per_mtok: NotNegative | None = None
    """USD per M prompt tokens."""
    cached_input_usd_per_mtok: NotNegative | None = None
    """USD per M prompt tokens that hit its cache; empty: as other prompt tokens."""
    output_usd_per_mtok: NotNegative | None = None
    """USD per M tokens generated."""

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
    """The price term and its numbers."""
    gpu: str = ""
    """A catalogue name; empty for an API."""
    site: str = ""
    """Where it stands; empty for an API."""
    count: Annotated[int, Field(gt=0)] | Literal["as needed"] = "as needed"
    """GPUs that are there (owned, colocated, reserved), or that may be rented at most."""
    have: bool = False
    """Whether they are bought or committed already: a plan keeps them and pays for them, used or not."""
    gpus_per_machine: Annotated[int, Field(gt=0, le=1024)] | None = None
    """GPUs bought or rented at a time; empty: the node of the catalogue."""
    engine: str = "vllm"
    """vllm, sglang, trtllm, ..."""
    overheads: Overheads = Overheads()
    """Paid for this pool alone."""
    startup_minutes: NotNegative = 5.0
    """From asking for a machine to its first token."""
    startup_usd: NotNegative = 0.0
    """Paid at each start."""
    minimum_run_hours: NotNegative = 1.0
    """A machine that was started runs at least so long."""
    vendor: str = ""
    """For workloads that are kept to some."""
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

    @model_validator(mode="after")
    def _counted(self) -> Self:
        if self.have and (
            self.count == "as needed" or self.price.term not in ("owned", "colocated", "reserved")
        ):
            raise MisplacedError("what you have is owned, colocated or reserved, and has a count", "have")
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
    precisions: list[Literal["bf16", "fp8", "fp4", "int8", "int4"]] = []
    """Precisions the owner accepts; empty: the one the checkpoint is published in, and bf16."""
    tenant: Name | None = None
    """Who it is for; empty: the workload's name."""
    pools: list[str] = []
    """Pools that may run it; empty: all."""
    regions: list[str] = []
    """Site regions its data may be in; empty: all."""
    vendors: list[str] = []
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
    """Kept running whatever the load."""
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


_YEARS = (1970, 2200)


class Horizon(_Strict):
    """The hours that are priced: whole local days."""

    start: date
    """First local day."""
    days: Annotated[int, Field(gt=0, le=3660)] = 30
    """Local days."""
    timezone: str
    """IANA name."""

    @field_validator("timezone")
    @classmethod
    def _zone(cls, name: str) -> str:
        return _timezone(name)

    @field_validator("start")
    @classmethod
    def _year(cls, start: date) -> date:
        if not _YEARS[0] <= start.year < _YEARS[1]:
            raise ValueError(f"a horizon starts between {_YEARS[0]} and {_YEARS[1]}")
        return start


class Budget(_Strict):
    """A limit over the horizon, for each option alone in `compare` and for the whole plan in `plan`."""

    usd: Positive | None = None
    """USD."""
    tokens: Positive | None = None
    """Tokens that may be bought or made: served and trained."""
    kgco2e: Positive | None = None
    """Greenhouse gas of its energy."""


class Fleet(_Strict):
    """Sites and pools, with their prices."""

    sites: dict[Name, Site] = {}
    """Places with an electricity meter, and cloud regions, by name."""
    pools: Annotated[dict[Name, Pool], Field(min_length=1)]
    """What tokens can be made on, by name."""

    @model_validator(mode="after")
    def _sites_known(self) -> Self:
        for name, pool in self.pools.items():
            here = ("pools", name)
            if pool.site and pool.site not in self.sites:
                raise MisplacedError(f"unknown {_unknown('site', pool.site, self.sites)}", *here, "site")
            if isinstance(pool.price, Bought) and self.sites[pool.site].tariff is None:
                included = isinstance(pool.price, Colocated) and pool.price.energy_included
                if not included:
                    raise MisplacedError(
                        f"the pool pays for its electricity, but site {pool.site!r} has no tariff: add one",
                        *here,
                        "site",
                    )
            if isinstance(pool.price, Bought | OnDemand | Reserved | Spot) and pool.price.provider:
                _catalogue_price(pool, *here, "price")
        return self


def _catalogue_price(pool: Pool, *place: str) -> None:
    price = pool.price
    assert isinstance(price, Bought | OnDemand | Reserved | Spot)
    term = "purchase" if isinstance(price, Bought) else price.term
    instance, region = ("", "") if isinstance(price, Bought) else (price.instance, price.region)
    years = price.commitment_years if isinstance(price, Reserved) else None
    written = price.usd_per_gpu if isinstance(price, Bought) else price.usd_per_gpu_hour
    if written is not None:
        return
    try:
        catalog.price(
            price.provider, pool.gpu, term, commitment_years=years, instance=instance, region=region
        )
    except PerTokenError as error:
        raise MisplacedError(str(error), *place) from error


class Scenario(Fleet):
    """A fleet and what is asked of it."""

    name: Name
    """Of its books: `plan:<name>`."""
    currency: Literal["USD"] = "USD"
    """All money in this file."""
    horizon: Horizon
    """Which hours are priced."""
    workloads: Annotated[dict[Name, Workload], Field(min_length=1)]
    """What is asked for, by name."""
    budget: Budget = Budget()
    """Limits that an option or plan should keep."""

    @model_validator(mode="after")
    def _pools_known(self) -> Self:
        for name, workload in self.workloads.items():
            for pool in workload.pools:
                if pool not in self.pools:
                    known = _unknown("pool", pool, self.pools)
                    raise MisplacedError(f"unknown {known}", "workloads", name, "pools")
        return self

    @property
    def hours(self) -> Hours:
        """UTC hours of the horizon, shape (T,); local midnight to local midnight, so 23- and 25-hour days count."""
        return np.arange(self._midnight(0), self._midnight(self.horizon.days))

    @property
    def midnights(self) -> list[int]:
        """The hour of the horizon each of its local days begins in, and that after its last."""
        first = self._midnight(0)
        return [int((self._midnight(d) - first).astype(np.int64)) for d in range(self.horizon.days + 1)]

    def _midnight(self, day: int) -> np.datetime64:
        zone = ZoneInfo(self.horizon.timezone)
        local = datetime.combine(self.horizon.start + timedelta(days=day), time(), zone)
        return np.datetime64(local.astimezone(UTC).replace(tzinfo=None), "h")


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
    if not result.any():
        raise InputError(
            "no request falls in the horizon: weekend_fraction and profile leave none of its hours any"
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
