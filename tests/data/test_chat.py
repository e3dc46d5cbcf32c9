"""Tokenized groups: one prompt for all responses, one BOS, the end of turn with the response, nothing in between."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rpo_megatron.config_verbs import PrepareConfig
from rpo_megatron.data.chat import Chat
from rpo_megatron.data.chunk import prepare_chunk
from rpo_megatron.data.layouts import RawGroup
from rpo_megatron.data.readers import RawRow
from rpo_megatron.data.template import ChatTemplate, load_template
from rpo_megatron.data.tokenizer import Tokenizer, encode_continuations
from rpo_megatron.errors import UserError

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
CONFIG = PrepareConfig(input="", output_prefix="", tokenizer="")
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def raw(prompt: Any, *responses: str, transcript: bool = False) -> RawGroup:
    return RawGroup(
        where="f.jsonl:7",
        prompt=prompt,
        responses=list(responses),
        rewards=None,
        reward_source=None,
        transcript=transcript,
    )


def template(text: str, tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(text, source="test.jinja", special_names=tokenizer.special_names)


@dataclass(frozen=True, kw_only=True)
class Response:
    ids: np.ndarray
    is_empty: bool
    is_boundary_merge: bool


@dataclass(frozen=True, kw_only=True)
class Group:
    prompt: np.ndarray
    responses: list[Response]


def tokenize_all(chat: Chat, raws: list[RawGroup]) -> list[Group]:
    """What the arrays say of each group."""
    found = chat.tokenize_all([chat.lay_out(group) for group in raws])
    ids = np.split(found.ids_T, np.cumsum(found.length_N)[:-1])
    empty, merged = found.is_empty_N.tolist(), found.is_boundary_merge_N.tolist()
    all_of = [Response(ids=i, is_empty=e, is_boundary_merge=m) for i, e, m in zip(ids, empty, merged, strict=True)]
    rest = iter(all_of)
    return [Group(prompt=next(rest).ids, responses=list(itertools.islice(rest, len(r.responses)))) for r in raws]


def tokenize(chat: Chat, group: RawGroup) -> Group:
    return tokenize_all(chat, [group])[0]


def texts(tokenizer: Tokenizer, group: Group) -> list[str]:
    """The prompt, and what each response adds to it."""
    prompt = group.prompt.tolist()
    start = tokenizer.decode(prompt)
    return [start, *(tokenizer.decode([*prompt, *r.ids.tolist()]).removeprefix(start) for r in group.responses)]


@pytest.fixture(scope="session")
def chatml(chat_tokenizer: Tokenizer) -> Chat:
    return Chat(chat_tokenizer, load_template("auto", chat_tokenizer))


def test_template_by_hand(chatml: Chat, chat_tokenizer: Tokenizer) -> None:
    """The generation prompt belongs to the prompt; the newline that the template writes after <|im_end|> to nobody."""
    group = tokenize(chatml, raw("one two", "three", "four five"))
    assert texts(chat_tokenizer, group) == [
        "<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\n",
        "three<|im_end|>",
        "four five<|im_end|>",
    ]
    assert not any(response.is_boundary_merge or response.is_empty for response in group.responses)


def test_template_equals_apply_chat_template(chatml: Chat, chat_directory: str) -> None:
    """What the policy is trained on must be what transformers builds when the trained model is asked."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(chat_directory)
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "good morning"},
        {"role": "user", "content": "name a colour\n"},
    ]
    group = tokenize(chatml, raw(messages, "blue", " red\n"))
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert group.prompt.tolist() == prompt
    for response, text in zip(group.responses, ("blue", " red\n"), strict=True):
        whole = theirs.apply_chat_template([*messages, {"role": "assistant", "content": text}], return_dict=False)
        assert prompt + response.ids.tolist() == whole[: len(prompt) + response.ids.size]
        assert theirs.decode(whole[len(prompt) + response.ids.size :]) == "\n"


@pytest.mark.parametrize(
    "source",
    [
        LLAMA2,
        PLAIN,
        "{%- for m in messages %}\n    {{- m | tojson }}\n    {%- if loop.last %}{% break %}{% endif %}\n{%- endfor %}",
        "{% for m in messages %}{% generation %}\n{{ m.content }}\n{% endgeneration %}x{% endfor %}",
        "{% if strftime_now is defined %}never{% else %}{{ messages[0]['content'] }}{% endif %}",
    ],
)
def test_rendering_equals_transformers(chat_tokenizer: Tokenizer, source: str) -> None:
    """Whitespace control, tojson and the extensions of the Hugging Face dialect; only the date differs."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "é <b>"}, {"role": "assistant", "content": " x "}]
    ours = template(source, chat_tokenizer).render(messages, add_generation_prompt=True)
    if "strftime_now" in source:
        assert ours == "é <b>"
        return
    rendered, _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, **chat_tokenizer.special_names
    )
    assert ours == rendered[0]


def test_plain_text_by_hand(sentencepiece_tokenizer: Tokenizer) -> None:
    """BOS before the prompt, EOS behind each response, nothing in between."""
    chat = Chat(sentencepiece_tokenizer, load_template("auto", sentencepiece_tokenizer))
    group = tokenize(chat, raw("the capital", " of France", "\nof course"))
    assert group.prompt[0] == 1
    assert group.prompt.tolist()[1:] == sentencepiece_tokenizer.encode(["the capital"])[0]
    for response, text in zip(group.responses, (" of France", "\nof course"), strict=True):
        [whole] = sentencepiece_tokenizer.encode(["the capital" + text])
        assert [*group.prompt, *response.ids] == [1, *whole, 2]


def test_one_bos_whatever_writes_it(sentencepiece_tokenizer: Tokenizer, chat_tokenizer: Tokenizer) -> None:
    """Template and tokenizer both add one; a template may add none; a tokenizer without BOS gets none."""
    tokenizer = sentencepiece_tokenizer
    for source in (LLAMA2, "{{ bos_token }}" + LLAMA2, PLAIN):
        group = tokenize(Chat(tokenizer, template(source, tokenizer)), raw("one", "two", "three"))
        assert group.prompt.tolist().count(1) == 1, source
        assert group.prompt[0] == 1
    group = tokenize(Chat(tokenizer, None), raw("<s>one", "two", "three"))
    assert group.prompt.tolist().count(1) == 1
    group = tokenize(Chat(chat_tokenizer, None), raw("one", "two", "three"))
    assert group.prompt.tolist() == chat_tokenizer.encode(["one"])[0]


def test_turn_is_closed_once(sentencepiece_tokenizer: Tokenizer) -> None:
    """A template without end-of-turn token would train a model that never stops; one with must not get a second."""
    tokenizer = sentencepiece_tokenizer
    group = tokenize(Chat(tokenizer, template(LLAMA2, tokenizer)), raw("one", "two", "three"))
    assert [text.count("</s>") for text in texts(tokenizer, group)[1:]] == [1, 1]
    for chosen in (template(PLAIN, tokenizer), None):
        group = tokenize(Chat(tokenizer, chosen), raw("one", "two", "</s> three", "four</s>", "five</s>\n"))
        closed = [text.replace("\n", "").strip() for text in texts(tokenizer, group)[1:]]
        assert closed == ["two</s>", "</s> three</s>", "four</s>", "five</s>"]


def test_sentencepiece_template_has_no_extra_space(sentencepiece_tokenizer: Tokenizer) -> None:
    """Tokenizing turn by turn puts a space before every turn (NVIDIA-NeMo/RL#2844)."""
    tokenizer = sentencepiece_tokenizer
    source = "{% for m in messages %}<s>{{ m.role }}|{{ m.content }}</s>{% endfor %}" + (
        "{% if add_generation_prompt %}<s>assistant|{% endif %}"
    )
    group = tokenize(Chat(tokenizer, template(source, tokenizer)), raw("one", "two", " two"))
    assert texts(tokenizer, group) == ["<s>user|one</s><s>assistant|", "two</s>", " two</s>"]


def test_boundary_merge_is_split_and_counted(chat_tokenizer: Tokenizer) -> None:
    """A prompt that ends in a space: " one" is a token, which would swallow it. The prompt must be the same for both
    responses, as it is tokenized alone, and the response must not lose or gain a character."""
    chat = Chat(chat_tokenizer, None)
    group = tokenize(chat, raw("two ", "one", "\n"))
    assert (
        chat_tokenizer.encode(["two one"])[0] != chat_tokenizer.encode(["two "])[0] + chat_tokenizer.encode(["one"])[0]
    )
    assert group.prompt.tolist() == chat_tokenizer.encode(["two "])[0]
    assert [response.is_boundary_merge for response in group.responses] == [True, False]
    assert texts(chat_tokenizer, group)[:2] == ["two ", "one<|im_end|>"]


@settings(deadline=None, max_examples=60)
@given(
    prompt=st.text(alphabet="aeo nt\n日?", min_size=1, max_size=12),
    responses=st.lists(st.text(alphabet="aeo nt\n日?", min_size=1, max_size=12), min_size=2, max_size=3),
)
def test_no_character_is_lost_at_the_border(
    chat_tokenizer: Tokenizer, sentencepiece_tokenizer: Tokenizer, prompt: str, responses: list[str]
) -> None:
    """Whatever merges at the border, prompt and response decode to what was given."""
    for tokenizer in (chat_tokenizer, sentencepiece_tokenizer):
        group = tokenize(Chat(tokenizer, None), raw(prompt, *responses))
        for response, text in zip(group.responses, responses, strict=True):
            whole = tokenizer.decode([*group.prompt.tolist(), *response.ids.tolist()])
            assert whole.removeprefix("<s>").removesuffix("</s>").removesuffix("<|im_end|>") == prompt + text
            assert whole.endswith(("</s>", "<|im_end|>"))


def one_by_one(tokenizer: Tokenizer, prompt: str, wholes: list[str]) -> tuple[list[int], list[tuple[list[int], bool]]]:
    """Prompt and, for each response, its tokens and whether it was a boundary merge: a text at a time, in lists."""

    def with_one_bos(text: str) -> list[int]:
        ids, bos = tokenizer.encode([text])[0], tokenizer.bos_id
        rest = list(itertools.dropwhile(lambda token: token == bos, ids))
        return [bos, *rest] if bos is not None and (tokenizer.adds_bos or len(rest) < len(ids)) else ids

    start = with_one_bos(prompt)
    responses = []
    assert tokenizer.eos_id is not None
    for text in wholes:
        ids = with_one_bos(text)
        merged = ids[: len(start)] != start
        rest = encode_continuations(tokenizer.encode, [text[len(prompt) :]])[0] if merged else ids[len(start) :]
        ends = [i for i, token in enumerate(rest) if token in tokenizer.turn_end_ids]
        is_closed = ends and not tokenizer.decode(rest[ends[-1] + 1 :]).strip()
        responses.append((rest[: ends[-1] + 1] if is_closed else [*rest, tokenizer.eos_id], merged))
    return start, responses


TEXT = st.lists(
    st.sampled_from(["a", "one", "one two", "? ", " ", "\n", "日", "?", "<s>", "</s>", "<|im_end|>", "<|im_start|>"]),
    max_size=6,
).map("".join)


@example(groups=[("<s>one two", ["<s>one", "</s>one two", " a"]), ("one two", ["<s>", "a", "one a? b"])])
@settings(deadline=None, max_examples=60)
@given(groups=st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=2, max_size=3)), min_size=1, max_size=5))
def test_many_groups_in_one_call(
    chat_tokenizer: Tokenizer,
    bos_tokenizer: Tokenizer,
    sentencepiece_tokenizer: Tokenizer,
    groups: list[tuple[str, list[str]]],
) -> None:
    """Against lists, a text at a time: a border that is off by one, a BOS or a merged response that goes to a
    neighbour, a prefix that is found in the tokens of the next text, a prompt that is cut in the wrong place."""
    for tokenizer in (chat_tokenizer, bos_tokenizer, sentencepiece_tokenizer):
        chat = Chat(tokenizer, None)
        usable = [(p, r) for p, r in groups if tokenizer.adds_bos or tokenizer.encode([p])[0]]
        raws = [raw(prompt, *responses) for prompt, responses in usable]
        found = tokenize_all(chat, raws) if raws else []
        assert len(found) == len(usable)
        for group, (prompt, responses) in zip(found, usable, strict=True):
            start, expected = one_by_one(tokenizer, prompt, [prompt + response for response in responses])
            assert group.prompt.tolist() == start
            for response, (ids, merged) in zip(group.responses, expected, strict=True):
                assert response.is_boundary_merge == merged
                assert response.ids.tolist() == ids
                assert response.is_empty == (set(ids) <= tokenizer.turn_end_ids)


def test_empty_response_is_marked(chatml: Chat, sentencepiece_tokenizer: Tokenizer) -> None:
    """Only the end of turn is left: there is nothing to learn but to stop."""
    for chat in (chatml, Chat(sentencepiece_tokenizer, None)):
        group = tokenize(chat, raw("one", "", "two"))
        assert [response.is_empty for response in group.responses] == [True, False]
        assert group.responses[0].ids.size == 1


def test_template_that_rewrites_the_prompt(chat_tokenizer: Tokenizer) -> None:
    """E.g. one that drops the thinking of earlier turns: training would see a prompt that generation never does."""
    source = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"^f\.jsonl:7: the chat template rewrites the prompt"):
        tokenize(Chat(chat_tokenizer, template(source, chat_tokenizer)), raw("one", "two", "three"))


def test_transcripts(chatml: Chat, chat_tokenizer: Tokenizer) -> None:
    """As plain text they stay as they are; through a template they become turns; others cannot."""
    prompt = "\n\nHuman: one\n\nAssistant:"
    group = tokenize(Chat(chat_tokenizer, None), raw(prompt, " two", " three", transcript=True))
    assert texts(chat_tokenizer, group)[:2] == [prompt, " two<|im_end|>"]
    group = tokenize(chatml, raw(prompt, " two", " three", transcript=True))
    assert texts(chat_tokenizer, group)[:2] == [
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n",
        "two<|im_end|>",
    ]
    with pytest.raises(UserError, match="chat_template=none"):
        tokenize(chatml, raw("Q: one A:", " two", " three", transcript=True))


def test_errors_name_the_row(chat_tokenizer: Tokenizer) -> None:
    """Messages without template, a template that refuses, text that is no text, a prompt without a token."""
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(UserError, match=r"^f\.jsonl:7: a prompt of messages needs a chat template"):
        tokenize(Chat(chat_tokenizer, None), raw(messages, "a", "b"))
    refusing = template("{{ raise_exception('only one turn') }}", chat_tokenizer)
    with pytest.raises(UserError, match=r"^f\.jsonl:7: .*only one turn"):
        tokenize(Chat(chat_tokenizer, refusing), raw(messages, "a", "b"))
    with pytest.raises(UserError, match=r"^f\.jsonl:7: .*surrogate"):
        tokenize(Chat(chat_tokenizer, None), raw("x", "a\ud83d", "b"))
    line = RawRow("f.jsonl:7", b'{"prompt": "", "chosen": "a", "rejected": "b"}', 1.0)
    with pytest.raises(UserError, match=r"^f\.jsonl:7: the prompt is empty"):
        prepare_chunk(CONFIG, Chat(chat_tokenizer, None), [line])


def test_choice_of_template(chat_tokenizer: Tokenizer, sentencepiece_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """auto, none, a file; a file that is absent, no text or no Jinja is an error before any row is read."""
    auto = load_template("auto", chat_tokenizer)
    assert auto is not None
    assert auto.info.source == "tokenizer"
    assert load_template("none", chat_tokenizer) is None
    assert load_template("auto", sentencepiece_tokenizer) is None
    path = tmp_path / "t.jinja"
    path.write_text(chat_tokenizer.chat_template or "")
    from_file = load_template(str(path), sentencepiece_tokenizer)
    assert from_file is not None
    assert from_file.info.fingerprint == auto.info.fingerprint
    assert from_file.info.source == str(path)
    with pytest.raises(UserError, match="no such file"):
        load_template(str(tmp_path / "none.jinja"), chat_tokenizer)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"t\.jinja.*UTF-8"):
        load_template(str(path), chat_tokenizer)
    path.write_text("{% for %}")
    with pytest.raises(UserError, match="not valid Jinja"):
        load_template(str(path), chat_tokenizer)
