"""The learning rate by hand, and our Adam against torch's."""

from typing import Any

import pytest
import torch

from rpo_megatron.config import OptimizerConfig
from rpo_megatron.training.adam import FusedLayoutAdam
from rpo_megatron.training.optimizer import learning_rate


def test_warm_up_then_constant() -> None:
    """Catches an off-by-one: the first step must already move, the last warm-up step must reach the peak."""
    config = OptimizerConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_starts_at_the_peak_and_ends_at_min_lr() -> None:
    """Catches a cosine that never arrives, or that goes on falling after a shortened run."""
    config = OptimizerConfig(lr=1.0, schedule="cosine", warmup_steps=2, min_lr=0.2)
    rates = [learning_rate(config, step, 7) for step in range(7)]
    # 5 steps after the warm-up: cosines of 0, 1/4, 1/2, 3/4 and 1 of pi
    half = 0.4 * (1 + 2**-0.5)
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.2 + half, 0.6, 0.2 + 0.8 - half, 0.2])


def test_one_step_run_has_a_rate() -> None:
    """Catches a division by zero steps."""
    assert learning_rate(OptimizerConfig(lr=0.5, schedule="cosine"), 0, 1) == 0.5


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "adam_w_mode": False}])
def test_adam_equals_torch(options: dict[str, Any]) -> None:
    """Catches a wrong bias correction, epsilon inside the root, coupled decay, or moments shared between parameters."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(4))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    common: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6}
    decay = options.get("weight_decay", 0.0)
    torch_class = torch.optim.AdamW if options.get("adam_w_mode", True) else torch.optim.Adam
    a, b = FusedLayoutAdam(ours, **common, **options), torch_class(theirs, **common, weight_decay=decay)
    for _ in range(7):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert a.param_groups[0]["step"] == 7
    assert set(a.state[ours[0]]) == {"exp_avg", "exp_avg_sq"}


def test_unsupported_options_are_refused() -> None:
    """Catches an option of FusedAdam (say, master weights) that would be swallowed."""
    with pytest.raises(ValueError, match="capturable"):
        FusedLayoutAdam([torch.nn.Parameter(torch.zeros(1))], capturable=True)
