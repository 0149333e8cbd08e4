"""From a Hugging Face ``config.json`` to a Model: one reading for all families, by the keys it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pertoken.catalog import _checkpoint, _mixers, _model_rows
from pertoken.catalog._architecture import Architecture, Moe, build
from pertoken.catalog._families import EXPERTS, NOT_DECODERS, ODD_KEYS, Family, family
from pertoken.catalog._keys import Keys, read_json
from pertoken.catalog.models import Model
from pertoken.errors import InputError, UnknownNameError

_NESTED = ("text_config", "thinker_config", "llm_config", "language_config", "language_model_config")


def load(path: Path) -> Model:
    """The model of one config file (or of the folder that holds a config.json)."""
    if path.is_dir():
        path = path / "config.json"
    config = read_json(path)
    if config.get("model_type") == "nemotron-nas" and not config.get("block_configs"):
        return _pruned(path, config)
    return build(architecture(config, path))


def _pruned(path: Path, config: Mapping[str, Any]) -> Model:
    """A model pruned layer by layer whose config lacks the layers: the catalogue row of the same name."""
    name = _name(path, config)
    keys = Keys(path, config)
    try:
        row = _model_rows.model(name)
    except UnknownNameError:
        raise keys.error(
            "block_configs", None, f"the layers of {name} are needed: use the config.json of the checkpoint"
        ) from None
    for key, known in (("hidden_size", row.hidden), ("num_hidden_layers", row.layers)):
        if keys.whole(key) != known:
            raise keys.error(key, keys.whole(key), f"{row.name} has {known}: give block_configs")
    note = f"{path.name} has no block_configs: the layers are those of the catalogue's {row.name}"
    return replace(row, name=name, sources=(note, *row.sources))


def load_folder(path: Path) -> dict[str, Model]:
    """Every ``org--name_config.json`` of a folder, by ``org/name``."""
    if not path.is_dir():
        raise InputError(f"{path}: is no folder: give one that holds org--name_config.json files")
    files = sorted(f for f in path.glob("*_config.json") if not f.name.endswith("hf_quant_config.json"))
    if not files:
        raise InputError(f"{path}: holds no org--name_config.json: name each config after its model")
    found = [load(f) for f in files]
    return {m.name: m for m in found}


def architecture(config: Mapping[str, Any], path: Path) -> Architecture:
    """The architecture that config describes; `path` names it and finds the file of its quantisation."""
    outer = Keys(path, config)
    keys = _text_keys(outer)
    kind = keys.text("model_type") or outer.text("model_type")
    if kind in NOT_DECODERS or config.get("is_encoder_decoder") is True:
        raise outer.error("model_type", kind, "a decoder-only language model is needed")
    habits = family(kind)
    brand = family(outer.text("model_type"))
    _refuse_odd(keys, kind, habits)
    keys = _complete(keys, habits, kind)
    hidden = keys.whole("hidden_size", "n_embd", "d_model", "dim", "n_embed")
    layers = _layers(keys)
    moe = _moe(keys, habits, layers)
    mixers = _mixers.mixers(keys, habits, hidden, layers)
    ffn_layers, ffn = _dense(keys, habits, hidden, layers, moe)
    name = _name(path, config)
    precision, attention_precision = _checkpoint.precision(outer, keys, _model_rows.precision(name))
    tied = keys.flag("tie_word_embeddings", default=outer.flag("tie_word_embeddings", default=habits.tied))
    encoders = _checkpoint.encoders(outer, hidden)
    blind = "vision_config" in outer and not encoders
    result = Architecture(
        name=name,
        hidden=hidden,
        layers=layers,
        vocabulary=keys.whole("vocab_size", "padded_vocab_size", "n_vocab"),
        mixers=mixers,
        context=keys.whole(
            "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", default=0, least=0
        ),
        ffn_layers=ffn_layers,
        ffn=ffn,
        ffn_gated=habits.gated,
        ffn_bias=keys.flag("mlp_bias", default=habits.ffn_bias),
        moe=moe,
        tied=tied,
        norms=habits.norms,
        norm_bias=habits.norm_bias,
        final_norm=habits.final_norm,
        encoders=encoders,
        precision=precision,
        attention_precision=attention_precision,
        active_counts_embedding=(brand if brand.known else habits).counts_embedding,
        sources=_sources(path, kind, habits, blind),
        checked="as on disk",
    )
    return _special(result, keys, kind)


def _text_keys(outer: Keys) -> Keys:
    """The config of the language model: nested once or twice in models of several senses."""
    keys = outer
    for _ in range(2):
        inner = next((keys.child(key) for key in _NESTED if key in keys), None)
        if inner is None:
            break
        keys = inner
    parts = [part.values for key in ("attn_config", "ffn_config") if (part := keys.child(key))]  # MPT, DBRX
    if not parts:
        return keys
    merged = {k: v for part in parts for k, v in part.items()}
    return Keys(keys.path, {**merged, **keys.values}, keys.prefix)


def _complete(keys: Keys, habits: Family, kind: str) -> Keys:
    """The keys with the family's published defaults; an error where one is missing that makes the family."""
    for need in habits.needs:
        if not any(key in keys for key in need.split("|")):
            keys.whole(*need.split("|"))
    given = {key: value for key, value in keys.values.items() if value is not None}
    return Keys(keys.path, {**habits.defaults, **given, "model_type": kind}, keys.prefix)


def _refuse_odd(keys: Keys, kind: str, habits: Family) -> None:
    """No Llama-like reading of an architecture that is something else."""
    odd = [key for key in ODD_KEYS if keys.values.get(key)]
    if not habits.known:
        words: tuple[str, ...] = ("mamba", "ssm", "rwkv", "lightning", "retention", "hyena", "conv_")
        if any(word in kind for word in words):
            raise keys.error("model_type", kind, "this architecture is not known: use a catalogue model")
        if not any(key in keys for key in EXPERTS):
            words += ("expert", "moe")  # experts counted under a name nobody knows
        odd += [key for key, value in keys.values.items() if value and any(word in key for word in words)]
    if odd:
        raise keys.error(
            odd[0],
            keys.values[odd[0]],
            f"this part of a {kind or 'model'} is not known: use a catalogue model",
        )
    linear = [x for x in keys.numbers("attn_type_list") if x != 1]
    if linear:
        raise keys.error("attn_type_list", linear[0], "1 (softmax attention) in every layer is needed")


def _layers(keys: Keys) -> int:
    blocks = keys.entries("layers_block_type")
    return keys.whole(
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", default=len(blocks) or None, most=10_000
    )


def _sources(path: Path, kind: str, habits: Family, blind: bool) -> tuple[str, ...]:
    """Where the sizes come from, and what had to be assumed."""
    notes = [f"{path.name} of the checkpoint"]
    if not habits.known:
        notes.append(f"model_type '{kind}' is not known: read as a Llama-like decoder by its standard keys")
    if blind:
        notes.append("vision_config has no sizes that are known: the encoder's weights are not counted")
    return tuple(notes)


def _name(path: Path, config: Mapping[str, Any]) -> str:
    """``org/name`` from ``org--name_config.json``, the Hugging Face cache, the config or its folder."""
    stem = path.name.removesuffix(".json").removesuffix("config").rstrip("_-.")
    if stem:
        return stem.replace("--", "/", 1)
    for parent in path.parent.resolve().parts[::-1]:
        if parent.startswith("models--"):
            return parent.removeprefix("models--").replace("--", "/", 1)
    given = config.get("_name_or_path")
    if isinstance(given, str) and given.strip("/. "):
        return given.strip("/") if given.count("/") <= 1 and not given.startswith("/") else Path(given).name
    return path.parent.resolve().name or "config"


def _moe(keys: Keys, habits: Family, layers: int) -> Moe | None:
    """The mixture of experts, None for a dense model."""
    experts = keys.whole(*EXPERTS, default=0, least=0)
    if experts <= 1 or keys.values.get("enable_moe_block") is False:
        return None
    active = keys.whole(
        "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k",
        "experts_per_token",
    )  # fmt: skip
    if active > experts:
        key = keys.first("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
        raise keys.error(key, active, f"a token cannot visit more experts than the {experts} there are")
    size = keys.whole(
        "moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size"
    )
    return Moe(
        layers=len(_moe_layers(keys, layers)),
        experts=experts,
        active=active,
        size=size,
        shared=_shared_width(keys, size),
        shared_gate=habits.shared_gate,
        router_bias=habits.router_bias,
        bias=keys.text("model_type") == "gpt_oss",
        gated=habits.gated,
        latent=keys.whole("moe_latent_size", "routed_expert_hidden_size", default=0, least=0),
    )


def _shared_width(keys: Keys, size: int) -> int:
    """Width of all shared experts of a layer together."""
    count = keys.whole(
        "n_shared_experts",
        "num_shared_experts",
        "moe_num_shared_experts",
        "num_shared_expert",
        default=0,
        least=0,
    )
    own = keys.whole(
        "moe_shared_expert_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
        "share_expert_dim", default=0, least=0,
    )  # fmt: skip
    if keys.text("model_type").startswith("llama4"):
        return size
    if keys.values.get("enable_moe_block"):  # Gemma 4: the dense block runs beside the experts
        return keys.whole("intermediate_size")
    return own * max(count, 1) if own else count * size


def _moe_layers(keys: Keys, layers: int) -> list[int]:
    """Indices of the layers that have experts."""
    every = list(range(layers))
    kinds = keys.words("mlp_layer_types", layers) if "mlp_layer_types" in keys else []
    if kinds:
        return [i for i in every if kinds[i] == "sparse"]
    blocks = _mixers.blocks(keys, layers)
    if blocks:
        return [i for i in every if blocks[i] == "moe"]
    if isinstance(keys.values.get("moe_layer_freq"), list):
        return [i for i, on in enumerate(keys.numbers("moe_layer_freq", layers)) if on]
    if "moe_layers_enum" in keys:  # Step: "4,5,6"
        listed = keys.text("moe_layers_enum")
        if not listed.replace(",", "").isdecimal():
            raise keys.error("moe_layers_enum", listed, "layer numbers with commas between are needed")
        return [int(i) for i in listed.split(",") if i and int(i) < layers]
    if "interleave_moe_layer_step" in keys:
        step = keys.whole("interleave_moe_layer_step")
        return every[step - 1 :: step]
    if "moe_layer_start_index" in keys:
        start = keys.whole("moe_layer_start_index", least=0)
        end = keys.whole("moe_layer_end_index", default=layers - 1, least=-1)
        end = layers - 1 if end < 0 else end
        step = keys.whole("moe_layer_interval", default=1)
        return [i for i in every if start <= i <= end and (i + 1) % step == 0]
    first = keys.whole("first_k_dense_replace", default=0, least=0)
    step = keys.whole("decoder_sparse_step", "moe_layer_freq", default=1)
    dense = set(keys.numbers("mlp_only_layers"))
    after = 1 if "decoder_sparse_step" in keys else 0
    return [i for i in every if i >= first and i not in dense and (i + after) % step == 0]


def _dense(keys: Keys, habits: Family, hidden: int, layers: int, moe: Moe | None) -> tuple[int, float]:
    """Layers with a dense feed-forward block and its width (a mean where it varies)."""
    if "block_configs" in keys:
        return layers, sum(_mixers.nas_ffn_widths(keys, hidden, layers)) / layers
    blocks = _mixers.blocks(keys, layers)
    count = sum(block == "mlp" for block in blocks) if blocks else layers - (moe.layers if moe else 0)
    if not count:
        return 0, 0.0
    names = ["intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "d_ff"]
    if moe:
        names[:0] = ["dense_intermediate_size", "intermediate_size_mlp"]
    if keys.text("model_type") == "granitemoehybrid":
        names[:0] = ["shared_intermediate_size"]
    if not any(name in keys for name in names):
        if "expansion_ratio" in keys:
            return count, keys.whole("expansion_ratio") * hidden
        if not habits.gated:  # GPT-2, Falcon, MPT: four times the width unless said otherwise
            return count, 4 * hidden
    width = keys.first(*names)
    if isinstance(keys.values.get(width), list):  # one width per layer
        return count, sum(keys.numbers(width, layers)) / layers
    both = keys.text("model_type") == "qwen"  # Qwen 1 writes gate and up together
    return count, keys.whole(*names) / (2 if both else 1)


def _special(a: Architecture, keys: Keys, kind: str) -> Architecture:
    """What is in no common key."""
    if "hc_mult" in keys:  # hyper-connections: two mixes per layer over that many residual streams
        streams = keys.whole("hc_mult")
        mixes = (2 + streams) * streams
        a = replace(a, extra_per_layer=2 * (mixes * streams * a.hidden + mixes + 3))
    learned = kind in ("opt", "gpt2", "gpt_bigcode") or (kind == "mpt" and keys.values.get("alibi") is False)
    if learned:
        a = replace(a, position_embeddings=a.context)
    if "block_configs" in keys:
        idle = sum(_mixers.nas_idle_norms(keys, layers=a.layers))
        a = replace(a, norms=2 - idle / a.layers)
    if kind == "falcon" and not keys.flag("new_decoder_architecture"):
        a = replace(a, norms=1 if keys.flag("parallel_attn", default=True) else 2)
    return a
