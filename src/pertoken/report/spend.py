"""Looking back: where the money of a window went, by any two dimensions, and what a single ledger row is made of.

All sums are the ledger's: costs are exact decimals, and the parts shown add up to the total shown to the last digit. A
total of a ratio is the ratio of the sums, asked of the ledger, never a sum or a mean of ratios.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from enum import Enum
from typing import Any

from pertoken.errors import InputError, UnknownNameError
from pertoken.ledger import Ledger
from pertoken.report._page import CATEGORY_COLOURS, PALETTE, PHASE_COLOURS, UTC_AXES
from pertoken.report._written import unit_told, utc_text
from pertoken.units import CATEGORIES, COMPONENTS, HOURS_PER_DAY, IDLE, METERS, METRICS, PHASES, base_meter

COST = "cost_usd"
MEASURES = (COST, *METRICS)
COST_KEYS = ("model", "tenant", "pool", "hour", "phase", "component", "category")
METRIC_KEYS = ("model", "tenant", "pool", "hour")
ROW_KEYS = ("pool", "model", "tenant", "phase", "category", "component", "hour")
"""What names a row of the cost table in a book."""
UNUSED = ("idle", "waste")
BANDS = (*CATEGORIES, *UNUSED)
ROWS_SHOWN = 168
"""Rows of a table and bars of a figure at once: the hours of a week."""
COLUMNS_SHOWN = 12
_LAST_DIGIT = Decimal("1e-9")
_HOURLY_UP_TO = 15 * HOURS_PER_DAY
_DAILY_UP_TO = 800 * HOURS_PER_DAY
_LETTERS_ACROSS = 90
"""Names of so many letters together stand level under a figure."""
_FIXED = {IDLE: PHASE_COLOURS["idle"], "idle": PHASE_COLOURS["idle"], "waste": PHASE_COLOURS["waste"]}
_COLOURS = {**CATEGORY_COLOURS, **{phase: PHASE_COLOURS[phase] for phase in UNUSED}}

Asked = Mapping[str, Any]
"""``where``, ``start`` and ``end`` as the ledger's questions take them."""


@dataclass(frozen=True)
class Sums:
    """Costs by phase [USD] of one component, of one category, or of all."""

    name: str
    by_phase: Mapping[str, Decimal]

    @property
    def total(self) -> Decimal:
        """Over all phases."""
        return sum(self.by_phase.values(), Decimal(0))


@dataclass(frozen=True)
class Category:
    """The components of a category, and their sum."""

    sums: Sums
    components: tuple[Sums, ...]


@dataclass(frozen=True)
class Breakdown:
    """Cost by category, component and phase; `total` is the sum of its parts and of the ledger."""

    categories: tuple[Category, ...]
    phases: tuple[str, ...]
    total: Sums

    def to_dict(self) -> dict[str, Any]:
        """For JSON; USD as text, exact."""
        rows = [
            {"category": c.sums.name, "component": s.name, "phase": phase, COST: format(usd, "f")}
            for c in self.categories
            for s in c.components
            for phase, usd in s.by_phase.items()
        ]
        return {"rows": rows, "total_usd": format(self.total.total, "f")}


def breakdown(ledger: Ledger, asked: Asked) -> Breakdown:
    """Cost of what was asked by category, component and phase."""
    cells: dict[str, dict[str, dict[str, Decimal]]] = defaultdict(lambda: defaultdict(dict))
    for row in ledger.cost("category", "component", "phase", **asked).to_pylist():
        cells[row["category"]][row["component"]][row["phase"]] = row[COST]
    phases = tuple(
        _in_order({p for parts in cells.values() for by_phase in parts.values() for p in by_phase}, PHASES)
    )
    categories = []
    for name in _in_order(cells, CATEGORIES):
        parts = tuple(Sums(c, cells[name][c]) for c in _in_order(cells[name], COMPONENTS))
        categories.append(Category(Sums(name, _together(parts)), parts))
    total = Sums("total", _together([c.sums for c in categories]))
    return Breakdown(tuple(categories), phases, total)


def _together(parts: Iterable[Sums]) -> dict[str, Decimal]:
    found: dict[str, Decimal] = defaultdict(Decimal)
    for part in parts:
        for phase, usd in part.by_phase.items():
            found[phase] += usd
    return dict(found)


def _in_order(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Known names in their order, then the others by name."""
    place = {name: at for at, name in enumerate(known)}
    return sorted(names, key=lambda name: (place.get(name, len(place)), name))


@dataclass(frozen=True)
class OverTime:
    """Cost in steps of time (UTC), in bands: what was used by category, and idle and waste of all categories."""

    step: str
    """hour, day or month"""
    rows: tuple[tuple[datetime, str, Decimal], ...]

    @property
    def total(self) -> Decimal:
        """Of all bands and steps."""
        return sum((usd for *_, usd in self.rows), Decimal(0))

    def to_dicts(self) -> list[dict[str, str]]:
        """For JSON and CSV; USD as text, exact."""
        return [
            {self.step: utc_text(at), "band": band, COST: format(usd, "f")} for at, band, usd in self.rows
        ]

    def to_vega(self) -> dict[str, Any]:
        """Bars stacked over time, a colour for each band."""
        bands = _in_order({band for _, band, _ in self.rows}, BANDS)
        values = [
            {"at": utc_text(at), "band": band, "usd": float(usd), "order": bands.index(band)}
            for at, band, usd in self.rows
        ]
        unit = {"hour": "utcyearmonthdatehours", "day": "utcyearmonthdate", "month": "utcyearmonth"}[
            self.step
        ]
        colours = [_COLOURS.get(band, PALETTE[-2]) for band in bands]
        return {
            "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
            "data": {"values": values},
            "mark": {"type": "bar", "binSpacing": 0},
            "encoding": {
                "x": {"field": "at", "timeUnit": unit, **UTC_AXES[self.step]},
                "y": {"field": "usd", "type": "quantitative", "title": f"USD per {self.step}", "stack": "zero"},
                "color": {
                    "field": "band", "type": "nominal", "title": None, "sort": bands,
                    "scale": {"domain": bands, "range": colours}, "legend": {"orient": "top"},
                },
                "order": {"field": "order", "type": "quantitative"},
            },
            "width": "container",
            "height": 300,
        }  # fmt: skip


def over_time(ledger: Ledger, asked: Asked) -> OverTime:
    """Cost of what was asked in bands over time; by hour up to 15 days, by day up to 800, then by month."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = ledger.cost("hour", "category", "phase", **asked)
    if not found.num_rows:
        return OverTime("hour", ())
    hours: Any = found["hour"]
    costs: Any = found[COST]
    first, last = asked.get("start") or pc.min(hours).as_py(), pc.max(hours).as_py()
    span = ((asked.get("end") or last) - first) / timedelta(hours=1)
    step = "hour" if span <= _HOURLY_UP_TO else "day" if span <= _DAILY_UP_TO else "month"
    floor: Any = pc.floor_temporal
    unused = pc.is_in(found["phase"], pa.array(UNUSED))
    banded = pa.table(
        {
            "at": floor(hours, unit=step),
            "band": pc.if_else(unused, found["phase"], found["category"]),
            COST: costs,
        }
    )
    sums = banded.group_by(["at", "band"]).aggregate([(COST, "sum")])
    place = {band: at for at, band in enumerate(BANDS)}
    rows = [(r["at"].astimezone(UTC), r["band"], r[f"{COST}_sum"]) for r in sums.to_pylist()]
    return OverTime(step, tuple(sorted(rows, key=lambda r: (r[0], place.get(r[1], len(place)), r[1]))))


@dataclass(frozen=True)
class Line:
    """One product behind a cost row: a quantity [the meter's unit] at a rate [USD per unit]."""

    meter: str
    quantity: Decimal
    quantity_basis: str
    usd_per_unit: Decimal
    rate_basis: str
    source: str
    cost_usd: Decimal
    """Exact, before the row's one rounding."""

    @property
    def unit(self) -> str:
        """Of the quantity."""
        meter = METERS.get(base_meter(self.meter))
        return meter.unit if meter else ""

    @property
    def told_unit(self) -> str:
        """The unit as it is read beside the quantity."""
        return unit_told(self.quantity, self.unit)


@dataclass(frozen=True)
class Explained:
    """A row of the cost table, and the products that sum to it."""

    key: Mapping[str, str | datetime]
    lines: tuple[Line, ...]
    exact_usd: Decimal
    cost_usd: Decimal | None
    """As the ledger has it; None where it has no such row."""

    @property
    def adds_up(self) -> bool:
        """Whether the lines, summed and rounded once, are the ledger's row."""
        return self.cost_usd == self.exact_usd.quantize(_LAST_DIGIT, ROUND_HALF_UP)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers as text, exact."""
        lines = [
            {
                "meter": line.meter, "quantity": format(line.quantity, "f"), "unit": line.unit,
                "quantity_basis": line.quantity_basis, "usd_per_unit": format(line.usd_per_unit, "f"),
                "rate_basis": line.rate_basis, "source": line.source, COST: format(line.cost_usd, "f"),
            }
            for line in self.lines
        ]  # fmt: skip
        key = {k: utc_text(v) if isinstance(v, datetime) else v for k, v in self.key.items()}
        cost = None if self.cost_usd is None else format(self.cost_usd, "f")
        return {**key, "lines": lines, "exact_usd": format(self.exact_usd, "f"), COST: cost}


def explain(ledger: Ledger, book: str, hour: datetime, key: Mapping[str, str]) -> Explained:
    """What the cost row of a book, an hour (UTC) and a `key` (`ROW_KEYS` without the hour) is made of."""
    where = {k: [v] for k, v in key.items() if k != "pool"}
    lines = tuple(
        Line(**{name: row[name] for name in Line.__dataclass_fields__})
        for row in ledger.lines(book, hour, key["pool"], where).to_pylist()
    )
    asked = {"book": [book], **{k: [v] for k, v in key.items()}}
    (row,) = ledger.cost(where=asked, start=hour, end=hour + timedelta(hours=1)).to_pylist()
    exact = sum((line.cost_usd for line in lines), Decimal(0))
    return Explained({"book": book, "hour": hour, **key}, lines, exact, row[COST])


@dataclass(frozen=True)
class OneSided:
    """Pools in a ratio's denominator that are not in its numerator, which was not measured there."""

    pools: tuple[str, ...]
    others: tuple[str, ...]
    """Those that are in both."""
    missing: str
    """Meters of the numerator."""


def one_sided(ledger: Ledger, measure: str, asked: Asked) -> OneSided | None:
    """What makes a ratio of quantities too small: an API's tokens, say, whose energy nobody can measure.

    None where nothing does, or where the ratio has no numerator at all; a cost is never missing: its hour stays open.
    """
    if measure == COST or "cost" in (metric := METRICS[measure]).numerator:
        return None
    above, below = (
        {term.partition("@")[0] for term in terms.split("+")}
        for terms in (metric.numerator, metric.denominator)
    )
    where = {**asked["where"], "meter": [*above, *below]}
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for row in ledger.usage("pool", "meter", **{**asked, "where": where}).to_pylist():
        for side, meters in ((True, above), (False, below)):
            if row["quantity"] and base_meter(row["meter"]) in meters:
                found[side].add(row["pool"])
    lacking, both = found[False] - found[True], found[False] & found[True]
    if not lacking or not found[True]:
        return None
    return OneSided(tuple(sorted(lacking)), tuple(sorted(both)), ", ".join(sorted(above)))


class Others(Enum):
    """Names too many to show: no name of the ledger's, whatever that is."""

    ALL = "all others"


Value = Decimal | float | None
Name = str | datetime | Others


@dataclass(frozen=True)
class Crossed:
    """A measure by one or two dimensions: cells, a total per row and column, and the total of all.

    `rows` and `columns` hold the names shown with their totals, largest cost first, hours in order of time. Rows beyond
    those shown are in the totals all the same; columns beyond are one: `Others.ALL`.
    """

    measure: str
    by: tuple[str, ...]
    rows: Mapping[Name, Value]
    columns: Mapping[Name, Value]
    cells: Mapping[tuple[Name, Name], Value]
    total: Value
    rows_in_all: int
    first_row: int
    others: tuple[Name, ...] = field(default=())
    """Names that the column `Others.ALL` stands for."""

    @property
    def unit(self) -> str:
        """The measure's unit."""
        return "USD" if self.measure == COST else METRICS[self.measure].unit

    @property
    def adds(self) -> bool:
        """Whether totals are sums of cells; else they are the ratio of the sums."""
        return self.measure == COST

    def to_vega(self, heat: bool) -> dict[str, Any]:
        """A heat map, or bars: stacked where the measure adds up, side by side where it does not."""
        pairs: list[tuple[Name, Name]] = [(r, c) for r in self.rows for c in (self.columns or ("",))]
        values = []
        for row, column in pairs:
            value = self.cells.get((row, column)) if self.columns else self.rows[row]
            if value is not None:
                values.append({"row": label(self.by[0], row), "value": float(value)} | (
                    {"column": label(self.by[1], column)} if self.columns else {}
                ))  # fmt: skip
        drawn = self._heat() if heat and self.columns else self._bars()
        return {
            "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
            "data": {"values": values}, "width": "container", **drawn,
        }  # fmt: skip

    def _axis(self) -> dict[str, Any]:
        if self.by[0] == "hour":
            return {"field": "row", "timeUnit": "utcyearmonthdatehours", **UTC_AXES["hour"]}
        rows = [label(self.by[0], row) for row in self.rows]
        return {
            "field": "row",
            "type": "nominal",
            "title": self.by[0],
            "sort": rows,
            "axis": names_axis(rows),
        }

    def _bars(self) -> dict[str, Any]:
        mark: dict[str, Any] = {"type": "bar"}
        encoding: dict[str, Any] = {"x": self._axis()}
        encoding["y"] = {"field": "value", "type": "quantitative", "title": self.unit}
        encoding["y"]["stack"] = "zero" if self.adds else None
        if self.columns:
            names = [label(self.by[1], column) for column in self.columns]
            encoding["color"] = {
                "field": "column", "type": "nominal", "title": self.by[1], "sort": names,
                "scale": {"domain": names, "range": _colours(self.columns)},
            }  # fmt: skip
            if not self.adds and self.by[0] == "hour":
                mark = {"type": "line", "point": {"size": 12}}
            elif not self.adds:
                encoding["xOffset"] = {"field": "column", "type": "nominal", "sort": names}
        return {"mark": mark, "encoding": encoding, "height": 300}

    def _heat(self) -> dict[str, Any]:
        over_hours = self.by[0] == "hour"
        names = [label(self.by[1], column) for column in self.columns]
        across = {"field": "column", "type": "nominal", "title": self.by[1], "sort": names}
        colour = {
            "field": "value", "type": "quantitative", "title": self.unit,
            "scale": {"scheme": "blues"}, "legend": {"orient": "top", "gradientLength": 240},
        }  # fmt: skip
        # Hours run to the right, as time does; names of rows stand on the left, as in the table.
        x, y = (
            (self._axis(), across) if over_hours else (across, {**self._axis(), "axis": {"labelLimit": 160}})
        )
        steps = len(names) if over_hours else len(self.rows)
        return {
            "mark": {"type": "rect"}, "encoding": {"x": x, "y": y, "color": colour},
            "height": max(120, 22 * steps),
        }  # fmt: skip


def names_axis(names: Iterable[str]) -> dict[str, Any]:
    """An axis of names under a figure: level where they are short, else aslant."""
    level = sum(map(len, names)) <= _LETTERS_ACROSS
    return {"labelAngle": 0 if level else -40, "labelLimit": 160}


def _colours(names: Iterable[Name]) -> list[str]:
    """Idle and waste in their own colours, as on every figure; the others in order."""
    free = [colour for colour in PALETTE if colour not in _FIXED.values()]
    found: list[str] = []
    others = 0
    for name in names:
        if isinstance(name, str) and name in _FIXED:
            found.append(_FIXED[name])
        else:
            found.append(free[others % len(free)])
            others += 1
    return found


def label(dimension: str, name: Name) -> str:
    """A name as it is shown: an hour in UTC, and what has none as that.

    >>> label("model", "")
    'no model'
    """
    if isinstance(name, datetime):
        return f"{name:%Y-%m-%dT%H:%MZ}"
    if isinstance(name, Others):
        return name.value
    return name or f"no {dimension}"


def crossed(ledger: Ledger, measure: str, by: Sequence[str], asked: Asked, *, first_row: int = 0) -> Crossed:
    """A measure of what was asked by one or two dimensions, `ROWS_SHOWN` rows from `first_row` on.

    Where hours are one of them they are the rows. Raises UnknownNameError on a measure that is none, InputError on
    dimensions that the measure has not.
    """
    keys = _dimensions(measure, by)
    all_rows = _ranked(ledger, measure, keys[0], asked)
    rows = dict(list(all_rows.items())[first_row : first_row + ROWS_SHOWN])
    total = _figures(ledger, measure, (), asked)[()]
    here = _only(asked, keys[0], list(rows)) if len(rows) < len(all_rows) else asked
    cells: dict[tuple[Name, Name], Value] = {}
    columns: dict[Name, Value] = {}
    others: list[Name] = []
    if len(keys) > 1 and rows:
        columns = _ranked(ledger, measure, keys[1], asked)
        if len(columns) > COLUMNS_SHOWN:
            others = list(columns)[COLUMNS_SHOWN - 1 :]
            columns = dict(list(columns.items())[: COLUMNS_SHOWN - 1])
        within = _only(here, keys[1], list(columns)) if others else here
        cells = {(r, c): value for (r, c), value in _figures(ledger, measure, keys, within).items()}
    if others:
        beyond = _figures(ledger, measure, keys[:1], _only(here, keys[1], others))
        cells |= {(row, Others.ALL): value for (row,), value in beyond.items()}
        columns[Others.ALL] = _figures(ledger, measure, (), _only(asked, keys[1], others))[()]
    return Crossed(measure, keys, rows, columns, cells, total, len(all_rows), first_row, tuple(others))


def _dimensions(measure: str, by: Sequence[str]) -> tuple[str, ...]:
    if measure not in MEASURES:
        raise UnknownNameError("measure", measure, MEASURES)
    allowed = COST_KEYS if measure == COST else METRIC_KEYS
    for name in by:
        if name not in allowed:
            raise InputError(f"{measure} is not known by {name[:50]!r}: choose of {', '.join(allowed)}")
    if not 1 <= len(by) <= 2:
        raise InputError(f"choose one or two dimensions, found {len(by)}")
    return tuple(sorted(by, key=lambda name: name != "hour"))


def _ranked(ledger: Ledger, measure: str, key: str, asked: Asked) -> dict[Name, Value]:
    """The measure by a dimension: the name with the largest cost first, hours in order of time."""
    found = {name: value for (name,), value in _figures(ledger, measure, (key,), asked).items()}
    if key == "hour":
        return dict(sorted(found.items(), key=lambda item: str(item[0])))
    costs: Mapping[Name, Any] = found
    if measure != COST:
        costs = {row[key]: row[COST] for row in ledger.cost(key, **asked).to_pylist()}
    return dict(sorted(found.items(), key=lambda item: (-costs.get(item[0], 0), item[0])))


def _only(asked: Asked, key: str, names: Sequence[Name]) -> dict[str, Any]:
    """What was asked, of these names alone; of hours, those from the first to the last."""
    if key == "hour":
        moments = [name for name in names if isinstance(name, datetime)]
        return (
            {**asked, "start": moments[0], "end": moments[-1] + timedelta(hours=1)} if moments else {**asked}
        )
    return {**asked, "where": {**asked["where"], key: list(names)}}


def _figures(
    ledger: Ledger, measure: str, keys: Sequence[str], asked: Asked
) -> dict[tuple[Name, ...], Value]:
    table = ledger.cost(*keys, **asked) if measure == COST else ledger.metric(measure, by=keys, **asked)
    return {tuple(row[k] for k in keys): row[measure] for row in table.to_pylist()}
