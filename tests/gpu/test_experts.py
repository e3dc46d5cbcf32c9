"""What only a GPU can show of experts: Transformer Engine's grouped products against megatron's loop over the experts,
and in FP8, where every expert's tokens are padded. NOT YET RUN: written where there was no GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rpo_megatron.config import ObjectiveConfig
from rpo_megatron.model.build import ScoringModel, wrap
from rpo_megatron.model.precision import RECIPES, row_alignment
from rpo_megatron.model.weights import global_parameters
from rpo_megatron.objectives import objective
from rpo_megatron.training.forward import Batch, run_objective
from tests import tiny
from tests.gpu import test_precision as precision

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
MODEL: dict[str, Any] = {
    **precision.MODEL,
    "model_type": "qwen2_moe",
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
}


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    precision.here()
    yield
    precision.here.cache_clear()
    precision.stop()


def gradients(model: ScoringModel, rows: list[Batch]) -> dict[str, torch.Tensor]:
    wrapped = wrap(model)
    wrapped.zero_grad_buffer()
    run_objective(wrapped, rows, objective.build(ObjectiveConfig(method="sft", responses="all")), train=True)
    return {name: parameter.main_grad for name, parameter in global_parameters(model).items()}


def similarity(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Cosine of the whole gradients."""
    assert one.keys() == other.keys()
    pair = (torch.cat([grads[name].flatten() for name in one]) for grads in (one, other))
    return float(torch.cosine_similarity(*pair, dim=0))


def test_grouped_experts_are_the_loop(tmp_path: Path) -> None:
    """Catches an expert that gets another's tokens or weights, a gate that is not applied, experts without tokens:
    log-probabilities and the whole gradient beside megatron's layers, by the names of weights in files. A token whose
    choice is a close one may go elsewhere."""
    precision.supported("tensorwise")
    tiny.write_model(tmp_path, **MODEL)
    rows = precision.batches(16)
    loop, grouped = precision.model_of(tmp_path), precision.model_of(tmp_path, kernels=precision.TE)
    assert len(list(loop.parameters())) == len(list(grouped.parameters()))
    difference = (precision.per_token(grouped, rows) - precision.per_token(loop, rows)).abs()
    print(f"log-prob per token off by {float(difference.mean()):.4f} (largest {float(difference.max()):.4f})")
    assert difference.mean() < 0.02
    cosine = similarity(gradients(loop, rows), gradients(grouped, rows))
    print(f"cosine of the gradients {cosine:.5f}")
    assert cosine > 0.99


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_in_fp8(tmp_path: Path, recipe: str) -> None:
    """Catches experts whose number of tokens FP8 refuses, or padding that takes part in a result. Choices of experts
    differ more than in bf16, because what the router reads has been through FP8."""
    fp8 = precision.supported(recipe)
    tiny.write_model(tmp_path, **MODEL)
    rows = precision.batches(row_alignment(fp8))
    plain, quantised = precision.model_of(tmp_path), precision.model_of(tmp_path, fp8=fp8)
    difference = (precision.per_token(quantised, rows) - precision.per_token(plain, rows)).abs()
    cosine = similarity(gradients(plain, rows), gradients(quantised, rows))
    print(f"{recipe}: log-prob per token off by {float(difference.mean()):.4f}, cosine of the gradients {cosine:.4f}")
    assert difference.mean() < 0.1
    assert cosine > 0.9


@pytest.mark.parametrize("recipe", RECIPES)
def test_checkpoints_keep_the_scales_of_experts(tmp_path: Path, recipe: str) -> None:
    """Catches scales of grouped experts, which a checkpoint numbers one by one and a module has in one state."""
    tiny.write_model(tmp_path / "model", **MODEL)
    precision.test_checkpoints_keep_the_scales(tmp_path, recipe)
