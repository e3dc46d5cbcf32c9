"""What only a GPU can show of bf16 and FP8 through Transformer Engine: how far log-probabilities, gradients and a
training run move from plain bf16. NOT YET RUN: written where there was no GPU."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rpo_megatron.config import Fp8Config, KernelsConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from rpo_megatron.data.rows import build_row
from rpo_megatron.data.store import Group
from rpo_megatron.distributed import Groups, start, stop
from rpo_megatron.errors import UserError
from rpo_megatron.model.build import ScoringModel, build, wrap
from rpo_megatron.model.precision import RECIPES, check_hardware, frozen, row_alignment
from rpo_megatron.model.shape import read_shape
from rpo_megatron.model.source import find
from rpo_megatron.objectives import objective
from rpo_megatron.training import checkpoint
from rpo_megatron.training.checkpoint import load_weights
from rpo_megatron.training.forward import Batch, run_logps, run_objective, to_device, with_reference_logps
from rpo_megatron.training.optimizer import build_optimizer
from tests import tiny
from tests.checkpoints import run_state, save

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TE = KernelsConfig(layers="transformer_engine")
MODEL = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


@functools.cache
def here() -> Groups:
    """The one process of a test; starting again would take the groups from under its models."""
    return start(ParallelConfig())


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    here()
    yield
    here.cache_clear()
    stop()


def supported(recipe: str) -> Fp8Config:
    """Skips, with the reason, what this machine cannot do."""
    fp8 = Fp8Config(recipe=recipe)  # type: ignore[arg-type]
    try:
        check_hardware(fp8)
    except UserError as error:
        pytest.skip(str(error))
    return fp8


def model_of(
    directory: Path, *, fp8: Fp8Config | None = None, kernels: KernelsConfig | None = None, fp8_weights: bool = False
) -> ScoringModel:
    if not (directory / "config.json").exists():
        tiny.write_model(directory, **MODEL)
    groups = here()
    shape = read_shape(directory)
    model = build(
        shape,
        precision="bf16",
        sequence_parallel=False,
        groups=groups,
        fp8=fp8,
        kernels=kernels,
        fp8_weights=fp8_weights,
    )
    load_weights(model, find(directory), groups)
    return model


def batches(multiple: int) -> list[Batch]:
    """Eight groups of four responses, two to a row."""
    rng, device = np.random.default_rng(0), here().device
    groups = [
        Group(
            prompt=rng.integers(3, 2000, 128),
            responses=[rng.integers(3, 2000, length) for length in rng.integers(32, 128, 4)],
            reward=rng.random(4).astype(np.float32),
            ref_logp=None,
        )
        for _ in range(8)
    ]
    options: Any = {"ids": np.arange(2), "draws": np.zeros(2), "multiple": multiple, "share_prompt": True}
    return [to_device(build_row(groups[i : i + 2], **options), device) for i in range(0, 8, 2)]


def per_token(model: ScoringModel, rows: list[Batch]) -> torch.Tensor:
    """Mean log-probability per token of every response."""
    logps = run_logps(model, rows)
    return torch.cat([(logp / row.length_GK)[row.valid_GK] for logp, row in zip(logps, rows, strict=True)])


def gradient(model: ScoringModel, rows: list[Batch]) -> torch.Tensor:
    wrapped = wrap(model)
    wrapped.zero_grad_buffer()
    run_objective(wrapped, rows, objective.build(ObjectiveConfig(method="sft", responses="all")), train=True)
    return torch.cat([parameter.main_grad.flatten() for parameter in model.parameters()])


def test_transformer_engine_in_bf16_is_bf16(tmp_path: Path) -> None:
    """Catches a fused norm or linear layer that computes something else: log-probabilities and the whole gradient
    within bf16's own error of megatron's layers."""
    supported("tensorwise")
    rows = batches(16)
    own, te = model_of(tmp_path), model_of(tmp_path, kernels=TE)
    torch.testing.assert_close(per_token(te, rows), per_token(own, rows), rtol=0, atol=0.02)
    one, other = gradient(own, rows), gradient(te, rows)
    assert torch.cosine_similarity(one, other, dim=0) > 0.999


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_is_near_bf16(tmp_path: Path, recipe: str) -> None:
    """Catches wrong scales, padding that takes part in them, weights that are quantised twice: log-probabilities per
    token and the direction of the gradient, beside bf16."""
    fp8 = supported(recipe)
    rows = batches(row_alignment(fp8))
    plain, quantised = model_of(tmp_path), model_of(tmp_path, fp8=fp8)
    difference = (per_token(quantised, rows) - per_token(plain, rows)).abs()
    print(f"{recipe}: log-prob per token off by {float(difference.mean()):.4f} (largest {float(difference.max()):.4f})")
    assert difference.mean() < 0.05
    similarity = torch.cosine_similarity(gradient(plain, rows), gradient(quantised, rows), dim=0)
    print(f"{recipe}: cosine of the gradients {float(similarity):.4f}")
    assert similarity > 0.97


@pytest.mark.parametrize("recipe", RECIPES)
def test_policy_starts_at_its_reference(tmp_path: Path, recipe: str) -> None:
    """Catches a reference in FP8 weights that is another model than the policy in FP8 arithmetic: log-ratios at the
    start within the precision's own error, and half the memory."""
    fp8 = supported(recipe)
    rows = batches(row_alignment(fp8))
    before = torch.cuda.memory_allocated()
    policy = model_of(tmp_path, fp8=fp8)
    between = torch.cuda.memory_allocated()
    reference = model_of(tmp_path, fp8=frozen(fp8), fp8_weights=True)
    layers = sum(p.numel() for name, p in policy.named_parameters() if name.startswith("decoder") and p.dim() == 2)
    saved = (between - before) - (torch.cuda.memory_allocated() - between)
    print(f"{recipe}: FP8 weights save {saved / layers:.2f} bytes per parameter of the layers")
    difference = (per_token(reference, rows) - per_token(policy, rows)).abs()
    print(f"{recipe}: log-ratio per token at the start {float(difference.mean()):.5f}")
    assert difference.mean() < 0.02


@pytest.mark.parametrize("recipe", RECIPES)
def test_checkpoints_keep_the_scales(tmp_path: Path, recipe: str) -> None:
    """Catches scales of delayed scaling that are lost or refused, extra states that one kind of layers has and another
    has not, and FP8 weights that a checkpoint of ours does not fill: log-probabilities after a few steps, of the policy
    read back, of bf16 layers, and of a frozen model with FP8 weights beside one read from memory."""
    fp8 = supported(recipe)
    rows = batches(row_alignment(fp8))
    model = wrap(model_of(tmp_path / "model", fp8=fp8))
    loss = objective.build(ObjectiveConfig(method="sft", responses="all"))
    optimizer = build_optimizer(OptimizerConfig(lr=1e-4), model, "bf16")
    for _ in range(3):
        model.zero_grad_buffer()
        run_objective(model, rows, loss, train=True)
        optimizer.step()
    policy, groups = model.module, here()
    saved = tmp_path / "saved"
    save(policy, optimizer, directory=saved, companions=tmp_path / "model", groups=groups, precision="bf16")
    again = wrap(model_of(tmp_path / "model", fp8=fp8))
    checkpoint.load(
        again.module,
        build_optimizer(OptimizerConfig(lr=1e-4), again, "bf16"),
        directory=saved,
        expected=run_state("bf16"),
        groups=groups,
    )
    torch.testing.assert_close(per_token(again.module, rows), per_token(policy, rows), rtol=0, atol=1e-3)
    plain, frozen_in_fp8 = model_of(tmp_path / "model"), model_of(tmp_path / "model", fp8=frozen(fp8), fp8_weights=True)
    for other in (plain, frozen_in_fp8):
        load_weights(other, find(saved), groups)
        assert (per_token(other, rows) - per_token(policy, rows)).abs().mean() < 0.05


@pytest.mark.parametrize("recipe", ["none", *RECIPES])
def test_training_follows_bf16(tmp_path: Path, recipe: str) -> None:
    """Catches an update that FP8 makes useless, or gradients that never reach the weights: 100 steps of RPO, from the
    same start on the same data, with a frozen reference; the loss falls as it does in bf16."""
    fp8 = supported(recipe) if recipe != "none" else None
    curves = [train(tmp_path, None), train(tmp_path, fp8)]
    for name, curve in zip(("bf16", recipe), curves, strict=True):
        print(name, " ".join(f"{loss:.4f}" for loss in curve[::10]))
    assert curves[1][-1] < 0.5 * curves[1][0]
    assert abs(curves[1][-1] - curves[0][-1]) < 0.1 * curves[0][0]


def train(directory: Path, fp8: Fp8Config | None) -> list[float]:
    rows = batches(row_alignment(fp8 or Fp8Config()))
    policy, reference = model_of(directory, fp8=fp8), model_of(directory, fp8=frozen(fp8 or Fp8Config()))
    rows = with_reference_logps(reference, rows)
    model = wrap(policy)
    optimizer = build_optimizer(OptimizerConfig(lr=1e-4), model, "bf16")
    loss = objective.build(ObjectiveConfig(method="rpo_bwd", beta=0.05, eta=1.0))
    curve = []
    for _ in range(100):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        total, count = run_objective(model, rows, loss, train=True)["loss"]
        optimizer.step()
        curve.append(float(total) / float(count))
    return curve
