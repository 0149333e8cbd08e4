"""The records of the hour that is not over yet, and of the last minutes: each block of the journal is read once.

A friend of `Journal` in this folder: it looks into its index as the journal's own reading does. A hundred targets
write 24,000 blocks an hour; adding them up anew for every look would cost seconds, the new ones cost milliseconds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from datetime import datetime
from typing import Any

import pyarrow as pa

from pertoken.meter import _blocks as blocks
from pertoken.meter._index import Place
from pertoken.meter.journal import Journal, _day
from pertoken.meter.records import Sums, partial_sums, summed, sums_of
from pertoken.units import MICROSECONDS_PER_SECOND, SECONDS_PER_HOUR

LONGEST_S = 1200
"""How far back `recent` can look [s]."""


class Running:
    """Sums of the current hour and of each of the last seconds. Not thread safe: its owner locks."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._hour = 0
        self._read: dict[int, int] = {}
        """By hour, the sequence up to which its blocks were added up."""
        self._total: dict[tuple[Any, ...], list[int]] = {}
        self._seconds: dict[int, list[Sums]] = defaultdict(list)
        self._now: datetime | None = None
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

    def recent(self, now: datetime, seconds: int) -> pa.Table:
        """Records of the last `seconds` before `now` (`records.TOTALS`), all under the hour of `now`.

        At most `LONGEST_S` back.
        """
        self.follow(now)
        last = math.floor(now.timestamp())
        parts = [
            {(self._hour, *key[1:]): value for key, value in sums.items()}
            for second in range(last - seconds + 1, last + 1)
            for sums in self._seconds.get(second, ())
        ]
        return summed(parts)

    def follow(self, now: datetime) -> None:
        """Read what came since the last look. The first look at an hour reads all of it."""
        self._now = now
        hour = math.floor(now.timestamp()) // SECONDS_PER_HOUR
        if hour != self._hour:
            self._begin(hour)
        oldest = math.floor(now.timestamp()) - LONGEST_S
        # What lies an hour back is read for its last minutes alone.
        for number in (hour - 1, hour):
            since = 0 if number == hour else oldest * MICROSECONDS_PER_SECOND
            if number == hour or oldest < hour * SECONDS_PER_HOUR:
                self._take(number, since)
        for second in [s for s in self._seconds if s < oldest]:
            del self._seconds[second]

    def _begin(self, hour: int) -> None:
        if hour != self._hour + 1:
            self._read.clear()
            self._seconds.clear()
        self._read = {h: s for h, s in self._read.items() if h in (hour - 1, hour)}
        self._hour, self._total = hour, {}

    def _take(self, hour: int, since_us: int) -> None:
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
        if anew and since_us:
            new = self._newest(new, since_us)
        for raw, place in journal._payloads(new):
            packed = blocks.unpack(raw)
            if place.mixed:
                packed = blocks.take(packed, packed.ts // blocks.HOUR_US == hour)
            self._add(packed, hour)
        self._read[hour] = max(upto, sequence)

    def _newest(self, places: list[Place], since_us: int) -> list[Place]:
        """The blocks from the first on that told of a time after `since_us`, looked for from the end."""
        kept = []
        for place in reversed(places):
            ((raw, _),) = self._journal._payloads([place])
            if int(blocks.unpack(raw).ts.max()) < since_us:
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
        by_second: dict[int, Sums] = defaultdict(dict)
        for key, value in sums.items():
            second = base + int(key[0])
            by_second[second][key] = value
            if second > self.last_words.get(key[1], 0):
                self.last_words[key[1]] = second
        for second, part in by_second.items():
            self._seconds[second].append(part)
        if hour == self._hour:
            self._add_hour(sums)

    def _add_hour(self, sums: Sums) -> None:
        for key, (whole, fine) in sums.items():
            into = self._total.setdefault(key[1:], [0, 0])
            into[0] += whole
            into[1] += fine
