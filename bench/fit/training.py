"""Fit the training predictor's efficiencies to measured runs and write perf/data/training.json.

    python bench/fit/training.py              # fit all rows, cross-validate, write the coefficient file
    python bench/fit/training.py --print      # the same, write nothing

The model is `pertoken.perf.training.step_seconds`: nineteen shared numbers, and a log offset per architecture
and GPU that is drawn to its vendor's (architecture's) by a prior, so that one nobody measured takes it.
Priors are what is known of such machines beforehand, in round numbers; the least-squares loss is robust (soft
L1 beyond 6 %).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from pertoken.catalog.gpus import Gpu, gpu
from pertoken.catalog.models import Model, model
from pertoken.perf._points import MeasuredRow, read_rows
from pertoken.perf._training_work import TrainingWork, training_layout, training_precision, training_work
from pertoken.perf.point import TrainingPoint
from pertoken.perf.training import (
    Efficiencies,
    efficiencies,
    family_of,
    step_seconds,
    training_point,
    watts_per_tflops,
)

Floats = npt.NDArray[np.float64]
ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "performance" / "training.csv"
OUT = ROOT / "src" / "pertoken" / "perf" / "data" / "training.json"
SPLITS = ("random", "model", "gpu")
NOISE = 0.06
"""Relative scatter of equal runs of different submitters, where the loss turns from square to linear."""
COVERAGE = 0.8


class Prior(NamedTuple):
    mean: float
    sd: float


SHARED: dict[str, Prior] = {
    "base": Prior(np.log(0.65), 0.2),  # large bf16 GEMMs against datasheet peak
    "power": Prior(0.7, 0.2),  # clocks under load against power budget
    "lora_fp4": Prior(0.0, 0.1),
    "attention": Prior(np.log(0.4), 0.25),  # flash attention with causal mask against bf16 peak
    "hidden_half": Prior(np.log(300), 0.4),
    "expert": Prior(np.log(0.5), 0.4),  # grouped GEMMs against dense ones
    "memory": Prior(np.log(20), 0.4),  # residual stream touched per layer and pass: norms, activations, casts
    "recompute": Prior(np.log(0.8), 0.4),
    "parallel": Prior(np.log(1.0), 0.5),
    "dispatch": Prior(np.log(6.0), 0.4),
    "reduce": Prior(np.log(1.0), 0.4),
    "layer_s": Prior(np.log(0.7e-3), 0.4),
    "expert_layer_s": Prior(np.log(0.5e-3), 0.5),
    "bubble": Prior(np.log(0.3), 0.4),  # interleaved schedules hide most of the plain bubble
    "scale": Prior(np.log(0.01), 0.8),
}
PRECISION: dict[str, Prior] = {"fp8": Prior(np.log(0.85), 0.2), "fp4": Prior(np.log(1.1), 0.2)}
VENDOR: dict[str, Prior] = {"AMD": Prior(np.log(0.75), 0.15)}
"""Offset of a vendor's software stack against NVIDIA's."""
ARCHITECTURE_SD, GPU_SD = 0.15, 0.05
OTHER_VENDOR = float(np.log(0.6))


@dataclass(frozen=True)
class Row:
    """One measured run with everything the fit needs of it."""

    gpu: Gpu
    model: Model
    point: TrainingPoint
    precision: str
    tokens_per_s: float
    line: int

    @property
    def configuration(self) -> Hashable:
        """Rows that repeat one setting (other submitters): never split over folds."""
        p = self.point
        return (
            self.gpu.name,
            self.model.name,
            p.gpus,
            p.sequence_tokens,
            p.global_batch,
            p.kind,
            self.precision,
        )


@cache
def model_of(name: str) -> Model:
    return model(name)


def load_rows(path: Path = DATA) -> list[Row]:
    """All measured runs of the file."""
    return [_row(r) for r in read_rows(path)]


def _row(r: MeasuredRow) -> Row:
    precision = training_precision(r.precision)
    tokens_per_s = r.measured["tokens_per_s"] * r.gpus
    return Row(gpu(r.gpu), model_of(r.model), training_point(r), precision, tokens_per_s, r.line)


class Table(NamedTuple):
    """The rows as arrays."""

    work: TrainingWork
    seconds: Floats
    rows: tuple[Row, ...]


def table(rows: Sequence[Row]) -> Table:
    layouts = [training_layout(r.model, r.gpu, r.point) for r in rows]
    works = [training_work(r.model, r.gpu, r.point, lay) for r, lay in zip(rows, layouts, strict=True)]
    tokens = [lay.global_batch * r.point.sequence_tokens for r, lay in zip(rows, layouts, strict=True)]
    seconds = np.array(tokens) / np.array([r.tokens_per_s for r in rows])
    columns = (np.array(c, dtype=float) for c in zip(*works, strict=True))
    return Table(TrainingWork(*columns), seconds, tuple(rows))


def fit(rows: Sequence[Row]) -> dict[str, Any]:
    """The coefficient document (without intervals) fitted to these rows."""
    names, priors = _parameters(rows)
    data = table(rows)
    mean, sd = np.array([p.mean for p in priors]), np.array([p.sd for p in priors])

    def residuals(theta: Floats) -> Floats:
        predicted = predict(_document(dict(zip(names, theta, strict=True)), rows), data)
        offsets = (theta - mean) / sd
        for i, name in enumerate(names):  # an architecture is drawn to its vendor
            vendor = f"vendor {_vendor_of(name, rows)}"
            if name.startswith("architecture ") and vendor in names:
                offsets[i] = (theta[i] - theta[names.index(vendor)]) / sd[i]
        return np.concatenate([np.log(predicted / data.seconds) / NOISE, offsets])

    theta = least_squares(residuals, mean, loss="soft_l1").x
    return _document(dict(zip(names, theta, strict=True)), rows)


def _vendor_of(name: str, rows: Sequence[Row]) -> str:
    family = name.removeprefix("architecture ")
    return next((r.gpu.vendor for r in rows if family_of(r.gpu) == family), "")


def _parameters(rows: Sequence[Row]) -> tuple[list[str], list[Prior]]:
    found = {f"shared {n}": p for n, p in SHARED.items()}
    found |= {f"precision {n}": p for n, p in PRECISION.items()}
    found |= {f"vendor {n}": p for n, p in VENDOR.items()}
    families = sorted({family_of(r.gpu) for r in rows})
    found |= {f"architecture {a}": Prior(0.0, ARCHITECTURE_SD) for a in families}
    found |= {f"gpu {g}": Prior(0.0, GPU_SD) for g in sorted({r.gpu.name for r in rows})}
    return list(found), list(found.values())


def _document(values: dict[str, float], rows: Sequence[Row]) -> dict[str, Any]:
    def part(kind: str) -> dict[str, float]:
        return {n.removeprefix(kind + " "): float(v) for n, v in values.items() if n.startswith(kind + " ")}

    return {
        "shared": part("shared"),
        "precision": {"bf16": 0.0, **part("precision")},
        "vendor": {"NVIDIA": 0.0, **part("vendor"), "other": OTHER_VENDOR},
        "architecture": part("architecture"),
        "gpu": part("gpu"),
        "reference_watts_per_tflops": _references(rows),
    }


def _references(rows: Sequence[Row]) -> dict[str, float]:
    """Per architecture the power budget of the GPU most runs used."""
    found = {}
    for family in sorted({family_of(r.gpu) for r in rows}):
        names = [r.gpu.name for r in rows if family_of(r.gpu) == family]
        found[family] = watts_per_tflops(gpu(max(sorted(set(names)), key=names.count)))
    return found


def predict(document: dict[str, Any], data: Table) -> Floats:
    """Seconds per step of each row."""
    each = [efficiencies(document, r.gpu, r.precision, r.point.kind) for r in data.rows]
    stacked = Efficiencies(*(np.array(c) for c in zip(*each, strict=True)))
    return np.asarray(step_seconds(data.work, stacked))


def log_errors(document: dict[str, Any], rows: Sequence[Row]) -> Floats:
    """log(predicted / measured tokens per second) of each row."""
    data = table(rows)
    return np.log(data.seconds / predict(document, data))


def groups(split: str, rows: Sequence[Row], folds: int = 5) -> list[Hashable]:
    """The group each row is left out with: a random fold, its model, or its GPU."""
    if split == "model":
        return [r.model.name for r in rows]
    if split == "gpu":
        return [r.gpu.name for r in rows]
    return list(np.random.default_rng(0).integers(0, folds, len(rows)))


def cross_validate(split: str, rows: Sequence[Row]) -> Floats:
    """log(predicted / measured tokens per second) of each row, predicted by a fit that did not see its
    group."""
    labels = groups(split, rows)
    errors = np.zeros(len(rows))
    for label in sorted(set(labels), key=str):
        out = np.array([g == label for g in labels])
        document = fit([r for r, o in zip(rows, out, strict=True) if not o])
        errors[out] = log_errors(document, [r for r, o in zip(rows, out, strict=True) if o])
    return errors


def summary(errors: Floats) -> dict[str, float]:
    ape = np.abs(np.expm1(errors))
    return {"mape": float(ape.mean()), "median": float(np.median(ape)), "p90": float(np.quantile(ape, 0.9)),
            "bias": float(np.expm1(errors).mean())}  # fmt: skip


def main() -> None:
    rows = load_rows()
    document = fit(rows)
    errors = {split: cross_validate(split, rows) for split in SPLITS}
    half = {split: float(np.quantile(np.abs(e), COVERAGE)) for split, e in errors.items()}
    full = {
        "date": datetime.now(UTC).date().isoformat(),
        "rows": len(rows),
        "source": "llm-foundry, MLPerf Training v5.1, torchtitan and Megatron-Bridge result tables",
        **document,
        "spread": {
            "point": half["random"],
            "model": half["model"],
            "gpu": half["gpu"],
            "architecture": 2 * half["gpu"],
        },
        "rows_by_gpu": _count(rows, lambda r: r.gpu.name),
        "rows_by_model": _count(rows, lambda r: r.model.name),
        "rows_by_precision": _count(rows, lambda r: f"{family_of(r.gpu)} {r.precision}"),
        "residuals": {
            "fit": summary(log_errors(document, rows)),
            **{s: summary(e) for s, e in errors.items()},
        },
    }
    shown = ("shared", "precision", "vendor", "architecture", "gpu", "spread")
    print(json.dumps({k: full[k] for k in shown}, indent=1))
    for split, e in {"fit": log_errors(document, rows), **errors}.items():
        print(split, {k: round(100 * v, 1) for k, v in summary(e).items()})
        if split in ("model", "gpu"):
            labels = groups(split, rows)
            for g in sorted(set(labels), key=str):
                part = e[np.array([x == g for x in labels])]
                print("   ", g, len(part), {k: round(100 * v, 1) for k, v in summary(part).items()})
    if "--print" not in sys.argv:
        OUT.write_text(json.dumps(_rounded(full), indent=1) + "\n", encoding="utf-8")


def _count(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, int]:
    keys = [key(r) for r in rows]
    return {k: keys.count(k) for k in sorted(set(keys))}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
