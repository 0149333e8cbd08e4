"""The measured serving points the fit uses, each once, with its layout; README.md tells which cannot be used."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pertoken.catalog.gpus import Gpu, gpu
from pertoken.catalog.models import Model, model, model_from_config
from pertoken.errors import InputError, UnknownNameError
from pertoken.perf._coefficients import level_keys
from pertoken.perf._work import precision_name
from pertoken.perf.point import Layout
from pertoken.units import MILLISECONDS_PER_SECOND

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
LENGTH_RATIO = 0.9
"""InferenceMAX draws lengths between 0.8 and 1.0 of the nominal ones: real prompts and outputs are 0.9 ×
nominal."""
ASSUMED_CHAT_INPUT = 150.0
"""ML.ENERGY publishes no input lengths; its chat prompts are short (LMArena), so that decode dominates."""


@dataclass(frozen=True)
class Row:
    """One measured point. NaN where a quantity was not measured; `weight` in the fit; `scored` in the
    tables."""

    gpu: str
    model: str
    engine: str
    precision: str
    layout: Layout
    prefill_gpus: float
    input_tokens: float
    output_tokens: float
    concurrency: float
    tokens_per_s: float
    ttft_s: float
    tpot_s: float
    source: str
    weight: float = 1.0
    scored: bool = True
    median_interval: bool = False
    """tpot_s is the median time between two tokens: a step that no other prompt stalls."""

    @property
    def gpus(self) -> float:
        return self.layout.gpus + self.prefill_gpus

    @property
    def configuration(self) -> tuple[Any, ...]:
        """Rows that repeat one measurement setting, whatever the software version: never split over folds."""
        return (self.gpu, model_of(self.model).name, self.engine, self.precision, self.layout,
                self.input_tokens, self.output_tokens, self.concurrency)  # fmt: skip


@cache
def model_of(name: str) -> Model:
    """The catalogue's model, or where it has none the published config of that name."""
    try:
        return model(name)
    except UnknownNameError:
        folder = _configs()
        plain = name.split("/")[-1].lower()
        for suffix in ("-0528", "-nvfp4", "-fp8", "-2507", "-thinking", "-instruct"):
            plain = plain.removesuffix(suffix)
        for full, found in folder.items():
            if full.split("/")[-1].lower() == name.split("/")[-1].lower():
                return found
        for full, found in folder.items():
            if plain in full.lower():
                return found
        raise


@cache
def _configs() -> dict[str, Model]:
    found: dict[str, Model] = {}
    for path in sorted((DATA / "model_configs").glob("*_config.json")):
        name = path.name.removesuffix("_config.json").replace("--", "/")
        if not name.endswith("_hf_quant"):
            try:
                found[name] = model_from_config(path)
            except InputError:
                continue  # a config that names no sizes cannot be predicted; the catalogue's tests list those
    return found


@cache
def gpu_of(name: str) -> Gpu:
    return gpu(name)


def configuration_of(row: Row) -> str:
    """The key of a row's effects of its own: GPU × engine family × precision × architecture."""
    keys = level_keys(
        model_of(row.model), gpu_of(row.gpu), row.engine, row.precision, split=row.prefill_gpus > 0
    )
    return keys["configuration"]


def ranges(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Fewest and most requests in flight of every configuration's rows."""
    held: dict[str, list[float]] = {}
    for row in rows:
        held.setdefault(configuration_of(row), []).append(row.concurrency)
    return {key: (min(values), max(values)) for key, values in sorted(held.items())}


def load_rows(folder: Path = DATA / "performance") -> list[Row]:
    """All rows that can be used, each measurement once; see README.md for those that cannot."""
    rows = [*_inferencemax(folder), *_silicon(folder), *_mlenergy(folder)]
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for row in rows:
        measured = (row.gpu, row.precision, row.engine, row.input_tokens, row.output_tokens, row.concurrency,
                    row.layout.gpus, row.ttft_s, row.tpot_s)  # fmt: skip
        if measured not in seen:
            seen.add(measured)
            kept.append(row)
    return kept


Cells = dict[str, str]


def _table(path: Path) -> Iterator[Cells]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _number(text: str) -> float:
    return float(text) if text else float("nan")


def _true(text: str) -> bool:
    return text.lower() == "true"


def _inferencemax(folder: Path) -> Iterable[Row]:
    for r in _table(folder / "serving_inferencemax.csv"):
        if r["spec_decoding"] != "none":
            continue  # how many drafted tokens were accepted is not published
        apart = _true(r["disagg"])
        layout, prefill, replicas = _split_layout(r) if apart else _joint_layout(r)
        yield Row(
            gpu=gpu_of(r["gpu"]).name,
            model=r["model"],
            engine=r["engine"],
            precision=r["precision"],
            layout=layout,
            prefill_gpus=prefill,
            input_tokens=LENGTH_RATIO * float(r["input_len"]),
            output_tokens=LENGTH_RATIO * float(r["output_len"]),
            concurrency=float(r["concurrency"]) / replicas,
            tokens_per_s=float(r["tokens_per_s"]) / replicas,
            ttft_s=_number(r["median_ttft_s"]),
            tpot_s=_number(r["median_tpot_s"]),
            source="inferencemax-disagg" if apart else "inferencemax",
            weight=0.3 if apart else 1.0,
            scored=not apart,
        )


def _joint_layout(r: Cells) -> tuple[Layout, float, float]:
    tp, ep = int(float(r["tp"])), int(float(r["ep"]))
    return (Layout(1, 1, tp, tp) if _true(r["dp_attention"]) else Layout(tp, 1, ep, 1)), 0.0, 1.0


def _split_layout(r: Cells) -> tuple[Layout, float, float]:
    """Layout of a decode instance, prefill GPUs per instance, instances.

    Disaggregated rows publish only GPU counts: at eight and more sequences per GPU decode is taken as one group
    of attention data parallel, at fewer as instances of 8 GPUs (or fewer) with tensor parallel.
    """
    decode, prefill = int(float(r["decode_gpus"])), float(r["prefill_gpus"])
    if float(r["concurrency"]) / decode >= 8:
        return Layout(1, 1, decode, decode), prefill, 1.0
    tp = min(8, decode)
    return Layout(tp, 1, 1, 1), prefill * tp / decode, decode / tp


def _silicon(folder: Path) -> Iterable[Row]:
    for r in _table(folder / "serving_silicon.csv"):
        if r["mode"] != "agg" or _true(r["wip"]) or not r["concurrency"]:
            continue
        layout = _silicon_layout(r)
        if layout is None:
            continue
        ratio = 1.0 if r["kind"] == "nvidia_internal_gap_analysis" else LENGTH_RATIO
        row = Row(
            gpu=gpu_of(r["gpu"]).name,
            model=r["model"],
            engine=r["engine"],
            precision=r["precision"] or "bf16",  # a blank quantisation is the checkpoint as published
            layout=layout,
            prefill_gpus=0.0,
            input_tokens=ratio * float(r["input_len"]),
            output_tokens=ratio * float(r["output_len"]),
            concurrency=float(r["concurrency"]),
            tokens_per_s=float(r["tokens_per_s"]),
            ttft_s=_number(r["ttft_s"]),
            tpot_s=_number(r["tpot_s"]),
            source="silicon",
        )
        if _possible(row):
            yield row


def _silicon_layout(r: Cells) -> Layout | None:
    """The layout of an aggregated row, None where it or the decoding cannot be known.

    DeepSeek rows of the dated files are partly runs with multi-token prediction and nothing says which: the
    same configuration stands there at two speeds up to 2.4 times apart. The database dump holds the plain
    ones.

    InferenceX-like rows with moe_tp = moe_ep > 1 multiplied the two, which overlap: the same measurement
    (TTFT and TPOT to the digit) stands in the file as 8 GPUs tp 8 ep 8 and as 64. GB200 rows called
    aggregated with 12 and more GPUs are disaggregated ones of unknown split. In the gap analysis experts are
    sliced or spread over moe_tp × moe_ep GPUs, and attention over tp.
    """
    moe_tp, moe_ep, tp = (int(float(r[name])) for name in ("moe_tp", "moe_ep", "tp"))
    if "DeepSeek" in r["model"] and r["kind"] != "inferencex_db_dump":
        return None
    if r["kind"] == "nvidia_internal_gap_analysis":
        gpus = max(tp, moe_tp * moe_ep)
        return Layout(tp, 1, moe_ep if gpus == tp else gpus, max(1, gpus // tp))
    if r["gpu"] == "gb200":
        return None
    gpus = moe_tp if moe_tp == moe_ep else moe_tp * moe_ep
    gpus = max(gpus, 1)
    if tp == 1 and _number(r["attention_dp"]) > 1:
        return Layout(1, 1, gpus, gpus)
    if moe_tp * moe_ep == 1:
        gpus = int(float(r["n_gpus"]))
    return Layout(gpus, 1, moe_ep if moe_ep > 1 else 1, 1)


def _possible(row: Row) -> bool:
    """Whether the prompts a row claims to compute are within the datasheet's FLOPs; beyond, a prefix cache
    that is not published served them."""
    g, m = gpu_of(row.gpu), model_of(row.model)
    prompts_per_s = row.tokens_per_s / row.output_tokens
    needed = prompts_per_s * row.input_tokens * 2 * m.gemm_parameters
    return needed <= row.gpus * max(g.flops.values())


def _mlenergy(folder: Path) -> Iterable[Row]:
    """Chat rows of ML.ENERGY: their input lengths are assumed, so they are fitted at low weight and never scored."""
    for r in _table(folder / "power_mlenergy.csv"):
        held = _number(r["avg_running_batch"]) >= 0.9 * float(r["concurrency"])
        if r["task"] != "lm-arena-chat" or not held or not _known(r["model"]):
            continue
        yield Row(
            gpu=gpu_of(r["gpu"]).name,
            model=r["model"],
            engine=r["engine"],
            precision=precision_name(r["precision"]),
            layout=Layout(int(float(r["n_gpus"])), 1, int(float(r["ep"])), 1),
            prefill_gpus=0.0,
            input_tokens=ASSUMED_CHAT_INPUT,
            output_tokens=float(r["output_len"]),
            concurrency=float(r["concurrency"]),
            tokens_per_s=float(r["tokens_per_s"]),
            ttft_s=float("nan"),
            tpot_s=float(r["median_itl_ms"]) / MILLISECONDS_PER_SECOND,
            source="mlenergy",
            weight=0.3,
            scored=False,
            median_interval=True,
        )


def _known(name: str) -> bool:
    try:
        model_of(name)
    except UnknownNameError:
        return False
    return True
