"""A simulation as a table, as plain values and as figures: latency distribution, load, batch and queue over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.text import Text

from pertoken.report._compare_table import table
from pertoken.report._page import PALETTE, PHASE_COLOURS, Figure
from pertoken.units import HOURS_PER_DAY, MILLISECONDS_PER_SECOND, SECONDS_PER_HOUR

if TYPE_CHECKING:  # numba takes half a second to import
    from pertoken.perf.simulate import Found, Simulation

Spec = dict[str, Any]
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
_HOURS = {"field": "hour", "type": "quantitative", "title": "hours from the start", "scale": {"nice": False}}
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
_LATENCIES = {"ttft": "time to first token", "tpot": "per further token", "e2e": "end to end"}
_COUNTS = (
    "arrivals", "requests", "requests_in_slo", "rejected", "input_tokens", "cached_input_tokens", "output_tokens",
    "output_tokens_in_slo", "recomputed_tokens", "preemptions",
)  # fmt: skip
_MOST_POINTS = 400
_BUSY_PHASES = ("input", "output", "waste")


def simulate_report(
    result: Simulation, found: Found | None = None
) -> tuple[RenderableType, dict[str, Any], list[Figure]]:
    """What to print, what ``--json`` writes, and the figures of a page.

    found: what `find_replicas` answered, where it was asked; its simulation is `result`.
    """
    return _render(result, found), _plain(result, found), _figures(result)


# --- the table ----------------------------------------------------------------------------------------------


def _render(result: Simulation, found: Found | None) -> RenderableType:
    parts: list[RenderableType] = []
    if found:
        parts += [Text(_answer(result, found), style="bold"), Text()]
    parts += [_latency_table(result), Text(), _work_table(result), Text(), _group_table(result)]
    notes = _notes(result)
    if notes:
        parts += [Text(), *(Text(note, style="dim") for note in notes)]
    return Group(*parts)


def _answer(result: Simulation, found: Found) -> str:
    wanted = result.slo.met_fraction
    tried = ", ".join(f"{n}: {_share(share) if share >= wanted else 'no'}" for n, share in found.tried)
    return f"{found.replicas} replicas meet {result.slo.text()} for {wanted:.4g} of requests (tried {tried})"


def _latency_table(result: Simulation) -> RenderableType:
    made = table("Latency, ms", "", "mean", *_QUANTILES, "bound", "kept by")
    for name, said in _LATENCIES.items():
        quantiles = result.latency_s(name, list(_QUANTILES.values()))
        bound = getattr(result.slo, f"{name}_s")
        limited = math.isfinite(bound)
        made.add_row(
            said, _ms(result.mean_s(name)), *(_ms(float(q)) for q in quantiles),
            _ms(bound) if limited else "–", _share(result.met_fraction(name)) if limited else "–",
        )  # fmt: skip
    return made


def _work_table(result: Simulation) -> RenderableType:
    hours = result.end_s / SECONDS_PER_HOUR
    span = f"{hours / HOURS_PER_DAY:,.1f} days" if hours > 2 * HOURS_PER_DAY else f"{hours:,.2f} hours"
    made = table(f"Work in {span}", "", "all", "in SLO", "share")
    rows = (("requests", "requests_in_slo"), ("output_tokens", "output_tokens_in_slo"))
    for every, kept in rows:
        whole, part = result.count(every), result.count(kept)
        share = _share(part / whole) if whole else "–"
        made.add_row(every.replace("_", " "), f"{whole:,}", f"{part:,}", share)
    made.add_row("output tokens/s", _number(result.tokens_per_s), _number(result.goodput_tokens_per_s), "")
    made.add_row("input tokens computed", f"{result.count('input_tokens'):,}", "", "")
    cached = result.count("cached_input_tokens")
    made.add_row("input tokens from the cache", f"{cached:,}", "", _share(result.cache_hit_fraction))
    for name in ("rejected", "preemptions", "recomputed_tokens"):
        if result.count(name):
            made.add_row(name.replace("_", " "), f"{result.count(name):,}", "", "")
    made.add_row("GPU energy, kWh", f"{result.gpu_energy_kwh:,.3f}", "", "")
    return made


def _group_table(result: Simulation) -> RenderableType:
    made = table("Replicas, means over the run", "pool", "replicas", "GPU-hours", "busy", "batch", "queue")
    for g, pool in enumerate(result.pools):
        row = _group(result, g)
        made.add_row(
            pool[:40], f"{row['replicas']:,.2f}", f"{row['gpu_hours']:,.2f}", _share(row["utilisation"]),
            f"{row['batch']:,.1f}", f"{row['queue']:,.2f}",
        )  # fmt: skip
    return made


def _notes(result: Simulation) -> list[str]:
    bases = ", ".join(dict.fromkeys(t.basis for t in result.times))
    notes = [f"Step times: {bases}. Percentiles to 0.4 %. Energy at the GPU boards, idle included."]
    notes.append("Busy: a step was running, however small its batch.")
    if result.count("rejected"):
        notes.append("Rejected: the queue was full, or the request never fits the KV cache; not in SLO.")
    return notes


def _ms(seconds: float) -> str:
    return "–" if math.isnan(seconds) else f"{seconds * MILLISECONDS_PER_SECOND:,.1f}"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.1f}"


def _share(fraction: float) -> str:
    return "–" if math.isnan(fraction) else f"{fraction:.2%}"


# --- plain values ----------------------------------------------------------------------------------------------


def _plain(result: Simulation, found: Found | None) -> dict[str, Any]:
    """Plain values, for JSON; what is undefined (a mean of nothing) is None."""
    latency = {
        name: {
            "mean_s": _finite(result.mean_s(name)),
            **{
                f"{q}_s": _finite(float(v))
                for q, v in zip(_QUANTILES, result.latency_s(name, list(_QUANTILES.values())), strict=True)
            },
            "bound_s": _finite(getattr(result.slo, f"{name}_s")),
            "met_fraction": _finite(result.met_fraction(name)),
        }
        for name in _LATENCIES
    }
    plain: dict[str, Any] = {
        "duration_s": result.end_s,
        "slo_met_fraction_wanted": result.slo.met_fraction,
        "slo_attainment": _finite(result.attainment),
        "latency": latency,
        "counts": {name: result.count(name) for name in _COUNTS},
        "tokens_per_s": _finite(result.tokens_per_s),
        "goodput_tokens_per_s": _finite(result.goodput_tokens_per_s),
        "utilisation": _finite(result.utilisation),
        "cache_hit_fraction": _finite(result.cache_hit_fraction),
        "gpu_hours": result.gpu_hours,
        "gpu_energy_kwh": result.gpu_energy_kwh,
        "pools": [{"pool": pool, **_group(result, g)} for g, pool in enumerate(result.pools)],
        "basis": list(dict.fromkeys(t.basis for t in result.times)),
    }
    if found:
        plain["replicas"] = found.replicas
        plain["tried"] = [{"replicas": n, "slo_attainment_at_most": share} for n, share in found.tried]
    return plain


def _group(result: Simulation, g: int) -> dict[str, float]:
    """One group's means over the run."""
    series, end_s = result.series(g), max(result.end_s, 1e-9)
    width_s = np.maximum(np.minimum(result.end_s - series.start_s, result.bin_s), 0.0)
    held_s = float(series.replicas @ width_s)
    busy_s = float((series.replicas * series.busy_fraction) @ width_s)
    return {
        "replicas": held_s / end_s,
        "gpu_hours": held_s * result.times[g].gpus / SECONDS_PER_HOUR,
        "utilisation": busy_s / held_s if held_s else 0.0,
        "batch": float(series.batch @ width_s) / end_s,
        "queue": float(series.queue @ width_s) / end_s,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- figures ------------------------------------------------------------------------------------------------------


def _figures(result: Simulation) -> list[Figure]:
    return [
        Figure("Share of requests at or below a latency, on a log scale; rules are the SLO's bounds.", _cdf(result)),
        Figure(
            "Requests arriving per second, in the engines and waiting, and replicas held, over time.", _load(result)
        ),
        Figure("Replica time by what it was spent on, over time.", _phases(result)),
    ]  # fmt: skip


def _cdf(result: Simulation) -> Spec:
    rows: list[dict[str, Any]] = []
    bounds: list[dict[str, Any]] = []
    for name, said in _LATENCIES.items():
        seconds, share = result.cdf(name)
        keep = np.unique(np.linspace(0, max(len(seconds) - 1, 0), _MOST_POINTS).astype(int))[: len(seconds)]
        rows += [{"latency": said, "s": float(seconds[i]), "share": float(share[i])} for i in keep]
        bound = getattr(result.slo, f"{name}_s")
        if math.isfinite(bound):
            bounds.append({"latency": said, "s": float(bound)})
    x = {"field": "s", "type": "quantitative", "scale": {"type": "log"}, "title": "seconds"}
    colour = _colours("latency", dict(zip(_LATENCIES.values(), PALETTE, strict=False)))
    line = {
        "mark": {"type": "line", "interpolate": "step-after"},
        "encoding": {
            "x": x,
            "y": {
                "field": "share",
                "type": "quantitative",
                "title": "share of requests",
                "axis": {"format": "%"},
            },
            "color": colour,
            "tooltip": [
                {"field": "latency"},
                {"field": "s", "format": ".4g", "title": "seconds"},
                {"field": "share", "format": ".2%"},
            ],
        },
    }
    rule = {
        "data": {"values": bounds},
        "mark": {"type": "rule", "strokeDash": [4, 3]},
        "encoding": {"x": x, "color": colour},
    }
    return _frame(rows, 260) | {"layer": [line, rule]}


def _load(result: Simulation) -> Spec:
    series = result.series()
    panels = {
        "arrivals per s": series.arrivals_per_s,
        "in the engines": series.batch,
        "waiting": series.queue,
        "replicas held": series.replicas,
    }
    hours, group = _thinned(series.start_s)
    rows = [
        {"what": what, "hour": hour, "value": value}
        for what, values in panels.items()
        for hour, value in zip(hours, _means(values, group, len(hours)), strict=True)
    ]
    encoding = {
        "x": _HOURS,
        "y": {"field": "value", "type": "quantitative", "title": None},
        "tooltip": [
            {"field": "what"},
            {"field": "hour", "format": ".2f"},
            {"field": "value", "format": ".4g"},
        ],
    }
    facet = {"row": {"field": "what", "type": "nominal", "title": None, "sort": list(panels)}}
    spec = {"width": 600, "height": 90, "mark": {"type": "line", "color": PALETTE[0]}, "encoding": encoding}
    return {
        "$schema": SCHEMA,
        "data": {"values": rows},
        "facet": facet,
        "spec": spec,
        "resolve": {"scale": {"y": "independent"}},
    }


def _phases(result: Simulation) -> Spec:
    hours, group = _thinned(result.series().start_s)
    phases = result.phase_seconds()
    held = np.maximum(sum(_means(v, group, len(hours)) for v in phases.values()), 1e-12)
    rows = [
        {"phase": phase, "hour": hour, "share": value}
        for phase, seconds in phases.items()
        for hour, value in zip(hours, _means(seconds, group, len(hours)) / held, strict=True)
    ]
    colours = {p: PHASE_COLOURS[p] for p in (*_BUSY_PHASES, "idle")}
    encoding = {
        "x": _HOURS,
        "y": {
            "field": "share", "type": "quantitative", "stack": "zero", "title": "share of replica time",
            "axis": {"format": "%"}, "scale": {"domain": [0, 1]},
        },
        "color": _colours("phase", colours),
        "tooltip": [{"field": "phase"}, {"field": "hour", "format": ".2f"}, {"field": "share", "format": ".1%"}],
    }  # fmt: skip
    return _frame(rows, 200) | {"mark": {"type": "area"}, "encoding": encoding}


def _frame(rows: Sequence[Mapping[str, Any]], height: int) -> Spec:
    return {
        "$schema": SCHEMA,
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "height": height,
        "data": {"values": list(rows)},
    }


def _colours(field: str, colours: dict[str, str]) -> Spec:
    scale = {"domain": list(colours), "range": list(colours.values())}
    return {"field": field, "type": "nominal", "title": None, "scale": scale}


def _thinned(start_s: npt.NDArray[np.float64]) -> tuple[list[float], npt.NDArray[np.int64]]:
    """At most _MOST_POINTS groups of time bins: the hour each begins, and the group of every bin."""
    per = max(1, math.ceil(len(start_s) / _MOST_POINTS))
    group = np.arange(len(start_s)) // per
    return [float(t) / SECONDS_PER_HOUR for t in start_s[::per]], group


def _means(
    values: npt.NDArray[np.float64], group: npt.NDArray[np.int64], groups: int
) -> npt.NDArray[np.float64]:
    return np.bincount(group, values, groups) / np.bincount(group, minlength=groups)
