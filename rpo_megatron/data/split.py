"""Where prompts end and responses start, in the tokens of many texts at once.

The texts are those of groups: each one's prompt, then its K whole texts, which start with the text of the prompt. A
whole's tokens should start with the prompt's too; the rest is the response. Of the prompt, wholes may have its end only
(parts.py); then they should start with the tokens of that.

Shapes: N texts, T tokens of all of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from rpo_megatron.data.tokenizer import EncodedTexts


@dataclass(frozen=True, kw_only=True)
class Spans:
    """What each text stands for: a prompt for its tokens ids_T[start_N : stop_N], a whole for those of its response."""

    raw: bytes
    """The tokens as bytes of int32: those are compared, cut and joined in a tenth of the time that arrays take."""
    start_N: np.ndarray
    stop_N: np.ndarray
    opens_N: np.ndarray
    """Whether a BOS belongs before the tokens of a text; if there was one, `start_N` is behind it."""
    merged: list[int]
    """Wholes whose tokens do not start with those of their prompt: their spans mean nothing."""

    @property
    def ids_T(self) -> np.ndarray:  # noqa: N802 (T is a shape)
        return np.frombuffer(self.raw, np.int32)

    def replaced(self, ids: list[bytes]) -> "Spans":
        """With these tokens (bytes of int32) as the responses of the merged wholes, one after the other."""
        itemsize = np.dtype(np.int32).itemsize
        size = np.fromiter(map(len, ids), np.int64, len(ids)) // itemsize
        start_N, stop_N = self.start_N.copy(), self.stop_N.copy()
        stop_N[self.merged] = len(self.raw) // itemsize + np.cumsum(size)
        start_N[self.merged] = stop_N[self.merged] - size
        raw = b"".join([self.raw, *ids])
        return Spans(raw=raw, start_N=start_N, stop_N=stop_N, opens_N=self.opens_N, merged=self.merged)


def split(
    encoded: EncodedTexts, *, num_wholes: Iterable[int], end_G: np.ndarray, bos_id: int | None, adds_bos: bool
) -> Spans:
    """`num_wholes` is K of each group, `end_G` where those tokens of its prompt start that its wholes start with.

    Templates write a BOS or not, tokenizers add one or not: two must never meet, so that none is in any span, and
    `opens_N` says where one belongs."""
    ids_T, stop_N = encoded.ids_T, encoded.border_N[1:]
    start_N = _behind_bos(encoded, bos_id)
    opens_N = ((start_N > encoded.border_N[:-1]) | adds_bos) & (bos_id is not None)
    raw, itemsize = ids_T.tobytes(), ids_T.itemsize
    starts, stops, opens = (start_N * itemsize).tolist(), (stop_N * itemsize).tolist(), opens_N.tolist()
    borders, ends = encoded.border_N.tolist(), end_G.tolist()
    merged = []
    n = 0
    for count, prompt_end in zip(num_wholes, ends, strict=True):
        is_cut = prompt_end > borders[n]  # then the first token of a whole is no BOS, and that of the prompt is shared
        prompt = raw[max(starts[n], prompt_end * itemsize) : stops[n]]
        size = len(prompt)
        for i in range(n + 1, n + 1 + count):
            end = starts[i] + size
            if end > stops[i] or not raw.startswith(prompt, starts[i]) or not (is_cut or opens[i] == opens[n]):
                merged.append(i)
            starts[i] = end
        n += 1 + count
    start_N = np.array(starts, dtype=np.int64) // itemsize
    return Spans(raw=raw, start_N=start_N, stop_N=stop_N, opens_N=opens_N, merged=merged)


def _behind_bos(encoded: EncodedTexts, bos_id: int | None) -> np.ndarray:
    """Where each text's tokens start that are not BOS from its start on."""
    start_N, stop_N = encoded.border_N[:-1].copy(), encoded.border_N[1:]
    if bos_id is None or not encoded.ids_T.size:
        return start_N
    while True:
        is_bos_N = (start_N < stop_N) & (encoded.ids_T.take(start_N, mode="clip") == bos_id)
        if not is_bos_N.any():
            return start_N
        start_N += is_bos_N
