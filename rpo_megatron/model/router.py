"""The router of a layer with experts: how evenly it uses them, and two losses that can be asked for.

Both losses are means over groups, like the objective: a group's tokens are its prompt, once, and its responses, and
padding is nobody's. So they are the same in every packing and layout. With W tokens in group g, E experts of which a
token takes K, p the router's shares of all experts (they sum to 1) and z its logits:

    balance_g = E * sum_e (tokens of g that took e / (K W)) * (mean over g's tokens of p_e)
                1 when all experts are used alike, E / K when the same K always are
                (sequence-wise balance loss, DeepSeek-V3, arXiv 2412.19437, eq. 17-20; Switch, arXiv 2101.03961, eq. 4)
    z_g       = mean over g's tokens of logsumexp(z)^2                          (ST-MoE, arXiv 2202.08906, eq. 5)

Every layer with experts adds aux_loss * balance_g + z_loss * z_g to the group's loss. Megatron's own losses cannot be
used: they count a row's padding, depend on what else is in the row, and are scaled as if the objective were divided by
tokens, where ours is divided by groups.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from rpo_megatron.config import MoeConfig
from rpo_megatron.model.parts import Experts


class GroupRouter(TopKRouter):
    """Counts, wherever there are gradients, what became of the tokens of groups. `padding_mask` [t, G] says which of
    this rank's t tokens belong to which group; it has megatron's name because it goes megatron's way to every layer,
    also when a layer is computed again."""

    def __init__(self, *args: Any, losses: MoeConfig, biased: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        if biased:  # not by moe_router_enable_expert_bias, with which megatron would also move it in every step
            delattr(self, "expert_bias")  # None
            bias_E = torch.zeros(self.num_experts, device=torch.cuda.current_device())
            self.register_parameter("expert_bias", torch.nn.Parameter(bias_E, requires_grad=False))
        self.losses = losses
        seen = torch.zeros(self.num_experts + 2, dtype=torch.float64, device=torch.cuda.current_device())
        self.register_buffer("seen", seen, persistent=False)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        probs, chosen_tE = super().routing(logits)
        # Evaluations and references have no gradients, nor has the first of two passes where backward makes the second.
        if padding_mask is None or not torch.is_grad_enabled():
            return probs, chosen_tE
        member_tG, logits_tE = padding_mask, logits.flatten(0, -2)
        self.seen[:-2] += (chosen_tE & member_tG.any(1, keepdim=True)).sum(0)
        if self.losses.aux_loss or self.losses.z_loss:
            sums_2 = self._sums(logits_tE, chosen_tE, member_tG)
            self.seen[-2:] += sums_2.detach()
            # Gradients are added up over micro-batches and ranks and divided by the number of groups, as the losses'.
            loss = self.losses.aux_loss * sums_2[0] + self.losses.z_loss * sums_2[1]
            probs = MoEAuxLossAutoScaler.apply(probs, loss)
        return probs, chosen_tE

    def _sums(self, logits_tE: torch.Tensor, chosen_tE: torch.Tensor, member_tG: torch.Tensor) -> torch.Tensor:
        """What this rank's tokens add to (the sum over groups of balance_g, that of z_g)."""
        member_Gt = member_tG.T.float()
        took_GE = member_Gt @ chosen_tE.float()
        if self.tp_cp_group.size() > 1:  # the ranks that hold the rest of the row
            dist.all_reduce(took_GE, group=self.tp_cp_group)
        all_G = took_GE.sum(1, keepdim=True).clamp(min=1)  # K W
        per_token_Gt = member_Gt * (self.topk / all_G)  # 1 / W
        balance = self.num_experts * (took_GE / all_G * (per_token_Gt @ self._shares(logits_tE))).sum()
        return torch.stack([balance, (per_token_Gt @ logits_tE.logsumexp(-1).square()).sum()])

    def _shares(self, logits_tE: torch.Tensor) -> torch.Tensor:
        if self.score_function == "softmax":
            return logits_tE.softmax(-1)
        scores_tE = logits_tE.sigmoid()
        return scores_tE / scores_tE.sum(-1, keepdim=True)


def routing(experts: Experts) -> dict[str, Any]:
    """Fields of megatron's TransformerConfig."""
    limited = experts.chosen_groups < experts.groups
    return {
        "moe_router_topk": experts.per_token,
        "moe_router_score_function": "sigmoid" if experts.biased else "softmax",
        # Softmax over the chosen experts gives the same as dividing their shares of all by their sum.
        "moe_router_pre_softmax": not experts.normalise,
        "moe_router_num_groups": experts.groups if limited else None,
        "moe_router_group_topk": experts.chosen_groups if limited else None,
        "moe_router_topk_scaling_factor": experts.scale if experts.scale != 1.0 else None,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def use_group_routers(block: TransformerBlockSubmodules, losses: MoeConfig, *, biased: bool) -> None:
    """In those of a block's layers that have experts. The form of megatron's spec depends on its version (a ModuleSpec
    up to 0.16)."""
    for layer in block.layer_specs:
        mlp = layer.submodules.mlp
        built, parts = (mlp.func, mlp.keywords) if isinstance(mlp, partial) else (mlp.module, vars(mlp))
        if built is MoELayer:
            parts["submodules"].router = partial(GroupRouter, losses=losses, biased=biased)


def members(group_T: torch.Tensor, num_groups: int) -> torch.Tensor:
    """bool [G, T]: which tokens belong to which group; -1 belongs to none."""
    return group_T == torch.arange(num_groups, device=group_T.device)[:, None]


def take_seen(chunks: Sequence[Any]) -> torch.Tensor | None:
    """What the routers in a rank's chunks have seen since they were asked last, [layers of the whole model, E + 2]:
    tokens that took each expert, sum of balance_g, sum of z_g. It adds up over ranks, also those whose layers have no
    experts. None for a model without experts."""
    config = chunks[0].config
    if config.num_moe_experts is None:
        return None
    device = next(chunks[0].parameters()).device
    seen_LX = torch.zeros(config.num_layers, config.num_moe_experts + 2, dtype=torch.float64, device=device)
    for router in (module for chunk in chunks for module in chunk.modules() if isinstance(module, GroupRouter)):
        seen_LX[router.layer_number - 1] = router.seen
        router.seen.zero_()
    return seen_LX


def expert_numbers(seen_LX: torch.Tensor, *, num_groups: float) -> dict[str, float]:
    """From the sum of all ranks' `take_seen` and the number of groups that it was about, means over layers of

    load        tokens of the busiest expert over the mean of all experts, from 1 (all alike) to E / K
    balance     balance_g, mean over the groups; like router_z (z_g) only where one of the losses is in use
    """
    seen_LX = seen_LX[seen_LX[:, :-2].any(1)]  # layers with experts
    if not len(seen_LX):
        return {}
    took_LE = seen_LX[:, :-2]
    balance, router_z = (seen_LX[:, -2:].mean(0) / num_groups).tolist()
    losses = {"balance": balance, "router_z": router_z} if balance > 0 else {}
    return {"load": float((took_LE.amax(1) / took_LE.mean(1)).mean()), **losses}
