from __future__ import annotations

import datetime as dt
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pertoken.catalog._tariff_rows import tariffs_from_text
from pertoken.catalog.holidays import holiday_dates
from pertoken.catalog.tariffs import (
    Tariff,
    flat_tariff,
    tariff,
    tariff_from_csv,
    tariff_from_urdb,
    tariffs,
)
from pertoken.errors import InputError, UnknownNameError

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"


def test_at_least_eight_rows_with_source_and_dates() -> None:
    rows = tariffs()
    assert len(rows) >= 8
    for row in rows.values():
        assert row.sources, row.name
        assert row.effective, row.name
        dt.date.fromisoformat(row.checked)
        assert row.currency == "USD"
        if len(row.sources) < 2:
            assert "not re-verified" in row.note, row.name


def test_every_kind_of_tariff_is_shipped() -> None:
    rows = list(tariffs().values())
    assert any(len(r.energy) == 1 and r.tiers == 1 for r in rows)  # flat
    assert any(r.tiers > 1 for r in rows)
    assert any(len(d.tiers) > 1 for r in rows for d in r.demand)
    assert any(d.ratchet for r in rows for d in r.demand)
    assert any(len(r.demand) > 1 for r in rows)


def _cheapest_at_midday(row: Tariff) -> bool:
    prices = [[row.energy[b].tiers[0].usd_per_unit for b in month] for month in row.weekday]
    return any(month[12] < 0.9 * min(month[:6] + month[16:]) for month in prices)


def test_two_tariffs_have_cheap_midday_power() -> None:
    assert len([r for r in tariffs().values() if _cheapest_at_midday(r)]) >= 2


def test_names_in_any_spelling_and_nearest_on_a_miss() -> None:
    assert tariff("pnm-4b") is tariff("PNM 4B")
    with pytest.raises(UnknownNameError, match=r"unknown tariff 'SMUD CI-TOD5': did you mean SMUD CI-TOD4"):
        tariff("SMUD CI-TOD5")


def test_flat_tariff_refuses_what_is_no_price() -> None:
    with pytest.raises(InputError, match="must be a number"):
        flat_tariff(math.nan)
    with pytest.raises(InputError, match="must be a number"):
        flat_tariff(0.1, usd_per_kw_month=-1)


ROW = """
- name: test
  utility: nobody
  timezone: America/Denver
  energy:
    - {name: day, usd_per_kwh: 0.2, windows: [{hours: 8-20}]}
    - {name: night, usd_per_kwh: 0.1, windows: [{hours: 20-8}]}
  sources: [a test]
  effective: 2026-01-01
  checked: 2026-01-01
"""


def rows(text: str) -> dict[str, Tariff]:
    return tariffs_from_text(text, "tariffs.yaml")


def test_own_rows() -> None:
    row = rows(ROW)["test"]
    assert row.weekday[0] == (1,) * 8 + (0,) * 12 + (1,) * 4
    assert row.weekend == row.weekday


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("hours: 20-8", "hours: 21-8", r"no band covers January, weekday, 20:00-21:00"),
        ("hours: 20-8", "hours: 20-8, days: weekday", r"no band covers January, weekend, 00:00-01:00"),
        ("hours: 20-8", "hours: 19-8", r"band night: January, weekday, 19:00-20:00 is also in band day"),
        ("hours: 20-8", "hours: night", r"hours 'night' is not like 16-21"),
        ("hours: 20-8", "hours: 20-30", r"hours '20-30' is not within 0-24"),
        ("hours: 20-8", "hours: 20-8, months: 0-13", r"months '0-13' is outside 1-12"),
        ("hours: 20-8", "hours: 20-8, days: monday", r"days 'monday' is none of all, weekday, weekend"),
        ("usd_per_kwh: 0.1", "usd_per_kwh: .nan", r"usd_per_kwh must be a number, found nan"),
        ("usd_per_kwh: 0.1", "usd_per_kwh: cheap", r"usd_per_kwh must be a number, found 'cheap'"),
        ("usd_per_kwh: 0.1", "price: 0.1", r"unknown field 'price'"),
        (
            "timezone: America/Denver",
            "timezone: Mars/Olympus",
            r"timezone 'Mars/Olympus' is no IANA time zone",
        ),
        ("  timezone: America/Denver\n", "", r"missing timezone"),
        ("sources: [a test]", "holidays: [festivus]\n  sources: [a test]", r"unknown holiday 'festivus'"),
        ("sources: [a test]", "holidays: uk\n  sources: [a test]", r"holidays 'uk' is none of us-nerc"),
        ("sources: [a test]", "tier_unit: therm\n  sources: [a test]", r"tier_unit 'therm' is none of kWh"),
        (
            "sources: [a test]",
            "demand: [{name: d, usd_per_kw: 1, ratchet: {fraction: 1.5, months: 11}}]\n  sources: [a test]",
            r"ratchet fraction 1.5 is not between 0 and 1",
        ),
        (
            "sources: [a test]",
            "demand: [{name: d, tiers: [{usd_per_kw: 1}, {usd_per_kw: 2}]}]\n  sources: [a test]",
            r"tiers must rise",
        ),
        ("- name: test", "- name: [", r"line 3: not YAML|line 4: not YAML"),
    ],
)
def test_a_bad_row_is_one_clear_line(old: str, new: str, message: str) -> None:
    assert old in ROW
    with pytest.raises(InputError, match=message) as caught:
        rows(ROW.replace(old, new))
    assert "\n" not in str(caught.value)


def test_the_same_tariff_twice() -> None:
    with pytest.raises(InputError, match="'test' is given twice"):
        rows(ROW + ROW)


def test_garbage_is_no_tariff() -> None:
    for text in ("hello", "", "[]"):
        with pytest.raises(InputError, match="expected a list of tariffs"):
            rows(text)


# --- hourly series
# ---------------------------------------------------------------------------------------------


def _csv(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "prices.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_simple_hourly_series(tmp_path: Path) -> None:
    path = _csv(tmp_path, "hour_utc,usd_per_kwh\n2026-01-01T00:00,0.05\n2026-01-01T01:00,-0.01\n")
    series = tariff_from_csv(path, adder_usd_per_kwh=0.02).hourly
    assert series is not None
    assert series.start_utc == np.datetime64("2026-01-01T00")
    assert series.usd_per_kwh.tolist() == [0.05, -0.01]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["2026-01-01T00:00,1", "2026-01-01T02:00,1"], r"line 3: gap of 1 hour after 2026-01-01 00:00 UTC"),
        (["2026-01-01T00:00,1", "2026-01-01T00:00,1"], r"line 3: duplicate hour 2026-01-01 00:00 UTC"),
        (
            ["2026-01-01T03:00,1", "2026-01-01T02:00,1"],
            r"line 3: not sorted: 2026-01-01 02:00 UTC comes after",
        ),
        (["2026-01-01T00:30,1"], r"line 2: 2026-01-01T00:30 is not a full UTC hour"),
        (["2026-01-01T00:00,nan"], r"line 2: price 'nan' is not a finite number"),
        (["2026-01-01T00:00,free"], r"line 2: expected an hour and a price, found '2026-01-01T00:00,free'"),
        (["yesterday,1"], r"line 2: expected an hour and a price"),
        (["2026-01-01T00:00"], r"line 2: expected an hour and a price"),
        ([], r"holds no hours"),
    ],
)
def test_a_bad_series_names_the_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tariff_from_csv(_csv(tmp_path, "\n".join(["hour_utc,usd_per_kwh", *lines]) + "\n"))


def test_a_series_without_the_columns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 1: needs a column of hour_utc or Datetime \(UTC\)"):
        tariff_from_csv(_csv(tmp_path, "when,price\n"))
    with pytest.raises(InputError, match="cannot be read"):
        tariff_from_csv(tmp_path / "absent.csv")


@pytest.mark.parametrize("zone", ["US-CAL-CISO", "US-TEX-ERCO", "DE-LU"])
def test_published_wholesale_series(zone: str) -> None:
    path = DATA / "electricity" / f"{zone}_electricity_prices_2024.csv"
    if not path.exists():
        pytest.skip("shared/data is absent: no wholesale series to read")
    series = tariff_from_csv(path).hourly
    assert series is not None
    assert len(series.usd_per_kwh) == 366 * 24
    assert -1 < series.usd_per_kwh.mean() < 0.2


# --- URDB
# ------------------------------------------------------------------------------------------------------


def _urdb(**changes: Any) -> dict[str, Any]:
    zero = [[0] * 24 for _ in range(12)]
    item: dict[str, Any] = {
        "label": "abc",
        "utility": "Test",
        "name": "T",
        "startdate": 1727737200,
        "energyratestructure": [[{"rate": 0.10, "adj": 0.01, "unit": "kWh"}]],
        "energyweekdayschedule": zero,
        "energyweekendschedule": zero,
    }
    item.update(changes)
    return item


def _write(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "rate.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def _read(tmp_path: Path, item: Any, **options: Any) -> Tariff:
    return tariff_from_urdb(_write(tmp_path, item), timezone="America/Chicago", **options)


def test_smud_as_published() -> None:
    path = DATA / "tariffs" / "urdb_sample_SMUD_CI-TOD4.json"
    if not path.exists():
        pytest.skip("shared/data is absent: no URDB file to read")
    row = tariff_from_urdb(path)
    own = tariff("SMUD CI-TOD4")
    assert row.timezone == "America/Los_Angeles"  # from the catalogue's row of the same utility
    assert row.effective == own.effective
    assert row.eligible_kw == (1000.0, math.inf)
    assert [d.name for d in row.demand] == ["flat", "tou1"]
    # Same prices on weekdays; the record's weekends are not the published ones (see the row's note).
    for month in range(12):
        for hour in range(24):
            theirs = row.energy[row.weekday[month][hour]].tiers[0].usd_per_unit
            ours = (
                own.energy[own.weekday[month][hour]].tiers[0].usd_per_unit + own.adjustment_usd_per_kwh[month]
            )
            assert theirs == pytest.approx(ours)
    assert row.demand[1].weekday == own.demand[1].weekday


def test_urdb_single_item_list_of_items_and_label(tmp_path: Path) -> None:
    assert _read(tmp_path, _urdb()).energy[0].tiers[0].usd_per_unit == pytest.approx(0.11)
    both = {"items": [_urdb(), _urdb(label="def", name="U")]}
    assert _read(tmp_path, both, label="def").name == "U"
    with pytest.raises(InputError, match=r"2 tariffs match label ''; choose one of: abc \(T\), def \(U\)"):
        _read(tmp_path, both)


def test_urdb_date_is_the_day_meant(tmp_path: Path) -> None:
    assert _read(tmp_path, _urdb()).effective == "2024-10-01"  # 2024-09-30 23:00 UTC


def test_urdb_tiers_ratchet_fixed_and_fuel(tmp_path: Path) -> None:
    row = _read(
        tmp_path,
        _urdb(
            energyratestructure=[
                [{"rate": 0.1, "max": 200, "unit": "kWh/kW"}, {"rate": 0.05, "unit": "kWh/kW"}]
            ],
            flatdemandstructure=[[{"rate": 5.0, "max": 100}, {"rate": 4.0}], [{"rate": 7.0}]],
            flatdemandmonths=[0] * 6 + [1] * 6,
            demandratchetpercentage=[0.8] * 12,
            fixedchargefirstmeter=2.0,
            fixedchargeunits="$/day",
            fueladjustmentsmonthly=[0.01] * 12,
            flatDemandUnits="kW",
        ),
    )
    assert row.tier_unit == "kWh/kW"
    assert row.energy[0].tiers[0].upper == 200
    assert [d.name for d in row.demand] == ["flat0", "flat1"]
    assert row.demand[0].tiers[0].upper == 100
    assert row.demand[0].ratchet is not None
    assert row.demand[0].ratchet.fraction == 0.8
    assert row.fixed_usd_per_day == 2.0
    assert row.adjustment_usd_per_kwh == (0.01,) * 12


def test_urdb_lookback(tmp_path: Path) -> None:
    summer = [5 <= m <= 8 for m in range(12)]
    row = _read(
        tmp_path,
        _urdb(
            flatdemandstructure=[[{"rate": 5.0}]],
            flatdemandmonths=[0] * 12,
            lookbackpercent=80,
            lookbackmonths=summer,
        ),
    )
    ratchet = row.demand[0].ratchet
    assert ratchet is not None
    assert (ratchet.fraction, ratchet.of_months, ratchet.months) == (0.8, (6, 7, 8, 9), 11)


COINCIDENT = {
    "coincidentratestructure": [[{"rate": 0.0}], [{"rate": 9.0}]],
    "coincidentrateschedule": [[0] * 16 + [1] * 4 + [0] * 4 for _ in range(12)],
}


def test_urdb_coincident_demand_only_when_asked(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="coincidentratestructure bills demand at the utility's own peak hour"
    ):
        _read(tmp_path, _urdb(**COINCIDENT))
    row = _read(tmp_path, _urdb(**COINCIDENT), coincident="band")
    assert [d.name for d in row.demand] == ["coincident1"]
    assert row.demand[0].weekend[0][16] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"energyratestructure": [[{"rate": 1, "max": 5, "unit": "kWh/kW daily"}, {"rate": 2}]]},
            "kWh/kW daily",
        ),
        (
            {"energyratestructure": [[{"rate": 1, "max": 5}, {"rate": 2, "unit": "kWh daily"}]]},
            "counts tiers in",
        ),
        (
            {"energyratestructure": [[{"rate": 1, "max": 9}, {"rate": 2, "max": 5}, {"rate": 3}]]},
            "do not rise",
        ),
        ({"energyratestructure": [[{"rate": 1}, {"rate": 2}]]}, r"\[0\]\.max is missing"),
        ({"energyratestructure": [[{"rate": "x"}]]}, "rate must be a number"),
        ({"energyratestructure": []}, "energyratestructure is missing"),
        ({"energyratestructure": [[]]}, "holds no tiers"),
        ({"demandrateunit": "kVA"}, "demandrateunit 'kVA' cannot be billed"),
        ({"flatdemandunit": "kW daily"}, "flatdemandunit 'kW daily' cannot be billed"),
        ({"mincharge": 500}, r"mincharge 500 .* above the fixed charge"),
        ({"annualmincharge": 500}, "annualmincharge cannot be billed"),
        ({"fixedchargefirstmeter": 1, "fixedchargeunits": "$/kW"}, "fixedchargeunits"),
        ({"currency": "EUR"}, "currency 'EUR'"),
        ({"demandratchetpercentage": [0.8] * 6 + [0.5] * 6}, "differs by month"),
        ({"energyweekdayschedule": [[0] * 24] * 11}, "has 11 months"),
        ({"energyweekendschedule": [[0] * 23] * 12}, "weekend schedule of January has 23 hours"),
        ({"flatdemandstructure": [[{"rate": 1}]]}, "flatdemandmonths needs 12 entries"),
    ],
)
def test_urdb_what_cannot_be_billed_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        _read(tmp_path, _urdb(**changes))
    assert "'T'" in str(caught.value)


@pytest.mark.parametrize("hole", [None, 3, -1])
def test_urdb_gap_names_month_day_type_and_hour(tmp_path: Path, hole: int | None) -> None:
    schedule: list[list[int | None]] = [[0] * 24 for _ in range(12)]
    schedule[6][13] = hole
    with pytest.raises(InputError, match=r"no band covers July, weekday, 13:00-14:00"):
        _read(tmp_path, _urdb(energyweekdayschedule=schedule))


def test_urdb_without_a_time_zone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="URDB gives no time zone"):
        tariff_from_urdb(_write(tmp_path, _urdb()))


@pytest.mark.parametrize("text", ["", "{", "[1]", "[]", "7", '{"items": []}'])
def test_urdb_garbage(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rate.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"not JSON|holds no URDB tariff"):
        tariff_from_urdb(path)


# --- holidays
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "day"),
    [
        ("new-year", "2026-01-01"),
        ("mlk", "2026-01-19"),
        ("presidents", "2026-02-16"),
        ("memorial", "2026-05-25"),
        ("juneteenth", "2026-06-19"),
        ("independence", "2026-07-04"),
        ("labor", "2026-09-07"),
        ("columbus", "2026-10-12"),
        ("veterans", "2026-11-11"),
        ("thanksgiving", "2026-11-26"),
        ("day-after-thanksgiving", "2026-11-27"),
        ("christmas", "2026-12-25"),
    ],
)
def test_holidays_of_2026(name: str, day: str) -> None:
    assert [d.isoformat() for d in holiday_dates(2026, (name,))] == [day]


def test_holiday_on_a_sunday_is_observed_on_monday_only_where_told() -> None:
    assert [d.day for d in holiday_dates(2027, ("independence",), "monday")] == [4, 5]
    assert [d.day for d in holiday_dates(2027, ("independence",))] == [4]
