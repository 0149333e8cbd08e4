"""From a solution to quantities: what ran, what it used, and, with the ledger's own rates, what it cost.

Nothing here trusts the solver's auxiliary columns: rented machines, starts, power and peaks are computed again from the
counts and the loads, so that the plan's cost is a sum over usage and its agreement with the objective is a check.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pertoken.plan._instance import Floats, Instance
from pertoken.plan._program import Coefficients, Program, class_meters, coefficients
from pertoken.units import GRAMS_PER_KILOGRAM, IDLE, METERS, site_pool


@dataclass(frozen=True)
class Schedule:
    """What runs when. Shapes as in the program: P pools, K units, F flows, D classes, T hours."""

    machines: Floats
    held: Floats
    rented: Floats
    starts: Floats
    units: Floats
    loads: Floats
    load: Floats
    """Fully loaded units of each flow, shape (F, T)."""
    backlog: Floats
    """Requests waiting at the end of each hour, shape (D, T)."""
    kwh: Floats
    """Energy at the utility meter, shape (P, T)."""
    site_kw: Floats
    peak_kw: Floats


@dataclass(frozen=True)
class Entry:
    """One row per hour of the usage table: quantity of a meter, shape (T,)."""

    pool: str
    model: str
    tenant: str
    phase: str
    meter: str
    quantity: Floats
    basis: str


def _values(program: Program, x: Floats, name: str) -> Floats:
    number = program.columns[name]
    return np.where(number >= 0, x[np.maximum(number, 0)], 0.0) if len(x) else np.zeros(number.shape)


def schedule(instance: Instance, program: Program, x: Floats) -> Schedule:
    """The schedule of a solution, counts made exactly whole."""
    i = instance
    machines, units = np.round(_values(program, x, "machines")), np.round(_values(program, x, "units"))
    implied = (program.columns["machines"] >= 0) & ~_whole(program, "machines")
    if implied.any():
        need = _machines_needed(i, units)
        machines = np.where(implied, np.maximum(machines, np.ceil(need - 1e-6)), machines)
    load = np.maximum(_values(program, x, "y"), 0.0)
    backlog = np.maximum(_values(program, x, "backlog"), 0.0) * program.class_scale[:, None]
    return derived(i, machines, np.round(_values(program, x, "held")), units, load, backlog)


def _whole(program: Program, name: str) -> Floats:
    number = program.columns[name]
    return np.asarray(np.where(number >= 0, program.integer[np.maximum(number, 0)], False))


def _machines_needed(i: Instance, units: Floats) -> Floats:
    need = np.zeros((len(i.pool_names), len(i.hours)))
    for k in np.flatnonzero(i.unit_whole):
        need[i.unit_pool[k]] += units[k] * i.unit_gpus[k] / max(i.machine_gpus[i.unit_pool[k]], 1)
    return need


def derived(
    instance: Instance, machines: Floats, held: Floats, units: Floats, load: Floats, backlog: Floats
) -> Schedule:
    """All that follows from counts, loads and backlog."""
    i, c = instance, coefficients(instance)
    rented = np.maximum(machines - held[:, None], 0.0)
    starts = _starts(i, machines, i.initial_on)
    loads = _starts(i, units, i.initial_units)
    kwh = c.energy_machines * machines + c.energy_off * (held[:, None] + rented) + c.energy_starts * starts
    np.add.at(kwh, i.flow_pool, c.energy_flows * load)
    site_kw = i.site_base_kw.copy()
    on_site = i.pool_site >= 0
    np.add.at(site_kw, i.pool_site[on_site], kwh[on_site])
    peaks = [max(k.already_kw, float(site_kw[k.site][k.hours].max(initial=0.0))) for k in i.peaks]
    return Schedule(
        machines, held, rented, starts, units, loads, load, backlog, kwh, site_kw, np.array(peaks)
    )


def _starts(i: Instance, count: Floats, initial: Floats | None) -> Floats:
    before = np.where(i.previous >= 0, count[:, np.maximum(i.previous, 0)], 0.0)
    first = i.previous < 0
    before[:, first] = count[:, first] if initial is None else initial[:, None]
    return np.maximum(count - before, 0.0)


@dataclass(frozen=True)
class _Busy:
    """GPU-hours and energy of one flow by phase, shape (T,)."""

    hours: Floats
    kwh: Floats
    lost_hours: Floats
    lost_kwh: Floats


def _busy(i: Instance, c: Coefficients, s: Schedule, f: int) -> _Busy:
    """A flow's GPU-hours, and its energy: its own beyond idle, and the idle power of the machines it fills."""
    pool = i.flow_pool[f]
    hours = s.load[f] * i.unit_gpus[i.flow_unit[f]]
    idle_kwh_per_gpu_hour = i.machine_kw[pool] * i.pue[pool] / max(i.machine_gpus[pool], 1)
    kwh = c.energy_flows[f] * s.load[f] + idle_kwh_per_gpu_hour * hours
    loss = i.flow_loss[f]
    return _Busy(hours * (1 - loss), kwh * (1 - loss), hours * loss, kwh * loss)


def entries(instance: Instance, s: Schedule) -> Iterator[Entry]:
    """All usage of a schedule, resources attributed to model, tenant and phase; idle and waste are rows."""
    i, c = instance, coefficients(instance)
    P, T = len(i.pool_names), len(i.hours)
    used_hours, used_kwh = np.zeros((P, T)), np.zeros((P, T))
    on_held = np.where(
        s.machines > 0, np.minimum(s.machines, s.held[:, None]) / np.maximum(s.machines, 1.0), 1.0
    )
    for f in range(len(i.flow_unit)):
        if not s.load[f].any():
            continue
        yield from _split(i, on_held, i.flow_pool[f], _token_entries(i, s, f))
        if i.flow_unit[f] < 0:
            continue
        busy = _busy(i, c, s, f)
        used_hours[i.flow_pool[f]] += busy.hours + busy.lost_hours
        used_kwh[i.flow_pool[f]] += busy.kwh + busy.lost_kwh
        yield from _split(i, on_held, i.flow_pool[f], _resource_entries(i, f, busy))
    for p in np.flatnonzero(i.machine_gpus > 0):
        yield from _pool_entries(i, c, s, int(p), used_hours[p], used_kwh[p], on_held)
    for number, peak in enumerate(i.peaks):
        quantity = np.zeros(T)
        quantity[peak.at] = s.peak_kw[number]
        yield Entry(site_pool(i.site_names[peak.site]), "", IDLE, "idle", peak.meter, quantity, i.basis)
    for fixed in i.fixed:
        yield Entry(fixed.pool, "", IDLE, fixed.phase, fixed.meter, fixed.quantity, fixed.basis)


def _who(i: Instance, f: int) -> tuple[str, str]:
    d, j = i.flow_class[f], i.flow_job[f]
    return (i.class_model[d], i.class_tenant[d]) if d >= 0 else (i.job_model[j], i.job_tenant[j])


def _token_entries(i: Instance, s: Schedule, f: int) -> Iterator[Entry]:
    model, tenant = _who(i, f)
    pool, done = i.pool_names[i.flow_pool[f]], s.load[f] * i.flow_per_hour[f]
    useful = done * (1 - i.flow_loss[f])
    if i.flow_job[f] >= 0:
        yield Entry(pool, model, tenant, "training", "training_tokens", useful, i.basis)
        if i.flow_loss[f] > 0:
            yield Entry(pool, model, tenant, "waste", "lost_training_tokens", done - useful, i.basis)
        return
    for meter, per_request in class_meters(i).items():
        if per_request[i.flow_class[f]] > 0:
            phase = "input" if "input" in meter else "output"
            yield Entry(pool, model, tenant, phase, meter, useful * per_request[i.flow_class[f]], i.basis)


def _resource_entries(i: Instance, f: int, busy: _Busy) -> Iterator[Entry]:
    model, tenant = _who(i, f)
    pool = i.pool_names[i.flow_pool[f]]
    if i.flow_job[f] >= 0:
        shares = {"training": 1.0}
    else:
        shares = {"input": float(i.flow_prefill[f]), "output": 1 - float(i.flow_prefill[f])}
    for phase, share in shares.items():
        yield Entry(pool, model, tenant, phase, "gpu_hours", busy.hours * share, i.basis)
        yield from _energy(
            i, i.flow_pool[f], Entry(pool, model, tenant, phase, "energy_kwh", busy.kwh * share, i.basis)
        )
    if i.flow_loss[f] > 0:
        yield Entry(pool, model, tenant, "waste", "gpu_hours", busy.lost_hours, i.basis)
        yield from _energy(
            i, i.flow_pool[f], Entry(pool, model, tenant, "waste", "energy_kwh", busy.lost_kwh, i.basis)
        )


def _energy(i: Instance, p: int, entry: Entry) -> Iterator[Entry]:
    """An energy entry, its energy before PUE, and its greenhouse gas where the grid's intensity is known."""
    yield entry
    e = entry
    yield Entry(e.pool, e.model, e.tenant, e.phase, "it_energy_kwh", e.quantity / i.pue[p], e.basis)
    if np.isfinite(i.carbon_g_per_kwh[p]).all():
        yield Entry(e.pool, e.model, e.tenant, e.phase, "gco2e", e.quantity * i.carbon_g_per_kwh[p], e.basis)


def _pool_entries(
    i: Instance, c: Coefficients, s: Schedule, p: int, used_hours: Floats, used_kwh: Floats, on_held: Floats
) -> Iterator[Entry]:
    """Starts as waste, and what nobody used as idle, of one pool."""
    gpus, name = float(i.machine_gpus[p]), i.pool_names[p]
    lost = i.start_hours[p] * s.starts[p] * gpus
    for k in np.flatnonzero(i.unit_whole & (i.unit_pool == p)):
        lost = lost + i.unit_start_hours[k] * s.loads[k] * i.unit_gpus[k]
    # A start's lost hours can only be hours the machines were on.
    lost = np.minimum(lost, np.maximum(s.machines[p] * gpus - used_hours, 0.0))
    idle_kwh_per_gpu_hour = i.machine_kw[p] * i.pue[p] / gpus
    lost_kwh = c.energy_starts[p] * s.starts[p] + idle_kwh_per_gpu_hour * lost
    parts = [
        Entry(name, "", IDLE, "waste", "gpu_hours", lost, i.basis),
        *_energy(i, p, Entry(name, "", IDLE, "waste", "energy_kwh", lost_kwh, i.basis)),
    ]
    if "starts" in METERS:
        parts.append(Entry(name, "", IDLE, "waste", "starts", s.starts[p], i.basis))
    yield from _split(i, on_held, p, iter(parts))
    busy = used_hours + lost
    idle_kwh = np.maximum(s.kwh[p] - used_kwh - lost_kwh, 0.0)
    if i.held_names[p] == name:
        idle = np.maximum((s.held[p] + s.rented[p]) * gpus - busy, 0.0)
        yield Entry(name, "", IDLE, "idle", "gpu_hours", idle, i.basis)
        yield from _energy(i, p, Entry(name, "", IDLE, "idle", "energy_kwh", idle_kwh, i.basis))
        return
    held_idle = np.maximum(s.held[p] * gpus - busy * on_held[p], 0.0)
    rented_idle = np.maximum(s.rented[p] * gpus - busy * (1 - on_held[p]), 0.0)
    share = held_idle / np.maximum(held_idle + rented_idle, 1e-12)
    for pool, hours, part in ((i.held_names[p], held_idle, share), (name, rented_idle, 1 - share)):
        yield Entry(pool, "", IDLE, "idle", "gpu_hours", hours, i.basis)
        yield from _energy(i, p, Entry(pool, "", IDLE, "idle", "energy_kwh", idle_kwh * part, i.basis))


def _split(i: Instance, on_held: Floats, p: int, rows: Iterator[Entry]) -> Iterator[Entry]:
    """A pool's entries between its rented and its held name, in proportion to the machines on."""
    if i.held_names[p] == i.pool_names[p]:
        yield from rows
        return
    for e in rows:
        for pool, part in ((i.held_names[p], on_held[p]), (e.pool, 1 - on_held[p])):
            if (part > 0).any():
                yield Entry(pool, e.model, e.tenant, e.phase, e.meter, e.quantity * part, e.basis)


@dataclass(frozen=True)
class Cost:
    """USD of one pool, component, phase and tenant by hour, shape (T,)."""

    pool: str
    model: str
    tenant: str
    phase: str
    meter: str
    component: str
    usd: Floats


def costs(instance: Instance, usage: Iterator[Entry]) -> list[Cost]:
    """Usage × rates, as the ledger's close does it, in floats."""
    by_key: dict[tuple[str, str], list[tuple[str, Floats]]] = {}
    for rate in instance.rates:
        by_key.setdefault((rate.pool, rate.meter), []).append((rate.component, rate.usd_per_unit))
    peak_usd = {
        (site_pool(instance.site_names[k.site]), k.meter): k.usd_per_kw
        for k in instance.peaks
        if k.usd_per_kw is not None
    }
    found = []
    for e in usage:
        if (e.pool, e.meter) in peak_usd:
            usd = e.quantity * peak_usd[e.pool, e.meter]
            found.append(Cost(e.pool, e.model, e.tenant, e.phase, e.meter, "demand_charge", usd))
            continue
        for component, usd_per_unit in by_key.get((e.pool, e.meter), ()):
            usd = e.quantity * usd_per_unit
            if e.meter.partition(":")[0] != "peak_kw":
                usd = usd * instance.weight
            found.append(Cost(e.pool, e.model, e.tenant, e.phase, e.meter, component, usd))
    return found


def total_usd(instance: Instance, s: Schedule) -> float:
    """The whole cost of a schedule [USD]."""
    return float(sum(cost.usd.sum() for cost in costs(instance, entries(instance, s))))


def carbon_kg(instance: Instance, s: Schedule) -> float:
    """Greenhouse gas of a schedule [kgCO2e]; NaN where a grid's intensity is unknown."""
    return float((s.kwh * instance.carbon_g_per_kwh * instance.weight).sum() / GRAMS_PER_KILOGRAM)
