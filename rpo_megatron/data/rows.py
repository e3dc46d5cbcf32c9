"""The layout of a row: groups to a MicroBatch.

With a shared prompt a group is the prompt, once, and then its responses, each of which continues the prompt's positions
and attends to it and to itself. Without, it is prompt + response, once for each response: the same mathematics at the
cost of K prompts, kept as the other's oracle.

    shared      [ prompt | response 1 | response 2 | ... ]       the prompt's last token predicts every first token
    repeated    [ prompt response 1 | prompt response 2 | ... ]

Everything but the tokens follows from the lengths, for all groups of a row at once. Shapes besides those of
microbatch.py: R responses of all groups, one group after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rpo_megatron.data.microbatch import MicroBatch
from rpo_megatron.data.store import Group


def build_row(
    groups: Sequence[Group], *, ids: np.ndarray, draws: np.ndarray, multiple: int, share_prompt: bool
) -> MicroBatch:
    """Lay out groups (at least one, with the numbers `ids` [G] and `draws` [G]) in one row. Padding up to a multiple of
    `multiple` is a segment of its own at the end."""
    layout = _Layout.of(groups, share_prompt=share_prompt)
    padding = -int(layout.length_S.sum()) % multiple
    length_S, prompt_S, first_S = layout.length_S, layout.prompt_S, layout.first_position_S
    if padding:
        length_S, prompt_S, first_S = np.append(length_S, padding), np.append(prompt_S, -1), np.append(first_S, 0)
    valid_GK = np.arange(layout.count_G.max()) < layout.count_G[:, None]
    responses = [response for group in groups for response in group.responses]
    scored_position_N = layout.predictors()
    ends_R = np.cumsum(layout.response_R)
    return MicroBatch(
        tokens_T=np.concatenate([*_tokens(groups, share_prompt=share_prompt), np.zeros(padding, dtype=np.int64)]),
        positions_T=_runs(first_S, length_S),
        segments_S=length_S,
        prompt_S=prompt_S,
        scored_position_N=scored_position_N,
        scored_label_N=np.concatenate(responses).astype(np.int64, copy=False),
        length_GK=_filled(valid_GK, layout.response_R),
        last_position_GK=_filled(valid_GK, layout.start_R + layout.response_R - 1),
        before_last_position_GK=_filled(valid_GK, scored_position_N[ends_R - 1]),
        reward_GK=_column(valid_GK, [group.reward for group in groups], np.float32),
        rewards_GKM=_column(valid_GK, [group.rewards for group in groups], np.float32),
        source_GK=_column(valid_GK, [group.source for group in groups], np.bool_),
        ref_logp_GK=_column(valid_GK, [group.ref_logp for group in groups], np.float32),
        valid_GK=valid_GK,
        draw_G=np.asarray(draws, dtype=np.float64),
        group_ids_G=np.asarray(ids, dtype=np.int64),
        group_T=np.append(layout.groups(), np.full(padding, -1)),
        has_padding=padding > 0,
    )


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where everything lies in a row, without its padding."""

    count_G: np.ndarray
    """Responses of each group."""
    prompt_G: np.ndarray
    """Lengths of the prompts."""
    length_S: np.ndarray
    prompt_S: np.ndarray
    first_position_S: np.ndarray
    response_R: np.ndarray
    """Lengths of the responses."""
    start_R: np.ndarray
    """Row position of each response's first token."""
    before_R: np.ndarray
    """Row position of the prompt's last token that precedes it."""

    @classmethod
    def of(cls, groups: Sequence[Group], *, share_prompt: bool) -> "_Layout":
        count_G = np.array([len(group.responses) for group in groups])
        prompt_G = np.array([group.prompt.size for group in groups])
        response_R = np.array([response.size for group in groups for response in group.responses])
        assert min(prompt_G.min(), response_R.min()) > 0, "empty prompt or response"
        prompt_R = np.repeat(prompt_G, count_G)
        if share_prompt:
            return cls._shared(count_G, prompt_G, response_R, prompt_R)
        length_S = prompt_R + response_R
        start_R = np.cumsum(length_S) - response_R
        return cls(
            count_G=count_G,
            prompt_G=prompt_G,
            length_S=length_S,
            prompt_S=np.full_like(length_S, -1),
            first_position_S=np.zeros_like(length_S),
            response_R=response_R,
            start_R=start_R,
            before_R=start_R - 1,
        )

    @classmethod
    def _shared(
        cls, count_G: np.ndarray, prompt_G: np.ndarray, response_R: np.ndarray, prompt_R: np.ndarray
    ) -> "_Layout":
        first_R = np.cumsum(count_G) - count_G  # [G]: the first response of each group, before which its prompt goes
        prompt_segment_G = first_R + np.arange(count_G.size)
        length_S = np.insert(response_R, first_R, prompt_G)
        end_S = np.cumsum(length_S)
        is_response_S = np.ones(length_S.size, dtype=np.bool_)
        is_response_S[prompt_segment_G] = False
        return cls(
            count_G=count_G,
            prompt_G=prompt_G,
            length_S=length_S,
            prompt_S=np.insert(np.repeat(prompt_segment_G, count_G), first_R, -1),
            first_position_S=np.insert(prompt_R, first_R, 0),
            response_R=response_R,
            start_R=end_S[is_response_S] - response_R,
            before_R=np.repeat(end_S[prompt_segment_G] - 1, count_G),
        )

    def predictors(self) -> np.ndarray:
        """[N], the row position that predicts each response token: the one before it, for a first token the end of the
        prompt."""
        position_N = _runs(self.start_R - 1, self.response_R)
        position_N[np.cumsum(self.response_R) - self.response_R] = self.before_R
        return position_N

    def groups(self) -> np.ndarray:
        """[T], the group of each token, -1 for a prompt that is there already."""
        group_G = np.arange(self.count_G.size)
        end_G = self.before_R[np.cumsum(self.count_G) - self.count_G] + 1  # of the prompt before the first response
        group_T = np.full(self.length_S.sum(), -1)
        group_T[_runs(end_G - self.prompt_G, self.prompt_G)] = np.repeat(group_G, self.prompt_G)
        group_T[_runs(self.start_R, self.response_R)] = np.repeat(np.repeat(group_G, self.count_G), self.response_R)
        return group_T


def empty_row(
    *, multiple: int, has_reward: bool, has_reference: bool, num_rewards: int = 0, has_source: bool = False
) -> MicroBatch:
    """A row of `multiple` padding tokens and one padding group: what a rank computes when others have a row more.
    Nothing in it is scored (N = 0); it has the columns that the others' rows have."""
    nothing_GK = np.zeros((1, 1), dtype=np.float32)
    return MicroBatch(
        tokens_T=np.zeros(multiple, dtype=np.int64),
        positions_T=np.arange(multiple),
        segments_S=np.array([multiple]),
        prompt_S=np.array([-1]),
        scored_position_N=np.zeros(0, dtype=np.int64),
        scored_label_N=np.zeros(0, dtype=np.int64),
        length_GK=np.zeros((1, 1), dtype=np.int64),
        last_position_GK=np.zeros((1, 1), dtype=np.int64),
        before_last_position_GK=np.zeros((1, 1), dtype=np.int64),
        reward_GK=nothing_GK if has_reward else None,
        rewards_GKM=np.zeros((1, 1, num_rewards), dtype=np.float32) if num_rewards else None,
        source_GK=np.zeros((1, 1), dtype=np.bool_) if has_source else None,
        ref_logp_GK=nothing_GK if has_reference else None,
        valid_GK=np.zeros((1, 1), dtype=np.bool_),
        draw_G=np.zeros(1),
        group_ids_G=np.array([-1]),
        group_T=np.full(multiple, -1),
        has_padding=True,
    )


def _tokens(groups: Sequence[Group], *, share_prompt: bool) -> list[np.ndarray]:
    if share_prompt:
        return [tokens for group in groups for tokens in (group.prompt, *group.responses)]
    return [tokens for group in groups for response in group.responses for tokens in (group.prompt, response)]


def _runs(first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ... for lengths[0] numbers, then the same from first[1], ..."""
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(first - before, lengths)


def _filled(valid_GK: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One entry (or vector) per response, [R, ...], as [G, K, ...], 0 where there is no response."""
    filled: np.ndarray = np.zeros((*valid_GK.shape, *values.shape[1:]), dtype=values.dtype)
    filled[valid_GK] = values
    return filled


def _column(valid_GK: np.ndarray, values: Sequence[np.ndarray | None], dtype: type) -> np.ndarray | None:
    present = [value for value in values if value is not None]
    return _filled(valid_GK, np.concatenate(present).astype(dtype, copy=False)) if present else None
