"""What a row holds, with shared prompts and without."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.data.microbatch import MicroBatch
from rpo_megatron.data.rows import build_row, empty_row
from rpo_megatron.data.store import Group

fast = settings(deadline=None, max_examples=80)


def group(prompt: list[int], *responses: list[int], reward: bool = True, ref: bool = False) -> Group:
    return Group(
        prompt=np.array(prompt),
        responses=[np.array(response) for response in responses],
        reward=np.arange(len(responses), dtype=np.float32) + 0.5 if reward else None,
        ref_logp=-np.arange(len(responses), dtype=np.float32) - 9 if ref else None,
    )


def test_row_by_hand() -> None:
    """Any slip of one in positions, scored positions or labels. Two groups with 2 and 1 responses, multiple 8."""
    row = build_row(
        [group([11, 12], [13, 14], [15], ref=True), group([21], [22, 23, 24], ref=True)],
        ids=np.array([7, 3]),
        draws=np.array([0.25, 0.75]),
        multiple=8,
        share_prompt=False,
    )
    assert row.tokens_T.tolist() == [11, 12, 13, 14, 11, 12, 15, 21, 22, 23, 24, 0, 0, 0, 0, 0]
    assert row.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert row.segments_S.tolist() == [4, 3, 4, 5]
    assert row.prompt_S.tolist() == [-1, -1, -1, -1]
    assert row.last_position_GK.tolist() == [[3, 6], [10, 0]]
    assert row.before_last_position_GK.tolist() == [[2, 5], [9, 0]]
    assert row.scored_position_N.tolist() == [1, 2, 5, 7, 8, 9]
    assert row.scored_label_N.tolist() == [13, 14, 15, 22, 23, 24]
    assert row.length_GK.tolist() == [[2, 1], [3, 0]]
    assert row.valid_GK.tolist() == [[True, True], [True, False]]
    assert row.reward_GK is not None
    assert row.reward_GK.tolist() == [[0.5, 1.5], [0.5, 0.0]]
    assert row.ref_logp_GK is not None
    assert row.ref_logp_GK.tolist() == [[-9.0, -10.0], [-9.0, 0.0]]
    assert (row.group_ids_G.tolist(), row.draw_G.tolist()) == ([7, 3], [0.25, 0.75])
    assert (row.has_padding, row.num_groups, row.num_real_tokens) == (True, 2, 11)
    assert row.group_T.tolist() == [0, 0, 0, 0, -1, -1, 0, 1, 1, 1, 1, -1, -1, -1, -1, -1]


def test_shared_row_by_hand() -> None:
    """The same groups with shared prompts: any slip of one, a first token that is predicted by another response, a
    position that does not go on from the prompt."""
    row = build_row(
        [group([11, 12], [13, 14], [15], ref=True), group([21], [22, 23, 24], ref=True)],
        ids=np.array([7, 3]),
        draws=np.array([0.25, 0.75]),
        multiple=8,
        share_prompt=True,
    )
    assert row.tokens_T.tolist() == [11, 12, 13, 14, 15, 21, 22, 23, 24, 0, 0, 0, 0, 0, 0, 0]
    assert row.positions_T.tolist() == [0, 1, 2, 3, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]
    assert row.segments_S.tolist() == [2, 2, 1, 1, 3, 7]
    assert row.prompt_S.tolist() == [-1, 0, 0, -1, 3, -1]
    assert row.scored_position_N.tolist() == [1, 2, 1, 5, 6, 7]
    assert row.scored_label_N.tolist() == [13, 14, 15, 22, 23, 24]
    assert row.length_GK.tolist() == [[2, 1], [3, 0]]
    assert row.last_position_GK.tolist() == [[3, 4], [8, 0]]
    assert row.before_last_position_GK.tolist() == [[2, 1], [7, 0]]
    assert (row.num_groups, row.num_real_tokens) == (2, 11), "tokens as without sharing: throughputs compare"
    assert row.group_T.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1]


def test_full_row_has_no_padding_segment() -> None:
    """A padding segment of length 0, which attention kernels refuse; missing columns turned into zeros."""
    row = build_row(
        [group([1, 2], [3, 4], reward=False)], ids=np.array([0]), draws=np.array([0.0]), multiple=4, share_prompt=False
    )
    assert row.segments_S.tolist() == [4]
    assert not row.has_padding
    assert row.reward_GK is None
    assert row.ref_logp_GK is None


@pytest.mark.parametrize(("has_reward", "has_reference"), [(True, False), (False, True)])
def test_empty_row(has_reward: bool, has_reference: bool) -> None:
    """A surplus rank's row that counts a group, scores a token, or has other columns than the real rows."""
    row = empty_row(multiple=4, has_reward=has_reward, has_reference=has_reference)
    assert row.segments_S.tolist() == [4]
    assert row.tokens_T.size == row.positions_T.size == 4
    assert row.group_T.tolist() == [-1] * 4
    assert row.scored_position_N.size == row.scored_label_N.size == row.length_GK.sum() == 0
    assert (row.num_groups, row.num_real_tokens) == (0, 0)
    assert row.group_ids_G.tolist() == [-1]
    assert (row.reward_GK is not None, row.ref_logp_GK is not None) == (has_reward, has_reference)


@fast
@given(seed=st.integers(0, 2**31), multiple=st.sampled_from([1, 2, 16]))
def test_layouts_say_the_same(seed: int, multiple: int) -> None:
    """A token that sees, is seen by, or is placed after anything else in the two layouts: what each scored token is
    predicted from, read back through segments and prompts, is the prompt and the response so far in both."""
    generator = np.random.default_rng(seed)

    def tokens() -> list[int]:
        return generator.integers(1, 99, size=generator.integers(1, 9)).tolist()

    groups = [group(tokens(), *(tokens() for _ in range(generator.integers(2, 5)))) for _ in range(3)]
    for share_prompt in (False, True):
        row = build_row(groups, ids=np.arange(3), draws=np.zeros(3), multiple=multiple, share_prompt=share_prompt)
        at = 0
        for one in groups:
            for response in one.responses:
                for t in range(response.size):
                    seen = _seen(row, int(row.scored_position_N[at]))
                    assert row.tokens_T[seen].tolist() == [*one.prompt, *response[:t]]
                    assert row.positions_T[seen].tolist() == list(range(one.prompt.size + t))
                    at += 1
        assert at == row.scored_position_N.size
        assert row.num_real_tokens == sum(one.prompt.size + r.size for one in groups for r in one.responses)


def _seen(row: MicroBatch, position: int) -> list[int]:
    """Row positions that a position attends to."""
    starts = np.cumsum(row.segments_S) - row.segments_S
    segment = int(np.searchsorted(starts, position, side="right")) - 1
    prompt = int(row.prompt_S[segment])
    before = list(range(starts[prompt], starts[prompt] + row.segments_S[prompt])) if prompt >= 0 else []
    return [*before, *range(starts[segment], position + 1)]


@fast
@given(seed=st.integers(0, 2**31), multiple=st.sampled_from([1, 2, 16]))
def test_row_invariants(seed: int, multiple: int) -> None:
    """Segments that do not cover the row, labels that are not the next token of their own segment, runs that do not
    match length_GK."""
    generator = np.random.default_rng(seed)

    def tokens() -> list[int]:
        return generator.integers(1, 99, size=generator.integers(1, 9)).tolist()

    groups = [group(tokens(), *(tokens() for _ in range(generator.integers(2, 5)))) for _ in range(3)]
    row = build_row(groups, ids=np.arange(3), draws=np.zeros(3), multiple=multiple, share_prompt=False)
    assert row.segments_S.sum() == row.tokens_T.size == row.positions_T.size
    assert row.segments_S.min() > 0
    assert row.tokens_T.size % multiple == 0
    assert row.tokens_T[row.scored_position_N + 1].tolist() == row.scored_label_N.tolist()
    segment_T = np.repeat(np.arange(row.segments_S.size), row.segments_S)
    assert segment_T[row.scored_position_N].tolist() == segment_T[row.scored_position_N + 1].tolist()
    runs = np.split(row.scored_label_N, np.cumsum(row.length_GK[row.valid_GK])[:-1])
    responses = [response for one in groups for response in one.responses]
    assert [run.tolist() for run in runs] == [response.tolist() for response in responses]
    assert (row.length_GK > 0).tolist() == row.valid_GK.tolist()
