"""parallel.overlap changes when data-parallel communication happens, and no bit of the result."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rpo_megatron.config import RunConfig
from tests import tiny
from tests.parallel import launch
from tests.parallel.jobs import ONE, Layout
from tests.parallel.overlap_jobs import Trained

SP, PP, PP_V = Layout(tensor=2, sequence=True), Layout(pipeline=2), Layout(pipeline=2, virtual=2)
STEPS = [
    "train.steps=4",
    "data.tokens_per_microbatch=48",
    "evaluation.every=2",
    "checkpoint.every=3",
    "checkpoint.keep=9",
]
NO_CLIPPING = "optimizer.clip_norm=1e9"  # a norm is added up by shards, and those are cut by buckets
SMALL_BUCKETS = "parallel.bucket_size=3000"
MODELS: dict[str, dict[str, Any]] = {"untied": {}, "tied": {"tie_word_embeddings": True}}
HEADS = {
    "log-probs": [],
    "value": ["objective.method=bradley_terry", "objective.beta=null", "objective.eta=null"],
    "distributions": ["objective.method=expo", "objective.beta=null", "objective.eta=null", "objective.kl_weight=2"],
}


def run_pairs(tmp_path: Path, model: str, cases: list[tuple[Layout, list[str]]], processes: int) -> list[Any]:
    """[without, with overlap] of each case, as rank 0 saw it. Five groups per step leave a data-parallel rank less than
    the others have."""
    tiny.write_model(tmp_path / "model", **MODELS[model])
    tiny.write_model(tmp_path / "reference", seed=1, **MODELS[model])
    tiny.write_store(tmp_path / "valid", num_groups=5, seed=7)
    configs: list[RunConfig] = []
    for i, (layout, words) in enumerate(cases):
        common = [*layout.overrides(), *words, *STEPS, f"data.valid={tmp_path / 'valid'}", "train.groups_per_step=5"]
        for overlap in ("false", "true"):
            name = f"run_dir={tmp_path / f'{i}-{overlap}'}"
            own = [SMALL_BUCKETS] if overlap == "true" else []
            configs.append(tiny.run_config(tmp_path, *common, name, f"parallel.overlap={overlap}", *own))
    job = "tests.parallel.overlap_jobs:trained"
    results = launch.run(job, processes=processes, directory=tmp_path / "out", configs=configs)[0]
    return [(results[i], results[i + 1]) for i in range(0, len(results), 2)]


def assert_equal(without: Trained, overlapped: Trained, *, case: str) -> None:
    assert len(without.losses) == 4 + 3, case
    assert overlapped.losses == without.losses, case
    assert overlapped.weights.keys() == without.weights.keys(), case
    for name, weight in without.weights.items():
        assert torch.equal(overlapped.weights[name], weight), f"{case}: {name}"
        assert torch.equal(overlapped.saved[name], without.saved[name]), f"{case}: {name} in a checkpoint"
        assert not torch.equal(without.saved[name], weight), f"{case}: {name} was not trained"
    assert without.num_buckets <= 3 < overlapped.num_buckets, case  # one, for a tied weight, for each chunk


@pytest.mark.parallel
@pytest.mark.parametrize("model", MODELS)
def test_overlap_changes_nothing(tmp_path: Path, model: str) -> None:
    """Catches a bucket that is reduced before its last micro-batch, or whose hook never runs because the head adds to
    the gradient by itself; a tied weight that gets one of its two gradients; weights of the step before in the forward,
    in an evaluation or in a checkpoint."""
    reference = f"reference.path={tmp_path / 'reference'}"
    cases = [(layout, [reference, NO_CLIPPING]) for layout in (SP, PP, PP_V)]
    for (layout, _), pair in zip(cases, run_pairs(tmp_path, model, cases, 4), strict=True):
        assert_equal(*pair, case=f"{model} {layout}")


@pytest.mark.parallel
def test_overlap_with_every_head(tmp_path: Path) -> None:
    """Catches a head whose weight megatron does not know to wait for, or whose gradient it never hears of."""
    cases = [(ONE, [*words, NO_CLIPPING]) for words in HEADS.values()]
    for head, pair in zip(HEADS, run_pairs(tmp_path, "untied", cases, 2), strict=True):
        assert_equal(*pair, case=head)
