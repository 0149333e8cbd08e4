"""Fit what a benchmark's serving stack adds to the roofline's seconds: the part of the power fit about throughput.

The model is `pertoken.perf.tasks`. Three stages, each with those before it held fixed: effects that reach beyond a
configuration, effects of configurations, and a curve of at most three numbers along each measured series. Gaussian
priors around zero, absolute errors (squares reweighted). How far a model may stand out and how far a curve may bend
are chosen inside the rows of the fit, by leaving out groups of its models and folds of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pertoken.catalog.gpus import Gpu
from pertoken.catalog.models import Model
from pertoken.perf.power import KNOTS
from pertoken.perf.tasks import HOST_S, TERMS, host_deviation, normal_nodes, shape_of, task_keys, term_name

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
PARTS = ("decode", "prefill", "host")
MOVES = {"work": (0, 1), "prefill": (1,), "host": (2,)}
"""Which parts of the seconds an effect moves."""
PRIOR_SD: dict[tuple[str, str, str], float] = {
    ("all", "work", "level"): 0.1, ("gpu", "work", "level"): 0.3, ("all", "work", "batch"): 0.05,
    ("gpu", "work", "batch"): 0.1, ("kind", "work", "level"): 0.2, ("kind|precision", "work", "level"): 0.2,
    ("kind", "work", "batch"): 0.1, ("task", "prefill", "level"): 0.4, ("model|task", "prefill", "level"): 0.3,
    ("all", "host", "level"): 0.3, ("gpu", "host", "level"): 1.0, ("hosts", "host", "level"): 1.0,
    ("hosts|task", "host", "level"): 1.0, ("hosts|task", "host", "batch"): 0.5, ("hosts|task", "host", "at 8"): 0.3,
    ("hosts|task", "host", "at 16"): 0.3, ("hosts|task", "host", "at 32"): 0.3,
    ("configuration", "work", "level"): 0.15, ("configuration", "work", "batch"): 0.1,
    ("series", "host", "level"): 0.5,
}  # fmt: skip
"""Prior standard deviations in log space; a model's is chosen in each fit. More of what hosts cost is a GPU's own
than shared by all: of two GPUs one cannot learn how hosts of a third will do."""
MODEL_SD = (0.05, 0.1, 0.2)
CURVE_SD = (0.2, 0.4, 0.8)
NOISE, CURVE_NOISE = 0.06, 0.05
CURVE_REACH = 2.5
"""Factors of two in requests over which a curve's coefficients go together."""
CURVE_LEVEL = 0.5
"""Share of a curve's variance that is its level."""
ROWS_PER_NUMBER = 2
"""Rows of a series for each number of its curve, at least."""
ROUNDS, CURVE_ROUNDS, TOLERANCE = 15, 6, 3e-3
INNER_FOLDS = 4
LATER = frozenset({"configuration", "series"})
"""Levels of the second stage."""
HOSTED = frozenset({"gpu", "hosts", "hosts|task", "series"})
"""Levels whose keys name a GPU: what moves its host seconds there is unknown where that GPU was not measured."""
HOST_DEVIATION = {
    shape: math.sqrt(
        sum(sd**2 for (level, part, own), sd in PRIOR_SD.items()
            if part == "host" and level in HOSTED and own == shape)
    )
    for shape in dict.fromkeys(shape for _, part, shape in PRIOR_SD if part == "host")
}  # fmt: skip
"""Prior of the logarithm of an unmeasured GPU's host seconds: the deviations above, squared and added."""


class Measured(Protocol):
    """What of a power row the fit needs."""

    @property
    def gpu(self) -> Gpu: ...
    @property
    def model(self) -> Model: ...
    @property
    def name(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def gpus(self) -> int: ...
    @property
    def task(self) -> str: ...
    @property
    def requests(self) -> float: ...
    @property
    def tokens_per_s(self) -> float:
        """Of one GPU."""
        ...


@dataclass(frozen=True)
class Served:
    """What a serving fit says of every row: output tokens per second of the replica, shares of compute and memory
    in use, prefill's share of the time, requests admitted."""

    tokens_per_s: Floats
    compute: Floats
    memory: Floats
    prefill: Floats
    admitted: Floats

    @property
    def seconds(self) -> Floats:
        """Seconds per token of one request."""
        return self.admitted / self.tokens_per_s

    def log_parts(self) -> Floats:
        """Logarithms of decode, prefill and host seconds before any effect, shape (3, rows)."""
        prefill = np.clip(self.prefill, 1e-6, 1 - 1e-6)
        host = np.full_like(self.seconds, HOST_S)
        return np.log(np.stack([self.seconds * (1 - prefill), self.seconds * prefill, host]))


class Design:
    """Rows as columns of effects, for each part of the seconds."""

    def __init__(self, rows: Sequence[Measured]) -> None:
        self.rows = rows
        self.keys = [task_keys(r.model, r.gpu, r.precision, r.gpus, r.task) for r in rows]
        self.series = np.array([k["series"] for k in self.keys])
        self.requests = np.array([r.requests for r in rows])
        self.measured = np.array([r.tokens_per_s * r.gpus for r in rows])
        self.names: list[tuple[tuple[str, str, str], str]] = []
        columns: list[Floats] = []
        for term in TERMS:
            level, _, shape = term
            own = np.array([k[level] for k in self.keys])
            for key in sorted(set(own.tolist())):
                self.names.append((term, key))
                columns.append((own == key) * shape_of(shape, self.requests))
        x = np.stack(columns, axis=1)
        self.x = np.zeros((len(PARTS), *x.shape))
        for j, (term, _) in enumerate(self.names):
            self.x[list(MOVES[term[1]]), :, j] = x[:, j]
        self.later = np.array([term[0] in LATER for term, _ in self.names])

    def prior_sd(self, model_sd: float) -> Floats:
        """Standard deviation of each effect; a model's slope moves half as much as its level."""
        own = {("model", "work", "level"): model_sd, ("model", "work", "batch"): model_sd / 2} | PRIOR_SD
        return np.array([own[term] for term, _ in self.names])


@dataclass(frozen=True)
class Fit:
    """Effects and curves, and the scales chosen for them."""

    design: Design
    effects: Floats
    curves: dict[str, Floats]
    model_sd: float
    curve_sd: float
    gpus: frozenset[str]
    """GPUs of the rows it was fitted to."""

    def log_seconds(self, served: Served) -> Floats:
        """Seconds per token of one request of every row, in logarithms, under a serving fit."""
        return _log_seconds(self.design, served.log_parts(), self.effects) + drawn(self.design, self.curves)

    def factor(self, served: Served) -> Floats:
        """By how much the stack's seconds exceed the serving fit's."""
        return np.asarray(np.exp(self.log_seconds(served)) / served.seconds)

    def cases(self, served: Served) -> list[tuple[float, Floats, Floats]]:
        """That factor and the host's share of the time at each of the host times a GPU may have, with its weight: one
        and the same where it was measured, the prior's where it was not."""
        new = np.array([r.gpu.name not in self.gpus for r in self.design.rows])
        nodes = normal_nodes() if new.any() else ((0.0, 1.0),)
        deviation = new * host_deviation(HOST_DEVIATION, self.design.requests)
        curves, logs = drawn(self.design, self.curves), served.log_parts() + self.design.x @ self.effects
        out = []
        for at, weight in nodes:
            moved = logs + np.stack([np.zeros_like(deviation)] * 2 + [at * deviation])
            seconds = np.logaddexp.reduce(moved, axis=0)
            out.append((weight, np.exp(seconds + curves) / served.seconds, np.exp(moved[2] - seconds)))
        return out

    def host_fraction(self, served: Served) -> Floats:
        """The host's share of every row's time."""
        moved = served.log_parts() + self.design.x @ self.effects
        return np.asarray(np.exp(moved[2] - np.logaddexp.reduce(moved, axis=0)))

    def document(self) -> dict[str, Any]:
        """The fit as the coefficient file holds it."""
        effects: dict[str, dict[str, float]] = {term_name(*term): {} for term in TERMS}
        for (term, key), value in zip(self.design.names, self.effects, strict=True):
            effects[term_name(*term)][key] = float(value)
        return {
            "effects": effects,
            "curves": {key: [float(v) for v in values] for key, values in self.curves.items()},
            "host deviation": HOST_DEVIATION,
            "chosen": {"model deviation": self.model_sd, "curve deviation": self.curve_sd},
        }


def fit(design: Design, served: Served, train: Mask) -> Fit:
    """Effects and curves from the rows of the mask alone."""
    logs, target = served.log_parts(), np.log(served.admitted / design.measured)
    names = np.array([r.name for r in design.rows])
    order = {name: i % INNER_FOLDS for i, name in enumerate(sorted(set(names[train].tolist())))}
    inner = np.array([order.get(name, -1) for name in names.tolist()])

    def left_out_error(model_sd: float) -> float:
        errors = []
        for fold in range(INNER_FOLDS):
            own = train & (inner == fold)
            theta = _stage(design, logs, target, train & ~own, design.prior_sd(model_sd), ~design.later)
            errors.append(np.abs(np.expm1(_log_seconds(design, logs, theta) - target))[own])
        return float(np.concatenate(errors).mean())

    model_sd = min(MODEL_SD, key=left_out_error)
    sd = design.prior_sd(model_sd)
    theta = _stage(design, logs, target, train, sd, ~design.later)
    moved = logs + design.x @ theta
    theta = theta + _stage(design, moved, target, train, sd, design.later)
    residual = target - _log_seconds(design, logs, theta)
    curve_sd, curves = bend(design, residual, np.full_like(residual, CURVE_NOISE), train, CURVE_SD)
    measured = frozenset(r.gpu.name for r, own in zip(design.rows, train.tolist(), strict=True) if own)
    return Fit(design, theta, curves, model_sd, curve_sd, measured)


def _log_seconds(design: Design, logs: Floats, theta: Floats) -> Floats:
    return np.asarray(np.logaddexp.reduce(logs + design.x @ theta, axis=0))


def _stage(design: Design, logs: Floats, target: Floats, train: Mask, sd: Floats, own: Mask) -> Floats:
    """Maximum a posteriori effects of the columns `own`, others zero.

    minimise Σ |target − ln Σ exp(part)| / noise, squared near zero, + ½ Σ (effect / deviation)²: Gauss-Newton on
    reweighted squares.
    """
    used = np.flatnonzero(own & (np.abs(design.x[:, train]).sum(axis=(0, 1)) > 0))
    x = design.x[:, train][:, :, used]
    parts, wanted, precision = logs[:, train], target[train], 1 / sd[used] ** 2
    theta = np.zeros(len(used))
    for _ in range(ROUNDS):
        now = parts + x @ theta
        total = np.logaddexp.reduce(now, axis=0)
        slopes = np.einsum("kr,krj->rj", np.exp(now - total), x)
        residual = wanted - total
        weight = 1 / (NOISE**2 * (1 + np.abs(residual) / NOISE))
        normal = slopes.T @ (slopes * weight[:, None]) + np.diag(precision)
        step = np.linalg.solve(normal, slopes.T @ (weight * residual) - precision * theta)
        theta = theta + np.clip(step, -1.0, 1.0)
        if np.abs(step).max() < TOLERANCE:
            break
    whole = np.zeros(len(design.names))
    whole[used] = theta
    return whole


# --- curves along a series, of seconds and of power alike ---


def hats(requests: Floats, knots: Sequence[float] = KNOTS) -> Floats:
    """Weights of the knots at so many requests: straight between them, level outside; shape (rows, knots)."""
    return np.stack([np.interp(np.log(requests), np.log(knots), row) for row in np.eye(len(knots))], axis=1)


def bend(
    design: Design, residual: Floats, noise: Floats, train: Mask, deviations: Sequence[float]
) -> tuple[float, dict[str, Floats]]:
    """Curves that follow the residuals of each series of the training rows, and the deviation chosen for them.

    A curve has a number at the first of `KNOTS`, as many as its rows allow, under a Gaussian prior: `CURVE_LEVEL`
    of the variance in common, the rest going together over `CURVE_REACH`. The deviation is the one that predicts
    folds of the training rows best.
    """
    inner = np.arange(len(residual)) % INNER_FOLDS

    def left_out_error(sd: float) -> float:
        errors = []
        for fold in range(INNER_FOLDS):
            own = train & (inner == fold)
            found = _curves(design, residual, noise, train & ~own, sd)
            errors.append((np.abs(residual - drawn(design, found)) / noise)[own])
        return float(np.concatenate(errors).mean())

    chosen = min(deviations, key=left_out_error)
    return chosen, _curves(design, residual, noise, train, chosen)


def drawn(design: Design, curves: dict[str, Floats]) -> Floats:
    """Each row's value on its series' curve; zero where the series has none."""
    out = np.zeros(len(design.series))
    for series, values in curves.items():
        own = design.series == series
        out[own] = hats(design.requests[own], KNOTS[: len(values)]) @ values
    return out


def _curves(design: Design, residual: Floats, noise: Floats, train: Mask, sd: float) -> dict[str, Floats]:
    found = {}
    for series in sorted(set(design.series[train].tolist())):
        own = train & (design.series == series)
        knots = KNOTS[: math.ceil(own.sum() / ROWS_PER_NUMBER)]
        apart = np.subtract.outer(np.log2(knots), np.log2(knots)) / CURVE_REACH
        prior = np.linalg.inv(sd**2 * (CURVE_LEVEL + (1 - CURVE_LEVEL) * np.exp(-0.5 * apart**2)))
        h, r, n = hats(design.requests[own], knots), residual[own], noise[own]
        values, robust = np.zeros(len(knots)), np.ones(len(r))
        for _ in range(CURVE_ROUNDS):
            weight = robust / n**2
            values = np.linalg.solve(h.T @ (h * weight[:, None]) + prior, h.T @ (weight * r))
            robust = 1 / (1 + np.abs(r - h @ values) / n)
        found[series] = values
    return found


Predictions = Callable[[str, Any], tuple[Served, Served]]
"""What a serving fit that left out a fold, model or GPU says of all rows, in general and with effects of single
configurations: by split and what was left out."""
