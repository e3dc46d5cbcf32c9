"""The search: what is tried, what fits, what breaks first, what is called best."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.planning.hardware import GIB, GPUS, Cluster
from rpo_megatron.planning.layout import Layout
from rpo_megatron.planning.layouts import Estimate, Question, candidates, divisors, search
from rpo_megatron.planning.memory import GPU
from rpo_megatron.planning.models import find_model
from rpo_megatron.planning.time import Timing
from rpo_megatron.planning.workload import given_lengths


def question(name: str, gpus: int, *, per_node: int = 8) -> Question:
    timing = Timing(
        model=find_model(name),
        work=given_lengths(prompt=1024, response=512, responses=4, share_prompt=True),
        cluster=Cluster(gpu=GPUS["H100"], gpus=gpus, per_node=per_node),
        precision="bf16",
        reference="resident",
        groups_per_step=64,
        efficiency=0.47,
        overlap=True,
    )
    return Question(timing=timing, kernels=GPU)


def test_what_is_tried() -> None:
    """Every split of 8 GPUs over 32 heads, 8 kv heads and 32 layers, in equal chunks; no sequence parallelism without
    tensor ranks; of the rows shorter than a group (2,048) one stands for all."""
    tried = list(candidates(question("llama-3.1-8b", 8)))
    splits = {(one.tensor, one.pipeline, one.data) for one in tried}
    assert splits == {(t, p, 8 // t // p) for t in (1, 2, 4, 8) for p in divisors(8 // t)}
    assert not [one for one in tried if one.sequence and one.tensor == 1]
    assert {one.tokens_per_microbatch for one in tried} == {2048, 4096, 8192, 16384, 32768, 65536}
    assert {one.virtual for one in tried if one.pipeline == 4} == {1, 2, 4, 8}
    assert {one.virtual for one in tried if one.pipeline == 8} == {1, 2, 4}
    assert {one.virtual for one in tried if one.pipeline == 1} == {1}
    long = question("llama-3.1-8b", 8)
    long = replace(long, timing=replace(long.timing, work=replace(long.timing.work, tokens=9000.0)))
    assert {one.tokens_per_microbatch for one in candidates(long)} == {8192, 16384, 32768, 65536}


def test_layouts_that_the_model_refuses_are_not_tried() -> None:
    """3 GPUs: 8 kv heads are not divisible by 3, 32 layers are split unevenly; nor tensor ranks beyond a node."""
    assert {(one.tensor, one.pipeline) for one in candidates(question("llama-3.1-8b", 3))} == {(1, 1), (1, 3)}
    tried = candidates(question("llama-3.1-8b", 8, per_node=2))
    assert max(one.tensor for one in tried) == 2


def test_experts_are_spread_over_ranks_of_a_stage() -> None:
    """With tensor ranks megatron's experts need sequence parallelism."""
    tried = list(candidates(question("qwen3-235b-a22b", 32)))
    assert {one.expert for one in tried if (one.tensor, one.pipeline) == (4, 2)} == {1, 2, 4, 8, 16}
    assert all(one.sequence == (one.tensor > 1) for one in tried)


@settings(deadline=None, max_examples=15)
@given(gpus=st.sampled_from([1, 2, 3, 8, 12, 16, 32]), name=st.sampled_from(["llama-3.2-1b", "llama-3.1-8b"]))
def test_answer_is_sound(gpus: int, name: str) -> None:
    """Every split is answered once; what is listed fits, and is in order; what is not fits nowhere and says where."""
    asked = question(name, gpus)
    plan = search(asked)
    memory = 0.95 * asked.timing.cluster.gpu.memory
    assert all(one.bytes <= memory and one.fits and one.breaks is None for one in plan.best)
    assert all(one.bytes > memory and one.breaks in one.memory for one in plan.too_large)
    seconds = [one.time.seconds for one in plan.best]
    assert seconds == sorted(seconds)
    splits = [(one.layout.tensor, one.layout.pipeline) for one in plan.best + plan.too_large]
    assert len(splits) == len(set(splits)) == len({(one.tensor, one.pipeline) for one in candidates(asked)})
    assert all(one.layout.world == gpus for one in plan.best)


def test_first_term_that_breaks() -> None:
    """Llama-3.1-8B with a resident reference on one H100, of whose 79.1 GiB 75.1 may be planned: 15.0 of weights, 29.9
    of gradients, and then 89.7 of optimizer states."""
    estimate = Estimate(question=question("llama-3.1-8b", 1), layout=Layout())
    assert estimate.breaks == "optimizer"
    assert not estimate.fits
    assert estimate.memory["optimizer"] / GIB == pytest.approx(89.74, abs=0.01)
    assert estimate.share.groups == 64


def test_full_rows_count_for_memory_average_ones_for_time() -> None:
    """64 groups of 3,072 tokens in rows of up to 8,192 on one rank: 24 rows of exactly 8,192. With rows of up to 10,000
    tokens they are on average smaller than the largest one may be, and a longer group has a longer row."""
    asked = question("llama-3.2-1b", 1)
    even = Estimate(question=asked, layout=Layout(tokens_per_microbatch=8192))
    assert even.share.row.tokens == 8192
    uneven = Estimate(question=asked, layout=Layout(tokens_per_microbatch=10_000))
    assert uneven.share.row.tokens == pytest.approx(64 * 3072 / 20)
    assert uneven.memory["activations"] / even.memory["activations"] == pytest.approx(10_000 / 8192)
    long = replace(asked, timing=replace(asked.timing, work=replace(asked.timing.work, longest=16_384)))
    doubled = Estimate(question=long, layout=Layout(tokens_per_microbatch=8192))
    assert doubled.memory["activations"] == pytest.approx(2 * even.memory["activations"])


def test_mfu_counts_model_flops() -> None:
    """186.7 TFLOP for each of 64 groups, over the time and the peak of all 8 GPUs."""
    estimate = search(question("llama-3.1-8b", 8)).best[0]
    assert estimate.mfu == pytest.approx(64 * 186.7e12 / estimate.time.seconds / (8 * 989e12), rel=2e-3)
    assert estimate.tokens_per_second == pytest.approx(64 * 3072 / estimate.time.seconds)
