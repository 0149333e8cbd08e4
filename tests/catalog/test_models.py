"""Sizes computed from architecture against published ones; work and cache by context; names."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pertoken.catalog.models import STATE_FLOPS_PER_VALUE, Model, model, models
from pertoken.errors import UnknownNameError

PERFORMANCE = Path(__file__).parents[2] / ".." / "shared" / "data" / "performance"

# Exact counts are totals of the checkpoint's safetensors on the Hugging Face Hub, looked up on 24 November 2026 in
# public copies of its API's answers; where the checkpoint also holds layers for multi-token prediction, or no copy
# was found, the count is the publisher's own, rounded as published.
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "meta-llama/Llama-2-7b": 6_738_415_616,
    "meta-llama/Llama-2-13b": 13_015_864_320,
    "meta-llama/Llama-2-70b": 68_976_648_192,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-4-Scout-17B-16E": 108_641_793_536,
    "meta-llama/Llama-4-Maverick-17B-128E": 401_583_781_376,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": 480_154_875_392,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen/Qwen3-VL-30B-A3B-Instruct": 31_070_754_032,
    "deepseek-ai/DeepSeek-V2-Lite": 15_706_484_224,
    "deepseek-ai/DeepSeek-V2": 235_741_434_880,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-3-12b-it": 12_187_325_040,
    "google/gemma-3-27b-it": 27_432_406_640,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Base-2501": 23_572_403_200,
    "mistralai/Mistral-Small-3.1-24B-Base-2503": 24_011_361_280,
    "mistralai/Mistral-Large-Instruct-2407": 122_610_069_504,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": 8_888_227_328,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "allenai/OLMo-2-0325-32B": 32_234_279_936,
    # README_WEIGHTS.md of deepseek-ai/DeepSeek-V3: main model, without 14 B of multi-token prediction
    "deepseek-ai/DeepSeek-V3": 671_000_000_000,
    "openai/gpt-oss-120b": 116_829_156_672,  # 116.83 B in arXiv 2508.10925, table 1
    "openai/gpt-oss-20b": 20_914_757_184,  # 20.91 B there
    # Mistral AI, model card of Mixtral-8x22B: 141B
    "mistralai/Mixtral-8x22B-v0.1": 141_000_000_000,
    # DeepSeek V4 preview, api-docs.deepseek.com, April 2026
    "deepseek-ai/DeepSeek-V4-Flash": 284_000_000_000,
    # model cards: 49.9B, 35B, 111B, 397B, 744B, 31.6B, 120.6B, 309B, 196B
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1": 49_900_000_000,
    "CohereLabs/c4ai-command-r-v01": 35_000_000_000,
    "CohereLabs/c4ai-command-a-03-2025": 111_000_000_000,
    "Qwen/Qwen3.5-397B-A17B": 397_000_000_000,
    "zai-org/GLM-5": 744_000_000_000,
    "MiniMaxAI/MiniMax-M2.5": 228_689_764_864,  # safetensors of M2.7, the same architecture
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B": 31_600_000_000,
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B": 120_600_000_000,
    "XiaomiMiMo/MiMo-V2-Flash": 309_000_000_000,
    "stepfun-ai/Step-3.7-Flash": 196_000_000_000,
    # older ones: safetensors totals as above, unless a paper is named
    "openai/gpt-3-175b": 175_000_000_000,  # arXiv 2005.14165, table 2.1
    "EleutherAI/gpt-j-6b": 6_050_882_784,
    "tiiuae/falcon-180B": 179_522_565_120,
    "huggyllama/llama-65b": 65_285_660_672,
    "codellama/CodeLlama-34b-hf": 33_743_970_304,
    "01-ai/Yi-34B": 34_388_917_248,
    "databricks/dbrx-base": 131_596_523_520,
    "CohereLabs/c4ai-command-r-plus": 103_810_674_688,
    "nvidia/Nemotron-4-340B-Base": 341_000_000_000,  # arXiv 2406.11704: 340 B
    "mistralai/Codestral-22B-v0.1": 22_247_282_688,
    "allenai/OLMo-2-1124-13B": 13_716_198_400,
    "ibm-granite/granite-3.3-8b-instruct": 8_170_848_256,  # granite-3.1, four tokens fewer
    "deepseek-ai/deepseek-llm-67b-base": 67_425_001_472,
    "deepseek-ai/deepseek-coder-33b-base": 33_342_991_360,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-2-27b-it": 27_227_128_320,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3-medium-128k-instruct": 13_960_238_080,
    "Qwen/Qwen1.5-72B": 72_287_920_128,
    "Qwen/Qwen2-57B-A14B": 57_409_006_592,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen2.5-VL-32B-Instruct": 33_452_718_336,
    "Qwen/Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    # llm-foundry, scripts/train/benchmarking, at 2,048 tokens
    "mosaicml/mpt-125m": 125_000_000,
    "mosaicml/mpt-1b": 1_315_000_000,
    "mosaicml/mpt-7b": 6_655_000_000,
    "mosaicml/mpt-70b": 64_862_000_000,
}

# Billions as the publisher rounds them, and the last digit's unit.
ACTIVE = {
    "openai/gpt-oss-120b": (5.13, 0.01),  # arXiv 2508.10925, table 1
    "openai/gpt-oss-20b": (3.61, 0.01),  # the same
    "mistralai/Mixtral-8x7B-v0.1": (12.9, 0.1),  # mistral.ai/news/mixtral-of-experts
    "mistralai/Mixtral-8x22B-v0.1": (39, 1),  # mistral.ai/news/mixtral-8x22b
    "deepseek-ai/DeepSeek-V3": (36.7, 0.1),  # README_WEIGHTS.md
    "deepseek-ai/DeepSeek-V2": (21, 1),  # arXiv 2405.04434
    "deepseek-ai/DeepSeek-V4-Flash": (13, 1),  # DeepSeek V4 preview, April 2026
    "deepseek-ai/DeepSeek-V4-Pro": (49, 1),  # the same
    "moonshotai/Kimi-K2-Instruct": (32.6, 0.1),  # arXiv 2507.20534
    "Qwen/Qwen3-30B-A3B": (3.3, 0.1),  # model card
    "Qwen/Qwen3-235B-A22B": (22, 1),  # arXiv 2505.09388
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": (35, 1),  # model card
    "Qwen/Qwen3.5-397B-A17B": (17, 1),  # model card
    "Qwen/Qwen3.5-122B-A10B": (10, 1),  # model card
    "databricks/dbrx-base": (36, 1),  # model card
    "Qwen/Qwen2-57B-A14B": (14, 1),  # arXiv 2407.10671
    "meta-llama/Llama-4-Scout-17B-16E": (17, 1),  # model card
    "meta-llama/Llama-4-Maverick-17B-128E": (17, 1),  # model card
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B": (3.6, 0.1),  # arXiv 2512.20856, with embeddings
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B": (12.7, 0.1),  # model card
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B": (55, 1),  # model card
    "google/gemma-4-26B-A4B": (3.8, 0.1),  # model card
    "MiniMaxAI/MiniMax-M2.5": (10, 1),  # model card
    "XiaomiMiMo/MiMo-V2-Flash": (15, 1),  # model card
    "stepfun-ai/Step-3.7-Flash": (11, 1),  # model card
}

BF16_BYTES = 2


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_parameters_match_the_published_count(name: str, published: int) -> None:
    assert model(name).parameters == pytest.approx(published, rel=0.005)


def test_most_counts_are_exact() -> None:
    exact = [name for name, published in PUBLISHED.items() if model(name).parameters == published]
    assert len(exact) >= 40, sorted(set(PUBLISHED) - set(exact))


@pytest.mark.parametrize(("name", "published"), ACTIVE.items())
def test_active_parameters_match_the_published_count(name: str, published: tuple[float, float]) -> None:
    billions, unit = published
    computed = model(name).active_parameters / 1_000_000_000
    assert abs(computed - billions) <= max(0.02 * billions, unit / 2)


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        (
            "meta-llama/Llama-3.1-70B",
            327_680,
        ),  # 2 × 80 layers × 8 heads × 128 × 2 bytes; NVIDIA and vLLM docs
        ("meta-llama/Llama-3.1-8B", 131_072),
        ("meta-llama/Llama-3.1-405B", 516_096),  # arXiv 2505.09343, table 1: 516.096 KB
        ("Qwen/Qwen2.5-72B", 327_680),  # arXiv 2505.09343, table 1: 327.680 KB
        ("deepseek-ai/DeepSeek-V3", 70_272),  # arXiv 2505.09343, table 1: 70.272 KB
    ],
)
def test_cache_bytes_per_token_match_the_published(name: str, bytes_per_token: int) -> None:
    assert model(name).kv_values_per_token * BF16_BYTES == bytes_per_token


def test_cache_of_deepseek_v4_pro_at_a_million_tokens() -> None:
    """AINews, 25 April 2026: 9.62 GiB per sequence of 1 M tokens in bf16, 8.7 times less than V3.2."""
    context = 1024 * 1024
    v4 = model("DeepSeek-V4-Pro").kv_values(context) * BF16_BYTES / 2**30
    v32 = model("DeepSeek-V3.2").kv_values(context) * BF16_BYTES / 2**30
    assert v4 == pytest.approx(9.62, abs=0.02)
    assert v32 / v4 == pytest.approx(8.7, abs=0.05)


def test_every_size_of_the_two_layer_model_by_hand() -> None:
    m = model("pertoken/test-2-layer")
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64  # q, k and v of two heads of 16, o
    ffn = 3 * 64 * 128
    always = 2 * (attention + ffn) + 64 * 5 + 64 * 256  # five norms, the head
    assert m.always_parameters == always
    assert m.parameters == always + 64 * 256
    assert m.active_parameters == m.parameters
    assert m.routed_parameters == 0
    assert m.gemm_parameters == always - 64 * 5
    assert m.kv_values_per_token == 2 * 2 * 2 * 16
    assert m.kv_values(10) == m.kv_read_values(10) == 10 * 128
    assert m.attention_flops(10) == 2 * 4 * 4 * 16 * 10
    assert m.flops_per_token(10) == 2 * (always - 64 * 5) + m.attention_flops(10)


def test_experts_by_hand() -> None:
    m = model("Mixtral-8x7B")
    assert m.expert_parameters == 3 * 4096 * 14336
    assert m.routed_parameters == 32 * 8 * 3 * 4096 * 14336
    assert m.active_routed_parameters == 32 * 2 * 3 * 4096 * 14336
    assert m.parameters == m.always_parameters + m.routed_parameters + 32000 * 4096


def test_a_tied_head_is_counted_once_but_read_every_step() -> None:
    m = model("Llama-3.2-1B")
    assert m.parameters == m.always_parameters
    assert m.gemm_parameters > m.parameters - m.norm_parameters - 1


def test_sliding_layers_stop_growing_at_their_window() -> None:
    m = model("gpt-oss-120b")  # 18 layers see 128 tokens, 18 see all; 8 heads of 64
    per_layer = 2 * 8 * 64
    assert m.kv_values(100) == 36 * per_layer * 100
    assert m.kv_values(1000) == 18 * per_layer * (1000 + 128)
    assert m.kv_values_per_token == 18 * per_layer
    assert m.attention_flops(1000) == 18 * 4 * 64 * 64 * (1000 + 128)


def test_sparse_layers_hold_all_and_read_their_choice_and_the_index() -> None:
    m = model("DeepSeek-V3.2")
    assert m.kv_values(10_000) == 61 * 10_000 * (512 + 64 + 128)
    assert m.kv_read_values(10_000) == 61 * (2048 * (512 + 64) + 10_000 * 128)
    scores = 2 * 128 * (2 * 512 + 64) * 2048
    index = 2 * 64 * 128 * 10_000
    assert m.attention_flops(10_000) == 61 * (scores + index)


def test_prompts_of_latent_attention_expand_to_heads() -> None:
    m = model("DeepSeek-V3")
    assert m.attention_flops(1.0) == 61 * 2 * 128 * (2 * 512 + 64)
    assert m.attention_flops(1.0, prefill=True) == 61 * 2 * 128 * (192 + 128)
    dense = model("Llama-3.1-8B")
    assert dense.flops_per_token(500.0, prefill=True) == dense.flops_per_token(500.0)


def test_linear_layers_hold_a_state_whatever_the_context() -> None:
    m = model("Nemotron-H-56B")
    linear = next(a for a in m.attention if a.kind == "linear")
    state = 256 * 64 * 256 + (256 * 64 + 2 * 8 * 256) * 3
    assert linear.state_values == state
    assert m.kv_values(0) == 54 * state
    assert m.attention_flops(0) == 54 * state * STATE_FLOPS_PER_VALUE
    assert m.kv_values_per_token == 10 * 2 * 8 * 128


@pytest.mark.parametrize("name", list(models()))
def test_every_row_is_complete_and_sound(name: str) -> None:
    m = models()[name]
    assert m.name == name
    assert m.sources
    assert m.checked >= "2026"
    assert m.max_context >= 1024
    assert m.native_precision in {"bf16", "fp8", "fp4", "int4"}
    assert 0 < m.active_parameters <= m.parameters
    assert m.dense_ffn_layers + m.moe_layers <= m.layers
    assert m.experts_active <= m.experts
    assert {a.kind for a in m.attention} <= {"full", "sliding", "mla", "sparse", "linear"}
    own = sum(a.layers for a in m.attention if a.parameters)
    hybrid_of_single_blocks = own + m.dense_ffn_layers + m.moe_layers == m.layers
    assert own == m.layers or hybrid_of_single_blocks or name.endswith("Nemotron-Super-49B-v1")


def test_the_catalogue_covers_what_the_issue_names() -> None:
    assert len(models()) >= 100
    for name in (
        "Llama-3.3-70B", "Qwen3-0.6B", "Qwen3.5-27B", "Qwen3.5-35B-A3B", "DeepSeek-R1", "gemma-3-27b",
        "gemma-4-31B", "Mistral-Nemo", "Kimi-K2.5", "Kimi-K3", "GLM-4.5", "GLM-5.3", "MiniMax-M2",
        "Nemotron-H-8B", "mpt-30b",
    ):  # fmt: skip
        assert model(name).parameters > 0


def test_rows_read_one_by_one_are_the_rows_of_the_whole_file() -> None:
    from pertoken.catalog import _model_rows

    text = (Path(_model_rows.__file__).parent / "data" / "models.yaml").read_text(encoding="utf-8")
    rows = yaml.safe_load(text)
    assert list(rows) == list(models())
    for name, row in rows.items():
        assert _model_rows._aliases(name) == tuple(row.get("aliases", ()))
        assert _model_rows._row(name) | {k: v for k, v in row.items() if k != "like"} == _model_rows._row(
            name
        )


def test_no_name_leads_to_two_rows() -> None:
    from pertoken.catalog import _model_rows

    names = [n for row in models() for n in (row, *_model_rows._aliases(row))]
    assert len({_model_rows._keys(n)[0] for n in names}) == len(names)


contexts = st.floats(min_value=0, max_value=2e6)
any_model = st.sampled_from(list(models().values()))


@given(any_model, contexts, contexts)
def test_cache_and_work_never_shrink_with_context(m: Model, a: float, b: float) -> None:
    short, long = sorted((a, b))
    assert m.kv_values(short) <= m.kv_values(long)
    assert m.kv_read_values(short) <= m.kv_read_values(long)
    assert m.attention_flops(short) <= m.attention_flops(long)
    assert m.kv_read_values(long) <= m.kv_values(long) * (1 + 1e-12)
    assert m.flops_per_token(short) >= 2 * m.gemm_parameters


@given(any_model, st.lists(contexts, min_size=1, max_size=6))
def test_arrays_give_what_single_numbers_give(m: Model, context: list[float]) -> None:
    array = np.array(context)
    for curve in (m.kv_values, m.kv_read_values, m.attention_flops, m.flops_per_token):
        values = curve(array)
        assert values.shape == array.shape
        assert values.tolist() == [curve(c) for c in context]


def test_arrays_keep_their_shape() -> None:
    m = model("gpt-oss-20b")
    assert m.kv_values(np.ones((2, 3))).shape == (2, 3)
    assert isinstance(m.kv_values(5.0), float)


@given(any_model)
def test_parts_sum_to_the_whole(m: Model) -> None:
    embedding = m.embedding_parameters - (m.head_parameters if m.tied_embedding else 0)
    parts = (
        sum(a.layers * a.parameters for a in m.attention)
        + m.dense_ffn_layers * m.dense_ffn_parameters
        + m.moe_layers * (m.shared_expert_parameters + m.experts * m.expert_parameters)
        + m.norm_parameters
        + m.head_parameters
        + embedding
        + m.encoder_parameters
    )
    assert math.isclose(parts, m.parameters, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("asked", "name", "precision"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", "bf16"),
        ("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B", "bf16"),
        ("llama3.1:8b", "meta-llama/Llama-3.1-8B", "bf16"),
        ("llama31_405b", "meta-llama/Llama-3.1-405B", "bf16"),
        ("llama2-70b-99.9", "meta-llama/Llama-2-70b", "bf16"),
        ("amd/Llama-3.3-70B-Instruct-MXFP4-Preview", "meta-llama/Llama-3.3-70B-Instruct", "fp4"),
        ("amd/gpt-oss-120b-w-mxfp4-a-fp8", "openai/gpt-oss-120b", "fp4"),
        ("Qwen/Qwen2-72B-Instruct", "Qwen/Qwen2.5-72B", "bf16"),
        ("lmsys/vicuna-13b-v1.5", "meta-llama/Llama-2-13b", "bf16"),
        ("microsoft/Phi-3-mini-128k-instruct", "microsoft/Phi-3.5-mini-instruct", "bf16"),
        ("nvidia/Nemotron-4-340B-Instruct", "nvidia/Nemotron-4-340B-Base", "bf16"),
        ("Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B", "bf16"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B", "bf16"),
        ("Llama-2-70b-chat-hf", "meta-llama/Llama-2-70b", "bf16"),
        ("nvidia/Llama-3.1-8B-Instruct-FP8", "meta-llama/Llama-3.1-8B", "fp8"),
        ("neuralmagic/Meta-Llama-3.1-8B-Instruct-FP8-dynamic", "meta-llama/Llama-3.1-8B", "fp8"),
        ("RedHatAI/Meta-Llama-3.1-70B-Instruct-quantized.w8a8", "meta-llama/Llama-3.1-70B", "int8"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "meta-llama/Llama-3.1-8B", "int4"),
        ("Qwen/Qwen2.5-72B-Instruct-AWQ", "Qwen/Qwen2.5-72B", "int4"),
        ("Qwen/Qwen3-32B-FP8-Static-PerTensor", "Qwen/Qwen3-32B", "fp8"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507-FP8", "Qwen/Qwen3-30B-A3B-Instruct-2507", "fp8"),
        ("Qwen3-VL-30B-A3B-Thinking", "Qwen/Qwen3-VL-30B-A3B-Instruct", "bf16"),
        ("deepseek-ai/DeepSeek-V3-0324", "deepseek-ai/DeepSeek-V3", "fp8"),
        ("nvidia/DeepSeek-R1-0528-NVFP4-v2", "deepseek-ai/DeepSeek-R1", "fp4"),
        ("nvidia/NVIDIA-Nemotron-Nano-12B-v2-FP8", "nvidia/NVIDIA-Nemotron-Nano-12B-v2", "fp8"),
        ("unsloth/gpt-oss-20b-BF16", "openai/gpt-oss-20b", "bf16"),
        ("LLAMA3.1_405B", "meta-llama/Llama-3.1-405B", "bf16"),
        ("Qwen3_30B_a3B", "Qwen/Qwen3-30B-A3B", "bf16"),
        ("DeepSeekV3", "deepseek-ai/DeepSeek-V3", "fp8"),
        ("GPT_OSS_120B", "openai/gpt-oss-120b", "fp4"),
        ("mpt-7b", "mosaicml/mpt-7b", "bf16"),
    ],
)
def test_variants_are_the_model_they_are_variants_of(asked: str, name: str, precision: str) -> None:
    found = model(asked)
    assert found.name == name
    assert found.native_precision == precision
    assert found.parameters == models()[name].parameters


@pytest.mark.parametrize(
    "asked",
    [
        "Llama-3.1-80B", "Llama-27b", "Llama-3.1-8B-Chinese", "gpt-oss", "qwen3", "Qwen3-80B",
        "Mistral-Large-2402", "Mistral-Small-2409", "Llama-3-1.8B", "DeepSeek-V3.5", "Kimi-K2-Lite", "", "/",
        "FP8", "2507", "a/b/c", "🦙",
    ],
)  # fmt: skip
def test_no_name_is_guessed(asked: str) -> None:
    with pytest.raises(UnknownNameError):
        model(asked)


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean Llama-3\.1-8B") as caught:
        model("Llama-3.1-80B")
    assert "Llama-3.1-70B" in caught.value.nearest
    with pytest.raises(UnknownNameError, match=r"did you mean meta-llama/Llama-3\.1-8B"):
        model("meta-llama/Llama-3.1-8C")


def test_every_name_finds_its_own_row() -> None:
    for name in models():
        assert model(name).name == name
        assert model(name.rpartition("/")[2].upper()).name == name


@pytest.mark.skipif(not PERFORMANCE.is_dir(), reason="../shared/data is absent")
def test_every_measured_model_is_known() -> None:
    names = set()
    for file in PERFORMANCE.glob("*.csv"):
        with file.open(newline="") as rows:
            names |= {(row["model"], row.get("params", "")) for row in csv.DictReader(rows)}
    assert len(names) > 40
    for name, billions in names:
        found = model(name)
        if billions and not name.startswith("mpt"):  # MPT's counts include positions of each context length
            text = found.parameters - found.encoder_parameters
            assert text / 1_000_000_000 == pytest.approx(float(billions), rel=0.06)
