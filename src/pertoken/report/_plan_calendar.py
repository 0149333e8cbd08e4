"""A plan's schedule for machines and for people: what runs when, as rows, CronJob-style changes and
iCalendar."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import numpy as np

from pertoken.plan.schedule import Plan
from pertoken.tables import Floats

_HOUR = timedelta(hours=1)
_LINE_OCTETS = 75
"""Longest line of an iCalendar file (RFC 5545, 3.1)."""


@dataclass(frozen=True)
class Run:
    """So many units of one kind on one pool from one UTC hour to another."""

    pool: str
    what: str
    start: datetime
    end: datetime
    count: int
    kind: str
    """``units`` (replicas, a job) or ``machines`` (where loads share machines)."""


def runs(found: Plan) -> list[Run]:
    """Everything that runs, as spans of constant count, in order of start."""
    i, s = found.instance, found.schedule
    spans: list[Run] = []
    for k, name in enumerate(i.unit_names):
        if i.unit_whole[k]:
            spans += _spans(found, i.pool_names[i.unit_pool[k]], name, s.units[k], "units")
    for p, name in enumerate(i.pool_names):
        if i.machine_gpus[p] > 0 and not i.unit_whole[i.unit_pool == p].all():
            spans += _spans(found, name, f"machines of {name}", s.machines[p], "machines")
    return sorted(spans, key=lambda r: (r.start, r.pool, r.what))


def _spans(found: Plan, pool: str, what: str, count: Floats, kind: str) -> Iterator[Run]:
    edges = np.flatnonzero(np.diff(count, prepend=0.0, append=0.0))
    hours = [_moment(h) for h in found.instance.hours]
    hours.append(hours[-1] + _HOUR)
    for a, b in pairwise(edges):
        if count[a] > 0:
            yield Run(pool, what, hours[a], hours[b], round(float(count[a])), kind)


def _moment(hour: np.datetime64) -> datetime:
    seconds = int(hour.astype("datetime64[s]").astype(np.int64))
    return datetime.fromtimestamp(seconds, UTC)


def cron_rows(found: Plan) -> list[dict[str, str]]:
    """Changes as rows for a suspend-and-resume calendar: five cron fields (UTC), the action and the replicas
    after it.

    One row per change; the `date` says which year's, as cron has none.
    """
    changes: dict[tuple[datetime, str, str], int] = {}
    for run in runs(found):
        changes.setdefault((run.end, run.pool, run.what), 0)
        changes[run.start, run.pool, run.what] = run.count
    rows, before = [], dict[tuple[str, str], int]()
    for (moment, pool, what), count in sorted(changes.items()):
        was = before.get((pool, what), 0)
        before[pool, what] = count
        action = "resume" if was == 0 else "suspend" if count == 0 else "scale"
        rows.append(
            {
                "schedule": f"{moment.minute} {moment.hour} {moment.day} {moment.month} *",
                "date": moment.strftime("%Y-%m-%dT%H:%MZ"),
                "pool": pool,
                "target": what,
                "action": action,
                "replicas": str(count),
            }
        )
    return rows


def icalendar(found: Plan) -> str:
    """The schedule as an iCalendar file (RFC 5545): one event per span of constant count, times in UTC."""
    stamp = _moment(found.instance.hours[0]).strftime("%Y%m%dT%H%M%SZ")
    lines = ["BEGIN:VCALENDAR", "VERSION:2.0", "PRODID:-//PerToken//plan//EN", "CALSCALE:GREGORIAN"]
    for run in runs(found):
        title = run.what if run.count == 1 else f"{run.count} × {run.what}"
        identity = f"{found.instance.name}|{run.pool}|{run.what}|{run.start.isoformat()}"
        lines += [
            "BEGIN:VEVENT",
            f"UID:{hashlib.sha256(identity.encode()).hexdigest()[:32]}@pertoken",
            f"DTSTAMP:{stamp}",
            f"DTSTART:{run.start.strftime('%Y%m%dT%H%M%SZ')}",
            f"DTEND:{run.end.strftime('%Y%m%dT%H%M%SZ')}",
            f"SUMMARY:{_escaped(title)}",
            f"LOCATION:{_escaped(run.pool)}",
            "END:VEVENT",
        ]
    lines.append("END:VCALENDAR")
    return "".join(f"{part}\r\n" for line in lines for part in _folded(line))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace(";", "\\;").replace(",", "\\,").replace("\n", "\\n")


def _folded(line: str) -> Iterator[str]:
    """A line cut so that no part is longer than 75 octets, never inside a character."""
    part, size = "", 0
    for character in line:
        octets = len(character.encode())
        if size + octets > _LINE_OCTETS:
            yield part
            part, size = " ", 1
        part, size = part + character, size + octets
    yield part
