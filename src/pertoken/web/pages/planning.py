"""Compare and Plan: a form becomes a scenario, the scenario a run, the run tables and figures with their twins."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from hashlib import sha256
from typing import Any, Literal
from zoneinfo import available_timezones

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import ValidationError

from pertoken.catalog.gpus import gpus
from pertoken.catalog.models import models
from pertoken.catalog.prices import api_models
from pertoken.catalog.tariffs import tariffs
from pertoken.errors import InputError, ScenarioError
from pertoken.report import form, plan_book
from pertoken.report._page import png
from pertoken.report.job import BOOK, PAGE, Job
from pertoken.scenario import PROFILES, parse
from pertoken.web._books import WholeAdmin
from pertoken.web._doors import ServiceHere, WholeReader
from pertoken.web._frame import form_of, page
from pertoken.web.runs import BusyError, Run, Runs
from pertoken.web.service import Service

Verb = Literal["compare", "plan"]
_TITLES: dict[str, str] = {"compare": "Compare", "plan": "Plan"}
_FORM_BYTES = 1 << 18
_DAYS = {"compare": 28, "plan": 7}
_TWINS = {
    ".json": ("result.json", "application/json"),
    ".csv": ("table.csv", "text/csv"),
    ".ics": ("calendar.ics", "text/calendar"),
    ".changes.csv": ("changes.csv", "text/csv"),
}
"""A result's files, by the ending of their address; ``.yaml`` is its scenario."""
_PLAN_ONLY = (".ics", ".changes.csv")
_CHOICES = {
    "objective": {
        "cost": "least cost",
        "tokens": "most tokens within the budget",
        "carbon": "least greenhouse gas",
        "time": "training finished soonest",
    },
    "against": {
        "": "–",
        "tokens": "more or fewer tokens (multiples of what is asked)",
        "deadline": "the training deadline (hours)",
        "carbon": "greenhouse gas (kgCO2e)",
    },
    "precision": {"": "as published, or bf16", **{p: p for p in ("fp8", "bf16", "fp4", "int8", "int4")}},
    "profile": {name: name for name in PROFILES},
    "train_method": {
        "pretrain": "from scratch",
        "full": "all weights of a given model",
        "lora": "adapters (LoRA)",
    },
    "volume_unit": form.VOLUMES,
    "term": {"": "–", **form.TERMS},
}
_OPTIONS = {
    "compare": {"sensitivity": ""},
    "plan": {
        "objective": "cost", "time_limit_s": "30", "gap_percent": "1", "against": "tokens", "values": "0.5, 1, 1.5",
        "keep": "", "prices": "",
    },
}  # fmt: skip


_TICKS = {"sensitivity", "keep", "prices"}


@asynccontextmanager
async def _running(app: FastAPI) -> AsyncIterator[None]:
    """Runs end with the service, whatever they are at."""
    yield
    runs: Runs | None = getattr(app.state, "runs", None)
    if runs is not None:
        await asyncio.to_thread(runs.stop)


router = APIRouter(include_in_schema=False, lifespan=_running)


@dataclass(frozen=True)
class _Filled:
    """What stands in the form: fields, the scenario's text, and what is wrong, with the field it is about."""

    verb: Verb
    fields: Mapping[str, str]
    text: str
    problem: str = ""
    at: str = ""
    by_hand: bool = False
    """Whether the text was changed since the fields wrote it, so that they no longer say what it says."""
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> list[int]:
        """Numbers of the hardware rows shown."""
        return form.row_numbers(self.fields)

    @property
    def written(self) -> str:
        """Tells whether the text is as the fields wrote it."""
        return "" if self.by_hand else _digest(self.text)


def _runs(request: Request, service: Service) -> Runs:
    state = request.app.state
    if not hasattr(state, "runs"):
        state.runs = Runs(service.books.folder)
    found: Runs = state.runs
    return found


def _fleet(service: Service) -> form.FleetText:
    """The running fleet under the terms in force now."""
    return form.fleet_text(service.fleet.at(service.now()))


def _digest(text: str) -> str:
    return sha256(text.strip().encode("utf-8", "replace")).hexdigest()


# --- the form ---


async def _form(request: Request, service: ServiceHere, caller: WholeReader, start: str = "") -> Response:
    """The form, filled so that it can be run as it is."""
    verb = _verb(request)

    def fill() -> _Filled:
        first = service.now().date() + timedelta(days=1)
        site = next(iter(service.fleet.sites.values()), None)
        begin = start or {"compare": "serving", "plan": "both"}[verb]
        fields = form.defaults(begin, first, _DAYS[verb], site.timezone if site else "")
        return _Filled(verb, fields, form.scenario_text(fields, _fleet(service)), options=_OPTIONS[verb])

    return _shown(request, service, await asyncio.to_thread(fill))


async def _take(request: Request, service: ServiceHere, caller: WholeReader) -> Response:
    """What the form's buttons do: write the text from the fields, run the fields, or run the text."""
    verb = _verb(request)
    sent = await form_of(request, _FORM_BYTES)
    filled = await asyncio.to_thread(_read, verb, sent, service)
    wants_json = request.headers.get("accept", "").startswith("application/json")
    if wants_json:
        told = {"text": filled.text, "written": filled.written, "problem": filled.problem, "at": filled.at}
        return JSONResponse(told)
    if filled.problem or sent.get("do") == "write":
        return _shown(request, service, filled, 422 if filled.problem else 200)
    runs = _runs(request, service)
    try:
        job = _job(verb, filled)
    except ValidationError as error:
        first = error.errors()[0]
        at, told_ = str(first["loc"][0]) if first["loc"] else "", first["msg"].removeprefix("Value error, ")
        return _shown(request, service, _with(filled, f"{at}: {told_}", at), 422)
    fields = None if filled.by_hand else {**filled.fields}
    try:
        await asyncio.to_thread(runs.keep, job, fields)
        runs.start(job, caller.name, _fleet(service).files)
    except BusyError as error:
        return _shown(request, service, _with(filled, str(error), ""), 429)
    return RedirectResponse(f"/{verb}/{job.id}", 303)


def _read(verb: Verb, sent: Mapping[str, str], service: Service) -> _Filled:
    """The form as it was sent, its text written from the fields unless the text is what is to be run."""
    text = sent.get("text", "").replace("\r\n", "\n")
    by_hand = bool(text.strip()) and _digest(text) != sent.get("written", "")
    options = {name: sent.get(name, "").strip() for name in _OPTIONS[verb]}
    known = {*options, "text", "written", "do"}
    fields = {key: value.strip()[:200] for key, value in sent.items() if key not in known}
    filled = _Filled(verb, fields, text, by_hand=by_hand, options=options)
    fleet = _fleet(service)
    if sent.get("do") == "text":
        try:
            parse(text, fleet.files)
        except ScenarioError as error:
            return _with(filled, str(error), "text")
        return filled
    if by_hand and sent.get("do") != "write":
        told = "the text below was changed by hand: run the text, or write it anew from the fields"
        return _with(filled, told, "text")
    try:
        written = form.scenario_text(fields, fleet)
    except form.FieldError as error:
        return _with(filled, str(error), error.field)
    return _Filled(verb, fields, written, options=options)


def _with(filled: _Filled, problem: str, at: str) -> _Filled:
    return _Filled(filled.verb, filled.fields, filled.text, problem, at, filled.by_hand, filled.options)


def _job(verb: Verb, filled: _Filled) -> Job:
    options: dict[str, Any] = {k: v for k, v in filled.options.items() if v}
    options |= dict.fromkeys(_TICKS & options.keys(), True)
    if verb == "plan":
        options["values"] = tuple(v.strip() for v in filled.options["values"].split(",") if v.strip())
        if not options.get("against"):
            options["values"] = ()
    return Job(verb=verb, scenario=filled.text, **options)


def _shown(request: Request, service: Service, filled: _Filled, status: int = 200, **more: Any) -> Response:
    context = {"title": _TITLES[filled.verb], "run": None, "identity": "", "result": None, **more}
    return page(
        request,
        "planning.html",
        status=status,
        verb=filled.verb,
        f=filled,
        lists=_lists(),
        choices=_CHOICES,
        starts=form.STARTS,
        most_rows=form.MOST_ROWS,
        fleet=list(service.fleet.pools),
        earlier=_runs(request, service).newest(filled.verb),
        **context,
    )


@cache
def _lists() -> dict[str, list[str]]:
    """Names a field offers."""
    return {
        "models": [name for name in models() if not name.startswith("pertoken/")],
        "gpus": list(gpus()),
        "tariffs": list(tariffs()),
    }


@router.get("/planning.json")
async def catalogue(caller: WholeReader) -> Response:
    """Longer lists for the form's script: prices seen by GPU and term, API offers, time zones."""

    def read() -> bytes:
        apis = [f"{provider}/{model}" for provider, model in api_models()]
        found = {"offers": form.offers(), "apis": apis, "zones": sorted(available_timezones())}
        return json.dumps(found).encode()

    headers = {"Cache-Control": "private, max-age=3600"}
    return Response(await asyncio.to_thread(read), media_type="application/json", headers=headers)


# --- a run ---


async def _result(request: Request, service: ServiceHere, caller: WholeReader, address: str) -> Response:
    """A run: how far it is, what it found, or a file of it; what is not there any more is run again."""
    verb, (identity, dot, ending) = _verb(request), address.partition(".")
    runs = _runs(request, service)
    job, fields = await asyncio.to_thread(_asked, runs, verb, identity)
    if dot + ending == ".yaml":
        text = f"# {job.command}\n{job.scenario}"
        return Response(text, media_type="application/yaml", headers=_named(job, ".yaml"))
    run = runs.get(identity)
    if dot:
        return await asyncio.to_thread(_twin, run, job, dot + ending)
    filled = await asyncio.to_thread(_refilled, service, job, fields)
    if run is None:
        try:
            run = runs.start(job, caller.name, _fleet(service).files)
        except BusyError as error:
            return _shown(request, service, _with(filled, str(error), ""), 429, identity=identity)
    found = await asyncio.to_thread(_page_of, run)
    return _shown(
        request, service, filled, title=found["title"] if found else _TITLES[verb], run=run,
        identity=identity, result=found, place=runs.place(run), admin=caller.may("admin"),
    )  # fmt: skip


def _asked(runs: Runs, verb: Verb, identity: str) -> tuple[Job, dict[str, str] | None]:
    found = runs.asked(identity)
    if found is None or found[0].verb != verb:
        raise HTTPException(404, f"nobody asked this of {_TITLES[verb]} here, or too long ago: start anew")
    return found


def _refilled(service: Service, job: Job, fields: dict[str, str] | None) -> _Filled:
    """The form of a run: its fields, if they still say what was run, else its text alone."""
    options = {k: "" if v is False else "on" if v is True else str(v) for k, v in job.model_dump().items()}
    options["values"] = ", ".join(f"{v:g}" for v in job.values)
    options |= {"time_limit_s": f"{job.time_limit_s:g}", "gap_percent": f"{job.gap_percent:g}"}
    by_hand = fields is None
    if fields is not None:
        try:
            by_hand = form.scenario_text(fields, _fleet(service)) != job.scenario
        except form.FieldError:
            by_hand = True
    return _Filled(job.verb, {} if by_hand else fields or {}, job.scenario, by_hand=by_hand, options=options)


def _page_of(run: Run) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((run.folder / PAGE).read_text(encoding="utf-8"))
    except OSError:
        return None
    return found


def _twin(run: Run | None, job: Job, ending: str) -> Response:
    if ending not in _TWINS or (ending in _PLAN_ONLY and job.verb != "plan"):
        known = [e for e in _TWINS if job.verb == "plan" or e not in _PLAN_ONLY]
        raise HTTPException(404, f"a run ends in one of {', '.join([*known, '.yaml'])}, or in nothing")
    name, kind = _TWINS[ending]
    try:
        content = (run.folder / name).read_bytes() if run else b""
    except OSError:
        content = b""
    if not content:
        raise HTTPException(
            404, "there is no result of it yet, or not any more: open the run, which makes it again"
        )
    return Response(content, media_type=kind, headers=_named(job, ending))


def _named(job: Job, ending: str) -> dict[str, str]:
    return {"Content-Disposition": f'inline; filename="{job.verb}-{job.id[:12]}{ending}"'}


async def _figure(
    request: Request, service: ServiceHere, caller: WholeReader, identity: str, address: str
) -> Response:
    """A figure of a run as Vega-Lite or PNG."""
    number, dot, ending = address.partition(".")

    def draw() -> Response:
        run = _runs(request, service).get(identity)
        found = _page_of(run) if run and run.job.verb == _verb(request) else None
        figures = [b for b in found["blocks"] if b["kind"] == "figure"] if found else []
        if not (number.isascii() and number.isdigit() and len(number) < 4 and int(number) < len(figures)):
            raise HTTPException(
                404, "there is no such figure, or not any more: open the run, which makes it again"
            )
        spec = figures[int(number)]["spec"]
        if dot + ending == ".vl.json":
            return Response(json.dumps(spec), media_type="application/json")
        if dot + ending == ".png":
            return Response(png(spec), media_type="image/png")
        raise HTTPException(404, "a figure of a run ends in .vl.json or .png")

    return await asyncio.to_thread(draw)


async def _progress(
    request: Request, service: ServiceHere, caller: WholeReader, identity: str, after: int = 0
) -> Response:
    """How far a run is: its state and the steps after those known."""
    runs = _runs(request, service)
    run = runs.get(identity)
    if run is None or run.job.verb != _verb(request):
        raise HTTPException(404, "there is no such run now")
    steps = run.steps[max(after, 0) :]
    return JSONResponse({"state": run.state, "place": runs.place(run), "steps": steps})


async def _cancel(request: Request, service: ServiceHere, caller: WholeReader, identity: str) -> Response:
    """Stop a run; a plan keeps the best it has. For who began it, and for an admin."""
    runs = _runs(request, service)
    run = runs.get(identity)
    if run is None or run.job.verb != _verb(request):
        raise HTTPException(404, "there is no such run now")
    if run.owner != caller.name and not caller.may("admin"):
        raise HTTPException(403, "a run is stopped by who began it, or by an admin")
    await asyncio.to_thread(runs.cancel, run)
    await asyncio.to_thread(runs.wait, run, 3.0)
    return RedirectResponse(f"/{run.job.verb}/{identity}", 303)


async def _again(request: Request, service: ServiceHere, caller: WholeReader, identity: str) -> Response:
    """Run once more what was stopped or failed."""
    runs, verb = _runs(request, service), _verb(request)
    job, _ = await asyncio.to_thread(_asked, runs, verb, identity)
    try:
        runs.start(job, caller.name, _fleet(service).files)
    except BusyError as error:
        raise HTTPException(429, str(error), {"Retry-After": "60"}) from error
    return RedirectResponse(f"/{verb}/{identity}", 303)


@router.post("/plan/{identity}/keep")
async def keep(request: Request, service: ServiceHere, caller: WholeAdmin, identity: str) -> Response:
    """Put a plan's book into the service's ledger, so that what really happens can be held against it."""
    sent = await form_of(request)
    book = plan_book.book_named(sent.get("name", "").strip())
    run = _runs(request, service).get(identity)

    def put() -> None:
        if run is None or not (run.folder / BOOK).is_file():
            raise InputError("there is no plan to keep: open the run, which makes it again")
        usage, rates = plan_book.from_body(
            (run.folder / BOOK).read_bytes(), "application/vnd.apache.arrow.stream", book
        )
        usage = usage.set_column(usage.schema.get_field_index("book"), "book", [[book] * len(usage)])
        service.books.ledger.put_book(book, usage, rates)
        run.kept = book

    await asyncio.to_thread(put)
    return RedirectResponse(f"/plan/{identity}#keep", 303)


def _verb(request: Request) -> Verb:
    return "plan" if request.url.path.split("/")[1] == "plan" else "compare"


def _add(path: str, answer: Callable[..., Any], method: str) -> None:
    for verb in _TITLES:
        router.add_api_route(f"/{verb}{path}", answer, methods=[method])


_add("", _form, "GET")
_add("", _take, "POST")
_add("/{identity}/figure/{address}", _figure, "GET")
_add("/{identity}/progress", _progress, "GET")
_add("/{identity}/cancel", _cancel, "POST")
_add("/{identity}/again", _again, "POST")
_add("/{address}", _result, "GET")
