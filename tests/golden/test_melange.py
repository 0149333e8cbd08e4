"""The published example of Mélange, the heterogeneous-GPU allocator.

Griggs et al., "Mélange: Cost Efficient Large Language Model Serving by Exploiting GPU Heterogeneity" (arXiv
2404.14527); example configuration of its solver: A10G at 1.01 USD/h, A100-80GB at 3.67 USD/h, 30 requests/s,
slice factor 1. Its optimum: 3 × A10G + 1 × A100-80GB, 6.70 USD/h.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from pertoken.errors import CannotServeError, InputError
from pertoken.plan._mix import mix

USD_PER_HOUR = np.array([1.01, 3.67])
RATE = np.array([[2.0, 1.0, 5.0, 2.0], [20.0, 20.0, 40.0, 20.0]])
REQUESTS = 30 * np.array([0.2, 0.1, 0.5, 0.2])


def test_published_example() -> None:
    found = mix(USD_PER_HOUR, RATE, REQUESTS, slices=1)
    assert found.gpus.tolist() == [3, 1]
    assert found.usd_per_hour == pytest.approx(6.70, abs=1e-9)
    assert np.allclose(found.share.sum(axis=0), 1.0)
    assert np.isin(np.round(found.share, 6), [0.0, 1.0]).all()


def test_any_share_is_never_dearer_than_slices() -> None:
    prices = [mix(USD_PER_HOUR, RATE, REQUESTS, slices=s).usd_per_hour for s in (1, 2, 4, 8, 0)]
    assert prices == sorted(prices, reverse=True)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_equals_trying_every_count(seed: int) -> None:
    random = np.random.default_rng(seed)
    usd, rate = random.uniform(0.5, 4, 3), random.uniform(0.5, 9, (3, 4))
    requests = random.uniform(0.2, 3, 4)
    found = mix(usd, rate, requests)
    best = np.inf
    for counts in itertools.product(range(8), repeat=3):
        cost = float(usd @ counts)
        if cost < best and _carries(np.array(counts), rate, requests):
            best = cost
    assert found.usd_per_hour == pytest.approx(best, rel=1e-9)
    assert ((found.share * requests / rate).sum(axis=1) <= found.gpus + 1e-6).all()


def _carries(counts: np.ndarray[tuple[int], np.dtype[np.int64]], rate: object, requests: object) -> bool:
    """Whether those GPUs serve all requests: a transport problem by another solver's front end."""
    need = np.asarray(requests) / np.asarray(rate)
    G, B = need.shape
    upper = np.zeros((G, G * B))
    equal = np.zeros((B, G * B))
    for g in range(G):
        upper[g, g * B : (g + 1) * B] = need[g]
    for b in range(B):
        equal[b, b::B] = 1.0
    return bool(
        linprog(np.zeros(G * B), A_ub=upper, b_ub=counts + 1e-9, A_eq=equal, b_eq=np.ones(B)).status == 0
    )


def test_what_cannot_be_served_is_named() -> None:
    rate = RATE.copy()
    rate[:, 2] = 0.0
    with pytest.raises(CannotServeError, match="bucket 2"):
        mix(USD_PER_HOUR, rate, REQUESTS)
    with pytest.raises(CannotServeError, match="too few GPUs"):
        mix(USD_PER_HOUR, RATE, REQUESTS, most=np.array([1.0, 0.0]))
    with pytest.raises(InputError, match="expected"):
        mix(USD_PER_HOUR, RATE[:, :2], REQUESTS)
