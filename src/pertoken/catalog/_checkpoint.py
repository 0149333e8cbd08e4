"""What a checkpoint holds beside the decoder's architecture: its precision, its vision or audio encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def precision(outer: Keys, text: Keys) -> tuple[str, str]:
    """The precision of the checkpoint's weights and that of its attention where it differs (else empty)."""
    quantisation = outer.child("quantization_config") or text.child("quantization_config")
    beside = _quant_file(outer.path)
    found: set[str] = set()
    excluded: list[str] = []
    for source in (quantisation.values if quantisation else None, beside):
        if source is not None:
            found |= _precisions(source)
            excluded += _excluded(source)
    if text.text("expert_dtype") == "fp4" or outer.text("expert_dtype") == "fp4":
        found.add("fp4")
    if quantisation and not found:
        method = quantisation.values.get("quant_method")
        raise outer.error("quantization_config", method, f"a method out of {', '.join(_FORMATS)} is needed")
    native = next((p for p in _BY_WIDTH if p in found), "bf16")
    attention = ""
    if native in ("fp4", "int4") and "fp8" in found:
        attention = "fp8"
    if native != "bf16" and any("attn" in e for e in excluded):
        attention = "bf16"
    return native, attention


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
    if source.get("bits") == 8 or source.get("load_in_8bit") is True:
        found = {"int8"}
    elif source.get("load_in_4bit") is True:
        found = {"int4"}
    layers = source.get("quantized_layers")
    if isinstance(layers, Mapping):
        for layer in layers.values():
            found |= _precisions(layer) if isinstance(layer, Mapping) else set()
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


def encoder_parameters(outer: Keys) -> float:
    """Weights of the vision encoder, from its own config; 0 where there is none."""
    vision = outer.child("vision_config") or (
        inner.child("vision_config") if (inner := outer.child("thinker_config")) else None
    )
    if vision is None:
        return 0.0
    width = vision.whole("hidden_size", "embed_dim", "width", "vt_hidden_size", default=0, least=0)
    depth = vision.whole("depth", "num_hidden_layers", "layers", "vt_num_hidden_layers", default=0, least=0)
    ffn = vision.whole("intermediate_size", "vt_intermediate_size", default=4 * width, least=0)
    return float(depth * (4 * width * width + 2 * width * ffn + 9 * width + ffn))
