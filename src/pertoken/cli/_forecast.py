"""Verbs that ask what tokens would cost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pertoken.cli._terminal import (
    CsvFile,
    HtmlFile,
    Json,
    PngFile,
    ScenarioFile,
    app,
    check_writable,
    fraction_of,
    gap_over_time,
    progress_bar,
    show,
    show_rich,
    write_file,
)
from pertoken.errors import InputError


@app.command()
def compare(
    scenario: ScenarioFile,
    sensitivity: Annotated[bool, typer.Option("--sensitivity", help="Move each input by ±20 %.")] = False,
    tokens: Annotated[str, typer.Option(help="Also price extra tokens, such as +50%.")] = "",
    as_json: Json = False,
    html: HtmlFile = None,
    csv: CsvFile = None,
    png: PngFile = None,
) -> None:
    """What a million tokens cost on every pool of a scenario, each option alone."""
    from pertoken.report.compare import compare as run

    extra = fraction_of(tokens, "--tokens") if tokens else None
    check_writable(html, csv, png)
    with progress_bar("comparing") as progress:
        found = run(scenario, sensitivity=sensitivity, extra_tokens=extra, progress=progress)
    for path, write in ((html, found.to_html), (csv, found.to_csv), (png, found.to_png)):
        write_file(path, write)
    show(found.to_dict() if as_json else found, as_json)


@app.command()
def quick(
    usd_per_gpu_hour: Annotated[float, typer.Option(help="Price of one GPU for one hour.")],
    tokens_per_second_per_gpu: Annotated[float, typer.Option(help="Output tokens per second of one GPU.")],
    as_json: Json = False,
) -> None:
    """The vendor's equation, and what it leaves out."""
    from pertoken.report.quick import quick as run

    found = run(usd_per_gpu_hour, tokens_per_second_per_gpu)
    show(found.to_dict() if as_json else found, as_json)


@app.command()
def catalog(
    kind: Annotated[str, typer.Argument(help="gpus, models, tariffs or prices.", show_default=False)],
    name: Annotated[str, typer.Argument(help="One of them; empty: the list.")] = "",
    as_json: Json = False,
) -> None:
    """Facts we calculate with, each with its sources and date."""
    from pertoken.report.catalog import catalog as run

    table, rows = run(kind, name or None)
    if as_json:
        show(rows, True)
    else:
        show_rich(table)


@app.command()
def predict(
    model: Annotated[str, typer.Option(help="Model name, or the path of a config.json.")],
    gpu: Annotated[str, typer.Option(help="GPU name.")],
    input_tokens: Annotated[float, typer.Option(help="Prompt tokens per request.")],
    output_tokens: Annotated[float, typer.Option(help="Tokens generated per request.")],
    concurrency: Annotated[float, typer.Option(help="Requests in flight.")] = 1.0,
    cached_input_tokens: Annotated[
        float, typer.Option(help="Prompt tokens that hit the prefix cache.")
    ] = 0.0,
    gpus: Annotated[int, typer.Option(help="GPUs of one replica; 0: the fewest that fit.")] = 0,
    precision: Annotated[str, typer.Option(help="bf16, fp8, fp4, int8, int4; empty: the checkpoint's.")] = "",
    engine: Annotated[str, typer.Option(help="vllm, sglang, trtllm, ...")] = "vllm",
    tp: Annotated[int, typer.Option(help="Tensor parallel; 0: chosen.")] = 0,
    pp: Annotated[int, typer.Option(help="Pipeline parallel; 0: chosen.")] = 0,
    ep: Annotated[int, typer.Option(help="Expert parallel; 0: chosen.")] = 0,
    dp: Annotated[int, typer.Option(help="Attention data parallel; 0: chosen.")] = 0,
    points: Annotated[Path | None, typer.Option(help="CSV of your own measured points.")] = None,
    predictor: Annotated[
        str, typer.Option(help="roofline, measured (needs --points) or kernels (NVIDIA, extra [kernels]).")
    ] = "",
    task: Annotated[
        str, typer.Option(help="A benchmark's task and its stack: lm-arena-chat, gpqa, ...")
    ] = "",
    curve: Annotated[bool, typer.Option("--curve", help="The throughput-interactivity front.")] = False,
    usd_per_gpu_hour: Annotated[
        float | None, typer.Option(help="Price for --curve; empty: catalogue.")
    ] = None,
    as_json: Json = False,
    html: HtmlFile = None,
    png: PngFile = None,
) -> None:
    """What a model does on a GPU: tokens/s, latency, watts, each with its interval."""
    from pertoken.report import predict as run

    if not curve:
        if html or png or usd_per_gpu_hour is not None:
            raise InputError("--html, --png and --usd-per-gpu-hour go with --curve")
        degrees = {"tp": tp, "pp": pp, "ep": ep, "dp": dp}
        answer = run.predict_point(
            model, gpu, gpus=gpus, precision=precision, engine=engine, input_tokens=input_tokens,
            output_tokens=output_tokens, concurrency=concurrency, cached_input_tokens=cached_input_tokens,
            points=points, predictor=predictor, task=task, **degrees,
        )  # fmt: skip
        show(answer.to_dict(), True) if as_json else show_rich(answer)
        return
    if points is not None or task or predictor not in ("", "roofline"):
        raise InputError("--points, --predictor and --task go with one operating point, not with --curve")
    front = run.predict_curve(
        model, gpu, gpus=gpus, precision=precision, engine=engine, input_tokens=input_tokens,
        output_tokens=output_tokens, cached_input_tokens=cached_input_tokens, usd_per_gpu_hour=usd_per_gpu_hour,
    )  # fmt: skip
    show(front.to_dict(), True) if as_json else show_rich(front)
    write_file(html, front.to_html)
    write_file(png, front.to_png)


@app.command()
def validate(
    points: Annotated[Path, typer.Argument(help="CSV of measured points.", show_default=False)],
    models: Annotated[
        Path | None, typer.Option(help="Folder of config.json files for models not known.")
    ] = None,
    as_json: Json = False,
) -> None:
    """How far predictions are from measured points: errors, bias, coverage, the worst rows."""
    from pertoken.report.validate import validate as run

    found = run(points, models)
    show(found.to_dict(), True) if as_json else show_rich(found.render())


@app.command()
def simulate(
    scenario: ScenarioFile,
    workload: Annotated[str, typer.Option(help="Serving workload; empty: the first.")] = "",
    pool: Annotated[str, typer.Option(help="GPU pool; empty: the first that can.")] = "",
    trace: Annotated[
        Path | None, typer.Option(help="Requests with arrival times (CSV or JSON lines).")
    ] = None,
    replicas: Annotated[int, typer.Option(help="0: as many as compare would hold.")] = 0,
    find: Annotated[bool, typer.Option("--find", help="The fewest replicas that keep the SLO.")] = False,
    days: Annotated[int, typer.Option(help="Days of generated traffic, where there is no trace.", min=1)] = 7,
    seed: Annotated[int, typer.Option(help="Of generated traffic.")] = 0,
    as_json: Json = False,
    html: HtmlFile = None,
) -> None:
    """Replay traffic request by request: latency percentiles, SLO, waste, cost in SLO."""
    from pertoken.report.replay import replay

    if find and replicas:
        raise InputError("--find looks for the number that --replicas gives: use one of them")
    with progress_bar("simulating") as progress:
        found = replay(
            scenario, workload=workload, pool=pool, trace=trace, replicas=replicas, find=find, days=days, seed=seed,
            progress=progress,
        )  # fmt: skip
    show(found.to_dict(), True) if as_json else show_rich(found)
    write_file(html, found.to_html)


@app.command()
def plan(
    scenario: ScenarioFile,
    objective: Annotated[str, typer.Option(help="cost, tokens, carbon or time.")] = "cost",
    gap: Annotated[
        float, typer.Option(help="Distance from the bound that is good enough.", min=0, max=1)
    ] = 0.01,
    time_limit: Annotated[float, typer.Option(help="Seconds for the solver.", min=1)] = 120.0,
    under: Annotated[
        str, typer.Option(help="Plan against these cases too, with regret: low,expected,high.")
    ] = "",
    fewest_switches: Annotated[
        bool, typer.Option("--fewest-switches", help="Among plans of that cost.")
    ] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Machines that are there stay and are paid for.")
    ] = False,
    savings: Annotated[bool, typer.Option(help="Also solve what the plan is compared with.")] = True,
    prices: Annotated[
        bool, typer.Option("--prices", help="Also shadow prices: of tokens, GPUs, kW, hours.")
    ] = False,
    frontier: Annotated[
        str, typer.Option(help="Also least cost along tokens=1,1.5, deadline=24,48 or carbon=…")
    ] = "",
    as_json: Json = False,
    html: HtmlFile = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write the schedule by hour as CSV.")] = None,
    calendar: Annotated[
        Path | None,
        typer.Option("--calendar", help="Write when what runs: .ics for people, .csv for CronJobs."),
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", help="Write its book to this ledger file.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Put its book beside the actual one of this service's folder."),
    ] = None,
    to: Annotated[
        str, typer.Option("--to", help="Put its book into the ledger of the service at this URL.")
    ] = "",
    token_file: Annotated[Path | None, typer.Option(help="File with an admin token, for --to.")] = None,
) -> None:
    """The cheapest mix of GPUs, sites, contracts and hours within budget and SLO."""
    from pertoken.report.plan import frontier_of, objective_named, run

    goal = objective_named(objective)
    against, values = frontier_of(frontier)
    cases = [case.strip() for case in under.split(",") if case.strip()]
    for case in cases:
        if case not in ("low", "expected", "high"):
            raise InputError(f"--under {case!r}: of low, expected, high")
    check_writable(html, csv, calendar, ledger)
    put = _putting(data, to, token_file)
    with gap_over_time() as progress:
        found = run(
            scenario, objective=goal, gap=gap, time_limit_s=time_limit, under=cases, with_savings=savings,
            fewest_switches=fewest_switches, keep=keep, with_prices=prices, against=against, values=values,
            progress=progress,
        )  # fmt: skip
    for path, write in (
        (html, found.write_html),
        (csv, found.write_csv),
        (calendar, found.write_calendar),
        (ledger, found.write_ledger),
    ):
        write_file(path, write)
    put(found.book, found.rows)
    show(found.to_dict() if as_json else found.as_text(), as_json)


def _putting(data: Path | None, to: str, token_file: Path | None) -> Callable[[str, Callable[[], Any]], None]:
    """Puts a book's rows where the options say; what is wrong with these is told before the work is done."""
    if data is None and not to and token_file is None:
        return lambda book, rows: None
    from pertoken.web.serve import put_book, remote

    places = [place for place in (data, remote(to, token_file) if to or token_file else None) if place]

    def put(book: str, rows: Callable[[], Any]) -> None:
        for place in places:
            put_book(place, book, *rows())
            sys.stderr.write(f"put {book} into the ledger of {place}\n")

    return put


@app.command()
def schema() -> None:
    """JSON Schema of a scenario file, for editors."""
    from pertoken.scenario import json_schema

    show(json_schema(), True)
