"""Small planning instances, written out, for the planner's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pertoken.plan._instance import Instance, Peak, Rate

HOUR_US = 3_600_000_000


def instance(T: int = 4, **changes: Any) -> Instance:
    """Two pools of one-GPU machines (owned at a site with power bills; rented), an API, two classes, one job.

    Class 0 is served in its hour, class 1 may wait two hours. All numbers are small enough to check by hand.
    """
    t = np.arange(T)
    price = np.where(t % 2 == 0, 0.1, 0.4)
    flat = np.ones(T)
    rates = (
        Rate("own", "gpu_hours", "capital", 1.0 * flat),
        Rate("own", "energy_kwh", "energy_charge", price),
        Rate("rent", "gpu_hours", "rent", 3.0 * flat),
        Rate("rent", "energy_kwh", "energy_charge", 0.0 * flat),
        Rate("api", "input_tokens", "api", 2e-6 * flat),
        Rate("api", "output_tokens", "api", 8e-6 * flat),
        Rate("(site:home)", "peak_kw:day", "demand_charge", 2.0 * flat),
    )
    fields: dict[str, Any] = {
        "hours": np.datetime64("2026-03-02T00", "us") + t * np.timedelta64(HOUR_US, "us"),
        "previous": t - 1,
        "weight": flat,
        "pool_names": ("own", "rent", "api"),
        "held_names": ("own", "rent", "api"),
        "pool_site": np.array([0, -1, -1]),
        "machine_gpus": np.array([1, 1, 0]),
        "held_least": np.array([2, 0, 0]),
        "held_most": np.array([2, 0, 0]),
        "rented_most": np.array([[0.0], [2.0], [0.0]]) * flat,
        "machines_most": np.array([[2.0], [2.0], [0.0]]) * flat,
        "machine_kw": np.array([0.3, 0.3, 0.0]),
        "machine_gpu_kw": np.array([0.1, 0.1, 0.0]),
        "off_kw": np.array([0.05, 0.0, 0.0]),
        "pue": np.array([[1.4], [1.0], [1.0]]) * flat,
        "start_hours": np.array([0.1, 0.1, 0.0]),
        "start_kwh": np.array([0.2, 0.0, 0.0]),
        "min_run": np.array([1, 1, 1]),
        "unit_pool": np.array([0, 1]),
        "unit_names": ("chat on own", "chat on rent"),
        "unit_gpus": np.ones(2),
        "unit_whole": np.zeros(2, dtype=np.bool_),
        "unit_most": np.full(2, np.inf),
        "unit_start_hours": np.zeros(2),
        "unit_min_run": np.ones(2, dtype=np.int64),
        "unit_single": np.full(2, -1),
        "flow_unit": np.array([0, 0, 1, 1, -1, -1, 0, 1]),
        "flow_pool": np.array([0, 0, 1, 1, 2, 2, 0, 1]),
        "flow_class": np.array([0, 1, 0, 1, 0, 1, -1, -1]),
        "flow_job": np.array([-1, -1, -1, -1, -1, -1, 0, 0]),
        "flow_per_hour": np.array([1000.0, 800.0, 1200.0, 900.0, 1000.0, 1000.0, 1e6, 1.2e6]),
        "flow_kw": np.array([0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.6, 0.6]),
        "flow_gpu_kw": np.array([0.4, 0.4, 0.4, 0.4, 0.0, 0.0, 0.5, 0.5]),
        "flow_reserve": np.ones(8),
        "flow_loss": np.zeros(8),
        "flow_prefill": np.array([0.3, 0.3, 0.3, 0.3, 0.0, 0.0, 0.0, 0.0]),
        "class_names": ("chat", "batch"),
        "class_model": ("m", "m"),
        "class_tenant": ("shop", "shop"),
        "class_workload": ("chat", "batch"),
        "requests": np.array([1100.0, 600.0])[:, None] * (1 + 0.5 * np.sin(1.3 * t + 0.4)),
        "input_tokens": np.array([500.0, 400.0]),
        "cached_input_tokens": np.array([100.0, 0.0]),
        "output_tokens": np.array([100.0, 200.0]),
        "egress_gb": np.zeros(2),
        "slack_hours": np.array([0, 2]),
        "job_names": ("train",),
        "job_model": ("r",),
        "job_tenant": ("lab",),
        "job_tokens": np.array([0.9e6]),
        "job_release": np.array([0]),
        "job_deadline": np.array([T]),
        "job_one_pool": np.array([True]),
        "site_names": ("home",),
        "site_base_kw": np.zeros((1, T)),
        "site_cap_kw": np.full((1, T), np.inf),
        "carbon_g_per_kwh": np.array([[300.0], [500.0], [0.0]]) * flat,
        "rates": rates,
        "peaks": (Peak(0, ("peak_kw:day",), t >= 0, 0),),
        "name": "tiny",
    }
    return Instance(**(fields | changes))


@pytest.fixture(name="make")
def make_fixture() -> Callable[..., Instance]:
    """The builder of the tiny instance, any field replaced."""
    return instance
