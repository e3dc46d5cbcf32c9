"""The runs under examples/, as far as they can be tried without their machines: each resolves against a directory with
the published config.json of its model, fits by the planner, and is built under its layout on torch's meta device."""

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from rpo_megatron import cli, distributed
from rpo_megatron.config import RunConfig
from rpo_megatron.config_io import dump, load
from rpo_megatron.config_verbs import PlanConfig
from rpo_megatron.distributed import Groups
from rpo_megatron.model.build import build
from rpo_megatron.model.shape import num_parameters, padded_vocab, read_shape
from rpo_megatron.planning.hardware import GIB
from rpo_megatron.planning.layouts import Estimate
from rpo_megatron.planning.question import ask
from tests import tiny
from tests.launch.shell import RECORD, shell_environment, write_command
from tests.parallel.launch import ROOT

LLAMA31: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
LLAMA31_8B = {
    **LLAMA31,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA31_70B = {
    **LLAMA31,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "attention_bias": False,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    file: str
    config_json: dict[str, Any]
    parameters: float
    """As its publishers say, in billions."""
    processes: int

    @property
    def path(self) -> Path:
        return ROOT / "examples" / self.file

    @property
    def header(self) -> str:
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return "\n".join(line.lstrip("# ") for line in lines if line.startswith("#"))


RECIPES = [
    Recipe(file="llama31_8b_h100/bf16.yaml", config_json=LLAMA31_8B, parameters=8.03, processes=8),
    Recipe(file="llama31_8b_h100/fp8.yaml", config_json=LLAMA31_8B, parameters=8.03, processes=8),
    Recipe(file="llama31_8b_1gpu/lora.yaml", config_json=LLAMA31_8B, parameters=8.03, processes=1),
    Recipe(file="llama31_70b_4nodes/bf16.yaml", config_json=LLAMA31_70B, parameters=70.55, processes=32),
    Recipe(file="qwen3_30b_a3b_2nodes/bf16.yaml", config_json=QWEN3_30B_A3B, parameters=30.53, processes=16),
    Recipe(file="qwen2_5_0_5b_1gpu/bf16.yaml", config_json=QWEN25_05B, parameters=0.494, processes=1),
    Recipe(file="qwen2_5_0_5b_cpu/fp32.yaml", config_json=QWEN25_05B, parameters=0.494, processes=1),
]
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.file)


@pytest.fixture
def paths(recipe: Recipe, tmp_path: Path) -> list[str]:
    """Overrides: a directory with the model's config.json and next to nothing for weights, and a store."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(recipe.config_json), encoding="utf-8")
    save_file({"nothing": torch.zeros(1)}, model / "model.safetensors")
    store = tiny.write_store(tmp_path / "train", num_groups=300)
    return [f"model.path={model}", f"data.train={store}", f"run_dir={tmp_path / 'run'}"]


def test_every_example_is_listed() -> None:
    """Catches a recipe that nobody tries."""
    listed = {recipe.path for recipe in RECIPES}
    others = {ROOT / "examples" / name for name in ("quickstart", "expo_bandits")}
    assert {path for path in (ROOT / "examples").glob("*/*.yaml") if path.parent not in others} == listed


@every_recipe
def test_config_resolves(recipe: Recipe, paths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a key that was renamed, a knob that the method does not read, a layout that does not divide the model, a
    model that we do not support."""
    assert cli.main(["config", str(recipe.path), *paths]) == 0
    printed = capsys.readouterr().out
    assert "not known yet" not in printed
    count = re.search(r"([\d,]+) parameters", printed)
    assert count is not None
    assert int(count[1].replace(",", "")) / 1e9 == pytest.approx(recipe.parameters, rel=2e-3)


@every_recipe
def test_launch_line(recipe: Recipe, tmp_path: Path) -> None:
    """Catches a header whose command starts another recipe, or another number of processes than its layout needs."""
    (line,) = re.findall(r"^(?:launch/local.sh|sbatch) .*", recipe.header, re.MULTILINE)
    words = line.split()
    assert words[-2:] == ["train", f"examples/{recipe.file}"]
    if words[0] == "sbatch":
        assert words[1:4] == ["--nodes", str(recipe.processes // 8), "launch/slurm.sbatch"]
        return
    commands = write_command(tmp_path / "bin", "torchrun", RECORD)
    environment = shell_environment(commands, RECORD=str(tmp_path / "called"))
    subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True)
    called = (tmp_path / "called-0").read_text().splitlines()
    assert called[called.index("--nproc-per-node") + 1] == str(recipe.processes)


@every_recipe
def test_estimate_in_the_header(recipe: Recipe, paths: list[str], tmp_path: Path) -> None:
    """Catches a layout that does not fit, and an estimate that the planner has revised by 10 % since."""
    figures = re.search(r"(\d+) GiB per GPU, ([\d.]+) s per step\nrpo plan (\S+) (.*)", recipe.header)
    if "_cpu/" in recipe.file:
        assert figures is None
        return
    assert figures is not None
    assert figures[3] == f"examples/{recipe.file}"
    run = tmp_path / "run.yaml"
    run.write_text(dump(load(RunConfig, str(recipe.path), [*paths, "data.train=not/here"])))  # or it plans for that
    asked = ask(load(PlanConfig, None, [f"run={run}", f"model={tmp_path / 'model'}", *figures[4].split()]))
    assert asked.own is not None
    estimate = Estimate(question=asked.question, layout=asked.own)
    assert estimate.fits
    assert estimate.question.timing.cluster.gpus == recipe.processes
    assert float(figures[1]) == pytest.approx(estimate.bytes / GIB, rel=0.1)
    assert float(figures[2]) == pytest.approx(estimate.time.seconds, rel=0.1)


@pytest.fixture
def cluster(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Stands in for all processes of the recipe: gives a function from a rank to its place in the layout."""
    new_group = dist.new_group
    monkeypatch.setattr(dist, "new_group", lambda *ranks, **options: new_group(*ranks, **options | {"backend": "fake"}))

    def place(config: RunConfig, rank: int) -> Groups:
        distributed.stop()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(recipe.processes))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=recipe.processes)
        return replace(distributed.start(config.parallel), device=torch.device("meta"))

    yield place
    distributed.stop()


@every_recipe
def test_model_is_built_under_its_layout(recipe: Recipe, paths: list[str], cluster: Any) -> None:
    """Catches weights that do not divide, and stages that do not add up to the model: the first tensor rank of each
    stage is built, without memory, and holds its share of all parameters. FP8 needs Transformer Engine; the shapes are
    those of bf16."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU megatron allocates on it, whatever torch's default device is")
    config = load(RunConfig, str(recipe.path), [*paths, "fp8.recipe=none", "fp8.reference_weights=false"])
    shape = read_shape(config.model.path)
    parallel, total = config.parallel, 0
    for stage in range(parallel.pipeline):
        first = stage * (recipe.processes // parallel.pipeline)
        groups = cluster(config, first)
        assert (groups.pp.rank, groups.pp.size, groups.tp.rank) == (stage, parallel.pipeline, 0)
        assert groups.dp.size == recipe.processes // (parallel.tensor * parallel.pipeline)
        with torch.device("meta"):
            model = build(shape, precision=config.precision, sequence_parallel=parallel.sequence, groups=groups)
        for name, parameter in model.named_parameters():
            assert parameter.is_meta
            shards = parallel.tensor if getattr(parameter, "tensor_model_parallel", False) else 1
            if parallel.expert > 1 and ".local_experts." in name:
                shards = parallel.expert
            total += parameter.numel() * shards
    padding = (padded_vocab(shape) - shape.vocab_size) * shape.hidden_size
    copies = 1 if shape.tied_embeddings else 2
    assert total == num_parameters(shape) + copies * padding
