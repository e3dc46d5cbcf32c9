"""Objective: a row of METHODS with its letters resolved to functions and its knobs to values.

    objective = build(config.objective)              # UserError for a bad name, knob or value
    losses_G, stats = objective(responses)           # once per micro-batch

The mean over the groups of the global batch is taken by the caller, who adds up losses and groups over micro-batches
and ranks and divides once.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

from rpo_megatron.config import ObjectiveConfig
from rpo_megatron.objectives import (
    anchors,
    catalogue,
    distances,
    evaluation,
    outside,
    rewards,
    selections,
    statistics,
    targets,
)
from rpo_megatron.objectives.responses import Responses
from rpo_megatron.objectives.row import Anchor, Divergence, KnobValue, Method
from rpo_megatron.objectives.selections import Selection
from rpo_megatron.objectives.statistics import Stats

Letter = Callable[..., torch.Tensor]
Values = Mapping[str, KnobValue]
PairTerm = Callable[[Responses, torch.Tensor], torch.Tensor]
"""(rows, mask_RK) -> [R]."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    name: str
    knobs: Values
    reads: frozenset[str]
    """What a batch must have; see Method.reads."""
    select: Callable[[Responses], Selection]
    terms: tuple[PairTerm, ...]
    """Over the selected rows, added up."""
    anchors: tuple[Letter, ...]
    """Responses -> [G], over whole groups, added to the terms."""
    reward: Letter | None
    """Responses -> [G, K]; see `implicit`."""
    progress: float = 1.0
    """Share of the run's steps that are done, for knobs with a schedule."""

    def __call__(self, responses: Responses) -> tuple[torch.Tensor, Stats]:
        """Loss of each group [G], fp64, 0 for padding groups, and the statistics of the micro-batch (sum, count): those
        of `statistics`, and `used`, the share of groups in which the method found something to compare.

        The log-probabilities are sums near -1e3 of which differences are taken, so everything runs in fp64; on [G, K]
        numbers that is free.
        """
        batch = self._prepare(responses)
        num_groups = len(batch.valid_GK)
        losses = [anchor(batch) for anchor in self.anchors]
        stats: Stats = {}
        if self.terms:
            selection = self.select(batch)
            rows = [term(selection.batch, selection.mask_RK) for term in self.terms]
            losses += [selection.per_group(losses_R, num_groups=num_groups) for losses_R in rows]
            used_G = selection.mask_RK.any(dim=1).view(num_groups, -1).any(dim=1)
            stats["used"] = statistics.mean(used_G, batch.valid_GK.any(dim=1))
        with torch.no_grad():
            logged = statistics.without_rounding(batch)
            stats |= statistics.collect(logged, implicit_GK=self._implicit(logged))
        return torch.stack(losses).sum(dim=0), stats

    def implicit(self, responses: Responses) -> torch.Tensor:
        """What the model thinks each response is worth, fp64 [G, K], up to a constant per group: the implicit reward of
        a policy, the value of a reward model. Raises ValueError for a method without such a notion (sft)."""
        implicit_GK = self._implicit(self._prepare(responses))
        if implicit_GK is None:
            raise ValueError(f"method '{self.name}' has no implicit reward")
        return implicit_GK

    def evaluate(self, responses: Responses) -> Stats:
        """Further statistics, for held-out data only: how well the implicit reward ranks the responses."""
        with torch.no_grad():
            batch = statistics.without_rounding(self._prepare(responses))
            implicit_GK = self._implicit(batch)
            if implicit_GK is None or batch.reward_GK is None:
                return {}
            return evaluation.ranking(batch, implicit_GK=implicit_GK)

    def at(self, progress: float) -> "Objective":
        """The same at another point of the run: 0 before the first step, 1 after the last."""
        return dataclasses.replace(self, progress=progress)

    def describe(self) -> str:
        """Formula, source, normalisation and knobs, for the log."""
        return catalogue.describe(self.name, knobs=self.knobs)

    def _prepare(self, responses: Responses) -> Responses:
        return dataclasses.replace(_in_fp64(responses), progress=self.progress)

    def _implicit(self, batch: Responses) -> torch.Tensor | None:
        return None if self.reward is None else self.reward(batch)


def build(config: ObjectiveConfig) -> Objective:
    """Raises UserError for an unknown method, a knob that it does not use, or a value that is not allowed."""
    method = catalogue.find(config.method)
    knobs = catalogue.resolve_knobs(config)
    values = {**method.fixed, **knobs}
    terms = [_divergence(row, values) for row in method.divergences]
    if method.outside is not None:
        terms.append(_letter(outside, method.outside, values))
    return Objective(
        name=config.method,
        knobs=knobs,
        reads=catalogue.columns_read(method, knobs=knobs),
        select=_letter(selections, method.selection, values),
        terms=tuple(terms),
        anchors=tuple(_anchor(row, values) for row in method.anchors if _number(row.weight, values)),
        reward=_reward(method, values),
    )


def _divergence(row: Divergence, values: Values) -> PairTerm:
    score = _letter(rewards, row.score, values)
    target = _letter(targets, row.target, values)
    distance = _letter(distances, row.distance, values)
    weight = _number(row.weight, values)

    def term(batch: Responses, mask_RK: torch.Tensor) -> torch.Tensor:
        return weight * distance(score(batch), target(batch), mask_RK)

    def worst_case(batch: Responses, mask_RK: torch.Tensor) -> torch.Tensor:
        assert batch.rewards_GKM is not None
        members = [dataclasses.replace(batch, reward_GK=reward_GK) for reward_GK in batch.rewards_GKM.unbind(dim=2)]
        return torch.stack([term(member, mask_RK) for member in members]).amin(dim=0)

    return worst_case if row.worst_case else term


def _anchor(row: Anchor, values: Values) -> Letter:
    function = _letter(anchors, row.term, values)
    weight = _number(row.weight, values)
    return lambda batch: weight * function(batch)


def _reward(method: Method, values: Values) -> Letter | None:
    return None if method.implicit is None else _letter(rewards, method.implicit, values)


def _number(weight: float | str, values: Values) -> float:
    value = values[weight] if isinstance(weight, str) else weight
    assert isinstance(value, int | float)
    return float(value)


def _letter(module: ModuleType, name: str, values: Values) -> Callable[..., Any]:
    """The function `name` of a letter module, with its keyword-only arguments bound to the values of those names."""
    function = getattr(module, name)
    parameters = inspect.signature(function).parameters.values()
    return partial(function, **{p.name: values[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY})


def _in_fp64(responses: Responses) -> Responses:
    names = ("logp_GK", "value_GK", "ref_logp_GK", "token_kl_GK", "reward_GK", "rewards_GKM")
    present = {name: value for name in names if (value := getattr(responses, name)) is not None}
    return dataclasses.replace(responses, **{name: value.double() for name, value in present.items()})
