"""Training: counted work by hand, honesty about what fits, restarts, and the fit against a refit on the
data."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pertoken.catalog.gpus import gpu, gpus
from pertoken.catalog.models import model
from pertoken.errors import CannotServeError, InputError
from pertoken.perf._training_work import training_layout, training_work
from pertoken.perf.point import TrainingPoint
from pertoken.perf.training import (
    MOST_OF_PEAK,
    best_checkpoint_minutes,
    model_flops,
    predict_training,
    retained_fraction,
)

ROOT = Path(__file__).parents[2]
DATA = ROOT / ".." / "shared" / "data" / "performance" / "training.csv"
LLAMA = model("Llama-3.1-8B")
H100 = gpu("H100")
POINT = TrainingPoint(64, 8192, 128, precision="fp8")


def value(point: TrainingPoint, name: str = "H100", of: str = "Llama-3.1-8B") -> float:
    return float(predict_training(model(of), gpu(name), point).tokens_per_s.value)


def test_counted_work_by_hand() -> None:
    point = TrainingPoint(8, 8192, 16, precision="bf16")
    work = training_work(LLAMA, H100, point, training_layout(LLAMA, H100, point))
    tokens = 16 * 8192 / 8
    assert work.step_tokens == tokens
    assert work.gemm_s == pytest.approx(3 * 2 * LLAMA.gemm_parameters * tokens / 989.4e12)
    attention = 32 * 4 * 4096 * (8192 / 2)  # layers × 4 × heads × head size × mean causal context
    assert work.attention_s == pytest.approx(3.5 * attention * tokens / 989.4e12)
    assert work.memory_s == pytest.approx(3 * 2 * 4096 * 32 * tokens / H100.memory_bytes_per_s)
    assert training_layout(LLAMA, H100, point).tp == 2  # 8 B × 6 bytes are more than half of 80 GB
    assert work.parallel_s == pytest.approx(16 * 4096 * 32 * tokens * (2 - 1) / 450e9)
    assert (work.expert_gemm_s, work.dispatch_s, work.bubble) == (0, 0, 0)


def test_model_flops_follow_the_published_convention() -> None:
    # llm-foundry states MFU 64.23 % for mpt-7b at 2,048 tokens and 4,641 tokens/s on an A100 of 312 TFLOP/s.
    flops = model_flops(model("mpt-7b"), TrainingPoint(8, 2048))
    assert flops * 4641 / 312e12 == pytest.approx(0.6423, rel=0.005)


def test_interval_holds_the_value_and_widens_with_novelty() -> None:
    def width(name: str, of: str = "Llama-3.1-8B", precision: str = "fp8") -> float:
        found = predict_training(model(of), gpu(name), replace(POINT, precision=precision)).tokens_per_s
        assert found.low < found.value < found.high
        return math.log(float(found.high / found.low))

    assert width("H100") < width("H100", "Qwen3-32B") < width("H100-PCIe") < width("L40S")


def test_basis_says_whether_the_architecture_was_measured() -> None:
    assert predict_training(LLAMA, H100, POINT).basis == "fitted"
    assert predict_training(LLAMA, gpu("L40S"), POINT).basis == "roofline"


def test_a_global_batch_nobody_gave_is_named_in_the_source() -> None:
    assert "assumed" in predict_training(LLAMA, H100, replace(POINT, global_batch=0)).source
    assert "assumed" not in predict_training(LLAMA, H100, POINT).source


@pytest.mark.parametrize(
    ("faster", "slower"),
    [
        (POINT, replace(POINT, precision="bf16")),
        (POINT, replace(POINT, checkpointing="full")),
        (replace(POINT, kind="lora"), POINT),
        (
            replace(POINT, sequence_tokens=2048, global_batch=512),
            replace(POINT, sequence_tokens=65536, global_batch=16),
        ),
    ],
)
def test_what_must_be_faster_per_token_is(faster: TrainingPoint, slower: TrainingPoint) -> None:
    assert value(faster) > value(slower)


def test_strong_scaling_loses_but_never_slows_down() -> None:
    rates = [value(replace(POINT, gpus=n)) for n in (8, 16, 32, 64, 128)]
    each = [r / n for r, n in zip(rates, (8, 16, 32, 64, 128), strict=True)]
    assert rates == sorted(rates)
    assert each == sorted(each, reverse=True)


def test_full_fine_tune_costs_what_pretraining_costs() -> None:
    assert value(replace(POINT, kind="full")) == value(POINT)


def test_mixture_of_experts_is_slower_than_its_active_weights_alone() -> None:
    moe = predict_training(model("Qwen3-30B-A3B"), gpu("B200"), TrainingPoint(8, 4096, 512, precision="fp8"))
    dense = predict_training(model("Llama-3.2-3B"), gpu("B200"), TrainingPoint(8, 4096, 512, precision="fp8"))
    assert moe.tokens_per_s.value < dense.tokens_per_s.value
    assert moe.mfu.value < dense.mfu.value


def test_what_is_not_recomputed_must_fit() -> None:
    job = TrainingPoint(16, 8192, 64)
    recomputed = predict_training(model("Llama-3.1-70B"), gpu("H100"), replace(job, checkpointing="full"))
    assert float(recomputed.mfu.value) > 0.2
    with pytest.raises(CannotServeError, match="more GPUs, tp or cp are needed, or activation checkpointing"):
        predict_training(model("Llama-3.1-70B"), gpu("H100"), replace(job, checkpointing="none"))


@pytest.mark.parametrize("name", gpus())
def test_no_gpu_trains_beyond_what_its_matrix_units_can(name: str) -> None:
    job = TrainingPoint(8, 4096, 1024, checkpointing="none")
    assert 0.02 < float(predict_training(model("mpt-1b"), gpu(name), job).mfu.value) < MOST_OF_PEAK


def test_power_lies_between_idle_and_limit() -> None:
    power = predict_training(LLAMA, H100, POINT).gpu_power_w
    assert H100.idle_w < power.low <= power.value <= power.high <= H100.tdp_w
    assert power.value > 0.7 * H100.tdp_w


@pytest.mark.parametrize(
    ("changes", "name", "of", "text"),
    [
        ({"precision": "fp8"}, "A100-80GB-SXM", "Llama-3.1-8B", "has no fp8"),
        ({"precision": "fp4"}, "H100", "Llama-3.1-8B", "has no fp4"),
        ({"gpus": 1, "precision": "bf16"}, "H100", "Llama-3.1-70B", "at least 14 GPUs"),
        (
            {"gpus": 8, "sequence_tokens": 1_000_000, "precision": "bf16"},
            "H100",
            "Llama-3.1-8B",
            "activations",
        ),
        ({"gpus": 4, "tp": 8}, "H100", "Llama-3.1-8B", "needs more than 4 GPUs"),
    ],
)
def test_what_cannot_be_trained_says_why(changes: dict[str, object], name: str, of: str, text: str) -> None:
    with pytest.raises(CannotServeError, match=text):
        predict_training(model(of), gpu(name), replace(POINT, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "rlhf"},
        {"checkpointing": "some"},
        {"precision": "fp7"},
        {"gpus": 0},
        {"sequence_tokens": math.nan},
        {"global_batch": -1.0},
    ],
)
def test_nonsense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InputError):
        predict_training(LLAMA, H100, replace(POINT, **changes))  # type: ignore[arg-type]


@given(
    mtbf_hours=st.floats(0.5, 1e4),
    interval=st.floats(1.0, 600.0),
    cost=st.floats(0.0, 30.0),
    restart=st.floats(0.0, 60.0),
)
def test_retained_fraction_is_a_share_and_falls_with_every_loss(
    mtbf_hours: float, interval: float, cost: float, restart: float
) -> None:
    kept = retained_fraction(mtbf_hours, interval, cost, restart)
    assert 0 <= kept <= 1
    assert retained_fraction(mtbf_hours * 2, interval, cost, restart) >= kept
    assert retained_fraction(mtbf_hours, interval, cost + 1, restart) <= kept
    assert retained_fraction(mtbf_hours, interval, cost, restart + 1) <= kept


def test_the_best_interval_loses_least() -> None:
    best = float(np.asarray(best_checkpoint_minutes(50.0, 2.0)))
    tried = np.linspace(0.3 * best, 3 * best, 200)
    kept = np.asarray(retained_fraction(50.0, tried, 2.0, 10.0))
    assert tried[int(np.argmax(kept))] == pytest.approx(best, rel=0.1)
    with pytest.raises(InputError):
        retained_fraction(0.0, 30.0, 1.0, 1.0)
    with pytest.raises(InputError):
        best_checkpoint_minutes(10.0, 0.0)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    if not DATA.exists():
        pytest.skip("../shared/data is absent: the fit cannot be repeated")
    spec = importlib.util.spec_from_file_location(
        "bench_fit_training", ROOT / "bench" / "fit" / "training.py"
    )
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def test_the_shipped_file_is_what_the_fit_makes(bench: ModuleType) -> None:
    shipped = json.loads(
        resources.files("pertoken.perf").joinpath("data/training.json").read_text(encoding="utf-8")
    )
    rows = bench.load_rows()
    again = bench.fit(rows)
    assert shipped["rows"] == len(rows)
    for part in ("shared", "precision", "architecture", "gpu"):
        assert again[part] == pytest.approx(shipped[part], abs=2e-3)
    assert bench.summary(bench.log_errors(again, rows))["mape"] == pytest.approx(
        shipped["residuals"]["fit"]["mape"], abs=1e-3
    )


def test_a_fit_on_half_the_rows_predicts_the_other_half(bench: ModuleType) -> None:
    rows = bench.load_rows()
    document = bench.fit(rows[::2])
    assert bench.summary(bench.log_errors(document, rows[1::2]))["mape"] < 0.10
