"""Whole runs through the command line: stop and resume, stored and resident reference, export and import, bf16."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rpo_megatron.data.store import Store
from rpo_megatron.distributed import stop
from tests import tiny
from tests.model.test_forward_parity import transformers_logps
from tests.parallel import jobs
from tests.parallel.jobs import ONE
from tests.parallel.launch import rpo

TIMES = ("tokens_per_second", "step_seconds", "memory_gb")
FOUR = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]


def write_config(directory: Path) -> str:
    """A run that uses every part: schedule, evaluation, checkpoints, reference with weights of its own."""
    tiny.write_model(directory / "reference", seed=1, tie_word_embeddings=True)
    tiny.write_model(directory / "model", tie_word_embeddings=True)
    tiny.write_store(directory / "train", num_groups=14)
    tiny.write_store(directory / "valid", num_groups=5, seed=7)
    (directory / "run.yaml").write_text(
        f"""
run_dir: {directory}/run
model: {{path: {directory}/model}}
data: {{train: {directory}/train, valid: {directory}/valid, tokens_per_microbatch: 96}}
objective: {{method: rpo_bwd, beta: 0.1, eta: 3}}
reference: {{path: {directory}/reference}}
optimizer: {{lr: 1e-3, schedule: cosine, warmup_steps: 2}}
train: {{steps: 6, groups_per_step: 5}}
evaluation: {{every: 3}}
logging: {{tensorboard: false}}
precision: fp32
"""
    )
    return str(directory / "run.yaml")


def run_ok(*words: str, processes: int = 1) -> str:
    done = rpo(*words, processes=processes)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def records(run_dir: Path, *, keep_times: bool = False) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if keep_times or key not in TIMES} for line in lines]


def unique(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A resumed run evaluates once more at the step it starts from; equal lines count once."""
    seen: dict[str, dict[str, Any]] = {json.dumps(line, sort_keys=True): line for line in lines}
    return list(seen.values())


def assert_close(lines: list[dict[str, Any]], expected: list[dict[str, Any]], *, tolerance: float) -> None:
    for line, want in zip(lines, expected, strict=True):
        for name in ("kind", "data"):  # text
            assert line.get(name) == want.get(name)
        numbers = {name: value for name, value in want.items() if not isinstance(value, str)}
        assert {name: line[name] for name in numbers} == pytest.approx(numbers, rel=tolerance, abs=tolerance)
        assert line.keys() == want.keys()


@pytest.mark.parallel
def test_resume_is_bit_identical_and_layouts_share_checkpoints(tmp_path: Path) -> None:
    """Catches any state that a checkpoint forgets (moments, step count, data position, schedule) or restores rounded;
    and a checkpoint that another layout cannot go on from, or exports other weights."""
    yaml = write_config(tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ok("train", yaml, f"run_dir={whole}", *FOUR, processes=4)
    run_ok("train", yaml, f"run_dir={parts}", *FOUR, "train.stop_at=4", processes=4)
    others = {"one process": [], "context ranks": ["parallel.context=2"]}
    for name in others:
        shutil.copytree(parts, tmp_path / name)
    output = run_ok("train", yaml, f"run_dir={parts}", *FOUR, processes=4)
    assert "resumed from" in output
    expected = records(whole)
    assert len(expected) == 6 + 3
    assert "logp_best_change" in expected[-1]  # and after the resume too, from the evaluation before it
    assert unique(records(parts)) == expected
    # the same checkpoint under other layouts: another order of additions, the same run
    for name, layout in others.items():
        run_ok("train", yaml, f"run_dir={tmp_path / name}", *layout, processes=1 + len(layout))
        assert_close(unique(records(tmp_path / name))[-4:], expected[-4:], tolerance=1e-3)

    run_ok("export", str(whole), f"save={tmp_path / 'one'}")
    run_ok(
        "export", str(whole), f"save={tmp_path / 'four'}", "tensor=2", "pipeline=2", "max_shard_gb=1e-5", processes=4
    )
    run_ok("import", str(tmp_path / "one"), f"save={tmp_path / 'back'}", "precision=fp32", "tensor=2", processes=2)
    run_ok("export", str(tmp_path / "back"), f"save={tmp_path / 'again'}")
    exported = _weights(tmp_path / "one")
    assert len(list((tmp_path / "four").glob("*.safetensors"))) > 1
    for directory in ("four", "again"):
        other = _weights(tmp_path / directory)
        assert exported.keys() == other.keys()
        assert all(torch.equal(exported[name], other[name]) for name in exported), directory
    _assert_transformers_agrees(tmp_path, exported)


def _assert_transformers_agrees(tmp_path: Path, exported: dict[str, torch.Tensor]) -> None:
    start = _weights(tmp_path / "model")
    assert not any(torch.equal(exported[name], start[name]) for name in exported), "training left a weight alone"
    outcome = jobs.outcomes(str(tmp_path), [(ONE, [f"model.path={tmp_path / 'whole'}", "train.groups_per_step=14"])])[0]
    stop()
    expected = transformers_logps(tmp_path / "one", Store.open(str(tmp_path / "train")), 14)
    assert all(outcome.logps[group] == pytest.approx(values, rel=1e-5) for group, values in expected.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "four").config.tie_word_embeddings


@pytest.mark.parallel
def test_stored_reference_equals_resident(tmp_path: Path) -> None:
    """Catches a sidecar in another order than the store's, or one that depends on the layout that wrote it."""
    yaml = write_config(tmp_path)
    run_ok("score", yaml, "parallel.tensor=2", processes=2)
    run_ok("train", yaml, f"run_dir={tmp_path / 'stored'}", "reference.mode=stored")
    run_ok("train", yaml, f"run_dir={tmp_path / 'resident'}", "parallel.pipeline=2", processes=2)
    stored, resident = records(tmp_path / "stored"), records(tmp_path / "resident")
    assert abs(stored[0]["kl"]) > 0.1
    assert_close(stored, resident, tolerance=1e-4)
    refused = rpo("train", yaml, f"run_dir={tmp_path / 'other'}", "reference.mode=stored", "precision=bf16")
    assert refused.returncode == 2
    assert "precision" in refused.stdout
    assert "rpo score" in refused.stdout


@pytest.mark.parallel
def test_bf16_trains_like_fp32(tmp_path: Path) -> None:
    """Catches master weights or gradients that are kept in bf16: with lr 1e-3, fp32 moves steadily, bf16 would not;
    and an export that says another precision than it has."""
    yaml = write_config(tmp_path)
    options = ["optimizer.warmup_steps=0", "optimizer.schedule=constant", "evaluation.every=0", "train.steps=20"]
    run_ok("train", yaml, *options, f"run_dir={tmp_path / 'fp32'}")
    run_ok("train", yaml, *options, f"run_dir={tmp_path / 'bf16'}", "precision=bf16", "parallel.tensor=2", processes=2)
    fp32, bf16 = records(tmp_path / "fp32"), records(tmp_path / "bf16")
    assert bf16[0]["loss"] == pytest.approx(fp32[0]["loss"], rel=0.1)
    assert fp32[-1]["loss"] < fp32[0]["loss"]
    assert bf16[-1]["loss"] == pytest.approx(fp32[-1]["loss"], rel=0.25)
    run_ok("export", str(tmp_path / "bf16"), f"save={tmp_path / 'hf'}")
    assert {tensor.dtype for tensor in _weights(tmp_path / "hf").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype == torch.bfloat16


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
