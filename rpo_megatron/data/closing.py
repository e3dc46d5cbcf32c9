"""The ends of tokenized texts: prompts get their BOS, responses the token that closes their turn, many at once.

A response ends with its last special token if only blank text follows that (a template's newline), else with the
tokenizer's EOS, appended.

Shapes: N texts, T tokens of all of them, E of the latter that can close a turn, G groups.
"""

from dataclasses import dataclass

import numpy as np

from rpo_megatron.data.split import Spans
from rpo_megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizedTexts:
    """Prompts and responses of many groups, end to end: of each group its prompt, then its responses."""

    ids_T: np.ndarray
    """int32. Prompts with their BOS, responses with their end-of-turn token."""
    length_N: np.ndarray
    is_empty_N: np.ndarray
    """Responses that have no token besides the end of turn."""
    is_boundary_merge_N: np.ndarray
    """Responses that had to be tokenized apart from their prompt."""


class Closer:
    """Closes texts that one tokenizer has cut."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bos, self._eos = _ids(tokenizer.bos_id), _ids(tokenizer.eos_id)
        ends = sorted(tokenizer.turn_end_ids)
        self._is_turn_end = np.zeros(max(ends, default=0) + 2, dtype=bool)
        """Token id -> whether it can close a turn; ids behind the table count as its last entry, which is False."""
        self._is_turn_end[ends] = True
        self._blank: dict[bytes, bool] = {}

    def close(self, spans: Spans, *, first_G: np.ndarray) -> TokenizedTexts:
        """`first_G` are the texts that are prompts."""
        is_prompt_N, is_merged_N = _marked(first_G, spans), _marked(spans.merged, spans)
        start_N = spans.start_N
        end_E = np.flatnonzero(self._is_turn_end.take(spans.ids_T, mode="clip"))
        stop_N = self._behind_last_end(spans, end_E, is_prompt_N)
        is_closed_N = stop_N >= 0
        stop_N = np.where(is_closed_N, stop_N, spans.stop_N)
        only_ends_N = np.searchsorted(end_E, stop_N) - np.searchsorted(end_E, start_N) == stop_N - start_N
        eos_is_end = bool(self._is_turn_end.take(self._eos, mode="clip").all())
        opens_N, appends_N = is_prompt_N & spans.opens_N, ~(is_prompt_N | is_closed_N)
        return TokenizedTexts(
            ids_T=self._joined(spans.raw, start_N, stop_N, opens_N=opens_N, appends_N=appends_N),
            length_N=stop_N - start_N + self._bos.size * opens_N + self._eos.size * appends_N,
            is_empty_N=only_ends_N & ~is_prompt_N & (is_closed_N | eos_is_end),
            is_boundary_merge_N=is_merged_N,
        )

    def _behind_last_end(self, spans: Spans, end_E: np.ndarray, is_prompt_N: np.ndarray) -> np.ndarray:
        """Where each response's last end of turn ends, or -1: if there is none, or more than blank text follows it."""
        if not end_E.size:
            return np.full(is_prompt_N.size, -1)
        stop_N = end_E[np.searchsorted(end_E, spans.stop_N) - 1] + 1
        stop_N[(stop_N <= spans.start_N) | (stop_N > spans.stop_N) | is_prompt_N] = -1
        tail_R = np.flatnonzero((stop_N >= 0) & (stop_N < spans.stop_N))
        raw, itemsize = spans.raw, spans.ids_T.itemsize
        starts, ends = (stop_N[tail_R] * itemsize).tolist(), (spans.stop_N[tail_R] * itemsize).tolist()
        for i, start, end in zip(tail_R.tolist(), starts, ends, strict=True):
            if not self._is_blank(raw[start:end]):
                stop_N[i] = -1
        return stop_N

    def _is_blank(self, ids: bytes) -> bool:
        """Whether these tokens are blank text. The answer for few tokens is kept: it is asked for every response."""
        if ids in self._blank:
            return self._blank[ids]
        blank = not self._tokenizer.decode(np.frombuffer(ids, np.int32).tolist()).strip()
        if len(ids) <= 2 * np.dtype(np.int32).itemsize:
            self._blank[ids] = blank
        return blank

    def _joined(
        self, raw: bytes, start_N: np.ndarray, stop_N: np.ndarray, *, opens_N: np.ndarray, appends_N: np.ndarray
    ) -> np.ndarray:
        """The texts end to end, some with a BOS before them and some with an EOS behind."""
        bos, eos = self._bos.tobytes(), self._eos.tobytes()
        itemsize = np.dtype(np.int32).itemsize
        spans = zip((start_N * itemsize).tolist(), (stop_N * itemsize).tolist(), appends_N.tolist(), strict=True)
        texts = [raw[start:stop] + eos if appends else raw[start:stop] for start, stop, appends in spans]
        for i in np.flatnonzero(opens_N).tolist():
            texts[i] = bos + texts[i]
        return np.frombuffer(b"".join(texts), np.int32)


def _ids(token: int | None) -> np.ndarray:
    return np.array([] if token is None else [token], dtype=np.int32)


def _marked(numbers: np.ndarray | list[int], spans: Spans) -> np.ndarray:
    """bool[N], True at these numbers."""
    marked_N = np.zeros(spans.start_N.size, dtype=bool)
    marked_N[numbers] = True
    return marked_N
