"""A bound for a long horizon: weeks relaxed apart, what ties them together priced.

Each week may hold its own machines, set its own peak and hand waiting work to the next at the price the representative
days put on it. The prices of each tie sum to the true one, so the sum of the weeks' optima is below every plan's cost,
whatever those prices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pertoken.plan._instance import Floats, Instance, window
from pertoken.plan._program import INF, Goal, Program, build
from pertoken.plan._solve import Session, Watch
from pertoken.units import HOURS_PER_DAY

SPAN_HOURS = 3 * HOURS_PER_DAY
FINISH_S = 300.0
"""Limit of one step of what is finished after the end; each takes a small part of a second."""


@dataclass(frozen=True)
class Prices:
    """What the representative days put on what crosses a border: USD per request waiting, USD per training
    token."""

    waiting: Floats
    token: Floats
    peak_kw: Floats
    """The peak the representative days would set in each band: what windows may use without being charged for
    it."""
    midnight: Floats
    """Work the representative days leave waiting at midnight [requests, (D,)]."""


def week_bound(instance: Instance, prices: Prices, first: int, last: int, watch: Watch) -> float:
    """The least cost of hours [first, last) alone, ties to other hours priced: a lower bound's share [USD].

    Once the watch is over it is the sum over spans of a few days: less, and soon known.
    """
    if not watch.over:
        found = _least_alone(instance, prices, first, last, Watch(watch.left_s(), None, stop=watch.stop))
        if np.isfinite(found) or not watch.over:
            return found
    spans = [(a, min(a + SPAN_HOURS, last)) for a in range(first, last, SPAN_HOURS)]
    return sum(_least_alone(instance, prices, a, b, watch.finish(FINISH_S)) for a, b in spans)


def _least_alone(instance: Instance, prices: Prices, first: int, last: int, watch: Watch) -> float:
    """The least cost of hours [first, last) alone, ties to other hours priced; −inf where it is not found."""
    part = window(instance, first, last)
    share_of_peak = [
        (k.hours[first:last].sum() / k.hours.sum()) for k in instance.peaks if k.hours[first:last].any()
    ]
    part = replace(
        part,
        peaks=tuple(
            replace(k, usd_per_kw=tuple(u * s for u in k.usd_per_kw or ()))
            for k, s in zip(part.peaks, share_of_peak, strict=True)
        ),
        job_one_pool=np.zeros(len(part.job_names), dtype=np.bool_),
        job_tokens=np.zeros(len(part.job_names)),
    )
    program = build(part, Goal())
    x_cost = program.objective.copy()
    y = program.columns["y"]
    useful = part.useful()
    jobs = np.flatnonzero(part.flow_job >= 0)
    x_cost[y[jobs]] -= (useful[jobs] * prices.token[part.flow_job[jobs]])[:, None]
    session = Session(replace(program, objective=x_cost), watch)
    _open_borders(session, program, part, instance, prices, first, last)
    if not session.relax(barrier=True):
        return -INF
    return session.objective


def _open_borders(
    session: Session,
    program: Program,
    part: Instance,
    instance: Instance,
    prices: Prices,
    first: int,
    last: int,
) -> None:
    """Waiting work may come in from the hour before and go out after the last, at its price; jobs at most
    once."""
    most = instance.waiting_most()
    highs = session.highs
    serve = next((b for b in program.blocks if b.name == "serve"), None)
    if serve is not None and first > 0:
        for d in np.flatnonzero(most[:, first - 1] > 0):
            # Work taken over must be served here: it adds to the first hour's right side, and pays its price.
            row = np.array([serve.rows[d, 0]], dtype=np.int32)
            highs.addCol(
                -prices.waiting[d],
                0.0,
                float(most[d, first - 1]),
                1,
                row,
                np.array([-1 / program.class_scale[d]]),
            )
    backlog = program.columns["backlog"]
    for c in range(len(part.class_names)):
        column = int(backlog[c, -1]) if backlog.size else -1
        if last < len(instance.hours) and column >= 0:
            highs.changeColCost(
                column, float(program.objective[column] + prices.waiting[c] * program.class_scale[c])
            )
    y = program.columns["y"]
    for j in range(len(part.job_names)):
        flows = np.flatnonzero(part.flow_job == j)
        columns = y[flows].ravel().astype(np.int32)
        values = np.repeat(part.useful()[flows] / max(instance.job_tokens[j], 1.0), y.shape[1])
        if len(columns):
            highs.addRow(-INF, 1.0, len(columns), columns, values)
