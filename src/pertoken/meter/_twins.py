"""One engine that reaches us two ways under two names: one of them is the source of record, the other a check."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from datetime import datetime

import pyarrow as pa

from pertoken.meter._findings import Finding

_COUNTED = ("prompt_tokens", "input_tokens", "cached_input_tokens", "output_tokens")
_LEAST = 1000.0
"""Tokens below which two engines may well have counted the same by chance."""
_NEAR = 0.01
"""Share by which two readings of one engine may differ at the edges of an hour."""
_Told = dict[tuple[str, str], float]


def without_twins(
    totals: pa.Table, scraped: Collection[str], written: Collection[str]
) -> tuple[pa.Table, tuple[Finding, ...]]:
    """Totals of an hour (`records.TOTALS`) less what a remote write repeats of a scrape, and findings.

    Parameters: scraped and written, target names by how they reach us. Two engines of a pool, one of each, that
    counted alike every token meter of every model, to 1 % (they are not read at the same second) and at least 1,000
    output tokens, are one: the scraped one is booked. Those that counted the same to the token find each other first.
    """
    told: dict[tuple[datetime, str, str], _Told] = defaultdict(dict)
    keys = ("hour", "pool", "source", "model", "meter", "quantity")
    rows = zip(*(totals.column(name).to_pylist() for name in keys), strict=True)
    for hour, pool, source, model, meter, quantity in rows:
        if source.startswith("engine/") and meter in _COUNTED and quantity:
            counts = told[hour, pool, source]
            counts[model, meter] = counts.get((model, meter), 0.0) + quantity
    pairs = sorted(
        (apart, mine, theirs)
        for mine, counts in told.items()
        if _name(mine) in written and _output(counts) >= _LEAST
        for theirs, others in told.items()
        if _name(theirs) in scraped and mine != theirs and mine[:2] == theirs[:2]
        if (apart := _apart(counts, others)) <= _NEAR
    )
    drop: dict[tuple[datetime, str, str], Finding] = {}
    taken: set[tuple[datetime, str, str]] = set()
    for apart, mine, theirs in pairs:
        if mine not in drop and theirs not in taken and theirs not in drop:
            taken.add(theirs)
            how = f"to {apart:.2%} " if apart else ""
            text = (
                f"{mine[2]} (written) repeats {theirs[2]} (scraped) {how}and is not booked: drop one of them; "
                "if they are two engines, let both reach us the same way"
            )
            drop[mine] = Finding("twice", mine[0], mine[1], text, _output(told[mine]))
    if not drop:
        return totals, ()
    places = zip(*(totals.column(name).to_pylist() for name in ("hour", "pool", "source")), strict=True)
    findings = tuple(drop[mine] for mine in sorted(drop))
    return totals.filter(pa.array([place not in drop for place in places])), findings


def _name(place: tuple[datetime, str, str]) -> str:
    return place[2].partition("/")[2]


def _output(counts: _Told) -> float:
    return sum(n for (_, meter), n in counts.items() if meter == "output_tokens")


def _apart(one: _Told, other: _Told) -> float:
    """The largest share by which two readings differ; infinite where one has a count that the other lacks."""
    if one.keys() != other.keys():
        return math.inf
    return max(abs(round(n) - round(other[key])) / n for key, n in one.items())
