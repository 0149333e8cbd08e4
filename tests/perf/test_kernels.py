"""Kernel tables: the pip line where the extra is absent, a real prediction where it is installed."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from pertoken.catalog.gpus import gpu
from pertoken.catalog.models import model
from pertoken.errors import MissingExtraError, NoEvidenceError
from pertoken.perf import predict
from pertoken.perf.kernels import BACKENDS, PACKAGE, SYSTEMS, predict_kernels
from pertoken.perf.point import Layout, Point

INSTALLED = importlib.util.find_spec(PACKAGE) is not None
POINT = Point(1000, 1000, np.array([1.0, 16.0, 128.0]), precision="fp4", engine="vllm", layout=Layout(tp=4))


def test_without_the_extra_the_error_is_the_pip_line_and_with_it_a_prediction() -> None:
    found, card = model("gpt-oss-120b"), gpu("H100")
    if not INSTALLED:
        with pytest.raises(MissingExtraError, match=r"pip install 'pertoken\[kernels\]'"):
            predict_kernels(found, card, POINT)
        return
    answer, roofline = predict_kernels(found, card, POINT), predict(found, card, POINT)
    assert answer.tokens_per_s.value.shape == (3,)
    assert (np.diff(answer.tokens_per_s.value) > 0).all()
    assert (np.diff(answer.tpot_s.value) > 0).all()
    assert answer.tokens_per_s.value == pytest.approx(roofline.tokens_per_s.value, rel=0.5)
    assert "aiconfigurator-core" in answer.source
    for asked in (replace(POINT, engine="atom"), replace(POINT, prefill_gpus=4)):
        with pytest.raises(NoEvidenceError):
            predict_kernels(found, card, asked)
    with pytest.raises(NoEvidenceError, match="MI300X"):
        predict_kernels(found, gpu("MI300X"), POINT)


def test_every_system_is_a_gpu_of_the_catalogue() -> None:
    assert [gpu(name).name for name in SYSTEMS] == list(SYSTEMS)
    assert set(BACKENDS) == {"vllm", "sglang", "trt"}
