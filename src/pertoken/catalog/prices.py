"""What GPUs cost to rent and to buy, and what API tokens cost: dated rows with their source.

GPU prices are rows of ``data/prices.yaml``. The file is append-only: a price that was once right is never
edited or removed, a new observation is a new row with its own date, so that a plan of last spring can be
priced as it was. API token prices come from the genai-prices package and the data it carries; nothing is
fetched.

>>> from datetime import date
>>> price("aws", "H100", "on_demand", on=date(2026, 11, 24)).usd_per_gpu_hour
6.88
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from functools import cache
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any

import yaml

from pertoken.catalog.gpus import gpu as find_gpu
from pertoken.errors import InputError, NoEvidenceError, UnknownNameError
from pertoken.units import HOURS_PER_DAY, HOURS_PER_YEAR

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, ModelPrice, Provider

TERMS = ("on_demand", "reserved", "spot", "purchase")
STALE_AFTER_DAYS = 180


@dataclass(frozen=True)
class PriceRow:
    """One price of one GPU at one provider, as one source gave it on one day.

    `usd_per_gpu_hour` to rent, `usd_per_gpu` to buy (`note` says what comes with the device): one is None.
    `gpus_per_instance` come together; `commitment_years` is 0 without one, or where the source does not say.
    `checked` is the day the price was seen. `stale`: older than STALE_AFTER_DAYS on the day it was asked for.
    """

    provider: str
    gpu: str
    term: str
    usd_per_gpu_hour: float | None
    usd_per_gpu: float | None
    gpus_per_instance: int
    instance: str
    region: str
    commitment_years: float
    source: str
    checked: date
    note: str = ""
    stale: bool = False


@dataclass(frozen=True)
class ApiTier:
    """Prices [USD per M tokens] of a request whose prompt is longer than `above_input_tokens`; all of it."""

    above_input_tokens: int
    input_usd_per_mtok: float
    cached_input_usd_per_mtok: float
    output_usd_per_mtok: float


@dataclass(frozen=True)
class ApiPrice:
    """Token prices [USD per M tokens] of one model at one API, for requests of `input_tokens` prompt tokens.

    `cached_input_usd_per_mtok` is the input price where the provider has no price for cached tokens.
    `cache_write_usd_per_mtok` is what storing a prompt in the cache costs instead of the input price; None:
    nothing extra. `tiers` are the steps by prompt length; the prices above are those of the step that
    `input_tokens` is in. `since` is the first day of this price (empty: always, as far as the source knows),
    `checked` the day of the newest price in the data.
    """

    provider: str
    model: str
    input_usd_per_mtok: float
    cached_input_usd_per_mtok: float
    output_usd_per_mtok: float
    cache_write_usd_per_mtok: float | None
    input_tokens: float
    tiers: tuple[ApiTier, ...]
    since: str
    source: str
    checked: date
    note: str = ""
    stale: bool = False


def prices(
    gpu: str | None = None, provider: str | None = None, term: str | None = None
) -> tuple[PriceRow, ...]:
    """All price rows of a GPU, a provider and a term (each optional), in file order.

    Raises UnknownNameError for a GPU, provider or term that no row could have.

    >>> {row.term for row in prices(gpu="L40S", provider="aws")} == {"on_demand", "reserved", "spot"}
    True
    """
    rows: Iterable[PriceRow] = _rows()
    if gpu is not None:
        name = find_gpu(gpu).name
        rows = (row for row in rows if row.gpu == name)
    if provider is not None:
        seller = _known("provider", provider, {row.provider for row in _rows()}, "prices")
        rows = (row for row in rows if row.provider == seller)
    if term is not None:
        kind = _known("price term", term, TERMS, "prices")
        rows = (row for row in rows if row.term == kind)
    return tuple(rows)


def price(
    provider: str,
    gpu: str,
    term: str,
    on: date | None = None,
    *,
    instance: str = "",
    region: str = "",
    commitment_years: float | None = None,
) -> PriceRow:
    """The newest price not after `on` (None: the newest of all); `stale` tells whether it is old by then.

    Of several sizes of one day the largest instance is taken, because a pool is made of whole machines.
    `instance`, `region` and `commitment_years` narrow the choice.

    Raises NoEvidenceError where there is no such row, InputError where several remain, UnknownNameError.

    >>> price("lambda", "h100_sxm", "on_demand", date(2026, 10, 1)).gpus_per_instance
    8
    """
    rows = prices(gpu, provider, term)
    what = f"{term} price of {find_gpu(gpu).name} at {provider}"
    if not rows:
        sellers = sorted({row.provider for row in prices(gpu=gpu, term=term)})
        raise NoEvidenceError(f"no {what}; {_offer('known at', sellers)}")
    rows = tuple(
        row
        for row in rows
        if (not instance or _fold(instance) == _fold(row.instance))
        and (not region or _fold(region) == _fold(row.region))
        and (commitment_years is None or commitment_years == row.commitment_years)
    )
    if not rows:
        offers = sorted({_terms_of(row) for row in prices(gpu, provider, term)})
        raise NoEvidenceError(
            f"no {what} with that instance, region or commitment; {_offer('there are', offers)}"
        )
    seen = [row for row in rows if on is None or row.checked <= on]
    if not seen:
        raise NoEvidenceError(f"no {what} on {on}; the first was seen on {min(row.checked for row in rows)}")
    newest = max(row.checked for row in seen)
    found = [row for row in seen if row.checked == newest]
    most = max(row.gpus_per_instance for row in found)
    found = [row for row in found if row.gpus_per_instance == most]
    if len(found) > 1:
        raise InputError(f"more than one {what}: say which of {', '.join(_terms_of(row) for row in found)}")
    return replace(found[0], stale=on is not None and _is_stale(newest, on))


def api_models(provider: str | None = None) -> tuple[tuple[str, str], ...]:
    """(provider, model) of every model the API price data has a token price for.

    Raises UnknownNameError for a provider that is not in the data.
    """
    sellers = _api_providers()
    if provider is not None:
        sellers = (_api_provider(provider),)
    return tuple((s.id, m.id) for s in sellers for m in s.models if any(map(_has_tokens, _all_prices(m))))


def api_price(provider: str, model: str, on: date | None = None, *, input_tokens: float = 0.0) -> ApiPrice:
    """Token prices of `model` at `provider` on a day, for requests of `input_tokens` [tokens] prompt length.

    Providers charge all of a request at the rate of the step its prompt length falls in. Where the price
    changes over the day, the dearest hour is taken and `note` says so. `on` None is today.

    Raises UnknownNameError with the nearest names, NoEvidenceError for a model without token prices and
    InputError for a prompt length that is none.
    Source: the genai-prices package, whose data is read as installed.

    >>> api_price("groq", "openai/gpt-oss-120b", date(2026, 11, 24)).output_usd_per_mtok
    0.6
    """
    if not 0 <= input_tokens < math.inf:
        raise InputError(f"input_tokens is {input_tokens}: give a number of tokens, 0 or more")
    seller = _api_provider(provider)
    found = _api_model(seller, model)
    day = on or datetime.now(tz=UTC).date()
    quotes = _quotes_of_day(found, day)
    if not quotes:
        raise NoEvidenceError(f"{seller.id} has no token price for {found.id} in genai-prices")
    chosen = max(quotes, key=lambda quote: sum(_at(quote, key, input_tokens) or 0.0 for key in _KEYS))
    tiers = tuple(_tier(chosen, start) for start in _starts(chosen))
    write = _at(chosen, "cache_write_mtok", input_tokens)
    checked = _api_checked(day)
    return ApiPrice(
        provider=seller.id,
        model=found.id,
        input_usd_per_mtok=_rate(chosen, "input_mtok", input_tokens),
        cached_input_usd_per_mtok=_cached(chosen, input_tokens),
        output_usd_per_mtok=_rate(chosen, "output_mtok", input_tokens),
        cache_write_usd_per_mtok=write,
        input_tokens=input_tokens,
        tiers=tiers,
        since=_since(found, day),
        source=_api_source(seller),
        checked=checked,
        note="price changes over the day (UTC); the dearest hour is shown" if len(quotes) > 1 else "",
        stale=_is_stale(checked, day),
    )


_KEYS = ("input_mtok", "output_mtok")


def _is_stale(checked: date, on: date) -> bool:
    return on - checked > timedelta(days=STALE_AFTER_DAYS)


def _fold(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def _known(kind: str, name: str, known: Iterable[str], hint: str) -> str:
    """The known name that is spelled like `name`, case and punctuation aside."""
    names = sorted(known)
    for candidate in names:
        if _fold(candidate) == _fold(name):
            return candidate
    raise UnknownNameError(kind, name, names, hint=hint)


def _offer(lead: str, names: list[str]) -> str:
    return f"{lead} {', '.join(names)}" if names else "none is known anywhere; see `pertoken catalog prices`"


def _terms_of(row: PriceRow) -> str:
    parts = (row.instance, row.region, f"{row.commitment_years:g} years" if row.commitment_years else "")
    return " / ".join(part for part in parts if part)


@cache
def _rows() -> tuple[PriceRow, ...]:
    text = resources.files("pertoken.catalog").joinpath("data/prices.yaml").read_text(encoding="utf-8")
    raw = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    rows = tuple(_row(sheet, entry) for sheet in raw["sheets"] for entry in sheet["rows"])
    for row in rows:
        for problem in _problems(row):
            raise InputError(f"prices.yaml: {row.provider}, {row.gpu}, {row.checked}: {problem}")
    return rows


def _row(sheet: Mapping[str, Any], entry: Mapping[str, Any]) -> PriceRow:
    gpus = entry["gpus"]
    hourly = entry.get("usd_per_gpu_hour")
    if "usd_per_hour" in entry:
        hourly = entry["usd_per_hour"] / gpus
    elif "usd_per_year" in entry:
        hourly = entry["usd_per_year"] / HOURS_PER_YEAR / gpus
    return PriceRow(
        provider=sheet["provider"],
        gpu=entry["gpu"],
        term=entry["term"],
        usd_per_gpu_hour=None if hourly is None else float(hourly),
        usd_per_gpu=None if "usd_per_gpu" not in entry else float(entry["usd_per_gpu"]),
        gpus_per_instance=gpus,
        instance=entry.get("instance", ""),
        region=entry.get("region", sheet.get("region", "")),
        commitment_years=float(entry.get("years", 0)),
        source=sheet["source"],
        checked=sheet["checked"],
        note=entry.get("note", ""),
    )


def _problems(row: PriceRow) -> Iterator[str]:
    """What is wrong with a row; nothing where it keeps every rule."""
    if find_gpu(row.gpu).name != row.gpu:
        yield f"{row.gpu!r} is not a canonical name"
    if row.term not in TERMS:
        yield f"unknown term {row.term!r}"
    wanted, other = row.usd_per_gpu_hour, row.usd_per_gpu
    if row.term == "purchase":
        wanted, other = other, wanted
        if not row.note:
            yield "a purchase price must note what comes with the GPU"
    if wanted is None or other is not None:
        yield "to rent takes a price per hour, to buy a price per GPU"
    elif not 0 < wanted < math.inf:
        yield f"price is {wanted}, not positive"
    if not isinstance(row.checked, date):
        yield f"checked is {row.checked!r}, not a date"
    if row.gpus_per_instance < 1 or row.commitment_years < 0:
        yield "gpus and years count from 1 and 0"


@cache
def _data_version() -> str:
    return metadata.version("genai-prices")


def _api_source(seller: Provider) -> str:
    page = (seller.pricing_urls or [seller.name])[0]
    return f"genai-prices {_data_version()}; {page}"


def _api_providers() -> tuple[Provider, ...]:
    # The bundled data, not genai_prices' snapshot: one that another part of the process downloaded would make
    # the same plan cost something else from one minute to the next.
    from genai_prices.data import providers

    return tuple(providers)


def _api_provider(name: str) -> Provider:
    by_id = {seller.id: seller for seller in _api_providers()}
    return by_id[_known("API provider", name, by_id, "prices")]


def _api_model(seller: Provider, name: str) -> ModelInfo:
    """By id, by the last part of an id where only one has it, or by the aliases genai-prices knows."""
    wanted = name.lower()
    by_id = [m for m in seller.models if m.id.lower() == wanted]
    by_last_part = [m for m in seller.models if m.id.rpartition("/")[2].lower() == wanted]
    for found in (by_id, by_last_part):
        if len(found) == 1:
            return found[0]
    if name and (match := seller.find_model(name)) is not None:
        return match
    raise UnknownNameError(f"{seller.id} model", name, [m.id for m in seller.models], hint="prices")


def _all_prices(model: ModelInfo) -> Iterator[ModelPrice]:
    if isinstance(model.prices, list):
        yield from (conditional.prices for conditional in model.prices)
    else:
        yield model.prices


def _has_tokens(quote: ModelPrice) -> bool:
    return all(getattr(quote, key) is not None for key in _KEYS)


def _quotes_of_day(model: ModelInfo, day: date) -> list[ModelPrice]:
    """The different token prices the model has over a day."""
    hours = (datetime.combine(day, time(hour), tzinfo=UTC) for hour in range(HOURS_PER_DAY))
    quotes: list[ModelPrice] = []
    for hour in hours:
        quote = model.get_prices(hour)
        if quote not in quotes and _has_tokens(quote):
            quotes.append(quote)
    return quotes


def _at(quote: ModelPrice, key: str, input_tokens: float) -> float | None:
    """The price under `key` for a prompt of that length; None where the provider has none."""
    value = getattr(quote, key)
    if value is None:
        return None
    for tier in reversed(getattr(value, "tiers", ())):
        if input_tokens > tier.start:
            return float(tier.price)
    return float(getattr(value, "base", value))


def _rate(quote: ModelPrice, key: str, input_tokens: float) -> float:
    value = _at(quote, key, input_tokens)
    assert value is not None  # quotes without token prices were left out before
    return value


def _cached(quote: ModelPrice, input_tokens: float) -> float:
    cached = _at(quote, "cache_read_mtok", input_tokens)
    return _rate(quote, "input_mtok", input_tokens) if cached is None else cached


def _starts(quote: ModelPrice) -> list[int]:
    keys = (*_KEYS, "cache_read_mtok")
    return sorted({tier.start for key in keys for tier in getattr(getattr(quote, key), "tiers", ())})


def _tier(quote: ModelPrice, start: int) -> ApiTier:
    above = start + 1
    return ApiTier(
        above_input_tokens=start,
        input_usd_per_mtok=_rate(quote, "input_mtok", above),
        cached_input_usd_per_mtok=_cached(quote, above),
        output_usd_per_mtok=_rate(quote, "output_mtok", above),
    )


def _start_dates(model: ModelInfo) -> Iterator[date]:
    if isinstance(model.prices, list):
        for conditional in model.prices:
            start = getattr(conditional.constraint, "start_date", None)
            if start is not None:
                yield start


def _since(model: ModelInfo, day: date) -> str:
    return max((start.isoformat() for start in _start_dates(model) if start <= day), default="")


@cache
def _api_checked(day: date) -> date:
    """The newest price change the installed data knows of by that day: it was made no earlier."""
    known = {start for seller in _api_providers() for m in seller.models for start in _start_dates(m)}
    return max((start for start in known if start <= day), default=min(known))
