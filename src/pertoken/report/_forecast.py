"""What the hours ahead will come to: the same hour of past weeks, with the spread those weeks had.

Notation: x(t) what an hour came to, s(t) its place in the cycle (the hour of the local week; with less than two weeks
of history the hour of the day), C whole cycles of history, m(s) the mean of x over the C hours of place s::

    expected(h) = Σ m(s(t))                                 over the h hours ahead
    e(t)        = (x(t) − m(s(t))) × √(C / (C − 1))         what the mean leaves, as large as before it was fitted
    path_r(h)   = Σ m(s(t)) + (p_r(s(t)) + b_r(t)) × c_r    r = 1 … 1,000
    b_r         runs of up to a cycle of e, begun at the same hour of any day: how far hours and days stray, together
    p_r         the mean of C such runs: how well m is known
    c_r         √(ν / χ²(ν)), ν = 2 (C − 1): the spread was itself learnt from C cycles, so the tails are Student's
    low, high   the 10 % and 90 % quantiles of path_r(h)

It takes the coming weeks to be like the past ones: growth, a launch or a holiday is not foreseen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pertoken.units import DAYS_PER_WEEK, HOURS_PER_DAY

HOURS_PER_WEEK = DAYS_PER_WEEK * HOURS_PER_DAY
MOST_WEEKS = 8
LEAST_DAYS = 2
COVERED = 0.8
"""Share of outcomes that the interval is meant to hold."""
_PATHS = 1_000
_SEED = 7

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Outlook:
    """Running totals over the hours ahead, shape (H,): expected, and the ends of the 80 % interval."""

    expected: Floats
    low: Floats
    high: Floats
    method: str


def outlook(past: Floats, past_places: Places, ahead_places: Places) -> Outlook | None:
    """What the hours ahead will come to, from the hours that were; None with less than two days of them.

    Parameters: past, what each hour came to, oldest first, without a gap, shape (T,); past_places and ahead_places, the
    hour of the local week of each, 0 to 167, shapes (T,) and (H,). Deterministic: the same hours give the same outlook.

    >>> flat = outlook(np.full(400, 2.0), np.arange(400) % 168, np.arange(400, 410) % 168)
    >>> float(flat.expected[-1]), float(flat.low[-1]), flat.method
    (20.0, 20.0, 'hour-of-week means of 2 weeks')
    """
    weeks = min(MOST_WEEKS, len(past) // HOURS_PER_WEEK)
    if weeks >= 2:
        length, count, name = HOURS_PER_WEEK, weeks, "hour-of-week means of {} weeks"
    elif len(past) >= LEAST_DAYS * HOURS_PER_DAY:
        length, count, name = HOURS_PER_DAY, len(past) // HOURS_PER_DAY, "hour-of-day means of {} days"
    else:
        return None
    used, places = past[-count * length :], past_places[-count * length :] % length
    means = np.bincount(places, weights=used, minlength=length) / np.maximum(
        np.bincount(places, minlength=length), 1
    )
    left = (used - means[places]) * np.sqrt(count / (count - 1))
    ahead = ahead_places % length
    expected = np.cumsum(means[ahead])
    draw = np.random.default_rng(_SEED)
    hours = past_places[-count * length :]
    known = np.zeros((_PATHS, length))
    cycle = np.arange(places[0], places[0] + length) % length
    for _ in range(count):
        known[:, cycle] += _runs(left, hours, hours[:length], length, draw) / count
    strays = known[:, ahead] + _runs(left, hours, ahead_places, length, draw)
    # How far hours stray was itself learnt from few cycles: the fewer, the wider the tails (Student's t).
    freedom = 2 * (count - 1)
    strays *= np.sqrt(freedom / draw.chisquare(freedom, _PATHS))[:, None]
    low, high = np.quantile(np.cumsum(strays, axis=1), [(1 - COVERED) / 2, (1 + COVERED) / 2], axis=0)
    return Outlook(expected, expected + low, expected + high, name.format(count))


def _runs(
    left: Floats, past_places: Places, ahead_places: Places, length: int, draw: np.random.Generator
) -> Floats:
    """By path and hour ahead, runs of what the means left, wrapped around the history, shape (R, H)."""
    total = len(left)
    parts = []
    for at in range(0, len(ahead_places), length):
        size = min(length, len(ahead_places) - at)
        begins = np.flatnonzero(past_places % HOURS_PER_DAY == ahead_places[at] % HOURS_PER_DAY)
        starts = draw.choice(begins, size=_PATHS)
        parts.append(left[(starts[:, None] + np.arange(size)) % total])
    return np.concatenate(parts, axis=1) if parts else np.zeros((_PATHS, 0))
