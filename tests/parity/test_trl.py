"""Our losses against TRL's own code: the same log-probabilities, reference log-probabilities and rewards in, the same
loss and the same gradient with respect to every token's log-probability out. What is compared with what, and how their
normalisations differ, is the table in cases.py. Needs TRL: `make test-parity`.
"""

from typing import Any

import pytest
import torch

from rpo_megatron.config import ObjectiveConfig
from rpo_megatron.objectives import objective
from rpo_megatron.objectives.methods import METHODS
from rpo_megatron.objectives.responses import Responses
from tests.parity import groups as data

pytest.importorskip("trl", reason="TRL is not installed: make test-parity installs it")
from tests.parity import trl_losses as trl
from tests.parity.cases import CASES, FP64, NO_COUNTERPART

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient(name: str, seed: int) -> None:
    """A wrong sign, scale, normalisation, choice of tokens or pairing in any of these losses."""
    case = CASES[name]
    groups = case.data(seed=seed)
    ours, theirs = our_loss(case.ours, groups.responses()), case.theirs(groups)
    assert_equal(ours, theirs, tolerance=case.tolerance)
    assert_equal(gradient(ours, groups.policy_V), gradient(theirs, groups.policy_V), tolerance=case.tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_rloo_gradient(seed: int) -> None:
    """rloo's factor, or its baseline or KL penalty, is not that of the RLOO update."""
    groups = data.make(seed=seed, num_groups=3, num_responses=4)
    rows = groups.rows([(g, k) for g in range(3) for k in range(4)])
    theirs = trl.rloo(rows, reward_R=groups.reward_GK.flatten(), beta=0.3, num_generations=4)
    ours = our_loss({"method": "rloo", "beta": 0.3}, groups.responses())
    assert_equal(gradient(ours, groups.policy_V), gradient(theirs, groups.policy_V), tolerance=FP64)


@pytest.mark.parametrize("num_responses", [2, 4])
def test_reward_model(num_responses: int) -> None:
    """A Bradley-Terry reward model that orders a pair the wrong way round, counts a tie, or weighs pairs unequally."""
    groups = data.make(seed=0, num_groups=4, num_responses=num_responses)
    value_GK = groups.reward_GK.flip(1).clone().requires_grad_()
    if num_responses > 2:
        groups.reward_GK[0, :2] = groups.reward_GK[0].max() + 1.0
    batch = Responses(
        value_GK=value_GK,
        length_GK=groups.mask_GKT.sum(dim=2),
        reward_GK=groups.reward_GK,
        valid_GK=torch.ones_like(groups.reward_GK, dtype=torch.bool),
        draw_G=torch.zeros(4),
    )

    def of_group(group: int) -> torch.Tensor:
        pairs = groups.every_pair(group)
        better = [value_GK[g, i] for g, i, _ in pairs]
        return trl.reward_model(torch.stack(better + [value_GK[g, j] for g, _, j in pairs]))

    ours, theirs = our_loss({"method": "bradley_terry"}, batch), torch.stack([of_group(g) for g in range(4)]).mean()
    assert_equal(ours, theirs, tolerance=FP64)
    assert_equal(gradient(ours, value_GK), gradient(theirs, value_GK), tolerance=FP64)


def test_every_method_has_its_place() -> None:
    """A new method that nobody looked for in TRL."""
    compared = {case.ours["method"] for case in CASES.values()} | {"rloo", "bradley_terry"}
    assert compared | NO_COUNTERPART == set(METHODS)
    assert not compared & NO_COUNTERPART


def our_loss(knobs: dict[str, Any], responses: Responses) -> torch.Tensor:
    losses_G, _ = objective.build(ObjectiveConfig(**knobs))(responses)
    return losses_G.mean()


def gradient(loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, leaf)[0]


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor, *, tolerance: float) -> None:
    """Relative to the largest entry; all zero would be equal to anything and is refused."""
    scale = float(theirs.detach().abs().max())
    assert scale > 1e-6
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance * scale)
