"""Layers in Transformer Engine's form hold, compute and save what megatron's own do."""

from pathlib import Path

import pytest
import torch

from rpo_megatron.config import KernelsConfig, ParallelConfig
from rpo_megatron.distributed import start, stop
from rpo_megatron.errors import UserError
from rpo_megatron.model.build import ScoringModel, build
from rpo_megatron.model.shape import read_shape
from rpo_megatron.model.source import find
from rpo_megatron.model.te_layers import canonical_name
from rpo_megatron.model.weights import gather_hf, global_parameters
from rpo_megatron.training import checkpoint
from tests import tiny
from tests.checkpoints import save
from tests.model.rows import random_rows
from tests.model.te_stand_in import stand_in

MODELS = {"tied": {"tie_word_embeddings": True}, **tiny.FAMILIES}
REFUSED = {name: MODELS.pop(name) for name in ("deepseek_v3", "gpt_oss")}


def model_of(directory: Path, layers: str) -> ScoringModel:
    """Built and filled with the weights of a Hugging Face directory."""
    groups = start(ParallelConfig())
    kernels = KernelsConfig(layers=layers)
    with stand_in():
        model = build(read_shape(directory), precision="fp32", sequence_parallel=False, groups=groups, kernels=kernels)
    checkpoint.load_weights(model, find(directory), groups)
    return model


def logps(model: ScoringModel) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(packed.row).logp_N for packed in random_rows(4)])


@pytest.mark.parametrize("name", MODELS)
def test_same_parameters_and_same_numbers(tmp_path: Path, name: str) -> None:
    """Catches a weight that is not found by its name in the other form, a norm's weight that stays 1, a norm that is
    applied twice, and a weight that export misses."""
    tiny.write_model(tmp_path, **MODELS[name])
    for parameter in (own := model_of(tmp_path, "megatron")).parameters():
        torch.nn.init.normal_(parameter, mean=1.0, std=0.5)  # norms, too, are not all 1
    te = model_of(tmp_path, "transformer_engine")
    mine, theirs = global_parameters(own), global_parameters(te)
    assert {name for name, _ in te.named_parameters()} != {name for name, _ in own.named_parameters()}
    assert mine.keys() == theirs.keys()
    for key, parameter in theirs.items():
        parameter.data.copy_(mine[key].data)
    torch.testing.assert_close(logps(te), logps(own), rtol=1e-5, atol=1e-5)
    exported = [dict(gather_hf(model, start(ParallelConfig()))) for model in (own, te)]
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(tensor, exported[1][key]) for key, tensor in exported[0].items())
    stop()


@pytest.mark.parametrize("name", REFUSED)
def test_latent_attention_and_biases_are_refused(tmp_path: Path, name: str) -> None:
    """Catches a run with FP8 whose layers are megatron's without a word, or a traceback."""
    tiny.write_model(tmp_path, **REFUSED[name])
    with pytest.raises(UserError, match=rf"{name}: .*set kernels\.layers=megatron and fp8\.recipe=none"):
        model_of(tmp_path, "transformer_engine")
    stop()


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize(("first", "second"), [("megatron", "transformer_engine"), ("transformer_engine", "megatron")])
def test_checkpoints_are_exchangeable(tmp_path: Path, first: str, second: str, name: str) -> None:
    """Catches a checkpoint that only the layers that wrote it can read: a run that began without FP8 goes on in it."""
    tiny.write_model(tmp_path / "model", **tiny.FAMILIES[name])
    groups = start(ParallelConfig())
    writer = model_of(tmp_path / "model", first)
    for parameter in writer.parameters():
        torch.nn.init.normal_(parameter, mean=1.0, std=0.5)
    save(writer, directory=tmp_path / "saved", companions=tmp_path / "model", groups=groups)
    reader = model_of(tmp_path / "model", second)
    checkpoint.load_weights(reader, find(tmp_path / "saved"), groups)
    written, read = global_parameters(writer), global_parameters(reader)
    assert all(torch.equal(parameter, read[name]) for name, parameter in written.items())
    stop()


def test_names() -> None:
    """Catches a fused norm that is taken for another one."""
    layer = "decoder.layers.3."
    assert canonical_name(layer + "self_attention.linear_qkv.layer_norm_weight") == layer + "input_layernorm.weight"
    assert canonical_name(layer + "mlp.linear_fc1.layer_norm_weight") == layer + "pre_mlp_layernorm.weight"
    assert canonical_name(layer + "mlp.linear_fc1.weight") == layer + "mlp.linear_fc1.weight"
