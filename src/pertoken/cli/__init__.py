"""The command `pertoken`: one thin function per verb; all work is in the floors below."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from pertoken import __version__
from pertoken.cli import _forecast, _service  # noqa: F401 (each adds its verbs)
from pertoken.cli._terminal import app
from pertoken.errors import PerTokenError

__all__ = ["app", "main"]


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


def _usage_errors() -> type[Any]:
    """What typer raises on options it does not understand; it keeps the class to itself."""
    return typer.BadParameter.__mro__[2]
