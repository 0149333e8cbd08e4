"""Splitting a quantity into parts that add up to it, to the last digit."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from decimal import ROUND_HALF_EVEN, Decimal
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

MICRO = 1_000_000
"""Steps per unit: quantities are DECIMAL(19, 6)."""


def quantised(quantity: float) -> int:
    """A quantity in millionths, rounded half to even.

    >>> quantised(8.0), quantised(0.0000004)
    (8000000, 0)
    """
    return int((Decimal(quantity) * MICRO).to_integral_value(ROUND_HALF_EVEN))


def split(total: int, weights: Mapping[Key, float], step: int = 1) -> dict[Key, int]:
    """`total` in whole steps, in proportion to the weights, by largest remainder; equal ones in order of
    their key.

    Parameters: total and step [millionths]; total a multiple of step; weights not negative, one at least
    positive. The parts add up to the total exactly. Parts of zero are left out.

    >>> split(10, {"a": 1.0, "b": 1.0, "c": 1.0})
    {'a': 4, 'b': 3, 'c': 3}
    """
    whole = total // step
    mass = sum(weights.values())
    exact = {key: whole * (weight / mass) for key, weight in weights.items() if weight > 0}
    parts = {key: int(value) for key, value in exact.items()}
    left = whole - sum(parts.values())
    order = sorted(exact, key=lambda key: (parts[key] - exact[key], str(key)))
    for key in order[:left] if left > 0 else []:
        parts[key] += 1
    for key in reversed(order[left:] if left < 0 else []):  # a float product rounded past its whole number
        parts[key] -= 1
    return {key: value * step for key, value in parts.items() if value}


def explained(
    total: int, told: Mapping[Key, int], rest: Key, step: int = MICRO
) -> tuple[dict[Key, int], int]:
    """A total beside what others told of its parts: their parts as told, what they do not cover under `rest`.

    Where they tell more than there is, their parts are scaled down to the total. Also returns told − total.

    >>> explained(10, {"a": 4}, "", step=1), explained(10, {"a": 15, "b": 5}, "", step=1)
    (({'a': 4, '': 6}, -6), ({'a': 8, 'b': 2}, 10))
    """
    known = sum(told.values())
    if known > total:
        parts = split(total, {k: float(v) for k, v in told.items()}, step) if total else {}
        return parts, known - total
    parts = {key: value for key, value in told.items() if value}
    if total > known:
        parts[rest] = parts.get(rest, 0) + total - known
    return parts, known - total
