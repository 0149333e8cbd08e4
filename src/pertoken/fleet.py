"""A fleet as it runs: the scenario's `Fleet`, where its meters are, and what changed since it was written.

A price that was once right is never edited: a change is appended with its date, and the hours before it keep
what was in force then.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pydantic import BaseModel, Field, StringConstraints, ValidationInfo, field_validator, model_validator

from pertoken._yaml import load_yaml
from pertoken.errors import InputError, nearest
from pertoken.scenario import Fleet, InlineTariff, Owned, Price, Reserved, TariffFile, _file, _Strict

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


class RunningFleet(Fleet):
    """A fleet with its meters and its changes."""

    sources: Sources = Sources()
    changes: list[Change] = Field(default_factory=list)
    """Terms that changed, by the day they came into force; their order does not matter."""

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
        instances = [w.instance for w in self.sources.written]
        if len(set(instances)) < len(instances):
            raise ValueError("an instance of remote write is given twice")
        # The same page under the same address twice would be counted twice.
        pages = {(t.pool, urlsplit(t.url).netloc) for t in self.sources.scrape}
        for one in self.sources.written:
            if (one.pool, one.instance.rpartition("/")[2]) in pages:
                raise ValueError(
                    f"{one.instance!r} of pool {one.pool!r} is scraped and written: name it once"
                )
        return self

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


def load_fleet(path: str | Path) -> RunningFleet:
    """The fleet in a YAML file: sites and pools as in a scenario, with `sources` and `changes`.

    Raises ScenarioError with file, line and field on anything that cannot be used.
    """
    fleet: RunningFleet = load_yaml(Path(path), RunningFleet)
    return fleet
