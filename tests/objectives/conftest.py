"""`make`: builds Responses from plain lists, with the columns a test does not care about filled in."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rpo_megatron.objectives.responses import Responses


def _make(
    logp: Any = None,
    *,
    value: Any = None,
    ref: Any = None,
    token_kl: Any = None,
    reward: Any = None,
    rewards: Any = None,
    source: Any = None,
    valid: Any = None,
    length: Any = None,
    draw: Any = None,
    progress: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Responses:
    """[G, K] lists or tensors; rewards is [G, K, M], draw [G]. One of logp and value gives the shape."""

    def floats(values: Any) -> torch.Tensor | None:
        return None if values is None else torch.as_tensor(values, dtype=dtype)

    shape = torch.as_tensor(value if logp is None else logp).shape
    valid_GK = torch.ones(shape, dtype=torch.bool) if valid is None else torch.as_tensor(valid)
    draw_G = torch.as_tensor([0.0] * len(valid_GK) if draw is None else draw, dtype=torch.float64)
    return Responses(
        logp_GK=floats(logp),
        value_GK=floats(value),
        length_GK=valid_GK.long() * 7 if length is None else torch.as_tensor(length),
        ref_logp_GK=floats(ref),
        token_kl_GK=floats(token_kl),
        reward_GK=floats(reward),
        rewards_GKM=floats(rewards),
        source_GK=None if source is None else torch.as_tensor(source, dtype=torch.bool),
        valid_GK=valid_GK,
        draw_G=draw_G,
        progress=progress,
    )


@pytest.fixture(scope="session")
def make() -> Callable[..., Responses]:
    return _make
