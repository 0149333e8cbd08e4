"""Bills and boundaries worked out by hand, with the arithmetic written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pertoken.catalog.tariffs import tariff, tariff_from_urdb
from pertoken.rates.capital import annuity_usd_per_hour
from pertoken.rates.energy import bill, overhead_kwh, utc_hours, utility_kwh
from pertoken.units import HOURS_PER_YEAR

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
SMUD_FILE = DATA / "tariffs" / "urdb_sample_SMUD_CI-TOD4.json"


def _local(
    start: str, days: int
) -> tuple[npt.NDArray[np.datetime64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """UTC hours of whole local days without a clock change, with local hour of day and whether a weekday."""
    hours = utc_hours(start, days * 24)
    hour = np.tile(np.arange(24), days)
    first = np.datetime64(start[:10], "D")
    date = first + np.repeat(np.arange(days), 24)
    weekday = np.is_busday(date)
    return hours, hour, weekday


def test_smud_july_2025_as_urdb_publishes_it() -> None:
    """SMUD CI-TOD4, URDB record of 2025-05-01: 2,000 kW, brought down to 1,500 kW on weekdays from 16:00
    to 21:00.

    July 2025 has 23 weekdays and 744 hours: 23 × 5 = 115 peak hours, 629 others (URDB knows no holidays).
    """
    if not SMUD_FILE.exists():
        pytest.skip("shared/data is absent: no URDB file to read")
    hours, hour, weekday = _local("2025-07-01T00:00-07:00", 31)
    peak = weekday & (hour >= 16) & (hour < 21)
    assert int(peak.sum()) == 115
    result = bill(tariff_from_urdb(SMUD_FILE), hours, np.where(peak, 1500.0, 2000.0))
    energy = 115 * 1500 * (0.2367 + 0.0003) + 629 * 2000 * (0.1151 + 0.0003)
    assert energy == pytest.approx(40_882.50 + 145_173.20)
    assert result.energy_usd == pytest.approx(186_055.70, abs=1e-6)
    assert result.demand_usd["flat"] == pytest.approx(2000 * 5.539)  # 11,078.00
    assert result.demand_usd["tou1"] == pytest.approx(1500 * 11.609)  # 17,413.50
    assert result.total_usd == pytest.approx(214_547.20, abs=1e-6)
    assert not result.assumed


def test_smud_july_2025_from_the_catalogue() -> None:
    """The catalogue's row adds what the URDB record lacks: 4 July is off-peak, and the fixed charge.

    22 × 5 = 110 peak hours; the 5 hours of 4 July at 1,500 kW are off-peak.
    """
    hours, hour, weekday = _local("2025-07-01T00:00-07:00", 31)
    low = weekday & (hour >= 16) & (hour < 21)
    result = bill(tariff("SMUD CI-TOD4"), hours, np.where(low, 1500.0, 2000.0))
    assert result.energy_usd == pytest.approx(110 * 1500 * 0.2370 + 5 * 1500 * 0.1154 + 629 * 2000 * 0.1154)
    assert result.energy_usd == pytest.approx(39_105.00 + 865.50 + 145_173.20)
    assert result.demand_usd == pytest.approx({"site": 11_078.00, "summer-peak": 17_413.50})
    assert result.fixed_usd == pytest.approx(4_014.30)
    assert result.total_usd == pytest.approx(217_649.50, abs=1e-6)


def test_smud_winter_saver_is_every_day_nine_to_four() -> None:
    """SMUD CI-TOD1 of 2026, February: 28 days × 7 hours of saver, weekends and holidays too.

    February 2026 has 20 weekdays, one of them Presidents' Day: 19 × 5 = 95 peak hours, 196 saver hours,
    672 − 291 = 381 off-peak hours, at 100 kW. The site charge is on the highest of 12 months: 140 kW last
    August.
    """
    hours, _, _ = _local("2026-02-01T00:00-08:00", 28)
    result = bill(
        tariff("SMUD CI-TOD1 21-299 kW"),
        hours,
        np.full(672, 100.0),
        previous_peaks_kw={"site": [90, 95, 110, 120, 130, 140, 120, 110, 100, 100, 100]},
    )
    energy = 9_500 * (0.1477 + 0.0003) + 19_600 * (0.0888 + 0.0003) + 38_100 * (0.1264 + 0.0003)
    assert energy == pytest.approx(1_406.00 + 1_746.36 + 4_827.27)
    assert result.energy_usd == pytest.approx(7_979.63, abs=1e-6)
    assert result.demand_usd == pytest.approx({"site": 140 * 6.454})  # 903.56; summer peak does not count
    assert result.total_usd == pytest.approx(7_979.63 + 903.56 + 412.90, abs=1e-6)


def test_pnm_february_2026() -> None:
    """PNM 4B: 1,000 kW, 1,200 kW on weekdays from 8:00 to 17:00 (the cheap time).

    February 2026: 20 weekdays, 8 weekend days. On-peak 6 × 20 = 120 h; super-off-peak 9 × 20 = 180 h;
    off-peak 9 × 20 + 24 × 8 = 372 h. The demand peak of 8:00 to 20:00 is 1,200 kW, that of the other hours
    1,000 kW.
    """
    hours, hour, weekday = _local("2026-02-01T00:00-07:00", 28)
    cheap = weekday & (hour >= 8) & (hour < 17)
    result = bill(tariff("PNM 4B"), hours, np.where(cheap, 1200.0, 1000.0))
    energy = 120_000 * 0.0262503 + 216_000 * 0.0152030 + 372_000 * 0.0189944
    assert energy == pytest.approx(3_150.036 + 3_283.848 + 7_065.9168)
    assert result.energy_usd == pytest.approx(13_499.8008, abs=1e-6)
    assert result.demand_usd == pytest.approx({"on-peak": 1200 * 28.44, "off-peak": 1000 * 19.79})
    assert result.total_usd == pytest.approx(13_499.8008 + 34_128.00 + 19_790.00 + 666.65, abs=1e-6)


def test_hartselle_tiers_of_energy_and_demand() -> None:
    """Hartselle GSA-2, September 2026 (720 h) at 100 kW: 72,000 kWh, 15,000 of them dear; 50 of the 100 kW
    free."""
    hours, _, _ = _local("2026-09-01T00:00-05:00", 30)
    result = bill(tariff("Hartselle GSA-2"), hours, np.full(720, 100.0))
    assert result.energy_usd == pytest.approx(15_000 * 0.11432 + 57_000 * 0.07159)  # 1,714.80 + 4,080.63
    assert result.demand_usd["flat"] == pytest.approx(50 * 14.15)
    assert result.total_usd == pytest.approx(1_714.80 + 4_080.63 + 707.50 + 60.48, abs=1e-6)


def test_osage_ratchet_on_billed_demand() -> None:
    """Osage: at least 75 % of the highest *billed* demand of the 11 months before, and at least 20 kW.

    400 kW last month, 200 kW now: 300 kW billed; the month after, still 200 kW: again 75 % of 400.
    """
    hours, _, _ = _local("2026-06-01T00:00-05:00", 61)
    result = bill(
        tariff("Osage Large Industrial"), hours, np.full(1464, 200.0), previous_peaks_kw={"flat": [400.0]}
    )
    assert result.metered_kw["flat"].tolist() == [200.0, 200.0]
    assert result.billed_kw["flat"].tolist() == [300.0, 300.0]
    assert result.demand_usd["flat"] == pytest.approx(2 * 300 * 7.00)


def test_annuity_by_hand() -> None:
    """250,000 USD over 4 years at 10 %, 10 % residual.

    1.1⁴ = 1.4641; present value of the residual 25,000 / 1.4641 = 17,075.34; annuity factor
    0.1 / (1 − 1/1.4641) = 0.315470804; (250,000 − 17,075.34) × 0.315470804 = 73,480.93 USD a year.
    """
    per_hour = annuity_usd_per_hour(250_000, life_years=4, wacc_fraction=0.10, residual_fraction=0.10)
    assert pytest.approx(73_480.93, abs=0.01) == (250_000 - 25_000 / 1.4641) * 0.1 / (1 - 1 / 1.4641)
    assert per_hour * HOURS_PER_YEAR == pytest.approx(73_480.93, abs=0.01)
    # The present value of the four payments and of the residual is the price.
    year = per_hour * HOURS_PER_YEAR
    assert sum(year / 1.1**n for n in (1, 2, 3, 4)) + 25_000 / 1.1**4 == pytest.approx(250_000)


def test_google_four_part_energy_boundary() -> None:
    """Median Gemini Apps text prompt, May 2025 (arXiv 2508.15734): 0.24 Wh at the utility meter.

    Parts as published: active accelerators 0.14, active CPU and DRAM 0.06, idle machines 0.02, overhead
    0.02 at PUE 1.09; the narrow approach (accelerators alone) gives 0.10 Wh for the same prompt. All
    rounded to 0.01 Wh there.
    """
    total = utility_kwh(0.14, host_kwh=0.06, idle_kwh=0.02, pue=1.09)
    overhead = overhead_kwh(0.14 + 0.06 + 0.02, 1.09)
    assert total == pytest.approx(0.2398)
    assert round(float(total), 2) == 0.24
    assert round(float(overhead), 2) == 0.02
    assert 0.14 + 0.06 + 0.02 + overhead == pytest.approx(total)
    # Shares as published elsewhere in the report: 58 % accelerators, 25 % host, 10 % idle, 8 % overhead.
    shares = [round(100 * part / float(total)) for part in (0.14, 0.06, 0.02, float(overhead))]
    assert shares == pytest.approx([58, 25, 10, 8], abs=2)
