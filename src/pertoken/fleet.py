"""A fleet as it runs: the scenario's `Fleet`, where its meters are, what changed, its budgets, and who is told of them.

A price that was once right is never edited: a change is appended with its date, and the hours before it keep
what was in force then.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, date, datetime, time
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pydantic import BaseModel, Field, StringConstraints, ValidationInfo, field_validator, model_validator

from pertoken._yaml import load_yaml
from pertoken.errors import InputError, nearest
from pertoken.scenario import (
    Fleet,
    InlineTariff,
    Owned,
    Price,
    Reserved,
    TariffFile,
    _file,
    _Strict,
)
from pertoken.scenario._field import _timezone
from pertoken.units import SERVED_TOKEN_METERS, site_pool

Label = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
Text = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
Seconds = Annotated[float, Field(ge=1, le=300)]


class _Written(BaseModel):
    model_config = _Strict.model_config


class _Metered(_Written):
    """What a target does not say itself."""

    pool: str = ""
    """Pool of the fleet it belongs to."""
    model: Text = ""
    """Model of an engine that does not name its own (llama.cpp)."""
    tenant: Text = ""
    """Whose it is, where it serves one tenant alone."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs an engine instance holds, a shared one as a fraction; 0: its share of the pool's."""
    names: dict[str, str] = {}
    """The engine's name of a model to ours."""
    pools: dict[str, str] = {}
    """Pool by the value of any label (GPU UUID, host), for an exporter that sees several pools."""


class ScrapeTarget(_Metered):
    """A page of metrics we fetch."""

    url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s@]+$", max_length=2000)]
    """Address of the page; no user name or password in it."""
    name: Text = ""
    """Name in the books; empty: host and port."""
    interval_s: Seconds = 15.0
    authorization_file: Path | None = None
    """File whose text is sent as ``Authorization``; never logged."""

    @field_validator("authorization_file")
    @classmethod
    def _found(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return None if path is None else _file(path, info)

    @property
    def called(self) -> str:
        """Its name in the books."""
        return self.name or urlsplit(self.url).netloc


class FileTargets(_Metered):
    """Targets in Prometheus file_sd JSON files, read again whenever they change; labels ``pool``, ``model``,
    ``tenant`` and ``gpus`` of a group win over what is written here."""

    files: Annotated[str, StringConstraints(min_length=1, max_length=500)]
    """A path, or a pattern such as ``targets/*.json``, seen from the fleet file's folder."""
    interval_s: Seconds = 15.0


class WrittenInstance(_Metered):
    """An instance whose samples a Prometheus sends us by remote write."""

    instance: Label
    """Its ``instance`` label, or ``job/instance``."""


class Sources(_Written):
    """Where the meters are."""

    scrape: list[ScrapeTarget] = []
    files: list[FileTargets] = []
    written: list[WrittenInstance] = []
    nvml_pool: str = ""
    """Pool of this machine's GPUs, read through NVML; empty: they are not read."""
    nvml_pools: dict[str, str] = {}
    """Pool by GPU UUID, where this machine's GPUs are of several."""


class Change(_Written):
    """New terms of a pool or a site from a local day on."""

    start: date = Field(alias="from")
    pool: str = ""
    site: str = ""
    price: Price | None = None
    """Same term: a pool under another term is another pool."""
    count: Annotated[int, Field(gt=0)] | Literal["as needed"] | None = None
    tariff: str | InlineTariff | TariffFile | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if bool(self.pool) == bool(self.site):
            raise ValueError("a change names one pool or one site")
        if self.pool and (self.tariff is not None or (self.price is None and self.count is None)):
            raise ValueError("a pool's change gives price or count")
        if self.site and (self.tariff is None or self.price is not None or self.count is not None):
            raise ValueError("a site's change gives tariff")
        return self


COUNTED: dict[str, tuple[str, ...]] = {
    "output": ("output_tokens",),
    "input": ("input_tokens", "cached_input_tokens"),
    "input_computed": ("input_tokens",),
    "total": SERVED_TOKEN_METERS,
    "trained": ("training_tokens",),
}
"""Tokens a budget may count, by the ending of the metrics that have them below the line, and their meters."""
Percents = Annotated[list[Annotated[float, Field(gt=0, le=1000)]], Field(max_length=10)]
PlainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _-]*$", max_length=64)]
"""Of a budget or a channel: part of an address and of a metric's label."""


class Thresholds(_Written):
    """Shares of a budget at which someone is told."""

    actual_percent: Percents = [50, 80, 100]
    """Of what is spent."""
    forecast_percent: Percents = [100]
    """Of what the period is expected to end at."""

    @field_validator("actual_percent", "forecast_percent")
    @classmethod
    def _ordered(cls, values: list[float]) -> list[float]:
        return sorted(set(values))


class Budget(_Written):
    """An amount for a period, of all or of a tenant, models and pools."""

    name: PlainName
    usd: Annotated[Decimal, Field(gt=0, max_digits=20, decimal_places=9)] | None = None
    """Amount in USD."""
    tokens: Annotated[int, Field(gt=0, le=10**18)] | None = None
    """Amount in tokens, of those in `counts`."""
    counts: Literal["", "output", "input", "input_computed", "total", "trained"] = ""
    """Which tokens: output, input (cached ones too), input_computed, total (input + output), trained."""
    tenant: Text = ""
    """Whose; empty: of all tenants together."""
    models: list[Label] = []
    """Of these models alone."""
    pools: list[Label] = []
    """Of these pools alone; ``(site:NAME)`` is what no pool of a site owns."""
    period: Literal["day", "week", "month", "quarter"] = "month"
    start: date | None = None
    """First day of the first period, the others follow it; left out: the calendar's (Monday, the first of a month)."""
    timezone: str = "UTC"
    """IANA name: where its days begin."""
    hard: bool = False
    """Whether `GET /v1/budget/TENANT` says no once it is used up."""
    idle: bool | None = None
    """Whether idle counts. Left out: yes, but for a tenant's. A tenant's: its part by `chargeback.spread_idle`."""
    alert_at: Thresholds = Thresholds()

    @field_validator("timezone")
    @classmethod
    def _zone(cls, name: str) -> str:
        return _timezone(name)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.usd is None) == (self.tokens is None):
            raise ValueError("a budget gives usd or tokens, one of them")
        if (self.tokens is not None) != bool(self.counts):
            raise ValueError(
                "a budget in tokens says which it counts, one in usd does not: " + ", ".join(COUNTED)
            )
        if self.tokens is not None and self.idle is not None:
            raise ValueError("idle hours have no tokens: leave idle out of a budget in tokens")
        return self

    @property
    def amount(self) -> Decimal:
        """What may be spent in a period [`unit`]."""
        return self.usd if self.usd is not None else Decimal(self.tokens or 0)

    @property
    def unit(self) -> str:
        """USD, or which tokens."""
        return "USD" if self.usd is not None else f"{self.counts} tokens"

    @property
    def with_idle(self) -> bool:
        """Whether idle counts."""
        return self.usd is not None and (not self.tenant if self.idle is None else self.idle)


class _Channel(_Written):
    """A way to tell someone."""

    name: PlainName
    budgets: list[PlainName] = []
    """These budgets alone; empty: all."""
    ca_file: Path | None = None
    """Certificates (PEM) to trust instead of the system's."""

    @field_validator("ca_file")
    @classmethod
    def _there(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return None if path is None else _file(path, info)


_SECRET_BYTES = 16


class Webhook(_Channel):
    """An address that gets a signed POST for each alert and each recovery."""

    url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s@]+$", max_length=2000)]
    secret_file: Path
    """File whose text, without white space around it, is the key of the HMAC-SHA256; at least 16 bytes."""

    @field_validator("secret_file")
    @classmethod
    def _found(cls, path: Path, info: ValidationInfo) -> Path:
        full = _file(path, info)
        if len(full.read_bytes().strip()) < _SECRET_BYTES:
            raise ValueError(f"the secret in {path} is shorter than {_SECRET_BYTES} bytes")
        return full


class Alertmanager(_Channel):
    """A Prometheus Alertmanager (API v2)."""

    url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s@]+$", max_length=2000)]
    """Its address, without ``/api/v2/alerts``."""
    authorization_file: Path | None = None
    """File whose text is sent as ``Authorization``; never logged."""
    resend_s: Annotated[float, Field(ge=1, le=300)] = 60.0
    """An alert that lasts is sent again this often, and ends by itself after four times as long without us."""

    @field_validator("authorization_file")
    @classmethod
    def _found(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return None if path is None else _file(path, info)


Address = Annotated[str, StringConstraints(pattern=r"^[^@\s<>,;]+@[^@\s<>,;]+$", max_length=254)]


class Email(_Channel):
    """A mail server that takes plain text for people."""

    host: Label
    port: Annotated[int, Field(ge=1, le=65535)] = 587
    security: Literal["starttls", "tls", "none"] = "starttls"
    """``none`` sends in the clear: for a server on this machine."""
    user: Text = ""
    password_file: Path | None = None
    """File with the user's password; never logged."""
    sender: Address
    to: Annotated[list[Address], Field(min_length=1, max_length=50)]

    @field_validator("password_file")
    @classmethod
    def _found(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return None if path is None else _file(path, info)

    @model_validator(mode="after")
    def _secret(self) -> Self:
        if bool(self.user) != (self.password_file is not None):
            raise ValueError("give both user and password_file, or neither")
        if self.user and self.security == "none":
            raise ValueError("a password is not sent in the clear: security is starttls or tls")
        return self


class Alerts(_Written):
    """Who is told when a budget crosses a threshold, and when it has recovered."""

    webhooks: list[Webhook] = []
    alertmanagers: list[Alertmanager] = []
    emails: list[Email] = []

    @property
    def channels(self) -> list[Webhook | Alertmanager | Email]:
        """All of them."""
        return [*self.webhooks, *self.alertmanagers, *self.emails]


class Chargeback(_Written):
    """What a tenant's statement holds beside the tenant's own rows."""

    spread_idle: Literal["no", "by_gpu_hours", "by_cost"] = "no"
    """Idle GPUs and what no pool owns: nobody's, or spread over who used the pool or the site."""
    timezone: str = "UTC"
    """IANA name: where a statement's month begins."""

    @field_validator("spread_idle", mode="before")
    @classmethod
    def _no(cls, value: object) -> object:
        return "no" if value is False else value  # YAML reads a bare `no` as false

    @field_validator("timezone")
    @classmethod
    def _zone(cls, name: str) -> str:
        return _timezone(name)


class RunningFleet(Fleet):
    """A fleet with its meters, its changes, its budgets and its alerts."""

    sources: Sources = Sources()
    changes: list[Change] = Field(default_factory=list)
    """Terms that changed, by the day they came into force; their order does not matter."""
    budgets: list[Budget] = Field(default_factory=list, max_length=1000)
    alerts: Alerts = Alerts()
    chargeback: Chargeback = Chargeback()

    @model_validator(mode="after")
    def _known(self) -> Self:
        for kind, name, known in self._mentions():
            if name not in known:
                near = ", ".join(nearest(name, known)) or ", ".join(known)
                raise ValueError(f"sources and changes name the {kind} {name!r}, the fleet has {near}")
        for change in self.changes:
            if change.pool and change.price is not None:
                term = self.pools[change.pool].price.term
                if change.price.term != term:
                    raise ValueError(
                        f"pool {change.pool!r} is {term}: a change cannot make it {change.price.term}; "
                        "add a pool"
                    )
        prices = [(name, pool.price) for name, pool in self.pools.items()]
        prices += [(c.pool, c.price) for c in self.changes if c.price is not None]
        for name, price in prices:
            unknown = (isinstance(price, Owned) and price.usd_per_gpu is None) or (
                isinstance(price, Reserved) and price.usd_per_gpu_hour is None
            )
            if unknown:
                what = "usd_per_gpu" if isinstance(price, Owned) else "usd_per_gpu_hour"
                raise ValueError(
                    f"pool {name!r} is {price.term}: write {what}, what was paid or signed for; "
                    "the catalogue's price changes, yours does not"
                )
        self._check_sources()
        self._check_changes()
        self._check_budgets()
        return self

    def _check_sources(self) -> None:
        sources = self.sources
        names = [target.called for target in sources.scrape]
        for kind, given in (
            ("scrape target", names),
            ("written instance", [w.instance for w in sources.written]),
        ):
            if twice := _twice(given):
                raise ValueError(f"the {kind} {twice!r} is given twice: give each a name of its own")
        for called, one in [
            *zip(names, sources.scrape, strict=True),
            *((w.instance, w) for w in sources.written),
        ]:
            if not one.pool and not one.pools:
                raise ValueError(f"sources: {called!r} says no pool: what it counts would be in no figure")
        # The same page under the same address twice would be counted twice.
        pages = {(t.pool, urlsplit(t.url).netloc) for t in sources.scrape}
        for written in sources.written:
            if (written.pool, written.instance.rpartition("/")[2]) in pages:
                raise ValueError(
                    f"{written.instance!r} of pool {written.pool!r} is scraped and written: name it once"
                )

    def _check_changes(self) -> None:
        given = [
            f"{term} of {change.pool or change.site} from {change.start}"
            for change in self.changes
            for term in ("price", "count", "tariff")
            if getattr(change, term) is not None
        ]
        if twice := _twice(given):
            raise ValueError(f"changes give the {twice} twice: which of them holds?")

    def _check_budgets(self) -> None:
        names = [budget.name for budget in self.budgets]
        channels = [channel.name for channel in self.alerts.channels]
        for kind, given in (("budget", names), ("alert channel", channels)):
            if twice := _twice(given):
                raise ValueError(f"the {kind} {twice!r} is given twice")
        known = [*self.pools, *map(site_pool, self.sites)]
        for kind, wanted, there in (
            ("budgets name the pool", [p for b in self.budgets for p in b.pools], known),
            ("alerts name the budget", [n for c in self.alerts.channels for n in c.budgets], names),
        ):
            for name in wanted:
                if name not in there:
                    near = ", ".join(nearest(name, there)) or ", ".join(there) or "none"
                    raise ValueError(f"{kind} {name!r}, the fleet has {near}")
        for budget in self.budgets:
            if budget.tenant and budget.with_idle and self.chargeback.spread_idle == "no":
                raise ValueError(
                    f"budget {budget.name!r} counts idle of a tenant: say how under chargeback.spread_idle"
                )
            if budget.tenant and budget.with_idle and budget.models:
                raise ValueError(
                    f"budget {budget.name!r}: idle is spread over tenants, not over their models"
                )

    def _mentions(self) -> list[tuple[str, str, list[str]]]:
        pools, sites = list(self.pools), list(self.sites)
        sources = self.sources
        metered: list[_Metered] = [*sources.scrape, *sources.files, *sources.written]
        named = [n for m in metered for n in (m.pool, *m.pools.values()) if n]
        named += [*sources.nvml_pools.values(), *([sources.nvml_pool] if sources.nvml_pool else [])]
        named += [c.pool for c in self.changes if c.pool]
        found = [("pool", name, pools) for name in named]
        return found + [("site", c.site, sites) for c in self.changes if c.site]

    @cached_property
    def _starts(self) -> list[tuple[datetime, Change]]:
        """When each change comes into force, oldest first."""
        found = []
        for change in self.changes:
            site = change.site or self.pools[change.pool].site
            zone = ZoneInfo(self.sites[site].timezone) if site else ZoneInfo("UTC")
            found.append((datetime.combine(change.start, time(), zone).astimezone(UTC), change))
        return sorted(found, key=lambda item: item[0])

    def borders(self) -> list[datetime]:
        """Moments (UTC) at which terms change, oldest first."""
        return sorted({moment for moment, _ in self._starts})

    def at(self, hour: datetime) -> Fleet:
        """The fleet under the terms in force at an hour (UTC).

        Raises InputError on an hour without a time zone.
        """
        if hour.tzinfo is None:
            raise InputError(f"{hour.isoformat()} has no time zone: give one, such as +00:00")
        pools, sites = dict(self.pools), dict(self.sites)
        for moment, change in self._starts:
            if moment > hour:
                break
            if change.pool:
                update = {k: v for k in ("price", "count") if (v := getattr(change, k)) is not None}
                pools[change.pool] = pools[change.pool].model_copy(update=update)
            else:
                sites[change.site] = sites[change.site].model_copy(update={"tariff": change.tariff})
        return Fleet.model_construct(sites=sites, pools=pools)


def _twice(given: list[str]) -> str:
    """The first in order of those that stand in a list more than once; empty where none does."""
    return min((name for name, count in Counter(given).items() if count > 1), default="")


def load_fleet(path: str | Path) -> RunningFleet:
    """The fleet in a YAML file: sites and pools as in a scenario, with `sources` and `changes`.

    Raises ScenarioError with file, line and field on anything that cannot be used.
    """
    fleet: RunningFleet = load_yaml(Path(path), RunningFleet)
    return fleet
