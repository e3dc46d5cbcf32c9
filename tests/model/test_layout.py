"""Layouts that a model can be split over, and the layers that each part gets."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.errors import UserError
from rpo_megatron.model.layout import check_layout, chunk_layers, stage_layers
from rpo_megatron.model.parts import Experts
from rpo_megatron.planning.models import find_model

LLAMA = find_model("llama-3.1-8b").shape


def test_check_layout() -> None:
    """A layout that fails deep inside megatron, or advice that would fail again (9 divides the 36 heads, not 12)."""
    check_layout(LLAMA, tensor=8, pipeline=4)
    with pytest.raises(UserError, match=r"parallel.tensor=16 does not divide .* 8 kv heads; nearest that works: 8$"):
        check_layout(LLAMA, tensor=16, pipeline=1)
    check_layout(LLAMA, tensor=1, pipeline=5)  # stages need not be equal
    with pytest.raises(
        UserError, match=r"virtual=5 is more than the model's 32 layers; .* parallel.virtual .* most 4$"
    ):
        check_layout(LLAMA, tensor=1, pipeline=8, virtual=5)
    with pytest.raises(UserError, match=r"parallel.pipeline=33 must be from 1 to the model's 32 layers$"):
        check_layout(LLAMA, tensor=1, pipeline=33)
    with pytest.raises(UserError, match=r"tensor=3 .* 32 heads, 8 kv heads, 14336 .*, 512 rows of the padded"):
        check_layout(replace(LLAMA, vocab_size=509), tensor=3, pipeline=1)
    odd = replace(LLAMA, num_heads=36, num_kv_heads=12)
    with pytest.raises(UserError, match=r"tensor=9 .*; nearest that works: 4$"):
        check_layout(odd, tensor=9, pipeline=1)
    mixtral = replace(LLAMA, experts=Experts(count=4, per_token=2, ffn_size=12, normalise=True))
    with pytest.raises(UserError, match=r"tensor=8 .* 12 feed-forward columns of an expert; nearest that works: 4$"):
        check_layout(mixtral, tensor=8, pipeline=1)
    check_layout(mixtral, tensor=4, pipeline=1)
    with pytest.raises(UserError, match=r"experts needs parallel.sequence=true"):
        check_layout(mixtral, tensor=4, pipeline=1, sequence=False)
    with pytest.raises(UserError, match=r"tensor=0 .* nearest that works: 1$"):
        check_layout(LLAMA, tensor=0, pipeline=1)


@pytest.mark.parametrize(
    ("layers", "pipeline", "stages"),
    [
        (32, 1, (32,)),
        (32, 4, (8, 8, 8, 8)),
        (5, 2, (3, 2)),
        (5, 4, (2, 1, 1, 1)),
        (7, 4, (2, 2, 2, 1)),
        (61, 8, (7, 8, 8, 8, 8, 8, 8, 6)),
        (4, 4, (1, 1, 1, 1)),
    ],
)
def test_stage_layers(layers: int, pipeline: int, stages: tuple[int, ...]) -> None:
    """A stage without layers, layers that get lost, or a slower stage than there need be."""
    assert stage_layers(replace(LLAMA, num_layers=layers), pipeline) == stages


@given(layers=st.integers(1, 130), pipeline=st.integers(1, 130))
def test_stage_layers_always_fit_megatron(layers: int, pipeline: int) -> None:
    """A split that megatron refuses: all stages between the first and the last must be equal, none empty."""
    if pipeline > layers:
        return
    stages = stage_layers(replace(LLAMA, num_layers=layers), pipeline)
    assert len(stages) == pipeline
    assert sum(stages) == layers
    assert min(stages) > 0
    assert len(set(stages[1:-1])) <= 1


@settings(deadline=None)
@given(layers=st.integers(1, 130), pipeline=st.integers(2, 16), virtual=st.integers(2, 16))
def test_chunks_are_even(layers: int, pipeline: int, virtual: int) -> None:
    """A chunk without layers, layers that get lost, or a rank that holds more than it must; and of ranks that cannot
    hold equally many, the last one, with its output layer, one of those with fewest."""
    shape = replace(LLAMA, num_layers=layers)
    if pipeline * virtual > layers:
        with pytest.raises(UserError, match=f"parallel.pipeline={pipeline} "):
            check_layout(shape, tensor=1, pipeline=pipeline, virtual=virtual)
        return
    check_layout(shape, tensor=1, pipeline=pipeline, virtual=virtual)
    chunks = chunk_layers(shape, pipeline, virtual)
    ranks = [sum(chunks[rank::pipeline]) for rank in range(pipeline)]
    assert len(chunks) == pipeline * virtual
    assert sum(chunks) == layers
    assert max(chunks) - min(chunks) <= 1
    assert min(chunks) > 0
    assert max(ranks) - min(ranks) <= 1
    assert ranks[-1] == min(ranks)
