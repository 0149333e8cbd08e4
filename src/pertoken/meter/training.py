"""Training logs as a source: steps with their tokens, retained or lost to a restart, become records.

Three forms, told apart line by line (NAME_MAP):

- ours, JSON lines: ``{"ts": …, "step": 12, "tokens": 4194304, "seconds": 3.1, "gpus": 64}``, and
  ``{"ts": …, "resumed_at_step": 10}`` after a restart
- Hugging Face Trainer: ``{'loss': …, 'num_input_tokens_seen': 81920, …}`` (a running count) as JSON or
Python text - Megatron-LM: ``iteration  12/ 500 | … | elapsed time per iteration (ms): 3100.0 | global batch
size: 1024 | …``

Steps at or past the one a run resumed at were lost: their tokens and GPU-hours are ``waste``.
"""

from __future__ import annotations

import re
from ast import literal_eval
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa

from pertoken.errors import InputError
from pertoken.meter.records import empty, records
from pertoken.units import MILLISECONDS_PER_SECOND, SECONDS_PER_HOUR

NAME_MAP: dict[str, tuple[str, ...]] = {
    "step": ("step", "global_step", "iteration"),
    "tokens": ("tokens", "tokens_in_step", "step_tokens"),
    "tokens_seen": ("tokens_seen", "num_input_tokens_seen", "consumed_tokens"),
    "seconds": ("seconds", "step_time_s", "step_time"),
    "gpus": ("gpus", "world_size"),
    "ts": ("ts", "timestamp", "time"),
    "resumed_at_step": ("resumed_at_step", "resume_step"),
}
"""Ours to the keys that tell it."""

_LONGEST_LINE = 65_536
_ITERATION = re.compile(r"iteration\s+(\d{1,12})/\s*\d+")
_ELAPSED = re.compile(r"elapsed time per iteration \(ms\):\s*([0-9.]{1,20})")
_BATCH = re.compile(r"global batch size:\s*(\d{1,12})")
_STAMP = re.compile(r"\[?(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)")


@dataclass(frozen=True)
class Run:
    """A training run: its name, pool, model and tenant, its GPUs, and the tokens of a sample (for Megatron's
    logs)."""

    name: str
    pool: str
    model: str = ""
    tenant: str = ""
    gpus: float = 0.0
    sequence_tokens: float = 0.0


class _Step(NamedTuple):
    ts: float
    step: int
    tokens: float
    seconds: float
    gpus: float
    attempt: int


def read(lines: Iterable[str], run: Run, *, now_s: float) -> tuple[pa.Table, list[str]]:
    """The records of a whole log, and why lines were refused (``line 3: …``).

    Parameters: lines, each at most 64 KiB; the run; now_s [POSIX s] for lines that carry no time.
    A log read again after it grew gives the same records for the same steps, so the journal counts them
    once: give it when the run ended, or the loss of a step after it was booked is not seen. Lines of other
    kinds are skipped.
    """
    steps: list[_Step] = []
    kept: list[int] = []  # places of steps that were not lost, so that no restart looks at a lost one again
    refused: list[str] = []
    seen, attempt, last_ts = 0.0, 0, now_s
    for number, line in enumerate(lines, 1):
        try:
            told = _told(line)
            if told is None:
                continue
            last_ts = _time(told.get("ts"), last_ts)
            if "resumed_at_step" in told:
                attempt += 1
                _lose(steps, kept, int(_number(told["resumed_at_step"])))
                continue
            step = int(_number(told.get("step", len(steps) + 1)))
            if steps and step <= max(s.step for s in steps[-1:]):
                attempt += 1
                _lose(steps, kept, step)
            tokens = _tokens(told, seen, run)
            seen = _number(told.get("tokens_seen", seen + tokens))
            seconds = _number(told.get("seconds", 0.0))
            gpus = _number(told.get("gpus", run.gpus))
            kept.append(len(steps))
            steps.append(_Step(last_ts, step, tokens, seconds, gpus, attempt))
        except (InputError, ValueError, OverflowError) as error:
            refused.append(f"line {number}: {error}")
    return _table(steps, run), refused


_LOST = -1


def _lose(steps: list[_Step], kept: list[int], first: int) -> None:
    """Steps from `first` on were not retained."""
    while kept and steps[kept[-1]].step >= first:
        at = kept.pop()
        steps[at] = steps[at]._replace(attempt=_LOST)


def _table(steps: list[_Step], run: Run) -> pa.Table:
    rows: list[tuple[float, str, str, str, float]] = []
    tries: dict[int, int] = {}
    for one in steps:
        # A step run again is another record: it is told apart by how often it was run.
        tries[one.step] = again = tries.get(one.step, 0) + 1
        lost = one.attempt == _LOST
        phase = "waste" if lost else "training"
        key = f"{one.step}#{again}"
        meter = "lost_training_tokens" if lost else "training_tokens"
        if one.tokens:
            rows.append((one.ts, key, phase, meter, one.tokens))
        if one.seconds and one.gpus:
            rows.append((one.ts, key, phase, "gpu_hours", one.seconds * one.gpus / SECONDS_PER_HOUR))
    if not rows:
        return empty()
    ts, keys, phases, meters, quantities = (list(column) for column in zip(*rows, strict=True))
    return records(
        {
            "ts": ts,
            "source": f"training/{run.name}",
            "key": keys,
            "pool": run.pool,
            "model": run.model,
            "tenant": run.tenant,
            "phase": phases,
            "meter": meters,
            "quantity": quantities,
        },
        len(rows),
    )


def _told(line: str) -> dict[str, Any] | None:
    """A line's values by our names; None for a line of another kind."""
    if len(line) > _LONGEST_LINE:
        raise InputError(f"a line of {len(line)} characters is refused")
    text = line.strip()
    iteration = _ITERATION.search(text)
    if iteration:
        told: dict[str, Any] = {"step": int(iteration[1])}
        for name, form in (("milliseconds", _ELAPSED), ("batch", _BATCH), ("ts", _STAMP)):
            found = form.search(text)
            if found:
                told[name] = found[1]
        if "milliseconds" in told:
            told["seconds"] = float(told.pop("milliseconds")) / MILLISECONDS_PER_SECOND
        return told
    if not text.startswith("{"):
        return None
    try:
        raw = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        try:
            raw = literal_eval(text)  # Trainer prints Python's form
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise InputError(f"neither JSON nor a Python literal: {error}") from error
    if not isinstance(raw, dict):
        return None
    found_keys = {
        name: raw[key] for name, keys in NAME_MAP.items() for key in keys[::-1] if raw.get(key) is not None
    }
    useful = ("tokens", "tokens_seen", "resumed_at_step")
    return found_keys if any(name in found_keys for name in useful) else None


def _tokens(told: dict[str, Any], seen: float, run: Run) -> float:
    if "tokens" in told:
        return _number(told["tokens"])
    if "tokens_seen" in told:
        return max(0.0, _number(told["tokens_seen"]) - seen)
    if "batch" in told and run.sequence_tokens:
        return _number(told["batch"]) * run.sequence_tokens
    raise InputError("the step has no token count: give the run its sequence_tokens")


def _number(value: Any) -> float:
    number = float(value) if isinstance(value, int | float | str) else -1.0
    if not 0 <= number < 1e12 * MILLISECONDS_PER_SECOND:
        raise InputError(f"{value!r} is no count")
    return number


def _time(value: Any, otherwise: float) -> float:
    if value is None:
        return otherwise
    if isinstance(value, int | float):
        return float(value)
    moment = datetime.fromisoformat(str(value))
    return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
