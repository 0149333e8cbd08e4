"""Energy: kWh by pool and phase, J per token with its boundary, and what a site's tariff and peak have to say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response

from pertoken.meter.attribute import BOOK
from pertoken.report._page import PALETTE, UTC_AXES, png
from pertoken.report._written import shown, utc_text
from pertoken.report.energy import BOUNDARIES, TOKENS, Energy, Price, SiteFacts, energy_of, site_facts
from pertoken.units import PHASES
from pertoken.web._doors import Reader, ServiceHere
from pertoken.web._drill import Drill, Drilling
from pertoken.web._frame import page
from pertoken.web.figures import csv_of, sql_of
from pertoken.web.service import Service

router = APIRouter(include_in_schema=False)
TWINS = ("json", "csv", "vl.json", "png", "sql")
_VEGA = "https://vega.github.io/schema/vega-lite/v6.json"
_JOULES = (
    ("Of an output token", "output", "joule_per_token_output"),
    ("Of an input token", "input", "joule_per_token_input"),
    ("Of a token, in or out", "input + output", "joule_per_token_total"),
)
_BEHIND = ["hour", "pool", "phase", "meter"]


@router.get("/energy")
async def energy(request: Request, service: ServiceHere, caller: Reader, drill: Drilling) -> Response:
    """The page; what is of a site and of no tenant only for who may see all."""
    return await asyncio.to_thread(_page, request, service, drill, bool(caller.tenant))


@router.get("/energy.{twin}")
async def energy_twin(service: ServiceHere, caller: Reader, drill: Drilling, twin: str) -> Response:
    """Its figure and its tables as data."""
    if twin not in TWINS:
        raise HTTPException(404, f"this page ends in one of .{', .'.join(TWINS)}, or in nothing")
    return await asyncio.to_thread(_twin, service, drill, twin, bool(caller.tenant))


def _found(service: Service, drill: Drill) -> Energy:
    asked = drill.asked
    return energy_of(service.books.ledger, _where(drill), asked["start"], asked["end"])


def _where(drill: Drill) -> Mapping[str, Sequence[str]]:
    return {k: v for k, v in drill.question.where.items() if k in ("pool", "model", "tenant", "phase")}


def _sites(service: Service, own: bool) -> tuple[SiteFacts, ...]:
    if own:
        return ()
    now = service.now()
    return site_facts(service.books.ledger, service.fleet, service.books.so_far(now), now)


def _page(request: Request, service: Service, drill: Drill, own: bool) -> Response:
    found, sites = _found(service, drill), _sites(service, own)
    by_site = {pool: name for name in sites for pool in name.pools}
    inside = drill.effective.query("start", "end", by=_BEHIND)
    return page(
        request,
        "energy.html",
        title="Energy",
        drill=drill,
        found=found,
        own=own,
        spec=_spec(found) if found.series else None,
        tiles=_tiles(found, drill, own),
        heads=[
            "Pool",
            *([] if own else ["Site"]),
            *_phases(found),
            *(f"all, {name}" for name in BOUNDARIES.values()),
        ],
        rows=_rows(found, by_site, own),
        total=_total(found, own),
        tokens=_tokens(found),
        unmeasured=_unmeasured(found, drill),
        boundaries=list(BOUNDARIES.values()),
        sites=[_site(site, found) for site in sites],
        behind=f"/v1/usage?{inside}",
        twins=TWINS,
        shown=shown,
    )


def _tiles(found: Energy, drill: Drill, own: bool) -> list[tuple[str, str, str, str]]:
    """Name, value, unit and address of each large figure."""
    asked = drill.effective

    def metric(name: str) -> str:
        return f"/figure/{name}?{asked.query(by=['hour'])}"

    behind = f"/v1/usage?{asked.query('start', 'end', by=_BEHIND)}"
    tiles = [("Energy", shown(found.kwh()), "kWh at the utility meter", behind)]
    for name, kind, figure in _JOULES:
        tiles.append((name, shown(found.joule_per_token(kind)), "J at the utility meter", metric(figure)))
    if not own:
        tiles.append(
            ("PUE", shown(found.pue()), "kWh at the utility meter per kWh at the servers' plugs", "")
        )
    if found.co2e_kg is not None:
        tiles.append(
            (
                "Carbon",
                shown(found.co2e_kg),
                "kg CO2e at the grid's stated intensity",
                metric("gco2e_per_mtok_total"),
            )
        )
    return tiles


def _phases(found: Energy) -> list[str]:
    return [phase for phase in PHASES if found.kwh("energy_kwh", phase) is not None]


def _pools(found: Energy) -> list[str]:
    return sorted({use.pool for use in found.uses})


def _rows(found: Energy, by_site: Mapping[str, SiteFacts], own: bool) -> list[list[str]]:
    rows = []
    for pool in _pools(found):
        site = [] if own else [by_site[pool].name if pool in by_site else "–"]
        phases = [shown(found.kwh("energy_kwh", phase, [pool])) for phase in _phases(found)]
        rows.append([pool, *site, *phases, *(shown(found.kwh(name, pools=[pool])) for name in BOUNDARIES)])
    return rows


def _total(found: Energy, own: bool) -> list[str]:
    phases = [shown(found.kwh("energy_kwh", phase)) for phase in _phases(found)]
    return ["all", *([] if own else [""]), *phases, *(shown(found.kwh(name)) for name in BOUNDARIES)]


def _tokens(found: Energy) -> list[list[str]]:
    """J per token of each kind that was counted, at each boundary."""
    return [
        [f"{kind} token", *(shown(found.joule_per_token(kind, name)) for name in BOUNDARIES)]
        for kind in TOKENS
        if any(found.joule_per_token(kind, name) is not None for name in BOUNDARIES)
    ]


def _without(found: Energy, boundary: str) -> list[str]:
    """Pools whose tokens make J per token at a boundary too small; none where it is not measured at all."""
    return [] if found.kwh(boundary) is None else found.unmeasured(boundary)


def _unmeasured(found: Energy, drill: Drill) -> list[tuple[str, str, str]]:
    """Where J per token is too small, of which pools, and the address of the page without them."""
    rows = []
    for name, where in BOUNDARIES.items():
        if pools := _without(found, name):
            measured = sorted({use.pool for use in found.uses if name in use.kwh})
            rows.append((where, ", ".join(pools), f"/energy?{drill.query(by=[], pool=measured)}"))
    return rows


def _site(site: SiteFacts, found: Energy) -> dict[str, Any]:
    """What the page says of a site."""
    return {
        "facts": site,
        "pue": shown(found.pue(site.pools)),
        "spec": _price_spec(site) if site.prices else None,
        "prices": [
            [_local(price), f"{price.at:%H:%M}", price.band, f"{price.usd_per_kwh:.5f}"] for price in site.prices
        ],
        "peaks": [
            [
                peak.charge, shown(peak.metered_kw), f"{peak.at:%Y-%m-%d %H:%M}" if peak.at else "–", peak.local or "–",
                shown(peak.billed_kw), f"{peak.cost_usd:,.2f}", shown(peak.more_kw), f"{peak.more_usd:,.2f}",
            ]
            for peak in site.peaks
        ],
        "demand_usd": f"{sum(peak.cost_usd for peak in site.peaks):,.2f}",
    }  # fmt: skip


def _local(price: Price) -> str:
    return f"{price.local} (now)" if price.now else price.local


def _spec(found: Energy) -> dict[str, Any]:
    """kWh of each hour or day, pools on top of one another."""
    values = [{"at": utc_text(at), "pool": pool, "kwh": kwh} for at, pool, kwh in found.series]
    unit = "yearmonthdatehours" if found.step == "hour" else "yearmonthdate"
    return {
        "$schema": _VEGA,
        "data": {"values": values},
        "mark": {"type": "bar"},
        "encoding": {
            "x": {"field": "at", "timeUnit": f"utc{unit}", **UTC_AXES[found.step]},
            "y": {
                "field": "kwh",
                "type": "quantitative",
                "title": "kWh at the utility meter",
                "stack": "zero",
            },
            "color": {"field": "pool", "type": "nominal", "scale": {"range": list(PALETTE)}},
        },
        "width": "container",
        "height": 300,
    }


def _price_spec(site: SiteFacts) -> dict[str, Any]:
    """The price of each hour of the site's day, in the colour of its band."""
    values = [{"hour": _local(p), "band": p.band, "price": p.usd_per_kwh} for p in site.prices]
    return {
        "$schema": _VEGA,
        "data": {"values": values},
        "mark": {"type": "bar"},
        "encoding": {
            "x": {"field": "hour", "type": "ordinal", "sort": None, "title": f"hour in {site.timezone}"},
            "y": {"field": "price", "type": "quantitative", "title": "USD/kWh"},
            "color": {"field": "band", "type": "nominal", "scale": {"range": list(PALETTE)}},
        },
        "width": "container",
        "height": 180,
    }


def _twin(service: Service, drill: Drill, twin: str, own: bool) -> Response:
    if twin == "sql":
        asked = {**drill.asked, "where": {"book": [BOOK], **_where(drill)}}
        kwh = {**asked, "where": {**asked["where"], "meter": ["energy_kwh"]}}
        return sql_of(
            service.books.ledger,
            {
                "kWh at the utility meter by hour and pool": ("quantity", ["hour", "pool"], kwh),
                "energy at each boundary and tokens": ("quantity", ["pool", "phase", "meter"], asked),
            },
        )
    found = _found(service, drill)
    rows = [{found.step: utc_text(at), "pool": pool, "energy_kwh": kwh} for at, pool, kwh in found.series]
    if twin == "csv":
        return Response(csv_of([found.step, "pool", "energy_kwh"], rows), media_type="text/csv")
    if twin == "vl.json":
        return Response(json.dumps(_spec(found)), media_type="application/json")
    if twin == "png":
        return Response(png(_spec(found)), media_type="image/png")
    answer = {
        "unit": "kWh at the utility meter", "formula": "Σ energy_kwh", "where": drill.question.where,
        "url": f"/energy?{drill.query(by=[])}",
        "rows_behind": f"/v1/usage?{drill.effective.query('start', 'end', by=_BEHIND)}",
        "rows": rows, "uses": [asdict(use) for use in found.uses],
        "joule_per_token": {
            kind: {where: found.joule_per_token(kind, name) for name, where in BOUNDARIES.items()} for kind in TOKENS
        },
        "tokens_without_energy": {where: _without(found, name) for name, where in BOUNDARIES.items()},
        "co2e_kg": found.co2e_kg,
    }  # fmt: skip
    if not own:
        answer["pue"] = found.pue()
        answer["sites"] = [asdict(site) for site in _sites(service, own)]
    return Response(json.dumps(answer, default=utc_text), media_type="application/json")
