"""Search: the best operating points within an SLO, and what it says where there are none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.catalog.gpus import gpu
from pertoken.catalog.models import model
from pertoken.errors import CannotServeError, InputError
from pertoken.perf import Point, predict, search
from pertoken.perf.search import BATCHES, layouts

LLAMA70, OSS = "meta-llama/Llama-3.3-70B-Instruct", "openai/gpt-oss-120b"
SHOP = Point(1200, 250, 1, 480, precision="fp8")


def test_layouts_are_powers_of_two_and_spread_experts_only_where_there_are_any() -> None:
    dense, mixed = layouts(model(LLAMA70), 8), layouts(model(OSS), 8)
    assert {layout.dp for layout in dense} == {1}
    assert {layout.gpus for layout in mixed} == {1, 2, 4, 8}
    assert all(layout.ep == layout.tp * layout.dp for layout in mixed if layout.dp > 1)
    assert len(set(mixed)) == len(mixed)


def test_best_points_meet_the_slo_and_agree_with_predict() -> None:
    found = search(model(LLAMA70), gpu("H100-SXM"), SHOP, slo_ttft_s=1.0, slo_tpot_s=0.05)
    rates = [c.tokens_per_s_per_gpu for c in found.best]
    assert rates == sorted(rates, reverse=True)
    for candidate in found.best:
        assert candidate.ttft_s <= 1.0
        assert candidate.tpot_s <= 0.05
    best = found.best[0]
    at = Point(1200, 250, best.concurrency, 480, precision="fp8", layout=best.layout)
    answer = predict(model(LLAMA70), gpu("H100-SXM"), at)
    assert answer.tokens_per_s.value / best.layout.gpus == pytest.approx(best.tokens_per_s_per_gpu)
    assert answer.tpot_s.value == pytest.approx(best.tpot_s)
    assert best.concurrency <= answer.max_concurrency


def test_front_trades_throughput_for_interactivity() -> None:
    found = search(model(OSS), gpu("B200"), Point(1000, 1000, 1, precision="fp4"))
    rate = np.array([c.tokens_per_s_per_gpu for c in found.front])
    user = np.array([c.tokens_per_s_per_user for c in found.front])
    assert len(found.front) > 5
    assert (np.diff(rate) > 0).all()
    assert (np.diff(user) <= 0).all()
    assert rate.max() == pytest.approx(found.best[0].tokens_per_s_per_gpu), (
        "without an SLO the best ends the front"
    )
    assert found.fitting <= found.tried == len(layouts(model(OSS), 8)) * BATCHES.size


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 5.0), st.floats(0.005, 0.2))
def test_a_looser_slo_never_finds_less(slo_ttft_s: float, slo_tpot_s: float) -> None:
    m, g = model(OSS), gpu("B200")

    def best(loosened: float) -> float:
        try:
            answer = search(
                m,
                g,
                SHOP,
                slo_ttft_s=slo_ttft_s * loosened,
                slo_tpot_s=slo_tpot_s * loosened,
                precisions=["fp4"],
            )
        except CannotServeError:
            return 0.0  # what the refusal says has a test of its own
        return answer.best[0].tokens_per_s_per_gpu

    assert best(1.5) >= best(1.0)


def test_layouts_too_small_are_refused_and_counted_out() -> None:
    found = search(model(LLAMA70), gpu("H100-SXM"), Point(1000, 500, 1, precision="bf16"))
    assert any("does not fit 1 × H100-SXM" in line for line in found.refused)
    assert all(c.layout.gpus > 1 for c in found.best)


def test_precisions_compete() -> None:
    found = search(
        model(LLAMA70), gpu("B200"), Point(1000, 500, 1), precisions=["bf16", "fp8", "fp4"], count=200
    )
    assert found.best[0].precision in ("fp8", "fp4")


def test_nothing_fits_and_impossible_slo_are_answers() -> None:
    with pytest.raises(CannotServeError, match="at least"):
        search(model("deepseek-ai/DeepSeek-V3"), gpu("L4"), Point(1000, 500, 1, precision="fp8"))
    with pytest.raises(
        CannotServeError, match=r"no layout of .* meets TTFT ≤ 1e-06 s .*the nearest has TTFT"
    ):
        search(model(LLAMA70), gpu("H100-SXM"), SHOP, slo_ttft_s=1e-6)
    with pytest.raises(InputError, match="slo_ttft_s"):
        search(model(LLAMA70), gpu("H100-SXM"), SHOP, slo_ttft_s=-1)
