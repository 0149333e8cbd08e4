"""Fit GPU power to measured serving points and write perf/data/power.json.

    python bench/fit/power.py            # fit, cross-validate, write the coefficient file
    python bench/fit/power.py --print    # the same, write nothing

Rows: ML.ENERGY's leaderboard (H100 and B200, GPU boundary). Its input lengths are not published: those of
`pertoken.perf._points.TASK_INPUT_TOKENS` are assumed. Shares of compute and memory in use are fitted
at the row's measured throughput, so that the power model does not learn the errors of the serving predictor;
they are scored at the predicted throughput too, which is what the package has when it predicts.

The model is `pertoken.perf.power`: fifteen weights chosen by cross-validation (a feature stayed where leave
one model out and leave one GPU out got better with it), and an offset per decoder and per configuration, drawn
to zero.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pertoken.catalog.gpus import Gpu, gpu
from pertoken.catalog.models import Model, model
from pertoken.perf import power
from pertoken.perf._points import MeasuredRow, read_rows
from pertoken.perf._work import precision_name
from pertoken.perf.point import Point
from pertoken.perf.roofline import _answer

Floats = npt.NDArray[np.float64]
At = Literal["measured", "predicted"]
ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "performance" / "power_mlenergy.csv"
OUT = ROOT / "src" / "pertoken" / "perf" / "data" / "power.json"
SPLITS = ("random", "model", "gpu")
NOISE = 0.06
COVERAGE = 0.8
ROUNDS = 8
"""Rounds of reweighting that make the squares robust (weights 1 / √(1 + residual / noise))."""
WEIGHT_SD: dict[str, float] = {
    "one": 3.0, "compute": 3.0, "memory": 3.0, "blackwell": 0.5, "blackwell memory": 0.3,
    "blackwell, several GPUs": 0.3, "experts": 0.5, "experts compute": 0.3, "eight-bit experts": 0.3, "four-bit": 0.5,
    "media": 0.5, "media compute": 0.3, "media memory": 0.3, "video": 0.5, "video compute": 0.3,
}  # fmt: skip
EFFECT_SD = {"decoder": 0.2, "configuration": 0.3}


@dataclass(frozen=True)
class Row:
    """One measured point with its shares in use as predicted, and as its measured throughput implies."""

    gpu: Gpu
    model: Model
    name: str
    precision: str
    gpus: int
    media: str
    task: str
    point: Point
    shares: tuple[float, float]
    """Compute and memory in use at the measured throughput."""
    predicted_shares: tuple[float, float]
    power_w: float
    tokens_per_s: float
    predicted_tokens_per_s: float
    joules: float
    line: int


@cache
def model_of(name: str) -> Model:
    return model(name)


def load_rows(path: Path = DATA) -> list[Row]:
    """All rows of the file; raises where one cannot be used: none is dropped."""
    return [_row(r) for r in read_rows(path)]


def _row(r: MeasuredRow) -> Row:
    found, card = model_of(r.model), gpu(r.gpu)
    point = Point(
        r.input_tokens,
        r.output_tokens,
        r.concurrency,
        precision=r.precision,
        engine=r.engine,
        layout=r.layout,
    )
    # Not `predict`: its power comes from the very file this fit writes.
    loop, used, *_ = _answer(found, card, point)
    compute, memory = float(used[0]), float(used[1])
    predicted = float(loop.tokens_per_s) / r.gpus
    actual = r.measured["tokens_per_s"]
    at_measured = min(compute * actual / predicted, 1.0), min(memory * actual / predicted, 1.0)
    watts, joules = r.measured["power_w"], r.measured["joules_per_output_token"]
    return Row(card, found, r.model, precision_name(r.precision), int(r.gpus), r.media, r.task, point, at_measured,
               (compute, memory), watts, actual, predicted, joules, r.line)  # fmt: skip


class Design:
    """Rows as a linear model: columns are weights, then effects; target is the logit of the position."""

    def __init__(self, rows: Sequence[Row], at: At) -> None:
        shares = [r.shares if at == "measured" else r.predicted_shares for r in rows]
        parts = [power.features(r.gpu, r.precision, r.model, r.gpus, r.media) for r in rows]
        c, m = power.share_logs(*(np.array(s) for s in zip(*shares, strict=True)))
        lines = np.array([[p[name] for name in WEIGHT_SD] for p in parts])
        self.weights = lines[:, :, 0] + lines[:, :, 1] * c[:, None] + lines[:, :, 2] * m[:, None]
        self.keys = [power.effect_keys(r.gpu, r.precision, r.model, r.gpus) for r in rows]
        idle = np.array([r.gpu.idle_w for r in rows])
        top = power.LIMIT * np.array([r.gpu.tdp_w for r in rows])
        watts = np.array([r.power_w for r in rows])
        position = np.clip((watts - idle) / (top - idle), 0.01, 0.99)
        self.target = np.log(position / (1 - position))
        self.slope = position * (1 - position) * (top - idle) / watts
        """Relative change of power per unit of logit."""


def fit(rows: Sequence[Row], at: At = "measured") -> dict[str, Any]:
    """Weights and effects fitted to these rows, without intervals."""
    d = Design(rows, at)
    names = [(level, key) for level in EFFECT_SD for key in sorted({k[level] for k in d.keys})]
    effects = np.array([[float(k[level] == key) for level, key in names] for k in d.keys])
    x = np.hstack([d.weights, effects])
    sd = np.array([*WEIGHT_SD.values(), *(EFFECT_SD[level] for level, _ in names)])
    robust = np.ones(len(rows))
    theta = np.zeros(x.shape[1])
    for _ in range(ROUNDS):
        scale = d.slope * robust / NOISE
        left = np.vstack([x * scale[:, None], np.diag(1 / sd)])
        theta = np.linalg.lstsq(left, np.concatenate([d.target * scale, np.zeros(len(sd))]), rcond=None)[0]
        robust = 1 / np.sqrt(1 + np.abs((x @ theta - d.target) * d.slope / NOISE))
    found: dict[str, Any] = {"weights": dict(zip(WEIGHT_SD, theta.tolist(), strict=False)), "effects": {}}
    for level in EFFECT_SD:
        found["effects"][level] = {
            key: float(v) for (at, key), v in zip(names, theta[len(WEIGHT_SD) :], strict=True) if at == level
        }
    return found


def predict_w(document: dict[str, Any], rows: Sequence[Row], at: At = "measured") -> Floats:
    """Power of one GPU of each row, with the shares in use at the measured or the predicted throughput."""
    d = Design(rows, at)
    score = d.weights @ np.array([document["weights"][name] for name in WEIGHT_SD])
    score = score + [
        sum(document["effects"][level].get(key, 0.0) for level, key in k.items()) for k in d.keys
    ]
    idle, tdp = (np.array([getattr(r.gpu, f) for r in rows]) for f in ("idle_w", "tdp_w"))
    watts: Floats = np.minimum(idle + (power.LIMIT * tdp - idle) / (1 + np.exp(-score)), tdp)
    return watts


def groups(split: str, rows: Sequence[Row], folds: int = 5) -> list[Hashable]:
    """The group each row is left out with: a random fold, its model, or its GPU."""
    if split == "model":
        return [r.name for r in rows]
    if split == "gpu":
        return [r.gpu.name for r in rows]
    return list(np.random.default_rng(0).integers(0, folds, len(rows)))


def cross_validate(
    split: str, rows: Sequence[Row], at: At = "measured", labels: Sequence[Hashable] | None = None
) -> dict[str, Floats]:
    """log(predicted / measured) of each row, by fits that did not see it.

    ``power_w`` and ``joules_per_output_token`` with shares and throughput as the shipped serving predictor
    has them; ``power_w at measured throughput`` the power model alone.
    """
    labels = groups(split, rows) if labels is None else labels
    alone, watts = np.zeros(len(rows)), np.zeros(len(rows))
    for label in sorted(set(labels), key=str):
        out = np.array([g == label for g in labels])
        document = fit([r for r, o in zip(rows, out, strict=True) if not o], at)
        left = [r for r, o in zip(rows, out, strict=True) if o]
        alone[out], watts[out] = predict_w(document, left), predict_w(document, left, "predicted")
    joules = watts / np.array([r.predicted_tokens_per_s for r in rows])
    measured_w, measured_j = (np.array([getattr(r, f) for r in rows]) for f in ("power_w", "joules"))
    return {
        "power_w": np.log(watts / measured_w),
        "joules_per_output_token": np.log(joules / measured_j),
        "power_w at measured throughput": np.log(alone / measured_w),
    }


def summary(errors: Floats) -> dict[str, float]:
    ape = np.abs(np.expm1(errors))
    return {"mape": float(ape.mean()), "median": float(np.median(ape)), "p90": float(np.quantile(ape, 0.9)),
            "bias": float(np.expm1(errors).mean())}  # fmt: skip


def main() -> None:
    rows = load_rows()
    document = fit(rows)
    errors = {split: cross_validate(split, rows) for split in SPLITS}
    measured_w = np.array([r.power_w for r in rows])
    half = [float(np.quantile(np.abs(errors[split]["power_w"]), COVERAGE)) for split in SPLITS]
    # What was measured less is never known better.
    spread = dict(zip(("point", "model", "gpu"), np.maximum.accumulate(half).tolist(), strict=True))
    residuals = {quantity: {s: summary(errors[s][quantity]) for s in SPLITS} for quantity in errors["random"]}
    residuals["fit at measured throughput"] = {"fit": summary(np.log(predict_w(document, rows) / measured_w))}
    full = {
        "date": datetime.now(UTC).date().isoformat(),
        "rows": len(rows),
        "source": "ML.ENERGY Leaderboard v3, GPU boundary",
        **document,
        "spread": spread,
        "rows_by_gpu": {g: sum(r.gpu.name == g for r in rows) for g in sorted({r.gpu.name for r in rows})},
        "residuals": residuals,
    }
    print(json.dumps({k: full[k] for k in ("weights", "spread")}, indent=1))
    for quantity, by_split in residuals.items():
        print(quantity, {s: {k: round(100 * v, 1) for k, v in e.items()} for s, e in by_split.items()})
    if "--print" not in sys.argv:
        OUT.write_text(json.dumps(_rounded(full), indent=1) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
