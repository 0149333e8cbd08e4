"""The books of what happens: journal, fleet and ledger in one folder, and the close that turns one into the other.

journal → attribute → usage rows (book ``actual``) → rates in force → ``Ledger.close``. Closing an hour again gives
the same rows; an hour with usage that no rate prices stays open, and says so, while the others close.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from pertoken import meter
from pertoken.errors import InputError, MissingRateError, NoEvidenceError
from pertoken.fleet import RunningFleet
from pertoken.ledger import Ledger, open_ledger
from pertoken.meter._steps import stepped
from pertoken.meter._twins import without_twins
from pertoken.meter.attribute import BOOK, Finding, Predictor
from pertoken.meter.events import unplaced_models
from pertoken.meter.journal import Appended, HourRead
from pertoken.report._billing import Span, restate
from pertoken.report._hourly import paid_by_the_hour, priced_by_the_hour
from pertoken.report._terms import rates_of
from pertoken.report.so_far import FRESH_S, Growing, Lately, SoFar
from pertoken.scenario import Api
from pertoken.tables import USAGE, concat
from pertoken.units import base_meter

HOUR = timedelta(hours=1)
SCRAPED, WRITTEN, NVML = "scrape/", "written/", "nvml/"
"""Prefixes of the counter states that the journal's marks hold, by how the counters reach us."""
IMPORTED = "import/"
"""Prefix of the marks of sources that were imported from files: they owe nothing more."""
_FROM, _UNTIL = "close/from", "close/until"
"""Marks of the journal: every hour from the first of these up to, not with, the second was closed."""
_KEPT = "close/kept-from"
"""Mark of the journal: the first day whose records were not deleted."""
_LONGEST = timedelta(days=3660)
_CHUNK_HOURS = _KEPT_LOOKS = 24 * 7
CATCH_UP_HOURS = 24 * 7 * 4
"""Hours from before those that are closed without a gap, closed at most at a time: the newest ones go first, always."""
_SERVED_FOR = timedelta(minutes=1)
"""How long it is remembered which models are served."""
_BLOCKS_LOOKED = 1000
"""Blocks of the journal read for hours that nobody asked for: a second at most."""
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
        self.stuck = ""
        """Why `close_due` could not close old hours the last time; empty: it could."""
        self._served: tuple[datetime | None, frozenset[str]] = None, frozenset()
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

    def unplaced(self, rows: pa.Table, now: datetime) -> dict[str, int]:
        """Records that fit no pool as far as is known now, counted by model: in no figure until they name one."""
        if not unplaced_models(rows, self.fleet, ()):
            return {}
        asked, served = self._served
        if not asked or abs(now - asked) > _SERVED_FOR:
            self._served = now, (served := self._models_served(now))
        return unplaced_models(rows, self.fleet, served)

    def _models_served(self, now: datetime) -> frozenset[str]:
        """Models of pools that are no API: those that are booked, and what engines and gateways count in this hour."""
        pools = [n for n, pool in self.fleet.pools.items() if not isinstance(pool.price, Api)]
        where = {"book": BOOK, "pool": pools, "meter": "output_tokens"}
        found = (
            {str(m) for m in self.ledger.usage("model", where=where)["model"].to_pylist()} if pools else set()
        )
        self._growing.follow(now)
        running = self._growing.records(_hour(now))
        if running is not None:
            told = zip(running["source"].to_pylist(), running["model"].to_pylist(), strict=True)
            found |= {str(model) for source, model in told if str(source).startswith(("engine/", "gateway/"))}
        return frozenset(found)

    def due(self, now: datetime) -> list[datetime]:
        """Hours that a close is owed: complete ones never closed, from the first metered one on, and any before now
        that got late records."""
        current = _hour(now)
        return sorted({*self._recent(current), *self.behind(current)})

    def _recent(self, current: datetime) -> set[datetime]:
        """Of what is due: hours never closed after those that are, and late records among these."""
        at = self.closed_until or current
        since = max(self._since(current), self._kept_hour or datetime.min.replace(tzinfo=UTC))
        hours = {h for h in self.journal.dirty_hours() if since <= h < current} | set(self.unpriced)
        while at < current:
            hours.add(at)
            at += HOUR
        return hours

    def behind(self, now: datetime) -> list[datetime]:
        """Of what is due: hours before those that are closed without a gap, where something was metered still
        earlier; hours without records among them, those that the ledger has left out."""
        since, first = self._since(_hour(now)), self.first_hour()
        if first is None or first >= since:
            return []
        first = max(first, self._kept_hour or first)
        rows = self.ledger.usage("hour", "meter", where={"book": BOOK}, start=first, end=since).to_pylist()
        booked = {row["hour"] for row in rows if base_meter(row["meter"]) != "peak_kw"}
        booked -= set(self.journal.dirty_hours())
        return [hour for n in range((since - first) // HOUR) if (hour := first + n * HOUR) not in booked]

    def too_late(self) -> list[datetime]:
        """Hours that got records when those of their day were no longer kept: they cannot be closed again."""
        kept = self._kept_hour
        return [hour for hour in self.journal.dirty_hours() if kept is not None and hour < kept]

    def _since(self, current: datetime) -> datetime:
        """The first of the hours that are closed without a gap; where none is, the running one."""
        mark = self.journal.marks.get(_FROM)
        known = datetime.fromisoformat(mark.decode()) if mark else self.closed_until
        return min(current, known or current)

    @property
    def closed_until(self) -> datetime | None:
        """The first hour that was never closed; None before the first close."""
        mark = self.journal.marks.get(_UNTIL)
        return datetime.fromisoformat(mark.decode()) if mark else None

    @property
    def reached(self) -> datetime | None:
        """`closed_until`; where books were closed before that was kept, the hour after the last one they have."""
        spans = {} if self.closed_until else {book: last for book, _, last in self.ledger.books()}
        return self.closed_until or (spans[BOOK] + HOUR if BOOK in spans else None)

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
        """Close what is due and remember how far that is.

        Of hours before those that are closed without a gap at most `CATCH_UP_HOURS`, from the newest back; why they
        cannot be closed stands in `stuck` and hinders no other.
        """
        current = _hour(now)
        closed = self.close(self._recent(current))
        self._remember(self._since(current), max(current, self.closed_until or current))
        return self._catch_up(current, closed)

    def close_span(self, hours: Sequence[datetime], now: datetime) -> Closed:
        """Close consecutive hours, the running one perhaps among them, and remember those that are over as closed."""
        closed = self.close(hours)
        over = [hour for hour in hours if hour < _hour(now)]
        if over:
            since, until = over[0], over[-1] + HOUR
            known = self.closed_until
            if known is None:
                self._remember(since, until)
            elif since <= known and until >= (first := self._since(known)):
                self._remember(min(since, first), max(until, known))
        return closed

    def _catch_up(self, current: datetime, closed: Closed) -> Closed:
        """Close hours before those that are closed without a gap, week by week, back to the first metered one."""
        self.stuck = ""
        first, until = self.first_hour(), self.closed_until or current
        hours = self.behind(current)
        runs = _runs(hours[-CATCH_UP_HOURS:])
        while runs:
            run = runs.pop()
            try:
                one = self.close(run)
            except (InputError, NoEvidenceError) as error:
                if len(run) == 1:
                    self.stuck = f"hours up to {run[0]:%Y-%m-%d %H:%M} UTC cannot be closed: {error}"
                    return closed
                runs += [[hour] for hour in run]  # up to the one that is in the way
                continue
            closed = Closed(
                closed.hours + one.hours, closed.unpriced | one.unpriced, closed.findings + one.findings
            )
            self._remember(run[0], until)
        if first is not None and len(hours) <= CATCH_UP_HOURS and first < self._since(current):
            self._remember(first, until)
        return closed

    def _remember(self, since: datetime, until: datetime) -> None:
        """Make durable which hours are closed without a gap."""
        told = {_FROM: since.isoformat().encode(), _UNTIL: until.isoformat().encode()}
        if any(self.journal.marks.get(name) != mark for name, mark in told.items()):
            self.journal.append(meter.RECORDS.empty_table(), marks=told)

    @property
    def kept_from(self) -> date | None:
        """The first day (UTC) whose records are kept; None where none were ever let go."""
        mark = self.journal.marks.get(_KEPT)
        return date.fromisoformat(mark.decode()) if mark else None

    @property
    def _kept_hour(self) -> datetime | None:
        kept = self.kept_from
        return None if kept is None else datetime(kept.year, kept.month, kept.day, tzinfo=UTC)

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

    def elsewhere(self, besides: Collection[datetime]) -> list[datetime]:
        """The newest hours of records, without `besides`, that are cheap to `look` at: known by their close, or few."""
        found: list[datetime] = []
        left = _BLOCKS_LOOKED
        for hour, blocks in sorted(self.journal.hours().items(), reverse=True):
            if hour in besides:
                continue
            left -= 0 if hour in self._looks else blocks
            if left < 0 or len(found) == _KEPT_LOOKS:
                break
            found.append(hour)
        return found[::-1]

    def _paid_so_far(self, hour: datetime, usage: pa.Table, rates: pa.Table, micro: int) -> list[pa.Table]:
        return paid_by_the_hour(self.fleet, hour, usage, priced_by_the_hour(rates), micro)

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
        by_hour = priced_by_the_hour(rates)
        tables: list[pa.Table] = []
        findings: list[Finding] = []
        reached: dict[datetime, int] = {}
        dirty = set(self.journal.dirty_hours())
        for hour in hours:
            read = self._totals(hour)
            found = self._attributed(hour, read.records)
            findings += found.findings
            self._looks[hour] = _look(read.records, found)
            tables += [found.usage, *paid_by_the_hour(self.fleet, hour, found.usage, by_hour)]
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


def _look(records: pa.Table, found: meter.Attribution) -> Look:
    return Look(tuple(sorted(map(str, records.column("source").unique().to_pylist()))), found.findings)


def _only_peaks(rates: pa.Table) -> pa.Table:
    keep = [base_meter(str(m)) == "peak_kw" for m in rates["meter"].to_pylist()]
    return rates.filter(pa.array(keep))
