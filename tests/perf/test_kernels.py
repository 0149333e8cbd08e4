"""Kernel tables: the pip line where the extra is absent, refusals that need no package, and the closed loop over a
stand-in with the package's own calls; where the package is installed, over its real tables too."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pertoken.catalog.gpus import gpu
from pertoken.catalog.models import model
from pertoken.errors import MissingExtraError, NoEvidenceError
from pertoken.perf import kernels, predict
from pertoken.perf.kernels import BACKENDS, PACKAGE, SYSTEMS, predict_kernels
from pertoken.perf.point import Layout, Point

INSTALLED = importlib.util.find_spec(PACKAGE) is not None
POINT = Point(1000, 1000, np.array([1.0, 16.0, 128.0]), precision="fp4", engine="vllm", layout=Layout(tp=4))
STAND_IN = '''
class EngineHandle:
    """The calls of aiconfigurator-core 0.12's EngineHandle; times that can be reckoned by hand."""

    @classmethod
    def compile(cls, model_path, system, backend, *, tp_size=1, pp_size=1, attention_dp_size=1, moe_tp_size=None,
                moe_ep_size=None, gemm_quant_mode=None, moe_quant_mode=None, kvcache_quant_mode=None,
                fmha_quant_mode=None):
        if system == "l4":
            raise RuntimeError("No performance data for l4\\nsecond line")
        made = cls()
        made.asked = (model_path, system, backend, tp_size, attention_dp_size, moe_tp_size, moe_ep_size)
        return made

    def decode_step_latency(self, gen_tokens, isl, osl, gen_seq_imbalance_correction_scale=1.0):
        return 5.0 + 0.05 * gen_tokens

    def predict_prefill_latency(self, bs, isl, prefix=0):
        return 0.02 * bs * (isl - prefix)
'''


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package of the same name and calls, ahead of any that is installed."""
    for name in [n for n in sys.modules if n.split(".")[0] == PACKAGE]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / PACKAGE / "sdk").mkdir(parents=True)
    (tmp_path / PACKAGE / "model_configs").mkdir()
    (tmp_path / PACKAGE / "__init__.py").write_text("")
    (tmp_path / PACKAGE / "sdk" / "__init__.py").write_text(STAND_IN)
    (tmp_path / PACKAGE / "model_configs" / "openai--gpt-oss-120b_config.json").write_text("{}")
    info = tmp_path / "aiconfigurator_core-0.12.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: aiconfigurator-core\nVersion: 0.12.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    kernels._compiled.cache_clear()
    kernels._carried.cache_clear()
    yield
    for name in [n for n in sys.modules if n.split(".")[0] == PACKAGE]:
        del sys.modules[name]  # not through monkeypatch, whose undoing would bring the stand-in back
    kernels._compiled.cache_clear()
    kernels._carried.cache_clear()


def test_without_the_extra_the_error_is_the_pip_line_and_with_it_a_prediction() -> None:
    found, card = model("gpt-oss-120b"), gpu("H100")
    if not INSTALLED:
        with pytest.raises(MissingExtraError, match=r"pip install 'pertoken\[kernels\]'"):
            predict_kernels(found, card, POINT)
        return
    answer, roofline = predict_kernels(found, card, POINT), predict(found, card, POINT)
    assert (np.diff(answer.tokens_per_s.value) > 0).all()
    assert (np.diff(answer.tpot_s.value) > 0).all()
    assert answer.tokens_per_s.value == pytest.approx(roofline.tokens_per_s.value, rel=0.5)
    assert "aiconfigurator-core" in answer.source


def test_one_request_by_hand(stand_in: None) -> None:
    # Prompt 1000 × 0.02 = 20 ms; 1000 steps of 5.05 ms: cycle 5.07 s.
    answer = predict_kernels(model("gpt-oss-120b"), gpu("H100"), POINT)
    assert answer.tokens_per_s.value[0] == pytest.approx(1000 / 5.07)
    assert answer.ttft_s.value[0] == pytest.approx(0.020 + 0.00505 / 2)
    assert answer.prefill_fraction[0] == pytest.approx(0.020 / 5.07)
    assert (np.diff(answer.tokens_per_s.value) > 0).all()
    # Little's law at every concurrency.
    held = answer.tokens_per_s.value / 1000 * (answer.ttft_s.value + 1000 * answer.tpot_s.value)
    assert held == pytest.approx([1.0, 16.0, 128.0])


def test_it_says_its_basis_its_interval_and_its_source(stand_in: None) -> None:
    answer = predict_kernels(model("gpt-oss-120b"), gpu("H100"), POINT)
    for interval in (answer.tokens_per_s, answer.ttft_s, answer.tpot_s, answer.gpu_power_w):
        assert (interval.low < interval.value).all()
        assert (interval.value < interval.high).all()
    assert answer.basis == "fitted"
    assert "aiconfigurator-core 0.12.0 kernel tables of h100_sxm, vllm" in answer.source


def test_power_is_that_of_the_kernels_throughput(stand_in: None) -> None:
    slow = predict_kernels(model("gpt-oss-120b"), gpu("B200"), POINT)
    base = predict(model("gpt-oss-120b"), gpu("B200"), POINT)
    slower = slow.tokens_per_s.value < base.tokens_per_s.value
    assert slower.any()
    assert ((slow.gpu_power_w.value < base.gpu_power_w.value) == slower).all()
    assert (slow.gpu_power_w.high <= gpu("B200").tdp_w).all()


def test_what_the_package_cannot_answer_is_one_error_of_ours(stand_in: None) -> None:
    with pytest.raises(
        NoEvidenceError, match="l4, vllm have no answer for openai/gpt-oss-120b: No performance"
    ):
        predict_kernels(model("gpt-oss-120b"), gpu("L4"), replace(POINT, layout=Layout(tp=8)))
    with pytest.raises(NoEvidenceError, match=r"carries no config of meta-llama/Llama-3\.1-8B"):
        predict_kernels(model("Llama-3.1-8B"), gpu("H100"), replace(POINT, precision="bf16"))


def test_what_the_tables_lack_is_said_whether_installed_or_not() -> None:
    found = model("gpt-oss-120b")
    with pytest.raises(NoEvidenceError, match=r"no kernel tables for MI300X.*use the roofline"):
        predict_kernels(found, gpu("MI300X"), POINT)
    with pytest.raises(NoEvidenceError, match=r"engine 'atom'.*use the roofline"):
        predict_kernels(found, gpu("H100"), replace(POINT, engine="atom"))
    with pytest.raises(NoEvidenceError, match="disaggregated"):
        predict_kernels(found, gpu("H100"), replace(POINT, prefill_gpus=4))


def test_every_system_is_a_gpu_of_the_catalogue() -> None:
    assert [gpu(name).name for name in SYSTEMS] == list(SYSTEMS)
    assert set(BACKENDS) == {"vllm", "sglang", "trt"}
