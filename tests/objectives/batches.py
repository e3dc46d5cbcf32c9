"""What the tests of objectives share: objectives by name, random batches with every column, gradients, minimisers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from rpo_megatron.config import ObjectiveConfig
from rpo_megatron.objectives.methods import METHODS
from rpo_megatron.objectives.objective import Objective, build

Batch = Any
"""Responses whose columns are known to be there: as Responses, each use of one would need an assert."""
Make = Callable[..., Batch]

GRADIENT_COLUMNS = ("logp_GK", "value_GK", "token_kl_GK")
"""Columns that carry a gradient."""


def fp64(values: Any) -> torch.Tensor:
    """Lists to a tensor without a detour through fp32."""
    return torch.tensor(values, dtype=torch.float64)


def objective(method: str, **knobs: Any) -> Objective:
    return build(ObjectiveConfig(method=method, **knobs))


def score_column(method: str) -> str:
    """The column that a method trains."""
    return "value_GK" if METHODS[method].kind == "reward model" else "logp_GK"


def random_batch(make: Make, seed: int, num_groups: int, k: int, *, ragged: bool = True) -> Batch:
    """Every column filled; the numbers are of the size of short texts. Rewards are small integers, so that ties
    occur; the ensemble's are not. Where an entry is invalid it holds junk, save for its length 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = (num_groups, k)
    length = torch.randint(1, 30, shape, generator=generator)
    logp = -length * (0.3 + 2 * torch.rand(shape, generator=generator, dtype=torch.float64))
    reward = torch.randint(0, 4, shape, generator=generator)
    valid = torch.rand(shape, generator=generator) < (0.7 if ragged else 1.1)
    return make(
        logp,
        value=normal(*shape),
        ref=logp + 3 * normal(*shape),
        token_kl=normal(*shape).square(),
        reward=reward,
        rewards=normal(num_groups, k, 3),
        source=torch.rand(shape, generator=generator) < 0.4,
        valid=valid,
        length=length * valid,
        draw=torch.rand(num_groups, generator=generator),
        progress=0.5,
    )


def take(batch: Batch, groups: Any, columns: Any = slice(None)) -> Batch:
    """Some groups and some of their columns, in this order: index lists, masks or slices."""

    def part(value: torch.Tensor) -> torch.Tensor:
        return value[groups] if value.ndim == 1 else value[groups][:, columns]

    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(batch, **{name: part(value) for name, value in tensors.items()})


def with_columns(batch: Batch, **columns: Any) -> Batch:
    return dataclasses.replace(batch, **columns)


def losses_of(method: Objective, batch: Batch) -> torch.Tensor:
    return method(batch)[0].detach()


def gradient(method: Objective, batch: Batch, column: str = "logp_GK") -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [G] and the gradient of their sum with respect to a column [G, K], 0 if they do not depend on it."""
    value = getattr(batch, column).clone().requires_grad_()
    losses_G = method(dataclasses.replace(batch, **{column: value}))[0]
    if not losses_G.requires_grad:
        return losses_G, torch.zeros_like(value)
    slope = torch.autograd.grad(losses_G.sum(), value, allow_unused=True, materialize_grads=True)[0]
    return losses_G.detach(), slope


def assert_same(ours: Objective, theirs: Objective, batch: Batch, other: Batch | None = None) -> None:
    """Two objectives have the same losses and gradients on a batch (or the second one on another batch)."""
    expected = gradient(theirs, batch if other is None else other)
    for found, value in zip(gradient(ours, batch), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-11)


def minimise(loss: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    """L-BFGS to (local) convergence from `start`. Returns the minimising point."""
    point = start.clone().double().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(point)
        value.backward()
        return value

    optimizer.step(closure)
    return point.detach()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Population:
    """A bandit (one-token responses) with one group for every draw that can occur, and how likely that draw is."""

    arms_GK: torch.Tensor
    """int64. The arms of each group, in its order of responses."""
    weight_G: torch.Tensor
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of `make` that do not depend on the policy, [G, K]."""

    def batch(self, make: Make, logits_A: torch.Tensor, *, ref_A: torch.Tensor, reward_A: Any = None) -> Batch:
        logp_A = logits_A.log_softmax(dim=0)
        kl = (ref_A * (ref_A.log() - logp_A)).sum()
        columns = {} if reward_A is None else {"reward": torch.as_tensor(reward_A).double()[self.arms_GK]}
        return make(
            logp_A[self.arms_GK],
            ref=ref_A.log()[self.arms_GK],
            token_kl=kl.expand(self.arms_GK.shape),
            length=torch.ones_like(self.arms_GK),
            **columns,
            **self.columns,
        )

    def minimiser(self, make: Make, method: Objective, **columns: Any) -> torch.Tensor:
        """The policy [A] at which the expected loss is least."""

        def loss(logits_A: torch.Tensor) -> torch.Tensor:
            return (method(self.batch(make, logits_A, **columns))[0] * self.weight_G).sum()

        return minimise(loss, torch.zeros_like(columns["ref_A"])).softmax(dim=0)


def labelled_pairs(target_A: torch.Tensor) -> Population:
    """Two different arms, uniformly; the first is preferred (reward 1 against 0) with probability t_1 / (t_1 + t_2)."""
    num = len(target_A)
    arms_GK = torch.tensor([[i, j] for i in range(num) for j in range(num) if i != j])
    t_GK = target_A[arms_GK]
    weight_G = t_GK[:, 0] / t_GK.sum(dim=1) / (num * (num - 1) / 2)
    return Population(arms_GK=arms_GK, weight_G=weight_G, columns={"reward": [[1.0, 0.0]] * len(arms_GK)})


def every_arm(num: int) -> Population:
    """One group that holds every arm once."""
    return Population(arms_GK=torch.arange(num)[None], weight_G=torch.ones(1, dtype=torch.float64))
