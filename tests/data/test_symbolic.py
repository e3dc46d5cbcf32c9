"""Templates run once with stand-ins: the same text as each conversation rendered, or none at all."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.data.layouts import Messages
from rpo_megatron.data.symbolic import outline
from rpo_megatron.data.template import ChatTemplate
from tests.data.conftest import CHATML

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA_3 = (
    "{{- bos_token }}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|system|>\\n' + system + '<|eot|>' }}"
    "{%- for m in messages %}{%- if not (m.role == 'ipython' or 'tool_calls' in m) %}"
    "{{- '<|' + m['role'] + '|>\\n\\n' + m['content'] | trim + '<|eot|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n\\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no') }}"
    "{% endif %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<turn>' ~ role ~ '\\n' ~ m.content.strip() ~ '<end>\\n' }}{% endfor %}"
    "{% if messages | length > 1 and messages[-1].role == 'user' %}{{ '!' }}{% endif %}"
)
FOLLOWED = {
    "chatml": CHATML,
    "llama 3": LLAMA_3,
    "gemma": GEMMA,
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "kept": "{% set ns = namespace(last='') %}{% for m in messages %}{% set ns.last = m.content %}{% endfor %}"
    "{{ ns.last }}",
    "kind": "{% for m in messages %}{% if m.content is string and m.get('content') is not none %}"
    "{{ m.content }}{% endif %}{% endfor %}",
}
C = "messages[-1].content"
DEPENDENT = [
    *(f"{{% if {C} %}}a{{% endif %}}", f"{{{{ {C} or 'x' }}}}", f"{{{{ {C}[0] }}}}", f"{{{{ {C}[:2] }}}}"),
    *(f"{{{{ {C} == 'one' }}}}", f"{{{{ 'one' == {C} }}}}", f"{{{{ {C} < 'one' }}}}", f"{{{{ {C} in 'one two' }}}}"),
    *(f"{{{{ 'n' in {C} }}}}", f"{{{{ {C} in ['one'] }}}}", f"{{{{ {C} | length }}}}", f"{{{{ {C} | upper }}}}"),
    *(f"{{{{ {C}.startswith('o') }}}}", f"{{{{ 'one two'.startswith({C}) }}}}", f"{{{{ {C}.split('n') | list }}}}"),
    *(f"{{{{ ('%s' % {C}) | upper }}}}", f"{{{{ ('a%s' % ({C},)) | length }}}}", f"{{{{ ({C} ~ '') | length }}}}"),
    *(f"{{% set x %}}{{{{ {C} }}}}{{% endset %}}{{{{ x | length }}}}", f"{{{{ ('a' + {C}) | trim }}}}"),
    *(f"{{% macro f(c) %}}{{{{ c }}}}{{% endmacro %}}{{{{ f({C}) | length }}}}", f"{{{{ ','.join([{C}]) | length }}}}"),
    *("{% macro f() %}{{ " + C + " }}{% endmacro %}{{ f() | length }}", f"{{{{ [{C}] }}}}", "{{ messages }}"),
    *("{{ messages | tojson }}", "{{ messages | map(attribute='content') | join }}", f"{{{{ {C} | int }}}}"),
    *(f"{{{{ {C} | replace('n', 'm') }}}}", f"{{{{ 'none' | replace({C}, 'm') }}}}", f"{{{{ {C} is sequence }}}}"),
    *(f"{{% filter upper %}}{{{{ {C} }}}}{{% endfilter %}}", f"{{{{ {C} * 2 }}}}", f"{{{{ {{{C}: 1}} }}}}"),
    *("{% for c in " + C + " %}{{ c }}.{% endfor %}", f"{{{{ dict(a={C}) }}}}", f"{{{{ {C}.strip('o') }}}}"),
    *(f"{{{{ 'one' | trim({C}) }}}}", f"{{{{ 'one'.strip({C}) }}}}"),
    *(f"{{{{ '{{}}'.format({C}) | length }}}}", f"{{{{ {C} | e }}}}", f"{{{{ {C} is eq 'one' }}}}"),
    *(
        "{{ messages[0].content == messages[-1].content }}",
        "{% if " + C + " is lower %}a{% endif %}",
        f"{{{{ {C}.missing }}}}",
    ),
]


def template(text: str) -> ChatTemplate:
    return ChatTemplate(text, source="test", special_names=NAMES)


def messages(*contents: str, first: str = "user") -> Messages:
    roles = [first, *("user" if (i % 2) == (first != "system") else "assistant" for i in range(len(contents) - 1))]
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]


TEXT = st.lists(st.sampled_from(["one", " ", "\n", "\u2003", "\x1f", "é", "<s>", "0", "{{", "\ue0000\ue001"])).map(
    "".join
)


@pytest.mark.parametrize("name", FOLLOWED)
@settings(deadline=None, max_examples=25)
@given(conversations=st.lists(st.lists(TEXT, min_size=1, max_size=4), min_size=1, max_size=4), prompts=st.booleans())
def test_the_same_text(name: str, conversations: list[list[str]], prompts: bool) -> None:
    """A gap that is filled with another message's text, stripped where it is not, or filled twice."""
    ours, plain = template(FOLLOWED[name]), template(FOLLOWED[name])
    first = "user" if name == "gemma" else "system"
    for contents in [["x"] * n for n in range(1, 5)] + conversations:
        given_ = messages(*contents, first=first)
        expected = plain._render(given_, add_generation_prompt=prompts)
        assert ours.render(given_, add_generation_prompt=prompts) == expected
    assert len(ours._outlines) == 4
    assert all(ours._outlines.values())


@pytest.mark.parametrize("text", DEPENDENT)
def test_what_depends_on_the_content_is_rendered(text: str) -> None:
    """Each is a way in which a stand-in could pass for the content of all."""
    ours = template(text)
    assert ours._guarded is None or outline(ours._guarded, ("user", "user"), **NAMES) is None
    for content in ("one", "", "two\n", "0", "é"):
        given_ = messages("hello", content)
        expected = ours._render(given_, add_generation_prompt=False)
        assert ours.render(given_, add_generation_prompt=False) == expected
    assert not any(ours._outlines.values())


def test_roles_are_told_apart() -> None:
    """An outline is good for one sequence of roles only, and forged gaps in a role or a special token for none."""
    ours = template(CHATML)
    for first in ("user", "system", "\ue0000\ue001"):
        assert first in ours.render(messages("a", "b", first=first), add_generation_prompt=False)
    assert [found is not None for found in ours._outlines.values()] == [True, True, False]
    forged = ChatTemplate("{{ bos_token }}", source="test", special_names={"bos_token": "\ue0000\ue001"})
    assert forged.render(messages("a"), add_generation_prompt=False) == "\ue0000\ue001"
    assert forged.render(messages("b"), add_generation_prompt=False) == "\ue0000\ue001"
