"""Rows of measured points: one CSV line to one `MeasuredRow`, whatever subset of the columns a benchmark
writes.

Columns are those of published result tables (`COLUMNS`); unknown ones are ignored, blank cells are missing
values.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pertoken.errors import InputError
from pertoken.perf.point import Layout
from pertoken.units import BYTES_PER_GB

TEXT_COLUMNS = (
    "gpu", "model", "precision", "engine", "source", "kind", "mode", "task", "parallelism", "activation_ckpt",
    "spec_decoding", "disagg", "dp_attention", "wip",
)  # fmt: skip
NUMBER_COLUMNS = (
    "n_gpus", "input_len", "output_len", "cached_input_len", "tokens_per_s", "tokens_per_s_per_gpu",
    "power_w", "joules_per_output_token", "mfu_pct", "tp", "pp", "cp", "ep", "dp", "attention_dp",
    "moe_tp", "moe_ep", "prefill_gpus", "decode_gpus", "prefill_workers", "prefill_tp", "decode_workers",
    "decode_tp", "avg_running_batch", "batch_size", "global_batch_size", "micro_batch",
    "accepted_per_step", "ttft_s", "median_ttft_s", "tpot_s", "median_tpot_s",
)  # fmt: skip
COLUMNS = (*TEXT_COLUMNS, "concurrency", *NUMBER_COLUMNS)
BLANK = frozenset({"", "nan", "na", "n/a", "none", "null", "-"})
TRAINING_KINDS = (
    (re.compile(r"\blora\b|\bpeft\b"), "lora"),
    (re.compile(r"^full$|\bfull (param|ft\b)|\bsft\b|fine ?tun"), "full"),
    (re.compile(r"pre ?train|\btrain(ing)?\b"), "pretrain"),
)
"""What a row's `kind` says of a training run, first match: "LoRA", "full fine-tune", "MoE pretraining"."""
OTHER_TRAINING = re.compile(r"\bqlora\b|\bdpo\b|\bppo\b|\bgrpo\b|\brl(hf)?\b")
"""Training whose work is another: a base in four bits, samples drawn in between."""
TRAINING_COLUMNS = ("global_batch_size", "mfu_pct")
"""Numbers that only a training run has."""
MAX_BYTES = 200_000_000
SMALLEST, LARGEST = 1e-12, 1e15
"""What a cell can mean: beyond, it is a slip of the pen, and a measurement below is none."""
_YES = frozenset({"true", "yes", "1", "1.0"})
_COUNTED = re.compile(r"(\d+)(?: [x×] |[x×] ?)(?=[^\d\W])(.+)", re.IGNORECASE)
_DEGREES = re.compile(r"(dep|tep|tp|pp|ep|dp)[ =_-]?(\d+)", re.IGNORECASE)

RANDOM_LENGTH_SHARE = 0.9
"""InferenceMAX (InferenceX) draws each length between 0.8 and 1.0 of the nominal one: 0.9 of it on
average."""
RANDOM_LENGTH_SOURCES = ("inferencemax", "inferencex")
FIXED_LENGTH_KINDS = ("nvidia_internal_gap_analysis",)

MAX_TP = 16
"""Widest tensor parallel group that engines run: heads divide over powers of two, two machines at most."""
SPREAD_SEQUENCES = 8
"""Sequences per decoding GPU from which a disaggregated row without a layout spreads attention over its
GPUs."""

TASK_INPUT_TOKENS = {
    "gpqa": 300.0,
    "lm-arena-chat": 200.0,
    "sourcegraph-fim": 1000.0,
    "image-chat": 1000.0,
    "video-chat": 2500.0,
    "audio-chat": 500.0,
    "omni-chat": 1500.0,
}
"""Assumed prompt tokens of ML.ENERGY's tasks, whose input lengths are not published. In round numbers, the length at
which the measured throughput of most H100 rows is explained: chat turns are short, fill-in-the-middle prompts carry a
file, an image is some hundred to a thousand patches, a video a few thousand."""
TASK_MEDIA = {"image-chat": "image", "video-chat": "video", "audio-chat": "audio", "omni-chat": "video"}
"""What prompts of a task carry beside text."""


@dataclass(frozen=True)
class MeasuredRow:
    """One measured point as a benchmark wrote it, in our units; NaN where a number is missing.

    `gpus` is all GPUs of the row or job; `layout`, `prefill_gpus` and `concurrency` are one replica's.
    `concurrency` is infinite at saturation. `measured` maps a quantity (tokens_per_s per GPU, ttft_s, tpot_s,
    power_w per GPU, joules_per_output_token, mfu_fraction) to its value. `training` is empty for serving,
    else the kind; an empty precision is the checkpoint's own. `problem` says why no point can be made of the row.
    """

    line: int
    gpu: str
    model: str
    precision: str
    engine: str
    source: str
    gpus: float
    input_tokens: float
    output_tokens: float
    cached_tokens: float
    concurrency: float
    layout: Layout
    prefill_gpus: float
    accepted_per_step: float
    training: str
    global_batch: float
    micro_batch: float
    degrees: Mapping[str, int]
    checkpointing: str
    measured: Mapping[str, float]
    media: str = ""
    task: str = ""
    prefill_tp: int = 0
    """Tensor parallel degree of a prefill worker where a table gives workers; 0: not given."""
    assumed: tuple[str, ...] = ()
    problem: str = ""


@dataclass
class _Cells:
    """The cells of one line by column name, parsed."""

    line: int
    text: dict[str, str] = field(default_factory=dict)
    number: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.number.get(name, math.nan)

    def first(self, *names: str) -> float:
        return next((self.number[n] for n in names if n in self.number), math.nan)

    def whole(self, name: str) -> int:
        return int(self.number.get(name, 0))

    def yes(self, name: str) -> bool:
        return self.text.get(name, "").lower() in _YES


def read_rows(path: Path) -> list[MeasuredRow]:
    """All rows of a CSV of measured points, in file order.

    Raises InputError in one line, naming file and line, where the file cannot be read, is not UTF-8 text, has
    no header with `gpu` and `model`, a line has more cells than the header, or a cell of a number column is
    no number.
    """
    return [_row(cells) for cells in _lines(path)]


def _lines(path: Path) -> Iterator[_Cells]:
    line = 1
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(
                f"{path}: {path.stat().st_size / BYTES_PER_GB:.1f} GB is no table of measured points"
            )
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            _check_header(path, header)
            for values in reader:
                line = reader.line_num
                if any(v.strip() for v in values):
                    yield _cells(path, line, header, values)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: line {line + 1} or after: not UTF-8 text: a CSV file is needed") from error
    except csv.Error as error:
        raise InputError(f"{path}: line {line + 1}: not a CSV line: {error}") from error


def _check_header(path: Path, header: list[str]) -> None:
    missing = [name for name in ("gpu", "model") if name not in header]
    if missing:
        shown = ", ".join(header)[:80] or "nothing"
        raise InputError(f"{path}: line 1: no column {' and no column '.join(missing)}; found {shown}")
    if len(set(header)) != len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise InputError(f"{path}: line 1: column {twice!r} appears twice")


def _cells(path: Path, line: int, header: list[str], values: list[str]) -> _Cells:
    if len(values) > len(header):
        raise InputError(f"{path}: line {line}: {len(values)} cells under {len(header)} columns")
    cells = _Cells(line)
    for name, raw in zip(header, values, strict=False):
        value = raw.strip()
        if value.lower() in BLANK:
            continue
        if name in _NUMBERS:
            cells.number[name] = _number(path, line, name, value)
        elif name == "concurrency":
            saturated = value.lower().startswith("saturat") or value.lower() in ("max", "inf")
            cells.number[name] = math.inf if saturated else _number(path, line, name, value)
        else:
            cells.text[name] = value
    return cells


_NUMBERS = frozenset(NUMBER_COLUMNS)


def _number(path: Path, line: int, name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise InputError(f"{path}: line {line}: {name} is {value[:40]!r}: a number is needed") from None
    if not 0 <= number <= LARGEST:
        raise InputError(
            f"{path}: line {line}: {name} is {value}: a number from 0 to {LARGEST:.0e} is needed"
        )
    return number


def _row(cells: _Cells) -> MeasuredRow:
    miscounted = _take_count(cells)
    training = _training_kind(cells)
    placed = _Placed(Layout(), gpus=cells["n_gpus"]) if training else _layout(cells)
    share = _length_share(cells)
    inputs, length = _input_tokens(cells, share)
    return MeasuredRow(
        line=cells.line,
        gpu=cells.text.get("gpu", ""),
        model=cells.text.get("model", ""),
        precision=cells.text.get("precision", "bf16" if training else ""),
        engine=cells.text.get("engine", "vllm"),
        source=cells.text.get("source", ""),
        gpus=placed.gpus,
        input_tokens=cells["input_len"] if training else inputs,
        output_tokens=max(cells["output_len"] * share, min(cells["output_len"], 1.0)),
        cached_tokens=cells.number.get("cached_input_len", 0.0) * share,
        concurrency=_requests(cells) * placed.share,
        layout=placed.layout,
        prefill_gpus=placed.prefill_gpus,
        accepted_per_step=cells.number.get("accepted_per_step", 1.0),
        training=training,
        global_batch=cells.number.get("global_batch_size", 0.0),
        micro_batch=cells.number.get("micro_batch", 0.0),
        degrees={name: cells.whole(name) for name in ("tp", "pp", "cp", "ep")},
        checkpointing=_checkpointing(cells.text.get("activation_ckpt", "")),
        measured=_measured(cells, placed.gpus),
        task=cells.text.get("task", "").lower(),
        media=TASK_MEDIA.get(cells.text.get("task", "").lower(), ""),
        prefill_tp=cells.whole("prefill_tp")
        if placed.prefill_gpus and "decode_workers" in cells.number
        else 0,
        assumed=tuple(_assumed(cells, training, share, length, placed.assumed)),
        problem=miscounted or placed.problem or _missing(cells, training, inputs),
    )


def _take_count(cells: _Cells) -> str:
    """Moves a count before the GPU's name ("8x H100") to n_gpus; says so where n_gpus is another."""
    if not (counted := _COUNTED.fullmatch(cells.text.get("gpu", ""))):
        return ""
    count, cells.text["gpu"] = float(counted[1]), counted[2]
    if cells.number.setdefault("n_gpus", count) == count:
        return ""
    return f"gpu says {count:g} GPUs, n_gpus {cells['n_gpus']:g}"


def _training_kind(cells: _Cells) -> str:
    """What kind of training run a row is; empty for serving."""
    words = re.sub(r"[-_]", " ", cells.text.get("kind", "").lower())
    named = next((kind for pattern, kind in TRAINING_KINDS if pattern.search(words)), "")
    return named or ("pretrain" if any(name in cells.number for name in TRAINING_COLUMNS) else "")


def _assumed(cells: _Cells, training: str, share: float, length: str, layout: str) -> Iterator[str]:
    """What a row leaves open and is taken for granted."""
    if length:
        yield length
    if share != 1.0:
        yield f"lengths are {share:g} × nominal"
    if training and "global_batch_size" not in cells.number:
        yield "the global batch is chosen"
    if "precision" not in cells.text:
        yield "precision bf16" if training else "the precision of the checkpoint as published"
    if not training and "engine" not in cells.text:
        yield "engine vllm"
    if layout:
        yield layout


def _length_share(cells: _Cells) -> float:
    """Mean length over nominal length: what the row's benchmark drew."""
    text = f"{cells.text.get('source', '')} {cells.text.get('kind', '')}".lower()
    random = any(name in text for name in RANDOM_LENGTH_SOURCES)
    return RANDOM_LENGTH_SHARE if random and cells.text.get("kind") not in FIXED_LENGTH_KINDS else 1.0


def _input_tokens(cells: _Cells, share: float) -> tuple[float, str]:
    if "input_len" in cells.number:
        return cells["input_len"] * share, ""
    task = cells.text.get("task", "").lower()
    if task in TASK_INPUT_TOKENS:
        tokens = TASK_INPUT_TOKENS[task]
        return tokens, f"{tokens:.0f} input tokens of task {task}"
    return math.nan, ""


def _missing(cells: _Cells, training: str, inputs: float) -> str:
    if cells.yes("wip"):
        return "marked as work in progress"
    if other := OTHER_TRAINING.search(cells.text.get("kind", "").lower()):
        return f"kind {other[0]} is not predicted: pretraining, full fine-tuning and LoRA are"
    needed = {"gpu": "gpu" in cells.text, "model": "model" in cells.text}
    if training:
        needed |= {"n_gpus": cells["n_gpus"] >= 1, "input_len (sequence)": cells["input_len"] >= 1}
    else:
        needed |= {
            "input_len": not math.isnan(inputs),
            "output_len": cells["output_len"] >= 1,
            "concurrency": _requests(cells) >= 1,
        }
    missing = [name for name, there in needed.items() if not there]
    if missing:
        return f"no {', no '.join(missing)}"
    drafts = cells.text.get("spec_decoding", "").lower()
    if drafts not in ("", "false", "off") and "accepted_per_step" not in cells.number:
        return f"speculative decoding ({drafts}) without accepted_per_step: the drafts kept are not known"
    return ""


def _checkpointing(text: str) -> str:
    value = text.lower()
    return {"true": "full", "full": "full", "false": "none", "none": "none", "selective": "selective"}.get(
        value, ""
    )


def _measured(cells: _Cells, gpus: float) -> dict[str, float]:
    """Measured quantities the row states, tokens per second per GPU."""
    found = {
        "tokens_per_s": cells["tokens_per_s"] / gpus if gpus > 0 else math.nan,
        "ttft_s": cells.first("ttft_s", "median_ttft_s"),
        "tpot_s": cells.first("tpot_s", "median_tpot_s"),
        "power_w": _gpu_power_w(cells, gpus),
        "joules_per_output_token": cells["joules_per_output_token"],
        "mfu_fraction": cells["mfu_pct"] / 100,
    }
    if math.isnan(found["tokens_per_s"]):
        found["tokens_per_s"] = cells["tokens_per_s_per_gpu"]
    return {name: value for name, value in found.items() if value >= SMALLEST}


def _gpu_power_w(cells: _Cells, gpus: float) -> float:
    """Power of one GPU: tables state that of all of a row's GPUs, as their joules × tokens per second
    prove."""
    return cells["power_w"] / gpus if gpus > 0 else cells["power_w"]


class _Placed(NamedTuple):
    """A row's (decoding) replica, GPUs of it that only prefill, all GPUs of the row, the replica's share of
    them, what is wrong if anything, and what was taken for granted."""

    layout: Layout
    prefill_gpus: float = 0.0
    gpus: float = math.nan
    share: float = 1.0
    problem: str = ""
    assumed: str = ""


def _layout(cells: _Cells) -> _Placed:
    if cells.text.get("mode", "").lower().startswith("disagg") or cells.yes("disagg"):
        return _split_layout(cells)
    n, assumed = cells["n_gpus"], ""
    if "parallelism" in cells.text:
        layout = _named_layout(cells.text["parallelism"])
    elif "moe_tp" in cells.number or "moe_ep" in cells.number:
        layout = _expert_layout(cells)
        n, stated = float(layout.gpus), n
        assumed = (
            "" if math.isnan(stated) or stated == n else "GPUs are those of the experts' degrees, not n_gpus"
        )
    else:
        layout, assumed = _plain_layout(cells)
    if math.isnan(n):
        n = float(layout.gpus)
    if layout.tp > MAX_TP or layout.tp & (layout.tp - 1):
        problem = f"tensor parallel over {layout.tp} GPUs: no engine runs that, the real split is not stated"
        return _Placed(layout, 0.0, n, 1.0, problem)
    return _Placed(layout, 0.0, n, 1.0, "", assumed) if n == layout.gpus else _replicas(cells, layout, n)


def _replicas(cells: _Cells, layout: Layout, n: float) -> _Placed:
    """GPUs that are several times tp × pp, without a word on dp: replicas that share the row's requests."""
    told = "parallelism" in cells.text or {"dp", "moe_tp", "moe_ep"} & cells.number.keys()
    if told or cells.yes("dp_attention") or n < 1 or n % layout.gpus or layout.gpus % layout.ep:
        return _Placed(layout, 0.0, n, 1.0, f"{n:g} GPUs, but its degrees make {layout.gpus}")
    few = _requests(cells) < n / layout.gpus
    problem = f"fewer requests at a time than its {n / layout.gpus:g} replicas" if few else ""
    return _Placed(
        layout, 0.0, n, layout.gpus / n, problem, "GPUs beyond tp × pp are replicas that share the requests"
    )


def _requests(cells: _Cells) -> float:
    """Requests in flight over all of a row's GPUs; NaN where it does not say."""
    return cells.first("avg_running_batch", "concurrency", "batch_size")


def _plain_layout(cells: _Cells) -> tuple[Layout, str]:
    """tp, pp, ep, dp as given, and what was assumed. GPUs beyond them are tensor parallel where tp is blank, or
    1 beside an ep (a table that says tp 1 and ep 8 on 8 GPUs tells of the experts alone). With
    ``dp_attention`` tp counts the group whose attention is replicated."""
    tp, pp, ep, dp = (max(cells.whole(name), 1) for name in ("tp", "pp", "ep", "dp"))
    n = cells.whole("n_gpus")
    if cells.yes("dp_attention"):
        group = tp if "tp" in cells.number else max(n // pp, 1)
        return Layout(1, pp, group, group), ""
    if tp > 1 or ("tp" in cells.number and ep == 1) or n <= pp * dp or n % (pp * dp):
        return Layout(tp, pp, ep, dp), ""
    return Layout(n // (pp * dp), pp, ep, dp), "" if "tp" in cells.number else "tensor parallel over all GPUs"


def _named_layout(text: str) -> Layout:
    """Degrees from a name: TP8, EP4, DEP8 (attention data parallel, experts spread), TEP8 (both over one
    group).

    >>> _named_layout("DEP4"), _named_layout("TP2PP4")
    (Layout(tp=1, pp=1, ep=4, dp=4), Layout(tp=2, pp=4, ep=1, dp=1))
    """
    degrees = {"tp": 1, "pp": 1, "ep": 1, "dp": 1}
    for name, size in _DEGREES.findall(text):
        for part in {"dep": ("dp", "ep"), "tep": ("tp", "ep")}.get(name.lower(), (name.lower(),)):
            degrees[part] = int(size)
    return Layout(**degrees)


def _expert_layout(cells: _Cells) -> Layout:
    """Layout from attention tp and experts' moe_tp × moe_ep. Tables that give moe_tp = moe_ep > 1 name one
    group twice (the same measurement stands there as tp 8 ep 8 and as 64 GPUs): it is that many GPUs."""
    moe_tp, moe_ep, tp = (max(cells.whole(name), 1) for name in ("moe_tp", "moe_ep", "tp"))
    if cells.text.get("kind") in FIXED_LENGTH_KINDS:
        group = max(tp, moe_tp * moe_ep)
        return Layout(tp, 1, moe_ep if group == tp else group, max(1, group // tp))
    group = moe_tp if moe_tp == moe_ep else moe_tp * moe_ep
    if tp == 1 and cells["attention_dp"] > 1:
        return Layout(1, 1, group, group)
    if moe_tp * moe_ep == 1:
        group = max(cells.whole("n_gpus"), tp)
    return Layout(group, 1, moe_ep, 1)


def _split_layout(cells: _Cells) -> _Placed:
    """Disaggregated. With worker counts each decode worker is a replica of decode_tp GPUs. With GPU counts
    alone, decode GPUs are one group of attention data parallel where each holds 8 sequences or more, else
    replicas of up to 8 GPUs with tensor parallel."""
    workers, tp = cells["decode_workers"], cells.whole("decode_tp")
    if workers >= 1 and tp >= 1 and cells["prefill_workers"] * cells["prefill_tp"] >= 1:
        prefill = cells["prefill_workers"] * cells["prefill_tp"]
        few = _requests(cells) < workers
        problem = f"fewer requests at a time than its {workers:g} decode workers" if few else ""
        return _Placed(Layout(tp), prefill / workers, prefill + workers * tp, 1 / workers, problem)
    prefill, decode = cells["prefill_gpus"], cells["decode_gpus"]
    if not (prefill >= 1 and decode >= 1):
        return _Placed(Layout(), problem="disaggregated without prefill and decode GPU counts")
    count = int(decode)
    spread = cells["concurrency"] / decode >= SPREAD_SEQUENCES
    layout = Layout(1, 1, count, count) if spread else Layout(min(8, count))
    share = layout.gpus / decode
    return _Placed(layout, prefill * share, prefill + decode, share)
