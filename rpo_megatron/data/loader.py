"""Loader: the micro-batches of a step on one data-parallel rank.

1. group ids and random numbers of the step (sampler), the same on every rank;
2. packing of the whole global batch from lengths, of which this rank keeps its share (packing);
3. tokens of this rank's groups read and laid out.

`step(n)` is a pure function of n: the only state to resume from is the step number. While the caller works on one step
a thread prepares the next.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from rpo_megatron.data import sampler
from rpo_megatron.data.cost import CostModel, sizes_of
from rpo_megatron.data.microbatch import MicroBatch
from rpo_megatron.data.packing import Balance, pack
from rpo_megatron.data.rows import build_row, empty_row
from rpo_megatron.data.store import Store
from rpo_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Step:
    rows: list[MicroBatch]
    """Of this rank; the same number on every rank."""
    balance: Balance
    """Of the whole step, the same on every rank."""


class Loader:
    def __init__(
        self,
        store: Store,
        *,
        seed: int,
        groups_per_step: int,
        tokens_per_microbatch: int,
        packing: bool,
        share_prompt: bool,
        cost: CostModel,
        dp_rank: int,
        dp_size: int,
        multiple: int,
        least_rows: int = 1,
    ) -> None:
        """`multiple`: row lengths are multiples of it, as tensor and sequence parallelism need. `cost`: of the model
        that reads the rows. `least_rows`: of a rank in a step, as an interleaved pipeline needs.

        Raises UserError for a size below 1.
        """
        for key, value in {
            "train.groups_per_step": groups_per_step,
            "data.tokens_per_microbatch": tokens_per_microbatch,
        }.items():
            if value < 1:
                raise UserError(f"{key}: must be at least 1, found {value}")
        self._store = store
        self._seed = seed
        self._groups_per_step = groups_per_step
        self._tokens_per_microbatch = tokens_per_microbatch
        self._packing = packing
        self._share_prompt = share_prompt
        self._cost = cost
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._multiple = multiple
        self._least_rows = least_rows
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._next: tuple[int, Future[Step]] | None = None

    def step(self, step: int) -> Step:
        """Optimizer step `step` (from 0).

        An error of the preparing thread is raised here, by the call for the step that it belongs to.
        """
        if self._next is None or self._next[0] != step:
            self._prefetch(step)
        assert self._next is not None
        prepared = self._next[1]
        self._prefetch(step + 1)
        return prepared.result()

    def sequential(self, start: int, count: int) -> list[MicroBatch]:
        """This rank's rows of the groups `start` .. `start + count` (cut at the store's end) in a single pass: over all
        ranks every group once, which ones a row holds is in its group_ids_G. The random numbers are those of epoch 0.
        """
        ids = np.arange(start, min(start + count, len(self._store)))
        if ids.size == 0:
            return []
        return self._prepare(ids, sampler.draw(seed=self._seed, epoch=0, ids=ids)).rows

    def _prefetch(self, step: int) -> None:
        self._next = (step, self._thread.submit(self._step, step))

    def _step(self, step: int) -> Step:
        num_groups, count = len(self._store), self._groups_per_step
        consumed = step * count
        ids = sampler.group_ids(num_groups, seed=self._seed, consumed=consumed, count=count)
        epoch = sampler.epochs(num_groups, consumed=consumed, count=count)
        return self._prepare(ids, sampler.draw(seed=self._seed, epoch=epoch, ids=ids))

    def _prepare(self, ids: np.ndarray, draws: np.ndarray) -> Step:
        sizes = sizes_of(
            self._store.prompt_length_D[ids],
            self._store.num_responses_D[ids],
            self._store.response_lengths(ids),
            cost=self._cost,
            share_prompt=self._share_prompt,
        )
        packed = pack(
            sizes,
            budget=self._tokens_per_microbatch,
            dp_size=self._dp_size,
            multiple=self._multiple,
            packing=self._packing,
            least_rows=self._least_rows,
        )
        rows = [self._row(ids[row], draws[row]) for row in packed.ranks[self._dp_rank]]
        return Step(rows=rows, balance=packed.balance)

    def _row(self, ids: np.ndarray, draws: np.ndarray) -> MicroBatch:
        if ids.size == 0:
            return empty_row(
                multiple=self._multiple,
                has_reward=self._store.has_reward,
                has_reference=self._store.has_reference,
                num_rewards=self._store.num_rewards,
                has_source=self._store.has_source,
            )
        groups = [self._store.group(int(i)) for i in ids]
        return build_row(groups, ids=ids, draws=draws, multiple=self._multiple, share_prompt=self._share_prompt)
