"""What must hold of every method: a new row of METHODS is tested by these without a line here.

Where a method is an exception, a table names it with the reason, and the test checks that it is one.
"""

import dataclasses
from typing import Any

import pytest
import torch

from rpo_megatron.objectives.methods import METHODS
from rpo_megatron.objectives.objective import Objective
from rpo_megatron.objectives.row import OneOf
from tests.objectives.batches import (
    GRADIENT_COLUMNS,
    Make,
    fp64,
    gradient,
    losses_of,
    objective,
    random_batch,
    score_column,
    take,
    with_columns,
)

DETACHED = {"kto": {"kl_baseline": "zero"}}
"""Losses of which a part carries no gradient on purpose, with the knobs that remove it."""

LEVEL_MATTERS = {
    "simpo": "a constant of the sequence is not one of the tokens",
    "alphapo": "a constant of the sequence is not one of the tokens",
    "orpo": "a likelihood",
    "sft": "a likelihood",
    "kto": "compares with an absolute baseline",
    "reward_regression": "fits the rewards themselves",
}
"""Methods that a constant per group, added to what the model says, changes."""

REWARD_LEVEL_MATTERS = {"reward_regression": "fits the rewards themselves"}

MEAN_OF_COLUMNS = {"steerlm2": "reward", "pessimistic_unconfirmed": "reward"}
"""Declared columns that the loss does not read: the mean reward that comes along with the columns of an ensemble."""


def anchored(name: str) -> dict[str, Any]:
    """Knobs that switch on everything that is off by default."""
    return {"nll_weight": 0.3, "nll_on": "weighted"} if "nll_weight" in METHODS[name].knobs else {}


def wordings(name: str) -> list[dict[str, Any]]:
    """The defaults, and every word that a knob of the method may have, with the term that it belongs to switched on."""
    found: list[dict[str, Any]] = [{}]
    for key, knob in METHODS[name].knobs.items():
        switch = {} if knob.only_with is None else {knob.only_with: 0.3}
        found += [{key: word, **switch} for word in (knob.allowed.reads if isinstance(knob.allowed, OneOf) else ())]
    return found


def without_anchors(method: Objective) -> Objective:
    return dataclasses.replace(method, anchors=())


PAIRED = [name for name, method in METHODS.items() if "pair" in method.knobs]
CONTRASTIVE = [name for name, method in METHODS.items() if method.divergences or method.outside]


@pytest.mark.parametrize("name", METHODS)
def test_gradcheck(make: Make, name: str) -> None:
    """A backward that does not belong to the forward, in any of the columns that carry a gradient."""
    batch = random_batch(make, 17, 4, 4)
    method = objective(name, **anchored(name), **DETACHED.get(name, {}))
    values = [getattr(batch, column).clone().requires_grad_() for column in GRADIENT_COLUMNS]

    def loss(*columns: torch.Tensor) -> torch.Tensor:
        return method(with_columns(batch, **dict(zip(GRADIENT_COLUMNS, columns, strict=True))))[0].sum()

    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("length", [1, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_in_extreme_batches(make: Make, name: str, length: int, dtype: torch.dtype) -> None:
    """NaN or inf in losses, gradients or statistics: log-probabilities of -1e4, margins of 1e5, huge rewards, one-token
    responses and a response that is certain (log p = 0)."""
    numbers = [[-1e4, -1.0, -5e4], [-1e5, 0.0, -1e4], [0.0, 0.0, 0.0]]
    reward = [[1e5, -1e5, 0.0], [-1e5, 1e5, 1e5], [0.0, 0.0, 0.0]]
    batch = make(
        numbers,
        value=reward,
        ref=[[-1.0, -1e4, -1e5], [0.0, -1e5, -1e4], [0.0, 0.0, 0.0]],
        token_kl=[[1e4, 0.0, 1e5], [0.0, 1e-30, 1.0], [0.0] * 3],
        reward=reward,
        rewards=[[[r, -r] for r in row] for row in reward],
        source=[[False, False, True], [True, False, False], [False] * 3],
        length=[[length] * 3] * 2 + [[0] * 3],
        valid=[[True] * 3, [True] * 3, [False] * 3],
        dtype=dtype,
    )
    method = objective(name, **anchored(name), **({"beta": 1.0} if "beta" in METHODS[name].knobs else {}))
    for column in GRADIENT_COLUMNS:
        with torch.autograd.detect_anomaly(check_nan=True):  # a NaN on the way that a mask hides at the end
            losses_G, slopes = gradient(method, batch, column)
        assert torch.isfinite(losses_G).all()
        assert torch.isfinite(slopes).all()
        assert losses_G[2] == 0
    assert all(torch.isfinite(total) for total, _ in method(batch)[1].values())


@pytest.mark.parametrize(
    ("name", "knobs"), [(name, {}) for name in METHODS] + [(name, {"pair": "all_pairs"}) for name in PAIRED]
)
def test_what_stands_in_invalid_entries_does_not_matter(make: Make, name: str, knobs: dict[str, Any]) -> None:
    """Padding that leaks into a loss, a gradient or a statistic: huge junk of either sign."""
    method = objective(name, **anchored(name), **knobs)
    clean = random_batch(make, 5, 6, 4)
    clean = with_columns(clean, valid_GK=clean.valid_GK & (torch.arange(6)[:, None] != 2))
    junk: dict[str, torch.Tensor] = {}
    for column, value in vars(clean).items():
        if not isinstance(value, torch.Tensor) or column == "valid_GK":
            continue
        noise = (torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 1e8).to(value.dtype)
        valid = clean.valid_GK.any(dim=1) if value.ndim == 1 else clean.valid_GK
        junk[column] = torch.where(valid[..., None] if value.ndim == 3 else valid, value, noise)
    junk["draw_G"] = junk["draw_G"].abs().clamp(max=0.999)
    dirty = with_columns(clean, **junk)
    for column in GRADIENT_COLUMNS:
        expected, slope = gradient(method, clean, column)
        found, found_slope = gradient(method, dirty, column)
        assert torch.equal(found, expected)
        assert torch.equal(found_slope, slope)
        assert not found_slope[~clean.valid_GK].any()
        assert found[2] == 0
    stats, expected_stats = method(dirty)[1], method(clean)[1]
    assert {k: (s.item(), n.item()) for k, (s, n) in stats.items()} == {
        k: (s.item(), n.item()) for k, (s, n) in expected_stats.items()
    }


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_a_batch_equals_its_groups_alone(make: Make, name: str, seed: int) -> None:
    """Groups that influence each other: the loss would depend on the split into micro-batches. Groups without a signal
    (at most one valid response, or for a pair method all rewards equal) that give one."""
    method = objective(name, **anchored(name))
    batch = random_batch(make, seed, 8, 2 + seed)
    together, slopes = gradient(method, batch, score_column(name))
    halves = torch.cat([losses_of(method, take(batch, [0, 1, 2])), losses_of(method, take(batch, [3, 4, 5, 6, 7]))])
    torch.testing.assert_close(halves, together, rtol=1e-13, atol=1e-13)
    for g in range(8):
        own = batch.valid_GK[g].nonzero().flatten().tolist()
        if not own:
            assert together[g] == 0
            continue
        alone = take(batch, [g], own)
        loss, slope = gradient(method, alone, score_column(name))
        torch.testing.assert_close(together[g], loss[0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(slopes[g, own], slope[0], rtol=1e-11, atol=1e-11)
        tied = name in PAIRED and alone.reward_GK.unique().numel() == 1
        if name in CONTRASTIVE and name != "reward_regression" and (len(own) == 1 or tied):
            assert losses_of(without_anchors(method), alone).item() == 0


@pytest.mark.parametrize("name", METHODS)
def test_levels_of_scores(make: Make, name: str) -> None:
    """A loss in which the unknown log Z(x) of a prompt survives. Moves the log-probabilities (or values) by a constant
    per group; only the gradient is compared, since a likelihood term moves by a constant."""
    batch = random_batch(make, 3, 6, 4)
    column = score_column(name)
    shift = torch.linspace(-1, 2, 6, dtype=torch.float64)[:, None]
    method = objective(name)
    slope = gradient(method, batch, column)[1]
    moved = gradient(method, with_columns(batch, **{column: getattr(batch, column) + shift}), column)[1]
    if name == "sft":  # its gradient is constant
        slope, moved = losses_of(method, batch), losses_of(method, with_columns(batch, logp_GK=batch.logp_GK + shift))
    assert torch.allclose(moved, slope, rtol=1e-9, atol=1e-12) is (name not in LEVEL_MATTERS)


@pytest.mark.parametrize("name", METHODS)
def test_levels_of_rewards(make: Make, name: str) -> None:
    """A reward model's offset per prompt that trains something."""
    batch = random_batch(make, 3, 6, 4)
    shift = torch.tensor([1.0, -2.0, 4.0, 8.0, -16.0, 32.0], dtype=torch.float64)[:, None]
    moved = with_columns(batch, reward_GK=batch.reward_GK + shift, rewards_GKM=batch.rewards_GKM + shift[:, None])
    for knobs in ({}, anchored(name)):
        method = objective(name, **knobs)
        for found, expected in zip(
            gradient(method, moved, score_column(name)), gradient(method, batch, score_column(name)), strict=True
        ):
            close = torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
            assert close is (name not in REWARD_LEVEL_MATTERS)


@pytest.mark.parametrize("name", METHODS)
def test_fp32_columns_are_computed_in_fp64(make: Make, name: str) -> None:
    """fp32 arithmetic anywhere inside: the same numbers as fp32 and as fp64 columns give the same losses to the last
    bit, and gradients that are the fp64 ones rounded once."""
    method = objective(name, **anchored(name))
    batch = random_batch(make, 9, 5, 4)
    floats = {key: v.float() for key, v in vars(batch).items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    floats["draw_G"] = batch.draw_G
    single = with_columns(batch, **floats)
    double = with_columns(batch, **{key: value.double() for key, value in floats.items()})
    for column in GRADIENT_COLUMNS:
        found, slope = gradient(method, single, column)
        expected, expected_slope = gradient(method, double, column)
        assert found.dtype == torch.float64
        assert torch.equal(found, expected)
        assert torch.equal(slope, expected_slope.float())


@pytest.mark.parametrize("name", PAIRED)
def test_all_pairs_are_the_pairs_one_by_one(make: Make, name: str) -> None:
    """all_pairs that misses a pair, counts ties or padding, or weighs groups by their number of pairs: the mean over
    batches of two built by hand, loss and gradient."""
    batch = random_batch(make, 8, 5, 4)
    column = score_column(name)
    two, every = (without_anchors(objective(name, pair=pair)) for pair in ("best_worst", "all_pairs"))
    leaf = getattr(batch, column).clone().requires_grad_()
    live = with_columns(batch, **{column: leaf})
    expected, counts = [], set()
    for g in range(5):
        own = batch.valid_GK[g].nonzero().flatten().tolist()
        pairs = [[i, j] for i in own for j in own if i < j and batch.reward_GK[g, i] != batch.reward_GK[g, j]]
        rows = [two(take(live, [g], pair))[0][0] for pair in pairs]
        counts.add(len(rows))
        expected.append(torch.stack(rows).mean() if rows else leaf.new_zeros(()))
    by_hand = torch.stack(expected)
    slope = torch.autograd.grad(by_hand.sum(), leaf)[0]
    found, found_slope = gradient(every, batch, column)
    assert len(counts) > 2  # groups of different weight, were they weighed by their pairs
    torch.testing.assert_close(found, by_hand.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_slope, slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PAIRED)
def test_random_opponents_are_uniform(make: Make, name: str) -> None:
    """A random opponent that does not come from draw_G, or not from all worse responses alike: over evenly spaced draws
    the mean is the mean over the opponents, and the draw alone decides."""
    batch = with_columns(random_batch(make, 8, 1, 5, ragged=False), reward_GK=torch.tensor([[3.0, 1.0, 3.0, 0.0, 2.0]]))
    method = without_anchors(objective(name, pair="best_random"))  # an anchor is over the whole group
    by_draw = [losses_of(method, with_columns(batch, draw_G=fp64([(n + 0.5) / 12]))).item() for n in range(12)]
    opponents = [losses_of(method, take(batch, [0], [0, k])).item() for k in (1, 3, 4)]
    expected = [value for value in opponents for _ in range(4)]
    assert by_draw == pytest.approx(expected, rel=1e-12)
    assert len(set(opponents)) == 3


@pytest.mark.parametrize("name", METHODS)
def test_never_waits_for_the_device(make: Make, name: str) -> None:
    """.item(), bool(tensor) or a data-dependent shape in a step: none of them exists on the meta device."""
    batch = random_batch(make, 1, 3, 4)
    columns = {key: value.to("meta") for key, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    for knobs in [{}, anchored(name)] + [{"pair": "all_pairs"}] * (name in PAIRED):
        losses_G, stats = objective(name, **knobs)(with_columns(batch, **columns))
        assert losses_G.shape == (3,)
        assert all(total.shape == count.shape == () for total, count in stats.values())


@pytest.mark.parametrize(("name", "knobs"), [(name, knobs) for name in METHODS for knobs in wordings(name)])
def test_reads_exactly_the_declared_columns(make: Make, name: str, knobs: dict[str, Any]) -> None:
    """A row, or a word of a knob, that reads a column it does not declare (here missing, the lengths junk), declares
    one that it does not read, or statistics that carry a gradient."""
    ours = objective(name, **knobs)
    batch, other = (random_batch(make, seed, 6, 4, ragged=False) for seed in (2, 3))
    columns = {
        column: column.removesuffix("_GKM").removesuffix("_GK")
        for column in ("ref_logp_GK", "token_kl_GK", "reward_GK", "rewards_GKM", "source_GK", "value_GK", "length_GK")
    }
    missing: dict[str, Any] = {key: None for key, column in columns.items() if column not in ours.reads}
    if "length_GK" in missing:
        missing["length_GK"] = torch.full((6, 4), -(2**40))
    if METHODS[name].kind == "reward model":
        missing["logp_GK"] = None
    bare = with_columns(batch, **missing)
    leaf = getattr(bare, score_column(name)).clone().requires_grad_()
    losses_G, stats = ours(with_columns(bare, **{score_column(name): leaf}))
    torch.testing.assert_close(losses_G.detach(), losses_of(ours, batch))
    assert losses_G.requires_grad
    assert not any(total.requires_grad or count.requires_grad for total, count in stats.values())
    for key, column in columns.items():
        if column in ours.reads and MEAN_OF_COLUMNS.get(name) != column:
            changed = losses_of(ours, with_columns(batch, **{key: getattr(other, key)}))
            assert not torch.equal(changed, losses_G), f"{column} is declared and changes nothing"
