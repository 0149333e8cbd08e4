"""From relaxation to whole machines: round what holds for the whole horizon, then dive hour by hour.

1. The relaxation gives the bound.
2. What is decided once (machines held, the pool of each job) is rounded and fixed; on fleets the relaxation
   of the rest is then nearly whole by itself.
3. Dive: of each hour the count nearest to its ceiling is rounded up, the better half of these are fixed, the
   relaxation is solved again from where it stands, until every count is whole. Rounding all counts up at once
   after step 2 gives the first feasible plan.
4. Where rounding left a wide gap, each pool is tried alone, the best of them as an integer program.
5. Where the gap is still too wide, HiGHS goes on from that plan as an integer program.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pertoken.plan._instance import Bools, Floats, Instance, Ints
from pertoken.plan._jobs import job_units, place_jobs
from pertoken.plan._policy_rows import settle_full
from pertoken.plan._program import INF, Program
from pertoken.plan._solve import Session, Watch, fix, gap, is_fraction, near

_ROUNDS = 40
_WIDE = 0.05
"""Gap after rounding from which each pool is tried alone."""
_ALONE_SHARE = 0.3
"""Share of the time left that this may take."""
_SLIGHT = 1e-6
"""Part by which a gap may pass the one asked for: what floats lose."""
_BARRIER_ROWS = 5000
"""Rows from which the first relaxation is solved by an interior point method and crossed over to a basis."""


@dataclass(frozen=True)
class Found:
    """Columns of the best solution, its objective, the bound, and how the search ended."""

    x: Floats | None
    objective: float
    bound: float
    status: str
    relaxed: Floats
    row_dual: Floats
    reduced_cost: Floats
    first_feasible_s: float | None


def search(
    instance: Instance, program: Program, gap_fraction: float, watch: Watch, *, quick: bool = False
) -> Found:
    """The best solution within the gap, the time limit, or until told to stop; quick: what rounding finds is
    enough."""
    watch.best = watch.bound = None
    session = Session(program, watch)
    if not session.relax(barrier=program.shape[0] > _BARRIER_ROWS):
        return Found(None, INF, -INF, session.status, session.x, session.row_dual, session.reduced_cost, None)
    relaxed, duals, reduced, bound = session.x, session.row_dual, session.reduced_cost, session.objective
    watch.tell("linear relaxation", bound=bound)
    watch.drain()
    best = dive(instance, session, program, watch, gap_fraction)
    bound = watch.bound if watch.bound is not None else bound
    reached = gap(best[1], bound) if best else None
    if not watch.over and (reached is None or reached > max(_WIDE, gap_fraction)):
        best = _pool_by_pool(instance, program, watch, best, gap_fraction)
        reached = gap(best[1], bound) if best else None
    status = "optimal" if reached is not None and reached <= gap_fraction else session.status
    if not watch.over and (reached is None or (reached > gap_fraction and not quick)):
        session.free()
        start = best[0] if best else None
        limit = watch.left_s()
        if session.integer(gap_fraction, start, limit):
            bound = _tighter(bound, session.mip_bound, program.maximise)
            raw = session.x.copy(), session.objective
            polished = polish(session, raw[0]) or raw
            if best is None or _better(polished[1], best[1], program.maximise):
                best = polished
        status = session.status if best is None else "optimal"
        if session.status == "infeasible":
            status = "infeasible"
    if watch.over and best is not None:
        status = "stopped" if watch.stop.is_set() else "time limit"
        reached = gap(best[1], bound)
        status = "optimal" if reached is not None and reached <= gap_fraction else status
    elif best is not None and not quick:
        reached = gap(best[1], bound)
        status = "optimal" if reached is not None and reached <= gap_fraction + _SLIGHT else "heuristic"
    x, objective = best if best else (None, INF)
    watch.tell("done", best=objective if best else None, bound=bound)
    watch.drain()
    return Found(x, objective, bound, status, relaxed, duals, reduced, watch.first_feasible_s)


def rough(instance: Instance, program: Program, watch: Watch) -> Found:
    """A plan soon, with no thought for its cost: the relaxation, every count up; where jobs have sizes, as `search`."""
    session = Session(program, watch)
    if job_units(instance) or not session.relax(barrier=program.shape[0] > _BARRIER_ROWS):
        return search(instance, program, 1.0, watch, quick=True)
    relaxed, duals, reduced, bound = session.x, session.row_dual, session.reduced_cost, session.objective
    best = _first(instance, session, program, watch)
    if best is None:
        return search(instance, program, 1.0, watch, quick=True)
    return Found(best[0], best[1], bound, "rounded", relaxed, duals, reduced, watch.elapsed_s())


def _tighter(a: float, b: float, maximise: bool) -> float:
    return (min(a, b) if maximise else max(a, b)) if np.isfinite(b) else a


def _better(a: float, b: float, maximise: bool) -> bool:
    return a > b if maximise else a < b


def polish(session: Session, x: Floats) -> tuple[Floats, float] | None:
    """The best continuous part for the whole part of x."""
    whole = np.flatnonzero(session.program.integer)
    session.free()
    fix(session, whole, np.round(x[whole]))
    if not session.relax():
        return None
    return session.x.copy(), session.objective


def dive(
    instance: Instance, session: Session, program: Program, watch: Watch, gap_fraction: float
) -> tuple[Floats, float] | None:
    """A whole solution by rounding and solving again; None where rounding ran into a wall."""
    whole = np.flatnonzero(program.integer)
    if not is_fraction(session.x[whole]).any():
        watch.tell("relaxation is whole", best=session.objective)
        return session.x.copy(), session.objective
    first = _first(instance, session, program, watch)
    if not _settle_once(session, program, gap_fraction) or not settle_full(instance, program, session):
        return first
    if not place_jobs(instance, program, session):
        return first
    best = _all_up(session, watch) or first
    if first is not None and best is not None and _better(first[1], best[1], program.maximise):
        best = first
    for name in _COUNTS:
        for _ in range(_ROUNDS):
            columns, values = _whole_of(session, name)
            open_ = (columns >= 0) & is_fraction(values)
            if not open_.any():
                break
            if watch.over or not _round_some(session, columns, values, open_):
                return best
    last = _all_up(session, watch)
    if last and (best is None or _better(last[1], best[1], program.maximise)):
        best = last
    return best


def _first(
    instance: Instance, session: Session, program: Program, watch: Watch
) -> tuple[Floats, float] | None:
    """A feasible plan as soon as there can be one: each job where most of it is, all counts up; the session
    as before."""
    saved = session.x, session.row_dual, session.reduced_cost, session.objective
    held, runs_on, opened, tier = (program.columns[n] for n in ("held", "runs_on", "open", "tier"))
    for job in range(runs_on.shape[0]):
        here = runs_on[job][runs_on[job] >= 0]
        if len(here):
            most = int(np.argmax(session.x[here]))
            fix(session, here, (np.arange(len(here)) == most).astype(np.float64))
    for columns in (held[held >= 0], opened[opened >= 0], tier[tier >= 0]):
        fix(session, columns, np.minimum(np.ceil(near(session.x[columns])), program.upper[columns]))
    found = None
    if session.relax() and not job_units(instance) and settle_full(instance, program, session):
        found = _all_up(session, watch)
    session.free()
    session.x, session.row_dual, session.reduced_cost, session.objective = saved
    return found


_COUNTS = ("any", "units", "machines")
"""Variables that are whole in each hour, in the order in which they are rounded."""


def _pool_by_pool(
    instance: Instance, program: Program, watch: Watch, best: tuple[Floats, float] | None, gap_fraction: float
) -> tuple[Floats, float] | None:
    """The best of what was found and each pool alone, beside APIs.

    Where few units do all the work, the relaxation spreads it over every pool, and rounding up pays for all of them.
    The cheapest pool alone is a small program, and solved as one.
    """
    # A watch of its own: what bounds this part bounds nothing else.
    inner = Watch(_ALONE_SHARE * watch.left_s(), None, stop=watch.stop)
    found: list[tuple[float, int, Program, Floats]] = []
    for p in np.flatnonzero(instance.machine_gpus > 0):
        if inner.over:
            break
        alone = _alone(instance, program, int(p))
        session = Session(alone, inner)
        made = dive(instance, session, alone, inner, 0.0) if session.relax() else None
        inner.best = inner.bound = None
        if made is not None:
            found.append((-made[1] if program.maximise else made[1], int(p), alone, made[0]))
    if not found:
        return best
    cost, which, alone, x = min(found, key=lambda one: one[:2])
    session = Session(alone, inner)
    made = x, cost if not program.maximise else -cost
    if not inner.over and session.integer(gap_fraction, x, inner.left_s()):
        raw = session.x.copy(), session.objective
        made = polish(session, raw[0]) or raw
    if best is None or _better(made[1], best[1], program.maximise):
        best = made
        watch.tell(f"{instance.pool_names[which]} alone", best=best[1])
        watch.drain()
    return best


def _alone(instance: Instance, program: Program, p: int) -> Program:
    """The program with no machine, unit or load on any pool of machines but one; what is held stays held."""
    others = np.flatnonzero((instance.machine_gpus > 0) & (np.arange(len(instance.machine_gpus)) != p))
    gone = (
        program.columns["machines"][others],
        program.columns["units"][np.isin(instance.unit_pool, others)],
        program.columns["y"][np.isin(instance.flow_pool, others)],
    )
    upper = program.upper.copy()
    for columns in gone:
        here = columns[columns >= 0]
        upper[here] = np.minimum(upper[here], program.lower[here])
    return replace(program, upper=upper)


def _whole_of(session: Session, name: str) -> tuple[Ints, Floats]:
    """Columns of a variable that must be whole (−1 elsewhere), and their values."""
    program = session.program
    columns = program.columns[name]
    columns = np.where((columns >= 0) & program.integer[np.maximum(columns, 0)], columns, -1)
    return columns, np.where(columns >= 0, near(session.x)[np.maximum(columns, 0)], 0.0)


def _all_up(session: Session, watch: Watch) -> tuple[Floats, float] | None:
    """Every count up, units before the machines they run on; leaves the session as it found it."""
    saved, lower, upper = session.x, session.lower.copy(), session.upper.copy()
    found: tuple[Floats, float] | None = None
    for name in _COUNTS:
        columns, values = _whole_of(session, name)
        here = columns[columns >= 0]
        if len(here):
            fix(session, here, np.minimum(np.ceil(values[columns >= 0]), session.program.upper[here]))
            if not session.relax():
                break
    else:
        found = session.x.copy(), session.objective
        sign = -1 if session.program.maximise else 1
        if watch.best is None or sign * found[1] < sign * watch.best:
            watch.tell("rounded", best=found[1])
            watch.drain()
    changed = np.flatnonzero((lower != session.lower) | (upper != session.upper))
    session.bounds(changed, lower[changed], upper[changed])
    session.x = saved
    return found


def _settle_once(session: Session, program: Program, gap_fraction: float) -> bool:
    """Fix what is decided once for the horizon; False where no rounding of it is feasible.

    Each job on the best of the pools that did some of it, open what is used, machines held to the nearest.
    Where that costs more than the gap, or fails, by an integer program in which only these few are whole.
    """
    once = np.concatenate([program.columns[n][program.columns[n] >= 0] for n in _ONCE])
    if not len(once):
        return True
    bound = session.objective
    rounded = _round_once(session, program)
    bound = bound if session.watch.bound is None else _tighter(bound, session.watch.bound, program.maximise)
    if rounded is not None and (gap(rounded[0], bound) or 0.0) <= gap_fraction:
        return True
    if rounded is not None:
        rounded = _close_some(session, program, once, rounded)
        if (gap(rounded[0], bound) or 0.0) <= gap_fraction:
            fix(session, once, rounded[1])
            return session.relax()
    session.bounds(once, program.lower[once], program.upper[once])
    limit = max(_ONCE_SHARE * session.watch.left_s(), 1.0)
    found = session.integer(gap_fraction / 2, None, limit, only=once)
    if found:
        # Cut short, its bound may lie below what is known.
        session.watch.tell(
            "choosing what is held", bound=_tighter(bound, session.mip_bound, program.maximise)
        )
    if found and (rounded is None or _better(session.objective, rounded[0], program.maximise)):
        fix(session, once, np.round(session.x[once]))
    elif rounded is not None:
        fix(session, once, rounded[1])
    else:
        return False
    return session.relax()


def _close_some(
    session: Session, program: Program, once: Ints, rounded: tuple[float, Floats]
) -> tuple[float, Floats]:
    """What is decided once, each place that is open closed in turn, dearest first, where that is better.

    The relaxation opens a part of many places, and rounding opens them all.
    """
    until = session.watch.elapsed_s() + _CLOSE_SHARE * session.watch.left_s()
    opened, best = program.columns["open"], rounded
    closed: list[int] = []
    for column in opened[np.argsort(-program.cost[opened], kind="stable")]:
        if best[1][once == column][0] < 0.5 or program.lower[column] > 0:
            continue
        if session.watch.over or session.watch.elapsed_s() > until:
            break
        session.bounds(once, program.lower[once], program.upper[once])
        shut = np.array([*closed, column])
        fix(session, shut, np.zeros(len(shut)))
        found = _round_once(session, program, untouched=False) if session.relax() else None
        if found is not None and _better(found[0], best[0], program.maximise):
            best, closed = found, [*closed, int(column)]
    return best


_CLOSE_SHARE = 0.15
"""Share of the time left that closing what need not be open may take."""
_ONCE = ("held", "runs_on", "open", "tier")
"""Variables that are decided once for the horizon."""
_ONCE_SHARE = 0.25
"""Share of the time left that the choice of what is decided once may take."""
_CANDIDATES = 4
"""Pools tried for each job."""


def _round_once(session: Session, program: Program, *, untouched: bool = True) -> tuple[float, Floats] | None:
    """Round and fix one kind after another, solving again between; objective and values, None where it
    fails. untouched: nothing is fixed yet, so that what the first job costs at least bounds every plan."""
    held, runs_on, opened, tier = (program.columns[n] for n in _ONCE)
    for job in range(runs_on.shape[0]):
        here = runs_on[job][runs_on[job] >= 0]
        if len(here) and not _place(session, here, program.maximise, bounds=untouched):
            return None
        untouched = untouched and not len(here)
    for columns, rounding in (
        (opened[opened >= 0], np.ceil),
        (held[held >= 0], np.round),
        (tier[tier >= 0], np.ceil),
    ):
        values = rounding(near(session.x[columns]))
        fix(session, columns, np.clip(values, program.lower[columns], program.upper[columns]))
        if len(columns) and not session.relax():
            return None
    once = np.concatenate([n[n >= 0] for n in (held, runs_on, opened, tier)])
    return session.objective, session.x[once].copy()


def _place(session: Session, columns: Ints, maximise: bool, *, bounds: bool) -> bool:
    """Fix a job on the pool of least cost; False where none is feasible.

    Pools are tried by how much of the job the relaxation gave them, each dropped as soon as it is dearer than
    the best. Where all were tried (`bounds`: nothing else is fixed yet), the best is a bound no plan can
    beat.
    """
    share = session.x[columns]
    order = np.argsort(-share, kind="stable")
    if share.max() > 1 - 1e-6:
        fix(session, columns, (np.arange(len(columns)) == order[0]).astype(np.float64))
        return session.relax()
    best: tuple[float, int] | None = None
    patience = session.watch.elapsed_s() + _PLACE_SHARE * session.watch.left_s()
    for tried, n in enumerate(order):
        if (tried >= _CANDIDATES or best is not None) and session.watch.elapsed_s() > patience:
            bounds = False
            break
        fix(session, columns, (np.arange(len(columns)) == n).astype(np.float64))
        cutoff = None if best is None or maximise else best[0]
        if session.relax(cutoff=cutoff) and (best is None or _better(session.objective, best[0], maximise)):
            best = session.objective, int(n)
        elif session.status not in ("infeasible", "cut off", "optimal"):
            bounds = False
    if best is None:
        return False
    if bounds and not maximise:
        session.watch.tell("placing jobs", bound=best[0])
    fix(session, columns, (np.arange(len(columns)) == best[1]).astype(np.float64))
    return session.relax()


_PLACE_SHARE = 0.2
"""Share of the time left that placing one job may take beyond the first pools."""


def _round_some(session: Session, columns: Ints, values: Floats, open_: Bools) -> bool:
    """Fix the better half of each hour's count nearest to its ceiling; step back to the floor where that is a
    wall."""
    up = np.where(open_, np.ceil(values) - values, np.inf)
    row = up.argmin(axis=0)
    hours = np.flatnonzero(np.isfinite(up.min(axis=0)))
    distance = up[row[hours], hours]
    take = hours[np.argsort(distance, kind="stable")[: max(8, (len(hours) + 1) // 2)]]
    chosen = columns[row[take], take]
    before = values[row[take], take]
    fix(session, chosen, np.minimum(np.ceil(before), session.program.upper[chosen]))
    if session.relax():
        return True
    fix(session, chosen, np.floor(before))
    if session.relax():
        return True
    session.bounds(chosen, session.program.lower[chosen], session.program.upper[chosen])
    session.relax()
    return False
