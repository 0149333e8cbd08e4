"""What a config.json leaves unsaid, by model family: NAME_MAP from a foreign `model_type` to its habits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Family:
    """Habits of one family: the published class's defaults and what its code does without a key."""

    bias: str = ""
    """Biases of attention without an `attention_bias` key: ``qkv``, ``qkvo``."""
    bias_key: str = "qkvo"
    """Which projections `attention_bias: true` means."""
    qk_norm: str = ""
    tied: bool = False
    gated: bool = True
    ffn_bias: bool = False
    norms: int = 2
    norm_bias: bool = False
    final_norm: bool = True
    sliding: str = "key"
    """When `sliding_window` counts: ``key`` wherever it is set, ``flag`` only with use_sliding_window."""
    pattern: int = 0
    """Every so many layers one is full, the others slide (0: no habit)."""
    router_bias: bool = False
    shared_gate: bool = False
    head: int = 0
    gate: bool = False
    """Attention has an output gate unless `attn_output_gate` says otherwise."""
    counts_embedding: bool = True
    """Whether the publisher's active count includes the input embedding."""
    needs: tuple[str, ...] = ()
    """Keys (or one of several) without which a config is not of this family, read or not."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of keys that published configs of the family leave out."""
    known: bool = True


LLAMA = Family()
_QWEN2 = Family(bias="qkv", bias_key="qkv", sliding="flag")
_QWEN3 = Family(qk_norm="head", sliding="flag")
_QWEN3_MOE = replace(_QWEN3, needs=("num_experts",))
_QWEN_NEXT = replace(_QWEN3, shared_gate=True, gate=True, needs=("linear_num_value_heads",))
_QWEN_NEXT_MOE = replace(_QWEN_NEXT, needs=("linear_num_value_heads", "num_experts"))
_DEEPSEEK = Family(router_bias=True, counts_embedding=False, needs=("kv_lora_rank", "n_routed_experts"))
_DEEPSEEK_SPARSE = replace(_DEEPSEEK, needs=(*_DEEPSEEK.needs, "index_topk"))
_DEEPSEEK_V4 = replace(_DEEPSEEK, needs=("compress_ratios", "n_routed_experts"))
_KIMI = Family(router_bias=True, needs=("kv_lora_rank", "n_routed_experts|num_experts"))
_EXPERTS = Family(needs=("num_local_experts",))
_MINIMAX = Family(router_bias=True, counts_embedding=False, needs=("num_local_experts",))
_GPT = Family(bias="qkvo", gated=False, ffn_bias=True, norm_bias=True, tied=True)
_GEMMA = Family(tied=True, head=256)
_GEMMA3 = Family(
    tied=True,
    head=256,
    norms=4,
    pattern=6,
    qk_norm="head",
    needs=("sliding_window|layer_types",),
    defaults={
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
    },
)

NAME_MAP: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "ministral3": LLAMA,
    "mistral3": LLAMA,
    "mixtral": _EXPERTS,
    "nemotron-nas": LLAMA,
    "llama4": _EXPERTS,
    "llama4_text": _EXPERTS,
    "smollm3": Family(tied=True),
    "baichuan": LLAMA,
    "chatglm": Family(bias_key="qkv"),
    "qwen": Family(bias="qkv", bias_key="qkv"),
    "dbrx": Family(needs=("moe_num_experts",)),
    "falcon_h1": LLAMA,
    "bloom": _GPT,
    "kimi_k3": _KIMI,
    "internlm": Family(bias="qkvo"),
    "internlm2": LLAMA,
    "internlm3": LLAMA,
    "granite": LLAMA,
    "granitemoe": _EXPERTS,
    "granitemoeshared": _EXPERTS,
    "granitemoehybrid": LLAMA,
    "phi3": Family(sliding="key"),
    "phimoe": Family(norm_bias=True, bias="qkvo", needs=("num_local_experts",)),
    "phi": Family(bias="qkvo", gated=False, ffn_bias=True, norms=1, norm_bias=True),
    "qwen2": _QWEN2,
    "qwen2_moe": Family(bias="qkv", bias_key="qkv", sliding="flag", shared_gate=True, needs=("num_experts",)),
    "qwen2_vl": _QWEN2,
    "qwen2_vl_text": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen2_5_vl_text": _QWEN2,
    "mimo": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_text": _QWEN3,
    "qwen3_vl_moe": _QWEN3_MOE,
    "qwen3_vl_moe_text": _QWEN3_MOE,
    "qwen3_omni_moe": _QWEN3_MOE,
    "qwen3_omni_moe_text": _QWEN3_MOE,
    "qwen3_next": _QWEN_NEXT_MOE,
    "qwen3_5": _QWEN_NEXT,
    "qwen3_5_text": _QWEN_NEXT,
    "qwen3_5_moe": _QWEN_NEXT_MOE,
    "qwen3_5_moe_text": _QWEN_NEXT_MOE,
    "deepseek": Family(needs=("n_routed_experts",)),
    "deepseek_v2": Family(needs=("kv_lora_rank", "n_routed_experts")),
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK_SPARSE,
    "deepseek_v4": _DEEPSEEK_V4,
    "deepseek_ref": _DEEPSEEK_V4,
    "kimi_k2": _KIMI,
    "kimi_k25": _KIMI,
    "kimi_linear": _KIMI,
    "glm_moe_dsa": _DEEPSEEK_SPARSE,
    "glm4_moe_lite": _DEEPSEEK,
    "glm4_moe": Family(router_bias=True, bias_key="qkv", counts_embedding=False, needs=("n_routed_experts",)),
    "glm4v_moe": Family(router_bias=True, bias_key="qkv"),
    "glm4": Family(bias_key="qkv", norms=4),
    "glm4v": Family(bias_key="qkv", norms=4),
    "glm4v_text": Family(bias_key="qkv", norms=4),
    "glm": Family(bias_key="qkv"),
    "gpt_oss": Family(
        router_bias=True,
        bias="qkvo",
        pattern=2,
        counts_embedding=False,
        needs=("num_local_experts", "sliding_window"),
    ),
    "minimax_m2": _MINIMAX,
    "minimax_m3": _MINIMAX,
    "minimax_m3_vl": _MINIMAX,
    "mimo_v2_flash": Family(router_bias=True, needs=("n_routed_experts", "hybrid_layer_pattern")),
    "step3p5": Family(router_bias=True, qk_norm="head"),
    "step3p7": Family(router_bias=True, qk_norm="head"),
    "nemotron_h": Family(
        gated=False, norms=1, router_bias=True, needs=("hybrid_override_pattern|layers_block_type",)
    ),
    "nemotron": Family(gated=False, norm_bias=True),
    "gemma": _GEMMA,
    "gemma2": Family(tied=True, head=256, norms=4, pattern=2, needs=("sliding_window|layer_types",)),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gemma4": Family(tied=True, head=256, norms=4, qk_norm="head", needs=("layer_types",)),
    "gemma4_text": Family(tied=True, head=256, norms=4, qk_norm="head", needs=("layer_types",)),
    "olmo": Family(norms=0, final_norm=False),
    "olmo2": Family(qk_norm="layer"),
    "olmo3": Family(qk_norm="layer", pattern=4),
    "olmoe": Family(qk_norm="layer", needs=("num_experts",)),
    "cohere": Family(tied=True, norms=1),
    "cohere2": Family(tied=True, norms=1, pattern=4),
    "falcon": Family(gated=False, norm_bias=True, tied=True),
    "stablelm": Family(norm_bias=True),
    "starcoder2": Family(gated=False, bias="qkvo", ffn_bias=True, norm_bias=True, tied=True),
    "exaone": LLAMA,
    "exaone4": Family(qk_norm="head", pattern=4),
    "ernie4_5": Family(tied=True),
    "ernie4_5_moe": Family(tied=True, router_bias=True, needs=("moe_num_experts",)),
    "hunyuan": Family(tied=True, qk_norm="head"),
    "hunyuan_v1_dense": Family(tied=True, qk_norm="head"),
    "hunyuan_v1_moe": Family(tied=True, qk_norm="head", needs=("num_experts",)),
    "seed_oss": Family(bias="qkv", bias_key="qkv"),
    "apertus": Family(gated=False, qk_norm="head"),
    "arcee": Family(gated=False),
    "dots1": Family(router_bias=True, qk_norm="head", needs=("n_routed_experts",)),
    "mpt": Family(gated=False, tied=True),
    "gpt2": _GPT,
    "gpt_neox": Family(bias="qkvo", gated=False, ffn_bias=True, norm_bias=True),
    "gpt_bigcode": _GPT,
    "opt": _GPT,
}

NOT_DECODERS = frozenset(
    {
        "albert", "bart", "bert", "blip", "camembert", "clip", "deberta", "deberta-v2", "distilbert",
        "electra",
        "encodec", "hubert", "layoutlm", "led", "longformer", "m2m_100", "marian", "mbart", "mobilebert",
        "modernbert", "mpnet", "mt5", "nllb-moe", "pegasus", "roberta", "siglip", "speecht5", "swin", "t5",
        "umt5", "vit", "wav2vec2", "whisper", "xlm-roberta",
    }
)  # fmt: skip
"""Model types that are no decoder-only language model."""

EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
"""Names of the number of routed experts."""

ODD_KEYS = (
    "attn_layer_indices", "attn_layer_period", "block_types", "conv_L_cache", "cross_attention_layers",
    "hidden_size_per_layer_input", "layer_group_size", "lru_width", "num_kv_shared_layers", "num_query_heads",
    "rescale_every", "share_q_dim", "ssm_cfg", "zero_expert_num",
)  # fmt: skip
"""Keys of architectures that no adapter here reads: a config that has one is refused, not read as a Llama."""


def family(model_type: str) -> Family:
    """The habits of that model type; those of Llama, marked as not known, where it has no entry."""
    return NAME_MAP.get(model_type, Family(known=False))
