"""Policies over three arms, trained with the objectives of rpo_megatron: a bandit arm is a response of one token.

Many runs, one per value of lambda, are trained at once as one batch of groups. They stay independent: every run has its
own parameters, its own groups, its own gradient norm, and Adam works element by element. What differs between the runs
is not a knob but is put into the inputs, since the losses say the same thing either way:

    dpo     lambda rho in place of rho, beta = 1
    ipo     (rho - 1/(2 lambda))^2 = 1/lambda^2 (lambda rho - 1/2)^2
    expo    lambda KL in place of KL, kl_weight = 1/3: the authors' code averages the KL term over the three arms
    f_dpo   outside rpo_megatron's table; written out below

Shapes: L runs, P prompts, A arms, B pairs of a batch.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from rpo_megatron.config import ObjectiveConfig
from rpo_megatron.objectives.objective import Objective, build
from rpo_megatron.objectives.responses import Responses

ARMS = 3
CLIP_NORM = 10.0
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch.optim.Adam's defaults, as in the authors' notebooks


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Labelled comparisons. int64 tensors of one length."""

    prompt_N: torch.Tensor
    winner_N: torch.Tensor
    loser_N: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a loss sees: pairs of all runs, run after run. `lam_R` is each row's lambda."""

    logp_R2: torch.Tensor
    ref_logp_R2: torch.Tensor
    kl_R: torch.Tensor
    """KL(pi_ref(.|x) || pi(.|x)) of the row's prompt."""
    lam_R: torch.Tensor


Loss = Callable[[Batch], torch.Tensor]
"""Batch -> loss of each row [R]."""


# ------------------------------------------------------------------------------------------------ data


def draw_pairs(optimal_PA: np.ndarray, *, draws: int, seed: int) -> Pairs:
    """`draws` times two uniform arms for each prompt; equal arms are dropped, the others labelled by Bradley-Terry:
    P(i beats j) = pi*_i / (pi*_i + pi*_j). Several prompts are mixed. The numbers come in the order of the authors'
    notebooks, so that the pairs are theirs."""
    rng = random.Random(seed)
    rows = []
    for prompt, optimal_A in enumerate(optimal_PA):
        for _ in range(draws):
            i, j = rng.sample(range(ARMS), 1)[0], rng.sample(range(ARMS), 1)[0]
            if i != j:
                first_wins = rng.random() < optimal_A[i] / (optimal_A[i] + optimal_A[j])
                rows.append((prompt, i, j) if first_wins else (prompt, j, i))
    if len(optimal_PA) > 1:
        rng.shuffle(rows)
    prompt_N, winner_N, loser_N = torch.tensor(rows).T
    return Pairs(prompt_N=prompt_N, winner_N=winner_N, loser_N=loser_N)


# ------------------------------------------------------------------------------------------------ losses


def dpo() -> Loss:
    objective = build(ObjectiveConfig(method="dpo", beta=1.0))
    return lambda batch: _losses(objective, batch, scale_R=batch.lam_R)


def ipo() -> Loss:
    objective = build(ObjectiveConfig(method="ipo", beta=1.0))
    return lambda batch: _losses(objective, batch, scale_R=batch.lam_R) / batch.lam_R.square()


def expo() -> Loss:
    objective = build(ObjectiveConfig(method="expo", kl_weight=1.0 / ARMS))
    return lambda batch: _losses(objective, batch, scale_R=torch.ones_like(batch.lam_R))


def f_dpo() -> Loss:
    """-log sigmoid(lambda (f'(u_w) - f'(u_l))), u = pi / pi_ref, f the Jensen-Shannon generator: f'(u) =
    log(2u / (1 + u)) (Wang et al., arXiv 2309.16240)."""

    def losses(batch: Batch) -> torch.Tensor:
        rho_R2 = batch.logp_R2 - batch.ref_logp_R2
        shaped_R2 = rho_R2 - torch.nn.functional.softplus(rho_R2)  # log 2 cancels in the difference
        return -torch.nn.functional.logsigmoid(batch.lam_R * (shaped_R2[:, 0] - shaped_R2[:, 1]))

    return losses


LOSSES: dict[str, Callable[[], Loss]] = {"dpo": dpo, "ipo": ipo, "f_dpo": f_dpo, "expo": expo}


def _losses(objective: Objective, batch: Batch, *, scale_R: torch.Tensor) -> torch.Tensor:
    rows = len(batch.lam_R)
    responses = Responses(
        length_GK=torch.ones(rows, 2, dtype=torch.long),
        valid_GK=torch.ones(rows, 2, dtype=torch.bool),
        draw_G=torch.zeros(rows, dtype=torch.float64),
        logp_GK=batch.logp_R2 * scale_R[:, None],
        ref_logp_GK=batch.ref_logp_R2 * scale_R[:, None],
        token_kl_GK=(batch.lam_R * batch.kl_R)[:, None].expand(-1, 2),
        reward_GK=torch.tensor([1.0, 0.0]).expand(rows, 2),
    )
    return objective(responses)[0]


# ------------------------------------------------------------------------------------------------ training


def train(
    loss: Loss,
    pairs: Pairs,
    reference_PA: np.ndarray,
    lambdas: list[float],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
) -> np.ndarray:
    """Policies [L, P, A] after `epochs` passes of Adam through the pairs, in order, starting at the reference; one run
    for each lambda."""
    ref_logp_PA = torch.tensor(reference_PA).log()
    lam_L = torch.tensor(lambdas, dtype=torch.float64)
    theta_LPA = ref_logp_PA.repeat(len(lambdas), 1, 1).requires_grad_()
    first, second = torch.zeros_like(theta_LPA), torch.zeros_like(theta_LPA)
    step = 0
    for _ in range(epochs):
        for chosen_B in torch.arange(len(pairs.prompt_N)).split(batch_size):
            step += 1
            batch = _batch(theta_LPA.log_softmax(dim=-1), ref_logp_PA, lam_L, pairs, chosen_B)
            (grad_LPA,) = torch.autograd.grad(loss(batch).sum() / len(chosen_B), theta_LPA)
            with torch.no_grad():
                norm_L = grad_LPA.flatten(1).norm(dim=1)
                grad_LPA = grad_LPA * (CLIP_NORM / norm_L.clamp(min=CLIP_NORM))[:, None, None]
                first.lerp_(grad_LPA, 1 - BETA1)
                second.lerp_(grad_LPA.square(), 1 - BETA2)
                size = (second / (1 - BETA2**step)).sqrt_().add_(EPS)
                theta_LPA -= lr / (1 - BETA1**step) * first / size
    return theta_LPA.detach().softmax(dim=-1).numpy()


def _batch(
    logp_LPA: torch.Tensor, ref_logp_PA: torch.Tensor, lam_L: torch.Tensor, pairs: Pairs, chosen_B: torch.Tensor
) -> Batch:
    prompt_B = pairs.prompt_N[chosen_B]
    arm_B2 = torch.stack([pairs.winner_N[chosen_B], pairs.loser_N[chosen_B]], dim=1)
    num_runs, num_pairs = len(lam_L), len(chosen_B)
    kl_LP = (ref_logp_PA.exp() * (ref_logp_PA - logp_LPA)).sum(dim=-1)
    return Batch(
        logp_R2=logp_LPA[:, prompt_B[:, None], arm_B2].flatten(0, 1),
        ref_logp_R2=ref_logp_PA[prompt_B[:, None], arm_B2].repeat(num_runs, 1),
        kl_R=kl_LP[:, prompt_B].flatten(),
        lam_R=lam_L.repeat_interleave(num_pairs),
    )
