"""The arrays of a program, gathered in bulk: columns by variable, rows by constraint, entries as triplets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pertoken.plan._instance import Floats, Ints

Ints32 = npt.NDArray[np.int32]
INF = float("inf")


@dataclass(frozen=True)
class RowBlock:
    """Rows of one constraint: `rows` has one axis per index (entity, or entity and hour); `unit` is the row's
    unit once multiplied by `per_row` (shape of entities): what one unit of the row means outside."""

    name: str
    entities: tuple[str, ...]
    rows: Ints
    unit: str
    per_row: Floats


@dataclass(frozen=True)
class Program:
    """Arrays of the program, and where each variable and constraint lies in them."""

    cost: Floats
    cost_offset: float
    carbon: Floats
    """kgCO2e per unit of each column; NaN where unknown."""
    tokens: Floats
    objective: Floats
    objective_offset: float
    maximise: bool
    lower: Floats
    upper: Floats
    integer: npt.NDArray[np.bool_]
    row_lower: Floats
    row_upper: Floats
    start: Ints32
    index: Ints32
    value: Floats
    columns: dict[str, Ints]
    """Column numbers of each variable, shaped as in the docstring; −1 where that one does not exist."""
    blocks: tuple[RowBlock, ...]
    class_scale: Floats
    """Requests per unit of serve row and backlog column, shape (D,)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns, entries."""
        return len(self.row_lower), len(self.lower), len(self.value)


@dataclass
class Builder:
    """Triplets and bounds, gathered in bulk."""

    lower: list[Floats] = field(default_factory=list)
    upper: list[Floats] = field(default_factory=list)
    integer: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    rows: list[Ints] = field(default_factory=list)
    cols: list[Ints] = field(default_factory=list)
    values: list[Floats] = field(default_factory=list)
    row_lower: list[Floats] = field(default_factory=list)
    row_upper: list[Floats] = field(default_factory=list)
    blocks: list[RowBlock] = field(default_factory=list)
    columns: dict[str, Ints] = field(default_factory=dict)
    count: int = 0
    row_count: int = 0

    def variable(
        self, name: str, upper: Floats, *, exists: npt.NDArray[np.bool_] | None = None, lower: float | Floats = 0.0,
        integer: bool | npt.NDArray[np.bool_] = False,
    ) -> Ints:  # fmt: skip
        """New columns shaped like `upper`; those that do not exist get number −1."""
        here = (
            np.ones(upper.shape, dtype=np.bool_) if exists is None else np.broadcast_to(exists, upper.shape)
        )
        number = np.full(upper.shape, -1, dtype=np.int64)
        many = int(here.sum())
        number[here] = np.arange(self.count, self.count + many)
        self.lower.append(np.broadcast_to(np.asarray(lower, dtype=np.float64), upper.shape)[here])
        self.upper.append(upper[here])
        self.integer.append(np.broadcast_to(np.asarray(integer), upper.shape)[here])
        self.count += many
        self.columns[name] = number
        return number

    def constraint(
        self, name: str, entities: Sequence[str], lower: Floats | float, upper: Floats, unit: str,
        per_row: Floats | None = None,
    ) -> Ints:  # fmt: skip
        """New rows shaped like `upper` (entities first)."""
        rows = np.arange(self.row_count, self.row_count + upper.size, dtype=np.int64).reshape(upper.shape)
        self.row_lower.append(np.broadcast_to(np.asarray(lower, dtype=np.float64), upper.shape).ravel())
        self.row_upper.append(upper.ravel())
        self.row_count += upper.size
        scale = np.ones(len(entities)) if per_row is None else per_row
        self.blocks.append(RowBlock(name, tuple(entities), rows, unit, scale))
        return rows

    def add(self, rows: Ints, cols: Ints, values: Floats | float) -> None:
        """Entries value at (row, column), broadcast together; columns that do not exist are left out."""
        r, c, v = np.broadcast_arrays(rows, cols, np.asarray(values, dtype=np.float64))
        keep = (c >= 0) & (v != 0)
        self.rows.append(r[keep])
        self.cols.append(c[keep])
        self.values.append(v[keep])
