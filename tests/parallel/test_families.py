"""One process == N processes for every model family: log-probs, loss, gradient norm and every gradient, in fp32."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rpo_megatron.config import ParallelConfig
from rpo_megatron.config_verbs import ImportConfig
from rpo_megatron.distributed import stop
from rpo_megatron.training import convert
from tests import tiny
from tests.model.rows import random_rows
from tests.model.test_heads import their_values
from tests.parallel import jobs, launch
from tests.parallel.jobs import ONE, Layout
from tests.parallel.test_heads import assert_close, assert_equal, on_four
from tests.parallel.test_layouts import assert_same

TP, DP, BOTH_SP = Layout(tensor=2), ONE, Layout(tensor=2, pipeline=2, sequence=True)
CP_PP = Layout(context=2, pipeline=2)
EXPERTS = [
    Layout(expert=2),
    Layout(expert=4),
    Layout(expert=2, pipeline=2),
    Layout(expert=2, context=2),
    Layout(expert=2, tensor=2, sequence=True),
]
CASES = [
    *((name, BOTH_SP) for name in tiny.FAMILIES),
    *((name, TP) for name in ("phi3", "nemotron", "gemma3_text")),
    *((name, CP_PP) for name in ("gemma2", "gemma3_text", "qwen3_moe")),
    *((name, DP) for name in ("mixtral", "qwen3_moe")),
    *((name, layout) for name in ("mixtral", "qwen3_moe") for layout in EXPERTS),
    *((name, layout) for name in ("qwen2_moe", "deepseek_v3") for layout in (CP_PP, EXPERTS[-1])),
    *(("gpt_oss", layout) for layout in (CP_PP, EXPERTS[0], EXPERTS[-1])),
    *(("grouped experts", layout) for layout in (BOTH_SP, EXPERTS[-1])),
    *(("router losses", layout) for layout in (BOTH_SP, *EXPERTS[-2:])),
    ("a stage without experts", Layout(expert=2, pipeline=2)),
]


@pytest.mark.parallel
def test_every_family_equals_one_process(tmp_path: Path) -> None:
    """Catches weights of a norm, an expert or a router whose gradient is not summed over the tensor ranks, a fused
    tensor cut in the wrong place, a window or rotary base that goes by the layer's number in its stage, experts of a
    replica whose gradients stay there, a balance of experts over a part of a row, a rank that waits for the numbers of
    another's routers because it has none. Grouped experts are stand-ins for Transformer Engine's
    (tests/model/te_stand_in.py)."""
    tiny.write_store(tmp_path / "train", num_groups=12)
    overrides = {name: _write(tmp_path, name) for name in tiny.FAMILIES}
    overrides["router losses"] = [*overrides["mixtral"], "moe.aux_loss=0.5", "moe.z_loss=0.1"]
    dense = tiny.write_model(tmp_path / "dense", **{**tiny.FAMILIES["qwen2_moe"], "mlp_only_layers": [0, 1]})
    overrides["a stage without experts"] = [*overrides["router losses"], f"model.path={dense}"]
    overrides["grouped experts"] = [*overrides["qwen2_moe"], "kernels.layers=transformer_engine"]
    alone = jobs.outcomes(str(tmp_path), [(ONE, own) for own in overrides.values()])
    expected = dict(zip(overrides, alone, strict=True))
    stop()
    job, cases = "tests.parallel.jobs:outcomes", [(layout, overrides[name]) for name, layout in CASES]
    together = launch.run(job, processes=4, directory=tmp_path / "out", data=str(tmp_path), cases=cases)[0]
    for (name, layout), outcome in zip(CASES, together, strict=True):
        assert_same(outcome, expected[name], case=f"{name} {layout}", tolerance=3e-5)


def _write(directory: Path, name: str) -> list[str]:
    """A policy and a reference with other weights; the overrides that name them."""
    policy, reference = directory / name, directory / f"{name}-reference"
    tiny.write_model(policy, **tiny.FAMILIES[name])
    tiny.write_model(reference, seed=1, **tiny.FAMILIES[name])
    return [f"model.path={policy}", f"reference.path={reference}"]


@pytest.mark.parallel
def test_families_come_back_bit_for_bit(tmp_path: Path) -> None:
    """Catches a checkpoint in which layers with and without experts overwrite each other, or an export that puts the
    parts of a fused tensor or an expert together wrongly: imported in one process, exported by four, the files must be
    those of the start."""
    names = ["qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3", "phi3", "nemotron", "gemma3_text"]
    for name in names:
        tiny.write_model(tmp_path / name, **tiny.FAMILIES[name])
        saved = str(tmp_path / f"{name}-checkpoint")
        convert.import_(ImportConfig(load=str(tmp_path / name), save=saved, precision="fp32"))
    on_four("exports", tmp_path, checkpoints={f"{name}-checkpoint": f"{name}-exported" for name in names})
    for name in names:
        exported, start = (load_file(tmp_path / end / "model.safetensors") for end in (f"{name}-exported", name))
        assert_equal(exported, start, case=name)


@pytest.mark.parallel
@pytest.mark.parametrize(
    ("name", "expert", "changes"),
    [("qwen3_moe", 1, {}), ("qwen2_moe", 2, {"mlp_only_layers": [0, 1]}), ("gemma3_text", 1, {})],
)
def test_training_goes_on_in_another_layout(tmp_path: Path, name: str, expert: int, changes: dict[str, Any]) -> None:
    """Catches moments of experts, routers or norms after a sublayer that a checkpoint loses or mixes up, updates of
    experts that nobody counts because the first stage has none, and a reward model of such a family that transformers
    scores otherwise."""
    tiny.write_model(tmp_path / "lm", **{**tiny.FAMILIES[name], **changes})
    layouts = [ParallelConfig(expert=expert), ParallelConfig(tensor=2, sequence=True, expert=expert)]
    save = ParallelConfig(tensor=2, pipeline=2, sequence=True, expert=expert)
    saved, *resumed = on_four("save_and_load", tmp_path, save=save, layouts=layouts)
    for parallel, restored in zip(layouts, resumed, strict=True):
        assert_equal(restored.weights, saved.weights, case=f"{parallel}")
        assert_close(restored.after_step, saved.after_step, case=f"{parallel} after a step")
    expected = [value for values in saved.values for value in values]
    assert their_values(tmp_path / "exported", random_rows(8)) == pytest.approx(expected, rel=1e-4, abs=1e-5)
