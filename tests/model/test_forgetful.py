"""Results that are made again for backward in place of being kept."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import Groups, start, stop
from rpo_megatron.model import build as building
from rpo_megatron.model import norms, swiglu
from rpo_megatron.model.adapter import Adapter, possible_targets
from rpo_megatron.model.forgetful import forgettable
from rpo_megatron.model.lora import attach
from rpo_megatron.model.megatron_config import Recompute
from rpo_megatron.model.scores import Scores
from rpo_megatron.model.shape import read_shape
from rpo_megatron.model.weights import load_hf
from tests import tiny
from tests.model.rows import random_rows

ROW = random_rows(4)[2].row


@pytest.fixture
def groups() -> Iterator[Groups]:
    yield start(ParallelConfig())
    stop()


def policy(directory: Path, groups: Groups, *, recompute: Recompute = "none", rank: int = 0) -> building.Model:
    shape = read_shape(directory)
    model = building.build(shape, precision="fp32", sequence_parallel=False, groups=groups, recompute=recompute)
    load_hf(model, str(directory), groups, head="lm")
    if rank:
        attach(model, Adapter(rank=rank, alpha=rank, targets=possible_targets(shape)))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return model


def gradients(model: building.Model) -> dict[str, torch.Tensor]:
    scores = model(ROW)
    assert isinstance(scores, Scores)
    assert scores.logp_N is not None
    weight_N = torch.linspace(-1.0, 2.0, len(scores.logp_N))
    (scores.logp_N * weight_N).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "nemotron", "gemma3_text", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize(("recompute", "rank"), [("none", 0), ("mlp", 0), ("full", 0), ("none", 2)])
def test_every_gradient_is_what_it_was(
    tmp_path: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch, family: str, recompute: Recompute, rank: int
) -> None:
    """Catches a result that is forgotten before all have read it (a router, experts, an adapter), one that is made
    again with other numbers, and one that is still empty when its reader's backward comes."""
    tiny.write_model(tmp_path, **tiny.FAMILIES[family])
    found = gradients(policy(tmp_path, groups, recompute=recompute, rank=rank))
    monkeypatch.setattr(building, "forget_results", lambda _: None)
    expected = gradients(policy(tmp_path, groups, recompute=recompute, rank=rank))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(gradient) for name, gradient in expected.items())


def test_backward_frees_what_it_has_used(tmp_path: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches hooks that hold on to results, and to what these are made of, as long as the graph lives: backward would
    need more memory the further it comes."""
    seen: list[weakref.ref[torch.Tensor]] = []

    def watched(result: torch.Tensor, make_again: Callable[[], torch.Tensor]) -> torch.Tensor:
        seen.append(weakref.ref(result))
        return forgettable(result, make_again)

    for module in (norms, swiglu):
        monkeypatch.setattr(module, "forgettable", watched)
    tiny.write_model(tmp_path)
    model = policy(tmp_path, groups)
    logp_N = model(ROW).logp_N
    empty = [ref() is not None and ref().untyped_storage().nbytes() == 0 for ref in seen]  # type: ignore[union-attr]
    layers = len(model.decoder.layers)
    assert sum(empty) == 3 * layers  # before attention, before the feed-forward, and its gate; not the last norm
    logp_N.sum().backward()
    gc.collect()
    assert [ref() for ref in seen] == [None] * len(seen)
    assert logp_N.grad_fn is not None  # the graph, and with it every hook, is still there
