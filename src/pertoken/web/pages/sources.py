"""Sources: what doctor finds and what to do about it, who tells the meter what, the journal, which hours are open."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from pertoken.report._written import counted, utc_told
from pertoken.report.doctor import KINDS, Complaint, Diagnosis, examine
from pertoken.report.sources import TO_DO, WAYS, Source, Target, sources_of
from pertoken.units import HOURS_PER_DAY, MINUTES_PER_HOUR, SECONDS_PER_HOUR
from pertoken.web._doors import ServiceHere, WholeReader
from pertoken.web._frame import page
from pertoken.web.service import Service

router = APIRouter(include_in_schema=False)
_SPANS = {1: "1 h", 6: "6 h", 24: "24 h", 24 * 7: "7 days"}
_KEPT_S = 5.0
_MOST_HOURS = 50
"""Open and unpriced hours that are listed one by one."""


@dataclass
class _Kept:
    """The newest diagnosis of each span: however many reload the page, one is made at a time."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    found: dict[int, tuple[float, Diagnosis]] = field(default_factory=dict)

    def diagnosis(self, service: Service, hours: int) -> Diagnosis:
        with self.lock:
            known = self.found.get(hours)
            if known is not None and time.monotonic() - known[0] < _KEPT_S:
                return known[1]
            found = examine(service.books, service.now(), hours=hours, process=service.process())
            self.found = {hours: (time.monotonic(), found)}
            return found


@router.get("/sources")
async def sources(
    request: Request,
    service: ServiceHere,
    caller: WholeReader,
    hours: Annotated[int, Query(ge=1, le=HOURS_PER_DAY * 366)] = HOURS_PER_DAY,
) -> Response:
    """The page, of the last full hours. As data it is ``/v1/doctor``."""
    state = request.app.state
    kept: _Kept | None = getattr(state, "sources", None)
    if kept is None:
        kept = state.sources = _Kept()
    return await asyncio.to_thread(_page, request, service, kept, hours)


def _page(request: Request, service: Service, kept: _Kept, hours: int) -> Response:
    now, books, process = service.now(), service.books, service.process()
    books.follow(now)
    diagnosis = kept.diagnosis(service, hours)
    targets = [Target(w.target.name, w.target.pool, w.interval_s, w.error) for w in service.scraper.watched()]
    heard = sources_of(service.fleet, books.journal.marks, books.last_words, targets, process, now)
    due = [hour for hour in books.due(now) if hour not in books.unpriced]
    return page(
        request,
        "sources.html",
        title="Sources",
        now=now,
        hours=hours,
        spans=[(name, f"hours={span}", span == hours) for span, name in _SPANS.items()],
        groups=_groups(diagnosis),
        facts=diagnosis.facts,
        sources=[_row(source) for source in heard],
        counts={
            state: sum(s.state == state for s in heard) for state in ("failing", "never", "silent", "telling")
        },
        journal=_journal(service, process.journal),
        closing=process.closing,
        closed_until=books.closed_until,
        due=[f"{hour:%Y-%m-%d %H:%M}" for hour in due[:_MOST_HOURS]],
        due_more=max(0, len(due) - _MOST_HOURS),
        unpriced=[
            (f"{hour:%Y-%m-%d %H:%M}", why) for hour, why in sorted(books.unpriced.items())[:_MOST_HOURS]
        ],
        unpriced_more=max(0, len(books.unpriced) - _MOST_HOURS),
        refresh=f"/sources?hours={hours}",
    )


def _groups(diagnosis: Diagnosis) -> list[tuple[str, str, list[list[str]]]]:
    """Complaints by severity, with what each kind means and what mends it."""
    about = {
        "wrong": "Figures lack something until these are mended",
        "look": "Figures hold, with a caveat",
    }
    found = []
    for severity, caption in about.items():
        rows = [
            [c.kind, c.pool or "–", _found(c), f"{c.hours}" if c.hours > 1 else "–", TO_DO[c.kind]]
            for c in diagnosis.complaints
            if c.severity == severity
        ]
        if rows:
            found.append((severity, caption, rows))
    return found


def _found(complaint: Complaint) -> str:
    """What was found; a finding that says nothing but what to do has that in the column beside it."""
    return KINDS[complaint.kind] if complaint.text == TO_DO[complaint.kind] else complaint.text


def _row(source: Source) -> list[str]:
    return [
        source.state,
        WAYS[source.way],
        source.name,
        source.pool or "–",
        f"{source.last:%Y-%m-%d %H:%M:%S}" if source.last else "never",
        _length(source.silent_s),
        f"{source.interval_s:g} s" if source.interval_s else "–",
        source.error or "–",
    ]


def _length(seconds: float | None) -> str:
    """A length of time in the unit that suits it."""
    if seconds is None:
        return "–"
    for size, unit in (
        (SECONDS_PER_HOUR * HOURS_PER_DAY, "d"),
        (SECONDS_PER_HOUR, "h"),
        (MINUTES_PER_HOUR, "min"),
    ):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _journal(service: Service, problem: str) -> list[tuple[str, Any]]:
    recovery, kept = service.books.journal.recovery, service.books.kept_from
    lost = sum(size for *_, size in recovery.damaged)
    return [
        ("Takes what is sent", f"no: {problem}" if problem else "yes"),
        (
            "When it was opened",
            f"{counted(recovery.segments, 'segment')}, {counted(recovery.rows, 'record')}",
        ),
        ("Cut at its end then", f"{counted(recovery.torn_bytes, 'byte')} that were never acknowledged"),
        ("Damaged", f"{counted(lost, 'byte')} that were acknowledged" if lost else "nothing"),
        ("Records are kept from", f"{kept}" if kept else "the first one on"),
        ("Running since", _since(service.health.started_s, service.now())),
    ]


def _since(started_s: float, now: datetime) -> str:
    running = timedelta(seconds=max(0.0, now.timestamp() - started_s))
    return f"{utc_told(now - running)}, {_length(running.total_seconds())}"
