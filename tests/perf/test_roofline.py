"""The serving predictor: hand-checked counts, limits physics sets, honest refusals."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pertoken.catalog.gpus import Gpu, gpu
from pertoken.catalog.models import Model, model
from pertoken.errors import CannotServeError, InputError
from pertoken.perf import Layout, Point, predict, step_times, utilisations
from pertoken.perf._coefficients import Coefficients, Lookup, Spread, lookup
from pertoken.perf._steps import (
    attention_per_token_s,
    cache_per_sequence_s,
    closed_loop,
    covered,
    decode_context,
    decode_step_s,
    latency_s,
    prompt_s,
    running,
)
from pertoken.perf._work import engine_family, formats, mean_min, precision_name, usable_bytes, work
from pertoken.perf.roofline import requests_of

LLAMA8, LLAMA70, OSS = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.3-70B-Instruct", "openai/gpt-oss-120b"
H100, B200, A100 = "H100-SXM", "B200", "A100-80GB-SXM"
SIZES = st.sampled_from([64.0, 500.0, 1000.0, 4000.0, 16000.0])
PAIRS = st.sampled_from(
    [
        (LLAMA8, H100, "bf16", 1),
        (LLAMA70, "H200-SXM", "fp8", 2),
        (OSS, B200, "fp4", 1),
        (OSS, "MI355X", "fp4", 4),
    ]
)


def _llama8_on_h100() -> tuple[Model, Gpu]:
    return model(LLAMA8), gpu(H100)


def test_weights_of_a_step_are_the_model_without_its_embedding() -> None:
    """8.03 B parameters less the 128,256 × 4,096 embedding, two bytes each, over 3.35 TB/s."""
    llama, h100 = _llama8_on_h100()
    found = work(llama, h100, Layout(), formats(h100, "bf16"))
    expected_s = (llama.parameters - 128256 * 4096) * 2 / h100.memory_bytes_per_s
    assert found.always_s == pytest.approx(expected_s)
    assert found.always_s == pytest.approx(4.48e-3, rel=0.01)
    assert found.routed_s == 0.0


def test_cache_of_a_token_is_32_layers_of_8_heads() -> None:
    """2 × 32 layers × 8 heads × 128 values × 2 bytes = 131,072 bytes per token of context; a quarter on 4 GPUs."""
    llama, h100 = _llama8_on_h100()
    fmt = formats(h100, "bf16")
    assert work(llama, h100, Layout(1), fmt).kv_full_bytes == pytest.approx(131072)
    assert work(llama, h100, Layout(4), fmt).kv_full_bytes == pytest.approx(131072 / 4)
    assert work(llama, h100, Layout(16), fmt).kv_full_bytes == pytest.approx(131072 / 8), "8 KV heads at most"


def test_experts_read_grow_with_the_batch_as_coverage_says() -> None:
    oss, b200 = model(OSS), gpu(B200)
    found = work(oss, b200, Layout(), formats(b200, "fp4"))
    miss = np.exp(found.log_miss)
    assert miss == pytest.approx(1 - 4 / 128)
    assert 1 - miss**128 == pytest.approx(0.983, abs=0.001)


def test_one_token_visits_its_own_experts_and_a_batch_fewer_than_independent_draws() -> None:
    """gpt-oss: 4 of 128 experts; 100 tokens that chose alone would visit 1 − (124/128)^100 = 95.8 % of them."""
    oss, b200 = model(OSS), gpu(B200)
    found = work(oss, b200, Layout(), formats(b200, "fp4"))
    assert covered(found, 1.0) == pytest.approx(4 / 128)
    assert 0.7 < float(np.asarray(covered(found, 100.0))) < 0.958


def test_an_engine_runs_what_memory_its_seats_and_its_slots_allow() -> None:
    """512 asked: 128 seats run 128; with one slot always being handed on, 8 asked run 8 − (1 − 1/8)."""
    asked = np.array([1.0, 64.0, 512.0])
    assert running(Coefficients(seats=128.0, slot=0.0), asked, 1e9).tolist() == [1.0, 64.0, 128.0]
    assert running(Coefficients(slot=0.0), asked, 100.0).tolist() == [1.0, 64.0, 100.0]
    assert float(running(Coefficients(slot=1.0), 8.0, 1e9)) == pytest.approx(7.125)
    assert float(running(Coefficients(slot=1.0), 1.0, 1e9)) == 1.0


def test_a_prompt_stalls_the_others_by_its_share_of_a_steps_latency() -> None:
    llama, h100 = _llama8_on_h100()
    w = work(llama, h100, Layout(), formats(h100, "bf16"))
    requests = requests_of(Point(0, 0, 0), 1000.0, 0.0, 100.0)
    free, stalled = Coefficients(stall=0.0), Coefficients(stall=2.0)
    extra_s = np.asarray(prompt_s(w, stalled, requests)[0]) - np.asarray(prompt_s(w, free, requests)[0])
    assert float(extra_s) == pytest.approx(2 * float(np.asarray(latency_s(w, stalled))))


def test_memory_limits_the_batch_by_hand() -> None:
    """What 92 % of the memory less workspace and weights leaves, over the cache of a request at mean length."""
    llama, h100 = _llama8_on_h100()
    answer = predict(llama, h100, Point(1000, 200, 1))
    weights_bytes = llama.parameters * 2
    expected = (usable_bytes(h100) - weights_bytes) / (1100 * 131072)
    assert answer.max_concurrency == pytest.approx(np.floor(expected))


def test_mean_of_a_window_is_the_integral() -> None:
    assert mean_min(0.0, 10.0, 5.0) == pytest.approx(3.75)
    assert mean_min(100.0, 200.0, 50.0) == pytest.approx(50.0)
    assert mean_min(10.0, 20.0, 50.0) == pytest.approx(15.0)


@settings(max_examples=60, deadline=None)
@given(PAIRS, SIZES, SIZES, st.floats(0, 0.9))
def test_throughput_does_not_fall_with_concurrency_while_memory_lasts(
    pair: tuple[str, str, str, int], n_in: float, out: float, cached: float
) -> None:
    name, card, precision, tp = pair
    concurrency = np.array([1.0, 2, 4, 8, 16, 32, 64, 128, 256])
    answer = predict(
        model(name), gpu(card),
        Point(n_in, out, concurrency, cached * n_in, precision=precision, layout=Layout(tp)),
    )  # fmt: skip
    within = concurrency <= answer.max_concurrency
    rate = answer.tokens_per_s.value[within]
    assert (np.diff(rate) >= -1e-6 * rate[:-1]).all()
    assert (np.diff(answer.tpot_s.value[within]) >= -1e-3 * answer.tpot_s.value[within][:-1]).all()


@settings(max_examples=60, deadline=None)
@given(PAIRS, SIZES, SIZES, st.integers(1, 300))
def test_littles_law_holds(
    pair: tuple[str, str, str, int], n_in: float, out: float, concurrency: int
) -> None:
    """Requests in flight = request rate × (time to first token + output × time per token), queue included."""
    name, card, precision, tp = pair
    answer = predict(
        model(name), gpu(card), Point(n_in, out, concurrency, precision=precision, layout=Layout(tp))
    )
    lifetime_s = answer.ttft_s.value + out * answer.tpot_s.value
    assert answer.tokens_per_s.value / out * lifetime_s == pytest.approx(concurrency, rel=0.02)


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.sampled_from([1, 8, 64]))
def test_more_gpus_hold_more_requests_and_cached_prompts_start_sooner(
    n_in: float, out: float, concurrency: int
) -> None:
    llama, card = model(LLAMA70), gpu("H200-SXM")
    held = [
        predict(
            llama, card, Point(n_in, out, concurrency, precision="fp8", layout=Layout(tp))
        ).max_concurrency
        for tp in (1, 2, 4, 8)
    ]
    assert held == sorted(held)
    at = Point(n_in, out, concurrency, precision="fp8", layout=Layout(4))
    cached = predict(llama, card, replace(at, cached_input_tokens=n_in / 2))
    whole = predict(llama, card, at)
    assert cached.ttft_s.value <= whole.ttft_s.value
    assert cached.tokens_per_s.value >= whole.tokens_per_s.value
    assert cached.max_concurrency == whole.max_concurrency, "a cached prompt still holds its cache"


@settings(max_examples=30, deadline=None)
@given(PAIRS, SIZES, st.sampled_from([1, 16, 128]), st.floats(1.0, 3.0))
def test_faster_memory_is_never_slower(
    pair: tuple[str, str, str, int], n_in: float, concurrency: int, factor: float
) -> None:
    name, card, precision, tp = pair
    at = Point(n_in, 200, concurrency, precision=precision, layout=Layout(tp))
    slow, fast = gpu(card), replace(gpu(card), memory_bytes_per_s=gpu(card).memory_bytes_per_s * factor)
    before, after = (predict(model(name), g, at).tokens_per_s.value for g in (slow, fast))
    assert after >= before * (1 - 1e-9)


def test_answers_keep_the_shape_they_were_asked_in() -> None:
    llama, h100 = _llama8_on_h100()
    grid = predict(llama, h100, Point(np.array([[100.0], [1000.0]]), 100, np.array([1.0, 2.0, 4.0])))
    one = predict(llama, h100, Point(1000, 100, 4))
    assert (
        grid.tokens_per_s.value.shape == grid.gpu_power_w.high.shape == grid.max_concurrency.shape == (2, 3)
    )
    assert grid.tokens_per_s.value[1, 2] == pytest.approx(float(one.tokens_per_s.value))
    assert one.tokens_per_s.value.shape == ()


def test_many_points_are_computed_in_blocks_alike() -> None:
    llama, h100 = _llama8_on_h100()
    many = predict(llama, h100, Point(np.linspace(10, 4000, 40_000), 100, 4)).tokens_per_s.value
    assert many[-1] == pytest.approx(float(predict(llama, h100, Point(4000, 100, 4)).tokens_per_s.value))


def test_interval_surrounds_the_value_and_widens_for_what_was_not_measured() -> None:
    oss = model(OSS)
    at = Point(1000, 1000, 16, precision="fp4", layout=Layout(2))
    known = predict(oss, gpu(H100), at)
    strange = predict(oss, gpu("MI300X"), at)
    for interval in (known.tokens_per_s, known.ttft_s, known.tpot_s, known.gpu_power_w):
        assert interval.low <= interval.value <= interval.high
    ratio = [float(p.tokens_per_s.high / p.tokens_per_s.low) for p in (known, strange)]
    assert ratio[0] < ratio[1]
    assert (known.basis, strange.basis) == ("fitted", "roofline")
    assert "not measured" in strange.source


def test_intervals_widen_beyond_the_concurrency_that_was_measured() -> None:
    """half-width = √(own² + (far × e-folds beyond the rows)²): e² times as many requests are two e-folds."""
    found = Lookup(Coefficients(), Spread(0.09, 0.5, 0.1), "fitted", "", 4.0, 64.0, Spread(0.1, 0.3, 0.2))
    for inside in (4.0, 10.0, 64.0):
        assert found.spread_at(inside) == pytest.approx((0.09, 0.5, 0.1))
    beyond = np.hypot([0.09, 0.5, 0.1], 2 * np.array([0.1, 0.3, 0.2]))
    assert np.allclose(found.spread_at(64.0 * np.e**2), beyond)
    assert np.allclose(found.spread_at(1.0)[0], np.hypot(0.09, 0.1 * np.log(4.0)))
    assert np.asarray(found.spread_at(np.array([8.0, 512.0]))[2]).shape == (2,)


def test_a_measured_configuration_is_less_sure_far_from_its_rows() -> None:
    at = predict(
        model("meta-llama/Llama-3.1-70B"), gpu(B200),
        Point(1000, 1000, np.array([16.0, 2000.0]), precision="fp8", engine="vllm", layout=Layout(tp=8)),
    ).tokens_per_s  # fmt: skip
    near, far = np.log(np.asarray(at.high) / np.asarray(at.value))
    assert far > 1.5 * near


@given(PAIRS, SIZES, st.sampled_from([1.0, 8.0, 100.0]))
def test_a_step_is_never_faster_than_reading_at_the_datasheets_bandwidth(
    pair: tuple[str, str, str, int], length: float, sequences: float
) -> None:
    """Fitted effects may add up to less than ideal where nothing was measured; the roofline holds there too."""
    name, card, precision, tp = pair
    m, g = model(name), gpu(card)
    ideal = work(m, g, Layout(tp=tp), formats(g, precision))
    requests = requests_of(Point(length, length, 1), length, 0.0, length)
    cache_s = cache_per_sequence_s(ideal, decode_context(ideal, requests))
    dream = Coefficients(**dict.fromkeys((f.name for f in fields(Coefficients)), 1e-9))
    step = decode_step_s(ideal, dream, sequences, 1.0, cache_s, 0.0)
    read = ideal.always_s + ideal.routed_s * covered(ideal, sequences) + sequences * cache_s
    assert step == pytest.approx(read)


def test_precision_the_hardware_lacks_is_named() -> None:
    assert (
        "fp4 weights, bf16 compute"
        in predict(model(OSS), gpu(H100), Point(100, 100, 1, precision="mxfp4", layout=Layout(2))).source
    )
    assert (
        "fp8 weights, bf16 compute"
        in predict(model(LLAMA8), gpu(A100), Point(100, 100, 1, precision="fp8")).source
    )
    assert "int4 weights" in predict(model(LLAMA8), gpu(A100), Point(100, 100, 1, precision="awq")).source
    with pytest.raises(CannotServeError, match="Gaudi-3 has no fp4"):
        predict(model(OSS), gpu("Gaudi-3"), Point(100, 100, 1, precision="fp4"))


def test_a_model_too_large_says_how_many_gpus_would_do() -> None:
    with pytest.raises(CannotServeError, match=r"does not fit 1 × H100-SXM .*GiB per GPU.*at least 2 GPUs"):
        predict(model(LLAMA70), gpu(H100), Point(100, 100, 1))


def test_a_request_larger_than_the_cache_is_refused() -> None:
    with pytest.raises(CannotServeError, match="not one request of 100000 \\+ 100 tokens fits"):
        predict(model(LLAMA70), gpu(H100), Point(100_000, 100, 1, precision="fp8"))
    with pytest.raises(CannotServeError, match="has a context of"):
        predict(model(LLAMA70), gpu("B300"), Point(10_000_000, 100, 1))


@pytest.mark.parametrize(
    ("point", "message"),
    [
        (Point(-10, 10, 1), "input_tokens must be a number of at least 0: found -10$"),
        (Point(np.array([10.0, -2.5, -3.0]), 10, 1), "at least 0: found -2.5$"),
        (Point(10, 0, 1), "output_tokens must be"),
        (Point(10, 10, float("nan")), "concurrency must be a number of at least 1: found nan$"),
        (Point(10, 10, 1, 11), "cached_input_tokens cannot exceed"),
        (Point(10, 10, 1, accepted_per_step=0.5), "accepted_per_step is at least 1"),
        (Point(10, 10, 1, layout=Layout(0)), "layout tp is 0"),
        (Point(10, 10, 1, layout=Layout(2, ep=3)), "layout ep 3 does not divide"),
        (Point(10, 10, 1, precision="fp3"), "unknown precision 'fp3'"),
    ],
)
def test_points_that_make_no_sense_are_answered_in_one_line(point: Point, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        predict(model(LLAMA8), gpu(H100), point)
    assert "\n" not in str(caught.value)


def test_speculative_decoding_trades_compute_for_latency() -> None:
    llama, h100 = _llama8_on_h100()
    plain = predict(llama, h100, Point(500, 500, 1))
    drafted = predict(llama, h100, Point(500, 500, 1, accepted_per_step=2.5, draft_fraction=0.1))
    assert 1.5 < plain.tpot_s.value / drafted.tpot_s.value < 2.5


def test_disaggregated_prefill_caps_the_rate_and_frees_decode() -> None:
    oss, b200 = model(OSS), gpu(B200)
    shared = predict(oss, b200, Point(8000, 500, 256, precision="fp4", layout=Layout(4)))
    apart = predict(oss, b200, Point(8000, 500, 256, precision="fp4", layout=Layout(4), prefill_gpus=4))
    assert apart.tpot_s.value < shared.tpot_s.value
    starved = predict(oss, b200, Point(8000, 500, 256, precision="fp4", layout=Layout(4), prefill_gpus=0.5))
    assert starved.tokens_per_s.value < apart.tokens_per_s.value
    assert starved.ttft_s.value > apart.ttft_s.value


@settings(max_examples=40, deadline=None)
@given(PAIRS, SIZES, SIZES, st.integers(1, 2000))
def test_shares_of_hardware_in_use_are_shares(
    pair: tuple[str, str, str, int], n_in: float, out: float, concurrency: int
) -> None:
    name, card, precision, tp = pair
    at = Point(n_in, out, concurrency, precision=precision, layout=Layout(tp))
    for share in utilisations(model(name), gpu(card), at):
        assert 0 <= share <= 1
    answer = predict(model(name), gpu(card), at)
    assert gpu(card).idle_w <= answer.gpu_power_w.value <= gpu(card).tdp_w
    assert 0 <= answer.prefill_fraction <= 1


@settings(max_examples=30, deadline=None)
@given(PAIRS, st.sampled_from([256.0, 2048.0, 8192.0]), st.sampled_from([1, 7, 64, 256]))
def test_step_times_are_the_steps_of_predict(
    pair: tuple[str, str, str, int], context: float, batch: int
) -> None:
    name, card, precision, tp = pair
    m, g, layout = model(name), gpu(card), Layout(tp)
    times = step_times(m, g, precision, "vllm", layout, max_batch=256, context_tokens=context)
    requests = requests_of(Point(0, 0, 0), context, 0.0, 2.0)
    assume(times.kv_capacity_tokens > 256 * context)
    w, c = work(m, g, layout, formats(g, precision)), lookup(m, g, "vllm", precision).coefficients
    loop = closed_loop(w, c, requests, float(batch))
    full = decode_context(w, requests).full
    own_s = times.decode_s[batch] + times.context_s * batch * float(np.asarray(full))
    at = decode_context(w, requests)
    exact = decode_step_s(w, c, float(batch), 1.0, cache_per_sequence_s(w, at), attention_per_token_s(w, at))
    assert own_s == pytest.approx(float(exact), rel=0.02)
    assert times.decode_s[0] == 0.0
    assert len(times.decode_s) == 257
    assert loop.step_s > 0
    assert times.idle_power_w <= times.decode_power_w <= g.tdp_w
    assert times.idle_power_w <= times.prefill_power_w <= g.tdp_w


def test_names_of_engines_and_precisions_in_the_field() -> None:
    names = ("trtllm-1.2.0rc6", "dynamo-sglang", "tensorrt-llm (trtllm-bench)", "lmdeploy")
    assert [engine_family(name) for name in names] == [
        "trt", "sglang", "trt", "other",
    ]  # fmt: skip
    assert precision_name("NVFP4") == "fp4"
    written = ("FP8-dynamic", "w8a8_int8", "int4 awq", "torch.bfloat16", "modelopt_fp4", "mxfp8")
    assert [precision_name(name) for name in written] == ["fp8", "int8", "int4", "bf16", "fp4", "fp8"]
