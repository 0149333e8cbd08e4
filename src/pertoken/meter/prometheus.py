"""Prometheus as a source: scraped expositions and remote-write requests become records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from pertoken.meter._counters import (
    MAX_GAP_S,
    OVER_GAP,
    TOLD_AT_ZERO,
    Quantity,
    Reading,
    State,
    advance,
    device_of,
    hours_of,
)
from pertoken.meter._exposition import Series, parse
from pertoken.meter._names import rules_of
from pertoken.meter._remote_write import decode
from pertoken.meter._split import split
from pertoken.meter.records import concat, empty, records
from pertoken.units import DAYS_PER_YEAR, HOURS_PER_DAY, METERS, MILLISECONDS_PER_SECOND, SECONDS_PER_HOUR

_AHEAD_S = float(SECONDS_PER_HOUR)  # a sender's clock may run ahead by this much
_BEHIND_S = float(DAYS_PER_YEAR * HOURS_PER_DAY * SECONDS_PER_HOUR)
"""Samples before that are no news: each hour of a silence is a row, and one since 1970 would be half a million."""
UNNAMED = "(unnamed)"
"""Instance of remote-written series that carry no instance label."""


@dataclass(frozen=True)
class Target:
    """One thing that exposes metrics, and what we know of it that it does not say itself.

    `pool`: the fleet's pool it belongs to. `model`: the model of an engine that does not name its own
    (llama.cpp). `names`: an engine's name of a model to ours. `tenant`: whose it is, where it serves one
    tenant alone. `gpus`: GPUs an engine instance holds, a MIG slice or shared GPU as a fraction; 0: its
    share of the pool's. `pools`: the pool by the value of any label (GPU UUID, host, namespace), for an
    exporter that sees several.
    """

    name: str
    pool: str
    url: str = ""
    model: str = ""
    tenant: str = ""
    gpus: float = 0.0
    names: Mapping[str, str] = field(default_factory=dict)
    pools: Mapping[str, str] = field(default_factory=dict)


def read(
    text: str | bytes, target: Target, state: State, *, now_s: float, openmetrics: bool = False
) -> tuple[pa.Table, State]:
    """What a scrape adds to the records, and the state to journal with them.

    Parameters: text of the exposition; the target's last state; now_s [POSIX s] of the scrape.
    Journal both in one append (``marks={target.name: state.to_bytes()}``): then a crash loses nothing and
    counts nothing twice. Raises InputError on text that is no exposition.
    """
    samples = parse(text, openmetrics=openmetrics)
    found = ((s.name, s.labels, v) for s, v in zip(samples.series, samples.values, strict=True))
    return read_samples(found, target, state, now_s=now_s)


def read_samples(
    samples: Iterable[tuple[str, Mapping[str, str], float]], target: Target, state: State, *, now_s: float
) -> tuple[pa.Table, State]:
    """As `read`, from (name, labels, value): all of a target's samples at one time."""
    if now_s <= state.last_s:
        return empty(), state  # our clock stepped back: the next reading past the last one counts it all
    readings = [
        Reading(Series(name, labels), value, now_s) for name, labels, value in samples if rules_of(name)
    ]
    quantities, new = advance(state, readings, now_s=now_s, whole=True)
    return _table(quantities + _watched(readings, state.last_s, now_s), target, now_s), new


def read_remote_write(
    body: bytes, targets: Mapping[str, Target], states: Mapping[str, State], *, now_s: float
) -> tuple[pa.Table, dict[str, State], dict[str, int]]:
    """What a remote-write request (v1: snappy, protobuf) adds, the new states, and series of unknown
    instances.

    Parameters: targets and states by instance (label ``instance``, or ``job/instance`` where a target is so
    named). A sender repeats a request until it is acknowledged: samples not newer than the last of their
    series add nothing. Raises InputError on a body that is no write request.
    """
    return by_instance(decode(body), targets, states, now_s=now_s)


def by_instance(
    written: Iterable[tuple[dict[str, str], list[tuple[int, float]]]],
    targets: Mapping[str, Target],
    states: Mapping[str, State],
    *,
    now_s: float,
) -> tuple[pa.Table, dict[str, State], dict[str, int]]:
    """As `read_remote_write`, from label sets (``__name__`` among them) with their samples [ms, value]."""
    by_target: dict[str, list[Reading]] = defaultdict(list)
    unknown: dict[str, int] = defaultdict(int)
    for labels, samples in written:
        name = labels.pop("__name__", "")
        if not rules_of(name):
            continue
        instance = labels.get("instance", UNNAMED)
        key = f"{labels.get('job', '')}/{instance}"
        key = key if key in targets else instance
        if key not in targets:
            unknown[instance] += 1
            continue
        series = Series(name, labels)
        by_target[key] += [
            Reading(series, value, ms / MILLISECONDS_PER_SECOND)
            for ms, value in samples
            if now_s - _BEHIND_S < ms / MILLISECONDS_PER_SECOND < now_s + _AHEAD_S
        ]
    tables, new = [], {}
    for key, readings in by_target.items():
        readings.sort(key=lambda r: r.time_s)
        state = states.get(key) or State(now_s)
        before = state.last_s
        quantities, new[key] = advance(state, readings, now_s=now_s, whole=False)
        at_time: dict[float, list[Reading]] = defaultdict(list)
        for reading in readings:
            if reading.time_s > before:
                at_time[reading.time_s].append(reading)
        for time_s, together in at_time.items():
            quantities += _watched(together, before, time_s)
            before = time_s
        tables.append(_table(quantities, targets[key], now_s))
    return concat(tables), new, dict(unknown)


def _watched(readings: Collection[Reading], last_s: float, now_s: float) -> list[Quantity]:
    """Seconds a target was seen since `last_s` [POSIX s], or the gap, from what was read of it at `now_s`."""
    rules = [(r, rule) for r in readings for rule in rules_of(r.series.name) if rule.how != "start"]
    if not rules or not last_s:
        return []
    length = now_s - last_s
    interval = (last_s, now_s)
    # A page may tell of an engine and of its GPUs (NIM, Triton): each is seen.
    kinds = dict.fromkeys(rule.kind for _, rule in rules)
    meter = "gap_seconds" if length > MAX_GAP_S else "seen_seconds"
    # What was read before the silence, or comes in a later request, does not say that this is the same process.
    starts = [r.value for r in readings for rule in rules_of(r.series.name) if rule.how == "start"]
    alive = bool(starts) and all(0 < start_s <= last_s for start_s in starts)
    basis = _ALIVE if meter == "gap_seconds" and alive else "measured"
    found = [Quantity(kind, meter, "", "", {}, *interval, length, basis) for kind in kinds]
    if meter == "seen_seconds":
        gpus: dict[str, dict[str, str]] = {}
        for reading, rule in rules:
            if rule.kind == "device":
                gpus.setdefault(device_of(reading.series), dict(reading.series.labels))
        found += [
            Quantity("device", "gpu_seen_seconds", "", gpu, labels, *interval, length, "measured")
            for gpu, labels in gpus.items()
        ]
    return found


def _table(quantities: list[Quantity], target: Target, now_s: float) -> pa.Table:
    """Quantities summed by hour, pool, model and meter."""
    sums: dict[tuple[str, str, str, str, str, float], float] = defaultdict(float)
    # A board whose counter ran on over a silence was there meanwhile: what it drew has GPU-hours to stand in.
    quantities = quantities + [
        q._replace(meter="held_unseen", amount=q.end_s - q.start_s, basis=_ALIVE)
        for q in quantities
        if q.kind == "device" and q.basis == OVER_GAP
    ]
    running: dict[tuple[float, float], set[str]] = defaultdict(set)
    for q in quantities:
        if q.meter == "running_seconds":
            running[q.start_s, q.end_s].add(str(sorted(q.labels.items())))
    for q in quantities:
        amount = q.amount
        if q.meter == "running_seconds":
            amount /= len(running[q.start_s, q.end_s])  # engines of one instance share its GPUs evenly
        model = target.names.get(q.model, q.model) or (
            target.model if q.kind in ("engine", "gateway") else ""
        )
        pool = _pool(target, q.labels)
        for time_s, part in _parts(q, amount):
            if part > 0 or q.meter in TOLD_AT_ZERO:
                sums[q.kind, pool, model, q.meter, q.basis, time_s] += part
    for (kind, pool, model, meter, basis, time_s), amount in list(sums.items()):
        held = "held_gpus" if meter == "seen_seconds" else "held_unseen" if basis == _ALIVE else ""
        # Without `gpus` its share of the pool's is unknown here: zero says that it ran on, and shares in them.
        if held and kind == "engine" and (target.gpus or held == "held_unseen"):
            sums[kind, pool, model, held, basis, time_s] += amount * target.gpus
    if not sums:
        return empty()
    keys = list(sums)
    return records(
        {
            "ts": [k[5] for k in keys],
            "source": [f"{k[0]}/{target.name}" for k in keys],
            "key": [f"{k[5]:.3f}@{now_s:.6f}:{k[1]}:{k[2]}:{k[4]}" for k in keys],
            "pool": [k[1] for k in keys],
            "model": [k[2] for k in keys],
            "tenant": target.tenant,
            "meter": [k[3] for k in keys],
            "quantity": list(sums.values()),
            "basis": [k[4] for k in keys],
        },
        len(keys),
    )


def _parts(q: Quantity, amount: float) -> list[tuple[float, float]]:
    """An amount by hour, by time. Whole tokens stay whole, by largest remainder."""
    pieces = hours_of(q.start_s, q.end_s)
    if len(pieces) <= 1:
        return [(q.end_s, amount)]
    if amount == int(amount) and q.meter not in _CONTINUOUS:
        late = pieces[::-1]  # of equal remainders the later is counted
        counts = split(int(amount), dict(enumerate(p.fraction for p in late)))
        return [(piece.time_s, float(counts.get(at, 0))) for at, piece in enumerate(late)]
    parts = [(piece.time_s, amount * piece.fraction) for piece in pieces[:-1]]
    return [*parts, (q.end_s, amount - sum(part for _, part in parts))]


def _pool(target: Target, labels: Mapping[str, str]) -> str:
    if target.pools:
        for value in labels.values():
            if value in target.pools:
                return target.pools[value]
    return target.pool


_ALIVE = "measured:alive"
"""Basis of a silence whose process ran before and after it: it held its GPUs meanwhile."""
_CONTINUOUS = {m.name for m in METERS.values() if m.unit not in ("token", "request")} | {
    "prefill_seconds", "decode_seconds", "running_seconds", "active_seconds", "seen_seconds",
    "gpu_seen_seconds", "gap_seconds", "held_gpus", "held_unseen",
}  # fmt: skip
