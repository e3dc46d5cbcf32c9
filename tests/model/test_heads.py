"""Reward models against transformers' ...ForSequenceClassification: values, gradients, export and start."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rpo_megatron.config import ParallelConfig
from rpo_megatron.config_verbs import ExportConfig, ImportConfig
from rpo_megatron.distributed import Groups, start, stop
from rpo_megatron.errors import UserError
from rpo_megatron.model.build import build
from rpo_megatron.model.heads import pooled_position
from rpo_megatron.model.shape import read_shape
from rpo_megatron.model.source import Source, find
from rpo_megatron.model.weights import gather_hf, load_random
from rpo_megatron.training import convert
from rpo_megatron.training.checkpoint import load_weights
from tests import tiny
from tests.model.rows import Packed, load, outcome, pack, random_rows, schedule, value_loss

REWARD: dict[str, Any] = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
MODELS: dict[str, dict[str, Any]] = {
    "llama": REWARD,
    "mistral": {
        **REWARD,
        "architectures": ["MistralForSequenceClassification"],
        "model_type": "mistral",
        "sliding_window": None,
    },
    "qwen2": {**tiny.QWEN2, **REWARD, "architectures": ["Qwen2ForSequenceClassification"], "tie_word_embeddings": True},
    "qwen3": {**tiny.QWEN3, **REWARD, "architectures": ["Qwen3ForSequenceClassification"]},
}


@pytest.fixture
def groups() -> Iterator[Groups]:
    yield start(ParallelConfig())
    stop()


def conversations(rows: list[Packed]) -> list[list[int]]:
    return [prompt + response for row in rows for group in row.groups if group for prompt, response in group]


def our_values(model: Any, rows: list[Packed]) -> list[float]:
    """Of the real responses, in order."""
    with torch.no_grad():
        scores = schedule(model, rows, lambda _, scores: scores.value_GK, forward_only=True, collect_non_loss_data=True)
    return real_values(rows, scores)


def real_values(rows: list[Packed], values: list[Any]) -> list[float]:
    pairs = zip(rows, values, strict=True)
    return [value for packed, value_GK in pairs for value in value_GK[packed.valid()].flatten().tolist()]


def their_model(directory: Path) -> Any:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def their_values(directory: Path, rows: list[Packed]) -> list[float]:
    """One response at a time, without padding."""
    model = their_model(directory)
    with torch.no_grad():
        return [model(torch.tensor([tokens])).logits.item() for tokens in conversations(rows)]


def their_batched_values(directory: Path, rows: list[Packed]) -> list[float]:
    """All responses in one batch, padded on the right with the token that config.json names."""
    model = their_model(directory)
    tokens = conversations(rows)
    width = max(map(len, tokens))
    padded = torch.tensor([t + [model.config.pad_token_id] * (width - len(t)) for t in tokens])
    mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in tokens])
    with torch.no_grad():
        return model(padded, attention_mask=mask).logits[:, 0].tolist()


# ------------------------------------------------------------------------------------------------ the head


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_equal_transformers(tmp_path: Path, groups: Groups, name: str) -> None:
    """Catches a value read at another token than the last, before the final norm, or from a neighbour in the row; and
    a mean over responses instead of groups."""
    tiny.write_model(tmp_path / "model", **MODELS[name])
    rows = random_rows(4)
    result = outcome(load(tmp_path / "model", groups), rows, value_loss, groups)
    model = their_model(tmp_path / "model")
    values_R = torch.cat([model(torch.tensor([tokens])).logits[0] for tokens in conversations(rows)])
    got = real_values(rows, [scores.value_GK for scores in result.scores])
    assert got == pytest.approx(values_R.tolist(), rel=1e-5, abs=1e-5)
    first, second = values_R.view(-1, 2).T
    torch.nn.functional.softplus(second - first).mean().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert result.gradients.keys() == expected.keys()
    for weight, gradient in expected.items():
        assert (result.gradients[weight] - gradient).norm() < 1e-5 * gradient.norm(), weight
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert result.grad_norm == pytest.approx(total.item(), rel=1e-5)


def test_there_is_no_output_layer(tmp_path: Path, groups: Groups) -> None:
    """Catches an output layer that is kept, saved and given optimizer state for nothing."""
    tiny.write_model(tmp_path / "model", **MODELS["qwen2"])
    model = load(tmp_path / "model", groups)
    assert not [name for name, _ in model.named_parameters() if "output_layer" in name]
    assert "score.weight" in model.sharded_state_dict()
    assert "output_layer.weight" not in model.sharded_state_dict()


def test_bf16_values_are_not_rounded(tmp_path: Path, groups: Groups) -> None:
    """Catches values in bf16, where 3.01 and 3.02 are one number and a preference between them is lost."""
    tiny.write_model(tmp_path / "model", **REWARD)
    model = build(read_shape(tmp_path / "model"), precision="bf16", sequence_parallel=False, groups=groups)
    load_weights(model, find(tmp_path / "model"), groups)
    values = our_values(model, random_rows(4))
    assert any(value != float(torch.tensor(value).bfloat16()) for value in values)
    assert values == pytest.approx(their_values(tmp_path / "model", random_rows(4)), abs=0.1)


@pytest.mark.parametrize(("pad_token", "expected"), [(None, [[3, 6]]), (5, [[2, 6]]), (7, [[3, 6]])])
def test_pooled_position_by_hand(groups: Groups, pad_token: int | None, expected: list[list[int]]) -> None:
    """Catches the wrong response moved, or padding inside a response taken for its end."""
    row = pack([(([9, 9], [8, 5]), ([5], [5, 8]))]).row
    assert pooled_position(row, pad_token).tolist() == expected


def test_models_that_pad_with_their_end_of_turn(tmp_path: Path, groups: Groups) -> None:
    """Catches scores that differ from transformers' for such models: it judges the last token that is no padding."""
    tiny.write_model(tmp_path / "model", **REWARD, pad_token_id=2)
    rows = [pack([(([9, 7], [8, 2]), ([9, 7], [6, 11, 2])), (([4], [2]), ([4], [5]))]), pack([None])]
    assert our_values(load(tmp_path / "model", groups), rows) == pytest.approx(
        their_values(tmp_path / "model", rows), rel=1e-5
    )


# ------------------------------------------------------------------------------------------------ export and start


@pytest.mark.parametrize("name", MODELS)
def test_import_and_export(tmp_path: Path, name: str) -> None:
    """Catches a round trip Hugging Face -> checkpoint -> Hugging Face that loses the head, its single label, or the
    padding token that a batch needs."""
    tiny.write_model(tmp_path / "model", **MODELS[name])
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "exported"
    convert.import_(ImportConfig(load=str(tmp_path / "model"), save=str(checkpoint), precision="fp32"))
    convert.export(ExportConfig(load=str(checkpoint), save=str(exported)))
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "model", exported))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    rows = random_rows(4)
    expected = their_values(tmp_path / "model", rows)
    assert their_values(exported, rows) == expected
    assert their_batched_values(exported, rows) == pytest.approx(expected, rel=1e-5)
    groups = start(ParallelConfig())
    model = build(read_shape(checkpoint / "hf"), precision="fp32", sequence_parallel=False, groups=groups)
    load_weights(model, find(checkpoint), groups)
    assert our_values(model, rows) == pytest.approx(expected, rel=1e-5)
    stop()


def language_model(tmp_path: Path, kind: str, **changes: Any) -> Source:
    tiny.write_model(tmp_path / "lm", **changes)
    if kind == "checkpoint":
        convert.import_(ImportConfig(load=str(tmp_path / "lm"), save=str(tmp_path / "lm-checkpoint"), precision="fp32"))
        return find(tmp_path / "lm-checkpoint")
    return find(tmp_path / "lm")


@pytest.mark.parametrize("kind", ["huggingface", "checkpoint"])
@pytest.mark.parametrize("tied", [False, True])
def test_language_model_starts_a_reward_model(tmp_path: Path, kind: str, tied: bool) -> None:
    """Catches a body that is not the language model's, a head that is not drawn (zeros, or whatever was in memory) or
    that another seed does not change."""
    source = language_model(tmp_path, kind, tie_word_embeddings=tied)
    groups = start(ParallelConfig())
    shape = replace(read_shape(source.hf), head="value")
    heads = []
    for seed in (0, 0, 1):
        model = build(shape, precision="fp32", sequence_parallel=False, groups=groups)
        load_weights(model, source, groups, seed=seed)
        weights = dict(gather_hf(model, groups))
        heads.append(weights.pop("score.weight"))
        body = load_file(tmp_path / "lm" / "model.safetensors")
        body.pop("lm_head.weight", None)
        assert weights.keys() == body.keys()
        assert all(torch.equal(weights[key], body[key]) for key in body)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert float(heads[0].std()) == pytest.approx(0.02, rel=0.5)
    random = build(shape, precision="fp32", sequence_parallel=False, groups=groups)
    load_random(random, 0, groups)
    assert torch.equal(dict(gather_hf(random, groups))["score.weight"], heads[0])
    stop()


@pytest.mark.parametrize("kind", ["huggingface", "checkpoint"])
def test_wrong_kind_of_source_is_refused(tmp_path: Path, kind: str) -> None:
    """Catches a reward model evaluated with a random head, and a policy with a random output layer."""
    source = language_model(tmp_path, kind)
    tiny.write_model(tmp_path / "rm", **REWARD)
    reward = find(tmp_path / "rm")
    if kind == "checkpoint":
        convert.import_(ImportConfig(load=str(tmp_path / "rm"), save=str(tmp_path / "rm-ck"), precision="fp32"))
        reward = find(tmp_path / "rm-ck")
    groups = start(ParallelConfig())
    shape = read_shape(source.hf)
    policy = build(shape, precision="fp32", sequence_parallel=False, groups=groups)
    with pytest.raises(UserError, match=f"{reward.path}: is a reward model.*no output layer"):
        load_weights(policy, reward, groups, seed=0)
    model = build(replace(shape, head="value"), precision="fp32", sequence_parallel=False, groups=groups)
    with pytest.raises(UserError, match=f"{source.path}: is no reward model.*one label"):
        load_weights(model, source, groups)
    stop()


def test_files_without_the_head_are_refused(tmp_path: Path, groups: Groups) -> None:
    """Catches a config.json that promises a head which the files lack: its weights would stay as memory was."""
    tiny.write_model(tmp_path / "model")
    tiny.write_model(tmp_path / "other", **REWARD)
    (tmp_path / "model" / "config.json").write_text((tmp_path / "other" / "config.json").read_text())
    model = build(read_shape(tmp_path / "model"), precision="fp32", sequence_parallel=False, groups=groups)
    with pytest.raises(UserError, match=r"1 missing: score.weight; 1 not part of a llama model: lm_head.weight"):
        load_weights(model, find(tmp_path / "model"), groups, seed=0)


def test_checkpoints_from_before_there_were_heads(tmp_path: Path) -> None:
    """Catches a checkpoint of an earlier version refused because its state.json does not name the head."""
    source = language_model(tmp_path, "checkpoint")
    state = json.loads((source.path / "state.json").read_text())
    del state["model"]["head"], state["model"]["pad_token"]
    (source.path / "state.json").write_text(json.dumps(state))
    groups = start(ParallelConfig())
    model = build(read_shape(source.hf), precision="fp32", sequence_parallel=False, groups=groups)
    load_weights(model, source, groups)
    expected = load_file(tmp_path / "lm" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in gather_hf(model, groups))
    stop()
