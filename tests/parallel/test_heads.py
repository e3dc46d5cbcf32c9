"""One process == N processes for the value head and the token KL, and for the checkpoints of reward models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rpo_megatron.config import ParallelConfig
from rpo_megatron.config_verbs import ImportConfig
from rpo_megatron.distributed import stop
from rpo_megatron.training import convert
from tests import tiny
from tests.model.rows import random_rows
from tests.model.test_heads import MODELS, their_batched_values, their_values
from tests.parallel import head_jobs, launch
from tests.parallel.head_jobs import Whole

ONE, TP, PP = ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(pipeline=2)
SP, PP4 = ParallelConfig(tensor=2, sequence=True), ParallelConfig(pipeline=4)
BOTH, BOTH_SP = ParallelConfig(tensor=2, pipeline=2), ParallelConfig(tensor=2, pipeline=2, sequence=True)
HARDEST = [TP, BOTH_SP, PP]
LAYOUTS = [ONE, TP, SP, PP, PP4, BOTH, BOTH_SP]
"""On four processes; what the model does not use is data parallelism."""


def on_four(job: str, directory: Path, **arguments: Any) -> Any:
    """What the first of four processes gives; models and checkpoints are in `directory`."""
    function = f"tests.parallel.head_jobs:{job}"
    return launch.run(function, processes=4, directory=directory / job, data=str(directory), **arguments)[0]


def on_one(job: Any, directory: Path, **arguments: Any) -> Any:
    result = job(str(directory), **arguments)
    stop()
    return result


def assert_same(whole: Whole, expected: Whole, *, case: str, tolerance: float = 1e-5) -> None:
    assert len(whole.numbers) == len(expected.numbers), case
    for i, (numbers, want) in enumerate(zip(whole.numbers, expected.numbers, strict=True)):
        assert numbers == pytest.approx(want, rel=tolerance, abs=tolerance), f"{case}: row {i}"
    assert whole.grad_norm == pytest.approx(expected.grad_norm, rel=tolerance), f"{case}: gradient norm"
    assert whole.gradient_spread == 0.0, f"{case}: tensor ranks differ in the value head's gradient"
    assert whole.gradients.keys() == expected.gradients.keys(), case
    errors = {n: float((whole.gradients[n] - g).norm() / g.norm()) for n, g in expected.gradients.items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < tolerance, f"{case}: gradient of {worst} is off by {errors[worst]:.1e}"


@pytest.mark.parallel
def test_value_head(tmp_path: Path) -> None:
    """Catches a backward pass through the sequence-parallel gather that is multiplied by the tensor ranks, a head that
    is counted once per rank in the gradient norm, and (qwen2 is tied) a second embedding on the last stage."""
    names = ["llama", "qwen2", "qwen3"]
    for name in names:
        tiny.write_model(tmp_path / name, **MODELS[name])
    assert_layouts(head_jobs.values, tmp_path, [(n, p) for n in names for p in (LAYOUTS if n == "llama" else HARDEST)])


@pytest.mark.parallel
def test_token_kl(tmp_path: Path) -> None:
    """Catches shards' statistics that are merged wrongly (padding makes the second of two shards nearly empty), hidden
    states of another tensor rank's rows, a gradient that is not summed over shards; the reference has other sizes."""
    tiny.write_model(tmp_path / "model")
    tiny.write_model(tmp_path / "tied", tie_word_embeddings=True)
    tiny.write_model(tmp_path / "reference", seed=1, hidden_size=24, tie_word_embeddings=True)
    cases = [*(("model", parallel) for parallel in LAYOUTS), *(("tied", parallel) for parallel in HARDEST)]
    assert_layouts(head_jobs.token_kls, tmp_path, cases)


def assert_layouts(job: Any, directory: Path, cases: list[tuple[str, ParallelConfig]]) -> None:
    """Four processes give for each (model, layout) what one process gives for the model."""
    names = list(dict.fromkeys(name for name, _ in cases))
    expected = dict(zip(names, on_one(job, directory, cases=[(name, ONE) for name in names]), strict=True))
    for (name, parallel), whole in zip(cases, on_four(job.__name__, directory, cases=cases), strict=True):
        assert_same(whole, expected[name], case=f"{name} {parallel}")


@pytest.mark.parallel
def test_equal_models_on_shards(tmp_path: Path) -> None:
    """Catches a merge over the tensor ranks whose rounding differs between the two models."""
    tiny.write_model(tmp_path / "model")
    assert on_four("equal_models", tmp_path, layouts=HARDEST) == [(0.0, 0.0)] * len(HARDEST)


# ------------------------------------------------------------------------------------------------ checkpoints


def assert_equal(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, case: str) -> None:
    assert weights.keys() == expected.keys(), case
    assert not [name for name, tensor in expected.items() if not torch.equal(weights[name], tensor)], case


def assert_close(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, case: str) -> None:
    assert weights.keys() == expected.keys(), case
    for name, tensor in expected.items():
        assert float((weights[name] - tensor).norm() / tensor.norm()) < 1e-4, f"{case}: {name}"


@pytest.mark.parallel
@pytest.mark.parametrize(("tied", "save"), [(False, BOTH_SP), (True, TP)])
def test_checkpoints_across_layouts(tmp_path: Path, tied: bool, save: ParallelConfig) -> None:
    """Catches a reward model's checkpoint that another layout cannot resume, loses the head or its moments, or exports
    something that transformers scores otherwise, or for which all data ranks gather what one of them writes; all of it
    from a language model's start."""
    tiny.write_model(tmp_path / "lm", tie_word_embeddings=tied, bos_token_id=0)
    layouts = [ONE, TP, PP, BOTH]
    saved, *resumed = on_four("save_and_load", tmp_path, save=save, layouts=layouts)
    assert not torch.equal(saved.weights["score.weight"], saved.after_step["score.weight"])
    for parallel, restored in zip(layouts, resumed, strict=True):
        assert_equal(restored.weights, saved.weights, case=f"{parallel}")
        assert_close(restored.after_step, saved.after_step, case=f"{parallel} after a step")
        for values, want in zip(restored.values, saved.values, strict=True):
            assert values == pytest.approx(want, rel=1e-4, abs=1e-5), parallel
    assert_equal(load_file(tmp_path / "exported" / "model.safetensors"), saved.weights, case="export")
    expected = [value for values in saved.values for value in values]
    assert their_values(tmp_path / "exported", random_rows(8)) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert their_batched_values(tmp_path / "exported", random_rows(8)) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parallel
def test_start_is_the_same_in_every_layout(tmp_path: Path) -> None:
    """Catches a head drawn from the rank's own random state, or from a language model's checkpoint otherwise than from
    its Hugging Face directory."""
    tiny.write_model(tmp_path / "lm", tie_word_embeddings=True)
    convert.import_(ImportConfig(load=str(tmp_path / "lm"), save=str(tmp_path / "checkpoint"), precision="fp32"))
    expected, *_ = on_one(head_jobs.starts, tmp_path, sources=["lm"], layouts=[ONE])
    layouts = [ONE, TP, PP, BOTH_SP]
    started = on_four("starts", tmp_path, sources=["lm", "checkpoint"], layouts=layouts)
    assert len(started) == 2 * len(layouts)
    for i, weights in enumerate(started):
        assert_equal(weights, expected, case=f"start {i}")


@pytest.mark.parallel
def test_export_under_the_hardest_layout(tmp_path: Path) -> None:
    """Catches an export whose pieces from four ranks are put together wrongly: imported in one process, exported over
    two tensor ranks x two stages, the files must be those of the start."""
    names = ["llama", "qwen2", "qwen3"]
    for name in names:
        tiny.write_model(tmp_path / name, **MODELS[name])
        saved = str(tmp_path / f"{name}-checkpoint")
        convert.import_(ImportConfig(load=str(tmp_path / name), save=saved, precision="fp32"))
    on_four("exports", tmp_path, checkpoints={f"{name}-checkpoint": f"{name}-exported" for name in names})
    for name in names:
        exported, start = (load_file(tmp_path / end / "model.safetensors") for end in (f"{name}-exported", name))
        assert_equal(exported, start, case=name)
        rows = random_rows(4)
        assert their_values(tmp_path / f"{name}-exported", rows) == their_values(tmp_path / name, rows)
