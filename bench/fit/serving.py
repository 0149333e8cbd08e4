"""Fit the serving roofline's slowdowns to measured points and write perf/data/serving.json.

    python bench/fit/serving.py     # about three minutes: fit, cross-validate, write, print

`load_rows()` is the row set, `cross_validate(split)` scores it on rows left out. README.md tells which rows
are used and which cannot be.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.fit.serving_rows import Row, configuration_of, gpu_of, load_rows, model_of, ranges
from pertoken.errors import CannotServeError
from pertoken.perf._coefficients import (
    DIRECTIONS,
    NAMES,
    Coefficients,
    Spread,
    coefficients_of,
    fitted,
    level_keys,
    signature,
)
from pertoken.perf._steps import Requests, closed_loop, split_loop
from pertoken.perf._work import formats, held_fraction, work
from pertoken.perf._work import stack as stack_work
from pertoken.perf.point import Floats

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "src" / "pertoken" / "perf" / "data" / "serving.json"
COVERAGE = 0.8
SMALLEST = 0.002
QUANTITIES = ("tokens_per_s", "tpot_s", "ttft_s")
SPREAD_ORDER = Spread._fields

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


def fold_of(row: Row, split: str) -> Any:
    if split == "model":
        return signature(model_of(row.model))
    if split == "gpu":
        return row.gpu
    if split in ("stack", "architecture"):
        keys = level_keys(model_of(row.model), gpu_of(row.gpu), row.engine, row.precision)
        return keys["architecture|engine|precision" if split == "stack" else "architecture"]
    digest = hashlib.sha256(repr(row.configuration).encode()).digest()
    return digest[0] % 5


def cross_validate(split: str, rows: Sequence[Row] | None = None) -> list[Scored]:
    """Predictions of rows by fits that never saw them.

    split: ``random`` (five folds of whole settings: repeats of one stay together), ``model`` (all rows of
    that architecture left out), ``gpu``, ``architecture``, ``stack`` (architecture × engine × precision).
    """
    rows = load_rows() if rows is None else rows
    # Effects of one configuration say nothing of rows whose configuration is left out.
    stages = STAGES if split == "random" else STAGES[:GENERAL]
    out: list[Scored] = []
    for fold in sorted({fold_of(r, split) for r in rows if r.scored}, key=str):
        found = fit(batch([r for r in rows if fold_of(r, split) != fold]), stages)
        out += score(found, [r for r in rows if fold_of(r, split) == fold and r.scored])
    return out


@dataclass(frozen=True)
class Scored:
    """A row with its prediction."""

    row: Row
    tokens_per_s: float
    ttft_s: float
    tpot_s: float


def score(found: Fit, rows: Sequence[Row]) -> list[Scored]:
    """Predictions for rows that fit memory."""
    b = batch(rows)
    if not b.rows:
        return []
    answer = evaluate(b, found.logs(b))
    return [
        Scored(r, *(float(answer[q][i]) for q in ("tokens_per_s", "ttft_s", "tpot_s")))
        for i, r in enumerate(b.rows)
    ]


def errors(scored: Sequence[Scored], quantity: str) -> Floats:
    """Log of predicted over measured, of rows where it was measured."""
    ratio = np.array([getattr(s, quantity) / getattr(s.row, quantity) for s in scored])
    return np.asarray(np.log(ratio[np.isfinite(ratio)]), dtype=np.float64)


def summary(scored: Sequence[Scored]) -> dict[str, float]:
    """Rows; mean and median absolute percentage error and bias by quantity [percent]."""
    out: dict[str, float] = {"rows": len(scored)}
    for quantity in QUANTITIES:
        error = 100 * np.expm1(errors(scored, quantity))
        out[f"{quantity} MAPE"] = round(float(np.abs(error).mean()), 1)
        out[f"{quantity} median"] = round(float(np.median(np.abs(error))), 1)
        out[f"{quantity} bias"] = round(float(error.mean()), 1)
    return out


def half_width(scored: Sequence[Scored], quantity: str) -> float:
    """The 80 % quantile of absolute log errors: the conformal half-width."""
    return float(np.quantile(np.abs(errors(scored, quantity)), COVERAGE))


def coverage(scored: Sequence[Scored], split: str, quantity: str) -> float:
    """Share of rows inside an interval whose width comes from the other folds alone."""
    inside: list[bool] = []
    groups = sorted({fold_of(s.row, split) for s in scored}, key=str)
    for group in groups:
        others = [s for s in scored if fold_of(s.row, split) != group]
        own = [s for s in scored if fold_of(s.row, split) == group]
        if others:
            inside += (np.abs(errors(own, quantity)) <= half_width(others, quantity)).tolist()
    return float(np.mean(inside))


SPLITS = {"none": "random", "model": "model", "engine": "stack", "gpu": "gpu", "architecture": "architecture"}
"""How far a configuration is from the rows of the fit, and the split that shows how wrong the fit is then."""
STRANGER = 1.5
"""How much wider the interval of a vendor never measured is than an architecture's: assumed, no rows can tell."""


def spreads(results: dict[str, list[Scored]]) -> dict[str, dict[str, float]]:
    """Interval half-widths by novelty and quantity; never narrower the farther a configuration is from the rows.

    An architecture's is the mean over architectures left out, which count alike however many rows they have.
    """
    out: dict[str, dict[str, float]] = {}
    floor = dict.fromkeys(QUANTITIES, 0.0)
    for name, split in SPLITS.items():
        groups = [results[split]]
        if name == "architecture":
            kinds = {fold_of(s.row, split) for s in results[split]}
            groups = [[s for s in results[split] if fold_of(s.row, split) == kind] for kind in kinds]
        raw = {q: float(np.mean([half_width(group, q) for group in groups])) for q in QUANTITIES}
        wide = {q: max(raw[q], floor[q]) for q in QUANTITIES}
        out[name] = {q: round(wide[q], 3) for q in QUANTITIES}
        floor = floor if name == "model" else wide
    out["vendor"] = {q: round(STRANGER * width, 3) for q, width in out["architecture"].items()}
    return out


OWN_ROWS = 15.0
"""Rows of a configuration at which its own errors weigh as much as all rows' in the width of its interval."""


def own_spreads(scored: Sequence[Scored]) -> dict[str, list[float]]:
    """Half-widths of configurations with rows of their own: theirs over random folds, drawn to all rows'."""
    groups: dict[str, list[Scored]] = {}
    for s in scored:
        groups.setdefault(configuration_of(s.row), []).append(s)
    everyone = [half_width(scored, q) for q in SPREAD_ORDER]
    return {
        key: [
            round((len(group) * half_width(group, q) + OWN_ROWS * common) / (len(group) + OWN_ROWS), 3)
            for q, common in zip(SPREAD_ORDER, everyone, strict=True)
        ]
        for key, group in sorted(groups.items())
    }


EDGE = 6.0
"""Concurrency held back at either end of a configuration's range, as a factor, to see how predictions err there."""


def far_slopes(rows: Sequence[Row], own: dict[str, list[float]]) -> dict[str, float]:
    """Half-width that an e-fold beyond a configuration's rows adds in quadrature, by quantity.

    The highest and then the lowest concurrencies of every configuration that spans enough are held back; the
    80 % quantile of √(error² − own²) ÷ e-folds beyond.
    """
    whole = ranges([r for r in rows if r.scored])
    slopes: dict[str, list[float]] = {q: [] for q in SPREAD_ORDER}
    for upper in (True, False):

        def held(row: Row, upper: bool = upper) -> bool:
            low, high = whole.get(configuration_of(row), (1.0, 1.0))
            outer = row.concurrency > high / EDGE if upper else row.concurrency < low * EDGE
            return row.scored and high / low >= 2 * EDGE and outer

        kept = [r for r in rows if not held(r)]
        inner = ranges([r for r in kept if r.scored])
        out = [r for r in rows if held(r) and configuration_of(r) in inner]
        for s in score(fit(batch(kept)), out):
            key = configuration_of(s.row)
            low, high = inner[key]
            beyond = float(np.log(s.row.concurrency / high if upper else low / s.row.concurrency))
            for q, width in zip(SPREAD_ORDER, own[key], strict=True):
                error = abs(float(np.log(getattr(s, q) / getattr(s.row, q))))
                if beyond > 0 and np.isfinite(error):
                    slopes[q].append(np.sqrt(max(error**2 - width**2, 0.0)) / beyond)
    return {q: round(float(np.quantile(values, COVERAGE)), 3) for q, values in slopes.items()}


def tables(found: Fit) -> dict[str, Any]:
    """Effects as the file holds them: rounded; the smallest left out, but every key kept, which says it was
    seen."""
    nested: dict[str, dict[str, dict[str, float]]] = {}
    for (level, key, direction), value in sorted(found.effects.items()):
        entry = nested.setdefault(level, {}).setdefault(key, {})
        if abs(value) >= SMALLEST:
            entry[direction] = round(value, 3)
    return nested


def write(found: Fit, rows: Sequence[Row], results: dict[str, list[Scored]], path: Path = TARGET) -> None:
    """The coefficient file the package ships."""
    seen: dict[str, dict[str, list[str]]] = {}
    b = batch(rows)
    own = own_spreads(results["random"])
    for keys in b.keys:
        for level in ("vendor", "architecture", "gpu", "architecture|engine|precision", "model"):
            seen.setdefault(level, {}).setdefault(keys[level], [])
    content = {
        "date": datetime.now(UTC).date().isoformat(),
        "rows": len(b.rows),
        "scored": sum(r.scored for r in b.rows),
        "base": {name: getattr(Coefficients(), name) for name in NAMES},
        "spread": spreads(results),
        "spread_own": own,
        "range": ranges(b.rows),
        "far": far_slopes(rows, own),
        "residuals": {split: summary(scored) for split, scored in results.items()},
        "coverage": {
            split: {q: round(coverage(scored, split, q), 3) for q in QUANTITIES}
            for split, scored in results.items()
        },
        "seen": {level: sorted(keys) for level, keys in seen.items()},
        "effects": tables(found),
    }
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Fit, cross-validate, write, print."""
    rows = load_rows()
    results = {split: cross_validate(split, rows) for split in dict.fromkeys(SPLITS.values())}
    found = fit(batch(rows))
    write(found, rows, results)
    print(f"{len(rows)} rows; wrote {TARGET.relative_to(ROOT)}")
    for split, scored in results.items():
        print(split, summary(scored), {q: round(coverage(scored, split, q), 2) for q in QUANTITIES})
    print("fitted rows themselves", summary(score(found, [r for r in rows if r.scored])))
    apart = score(found, [r for r in rows if r.prefill_gpus > 0])
    print("disaggregated, layout inferred, in the fit at low weight", summary(apart))


if __name__ == "__main__":
    main()
