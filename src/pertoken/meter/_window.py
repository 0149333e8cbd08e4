"""Which records were seen lately: a set of 64-bit identities in flat arrays, two generations deep."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pertoken.meter._blocks import CODED, Packed, text_buffers
from pertoken.meter.records import LONGEST_NAME, STEPPED
from pertoken.units import base_meter

Identities = npt.NDArray[np.uint64]
_ODD = np.uint64(0x9E3779B97F4A7C15)
_SECRET = np.frombuffer(os.urandom(LONGEST_NAME), np.uint64)


def identities(packed: Packed) -> Identities:
    """64-bit identities of (source, key, phase, meter), never zero; good within this process only.

    The hash is keyed with this process's own random words: who sends us keys cannot make two of them collide.
    Among the window's 8 million rows a new record is taken for another by chance once in 2 × 10¹² times.
    """
    mixed = _hash_texts(packed.keys)
    for place, name in enumerate(("source", "phase", "meter"), 1):
        at = CODED.index(name)
        texts = _hash_texts(pa.array(packed.texts[at], pa.string()))
        hashed = texts[packed.codes[at]]
        if name == "meter":
            hashed = _without_step(packed, hashed)
        mixed = _mix(mixed + _SECRET[place]) ^ hashed
    mixed = _mix(mixed)
    return np.where(mixed == 0, _ODD, mixed)


def _without_step(packed: Packed, hashed: Identities) -> Identities:
    """The meters' hashes; where we put a call into a price step, that of the meter it was sent as.

    The same call sent again after steps changed is still the same call.
    """
    at, basis = CODED.index("meter"), CODED.index("basis")
    if STEPPED not in packed.texts[basis]:
        return hashed
    sent = _hash_texts(pa.array([base_meter(m) for m in packed.texts[at]], pa.string()))
    ours = packed.codes[basis] == packed.texts[basis].index(STEPPED)
    return np.where(ours, sent[packed.codes[at]], hashed)


def _hash_texts(texts: pa.Array[Any]) -> Identities:
    """Keyed 64-bit hash of each text: Σ mix(word + secret) over its 8-byte words, its length being one
    more."""
    offsets, data = text_buffers(texts)
    raw = np.frombuffer(data, np.uint8)
    starts, lengths = offsets[:-1].astype(np.int64), np.diff(offsets.astype(np.int64))
    result = np.empty(len(lengths), np.uint64)
    distinct = np.flatnonzero(np.bincount(lengths)).tolist() if len(lengths) else []
    for length in distinct:  # texts of one length are hashed together
        alone = len(distinct) == 1
        rows = np.arange(len(lengths)) if alone else np.flatnonzero(lengths == length)
        words = np.zeros((len(rows), -(-length // 8) * 8), np.uint8)
        if alone:
            words[:, :length] = raw.reshape(len(rows), length)
        else:
            words[:, :length] = raw[starts[rows][:, None] + np.arange(length)]
        mixed = _mix(words.view(np.uint64) + _SECRET[: words.shape[1] // 8])
        result[rows] = _mix(mixed.sum(axis=1, dtype=np.uint64) + np.uint64(length))
    return result


def _mix(words: Identities) -> Identities:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that spreads every bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class Window:
    """The last `rows` to 2 × `rows` identities. Old ones leave by the generation."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._young = _Table(min(rows, 1 << 12))
        self._old = _Table(1)

    def fresh(self, wanted: Identities) -> npt.NDArray[np.bool_]:
        """True where an identity was neither seen nor stands earlier in `wanted`."""
        result = ~(self._young.has(wanted) | self._old.has(wanted))
        ordered = np.sort(wanted)
        if (ordered[1:] == ordered[:-1]).any():
            _, first = np.unique(wanted, return_index=True)
            only = np.zeros(len(wanted), np.bool_)
            only[first] = True
            result &= only
        return result

    def add(self, new: Identities) -> None:
        """Remember identities, all fresh."""
        if self._young.count + len(new) > self._rows and self._young.count:
            # The oldest generation's memory is taken again: fresh pages cost more than clearing known ones.
            self._old, self._young = self._young, self._old
            self._young.clear()
        self._young.add(new)


class _Table:
    """Open addressing with linear probing, at most half full; zero marks an empty slot."""

    def __init__(self, expected: int) -> None:
        self.count = 0
        self._slots = np.zeros(_size(expected), np.uint64)

    def clear(self) -> None:
        self.count = 0
        self._slots.fill(0)

    def has(self, wanted: Identities) -> npt.NDArray[np.bool_]:
        if not self.count:
            return np.zeros(len(wanted), np.bool_)
        mask = np.uint64(len(self._slots) - 1)
        at = wanted & mask
        found = self._slots[at]
        result: npt.NDArray[np.bool_] = found == wanted
        open_ = np.flatnonzero(~result & (found != 0))
        while len(open_):
            at[open_] = (at[open_] + np.uint64(1)) & mask
            found_here = self._slots[at[open_]]
            hit = found_here == wanted[open_]
            result[open_[hit]] = True
            open_ = open_[~hit & (found_here != 0)]
        return result

    def add(self, new: Identities) -> None:
        if 2 * (self.count + len(new)) > len(self._slots):
            kept = self._slots[self._slots != 0]
            self._slots = np.zeros(_size(4 * (self.count + len(new))), np.uint64)
            self._put(kept)
        self._put(new)
        self.count += len(new)

    def _put(self, new: Identities) -> None:
        mask = np.uint64(len(self._slots) - 1)
        at: npt.NDArray[Any] = new & mask
        left = new
        while len(left):
            empty = self._slots[at] == 0
            self._slots[at[empty]] = left[empty]  # of several for one slot, the last stays
            lost = self._slots[at] != left
            left, at = left[lost], (at[lost] + np.uint64(1)) & mask


def _size(expected: int) -> int:
    return 1 << max(4, (2 * expected - 1).bit_length())
