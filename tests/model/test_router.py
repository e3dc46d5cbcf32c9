"""Routers of experts: their losses against transformers' routers and the formulas written out, and what they count."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from rpo_megatron.config import MoeConfig, ParallelConfig
from rpo_megatron.data.store import Group, Store
from rpo_megatron.distributed import start, stop
from rpo_megatron.errors import UserError
from rpo_megatron.model.build import build
from rpo_megatron.model.router import expert_numbers, members, take_seen
from rpo_megatron.model.shape import read_shape
from rpo_megatron.training.resolve import resolve
from rpo_megatron.training.train import train
from tests import tiny
from tests.model.rows import random_rows
from tests.model.test_forward_parity import gradients_by_file_name
from tests.parallel import jobs
from tests.parallel.jobs import ONE

LOSSES = ["moe.aux_loss=0.5", "moe.z_loss=0.1"]


def router_logits(model: Any, group: Group) -> list[torch.Tensor]:
    """By layer, of a group's distinct tokens: [W, E]."""
    seen: list[list[torch.Tensor]] = []
    gates = [module for name, module in model.named_modules() if name.endswith(".gate")]
    for response in group.responses:
        inputs: list[torch.Tensor] = []
        hooks = [gate.register_forward_pre_hook(lambda _, args, to=inputs: to.append(args[0])) for gate in gates]
        model(torch.tensor([[*group.prompt, *response]]))
        new = 0 if not seen else len(group.prompt)
        seen.append([F.linear(x.flatten(0, -2), g.weight)[new:] for g, x in zip(gates, inputs, strict=True)])
        for hook in hooks:
            hook.remove()
    return [torch.cat(parts) for parts in zip(*seen, strict=True)]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_losses_equal_plain_torch(tmp_path: Path, name: str) -> None:
    """Catches a loss that is scaled by tokens or rows, that counts padding or a prompt once for each response, that
    mixes groups, that reaches the router but not the layers below, or that a packing or recomputation changes."""
    tiny.write_model(tmp_path / "model", **tiny.FAMILIES[name])
    prefix = tiny.write_store(tmp_path / "train", num_groups=7)
    ways = ["", "data.packing=false", "data.share_prompt=false", "recompute=mlp", "recompute=full"]
    cases = [[], *([*LOSSES, *filter(None, [way])] for way in ways)]
    without, first, *others = jobs.outcomes(
        str(tmp_path), [(ONE, ["train.groups_per_step=7", *overrides]) for overrides in cases]
    )
    stop()
    means, gradients = plain_torch(tmp_path / "model", Store.open(prefix))
    for number, value in means.items():
        assert first.means[number] == pytest.approx(value, rel=1e-5), number
    assert without.means["load"] == first.means["load"]
    assert "balance" not in without.means
    moved = {key: first.gradients[key] - gradient for key, gradient in without.gradients.items()}
    assert moved.keys() == gradients.keys()
    for key, gradient in gradients.items():
        error = (moved[key] - gradient).norm()
        assert error < 1e-4 * gradient.norm() + 1e-6 * first.gradients[key].norm(), key
    for way, other in zip(ways[1:], others, strict=True):
        assert other.means["load"] == first.means["load"], way
        assert other.means["balance"] == pytest.approx(first.means["balance"], rel=1e-6), way
        for key, gradient in first.gradients.items():
            assert (other.gradients[key] - gradient).norm() < 1e-5 * gradient.norm(), (way, key)


def plain_torch(directory: Path, store: Store) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    chosen = read_shape(directory).experts.per_token  # type: ignore[union-attr]
    balances, zs, took = [], [], []
    for i in range(len(store)):
        for logits_WE in router_logits(model, store.group(i)):
            count = logits_WE.shape[1]
            took_WE = F.one_hot(logits_WE.topk(chosen).indices, count).sum(1)
            balances.append(count * (took_WE.float().mean(0) / chosen * logits_WE.softmax(-1).mean(0)).sum())
            zs.append(logits_WE.logsumexp(-1).square().mean())
            took.append(took_WE.sum(0))
    layers = len(took) // len(store)
    loss = (0.5 * torch.stack(balances) + 0.1 * torch.stack(zs)).sum() / len(store)
    loss.backward()
    took_LE = torch.stack(took).unflatten(0, (len(store), layers)).sum(0).double()
    means = {
        "load": float((took_LE.amax(1) / took_LE.mean(1)).mean()),
        "balance": float(torch.stack(balances).mean()),
        "router_z": float(torch.stack(zs).mean()),
    }
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return means, gradients_by_file_name(model, directory / "gradients")


def test_counting(tmp_path: Path) -> None:
    """Catches an evaluation or a reference that counts as training, and what was counted once counted again."""
    tiny.write_model(tmp_path, **tiny.FAMILIES["qwen3_moe"])
    model = build(
        read_shape(tmp_path),
        precision="fp32",
        sequence_parallel=False,
        groups=start(ParallelConfig()),
        moe=MoeConfig(aux_loss=1.0),
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    packed = random_rows(4)[0]
    group_T = torch.zeros(packed.row.tokens_1T.shape[1], dtype=torch.long)
    group_T[:3] = -1
    row = replace(packed.row, group_T=group_T)
    with torch.no_grad():
        model(row)
    assert not take_seen([model]).any()  # type: ignore[union-attr]
    model(row)
    seen_LX = take_seen([model])
    assert seen_LX is not None
    assert seen_LX[:, :4].sum(1).tolist() == [2 * (len(group_T) - 3), 0, *[2 * (len(group_T) - 3)] * 2]
    assert not take_seen([model]).any()  # type: ignore[union-attr]
    stop()


def test_numbers_by_hand() -> None:
    """Catches layers without experts in a mean, an uneven load that another layer's hides, sums not divided."""
    seen_LX = torch.tensor([[4.0, 0, 0, 0, 8.0, 3.0], [0.0] * 6, [1, 1, 1, 1, 2.0, 1.0]])
    assert expert_numbers(seen_LX, num_groups=2) == {"load": 2.5, "balance": 2.5, "router_z": 1.0}
    assert expert_numbers(seen_LX * torch.tensor([1, 1, 1, 1, 0, 0]), num_groups=2) == {"load": 2.5}
    assert expert_numbers(torch.zeros(3, 6), num_groups=2) == {}
    assert members(torch.tensor([0, 0, -1, 1]), 2).tolist() == [[True, True, False, False], [False, False, False, True]]


def test_only_for_experts(tmp_path: Path) -> None:
    """Catches a loss that is asked for and never computed."""
    with pytest.raises(UserError, match="the section `moe` is for models with experts; llama has none: remove it"):
        resolve(tiny.run_config(tmp_path, "moe.z_loss=0.1"))
    with pytest.raises(UserError, match=r"moe.aux_loss must be a number that is not negative, found -1"):
        resolve(tiny.run_config(tmp_path, "moe.aux_loss=-1"))


def test_log(tmp_path: Path) -> None:
    """Catches a log without the load, or one that evaluations and the reference change: two steps with them, and two
    without."""
    tiny.write_model(tmp_path / "model", **tiny.FAMILIES["qwen2_moe"])
    tiny.write_store(tmp_path / "valid", num_groups=2, seed=1)
    ways = [
        [],
        ["evaluation.every=1", f"data.valid={tmp_path / 'valid'}", "objective.method=dpo", "objective.eta=null"],
    ]
    loads = []
    for i, way in enumerate(ways):
        overrides = ["train.steps=2", "optimizer.lr=0", f"run_dir={tmp_path / str(i)}", "moe.z_loss=0.01", *way]
        train(tiny.run_config(tmp_path, *overrides))
        lines = [json.loads(line) for line in (tmp_path / str(i) / "metrics.jsonl").read_text().splitlines()]
        assert all(("load" in line) == (line["kind"] == "train") for line in lines)
        loads.append([(line["load"], line["balance"], line["router_z"]) for line in lines if line["kind"] == "train"])
    assert loads[0] == loads[1]
    assert loads[0][0] != loads[0][1]
