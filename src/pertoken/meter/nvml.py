"""NVML as a source: the GPUs of this machine, read through nvidia-ml-py (extra ``gpu``).

A reading is the same samples dcgm-exporter would show, so counters, restarts and gaps are handled in one
place. Boards without an energy counter have their power integrated.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pyarrow as pa

from pertoken.errors import InputError, MissingExtraError
from pertoken.meter._counters import State
from pertoken.meter.prometheus import Target, read_samples
from pertoken.units import MILLISECONDS_PER_SECOND


def read(target: Target, state: State, *, now_s: float) -> tuple[pa.Table, State]:
    """What this machine's GPUs used since the last reading, and the state to journal with it.

    Parameters: target, whose `pools` may map GPU UUIDs; its last state; now_s [POSIX s].
    Raises MissingExtraError without nvidia-ml-py, InputError where there is no NVIDIA driver.
    """
    return read_samples(_samples(), target, state, now_s=now_s)


def _samples() -> list[tuple[str, dict[str, str], float]]:
    nvml = _library()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise InputError(f"NVML cannot be used on this machine: {error}") from error
    try:
        samples = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            labels = {"gpu": str(index), "UUID": _text(nvml.nvmlDeviceGetUUID(handle))}
            for name, value in _of_device(nvml, handle):
                samples.append((name, labels, value))
        return samples
    except nvml.NVMLError as error:
        raise InputError(f"NVML failed: {error}") from error
    finally:
        nvml.nvmlShutdown()


def _of_device(nvml: Any, handle: Any) -> list[tuple[str, float]]:
    """Samples under dcgm-exporter's names, in its units: mJ, W, percent. What a board does not tell is left
    out."""
    asked: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle)),
        ("DCGM_FI_DEV_POWER_USAGE", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / MILLISECONDS_PER_SECOND),
        ("DCGM_FI_DEV_GPU_UTIL", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
    )
    found = []
    for name, ask in asked:
        try:
            found.append((name, float(ask())))
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
            continue
    return found


def _library() -> Any:
    try:
        return import_module("pynvml")
    except ImportError as error:
        raise MissingExtraError("gpu", "reading NVML") from error


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
