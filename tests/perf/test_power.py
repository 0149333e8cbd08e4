"""Power: bounds, direction, boundaries by hand, and the fit against a refit on the data."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib import resources
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pertoken.catalog.gpus import gpu, gpus
from pertoken.catalog.models import model
from pertoken.errors import InputError
from pertoken.perf.power import gpu_power_w, joules_per_token, power_log_spread, server_power_w

ROOT = Path(__file__).parents[2]
DATA = ROOT / ".." / "shared" / "data" / "performance" / "power_mlenergy.csv"
SHARE = st.floats(0.0, 1.0)


@given(name=st.sampled_from(sorted(gpus())), compute=SHARE, memory=SHARE, link=SHARE)
def test_a_busy_gpu_draws_between_idle_and_its_limit(
    name: str, compute: float, memory: float, link: float
) -> None:
    card = gpu(name)
    power = float(gpu_power_w(card, compute, memory, link))
    assert card.idle_w < power <= card.tdp_w


@given(
    name=st.sampled_from(["H100", "B200", "MI300X", "L40S"]),
    low=SHARE,
    high=SHARE,
    other=SHARE,
    of=st.sampled_from([None, "gpt-oss-120b", "Llama-3.1-8B", "Qwen3-235B-A22B"]),
    media=st.sampled_from(["", "image", "video"]),
)
def test_more_use_never_draws_less(
    name: str, low: float, high: float, other: float, of: str | None, media: str
) -> None:
    low, high = sorted((low, high))
    found = model(of) if of else None
    more_compute = gpu_power_w(gpu(name), [low, high], other, model=found, media=media)
    more_memory = gpu_power_w(gpu(name), other, [low, high], model=found, media=media)
    assert more_compute[0] <= more_compute[1]
    assert more_memory[0] <= more_memory[1]


def test_vectorised_over_any_shape() -> None:
    grid = gpu_power_w(gpu("H100"), np.linspace(0, 1, 5)[:, None], np.linspace(0, 1, 7)[None, :])
    assert grid.shape == (5, 7)
    assert grid[3, 2] == gpu_power_w(gpu("H100"), 0.75, 2 / 6)


def test_preprocessing_media_keeps_the_gpu_waiting() -> None:
    text, image, video = (float(gpu_power_w(gpu("H100"), 0.1, 0.4, media=m)) for m in ("", "image", "video"))
    assert video < image < text


def test_interval_is_wider_where_less_was_measured() -> None:
    measured = power_log_spread(gpu("H100"), "bf16", model("Llama-3.1-8B"), 1)
    assert 0 < measured <= power_log_spread(gpu("H100")) <= power_log_spread(gpu("MI300X"))


def test_server_adds_its_host_at_rest_and_at_load() -> None:
    card = gpu("H100")
    assert server_power_w(card, 600.0, 1.0) == 600.0 + card.host_busy_w
    assert server_power_w(card, 600.0, 0.0) == card.idle_w + card.host_idle_w
    assert server_power_w(card, np.array([500.0, 600.0]), 0.5).shape == (2,)


def test_joules_by_hand_at_each_boundary() -> None:
    card = gpu("H100")
    board = float(joules_per_token(card, 600.0, 8, 4000.0))
    assert board == pytest.approx(8 * 600 / 4000)
    server = float(joules_per_token(card, 600.0, 8, 4000.0, boundary="server"))
    assert server == pytest.approx(8 * (600 + card.host_busy_w) / 4000)
    assert joules_per_token(card, 600.0, 8, 4000.0, boundary="facility", pue=1.3) == pytest.approx(
        1.3 * server
    )
    parts = [float(joules_per_token(card, 600.0, 8, 4000.0, phase_fraction=f)) for f in (0.3, 0.7)]
    assert sum(parts) == pytest.approx(board)


@pytest.mark.parametrize(
    "call",
    [
        lambda: gpu_power_w(gpu("H100"), 1.2, 0.5),
        lambda: gpu_power_w(gpu("H100"), 0.2, float("nan")),
        lambda: gpu_power_w(gpu("H100"), 0.2, 0.5, media="smell"),
        lambda: server_power_w(gpu("H100"), 500.0, -0.1),
        lambda: joules_per_token(gpu("H100"), 500.0, 8, 100.0, pue=0.9),
        lambda: joules_per_token(gpu("H100"), 500.0, 8, 0.0),
        lambda: joules_per_token(gpu("H100"), 500.0, 8, 1.0, boundary="rack"),  # type: ignore[arg-type]
    ],
)
def test_nonsense_is_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(InputError):
        call()


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    if not DATA.exists():
        pytest.skip("../shared/data is absent: the fit cannot be repeated")
    spec = importlib.util.spec_from_file_location("bench_fit_power", ROOT / "bench" / "fit" / "power.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def test_the_shipped_file_is_what_the_fit_makes(bench: ModuleType) -> None:
    shipped = json.loads(
        resources.files("pertoken.perf").joinpath("data/power.json").read_text(encoding="utf-8")
    )
    rows = bench.load_rows()
    again = bench.fit(rows)
    assert shipped["rows"] == len(rows) == 613
    # The shares in use come from the serving predictor, whose own refits move them a little.
    moved = np.abs(np.log(bench.predict_w(again, rows) / bench.predict_w(shipped, rows)))
    assert np.median(moved) < 0.01
    assert np.max(moved) < 0.1
    errors = np.log(bench.predict_w(again, rows) / np.array([r.power_w for r in rows]))
    fitted = shipped["residuals"]["fit at measured throughput"]["fit"]["mape"]
    assert bench.summary(errors)["mape"] == pytest.approx(fitted, abs=2e-3)


def test_the_package_computes_what_the_fit_computed(bench: ModuleType) -> None:
    rows = bench.load_rows()[::20]
    shipped = json.loads(
        resources.files("pertoken.perf").joinpath("data/power.json").read_text(encoding="utf-8")
    )
    fitted = bench.predict_w(shipped, rows)
    for row, watts in zip(rows, fitted, strict=True):
        compute, memory = row.shares
        own = gpu_power_w(
            row.gpu, compute, memory, 0.0, row.precision, model=row.model, gpus=row.gpus, media=row.media
        )
        assert float(own) == pytest.approx(watts)
