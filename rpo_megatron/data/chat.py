"""A group of texts to token ids: one prompt, K responses that continue it.

1. Lay out: prompt and each prompt + response as one text, through the chat template or as they stand.
2. Tokenize the prompt and the K whole texts.
3. Split: the tokens of a whole text start with those of its prompt; the rest is the response. Where they do not (a
   token would straddle the border), the response is tokenized as a continuation of its own, and counted: the prompt
   must be the same for all K, and the same as when the trained model is asked.
4. Close: one BOS at most; the response ends with its end-of-turn token.
"""

from dataclasses import dataclass

import numpy as np

from rpo_megatron.data.layouts import Messages, RawGroup, transcript_messages
from rpo_megatron.data.template import ChatTemplate
from rpo_megatron.data.tokenizer import Tokenizer
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


class Chat:
    """Tokenizes groups with one tokenizer and one template (None: plain text, prompt and response concatenated)."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._template = template

    def tokenize(self, group: RawGroup) -> TokenizedGroup:
        """Raises UserError, with the group's place, when the template cannot lay it out or the prompt has no token."""
        try:
            prompt_text, whole_texts = self._lay_out(group)
            prompt, *wholes = map(self._with_one_bos, self._tokenizer.encode([prompt_text, *whole_texts]))
        except UnicodeEncodeError:
            raise UserError(f"{group.where}: text with half a surrogate pair, which is no character; mend it") from None
        except UserError as error:
            raise UserError(f"{group.where}: {error}") from None
        if not prompt:
            raise UserError(f"{group.where}: the prompt is empty and the tokenizer adds no BOS: nothing to continue")
        responses = []
        for text, whole in zip(whole_texts, wholes, strict=True):
            merged = whole[: len(prompt)] != prompt
            rest = text[len(prompt_text) :]
            ids = self._tokenizer.encode_continuation(rest) if merged else whole[len(prompt) :]
            responses.append(self._close(ids, is_boundary_merge=merged))
        return TokenizedGroup(prompt=np.array(prompt, dtype=np.int32), responses=responses)

    def _lay_out(self, group: RawGroup) -> tuple[str, list[str]]:
        """The prompt's text and, for each response, the text of both; every whole text starts with the prompt's."""
        if self._template is None:
            if not isinstance(group.prompt, str):
                raise UserError("a prompt of messages needs a chat template: give chat_template=FILE")
            return group.prompt, [group.prompt + response for response in group.responses]
        messages = _prompt_messages(group)
        answers = [response.strip() for response in group.responses] if group.transcript else group.responses
        prompt = self._template.render(messages, add_generation_prompt=True)
        wholes = []
        for answer in answers:
            conversation = [*messages, {"role": "assistant", "content": answer}]
            wholes.append(self._template.render(conversation, add_generation_prompt=False))
            if not wholes[-1].startswith(prompt):
                raise UserError(
                    "the chat template rewrites the prompt once there is a response, so training would see another "
                    f"prompt than generation does (it ends {prompt[-60:]!r}): give a template that does not, as "
                    "chat_template=FILE"
                )
        return prompt, wholes

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        """Templates write a BOS or not, tokenizers add one or not: two must never meet."""
        bos = self._tokenizer.bos_id
        num_bos = 0
        while num_bos < len(ids) and ids[num_bos] == bos:
            num_bos += 1
        if bos is None or not (num_bos or self._tokenizer.adds_bos):
            return ids
        return [bos, *ids[num_bos:]]

    def _close(self, ids: list[int], *, is_boundary_merge: bool) -> TokenizedResponse:
        """End the response with its end-of-turn token: the last special token if only blank text follows it (a
        template's newline), else the tokenizer's EOS, appended."""
        tokenizer = self._tokenizer
        ends = [i for i, token in enumerate(ids) if token in tokenizer.turn_end_ids]
        if ends and not tokenizer.decode(ids[ends[-1] + 1 :]).strip():
            ids = ids[: ends[-1] + 1]
        elif tokenizer.eos_id is not None:
            ids = [*ids, tokenizer.eos_id]
        is_empty = all(token in tokenizer.turn_end_ids for token in ids)
        return TokenizedResponse(
            ids=np.array(ids, dtype=np.int32), is_empty=is_empty, is_boundary_merge=is_boundary_merge
        )


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
