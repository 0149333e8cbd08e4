"""What tokens cost now: the last minute, the hour so far, and the closed hours before it, from sums of the same rows.

Every figure is a metric of `units.METRICS` or a rate, made of the same sums wherever they come from: ``Σ numerator /
Σ denominator`` of usage and cost rows, so that a figure of the last minute means what it means over a month.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from pertoken.ledger import Ledger
from pertoken.meter.attribute import BOOK
from pertoken.report.so_far import Lately
from pertoken.units import JOULES_PER_KWH, METRICS, SECONDS_PER_HOUR, Metric, base_meter

HOUR = timedelta(hours=1)
HOURS_BACK = 24
Where = Mapping[str, Sequence[str]]
"""Names by ``pool``, ``model`` and ``tenant``; a dimension left out is not narrowed."""


@dataclass(frozen=True)
class Tile:
    """A figure of the page: a metric by its name, or a rate of meters per second or per hour."""

    name: str
    title: str
    unit: str
    about: str
    metric: str = ""
    meters: tuple[str, ...] = ()
    per_s: float = 1.0
    """What Σ meters / seconds is multiplied with; a rate without meters is one of cost."""
    times: float = 1.0
    """What a metric is multiplied with for the page: a fraction is read as per cent."""
    of_pools: bool = False
    """Says nothing of one tenant: what is idle belongs to none."""


def _of_metric(name: str, title: str) -> Tile:
    return Tile(name, title, METRICS[name].unit, METRICS[name].about, metric=name)


TILES: tuple[Tile, ...] = (
    _of_metric("usd_per_mtok_output", "Output tokens"),
    _of_metric("usd_per_mtok_input", "Input tokens"),
    _of_metric("usd_per_mtok_total", "Input and output tokens"),
    Tile(
        "output_per_s", "Output", "output tokens/s", "tokens generated per second", meters=("output_tokens",)
    ),
    Tile(
        "input_per_s",
        "Input",
        "input tokens/s",
        "prompt tokens delivered per second, cached ones included",
        meters=("input_tokens", "cached_input_tokens"),
    ),
    Tile(
        "power_w",
        "Power",
        "W at the utility meter",
        "energy over time, idle and cooling included",
        meters=("energy_kwh",),
        per_s=JOULES_PER_KWH,
    ),
    _of_metric("joule_per_token_output", "Energy of an output token"),
    _of_metric("joule_per_token_total", "Energy of a token, in or out"),
    Tile(
        "utilisation",
        "Utilisation",
        "% of GPU hours not idle",
        METRICS["utilisation"].about,
        metric="utilisation",
        times=100.0,
        of_pools=True,
    ),
    Tile(
        "usd_per_hour",
        "Spend",
        "USD/h",
        "cost over time, idle and waste included, demand charges (which belong to a month) not",
        per_s=SECONDS_PER_HOUR,
    ),
)


@dataclass
class Sums:
    """Quantities by meter and phase, and cost [USD] by phase and component, over `seconds`."""

    seconds: float = 0.0
    usage: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    cost_usd: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    unpriced: bool = False
    """Some of this usage has no price, so that no cost of it means anything."""

    def add(self, other: Sums) -> None:
        """Take another's in; where one is unpriced the sum is."""
        self.seconds += other.seconds
        self.unpriced |= other.unpriced
        for key, quantity in other.usage.items():
            self.usage[key] += quantity
        for key, usd in other.cost_usd.items():
            self.cost_usd[key] += usd

    def value(self, tile: Tile) -> float | None:
        """The figure; None where nothing it is made of was metered, or its cost is not known."""
        if tile.metric:
            metric = METRICS[tile.metric]
            value = None if self.unpriced and "cost" in metric.numerator else self.metric(metric)
            return None if value is None else tile.times * value
        if not self.seconds:
            return None
        if tile.meters:
            told = [q for (meter, _), q in self.usage.items() if meter in tile.meters]
            return sum(told) * tile.per_s / self.seconds if told else None
        if self.unpriced or not self.cost_usd:
            return None
        hourly = sum(usd for (_, component), usd in self.cost_usd.items() if component != "demand_charge")
        return hourly * tile.per_s / self.seconds

    @property
    def told(self) -> bool:
        """Whether anything was counted beside the hours that a pool holds its GPUs and a site is paid for."""
        return any(meter not in ("gpu_hours", "site_hours") for meter, _ in self.usage)

    def metric(self, metric: Metric) -> float | None:
        """A metric of these sums, as the ledger's SELECT makes it of its rows."""
        whole = [term.partition("@")[0] for term in metric.numerator.split("+")]
        known = bool(self.cost_usd) if "cost" in whole else any(m in whole for m, _ in self.usage)
        denominator = self._terms(metric.denominator)
        if not known or not denominator:
            return None
        value = metric.scale * self._terms(metric.numerator) / denominator
        if metric.share_of:
            spread_over = self._terms(metric.share_of)
            return value * self._terms("cost") / spread_over if spread_over else None
        return value

    def _terms(self, terms: str) -> float:
        total = 0.0
        for term in terms.split("+"):
            name, _, phase = term.partition("@")
            of = self.cost_usd if name == "cost" else self.usage
            at = 0 if name == "cost" else 1
            total += sum(
                q
                for key, q in of.items()
                if (name == "cost" or key[0] == name) and (not phase or key[at] == phase)
            )
        return total


@dataclass(frozen=True)
class Day:
    """The closed hours of a window, each on its own and together. `unpriced` ones count in no cost."""

    start: datetime
    end: datetime
    hours: Mapping[datetime, Sums]
    unpriced: tuple[datetime, ...] = ()
    known: tuple[datetime, ...] = ()
    """Its hours that were metered and closed; of some nothing was counted here, and they went by all the same."""

    @property
    def total(self) -> Sums:
        """All hours that are priced."""
        found = Sums()
        for hour, sums in self.hours.items():
            if hour not in self.unpriced:
                found.add(sums)
        gone = {*self.hours, *self.known}.difference(self.unpriced)
        found.seconds = SECONDS_PER_HOUR * len(gone)
        return found

    def series(self, tile: Tile) -> list[tuple[datetime, float | None]]:
        """The figure of each hour of the window, oldest first."""
        count = round((self.end - self.start) / HOUR)
        hours = [self.start + HOUR * n for n in range(count)]
        return [(hour, self.hours[hour].value(tile) if hour in self.hours else None) for hour in hours]


def closed_day(
    ledger: Ledger,
    where: Where,
    end: datetime,
    unpriced: Iterable[datetime] = (),
    hours: int = HOURS_BACK,
    until: datetime | None = None,
) -> Day:
    """The `hours` full hours before `end`, read from the ledger's rows of these hours alone.

    `until`: the first hour that was never closed (None: not known).
    """
    start = end - HOUR * hours
    found = _of_ledger(ledger, where, start, end)
    open_ = tuple(sorted(hour for hour in unpriced if start <= hour < end))
    for hour in open_:
        if hour in found:
            found[hour].unpriced = True
    known: tuple[datetime, ...] = ()
    if until is not None and (first := ledger.first_hour(BOOK, besides=["peak_kw"])) is not None:
        closed = (start + HOUR * n for n in range(hours))
        known = tuple(hour for hour in closed if first <= hour < until)
    return Day(start, end, found, open_, known)


def so_far_sums(ledger: Ledger, where: Where, hour: datetime, elapsed_s: float, unpriced: bool) -> Sums:
    """Sums of an hour that is not over, from its own ledger."""
    found = _of_ledger(ledger, where, hour, hour + HOUR).get(hour) or Sums()
    found.seconds, found.unpriced = elapsed_s, unpriced
    return found


def lately_sums(lately: Lately, where: Where) -> Sums:
    """Sums of the last seconds, of the rows that a filter lets through."""
    found = Sums(seconds=float(lately.seconds))
    for row in lately.usage.to_pylist():
        if _within(row, where):
            found.usage[base_meter(row["meter"]), row["phase"]] += float(row["quantity"])
    for row in lately.costs:
        if _within(row, where):
            found.cost_usd[row["phase"], row["component"]] += row["cost_usd"]
    found.unpriced = bool(lately.unpriced)
    return found


def _of_ledger(ledger: Ledger, where: Where, start: datetime, end: datetime) -> dict[datetime, Sums]:
    asked: dict[str, Any] = {"where": {"book": [BOOK], **where}, "start": start, "end": end}
    found: dict[datetime, Sums] = {}
    for row in ledger.usage("hour", "meter", "phase", **asked).to_pylist():
        sums = found.setdefault(row["hour"], Sums(seconds=SECONDS_PER_HOUR))
        sums.usage[base_meter(row["meter"]), row["phase"]] += float(row["quantity"])
    for row in ledger.cost("hour", "phase", "component", **asked).to_pylist():
        sums = found.setdefault(row["hour"], Sums(seconds=SECONDS_PER_HOUR))
        sums.cost_usd[row["phase"], row["component"]] += float(row["cost_usd"])
    return found


def _within(row: Mapping[str, Any], where: Where) -> bool:
    return all(row[key] in names for key, names in where.items())
