"""The books of what happens: journal, fleet and ledger in one folder, and the close that turns one into the other.

journal → attribute → usage rows (book ``actual``) → rates in force → ``Ledger.close``. Closing an hour again gives
the same rows; an hour with usage that no rate prices stays open, and says so, while the others close.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from pertoken import meter
from pertoken.errors import InputError, MissingRateError
from pertoken.fleet import RunningFleet
from pertoken.ledger import Ledger, open_ledger
from pertoken.meter._split import MICRO, split
from pertoken.meter._steps import stepped
from pertoken.meter._twins import without_twins
from pertoken.meter.attribute import BOOK, Finding, Predictor
from pertoken.meter.journal import Appended, HourRead
from pertoken.rates.site import UTILITY_HOURS
from pertoken.report._billing import Span, restate
from pertoken.report._terms import hours_between, rates_of
from pertoken.report.so_far import FRESH_S, Growing, Lately, SoFar
from pertoken.scenario import Api
from pertoken.tables import USAGE, concat, usage_rows
from pertoken.units import IDLE, base_meter, site_pool

HOUR = timedelta(hours=1)
SCRAPED, WRITTEN, NVML = "scrape/", "written/", "nvml/"
"""Prefixes of the counter states that the journal's marks hold, by how the counters reach us."""
IMPORTED = "import/"
"""Prefix of the marks of sources that were imported from files: they owe nothing more."""
_UNTIL = "close/until"
"""Mark of the journal: the first hour that was never closed."""
_KEPT = "close/kept-from"
"""Mark of the journal: the first day whose records were not deleted."""
_LONGEST = timedelta(days=3660)
_CHUNK_HOURS = _KEPT_LOOKS = 24 * 7
LEDGER_FILE, _JOURNAL = "ledger.duckdb", "journal"


@dataclass(frozen=True)
class Closed:
    """What a close did: hours now priced, and why others stayed open."""

    hours: tuple[datetime, ...] = ()
    unpriced: dict[datetime, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Look:
    """Sources that told something of an hour, and findings."""

    sources: tuple[str, ...]
    findings: tuple[Finding, ...]


class Books:
    """An open journal and ledger with the fleet they are of. `open_books` makes one."""

    def __init__(
        self,
        journal: meter.Journal,
        ledger: Ledger,
        fleet: RunningFleet,
        folder: Path,
        predictor: Predictor | None = None,
    ) -> None:
        self.journal, self.ledger, self.fleet, self.folder = journal, ledger, fleet, folder
        self.unpriced: dict[datetime, str] = {}
        self._predictor = predictor
        self._lock = threading.Lock()
        self._reading = threading.Lock()  # the journal is read from one thread at a time
        self._growing = Growing(
            journal, ledger, fleet, predictor, self._reading, self._once, self._paid_so_far
        )
        self._looks: dict[datetime, Look] = {}
        self._shut = False

    def take(self, rows: pa.Table, marks: dict[str, bytes] | None = None) -> Appended:
        """Journal records, calls of APIs under the meters of their price steps; durable once it returns.

        Raises JournalFullError or JournalBrokenError where nothing was kept, InputError on rows that do not belong.
        """
        return self.journal.append(stepped(rows, self.fleet), marks=marks)

    def take_file(self, rows: pa.Table) -> Appended:
        """`take` of records that were read from a file."""
        return self.take(rows, from_file(rows))

    def due(self, now: datetime) -> list[datetime]:
        """Hours that a close is owed: complete ones never closed, and any before now that got late records."""
        current = _hour(now)
        until = self.closed_until or min([current, *self.journal.dirty_hours()])
        hours = {h for h in self.journal.dirty_hours() if h < current} | set(self.unpriced)
        at = until
        while at < current:
            hours.add(at)
            at += HOUR
        return sorted(hours)

    @property
    def closed_until(self) -> datetime | None:
        """The first hour that was never closed; None before the first close."""
        mark = self.journal.marks.get(_UNTIL)
        return datetime.fromisoformat(mark.decode()) if mark else None

    def close(self, hours: Iterable[datetime]) -> Closed:
        """Turn hours (UTC) into rows of the book ``actual``, priced at the rates in force; idempotent.

        Raises InputError where the catalogue lacks a price that the fleet asks for.
        """
        wanted = sorted({_hour(hour) for hour in hours})
        kept = self.kept_from
        if wanted and kept is not None and wanted[0].date() < kept:
            raise InputError(
                f"{wanted[0]:%Y-%m-%d %H:%M} UTC cannot be closed again: records before {kept} are no longer kept"
            )
        done: list[datetime] = []
        unpriced: dict[datetime, str] = {}
        findings: list[Finding] = []
        with self._lock:
            for run in _runs(wanted):
                one = self._close_run(run)
                done += one.hours
                unpriced |= one.unpriced
                findings += one.findings
            for hour in done:
                self.unpriced.pop(hour, None)
            self.unpriced |= unpriced
        return Closed(tuple(done), unpriced, tuple(findings))

    def close_due(self, now: datetime) -> Closed:
        """Close what is due and remember how far that is."""
        current = _hour(now)
        closed = self.close(self.due(now))
        if self.closed_until is None or self.closed_until < current:
            self.journal.append(meter.RECORDS.empty_table(), marks={_UNTIL: current.isoformat().encode()})
        return closed

    @property
    def kept_from(self) -> date | None:
        """The first day (UTC) whose records are kept; None where none were ever let go."""
        mark = self.journal.marks.get(_KEPT)
        return date.fromisoformat(mark.decode()) if mark else None

    def first_hour(self) -> datetime | None:
        """The oldest hour that was metered; None where none was."""
        # A peak stands at the first hour of its month, metered or not.
        booked = self.ledger.first_hour(BOOK, besides=["peak_kw"])
        return min([*([booked] if booked else []), *self.journal.dirty_hours()], default=None)

    def metered(self, hours: Iterable[datetime]) -> list[datetime]:
        """Those of the hours that lie at or after the oldest metered one: before it nobody knows what was held."""
        first = self.first_hour()
        return [hour for hour in hours if first is not None and hour >= first]

    def tidy(self, now: datetime, keep_days: int) -> int:
        """Export the journal's past days to Parquet, drop their segments, and let go of days older than `keep_days`.

        What the ledger holds of them stays, and can no longer be closed again. Returns the bytes freed.
        """
        today = now.astimezone(UTC).date()
        oldest = today - timedelta(days=keep_days)
        with self._lock:
            with self._reading:
                freed, gone = self.journal.compact(today), self.journal.forget(oldest)
            if gone or (self.kept_from and self.kept_from < oldest):
                mark = {_KEPT: oldest.isoformat().encode()}
                self.journal.append(meter.RECORDS.empty_table(), marks=mark)
        return freed

    def look(self, hour: datetime) -> Look:
        """What an hour's records are, and what attribution has to say of them: from its close, where nothing came
        since, else anew from the journal."""
        known = self._looks.get(hour)
        if known is not None and hour not in self.journal.dirty_hours():
            return known
        running = self._growing.records(hour)
        records = self._totals(hour).records if running is None else running
        return _look(records, self._attributed(hour, records))

    def so_far(self, now: datetime, fresh_s: float = FRESH_S) -> SoFar:
        """The hour that is not over, attributed and priced up to now, at most `fresh_s` [s] old, never written down.

        Cheap and for any number of threads: only what came since the last look is read. Raises InputError on a time
        without a zone, or where the catalogue lacks a price that the fleet asks for.
        """
        return self._growing.so_far(now, fresh_s)

    def lately(self, now: datetime) -> Lately:
        """Usage of the last minute (longer where scrapes are slow, see `so_far.window_s`) and what it costs."""
        return self._growing.lately(now)

    @property
    def last_words(self) -> dict[str, datetime]:
        """When each source last told something, as far as `follow` has read."""
        return self._growing.last_words

    def follow(self, now: datetime) -> None:
        """Read the newest records for `so_far` and `lately`, which then have less to do."""
        self._growing.follow(now)

    def _paid_so_far(self, hour: datetime, usage: pa.Table, rates: pa.Table, micro: int) -> list[pa.Table]:
        return self._paid_by_the_hour(hour, usage, _by_the_hour(rates), micro)

    def _attributed(self, hour: datetime, records: pa.Table) -> meter.Attribution:
        """An hour's rows and findings, each engine counted from one source alone."""
        once, twins = self._once(records)
        found = meter.attribute(once, self.fleet.at(hour), [hour], self._predictor)
        return replace(found, findings=(*twins, *found.findings))

    def _once(self, records: pa.Table) -> tuple[pa.Table, tuple[Finding, ...]]:
        scraped, written = (
            {name.removeprefix(way) for name in self.journal.marks if name.startswith(way)}
            for way in (SCRAPED, WRITTEN)
        )
        return without_twins(records, scraped, written)

    def _totals(self, hour: datetime) -> HourRead:
        with self._reading:
            return self.journal.totals(hour)

    def shut(self) -> None:
        """Flush the journal and release both files; a second time it does nothing."""
        with self._lock:
            if not self._shut:
                self._shut = True
                self._growing.shut()
                self.journal.shut()
                self.ledger.shut()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shut()

    def _close_run(self, hours: list[datetime]) -> Closed:
        """Close consecutive hours."""
        start, end = hours[0], hours[-1] + HOUR
        rates = rates_of(self.fleet, start, end)
        by_hour = _by_the_hour(rates)
        tables: list[pa.Table] = []
        findings: list[Finding] = []
        reached: dict[datetime, int] = {}
        dirty = set(self.journal.dirty_hours())
        for hour in hours:
            read = self._totals(hour)
            found = self._attributed(hour, read.records)
            findings += found.findings
            self._looks[hour] = _look(read.records, found)
            tables += [found.usage, *self._paid_by_the_hour(hour, found.usage, by_hour)]
            if hour in dirty:
                reached[hour] = read.sequence
        with self.ledger.together():  # usage and what it costs: nobody shall see one without the other
            self.ledger.add_rates(rates)
            self.ledger.replace_usage(BOOK, hours, concat(tables, USAGE))
            latest = max(end, self.closed_until or end)
            changed = restate(self.ledger, self.fleet, BOOK, start, end, latest)
            self._price_other_months(changed, start, end)
            unpriced = self._post([(start, end), *changed])
        self._growing.closings += 1
        for hour in sorted(self._looks)[:-_KEPT_LOOKS]:
            del self._looks[hour]
        done = [h for h in hours if h not in unpriced]
        for hour in done:
            if hour in reached:
                self.journal.clean(hour, reached[hour])
        return Closed(tuple(done), unpriced, tuple(findings))

    def _price_other_months(self, changed: list[Span], start: datetime, end: datetime) -> None:
        """Demand rates of months restated beyond the closed hours (a ratchet's later months)."""
        for first, last in changed:
            if not start <= first < end and last - first == HOUR:
                self.ledger.add_rates(_only_peaks(rates_of(self.fleet, first, last)))

    def _post(self, spans: list[Span]) -> dict[datetime, str]:
        """Close spans of hours; those with unpriced usage one by one, to name them and spare the others."""
        unpriced: dict[datetime, str] = {}
        for start, end in spans:
            try:
                self.ledger.close(BOOK, start, end)
            except MissingRateError:
                at = start
                while at < end:
                    try:
                        self.ledger.close(BOOK, at, at + HOUR)
                    except MissingRateError as error:
                        unpriced[at] = str(error)
                    at += HOUR
        return unpriced

    def _paid_by_the_hour(
        self, hour: datetime, usage: pa.Table, priced: set[tuple[Any, Any, Any]], micro: int = MICRO
    ) -> list[pa.Table]:
        """One hour, or `micro` millionths of it, of every site and pool whose overheads are paid by the hour.

        A pool's hour goes to whoever held its GPUs (an API's: to whoever used its tokens); a site's is nobody's.
        """
        hours = hours_between(hour, hour + HOUR)
        gone = micro / MICRO
        tables = [
            usage_rows(
                hours,
                {("idle", name): gone},
                book=BOOK,
                pool=site_pool(site),
                model="",
                tenant=IDLE,
                basis="measured",
            )
            for site in self.fleet.sites
            for name in ("site_hours", UTILITY_HOURS)
            if (site_pool(site), hour, name) in priced
        ]
        pools = [p for p in self.fleet.pools if (p, hour, "site_hours") in priced]
        weights: dict[str, dict[tuple[str, str, str], float]] = defaultdict(lambda: defaultdict(float))
        if pools:
            for row in usage.select(["pool", "model", "tenant", "phase", "meter", "quantity"]).to_pylist():
                api = isinstance(self.fleet.pools[row["pool"]].price, Api)
                if base_meter(row["meter"]).endswith("_tokens") if api else row["meter"] == "gpu_hours":
                    weights[row["pool"]][row["model"], row["tenant"], row["phase"]] += float(row["quantity"])
        for pool in pools:
            parts = split(micro, weights.get(pool) or {("", IDLE, "idle"): 1.0})
            tables += [
                usage_rows(
                    hours,
                    {(phase, "site_hours"): part / MICRO},
                    book=BOOK,
                    pool=pool,
                    model=model,
                    tenant=tenant,
                    basis="measured:gpu_hours",
                )
                for (model, tenant, phase), part in parts.items()
            ]
        return tables


def open_books(fleet: RunningFleet, folder: str | Path, predictor: Predictor | None = None) -> Books:
    """The books in a folder, made where they are missing.

    Raises InputError where another process holds them.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    with ExitStack() as stack:
        journal = stack.enter_context(meter.open_journal(place / _JOURNAL))
        ledger = open_ledger(place / LEDGER_FILE)
        stack.pop_all()
    return Books(journal, ledger, fleet, place, predictor)


def from_file(rows: pa.Table) -> dict[str, bytes]:
    """Marks that say of the sources of records that they were read from a file."""
    return {IMPORTED + str(source): b"" for source in rows.column("source").unique().to_pylist()}


def hours_in(start: datetime, end: datetime) -> list[datetime]:
    """The full UTC hours from `start` up to, not with, `end`.

    Raises InputError on a time without a zone, an end that is not after the start, or more hours than ten years have.
    """
    if start.tzinfo is None or end.tzinfo is None:
        raise InputError("a time has no zone: write 2026-11-24T00:00Z or ...-08:00")
    first, last = _hour(start), end.astimezone(UTC)
    if last <= first:
        raise InputError(f"the window ends at {last.isoformat()}, which is not after {first.isoformat()}")
    if last - first > _LONGEST:
        raise InputError(f"{(last - first) // HOUR} hours at once: give at most {_LONGEST // HOUR}")
    found = []
    while first < last:
        found.append(first)
        first += HOUR
    return found


def _hour(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def _runs(hours: list[datetime]) -> list[list[datetime]]:
    """Consecutive hours together, at most a week at a time."""
    runs: list[list[datetime]] = []
    for hour in hours:
        if runs and hour - runs[-1][-1] == HOUR and len(runs[-1]) < _CHUNK_HOURS:
            runs[-1].append(hour)
        else:
            runs.append([hour])
    return runs


def _by_the_hour(rates: pa.Table) -> set[tuple[Any, Any, Any]]:
    """Pool, hour and meter of what is paid by the hour."""
    columns = (rates[name].to_pylist() for name in ("pool", "hour", "meter"))
    return {row for row in zip(*columns, strict=True) if base_meter(str(row[2])) == "site_hours"}


def _look(records: pa.Table, found: meter.Attribution) -> Look:
    return Look(tuple(sorted(map(str, records.column("source").unique().to_pylist()))), found.findings)


def _only_peaks(rates: pa.Table) -> pa.Table:
    keep = [base_meter(str(m)) == "peak_kw" for m in rates["meter"].to_pylist()]
    return rates.filter(pa.array(keep))
