"""Laws of two programs: what our templates make of a conversation is, byte for byte, what transformers makes of it.

transformers is what serves most models, so a byte of difference is a prompt that the model was not trained on.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given

pytest.importorskip("transformers", reason="needs the torch extra: pip install 'finetune-suite[torch]'")

from transformers.utils import chat_template_utils as library

from finetune import reference_model
from finetune.chat.catalog import CATALOG, TemplateSource
from finetune.chat.render import ChatTemplate
from finetune.chat.sandbox import compile_template
from finetune.errors import TemplateError
from finetune.records import Conversation, Message
from finetune_strategies.conversations import conversations, said
from finetune_strategies.profiles import examples
from finetune_strategies.templates import BOS, CONTROL_TOKENS, EOS, TemplateCase, templates_with_conversations
from support.conversations import talk
from support.real_templates import REAL

SHIPPED = sorted(Path(reference_model.__file__).parent.glob("*/chat_template.jinja"))
CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
OURS = CATALOG | {path.parent.name: TemplateSource("tokenizer", path.read_text(encoding="utf-8")) for path in SHIPPED}
SPACED = talk("system: Be kind.\n", "user: Hi ", "assistant:\nHello\t", "user:Bye", "assistant:Bye")


@pytest.fixture(autouse=True, scope="module")
def _one_day() -> Any:
    """Has transformers tell the templates the day that ours are told, not today's."""
    day = type("Day", (datetime,), {"now": classmethod(lambda cls: cls(2024, 7, 26))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "datetime", day)
        yield


def theirs(jinja: str, messages: Sequence[Message], *, asking: bool, **variables: Any) -> str:
    """What transformers renders."""
    told = [{"role": message.role, "content": message.content} for message in messages]
    [text], _ = library.render_jinja_template([told], chat_template=jinja, add_generation_prompt=asking, **variables)
    return str(text)


def compare(chat: ChatTemplate, jinja: str, conversation: Conversation, **variables: Any) -> None:
    """Both ways of rendering, for training and for each answer that is asked for."""
    messages = conversation.messages
    assert chat.render(conversation).text == theirs(jinja, messages, asking=False, **variables)
    for index, message in enumerate(messages):
        if message.role == "assistant":
            asked = chat.render_prompt(Conversation(messages[:index], conversation.where)).text
            assert asked == theirs(jinja, messages[:index], asking=True, **variables)


@pytest.mark.parametrize("name", OURS)
@given(conversations(inputs=False))
@example(SPACED)
@examples(0.5)
def test_our_templates_render_as_transformers_renders_them(name: str, conversation: Conversation) -> None:
    """The 4 built-in templates and the 2 shipped with our models, with any text and any roles they take."""
    assert len(OURS) == 6
    chat = ChatTemplate(OURS[name], CONTROL, bos="<s>", eos="</s>")
    compare(chat, OURS[name].jinja, conversation, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", REAL)
@given(conversations(inputs=False, contents=said().map(str.strip)))
@examples(0.25)
def test_families_templates_render_as_transformers_renders_them(name: str, conversation: Conversation) -> None:
    """The templates of 17 model families, on conversations of the roles that they take."""
    real = REAL[name]
    if real.system in ("refused", "lost"):
        turns = tuple(message for message in conversation.messages if message.role != "system")
        conversation = Conversation(turns, conversation.where)
    compare(real.compiled, real.jinja, conversation, bos_token=real.bos, eos_token=real.eos)


@given(templates_with_conversations())
def test_drawn_templates_render_as_transformers_renders_them(case: TemplateCase) -> None:
    """Any sound template, with a conversation that it takes."""
    chat = ChatTemplate(TemplateSource("drawn.jinja", case.jinja), CONTROL_TOKENS, bos=BOS, eos=EOS)
    compare(chat, case.jinja, case.conversation, bos_token=BOS, eos_token=EOS)


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'How it is <outside> & "in" Tromsø.',
        "parameters": {"type": "object", "properties": {"day": {"type": "string", "enum": ["a", "é"]}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"day": "a", "days": [1, 2.5, None, True]}}}
CALLED = [
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "15 °C"},
    {"role": "assistant", "content": "<think>\nfine\n</think>\n\nWarm."},
    {"role": "user", "content": "Thanks"},
]


@pytest.mark.parametrize("name", ["llama-3.1", "llama-3.2", "qwen-2.5", "qwen-3"])
@pytest.mark.parametrize("asking", [True, False])
def test_templates_with_tools_render_as_transformers_renders_them(name: str, *, asking: bool) -> None:
    """The sandbox leaves tools, calls, their JSON, thoughts and the date as they are, in 4 templates that know them."""
    known = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": asking}
    for tools in (None, [TOOL, TOOL]):
        [expected], _ = library.render_jinja_template([CALLED], tools=tools, chat_template=REAL[name].jinja, **known)
        ours = compile_template(name, REAL[name].jinja)(messages=CALLED, tools=tools, documents=None, **known)
        assert ours == expected


NICETIES = {
    "tools and documents are none": "{% if tools is not none or documents is not none %}!{% endif %}",
    "tools are defined": "{% if tools is not defined %}!{% endif %}",
    "a mark is a scope": "{% generation %}{% set x = '!' %}{% endgeneration %}{{ x }}",
    "a stream is true": "{% if messages | selectattr('role', 'equalto', 'nobody') %}!{% endif %}",
    "a stream is drawn once": "{% set s = messages | map(attribute='role') %}{{ s | first }}{{ s | list | length }}",
    "a list is not a stream": "{{ messages | map(attribute='role') is sequence }}{{ messages is sequence }}",
    "an entry before a method": "{{ {'items': 1, 'get': 2}['items'] }}{{ {'items': 1}.items() | list | length }}",
    "blocks": "{% filter upper %}x{% set y %}z{% endset %}{{ y }}{% endfilter %}{% with a = 1 %}{{ a }}{% endwith %}",
    "breaks": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}"
    "{% if i > 4 %}{% break %}{% endif %}{% else %}none{% endfor %}{% for i in [] %}{% else %}none{% endfor %}",
    "loops": "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.length }}{{ loop.revindex }}"
    "{{ loop.first }}{{ loop.last }}{{ loop.previtem is defined }}{{ loop.nextitem is defined }}"
    "{{ loop.cycle('a', 'b') }}{% endfor %}",
    "macros": "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ caller() if caller else '' }}{% endmacro %}"
    "{{ f(1) }}{{ f(1, b=3) }}{% call f('x') %}y{% endcall %}",
}


@pytest.mark.parametrize("case", NICETIES)
def test_jinja_is_spoken_as_transformers_speaks_it(case: str) -> None:
    """What templates may rely on in small things holds: 11 of them."""
    assert len(NICETIES) == 11
    source = "{% for m in messages %}{{ m.content }}</s>{% endfor %}" + NICETIES[case]
    chat = ChatTemplate(TemplateSource("small.jinja", source), CONTROL, bos="<s>", eos="</s>")
    question = Conversation(SPACED.messages[:2], SPACED.where)
    assert chat.render_prompt(question).text == theirs(source, question.messages, asking=True)


OFFICIAL = {"chatml": "chatml", "llama3": "llama-3"}


@pytest.mark.parametrize("name", OFFICIAL)
@given(conversations(inputs=False))
@example(SPACED)
@examples(0.5)
def test_built_in_template_is_the_familys_own(name: str, conversation: Conversation) -> None:
    """ChatML and Llama 3, built in, make of any conversation what the families' own templates make of it."""
    real = REAL[OFFICIAL[name]]
    chat = ChatTemplate(CATALOG[name], CONTROL, bos="<s>", eos="</s>")
    messages = conversation.messages
    assert chat.render(conversation).text == theirs(real.jinja, messages, asking=False, bos_token="<s>")
    asked = chat.render_prompt(conversation.prompt).text
    assert asked == theirs(real.jinja, messages[:-1], asking=True, bos_token="<s>")


@given(conversations(inputs=False, contents=said().map(str.strip)))
@examples(0.5)
def test_llama2_is_the_familys_own_for_texts_without_space_around_them(conversation: Conversation) -> None:
    """Llama 2, built in, is the family's own. One thing differs on purpose: of a question behind a system text the
    family strips only the end, so that nobody can tell what was the question's own space; ours strips both ends.
    """
    chat = ChatTemplate(CATALOG["llama2"], CONTROL, bos="<s>", eos="</s>")
    expected = theirs(REAL["llama-2"].jinja, conversation.messages, asking=False, bos_token="<s>", eos_token="</s>")
    assert chat.render(conversation).text == expected


def test_llama2_differs_where_it_is_said_to() -> None:
    """Behind a system text the family keeps the space in front of a question; without one it does not either."""
    chat = ChatTemplate(CATALOG["llama2"], CONTROL, bos="<s>", eos="</s>")
    for system, same in (("system:s", False), ("", True)):
        conversation = talk(*filter(None, [system, "user: a", "assistant:b"]))
        text = theirs(REAL["llama-2"].jinja, conversation.messages, asking=False, bos_token="<s>", eos_token="</s>")
        assert (chat.render(conversation).text == text) is same


def test_llama3_differs_from_later_llamas_by_their_date_only() -> None:
    """Llama 3.1 and 3.2 always write a system turn, with two dates; ours writes Llama 3's, which has none."""
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    ours = ChatTemplate(CATALOG["llama3"], CONTROL, bos="<s>", eos="</s>").render(SPACED).text
    for name in ("llama-3.1", "llama-3.2"):
        assert dates not in ours
        assert theirs(REAL[name].jinja, SPACED.messages, asking=False, bos_token="<s>").replace(dates, "") == ours


@pytest.mark.parametrize("name", ["gemma-2", "mistral-v0.1", "command-r"])
def test_refusals_are_those_of_transformers(name: str) -> None:
    """What a template itself refuses is refused by both programs, in the template's words."""
    conversation = talk("system:s", "assistant:a", "user:b", "assistant:c")
    with pytest.raises(Exception, match=r"not supported|must alternate") as refused:
        theirs(REAL[name].jinja, conversation.messages, asking=False, bos_token="<s>", eos_token="</s>")
    with pytest.raises(TemplateError) as caught:
        REAL[name].compiled.render(conversation)
    assert f"refuses these messages: {refused.value}" in caught.value.message
