"""examples/expo_bandits in a few seconds: fewer epochs, and the claims that make the example worth running."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rpo_megatron.config import ObjectiveConfig
from rpo_megatron.objectives.objective import build
from rpo_megatron.objectives.responses import Responses

HERE = Path(__file__).resolve().parents[1] / "examples" / "expo_bandits"


@pytest.fixture(scope="module")
def run() -> Any:
    spec = importlib.util.spec_from_file_location("expo_bandits_run", HERE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_pairs_are_the_notebooks(run: Any) -> None:
    """Catches another order of random numbers: 213 and 141 + 136 pairs are what the authors' notebooks draw."""
    counts = {}
    for name, setting in run.SETTINGS.items():
        pairs = run.bandits.draw_pairs(setting.optimal, draws=setting.draws, seed=setting.seed)
        counts[name] = [int((pairs.prompt_N == prompt).sum()) for prompt in range(len(setting.optimal))]
    assert counts == {"interpolation": [213], "preservation": [141, 136]}


def test_runs_are_independent(run: Any) -> None:
    """Catches runs of different lambda that share a gradient norm, a batch or a parameter: each alone gives the same
    policy."""
    setting = run.SETTINGS["preservation"]
    pairs = run.bandits.draw_pairs(setting.optimal, draws=20, seed=1)
    options = {"epochs": 3, "batch_size": 4, "lr": 0.05}
    for method in run.TITLES:
        loss = run.bandits.LOSSES[method]()
        together = run.bandits.train(loss, pairs, setting.reference, [0.05, 1.0, 20.0], **options)
        for i, lam in enumerate([0.05, 1.0, 20.0]):
            alone = run.bandits.train(loss, pairs, setting.reference, [lam], **options)
            np.testing.assert_allclose(together[i], alone[0], rtol=1e-10)


@pytest.mark.parametrize(("method", "knob"), [("dpo", "beta"), ("ipo", "beta"), ("expo", "kl_weight")])
def test_lambda_in_the_inputs_is_the_knob(run: Any, method: str, knob: str) -> None:
    """Catches a wrong scaling: a batch whose inputs carry lambda = 0.3 against the objective with its knob set."""
    logp_R2, ref_logp_R2 = -torch.rand(2, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ones_R = torch.ones(5, dtype=torch.float64)
    batch = run.bandits.Batch(logp_R2=logp_R2, ref_logp_R2=ref_logp_R2, kl_R=0.2 * ones_R, lam_R=0.3 * ones_R)
    weight = 0.3 / 3 if method == "expo" else 0.3
    objective = build(ObjectiveConfig(method=method, **{knob: weight}))
    responses = Responses(
        length_GK=torch.ones(5, 2, dtype=torch.long),
        valid_GK=torch.ones(5, 2, dtype=torch.bool),
        draw_G=0 * ones_R,
        logp_GK=logp_R2,
        ref_logp_GK=ref_logp_R2,
        token_kl_GK=0.2 * torch.ones(5, 2, dtype=torch.float64),
        reward_GK=torch.tensor([[1.0, 0.0]] * 5),
    )
    torch.testing.assert_close(run.bandits.LOSSES[method]()(batch), objective(responses)[0])


def test_expo_keeps_a_good_reference_and_dpo_does_not(run: Any) -> None:
    """Catches an example that no longer shows what it says, after a fraction of its epochs."""
    dpo = run.distance(run.run_one("preservation", "dpo", shorter=4))
    expo = run.distance(run.run_one("preservation", "expo", shorter=20))
    assert expo[:, 0].max() < 0.006, "EXPO stays at the optimum for every lambda"
    assert dpo[0, 0] > 5 * expo[0, 0], "DPO with a small lambda leaves it"
    assert expo[0, 1] < 0.02 < run.distance(run.SETTINGS["preservation"].reference[None])[0, 1], "and EXPO improves"


def test_tables_name_every_method(run: Any) -> None:
    """Catches a table that breaks after two minutes of computing."""
    uniform = np.full((2, 3), 1 / 3)
    lines = run.interpolation_table(dict.fromkeys(run.TITLES, uniform))
    lines += run.preservation_table(dict.fromkeys(run.TITLES, np.zeros((11, 2))))
    assert all(sum(line.startswith(title) for line in lines) == 3 for title in run.TITLES.values())
