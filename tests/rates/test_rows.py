"""Rate rows and the usage they price: quantity × rate is the bill."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.catalog.tariffs import Hourly, flat_tariff, tariff, tariffs
from pertoken.errors import InputError
from pertoken.ledger import open_ledger
from pertoken.rates.energy import Floats, bill_resolved, resolve, tier_shares, utc_hours
from pertoken.rates.pool import (
    api_rate_rows,
    egress_rate_rows,
    gpu_hour_rate_rows,
    owned_rate_rows,
    rented_rate_rows,
    reserved_rate_rows,
    software_rate_rows,
    spot_rate_rows,
    storage_rate_rows,
)
from pertoken.rates.site import (
    UTILITY_HOURS,
    demand_rate_rows,
    energy_rate_rows,
    fixed_rate_rows,
    heat_credit_rate_rows,
    peak_usage_rows,
    per_month_usd_per_hour,
    site_rate_rows,
    split_kwh,
    staff_rate_rows,
)
from pertoken.tables import RATES, USAGE, concat, usage_rows

HOURS = utc_hours("2026-01-01T00:00Z", 3)


def _only(rows: pa.Table, column: str) -> set[object]:
    return set(rows[column].to_pylist())


def _cost(usage: pa.Table, rates: pa.Table) -> dict[str, Decimal]:
    """USD by component, closed by the ledger."""
    ledger = open_ledger()
    try:
        ledger.add_usage(usage)
        ledger.add_rates(rates)
        ledger.close()
        rows = ledger.cost("component").to_pylist()
    finally:
        ledger.shut()
    return {row["component"]: row["cost_usd"] for row in rows}


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 10**9).map(lambda seed: np.random.default_rng(seed).uniform(0, 2000, 72)),
    st.sampled_from(list(tariffs())),
)
def test_rows_times_usage_is_the_bill(load: Floats, name: str) -> None:
    # Three days over the end of June: two billing months, both prorated.
    resolved = resolve(tariff(name), utc_hours("2026-06-29T12:00-07:00", 72))
    expected = bill_resolved(resolved, load)
    rates = concat(
        [energy_rate_rows("p", resolved), demand_rate_rows("s", resolved), fixed_rate_rows("s", resolved)],
        RATES,
    )
    parts = split_kwh(tier_shares(resolved, load), load)
    usage = concat(
        [
            usage_rows(
                resolved.hours_utc,
                {("output", meter): kwh for meter, kwh in parts.items()},
                book="plan:x",
                pool="p",
                model="",
                tenant="shop",
                basis="assumed",
            ),
            peak_usage_rows("plan:x", "s", resolved, load),
            usage_rows(
                resolved.hours_utc,
                {("idle", UTILITY_HOURS): 1.0},
                book="plan:x",
                pool="(site:s)",
                model="",
                tenant="(idle)",
                basis="assumed",
            ),
        ],
        USAGE,
    )
    cost = _cost(usage, rates)
    assert float(cost["energy_charge"]) == pytest.approx(expected.energy_usd + expected.fixed_usd, abs=0.005)
    assert float(cost["demand_charge"]) == pytest.approx(sum(expected.demand_usd.values()), abs=0.005)


def test_demand_rows_sit_in_the_first_hour_of_each_month() -> None:
    resolved = resolve(tariff("SMUD CI-TOD4"), utc_hours("2026-06-30T00:00-07:00", 48))
    rows = demand_rate_rows("s", resolved).to_pylist()
    assert [(r["hour"].isoformat(), r["meter"]) for r in rows] == [
        ("2026-06-30T07:00:00+00:00", "peak_kw:site"),
        ("2026-07-01T07:00:00+00:00", "peak_kw:site"),
        ("2026-06-30T07:00:00+00:00", "peak_kw:summer-peak"),
        ("2026-07-01T07:00:00+00:00", "peak_kw:summer-peak"),
    ]
    assert {r["basis"] for r in rows} == {"assumed"}
    assert {r["pool"] for r in rows} == {"(site:s)"}
    assert float(rows[0]["usd_per_unit"]) == pytest.approx(5.539 * 24 / 720)
    assert "of 2026-06" in rows[0]["source"]


def test_the_peak_is_attributed_by_what_each_phase_drew() -> None:
    resolved = resolve(tariff("Sioux Falls C/IP"), utc_hours("2026-02-01T06:00Z", 672))
    output, idle = np.full(672, 60.0), np.full(672, 20.0)
    output[100] = 90.0  # the peak: 90 + 20
    rows = peak_usage_rows("plan:x", "s", resolved, {"output": output, "idle": idle}).to_pylist()
    assert {r["phase"]: float(r["quantity"]) for r in rows} == {"output": 90.0, "idle": 20.0}
    assert {r["tenant"] for r in rows} == {"(idle)"}
    with pytest.raises(InputError, match="unknown phase 'busy'"):
        peak_usage_rows("plan:x", "s", resolved, {"busy": output})


def test_what_a_ratchet_adds_is_idle() -> None:
    resolved = resolve(tariff("Osage Large Industrial"), utc_hours("2026-02-01T06:00Z", 672))
    load = {"output": np.full(672, 100.0)}
    rows = peak_usage_rows("plan:x", "s", resolved, load, previous_peaks_kw={"flat": [400.0]}).to_pylist()
    assert {r["phase"]: float(r["quantity"]) for r in rows} == {"output": 100.0, "idle": 200.0}


def test_owned() -> None:
    rows = owned_rate_rows(
        "p", HOURS, usd_per_gpu=8760, life_years=1, wacc_fraction=0.1, source="quote of a reseller"
    )
    assert rows.schema == RATES
    assert _only(rows, "usd_per_unit") == {Decimal("1.100000000000")}
    assert _only(rows, "component") == {"capital"}
    assert _only(rows, "meter") == {"gpu_hours"}
    assert _only(rows, "source") == {"quote of a reseller; annuity, 1 years, WACC 10.0%, residual 0%"}
    line = owned_rate_rows(
        "p", HOURS, usd_per_gpu=8760, life_years=1, wacc_fraction=0.1, method="straight-line", source="q"
    )
    assert _only(line, "source") == {"q; straight-line, 1 years, residual 0%"}


def test_rent_holds_the_power_as_an_explicit_zero() -> None:
    for rows, component in (
        (rented_rate_rows("p", HOURS, 2.5, source="x"), "rent"),
        (spot_rate_rows("p", HOURS, 1.5, source="x"), "rent"),
        (reserved_rate_rows("p", HOURS, 2.0, source="x"), "commitment"),
    ):
        by_meter = {r["meter"]: r for r in rows.to_pylist()}
        assert by_meter["gpu_hours"]["component"] == component
        assert by_meter["energy_kwh"]["usd_per_unit"] == 0
        assert (
            by_meter["energy_kwh"]["source"] == "included in rent: x"
            or "spot" in by_meter["energy_kwh"]["source"]
        )
    bare = rented_rate_rows("p", HOURS, np.array([1.0, 2.0, 3.0]), energy_included=False, source="x")
    assert bare["usd_per_unit"].to_pylist() == [Decimal(1), Decimal(2), Decimal(3)]
    reserved = reserved_rate_rows("p", HOURS, 1.0, energy_included=False, source="x")
    assert _only(reserved, "meter") == {"gpu_hours"}


def test_api_prices_per_token() -> None:
    rows = api_rate_rows("api", HOURS, {"input_tokens": 0.15, "output_tokens": 0.6}, source="list price")
    by_meter = {r["meter"]: r["usd_per_unit"] for r in rows.to_pylist()}
    assert by_meter == {"input_tokens": Decimal("0.00000015"), "output_tokens": Decimal("0.0000006")}
    with pytest.raises(InputError, match="not a token meter"):
        api_rate_rows("api", HOURS, {"requests": 1.0}, source="x")
    with pytest.raises(InputError, match="0 or more, found -1"):
        api_rate_rows("api", HOURS, {"input_tokens": -1.0}, source="x")


def test_lines_that_are_zero_only_when_someone_wrote_zero() -> None:
    assert _only(gpu_hour_rate_rows("p", HOURS, 0.0, component="network"), "usd_per_unit") == {Decimal(0)}
    assert _only(software_rate_rows("p", HOURS, usd_per_gpu_year=4380), "component") == {"software"}
    assert _only(egress_rate_rows("p", HOURS, usd_per_gb=0.09), "meter") == {"egress_gb"}
    assert _only(storage_rate_rows("p", HOURS, usd_per_gb_month=7.3), "usd_per_unit") == {Decimal("0.01")}
    assert _only(staff_rate_rows("s", HOURS, fte=1, usd_per_fte_year=87_600), "usd_per_unit") == {Decimal(10)}
    hosting = site_rate_rows("s", HOURS, per_month_usd_per_hour(1460), component="hosting")
    assert _only(hosting, "usd_per_unit") == {Decimal(2)}
    with pytest.raises(InputError, match="0 or more USD per GPU hour"):
        gpu_hour_rate_rows("p", HOURS, -1.0, component="network")
    with pytest.raises(InputError, match="0 or more USD per GPU hour"):
        gpu_hour_rate_rows("p", HOURS, np.array([1.0, np.nan, 1.0]), component="network")
    with pytest.raises(InputError, match="fte must be a number"):
        staff_rate_rows("s", HOURS, fte=-1, usd_per_fte_year=1)


def test_a_negative_wholesale_price_earns_money() -> None:
    series = Hourly(HOURS[0], np.array([-0.02, 0.03, -0.01]))
    wholesale = replace(flat_tariff(0.0), hourly=series)
    usage = usage_rows(
        HOURS, {("output", "energy_kwh"): 10.0}, book="b", pool="p", model="", tenant="t", basis="assumed"
    )
    cost = _cost(usage, energy_rate_rows("p", resolve(wholesale, HOURS)))
    assert cost == {"energy_charge": Decimal(0)}
    first = _cost(usage.slice(0, 1), energy_rate_rows("p", resolve(wholesale, HOURS)))
    assert first == {"energy_charge": Decimal("-0.2")}


def test_two_components_price_one_meter() -> None:
    rates = concat(
        [
            owned_rate_rows("p", HOURS, usd_per_gpu=8760, life_years=1, wacc_fraction=0.0, source="q"),
            software_rate_rows("p", HOURS, usd_per_gpu_year=4380),
        ],
        RATES,
    )
    usage = usage_rows(
        HOURS, {("idle", "gpu_hours"): 2.0}, book="b", pool="p", model="", tenant="t", basis="assumed"
    )
    assert _cost(usage, rates) == {"capital": Decimal(6), "software": Decimal(3)}


def test_heat_credit_is_a_row_of_its_own() -> None:
    resolved = resolve(tariff("Hartselle GSA-2"), HOURS)
    rates = concat([energy_rate_rows("p", resolved), heat_credit_rate_rows("p", resolved, 0.02)], RATES)
    usage = usage_rows(
        HOURS, {("output", "energy_kwh"): 10.0}, book="b", pool="p", model="", tenant="t", basis="assumed"
    )
    assert float(_cost(usage, rates)["energy_charge"]) == pytest.approx(3 * 10 * (0.11432 - 0.02))
    assert _only(heat_credit_rate_rows("p", resolved, 0.02), "meter") == {"energy_kwh", "energy_kwh:tier2"}
