"""A run of `compare` or `plan` from a scenario somebody sent: what it is, and its results as files in a folder.

A plan is written as soon as there is one; what it saves and its frontier follow and are written over it, so that
whoever stops the run keeps what was found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from pertoken.errors import InfeasibleError, InputError
from pertoken.report._page import Block, Figure, Table, Text, write_whole
from pertoken.scenario import Scenario, parse

if TYPE_CHECKING:
    from pertoken.plan.schedule import Progress
    from pertoken.report.compare import Comparison
    from pertoken.report.plan import Planned

PAGE, BOOK = "page.json", "book.arrow"
_DRAWN_BYTES = 3 << 20
"""Size of a figure's specification above which a browser had better not be asked to draw it."""
_TILES = 4
"""Options of a workload shown large, the cheapest."""
_LATER = ("keep", "prices")
Tell = Callable[[Mapping[str, Any]], None]


class Job(BaseModel):
    """What is run: a verb, its options, and the scenario's text."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    verb: Literal["compare", "plan"]
    scenario: Annotated[str, StringConstraints(min_length=1, max_length=1 << 16)]
    sensitivity: bool = False
    """compare: also move each input by ±20 %."""
    objective: Literal["cost", "tokens", "carbon", "time"] = "cost"
    gap_percent: Annotated[float, Field(ge=0, lt=100)] = 1.0
    time_limit_s: Annotated[float, Field(ge=1, le=300)] = 30.0
    """plan: seconds for the solver."""
    against: Literal["", "tokens", "carbon", "deadline"] = ""
    """plan: also the least cost at each of `values` of this; empty: not asked."""
    values: Annotated[tuple[float, ...], Field(max_length=12)] = ()
    keep: bool = False
    """plan: machines that are there stay and are paid for."""
    prices: bool = False
    """plan: also shadow prices."""

    @property
    def id(self) -> str:
        """SHA-256 of all of it: the same question has the same address."""
        asked = self.model_dump(mode="json")
        # What came later counts only where it is asked for: addresses that were given out stay.
        asked = {key: value for key, value in asked.items() if value or key not in _LATER}
        text = json.dumps(asked, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()

    @property
    def command(self) -> str:
        """The same on the command line, the scenario in a file."""
        words = ["pertoken", self.verb, "scenario.yaml"]
        if self.verb == "compare":
            words += ["--sensitivity"] if self.sensitivity else []
        else:
            words += ["--objective", self.objective, "--gap", f"{self.gap_percent / 100:g}"]
            words += ["--time-limit", f"{self.time_limit_s:g}"]
            words += [f"--{name}" for name in _LATER if getattr(self, name)]
            if self.against:
                words += ["--frontier", f"{self.against}={','.join(f'{v:g}' for v in self.values)}"]
        return " ".join(words)


def run(job: Job, files: Mapping[str, Path], folder: Path, tell: Tell) -> None:
    """Run a job; its results are files in `folder`.

    Parameters: files: those the scenario may name; tell: called with what is being done and how far it is. Raises
    PerTokenError with the reason where there is no result.
    """
    scenario = parse(job.scenario, files)
    if job.verb == "compare":
        _compare(job, scenario, folder, tell)
    else:
        _plan(job, scenario, folder, tell)


def _compare(job: Job, scenario: Scenario, folder: Path, tell: Tell) -> None:
    from pertoken.report._compare_page import blocks
    from pertoken.report._compare_table import usd
    from pertoken.report.compare import compare

    def progress(share: float) -> None:
        tell({"step": "comparing", "share": round(share, 3)})

    found: Comparison = compare(scenario, sensitivity=job.sensitivity, progress=progress)
    tiles = []
    for workload in found.workloads:
        running = [option for option in workload.options if not option.refused]
        unit = "USD per M trained tokens" if workload.kind == "training" else "USD per M tokens"
        tiles += [
            (
                f"{workload.name} on {o.facts['pool']}",
                usd(o.headline),
                unit,
                "cheapest alone" if o is running[0] else "",
            )
            for o in running[:_TILES]
        ]
    horizon = scenario.horizon
    subtitle = f"{horizon.days} days from {horizon.start}, {horizon.timezone}. All money is USD; a month is 730 hours."
    write_whole(folder / "result.json", json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    found.to_csv(folder / "table.csv")
    _write_page(folder, f"What a token costs: {scenario.name}", subtitle, tiles, blocks(found))


def _plan(job: Job, scenario: Scenario, folder: Path, tell: Tell) -> None:
    from pertoken.plan._duals import prices_of
    from pertoken.plan.schedule import frontier
    from pertoken.report.plan import AGAINST, beside_rivals
    from pertoken.report.plan import run as plan

    def progress(step: Progress) -> None:
        tell(asdict(step))

    gap = job.gap_percent / 100
    planned = plan(
        scenario, objective=job.objective, gap=gap, time_limit_s=job.time_limit_s, with_savings=False,
        keep=job.keep, progress=progress,
    )  # fmt: skip
    _write_plan(planned, folder)
    tell({"step": "a plan is there", "first": True})
    if planned.found.status == "stopped":
        return
    if job.objective == "cost":
        tell({"step": "what it saves"})
        planned = beside_rivals(planned, time_limit_s=job.time_limit_s)
        _write_plan(planned, folder)
    if job.prices:
        tell({"step": "what one more of each would save"})
        prices = prices_of(planned.found, time_limit_s=job.time_limit_s)
        planned = replace(planned, prices=prices)
        _write_plan(planned, folder)
    if job.against:
        tell({"step": f"least cost against {job.against}"})
        made = frontier(planned.found, job.against, job.values, gap=gap, time_limit_s=job.time_limit_s)
        points = [(value, None if point is None else point.cost_usd) for value, point in made]
        planned = replace(planned, against=AGAINST[job.against], frontier=points)
        _write_plan(planned, folder)


def _write_plan(planned: Planned, folder: Path) -> None:
    from pertoken.report._compare_table import usd
    from pertoken.report._plan_page import blocks
    from pertoken.report._plan_table import within_gap
    from pertoken.report.plan_book import to_body

    horizon, found = planned.scenario.horizon, planned.found
    tiles = [
        ("Cost over the horizon", usd(planned.cost_usd), "USD", ""),
        ("Cost of an average month", usd(planned.usd_per_month), "USD", "730 hours"),
    ]
    tiles += [
        (
            f"Tokens of {w.name}",
            usd(w.usd_per_mtok),
            "USD per M tokens",
            "with its share of idle and overheads",
        )
        for w in planned.workloads
    ]
    known = [
        a.cost_usd
        for a in planned.alternatives
        if a.cost_usd is not None and a.name.startswith("best single")
    ]
    if known:
        saved = usd(known[0] - planned.cost_usd)
        note = "no more than the gap" if within_gap(planned, known[0]) else ""
        tiles.append(("Saved against the best single option", saved, "USD", note))
    if found.gap is not None:
        tiles.append(
            ("Above the best possible by at most", f"{found.gap:.2%}", "", "proven by the solver's bound")
        )
    planned.write_json(folder / "result.json")
    planned.write_csv(folder / "table.csv")
    planned.write_calendar(folder / "calendar.ics")
    planned.write_calendar(folder / "changes.csv")
    part = folder / f".{BOOK}.part"
    part.write_bytes(to_body(found.usage_rows(planned.book), found.rate_rows()))
    part.replace(folder / BOOK)
    subtitle = f"{horizon.days} days from {horizon.start}, {horizon.timezone}. All money is USD."
    _write_page(folder, f"The plan: {planned.scenario.name}", subtitle, tiles, blocks(planned))


def _write_page(
    folder: Path, title: str, subtitle: str, tiles: Sequence[tuple[str, ...]], blocks: Sequence[Block]
) -> None:
    """What a page shows, as JSON; figures that no browser should be asked to draw are named instead."""
    shown = []
    for block in blocks:
        if isinstance(block, Figure) and len(json.dumps(block.spec)) > _DRAWN_BYTES:
            told = "It has more points than a browser should draw: ask for fewer days, or take the CSV."
            block = Text("", [f"{block.caption} {told}"])
        elif isinstance(block, Figure):
            block = Figure(block.caption, _fluid(block.spec))
        kind = {Text: "text", Table: "table", Figure: "figure"}[type(block)]
        shown.append({"kind": kind, **asdict(block)})
    page = {"title": title, "subtitle": subtitle, "tiles": list(tiles), "blocks": shown}
    write_whole(folder / PAGE, json.dumps(page, ensure_ascii=False, allow_nan=False))


def _fluid(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """As wide as the page, where the figure is one view; several beside or below each other keep their width."""
    if not isinstance(spec.get("width"), int) or "encoding" not in spec:
        return spec
    height = spec.get("height")
    if isinstance(height, dict):
        # A height in steps cannot be fitted to: the same in pixels.
        field = spec["encoding"]["y"]["field"]
        height = height["step"] * len({row[field] for row in spec["data"]["values"]})
    return {
        **spec,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
    }


def why(error: Exception) -> dict[str, Any]:
    """Why there is no result; for a plan that cannot be, also what would free it, one row per way."""
    if isinstance(error, MemoryError):
        return {"problem": "it needs more memory than a run has here: ask for fewer days, pools or workloads"}
    causes = getattr(error, "causes", ()) if isinstance(error, InfeasibleError) else ()
    return {"problem": str(error), "causes": [asdict(cause) for cause in causes]}


def job_named(text: str, digest: str) -> Job:
    """The job that was kept as JSON under its hash. Raises InputError where it is not the one."""
    try:
        job = Job.model_validate_json(text)
    except ValueError as error:
        raise InputError("what is kept under this address is no run") from error
    if job.id != digest:
        raise InputError("what is kept under this address is another run")
    return job
