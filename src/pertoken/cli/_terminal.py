"""What verbs share: the application, options, and what is read from and written to a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from pertoken.errors import InputError

app = typer.Typer(
    name="pertoken",
    help="What does a token cost? Compute, energy and infrastructure in one figure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _png_only(path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() != ".png":
        raise InputError(f"--png {path} writes a PNG: name it {path.with_suffix('.png')}")
    return path


def _folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise InputError(f"--data {path} is a file: give the folder of journal and ledger")
    return path


ScenarioFile = Annotated[Path, typer.Argument(help="Scenario file (YAML).", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HtmlFile = Annotated[Path | None, typer.Option("--html", help="Write one self-contained page.")]
CsvFile = Annotated[Path | None, typer.Option("--csv", help="Write the table as CSV.")]
PngFile = Annotated[Path | None, typer.Option("--png", help="Write the headline figure.", callback=_png_only)]


DataFolder = Annotated[
    Path, typer.Option("--data", help="Folder of journal and ledger.", show_default=False, callback=_folder)
]
FleetFile = Annotated[Path | None, typer.Option("--fleet", help="Fleet file, where no service runs.")]


def moment_of(text: str, option: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"{option} {text!r} is no time: write 2026-11-24T00:00Z") from error
    if found.tzinfo is None:
        raise InputError(f"{option} {text!r} has no time zone: write {found:%Y-%m-%dT%H:%M}Z for UTC")
    return found


MOST_PLAIN = 10.0
"""Shares beyond are written with their %."""


def fraction_of(text: str, option: str) -> float:
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError as error:
        raise InputError(f"{option} {text!r} is no share: write +50% or 0.5") from error
    if value > MOST_PLAIN and not text.strip().endswith("%"):
        raise InputError(f"{option} {text!r} would be {value:+,.0%}: write +{value:g}% or +{value:.0%}")
    if not -1 < value < 1000 or value == 0:
        raise InputError(f"{option} {text!r} must be above -100 % and not 0")
    return value


def show(found: Any, as_json: bool) -> None:
    if as_json:
        import json

        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return
    text = str(found)
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def show_rich(renderable: Any) -> None:
    """A rich renderable, in colour on a terminal, 100 columns wide elsewhere."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(renderable)


def check_writable(*paths: Path | None) -> None:
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


def write_file(path: Path | None, write: Callable[[Path], None]) -> None:
    if path is None:
        return
    try:
        write(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    sys.stderr.write(f"wrote {path}\n")


@contextmanager
def gap_over_time() -> Iterator[Callable[[Any], None] | None]:
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
def progress_bar(what: str) -> Iterator[Callable[[float], None]]:
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
