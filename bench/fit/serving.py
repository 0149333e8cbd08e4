"""Fit the serving roofline's slowdowns to measured points and write perf/data/serving.json.

    python bench/fit/serving.py     # about three minutes: fit, cross-validate, write, print

`load_rows()` is the row set, `serving_fit.py` the fit, `cross_validate(split)` scores it on rows left out.
README.md tells which rows are used and which cannot be.
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

from bench.fit.serving_fit import GENERAL, STAGES, Fit, batch, evaluate, fit
from bench.fit.serving_rows import Row, configuration_of, gpu_of, load_rows, model_of, ranges
from pertoken.perf._coefficients import NAMES, Coefficients, Spread, level_keys, signature
from pertoken.perf.point import Floats

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "src" / "pertoken" / "perf" / "data" / "serving.json"
COVERAGE = 0.8
SMALLEST = 0.002
QUANTITIES = ("tokens_per_s", "tpot_s", "ttft_s")
SPREAD_ORDER = Spread._fields


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
