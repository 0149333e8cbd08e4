"""Measured points: read from any subset of columns, exact where measured, fading to the model away from there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pertoken.catalog.gpus import gpu
from pertoken.catalog.models import model
from pertoken.errors import InputError
from pertoken.perf import predict
from pertoken.perf.measured import (
    MeasuredRow,
    Points,
    load_points,
    power_of_one,
    predict_measured,
    read_rows,
)
from pertoken.perf.point import Layout, Point

LLAMA = model("Llama-3.1-8B")
H100 = gpu("H100")
HEADER = (
    "gpu,n_gpus,model,precision,engine,input_len,output_len,concurrency,tokens_per_s,ttft_s,tpot_s,power_w\n"
)


def measured_file(path: Path, ratio: float = 1.3, concurrencies: tuple[int, ...] = (8, 32, 128)) -> Path:
    """Points that are `ratio` times what the model says."""
    at = Point(1000, 500, np.array(concurrencies, float), precision="fp8", engine="vllm")
    base = predict(LLAMA, H100, at)
    lines = [
        f"h100,1,Llama-3.1-8B,fp8,vllm-0.11,1000,500,{c},{ratio * t},{f},{o / ratio},600"
        for c, t, f, o in zip(
            concurrencies, base.tokens_per_s.value, base.ttft_s.value, base.tpot_s.value, strict=True
        )
    ]
    path.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def points(tmp_path: Path) -> Points:
    return load_points(measured_file(tmp_path / "points.csv"))


def point(concurrency: object, inputs: float = 1000, outputs: float = 500, engine: str = "vllm") -> Point:
    return Point(inputs, outputs, np.asarray(concurrency, float), precision="fp8", engine=engine)


def test_on_a_measured_point_the_answer_is_the_measurement(points: Points) -> None:
    found = predict_measured(points, LLAMA, H100, point([8, 32, 128]), predict)
    assert found is not None
    base = predict(LLAMA, H100, point([8, 32, 128]))
    # Runs repeat within 3 %, the model errs by some 15: a thirtieth of the 30 % stays with the model.
    assert found.tokens_per_s.value == pytest.approx(1.3 * base.tokens_per_s.value, rel=0.015)
    assert found.tpot_s.value == pytest.approx(base.tpot_s.value / 1.3, rel=0.015)
    assert found.gpu_power_w.value == pytest.approx(600, rel=0.05)
    assert found.basis == "measured"


def test_between_points_it_follows_the_physical_shape(points: Points) -> None:
    found = predict_measured(points, LLAMA, H100, point(64), predict)
    base = predict(LLAMA, H100, point(64))
    assert found is not None
    assert float(found.tokens_per_s.value) == pytest.approx(1.3 * float(base.tokens_per_s.value), rel=0.05)
    assert found.basis == "measured"


def test_far_from_all_points_it_is_the_model_again(points: Points) -> None:
    far = point(8, inputs=50_000, outputs=4000)
    found, base = predict_measured(points, LLAMA, H100, far, predict), predict(LLAMA, H100, far)
    assert found is not None
    assert float(found.tokens_per_s.value) == pytest.approx(float(base.tokens_per_s.value), rel=0.01)
    assert found.basis == base.basis
    width = np.log(found.tokens_per_s.high / found.tokens_per_s.low)
    assert width >= 0.99 * np.log(base.tokens_per_s.high / base.tokens_per_s.low)


def test_the_interval_narrows_towards_the_measurement(points: Points) -> None:
    found = predict_measured(points, LLAMA, H100, point([32, 2000]), predict)
    assert found is not None
    near, far = np.log(found.tokens_per_s.high / found.tokens_per_s.low)
    assert near < far


@pytest.mark.parametrize(
    ("of", "card", "asked"),
    [
        ("Llama-3.1-70B", "H200", Point(1000, 500, 32, precision="fp8")),
        ("Llama-3.1-8B", "H200", Point(1000, 500, 32, precision="fp8")),
        ("Llama-3.1-8B", "H100", Point(1000, 500, 32, precision="bf16")),
        ("Llama-3.1-8B", "H100", Point(1000, 500, 32, precision="fp8", engine="sglang")),
        ("Llama-3.1-8B", "H100", Point(1000, 500, 32, precision="fp8", layout=Layout(2))),
    ],
)
def test_points_of_another_configuration_say_nothing(
    points: Points, of: str, card: str, asked: Point
) -> None:
    assert predict_measured(points, model(of), gpu(card), asked, predict) is None


def test_unusable_rows_are_kept_with_their_reason(tmp_path: Path) -> None:
    path = measured_file(tmp_path / "points.csv")
    with path.open("a", encoding="utf-8") as file:
        file.write(
            "h100,1,Llama-3.1-8B,fp8,vllm,1000,,8,100,,,\nwarp9,1,Llama-3.1-8B,fp8,vllm,9,9,8,100,,,\n"
        )
        file.write("h100,1,Llama-3.1-8B,fp8,vllm,1000,500,saturation,100,,,\n")
    found = load_points(path)
    assert len(found.rows) == 3
    reasons = dict(found.unusable)
    assert reasons[5] == "no output_len"
    assert "warp9" in reasons[6]
    assert "saturation" in reasons[7]


def test_a_measurement_the_model_calls_impossible_bends_nothing(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text(HEADER + "h100,1,Llama-3.1-8B,fp8,vllm,200000,500,8,100,,,\n", encoding="utf-8")
    found = predict_measured(load_points(path), LLAMA, H100, point(8), predict)
    assert found is not None
    assert found.tokens_per_s.value == predict(LLAMA, H100, point(8)).tokens_per_s.value
    assert found.basis != "measured"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: no column gpu and no column model"),
        ("gpu,tokens_per_s\nh100,5\n", "line 1: no column model"),
        (HEADER + "h100,1,Llama-3.1-8B,fp8,vllm,1000,500,many,5,,,\n", "line 2: concurrency is 'many'"),
        (HEADER + "h100,1,Llama-3.1-8B,fp8,vllm,1000,500,8,-5,,,\n", "line 2: tokens_per_s is -5"),
        (HEADER + "h100,1,Llama-3.1-8B,fp8,vllm,1000,500,8,5,,,,,,,\n", "line 2: 16 cells under 12 columns"),
        (HEADER + 'h100,1,"Llama\n', "not a CSV line"),
        ("gpu,gpu,model\n", "column 'gpu' appears twice"),
        (HEADER, "no usable serving point"),
    ],
)
def test_a_malformed_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "points.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_points(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_garbage_and_a_missing_file_are_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_bytes(bytes(range(256)) * 4000)
    for bad in (path, tmp_path / "nowhere.csv", tmp_path):
        with pytest.raises(InputError) as caught:
            read_rows(bad)
        assert "\n" not in str(caught.value)


def test_columns_of_published_tables(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text(
        "gpu,model,precision,engine,input_len,output_len,concurrency,n_gpus,tp,ep,dp_attention,parallelism,disagg,"
        "prefill_gpus,decode_gpus,spec_decoding,median_ttft_s,median_tpot_s,tokens_per_s\n"
        "b200,gpt-oss-120b,mxfp4,trtllm-1.0.0rc3,1000,1000,saturation,4,,,,DEP4,,,,,,,4000\n"
        "b200,gpt-oss-120b,fp4,vllm,1000,1000,64,8,8,1,False,,,,,,0.2,0.01,4000\n"
        "b200,gpt-oss-120b,fp4,vllm,1000,1000,64,2,2,2,True,,,,,,,,4000\n"
        "gb200,DeepSeek-R1,fp4,dynamo-trt,1000,1000,64,20,,,,,True,4,16,none,,,4000\n"
        "gb200,DeepSeek-R1,fp4,dynamo-trt,1000,1000,64,20,,,,,True,4,16,mtp,,,4000\n"
        "b200,gpt-oss-120b,fp4,vllm,1000,1000,64,8,4,,,,,,,,,,4000\n",
        encoding="utf-8",
    )
    named, plain, spread, split, drafts, replicas = read_rows(path)
    assert named.layout == Layout(ep=4, dp=4)
    assert np.isinf(named.concurrency)
    assert named.measured == {"tokens_per_s": 1000.0}
    assert plain.layout == Layout(tp=8)
    assert (plain.measured["ttft_s"], plain.measured["tpot_s"]) == (0.2, 0.01)
    assert spread.layout == Layout(ep=2, dp=2)
    assert (split.layout, split.prefill_gpus, split.concurrency, split.gpus) == (Layout(tp=8), 2, 32, 20)
    assert "mtp" in drafts.problem
    assert (replicas.layout, replicas.gpus, replicas.concurrency) == (Layout(tp=4), 8, 32)
    assert replicas.measured["tokens_per_s"] == 500
    assert any("replicas that share the requests" in text for text in replicas.assumed)


def read(tmp_path: Path, header: str, *lines: str) -> list[MeasuredRow]:
    path = tmp_path / "points.csv"
    path.write_text("\n".join((header, *lines)) + "\n", encoding="utf-8")
    return read_rows(path)


def test_gpus_and_degrees_are_read_as_stated_or_refused(tmp_path: Path) -> None:
    rows = read(
        tmp_path,
        "gpu,model,input_len,output_len,concurrency,n_gpus,tp,ep,dp,dp_attention,tokens_per_s",
        "h100,gpt-oss-120b,1000,1000,64,8,,,,,4000",  # blank tp: all of them
        "h100,gpt-oss-120b,1000,1000,64,8,1,8,,,4000",  # tp 1 ep 8: tells of the experts
        "h100,gpt-oss-120b,1000,1000,64,8,1,1,,,4000",  # eight of one
        "h100,gpt-oss-120b,1000,1000,64,8,4,,2,,4000",
        "h100,gpt-oss-120b,1000,1000,64,8,,,,True,4000",
        "h100,gpt-oss-120b,1000,1000,2,8,1,1,,,4000",
        "h100,gpt-oss-120b,1000,1000,64,6,4,,,,4000",
        "h100,gpt-oss-120b,1000,1000,64,8,4,,1,,4000",
        "8x H100,gpt-oss-120b,1000,1000,64,,8.0,,,,4000",
        "8xH100,gpt-oss-120b,1000,1000,64,4,,,,,4000",
        "h100,gpt-oss-120b,1000,1000,64,24,24,,,,4000",
    )
    layouts = [(r.layout, r.gpus, r.concurrency) for r in rows]
    assert layouts[:5] == [
        (Layout(8), 8, 64), (Layout(8, ep=8), 8, 64), (Layout(1), 8, 8), (Layout(4, dp=2), 8, 64),
        (Layout(ep=8, dp=8), 8, 64),
    ]  # fmt: skip
    assert [r.problem for r in rows[:5]] == [""] * 5
    assert "tensor parallel over all GPUs" in rows[0].assumed
    assert rows[5].problem == "fewer requests at a time than its 8 replicas"
    assert rows[6].problem == "6 GPUs, but its degrees make 4"
    assert rows[7].problem == "8 GPUs, but its degrees make 4"
    assert (rows[8].gpu, rows[8].gpus, rows[8].problem) == ("H100", 8, "")
    assert rows[9].problem == "gpu says 8 GPUs, n_gpus 4"
    assert "tensor parallel over 24 GPUs" in rows[10].problem


def test_no_gpus_and_numbers_beyond_reason_are_refused(tmp_path: Path) -> None:
    header = "gpu,model,input_len,output_len,concurrency,n_gpus,tp,tokens_per_s"
    (none,) = read(tmp_path, header, "h100,m,1000,1000,64,0,1,4000")
    assert none.problem == "0 GPUs, but its degrees make 1"
    with pytest.raises(InputError, match="line 2: tokens_per_s is 1e300: a number from 0 to 1e\\+15"):
        read(tmp_path, header, "h100,m,1000,1000,64,1,1,1e300")
    (tiny,) = read(tmp_path, header, "h100,m,1000,1000,64,1,1,1e-30")
    assert tiny.measured == {}


def test_a_name_that_begins_with_a_digit_is_no_count(tmp_path: Path) -> None:
    rows = read(tmp_path, "gpu,model,n_gpus", "4090,m,1", "2xRTX 4090,m,", "7900 XTX,m,1")
    assert [(r.gpu, r.gpus) for r in rows] == [("4090", 1), ("RTX 4090", 2), ("7900 XTX", 1)]


def test_kinds_of_training(tmp_path: Path) -> None:
    kinds = {
        "pretrain": "pretrain", "MoE pre-training": "pretrain", "LoRA": "lora", "lora fine-tuning": "lora",
        "full fine-tune": "full", "full_finetune": "full", "SFT": "full", "finetuning": "full",
        "full-parameter": "full", "full": "full", "full_load": "", "inferencex_db_dump": "", "": "",
    }  # fmt: skip
    header = "gpu,model,n_gpus,input_len,tokens_per_s,kind,global_batch_size,mfu_pct"
    rows = read(tmp_path, header, *(f"h100,Llama-3.1-8B,8,8192,9000,{kind},," for kind in kinds))
    assert [r.training for r in rows] == list(kinds.values())
    by_number = read(tmp_path, header, "h100,m,8,8192,9000,,128,", "h100,m,8,8192,9000,,,45")
    assert [r.training for r in by_number] == ["pretrain", "pretrain"]
    other = read(tmp_path, header, "h100,m,8,8192,9000,QLoRA,8,", "h100,m,8,8192,9000,DPO,8,")
    assert [r.problem.split(" is")[0] for r in other] == ["kind qlora", "kind dpo"]


def test_one_output_token_is_one_however_lengths_are_drawn(tmp_path: Path) -> None:
    header = "gpu,model,input_len,output_len,concurrency,tokens_per_s,source"
    one, many = read(tmp_path, header, *(f"h100,m,1000,{n},4,10,InferenceMAX" for n in (1, 100)))
    assert (one.output_tokens, many.output_tokens) == (1.0, 90.0)


def test_power_of_one_gpu_where_that_of_all_would_be_less_than_idle(tmp_path: Path) -> None:
    header = "gpu,model,input_len,output_len,concurrency,n_gpus,tp,power_w"
    lines = (f"h100,gpt-oss-120b,1000,1000,64,8,8,{power_w}" for power_w in (600, 4000, 20))
    own, all_of_them, neither = (power_of_one(r, gpu("h100")) for r in read(tmp_path, header, *lines))
    assert own.measured["power_w"] == 600
    assert any("of one GPU" in text for text in own.assumed)
    assert all_of_them.measured["power_w"] == 500
    assert neither.measured["power_w"] == 2.5
