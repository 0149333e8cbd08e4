"""One process that owns the books: scrapes, takes what is sent, closes the hours, and knows how it fares."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from pertoken.errors import InputError, PerTokenError
from pertoken.fleet import RunningFleet
from pertoken.meter import State, Target, events, nvml, otlp, prometheus
from pertoken.meter.attribute import stray_pools
from pertoken.meter.journal import JournalBrokenError, JournalFullError
from pertoken.meter.records import refuse_times
from pertoken.report.books import NVML, WRITTEN, Books, Closed, from_file
from pertoken.report.doctor import Process
from pertoken.web.scrape import Scraper, target_of
from pertoken.web.watch import Watch

_JUMP_S = 5.0
"""Wall clock and monotonic clock may drift apart by this much between two looks."""
_LOOK_S = 5.0
_AHEAD = timedelta(hours=1)
_KEEP_UNKNOWN = 100

log = logging.getLogger("pertoken.serve")


@dataclass
class Health:
    """What went wrong since the service started, for `doctor` and readiness."""

    started_s: float
    clock_jumps: list[tuple[float, float]] = field(default_factory=list)
    """When (POSIX s) and by how many seconds the wall clock jumped."""
    unknown_instances: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    """Batches refused, by reason: a full disk, times out of range."""
    closing: str = ""
    """Why the newest close failed; empty: it did not."""
    journal: str = ""
    """Why the journal takes nothing; empty: it does."""
    nvml: str = ""


class Received(NamedTuple):
    """What became of a batch: rows durable now, rows that already were, sent rows by a pool the fleet lacks, and those
    that name no pool, by a model that fits none."""

    rows: int
    duplicates: int
    unknown_pools: dict[str, int]
    unplaced_models: dict[str, int]


class Service:
    """The running parts around `Books`. Start it once, stop it once."""

    def __init__(
        self,
        books: Books,
        folder: Path,
        *,
        grace_s: float = 60.0,
        keep_days: int = 400,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.books = books
        self.health = Health(clock())
        self._clock = clock
        self._grace_s, self._keep_days = grace_s, keep_days
        self.scraper = Scraper(books.fleet.sources, folder, books.journal, clock)
        self.budgets = Watch(books, clock)
        self._written = {w.instance: target_of(w, w.instance) for w in books.fleet.sources.written}
        marks = books.journal.marks
        self._states = {
            name.removeprefix(WRITTEN): State.from_bytes(mark)
            for name, mark in marks.items()
            if name.startswith(WRITTEN)
        }
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def fleet(self) -> RunningFleet:
        """The fleet the books are of."""
        return self.books.fleet

    def start(self) -> None:
        """Begin scraping and closing."""
        self.scraper.start()
        loops = [("close", self._closing)]
        if self.fleet.sources.nvml_pool or self.fleet.sources.nvml_pools:
            loops.append(("nvml", self._reading_nvml))
        for name, loop in loops:
            thread = threading.Thread(target=loop, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        self.budgets.start()

    def stop(self) -> None:
        """Stop, once what is under way is durable, and release the files."""
        self._stop.set()
        self.budgets.stop()
        self.scraper.stop()
        for thread in self._threads:
            thread.join()
        with self._writing:
            self.books.shut()

    # -- what is sent to us; all raise InputError, JournalFullError, JournalBrokenError

    def take_events(self, body: bytes, content_type: str, sender: str, tenant: str) -> Received:
        """Journal usage events; returns once they are durable."""
        rows = events.read(body, content_type, source=f"usage/{sender}", now_s=self._clock(), tenant=tenant)
        return self._append(rows)

    def take_records(self, body: bytes) -> Received:
        """Journal whole records, as `pertoken import` sends them."""
        rows = events.read_records(body)
        return self._append(rows, from_file(rows))

    def take_spans(self, body: bytes, content_type: str, sender: str, tenant: str) -> Received:
        """Journal OTLP spans as usage events."""
        rows = otlp.read_spans(
            body, content_type, source=f"usage/{sender}", now_s=self._clock(), tenant=tenant
        )
        return self._append(rows)

    def take_samples(self, body: bytes) -> Received:
        """Journal a remote-write request."""
        with self._writing:
            rows, new, unknown = prometheus.read_remote_write(
                body, self._written, self._states, now_s=self._clock()
            )
            return self._append_states(rows, new, unknown)

    def take_metrics(self, body: bytes, content_type: str, sender: str) -> Received:
        """Journal OTLP metrics."""
        with self._writing:
            rows, new, unknown = otlp.read_metrics(
                body,
                content_type,
                self._written,
                self._states,
                source=f"gateway/{sender}",
                now_s=self._clock(),
            )
            return self._append_states(rows, new, unknown)

    def _append_states(self, rows: pa.Table, new: dict[str, State], unknown: dict[str, int]) -> Received:
        # The states move on only once the journal has them: what it refused is counted by the next delivery.
        done = self._append(rows, {WRITTEN + name: state.to_bytes() for name, state in new.items()})
        self._states |= new
        for instance, count in unknown.items():
            known = self.health.unknown_instances
            if instance in known or len(known) < _KEEP_UNKNOWN:
                known[instance] = known.get(instance, 0) + count
        return done

    def _append(self, rows: pa.Table, marks: dict[str, bytes] | None = None) -> Received:
        now = self.now()
        try:
            checked = refuse_times(rows, now - timedelta(days=self._keep_days), now + _AHEAD)
        except InputError:
            self._refused("a time out of range")
            raise
        try:
            done = self.books.take(checked, marks)
        except (JournalFullError, JournalBrokenError) as error:
            self.health.journal = str(error)
            self._refused("the journal takes nothing")
            raise
        self.health.journal = ""
        strays = stray_pools(checked, self.fleet.pools)
        return Received(done.rows, done.duplicates, strays, self.books.unplaced(checked, now))

    def _refused(self, why: str) -> None:
        self.health.refused[why] = self.health.refused.get(why, 0) + 1

    # -- closing

    def now(self) -> datetime:
        """The time by the service's clock."""
        return datetime.fromtimestamp(self._clock(), UTC)

    def close(self, hours: list[datetime]) -> Closed:
        """Close hours now."""
        closed = self.books.close(hours)
        self.budgets.closed()
        return closed

    def close_due(self) -> Closed:
        """Close what is due; what fails stands in `health`."""
        now = self.now() - timedelta(seconds=self._grace_s)
        try:
            closed = self.books.close_due(now)
        except PerTokenError as error:
            self.health.closing = str(error)
            log.warning("close failed: %r", str(error))
            return Closed()
        except Exception as error:
            # Whatever it is (a full disk under the ledger), the next minute must find this thread alive.
            self.health.closing = f"{type(error).__name__}: {error}"[:500]
            log.exception("close failed")
            return Closed()
        self.health.closing = ""
        if closed.hours:
            self.budgets.closed()
        return closed

    def _follow(self) -> None:
        """Read what came, so that whoever asks for the hour so far waits for little."""
        try:
            self.books.follow(self.now())
        except Exception as error:
            # The next look may succeed, and the hours must be closed meanwhile.
            log.warning("the newest records cannot be read: %s: %r", type(error).__name__, str(error))

    def _tidy(self) -> None:
        try:
            self.books.tidy(self.now(), self._keep_days)
        except (PerTokenError, OSError) as error:
            self.health.closing = f"the journal's past days cannot be exported: {error}"
            log.warning("tidying failed: %r", str(error))

    def _closing(self) -> None:
        last_wall_s, last_s = self._clock(), time.monotonic()
        next_s = 0.0
        tidied: date | None = None
        while not self._stop.is_set():
            wall_s, now_s = self._clock(), time.monotonic()
            jump = (wall_s - last_wall_s) - (now_s - last_s)
            if abs(jump) > _JUMP_S:
                self.health.clock_jumps = [*self.health.clock_jumps[-19:], (wall_s, jump)]
                log.warning("the clock jumped by %.0f s", jump)
            last_wall_s, last_s = wall_s, now_s
            self._follow()
            if now_s >= next_s:
                next_s = now_s + self._grace_s
                self.close_due()
                if self.now().date() != tidied:
                    tidied = self.now().date()
                    self._tidy()
            self._stop.wait(_LOOK_S)

    def process(self) -> Process:
        """How the running service fares, for `doctor`."""
        health, watched = self.health, self.scraper.watched()
        return Process(
            closes=True,
            targets=frozenset(w.target.name for w in watched),
            clock_jumps=tuple(health.clock_jumps),
            unknown_instances=dict(health.unknown_instances),
            refused=dict(health.refused),
            closing=health.closing,
            journal=health.journal,
            nvml=health.nvml,
            budgets=self.budgets.problem,
            alerts=self.budgets.alarm.problems(),
            errors={w.target.name: w.error for w in watched if w.error}
            | ({"file_sd": self.scraper.problem} if self.scraper.problem else {}),
        )

    # -- this machine's GPUs

    def _reading_nvml(self) -> None:
        sources = self.fleet.sources
        target = Target("nvml", sources.nvml_pool, pools=sources.nvml_pools)
        mark = self.books.journal.marks.get(NVML)
        state = State.from_bytes(mark) if mark else State(self._clock())
        while not self._stop.is_set():
            try:
                rows, new = nvml.read(target, state, now_s=self._clock())
                self._append(rows, {NVML: new.to_bytes()})
                state, self.health.nvml = new, ""
            except PerTokenError as error:
                self.health.nvml = str(error)
            self._stop.wait(10.0)
