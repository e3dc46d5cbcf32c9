"""From the config's `rewards` section and the training store to a RewardView.

A view is made once, from the training store, and used for the held-out one too, so that both are on one scale.
"""

from collections.abc import Mapping

from rpo_megatron.config import RewardsConfig
from rpo_megatron.data.store import Column, Store
from rpo_megatron.data.view import RewardView
from rpo_megatron.errors import UserError, nearest


def make_view(rewards: RewardsConfig, store: Store, *, source_column: str | None) -> RewardView:
    """The view that a config asks for, with the statistics of `store`, which is the training store.

    Raises UserError when a named column is not in the store, or when none is named and it is not clear which is meant.
    """
    available = store.columns
    names = rewards.columns or (_only_column(store, source_column),)
    for key, name in (*(("rewards.columns", name) for name in names), ("data.source_column", source_column)):
        if name is not None:
            check_column(store, name, key=key)
    statistics = [available[name].statistics for name in names]
    return RewardView(
        columns=tuple(names),
        standardise=rewards.standardise,
        mean_M=tuple(column.mean for column in statistics),
        std_M=tuple(column.std for column in statistics),
        clip=rewards.clip,
        source_column=source_column,
    )


def check_column(store: Store, name: str, *, key: str) -> None:
    """Raise UserError unless the store has the column; `key` is what asked for it."""
    if name not in store.columns:
        raise UserError(
            f"{key}: '{store.prefix}' has no column '{name}'{nearest(name, store.columns)} ({_listed(store.columns)})"
        )


def _only_column(store: Store, source_column: str | None) -> str:
    if "reward" in store.columns:
        return "reward"
    names = [name for name in store.columns if name != source_column]
    if len(names) != 1:
        raise UserError(
            f"'{store.prefix}' has no column 'reward': say with rewards.columns=[NAME] which one is the reward "
            f"({_listed(store.columns)})"
        )
    return names[0]


def _listed(columns: Mapping[str, Column]) -> str:
    return f"its columns: {', '.join(columns)}" if columns else "it has none"
