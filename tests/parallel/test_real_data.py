"""The main job on real input: real prompts with judge rewards, a real pretrained Llama, four processes.

Needs the optional shared/ folder; skipped, with the reason, where there is none.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from rpo_megatron.config import RunConfig
from rpo_megatron.config_io import dump, load
from rpo_megatron.data.store import Store
from tests.model.test_forward_parity import transformers_logps
from tests.parallel import launch
from tests.parallel.jobs import Layout
from tests.parallel.test_runs import records, run_ok

ETA = 100.0
NUM_GROUPS = 39


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The model, the whole store, and a small one: sequences of up to 384 tokens, to keep this to a minute or two."""
    directory = tmp_path_factory.mktemp("real")
    model, source = str(shared / "models" / "stories260K"), shared / "data" / "alpaca_eval_multi.train.jsonl.gz"
    for name, limit in (("whole", "null"), ("small", "48")):
        prefix = f"output_prefix={directory / name}"
        run_ok("prepare", f"input={source}", f"tokenizer={model}", prefix, "max_length=384", f"limit={limit}")
    return {name: str(directory / name) for name in ("whole", "small")} | {"model": model}


def config(real: dict[str, str], store: str, *overrides: str) -> RunConfig:
    """Full batches of the store, evaluated on the same groups: does it learn them?"""
    base = [
        f"run_dir={real[store]}.run",
        f"model.path={real['model']}",
        f"data.train={real[store]}",
        f"data.valid={real[store]}",
        "objective.method=rpo_bwd",
        "objective.beta=0.1",
        f"objective.eta={ETA}",
        "optimizer.lr=1e-4",
        "optimizer.schedule=cosine",
        "optimizer.warmup_steps=2",
        "train.steps=12",
        f"train.groups_per_step={NUM_GROUPS}",
        "evaluation.every=12",
        "precision=fp32",
        "logging.tensorboard=false",
    ]
    return load(RunConfig, None, [*base, *overrides])


@pytest.mark.parallel
def test_stores_open_in_megatron(real: dict[str, str]) -> None:
    """Catches a store that only we can read."""
    store, theirs = Store.open(real["whole"]), IndexedDataset(real["whole"])
    assert len(store) > 300
    assert len(theirs.document_indices) == len(store) + 1
    for i in (0, 7, len(store) - 1):
        group, first = store.group(i), int(theirs.document_indices[i])
        for at, tokens in enumerate([group.prompt, *group.responses]):
            np.testing.assert_array_equal(theirs[first + at], tokens)


@pytest.mark.parallel
def test_log_probs_of_50_groups_equal_transformers(real: dict[str, str], tmp_path: Path) -> None:
    """Catches anything between raw text and log-probability that differs from what users of the model get, under any
    layout; 5 layers over 2 stages are an uneven split."""
    layouts = [Layout(tp, pp, sp) for tp in (1, 2) for pp in (1, 2) for sp in ((False, True) if tp > 1 else (False,))]
    cases = [(_with_layout(config(real, "whole"), layout), 50) for layout in layouts]
    results = launch.run("tests.parallel.jobs:score_blocks", processes=4, directory=tmp_path, cases=cases)[0]
    expected = transformers_logps(Path(real["model"]), Store.open(real["whole"]), 50)
    for layout, scored in zip(layouts, results, strict=True):
        assert scored.logps.keys() == expected.keys()
        worst = max(
            abs(got / want - 1)
            for group, values in expected.items()
            for got, want in zip(scored.logps[group], values, strict=True)
        )
        print(f"{layout}: largest relative difference {worst:.1e}")
        assert worst < 1e-5, layout


@pytest.mark.parallel
def test_score_train_evaluate_export(real: dict[str, str], tmp_path: Path) -> None:
    """Catches a main job that runs but does not learn, or that does not start where the mathematics says it does."""
    (tmp_path / "run.yaml").write_text(
        dump(config(real, "small", f"run_dir={tmp_path / 'run'}", "reference.mode=stored"))
    )
    yaml = str(tmp_path / "run.yaml")
    four = ["parallel.tensor=2", "parallel.pipeline=2"]
    run_ok("score", yaml, *four, processes=4)
    _assert_policy_is_reference(real, tmp_path, four)

    output = run_ok("train", yaml, *four, processes=4)
    assert "tensor 2 x pipeline 2 (3+2 layers) x data 1" in output
    before, after = (line for line in records(tmp_path / "run") if line["kind"] == "valid")
    assert before["loss"] == pytest.approx(_loss_at_the_reference(Store.open(real["small"])), rel=1e-5)
    assert before["accuracy"] == pytest.approx(0.5, abs=0.02)
    for line in (before, after):
        print(f"step {line['step']}: loss {line['loss']:.4f}, accuracy {line['accuracy']:.3f}")
    assert after["loss"] < 0.3 * before["loss"]
    assert after["accuracy"] > 0.6
    assert after["margin"] > 0.2

    evaluated = json.loads(run_ok("eval", yaml).splitlines()[-1])
    assert evaluated["loss"] == pytest.approx(after["loss"], rel=1e-4)
    run_ok("export", str(tmp_path / "run"), f"save={tmp_path / 'hf'}")
    store = Store.open(real["small"])
    logps = transformers_logps(tmp_path / "hf", store, len(store))
    reference = transformers_logps(Path(real["model"]), store, len(store))
    kl = [r - p for group in logps for p, r in zip(logps[group], reference[group], strict=True)]
    assert after["kl"] == pytest.approx(float(np.mean(kl)), rel=1e-3), "what transformers computes from the export"


def _assert_policy_is_reference(real: dict[str, str], tmp_path: Path, layout: list[str]) -> None:
    """Response by response: exactly with a resident reference. A stored one was computed in other rows and kept in
    fp32, so it is off by the rounding of sums near -1000 nats."""
    cases = [(config(real, "small", *layout, f"reference.mode={mode}"), NUM_GROUPS) for mode in ("resident", "stored")]
    job = "tests.parallel.jobs:score_blocks"
    resident, stored = launch.run(job, processes=4, directory=tmp_path / "out", cases=cases)[0]
    assert resident.largest_log_ratio < 1e-5
    print(f"largest log-ratio: {resident.largest_log_ratio:.1e} resident, {stored.largest_log_ratio:.1e} stored")
    largest_sum = max(abs(logp) for values in stored.logps.values() for logp in values)
    assert stored.largest_log_ratio < 1e-6 * largest_sum


def _loss_at_the_reference(store: Store) -> float:
    """Mean over groups of log K - H(softmax(eta r)): the KL from the target to the uniform distribution."""
    losses = []
    for i in range(len(store)):
        reward = store.group(i).reward
        assert reward is not None
        target = np.exp(ETA * reward.astype(np.float64))
        target /= target.sum()
        losses.append(math.log(len(reward)) + float((target * np.log(target)).sum()))
    return float(np.mean(losses))


def _with_layout(base: RunConfig, layout: Layout) -> RunConfig:
    parallel = dataclasses.replace(
        base.parallel, tensor=layout.tensor, pipeline=layout.pipeline, sequence=layout.sequence
    )
    return dataclasses.replace(base, parallel=parallel)
