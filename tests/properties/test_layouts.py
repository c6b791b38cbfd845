"""Laws of layouts: a conversation laid out as others were is what its template makes of it, whatever that asks."""

from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.chat.catalog import CATALOG, TemplateSource
from finetune.chat.render import ChatTemplate
from finetune.errors import TemplateError
from finetune.records import Conversation, Message, Rendered
from finetune_strategies.profiles import examples
from finetune_strategies.templates import BOS, CONTROL_TOKENS, EOS, TemplateCase, templates_with_conversations
from support.real_templates import REAL

END = "<|im_end|>"
TOKENS = (
    BOS,
    EOS,
    "<|im_start|>",
    END,
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<think>",
    "</think>",
)
ASKING = {
    "whole": "{{ text }}",
    "stripped": "{{ text | trim }}",
    "its method": "{{ text.lstrip('\\n').rstrip() }}",
    "letters": "{{ text.strip('a') }}",
    "twice": "{{ (text | trim).strip('a') }}",
    "in turn": "{{ text.lstrip('\\n').lstrip(' ').rstrip('\\n') }}",
    "put together": "{{ (' ' + text + '\\n') | trim }}",
    "joined": "{{ '[' ~ text.strip() ~ ']' }}",
    "all white": "{{ (' ' + text + ' ').strip() }}",
    "is it there": "{% if text %}{{ text }}{% else %}nothing{% endif %}",
    "is it": "{{ 'A:' if text == 'a' }}{{ text }}",
    "is it not": "{{ 'A:' if text is not equalto 'a' }}{{ text }}",
    "one of": "{{ 'A:' if text in ['a', ' '] }}{{ text }}",
    "has": "{% if '</think>' in text %}thought: {% endif %}{{ text }}",
    "begins": "{% if text.startswith(' ') %}indented: {% endif %}{{ text }}",
    "ends, stripped": "{% if text.strip().endswith('a') %}A: {% endif %}{{ text }}",
    "default": "{{ text | default('none') }}",
    "default, true": "{{ text | default('none', true) }}",
    "kind": "{% if text is string and text is not mapping and text is iterable %}{{ text }}{% endif %}",
    "macro": "{% macro say(x) %}<{{ x }}>{% endmacro %}{{ say(text) }}",
    "macro, asked": "{% macro say(x) %}{{ x }}{% endmacro %}{{ 'A:' if 'a' in say(text) }}{{ text }}",
    "block": "{% set kept %}{{ text }}{% endset %}{{ kept | length }}{{ text }}",
    "filter block": "{% filter upper %}{{ text }}{% endfilter %}{{ text }}",
    "length": "{{ 'long: ' if text | length > 1 }}{{ text }}",
    "letter": "{{ 'A:' if text[0] == 'a' }}{{ text }}",
    "loop": "{% for letter in text %}{{ '.' }}{% endfor %}{{ text }}",
    "upper": "{{ 'A:' if text | upper == 'A' }}{{ text }}",
    "replaced": "{{ text.replace('a', 'a') }}",
    "split": "{{ text.split('</think>')[-1] }}",
    "number": "{{ text | int }}{{ text }}",
    "sorted": "{{ [text, 'b'] | sort | first == 'b' }}{{ text }}",
    "listed": "{{ [text] | join(',') }}",
    "chosen": "{{ messages | selectattr('content', 'equalto', 'a') | list | length }}{{ text }}",
    "all of it": "{{ messages | tojson | length }}{{ text }}",
    "another's": "{{ 'same: ' if messages[0].content == messages[-1].content }}{{ text }}",
    "first of all": "{{ messages[0].content.startswith('a') }}{{ text }}",
    "key": "{{ {'a': 1}[text] }}{{ text }}",
    "marks": "\ue0020\ue003\ue0000\ue001{{ text }}",
}
TEXTS = ("a", "b", " ", "\n", "</think>", "<think>", "</s>", END, "\ue0000\ue001", "\ue0020\ue003", "é", "\ud800", "0")
text = st.lists(st.sampled_from(TEXTS), max_size=4).map("".join)


@cache
def asking(name: str) -> TemplateSource:
    """A template that asks of each text what is named, in a loop as all have."""
    return TemplateSource(
        f"{name}.jinja",
        "{% for m in messages %}{% set text = m.content %}{{ '<|im_start|>' + m.role + '\n' }}"
        + ASKING[name]
        + "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )


def outcome(render: Callable[[Conversation], Rendered], talk: Conversation) -> object:
    """The segments, or the words of the refusal."""
    try:
        return render(talk)
    except TemplateError as error:
        return error.message


def compare(made: Callable[[], ChatTemplate], talks: list[Conversation], monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that lays out as it did before says of each what one says that renders each."""
    laying, rendering = made(), made()
    monkeypatch.setattr(rendering._layouts, "find", lambda *given, **named: None)
    for talk in talks:
        for name in ("render", "render_prompt"):
            assert outcome(getattr(laying, name), talk) == outcome(getattr(rendering, name), talk), talk


def talks_of(roles: tuple[str, ...], said: list[tuple[str, ...]]) -> list[Conversation]:
    """Conversations of the same roles."""
    return [Conversation(tuple(map(Message, roles, row)), f"rows.jsonl:{number}") for number, row in enumerate(said, 1)]


ROLES = (("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant") * 2)


@given(data=st.data(), roles=st.sampled_from(ROLES), name=st.sampled_from(sorted(ASKING)))
@examples()
def test_layouts_are_what_templates_make_that_ask_of_texts(
    data: st.DataObject, roles: tuple[str, ...], name: str
) -> None:
    """Whatever a template asks of a text: those laid out as others were are as when each is rendered."""
    said = data.draw(st.lists(st.tuples(*[text] * len(roles)), min_size=3, max_size=12))
    with pytest.MonkeyPatch.context() as patch:
        compare(lambda: ChatTemplate(asking(name), TOKENS, bos=BOS, eos=EOS), talks_of(roles, said), patch)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ASKING))
def test_layouts_hold_for_no_other_answers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair of short texts, after enough of another for a layout to be kept."""
    pairs = list(product(["a", "b", " a", "a ", " ", "ab", "</think>a", "aa", " a b ", "\n a \n", "\ud800"], repeat=2))
    said = [("b", "b")] * 3 + [("a", "a")] * 3 + pairs
    talks = talks_of(("user", "assistant"), said)
    compare(lambda: ChatTemplate(asking(name), TOKENS, bos=BOS, eos=EOS), talks, monkeypatch)


@given(data=st.data(), roles=st.sampled_from(ROLES), name=st.sampled_from(sorted({*REAL, *CATALOG})))
@examples(0.5)
@example(data=None, roles=ROLES[0], name="qwen-3")
def test_layouts_are_what_real_templates_make(data: st.DataObject | None, roles: tuple[str, ...], name: str) -> None:
    """The same of the templates that models ship and of ours."""
    words = st.lists(st.sampled_from([*TEXTS, "<tool_response>", "</tool_response>"]), max_size=3).map("".join)
    said = (
        data.draw(st.lists(st.tuples(*[words] * len(roles)), min_size=3, max_size=8))
        if data
        else [("a", "b")] * 3 + [("<tool_response>a</tool_response>", "b"), ("a", "<think>\nb\n</think>c")] * 3
    )
    real = REAL.get(name)
    source = TemplateSource(f"{name}.jinja", real.jinja) if real else CATALOG[name]
    bos, eos = (real.bos, real.eos) if real else (BOS, EOS)
    tokens = tuple(dict.fromkeys([bos, eos, *(real.control_tokens if real else ()), *TOKENS]))
    with pytest.MonkeyPatch.context() as patch:
        compare(lambda: ChatTemplate(source, tokens, bos=bos, eos=eos), talks_of(roles, said), patch)


@given(case=templates_with_conversations(), repeated=st.integers(2, 4))
@examples(0.5)
def test_layouts_are_what_drawn_templates_make(case: TemplateCase, repeated: int) -> None:
    """The same of templates that are drawn, of any roles."""
    source = TemplateSource("drawn.jinja", case.jinja)
    talks = [case.conversation] * repeated
    with pytest.MonkeyPatch.context() as patch:
        compare(lambda: ChatTemplate(source, CONTROL_TOKENS, bos=BOS, eos=EOS), talks, patch)


@pytest.mark.parametrize("name", sorted(REAL))
def test_few_conversations_of_the_same_roles_are_rendered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fifty plain conversations of the same roles, no more than three are rendered."""
    real = REAL[name]
    words = tuple(dict.fromkeys([real.bos, real.eos, *real.control_tokens]))
    chat = ChatTemplate(TemplateSource(f"{name}.jinja", real.jinja), words, bos=real.bos, eos=real.eos)
    looked, plain = [], chat._look_at
    monkeypatch.setattr(chat, "_look_at", lambda *given, **named: looked.append(1) or plain(*given, **named))
    for talk in talks_of(("user", "assistant") * 2, [(f"q{n}", f"a{n}", f"r{n}", f"b{n}") for n in range(50)]):
        chat.render(talk)
    assert len(looked) <= 3
