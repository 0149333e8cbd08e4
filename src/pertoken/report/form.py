"""A scenario from the fields of a form: what a person types becomes the YAML that is run, and nothing else does.

The fields are names with texts, as a browser sends them. `defaults` fills them so that they can be run as they are,
`scenario_text` writes the YAML, and what is wrong is said once, with the field it is about.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from pertoken.catalog.gpus import gpu as find_gpu
from pertoken.catalog.prices import prices
from pertoken.errors import InputError, PerTokenError, ScenarioError
from pertoken.scenario import Bought, Fleet, Reserved, TariffFile, parse
from pertoken.units import GIGA, MILLISECONDS_PER_SECOND, TOKENS_PER_MTOK

MOST_ROWS = 12
TERMS = {
    "owned": "owned",
    "on_demand": "rented by the hour",
    "reserved": "reserved (paid used or not)",
    "api": "API (paid by token)",
}
"""Price terms a form offers; the YAML takes colocated and spot as well."""
VOLUMES = {"requests": "requests a day", "mtok": "M tokens a day"}
STARTS = {
    "serving": "Serving",
    "training": "Training",
    "both": "Serving and training",
    "fleet": "The running fleet",
}
"""What the fields may start from."""
Fields = Mapping[str, str]


class FieldError(InputError):
    """A field of the form that cannot be used; `field` is its name, empty where it is none alone."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class FleetText:
    """A fleet as the sites and pools of a scenario, and the files it names, by the path that is written there."""

    sites: dict[str, Any]
    pools: dict[str, Any]
    files: dict[str, Path]


def defaults(start: str, first_day: date, days: int, zone: str = "") -> dict[str, str]:
    """Fields that can be run as they are; `zone`: that of the running fleet.

    Raises InputError on a start that is none of `STARTS`.
    """
    if start not in STARTS:
        raise InputError(f"a form starts from one of {', '.join(STARTS)}, found {start[:40]!r}")
    site = {
        "name": start if start != "fleet" else "fleet plan",
        "start": first_day.isoformat(),
        "days": str(days),
        "timezone": "America/Los_Angeles",
        "tariff": "SMUD CI-TOD1 21-299 kW",
        "pue": "1.3",
    }
    rows = [("H100-SXM", "owned", "8", _seen("H100-SXM", "owned"), "")]
    rows += [("H100-SXM", "on_demand", "", _seen("H100-SXM", "on_demand"), "")]
    serving = {
        "serve_model": "meta-llama/Llama-3.3-70B-Instruct",
        "precision": "fp8",
        "volume": "150000",
        "volume_unit": "requests",
        "input_tokens": "1200",
        "output_tokens": "250",
        "cached_percent": "40",
        "profile": "office",
        "ttft_s": "1",
        "tpot_ms": "50",
    }
    training = {
        "train_model": "Qwen/Qwen3-8B",
        "train_tokens_b": "2",
        "train_deadline_days": str(min(6, days)),
        "train_method": "pretrain",
    }
    if start == "fleet":
        return {**site, "fleet": "on", "timezone": zone or site["timezone"], **serving}
    if start == "training":
        return {**site, **_rows(rows), **training}
    rows.append(("", "api", "", "", "groq/llama-3.3-70b-versatile"))
    if start == "both":
        # What stands in the house trains while power is cheap, what is rented answers.
        rows[0] = ("L40S", "owned", "8", _seen("L40S", "owned"), "")
        training["have-1"] = "on"
    return {**site, **_rows(rows), **serving, **(training if start == "both" else {})}


def scenario_text(fields: Fields, fleet: FleetText | None = None) -> str:
    """The fields as the YAML of a scenario that loads. Raises FieldError."""
    name = _text(fields, "name", "name")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}", name):
        raise FieldError("name", "a name begins with a letter or digit; then also spaces and ._-, 64 in all")
    scenario: dict[str, Any] = {"name": name}
    places: dict[str, str] = {"name": "name"}
    zone = _text(fields, "timezone", "time zone")
    days = _number(fields, "days", "days", least=1)
    start = _text(fields, "start", "first day")
    scenario["horizon"] = {"start": _day(start), "days": days, "timezone": zone}
    places |= {"horizon.start": "start", "horizon.days": "days", "horizon.timezone": "timezone"}
    sites, pools = _hardware(fields, fleet if fields.get("fleet") else None, zone, places)
    if sites:
        scenario["sites"] = sites
    scenario["pools"] = pools
    scenario["workloads"] = _workloads(fields, places)
    budget = _number(fields, "budget_usd", "budget", above=0, needed=False)
    if budget is not None:
        scenario["budget"] = {"usd": budget}
    text: str = yaml.safe_dump(
        scenario, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None
    )
    try:
        parse(text, fleet.files if fleet else None)
    except ScenarioError as error:
        raise FieldError(_field_at(error.field, places), _short(error)) from error
    return text


def fleet_text(fleet: Fleet) -> FleetText:
    """What runs, as a scenario's sites and pools: what is owned, colocated or reserved is there and paid for."""
    files: dict[str, Path] = {}

    def named(path: Path) -> str:
        name = path.name
        while files.get(name, path) != path:
            name = f"other-{name}"
        files[name] = path
        return name

    sites: dict[str, Any] = {}
    for name, site in fleet.sites.items():
        sites[name] = site.model_dump(mode="json", exclude_unset=True)
        if isinstance(site.tariff, TariffFile):
            kind, path = ("urdb", site.tariff.urdb) if site.tariff.urdb else ("csv", site.tariff.csv)
            assert path is not None
            sites[name]["tariff"] = {kind: named(path)}
    pools: dict[str, Any] = {}
    for name, pool in fleet.pools.items():
        pools[name] = pool.model_dump(mode="json", exclude_unset=True)
        if pool.points:
            pools[name]["points"] = named(pool.points)
        if isinstance(pool.count, int) and isinstance(pool.price, Bought | Reserved):
            pools[name]["have"] = True
    return FleetText(_plain(sites), _plain(pools), files)


def row_numbers(fields: Fields) -> list[int]:
    """Numbers of the hardware rows that something is written in, and of one more to write in."""
    written = [
        n for n in range(1, MOST_ROWS + 1) if any(fields.get(f"{k}-{n}") for k in ("gpu", "usd", "api"))
    ]
    free = next((n for n in range(1, MOST_ROWS + 1) if n not in written), None)
    return sorted([*written, *([free] if free else [])])


def offers() -> dict[str, dict[str, list[tuple[float, str]]]]:
    """The catalogue's newest prices by GPU and term: USD per GPU (owned) or GPU hour, and who asked it when."""
    newest: dict[tuple[str, ...], Any] = {}
    for row in prices():
        term = "owned" if row.term == "purchase" else row.term
        key = (row.gpu, term, row.provider, row.instance, row.region, f"{row.commitment_years:g}")
        if term in TERMS and (key not in newest or newest[key].checked < row.checked):
            newest[key] = row
    found: dict[str, dict[str, list[tuple[float, str]]]] = {}
    for (gpu, term, *_), row in newest.items():
        usd = row.usd_per_gpu if term == "owned" else row.usd_per_gpu_hour
        by_term = found.setdefault(gpu, {}).setdefault(term, [])
        by_term.append((usd, f"{row.provider}, {row.checked}"))
        by_term.sort()
    return found


def _seen(gpu: str, term: str) -> str:
    """The median of the catalogue's newest prices, to begin with."""
    known = offers().get(gpu, {}).get(term, [])
    return f"{known[len(known) // 2][0]:g}" if known else ""


def _rows(rows: list[tuple[str, str, str, str, str]]) -> dict[str, str]:
    return {
        f"{key}-{n}": value
        for n, row in enumerate(rows, 1)
        for key, value in zip(("gpu", "term", "count", "usd", "api"), row, strict=True)
        if value
    }


# --- hardware ---


def _hardware(
    fields: Fields, fleet: FleetText | None, zone: str, places: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sites and pools: those of the fleet, where it is taken, and the rows'."""
    sites: dict[str, Any] = dict(fleet.sites) if fleet else {}
    pools: dict[str, Any] = dict(fleet.pools) if fleet else {}
    own, cloud = _free("site", sites), _free("cloud", sites)
    for n, row in _written(fields):
        term = row["term"]
        if term == "api":
            name, pool = _api(n, row["api"])
        else:
            site = own if term == "owned" else cloud
            name, pool = _gpus(n, row, site)
            if site not in sites:
                sites[site] = _site(fields, zone, own=term == "owned")
        name = _free(name, pools)
        pools[name] = pool
        places |= {f"pools.{name}": f"term-{n}", f"pools.{name}.gpu": f"gpu-{n}"}
        places |= {f"pools.{name}.count": f"count-{n}", f"pools.{name}.have": f"count-{n}"}
        places[f"pools.{name}.price"] = f"api-{n}" if term == "api" else f"usd-{n}"
    for field, key in (
        ("timezone", "timezone"),
        ("pue", "pue"),
        ("tariff", "tariff"),
        ("carbon", "carbon_g_per_kwh"),
    ):
        places[f"sites.{own}.{key}"] = places[f"sites.{cloud}.{key}"] = field
    if not pools:
        raise FieldError("gpu-1", "nothing to run on: fill in a row of hardware")
    return sites, pools


def _written(fields: Fields) -> Iterator[tuple[int, dict[str, str]]]:
    for n in range(1, MOST_ROWS + 1):
        row = {k: fields.get(f"{k}-{n}", "").strip() for k in ("gpu", "term", "count", "usd", "api", "have")}
        if not (row["gpu"] or row["usd"] or row["api"]):
            continue
        if row["term"] not in TERMS:
            raise FieldError(f"term-{n}", f"hardware {n}: choose a price term: {', '.join(TERMS.values())}")
        yield n, row


def _api(n: int, offer: str) -> tuple[str, dict[str, Any]]:
    provider, _, model = offer.partition("/")
    if not (provider and model):
        raise FieldError(
            f"api-{n}", f"hardware {n}: write provider/model, such as groq/llama-3.3-70b-versatile"
        )
    return f"{_word(provider)}-api", {"price": {"term": "api", "provider": provider, "model": model}}


def _gpus(n: int, row: dict[str, str], site: str) -> tuple[str, dict[str, Any]]:
    if not row["gpu"]:
        raise FieldError(f"gpu-{n}", f"hardware {n}: choose a GPU")
    try:
        gpu = find_gpu(row["gpu"]).name
    except PerTokenError as error:
        raise FieldError(f"gpu-{n}", f"hardware {n}: {error}") from error
    term = row["term"]
    unit = "GPU" if term == "owned" else "GPU hour"
    if not row["usd"]:
        raise FieldError(f"usd-{n}", f"hardware {n}: give USD per {unit}{_known_offers(gpu, term)}")
    usd = _number(row, "usd", f"hardware {n}, USD per {unit}", least=0, field=f"usd-{n}")
    pool: dict[str, Any] = {"gpu": gpu, "site": site}
    if row["count"]:
        count = _number(row, "count", f"hardware {n}, GPUs", least=1, field=f"count-{n}")
        if not isinstance(count, int):
            raise FieldError(f"count-{n}", f"hardware {n}: {row['count'][:40]} GPUs are no whole number")
        pool["count"] = count
    if row["have"] and term in ("owned", "reserved"):
        pool["have"] = True
    key = "usd_per_gpu" if term == "owned" else "usd_per_gpu_hour"
    pool["price"] = {"term": term, key: usd}
    word = {"owned": "owned", "on_demand": "rented", "reserved": "reserved"}[term]
    return f"{gpu.lower()}-{word}", pool


def _known_offers(gpu: str, term: str) -> str:
    known = offers().get(gpu, {}).get(term, [])
    if not known:
        return "; the catalogue has no such price"
    (low, who), (high, other) = known[0], known[-1]
    if len(known) == 1:
        return f"; the catalogue has {low:g} ({who})"
    return f"; the catalogue has {low:g} ({who}) to {high:g} ({other})"


def _site(fields: Fields, zone: str, *, own: bool) -> dict[str, Any]:
    site: dict[str, Any] = {"timezone": zone, "pue": _number(fields, "pue", "PUE", least=1)}
    carbon = _number(fields, "carbon", "gCO2e per kWh", least=0, needed=False)
    if carbon is not None:
        site["carbon_g_per_kwh"] = carbon
    if not own:
        return site
    tariff = fields.get("tariff", "").strip()
    usd_per_kwh = _number(fields, "usd_per_kwh", "USD per kWh", least=0, needed=False)
    usd_per_kw = _number(fields, "usd_per_kw", "USD per kW of the month's peak", least=0, needed=False)
    if tariff and (usd_per_kwh is not None or usd_per_kw is not None):
        raise FieldError("usd_per_kwh", "give a tariff or a price of your own, not both")
    if not tariff and usd_per_kwh is None:
        raise FieldError(
            "usd_per_kwh", "what is owned pays for its power: choose a tariff, or give USD per kWh"
        )
    site["tariff"] = tariff or {
        "usd_per_kwh": usd_per_kwh,
        **({} if usd_per_kw is None else {"demand_usd_per_kw": usd_per_kw}),
    }
    return site


# --- work ---


def _workloads(fields: Fields, places: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if fields.get("volume", "").strip():
        found["serving"] = _serving(fields)
        places |= {
            "workloads.serving": "volume", "workloads.serving.model": "serve_model",
            "workloads.serving.input_tokens": "input_tokens", "workloads.serving.output_tokens": "output_tokens",
            "workloads.serving.cached_fraction": "cached_percent", "workloads.serving.profile": "profile",
            "workloads.serving.precisions": "precision", "workloads.serving.slo.ttft_s": "ttft_s",
            "workloads.serving.slo.tpot_s": "tpot_ms",
        }  # fmt: skip
    if fields.get("train_tokens_b", "").strip():
        found["training"] = _training(fields)
        places |= {
            "workloads.training": "train_tokens_b", "workloads.training.model": "train_model",
            "workloads.training.deadline_days": "train_deadline_days", "workloads.training.method": "train_method",
        }  # fmt: skip
    if not found:
        raise FieldError("volume", "nothing to run: give requests or tokens a day, or tokens to train on")
    return found


def _serving(fields: Fields) -> dict[str, Any]:
    work: dict[str, Any] = {"kind": "serving", "model": _text(fields, "serve_model", "model to serve")}
    if fields.get("precision"):
        work["precisions"] = [fields["precision"]]
    unit = fields.get("volume_unit") or "requests"
    if unit not in VOLUMES:
        raise FieldError("volume_unit", f"the volume is in {' or '.join(VOLUMES.values())}")
    asked = _number(fields, "volume", VOLUMES[unit], above=0)
    into = _number(fields, "input_tokens", "input tokens", above=0)
    out = _number(fields, "output_tokens", "output tokens", above=0)
    assert asked is not None
    assert into is not None
    assert out is not None
    per_day = asked if unit == "requests" else _whole(asked * TOKENS_PER_MTOK / (into + out))
    work |= {"requests_per_day": per_day, "input_tokens": into, "output_tokens": out}
    cached = _number(fields, "cached_percent", "cached input", least=0, needed=False)
    if cached:
        if cached >= 100:
            raise FieldError("cached_percent", f"cached input must be below 100 %, found {cached:g}")
        work["cached_fraction"] = _whole(cached / 100)
    if fields.get("profile"):
        work["profile"] = fields["profile"]
    ttft_s = _number(fields, "ttft_s", "time to the first token", above=0, needed=False)
    tpot_ms = _number(fields, "tpot_ms", "time per output token", above=0, needed=False)
    if (ttft_s is None) != (tpot_ms is None):
        missing = "ttft_s" if ttft_s is None else "tpot_ms"
        raise FieldError(missing, "a latency target has two halves: first token and each token after it")
    if ttft_s is not None and tpot_ms is not None:
        work["slo"] = {"ttft_s": ttft_s, "tpot_s": _whole(tpot_ms / MILLISECONDS_PER_SECOND)}
    return work


def _training(fields: Fields) -> dict[str, Any]:
    tokens = _number(fields, "train_tokens_b", "tokens to train on", above=0)
    assert tokens is not None
    work: dict[str, Any] = {
        "kind": "training",
        "model": _text(fields, "train_model", "model to train"),
        "tokens": _whole(tokens * GIGA),
    }
    if fields.get("train_method"):
        work["method"] = fields["train_method"]
    deadline = _number(fields, "train_deadline_days", "deadline", above=0, needed=False)
    if deadline is not None:
        work["deadline_days"] = deadline
    return work


# --- texts and numbers ---


def _text(fields: Fields, key: str, label: str) -> str:
    text = fields.get(key, "").strip()
    if not text:
        raise FieldError(key, f"{label} is missing")
    return text


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise FieldError("start", f"first day: {text[:40]!r} is no date such as 2027-02-01") from error


def _number(
    fields: Fields,
    key: str,
    label: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    needed: bool = True,
    field: str = "",
) -> float | int | None:
    """The number in a field, whole where it is; None where it may be and is empty. Raises FieldError."""
    text = fields.get(key, "").strip()
    if not text:
        if needed:
            raise FieldError(field or key, f"{label}: give a number")
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise FieldError(field or key, f"{label}: {text[:40]!r} is no number")
    if value < least or value <= above:
        bound = f"at least {least:g}" if value < least else f"above {above:g}"
        raise FieldError(field or key, f"{label} must be {bound}, found {text[:40]}")
    return _whole(value)


def _whole(value: float) -> float | int:
    """A number without a point where it needs none, else with as many digits as a person would write."""
    short = float(f"{value:.12g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _plain(value: Any) -> Any:
    """The same with whole numbers written without a point."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return _whole(value) if isinstance(value, float) else value


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """The name, with a number where it is taken."""
    found, n = name, 2
    while found in taken:
        found, n = f"{name}-{n}", n + 1
    return found


def _word(text: str) -> str:
    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in text).strip("-")
    return plain[:40] or "other"


def _field_at(place: str, places: Mapping[str, str]) -> str:
    """The field that wrote what stands at a place of the scenario, or nearest above it; empty where none did."""
    while place and place not in places:
        place = place.rpartition(".")[0]
    return places.get(place, "")


def _short(error: ScenarioError) -> str:
    """The complaint without the line of a text nobody has seen yet."""
    message = str(error)
    place = f" {error.field}: "
    return message.partition(place)[2] if place in message else message
