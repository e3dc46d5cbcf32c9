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

import torch

from rpo_megatron.config import ObjectiveConfig
from rpo_megatron.objectives import anchors, distances, methods, rewards, selections, statistics, targets
from rpo_megatron.objectives.methods import Divergence, KnobValue
from rpo_megatron.objectives.responses import Responses
from rpo_megatron.objectives.statistics import Stats

Letter = Callable[..., torch.Tensor]
Term = Callable[[Responses, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Objective:
    name: str
    knobs: Mapping[str, KnobValue]
    reads: frozenset[str]
    """Which of `ref_logp`, `reward`, `length` a batch must have."""
    select: Letter
    """Responses -> bool [G, K]: those that take part."""
    terms: tuple[Term, ...]
    """(Responses, selected_GK) -> [G], added up."""
    implicit: Letter | None
    """Responses -> beta rho [G, K], for the statistics; None for a method without a reference."""

    def __call__(self, responses: Responses) -> tuple[torch.Tensor, Stats]:
        """Loss of each group [G], fp64, 0 for padding groups, and the statistics of the micro-batch (sum, count).

        The log-probabilities are sums near -1e3 of which differences are taken, so everything runs in fp64; on [G, K]
        numbers that is free.
        """
        batch = _in_fp64(responses)
        selected_GK = self.select(batch)
        losses_G = torch.stack([term(batch, selected_GK) for term in self.terms]).sum(dim=0)
        with torch.no_grad():
            logged = statistics.without_rounding(batch)
            implicit_GK = None if self.implicit is None else self.implicit(logged)
            stats = statistics.collect(logged, implicit_GK=implicit_GK)
        return losses_G, stats

    def describe(self) -> str:
        """Formula, source, normalisation and knobs, for the log."""
        return methods.describe(self.name, knobs=self.knobs)


def build(config: ObjectiveConfig) -> Objective:
    """Raises UserError for an unknown method, a knob that it does not use, or a value that is not allowed."""
    knobs = methods.resolve_knobs(config)
    method = methods.find(config.method)
    reads = methods.columns_read(method, knobs=knobs)
    terms: list[Term] = [_letter(anchors, name, knobs) for name in method.anchors]
    if method.divergence is not None:
        terms.append(_divergence(method.divergence, knobs))
    return Objective(
        name=config.method,
        knobs=knobs,
        reads=reads,
        select=_letter(selections, method.selection, knobs),
        terms=tuple(terms),
        implicit=_letter(rewards, "implicit", knobs) if "ref_logp" in reads else None,
    )


def _divergence(row: Divergence, knobs: Mapping[str, KnobValue]) -> Term:
    score = _letter(rewards, row.score, knobs)
    target = _letter(targets, row.target, knobs)
    distance = _letter(distances, row.distance, knobs)

    def term(batch: Responses, selected_GK: torch.Tensor) -> torch.Tensor:
        return row.factor * distance(score(batch), target(batch), selected_GK)

    return term


def _letter(module: ModuleType, name: str, knobs: Mapping[str, KnobValue]) -> Letter:
    """The function `name` of a letter module, with its keyword-only arguments bound to the knobs of those names."""
    function = getattr(module, name)
    parameters = inspect.signature(function).parameters.values()
    return partial(function, **{p.name: knobs[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY})


def _in_fp64(responses: Responses) -> Responses:
    def wide(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values.double()

    return dataclasses.replace(
        responses,
        logp_GK=responses.logp_GK.double(),
        ref_logp_GK=wide(responses.ref_logp_GK),
        reward_GK=wide(responses.reward_GK),
    )
