"""The table of methods: knobs and their errors, and that the letters it names fit."""

import inspect
import subprocess
import sys

import pytest

from rpo_megatron.config import MethodsConfig, ObjectiveConfig
from rpo_megatron.errors import UserError
from rpo_megatron.objectives import anchors, distances, rewards, selections, targets
from rpo_megatron.objectives.methods import METHODS, Method, columns_read, find, print_methods, resolve_knobs


def test_table_loads_without_torch() -> None:
    """`rpo config` and `rpo methods` taking seconds because a torch-free file began to import torch."""
    code = "import sys, rpo_megatron.objectives.methods; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_defaults_and_overrides() -> None:
    """A set knob that is ignored, or a default that the row does not say."""
    assert resolve_knobs(ObjectiveConfig(method="rpo_bwd", eta=30.0)) == {"beta": 0.01, "eta": 30.0, "log_ratio": "sum"}
    assert resolve_knobs(ObjectiveConfig(method="sft")) == {"responses": "best"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ObjectiveConfig(method="rpo_bdw"), r"no method 'rpo_bdw'; did you mean 'rpo_bwd'\? \(known: rpo_bwd, rpo_fwd"),
        (ObjectiveConfig(method="dpo", eta=1.0), r"objective.eta: method 'dpo' does not use it.*beta, pair, log_ratio"),
        (ObjectiveConfig(method="rpo_bwd", pair="best_worst"), r"objective.pair: method 'rpo_bwd' does not use it"),
        (ObjectiveConfig(method="sft", beta=0.1), r"objective.beta: method 'sft' does not use it"),
        (ObjectiveConfig(method="dpo", beta=0.0), r"objective.beta: must be in \(0, inf\), found 0.0"),
        (ObjectiveConfig(method="dpo", beta=float("nan")), r"objective.beta: must be in \(0, inf\), found nan"),
        (ObjectiveConfig(method="rpo_bwd", eta=float("inf")), r"objective.eta: must be in \(0, inf\), found inf"),
        (ObjectiveConfig(method="cdpo", label_smoothing=0.5), r"label_smoothing: must be in \[0, 0.5\), found 0.5"),
        (ObjectiveConfig(method="ipo", log_ratio="max"), r"log_ratio: must be one of sum, mean, found 'max'"),  # type: ignore[arg-type]
    ],
)
def test_bad_knobs_are_named(config: ObjectiveConfig, message: str) -> None:
    """A misspelt, unused or impossible knob that trains something else in silence."""
    with pytest.raises(UserError, match=message):
        resolve_knobs(config)


def letters(method: Method) -> list[object]:
    found = [getattr(selections, method.selection)] + [getattr(anchors, name) for name in method.anchors]
    if method.divergence is not None:
        row = method.divergence
        found += [getattr(rewards, row.score), getattr(targets, row.target), getattr(distances, row.distance)]
        found += [rewards.implicit]  # for the statistics
    return found


@pytest.mark.parametrize("name", METHODS)
def test_knobs_are_those_of_the_letters(name: str) -> None:
    """A row that offers a knob no letter reads, or lacks one that a letter needs."""
    needed = {
        parameter.name
        for letter in letters(METHODS[name])
        for parameter in inspect.signature(letter).parameters.values()  # type: ignore[arg-type]
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert set(METHODS[name].knobs) == needed
    assert set(METHODS[name].knobs) <= set(ObjectiveConfig.__dataclass_fields__)
    assert all(knob.default in knob.allowed for knob in METHODS[name].knobs.values())


def test_columns_depend_on_knobs() -> None:
    """A method that loads a reference, rewards or lengths that it never reads, or reads some it did not ask for."""
    assert columns_read(find("sft"), knobs={"responses": "all"}) == {"length"}
    assert columns_read(find("sft"), knobs={"responses": "best"}) == {"length", "reward"}
    knobs = resolve_knobs(ObjectiveConfig(method="dpo", log_ratio="mean"))
    assert columns_read(find("dpo"), knobs=knobs) == {"length", "reward", "ref_logp"}


def test_printed_table(capsys: pytest.CaptureFixture[str]) -> None:
    """`rpo methods` that misses a row, `rpo methods NAME` without its knobs."""
    print_methods(MethodsConfig())
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(METHODS)
    print_methods(MethodsConfig(name="cdpo"))
    assert "label_smoothing = 0.1  (in [0, 0.5)" in capsys.readouterr().out
    with pytest.raises(UserError, match="did you mean 'cdpo'"):
        print_methods(MethodsConfig(name="cdop"))
