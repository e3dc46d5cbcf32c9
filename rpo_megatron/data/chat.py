"""A group of texts to token ids: one prompt, K responses that continue it.

1. Lay out: prompt and each prompt + response as one text, through the chat template or as they stand.
2. Tokenize the prompt and the K whole texts, of many groups in one call.
3. Split (split.py): the tokens of a whole text start with those of its prompt; the rest is the response. Where they do
   not (a token would straddle the border), the response is tokenized as a continuation of its own, and counted: the
   prompt must be the same for all K, and the same as when the trained model is asked.
4. Close: one BOS at most; the response ends with its end-of-turn token.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rpo_megatron.data.layouts import Messages, RawGroup, transcript_messages
from rpo_megatron.data.split import Spans, split
from rpo_megatron.data.template import ChatTemplate
from rpo_megatron.data.tokenizer import Encoder, Tokenizer, encode_continuations
from rpo_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TokenizedResponse:
    ids: np.ndarray
    """int32, with the end-of-turn token."""
    is_empty: bool
    """There is no token besides the end of turn."""
    is_boundary_merge: bool
    """It had to be tokenized apart from its prompt."""


@dataclass(frozen=True, kw_only=True)
class TokenizedGroup:
    prompt: np.ndarray
    """int32."""
    responses: list[TokenizedResponse]


@dataclass(frozen=True, kw_only=True)
class LaidOut:
    """A group as texts to tokenize."""

    where: str
    prompt: str
    wholes: list[str]
    """Prompt and response, K times; each starts with the text of the prompt."""


class Chat:
    """Tokenizes groups with one tokenizer and one template (None: plain text, prompt and response concatenated)."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, *, encode: Encoder | None = None) -> None:
        """`encode` takes the place of the tokenizer's own, which it must equal."""
        self.tokenizer = tokenizer
        self.template = template
        self._encode = encode or tokenizer.encode_flat
        self._bos = _token(tokenizer.bos_id)
        self._eos = _token(tokenizer.eos_id)
        ends = sorted(tokenizer.turn_end_ids)
        self._is_turn_end = np.zeros(max(ends, default=0) + 2, dtype=bool)
        """Token id -> whether it can close a turn; ids behind the table count as its last entry, which is False."""
        self._is_turn_end[ends] = True
        self._blank: dict[bytes, bool] = {}

    def lay_out(self, group: RawGroup) -> LaidOut:
        """Raises UserError, with the group's place, when the template cannot lay it out or a text is none."""
        try:
            prompt, wholes = self._lay_out(group)
            for text in (prompt, *wholes):
                if not text.isascii():
                    text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{group.where}: text with half a surrogate pair, which is no character; mend it") from None
        except UserError as error:
            raise UserError(f"{group.where}: {error}") from None
        return LaidOut(where=group.where, prompt=prompt, wholes=wholes)

    def tokenize(self, group: RawGroup) -> TokenizedGroup:
        """Raises UserError as lay_out, and when the prompt has no token."""
        return next(self.tokenize_all([self.lay_out(group)]))

    def tokenize_all(self, groups: list[LaidOut]) -> Iterator[TokenizedGroup]:
        """In one call of the tokenizer. Raises UserError when it comes to a group whose prompt has no token."""
        spans = self._spans(groups)
        ids_T = spans.ids_T
        num_ends_T = np.zeros(ids_T.size + 1, dtype=np.int64)
        np.cumsum(self._is_turn_end.take(ids_T, mode="clip"), out=num_ends_T[1:])
        has_end = (num_ends_T[spans.stop_N] > num_ends_T[spans.start_N]).tolist()
        starts, stops, merged = spans.start_N.tolist(), spans.stop_N.tolist(), set(spans.merged)
        n = 0
        for group in groups:
            prompt = ids_T[starts[n] : stops[n]]
            if spans.opens_N[n]:
                prompt = np.concatenate([self._bos, prompt])
            if not prompt.size:
                what = "the prompt is empty and the tokenizer adds no BOS: nothing to continue"
                raise UserError(f"{group.where}: {what}")
            first, n = n + 1, n + 1 + len(group.wholes)
            responses = [
                self._close(ids_T[starts[i] : stops[i]], has_end=has_end[i], is_boundary_merge=i in merged)
                for i in range(first, n)
            ]
            yield TokenizedGroup(prompt=prompt, responses=responses)

    def _spans(self, groups: list[LaidOut]) -> Spans:
        """The tokens of prompts and responses, the latter still without the end of their turn."""
        tokenizer = self.tokenizer
        encoded = self._encode([text for group in groups for text in (group.prompt, *group.wholes)])
        num_wholes = [len(group.wholes) for group in groups]
        spans = split(encoded, num_wholes=num_wholes, bos_id=tokenizer.bos_id, adds_bos=tokenizer.adds_bos)
        if not spans.merged:
            return spans
        rests = [whole[len(group.prompt) :] for group in groups for whole in (group.prompt, *group.wholes)]
        ids = encode_continuations(lambda texts: self._encode(texts).lists(), [rests[i] for i in spans.merged])
        return spans.replaced(ids)

    def _lay_out(self, group: RawGroup) -> tuple[str, list[str]]:
        """The prompt's text and, for each response, the text of both; every whole text starts with the prompt's."""
        if self.template is None:
            if not isinstance(group.prompt, str):
                raise UserError("a prompt of messages needs a chat template: give chat_template=FILE")
            return group.prompt, [group.prompt + response for response in group.responses]
        messages = _prompt_messages(group)
        answers = [response.strip() for response in group.responses] if group.transcript else group.responses
        prompt = self.template.render(messages, add_generation_prompt=True)
        wholes = []
        for answer in answers:
            conversation = [*messages, {"role": "assistant", "content": answer}]
            wholes.append(self.template.render(conversation, add_generation_prompt=False))
            if not wholes[-1].startswith(prompt):
                raise UserError(
                    "the chat template rewrites the prompt once there is a response, so training would see another "
                    f"prompt than generation does (it ends {prompt[-60:]!r}): give a template that does not, as "
                    "chat_template=FILE"
                )
        return prompt, wholes

    def _close(self, ids: np.ndarray, *, has_end: bool, is_boundary_merge: bool) -> TokenizedResponse:
        """End the response with its end-of-turn token: the last special token if only blank text follows it (a
        template's newline), else the tokenizer's EOS, appended."""
        if has_end:
            last = int(np.flatnonzero(self._is_turn_end.take(ids, mode="clip"))[-1])
            ids = ids[: last + 1] if self._is_blank(ids[last + 1 :]) else np.concatenate([ids, self._eos])
        else:
            ids = np.concatenate([ids, self._eos])
        could_be_empty = has_end or ids.size <= 1  # without this, most responses would be looked up for nothing
        is_empty = could_be_empty and bool(self._is_turn_end.take(ids, mode="clip").all())
        return TokenizedResponse(ids=ids, is_empty=is_empty, is_boundary_merge=is_boundary_merge)

    def _is_blank(self, ids: np.ndarray) -> bool:
        """Whether these tokens are blank text. The answer for few tokens is kept: it is asked for every response."""
        key = ids.tobytes()
        if key in self._blank:
            return self._blank[key]
        blank = not self.tokenizer.decode(ids.tolist()).strip()
        if ids.size <= 2:
            self._blank[key] = blank
        return blank


def _token(token: int | None) -> np.ndarray:
    return np.array([] if token is None else [token], dtype=np.int32)


def _prompt_messages(group: RawGroup) -> Messages:
    if not isinstance(group.prompt, str):
        return group.prompt
    if not group.transcript:
        return [{"role": "user", "content": group.prompt}]
    messages = transcript_messages(group.prompt)
    if messages is None:
        raise UserError(
            "a full transcript that is not of the form '\\n\\nHuman: ... \\n\\nAssistant: ...' cannot go through a "
            "chat template: say chat_template=none"
        )
    return messages
