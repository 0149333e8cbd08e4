"""The serving fit itself: rows as columns, the closed loop over them, effects fitted stage by stage.

`fit(batch(rows))` is what `serving.py` cross-validates and writes; README.md says what the stages are and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.fit.serving_rows import Row, gpu_of, model_of
from pertoken.errors import CannotServeError
from pertoken.perf._coefficients import (
    DIRECTIONS,
    NAMES,
    Coefficients,
    coefficients_of,
    fitted,
    level_keys,
)
from pertoken.perf._steps import Requests, closed_loop, split_loop
from pertoken.perf._work import formats, held_fraction, work
from pertoken.perf._work import stack as stack_work
from pertoken.perf.point import Floats

MOE = ("routed", "grouped", "grouped_prefill", "expert_us")
BROAD = ("reading", "computing", "latency", "handling")
FRONT = ("stall", "first_ms", "first_steps")
"""What engines settle each in their own way: whether a prompt shares a step with decoding or stops it, and how
first tokens are handed out."""
FREE = tuple(n for n in NAMES if n != "seats")
"""What the fit moves step by step; seats, which bind or do not, are searched."""
PARTICULAR = (*(n for n in FREE if n not in DIRECTIONS["latency"]), "latency")
Levels = dict[str, tuple[tuple[str, ...], float]]
STAGES: tuple[Levels, ...] = (
    {"all": (FREE, 0.2), "precision": (MOE, 0.2), "engine|precision": (MOE, 0.3)},
    {"vendor": (BROAD, 0.1), "engine": (BROAD + FRONT, 0.1)},
    {"configuration": (PARTICULAR, 0.6)},
    {"release": (PARTICULAR, 0.6)},
)
"""Stages of effects, each fitted with those before it held fixed: what is general first, so that what is
particular cannot pull it away. Per level: what its effects may move, and their prior standard deviation in
log space. Chosen by cross-validation over models and GPUs left out; architecture and model effects of their
own did not help there."""
GENERAL = 2
"""Stages that reach beyond a configuration."""
SCALE = {"prefill": 0.5, "attention": 0.25, "request_ms": 1.5, "first_ms": 1.5, "eager": 1.5, "queue": 1.5,
         "slot": 4.0, "first_steps": 2.5}  # fmt: skip
"""Prior deviations relative to their level's: narrow where physics leaves little room, wide where it says
little."""
SHARED_SCALE = SCALE | {"request_ms": 0.5, "sequence_us": 0.5, "row_us": 0.5, "step_ms": 0.5, "kernel_us": 0.5,
                        "stall": 5.0}  # fmt: skip
"""The same for effects that reach beyond a configuration: a host's times are much alike everywhere, and where
rows tell otherwise it is mostly a configuration's own; what prompts stall is the engine's choice."""
NOISE = {"tokens_per_s": 0.06, "tpot_s": 0.09, "ttft_s": 0.6}
"""Standard deviation of a row's residual in log space, by quantity, that the fit weighs rows by."""
STRAY = 0.15
"""Median absolute log error at which a configuration's rows weigh half in what all share."""
ROUNDS = 12
TOLERANCE = 5e-3
HUBER = 2.0


@dataclass(frozen=True)
class Batch:
    """Rows as arrays: work, requests, what was measured."""

    rows: tuple[Row, ...]
    work: Any
    requests: Requests
    concurrency: Floats
    prefill_gpus: Floats
    split: Any
    median_interval: Any
    """Where a time per output token is the median between two: a step that no prompt stalls."""
    measured: dict[str, Floats]
    keys: tuple[dict[str, str], ...]
    members: dict[tuple[str, str], Any]

    def rows_of(self, level: str, key: str) -> Any:
        """Indices of the rows with that key at that level."""
        return self.members.get((level, key), np.zeros(0, dtype=np.intp))


def batch(rows: Sequence[Row]) -> Batch:
    """Rows that fit memory, as arrays."""
    works, kept, keys = [], [], []
    for row in rows:
        m, g = model_of(row.model), gpu_of(row.gpu)
        try:
            w = work(m, g, row.layout, formats(g, row.precision))
        except CannotServeError:
            continue
        works.append(w)
        kept.append(row)
        keys.append(level_keys(m, g, row.engine, row.precision, split=row.prefill_gpus > 0))

    def column(name: str) -> Floats:
        return np.array([getattr(r, name) for r in kept], dtype=np.float64)

    held = np.array([held_fraction(r.engine) for r in kept])
    requests = Requests(column("input_tokens"), 0.0, column("output_tokens"), 1.0, 1.0, 0.0, held)
    prefill = column("prefill_gpus")
    between = np.array([r.median_interval for r in kept])
    measured = {name: column(name) for name in NOISE}
    members: dict[tuple[str, str], list[int]] = {}
    for i, k in enumerate(keys):
        for level, key in k.items():
            members.setdefault((level, key), []).append(i)
    return Batch(
        tuple(kept), stack_work(works) if works else None, requests, column("concurrency"), prefill, prefill
        > 0, between, measured, tuple(keys), {k: np.array(v) for k, v in members.items()},
    )  # fmt: skip


def evaluate(b: Batch, logs: Floats) -> dict[str, Floats]:
    """Predictions of every row from log coefficients, shape (rows, len(NAMES))."""
    c = Coefficients(**{name: np.exp(logs[:, i]) for i, name in enumerate(NAMES)})
    shared = closed_loop(b.work, c, b.requests, b.concurrency)
    answer = {name: np.array(getattr(shared, name)) for name in NOISE}
    answer["tpot_s"] = np.where(b.median_interval, shared.step_s, answer["tpot_s"])
    if b.split.any():
        apart = split_loop(b.work, c, b.requests, b.concurrency, np.maximum(b.prefill_gpus, 1e-3))
        for name in NOISE:
            answer[name] = np.where(b.split, getattr(apart, name), answer[name])
    return answer


def shipped_logs(b: Batch) -> Floats:
    """Log coefficients of every row from the file the package ships."""
    found = [coefficients_of(fitted(), k) for k in b.keys]
    values = np.array([[getattr(c, name) for name in NAMES] for c in found], dtype=np.float64)
    return np.asarray(np.log(values), dtype=np.float64)


def base_logs(b: Batch) -> Floats:
    """Log coefficients before any effect: base and the architecture's hardware prior."""
    found = [coefficients_of({}, k) for k in b.keys]
    values = np.array([[getattr(c, name) for name in NAMES] for c in found], dtype=np.float64)
    return np.asarray(np.log(values), dtype=np.float64)


@dataclass(frozen=True)
class Fit:
    """Effects: value of each (level, key, direction)."""

    effects: dict[tuple[str, str, str], float]

    def logs(self, b: Batch) -> Floats:
        """Log coefficients of every row."""
        logs = base_logs(b)
        for (level, key, direction), value in self.effects.items():
            rows = b.rows_of(level, key)
            if rows.size:
                logs[np.ix_(rows, [NAMES.index(n) for n in DIRECTIONS[direction]])] += value
        return logs


def fit(b: Batch, stages: Sequence[Levels] | None = None) -> Fit:
    """Maximum a posteriori effects, stage by stage."""
    effects: dict[tuple[str, str, str], float] = {}
    for levels in STAGES if stages is None else stages:
        if "release" in levels:
            effects |= _seats(b, Fit(effects).logs(b))
        effects |= _fit_stage(b, levels, Fit(effects).logs(b))
    return Fit(effects)


SEATS = (16.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0, 384.0)
SEATS_NATS = 12.0
"""What a limit on the requests run at once must gain in log likelihood to be believed: few engines are set to
one below the load they are measured at."""


def _seats(b: Batch, start: Floats) -> dict[tuple[str, str, str], float]:
    """Per release the limit on running requests that its rows show, where they show one."""
    at = NAMES.index("seats")
    before = _losses(b, evaluate(b, start))
    best: dict[str, tuple[float, float]] = {}
    for seats in SEATS:
        logs = start.copy()
        logs[:, at] = np.log(seats)
        gained = before - _losses(b, evaluate(b, logs))
        for key in {k["release"] for k in b.keys}:
            gain = float(gained[b.rows_of("release", key)].sum())
            if gain > max(SEATS_NATS, best.get(key, (0.0, 0.0))[0]):
                best[key] = gain, seats
    return {
        ("release", key, "seats"): float(np.log(seats / Coefficients().seats))
        for key, (_, seats) in best.items()
    }


def _losses(b: Batch, answer: dict[str, Floats]) -> Floats:
    """Half the Huber loss of every row, its weight included."""
    out = np.zeros(len(b.rows))
    for quantity, noise in NOISE.items():
        residual = np.abs(np.log(b.measured[quantity] / answer[quantity])) / noise
        residual = np.where(np.isfinite(residual), residual, 0.0)
        out += np.where(residual < HUBER, residual**2 / 2, HUBER * residual - HUBER**2 / 2)
    return np.asarray(out * np.array([r.weight for r in b.rows]) * _balance(b), dtype=np.float64)


def _fit_stage(b: Batch, levels: Levels, start: Floats) -> dict[tuple[str, str, str], float]:
    """Gauss-Newton on log residuals with Huber weights and a Gaussian prior.

    minimise Σ w ρ((log measured − log predicted) / noise) + Σ (effect / prior deviation)²
    """
    shared = not {"configuration", "release"} & set(levels)
    scale = SHARED_SCALE if shared else SCALE
    names = [
        (level, key, direction)
        for level, (directions, _) in levels.items()
        for key in dict.fromkeys(k[level] for k in b.keys)
        for direction in directions
    ]
    prior = np.array([levels[level][1] * scale.get(direction, 1.0) for level, _, direction in names])
    members = [(b.rows_of(level, key), [NAMES.index(n) for n in DIRECTIONS[d]]) for level, key, d in names]
    values = np.zeros(len(names))
    weighed = np.array([r.weight for r in b.rows]) * _balance(b, SHARED_POWER if shared else BALANCE_POWER)
    for _ in range(ROUNDS):
        logs = start.copy()
        for value, (rows, columns) in zip(values, members, strict=True):
            logs[np.ix_(rows, columns)] += value
        normal, gradient = np.diag(prior**-2), -values / prior**2
        centre, slopes = _slopes(b, logs)
        weight = weighed * _trust(b, centre) if shared else weighed
        for quantity, noise in NOISE.items():
            residual = np.log(b.measured[quantity]) - np.log(centre[quantity])
            known = np.isfinite(residual)
            residual = np.where(known, residual, 0.0) / noise
            w = known * weight / np.maximum(1.0, np.abs(residual) / HUBER)
            jacobian = np.zeros((len(b.rows), len(names)))
            for j, (rows, columns) in enumerate(members):
                jacobian[rows, j] = slopes[quantity][np.ix_(rows, columns)].sum(axis=1) / noise
            normal += jacobian.T @ (w[:, None] * jacobian)
            gradient += jacobian.T @ (w * residual)
        step = np.linalg.solve(normal, gradient)
        values = values + np.clip(step, -0.5, 0.5)
        if np.abs(step).max() < TOLERANCE:
            break
    return dict(zip(names, values.tolist(), strict=True))


BALANCE_ROWS = 30.0
BALANCE_POWER = 0.3
SHARED_POWER = 0.5


def _balance(b: Batch, power: float = BALANCE_POWER) -> Floats:
    """Less weight per row of a configuration with many rows: two hundred points of one model are not two
    hundred witnesses of what engines and GPUs have in common."""
    out = np.ones(len(b.rows))
    for key in {k["configuration"] for k in b.keys}:
        rows = b.rows_of("configuration", key)
        out[rows] = (BALANCE_ROWS / rows.size) ** power
    return np.clip(out, 0.0, 2.0)


def _trust(b: Batch, answer: dict[str, Floats]) -> Floats:
    """Less weight to a configuration that stands out whole: 1 / (1 + (median absolute log error / STRAY)²), mean
    over all rows 1.

    One that ran with settings nobody published would else pull what all share; its own effects fit it later.
    """
    off = np.mean(
        [
            np.nan_to_num(np.abs(np.log(b.measured[quantity] / answer[quantity])))
            for quantity in ("tokens_per_s", "tpot_s")
        ],
        axis=0,
    )
    out = np.ones(len(b.rows))
    for key in {k["configuration"] for k in b.keys}:
        rows = b.rows_of("configuration", key)
        out[rows] = 1 / (1 + (float(np.median(off[rows])) / STRAY) ** 2)
    return np.asarray(out / out.mean(), dtype=np.float64)


def _slopes(b: Batch, logs: Floats) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Predictions and d log prediction / d log coefficient, by quantity, by finite differences."""
    centre, step = evaluate(b, logs), 1e-3
    slopes = {q: np.zeros((len(b.rows), len(NAMES))) for q in NOISE}
    for i in range(len(NAMES)):
        moved = logs.copy()
        moved[:, i] += step
        shifted = evaluate(b, moved)
        for q in NOISE:
            slopes[q][:, i] = (np.log(shifted[q]) - np.log(centre[q])) / step
    return centre, slopes
