"""The data that both sides of a comparison see: groups for us, rows of tokens for TRL.

G groups, K responses, at most T tokens; R rows, L tokens of prompt and response; V tokens in the vocabulary. Every
token of every response has an id of its own, so a table of V log-probabilities is a whole model, and a gradient with
respect to the table says what a loss did to each token.
"""

from dataclasses import dataclass

import torch

from rpo_megatron.objectives.responses import Responses

PROMPT_OR_PADDING = 0
"""The one id outside the responses. Its log-probability is not 0: a loss that counts it by mistake is seen."""
PROMPT_LOGP = -3.0

Pair = tuple[int, int, int]
"""Group, better response, worse response."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Responses as TRL's collators lay them out, right-padded, without their prompt."""

    ids_RT: torch.Tensor
    mask_RT: torch.Tensor
    policy_V: torch.Tensor
    reference_V: torch.Tensor

    def input_ids(self, *, prompt: int) -> torch.Tensor:
        """`prompt` tokens and the response [R, L]."""
        return torch.nn.functional.pad(self.ids_RT, (prompt, 0), value=PROMPT_OR_PADDING)

    def attention_mask(self, *, prompt: int) -> torch.Tensor:
        return torch.nn.functional.pad(self.mask_RT.long(), (prompt, 0), value=1)

    def completion_mask(self, *, prompt: int) -> torch.Tensor:
        return torch.nn.functional.pad(self.mask_RT.long(), (prompt, 0), value=0)

    def labels(self, *, prompt: int) -> torch.Tensor:
        """The ids, -100 outside the response."""
        return self.input_ids(prompt=prompt).masked_fill(self.completion_mask(prompt=prompt) == 0, -100)

    def reference_logp(self) -> torch.Tensor:
        """Summed log-probabilities [R]."""
        return (self.reference_V[self.ids_RT] * self.mask_RT).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class Groups:
    policy_V: torch.Tensor
    """Log-probability of each token: the leaf to which gradients are taken."""
    reference_V: torch.Tensor
    ids_GKT: torch.Tensor
    mask_GKT: torch.Tensor
    reward_GK: torch.Tensor

    def responses(self) -> Responses:
        """What our objectives see."""
        return Responses(
            logp_GK=self._summed(self.policy_V),
            ref_logp_GK=self._summed(self.reference_V),
            length_GK=self.mask_GKT.sum(dim=2),
            reward_GK=self.reward_GK,
            valid_GK=torch.ones_like(self.reward_GK, dtype=torch.bool),
            draw_G=torch.zeros(len(self.reward_GK)),
        )

    def rows(self, index: list[tuple[int, int]]) -> Rows:
        """The responses (group, response), in that order."""
        g_R, k_R = torch.tensor(index).unbind(dim=1)
        return Rows(
            ids_RT=self.ids_GKT[g_R, k_R],
            mask_RT=self.mask_GKT[g_R, k_R],
            policy_V=self.policy_V,
            reference_V=self.reference_V,
        )

    def chosen_and_rejected(self, pairs: list[Pair]) -> Rows:
        """The better responses of all pairs, then the worse ones in the same order."""
        return self.rows([(g, better) for g, better, _ in pairs] + [(g, worse) for g, _, worse in pairs])

    def best_and_worst(self) -> list[Pair]:
        """One pair per group."""
        best_G, worst_G = self.reward_GK.argmax(dim=1).tolist(), self.reward_GK.argmin(dim=1).tolist()
        return list(zip(range(len(best_G)), best_G, worst_G, strict=True))

    def every_pair(self, group: int) -> list[Pair]:
        """All pairs of a group whose rewards differ."""
        reward_K = self.reward_GK[group].tolist()
        num = range(len(reward_K))
        return [(group, i, j) for i in num for j in num if reward_K[i] > reward_K[j]]

    def gap(self, pair: Pair) -> float:
        """Reward of the better response minus that of the worse one."""
        group, better, worse = pair
        return float(self.reward_GK[group, better] - self.reward_GK[group, worse])

    def _summed(self, table_V: torch.Tensor) -> torch.Tensor:
        return (table_V[self.ids_GKT] * self.mask_GKT).sum(dim=2)


def make(*, seed: int, num_groups: int = 8, num_responses: int = 2, longest: int = 6) -> Groups:
    """Ragged lengths; log-ratios, and their differences within a group, of several nats on either side."""
    random = torch.Generator().manual_seed(seed)
    shape = (num_groups, num_responses, longest)
    ids_GKT = 1 + torch.arange(num_groups * num_responses * longest).view(shape)
    length_GK = torch.randint(1, longest + 1, shape[:2], generator=random)
    mask_GKT = torch.arange(longest) < length_GK[..., None]
    reference_V = -0.02 - 3.0 * torch.rand(1 + ids_GKT.numel(), generator=random).square()
    policy_V = (reference_V * (0.7 * torch.randn(reference_V.shape, generator=random)).exp()).clamp(max=-0.01)
    reference_V[PROMPT_OR_PADDING] = policy_V[PROMPT_OR_PADDING] = PROMPT_LOGP
    return Groups(
        policy_V=policy_V.requires_grad_(),
        reference_V=reference_V,
        ids_GKT=ids_GKT.masked_fill(~mask_GKT, PROMPT_OR_PADDING),
        mask_GKT=mask_GKT,
        reward_GK=torch.randn(shape[:2], generator=random),
    )
