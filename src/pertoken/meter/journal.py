"""The journal: records on disk, append-only, acknowledged only when durable, each (source, key, phase,
meter) once.

A folder holds segments (``segments/00000001.ptj``: blocks as in `_blocks`), exported days
(``days/2026-11-24.parquet``) and a lock. One process writes. What `append` returned for is on the disk; what
it raised for is not, and the sender keeps it. A tail torn by a crash was never acknowledged and is cut on
opening.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pertoken.errors import InputError, PerTokenError
from pertoken.meter import _blocks as blocks
from pertoken.meter._index import Index, Place
from pertoken.meter._window import Identities, Window, identities
from pertoken.meter.records import checked, concat, empty, partial_sums, summed, sums_of
from pertoken.units import HOURS_PER_DAY, SECONDS_PER_HOUR

SEGMENT_BYTES = 64 * 1024 * 1024
WINDOW_ROWS = 4_000_000
RESERVE_BYTES = 64 * 1024 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class JournalFullError(PerTokenError):
    """The disk takes no more: nothing of the batch was written, keep it and send it again."""


class JournalBrokenError(PerTokenError):
    """The disk failed: what was not acknowledged may be lost, and the journal must be opened anew."""


class Appended(NamedTuple):
    """What became of a batch: rows now durable, rows that already were, and the block's sequence."""

    rows: int
    duplicates: int
    sequence: int


class HourRead(NamedTuple):
    """The records of an hour and the sequence they reach to: what `clean` wants back."""

    records: pa.Table
    sequence: int


@dataclass(frozen=True)
class Recovery:
    """What opening found. `torn_bytes` were cut from the last segment; `damaged` are (segment, offset,
    bytes) of blocks whose checksum failed before others that are good: rows lost to the disk, not to us."""

    segments: int = 0
    rows: int = 0
    torn_bytes: int = 0
    damaged: tuple[tuple[str, int, int], ...] = ()


class Journal:
    """An open journal. `open_journal` makes one; use as a context manager or `shut` it."""

    def __init__(self, folder: Path, segment_bytes: int, window_rows: int, reserve_bytes: int) -> None:
        self._folder = folder
        self._segment_bytes, self._reserve_bytes = segment_bytes, reserve_bytes
        self._window_rows = window_rows
        self._lock, self._sync_lock = threading.Lock(), threading.Lock()
        self._window, self._index = Window(window_rows), Index()
        self._segment, self._sequence, self._size = 0, 0, 0
        self._written = self._synced = 0
        self._file = self._guard = -1
        self._retired: list[int] = []
        self._broken = ""
        self.recovery = Recovery()

    def append(self, table: pa.Table, marks: Mapping[str, bytes] | None = None) -> Appended:
        """Write a batch of `records.RECORDS` and return once it is on the disk; threads share one flush.

        Rows whose (source, key, phase, meter) the window holds are left out and counted. `marks` are small
        states by name (a scraped target's counters) that become durable with the batch, all or nothing.
        Raises InputError on rows that do not belong, JournalFullError and JournalBrokenError where nothing
        is kept.
        """
        packed = blocks.pack(table)
        wanted = identities(packed)
        with self._lock:
            self._usable()
            fresh = self._window.fresh(wanted)
            kept = int(fresh.sum())
            sequence = self._sequence
            if kept or marks:
                if kept < len(fresh):
                    packed, wanted = blocks.take(packed, fresh), wanted[fresh]
                sequence = self._put(packed, wanted, marks or {}, {})
            written = self._written
        # A duplicate is acknowledged too, so its first copy, perhaps still on its way, must be durable
        # before.
        self._sync(written)
        return Appended(kept, len(fresh) - kept, sequence)

    @property
    def marks(self) -> dict[str, bytes]:
        """The newest mark of each name."""
        with self._lock:
            return dict(self._index.marks)

    def dirty_hours(self) -> list[datetime]:
        """Hours (UTC) that received records since they were last `clean`, oldest first; the current hour
        too."""
        with self._lock:
            return [_moment(hour) for hour in sorted(self._index.places) if self._index.dirty(hour)]

    def hours(self) -> dict[datetime, int]:
        """Hours (UTC) that the segments have records of, with the blocks that hold some; past days may be exported."""
        with self._lock:
            return {_moment(hour): len(places) for hour, places in self._index.places.items()}

    def read(self, hour: datetime) -> HourRead:
        """All records of an hour, exported ones included."""
        number = _number(hour)
        with self._lock:
            places = list(self._index.places.get(number, ()))
            sequence = self._sequence
        exported, upto = self._exported(_day(number), number)
        tables = [exported] if exported.num_rows else []
        tables += self._tables([p for p in places if p.sequence > upto], number, number + 1)
        return HourRead(concat(tables), sequence)

    def totals(self, hour: datetime) -> HourRead:
        """The records of an hour summed (`records.TOTALS`), block by block: little memory for any number of
        rows."""
        number = _number(hour)
        with self._lock:
            places = list(self._index.places.get(number, ()))
            sequence = self._sequence
        exported, upto = self._exported(_day(number), number)
        parts = [sums_of(exported)] if exported.num_rows else []
        for raw, place in self._payloads([p for p in places if p.sequence > upto]):
            packed = blocks.unpack(raw)
            hours = packed.ts // blocks.HOUR_US
            if place.mixed:
                packed = blocks.take(packed, hours == number)
            parts.append(partial_sums(packed.ts, packed.quantity, packed.codes, packed.texts))
        return HourRead(summed(parts), sequence)

    def clean(self, hour: datetime, sequence: int) -> None:
        """Say that an hour was closed with the records `read` gave at `sequence`; later ones keep it
        dirty."""
        with self._lock:
            self._usable()
            self._put(blocks.pack(empty()), np.zeros(0, np.uint64), {}, {_number(hour): sequence})
            written = self._written
        self._sync(written)

    def export(self, day: date) -> Path | None:
        """Write a UTC day's records to ``days/<day>.parquet``, late ones merged in; None where it has none.

        The file appears whole or not at all.
        """
        import pyarrow.parquet as pq

        first = _number(datetime(day.year, day.month, day.day, tzinfo=UTC))
        with self._lock:
            hours = range(first, first + HOURS_PER_DAY)
            places = sorted({p for h in hours for p in self._index.places.get(h, ())})
            sequence = self._sequence
        before, upto = self._exported(day)
        new = [p for p in places if p.sequence > upto]
        path = self._day_file(day)
        if not new:
            return path if path.exists() else None
        rows = concat([before, *self._tables(new, first, first + HOURS_PER_DAY)])
        metadata = {b"pertoken.sequence": str(sequence).encode()}
        temporary = path.with_suffix(".part")
        pq.write_table(rows.replace_schema_metadata(metadata), temporary, compression="zstd")
        _flush(temporary)
        temporary.rename(path)
        _flush(path.parent)
        return path

    def compact(self, before: date) -> int:
        """Export every day before `before` and drop segments that hold nothing else; bytes freed.

        Segments of the deduplication window, and those with hours not yet closed, stay.
        """
        limit = _number(datetime(before.year, before.month, before.day, tzinfo=UTC))
        with self._lock:
            days = sorted({_day(h) for h in self._index.places if h < limit})
        for day in days:
            self.export(day)
        upto = {day: self._exported_sequence(day) for day in days}
        freed = 0
        with self._lock:
            self._usable()
            for segment in self._droppable(limit, upto):
                path = self._path(segment)
                freed += path.stat().st_size
                path.unlink()
                self._index.forget(segment)
        return freed

    def forget(self, before: date) -> int:
        """Delete exported days before `before`; how many."""
        gone = [p for p in self._days() if p.stem < before.isoformat()]
        for path in gone:
            path.unlink()
        return len(gone)

    def shut(self) -> None:
        """Flush and release the files."""
        with self._lock:
            if self._file >= 0:
                if not self._broken:
                    os.fdatasync(self._file)
                for file in (*self._retired, self._file, self._guard):
                    os.close(file)
                self._file, self._retired = -1, []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shut()

    # -- writing, under the lock

    def _usable(self) -> None:
        if self._file < 0:
            raise InputError("the journal is shut")
        if self._broken:
            raise JournalBrokenError(self._broken)

    def _put(
        self, packed: blocks.Packed, new: Identities, marks: Mapping[str, bytes], cleaned: Mapping[int, int]
    ) -> int:
        if self._size >= self._segment_bytes:
            self._roll()
        if not self._size and self._sequence:
            self._carry_on()
        sequence = self._sequence + 1
        raw, meta = blocks.encode(packed, sequence, marks, cleaned)
        self._write(raw)
        self._sequence = sequence
        self._index.add(self._segment, blocks.Block(self._size - len(raw), self._size, sequence, meta))
        if len(new):
            self._window.add(new)
        return sequence

    def _write(self, raw: bytes) -> None:
        stat = os.fstatvfs(self._file)
        if stat.f_bavail * stat.f_frsize < self._reserve_bytes + len(raw):
            raise JournalFullError(
                f"less than {self._reserve_bytes} bytes are free in {self._folder}: free some, then send again"
            )
        view, at = memoryview(raw), 0
        try:
            while at < len(raw):
                at += os.write(self._file, view[at:])
        except OSError as error:
            self._undo(error)
        self._size += len(raw)
        self._written += len(raw)

    def _undo(self, error: OSError) -> None:
        """A write failed half-way: cut what it left, or give up on this journal."""
        try:
            os.ftruncate(self._file, self._size)
        except OSError as second:
            self._broken = (
                f"the journal in {self._folder} cannot be mended: {second}; restart once the disk is well"
            )
            raise JournalBrokenError(self._broken) from error
        if error.errno in _FULL:
            raise JournalFullError(
                f"the disk of {self._folder} is full: free some, then send again"
            ) from error
        raise JournalBrokenError(f"the journal in {self._folder} cannot be written: {error}") from error

    def _roll(self) -> None:
        """Start a new segment."""
        self._flush_file(self._file)
        self._retired.append(self._file)
        self._start_segment(self._segment + 1)

    def _carry_on(self) -> None:
        """Begin a segment with the marks and cleaned hours of older ones, so that those can go."""
        cleaned = {h: s for h, s in self._index.cleaned.items() if h in self._index.places}
        raw, _ = blocks.encode(blocks.pack(empty()), self._sequence + 1, self._index.marks, cleaned)
        self._write(raw)
        self._sequence += 1

    def _start_segment(self, segment: int) -> None:
        self._file = os.open(self._path(segment), os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._segment, self._size = segment, os.fstat(self._file).st_size
        _flush(self._folder / "segments")

    def _flush_file(self, file: int) -> None:
        try:
            os.fdatasync(file)
        except OSError as error:
            # After a failed flush nobody knows what the disk holds: stop, and let recovery find out.
            self._broken = f"the disk of {self._folder} failed: {error}; restart once it is well"
            raise JournalBrokenError(self._broken) from error

    def _sync(self, upto: int) -> None:
        """Return once all bytes written up to `upto` are durable; one caller flushes for all who wait."""
        with self._sync_lock:
            if self._broken:
                raise JournalBrokenError(self._broken)
            if self._synced >= upto:
                return
            written, file = (
                self._written,
                self._file,
            )  # in this order: a roll between them flushes what it leaves
            self._flush_file(file)
            self._synced = written
            retired, self._retired = self._retired, []
            for old in retired:
                os.close(old)

    # -- reading

    def _tables(self, places: list[Place], first: int, end: int) -> list[pa.Table]:
        """The rows of blocks that lie in hours [first, end)."""
        tables = []
        for raw, place in self._payloads(places):
            table = blocks.read_table(raw)
            if place.mixed:
                hour = table.column("ts").cast(pa.int64()).to_numpy() // blocks.HOUR_US
                table = table.filter(pa.array((hour >= first) & (hour < end)))
            tables.append(table)
        return tables

    def _payloads(self, places: list[Place]) -> Iterator[tuple[memoryview, Place]]:
        for segment, wanted in groupby(sorted(places), key=lambda p: p.segment):
            with open(self._path(segment), "rb") as file:
                for place in wanted:
                    yield blocks.read_payload(file, place.offset), place

    def _exported(self, day: date, hour: int | None = None) -> tuple[pa.Table, int]:
        import pyarrow.parquet as pq

        path = self._day_file(day)
        if not path.exists():
            return empty(), 0
        filters = None
        if hour is not None:
            start = _moment(hour)
            filters = (pc.field("ts") >= start) & (pc.field("ts") < start + timedelta(hours=1))
        rows = pq.read_table(path, filters=filters).replace_schema_metadata(None)
        return checked(rows), self._exported_sequence(day)

    def _exported_sequence(self, day: date) -> int:
        import pyarrow.parquet as pq

        path = self._day_file(day)
        if not path.exists():
            return 0
        metadata = pq.read_schema(path).metadata or {}
        return int(metadata.get(b"pertoken.sequence", b"0"))

    def _droppable(self, limit: int, exported: Mapping[date, int]) -> list[int]:
        """Segments whose every block is exported and closed; the newest ones, which refill the window,
        stay."""
        needed: set[int] = {self._segment}
        rows = 0
        for segment in sorted(self._index.rows, reverse=True):
            if rows < self._window_rows:
                needed.add(segment)
            rows += self._index.rows[segment]
        for hour, places in self._index.places.items():
            done = hour < limit and not self._index.dirty(hour)
            for place in places:
                if not done or place.sequence > exported.get(_day(hour), 0):
                    needed.add(place.segment)
        return [s for s in self._segments() if s not in needed]

    def _path(self, segment: int) -> Path:
        return self._folder / "segments" / f"{segment:08d}.ptj"

    def _segments(self) -> list[int]:
        return sorted(int(p.stem) for p in (self._folder / "segments").glob("*.ptj") if p.stem.isdigit())

    def _day_file(self, day: date) -> Path:
        return self._folder / "days" / f"{day.isoformat()}.parquet"

    def _days(self) -> list[Path]:
        return sorted((self._folder / "days").glob("????-??-??.parquet"))

    # -- opening

    def _open(self) -> None:
        for name in ("segments", "days"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        self._guard = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._guard)
            raise InputError(
                f"another process writes the journal in {self._folder}: stop it first"
            ) from error
        for part in (self._folder / "days").glob("*.part"):
            part.unlink()
        self._recover()
        last = self._segments()
        self._start_segment(last[-1] if last else 1)

    def _recover(self) -> None:
        segments = self._segments()
        damaged: list[tuple[str, int, int]] = []
        torn = rows = 0
        for segment in segments:
            path = self._path(segment)
            raw = memoryview(path.read_bytes())
            for part in blocks.scan(raw):
                if isinstance(part, blocks.Block):
                    self._index.add(segment, part)
                    self._sequence = max(self._sequence, part.sequence)
                    rows += part.meta.rows
                elif part.torn and segment == segments[-1]:
                    torn = part.end - part.offset
                    os.truncate(path, part.offset)
                    _flush(path)
                else:
                    damaged.append((path.name, part.offset, part.end - part.offset))
        self.recovery = Recovery(len(segments), rows, torn, tuple(damaged))
        self._refill(segments)

    def _refill(self, segments: list[int]) -> None:
        """The window's identities, from the newest blocks that hold as many rows as it does."""
        chosen, rows = [], 0
        for segment in reversed(segments):
            if rows >= self._window_rows:
                break
            chosen.append(segment)
            rows += self._index.rows[segment]
        for segment in reversed(chosen):
            raw = memoryview(self._path(segment).read_bytes())
            for part in blocks.scan(raw):
                if isinstance(part, blocks.Block) and part.meta.rows:
                    table = blocks.read_table(blocks.payload_of(raw, part.offset))
                    new = identities(blocks.pack(table))
                    self._window.add(new[self._window.fresh(new)])


def open_journal(
    folder: str | Path,
    *,
    segment_bytes: int = SEGMENT_BYTES,
    window_rows: int = WINDOW_ROWS,
    reserve_bytes: int = RESERVE_BYTES,
) -> Journal:
    """The journal in a folder, made where it is missing; `journal.recovery` says what opening found.

    Parameters: segment_bytes: size at which a new segment starts; window_rows: at least so many of the
    newest rows are recognised when sent again; reserve_bytes: free disk below which `append` refuses.
    Raises InputError where another process holds it.
    """
    journal = Journal(Path(folder), segment_bytes, window_rows, reserve_bytes)
    journal._open()
    return journal


def _number(hour: datetime) -> int:
    if hour.tzinfo is None:
        raise InputError(f"{hour.isoformat()} has no time zone: give one, such as {hour.isoformat()}+00:00")
    return int(hour.timestamp() // SECONDS_PER_HOUR)


def _moment(hour: int) -> datetime:
    return datetime.fromtimestamp(hour * SECONDS_PER_HOUR, UTC)


def _day(hour: int) -> date:
    return _moment(hour).date()


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
