"""`pertoken validate`: every row scored or given a reason, scores by hand, tables of 100 columns, malformed files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pertoken.catalog.gpus import gpu
from pertoken.catalog.models import model
from pertoken.errors import InputError
from pertoken.perf import predict
from pertoken.perf._points import NUMBER_COLUMNS
from pertoken.perf.point import Layout, Point, TrainingPoint
from pertoken.perf.training import predict_training
from pertoken.report.validate import validate

ROOT = Path(__file__).parents[2]
SHARED = ROOT / ".." / "shared" / "data"
HEADER = (
    "gpu,n_gpus,model,precision,engine,input_len,output_len,concurrency,tp,tokens_per_s,ttft_s,tpot_s,power_w,"
    "joules_per_output_token"
)


def write(path: Path, *lines: str, header: str = HEADER) -> Path:
    path.write_text("\n".join((header, *lines)) + "\n", encoding="utf-8")
    return path


def test_scores_by_hand(tmp_path: Path) -> None:
    answer = predict(
        model("gpt-oss-120b"), gpu("H100"), Point(1000, 500, 32, precision="fp4", layout=Layout(4))
    )
    rate, watts = float(answer.tokens_per_s.value), float(answer.gpu_power_w.value)
    path = write(
        tmp_path / "p.csv",
        f"h100_sxm,4,openai/gpt-oss-120b,mxfp4,vllm,1000,500,32,4,{rate / 1.1},,,{4 * watts},{4 * watts / rate}",
        f"DGX-H100,4,gpt-oss-120b,nvfp4,vllm,1000,500,32,4,{rate / 0.8},,,,",
    )
    found = validate(path)
    overall = {s.quantity: s for s in found.overall}
    throughput = overall["tokens_per_s"]
    assert (throughput.rows, found.rows, found.answered) == (2, 2, 2)
    assert throughput.mean == pytest.approx(0.15)
    assert throughput.median == pytest.approx(0.15)
    assert throughput.p90 == pytest.approx(0.19)
    assert throughput.bias == pytest.approx(-0.05)
    assert overall["power_w"].mean == pytest.approx(0, abs=1e-6)
    assert overall["joules_per_output_token"].mean == pytest.approx(0, abs=1e-6)
    group = found.groups[0]
    assert (group.gpu, group.engine, group.precision, group.rows) == ("H100-SXM", "vllm", "fp4", 2)
    assert [w.line for w in found.worst] == [3, 2]
    assert found.worst[0].error == pytest.approx(-0.2)


def test_every_row_is_scored_or_has_a_reason(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.csv",
        "h100,1,Llama-3.1-8B,fp8,vllm,1000,500,32,,3000,,,,",
        "warp9,1,Llama-3.1-8B,fp8,vllm,1000,500,32,,3000,,,,",
        "h100,1,no/such-model,fp8,vllm,1000,500,32,,3000,,,,",
        "h100,1,Llama-3.1-8B,fp9,vllm,1000,500,32,,3000,,,,",
        "h100,1,Llama-3.1-405B,bf16,vllm,1000,500,32,,3000,,,,",
        "h100,1,Llama-3.1-8B,fp8,vllm,1000,500,,,3000,,,,",
        "h100,1,Llama-3.1-8B,fp8,vllm,1000,500,32,,,,,,",
        "h100,1,Llama-3.1-8B,fp8,vllm,300000,500,32,,3000,,,,",
        ",,,,,,,,,,,,,",
        "h100,1,Llama-3.1-8B,,,1000,500,saturation,,3000,,,,",
    )
    found = validate(path)
    reasons = {u.line: u.reason for u in found.unanswered}
    assert found.rows == 9
    assert found.answered == 2
    assert sorted(reasons) == [3, 4, 5, 6, 7, 8, 9]
    for line, text in {3: "warp9", 4: "no/such-model", 5: "fp9", 6: "does not fit", 7: "concurrency",
                       8: "nothing measured", 9: "context"}.items():  # fmt: skip
        assert text in reasons[line]
        assert "\n" not in reasons[line]


def test_training_rows(tmp_path: Path) -> None:
    answer = predict_training(
        model("mpt-7b"), gpu("A100-80GB-SXM"), TrainingPoint(8, 2048, 96, checkpointing="none")
    )
    rate, mfu = float(answer.tokens_per_s.value), float(answer.mfu.value)
    path = write(
        tmp_path / "p.csv",
        f"a100_80gb,8,mpt-7b,amp_bf16,llm-foundry,2048,{rate},96,False,{100 * mfu},pretrain",
        "H100,8,meta-llama/Llama-2-70b,fp8/fp4 mixed (see submission config),NeMo,8192,20000,8,,,lora",
        "H100,8,meta-llama/Llama-2-70b,FP8-MX,NeMo,8192,20000,8,,,lora",
        header="gpu,n_gpus,model,precision,engine,input_len,tokens_per_s,global_batch_size,activation_ckpt,mfu_pct,kind",
    )
    found = validate(path)
    overall = {s.quantity: s for s in found.overall}
    assert overall["training_tokens_per_s"].rows == 2
    assert overall["mfu_fraction"].mean == pytest.approx(0, abs=1e-6)
    assert "no fp4" in found.unanswered[0].reason
    assert {g.engine for g in found.groups} == {"pretrain", "lora"}


def test_gpu_counts_alone_are_read_as_the_layout_that_fits(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.csv",
        *(f"{gpu},8,DeepSeek-R1,fp8,dynamo-sglang,8000,1000,64,1600,True,4,4" for gpu in ("gb200", "gb300")),
        header="gpu,n_gpus,model,precision,engine,input_len,output_len,concurrency,tokens_per_s,disagg,prefill_gpus,decode_gpus",
    )
    settings = {s.gpu: s.setting for s in validate(path).scored}
    assert settings["GB200"].endswith(
        "c64 tp4 +4 prefill"
    )  # with attention replicated its weights do not fit
    assert settings["GB300"].endswith("c64 ep4 dp4 +4 prefill")


def test_a_training_row_without_a_training_figure_is_told_of(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.csv",
        "H100,8,Llama-3.1-8B,bf16,8192,,45,full fine-tune",
        "H100,8,Llama-3.1-8B,bf16,8192,0.2,,LoRA",
        "H100,8,Llama-3.1-8B,bf16,8192,0.2,,QLoRA",
        header="gpu,n_gpus,model,precision,input_len,joules_per_output_token,mfu_pct,kind",
    )
    found = validate(path)
    assert [(s.quantity, s.engine) for s in found.scored] == [("mfu_fraction", "full")]
    assert [u.reason.split(":")[0] for u in found.unanswered] == [
        "nothing measured to compare with",
        "kind qlora is not predicted",
    ]


@pytest.mark.parametrize("layout", ["acme--tiny-1B_config.json", "acme/tiny-1B/config.json"])
def test_models_from_a_folder_of_configs(tmp_path: Path, layout: str) -> None:
    config = tmp_path / "configs" / layout
    config.parent.mkdir(parents=True)
    config.write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048,
                "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
                "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 131072,
                "torch_dtype": "bfloat16", "tie_word_embeddings": True,
            }
        ),
        encoding="utf-8",
    )  # fmt: skip
    path = write(tmp_path / "p.csv", "h100,1,acme/tiny-1B,bf16,vllm,1000,500,32,,3000,,,,")
    assert "--models with a folder" in validate(path).unanswered[0].reason
    assert validate(path, tmp_path / "configs").answered == 1
    with pytest.raises(InputError, match="no folder"):
        validate(path, tmp_path / "nowhere")


def test_video_keeps_the_gpu_waiting_longer_than_images(tmp_path: Path) -> None:
    header = "gpu,n_gpus,model,precision,engine,input_len,output_len,concurrency,tokens_per_s,power_w,task"
    path = write(
        tmp_path / "p.csv",
        *(
            f"H100,1,Qwen/Qwen3-VL-8B-Instruct,bfloat16,vllm,1200,500,64,2000,500,{task}"
            for task in ("lm-arena-chat", "image-chat", "video-chat")
        ),
        header=header,
    )
    found = validate(path)
    _, image, video = (s.predicted for s in found.scored if s.quantity == "power_w")
    assert video < image


def test_input_lengths_a_task_does_not_publish_are_assumed_and_said(tmp_path: Path) -> None:
    header = "gpu,n_gpus,model,precision,engine,output_len,concurrency,tokens_per_s,task"
    path = write(tmp_path / "p.csv", "H100,1,Qwen3-14B,bf16,vllm,500,64,2000,lm-arena-chat", header=header)
    found = validate(path)
    assert dict(found.assumed) == {"200 input tokens of task lm-arena-chat": 1}
    assert "assumed in 1 rows" in str(found)


def test_the_table_fits_100_columns_and_json_is_plain(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.csv",
        "h100,1,Llama-3.1-8B,fp8,TensorRT-LLM (trtllm-bench throughput),1000,500,32,,3000,0.1,0.01,600,0.2",
        "RTX PRO 6000 Blackwell Server Edition,1,Llama-3.1-8B,fp8,vllm,1000,500,32,,3000,0.1,0.01,600,0.2",
        "warp9,1,Llama-3.1-8B,fp8,vllm,1000,500,32,,3000,,,,",
    )
    found = validate(path)
    text = str(found)
    assert max(len(line) for line in text.splitlines()) <= 100
    for words in ("2 of 3 rows scored", "time to first token", "Worst rows", "unknown GPU 'warp9'"):
        assert words in text
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again["answered"] == 2
    for score in again["overall"] + again["groups"]:
        own = [
            s
            for s in again["scored"]
            if all(score[k] in ("", s[k]) for k in ("quantity", "gpu", "engine", "precision"))
        ]
        errors = [s["predicted"] / s["measured"] - 1 for s in own]
        assert len(own) == score["rows"]
        assert score["mean"] == pytest.approx(sum(map(abs, errors)) / len(own))
        assert score["bias"] == pytest.approx(sum(errors) / len(own))
        assert score["coverage"] == pytest.approx(
            sum(s["low"] <= s["measured"] <= s["high"] for s in own) / len(own)
        )
    assert again["unanswered"][0]["line"] == 4
    assert {s["quantity"] for s in again["overall"]} == {
        "tokens_per_s", "ttft_s", "tpot_s", "power_w", "joules_per_output_token"}  # fmt: skip


def test_a_file_where_nothing_can_be_answered(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "warp9,1,Llama-3.1-8B,fp8,vllm,1000,500,32,,3000,,,,")
    found = validate(path)
    assert (found.overall, found.worst) == ((), ())
    assert "0 of 1 rows scored" in str(found)


CELLS = {
    "gpu": ["h100", "mi300x", "4x B200", "L4", "tpu-v6e", "NVIDIA GB300", "a100", "warp9"],
    "model": ["Llama-3.1-8B", "gpt-oss-120b", "DeepSeek-R1", "nemotronh_56b", "mpt-7b", "nobody/nothing"],
    "precision": ["", "fp8", "bf16", "NVFP4", "awq", "w8a8", "fp6"],
    "engine": ["", "vllm-0.6.3", "SGLang v0.4.9", "TensorRT-LLM 0.17", "tgi", "nim"],
    "kind": ["", "pretrain", "LoRA", "full fine-tune", "qlora", "inferencex_db_dump"],
    "task": ["", "gpqa", "video-chat", "summarization"],
    "parallelism": ["", "", "TP8", "DEP4", "EP8", "TP0"],
    "disagg": ["", "", "True"],
    "mode": ["", "", "agg", "disagg"],
    "dp_attention": ["", "True", "False"],
    "spec_decoding": ["", "none", "mtp"],
    "activation_ckpt": ["", "True", "selective"],
    "source": ["", "InferenceMAX CI"],
    "concurrency": ["", "saturation", "0.5", "1", "64.0", "1e9"],
}
NUMBERS = ["", "", "0", "0.5", "1", "2", "3", "8.0", "64", "1000", "1e6"]


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_row_is_scored_or_has_a_reason(tmp_path: Path, data: st.DataObject) -> None:
    columns = [*CELLS, *data.draw(st.sets(st.sampled_from(NUMBER_COLUMNS), min_size=4))]
    row = st.tuples(*(st.sampled_from(CELLS.get(name, NUMBERS)) for name in columns))
    lines = data.draw(st.lists(row.map(",".join), min_size=1, max_size=12))
    found = validate(write(tmp_path / "p.csv", *lines, header=",".join(columns)))
    assert found.answered + len(found.unanswered) == found.rows == len(lines)
    for s in found.scored:
        assert 0 < s.low <= s.predicted <= s.high < math.inf
    for u in found.unanswered:
        assert u.reason
        assert "\n" not in u.reason
    json.dumps(found.to_dict(), allow_nan=False)
    assert str(found)


def test_malformed_files_name_their_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "h100,1,Llama-3.1-8B,fp8,vllm,1000,500,32,,lots,,,,")
    with pytest.raises(InputError, match="line 2: tokens_per_s is 'lots'"):
        validate(path)


@pytest.fixture(scope="module", params=["training", "power_mlenergy", "serving_inferencemax", "serving_silicon",
                                        "serving_trtllm"])  # fmt: skip
def published(request: pytest.FixtureRequest) -> Path:
    path = SHARED / "performance" / f"{request.param}.csv"
    if not path.exists():
        pytest.skip("../shared/data is absent: the published tables cannot be scored")
    return path


def test_published_tables_are_answered_whole(published: Path) -> None:
    found = validate(published, SHARED / "model_configs")
    assert found.answered + len(found.unanswered) == found.rows
    assert found.answered > 0
    allowed = (
        "disaggregated without",
        "does not fit",
        "tensor parallel over",
        "speculative decoding",
        "no concurrency",
    )
    assert [u for u in found.unanswered if not any(text in u.reason for text in allowed)] == []
    for s in found.scored:
        assert math.isfinite(s.predicted)
        assert s.low <= s.predicted <= s.high
    assert max(len(line) for line in str(found).splitlines()) <= 100
    assert np.median([abs(s.error) for s in found.scored]) < 0.5
