"""Which tokens lie on which context rank, and which layouts are possible. That the numbers do not depend on the number
of ranks is tests/parallel/test_layouts.py's to show."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.distributed import Axis
from rpo_megatron.errors import UserError
from rpo_megatron.model.context import part_of
from rpo_megatron.model.layout import check_layout
from rpo_megatron.model.shape import read_shape
from tests import tiny


@settings(deadline=None)
@given(ranks=st.integers(1, 5), length=st.integers(1, 7), data=st.data())
def test_every_scored_token_lies_on_one_rank(ranks: int, length: int, data: st.DataObject) -> None:
    """Catches a token at a border that two ranks score, or none; its local position must be its place in the part."""
    positions = data.draw(st.lists(st.integers(0, ranks * length - 1), max_size=20))
    position_N = np.array(positions, dtype=np.int64)
    found: list[int] = []
    for rank in range(ranks):
        cp = Axis(rank=rank, size=ranks, group=None)
        part = part_of(position_N, num_tokens=ranks * length, cp=cp, device=torch.device("cpu"))
        row_T = torch.arange(ranks * length)
        here_M = torch.from_numpy(position_N)[part.scored_M]
        assert part.num_scored == len(positions)
        assert part.contains(here_M).all()
        assert torch.equal(row_T[part.tokens][part.local(here_M)], here_M)
        found += part.scored_M.tolist()
    assert sorted(found) == list(range(len(positions)))


def test_impossible_layouts_are_refused(tmp_path: Path) -> None:
    """Catches heads that are cut in two, or lost where they do not divide."""
    tiny.write_model(tmp_path, num_attention_heads=12, num_key_value_heads=6, hidden_size=48)
    shape = read_shape(tmp_path)
    for context in (1, 2, 3, 6, 12):
        check_layout(shape, tensor=1, pipeline=1, context=context)
    check_layout(shape, tensor=2, pipeline=1, context=3)
    with pytest.raises(UserError, match=r"parallel\.context=5 does not divide the model's 12 heads"):
        check_layout(shape, tensor=1, pipeline=1, context=5)
    with pytest.raises(UserError, match=r"parallel\.context=4 and the 6 kv heads"):
        check_layout(shape, tensor=1, pipeline=1, context=4)
    with pytest.raises(UserError, match=r"parallel\.context=4 does not divide the model's 6 heads of a tensor rank"):
        check_layout(shape, tensor=2, pipeline=1, context=4)
