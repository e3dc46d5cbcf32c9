"""Weights that are kept in FP8 are filled by Hugging Face directories and by checkpoints of ours alike; with a stand-in
for Transformer Engine's quantised tensor, which exists only on a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import fp8_utils

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import Groups, start, stop
from rpo_megatron.model.build import build
from rpo_megatron.model.shape import read_shape
from rpo_megatron.model.source import find
from rpo_megatron.training import checkpoint
from tests import tiny
from tests.checkpoints import save


class Quantised(torch.Tensor):
    """As transformer_engine's QuantizedTensor: says that it is bf16, holds FP8, is quantised anew by copy_, and is made
    whole for everything else."""

    codes: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16)
        made.codes = codes
        return made

    def dequantize(self) -> torch.Tensor:
        return self.codes.to(torch.bfloat16)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and isinstance(args[0], Quantised):
            args[0].codes.copy_(whole(args[1]).to(torch.float8_e4m3fn))
            return args[0]
        if func is torch.ops.aten.detach.default:
            return Quantised(args[0].codes)
        return func(*(whole(a) for a in args), **{name: whole(a) for name, a in (kwargs or {}).items()})


def whole(value: Any) -> Any:
    return value.dequantize() if isinstance(value, Quantised) else value


def quantised_model(directory: Path, groups: Groups) -> Any:
    """With the layers' matrices in FP8, not yet set."""
    model: Any = build(read_shape(directory), precision="bf16", sequence_parallel=False, groups=groups)
    for module in model.decoder.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2:
            parameter = torch.nn.Parameter(Quantised(torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)))
            parameter.__dict__.update({key: value for key, value in vars(weight).items() if key != "codes"})
            module.weight = parameter
    return model


def test_filled_by_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that a checkpoint of ours replaces by bf16 ones, leaves at what they were, or cannot read."""
    monkeypatch.setattr(fp8_utils, "is_float8tensor", lambda tensor: isinstance(tensor, Quantised))
    monkeypatch.setattr(fp8_utils, "dequantize_fp8_tensor", Quantised.dequantize)
    tiny.write_model(tmp_path / "model")
    groups = start(ParallelConfig())
    plain: Any = build(read_shape(tmp_path / "model"), precision="bf16", sequence_parallel=False, groups=groups)
    checkpoint.load_weights(plain, find(tmp_path / "model"), groups)
    save(plain, directory=tmp_path / "saved", companions=tmp_path / "model", groups=groups, precision="bf16")
    for source in ("model", "saved"):
        model = quantised_model(tmp_path / "model", groups)
        checkpoint.load_weights(model, find(tmp_path / source), groups)
        found, wanted = dict(model.named_parameters()), dict(plain.named_parameters())
        matrices = [name for name, parameter in found.items() if isinstance(parameter.data, Quantised)]
        assert len(matrices) == 4 * 4
        for name, parameter in found.items():
            expected = wanted[name].detach()
            if name in matrices:
                expected = expected.to(torch.float8_e4m3fn).to(torch.bfloat16)
            assert torch.equal(whole(parameter.detach()), expected), name
    stop()
