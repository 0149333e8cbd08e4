"""Which targets are scraped, from a sources file and file_sd, and the scraping of them.

A sources file (YAML)::

    interval_seconds: 15
    targets:
      - {name: vllm-a, url: "http://10.0.0.5:8000/metrics", pool: h100, gpus: 8}
    file_sd:
      - {files: ["targets/*.json"], pool: h100, path: /metrics}
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pertoken.errors import InputError
from pertoken.meter._counters import State
from pertoken.meter._exposition import MAX_BYTES
from pertoken.meter.prometheus import Target, check_target, read
from pertoken.meter.records import concat

_ACCEPT = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4"
_TIMEOUT_S = 10.0
_WORKERS = 8


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


class _Known(_Strict):
    pool: str
    model: str = ""
    tenant: str = ""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    names: dict[str, str] = {}
    pools: dict[str, str] = {}


class TargetEntry(_Known):
    """One target. `name` is what its records and counter state are kept under: keep it when the address
    changes."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    url: Annotated[str, Field(pattern=r"^https?://")] = ""
    """Empty for a target that is remote-written: its name is then its ``instance`` or ``job/instance``
    label."""


class FileSd(_Known):
    """Prometheus file_sd: files that list ``[{"targets": ["host:port"], "labels": {…}}]``; read again each
    sweep."""

    files: Annotated[list[str], Field(min_length=1)]
    scheme: Annotated[str, Field(pattern=r"^https?$")] = "http"
    path: str = "/metrics"


class Sources(_Strict):
    """Where the meter reads."""

    interval_seconds: Annotated[float, Field(ge=1, le=300)] = 15.0
    targets: list[TargetEntry] = []
    file_sd: list[FileSd] = []


class Fetched(NamedTuple):
    """An answer of a target: its body, and whether it is OpenMetrics."""

    body: bytes
    openmetrics: bool


@dataclass(frozen=True)
class Sweep:
    """One round of scrapes: the records, each target's new state, and why others stayed silent.

    Journal both at once, ``journal.append(sweep.records, sweep.marks)``, and only then keep `states`: what
    was not journaled is counted by the next sweep.
    """

    records: pa.Table
    states: Mapping[str, State]
    silent: Mapping[str, str]

    @property
    def marks(self) -> dict[str, bytes]:
        return {name: state.to_bytes() for name, state in self.states.items()}


def load_sources(path: Path, pools: Iterable[str]) -> Sources:
    """The sources in a YAML file, their pools checked against the fleet's. Raises InputError naming the
    field."""
    try:
        raw = yaml.safe_load(path.read_text())
        sources = Sources.model_validate(raw or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {place}: {first['msg']}") from error
    known = list(pools)
    names: set[str] = set()
    for entry in sources.targets:
        check_target(_target(entry, entry.name, entry.url), known)
        if entry.name in names:
            raise InputError(f"{path}: two targets are named {entry.name!r}: their counters would mix")
        names.add(entry.name)
    for found in sources.file_sd:
        check_target(_target(found, "file_sd", ""), known)
    return sources


def targets(sources: Sources, folder: Path) -> tuple[dict[str, Target], list[str]]:
    """All targets by name, file_sd's now included, and why some of its files were left out.

    file_sd targets are named by address; a label ``pertoken_pool``, ``pertoken_model``, ``pertoken_tenant``
    or ``pertoken_gpus`` says what the entry does not.
    """
    found = {entry.name: _target(entry, entry.name, entry.url) for entry in sources.targets}
    problems: list[str] = []
    for entry in sources.file_sd:
        for pattern in entry.files:
            for path in sorted(folder.glob(pattern)) if not Path(pattern).is_absolute() else [Path(pattern)]:
                try:
                    for target in _discovered(path, entry):
                        found.setdefault(target.name, target)
                except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
                    problems.append(f"{path}: {error}")
    return found, problems


def sweep(
    wanted: Mapping[str, Target],
    states: Mapping[str, State],
    *,
    now_s: float,
    watching_s: float,
    fetch: Callable[[str], Fetched] | None = None,
) -> Sweep:
    """Scrape all targets that have a url, at once.

    Parameters: targets and their last states by name; now_s [POSIX s]; watching_s [POSIX s], when this
    service first watched: a process started later is counted from zero; fetch, for tests. A target that
    fails is silent, keeps its state, and is counted over the whole silence when it answers again.
    """
    ask = fetch or fetched
    new: dict[str, State] = {}
    tables: list[pa.Table] = []
    silent: dict[str, str] = {}

    def one(target: Target) -> Fetched | str:
        try:
            return ask(target.url)
        except (OSError, http.client.HTTPException, InputError) as error:
            return str(error) or type(error).__name__

    scraped = [t for t in wanted.values() if t.url]
    with ThreadPoolExecutor(min(_WORKERS, len(scraped) or 1)) as pool:
        answers = list(pool.map(one, scraped))
    for target, answer in zip(scraped, answers, strict=True):
        if isinstance(answer, str):
            silent[target.name] = answer
            continue
        state = states.get(target.name) or State(watching_s)
        try:
            table, new[target.name] = read(
                answer.body, target, state, now_s=now_s, openmetrics=answer.openmetrics
            )
            tables.append(table)
        except InputError as error:
            silent[target.name] = str(error)
    return Sweep(concat(tables), new, silent)


def fetched(url: str, timeout_s: float = _TIMEOUT_S) -> Fetched:
    """A target's exposition over HTTP, at most 64 MiB. Raises OSError, HTTPException or InputError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{url!r} is no http address")
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=timeout_s, context=context
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
    try:
        target = (parts.path or "/metrics") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": _ACCEPT, "User-Agent": "pertoken"})
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            raise InputError(f"it answered {answer.status} {answer.reason}")
        body = answer.read(MAX_BYTES + 1)
        if len(body) > MAX_BYTES:
            raise InputError(f"its answer is over {MAX_BYTES} bytes")
        kind = answer.getheader("Content-Type", "")
        return Fetched(body, kind.startswith("application/openmetrics-text"))
    finally:
        connection.close()


def _target(entry: _Known, name: str, url: str) -> Target:
    return Target(
        name, entry.pool, url, entry.model, entry.tenant, entry.gpus, dict(entry.names), dict(entry.pools)
    )


def _discovered(path: Path, entry: FileSd) -> list[Target]:
    text = path.read_text()
    groups = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(groups, list):
        raise ValueError("file_sd is a list of groups with targets")
    found = []
    for group in groups:
        labels = group.get("labels") or {}
        for address in group["targets"]:
            gpus = float(labels.get("pertoken_gpus", entry.gpus))
            found.append(
                Target(
                    name=str(address),
                    pool=str(labels.get("pertoken_pool", entry.pool)),
                    url=f"{labels.get('__scheme__', entry.scheme)}://{address}"
                    f"{labels.get('__metrics_path__', entry.path)}",
                    model=str(labels.get("pertoken_model", entry.model)),
                    tenant=str(labels.get("pertoken_tenant", entry.tenant)),
                    gpus=gpus,
                    names=dict(entry.names),
                    pools=dict(entry.pools),
                )
            )
    return found
