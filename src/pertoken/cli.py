"""The command `pertoken`: one thin function per verb; all work is in the floors below."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    with _progress("comparing") as progress:
        found = run(scenario, sensitivity=sensitivity, extra_tokens=extra, progress=progress)
    _print(found.to_dict() if as_json else found, as_json)
    for path, write in ((html, found.to_html), (csv, found.to_csv), (png, found.to_png)):
        _write(path, write)


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
def schema() -> None:
    """JSON Schema of a scenario file, for editors."""
    from pertoken.scenario import json_schema

    _print(json_schema(), True)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        sys.stdout.write(f"pertoken {__version__}\n")
        raise typer.Exit


def main() -> None:
    """Run the command; a PerTokenError is one line on standard error and exit code 2."""
    try:
        app()
    except PerTokenError as error:
        line = " ".join(str(error).split())
        sys.stderr.write(f"pertoken: {line}\n")
        raise SystemExit(2) from None
    except BrokenPipeError:
        # The reader of our output left, as `head` does; nothing of ours is lost.
        sys.stderr.close()
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        sys.stderr.write("pertoken: interrupted\n")
        raise SystemExit(130) from None


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


def _write(path: Path | None, write: Callable[[Path], None]) -> None:
    if path is None:
        return
    try:
        write(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    sys.stderr.write(f"wrote {path}\n")


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
