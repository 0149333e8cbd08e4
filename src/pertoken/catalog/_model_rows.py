"""The model rows of the catalogue, read once, and the names people give them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

from pertoken.catalog._architecture import Architecture, Encoder, Mixer, Moe, build
from pertoken.catalog.models import Model
from pertoken.errors import UnknownNameError

_MAKERS = frozenset({"meta", "nvidia", "amd", "ibm", "google"})
"""Words some publishers put before the model's own name."""

_TUNED = frozenset(
    {"instruct", "base", "chat", "it", "hf", "thinking", "pt", "text", "preview", "99", "99.9"}
)
"""Words for a tuning, a preview or an accuracy target of MLPerf (``llama2-70b-99.9``) that leave the architecture as
it is."""

_QUANTISED = {
    "fp8": "fp8",
    "mxfp8": "fp8",
    "fp4": "fp4",
    "nvfp4": "fp4",
    "mxfp4": "fp4",
    "awq": "int4",
    "gptq": "int4",
    "int4": "int4",
    "w4a16": "int4",
    "int8": "int8",
    "w8a8": "int8",
    "4bit": "int4",
    "8bit": "int8",
    "bnb": "int4",
    "bf16": "bf16",
    "fp16": "bf16",
}
"""NAME_MAP of suffixes to our precisions."""

_HOW = frozenset({"static", "dynamic", "block", "pertensor", "kv", "v2", "tensor", "per"})
"""Words that say how a checkpoint was quantised; they count as such only after a precision."""

_WEIGHTS_AND_ACTIVATIONS = re.compile(r"-w-(\w+)-a-\w+$")
"""Quark's names: gpt-oss-120b-w-mxfp4-a-fp8 is stored in MXFP4."""
_DATE = re.compile(r"2[3-9](0[1-9]|1[0-2])|(0[1-9]|1[0-2])([0-2]\d|3[01])|20\d{6}")
_RUNS = re.compile(r"\d+(?:\.\d+)*[bmtke]?(?![a-z])|\d+(?:\.\d+)*|[a-z]+")


@cache
def _texts() -> dict[str, str]:
    """The text of each row by its name; a row begins where a line is not indented.

    Parsing the whole file takes 0.2 s where libyaml is missing; one row takes 1 ms.
    """
    text = files("pertoken.catalog").joinpath("data", "models.yaml").read_text(encoding="utf-8")
    return {row.partition(":")[0]: row for row in re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]}


@cache
def _row(name: str) -> dict[str, Any]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    row: dict[str, Any] = yaml.load(_texts()[name], Loader=loader)[name]
    return {**_row(row.pop("like")), **row} if "like" in row else row


@cache
def _aliases(name: str) -> tuple[str, ...]:
    line = re.search(r"^  aliases: \[(.*)\]$", _texts()[name], flags=re.MULTILINE)
    return tuple(line[1].split(", ")) if line else ()


@cache
def _build(name: str) -> Model:
    row = dict(_row(name))
    row.pop("aliases", None)
    moe = Moe(**row.pop("moe")) if "moe" in row else None
    mixers = tuple(Mixer(**m) for m in row.pop("mixers"))
    row["encoders"] = tuple(Encoder(**e) for e in row.pop("encoders", ()))
    row.setdefault("ffn_layers", row["layers"] - (moe.layers if moe else 0))
    row["sources"], row["checked"] = tuple(row["sources"]), str(row["checked"])
    return build(Architecture(name=name, mixers=mixers, moe=moe, **row))


@cache
def models() -> Mapping[str, Model]:
    return {name: _build(name) for name in _texts()}


@lru_cache(maxsize=1024)
def model(name: str) -> Model:
    index = _index()
    row = next((index[key] for key in _keys(name) if key in index), None)
    if row is None:
        raise UnknownNameError("model", name, _texts() if "/" in name else _known(), hint="models")
    found = _build(row)
    wanted = precision(name)
    if not wanted or wanted == found.native_precision:
        return found
    latent = any(a.prefill_flops_per_context_token for a in found.attention)
    # published FP4 checkpoints leave latent attention in bf16
    attention = "bf16" if latent and wanted == "fp4" else ""
    return replace(found, native_precision=wanted, attention_precision=attention)


def precision(name: str) -> str:
    """The precision a checkpoint's name states; empty where it states none.

    >>> precision("nvidia/Qwen3.6-27B-NVFP4")
    'fp4'
    """
    found = [_QUANTISED[word] for word in _words(name)[1:] if word in _QUANTISED]
    return found[-1] if found else ""


def _known() -> Iterable[str]:
    for name in _texts():
        yield name.rpartition("/")[2]
        yield from _aliases(name)


@cache
def _index() -> dict[str, str]:
    """Keys of all names and aliases to rows; an exact name wins over one with words left out."""
    names = [(_keys(alias), row) for row in _texts() for alias in (row, *_aliases(row))]
    index: dict[str, str] = {}
    for strictness in range(len(names[0][0])):
        for keys, row in names:
            index.setdefault(keys[strictness], row)
    return index


def _words(name: str) -> list[str]:
    """The words of a name's last part, lower case, without the maker.

    >>> _words("nvidia/NVIDIA-Nemotron-Nano-9B-v2")
    ['nemotron', 'nano', '9b', 'v2']
    """
    last = name.strip().rpartition("/")[2].lower().replace("quantized.", "")
    last = _WEIGHTS_AND_ACTIVATIONS.sub(r"-\1", last)
    words = [w for w in re.split(r"[-_\s:@]+", last) if w]
    return words[1:] if len(words) > 1 and words[0] in _MAKERS else words


def _key(words: Iterable[str]) -> str:
    """Words as runs of letters and numbers: LLAMA3.1_405B and Llama-3.1-405B meet, Llama-27b stays apart.

    >>> _key(["deepseekv3"]), _key(["deepseek", "v3"]), _key(["llama", "2", "7b"]), _key(["llama", "27b"])
    ('deepseekv 3', 'deepseekv 3', 'llama 2 7b', 'llama 27b')
    """
    runs: list[str] = []
    for word in words:
        for run in _RUNS.findall(word):
            if runs and run.isalpha() and runs[-1].isalpha():
                runs[-1] += run
            else:
                runs.append(run)
    return " ".join(runs)


def _keys(name: str) -> tuple[str, str, str]:
    """The key of a name as written, without the words of quantisation, without those of tuning and date too.

    >>> _keys("Qwen3-30B-A3B-Instruct-2507-FP8")
    ('qwen 3 30b a 3b instruct 2507 fp 8', 'qwen 3 30b a 3b instruct 2507', 'qwen 3 30b a 3b')
    """
    words = _words(name)
    kept, quantised = words[:1], False
    for word in words[1:]:
        quantised |= word in _QUANTISED
        if word not in _QUANTISED and not (quantised and word in _HOW):
            kept.append(word)
    plain = [word for word in kept if word not in _TUNED]
    if any(char.isdigit() for word in plain if not _DATE.fullmatch(word) for char in word):
        # a name without a size or version is told apart by its date alone (Mistral-Large-2407)
        plain = [word for word in plain if not _DATE.fullmatch(word)]
    return _key(words), _key(kept), _key(plain)
