"""A plan's book on its way to a service: its usage and its rates as one body, and that body read again.

As Arrow: a stream of usage rows (`tables.USAGE`) and, right after it, one of rate rows (`tables.RATES`). As NDJSON:
rows of either table, told apart by ``"table": "usage"`` and ``"table": "rates"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import msgspec
import pyarrow as pa

from pertoken.errors import InputError
from pertoken.meter.attribute import BOOK
from pertoken.meter.events import _refuse_compressed
from pertoken.tables import QUANTITY, RATE, RATES, USAGE

MAX_BODY_BYTES = 64 * 1024 * 1024
CONTENT_TYPES = {
    "application/vnd.apache.arrow.stream": "arrow",
    "application/x-ndjson": "ndjson",
    "application/jsonl": "ndjson",
}
_PREFIX = "plan:"
_LONGEST = 64
_END = b"\xff\xff\xff\xff\0\0\0\0"
"""How an Arrow stream ends; a reader takes the end of the bytes for it too."""
_CODED = pa.dictionary(pa.int32(), pa.string())


class UsageRow(msgspec.Struct, tag_field="table", tag="usage", forbid_unknown_fields=True, gc=False):
    """A row of usage; `book` goes without saying."""

    hour: datetime
    pool: str
    model: str
    tenant: str
    phase: str
    meter: str
    quantity: Decimal
    basis: str
    book: str = ""


class RateRow(msgspec.Struct, tag_field="table", tag="rates", forbid_unknown_fields=True, gc=False):
    """A row of rates."""

    hour: datetime
    pool: str
    meter: str
    category: str
    component: str
    usd_per_unit: Decimal
    basis: str
    source: str


_ROW = msgspec.json.Decoder(UsageRow | RateRow)


def book_named(name: str) -> str:
    """The book that may be put under a name: ``plan:shop`` for ``plan:shop`` or ``shop``.

    Raises InputError on ``actual``, which only the meter writes, and on a name that no scenario could have.

    >>> book_named("shop")
    'plan:shop'
    """
    short = name.removeprefix(_PREFIX)
    if name == BOOK:
        raise InputError(f"the book {BOOK!r} is what the meter found: put plan:NAME")
    good = short.isascii() and short[:1].isalnum() and all(c.isalnum() or c in " ._-" for c in short)
    if not good or len(short) > _LONGEST:
        raise InputError(
            f"no plan can be named {short[:_LONGEST]!r}: at most {_LONGEST} letters, digits, spaces and ._-"
        )
    return _PREFIX + short


def to_body(usage: pa.Table, rates: pa.Table) -> bytes:
    """Both tables as one Arrow body, texts coded."""
    sink = pa.BufferOutputStream()
    for rows in (usage, rates):
        fields = [f.with_type(_CODED) if f.type == pa.string() else f for f in rows.schema]
        packed = rows.cast(pa.schema(fields)).unify_dictionaries().combine_chunks()
        with pa.ipc.new_stream(sink, packed.schema) as stream:
            stream.write_table(packed)
    return sink.getvalue().to_pybytes()


def from_body(body: bytes, content_type: str, book: str) -> tuple[pa.Table, pa.Table]:
    """Usage and rate rows of a body; what they hold is looked at by `Ledger.put_book`.

    Raises InputError on a body that cannot be read.
    """
    if len(body) > MAX_BODY_BYTES:
        raise InputError(f"a body of {len(body)} bytes is refused: at most {MAX_BODY_BYTES} are read")
    if CONTENT_TYPES.get(content_type) == "ndjson":
        return _from_lines(body, book)
    usage, end = _stream(pa.py_buffer(body), "usage")
    rates, rest = _stream(pa.py_buffer(body)[end:], "rates")
    if end + rest != len(body):
        raise InputError(f"{len(body) - end - rest} bytes follow the two Arrow streams")
    if not body.endswith(_END):
        raise InputError("the Arrow stream of rates has no end: rows may be missing")
    return usage, rates


def _stream(body: Any, what: str) -> tuple[pa.Table, int]:
    """One table, and where its stream ends."""
    reader = pa.BufferReader(body)
    try:
        _refuse_compressed(body)
        with pa.ipc.open_stream(reader) as stream:
            table = stream.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, IndexError) as error:
        raise InputError(f"the Arrow stream of {what} cannot be read: {error}") from error
    return table.replace_schema_metadata(None), reader.tell()


def _from_lines(body: bytes, book: str) -> tuple[pa.Table, pa.Table]:
    try:
        rows = _ROW.decode_lines(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"rows cannot be read: {error}") from error
    used: list[Any] = [row for row in rows if isinstance(row, UsageRow)]
    for row in used:
        row.book = row.book or book
    return _table(used, USAGE), _table([row for row in rows if isinstance(row, RateRow)], RATES)


def _table(rows: Sequence[Any], schema: pa.Schema) -> pa.Table:
    columns = []
    for field in schema:
        values = [getattr(row, field.name) for row in rows]
        if field.name == "hour" and any(v.tzinfo is None for v in values):
            raise InputError("an hour has no time zone: end it with Z or +00:00")
        try:
            if field.type in (QUANTITY, RATE):
                columns.append(_decimals(values, field.type))
            else:
                columns.append(pa.array(values, field.type))
        except (pa.ArrowException, OverflowError, ValueError) as error:
            raise InputError(f"{field.name}: a value does not fit {field.type}: {error}") from error
    return pa.table(columns, schema=schema)


def _decimals(values: Sequence[Decimal], kind: Any) -> Any:
    """Decimals, exact: what the column cannot hold is refused and not rounded."""
    for value in values:
        if not value.is_finite():
            raise InputError(f"{value} is no number that can be counted")
    return pa.array(values, kind)
