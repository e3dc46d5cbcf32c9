"""FLOPs, bytes and seconds of a step, by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.planning.hardware import GPUS, LINK_EFFICIENCY, TENSOR_EFFICIENCY, Cluster
from rpo_megatron.planning.layout import Layout
from rpo_megatron.planning.memory import Row
from rpo_megatron.planning.models import find_model
from rpo_megatron.planning.time import FP8_GAIN, Share, Timing, forward_flops, model_flops, step_time
from rpo_megatron.planning.volume import volumes
from rpo_megatron.planning.workload import given_lengths

MODEL = find_model("llama-3.1-8b")
WORK = given_lengths(prompt=1024, response=512, responses=4, share_prompt=True)
TIMING = Timing(
    model=MODEL,
    work=WORK,
    cluster=Cluster(gpu=GPUS["H100"], gpus=8, per_node=8),
    precision="bf16",
    reference="stored",
    groups_per_step=64,
    efficiency=0.5,
    overlap=False,
)


def flops_of(prompt: int, response: int, responses: int, *, share: bool = True, **changes: Any) -> float:
    work = given_lengths(prompt=prompt, response=response, responses=responses, share_prompt=share)
    flops = forward_flops(MODEL, tokens=work.tokens, pairs=work.pairs, scored=work.scored)
    return model_flops(flops, reference=changes.get("reference", "resident"))


def test_flops_by_hand() -> None:
    """A group of 512 / 2 x 512: 2 x 32 x 218,103,808 per token, 2 x 32 x 4096 for each of 512^2 + 2 (1024^2 - 512^2)
    pairs, 2 x 128,256 x 4096 for each of 1,024 scored tokens. Catches a head over prompts, attention counted twice."""
    work = given_lengths(prompt=512, response=512, responses=2, share_prompt=True)
    flops = forward_flops(MODEL, tokens=work.tokens, pairs=work.pairs, scored=work.scored)
    assert flops.layers == 64 * 218_103_808 * 1536
    assert flops.attention == 64 * 4096 * 1_835_008
    assert flops.head == 2 * 128_256 * 4096 * 1024
    assert flops.total == flops.layers + flops.attention + flops.head


def test_published_rooflines() -> None:
    """TFLOP of a group with a resident reference, worked out before this program by other means; without sharing the
    output layer still sees responses only."""
    assert flops_of(512, 512, 2) == pytest.approx(92.0e12, rel=2e-3)
    assert flops_of(1024, 512, 4) == pytest.approx(186.7e12, rel=2e-3)
    assert flops_of(1024, 512, 4, share=False) == pytest.approx(361.6e12, rel=2e-3)
    assert flops_of(1024, 512, 4, reference="stored") == pytest.approx(186.7e12 * 3 / 4, rel=2e-3)


def test_experts_compute_the_tokens_that_chose_them() -> None:
    """8 of 128 experts and the router; catches a mixture that costs as much as all its experts."""
    model = find_model("qwen3-235b-a22b")
    layer = 4096 * (2 * 8192 + 2 * 512) + 8 * 3 * 4096 * 1536 + 128 * 4096
    assert forward_flops(model, tokens=10, pairs=0, scored=0).layers == 2 * 94 * layer * 10


def test_latent_attention_by_hand() -> None:
    """DeepSeek-V3's attention: what is whole on every tensor rank counted too; and heads of 192 and 128 numbers."""
    layer = 7168 * (1536 + 512 + 64) + 128 * (1536 * 192 + 512 * 256 + 128 * 7168)
    work = 3 * (layer + 3 * 7168 * 18432) + 58 * (layer + 9 * 3 * 7168 * 2048 + 256 * 7168)
    flops = forward_flops(find_model("deepseek-v3"), tokens=10, pairs=1, scored=0)
    assert flops.layers == 2 * work * 10
    assert flops.attention == 61 * 128 * (192 + 128)


def test_share_of_the_busiest_rank() -> None:
    """64 groups of 3,072 tokens over 3 ranks: 22 groups, 67,584 tokens, 9 rows of at most 8,192 tokens; with more ranks
    than groups one group each, and with rows shorter than a group as many rows as groups; interleaved as many as
    stages at least, of which some are empty."""
    share = Share.of(WORK, Layout(data=3, tokens_per_microbatch=8192), groups_per_step=64)
    assert (share.groups, share.microbatches) == (22, 9)
    assert share.row.tokens == pytest.approx(67_584 / 9)
    assert share.row.repeated == pytest.approx(22 * 6144 / 9)
    assert Share.of(WORK, Layout(data=128), groups_per_step=64).groups == 1
    assert Share.of(WORK, Layout(tokens_per_microbatch=100), groups_per_step=64).microbatches == 64
    interleaved = Share.of(WORK, Layout(data=64, pipeline=4, virtual=2), groups_per_step=64)
    assert (interleaved.groups, interleaved.microbatches, interleaved.row.tokens) == (1, 4, 3072 / 4)


def test_one_gpu_is_flops_and_weights() -> None:
    """Of one row: 3 x layers, 3.5 x attention and 4 x head over half the peak, and weights through memory 2 + (4 + 8)/2
    times. Catches a term that is counted in the wrong number of passes."""
    cluster = Cluster(gpu=GPUS["H100"], gpus=1, per_node=8)
    timing = replace(TIMING, cluster=cluster, groups_per_step=1)
    flops = forward_flops(MODEL, tokens=WORK.tokens, pairs=WORK.pairs, scored=WORK.scored)
    executed = 3 * flops.layers + 3.5 * flops.attention + 4 * flops.head
    expected = executed / (0.5 * 989e12) + 8 * 2 * 8_030_261_248 / 3.35e12
    phases = step_time(timing, Layout()).phases
    assert phases["policy"] == pytest.approx(expected)
    assert phases["optimizer"] == pytest.approx(8_030_261_248 * 30 / 3.35e12)
    assert phases["bubble"] == pytest.approx(0, abs=1e-9)
    assert phases["tensor"] == phases["pipeline"] == phases["data"] == phases["reference"] == 0
    again = step_time(timing, Layout(recompute="full")).phases
    extra = (flops.layers + flops.attention) / (0.5 * 989e12) + 2 * 8_030_261_248 / 3.35e12
    assert again["policy"] == pytest.approx(expected + extra)
    inside = 3 * 4096 * 14336 / 218_103_808 * flops.layers / (0.5 * 989e12)
    assert step_time(timing, Layout(recompute="mlp")).phases["policy"] == pytest.approx(expected + inside)
    faster = step_time(replace(timing, fp8=True), Layout()).phases["policy"]
    assert expected - faster == pytest.approx(3 * flops.layers * (1 - 1 / FP8_GAIN) / (0.5 * 989e12))


def test_reference_is_a_forward_pass() -> None:
    """And an offloaded one comes over PCIe once a step."""
    cluster = Cluster(gpu=GPUS["H100"], gpus=1, per_node=8)
    timing = replace(TIMING, cluster=cluster, groups_per_step=1, reference="resident")
    flops = forward_flops(MODEL, tokens=WORK.tokens, pairs=WORK.pairs, scored=WORK.scored)
    resident = step_time(timing, Layout()).phases["reference"]
    assert resident == pytest.approx(flops.total / (0.5 * 989e12) + 2 * 8_030_261_248 / 3.35e12)
    offloaded = step_time(replace(timing, reference="offloaded"), Layout()).phases["reference"]
    assert offloaded - resident == pytest.approx(2 * 8_030_261_248 / 64e9)


@settings(deadline=None, max_examples=30)
@given(pipeline=st.sampled_from([2, 4, 8]), rows=st.integers(1, 32), virtual=st.sampled_from([1, 2, 4]))
def test_bubble(pipeline: int, rows: int, virtual: int) -> None:
    """With equal stages (no output layer to speak of, and no way of the vocabulary through memory) the share that is
    lost is (p - 1) / (m + p - 1); with v chunks on each, and a row for each stage at least, (p - 1) / (v m + p - 1)."""
    gpu = replace(GPUS["H100"], hbm_bandwidth=math.inf)
    cluster, work = Cluster(gpu=gpu, gpus=8, per_node=8), replace(WORK, scored=0.0)
    timing = replace(TIMING, work=work, groups_per_step=rows, cluster=cluster)
    phases = step_time(timing, Layout(pipeline=pipeline, virtual=virtual, tokens_per_microbatch=1)).phases
    lost = phases["bubble"] / (phases["bubble"] + phases["policy"])
    m = max(rows, pipeline) if virtual > 1 else rows
    assert lost == pytest.approx((pipeline - 1) / (virtual * m + pipeline - 1))


def test_bytes_of_a_row() -> None:
    """1,000 tokens of 8,192 bytes through 32 layers of 4 tensor ranks: 2 all-reduces are 4 x 3/4 of them; a ring's rank
    sends 3/4 of what is gathered."""
    hidden = 1000 * 8192.0
    volume = volumes(MODEL, Layout(tensor=4), Row(tokens=1000, scored=1), width=2)
    assert volume.tensor == 32 * 4 * 3 / 4 * hidden
    assert volume.backward_share == 2
    assert volumes(MODEL, Layout(tensor=4, sequence=True), Row(tokens=1000, scored=1), width=2).backward_share == 2.5
    staged = volumes(MODEL, Layout(tensor=4, pipeline=2, sequence=True), Row(tokens=1000, scored=1), width=2)
    assert staged.neighbour == hidden / 4
    assert volumes(MODEL, Layout(tensor=4, pipeline=2), Row(tokens=1000, scored=1), width=2).neighbour == hidden
    interleaved = Layout(tensor=4, pipeline=2, virtual=4)
    assert volumes(MODEL, interleaved, Row(tokens=1000, scored=1), width=2).neighbour == 4 * hidden
    assert staged.tensor == volume.tensor / 2
    split = volumes(MODEL, Layout(context=2), Row(tokens=1000, scored=1), width=2)
    assert split.context == 32 * 1 / 2 * 500 * 2 * (2 * 4096 + 2 * 1024)
    data = volumes(MODEL, Layout(data=8), Row(tokens=1000, scored=1), width=2)
    assert data.gradients == 4 * 8_030_261_248 * 7 / 8
    assert data.weights == 2 * 8_030_261_248 * 7 / 8
    experts = volumes(find_model("qwen3-235b-a22b"), Layout(data=8, expert=8), Row(tokens=1000, scored=1), width=2)
    assert experts.expert == 94 * 2 * 7 / 8 * 8 * hidden
    layout = Layout(tensor=2, data=4, expert=4, sequence=True)
    experts = volumes(find_model("qwen3-235b-a22b"), layout, Row(tokens=1000, scored=1), width=2)
    assert experts.expert == 94 * 2 * 3 / 4 * 8 * hidden / 2
    assert experts.tensor == 94 * 2 / 2 * hidden
    whole = volumes(find_model("qwen3-235b-a22b"), replace(layout, expert=1), Row(tokens=1000, scored=1), width=2)
    assert whole.tensor == 94 * (2 + 2 * 8) / 2 * hidden


def test_bytes_of_a_step() -> None:
    """3 rows with a reference: forward and backward of the policy (2.5), a forward (1); to the next stage 3 passes."""
    volume = volumes(MODEL, Layout(tensor=2, pipeline=2, sequence=True), Row(tokens=100, scored=1), width=2)
    step = volume.of_step(3, 3)
    assert step.tensor == 3 * 3.5 * volume.tensor
    assert step.neighbour == 9 * volume.neighbour
    assert step.gradients == volume.gradients


def test_links() -> None:
    """NVLink inside a node; across nodes a ring's members in a node share their adapters; neighbours have one each."""
    cluster = Cluster(gpu=GPUS["H100"], gpus=64, per_node=8)
    assert cluster.collective_bandwidth(size=8, stride=1) == 450e9 * LINK_EFFICIENCY
    assert cluster.collective_bandwidth(size=8, stride=8) == 50e9 * LINK_EFFICIENCY
    assert cluster.collective_bandwidth(size=16, stride=2) == 200e9 * LINK_EFFICIENCY
    assert cluster.collective_bandwidth(size=64, stride=1) == 400e9 * LINK_EFFICIENCY
    assert cluster.neighbour_bandwidth(size=2, stride=4) == 450e9 * LINK_EFFICIENCY
    assert cluster.neighbour_bandwidth(size=2, stride=8) == 50e9 * LINK_EFFICIENCY
    assert cluster.nodes == 8


def test_overlap_hides_what_fits_behind_a_micro_batch() -> None:
    """Without, the reduction waits in full: 4 bytes x 8.03e9 x 7/8 over NVLink; with, an 8 B model's backward of 3,072
    tokens is longer."""
    volume = 6 * 8_030_261_248 * 7 / 8
    assert step_time(TIMING, Layout(data=8)).phases["data"] == pytest.approx(volume / (450e9 * LINK_EFFICIENCY))
    assert step_time(replace(TIMING, overlap=True), Layout(data=8)).phases["data"] == 0


def test_seconds_of_communication() -> None:
    """8 rows of 3,072 tokens over 2 stages of 4 tensor ranks in a node: 16 layers send 2 passes of 4 x 3/4 of a row's
    hidden states over NVLink for each row; 8 + 1 times 2 rows go to the neighbour. Over two nodes that is the slower
    adapter's."""
    timing, hidden = replace(TIMING, groups_per_step=8), 3072 * 8192.0
    nvlink, adapter = 450e9 * LINK_EFFICIENCY, 50e9 * LINK_EFFICIENCY
    layout = Layout(tensor=4, pipeline=2, tokens_per_microbatch=1)
    phases = step_time(timing, layout).phases
    assert phases["tensor"] == pytest.approx(8 * 2 * 16 * 4 * 3 / 4 * hidden / nvlink)
    assert phases["pipeline"] == pytest.approx(9 * 2 * hidden / nvlink)
    small = replace(timing, cluster=Cluster(gpu=GPUS["H100"], gpus=8, per_node=4))
    assert step_time(small, layout).phases["pipeline"] == pytest.approx(9 * 2 * hidden / adapter)


def test_tensor_ranks_share_the_work() -> None:
    """Twice as many take half the FLOPs each at 0.97 of the speed, and half the weights."""
    timing = replace(TIMING, groups_per_step=8)
    one, two = (step_time(timing, layout).phases["policy"] for layout in (Layout(data=8), Layout(tensor=2, data=8)))
    traffic = 8 * 2 * 8_030_261_248 / 3.35e12
    assert two == pytest.approx((one - traffic) / 2 / TENSOR_EFFICIENCY + traffic / 2, rel=1e-3)
