"""Reward models through the command line, on two processes: train, evaluate, score, export; and a policy trained on the
scores, whose implicit reward is a column in its turn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rpo_megatron.config import RewardsConfig
from rpo_megatron.data.rewards import make_view
from rpo_megatron.data.store import Store
from tests.parallel.test_runs import records, run_ok, write_config

REWARD_MODEL = ["objective.method=bradley_terry", "objective.beta=null", "objective.eta=null", "reference.path=null"]
TP, PP = ["parallel.tensor=2", "parallel.sequence=true"], ["parallel.pipeline=2"]


def column(prefix: Path, name: str) -> list[np.ndarray]:
    """K numbers per group, as a run would read them."""
    store = Store.open(str(prefix))
    viewed = store.with_view(make_view(RewardsConfig(columns=(name,)), store, source_column=None))
    return [reward for i in range(len(store)) if (reward := viewed.group(i).reward) is not None]


def transformers_values(model_directory: Path, prefix: Path, *, limit: int | None = None) -> list[np.ndarray]:
    """Each response (of the first `limit` groups) on its own after its prompt, as users of the exported model score
    it."""
    model = AutoModelForSequenceClassification.from_pretrained(model_directory, dtype=torch.float32).eval()
    store = Store.open(str(prefix))
    values = []
    with torch.no_grad():
        for i in range(limit or len(store)):
            group = store.group(i)
            rows = [torch.tensor([[*group.prompt, *response]]) for response in group.responses]
            values.append(np.array([model(row).logits.item() for row in rows]))
    return values


def assert_equal(found: list[np.ndarray], expected: list[np.ndarray], *, tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance)


@pytest.mark.parallel
def test_from_training_to_a_policy_that_learns_from_it(tmp_path: Path) -> None:
    """Catches a step of the chain that takes other weights, another head or another order than the one before: the
    numbers in the store, those of `rpo eval` and those of transformers must be the trained model's."""
    yaml = write_config(tmp_path)  # tied embeddings, which a value head must leave alone
    rm = [yaml, *REWARD_MODEL, f"run_dir={tmp_path / 'rm'}", "train.steps=20", "evaluation.every=20"]
    # evaluated on what it sees: does it learn that?
    rm += ["optimizer.lr=3e-3", "train.groups_per_step=14", f"data.valid={tmp_path / 'train'}"]
    shown = run_ok("train", *rm, *TP, processes=2)
    assert "value head (reward model)" in shown
    assert "value head drawn from seed 1234" in shown
    before, after = (record for record in records(tmp_path / "rm") if record["kind"] == "valid")
    assert before["loss"] == pytest.approx(np.log(2), abs=0.05)
    assert after["loss"] < 0.5 * before["loss"]
    assert after["accuracy"] > 0.9 > before["accuracy"]
    assert after["best_of_n"] > before["best_of_n"]

    evaluated = json.loads(run_ok("eval", *rm, *PP, processes=2).splitlines()[-1])
    for name in ("loss", "accuracy", "best_of_n", "calibration_error", "length_correlation"):
        assert evaluated[name] == pytest.approx(after[name], rel=1e-3, abs=1e-4), name

    run_ok("score", *rm, *PP, f"data.valid={tmp_path / 'valid'}", "--with", "value", processes=2)
    run_ok("export", str(tmp_path / "rm"), f"save={tmp_path / 'hf'}", "tensor=2", processes=2)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    for name in ("train", "valid"):
        expected = transformers_values(tmp_path / "hf", tmp_path / name)
        assert_equal(column(tmp_path / name, "value"), expected, tolerance=1e-4)

    policy = [yaml, f"run_dir={tmp_path / 'policy'}", "rewards.columns=[value]", "rewards.standardise=dataset"]
    shown = run_ok("train", *policy, *PP, processes=2)
    assert "column value, standardised by the training store" in shown
    assert "resident" in shown
    run_ok("score", *policy, *TP, "--with", "implicit", processes=2)
    run_ok("score", *policy, "--with", "implicit", "score.column=alone")
    for name in ("train", "valid"):
        found = column(tmp_path / name, "implicit")
        assert_equal(found, column(tmp_path / name, "alone"), tolerance=2e-5)
        assert np.abs(np.concatenate(found)).max() > 0.1

    # one number per response and column: the ensemble's columns by themselves
    ensemble = ["objective.method=pessimistic_unconfirmed", "objective.eta=null", "rewards.columns=[value, implicit]"]
    shown = run_ok("train", yaml, *ensemble, *TP, f"run_dir={tmp_path / 'ensemble'}", processes=2)
    assert "columns value, implicit, each by itself" in shown
    lines = records(tmp_path / "ensemble")
    assert all(np.isfinite(line["token_kl"]) for line in lines)
    assert "logp_best_change" in lines[-1]
