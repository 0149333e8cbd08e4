"""When a job of fixed size runs: hours chosen by what they cost at the relaxation's prices, starts counted.

The relaxation runs such a job a little in every hour. Here each job takes one size on its pool and whole
hours: the cheapest on/off sequence whose hours, less what each start loses, do the work. With a value v per
hour of work the best sequence is a shortest path over (hour, off | hours on so far up to the minimum run); v
is raised until the work is done.
"""

from __future__ import annotations

import numpy as np

from pertoken.plan._instance import Bools, Floats, Instance, Ints
from pertoken.plan._program import Program, coefficients
from pertoken.plan._solve import Session, fix

_BISECTIONS = 30


def place_jobs(instance: Instance, program: Program, session: Session) -> bool:
    """Fix the whole units of all jobs; False where the relaxation cannot be met with them."""
    i, units = instance, program.columns["units"]
    plans = {k: np.zeros(len(i.hours)) for k in job_units(i)}
    if not plans:
        return True
    price = _prices(i, program, session)
    done = np.zeros(len(i.job_names))
    load = session.x[program.columns["y"]]
    for j in range(len(i.job_names)):
        flows = np.flatnonzero((i.flow_job == j) & (i.flow_unit >= 0))
        flows = flows[i.unit_whole[i.flow_unit[flows]]]
        if not len(flows) or done[j]:
            continue
        work = load[flows].sum(axis=1) * i.useful()[flows]
        for f in flows[np.argsort(-work, kind="stable")]:
            k = int(i.flow_unit[f])
            hours = float(i.job_tokens[j] / i.useful()[f])
            window = np.zeros(len(i.hours), dtype=np.bool_)
            window[int(i.job_release[j]) : int(i.job_deadline[j])] = True
            runs = cheapest_hours(
                price[k], window, hours, float(i.unit_start_hours[k]), int(i.unit_min_run[k])
            )
            if runs is not None:
                plans[k] = np.maximum(plans[k], runs)
                done[j] = 1
                break
    for k, runs in plans.items():
        fix(session, units[k], runs)
    return session.relax() or _by_integers(program, session, units[list(plans)])


def _by_integers(program: Program, session: Session, columns: Ints) -> bool:
    """The hours of all jobs by an integer program in which only they are whole: where prices see no full
    machine."""
    mine = columns[columns >= 0]
    session.bounds(mine, program.lower[mine], program.upper[mine])
    if not session.integer(_GAP, None, max(_SHARE * session.watch.left_s(), 1.0), only=mine):
        return False
    fix(session, mine, np.round(session.x[mine]))
    return session.relax()


_GAP, _SHARE = 0.005, 0.3
"""Gap of that program, and the share of the time left that it may take."""


def job_units(i: Instance) -> list[int]:
    """Whole units that do nothing but jobs, one at a time."""
    found = []
    for k in np.flatnonzero(i.unit_whole & (i.unit_most <= 1)):
        flows = i.flow_job[i.flow_unit == k]
        if len(flows) and (flows >= 0).all():
            found.append(int(k))
    return found


def _prices(i: Instance, program: Program, session: Session) -> Floats:
    """What an hour of each unit costs at the relaxation's prices, shape (K, T): machines, and energy at full
    load."""
    price = np.zeros((len(i.unit_pool), len(i.hours)))
    for block in program.blocks:
        if block.name == "capacity":
            position = {name: n for n, name in enumerate(block.entities)}
            for k in range(len(price)):
                p = i.unit_pool[k]
                row = block.rows[position[i.pool_names[p]]]
                price[k] += -session.row_dual[row] * i.unit_gpus[k] / max(i.machine_gpus[p], 1)
    energy = coefficients(i).energy_flows * i.energy_prices(i.pool_names)[i.flow_pool]
    for k in job_units(i):
        price[k] += energy[np.flatnonzero(i.flow_unit == k)[0]]
    return price


def cheapest_hours(
    price: Floats, window: Bools, hours: float, start_hours: float, min_run: int
) -> Floats | None:
    """The cheapest hours to run `hours` of work in a window, 1 where it runs, shape (T,); None where they are
    too few.

    Parameters: price [USD per hour on, (T,)]; window: hours it may run [(T,)]; hours of work; start_hours
    lost at each start; min_run: fewest hours on. The work is done by whole hours, so the last may be longer
    than needed.

    >>> cheapest_hours(np.array([3., 1., 1., 3.]), np.ones(4, dtype=bool), 2.0, 0.0, 1).tolist()
    [0.0, 1.0, 1.0, 0.0]
    """
    inside = np.flatnonzero(window)
    if not len(inside):
        return None
    cost = price[inside]
    low, high = 0.0, float(np.abs(cost).sum()) + 1.0
    best = _path(cost, high, start_hours, min_run)
    if _work(best, start_hours) < hours - 1e-9:
        return None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        runs = _path(cost, middle, start_hours, min_run)
        if _work(runs, start_hours) >= hours - 1e-9:
            high, best = middle, runs
        else:
            low = middle
    best = _trimmed(best, cost, hours, start_hours, min_run)
    found = np.zeros(len(price))
    found[inside] = best
    return found


def _work(runs: Floats, start_hours: float) -> float:
    starts = float(np.maximum(np.diff(runs, prepend=0.0), 0.0).sum())
    return float(runs.sum()) - start_hours * starts


def _path(cost: Floats, value: float, start_hours: float, min_run: int) -> Floats:
    """On/off sequence of least cost less value × work; states: off, on for 1 … min_run hours or more."""
    T, states = len(cost), min_run + 1
    total = np.full((T + 1, states), np.inf)
    came = np.zeros((T + 1, states), dtype=np.int64)
    total[0, 0] = 0.0
    for t in range(T):
        gain = cost[t] - value
        last = total[t]
        leave = last[0] if last[0] <= last[min_run] else last[min_run]
        total[t + 1, 0], came[t + 1, 0] = leave, 0 if last[0] <= last[min_run] else min_run
        begin = 1
        total[t + 1, begin], came[t + 1, begin] = last[0] + gain + value * start_hours, 0
        for state in range(2, states):
            total[t + 1, state], came[t + 1, state] = last[state - 1] + gain, state - 1
        stay = last[min_run] + gain
        if stay < total[t + 1, min_run]:
            total[t + 1, min_run], came[t + 1, min_run] = stay, min_run
    runs = np.zeros(T)
    state = 0 if total[T, 0] <= total[T, min_run] else min_run
    for t in range(T, 0, -1):
        runs[t - 1] = float(state > 0)
        state = int(came[t, state])
    return runs


def _trimmed(runs: Floats, cost: Floats, hours: float, start_hours: float, min_run: int) -> Floats:
    """Without hours at the end of a run that are not needed, dearest first."""
    runs = runs.copy()
    while True:
        begin = np.flatnonzero(np.diff(runs, prepend=0.0) > 0)
        end = np.flatnonzero(np.diff(runs, append=0.0) < 0)
        longer = [(a, b) for a, b in zip(begin, end, strict=True) if b - a + 1 > min_run]
        edges = sorted({e for pair in longer for e in pair}, key=lambda t: -cost[t])
        for t in edges:
            trial = runs.copy()
            trial[t] = 0.0
            if _work(trial, start_hours) >= hours - 1e-9:
                runs = trial
                break
        else:
            return runs
