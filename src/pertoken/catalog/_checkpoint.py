"""What a checkpoint holds beside the decoder's architecture: its precision, its vision or audio encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pertoken.catalog._architecture import Encoder
from pertoken.catalog._keys import Keys, read_json

_FORMATS = {
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "mxfp8": "fp8",
    "mxfp4": "fp4",
    "nvfp4": "fp4",
    "awq": "int4",
    "gptq": "int4",
    "int4": "int4",
    "w4a16_awq": "int4",
    "w4a8_awq": "int4",
    "bitsandbytes": "int8",
    "int8": "int8",
    "int8_sq": "int8",
}
"""NAME_MAP of quantisation methods and algorithms to our precisions."""

_BY_WIDTH = ("fp4", "int4", "fp8", "int8")
_PATCH_CHANNELS = 3


def precision(outer: Keys, text: Keys, named: str) -> tuple[str, str]:
    """The precision of the checkpoint's weights and that of its attention where it differs (else empty).

    `named`: the precision the checkpoint's name states; used where the config says only that it is mixed.
    """
    quantisation = outer.child("quantization_config") or text.child("quantization_config")
    found: set[str] = set()
    attention_kept = mixed = False
    for source in (quantisation.values if quantisation else None, _quant_file(outer.path)):
        if source is not None:
            found |= _precisions(source)
            attention_kept |= any(_is_attention(name) for name in _excluded(source))
            mixed |= source.get("quant_algo") == "MIXED_PRECISION"
    if "fp4" in (text.values.get("expert_dtype"), outer.values.get("expert_dtype")):
        found.add("fp4")
    if mixed and not found and named:
        found.add(named)
    if (quantisation or mixed) and not found:
        method = quantisation.values.get("quant_method") if quantisation else "MIXED_PRECISION"
        remedy = (
            f"a method out of {', '.join(_FORMATS)} is needed, or hf_quant_config.json with quantized_layers"
        )
        raise outer.error("quantization_config", method, remedy)
    native = next((p for p in _BY_WIDTH if p in found), "bf16")
    if native in ("fp4", "int4") and "fp8" in found:
        return native, "fp8"
    return native, "bf16" if native != "bf16" and attention_kept else ""


def _is_attention(name: str) -> bool:
    return any(word in name for word in ("attn", "q_proj", "attention")) and "vis" not in name


def _quant_file(path: Path) -> Mapping[str, Any] | None:
    """The ``hf_quant_config.json`` that belongs to the config, where there is one."""
    beside = path.with_name(path.name.removesuffix("config.json") + "hf_quant_config.json")
    if not beside.is_file():
        return None
    value = read_json(beside)
    inner = value.get("quantization", value)
    return inner if isinstance(inner, Mapping) else None


def _precisions(source: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    for key in ("quant_method", "quant_algo", "quant_type"):
        name = source.get(key)
        if isinstance(name, str) and name.lower() in _FORMATS:
            found.add(_FORMATS[name.lower()])
    if source.get("bits") == 4:
        found.add("int4")
    if source.get("bits") == 8 or source.get("load_in_8bit") is True:
        found = {"int8"}
    elif source.get("load_in_4bit") is True:
        found = {"int4"}
    layers = source.get("quantized_layers")
    if isinstance(layers, Mapping):
        for layer in layers.values():
            found |= _precisions(layer) if isinstance(layer, Mapping) else set()
    quark = source.get("global_quant_config")
    weight = quark.get("weight") if isinstance(quark, Mapping) else None
    if isinstance(weight, Mapping):
        found |= {str(weight.get("dtype"))[:width] for width in (3, 4)} & set(_BY_WIDTH)
    groups = source.get("config_groups")
    if isinstance(groups, Mapping):
        for group in groups.values():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if isinstance(weights, Mapping):
                kind = "fp" if weights.get("type") == "float" else "int"
                name = f"{kind}{weights.get('num_bits')}"
                found |= {name} & set(_BY_WIDTH)
    return found


def _excluded(source: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for key in ("exclude_modules", "ignore", "modules_to_not_convert", "ignored_layers"):
        value = source.get(key)
        names += [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
    return names


def encoders(outer: Keys, hidden: int) -> tuple[Encoder, ...]:
    """The encoders of a checkpoint, from their own configs; `hidden`: width of the decoder."""
    holder = outer.child("thinker_config") or outer
    found = []
    vision, audio = holder.child("vision_config"), holder.child("audio_config")
    if vision and (encoder := _vision(vision, hidden)):
        found.append(encoder)
    if audio and "d_model" in audio:
        found.append(
            Encoder(
                layers=audio.whole("encoder_layers"),
                width=audio.whole("d_model"),
                ffn=audio.whole("encoder_ffn_dim"),
                out=audio.whole("output_dim", default=0, least=0),
            )
        )
    return tuple(found)


def _vision(keys: Keys, hidden: int) -> Encoder | None:
    """A vision transformer by the names Qwen, Google, Meta, Moonshot and CLIP-likes give its sizes."""
    width = keys.whole("vt_hidden_size", "embed_dim", "hidden_size", "width", default=0, least=0)
    depth = keys.whole("depth", "num_hidden_layers", "vt_num_hidden_layers", "layers", default=0, least=0)
    if not width or not depth or keys.values.get("model_type") == "timm_wrapper":
        return None
    side = keys.whole("patch_size", default=0, least=0)
    image = keys.whole("image_size", default=0, least=0)
    kernel = keys.numbers("merge_kernel_size")
    square = keys.whole("spatial_merge_size", default=kernel[0] if kernel else 1)
    out = keys.whole("out_hidden_size", "text_hidden_size", "projection_dim", default=0, least=0)
    positions = keys.whole("num_position_embeddings", default=0, least=0)
    if not positions and side and keys.values.get("position_embedding_type") != "rope":
        positions = (image // side) ** 2
    return Encoder(
        layers=depth,
        width=width,
        ffn=keys.whole("intermediate_size", "vt_intermediate_size", default=4 * width),
        patch=_PATCH_CHANNELS * side * side * keys.whole("temporal_patch_size", default=1),
        positions=positions,
        merge=square * square,
        out=out or hidden,
        mergers=1 + len(keys.entries("deepstack_visual_indexes")),
        gated=keys.text("model_type").startswith(("gemma4", "qwen2_5_vl", "pixtral")),
    )
