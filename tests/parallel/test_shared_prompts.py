"""A prompt computed once for its responses gives what a prompt for every response gives: losses, statistics, gradient
norm, every gradient, under every layout, for every head."""

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.parallel import launch
from tests.parallel.jobs import ONE, Layout, Outcome, outcomes

LAYOUTS = [Layout(2), Layout(2, sequence=True), Layout(1, 2), Layout(2, 2, sequence=True), Layout(1)]
OBJECTIVES = {
    "rpo_bwd": [],
    "bradley_terry": ["objective.method=bradley_terry", "objective.beta=null", "objective.eta=null"],
    "expo": ["objective.method=expo", "objective.beta=null", "objective.eta=null"],
}
REPEATED = ["data.share_prompt=false"]


def assert_same(shared: Outcome, repeated: Outcome, *, tolerance: float) -> None:
    assert shared.means.keys() == repeated.means.keys()
    for name, value in repeated.means.items():
        assert shared.means[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    assert shared.grad_norm == pytest.approx(repeated.grad_norm, rel=tolerance)
    for name, gradient in repeated.gradients.items():
        error = (shared.gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: {error:.1e}"


def write(directory: Path, **model: object) -> Path:
    tiny.write_model(directory / "model", **model)
    tiny.write_store(directory / "train", num_groups=12)
    return directory


@pytest.mark.parallel
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_layout(tmp_path: Path, objective: str) -> None:
    """Catches a mask, position, gathered hidden state or value that is right in one process only, and rows that data
    parallel ranks pack differently."""
    write(tmp_path)
    (expected,) = outcomes(str(tmp_path), [(ONE, [*OBJECTIVES[objective], *REPEATED])])
    cases = [(layout, OBJECTIVES[objective]) for layout in LAYOUTS]
    cases.append((Layout(2), [*OBJECTIVES[objective], "data.packing=false"]))
    got = launch.run(
        "tests.parallel.jobs:outcomes", processes=4, directory=tmp_path / "out", data=str(tmp_path), cases=cases
    )[0]
    for outcome in got:
        assert_same(outcome, expected, tolerance=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        {"num_key_value_heads": 4},
        {"tie_word_embeddings": True},
        {**tiny.QWEN2},
        {**tiny.QWEN3},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
    ids=["multi-head", "tied", "biases", "qk-norm", "rope"],
)
def test_families(tmp_path: Path, model: dict[str, object]) -> None:
    """Catches a family whose attention or rotary embedding takes another way than the one that was tried."""
    write(tmp_path, **model)
    shared, repeated = outcomes(str(tmp_path), [(ONE, []), (ONE, REPEATED)])
    assert_same(shared, repeated, tolerance=1e-5)


def test_bf16_within_its_own_error(tmp_path: Path) -> None:
    """Catches a half-precision sum over the responses of a prompt: against fp32, sharing may not be worse than
    repeating by more than a factor of two."""
    write(tmp_path)
    bf16 = ["precision=bf16"]
    exact, shared, repeated = outcomes(str(tmp_path), [(ONE, REPEATED), (ONE, bf16), (ONE, [*REPEATED, *bf16])])

    def error(outcome: Outcome) -> float:
        squares = [(outcome.gradients[name].float() - g).square().sum() for name, g in exact.gradients.items()]
        return float(torch.stack(squares).sum().sqrt())

    assert error(shared) < 2 * error(repeated)
