"""What a file of facts about one model family says. Methods and checkpoint code read it; it knows neither."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..checkpoint.region import Region
from .config import Config
from .layouts import FUSED, ExpertLayout
from .layouts import PROJECTIONS as PROJECTIONS

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

DENSE_FFN = {
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


@dataclass(frozen=True)
class RouterRule:
    """How a family turns router logits into selected experts and their weights.

    Where a layer has a selection bias (``ExpertLayout.correction``), it is added to the scores for the selection
    and nowhere else: weights are scores without it.

    Attributes:
        score: what logits become before selection: ``softmax`` over all experts, ``sigmoid`` of each,
            ``selected-softmax``: the raw logits, and the softmax of the selected ones as weights,
            ``selected-sigmoid``: the raw logits, and the sigmoid of each selected one, or
            ``sparsemixer``: the two largest logits, each with its softmax over those near it (PhiMoE).
        top_k: experts a token selects.
        renormalise: divide the selected scores by their sum.
        scaling: factor on the final weights.
        cast_weights: weights are cast to the hidden states' dtype.
        epsilon: added to the sum that divides.
        least_sum: what the sum that divides is at least.
        groups: consecutive experts form this many groups of one size; 1 selects among all.
        top_groups: groups that selection is limited to.
        group_size: best (biased) scores whose sum is a group's score; no group may hold fewer experts.
        ordered: whether stock sorts the selected experts by score.
        scales_input: a weight multiplies what its expert is given, and not what it gives.
        jitter: of ``sparsemixer``: logits further than twice this, relatively, below the best do not count.
    """

    score: Literal["softmax", "sigmoid", "selected-softmax", "selected-sigmoid", "sparsemixer"]
    top_k: int
    renormalise: bool
    scaling: float = 1.0
    cast_weights: bool = False
    epsilon: float = 0.0
    least_sum: float = 0.0
    groups: int = 1
    top_groups: int = 1
    group_size: int = 1
    ordered: bool = True
    jitter: float = 0.0
    scales_input: bool = False

    @property
    def least_experts(self) -> int:
        """Fewest experts the stock router runs with."""
        return max(self.top_k, self.groups * self.group_size)

    @property
    def weights_sum_to_one(self) -> bool:
        """Whether identical experts reproduce one expert, whatever the router says."""
        return (self.renormalise or self.score == "selected-softmax") and self.scaling == 1.0


@dataclass(frozen=True)
class MoE:
    """The mixture of a family.

    Attributes:
        layouts: every way its experts are stored, the Hub's own first.
        stock: the parameter names of the stock decoder layer; they also tell its router and experts modules.
        expert_keys: spellings of the config key for the number of routed experts, the family's own first.
        other_keys: further spellings that stock accepts; read and rewritten where a config has them.
        width_key: config key of an expert's hidden width.
        rule: router semantics from the config.
        is_moe_layer: which decoder layers hold experts.
        shared: parameter shapes of shared experts of a layer, by name below the layer's prefix.
        top_k_keys: config keys for the number of experts a token selects, the family's own first.
        fixed_count: why a stock checkpoint cannot have another number of routed experts; empty where it can.
    """

    layouts: Sequence[ExpertLayout]
    expert_keys: Sequence[str]
    width_key: str
    rule: Callable[[Config], RouterRule]
    is_moe_layer: Callable[[Config, int], bool] = lambda config, layer: True
    shared: Callable[[Config], Shapes] = lambda config: {}
    stock: ExpertLayout = FUSED
    other_keys: Sequence[str] = ()
    top_k_keys: Sequence[str] = ("num_experts_per_tok",)
    fixed_count: str = ""

    def experts(self, config: Config) -> int:
        return config.integer(*self.expert_keys, *self.other_keys)


@dataclass(frozen=True)
class DenseTarget:
    """How a MoE family holds a dense parent's blocks.

    Attributes:
        parents: model types whose attention, norms and embeddings it holds unchanged.
        config: the MoE config for (parent's config, experts, top_k); raises InputError with the reason where
            this parent cannot be held.
        neutral_shared: for families with a shared expert, the names below the layer's prefix of its ``gate``, ``up``
            (or both in one, ``gate_up``) and ``down`` and, where there is one, of the sigmoid ``switch`` in front of
            it. A family that requires one gets a neutral one where none is asked for.
        shared_size: for families with a shared expert, the config values (config so far, width) that make it so
            wide; raises InputError where the family cannot have that width.
    """

    parents: Sequence[str]
    config: Callable[[Config, int, int], dict[str, object]]
    neutral_shared: Mapping[str, str] = field(default_factory=dict)
    shared_size: Callable[[Mapping[str, object], int], Mapping[str, object]] | None = None

    def shared_parts(self, prefix: str, shapes: Shapes) -> dict[str, Region]:
        """A layer's ``gate``, ``up``, ``down`` and, where there is one, ``switch``; nothing without a shared expert.

        Args:
            prefix: of the layer.
            shapes: of the shared expert's tensors, by name below it.
        """
        found: dict[str, Region] = {}
        for role, name in self.neutral_shared.items():
            if name not in shapes:
                continue
            region = Region(prefix + name, shapes[name])
            if role == "gate_up":
                half = region.shape[0] // 2
                found |= {"gate": region.rows(0, half), "up": region.rows(half, 2 * half)}
            else:
                found[role] = region
        return found


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Attributes:
        model_type: the config's value.
        class_name: the stock transformers class, as in the config's ``architectures``.
        attention: parameter shapes of attention and norms of a layer, by name below the layer's prefix.
        defaults: config values that stock transformers assumes where the file is silent.
        moe: the mixture, or None for a dense family.
        dense_ffn: names of the dense feed-forward below the layer's prefix.
        dense_width_key: config key of its width.
        target: how it is grown from a dense parent, or None.
        head_dim: width of a query head.
        logits_divisor: what the head's outputs are divided by.
        prediction_layers: config key that counts layers after the last which predict further tokens. Stock
            classes leave them aside; they are passed through as they are.
        prediction_prefixes: how else tensors of such layers are called.
        attention_experts: names below the layer's prefix of attention's tensors with one entry per expert, of which
            a token selects as many as of the mixture's.
        mixer: further parameter shapes that differ between layers, like ``attention``.
        norm_bias: whether the final norm has a bias beside its weight.
        head_bias: whether the output head has one.
        backend: transformers' attention implementation that can run it.
    """

    model_type: str
    class_name: str
    attention: Callable[[Config], Shapes]
    defaults: Mapping[str, object] = field(default_factory=dict)
    moe: MoE | None = None
    dense_ffn: Mapping[str, str] = field(default_factory=lambda: dict(DENSE_FFN))
    dense_width_key: str = "intermediate_size"
    dense_biases: Callable[[Config], bool] = lambda config: False
    target: DenseTarget | None = None
    prefix: str = "model.layers.{layer}."
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    head_dim: Callable[[Config], int] = lambda config: config.head_dim
    logits_divisor: Callable[[Config], float] = lambda config: 1.0
    prediction_layers: str = ""
    prediction_prefixes: Sequence[str] = ()
    attention_experts: Sequence[str] = ()
    mixer: Callable[[Config, int], Shapes] = lambda config, layer: {}
    norm_bias: bool = False
    head_bias: Callable[[Config], bool] = lambda config: False
    backend: str = "sdpa"

    @property
    def final_norm_bias(self) -> str:
        return self.final_norm.removesuffix(".weight") + ".bias"

    @property
    def head_bias_name(self) -> str:
        return self.head.removesuffix(".weight") + ".bias"


def attention_shapes(
    config: Config, *, qkv_bias: bool = False, output_bias: bool = False, qk_norm: str = "none"
) -> dict[str, Shape]:
    """Grouped-query attention and the two norms of a pre-norm block.

    Args:
        qk_norm: ``none``, ``head`` (one norm of head width, shared by all heads) or ``full`` (norms as wide
            as the projections).
    """
    hidden, queries = config.hidden, config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
    }
    if qkv_bias:
        shapes["self_attn.q_proj.bias"] = (queries,)
        shapes["self_attn.k_proj.bias"] = shapes["self_attn.v_proj.bias"] = (keys,)
    if output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if qk_norm == "head":
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    elif qk_norm == "full":
        shapes["self_attn.q_norm.weight"] = (queries,)
        shapes["self_attn.k_norm.weight"] = (keys,)
    return shapes


def flagged_attention(
    config: Config, *, flag: str = "attention_bias", qk_norm: str = "none"
) -> dict[str, Shape]:
    """The same, with biases on all four projections where a flag of the config asks for them."""
    biased = config.flag(flag)
    return attention_shapes(config, qkv_bias=biased, output_bias=biased, qk_norm=qk_norm)


def selected_softmax(config: Config) -> RouterRule:
    """The largest logits, and the softmax of those alone."""
    return RouterRule(
        "selected-softmax",
        config.integer("num_experts_per_tok"),
        renormalise=False,
        cast_weights=True,
    )
