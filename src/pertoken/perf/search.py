"""All layouts and batch sizes of one model on one GPU type, and the best operating points among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pertoken.catalog.gpus import Gpu
from pertoken.catalog.models import Model
from pertoken.errors import CannotServeError, InputError
from pertoken.perf import _coefficients, _steps, _work
from pertoken.perf._points import MAX_TP as MAX_TP
from pertoken.perf._steps import Requests
from pertoken.perf.point import Floats, Layout, Point
from pertoken.perf.roofline import BLOCK, checked_point, requests_of

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
    batches: Floats | None = None,
) -> Search:
    """The operating points with the most tokens/s per GPU within the SLO, over all layouts and batch sizes.

    Parameters: model; gpu; workload, of which input, cached and output tokens (scalars), engine, KV
    precision and speculative decoding count, its concurrency and layout do not; SLO on mean TTFT and TPOT
    [s]; max_gpus per replica; precisions (empty: the workload's); count: how many of the best; batches:
    concurrencies of the replica to try (`BATCHES`).
    Raises CannotServeError where no layout fits, or none meets the SLO (with the nearest one found).
    """
    if not slo_ttft_s > 0 or not slo_tpot_s > 0 or max_gpus < 1:
        raise InputError("slo_ttft_s and slo_tpot_s must be positive, max_gpus at least 1")
    workload = replace(workload, engine=engine or workload.engine)
    batches = BATCHES if batches is None else np.asarray(batches, dtype=np.float64)
    grids, refused = _grids(model, gpu, workload, precisions or (workload.precision,), max_gpus, batches)
    if not grids:
        raise CannotServeError(refused[-1] if refused else "no precision to search")
    found = _joined(grids, batches)
    rate, ttft, tpot = found.tokens_per_s_per_gpu, found.ttft_s, found.tpot_s
    fits = np.isfinite(rate)
    if not fits.any():
        raise CannotServeError(
            f"no layout of up to {max_gpus} × {gpu.name} holds one request of {model.name}"
        )
    within = fits & (ttft <= slo_ttft_s) & (tpot <= slo_tpot_s)
    if not within.any():
        raise CannotServeError(_nearest(model, gpu, found, slo_ttft_s, slo_tpot_s))
    order = np.flatnonzero(within)
    order = order[np.argsort(-rate[order], kind="stable")][:count]
    return Search(
        best=tuple(found.candidate(int(i)) for i in order),
        front=tuple(found.candidate(i) for i in _front(rate, tpot, fits)),
        tried=rate.size,
        fitting=int(fits.sum()),
        refused=tuple(dict.fromkeys(refused)),
        basis=grids[0].basis,
        source=grids[0].source,
    )


def layouts(model: Model, max_gpus: int) -> list[Layout]:
    """All layouts of powers of two up to that many GPUs: tensor (up to `MAX_TP`), pipeline, and for MoE attention
    data parallel with experts spread over all its GPUs."""
    powers = [2**i for i in range(max(int(max_gpus), 1).bit_length()) if 2**i <= max_gpus]
    return [
        Layout(tp, pp, tp * dp if dp > 1 else 1, dp)
        for tp in powers
        if tp <= MAX_TP
        for pp in powers
        for dp in (powers if model.moe_layers else [1])
        if tp * pp * dp <= max_gpus and pp <= model.layers
    ]


class _Outcome(NamedTuple):
    """Of every layout and batch, arrays of shape (layouts, batches)."""

    tokens_per_s: Floats
    ttft_s: Floats
    tpot_s: Floats
    max_concurrency: Floats


@dataclass(frozen=True)
class _Grid:
    layouts: list[Layout]
    precision: str
    loop: _Outcome
    basis: str
    source: str


def _grids(
    model: Model, gpu: Gpu, workload: Point, precisions: Sequence[str], max_gpus: int, batches: Floats
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
            loop = _loops(works, found.coefficients, requests, batches)
            source = "; ".join(part for part in (found.source, fmt.note) if part)
            grids.append(_Grid(kept, _work.precision_name(precision), loop, found.basis, source))
    return grids, refused


def _loops(
    works: list[_work.Work], c: _coefficients.Coefficients, requests: Requests, batches: Floats
) -> _Outcome:
    """The closed loop of every layout at every batch, a few layouts at a time to stay in the processor's cache."""
    rows = max(1, BLOCK // batches.size)
    parts: list[tuple[Floats, ...]] = []
    for i in range(0, len(works), rows):
        some = _work.shaped(_work.stack(works[i : i + rows]), (-1, 1))
        loop = _steps.closed_loop(some, c, requests, batches[None, :])
        shape = (len(works[i : i + rows]), batches.size)
        wanted = (loop.tokens_per_s, loop.ttft_s, loop.tpot_s, loop.max_concurrency)
        parts.append(tuple(np.broadcast_to(a, shape) for a in wanted))
    return _Outcome(*(np.concatenate([p[k] for p in parts]) for k in range(4)))


@dataclass(frozen=True)
class _Found:
    """Every point tried: rows (layout, precision) × batches, flat; tokens/s is −inf where memory is short."""

    rows: list[tuple[Layout, str]]
    batches: Floats
    tokens_per_s_per_gpu: Floats
    ttft_s: Floats
    tpot_s: Floats

    def candidate(self, i: int) -> Candidate:
        layout, precision = self.rows[i // self.batches.size]
        rate, ttft_s, tpot_s = (
            float(column[i]) for column in (self.tokens_per_s_per_gpu, self.ttft_s, self.tpot_s)
        )
        concurrency = float(self.batches[i % self.batches.size])
        return Candidate(layout, precision, concurrency, rate, 1 / tpot_s, ttft_s, tpot_s)


def _joined(grids: list[_Grid], batches: Floats) -> _Found:
    """All grids as one list of points."""
    columns: list[list[Floats]] = [[], [], []]
    for grid in grids:
        gpus = np.array([layout.gpus for layout in grid.layouts], dtype=np.float64)[:, None]
        room = grid.loop.max_concurrency >= batches
        rate = np.where(room, grid.loop.tokens_per_s / gpus, -np.inf)
        for column, values in zip(columns, (rate, grid.loop.ttft_s, grid.loop.tpot_s), strict=True):
            column.append(values.ravel())
    rows = [(layout, grid.precision) for grid in grids for layout in grid.layouts]
    return _Found(rows, batches, *(np.concatenate(column) for column in columns))


def _front(rate: Floats, tpot: Floats, fits: npt.NDArray[np.bool_]) -> list[int]:
    """Points no other beats in both throughput per GPU and interactivity, fastest user first."""
    order = np.lexsort((-rate, tpot))
    order = order[fits[order]]
    highest = np.maximum.accumulate(rate[order])
    better = np.concatenate([[True], highest[1:] > highest[:-1]])
    return [int(i) for i in order[better]]


def _nearest(model: Model, gpu: Gpu, found: _Found, slo_ttft_s: float, slo_tpot_s: float) -> str:
    """What to say where nothing meets the SLO: the point that misses it by the smallest factor."""
    miss = np.maximum(found.ttft_s / slo_ttft_s, found.tpot_s / slo_tpot_s)
    miss = np.where(np.isfinite(found.tokens_per_s_per_gpu), miss, np.inf)
    best = found.candidate(int(np.argmin(miss)))
    return (
        f"no layout of {model.name} on {gpu.name} meets TTFT ≤ {slo_ttft_s:g} s and TPOT ≤ {slo_tpot_s:g} s; "
        f"the nearest has TTFT {best.ttft_s:.3g} s and TPOT {best.tpot_s:.3g} s ({best.layout.gpus} GPUs, tp "
        f"{best.layout.tp}, dp {best.layout.dp}, pp {best.layout.pp}, concurrency {best.concurrency:g})"
    )
