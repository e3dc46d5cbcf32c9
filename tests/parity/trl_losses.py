"""Losses as TRL computes them: its own loss methods, on trainers that were never initialised.

A trainer's __init__ wants a model, a data set and an accelerator, none of which its loss method uses for anything but
log-probabilities and logging. So each trainer here is made without it and is given the attributes that the loss method
reads, under the names that __init__ gives them; where one is missing because TRL renamed it, the test fails. The model
is a table of log-probabilities. No formula of TRL's is written down here.
"""

import contextlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from tests.parity.groups import PROMPT_OR_PADDING, Rows

PROMPT = 3
"""Tokens of every prompt, except for ORPO."""


class FusedHead:
    """A model with TRL's fused head: log-probabilities of the labels, 0 where they are -100."""

    training = True
    is_gradient_checkpointing = False

    def __init__(self, table_V: torch.Tensor) -> None:
        self.table_V = table_V

    def __call__(self, *, labels: torch.Tensor, **inputs: Any) -> FusedCausalLMOutput:
        scored = labels[:, 1:] != -100
        log_probs = self.table_V[labels[:, 1:].clamp(min=0)].masked_fill(~scored, 0.0)
        logged = torch.zeros_like(log_probs.detach())
        return FusedCausalLMOutput(
            log_probs=log_probs, label_mask=scored, entropy=logged, mean_logits=logged, is_top1=logged.bool()
        )


class FullHead:
    """A model that returns logits [R, L, V] whose softmax gives each next token its log-probability in the table."""

    training = True

    def __init__(self, table_V: torch.Tensor) -> None:
        self.table_V = table_V

    def __call__(self, input_ids: torch.Tensor, **inputs: Any) -> SimpleNamespace:
        next_RL1 = input_ids.roll(-1, dims=1)[..., None]
        logp_RL1 = self.table_V[next_RL1]
        num_others = len(self.table_V) - 1
        other_RL1 = torch.log1p(-logp_RL1.exp()) - torch.tensor(num_others).log()
        logits = other_RL1.expand(-1, -1, num_others + 1).scatter(2, next_RL1, logp_RL1)
        return SimpleNamespace(logits=logits)


class PlainModel(torch.nn.Module):
    """What a trainer asks about its own model: it is trained, and it is not a PEFT model (where peft is installed,
    accelerate looks for one among the submodules)."""

    is_gradient_checkpointing = False


def dpo(rows: Rows, *, losses: dict[str, float], beta: float = 1.0, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPOTrainer with `losses` {loss_type: weight}, on chosen rows followed by as many rejected ones."""
    trainer = _trainer(
        DPOTrainer,
        loss_types=list(losses),
        loss_weights=list(losses.values()),
        beta=beta,
        label_smoothing=label_smoothing,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        precompute_ref_logps=True,
    )
    ref_chosen, ref_rejected = rows.reference_logp().chunk(2)
    inputs = {
        "input_ids": rows.input_ids(prompt=PROMPT),
        "attention_mask": rows.attention_mask(prompt=PROMPT),
        "completion_mask": rows.completion_mask(prompt=PROMPT),
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    return trainer._compute_loss(FusedHead(rows.policy_V), inputs, return_outputs=False)


def kto(
    rows: Rows, *, beta: float, desirable_weight: float, undesirable_weight: float, calculate_kl: bool
) -> torch.Tensor:
    """KTOTrainer on chosen rows (desirable) followed by as many rejected ones (undesirable). Its KL completions, for
    which the trainer takes those of other prompts, are the rows themselves."""
    trainer = _trainer(
        KTOTrainer,
        loss_type="kto",
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        calculate_KL=calculate_kl,
        precompute_ref_logps=False,
        ref_model=FusedHead(rows.reference_V),
    )
    tokens = {
        "input_ids": rows.input_ids(prompt=PROMPT),
        "attention_mask": rows.attention_mask(prompt=PROMPT),
        "completion_mask": rows.completion_mask(prompt=PROMPT),
    }
    label = torch.arange(len(rows.ids_RT)) < len(rows.ids_RT) // 2
    inputs = {**tokens, **{f"KL_{name}": value for name, value in tokens.items()}, "label": label}
    return trainer._compute_loss(FusedHead(rows.policy_V), inputs, return_outputs=False)


def cpo(
    rows: Rows,
    *,
    loss_type: str,
    beta: float,
    simpo_gamma: float = 0.0,
    alpha: float = 0.0,
    cpo_alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """CPOTrainer on chosen rows followed by as many rejected ones; `cpo_alpha` is the weight of its likelihood term."""
    trainer = _trainer(
        CPOTrainer,
        loss_type=loss_type,
        beta=beta,
        simpo_gamma=simpo_gamma,
        alpha=alpha,
        cpo_alpha=cpo_alpha,
        label_smoothing=label_smoothing,
        is_encoder_decoder=False,
        pad_token_id=PROMPT_OR_PADDING,
    )
    return trainer.get_batch_loss_metrics(FullHead(rows.policy_V), _chosen_rejected(rows, prompt=PROMPT))[0]


def orpo(rows: Rows, *, beta: float) -> torch.Tensor:
    """ORPOTrainer on chosen rows followed by as many rejected ones. Its likelihood term counts the prompt, so the
    prompt is one token, which nothing predicts."""
    trainer = _trainer(ORPOTrainer, beta=beta, is_encoder_decoder=False, padding_value=PROMPT_OR_PADDING)
    return trainer.get_batch_loss_metrics(FullHead(rows.policy_V), _chosen_rejected(rows, prompt=1))[0]


def sft(rows: Rows) -> torch.Tensor:
    """SFTTrainer, completions only."""
    trainer = _trainer(SFTTrainer, compute_loss_func=None, label_smoother=None)
    inputs = {
        "input_ids": rows.input_ids(prompt=PROMPT),
        "attention_mask": rows.attention_mask(prompt=PROMPT),
        "labels": rows.labels(prompt=PROMPT),
    }
    return trainer.compute_loss(FusedHead(rows.policy_V), inputs)


def reward_model(value_R: torch.Tensor) -> torch.Tensor:
    """RewardTrainer on the scores of chosen rows followed by those of as many rejected ones."""
    trainer = _trainer(RewardTrainer)
    tokens = torch.ones(len(value_R), 1, dtype=torch.long)
    return trainer.compute_loss(
        lambda **_: SimpleNamespace(logits=value_R[:, None]), {"input_ids": tokens, "attention_mask": tokens}
    )


def rloo(rows: Rows, *, reward_R: torch.Tensor, beta: float, num_generations: int) -> torch.Tensor:
    """RLOOTrainer's first update after sampling: the rows, `num_generations` for each prompt, count as generated by the
    policy and scored with `reward_R`."""
    num_rows = len(rows.ids_RT)
    completions = [ids_T[mask_T].tolist() for ids_T, mask_T in zip(rows.ids_RT, rows.mask_RT, strict=True)]
    trainer = _trainer(
        RLOOTrainer,
        model=FusedHead(rows.policy_V),
        ref_model=FusedHead(rows.reference_V),
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=0.2,
        num_generations=num_generations,
        normalize_advantages=False,
        reward_clip_range=None,
        reward_weights=torch.ones(1),
        reward_func_names=["reward"],
        mask_truncated_completions=False,
        pad_to_multiple_of=None,
        log_multimodal=False,
        _tokenizer=SimpleNamespace(pad_token_id=PROMPT_OR_PADDING),
        _logs=defaultdict(list, rewards=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
        _generate=lambda prompts: ([[PROMPT_OR_PADDING] * PROMPT] * num_rows, completions, [""] * num_rows),
        _calculate_rewards=lambda *_: reward_R[:, None],
    )
    batch = trainer._generate_and_score_completions([{"prompt": ""}] * num_rows)
    return trainer._compute_loss(trainer.model, batch)


def _trainer(kind: type, **attributes: Any) -> Any:
    def same(values: torch.Tensor, **options: Any) -> torch.Tensor:
        return values

    trainer: Any = object.__new__(kind)
    common = {
        "accelerator": SimpleNamespace(
            device=torch.device("cpu"),
            process_index=0,
            is_main_process=True,
            parallelism_config=None,
            gather=same,
            gather_for_metrics=same,
            reduce=same,
            autocast=contextlib.nullcontext,
        ),
        "args": SimpleNamespace(
            average_tokens_across_devices=False,
            center_rewards_coefficient=None,
            gradient_checkpointing_kwargs=None,
            loss_type="nll",
            per_device_train_batch_size=4,
        ),
        "aux_loss_enabled": False,
        "model": PlainModel(),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in {**common, **attributes}.items():
        setattr(trainer, name, value)
    return trainer


def _chosen_rejected(rows: Rows, *, prompt: int) -> dict[str, torch.Tensor]:
    columns = {
        "input_ids": rows.input_ids(prompt=prompt),
        "attention_mask": rows.attention_mask(prompt=prompt),
        "labels": rows.labels(prompt=prompt),
    }
    halves = {name: values.chunk(2) for name, values in columns.items()}
    chosen = {f"chosen_{name}": half for name, (half, _) in halves.items()}
    return chosen | {f"rejected_{name}": half for name, (_, half) in halves.items()}
