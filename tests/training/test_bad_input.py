"""What a user gets wrong about a run: one clear message with what to do, exit code 2, before any training."""

import json
from pathlib import Path

import numpy as np
import pytest

from rpo_megatron import cli
from rpo_megatron.config_io import dump
from rpo_megatron.data.store import Store
from rpo_megatron.data.writer import write_reference
from rpo_megatron.distributed import stop
from tests import tiny
from tests.training.conftest import Rpo


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run of two steps; its run directory."""
    (tmp_path / "run.yaml").write_text(dump(tiny.run_config(tmp_path, "train.steps=2", "train.stop_at=1")))
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.tensor=2", ["parallel.tensor=2", "multiple of 2 processes, got 1", "torchrun"]),
        ("model.path=nowhere", ["model.path", "'nowhere'", "not a directory"]),
        ("data.train=nowhere", ["'nowhere'", "rpo prepare"]),
        ("objective.method=rpo_bkw", ["rpo_bkw", "did you mean 'rpo_bwd'"]),
        ("objective.label_smoothing=0.1", ["objective.label_smoothing", "rpo_bwd", "does not use it"]),
        ("objective.beta=-1", ["objective.beta", "-1"]),
        ("train.epochs=1", ["train.steps", "train.epochs", "one of"]),
        ("train.groups_per_step=0", ["train.groups_per_step", "positive"]),
        ("optimizer.min_lr=1e-4", ["optimizer.min_lr", "not used", "cosine"]),
        ("optimizer.beta2=1.5", ["optimizer.beta2", "[0, 1)"]),
        ("optimizer.lr=.inf", ["optimizer.lr", "inf"]),
        ("rewards.clip=0", ["rewards.clip", "positive"]),
        ("rewards.clip=.inf", ["rewards.clip", "inf"]),
        ("rewards.columns=[reward, reward]", ["rewards.columns", "reward twice"]),
        ("rewards.columns=[rewrad]", ["rewards.columns", "did you mean 'reward'"]),
        ("data.source_column=foreign", ["data.source_column", "not used", "rpo_bwd"]),
        ("evaluation.every=1", ["evaluation.every", "data.valid"]),
        ("parallel.sequence=true", ["parallel.sequence", "parallel.tensor > 1"]),
        ("parallel.virtual=2", ["parallel.virtual", "parallel.pipeline > 1"]),
        ("parallel.virtual=0", ["parallel.virtual must be positive"]),
        ("parallel.bucket_size=0", ["parallel.bucket_size", "positive"]),
        ("kernels.keep_logits_mib=-1", ["kernels.keep_logits_mib", "not negative"]),
        ("profile.steps=-1", ["profile.steps", "not negative"]),
        ("profile.steps=1", ["profile.skip=2", "profile.steps=1", "4 steps", "3 to go"]),
    ],
)
def test_configs_that_cannot_run(fails: Rpo, override: str, words: list[str]) -> None:
    """Catches a silent fallback: every one of these would otherwise train something else than was asked for."""
    message = fails("train", override)
    for word in words:
        assert word in message


def test_knobs_that_only_work_without_each_other(fails: Rpo) -> None:
    """Catches a knob that is swallowed because another one switches off what it is about."""
    message = fails("train", "reference.offload=true", "reference.mode=stored")
    assert "reference.offload is not used: reference.mode=stored" in message
    assert "parallel.bucket_size is not used" in fails("train", "parallel.bucket_size=9", "parallel.overlap=false")
    assert "not used by kernels.logprobs=triton" in fails(
        "train", "kernels.keep_logits_mib=9", "kernels.logprobs=triton"
    )
    assert "2 steps; this run has 1 to go" in fails("train", "profile.steps=1", "profile.skip=0", "train.stop_at=1")


def test_epochs_of_a_store_that_is_smaller_than_a_step(fails: Rpo) -> None:
    """Catches an hour in one step: 50 groups of a store of 12 are no epoch."""
    message = fails("train", "train.steps=null", "train.epochs=1", "train.groups_per_step=50")
    assert "train.groups_per_step=50 is more than the 12 groups of" in message
    assert "4.17 passes; set train.groups_per_step to 12 or less, or train.steps" in message


def test_config_refuses_what_train_refuses(fails: Rpo) -> None:
    """Catches a look at the config, made before many GPUs are asked for, that finds nothing, or a traceback."""
    assert "parallel.pipeline=5 must be from 1 to the model's 4 layers" in fails("config", "parallel.pipeline=5")
    assert "parallel.tensor=3 does not divide the model's 4 heads" in fails("config", "parallel.tensor=3")
    assert "12 or less" in fails("config", "train.steps=null", "train.epochs=1", "train.groups_per_step=13")


def test_unused_reference_knobs(fails: Rpo) -> None:
    """Catches a reference that a method without one would load, or ignore, without a word."""
    sft = ["objective.method=sft", "objective.beta=null", "objective.eta=null"]
    assert "reference.path is not used" in fails("train", *sft, "reference.path=x")
    assert "reference.mode is not used" in fails("train", *sft, "reference.mode=stored")
    assert "reference.offload is not used: objective.method=sft" in fails("train", *sft, "reference.offload=true")
    assert "nothing to score" in fails("score", *sft)


def test_columns_that_a_method_lacks_or_does_not_read(fails: Rpo) -> None:
    """Catches a transform that nobody applies, sources that are all taken for the policy's own, and a KL over the
    vocabulary from a store that holds one number per response."""
    bare = ["objective.beta=null", "objective.eta=null"]
    message = fails("train", *bare, "objective.method=sft", "objective.responses=all", "rewards.standardise=group")
    assert "`rewards` is not used" in message
    assert "sft reads no rewards" in message
    wrpo = ["objective.method=wrpo", "objective.eta=null"]
    assert "data.source_column" in fails("train", *wrpo)
    assert "reward twice" in fails("train", *wrpo, "rewards.columns=[reward]", "data.source_column=reward")
    message = fails("train", *bare, "objective.method=expo", "reference.mode=stored")
    assert "reference.mode=resident" in message
    assert "kl_estimator=sample" in message


def test_reference_of_another_vocabulary(tmp_path: Path, fails: Rpo) -> None:
    """Catches two distributions compared token by token where the tokens are not the same."""
    tiny.write_model(tmp_path / "other", vocab_size=140)
    bare = ["objective.method=expo", "objective.beta=null", "objective.eta=null"]
    message = fails("train", *bare, f"reference.path={tmp_path / 'other'}")
    assert "vocabulary of 140" in message
    assert "131" in message


def test_layout_that_the_model_cannot_take(tmp_path: Path, fails: Rpo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a layout that would fail deep inside megatron: 2 kv heads over 4 ranks, 5 stages of 4 layers."""
    monkeypatch.setattr("rpo_megatron.training.train.start", lambda parallel: None)
    assert "2 kv heads" in fails("train", "parallel.tensor=4")
    assert "4 layers" in fails("train", "parallel.pipeline=5")


def test_store_without_rewards(tmp_path: Path, fails: Rpo) -> None:
    """Catches rewards that default to zero, which would train every response towards the reference."""
    prefix = tiny.write_store(tmp_path / "bare", num_groups=4, rewards=False)
    message = fails("train", f"data.train={prefix}")
    assert "no rewards" in message
    assert "rpo_bwd" in message


def test_store_of_another_tokenizer(tmp_path: Path, fails: Rpo) -> None:
    """Catches token ids of one vocabulary fed to a model of another."""
    (tmp_path / "model" / "tokenizer.model").write_bytes(b"this one")
    manifest = json.loads((tmp_path / "train.json").read_text())
    manifest["tokenizer"]["fingerprints"] = {"tokenizer.model": "0" * 64}
    (tmp_path / "train.json").write_text(json.dumps(manifest))
    assert "another tokenizer" in fails("train")
    manifest["tokenizer"] |= {"fingerprints": {}, "vocab_size": 1000}
    (tmp_path / "train.json").write_text(json.dumps(manifest))
    message = fails("train")
    assert "vocabulary of 1000" in message
    assert "131" in message


def test_responses_longer_than_the_model_reads(tmp_path: Path, fails: Rpo) -> None:
    """Catches positions past the trained context, which a rotary model computes without complaint."""
    tiny.write_model(tmp_path / "short", max_position_embeddings=16)
    message = fails("train", f"model.path={tmp_path / 'short'}")
    assert "at most 16" in message
    assert "max_length=16" in message


@pytest.mark.parametrize("file", ["train.bin", "train.idx", "train.reward.bin"])
def test_truncated_store(tmp_path: Path, fails: Rpo, file: str) -> None:
    """Catches a half-copied store, which megatron's own reader notices late or never."""
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:-3])
    assert file in fails("train")


def test_reference_of_another_model(tmp_path: Path, fails: Rpo) -> None:
    """Catches stored log-probs that belong to other weights: the loss would be wrong from the first step on."""
    assert cli.main(["score", str(tmp_path / "run.yaml")]) == 0
    stop()
    tiny.write_model(tmp_path / "other", seed=5)
    message = fails("train", "reference.mode=stored", f"reference.path={tmp_path / 'other'}")
    assert "weights" in message
    assert "rpo score" in message


def test_nothing_is_loaded_before_the_reference_fits(
    fails: Rpo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches minutes of loading 70B weights before a message that could have come first."""
    monkeypatch.setattr(
        "rpo_megatron.training.train.build_policy", lambda *args, **options: pytest.fail("built a model")
    )
    monkeypatch.setattr("rpo_megatron.training.score.load_reference", lambda *args: pytest.fail("built a reference"))
    write_reference(
        Store.open(str(tmp_path / "train")),
        [np.zeros(k) for k in Store.open(str(tmp_path / "train")).num_responses_D],
        identity={"weights": "others"},
    )
    assert "made by another reference: precision" in fails("train", "reference.mode=stored")
    tiny.write_model(tmp_path / "other", vocab_size=64)
    assert "vocabulary of 131" in fails("train", f"reference.path={tmp_path / 'other'}")


def test_weights_that_are_not_the_models(tmp_path: Path, fails: Rpo) -> None:
    """Catches a tensor that is left at its initial value because its name is not in the file."""
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    message = fails("train")
    assert "model.layers.3" in message
    assert "config.json" in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["precision=bf16"], ["precision", "fp32 there, bf16 here"]),
        (["train.groups_per_step=5"], ["groups_per_step", "6 there, 5 here"]),
        (["seed=7"], ["seed", "1234 there, 7 here"]),
        (["data.train={directory}/second"], ["data", "data.train"]),
        (["reference.path={directory}/other"], ["reference", "weights"]),
        (["model.path={directory}/wide", "reference.path={directory}/model"], ["another model", "ffn_size", "64 here"]),
        (["checkpoint.resume=never"], ["checkpoint.resume=never", "has checkpoints already"]),
    ],
)
def test_checkpoint_of_another_run(
    tmp_path: Path, trained: Path, fails: Rpo, overrides: list[str], words: list[str]
) -> None:
    """Catches a resume that goes on with other data, another reference or another model under the old name."""
    tiny.write_store(tmp_path / "second", num_groups=9, seed=3)
    tiny.write_model(tmp_path / "other", seed=9)
    tiny.write_model(tmp_path / "wide", intermediate_size=64)
    before = (trained / "config.yaml").read_text()
    message = fails("train", *(override.format(directory=tmp_path) for override in overrides))
    for word in words:
        assert word in message
    assert (trained / "config.yaml").read_text() == before, "a refused run leaves the directory as it was"


def test_damaged_checkpoints(trained: Path, fails: Rpo) -> None:
    """Catches one flipped bit in a shard, a missing file, a torn state.json and a pointer into nothing."""
    checkpoint = trained / "checkpoints" / "step-00000001"
    shard = next((checkpoint / "shards").glob("*.distcp"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-100] + bytes([good[-100] ^ 1]) + good[-99:])
    assert shard.name in fails("train")
    shard.unlink()
    assert shard.name in fails("train")
    shard.write_bytes(good)
    (checkpoint / "hf" / "config.json").write_text("{}")
    assert "hf/config.json" in fails("train")
    state = (checkpoint / "state.json").read_text()
    (checkpoint / "state.json").write_text(state[: len(state) // 2])
    assert "damaged" in fails("train")
    (trained / "checkpoints" / "latest").write_text("step-00000009\n")
    assert "step-00000009" in fails("train")


def test_export_refuses_what_it_cannot_do(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an export over an existing directory, and one of something that is no checkpoint."""
    for load, save, word in [
        (trained, tmp_path / "model", "exists already"),
        (tmp_path / "model", tmp_path / "new", "Hugging Face directory already"),
        (tmp_path / "nothing", tmp_path / "new", "not a directory"),
    ]:
        assert cli.main(["export", str(load), f"save={save}"]) == 2
        stop()
        assert word in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
