"""`predict`: one point with intervals, the front, and what cannot be answered."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pertoken.catalog.models import model
from pertoken.cli import app
from pertoken.errors import (
    CannotServeError,
    InputError,
    MissingExtraError,
    NoEvidenceError,
    UnknownNameError,
)
from pertoken.perf.kernels import PACKAGE
from pertoken.perf.search import layouts
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


def test_points_alone_answer_where_asked_and_say_where_they_hold_nothing(tmp_path: Path) -> None:
    points = tmp_path / "points.csv"
    points.write_text(
        "gpu,n_gpus,model,precision,engine,input_len,output_len,concurrency,tokens_per_s,tp\n"
        f"H100,2,{LLAMA},fp8,vllm,1000,200,16,1234,2\n"
    )
    asked = {"input_tokens": 1000.0, "output_tokens": 200.0, "concurrency": 16.0, "precision": "fp8"}
    found = predict_point(LLAMA, "H100", points=points, predictor="measured", **asked)  # type: ignore[arg-type]
    assert found.point.layout.gpus == 2
    assert found.prediction.basis == "measured"
    assert float(found.prediction.tokens_per_s.value) == pytest.approx(1234, rel=0.05)
    with pytest.raises(NoEvidenceError, match=r"holds no point of .* on H200"):
        predict_point(LLAMA, "H200", points=points, predictor="measured", **asked)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs --points"):
        predict_point(LLAMA, "H100", predictor="measured", **asked)  # type: ignore[arg-type]


def test_kernels_answer_or_say_what_to_install_and_what_they_lack() -> None:
    asked = {"input_tokens": 1000.0, "output_tokens": 200.0, "concurrency": 16.0, "predictor": "kernels"}
    if importlib.util.find_spec(PACKAGE) is None:
        with pytest.raises(MissingExtraError, match=r"pip install 'pertoken\[kernels\]'"):
            predict_point("gpt-oss-120b", "H100", tp=4, **asked)  # type: ignore[arg-type]
    else:
        found = predict_point("gpt-oss-120b", "H100", tp=4, **asked)  # type: ignore[arg-type]
        assert "aiconfigurator-core" in found.to_dict()["source"]
    with pytest.raises(NoEvidenceError, match=r"no kernel tables for MI300X.*use the roofline"):
        predict_point("gpt-oss-120b", "MI300X", **asked)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown predictor 'kernel': one of roofline, measured, kernels"):
        predict_point("gpt-oss-120b", "H100", **(asked | {"predictor": "kernel"}))  # type: ignore[arg-type]


def test_requests_that_wait_for_memory_are_said() -> None:
    line = ["predict", "--model", "meta-llama/Llama-3.3-70B-Instruct", "--gpu", "H100", "--tp", "2"]
    line += ["--input-tokens", "8000", "--output-tokens", "1000", "--precision", "bf16", "--concurrency"]
    plain = json.loads(CliRunner().invoke(app, [*line, "32", "--json"]).stdout)
    fit = round(plain["max_concurrency"])
    assert 1 <= fit < 32
    told = " ".join(CliRunner().invoke(app, [*line, "32"]).stdout.split())
    wait = "wait" if fit < 31 else "waits"
    assert f"note: 32 requests at a time were asked, {fit} fit in memory: {32 - fit} {wait}, which" in told
    one_more = " ".join(CliRunner().invoke(app, [*line, str(fit + 1)]).stdout.split())
    assert f"{fit} fit in memory: 1 waits, which" in one_more
    assert "fit in memory:" not in CliRunner().invoke(app, [*line, str(fit)]).stdout


def test_the_command_takes_a_predictor_and_a_task() -> None:
    line = ["predict", "--model", LLAMA, "--gpu", "H100", "--input-tokens", "200", "--output-tokens", "390"]
    line += ["--concurrency", "64", "--precision", "bf16", "--tp", "1", "--json"]
    runs = [CliRunner().invoke(app, line + more) for more in ([], ["--task", "lm-arena-chat"])]
    plain, task = (json.loads(run.stdout) for run in runs)
    assert "lm-arena-chat" in task["source"]
    assert "lm-arena-chat" not in plain["source"]
    # ML.ENERGY measured 5,147 tokens/s and 610 W there.
    assert task["tokens_per_s"]["value"] == pytest.approx(5147, rel=0.1)
    assert task["gpu_power_w"]["value"] == pytest.approx(610, rel=0.1)
    assert task["tokens_per_s"]["low"] < 5147 < task["tokens_per_s"]["high"]
    same = json.loads(CliRunner().invoke(app, [*line, "--predictor", "roofline"]).stdout)
    assert same == plain


@pytest.mark.parametrize("more", [["--predictor", "kernels"], ["--task", "gpqa"], ["--points", "a.csv"]])
def test_the_front_is_the_rooflines(more: list[str]) -> None:
    line = ["predict", "--model", LLAMA, "--gpu", "H100", "--input-tokens", "200", "--output-tokens", "390"]
    refused = CliRunner().invoke(app, [*line, "--curve", *more])
    assert isinstance(refused.exception, InputError)
    assert "not with --curve" in str(refused.exception)


def test_without_prompts_all_energy_is_of_output_tokens() -> None:
    found = predict_point("Llama-3.1-8B", "H100", input_tokens=0, output_tokens=100, concurrency=4)
    rate, watts = float(found.prediction.tokens_per_s.value), float(found.prediction.gpu_power_w.value)
    assert found.joule_per_token["at the board"] == {"output": pytest.approx(watts / rate)}


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"tp": 3}, "--tp 3: engines split heads over 1, 2, 4, 8 or 16 GPUs"),
        ({"tp": 32}, "--tp 32"),
        ({"gpus": 3}, "makes 3 GPUs: degrees"),
        ({"gpus": 8, "tp": 16}, "makes 8 GPUs with --tp 16"),
    ],
)
def test_layouts_no_engine_runs_are_refused(asked: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        predict_point("Llama-3.1-8B", "H100", input_tokens=100, output_tokens=100, concurrency=4, **asked)


def test_no_chosen_layout_is_wider_than_engines_are() -> None:
    assert max(found.tp for found in layouts(model("Llama-3.1-405B"), 128)) == 16
