"""The terms of a rank's memory, by hand."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from rpo_megatron.model.adapter import Adapter, possible_targets
from rpo_megatron.model.interleaving import rows_in_turn
from rpo_megatron.planning.layout import Layout
from rpo_megatron.planning.memory import (
    CONTEXT_BYTES,
    Kept,
    Kernels,
    Row,
    Setting,
    checkpoint_bytes,
    rows_at_the_end,
    stage_memory,
    worst_stage,
)
from rpo_megatron.planning.models import find_model
from rpo_megatron.planning.question import RECOMPUTE

TOKENS = 1000
SETTING = Setting(
    model=find_model("llama-3.1-8b"),
    precision="bf16",
    reference="resident",
    kernels=Kernels(joined_keys=False, forgets=False),
    row=Row(tokens=TOKENS, scored=600),
    microbatches=8,
)
ATTENTION = 2 * (4096 + 1024 + 1024 + 4096) + 4 * 32
"""Bytes per token and layer: query, key, value, result; a log-sum-exp for each of 32 heads."""
ROTARY = 2 * 128
"""Bytes per token, of all layers."""
NORMS = 2 * (2 * 4096 + 4)
INPUT = 2 * 4096
FEED_FORWARD = 2 * 3 * 14336


def test_states() -> None:
    """2 bytes for a weight, 4 for its gradient, 12 over the data ranks, 2 for the reference; catches states that are
    not split, or split over the wrong ranks."""
    memory = stage_memory(SETTING, Layout(data=8), 0)
    assert memory["weights"] == memory["reference"] == 2 * 8_030_261_248
    assert memory["gradients"] == 4 * 8_030_261_248
    assert memory["optimizer"] == 12 * 8_030_261_248 / 8
    assert stage_memory(SETTING, Layout(data=2, context=4), 0)["optimizer"] == memory["optimizer"]
    fp32 = stage_memory(replace(SETTING, precision="fp32", reference="stored"), Layout(data=8), 0)
    assert fp32["weights"] == fp32["gradients"] == 4 * 8_030_261_248  # whose own weights are the master weights
    assert fp32["optimizer"] == 8_030_261_248
    offloaded = replace(SETTING, offloaded_moments=True)
    assert stage_memory(offloaded, Layout(data=8), 0)["optimizer"] == 4 * 8_030_261_248 / 8
    assert fp32["reference"] == 0


def test_kept_by_tensor_ranks() -> None:
    """Heads and columns are split over the tensor ranks; norms and the matrices' inputs only with sequence
    parallelism."""
    for layout, whole in ((Layout(tensor=4), 1), (Layout(tensor=4, sequence=True), 4)):
        kept = Kept.of(SETTING, layout)
        assert kept.attention == TOKENS * ATTENTION / 4
        assert kept.rest == TOKENS * (NORMS + INPUT) / whole
        assert kept.dense == TOKENS * (INPUT / whole + FEED_FORWARD / 4)
        assert kept.input == TOKENS * INPUT / whole
    assert Kept.of(SETTING, Layout(context=2)).attention == TOKENS / 2 * ATTENTION


def test_forgotten() -> None:
    """Catches a plan that counts what is made again: what norms make for two matrices, and the gate for a third."""
    forgetful = Kept.of(replace(SETTING, kernels=Kernels(joined_keys=False)), Layout())
    assert forgetful.rest == TOKENS * NORMS
    assert forgetful.dense == TOKENS * 2 * 2 * 14336


def test_joined_keys() -> None:
    """With them come another result (4096), keys and values (2 x 1024) of 1,500 repeated tokens, and query and key
    (4096 + 1024) beside the value."""
    plain, row = Kept.of(SETTING, Layout()), replace(SETTING.row, repeated=1500.0)
    joined = Kept.of(replace(SETTING, row=row, kernels=replace(SETTING.kernels, joined_keys=True)), Layout())
    assert joined.attention - plain.attention == 2 * (TOKENS * (4096 + 4096 + 1024) + 1500 * 2048)


@pytest.mark.parametrize(
    ("stage", "microbatches", "in_flight"), [(0, 8, 4), (1, 8, 3), (3, 8, 1), (0, 2, 2), (3, 2, 1)]
)
def test_micro_batches_in_flight(stage: int, microbatches: int, in_flight: int) -> None:
    """Stage i of 4 holds 4 - i micro-batches, or all there are; catches a schedule that holds one too many."""
    memory = stage_memory(replace(SETTING, microbatches=microbatches), Layout(pipeline=4), stage)
    assert memory["attention"] == 8 * in_flight * TOKENS * ATTENTION


@pytest.mark.parametrize(
    ("stage", "microbatches", "passes"), [(0, 8, 2 * 3 + 4 + 1), (3, 8, 4 + 1), (0, 5, 10), (0, 4, 8)]
)
def test_interleaved_micro_batches_in_flight(stage: int, microbatches: int, passes: int) -> None:
    """Two chunks of 4 layers on each of 4 stages: 2 passes for each stage that follows, a turn of 4 rows with the first
    chunk, and one pass; where there are no more, all passes of all rows."""
    memory = stage_memory(replace(SETTING, microbatches=microbatches), Layout(pipeline=4, virtual=2), stage)
    assert memory["attention"] == 4 * passes * TOKENS * ATTENTION


def test_recompute_keeps_inputs_only() -> None:
    """A layer's input, 8,192 bytes per token, for each of 32 layers; one layer whole in the moment of its backward."""
    kept, ends = Kept.of(SETTING, Layout()), (8 + ROTARY) * TOKENS + TOKENS * (8192 + 4) + 600 * (8192 + 28)
    without, mlp, memory = (stage_memory(SETTING, Layout(data=64, recompute=again), 0) for again in RECOMPUTE)
    assert memory["attention"] == 0
    assert memory["activations"] == 32 * TOKENS * 8192 + ends
    assert memory["working"] - without["working"] == pytest.approx(kept.largest)
    assert mlp["attention"] == without["attention"]
    assert without["activations"] - mlp["activations"] == pytest.approx(32 * (kept.dense - kept.input))
    assert mlp["working"] - without["working"] == pytest.approx(kept.dense)


def test_overhead() -> None:
    """CUDA, a quarter of a GiB for each axis with more than one rank, a twentieth of the activations."""
    memory = stage_memory(SETTING, Layout(tensor=2, data=4), 0)
    activations = memory["attention"] + memory["activations"]
    assert memory["overhead"] == pytest.approx(CONTEXT_BYTES + 2 * 2**28 + 0.05 * activations)


def test_offloaded_reference_takes_what_the_step_leaves() -> None:
    """It is on the device before the first forward, when a step's activations are not: it only adds where its weights
    are more than they will be."""
    offloaded = replace(SETTING, reference="offloaded")
    small = stage_memory(offloaded, Layout(data=8), 0)
    step = sum(small[name] for name in ("attention", "activations", "head", "working"))
    inside = 2 * TOKENS * (3 * 4096 + 4 * 14336)
    assert small["reference"] == 2 * 8_030_261_248 + inside - step > 0
    large = stage_memory(replace(offloaded, row=Row(tokens=64_000, scored=600)), Layout(data=8), 0)
    assert large["reference"] == 0


def test_fp8() -> None:
    """Two bytes more for each number of a layer's matrices, of which 1.05 billion in embedding and output layer are
    none; the inputs of a layer's four matrices (4096, 4096, 4096, 14336) take a byte each, where a result of attention
    is kept in bf16 as well. A reference in FP8 takes a byte for a number of a matrix."""
    matrices, others = 32 * 218_103_808, 8_030_261_248 - 32 * 218_103_808
    fp8 = replace(SETTING, kernels=replace(SETTING.kernels, fp8=True))
    memory, plain = stage_memory(fp8, Layout(data=8), 0), stage_memory(SETTING, Layout(data=8), 0)
    assert memory["weights"] - plain["weights"] == memory["reference"] - plain["reference"] == 2 * matrices
    assert memory["gradients"] == plain["gradients"]
    assert plain["activations"] - memory["activations"] == 32 * TOKENS * (4096 + 4096 + 14336)
    assert memory["attention"] - plain["attention"] == 32 * TOKENS * 4096
    small = stage_memory(replace(fp8, reference="resident_fp8"), Layout(data=8), 0)
    assert small["reference"] == matrices + 2 * others


def test_head_does_not_grow_with_the_vocabulary() -> None:
    """Tiles: the same for 128k and for 152k words. Logits of the row would be 600 x 128,256 x 6 bytes."""
    large = find_model("qwen3-235b-a22b")
    ours, theirs = (stage_memory(replace(SETTING, model=m), Layout(), 0)["head"] for m in (SETTING.model, large))
    assert ours == theirs  # both have hidden size 4096


def test_kept_logits() -> None:
    """As many as are allowed, but no more than there are: 600 rows of 128,256 words (which need no padding for two
    tensor ranks) in 2 bytes."""
    none, some, all_of_them, split = (
        stage_memory(replace(SETTING, kernels=replace(SETTING.kernels, kept_logits=kept)), layout, 0)["head"]
        for kept, layout in ((0, Layout()), (10**8, Layout()), (10**9, Layout()), (10**9, Layout(tensor=2)))
    )
    assert some - none == 10**8
    assert all_of_them - none == 600 * 128_256 * 2
    assert split - none == 600 * 128_256


@settings(deadline=None, max_examples=60)
@given(pipeline=st.sampled_from([2, 3, 4]), virtual=st.integers(1, 4), rows=st.integers(1, 20))
def test_rows_between_the_passes_of_the_output_layer(pipeline: int, virtual: int, rows: int) -> None:
    """Megatron's schedule on the last rank, pass by pass: so many rows have logits at once that are kept."""
    rows = max(rows, pipeline)
    turn = rows_in_turn(rows, pipeline)
    passes = get_schedule_table(rows, virtual, turn)
    warm_up, here, most = (virtual - 1) * turn, 0, 0
    for i, (_, chunk) in enumerate(passes):
        here += chunk == virtual - 1
        most = max(most, here)
        here -= i >= warm_up and passes[i - warm_up][1] == 0  # backward passes take the chunks the other way round
    assert rows_at_the_end(pipeline=pipeline, virtual=virtual, num_rows=rows) == most
    setting = replace(SETTING, microbatches=rows, kernels=replace(SETTING.kernels, kept_logits=1000.0))
    layout = Layout(pipeline=pipeline, virtual=virtual)
    none = replace(setting, kernels=replace(setting.kernels, kept_logits=0.0))
    last = pipeline - 1
    difference = stage_memory(setting, layout, last)["head"] - stage_memory(none, layout, last)["head"]
    assert difference == pytest.approx(1000 * most)


def test_worst_stage_of_a_pipeline() -> None:
    """The first, which has the most micro-batches in flight."""
    stage, memory = worst_stage(replace(SETTING, row=Row(tokens=16_384, scored=8192)), Layout(pipeline=4))
    assert stage == 0
    assert sum(memory.values()) > sum(stage_memory(SETTING, Layout(pipeline=4), 3).values())


def test_checkpoint() -> None:
    """14 bytes per number on disk whatever the layout; 12 for each number of a rank in host memory, although its share
    of the states is an eighth of that."""
    one, eight = (checkpoint_bytes(SETTING.model, Layout(data=data), "bf16") for data in (1, 8))
    assert one == eight
    assert one.disk == 14 * 8_030_261_248
    assert one.host == 12 * 8_030_261_248
    assert checkpoint_bytes(SETTING.model, Layout(tensor=2, pipeline=2), "bf16").host < 12 * 8_030_261_248 / 3.9


def test_adapter() -> None:
    """Rank 16 on all matrices: 16 x (in + out) numbers of each have gradients, masters and moments; the weights have
    none, and there is no second model. On two tensor ranks the B of columns and the A of rows are split, the others are
    whole. Catches states that are counted for what is frozen."""
    shape = SETTING.model.shape
    adapter = Adapter(rank=16, alpha=16, targets=possible_targets(shape))
    setting = replace(SETTING, reference="base", model=replace(SETTING.model, adapter=adapter))
    trained = 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    memory, plain = stage_memory(setting, Layout(data=8), 0), stage_memory(SETTING, Layout(data=8), 0)
    assert memory["weights"] == 2 * (8_030_261_248 + trained)
    assert memory["gradients"] == 4 * trained
    assert memory["optimizer"] == 12 * trained / 8
    assert memory["reference"] == 0
    assert plain["working"] - memory["working"] == 2 * 2 * 14336 * 4096  # the gradient of the largest matrix
    spread_out = 3 * 16 * 6144 + 2 * 16 * 28672  # of query, key and value, and of gate and up
    assert memory["activations"] - plain["activations"] == 32 * 2 * (TOKENS * 7 * 16 + spread_out)
    split = 4096 + 1024 + 1024 + 14336 + 14336 + 4096 + 14336  # out of q, k, v, gate, up; in of o and down
    whole = 5 * 4096 + 2 * 4096
    assert trained == 32 * 16 * (split + whole)
    assert stage_memory(setting, Layout(tensor=2), 0)["gradients"] == 4 * 32 * 16 * (split / 2 + whole)
    assert checkpoint_bytes(setting.model, Layout(data=8), "bf16").disk == 14 * trained
    reward = replace(setting.model, shape=replace(shape, head="value"))
    assert stage_memory(replace(setting, model=reward), Layout(), 0)["gradients"] == 4 * (trained + 4096)
