"""From an hour's records to usage rows of the book ``actual``: gpu-hours and kWh to model, tenant and phase.

Per pool and hour: the GPU-hours held are a total (a bill, the fleet's count, GPUs seen, GPUs claimed). Engine
instances and training runs claim parts of it. An instance's busy time goes to models and phases by the
engine's own prefill and decode seconds, else by predicted work, else by token counts; from phases to tenants
by their tokens; rejected drafts, preemptions and aborted requests to ``waste``; the rest is ``idle``. Energy
follows. Each total is split once, by largest remainder, so the rows add up to it to the digit. The method
stands in `basis` behind a colon.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pertoken.errors import InputError, nearest
from pertoken.meter._claims import Claims, Predictor, Served, Work
from pertoken.meter._counted import check_priced, check_used, tokens_of
from pertoken.meter._energy import energies
from pertoken.meter._findings import FINDINGS, Finding, Notes
from pertoken.meter._models import may_be_one, renamed, renamed_in, under_two_names
from pertoken.meter._split import MICRO, quantised, split
from pertoken.meter._tally import Tally, api_models, tallies, tally_of
from pertoken.scenario import Api, Fleet, Pool
from pertoken.tables import USAGE
from pertoken.units import IDLE, METERS, SECONDS_PER_HOUR, base_meter

__all__ = [
    "BOOK", "FINDINGS", "Attribution", "Finding", "Predictor", "Served", "Work", "attribute", "stray_pool",
    "stray_pools",
]  # fmt: skip

BOOK = "actual"
_BOOKED = (("bill", "gpu_hours"), ("training", "gpu_hours"), ("site", "energy_kwh"))
"""Priced meters that are split, by the kind of source they are taken from."""
_MOSTLY = 0.95
"""Share of the GPU-hours held in which boards must have been read for their energy to be that of the pool."""
Row = tuple[str, str, str, str, int, str]
"""(model, tenant, phase, meter, millionths, basis)."""


_MOST_STRAY = 20


def stray_pools(rows: pa.Table, known: Collection[str]) -> dict[str, int]:
    """How many records name each pool that is not `known`, at most 20 names, the most frequent first.

    Parameters: rows with a column `pool`; known, the fleet's names. A record that names no pool is no stray.
    """
    names: Any = rows.column("pool")
    strays = [n for n in pc.unique(names).to_pylist() if n and n not in known]
    if not strays:
        return {}
    counted = {str(c["values"]): int(c["counts"]) for c in pc.value_counts(names).to_pylist()}
    return {n: counted[n] for n in sorted(strays, key=lambda n: (-counted[n], n))[:_MOST_STRAY]}


def stray_pool(name: str, known: Collection[str]) -> str:
    """What to say of records of a pool the fleet does not have: it is in no figure, and what was perhaps meant.

    >>> stray_pool("h100-ownd", ["h100-owned", "api"])
    "records name the pool 'h100-ownd' and are in no figure, the fleet has h100-owned, api: did you mean h100-owned?"
    """
    near = nearest(name, known, 1)
    has = ", ".join([*known][:_MOST_STRAY]) or "none"
    meant = f": did you mean {near[0]}?" if near else ""
    return f"records name the pool {name[:100]!r} and are in no figure, the fleet has {has}{meant}"


@dataclass(frozen=True)
class Attribution:
    """Usage rows (`tables.USAGE`, book ``actual``) and what was found on the way."""

    usage: pa.Table
    findings: tuple[Finding, ...]


def attribute(
    totals: pa.Table, fleet: Fleet, hours: Sequence[datetime], predictor: Predictor | None = None
) -> Attribution:
    """Usage rows of the hours, and findings.

    Parameters: totals (`records.TOTALS`) of these hours, see `Journal.totals`; the fleet; hours (UTC), each
    given once: a pool with a fixed count holds its GPUs in each of them, records or none; predictor, asked
    for prefill and decode seconds where an engine tells none (None: token counts decide, marked
    ``assumed``).
    Raises InputError on totals of another schema, NoEvidenceError never: what is unknown is a row or a
    finding.
    """
    rows: list[tuple[datetime, str, str, str, str, str, int, str]] = []
    findings: list[Finding] = []
    by_hour = tallies(totals, fleet)
    for hour in hours:
        if hour.tzinfo is None:
            raise InputError(
                f"{hour.isoformat()} has no time zone: give one, such as {hour.isoformat()}+00:00"
            )
        pools = by_hour.get(hour, {})
        findings += _doubtful(pools, fleet, hour)
        unplaced = _placed(pools, fleet)
        strangers = sorted(set(pools) - set(fleet.pools) - {""})
        findings += [Finding("unknown_pool", hour, n, stray_pool(n, fleet.pools)) for n in strangers]
        if unplaced:
            text = (
                f"usage events of {', '.join(sorted(unplaced)[:5])} fit no pool: name the pool in the event"
            )
            findings.append(Finding("unmatched", hour, "", text, sum(unplaced.values())))
        nowhere = Notes(hour, "", findings)
        for (kind, meter), amount in pools.get("", Tally()).priced().items():
            nowhere.unused(kind, meter, amount, "name the pool in the record")
        for name, pool in fleet.pools.items():
            notes = Notes(hour, name, findings)
            found = _rows(pool, fleet, pools.get(name, Tally()), notes, predictor)
            rows += [(hour, name, *row) for row in found]
    return Attribution(_usage(rows), tuple(findings))


def _rows(pool: Pool, fleet: Fleet, tally: Tally, notes: Notes, predictor: Predictor | None) -> list[Row]:
    """One pool's rows in one hour: tokens, then the GPU-hours they were served in, then the energy of these."""
    tokens = tokens_of(tally, notes)
    rows = [(m, t, phase, meter, n, "measured") for (m, t, phase, meter), n in tokens.items()]
    for source, seconds in tally.gaps().items():
        notes.tell("gap", f"{source} was silent for {seconds:.0f} s", seconds)
    if isinstance(pool.price, Api):
        check_used(tally, notes, (), "an API pool has tokens alone")
        check_priced(tally, notes, pool.price)
        return rows
    claims = Claims(pool, tally, notes, predictor)
    held = claims.held()
    metered = tally.sum("device", "gpu_energy_kwh") + tally.sum("node", "it_energy_kwh")
    check_used(tally, notes, () if held is None and not metered else _BOOKED)
    total = quantised(held or 0.0)
    gpu_hours = split(total, claims.gpu_hours(held or 0.0, tokens)) if total else {}
    if metered and not total:
        text = f"{metered:.6g} kWh were metered in an hour in which nothing says that GPUs were held"
        notes.tell("no_gpu_hours", text, metered)
    elif held is None:
        return rows
    rows += [(m, t, phase, "gpu_hours", n, basis) for (m, t, phase, basis), n in gpu_hours.items()]
    return rows + _energy(pool, fleet, tally, notes, {k: n / MICRO for k, n in gpu_hours.items()})


def _energy(
    pool: Pool, fleet: Fleet, tally: Tally, notes: Notes, gpu_hours: Mapping[tuple[str, str, str, str], float]
) -> list[Row]:
    gpu_hours = gpu_hours or {
        ("", IDLE, "idle", "assumed:unseen"): 0.0
    }  # what was measured stands in a row all the same
    found = energies(tally, pool, fleet.sites[pool.site], gpu_hours)
    if pool.price.term in ("owned", "colocated"):
        held, seen = sum(gpu_hours.values()), tally.sum("device", "gpu_seen_seconds") / SECONDS_PER_HOUR
        whole = tally.sum("node", "it_energy_kwh") or tally.sum("site", "energy_kwh")
        if not found:
            notes.tell("no_energy", "scrape dcgm-exporter or Kepler, or read NVML")
        elif not whole and not tally.gaps() and seen < _MOSTLY * held:
            text = f"boards were read in {seen:.3f} of {held:.3f} GPU·h: what the others took is not in the energy"
            notes.tell("no_energy", text, held - seen)
    rows = []
    for energy in found:
        weights = energy.weights if any(energy.weights.values()) else dict.fromkeys(energy.weights, 1.0)
        parts = split(quantised(energy.total), weights) if quantised(energy.total) else {}
        rows += [(m, t, phase, energy.meter, n, energy.basis) for (m, t, phase, _), n in parts.items()]
    return rows


def _placed(pools: dict[str, Tally], fleet: Fleet) -> dict[str, float]:
    """Give usage of no pool to the pools that serve its model; what fits none is returned by model.

    A router in front of several pools knows the model, not the pool: its tenants' shares hold for all of
    them.
    """
    loose = pools.get("")
    if loose is None:
        return {}
    unplaced: dict[str, float] = defaultdict(float)
    names = _named(pools, fleet)
    for (model, meter), told in loose.tokens("usage").items():
        weights: dict[str, float] = {}
        for name in fleet.pools:
            tally = pools.get(name)
            if tally is not None and not tally.tokens("usage", own=True):
                count = tally.counted(names[name].get(model, model), meter)
                if count:
                    weights[name] = count
        if not weights:
            apis = [n for n, p in fleet.pools.items() if isinstance(p.price, Api) and p.price.model == model]
            weights = dict.fromkeys(apis[:1], 1.0)
        if not weights:
            unplaced[model] += sum(told.values()) / MICRO
            continue
        for tenant, count in told.items():
            for name, part in split(count, weights, MICRO).items():
                tally_of(pools, name, fleet).place(names[name].get(model, model), tenant, meter, part)
    return dict(unplaced)


def _named(pools: Mapping[str, Tally], fleet: Fleet) -> Mapping[str, Mapping[str, str]]:
    """By pool, the name it serves a router's model under: one that a pool has to the letter is that pool's."""
    amounts: dict[str, float] = defaultdict(float)
    for (model, _), told in pools[""].tokens("usage").items():
        amounts[model] += sum(told.values())
    served = {name: pools[name].served() for name in fleet.pools if name in pools}
    sold = api_models(fleet)
    found = defaultdict(dict, renamed_in(amounts, served, set[str]().union(*sold.values())))
    for name, models in sold.items():  # the gateway in front of an API may have a name of its own
        found[name].update(renamed(models & set(amounts), served.get(name, ())))
    return found


def _doubtful(pools: Mapping[str, Tally], fleet: Fleet, hour: datetime) -> list[Finding]:
    """Names of which a router told one: it went to the pool that has it to the letter, not to the other's."""
    told = {model for model, _ in pools[""].tokens("usage")} if "" in pools else set()
    served = [pools[name].served() for name in fleet.pools if name in pools]
    return [
        Finding("two_names", hour, "", may_be_one(alike))
        for alike in (under_two_names(set().union(*served)) if told else ())
        if told.intersection(alike) and not any(len(names.intersection(alike)) > 1 for names in served)
    ]


def _usage(rows: Iterable[tuple[datetime, str, str, str, str, str, int, str]]) -> pa.Table:
    """Rows with the same keys added up, as `tables.USAGE`."""
    sums: dict[tuple[datetime, str, str, str, str, str, str], int] = defaultdict(int)
    for hour, pool, model, tenant, phase, meter, count, basis in rows:
        assert base_meter(meter) in METERS
        sums[hour, pool, model, tenant, phase, meter, basis] += count
    keys = [k for k in sorted(sums) if sums[k]]
    columns: dict[str, list[object]] = {"book": [BOOK] * len(keys)}
    for at, name in enumerate(("hour", "pool", "model", "tenant", "phase", "meter", "basis")):
        columns[name] = [k[at] for k in keys]
    columns["quantity"] = [Decimal(sums[k]) / MICRO for k in keys]
    return pa.table({name: columns[name] for name in USAGE.names}, schema=USAGE)
