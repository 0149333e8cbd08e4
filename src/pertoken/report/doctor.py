"""`doctor`: what is wrong with the books, and what to do about it.

Silent sources, usage without a rate, totals on which two sources disagree, records nobody can place, and the state of
the journal, the disk and the clock. Everything but the health of a running process is read from the books anew.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pertoken.errors import InputError
from pertoken.fleet import RunningFleet
from pertoken.meter import State
from pertoken.meter.attribute import BOOK, FINDINGS, Finding
from pertoken.report.books import CATCH_UP_HOURS, HOUR, IMPORTED, NVML, SCRAPED, WRITTEN, Books, Look

Severity = Literal["wrong", "look"]
KINDS: dict[str, str] = {
    "silent": "a source that should tell and does not",
    "unpriced": "usage that no rate prices: its hours stay open",
    **FINDINGS,
    "unknown_instance": "remote-written series of an instance the fleet file does not name",
    "journal": "the journal was damaged, or takes nothing",
    "disk": "little space is left",
    "clock": "the clock jumped, or senders' clocks are off",
    "closing": "hours that should be closed are not",
    "alerts": "budgets are not watched, or an alert could not be delivered",
}
"""What doctor looks for, by name."""

_SILENT_S = 300.0
_WRONG = (
    "silent",
    "unpriced",
    "journal",
    "disk",
    "closing",
    "unknown_pool",
    "unmatched",
    "overcommitted",
    "alerts",
)
_AT_ONCE = ("unknown_pool", "assumed_phase")
"""Findings of the running hour that do not get better by its end; of the others it is too early to speak."""
_IN_NO_FIGURE = ("unknown_pool", "unmatched")
"""Findings that are looked for as far back as records are kept and cheap to read: what they are of is in no figure."""
_LOW_BYTES = 1 << 30
_MOST = 200
_FIGURE = re.compile(r"(?<![^\s(])[\d.,]*\d%?(?![^\s,;:.)])")


@dataclass(frozen=True)
class Complaint:
    """One thing to mend or to know. `amount` is in what the text names; `hours` is how many hours show it."""

    kind: str
    text: str
    pool: str = ""
    amount: float = 0.0
    hours: int = 0

    @property
    def severity(self) -> Severity:
        """`wrong`: figures lack something until it is mended; `look`: they hold, with a caveat."""
        return "wrong" if self.kind in _WRONG else "look"


@dataclass(frozen=True)
class Process:
    """What only a running service knows."""

    closes: bool = False
    """Whether it closes hours by itself, those that late records came to within a minute."""
    clock_jumps: Sequence[tuple[float, float]] = ()
    unknown_instances: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    closing: str = ""
    journal: str = ""
    nvml: str = ""
    budgets: str = ""
    """Why the budgets could not be looked at."""
    alerts: dict[str, str] = field(default_factory=dict)
    """Why a channel was not told, by its name."""
    errors: dict[str, str] = field(default_factory=dict)
    """Why a target's newest scrape failed, by its name."""
    targets: frozenset[str] = frozenset()
    """What is scraped now, those of file_sd files too."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found, worst first, and facts beside it."""

    complaints: tuple[Complaint, ...]
    facts: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = [
            {
                "severity": c.severity, "kind": c.kind, "pool": c.pool, "text": c.text, "amount": c.amount,
                "hours": c.hours,
            }
            for c in self.complaints
        ]  # fmt: skip
        return {"complaints": found, "facts": dict(self.facts)}

    def __str__(self) -> str:
        return told(self.to_dict())


def told(diagnosis: dict[str, Any]) -> str:
    """A diagnosis, as `Diagnosis.to_dict` gives it, in lines for a terminal; control characters shown, not sent."""
    lines = [f"{name}: {value}" for name, value in diagnosis["facts"].items()]
    lines.append("")
    if not diagnosis["complaints"]:
        lines.append("nothing to complain of")
    for one in diagnosis["complaints"]:
        pool = f" [{one['pool']}]" if one["pool"] else ""
        hours = f" ({one['hours']} h)" if one["hours"] > 1 else ""
        lines.append(f"{one['severity']:5} {one['kind']}{pool}: {one['text']}{hours}")
    return "\n".join(_printable(line) for line in lines)


def examine(books: Books, now: datetime, *, hours: int = 24, process: Process | None = None) -> Diagnosis:
    """Look at the books and at the last `hours` full hours before `now`, further back for records in no figure.

    Raises InputError on fewer than one hour or more than a year of them.
    """
    if not 1 <= hours <= 24 * 366:
        raise InputError(f"{hours} hours cannot be looked at: give 1 to {24 * 366}")
    current = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    first = books.first_hour() or current
    window = [hour for back in range(hours, 0, -1) if (hour := current - HOUR * back) >= first]
    alive = process or Process()
    books.follow(now)
    looks = {hour: books.look(hour) for hour in [*window, current]}
    before = [books.look(hour) for hour in books.elsewhere(looks)]
    found = [
        *_silent(books, now, alive),
        *_silent_senders(books, looks, current),
        *_unpriced(books),
        *_findings(
            [f for look in before for f in look.findings if f.kind in _IN_NO_FIGURE]
            + [
                f
                for hour, look in looks.items()
                for f in look.findings
                if hour < current or f.kind in _AT_ONCE
            ]
        ),
        *_journal(books, alive),
        *_clock(alive),
        *_open_hours(books, now, alive),
        *_alerts(alive),
    ]
    found += [
        Complaint("unknown_instance", f"{name!r}: name it under sources.written", amount=count)
        for name, count in sorted(alive.unknown_instances.items())
    ]
    found.sort(key=lambda c: (c.severity != "wrong", list(KINDS).index(c.kind), c.pool, c.text))
    return Diagnosis(tuple(found[:_MOST]), _facts(books, now))


def _silent(books: Books, now: datetime, alive: Process) -> Iterable[Complaint]:
    marks = books.journal.marks
    expected = {WRITTEN + w.instance for w in books.fleet.sources.written} | _scraped(books.fleet)
    if books.fleet.sources.nvml_pool or books.fleet.sources.nvml_pools:
        expected.add(NVML)
    expected |= {SCRAPED + name for name in {*alive.errors, *alive.targets}}
    # What left its file_sd file, or the fleet file, owes nothing more; without a service nobody knows what has.
    recent_s = (now - HOUR).timestamp()
    if not alive.closes and books.fleet.sources.files:
        expected |= {
            n for n in marks if n.startswith(SCRAPED) and State.from_bytes(marks[n]).last_s > recent_s
        }
    for name in sorted(expected):
        last_s = State.from_bytes(marks[name]).last_s if name in marks else 0.0
        kind, _, short = name.partition("/")
        why = alive.errors.get(short, "") if name.startswith(SCRAPED) else ""
        why = alive.nvml if name == NVML else why
        tail = f": {why}" if why else ""
        silent_s = now.timestamp() - last_s
        if not last_s:
            yield Complaint("silent", f"{kind} {short or 'local GPUs'} was never read{tail}")
        elif silent_s > _SILENT_S:
            since = datetime.fromtimestamp(last_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
            text = f"{kind} {short or 'local GPUs'} has told nothing since {since}{tail}"
            yield Complaint("silent", text, amount=round(silent_s))


def _scraped(fleet: RunningFleet) -> set[str]:
    return {SCRAPED + target.called for target in fleet.sources.scrape}


def _silent_senders(books: Books, looks: Mapping[datetime, Look], current: datetime) -> Iterable[Complaint]:
    """Senders of events that told something in the window and nothing in its last two hours or since."""
    last: dict[str, datetime] = {}
    files = {name.removeprefix(IMPORTED) for name in books.journal.marks if name.startswith(IMPORTED)}
    for hour, look in looks.items():
        last |= {name: hour for name in look.sources if name.startswith("usage/") and name not in files}
    for source, hour in sorted(last.items()):
        if hour < current - 2 * HOUR:
            since = (hour + HOUR).strftime("%Y-%m-%d %H:%M UTC")
            yield Complaint("silent", f"no event from {source!r} since {since}")


def _unpriced(books: Books) -> Iterable[Complaint]:
    for row in books.ledger.unpriced(BOOK):
        first = row["first_hour"]
        assert isinstance(first, datetime)
        text = f"{row['meter']} has no rate from {first:%Y-%m-%d %H:%M UTC} on: give the fleet its price, 0 if free"
        yield Complaint("unpriced", text, str(row["pool"]), hours=int(str(row["hours"])))


def _findings(findings: Iterable[Finding]) -> Iterable[Complaint]:
    """Attribution's findings, the same of several hours told once: the newest text, the amounts added up."""
    grouped: dict[tuple[str, str, str], list[Any]] = defaultdict(list)
    for one in findings:
        # Texts hold figures: what is alike but for these is the same complaint. Digits of a name are no figure.
        shape = _FIGURE.sub("#", one.text)
        grouped[one.kind, one.pool, shape].append(one)
    for (kind, pool, _), group in grouped.items():
        total = sum(one.amount for one in group)
        text = group[-1].text if len(group) == 1 or not total else f"{group[-1].text}; {total:.6g} in all"
        yield Complaint(kind, text, pool, total, len(group))


def _journal(books: Books, alive: Process) -> Iterable[Complaint]:
    recovery = books.journal.recovery
    if alive.journal:
        yield Complaint("journal", alive.journal)
    if recovery.torn_bytes:
        text = f"{recovery.torn_bytes} bytes at the end were cut when it was opened: a write was cut off by a crash; "
        yield Complaint("journal", text + "nothing acknowledged was in them", amount=recovery.torn_bytes)
    for name, offset, size in recovery.damaged:
        text = f"{name}: {size} bytes at {offset} fail their checksum: the disk lost records that were acknowledged"
        yield Complaint("journal", text, amount=size)
    free = _free_bytes(books)
    if free is not None and free < _LOW_BYTES:
        yield Complaint("disk", f"{free // (1 << 20)} MiB are left: free some", amount=free)


def _clock(alive: Process) -> Iterable[Complaint]:
    for wall_s, jump_s in alive.clock_jumps:
        when = datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
        yield Complaint("clock", f"this machine's clock jumped by {jump_s:+.0f} s at {when}", amount=jump_s)
    for why, count in sorted(alive.refused.items()):
        kind = "clock" if "time" in why else "journal"
        yield Complaint(
            kind, f"{count} batches were refused, and stayed with their senders: {why}", amount=count
        )


def late_hours(books: Books, now: datetime, *, closes: bool) -> list[datetime]:
    """Hours that were over for 15 minutes and are not closed, oldest first, those without a price left out.

    `closes`: a running service closes by itself: hours that late records came to are closed again within a minute.
    """
    until = books.closed_until if closes else None
    due = books.due(now - timedelta(minutes=15))
    return [hour for hour in due if hour not in books.unpriced and not (until and hour < until)]


def _open_hours(books: Books, now: datetime, alive: Process) -> Iterable[Complaint]:
    if alive.closing:
        yield Complaint("closing", alive.closing)
    late = late_hours(books, now, closes=alive.closes)
    if late:
        text = f"{late[0]:%Y-%m-%d %H:%M UTC} is the oldest: run `pertoken close`, or start `pertoken serve`"
        yield Complaint("closing", text, hours=len(late))
    yield from _old_hours(books, now, alive)


def _old_hours(books: Books, now: datetime, alive: Process) -> Iterable[Complaint]:
    """Hours from before those that are closed, which a running service catches up on by and by."""
    if books.stuck:
        yield Complaint("closing", books.stuck)
    behind = books.behind(now) if alive.closes and not books.stuck else []
    if len(behind) > CATCH_UP_HOURS:
        text = f"from {behind[0]:%Y-%m-%d %H:%M UTC} on, from the newest back, {CATCH_UP_HOURS} hours a minute: wait"
        yield Complaint("closing", text, hours=len(behind))
    gone = books.too_late()
    if gone:
        text = f"records came for {gone[0]:%Y-%m-%d %H:%M UTC}, whose day is no longer kept: they are in no figure"
        yield Complaint("closing", text, hours=len(gone))


def _alerts(alive: Process) -> Iterable[Complaint]:
    if alive.budgets:
        yield Complaint("alerts", f"the budgets could not be looked at: {alive.budgets}")
    for channel, why in sorted(alive.alerts.items()):
        yield Complaint("alerts", f"{channel}: {why}")


def _free_bytes(books: Books) -> int | None:
    try:
        stat = os.statvfs(books.folder)
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize


def _facts(books: Books, now: datetime) -> dict[str, str]:
    recovery, until = books.journal.recovery, books.reached
    facts = {
        "time here": f"{now:%Y-%m-%d %H:%M UTC}",
        "closed until": f"{until:%Y-%m-%d %H:%M UTC}" if until else "never closed",
        "journal": f"{recovery.segments} segments, {recovery.rows} records when it was opened",
    }
    free = _free_bytes(books)
    if free is not None:
        facts["free disk"] = f"{free // (1 << 20)} MiB"
    return facts


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
