"""What a human writes: a fleet (sites, pools, prices) and what is asked of it (workloads, horizon, budget).

The fleet serves plan and actual alike. Fields carry their unit in their name; what is not written is named in the
report as left out, never silently assumed to be free.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

import numpy as np
from pydantic import Field, field_validator, model_validator

from pertoken._yaml import MisplacedError, load_yaml, parse_yaml
from pertoken.errors import InputError
from pertoken.rates._local import local_hours
from pertoken.scenario._field import Name, Positive, _file, _Strict, _timezone, _unknown
from pertoken.scenario._fleet import (
    Api,
    Bought,
    Colocated,
    Fleet,
    InlineTariff,
    OnDemand,
    Overheads,
    Owned,
    Pool,
    Price,
    Reserved,
    Site,
    Spot,
    TariffFile,
)
from pertoken.scenario._work import (
    PROFILES,
    Batch,
    ModelFile,
    Restarts,
    Serving,
    Slo,
    Tokens,
    Training,
    Workload,
)
from pertoken.tables import Hours

__all__ = [
    "PROFILES",
    "Api",
    "Batch",
    "Bought",
    "Budget",
    "Colocated",
    "Fleet",
    "Horizon",
    "InlineTariff",
    "ModelFile",
    "OnDemand",
    "Overheads",
    "Owned",
    "Policy",
    "Pool",
    "Price",
    "Reserved",
    "Restarts",
    "Scenario",
    "Serving",
    "Site",
    "Slo",
    "Spot",
    "TariffFile",
    "Tokens",
    "Training",
    "Workload",
    "_Strict",
    "_file",
    "json_schema",
    "load",
    "parse",
    "requests_per_hour",
]

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


class Policy(_Strict):
    """What a plan keeps to, whatever it costs."""

    on_prem_first: bool = False
    """Fill what stands on premises before anything is rented or bought as tokens; that burst is paid at its price."""


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
    policy: Policy = Policy()
    """Rules that come before the cost of a plan."""

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


def parse(text: str, files: Mapping[str, Path] | None = None) -> Scenario:
    """The scenario in a text that came over a network: it opens no file but those of `files`, by path as written.

    Raises ScenarioError with line and field on anything that cannot be used.
    """
    scenario: Scenario = parse_yaml(text, Scenario, "scenario", files or {})
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
