"""PEFT's adapter directories: adapter_config.json beside adapter_model.safetensors. No torch.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpo_megatron.errors import UserError
from rpo_megatron.fileio import write_json
from rpo_megatron.model.accounting import describe, mismatches
from rpo_megatron.model.adapter import Adapter, adapter_entries, choose_targets
from rpo_megatron.model.identity import read_header
from rpo_megatron.model.shape import ModelShape
from rpo_megatron.model.table import HF_SCORE

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Of all names in PEFT's files."""
FLOATS = ("F32", "F16", "BF16")
NEUTRAL: tuple[Any, ...] = (None, False, "none", {}, [])
READ = ("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "modules_to_save", "init_lora_weights")
WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "task_type", "layers_pattern", "exclude_modules", "layers_to_transform"),
    *("ensure_weight_tying", "eva_config", "runtime_config"),
)
"""Of the forward pass and the file; which layers have adapters is told by the tensors."""
ANOTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of init_lora_weights that change the base's weights as well."""


def is_peft(directory: str | Path) -> bool:
    return (Path(directory) / CONFIG).is_file()


def read_peft(directory: str | Path, shape: ModelShape) -> Adapter:
    """The structure of an adapter, checked against the model's and against the headers of its weights.

    Raises UserError for what is no LoRA adapter of such a model, or has more to it than A and B.
    """
    path = Path(directory) / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the config of a LoRA adapter of PEFT's: {error!r}") from None
    _check_plain(path, config)
    sizes = _sizes(path.with_name(WEIGHTS))
    names = {name.split(".")[-3] for name in sizes if name.endswith(".lora_A.weight")}
    adapter = Adapter(
        rank=rank,
        alpha=alpha,
        targets=choose_targets(shape, sorted(names), key=str(path.parent)),
        rank_stabilised=bool(config.get("use_rslora", False)),
    )
    # A head is drawn where the adapter of a language model has none.
    wrong = describe(mismatches(sizes, peft_tensors(shape, adapter), owner="such an adapter", optional={HF_SCORE}))
    if wrong:
        raise UserError(f"{path.with_name(WEIGHTS)}: does not fit the model -- {wrong}")
    return adapter


def peft_tensors(shape: ModelShape, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Every tensor of the adapter's file, with its shape; names without PREFIX."""
    sizes = {name: size for entry in adapter_entries(shape, adapter) for name, size in entry.tensors.items()}
    return sizes | ({HF_SCORE: (1, shape.hidden_size)} if shape.head == "value" else {})


def write_config(directory: Path, adapter: Adapter, *, base: str, shape: ModelShape) -> None:
    """adapter_config.json, as far as PEFT does not assume it."""
    is_lm = shape.head == "lm"
    write_json(
        directory / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if is_lm else "SEQ_CLS",
            "base_model_name_or_path": base,
            "r": adapter.rank,
            "lora_alpha": adapter.alpha if adapter.alpha % 1 else int(adapter.alpha),
            "use_rslora": adapter.rank_stabilised,
            "target_modules": list(adapter.targets),
            "modules_to_save": None if is_lm else [HF_SCORE.removesuffix(".weight")],
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
        },
    )


def _check_plain(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {config.get('peft_type')}; only LORA adapters can be trained")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(ANOTHER_BASE):
        raise UserError(
            f"{path}: init_lora_weights={init} goes with a base whose weights were changed; save the adapter with "
            f"PEFT's path_initial_model_for_weight_conversion, or merge the two and train that"
        )
    more = [key for key, value in config.items() if key not in (*READ, *WITHOUT_EFFECT) and value not in NEUTRAL]
    if more:
        raise UserError(f"{path}: {more[0]}={config[more[0]]} is not supported; merge the adapter and train that")


def _sizes(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        raise UserError(f"'{path}' does not exist; an adapter in adapter_model.bin must be saved as safetensors")
    tensors = read_header(path).tensors
    wrong = [name for name, info in tensors.items() if info.dtype not in FLOATS or not name.startswith(PREFIX)]
    if wrong:
        raise UserError(f"{path}: '{wrong[0]}' ({tensors[wrong[0]].dtype}) is no weight of an adapter")
    return {name.removeprefix(PREFIX): info.shape for name, info in tensors.items()}
