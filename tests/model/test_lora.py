"""Adapters against PEFT's: log-probabilities, gradients, merged weights, files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rpo_megatron.config import KernelsConfig, ParallelConfig
from rpo_megatron.distributed import Groups, start, stop
from rpo_megatron.errors import UserError
from rpo_megatron.model.adapter import Adapter, adapter_entries, choose_targets, possible_targets
from rpo_megatron.model.build import build
from rpo_megatron.model.hf import merge as join
from rpo_megatron.model.hf import shard
from rpo_megatron.model.lora import adapter_parameters, adapters_off, attach, merge
from rpo_megatron.model.lora_io import draw, gather_adapter, load_peft, write_peft
from rpo_megatron.model.peft_format import read_peft
from rpo_megatron.model.shape import read_shape
from rpo_megatron.model.source import find
from rpo_megatron.model.vocab import WeightGradient
from rpo_megatron.model.weights import gather_hf, global_parameters
from rpo_megatron.training.checkpoint import load_weights
from tests import tiny
from tests.model import peft_models
from tests.model.rows import load, random_rows
from tests.model.te_stand_in import stand_in
from tests.model.whole import relative_errors, whole_gradients

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "all of llama": ("llama", ALL, {}),
    "some of llama": ("llama", ["q_proj", "v_proj", "up_proj"], {"use_rslora": True}),
    "one of llama": ("llama", ["k_proj"], {}),
    "joined in the files": ("phi3", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], {}),
    "norms behind": ("gemma2", ALL, {}),
    "attention of experts": ("qwen3_moe", ["q_proj", "o_proj"], {}),
    "latent attention": ("deepseek_v3", ["q_b_proj", "kv_b_proj", "o_proj"], {}),
}


@pytest.fixture
def groups() -> Iterator[Groups]:
    yield start(ParallelConfig())
    stop()


def adapted(base: Path, adapter: Path, groups: Groups) -> Any:
    model = load(base, groups)
    attach(model, read_peft(adapter, model.shape))
    load_peft(model, adapter, groups)
    return model


def our_logps(model: Any) -> torch.Tensor:
    return torch.cat([model(packed.row).logp_N for packed in random_rows(4)])


def weighted(logp_N: torch.Tensor) -> torch.Tensor:
    """A loss to which every token contributes in its own way."""
    return ((0.5 + torch.arange(len(logp_N)) % 3) * logp_N).sum()


@pytest.mark.parametrize("case", CASES)
def test_same_numbers_and_gradients_as_peft(tmp_path: Path, groups: Groups, case: str) -> None:
    """Catches an A that is taken for its neighbour's, rows of B in another order than those of the joined matrix, a
    wrong scale, a matrix that is left out, a merge that differs from what was trained or leaves something frozen, and
    a base that is touched."""
    family, targets, options = CASES[case]
    base = tiny.write_model(tmp_path / "base", **tiny.FAMILIES[family])
    directory = peft_models.write_adapter(tmp_path / "adapter", base, targets=targets, **options)
    theirs, ours = peft_models.with_adapter(base, directory), adapted(base, directory, groups)
    plain = our_logps(load(base, groups))
    expected = peft_models.token_logps(theirs, random_rows(4))
    logp_N = our_logps(ours)
    torch.testing.assert_close(logp_N, expected, rtol=1e-4, atol=1e-4)
    assert (logp_N - plain).abs().max() > 0.05
    weighted(logp_N).backward()
    weighted(expected).backward()
    assert_gradients(ours, peft_models.gradients(theirs), groups)
    with adapters_off(ours), torch.no_grad():
        assert torch.equal(our_logps(ours), plain.detach())
    before = {name: parameter.detach().clone() for name, parameter in global_parameters(load(base, groups)).items()}
    assert all(torch.equal(tensor, global_parameters(ours)[name]) for name, tensor in before.items())
    merge(ours)
    models = ours, load(base, groups)
    merged_trains, base_trains = ({name for name, p in m.named_parameters() if p.requires_grad} for m in models)
    assert merged_trains == base_trains
    torch.testing.assert_close(our_logps(ours), expected, rtol=1e-4, atol=1e-4)
    merged = theirs.merge_and_unload().state_dict()
    for name, tensor in gather_hf(ours, groups):
        if ".experts." not in name:  # transformers joins them
            torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)


def assert_gradients(model: Any, expected: dict[str, torch.Tensor], groups: Groups) -> None:
    """All of the adapter's, and no others."""
    found = gathered_gradients(model, groups)
    assert found.keys() == expected.keys()
    assert not [name for name, error in relative_errors(found, expected).items() if not error < 1e-4]
    others = [name for name, _ in model.named_parameters() if not name.startswith("adapters.")]
    assert not [name for name in others if model.get_parameter(name).requires_grad]


def gathered_gradients(model: Any, groups: Groups) -> dict[str, torch.Tensor]:
    """By PEFT's names."""
    return whole_gradients(adapter_parameters(model).values(), lambda: gather_adapter(model, groups))


def test_files_are_pefts(tmp_path: Path, groups: Groups) -> None:
    """Catches a file that PEFT does not open, opens with another meaning, or that we read back otherwise."""
    base = tiny.write_model(tmp_path / "base")
    directory = peft_models.write_adapter(tmp_path / "adapter", base, targets=["k_proj", "down_proj"], use_rslora=True)
    model = adapted(base, directory, groups)
    (tmp_path / "again").mkdir()
    write_peft(model, tmp_path / "again", groups, base=str(base), dtype=torch.float32)
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (directory, tmp_path / "again"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    assert read_peft(tmp_path / "again", model.shape) == read_peft(directory, model.shape)
    logps = peft_models.token_logps(peft_models.with_adapter(base, tmp_path / "again"), random_rows(4))
    torch.testing.assert_close(our_logps(model), logps, rtol=1e-4, atol=1e-4)


def test_drawn_as_peft_draws(tmp_path: Path, groups: Groups) -> None:
    """Catches a start at other scales, the same numbers everywhere, and a policy that differs from its base."""
    base = tiny.write_model(tmp_path / "base", hidden_size=64)
    model = load(base, groups)
    plain = our_logps(model).detach()
    attach(model, Adapter(rank=8, alpha=16, targets=possible_targets(model.shape)))
    draw(model, 7, groups)
    assert torch.equal(our_logps(model), plain)
    tensors = dict(gather_adapter(model, groups))
    into = [tensor for name, tensor in tensors.items() if "lora_A" in name]
    for a in into:
        assert a.abs().max() <= a.shape[1] ** -0.5
        assert a.std() == pytest.approx((3 * a.shape[1]) ** -0.5, rel=0.15)
    assert len({float(a[0, 0]) for a in into}) == len(into)
    assert not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_frozen_output_layer_has_no_gradient() -> None:
    """Catches its multiplications, and room for it, as large as the weight in fp32."""
    total = WeightGradient(torch.ones(4, 3))
    total.add(slice(0, 2), torch.ones(5, 2), torch.ones(5, 3))
    assert total.for_autograd() is None
    assert not any(
        isinstance(value, torch.Tensor) and value.dtype.is_floating_point and key != "_weight"
        for key, value in vars(total).items()
    )


def test_layers_that_are_computed_again_have_gradients(tmp_path: Path, groups: Groups) -> None:
    """Catches the first layers' adapters without a gradient: what is computed again from a frozen embedding's result
    looks like a constant."""
    base = tiny.write_model(tmp_path / "base")
    directory = peft_models.write_adapter(tmp_path / "adapter", base, targets=ALL)
    model = adapted(base, directory, groups)
    found = []
    for fields in ({}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}):
        for name, value in fields.items():
            setattr(model.config, name, value)
        weighted(our_logps(model.train())).backward()
        found.append(gathered_gradients(model, groups))
        model.zero_grad()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


@pytest.mark.parametrize("family", ["llama", "gemma2", "nemotron"])
def test_layers_that_norm_their_input(tmp_path: Path, groups: Groups, family: str) -> None:
    """Catches an adapter of Transformer Engine's layers that multiplies what comes before the norm inside them, or what
    another kind of norm (three of them) makes of it."""
    base = tiny.write_model(tmp_path / "base", **tiny.FAMILIES[family])
    with stand_in():
        model = build(
            read_shape(base),
            precision="fp32",
            sequence_parallel=False,
            groups=groups,
            kernels=KernelsConfig(layers="transformer_engine"),
        )
    load_weights(model, find(base), groups)
    own = load(base, groups)
    for one in (own, model):
        attach(one, Adapter(rank=3, alpha=5, targets=possible_targets(own.shape)))
        draw(one, 3, groups)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter_parameters(own).items():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            adapter_parameters(model)[name].copy_(parameter)
    torch.testing.assert_close(our_logps(model), our_logps(own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_table(tmp_path: Path, name: str, tp_size: int) -> None:
    """Catches parts of a tensor rank that, put together, are not the whole: for all families and both ways."""
    shape = read_shape(tiny.write_model(tmp_path, **tiny.FAMILIES[name]))
    rows = adapter_entries(shape, Adapter(rank=3, alpha=3, targets=possible_targets(shape)))
    assert len(rows) == 2 * shape.num_layers * (3 if shape.latent else 2 if shape.experts else 4)
    for entry in rows:
        tensors = {n: torch.randn(size) for n, size in entry.tensors.items()}
        parts = [shard(entry, tensors.__getitem__, shape, tp_rank=r, tp_size=tp_size) for r in range(tp_size)]
        whole = join(entry, parts, shape)
        assert whole.keys() == tensors.keys()
        assert all(torch.equal(tensor, whole[n]) for n, tensor in tensors.items())


def test_unknown_targets(tmp_path: Path) -> None:
    """Catches an adapter on nothing: a misspelt name, and one that only the experts have."""
    llama = read_shape(tiny.write_model(tmp_path / "llama"))
    moe = read_shape(tiny.write_model(tmp_path / "moe", **tiny.FAMILIES["mixtral"]))
    assert choose_targets(llama, ["v_proj", "q_proj"], key="k") == ("q_proj", "v_proj")
    assert choose_targets(llama, [], key="k") == tuple(sorted(ALL))
    assert possible_targets(moe) == ("k_proj", "o_proj", "q_proj", "v_proj")
    with pytest.raises(UserError, match=r"^k: 'q_prj' is no matrix of a llama.*did you mean 'q_proj'\?; possible"):
        choose_targets(llama, ["q_prj"], key="k")
    with pytest.raises(UserError, match=r"'w1' .*its attention alone"):
        choose_targets(moe, ["w1"], key="k")


NOT_PLAIN: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora=True is not supported"),
    ({"bias": "all"}, "bias=all is not supported"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"peft_type": "IA3"}, "peft_type is IA3"),
    ({"init_lora_weights": "pissa_niter_4"}, "a base whose weights were changed"),
    ({"r": 5}, "of the wrong shape"),
    ({"lora_alpha": None}, "not the config of a LoRA adapter"),
]


def test_adapters_that_are_something_else(tmp_path: Path) -> None:
    """Catches an adapter that is read as plain LoRA although it means something else, and one of another model: layers
    that stay without their adapter, or adapters that no layer takes."""
    base = tiny.write_model(tmp_path / "base")
    directory = peft_models.write_adapter(tmp_path / "adapter", base, targets=["q_proj"])
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text())
    for change in ({"num_hidden_layers": 2}, {"num_hidden_layers": 6}, {"hidden_size": 64}):
        with pytest.raises(UserError, match="does not fit the model"):
            read_peft(directory, read_shape(tiny.write_model(tmp_path / str(change), **change)))
    for different, message in NOT_PLAIN:
        file.write_text(json.dumps(config | different))
        with pytest.raises(UserError, match=message):
            read_peft(directory, read_shape(base))
    (directory / "adapter_model.safetensors").unlink()
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="must be saved as safetensors"):
        read_peft(directory, read_shape(base))
