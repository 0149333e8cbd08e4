"""Language models described by architecture, from which sizes and work are computed, never typed in.

Counts are exact where the architecture is known exactly: weights of the decoder, its embedding and output
projection and, where the checkpoint holds one, the vision or audio encoder. Layers for multi-token prediction
are left out: they are a draft model, not the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

STATE_FLOPS_PER_VALUE = 6
"""FLOPs per token and value of a linear layer's state: decay 1, outer product 2, add 1, read out 2."""


@dataclass(frozen=True)
class Attention:
    """One kind of attention layer and how many layers have it.

    kind: ``full`` (GQA/MHA/MQA), ``sliding`` (window), ``mla`` (latent), ``sparse`` (top-k over an index),
    ``linear`` (state of fixed size: Mamba, gated delta net). Sizes are per layer. A layer with two caches
    (DeepSeek V4: compressed context beside a window) is two entries, the second without parameters.
    """

    kind: str
    layers: int
    parameters: float
    """Weights of one such layer's attention or mixer block."""
    kv_values_per_token: float
    """Cached values per token (2 × KV heads × head size; latent + rope for MLA; 0 for linear)."""
    flops_per_context_token: float
    """FLOPs per new token and token of context attended to (4 × heads × head size; MLA absorbed form)."""
    window: int = 0
    """Tokens attended to at most (sliding window, sparse top-k); 0 is unlimited."""
    index_values_per_token: float = 0.0
    """Extra cached values per token of a sparse layer's index keys, read for all of the context."""
    index_flops_per_context_token: float = 0.0
    state_values: float = 0.0
    """Values of state held per sequence (linear layers)."""
    kv_heads: int = 0
    """KV heads that tensor parallelism can split the cache over (1 for MLA: the cache is replicated)."""
    prefill_flops_per_context_token: float = 0.0
    """The same where prompts and training take another form (MLA expanded to heads); 0: the same form."""


@dataclass(frozen=True)
class _Curve:
    """constant + slope × context + Σ weight × min(context, window): how all depends on context."""

    constant: float
    slope: float
    windows: tuple[tuple[int, float], ...]

    @overload
    def at(self, context_tokens: float) -> float: ...
    @overload
    def at(self, context_tokens: Floats) -> Floats: ...
    def at(self, context_tokens: float | Floats) -> float | Floats:
        values: float | Floats = self.slope * context_tokens + self.constant
        for window, weight in self.windows:
            values = values + weight * np.minimum(context_tokens, window)
        return values if isinstance(values, np.ndarray) and values.ndim else float(values)


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer or hybrid, by architecture."""

    name: str
    hidden: int
    layers: int
    vocabulary: int
    attention: tuple[Attention, ...]
    dense_ffn_layers: int
    dense_ffn_parameters: float
    """Weights of one dense feed-forward block."""
    moe_layers: int
    experts: int
    experts_active: int
    expert_parameters: float
    """Weights of one routed expert in one layer."""
    shared_expert_parameters: float
    """Weights of the shared experts of one MoE layer, plus its router."""
    embedding_parameters: float
    head_parameters: float
    """Weights of the output projection; read every step even where tied to the embedding."""
    tied_embedding: bool
    norm_parameters: float
    native_precision: str
    """``bf16``, ``fp8``, ``fp4``, ``int4``: how the checkpoint is published."""
    max_context: int
    """Tokens of context it is published for; 0 where its config does not say."""
    sources: tuple[str, ...]
    checked: str
    encoder_parameters: float = 0.0
    """Weights of a vision or audio encoder: held in memory, not used by text tokens."""
    attention_precision: str = ""
    """Precision of the attention weights where the checkpoint keeps another one for them; empty: native."""
    active_counts_embedding: bool = True
    """Whether the publisher's active count includes the input embedding (OpenAI's does not)."""

    @property
    def attention_parameters(self) -> float:
        """Weights of all attention and mixer blocks [count]."""
        return sum(a.layers * a.parameters for a in self.attention)

    @property
    def routed_parameters(self) -> float:
        """Weights of all routed experts [count]: moe_layers × experts × expert_parameters."""
        return self.moe_layers * self.experts * self.expert_parameters

    @property
    def active_routed_parameters(self) -> float:
        """Weights of the routed experts one token visits [count]."""
        return self.moe_layers * self.experts_active * self.expert_parameters

    @cached_property
    def always_parameters(self) -> float:
        """Weights read at every decode step whatever the batch [count].

        Attention, dense feed-forward, shared experts, routers, norms and the output head; not the embedding
        (one row per token is looked up) and not the routed experts.
        """
        return (
            self.attention_parameters
            + self.dense_ffn_layers * self.dense_ffn_parameters
            + self.moe_layers * self.shared_expert_parameters
            + self.norm_parameters
            + self.head_parameters
        )

    @cached_property
    def parameters(self) -> float:
        """All weights [count], a tied embedding once, an encoder included."""
        tied = self.head_parameters if self.tied_embedding else 0.0
        return (
            self.always_parameters
            + self.routed_parameters
            + self.embedding_parameters
            + self.encoder_parameters
            - tied
        )

    @cached_property
    def active_parameters(self) -> float:
        """Weights one token uses [count], as publishers count them ("A3B").

        always_parameters + routed experts visited + the input embedding where the publisher counts it.
        """
        counted = self.active_counts_embedding and not self.tied_embedding
        return (
            self.always_parameters
            + self.active_routed_parameters
            + (self.embedding_parameters if counted else 0.0)
        )

    @cached_property
    def gemm_parameters(self) -> float:
        """Weights that multiply every token [count]: always_parameters + routed experts visited − norms."""
        return self.always_parameters + self.active_routed_parameters - self.norm_parameters

    @cached_property
    def kv_values_per_token(self) -> float:
        """Cached values one more token adds at long context [count]: full, MLA, sparse layers and index.

        Sliding and linear layers add nothing once their window is full.
        """
        return self._cache.slope

    @cached_property
    def _cache(self) -> _Curve:
        return self._curve(
            lambda a: a.kv_values_per_token, lambda a: a.index_values_per_token, 1.0, {"sliding"}
        )

    @cached_property
    def _read(self) -> _Curve:
        return self._curve(
            lambda a: a.kv_values_per_token, lambda a: a.index_values_per_token, 1.0, {"sliding", "sparse"}
        )

    @cached_property
    def _decode_flops(self) -> _Curve:
        return self._curve(
            lambda a: a.flops_per_context_token,
            lambda a: a.index_flops_per_context_token,
            STATE_FLOPS_PER_VALUE,
            {"sliding", "sparse"},
        )

    @cached_property
    def _prefill_flops(self) -> _Curve:
        return self._curve(
            lambda a: a.prefill_flops_per_context_token or a.flops_per_context_token,
            lambda a: a.index_flops_per_context_token,
            STATE_FLOPS_PER_VALUE,
            {"sliding", "sparse"},
        )

    def _curve(
        self,
        per_token: Callable[[Attention], float],
        per_index_token: Callable[[Attention], float],
        per_state_value: float,
        windowed: set[str],
    ) -> _Curve:
        slope, constant = 0.0, 0.0
        windows: dict[int, float] = {}
        for a in self.attention:
            constant += a.layers * a.state_values * per_state_value
            slope += a.layers * per_index_token(a)
            if a.window and a.kind in windowed:
                windows[a.window] = windows.get(a.window, 0.0) + a.layers * per_token(a)
            else:
                slope += a.layers * per_token(a)
        return _Curve(constant, slope, tuple((w, v) for w, v in sorted(windows.items()) if v))

    @overload
    def kv_values(self, context_tokens: float) -> float: ...
    @overload
    def kv_values(self, context_tokens: Floats) -> Floats: ...
    def kv_values(self, context_tokens: float | Floats) -> float | Floats:
        """Cached values of one sequence of `context_tokens` [token, any shape]: keys, values, index, state.

        Σ layers × (kv_values_per_token × min(context, sliding window) + index × context + state).

        >>> model("meta-llama/Llama-3.1-8B").kv_values(1000)   # 32 layers × 2 × 8 heads × 128 × 1000
        65536000.0
        """
        return self._cache.at(context_tokens)

    @overload
    def kv_read_values(self, context_tokens: float) -> float: ...
    @overload
    def kv_read_values(self, context_tokens: Floats) -> Floats: ...
    def kv_read_values(self, context_tokens: float | Floats) -> float | Floats:
        """Cached values read to decode one token at `context_tokens` [token, any shape].

        As kv_values, but a sparse layer reads its top-k only (and its index whole).
        """
        return self._read.at(context_tokens)

    @overload
    def attention_flops(self, context_tokens: float, *, prefill: bool = ...) -> float: ...
    @overload
    def attention_flops(self, context_tokens: Floats, *, prefill: bool = ...) -> Floats: ...
    def attention_flops(self, context_tokens: float | Floats, *, prefill: bool = False) -> float | Floats:
        """FLOPs of attention alone for one new token over `context_tokens` [token, any shape] → [FLOP].

        Scores and weighted sum: 4 × heads × head size per layer and token attended to; index scores of sparse
        layers; 6 per state value of linear layers. `prefill` takes the form of prompts and training where it
        differs (MLA expanded to heads); the mean context of a prompt of p tokens is p / 2.
        """
        return (self._prefill_flops if prefill else self._decode_flops).at(context_tokens)

    @overload
    def flops_per_token(self, context_tokens: float, *, prefill: bool = ...) -> float: ...
    @overload
    def flops_per_token(self, context_tokens: Floats, *, prefill: bool = ...) -> Floats: ...
    def flops_per_token(self, context_tokens: float | Floats, *, prefill: bool = False) -> float | Floats:
        """FLOPs of a forward pass for one new token [FLOP]: 2 × gemm_parameters + attention_flops."""
        return 2 * self.gemm_parameters + self.attention_flops(context_tokens, prefill=prefill)


def models() -> Mapping[str, Model]:
    """All models of the catalogue by canonical name (Hugging Face id), in catalogue order."""
    from pertoken.catalog import _model_rows

    return _model_rows.models()


def model(name: str) -> Model:
    """The model of that name (full id, or its last part, any case). Raises UnknownNameError.

    A published variant of a known model is that model: instruction-tuned, dated or renamed; a quantised one
    has its own `native_precision`.

    >>> model("nvidia/Llama-3.1-8B-Instruct-FP8").native_precision
    'fp8'
    """
    from pertoken.catalog import _model_rows

    return _model_rows.model(name)


def model_from_config(path: Path) -> Model:
    """The model a Hugging Face ``config.json`` describes.

    A ``hf_quant_config.json`` beside it gives the precision of the checkpoint. Raises InputError naming the
    file, the key, what was found and what to do.
    """
    from pertoken.catalog import _config

    return _config.load(Path(path))


def models_dir(path: Path) -> dict[str, Model]:
    """Models of a folder of configs named ``org--name_config.json``, by ``org/name``.

    Raises InputError where the folder holds none or one of them cannot be read.
    """
    from pertoken.catalog import _config

    return _config.load_folder(Path(path))
