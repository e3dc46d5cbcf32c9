"""TRL's DPO step on groups: the trainer's own collator and `compute_loss` (its metrics belong to it), and backward.

Of a group of K responses TRL gets K / 2 independent pairs, the fewest that use every response. `compact` has the output
layer skip positions without a label: TRL does so on GPUs with Triton, and on a CPU computes the logits of all of them.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import trl.trainer.utils
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar
from trl import DPOConfig, DPOTrainer

from rpo_megatron.data.store import Group
from tools.bench.ours import BETA

Pair = dict[str, Any]


class TRL:
    def __init__(self, policy: Path, reference: Path) -> None:
        """From Hugging Face directories."""
        disable_progress_bars()
        disable_progress_bar()
        words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "word": 3}, unk_token="word"))
        arguments = DPOConfig(
            output_dir=str(Path(tempfile.gettempdir()) / "trl"),  # nothing is written there
            beta=BETA,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            precompute_ref_log_probs=False,
        )
        self.trainer: Any = DPOTrainer(
            model=_load(policy),
            ref_model=_load(reference),
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "word", "chosen": "word", "rejected": "word"}]),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>"),
        )
        self.model = self.trainer.model.train()

    def step(self, pairs: Sequence[Pair], *, compact: bool, stored: bool, pairs_per_batch: int) -> float:
        """Mean loss over the pairs; gradients are left in the model."""
        self.model.zero_grad(set_to_none=True)
        self.trainer.precompute_ref_logps = stored
        total = 0.0
        with mock.patch.object(trl.trainer.utils, "_use_triton", return_value=compact):
            for start in range(0, len(pairs), pairs_per_batch):
                batch = pairs[start : start + pairs_per_batch]
                loss = self.trainer.compute_loss(self.model, self.trainer.data_collator(batch))
                loss = loss * (len(batch) / len(pairs))
                loss.backward()
                total += loss.item()
        return total

    def logps(self, pairs: Sequence[Pair], *, of_reference: bool) -> torch.Tensor:
        """Summed log-probabilities [pairs, 2] of chosen and rejected."""
        model = self.trainer.ref_model if of_reference else self.model
        return torch.stack(self.trainer.compute_ref_log_probs(model, self.trainer.data_collator(pairs)), dim=1)


def pairs_of(groups: Sequence[Group]) -> list[Pair]:
    """Responses 1 and 2, 3 and 4, ... of every group, with their stored log-probabilities where there are any."""
    return [_pair(group, first) for group in groups for first in range(0, len(group.responses), 2)]


def _pair(group: Group, first: int) -> Pair:
    pair: Pair = {
        "prompt_ids": group.prompt.tolist(),
        "chosen_ids": group.responses[first].tolist(),
        "rejected_ids": group.responses[first + 1].tolist(),
    }
    if group.ref_logp is not None:
        pair["ref_chosen_logps"], pair["ref_rejected_logps"] = group.ref_logp[first : first + 2].tolist()
    return pair


def _load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
