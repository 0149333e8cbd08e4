"""Files of usage and of training logs, read for the journal: what `pertoken import` does before records are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow as pa

from pertoken.errors import InputError, UnknownNameError
from pertoken.fleet import RunningFleet
from pertoken.meter import files, training

TRAINING = "training"
FORMATS = (*files.FORMATS, TRAINING)


@dataclass(frozen=True)
class FileOf:
    """What a file is, and what it does not say itself.

    `name`: of the source in the books (empty: the format's, a training log's: its file name); the same file under the
    same name counts once. `gpus` and `sequence_tokens` are a training run's, where its log leaves them out.
    """

    format_name: str
    pool: str = ""
    name: str = ""
    model: str = ""
    tenant: str = ""
    gpus: float = 0.0
    sequence_tokens: float = 0.0


def batches(
    path: Path, what: FileOf, fleet: RunningFleet | None, *, now: datetime
) -> Iterator[tuple[pa.Table, list[str], float]]:
    """Records of a file part by part, why rows were refused, and the share [0 to 1] of it that is done at most.

    Parameters: fleet, whose API pools take calls by provider and model (None: all go to `what.pool`); now, for rows
    without a time. Raises UnknownNameError on a pool that is none, InputError on a format that is none or a file
    that cannot be read.
    """
    if what.format_name not in FORMATS:
        raise InputError(f"unknown file format {what.format_name!r}: one of {', '.join(FORMATS)}")
    if fleet is not None and what.pool and what.pool not in fleet.pools:
        raise UnknownNameError("pool", what.pool, list(fleet.pools))
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if what.format_name == TRAINING:
        yield *_training(path, what, now), 1.0
        return
    pools = files.api_pools(fleet) if fleet else None
    where = files.Where(f"usage/{what.name or what.format_name}", what.pool, pools)
    done, size = 0, _rows(path)
    for part in files.read(path, what.format_name, where, now_s=now.timestamp()):
        done += files.BATCH
        yield part.records, part.refused, min(1.0, done / size) if size else 1.0


def _training(path: Path, what: FileOf, now: datetime) -> tuple[pa.Table, list[str]]:
    if not what.pool:
        raise InputError("a training log does not say its pool: give --pool")
    run = training.Run(
        what.name or path.name, what.pool, what.model, what.tenant, what.gpus, what.sequence_tokens
    )
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            return training.read(lines, run, now_s=now.timestamp())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _rows(path: Path) -> int:
    """Rows of a file as far as they can be told without reading them: by its line ends, or a Parquet's footer."""
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        try:
            return int(pq.read_metadata(path).num_rows)
        except (pa.ArrowException, OSError):
            return 0
    with path.open("rb") as file:
        return sum(part.count(b"\n") for part in iter(lambda: file.read(1 << 20), b""))
