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

from pertoken.units import CATEGORIES, PHASES

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
    """USD with as many digits as matter.

    >>> usd(0.12268), usd(4.3518), usd(1234.5), usd(None)
    ('0.123', '4.35', '1,234', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value < 1:
        return f"{value:.3f}"
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def tokens(count: float) -> str:
    """A token count in words' length.

    >>> tokens(3.2e9), tokens(4.56e8)
    ('3.2 B', '456 M')
    """
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.2g} {unit}"
    return f"{count:,.0f}"


def _workload(workload: WorkloadResult) -> RenderableType:
    serving = workload.kind != "training"
    title = f"{workload.name}: {workload.model}, {tokens(workload.tokens_per_month)} tokens a month"
    running = [o for o in workload.options if not o.refused]
    parts: list[RenderableType] = [Text(title, style="bold")]
    if running:
        parts.append(_serving(running) if serving else _training(running))
        parts.append(_costs(running))
        parts += _break_even(running)
        parts += [Text(line, style="dim") for line in _footnotes(running, serving)]
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
        made.add_column(column, justify="left" if i == 0 else "right", no_wrap=column != "hardware")
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
            _interval(o),
            _percent(m["utilisation"]),
            f"{f['ttft_s']:.2f} s" if "ttft_s" in f else "–",
            f"{f['tpot_s'] * 1e3:.0f} ms" if "tpot_s" in f else "–",
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
            _interval(o),
            _percent(m["utilisation"]),
            f"{f['days_to_finish']:.2f}",
            _percent(f["mfu"]),
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
            *([_percent(o.facts.get("capacity_used_fraction"))] if serving else []),
        )
    return made


def _break_even(options: list[OptionResult]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for option in options:
        if option.facts["term"] == "api":
            continue
        parts = []
        for point in option.break_even:
            if not _is_api(point.other, options):
                continue
            if point.tokens_per_month == 0:
                parts.append(f"{point.other} at every volume tried")
            elif math.isfinite(point.tokens_per_month):
                parts.append(f"{point.other} from {tokens(point.tokens_per_month)} tokens a month")
            else:
                parts.append(f"{point.other} at no volume up to {tokens(point.up_to_tokens_per_month)}")
        if parts:
            lines.append(Text(f"{option.facts['pool']} is no dearer than {'; '.join(parts)}"))
        if option.payback_months is not None:
            months = (
                f"{option.payback_months:,.0f} months" if math.isfinite(option.payback_months) else "never"
            )
            lines.append(
                Text(f"buying {option.facts['pool']} pays back against {option.payback_against}: {months}")
            )
    return lines


def _is_api(pool: str, options: list[OptionResult]) -> bool:
    return any(o.facts["pool"] == pool and o.facts["term"] == "api" for o in options)


def _footnotes(options: list[OptionResult], serving: bool) -> list[str]:
    found = []
    if serving:
        vendor = [
            f"{o.facts['pool']} {usd(o.vendor_usd_per_mtok_output)}"
            for o in options
            if o.vendor_usd_per_mtok_output is not None
        ]
        if vendor:
            found.append(
                f"at 100 % use, GPU price alone, per M output tokens (the vendor's figure): {', '.join(vendor)}"
            )
    pools: dict[str, list[str]] = {}
    for o in options:
        if o.facts["left_out"]:
            pools.setdefault(", ".join(o.facts["left_out"]), []).append(str(o.facts["pool"]))
    found += [
        f"left out, because nobody wrote it: {lines} ({', '.join(names)})" for lines, names in pools.items()
    ]
    # One line per site, of the option that draws most there.
    misfits = {o.facts["site"]: o for o in sorted(options, key=_peak_kw) if o.facts.get("tariff_misfit")}
    found += [f"{o.facts['tariff_misfit']}, unless other load makes up for it" for o in misfits.values()]
    bases = sorted({str(o.facts["basis"]) for o in options if "basis" in o.facts})
    if bases:
        found.append(
            f"throughput is {' and '.join(bases)}; intervals are 80 %; energy is at the utility meter"
        )
    return found


def _peak_kw(option: OptionResult) -> float:
    return float(option.facts.get("peak_kw", 0.0))


def _extra(workload: WorkloadResult) -> Table:
    fraction = workload.extra_tokens[0][1].fraction
    made = table(f"USD per M tokens with {fraction:+.0%} tokens", "option", "average", "of the extra ones")
    for pool, extra in workload.extra_tokens:
        if extra.refused:
            made.add_row(pool, "–", extra.refused)
        else:
            made.add_row(pool, usd(extra.average_usd_per_mtok), usd(extra.marginal_usd_per_mtok))
    return made


def _sensitivity(workload: WorkloadResult) -> Table:
    pool = workload.options[0].facts["pool"]
    made = table(f"{pool}: USD per M tokens when an input moves", "input", "−20 %", "+20 %", "note")
    for swing in workload.sensitivity:
        made.add_row(swing.parameter, usd(swing.low_usd_per_mtok), usd(swing.high_usd_per_mtok), swing.note)
    return made


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
        days = f"{point.days:.2f}" if point.days >= 0.1 else f"{point.days:.3f}"
        made.add_row(point.pool, str(point.gpus), days, usd(point.usd), usd(point.usd_per_mtok_trained))
    return made


def _interval(option: OptionResult) -> str:
    """``0.55–0.98``; an end the pool cannot carry is ``full``."""
    if option.low is None and option.high is None:
        return "–"
    low, high = ("full" if end is None else usd(end) for end in (option.low, option.high))
    return low if low == high else f"{low}–{high}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
