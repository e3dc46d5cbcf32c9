"""Parts of a model that only some families have, as numbers from config.json: experts, and latent attention.

No torch and no numpy.
"""

from dataclasses import dataclass

from rpo_megatron.errors import UserError
from rpo_megatron.model.families import Family
from rpo_megatron.model.hf_config import HFConfig


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in place of feed-forward layers."""

    count: int
    per_token: int
    """The best so many experts of a token compute it."""
    ffn_size: int
    """Of each expert; ModelShape.ffn_size is that of the layers without."""
    normalise: bool
    """The chosen experts' shares of a token sum to 1; else they are those of the softmax over all experts."""
    dense_layers: tuple[int, ...] = ()
    """Layers without experts, counted from 0."""
    shared_ffn_size: int = 0
    """Of one more expert, which computes every token; 0 where there is none."""
    shared_gate: bool = False
    """What it computes is multiplied by a sigmoid of the token."""
    biased: bool = False
    """Shares are sigmoids, not a softmax. The best experts are those with the largest share plus a bias of the expert,
    which the model comes with and which is never trained."""
    groups: int = 1
    """Experts are in so many groups, one after the other; only those of the `chosen_groups` best can be chosen, by the
    sum of the two largest in it."""
    chosen_groups: int = 1
    scale: float = 1.0
    """What the routed experts compute is multiplied by this."""


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1). Keys and values of all heads are made
    of `kv_rank` numbers per token; beside them a key has `rotary_dim` numbers that all heads share."""

    query_rank: int | None
    """Queries, likewise; None where they are made of the hidden state itself."""
    kv_rank: int
    plain_dim: int
    """Numbers of a query's or key's head that are not rotated,"""
    rotary_dim: int
    """and that are."""
    value_dim: int
    interleaved: bool
    """Numbers that turn together are neighbours in the files; else they are half a head apart."""

    @property
    def width(self) -> int:
        """Numbers of a token from which queries, keys and values are made, and the shared part of the key."""
        return (self.query_rank or 0) + self.kv_rank + self.rotary_dim


def read_experts(config: HFConfig, family: Family) -> Experts | None:
    names = family.experts
    if names is None:
        return None
    count, per_token = config.num_local_experts, config.num_experts_per_tok
    assert count is not None
    assert per_token is not None
    if per_token > count:
        raise UserError(f"num_experts_per_tok={per_token} is more than the {count} experts there are")
    if names.biased:
        _check_groups(config, count, per_token)
    without = config.mlp_only_layers or []
    ffn_size = config.moe_intermediate_size or config.intermediate_size
    shared = config.n_shared_experts * ffn_size if names.biased else config.shared_expert_intermediate_size
    return Experts(
        count=count,
        per_token=per_token,
        ffn_size=ffn_size,
        normalise=config.norm_topk_prob,
        dense_layers=tuple(
            i
            for i in range(config.num_hidden_layers)
            if i in without or (i + 1) % config.decoder_sparse_step or i < config.first_k_dense_replace
        ),
        shared_ffn_size=shared if names.shared else 0,
        shared_gate=names.shared_gate,
        biased=names.biased,
        groups=config.n_group,
        chosen_groups=config.topk_group,
        scale=config.routed_scaling_factor,
    )


def _check_groups(config: HFConfig, count: int, per_token: int) -> None:
    """What megatron's router computes as transformers does."""
    groups, chosen = config.n_group, config.topk_group
    if not config.norm_topk_prob or per_token == 1:
        raise UserError("a router of sigmoids is supported with norm_topk_prob=true and num_experts_per_tok above 1")
    if chosen > groups or count % groups or per_token > count // groups * chosen:
        raise UserError(
            f"n_group={groups}, topk_group={chosen}: {per_token} of {count} experts cannot be chosen that way"
        )
    if chosen < groups and per_token // chosen != 2:
        raise UserError(
            f"topk_group={chosen} with num_experts_per_tok={per_token} is not supported: transformers scores a group "
            f"of experts by its best two, megatron by its best {per_token // chosen}"
        )


def read_latent(config: HFConfig, family: Family) -> Latent | None:
    if not family.latent:
        return None
    kv_rank, plain, rotary = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim
    value = config.v_head_dim
    assert kv_rank is not None
    assert plain is not None
    assert rotary is not None
    assert value is not None
    if rotary % 2:
        raise UserError(f"qk_rope_head_dim={rotary} is no even number of dimensions")
    if value > plain + rotary:
        raise UserError(f"v_head_dim={value} is more than the {plain + rotary} numbers of a key, which is unsupported")
    if config.num_key_value_heads not in (None, config.num_attention_heads):
        raise UserError(f"num_key_value_heads={config.num_key_value_heads} must be num_attention_heads")
    return Latent(
        query_rank=config.q_lora_rank,
        kv_rank=kv_rank,
        plain_dim=plain,
        rotary_dim=rotary,
        value_dim=value,
        interleaved=config.rope_interleave,
    )
