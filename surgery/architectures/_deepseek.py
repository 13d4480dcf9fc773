"""Facts that DeepSeek-V2, DeepSeek-V3 and the families after them share. Not a family of its own."""

from ..errors import InputError
from .base import MoE, RouterRule, Shape, Shapes
from .config import Config
from .layouts import fused, per_expert

CORRECTION = "mlp.gate.e_score_correction_bias"
CORRECTED_FUSED = fused(correction=CORRECTION)
CORRECTED_PER_EXPERT = per_expert(correction=CORRECTION)


def sigmoid_rule(config: Config) -> RouterRule:
    """Sigmoid scores; the best of score plus correction within the best groups; weights without correction."""
    groups, top_groups = group_limits(config, 2)
    return RouterRule(
        "sigmoid",
        config.integer("num_experts_per_tok"),
        renormalise=config.flag("norm_topk_prob"),
        scaling=config.number("routed_scaling_factor", 1.0),
        epsilon=1e-20,
        groups=groups,
        top_groups=top_groups,
        group_size=2,
        ordered=False,
    )


def group_limits(config: Config, least: int) -> tuple[int, int]:
    """Groups of experts and how many a token may select from.

    Args:
        least: fewest experts a group may have.

    Raises:
        InputError: the experts cannot be parted so, or the chosen groups hold too few.
    """
    groups = config.integer("n_group")
    chosen = config.integer("topk_group")
    experts = config.integer("n_routed_experts", "num_local_experts", "num_experts")
    if experts % groups or chosen > groups or experts // groups < least:
        raise InputError(
            f"{config.where}: {experts} experts in {groups} groups (n_group), of which {chosen} are "
            "chosen (topk_group), is impossible"
        )
    top_k = config.integer("num_experts_per_tok")
    if chosen * (experts // groups) < top_k:
        raise InputError(
            f"{config.where}: {chosen} groups of {experts // groups} experts hold fewer than the "
            f"{top_k} a token selects"
        )
    return groups, chosen


def after_dense_layers(config: Config, layer: int) -> bool:
    """The first ``first_k_dense_replace`` layers are dense."""
    first = config.get("first_k_dense_replace")
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise InputError(
            f"{config.where}: first_k_dense_replace should be a count of layers, is {first!r}"
        )
    return layer >= first


def shared_experts(config: Config) -> Shapes:
    """The experts every token passes, stored as one feed-forward, in front of no gate."""
    hidden = config.hidden
    width = config.integer("n_shared_experts") * config.integer("moe_intermediate_size")
    return {
        "mlp.shared_experts.gate_proj.weight": (width, hidden),
        "mlp.shared_experts.up_proj.weight": (width, hidden),
        "mlp.shared_experts.down_proj.weight": (hidden, width),
    }


MIXTURE = MoE(
    layouts=(CORRECTED_PER_EXPERT, CORRECTED_FUSED),
    expert_keys=("n_routed_experts",),
    other_keys=("num_local_experts",),
    width_key="moe_intermediate_size",
    rule=sigmoid_rule,
    is_moe_layer=after_dense_layers,
    shared=shared_experts,
    stock=CORRECTED_FUSED,
)
"""DeepSeek-V3's router and experts."""


def query_width(config: Config) -> int:
    """Width of a query head: its part without and its part with rotary positions."""
    return config.integer("qk_nope_head_dim") + config.integer("qk_rope_head_dim")


def latent_attention(config: Config) -> dict[str, Shape]:
    """Attention whose keys and values are expanded from one latent vector a token (MLA), and the two norms."""
    hidden, heads = config.hidden, config.heads
    queries = heads * query_width(config)
    latent, rotary = config.integer("kv_lora_rank"), config.integer("qk_rope_head_dim")
    values = heads * config.integer("v_head_dim")
    biased = config.flag("attention_bias")
    shapes: dict[str, Shape] = {"input_layernorm.weight": (hidden,)}
    if "q_lora_rank" in config.raw and config.raw["q_lora_rank"] is None:
        shapes["self_attn.q_proj.weight"] = (queries, hidden)
    else:
        rank = config.integer("q_lora_rank")
        shapes["self_attn.q_a_proj.weight"] = (rank, hidden)
        if biased:
            shapes["self_attn.q_a_proj.bias"] = (rank,)
        shapes["self_attn.q_a_layernorm.weight"] = (rank,)
        shapes["self_attn.q_b_proj.weight"] = (queries, rank)
    shapes["self_attn.kv_a_proj_with_mqa.weight"] = (latent + rotary, hidden)
    if biased:
        shapes["self_attn.kv_a_proj_with_mqa.bias"] = (latent + rotary,)
    shapes["self_attn.kv_a_layernorm.weight"] = (latent,)
    nope = config.integer("qk_nope_head_dim")
    shapes["self_attn.kv_b_proj.weight"] = (heads * nope + values, latent)
    shapes["self_attn.o_proj.weight"] = (hidden, values)
    if biased:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    shapes["post_attention_layernorm.weight"] = (hidden,)
    return shapes
