"""The Prometheus text exposition (and OpenMetrics) as samples, fast: one dict look-up per line already seen.

Between two scrapes a line differs only in its number. The part before the number is parsed once and
remembered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from pertoken.errors import InputError
from pertoken.units import MILLISECONDS_PER_SECOND

MAX_BYTES = 64 * 1024 * 1024
MAX_SERIES = 400_000
_MAX_LINES = 3 * MAX_SERIES
_REMEMBERED_CHARACTERS = 32 * 1024 * 1024


class Series:
    """A metric name with its labels, which are taken apart when they are first asked for."""

    __slots__ = ("_labels", "_text", "name")

    def __init__(self, name: str, labels: Mapping[str, str] | None = None, text: str = "") -> None:
        self.name, self._labels, self._text = name, labels, text

    @property
    def labels(self) -> Mapping[str, str]:
        """Labels by name. Raises InputError where a label stands twice."""
        if self._labels is None:
            pairs = _FAST_PAIR.findall(self._text)
            labels = dict(pairs)
            if len(labels) != len(pairs):
                raise InputError(f"a label stands twice in {self.name}{{{self._text[:120]}}}")
            self._labels = labels
        return self._labels

    def __repr__(self) -> str:
        return f"Series({self.name!r}, {dict(self.labels)!r})"


class Samples(NamedTuple):
    """Series and their values, in order; `times_s` holds POSIX seconds by position where timestamps were
    given."""

    series: list[Series]
    values: list[float]
    times_s: dict[int, float]


_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*+"
_QUOTED = r'"(?:[^"\\]|\\.)*+"'
_LABEL = rf"(?:[a-zA-Z_][a-zA-Z0-9_]*+|{_QUOTED})\s*+=\s*+{_QUOTED}"
# Possessive throughout: no line makes this go back and try again, however it was made.
_LINE = re.compile(
    rf"\s*+(?P<name>{_NAME})?+\s*+(?:\{{\s*+(?:(?P<quoted>{_QUOTED})\s*+(?:,\s*+|(?=\}})))?"
    rf"(?P<labels>(?:{_LABEL}\s*+(?:,\s*+)?+)*+)\}})?+\s*+(?P<value>[^\s#{{}}]++)"
    r"(?:[ \t]++(?P<time>[-+.0-9eE]++))?+[ \t]*+(?:# .*)?"
)
_PAIR = re.compile(rf'({_NAME}|{_QUOTED})\s*+=\s*+"((?:[^"\\]|\\.)*+)"\s*+(,?)\s*+')
_FAST_PAIR = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*+)="([^"\\]*+)"')
_FAST_HEAD = re.compile(rf'({_NAME})(?:\{{((?:[a-zA-Z_][a-zA-Z0-9_]*+="[^"\\]*+"(?:,|(?=\}})))++)\}})?+')
_ESCAPE = re.compile(r'\\[\\n"]')
_ESCAPES = {"\\\\": "\\", "\\n": "\n", '\\"': '"'}

_remembered: dict[str, Series] = {}
_characters = 0


def parse(text: str | bytes, *, openmetrics: bool = False) -> Samples:
    """The samples of an exposition, in order.

    Parameters: text, at most 64 MiB; `openmetrics`: timestamps are seconds, not milliseconds.
    Raises InputError naming the line on anything that is no exposition, and past 400,000 samples.
    Source: Prometheus exposition formats, text version 0.0.4, and OpenMetrics 1.0.

    >>> parse('up{job="a"} 1')
    Samples(series=[Series('up', {'job': 'a'})], values=[1.0], times_s={})
    """
    if len(text) > MAX_BYTES:
        raise InputError(f"an exposition of {len(text)} bytes is refused: at most {MAX_BYTES} are read")
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"an exposition is not UTF-8 at byte {error.start}") from error
    if text.count("\n") > _MAX_LINES:
        raise InputError(f"an exposition of over {_MAX_LINES} lines is refused")
    samples = Samples([], [], {})
    add_series, add_value, known = samples.series.append, samples.values.append, _remembered.get
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line[0] == "#":
            continue
        head, _, last = line.rpartition(" ")
        series = known(head) or _plain_head(head)
        if series is not None and "_" not in last:
            try:
                value = float(last)
            except ValueError:
                pass  # the whole line is read below, which finds it good or names it
            else:
                add_value(value)
                add_series(series)
                continue
        line = line.strip()
        if line and line[0] != "#":
            _slowly(line, number, openmetrics, samples)
    if len(samples.series) > MAX_SERIES:
        raise InputError(f"{len(samples.series)} samples in one exposition: at most {MAX_SERIES} are taken")
    return samples


def forget_series() -> None:
    """Forget the lines seen: the next exposition is parsed as if it were the first."""
    global _characters
    _remembered.clear()
    _characters = 0


def _plain_head(head: str) -> Series | None:
    """The series of a line's part before its number, if it has no blanks, escapes or timestamp."""
    global _characters
    match = _FAST_HEAD.fullmatch(head)
    if match is None:
        return None
    name, text = match.groups("")
    series = Series(name, None, text)
    if _characters > _REMEMBERED_CHARACTERS or len(_remembered) >= MAX_SERIES:
        forget_series()
    _remembered[head] = series
    _characters += len(head)
    return series


def _slowly(line: str, number: int, openmetrics: bool, samples: Samples) -> None:
    match = _LINE.fullmatch(line)
    if match is None:
        raise InputError(f"line {number} of the exposition cannot be read: {line[:120]!r}")
    name, quoted = match["name"], match["quoted"]
    if (name is None) == (quoted is None):
        raise InputError(f"line {number} of the exposition has no metric name or two: {line[:120]!r}")
    try:
        value = _number(match["value"])
        time_s = None if match["time"] is None else _number(match["time"])
        labels = _labels(match["labels"] or "")
    except ValueError as error:
        raise InputError(f"line {number} of the exposition: {error}: {line[:120]!r}") from error
    if time_s is not None:
        samples.times_s[len(samples.series)] = time_s if openmetrics else time_s / MILLISECONDS_PER_SECOND
    samples.series.append(Series(name or _plain(quoted[1:-1]), labels))
    samples.values.append(value)


def _number(text: str) -> float:
    if "_" in text:
        raise ValueError(f"{text!r} is no number")
    return float(text)


def _labels(text: str) -> dict[str, str]:
    labels: dict[str, str] = {}
    text = text.strip()
    at = 0
    while at < len(text):
        pair = _PAIR.match(text, at)
        if pair is None or (not pair[3] and pair.end() < len(text)):
            raise ValueError("labels are not separated by commas")
        name = pair[1] if pair[1][0] != '"' else _plain(pair[1][1:-1])
        if name in labels:
            raise ValueError(f"label {name!r} stands twice")
        labels[name] = _plain(pair[2])
        at = pair.end()
    return labels


def _plain(text: str) -> str:
    return _ESCAPE.sub(lambda m: _ESCAPES[m[0]], text) if "\\" in text else text
