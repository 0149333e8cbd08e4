"""Tokens of a pool in an hour: from the source of record, with what others know of them, and what is not booked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from pertoken.meter._findings import Notes
from pertoken.meter._models import may_be_one, under_two_names
from pertoken.meter._split import MICRO, explained
from pertoken.meter._tally import Tally, Tokens
from pertoken.meter.records import phase_of
from pertoken.scenario import Api
from pertoken.units import base_meter

Counts = dict[tuple[str, str, str, str], int]
"""Millionths by (model, tenant, phase, meter)."""
_RECORD = ("engine", "gateway", "usage")
"""Who is believed on tokens, first to last."""
_COMPARED = {
    "prompt tokens": ("input_tokens", "cached_input_tokens"),
    "output tokens": ("output_tokens",),
}
_AGREE = 0.01
"""Share by which two counters may differ: they are not read at the same instant."""


def tokens_of(tally: Tally, notes: Notes) -> Counts:
    """Counts by (model, tenant, phase, meter) in millionths, from the source of record."""
    result: Counts = defaultdict(int)
    record = next((k for k in _RECORD if tally.counts(k) or tally.tokens(k)), "usage")
    counts = tally.tokens(record)
    told = tally.tokens("usage") if record != "usage" else {}
    _take_out_cached(tally, notes, record, counts, told)
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
        if total or not parts:
            parts |= _told(notes, record, model, meter, total, mine)
        for (tenant, name), count in parts.items():
            result[model, tenant, phase_of(name), name] += count
    for model, meter in sorted(set(told)):
        if (model, base_meter(meter)) in counts:
            continue
        # An engine that counts no requests or no cached tokens leaves them to those who do.
        served = any(m == model for m, _ in counts)
        known = served or tally.counts(record, model)  # none is a count: of an idle engine, or a silent one
        tokens = base_meter(meter) in ("input_tokens", "output_tokens")
        if known and (tokens or tally.tells(record, model, base_meter(meter))):
            _told(notes, record, model, meter, 0, {("", meter): sum(told[model, meter].values())})
        elif known:
            for tenant, count in told[model, meter].items():
                result[model, tenant, phase_of(meter), meter] += count
        elif not known and base_meter(meter) == "output_tokens":
            amount = sum(told[model, meter].values()) / MICRO
            notes.tell("unmatched", f"usage events tell of {model!r}, which no engine here serves", amount)
    _check_gateway(tally, notes, record, counts)
    for alike in under_two_names({model for model, _ in counts}) if record == "engine" else ():
        notes.tell("two_names", may_be_one(alike))
    for (model, tenant, phase, meter), count in tally.others().items():
        result[model, tenant, phase, meter] += count
    return {key: value for key, value in result.items() if value}


def check_used(tally: Tally, notes: Notes, booked: Sequence[tuple[str, str]], why: str = "") -> None:
    """What was told of a priced meter is booked or found, it never vanishes."""
    told = tally.as_told()
    for (kind, meter), amount in tally.priced().items():
        if told.get(meter) != kind and (kind, base_meter(meter)) not in booked:
            ours = base_meter(meter) in ("site_hours", "peak_kw")
            reason = "the close counts its own" if ours else why or f"{kind} is no source of record for it"
            notes.unused(kind, meter, amount, reason)


def check_priced(tally: Tally, notes: Notes, price: Api) -> None:
    """A pool has one price: another model's calls in it would be priced as its own."""
    strangers = {m for m, _ in tally.tokens("usage") if price.model not in m}
    if price.model and strangers:
        text = f"calls of {', '.join(sorted(strangers)[:5])} are priced as {price.model}: give each its pool"
        notes.tell("unmatched", text)


def _told(
    notes: Notes, record: str, model: str, meter: str, total: int, mine: Mapping[tuple[str, str], int]
) -> dict[tuple[str, str], int]:
    parts, over = explained(total, mine, ("", meter))
    if over > 0:
        more = f"usage events tell {over / MICRO:.0f} more {meter} of {model!r} than the {record}"
        notes.tell("disagree", more, over / MICRO)
    return parts


def _take_out_cached(tally: Tally, notes: Notes, record: str, counts: Tokens, told: Tokens) -> None:
    """Where an engine counts prompts whole and the events know what was cached, that is no computed input, and no
    more is cached than was counted."""
    for model in sorted({m for m, meter in told if base_meter(meter) == "cached_input_tokens"}):
        if (model, "cached_input_tokens") in counts or not tally.whole(record, model):
            continue
        prompt = counts.get((model, "input_tokens"), {})
        for meter in sorted(n for m, n in told if m == model and base_meter(n) == "cached_input_tokens"):
            by_tenant = told[model, meter]
            for of in sorted({t if t in prompt else "" for t in by_tenant}):
                mine = {t: n for t, n in by_tenant.items() if (t if t in prompt else "") == of}
                parts, over = explained(prompt.get(of, 0), mine, "")
                if over > 0:
                    more = f"usage events tell {over / MICRO:.0f} more {meter} of {model!r} than the {record} prompts"
                    notes.tell("disagree", more, over / MICRO)
                    by_tenant.update({t: parts.get(t, 0) for t in mine})
                if of in prompt:
                    prompt[of] -= sum(by_tenant[t] for t in mine)


def _check_gateway(
    tally: Tally, notes: Notes, record: str, counts: Mapping[tuple[str, str], Mapping[str, int]]
) -> None:
    if record != "engine":
        return
    gateway = tally.tokens("gateway")
    for name, meters in _COMPARED.items():
        first, second = (
            sum(sum(v.values()) for (_, m), v in told.items() if m in meters) for told in (counts, gateway)
        )
        if second and abs(first - second) > _AGREE * first:
            text = f"the gateway counts {second / MICRO:.0f} {name}, the engines {first / MICRO:.0f}"
            notes.tell("disagree", text, (second - first) / MICRO)
