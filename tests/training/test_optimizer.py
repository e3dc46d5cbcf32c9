"""The learning rate by hand, and our Adam against torch's."""

import copy
from typing import Any

import pytest
import torch

from rpo_megatron.config import OptimizerConfig
from rpo_megatron.model import compat
from rpo_megatron.training import offload
from rpo_megatron.training.adam import FusedLayoutAdam
from rpo_megatron.training.offload import OffloadedAdam
from rpo_megatron.training.optimizer import choose_optimizer, describe_optimizer, learning_rate


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


def test_adam_does_not_depend_on_the_cut() -> None:
    """Catches last digits that change with the shards and buckets that parameters are cut into: the end of a tensor,
    which does not fill a vector of the CPU, rounded by other instructions than the rest."""
    torch.manual_seed(0)
    weight, grads = torch.randn(1003), torch.randn(4, 1003)

    def trained(size: int) -> list[torch.Tensor]:
        parts = [torch.nn.Parameter(part.clone()) for part in weight.split(size)]
        optimizer = FusedLayoutAdam(parts, lr=0.03, weight_decay=0.1)
        for grad in grads:
            for part, its_grad in zip(parts, grad.split(size), strict=True):
                part.grad = its_grad.clone()
            optimizer.step()
        moments = [[optimizer.state[part][name] for part in parts] for name in ("exp_avg", "exp_avg_sq")]
        return [torch.cat(list(tensors)) for tensors in (parts, *moments)]

    for size in (1, 7, 64, 100):
        assert all(map(torch.equal, trained(size), trained(1003))), size


def test_unsupported_options_are_refused() -> None:
    """Catches an option of FusedAdam (say, master weights) that would be swallowed."""
    with pytest.raises(ValueError, match="capturable"):
        FusedLayoutAdam([torch.nn.Parameter(torch.zeros(1))], capturable=True)


@pytest.mark.parametrize("piece", [64, 2**20])
def test_offloaded_adam_equals_adam(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Catches moments that are not written back after their turn on the device, or of another piece of a parameter; and
    a state that Adam on the device cannot take over, or gives back elsewhere than on the host."""
    monkeypatch.setattr(offload, "PIECE", piece)
    torch.manual_seed(0)
    start = [torch.randn(300), torch.randn(7)]
    first, second = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    options: Any = {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.1}
    a, b = OffloadedAdam(first, **options), FusedLayoutAdam(second, **options)
    for turn in range(6):
        if turn == 3:  # each goes on from what the other has saved
            a_state, b_state = copy.deepcopy(a.state_dict()), copy.deepcopy(b.state_dict())
            a, b = OffloadedAdam(first, **options), FusedLayoutAdam(second, **options)
            a.load_state_dict(b_state)
            b.load_state_dict(a_state)
        for p, q in zip(first, second, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    assert all(tensor.device.type == "cpu" for p in first for tensor in a.state[p].values())
    assert a.param_groups[0]["step"] == 6


def test_offloaded_moments_are_loaded_where_they_live() -> None:
    """Catches moments that pass through the device, all at once, on their way from a checkpoint to the host (the device
    here is one that forgets them), and those of a parameter that had none."""
    parameters = [torch.nn.Parameter(torch.zeros(5, device="meta")) for _ in range(2)]
    optimizer = OffloadedAdam(parameters, lr=0.1)
    saved = {name: torch.arange(5.0) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict({"state": {1: saved}, "param_groups": optimizer.state_dict()["param_groups"]})
    assert set(optimizer.state) == {parameters[1]}
    assert all(moment.tolist() == [0, 1, 2, 3, 4] for moment in optimizer.state[parameters[1]].values())


def test_which_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a header that names another optimizer than the run gets, and an offload that is dropped where a library
    brings an Adam of its own."""
    found: Any = type("FusedAdam", (), {"__module__": "transformer_engine.pytorch.optimizers.fused_adam"})
    plain, offloaded = OptimizerConfig(lr=1.0), OptimizerConfig(lr=1.0, offload=True)
    monkeypatch.setattr(compat, "fused_adam", lambda: None)
    assert describe_optimizer(plain) == "torch's fused Adam"
    monkeypatch.setattr(compat, "fused_adam", lambda: found)
    assert choose_optimizer(plain) is found
    assert describe_optimizer(plain) == "Transformer Engine's fused Adam"
    assert choose_optimizer(offloaded) is OffloadedAdam
    assert describe_optimizer(offloaded) == "torch's fused Adam, its moments in host memory"
