"""A group of texts to token ids: one prompt, K responses that continue it.

1. Lay out: prompt and each prompt + response as one text, through the chat template or as they stand.
2. Tokenize the prompt and the K whole texts, of many groups in one call. Where tokenizing in parts gives the same
   (parts.py), the wholes start with the end of the prompt only.
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
from rpo_megatron.data.parts import first_safe_place, has_safe_places, last_safe_place
from rpo_megatron.data.split import Spans, split
from rpo_megatron.data.template import ChatTemplate
from rpo_megatron.data.tokenizer import EncodedTexts, Encoder, Tokenizer, encode_continuations
from rpo_megatron.errors import UserError


class LaidOut(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A group as texts to tokenize."""

    where: str
    prompt: str
    place: int
    """In the prompt: the texts before and behind it give the same tokens apart (parts.py); 0 if there is none."""
    wholes: list[str]
    """The prompt from `place` on and a response, K times."""

    @property
    def texts(self) -> list[str]:
        """What is tokenized."""
        prompt, place = self.prompt, self.place
        return [prompt[:place], prompt[place:], *self.wholes] if place else [prompt, *self.wholes]


class Chat:
    """Tokenizes groups with one tokenizer and one template (None: plain text, prompt and response concatenated)."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, *, encode: Encoder | None = None) -> None:
        """`encode` takes the place of the tokenizer's own, which it must equal."""
        self.tokenizer = tokenizer
        self.template = template
        self._encode = encode or tokenizer.encode_flat
        self._closer = Closer(tokenizer)
        # the first token of a part must not be taken for a BOS
        is_bos_special = tokenizer.bos_id is None or tokenizer.bos_id in tokenizer.turn_end_ids
        self._in_parts = is_bos_special and has_safe_places(tokenizer.definition)

    def lay_out(self, group: RawGroup) -> LaidOut:
        """Raises UserError, with the group's place, when the template cannot lay it out or a text is none."""
        try:
            prompt, place, wholes = self._lay_out(group)
            if not all(map(str.isascii, (prompt, *wholes))):
                _ = [text.encode() for text in (prompt, *wholes)]
        except UnicodeEncodeError:
            raise UserError(f"{group.where}: text with half a surrogate pair, which is no character; mend it") from None
        except UserError as error:
            raise UserError(f"{group.where}: {error}") from None
        return LaidOut(where=group.where, prompt=prompt, place=place, wholes=wholes)

    def tokenize_all(self, groups: list[LaidOut]) -> TokenizedTexts:
        """In one call of the tokenizer. A prompt may come out empty."""
        num_wholes_G = np.fromiter((len(group.wholes) for group in groups), np.int64, len(groups))
        first_G = starts(num_wholes_G + 1)
        return self._closer.close(self._spans(groups, first_G), first_G=first_G)

    def _spans(self, groups: list[LaidOut], first_G: np.ndarray) -> Spans:
        """The tokens of prompts and responses, the latter still without the end of their turn; `first_G` are the
        numbers of the prompts."""
        tokenizer = self.tokenizer
        encoded = self._encode([text for group in groups for text in group.texts])
        is_cut_G = np.fromiter((group.place > 0 for group in groups), bool, len(groups))
        first_text_G = first_G + starts(is_cut_G.astype(np.int64))
        end_G = encoded.border_N[first_text_G + is_cut_G]
        encoded = EncodedTexts(ids_T=encoded.ids_T, border_N=np.delete(encoded.border_N, first_text_G[is_cut_G] + 1))
        num_wholes = [len(group.wholes) for group in groups]
        spans = split(encoded, num_wholes=num_wholes, end_G=end_G, bos_id=tokenizer.bos_id, adds_bos=tokenizer.adds_bos)
        if not spans.merged:
            return spans
        wholes: list[str] = []
        rests: list[str] = []
        for i, g in zip(spans.merged, (np.searchsorted(first_G, spans.merged) - 1).tolist(), strict=True):
            wholes.append(groups[g].wholes[i - int(first_G[g]) - 1])
            rests.append(wholes[-1][len(groups[g].prompt) - groups[g].place :])
        return spans.replaced(self._continuations(encoded, spans.merged, wholes, rests))

    def _continuations(
        self, encoded: EncodedTexts, numbers: list[int], wholes: list[str], rests: list[str]
    ) -> list[bytes]:
        """The ids of each `rests`, the end of a whole, as it goes on after other text. `encoded` has, at `numbers`, the
        tokens of the wholes: from the first safe place in a rest on, they are its own too."""
        if not self._in_parts:
            return encode_continuations(self._ids, rests)
        places = [first_safe_place(rest) for rest in rests]
        cut = zip(wholes, rests, places, strict=True)
        size_N = np.diff(self._encode([whole[: len(whole) - len(rest) + place] for whole, rest, place in cut]).border_N)
        heads = encode_continuations(self._ids, [rest[:place] for rest, place in zip(rests, places, strict=True)])
        tails = zip((encoded.border_N[numbers] + size_N).tolist(), encoded.border_N[1:][numbers].tolist(), strict=True)
        return [head + encoded.ids_T[a:b].tobytes() for head, (a, b) in zip(heads, tails, strict=True)]

    def _ids(self, texts: list[str]) -> list[bytes]:
        return self._encode(texts).as_bytes()

    def _lay_out(self, group: RawGroup) -> tuple[str, int, list[str]]:
        """LaidOut's prompt, place and wholes."""
        if self.template is None:
            if not isinstance(group.prompt, str):
                raise UserError("a prompt of messages needs a chat template: give chat_template=FILE")
            place = last_safe_place(group.prompt) if self._in_parts else 0
            end = group.prompt[place:]
            return group.prompt, place, [end + response for response in group.responses]
        messages = _prompt_messages(group)
        answers = [response.strip() for response in group.responses] if group.transcript else group.responses
        prompt = self.template.render(messages, add_generation_prompt=True)
        place = last_safe_place(prompt) if self._in_parts else 0
        wholes = []
        for answer in answers:
            conversation = [*messages, {"role": "assistant", "content": answer}]
            whole = self.template.render(conversation, add_generation_prompt=False)
            wholes.append(whole[place:])
            if not whole.startswith(prompt):
                raise UserError(
                    "the chat template rewrites the prompt once there is a response, so training would see another "
                    f"prompt than generation does (it ends {prompt[-60:]!r}): give a template that does not, as "
                    "chat_template=FILE"
                )
        return prompt, place, wholes


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
