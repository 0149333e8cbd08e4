"""The records of the hour that is not over yet, and of the last minutes: each block of the journal is read once.

A friend of `Journal` in this folder: it looks into its index as the journal's own reading does. A hundred targets
write 24,000 blocks an hour; adding them up anew for every look would cost seconds, the new ones cost milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import pyarrow as pa

from pertoken.meter import _blocks as blocks
from pertoken.meter._index import Place
from pertoken.meter.journal import Journal, _day
from pertoken.meter.records import Sums, partial_sums, summed, sums_of
from pertoken.units import MICROSECONDS_PER_SECOND, SECONDS_PER_HOUR

_MOST_SUMS = 200_000
"""Sums of the last seconds that are kept; above it they are of longer pieces, so that a crowd of tenants fits too."""
_PIECES_S = (1, 5, 10)
_Key = tuple[Any, ...]


class Running:
    """Sums of the current hour and of each of the last seconds. Not thread safe: its owner locks.

    `window_s`: how many of the last seconds `recent` is asked for.
    """

    def __init__(self, journal: Journal, window_s: int) -> None:
        self._journal, self._window_s = journal, window_s
        self._hour = 0
        self._read: dict[int, int] = {}
        """By hour, the sequence up to which its blocks were added up."""
        self._total: dict[_Key, list[int]] = {}
        self._piece_s = _PIECES_S[0]
        self._pieces: dict[int, dict[_Key, list[int]]] = {}
        """By its first second, the sums of a piece."""
        self._now: datetime | None = None
        self._oldest_s = 0
        self.last_words: dict[str, int] = {}
        """By source, the newest time [POSIX s] it told of, of the hours that were read."""

    def totals(self, now: datetime) -> pa.Table:
        """Records of the hour of `now` so far (`records.TOTALS`)."""
        self.follow(now)
        return summed([{(self._hour, *key): (sums[0], sums[1]) for key, sums in self._total.items()}])

    def records(self, hour: datetime) -> pa.Table | None:
        """All records of an hour (`records.TOTALS`), where it is the one that is being read."""
        if self._now is None or math.floor(hour.timestamp()) // SECONDS_PER_HOUR != self._hour:
            return None
        return self.totals(self._now)

    def recent(self, now: datetime) -> tuple[pa.Table, int]:
        """Records of the last seconds before `now` (`records.TOTALS`), all under the hour of `now`, and how many.

        Where pieces are longer than a second, the one that is not over is left out and the window is of whole ones.
        """
        self.follow(now)
        size_s = self._piece_s
        count = -(-self._window_s // size_s)
        end_s = math.floor(now.timestamp()) // size_s * size_s + (size_s if size_s == 1 else 0)
        parts = [
            {(self._hour, *key): (sums[0], sums[1]) for key, sums in self._pieces.get(first_s, {}).items()}
            for first_s in range(end_s - count * size_s, end_s, size_s)
        ]
        return summed(parts), count * size_s

    def follow(self, now: datetime) -> None:
        """Read what came since the last look. The first look at an hour reads all of it."""
        self._now = now
        hour = math.floor(now.timestamp()) // SECONDS_PER_HOUR
        if hour != self._hour:
            self._begin(hour)
        self._oldest_s = math.floor(now.timestamp()) - self._window_s - 2 * _PIECES_S[-1]
        # What lies an hour back is read for its last seconds alone.
        if self._oldest_s < hour * SECONDS_PER_HOUR:
            self._take(hour - 1)
        self._take(hour)
        for first_s in [s for s in self._pieces if s < self._oldest_s]:
            del self._pieces[first_s]

    def _begin(self, hour: int) -> None:
        if hour != self._hour + 1:
            self._read.clear()
            self._pieces.clear()
        self._read = {h: s for h, s in self._read.items() if h in (hour - 1, hour)}
        self._hour, self._total = hour, {}

    def _take(self, hour: int) -> None:
        """Add up the blocks of an hour that are new."""
        journal, upto = self._journal, self._read.get(hour, 0)
        anew = hour not in self._read
        with journal._lock:
            places = journal._index.places.get(hour, [])
            first = len(places)
            while first and places[first - 1].sequence > upto:
                first -= 1
            new, sequence = places[first:], journal._sequence
        if anew and hour == self._hour:
            exported, reached = journal._exported(_day(hour), hour)
            if exported.num_rows:
                self._add_hour(sums_of(exported))
                new = [place for place in new if place.sequence > reached]
        if anew and hour != self._hour:
            new = self._newest(new)
        for raw, place in journal._payloads(new):
            packed = blocks.unpack(raw)
            if place.mixed:
                packed = blocks.take(packed, packed.ts // blocks.HOUR_US == hour)
            self._add(packed, hour)
        self._read[hour] = max(upto, sequence)

    def _newest(self, places: list[Place]) -> list[Place]:
        """The blocks from the first on that told of the last seconds, looked for from the end."""
        kept = []
        for place in reversed(places):
            ((raw, _),) = self._journal._payloads([place])
            if int(blocks.unpack(raw).ts.max()) < self._oldest_s * MICROSECONDS_PER_SECOND:
                break
            kept.append(place)
        return kept[::-1]

    def _add(self, packed: blocks.Packed, hour: int) -> None:
        seconds = packed.ts // MICROSECONDS_PER_SECOND
        if not len(seconds):
            return
        # Summed by hour of its argument: here a second counts as one.
        base = hour * SECONDS_PER_HOUR
        sums = partial_sums((seconds - base) * blocks.HOUR_US, packed.quantity, packed.codes, packed.texts)
        for (offset, *key), value in sums.items():
            second = base + int(offset)
            if second > self.last_words.get(key[0], 0):
                self.last_words[key[0]] = second
            if second >= self._oldest_s:
                piece = self._pieces.setdefault(second // self._piece_s * self._piece_s, {})
                _into(piece, tuple(key), value)
        if hour == self._hour:
            self._add_hour(sums)
        if sum(map(len, self._pieces.values())) > _MOST_SUMS and self._piece_s < _PIECES_S[-1]:
            self._lengthen()

    def _add_hour(self, sums: Sums) -> None:
        for key, value in sums.items():
            _into(self._total, key[1:], value)

    def _lengthen(self) -> None:
        """Put pieces together: fewer, longer ones."""
        self._piece_s = _PIECES_S[_PIECES_S.index(self._piece_s) + 1]
        before, self._pieces = self._pieces, {}
        for first_s, sums in before.items():
            piece = self._pieces.setdefault(first_s // self._piece_s * self._piece_s, {})
            for key, value in sums.items():
                _into(piece, key, value)


def _into(sums: dict[_Key, list[int]], key: _Key, value: Sequence[int]) -> None:
    into = sums.setdefault(key, [0, 0])
    into[0] += value[0]
    into[1] += value[1]
