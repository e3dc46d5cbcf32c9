"""The files that go along with the weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from rpo_megatron.errors import UserError
from rpo_megatron.model.companions import copy_companions
from rpo_megatron.model.shape import read_shape
from tests import tiny


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({}, {"torch_dtype": "bfloat16"}),
        ({"num_nextn_predict_layers": 1}, {"torch_dtype": "bfloat16", "num_nextn_predict_layers": 0}),
    ],
)
def test_companions(tmp_path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    """A model without its tokenizer or chat template, weights of the source copied along, a config.json that still
    declares the old dtype, or layers that are not exported."""
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    target.mkdir()
    kept = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "additional_chat_templates/tools.jinja"]
    for name in (*kept, "model.safetensors", "pytorch_model.bin"):
        (source / name).write_text(name)
    (source / "config.json").write_text(json.dumps({"model_type": "llama", "é": 1, **before}))
    copy_companions(source, target, dtype="bfloat16", head="lm")
    assert json.loads((target / "config.json").read_text()) == {"model_type": "llama", "é": 1, **after}
    copied = {path.relative_to(target).as_posix(): path.read_text() for path in target.rglob("*.*") if path.is_file()}
    del copied["config.json"]
    assert copied == {name: name for name in kept}


# ------------------------------------------------------------------------------------------------ reward models


def as_reward_model(tmp_path: Path, tokenizer: dict[str, Any] | None, **changes: Any) -> tuple[dict[str, Any], Any]:
    """config.json and tokenizer_config.json (None if there is none) of a language model's copy with a value head."""
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps({**tiny.LLAMA, **changes}))
    if tokenizer is not None:
        (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    copy_companions(tmp_path / "source", tmp_path / "target", dtype="float32", head="value")
    file = tmp_path / "target" / "tokenizer_config.json"
    return json.loads((tmp_path / "target" / "config.json").read_text()), json.loads(
        file.read_text()
    ) if file.exists() else None


@pytest.mark.parametrize("family", tiny.FAMILIES.values())
def test_config_says_that_it_is_a_reward_model(tmp_path: Path, family: dict[str, Any]) -> None:
    """An export that transformers opens as a language model, or with two labels: AutoModelForSequenceClassification
    goes by architectures and id2label."""
    config, _ = as_reward_model(tmp_path, None, **{key: value for key, value in family.items() if value is not ...})
    transformers_config = transformers.AutoConfig.for_model(config["model_type"])
    classes = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(transformers_config)]
    assert config["architectures"] == [classes.__name__]
    assert (config["num_labels"], config["id2label"], config["label2id"]) == (1, {"0": "LABEL_0"}, {"LABEL_0": 0})
    assert read_shape(tmp_path / "target").head == "value"


PAD = {"pad_token": "<pad>", "bos_token": "<s>", "added_tokens_decoder": {"9": {"content": "<pad>"}}}


@pytest.mark.parametrize(
    ("config", "tokenizer", "pad"),
    [
        ({"pad_token_id": 2}, PAD, 2),  # what the model says is kept, even the end-of-turn token: shape.pad_token
        ({"pad_token_id": None}, PAD, 9),
        ({}, {**PAD, "pad_token": {"content": "<pad>"}}, 9),
        ({}, {**PAD, "pad_token": "</s>", "added_tokens_decoder": {"2": {"content": "</s>"}}}, 1),
        ({"eos_token_id": [9, 2]}, PAD, 1),
        ({}, None, 1),
        ({"bos_token_id": 2}, None, None),
        ({"bos_token_id": None}, {}, None),
    ],
)
def test_pad_token(tmp_path: Path, config: dict[str, Any], tokenizer: dict[str, Any] | None, pad: int | None) -> None:
    """A padding token with which transformers judges another token than was trained: it looks for the last one that
    is not padding, so padding with the end-of-turn token would move it."""
    assert as_reward_model(tmp_path, tokenizer, **config)[0]["pad_token_id"] == pad


def test_tokenizer_pads_with_the_same_token(tmp_path: Path) -> None:
    """A tokenizer that pads with another token than config.json says: scores of a batch would be those of padding."""
    _, tokenizer = as_reward_model(tmp_path, {"bos_token": "<s>", "pad_token": "</s>", "eos_token": "</s>"})
    assert tokenizer == {"bos_token": "<s>", "pad_token": "<s>", "eos_token": "</s>"}


def test_malformed_tokenizer_config(tmp_path: Path) -> None:
    """A traceback instead of a message."""
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(tiny.LLAMA))
    (tmp_path / "source" / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json: not valid JSON"):
        copy_companions(tmp_path / "source", tmp_path / "target", dtype="float32", head="value")
