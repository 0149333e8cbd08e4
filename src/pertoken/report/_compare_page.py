"""`compare` as a page and a picture: what a person looks at before reading the table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pertoken.report._compare_notes import break_even_lines, tokens
from pertoken.report._compare_table import days, hardware, interval, percent, usd
from pertoken.report._page import (
    CATEGORY_COLOURS,
    PALETTE,
    PHASE_COLOURS,
    Block,
    Figure,
    Table,
    Text,
    html_page,
    write_png,
    write_whole,
)
from pertoken.units import METRICS, MILLISECONDS_PER_SECOND

if TYPE_CHECKING:
    from pertoken.plan.whatif import Swing
    from pertoken.report.compare import Comparison, OptionResult, WorkloadResult

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
BAR = 26
"""Height of one bar with its gap [px]."""

Spec = dict[str, Any]


def write_page(comparison: Comparison, path: Path) -> None:
    """One self-contained page at `path`."""
    horizon = comparison.scenario.horizon
    subtitle = f"{horizon.days} days from {horizon.start}, {horizon.timezone}. All money is USD; a month is 730 hours."
    title = f"What a token costs: {comparison.scenario.name}"
    write_whole(path, html_page(title, subtitle, blocks(comparison)))


def blocks(comparison: Comparison) -> list[Block]:
    """What the page shows, from top to bottom."""
    found = [block for workload in comparison.workloads for block in _workload(workload)]
    return [*found, *_sources(comparison)]


def write_picture(comparison: Comparison, path: Path) -> None:
    """The headline figure of every workload, one below the other, as PNG."""
    specs = [s for w in comparison.workloads if (s := _headline(w, width=640))]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png({"$schema": SCHEMA, "vconcat": specs, "resolve": {"scale": {"color": "independent"}}}, path)


def _workload(workload: WorkloadResult) -> list[Block]:
    running = [o for o in workload.options if not o.refused]
    refused = [o for o in workload.options if o.refused]
    lead = [f"{workload.model}, {tokens(workload.tokens_per_month)} tokens a month."]
    if running:
        best = running[0]
        lead.append(
            f"Cheapest alone: {best.facts['pool']} at {usd(best.headline)} USD per M tokens, all cost included."
        )
    blocks: list[Block] = [Text(workload.name, lead)]
    if running:
        unit = "retained training tokens" if workload.kind == "training" else "input and output tokens"
        blocks.append(
            Figure(
                f"USD per M {unit} by category; idle, waste and overheads included. The line is the 80 % interval.",
                _headline(workload),
            )
        )
        blocks.append(Figure("USD per month by what it was spent on.", _by_phase(running)))
        blocks.append(_table(workload, running))
        if workload.kind != "training":
            blocks.append(
                Figure(
                    "Cost per month against volume, both logarithmic: where lines cross, options break even. "
                    "A line ends where its pool is full.",
                    _volumes(workload),
                )
            )
    if workload.time_cost:
        blocks.append(Figure("Days to finish against cost, by number of GPUs.", _time_cost(workload)))
    for option in running:
        swings = workload.sensitivity.get(str(option.facts["pool"]))
        if swings:
            blocks.append(
                Figure(f"{option.facts['pool']}: each input moved by ±20 %.", _tornado(swings, option))
            )
    if running:
        blocks += _life(running)
        blocks.append(Text("What must be said beside it", [*break_even_lines(running), *workload.notes]))
    if refused:
        rows = [[str(o.facts["pool"]), o.refused] for o in refused]
        blocks.append(Table("Options that cannot", ["option", "why"], rows))
    return blocks


def _headline(workload: WorkloadResult, width: int | str = "container") -> Spec:
    running = [o for o in workload.options if not o.refused]
    rows: list[dict[str, Any]] = []
    for option in running:
        month = option.usd_per_month or 0.0
        for category, value in option.usd_per_month_by_category.items():
            share = value / month if month else 0.0
            rows.append(
                {
                    "option": option.facts["pool"],
                    "category": category,
                    "usd": option.headline * share,
                    "low": option.low if option.low is not None else option.headline,
                    "high": option.high if option.high is not None else option.headline,
                }
            )
    order = [o.facts["pool"] for o in running]
    y = {"field": "option", "type": "nominal", "sort": order, "title": None, "axis": {"labelLimit": 180}}
    return {
        "$schema": SCHEMA,
        "title": {"text": workload.name, "anchor": "start"},
        "width": width,
        "autosize": {"type": "fit-x" if width == "container" else "pad", "contains": "padding"},
        "height": BAR * len(running),
        "data": {"values": rows},
        "layer": [
            {
                "mark": {"type": "bar"},
                "encoding": {
                    "y": y,
                    "x": {"field": "usd", "type": "quantitative", "stack": True, "title": "USD per M tokens"},
                    "color": _colours("category", CATEGORY_COLOURS),
                    "tooltip": [
                        {"field": "option"},
                        {"field": "category"},
                        {"field": "usd", "format": ".4f"},
                    ],
                },
            },
            {
                "mark": {"type": "rule", "strokeWidth": 2, "color": "#888888"},
                "encoding": {
                    "y": y,
                    "x": {"aggregate": "min", "field": "low", "type": "quantitative"},
                    "x2": {"aggregate": "max", "field": "high"},
                },
            },
        ],
    }


def _by_phase(running: list[OptionResult]) -> Spec:
    rows = [
        {"option": o.facts["pool"], "phase": phase, "usd": value}
        for o in running
        for phase, value in o.usd_per_month_by_phase.items()
    ]
    order = [o.facts["pool"] for o in running]
    return {
        **_bars(rows, len(running)),
        "encoding": {
            "y": {
                "field": "option",
                "type": "nominal",
                "sort": order,
                "title": None,
                "axis": {"labelLimit": 180},
            },
            "x": {"field": "usd", "type": "quantitative", "title": "USD per month"},
            "color": _colours("phase", PHASE_COLOURS),
            "tooltip": [{"field": "option"}, {"field": "phase"}, {"field": "usd", "format": ",.2f"}],
        },
    }


def _volumes(workload: WorkloadResult) -> Spec:
    rows = [
        {"option": pool, "tokens": volume, "usd": cost}
        for pool, points in workload.volumes.items()
        for volume, cost in points
    ]
    here = [{"tokens": workload.tokens_per_month}]
    x = {
        "field": "tokens",
        "type": "quantitative",
        "scale": {"type": "log"},
        "title": "tokens per month (G: 10⁹)",
    }
    return {
        "$schema": SCHEMA,
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "height": 320,
        "layer": [
            {
                "data": {"values": rows},
                "mark": {"type": "line", "interpolate": "linear"},
                "encoding": {
                    "x": {**x, "axis": {"format": "~s"}},
                    "y": {
                        "field": "usd",
                        "type": "quantitative",
                        "scale": {"type": "log"},
                        "title": "USD per month",
                        "axis": {"format": "~s"},
                    },
                    "color": {"field": "option", "type": "nominal", "title": None},
                },
            },
            {
                "data": {"values": here},
                "mark": {"type": "rule", "strokeDash": [4, 4], "color": "#888888"},
                "encoding": {"x": x},
            },
        ],
    }


def _time_cost(workload: WorkloadResult) -> Spec:
    rows = [
        {"option": t.pool, "GPUs": t.gpus, "days": t.days, "usd": t.usd}
        for t in workload.time_cost
        if not t.refused
    ]
    return {
        "$schema": SCHEMA,
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "height": 280,
        "data": {"values": rows},
        "mark": {"type": "line", "point": True},
        "encoding": {
            "x": {
                "field": "days",
                "type": "quantitative",
                "scale": {"type": "log"},
                "title": "days to finish one run",
            },
            "y": {
                "field": "usd",
                "type": "quantitative",
                "scale": {"type": "log"},
                "title": "USD over the horizon",
                "axis": {"format": "~s"},
            },
            "order": {"field": "GPUs", "type": "quantitative"},
            "color": {"field": "option", "type": "nominal", "title": None},
            "tooltip": [
                {"field": "option"},
                {"field": "GPUs"},
                {"field": "days"},
                {"field": "usd", "format": ",.0f"},
            ],
        },
    }


def _tornado(swings: list[Swing], option: OptionResult) -> Spec:
    rows = [
        {"input": s.parameter, "moved": moved, "usd": value, "base": option.headline}
        for s in swings
        for moved, value in (("−20 %", s.low_usd_per_mtok), ("+20 %", s.high_usd_per_mtok))
    ]
    return {
        **_bars(rows, len(swings)),
        "encoding": {
            "y": {
                "field": "input",
                "type": "nominal",
                "sort": [s.parameter for s in swings],
                "title": None,
            },
            "x": {
                "field": "base",
                "type": "quantitative",
                "title": "USD per M tokens",
                "scale": {"zero": False},
            },
            "x2": {"field": "usd"},
            "color": _colours("moved", {"−20 %": PALETTE[0], "+20 %": PALETTE[1]}),
        },
    }


def _bars(rows: list[Spec], count: int) -> Spec:
    """A bar figure as wide as the page with so many bars, without its encoding."""
    return {
        "$schema": SCHEMA,
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "height": BAR * count,
        "data": {"values": rows},
        "mark": "bar",
    }


def _colours(field: str, colours: dict[str, str]) -> Spec:
    scale = {"domain": list(colours), "range": list(colours.values())}
    return {"field": field, "type": "nominal", "title": None, "scale": scale}


def _table(workload: WorkloadResult, running: list[OptionResult]) -> Table:
    training = workload.kind == "training"
    metrics = (
        ("usd_per_mtok_trained", "joule_per_token_trained")
        if training
        else (
            "usd_per_mtok_input_with_idle",
            "usd_per_mtok_output_with_idle",
            "usd_per_mtok_total",
            "joule_per_token_output",
        )
    )
    units = [METRICS[m].unit for m in metrics]
    speed = ["days to finish", "MFU"] if training else ["TTFT s", "TPOT ms"]
    head = [
        "option",
        "hardware",
        *units,
        "80 %",
        "busy",
        *speed,
        "USD per month",
        "kWh per month",
        "kgCO2e per month",
    ]
    rows = [
        [
            str(o.facts["pool"]),
            hardware(o),
            *(usd(o.metrics.get(m)) for m in metrics),
            interval(o),
            percent(o.metrics.get("utilisation")),
            *_speed(o, training),
            usd(o.usd_per_month),
            usd(o.kwh_per_month),
            usd(o.kgco2e_per_month),
        ]
        for o in running
    ]
    return Table("Read back from the ledger", head, rows, tuple(range(2, len(head))))


def _speed(option: OptionResult, training: bool) -> tuple[str, str]:
    found = option.facts
    if training:
        return days(found["days_to_finish"]), percent(found["mfu"])
    if "ttft_s" not in found:
        return "–", "–"
    return usd(found["ttft_s"]), f"{found['tpot_s'] * MILLISECONDS_PER_SECOND:.0f}"


def _life(running: list[OptionResult]) -> list[Block]:
    rows = [
        [str(o.facts["pool"]), *(usd(value) for value in o.life_usd_per_gpu_hour.values())]
        for o in running
        if o.life_usd_per_gpu_hour
    ]
    head = ["option", "3 years", "4 years", "5 years", "6 years"]
    return (
        [Table("Capital in USD per GPU hour, were the hardware to last", head, rows, (1, 2, 3, 4))]
        if rows
        else []
    )


def _sources(comparison: Comparison) -> list[Block]:
    seen: dict[tuple[str, str, str], list[float]] = {}
    for row in comparison.rates.select(
        ["pool", "component", "meter", "usd_per_unit", "basis", "source"]
    ).to_pylist():
        key = (row["pool"], f"{row['component']} per {row['meter']}", f"{row['basis']}: {row['source']}")
        seen.setdefault(key, []).append(float(row["usd_per_unit"]))
    rows = [[pool, what, usd_range(values), source] for (pool, what, source), values in seen.items()]
    return [
        Text(
            "Where every rate comes from", ["Quantity × rate = cost. USD per unit, lowest to highest hour."]
        ),
        Table("Rates", ["pool", "rate", "USD per unit", "source"], rows, (2,)),
    ]


def usd_range(values: list[float]) -> str:
    """``0.0768`` or ``0.0768 to 0.145``: a rate with four significant digits, lowest to highest.

    >>> usd_range([0.0768, 0.1445])
    '0.0768 to 0.1445'
    """
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
