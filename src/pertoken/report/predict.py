"""`predict`: one operating point, or the front of throughput against interactivity, with cost and energy along it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from pertoken import catalog
from pertoken.catalog import Gpu, Model
from pertoken.catalog.prices import prices
from pertoken.errors import CannotServeError, InputError, NoEvidenceError
from pertoken.perf import Interval, Layout, Point, Prediction, predict, search
from pertoken.perf.kernels import predict_kernels
from pertoken.perf.measured import Predictor, load_points, predict_measured
from pertoken.perf.power import server_power_w
from pertoken.perf.search import MAX_TP, layouts
from pertoken.perf.tasks import predict_task
from pertoken.report._compare_table import table, usd
from pertoken.units import MILLISECONDS_PER_SECOND, SECONDS_PER_HOUR, usd_per_mtok


@dataclass(frozen=True)
class Answer:
    """What `pertoken predict` says: a value with its 80 % interval per quantity."""

    model: str
    gpu: str
    point: Point
    prediction: Prediction
    server_power_w: float
    joule_per_token: dict[str, dict[str, float]]
    """Boundary (GPU board, server plug) to input and output."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        p = self.prediction
        return {
            "model": self.model,
            "gpu": self.gpu,
            "gpus": self.point.layout.gpus,
            "layout": asdict(self.point.layout),
            "precision": self.point.precision,
            "engine": self.point.engine,
            "input_tokens": float(self.point.input_tokens),
            "cached_input_tokens": float(self.point.cached_input_tokens),
            "output_tokens": float(self.point.output_tokens),
            "concurrency": float(self.point.concurrency),
            "tokens_per_s": _ends(p.tokens_per_s),
            "tokens_per_s_per_gpu": _ends(p.tokens_per_s, 1 / self.point.layout.gpus),
            "ttft_s": _ends(p.ttft_s),
            "tpot_s": _ends(p.tpot_s),
            "gpu_power_w": _ends(p.gpu_power_w),
            "server_power_w_per_gpu": self.server_power_w,
            "joule_per_token": self.joule_per_token,
            "prefill_fraction": float(p.prefill_fraction),
            "max_concurrency": float(p.max_concurrency),
            "basis": p.basis,
            "source": p.source,
        }

    def __rich__(self) -> RenderableType:
        p, layout = self.prediction, self.point.layout
        made = table(
            f"{self.model} on {layout.gpus}× {self.gpu}, {self.point.precision}, {_named(layout)}, {self.point.engine}",
            "",
            "expected",
            "80 % interval",
            "unit",
        )
        per_ms = float(MILLISECONDS_PER_SECOND)
        for name, interval, factor, unit in (
            ("output tokens per second", p.tokens_per_s, 1.0, "tokens/s"),
            ("  per GPU", p.tokens_per_s, 1 / layout.gpus, "tokens/s"),
            ("time to first token", p.ttft_s, 1.0, "s"),
            ("time per output token", p.tpot_s, per_ms, "ms"),
            ("power of one GPU, at the board", p.gpu_power_w, 1.0, "W"),
        ):
            ends = _ends(interval, factor)
            made.add_row(name, usd(ends["value"]), f"{usd(ends['low'])}–{usd(ends['high'])}", unit)
        made.add_row("its share of the server, at the plug", usd(self.server_power_w), "", "W")
        for boundary, of in self.joule_per_token.items():
            for kind, value in of.items():
                made.add_row(f"energy per {kind} token, {boundary}", usd(value), "", "J")
        made.add_row("requests that fit in memory", f"{float(p.max_concurrency):,.0f}", "", "")
        notes = [*self._waiting(), f"basis: {p.basis}; {p.source}"]
        return Group(made, *(Text(line, style="dim") for line in notes))

    def _waiting(self) -> list[str]:
        """Requests asked for that memory has no room for, as counted in the table."""
        asked, fit = float(self.point.concurrency), round(float(self.prediction.max_concurrency))
        if asked <= fit:
            return []
        waiting = f"{asked - fit:,.10g}"
        return [
            f"note: {asked:,.10g} requests at a time were asked, {fit:,} fit in memory: {waiting} "
            f"{'waits' if waiting == '1' else 'wait'}, which the time to first token holds"
        ]


@dataclass(frozen=True)
class CurvePoint:
    """One point of the front."""

    layout: Layout
    precision: str
    concurrency: float
    tokens_per_s_per_user: float
    tokens_per_s_per_gpu: float
    ttft_s: float
    usd_per_mtok_output: float
    joule_per_token_output: float


@dataclass(frozen=True)
class Curve:
    """The throughput–interactivity front of a model on up to so many GPUs of a kind.

    USD per M output tokens is the price of GPU hours at full use; joules are at the server's plug, prefill included.
    """

    model: str
    gpu: str
    usd_per_gpu_hour: float
    price_source: str
    points: tuple[CurvePoint, ...]
    tried: int
    basis: str
    source: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        made = table(
            f"{self.model} on {self.gpu}: most tokens per GPU for every speed a user sees",
            "layout", "requests", "tok/s/user", "tok/s/GPU", "TTFT s", "USD/M out", "J/out",
        )  # fmt: skip
        for p in self.points:
            made.add_row(
                f"{p.layout.gpus} GPU {p.precision} {_named(p.layout)}",
                f"{p.concurrency:,.0f}",
                usd(p.tokens_per_s_per_user),
                usd(p.tokens_per_s_per_gpu),
                usd(p.ttft_s),
                usd(p.usd_per_mtok_output),
                usd(p.joule_per_token_output),
            )
        notes = (
            f"{self.tried:,} points tried",
            f"{usd(self.usd_per_gpu_hour)} USD per GPU hour at full use: {self.price_source}",
            f"basis: {self.basis}; {self.source}",
        )
        return Group(made, *(Text(line, style="dim") for line in notes))

    def figure(self) -> Mapping[str, Any]:
        """The front as a Vega-Lite figure."""
        rows = [
            {
                "user": p.tokens_per_s_per_user,
                "gpu": p.tokens_per_s_per_gpu,
                "usd": p.usd_per_mtok_output,
                "joule": p.joule_per_token_output,
                "layout": f"{p.layout.gpus} GPU {_named(p.layout)}, {p.concurrency:,.0f} requests",
            }
            for p in self.points
        ]
        x = {
            "field": "user",
            "type": "quantitative",
            "title": "tokens/s one user sees",
            "scale": {"type": "log"},
        }

        def panel(field: str, title: str) -> dict[str, Any]:
            y = {"field": field, "type": "quantitative", "title": title, "scale": {"type": "log"}}
            return {
                "width": 480,
                "height": 180,
                "mark": {"type": "line", "point": True, "tooltip": True},
                "encoding": {
                    "x": x,
                    "y": y,
                    "tooltip": [{"field": "layout"}, {"field": field, "format": ".3~g"}],
                },
            }

        return {
            "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
            "data": {"values": rows},
            "vconcat": [
                panel("gpu", "tokens/s per GPU"),
                panel("usd", "USD per M output tokens"),
                panel("joule", "J per output token"),
            ],
        }

    def to_png(self, path: Path) -> None:
        """The figure as a picture."""
        from pertoken.report._page import write_png

        write_png(self.figure(), path)

    def to_html(self, path: Path) -> None:
        """One self-contained page with the figure and the points."""
        from pertoken.report._page import Block, Figure, Table, html_page, write_whole

        head = [
            "layout",
            "requests",
            "tokens/s/user",
            "tokens/s/GPU",
            "USD per M output",
            "J per output token",
        ]
        rows = [
            [
                f"{p.layout.gpus} GPU {p.precision} {_named(p.layout)}",
                f"{p.concurrency:,.0f}",
                *(usd(v) for v in (p.tokens_per_s_per_user, p.tokens_per_s_per_gpu)),
                *(usd(v) for v in (p.usd_per_mtok_output, p.joule_per_token_output)),
            ]
            for p in self.points
        ]
        blocks: list[Block] = [
            Figure("Throughput, cost and energy against what one user sees.", self.figure()),
            Table(f"{self.price_source}; {self.basis}: {self.source}", head, rows, (1, 2, 3, 4, 5)),
        ]
        write_whole(
            path, html_page(f"{self.model} on {self.gpu}", "The best points of all layouts tried.", blocks)
        )


def predict_point(
    model: str,
    gpu: str,
    *,
    gpus: int = 0,
    precision: str = "",
    engine: str = "vllm",
    input_tokens: float,
    output_tokens: float,
    concurrency: float,
    cached_input_tokens: float = 0.0,
    tp: int = 0,
    pp: int = 0,
    ep: int = 0,
    dp: int = 0,
    points: Path | None = None,
    predictor: str = "",
    task: str = "",
) -> Answer:
    """One operating point.

    Parameters: model: a catalogue name or the path of a config.json; gpus of the replica (0: from the degrees, else
    the fewest that fit); degrees that are 0 are chosen for the most tokens per second; points: CSV of measured ones;
    predictor: one of `PREDICTORS`, empty: the roofline, bent to the points where they say something; task: a
    benchmark's, whose serving stack and media count.
    Raises UnknownNameError, InputError, CannotServeError, NoEvidenceError, MissingExtraError.
    """
    chosen_model, chosen_gpu = resolve(model), catalog.gpu(gpu)
    base = Point(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        concurrency=concurrency,
        cached_input_tokens=cached_input_tokens,
        precision=precision or chosen_model.native_precision,
        engine=engine,
    )
    ask = _predictor(predictor, points, task)

    def answer(layout: Layout) -> Prediction:
        return ask(chosen_model, chosen_gpu, replace(base, layout=layout))

    layout, found = _best_layout(answer, _layouts(chosen_model, chosen_gpu, gpus, (tp, pp, ep, dp)))
    point = replace(base, layout=layout)
    power = float(found.gpu_power_w.value)
    plug = float(server_power_w(chosen_gpu, power))
    energy = {
        "at the board": _joules(power * layout.gpus, point, found),
        "at the plug": _joules(plug * layout.gpus, point, found),
    }
    return Answer(chosen_model.name, chosen_gpu.name, point, found, plug, energy)


def predict_curve(
    model: str,
    gpu: str,
    *,
    gpus: int = 0,
    precision: str = "",
    engine: str = "vllm",
    input_tokens: float,
    output_tokens: float,
    cached_input_tokens: float = 0.0,
    usd_per_gpu_hour: float | None = None,
) -> Curve:
    """The front of throughput against interactivity over all layouts up to `gpus` (0: one node) and all batch sizes.

    Raises UnknownNameError, InputError, CannotServeError.
    """
    chosen_model, chosen_gpu = resolve(model), catalog.gpu(gpu)
    price, source = (
        (usd_per_gpu_hour, "given") if usd_per_gpu_hour is not None else _typical_price(chosen_gpu)
    )
    if not 0 <= price < math.inf:
        raise InputError(f"--usd-per-gpu-hour {price:g} must be a number of 0 or more")
    workload = Point(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        concurrency=1,
        cached_input_tokens=cached_input_tokens,
        precision=precision or chosen_model.native_precision,
        engine=engine,
    )
    found = search(chosen_model, chosen_gpu, workload, max_gpus=gpus or min(chosen_gpu.gpus_per_node, 8))
    points = []
    for c in found.front:
        at = replace(workload, layout=c.layout, precision=c.precision, concurrency=c.concurrency)
        power = float(predict(chosen_model, chosen_gpu, at).gpu_power_w.value)
        points.append(
            CurvePoint(
                c.layout,
                c.precision,
                c.concurrency,
                c.tokens_per_s_per_user,
                c.tokens_per_s_per_gpu,
                c.ttft_s,
                usd_per_mtok(price, c.tokens_per_s_per_gpu * SECONDS_PER_HOUR),
                float(server_power_w(chosen_gpu, power)) / c.tokens_per_s_per_gpu,
            )
        )
    points.sort(key=lambda p: -p.tokens_per_s_per_gpu)
    return Curve(
        chosen_model.name,
        chosen_gpu.name,
        price,
        source,
        tuple(points),
        found.tried,
        found.basis,
        found.source,
    )


PREDICTORS = ("roofline", "measured", "kernels")
"""What can answer `predict`: fitted physics, a user's own points alone, tables of measured kernels."""


def _predictor(name: str, points: Path | None, task: str) -> Predictor:
    """The function that answers; points bend whichever it is."""
    if name and name not in PREDICTORS:
        raise InputError(f"unknown predictor {name!r}: one of {', '.join(PREDICTORS)}")
    if name == "measured" and points is None:
        raise InputError("--predictor measured needs --points, a CSV of your own measurements")
    if task and name not in ("", "roofline"):
        raise InputError(f"--task goes with the roofline: --predictor {name} knows nothing of tasks")

    def of_task(model: Model, gpu: Gpu, point: Point) -> Prediction:
        return predict_task(model, gpu, point, task)

    base: Predictor = of_task if task else predict_kernels if name == "kernels" else predict
    if points is None:
        return base
    measured = load_points(points)

    def bent(model: Model, gpu: Gpu, point: Point) -> Prediction:
        near = predict_measured(measured, model, gpu, point, base)
        if near is None and name == "measured":
            raise NoEvidenceError(
                f"{points} holds no point of {model.name} on {gpu.name} with {point.precision}, {point.engine} and "
                "the layout asked: leave --predictor out for the roofline"
            )
        return near if near is not None else base(model, gpu, point)

    return bent


def resolve(model: str) -> Model:
    """The catalogue's model of that name, or the one described by a config.json at that path."""
    path = Path(model)
    if path.suffix == ".json" or path.is_dir():
        return catalog.model_from_config(path)
    return catalog.model(model)


def _typical_price(gpu: Gpu) -> tuple[float, str]:
    rows = [r for r in prices(gpu=gpu.name, term="on_demand") if r.usd_per_gpu_hour is not None]
    newest: dict[str, tuple[Any, float]] = {}
    for row in rows:
        if row.provider not in newest or row.checked > newest[row.provider][0]:
            newest[row.provider] = (row.checked, float(row.usd_per_gpu_hour or 0.0))
    if not newest:
        raise InputError(f"the catalogue has no price to rent {gpu.name}: give --usd-per-gpu-hour")
    price = median(value for _, value in newest.values())
    return price, f"median of {len(newest)} providers' on-demand prices in the catalogue"


def _layouts(model: Model, gpu: Gpu, gpus: int, degrees: tuple[int, int, int, int]) -> list[list[Layout]]:
    """Layouts to choose from, in groups: the first group in which one fits is answered."""
    tp, pp, ep, dp = degrees
    if min(gpus, *degrees) < 0:
        raise InputError("--gpus, --tp, --pp, --ep and --dp must not be negative")
    if tp > MAX_TP or tp & (tp - 1):
        raise InputError(f"--tp {tp}: engines split heads over 1, 2, 4, 8 or {MAX_TP} GPUs")
    limit = gpus or max(tp, 1) * max(pp, 1) * max(dp, 1)
    if not gpus and not any(degrees):
        limit = gpu.gpus_per_node
    known = [
        replace(found, ep=ep) if ep else found
        for found in (*layouts(model, limit), Layout(tp or 1, pp or 1, ep or 1, dp or 1))
        if (not tp or found.tp == tp) and (not pp or found.pp == pp) and (not dp or found.dp == dp)
    ]
    if gpus:
        groups = [[found for found in known if found.gpus == gpus]]
        if not groups[0]:
            given = ", ".join(f"--{n} {d}" for n, d in (("tp", tp), ("pp", pp), ("dp", dp)) if d)
            raise InputError(
                f"no layout of tp × pp × dp makes {gpus} GPUs{f' with {given}' if given else ''}: degrees that are "
                "not given are powers of two"
            )
        return groups
    sizes = sorted({found.gpus for found in known})
    return [[found for found in known if found.gpus == size] for size in sizes]


def _best_layout(answer: Any, groups: Sequence[Sequence[Layout]]) -> tuple[Layout, Prediction]:
    refused: CannotServeError | NoEvidenceError | None = None
    for group in groups:
        best: tuple[Layout, Prediction] | None = None
        for layout in group:
            try:
                found = answer(layout)
            except (CannotServeError, NoEvidenceError) as error:
                refused = error
                continue
            if best is None or float(found.tokens_per_s.value) > float(best[1].tokens_per_s.value):
                best = (layout, found)
        if best is not None:
            return best
    assert refused is not None
    raise refused


def _joules(power_w: float, point: Point, found: Prediction) -> dict[str, float]:
    """J per input token delivered, if any, and per output token: power split by the GPU time of prefill and
    decode."""
    output_per_s = float(found.tokens_per_s.value)
    input_per_s = output_per_s / float(point.output_tokens) * float(point.input_tokens)
    if not input_per_s:
        return {"output": power_w / output_per_s}
    prefill = float(found.prefill_fraction)
    return {"input": power_w * prefill / input_per_s, "output": power_w * (1 - prefill) / output_per_s}


def _ends(interval: Interval, factor: float = 1.0) -> dict[str, float]:
    ends = (interval.value, interval.low, interval.high)
    value, low, high = (float(np.asarray(v)) * factor for v in ends)
    return {"value": value, "low": low, "high": high}


def _named(layout: Layout) -> str:
    degrees = [f"{name}{n}" for name, n in asdict(layout).items() if n > 1]
    return " ".join(degrees) or "tp1"
