"""From readings to quantities: counters to differences, gauges to integrals, silence to gaps. Pure; state
in, state out.

A counter's growth between two readings is booked to the hour it fell in, split by time where the two readings
stand in different hours. So is the growth over a silence longer than `MAX_GAP_S`, and the silence is marked with
``gap_seconds``: its mean power is measured (`OVER_GAP`), the hours of its tokens are assumed (`SPREAD`). All of it
in the hour it was seen would be a peak there never was, and tokens away from the events that say whose they are.
A counter that starts again (its value fell, or its process started since) counts from zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple
from zlib import crc32

import msgspec

from pertoken.errors import InputError
from pertoken.meter._exposition import Series
from pertoken.meter._names import (
    DEVICE_LABELS,
    MODEL_LABELS,
    NAME_MAP,
    PART_LABELS,
    SLICE_ID,
    SLICE_PROFILE,
    SLICES_PER_GPU,
    Foreign,
    rules_of,
)
from pertoken.units import JOULES_PER_KWH, MILLISECONDS_PER_SECOND, SECONDS_PER_HOUR

MAX_GAP_S = 300.0
"""Silence up to this is an ordinary pause between readings."""
TOLD_AT_ZERO = ("running_seconds", "active_seconds", "output_tokens", "prompt_tokens", "requests")
"""Meters whose zero says something: idle is not unknown, and who counts here is believed on none too."""
OVER_GAP = "measured:mean_over_gap"
"""Basis of energy that a counter went on counting over a silence: its mean power is known, and holds in each hour."""
SPREAD = "assumed:mean_over_gap"
"""Basis of what was counted over a silence, its hours unknown: the same in each second of it."""
_LARGEST_GPU_W = 20_000.0  # no board draws this: a reading above it is in milliwatts
_STARTED_S = 1.0  # tolerance of process start times, which move by a tick
_SETTLED_S = 60.0  # after this, a series new to an instance that sends them one by one was not there before
_MAX_SERIES = 100_000
_WORDS = crc32("".join(f"{n}={r.meter};" for n, rules in sorted(NAME_MAP.items()) for r in rules).encode())


class _Last(msgspec.Struct, array_like=True):
    """The last reading of one series."""

    time_s: float
    value: float


class State(msgspec.Struct, array_like=True):
    """What must survive between readings of one target. Treat as a value: `advance` returns a new one."""

    watching_s: float
    """Since when this meter watches: a process started later is counted from its first token."""
    first_s: float = 0.0
    last_s: float = 0.0
    start_s: float = 0.0
    last: dict[str, _Last] = {}
    best: dict[str, tuple[int, float]] = {}
    """By meter and device, the best rank seen and when."""
    words: int = 0
    """Which names this meter knew when it was written."""

    def to_bytes(self) -> bytes:
        """For the journal's marks."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, mark: bytes) -> State:
        """Raises InputError on bytes that are no state."""
        try:
            return msgspec.msgpack.decode(mark, type=State)
        except msgspec.MsgspecError as error:
            raise InputError(f"a counter state cannot be read: {error}") from error


class Reading(NamedTuple):
    """One value of one series at a POSIX time."""

    series: Series
    value: float
    time_s: float


class Quantity(NamedTuple):
    """What was counted between two times."""

    kind: str
    meter: str
    model: str
    device: str
    labels: dict[str, str]
    start_s: float
    end_s: float
    amount: float
    basis: str


class Piece(NamedTuple):
    """The part of an interval in one hour: a time in it, and its share."""

    time_s: float
    fraction: float


@dataclass
class _Pass:
    """One call of `advance`."""

    state: State
    whole: bool
    previous_s: float
    learnt: bool
    """Whether the state is of a meter that knew other names: a series new to it may have counted for long."""
    found: list[tuple[str, int, Quantity]] = field(default_factory=list)


def advance(
    state: State, readings: Iterable[Reading], *, now_s: float, whole: bool
) -> tuple[list[Quantity], State]:
    """What the readings say was counted since the last ones, and the new state.

    Parameters: readings in order of time; now_s [POSIX s], when they were taken or received; `whole`: the
    readings are all of a target's series at one time (a scrape), else any of them in any portion (remote
    write). Readings not newer than the last of their series change nothing, so a repeated delivery counts
    once.
    """
    learnt = bool(state.last_s) and state.words != _WORDS
    first_s = 0.0 if learnt else state.first_s  # series sent one by one settle again
    new = State(
        state.watching_s, first_s, state.last_s, state.start_s, dict(state.last), dict(state.best), _WORDS
    )
    work = _Pass(new, whole, state.last_s, learnt)
    picked: list[tuple[Reading, Foreign]] = []
    seen: set[str] = set()
    for reading in readings:
        for rule in rules_of(reading.series.name):
            if rule.how == "start":
                _start(new, reading.value)
            elif _fits(rule, reading.series) and reading.value == reading.value:
                picked.append((reading, rule))
    told = state.last_s + _STARTED_S < new.start_s <= now_s  # when it began anew, to the second
    if whole and not told and _fell(state, picked):
        new.start_s = now_s
    for reading, rule in picked:
        new.first_s = new.first_s or reading.time_s
        _one(work, reading, rule, seen)
    if whole or picked:
        new.first_s = new.first_s or now_s
        new.last_s = max(new.last_s, max((r.time_s for r, _ in picked), default=now_s))
    _forget(new)
    return [q for group, rank, q in work.found if _told_by(new, group, rank)], new


def hours_of(start_s: float, end_s: float) -> list[Piece]:
    """The hours an interval lies in, with its share in each, largest part of rounding left to the caller.

    >>> hours_of(3590.0, 3630.0)
    [Piece(time_s=3590.0, fraction=0.25), Piece(time_s=3630.0, fraction=0.75)]
    """
    if end_s <= start_s or end_s // SECONDS_PER_HOUR == start_s // SECONDS_PER_HOUR:
        return [Piece(end_s, 1.0)]
    length = end_s - start_s
    pieces, at = [], start_s
    while at < end_s:
        border = min((at // SECONDS_PER_HOUR + 1) * SECONDS_PER_HOUR, end_s)
        pieces.append(Piece(at if border < end_s else end_s, (border - at) / length))
        at = border
    return pieces


def _start(state: State, value: float) -> None:
    if value == value and value > state.start_s + _STARTED_S:
        state.start_s = value


def _fits(rule: Foreign, series: Series) -> bool:
    labels = series.labels
    return all(labels.get(name) in values for name, values in rule.only.items()) and not any(
        labels.get(name) in values for name, values in rule.never.items()
    )


def _fell(state: State, picked: list[tuple[Reading, Foreign]]) -> bool:
    """Whether an engine's counter fell since the last scrape: then its process, and all its counters,
    restarted."""
    for reading, rule in picked:
        if rule.how == "counter" and not rule.device:
            before = state.last.get(_identity(reading.series, rule))
            if before is not None and reading.value < before.value:
                return True
    return False


def device_of(series: Series) -> str:
    """Which GPU or machine a series is of."""
    labels = series.labels
    for name in DEVICE_LABELS:
        if labels.get(name):
            host = labels.get("Hostname", labels.get("hostname", "")) if name == "gpu" else ""
            return f"{host}{labels[name]}"
    return ""


def _identity(series: Series, rule: Foreign) -> str:
    labels = series.labels
    name = series.name.removesuffix("_total")
    if rule.device:
        # Labels of hardware come and go (the pod that holds a GPU), so they are no part of who it is.
        part = SLICE_ID if rule.how == "active" else ""
        extra = [labels.get(p, "") for p in ((part,) if part else PART_LABELS if rule.kind == "node" else ())]
        return "\x1f".join([name, rule.meter, device_of(series), *extra])
    return "\x1f".join([name, rule.meter, *(f"{k}={v}" for k, v in sorted(labels.items()))])


def _one(work: _Pass, reading: Reading, rule: Foreign, seen: set[str]) -> None:
    state, (series, value, time_s) = work.state, reading
    identity = _identity(series, rule)
    before = state.last.get(identity)
    if before is not None and time_s <= before.time_s:
        return  # delivered before, or the same GPU shown once per MIG slice
    if work.whole and identity in seen:
        return
    seen.add(identity)
    if rule.milli_trap and rule.how == "power" and value > _LARGEST_GPU_W:
        value /= MILLISECONDS_PER_SECOND
    group = f"{rule.meter}\x1f{device_of(series) if rule.device else ''}"
    rank, _ = state.best.get(group, (rule.rank, time_s))
    if rule.rank <= rank or time_s - state.best[group][1] > MAX_GAP_S:
        state.best[group] = (rule.rank, time_s)
    for amount, start_s, basis in _amounts(work, before, rule, series, value, time_s):
        quantity = Quantity(
            rule.kind, rule.meter, _model(series), device_of(series) if rule.device else "",
            dict(series.labels), start_s, time_s, amount, basis,
        )  # fmt: skip
        work.found.append((group, rule.rank, quantity))
    state.last[identity] = _Last(time_s, value)


def _amounts(
    work: _Pass, before: _Last | None, rule: Foreign, series: Series, value: float, time_s: float
) -> Iterator[tuple[float, float, str]]:
    """Amount, start of its interval and basis."""
    if rule.how == "counter":
        yield from _growth(work, before, rule, value, time_s)
        return
    if before is None or time_s - before.time_s > MAX_GAP_S:
        return  # a gauge says nothing of a silence
    length = time_s - before.time_s
    if rule.how == "running":
        share = ((before.value > 0) + (value > 0)) / 2
        yield share * length, before.time_s, "measured"
    elif rule.how == "power":
        mean_w = max(0.0, (before.value + value) / 2)
        yield mean_w * length / JOULES_PER_KWH, before.time_s, "measured:power"
    elif rule.how == "active":
        share = min(1.0, max(0.0, (before.value + value) / 2 * rule.scale))
        yield share * length * _slice(series), before.time_s, "measured"


def _growth(
    work: _Pass, before: _Last | None, rule: Foreign, value: float, time_s: float
) -> Iterator[tuple[float, float, str]]:
    state = work.state
    if value < 0 or value == float("inf"):
        return
    if before is None:
        start = _since_zero(work, rule, time_s)
        if start is not None and value > 0:
            yield value * rule.scale, start, SPREAD if time_s - start > MAX_GAP_S else "measured"
        return
    restarted = not rule.device and before.time_s + _STARTED_S < state.start_s <= time_s
    grown = value if restarted or value < before.value else value - before.value
    start_s = max(before.time_s, state.start_s) if restarted else before.time_s
    amount = grown * rule.scale
    length = time_s - before.time_s
    if rule.milli_trap and length > 0 and amount * JOULES_PER_KWH / length > _LARGEST_GPU_W:
        amount /= MILLISECONDS_PER_SECOND
    start_s = min(start_s, time_s)
    basis = "measured"
    if time_s - start_s > MAX_GAP_S:
        basis = OVER_GAP if rule.steady and value >= before.value else SPREAD
    if amount > 0 or rule.meter in TOLD_AT_ZERO:
        yield amount, start_s, basis


def _since_zero(work: _Pass, rule: Foreign, time_s: float) -> float | None:
    """From when a series seen for the first time counted up from zero; None where nobody knows."""
    state = work.state
    if rule.device:
        return None
    if state.start_s >= state.watching_s and work.previous_s < state.start_s <= time_s:
        return state.start_s
    if not work.previous_s or work.learnt:
        return None
    if work.whole or time_s > state.first_s + _SETTLED_S:
        return work.previous_s
    return None


def _told_by(state: State, group: str, rank: int) -> bool:
    return state.best[group][0] == rank


def _model(series: Series) -> str:
    return next((series.labels[name] for name in MODEL_LABELS if series.labels.get(name)), "")


def _slice(series: Series) -> float:
    """Share of a GPU that a MIG instance is, by its profile's compute slices; 1 for a whole GPU."""
    profile = series.labels.get(SLICE_PROFILE, "")
    slices = profile.partition("g.")[0]
    if not profile or not slices.isdigit():
        return 1.0
    return min(1.0, int(slices) / SLICES_PER_GPU)


def _forget(state: State) -> None:
    """Series unseen the longest go first once there are too many: a target cannot fill the memory."""
    if len(state.last) > _MAX_SERIES:
        newest = sorted(state.last.items(), key=lambda item: item[1].time_s)[-_MAX_SERIES // 2 :]
        state.last = dict(newest)
