"""Reading our own tariff rows (YAML) and hourly price series (CSV)."""

from __future__ import annotations

import csv
import datetime as dt
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np

from pertoken.catalog.holidays import HOLIDAY_SETS, HOLIDAYS
from pertoken.catalog.tariffs import (
    GAP,
    MONTH_NAMES,
    Demand,
    EnergyBand,
    Hourly,
    Ratchet,
    Schedule,
    Tariff,
    Tier,
    check_schedule,
)
from pertoken.errors import InputError, nearest
from pertoken.units import HOURS_PER_DAY, MONTHS_PER_YEAR, WATTS_PER_KILOWATT

KWH_PER_MWH = WATTS_PER_KILOWATT  # the same step of a thousand
_ROW_FIELDS = {
    "name", "utility", "timezone", "about", "energy", "demand", "fixed_usd_per_month", "fixed_usd_per_day",
    "tier_unit", "tiers_by", "adjustment_usd_per_kwh", "holidays", "holidays_observed", "eligible_kw",
    "demand_window_min", "sources", "effective", "checked", "note",
}  # fmt: skip
_BAND_FIELDS = {"name", "usd_per_kwh", "tiers", "windows"}
_DEMAND_FIELDS = {"name", "usd_per_kw", "tiers", "windows", "ratchet", "minimum_kw"}
_WINDOW_FIELDS = {"months", "days", "hours"}
_RATCHET_FIELDS = {"fraction", "months", "of_months", "in_months", "peaks"}


def tariffs_from_text(text: str, file: str) -> dict[str, Tariff]:
    """Tariffs of a YAML text by name. Raises InputError naming the file, the row and the field."""
    import yaml

    try:
        rows = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        at = f", line {line + 1}" if line is not None else ""
        raise InputError(f"{file}{at}: not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{file}: expected a list of tariffs, each beginning with `- name:`")
    result: dict[str, Tariff] = {}
    for number, row in enumerate(rows, 1):
        tariff = _tariff(row, f"{file}: tariff {number}")
        if tariff.name in result:
            raise InputError(f"{file}: tariff {tariff.name!r} is given twice")
        result[tariff.name] = tariff
    return result


def _tariff(row: Any, where: str) -> Tariff:
    _fields(
        row, _ROW_FIELDS, {"name", "utility", "timezone", "energy", "sources", "effective", "checked"}, where
    )
    where = f"{where} ({row['name']})"
    _zone(row["timezone"], where)
    weekday, weekend, energy = _energy(row["energy"], where)
    tier_unit = row.get("tier_unit", "kWh")
    if tier_unit not in ("kWh", "kWh daily", "kWh/kW"):
        raise InputError(f"{where}: tier_unit {tier_unit!r} is none of kWh, kWh daily, kWh/kW")
    tiers_by = row.get("tiers_by", "month")
    if tiers_by not in ("month", "band"):
        raise InputError(f"{where}: tiers_by {tiers_by!r} is neither month nor band")
    observed = row.get("holidays_observed", "none")
    if observed not in ("none", "monday"):
        raise InputError(f"{where}: holidays_observed {observed!r} is neither none nor monday")
    low, high = row.get("eligible_kw", [0, None])
    return Tariff(
        name=str(row["name"]),
        utility=str(row["utility"]),
        timezone=row["timezone"],
        energy=energy,
        weekday=weekday,
        weekend=weekend,
        demand=_demands(row.get("demand", []), where),
        fixed_usd_per_month=_number(row.get("fixed_usd_per_month", 0.0), where, "fixed_usd_per_month"),
        fixed_usd_per_day=_number(row.get("fixed_usd_per_day", 0.0), where, "fixed_usd_per_day"),
        tier_unit=tier_unit,
        tiers_by=tiers_by,
        adjustment_usd_per_kwh=_by_month(row.get("adjustment_usd_per_kwh", 0.0), where),
        holidays=_holidays(row.get("holidays", []), where),
        holidays_observed=observed,
        eligible_kw=(float(low), math.inf if high is None else float(high)),
        demand_window_min=_number(row.get("demand_window_min", 15.0), where, "demand_window_min"),
        about=str(row.get("about", "")),
        sources=tuple(row["sources"]),
        effective=str(row["effective"]),
        checked=str(row["checked"]),
        note=str(row.get("note", "")),
    )


def _energy(rows: Any, where: str) -> tuple[Schedule, Schedule, tuple[EnergyBand, ...]]:
    bands = []
    grid = {day: np.full((MONTHS_PER_YEAR, HOURS_PER_DAY), GAP) for day in ("weekday", "weekend")}
    for index, row in enumerate(rows):
        _fields(row, _BAND_FIELDS, {"name"}, f"{where}, energy band {index + 1}")
        at = f"{where}, energy band {row['name']}"
        bands.append(EnergyBand(str(row["name"]), _tiers(row, "usd_per_kwh", "up_to_kwh", at)))
        for day, mask in _masks(row.get("windows"), at).items():
            taken = mask & (grid[day] != GAP)
            if taken.any():
                month, hour = (int(i) for i in np.argwhere(taken)[0])
                other = bands[int(grid[day][month, hour])].name
                raise InputError(
                    f"{at}: {MONTH_NAMES[month]}, {day}, {hour:02d}:00-{hour + 1:02d}:00 "
                    f"is also in band {other}"
                )
            grid[day][mask] = index
    schedules = {day: tuple(tuple(int(i) for i in r) for r in g) for day, g in grid.items()}
    for day, schedule in schedules.items():
        check_schedule(schedule, len(bands), where=where, day_type=day)
    return schedules["weekday"], schedules["weekend"], tuple(bands)


def _demands(rows: Any, where: str) -> tuple[Demand, ...]:
    demands = []
    for number, row in enumerate(rows, 1):
        _fields(row, _DEMAND_FIELDS, {"name"}, f"{where}, demand charge {number}")
        at = f"{where}, demand charge {row['name']}"
        masks = _masks(row.get("windows"), at)
        demands.append(
            Demand(
                name=str(row["name"]),
                tiers=_tiers(row, "usd_per_kw", "up_to_kw", at),
                weekday=tuple(tuple(int(i) for i in r) for r in masks["weekday"]),
                weekend=tuple(tuple(int(i) for i in r) for r in masks["weekend"]),
                ratchet=_ratchet(row.get("ratchet"), at),
                minimum_kw=_number(row.get("minimum_kw", 0.0), at, "minimum_kw"),
            )
        )
    names = [d.name for d in demands]
    if len(set(names)) != len(names):
        raise InputError(f"{where}: two demand charges have the same name")
    return tuple(demands)


def _ratchet(row: Any, where: str) -> Ratchet | None:
    if row is None:
        return None
    _fields(row, _RATCHET_FIELDS, {"fraction", "months"}, f"{where}, ratchet")
    fraction = _number(row["fraction"], where, "ratchet fraction")
    if not 0 < fraction <= 1:
        raise InputError(f"{where}: ratchet fraction {fraction:g} is not between 0 and 1")
    peaks = row.get("peaks", "metered")
    if peaks not in ("metered", "billed"):
        raise InputError(f"{where}: ratchet peaks {peaks!r} is neither metered nor billed")
    months = row["months"]
    if not isinstance(months, int) or months < 1:
        raise InputError(f"{where}: ratchet months must be a whole number of 1 or more, found {months!r}")
    return Ratchet(
        fraction=fraction,
        months=months,
        peaks=peaks,
        of_months=_span(row.get("of_months", "1-12"), 1, MONTHS_PER_YEAR, where, "of_months"),
        in_months=_span(row.get("in_months", "1-12"), 1, MONTHS_PER_YEAR, where, "in_months"),
    )


def _tiers(row: Mapping[str, Any], price: str, limit: str, where: str) -> tuple[Tier, ...]:
    if ("tiers" in row) == (price in row):
        raise InputError(f"{where}: give either {price} or tiers")
    if price in row:
        return (Tier(_number(row[price], where, price)),)
    tiers: list[Tier] = []
    for tier in row["tiers"]:
        _fields(tier, {price, limit}, {price}, f"{where}, tier {len(tiers) + 1}")
        upper = _number(tier[limit], where, limit) if limit in tier else math.inf
        tiers.append(Tier(_number(tier[price], where, price), upper))
    limits = [t.upper for t in tiers]
    if limits != sorted(set(limits)) or not math.isinf(limits[-1]):
        raise InputError(f"{where}: tiers must rise and the last one must have no {limit}")
    return tuple(tiers)


def _masks(windows: Any, where: str) -> dict[str, np.ndarray[Any, np.dtype[np.bool_]]]:
    masks = {day: np.zeros((MONTHS_PER_YEAR, HOURS_PER_DAY), dtype=bool) for day in ("weekday", "weekend")}
    for window in [{}] if windows is None else windows:
        _fields(window, _WINDOW_FIELDS, set(), f"{where}, window")
        months = _span(window.get("months", "1-12"), 1, MONTHS_PER_YEAR, where, "months")
        days = window.get("days", "all")
        if days not in ("all", "weekday", "weekend"):
            raise InputError(f"{where}: days {days!r} is none of all, weekday, weekend")
        hours = _hours(window.get("hours", "0-24"), where)
        for day in ("weekday", "weekend") if days == "all" else (days,):
            masks[day][np.ix_([m - 1 for m in months], hours)] = True
    return masks


def _span(text: Any, low: int, high: int, where: str, field: str) -> tuple[int, ...]:
    """Whole numbers of ``6-9``, ``10-5`` (over the end of the year) or ``1,3,6-8``, both ends included."""
    result: list[int] = []
    for part in str(text).split(","):
        first, _, last = part.strip().partition("-")
        try:
            a, b = int(first), int(last or first)
        except ValueError as error:
            raise InputError(f"{where}: {field} {text!r} is not like 6-9 or 1,3") from error
        if not (low <= a <= high and low <= b <= high):
            raise InputError(f"{where}: {field} {text!r} is outside {low}-{high}")
        result += list(range(a, b + 1)) if a <= b else [*range(a, high + 1), *range(low, b + 1)]
    return tuple(sorted(set(result)))


def _hours(text: Any, where: str) -> list[int]:
    """Hours that begin within ``16-21`` (16:00 to 21:00) or ``0-16,21-24``; over midnight: ``22-6``."""
    result: list[int] = []
    for part in str(text).split(","):
        first, _, last = part.strip().partition("-")
        try:
            a, b = int(first), int(last)
        except ValueError as error:
            raise InputError(f"{where}: hours {text!r} is not like 16-21 or 0-16,21-24") from error
        if not (0 <= a < HOURS_PER_DAY and 0 <= b <= HOURS_PER_DAY) or a == b:
            raise InputError(f"{where}: hours {text!r} is not within 0-24")
        result += list(range(a, b)) if a < b else [*range(a, HOURS_PER_DAY), *range(b)]
    return sorted(set(result))


def _by_month(value: Any, where: str) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value] * MONTHS_PER_YEAR
    if len(values) != MONTHS_PER_YEAR:
        raise InputError(f"{where}: adjustment_usd_per_kwh needs one number or twelve, found {len(values)}")
    return tuple(_number(v, where, "adjustment_usd_per_kwh") for v in values)


def _holidays(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, str):
        if value not in HOLIDAY_SETS:
            raise InputError(f"{where}: holidays {value!r} is none of {', '.join(HOLIDAY_SETS)}")
        return HOLIDAY_SETS[value]
    for name in value:
        if name not in HOLIDAYS:
            near = nearest(str(name), HOLIDAYS) or HOLIDAYS
            raise InputError(f"{where}: unknown holiday {name!r}: did you mean {', '.join(near)}?")
    return tuple(value)


def _zone(name: Any, where: str) -> None:
    try:
        ZoneInfo(str(name))
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InputError(f"{where}: timezone {name!r} is no IANA time zone such as America/Denver") from error


def _fields(row: Any, known: set[str], needed: set[str], where: str) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected fields, found {str(row)[:40]!r}")
    for field in row:
        if field not in known:
            near = nearest(str(field), known) or sorted(known)
            raise InputError(f"{where}: unknown field {field!r}: did you mean {', '.join(near)}?")
    missing = sorted(needed - set(row))
    if missing:
        raise InputError(f"{where}: missing {', '.join(missing)}")


def _number(value: Any, where: str, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where}: {field} must be a number, found {value!r}")
    return float(value)


_TIME_COLUMNS = ("hour_utc", "Datetime (UTC)")
_PRICE_COLUMNS = {"usd_per_kwh": 1.0, "Price (USD/MWh)": 1.0 / KWH_PER_MWH, "usd_per_mwh": 1.0 / KWH_PER_MWH}


def hourly_from_csv(path: Path, repeat: bool) -> Hourly:
    """The hourly series of a CSV file; see `tariff_from_csv`."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return _series(csv.reader(file), str(path), repeat)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a price series: {error}") from error


def _series(lines: Any, file: str, repeat: bool) -> Hourly:
    header: list[str] = next(lines, [])
    time_at = next((header.index(c) for c in _TIME_COLUMNS if c in header), None)
    price_name = next((c for c in _PRICE_COLUMNS if c in header), None)
    if time_at is None or price_name is None:
        raise InputError(
            f"{file}, line 1: needs a column of {' or '.join(_TIME_COLUMNS)} and one of "
            f"{' or '.join(_PRICE_COLUMNS)}; found {', '.join(header)[:80] or 'nothing'}"
        )
    price_at = header.index(price_name)
    previous: dt.datetime | None = None
    start: dt.datetime | None = None
    prices: list[float] = []
    for cells in lines:
        if not cells:
            continue
        at = f"{file}, line {lines.line_num}"
        try:
            hour = dt.datetime.fromisoformat(cells[time_at].strip())
            price = float(cells[price_at])
        except (ValueError, IndexError) as error:
            raise InputError(f"{at}: expected an hour and a price, found {','.join(cells)[:60]!r}") from error
        hour = hour.replace(tzinfo=dt.UTC) if hour.tzinfo is None else hour.astimezone(dt.UTC)
        if not math.isfinite(price):
            raise InputError(f"{at}: price {cells[price_at]!r} is not a finite number")
        if hour.minute or hour.second or hour.microsecond:
            raise InputError(f"{at}: {cells[time_at]} is not a full UTC hour")
        if previous is not None:
            _follows(previous, hour, at)
        start = start or hour
        previous = hour
        prices.append(price * _PRICE_COLUMNS[price_name])
    if start is None:
        raise InputError(f"{file}: holds no hours")
    return Hourly(np.datetime64(start.replace(tzinfo=None), "h"), np.array(prices), repeat)


def _follows(previous: dt.datetime, hour: dt.datetime, at: str) -> None:
    step = hour - previous
    if step == dt.timedelta(hours=1):
        return
    if not step:
        raise InputError(f"{at}: duplicate hour {hour:%Y-%m-%d %H:%M} UTC")
    if step < dt.timedelta(0):
        raise InputError(
            f"{at}: not sorted: {hour:%Y-%m-%d %H:%M} UTC comes after {previous:%Y-%m-%d %H:%M} UTC"
        )
    missing = int(step / dt.timedelta(hours=1)) - 1
    raise InputError(f"{at}: gap of {missing} hour{'s' * (missing > 1)} after {previous:%Y-%m-%d %H:%M} UTC")
