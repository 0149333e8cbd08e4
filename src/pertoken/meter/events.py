"""Usage events as bodies of HTTP requests (JSON, NDJSON, Arrow IPC) become records.

An event has a `key` its sender never uses twice, a time, a pool and model, a tenant, and either one `meter`
with a `quantity`, or the `usage` block of an API's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pertoken.errors import InputError
from pertoken.meter._models import known_as
from pertoken.meter._usage_block import UsageBlock, tokens
from pertoken.meter.records import RECORDS, check_texts, checked, empty, phase_of, records
from pertoken.scenario import Api, Fleet
from pertoken.units import MICROSECONDS_PER_SECOND

MAX_BODY_BYTES = 32 * 1024 * 1024
MAX_EVENTS = 1_000_000
_MOST_NAMED = 20
_MOST_SPELLED = 4 * MAX_BODY_BYTES
"""Bytes of a coded column once each row has its own text."""
CONTENT_TYPES = {
    "application/json": "json",
    "application/x-ndjson": "ndjson",
    "application/jsonl": "ndjson",
    "application/vnd.apache.arrow.stream": "arrow",
}


class Event(msgspec.Struct, gc=False, forbid_unknown_fields=True, kw_only=True):
    """One event. `ts`: POSIX seconds or ISO 8601 with a zone; without it, the time of receipt."""

    key: str
    ts: float | datetime | None = None
    pool: str = ""
    model: str = ""
    tenant: str = ""
    meter: str = ""
    quantity: float = 0.0
    phase: str = ""
    usage: UsageBlock | None = None


class _Plain(msgspec.Struct, gc=False, forbid_unknown_fields=True, kw_only=True):
    """The event most senders send: a meter, a quantity, a time in seconds. Fewer fields are read in less time."""

    key: str
    ts: float
    pool: str = ""
    model: str = ""
    tenant: str = ""
    meter: str = ""
    quantity: float = 0.0


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    events: list[Event]


_LIST = msgspec.json.Decoder(list[Event])
_ONE = msgspec.json.Decoder(Event)
_MANY = msgspec.json.Decoder(_Envelope)
_PLAIN_LIST = msgspec.json.Decoder(list[_Plain])
_PLAIN = msgspec.json.Decoder(_Plain)


def read(
    body: bytes, content_type: str, *, source: str, now_s: float, pool: str = "", tenant: str = ""
) -> pa.Table:
    """The records of a body.

    Parameters: content_type, one of `CONTENT_TYPES`; source, ``usage/<who>``, set by us and never by the
    sender; now_s [POSIX s]; `pool` where events name none; `tenant`, where given, in place of what events
    say (a tenant's token may write for that tenant alone).
    Raises InputError on a body that cannot be read, naming event and field; then no record of it counts.
    """
    if len(body) > MAX_BODY_BYTES:
        raise InputError(f"a body of {len(body)} bytes is refused: at most {MAX_BODY_BYTES} are read")
    form = CONTENT_TYPES.get(content_type.partition(";")[0].strip().lower())
    if form is None:
        raise InputError(f"content type {content_type!r} is none of {', '.join(CONTENT_TYPES)}")
    if form == "arrow":
        return _from_arrow(body, source, now_s, pool, tenant)
    plain = _plain_events(body, form)
    if plain:
        return _from_plain(plain, source, now_s, pool, tenant)
    return from_events(_decoded(body, form), source=source, now_s=now_s, pool=pool, tenant=tenant)


def from_events(
    events: Sequence[Event], *, source: str, now_s: float, pool: str = "", tenant: str = ""
) -> pa.Table:
    """The records of events; parameters as for `read`."""
    if len(events) > MAX_EVENTS:
        raise InputError(f"{len(events)} events in one body: at most {MAX_EVENTS} are taken")
    if not events:
        return empty()
    blocks = _column(events, "usage")
    if any(blocks):
        plain = [e for e in events if e.usage is None]
        used = [e for e in events if e.usage is not None]
        parts = [from_events(plain, source=source, now_s=now_s, pool=pool, tenant=tenant)] if plain else []
        return pa.concat_tables([*parts, _from_usage(used, source, now_s, pool, tenant)])
    return _from_plain(events, source, now_s, pool, tenant, _column(events, "phase"))


def _plain_events(body: bytes, form: str) -> list[_Plain]:
    """The events of a list of plain ones; nothing where they are of another form, which the full decoder judges."""
    if b'"usage"' in body or b'"phase"' in body or (form == "json" and body[:1] != b"["):
        return []
    try:
        return _PLAIN.decode_lines(body) if form == "ndjson" else _PLAIN_LIST.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return []


def _from_plain(
    events: Sequence[Event | _Plain],
    source: str,
    now_s: float,
    pool: str,
    tenant: str,
    phases: Sequence[str] = (),
) -> pa.Table:
    if len(events) > MAX_EVENTS:
        raise InputError(f"{len(events)} events in one body: at most {MAX_EVENTS} are taken")
    count = len(events)
    columns = {
        **_shared(events, source, now_s, pool, tenant),
        "meter": pa.array(_column(events, "meter"), pa.string()),
        "quantity": np.fromiter(map(attrgetter("quantity"), events), np.float64, count),
    }
    if any(phases):
        usual = _column(events, "meter")
        columns["phase"] = [p or phase_of(m) for p, m in zip(phases, usual, strict=True)]
    return records(columns, count)


def _from_usage(events: Sequence[Event], source: str, now_s: float, pool: str, tenant: str) -> pa.Table:
    """Four rows a request: computed input, cached input, output, and the request itself; zero counts leave
    none."""
    counts = np.empty((len(events), 4))
    for at, event in enumerate(events):
        if event.meter or event.quantity or event.phase:
            raise InputError(f"event {event.key!r} has both usage and meter: give one of them")
        assert event.usage is not None
        try:
            counts[at] = (*tokens(event.usage), 1)
        except InputError as error:
            raise InputError(f"event {event.key!r}: {error}") from error
    shared = pa.table(_shared(events, "", now_s, pool, tenant))
    row_of, meter_of = np.nonzero(counts)
    names = pa.array(["input_tokens", "cached_input_tokens", "output_tokens", "requests"])
    picked = shared.take(pa.array(row_of.tolist(), pa.int64()))
    columns: dict[str, Any] = {name: picked.column(name) for name in picked.column_names}
    columns["source"] = source
    columns["meter"] = names.take(pa.array(meter_of.tolist(), pa.int64()))
    columns["quantity"] = counts[row_of, meter_of]
    return records(columns, len(row_of))


def _decoded(body: bytes, form: str) -> list[Event]:
    try:
        if form == "ndjson":
            return _ONE.decode_lines(body)
        first = body.lstrip()[:1]
        if first == b"[":
            return _LIST.decode(body)
        # An object is one event, or a list of them under "events".
        return _MANY.decode(body).events if b'"events"' in body[:64] else [_ONE.decode(body)]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"events cannot be read: {error}") from error


def _column(events: Sequence[Event | _Plain], name: str) -> list[Any]:
    return list(map(attrgetter(name), events))


def _shared(
    events: Sequence[Event | _Plain], source: str, now_s: float, pool: str, tenant: str
) -> dict[str, Any]:
    keys = _column(events, "key")
    if not all(keys):
        raise InputError("an event has an empty key: give each one that is never used twice")
    pools = _column(events, "pool")
    columns: dict[str, Any] = {
        "ts": pa.array((_times(events, now_s) * MICROSECONDS_PER_SECOND).round().astype("datetime64[us]")),
        "key": pa.array(keys, pa.string()),
        "pool": pa.array([p or pool for p in pools] if pool else pools, pa.string()),
        "model": pa.array(_column(events, "model"), pa.string()),
        "tenant": pa.repeat(tenant, len(keys))
        if tenant
        else pa.array(_column(events, "tenant"), pa.string()),
    }
    return columns | ({"source": source} if source else {})


def _times(events: Sequence[Event | _Plain], now_s: float) -> npt.NDArray[np.float64]:
    get = attrgetter("ts")
    if isinstance(events[0], _Plain):
        seconds = np.fromiter(map(get, events), np.float64, len(events))
    else:
        seconds = np.asarray([_time(get(e), now_s) for e in events], np.float64)
    if not (np.abs(seconds) < 1e11).all():
        raise InputError("an event's ts is no POSIX time in seconds")
    return seconds


def _time(value: float | datetime | None, now_s: float) -> float:
    if value is None:
        return now_s
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise InputError(f"an event's ts {value.isoformat()} has no time zone: end it with Z or +00:00")
        return value.timestamp()
    return value


def _from_arrow(body: bytes, source: str, now_s: float, pool: str, tenant: str) -> pa.Table:
    table = _streamed(body)
    known = {"ts", "key", "pool", "model", "tenant", "meter", "quantity", "phase"}
    unknown = set(table.column_names) - known
    missing = {"key", "meter", "quantity"} - set(table.column_names)
    if unknown or missing or len(set(table.column_names)) != table.num_columns:
        raise InputError(
            f"an Arrow stream needs key, meter, quantity and may have {', '.join(sorted(known))}; "
            f"found {', '.join(table.column_names)}"
        )
    columns: dict[str, Any] = {name: _plain(table, name) for name in table.column_names}
    columns |= {"source": source}
    if "ts" not in columns:
        columns["ts"] = np.full(table.num_rows, now_s)
    if tenant:
        columns["tenant"] = tenant
    if pool and "pool" not in columns:
        columns["pool"] = pool
    rows = records(columns, table.num_rows)
    if table.num_rows and not pc.min(pc.binary_length(rows.column("key"))).as_py():
        raise InputError("an event has an empty key: give each one that is never used twice")
    return rows


def read_records(body: bytes) -> pa.Table:
    """Whole records (`records.RECORDS`) as an Arrow stream, as `pertoken import` sends them to a service.

    Raises InputError on a stream that cannot be read, has other columns or rows that do not belong.
    """
    return checked(_streamed(body).replace_schema_metadata(None))


def _streamed(body: bytes) -> pa.Table:
    """The rows of an Arrow stream. Raises InputError where it cannot be read, is compressed inside, or holds too
    many."""
    try:
        _refuse_compressed(body)
        with pa.ipc.open_stream(body) as stream:
            table = stream.read_all()
        if table.num_rows > MAX_EVENTS:
            raise InputError(f"{table.num_rows} rows in one body: at most {MAX_EVENTS} are taken")
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, IndexError) as error:
        raise InputError(f"an Arrow stream cannot be read: {error}") from error
    return table


def _plain(table: pa.Table, name: str) -> Any:
    column = table.column(name)
    kind = column.type
    coded = pa.types.is_dictionary(kind)
    value = kind.value_type if coded else kind
    if name in ("ts", "quantity"):
        good = pa.types.is_integer(value) or pa.types.is_floating(value) or pa.types.is_timestamp(value)
    else:
        good = pa.types.is_string(value) or pa.types.is_large_string(value)
    if not good or (coded and name in ("ts", "quantity")):
        raise InputError(f"column {name!r} of an Arrow stream is {kind}, not {RECORDS.field(name).type}")
    try:
        if coded:
            # A text kept once and pointed to a million times is small here and huge when spelled out.
            chunks: list[Any] = column.chunks
            spelled = 0
            for chunk in chunks:
                check_texts({name: [str(t) for t in chunk.dictionary.to_pylist()]})
                lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
                spelled += pc.sum(lengths.cast(pa.int64())).as_py() or 0
            if spelled > _MOST_SPELLED:
                raise InputError(
                    f"column {name!r} spells out to {spelled} bytes: at most {_MOST_SPELLED} are taken"
                )
        if name == "ts" and not pa.types.is_timestamp(value):
            return column.cast(pa.float64()).to_numpy()
        return column.cast(RECORDS.field(name).type).combine_chunks()
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"column {name!r} of an Arrow stream cannot be read: {error}") from error


def _refuse_compressed(body: bytes) -> None:
    """Raises InputError where a batch is compressed: a small body could unpack to more than the machine
    has."""
    reader = pa.BufferReader(body)
    while True:
        try:
            message = pa.ipc.read_message(reader)
        except EOFError:
            return
        if message.type in ("record batch", "dictionary") and _compressed(message.metadata.to_pybytes()):
            raise InputError("an Arrow stream is compressed inside: send it plain, or compress the request")


def _compressed(flat: bytes) -> bool:
    """Whether a Message flatbuffer's RecordBatch has its `compression` field (Arrow format/Message.fbs)."""

    def u32(at: int) -> int:
        return int.from_bytes(flat[at : at + 4], "little")

    def slot(table: int, number: int) -> int:
        vtable = table - int.from_bytes(flat[table : table + 4], "little", signed=True)
        size = int.from_bytes(flat[vtable : vtable + 2], "little")
        place = 4 + 2 * number
        offset = int.from_bytes(flat[vtable + place : vtable + place + 2], "little") if place < size else 0
        return table + offset if offset else 0

    message = u32(0)
    kind_at, header_at = slot(message, 1), slot(message, 2)
    header = header_at + u32(header_at)
    if flat[kind_at] == 2:  # DictionaryBatch: its data is a RecordBatch
        data_at = slot(header, 1)
        header = data_at + u32(data_at)
    return slot(header, 3) != 0


def each(lines: Iterable[bytes], take: Callable[[bytes], Event | None]) -> tuple[list[Event], list[str]]:
    """Events of lines, and why others were refused (``line 3: …``); a line may hold none of ours."""
    events, refused = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = take(line)
        except (InputError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            refused.append(f"line {number}: {error}")
            continue
        if event is not None:
            events.append(event)
    return events, refused


def unplaced_models(rows: pa.Table, fleet: Fleet, served: Collection[str]) -> dict[str, int]:
    """How many usage records name no pool and a model that no pool is known to serve, by model, most frequent first.

    Parameters: rows (`records.RECORDS`); served, models that engines or gateways count. A model has an empty name where
    the record names none.
    """
    pools: Any = rows.column("pool")
    if "" not in pc.unique(pools).to_pylist():
        return {}
    nowhere: Any = pc.equal(pools, pa.scalar(""))
    models: Any = rows.filter(pc.and_(nowhere, pc.starts_with(rows.column("source"), "usage/"))).column(
        "model"
    )
    counted: Any = pc.value_counts(models)
    apis = {p.price.model for p in fleet.pools.values() if isinstance(p.price, Api)} - {""}
    found = {str(c["values"]): int(c["counts"]) for c in counted.to_pylist()}
    found = {m: n for m, n in found.items() if m not in apis and not (m and known_as(m, served))}
    return {m: found[m] for m in sorted(found, key=lambda m: (-found[m], m))[:_MOST_NAMED]}


def unplaced(counts: Mapping[str, int]) -> list[str]:
    """What to say of records that fit no pool, by model.

    >>> unplaced({"gpt-4.1-mini": 3})
    ['3 records (gpt-4.1-mini) fit no pool: in no figure until the event names a pool']
    """
    tail = "fit no pool: in no figure until the event names a pool"
    return [
        f"{n} {'record' if n == 1 else 'records'} ({m[:100] or 'no model'}) {tail}" for m, n in counts.items()
    ]
