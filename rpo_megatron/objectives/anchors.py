"""Terms besides the distances, over the whole group whatever pair was selected. Each takes a batch and gives [G]."""

import torch

from rpo_megatron.objectives.responses import Responses
from rpo_megatron.objectives.selections import best


def nll(batch: Responses, *, responses: str) -> torch.Tensor:
    """-log pi(y|x) / |y|, in nats per token: of the `best` response, the mean over `all` of them, or their mean
    `weighted` by softmax_k(r_k), r as the config's `rewards` section gives it. 0 for a padding group."""
    assert batch.logp_GK is not None
    per_token_GK = torch.where(batch.valid_GK, -batch.logp_GK / batch.length_GK.clamp(min=1), 0.0)
    return (per_token_GK * _WEIGHTS[responses](batch)).sum(dim=1)


def nll_anchor(batch: Responses, *, nll_on: str) -> torch.Tensor:
    """The same as an anchor beside another loss: keeps the likelihood of good responses from falling while margins
    grow (NeMo-Aligner's sft_loss_weight, the RPO term of Iterative RPO, arXiv 2404.19733)."""
    return nll(batch, responses=nll_on)


def reference_kl(batch: Responses, *, kl_estimator: str, kl_samples: str) -> torch.Tensor:
    """KL(pi_ref(.|x) || pi(.|x)) in nats, estimated as the mean over responses that the reference wrote: EXPO (arXiv
    2506.07492), forward KL.

    `token`: sum over tokens of the KL over the whole vocabulary, exact given the samples' prefixes. `sample`:
    -log pi(y|x), whose expected gradient is the same and whose value is larger by the reference's entropy.
    `kl_samples` says which responses count: `all`, or `own`, those that do not come from another model. Biased where
    they were not sampled from the reference. 0 for a group without such a response.
    """
    sample_GK = batch.valid_GK
    if kl_samples == "own":
        assert batch.source_GK is not None
        sample_GK = sample_GK & ~batch.source_GK
    assert batch.logp_GK is not None
    kl_GK = batch.token_kl_GK if kl_estimator == "token" else -batch.logp_GK
    assert kl_GK is not None
    return torch.where(sample_GK, kl_GK, 0.0).sum(dim=1) / sample_GK.sum(dim=1).clamp(min=1)


def _best(batch: Responses) -> torch.Tensor:
    return best(batch).to(torch.float64)


def _all(batch: Responses) -> torch.Tensor:
    return batch.valid_GK / batch.valid_GK.sum(dim=1, keepdim=True).clamp(min=1).to(torch.float64)


def _softmax_of_rewards(batch: Responses) -> torch.Tensor:
    assert batch.reward_GK is not None
    lowest = torch.finfo(batch.reward_GK.dtype).min  # not -inf: a padding group has nothing else
    return batch.reward_GK.masked_fill(~batch.valid_GK, lowest).softmax(dim=1) * batch.valid_GK


_WEIGHTS = {"best": _best, "all": _all, "weighted": _softmax_of_rewards}
