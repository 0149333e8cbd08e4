"""`compare` on a terminal of 100 columns."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pertoken.report._compare_notes import break_even_lines, tokens
from pertoken.units import CATEGORIES, GIGA, MILLISECONDS_PER_SECOND, PHASES, TERA, TOKENS_PER_MTOK

if TYPE_CHECKING:
    from pertoken.report.compare import Comparison, OptionResult, WorkloadResult

WIDTH = 100


def as_text(comparison: Comparison) -> str:
    """The tables as plain text, no line longer than 100 columns."""
    console = Console(width=WIDTH, file=io.StringIO(), force_terminal=False)
    console.print(render(comparison))
    out = console.file
    assert isinstance(out, io.StringIO)
    return out.getvalue()


def render(comparison: Comparison) -> RenderableType:
    """The tables for a rich console."""
    horizon = comparison.scenario.horizon
    parts: list[RenderableType] = [
        Text(
            f"{comparison.scenario.name}: {horizon.days} days from {horizon.start} ({horizon.timezone}), USD",
            style="bold",
        )
    ]
    parts += [Padding(_workload(workload), (1, 0, 0, 0)) for workload in comparison.workloads]
    return Group(*parts)


def usd(value: float | None) -> str:
    """A figure with as many digits as matter, never wider than seven.

    >>> usd(0.12268), usd(4.3518), usd(1234.5), usd(14_269_500.0), usd(None)
    ('0.123', '4.35', '1,234', '14.3 M', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    for unit, size in (("T", TERA), ("B", GIGA), ("M", TOKENS_PER_MTOK)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    if abs(value) < 1:
        return f"{value:.3f}"
    return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"


def _workload(workload: WorkloadResult) -> RenderableType:
    serving = workload.kind != "training"
    title = f"{workload.name}: {workload.model}, {tokens(workload.tokens_per_month)} tokens a month"
    running = [o for o in workload.options if not o.refused]
    parts: list[RenderableType] = [Text(title, style="bold")]
    if running:
        parts.append(_serving(running) if serving else _training(running))
        parts.append(_costs(running))
        parts += [Text(line) for line in break_even_lines(running)]
        parts += [Text(line, style="dim") for line in workload.notes]
    for option in workload.options:
        parts += [Text(f"{option.facts['pool']} is over budget: {line}") for line in option.over_budget]
        if option.refused:
            parts.append(Text(f"{option.facts['pool']} cannot: {option.refused}"))
    if workload.extra_tokens:
        parts.append(_extra(workload))
    if workload.sensitivity:
        parts.append(_sensitivity(workload))
    if workload.time_cost:
        parts.append(_time_cost(workload))
    return Group(*parts)


def table(title: str, *columns: str) -> Table:
    """A plain table: first column left, the others right."""
    made = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
        title_justify="left",
        title_style="italic",
    )
    for i, column in enumerate(columns):
        # Hardware is the one column that may wrap where a row is too wide.
        made.add_column(
            column, justify="left" if i == 0 else "right", no_wrap=column not in ("hardware", "option")
        )
    return made


def hardware(option: OptionResult) -> str:
    """``2× L40S fp8 tp4``: GPUs paid for, precision, layout of a replica."""
    found: dict[str, Any] = option.facts
    if not found["gpu"]:
        return "API"
    gpus = found.get("paid_gpus", found.get("gpus"))
    layout = "".join(
        f" {k}{v}" for k, v in found.get("layout", {}).items() if v > 1 and not (k == "ep" and v == 1)
    )
    return f"{gpus}× {found['gpu']} {found['precision']}{layout}"


def _serving(options: list[OptionResult]) -> Table:
    made = table(
        "USD per M tokens, idle included",
        "option", "hardware", "input", "output", "total", "80 %", "busy",
        "TTFT", "TPOT", "month",
    )  # fmt: skip
    for o in options:
        m, f = o.metrics, o.facts
        made.add_row(
            f["pool"],
            hardware(o),
            usd(m["usd_per_mtok_input_with_idle"]),
            usd(m["usd_per_mtok_output_with_idle"]),
            usd(m["usd_per_mtok_total"]),
            interval(o),
            percent(m["utilisation"]),
            f"{f['ttft_s']:.2f} s" if "ttft_s" in f else "–",
            f"{f['tpot_s'] * MILLISECONDS_PER_SECOND:.0f} ms" if "tpot_s" in f else "–",
            usd(o.usd_per_month),
        )
    return made


def _training(options: list[OptionResult]) -> Table:
    made = table(
        "USD per M retained training tokens, idle and lost steps included",
        "option", "hardware", "trained", "80 %", "busy", "days", "MFU", "kept", "J/token", "month",
    )  # fmt: skip
    for o in options:
        m, f = o.metrics, o.facts
        made.add_row(
            f["pool"],
            hardware(o),
            usd(m["usd_per_mtok_trained"]),
            interval(o),
            percent(m["utilisation"]),
            days(f["days_to_finish"]),
            percent(f["mfu"]),
            f"{f['retained_fraction']:.1%}",
            usd(m["joule_per_token_trained"]),
            usd(o.usd_per_month),
        )
    return made


def _costs(options: list[OptionResult]) -> Table:
    phases = [p for p in PHASES if any(o.usd_per_month_by_phase.get(p, 0.0) > 0 for o in options)]
    serving = any("joule_per_token_output" in o.metrics for o in options)
    made = table(
        "USD per month: by category, and the same by phase",
        "option", "compute", "energy", "infra", *phases, "kWh",
        *(["J/out", "kgCO2e", "load"] if serving else ["kgCO2e"]),
    )  # fmt: skip
    for o in options:
        made.add_row(
            o.facts["pool"],
            *(usd(o.usd_per_month_by_category.get(c, 0.0)) for c in CATEGORIES),
            *(usd(o.usd_per_month_by_phase.get(p, 0.0)) for p in phases),
            usd(o.kwh_per_month),
            *([usd(o.metrics["joule_per_token_output"])] if serving else []),
            usd(o.kgco2e_per_month),
            *([percent(o.facts.get("capacity_used_fraction"))] if serving else []),
        )
    return made


def _extra(workload: WorkloadResult) -> Table:
    fraction = workload.extra_tokens[0][1].fraction
    made = table(f"USD per M tokens with {fraction:+.0%} tokens", "option", "average", "of the extra ones")
    for pool, extra in workload.extra_tokens:
        if extra.refused:
            made.add_row(pool, "–", extra.refused)
        else:
            made.add_row(pool, usd(extra.average_usd_per_mtok), usd(extra.marginal_usd_per_mtok))
    return made


def _sensitivity(workload: WorkloadResult) -> RenderableType:
    lines = [
        Text("USD per M tokens with one input 20 % lower → 20 % higher, the widest first", style="italic")
    ]
    for pool, swings in workload.sensitivity.items():
        moved = [
            f"{s.parameter} {usd(s.low_usd_per_mtok)} → {usd(s.high_usd_per_mtok)}{f' ({s.note})' if s.note else ''}"
            for s in swings
        ]
        lines.append(Text(f"{pool}: {', '.join(moved) or 'nothing moves it'}"))
    return Group(*lines)


def _time_cost(workload: WorkloadResult) -> Table:
    made = table(
        "time against cost: what no other choice beats in both, deadline left aside",
        "option", "GPUs", "days", "USD over the horizon", "USD per M trained",
    )  # fmt: skip
    best_usd = math.inf
    front = []
    for point in sorted((p for p in workload.time_cost if not p.refused), key=lambda p: (p.days, p.usd)):
        if point.usd < best_usd:
            best_usd = point.usd
            front.append(point)
    for point in front:
        made.add_row(
            point.pool, str(point.gpus), days(point.days), usd(point.usd), usd(point.usd_per_mtok_trained)
        )
    return made


def interval(option: OptionResult) -> str:
    """``0.55–0.98``; an end the pool cannot carry is ``full``."""
    if option.low is None and option.high is None:
        return "–"
    low, high = ("full" if end is None else usd(end) for end in (option.low, option.high))
    return low if low == high else f"{low}–{high}"


def percent(value: float | None) -> str:
    """``57%``; a dash where there is none."""
    return "–" if value is None else f"{value:.0%}"


def days(value: float) -> str:
    """``1.10`` or ``0.037`` days."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
