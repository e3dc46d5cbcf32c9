"""The files beside the weights that make a Hugging Face directory usable: config.json, tokenizer, generation config.

They are copied as they are, except that config.json says what the weights beside it are: their precision, and for a
reward model that it is one, whatever the model was that its training started from.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from rpo_megatron.errors import UserError
from rpo_megatron.fileio import write_json
from rpo_megatron.model.families import FAMILIES
from rpo_megatron.model.shape import VALUE_ARCHITECTURE, Head, read_config

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""Files (as glob patterns) beside config.json and the weights that make a model directory usable."""
TOKENIZER_CONFIG = "tokenizer_config.json"


def copy_companions(source_dir: str | Path, target_dir: str | Path, *, dtype: str, head: Head) -> None:
    """Copy config.json, with its dtype set to `dtype` (torch's name, e.g. bfloat16), and all COMPANIONS there are.

    With head=value the copy is that of a reward model: transformers' ...ForSequenceClassification with one label, and
    a padding token, without which transformers takes one response at a time.
    """
    source, target = Path(source_dir), Path(target_dir)
    config = read_config(source)
    # transformers 4 writes torch_dtype, transformers 5 dtype and reads both.
    for key in {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}:
        config[key] = dtype
    for key in {"num_nextn_predict_layers", "num_mtp_layers"} & config.keys():
        config[key] = 0  # the weights beside it are without
    for path in (path for pattern in COMPANIONS for path in source.glob(pattern)):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    if head == "value":
        _make_reward_model(config, target)
    write_json(target / "config.json", config)


def _make_reward_model(config: dict[str, Any], target: Path) -> None:
    config["architectures"] = [FAMILIES[config["model_type"]].class_prefix + VALUE_ARCHITECTURE]
    config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if config.get("pad_token_id") is None:
        config["pad_token_id"] = _choose_pad_token(config, target / TOKENIZER_CONFIG)


def _choose_pad_token(config: dict[str, Any], tokenizer_file: Path) -> int | None:
    """A token that ends no response, because transformers judges a response at its rightmost token that is not padding:
    the tokenizer's own padding token, else the one that begins texts, which the tokenizer then pads with too. None
    where there is neither."""
    eos = config.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [eos]
    tokenizer = _read_tokenizer_config(tokenizer_file)
    own, first = _id_of(tokenizer, "pad_token"), config.get("bos_token_id")
    if own is not None and own not in ends:
        return own
    if first is None or first in ends:
        return None
    if tokenizer.get("bos_token"):
        write_json(tokenizer_file, {**tokenizer, "pad_token": tokenizer["bos_token"]})
    return int(first)


def _read_tokenizer_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{file.name}: not valid JSON: {error}") from None


def _id_of(tokenizer: dict[str, Any], name: str) -> int | None:
    """The id of one of a tokenizer_config.json's special tokens, where the file lists them."""
    token = tokenizer.get(name)
    text = token["content"] if isinstance(token, dict) else token
    ids = [int(i) for i, entry in tokenizer.get("added_tokens_decoder", {}).items() if entry["content"] == text]
    return ids[0] if ids else None
