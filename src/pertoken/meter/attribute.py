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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

import pyarrow as pa

from pertoken.errors import CannotServeError, InputError, NoEvidenceError
from pertoken.meter._energy import energies
from pertoken.meter._split import MICRO, explained, quantised, split
from pertoken.meter._tally import Tally, Tokens, prompt, tallies, tally_of, wasted_of
from pertoken.meter.records import phase_of
from pertoken.scenario import Api, Fleet
from pertoken.tables import USAGE
from pertoken.units import IDLE, METERS, SECONDS_PER_HOUR, base_meter

BOOK = "actual"
_HELD_BY_COUNT = ("owned", "colocated", "reserved")
_WHOLE_HOUR = 0.99
"""Share of an hour an instance must have been seen for what it did not claim to be known as idle."""
_RECORD = ("engine", "gateway", "usage")
"""Who is believed on tokens, first to last."""
_BOOKED = (("bill", "gpu_hours"), ("training", "gpu_hours"), ("site", "energy_kwh"))
"""Priced meters that are split, by the kind of source they are taken from."""
_COMPARED = {
    "prompt tokens": ("input_tokens", "cached_input_tokens"),
    "output tokens": ("output_tokens",),
}
_AGREE = 0.01
"""Share by which two counters may differ: they are not read at the same instant."""


@dataclass(frozen=True)
class Finding:
    """Something an owner should know: `kind` is one of `FINDINGS`, `amount` in the unit its text names."""

    kind: str
    hour: datetime
    pool: str
    text: str
    amount: float = 0.0


FINDINGS: dict[str, str] = {
    "gap": "a source was silent",
    "disagree": "two sources count the same thing differently",
    "unmatched": "usage events of a model no engine of the pool serves",
    "unknown_pool": "records of a pool the fleet does not have",
    "no_gpu_hours": "tokens, but nothing says how many GPUs were held",
    "no_energy": "GPUs held, but no reading of their energy",
    "overcommitted": "instances claim more GPUs than the pool has",
    "twice": "one engine reaches us two ways: one is booked",
    "unused": "records of a priced meter that nothing here books",
    "assumed_phase": "nothing but token counts says what prefill and decode took",
}


@dataclass(frozen=True)
class Attribution:
    """Usage rows (`tables.USAGE`, book ``actual``) and what was found on the way."""

    usage: pa.Table
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Served:
    """What a predictor is asked: a model's tokens in an hour on a pool. Tokens are counts of the hour."""

    gpu: str
    engine: str
    model: str
    input_tokens: float
    cached_input_tokens: float
    output_tokens: float
    requests: float


@dataclass(frozen=True)
class Work:
    """What a predictor answers: engine seconds the tokens take (relative between models), and its basis."""

    prefill_s: float
    decode_s: float
    basis: str


Predictor = Callable[[Served], Work]


@dataclass
class _Claim:
    """GPU-hours by (model, tenant, phase, basis) before they are rounded."""

    parts: dict[tuple[str, str, str, str], float] = field(default_factory=lambda: defaultdict(float))


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
        unplaced = _placed(pools, fleet)
        strangers = sorted(set(pools) - set(fleet.pools) - {""})
        findings += [Finding("unknown_pool", hour, n, f"records name the pool {n!r}") for n in strangers]
        if unplaced:
            text = (
                f"usage events of {', '.join(sorted(unplaced)[:5])} fit no pool: name the pool in the event"
            )
            findings.append(Finding("unmatched", hour, "", text, sum(unplaced.values())))
        loose = pools.get("", Tally()).priced()
        findings += [_unused(hour, "", *key, n, "name the pool in the record") for key, n in loose.items()]
        for name in fleet.pools:
            one = _Pool(name, fleet, hour, pools.get(name, Tally()), predictor)
            rows += [(hour, name, *row) for row in one.rows()]
            findings += one.findings
    return Attribution(_usage(rows), tuple(findings))


class _Pool:
    """One pool in one hour."""

    def __init__(
        self, name: str, fleet: Fleet, hour: datetime, tally: Tally, predictor: Predictor | None
    ) -> None:
        self.name, self.hour, self.tally, self.predictor = name, hour, tally, predictor
        self.pool, self.fleet = fleet.pools[name], fleet
        self.findings: list[Finding] = []

    def rows(self) -> list[tuple[str, str, str, str, int, str]]:
        """(model, tenant, phase, meter, millionths, basis)."""
        tokens = self._tokens()
        rows = [(m, t, phase, meter, n, "measured") for (m, t, phase, meter), n in tokens.items()]
        for source, seconds in self.tally.gaps().items():
            self._found("gap", f"{source} was silent for {seconds:.0f} s", seconds)
        if isinstance(self.pool.price, Api):
            self._check_used((), "an API pool has tokens alone")
            self._check_priced(self.pool.price)
            return rows
        held = self._held()
        self._check_used(() if held is None else _BOOKED)
        if held is None:
            return rows
        parts = self._gpu_hours(held, tokens)
        total = quantised(held)
        gpu_hours = split(total, parts) if total else {}
        rows += [(m, t, phase, "gpu_hours", n, basis) for (m, t, phase, basis), n in gpu_hours.items()]
        return rows + self._energy({k: n / MICRO for k, n in gpu_hours.items()})

    # -- tokens

    def _tokens(self) -> dict[tuple[str, str, str, str], int]:
        """Counts by (model, tenant, phase, meter) in millionths, from the source of record."""
        result: dict[tuple[str, str, str, str], int] = defaultdict(int)
        record = next((k for k in _RECORD if self.tally.tokens(k)), "usage")
        counts = self.tally.tokens(record)
        told = self.tally.tokens("usage") if record != "usage" else {}
        self._take_out_cached(record, counts, told)
        for (model, meter), by_tenant in counts.items():
            total = by_tenant.get("", 0)
            # Price steps by prompt length are known call by call, to the events alone.
            mine = {
                (tenant, name): count
                for (other, name), by_other in told.items()
                if other == model and base_meter(name) == meter
                for tenant, count in by_other.items()
                if not tenant or tenant not in by_tenant
            }
            parts = {(tenant, meter): count for tenant, count in by_tenant.items() if tenant}
            if total:
                parts |= self._told(record, model, meter, total, mine)
            for (tenant, name), count in parts.items():
                result[model, tenant, phase_of(name), name] += count
        for model, meter in sorted(set(told)):
            if (model, base_meter(meter)) in counts:
                continue
            # An engine that counts no requests or no cached tokens leaves them to those who do.
            served = any(m == model for m, _ in counts)
            if served and base_meter(meter) not in ("input_tokens", "output_tokens"):
                for tenant, count in told[model, meter].items():
                    result[model, tenant, phase_of(meter), meter] += count
            elif not served and base_meter(meter) == "output_tokens":
                amount = sum(told[model, meter].values()) / MICRO
                self._found(
                    "unmatched", f"usage events tell of {model!r}, which no engine here serves", amount
                )
        self._check_gateway(record, counts)
        for (model, tenant, phase, meter), count in self.tally.others().items():
            result[model, tenant, phase, meter] += count
        return {key: value for key, value in result.items() if value}

    def _check_used(self, booked: Sequence[tuple[str, str]], why: str = "") -> None:
        """What was told of a priced meter is booked or found, it never vanishes."""
        told = self.tally.as_told()
        for (kind, meter), amount in self.tally.priced().items():
            if told.get(meter) != kind and (kind, base_meter(meter)) not in booked:
                ours = base_meter(meter) in ("site_hours", "peak_kw")
                reason = (
                    "the close counts its own" if ours else why or f"{kind} is no source of record for it"
                )
                self.findings.append(_unused(self.hour, self.name, kind, meter, amount, reason))

    def _check_priced(self, price: Api) -> None:
        """A pool has one price: another model's calls in it would be priced as its own."""
        strangers = {m for m, _ in self.tally.tokens("usage") if price.model not in m}
        if price.model and strangers:
            text = (
                f"calls of {', '.join(sorted(strangers)[:5])} are priced as {price.model}: give each its pool"
            )
            self._found("unmatched", text)

    def _told(
        self, record: str, model: str, meter: str, total: int, mine: Mapping[tuple[str, str], int]
    ) -> dict[tuple[str, str], int]:
        parts, over = explained(total, mine, ("", meter))
        if over > 0:
            more = f"usage events tell {over / MICRO:.0f} more {meter} of {model!r} than the {record}"
            self._found("disagree", more, over / MICRO)
        return parts

    def _take_out_cached(self, record: str, counts: Tokens, told: Tokens) -> None:
        """Where an engine counts prompts whole and the events know what was cached, that is no computed
        input."""
        for (model, meter), by_tenant in told.items():
            prompt = counts.get((model, "input_tokens"))
            known = (model, "cached_input_tokens") in counts
            if (
                base_meter(meter) == "cached_input_tokens"
                and prompt
                and not known
                and self.tally.whole(record, model)
            ):
                prompt[""] = max(0, prompt.get("", 0) - sum(by_tenant.values()))

    def _check_gateway(self, record: str, counts: Mapping[tuple[str, str], Mapping[str, int]]) -> None:
        if record != "engine":
            return
        gateway = self.tally.tokens("gateway")
        for name, meters in _COMPARED.items():
            first, second = (
                sum(sum(v.values()) for (_, m), v in told.items() if m in meters)
                for told in (counts, gateway)
            )
            if second and abs(first - second) > _AGREE * first:
                text = f"the gateway counts {second / MICRO:.0f} {name}, the engines {first / MICRO:.0f}"
                self._found("disagree", text, (second - first) / MICRO)

    # -- GPU-hours

    def _held(self) -> float | None:
        """GPU-hours held in this hour; None where nothing says."""
        count, billed = self.pool.count, self.tally.sum("bill", "gpu_hours")
        if billed:
            return billed
        if isinstance(count, int) and self.pool.price.term in _HELD_BY_COUNT:
            return float(count)
        seen = self.tally.sum("device", "gpu_seen_seconds") / SECONDS_PER_HOUR
        claimed = self.tally.sum("engine", "held_gpus") / SECONDS_PER_HOUR
        training = self.tally.sum("training", "gpu_hours")
        if seen or claimed or training:
            return max(seen, claimed + training)
        if any(self.tally.tokens(kind) for kind in ("engine", "usage")):
            self._found("no_gpu_hours", "give its targets gpus, scrape its GPUs, or import its bill")
        return None

    def _gpu_hours(
        self, held: float, tokens: Mapping[tuple[str, str, str, str], int]
    ) -> dict[tuple[str, str, str, str], float]:
        claim = _Claim()
        claimed = 0.0
        for (model, tenant, phase), amount in self.tally.training_hours().items():
            claim.parts[model, tenant, phase, "measured:training_log"] += amount
            claimed += amount
        instances = self.tally.engines()
        stated = {i: h for i in instances if (h := self.tally.of(i, "held_gpus") / SECONDS_PER_HOUR)}
        rest = [i for i in instances if i not in stated]
        claimed += sum(stated.values())
        share = max(0.0, held - claimed) / len(rest) if rest else 0.0
        for instance in instances:
            self._instance(instance, stated.get(instance, share), instance in stated, tokens, claim)
            claimed += 0.0 if instance in stated else share
        if not instances:
            for (model, tenant), amount in self.tally.billed_to().items():
                claim.parts[model, tenant, "idle", "assumed:unseen"] += amount
                claimed += amount
            if not self.tally.billed_to():
                claimed += self._unwatched(max(0.0, held - claimed), tokens, claim)
        if claimed > held * (1 + 1e-6):
            text = f"{claimed:.3f} GPU·h are claimed, {held:.3f} are held: claims were scaled down"
            self._found("overcommitted", text, claimed - held)
        elif claimed < held:
            watched = [self.tally.of(i, "seen_seconds") >= _WHOLE_HOUR * SECONDS_PER_HOUR for i in instances]
            seen = watched or [self.tally.sum("training", "gpu_hours") > 0]
            claim.parts["", IDLE, "idle", "measured" if all(seen) else "assumed:unseen"] += held - claimed
        return claim.parts

    def _instance(
        self,
        instance: str,
        held: float,
        stated: bool,
        tokens: Mapping[tuple[str, str, str, str], int],
        claim: _Claim,
    ) -> None:
        """One engine instance's GPU-hours: unseen, idle, and busy by model, phase and tenant."""
        models = self.tally.models(instance)
        only = next(iter(models)) if len(models) == 1 else ""
        seen = 1.0 if stated else min(1.0, self.tally.of(instance, "seen_seconds") / SECONDS_PER_HOUR)
        if seen < 1.0:
            claim.parts[only, IDLE, "idle", "assumed:unseen"] += held * (1.0 - seen)
        busy, how = self._busy(instance)
        self._spend(instance, models, (held * seen, busy, how), tokens, claim)

    def _unwatched(
        self, held: float, tokens: Mapping[tuple[str, str, str, str], int], claim: _Claim
    ) -> float:
        """GPU-hours of a pool whose engines nobody scrapes, by the tokens that were served; what was claimed."""
        record = next((k for k in ("gateway", "usage") if self.tally.tokens(k)), "")
        models: dict[str, dict[str, float]] = defaultdict(dict)
        for (model, meter), by_tenant in self.tally.tokens(record).items():
            models[model][meter] = sum(by_tenant.values()) / MICRO
        if not models:
            return 0.0
        gpus, active = (
            self.tally.sum("device", "gpu_seen_seconds"),
            self.tally.sum("device", "active_seconds"),
        )
        busy = (min(1.0, active / gpus), "measured:gpu_active") if gpus else (1.0, "assumed:held")
        self._spend("the pool's engines", models, (held, *busy), tokens, claim)
        return held

    def _spend(
        self,
        who: str,
        models: Mapping[str, Mapping[str, float]],
        hours: tuple[float, float, str],
        tokens: Mapping[tuple[str, str, str, str], int],
        claim: _Claim,
    ) -> None:
        """GPU-hours that were seen, the share of them that was busy, and how that is known, to who used them."""
        held, busy, how = hours
        only = next(iter(models)) if len(models) == 1 else ""
        work, method = self._work(who, models) if models and busy else ({}, "")
        mass = sum(p + d for p, d in work.values())
        if not mass:
            claim.parts[only, IDLE, "idle", how] += held
            return
        claim.parts[only, IDLE, "idle", how] += held * (1.0 - busy)
        for model, seconds in work.items():
            wasted = wasted_of(models[model])
            for phase, amount, lost in zip(("input", "output"), seconds, wasted, strict=True):
                spent = held * busy * amount / mass
                for tenant, part in _tenants(tokens, model, phase).items():
                    claim.parts[model, tenant, phase, method] += spent * part * (1.0 - lost)
                    claim.parts[model, tenant, "waste", method] += spent * part * lost

    def _busy(self, instance: str) -> tuple[float, str]:
        """Share of the seen time an instance was busy, and how that is known."""
        tally = self.tally
        seen = tally.of(instance, "seen_seconds")
        spent = tally.of(instance, "prefill_seconds") + tally.of(instance, "decode_seconds")
        running = tally.of(instance, "running_seconds")
        if seen and tally.has(instance, "running_seconds"):
            # Readings that far apart can miss short requests; and requests cannot keep it busy longer than
            # they took.
            share = running / seen if running else spent / seen
            return min(1.0, share, spent / seen if spent else 1.0), "measured"
        gpus, active = tally.sum("device", "gpu_seen_seconds"), tally.sum("device", "active_seconds")
        if gpus and tally.told("active_seconds"):
            return min(1.0, active / gpus), "measured:gpu_active"
        if seen and spent:
            return min(1.0, spent / seen), "measured:engine_seconds"
        # An engine with no gauge of its load: held and loaded all hour where it answered at all.
        return (1.0, "assumed:held") if tally.models(instance) else (0.0, "measured")

    def _work(
        self, instance: str, models: Mapping[str, Mapping[str, float]]
    ) -> tuple[dict[str, tuple[float, float]], str]:
        """Prefill and decode seconds by model, and the basis with its method."""
        told = {m: (c.get("prefill_seconds", 0.0), c.get("decode_seconds", 0.0)) for m, c in models.items()}
        served = {m for m, c in models.items() if prompt(c) + c.get("output_tokens", 0.0) > 0}
        if all(sum(told[m]) > 0 for m in served) and any(sum(s) > 0 for s in told.values()):
            return told, "measured:engine_seconds"
        if self.predictor is not None:
            try:
                predicted = {m: self.predictor(self._served(m, models[m])) for m in sorted(served)}
            except (InputError, NoEvidenceError, CannotServeError) as error:
                self._found("assumed_phase", f"no prediction helps: {error}")
            else:
                bases = [w.basis.partition(":")[0] for w in predicted.values()]
                worst = max(
                    bases, key=("measured", "fitted", "quoted", "roofline", "assumed").index, default=""
                )
                seconds = {m: (w.prefill_s, w.decode_s) for m, w in predicted.items()}
                return seconds, f"{worst}:predicted_work"
        else:
            self._found("assumed_phase", f"{instance} tells no prefill and decode time: split by tokens")
        return {m: (prompt(c), c.get("output_tokens", 0.0)) for m, c in models.items()}, "assumed:tokens"

    def _served(self, model: str, counts: Mapping[str, float]) -> Served:
        cached = min(counts.get("cached_input_tokens", 0.0), counts.get("prompt_tokens", 0.0))
        return Served(
            self.pool.gpu, self.pool.engine, model, prompt(counts), cached,
            counts.get("output_tokens", 0.0), counts.get("requests", 0.0),
        )  # fmt: skip

    # -- energy

    def _energy(
        self, gpu_hours: Mapping[tuple[str, str, str, str], float]
    ) -> list[tuple[str, str, str, str, int, str]]:
        if not gpu_hours:
            return []
        found = energies(self.tally, self.pool, self.fleet.sites[self.pool.site], gpu_hours)
        if not found and self.pool.price.term in ("owned", "colocated"):
            self._found("no_energy", "scrape dcgm-exporter or Kepler, or read NVML")
        rows = []
        for energy in found:
            parts = split(quantised(energy.total), energy.weights) if quantised(energy.total) else {}
            rows += [(m, t, phase, energy.meter, n, energy.basis) for (m, t, phase, _), n in parts.items()]
        return rows

    def _found(self, kind: str, text: str, amount: float = 0.0) -> None:
        self.findings.append(Finding(kind, self.hour, self.name, text, amount))


def _unused(hour: datetime, pool: str, kind: str, meter: str, amount: float, why: str) -> Finding:
    text = (
        f"{amount:.6g} {METERS[base_meter(meter)].unit} of {meter} from {kind} sources are not booked: {why}"
    )
    return Finding("unused", hour, pool, text, amount)


def _tenants(tokens: Mapping[tuple[str, str, str, str], int], model: str, phase: str) -> dict[str, float]:
    """Shares of tenants in a model's phase by their tokens; the unnamed tenant where there are none."""
    meter = "input_tokens" if phase == "input" else "output_tokens"
    mine = {t: n for (m, t, _, name), n in tokens.items() if m == model and name == meter}
    total = sum(mine.values())
    return {tenant: count / total for tenant, count in mine.items()} if total else {"": 1.0}


def _placed(pools: dict[str, Tally], fleet: Fleet) -> dict[str, float]:
    """Give usage of no pool to the pools that serve its model; what fits none is returned by model.

    A router in front of several pools knows the model, not the pool: its tenants' shares hold for all of
    them.
    """
    loose = pools.get("")
    if loose is None:
        return {}
    unplaced: dict[str, float] = defaultdict(float)
    for (model, meter), told in loose.tokens("usage").items():
        weights: dict[str, float] = {}
        for name in fleet.pools:
            tally = pools.get(name)
            if tally is not None and not tally.tokens("usage", own=True):
                count = tally.counted(model, meter)
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
                tally_of(pools, name, fleet).place(model, tenant, meter, part)
    return dict(unplaced)


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
