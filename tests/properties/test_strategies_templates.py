"""Laws of the template strategies: every corner is reached, what they say of a value is so, failures become small."""

import re
from dataclasses import fields
from typing import Any

import pytest
from jinja2 import Environment

from finetune_strategies.drawing import drawn, simplest
from finetune_strategies.hostile_templates import ATTACKS, hostile_templates
from finetune_strategies.templates import (
    BOS,
    CONTROL_TOKENS,
    EOS,
    FAULTS,
    TemplateShape,
    broken_templates,
    template_shapes,
    templates_with_conversations,
    write_jinja,
)
from support.conversations import talk

pytestmark = pytest.mark.tools

VALUES = {
    "before": 5,
    "after": 5,
    "close": 4,
    "stop": 5,
    "between": 4,
    "assistant": 2,
    "system": 3,
    "trims": 3,
    "says_bos": 2,
    "says_first": 3,
    "style": 4,
    "finds_first": 3,
}


@pytest.fixture(scope="module")
def cases() -> list[Any]:
    """What a few laws would see of sound templates."""
    return drawn(templates_with_conversations(), share=15 / 4)


def test_shapes_reach_every_choice() -> None:
    """Each of these choices of 12 kinds is drawn, and so is each pair of a system's place and a way to write it."""
    assert VALUES.keys() == {field.name for field in fields(TemplateShape)}
    assert sum(VALUES.values()) == 43
    shapes = drawn(template_shapes(), share=15 / 2)
    for name, number in VALUES.items():
        assert len({getattr(shape, name) for shape in shapes}) == number, name
    assert len({(shape.system, shape.style) for shape in shapes}) == 12


def test_conversations_fit_their_template(cases: list[Any]) -> None:
    """With and without a system text, of one answer and of more; never a system text where it is refused."""
    systems = {(case.shape.system, case.conversation.messages[0].role == "system") for case in cases}
    assert systems == {("turn", True), ("turn", False), ("folded", True), ("folded", False), ("refused", False)}
    assert {sum(trained for _, trained in case.parts) for case in cases} == {1, 2, 3}
    padded = [case for case in cases if any(m.content != m.content.strip() for m in case.conversation.messages)]
    assert {case.shape.trims for case in padded} == {"", "filter", "method"}


def test_written_jinja_is_what_it_is_said_to_be(cases: list[Any]) -> None:
    """Plain Jinja makes of the messages what the parts say, and of all but the last one the prompt."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    checked = 0
    for case in cases[:30]:
        source = re.sub("{%-? (?:end)?generation -?%}", "", case.jinja)
        told = [{"role": message.role, "content": message.content} for message in case.conversation.messages]
        known = {"bos_token": BOS, "eos_token": EOS}
        template = environment.from_string(source)
        assert template.render(messages=told, **known) == "".join(text for text, _ in case.parts)
        asked = template.render(messages=told[:-1], add_generation_prompt=True, **known)
        assert asked == case.shape.asked(case.conversation.prompt)
        checked += 1
    assert checked == 30


def test_stops_are_control_tokens(cases: list[Any]) -> None:
    """Every answer ends in a control token, and all five are in use."""
    assert {token for case in cases for token in CONTROL_TOKENS if case.shape.stop.endswith(token)} == {
        "<|end|>",
        EOS,
        "<|stop|>",
    }
    assert {token for case in cases for token in CONTROL_TOKENS if token in case.jinja or token == EOS} >= {
        "<|start|>",
        "<|end|>",
        "<|stop|>",
        EOS,
    }


def test_failing_template_becomes_the_plainest() -> None:
    """The simplest case is the plainest shape with one empty question and answer, in 16 lines."""
    case = simplest(templates_with_conversations())
    assert case.shape == TemplateShape()
    assert case.conversation.messages == talk("user:", "assistant:").messages
    assert len(case.jinja.splitlines()) == 16


@pytest.mark.parametrize("name", ["before", "stop", "system", "trims", "style"])
def test_failing_template_keeps_one_choice_only(name: str) -> None:
    """A failure that needs one choice is reported with that choice changed and no other."""
    plain = TemplateShape()
    shape = simplest(template_shapes(), lambda shape: getattr(shape, name) != getattr(plain, name))
    assert [each for each in VALUES if getattr(shape, each) != getattr(plain, each)] == [name]


def test_broken_templates_reach_every_fault() -> None:
    """Each of these faults is drawn, with its words, and each template differs from the sound one."""
    found = drawn(broken_templates(), share=5 / 2)
    assert {(each.fault, each.says) for each in found} == set(FAULTS.items())
    sound = write_jinja(TemplateShape())
    assert sum(each.source == sound for each in found) == 0


def test_failing_broken_template_becomes_one_question() -> None:
    """The simplest broken template is the plainest one, that asks otherwise, with one question and answer."""
    least = simplest(broken_templates())
    assert least.fault == "asks otherwise"
    assert least.conversation.messages == talk("user:ab", "assistant:ab").messages
    assert least.source == write_jinja(TemplateShape(), asks="<|start|>assistant\n<|start|>?")


SIMPLEST = {
    "hidden attribute": "{{ (''.__class__) }}",
    "far method": "{{ (''.format_map) }}",
    "far filter": "{{ (messages | attr('__class__')) }}",
    "width": "{{ ('%100000d' % 1) }}",
    "number": "{{ (2 ** 100000) }}",
    "syntax": "{% include 'x' %}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
}


def test_hostile_templates_reach_every_attack() -> None:
    """Each of these kinds is drawn where any may be, in at least 6 of 11 places each where it can be put anywhere."""
    assert {each.kind for each in drawn(hostile_templates(), share=3)} == set(ATTACKS)
    for kind in ("hidden attribute", "far method", "far filter", "width", "size", "number"):
        opened = {each.source.split("(")[0] for each in drawn(hostile_templates(kind), share=1)}
        assert len(opened) >= 6, kind


def test_failing_attack_becomes_short() -> None:
    """The simplest attack of a kind is a line that shows it, and no kind's is longer than 160 characters."""
    for kind in ATTACKS:
        least = simplest(hostile_templates(kind))
        assert len(least.source) <= 160, kind
        assert least.source == SIMPLEST.get(kind, least.source)
