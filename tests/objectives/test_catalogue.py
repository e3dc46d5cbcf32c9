"""Looking up methods and checking knobs: defaults, errors, two knobs for one number, columns that depend on knobs."""

import dataclasses
from typing import Any

import pytest

from rpo_megatron.config import ObjectiveConfig
from rpo_megatron.errors import UserError
from rpo_megatron.objectives.catalogue import columns_read, describe, find, resolve_knobs
from rpo_megatron.objectives.methods import METHODS
from rpo_megatron.objectives.row import Interval
from tests.objectives.batches import objective

ANCHOR_OFF = {"nll_weight": 0.0, "nll_on": "best"}


def read(method: str, **knobs: Any) -> set[str]:
    return set(columns_read(find(method), knobs=resolve_knobs(ObjectiveConfig(method=method, **knobs))))


def test_defaults_and_overrides() -> None:
    """A set knob that is ignored, or a default that the row does not say."""
    resolved = resolve_knobs(ObjectiveConfig(method="rpo_bwd", eta=30.0))
    assert resolved == {"beta": 0.01, "eta": 30.0, "log_ratio": "sum", **ANCHOR_OFF}
    assert resolve_knobs(ObjectiveConfig(method="sft")) == {"responses": "best"}
    assert resolve_knobs(ObjectiveConfig(method="bradley_terry", pair="best_worst")) == {"pair": "best_worst"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ObjectiveConfig(method="rpo_bdw"), r"no method 'rpo_bdw'; did you mean 'rpo_bwd'\? \(known: rpo_bwd, rpo_fwd"),
        (ObjectiveConfig(method="dpo", eta=1.0), r"objective.eta: method 'dpo' does not use it.*beta, pair, log_ratio"),
        (ObjectiveConfig(method="rpo_bwd", pair="best_worst"), r"objective.pair: method 'rpo_bwd' does not use it"),
        (ObjectiveConfig(method="sft", beta=0.1), r"objective.beta: method 'sft' does not use it"),
        (ObjectiveConfig(method="brain", beta=1.0), r"objective.beta: method 'brain' does not use it"),  # it is fixed
        (ObjectiveConfig(method="sft", nll_weight=0.0), r"objective.nll_weight: method 'sft' does not use it"),
        (ObjectiveConfig(method="dpo", beta=0.0), r"objective.beta: must be in \(0, inf\), found 0.0"),
        (ObjectiveConfig(method="dpo", beta=float("nan")), r"objective.beta: must be in \(0, inf\), found nan"),
        (ObjectiveConfig(method="rpo_bwd", eta=float("inf")), r"objective.eta: must be in \(0, inf\), found inf"),
        (ObjectiveConfig(method="cdpo", label_smoothing=0.5), r"label_smoothing: must be in \[0, 0.5\), found 0.5"),
        (ObjectiveConfig(method="exo_pair", label_smoothing=0.0), r"label_smoothing: must be in \(0, 0.5\), found 0.0"),
        (ObjectiveConfig(method="alphapo", alpha=-10.5), r"alpha: must be in \[-10, 10\], found -10.5"),
        (ObjectiveConfig(method="wrpo", source_weight=1.1), r"source_weight: must be in \[0, 1\], found 1.1"),
        (ObjectiveConfig(method="dpo", nll_weight=-1.0), r"nll_weight: must be in \[0, inf\), found -1.0"),
        (ObjectiveConfig(method="ipo", log_ratio="max"), r"log_ratio: must be one of sum, mean, found 'max'"),  # type: ignore[arg-type]
        (ObjectiveConfig(method="dpo", pair="any"), r"pair: must be one of best_random, best_worst, all_pairs, found"),  # type: ignore[arg-type]
    ],
)
def test_bad_knobs_are_named(config: ObjectiveConfig, message: str) -> None:
    """A misspelt, unused or impossible knob that trains something else in silence."""
    with pytest.raises(UserError, match=message):
        resolve_knobs(config)


def test_ends_of_intervals() -> None:
    """A closed end that excludes its number, an open one that includes it, infinity or a word for a number."""
    closed = Interval(low=0.0, low_included=True, high=1.0, high_included=True)
    half = Interval(low=0.0, low_included=False, high=1.0)
    assert [x in closed for x in (0.0, 0, 1.0, -1e-9, 1.0 + 1e-9)] == [True, True, True, False, False]
    assert [x in half for x in (0.0, 5e-324, 1.0, 1.0 - 1e-9)] == [False, True, False, True]
    unbounded = Interval(low=0.0, low_included=True, high_included=True)
    assert [x in unbounded for x in (float("inf"), float("nan"), "1", None)] == [False] * 4
    assert (str(closed), str(half)) == ("in [0, 1]", "in (0, 1)")


@pytest.mark.parametrize("method", ["simpo", "alphapo"])
def test_gamma_or_its_ratio(method: str) -> None:
    """Two knobs for one number: the default of one that survives when the other is set, or both set in silence."""
    assert resolve_knobs(ObjectiveConfig(method=method, gamma=0.0)).items() >= {"gamma": 0.0}.items()
    assert resolve_knobs(ObjectiveConfig(method=method, gamma=0.0))["gamma_beta_ratio"] is None
    ratio = resolve_knobs(ObjectiveConfig(method=method, gamma_beta_ratio=0.7))
    assert (ratio["gamma"], ratio["gamma_beta_ratio"]) == (None, 0.7)
    with pytest.raises(UserError, match=r"objective.gamma and objective.gamma_beta_ratio say the same thing"):
        resolve_knobs(ObjectiveConfig(method=method, gamma=0.25, gamma_beta_ratio=0.1))


@pytest.mark.parametrize(
    ("method", "knobs", "columns"),
    [
        ("sft", {}, {"length", "reward"}),
        ("sft", {"responses": "all"}, {"length"}),
        ("dpo", {}, {"ref_logp", "reward"}),
        ("dpo", {"log_ratio": "mean"}, {"length", "ref_logp", "reward"}),
        ("dpo", {"nll_weight": 0.1}, {"length", "ref_logp", "reward"}),
        ("expo", {"kl_weight": 0.0, "nll_weight": 0.1, "nll_on": "all"}, {"length", "reward"}),
        ("simpo", {}, {"length", "reward"}),
        ("expo", {}, {"reward", "token_kl"}),
        ("expo", {"kl_estimator": "sample"}, {"reward"}),
        ("expo", {"kl_estimator": "sample", "kl_samples": "own"}, {"reward", "source"}),
        ("expo", {"kl_samples": "own"}, {"reward", "source", "token_kl"}),
        ("expo", {"kl_weight": 0.0}, {"reward"}),
        ("expo_reg_ours", {}, {"ref_logp", "reward"}),
        ("pessimistic_unconfirmed", {"kl_weight": 0.0}, {"ref_logp", "reward", "rewards"}),
        ("wrpo", {}, {"ref_logp", "reward", "source"}),
        ("bradley_terry", {}, {"reward", "value"}),
    ],
)
def test_columns_depend_on_knobs(method: str, knobs: dict[str, Any], columns: set[str]) -> None:
    """A method that loads a reference, rewards or lengths that it never reads, or reads some it did not ask for."""
    assert read(method, **knobs) == columns
    assert set(objective(method, **knobs).reads) == columns


@pytest.mark.parametrize("name", METHODS)
def test_description_says_what_is_computed(name: str) -> None:
    """A log that does not tell formula, normalisation and the knobs in force, or tells of some that are not."""
    text = objective(name).describe()
    method = METHODS[name]
    for part in (name, method.formula, method.source, method.normalisation):
        assert part in text
    for key, knob in method.knobs.items():
        off = knob.default is None or (knob.only_with is not None and not method.knobs[knob.only_with].default)
        assert (f"  {key} = {knob.default}  ({knob.allowed}; {knob.advice})" in text) is not off


def test_description_follows_the_knobs() -> None:
    """Defaults in the log of a run that set something else."""
    text = objective("rpo_sq", beta=0.03, log_ratio="mean", nll_weight=0.5).describe()
    for part in ("beta = 0.03", "log_ratio = mean", "reads: length, ref_logp, reward", "nll_on = best"):
        assert part in text
    everything = describe("sft", knobs={"responses": "all"})
    assert "reads: length\n" in everything


def test_rows_are_never_written_to() -> None:
    """A table whose rows change while the program runs."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        METHODS["dpo"].formula = ""  # type: ignore[misc]
