"""The loader over a real store: the same groups for every layout, packing and resume; errors reach the caller."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.data.cost import CostModel
from rpo_megatron.data.loader import Loader, Step
from rpo_megatron.data.manifest import TokenizerInfo
from rpo_megatron.data.microbatch import MicroBatch
from rpo_megatron.data.store import Group, Store
from rpo_megatron.data.writer import StoreWriter
from rpo_megatron.errors import UserError

NUM_GROUPS = 23
fast = settings(deadline=None, max_examples=25)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """23 groups of 2 to 4 responses; the reward of a response is its number in the store, which identifies it."""
    generator = np.random.default_rng(0)
    prefix = str(tmp_path_factory.mktemp("store") / "train")
    info = TokenizerInfo(path="none", fingerprints={}, vocab_size=100, bos_id=None, eos_id=None)
    with StoreWriter(prefix, tokenizer=info) as writer:
        for i in range(NUM_GROUPS):
            lengths = generator.integers(1, 12, size=generator.integers(3, 6))
            prompt, *responses = (generator.integers(1, 100, size=n) for n in lengths)
            writer.add(prompt, responses, 10 * i + np.arange(len(responses)))
        writer.finish()
    return Store.open(prefix)


def loader(store: Store, **changes: Any) -> Loader:
    settings: dict[str, Any] = {
        "seed": 5,
        "groups_per_step": 6,
        "tokens_per_microbatch": 120,
        "packing": True,
        "share_prompt": False,
        "cost": CostModel(per_pair=0.001, per_scored=0.2),
        "dp_rank": 0,
        "dp_size": 1,
        "multiple": 4,
    }
    return Loader(store, **(settings | changes))


def contents(rows: list[MicroBatch]) -> Counter[tuple[int, float, tuple[tuple[float, tuple[int, ...]], ...]]]:
    """What a step trains on: (group, draw, its responses as (reward, labels)), in no order."""
    found: Counter[tuple[int, float, tuple[tuple[float, tuple[int, ...]], ...]]] = Counter()
    for row in rows:
        assert row.reward_GK is not None
        labels = iter(np.split(row.scored_label_N, np.cumsum(row.length_GK.ravel())[:-1]))
        for g, group_id in enumerate(row.group_ids_G):
            runs = [(row.reward_GK[g, k], next(labels)) for k in range(row.length_GK.shape[1])]
            responses = tuple((float(reward), tuple(run.tolist())) for reward, run in runs if run.size)
            if group_id >= 0:
                found[int(group_id), float(row.draw_G[g]), responses] += 1
    return found


def all_ranks(store: Store, read: Callable[[Loader], list[MicroBatch]], **changes: Any) -> list[MicroBatch]:
    ranks = [read(loader(store, dp_rank=rank, **changes)) for rank in range(changes["dp_size"])]
    assert len({len(rows) for rows in ranks}) == 1
    return [row for rows in ranks for row in rows]


@fast
@given(
    step=st.integers(0, 12),
    groups_per_step=st.integers(1, 30),
    dp_size=st.integers(1, 5),
    budget=st.integers(1, 400),
    packing=st.booleans(),
)
def test_layout_and_packing_change_nothing(
    store: Store, step: int, groups_per_step: int, dp_size: int, budget: int, packing: bool
) -> None:
    """A global batch that depends on DP size, budget or packing, in groups, labels, rewards or random numbers."""
    expected = contents(loader(store, groups_per_step=groups_per_step, packing=False).step(step).rows)
    rows = all_ranks(
        store,
        lambda one: one.step(step).rows,
        groups_per_step=groups_per_step,
        dp_size=dp_size,
        tokens_per_microbatch=budget,
        packing=packing,
    )
    assert contents(rows) == expected
    assert sum(row.num_groups for row in rows) == groups_per_step
    assert all(row.tokens_T.size % 4 == 0 for row in rows)
    assert all(row.tokens_T.size <= budget or row.num_groups <= 1 for row in rows)


@fast
@given(step=st.integers(0, 12), dp_size=st.integers(1, 5), budget=st.integers(1, 400), share_prompt=st.booleans())
def test_every_rank_has_the_same_plan(store: Store, step: int, dp_size: int, budget: int, share_prompt: bool) -> None:
    """Ranks that plan for themselves, or with lengths other than those of the rows they then build: what the plan says
    of the whole step is what all ranks' rows add up to."""
    changes = {"dp_size": dp_size, "tokens_per_microbatch": budget, "share_prompt": share_prompt}
    steps = [loader(store, dp_rank=rank, **changes).step(step) for rank in range(dp_size)]
    rows = [row for one in steps for row in one.rows]
    balance = steps[0].balance
    assert all(one.balance == balance for one in steps)
    assert balance.row_tokens == sum(row.tokens_T.size for row in rows)
    padding = sum(int(row.segments_S[-1]) for row in rows if row.has_padding)
    assert balance.useful_tokens == balance.row_tokens - padding
    assert balance.max_cost >= balance.mean_cost > 0


@fast
@given(seed=st.integers(0, 2**31), groups_per_step=st.integers(1, 30))
def test_an_epoch_holds_every_group_once(store: Store, seed: int, groups_per_step: int) -> None:
    """A group lost or doubled at the border of steps or epochs: so many steps as make whole epochs."""
    one = loader(store, seed=seed, groups_per_step=groups_per_step)
    seen = Counter(i for step in range(NUM_GROUPS) for row in one.step(step).rows for i in row.group_ids_G.tolist())
    assert seen == {i: groups_per_step for i in range(NUM_GROUPS)}


def test_a_step_over_two_epochs_draws_for_each(store: Store) -> None:
    """The second epoch of a step that repeats the random pairs of the first."""
    found = contents(loader(store, groups_per_step=2 * NUM_GROUPS).step(0).rows)
    draws = {i: {key[1] for key in found if key[0] == i} for i in range(NUM_GROUPS)}
    assert all(len(both) == 2 for both in draws.values())


def same(one: Step, other: Step) -> bool:
    ours, theirs = one.rows, other.rows
    return (
        one.balance == other.balance
        and len(ours) == len(theirs)
        and all(
            np.array_equal(getattr(a, name), getattr(b, name))
            for a, b in zip(ours, theirs, strict=True)
            for name in vars(a)
            if isinstance(getattr(a, name), np.ndarray)
        )
    )


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 2, 0, 3]])
def test_step_is_a_pure_function(store: Store, order: list[int]) -> None:
    """A prefetched step handed out for another one after a jump: any order of calls gives what a fresh loader gives."""
    one = loader(store)
    for step in order:
        assert same(one.step(step), loader(store).step(step))


@fast
@given(start=st.integers(0, NUM_GROUPS), count=st.integers(0, 40), dp_size=st.integers(1, 4))
def test_sequential_visits_each_group_once(store: Store, start: int, count: int, dp_size: int) -> None:
    """An evaluation that counts a group twice, misses one, or runs past the end of the store."""
    rows = all_ranks(store, lambda one: one.sequential(start, count), dp_size=dp_size)
    ids = sorted(i for row in rows for i in row.group_ids_G.tolist() if i >= 0)
    assert ids == list(range(start, min(start + count, NUM_GROUPS)))


def test_evaluation_draws_do_not_move(store: Store) -> None:
    """Random pairs of an evaluation that depend on where it starts."""
    late = {key[0]: key[1] for key in contents(loader(store).sequential(10, 5))}
    whole = {key[0]: key[1] for key in contents(loader(store).sequential(0, NUM_GROUPS))}
    assert late == {i: whole[i] for i in range(10, 15)}


def test_an_error_in_the_thread_reaches_the_caller(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged group that hangs the run or is skipped: raised by the step it belongs to, not before, and a step that
    can be read still can."""
    one = loader(store, groups_per_step=NUM_GROUPS // 2)
    broken = set(contents(one.step(1).rows))
    bad = min(key[0] for key in broken)
    original = Store.group

    def group(self: Store, i: int) -> Group:
        if i == bad:
            raise UserError("train.bin: damaged")
        return original(self, i)

    monkeypatch.setattr(Store, "group", group)
    one = loader(store, groups_per_step=NUM_GROUPS // 2)
    assert sum(row.num_groups for row in one.step(0).rows) == NUM_GROUPS // 2
    with pytest.raises(UserError, match="damaged"):
        one.step(1)
    assert one.step(0).rows


@pytest.mark.parametrize("key", ["groups_per_step", "tokens_per_microbatch"])
def test_sizes_are_checked(store: Store, key: str) -> None:
    """A size of 0 that ends in an endless or empty run."""
    with pytest.raises(UserError, match=f"{key}: must be at least 1, found 0"):
        loader(store, **{key: 0})
