from __future__ import annotations

import datetime as dt
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.catalog.tariffs import (
    ALWAYS,
    ZERO,
    Demand,
    EnergyBand,
    Hourly,
    Ratchet,
    Tariff,
    Tier,
    flat_tariff,
    tariff,
    tariffs,
)
from pertoken.errors import InputError
from pertoken.rates._local import local_hours, month_bounds
from pertoken.rates.energy import (
    Floats,
    Hours,
    bill,
    bill_resolved,
    billed_peaks_kw,
    gco2e,
    heat_credit_usd_per_kwh,
    overhead_kwh,
    resolve,
    site_kw,
    split_tiers,
    tier_shares,
    utc_hours,
    utility_kwh,
)

SACRAMENTO = "America/Los_Angeles"


def _tariff(*tiers: Tier, **changes: object) -> Tariff:
    fields: dict[str, object] = {
        "name": "t",
        "utility": "",
        "timezone": "UTC",
        "energy": (EnergyBand("all", tiers or (Tier(0.1),)),),
        "weekday": ZERO,
        "weekend": ZERO,
    }
    fields.update(changes)
    return Tariff(**fields)  # type: ignore[arg-type]


# --- local time
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "zone", [SACRAMENTO, "Europe/Berlin", "Australia/Lord_Howe", "Asia/Kolkata", "America/Denver", "UTC"]
)
def test_local_hours_are_what_zoneinfo_says_all_year(zone: str) -> None:
    hours = utc_hours("2026-01-01T00:00Z", 8760)
    local = local_hours(hours, zone)
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    for i in range(8760):
        at = (start + dt.timedelta(hours=i)).astimezone(ZoneInfo(zone))
        found = (local.year[i], local.month[i], local.day[i], local.hour[i], bool(local.weekend[i]))
        assert found == (at.year, at.month, at.day, at.hour, at.weekday() >= 5)


@pytest.mark.parametrize(("day", "length"), [((3, 8), 23), ((11, 1), 25), ((7, 1), 24)])
def test_days_of_23_and_25_hours(day: tuple[int, int], length: int) -> None:
    local = local_hours(utc_hours("2026-01-01T00:00Z", 8760), SACRAMENTO)
    of_day = (local.month == day[0]) & (local.day == day[1])
    assert int(of_day.sum()) == length
    # The peak window keeps its five hours of the clock, whatever the day's length.
    assert int((of_day & (local.hour >= 16) & (local.hour < 21)).sum()) == 5
    repeated = int((of_day & (local.hour == 1)).sum())
    skipped = int((of_day & (local.hour == 2)).sum())
    assert (repeated, skipped) == {23: (1, 0), 24: (1, 1), 25: (2, 1)}[length]


def test_months_with_a_clock_change_have_743_and_721_hours() -> None:
    for month, hours in ((3, 743), (11, 721), (2, 672), (7, 744)):
        start, end = month_bounds(2026, month, SACRAMENTO)
        assert end - start == hours
    whole = resolve(flat_tariff(0.1), utc_hours("2026-01-01T00:00Z", 8760))
    assert whole.period_hours.sum() == 8760
    assert set(whole.proration.tolist()) == {1.0}


def test_a_tariff_of_march_is_whole_over_743_hours() -> None:
    resolved = resolve(tariff("SMUD CI-TOD4"), utc_hours("2026-03-01T00:00-08:00", 743))
    assert resolved.period_names == ("2026-03",)
    assert resolved.proration.tolist() == [1.0]
    assert resolved.demand_basis == ("quoted",)


def test_holidays_count_as_weekend() -> None:
    smud = tariff("SMUD CI-TOD4")
    christmas = resolve(smud, utc_hours("2026-12-25T17:00-08:00", 1))  # a Friday
    day_before = resolve(smud, utc_hours("2026-12-24T17:00-08:00", 1))
    assert smud.energy[int(day_before.band[0])].name == "winter-peak"
    assert smud.energy[int(christmas.band[0])].name == "winter-off-peak"


def test_unknown_zone_and_naive_or_uneven_start() -> None:
    with pytest.raises(InputError, match="'Mars/Olympus' is no IANA name"):
        local_hours(utc_hours("2026-01-01T00:00Z", 1), "Mars/Olympus")
    with pytest.raises(InputError, match="has no time zone"):
        utc_hours("2026-01-01T00:00", 1)
    with pytest.raises(InputError, match="has no time zone"):
        utc_hours(dt.datetime(2026, 1, 1), 1)  # noqa: DTZ001
    with pytest.raises(InputError, match="not a full UTC hour"):
        utc_hours("2026-01-01T00:00+05:30", 1)
    with pytest.raises(InputError, match="no ISO date"):
        utc_hours("tomorrow", 1)
    with pytest.raises(InputError, match="horizon of 0 hours"):
        utc_hours("2026-01-01T00:00Z", 0)


# --- resolve
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(tariffs()))
def test_bands_partition_the_hours_of_a_year(name: str) -> None:
    row = tariff(name)
    resolved = resolve(row, utc_hours("2026-01-01T00:00Z", 8760))
    counts = np.bincount(resolved.band, minlength=len(row.energy))
    assert counts.sum() == 8760
    assert (counts > 0).all(), "a band no hour of the year falls in"
    assert resolved.energy_usd_per_kwh.shape == (row.tiers, 8760)
    for charge in resolved.demand:
        assert charge.mask.any()


def test_prorated_demand_is_assumed_and_prorate_false_is_quoted() -> None:
    smud = tariff("SMUD CI-TOD4")
    week = utc_hours("2026-07-06T00:00-07:00", 168)
    part = resolve(smud, week)
    assert part.proration.tolist() == [pytest.approx(168 / 744)]
    assert part.demand_basis == ("assumed",)
    assert part.energy_basis == "quoted"
    assert part.demand[0].usd_per_kw[0, 0] == pytest.approx(5.539 * 168 / 744)
    whole = resolve(smud, week, prorate=False)
    assert whole.demand_basis == ("quoted",)
    assert whole.demand[0].usd_per_kw[0, 0] == 5.539


def test_a_band_out_of_season_costs_nothing() -> None:
    winter = resolve(tariff("SMUD CI-TOD4"), utc_hours("2026-02-01T00:00-08:00", 672))
    assert [d.name for d in winter.demand] == ["site"]
    half = resolve(tariff("SMUD CI-TOD4"), utc_hours("2026-05-01T00:00-07:00", 31 * 24 + 30 * 24))
    assert half.demand[1].usd_per_kw[0].tolist() == [0.0, 11.609]


def test_hours_must_be_consecutive() -> None:
    hours = utc_hours("2026-01-01T00:00Z", 5)
    with pytest.raises(InputError, match="not consecutive after 2026-01-01T01 UTC"):
        resolve(flat_tariff(0.1), hours[[0, 1, 3]])
    with pytest.raises(InputError, match="no hours"):
        resolve(flat_tariff(0.1), hours[:0])


def test_hourly_series_with_adder_and_negative_prices() -> None:
    series = Hourly(np.datetime64("2026-01-01T00", "h"), np.array([0.05, -0.03, 0.01]))
    row = _tariff(Tier(0.02), hourly=series)
    resolved = resolve(row, utc_hours("2026-01-01T01:00Z", 2))
    assert resolved.energy_usd_per_kwh[0].tolist() == pytest.approx([-0.01, 0.03])
    with pytest.raises(InputError, match=r"has prices from 2026-01-01T00 to 2026-01-01T02 UTC; asked for"):
        resolve(row, utc_hours("2026-01-01T02:00Z", 2))


def test_repeated_series_keeps_weekday_and_hour_and_is_assumed() -> None:
    prices = np.arange(8784, dtype=np.float64)
    row = _tariff(Tier(0.0), hourly=Hourly(np.datetime64("2024-01-01T00", "h"), prices, repeat=True))
    hours = utc_hours("2026-07-08T13:00Z", 48)
    resolved = resolve(row, hours)
    source = np.datetime64("2024-01-01T00", "h") + resolved.energy_usd_per_kwh[0].astype("timedelta64[h]")
    away = (hours - source).astype(int)
    assert (away % (364 * 24) == 0).all()
    assert resolved.energy_basis == "assumed"
    inside = resolve(row, utc_hours("2024-03-01T00:00Z", 1))
    assert inside.energy_basis == "quoted"
    short = _tariff(hourly=Hourly(np.datetime64("2024-01-01T00", "h"), prices[:100], repeat=True))
    with pytest.raises(InputError, match="too short to repeat"):
        resolve(short, hours)


# --- tiers
# -----------------------------------------------------------------------------------------------------

loads = st.lists(st.floats(0, 500), min_size=30, max_size=30).map(np.array)


@settings(deadline=None)
@given(loads, st.sampled_from(["kWh", "kWh daily", "kWh/kW"]), st.sampled_from(["month", "band"]))
def test_tier_kwh_is_conserved(load: Floats, unit: str, by: str) -> None:
    row = _tariff(Tier(0.2, 10.0), Tier(0.15, 30.0), Tier(0.1), tier_unit=unit, tiers_by=by)
    resolved = resolve(row, utc_hours("2026-01-31T10:00Z", 30), prorate=False)
    shares = tier_shares(resolved, load)
    assert shares.min() >= 0
    assert shares.sum(axis=0) == pytest.approx(np.ones(30))
    assert (shares * load).sum() == pytest.approx(load.sum())


def test_tiers_start_again_each_month() -> None:
    row = _tariff(Tier(0.2, 15.0), Tier(0.1))
    hours = utc_hours("2026-01-31T22:00Z", 4)  # two hours of January, two of February
    shares = tier_shares(resolve(row, hours, prorate=False), np.full(4, 10.0))
    assert shares[0].tolist() == [1.0, 0.5, 1.0, 0.5]


def test_tier_limits_of_a_part_month_are_prorated() -> None:
    row = _tariff(Tier(0.2, 720.0), Tier(0.1))  # September: one kWh per hour of the month
    resolved = resolve(row, utc_hours("2026-09-01T00:00Z", 10))
    assert tier_shares(resolved, np.full(10, 2.0))[0].tolist() == [1.0] * 5 + [0.0] * 5
    assert resolved.energy_basis == "assumed"


def test_tiers_per_day_and_per_kw() -> None:
    daily = resolve(
        _tariff(Tier(0.2, 1.0), Tier(0.1), tier_unit="kWh daily"), utc_hours("2026-09-01T00:00Z", 720)
    )
    shares = tier_shares(daily, np.full(720, 1.0))
    assert (shares[0]).sum() == pytest.approx(30.0)  # 1 kWh a day × 30 days
    hours_of_use = _tariff(Tier(0.2, 200.0), Tier(0.1), tier_unit="kWh/kW")
    load = np.full(720, 50.0)
    load[0] = 100.0
    shares = tier_shares(resolve(hours_of_use, utc_hours("2026-09-01T00:00Z", 720)), load)
    assert (shares[0] * load).sum() == pytest.approx(200 * 100.0)  # 200 hours × the highest kW


def test_tiers_by_band_count_their_own_kwh() -> None:
    day = tuple((0,) * 12 + (1,) * 12 for _ in range(12))
    bands = (EnergyBand("a", (Tier(0.2, 5.0), Tier(0.1))), EnergyBand("b", (Tier(0.4, 5.0), Tier(0.3))))
    row = _tariff(energy=bands, weekday=day, weekend=day, tiers_by="band")
    load = np.full(24, 1.0)
    shares = tier_shares(resolve(row, utc_hours("2026-09-01T00:00Z", 24), prorate=False), load)
    assert shares[0].tolist() == ([1.0] * 5 + [0.0] * 7) * 2
    together = tier_shares(
        resolve(
            _tariff(energy=bands, weekday=day, weekend=day), utc_hours("2026-09-01T00:00Z", 24), prorate=False
        ),
        load,
    )
    assert together[0].tolist() == [1.0] * 5 + [0.0] * 19


def test_an_idle_load_sits_in_the_first_tier() -> None:
    for unit in ("kWh", "kWh/kW"):
        resolved = resolve(
            _tariff(Tier(0.2, 5.0), Tier(0.1), tier_unit=unit), utc_hours("2026-09-01T00:00Z", 3)
        )
        assert tier_shares(resolved, np.zeros(3)).sum(axis=0).tolist() == [1.0, 1.0, 1.0]


# --- bill
# ------------------------------------------------------------------------------------------------------

WEEK = utc_hours("2026-06-29T00:00-07:00", 168)  # the end of June and the start of July
week_loads = st.integers(0, 10**9).map(lambda seed: np.random.default_rng(seed).uniform(0, 3000, 168))
single_tier = st.sampled_from([n for n, t in tariffs().items() if t.tiers == 1])


@settings(deadline=None, max_examples=25)
@given(week_loads, week_loads, single_tier)
def test_energy_is_additive_without_tiers(one: Floats, two: Floats, name: str) -> None:
    resolved = resolve(tariff(name), WEEK)
    parts = bill_resolved(resolved, one).energy_usd + bill_resolved(resolved, two).energy_usd
    assert bill_resolved(resolved, one + two).energy_usd == pytest.approx(parts, abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(week_loads, week_loads, st.sampled_from(list(tariffs())))
def test_more_load_never_costs_less(one: Floats, more: Floats, name: str) -> None:
    resolved = resolve(tariff(name), WEEK)
    small, large = bill_resolved(resolved, one), bill_resolved(resolved, one + more)
    assert large.total_usd >= small.total_usd - 1e-6
    for charge, usd in small.demand_usd.items():
        assert large.demand_usd[charge] >= usd - 1e-9


@settings(deadline=None, max_examples=25)
@given(week_loads, st.sampled_from(list(tariffs())))
def test_parts_sum_to_the_whole(load: Floats, name: str) -> None:
    result = bill(tariff(name), WEEK, load)
    assert result.total_usd == pytest.approx(
        result.energy_usd + sum(result.demand_usd.values()) + result.fixed_usd
    )
    for charge in result.billed_kw:
        assert (result.billed_kw[charge] >= result.metered_kw[charge] - 1e-9).all()


def test_a_year_in_one_is_its_months_one_by_one() -> None:
    smud = tariff("SMUD CI-TOD1 21-299 kW")
    hours = utc_hours("2026-01-01T00:00-08:00", 8760)
    load = np.random.default_rng(1).uniform(50, 250, 8760)
    whole = bill(smud, hours, load)
    resolved = resolve(smud, hours)
    total = 0.0
    site: list[float] = []
    for p in range(12):
        at = resolved.period == p
        month = bill(smud, hours[at], load[at], previous_peaks_kw={"site": site})
        site.append(float(month.metered_kw["site"][0]))
        total += month.total_usd
        assert not month.assumed
    assert whole.total_usd == pytest.approx(total)


def _ratcheted(ratchet: Ratchet, minimum_kw: float = 0.0) -> Tariff:
    return _tariff(Tier(0.0), demand=(Demand("d", (Tier(10.0),), ALWAYS, ALWAYS, ratchet, minimum_kw),))


def _months(kw_by_month: list[float]) -> tuple[Hours, Floats]:
    hours = utc_hours("2026-01-01T00:00Z", 8760)
    month = local_hours(hours, "UTC").month
    keep = month <= len(kw_by_month)
    return hours[keep], np.array(kw_by_month)[month[keep] - 1]


def test_ratchet_on_metered_peaks_forgets_after_its_months() -> None:
    hours, load = _months([100, 40, 40, 40])
    billed = billed_peaks_kw(resolve(_ratcheted(Ratchet(0.5, 2)), hours), load)["d"]
    assert billed.tolist() == [100, 50, 50, 40]


def test_ratchet_on_billed_peaks_decays() -> None:
    hours, load = _months([100, 10, 10, 10])
    billed = billed_peaks_kw(resolve(_ratcheted(Ratchet(0.5, 1, peaks="billed")), hours), load)["d"]
    assert billed.tolist() == [100, 50, 25, 12.5]


def test_ratchet_of_summer_peaks_in_winter_bills() -> None:
    summer, winter = (6, 7, 8, 9), (1, 2, 3, 4, 5, 10, 11, 12)
    row = _ratcheted(Ratchet(0.8, 11, of_months=summer, in_months=winter))
    hours, load = _months([10, 10])
    previous = {"d": [100.0, 999.0, 999.0]}  # October to December: not remembered
    assert billed_peaks_kw(resolve(row, hours), load, previous_peaks_kw=previous)["d"].tolist() == [10, 10]
    previous = {"d": [100.0, 0.0, 0.0, 0.0]}  # September to December
    assert billed_peaks_kw(resolve(row, hours), load, previous_peaks_kw=previous)["d"].tolist() == [80, 80]


def test_minimum_demand_and_unknown_charge() -> None:
    hours, load = _months([5])
    resolved = resolve(_ratcheted(Ratchet(0.5, 11), minimum_kw=20), hours)
    assert billed_peaks_kw(resolved, load)["d"].tolist() == [20]
    with pytest.raises(InputError, match="has no demand charge 'peak'"):
        billed_peaks_kw(resolved, load, previous_peaks_kw={"peak": [1.0]})
    with pytest.raises(InputError, match="must be numbers of 0 or more"):
        billed_peaks_kw(resolved, load, previous_peaks_kw={"d": [-1.0]})


def test_demand_tiers_conserve_kw() -> None:
    resolved = resolve(tariff("Ripley GSA-2"), utc_hours("2026-02-01T06:00Z", 672))
    charge = resolved.demand[0]
    assert split_tiers(np.array([30.0, 80.0]), charge).tolist() == [[30.0, 50.0], [0.0, 30.0]]


def test_a_load_that_is_no_load() -> None:
    resolved = resolve(flat_tariff(0.1), utc_hours("2026-01-01T00:00Z", 2))
    for bad in ([-1.0, 0.0], [np.nan, 0.0], [np.inf, 0.0]):
        with pytest.raises(InputError, match="0 or more kW in every hour"):
            bill_resolved(resolved, np.array(bad))
    with pytest.raises(InputError, match="for 2 hours"):
        bill_resolved(resolved, np.zeros(3))


# --- boundary
# --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e6), st.floats(1, 3))
def test_boundary_parts_sum_to_the_meter(gpu: float, host: float, idle: float, pue: float) -> None:
    total = utility_kwh(gpu, host_kwh=host, idle_kwh=idle, pue=pue)
    assert total == pytest.approx(gpu + host + idle + float(overhead_kwh(gpu + host + idle, pue)))


def test_boundary_refuses_nonsense() -> None:
    with pytest.raises(InputError, match=r"PUE 0.9"):
        utility_kwh(1.0, pue=0.9)
    with pytest.raises(InputError, match="PUE nan"):
        overhead_kwh(1.0, float("nan"))
    with pytest.raises(InputError, match="PUE 0"):
        site_kw(1, 1, 1, 0)
    with pytest.raises(InputError, match="grid intensity"):
        gco2e(1.0, -5.0)
    with pytest.raises(InputError, match="heat"):
        heat_credit_usd_per_kwh(reuse_fraction=1.5, usd_per_kwh_heat=0.02)


def test_site_power_and_carbon_by_hour() -> None:
    kw = site_kw(np.array([0.0, 8.0]), 700.0, 550.0, 1.2)
    assert np.asarray(kw).tolist() == [0.0, 12.0]
    assert np.asarray(gco2e(np.array([1.0, 2.0]), np.array([100.0, 50.0]))).tolist() == [100.0, 100.0]
