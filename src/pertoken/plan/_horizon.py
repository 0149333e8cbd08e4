"""Long horizons: decided once from a few days, planned in a rolling window, bounded by weeks.

1. **Once.** Of each billing month a few days (its busiest, and the days nearest to the centres of the rest)
   stand for all of its days. Their program decides machines held, the pool of each job, what is open. A month
   or so is short enough to be relaxed whole instead, which also gives its bound.
2. **Rolling window.** With that fixed, windows of three days with a day of look-ahead (a month: seven and two)
   are solved one after another with real hours, each from the state the last one left: machines on, work
   waiting, peaks already set, tokens still to train.
3. **Bound.** Weeks are relaxed independently: each may hold its own machines, set its own peak and hand waiting
   work to the next at the price the representative days put on it. What ties weeks together is dualised, the
   prices of each tie summing to the true one, so the sum of the weeks' optima is below every plan's cost,
   whatever those prices.

Two halves of the horizon roll at once; across their border exactly the work waits that the representative days
leave at midnight.

Stopped by hand or by the clock, what is not planned yet is planned day by day, every count rounded up, and weeks not
yet relaxed are relaxed in spans of three days: there is always a whole plan, and a bound that holds for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from pertoken.errors import PerTokenError
from pertoken.plan import _infeasible
from pertoken.plan._against import with_flows
from pertoken.plan._instance import Floats, Instance, Ints, chosen, window
from pertoken.plan._outcome import Schedule, derived, schedule
from pertoken.plan._program import INF, Goal, Program, build
from pertoken.plan._search import Found, rough, search
from pertoken.plan._solve import Session, Watch
from pertoken.plan._weeks import FINISH_S, Prices, week_bound
from pertoken.units import HOURS_PER_DAY

DAYS = 24
"""Representative days in all, two or more for each billing month, its busiest included."""
_DAYS_GAP, _DAYS_LIMIT_S = 0.02, 30.0
WINDOW_HOURS, AHEAD_HOURS = 3 * HOURS_PER_DAY, HOURS_PER_DAY
LONGER_HOURS, LONGER_AHEAD_HOURS = 7 * HOURS_PER_DAY, 2 * HOURS_PER_DAY
"""Window and look-ahead; the longer ones where the horizon is short enough to afford them."""
BLOCK_HOURS = 7 * HOURS_PER_DAY
_BY_DAYS = "representative days, then a rolling window of three days; bound from weeks relaxed apart"
_BY_WHOLE = "relaxed whole, then a rolling window of seven days; bound from the relaxation"
_CUT = "; cut short: the rest day by day, rounded up"
_SHORT_HOURS = 60 * HOURS_PER_DAY
_WHOLE_HOURS = 1000
"""Hours up to which the whole horizon is relaxed: it decides better than days, and bounds better than weeks."""
_TOLERANCE, _POLL_S = 1e-6, 0.1


@dataclass(frozen=True)
class Rolled:
    """A whole horizon's schedule, and the bound no schedule can beat."""

    schedule: Schedule
    bound: float
    method: str
    ended: str
    """``stopped`` or ``time limit`` where the rest was planned day by day; empty where nothing cut it short."""


def roll(instance: Instance, goal: Goal, gap_fraction: float, watch: Watch, threads: int = 2) -> Rolled:
    """Plan a long horizon for least cost. Raises InfeasibleError where no schedule meets every constraint,
    PerTokenError where a window has no plan."""
    scaled = replace(
        instance, requests=instance.requests * goal.scale, job_tokens=instance.job_tokens * goal.scale
    )
    decided = _once(scaled, gap_fraction, watch)
    fixed, prices = decided.fixed, decided.prices
    known = decided.bound if np.isfinite(decided.bound) else None
    watch.tell("what is held", bound=known)
    watch.drain()
    hours = len(instance.hours)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        chains = [
            pool.submit(_chain, fixed, prices, a, b, gap_fraction, watch) for a, b in _parts(hours, threads)
        ]
        weeks = [] if known is not None else _blocks(hours)
        blocks = [pool.submit(week_bound, scaled, prices, a, b, watch) for a, b in weeks]
        _wait([*chains, *blocks], watch)
        bound = float(sum(block.result() for block in blocks)) + float(prices.token @ scaled.job_tokens)
        bound = bound if known is None else known
        watch.tell("bound", bound=bound)
        watch.drain()
        parts = [chain.result() for chain in chains]
    machines, units, load, backlog = (np.concatenate([part[n] for part in parts], axis=1) for n in range(4))
    every = np.zeros((len(instance.flow_unit), hours))
    every[decided.flows] = load
    made = derived(instance, machines, fixed.held_least.astype(np.float64), units, every, backlog)
    how = _BY_DAYS if known is None else _BY_WHOLE
    ended = "" if not watch.over else "stopped" if watch.stop.is_set() else "time limit"
    return Rolled(made, bound, how + (_CUT if ended else ""), ended)


def _wait(tasks: Sequence[Future[Any]], watch: Watch) -> None:
    """Until all are done, passing on progress."""
    left = set(tasks)
    while left:
        _, left = wait(left, timeout=_POLL_S)
        watch.drain()


def _parts(hours: int, threads: int) -> list[tuple[int, int]]:
    """Parts of the horizon that roll at once, each of whole windows; a short horizon is one."""
    threads = threads if hours >= threads * _SHORT_HOURS else 1
    windows = -(-hours // WINDOW_HOURS)
    edges = [min(hours, round(windows * n / threads) * WINDOW_HOURS) for n in range(threads + 1)]
    return [(a, b) for a, b in pairwise(edges) if b > a]


def _blocks(hours: int) -> list[tuple[int, int]]:
    edges = [*range(0, hours, BLOCK_HOURS), hours]
    return list(pairwise(edges))


@dataclass(frozen=True)
class _Decided:
    """What is decided once: the instance with it fixed, which flows are left, prices, and a bound if there is one."""

    fixed: Instance
    flows: Ints
    prices: Prices
    bound: float


def _once(instance: Instance, gap_fraction: float, watch: Watch) -> _Decided:
    """What is decided once, from representative days; from the relaxation of all hours where they are few."""
    places = any(f.only_with is not None for f in instance.fixed)
    if len(instance.hours) <= _WHOLE_HOURS and not places and not watch.over:
        program = build(instance, Goal())
        found = _relaxed(program, watch)
        if found is not None:
            return _decided(instance, instance, program, found)
    days = representative_days(instance)
    program = build(days, Goal())
    patience = Watch(min(watch.left_s(), max(_DAYS_LIMIT_S, 0.2 * watch.time_limit_s)), None, stop=watch.stop)
    found = search(days, program, max(_DAYS_GAP, gap_fraction), patience, quick=True)
    if found.x is None and found.status != "infeasible":
        watch.tell("finishing")
        watch.drain()
        found = rough(days, program, watch.finish(FINISH_S))
    if found.x is None:
        raise _nothing(days, found.status, watch, "the representative days have")
    return _decided(instance, days, program, replace(found, bound=-INF))


def _relaxed(program: Program, watch: Watch) -> Found | None:
    """The relaxation of a whole horizon, each job on the pool that did most of it; None where it did not solve."""
    session = Session(program, Watch(watch.left_s(), None, stop=watch.stop))
    session.highs.setOptionValue("run_crossover", "off")
    if not session.relax(barrier=True):
        return None
    x, runs_on = session.x.copy(), program.columns["runs_on"]
    for job in range(runs_on.shape[0]):
        here = runs_on[job][runs_on[job] >= 0]
        if len(here):
            x[here] = np.arange(len(here)) == int(np.argmax(x[here]))
    # An interior point ends within its tolerance of the optimum, on either side.
    bound = session.objective - _TOLERANCE * abs(session.objective)
    return Found(x, INF, bound, "relaxed", session.x, session.row_dual, session.reduced_cost, None)


def _decided(instance: Instance, days: Instance, program: Program, found: Found) -> _Decided:
    assert found.x is not None
    held = np.round(_at(found.x, program.columns["held"])).astype(np.int64)
    runs_on = _at(found.x, program.columns["runs_on"]) > 0.5
    places = [f for f in instance.fixed if f.only_with is not None]
    pools = np.ones(len(instance.pool_names), dtype=np.bool_)
    for place, opened in zip(places, _at(found.x, program.columns["open"]) > 0.5, strict=True):
        if not opened and place.only_with is not None:
            pools &= ~place.only_with
    jobs = instance.flow_job >= 0
    keep = pools[instance.flow_pool]
    if jobs.any():
        tied = jobs & instance.job_one_pool[np.maximum(instance.flow_job, 0)]
        keep[tied] &= runs_on[instance.flow_job[tied], instance.flow_pool[tied]]
    fixed = with_flows(replace(instance, held_least=held, held_most=held, fixed=()), keep)
    return _Decided(fixed, np.flatnonzero(keep), _prices(instance, days, program, found), found.bound)


def _at(x: Floats, columns: Ints) -> Floats:
    return np.where(columns >= 0, x[np.maximum(columns, 0)], 0.0)


def _prices(instance: Instance, days: Instance, program: Program, found: Found) -> Prices:
    waiting, token = np.zeros(len(days.class_names)), np.zeros(len(days.job_names))
    for block in program.blocks:
        if block.name == "serve":
            each = found.row_dual[block.rows] / days.weight / block.per_row[:, None]
            waiting = np.where(days.slack_hours > 0, np.median(each, axis=1), 0.0)
        elif block.name == "deadline":
            token = np.maximum(found.row_dual[block.rows] / block.per_row, 0.0)
    assert found.x is not None
    kw = np.array([k.already_kw for k in instance.peaks])
    there = [n for n, k in enumerate(instance.peaks) if np.isin(instance.hours[k.hours], days.hours).any()]
    kw[there] = _at(found.x, program.columns["peak"]).sum(axis=1)
    backlog = (
        _at(found.x, program.columns["backlog"])[:, HOURS_PER_DAY - 1 :: HOURS_PER_DAY]
        * program.class_scale[:, None]
    )
    days_of = days.weight[HOURS_PER_DAY - 1 :: HOURS_PER_DAY]
    return Prices(np.maximum(waiting, 0.0), token, kw, backlog @ days_of / days_of.sum())


def representative_days(instance: Instance) -> Instance:
    """A few days of each billing month, each weighted by the days it stands for; a day's end meets its own
    start."""
    days = len(instance.hours) // HOURS_PER_DAY
    shape = _features(instance, days)
    period = _periods(instance, days)
    picked: list[tuple[int, float]] = []
    each = max(2, DAYS // len(np.unique(period)) if len(np.unique(period)) > 1 else DAYS // 4)
    for number in np.unique(period):
        mine = np.flatnonzero(period == number)
        picked += [(int(mine[n]), w) for n, w in _medoids(shape[mine], min(each, len(mine)))]
    picked.sort()
    start = np.array([day * HOURS_PER_DAY for day, _ in picked])
    hours = (start[:, None] + np.arange(HOURS_PER_DAY)).ravel()
    index = np.arange(len(hours)).reshape(-1, HOURS_PER_DAY)
    previous = np.roll(index, 1, axis=1).ravel()
    total = len(instance.hours) / (days * HOURS_PER_DAY)
    weight = np.repeat([w * total for _, w in picked], HOURS_PER_DAY)
    part = chosen(replace(instance, backlog_most=None), hours, previous, weight)
    count = len(hours)
    return replace(
        part,
        initial_on=None,
        initial_units=None,
        initial_backlog=None,
        job_release=np.zeros(len(instance.job_names), dtype=np.int64),
        job_deadline=np.full(len(instance.job_names), count, dtype=np.int64),
    )


def _features(instance: Instance, days: int) -> Floats:
    """What makes days alike: demand of each class and energy prices by hour, each relative to its mean."""
    used = days * HOURS_PER_DAY
    series = [row[:used] for row in instance.requests]
    series += list(np.unique(instance.energy_prices(instance.pool_names)[:, :used], axis=0))
    kept = [(s / s.mean()).reshape(days, HOURS_PER_DAY) for s in series if s.mean() > 0]
    return np.concatenate(kept, axis=1) if kept else np.zeros((days, 1))


def _periods(instance: Instance, days: int) -> Ints:
    """The billing month of each day: of the first demand charge that has hours in it, else the calendar
    month."""
    month = instance.hours.astype("datetime64[M]").astype(np.int64)
    return month[: days * HOURS_PER_DAY : HOURS_PER_DAY]


def _medoids(shape: Floats, count: int) -> list[tuple[int, float]]:
    """Days that stand for all, with their weights: the busiest, then those farthest from any taken, then
    settled."""
    first = int(np.argmax(shape.sum(axis=1)))
    taken = [first]
    distance = np.linalg.norm(shape - shape[first], axis=1)
    while len(taken) < count:
        taken.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(shape - shape[taken[-1]], axis=1))
    for _ in range(5):
        near = np.argmin([np.linalg.norm(shape - shape[t], axis=1) for t in taken], axis=0)
        for n in range(1, len(taken)):
            mine = np.flatnonzero(near == n)
            if len(mine):
                centre = shape[mine].mean(axis=0)
                taken[n] = int(mine[np.argmin(np.linalg.norm(shape[mine] - centre, axis=1))])
    near = np.argmin([np.linalg.norm(shape - shape[t], axis=1) for t in taken], axis=0)
    return [(t, float((near == n).sum())) for n, t in enumerate(taken) if (near == n).any()]


@dataclass
class _State:
    """Where a chain of windows stands."""

    on: Floats | None
    units: Floats | None
    waiting: Floats
    left: Floats
    seen: Floats


def _chain(
    instance: Instance, prices: Prices, first: int, last: int, gap_fraction: float, watch: Watch
) -> tuple[Floats, Floats, Floats, Floats]:
    """Windows one after another over [first, last): machines, units, loads, backlog by hour."""
    border = np.minimum(prices.midnight, instance.waiting_most()[:, last - 1])
    state = _State(None, None, np.zeros(0), instance.job_tokens.copy(), prices.peak_kw.copy())
    if first > 0:
        before = instance.waiting_most()[:, first - 1]
        state.waiting = np.minimum(prices.midnight, before)
        # What the chain before trains is known only when it has: each trains its share of the job's hours.
        state.left = state.left * _overlap(instance, first, len(instance.hours))
    elif last < len(instance.hours):
        state.left = state.left * _overlap(instance, first, last)
    parts: list[tuple[Floats, ...]] = []
    short = len(instance.hours) <= _WHOLE_HOURS
    length, ahead = (LONGER_HOURS, LONGER_AHEAD_HOURS) if short else (WINDOW_HOURS, AHEAD_HOURS)
    start = first
    while start < last:
        cut = watch.over
        if cut:
            length, ahead = HOURS_PER_DAY, 0
        end = min(start + length, last)
        until = min(end + ahead, last)
        mine = watch.finish(FINISH_S) if cut else Watch(watch.left_s(), None, stop=watch.stop)
        made = _window_plan(instance, prices, state, (start, until, last), border, gap_fraction, mine, cut)
        if made is None and watch.over and not cut:
            continue  # interrupted in this window: once more, day by day
        if made is None:
            raise PerTokenError(f"hours {start} to {until} of the horizon have no plan")
        part, planned = made
        kept = end - start
        parts.append(
            tuple(a[:, :kept] for a in (planned.machines, planned.units, planned.load, planned.backlog))
        )
        _advance(instance, part, state, planned, start, kept)
        watch.tell(f"{'finishing: ' if cut else ''}day {end // HOURS_PER_DAY} of {last // HOURS_PER_DAY}")
        start = end
    machines, units, load, backlog = (np.concatenate([p[n] for p in parts], axis=1) for n in range(4))
    return machines, units, load, backlog


def _window_plan(
    instance: Instance, prices: Prices, state: _State, hours: tuple[int, int, int], border: Floats, gap_fraction: float,
    watch: Watch, cut: bool,
) -> tuple[Instance, Schedule] | None:  # fmt: skip
    """One window's problem and plan; None where the watch was over before there was one.

    Raises InfeasibleError where the window has no plan, its constraint named.
    """
    part, program = _window_program(instance, prices, state, *hours, border)
    found = rough(part, program, watch) if cut else search(part, program, gap_fraction, watch, quick=True)
    if found.x is None and not watch.over:
        # Perhaps what must be left waiting is in the way.
        program = build(part, Goal())
        found = search(part, program, gap_fraction, watch, quick=True)
    if found.x is None and found.status == "infeasible":
        raise _nothing(part, found.status, watch, f"hours {hours[0]} to {hours[1]} of the horizon have")
    return None if found.x is None else (part, schedule(part, program, found.x))


def _nothing(part: Instance, status: str, watch: Watch, who: str) -> PerTokenError:
    """The error of a part without a plan: which of its constraints is in the way."""
    if status != "infeasible":
        return PerTokenError(f"{who} no plan ({status})")
    causes = _infeasible.explain(part, Goal(), watch.finish(FINISH_S))
    found = _infeasible.error(causes)
    found.args = (f"{who} no plan: {found}",)
    return found


def _overlap(instance: Instance, first: int, last: int) -> Floats:
    """Share of each job's hours that lie in [first, last)."""
    inside = np.minimum(instance.job_deadline, last) - np.maximum(instance.job_release, first)
    whole = np.maximum(instance.job_deadline - instance.job_release, 1)
    return np.asarray(np.clip(inside, 0, None) / whole, dtype=np.float64)


def _advance(
    instance: Instance, part: Instance, state: _State, made: Schedule, start: int, kept: int
) -> None:
    state.on, state.units = made.machines[:, kept - 1], made.units[:, kept - 1]
    state.waiting = made.backlog[:, kept - 1]
    work = made.load[:, :kept].sum(axis=1) * part.useful()
    for j in range(len(state.left)):
        state.left[j] = max(0.0, state.left[j] - work[instance.flow_job == j].sum())
    for n, k in enumerate(instance.peaks):
        inside = np.flatnonzero(k.hours[start : start + kept])
        if len(inside):
            state.seen[n] = max(state.seen[n], float(made.site_kw[k.site][inside].max()))


def _window_program(
    instance: Instance, prices: Prices, state: _State, start: int, until: int, last: int, border: Floats
) -> tuple[Instance, Program]:
    """A window and its program: from the state left, and no more left waiting than the representative days
    leave.

    At a border between two chains exactly that is left, which the next chain takes over.
    """
    part = _window(instance, start, until, state.left, state.seen)
    waiting = state.waiting if len(state.waiting) else None
    part = replace(part, initial_on=state.on, initial_units=state.units, initial_backlog=waiting)
    program = build(part, Goal())
    backlog = program.columns["backlog"]
    here = backlog[:, -1] if backlog.size else np.zeros(0, dtype=np.int64)
    some = here >= 0
    if until == len(instance.hours) or not some.any():
        return part, program
    wanted = (np.minimum(prices.midnight, part.waiting_most()[:, -1]) / program.class_scale)[some]
    lower, upper = program.lower.copy(), program.upper.copy()
    upper[here[some]] = wanted
    if until == last:
        lower[here[some]] = upper[here[some]] = (border / program.class_scale)[some]
    return part, replace(program, lower=lower, upper=upper)


def _window(instance: Instance, start: int, until: int, left: Floats, seen: Floats) -> Instance:
    """One window: peaks already set, and of each job what must be done here: what the hours after could not
    do."""
    part = window(instance, start, until)
    rest = instance.job_deadline - until
    must = np.where(
        rest <= 0, left, np.minimum(left, left * (until - start) / np.maximum(rest + until - start, 1))
    )
    inside = (instance.job_release < until) & (instance.job_deadline > start)
    peaks, n = [], 0
    for number, k in enumerate(instance.peaks):
        if k.hours[start:until].any():
            due = max((f * float(seen[q]) for q, f in k.ratchets), default=0.0)
            already = max(float(seen[number]), due)
            # A kW more is paid for again in every later month that looks back on this one.
            later = _paid_later(instance, number, until)
            usd = tuple(u + later for u in part.peaks[n].usd_per_kw or ())
            peaks.append(
                replace(part.peaks[n], already_kw=already, so_far_kw=float(seen[number]), usd_per_kw=usd)
            )
            n += 1
    return replace(part, job_tokens=np.where(inside, must, 0.0), peaks=tuple(peaks))


def _paid_later(instance: Instance, number: int, until: int) -> float:
    """What a kW more of a peak costs in the months after hour `until` that look back on it [USD per kW]."""
    return sum(
        f * instance.peak_prices(k)[0]
        for k in instance.peaks
        if not k.hours[:until].any()
        for q, f in k.ratchets
        if q == number
    )
