"""Language models described by architecture, from which sizes and work are computed, never typed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Attention:
    """One kind of attention layer and how many layers have it.

    kind: ``full`` (GQA/MHA/MQA), ``sliding`` (window), ``mla`` (latent), ``sparse`` (top-k over an index),
    ``linear`` (state of fixed size: Mamba, gated delta net). Sizes are per layer.
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
    """``bf16``, ``fp8``, ``fp4``: how the checkpoint is published."""
    max_context: int
    sources: tuple[str, ...]
    checked: str

    # Computed, all plain properties or methods over the fields (the catalogue helper fills these in):
    # parameters            all weights [count]
    # active_parameters     weights one token uses [count], as published ("A3B")
    # always_parameters     weights read at every decode step whatever the batch: attention, dense FFN, shared
    #                       experts, routers, norms, output head; not the embedding, not routed experts
    # routed_parameters     moe_layers × experts × expert_parameters
    # flops_per_token(context_tokens) -> 2 × (active − embedding lookup) + attention over that context [FLOP]
    # attention_flops(context_tokens) -> attention part alone [FLOP per new token]
    # kv_values(context_tokens) -> cached values of one sequence of that length (windows, index, state)
    # kv_read_values(context_tokens) -> cached values read to decode one token (windows, top-k, index, state)
    # kv_values_per_token  -> growth per token at long context (full, MLA, sparse + index layers)
    # vectorised: context_tokens may be a float or an array of any shape


def models() -> Mapping[str, Model]:
    """All models of the catalogue by canonical name (Hugging Face id), in catalogue order."""
    raise NotImplementedError


def model(name: str) -> Model:
    """The model of that name (full id, or its last part, any case). Raises UnknownNameError."""
    raise NotImplementedError


def model_from_config(path: Path) -> Model:
    """The model a Hugging Face ``config.json`` describes. Raises InputError naming the key that is missing."""
    raise NotImplementedError
