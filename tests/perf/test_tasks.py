"""A benchmark's task on its stack: bounds, what is known and what is not, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pertoken.catalog.gpus import gpu
from pertoken.catalog.models import model
from pertoken.errors import InputError, NoEvidenceError
from pertoken.perf import Layout, Point, predict
from pertoken.perf.tasks import predict_task, task_names

BATCHES = np.array([8.0, 32.0, 128.0, 512.0])
CHAT = Point(200, 390, BATCHES, precision="bf16")
PICTURES = Point(1000, 940, BATCHES, precision="bf16")


def test_a_measured_series_is_known_better_than_a_model_or_gpu_that_was_not_measured() -> None:
    known = predict_task(model("Llama-3.1-8B-Instruct"), gpu("H100"), CHAT, "lm-arena-chat")
    other = predict_task(model("mistralai/Mistral-7B-v0.3"), gpu("H100"), CHAT, "lm-arena-chat")
    far = predict_task(model("Llama-3.1-8B-Instruct"), gpu("MI300X"), CHAT, "lm-arena-chat")
    widths = [np.log(a.tokens_per_s.high / a.tokens_per_s.low)[0] for a in (known, other, far)]
    assert 0 < widths[0] < widths[1] <= widths[2]
    assert "not this task on this configuration" not in known.source
    assert "not this task on this configuration" in other.source
    assert "vLLM 0.11.1" in known.source


def test_power_stays_between_idle_and_limit_and_times_agree_with_throughput() -> None:
    for task in task_names():
        found = predict_task(model("Qwen3-VL-8B-Instruct"), gpu("B200"), PICTURES, task)
        power = found.gpu_power_w
        card = gpu("B200")
        assert (card.idle_w <= power.low).all()
        assert (power.low <= power.value).all()
        assert (power.value <= power.high).all()
        assert (power.high <= card.tdp_w).all()
        held = found.tokens_per_s.value / 940 * (found.ttft_s.value + 940 * found.tpot_s.value)
        assert held == pytest.approx(np.minimum(BATCHES, found.max_concurrency), rel=0.02)
        assert ((found.prefill_fraction > 0) & (found.prefill_fraction < 1)).all()


def test_a_host_that_prepares_pictures_leaves_a_fast_gpu_waiting() -> None:
    found = predict_task(model("Qwen3-VL-8B-Instruct"), gpu("B200"), PICTURES, "image-chat")
    alone = predict(model("Qwen3-VL-8B-Instruct"), gpu("B200"), PICTURES)
    # Measured at 32 in flight: 759 tokens/s, 42 ms per token of each; the GPU alone needs a fifth of that.
    assert found.tokens_per_s.value[1] < 0.6 * alone.tokens_per_s.value[1]
    assert found.gpu_power_w.value[1] < alone.gpu_power_w.value[1]


def test_that_host_keeps_up_with_eight_requests_and_not_with_sixteen() -> None:
    at = replace(PICTURES, concurrency=np.array([8.0, 16.0]))
    found = predict_task(model("Qwen3-VL-8B-Instruct"), gpu("B200"), at, "image-chat")
    # Measured: 7 and 36 ms per token of each request, 513 and 283 W.
    assert found.tpot_s.value[1] > 2.5 * found.tpot_s.value[0]
    assert found.gpu_power_w.value[1] < found.gpu_power_w.value[0]


@pytest.mark.parametrize(
    ("point", "task", "error", "says"),
    [
        (CHAT, "chatting", InputError, "lm-arena-chat"),
        (replace(CHAT, engine="sglang"), "lm-arena-chat", NoEvidenceError, "sglang"),
        (replace(CHAT, prefill_gpus=1), "lm-arena-chat", NoEvidenceError, "only prefill"),
        (replace(CHAT, layout=Layout(ep=3)), "lm-arena-chat", InputError, "ep 3"),
    ],
)
def test_what_was_not_measured_is_refused(point: Point, task: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        predict_task(model("Llama-3.1-8B-Instruct"), gpu("H100"), point, task)


def test_one_point_is_one_number() -> None:
    found = predict_task(
        model("Llama-3.1-8B-Instruct"), gpu("H100"), replace(CHAT, concurrency=64), "lm-arena-chat"
    )
    for interval in (found.tokens_per_s, found.ttft_s, found.tpot_s, found.gpu_power_w):
        assert np.shape(interval.value) == np.shape(interval.low) == np.shape(interval.high) == ()
