"""URDB v8 JSON, as OpenEI publishes it, read into a `Tariff`; what we cannot bill rightly is an error,
never a guess."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pertoken.catalog.tariffs import (
    ALL_MONTHS,
    GAP,
    Demand,
    EnergyBand,
    Ratchet,
    Schedule,
    Tariff,
    Tier,
    TierUnit,
    check_schedule,
    tariffs,
)
from pertoken.errors import InputError
from pertoken.units import DAYS_PER_YEAR, HOURS_PER_DAY, MONTHS_PER_YEAR

_ENERGY_UNITS: dict[str, TierUnit] = {"kwh": "kWh", "kwh daily": "kWh daily", "kwh/kw": "kWh/kW"}
_PERCENT = 100
_NEEDED = ("energyratestructure", "energyweekdayschedule", "energyweekendschedule")


def read(path: Path, *, label: str, timezone: str, coincident: str) -> Tariff:
    """See `pertoken.catalog.tariffs.tariff_from_urdb`."""
    if coincident not in ("error", "band"):
        raise InputError(f"coincident={coincident!r} is neither error nor band")
    item = _item(path, label)
    where = f"{path.name}: tariff {item.get('name', item.get('label', '?'))!r}"
    _refuse(item, where)
    energy, tier_unit = _energy(item, where)
    weekday, weekend = _schedules(item, "energy", len(energy), where)
    fixed_month, fixed_day = _fixed(item, where)
    zone = timezone or _timezone(str(item.get("utility", "")), where)
    low, high = item.get("peakkwcapacitymin", item.get("mindemand")), item.get("peakkwcapacitymax")
    return Tariff(
        name=str(item.get("name") or path.stem),
        utility=str(item.get("utility", "")),
        timezone=zone,
        energy=energy,
        weekday=weekday,
        weekend=weekend,
        demand=_demand(item, where, coincident),
        fixed_usd_per_month=fixed_month,
        fixed_usd_per_day=fixed_day,
        tier_unit=tier_unit,
        tiers_by="band",
        adjustment_usd_per_kwh=_monthly(item.get("fueladjustmentsmonthly"), where, "fueladjustmentsmonthly"),
        eligible_kw=(float(low or 0.0), float(high) if high else math.inf),
        demand_window_min=float(item.get("demandwindow") or 15.0),
        about=str(item.get("sector", "")),
        sources=tuple(
            str(s) for s in (item.get("source") or item.get("sourcereference"), item.get("uri")) if s
        ),
        effective=_date(item.get("startdate")),
        note=_note(item),
    )


def _item(path: Path, label: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a URDB file: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    items = data.get("items", [data]) if isinstance(data, dict) else data
    if not isinstance(items, list) or not items or not all(isinstance(i, dict) for i in items):
        raise InputError(f"{path}: holds no URDB tariff (an `items` list, or one item)")
    found = [i for i in items if not label or i.get("label") == label]
    if len(found) != 1:
        labels = ", ".join(f"{i.get('label')} ({i.get('name')})" for i in items[:5])
        raise InputError(f"{path}: {len(found)} tariffs match label {label!r}; choose one of: {labels}")
    # The published spelling of a few fields differs in case from file to file (flatDemandUnits,
    # flatdemandunit).
    return {str(key).lower(): value for key, value in found[0].items()}


def _refuse(item: Mapping[str, Any], where: str) -> None:
    """Raise on what would make a bill silently wrong."""
    for field in _NEEDED:
        if not item.get(field):
            raise InputError(f"{where}: {field} is missing")
    for field in ("demandunits", "demandunit", "demandrateunit", "flatdemandunit", "flatdemandunits"):
        unit = item.get(field)
        if unit and str(unit).lower() != "kw":
            raise InputError(f"{where}: {field} {unit!r} cannot be billed; only kW can")
    currency = item.get("currency") or "USD"
    if currency not in ("USD", "$"):
        raise InputError(f"{where}: currency {currency!r} cannot be billed; only USD can")
    if item.get("annualmincharge"):
        raise InputError(
            f"{where}: annualmincharge cannot be billed; delete it if the bills are always above it"
        )
    minimum = _number(item.get("mincharge") or 0.0, where, "mincharge")
    unit = str(item.get("minchargeunits") or "$/month")
    months = {"$/month": 1.0, "$/day": DAYS_PER_YEAR / MONTHS_PER_YEAR, "$/year": 1.0 / MONTHS_PER_YEAR}
    if minimum and unit not in months:
        raise InputError(f"{where}: minchargeunits {unit!r} is none of {', '.join(months)}")
    fixed_month, fixed_day = _fixed(item, where)
    fixed = fixed_month + fixed_day * DAYS_PER_YEAR / MONTHS_PER_YEAR
    if minimum and minimum * months[unit] > fixed:
        raise InputError(
            f"{where}: mincharge {minimum:g} {unit} is above the fixed charge and cannot be billed; "
            "delete the field if the bill is always above it"
        )


def _energy(item: Mapping[str, Any], where: str) -> tuple[tuple[EnergyBand, ...], TierUnit]:
    bands, units = [], set()
    for index, tiers in enumerate(item["energyratestructure"]):
        for tier in tiers if isinstance(tiers, list) else []:
            if len(tiers) > 1 or tier.get("max") is not None:
                units.add(str(tier.get("unit", "kWh")))
        bands.append(EnergyBand(f"period{index}", _tiers(tiers, where, f"energyratestructure[{index}]")))
    unknown = sorted(u for u in units if u.lower() not in _ENERGY_UNITS)
    if unknown or len(units) > 1:
        raise InputError(
            f"{where}: energyratestructure counts tiers in {', '.join(unknown or sorted(units))}; "
            f"one of {', '.join(_ENERGY_UNITS.values())} can be billed"
        )
    return tuple(bands), _ENERGY_UNITS[units.pop().lower()] if units else "kWh"


def _tiers(tiers: Any, where: str, field: str) -> tuple[Tier, ...]:
    if not isinstance(tiers, list) or not tiers:
        raise InputError(f"{where}: {field} holds no tiers")
    result = []
    for number, tier in enumerate(tiers):
        at = f"{field}[{number}]"
        if not isinstance(tier, dict):
            raise InputError(f"{where}: {at} is no tier")
        price = _number(tier.get("rate") or 0.0, where, f"{at}.rate") + _number(
            tier.get("adj") or 0.0, where, f"{at}.adj"
        )
        last = number == len(tiers) - 1
        limit = tier.get("max")
        if limit is None and not last:
            raise InputError(f"{where}: {at}.max is missing, and another tier follows")
        # The last tier has no end in a bill, even where the record gives one.
        result.append(Tier(price, math.inf if last else _number(limit, where, f"{at}.max")))
    limits = [t.upper for t in result]
    if limits != sorted(set(limits)):
        raise InputError(f"{where}: tiers of {field} do not rise")
    return tuple(result)


def _schedules(item: Mapping[str, Any], kind: str, bands: int, where: str) -> tuple[Schedule, Schedule]:
    result = []
    for day in ("weekday", "weekend"):
        field = f"{kind}{day}schedule"
        rows = item.get(field)
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise InputError(f"{where}: {field} is missing or no table of 12 months × 24 hours")
        schedule = tuple(
            tuple(GAP if v is None else int(_number(v, where, field)) for v in row) for row in rows
        )
        check_schedule(schedule, bands, where=f"{where}: {kind} schedule", day_type=day)
        result.append(schedule)
    return result[0], result[1]


def _demand(item: Mapping[str, Any], where: str, coincident: str) -> tuple[Demand, ...]:
    ratchet = _ratchet(item, where)
    charges = []
    structure = item.get("flatdemandstructure") or []
    if structure:
        months = item.get("flatdemandmonths")
        if not isinstance(months, list) or len(months) != MONTHS_PER_YEAR:
            raise InputError(f"{where}: flatdemandmonths needs 12 entries")
        schedule = tuple((int(_number(m, where, "flatdemandmonths")),) * HOURS_PER_DAY for m in months)
        check_schedule(schedule, len(structure), where=f"{where}: flatdemandmonths", day_type="all days")
        charges += _bands(structure, schedule, schedule, "flat", "flatdemandstructure", where, ratchet)
    for kind, prefix in (("demand", "tou"), ("coincident", "coincident")):
        structure = item.get(f"{kind}ratestructure") or []
        if not any(t.get("rate") or t.get("adj") for tiers in structure for t in tiers):
            continue
        if kind == "coincident" and coincident == "error":
            raise InputError(
                f"{where}: coincidentratestructure bills demand at the utility's own peak hour, unknown "
                "ahead; ask for coincident='band' to bill the highest demand of its window (an upper bound)"
            )
        if kind == "coincident":
            weekday = weekend = _schedules_of_coincident(item, len(structure), where)
        else:
            weekday, weekend = _schedules(item, kind, len(structure), where)
        charges += _bands(structure, weekday, weekend, prefix, f"{kind}ratestructure", where, ratchet)
    return tuple(charges)


def _schedules_of_coincident(item: Mapping[str, Any], bands: int, where: str) -> Schedule:
    rows = item.get("coincidentrateschedule")
    if not isinstance(rows, list):
        raise InputError(f"{where}: coincidentrateschedule is missing")
    schedule = tuple(tuple(int(v) for v in row) for row in rows)
    check_schedule(schedule, bands, where=f"{where}: coincidentrateschedule", day_type="all days")
    return schedule


def _bands(
    structure: Any,
    weekday: Schedule,
    weekend: Schedule,
    prefix: str,
    field: str,
    where: str,
    ratchet: Ratchet | None,
) -> list[Demand]:
    """One demand charge per period that costs anything and has hours."""
    result = []
    for index, tiers in enumerate(structure):
        rows = _tiers(tiers, where, f"{field}[{index}]")
        on_weekday, on_weekend = (
            tuple(tuple(int(v == index) for v in row) for row in schedule) for schedule in (weekday, weekend)
        )
        if any(t.usd_per_unit for t in rows) and any(map(any, (*on_weekday, *on_weekend))):
            name = prefix if prefix == "flat" and len(structure) == 1 else f"{prefix}{index}"
            result.append(Demand(name, rows, on_weekday, on_weekend, ratchet))
    return result


def _ratchet(item: Mapping[str, Any], where: str) -> Ratchet | None:
    """`demandratchetpercentage` (12 months) or `lookbackpercent` over `lookbackmonths` or `lookbackrange`."""
    by_month = _monthly(item.get("demandratchetpercentage"), where, "demandratchetpercentage")
    look = _number(item.get("lookbackpercent") or 0.0, where, "lookbackpercent")
    if any(by_month) and look:
        raise InputError(f"{where}: demandratchetpercentage and lookbackpercent are both given; keep one")
    if any(by_month):
        shares = {_share(v) for v in by_month if v}
        if len(shares) > 1:
            raise InputError(
                f"{where}: demandratchetpercentage differs by month; one percentage can be billed"
            )
        return Ratchet(shares.pop(), 11, in_months=tuple(m for m, v in enumerate(by_month, 1) if v))
    if look:
        marked = item.get("lookbackmonths") or []
        of_months = tuple(m for m, on in enumerate(marked, 1) if on) or ALL_MONTHS
        return Ratchet(_share(look), int(item.get("lookbackrange") or 0) or 11, of_months=of_months)
    return None


def _share(value: float) -> float:
    """Both 0.8 and 80 are found for 80 %; a ratchet above 1 makes no sense, so the two cannot be confused."""
    return value / _PERCENT if value > 1 else value


def _fixed(item: Mapping[str, Any], where: str) -> tuple[float, float]:
    """(USD per month, USD per day)."""
    old = item.get("fixedmonthlycharge")  # its name before version 4
    charge = _number(item.get("fixedchargefirstmeter") or old or 0.0, where, "fixedchargefirstmeter")
    unit = str(item.get("fixedchargeunits") or "$/month")
    if unit == "$/month":
        return charge, 0.0
    if unit == "$/day":
        return 0.0, charge
    if unit == "$/year":
        return charge / MONTHS_PER_YEAR, 0.0
    raise InputError(f"{where}: fixedchargeunits {unit!r} is none of $/month, $/day, $/year")


def _timezone(utility: str, where: str) -> str:
    """The zone of a utility the catalogue knows; URDB itself has none."""
    for known in tariffs().values():
        if known.utility.lower() == utility.lower():
            return known.timezone
    raise InputError(f"{where}: URDB gives no time zone; pass timezone='America/...' for utility {utility!r}")


def _monthly(value: Any, where: str, field: str) -> tuple[float, ...]:
    if not value:
        return (0.0,) * MONTHS_PER_YEAR
    if not isinstance(value, list) or len(value) != MONTHS_PER_YEAR:
        raise InputError(f"{where}: {field} needs 12 numbers")
    return tuple(_number(v or 0.0, where, field) for v in value)


def _date(value: Any) -> str:
    if isinstance(value, int | float):
        # Midnight in the recorder's own zone: the nearest UTC day is the one meant.
        noon = dt.timedelta(hours=HOURS_PER_DAY // 2)
        return (dt.datetime.fromtimestamp(value, tz=dt.UTC) + noon).date().isoformat()
    return str(value or "")


def _note(item: Mapping[str, Any]) -> str:
    notes = ["read from a URDB record; holidays are not in it"]
    if item.get("demandreactivepowercharge"):
        notes.append("reactive power charge not billed (power factor near 1 assumed)")
    return "; ".join(notes)


def _number(value: Any, where: str, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where}: {field} must be a number, found {value!r}")
    return float(value)
