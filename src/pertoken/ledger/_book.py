"""A book that comes from elsewhere, whole: its usage and its own rates, looked at before they are kept.

Texts stay coded: a name kept once and pointed to a million times is small as it is and huge when spelled out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pertoken.errors import InputError, nearest
from pertoken.tables import RATES, USAGE
from pertoken.units import BASES, COMPONENTS, METERS, PHASES, base_meter

_CODED = pa.dictionary(pa.int32(), pa.string())
_LONGEST = 200


def book_usage(rows: pa.Table, book: str) -> pa.Table:
    """Usage rows of that book, texts coded.

    Raises InputError on other columns, missing values, times off the hour, negative quantities, rows of another book,
    phases, meters or bases that are none.
    """
    table = _typed(rows, USAGE, "usage")
    if not table.num_rows:
        raise InputError(f"no usage row came for the book {book!r}: delete a book that is no longer wanted")
    _values(table, "book", lambda v: v == book, f"{book!r} alone is put here")
    _values(table, "phase", PHASES.__contains__, f"of {', '.join(PHASES)}", PHASES)
    _values(table, "meter", lambda v: base_meter(v) in METERS, "a meter of the list", METERS)
    if pc.min(table["quantity"]).as_py() < 0:
        raise InputError("a usage row has a negative quantity")
    return table


def book_rates(rows: pa.Table) -> pa.Table:
    """Rate rows, texts coded.

    Raises InputError on other columns, missing values, times off the hour, meters, components or bases that are none,
    a component under another category than its own.
    """
    table = _typed(rows, RATES, "rates")
    if not table.num_rows:
        raise InputError("no rate row came: a book is priced by its own rates alone, zero if it is free")
    _values(table, "meter", lambda v: base_meter(v) in METERS, "a meter of the list", METERS)
    _values(table, "component", COMPONENTS.__contains__, f"of {', '.join(COMPONENTS)}", COMPONENTS)
    pairs = table.select(["component", "category"]).group_by(["component", "category"]).aggregate([])
    for pair in pairs.to_pylist():
        if COMPONENTS[pair["component"]] != pair["category"]:
            told = f"{pair['component']} is of {COMPONENTS[pair['component']]}, not of {pair['category']!r}"
            raise InputError(f"a rate's component {told}")
    return table


def _typed(rows: pa.Table, schema: pa.Schema, what: str) -> pa.Table:
    if rows.schema.names != schema.names:
        raise InputError(f"{what} rows have the columns {rows.schema.names}, the table has {schema.names}")
    columns: dict[str, Any] = {}
    for field in schema:
        column = rows.column(field.name)
        if column.null_count:
            raise InputError(f"{what} rows lack a value in column {field.name!r}")
        columns[field.name] = _column(column, field, what)
    table = pa.table(columns)
    for field in schema:
        if field.type == pa.string():
            _values(table, field.name, _is_name, f"at most {_LONGEST} printable characters")
    _values(table, "basis", lambda v: v.partition(":")[0] in BASES, f"of {', '.join(BASES)}", BASES)
    if pc.any(pc.not_equal(pc.floor_temporal(table["hour"], unit="hour"), table["hour"])).as_py():
        raise InputError(f"{what} rows stand at full hours (UTC), one does not")
    return table


def _column(column: Any, field: Any, what: str) -> Any:
    kind = column.type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    try:
        if field.type == pa.string():
            if not (pa.types.is_string(value) or pa.types.is_large_string(value)):
                raise InputError(f"column {field.name!r} of {what} is {kind}, not text")
            if not pa.types.is_dictionary(kind):
                column = column.dictionary_encode()
            return column.cast(_CODED)
        if pa.types.is_timestamp(field.type) and not (pa.types.is_timestamp(kind) and kind.tz):
            raise InputError(f"column {field.name!r} of {what} is {kind}, not a time with its zone")
        plain = pa.types.is_decimal(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if not pa.types.is_timestamp(field.type) and not plain:
            raise InputError(f"column {field.name!r} of {what} is {kind}, not a number")
        return column.cast(field.type)
    except pa.ArrowException as error:
        raise InputError(f"column {field.name!r} of {what} cannot be read: {error}") from error


def _is_name(value: str) -> bool:
    return len(value) <= _LONGEST and (value.isprintable())


def _values(table: pa.Table, column: str, good: Callable[[str], bool], wanted: str, known: Any = ()) -> None:
    for value in map(str, pc.unique(table[column]).to_pylist()):
        if not good(value):
            near = nearest(value[:_LONGEST], known)
            hint = f": did you mean {', '.join(near)}?" if near else ""
            raise InputError(f"{column} {value[:_LONGEST]!r} is not {wanted}{hint}")
