"""Transformer Engine's attention with a stand-in for its module: what it is asked for, and what is refused."""

import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rpo_megatron.errors import UserError
from rpo_megatron.model import attention as attention_module
from rpo_megatron.model import te_attention
from rpo_megatron.model.attention import check_attention
from rpo_megatron.model.row import Segments
from rpo_megatron.training.resolve import resolve
from tests import tiny
from tests.model import varlen_stand_in
from tests.model.test_attention import HEAD, dense, tensors
from tests.model.test_hf import tiny_shape


class DotProductAttention:
    """As transformer_engine.pytorch's (2.20), of what is used of it."""

    def __init__(self, num_attention_heads: int, kv_channels: int, **options: Any) -> None:
        assert options.pop("attention_dropout") == 0.0
        assert options.pop("qkv_format") == "thd"
        assert options.pop("attn_mask_type") == "padding_causal"
        self.scale = options.pop("softmax_scale")
        self.sizes = num_attention_heads, options.pop("num_gqa_groups"), kv_channels
        assert not options

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        assert options.pop("qkv_format") == "thd"
        assert options.pop("attn_mask_type") == "padding_causal"
        assert (query.shape[1], key.shape[1], query.shape[2]) == self.sizes
        back, ahead = options.pop("window_size")
        assert ahead == 0
        names = ("cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv")
        borders = [options.pop(name) for name in names]
        assert not options
        attend: Any = varlen_stand_in.forward
        window = None if back == -1 else back
        out: torch.Tensor = attend(query, key, value, *borders, 0.0, True, False, scale=self.scale, window=window)[0]
        return out.flatten(1)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = SimpleNamespace(DotProductAttention=DotProductAttention, autocast=lambda enabled: nullcontext())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "0")
    te_attention._module.cache_clear()
    yield
    te_attention._module.cache_clear()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_equals_dense_attention(window: int | None) -> None:
    """Catches padding that is no segment, a window that is off by one, heads or scale of another model, a longest
    segment that is too short."""
    segments = Segments(lengths=[5, 70, 4, 2], prompts=[-1] * 4)
    query, key, value, _ = tensors(81, groups=2, dtype=torch.float32)
    got = te_attention.te_attention(query, key, value, segments, scale=1 / math.sqrt(HEAD), window=window)
    torch.testing.assert_close(got, dense(query, key, value, segments, window=window), rtol=1e-4, atol=1e-5)


def test_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a mask that silently hides the prompt, a cap that is silently dropped, and a fall-back to a kernel that
    builds the score matrix."""
    tiny.write_model(tmp_path / "model")
    tiny.write_store(tmp_path / "train", num_groups=4)
    with pytest.raises(UserError, match=r"data\.share_prompt=false"):
        resolve(tiny.run_config(tmp_path, "kernels.attention=te"))
    resolve(tiny.run_config(tmp_path, "kernels.attention=te", "data.share_prompt=false"))
    shape, gpu = tiny_shape(), torch.device("cuda")
    monkeypatch.setattr(attention_module, "check_transformer_engine", lambda wanted_by, least: None)
    check_attention("te", shape, device=gpu, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        check_attention("te", shape, device=torch.device("cpu"), dtype=torch.bfloat16)
    for name in ("te", "merged"):
        with pytest.raises(UserError, match="precision=bf16"):
            check_attention(name, shape, device=gpu, dtype=torch.float32)
    with pytest.raises(UserError, match="soft-cap"):
        check_attention("te", replace(shape, attention_softcap=5.0), device=gpu, dtype=torch.bfloat16)
