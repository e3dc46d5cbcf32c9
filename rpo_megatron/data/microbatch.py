"""MicroBatch: one row of packed tokens that holds whole groups. Made by rows.py; read by the model and the step.

Shapes (the legend of the whole project): T tokens of the row, N scored tokens, G groups, K responses of the widest
group, S segments, M chosen reward columns.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A packed row, as numpy arrays. Nothing in it depends on ranks, so every layout trains on the same record.

    Which positions predict which response token is kept as three arrays of length N rather than as labels of length
    T: one position may predict the first token of several responses (a shared prompt), which labels_T cannot say.
    """

    tokens_T: np.ndarray
    """int64. Token ids; padding at the end is token 0 in a segment of its own."""
    positions_T: np.ndarray
    """int64. Rotary position of each token; restarts with every segment, and goes on from its prompt in a response
    that shares one."""
    segments_S: np.ndarray
    """int64. Lengths of the row's segments, in order, padding included: they sum to T. Attention is causal within a
    segment and does not cross its border, except to a shared prompt."""
    prompt_S: np.ndarray
    """int64. Index of the segment, earlier in the row, that all of this segment also attends to: the prompt that it
    shares. -1 for none."""
    scored_position_N: np.ndarray
    """int64. Row positions whose hidden state predicts a response token."""
    scored_label_N: np.ndarray
    """int64. The response token that the position predicts."""
    length_GK: np.ndarray
    """int64. Response lengths in tokens. The N scored tokens are ordered by (group, response, token), so these lengths
    are also the runs of the scored arrays; 0 where there is no response."""
    last_position_GK: np.ndarray
    """int64. Row position of each response's last token, where a reward model reads its value; 0 where there is no
    response."""
    before_last_position_GK: np.ndarray
    """int64. Row position of the token before that, which predicts it."""
    reward_GK: np.ndarray | None
    """float32, the mean over the chosen reward columns, or None when the store has no rewards. 0 where there is no
    response."""
    rewards_GKM: np.ndarray | None
    """float32, the chosen reward columns one by one, or None when the store has none."""
    source_GK: np.ndarray | None
    """bool. True where the response comes from another model (data.source_column); None when no column is named."""
    ref_logp_GK: np.ndarray | None
    """float32 summed log-probabilities under the reference, or None when they are not stored."""
    valid_GK: np.ndarray
    """bool. False where a group has fewer than K responses; a group without any True is padding and counts 0."""
    draw_G: np.ndarray
    """float64, uniform on [0, 1): the group's random number of this epoch (sampler.draw); 0 for a padding group."""
    group_ids_G: np.ndarray
    """int64. Document index in the store, -1 for a padding group."""
    group_T: np.ndarray
    """int64. Index of the group in which the token counts, as one of the distinct tokens of its prompt and responses;
    -1 for padding and for a prompt that is repeated, from its second time on."""
    has_padding: bool = False
    """True when the last segment is padding."""

    @property
    def num_groups(self) -> int:
        """Groups that count (padding groups do not)."""
        return int(self.valid_GK.any(axis=1).sum())

    @property
    def num_real_tokens(self) -> int:
        """Tokens of every prompt with each of its responses, however they are laid out: a shared prompt counts once for
        every response. Padding is not counted."""
        has_prompt_S = self.prompt_S >= 0
        counts_S = np.ones(len(self.segments_S), dtype=np.bool_)
        counts_S[self.prompt_S[has_prompt_S]] = False
        counts_S[len(counts_S) - int(self.has_padding) :] = False
        context_S = np.where(has_prompt_S, self.segments_S[self.prompt_S], 0)
        return int((self.segments_S + context_S)[counts_S].sum())
