"""Public traces as requests: Azure 2023 and 2024, BurstGPT, Mooncake, and a plain CSV of our own.

Read in blocks by Arrow, so memory does not grow with the file. Where Arrow or a check stumbles, the file is read
again line by line, slowly, to name the line.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson

from pertoken.errors import InputError, nearest
from pertoken.perf.simulate._requests import MOST_TOKENS, Requests
from pertoken.units import GIGA, MILLISECONDS_PER_SECOND

Kind = Literal["azure", "burstgpt", "mooncake", "plain"]
_BLOCK_BYTES = 1 << 21
_MOST_PRIORITY = 15
_MOONCAKE_BLOCK_TOKENS = 512
_ZONE = re.compile(r"(Z|[+-]\d\d:?\d\d)$")


@dataclass(frozen=True)
class _Format:
    """A CSV format: the foreign name of each of our columns, and how its time is written."""

    columns: dict[str, str]
    optional: tuple[str, ...] = ()
    time: Literal["seconds", "timestamp"] = "seconds"


NAME_MAP: dict[Kind, _Format] = {
    "azure": _Format(
        {"arrival": "TIMESTAMP", "input": "ContextTokens", "output": "GeneratedTokens"}, time="timestamp"
    ),
    "burstgpt": _Format({"arrival": "Timestamp", "input": "Request tokens", "output": "Response tokens"}),
    "plain": _Format(
        {
            "arrival": "arrival_s", "input": "input_tokens", "output": "output_tokens", "priority": "priority",
            "cached": "cached_tokens",
        },
        optional=("priority", "cached"),
    ),
}  # fmt: skip
_FIELDS: list[tuple[str, pa.DataType]] = [
    ("timestamp", pa.float64()),
    ("input_length", pa.int64()),
    ("output_length", pa.int64()),
    ("hash_ids", pa.list_(pa.int64())),
]
_JSON = pa.schema(_FIELDS)


@dataclass(frozen=True)
class Trace:
    """A trace file as a source of requests; `start` is the time of its first request, where it has a date.

    rate_factor: how many times faster requests come than in the file. skip_failed: leave out requests without output
    (BurstGPT writes failed ones so) instead of refusing the file.
    """

    path: Path
    kind: Kind
    rate_factor: float = 1.0
    skip_failed: bool = False
    start: datetime | None = None
    classes: int = 1

    @property
    def block_tokens(self) -> int:
        return _MOONCAKE_BLOCK_TOKENS if self.kind == "mooncake" else 0

    def chunks(self) -> Iterator[Requests]:
        """The requests, in order of arrival; raises InputError naming the first line that cannot be used."""
        last, first, seen = -math.inf, math.nan, False
        try:
            for columns, read in _tables(self.path, self.kind):
                bad = _bad(columns, self.skip_failed, last)
                if bad:
                    raise pa.ArrowInvalid(bad)
                if not len(columns["input"]):
                    continue
                if not seen:
                    first, seen = float(columns["arrival"][0]), True
                last = float(columns["arrival"][-1])
                chunk = _requests(columns, first, self.rate_factor, self.skip_failed, read)
                if len(chunk):
                    yield chunk
        except (pa.ArrowInvalid, OSError, EOFError) as error:
            _diagnose(self.path, self.kind, self.skip_failed)
            raise InputError(f"{self.path}: {_one_line(error)}") from error
        if not seen:
            raise InputError(f"{self.path}: no requests, only a heading")


def read_trace(path: Path | str, *, rate_factor: float = 1.0, skip_failed: bool = False) -> Trace:
    """Recognise a trace file by its first line; its requests are read when it is simulated.

    Knows Azure LLM inference (TIMESTAMP,ContextTokens,GeneratedTokens), BurstGPT (Timestamp,…,Request tokens,
    Response tokens,…), Mooncake (a JSON object per line) and arrival_s,input_tokens,output_tokens with optional
    priority and cached_tokens; ``.gz`` of each. Raises InputError on an unknown heading.
    """
    path = Path(path)
    if not 0 < rate_factor < math.inf:
        raise InputError(f"rate_factor is {rate_factor}, must be positive and finite")
    with _lines(path) as file:
        lines = _text(path, file)
        number, heading = next(((n, t) for n, t in lines if t.strip()), (0, ""))
        if not number:
            raise InputError(f"{path}: the file is empty")
        if heading.lstrip().startswith("{"):
            return Trace(path, "mooncake", rate_factor, skip_failed)
        kind = _kind(path, number, _cells(heading))
        second = next((t for _, t in lines if t.strip()), "")
    start, classes = None, 1
    if NAME_MAP[kind].time == "timestamp" and second:
        index = _cells(heading).index(NAME_MAP[kind].columns["arrival"])
        try:
            start = datetime.fromisoformat(_cells(second)[index])
        except (ValueError, IndexError):
            _diagnose(path, kind, skip_failed)
            raise
    if "priority" in _cells(heading):
        classes = _MOST_PRIORITY + 1
    return Trace(path, kind, rate_factor, skip_failed, start, classes)


def _kind(path: Path, number: int, names: list[str]) -> Kind:
    for kind, form in NAME_MAP.items():
        if all(name in names for key, name in form.columns.items() if key not in form.optional):
            return kind
    wanted = {k: [n for c, n in f.columns.items() if c not in f.optional] for k, f in NAME_MAP.items()}
    best = max(wanted, key=lambda k: len(set(wanted[k]) & set(names)))
    if set(wanted[best]) & set(names):
        missing = [n for n in wanted[best] if n not in names]
        near = [m for n in missing for m in nearest(n, names, 1)]
        hint = f" (is it {', '.join(repr(n) for n in near)}?)" if near else ""
        raise InputError(f"{path}, line {number}: column {', '.join(map(repr, missing))} is missing{hint}")
    known = "; ".join(",".join(w) for w in wanted.values())
    found = ",".join(names)[:80]
    raise InputError(
        f"{path}, line {number}: no heading of a trace: found {found!r}, know {known}, or Mooncake JSON"
    )


# --- the fast way ------------------------------------------------------------------------------------------


def _tables(path: Path, kind: Kind) -> Iterator[tuple[dict[str, npt.NDArray[Any]], float]]:
    """Columns of our names, block by block, and the share of the file read."""
    with pa.OSFile(str(path), "rb") as raw:
        size = max(raw.size(), 1)
        packed = path.suffix == ".gz"
        stream: Any = pa.CompressedInputStream(raw, "gzip") if packed else raw
        if kind == "mooncake":
            options = pajson.ParseOptions(explicit_schema=_JSON, unexpected_field_behavior="ignore")
            reader = pajson.open_json(stream, pajson.ReadOptions(block_size=_BLOCK_BYTES), options)
        else:
            reader = _csv(path, kind, stream)
        for batch in reader:
            columns = _from_json(batch) if kind == "mooncake" else _from_csv(batch, NAME_MAP[kind])
            yield columns, min(1.0, raw.tell() / size)


def _csv(path: Path, kind: Kind, stream: Any) -> Any:
    form = NAME_MAP[kind]
    with _lines(path) as file:
        lines = [t for _, t in zip(range(8), (t for _, t in _text(path, file) if t.strip()), strict=False)]
    names = _cells(lines[0])
    wanted = [n for n in form.columns.values() if n in names]
    types: dict[str, pa.DataType] = {n: pa.int64() for n in wanted}
    times = form.columns["arrival"]
    types[times] = pa.float64()
    if form.time == "timestamp":
        zoned = len(lines) > 1 and _ZONE.search([*_cells(lines[1]), ""][names.index(times)])
        types[times] = pa.timestamp("ns", tz="UTC") if zoned else pa.timestamp("ns")
    return pacsv.open_csv(
        stream,
        pacsv.ReadOptions(block_size=_BLOCK_BYTES, column_names=names, skip_rows=1),
        pacsv.ParseOptions(),
        pacsv.ConvertOptions(
            column_types=types, include_columns=wanted, null_values=[], strings_can_be_null=False
        ),
    )


def _from_csv(batch: pa.RecordBatch, form: _Format) -> dict[str, npt.NDArray[Any]]:
    columns: dict[str, npt.NDArray[Any]] = {}
    for ours, theirs in form.columns.items():
        if theirs not in batch.schema.names:
            continue
        column = batch.column(theirs)
        if column.null_count:
            raise pa.ArrowInvalid(f"empty value in column {theirs}")
        if form.time == "timestamp" and ours == "arrival":
            columns[ours] = column.cast(pa.int64()).to_numpy(zero_copy_only=False) / GIGA
        else:
            columns[ours] = column.to_numpy(zero_copy_only=False)
    return columns


def _from_json(batch: pa.RecordBatch) -> dict[str, npt.NDArray[Any]]:
    for name in ("timestamp", "input_length", "output_length"):
        if name not in batch.schema.names or batch.column(name).null_count:
            raise pa.ArrowInvalid(f"a line without {name}")
    input_ = batch.column("input_length").to_numpy(zero_copy_only=False)
    columns = {
        "arrival": batch.column("timestamp").to_numpy(zero_copy_only=False) / MILLISECONDS_PER_SECOND,
        "input": input_,
        "output": batch.column("output_length").to_numpy(zero_copy_only=False),
    }
    lists: Any = (
        batch.column("hash_ids").fill_null([])
        if batch.column("hash_ids").null_count
        else batch.column("hash_ids")
    )
    offsets = lists.offsets.to_numpy().astype(np.int64)
    columns["at"] = offsets[:-1]
    columns["blocks"] = np.minimum(np.diff(offsets), input_ // _MOONCAKE_BLOCK_TOKENS)
    columns["hashes"] = lists.values.to_numpy(zero_copy_only=False)
    if len(columns["hashes"]) and columns["hashes"].min() < 0:
        raise pa.ArrowInvalid("a negative block hash")
    return columns


def _bad(columns: dict[str, npt.NDArray[Any]], skip_failed: bool, after: float) -> str:
    """What is wrong with the block; empty: nothing."""
    arrival = columns["arrival"]
    if not len(arrival):
        return ""
    if not np.isfinite(arrival).all() or arrival[0] < after or (np.diff(arrival) < 0).any():
        return "times are not in order"
    low = {"input": 1, "output": 0 if skip_failed else 1, "priority": 0, "cached": 0}
    high = {"priority": _MOST_PRIORITY}
    for name, least in low.items():
        if name in columns and not (
            least <= columns[name].min() and columns[name].max() <= high.get(name, MOST_TOKENS)
        ):
            return f"{name} out of range"
    return ""


def _requests(
    columns: dict[str, npt.NDArray[Any]], first: float, rate_factor: float, skip_failed: bool, read: float
) -> Requests:
    keep = columns["output"] > 0 if skip_failed else slice(None)

    def ints(name: str) -> npt.NDArray[np.int32] | None:
        return columns[name][keep].astype(np.int32) if name in columns else None

    input_, output = ints("input"), ints("output")
    assert input_ is not None
    assert output is not None
    return Requests(
        (columns["arrival"][keep] - first) / rate_factor,
        input_,
        output,
        ints("cached"),
        ints("priority"),
        columns["at"][keep] if "at" in columns else None,
        ints("blocks"),
        columns.get("hashes", np.zeros(0, np.int64)),
        read,
    )


# --- the slow way: which line ---------------------------------------------------------------------------------


def _lines(path: Path) -> IO[bytes]:
    try:
        file: Any = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115 (the caller's `with` closes it)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    opened: IO[bytes] = file
    return opened


def _text(path: Path, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Numbered lines; raises InputError on one that is no text."""
    number = 0
    try:
        for number, line in enumerate(file, 1):
            if b"\0" in line:
                raise InputError(f"{path}, line {number}: not a text file (a zero byte)")
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {number + 1 if number == 0 else number}: not a text file ({error.reason})"
        ) from error
    except (OSError, EOFError) as error:
        raise InputError(f"{path}, after line {number}: the file is damaged or cut short: {error}") from error


def _cells(line: str) -> list[str]:
    return [c.strip().strip('"') for c in line.split(",")]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _diagnose(path: Path, kind: Kind, skip_failed: bool) -> None:
    """Raise InputError naming the first line that cannot be used; return if there is none."""
    with _lines(path) as file:
        lines = ((n, t) for n, t in _text(path, file) if t.strip())
        names: list[str] = [] if kind == "mooncake" else _cells(next(lines, (0, ""))[1])
        last, rows = -math.inf, 0
        for number, line in lines:
            rows += 1
            try:
                row = _json_row(line) if kind == "mooncake" else _csv_row(line, names, NAME_MAP[kind])
                last = _check_row(row, last, skip_failed)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise InputError(f"{path}: no requests, only a heading")


def _csv_row(line: str, names: list[str], form: _Format) -> dict[str, Any]:
    cells = _cells(line)
    if len(cells) != len(names):
        more = "" if len(cells) > len(names) else "; is the file cut short?"
        raise ValueError(f"{len(cells)} columns where the heading has {len(names)}{more}")
    row: dict[str, Any] = {}
    for ours, theirs in form.columns.items():
        if theirs not in names:
            continue
        text = cells[names.index(theirs)]
        if ours != "arrival":
            row[ours] = _whole(theirs, text)
        elif form.time == "timestamp":
            try:
                row[ours] = datetime.fromisoformat(text).timestamp()
            except ValueError:
                raise ValueError(f"{theirs} {text!r} is not a date and time") from None
        else:
            row[ours] = _number(theirs, text)
    return row


def _json_row(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}; is the file cut short?") from error
    names = {"arrival": "timestamp", "input": "input_length", "output": "output_length"}
    if not isinstance(found, dict):
        raise ValueError(f"not a JSON object: {line[:40]!r}")
    missing = [n for n in names.values() if n not in found]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    hashes = found.get("hash_ids") or []
    if not isinstance(hashes, list) or any(not isinstance(h, int) or h < 0 for h in hashes):
        raise ValueError("hash_ids must be a list of whole numbers, none negative")
    row: dict[str, Any] = {k: _whole(n, str(found[n])) for k, n in names.items() if k != "arrival"}
    row["arrival"] = _number("timestamp", str(found["timestamp"])) / MILLISECONDS_PER_SECOND
    return row


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} {text!r} is not a whole number") from None


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} {text!r} is not a number") from None


def _check_row(row: dict[str, Any], last: float, skip_failed: bool) -> float:
    """Raise ValueError on a row that makes no sense; its time."""
    arrival = float(row["arrival"])
    if not math.isfinite(arrival):
        raise ValueError("the time is not a finite number")
    if arrival < last:
        raise ValueError(f"arrives {last - arrival:.6g} s before the line above: sort the file by time")
    for name in ("input", "output"):
        tokens = row[name]
        if name == "output" and tokens == 0 and skip_failed:
            continue
        if tokens < 1:
            hint = (
                "; a failed request? skip_failed leaves those out" if name == "output" and tokens == 0 else ""
            )
            raise ValueError(f"{tokens} {name} tokens, must be 1 or more{hint}")
        if tokens > MOST_TOKENS:
            raise ValueError(f"{tokens} {name} tokens, more than {MOST_TOKENS:,}: a mistake?")
    if not 0 <= row.get("priority", 0) <= _MOST_PRIORITY:
        raise ValueError(f"priority {row['priority']}, must lie in 0..{_MOST_PRIORITY}")
    if not 0 <= row.get("cached", 0) <= MOST_TOKENS:
        raise ValueError(f"{row['cached']} cached tokens, must lie in 0..{MOST_TOKENS:,}")
    return arrival
