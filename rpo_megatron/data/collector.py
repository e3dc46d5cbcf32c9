"""Prepared groups to the store, in the order of the input.

Before that comes the policy on missing rewards: it needs to have seen the groups before.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from rpo_megatron.config_verbs import PrepareConfig
from rpo_megatron.data.chunk import ChunkResult
from rpo_megatron.data.manifest import Manifest, RewardSource
from rpo_megatron.data.writer import StoreWriter, WriterState
from rpo_megatron.errors import UserError

REWARDS_ARE: dict[RewardSource | None, str] = {
    None: "rewards are missing",
    "given": "there are rewards",
    "preference": "there is only chosen over rejected, no reward",
}


@dataclass(frozen=True, kw_only=True)
class Standard:
    """The first group: all others must have rewards of its kind."""

    where: str
    reward_source: RewardSource | None


@dataclass(kw_only=True)
class CollectorState:
    """What the treatment of further groups depends on, and what the manifest will say."""

    standard: Standard | None = None
    keeps_rewards: bool = True
    boundary_merges: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


class Collector:
    def __init__(self, config: PrepareConfig, writer: StoreWriter, state: CollectorState) -> None:
        self.state = state
        self._config = config
        self._writer = writer

    def add(self, result: ChunkResult) -> None:
        """Raises UserError when rewards are missing and the policy is `error`."""
        state = self.state
        where_and_source = zip(result.where_G, result.reward_source_G, strict=True)
        accepted_G = np.array([self._accept(where, source) for where, source in where_and_source], dtype=bool)
        missing = accepted_G.size - int(accepted_G.sum())
        dropped = Counter(state.dropped) + result.dropped + Counter(group_missing_reward=missing)
        state.dropped = dict(dropped)
        state.boundary_merges += int(result.boundary_merges_G[accepted_G].sum())
        has_rewards = state.keeps_rewards and state.standard is not None and state.standard.reward_source is not None
        self._writer.add_batch(result.batch.selected(accepted_G, with_rewards=has_rewards))

    def sync(self) -> WriterState:
        """Have all that was added reach the disk."""
        return self._writer.sync()

    def _accept(self, where: str, reward_source: RewardSource | None) -> bool:
        policy, state = self._config.missing_reward, self.state
        if policy == "drop_group" and reward_source is None:
            return False
        if state.standard is None:
            state.standard = Standard(where=where, reward_source=reward_source)
        standard = state.standard
        if reward_source == standard.reward_source:
            return True
        if policy == "drop_group" and standard.reward_source == "given":
            return False
        if policy == "no_rewards":
            state.keeps_rewards = False
            self._writer.drop_rewards()
            return True
        raise UserError(
            f"{where}: {REWARDS_ARE[reward_source]}, but {standard.where}: {REWARDS_ARE[standard.reward_source]}. "
            "missing_reward=no_rewards stores none, missing_reward=drop_group leaves out the groups without (if the "
            "first group has them)"
        )

    def finish(self) -> Manifest:
        """Raises UserError when there is nothing to store."""
        dropped = dict(sorted(self.state.dropped.items()))
        if not len(self._writer):
            raise UserError(f"input '{self._config.input}': no group is left to store; dropped: {dropped or 'none'}")
        source = self.state.standard.reward_source if self.state.standard is not None else None
        return self._writer.finish(
            reward_source=source or "given", dropped=dropped, boundary_merges=self.state.boundary_merges
        )
