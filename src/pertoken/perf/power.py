"""GPU and server power from how much of the hardware is in use."""

from __future__ import annotations

import numpy as np

from pertoken.catalog.gpus import Gpu
from pertoken.perf.point import FloatLike, Floats


def gpu_power_w(
    gpu: Gpu,
    compute_fraction: FloatLike,
    memory_fraction: FloatLike,
    link_fraction: FloatLike,
    precision: str = "bf16",
) -> Floats:
    """Mean board power of one GPU [W]."""
    c, m, k = (np.asarray(v, dtype=np.float64) for v in (compute_fraction, memory_fraction, link_fraction))
    return gpu.idle_w + (gpu.tdp_w - gpu.idle_w) * (1 - np.exp(-(0.2 + 3 * c + 1.2 * m + 0.5 * k)))


def power_log_spread(gpu: Gpu) -> float:
    """Half-width of the 80 % interval of GPU power in log space."""
    return 0.12
