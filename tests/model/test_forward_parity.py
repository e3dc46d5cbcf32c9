"""Our forward pass against transformers', per response, in fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rpo_megatron.data.store import Group, Store
from rpo_megatron.distributed import stop
from tests import tiny
from tests.parallel import jobs
from tests.parallel.jobs import ONE

LLAMA3_ROPE = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3": LLAMA3_ROPE,
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "tied": {"tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "qwen2": tiny.QWEN2,
    "qwen3": tiny.QWEN3,
}


def transformers_logps(model_directory: Path, store: Store, num_groups: int) -> dict[int, list[float]]:
    """Each response on its own after its prompt, log-softmax over the true vocabulary, summed in fp64."""
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return {i: _group_logps(model, store.group(i)).tolist() for i in range(num_groups)}


def _group_logps(model: Any, group: Group) -> torch.Tensor:
    return torch.stack([_logp(model, group.prompt, response) for response in group.responses])


def _logp(model: Any, prompt: Any, response: Any) -> torch.Tensor:
    tokens = torch.tensor([[*prompt, *response]])
    logp_1TV = model(tokens).logits[:, len(prompt) - 1 : -1].double().log_softmax(-1)
    return logp_1TV.gather(-1, tokens[:, len(prompt) :, None]).sum()


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_equal_transformers(tmp_path: Path, name: str) -> None:
    """Catches a wrong mapping of any weight, rotary frequency, norm epsilon, head order, bias or label shift."""
    tiny.write_model(tmp_path / "model", **MODELS[name])
    prefix = tiny.write_store(tmp_path / "train", num_groups=6)
    outcome = jobs.outcomes(str(tmp_path), [(ONE, ["train.groups_per_step=6"])])[0]
    stop()
    expected = transformers_logps(tmp_path / "model", Store.open(prefix), 6)
    assert outcome.logps.keys() == expected.keys()
    for group, values in expected.items():
        assert outcome.logps[group] == pytest.approx(values, rel=1e-5), f"group {group}"


def test_loss_and_gradients_equal_plain_torch(tmp_path: Path) -> None:
    """Catches a mean over anything but groups (responses, rows, tokens), a beta or eta in the wrong place, a gradient
    that the packing or the schedule scales: here the whole step is written out in plain torch."""
    tiny.write_model(tmp_path / "model")
    tiny.write_model(tmp_path / "reference", seed=1)
    prefix = tiny.write_store(tmp_path / "train", num_groups=7)  # of 2 to 4 responses, in rows of several groups
    overrides = ["train.groups_per_step=7", f"reference.path={tmp_path / 'reference'}"]
    outcome = jobs.outcomes(str(tmp_path), [(ONE, overrides)])[0]
    stop()

    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "reference", dtype=torch.float32)
    store, losses = Store.open(prefix), []
    for i in range(7):
        group = store.group(i)
        with torch.no_grad():
            reference_K = _group_logps(reference, group)
        target_K = (3.0 * torch.from_numpy(group.reward).double()).softmax(0)
        policy_K = (0.5 * (_group_logps(policy, group) - reference_K)).log_softmax(0)
        losses.append((target_K * (target_K.log() - policy_K)).sum())
    loss = torch.stack(losses).mean()
    loss.backward()
    assert outcome.means["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: parameter.grad for name, parameter in policy.named_parameters()}
    assert outcome.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (outcome.gradients[name] - gradient).norm() < 1e-5 * gradient.norm(), name
