"""`rpo plan` on the command line."""

import re
from pathlib import Path

import pytest

from rpo_megatron import cli
from rpo_megatron.config_io import dump
from rpo_megatron.config_verbs import PlanConfig
from rpo_megatron.errors import UserError
from rpo_megatron.planning.memory import GPU
from rpo_megatron.planning.question import ask
from rpo_megatron.training.resolve import resolve
from tests import tiny
from tests.tiny import run_config, write_store


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code = cli.main(["plan", *words])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["plan", *words]) == 2
    return capsys.readouterr().err


def test_model_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an answer without its premises, or one that reads like a measurement."""
    text = plan(capsys, "model=Llama-3.1-8B", "gpu=H100", "gpus=8", "top=2")
    assert "8.03 billion parameters" in text
    assert "prompts of 1,024 tokens, 4 responses of 512 (given)" in text
    assert re.search(r"fastest first, 2 of \d+ \(estimate, not measured\)", text)
    assert "a checkpoint is 112 GB" in text
    assert "assumed, not measured" in text
    assert "to run the first: parallel.tensor=2 parallel.pipeline=1 parallel.sequence=true" in text
    assert text.count(" yes ") + text.count("  -  ") >= 2


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """That is an answer, with the term that breaks."""
    text = plan(capsys, "model=llama-3.1-70b", "gpu=A100", "gpus=1")
    assert "no layout fits" in text
    assert "tensor 1 x pipeline 1: weights (" in text


def test_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's model, store, batch, precision and method are planned, and its own layout is judged: sft reads no
    reference, 6 groups a step."""
    config = run_config(
        tmp_path, "parallel.tensor=2", "objective.method=sft", "objective.beta=null", "objective.eta=null"
    )
    file = tmp_path / "run.yaml"
    file.write_text(dump(config))
    text = plan(capsys, str(file), "gpu=H100", "gpus=2")
    assert f"{tmp_path / 'train'}: 12 groups" in text
    assert "6 groups; reference: none" in text
    assert "fp32" in text.splitlines()[0]
    assert "the run's own layout" in text
    own = text.split("the run's own layout")[1].splitlines()[2].split()
    assert own[:3] == ["2", "1", "1"]
    assert "multiple of 2" in refused(capsys, str(file), "gpu=H100", "gpus=3")


def test_run_whose_store_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lengths are then given, and it is said; a model by name stands in for one that is not here."""
    file = tmp_path / "run.yaml"
    file.write_text(dump(run_config(tmp_path)).replace(str(tmp_path / "train"), "nowhere/train"))
    text = plan(capsys, str(file), "gpu=H200", "gpus=8", "model=llama-3.1-8b", "prompt=100", "precision=bf16")
    assert "prompts of 100 tokens, 4 responses of 512 (given: the run's store 'nowhere/train' is not here)" in text
    assert "llama-3.1-8b" in text


def test_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a manifest that is not read."""
    prefix = write_store(tmp_path / "store", num_groups=5)
    text = plan(capsys, "model=llama-3.2-1b", f"store={prefix}", "gpu=B200", "gpus=4")
    assert f"{prefix}: 5 groups" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpu=H100", "gpus=8"], "give a run (rpo plan run.yaml ...) or a model"),
        (["gpu=H100", "gpus=8", "model=lama-3.1-8b"], "did you mean 'llama-3.1-8b'"),
        (["gpu=V100", "gpus=8", "model=llama-3.1-8b"], "one of A100, H100, H200, B200"),
        (["gpu=H100", "gpus=0", "model=llama-3.1-8b"], "gpus must be at least 1"),
        (["gpu=H100", "gpus=8", "model=llama-3.1-8b", "groups_per_step=0"], "groups_per_step must be at least 1"),
        (["gpu=H100", "gpus=8", "model=llama-3.1-8b", "efficiency=2"], "efficiency must be in (0, 1]"),
        (["gpu=H100", "gpus=8", "model=llama-3.1-8b", "store=nowhere"], "there is no store at 'nowhere'"),
        (["run.yml", "gpu=H100", "gpus=8"], "config file 'run.yml' does not exist"),
    ],
)
def test_bad_questions(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    """One message each, that says what to do."""
    assert message in refused(capsys, *words)


def test_mixture_of_experts(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan whose experts are spread, and whose words to run it do not say so."""
    text = plan(capsys, "model=qwen3-235b-a22b", "gpu=H100", "gpus=256", "groups_per_step=512")
    assert "235.09 billion parameters (22.19 billion of them per token)" in text.splitlines()[0]
    assert " expert " in text
    assert "parallel.expert=" in text


def test_small_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches numbers that are rounded to 0."""
    (tmp_path / "run.yaml").write_text(dump(run_config(tmp_path)))
    text = plan(capsys, str(tmp_path / "run.yaml"), "gpu=H100", "gpus=2")
    assert ": 39,392 parameters, 4 layers" in text
    assert " 0.00 " not in text[text.index("s/step") : text.index("memory of the first")]


def test_chunks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same of chunks of layers: in what is found, and of a run's own."""
    text = plan(capsys, "model=llama-3.1-70b", "gpu=H100", "gpus=512", "groups_per_step=1024", "recompute=none")
    assert " virtual 4" in text
    assert "parallel.pipeline=4 parallel.virtual=4 " in text
    file = tmp_path / "run.yaml"
    file.write_text(dump(run_config(tmp_path, "parallel.pipeline=2", "parallel.virtual=2")))
    own = plan(capsys, str(file), "gpu=H100", "gpus=2").split("the run's own layout")[1].splitlines()[2]
    assert own.endswith(" virtual 2")


@pytest.mark.parametrize(
    ("family", "words", "message"),
    [
        ("mixtral", ["parallel.expert=3"], "parallel.expert=3 does not divide the experts"),
        ("mixtral", ["parallel.tensor=2"], "needs parallel.sequence=true"),
        ("llama", ["parallel.context=3"], "parallel.context=3 does not divide"),
        ("deepseek_v3", ["fp8.recipe=tensorwise", "precision=bf16"], "not supported with latent attention"),
        ("gpt_oss", ["kernels.layers=transformer_engine"], "not supported with biases"),
    ],
)
def test_what_train_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, words: list[str], message: str
) -> None:
    """Catches figures for a run that cannot start, and a config that is printed as if it could."""
    tiny.write_model(tmp_path / "model", **tiny.FAMILIES[family])
    config, file = run_config(tmp_path, *words), tmp_path / "run.yaml"
    with pytest.raises(UserError, match=message):
        resolve(config)
    file.write_text(dump(config))
    assert message in refused(capsys, str(file), "gpu=H100", "gpus=24")
    assert cli.main(["config", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_what_no_layout_could_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same where no run is asked about, or not its model; and a reference that is not there."""
    assert "latent attention" in refused(capsys, "model=deepseek-v3", "gpu=H100", "gpus=8", "fp8=true")
    tiny.write_model(tmp_path / "model", **tiny.FAMILIES["mixtral"])
    file = tmp_path / "run.yaml"
    file.write_text(dump(run_config(tmp_path, "parallel.expert=4")))
    assert "does not divide the 2 processes" in refused(capsys, str(file), "gpu=H100", "gpus=2")
    assert "give lora_rank" in refused(capsys, str(file), "gpu=H100", "gpus=4", "reference=base")


def test_fp8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run, or asked for; not on a GPU without it."""
    file = tmp_path / "run.yaml"
    file.write_text(dump(run_config(tmp_path, "fp8.recipe=tensorwise", "fp8.reference_weights=true", "precision=bf16")))
    text = plan(capsys, str(file), "gpu=H100", "gpus=2")
    assert "bf16, matrices in FP8" in text.splitlines()[0]
    assert "reference: resident_fp8" in text
    assert "an A100 has no FP8" in refused(capsys, "model=llama-3.1-8b", "gpu=A100", "gpus=8", "fp8=true")
    words = ("model=llama-3.1-8b", "gpu=H100", "gpus=8", "reference=resident_fp8")
    assert "plan with fp8=true" in refused(capsys, *words)
    assert "FP8 matrices 1.6 times as fast" in plan(capsys, *words, "fp8=true")


def test_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run, or asked for, or taken back: with it the policy is its own reference, unless there is another."""
    file, other = tmp_path / "run.yaml", f"reference.path={tmp_path / 'model'}"
    for words, asked, reference in (
        (["lora.rank=2"], [], "base"),
        ([], ["lora_rank=2"], "base"),
        (["lora.rank=2", other], [], "resident"),
        (["lora.rank=2"], ["lora_rank=0"], "resident"),
    ):
        file.write_text(dump(run_config(tmp_path, *words)))
        text = plan(capsys, str(file), "gpu=H100", "gpus=1", *asked)
        assert f"reference: {reference}\n" in text, words
        assert ("the others frozen" in text) == (asked != ["lora_rank=0"]), words
    assert "rank 16: 41.9 million" in plan(capsys, "model=llama-3.1-8b", "gpu=H100", "gpus=1", "lora_rank=16")
    assert "give lora_rank" in refused(capsys, "model=llama-3.1-8b", "gpu=H100", "gpus=1", "reference=base")


def test_run_without_packing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each of the 6 groups, in the run's own layout as in the others; no number of tokens to set."""
    file = tmp_path / "run.yaml"
    file.write_text(dump(run_config(tmp_path, "data.packing=false")))
    text = plan(capsys, str(file), "gpu=H100", "gpus=1")
    own = text.split("the run's own layout")[1].splitlines()[2].split()
    assert own[6] == "6"
    assert "tokens_per_microbatch" not in text


def test_kernels_of_a_run(tmp_path: Path) -> None:
    """A run that names its attention, or its layers, is planned with what these keep."""
    file = tmp_path / "run.yaml"
    for name, joined in (("auto", GPU.joined_keys), ("sdpa", True), ("merged", False)):
        file.write_text(dump(run_config(tmp_path, f"kernels.attention={name}")))
        asked = ask(PlanConfig(gpu="H100", gpus=1, run=str(file)))
        assert asked.question.kernels.joined_keys == joined
        assert asked.question.kernels.forgets
        assert not asked.question.timing.offloaded_moments
    file.write_text(dump(run_config(tmp_path, "kernels.layers=transformer_engine")))
    assert not ask(PlanConfig(gpu="H100", gpus=1, run=str(file))).question.kernels.forgets
    file.write_text(dump(run_config(tmp_path, "optimizer.offload=true")))
    assert ask(PlanConfig(gpu="H100", gpus=1, run=str(file))).question.timing.offloaded_moments
