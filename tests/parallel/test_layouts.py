"""One process == N processes: log-probs, losses, statistics, gradient norm and every gradient, in fp32."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rpo_megatron.distributed import stop
from tests import tiny
from tests.model.whole import relative_errors
from tests.parallel import jobs, launch
from tests.parallel.jobs import ONE, Layout, Outcome

TP, SP, PP = Layout(tensor=2), Layout(tensor=2, sequence=True), Layout(pipeline=2)
BOTH, BOTH_SP = Layout(tensor=2, pipeline=2), Layout(tensor=2, pipeline=2, sequence=True)
CP, CP_SP, CP_PP = Layout(context=2), Layout(tensor=2, context=2, sequence=True), Layout(pipeline=2, context=2)
PP_V, BOTH_SP_V = Layout(pipeline=2, virtual=2), Layout(tensor=2, pipeline=2, virtual=2, sequence=True)
LAYOUTS = [ONE, TP, SP, PP, Layout(pipeline=4), BOTH, BOTH_SP, CP, CP_SP, CP_PP, Layout(context=4), PP_V, BOTH_SP_V]
"""On four processes; what the model does not use is data parallelism: ONE is 4 replicas, TP is 2 x 2, ..."""

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen2": tiny.QWEN2,
    "qwen3": tiny.QWEN3,
}
REFERENCE = "reference.path={directory}/reference"
HEADS = {
    "bradley_terry": ["objective.method=bradley_terry", "objective.beta=null", "objective.eta=null"],
    "reward_regression": ["objective.method=reward_regression", "objective.beta=null"],
    "token kl": [
        "objective.method=expo",
        "objective.beta=null",
        "objective.eta=null",
        "objective.kl_weight=2",
        REFERENCE,
    ],
}
"""Objectives that read something else than log-probabilities from the last stage."""


def assert_same(outcome: Outcome, expected: Outcome, *, case: str, tolerance: float = 1e-5) -> None:
    for name, value in expected.means.items():
        assert outcome.means[name] == pytest.approx(value, rel=tolerance, abs=tolerance), f"{case}: {name}"
    assert outcome.grad_norm == pytest.approx(expected.grad_norm, rel=tolerance), f"{case}: gradient norm"
    assert outcome.logps.keys() == expected.logps.keys(), case
    for group, values in expected.logps.items():
        assert outcome.logps[group] == pytest.approx(values, rel=tolerance, abs=0.1 * tolerance), (
            f"{case}: group {group}"
        )
    assert outcome.gradients.keys() == expected.gradients.keys(), case
    errors = relative_errors(outcome.gradients, expected.gradients)
    worst = max(errors, key=errors.__getitem__)
    print(f"{case}: largest relative error of a gradient {errors[worst]:.1e} ({worst})")
    wrong = {name: error for name, error in errors.items() if not error < tolerance}  # NaN too
    assert not wrong, f"{case}: gradients are off by {wrong}"


def directory_with(tmp_path: Path, name: str) -> Path:
    """A policy and a reference with other weights, so that log-ratios, losses and gradients are not degenerate."""
    directory = tmp_path / name
    tiny.write_model(directory / "model", **MODELS[name])
    tiny.write_model(directory / "reference", seed=1, **MODELS[name])
    tiny.write_store(directory / "train", num_groups=12)
    return directory


def expected_outcome(directory: Path, *overrides: str) -> Outcome:
    outcome = jobs.outcomes(str(directory), [(ONE, list(overrides))])[0]
    stop()
    return outcome


def on_four(tmp_path: Path, directory: Path, cases: list[tuple[Layout, list[str]]], **options: Any) -> list[Outcome]:
    job = "tests.parallel.jobs:outcomes"
    return launch.run(job, processes=4, directory=tmp_path / "out", data=str(directory), cases=cases, **options)[0]


@pytest.mark.parallel
def test_every_layout_equals_one_process(tmp_path: Path) -> None:
    """Catches a missing or doubled collective anywhere, a gradient divided by the wrong count, a dropped or doubled
    group, an attention that sees its neighbours in the row: each shows in a log-prob or a gradient."""
    directory = directory_with(tmp_path, "llama")
    reference = REFERENCE.format(directory=directory)
    expected = expected_outcome(directory, reference)
    assert expected.means["loss"] > 0.1
    cases = [(layout, [reference, f"data.packing={packing}"]) for layout in LAYOUTS for packing in ("true", "false")]
    outcomes = on_four(tmp_path, directory, cases)
    for (layout, overrides), outcome in zip(cases, outcomes, strict=True):
        assert_same(outcome, expected, case=f"{layout} {overrides[-1]}")
    for virtual in (1, 2):
        same = [layout.pipeline > 1 and layout.virtual == virtual for layout, _ in cases]
        assert_planned([outcome for outcome, kind in zip(outcomes, same, strict=True) if kind], virtual=virtual)


def assert_planned(pipelines: list[Outcome], *, virtual: int) -> None:
    """Stages tell each other no shapes, which would be integers and make the host wait: the first one sends each row's
    activations twice (log-probs, training) and receives its gradient. Rows differ in length in some cases. With several
    chunks, only shapes would go this way."""
    assert any(len(set(outcome.row_lengths)) > 1 for outcome in pipelines)
    for outcome in pipelines:
        assert outcome.messages == ({torch.float32: 3 * len(outcome.row_lengths)} if virtual == 1 else {})


@pytest.mark.parallel
@pytest.mark.parametrize("name", ["tied", "qwen2", "qwen3"])
def test_families_under_the_hardest_layouts(tmp_path: Path, name: str) -> None:
    """Catches what plain Llama cannot show: tied embeddings whose two copies drift apart over pipeline stages, biases
    and head norms whose gradients are not summed over the tensor ranks. With the linear layers that this processor
    does not get (model/linear.py), whose gradients might not be either."""
    directory = directory_with(tmp_path, name)
    reference = REFERENCE.format(directory=directory)
    expected = expected_outcome(directory, reference)
    cases = [(layout, [reference]) for layout in (TP, BOTH_SP, PP, PP_V)]
    outcomes = on_four(tmp_path, directory, cases, other_products=True)
    for (layout, _), outcome in zip(cases, outcomes, strict=True):
        assert_same(outcome, expected, case=f"{name} {layout}")


@pytest.mark.parallel
@pytest.mark.parametrize("name", HEADS)
def test_other_heads(tmp_path: Path, name: str) -> None:
    """Catches a value that depends on where its token lies among the ranks, a value head whose gradient every tensor
    rank adds up, a reference whose hidden states are paired with other rows, a normaliser of one vocabulary shard."""
    directory = directory_with(tmp_path, "llama")
    overrides = [override.format(directory=directory) for override in HEADS[name]]
    expected = expected_outcome(directory, *overrides)
    assert min(float(gradient.norm()) for gradient in expected.gradients.values()) > 1e-3
    cases = [(layout, overrides) for layout in LAYOUTS]
    for (layout, _), outcome in zip(cases, on_four(tmp_path, directory, cases), strict=True):
        assert_same(outcome, expected, case=f"{name} {layout}")


@pytest.mark.parallel
@pytest.mark.parametrize("recompute", ["mlp", "full"])
def test_recomputing_changes_nothing(tmp_path: Path, recompute: str) -> None:
    """Catches activations that are computed again from other inputs, with other borders in the row, or not at all:
    equal to the last bit, beside the same layout that keeps everything."""
    directory = directory_with(tmp_path, "llama")
    overrides = [REFERENCE.format(directory=directory), "optimizer.clip_norm=0"]
    layouts = [TP, BOTH_SP, CP]
    cases = [(layout, [*overrides, f"recompute={how}"]) for layout in layouts for how in ("none", recompute)]
    outcomes = on_four(tmp_path, directory, cases)
    for kept, again in zip(outcomes[::2], outcomes[1::2], strict=True):
        assert again.means == kept.means
        assert again.grad_norm == kept.grad_norm
        assert all(gradient.equal(kept.gradients[name]) for name, gradient in again.gradients.items())


def test_recomputing_keeps_less(tmp_path: Path) -> None:
    """Catches a setting that reaches megatron and changes nothing: numbers kept for backward by one micro-batch."""
    directory = directory_with(tmp_path, "llama")
    kept = [jobs.kept_for_backward(str(directory), [f"recompute={how}"]) for how in ("none", "mlp", "full")]
    stop()
    assert kept[1] < 0.8 * kept[0]
    assert kept[2] < 0.3 * kept[0]


@pytest.mark.parallel
def test_known_constants_while_policy_is_reference(tmp_path: Path) -> None:
    """Catches a reference that takes another path through the kernels than the policy: log-ratios that are rounding
    noise instead of zero order the responses at random."""
    directory = directory_with(tmp_path, "llama")
    dpo = ["objective.method=dpo", "objective.eta=null"]
    cases = [(layout, dpo) for layout in (ONE, TP, BOTH_SP)]
    for (layout, _), outcome in zip(cases, on_four(tmp_path, directory, cases), strict=True):
        assert outcome.means["loss"] == pytest.approx(math.log(2), abs=1e-12), layout
        assert outcome.means["accuracy"] == 0.5, layout
        assert outcome.means["kl"] == outcome.means["margin"] == 0.0, layout
