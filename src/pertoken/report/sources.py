"""Who tells the meter what: each source with its last word and its silence, and what to do about a complaint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from pertoken.fleet import RunningFleet
from pertoken.meter import State
from pertoken.report.books import NVML, SCRAPED, WRITTEN
from pertoken.report.doctor import Process

SILENT_S = 300.0
"""After this long without a word a source of counters is silent."""
Standing = Literal["telling", "silent", "failing", "never"]
WAYS: dict[str, str] = {
    "scrape": "page of metrics we fetch",
    "written": "remote write or OTLP metrics sent to us",
    "nvml": "this machine's GPUs",
    "usage": "usage events sent to us",
    "gateway": "a router's counters",
    "training": "a training run's log",
    "bill": "hours held, imported",
    "site": "a utility meter, imported",
}
"""How a source reaches us, by the first part of its name."""
_COUNTERS = ("scrape", "written", "nvml")

TO_DO: dict[str, str] = {
    "silent": "see that it runs and that its address in the fleet file answers; its gap is booked as unseen until then",
    "unpriced": "give the fleet file the price (0 if free): its hours close by themselves within a minute",
    "disagree": "find out which of the two is right; the source of record alone is booked",
    "gap": "nothing if it was a restart; else scrape more often or see its network",
    "unmatched": "name the pool in the event, or the model of the target",
    "unknown_pool": "add the pool to the fleet file, or correct the name the sender gives",
    "unknown_instance": "name it under sources.written, or stop sending it",
    "no_gpu_hours": "give its targets gpus, scrape its GPUs, or import its bill",
    "no_energy": "scrape dcgm-exporter or Kepler, or read NVML",
    "overcommitted": "correct the pool's count or its targets' gpus",
    "twice": "drop one of the two from the fleet file",
    "two_names": "give the targets the same model name, by `names` or `model` in the fleet file",
    "unused": "see the reason behind it: what is not booked is not paid for in the books either",
    "assumed_phase": "use an engine that tells prefill and decode time, or name its GPU so that it can be predicted",
    "journal": "free or mend its disk; what was acknowledged stays, unless the text says otherwise",
    "disk": "free some space: below 64 MiB nothing more is taken",
    "clock": "run an NTP client here and where events are made",
    "closing": "run `pertoken close`, or see the reason beside it",
    "alerts": "see the channel's address and its answer",
}
"""What mends a complaint of a kind, one for each of doctor's `KINDS`."""


@dataclass(frozen=True)
class Target:
    """A target that is fetched, with what became of its last scrape."""

    name: str
    pool: str
    interval_s: float
    error: str = ""


@dataclass(frozen=True)
class Source:
    """One source: `last` is the newest time it told of, `silent_s` how long ago that was [s]."""

    way: str
    name: str
    pool: str = ""
    interval_s: float | None = None
    last: datetime | None = None
    silent_s: float | None = None
    error: str = ""

    @property
    def state(self) -> Standing:
        """Senders of events are silent when nobody asks: they alone may be so for as long as they like."""
        if self.error:
            return "failing"
        if self.last is None:
            return "never"
        quiet = self.way in _COUNTERS and self.silent_s is not None and self.silent_s > SILENT_S
        return "silent" if quiet else "telling"


def sources_of(
    fleet: RunningFleet,
    marks: Mapping[str, bytes],
    heard: Mapping[str, datetime],
    targets: Iterable[Target],
    process: Process,
    now: datetime,
) -> list[Source]:
    """Every source the fleet and file_sd files name now, and senders that were heard, the troubled first.

    Parameters: marks of the journal, which hold the states of counters; heard, by source of the records, its newest
    time; targets, fetched now.
    """
    named: dict[str, tuple[str, float | None, str]]
    named = {SCRAPED + t.name: (t.pool, t.interval_s, t.error) for t in targets}
    named |= {WRITTEN + w.instance: (w.pool, None, "") for w in fleet.sources.written}
    if fleet.sources.nvml_pool or fleet.sources.nvml_pools:
        named[NVML] = (fleet.sources.nvml_pool, None, process.nvml)
    found = []
    for key, (pool, interval_s, error) in named.items():
        way, _, name = key.partition("/")
        last_s = State.from_bytes(marks[key]).last_s if key in marks else 0.0
        last = datetime.fromtimestamp(last_s, UTC) if last_s else None
        found.append(_source(now, way, name or "local GPUs", pool, interval_s, last, error))
    # What left its file_sd file, or the fleet file, owes nothing more: neither it nor what it told of is listed.
    left = {mark for mark in marks if mark.startswith((SCRAPED, WRITTEN, NVML))}
    known = {name.partition("/")[2] for name in {*named, *left}}
    for source, moment in heard.items():
        way, _, name = source.partition("/")
        if way in WAYS and name not in known:
            found.append(_source(now, way, name, "", None, moment, ""))
    order = ["failing", "never", "silent", "telling"]
    return sorted(found, key=lambda s: (order.index(s.state), s.way, s.name))


def _source(
    now: datetime, way: str, name: str, pool: str, interval_s: float | None, last: datetime | None, error: str
) -> Source:
    silent_s = None if last is None else max(0.0, (now - last).total_seconds())
    return Source(way, name, pool, interval_s, last, silent_s, error)
