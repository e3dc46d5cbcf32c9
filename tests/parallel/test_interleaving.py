"""parallel.virtual: several chunks of layers on each rank of a pipeline. Layouts that fit four layers are in
test_layouts.py and test_overlap.py; here are the others, every number of rows, and checkpoints between chunkings."""

from pathlib import Path

import pytest
import torch

from rpo_megatron.config import RunConfig
from tests import tiny
from tests.parallel import launch
from tests.parallel.jobs import Layout
from tests.parallel.test_layouts import REFERENCE, assert_same, expected_outcome, on_four

NINE_LAYERS = {"num_hidden_layers": 9, "tie_word_embeddings": True}
"""Over 8 chunks of one layer, and one of two."""
TP_V, PP_V, PP4_V = (
    Layout(tensor=2, pipeline=2, virtual=3),
    Layout(pipeline=2, virtual=2),
    Layout(pipeline=4, virtual=2),
)


@pytest.mark.parallel
def test_any_number_of_rows(tmp_path: Path) -> None:
    """Catches a schedule that megatron refuses, or runs wrong: fewer rows than ranks (the others are empty), and
    numbers that are no multiple of them; with chunks of unequal size, and a tied weight's copies in two of them."""
    for name, seed in (("model", 0), ("reference", 1)):
        tiny.write_model(tmp_path / name, seed=seed, **NINE_LAYERS)
    reference = REFERENCE.format(directory=tmp_path)
    expected, cases = [], []
    for num_rows in (1, 5, 7):
        overrides = [reference, "data.packing=false", f"train.groups_per_step={num_rows}"]
        expected += [expected_outcome(tmp_path, *overrides)] * 2
        cases += [(layout, overrides) for layout in (TP_V, PP4_V)]
    for (layout, overrides), outcome, want in zip(cases, on_four(tmp_path, tmp_path, cases), expected, strict=True):
        # Nine layers, and losses near 0: the order of additions over the tensor ranks shows.
        assert_same(outcome, want, case=f"{layout} {overrides[-1]}", tolerance=1e-4)


@pytest.mark.parallel
def test_checkpoints_know_no_chunks(tmp_path: Path) -> None:
    """Catches a layer that is saved under its number in the chunk, and moments that a chunk's optimizer restores into
    another layer: three steps, then two more under other chunkings, of one run; and the same without a break."""
    for name, seed in (("model", 0), ("reference", 1)):
        tiny.write_model(tmp_path / name, seed=seed, **NINE_LAYERS)
    tiny.write_store(tmp_path / "valid", num_groups=5, seed=7)
    common = [
        f"reference.path={tmp_path / 'reference'}",
        f"data.valid={tmp_path / 'valid'}",
        *["evaluation.every=3", "checkpoint.every=3", "checkpoint.keep=9", "optimizer.eps=1e-3"],
    ]

    def run(name: str, layout: Layout, *words: str) -> RunConfig:
        return tiny.run_config(tmp_path, *common, f"run_dir={tmp_path / name}", *layout.overrides(), *words)

    stop, end = ["train.steps=5", "train.stop_at=3"], ["train.steps=5"]
    orders = [(PP_V, PP4_V), (TP_V, Layout(pipeline=2))]
    configs = [run("whole", Layout(), *end)]
    for i, (before, after) in enumerate(orders):
        configs += [run(str(i), before, *stop), run(str(i), after, *end, "reference.offload=true")]
    job = "tests.parallel.overlap_jobs:trained"
    whole, *parts = launch.run(job, processes=4, directory=tmp_path / "out", configs=configs)[0]
    for (before, after), first, second in zip(orders, parts[::2], parts[1::2], strict=True):
        case = f"{before} -> {after}"
        assert first.weights.keys() == second.saved.keys() == whole.weights.keys()
        for name, weight in whole.weights.items():
            assert torch.equal(second.saved[name], first.weights[name]), f"{case}: {name} in the checkpoint"
            assert not torch.equal(second.weights[name], first.weights[name]), f"{case}: {name} was not trained"
            torch.testing.assert_close(second.weights[name], weight, rtol=1e-4, atol=1e-5, msg=f"{case}: {name}")
        assert second.losses[-2:] == pytest.approx(whole.losses[-2:], rel=1e-5), case
