"""Tables of facts and the texts in them: one item with unit and source, numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import date
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pertoken.units import GIGA, TERA, TOKENS_PER_MTOK

NOTHING = "–"


class Fact(NamedTuple):
    """One line of a single item: what, how much, in which unit, and how it is known beyond the sources."""

    field: str
    value: str
    unit: str = ""
    known: str = ""


class _Right(str):
    """A heading whose column is aligned to the right."""

    __slots__ = ()


def right(*headings: str) -> tuple[_Right, ...]:
    """Headings of columns aligned to the right."""
    return tuple(_Right(heading) for heading in headings)


def table_of(*headings: str) -> Table:
    """An empty table; long texts fold, numbers stay whole."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading in headings:
        numeric = isinstance(heading, _Right)
        table.add_column(
            str(heading), justify="right" if numeric else "left", overflow="fold", no_wrap=numeric
        )
    return table


def item(
    name: str, facts: Sequence[Fact], sources: Sequence[str], checked: str, notes: Sequence[str]
) -> RenderableType:
    """One item: its facts, then sources, the day they were checked, and notes."""
    explained = any(fact.known for fact in facts)
    table = table_of(name, "", "unit", *(["how it is known"] if explained else []))
    for fact in facts:
        table.add_row(*(fact if explained else fact[:3]))
    lines = [Text(f"source: {source}") for source in sources]
    lines.append(Text(f"checked: {checked}"))
    lines += [Text(f"note: {note}") for note in notes]
    return Group(table, *lines)


def number(value: float) -> str:
    """A number with the digits that matter; none for one that is not there.

    >>> number(989.4), number(3.35), number(4500.0), number(float("nan"))
    ('989.4', '3.35', '4,500', '–')
    """
    if not math.isfinite(value):
        return NOTHING
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def token_price(usd: float) -> str:
    """A token price without trailing noise.

    >>> token_price(0.15), token_price(0.0375), token_price(10.0)
    ('0.15', '0.0375', '10.00')
    """
    text = f"{usd:.4f}".rstrip("0")
    whole, _, digits = text.partition(".")
    return f"{whole}.{digits:0<2}"


def count(value: float) -> str:
    """A large count in words' length.

    >>> count(70_553_706_496), count(671_026_419_200), count(44_040_192)
    ('70.55 B', '671.0 B', '44.04 M')
    """
    for unit, size in (("T", TERA), ("B", GIGA), ("M", TOKENS_PER_MTOK)):
        if value >= size:
            scaled = value / size
            return f"{scaled:.1f} {unit}" if scaled >= 100 else f"{scaled:.2f} {unit}"
    return f"{value:,.0f}"


def span(values: Iterable[float]) -> str:
    """Smallest to largest of some numbers.

    >>> span([0.24, 0.08, 0.12]), span([7.0]), span([])
    ('0.08 to 0.24', '7', '–')
    """
    found = sorted(set(values))
    if not found:
        return NOTHING
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:.4g} to {found[-1]:.4g}"


def plain(value: Any) -> Any:
    """A value as JSON knows it: dataclasses and mappings as objects, dates as text, no infinity."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, date | np.datetime64):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
