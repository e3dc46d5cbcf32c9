"""Knobs and columns that several rows of METHODS share. Imports no torch."""

from dataclasses import replace

from rpo_megatron.objectives.row import Interval, Knob, OneOf

NOTHING: frozenset[str] = frozenset()
REWARD = frozenset({"reward"})
REFERENCE_AND_REWARD = frozenset({"ref_logp", "reward"})
LENGTH_AND_REWARD = frozenset({"length", "reward"})
POSITIVE = Interval(low=0.0, low_included=False)
NOT_NEGATIVE = Interval(low=0.0, low_included=True)
NOISE = Interval(low=0.0, low_included=True, high=0.5)
OPEN_NOISE = Interval(low=0.0, low_included=False, high=0.5)
FRACTION = Interval(low=0.0, low_included=True, high=1.0, high_included=True)
BETWEEN_TENS = Interval(low=-10.0, low_included=True, high=10.0, high_included=True)


def number(default: float | None, advice: str, allowed: Interval = POSITIVE, *, instead_of: str | None = None) -> Knob:
    return Knob(default=default, allowed=allowed, advice=advice, instead_of=instead_of)


def word(default: str, advice: str, *, only_with: str | None = None, **reads: frozenset[str]) -> Knob:
    return Knob(default=default, allowed=OneOf(reads=reads), advice=advice, only_with=only_with)


LOG_RATIO = word(
    "sum",
    "sum is every paper's definition; mean (per token) needs a beta about one response length larger",
    sum=NOTHING,
    mean=frozenset({"length"}),
)
PAIR = word(
    "best_random",
    "best_random is the RPO paper's protocol (Sec. 4); no difference for groups of two",
    best_random=NOTHING,
    best_worst=NOTHING,
    all_pairs=NOTHING,
)
ALL_PAIRS = replace(PAIR, default="all_pairs", advice="all_pairs is InstructGPT's; no difference for groups of two")
KL_ESTIMATOR = word(
    "token",
    "token has less variance and needs a resident reference; sample needs none",
    only_with="kl_weight",
    token=frozenset({"token_kl"}),
    sample=NOTHING,
)
KL_SAMPLES = word(
    "all",
    "biased unless the responses were sampled from the reference; own leaves out those of other models",
    only_with="kl_weight",
    all=NOTHING,
    own=frozenset({"source"}),
)
NLL_WEIGHT = number(0.0, "0 is the method as published; about 1e-5 (Nemotron-4) to 1 (Iterative RPO)", NOT_NEGATIVE)
NLL_ON = word(
    "best",
    "best is what other codebases anchor",
    only_with="nll_weight",
    best=LENGTH_AND_REWARD,
    all=frozenset({"length"}),
    weighted=LENGTH_AND_REWARD,
)
LABEL_SMOOTHING = "the share of labels believed to be wrong"
DPO_BETA = "[0.01, 0.5]; 0.1 is the DPO paper's"
