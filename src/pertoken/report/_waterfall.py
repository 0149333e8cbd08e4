"""The waterfall of a variance: from the forecast through price, volume, efficiency and mix to the actual."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pertoken.report._page import PALETTE
from pertoken.report.actual import DRIVERS, Line

_ENDS, _MORE, _LESS = PALETTE[0], PALETTE[1], PALETTE[2]


@dataclass(frozen=True)
class Step:
    """One bar: from where to where it reaches [USD], and by how much it moves the sum (the ends: their whole)."""

    name: str
    from_usd: Decimal
    to_usd: Decimal

    @property
    def usd(self) -> Decimal:
        """To less from."""
        return self.to_usd - self.from_usd

    @property
    def driver(self) -> bool:
        """Whether it is one of the four, and not an end."""
        return self.name in DRIVERS


def waterfall(line: Line) -> tuple[Step, ...]:
    """Forecast, the four drivers, actual: each begins where the one before it ends.

    Price + volume + efficiency + mix = actual − forecast, so that the last driver ends at the actual.
    """
    steps = [Step("forecast", Decimal(0), line.forecast_usd)]
    for driver in DRIVERS:
        at = steps[-1].to_usd
        steps.append(Step(driver, at, at + getattr(line, f"{driver}_usd")))
    return (*steps, Step("actual", Decimal(0), line.actual_usd))


def to_vega(steps: tuple[Step, ...]) -> dict[str, Any]:
    """Floating bars with their amounts above them."""
    values = [
        {
            "step": step.name, "from": float(step.from_usd), "to": float(step.to_usd),
            "top": float(max(step.from_usd, step.to_usd)),
            "usd": f"{step.usd:+,.2f}" if step.driver else f"{step.usd:,.2f}",
            "kind": ("costs more" if step.usd > 0 else "costs less") if step.driver else "book",
        }
        for step in steps
    ]  # fmt: skip
    x = {"field": "step", "type": "nominal", "sort": [s.name for s in steps], "title": None}
    colours = {"domain": ["book", "costs more", "costs less"], "range": [_ENDS, _MORE, _LESS]}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"values": values},
        "encoding": {"x": {**x, "axis": {"labelAngle": 0}}},
        "layer": [
            {
                "mark": {"type": "bar"},
                "encoding": {
                    "y": {"field": "from", "type": "quantitative", "title": "USD"},
                    "y2": {"field": "to"},
                    "color": {
                        "field": "kind", "type": "nominal", "scale": colours, "title": None,
                        "legend": {"orient": "top"},
                    },
                },
            },
            {
                "mark": {"type": "text", "dy": -6, "baseline": "bottom"},
                "encoding": {
                    "y": {"field": "top", "type": "quantitative"},
                    "text": {"field": "usd", "type": "nominal"},
                },
            },
        ],
        "width": "container",
        "height": 320,
    }  # fmt: skip
