"""METHODS: one row per published method. A new method from known letters is one more row here. Imports no torch.

What a row is made of is said in row.py; `rpo methods NAME` prints one. A name that ends in `_unconfirmed` has a formula
that was recalled or derived and not read in its paper; one that ends in `_ours` was published by nobody else.

Symbols: rho = log pi(y|x) - log pi_ref(y|x), r = explicit reward, m = log pi(y|x) / |y|, v = value head; of a pair, 1
is the better response, d = rho_1 - rho_2.
"""

from collections.abc import Mapping
from typing import Any

from rpo_megatron.objectives import shared_knobs as common
from rpo_megatron.objectives.row import Anchor, Divergence, Knob, Method
from rpo_megatron.objectives.shared_knobs import number, word

RPO = "RPO (arXiv 2502.00203)"
K_WAY = "sum over the responses, mean over the groups"
PER_PAIR = "one pair per group, mean over the groups"
KL_TERM = Anchor(term="reference_kl", weight="kl_weight")


def _policy(*, knobs: Mapping[str, Knob], anchors: tuple[Anchor, ...] = (), **row: Any) -> Method:
    """A preference method: any of them may be anchored by the likelihood of good responses."""
    nll = Anchor(term="nll_anchor", weight="nll_weight")
    knobs = {**knobs, "nll_weight": common.NLL_WEIGHT, "nll_on": common.NLL_ON}
    return Method(knobs=knobs, anchors=(*anchors, nll), **row)


METHODS: dict[str, Method] = {
    # ---------------------------------------------------------------------------------- RPO itself, K responses
    "rpo_bwd": _policy(
        formula="KL[ softmax_k(eta r_k) || softmax_k(beta rho_k) ]",
        source=f"{RPO} Eq. 4-7 with D^bwd, App. A",
        normalisation=K_WAY,
        selection="all_responses",
        divergences=(Divergence(score="implicit", target="scored", distance="backward_kl"),),
        reads=common.REFERENCE_AND_REWARD,
        knobs={
            "beta": number(0.01, "[1e-3, 1e-2] offline, [3e-3, 1e-2] online (RPO paper, App. F)"),
            "eta": number(1.0, "[1, 100] offline, [10, 30] online (RPO, App. F); the narrower the rewards, the more"),
            "log_ratio": common.LOG_RATIO,
        },
    ),
    "rpo_fwd": _policy(
        formula="KL[ softmax_k(beta rho_k) || softmax_k(eta r_k) ]",
        source=f"{RPO} D^fwd; the printed Eq. 10 repeats D^bwd by mistake, this is NeMo-Aligner's rpo_fwd_kl for K",
        normalisation=K_WAY,
        selection="all_responses",
        divergences=(Divergence(score="implicit", target="scored", distance="forward_kl"),),
        reads=common.REFERENCE_AND_REWARD,
        knobs={
            "beta": number(0.01, "no published grid; start with those of rpo_bwd"),
            "eta": number(1.0, "no published grid; start with those of rpo_bwd"),
            "log_ratio": common.LOG_RATIO,
        },
    ),
    "rpo_sq": _policy(
        formula="1/2 (beta d - eta (r_1 - r_2))^2",
        source=f"{RPO} Eq. 4 with D^sq",
        normalisation="one pair per group, with the 1/2 (NeMo-Aligner's rpo_sq has none), mean over the groups",
        selection="pair",
        divergences=(Divergence(score="implicit", target="scored", distance="squared"),),
        reads=common.REFERENCE_AND_REWARD,
        knobs={
            "beta": number(0.01, "[3e-3, 1e-1] (RPO paper, App. F, for sqloo)"),
            "eta": number(1.0, "1 (RPO paper, App. F, for sqloo); only beta / eta moves the optimum"),
            "pair": common.PAIR,
            "log_ratio": common.LOG_RATIO,
        },
    ),
    "rpo_sqloo": _policy(
        formula="1/2 sum_k (A_k - B_k)^2, A_k = beta (rho_k - mean_{j!=k} rho_j), B_k = eta (r_k - mean_{j!=k} r_j)",
        source=f"{RPO} Eq. 5-7 with D^sqloo, App. A",
        normalisation="sum over the responses, with the 1/2 and no 1/K, mean over the groups",
        selection="all_responses",
        divergences=(Divergence(score="implicit", target="scored", distance="squared_loo"),),
        reads=common.REFERENCE_AND_REWARD,
        knobs={
            "beta": number(0.01, "[3e-3, 1e-1] offline, [1e-3, 3e-2] online (RPO paper, App. F)"),
            "eta": number(1.0, "1 (RPO paper, App. F); only beta / eta moves the optimum"),
            "log_ratio": common.LOG_RATIO,
        },
    ),
    "rloo": _policy(
        formula="rpo_sqloo with eta = 1, times (K-1) / (K^2 beta)",
        source=f"RLOO (arXiv 2402.14740); {RPO} Table 1: online D^sqloo, eta = 1",
        normalisation="gradient -1/K sum_k A_k grad log pi(y_k), A_k the leave-one-out advantage of r - beta rho; "
        "mean over the groups. RLOO where the responses are fresh samples of the policy",
        selection="all_responses",
        divergences=(Divergence(score="implicit", target="scored", distance="reinforce_loo"),),
        reads=common.REFERENCE_AND_REWARD,
        knobs={"beta": number(0.01, "[1e-3, 3e-2] online (RPO paper, App. F, for sqloo)")},
        fixed={"eta": 1.0, "log_ratio": "sum"},
    ),
    # ---------------------------------------------------------------------------------- the rest of RPO's Table 1
    "dpo": _policy(
        formula="-log sigmoid(beta d)",
        source=f"DPO (arXiv 2305.18290) Eq. 7; {RPO} Table 1: D^bwd with an infinite target margin",
        normalisation=PER_PAIR,
        selection="pair",
        divergences=(Divergence(score="implicit", target="preferred", distance="backward_kl"),),
        reads=common.REFERENCE_AND_REWARD,
        knobs={"beta": number(0.1, common.DPO_BETA), "pair": common.PAIR, "log_ratio": common.LOG_RATIO},
    ),
    "cdpo": _policy(
        formula="-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), e = label_smoothing",
        source=f"conservative DPO (Mitchell 2023, note); {RPO} Table 1 with c = 1 - e: D^bwd plus the label's entropy",
        normalisation="one pair per group, cross-entropy (its minimum is the label's entropy), mean over the groups",
        selection="pair",
        divergences=(Divergence(score="implicit", target="smoothed", distance="cross_entropy"),),
        reads=common.REFERENCE_AND_REWARD,
        knobs={
            "beta": number(0.1, common.DPO_BETA),
            "label_smoothing": number(0.1, f"{common.LABEL_SMOOTHING}; 0 is dpo", common.NOISE),
            "pair": common.PAIR,
            "log_ratio": common.LOG_RATIO,
        },
    ),
    "ipo": _policy(
        formula="(d - 1/(2 beta))^2",
        source=f"IPO (arXiv 2310.12036) Eq. 17, its tau is beta; {RPO} Table 1: 2/beta^2 D^sq[beta d || 1/2]",
        normalisation="one pair per group, square without 1/2 of unscaled log-ratios, mean over the groups",
        selection="pair",
        divergences=(Divergence(score="log_ratios", target="margin", distance="squared", weight=2.0),),
        reads=common.REFERENCE_AND_REWARD,
        knobs={
            "beta": number(0.1, "[0.01, 1]; IPO's authors average per token (log_ratio=mean) in practice"),
            "pair": common.PAIR,
            "log_ratio": common.LOG_RATIO,
        },
    ),
    "distill_dpo": _policy(
        formula="1/2 sum_k (A_k - B_k)^2 as in rpo_sqloo with eta = 1; for a pair (beta d - (r_1 - r_2))^2",
        source=f"reward model distillation (arXiv 2405.19316); {RPO} Table 1: distilled DPO, D^sq",
        normalisation="sum over the responses, with the 1/2 and no 1/K, mean over the groups; no label is needed",
        selection="all_responses",
        divergences=(Divergence(score="implicit", target="scored", distance="squared_loo"),),
        reads=common.REFERENCE_AND_REWARD,
        knobs={"beta": number(0.1, "no grid found; those of rpo_sqloo"), "log_ratio": common.LOG_RATIO},
        fixed={"eta": 1.0},
    ),
    "simpo": _policy(
        formula="-log sigmoid(beta (m_1 - m_2) - gamma)",
        source=f"SimPO (arXiv 2405.14734) Eq. 6; {RPO} Table 1's mapping is heuristic, this is D^bwd[a || inf]",
        normalisation="log-probabilities are means per token; one pair per group, mean over the groups",
        selection="pair",
        divergences=(Divergence(score="alpha_shaped_with_margin", target="preferred", distance="backward_kl"),),
        reads=common.LENGTH_AND_REWARD,
        knobs={
            "beta": number(2.5, "[2, 10] (SimPO's README: 2.5 for 7-8B instruct, 10 with a stronger reward model)"),
            "gamma_beta_ratio": number(0.5, "[0.1, 0.55] (SimPO's README)", common.NOT_NEGATIVE),
            "gamma": number(None, "gamma_beta_ratio * beta", common.NOT_NEGATIVE, instead_of="gamma_beta_ratio"),
            "pair": common.PAIR,
        },
        fixed={"alpha": 0.0},
        implicit="alpha_shaped",
    ),
    "brain": _policy(
        formula="KL[ softmax_k(eta r_k) || softmax_k(rho_k) ]",
        source=f"BRAIn (arXiv 2402.02479) Eq. 22; {RPO} Table 1 and Theorem C.1: D^bwd, beta = eta = 1",
        normalisation=K_WAY,
        selection="all_responses",
        divergences=(Divergence(score="log_ratios", target="scored", distance="backward_kl"),),
        reads=common.REFERENCE_AND_REWARD,
        knobs={"eta": number(1.0, "1; BRAIn's temperature is 1 / eta"), "log_ratio": common.LOG_RATIO},
        fixed={"beta": 1.0},
    ),
    "dno": _policy(
        formula="KL[ softmax_k(eta w_k) || softmax_k(beta rho_k) ], w_k = mean_{j!=k} sigmoid(win_scale (r_k - r_j))",
        source=f"Direct Nash Optimization (arXiv 2404.03715) Alg. 1; {RPO} Table 1: the reward is E P(y beats y')",
        normalisation=K_WAY + "; the group stands for samples of the policy",
        selection="all_responses",
        divergences=(Divergence(score="implicit", target="win_probability", distance="backward_kl"),),
        reads=common.REFERENCE_AND_REWARD,
        knobs={
            "beta": number(0.01, "no grid found; those of rpo_bwd"),
            "eta": number(1.0, "no grid found; win probabilities lie in [0, 1]"),
            "win_scale": number(1.0, "1 for a Bradley-Terry reward"),
            "log_ratio": common.LOG_RATIO,
        },
    ),
    "steerlm2": _policy(
        formula="KL[ softmax_k(log P(a|y_k,x) + log P(y_k|x) - log pi_ref(y_k|x)) || softmax_k(rho_k) ]",
        source=f"SteerLM 2.0 (arXiv 2406.08673) Eq. 11; {RPO} Table 1: K-way D^bwd, beta = eta = 1, pi_ref = Q'",
        normalisation=K_WAY + "; the chosen reward columns are log P(a|y,x) and log P(y|x), added",
        selection="all_responses",
        divergences=(Divergence(score="log_ratios", target="attribute_posterior", distance="backward_kl"),),
        reads=frozenset({"ref_logp", "reward", "rewards"}),
        knobs={},
        fixed={"beta": 1.0, "log_ratio": "sum"},
    ),
    # ---------------------------------------------------------------------------------- neighbours
    "alphapo": _policy(
        formula="-log sigmoid(s_1 - s_2 - gamma), s = beta (1 - exp(-alpha m)) / alpha",
        source="AlphaPO (arXiv 2501.03884); alpha = 0 is simpo",
        normalisation="log-probabilities are means per token; one pair per group, mean over the groups",
        selection="pair",
        divergences=(Divergence(score="alpha_shaped_with_margin", target="preferred", distance="backward_kl"),),
        reads=common.LENGTH_AND_REWARD,
        knobs={
            "alpha": number(0.25, "0.25, Gemma-2 0.1 (secondary source)", common.BETWEEN_TENS),
            "beta": number(2.5, "2.5 or 10 (secondary source)"),
            "gamma_beta_ratio": number(0.3, "[0.1, 1] (secondary source)", common.NOT_NEGATIVE),
            "gamma": number(None, "gamma_beta_ratio * beta", common.NOT_NEGATIVE, instead_of="gamma_beta_ratio"),
            "pair": common.PAIR,
        },
        implicit="alpha_shaped",
    ),
    "expo": _policy(
        formula="-log sigmoid(log pi(y_1) - log pi(y_2)) + kl_weight KL(pi_ref || pi)",
        source="EXPO (arXiv 2506.07492), compositional form, as in the authors' code",
        normalisation="log-probabilities are sums; one pair per group, KL in nats per response, mean over the groups",
        selection="pair",
        divergences=(Divergence(score="logp", target="preferred", distance="backward_kl"),),
        anchors=(KL_TERM,),
        reads=common.REWARD,
        knobs={
            "kl_weight": number(
                0.1, "the paper's lambda; values for language models were not found", common.NOT_NEGATIVE
            ),
            "kl_estimator": common.KL_ESTIMATOR,
            "kl_samples": common.KL_SAMPLES,
            "pair": common.PAIR,
        },
        implicit="logp",
    ),
    "expo_reg_ours": _policy(
        formula="(p - 1)^2 + kl_weight (p - p_ref)^2, p = pi(y_1) / (pi(y_1) + pi(y_2))",
        source="ours: a regression form with EXPO's limits; the paper's own (arXiv 2506.07492) was not found",
        normalisation=PER_PAIR,
        selection="pair",
        divergences=(
            Divergence(score="logp", target="preferred", distance="squared_probability"),
            Divergence(score="logp", target="reference", distance="squared_probability", weight="kl_weight"),
        ),
        reads=common.REFERENCE_AND_REWARD,
        knobs={
            "kl_weight": number(0.1, "weight of the reference's preference", common.NOT_NEGATIVE),
            "pair": common.PAIR,
        },
        implicit="logp",
    ),
    "wrpo": _policy(
        formula="-log sigmoid(beta (w rho_ws + (1 - w) rho_wt - rho_l)), w = source_weight, growing over the run",
        source="WRPO (arXiv 2412.03187); its alpha is source_weight",
        normalisation="ws: best of the source models; wt, l: best and worst of the policy's own; mean over the groups",
        selection="weighted_sources",
        divergences=(Divergence(score="implicit", target="preferred", distance="backward_kl"),),
        reads=frozenset({"ref_logp", "reward", "source"}),
        knobs={
            "beta": number(0.01, "0.01 (WRPO's code)"),
            "source_weight": number(0.1, "0.1 (WRPO's code); 0 is dpo", common.FRACTION),
            "source_schedule": word("linear", "linear is WRPO's", linear=common.NOTHING, constant=common.NOTHING),
        },
        fixed={"log_ratio": "sum"},
    ),
    "pessimistic_unconfirmed": _policy(
        formula="min_i distill_dpo(r_i) + kl_weight KL(pi_ref || pi), over the columns r_i of an ensemble",
        source="pessimistic distillation (arXiv 2405.19316), recalled: the paper's minimum may be per batch",
        normalisation="minimum per group (one per batch would depend on the packing), mean over the groups",
        selection="all_responses",
        divergences=(Divergence(score="implicit", target="scored", distance="squared_loo", worst_case=True),),
        anchors=(KL_TERM,),
        reads=frozenset({"ref_logp", "reward", "rewards"}),
        knobs={
            "beta": number(0.1, "no grid found; those of rpo_sqloo"),
            "kl_weight": number(0.01, "the paper's gamma; values were not found", common.NOT_NEGATIVE),
            "kl_estimator": common.KL_ESTIMATOR,
            "kl_samples": common.KL_SAMPLES,
            "log_ratio": common.LOG_RATIO,
        },
        fixed={"eta": 1.0},
    ),
    "robust_dpo": _policy(
        formula="-log sigmoid(beta d) - e/(1 - 2e) beta d, e = label_smoothing",
        source="robust DPO (arXiv 2403.00409): dpo's loss on clean labels, estimated without bias from noisy ones",
        normalisation=PER_PAIR + "; not bounded below",
        selection="pair",
        divergences=(Divergence(score="implicit", target="preferred", distance="noise_corrected_cross_entropy"),),
        reads=common.REFERENCE_AND_REWARD,
        knobs={
            "beta": number(0.1, common.DPO_BETA),
            "label_smoothing": number(0.1, f"{common.LABEL_SMOOTHING}; 0 is dpo", common.NOISE),
            "pair": common.PAIR,
            "log_ratio": common.LOG_RATIO,
        },
    ),
    "exo_pair": _policy(
        formula="KL[ Bernoulli(sigmoid(beta d)) || Bernoulli(1 - e) ], e = label_smoothing",
        source="EXO (arXiv 2402.00856) Eq. 16, as in TRL; here D^fwd with a smoothed target",
        normalisation=PER_PAIR,
        selection="pair",
        divergences=(Divergence(score="implicit", target="smoothed", distance="forward_kl"),),
        reads=common.REFERENCE_AND_REWARD,
        knobs={
            "beta": number(0.1, common.DPO_BETA),
            "label_smoothing": number(1e-3, "1e-3 (EXO)", common.OPEN_NOISE),
            "pair": common.PAIR,
            "log_ratio": common.LOG_RATIO,
        },
    ),
    "rebel": _policy(
        formula="(d - eta (r_1 - r_2))^2",
        source="REBEL (arXiv 2404.16767), as in its authors' code: pi_ref is the previous iterate",
        normalisation="one pair per group, square without 1/2 of unscaled log-ratios, mean over the groups",
        selection="pair",
        divergences=(Divergence(score="log_ratios", target="scored", distance="squared", weight=2.0),),
        reads=common.REFERENCE_AND_REWARD,
        knobs={"eta": number(1.0, "scale of the rewards"), "pair": common.PAIR, "log_ratio": common.LOG_RATIO},
        fixed={"beta": 1.0},
    ),
    "hinge": _policy(
        formula="max(0, 1 - beta d)",
        source="SLiC (arXiv 2305.10425) on log-ratios, as in RSO (arXiv 2309.06657) and TRL",
        normalisation=PER_PAIR,
        selection="pair",
        divergences=(Divergence(score="implicit", target="preferred", distance="hinge"),),
        reads=common.REFERENCE_AND_REWARD,
        knobs={"beta": number(0.1, common.DPO_BETA), "pair": common.PAIR, "log_ratio": common.LOG_RATIO},
    ),
    "kto": _policy(
        formula="1/2 [ w_D (1 - sigmoid(beta rho_1 - z)) + w_U (1 - sigmoid(z - beta rho_2)) ]",
        source="KTO (arXiv 2402.01306) Eq. 8, a baseline outside RPO; z from the group, not from mismatched pairs",
        normalisation="mean over the two responses of a pair, mean over the groups",
        selection="pair",
        outside="kto",
        reads=common.REFERENCE_AND_REWARD,
        knobs={
            "beta": number(0.1, "[0.01, 0.1] (RPO paper, App. F: KL weights 1e-2 and 6e-2)"),
            "desirable_weight": number(1.0, "1; balance rare desirable responses by more"),
            "undesirable_weight": number(1.0, "1"),
            "kl_baseline": word(
                "group", "zero compares with no shift at all", group=common.NOTHING, zero=common.NOTHING
            ),
            "pair": common.PAIR,
            "log_ratio": common.LOG_RATIO,
        },
    ),
    "orpo": Method(
        formula="nll(y_1) - odds_weight log sigmoid(log odds_1 - log odds_2), odds = p / (1 - p), p = exp(m)",
        source="ORPO (arXiv 2403.07691) Eq. 6-8; its lambda is odds_weight",
        normalisation="nll in nats per token, of the best response; one pair per group, mean over the groups",
        selection="pair",
        divergences=(Divergence(score="log_odds", target="preferred", distance="backward_kl", weight="odds_weight"),),
        anchors=(Anchor(term="nll"),),
        reads=common.LENGTH_AND_REWARD,
        knobs={"odds_weight": number(0.1, "[0.1, 0.2] (ORPO, Sec. 6)"), "pair": common.PAIR},
        fixed={"responses": "best"},
        implicit="mean_logp",
    ),
    "sft": Method(
        formula="mean_k( -log pi(y_k|x) / |y_k| )",
        source="negative log-likelihood",
        normalisation="mean over a response's tokens, over the chosen responses, over the groups",
        selection="all_responses",
        anchors=(Anchor(term="nll"),),
        reads=frozenset({"length"}),
        knobs={
            "responses": word(
                "best",
                "best learns from the best-rewarded response of each group, all needs no rewards",
                best=common.REWARD,
                all=common.NOTHING,
            ),
        },
        implicit=None,
    ),
    # ---------------------------------------------------------------------------------- reward models
    "bradley_terry": Method(
        formula="-log sigmoid(v_1 - v_2)",
        source="Bradley-Terry reward model (InstructGPT, arXiv 2203.02155, Eq. 1)",
        normalisation="mean over the pairs of a group, mean over the groups",
        selection="pair",
        divergences=(Divergence(score="value", target="preferred", distance="backward_kl"),),
        reads=frozenset({"value", "reward"}),
        knobs={"pair": common.ALL_PAIRS},
        implicit="value",
        kind="reward model",
    ),
    "reward_regression": Method(
        formula="mean_k (v_k - eta r_k)^2",
        source="regression reward model (as Nemotron-4-340B-Reward, RPO's judge)",
        normalisation="mean over the responses, mean over the groups; standardise the rewards",
        selection="all_responses",
        divergences=(Divergence(score="value", target="scored", distance="absolute_squared"),),
        reads=frozenset({"value", "reward"}),
        knobs={"eta": number(1.0, "1; scale rewards with rewards.standardise")},
        implicit="value",
        kind="reward model",
    ),
}
