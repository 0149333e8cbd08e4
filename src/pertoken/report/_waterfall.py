"""Two books of a ledger side by side, and the waterfall from the forecast through its four drivers to the actual."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from pertoken.ledger import Ledger
from pertoken.report._page import PALETTE
from pertoken.report.actual import DRIVERS, LedgerSource, Line

_ENDS, _MORE, _LESS = PALETTE[0], PALETTE[1], PALETTE[2]

Span = tuple[datetime, datetime]
"""Hours of a book: the first, and the one after the last."""


class BooksHere(LedgerSource):
    """The books of a ledger whose spans are asked once."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self._known: dict[str, Span] = super().spans()

    def spans(self) -> dict[str, Span]:
        """By book, its first hour and the one after its last."""
        return self._known


def in_common(first: Span, second: Span) -> Span | None:
    """Hours that both have; None where there are none."""
    start, end = max(first[0], second[0]), min(first[1], second[1])
    return (start, end) if start < end else None


def pair(spans: Mapping[str, Span], actual: str) -> tuple[str, str] | None:
    """The forecast and the actual to show first: `actual` and the plan with most hours in common with it.

    None where there are not two books.
    """
    plans = [book for book in spans if book != actual]
    if actual not in spans:
        return (plans[0], plans[1]) if len(plans) > 1 else None

    def hours(book: str) -> timedelta:
        shared = in_common(spans[book], spans[actual])
        return shared[1] - shared[0] if shared else timedelta(0)

    return (max(plans, key=hours), actual) if plans else None


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


def _told(step: Step) -> str:
    """To the cent, a driver with its sign; less than half a cent has none."""
    cents = step.usd.quantize(Decimal("0.01"))
    return f"{cents:+,.2f}" if step.driver and cents else f"{cents + 0:,.2f}"


def to_vega(steps: tuple[Step, ...]) -> dict[str, Any]:
    """Floating bars with their amounts above them."""
    values = [
        {
            "step": step.name, "from": float(step.from_usd), "to": float(step.to_usd),
            "top": float(max(step.from_usd, step.to_usd)),
            "usd": _told(step),
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
