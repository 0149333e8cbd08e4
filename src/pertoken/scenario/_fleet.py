"""Sites, pools and price terms: what there is to run on, or to buy, in plan and actual alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pertoken import catalog
from pertoken._yaml import MisplacedError
from pertoken.errors import PerTokenError
from pertoken.scenario._field import (
    Fraction,
    Name,
    NotNegative,
    Positive,
    _file,
    _in_catalogue,
    _Strict,
    _timezone,
    _unknown,
)
from pertoken.units import MINUTES_PER_HOUR


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
    peak_so_far_kw: dict[str, NotNegative] = Field({})
    """Demand already set this billing period, by the tariff's band."""
    previous_peaks_kw: dict[str, list[NotNegative]] = Field({})
    """By the tariff's demand charge: monthly peaks before the horizon, oldest first, for a ratchet."""
    overheads: Overheads = Overheads()
    """Paid once for the site."""

    @field_validator("timezone")
    @classmethod
    def _zone(cls, name: str) -> str:
        return _timezone(name)

    @field_validator("tariff", mode="before")
    @classmethod
    def _no_bare_price(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            raise ValueError(f"a price is written {{usd_per_kwh: {value:g}}}")
        return value

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
    on_prem: bool | None = None
    """Whether it counts as on premises for `policy.on_prem_first`; empty: owned and colocated pools do."""
    gpus_per_machine: Annotated[int, Field(gt=0, le=1024)] | None = None
    """GPUs bought or rented at a time; empty: the node of the catalogue."""
    engine: str = "vllm"
    """vllm, sglang, trtllm, ..."""
    overheads: Overheads = Overheads()
    """Paid for this pool alone."""
    startup_minutes: NotNegative = 5.0
    """From asking for a machine to its first token."""
    startup_usd: NotNegative = 0.0
    """Paid at each start of a machine."""
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

    @model_validator(mode="after")
    def _can_be_full(self) -> Self:
        if self.on_prem and self.count == "as needed":
            raise MisplacedError("what is on premises has a count: an endless pool is never full", "on_prem")
        return self

    @property
    def machine_gpus(self) -> int:
        """GPUs of one machine: what is written, else the catalogue's node, no more than the pool has."""
        if self.gpus_per_machine is not None:
            return self.gpus_per_machine
        node = catalog.gpu(self.gpu).gpus_per_node
        return min(node, self.count) if isinstance(self.count, int) else node


class Fleet(_Strict):
    """Sites and pools, with their prices."""

    sites: dict[Name, Site] = Field({})
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
