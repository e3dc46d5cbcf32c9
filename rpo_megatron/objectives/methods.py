"""METHODS: one row per published method, and the checks on the knobs that a user sets. Imports no torch.

A method is  factor * D[ score || target ] + anchors  over the responses that its selection lets in. A row names the
letters; each is the function of that name in the file of that kind:

    selection  selections.py   which responses of a group take part (all, or a pair)
    score      rewards.py      what the policy thinks a response is worth
    target     targets.py      what it should be worth
    distance   distances.py    how far the two are apart, per group
    anchors    anchors.py      terms besides the distance

A letter's keyword-only arguments are the knobs that it reads. A new method from known letters is one more row here.
Symbols: rho = log pi(y|x) - log pi_ref(y|x), r = explicit reward, d = rho_1 - rho_2 where 1 is the better of a pair.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from rpo_megatron.config import MethodsConfig, ObjectiveConfig
from rpo_megatron.errors import UserError, nearest

KnobValue = float | str


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Allowed numbers. The upper end is always excluded, so infinity never passes; NaN is in no interval."""

    low: float
    low_included: bool
    high: float = math.inf

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and (
            self.low < value < self.high or (self.low_included and value == self.low)
        )

    def __str__(self) -> str:
        return f"in {'[' if self.low_included else '('}{self.low:g}, {self.high:g})"


@dataclass(frozen=True, kw_only=True)
class OneOf:
    """Allowed words, each with the extra columns that choosing it makes the method read."""

    reads: Mapping[str, frozenset[str]]

    def __contains__(self, value: object) -> bool:
        return value in self.reads

    def __str__(self) -> str:
        return f"one of {', '.join(self.reads)}"


@dataclass(frozen=True, kw_only=True)
class Knob:
    default: KnobValue
    allowed: Interval | OneOf
    advice: str
    """Which values to try, and who recommends them."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """factor * distance[score || target], by the names of the functions."""

    score: str
    target: str
    distance: str
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Method:
    formula: str
    """Loss of one group."""
    source: str
    """Paper and equation."""
    normalisation: str
    """What is summed and what is averaged, in words: learning rates depend on it."""
    selection: str
    reads: frozenset[str]
    """Columns besides the policy's log-probabilities: `ref_logp`, `reward`, `length`. A knob may add to them."""
    knobs: Mapping[str, Knob]
    divergence: Divergence | None = None
    anchors: tuple[str, ...] = ()


POSITIVE = Interval(low=0.0, low_included=False)
NOTHING: frozenset[str] = frozenset()
REWARD = frozenset({"reward"})
REFERENCE_AND_REWARD = frozenset({"ref_logp", "reward"})

LOG_RATIO = Knob(
    default="sum",
    allowed=OneOf(reads={"sum": NOTHING, "mean": frozenset({"length"})}),
    advice="sum is every paper's definition; mean (per token) needs a beta about one response length larger",
)
PAIR = Knob(
    default="best_random",
    allowed=OneOf(reads={"best_random": NOTHING, "best_worst": NOTHING}),
    advice="best_random is the RPO paper's protocol (Sec. 4); no difference for groups of two",
)


def _beta(default: float, advice: str) -> Knob:
    return Knob(default=default, allowed=POSITIVE, advice=advice)


def _eta(advice: str) -> Knob:
    return Knob(default=1.0, allowed=POSITIVE, advice=advice)


RPO = "RPO (arXiv 2502.00203)"
METHODS: dict[str, Method] = {
    "rpo_bwd": Method(
        formula="KL[ softmax_k(eta r_k) || softmax_k(beta rho_k) ]",
        source=f"{RPO} Eq. 4-7 with D^bwd, App. A",
        normalisation="sum over the responses, mean over the groups",
        selection="all_responses",
        divergence=Divergence(score="implicit", target="scored", distance="backward_kl"),
        reads=REFERENCE_AND_REWARD,
        knobs={
            "beta": _beta(0.01, "[1e-3, 1e-2] offline, [3e-3, 1e-2] online (RPO paper, App. F)"),
            "eta": _eta("[1, 100] offline, [10, 30] online (RPO paper, App. F); depends on the spread of the rewards"),
            "log_ratio": LOG_RATIO,
        },
    ),
    "rpo_fwd": Method(
        formula="KL[ softmax_k(beta rho_k) || softmax_k(eta r_k) ]",
        source=f"{RPO} D^fwd; the printed Eq. 10 repeats D^bwd by mistake, this is NeMo-Aligner's rpo_fwd_kl for K",
        normalisation="sum over the responses, mean over the groups",
        selection="all_responses",
        divergence=Divergence(score="implicit", target="scored", distance="forward_kl"),
        reads=REFERENCE_AND_REWARD,
        knobs={
            "beta": _beta(0.01, "no published grid; start with those of rpo_bwd"),
            "eta": _eta("no published grid; start with those of rpo_bwd"),
            "log_ratio": LOG_RATIO,
        },
    ),
    "rpo_sq": Method(
        formula="1/2 (beta d - eta (r_1 - r_2))^2",
        source=f"{RPO} Eq. 4 with D^sq",
        normalisation="one pair per group, with the 1/2 (NeMo-Aligner's rpo_sq has none), mean over the groups",
        selection="pair",
        divergence=Divergence(score="implicit", target="scored", distance="squared"),
        reads=REFERENCE_AND_REWARD,
        knobs={
            "beta": _beta(0.01, "[3e-3, 1e-1] (RPO paper, App. F, for sqloo)"),
            "eta": _eta("1 (RPO paper, App. F, for sqloo); only beta / eta moves the optimum"),
            "pair": PAIR,
            "log_ratio": LOG_RATIO,
        },
    ),
    "rpo_sqloo": Method(
        formula="1/2 sum_k (A_k - B_k)^2, A_k = beta (rho_k - mean_{j!=k} rho_j), B_k = eta (r_k - mean_{j!=k} r_j)",
        source=f"{RPO} Eq. 5-7 with D^sqloo, App. A; online its gradient is RLOO's",
        normalisation="sum over the responses, with the 1/2 and no 1/K, mean over the groups",
        selection="all_responses",
        divergence=Divergence(score="implicit", target="scored", distance="squared_loo"),
        reads=REFERENCE_AND_REWARD,
        knobs={
            "beta": _beta(0.01, "[3e-3, 1e-1] offline, [1e-3, 3e-2] online (RPO paper, App. F)"),
            "eta": _eta("1 (RPO paper, App. F); only beta / eta moves the optimum"),
            "log_ratio": LOG_RATIO,
        },
    ),
    "dpo": Method(
        formula="-log sigmoid(beta d)",
        source=f"DPO (arXiv 2305.18290) Eq. 7; {RPO} Table 1: D^bwd with an infinite target margin",
        normalisation="one pair per group, mean over the groups",
        selection="pair",
        divergence=Divergence(score="implicit", target="preferred", distance="backward_kl"),
        reads=REFERENCE_AND_REWARD,
        knobs={
            "beta": _beta(0.1, "[0.01, 0.5]; 0.1 is the DPO paper's"),
            "pair": PAIR,
            "log_ratio": LOG_RATIO,
        },
    ),
    "cdpo": Method(
        formula="-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), e = label_smoothing",
        source=f"conservative DPO (Mitchell 2023, note); {RPO} Table 1 with c = 1 - e: D^bwd plus the label's entropy",
        normalisation="one pair per group, cross-entropy (its minimum is the label's entropy), mean over the groups",
        selection="pair",
        divergence=Divergence(score="implicit", target="smoothed", distance="cross_entropy"),
        reads=REFERENCE_AND_REWARD,
        knobs={
            "beta": _beta(0.1, "[0.01, 0.5], as for dpo"),
            "label_smoothing": Knob(
                default=0.1,
                allowed=Interval(low=0.0, low_included=True, high=0.5),
                advice="the share of labels believed to be wrong; 0 is dpo",
            ),
            "pair": PAIR,
            "log_ratio": LOG_RATIO,
        },
    ),
    "ipo": Method(
        formula="(d - 1/(2 beta))^2",
        source=f"IPO (arXiv 2310.12036) Eq. 17, its tau is beta; {RPO} Table 1: 2/beta^2 D^sq[beta d || 1/2]",
        normalisation="one pair per group, square without 1/2 of unscaled log-ratios, mean over the groups",
        selection="pair",
        divergence=Divergence(score="log_ratios", target="margin", distance="squared", factor=2.0),
        reads=REFERENCE_AND_REWARD,
        knobs={
            "beta": _beta(0.1, "[0.01, 1]; IPO's authors average per token (log_ratio=mean) in practice"),
            "pair": PAIR,
            "log_ratio": LOG_RATIO,
        },
    ),
    "sft": Method(
        formula="mean_k( -log pi(y_k|x) / |y_k| )",
        source="negative log-likelihood",
        normalisation="mean over a response's tokens, over the chosen responses, over the groups",
        selection="best_or_all",
        anchors=("nll",),
        reads=frozenset({"length"}),
        knobs={
            "responses": Knob(
                default="best",
                allowed=OneOf(reads={"best": REWARD, "all": NOTHING}),
                advice="best learns from the best-rewarded response of each group, all needs no rewards",
            ),
        },
    ),
}


def find(name: str) -> Method:
    """The row called `name`; UserError with the nearest name if there is none."""
    if name not in METHODS:
        raise UserError(
            f"objective.method: there is no method '{name}'{nearest(name, METHODS)} (known: {', '.join(METHODS)})"
        )
    return METHODS[name]


def resolve_knobs(config: ObjectiveConfig) -> dict[str, KnobValue]:
    """What the user set, over the row's defaults: a value for every knob of the method and for no other.

    Raises UserError for an unknown method, a knob that is set but that the method does not use, or a value that is
    not allowed.
    """
    method = find(config.method)
    given = {
        name: value for name, value in dataclasses.asdict(config).items() if name != "method" and value is not None
    }
    for name, value in given.items():
        if name not in method.knobs:
            raise UserError(
                f"objective.{name}: method '{config.method}' does not use it; remove it, or override it with "
                f"objective.{name}=null (its knobs: "
                f"{', '.join(method.knobs)})"
            )
        knob = method.knobs[name]
        if value not in knob.allowed:
            raise UserError(f"objective.{name}: must be {knob.allowed}, found {value!r} (advice: {knob.advice})")
    return {name: given.get(name, knob.default) for name, knob in method.knobs.items()}


def columns_read(method: Method, *, knobs: Mapping[str, KnobValue]) -> frozenset[str]:
    """Columns of Responses that the method reads with these knobs: a subset of `ref_logp`, `reward`, `length`."""
    columns = set(method.reads)
    for name, knob in method.knobs.items():
        if isinstance(knob.allowed, OneOf):
            columns |= knob.allowed.reads[str(knobs[name])]
    return frozenset(columns)


def describe(name: str, *, knobs: Mapping[str, KnobValue]) -> str:
    """A paragraph for the log: formula, source, normalisation and every knob with its value."""
    method = find(name)
    lines = [
        f"{name}: {method.formula}",
        f"  source: {method.source}",
        f"  normalisation: {method.normalisation}",
        f"  reads: {', '.join(sorted(columns_read(method, knobs=knobs)))}",
    ]
    lines += [f"  {key} = {knobs[key]}  ({knob.allowed}; {knob.advice})" for key, knob in method.knobs.items()]
    return "\n".join(lines)


def print_methods(config: MethodsConfig) -> None:
    """Verb `methods`: every row's formula, or one row in full with its default knobs."""
    if config.name is None:
        print("\n".join(f"{name:<10} {method.formula}" for name, method in METHODS.items()))
    else:
        print(describe(config.name, knobs={key: knob.default for key, knob in find(config.name).knobs.items()}))
