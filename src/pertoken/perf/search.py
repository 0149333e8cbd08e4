"""All layouts and batch sizes of one model on one GPU type, and the best operating points among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pertoken.catalog.gpus import Gpu
from pertoken.catalog.models import Model
from pertoken.errors import CannotServeError, InputError
from pertoken.perf import _coefficients, _steps, _work
from pertoken.perf._steps import Loop, Requests
from pertoken.perf.point import Floats, Layout, Point
from pertoken.perf.roofline import checked_point, requests_of

BATCHES = np.unique(np.round(2.0 ** np.arange(0.0, 12.01, 0.25)))
"""Concurrencies tried per replica: 1 to 4096, four per octave."""


@dataclass(frozen=True)
class Candidate:
    """One operating point found: the layout, the concurrency of the replica and what it does there."""

    layout: Layout
    precision: str
    concurrency: float
    tokens_per_s_per_gpu: float
    tokens_per_s_per_user: float
    """Output tokens per second one user sees while decoding: 1 ÷ TPOT."""
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True)
class Search:
    """The answer: `best` first by tokens/s per GPU within the SLO; `front` is the Pareto front of throughput
    against interactivity over everything tried; `tried` and `fitting` count points; `refused` says what
    could not run and why; basis and source as in a Prediction."""

    best: tuple[Candidate, ...]
    front: tuple[Candidate, ...]
    tried: int
    fitting: int
    refused: tuple[str, ...]
    basis: str
    source: str


def search(
    model: Model,
    gpu: Gpu,
    workload: Point,
    *,
    slo_ttft_s: float = float("inf"),
    slo_tpot_s: float = float("inf"),
    max_gpus: int = 8,
    precisions: Sequence[str] = (),
    engine: str = "",
    count: int = 10,
) -> Search:
    """The operating points with the most tokens/s per GPU within the SLO, over all layouts and batch sizes.

    Parameters: model; gpu; workload, of which input, cached and output tokens (scalars), engine, KV
    precision and speculative decoding count, its concurrency and layout do not; SLO on mean TTFT and TPOT
    [s]; max_gpus per replica; precisions (empty: the workload's); count: how many of the best.
    Raises CannotServeError where no layout fits, or none meets the SLO (with the nearest one found).
    """
    if not slo_ttft_s > 0 or not slo_tpot_s > 0 or max_gpus < 1:
        raise InputError("slo_ttft_s and slo_tpot_s must be positive, max_gpus at least 1")
    workload = replace(workload, engine=engine or workload.engine)
    grids, refused = _grids(model, gpu, workload, precisions or (workload.precision,), max_gpus)
    if not grids:
        raise CannotServeError(_shortest(refused))
    labels, found = _joined(grids)
    rate, ttft, tpot = found
    fits = np.isfinite(rate)
    if not fits.any():
        raise CannotServeError(
            f"no layout of up to {max_gpus} × {gpu.name} holds one request of {model.name}"
        )
    within = fits & (ttft <= slo_ttft_s) & (tpot <= slo_tpot_s)
    if not within.any():
        raise CannotServeError(_nearest(model, gpu, labels, found, slo_ttft_s, slo_tpot_s))
    order = np.flatnonzero(within)
    order = order[np.argsort(-rate[order], kind="stable")][:count]
    return Search(
        best=tuple(_candidate(labels, found, int(i)) for i in order),
        front=tuple(_candidate(labels, found, i) for i in _front(rate, tpot, fits)),
        tried=rate.size,
        fitting=int(fits.sum()),
        refused=tuple(dict.fromkeys(refused)),
        basis=grids[0].basis,
        source=grids[0].source,
    )


def layouts(model: Model, max_gpus: int) -> list[Layout]:
    """All layouts of powers of two up to that many GPUs: tensor, pipeline, and for MoE attention data
    parallel with experts spread over all its GPUs."""
    powers = [2**i for i in range(max(int(max_gpus), 1).bit_length()) if 2**i <= max_gpus]
    return [
        Layout(tp, pp, tp * dp if dp > 1 else 1, dp)
        for tp in powers
        for pp in powers
        for dp in (powers if model.moe_layers else [1])
        if tp * pp * dp <= max_gpus and pp <= model.layers
    ]


@dataclass(frozen=True)
class _Grid:
    layouts: list[Layout]
    precision: str
    loop: Loop
    basis: str
    source: str


def _grids(
    model: Model, gpu: Gpu, workload: Point, precisions: Sequence[str], max_gpus: int
) -> tuple[list[_Grid], list[str]]:
    """Per precision the closed loop over (layout, batch), and why some could not run."""
    grids: list[_Grid] = []
    refused: list[str] = []
    n_in, cached, out, _ = checked_point(model, replace(workload, concurrency=1.0))
    requests = requests_of(workload, float(n_in), float(cached), float(out))
    for precision in precisions:
        works, kept = [], []
        try:
            fmt = _work.formats(gpu, precision, workload.kv_precision)
        except CannotServeError as error:
            refused.append(str(error))
            continue
        for layout in layouts(model, max_gpus):
            try:
                works.append(_work.work(model, gpu, layout, fmt))
                kept.append(layout)
            except CannotServeError as error:
                refused.append(str(error))
        if works:
            found = _coefficients.lookup(model, gpu, workload.engine, precision)
            stacked = _work.shaped(_work.stack(works), (-1, 1))
            loop = _evaluate(stacked, found.coefficients, requests)
            source = "; ".join(part for part in (found.source, fmt.note) if part)
            grids.append(_Grid(kept, _work.precision_name(precision), loop, found.basis, source))
    return grids, refused


def _evaluate(stacked: _work.Work, c: _coefficients.Coefficients, requests: Requests) -> Loop:
    return _steps.closed_loop(stacked, c, requests, BATCHES[None, :])


Labels = list[tuple[Layout, str, float]]
Figures = tuple[Floats, Floats, Floats]


def _joined(grids: list[_Grid]) -> tuple[Labels, Figures]:
    """All grids as one list of points: labels, and tokens/s per GPU (−inf where memory is short), TTFT,
    TPOT."""
    labels: Labels = []
    columns: list[list[Floats]] = [[], [], []]
    for grid in grids:
        shape = (len(grid.layouts), BATCHES.size)
        gpus = np.array([layout.gpus for layout in grid.layouts], dtype=np.float64)[:, None]
        rate = np.broadcast_to(grid.loop.tokens_per_s, shape) / gpus
        room = np.broadcast_to(grid.loop.max_concurrency, shape) >= BATCHES
        for column, values in zip(
            columns, (np.where(room, rate, -np.inf), grid.loop.ttft_s, grid.loop.tpot_s), strict=True
        ):
            column.append(np.broadcast_to(values, shape).ravel())
        labels += [(layout, grid.precision, float(b)) for layout in grid.layouts for b in BATCHES]
    rate, ttft, tpot = (np.concatenate(column) for column in columns)
    return labels, (rate, ttft, tpot)


def _front(rate: Floats, tpot: Floats, fits: npt.NDArray[np.bool_]) -> list[int]:
    """Points no other beats in both throughput per GPU and interactivity, fastest user first."""
    order = np.lexsort((-rate, tpot))
    order = order[fits[order]]
    highest = np.maximum.accumulate(rate[order])
    better = np.concatenate([[True], highest[1:] > highest[:-1]])
    return [int(i) for i in order[better]]


def _candidate(labels: Labels, found: Figures, i: int) -> Candidate:
    layout, precision, concurrency = labels[i]
    rate, ttft, tpot = (float(column[i]) for column in found)
    return Candidate(layout, precision, concurrency, rate, 1 / tpot, ttft, tpot)


def _nearest(
    model: Model, gpu: Gpu, labels: Labels, found: Figures, slo_ttft_s: float, slo_tpot_s: float
) -> str:
    """What to say where nothing meets the SLO: the point that misses it by the smallest factor."""
    rate, ttft, tpot = found
    miss = np.where(np.isfinite(rate), np.maximum(ttft / slo_ttft_s, tpot / slo_tpot_s), np.inf)
    best = _candidate(labels, found, int(np.argmin(miss)))
    return (
        f"no layout of {model.name} on {gpu.name} meets TTFT ≤ {slo_ttft_s:g} s and TPOT ≤ {slo_tpot_s:g} s; "
        f"the nearest has TTFT {best.ttft_s:.3g} s and TPOT {best.tpot_s:.3g} s ({best.layout.gpus} GPUs, tp "
        f"{best.layout.tp}, dp {best.layout.dp}, pp {best.layout.pp}, concurrency {best.concurrency:g})"
    )


def _shortest(refused: list[str]) -> str:
    """The refusal of the largest layout, which is the last one tried."""
    return refused[-1] if refused else "nothing to search"
