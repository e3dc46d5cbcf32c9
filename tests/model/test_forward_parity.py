"""Our forward pass against transformers', per response, in fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
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
    **tiny.FAMILIES,
    "mistral without a window": {"model_type": "mistral", "sliding_window": None},
    "phi3 longrope": {
        **tiny.FAMILIES["phi3"],
        "original_max_position_embeddings": 32,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [3.0, 4.0]},
    },
    "phi3 longrope, all rotated": {
        **tiny.FAMILIES["phi3"],
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 32,
        "rope_scaling": {"type": "longrope", "short_factor": [1, 1, 1.5, 2], "long_factor": [3, 4, 5, 6]},
    },
    "qwen3_moe, shares of all experts": {
        **tiny.FAMILIES["qwen3_moe"],
        **{"norm_topk_prob": False, "num_experts_per_tok": 3, "mlp_only_layers": [], "decoder_sparse_step": 2},
    },
    "qwen3 yarn": {**tiny.QWEN3, "rope_scaling": {**tiny.YARN, "mscale": None, "truncate": False}},
    "deepseek_v3, queries at once, halves, any group": {
        **tiny.FAMILIES["deepseek_v3"],
        **{"q_lora_rank": None, "rope_interleave": False, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
        **{"v_head_dim": 12, "rope_scaling": None},
    },
    "gemma3_text without scaling": {**tiny.FAMILIES["gemma3_text"], "rope_scaling": None},
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
    """Catches a wrong mapping of any weight, rotary frequency, norm epsilon, head order, bias or label shift; a window,
    a soft-cap or a scale left out; experts chosen or weighted otherwise."""
    tiny.write_model(tmp_path / "model", **MODELS[name])
    prefix = tiny.write_store(tmp_path / "train", num_groups=6)
    outcome = jobs.outcomes(str(tmp_path), [(ONE, ["train.groups_per_step=6"])])[0]
    stop()
    expected = transformers_logps(tmp_path / "model", Store.open(prefix), 6)
    assert outcome.logps.keys() == expected.keys()
    for group, values in expected.items():
        assert outcome.logps[group] == pytest.approx(values, rel=1e-5), f"group {group}"


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_loss_and_gradients_equal_plain_torch(tmp_path: Path, name: str) -> None:
    """Catches a mean over anything but groups (responses, rows, tokens), a beta or eta in the wrong place, a gradient
    that the packing or the schedule scales, or that a family's own parts lose: here the whole step is written out in
    plain torch."""
    tiny.write_model(tmp_path / "model", **tiny.FAMILIES[name])
    tiny.write_model(tmp_path / "reference", seed=1, **tiny.FAMILIES[name])
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
    expected = gradients_by_file_name(policy, tmp_path / "gradients")
    assert outcome.gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        assert (outcome.gradients[key] - gradient).norm() <= 3e-5 * gradient.norm(), key


def gradients_by_file_name(model: Any, directory: Path) -> dict[str, torch.Tensor]:
    """Saved as if they were the weights, which gives them the names that weights have in files."""
    for parameter in model.parameters():
        parameter.data = parameter.grad
    for buffer in model.buffers():  # a router's bias, which has none
        buffer.zero_()
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize(
    "name", [name for name, family in tiny.FAMILIES.items() if "num_experts_per_tok" not in family]
)
def test_bf16_is_as_good_as_transformers(tmp_path: Path, name: str) -> None:
    """Catches a part that a family computes in fp32 and we in bf16 (norms with 1 + w, the router's softmax): the error
    against fp32 with the same weights, beside that of transformers. With experts it would be that of the tokens whose
    choice is a close one."""
    tiny.write_model(tmp_path / "model", **tiny.FAMILIES[name])
    store = Store.open(tiny.write_store(tmp_path / "train", num_groups=12))
    outcome = jobs.outcomes(str(tmp_path), [(ONE, ["train.groups_per_step=12", "precision=bf16"])])[0]
    stop()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        theirs = torch.cat([_group_logps(model, store.group(i)) for i in range(12)])
        exact = torch.cat([_group_logps(model.float(), store.group(i)) for i in range(12)])
    ours = torch.tensor([logp for i in range(12) for logp in outcome.logps[i]])
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()
