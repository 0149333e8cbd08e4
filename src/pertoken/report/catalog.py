"""`pertoken catalog`: the facts with unit, source and date, as a table of 100 columns and as plain rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pertoken.catalog.gpus import PRECISIONS, Gpu, gpu, gpus
from pertoken.catalog.models import Attention, Model, model, models
from pertoken.catalog.prices import (
    STALE_AFTER_DAYS,
    TERMS,
    ApiPrice,
    ApiTier,
    PriceRow,
    api_models,
    api_price,
    prices,
)
from pertoken.catalog.tariffs import MONTH_NAMES, Demand, Schedule, Tariff, Tier, tariff, tariffs
from pertoken.errors import InputError, NoEvidenceError, UnknownNameError
from pertoken.report._fact_table import (
    NOTHING,
    Fact,
    count,
    item,
    number,
    plain,
    right,
    span,
    table_of,
    token_price,
)
from pertoken.units import GIGA, TERA

KINDS = ("gpus", "models", "tariffs", "prices")
Row = dict[str, Any]
Answer = tuple[RenderableType, list[Row]]


def catalog(kind: str, name: str | None = None, *, on: date | None = None) -> Answer:
    """What `pertoken catalog KIND [NAME]` prints: a renderable for 100 columns, and the same as plain rows.

    Without `name` the list of a kind (``gpus``, ``models``, ``tariffs``, ``prices``), with it every field of
    one item with unit, sources and date. For prices the name is a GPU, a provider, a term, an API,
    ``api/model`` or a model that APIs serve; `on` is the day they are asked for (None: today). Rows hold
    numbers, texts, lists and None only: an endless limit is None.

    Raises UnknownNameError with the nearest names.

    >>> table, rows = catalog("gpus", "h100")
    >>> rows[0]["name"], rows[0]["flops"]["bf16"]
    ('H100-SXM', 989400000000000.0)
    """
    if kind not in KINDS:
        raise InputError(f"unknown catalogue {kind!r}: it is one of {', '.join(KINDS)}")
    if kind == "gpus":
        return _gpu(gpu(name)) if name is not None else _gpus()
    if kind == "models":
        return _model(model(name)) if name is not None else _models()
    if kind == "tariffs":
        return _tariff(tariff(name)) if name is not None else _tariffs()
    return _prices(name, on or datetime.now(tz=UTC).date())


# --- GPUs ---


def _gpus() -> Answer:
    table = table_of(
        "GPU", *right("GB", "TB/s", "bf16", "fp8", "fp4", "int8", "link", "net", "W"), "released"
    )
    for row in gpus().values():
        table.add_row(
            row.name,
            number(row.memory_gb),
            number(row.memory_bytes_per_s / TERA),
            *(number(row.flops.get(p, math.nan) / TERA) for p in PRECISIONS),
            number(row.intra_node_bytes_per_s / GIGA),
            number(row.inter_node_bytes_per_s / GIGA),
            number(row.tdp_w),
            row.released,
        )
    legend = (
        "Dense peaks in TFLOP/s (int8: TOP/s) of one device; link and net: GB/s one direction per device, "
        "inside and out of the node; W: TDP. Each row has two sources or more: pertoken catalog gpus NAME."
    )
    return Group(table, Text(legend, style="dim")), [plain(row) for row in gpus().values()]


def _gpu(row: Gpu) -> Answer:
    host = row.power_notes.get("host_w", "")
    facts = [
        Fact("vendor", row.vendor),
        Fact("architecture", row.architecture),
        Fact("memory", number(row.memory_gb), "GB", "the size it is sold under"),
        Fact("memory for programs", number(row.memory_bytes / GIGA), "10^9 B", "as the driver shows it"),
        Fact("memory bandwidth", number(row.memory_bytes_per_s / GIGA), "GB/s"),
        *(
            Fact(f"dense peak {p}", number(row.flops[p] / TERA), "TOP/s" if p == "int8" else "TFLOP/s")
            for p in PRECISIONS
            if p in row.flops
        ),
        Fact(
            "link in the node",
            number(row.intra_node_bytes_per_s / GIGA),
            "GB/s",
            "one direction, per device",
        ),
        Fact(
            "link out of it", number(row.inter_node_bytes_per_s / GIGA), "GB/s", "one direction, per device"
        ),
        Fact("GPUs per node", str(row.gpus_per_node)),
        Fact("GPUs on the fast link", str(row.scale_up_gpus)),
        Fact("TDP", number(row.tdp_w), "W"),
        Fact("idle, model loaded", number(row.idle_w), "W", row.power_notes.get("idle_w", "")),
        Fact("host at load, per GPU", number(row.host_busy_w), "W", host),
        Fact("host idle, per GPU", number(row.host_idle_w), "W", "as the line above"),
        Fact("released", row.released),
        Fact("also written", ", ".join(row.spellings) or NOTHING),
    ]
    lacking = [p for p in PRECISIONS if p not in row.flops]
    notes = [*row.notes, *([f"no {', '.join(lacking)} in hardware"] if lacking else [])]
    more = f"prices: pertoken catalog prices {row.name}"
    return item(row.name, facts, row.sources, row.checked, [*notes, more]), [plain(row)]


# --- models ---


def _models() -> Answer:
    table = table_of("Model", *right("weights", "active", "layers", "KV/token", "context"), "precision")
    for row in models().values():
        table.add_row(
            row.name,
            count(row.parameters),
            count(row.active_parameters),
            str(row.layers),
            number(row.kv_values_per_token),
            number(row.max_context),
            row.native_precision,
        )
    legend = (
        "All sizes are computed from the architecture. KV/token: values that one more token adds to the "
        "cache at long context; times 2 is bytes in 16 bits. Sources: pertoken catalog models NAME."
    )
    return Group(table, Text(legend, style="dim")), [_model_row(row) for row in models().values()]


def _model(row: Model) -> Answer:
    computed = "computed from the architecture"
    facts = [
        Fact("weights", count(row.parameters), "", computed),
        Fact("active weights", count(row.active_parameters), "", "computed, counted as publishers do"),
        Fact(
            "read at every step",
            count(row.always_parameters),
            "",
            "computed: all but routed experts, embedding",
        ),
        Fact("KV growth", number(row.kv_values_per_token), "values/token", "computed, at long context"),
        Fact("work at 4,096 context", count(row.flops_per_token(4096.0)), "FLOP/token", computed),
        Fact("layers", str(row.layers)),
        Fact("hidden size", number(row.hidden)),
        Fact("vocabulary", number(row.vocabulary)),
        *(_attention(kind) for kind in row.attention),
        Fact(
            "dense feed-forward",
            str(row.dense_ffn_layers),
            "layers",
            f"{count(row.dense_ffn_parameters)} each",
        ),
        Fact("mixture of experts", str(row.moe_layers), "layers"),
    ]
    if row.moe_layers:
        each = f"{count(row.expert_parameters)} weights each"
        shared = count(row.shared_expert_parameters)
        facts += [
            Fact("experts per layer", f"{row.experts_active} of {row.experts}", "", each),
            Fact("shared experts, router", shared, "", "weights per layer"),
        ]
    tied = "tied to the embedding" if row.tied_embedding else "its own weights"
    facts += [
        Fact("embedding", count(row.embedding_parameters)),
        Fact("output head", count(row.head_parameters), "", tied),
        Fact("norms", count(row.norm_parameters)),
        Fact("published in", row.native_precision),
        Fact("longest context", number(row.max_context), "tokens"),
    ]
    if row.encoder_parameters:
        facts.append(Fact("encoder", count(row.encoder_parameters), "", "in memory, not used by text tokens"))
    return item(row.name, facts, row.sources, row.checked, []), [_model_row(row)]


def _attention(kind: Attention) -> Fact:
    details = [
        f"KV heads {kind.kv_heads}" if kind.kv_heads else "",
        f"window {kind.window:,}" if kind.window else "",
    ]
    cached = f"{kind.kv_values_per_token:,.0f} cached values per token"
    return Fact(
        f"attention, {kind.kind}", str(kind.layers), "layers", ", ".join([*filter(None, details), cached])
    )


def _model_row(row: Model) -> Row:
    computed = {
        "parameters": row.parameters,
        "active_parameters": row.active_parameters,
        "always_parameters": row.always_parameters,
        "routed_parameters": row.routed_parameters,
        "kv_values_per_token": row.kv_values_per_token,
    }
    return {**plain(row), **plain(computed)}


# --- tariffs ---


def _tariffs() -> Answer:
    table = table_of("Tariff", "utility", *right("USD/kWh", "USD/kW"), "bands", "in force")
    for row in tariffs().values():
        table.add_row(
            row.name,
            row.utility,
            span(tier.usd_per_unit for band in row.energy for tier in band.tiers) if row.energy else "hourly",
            span(tier.usd_per_unit for charge in row.demand for tier in charge.tiers),
            f"{len(row.energy)} energy, {len(row.demand)} demand",
            row.effective or NOTHING,
        )
    legend = (
        "Cheapest to dearest price of any hour or tier. Hours, tiers, sources: pertoken catalog tariffs NAME."
    )
    return Group(table, Text(legend, style="dim")), [plain(row) for row in tariffs().values()]


def _tariff(row: Tariff) -> Answer:
    bands = [band.name for band in row.energy]
    least, most = row.eligible_kw
    facts = [
        Fact("utility", row.utility),
        Fact("what it is", row.about),
        Fact("time zone", row.timezone),
        Fact(
            "for demand of",
            f"{least:,.0f} to {most:,.0f}" if most < math.inf else f"{least:,.0f} or more",
            "kW",
        ),
        *(Fact(f"energy, {band.name}", _tiers(band.tiers, row.tier_unit), "USD/kWh") for band in row.energy),
    ]
    if row.energy:
        facts += [
            Fact("hours, weekdays", _hours(row.weekday, bands)),
            Fact("hours, weekends", _hours(row.weekend, bands)),
        ]
    if any(row.adjustment_usd_per_kwh):
        facts.append(Fact("monthly adjustment", span(row.adjustment_usd_per_kwh), "USD/kWh"))
    if row.hourly is not None:
        size = len(row.hourly.usd_per_kwh)
        facts.append(Fact("hourly series", f"{size:,} hours from {row.hourly.start_utc} UTC", "USD/kWh"))
    for charge in row.demand:
        facts += _demand(charge)
    facts += [
        Fact("fixed", f"{row.fixed_usd_per_month:,.2f}", "USD/month"),
        *([Fact("fixed", f"{row.fixed_usd_per_day:,.2f}", "USD/day")] if row.fixed_usd_per_day else []),
        Fact("holidays as weekends", ", ".join(row.holidays) or "none"),
        Fact("demand averaged over", number(row.demand_window_min), "min"),
        Fact("currency", row.currency),
        Fact("basis", row.basis),
        Fact("in force from", row.effective or NOTHING),
    ]
    notes = ["hours are local; PerToken sees the mean of each hour, so no peak inside one"]
    notes += [row.note] if row.note else []
    return item(row.name, facts, row.sources, row.checked, notes), [plain(row)]


def _demand(charge: Demand) -> list[Fact]:
    facts = [Fact(f"demand, {charge.name}", _tiers(charge.tiers, "kW"), "USD/kW")]
    if not all(all(hours) for hours in (*charge.weekday, *charge.weekend)):
        facts += [
            Fact("  hours, weekdays", _hours(charge.weekday, ["", "counts"])),
            Fact("  hours, weekends", _hours(charge.weekend, ["", "counts"])),
        ]
    if charge.minimum_kw:
        facts.append(Fact("  at least", number(charge.minimum_kw), "kW"))
    if (ratchet := charge.ratchet) is not None:
        share = f"{ratchet.fraction:.0%} of the highest {ratchet.peaks} peak"
        facts.append(Fact("  ratchet", f"{share} of the {ratchet.months} months before"))
    return facts


def _tiers(tiers: Sequence[Tier], unit: str) -> str:
    """``0.11432 to 15,000 kWh, 0.07159 above``; a lone price as it is."""
    if len(tiers) == 1:
        return f"{tiers[0].usd_per_unit:g}"
    return ", ".join(
        f"{tier.usd_per_unit:g} above"
        if tier.upper == math.inf
        else f"{tier.usd_per_unit:g} to {tier.upper:,g} {unit}"
        for tier in tiers
    )


def _hours(schedule: Schedule, names: Sequence[str]) -> str:
    """A 12 × 24 schedule in words: months that share a day, its runs of hours; unnamed hours are left out."""
    parts = []
    start = 0
    for month in range(1, len(schedule) + 1):
        if month < len(schedule) and schedule[month] == schedule[start]:
            continue
        first, last = MONTH_NAMES[start][:3], MONTH_NAMES[month - 1][:3]
        months = first if first == last else f"{first}–{last}"
        day = _day(schedule[start], names)
        parts.append(day if month - start == len(schedule) else f"{months}: {day}")
        start = month
    return "; ".join(parts)


def _day(hours: Sequence[int], names: Sequence[str]) -> str:
    if len(set(hours)) == 1:
        return names[hours[0]] or "none"
    runs = []
    start = 0
    for hour in range(1, len(hours) + 1):
        if hour < len(hours) and hours[hour] == hours[start]:
            continue
        if name := names[hours[start]]:
            runs.append(f"{start}–{hour} h {name}")
        start = hour
    return ", ".join(runs)


# --- prices ---


def _prices(name: str | None, on: date) -> Answer:
    if name is None:
        return _gpu_prices(
            _newest(prices()), on, "the newest of each offer; older ones: pertoken catalog prices NAME"
        )
    for ask in (_of_gpu, _of_provider, _of_term):
        if rows := ask(name):
            return _gpu_prices(rows, on, "every observation, oldest first")
    offers = api_models()
    apis = {provider for provider, _ in offers}
    if name in apis:
        return _api_prices([pair for pair in offers if pair[0] == name], on)
    api, _, wanted = name.partition("/")
    if api in apis and wanted:
        return _api_price(api_price(api, wanted, on))
    lower = name.lower()
    if found := [pair for pair in offers if lower in (pair[1].lower(), pair[1].rpartition("/")[2].lower())]:
        return _api_prices(found, on)
    if name in gpus():
        raise NoEvidenceError(f"no price of {name} is in the catalogue; see `pertoken catalog prices`")
    known = {*gpus(), *(row.provider for row in prices()), *TERMS, *apis, *(served for _, served in offers)}
    raise UnknownNameError("GPU, provider, API or model", name, sorted(known), hint="prices")


def _ask(name: str, ask: Callable[[str], tuple[PriceRow, ...]]) -> list[PriceRow]:
    try:
        rows = ask(name)
    except UnknownNameError:
        return []
    return sorted(rows, key=_place)


def _of_gpu(name: str) -> list[PriceRow]:
    return _ask(name, lambda text: prices(gpu=text))


def _of_provider(name: str) -> list[PriceRow]:
    return _ask(name, lambda text: prices(provider=text))


def _of_term(name: str) -> list[PriceRow]:
    return _ask(name, lambda text: prices(term=text))


def _newest(rows: Iterable[PriceRow]) -> list[PriceRow]:
    """The newest row of each offer, by GPU and term."""
    offers: dict[tuple[object, ...], PriceRow] = {}
    for row in rows:
        key = (row.gpu, row.term, row.provider, row.instance, row.region, row.commitment_years)
        if key not in offers or offers[key].checked < row.checked:
            offers[key] = row
    return sorted(offers.values(), key=_place)


def _place(row: PriceRow) -> tuple[object, ...]:
    """By GPU in catalogue order, term, provider, offer and day."""
    return list(gpus()).index(row.gpu), TERMS.index(row.term), row.provider, row.instance, row.checked


def _gpu_prices(rows: Sequence[PriceRow], on: date, which: str) -> Answer:
    table = table_of("GPU", "term", "provider", *right("USD", "per", "of"), "offer", "seen", *right("source"))
    sources: dict[str, int] = {}
    found: list[Row] = []
    for row in rows:
        stale = (on - row.checked).days > STALE_AFTER_DAYS
        source = sources.setdefault(row.source, len(sources) + 1)
        years = _years(row.commitment_years)
        bought = row.usd_per_gpu is not None
        table.add_row(
            row.gpu,
            row.term,
            row.provider,
            f"{row.usd_per_gpu:,.0f}" if row.usd_per_gpu is not None else f"{row.usd_per_gpu_hour:.3f}",
            "GPU" if bought else "GPU·h",
            str(row.gpus_per_instance),
            ", ".join(filter(None, (row.instance, row.region, years, row.note))),
            f"{row.checked} old" if stale else str(row.checked),
            str(source),
        )
        found.append({**plain(row), "stale": stale})
    legend = (
        f"{len(rows)} prices, {which}. of: GPUs that come together. old: seen more than {STALE_AFTER_DAYS} "
        f"days before {on}. API token prices: pertoken catalog prices API or API/MODEL."
    )
    notes = [Text(f"{place} {source}", style="dim") for source, place in sources.items()]
    return Group(table, Text(legend, style="dim"), *notes), found


def _years(count: float) -> str:
    if not count:
        return ""
    return f"{count:g} year" if count == 1 else f"{count:g} years"


def _api_prices(offers: Sequence[tuple[str, str]], on: date) -> Answer:
    found: list[ApiPrice] = []
    for provider, name in offers:
        try:
            found.append(api_price(provider, name, on))
        except (NoEvidenceError, InputError):
            continue  # listed, but without a token price on that day
    table = table_of("API", "model", *right("input", "cached", "output"), "steps", "since")
    for quote in found:
        steps = ", ".join(f">{tier.above_input_tokens:,}" for tier in quote.tiers)
        table.add_row(
            quote.provider,
            quote.model,
            *(token_price(value) for value in _three(quote)),
            steps or NOTHING,
            quote.since or NOTHING,
        )
    legend = (
        f"USD per M tokens on {on}. steps: prompt lengths [tokens] from which a dearer price holds for the "
        f"whole request; the prices shown are below the first. {_data(found)}"
    )
    return Group(table, Text(legend, style="dim")), [plain(quote) for quote in found]


def _api_price(quote: ApiPrice) -> Answer:
    unit = "USD/M tokens"
    write = quote.cache_write_usd_per_mtok
    facts = [
        *(Fact(what, token_price(usd), unit) for what, usd in zip(_METERS, _three(quote), strict=True)),
        Fact(
            "writing the cache",
            NOTHING if write is None else token_price(write),
            unit,
            "replaces the input price",
        ),
    ]
    for tier in quote.tiers:
        prices_above = ", ".join(
            f"{what} {token_price(usd)}" for what, usd in zip(_METERS, _three(tier), strict=True)
        )
        facts.append(
            Fact(f"prompts above {tier.above_input_tokens:,}", prices_above, unit, "for the whole request")
        )
    facts.append(Fact("this price since", quote.since or NOTHING))
    notes = [quote.note] if quote.note else []
    if quote.stale:
        notes.append("the data is old: upgrade genai-prices")
    notes.append(f"other APIs with this model: pertoken catalog prices {quote.model.rpartition('/')[2]}")
    table = item(f"{quote.provider}/{quote.model}", facts, [quote.source], str(quote.checked), notes)
    return table, [plain(quote)]


_METERS = ("input", "cached input", "output")


def _three(quote: ApiPrice | ApiTier) -> tuple[float, float, float]:
    return quote.input_usd_per_mtok, quote.cached_input_usd_per_mtok, quote.output_usd_per_mtok


def _data(quotes: Sequence[ApiPrice]) -> str:
    if not quotes:
        return ""
    package = quotes[0].source.partition(";")[0]
    return f"Data: {package}, newest price {max(quote.checked for quote in quotes)}."
