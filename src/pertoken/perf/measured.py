"""The second predictor: a user's own measured points bend the fitted model near where they were measured.

Where the same model, GPU, precision, engine and layout was measured, the fitted prediction is multiplied by
the measured ratio: the logarithm of measured over predicted, interpolated over the logarithms of concurrency,
input and output length by a Gaussian process. On a measured point the answer is the measurement, between
points it follows the physical shape, and far from all of them it fades into the fitted model with its own
interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pertoken.catalog.gpus import Gpu, gpu
from pertoken.catalog.models import Model, model
from pertoken.errors import CannotServeError, InputError, UnknownNameError
from pertoken.perf._points import MeasuredRow as MeasuredRow
from pertoken.perf._points import read_rows as read_rows
from pertoken.perf._work import engine_family, precision_name
from pertoken.perf.point import Floats, Interval, Point, Prediction

Predictor = Callable[[Model, Gpu, Point], Prediction]

LENGTH_SCALES = (1.0, 0.7, 0.7)
"""Over how many e-folds of concurrency, input and output length a measured ratio carries."""
NOISE = 0.03
"""Relative scatter of repeated runs of one point."""
Z80 = 1.2816
"""Half-width of a normal distribution's central 80 %, in standard deviations."""
NEAR = 0.5
"""Share of the model's own uncertainty that measurement must remove for the answer to count as measured."""


@dataclass(frozen=True)
class Points:
    """Measured serving points of one file, usable ones only; `unusable` says why the others are not."""

    path: str
    rows: tuple[MeasuredRow, ...]
    configurations: tuple[tuple[str, str, str, str], ...]
    """Per row: model, GPU, precision and engine family by our names."""
    unusable: tuple[tuple[int, str], ...]


def load_points(path: Path) -> Points:
    """Measured serving points of a CSV (columns as `pertoken validate` takes them).

    Raises InputError in one line where the file is malformed or holds no usable serving point.
    """
    rows, configurations, unusable = [], [], []
    for row in read_rows(Path(path)):
        reason = row.problem or _unusable(row)
        if not reason:
            try:
                row, configuration = _configuration(row)
            except InputError as error:
                reason = str(error)
            else:
                configurations.append(configuration)
                rows.append(row)
        if reason:
            unusable.append((row.line, reason))
    if not rows:
        why = f" (line {unusable[0][0]}: {unusable[0][1]})" if unusable else ""
        raise InputError(f"{path}: no usable serving point{why}")
    return Points(str(path), tuple(rows), tuple(configurations), tuple(unusable))


def _unusable(row: MeasuredRow) -> str:
    if row.training:
        return "a training run, not a serving point"
    if not math.isfinite(row.concurrency):
        return "at saturation: the concurrency is not known"
    return "" if row.measured.keys() & set(_QUANTITIES) else "nothing measured"


def _configuration(row: MeasuredRow) -> tuple[MeasuredRow, tuple[str, str, str, str]]:
    """The row, its precision filled in, and what a prediction must share with it."""
    try:
        found = model(row.model)
        name, native = found.name, found.native_precision
    except UnknownNameError:
        name, native = row.model, "bf16"
    device = gpu(row.gpu)
    row = power_of_one(replace(row, precision=row.precision or native), device)
    return row, (name, device.name, precision_name(row.precision), engine_family(row.engine))


BELOW_IDLE = 0.7
"""Share of a loaded, idle GPU's power that no busy one draws: below it a row's power was of one GPU."""


def power_of_one(row: MeasuredRow, gpu: Gpu) -> MeasuredRow:
    """The row with `power_w` read as of one GPU, and said so, where the power of all would leave each below idle."""
    each = row.measured.get("power_w", math.inf)
    if (
        row.gpus <= 1
        or each >= BELOW_IDLE * gpu.idle_w
        or not gpu.idle_w <= each * row.gpus <= 1.1 * gpu.tdp_w
    ):
        return row
    said = "power_w is of one GPU: of all of them each would draw less than at rest"
    return replace(row, measured={**row.measured, "power_w": each * row.gpus}, assumed=(*row.assumed, said))


def serving_points(rows: Sequence[MeasuredRow]) -> Point:
    """Measured rows that share all but lengths and concurrency, as one point of arrays of shape (len(rows),)."""

    def column(name: str) -> Floats:
        return np.array([getattr(row, name) for row in rows], dtype=np.float64)

    first = rows[0]
    return Point(
        column("input_tokens"),
        column("output_tokens"),
        column("concurrency"),
        column("cached_tokens"),
        precision=first.precision,
        engine=first.engine,
        layout=first.layout,
        accepted_per_step=first.accepted_per_step,
        prefill_gpus=first.prefill_gpus,
    )


_QUANTITIES = ("tokens_per_s", "ttft_s", "tpot_s", "power_w")


def predict_measured(
    points: Points, model: Model, gpu: Gpu, point: Point, base: Predictor
) -> Prediction | None:
    """What the points say of an operating point; None where they hold nothing of its configuration.

    Parameters: points; model; gpu; point, whose float fields broadcast; base: the predictor to bend
    (`predict`). A point belongs to the configuration where model, GPU, precision, engine family and layout
    are the same; where none has the layout, those on as many GPUs. Formula: per quantity, prediction ×
    exp(m), m the posterior mean of ln(measured / predicted) under a Gaussian process of the base's own
    uncertainty, length scales `LENGTH_SCALES` and noise `NOISE`; the interval is the posterior's. Basis
    ``measured`` where measurements removed half of the uncertainty everywhere. Raises what `base` raises.
    """
    wanted = (model.name, gpu.name, precision_name(point.precision), engine_family(point.engine))
    rows = [r for r, c in zip(points.rows, points.configurations, strict=True) if c == wanted]
    rows = _same_layout(rows, point)
    if not rows:
        return None
    answer = base(model, gpu, point)
    ratios = _log_ratios(rows, model, gpu, point, base)
    fits = {q: _bend(_interval(answer, q), point, rows, ratios[q]) for q in _QUANTITIES}
    power = fits["power_w"][0]
    removed = fits["tokens_per_s"][1]
    near = bool((removed >= NEAR).all())
    return replace(
        answer,
        tokens_per_s=fits["tokens_per_s"][0],
        ttft_s=fits["ttft_s"][0],
        tpot_s=fits["tpot_s"][0],
        gpu_power_w=Interval(
            np.clip(power.value, 0.0, gpu.tdp_w),
            np.clip(power.low, 0.0, gpu.tdp_w),
            np.clip(power.high, 0.0, gpu.tdp_w),
        ),
        basis="measured" if near else answer.basis,
        source=f"{len(rows)} measured points of {points.path}; {answer.source}",
    )


def _same_layout(rows: Sequence[MeasuredRow], point: Point) -> list[MeasuredRow]:
    alike = [
        r
        for r in rows
        if math.isclose(r.accepted_per_step, point.accepted_per_step)
        and (r.prefill_gpus > 0) == (point.prefill_gpus > 0)
    ]
    exact = [r for r in alike if r.layout == point.layout and r.prefill_gpus == point.prefill_gpus]
    total = point.layout.gpus + point.prefill_gpus
    return exact or [r for r in alike if r.layout.gpus + r.prefill_gpus == total]


def _bend(
    own: Interval, point: Point, rows: Sequence[MeasuredRow], ratios: Floats
) -> tuple[Interval, Floats]:
    """The bent interval of one quantity, and the share of the model's variance that the rows removed."""
    known = np.isfinite(ratios)
    if not known.any():
        return own, np.zeros_like(own.value)
    at = np.array([[r.concurrency, r.input_tokens, r.output_tokens] for r in rows])[known]
    sd = np.log(own.high / own.low) / (2 * Z80)
    query = np.stack(
        [
            np.broadcast_to(np.asarray(v, dtype=np.float64), own.value.shape).ravel()
            for v in (point.concurrency, point.input_tokens, point.output_tokens)
        ],
        axis=1,
    )
    mean, removed = _posterior(query, at, ratios[known], float(np.median(sd)))
    mean, removed = mean.reshape(own.value.shape), removed.reshape(own.value.shape)
    left = np.sqrt(sd**2 * (1 - removed) + NOISE**2)
    value = own.value * np.exp(mean)
    return Interval(value, value * np.exp(-Z80 * left), value * np.exp(Z80 * left)), removed


def _posterior(query: Floats, at: Floats, ratios: Floats, sd: float) -> tuple[Floats, Floats]:
    """Mean of the log ratio at each query, and the share of its prior variance that was removed."""

    def kernel(a: Floats, b: Floats) -> Floats:
        steps = np.log(np.maximum(a, 1.0))[:, None, :] - np.log(np.maximum(b, 1.0))[None, :, :]
        similarity: Floats = np.exp(-0.5 * ((steps / np.array(LENGTH_SCALES)) ** 2).sum(axis=-1))
        return similarity

    noise = (NOISE / max(sd, NOISE)) ** 2
    between = kernel(at, at) + noise * np.eye(len(at))
    cross = kernel(query, at)
    weights = np.linalg.solve(between, cross.T)
    removed: Floats = np.clip(np.einsum("qr,rq->q", cross, weights), 0.0, 1.0)
    return np.asarray(weights.T @ ratios), removed


def _log_ratios(
    rows: Sequence[MeasuredRow], model: Model, gpu: Gpu, point: Point, base: Predictor
) -> dict[str, Floats]:
    """ln(measured / predicted) of each row by quantity, NaN where not measured or not predictable; one
    prediction per layout."""
    found = {q: np.full(len(rows), np.nan) for q in _QUANTITIES}
    shapes = [(r.layout, r.prefill_gpus, r.engine, r.precision) for r in rows]
    for shape in dict.fromkeys(shapes):
        own = [i for i, s in enumerate(shapes) if s == shape]
        asked = replace(serving_points([rows[i] for i in own]), kv_precision=point.kv_precision)
        try:
            told = base(model, gpu, asked)
        except CannotServeError:
            continue  # measured, yet impossible by the model: its ratio to the model does not exist
        for quantity, ratios in found.items():
            predicted = np.ravel(_interval(told, quantity).value)
            for k, i in enumerate(own):
                each = rows[i].layout.gpus + rows[i].prefill_gpus if quantity == "tokens_per_s" else 1.0
                ratios[i] = math.log(rows[i].measured.get(quantity, math.nan) * each / predicted[k])
    return found


def _interval(answer: Prediction, quantity: str) -> Interval:
    found: Interval = getattr(answer, {"power_w": "gpu_power_w"}.get(quantity, quantity))
    return found
