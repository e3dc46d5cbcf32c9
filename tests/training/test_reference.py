"""A resident reference: frozen weights and nothing else, on the device or swapped to the host."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rpo_megatron.distributed import start, stop
from rpo_megatron.training import train as training
from rpo_megatron.training.evaluate import make_loader
from rpo_megatron.training.forward import to_device
from rpo_megatron.training.reference import build_reference, load_reference, offloaded
from rpo_megatron.training.resolve import resolve
from rpo_megatron.training.signals import StopSignals
from tests import tiny
from tests.training.conftest import Rpo, losses

OFFLOAD = "reference.offload=true"
EXPO = ["objective.method=expo", "objective.beta=null", "objective.eta=null", "objective.kl_weight=2"]


@pytest.mark.parametrize("method", [[], EXPO], ids=["log-probs", "distributions"])
def test_offloading_changes_no_number(tmp_path: Path, rpo: Rpo, method: list[str]) -> None:
    """Catches a copy that is not the original, is made of other weights than the pass reads, or is dropped while the
    policy still compares itself with it."""
    tiny.write_model(tmp_path / "other", seed=1)
    words = [*method, f"reference.path={tmp_path / 'other'}"]
    here = rpo("train", *words, f"run_dir={tmp_path / 'here'}")
    there = rpo("train", *words, OFFLOAD, f"run_dir={tmp_path / 'there'}")
    assert losses(here) == losses(there)
    assert len(losses(here)) == 3
    assert "in host memory between its passes" in there
    assert "host memory" not in here


def test_offloaded_log_probabilities_are_bit_identical(tmp_path: Path) -> None:
    """Catches what four digits of a log line do not show."""
    results = []
    for words in ([], [OFFLOAD]):
        config = tiny.run_config(tmp_path, *words)
        groups = start(config.parallel)
        plan = resolve(config)
        fill = build_reference(plan, groups)
        rows = make_loader(plan, plan.train_store, groups).step(0).rows
        batches = [to_device(row, groups.device, cp=groups.cp) for row in rows]
        results.append([batch.ref_logp_GK for _ in range(2) for batch in fill(batches)])
        stop()
    here, there = results
    assert len(here) >= 4
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_weights_are_on_the_device_during_the_pass_only(tmp_path: Path) -> None:
    """Catches a copy that stays on the device: on a CPU the two are told apart by where their numbers lie."""
    weight = torch.nn.Parameter(torch.arange(3.0))
    seen: list[int] = []

    def fill(batches: list[Any]) -> list[Any]:
        assert weight.tolist() == [0.0, 1.0, 2.0]
        seen.append(weight.data_ptr())
        return batches

    run = offloaded(fill, [weight], torch.device("cpu"))
    resting = weight.data_ptr()
    run([])
    run([])
    assert weight.data_ptr() == resting
    assert resting not in seen


@pytest.mark.parametrize("words", [[], [OFFLOAD]], ids=["resident", "offloaded"])
def test_reference_has_no_gradients_and_no_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """Catches a frozen model that costs as much as a trained one: gradient buffers, fp32 masters, moments, DDP."""
    loaded: list[Any] = []

    def remember(*args: Any) -> Any:
        loaded.append(load_reference(*args))
        return loaded[-1]

    monkeypatch.setattr("rpo_megatron.training.reference.load_reference", remember)
    config = tiny.run_config(tmp_path, *words)
    run = training.build_run(resolve(config), start(config.parallel))
    assert training.train_loop(run, StopSignals())
    (reference,) = loaded
    weights = list(reference.parameters())
    assert len(weights) == len(list(run.model.module.parameters()))
    assert not any(hasattr(weight, "main_grad") or weight.grad is not None for weight in weights)
    trained = {id(weight) for weight in run.model.params_with_grad}
    optimized = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not {id(weight) for weight in weights} & (trained | optimized)
    elements = sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])
    assert elements == sum(weight.numel() for weight in run.model.module.parameters())
    stop()
