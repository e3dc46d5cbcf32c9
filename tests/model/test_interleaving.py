"""What we say about megatron's interleaved schedule, against the schedule."""

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

from rpo_megatron.model.interleaving import passes_in_flight, rows_in_turn

rows = st.integers(1, 100)
pipelines = st.integers(2, 16)


@settings(deadline=None)
@given(num_rows=rows, pipeline=pipelines)
def test_turns_that_megatron_takes(num_rows: int, pipeline: int) -> None:
    """A turn that megatron refuses (between the pipeline's size and the number of rows; the last one may not have fewer
    rows than the pipeline has ranks), or a longer one than there need be, which costs memory."""
    if num_rows < pipeline:
        return
    allowed = [n for n in range(pipeline, num_rows + 1) if not 0 < num_rows % n < pipeline]
    assert rows_in_turn(num_rows, pipeline) == allowed[0]
    if num_rows % pipeline == 0:
        assert rows_in_turn(num_rows, pipeline) == pipeline


@settings(deadline=None)
@given(num_rows=rows, pipeline=pipelines, virtual=st.integers(1, 8), data=st.data())
def test_passes_in_flight_are_megatrons(num_rows: int, pipeline: int, virtual: int, data: st.DataObject) -> None:
    """A planner that counts fewer micro-batches than the schedule holds: its passes before the first backward, and the
    one just before it."""
    num_rows = max(num_rows, pipeline)
    rank = data.draw(st.integers(0, pipeline - 1))
    group = SimpleNamespace(size=lambda: pipeline, rank=lambda: rank)
    chunks = virtual if virtual > 1 else None
    total, _, warm_up, _ = get_pp_rank_microbatches(
        num_rows,
        virtual,
        rows_in_turn(num_rows, pipeline),
        p2p_communicator=SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=chunks),
    )
    found = passes_in_flight(rank, pipeline=pipeline, virtual=virtual, num_rows=num_rows)
    assert found == min(total, warm_up + 1)
