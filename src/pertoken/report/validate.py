"""`pertoken validate`: score the predictors on any file of measured points.

Every row is either scored or listed with the reason it could not be. Nothing is fitted here.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console, RenderableType

from pertoken.catalog.gpus import Gpu, gpu
from pertoken.catalog.models import Model, model, model_from_config
from pertoken.errors import CannotServeError, InputError, NoEvidenceError, PerTokenError, UnknownNameError
from pertoken.perf import predict, utilisations
from pertoken.perf._training_work import training_precision
from pertoken.perf._work import engine_family, precision_name
from pertoken.perf.measured import MeasuredRow, power_of_one, read_rows, serving_points
from pertoken.perf.point import Floats, Interval, Layout, Point
from pertoken.perf.power import gpu_power_w
from pertoken.perf.tasks import ENGINE, predict_task, task_names
from pertoken.perf.training import predict_training, training_point
from pertoken.report._validate_table import QUANTITIES, WIDTH, validation_table

WORST = 10
TRAINING = {"tokens_per_s": "training_tokens_per_s", "mfu_fraction": "mfu_fraction", "power_w": "power_w"}
"""What of a training row's measurements is predicted, and as which quantity it is scored."""


class Scored(NamedTuple):
    """One quantity of one row: measured, predicted and the ends of the predicted 80 % interval."""

    line: int
    quantity: str
    gpu: str
    engine: str
    precision: str
    model: str
    setting: str
    measured: float
    predicted: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Signed relative error: predicted / measured − 1."""
        return self.predicted / self.measured - 1

    @property
    def covered(self) -> bool:
        """Whether the measurement lies within the interval."""
        return self.low <= self.measured <= self.high


@dataclass(frozen=True)
class Score:
    """Errors of one quantity over a group of rows, as fractions of what was measured.

    mean, median and p90 of the absolute error, bias (mean of the signed one), coverage (share of measurements
    within the 80 % interval). Empty gpu, engine and precision: all rows.
    """

    quantity: str
    gpu: str
    engine: str
    precision: str
    rows: int
    mean: float
    median: float
    p90: float
    bias: float
    coverage: float


@dataclass(frozen=True)
class Unanswered:
    """A row that was not scored, and why."""

    line: int
    gpu: str
    model: str
    reason: str


@dataclass(frozen=True)
class Validation:
    """What a file of measured points says of the predictors.

    overall: one score per quantity; groups: per quantity, GPU, engine and precision; worst: the rows with the
    largest absolute error of throughput (trained tokens where a file has no serving rows; else of any
    quantity); assumed: what was taken for granted, with the count of rows.
    """

    path: str
    rows: int
    answered: int
    overall: tuple[Score, ...]
    groups: tuple[Score, ...]
    worst: tuple[Scored, ...]
    unanswered: tuple[Unanswered, ...]
    assumed: Mapping[str, int]
    scored: tuple[Scored, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; ``scored`` holds every quantity of every row, from which the scores follow."""
        return {
            "path": self.path,
            "rows": self.rows,
            "answered": self.answered,
            "overall": [asdict(s) for s in self.overall],
            "groups": [asdict(s) for s in self.groups],
            "worst": [_plain(s) for s in self.worst],
            "unanswered": [asdict(u) for u in self.unanswered],
            "assumed": dict(self.assumed),
            "scored": [_plain(s) for s in self.scored],
        }

    def render(self) -> RenderableType:
        """The tables for a rich console of 100 columns."""
        return validation_table(self)

    def __str__(self) -> str:
        console = Console(width=WIDTH, file=io.StringIO(), force_terminal=False)
        console.print(self.render())
        out = console.file
        assert isinstance(out, io.StringIO)
        return out.getvalue()


def validate(points_csv: Path | str, models_dir: Path | str | None = None) -> Validation:
    """Score the predictors on a CSV of measured points.

    Parameters: points_csv: columns as published result tables have them (gpu, model, then any of n_gpus,
    precision, engine, input_len, output_len, concurrency, tp, ep, …, and of tokens_per_s, ttft_s, tpot_s,
    power_w, joules_per_output_token, mfu_pct; kind for training; docs/validate.md lists all); models_dir:
    configs of models the catalogue lacks, as ``org--name_config.json`` or ``org/name/config.json``.
    Raises InputError in one line where the file is malformed (with its line) or models_dir is no folder.
    """
    path = Path(points_csv)
    folder = None if models_dir is None else Path(models_dir)
    if folder is not None and not folder.is_dir():
        raise InputError(f"{folder}: no folder of model configs")
    rows = read_rows(path)
    scored: list[Scored] = []
    unanswered: dict[int, Unanswered] = {}
    groups = _grouped(rows, unanswered, folder)
    for key, members in groups.items():
        answer = _training if key.training else _serving
        scored += answer(key, members, unanswered)
    lines = {s.line for s in scored}
    read = sorted((row for members in groups.values() for row in members), key=lambda row: row.line)
    assumed = Counter(text for row in read if row.line in lines for text in row.assumed)
    return Validation(
        path=str(points_csv),
        rows=len(rows),
        answered=len(lines),
        overall=_scores(scored, whole=True),
        groups=_scores(scored, whole=False),
        worst=_worst(scored),
        unanswered=tuple(unanswered[line] for line in sorted(unanswered)),
        assumed=assumed,
        scored=tuple(sorted(scored, key=lambda s: s.line)),
    )


def _plain(s: Scored) -> dict[str, Any]:
    return s._asdict() | {"error": s.error, "covered": s.covered}


class _Key(NamedTuple):
    """Rows of one key share everything but lengths and concurrency: one vectorised prediction answers
    them."""

    training: str
    gpu: Gpu
    model: Model
    precision: str
    engine: str
    layout: Any
    prefill_gpus: float
    accepted_per_step: float
    media: str
    prefill_tp: int
    task: str


def _grouped(
    rows: Iterable[MeasuredRow], unanswered: dict[int, Unanswered], folder: Path | None
) -> dict[_Key, list[MeasuredRow]]:
    groups: dict[_Key, list[MeasuredRow]] = {}
    by_name: dict[str, Model | InputError] = {}
    for row in rows:
        of_interest = row.measured.keys() & TRAINING if row.training else row.measured.keys()
        reason = row.problem or ("" if of_interest else "nothing measured to compare with")
        if not reason:
            try:
                key = _key(row, by_name, folder)
                own = power_of_one(replace(row, precision=key.precision), key.gpu)
                groups.setdefault(key, []).append(own)
            except PerTokenError as error:
                reason = str(error)
        if reason:
            unanswered[row.line] = Unanswered(row.line, row.gpu, row.model, reason)
    return groups


def _key(row: MeasuredRow, by_name: dict[str, Model | InputError], folder: Path | None) -> _Key:
    if row.model not in by_name:
        try:
            by_name[row.model] = _model(row.model, folder)
        except InputError as error:
            by_name[row.model] = error
    found = by_name[row.model]
    if isinstance(found, InputError):
        raise found
    return _Key(
        row.training,
        gpu(row.gpu),
        found,
        row.precision or found.native_precision,
        row.engine,
        row.layout,
        row.prefill_gpus,
        row.accepted_per_step,
        row.media,
        row.prefill_tp,
        row.task if _stack_known(row) else "",
    )


def _stack_known(row: MeasuredRow) -> bool:
    """Whether the row is of a benchmark's task on the kind of stack whose time is known."""
    return row.task in task_names() and engine_family(row.engine) == ENGINE and not row.prefill_gpus


def _model(name: str, folder: Path | None) -> Model:
    """The catalogue's model, or the config of that name in the folder."""
    try:
        return model(name)
    except UnknownNameError as error:
        if folder is None:
            raise InputError(f"{error} Or --models with a folder that holds its config.json") from error
        wanted = {name.lower(), name.lower().split("/")[-1]}
        for path in sorted(folder.rglob("*config.json")):
            relative = path.relative_to(folder).as_posix().removesuffix("config.json").rstrip("/_")
            full = relative.replace("--", "/").lower()
            if full in wanted or full.split("/")[-1] in wanted:
                return model_from_config(path)
        raise


def _serving(key: _Key, rows: Sequence[MeasuredRow], unanswered: dict[int, Unanswered]) -> list[Scored]:
    try:
        return _predicted(key, rows)
    except PerTokenError as error:
        if len(rows) == 1:
            row = rows[0]
            if key.prefill_gpus and key.layout.dp > 1 and isinstance(error, CannotServeError):
                other = _unspread(row)
                changed = key._replace(layout=other.layout, prefill_gpus=other.prefill_gpus)
                return _serving(changed, [other], unanswered)
            unanswered[row.line] = Unanswered(row.line, row.gpu, row.model, str(error))
            return []
        # One row that cannot be served must not take its neighbours along.
        return [s for row in rows for s in _serving(key, [row], unanswered)]


def _unspread(row: MeasuredRow) -> MeasuredRow:
    """A disaggregated row whose decode GPUs were taken as attention data parallel, which does not fit: as
    replicas of up to 8 GPUs with tensor parallel, the other way to read GPU counts alone."""
    layout = Layout(min(8, row.layout.gpus))
    share = layout.gpus / row.layout.gpus
    return replace(
        row, layout=layout, prefill_gpus=row.prefill_gpus * share, concurrency=row.concurrency * share
    )


def _predicted(key: _Key, rows: Sequence[MeasuredRow]) -> list[Scored]:
    _check_prefill_worker(key)
    point = _point(key, rows)
    named = key.task != ""
    answer = (
        predict_task(key.model, key.gpu, point, key.task) if named else predict(key.model, key.gpu, point)
    )
    power = answer.gpu_power_w
    if key.media and not named:
        power = _media_power(key, point, power)
    gpus = key.layout.gpus + point.prefill_gpus
    each = _divided(answer.tokens_per_s, gpus)
    found = {
        "tokens_per_s": each,
        "ttft_s": answer.ttft_s,
        "tpot_s": answer.tpot_s,
        "power_w": power,
        "joules_per_output_token": _ratio(power, each),
    }
    labels = key.gpu.name, engine_family(key.engine), precision_name(key.precision), key.model.name
    return [
        _one(row, quantity, quantity, labels, _setting(row), interval, i)
        for quantity, interval in found.items()
        for i, row in enumerate(rows)
        if quantity in row.measured
    ]


def _check_prefill_worker(key: _Key) -> None:
    """A prefill worker named by its tensor parallel degree alone may hold more GPUs than that (attention data
    parallel); where the model does not fit them, how many is not known."""
    if not key.prefill_tp:
        return
    worker = Point(1, 1, 1, precision=key.precision, engine=key.engine, layout=Layout(key.prefill_tp))
    try:
        predict(key.model, key.gpu, worker)
    except CannotServeError:
        raise NoEvidenceError(
            f"{key.model.name} does not fit a prefill worker of {key.prefill_tp} × {key.gpu.name}: its GPUs beyond "
            "tp are not stated"
        ) from None


def _point(key: _Key, rows: Sequence[MeasuredRow]) -> Point:
    """All rows as one point of arrays; saturation is as many requests as fit in memory."""
    point = serving_points(rows)
    concurrency = np.asarray(point.concurrency)
    saturated = np.isinf(concurrency)
    if not saturated.any():
        return point
    one = replace(point, concurrency=np.where(saturated, 1.0, concurrency))
    most = predict(key.model, key.gpu, one).max_concurrency
    return replace(point, concurrency=np.where(saturated, most, concurrency))


def _media_power(key: _Key, point: Point, text: Interval) -> Interval:
    """Power where prompts carry images or video: the same interval around the media's own value."""
    compute, memory, link = utilisations(key.model, key.gpu, point)
    value = gpu_power_w(
        key.gpu, compute, memory, link, precision_name(key.precision),
        model=key.model, gpus=key.layout.gpus, media=key.media,
    )  # fmt: skip
    return Interval(value, value * text.low / text.value, value * text.high / text.value)


def _divided(interval: Interval, by: float) -> Interval:
    return Interval(interval.value / by, interval.low / by, interval.high / by)


def _ratio(a: Interval, b: Interval) -> Interval:
    """Interval of a / b where their errors are independent: log half-widths add in squares."""
    value = a.value / b.value
    width: Floats = np.sqrt(np.log(a.high / a.low) ** 2 + np.log(b.high / b.low) ** 2) / 2
    return Interval(value, value * np.exp(-width), value * np.exp(width))


def _training(key: _Key, rows: Sequence[MeasuredRow], unanswered: dict[int, Unanswered]) -> list[Scored]:
    scored: list[Scored] = []
    for row in rows:
        try:
            point = training_point(row)
            answer = predict_training(key.model, key.gpu, point)
        except PerTokenError as error:
            unanswered[row.line] = Unanswered(row.line, row.gpu, row.model, str(error))
            continue
        labels = key.gpu.name, row.training, training_precision(point.precision), key.model.name
        found = {
            "tokens_per_s": _divided(answer.tokens_per_s, row.gpus),
            "mfu_fraction": answer.mfu,
            "power_w": answer.gpu_power_w,
        }
        setting = f"{row.gpus:g} GPUs, {row.input_tokens:g} tokens, batch {row.global_batch:g}"
        for quantity, interval in found.items():
            if quantity in row.measured:
                scored.append(_one(row, quantity, TRAINING[quantity], labels, setting, interval, None))
    return scored


def _one(
    row: MeasuredRow,
    quantity: str,
    name: str,
    labels: tuple[str, str, str, str],
    setting: str,
    interval: Interval,
    index: int | None,
) -> Scored:
    value, low, high = (float(np.ravel(a)[index or 0]) for a in (interval.value, interval.low, interval.high))
    found_gpu, engine, precision, found_model = labels
    return Scored(
        row.line,
        name,
        found_gpu,
        engine,
        precision,
        found_model,
        setting,
        row.measured[quantity],
        value,
        low,
        high,
    )


def _setting(row: MeasuredRow) -> str:
    layout = row.layout
    parts = [f"{name}{degree}" for name, degree in asdict(layout).items() if degree > 1] or ["1 GPU"]
    if row.prefill_gpus:
        parts.append(f"+{row.prefill_gpus:g} prefill")
    at = "saturated" if math.isinf(row.concurrency) else f"c{row.concurrency:g}"
    return f"{row.input_tokens:.0f}/{row.output_tokens:.0f} {at} {' '.join(parts)}"


def _scores(scored: Sequence[Scored], *, whole: bool) -> tuple[Score, ...]:
    groups: dict[tuple[str, str, str, str], list[Scored]] = {}
    for s in scored:
        key = (s.quantity, "", "", "") if whole else (s.quantity, s.gpu, s.engine, s.precision)
        groups.setdefault(key, []).append(s)
    order = list(QUANTITIES)
    return tuple(
        _score(key, members)
        for key, members in sorted(groups.items(), key=lambda kv: (order.index(kv[0][0]), kv[0]))
    )


def _score(key: tuple[str, str, str, str], members: Sequence[Scored]) -> Score:
    errors = np.array([s.error for s in members])
    absolute = np.abs(errors)
    return Score(
        *key,
        rows=len(members),
        mean=float(absolute.mean()),
        median=float(np.median(absolute)),
        p90=float(np.quantile(absolute, 0.9)),
        bias=float(errors.mean()),
        coverage=float(np.mean([s.covered for s in members])),
    )


def _worst(scored: Sequence[Scored]) -> tuple[Scored, ...]:
    """The rows with the largest error of their first quantity, one entry per row."""
    order = list(QUANTITIES)
    first: dict[int, Scored] = {}
    for s in sorted(scored, key=lambda s: order.index(s.quantity)):
        first.setdefault(s.line, s)
    return tuple(sorted(first.values(), key=lambda s: (-abs(s.error), s.line))[:WORST])
