"""How many numbers a rank holds: by hand, in sum over the ranks, and against megatron's own buffers."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.config import OptimizerConfig, ParallelConfig
from rpo_megatron.distributed import Groups, start, stop
from rpo_megatron.model.build import build, wrap
from rpo_megatron.model.shape import num_parameters, padded_vocab, read_shape
from rpo_megatron.planning.layout import Layers, Layout, layers_of, rank_numbers
from rpo_megatron.planning.memory import CPU, Row, Setting, stage_memory
from rpo_megatron.planning.models import CONFIGS, Model, count_active, count_parameters, find_model
from rpo_megatron.training.optimizer import build_optimizer
from tests.tiny import FAMILIES, LLAMA


@pytest.fixture
def groups() -> Iterator[Groups]:
    yield start(ParallelConfig())
    stop()


def tiny_model(directory: Path, **changes: Any) -> Model:
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    return Model(name="tiny", shape=read_shape(directory))


def test_public_counts() -> None:
    """The sizes that the models' cards give, to the last weight; catches a wrong built-in config."""
    counts = {name: count_parameters(find_model(name)) for name in CONFIGS}
    assert counts["llama-3.2-1b"] == 1_235_814_400
    assert counts["llama-3.1-8b"] == 8_030_261_248
    assert counts["llama-3.1-70b"] == 70_553_706_496
    assert counts["llama-3.1-405b"] == 405_853_388_800
    assert counts["qwen3-235b-a22b"] == 235_093_634_560
    assert counts["deepseek-v3"] == 671_026_419_200 - 58 * 256  # without the routers' biases
    assert count_active(find_model("DeepSeek-V3")) == pytest.approx(37e9, rel=2e-2)
    assert count_active(find_model("Qwen3-235B-A22B")) == pytest.approx(22.2e9, rel=2e-3)
    assert count_active(find_model("llama-3.1-8b")) == counts["llama-3.1-8b"]


def test_first_and_last_stage_by_hand() -> None:
    """Llama-3.1-8B over tensor 2 x pipeline 4: a layer has 4096 x (2 x 4096 + 2 x 1024 + 3 x 14336) = 218,103,808
    numbers that are split and 8,192 that are not; a stage has 8; the vocabulary is 128,256 = 1,002 x 128 rows."""
    model, layout = find_model("llama-3.1-8b"), Layout(tensor=2, pipeline=4)
    layers = 8 * (218_103_808 / 2 + 8_192)
    assert rank_numbers(model, layout, 0).total == layers + 128_256 * 4096 / 2
    assert rank_numbers(model, layout, 1).total == layers
    assert rank_numbers(model, layout, 3).total == layers + 128_256 * 4096 / 2 + 4096


@settings(deadline=None, max_examples=40)
@given(
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.integers(1, 16),
    name=st.sampled_from(["llama-3.1-8b", "llama-3.2-1b"]),
)
def test_ranks_add_up_to_the_model(tensor: int, pipeline: int, name: str) -> None:
    """Catches a stage without its embedding or with one too many: the ranks together hold the model, its padding, a
    copy of what is not split for each tensor rank, and of tied embeddings on the last stage."""
    model, layout = find_model(name), Layout(tensor=tensor, pipeline=pipeline)
    shape = model.shape
    held = tensor * sum(rank_numbers(model, layout, stage).total for stage in range(pipeline))
    embeddings = 1 if shape.tied_embeddings and pipeline == 1 else 2
    whole = (tensor - 1) * (2 * shape.num_layers + 1) * shape.hidden_size
    copy = shape.tied_embeddings and pipeline > 1
    padding = (padded_vocab(shape) - shape.vocab_size) * shape.hidden_size
    expected = num_parameters(shape) + embeddings * padding + whole + copy * shape.vocab_size * shape.hidden_size
    assert held == pytest.approx(expected, rel=1e-12)


def test_experts_are_split_over_expert_ranks() -> None:
    """Of 128 experts of 3 x 4096 x 1536 numbers, each of 8 expert ranks holds 16 whole ones in every one of the 94
    layers, or without expert ranks each of 4 tensor ranks a quarter of all; what is not an expert is on all of them."""
    model = find_model("qwen3-235b-a22b")
    numbers = rank_numbers(model, Layout(tensor=4, data=16, expert=8), 0)
    assert numbers.expert == 94 * 16 * 3 * 4096 * 1536
    assert rank_numbers(model, Layout(tensor=4, data=16), 0).expert == 94 * 128 * 3 * 4096 * 1536 / 4
    attention, norms = 4096 * (2 * 8192 + 2 * 512), 2 * 4096 + 2 * 128
    assert numbers.matrices == numbers.expert + 94 * attention / 4
    assert numbers.dense == 94 * (attention / 4 + norms + 128 * 4096) + 2 * 151_936 * 4096 / 4 + 4096
    assert Layout(tensor=4, data=16, expert=8).expert_shards == 4 * 16 / 8
    assert Layout(tensor=4, data=16).expert_shards == 16


def test_layers_without_experts(tmp_path: Path) -> None:
    """Of 4 layers the second has a feed-forward of its own: it is on the first of two stages."""
    model = tiny_model(tmp_path, **FAMILIES["qwen3_moe"])
    assert layers_of(model, 2, 0) == Layers(dense=1, expert=1)
    assert layers_of(model, 2, 1) == Layers(dense=0, expert=2)
    assert layers_of(replace(model, shape=replace(model.shape, num_layers=8)), 2, 0, 2) == Layers(dense=1, expert=3)
    held = sum(rank_numbers(model, Layout(pipeline=2), stage).total for stage in (0, 1))
    assert held == num_parameters(model.shape) + 2 * (256 - 131) * 32


EVEN = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}
"""Sizes that are all multiples of 128: megatron's buffers need no padding."""
EVEN_BIASES = {
    **{"num_hidden_layers": 1, "num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 2},
    **{"num_local_experts": 64, "intermediate_size": 64},
}
"""GPT-OSS has a number for every head and every expert, too."""


FAMILIES_COUNTED = ["llama", "qwen2", "qwen3", "gemma2", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss"]


@pytest.mark.parametrize("family", FAMILIES_COUNTED)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_of_megatrons_buffers(
    tmp_path: Path, groups: Groups, family: str, precision: Literal["fp32", "bf16"]
) -> None:
    """Weights, gradients and optimizer states of a real model under DDP and the distributed optimizer, to the byte;
    catches another precision, a tensor that is not counted, or a state that the planner does not know."""
    even = {
        **FAMILIES[family],
        **EVEN,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        **{"q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64},
        "head_dim": 128 if family == "qwen3" else 64,
        **(EVEN_BIASES if family == "gpt_oss" else {}),
    }
    model = tiny_model(tmp_path, **even)
    ddp = wrap(build(model.shape, precision=precision, sequence_parallel=False, groups=groups))
    optimizer = build_optimizer(OptimizerConfig(lr=0.01), ddp, precision)
    for parameter in ddp.parameters():
        parameter.data.normal_(0, 0.02)
        if parameter.requires_grad:
            parameter.main_grad.fill_(1.0)
    optimizer.step()
    setting = Setting(
        model=model, precision=precision, reference="stored", kernels=CPU, row=Row(tokens=1, scored=1), microbatches=1
    )
    terms = stage_memory(setting, Layout(), 0)
    buffers = ddp.buffers + ddp.expert_parallel_buffers
    assert sum(buffer.param_data.nbytes for buffer in buffers) == terms["weights"]
    assert sum(buffer.grad_data.nbytes for buffer in buffers) == terms["gradients"]
    assert held_states(ddp, optimizer) == terms["optimizer"]


def held_states(ddp: Any, optimizer: Any) -> int:
    """Bytes of master weights (where they are not the weights themselves) and moments."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in ddp.parameters()}
    masters = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    own = sum(tensor.nbytes for tensor in masters if tensor.untyped_storage().data_ptr() not in weights)
    inner = [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    return own + sum(moment.nbytes for part in inner for state in part.state.values() for moment in state.values())
