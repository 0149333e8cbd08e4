"""Prometheus remote write v1: a snappy block around three small protobuf messages, decoded by hand.

WriteRequest { repeated TimeSeries timeseries = 1; }
TimeSeries   { repeated Label labels = 1; repeated Sample samples = 2; }
Label        { string name = 1; string value = 2; }
Sample       { double value = 1; int64 timestamp = 2 [ms]; }

Source: Prometheus remote-write 1.0 specification. Fields we do not know are skipped, as protobuf asks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from pertoken.errors import InputError

MAX_BODY_BYTES = 16 * 1024 * 1024
MAX_DECODED_BYTES = 64 * 1024 * 1024
MAX_SAMPLES = 1_000_000
MAX_FIELDS = 200_000
_DOUBLE = struct.Struct("<d")

Written = list[tuple[dict[str, str], list[tuple[int, float]]]]


def decode(body: bytes) -> Written:
    """Label sets with their samples (milliseconds, value), in the order sent.

    Raises InputError on a body that is no snappy-compressed WriteRequest, or is larger than 16 MiB packed or
    64 MiB unpacked.
    """
    raw = unpack(body)
    try:
        return list(_all(raw))
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"a remote-write request cannot be read: {error}") from error


def _all(raw: bytes) -> Iterator[tuple[dict[str, str], list[tuple[int, float]]]]:
    count = 0
    for start, end in _messages(raw, 0, len(raw), 1):
        labels, samples = _series(raw, start, end)
        count += len(samples)
        if count > MAX_SAMPLES:
            raise ValueError(f"over {MAX_SAMPLES} samples in one request")
        yield labels, samples


def unpack(body: bytes) -> bytes:
    """A snappy block unpacked. Raises InputError on anything else or too much; its length is checked
    first."""
    import cramjam

    if len(body) > MAX_BODY_BYTES:
        raise InputError(f"a body of {len(body)} bytes is refused: at most {MAX_BODY_BYTES} are read")
    try:
        length, _ = _varint(body, 0)
        if length > MAX_DECODED_BYTES:
            raise InputError(f"a body that unpacks to {length} bytes is refused: at most {MAX_DECODED_BYTES}")
        return bytes(cramjam.snappy.decompress_raw(body))
    except InputError:
        raise
    except Exception as error:  # cramjam's errors share no base but Exception
        raise InputError(f"a body is not snappy-compressed: {error}") from error


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")


def _skip(raw: bytes, at: int, wire: int) -> int:
    if wire == 0:
        return _varint(raw, at)[1]
    if wire == 1:
        return at + 8
    if wire == 5:
        return at + 4
    if wire == 2:
        length, at = _varint(raw, at)
        return at + length
    raise ValueError(f"wire type {wire} is none of protobuf's")


def _messages(raw: bytes, at: int, end: int, wanted: int) -> list[tuple[int, int]]:
    """Start and end of the fields `wanted` of the message between `at` and `end`."""
    found = []
    while at < end:
        tag, at = _varint(raw, at)
        if tag == wanted << 3 | 2:
            length, at = _varint(raw, at)
            found.append((at, at + length))
            if len(found) > MAX_FIELDS:
                raise ValueError(f"over {MAX_FIELDS} fields in one message")
            at += length
        else:
            at = _skip(raw, at, tag & 7)
    if at != end:
        raise ValueError("a message ends in the middle of a field")
    return found


def _series(raw: bytes, at: int, end: int) -> tuple[dict[str, str], list[tuple[int, float]]]:
    labels: dict[str, str] = {}
    for start, stop in _messages(raw, at, end, 1):
        name, value = (_text(raw, start, stop, number) for number in (1, 2))
        labels[name] = value
    return labels, [_sample(raw, start, stop) for start, stop in _messages(raw, at, end, 2)]


def _text(raw: bytes, at: int, end: int, number: int) -> str:
    spans = _messages(raw, at, end, number)
    return raw[spans[-1][0] : spans[-1][1]].decode() if spans else ""


def _sample(raw: bytes, at: int, end: int) -> tuple[int, float]:
    value, time_ms = 0.0, 0
    while at < end:
        tag, at = _varint(raw, at)
        if tag == 1 << 3 | 1:
            value = _DOUBLE.unpack_from(raw, at)[0]
            at += 8
        elif tag == 2 << 3:
            time_ms, at = _varint(raw, at)
            if time_ms >= 1 << 63:
                time_ms -= 1 << 64
        else:
            at = _skip(raw, at, tag & 7)
    if at != end:
        raise ValueError("a sample ends in the middle of a field")
    return time_ms, value
