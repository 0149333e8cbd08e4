"""`GET /metrics`: the books of what happened, and how the service fares, for Prometheus.

Everything read from the ledger is a gauge over a window of closed hours and no counter: closing an hour again may
lower a sum (a demand charge is restated, a record comes late), which Prometheus would take for a restart and count
anew. Pools, models and tenants each have families of their own, whose sums are the whole; the names past the
`MOST_NAMES` that cost most are one, ``(other)``.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa
from fastapi import APIRouter, FastAPI, Request, Response

from pertoken import __version__
from pertoken.ledger import Ledger
from pertoken.meter import State
from pertoken.meter.attribute import BOOK
from pertoken.report.actual import DRIVERS, LedgerSource, compare_books
from pertoken.report.books import NVML, SCRAPED, WRITTEN
from pertoken.report.doctor import late_hours
from pertoken.units import (
    IDLE,
    JOULES_PER_KWH,
    METRICS,
    SECONDS_PER_HOUR,
    TOKEN_METERS,
    base_meter,
)
from pertoken.web._doors import Reader, ServiceHere, answers
from pertoken.web._exposition import FAMILIES, OPENMETRICS, SCOPES, TEXT, Page, wants_openmetrics
from pertoken.web.service import Service

__all__ = ["FAMILIES", "Exporter", "add_to", "router"]

MOST_NAMES = 20
"""Pools, models and tenants that have series of their own."""
MOST_SOURCES = 100
MOST_PLANS = 5
MOST_BUDGETS = 50
"""Budgets that have series of their own: those nearest their end."""
OTHER = "(other)"
NONE = "(none)"
"""Shown for a row without a name: to Prometheus an empty label is none, and a sum over names would miss it."""
_KEPT = (IDLE, "")
WINDOWS: dict[str, int] = {"1h": 1, "24h": 24, "30d": 24 * 30}
"""Windows by name, in hours back from the first hour that is not closed."""
SILENT_S = 300.0
_FRESH_S = 30.0
"""Figures change when an hour is closed: however many scrape, the ledger is asked this often."""
_CALLERS = 64

router = APIRouter()


_MTOK = tuple(name for name in METRICS if name.startswith("usd_per_mtok_"))
_JOULE = tuple(name for name in METRICS if name.startswith("joule_per_token_"))
_RATIOS = (*_MTOK, "utilisation", "slo_attainment")
_QUANTITIES: dict[str, tuple[str, float]] = {
    "requests": ("requests", 1),
    "gpu_hours": ("gpu_held_seconds", SECONDS_PER_HOUR),
    "energy_kwh": ("energy_joules", JOULES_PER_KWH),
    "it_energy_kwh": ("server_energy_joules", JOULES_PER_KWH),
    "gpu_energy_kwh": ("gpu_energy_joules", JOULES_PER_KWH),
    "gco2e": ("emissions_grams", 1),
}


class Exporter:
    """The page of a service. Figures of the ledger are kept for half a minute for all who scrape."""

    def __init__(self, service: Service, fresh_s: float = _FRESH_S) -> None:
        self._service, self._fresh_s = service, fresh_s
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[float, Page]] = OrderedDict()

    def page(self, tenant: str) -> Page:
        """What a tenant may see of its own; for no tenant in particular (empty) all, with the service's health."""
        asked_s, figures = self._figures(tenant)
        page = Page()
        page.put("build_info", 1, version=__version__)
        page.put("figures_age_seconds", max(0.0, time.monotonic() - asked_s))
        page.merge(figures)
        _budgets(page, self._service, tenant)
        if not tenant:
            _health(page, self._service)
        return page

    def _figures(self, tenant: str) -> tuple[float, Page]:
        with self._lock:
            found = self._kept.get(tenant)
            now_s = time.monotonic()
            if found is None or now_s - found[0] >= self._fresh_s:
                found = self._kept[tenant] = now_s, self._read(tenant)
            self._kept.move_to_end(tenant)
            while len(self._kept) > _CALLERS:
                self._kept.popitem(last=False)
        return found

    def _read(self, tenant: str) -> Page:
        page = Page()
        ledger, now = self._service.books.ledger, self._service.now()
        source = _Source(ledger)
        span = source.spans().get(BOOK)
        if span is None:
            return page
        current = now.replace(minute=0, second=0, microsecond=0)
        until = min(self._service.books.closed_until or span[1], current)
        page.put("closed_until_timestamp_seconds", until.timestamp())
        where = {"book": BOOK} | ({"tenant": tenant} if tenant else {})
        longest = _Window(ledger, where, until, "30d")
        kept = {scope: longest.costliest(scope) for scope in SCOPES if scope}
        for name in WINDOWS:
            window = _Window(ledger, where, until, name)
            for scope in SCOPES:
                window.fill(page, scope, kept.get(scope, frozenset()))
            if not tenant and window.priced:
                _plans(page, source, window)
        if not tenant:
            for row in longest.unpriced[:MOST_SOURCES]:
                labels = {"pool": str(row["pool"]), "meter": base_meter(str(row["meter"]))}
                page.put("unpriced_seconds", int(str(row["hours"])) * SECONDS_PER_HOUR, **labels)
        return page


class _Window:
    """The hours of a window, and their figures."""

    def __init__(self, ledger: Ledger, where: Mapping[str, str], until: datetime, name: str) -> None:
        self._ledger, self._where, self.name = ledger, where, name
        self.start, self.end = until - timedelta(hours=WINDOWS[name]), until
        self.unpriced = ledger.unpriced(BOOK, self.start, self.end)
        self.priced = not self.unpriced
        self._measured = self._pools_with("energy_kwh")

    def costliest(self, scope: str) -> frozenset[str]:
        """The names that have series of their own: what is idle, and those that cost most."""
        rows = self._ledger.cost(scope, where=self._where, start=self.start, end=self.end).to_pylist()
        used = self._ledger.usage(scope, where=self._where, start=self.start, end=self.end)[scope].to_pylist()
        usd = dict.fromkeys(used, 0) | {r[scope]: r["cost_usd"] for r in rows}
        ranked = sorted((n for n in usd if n not in (OTHER, NONE, *_KEPT)), key=lambda n: (-usd[n], n))
        always = [name for name in _KEPT if name in usd]
        return frozenset([*ranked[: MOST_NAMES - len(always)], *always])

    def fill(self, page: Page, scope: str, kept: frozenset[str]) -> None:
        """Put every figure of a scope: all (empty), or by pool, model or tenant."""
        by = [scope] if scope else []
        prefix = f"{scope}_" if scope else ""

        def labels(row: Mapping[str, Any]) -> dict[str, str]:
            name = str(row[scope]) if scope else ""
            return {scope: (name or NONE) if name in kept else OTHER} if scope else {}

        window = {"window": self.name}
        for row in self._sums(self._ledger.cost(*by, "category", **self._what())):
            page.put(
                f"{prefix}spend_usd",
                float(row["cost_usd"]),
                **window,
                **labels(row),
                category=row["category"],
            )
        others: set[str] = set()
        for row in self._sums(self._ledger.usage(*by, "phase", "meter", **self._what())):
            meter, amount = base_meter(row["meter"]), float(row["quantity"])
            if scope and row[scope] not in kept:
                others.add(row[scope])
            if meter in TOKEN_METERS:
                page.put(f"{prefix}tokens", amount, **window, **labels(row), meter=meter)
            elif meter in _QUANTITIES:
                name, factor = _QUANTITIES[meter]
                more = {"phase": row["phase"]} if meter == "gpu_hours" else {}
                page.put(f"{prefix}{name}", amount * factor, **window, **labels(row), **more)
        self._ratios(page, scope, self._metrics(by, {}), kept)
        if others:
            self._ratios(page, scope, self._metrics([], {scope: sorted(others)}), None)

    def _metrics(self, by: list[str], only: Mapping[str, list[str]]) -> Iterable[dict[str, Any]]:
        """Rows of the ratios; J per token of pools whose energy was measured alone: tokens of others would lower it."""
        asked: dict[str, Any] = {"by": by, "start": self.start, "end": self.end}
        where = {**self._where, **only}
        yield from self._ledger.metric(*_RATIOS, where=where, **asked).to_pylist()
        measured = sorted(self._measured.intersection(only.get("pool", self._measured)))
        yield from self._ledger.metric(*_JOULE, where={**where, "pool": measured}, **asked).to_pylist()

    def _pools_with(self, meter: str) -> frozenset[str]:
        what = self._what() | {"where": {**self._where, "meter": meter}}
        return frozenset(r["pool"] for r in self._ledger.usage("pool", **what).to_pylist() if r["quantity"])

    def _ratios(
        self, page: Page, scope: str, rows: Iterable[Mapping[str, Any]], kept: frozenset[str] | None
    ) -> None:
        prefix = f"{scope}_" if scope else ""
        for row in rows:
            if scope and kept is not None and row[scope] not in kept:
                continue
            labels = {"window": self.name}
            if scope:
                labels[scope] = OTHER if kept is None else str(row[scope]) or NONE
            for name, value in row.items():
                if value is None:
                    continue
                if name in _MTOK and self.priced:
                    page.put(f"{prefix}cost_per_mtok_usd", value, **labels, metric=name)
                elif name in _JOULE:
                    page.put(f"{prefix}energy_per_token_joules", value, **labels, metric=name)
                elif name in ("utilisation", "slo_attainment"):
                    page.put(f"{prefix}{name}_ratio", value, **labels)

    def _what(self) -> dict[str, Any]:
        return {"where": self._where, "start": self.start, "end": self.end}

    @staticmethod
    def _sums(table: pa.Table) -> Iterable[dict[str, Any]]:
        return (row for row in table.to_pylist() if "cost_usd" not in row or row["cost_usd"] is not None)


class _Source(LedgerSource):
    """Books of a ledger whose spans are looked up once."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self._spans = super().spans()

    def spans(self) -> dict[str, tuple[datetime, datetime]]:
        """By book, its first hour and the one after its last."""
        return self._spans


def _plans(page: Page, source: _Source, window: _Window) -> None:
    """Plans beside what happened, over the hours of the window that both have."""
    spans = source.spans()
    first, last = spans[BOOK]
    start, end = max(window.start, first), min(window.end, last)
    plans = [b for b, (begin, stop) in spans.items() if b != BOOK and max(begin, start) < min(stop, end)]
    plans.sort(key=lambda book: (spans[book][1], book), reverse=True)
    for book in plans[:MOST_PLANS]:
        total = compare_books(lambda _: source, books=(BOOK, book), by=("pool",), start=start, end=end).total
        labels = {"window": window.name, "book": book}
        page.put("plan_spend_usd", float(total.forecast_usd), **labels)
        page.put("plan_actual_spend_usd", float(total.actual_usd), **labels)
        for driver in DRIVERS:
            page.put("plan_variance_usd", float(getattr(total, f"{driver}_usd")), **labels, driver=driver)
        page.put("plan_tokens", total.forecast_tokens, **labels)
        page.put("plan_actual_tokens", total.actual_tokens, **labels)


def _budgets(page: Page, service: Service, tenant: str) -> None:
    """How budgets stand, from memory; a tenant's own alone."""
    standings = [s for s in service.budgets.standings or () if not tenant or s.budget.tenant == tenant]
    standings.sort(key=lambda s: (-max(s.spent_fraction, s.forecast_fraction or 0.0), s.budget.name))
    for standing in standings[:MOST_BUDGETS]:
        budget, forecast = standing.budget, standing.forecast
        named = {"budget": budget.name}
        unit = "usd" if budget.usd is not None else "tokens"
        about = {
            "tenant": budget.tenant or "(all)", "period": budget.period, "hard": str(budget.hard).lower(),
            "counts": budget.counts or "usd",
        }  # fmt: skip
        page.put("budget_info", 1, **named, **about)
        page.put(f"budget_limit_{unit}", float(budget.amount), **named)
        page.put(f"budget_spent_{unit}", float(standing.spent), **named)
        page.put("budget_spent_ratio", standing.spent_fraction, **named)
        for bound in ("expected", "low", "high") if forecast else ():
            figure = getattr(forecast, bound)
            page.put(f"budget_forecast_{unit}", float(figure), **named, bound=bound)
            page.put("budget_forecast_ratio", float(figure / budget.amount), **named, bound=bound)
        for window in standing.ground.burn:
            ratio = standing.burn_ratio(window)
            if ratio is not None:
                page.put("budget_burn_ratio", ratio, **named, window=window)
        if standing.runs_out is not None:
            page.put("budget_runs_out_timestamp_seconds", standing.runs_out.timestamp(), **named)
        page.put("budget_period_end_timestamp_seconds", standing.ground.period.end.timestamp(), **named)


def _health(page: Page, service: Service) -> None:
    """How the service fares: its sources, its journal, its closing, its alerts."""
    page.put("budgets_watched", 0 if service.budgets.problem else 1)
    for channel, failing in service.budgets.alarm.failing().items():
        page.put("alerts_failing", 1 if failing else 0, channel=channel)
    _sources(page, service)
    books, process = service.books, service.process()
    page.put("journal_writable", 0 if process.journal else 1)
    page.put("journal_damaged_bytes", sum(size for *_, size in books.journal.recovery.damaged))
    page.put("closing_failed", 1 if process.closing else 0)
    late = late_hours(books, service.now(), closes=process.closes)
    page.put("closing_late_seconds", len(late) * SECONDS_PER_HOUR)
    for reason, count in sorted(process.refused.items()):
        page.put("refused_batches", count, reason=reason)
    page.put("unknown_samples", sum(process.unknown_instances.values()))


def _sources(page: Page, service: Service) -> None:
    marks, sources, now_s = service.books.journal.marks, service.fleet.sources, service.now().timestamp()
    watched = service.scraper.watched()
    failing = {SCRAPED + w.target.name for w in watched if w.error}
    names = {SCRAPED + w.target.name for w in watched} | {WRITTEN + w.instance for w in sources.written}
    if sources.nvml_pool or sources.nvml_pools:
        names.add(NVML)
        failing |= {NVML} if service.health.nvml else set()
    ages = {n: now_s - State.from_bytes(marks[n]).last_s if n in marks else None for n in names}
    silent = {n for n, age in ages.items() if age is None or age > SILENT_S}
    for name in sorted(names, key=lambda n: (n not in silent, n not in failing, n))[:MOST_SOURCES]:
        kind, _, short = name.partition("/")
        labels = {"kind": kind, "source": short or "local GPUs"}
        page.put("source_silent", 1 if name in silent else 0, **labels)
        page.put("source_failing", 1 if name in failing else 0, **labels)
        age_s = ages[name]
        if age_s is not None:
            page.put("source_age_seconds", max(0.0, age_s), **labels)
    page.put("sources", len(names) - len(silent), state="telling")
    page.put("sources", len(silent), state="silent")


# Not in the OpenAPI document, which is of JSON alone.
@router.get("/metrics", responses=answers(401, 403, 429), include_in_schema=False)
async def metrics(request: Request, service: ServiceHere, caller: Reader) -> Response:
    """The page that Prometheus scrapes; OpenMetrics where it is asked for."""
    openmetrics = wants_openmetrics(request.headers.get("accept", ""))
    exporter: Exporter = request.app.state.exporter
    page = await asyncio.to_thread(lambda: exporter.page(caller.tenant).text(openmetrics))
    return Response(page.encode(), media_type=OPENMETRICS if openmetrics else TEXT)


def add_to(app: FastAPI, service: Service) -> None:
    """Give an application its `/metrics`."""
    app.state.exporter = Exporter(service)
    app.include_router(router)
