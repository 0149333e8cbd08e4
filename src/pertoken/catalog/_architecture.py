"""The compact description of an architecture, and the arithmetic from it to a Model.

Catalogue rows and Hugging Face configs both end here, so a size is computed in one place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pertoken.catalog.models import Attention, Model


@dataclass(frozen=True)
class Mixer:
    """One kind of token mixing and the number of layers that have it. Zero means: not in this model.

    kind: ``gqa``, ``mla``, ``compressed`` (DeepSeek V4), ``delta_net``, ``kda``, ``mamba2``.
    """

    kind: str
    layers: int
    heads: int = 0
    kv_heads: int = 0
    head: int = 0
    """Size of a query and key head (MLA: rope part included)."""
    value_head: int = 0
    """Size of a value head where it differs."""
    window: int = 0
    """Sliding window, or top-k where there is an index."""
    bias: str = ""
    """``qkv``, ``qkvo``: which projections have one."""
    qk_norm: str = ""
    """``head`` (one per head size), ``layer`` (over all heads)."""
    gate: bool = False
    """Output gate per value element."""
    sinks: bool = False
    """A learned sink per head."""
    key_is_value: bool = False
    """Keys and values share one projection."""
    shared_cache: bool = False
    """Keys and values are those of an earlier layer."""
    q_rank: int = 0
    kv_rank: int = 0
    rope: int = 0
    o_rank: int = 0
    o_groups: int = 0
    index_heads: int = 0
    index_head: int = 0
    ratio: int = 0
    """Tokens compressed into one cached entry."""
    top_k: int = 0
    """Compressed entries attended to at most."""
    key_heads: int = 0
    """Linear layers: heads of queries and keys (`heads` are those of the values)."""
    groups: int = 0
    state: int = 0
    conv: int = 0


@dataclass(frozen=True)
class Moe:
    """Experts of each MoE layer. shared: width of all shared ones together; latent: width they work at."""

    layers: int
    experts: int
    active: int
    size: int
    shared: int = 0
    shared_gate: bool = False
    router_bias: bool = False
    bias: bool = False
    gated: bool = True
    latent: int = 0


@dataclass(frozen=True)
class Encoder:
    """A vision or audio encoder. patch: values of one patch; merge: patches that make one token."""

    layers: int
    width: int
    ffn: int
    patch: int = 0
    positions: int = 0
    merge: int = 1
    out: int = 0
    mergers: int = 1
    gated: bool = False

    @property
    def parameters(self) -> float:
        """Weights [count]: blocks with biases and norms, patch and position embeddings, projectors.

        >>> Encoder(layers=1, width=2, ffn=4, out=3).parameters   # 4·4 + 2·8 + 9·2 + 4, projector 2·3
        60.0
        """
        w, merged = self.width, self.width * self.merge
        block = 4 * w * w + (3 if self.gated else 2) * w * self.ffn + 9 * w + self.ffn
        projector = merged * (merged + self.out) if self.merge > 1 else w * self.out
        return float(self.layers * block + w * (self.patch + self.positions) + self.mergers * projector)


@dataclass(frozen=True)
class Architecture:
    """A decoder by its dimensions."""

    name: str
    hidden: int
    layers: int
    vocabulary: int
    mixers: tuple[Mixer, ...]
    context: int
    ffn_layers: int = 0
    ffn: float = 0
    """Width of the dense feed-forward; a mean over layers where it varies."""
    ffn_gated: bool = True
    ffn_bias: bool = False
    moe: Moe | None = None
    tied: bool = False
    norms: float = 2
    """Norms per layer (a mean where it varies); the final one comes on top."""
    norm_bias: bool = False
    final_norm: bool = True
    position_embeddings: int = 0
    encoders: tuple[Encoder, ...] = ()
    extra_per_layer: float = 0.0
    """Other weights of each layer (hyper-connections)."""
    precision: str = "bf16"
    attention_precision: str = ""
    active_counts_embedding: bool = True
    sources: tuple[str, ...] = ()
    checked: str = ""


def build(a: Architecture) -> Model:
    """The model of that architecture, its sizes computed."""
    attention = tuple(part for mixer in a.mixers for part in _MIXERS[mixer.kind](mixer, a.hidden))
    factor = 3 if a.ffn_gated else 2
    moe = a.moe
    norm = a.hidden * (2 if a.norm_bias else 1)
    ffn_bias = (a.ffn * (factor - 1) + a.hidden) if a.ffn_bias else 0
    head = float(a.vocabulary * a.hidden)
    return Model(
        name=a.name,
        hidden=a.hidden,
        layers=a.layers,
        vocabulary=a.vocabulary,
        attention=attention,
        dense_ffn_layers=a.ffn_layers,
        dense_ffn_parameters=factor * a.hidden * a.ffn + ffn_bias if a.ffn_layers else 0.0,
        moe_layers=moe.layers if moe else 0,
        experts=moe.experts if moe else 0,
        experts_active=moe.active if moe else 0,
        expert_parameters=_expert(moe, a.hidden) if moe else 0.0,
        shared_expert_parameters=_shared(moe, a.hidden) if moe else 0.0,
        embedding_parameters=head + a.position_embeddings * a.hidden,
        head_parameters=head,
        tied_embedding=a.tied,
        norm_parameters=norm * (a.norms * a.layers + a.final_norm) + a.extra_per_layer * a.layers,
        native_precision=a.precision,
        max_context=a.context,
        sources=a.sources,
        checked=a.checked,
        encoder_parameters=sum(e.parameters for e in a.encoders),
        attention_precision=a.attention_precision,
        active_counts_embedding=a.active_counts_embedding,
    )


def _expert(m: Moe, hidden: int) -> float:
    factor = 3 if m.gated else 2
    bias = (factor - 1) * m.size + hidden if m.bias else 0
    return float(factor * (m.latent or hidden) * m.size + bias)


def _shared(m: Moe, hidden: int) -> float:
    """Router, shared experts with their gate, projections into and out of the experts' latent space."""
    router = hidden * m.experts + (m.experts if m.router_bias else 0)
    shared = (3 if m.gated else 2) * hidden * m.shared + (hidden if m.shared_gate else 0)
    return float(router + shared + 2 * hidden * m.latent)


def _gqa(m: Mixer, hidden: int) -> list[Attention]:
    """Heads of queries in groups that share keys and values (MHA, MQA and GQA, arXiv 2305.13245)."""
    value = m.value_head or m.head
    q, k, v = m.heads * m.head, m.kv_heads * m.head, m.kv_heads * value
    projected_k, projected_v = (0, 0) if m.shared_cache else (k, 0 if m.key_is_value else v)
    out = m.heads * value
    weights: float = hidden * (q + projected_k + projected_v + out + (out if m.gate else 0))
    if m.bias:
        weights += q + projected_k + projected_v + (hidden if m.bias == "qkvo" else 0)
    if m.qk_norm:
        weights += q + projected_k if m.qk_norm == "layer" else m.head + (m.head if projected_k else 0)
    weights += m.heads if m.sinks else 0
    weights += _index(m, hidden, hidden)
    kind = "sparse" if m.index_heads or m.top_k else "sliding" if m.window else "full"
    return [
        Attention(
            kind=kind,
            layers=m.layers,
            parameters=float(weights),
            kv_values_per_token=0.0 if m.shared_cache else float(k + v),
            flops_per_context_token=2.0 * m.heads * (m.head + value),
            window=m.top_k or m.window,
            index_values_per_token=float(m.index_head),
            index_flops_per_context_token=2.0 * m.index_heads * m.index_head,
            kv_heads=m.kv_heads,
        )
    ]


def _index(m: Mixer, hidden: int, query_width: int) -> float:
    """Weights of a sparse layer's index: its queries, its one key with a layer norm, its heads' weights."""
    if not m.index_heads:
        return 0.0
    return float(
        query_width * m.index_heads * m.index_head
        + hidden * m.index_head
        + 2 * m.index_head
        + hidden * m.index_heads
    )


def _mla(m: Mixer, hidden: int) -> list[Attention]:
    """DeepSeek's latent attention (arXiv 2405.04434): a latent vector and a rope key cached for all heads.

    Decode works on the latent (keys of kv_rank + rope, values of kv_rank), a prompt on the heads themselves.
    """
    value = m.value_head
    queries = m.heads * m.head
    weights: float = (hidden + queries + 1) * m.q_rank if m.q_rank else hidden * queries
    weights += hidden * (m.kv_rank + m.rope) + m.kv_rank
    weights += m.kv_rank * m.heads * (m.head - m.rope + value)
    weights += m.heads * value * hidden * (2 if m.gate else 1)
    return [
        Attention(
            kind="sparse" if m.top_k else "mla",
            layers=m.layers,
            parameters=weights + _index(m, hidden, m.q_rank or hidden),
            kv_values_per_token=float(m.kv_rank + m.rope),
            flops_per_context_token=2.0 * m.heads * (2 * m.kv_rank + m.rope),
            window=m.top_k,
            index_values_per_token=float(m.index_head),
            index_flops_per_context_token=2.0 * m.index_heads * m.index_head,
            kv_heads=1,
            prefill_flops_per_context_token=2.0 * m.heads * (m.head + value),
        )
    ]


def _compressed(m: Mixer, hidden: int) -> list[Attention]:
    """DeepSeek V4: a window of raw tokens beside the context compressed `ratio` to one, one key-value head.

    With an index, `top_k` compressed entries are attended to, else all of them. Ratio 0: the window alone.
    Checked against the published 9.62 GiB per sequence of 1 M tokens of V4-Pro.
    """
    overlap = 2 if m.index_heads else 1
    queries = m.heads * m.head
    weights = (hidden + queries + 1) * m.q_rank + hidden * m.head + m.head
    weights += queries * m.o_rank + m.o_groups * m.o_rank * hidden + m.heads
    local = Attention(
        kind="sliding",
        layers=m.layers,
        parameters=0.0,
        kv_values_per_token=float(m.head),
        flops_per_context_token=4.0 * queries,
        window=m.window,
        kv_heads=1,
    )
    if not m.ratio:
        return [replace(local, parameters=float(weights))]
    weights += overlap * m.head * (2 * hidden + m.ratio) + m.head
    if m.index_heads:
        weights += m.q_rank * m.index_heads * m.index_head + hidden * m.index_heads
        weights += overlap * m.index_head * (2 * hidden + m.ratio) + m.index_head
    context = Attention(
        kind="sparse" if m.top_k else "full",
        layers=m.layers,
        parameters=float(weights),
        kv_values_per_token=m.head / m.ratio,
        flops_per_context_token=4.0 * queries / m.ratio,
        window=m.top_k * m.ratio,
        index_values_per_token=m.index_head / m.ratio,
        index_flops_per_context_token=2.0 * m.index_heads * m.index_head / m.ratio,
        kv_heads=1,
    )
    return [context, local]


def _linear(m: Mixer, parameters: float, state_values: float) -> list[Attention]:
    return [
        Attention(
            kind="linear",
            layers=m.layers,
            parameters=float(parameters),
            kv_values_per_token=0.0,
            flops_per_context_token=0.0,
            state_values=float(state_values),
            kv_heads=m.heads,
        )
    ]


def _delta_net(m: Mixer, hidden: int) -> list[Attention]:
    """Gated delta net (arXiv 2412.06464): key_heads × head queries and keys, heads × value_head values."""
    key, value = m.key_heads * m.head, m.heads * m.value_head
    mixed = 2 * key + value
    weights = (
        hidden * (mixed + value + 2 * m.heads) + mixed * m.conv + 2 * m.heads + m.value_head + value * hidden
    )
    return _linear(m, weights, m.heads * m.head * m.value_head + mixed * (m.conv - 1))


def _kda(m: Mixer, hidden: int) -> list[Attention]:
    """Kimi delta attention (arXiv 2510.26692): decay per channel of low rank, gate of full or low rank."""
    width = m.heads * m.head
    low_rank = hidden * m.head + m.head * width
    gate = hidden * width if m.gate else low_rank
    weights = 4 * hidden * width + 3 * width * m.conv + low_rank + gate + hidden * m.heads
    weights += m.heads + width + m.head
    return _linear(m, weights, m.heads * m.head * m.head + 3 * width * (m.conv - 1))


def _mamba2(m: Mixer, hidden: int) -> list[Attention]:
    """Mamba-2 (arXiv 2405.21060): gate, input, B and C of each group and step sizes from one projection."""
    inner = m.heads * m.head
    mixed = inner + 2 * m.groups * m.state
    weights = hidden * (inner + mixed + m.heads) + mixed * (m.conv + 1) + 3 * m.heads + inner + inner * hidden
    return _linear(m, weights, inner * m.state + mixed * (m.conv - 1))


_MIXERS = {
    "gqa": _gqa,
    "mla": _mla,
    "compressed": _compressed,
    "delta_net": _delta_net,
    "kda": _kda,
    "mamba2": _mamba2,
}
