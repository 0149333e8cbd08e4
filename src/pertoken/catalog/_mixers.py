"""The attention and mixer layers a config.json describes, in groups of like layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pertoken.catalog._architecture import Mixer
from pertoken.catalog._families import Family
from pertoken.catalog._keys import Keys, counted

_BLOCKS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_FULL = ("full_attention", "attention", "global_attention", "full", "global")
_SLIDING = ("sliding_attention", "local_attention", "sliding", "local")


def blocks(keys: Keys, layers: int) -> list[str]:
    """The one block of each layer where a layer is one block (Nemotron-H); empty for other models."""
    if "hybrid_override_pattern" in keys:
        pattern = keys.text("hybrid_override_pattern")
        wrong = sorted(set(pattern) - set(_BLOCKS))
        if wrong or len(pattern) != layers:
            raise keys.error(
                "hybrid_override_pattern", pattern, f"{layers} letters out of {' '.join(_BLOCKS)} are needed"
            )
        return [_BLOCKS[letter] for letter in pattern]
    kinds = keys.words("layers_block_type")
    if kinds and set(kinds) <= set(_BLOCKS.values()) and ({"moe", "mlp"} & set(kinds)):
        return keys.words("layers_block_type", layers)
    return []


def mixers(keys: Keys, habits: Family, hidden: int, layers: int) -> tuple[Mixer, ...]:
    """All mixers of the model."""
    if blocks(keys, layers):
        return _nemotron_h(keys, habits, hidden, layers)
    if "block_configs" in keys:
        return _nas(keys, habits, hidden, layers)
    if "compress_ratios" in keys:
        return _compressed(keys, layers)
    if "kv_lora_rank" in keys:
        return _latent(keys, layers)
    return _heads(keys, habits, hidden, layers)


def _attention(keys: Keys, habits: Family, hidden: int, layers: int) -> Mixer:
    """Plain attention as the main keys describe it."""
    heads = keys.whole("num_attention_heads", "n_head", "n_heads", most=100_000)
    kv_heads = keys.whole(
        "num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "multi_query_group_num",
        "num_attention_groups", default=heads, most=100_000,
    )  # fmt: skip
    if keys.text("model_type") == "falcon" and not keys.flag("new_decoder_architecture"):
        kv_heads = 1 if keys.flag("multi_query", default=True) else heads
    if keys.text("model_type") == "gpt_bigcode" and keys.flag("multi_query", default=True):
        kv_heads = 1
    if kv_heads > heads or heads % kv_heads:
        key = keys.first("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_attention_groups")
        raise keys.error(key, kv_heads, f"a divisor of the {heads} attention heads is needed")
    sizes = ("head_dim", "attention_head_dim", "kv_channels")
    if not any(key in keys for key in sizes):
        if habits.head:
            head = habits.head
        elif hidden % heads:
            key = keys.first("num_attention_heads", "n_head", "n_heads")
            raise keys.error(key, heads, f"a divisor of the hidden size {hidden} is needed, or a head_dim")
        else:
            head = hidden // heads
    else:
        head = keys.whole(*sizes, most=100_000)
    return Mixer(
        kind="gqa",
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head=head,
        value_head=keys.whole("v_head_dim", default=0, least=0),
        bias=_bias(keys, habits),
        qk_norm=_qk_norm(keys, habits),
        gate=keys.flag("attn_output_gate", "attention_output_gate", default=habits.gate),
        sinks=keys.text("model_type") == "gpt_oss",
    )


def _bias(keys: Keys, habits: Family) -> str:
    if keys.flag("use_qkv_bias", "add_qkv_bias", "qkv_bias"):
        return "qkv"
    if "use_bias" in keys or "bias" in keys:
        return "qkvo" if keys.flag("use_bias", "bias") else ""
    if "attention_bias" in keys:
        return habits.bias_key if keys.flag("attention_bias") else ""
    return habits.bias


def _qk_norm(keys: Keys, habits: Family) -> str:
    if "use_qk_norm" in keys and not keys.text("model_type").startswith("llama4"):
        if not keys.flag("use_qk_norm"):
            return ""
        return "layer" if keys.text("qk_norm_type") == "per_layer" or habits.norms == 1 else "head"
    return habits.qk_norm


def _heads(keys: Keys, habits: Family, hidden: int, layers: int) -> tuple[Mixer, ...]:
    """Attention by heads, all of it or in a pattern of full, sliding, sparse and linear layers."""
    full = _attention(keys, habits, hidden, layers)
    sparse = keys.child("sparse_attention_config")
    if sparse and sparse.flag("use_sparse_attention", default=True):
        on = [bool(x) for x in sparse.numbers("sparse_attention_freq", layers)] or [True] * layers
        top_k = sparse.whole("sparse_topk_blocks") * sparse.whole("sparse_block_size")
        index = replace(
            full,
            layers=sum(on),
            top_k=top_k,
            index_heads=sparse.whole("sparse_num_index_heads"),
            index_head=sparse.whole("sparse_index_dim"),
        )
        return tuple(m for m in (replace(full, layers=layers - sum(on)), index) if m.layers)
    if keys.text("model_type") == "falcon_h1":  # attention and Mamba side by side in every layer
        return (full, _mamba(keys, layers, hidden))
    if (
        keys.flag("use_cla") and keys.whole("cla_share_factor", default=1) > 1
    ):  # Hunyuan: layers share a cache
        owners = -(-layers // keys.whole("cla_share_factor"))
        return (replace(full, layers=owners), replace(full, layers=layers - owners, shared_cache=True))
    kinds = _kinds(keys, habits, layers)
    result = []
    for kind, count in counted(kinds).items():
        if kind == "full":
            result.append(_global(replace(full, layers=count), keys))
        elif kind == "linear":
            result.append(_delta_net(keys, count))
        elif kind == "mamba":
            result.append(_mamba(keys, count, hidden))
        else:
            result.append(_local(replace(full, layers=count), keys))
    return tuple(result)


def _kinds(keys: Keys, habits: Family, layers: int) -> list[str]:
    """``full``, ``sliding`` or ``linear`` for each layer."""
    if keys.entries("layer_types"):
        names = {**dict.fromkeys(_FULL, "full"), **dict.fromkeys(_SLIDING, "sliding")}
        names |= {"linear_attention": "linear", "chunked_attention": "sliding", "mamba": "mamba"}
        kinds = keys.words("layer_types", layers)
        wrong = next((k for k in kinds if k not in names), None)
        if wrong is not None:
            raise keys.error(
                "layer_types", wrong, f"a layer of {', '.join(names)} is needed; others are not known"
            )
        return [names[k] for k in kinds]
    if keys.entries("hybrid_layer_pattern"):
        return ["sliding" if on else "full" for on in keys.numbers("hybrid_layer_pattern", layers)]
    if "linear_num_value_heads" in keys:
        every = keys.whole("full_attention_interval", default=4)
        return ["linear" if (i + 1) % every else "full" for i in range(layers)]
    if keys.text("model_type").startswith("llama4") and "attention_chunk_size" in keys:
        every = 4
        return ["sliding" if (i + 1) % every else "full" for i in range(layers)]
    if "sliding_window" not in keys or (habits.sliding == "flag" and not keys.flag("use_sliding_window")):
        return ["full"] * layers
    if habits.sliding == "flag":
        first = keys.whole("max_window_layers", default=layers, least=0)
        return ["full" if i < first else "sliding" for i in range(layers)]
    pattern = keys.values.get("sliding_window_pattern")
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:  # EXAONE 4: local and global
        return ["full" if pattern[i % len(pattern)] == "G" else "sliding" for i in range(layers)]
    every = keys.whole("sliding_window_pattern", default=habits.pattern, least=0)
    return ["full" if every and (i + 1) % every == 0 else "sliding" for i in range(layers)]


def _global(m: Mixer, keys: Keys) -> Mixer:
    """Full layers of a mixed model may have other heads (Gemma 4)."""
    return replace(
        m,
        head=keys.whole("global_head_dim", default=m.head),
        kv_heads=keys.whole("num_global_key_value_heads", default=m.kv_heads),
        key_is_value=keys.flag("attention_k_eq_v"),
    )


def _local(m: Mixer, keys: Keys) -> Mixer:
    """Sliding layers may have other heads (MiMo V2); a window as long as the context is none."""
    window = keys.whole("sliding_window", "attention_chunk_size")
    context = keys.whole("max_position_embeddings", default=0, least=0)
    return replace(
        m,
        heads=keys.whole("swa_num_attention_heads", default=m.heads),
        kv_heads=keys.whole("swa_num_key_value_heads", default=m.kv_heads),
        head=keys.whole("swa_head_dim", default=m.head),
        value_head=keys.whole("swa_v_head_dim", default=m.value_head, least=0),
        window=0 if 0 < context <= window else window,
        sinks=m.sinks or keys.flag("add_swa_attention_sink_bias"),
    )


def _mamba(keys: Keys, layers: int, hidden: int) -> Mixer:
    """Mamba-2 layers as Granite and Falcon-H1 name their sizes."""
    heads = keys.whole("mamba_n_heads")
    inner = keys.whole("mamba_d_ssm", default=keys.whole("mamba_expand", default=2) * hidden)
    return Mixer(
        kind="mamba2",
        layers=layers,
        heads=heads,
        head=inner // heads,
        groups=keys.whole("mamba_n_groups", default=1),
        state=keys.whole("mamba_d_state"),
        conv=keys.whole("mamba_d_conv", default=4),
    )


def _delta_net(keys: Keys, layers: int) -> Mixer:
    return Mixer(
        kind="delta_net",
        layers=layers,
        heads=keys.whole("linear_num_value_heads"),
        key_heads=keys.whole("linear_num_key_heads"),
        head=keys.whole("linear_key_head_dim"),
        value_head=keys.whole("linear_value_head_dim"),
        conv=keys.whole("linear_conv_kernel_dim", default=4),
    )


def _latent(keys: Keys, layers: int) -> tuple[Mixer, ...]:
    """Latent attention, with an index in sparse layers and linear layers in Kimi's hybrids."""
    rope = keys.whole("qk_rope_head_dim", least=0)
    mla = Mixer(
        kind="mla",
        layers=layers,
        heads=keys.whole("num_attention_heads"),
        head=keys.whole("qk_nope_head_dim") + rope,
        value_head=keys.whole("v_head_dim"),
        q_rank=keys.whole("q_lora_rank", default=0, least=0),
        kv_rank=keys.whole("kv_lora_rank"),
        rope=rope,
        gate=keys.flag("mla_use_output_gate"),
    )
    linear = keys.child("linear_attn_config")
    if linear:
        count = len([i for i in linear.numbers("kda_layers") if i <= layers])
        kda = Mixer(
            kind="kda",
            layers=count,
            heads=linear.whole("num_heads"),
            head=linear.whole("head_dim"),
            conv=linear.whole("short_conv_kernel_size", default=4),
            gate=linear.flag("use_full_rank_gate"),
        )
        return (replace(mla, layers=layers - count), kda)
    if "index_topk" not in keys:
        return (mla,)
    sparse = replace(
        mla,
        top_k=keys.whole("index_topk"),
        index_heads=keys.whole("index_n_heads"),
        index_head=keys.whole("index_head_dim"),
    )
    shared = keys.words("indexer_types", layers).count("shared") if "indexer_types" in keys else 0
    if not shared:
        return (sparse,)
    borrowed = replace(
        sparse, layers=shared, index_heads=0, index_head=0
    )  # takes the choice of a layer before
    return (replace(sparse, layers=layers - shared), borrowed)


def _compressed(keys: Keys, layers: int) -> tuple[Mixer, ...]:
    """DeepSeek V4: each layer compresses its context by its own ratio; ratio 4 is chosen from by an index."""
    result = []
    for ratio, count in counted(keys.numbers("compress_ratios", layers)).items():
        indexed = ratio == 4
        result.append(
            Mixer(
                kind="compressed",
                layers=count,
                heads=keys.whole("num_attention_heads"),
                kv_heads=1,
                head=keys.whole("head_dim"),
                window=keys.whole("sliding_window"),
                q_rank=keys.whole("q_lora_rank"),
                o_rank=keys.whole("o_lora_rank"),
                o_groups=keys.whole("o_groups"),
                ratio=ratio,
                index_heads=keys.whole("index_n_heads") if indexed else 0,
                index_head=keys.whole("index_head_dim") if indexed else 0,
                top_k=keys.whole("index_topk") if indexed else 0,
            )
        )
    return tuple(result)


def _nemotron_h(keys: Keys, habits: Family, hidden: int, layers: int) -> tuple[Mixer, ...]:
    kinds = blocks(keys, layers)
    mamba = Mixer(
        kind="mamba2",
        layers=kinds.count("mamba"),
        heads=keys.whole("mamba_num_heads"),
        head=keys.whole("mamba_head_dim"),
        groups=keys.whole("n_groups"),
        state=keys.whole("ssm_state_size"),
        conv=keys.whole("conv_kernel", default=4),
    )
    attention = _attention(keys, habits, hidden, kinds.count("attention"))
    return tuple(m for m in (attention, mamba) if m.layers)


def _nas(keys: Keys, habits: Family, hidden: int, layers: int) -> tuple[Mixer, ...]:
    """Layers pruned one by one (Nemotron Super): groups of heads, a linear map, or nothing."""
    heads = keys.whole("num_attention_heads")
    plain = Mixer(kind="gqa", layers=0, heads=heads, head=keys.whole("head_dim", default=hidden // heads))
    result = []
    for block, count in counted(
        [_nas_attention(b, keys) for b in keys.entries("block_configs", layers)]
    ).items():
        if block == 0:
            continue
        if heads % block:
            raise keys.error("block_configs", block, f"n_heads_in_group must divide the {heads} heads")
        result.append(replace(plain, layers=count, kv_heads=heads // block))
    return tuple(result)


def _nas_attention(block: Any, keys: Keys) -> int:
    """Query heads per KV head of a block; 0 where it has no attention."""
    attention = block.get("attention") if isinstance(block, Mapping) else None
    if not isinstance(attention, Mapping):
        raise keys.error("block_configs", block, "an attention entry in every block is needed")
    if attention.get("no_op"):
        return 0
    if attention.get("replace_with_linear"):
        raise keys.error(
            "block_configs", "replace_with_linear", "attention replaced by a linear map is not known"
        )
    return Keys(keys.path, attention, "block_configs.attention.").whole("n_heads_in_group")


def nas_ffn_widths(keys: Keys, hidden: int, layers: int) -> list[int]:
    """Width of each layer's feed-forward: 2/3 × multiplier × hidden, rounded up to 256."""
    widths = []
    for block in keys.entries("block_configs", layers):
        ffn = block.get("ffn") if isinstance(block, Mapping) else None
        if not isinstance(ffn, Mapping):
            raise keys.error("block_configs", block, "an ffn entry in every block is needed")
        if ffn.get("no_op"):
            widths.append(0)
            continue
        if ffn.get("replace_with_linear"):
            raise keys.error(
                "block_configs", "replace_with_linear", "a feed-forward replaced by a linear map is not known"
            )
        inner = Keys(keys.path, ffn, "block_configs.ffn.")
        if "intermediate_size" in inner:
            widths.append(inner.whole("intermediate_size"))
            continue
        multiplier = inner.number("ffn_mult", default=0.0)
        if not multiplier:
            raise keys.error("block_configs", ffn, "ffn_mult or intermediate_size in every ffn is needed")
        width = int(2 * multiplier * hidden / 3)
        widths.append(-(-width // 256) * 256)
    return widths


def nas_idle_norms(keys: Keys, layers: int) -> list[int]:
    """Norms each layer lacks because its attention or its feed-forward was pruned away."""
    return [
        sum(bool(block.get(part, {}).get("no_op")) for part in ("attention", "ffn"))
        for block in keys.entries("block_configs", layers)
    ]
