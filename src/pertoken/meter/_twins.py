"""One engine that reaches us two ways under two names: one of them is the source of record, the other a check."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from datetime import datetime

import pyarrow as pa

from pertoken.meter.attribute import Finding

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
    counted the same of every model and token meter, to the token and at least 1,000 output tokens, are one: the
    scraped one is booked. Those that agree to 1 % may be two equally loaded engines: both are booked, and a
    finding asks.
    """
    told: dict[tuple[datetime, str, str], _Told] = defaultdict(dict)
    keys = ("hour", "pool", "source", "model", "meter", "quantity")
    rows = zip(*(totals.column(name).to_pylist() for name in keys), strict=True)
    for hour, pool, source, model, meter, quantity in rows:
        if source.startswith("engine/") and meter in _COUNTED and quantity:
            counts = told[hour, pool, source]
            counts[model, meter] = counts.get((model, meter), 0.0) + quantity
    first = {
        (hour, pool, _print_of(counts)): source
        for (hour, pool, source), counts in sorted(told.items())
        if source.partition("/")[2] in scraped
    }
    drop: set[tuple[datetime, str, str]] = set()
    findings = []
    for (hour, pool, source), counts in sorted(told.items()):
        output = sum(n for (_, meter), n in counts.items() if meter == "output_tokens")
        twin = first.pop((hour, pool, _print_of(counts)), "") if source.partition("/")[2] in written else ""
        if twin and twin != source and output >= _LEAST:
            drop.add((hour, pool, source))
            text = f"{source} (written) repeats {twin} (scraped): {twin} alone is booked, drop one of them"
            findings.append(Finding("twice", hour, pool, text, output))
        elif source.partition("/")[2] in written and output >= _LEAST:
            findings += [
                Finding("twice", hour, pool, f"{source} (written) and {s} (scraped) count alike, both are booked: "
                        "if they are one engine, drop one of them", output)
                for (h, p, _), s in first.items() if (h, p) == (hour, pool) and _alike(counts, told[h, p, s])
            ]  # fmt: skip
    if not drop:
        return totals, tuple(findings)
    places = zip(*(totals.column(name).to_pylist() for name in ("hour", "pool", "source")), strict=True)
    return totals.filter(pa.array([place not in drop for place in places])), tuple(findings)


def _alike(one: _Told, other: _Told) -> bool:
    """Whether two readings of one engine at other seconds could differ so little: counts that both have, to 1 %."""
    return one.keys() == other.keys() and all(abs(n - other[k]) <= _NEAR * n for k, n in one.items())


def _print_of(counts: _Told) -> tuple[tuple[tuple[str, str], float], ...]:
    return tuple(sorted((key, float(round(n))) for key, n in counts.items()))
