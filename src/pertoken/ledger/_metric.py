"""Metrics: named ratios of sums over the two fact tables, each aggregated before they are joined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from pertoken.errors import InputError, UnknownNameError
from pertoken.ledger._sums import Fact, Source
from pertoken.units import METRICS, PHASES, Metric

DIMENSIONS = ("book", "hour", "pool", "model", "tenant")
COST_DIMENSIONS = (*DIMENSIONS, "phase", "category", "component")
USAGE_DIMENSIONS = (*DIMENSIONS, "phase", "meter")

Filter = Mapping[str, str | Sequence[str]]
Window = tuple[datetime | None, datetime | None]
"""Hours from the first up to, not with, the second; None is open."""


def columns(names: Iterable[str], allowed: Sequence[str]) -> list[str]:
    """The names, each checked against the closed list of columns. Raises InputError."""
    chosen = list(names)
    for name in chosen:
        if name not in allowed:
            raise InputError(f"cannot group or filter by {name!r}: one of {', '.join(allowed)}")
    return chosen


def where_clause(
    filters: Filter, allowed: Sequence[str], window: Window = (None, None)
) -> tuple[str, list[object]]:
    """A WHERE condition with its parameters; ``TRUE`` where nothing is filtered.

    A meter without a qualifier stands for all its qualified ones: ``energy_kwh`` for ``energy_kwh:tier2`` too.
    """
    terms: list[str] = []
    parameters: list[object] = []
    for name in columns(filters, allowed):
        value = filters[name]
        values = [value] if isinstance(value, str) else list(value)
        if name == "meter" and values:
            term, values = _meters(values)
            terms.append(term)
        else:
            terms.append(f"{name} IN ({', '.join('?' for _ in values)})" if values else "FALSE")
        parameters += values
    for moment, test in zip(window, ("hour >= ?", "hour < ?"), strict=True):
        if moment is not None:
            terms.append(test)
            parameters.append(moment)
    return " AND ".join(terms) or "TRUE", parameters


def _meters(names: Sequence[str]) -> tuple[str, list[str]]:
    """The test of a meter, qualifiers of the bare names included.

    A range and no LIKE: ``;`` is the character after ``:``, so it holds whatever a name has in it, and ranges are
    what an engine skips blocks by.
    """
    terms = [f"meter IN ({', '.join('?' for _ in names)})"]
    bare = [name for name in names if ":" not in name]
    terms += ["(meter >= ? AND meter < ?)"] * len(bare)
    return f"({' OR '.join(terms)})", [*names, *(name + mark for name in bare for mark in ":;")]


def metric_named(name: str) -> Metric:
    """The metric of that name. Raises UnknownNameError."""
    if name not in METRICS:
        raise UnknownNameError("metric", name, METRICS)
    return METRICS[name]


def metric_sql(
    names: Sequence[str],
    by: Sequence[str],
    filters: Filter,
    window: Window = (None, None),
    sources: tuple[Source, Source] = (Source("cost_hourly"), Source("usage_hourly")),
) -> tuple[str, list[object]]:
    """The SELECT that answers metrics by dimensions, and its parameters; `sources` are where cost and usage are read.

    One row per group that has cost or usage; a metric whose denominator is zero there is NULL.
    """
    if not names:
        raise InputError(f"name at least one metric: {', '.join(METRICS)}")
    metrics = [metric_named(name) for name in names]
    keys = columns(by, DIMENSIONS)
    where, parameters = where_clause(filters, DIMENSIONS, window)
    terms = sorted({term for m in metrics for term in (*_terms(m), *_whole_terms(m))})
    names_of = {term: f"t{i}" for i, term in enumerate(terms)}
    cost = [t for t in terms if t.partition("@")[0] == "cost"]
    usage = [t for t in terms if t not in cost]
    key_list = ", ".join(keys)
    group = f"GROUP BY {key_list}" if keys else ""
    prefix = f"{key_list}, " if keys else ""

    def part(table: str, table_terms: list[str]) -> str:
        sums = ", ".join(f"{_sum(t)} AS {names_of[t]}" for t in table_terms) or "COUNT(*) AS unused"
        return f"SELECT {prefix}{sums} FROM {table} WHERE {where} {group}"

    join = " AND ".join(f"c.{k} = u.{k}" for k in keys) or "TRUE"
    picked = [f"COALESCE(c.{k}, u.{k}) AS {k}" for k in keys]
    picked += [f"{_value(m, names_of)} AS {m.name}" for m in metrics]
    order = f"ORDER BY {', '.join(str(i + 1) for i in range(len(keys)))}" if keys else ""
    sql = (
        f"SELECT {', '.join(picked)} FROM ({part(sources[0].sql, cost)}) c "
        f"FULL OUTER JOIN ({part(sources[1].sql, usage)}) u ON {join} {order}"
    )
    return sql, [*sources[0].parameters, *parameters, *sources[1].parameters, *parameters]


def sum_sql(
    fact: Fact,
    by: Sequence[str],
    filters: Filter,
    window: Window = (None, None),
    source: Source | None = None,
) -> tuple[str, list[object]]:
    """The SELECT that sums usage or cost by dimensions, and its parameters."""
    column, allowed = ("quantity", USAGE_DIMENSIONS) if fact == "usage" else ("cost_usd", COST_DIMENSIONS)
    read = source or Source(f"{fact}_hourly")
    keys = ", ".join(columns(by, allowed))
    where, parameters = where_clause(filters, allowed, window)
    group = f"GROUP BY {keys} ORDER BY {keys}" if keys else ""
    prefix = f"{keys}, " if keys else ""
    sql = f"SELECT {prefix}SUM({column}) AS {column} FROM {read.sql} WHERE {where} {group}"
    return sql, [*read.parameters, *parameters]


def _whole_terms(metric: Metric) -> list[str]:
    """The numerator's meters without their phases: absent altogether, the numerator is unknown and not zero."""
    return list(dict.fromkeys(term.partition("@")[0] for term in metric.numerator.split("+")))


def _terms(metric: Metric) -> list[str]:
    terms = f"{metric.numerator}+{metric.denominator}".split("+")
    return [*terms, "cost", *metric.share_of.split("+")] if metric.share_of else terms


def _sum(term: str) -> str:
    meter, _, phase = term.partition("@")
    if phase and phase not in PHASES:
        raise InputError(f"metric term {term!r} names an unknown phase")
    column = "cost_usd" if meter == "cost" else "quantity"
    tests = [f"phase = '{phase}'"] if phase else []
    if meter != "cost":
        # Comparing is cheaper than taking each name apart; that `_` matches any character harms no closed list.
        tests.append(f"(meter = '{meter}' OR meter LIKE '{meter}:%')")
    return f"SUM(CASE WHEN {' AND '.join(tests)} THEN {column} END)" if tests else f"SUM({column})"


def _value(metric: Metric, names_of: Mapping[str, str]) -> str:
    def total(terms: str) -> str:
        parts = [f"COALESCE(CAST({names_of[t]} AS DOUBLE), 0)" for t in terms.split("+")]
        return f"({' + '.join(parts)})"

    known = ", ".join(f"CAST({names_of[t]} AS DOUBLE)" for t in _whole_terms(metric))
    numerator = f"CASE WHEN COALESCE({known}) IS NOT NULL THEN {total(metric.numerator)} END"
    value = f"{metric.scale!r} * {numerator} / NULLIF({total(metric.denominator)}, 0)"
    if metric.share_of:
        value += f" * {total('cost')} / NULLIF({total(metric.share_of)}, 0)"
    return value
