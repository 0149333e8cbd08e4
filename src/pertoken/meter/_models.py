"""One model under several names: the one rule by which two names are the same model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from functools import lru_cache

from pertoken import catalog
from pertoken.errors import UnknownNameError

_MOST = 200
"""Names of one pool and hour that are looked up in the catalogue: nobody's flood of names makes a close slow."""


def known_as(name: str, known: Collection[str]) -> str:
    """The one of `known` that is the model `name`; empty where none is, or two might be.

    The same to the letter; else without the maker and in any case; else the same model and precision of the
    catalogue, whose names have variants; else the same model of the catalogue.

    >>> known_as("TINY", ["org/tiny", "other"]), known_as("llama-3.3-70b", ["meta-llama/Llama-3.3-70B-Instruct"])
    ('org/tiny', 'meta-llama/Llama-3.3-70B-Instruct')
    >>> known_as("Qwen3-8B", ["Qwen3-32B"]), known_as("tiny", ["a/tiny", "b/tiny"])
    ('', '')
    """
    if name in known:
        return name
    for alike in (_bare, _catalogued, _model):
        mine = alike(name)
        found = [other for other in known if mine and alike(other) == mine]
        if found:
            return found[0] if len(found) == 1 else ""
    return ""


def renamed(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Those of `names` that are models of `known` under another name, with that name."""
    strange = sorted(set(names) - set(known) - {""})[:_MOST]
    return {name: found for name in strange if (found := known_as(name, known))}


def under_two_names(names: Iterable[str]) -> list[list[str]]:
    """Names that are one model in one precision, together.

    >>> under_two_names(["tiny", "org/Tiny", "other"])
    [['org/Tiny', 'tiny']]
    """
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names)[:_MOST]:
        found[_catalogued(name) or _bare(name)].append(name)
    return [alike for alike in found.values() if len(alike) > 1]


def _bare(name: str) -> str:
    return name.rpartition("/")[2].casefold()


@lru_cache(maxsize=4096)
def _catalogued(name: str) -> str:
    """Model and precision of the catalogue; empty where it has none."""
    try:
        found = catalog.model(name)
    except UnknownNameError:
        return ""
    return f"{found.name} {found.native_precision}"


def _model(name: str) -> str:
    return _catalogued(name).partition(" ")[0]
