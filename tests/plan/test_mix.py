"""GPU mixes in slices: what rounding finds is a whole-sliced plan of the bound's cost, else the program decides."""

from __future__ import annotations

import numpy as np
import pytest

from pertoken.errors import CannotServeError
from pertoken.plan import _mix
from pertoken.plan._mix import mix
from pertoken.plan._solve import Watch


def _case(seed: int, types: int, buckets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    speed = random.uniform(1, 20, types)
    usd = speed * random.uniform(0.1, 0.2, types)
    rate = speed[:, None] * random.uniform(0.2, 1.5, (types, buckets))
    rate[:, 1:][random.random((types, buckets - 1)) < 0.2] = 0.0
    rate[0] = np.maximum(rate[0], 0.3)
    return usd, rate, random.uniform(0, 3, buckets)


def _holds(found: _mix.Mix, rate: np.ndarray, requests: np.ndarray, slices: int) -> None:
    assert found.share.sum(axis=0) == pytest.approx(np.ones(len(requests)))
    assert found.share * slices == pytest.approx(np.round(found.share * slices), abs=1e-6)
    load = np.divide(requests, rate, out=np.zeros_like(rate), where=rate > 0)
    assert (found.share[rate == 0] == 0).all()
    assert ((found.share * load).sum(axis=1) <= found.gpus + 1e-6).all()


@pytest.mark.parametrize("seed", range(12))
def test_slices_cost_what_the_whole_program_costs(seed: int) -> None:
    usd, rate, requests = _case(seed, 3, 6)
    found = mix(usd, rate, requests, slices=4)
    _holds(found, rate, requests, 4)
    watch = Watch(60.0)
    counts, _, _ = _mix._solved(usd, rate, requests, 4, None, 0.0, watch)
    assert found.usd_per_hour == pytest.approx(float(usd @ counts), rel=1e-6)
    assert found.usd_per_hour >= mix(usd, rate, requests).usd_per_hour - 1e-9


def test_what_rounding_cannot_do_the_program_does() -> None:
    """A GPU of each type and three equal buckets: any share fills both, whole buckets need two GPUs of one type."""
    usd, rate = np.array([1.0, 1.5]), np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    requests = np.array([2 / 3, 2 / 3, 2 / 3])
    assert mix(usd, rate, requests, most=np.array([1.0, 1.0])).usd_per_hour == pytest.approx(2.5)
    with pytest.raises(CannotServeError, match="too few GPUs"):
        mix(usd, rate, requests, slices=1, most=np.array([1.0, 1.0]))
    found = mix(usd, rate, requests, slices=1, most=np.array([1.0, 2.0]))
    _holds(found, rate, requests, 1)
    assert found.usd_per_hour == pytest.approx(3.0)
