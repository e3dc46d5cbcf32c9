"""What a model and its objective exchange besides the row: the last stage's answer, and a reference to compare with.

Shapes: N scored tokens, G groups, K responses, H hidden size, V this rank's rows of the padded vocabulary.
"""

from dataclasses import dataclass

import torch

from rpo_megatron.model.vocab import VocabShard


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The answer of the last pipeline stage, the same on every tensor rank. What was not asked for, or what the head
    does not give, is None."""

    logp_N: torch.Tensor | None = None
    """fp32. Log-probability of each scored token."""
    token_kl_N: torch.Tensor | None = None
    """fp32, nats. KL(pi_ref(.|s) || pi(.|s)) over the whole vocabulary at each scored position."""
    entropy_N: torch.Tensor | None = None
    """fp32, nats. Entropy of the next-token distribution at each scored position; without gradient."""
    value_GK: torch.Tensor | None = None
    """fp32. The value head's number for each response; finite but meaningless where there is no response."""
    hidden_NH: torch.Tensor | None = None
    """In the model's precision, detached. Hidden states at the scored positions (of this context rank's part of the
    row), for ReferenceTokens."""

    @property
    def device(self) -> torch.device:
        """Asked by megatron's schedule of whatever a model with experts answers."""
        return next(tensor.device for tensor in vars(self).values() if tensor is not None)


@dataclass(frozen=True, kw_only=True)
class ReferenceTokens:
    """The reference's next-token distributions at a row's scored positions, as what its logits are made of. Nothing
    here carries a gradient."""

    hidden_NH: torch.Tensor
    """After the final norm, whole on every tensor rank. H is the reference's, which need not be the policy's."""
    shard: VocabShard
    """This rank's part of the reference's output layer."""
