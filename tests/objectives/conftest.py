"""`make`: builds Responses from plain lists, with the columns a test does not care about filled in."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rpo_megatron.objectives.responses import Responses


def _make(
    logp: Any,
    *,
    ref: Any = None,
    reward: Any = None,
    valid: Any = None,
    length: Any = None,
    draw: Any = None,
    dtype: torch.dtype = torch.float64,
) -> Responses:
    def floats(values: Any) -> torch.Tensor | None:
        return None if values is None else torch.as_tensor(values, dtype=dtype)

    logp_GK = torch.as_tensor(logp, dtype=dtype)
    valid_GK = torch.ones(logp_GK.shape, dtype=torch.bool) if valid is None else torch.as_tensor(valid)
    draw_G = torch.as_tensor([0.0] * len(logp_GK) if draw is None else draw, dtype=torch.float64)
    return Responses(
        logp_GK=logp_GK,
        length_GK=valid_GK.long() * 7 if length is None else torch.as_tensor(length),
        ref_logp_GK=floats(ref),
        reward_GK=floats(reward),
        valid_GK=valid_GK,
        draw_G=draw_G,
    )


@pytest.fixture(scope="session")
def make() -> Callable[..., Responses]:
    return _make
