"""What every field of a scenario is made of: kinds of numbers, names, files, and what is in the catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo

from pertoken.errors import InputError, nearest

Fraction = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$", max_length=64)]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        str_strip_whitespace=True,
        use_attribute_docstrings=True,
    )


def _timezone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        from zoneinfo import available_timezones

        raise ValueError(f"unknown {_unknown('time zone', name, available_timezones())}") from error
    return name


def _unknown(kind: str, name: str, known: Any) -> str:
    hits = nearest(name, known)
    return f"{kind} {name!r}" + (f": did you mean {', '.join(hits)}?" if hits else ", which is not defined")


def _in_catalogue(lookup: Any, name: str) -> None:
    try:
        lookup(name)
    except InputError as error:
        raise ValueError(str(error)) from error


def _file(path: Path, info: ValidationInfo) -> Path:
    context = info.context or {}
    if (files := context.get("files")) is not None:
        if str(path) not in files:
            known = f" but those of its fleet: {', '.join(files)}" if files else ""
            raise ValueError(f"no file of this machine is opened for a scenario sent to it{known}")
        sent: Path = files[str(path)]
        return sent
    folder = context.get("folder", Path())
    full: Path = folder / path
    if not full.is_file():
        raise ValueError(f"no file at {path} (looked in {folder})")
    return full
