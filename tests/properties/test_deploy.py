"""Laws of what is said to Ollama: recipes that nothing can be injected into, templates in its language, names."""

import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.chat.catalog import TemplateSource
from finetune.chat.render import ChatTemplate
from finetune.chat.sandbox import compile_template
from finetune.errors import TemplateError, UsageError
from finetune.records import Conversation
from finetune.serve.derive import SPACES, derive_template, drawn_conversations, prove_template
from finetune.serve.go_template import GoTemplate, literal
from finetune.serve.modelfile import Modelfile, write_modelfile
from finetune.serve.ollama import full_name
from finetune.verify.laws.modelfile_reader import read_modelfile
from finetune_strategies.conversations import conversations, texts
from finetune_strategies.profiles import examples
from finetune_strategies.templates import BOS, CONTROL_TOKENS, EOS, TemplateCase, templates_with_conversations
from support.real_templates import REAL

pytestmark = pytest.mark.tools

PIECES = ('"""', '"', '""', "\n", "\r", "\r\n", " ", "\t", "FROM x", "SYSTEM y", "PARAMETER stop z", "#", "{{", "\0")
HOSTILE = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=8).map("".join)
CONTENTS = ("ab", " a b ", "\n", "{{ .System }}", '"""', "é🦙", "\u2003x\x85", "")
CHATML = TemplateSource("chatml", REAL["chatml"].jinja)


def unseen(text: str) -> bool:
    """Whether Ollama would leave out some of a text."""
    return any(not (character.isprintable() or character in "\t\r\n") for character in text)


def messages_of(conversation: Conversation) -> list[dict[str, str]]:
    """A conversation as a chat API takes it."""
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


def compiled(jinja: str) -> ChatTemplate:
    """A template for the tokenizer of every drawn one."""
    return ChatTemplate(TemplateSource("drawn.jinja", jinja), CONTROL_TOKENS, bos=BOS, eos=EOS)


@given(source=HOSTILE, template=HOSTILE, system=HOSTILE, stop=HOSTILE, licence=HOSTILE)
@example("m.gguf", "x", 'a"""\nFROM evil\n', "b", "c")
@example("m.gguf", "x", 'say """hi"""\nADAPTER evil', "b", "c")
@example("m.gguf", "x", '"" \nFROM evil\n"', "b", "c")
@example("m.gguf", "x", "a\u200db", "b", "c")
@examples(2)
def test_modelfile_says_what_it_was_given_or_is_refused(
    source: str, template: str, system: str, stop: str, licence: str
) -> None:
    """Read as Ollama reads it, a recipe holds these values and no other; else it is refused, with a hint."""
    recipe = Modelfile(source, template, system, (("num_ctx", 512), ("stop", stop)), (licence,))
    values = [("from", source), ("num_ctx", "512"), ("stop", stop)]
    values += [(word, text) for word, text in (("template", template), ("system", system)) if text]
    values.append(("license", licence))
    if any('"""' in text or unseen(text) for _, text in values):
        try:
            written = write_modelfile(recipe)
        except UsageError:
            return
    else:
        written = write_modelfile(recipe)
    assert not any(unseen(text) for _, text in values)
    assert read_modelfile(written) == values


def test_modelfile_refuses_a_parameter_that_is_none() -> None:
    """A name that would end its line is refused by that name."""
    with pytest.raises(UsageError, match="'stop x"):
        write_modelfile(Modelfile("m.gguf", parameters=(("stop x\nFROM", "y"),)))


@given(text=texts() | HOSTILE)
@example('{{{ "{{"')
@example('""" """"')
@examples(2)
def test_go_literal_shows_its_text(text: str) -> None:
    """A text becomes a template that shows just it, beside an action and within a Modelfile, whatever is in it."""
    template = literal(text) + '{{ "" }}' + literal(text)
    assert GoTemplate(template).render([]) == text + text
    assert ("template", template) in read_modelfile(write_modelfile(Modelfile("m.gguf", template or "x"))) or not text


def test_go_strips_what_python_strips() -> None:
    """The characters that are stripped are all those that Python calls space, and no other."""
    assert sorted(SPACES) == [chr(number) for number in range(sys.maxunicode + 1) if chr(number).isspace()]


ROLES = ("system", "user", "assistant", "tool", "")


@cache
def derived_of(name: str) -> GoTemplate:
    """What is derived from a real template."""
    real = REAL[name]
    return GoTemplate(
        derive_template(lambda asked: real.compiled.render_prompt(asked).text, bos=real.bos, texts=CONTENTS)
    )


def shows_all(template: GoTemplate, messages: Sequence[Mapping[str, str]]) -> bool:
    """Whether the template renders messages of its own words, each once and in order."""
    named = [{**each, "content": f"Zq{place}x"} for place, each in enumerate(messages)]
    template.render(messages)
    return re.findall(r"Zq\d+x", template.render(named)) == [each["content"] for each in named]


@given(case=templates_with_conversations(), other=conversations(inputs=False, contents=st.sampled_from(CONTENTS)))
@examples(1)
def test_go_template_of_a_drawn_template_is_that_template(case: TemplateCase, other: Conversation) -> None:
    """What is derived from a template that asks soundly renders any conversation as it does.

    What that one refuses is rendered all the same, each message in its place: Ollama asks for any part of it.
    """
    template = compiled(case.jinja)
    bos = BOS if case.shape.says_bos else ""
    derived = GoTemplate(derive_template(lambda asked: template.render_prompt(asked).text, bos=bos, texts=CONTENTS))
    for conversation in (case.conversation.prompt, other.prompt):
        if case.shape.system == "refused" and conversation.messages[0].role == "system":
            assert shows_all(derived, messages_of(conversation))
        else:
            assert derived.render(messages_of(conversation)) == case.shape.asked(conversation).removeprefix(bos)


@pytest.mark.parametrize("name", REAL)
def test_go_template_of_a_real_template_is_that_template(name: str) -> None:
    """Each of 17 families' templates can be said in Ollama's language, with one begin-of-text token at most."""
    assert len(REAL) == 17
    real = REAL[name]
    shown = derived_of(name).render([{"role": "user", "content": "ab"}])
    assert not shown.startswith(real.bos)
    assert "ab" in shown


@given(conversation=conversations(inputs=False, contents=st.sampled_from(CONTENTS)), first=st.sampled_from(ROLES))
@examples(1 / 2)
def test_go_template_renders_every_window(conversation: Conversation, first: str) -> None:
    """Whatever part of a conversation Ollama looks at, in whatever roles, is rendered, each message in its place.

    ChatML takes any order of roles: all of it is as that says it.
    """
    turns = messages_of(conversation)
    windows = [turns[start:] for start in range(len(turns))] + [turns[:-1] or turns]
    windows.append([{**turns[0], "role": first}, *turns[1:]])
    for template in map(derived_of, REAL):
        assert all(shows_all(template, window) for window in windows)
        template.render([])
    for window in windows:
        if window[0]["role"] in ("system", "user", "assistant"):
            said = "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in window)
            assert derived_of("chatml").render(window) == f"{said}<|im_start|>assistant\n"


TURN = "{% for m in messages %}<|start|>{{ m.role }}\n{{ TEXT }}<|end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
UNSAYABLE = {
    "by number": (TURN.replace("TEXT", "m.content").replace("<|start|>", "<|start|>{{ loop.index }}") + ASKS, "puts"),
    "by length": ("{{ messages | length }}" + TURN.replace("TEXT", "m.content") + ASKS, "puts"),
    "half stripped": (TURN.replace("TEXT", "m.content.lstrip()") + ASKS, "strips only a part"),
    "by content": (TURN.replace("TEXT", "'!' + m.content if 'é' in m.content else m.content") + ASKS, "makes"),
    "losing": (TURN.replace("TEXT", "m.content if m.role == 'user'") + ASKS, "once and in order"),
    "turned round": (TURN.replace("in messages", "in messages | reverse").replace("TEXT", "m.content") + ASKS, "order"),
}


@pytest.mark.parametrize("kind", UNSAYABLE)
def test_template_that_cannot_be_said_is_refused(kind: str) -> None:
    """Each of 6 templates that do more than Ollama's language can say is refused, and the other ways are named."""
    assert len(UNSAYABLE) == 6
    jinja, says = UNSAYABLE[kind]
    template = compile_template("drawn.jinja", jinja)

    def render(asked: Conversation) -> str:
        return template(messages=messages_of(asked), add_generation_prompt=True)

    with pytest.raises(TemplateError, match=says) as refused:
        derive_template(render, bos="", texts=["é", " a", "b"])
    assert "--to llama.cpp" in refused.value.hint
    assert refused.value.exit_code == 3


@pytest.mark.parametrize("old", ["<|im_end|>", "user", "\n", ".Content"])
def test_go_template_with_a_fault_is_not_proved(old: str) -> None:
    """A change anywhere in a derived template (A242: one line break) is found by its proof."""
    template = ChatTemplate(CHATML, REAL["chatml"].control_tokens, bos="", eos="</s>")

    def render(asked: Conversation) -> str:
        return template.render_prompt(asked).text

    derived = derive_template(render, bos="", texts=CONTENTS)
    drawn = drawn_conversations(CONTENTS)
    assert prove_template(derived, render, bos="", conversations=drawn) == len(drawn)
    new = {"user": "human", ".Content": ".Role"}.get(old, "")
    with pytest.raises(TemplateError, match="cannot be said"):
        prove_template(derived.replace(old, new), render, bos="", conversations=drawn)


@pytest.mark.parametrize(
    "text", ["{{ if }}", "{{ end }}", "{{ range .Messages }}", '{{ "a }}', "{{ lower .Role }}", "{{ .Role"]
)
def test_go_template_that_is_none_is_refused(text: str) -> None:
    """What is no template of Go's, or uses more of its language, is refused and not executed in some way."""
    with pytest.raises(TemplateError, match="the Go template"):
        GoTemplate(text).render([])


GOOD_NAMES = {"facts": "facts:latest", "a/facts:q8_0": "a/facts:q8_0", "host:5000/a/b.c": "host:5000/a/b.c:latest"}
BAD_NAMES = ["", "a b", "a:b:c", "-a", "a/b/c/d", "a:", "../a", "a" * 81, 'a"', "a\n", "ä", "a.b/c"]


def test_names_are_those_that_ollama_takes() -> None:
    """Each of 3 names gets its tag, and each of 12 that Ollama takes not is refused with the form."""
    assert (len(GOOD_NAMES), len(BAD_NAMES)) == (3, 12)
    assert {name: full_name(name) for name in GOOD_NAMES} == GOOD_NAMES
    for name in BAD_NAMES:
        with pytest.raises(UsageError, match="no name of a model") as refused:
            full_name(name)
        assert "model[:tag]" in refused.value.hint
