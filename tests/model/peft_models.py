"""PEFT as the oracle of our adapters: random ones on tiny models, and what PEFT makes of them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.model.rows import Packed


def base_model(directory: Path, *, head: str = "lm", **options: Any) -> Any:
    kind = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    return kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager", **options)


def write_adapter(directory: Path, base: Path, *, targets: list[str], seed: int = 0, **options: Any) -> Path:
    """An adapter whose B is not zero."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(base_model(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(str(directory))
    return directory


def with_adapter(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(base_model(base), adapter, is_trainable=True).eval()


def token_logps(model: Any, rows: list[Packed]) -> torch.Tensor:
    """Of all response tokens, one conversation at a time, in the order of Row.scored_label_N."""
    found = []
    for packed in rows:
        for group in packed.groups:
            for prompt, response in group or ():
                logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
                found.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """By PEFT's names in files, without base_model.model."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
