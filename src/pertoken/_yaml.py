"""YAML from a human: parsed with line numbers, so that every complaint says where."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pertoken.errors import ScenarioError, nearest

MAX_BYTES = 1 << 20
SENT_BYTES = 1 << 16
_SENT_DEPTH, _SENT_ENTRIES = 20, 100
"""How deep a text from the network may be nested, and how many entries a list or mapping in it may have."""


class MisplacedError(ValueError):
    """A value that does not fit what stands elsewhere in the document; `place` is the path of keys to it."""

    def __init__(self, message: str, *place: str) -> None:
        super().__init__(message)
        self.place = place


Document = TypeVar("Document", bound=BaseModel)


def load_yaml(path: Path, kind: type[Document]) -> Document:
    """A YAML file as the pydantic model `kind`; relative paths in it are seen from its folder.

    Raises ScenarioError naming file, line, field, what was found and what fits.
    """
    return _parse(_read(path), kind, str(path), {"folder": path.parent})


def parse_yaml(text: str, kind: type[Document], name: str, files: Mapping[str, Path]) -> Document:
    """YAML that came over a network as the pydantic model `kind`, complained of under a `name`.

    It opens no file but those of `files`, by the path as it is written; it is short, flat and without aliases, so
    that reading it costs little whatever is in it. Raises ScenarioError as `load_yaml` does.
    """
    size = len(text.encode("utf-8", "replace"))
    if size > SENT_BYTES:
        raise ScenarioError(f"{name}: {size} bytes are too many: at most {SENT_BYTES} are taken here")
    return _parse(text, kind, name, {"files": files}, sent=True)


def _parse(
    text: str, kind: type[Document], name: str, context: dict[str, Any], *, sent: bool = False
) -> Document:
    node = None
    try:
        if sent:
            _refuse_costly(text, name)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_duplicates(node, name)
        data = yaml.load(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}" if mark else ""
        raise ScenarioError(f"{name}{where}: not YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ValueError) and (scalar := _unreadable(node)):
            line = scalar.start_mark.line + 1
            raise ScenarioError(f"{name}:{line}: {_found(scalar.value)} cannot be read: {error}") from error
        raise ScenarioError(f"{name}: not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict):
        raise ScenarioError(f"{name}: a {_word(kind)} is a mapping of fields, found {_found(data)}")
    try:
        return kind.model_validate(data, context=context)
    except ValidationError as error:
        told, field = _explain(error, name, node, kind)
        raise ScenarioError(told, field) from error


def _word(kind: type[BaseModel]) -> str:
    """What a document is called: the last word of its model's name."""
    return str(re.findall("[A-Z][a-z]*", kind.__name__)[-1]).lower()


def _unreadable(node: yaml.Node | None) -> yaml.ScalarNode | None:
    """The first value that looks like a date or a number and is none, such as 2027-02-30."""
    if isinstance(node, yaml.ScalarNode):
        try:
            yaml.SafeLoader("").construct_object(node)
        except ValueError:
            return node
        return None
    if isinstance(node, yaml.CollectionNode):
        for part in node.value:
            for one in part if isinstance(part, tuple) else (part,):
                if found := _unreadable(one):
                    return found
    return None


def _refuse_costly(text: str, name: str) -> None:
    """Look at the parser's events, one at a time, before anything is built of them."""
    entries: list[int] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ScenarioError(
                f"{name}:{line}: anchors and aliases (& and *) are not taken here: write it out"
            )
        if isinstance(event, yaml.CollectionEndEvent):
            entries.pop()
        elif isinstance(event, yaml.NodeEvent):
            if entries:
                entries[-1] += 1
                if entries[-1] > 2 * _SENT_ENTRIES:
                    raise ScenarioError(
                        f"{name}:{line}: a list or mapping has at most {_SENT_ENTRIES} entries here"
                    )
            if isinstance(event, yaml.CollectionStartEvent):
                entries.append(0)
                if len(entries) > _SENT_DEPTH:
                    raise ScenarioError(f"{name}:{line}: nested deeper than {_SENT_DEPTH} levels")


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise ScenarioError(f"{path}: not a file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ScenarioError(f"{path}: {size} bytes is no scenario: at most {MAX_BYTES} are read")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        siblings = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hits = nearest(str(path), siblings)
        hint = f": did you mean {', '.join(hits)}?" if hits else ""
        raise ScenarioError(f"no file at {path}{hint}") from error
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}: not text: byte {error.start} is not UTF-8") from error
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read: {error.strerror}") from error


def _refuse_duplicates(node: yaml.Node | None, name: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, name)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if str(key.value) in seen:
                first = seen[str(key.value)]
                raise ScenarioError(f"{name}:{line}: {key.value!r} is given twice, first on line {first}")
            seen[str(key.value)] = line
            _refuse_duplicates(value, name)


def _explain(
    error: ValidationError, name: str, node: yaml.Node | None, kind: type[BaseModel]
) -> tuple[str, str]:
    """The complaint, and the field it is about."""
    problems = error.errors(include_url=False)

    def furthest(problem: Any) -> tuple[bool, int, bool]:
        depth = len(_position(node, problem["loc"])[1])
        return problem["type"] != "missing", depth, problem["type"] != "extra_forbidden"

    # A union reports one problem per member: keep the one that got furthest into the document; of those at one
    # place, the one whose member knows the field.
    first = max(problems, key=furthest)
    cause = first.get("ctx", {}).get("error")
    place = (*first["loc"], *(cause.place if isinstance(cause, MisplacedError) else ()))
    line, known = _position(node, place)
    field = ".".join(known) or "(top)"
    message = first["msg"].removeprefix("Value error, ")
    last = str(first["loc"][-1]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        fits = nearest(last, _fields_at(kind, first["loc"][:-1]))
        hint = f": did you mean {', '.join(fits)}?" if fits else ""
        if not fits and len(first["loc"]) == 1:
            hint = f": a {_word(kind)} has {', '.join(_fields_at(kind, ()))}"
        message = f"unknown field{hint}"
    elif first["type"] == "missing":
        field = ".".join([*known, last])
        message = "this field is missing"
    elif not isinstance(first["input"], dict):
        message += f"; found {_found(first['input'])}"
    more = len({p["loc"][:3] for p in problems}) - 1
    tail = f" (and {more} more)" if more > 0 else ""
    return f"{name}:{line}: {field}: {message}{tail}", field


def _position(node: yaml.Node | None, loc: tuple[int | str, ...]) -> tuple[int, list[str]]:
    """The line of the deepest node on the way, and the keys that are really in the document."""
    line = node.start_mark.line + 1 if node else 1
    known: list[str] = []
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if str(key.value) == str(part):
                    node, line = value, key.start_mark.line + 1
                    known.append(str(part))
                    break
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
            known.append(str(part))
    return line, known


def _fields_at(kind: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Names of the fields that fit at a place: all fields of the models the schema mentions along the way."""
    schema = kind.model_json_schema()
    definitions: dict[str, Any] = schema.get("$defs", {})
    here: list[dict[str, Any]] = [schema]
    for part in loc:
        deeper: list[dict[str, Any]] = []
        for place in here:
            options = _resolve(place, definitions)
            for option in options:
                child = option.get("properties", {}).get(part) or option.get("additionalProperties")
                child = child or next(iter(option.get("patternProperties", {}).values()), None)
                child = child or option.get("items")
                if isinstance(child, dict):
                    deeper.append(child)
        here = deeper or here
    names: list[str] = []
    for place in here:
        for option in _resolve(place, definitions):
            names += option.get("properties", {})
    return names


def _resolve(place: dict[str, Any], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in place:
        return _resolve(definitions[place["$ref"].rpartition("/")[2]], definitions)
    options = [*place.get("oneOf", []), *place.get("anyOf", [])]
    return [found for option in options for found in _resolve(option, definitions)] if options else [place]


def _found(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
