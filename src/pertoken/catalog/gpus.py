"""GPUs and other accelerators: what the datasheet says, dense, per device, with source and date."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One accelerator as it is sold.

    Rates are dense peaks of one device (never sparse, never per die): `flops` [FLOP/s] by precision
    (``bf16``, ``fp8``, ``fp4``, ``int8``), a precision the hardware lacks is absent. Link rates are one direction,
    per device. `idle_w` is board power with a model loaded and no work; `host_idle_w` and
    `host_busy_w` are the rest of the server at the plug (CPUs, memory, network, fans, conversion loss) divided by
    its GPUs, at rest and at full load. `architecture` names the generation
    (``hopper``, ``blackwell``, ``cdna3``, …).
    """

    name: str
    vendor: str
    architecture: str
    memory_gb: float
    memory_bytes_per_s: float
    flops: Mapping[str, float]
    intra_node_bytes_per_s: float
    inter_node_bytes_per_s: float
    gpus_per_node: int
    tdp_w: float
    idle_w: float
    host_idle_w: float
    host_busy_w: float
    released: str
    sources: tuple[str, ...]
    checked: str


def gpus() -> Mapping[str, Gpu]:
    """All GPUs of the catalogue by canonical name (``H100-SXM``), in catalogue order."""
    raise NotImplementedError


def gpu(name: str) -> Gpu:
    """The GPU of that name; spelling as vendors, clouds and benchmarks write it (``h100_sxm``, ``DGX-H100``).

    Raises UnknownNameError with the nearest names.
    """
    raise NotImplementedError
