"""Fit GPU power, and throughput of the stack it was measured on, and write perf/data/power.json.

    python bench/fit/power.py            # fit, cross-validate, write the coefficient file (some minutes)
    python bench/fit/power.py --print    # the same, write nothing

Rows: ML.ENERGY's leaderboard (H100 and B200, GPU boundary). Its input lengths are not published: those of
`pertoken.perf._points.TASK_INPUT_TOKENS` are assumed. Shares of compute and memory in use are fitted at the row's
measured throughput, so that the power model does not learn the errors of the serving predictor; they are scored
at the predicted throughput, which is what the package has when it predicts.

Three models, each fitted to training rows alone when errors are measured:

1. `pertoken.perf.tasks` (fit: `tasks.py`): seconds that the benchmark's stack takes beyond the roofline's;
2. `pertoken.perf.power`: seventeen weights (a feature stayed where leave one model out and leave one GPU out got
   better with it), among them one of the time that 1 says the host takes, and an offset per decoder and per
   configuration, drawn to zero. An offset per series is fitted beside them and not kept, so that what one run of the
   benchmark drew is not taken for its model's;
3. a curve of at most three numbers along each measured series of it: what 2 leaves there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.fit import serving, serving_fit, serving_rows, tasks
from bench.fit.tasks import Design, Served
from pertoken.catalog.gpus import Gpu, gpu
from pertoken.catalog.models import Model, model
from pertoken.perf import power
from pertoken.perf._coefficients import NAMES, Coefficients
from pertoken.perf._points import MeasuredRow, read_rows
from pertoken.perf._steps import closed_loop, utilisation
from pertoken.perf._work import precision_name
from pertoken.perf.point import Point
from pertoken.perf.tasks import PARTICULAR

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "performance" / "power_mlenergy.csv"
OUT = ROOT / "src" / "pertoken" / "perf" / "data" / "power.json"
SPLITS = ("random", "model", "gpu")
NOISE = 0.06
COVERAGE = 0.8
ROUNDS = 8
"""Rounds of reweighting that make the squares robust (weights 1 / √(1 + residual / noise))."""
WEIGHT_SD: dict[str, float] = {
    "one": 3.0, "compute": 3.0, "memory": 3.0, "widened values": 0.3, "host": 0.2,
    "blackwell": 0.5, "blackwell memory": 0.3, "blackwell, several GPUs": 0.3,
    "experts": 0.5, "experts compute": 0.3, "eight-bit experts": 0.3, "four-bit": 0.5,
    "media": 0.5, "media compute": 0.3, "media memory": 0.3, "video": 0.5, "video compute": 0.3,
}  # fmt: skip
EFFECT_SD = {"decoder": 0.2, "configuration": 0.3, "series": 0.1}
KEPT = ("decoder", "configuration")
"""Effects that the file holds."""
CURVE_SD = (0.5, 1.0, 2.0)
"""Deviations of a power curve, in logits, to choose from."""
UNKNOWN = ", task unknown"
"""Marks a quantity predicted without the task's stack, of prompts that are told to hold images or video: how `validate`
reads such rows of other stacks."""
PLAIN = ", plain predict"
"""Marks what `predict` answers without options: neither task nor media are told."""


@dataclass(frozen=True)
class Row:
    """One measured point; power, tokens per second of one GPU."""

    gpu: Gpu
    model: Model
    name: str
    precision: str
    gpus: int
    media: str
    task: str
    point: Point
    power_w: float
    tokens_per_s: float
    joules: float
    line: int

    @property
    def requests(self) -> float:
        return float(self.point.concurrency)


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
    watts, joules = r.measured["power_w"], r.measured["joules_per_output_token"]
    return Row(card, found, r.model, precision_name(r.precision), int(r.gpus), r.media, r.task, point, watts,
               r.measured["tokens_per_s"], joules, r.line)  # fmt: skip


# --- what a serving fit says of the rows ---


def asked(rows: Sequence[Row]) -> list[serving_rows.Row]:
    """The rows as the serving fit takes them."""
    nothing = float("nan")
    return [
        serving_rows.Row(r.gpu.name, r.name, r.point.engine, r.precision, r.point.layout, 0.0,
                         float(r.point.input_tokens), float(r.point.output_tokens), r.requests, nothing, nothing,
                         nothing, "power")
        for r in rows
    ]  # fmt: skip


def served(rows: Sequence[Row], found: serving_fit.Fit | None = None, *, general: bool = True) -> Served:
    """What a serving fit says of every row; found None: the coefficient file the package ships; general: without
    effects of single configurations, which the rows of a task have of their own."""
    b = serving_fit.batch(asked(rows))
    if len(b.rows) != len(rows):
        raise RuntimeError("a measured configuration does not fit memory: the power rows cannot be aligned")
    if general:
        b = replace(b, keys=tuple({k: v for k, v in key.items() if k not in PARTICULAR} for key in b.keys))
        b = replace(b, members={k: v for k, v in b.members.items() if k[0] not in PARTICULAR})
    logs = serving_fit.shipped_logs(b) if found is None else found.logs(b)
    c = Coefficients(**{name: np.exp(logs[:, i]) for i, name in enumerate(NAMES)})
    loop = closed_loop(b.work, c, b.requests, b.concurrency)
    compute, memory, _ = utilisation(b.work, b.requests, loop)
    return Served(loop.tokens_per_s, compute, memory, loop.prefill_fraction, loop.admitted)


class LeftOut:
    """What serving fits that saw nothing of a fold, model or GPU say of all power rows, in general and with the
    effects of single configurations; each fitted once."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self._serving_rows = serving_rows.load_rows()
        self._made: dict[tuple[str, Hashable], tuple[Served, Served]] = {}

    def __call__(self, split: str, label: Hashable) -> tuple[Served, Served]:
        own = asked(self.rows)
        units = [serving.fold_of(a, split) for a in own]
        labels = groups(split, self.rows)
        # Models of one architecture share a serving fit: it sees none of them.
        unit = units[labels.index(label)]
        if (split, unit) not in self._made:
            # The chat rows are in the serving fit too, under another input length: there they are left out as well.
            same = {_measurement(a) for a, u in zip(own, units, strict=True) if u == unit}
            kept = [
                r
                for r in self._serving_rows
                if serving.fold_of(r, split) != unit
                and not (r.source == "mlenergy" and _measurement(r) in same)
            ]
            # Effects of one configuration say nothing of rows whose configuration is left out.
            stages = serving_fit.STAGES if split == "random" else serving_fit.STAGES[: serving_fit.GENERAL]
            found = serving_fit.fit(serving_fit.batch(kept), stages)
            self._made[split, unit] = served(self.rows, found), served(self.rows, found, general=False)
        return self._made[split, unit]


def _measurement(row: serving_rows.Row) -> tuple[str, str, float]:
    """A chat measurement by its GPU, model and mean output, which two tables give to the same digits."""
    return row.gpu, row.model, round(row.output_tokens, 3)


def groups(split: str, rows: Sequence[Row]) -> list[Hashable]:
    """The group each row is left out with: a random fold of settings, its model, or its GPU."""
    if split == "model":
        return [r.name for r in rows]
    return [serving.fold_of(a, split) for a in asked(rows)]


# --- the fit of power ---


class Board:
    """Rows as a linear model at given shares in use: columns are weights, then effects; target is the logit of the
    position between idle and limit."""

    def __init__(self, rows: Sequence[Row], compute: Floats, memory: Floats, more_host: Floats) -> None:
        terms = [power.share_terms(c, m, h, r.precision)
                 for r, c, m, h in zip(rows, compute, memory, more_host, strict=True)]  # fmt: skip
        parts = [power.features(r.gpu, r.precision, r.model, r.gpus, r.media) for r in rows]
        self.weights = np.array(
            [[p[name][1] * t[p[name][0]] for name in WEIGHT_SD] for p, t in zip(parts, terms, strict=True)]
        )
        self.keys = [
            power.effect_keys(r.gpu, r.precision, r.model, r.gpus)
            | {"series": power.series_key(r.gpu, r.precision, r.model, r.gpus, r.task)}
            for r in rows
        ]
        self.idle_w = np.array([r.gpu.idle_w for r in rows])
        self.tdp_w = np.array([r.gpu.tdp_w for r in rows])
        watts = np.array([r.power_w for r in rows])
        span = power.LIMIT * self.tdp_w - self.idle_w
        position = np.clip((watts - self.idle_w) / span, 0.01, 0.99)
        self.target = np.log(position / (1 - position))
        self.slope = position * (1 - position) * span / watts
        """Relative change of power per unit of logit."""

    def scores(self, document: dict[str, Any]) -> Floats:
        """The logit of every row's position, curves apart."""
        score = self.weights @ np.array([document["weights"][name] for name in WEIGHT_SD])
        own = [sum(document["effects"][level].get(k[level], 0.0) for level in KEPT) for k in self.keys]
        return np.asarray(score + np.array(own), dtype=np.float64)

    def watts(self, scores: Floats) -> Floats:
        """Power of one GPU of each row."""
        span = power.LIMIT * self.tdp_w - self.idle_w
        return np.asarray(np.minimum(self.idle_w + span / (1 + np.exp(-scores)), self.tdp_w))


def in_use(rows: Sequence[Row], found: Served, slower: Floats) -> tuple[Floats, Floats]:
    """Shares of compute and memory in use where everything takes `slower` times the serving fit's seconds."""
    return np.minimum(found.compute / slower, 1.0), np.minimum(found.memory / slower, 1.0)


def measured_slowdown(rows: Sequence[Row], found: Served) -> Floats:
    """How many times the serving fit's seconds were measured."""
    return np.asarray(found.tokens_per_s / np.array([r.tokens_per_s * r.gpus for r in rows]))


@dataclass(frozen=True)
class Fitted:
    """All three models fitted to the same rows."""

    document: dict[str, Any]
    stack: tasks.Fit

    def watts(self, found: Served, slower: Floats, host: Floats | None = None, told: str = "task") -> Floats:
        """Power of one GPU of every row where everything takes `slower` times the serving fit's seconds, `host` of
        them the host's (None: as on average); told: the task, and with it the series' curve, or its media, or
        nothing."""
        rows: Sequence[Any] = self.stack.design.rows
        rows = rows if told else [replace(r, media="") for r in rows]
        more = np.zeros(len(rows)) if host is None else host - self.document["typical host fraction"]
        board = Board(rows, *in_use(rows, found, slower), more)
        curves = {key: np.array(v) for key, v in self.document["curves"].items()} if told == "task" else {}
        return board.watts(board.scores(self.document) + tasks.drawn(self.stack.design, curves))

    def at_measured_throughput(self, found: Served) -> Floats:
        """Power of one GPU of every row, its throughput known."""
        rows: Sequence[Any] = self.stack.design.rows
        return self.watts(found, measured_slowdown(rows, found), self.stack.host_fraction(found))


def fit(rows: Sequence[Row], found: Served, train: Mask | None = None) -> Fitted:
    """The three models from the rows of the mask (None: all), without intervals."""
    keep = np.ones(len(rows), dtype=bool) if train is None else train
    design = Design(rows)
    stack = tasks.fit(design, found, keep)
    host = stack.host_fraction(found)
    typical = float(host[keep].mean())
    board = Board(rows, *in_use(rows, found, measured_slowdown(rows, found)), host - typical)
    document = _board_fit(board, keep) | {"typical host fraction": typical}
    noise = tasks.CURVE_NOISE / board.slope
    residual = board.target - board.scores(document)
    curve_sd, curves = tasks.bend(design, residual, noise, keep, CURVE_SD)
    document["curves"] = {key: [float(v) for v in values] for key, values in curves.items()}
    document["task"] = stack.document()
    document["task"]["chosen"]["power curve deviation"] = curve_sd
    return Fitted(document, stack)


def _board_fit(d: Board, train: Mask) -> dict[str, Any]:
    """Weights and effects by robust least squares with Gaussian priors around zero."""
    at = np.flatnonzero(train).tolist()
    names = [(level, key) for level in EFFECT_SD for key in sorted({d.keys[i][level] for i in at})]
    effects = np.array([[float(d.keys[i][level] == key) for level, key in names] for i in at])
    x = np.hstack([d.weights[train], effects])
    target, slope = d.target[train], d.slope[train]
    sd = np.array([*WEIGHT_SD.values(), *(EFFECT_SD[level] for level, _ in names)])
    robust = np.ones(len(at))
    theta = np.zeros(x.shape[1])
    for _ in range(ROUNDS):
        scale = slope * robust / NOISE
        left = np.vstack([x * scale[:, None], np.diag(1 / sd)])
        theta = np.linalg.lstsq(left, np.concatenate([target * scale, np.zeros(len(sd))]), rcond=None)[0]
        robust = 1 / np.sqrt(1 + np.abs((x @ theta - target) * slope / NOISE))
    document: dict[str, Any] = {
        "weights": dict(zip(WEIGHT_SD, theta.tolist(), strict=False)),
        "effects": {level: {} for level in KEPT},
    }
    for (level, key), value in zip(names, theta[len(WEIGHT_SD) :].tolist(), strict=True):
        if level in KEPT:
            document["effects"][level][key] = value
    return document


# --- errors of rows left out ---


def cross_validate(split: str, rows: Sequence[Row], left_out: tasks.Predictions) -> dict[str, Floats]:
    """log(predicted / measured) of each row by quantity, by fits of serving, stack and power that did not see it.

    Quantities marked `UNKNOWN` and `PLAIN` are of predictions that are told less.
    """
    labels = groups(split, rows)
    out: dict[str, Floats] = {}
    for label in sorted(set(labels), key=str):
        own = np.array([g == label for g in labels])
        found, whole = left_out(split, label)
        for quantity, errors in _errors(rows, fit(rows, found, ~own), found, whole).items():
            out.setdefault(quantity, np.zeros(len(rows)))[own] = errors[own]
    return out


def _errors(rows: Sequence[Row], made: Fitted, found: Served, whole: Served) -> dict[str, Floats]:
    gpus = np.array([r.gpus for r in rows])
    same: list[tuple[float, Floats, Floats | None]] = [(1.0, np.ones(len(rows)), None)]
    measured = {
        name: np.array([getattr(r, name) for r in rows]) for name in ("power_w", "tokens_per_s", "joules")
    }
    errors = {}
    asked_as = (
        ("", "task", found, made.stack.cases(found)),
        (UNKNOWN, "media", whole, same),
        (PLAIN, "", whole, same),
    )
    for mark, told, base, cases in asked_as:
        watts = sum(w * made.watts(base, slower, host, told) for w, slower, host in cases)
        rate = base.tokens_per_s / gpus * sum(w / slower for w, slower, _ in cases)
        errors[f"power_w{mark}"] = np.log(watts / measured["power_w"])
        errors[f"joules_per_output_token{mark}"] = np.log(watts / rate / measured["joules"])
        if mark != PLAIN:
            errors[f"task_tokens_per_s{mark}"] = np.log(rate / measured["tokens_per_s"])
    alone = made.at_measured_throughput(found)
    return errors | {"power_w at measured throughput": np.log(alone / measured["power_w"])}


def summary(errors: Floats) -> dict[str, float]:
    ape = np.abs(np.expm1(errors))
    return {"mape": float(ape.mean()), "median": float(np.median(ape)), "p90": float(np.quantile(ape, 0.9)),
            "bias": float(np.expm1(errors).mean())}  # fmt: skip


def widths(
    errors: dict[str, dict[str, Floats]], quantity: str, names: tuple[str, str, str]
) -> dict[str, float]:
    """Half-widths of the 80 % interval by how far a configuration is from the rows; never narrower the farther."""
    half = [float(np.quantile(np.abs(errors[split][quantity]), COVERAGE)) for split in SPLITS]
    return dict(zip(names, np.maximum.accumulate(half).tolist(), strict=True))


def main() -> None:
    rows = load_rows()
    shipped, whole = served(rows), served(rows, general=False)
    made = fit(rows, shipped)
    left_out = LeftOut(rows)
    errors = {split: cross_validate(split, rows, left_out) for split in SPLITS}
    residuals = {quantity: {s: summary(errors[s][quantity]) for s in SPLITS} for quantity in errors["random"]}
    own = _errors(rows, made, shipped, whole)["power_w at measured throughput"]
    residuals["fit at measured throughput"] = {"fit": summary(own)}
    made.document["task"]["spread"] = {
        quantity: widths(errors, name, ("series", "model", "gpu"))
        for quantity, name in (("power_w", "power_w"), ("tokens_per_s", "task_tokens_per_s"))
    }
    full = {
        "date": datetime.now(UTC).date().isoformat(),
        "rows": len(rows),
        "source": "ML.ENERGY Leaderboard v3, GPU boundary",
        **made.document,
        "spread": widths(errors, f"power_w{UNKNOWN}", ("point", "model", "gpu")),
        "rows_by_gpu": {g: sum(r.gpu.name == g for r in rows) for g in sorted({r.gpu.name for r in rows})},
        "residuals": residuals,
    }
    print(json.dumps({k: full[k] for k in ("weights", "spread")} | full["task"]["chosen"], indent=1))
    for quantity, by_split in residuals.items():
        print(quantity, {s: {k: round(100 * v, 1) for k, v in e.items()} for s, e in by_split.items()})
    if "--print" not in sys.argv:
        OUT.write_text(_text(_rounded(full)), encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _text(document: dict[str, Any]) -> str:
    """JSON with each list on one line."""
    lists: list[str] = []

    def mark(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: mark(v) for k, v in value.items()}
        if isinstance(value, list):
            lists.append(json.dumps(value))
            return f"@{len(lists) - 1}@"
        return value

    text = json.dumps(mark(document), indent=1)
    for i, line in enumerate(lists):
        text = text.replace(f'"@{i}@"', line)
    return text + "\n"


if __name__ == "__main__":
    main()
