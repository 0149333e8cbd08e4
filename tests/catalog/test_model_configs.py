"""Models from a config.json: all published ones at hand, how names are found, bad keys and bad files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pertoken.catalog.models import Model, model, model_from_config, models_dir
from pertoken.errors import InputError, UnknownNameError

CONFIGS = Path(__file__).parents[2] / ".." / "shared" / "data" / "model_configs"
FILES = sorted(f for f in CONFIGS.glob("*_config.json") if not f.name.endswith("hf_quant_config.json"))
here = pytest.mark.skipif(not FILES, reason="../shared/data is absent")


def write(folder: Path, config: object, name: str = "org--thing_config.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip


def same_layers(m: Model, row: Model) -> bool:
    ours = [(a.kind, a.layers, a.parameters, a.kv_values_per_token, a.window) for a in m.attention]
    theirs = [(a.kind, a.layers, a.parameters, a.kv_values_per_token, a.window) for a in row.attention]
    return sorted(ours) == sorted(theirs)


@here
def test_all_published_configs_load() -> None:
    assert len(FILES) >= 80
    found = models_dir(CONFIGS)
    assert len(found) == len(FILES)
    assert all("/" in name and m.name == name for name, m in found.items())


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name.removesuffix("_config.json"))
def test_a_config_gives_what_its_row_gives(file: Path) -> None:
    m = model_from_config(file)
    try:
        row = model(m.name)
    except UnknownNameError:
        billions = float(re.findall(r"(\d+(?:\.\d+)?)B", m.name)[0])
        assert m.parameters == pytest.approx(billions * 1_000_000_000, rel=0.03)
        return
    decoder = m.parameters - m.encoder_parameters
    assert decoder == pytest.approx(row.parameters - row.encoder_parameters, rel=0.005)
    assert m.active_parameters == pytest.approx(row.active_parameters, rel=0.005)
    assert same_layers(m, row)
    if m.encoder_parameters:
        assert m.encoder_parameters == pytest.approx(row.encoder_parameters, rel=0.01)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name.removesuffix("_config.json"))
def test_the_precision_in_a_name_is_that_of_its_config(file: Path) -> None:
    m = model_from_config(file)
    if "NVFP4" in m.name:
        assert m.native_precision == "fp4"
    elif "FP8" in m.name:
        assert m.native_precision == "fp8"


@here
@pytest.mark.parametrize(
    ("name", "precision", "attention"),
    [
        ("openai--gpt-oss-120b", "fp4", "bf16"),
        ("deepseek-ai--DeepSeek-V3", "fp8", ""),
        ("deepseek-ai--DeepSeek-V4-Pro", "fp4", "fp8"),
        ("sgl-project--DeepSeek-V4-Pro-FP8", "fp8", ""),
        ("moonshotai--Kimi-K2.5", "int4", "bf16"),
        ("moonshotai--Kimi-K3", "fp4", "bf16"),
        ("nvidia--Llama-3.1-70B-Instruct-FP8", "fp8", ""),
        ("nvidia--DeepSeek-V3.1-NVFP4", "fp4", "bf16"),
        ("nvidia--Qwen3-235B-A22B-NVFP4", "fp4", ""),
        ("meta-llama--Meta-Llama-3.1-8B", "bf16", ""),
    ],
)
def test_precision_from_either_quantisation_file(name: str, precision: str, attention: str) -> None:
    m = model_from_config(CONFIGS / f"{name}_config.json")
    assert (m.native_precision, m.attention_precision) == (precision, attention)


def test_an_unknown_type_says_how_it_was_read(tmp_path: Path) -> None:
    m = model_from_config(write(tmp_path, {**LLAMA, "model_type": "unheard_of"}))
    assert "model_type 'unheard_of' is not known: read as a Llama-like decoder" in m.sources[1]
    assert len(model_from_config(write(tmp_path, LLAMA)).sources) == 1


def test_names_come_from_file_cache_config_or_folder(tmp_path: Path) -> None:
    assert model_from_config(write(tmp_path, LLAMA)).name == "org/thing"
    snapshot = tmp_path / "models--meta--small" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert model_from_config(write(snapshot, LLAMA, "config.json")).name == "meta/small"
    plain = tmp_path / "my-model"
    plain.mkdir()
    assert model_from_config(write(plain, {**LLAMA, "_name_or_path": "a/b"}, "config.json")).name == "a/b"
    write(plain, {**LLAMA, "_name_or_path": "/mnt/b"}, "config.json")
    assert model_from_config(plain).name == "b"
    write(plain, LLAMA, "config.json")
    assert model_from_config(plain).name == "my-model"


BLOCKS = [
    {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 5.25}},
    {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
    {"attention": {"n_heads_in_group": 8}, "ffn": {"no_op": True}},
]


def test_layers_pruned_one_by_one(tmp_path: Path) -> None:
    config = {**LLAMA, "model_type": "nemotron-nas", "num_hidden_layers": 3, "block_configs": BLOCKS}
    m = model_from_config(write(tmp_path, config))
    heads = 2 * 4096 * 4096
    attention = heads + 2 * 4096 * 8 * 128 + heads + 2 * 4096 * 4 * 128
    ffn = 3 * 4096 * (14336 + 2816)  # 2/3 × 4096 = 2730, rounded up to 256
    assert m.parameters == attention + ffn + 2 * 4096 * 128256 + 4096 * (4 + 1)
    assert m.kv_values_per_token == 2 * 8 * 128 + 2 * 4 * 128


def test_a_pruned_model_without_its_layers_takes_them_from_the_catalogue(tmp_path: Path) -> None:
    config = {**LLAMA, "model_type": "nemotron-nas", "hidden_size": 8192, "num_hidden_layers": 80}
    named = write(tmp_path, config, "nvidia--Llama-3_3-Nemotron-Super-49B-v1_config.json")
    m = model_from_config(named)
    assert m.parameters == model("Llama-3_3-Nemotron-Super-49B-v1").parameters
    assert "has no block_configs" in m.sources[0]
    with pytest.raises(InputError, match=r"key 'block_configs' is None: the layers of org/thing are needed"):
        model_from_config(write(tmp_path, config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": None},
            r"key 'hidden_size' \(or n_embd.*\) is missing: use the config.json published",
        ),
        ({"vocab_size": None}, "key 'vocab_size'.* is missing"),
        ({"intermediate_size": None}, "key 'intermediate_size'.* is missing"),
        ({"num_hidden_layers": -1}, "key 'num_hidden_layers' is -1: a whole number from 1"),
        (
            {"num_hidden_layers": 10**9},
            "key 'num_hidden_layers' is 1000000000: a whole number from 1 to 10000",
        ),
        ({"hidden_size": "4096"}, "key 'hidden_size' is '4096': a whole number"),
        ({"hidden_size": True}, "key 'hidden_size' is True: a whole number"),
        ({"hidden_size": 4096.5}, "key 'hidden_size' is 4096.5: a whole number"),
        ({"hidden_size": math.nan}, "key 'hidden_size' is nan: a whole number"),
        ({"num_key_value_heads": 5}, "key 'num_key_value_heads' is 5: a divisor of the 32 attention heads"),
        (
            {"num_attention_heads": 30, "num_key_value_heads": 30},
            "key 'num_attention_heads' is 30: a divisor of",
        ),
        ({"tie_word_embeddings": "no"}, "key 'tie_word_embeddings' is 'no': true or false"),
        ({"num_local_experts": 4, "num_experts_per_tok": 5}, "a token cannot visit more experts than the 4"),
        ({"num_local_experts": 4}, "key 'num_experts_per_tok'.* is missing"),
        (
            {"layer_types": ["full_attention"]},
            "key 'layer_types' is 'a list of 1': one entry for each of 32 layers",
        ),
        ({"layer_types": ["retention"] * 32}, "key 'layer_types' is 'retention': a layer of full_attention"),
        (
            {"quantization_config": {"quant_method": "new"}},
            "key 'quantization_config' is 'new': a method out of",
        ),
        ({"model_type": "bert"}, "key 'model_type' is 'bert': a decoder-only language model"),
        ({"is_encoder_decoder": True}, "a decoder-only language model is needed"),
        ({"model_type": "mixtral"}, "key 'num_local_experts' is missing"),
        ({"model_type": "deepseek_v3"}, "key 'kv_lora_rank' is missing"),
        ({"model_type": "qwen3_5"}, "key 'linear_num_value_heads' is missing"),
        ({"model_type": "nemotron_h"}, r"key 'hybrid_override_pattern' \(or layers_block_type\) is missing"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M*X"}, "32 letters out of M"),
        (
            {"model_type": "jamba", "attn_layer_period": 8},
            "key 'attn_layer_period' is 8: this part of a jamba",
        ),
        ({"model_type": "mllama", "cross_attention_layers": [3]}, "key 'cross_attention_layers'"),
        ({"model_type": "new_mamba"}, "key 'model_type' is 'new_mamba': this architecture is not known"),
        ({"attn_type_list": [0] * 32}, "key 'attn_type_list' is 0: 1 .softmax attention. in every layer"),
        ({"hidden_size_per_layer_input": 256}, "key 'hidden_size_per_layer_input' is 256"),
        (
            {"model_type": "unheard_of", "num_selected_experts": 4},
            "key 'num_selected_experts' is 4: this part of",
        ),
        ({"text_config": 3}, "key 'text_config' is 3: an object is needed"),
        ({"text_config": {"hidden_size": 0}}, "key 'text_config.hidden_size' is 0"),
    ],
)
def test_a_bad_key_is_named_with_what_was_found(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, {**LLAMA, **changes})
    with pytest.raises(InputError, match=message) as caught:
        model_from_config(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1, 2]", "holds a list, not an object"),
        (b"\xff\xfe\x00", "is not text"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"x" * 10_000_000, "is not JSON"),
        (b" " * 50_000_001, "too large for a model config"),
    ],
)
def test_what_is_no_config_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        model_from_config(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_missing_file_or_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        model_from_config(tmp_path / "nothing.json")
    with pytest.raises(InputError, match="cannot be read"):
        model_from_config(tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        models_dir(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"holds no org--name_config\.json"):
        models_dir(tmp_path)


def test_a_folder_of_configs_by_name(tmp_path: Path) -> None:
    write(tmp_path, LLAMA)
    write(tmp_path, {"quantization": {"quant_algo": "FP8"}}, "org--thing_hf_quant_config.json")
    found = models_dir(tmp_path)
    assert list(found) == ["org/thing"]
    assert found["org/thing"].native_precision == "fp8"


MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 768,
}
LATENT = {
    **LLAMA, "model_type": "deepseek_v32", "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "index_topk": 2048, "index_n_heads": 64,
    "index_head_dim": 128, "moe_layer_freq": [0] * 3 + [1] * 29,
}  # fmt: skip
HYBRID = {
    **LLAMA, "model_type": "nemotron_h", "hybrid_override_pattern": "M*-M" * 8, "mamba_num_heads": 64,
    "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4,
}  # fmt: skip
WINDOWS = {**LLAMA, "layer_types": ["sliding_attention", "full_attention"] * 16, "sliding_window": 128}

rubbish = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2**40), st.floats(), st.text(max_size=5),
    st.lists(st.one_of(st.integers(-1, 3), st.text(max_size=3), st.none(), st.just({})), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@given(st.sampled_from([LLAMA, MOE, LATENT, HYBRID, WINDOWS]), st.data())
def test_rubbish_is_an_input_error_or_a_model_with_sound_sizes(
    config: dict[str, Any], data: st.DataObject
) -> None:
    from pertoken.catalog._architecture import build
    from pertoken.catalog._config import architecture

    keys = data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=2, unique=True))
    broken = {**config, **{key: data.draw(rubbish) for key in keys}}
    try:
        m = build(architecture(broken, Path("org--thing_config.json")))
    except InputError:
        return
    assert 0 < m.active_parameters <= m.parameters < math.inf
    assert 0 <= m.kv_read_values(1000.0) <= m.kv_values(1000.0) < math.inf


def test_layers_with_experts_are_found_however_they_are_told(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = [
        {"first_k_dense_replace": 16},
        {"mlp_only_layers": list(range(16))},
        {"decoder_sparse_step": 2},
        {"interleave_moe_layer_step": 2},
        {"moe_layer_freq": [0, 1] * 16},
        {"moe_layer_freq": 2},
        {"mlp_layer_types": ["dense", "sparse"] * 16},
        {"moe_layers_enum": ",".join(map(str, range(16, 40)))},
        {"moe_layer_start_index": 16, "moe_layer_end_index": -1, "moe_layer_interval": 1},
    ]
    for keys in told:
        m = model_from_config(write(tmp_path, {**MOE, **keys}))
        assert (m.moe_layers, m.dense_ffn_layers) == (16, 16), keys
    with pytest.raises(InputError, match="key 'moe_layers_enum' is '4,x'"):
        model_from_config(write(tmp_path, {**MOE, "moe_layers_enum": "4,x"}))
