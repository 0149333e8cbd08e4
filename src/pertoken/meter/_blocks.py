"""A block: one batch of records packed by column, with a checksum, as it lies in a segment of the journal.

::

    block   = header payload
    header  = magic "PTB1", payload length u32, payload CRC32 u32, sequence u64, header CRC32 u32   (24 bytes)
    payload = meta length u32, meta (msgpack), ts i64[n], quantity f64[n], codes of each text column
    u8|u16|u32[n],
              key offsets u32[n+1], key bytes

Text columns but `key` repeat themselves, so a block keeps each value once and a code per row. Little endian.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from pertoken.errors import InputError
from pertoken.meter.records import (
    RECORDS,
    TEXT_COLUMNS,
    TIMESTAMP,
    check_columns,
    check_keys,
    check_quantities,
    check_texts,
    empty,
)
from pertoken.units import MICROSECONDS_PER_SECOND, SECONDS_PER_HOUR

MAGIC = b"PTB1"
_HEADER = struct.Struct("<4sIIQI")
HEADER_BYTES = _HEADER.size
CODED = tuple(name for name in TEXT_COLUMNS if name != "key")
MAX_PAYLOAD = 1 << 31
HOUR_US = SECONDS_PER_HOUR * MICROSECONDS_PER_SECOND


class Meta(msgspec.Struct, array_like=True):
    """What a block says of itself: rows, hours (POSIX hours) it touches, its texts, and marks."""

    rows: int
    hours: list[int]
    texts: list[list[str]]
    marks: dict[str, bytes] = {}
    cleaned: dict[int, int] = {}
    """Hours closed, with the sequence up to which."""


class Block(NamedTuple):
    """Where a good block lies, and its meta."""

    offset: int
    end: int
    sequence: int
    meta: Meta


class Damage(NamedTuple):
    """Bytes of a segment that hold no good block; `torn`: nothing good follows them."""

    offset: int
    end: int
    torn: bool


class Packed(NamedTuple):
    """A batch as numpy columns: what is written, and what identities are made of."""

    ts: np.ndarray[Any, np.dtype[np.int64]]
    quantity: np.ndarray[Any, np.dtype[np.float64]]
    codes: list[np.ndarray[Any, Any]]
    texts: list[list[str]]
    keys: pa.Array[Any]


def pack(table: pa.Table) -> Packed:
    """The columns of records, texts coded. Raises InputError on rows that do not belong, as
    `records.checked`."""
    check_columns(table)
    codes, texts = [], []
    for name in CODED:
        column = table.column(name).combine_chunks().dictionary_encode()
        texts.append([t or "" for t in column.dictionary.to_pylist()])
        codes.append(column.indices.to_numpy(zero_copy_only=False))
    keys = table.column("key").combine_chunks()
    ts = table.column("ts").combine_chunks().cast(pa.int64()).to_numpy(zero_copy_only=False)
    quantity = table.column("quantity").to_numpy()
    check_quantities(quantity)
    check_texts(dict(zip(CODED, texts, strict=True)))
    check_keys(keys)
    return Packed(ts, quantity, codes, texts, keys)


def take(packed: Packed, keep: np.ndarray[Any, np.dtype[np.bool_]]) -> Packed:
    """The rows where `keep`."""
    return Packed(
        packed.ts[keep],
        packed.quantity[keep],
        [c[keep] for c in packed.codes],
        packed.texts,
        packed.keys.filter(pa.array(keep)),
    )


def encode(
    packed: Packed, sequence: int, marks: Mapping[str, bytes], cleaned: Mapping[int, int]
) -> tuple[bytes, Meta]:
    """The block's bytes and its meta."""
    rows = len(packed.ts)
    hours = _hours(packed.ts)
    described = Meta(rows, hours, packed.texts, dict(marks), dict(cleaned))
    meta = msgspec.msgpack.encode(described)
    parts = [struct.pack("<I", len(meta)), meta]
    parts += [packed.ts.astype("<i8").tobytes(), packed.quantity.astype("<f8").tobytes()]
    parts += [
        codes.astype(_code_type(len(texts))).tobytes()
        for codes, texts in zip(packed.codes, packed.texts, strict=True)
    ]
    offsets, data = text_buffers(packed.keys)
    parts += [offsets.tobytes(), data]
    payload = b"".join(parts)
    if len(payload) > MAX_PAYLOAD:
        raise InputError(f"a batch of {len(payload)} bytes is refused: send smaller ones")
    return _header(payload, sequence) + payload, described


def read_table(payload: memoryview) -> pa.Table:
    """The records of a block's payload, which must have passed its checksum."""
    packed = unpack(payload)
    if not len(packed.ts):
        return empty()
    columns: dict[str, Any] = {
        name: pa.array(texts, pa.string()).take(pa.array(codes))
        for name, texts, codes in zip(CODED, packed.texts, packed.codes, strict=True)
    }
    columns["key"] = packed.keys
    columns["ts"] = pa.array(packed.ts.astype("datetime64[us]")).cast(TIMESTAMP)
    columns["quantity"] = pa.array(packed.quantity)
    return pa.table([columns[f.name] for f in RECORDS], schema=RECORDS)


def unpack(payload: memoryview) -> Packed:
    """A payload as columns; the reverse of `pack`."""
    meta, at = _meta(payload)
    n = meta.rows
    if not n:
        return pack(empty())
    ts = np.frombuffer(payload, "<i8", n, at)
    quantity = np.frombuffer(payload, "<f8", n, at + 8 * n)
    at += 16 * n
    columns = []
    for texts in meta.texts:
        kind = np.dtype(_code_type(len(texts)))
        columns.append(np.frombuffer(payload, kind, n, at))
        at += kind.itemsize * n
    offsets = np.frombuffer(payload, "<u4", n + 1, at).astype(np.int32)
    data = pa.py_buffer(bytes(payload[at + 4 * (n + 1) :]))
    keys = pa.StringArray.from_buffers(n, pa.py_buffer(offsets.tobytes()), data)
    return Packed(ts, quantity, columns, meta.texts, keys)


def scan(raw: memoryview) -> Iterator[Block | Damage]:
    """Blocks of a segment in order, and what lies between them that is none."""
    at = 0
    while at < len(raw):
        block = _block_at(raw, at)
        if block is not None:
            yield block
            at = block.end
            continue
        following = _next_block(raw, at + 1)
        yield Damage(at, following if following is not None else len(raw), following is None)
        if following is None:
            return
        at = following


def read_payload(file: BinaryIO, offset: int) -> memoryview:
    """The payload of the good block at an offset of a segment's file."""
    file.seek(offset)
    _, length, _, _, _ = _HEADER.unpack(file.read(HEADER_BYTES))
    return memoryview(file.read(length))


def payload_of(raw: memoryview, block_offset: int) -> memoryview:
    """The payload of the good block at an offset."""
    _, length, _, _, _ = _HEADER.unpack_from(raw, block_offset)
    return raw[block_offset + HEADER_BYTES : block_offset + HEADER_BYTES + length]


def _hours(ts: np.ndarray[Any, np.dtype[np.int64]]) -> list[int]:
    if not len(ts):
        return []
    first, last = int(ts.min()) // HOUR_US, int(ts.max()) // HOUR_US
    return [first] if first == last else [int(h) for h in np.unique(ts // HOUR_US)]


def _header(payload: bytes, sequence: int) -> bytes:
    crc = zlib.crc32(payload)
    head = _HEADER.pack(MAGIC, len(payload), crc, sequence, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head))


def _block_at(raw: memoryview, at: int) -> Block | None:
    if at + HEADER_BYTES > len(raw):
        return None
    magic, length, crc, sequence, head_crc = _HEADER.unpack_from(raw, at)
    end = at + HEADER_BYTES + length
    if magic != MAGIC or zlib.crc32(raw[at : at + HEADER_BYTES - 4]) != head_crc or end > len(raw):
        return None
    payload = raw[at + HEADER_BYTES : end]
    if zlib.crc32(payload) != crc:
        return None
    return Block(at, end, sequence, _meta(payload)[0])


def _next_block(raw: memoryview, start: int) -> int | None:
    whole = raw.obj if isinstance(raw.obj, bytes) else bytes(raw)
    at = whole.find(MAGIC, start)
    while at >= 0:
        if _block_at(raw, at) is not None:
            return at
        at = whole.find(MAGIC, at + 1)
    return None


def _meta(payload: memoryview) -> tuple[Meta, int]:
    (length,) = struct.unpack_from("<I", payload, 0)
    return msgspec.msgpack.decode(payload[4 : 4 + length], type=Meta), 4 + length


def _code_type(count: int) -> str:
    return "u1" if count <= 1 << 8 else "<u2" if count <= 1 << 16 else "<u4"


def text_buffers(keys: pa.Array[Any]) -> tuple[np.ndarray[Any, Any], bytes]:
    """Offsets (from zero, one more than texts) and bytes of an array of texts."""
    _, offset_buffer, data = keys.buffers()
    if offset_buffer is None or not len(keys):
        return np.zeros(1, "<u4"), b""
    offsets = np.frombuffer(memoryview(offset_buffer), np.int32, len(keys) + 1, 4 * keys.offset)
    first, last = int(offsets[0]), int(offsets[-1])
    return (offsets - first).astype("<u4"), b"" if data is None else memoryview(data)[first:last].tobytes()
