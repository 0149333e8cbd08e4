"""GPU-hours of a pool in an hour: how many were held, who claims them, and what they were spent on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pertoken.errors import CannotServeError, InputError, NoEvidenceError
from pertoken.meter._counted import Counts
from pertoken.meter._findings import Notes
from pertoken.meter._split import MICRO
from pertoken.meter._tally import Tally, prompt, wasted_of
from pertoken.scenario import Pool
from pertoken.units import IDLE, SECONDS_PER_HOUR

HELD_BY_COUNT = ("owned", "colocated", "reserved")
"""Price terms under which a pool holds the fleet's count, used or not."""
_WHOLE_HOUR = 0.99
"""Share of an hour an instance must have been seen for what it did not claim to be known as idle."""


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


@dataclass(frozen=True)
class Claims:
    """Who held the GPUs of one pool in one hour."""

    pool: Pool
    tally: Tally
    notes: Notes
    predictor: Predictor | None

    def held(self) -> float | None:
        """GPU-hours held in this hour; None where nothing says."""
        count, billed = self.pool.count, self.tally.sum("bill", "gpu_hours")
        if billed:
            return billed
        if isinstance(count, int) and self.pool.price.term in HELD_BY_COUNT:
            return float(count)
        boards = [self.tally.sum("device", meter) for meter in ("gpu_seen_seconds", "held_unseen")]
        seen = sum(boards) / SECONDS_PER_HOUR
        claimed = self.tally.sum("engine", "held_gpus") / SECONDS_PER_HOUR + self._unseen()
        training = self.tally.sum("training", "gpu_hours")
        if seen or claimed or training:
            return max(seen, claimed + training)
        if any(self.tally.tokens(kind) for kind in ("engine", "usage")):
            silent = "a source was silent, and nobody saw whether its GPUs were held: import its bill"
            text = (
                silent if self.tally.gaps() else "give its targets gpus, scrape its GPUs, or import its bill"
            )
            self.notes.tell("no_gpu_hours", text)
        return None

    def gpu_hours(self, held: float, tokens: Counts) -> dict[tuple[str, str, str, str], float]:
        """GPU-hours held [GPU·h] by (model, tenant, phase, basis), not yet rounded; what is unclaimed is idle."""
        claim = _Claim()
        claimed = 0.0
        for (model, tenant, phase), amount in self.tally.training_hours().items():
            claim.parts[model, tenant, phase, "measured:training_log"] += amount
            claimed += amount
        if unseen := self._unseen():
            claim.parts["", IDLE, "idle", "assumed:unseen"] += unseen
            claimed += unseen
        instances = self.tally.engines()
        stated = {i: h for i in instances if (h := self.tally.of(i, "held_gpus") / SECONDS_PER_HOUR)}
        rest = [i for i in instances if i not in stated and not self.tally.of(i, "held_unseen")]
        billed = self.tally.billed_to()
        if billed and not any(self.tally.of(i, "seen_seconds") for i in instances):
            instances, rest = [], []  # nobody was heard, and the bill knows whose the hours are
        claimed += sum(stated.values())
        share = max(0.0, held - claimed) / len(rest) if rest else 0.0
        for instance in (*stated, *rest):
            self._instance(instance, stated.get(instance, share), instance in stated, tokens, claim)
            claimed += 0.0 if instance in stated else share
        if not instances:
            for (model, tenant), amount in billed.items():
                claim.parts[model, tenant, "idle", "assumed:unseen"] += amount
                claimed += amount
            if not billed:
                claimed += self._unwatched(max(0.0, held - claimed), tokens, claim)
        if claimed > held * (1 + 1e-6):
            text = f"{claimed:.3f} GPU·h are claimed, {held:.3f} are held: claims were scaled down"
            self.notes.tell("overcommitted", text, claimed - held)
        elif claimed < held:
            watched = [self.tally.of(i, "seen_seconds") >= _WHOLE_HOUR * SECONDS_PER_HOUR for i in instances]
            seen = watched or [self.tally.sum("training", "gpu_hours") > 0]
            claim.parts["", IDLE, "idle", "measured" if all(seen) else "assumed:unseen"] += held - claimed
        return claim.parts

    def _unseen(self) -> float:
        """GPU-hours of instances that were silent and ran on: held, and nobody knows for what."""
        return self.tally.sum("engine", "held_unseen") / SECONDS_PER_HOUR

    def _instance(
        self,
        instance: str,
        held: float,
        stated: bool,
        tokens: Counts,
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

    def _unwatched(self, held: float, tokens: Counts, claim: _Claim) -> float:
        """GPU-hours of a pool whose engines nobody scrapes, by the tokens that were served; what was claimed."""
        others = ("gateway", "usage") if not self.tally.counts("engine") else ()
        record = next((k for k in others if self.tally.counts(k) or self.tally.tokens(k)), "")
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
        tokens: Counts,
        claim: _Claim,
    ) -> None:
        """GPU-hours that were seen, the share of them that was busy, and how that is known, to who used them."""
        held, busy, how = hours
        if not held:
            return  # silent all hour: its tokens are known afterwards, its work is not
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
                self.notes.tell("assumed_phase", f"no prediction helps: {error}")
            else:
                bases = [w.basis.partition(":")[0] for w in predicted.values()]
                worst = max(
                    bases, key=("measured", "fitted", "quoted", "roofline", "assumed").index, default=""
                )
                if worst == "assumed":
                    self.notes.tell(
                        "assumed_phase", f"what {instance} did is predicted from assumptions alone"
                    )
                seconds = {m: (w.prefill_s, w.decode_s) for m, w in predicted.items()}
                return seconds, f"{worst}:predicted_work"
        else:
            self.notes.tell("assumed_phase", f"{instance} tells no prefill and decode time: split by tokens")
        return {m: (prompt(c), c.get("output_tokens", 0.0)) for m, c in models.items()}, "assumed:tokens"

    def _served(self, model: str, counts: Mapping[str, float]) -> Served:
        cached = min(counts.get("cached_input_tokens", 0.0), counts.get("prompt_tokens", 0.0))
        return Served(
            self.pool.gpu, self.pool.engine, model, prompt(counts), cached,
            counts.get("output_tokens", 0.0), counts.get("requests", 0.0),
        )  # fmt: skip


def _tenants(tokens: Counts, model: str, phase: str) -> dict[str, float]:
    """Shares of tenants in a model's phase by their tokens; the unnamed tenant where there are none."""
    meter = "input_tokens" if phase == "input" else "output_tokens"
    mine = {t: n for (m, t, _, name), n in tokens.items() if m == model and name == meter}
    total = sum(mine.values())
    return {tenant: count / total for tenant, count in mine.items()} if total else {"": 1.0}
