"""One process == N processes for adapters: log-probs, statistics, gradients, the step; and their checkpoints."""

from pathlib import Path
from typing import Any

import pytest

from rpo_megatron.distributed import stop
from tests import tiny
from tests.model import peft_models
from tests.model.whole import relative_errors
from tests.parallel import launch, lora_jobs
from tests.parallel.jobs import ONE, Layout
from tests.parallel.lora_jobs import Outcome

TP, SP = Layout(tensor=2), Layout(tensor=2, sequence=True)
BOTH_SP, CP_SP = Layout(tensor=2, pipeline=2, sequence=True), Layout(tensor=2, context=2, sequence=True)
VIRTUAL = Layout(pipeline=2, virtual=2)
LAYOUTS = [ONE, TP, SP, BOTH_SP, CP_SP, VIRTUAL]
"""On four processes; what the model does not use is data parallelism."""
REWARD_MODEL = ["objective.method=bradley_terry", "objective.beta=null", "objective.eta=null"]


def assert_same(outcome: Outcome, expected: Outcome, *, case: str, tolerance: float = 1e-5) -> None:
    assert outcome.base_is_untouched, case
    assert outcome.means == pytest.approx(expected.means, rel=tolerance, abs=tolerance), case
    assert outcome.grad_norm == pytest.approx(expected.grad_norm, rel=tolerance), f"{case}: gradient norm"
    assert outcome.logps.keys() == expected.logps.keys(), case
    for group, values in expected.logps.items():
        assert outcome.logps[group] == pytest.approx(values, rel=tolerance), f"{case}: group {group}"
    for what, found, wanted, limit in (
        ("gradient", outcome.gradients, expected.gradients, tolerance),
        ("updated weight", outcome.after_step, expected.after_step, 1e-3),
    ):
        assert found.keys() == wanted.keys(), case
        wrong = {name: error for name, error in relative_errors(found, wanted).items() if not error < limit}
        assert not wrong, f"{case}: {what}s are off by {wrong}"


@pytest.mark.parallel
def test_every_layout_equals_one_process(tmp_path: Path) -> None:
    """Catches a narrow product that is not summed over the ranks or summed twice, its gradient likewise, a whole A or B
    whose gradient is that of one rank's tokens, rows of B on the wrong rank, a new adapter that is not exactly nothing
    or depends on the layout, a frozen weight that moves; of a reward model also the head that is trained beside."""
    base = tiny.write_model(tmp_path / "model")
    changes: dict[str, Any] = {**tiny.QWEN2, "tie_word_embeddings": True}
    tiny.write_model(tmp_path / "qwen", **changes)
    tiny.write_store(tmp_path / "train", num_groups=12)
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    trained = [f"lora.start={peft_models.write_adapter(tmp_path / 'adapter', base, targets=targets)}"]
    new = ["lora.rank=3", "recompute=full"]
    tied = [f"model.path={tmp_path / 'qwen'}", "lora.rank=2", "lora.targets=[k_proj, down_proj]"]
    reward = ["lora.rank=2", *REWARD_MODEL]
    wishes = [(trained, LAYOUTS), (new, [TP, BOTH_SP]), (tied, [BOTH_SP]), (reward, [CP_SP])]
    cases = [(layout, words) for words, layouts in wishes for layout in layouts]
    expected = lora_jobs.outcomes(str(tmp_path), [(ONE, words) for words, _ in wishes])
    stop()
    assert expected[0].largest_log_ratio > 0.1
    found = iter(on("outcomes", tmp_path, cases=cases, processes=4))
    for (words, layouts), wanted in zip(wishes, expected, strict=True):
        for layout in layouts:
            outcome = next(found)
            assert_same(outcome, wanted, case=f"{layout} {words}")
            assert words is trained or outcome.largest_log_ratio == 0.0, f"{layout} {words}"


@pytest.mark.parallel
def test_runs_go_on_under_any_layout(tmp_path: Path) -> None:
    """Catches a checkpoint without the adapter's moments, or with those of other rows; an adapter that another layout
    cannot read; a base that is not loaded when a run goes on; updates that are not gathered before they are read."""
    tiny.write_model(tmp_path / "model")
    tiny.write_store(tmp_path / "train", num_groups=12)
    words = ["lora.rank=3", "optimizer.clip_norm=0", "train.steps=2"]
    cases = [
        (SP, "whole", None, words),
        (SP, "first", None, [*words, "train.stop_at=1"]),
        (VIRTUAL, "virtual", "first", words),
        (ONE, "data", "first", [*words, "parallel.overlap=true", "parallel.bucket_size=100"]),
    ]
    whole, first, *others = on("runs", tmp_path, cases=cases, processes=2)
    for other in others:
        for name, tensor in whole.items():
            assert float((other[name] - tensor).norm() / tensor.norm()) < 1e-3, name
            assert float((first[name] - tensor).norm() / tensor.norm()) > 1e-2, name


def on(job: str, directory: Path, *, cases: list[Any], processes: int) -> Any:
    """What the first process gives."""
    function = f"tests.parallel.lora_jobs:{job}"
    return launch.run(function, processes=processes, directory=directory / job, data=str(directory), cases=cases)[0]
