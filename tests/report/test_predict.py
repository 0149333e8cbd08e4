"""`predict`: one point with intervals, the front, and what cannot be answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pertoken.errors import CannotServeError, InputError, UnknownNameError
from pertoken.report.predict import predict_curve, predict_point

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


def test_a_point_has_every_quantity_with_its_interval() -> None:
    found = predict_point(
        LLAMA, "H100", input_tokens=1000, output_tokens=200, concurrency=16, precision="fp8"
    )
    plain = found.to_dict()
    json.dumps(plain, allow_nan=False)
    for name in ("tokens_per_s", "tokens_per_s_per_gpu", "ttft_s", "tpot_s", "gpu_power_w"):
        assert 0 < plain[name]["low"] < plain[name]["value"] < plain[name]["high"]
    assert plain["basis"] in ("fitted", "roofline")
    assert plain["gpus"] == 1


def test_energy_of_input_and_output_is_the_power_of_the_replica() -> None:
    found = predict_point(LLAMA, "H100", input_tokens=1000, output_tokens=200, concurrency=16, gpus=2)
    plain = found.to_dict()
    per_s = plain["tokens_per_s"]["value"]
    energy = plain["joule_per_token"]["at the plug"]
    watts = energy["output"] * per_s + energy["input"] * per_s * 1000 / 200
    assert watts == pytest.approx(plain["server_power_w_per_gpu"] * 2)
    assert plain["joule_per_token"]["at the board"]["output"] < energy["output"]


def test_the_fewest_gpus_that_fit_are_taken_and_degrees_are_obeyed() -> None:
    big = predict_point(
        "meta-llama/Llama-3.3-70B-Instruct",
        "H100",
        input_tokens=500,
        output_tokens=100,
        concurrency=4,
        precision="bf16",
    )
    assert big.point.layout.gpus == 2
    given = predict_point(LLAMA, "H100", input_tokens=500, output_tokens=100, concurrency=4, tp=4)
    assert given.point.layout.tp == 4
    assert given.point.layout.gpus == 4


def test_the_front_trades_throughput_for_speed(tmp_path: Path) -> None:
    front = predict_curve(
        LLAMA, "H100", input_tokens=1000, output_tokens=200, usd_per_gpu_hour=3.0, precision="fp8"
    )
    gpu = [p.tokens_per_s_per_gpu for p in front.points]
    user = [p.tokens_per_s_per_user for p in front.points]
    assert gpu == sorted(gpu, reverse=True)
    assert user == sorted(user)
    first = front.points[0]
    assert first.usd_per_mtok_output == pytest.approx(3.0 / (first.tokens_per_s_per_gpu * 3600) * 1e6)
    front.to_html(tmp_path / "front.html")
    assert "USD per M output" in (tmp_path / "front.html").read_text(encoding="utf-8")
    front.to_png(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(front.to_dict(), allow_nan=False)


def test_without_a_price_the_catalogue_is_asked_and_named() -> None:
    front = predict_curve(LLAMA, "H100", input_tokens=1000, output_tokens=200)
    assert front.usd_per_gpu_hour > 0
    assert "on-demand prices in the catalogue" in front.price_source


def test_what_cannot_be_answered_says_why() -> None:
    with pytest.raises(CannotServeError, match="GiB"):
        predict_point("deepseek-ai/DeepSeek-V3", "L4", input_tokens=100, output_tokens=100, concurrency=1)
    with pytest.raises(UnknownNameError, match="did you mean"):
        predict_point("Llama-3.1-9B", "H100", input_tokens=100, output_tokens=100, concurrency=1)
    with pytest.raises(InputError, match="makes 3 GPUs"):
        predict_point(LLAMA, "H100", gpus=3, input_tokens=100, output_tokens=100, concurrency=1)
    with pytest.raises(InputError):
        predict_point(LLAMA, "H100", input_tokens=-1, output_tokens=100, concurrency=1)
    with pytest.raises(InputError):
        predict_point(LLAMA, "H100", input_tokens=float("nan"), output_tokens=100, concurrency=1)


def test_a_config_file_is_a_model(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 32000, "torch_dtype": "bfloat16",
        "max_position_embeddings": 8192,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    found = predict_point(str(path), "L4", input_tokens=100, output_tokens=100, concurrency=1)
    assert float(found.prediction.tokens_per_s.value) > 0
