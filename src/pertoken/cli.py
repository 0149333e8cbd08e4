"""The command `pertoken`: one thin function per verb; all work is in the floors below."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from pertoken import __version__
from pertoken.errors import InputError, PerTokenError

app = typer.Typer(
    name="pertoken",
    help="What does a token cost? Compute, energy and infrastructure in one figure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ScenarioFile = Annotated[Path, typer.Argument(help="Scenario file (YAML).", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HtmlFile = Annotated[Path | None, typer.Option("--html", help="Write one self-contained page.")]
CsvFile = Annotated[Path | None, typer.Option("--csv", help="Write the table as CSV.")]
PngFile = Annotated[Path | None, typer.Option("--png", help="Write the headline figure.")]


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

    extra = _fraction(tokens, "--tokens") if tokens else None
    _check_writable(html, csv, png)
    with _progress("comparing") as progress:
        found = run(scenario, sensitivity=sensitivity, extra_tokens=extra, progress=progress)
    for path, write in ((html, found.to_html), (csv, found.to_csv), (png, found.to_png)):
        _write(path, write)
    _print(found.to_dict() if as_json else found, as_json)


@app.command()
def quick(
    usd_per_gpu_hour: Annotated[float, typer.Option(help="Price of one GPU for one hour.")],
    tokens_per_second_per_gpu: Annotated[float, typer.Option(help="Output tokens per second of one GPU.")],
    as_json: Json = False,
) -> None:
    """The vendor's equation, and what it leaves out."""
    from pertoken.report.quick import quick as run

    found = run(usd_per_gpu_hour, tokens_per_second_per_gpu)
    _print(found.to_dict() if as_json else found, as_json)


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
        _print(rows, True)
    else:
        _print_rich(table)


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
        _print(answer.to_dict(), True) if as_json else _print_rich(answer)
        return
    if points is not None or task or predictor not in ("", "roofline"):
        raise InputError("--points, --predictor and --task go with one operating point, not with --curve")
    front = run.predict_curve(
        model, gpu, gpus=gpus, precision=precision, engine=engine, input_tokens=input_tokens,
        output_tokens=output_tokens, cached_input_tokens=cached_input_tokens, usd_per_gpu_hour=usd_per_gpu_hour,
    )  # fmt: skip
    _print(front.to_dict(), True) if as_json else _print_rich(front)
    _write(html, front.to_html)
    _write(png, front.to_png)


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
    _print(found.to_dict(), True) if as_json else _print_rich(found.render())


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
    with _progress("simulating") as progress:
        found = replay(
            scenario, workload=workload, pool=pool, trace=trace, replicas=replicas, find=find, days=days, seed=seed,
            progress=progress,
        )  # fmt: skip
    _print(found.to_dict(), True) if as_json else _print_rich(found)
    _write(html, found.to_html)


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
    _check_writable(html, csv, calendar, ledger)
    put = _putting(data, to, token_file)
    with _gap_over_time() as progress:
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
        _write(path, write)
    put(found.book, found.rows)
    _print(found.to_dict() if as_json else found.as_text(), as_json)


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

    _print(json_schema(), True)


DataFolder = Annotated[Path, typer.Option("--data", help="Folder of journal and ledger.", show_default=False)]
FleetFile = Annotated[Path | None, typer.Option("--fleet", help="Fleet file, where no service runs.")]
token = typer.Typer(help="Tokens that may send to and ask of a service.", no_args_is_help=True)
app.add_typer(token, name="token")


@app.command()
def serve(
    fleet: Annotated[Path, typer.Option(help="Fleet file (YAML).", show_default=False)],
    data: DataFolder,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback tokens are asked for.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8700,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    require_tokens: Annotated[
        bool, typer.Option("--require-tokens", help="Ask for tokens on loopback too.")
    ] = False,
    allow_host: Annotated[list[str], typer.Option(help="Further name it is called by without tokens.")] = [],  # noqa: B006
    keep_days: Annotated[int, typer.Option(min=2, max=3660, help="Days whose records are kept.")] = 400,
) -> None:
    """Meter and ledger of what happens: scrape, take what is sent, close every hour, answer."""
    from pertoken.web.serve import Bind
    from pertoken.web.serve import serve as run

    run(fleet, data, Bind(host, port, tls_cert, tls_key, require_tokens, keep_days, tuple(allow_host)))


@app.command()
def close(
    data: DataFolder,
    start: Annotated[
        str, typer.Option("--from", help="First hour, such as 2026-11-24T00:00Z.", show_default=False)
    ],
    end: Annotated[str, typer.Option("--to", help="Hour after the last.", show_default=False)],
    fleet: FleetFile = None,
    as_json: Json = False,
) -> None:
    """Turn hours into costs again, at the rates in force at each."""
    from pertoken.web.serve import close as run

    found = run(data, fleet, _moment(start, "--from"), _moment(end, "--to"))
    lines = [f"{found['hours']} hours closed", *(f"open: {h}: {why}" for h, why in found["unpriced"].items())]
    if found["unmetered"]:
        lines.insert(1, f"{found['unmetered']} hours left out: nothing was metered before the others")
    _print(found if as_json else "\n".join(lines), as_json)
    if found["unpriced"]:
        raise typer.Exit(1)


@app.command()
def doctor(
    data: DataFolder,
    fleet: FleetFile = None,
    hours: Annotated[int, typer.Option(min=1, max=8784, help="Hours to look at.")] = 24,
    as_json: Json = False,
) -> None:
    """What is wrong with the books: silent sources, unpriced usage, sums that disagree, the journal's state."""
    from pertoken.report.doctor import told
    from pertoken.web.serve import diagnose

    found = diagnose(data, fleet, hours)
    _print(found if as_json else told(found), as_json)
    if any(one["severity"] == "wrong" for one in found["complaints"]):
        raise typer.Exit(1)


@app.command()
def budget(
    data: DataFolder,
    fleet: FleetFile = None,
    tenant: Annotated[str, typer.Option(help="Budgets of this tenant alone.")] = "",
    as_json: Json = False,
) -> None:
    """Budgets: spent, burn rate, forecast with its interval, when they run out; exit code 1 where a hard one has."""
    from pertoken.report._budget_text import told
    from pertoken.web.charged import budgets

    found = budgets(data, fleet, tenant)
    _print(found if as_json else told(found, tenant), as_json)
    if any(one["hard"] and one["spent_fraction"] >= 1 for one in found):
        raise typer.Exit(1)


@app.command()
def statement(
    data: DataFolder,
    tenant: Annotated[str, typer.Option(help="Whose.", show_default=False)],
    month: Annotated[str, typer.Option(help="Such as 2026-11.", show_default=False)],
    fleet: FleetFile = None,
    spread_idle: Annotated[
        bool | None,
        typer.Option(help="With or without its part of idle; empty: as the fleet says.", show_default=False),
    ] = None,
    as_json: Json = False,
    html: HtmlFile = None,
    csv: CsvFile = None,
) -> None:
    """What a tenant is charged for a month, line by line; all tenants and what is nobody's add up to the ledger."""
    from pertoken.web.charged import statement as run

    _check_writable(html, csv)
    found = run(data, fleet, tenant, month, spread_idle)
    _write(html, found.to_html)
    _write(csv, found.to_csv)
    _print(found.to_dict() if as_json else found, as_json)


@app.command()
def report(
    data: DataFolder,
    book: Annotated[list[str], typer.Option(help="Two books: actual and plan:NAME.", show_default=False)],
    by: Annotated[str, typer.Option(help="pool, model, tenant, or several with commas.")] = "pool,model",
    plan: Annotated[
        Path | None, typer.Option(help="Ledger file that holds the plan, if not --data's.")
    ] = None,
    start: Annotated[str, typer.Option("--from", help="First hour; default: what both books have.")] = "",
    end: Annotated[str, typer.Option("--to", help="Hour after the last.")] = "",
    as_json: Json = False,
) -> None:
    """Forecast against actual: the difference in USD, split into price, volume, efficiency and mix."""
    from pertoken.web.serve import report as run

    first, last = (
        _moment(text, option) if text else None for text, option in ((start, "--from"), (end, "--to"))
    )
    found = run(data, book, by.split(","), first, last, plan)
    _print(found.to_dict() if as_json else found, as_json)


@app.command()
def reconcile(
    data: DataFolder,
    bill: Annotated[Path, typer.Option(help="CSV with pool, usd and perhaps component.", show_default=False)],
    start: Annotated[str, typer.Option("--from", help="First hour of the bill.", show_default=False)],
    end: Annotated[str, typer.Option("--to", help="Hour after its last.", show_default=False)],
    tolerance: Annotated[str, typer.Option(help="Share a line may differ by.")] = "1%",
    as_json: Json = False,
) -> None:
    """Does what happened add up to the bill?"""
    from pertoken.web.serve import reconcile as run

    share = abs(_fraction(tolerance, "--tolerance"))
    found = run(data, bill, _moment(start, "--from"), _moment(end, "--to"), share)
    _print(found.to_dict() if as_json else found, as_json)
    if not found.agrees:
        raise typer.Exit(1)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A usage file or a training log.", show_default=False)],
    data: DataFolder,
    format_name: Annotated[
        str,
        typer.Option(
            "--format", help="litellm, openai, langfuse, opencost, pertoken, training.", show_default=False
        ),
    ],
    fleet: FleetFile = None,
    pool: Annotated[str, typer.Option(help="Pool of rows that name none.")] = "",
    name: Annotated[str, typer.Option(help="Source's name in the books; empty: the format's.")] = "",
    model: Annotated[str, typer.Option(help="Of a training run.")] = "",
    tenant: Annotated[str, typer.Option(help="Of a training run.")] = "",
    gpus: Annotated[float, typer.Option(help="Of a training run whose log has none.", min=0)] = 0.0,
    sequence_tokens: Annotated[float, typer.Option(help="Tokens of a sample (Megatron-LM).", min=0)] = 0.0,
    as_json: Json = False,
) -> None:
    """Files of usage and training logs into the journal; a row that was already there counts once."""
    from pertoken.report.imports import FileOf
    from pertoken.web.serve import import_file as run

    what = FileOf(format_name, pool, name, model, tenant, gpus, sequence_tokens)
    with _progress("importing") as progress:
        found = run(data, fleet, file, what, progress)
    text = f"{found['records']} records taken, {found['duplicates']} already there, {found['refused']} rows refused"
    _print(found if as_json else "\n".join([text, *found["why"]]), as_json)
    if found["refused"]:
        raise typer.Exit(1)


@app.command()
def grafana(
    out: Annotated[Path, typer.Option(help="Folder the files go to.")] = Path("grafana"),
) -> None:
    """Grafana's dashboards and Prometheus' alert rules over `GET /metrics` of a service."""
    from pertoken.report.grafana import write

    def run(folder: Path) -> None:
        _print("\n".join(str(path) for path in write(folder)), False)

    _check_writable(out / "pertoken-alerts.yaml")
    _write(out, run)


@token.command("add")
def token_add(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    data: DataFolder,
    scope: Annotated[list[str], typer.Option(help="read, write or admin; may be given again.")],
    tenant: Annotated[str, typer.Option(help="See and write this tenant's rows alone.")] = "",
) -> None:
    """Make a token; it is printed this once."""
    from pertoken.web.tokens import Tokens

    _print(Tokens(data).add(name, tuple(scope), tenant), False)


@token.command("list")
def token_list(data: DataFolder) -> None:
    """Names, scopes and tenants."""
    from pertoken.web.tokens import Tokens

    rows = [f"{t.name}\t{','.join(t.scopes)}\t{t.tenant or '(all)'}\t{t.created}" for t in Tokens(data).all()]
    _print("\n".join(rows), False)


@token.command("remove")
def token_remove(name: Annotated[str, typer.Argument(help="Its name.")], data: DataFolder) -> None:
    """Forget a token: it opens nothing from now on."""
    from pertoken.web.tokens import Tokens

    Tokens(data).remove(name)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        sys.stdout.write(f"pertoken {__version__}\n")
        raise typer.Exit


def main() -> None:
    """Run the command; a PerTokenError is one line on standard error and exit code 2."""
    try:
        code = app(standalone_mode=False)
        if isinstance(code, int) and code:
            raise SystemExit(code)  # what a verb left with typer.Exit
    except _usage_errors() as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stdout.write(f"{error.format_message()}\n")
            raise SystemExit(0) from None
        where = getattr(getattr(error, "ctx", None), "command_path", "") or "pertoken"
        sys.stderr.write(f"pertoken: {' '.join(error.format_message().split())} (see {where} --help)\n")
        raise SystemExit(2) from None
    except typer.Abort:
        raise SystemExit(130) from None
    except PerTokenError as error:
        line = " ".join(str(error).split())
        sys.stderr.write(f"pertoken: {line}\n")
        raise SystemExit(2) from None
    except BrokenPipeError:
        # The reader of our output left, as `head` does; nothing of ours is lost.
        sys.stderr.close()
        raise SystemExit(0) from None
    except OSError as error:
        if error.filename is None:
            raise  # nothing a user could mend by its name
        sys.stderr.write(f"pertoken: {error.filename}: {error.strerror}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("pertoken: interrupted\n")
        raise SystemExit(130) from None


def _moment(text: str, option: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"{option} {text!r} is no time: write 2026-11-24T00:00Z") from error
    if found.tzinfo is None:
        raise InputError(f"{option} {text!r} has no time zone: write {text}Z for UTC")
    return found


def _usage_errors() -> type[Any]:
    """What typer raises on options it does not understand; it keeps the class to itself."""
    return typer.BadParameter.__mro__[2]


def _fraction(text: str, option: str) -> float:
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError as error:
        raise InputError(f"{option} {text!r} is no share: write +50% or 0.5") from error
    if not -1 < value < 1000 or value == 0:
        raise InputError(f"{option} {text!r} must be above -100 % and not 0")
    return value


def _print(found: Any, as_json: bool) -> None:
    if as_json:
        import json

        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return
    text = str(found)
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def _print_rich(renderable: Any) -> None:
    """A rich renderable, in colour on a terminal, 100 columns wide elsewhere."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(renderable)


def _check_writable(*paths: Path | None) -> None:
    """Refuse a file that cannot be written before the work is done, not after."""
    import os

    for path in paths:
        if path is None:
            continue
        folder = path.parent
        while not folder.exists():
            folder = folder.parent
        reason = ""
        if path.is_dir():
            reason = "it is a folder"
        elif not folder.is_dir():
            reason = f"{folder} is not a folder"
        elif not os.access(folder, os.W_OK):
            reason = f"no right to write in {folder}"
        if reason:
            raise InputError(f"cannot write {path}: {reason}")


def _write(path: Path | None, write: Callable[[Path], None]) -> None:
    if path is None:
        return
    try:
        write(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    sys.stderr.write(f"wrote {path}\n")


@contextmanager
def _gap_over_time() -> Iterator[Callable[[Any], None] | None]:
    """On a terminal one line per step of the solver: time, best plan, bound, gap."""
    if not sys.stderr.isatty():
        yield None
        return

    def show(step: Any) -> None:
        best = "no plan yet" if step.best is None else f"best {step.best:,.2f}"
        bound = "" if step.bound is None else f", bound {step.bound:,.2f}"
        gap = "" if step.gap_fraction is None else f", gap {step.gap_fraction:.2%}"
        sys.stderr.write(f"\r\x1b[K{step.elapsed_s:6.1f} s  {step.step}: {best}{bound}{gap}")
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\n")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[float], None]]:
    """A progress bar on a terminal, drawn only once the work has taken a second."""
    if not sys.stderr.isatty():
        yield lambda share: None
        return
    import time

    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=1.0)
    begun = time.monotonic()

    def show(share: float) -> None:
        if not bar.live.is_started and time.monotonic() - begun > 1:
            bar.start()
        bar.update(task, completed=share)

    try:
        yield show
    finally:
        bar.stop()
