"""Rate rows of a fleet's pools and sites: its price terms handed to the pure functions of `rates`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import date

import pyarrow as pa

from pertoken import catalog
from pertoken.catalog import Tariff
from pertoken.catalog.prices import PriceRow
from pertoken.catalog.tariffs import flat_tariff
from pertoken.rates.capital import colocation_usd_per_gpu_hour, cooling_usd_per_hour
from pertoken.rates.energy import TariffHours, heat_credit_usd_per_kwh, resolve
from pertoken.rates.pool import (
    api_rate_rows,
    egress_rate_rows,
    energy_included_rate_rows,
    gpu_hour_rate_rows,
    owned_rate_rows,
    rented_rate_rows,
    reserved_rate_rows,
    software_rate_rows,
    spot_rate_rows,
    start_rate_rows,
)
from pertoken.rates.site import (
    demand_rate_rows,
    energy_rate_rows,
    fixed_rate_rows,
    heat_credit_rate_rows,
    per_month_usd_per_hour,
)
from pertoken.scenario import (
    Api,
    Bought,
    Colocated,
    Fleet,
    InlineTariff,
    OnDemand,
    Overheads,
    Pool,
    Reserved,
    Scenario,
    Site,
    Spot,
    TariffFile,
)
from pertoken.tables import RATES, Hours, concat, rate_rows
from pertoken.units import HOURS_PER_YEAR, WATTS_PER_KILOWATT, site_pool

WRITTEN = "scenario"
"""Source of a number the scenario's author wrote."""

_LINES: dict[str, Callable[[Overheads], float | None]] = {
    "staff": lambda o: None if o.staff_fte is None else o.staff_fte * o.usd_per_fte_year / HOURS_PER_YEAR,
    "hosting": lambda o: _monthly(o.hosting_usd_per_month),
    "network": lambda o: _monthly(o.network_usd_per_month),
    "storage": lambda o: _monthly(o.storage_usd_per_month),
}
"""Overheads that are paid by the hour [USD/h], by component."""


_STARTS_IN = {
    "owned": "capital", "colocated": "capital", "on_demand": "rent", "spot": "rent", "reserved": "commitment",
}  # fmt: skip
"""Component a start is paid in: that of the machine's hours."""


def resolved_tariff(site: Site, hours: Hours, *, prorate: bool = True) -> TariffHours | None:
    """The site's tariff as prices of the hours (see `energy.resolve`); None where the site has none."""
    spec = site.tariff
    if spec is None:
        return None
    found: Tariff
    if isinstance(spec, str):
        found = catalog.tariff(spec)
    elif isinstance(spec, InlineTariff):
        found = flat_tariff(
            spec.usd_per_kwh,
            usd_per_kw_month=spec.demand_usd_per_kw,
            timezone=site.timezone,
            source=WRITTEN,
        )
    else:
        found = _from_file(spec, site)
    return resolve(found, hours, prorate=prorate)


def _from_file(spec: TariffFile, site: Site) -> Tariff:
    if spec.urdb is not None:
        return catalog.tariff_from_urdb(spec.urdb, timezone=site.timezone)
    assert spec.csv is not None
    return catalog.tariff_from_csv(spec.csv, timezone=site.timezone)


def pays_for_energy(pool: Pool) -> bool:
    """Whether the pool's electricity is billed beside its price."""
    return isinstance(pool.price, Bought) and not (
        isinstance(pool.price, Colocated) and pool.price.energy_included
    )


def pool_rates(
    fleet: Fleet,
    pool_name: str,
    hours: Hours,
    tariff: TariffHours | None,
    *,
    on: date,
) -> pa.Table:
    """All rate rows of one pool over the hours.

    Parameters: tariff of its site over the same hours; on, the day whose catalogue prices hold.
    Raises UnknownNameError or InputError where a price is to come from the catalogue and is not there.
    """
    pool = fleet.pools[pool_name]
    if isinstance(pool.price, Api):
        parts = [_api(pool_name, pool.price, hours, on)]
    else:
        site = fleet.sites[pool.site]
        parts = _gpu_price(pool_name, pool, hours, on)
        if pays_for_energy(pool):
            assert tariff is not None  # a fleet without it is refused when it is read
            parts.append(energy_rate_rows(pool_name, tariff))
            credit = heat_credit_usd_per_kwh(
                reuse_fraction=site.heat_reuse_fraction,
                usd_per_kwh_heat=site.heat_usd_per_kwh,
            )
            if credit:
                parts.append(heat_credit_rate_rows(pool_name, tariff, credit, source=WRITTEN))
        elif isinstance(pool.price, Bought):
            parts.append(energy_included_rate_rows(pool_name, hours, source="in the price per kW"))
        if pool.startup_usd:
            component = _STARTS_IN[pool.price.term]
            parts.append(
                start_rate_rows(
                    pool_name, hours, usd_per_start=pool.startup_usd, component=component, source=WRITTEN
                )
            )
        software = first_written(
            pool.overheads.software_usd_per_gpu_year, site.overheads.software_usd_per_gpu_year
        )
        if software is not None:
            parts.append(software_rate_rows(pool_name, hours, usd_per_gpu_year=software, source=WRITTEN))
        egress = first_written(pool.overheads.egress_usd_per_gb, site.overheads.egress_usd_per_gb)
        # Egress is counted always; where nobody wrote a price the report says it was left out.
        source = WRITTEN if egress is not None else "left out: no egress price written"
        parts.append(egress_rate_rows(pool_name, hours, usd_per_gb=egress or 0.0, source=source))
    parts += _overheads(pool_name, pool.overheads, hours)
    return concat(parts, RATES)


def site_rates(fleet: Fleet, site_name: str, hours: Hours, tariff: TariffHours | None) -> pa.Table:
    """All rate rows of what no pool owns: the site's overheads, its demand and fixed charges."""
    site = fleet.sites[site_name]
    parts = _overheads(site_pool(site_name), site.overheads, hours)
    if tariff is not None:
        share = replace(tariff, fixed_usd_per_hour=tariff.fixed_usd_per_hour * site.fixed_charge_fraction)
        parts += [demand_rate_rows(site_name, tariff), fixed_rate_rows(site_name, share)]
    return concat(parts, RATES)


def first_written(*values: float | None) -> float | None:
    """The first value somebody wrote."""
    return next((v for v in values if v is not None), None)


def left_out(scenario: Scenario, pool_name: str) -> list[str]:
    """Cost lines nobody wrote, at the pool or its site: the report names them, they are not zero."""
    pool = scenario.pools[pool_name]
    levels = [pool.overheads] + ([scenario.sites[pool.site].overheads] if pool.site else [])
    missing = [name for name, line in _LINES.items() if all(line(o) is None for o in levels)]
    if not isinstance(pool.price, Api):
        missing += [
            name
            for name, field in (("software", "software_usd_per_gpu_year"), ("egress", "egress_usd_per_gb"))
            if all(getattr(o, field) is None for o in levels)
        ]
    return missing


def purchase_usd(scenario: Scenario, pool: Pool) -> float:
    """What the pool's hardware costs to buy, per GPU [USD], cooling capital included; 0 where it is rented."""
    if not isinstance(pool.price, Bought):
        return 0.0
    return usd_per_gpu(pool, pool.price, scenario.horizon.start)[
        0
    ] + pool.price.cooling_usd_per_kw * _kw_per_gpu(pool)


def _overheads(pool: str, overheads: Overheads, hours: Hours) -> list[pa.Table]:
    return [
        rate_rows(
            hours, usd, pool=pool, meter="site_hours", component=component, basis="assumed", source=WRITTEN
        )
        for component, line in _LINES.items()
        if (usd := line(overheads)) is not None
    ]


def _monthly(usd_per_month: float | None) -> float | None:
    return None if usd_per_month is None else per_month_usd_per_hour(usd_per_month)


def _kw_per_gpu(pool: Pool) -> float:
    gpu = catalog.gpu(pool.gpu)
    return (gpu.tdp_w + gpu.host_busy_w) / WATTS_PER_KILOWATT


def _gpu_price(name: str, pool: Pool, hours: Hours, on: date) -> list[pa.Table]:
    price = pool.price
    if isinstance(price, Bought):
        return _owned(name, pool, price, hours, on)
    assert isinstance(price, OnDemand | Reserved | Spot)
    usd, basis, source = price.usd_per_gpu_hour, "assumed", WRITTEN
    if usd is None:
        row = catalog.price(
            price.provider,
            pool.gpu,
            price.term,
            on=on,
            instance=price.instance,
            region=price.region,
            commitment_years=price.commitment_years if isinstance(price, Reserved) else None,
        )
        assert row.usd_per_gpu_hour is not None
        usd, basis, source = row.usd_per_gpu_hour, "quoted", _cited(row)
    make = {"on_demand": rented_rate_rows, "reserved": reserved_rate_rows, "spot": spot_rate_rows}[price.term]
    return [make(name, hours, usd, basis=basis, source=source)]


def _cited(row: PriceRow) -> str:
    """Where a price comes from: source and day, what it includes, and whether it is old on the day it is used for."""
    parts = [f"{row.source}, {row.checked}", row.note, "older than half a year by then" if row.stale else ""]
    return "; ".join(part for part in parts if part)


def usd_per_gpu(pool: Pool, price: Bought, on: date) -> tuple[float, str, str]:
    """Purchase price per GPU [USD] as written or from the catalogue, its basis and source."""
    if price.usd_per_gpu is not None:
        return price.usd_per_gpu, "assumed", WRITTEN
    row = catalog.price(price.provider, pool.gpu, "purchase", on=on)
    assert row.usd_per_gpu is not None
    return row.usd_per_gpu, "quoted", _cited(row)


def _owned(name: str, pool: Pool, price: Bought, hours: Hours, on: date) -> list[pa.Table]:
    usd, basis, source = usd_per_gpu(pool, price, on)
    parts = [
        owned_rate_rows(
            name,
            hours,
            usd_per_gpu=usd,
            life_years=price.life_years,
            wacc_fraction=price.wacc_fraction,
            residual_fraction=price.residual_fraction,
            method=price.method,
            basis=basis,
            source=source,
        )
    ]

    def hosting(usd_per_gpu_hour: float, what: str) -> None:
        if usd_per_gpu_hour:
            parts.append(
                gpu_hour_rate_rows(
                    name, hours, usd_per_gpu_hour, component="hosting", basis="assumed", source=what
                )
            )

    hosting(
        usd * price.maintenance_fraction_per_year / HOURS_PER_YEAR, "maintenance, share of price per year"
    )
    if price.cooling_usd_per_kw:
        cooling = cooling_usd_per_hour(
            price.cooling_usd_per_kw,
            _kw_per_gpu(pool),
            life_years=price.life_years,
            wacc_fraction=price.wacc_fraction,
            method=price.method,
        )
        parts.append(
            gpu_hour_rate_rows(
                name,
                hours,
                cooling,
                component="capital",
                basis="assumed",
                source="cooling and power distribution, annuity like the hardware's",
            )
        )
    if isinstance(price, Colocated):
        rent = colocation_usd_per_gpu_hour(
            usd_per_kw_month=price.usd_per_kw_month,
            kw_per_gpu=_kw_per_gpu(pool),
            usd_per_rack_month=price.rack_usd_per_month,
            gpus_per_rack=float(pool.machine_gpus),
        )
        hosting(rent, "colocation, per contracted kW (TDP and host at full load)")
    return parts


def _api(name: str, price: Api, hours: Hours, on: date) -> pa.Table:
    """Token prices; a provider's steps by prompt length are meters of their own (`api_meter`)."""
    meters = ("input_tokens", "cached_input_tokens", "output_tokens")
    if price.input_usd_per_mtok is not None and price.output_usd_per_mtok is not None:
        cached = first_written(price.cached_input_usd_per_mtok, price.input_usd_per_mtok)
        assert cached is not None
        written = dict(
            zip(meters, (price.input_usd_per_mtok, cached, price.output_usd_per_mtok), strict=True)
        )
        return api_rate_rows(name, hours, written, basis="assumed", source=WRITTEN)
    found = catalog.api_price(price.provider, price.model, on=on)
    source = "; ".join(
        p for p in (found.source, found.note, "older than half a year by then" * found.stale) if p
    )
    steps = {0: (found.input_usd_per_mtok, found.cached_input_usd_per_mtok, found.output_usd_per_mtok)}
    steps |= {
        t.above_input_tokens: (t.input_usd_per_mtok, t.cached_input_usd_per_mtok, t.output_usd_per_mtok)
        for t in found.tiers
    }
    prices = {
        api_meter(meter, above): usd
        for above, of in steps.items()
        for meter, usd in zip(meters, of, strict=True)
    }
    return api_rate_rows(name, hours, prices, basis="quoted", source=source)


def api_meter(meter: str, above_tokens: int) -> str:
    """Meter of tokens of requests whose prompt is longer than a price step.

    >>> api_meter("input_tokens", 0), api_meter("input_tokens", 200_000)
    ('input_tokens', 'input_tokens:above200000')
    """
    return f"{meter}:above{above_tokens}" if above_tokens else meter


def price_step(price: Api, on: date, prompt_tokens: float) -> int:
    """The price step (its lower end [tokens]) a prompt of that length falls in; 0 where the API has none."""
    if price.input_usd_per_mtok is not None:
        return 0
    steps = [t.above_input_tokens for t in catalog.api_price(price.provider, price.model, on=on).tiers]
    return max((above for above in steps if prompt_tokens > above), default=0)
