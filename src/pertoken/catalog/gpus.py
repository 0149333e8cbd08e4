"""GPUs and other accelerators: what the datasheet says, dense, per device, with source and date.

The facts are rows of ``data/gpus.yaml``; this module reads and checks them and finds a row under the names
that vendors, clouds and benchmarks give it.

>>> gpu("NVIDIA Blackwell GPU (B200-SXM-180GB)").name
'B200'
>>> gpu("h100").flops["bf16"] / 1e12
989.4
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

import yaml

from pertoken.errors import InputError, UnknownNameError
from pertoken.units import GIGA, TERA

PRECISIONS = ("bf16", "fp8", "fp4", "int8")
_MIB = 2**20
_BASES = ("quoted", "measured", "assumed")

_FILLER = frozenset(
    (
        *("nvidia", "amd", "intel", "apple", "habana", "google", "cloud", "aws", "amazon"),
        *("instinct", "geforce", "tesla", "blackwell", "hopper"),
        *("gpu", "gpus", "accelerator", "tensor", "core", "oam", "dgx", "hgx", "dlc", "cts", "nps1", "spx"),
        *("hbm2", "hbm2e", "hbm3", "hbm3e", "gddr6", "gddr6x", "gddr7"),
        *("amds", "cr", "cw", "dgxc", "disagg", "multinode", "nb", "nv", "nvd", "slurm", "trt", "tw"),
    )
)
"""Words that name a vendor, a generation, a package or (last line) one of InferenceMAX's clusters but never tell two
rows apart."""
_MEMORY_WORD = re.compile(r"(\d+)(gb|gib|g)")
_POWER_WORD = re.compile(r"(\d+)w")


@dataclass(frozen=True)
class Gpu:
    """One accelerator as it is sold.

    Rates are dense peaks of one device (never sparse, never per die): `flops` [FLOP/s] by precision
    (``bf16``, ``fp8``, ``fp4``, ``int8``), a precision the hardware lacks is absent. Link rates are one
    direction, per device. `idle_w` is board power with a model loaded and no work; `host_idle_w` and
    `host_busy_w` are the rest of the server at the plug (CPUs, memory, network, fans, conversion loss) over
    its GPUs, at rest and at full load. `architecture` names the generation (``hopper``, ``blackwell``,
    ``cdna3``, …).

    `memory_gb` is the size on the label, which vendors count in binary units; `memory_bytes` is what the
    driver shows to programs. `scale_up_gpus` devices reach each other at `intra_node_bytes_per_s` (72 in an
    NVL72 rack, whose machines of `gpus_per_node` are compute trays). `power_notes` tells how each power
    figure is known.
    """

    name: str
    vendor: str
    architecture: str
    memory_gb: float
    memory_bytes_per_s: float
    flops: Mapping[str, float] = field(hash=False)
    intra_node_bytes_per_s: float
    inter_node_bytes_per_s: float
    gpus_per_node: int
    tdp_w: float
    idle_w: float
    host_idle_w: float
    host_busy_w: float
    released: str
    sources: tuple[str, ...]
    checked: str
    memory_bytes: float = 0.0
    scale_up_gpus: int = 1
    spellings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    power_notes: Mapping[str, str] = field(default_factory=dict, hash=False)


def gpus() -> Mapping[str, Gpu]:
    """All GPUs of the catalogue by canonical name (``H100-SXM``), in catalogue order.

    Raises InputError naming row and field where the shipped data breaks a rule.

    >>> len(gpus()) >= 24
    True
    """
    return _catalogue()


def gpu(name: str) -> Gpu:
    """The GPU of that name; spelling as vendors, clouds and benchmarks write it (``h100_sxm``, ``DGX-H100``).

    Case, punctuation and words like NVIDIA, Instinct or DGX do not count. A memory size or a power in the
    name must be the GPU's. A bare family name means its SXM or OAM module (``h100`` is H100-SXM), except
    where memory sizes differ too: a bare ``a100`` is refused, naming both (``a100_sxm`` and ``a100_pcie`` are
    the 80 GB ones, as benchmarks use the names).

    Raises UnknownNameError with the nearest names.

    >>> gpu("AMD Instinct MI325X 256GB HBM3E DLC").name
    'MI325X'
    >>> gpu("a100_80gb").name
    'A100-80GB-SXM'
    """
    catalogue, index = _catalogue(), _spellings()
    if (exact := catalogue.get(name)) is not None:
        return exact
    core, sizes, watts = _split(_words(name))
    for key in _keys(name):
        if key in index:
            return catalogue[index[key]]
    if core in index:
        row = catalogue[index[core]]
        if sizes <= _sizes(row) and watts <= {round(row.tdp_w)}:
            return row
    family = [other for other in catalogue if other.lower().split("-")[0] == core]
    raise UnknownNameError(
        "GPU", name, sorted(family, key=_modules_first) or catalogue, hint="gpus", like=core
    )


def _modules_first(name: str) -> tuple[bool, str]:
    return (not name.endswith("SXM"), name)


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower().replace("blackwell ultra", ""))


def _keys(name: str) -> tuple[str, str]:
    """A name folded whole, and without the words that never count."""
    words = _words(name)
    return "".join(words), "".join(w for w in words if w not in _FILLER)


def _split(words: list[str]) -> tuple[str, set[int], set[int]]:
    """The name without filler, and the memory sizes [GB] and powers [W] it gave."""
    kept, sizes, watts = [], set(), set()
    for word in words:
        if word in _FILLER:
            continue
        if memory := _MEMORY_WORD.fullmatch(word):
            sizes.add(int(memory[1]))
        elif power := _POWER_WORD.fullmatch(word):
            watts.add(int(power[1]))
        else:
            kept.append(word)
    return "".join(kept), sizes, watts


def _sizes(row: Gpu) -> frozenset[int]:
    """Sizes [GB] a name may give for this GPU: the label's, and the driver's in binary and decimal units."""
    decimal = row.memory_bytes / GIGA
    binary = row.memory_bytes / _MIB / 1024
    return frozenset({round(row.memory_gb), *_around(decimal), *_around(binary)})


def _around(value: float) -> tuple[int, int]:
    return math.floor(value), math.ceil(value)


@cache
def _spellings() -> Mapping[str, str]:
    """Folded spelling → canonical name; a spelling of two rows is an error in the data."""
    index: dict[str, str] = {}
    for row in _catalogue().values():
        for text in (row.name, *row.spellings):
            key, _ = _keys(text)
            if index.setdefault(key, row.name) != row.name:
                raise InputError(f"gpus.yaml: spelling {text!r} is claimed by {index[key]} and {row.name}")
    return MappingProxyType(index)


@cache
def _catalogue() -> Mapping[str, Gpu]:
    text = resources.files("pertoken.catalog").joinpath("data/gpus.yaml").read_text(encoding="utf-8")
    raw = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    rows: dict[str, Gpu] = {}
    for entry in raw["gpus"]:
        row = _row(entry, raw["host_power"], str(raw["checked"]))
        for problem in _problems(row):
            raise InputError(f"gpus.yaml: {row.name}: {problem}")
        if row.name in rows:
            raise InputError(f"gpus.yaml: {row.name} appears twice")
        rows[row.name] = row
    return MappingProxyType(rows)


def _row(entry: Mapping[str, Any], host_power: Mapping[str, Any], checked: str) -> Gpu:
    host = host_power[entry["host"]]
    return Gpu(
        name=entry["name"],
        vendor=entry["vendor"],
        architecture=entry["architecture"],
        memory_gb=float(entry["memory_gb"]),
        memory_bytes_per_s=entry["memory_gb_per_s"] * GIGA,
        flops={p: rate * TERA for p, rate in entry["dense_tflops"].items()},
        intra_node_bytes_per_s=entry["intra_node_gb_per_s"] * GIGA,
        inter_node_bytes_per_s=entry["inter_node_gb_per_s"] * GIGA,
        gpus_per_node=entry["gpus_per_node"],
        tdp_w=float(entry["tdp_w"]),
        idle_w=float(entry["idle_w"]),
        host_idle_w=float(host["idle_w"]),
        host_busy_w=float(host["busy_w"]),
        released=str(entry["released"]),
        sources=tuple(entry["sources"]),
        checked=str(entry.get("checked", checked)),
        memory_bytes=float(entry["memory_mib"] * _MIB),
        scale_up_gpus=entry["scale_up_gpus"],
        spellings=tuple(entry["spellings"]),
        notes=tuple(entry.get("notes", ())),
        power_notes={"idle_w": entry["idle"], "host_w": host["note"]},
    )


def _problems(row: Gpu) -> Iterator[str]:
    """What is wrong with a row; nothing where it keeps every rule."""
    positive = {
        "memory_gb": row.memory_gb,
        "memory_bytes": row.memory_bytes,
        "memory_bytes_per_s": row.memory_bytes_per_s,
        "intra_node_bytes_per_s": row.intra_node_bytes_per_s,
        "inter_node_bytes_per_s": row.inter_node_bytes_per_s,
        "gpus_per_node": row.gpus_per_node,
        "tdp_w": row.tdp_w,
        "idle_w": row.idle_w,
        **{f"flops {p}": rate for p, rate in row.flops.items()},
    }
    yield from (f"{what} is {v}, not positive" for what, v in positive.items() if not 0 < v < math.inf)
    yield from (f"unknown precision {p!r}" for p in row.flops if p not in PRECISIONS)
    if "bf16" not in row.flops:
        yield "no bf16 rate"
    for low, high in (("bf16", "fp8"), ("fp8", "fp4")):
        if row.flops.get(high, math.inf) < row.flops.get(low, 0.0):
            yield f"{high} is slower than {low}: a sparse number among dense ones?"
    if not 0.7 <= row.memory_bytes / (row.memory_gb * GIGA) <= 1.08:
        yield "memory_mib does not fit memory_gb"
    if not 0 < row.idle_w < row.tdp_w:
        yield "idle_w is not below tdp_w"
    if not 0 <= row.host_idle_w <= row.host_busy_w:
        yield "host_idle_w is not between 0 and host_busy_w"
    if row.scale_up_gpus < row.gpus_per_node:
        yield "scale_up_gpus is below gpus_per_node"
    if row.intra_node_bytes_per_s < row.inter_node_bytes_per_s:
        yield "the link inside the node is slower than the one out of it"
    yield from (f"{what} has no basis" for what, t in row.power_notes.items() if not t.startswith(_BASES))
    if len(row.sources) < 2:
        yield "fewer than two sources"
    for what, day in (("released", row.released), ("checked", row.checked)):
        try:
            date.fromisoformat(day)
        except ValueError:
            yield f"{what} is {day!r}, not a date"
