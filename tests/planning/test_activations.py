"""What the planner says that a layer keeps for backward, against what torch saves: tensor by tensor, on a CPU."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from rpo_megatron.config import KernelsConfig, ParallelConfig
from rpo_megatron.distributed import Groups, start, stop
from rpo_megatron.model import sinks
from rpo_megatron.model.adapter import Adapter, possible_targets
from rpo_megatron.model.attention import choose_attention
from rpo_megatron.model.build import build
from rpo_megatron.model.logprobs import KEEP_MIB
from rpo_megatron.model.lora import attach
from rpo_megatron.model.products import PIECE_BYTES
from rpo_megatron.model.row import Row, Segments
from rpo_megatron.model.shape import read_shape
from rpo_megatron.model.vocab import TILE_BYTES
from rpo_megatron.planning import memory
from rpo_megatron.planning.layout import Layout, Recompute
from rpo_megatron.planning.memory import CPU, GPU, Kept, Setting, stage_memory
from rpo_megatron.planning.models import Model
from tests.tiny import LLAMA, QWEN3

PROMPT, RESPONSE, K = 64, 32, 4
SCORED = K * RESPONSE
SIZES: dict[str, Any] = {
    **LLAMA,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
}


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": QWEN3,
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
    },
}
FAMILIES["qwen2_moe"] = {**FAMILIES["qwen3_moe"], "model_type": "qwen2_moe", "shared_expert_intermediate_size": 96}
FAMILIES["deepseek_v3"] = {
    **{"model_type": "deepseek_v3", "num_key_value_heads": 8, "n_routed_experts": 8, "num_experts_per_tok": 2},
    **{"n_group": 1, "topk_group": 1, "moe_intermediate_size": 48, "first_k_dense_replace": 0},
    **{"q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
}
FAMILIES["deepseek_v3, queries at once"] = {**FAMILIES["deepseek_v3"], "q_lora_rank": None, "v_head_dim": 24}
FAMILIES["gpt_oss"] = {
    "model_type": "gpt_oss",
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 48,
}
WITHIN = {"llama": 0.01, "qwen3": 0.01, **dict.fromkeys(list(FAMILIES)[2:], 0.05)}


@pytest.fixture
def groups() -> Iterator[Groups]:
    yield start(ParallelConfig())
    stop()


def tiny_model(directory: Path, **changes: Any) -> Model:
    (directory / "config.json").write_text(json.dumps({**SIZES, **changes}))
    return Model(name="tiny", shape=read_shape(directory))


def packed_row(*, share: bool) -> Row:
    """One group."""
    lengths = [PROMPT, *[RESPONSE] * K] if share else [PROMPT + RESPONSE] * K
    tokens = sum(lengths)
    return Row(
        tokens_1T=torch.randint(0, 131, (1, tokens)),
        positions_T=torch.arange(tokens),
        segments=Segments(lengths=lengths, prompts=[-1, *[0] * K] if share else [-1] * K),
        scored_position_N=torch.arange(tokens - SCORED, tokens) - 1,
        scored_label_N=torch.randint(0, 131, (SCORED,)),
        last_position_GK=torch.zeros(1, K, dtype=torch.long),
        before_last_position_GK=torch.zeros(1, K, dtype=torch.long),
    )


def saved_bytes(
    model: Model,
    row: Row,
    groups: Groups,
    *,
    precision: Literal["fp32", "bf16"],
    attention: Literal["merged", "sdpa"],
    recompute: Recompute = "none",
) -> int:
    """Memory that a forward pass leaves to its backward, weights aside: a tensor's whole storage, each counted once.
    What is forgotten (model/forgetful.py) has none by then."""
    built = build(
        model.shape,
        precision=precision,
        sequence_parallel=False,
        groups=groups,
        kernels=KernelsConfig(attention=attention),
        recompute=recompute,
    )
    if model.adapter is not None:
        attach(built, model.adapter)
    for parameter in built.parameters():
        parameter.data.normal_(0, 0.02)
    weights = {parameter.untyped_storage().data_ptr() for parameter in built.parameters()}
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = built(row)
    assert result.logp_N.requires_grad
    storages = [tensor.untyped_storage() for tensor in saved]
    by_address = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for address, size in by_address.items() if address not in weights)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "attention", "share"),
    [
        *(("llama", attention, share) for attention in ("merged", "sdpa") for share in (True, False)),
        ("qwen3", "merged", True),
        ("qwen3_moe", "merged", True),
        ("qwen2_moe", "merged", True),
        ("deepseek_v3", "merged", True),
        ("deepseek_v3", "sdpa", True),
        ("deepseek_v3, queries at once", "merged", True),
        ("deepseek_v3, queries at once", "sdpa", False),
        ("gpt_oss", "merged", True),
        ("gpt_oss", "sdpa", True),
    ],
)
def test_kept_for_backward(
    tmp_path: Path,
    groups: Groups,
    family: str,
    precision: Literal["fp32", "bf16"],
    attention: Literal["merged", "sdpa"],
    share: bool,
) -> None:
    """Catches a tensor that the planner forgets or counts twice, or counts in the wrong precision; and a change of the
    layers that makes them keep more."""
    changes = FAMILIES[family]
    row = packed_row(share=share)
    tokens = row.tokens_1T.numel()
    measured = [
        saved_bytes(
            tiny_model(tmp_path, num_hidden_layers=layers, **changes),
            row,
            groups,
            precision=precision,
            attention=attention,
        )
        for layers in (1, 2)
    ]
    joined = attention == "sdpa"
    repeated = K * (PROMPT + RESPONSE) if share and joined else 0
    setting = Setting(
        model=tiny_model(tmp_path, num_hidden_layers=2, **changes),
        precision=precision,
        reference="stored",
        kernels=replace(CPU, joined_keys=joined),
        row=memory.Row(tokens=tokens, scored=SCORED, repeated=repeated),
        microbatches=1,
    )
    kept = Kept.of(setting, Layout())
    assert kept.largest == pytest.approx(measured[1] - measured[0], rel=WITHIN[family])
    terms = stage_memory(setting, Layout(), 0)
    assert terms["attention"] + terms["activations"] == pytest.approx(measured[1], rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kept_with_an_adapter(tmp_path: Path, groups: Groups, precision: Literal["fp32", "bf16"]) -> None:
    """Catches inputs that a frozen matrix keeps beside its adapter, and what the adapter keeps for itself."""
    row = packed_row(share=True)
    models = [tiny_model(tmp_path, num_hidden_layers=layers) for layers in (1, 2)]
    adapter = Adapter(rank=8, alpha=8, targets=possible_targets(models[0].shape))
    models = [replace(model, adapter=adapter) for model in models]
    one, two = (saved_bytes(model, row, groups, precision=precision, attention="merged") for model in models)
    setting = Setting(
        model=models[1],
        precision=precision,
        reference="base",
        kernels=CPU,
        row=memory.Row(tokens=row.tokens_1T.numel(), scored=SCORED),
        microbatches=1,
    )
    assert Kept.of(setting, Layout()).largest == pytest.approx(two - one, rel=0.02)


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
def test_kept_with_recomputation(tmp_path: Path, groups: Groups, recompute: Recompute) -> None:
    """Catches a layer that keeps what is computed again, or the planner counting it."""
    row = packed_row(share=True)
    models = [tiny_model(tmp_path, num_hidden_layers=layers) for layers in (1, 2)]
    one, two = (
        saved_bytes(model, row, groups, precision="bf16", attention="merged", recompute=recompute) for model in models
    )
    setting = Setting(
        model=models[1],
        precision="bf16",
        reference="stored",
        kernels=CPU,
        row=memory.Row(tokens=row.tokens_1T.numel(), scored=SCORED),
        microbatches=1,
    )
    memories = [stage_memory(replace(setting, model=model), Layout(recompute=recompute), 0) for model in models]
    expected = [terms["attention"] + terms["activations"] for terms in memories]
    assert expected[1] - expected[0] == pytest.approx(two - one, rel=0.01)


def test_planned_kernels_are_those_of_the_program() -> None:
    """Catches a plan for GPUs that assumes other tiles or another attention than the program uses on them."""
    assert TILE_BYTES["cuda"] == memory.TILE_BYTES
    assert PIECE_BYTES["cuda"] == memory.PIECE_BYTES
    assert sinks.ALIGN == memory.SINK_NUMBERS
    assert {device: mib * 2**20 for device, mib in KEEP_MIB.items()} == memory.KEPT_LOGITS
    assert GPU.joined_keys == (choose_attention("auto", torch.device("cuda")) == "sdpa")
    assert CPU.joined_keys == (choose_attention("auto", torch.device("cpu")) == "sdpa")
