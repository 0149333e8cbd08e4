"""What every source yields: rows of one schema, `RECORDS`, and the closed lists of what may stand in them.

A record says: at `ts`, `source` counted `quantity` of `meter`. Its identity is (source, key, phase, meter),
so a delivery repeated is the same record. `source` is ``kind/name``; the kind says what it can vouch for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pertoken.errors import InputError, UnknownNameError
from pertoken.units import BASES, METERS, MICROSECONDS_PER_SECOND, PHASES, SECONDS_PER_HOUR, base_meter

TIMESTAMP: pa.DataType = pa.timestamp("us", tz="UTC")
TEXT: pa.DataType = pa.string()
NUMBER: pa.DataType = pa.float64()
RECORDS = pa.schema(
    [
        ("ts", TIMESTAMP),
        ("source", TEXT),
        ("key", TEXT),
        ("pool", TEXT),
        ("model", TEXT),
        ("tenant", TEXT),
        ("phase", TEXT),
        ("meter", TEXT),
        ("quantity", NUMBER),
        ("basis", TEXT),
    ]
)
TEXT_COLUMNS = tuple(f.name for f in RECORDS if f.type == TEXT)

TOTALS = pa.schema(
    [
        ("hour", TIMESTAMP),
        *[(name, TEXT) for name in TEXT_COLUMNS if name != "key"],
        ("quantity", NUMBER),
    ]
)
"""Records summed by hour and everything but the key: what attribution reads."""

KINDS: dict[str, str] = {
    "engine": "an inference engine's own counters: what the hardware did",
    "device": "GPU counters (DCGM, NVML): energy and activity of boards",
    "node": "whole-machine energy (Kepler, a PDU): GPUs and host together",
    "site": "a utility meter",
    "gateway": "a router's or frontend's counters in front of engines",
    "usage": "usage events, one per request: who asked",
    "training": "a training run's log",
    "bill": "an allocation or a bill: hours held",
}
"""Kind of source, the part of `source` before the slash."""


STEPPED = "measured:prompt_length"
"""Basis of tokens that were put into their price step on arrival, see `_steps.stepped`."""


@dataclass(frozen=True)
class Evidence:
    """A counted thing that is no meter of the ledger: attribution reads it."""

    name: str
    unit: str
    about: str


EVIDENCE: dict[str, Evidence] = {
    e.name: e
    for e in (
        Evidence("prompt_tokens", "token", "prompt tokens, cached ones included"),
        Evidence("prefill_seconds", "s", "engine time in prefill, summed over requests"),
        Evidence("decode_seconds", "s", "engine time in decode, summed over requests"),
        Evidence("running_seconds", "s", "time an instance had at least one request running"),
        Evidence("active_seconds", "GPU·s", "time GPUs were active, summed over GPUs"),
        Evidence("seen_seconds", "s", "time an instance was observed"),
        Evidence("gpu_seen_seconds", "GPU·s", "time GPUs were observed, summed over GPUs"),
        Evidence("gap_seconds", "s", "time a source was silent and nothing is known"),
        Evidence("held_gpus", "GPU·s", "GPUs an instance held, times the seconds it was observed"),
        Evidence(
            "held_unseen", "GPU·s", "GPUs held over a silence that their process or counter ran through"
        ),
        Evidence("drafted_tokens", "token", "draft tokens proposed by speculative decoding"),
        Evidence("accepted_draft_tokens", "token", "draft tokens that were kept"),
        Evidence("preemptions", "preemption", "requests preempted and computed again"),
        Evidence("aborted_requests", "request", "requests that were aborted or failed"),
        Evidence("aborted_tokens", "token", "tokens generated for requests that were aborted or failed"),
    )
}

PHASE_OF: dict[str, str] = {
    "input_tokens": "input",
    "cached_input_tokens": "input",
    "prompt_tokens": "input",
    "prefill_seconds": "input",
    "training_tokens": "training",
    "lost_training_tokens": "waste",
    "recomputed_tokens": "waste",
    "aborted_requests": "waste",
    "aborted_tokens": "waste",
    "preemptions": "waste",
    "gap_seconds": "idle",
}
"""Phase of a meter where its source names none; ``output`` for the rest."""

_LARGEST = 1e12  # beyond this a quantity no longer fits DECIMAL(19, 6) once summed over an hour
LONGEST_NAME = 512


def phase_of(meter: str) -> str:
    """The phase a meter belongs to where its source names none.

    >>> phase_of("cached_input_tokens"), phase_of("requests")
    ('input', 'output')
    """
    return PHASE_OF.get(base_meter(meter), "output")


def records(columns: Mapping[str, Any], rows: int) -> pa.Table:
    """A table of `RECORDS` from columns; a text in place of a column holds for all `rows`.

    `ts` may be POSIX seconds (floats) or an Arrow timestamp array. `phase` and `basis` may be left out: the
    meter's own phase, ``measured``. Raises InputError on a value that does not belong, see `checked`.
    """
    arrays: list[Any] = []
    for field in RECORDS:
        value = columns.get(field.name)
        if field.name == "phase" and value is None:
            meters = columns["meter"]
            value = phase_of(meters) if isinstance(meters, str) else _phases(meters)
        if field.name == "basis" and value is None:
            value = "measured"
        if value is None:
            value = ""
        if isinstance(value, str):
            arrays.append(pa.repeat(value, rows))
        elif field.name == "ts":
            arrays.append(times(value))
        else:
            arrays.append(_array(value, field))
    return checked(pa.table(arrays, schema=RECORDS))


def times(value: Any) -> Any:
    """POSIX seconds or timestamps as Arrow UTC microseconds. Raises InputError on a time no calendar has."""
    if isinstance(value, pa.Array | pa.ChunkedArray) and pa.types.is_timestamp(value.type):
        return value.cast(TIMESTAMP)
    seconds = np.asarray(value, dtype=np.float64)
    if not np.isfinite(seconds).all() or (np.abs(seconds) > 1e11).any():
        raise InputError("a time is not a POSIX time in seconds")
    return pa.array(np.round(seconds * MICROSECONDS_PER_SECOND).astype("datetime64[us]")).cast(TIMESTAMP)


def empty() -> pa.Table:
    """No records."""
    return RECORDS.empty_table()


def concat(tables: Iterable[pa.Table]) -> pa.Table:
    """All records of the tables, in order."""
    parts = [t for t in tables if t.num_rows]
    return pa.concat_tables(parts) if parts else empty()


def checked(table: pa.Table) -> pa.Table:
    """The table, if every row may enter the journal.

    Raises InputError, naming the first such row by its key, on missing values, quantities that are negative, not
    finite or beyond 1e12, names longer than 512 characters, sources without a known kind, unknown phases and
    meters.
    """
    check_columns(table)
    try:
        return _checked(table)
    except InputError as error:
        bad = table
        while bad.num_rows > 1:  # by halves: what is refused costs at most twice what is taken
            half = bad.slice(0, bad.num_rows // 2)
            try:
                _checked(half)
                bad = bad.slice(half.num_rows)
            except InputError:
                bad = half
        key = str(bad.column("key")[0].as_py())[:100]
        try:
            _checked(bad)
        except InputError as its:
            raise InputError(f"the record of key {key!r}: {its}") from its
        raise AssertionError("a table is bad and each half of it good") from error


def _checked(table: pa.Table) -> pa.Table:
    check_quantities(table.column("quantity").to_numpy())
    texts = {name: pc.unique(table.column(name)).to_pylist() for name in TEXT_COLUMNS if name != "key"}
    check_texts({name: [str(v) for v in values] for name, values in texts.items()})
    check_keys(table.column("key"))
    return table


def check_columns(table: pa.Table) -> None:
    """Raises InputError unless the columns are those of `RECORDS`, none with a missing value."""
    if table.schema != RECORDS:
        raise InputError(f"records have the columns {table.schema.names}, they need {RECORDS.names}")
    for name in table.column_names:
        if table.column(name).null_count:
            raise InputError(f"records lack a value in column {name!r}")


def check_quantities(quantity: npt.NDArray[np.float64]) -> None:
    """Raises InputError on quantities that are negative, not finite or beyond 1e12."""
    good = (quantity >= 0) & (quantity <= _LARGEST)
    if not good.all():
        bad = quantity[~good][0]
        raise InputError(f"a quantity of {bad} cannot be counted: it must lie between 0 and {_LARGEST:g}")


def check_keys(keys: Any) -> None:
    """Raises InputError on keys longer than 512 bytes."""
    longest = pc.max(pc.binary_length(keys)).as_py()
    if longest is not None and longest > LONGEST_NAME:
        raise InputError(f"a key is {longest} bytes long, at most {LONGEST_NAME} are taken")


def check_texts(texts: Mapping[str, Iterable[str]]) -> None:
    """Raises InputError on values of text columns that are too long or in none of the closed lists."""
    for name, values in texts.items():
        for value in values:
            if len(value.encode()) > LONGEST_NAME:
                raise InputError(f"a {name} is longer than {LONGEST_NAME} bytes: {value[:40]!r}…")
            if name == "meter" and not value:
                raise InputError("it has neither a meter nor a usage block: give one of them")
            if name == "meter" and base_meter(value) not in METERS and value not in EVIDENCE:
                raise _unknown("meter", value, [*METERS, *EVIDENCE])
            if name == "phase" and value not in PHASES:
                raise _unknown("phase", value, PHASES)
            if name == "basis" and value.partition(":")[0] not in BASES:
                raise _unknown("basis", value, BASES)
            if name == "source":
                kind, slash, rest = value.partition("/")
                if kind not in KINDS or not slash or not rest:
                    raise InputError(f"source {value!r} is not kind/name with a kind of {', '.join(KINDS)}")


def _unknown(kind: str, name: str, known: Collection[str]) -> InputError:
    error = UnknownNameError(kind, name, known)
    return error if error.nearest else InputError(f"unknown {kind} {name[:100]!r}: one of {', '.join(known)}")


def totals(table: pa.Table) -> pa.Table:
    """Records summed to `TOTALS`, sorted; the same to the bit in whatever order the records came.

    >>> rows = records({"ts": [0.0, 1.0], "source": "usage/a", "key": ["1", "2"], "meter": "requests",
    ...                 "quantity": [1.0, 2.0]}, 2)
    >>> totals(rows).column("quantity").to_pylist()
    [3.0]
    """
    return summed([sums_of(table)])


def sums_of(table: pa.Table) -> Sums:
    """Exact sums of records, for `summed`."""
    codes: list[npt.NDArray[Any]] = []
    texts: list[list[str]] = []
    for name in TEXT_COLUMNS:
        if name != "key":
            column = table.column(name).combine_chunks().dictionary_encode()
            codes.append(column.indices.to_numpy(zero_copy_only=False))
            texts.append([str(t) for t in column.dictionary.to_pylist()])
    ts = table.column("ts").combine_chunks().cast(pa.int64()).to_numpy(zero_copy_only=False)
    return partial_sums(ts, table.column("quantity").to_numpy(), codes, texts)


Sums = dict[tuple[Any, ...], tuple[int, int]]
"""Exact sums by (hour, texts…): whole units, and 2⁻³⁶ units."""

_FINE = 2.0**36


def partial_sums(
    ts: npt.NDArray[np.int64],
    quantity: npt.NDArray[np.float64],
    codes: Sequence[npt.NDArray[Any]],
    texts: Sequence[Sequence[str]],
) -> Sums:
    """Sums of rows whose text columns are coded. Integers all through, so that order does not matter."""
    if not len(ts):
        return {}
    hour = ts // (SECONDS_PER_HOUR * MICROSECONDS_PER_SECOND)
    first = int(hour.min())
    combined = hour - first
    for column, values in zip(codes, texts, strict=True):
        combined = combined * len(values) + column
    if int(combined.max()) < 1 << 16:  # few combinations: counted rather than sorted
        at = np.full(1 << 16, -1)
        at[combined] = np.arange(len(combined))
        filled = np.flatnonzero(at >= 0)
        place = np.zeros(1 << 16, np.int64)
        place[filled] = np.arange(len(filled))
        at, inverse = at[filled], place[combined]
    else:
        _, at, inverse = np.unique(combined, return_index=True, return_inverse=True)
    whole = np.floor(quantity)
    fine = np.rint((quantity - whole) * _FINE).astype(np.int64)
    wholes, fines = np.zeros(len(at), np.int64), np.zeros(len(at), np.int64)
    np.add.at(wholes, inverse, whole.astype(np.int64))
    np.add.at(fines, inverse, fine)
    return {
        (int(hour[row]), *(values[int(c[row])] for c, values in zip(codes, texts, strict=True))): (
            int(w),
            int(f),
        )
        for row, w, f in zip(at.tolist(), wholes, fines, strict=True)
    }


def summed(parts: Iterable[Sums]) -> pa.Table:
    """Partial sums added up to one table of `TOTALS`."""
    total: dict[tuple[Any, ...], list[int]] = {}
    for part in parts:
        for key, (whole, fine) in part.items():
            into = total.setdefault(key, [0, 0])
            into[0] += whole
            into[1] += fine
    keys = sorted(total)
    columns: list[Any] = [
        pa.array([k[0] * SECONDS_PER_HOUR * MICROSECONDS_PER_SECOND for k in keys], pa.int64()).cast(
            TIMESTAMP
        )
    ]
    columns += [pa.array([k[i + 1] for k in keys], pa.string()) for i in range(len(TOTALS) - 2)]
    columns.append(pa.array([total[k][0] + total[k][1] / _FINE for k in keys], pa.float64()))
    return pa.table(columns, schema=TOTALS)


def refuse_times(table: pa.Table, earliest: datetime, latest: datetime) -> pa.Table:
    """The table, if all its times lie within [earliest, latest]. Raises InputError, naming the first that
    does not.

    A sender whose clock jumped is refused at the door: its rows would open hours that nobody will close.
    """
    if not table.num_rows:
        return table
    span: Any = pc.min_max(table.column("ts")).as_py()
    for moment in (span["min"], span["max"]):
        if not earliest <= moment <= latest:
            raise InputError(
                f"a record is dated {moment.isoformat()}, "
                f"outside {earliest.isoformat()} to {latest.isoformat()}: "
                "check the sender's clock"
            )
    return table


def _phases(meters: Any) -> Any:
    encoded = (meters if isinstance(meters, pa.Array) else pa.array(meters, pa.string())).dictionary_encode()
    phases = pa.array([phase_of(m or "") for m in encoded.dictionary.to_pylist()], pa.string())
    return phases.take(encoded.indices)


def _array(value: Any, field: Any) -> Any:
    try:
        if isinstance(value, pa.Array | pa.ChunkedArray):
            return value.cast(field.type)
        return pa.array(value, field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, UnicodeError) as error:
        raise InputError(f"column {field.name!r} does not hold {field.type}: {error}") from error
