"""A group of texts to token ids: one prompt, K responses that continue it.

1. Lay out: prompt and each prompt + response as one text, through the chat template or as they stand.
2. Tokenize the prompt and the K whole texts, of many groups in one call.
3. Split (split.py): the tokens of a whole text start with those of its prompt; the rest is the response. Where they do
   not (a token would straddle the border), the response is tokenized as a continuation of its own, and counted: the
   prompt must be the same for all K, and the same as when the trained model is asked.
4. Close (closing.py): one BOS at most; the response ends with its end-of-turn token.
"""

import msgspec
import numpy as np

from rpo_megatron.data.batch import starts
from rpo_megatron.data.closing import Closer, TokenizedTexts
from rpo_megatron.data.layouts import Messages, RawGroup, transcript_messages
from rpo_megatron.data.split import Spans, split
from rpo_megatron.data.template import ChatTemplate
from rpo_megatron.data.tokenizer import Encoder, Tokenizer, encode_continuations
from rpo_megatron.errors import UserError


class LaidOut(msgspec.Struct, frozen=True, kw_only=True):
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
        self._closer = Closer(tokenizer)

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

    def tokenize_all(self, groups: list[LaidOut]) -> TokenizedTexts:
        """In one call of the tokenizer. A prompt may come out empty."""
        num_texts_G = np.fromiter((1 + len(group.wholes) for group in groups), np.int64, len(groups))
        first_G = starts(num_texts_G)
        return self._closer.close(self._spans(groups, np.repeat(first_G, num_texts_G)), first_G=first_G)

    def _spans(self, groups: list[LaidOut], prompt_N: np.ndarray) -> Spans:
        """The tokens of prompts and responses, the latter still without the end of their turn; `prompt_N` is the number
        of each text's prompt."""
        tokenizer = self.tokenizer
        texts = [text for group in groups for text in (group.prompt, *group.wholes)]
        num_wholes = [len(group.wholes) for group in groups]
        encoded = self._encode(texts)
        spans = split(encoded, num_wholes=num_wholes, bos_id=tokenizer.bos_id, adds_bos=tokenizer.adds_bos)
        if not spans.merged:
            return spans
        rests = [texts[i][len(texts[prompt_N[i]]) :] for i in spans.merged]
        return spans.replaced(encode_continuations(lambda texts: self._encode(texts).as_bytes(), rests))

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
