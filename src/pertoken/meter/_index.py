"""What is where in a journal's segments, kept in memory."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from pertoken.meter import _blocks as blocks


class Place(NamedTuple):
    segment: int
    offset: int
    sequence: int
    mixed: bool
    """Whether the block has rows of other hours too."""


@dataclass
class Index:
    """What is in the segments, kept in memory."""

    places: dict[int, list[Place]] = field(default_factory=lambda: defaultdict(list))
    cleaned: dict[int, int] = field(default_factory=dict)
    marks: dict[str, bytes] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """Rows by segment."""

    def add(self, segment: int, block: blocks.Block) -> None:
        for hour in block.meta.hours:
            self.places[hour].append(Place(segment, block.offset, block.sequence, len(block.meta.hours) > 1))
        for hour, sequence in block.meta.cleaned.items():
            self.cleaned[hour] = max(sequence, self.cleaned.get(hour, 0))
        self.marks.update(block.meta.marks)
        self.rows[segment] += block.meta.rows

    def dirty(self, hour: int) -> bool:
        """Whether an hour has records newer than its last cleaning."""
        places = self.places.get(hour)
        return places is not None and places[-1].sequence > self.cleaned.get(hour, 0)

    def forget(self, segment: int) -> None:
        """Drop what a removed segment held."""
        for hour, places in list(self.places.items()):
            left = [p for p in places if p.segment != segment]
            if left:
                self.places[hour] = left
            else:
                del self.places[hour]
        self.rows.pop(segment, None)
