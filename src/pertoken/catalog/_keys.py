"""Reading keys of a foreign config: each with its type, its bounds, an error naming file, key and remedy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pertoken.errors import InputError

_LARGEST = 10**9
_MAX_BYTES = 50_000_000


class Keys:
    """The keys of one config object, read with checks. `path` and `prefix` are for the errors."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def error(self, key: str, found: object, remedy: str) -> InputError:
        shown = repr(found)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return InputError(f"{self.path}: key '{self.prefix}{key}' is {shown}: {remedy}")

    def first(self, *keys: str) -> str:
        """The first of these keys that is present; the first of them where none is."""
        return next((key for key in keys if key in self), keys[0])

    def whole(self, *keys: str, default: int | None = None, least: int = 1, most: int = _LARGEST) -> int:
        """A whole number under the first of these keys that is present."""
        key = self.first(*keys)
        value = self.values.get(key)
        if value is None:
            if default is not None:
                return default
            also = f" (or {', '.join(keys[1:])})" if len(keys) > 1 else ""
            raise InputError(
                f"{self.path}: key '{self.prefix}{key}'{also} is missing: "
                "use the config.json published with the checkpoint"
            )
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]  # one number per layer, all alike (Hunyuan, ERNIE)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(key, value, f"a whole number from {least} to {most} is needed")
        return value

    def number(self, *keys: str, default: float) -> float:
        key = self.first(*keys)
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _LARGEST:
            raise self.error(key, value, "a number of at least 0 is needed")
        return float(value)

    def flag(self, *keys: str, default: bool = False) -> bool:
        key = self.first(*keys)
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false is needed")
        return value

    def text(self, key: str, default: str = "") -> str:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, value, "a text is needed")
        return value

    def entries(self, key: str, length: int | None = None) -> list[Any]:
        """A list under that key; empty where absent. `length`: so many at least, the rest is cut (MTP)."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(key, value, "a list is needed")
        if length is not None and len(value) < length:
            raise self.error(
                key, f"a list of {len(value)}", f"one entry for each of {length} layers is needed"
            )
        return value if length is None else value[:length]

    def words(self, key: str, length: int | None = None) -> list[str]:
        """A list of texts under that key."""
        return [value for value in self.entries(key, length) if self._is(key, value, str, "a list of texts")]

    def numbers(self, key: str, length: int | None = None) -> list[int]:
        """A list of whole numbers, or of true and false, under that key."""
        return [
            value
            for value in self.entries(key, length)
            if self._is(key, value, int, "a list of whole numbers")
        ]

    def _is(self, key: str, value: object, kind: type, remedy: str) -> bool:
        if isinstance(value, kind) and not (isinstance(value, int) and value < 0):
            return True
        raise self.error(key, value, f"{remedy} is needed")

    def child(self, key: str) -> Keys | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, value, "an object is needed")
        return Keys(self.path, value, f"{self.prefix}{key}.")


def read_json(path: Path) -> Mapping[str, Any]:
    """The JSON object in that file. Raises InputError where it is missing, too large, broken or no object."""
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise InputError(f"{path}: {size} bytes is too large for a model config: give its config.json")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}): give a config.json") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not text: give a config.json") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: is not JSON (line {error.lineno}: {error.msg}): give a config.json"
        ) from error
    except RecursionError as error:
        raise InputError(f"{path}: is nested too deeply for a model config: give a config.json") from error
    if not isinstance(value, Mapping):
        raise InputError(f"{path}: holds a {type(value).__name__}, not an object: give a config.json")
    return value


def counted(items: Sequence[Any]) -> dict[Any, int]:
    """How often each item occurs, in order of first occurrence."""
    counts: dict[Any, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts
