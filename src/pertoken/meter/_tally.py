"""An hour's totals of one pool, ready to be asked: who counted what, of which model, for whom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from datetime import datetime

import pyarrow as pa

from pertoken.errors import InputError
from pertoken.meter._models import renamed
from pertoken.meter._split import MICRO, quantised
from pertoken.meter.records import TOTALS
from pertoken.scenario import Api, Fleet
from pertoken.units import METERS, base_meter

_COUNTS = ("prompt_tokens", "input_tokens", "cached_input_tokens", "output_tokens", "requests")
_ORDER = ("training", "usage", "gateway", "engine", "bill")
"""Who is believed on what needs no attribution, first to last."""
_AS_TOLD = ("egress_gb", "storage_gb_hours")
"""Priced meters that are booked as they were told."""
Tokens = dict[tuple[str, str], dict[str, int]]
"""Counts [millionths] by (model, meter) and tenant."""


class Tally:
    """Totals of one pool and hour."""

    def __init__(self, stepped: bool = False) -> None:
        self._stepped = stepped  # prices by prompt length: only an API has them
        # (kind, source, model, tenant, phase, meter) to quantity
        self._rows: dict[tuple[str, str, str, str, str, str], float] = defaultdict(float)
        self._placed: Tokens = defaultdict(lambda: defaultdict(int))
        self._cache: dict[str, Tokens] = {}
        self._counting: dict[str, set[str]] | None = None

    def unify(self, elsewhere: Collection[str] = ()) -> None:
        """Give a model one name in this pool, that of the engines (else the gateway), where others tell another.

        `elsewhere`: the names other pools serve.
        """
        served = self.served()
        told: dict[str, float] = defaultdict(float)
        for (kind, _, model, _, _, meter), quantity in self._rows.items():
            if kind in ("usage", "gateway") and base_meter(meter) in _COUNTS:
                told[model] += quantity
        names = renamed(told, served, elsewhere, told) if served else {}
        if names:
            rows, self._rows, self._counting = self._rows, defaultdict(float), None
            for (kind, source, model, tenant, phase, meter), quantity in rows.items():
                same = names.get(model, model) if kind in ("usage", "gateway") else model
                self._rows[kind, source, same, tenant, phase, meter] += quantity

    def served(self) -> set[str]:
        """Names of the models served here, the engines' (else the gateway's)."""
        found: set[str] = set()
        for record in ("engine", "gateway"):
            found = found or {m for (kind, _, m, *_) in self._rows if kind == record and m}
        return found

    def counts(self, kind: str, model: str | None = None) -> bool:
        """Whether a kind of source counts output tokens here (of a model), be they none."""
        if self._counting is None:
            self._counting = defaultdict(set)
            for of, _, name, _, _, meter in self._rows:
                if base_meter(meter) == "output_tokens":
                    self._counting[of].add(name)
        known = self._counting.get(kind, set())
        return bool(known) if model is None else model in known

    def add(self, source: str, model: str, tenant: str, phase: str, meter: str, quantity: float) -> None:
        """One row of totals."""
        kind = source.partition("/")[0]
        self._rows[kind, source, model, tenant, phase, self._meter(meter)] += quantity
        self._counting = None

    def place(self, model: str, tenant: str, meter: str, count: int) -> None:
        """Usage of a router that did not know the pool."""
        self._placed[model, self._meter(meter)][tenant] += count
        self._cache.pop("usage", None)

    def _meter(self, meter: str) -> str:
        return base_meter(meter) if not self._stepped and base_meter(meter) in _COUNTS else meter

    def tokens(self, kind: str, own: bool = False) -> Tokens:
        """Tokens and requests a kind of source counted, prompt tokens taken apart into computed and cached
        ones.

        `own`: only what named this pool itself.
        """
        if not own and kind in self._cache:
            return {key: dict(value) for key, value in self._cache[kind].items()}
        counts: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for (of, _, model, tenant, _, meter), quantity in self._rows.items():
            if of == kind and base_meter(meter) in _COUNTS:
                counts[model, meter][tenant] += quantity
        result: Tokens = defaultdict(lambda: defaultdict(int))
        for (model, meter), by_tenant in counts.items():
            for tenant, quantity in by_tenant.items():
                if meter == "prompt_tokens":
                    cached = min(counts.get((model, "cached_input_tokens"), {}).get(tenant, 0.0), quantity)
                    result[model, "input_tokens"][tenant] += quantised(quantity - cached)
                elif meter == "cached_input_tokens" and (model, "prompt_tokens") in counts:
                    prompt = counts[model, "prompt_tokens"].get(tenant, 0.0)
                    result[model, meter][tenant] += quantised(min(quantity, prompt))
                else:
                    result[model, meter][tenant] += quantised(quantity)
        if own:
            return result
        if kind == "usage":
            for key, placed in self._placed.items():
                for tenant, count in placed.items():
                    result[key][tenant] += count
        # Tokens and requests are whole; a sender that split some across an hour left fractions.
        self._cache[kind] = {
            key: {t: round(n / MICRO) * MICRO for t, n in value.items() if round(n / MICRO)}
            for key, value in result.items()
        }
        self._cache[kind] = {key: value for key, value in self._cache[kind].items() if value}
        return {key: dict(value) for key, value in self._cache[kind].items()}

    def counted(self, model: str, meter: str) -> int:
        """What engines, else the gateway, counted of a model's meter [millionths]; output stands in for
        requests."""
        for kind in ("engine", "gateway"):
            counts = self.tokens(kind)
            for name in (base_meter(meter), "output_tokens"):
                if (model, name) in counts:
                    return sum(counts[model, name].values())
        return 0

    def others(self) -> dict[tuple[str, str, str, str], int]:
        """What needs no attribution (counts, egress, storage), by (model, tenant, phase, meter), from the
        best kind that has the meter."""
        best = self.as_told()
        result: dict[tuple[str, str, str, str], int] = defaultdict(int)
        for (kind, _, model, tenant, phase, meter), quantity in self._rows.items():
            if best.get(meter) == kind:
                result[model, tenant, phase, meter] += quantised(quantity)
        return result

    def as_told(self) -> dict[str, str]:
        """Meters that need no attribution, and the kind of source each is booked from."""
        best: dict[str, str] = {}
        for kind, _, _, _, _, meter in self._rows:
            if kind in _ORDER and base_meter(meter) not in _COUNTS and _as_told(meter):
                best[meter] = min(best.get(meter, kind), kind, key=_ORDER.index)
        return best

    def priced(self) -> dict[tuple[str, str], float]:
        """What was told of priced meters, by (kind, meter)."""
        found: dict[tuple[str, str], float] = defaultdict(float)
        for (kind, _, _, _, _, meter), quantity in self._rows.items():
            known = METERS.get(base_meter(meter))
            if quantity and known is not None and known.priced:
                found[kind, meter] += quantity
        return dict(found)

    def gaps(self) -> dict[str, float]:
        """Seconds each source was silent."""
        found: dict[str, float] = defaultdict(float)
        for (_, source, _, _, _, meter), quantity in self._rows.items():
            if meter == "gap_seconds":
                found[source] += quantity
        return found

    def sum(self, kind: str, meter: str) -> float:
        """A kind's quantity of a meter, its qualifiers included."""
        return sum(
            q for (k, _, _, _, _, m), q in self._rows.items() if k == kind and m.partition(":")[0] == meter
        )

    def has(self, source: str, meter: str) -> bool:
        """Whether a source told a meter, be it zero."""
        return any(s == source and m == meter for (_, s, _, _, _, m) in self._rows)

    def told(self, meter: str) -> bool:
        """Whether any source told a meter, be it zero."""
        return any(m == meter for (*_, m) in self._rows)

    def tells(self, kind: str, model: str, meter: str) -> bool:
        """Whether a kind of source tells a meter of a model, be it zero."""
        return any(k == kind and o == model and base_meter(m) == meter for (k, _, o, _, _, m) in self._rows)

    def whole(self, kind: str, model: str) -> bool:
        """Whether a kind of source counts a model's prompts whole, cached tokens inside."""
        return self.tells(kind, model, "prompt_tokens")

    def of(self, source: str, meter: str) -> float:
        """One source's quantity of a meter."""
        return sum(q for (_, s, _, _, _, m), q in self._rows.items() if s == source and m == meter)

    def engines(self) -> list[str]:
        """Engine instances of the hour; of those that were silent all through it, the ones that ran on."""
        heard = {
            s
            for (k, s, _, _, _, m), q in self._rows.items()
            if k == "engine" and m != "gap_seconds" and (q or m not in _COUNTS)
        }
        return sorted(heard)

    def models(self, source: str) -> Mapping[str, Mapping[str, float]]:
        """What a source counted of each model that got tokens or engine time."""
        found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for (_, s, model, _, _, meter), quantity in self._rows.items():
            if s == source:
                found[model][meter] += quantity
        told = ("prompt_tokens", "input_tokens", "output_tokens", "prefill_seconds", "decode_seconds")
        return {m: dict(c) for m, c in sorted(found.items()) if any(c.get(name) for name in told)}

    def training_hours(self) -> dict[tuple[str, str, str], float]:
        """GPU-hours of training runs by (model, tenant, phase)."""
        found: dict[tuple[str, str, str], float] = defaultdict(float)
        for (kind, _, model, tenant, phase, meter), quantity in self._rows.items():
            if kind == "training" and meter == "gpu_hours":
                found[model, tenant, phase] += quantity
        return found

    def billed_to(self) -> dict[tuple[str, str], float]:
        """GPU-hours a bill gives to tenants."""
        found: dict[tuple[str, str], float] = defaultdict(float)
        for (kind, _, model, tenant, _, meter), quantity in self._rows.items():
            if kind == "bill" and meter == "gpu_hours" and (model or tenant):
                found[model, tenant] += quantity
        return found


def tallies(totals: pa.Table, fleet: Fleet) -> dict[datetime, dict[str, Tally]]:
    """Tallies by hour and pool. Raises InputError on totals of another schema."""
    if totals.schema != TOTALS:
        raise InputError(f"totals have the columns {totals.schema.names}, they need {TOTALS.names}")
    found: dict[datetime, dict[str, Tally]] = defaultdict(dict)
    columns = [totals.column(name).to_pylist() for name in TOTALS.names]
    for hour, source, pool, model, tenant, phase, meter, _, quantity in zip(*columns, strict=True):
        tally_of(found[hour], pool, fleet).add(source, model, tenant, phase, meter, quantity)
    for pools in found.values():
        served = {name: tally.served() for name, tally in pools.items() if name in fleet.pools}
        sold = api_models(fleet)
        for name, tally in pools.items():
            if name:
                others = [of for known in (served, sold) for pool, of in known.items() if pool != name]
                tally.unify(set[str]().union(*others))
    return dict(found)


def api_models(fleet: Fleet) -> dict[str, set[str]]:
    """The model that each API pool of the fleet sells."""
    return {name: {pool.price.model} for name, pool in fleet.pools.items() if isinstance(pool.price, Api)}


def tally_of(pools: dict[str, Tally], name: str, fleet: Fleet) -> Tally:
    """The tally of a pool, made where it is missing. What named no pool keeps its price steps for now."""
    if name not in pools:
        stepped = not name or (name in fleet.pools and isinstance(fleet.pools[name].price, Api))
        pools[name] = Tally(stepped)
    return pools[name]


def _as_told(meter: str) -> bool:
    known = METERS.get(base_meter(meter))
    if known is None:
        return False
    return known.name in _AS_TOLD or (not known.priced and known.unit in ("token", "request"))


def prompt(counts: Mapping[str, float]) -> float:
    """Prompt tokens computed: all less the cached, plus those an engine counts as computed."""
    prompt = counts.get("prompt_tokens", 0.0)
    return counts.get("input_tokens", 0.0) + prompt - min(counts.get("cached_input_tokens", 0.0), prompt)


def wasted_of(counts: Mapping[str, float]) -> tuple[float, float]:
    """Shares of a model's prefill and decode that came to nothing."""
    output, computed = counts.get("output_tokens", 0.0), prompt(counts)
    finished, aborted = counts.get("requests", 0.0), counts.get("aborted_requests", 0.0)
    lost = aborted / (finished + aborted) if aborted else 0.0
    lost_output = counts["aborted_tokens"] / output if output and "aborted_tokens" in counts else lost
    rejected = max(0.0, counts.get("drafted_tokens", 0.0) - counts.get("accepted_draft_tokens", 0.0))
    drafts = rejected / (rejected + output) if rejected else 0.0
    again = counts.get("recomputed_tokens", 0.0)
    preempted = counts.get("preemptions", 0.0)
    if preempted and not again and finished:
        again = preempted * (computed + output / 2) / finished  # a prompt and, on average, half an answer
    recomputed = again / (again + computed) if again else 0.0
    return 1 - (1 - lost) * (1 - recomputed), 1 - (1 - min(1.0, lost_output)) * (1 - drafts)
