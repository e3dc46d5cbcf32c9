"""Numbers of megatron's interleaved schedule (Narayanan et al., arXiv 2104.04473, section 2.2). No torch."""


def rows_in_turn(num_rows: int, pipeline: int) -> int:
    """How many rows a chunk takes before it is the turn of the rank's next chunk; there are at least as many as ranks.

    One per rank is best, but leaves holes in the schedule where the last turn has fewer, and megatron refuses that. The
    turns are then made so much longer that none has: more rows are in flight, but none is computed for nothing.
    """
    assert num_rows >= pipeline
    turns = range(pipeline, num_rows + 1)
    return next(turn for turn in turns if num_rows % turn == 0 or num_rows % turn >= pipeline)


def passes_in_flight(rank: int, *, pipeline: int, virtual: int, num_rows: int) -> int:
    """Forward passes of a chunk that a rank has done, at most, before their backward passes: those before its first
    backward (get_pp_rank_microbatches in megatron's schedules.py), and one. With one chunk that is 1F1B's pipeline -
    rank."""
    if virtual == 1:
        return min(num_rows, pipeline - rank)
    warm_up = 2 * (pipeline - rank - 1) + (virtual - 1) * rows_in_turn(num_rows, pipeline)
    return min(num_rows * virtual, warm_up + 1)
