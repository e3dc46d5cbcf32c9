"""CASES: which of our losses is which of TRL's, and after which change of normalisation.

TRL knows pairs of one chosen and one rejected response; our loss is the mean over the groups. "batch": TRL gets a pair
from every group in one batch, and its mean over pairs is our mean over groups. "singly": TRL gets one pair after the
other and the mean is taken here, since something in its loss mixes the pairs of a batch.

| ours                        | TRL 1.16                             | equal after                                   |
|-----------------------------|--------------------------------------|-----------------------------------------------|
| dpo                         | DPO sigmoid                          | batch                                         |
| dpo                         | DPO aot_unpaired                     | singly: it sorts the batch                    |
| dpo, log_ratio=mean         | DPO sigmoid_norm                     | batch                                         |
| dpo, pair=all_pairs         | DPO sigmoid on every pair            | a batch for each group                        |
| dpo, pair=best_worst        | DPO sigmoid on best and worst        | batch                                         |
| dpo, nll_weight             | DPO sigmoid and sft, loss_weights    | singly: sft averages over the batch's tokens  |
| cdpo                        | DPO aot, label_smoothing             | singly: it sorts the batch (*)                |
| robust_dpo, exo_pair, hinge | DPO robust, exo_pair, hinge          | batch                                         |
| ipo, log_ratio=mean         | DPO ipo                              | batch: TRL's log-ratios are means per token   |
| ipo, log_ratio=sum          | DPO ipo                              | batch, with responses of one token            |
| kto, kl_baseline=group      | KTO                                  | singly, the KL completions being the pair     |
|                             |                                      | itself instead of mismatched ones; our z is   |
|                             |                                      | beta times its kl                             |
| kto, kl_baseline=zero       | KTO without KL                       | batch                                         |
| kto, kl_baseline=zero       | DPO apo_zero                         | batch, TRL / 2: it adds the two responses     |
| sft, responses=best         | DPO sft                              | singly: it averages over the batch's tokens   |
| sft, responses=all          | SFT                                  | each response by itself, for the same reason  |
| simpo                       | CPO simpo, cpo_alpha=0               | batch; simpo_gamma is gamma, not gamma / beta |
| simpo, nll_weight           | CPO simpo, cpo_alpha = nll_weight    | singly: nll averages over the batch's tokens  |
| alphapo                     | CPO simpo, alpha, cpo_alpha=0        | batch; that is what loss_type="alphapo" sets  |
| expo, kl_weight=0           | CPO sigmoid, beta=1, cpo_alpha=0     | batch; TRL has no term for the KL             |
| orpo                        | ORPO, beta = odds_weight             | singly and with prompts of one token: its nll |
|                             |                                      | averages over the batch's tokens, prompt too  |
| rloo                        | RLOO, first update after sampling    | batch, gradient only: TRL's loss is a         |
|                             |                                      | surrogate, minus the mean advantage           |
| bradley_terry               | Reward                               | a batch for each group, of all its pairs      |

(*) DPO sigmoid of this version ignores label_smoothing.

Methods that read the size of a reward have no counterpart as such. For two responses and g = eta (r_1 - r_2) they are
losses of the above with a parameter that depends on the pair, so TRL gets the pairs singly:

| ours, two responses         | TRL 1.16                             | equal after                                   |
|-----------------------------|--------------------------------------|-----------------------------------------------|
| rpo_bwd; brain: beta = 1    | DPO aot, label_smoothing sigmoid(-g) | TRL - entropy of the label                    |
| rpo_fwd                     | DPO exo_pair, the same smoothing     |                                               |
| rebel, log_ratio=mean       | DPO ipo, its beta 1 / (2 g)          |                                               |
| rpo_sq, log_ratio=mean      | DPO ipo, its beta beta / (2 g)       | TRL * beta^2 / 2                              |
| rpo_sqloo, log_ratio=mean   | DPO ipo, its beta beta / (2 g)       | TRL * beta^2                                  |
| distill_dpo, log_ratio=mean | DPO ipo, its beta beta / (2 g)       | TRL * beta^2, eta = 1                         |

TRL has nothing for the methods in NO_COUNTERPART.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tests.parity import groups as data
from tests.parity import trl_losses as trl
from tests.parity.groups import Groups, Pair, Rows

FP64 = 1e-10
FP32 = 1e-6
"""ORPO's odds are computed in fp32."""
NO_COUNTERPART = {"dno", "steerlm2", "wrpo", "expo_reg_ours", "pessimistic_unconfirmed", "reward_regression"}

Theirs = Callable[[Groups], torch.Tensor]
PairLoss = Callable[[Rows], torch.Tensor]


def batch(loss: PairLoss) -> Theirs:
    """TRL's mean over one batch with the best and the worst response of each group."""
    return lambda groups: loss(groups.chosen_and_rejected(groups.best_and_worst()))


def singly(loss: PairLoss) -> Theirs:
    """The mean over the groups of TRL's loss of a batch with one pair."""
    return by_gap(lambda _: loss)


def by_gap(loss_for: Callable[[float], PairLoss]) -> Theirs:
    """The same with a loss that depends on the difference of the pair's rewards."""

    def of_pair(groups: Groups, pair: Pair) -> torch.Tensor:
        return loss_for(groups.gap(pair))(groups.chosen_and_rejected([pair]))

    return lambda groups: torch.stack([of_pair(groups, pair) for pair in groups.best_and_worst()]).mean()


def every_pair(loss: PairLoss) -> Theirs:
    """The mean over the groups of TRL's mean over a batch with all pairs of a group."""

    def of_group(groups: Groups, group: int) -> torch.Tensor:
        return loss(groups.chosen_and_rejected(groups.every_pair(group)))

    return lambda groups: torch.stack([of_group(groups, g) for g in range(len(groups.reward_GK))]).mean()


def every_response(loss: PairLoss) -> Theirs:
    """The mean over all responses of TRL's loss of a batch with one response."""

    def index(groups: Groups) -> list[tuple[int, int]]:
        return [(g, k) for g, rewards in enumerate(groups.reward_GK.tolist()) for k in range(len(rewards))]

    return lambda groups: torch.stack([loss(groups.rows([at])) for at in index(groups)]).mean()


def times(factor: float, theirs: Theirs) -> Theirs:
    return lambda groups: factor * theirs(groups)


def dpo(loss_type: str, **knobs: Any) -> PairLoss:
    return partial(trl.dpo, losses={loss_type: 1.0}, **knobs)


def smoothing(gap: float) -> float:
    """Probability of the worse of two responses whose rewards differ by `gap`."""
    return 1.0 / (1.0 + math.exp(gap))


def divergence(*, beta: float, eta: float) -> Theirs:
    """TRL's smoothed cross-entropy of each pair less the entropy of its label."""

    def loss_for(gap: float) -> PairLoss:
        e = smoothing(eta * gap)
        entropy = -e * math.log(e) - (1 - e) * math.log(1 - e)
        return lambda rows: dpo("aot", beta=beta, label_smoothing=e)(rows) - entropy

    return by_gap(loss_for)


def regression(*, beta: float, eta: float) -> Theirs:
    """TRL's (mean log-ratios' difference - eta gap / beta)^2 of each pair."""
    return by_gap(lambda gap: dpo("ipo", beta=beta / (2 * eta * gap)))


@dataclass(frozen=True, kw_only=True)
class Case:
    ours: dict[str, Any]
    """Section `objective` of a config."""
    theirs: Theirs
    data: Callable[..., Groups] = data.make
    tolerance: float = FP64


KTO: dict[str, Any] = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}
SIMPO: dict[str, Any] = {"beta": 2.5, "gamma": 0.8}
ONE_TOKEN = partial(data.make, longest=1)
FOUR = partial(data.make, num_groups=3, num_responses=4)

CASES = {
    "dpo": Case(ours={"method": "dpo", "beta": 0.3}, theirs=batch(dpo("sigmoid", beta=0.3))),
    "dpo aot_unpaired": Case(ours={"method": "dpo", "beta": 0.3}, theirs=singly(dpo("aot_unpaired", beta=0.3))),
    "dpo, large margins": Case(ours={"method": "dpo", "beta": 30.0}, theirs=batch(dpo("sigmoid", beta=30.0))),
    "dpo mean": Case(
        ours={"method": "dpo", "beta": 2.0, "log_ratio": "mean"}, theirs=batch(dpo("sigmoid_norm", beta=2.0))
    ),
    "dpo all_pairs": Case(
        ours={"method": "dpo", "beta": 0.3, "pair": "all_pairs"},
        theirs=every_pair(dpo("sigmoid", beta=0.3)),
        data=FOUR,
    ),
    "dpo best_worst": Case(
        ours={"method": "dpo", "beta": 0.3, "pair": "best_worst"}, theirs=batch(dpo("sigmoid", beta=0.3)), data=FOUR
    ),
    "dpo with nll": Case(
        ours={"method": "dpo", "beta": 0.3, "nll_weight": 0.2},
        theirs=singly(partial(trl.dpo, losses={"sigmoid": 1.0, "sft": 0.2}, beta=0.3)),
    ),
    "cdpo": Case(
        ours={"method": "cdpo", "beta": 0.3, "label_smoothing": 0.2},
        theirs=singly(dpo("aot", beta=0.3, label_smoothing=0.2)),
    ),
    "robust_dpo": Case(
        ours={"method": "robust_dpo", "beta": 0.3, "label_smoothing": 0.2},
        theirs=batch(dpo("robust", beta=0.3, label_smoothing=0.2)),
    ),
    "exo_pair": Case(
        ours={"method": "exo_pair", "beta": 0.3, "label_smoothing": 0.01},
        theirs=batch(dpo("exo_pair", beta=0.3, label_smoothing=0.01)),
    ),
    "hinge": Case(ours={"method": "hinge", "beta": 0.3}, theirs=batch(dpo("hinge", beta=0.3))),
    "ipo mean": Case(ours={"method": "ipo", "beta": 0.3, "log_ratio": "mean"}, theirs=batch(dpo("ipo", beta=0.3))),
    "ipo sum": Case(ours={"method": "ipo", "beta": 0.3}, theirs=batch(dpo("ipo", beta=0.3)), data=ONE_TOKEN),
    "kto group": Case(
        ours={"method": "kto", "kl_baseline": "group", **KTO}, theirs=singly(partial(trl.kto, calculate_kl=True, **KTO))
    ),
    "kto zero": Case(
        ours={"method": "kto", "kl_baseline": "zero", **KTO}, theirs=batch(partial(trl.kto, calculate_kl=False, **KTO))
    ),
    "kto apo_zero": Case(
        ours={"method": "kto", "kl_baseline": "zero", "beta": 0.3}, theirs=times(0.5, batch(dpo("apo_zero", beta=0.3)))
    ),
    "sft best": Case(ours={"method": "sft", "responses": "best"}, theirs=singly(dpo("sft"))),
    "sft all": Case(ours={"method": "sft", "responses": "all"}, theirs=every_response(trl.sft)),
    "simpo": Case(
        ours={"method": "simpo", **SIMPO}, theirs=batch(partial(trl.cpo, loss_type="simpo", beta=2.5, simpo_gamma=0.8))
    ),
    "simpo gamma_beta_ratio": Case(
        ours={"method": "simpo", "beta": 2.5, "gamma_beta_ratio": 0.4},
        theirs=batch(partial(trl.cpo, loss_type="simpo", beta=2.5, simpo_gamma=1.0)),
    ),
    "simpo with nll": Case(
        ours={"method": "simpo", "nll_weight": 0.2, **SIMPO},
        theirs=singly(partial(trl.cpo, loss_type="simpo", beta=2.5, simpo_gamma=0.8, cpo_alpha=0.2)),
    ),
    **{
        f"alphapo {alpha}": Case(
            ours={"method": "alphapo", "alpha": alpha, **SIMPO},
            theirs=batch(partial(trl.cpo, loss_type="simpo", beta=2.5, simpo_gamma=0.8, alpha=alpha)),
        )
        for alpha in (-1.0, 0.0, 0.25, 1.0)
    },
    "expo, supervised": Case(
        ours={"method": "expo", "kl_weight": 0.0}, theirs=batch(partial(trl.cpo, loss_type="sigmoid", beta=1.0))
    ),
    "orpo": Case(
        ours={"method": "orpo", "odds_weight": 0.2}, theirs=singly(partial(trl.orpo, beta=0.2)), tolerance=FP32
    ),
    "rpo_bwd": Case(ours={"method": "rpo_bwd", "beta": 0.3, "eta": 2.0}, theirs=divergence(beta=0.3, eta=2.0)),
    "brain": Case(ours={"method": "brain", "eta": 2.0}, theirs=divergence(beta=1.0, eta=2.0)),
    "rpo_fwd": Case(
        ours={"method": "rpo_fwd", "beta": 0.3, "eta": 2.0},
        theirs=by_gap(lambda gap: dpo("exo_pair", beta=0.3, label_smoothing=smoothing(2.0 * gap))),
    ),
    "rebel": Case(ours={"method": "rebel", "eta": 2.0, "log_ratio": "mean"}, theirs=regression(beta=1.0, eta=2.0)),
    "rpo_sq": Case(
        ours={"method": "rpo_sq", "beta": 0.3, "eta": 2.0, "log_ratio": "mean"},
        theirs=times(0.3**2 / 2, regression(beta=0.3, eta=2.0)),
    ),
    "rpo_sqloo": Case(
        ours={"method": "rpo_sqloo", "beta": 0.3, "eta": 2.0, "log_ratio": "mean"},
        theirs=times(0.3**2, regression(beta=0.3, eta=2.0)),
    ),
    "distill_dpo": Case(
        ours={"method": "distill_dpo", "beta": 0.3, "log_ratio": "mean"},
        theirs=times(0.3**2, regression(beta=0.3, eta=1.0)),
    ),
}
