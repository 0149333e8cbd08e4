"""Energy of a window: kWh by pool and phase at three boundaries, J per token, and what a site's meter has to say.

Sums of usage rows, nothing else: ``energy_kwh`` is at the utility meter (GPU + host + idle, × PUE), ``it_energy_kwh``
at the servers' plugs, ``gpu_energy_kwh`` at the boards. A ratio names its boundary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pertoken.errors import InputError
from pertoken.fleet import RunningFleet
from pertoken.ledger import Ledger
from pertoken.meter.attribute import BOOK
from pertoken.plan._pricing import pays_for_energy
from pertoken.rates.energy import DemandHours, TariffHours
from pertoken.report._terms import Month, hours_between, month_tariff, months_of
from pertoken.report.so_far import SoFar
from pertoken.units import (
    GRAMS_PER_KILOGRAM,
    HOURS_PER_DAY,
    JOULES_PER_KWH,
    SERVED_TOKEN_METERS,
    base_meter,
    site_pool,
)

_HOUR = timedelta(hours=1)
BOUNDARIES: dict[str, str] = {
    "energy_kwh": "utility meter",
    "it_energy_kwh": "servers' plugs",
    "gpu_energy_kwh": "GPU boards",
}
"""Meters of energy and where each is measured, widest first."""
TOKENS: dict[str, tuple[tuple[str, ...], str]] = {
    "output": (("output_tokens",), "output"),
    "input": (("input_tokens", "cached_input_tokens"), "input"),
    "input + output": (SERVED_TOKEN_METERS, ""),
    "retained training": (("training_tokens",), ""),
}
"""Kinds of token with the meters that count them and the phase whose energy they bear; empty: all of it."""
_DRAWN_DAYS = 31
Where = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Use:
    """Energy [kWh] of a pool in a phase, by boundary."""

    pool: str
    phase: str
    kwh: Mapping[str, float]


@dataclass(frozen=True)
class Energy:
    """What a window's rows hold of energy. `series`: (start of an hour or a day, pool, kWh at the utility meter)."""

    uses: tuple[Use, ...]
    tokens: Mapping[str, float]
    serving: frozenset[str]
    """Pools of which tokens were counted."""
    co2e_kg: float | None
    series: tuple[tuple[datetime, str, float], ...]
    step: str

    def kwh(
        self, boundary: str = "energy_kwh", phase: str = "", pools: Iterable[str] | None = None
    ) -> float | None:
        """Energy [kWh] at a boundary; None where nothing was measured there."""
        within = None if pools is None else set(pools)
        told = [
            use.kwh[boundary]
            for use in self.uses
            if boundary in use.kwh and phase in ("", use.phase) and (within is None or use.pool in within)
        ]
        return sum(told) if told else None

    def joule_per_token(self, kind: str, boundary: str = "energy_kwh") -> float | None:
        """J per token of a kind of `TOKENS` at a boundary; None without tokens or a measurement."""
        meters, phase = TOKENS[kind]
        count = sum(self.tokens.get(meter, 0.0) for meter in meters)
        kwh = self.kwh(boundary)
        return (
            None if kwh is None or not count else JOULES_PER_KWH * (self.kwh(boundary, phase) or 0.0) / count
        )

    def unmeasured(self, boundary: str) -> list[str]:
        """Pools whose tokens count in J per token at a boundary and whose energy there nobody measured (an API's)."""
        return sorted(self.serving - {use.pool for use in self.uses if boundary in use.kwh})

    def pue(self, pools: Iterable[str] | None = None) -> float | None:
        """Energy at the utility meter over that at the servers' plugs, as booked."""
        whole, plug = self.kwh("energy_kwh", pools=pools), self.kwh("it_energy_kwh", pools=pools)
        return whole / plug if whole is not None and plug else None


def energy_of(ledger: Ledger, where: Where, start: datetime | None, end: datetime | None) -> Energy:
    """The energy of a window's rows, by pool and phase, and over time: by hour, by UTC day past a month."""
    asked: dict[str, Any] = {"start": start, "end": end}
    counted = [*BOUNDARIES, *{meter for meters, _ in TOKENS.values() for meter in meters}, "gco2e"]
    filters = {"book": [BOOK], **where}
    rows = ledger.usage("pool", "phase", "meter", where={**filters, "meter": counted}, **asked).to_pylist()
    uses: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    tokens: dict[str, float] = defaultdict(float)
    serving: set[str] = set()
    grams: list[float] = []
    for row in rows:
        meter, amount = base_meter(row["meter"]), float(row["quantity"])
        if meter in BOUNDARIES:
            of = uses[row["pool"], row["phase"]]
            of[meter] = of.get(meter, 0.0) + amount
        elif meter == "gco2e":
            grams.append(amount)
        else:
            tokens[meter] += amount
            if amount:
                serving.add(row["pool"])
    series, step = _over_time(
        ledger.usage("hour", "pool", where={**filters, "meter": ["energy_kwh"]}, **asked)
    )
    return Energy(
        tuple(Use(pool, phase, kwh) for (pool, phase), kwh in sorted(uses.items())),
        dict(tokens),
        frozenset(serving),
        sum(grams) / GRAMS_PER_KILOGRAM if grams else None,
        series,
        step,
    )


def _over_time(rows: pa.Table) -> tuple[tuple[tuple[datetime, str, float], ...], str]:
    """kWh by hour and pool as points; by UTC day where there are too many hours to draw."""
    ends: Any = pc.min_max(rows["hour"]).as_py()
    step = "hour"
    if ends["min"] is not None and ends["max"] - ends["min"] > _DRAWN_DAYS * HOURS_PER_DAY * _HOUR:
        step = "day"
        days = rows.set_column(0, "hour", pc.floor_temporal(rows["hour"], unit="day"))
        sums = days.group_by(["hour", "pool"]).aggregate([("quantity", "sum")])
        rows = sums.rename_columns(["hour", "pool", "quantity"]).sort_by(
            [("hour", "ascending"), ("pool", "ascending")]
        )
    points = zip(*(rows[name].to_pylist() for name in ("hour", "pool", "quantity")), strict=True)
    return tuple((at.astimezone(UTC), str(pool), float(kwh)) for at, pool, kwh in points), step


@dataclass(frozen=True)
class Price:
    """The price of energy in an hour of the site's own day, under which band. USD per kWh of the first tier."""

    at: datetime
    local: str
    band: str
    usd_per_kwh: float
    now: bool = False


@dataclass(frozen=True)
class Peak:
    """A demand charge of the billing month so far.

    `metered_kw` and `at`: the highest hour within the charge's hours; `billed_kw` and `cost_usd`: as booked (a
    minimum or a ratchet may bill more than was metered). `more_kw` and `more_usd`: by how much the hour that is not
    over raises them already.
    """

    charge: str
    metered_kw: float
    at: datetime | None
    local: str
    billed_kw: float
    cost_usd: float
    more_kw: float = 0.0
    more_usd: float = 0.0


@dataclass(frozen=True)
class SiteFacts:
    """What is of a site and of no tenant. `problem`: why its prices cannot be told."""

    name: str
    timezone: str
    stated_pue: float
    pools: tuple[str, ...]
    carbon_g_per_kwh: float = 0.0
    tariff: str = ""
    tiers: int = 1
    prices: tuple[Price, ...] = ()
    month: str = ""
    peaks: tuple[Peak, ...] = ()
    problem: str = ""


def site_facts(ledger: Ledger, fleet: RunningFleet, so_far: SoFar, now: datetime) -> tuple[SiteFacts, ...]:
    """Every site's tariff today and its demand peaks of the billing month so far."""
    found = []
    for name, site in fleet.at(now).sites.items():
        pools = tuple(p for p, pool in fleet.pools.items() if pool.site == name)
        paying = [p for p in pools if pays_for_energy(fleet.pools[p])]
        plain: dict[str, Any] = {
            "name": name, "timezone": site.timezone, "stated_pue": site.pue, "pools": pools,
            "carbon_g_per_kwh": site.carbon_g_per_kwh or 0.0,
        }  # fmt: skip
        try:
            today = month_tariff(fleet, name, _local_day(site.timezone, now))
        except InputError as error:
            found.append(SiteFacts(**plain, problem=str(error)))
            continue
        if today is None:
            found.append(SiteFacts(**plain))
            continue
        month = months_of(site, so_far.hour, so_far.hour + _HOUR)[0]
        peaks = _peaks(ledger, fleet, name, paying, month, so_far) if today.tariff.demand and paying else ()
        local = month[0].astimezone(ZoneInfo(site.timezone))
        found.append(
            SiteFacts(
                **plain,
                tariff=today.tariff.name,
                tiers=today.tariff.tiers,
                prices=tuple(_prices(today, site.timezone, now)),
                month=f"{local:%Y-%m}",
                peaks=peaks,
            )
        )
    return tuple(found)


def _local_day(timezone: str, now: datetime) -> tuple[datetime, datetime]:
    """The UTC hours of the site's own day: 23, 24 or 25 of them."""
    zone = ZoneInfo(timezone)
    day = now.astimezone(zone).date()
    starts = [datetime(d.year, d.month, d.day, tzinfo=zone) for d in (day, day + timedelta(days=1))]
    first, last = (s.astimezone(UTC).replace(minute=0) for s in starts)
    return first, last


def _prices(tariff: TariffHours, timezone: str, now: datetime) -> Iterable[Price]:
    zone = ZoneInfo(timezone)
    current = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    for at, hour in enumerate(tariff.hours_utc.astype("datetime64[s]").tolist()):
        moment = hour.replace(tzinfo=UTC)
        bands = tariff.tariff.energy
        band = bands[int(tariff.band[at])].name if bands and tariff.tariff.hourly is None else "hourly price"
        price = float(tariff.energy_usd_per_kwh[0, at])
        yield Price(moment, f"{moment.astimezone(zone):%H:%M}", band, price, moment == current)


def _peaks(
    ledger: Ledger, fleet: RunningFleet, site: str, pools: list[str], month: Month, so_far: SoFar
) -> tuple[Peak, ...]:
    tariff = month_tariff(fleet, site, month)
    if tariff is None:
        return ()
    where = {"book": BOOK, "pool": pools, "meter": "energy_kwh"}
    rows = ledger.usage("hour", where=where, start=month[0], end=so_far.hour).to_pylist()
    rows += so_far.ledger.usage("hour", where=where, start=so_far.hour).to_pylist()
    hours = hours_between(*month)
    load_kw = np.zeros(len(hours))
    for row in rows:
        if row["quantity"] is not None:
            load_kw[round((row["hour"] - month[0]) / _HOUR)] += float(row["quantity"])
    booked, more = (_billed(of, site, month[0]) for of in (ledger, so_far.ledger))
    zone = ZoneInfo(fleet.sites[site].timezone)
    found = []
    for charge in tariff.demand:
        counted = np.flatnonzero(charge.mask)
        if not len(counted):
            continue
        at = int(counted[np.argmax(load_kw[counted])])
        moment = month[0] + at * _HOUR if load_kw[at] else None
        (kw, usd), (more_kw, more_usd) = (_priced(of, charge) for of in (booked, more))
        local = f"{moment.astimezone(zone):%Y-%m-%d %H:%M}" if moment else ""
        found.append(Peak(charge.name, float(load_kw[at]), moment, local, kw, usd, more_kw, more_usd))
    return tuple(found)


def _billed(ledger: Ledger, site: str, first: datetime) -> dict[str, float]:
    """Billed kW of a month by meter: a charge and its tier."""
    where = {"book": BOOK, "pool": site_pool(site), "meter": "peak_kw"}
    rows = ledger.usage("meter", where=where, start=first, end=first + _HOUR).to_pylist()
    return {row["meter"]: float(row["quantity"]) for row in rows}


def _priced(billed: Mapping[str, float], charge: DemandHours) -> tuple[float, float]:
    """kW of a charge over its tiers, and what they cost [USD]."""
    from pertoken.rates.site import peak_meter

    kw = [billed.get(peak_meter(charge.name, tier), 0.0) for tier in range(len(charge.usd_per_kw))]
    return sum(kw), sum(part * float(charge.usd_per_kw[tier, 0]) for tier, part in enumerate(kw))
