"""From a solution to quantities: what ran, what it used, and, with the ledger's own rates, what it cost.

Nothing here trusts the solver's auxiliary columns: rented machines, starts, power and peaks are computed
again from the counts and the loads, so that the plan's cost is a sum over usage and its agreement with the
objective is a check.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pertoken.plan._goal import stepped
from pertoken.plan._instance import Bools, Curve, Floats, Instance
from pertoken.plan._power_rows import billed_kw
from pertoken.plan._program import Program, class_meters, coefficients
from pertoken.units import GRAMS_PER_KILOGRAM, IDLE, base_meter, site_pool


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


def _whole(program: Program, name: str) -> Bools:
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
    machines, held, units = machines + 0.0, held + 0.0, units + 0.0  # a count of −0 is 0
    rented = np.maximum(machines - held[:, None], 0.0)
    starts = _starts(i, machines, i.initial_on)
    loads = _starts(i, units, i.initial_units)
    kwh = c.energy_machines * machines + c.energy_off * (held[:, None] + rented) + c.energy_starts * starts
    np.add.at(kwh, i.flow_pool, c.energy_flows * load)
    kwh = kwh + _beyond_line(i, units, loads, load)
    site_kw = i.site_base_kw.copy()
    on_site = i.pool_site >= 0
    np.add.at(site_kw, i.pool_site[on_site], kwh[on_site])
    peaks = billed_kw(i, site_kw)
    return Schedule(machines, held, rented, starts, units, loads, load, backlog, kwh, site_kw, peaks)


def _starts(i: Instance, count: Floats, initial: Floats | None) -> Floats:
    before = np.where(i.previous >= 0, count[:, np.maximum(i.previous, 0)], 0.0)
    first = i.previous < 0
    before[:, first] = count[:, first] if initial is None else initial[:, None]
    return np.maximum(count - before, 0.0)


@dataclass(frozen=True)
class _Energy:
    """Energy by hour at the three boundaries: utility meter, server plug, GPU boards; arrays (T,)."""

    kwh: Floats
    plug: Floats
    gpu: Floats

    def share(self, part: float | Floats) -> _Energy:
        return _Energy(self.kwh * part, self.plug * part, self.gpu * part)


@dataclass(frozen=True)
class _Working:
    """What a unit with a curve shows by hour, shape (T,): its flows' load together, hours with requests in flight,
    prefill's share of them, kW beyond idle at the plug and of the boards."""

    total: Floats
    hours: Floats
    prefill: Floats
    kw: Floats
    gpu_kw: Floats


def _working(i: Instance, k: int, curve: Curve, units: Floats, loads: Floats, load: Floats) -> _Working:
    """Unit k at the load its replicas that are there share evenly; arrays as in `Schedule`."""
    there = np.maximum(units[k] - i.unit_start_hours[k] * loads[k], 0.0)
    total = load[i.flow_unit == k].sum(axis=0)
    each = np.minimum(np.divide(total, there, out=np.zeros_like(total), where=there > 0), 1.0)
    return _Working(
        total,
        there * curve.gpus * -np.expm1(-np.interp(each, curve.load, curve.in_flight)),
        np.interp(each, curve.load, curve.prefill_fraction),
        there * np.interp(each, curve.load, curve.kw),
        there * np.interp(each, curve.load, curve.gpu_kw),
    )


def _beyond_line(i: Instance, units: Floats, loads: Floats, load: Floats) -> Floats:
    """Energy at the meter that units with a curve draw beyond the program's line, shape (P, T)."""
    beyond, line = np.zeros((len(i.pool_names), len(i.hours))), i.line_kw()
    for k, curve in enumerate(i.unit_curve):
        mine = i.flow_unit == k
        if curve is not None and load[mine].any():
            pool = i.unit_pool[k]
            kw = _working(i, k, curve, units, loads, load).kw - (line[mine] * load[mine]).sum(axis=0)
            beyond[pool] += i.pue[pool] * np.maximum(kw, 0.0)
    return beyond


def beyond_line_usd(instance: Instance, s: Schedule) -> float:
    """What the energy that replicas at part load draw beyond the program's line costs, without demand charges [USD]."""
    beyond = _beyond_line(instance, s.units, s.loads, s.load)
    return float((beyond * instance.energy_prices(instance.pool_names) * instance.weight).sum())


def job_hours(instance: Instance, s: Schedule) -> dict[str, int]:
    """Hours from the start of the horizon until each job's last token; 0 where nothing of it runs."""
    found = {}
    for j, name in enumerate(instance.job_names):
        running = np.flatnonzero(s.load[instance.flow_job == j].sum(axis=0) > 1e-9)
        found[name] = int(running[-1]) + 1 if len(running) else 0
    return found


def loads_of(instance: Instance, s: Schedule) -> Floats:
    """Load of each unit's replicas in each hour, as they share it; that of all requests on one where none is there
    (K, T)."""
    found = np.zeros(s.units.shape)
    for k in range(len(found)):
        there = np.maximum(s.units[k] - instance.unit_start_hours[k] * s.loads[k], 0.0)
        total = s.load[instance.flow_unit == k].sum(axis=0)
        found[k] = np.where(there > 0, total / np.maximum(there, 1e-9), 1.0)
    return np.minimum(found, 1.0)


def _loaded(i: Instance, s: Schedule, f: int) -> tuple[Floats, Floats, _Energy]:
    """A flow's GPU-hours, prefill's share of them, and energy: its own beyond idle, and the idle power of those GPUs.

    Where the unit has a curve, its hours are the time with requests in flight and its power that at their load, over
    its flows as their loads are; else the part of its capacity the load takes.
    """
    pool, k = i.flow_pool[f], int(i.flow_unit[f])
    curve = i.unit_curve[k] if i.unit_curve else None
    if curve is None:
        hours, prefill = s.load[f] * i.unit_gpus[k], np.full(len(i.hours), float(i.flow_prefill[f]))
        kw, gpu_kw = i.line_kw()[f] * s.load[f], i.flow_gpu_kw[f] * s.load[f]
    else:
        at_work = _working(i, k, curve, s.units, s.loads, s.load)
        share = np.divide(s.load[f], at_work.total, out=np.zeros_like(at_work.total), where=at_work.total > 0)
        hours, prefill = at_work.hours * share, at_work.prefill
        kw, gpu_kw = np.maximum(at_work.kw * share, i.line_kw()[f] * s.load[f]), at_work.gpu_kw * share
    per_gpu = 1 / max(float(i.machine_gpus[pool]), 1.0)
    plug = kw + i.machine_kw[pool] * per_gpu * hours
    gpu = gpu_kw + i.machine_gpu_kw[pool] * per_gpu * hours
    return hours, prefill, _Energy(plug * i.pue[pool], plug, gpu)


def entries(instance: Instance, s: Schedule) -> Iterator[Entry]:
    """All usage of a schedule, resources attributed to model, tenant and phase; idle and waste are rows."""
    resources = list(_pools(instance, s))
    yield from _tokens(instance, s)
    yield from resources
    yield from _peaks(instance, s, resources)
    yield from _fixed(instance, s, resources)


def _pools(i: Instance, s: Schedule) -> Iterator[Entry]:
    """GPU-hours and energy of every pool, by who used them and for what."""
    P, T = len(i.pool_names), len(i.hours)
    used, energy = np.zeros((P, T)), np.zeros((P, 3, T))
    on_held = _on_held(s)
    for f in np.flatnonzero((i.flow_unit >= 0) & s.load.any(axis=1)):
        hours, prefill, drawn = _loaded(i, s, int(f))
        pool = i.flow_pool[f]
        used[pool] += hours
        energy[pool] += [drawn.kwh, drawn.plug, drawn.gpu]
        yield from _split(i, on_held, pool, _flow_entries(i, int(f), hours, prefill, drawn))
    for p in np.flatnonzero(i.machine_gpus > 0):
        yield from _pool_entries(i, s, int(p), used[p], energy[p], on_held)


def _on_held(s: Schedule) -> Floats:
    """Of the machines on, the share that is held rather than rented, shape (P, T)."""
    return np.where(
        s.machines > 0, np.minimum(s.machines, s.held[:, None]) / np.maximum(s.machines, 1.0), 1.0
    )


def _who(i: Instance, f: int) -> tuple[str, str]:
    d, j = i.flow_class[f], i.flow_job[f]
    return (i.class_model[d], i.class_tenant[d]) if d >= 0 else (i.job_model[j], i.job_tenant[j])


def _tokens(i: Instance, s: Schedule) -> Iterator[Entry]:
    """Tokens, requests and egress of every flow."""
    on_held = _on_held(s)
    for f in np.flatnonzero(s.load.any(axis=1)):
        yield from _split(i, on_held, i.flow_pool[f], _token_entries(i, s, int(f)))


def _token_entries(i: Instance, s: Schedule, f: int) -> Iterator[Entry]:
    model, tenant = _who(i, f)
    pool, done = i.pool_names[i.flow_pool[f]], s.load[f] * i.flow_per_hour[f]
    useful, basis = done * (1 - i.flow_loss[f]), i.basis if i.flow_unit[f] >= 0 else "quoted"
    if i.flow_job[f] >= 0:
        yield Entry(pool, model, tenant, "training", "training_tokens", useful, basis)
        if i.flow_loss[f] > 0:
            yield Entry(pool, model, tenant, "waste", "lost_training_tokens", done - useful, basis)
        return
    for meter, per_request in class_meters(i).items():
        if meter == "egress_gb" and i.flow_unit[f] < 0:
            continue  # an API's answers leave its own cloud, not ours
        if per_request[i.flow_class[f]] > 0:
            phase = "input" if "input" in meter else "output"
            name = stepped(meter, i.flow_step[f] if i.flow_step else "")
            yield Entry(pool, model, tenant, phase, name, useful * per_request[i.flow_class[f]], basis)


def _flow_entries(i: Instance, f: int, hours: Floats, prefill: Floats, drawn: _Energy) -> Iterator[Entry]:
    model, tenant = _who(i, f)
    p, lost = i.flow_pool[f], np.full(len(i.hours), float(i.flow_loss[f]))
    shares = (
        {"training": 1 - lost}
        if i.flow_job[f] >= 0
        else {"input": (1 - lost) * prefill, "output": (1 - lost) * (1 - prefill)}
    )
    shares["waste"] = lost
    for phase, share in shares.items():
        if share.any():
            yield from _resources(
                i, p, i.pool_names[p], model, tenant, phase, hours * share, drawn.share(share)
            )


def _resources(
    i: Instance, p: int, pool: str, model: str, tenant: str, phase: str, hours: Floats, drawn: _Energy
) -> Iterator[Entry]:
    """GPU-hours and energy at each boundary of one phase; gas where the grid's intensity is known."""

    def entry(meter: str, quantity: Floats) -> Entry:
        return Entry(pool, model, tenant, phase, meter, quantity, i.basis)

    yield entry("gpu_hours", hours)
    yield entry("gpu_energy_kwh", drawn.gpu)
    yield entry("it_energy_kwh", drawn.plug)
    shares = i.tier_shares.get(int(i.pool_site[p]))
    if shares is None:
        yield entry("energy_kwh", drawn.kwh)
    else:
        for k, share in enumerate(shares):
            yield entry("energy_kwh" if k == 0 else f"energy_kwh:tier{k + 1}", drawn.kwh * share)
    if np.isfinite(i.carbon_g_per_kwh[p]).all():
        yield entry("gco2e", drawn.kwh * i.carbon_g_per_kwh[p])


def _pool_entries(
    i: Instance, s: Schedule, p: int, used: Floats, used_energy: Floats, on_held: Floats
) -> Iterator[Entry]:
    """Starts as waste, and what nobody used as idle, of one pool."""
    gpus, name = float(i.machine_gpus[p]), i.pool_names[p]
    lost = i.start_hours[p] * s.starts[p] * gpus
    for k in np.flatnonzero(i.unit_whole & (i.unit_pool == p)):
        lost = lost + i.unit_start_hours[k] * s.loads[k] * i.unit_gpus[k]
    # A start's lost hours can only be hours the machines were on.
    lost = np.minimum(lost, np.maximum(s.machines[p] * gpus - used, 0.0))
    plug = i.start_kwh[p] * s.starts[p] + i.machine_kw[p] / gpus * lost
    started = _Energy(plug * i.pue[p], plug, i.machine_gpu_kw[p] / gpus * lost)
    parts = list(_resources(i, p, name, "", IDLE, "waste", lost, started))
    parts.append(Entry(name, "", IDLE, "waste", "starts", s.starts[p], i.basis))
    yield from _split(i, on_held, p, iter(parts))
    busy = used + lost
    whole_plug = s.kwh[p] / i.pue[p]
    whole_gpu = np.minimum(i.machine_gpu_kw[p] * s.machines[p] + used_energy[2], whole_plug)
    idle_gpu = np.maximum(i.machine_gpu_kw[p] * (s.machines[p] - busy / gpus), 0.0)
    rest = _Energy(
        np.maximum(s.kwh[p] - used_energy[0] - started.kwh, 0.0),
        np.maximum(whole_plug - used_energy[1] - started.plug, 0.0),
        np.minimum(idle_gpu, whole_gpu),
    )
    held_idle = np.maximum(s.held[p] * gpus - busy * on_held[p], 0.0)
    rented_idle = np.maximum(s.rented[p] * gpus - busy * (1 - on_held[p]), 0.0)
    if i.held_names[p] == name:
        yield from _resources(i, p, name, "", IDLE, "idle", held_idle + rented_idle, rest)
        return
    share = held_idle / np.maximum(held_idle + rented_idle, 1e-12)
    for pool, hours, part in ((i.held_names[p], held_idle, share), (name, rented_idle, 1 - share)):
        yield from _resources(i, p, pool, "", IDLE, "idle", hours, rest.share(part))


def _peaks(i: Instance, s: Schedule, resources: list[Entry]) -> Iterator[Entry]:
    """Peaks of each billing period, by what each phase drew in the hour of the peak; nobody owns a site's
    peak."""
    for number, peak in enumerate(i.peaks):
        kw, hours = float(s.peak_kw[number]), np.flatnonzero(peak.hours)
        if kw <= 0 or not len(hours):
            continue
        top = int(hours[np.argmax(s.site_kw[peak.site][hours])])
        mine = {i.pool_names[p] for p in np.flatnonzero(i.pool_site == peak.site)}
        mine |= {i.held_names[p] for p in np.flatnonzero(i.pool_site == peak.site)}
        drew: dict[str, float] = {}
        for e in resources:
            if e.pool in mine and e.meter.partition(":")[0] == "energy_kwh":
                drew[e.phase] = drew.get(e.phase, 0.0) + float(e.quantity[top])
        shares = {phase: kwh / max(kw, sum(drew.values())) for phase, kwh in drew.items()}
        shares["idle"] = shares.get("idle", 0.0) + max(0.0, 1 - sum(shares.values()))
        for meter, tier_kw in zip(peak.meters, peak.tiers(kw), strict=True):
            for phase, share in shares.items():
                quantity = np.zeros(len(i.hours))
                quantity[peak.at] = tier_kw * share
                yield Entry(site_pool(i.site_names[peak.site]), "", IDLE, phase, meter, quantity, i.basis)


def _fixed(i: Instance, s: Schedule, resources: list[Entry]) -> Iterator[Entry]:
    """What must be there, over the phases as the GPU hours beside it are (an API's: as its tokens); else
    idle."""
    api = i.machine_gpus <= 0
    for fixed in i.fixed:
        if fixed.only_with is not None and not used(i, s)[fixed.only_with].any():
            continue
        pools = np.flatnonzero(
            np.ones(len(api), dtype=np.bool_) if fixed.only_with is None else fixed.only_with
        )
        names = {i.pool_names[p] for p in pools} | {i.held_names[p] for p in pools}
        by_phase: dict[str, Floats] = {}
        for e in resources:
            if e.pool in names and e.meter == "gpu_hours":
                by_phase[e.phase] = by_phase.get(e.phase, np.zeros(len(i.hours))) + e.quantity
        if not by_phase:
            for e in _tokens(i, s):
                if e.pool in names and base_meter(e.meter).endswith("_tokens"):
                    by_phase[e.phase] = by_phase.get(e.phase, np.zeros(len(i.hours))) + e.quantity
        total = np.sum(list(by_phase.values()), axis=0) if by_phase else np.zeros(len(i.hours))
        some = total > 0
        rest = np.where(some, 0.0, 1.0)
        for phase, part in by_phase.items():
            share = np.divide(part, total, out=np.zeros_like(part), where=some)
            yield Entry(fixed.pool, "", IDLE, phase, fixed.meter, fixed.quantity * share, fixed.basis)
        yield Entry(fixed.pool, "", IDLE, "idle", fixed.meter, fixed.quantity * rest, fixed.basis)


def used(instance: Instance, s: Schedule) -> Bools:
    """Pools that are held, rented or serve anything, shape (P,)."""
    serves = np.zeros(len(instance.pool_names), dtype=np.bool_)
    np.logical_or.at(serves, instance.flow_pool, (s.load > 1e-9).any(axis=1))
    return np.asarray((s.held > 0) | (s.machines > 0).any(axis=1) | serves)


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
    for peak in instance.peaks:
        if peak.usd_per_kw is not None:  # a window of a longer horizon: the rate's hour lies outside
            for meter, usd_per_kw in zip(peak.meters, peak.usd_per_kw, strict=True):
                pool = site_pool(instance.site_names[peak.site])
                by_key[pool, meter] = [("demand_charge", np.full(len(instance.hours), usd_per_kw))]
    found = []
    for e in usage:
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
