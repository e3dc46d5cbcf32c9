"""From the model's answer to what the objective sees, and the two ways to run an objective."""

from pathlib import Path

import pytest
import torch

from rpo_megatron.distributed import start, stop
from rpo_megatron.model.build import wrap
from rpo_megatron.model.row import Row, Segments
from rpo_megatron.model.scores import Scores
from rpo_megatron.objectives import objective as objectives
from rpo_megatron.training.evaluate import make_loader
from rpo_megatron.training.forward import Batch, run_objective, to_device
from rpo_megatron.training.policy import build_policy, load_start
from rpo_megatron.training.reference import build_reference
from rpo_megatron.training.resolve import resolve
from tests import tiny


def batch() -> Batch:
    """Two groups; lengths 2 and 1, and 3 with nothing beside it."""
    number_GK = torch.tensor([[0.5, 1.5], [2.5, 0.0]])
    nothing = torch.zeros(0, dtype=torch.long)
    return Batch(
        row=Row(
            tokens_1T=nothing[None],
            positions_T=nothing,
            segments=Segments(lengths=[], prompts=[]),
            scored_position_N=nothing,
            scored_label_N=nothing,
            last_position_GK=torch.zeros(2, 2, dtype=torch.long),
            before_last_position_GK=torch.zeros(2, 2, dtype=torch.long),
        ),
        length_GK=torch.tensor([[2, 1], [3, 0]]),
        valid_GK=torch.tensor([[True, True], [True, False]]),
        draw_G=torch.tensor([0.25, 0.75], dtype=torch.float64),
        reward_GK=number_GK,
        rewards_GKM=torch.stack([number_GK, -number_GK], dim=-1),
        source_GK=torch.tensor([[False, True], [True, False]]),
        ref_logp_GK=-number_GK,
    )


def test_tokens_are_summed_per_response() -> None:
    """Catches sums that run over the border of a response, and a response without tokens that shifts those behind."""
    tokens_N = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0])
    seen = batch().responses(Scores(logp_N=tokens_N, token_kl_N=-2 * tokens_N))
    assert seen.logp_GK is not None
    assert seen.token_kl_GK is not None
    assert seen.logp_GK.tolist() == [[-3.0, -4.0], [-56.0, 0.0]]
    assert seen.token_kl_GK.tolist() == [[6.0, 8.0], [112.0, 0.0]]
    assert seen.logp_GK.dtype == seen.token_kl_GK.dtype == torch.float32
    assert seen.value_GK is None


def test_every_column_reaches_the_objective() -> None:
    """Catches a column that is carried through the data and dropped at the last step: its method would see None."""
    given = batch()
    value_GK = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    seen = given.responses(Scores(value_GK=value_GK))
    assert seen.value_GK is value_GK
    assert seen.logp_GK is None
    for name in ("length_GK", "valid_GK", "draw_G", "reward_GK", "rewards_GKM", "source_GK", "ref_logp_GK"):
        assert getattr(seen, name) is getattr(given, name), name


@pytest.mark.parametrize("method", ["rpo_bwd", "bradley_terry"])
def test_evaluation_sees_the_same_loss_and_more(tmp_path: Path, method: str) -> None:
    """Catches an evaluation that measures something else than what is trained, or that leaves gradients behind for
    the next step."""
    tiny.write_model(tmp_path / "reference", seed=1)
    knobs = {
        "rpo_bwd": [f"reference.path={tmp_path / 'reference'}"],
        "bradley_terry": ["objective.beta=null", "objective.eta=null"],
    }
    config = tiny.run_config(tmp_path, f"objective.method={method}", *knobs[method])
    groups = start(config.parallel)
    plan, objective = resolve(config), objectives.build(config.objective)
    policy = build_policy(plan, groups, shape=plan.shape)
    load_start(policy, plan, groups)
    model = wrap(policy)
    rows = make_loader(plan, plan.train_store, groups).step(0).rows
    batches = build_reference(plan, groups)([to_device(row, groups.device, cp=groups.cp) for row in rows])
    assert len(batches) > 1
    model.zero_grad_buffer()
    evaluated = run_objective(model, batches, objective, train=False)
    assert not any(parameter.main_grad.any() for parameter in policy.parameters())
    trained = run_objective(model, batches, objective, train=True)
    stop()
    assert all(parameter.main_grad.any() for parameter in policy.parameters())
    assert {"best_of_n", "brier", "kendall_tau"} <= evaluated.keys() - trained.keys()
    for name, (total, count) in trained.items():
        assert evaluated[name][0].item() == pytest.approx(total.item(), rel=1e-6), name
        assert evaluated[name][1].item() == count.item(), name
