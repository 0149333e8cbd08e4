"""One model under several names: the one rule by which two names are the same model. In doubt they are two."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from pertoken import catalog
from pertoken.errors import UnknownNameError

_MOST = 200
"""Names of one pool and hour that are looked up in the catalogue: nobody's flood of names makes a close slow."""
_SEPARATORS = re.compile(r"[-_:\s]+")
_NUMBERED = re.compile(r"(?<=[a-z])(?=\d)")
_NO_MAKER = {
    "",
    ".",
    "models",
    "model",
    "hosted_vllm",
    "vllm",
    "sglang",
    "litellm_proxy",
    "ollama",
    "library",
}
"""What stands before a slash and is nobody who makes models: folders and routes."""
_TUNED = frozenset({"instruct", "chat", "it"})
_PRECISIONS = frozenset(
    (
        *("fp4", "fp8", "fp16", "bf16", "int4", "int8", "nvfp4", "mxfp4", "w4a16", "w8a8", "w8a16"),
        *("awq", "gptq", "dynamic", "quantized"),
    )
)


@dataclass(frozen=True)
class _Name:
    maker: str
    spelling: str
    core: tuple[str, ...]
    """The spelling without variants at its end. Sizes, dates, `coder`, `thinking`, `base` are the model's own."""
    variants: frozenset[str]


def known_as(name: str, known: Collection[str]) -> str:
    """The name among `known` of the model `name`; empty where none is, or those there are might be two models.

    The same to the letter; else but for case, separators and a maker one of them leaves out; else but for what is
    left out of a nickname, tuning or precision, where the catalogue has both as the same model. Two makers, sizes,
    dates or trades (coder, thinking, base) are two models; a nickname of a tuned model tells no maker, for with one
    it is the base's own name.

    >>> known_as("TINY", ["org/tiny", "other"]), known_as("llama3.3:70b", ["meta-llama/Llama-3.3-70B-Instruct"])
    ('org/tiny', 'meta-llama/Llama-3.3-70B-Instruct')
    >>> known_as("Qwen2.5-Coder-32B", ["Qwen2.5-32B"]), known_as("tiny", ["a/tiny", "b/tiny"]), known_as("a/x", ["b/x"])
    ('', '', '')
    """
    if name in known:
        return name
    index = _by_core(known)
    alike = _spelled(name, index) or _Looks().up(name, index)
    return alike[0] if _one(alike) else ""


def renamed(
    names: Iterable[str],
    known: Collection[str],
    elsewhere: Collection[str] = (),
    amounts: Mapping[str, float] | None = None,
) -> dict[str, str]:
    """Those of `names` that are models of `known` under another name, with that name.

    Parameters: names, as told; known, names of one place; elsewhere, names other places serve: one of these is
    renamed nowhere else, and a nickname of one is that one's; amounts, of use, the largest are looked up first.
    """
    strange = _largest_first(set(names) - set(known) - set(elsewhere), amounts or {})
    if not strange:
        return {}
    here, there = _by_core(known), _by_core(elsewhere)
    found, looked = {}, _Looks()
    for name in strange:
        alike = _spelled(name, here)
        if not alike and not _spelled(name, there):
            alike = looked.up(name, here)
        if len(alike) == 1:
            found[name] = alike[0]
    return found


def renamed_in(
    amounts: Mapping[str, float], served: Mapping[str, Collection[str]], elsewhere: Collection[str] = ()
) -> dict[str, dict[str, str]]:
    """By place, the name it serves a model under that was told with no place: the same model in all of them, or none.

    Parameters: amounts of use by name; served, names by place; elsewhere, names that have their place already.

    >>> renamed_in({"tiny": 1, "chat": 1}, {"A": ["org/tiny", "acme/chat"], "B": ["Tiny", "other/chat"]})
    {'A': {'tiny': 'org/tiny'}, 'B': {'tiny': 'Tiny'}}
    """
    everywhere = {name for names in served.values() for name in names}
    index, looked = _by_core(everywhere | set(elsewhere)), _Looks()
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in _largest_first(set(amounts) - everywhere - set(elsewhere), amounts):
        alike = _spelled(name, index) or looked.up(name, index)
        if not _one(alike):
            continue
        for place, names in served.items():
            mine = [other for other in alike if other in names]
            if len(mine) == 1:
                found[place][name] = mine[0]
    return dict(found)


def under_two_names(names: Iterable[str]) -> list[list[str]]:
    """Names that may be one model, together: alike but for case, separators, the maker, or tuning left out.

    >>> under_two_names(["tiny", "org/Tiny", "other", "a/chat", "b/chat", "Qwen2.5-32B", "Qwen2.5-Coder-32B"])
    [['org/Tiny', 'tiny']]
    >>> under_two_names(["llama-3.3-70b", "meta-llama/Llama-3.3-70B-Instruct", "nvidia/Llama-3.3-70B-Instruct-FP8"])
    [['llama-3.3-70b', 'meta-llama/Llama-3.3-70B-Instruct']]
    """
    groups: dict[tuple[tuple[str, ...], frozenset[str]], dict[str, list[str]]] = defaultdict(dict)
    for name in sorted(set(names))[:_MOST]:
        mine = _read(name)
        # Precisions beside each other are two models: each has its own engine.
        groups[mine.core, mine.variants & _PRECISIONS].setdefault(mine.spelling, []).append(name)
    found = []
    for spelled in groups.values():
        whole = sorted(name for alike in spelled.values() for name in alike)
        found += [whole] if _nicknames(whole) else [alike for alike in spelled.values() if _one(alike)]
    return [alike for alike in found if len(alike) > 1]


def may_be_one(names: Sequence[str]) -> str:
    """What to say of names that may be one model."""
    named = " and ".join(repr(name[:100]) for name in names[:3])
    return f"{named} may be one model: if they are, give their sources `names` that make them one"


def _nicknames(names: Collection[str]) -> bool:
    """Whether names leave out what others of them tell, and are one model of the catalogue."""
    pairs = combinations(map(_read, names), 2)
    return all(_left_out(*pair) for pair in pairs) and len({_catalogued(n) or n for n in names}) == 1


class _Looks:
    """Nicknames, by the catalogue, so many of them and no more."""

    def __init__(self) -> None:
        self._left = _MOST

    def up(self, name: str, index: Mapping[tuple[str, ...], list[str]]) -> list[str]:
        """Names of which one leaves out tuning or precision that the other tells."""
        near = [other for other in index.get(_read(name).core, ()) if _left_out(_read(name), _read(other))]
        if not near or not self._left:
            return []
        self._left -= 1
        mine = _catalogued(name)
        return [other for other in near if mine and _catalogued(other) == mine]


def _largest_first(names: Collection[str], amounts: Mapping[str, float]) -> list[str]:
    return sorted((n for n in names if n), key=lambda n: (-amounts.get(n, 0.0), n))


def _by_core(names: Iterable[str]) -> dict[tuple[str, ...], list[str]]:
    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in sorted(set(names)):
        found[_read(name).core].append(name)
    return found


def _spelled(name: str, index: Mapping[tuple[str, ...], list[str]]) -> list[str]:
    """Names that differ in case, separators, or a maker one of them leaves out."""
    mine = _read(name)
    near = ((other, _read(other)) for other in index.get(mine.core, ()))
    return [other for other, theirs in near if theirs.spelling == mine.spelling and _may(mine, theirs)]


def _may(one: _Name, other: _Name) -> bool:
    return not one.maker or not other.maker or one.maker == other.maker


def _left_out(one: _Name, other: _Name) -> bool:
    short, long = sorted((one, other), key=lambda n: len(n.variants))
    more = long.variants - short.variants
    return _may(one, other) and short.variants <= long.variants and not (short.maker and more & _TUNED)


def _one(names: Collection[str]) -> bool:
    """Whether names that all are like another are like each other, too."""
    read = [_read(name) for name in names]
    return len({n.spelling for n in read}) == 1 and len({n.maker for n in read if n.maker}) <= 1


@lru_cache(maxsize=4096)
def _read(name: str) -> _Name:
    before, _, last = name.casefold().rpartition("/")
    maker = "/".join(part for part in before.split("/") if part not in _NO_MAKER)
    parts = [part for part in _SEPARATORS.split(last) if part]
    at = len(parts)
    while at > 1 and parts[at - 1] in _TUNED | _PRECISIONS:
        at -= 1
    core = tuple(piece for part in parts[:at] for piece in _NUMBERED.split(part))
    return _Name(maker, "-".join(parts), core, frozenset(parts[at:]))


@lru_cache(maxsize=4096)
def _catalogued(name: str) -> str:
    """The catalogue's name; empty where it has none."""
    try:
        return catalog.model(name).name
    except UnknownNameError:
        return ""
