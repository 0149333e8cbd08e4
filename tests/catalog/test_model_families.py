"""Configs of families with habits of their own: sizes against the count published of one model of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pertoken.catalog.models import model_from_config

# Published totals of the checkpoints, by comment or by model type. Those of Phi-3-mini, Gemma 2, Gemma 3, Granite 4
# and OLMo were looked up on 24 November 2026, the others are as the model pages showed them in 2025.
OTHERS: list[tuple[int, dict[str, Any]]] = [
    (124_439_808, {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions":
        1024, "vocab_size": 50257}),
    (125_239_296, {"model_type": "opt", "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 2048, "vocab_size": 50272}),
    # EleutherAI/pythia-6.9b
    (6_857_302_016, {"model_type": "gpt_neox", "hidden_size": 4096, "intermediate_size": 16384,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 50432, "tie_word_embeddings":
        False}),
    # tiiuae/falcon-7b: one KV head; falcon-40b: eight
    (6_921_720_704, {"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32,
        "num_kv_heads": 71, "num_attention_heads": 71, "multi_query": True, "new_decoder_architecture":
        False, "parallel_attn": True, "bias": False, "vocab_size": 65024}),
    (41_303_293_952, {"model_type": "falcon", "hidden_size": 8192, "num_hidden_layers": 60,
        "num_kv_heads": 8, "num_attention_heads": 128, "multi_query": True, "new_decoder_architecture":
        True, "bias": False, "vocab_size": 65024}),
    # microsoft/phi-2, Phi-3-mini, Phi-3.5-MoE
    (2_779_683_840, {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 51200}),
    (3_821_079_552, {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
        "sliding_window": 2047}),
    (41_873_153_344, {"model_type": "phimoe", "attention_bias": True, "hidden_size": 4096,
        "intermediate_size": 6400, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 2, "vocab_size": 32064}),
    # bigcode/starcoder2-15b
    (15_957_889_024, {"model_type": "starcoder2", "hidden_size": 6144, "intermediate_size": 24576,
        "num_hidden_layers": 40, "num_attention_heads": 48, "num_key_value_heads": 4, "vocab_size": 49152,
        "use_bias": True, "sliding_window": 4096, "tie_word_embeddings": False}),
    # CohereLabs/c4ai-command-r-plus
    (103_810_674_688, {"model_type": "cohere", "hidden_size": 12288, "intermediate_size": 33792,
        "num_hidden_layers": 64, "num_attention_heads": 96, "num_key_value_heads": 8, "vocab_size": 256000,
        "use_qk_norm": True}),
    # allenai/OLMo-7B-hf, OLMoE-1B-7B, Olmo-3-32B
    (6_888_095_744, {"model_type": "olmo", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size":
        50304}),
    (6_919_161_856, {"model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "vocab_size": 50304}),
    (32_233_522_176, {"model_type": "olmo3", "hidden_size": 5120, "intermediate_size": 27648,
        "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 100278,
        "sliding_window": 4096}),
    # internlm/internlm2_5-7b
    (7_737_708_544, {"model_type": "internlm2", "bias": False, "hidden_size": 4096, "intermediate_size":
        14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size":
        92544}),
    # google/gemma-7b, gemma-2-27b, gemma-3-27b without the keys Google leaves out
    (8_537_680_896, {"model_type": "gemma", "hidden_size": 3072, "intermediate_size": 24576, "head_dim":
        256, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size":
        256000}),
    (27_227_128_320, {"model_type": "gemma2", "hidden_size": 4608, "intermediate_size": 36864,
        "head_dim": 128, "num_hidden_layers": 46, "num_attention_heads": 32, "num_key_value_heads": 16,
        "vocab_size": 256000, "sliding_window": 4096}),
    (27_432_406_640, {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text",
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024}, "vision_config": {"model_type":
        "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "patch_size": 14, "image_size": 896}}),
    # Qwen/Qwen-7B, Qwen1.5-MoE-A2.7B
    (7_721_324_544, {"model_type": "qwen", "hidden_size": 4096, "intermediate_size": 22016,
        "num_hidden_layers": 32, "num_attention_heads": 32, "kv_channels": 128, "vocab_size": 151936,
        "seq_length": 8192}),
    (14_315_784_192, {"model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
        "decoder_sparse_step": 1, "vocab_size": 151936}),
    # databricks/dbrx-base
    (131_596_523_520, {"model_type": "dbrx", "d_model": 6144, "n_layers": 40, "n_heads": 48,
        "vocab_size": 100352, "max_seq_len": 32768, "attn_config": {"kv_n_heads": 8}, "ffn_config":
        {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4}, "tie_word_embeddings": False}),
    # zai-org/glm-4-9b-chat
    (9_399_951_360, {"model_type": "chatglm", "hidden_size": 4096, "ffn_hidden_size": 13696,
        "num_layers": 40, "num_attention_heads": 32, "multi_query_group_num": 2, "kv_channels": 128,
        "padded_vocab_size": 151552, "seq_length": 131072, "add_qkv_bias": True}),
    # tencent/Hunyuan-A13B-Instruct
    (80_393_183_232, {"model_type": "hunyuan_v1_moe", "hidden_size": 4096, "intermediate_size": 3072,
        "moe_intermediate_size": [3072] * 32, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "attention_head_dim": 128, "num_experts": 64, "moe_topk": [8] * 32,
        "num_shared_expert": [1] * 32, "use_qk_norm": True, "use_cla": False, "vocab_size": 128167,
        "tie_word_embeddings": True}),
    # baidu/ERNIE-4.5-21B-A3B-PT
    (21_825_437_888, {"model_type": "ernie4_5_moe", "hidden_size": 2560, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 20,
        "num_key_value_heads": 4, "head_dim": 128, "moe_num_experts": 64, "moe_k": 6,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 27,
        "moe_layer_interval": 1, "vocab_size": 103424, "use_bias": False}),
    # ByteDance-Seed/Seed-OSS-36B
    (36_151_104_512, {"model_type": "seed_oss", "hidden_size": 5120, "intermediate_size": 27648,
        "head_dim": 128, "num_hidden_layers": 64, "num_attention_heads": 80, "num_key_value_heads": 8,
        "attention_bias": True, "vocab_size": 155136}),
    # deepseek-ai/deepseek-moe-16b-base
    (16_375_728_128, {"model_type": "deepseek", "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 28, "num_attention_heads": 16,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "moe_layer_freq": 1, "vocab_size": 102400}),
    # ibm-granite/granite-3.1-8b, granite-4.0-h-small
    (8_170_848_256, {"model_type": "granite", "hidden_size": 4096, "intermediate_size": 12800,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 49155,
        "tie_word_embeddings": True}),
    (32_207_337_984, {"model_type": "granitemoehybrid", "hidden_size": 4096, "intermediate_size": 768,
        "shared_intermediate_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 72, "num_experts_per_tok": 10, "layer_types":
        ["mamba"] * 36 + ["attention"] * 4, "mamba_n_heads": 128, "mamba_d_state": 128, "mamba_n_groups": 1,
        "mamba_d_conv": 4, "mamba_expand": 2, "vocab_size": 100352, "tie_word_embeddings": True}),
    # tiiuae/Falcon-H1-34B
    (33_642_516_224, {"model_type": "falcon_h1", "hidden_size": 5120, "intermediate_size": 21504,
        "head_dim": 128, "num_hidden_layers": 72, "num_attention_heads": 20, "num_key_value_heads": 4,
        "mamba_d_ssm": 4096, "mamba_n_heads": 32, "mamba_d_state": 256, "mamba_n_groups": 2, "mamba_d_conv":
        4, "vocab_size": 261120}),
    # bigscience/bloom-7b1, LGAI-EXAONE/EXAONE-3.5-7.8B, nvidia/Minitron-8B, stabilityai/stablelm-2-1_6b
    (7_069_016_064, {"model_type": "bloom", "n_embed": 4096, "n_layer": 30, "num_attention_heads": 32,
        "vocab_size": 250880}),
    (7_818_448_896, {"model_type": "exaone", "hidden_size": 4096, "intermediate_size": 14336,
        "num_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 102400}),
    (8_272_060_416, {"model_type": "nemotron", "hidden_size": 4096, "intermediate_size": 16384,
        "head_dim": 128, "num_hidden_layers": 32, "num_attention_heads": 48, "num_key_value_heads": 8,
        "vocab_size": 256000}),
    (1_644_515_328, {"model_type": "stablelm", "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 32, "use_qkv_bias": True,
        "vocab_size": 100352}),
    # moonshotai/Kimi-Linear-48B-A3B, rednote-hilab/dots.llm1, inclusionAI/Ling-mini-2.0
    (49_122_681_728, {"model_type": "kimi_linear", "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 27, "num_attention_heads": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "num_experts": 256, "num_experts_per_token": 8,
        "moe_intermediate_size": 1024, "num_shared_experts": 1, "first_k_dense_replace": 1,
        "vocab_size": 163840, "linear_attn_config": {"kda_layers": [i for i in range(1, 27) if i % 4],
        "num_heads": 32, "head_dim": 128, "short_conv_kernel_size": 4}}),
    (142_774_381_696, {"model_type": "dots1", "hidden_size": 4096, "intermediate_size": 10944,
        "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
        "n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "vocab_size": 152064}),
    (16_255_643_392, {"model_type": "bailing_moe", "hidden_size": 2048, "intermediate_size": 5120,
        "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 256, "num_experts_per_tok": 8, "num_shared_experts": 1,
        "moe_intermediate_size": 512, "first_k_dense_replace": 1, "use_qk_norm": True,
        "use_bias": False, "vocab_size": 157184}),
    # Qwen/Qwen2.5-VL-7B-Instruct with its encoder
    (8_292_166_656, {"model_type": "qwen2_5_vl", "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152064, "sliding_window": 32768, "use_sliding_window": False, "vision_config": {
        "model_type": "qwen2_5_vl", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420,
        "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}}),
    # 01-ai/Yi-34B as a type nobody knows: read as a Llama
    (34_388_917_248, {"model_type": "unheard_of", "hidden_size": 7168, "intermediate_size": 20480,
        "num_hidden_layers": 60, "num_attention_heads": 56, "num_key_value_heads": 8, "vocab_size": 64000}),
]  # fmt: skip


@pytest.mark.parametrize(("published", "config"), OTHERS, ids=[str(c["model_type"]) for _, c in OTHERS])
def test_other_families_match_their_published_count(
    published: int, config: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    assert model_from_config(path).parameters == pytest.approx(published, rel=0.001)
