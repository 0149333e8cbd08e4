"""Files of usage as sources: LiteLLM spend logs, API usage blocks, Langfuse, OpenCost, our own CSV and
Parquet.

Each format maps foreign names once, in `NAME_MAP`. A file is read in batches, so its size does not matter; a
line that cannot be read is refused with its number and the rest is taken.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa

from pertoken.errors import InputError
from pertoken.meter._usage_block import UsageBlock
from pertoken.meter.events import Event, from_events
from pertoken.meter.records import records
from pertoken.scenario import Api, Fleet
from pertoken.units import IDLE, SECONDS_PER_HOUR

BATCH = 50_000
MAX_JSON_BYTES = 512 * 1024 * 1024
_LONGEST_LINE = 1024 * 1024

_COLUMNS = ("key", "ts", "pool", "model", "tenant", "meter", "quantity", "phase")
_TOKENS = ("input_tokens", "cached_input_tokens", "output_tokens")
_MOST_NAMED = 20
NAME_MAP: dict[str, dict[str, tuple[str, ...]]] = {
    "litellm": {
        "key": ("request_id",),
        "ts": ("endTime", "startTime"),
        "model": ("model", "model_group"),  # the deployment; the group is a router's alias for several
        "provider": ("custom_llm_provider",),
        "tenant": ("team_id", "end_user", "user", "api_key"),
        "prompt_tokens": ("prompt_tokens",),
        "completion_tokens": ("completion_tokens",),
        "detail": ("usage_object", "additional_usage_values"),
    },
    "openai": {
        "key": ("id", "custom_id", "request_id"),
        "ts": ("created", "created_at", "timestamp"),
        "model": ("model",),
        "tenant": ("tenant", "user"),
        "provider": ("provider",),
        "usage": ("usage", "usageMetadata"),
    },
    "langfuse": {
        "key": ("id",),
        "ts": ("endTime", "startTime"),
        "model": ("model", "providedModelName", "internalModel"),
        "tenant": ("tenant", "userId", "projectId"),
        "provider": ("provider",),
        "usage": ("usageDetails", "usage"),
    },
    "opencost": {
        "tenant": ("namespace",),
        "gpu_hours": ("gpuHours",),
        "start": ("start",),
        "end": ("end",),
    },
    "pertoken": {name: (name,) for name in (*_COLUMNS, *_TOKENS)},
}
"""By format, ours to the fields that tell it; the first that is not empty counts."""

FORMATS = tuple(NAME_MAP)


class FileBatch(NamedTuple):
    """Records of a part of a file, and why some of its lines were refused."""

    records: pa.Table
    refused: list[str]


@dataclass(frozen=True)
class Where:
    """What a file does not say itself.

    `source`: ``usage/<name>`` (OpenCost: ``bill/<name>``). `pool` of all rows, or `pools` by (provider,
    model): how API calls find the fleet's API pools, see `api_pools`. `names`: a foreign model name to ours.
    """

    source: str
    pool: str = ""
    pools: Mapping[tuple[str, str], str] | None = None
    names: Mapping[str, str] | None = None


def api_pools(fleet: Fleet) -> dict[tuple[str, str], str]:
    """The fleet's API pools by (provider, model): what `Where.pools` wants."""
    return {
        (pool.price.provider, pool.price.model): name
        for name, pool in fleet.pools.items()
        if isinstance(pool.price, Api)
    }


def read(path: Path, format_name: str, where: Where, *, now_s: float) -> Iterator[FileBatch]:
    """The records of a file in batches.

    Parameters: path (.json, .jsonl, .ndjson, .csv or .parquet); format_name, one of `FORMATS`; now_s [POSIX
    s] for rows without a time. Raises InputError for a format that is none, or a file that cannot be opened at
    all.
    """
    if format_name not in NAME_MAP:
        raise InputError(f"unknown file format {format_name!r}: one of {', '.join(FORMATS)}")
    if format_name == "opencost":
        yield _opencost(_json_file(path), where)
        return
    to_event = _TO_EVENT[format_name]
    rows = _rows(path)
    at = 0
    while True:
        part = list(islice(rows, BATCH))
        if not part:
            return
        good: list[Event] = []
        refused: list[str] = []
        for number, row in enumerate(part, at + 1):
            try:
                if isinstance(row, str):
                    raise InputError(row)
                event = to_event(row, where)
                if event is not None:
                    good.append(event)
            except (InputError, msgspec.MsgspecError, ValueError, TypeError, OverflowError) as error:
                refused.append(f"row {number}: {error}")
        at += len(part)
        yield _batch(good, refused, where, now_s)


def _batch(good: list[Event], refused: list[str], where: Where, now_s: float) -> FileBatch:
    """Events as records; if one of them spoils the batch it is found by halves."""
    try:
        return FileBatch(from_events(good, source=where.source, now_s=now_s, pool=where.pool), refused)
    except InputError as error:
        if len(good) == 1:
            return FileBatch(from_events([], source=where.source, now_s=now_s), [*refused, str(error)])
    middle = len(good) // 2
    first = _batch(good[:middle], refused, where, now_s)
    second = _batch(good[middle:], first.refused, where, now_s)
    return FileBatch(pa.concat_tables([first.records, second.records]), second.refused)


def _rows(path: Path) -> Iterator[Any]:
    """Rows as dicts; a line that is none as the text why."""
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(BATCH):
                    yield from batch.to_pylist()
        elif kind == ".csv":
            with path.open(newline="", encoding="utf-8") as text:
                for row in csv.DictReader(text):
                    yield {k: v for k, v in row.items() if isinstance(k, str) and v not in ("", None)}
        elif kind in (".jsonl", ".ndjson"):
            with path.open("rb") as lines:
                yield from _json_lines(lines)
        elif kind == ".json":
            found = _json_file(path)
            listed = found.get("data", [found]) if isinstance(found, dict) else found
            yield from listed if isinstance(listed, list) else [listed]
        else:
            raise InputError(f"{path.name} is none of .json, .jsonl, .ndjson, .csv, .parquet")
    except (OSError, pa.ArrowException, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} cannot be read: {error}") from error


def _json_lines(lines: Any) -> Iterator[Any]:
    while True:
        line = lines.readline(_LONGEST_LINE + 1)
        if not line:
            return
        if len(line) > _LONGEST_LINE:
            while line and not line.endswith(b"\n"):
                line = lines.readline(_LONGEST_LINE)
            yield "the line is longer than 1 MiB"
        elif line.strip():
            try:
                yield msgspec.json.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                yield str(error)


def _json_file(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path.name} is over {MAX_JSON_BYTES} bytes: convert it to JSON lines")
        return msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path.name} cannot be read: {error}") from error


def _first(row: Mapping[str, Any], format_name: str, name: str) -> Any:
    for key in NAME_MAP[format_name].get(name, ()):
        value = row.get(key)
        if value not in (None, ""):
            return value
    return None


def _text(row: Mapping[str, Any], format_name: str, name: str) -> str:
    value = _first(row, format_name, name)
    return "" if value is None else str(value)


def _uncounted(row: Mapping[str, Any], format_name: str) -> InputError:
    """What to say of a row that tells of no tokens, and may be of another format."""
    wanted = {"litellm": ("prompt_tokens", "completion_tokens"), "pertoken": ("meter", *_TOKENS)}
    fields = [f for name in wanted.get(format_name, ("usage",)) for f in NAME_MAP[format_name][name]]
    named = [str(name)[:100] for name in row][:_MOST_NAMED]
    columns = f"columns are {', '.join(named)}" if named else "it has no columns"
    return InputError(f"no token counts found; {columns}; {format_name} tells them in {', '.join(fields)}")


def _event(row: Any, format_name: str, where: Where, usage: UsageBlock | None) -> Event | None:
    key = _text(row, format_name, "key")
    if not key:
        raise InputError(
            f"no {' or '.join(NAME_MAP[format_name]['key'])}: it tells a row sent twice from two"
        )
    model, provider = _text(row, format_name, "model"), _text(row, format_name, "provider")
    pools = where.pools or {}
    bare = model.removeprefix(f"{provider}/")
    return Event(
        key=key,
        ts=_time(_first(row, format_name, "ts")),
        pool=pools.get((provider, model)) or pools.get((provider, bare)) or where.pool,
        model=(where.names or {}).get(model, bare),
        tenant=_text(row, format_name, "tenant"),
        usage=usage,
    )


def _time(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, datetime):
        return value.replace(tzinfo=value.tzinfo or UTC).timestamp()
    if isinstance(value, int | float):
        return float(value)
    text = str(value)
    try:
        return float(text)
    except ValueError:
        moment = datetime.fromisoformat(text)
        # Logs of databases write UTC without saying so.
        return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()


def _usage(value: Any) -> UsageBlock:
    return msgspec.convert(value, UsageBlock, strict=False)


def _litellm(row: Any, where: Where) -> Event | None:
    """One row of LiteLLM_SpendLogs. A hit of LiteLLM's own response cache reached no engine: no tokens."""
    if not isinstance(row, dict):
        raise InputError("the row is no object")
    if str(row.get("cache_hit", "")).lower() == "true" or str(row.get("status", "")).lower() == "failure":
        return None
    metadata = row.get("metadata")
    if isinstance(metadata, str) and metadata.strip().startswith("{"):
        metadata = msgspec.json.decode(metadata)
    detail = _first(metadata, "litellm", "detail") if isinstance(metadata, dict) else None
    counts = {name: _first(row, "litellm", name) for name in ("prompt_tokens", "completion_tokens")}
    if not _counts(detail) and all(v is None for v in counts.values()):
        raise _uncounted(row, "litellm")
    block = {
        **(detail if isinstance(detail, dict) else {}),
        **{k: v for k, v in counts.items() if v is not None},
    }
    return _event(row, "litellm", where, _usage(block))


def _openai(row: Any, where: Where) -> Event | None:
    """A response with its usage block: OpenAI, Anthropic or Gemini, alone or in a batch's output file."""
    if not isinstance(row, dict):
        raise InputError("the row is no object")
    inner = row.get("response")
    if isinstance(inner, dict):
        body = inner.get("body", inner)
        row = {**(body if isinstance(body, dict) else {}), "custom_id": row.get("custom_id"), **_outer(row)}
    block = _first(row, "openai", "usage")
    if not block and _is_no_answer(row):
        return None
    if not _counts(block):
        raise _uncounted(row, "openai")
    return _event(row, "openai", where, _usage(block))


def _is_no_answer(row: Mapping[str, Any]) -> bool:
    """A list, a part of a stream, or a call that failed: none of them has tokens of its own."""
    return bool(row.get("error")) or row.get("object") in ("list", "chat.completion.chunk")


def _counts(block: Any) -> bool:
    """Whether a usage block counts anything."""
    return isinstance(block, Mapping) and any(str(value).isdigit() for value in block.values())


def _outer(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("tenant", "user", "timestamp", "provider") if row.get(name)}


def _langfuse(row: Any, where: Where) -> Event | None:
    """An observation of a Langfuse export. In `usageDetails` every ``input*`` adds to the prompt, unless the
    total says that details stand inside ``input`` and ``output``."""
    if not isinstance(row, dict):
        raise InputError("the row is no object")
    if str(row.get("type", "GENERATION")).upper() != "GENERATION":
        return None
    first, second = NAME_MAP["langfuse"]["usage"]
    details = row.get(first)
    if isinstance(details, str):
        details = msgspec.json.decode(details)
    if not isinstance(details, dict) or not details:
        usage = row.get(second)
        details = usage if isinstance(usage, dict) else {}
    counts = {k: int(v) for k, v in details.items() if isinstance(v, int | float | str) and str(v).isdigit()}
    if not counts:
        if str(row.get("level", "")).upper() == "ERROR":
            return None  # the call failed
        raise _uncounted(row, "langfuse")
    inputs = {k: v for k, v in counts.items() if k.startswith(("input", "prompt", "cache_"))}
    outputs = {k: v for k, v in counts.items() if k.startswith(("output", "completion"))}
    plain_in = counts.get("input", counts.get("prompt_tokens", 0))
    plain_out = counts.get("output", counts.get("completion_tokens", 0))
    inside = counts.get("total", -1) == plain_in + plain_out
    block = UsageBlock(
        prompt_tokens=plain_in if inside else sum(inputs.values()),
        completion_tokens=plain_out if inside else sum(outputs.values()),
        cache_read_input_tokens=sum(v for k, v in inputs.items() if "cache" in k and "creat" not in k),
    )
    return _event(row, "langfuse", where, block)


def _own(row: Any, where: Where) -> Event | None:
    """Our own columns, as `events.Event`; token columns make a usage block."""
    if not isinstance(row, dict):
        raise InputError("the row is no object")
    tokens = {k: row[k] for k in _TOKENS if row.get(k) is not None}
    if not tokens and row.get("meter") is None:
        raise _uncounted(row, "pertoken")
    plain = {k: v for k, v in row.items() if k not in tokens and v is not None}
    unknown = set(plain) - set(NAME_MAP["pertoken"])
    if unknown:
        raise InputError(f"unknown column {sorted(unknown)[0]!r}: one of {', '.join(NAME_MAP['pertoken'])}")
    if not plain.get("key"):
        raise InputError("no key: it tells a row sent twice from two")
    if tokens:
        plain["usage"] = {"cached_input_tokens": 0, **tokens}
    plain["ts"] = _time(plain.get("ts"))
    plain.setdefault("pool", where.pool)
    if "model" in plain:
        plain["model"] = (where.names or {}).get(str(plain["model"]), str(plain["model"]))
    return msgspec.convert(plain, Event, strict=False)


_TO_EVENT: dict[str, Callable[[Any, Where], Event | None]] = {
    "litellm": _litellm,
    "openai": _openai,
    "langfuse": _langfuse,
    "pertoken": _own,
}


_NOBODYS = {"__idle__": IDLE, "__unallocated__": ""}
"""OpenCost's names of what no namespace holds, and ours."""


def _opencost(found: Any, where: Where) -> FileBatch:
    """OpenCost's allocation API: GPU-hours per namespace, spread evenly over the hours of each window.

    Its costs are not taken: hours are, and our rates price them.
    """
    windows = found.get("data") if isinstance(found, dict) else None
    if not isinstance(windows, list):
        raise InputError("an OpenCost answer has its allocations under 'data'")
    rows: list[tuple[float, str, str, float]] = []
    refused: list[str] = []
    for window in windows:
        for name, allocation in (window or {}).items() if isinstance(window, dict) else ():
            try:
                rows += _allocation(name, allocation)
            except (InputError, ValueError, TypeError, KeyError, OverflowError) as error:
                refused.append(f"{name}: {error}")
    source = f"bill/{where.source.partition('/')[2]}"
    columns = {
        "ts": [r[0] for r in rows],
        "source": source,
        "key": [r[1] for r in rows],
        "pool": where.pool,
        "tenant": [r[2] for r in rows],
        "phase": "idle",
        "meter": "gpu_hours",
        "quantity": [r[3] for r in rows],
    }
    return FileBatch(records(columns, len(rows)), refused)


def _allocation(name: str, allocation: Any) -> Iterator[tuple[float, str, str, float]]:
    if not isinstance(allocation, dict):
        raise InputError("it is no allocation")
    properties = allocation.get("properties") or {}
    (field,) = NAME_MAP["opencost"]["gpu_hours"]
    if field not in allocation:
        named = ", ".join(str(f)[:100] for f in [*allocation][:_MOST_NAMED])
        raise InputError(f"no {field} found; fields are {named}")
    hours = float(allocation[field] or 0.0)
    tenant = str(properties.get(NAME_MAP["opencost"]["tenant"][0]) or name)
    tenant = _NOBODYS.get(tenant, tenant)
    start, end = (_moment(allocation[NAME_MAP["opencost"][edge][0]]) for edge in ("start", "end"))
    if not start < end or end - start > timedelta(days=366):
        raise InputError(f"its window from {start} to {end} is none")
    if not hours:
        return
    length = (end - start).total_seconds()
    at = start.timestamp()
    while at < end.timestamp():
        border = min((at // SECONDS_PER_HOUR + 1) * SECONDS_PER_HOUR, end.timestamp())
        cluster = properties.get("cluster", "")
        yield at, f"{cluster}/{name}@{at:.0f}-{border:.0f}", tenant, hours * (border - at) / length
        at = border


def _moment(text: Any) -> datetime:
    moment = datetime.fromisoformat(str(text))
    return moment.replace(tzinfo=moment.tzinfo or UTC)
