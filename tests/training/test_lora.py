"""Runs that train an adapter: what is kept, what is frozen, what is written, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rpo_megatron import cli
from rpo_megatron.config_verbs import ExportConfig
from rpo_megatron.distributed import start, stop
from rpo_megatron.errors import UserError
from rpo_megatron.training import convert
from rpo_megatron.training import train as training
from rpo_megatron.training.metrics import METRICS_FILE
from rpo_megatron.training.resolve import resolve
from rpo_megatron.training.signals import StopSignals
from tests import tiny
from tests.model import peft_models
from tests.model.rows import random_rows
from tests.training.conftest import Rpo

LORA = ["lora.rank=2", "lora.targets=[q_proj, o_proj, up_proj]"]
EXPO = ["objective.method=expo", "objective.beta=null", "objective.eta=null", "objective.kl_weight=2"]
REWARD_MODEL = ["objective.method=bradley_terry", "objective.beta=null", "objective.eta=null"]


def verb(name: str, *words: str) -> None:
    code = cli.main([name, *words])
    stop()
    assert code == 0


def export(directory: Path, run: str, name: str, *words: str) -> Path:
    verb("export", f"load={directory / run}", f"save={directory / name}", *words)
    return directory / name


def records(directory: Path, run: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / run / METRICS_FILE).read_text().splitlines()]


@pytest.mark.parametrize("words", [[], EXPO], ids=["log-probs", "distributions"])
def test_the_base_is_the_reference_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """Catches a second copy of the weights, buffers or moments for frozen ones, a base that is trained, and a start
    that is not exactly the reference."""
    monkeypatch.setattr("rpo_megatron.training.reference.load_reference", lambda *_: pytest.fail("a second model"))
    config = tiny.run_config(tmp_path, *LORA, *words, "optimizer.weight_decay=0.1")
    run = training.build_run(resolve(config), start(config.parallel))
    model = run.model.module
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    assert training.train_loop(run, StopSignals())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in before if name.startswith("adapters.")}
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trained
    assert not [name for name, p in model.named_parameters() if hasattr(p, "main_grad") and name not in trained]
    size = sum(before[name].numel() for name in trained)
    assert size == 4 * 2 * ((32 + 32) + (32 + 32) + (32 + 48))
    assert sum(p.numel() for group in run.optimizer.param_groups for p in group["params"]) == size
    stop()
    assert records(tmp_path)[0]["kl"] == 0.0


def test_runs_go_on_to_the_last_bit(tmp_path: Path, rpo: Rpo, fails: Rpo) -> None:
    """Catches an adapter, a moment or a base that is not what it was; a checkpoint as large as a model; a run that goes
    on with another adapter or another base."""
    whole = rpo("train", *LORA, f"run_dir={tmp_path / 'whole'}")
    assert "LoRA, rank 2, alpha / rank = 2, on o_proj, q_proj, up_proj" in whole
    assert "the policy without its adapter" in whole
    rpo("train", *LORA, "train.stop_at=1")
    rpo("train", *LORA)
    assert [r["loss"] for r in records(tmp_path)] == [r["loss"] for r in records(tmp_path, "whole")]
    a, b = (export(tmp_path, name, f"{name}.peft", "format=peft") for name in ("run", "whole"))
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (a, b))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    rpo("train", "train.steps=1", f"run_dir={tmp_path / 'plain'}")
    assert size_of(tmp_path / "run") < 0.5 * size_of(tmp_path / "plain")
    again = ["train.steps=4", "train.stop_at=null"]
    assert "rank: 2 there, 3 here); set the section `lora` back" in fails("train", *LORA, "lora.rank=3", *again)
    assert "another adapter (None there" in fails("train", *LORA, f"run_dir={tmp_path / 'plain'}")
    assert "None here" in fails("train", *again)
    other = tiny.write_model(tmp_path / "other", seed=3)
    message = fails("train", *LORA, *again, f"model.path={other}")
    assert "holds an adapter of other weights" in message
    assert str(tmp_path / "model") in message


def size_of(run: Path) -> int:
    return sum(file.stat().st_size for file in run.glob("checkpoints/*/shards/*"))


def test_what_is_exported_is_what_was_trained(
    tmp_path: Path, rpo: Rpo, fails: Rpo, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an export that transformers and PEFT read as something else, a base that is lost or replaced, an
    evaluation of the base or of a value head that nobody trained, and rounds that begin at the wrong weights."""
    valid = f"data.valid={tiny.write_store(tmp_path / 'valid', num_groups=5, seed=2)}"
    rpo("train", *LORA, valid, "evaluation.every=3")
    merged, adapter = export(tmp_path, "run", "merged", "verify=true"), export(tmp_path, "run", "peft", "format=peft")
    rows = random_rows(4)
    logps = peft_models.token_logps(peft_models.with_adapter(tmp_path / "model", adapter), rows)
    torch.testing.assert_close(peft_models.token_logps(peft_models.base_model(merged), rows), logps)
    assert (peft_models.token_logps(peft_models.base_model(tmp_path / "model"), rows) - logps).abs().max() > 1e-3
    evaluated = [
        json.loads(rpo("eval", valid, *words).splitlines()[-1])
        for words in (LORA, [f"evaluation.checkpoint={merged}"], [f"evaluation.checkpoint={tmp_path / 'run'}"])
    ]
    last = records(tmp_path)[-1]
    assert evaluated[0]["loss"] == last["loss"] != records(tmp_path)[0]["loss"]
    assert evaluated[1]["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert evaluated[2]["loss"] == pytest.approx(last["loss"], rel=1e-5)
    untrained = [*LORA, *REWARD_MODEL, valid, f"evaluation.checkpoint={tmp_path / 'run'}"]
    assert "is no reward model" in fails("eval", *untrained)
    # Rounds: on from the adapter, of PEFT's or ours, against the base; or a new adapter of the merged, against that.
    new = f"run_dir={tmp_path / 'new'}"
    starts = [["lora.start=" + str(path)] for path in (adapter, tmp_path / "run")]
    on = [json.loads(rpo("eval", valid, *w, "evaluation.checkpoint=start", new).splitlines()[-1]) for w in starts]
    assert on[0]["loss"] == on[1]["loss"] == last["loss"]
    merged_first = rpo("train", *LORA, new, f"model.path={tmp_path / 'run'}", "train.steps=1")
    assert "kl +0.0000" in merged_first
    assert peft_models.token_logps(peft_models.base_model(export(tmp_path, "new", "second")), rows).isfinite().all()
    export(tmp_path, "new", "new.peft", "format=peft")
    assert "PEFT needs this base as a Hugging Face directory" in capsys.readouterr().out
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="its base is not where it was"):
        convert.export(ExportConfig(load=str(tmp_path / "run"), save=str(tmp_path / "x")))


def test_export_of_bf16_is_verified_as_it_is_written(tmp_path: Path, rpo: Rpo) -> None:
    """Catches a sum of base and adapter that is compared with more digits than the files have."""
    rpo("train", *LORA, "precision=bf16", "optimizer.lr=0.05")
    export(tmp_path, "run", "merged", "verify=true")


def test_reward_models(tmp_path: Path, rpo: Rpo) -> None:
    """Catches a value head that is frozen, is not in the checkpoint, or is another one in PEFT's files."""
    rpo("train", *LORA, *REWARD_MODEL, "train.stop_at=2")
    rpo("train", *LORA, *REWARD_MODEL)
    merged, adapter = export(tmp_path, "run", "merged", "verify=true"), export(tmp_path, "run", "peft", "format=peft")
    score = load_file(merged / "model.safetensors")["score.weight"]
    assert torch.equal(load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"], score)
    tokens = torch.randint(3, 131, (1, 9), generator=torch.Generator().manual_seed(0))
    base = peft_models.base_model(tmp_path / "model", head="value", num_labels=1)
    theirs = PeftModel.from_pretrained(base, adapter)(tokens).logits
    torch.testing.assert_close(theirs, peft_models.base_model(merged, head="value")(tokens).logits)
    shown = rpo("score", "--with", "value", *LORA, *REWARD_MODEL)
    assert "scored" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.alpha=2"], "the section `lora` is not used by lora.rank=0"),
        (["lora.rank=-1"], "lora.rank must not be negative"),
        (["lora.rank=2", "lora.alpha=0"], "lora.alpha must be positive"),
        (["lora.rank=2", "lora.targets=[q_prj]"], "did you mean 'q_proj'"),
        (["lora.rank=2", "model.init=random"], "weights that are drawn"),
        (["lora.rank=2", "reference.offload=true"], "reference.offload is not used: the reference is the policy"),
        (["lora.start=nowhere", "lora.rank=2"], "lora.rank is what the adapter in lora.start says"),
        (["lora.start=nowhere"], "lora.start: 'nowhere' is not a directory"),
        (["lora.start={model}"], "is a whole model"),
    ],
)
def test_refused(tmp_path: Path, fails: Rpo, words: list[str], message: str) -> None:
    """Catches a wish that is ignored."""
    assert message in fails("train", *(word.format(model=tmp_path / "model") for word in words))


def test_stored_reference_is_the_policys_start(tmp_path: Path, rpo: Rpo) -> None:
    """Catches a stored reference whose last digits are not those of a policy with frozen weights."""
    rpo("train", *LORA, "reference.mode=stored")
    rpo("train", *LORA, f"run_dir={tmp_path / 'resident'}")
    assert records(tmp_path)[0]["kl"] == 0.0
    assert [r["loss"] for r in records(tmp_path)] == [r["loss"] for r in records(tmp_path, "resident")]
