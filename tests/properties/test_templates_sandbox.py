"""Laws of templates from anywhere: sound ones become what they say, hostile and broken ones are refused in time."""

import time
import tracemalloc
from functools import cache

import pytest
from hypothesis import example, given
from jinja2.filters import FILTERS
from jinja2.tests import TESTS

from finetune.chat.catalog import TemplateSource
from finetune.chat.render import ChatTemplate
from finetune.chat.sandbox import MAX_TEMPLATE_CHARS, compile_template
from finetune.chat.template_words import DICT_METHODS, FILTER_TABLE, STRING_METHODS, TEST_TABLE
from finetune.errors import TemplateError
from finetune.records import Conversation
from finetune_strategies.hostile_templates import HostileTemplate, every_attack, hostile_templates
from finetune_strategies.profiles import examples
from finetune_strategies.templates import (
    BOS,
    CONTROL_TOKENS,
    EOS,
    BrokenTemplate,
    TemplateCase,
    broken_templates,
    templates_with_conversations,
)
from support.conversations import joined, stretches, talk

TALK = talk("user:Hi", "assistant:Hello")
SHOWN = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"


@cache
def chat(source: str) -> ChatTemplate:
    """A template written here, for the tokenizer of drawn templates."""
    return ChatTemplate(TemplateSource("any.jinja", source), CONTROL_TOKENS, bos=BOS, eos=EOS)


def refusal(source: str, conversation: Conversation = TALK) -> TemplateError:
    """The error with which a template is refused, at compiling or at rendering."""
    with pytest.raises(TemplateError) as caught:
        chat(source).render(conversation)
    assert "'any.jinja'" in caught.value.message
    assert caught.value.hint
    return caught.value


def shows(expression: str) -> str:
    """What an expression comes to in a template, with one message at hand."""
    return compile_template("any.jinja", "{{ " + expression + " }}")(messages=[{"role": "user", "content": "Hi"}])


@given(templates_with_conversations())
@examples(0.7)
def test_drawn_template_trains_what_it_says_and_asks_as_it_trains(case: TemplateCase) -> None:
    """Any sound template's text is the one written out by hand, by character spans each
    answer with its stop is trained and nothing else, and the prompt for an answer is what stands before it.
    """
    rendered = chat(case.jinja).render(case.conversation)
    assert stretches(rendered) == joined(case.parts)
    at = 0
    spans = [(at, at := at + len(text), trained) for text, trained in case.parts]
    marked = [segment.trained for segment in rendered.segments for _ in segment.text]
    assert marked == [trained for start, end, trained in spans for _ in range(start, end)]
    for index, message in enumerate(case.conversation.messages):
        if message.role == "assistant":
            asked = chat(case.jinja).render_prompt(Conversation(case.conversation.messages[:index], "rows.jsonl:1"))
            assert asked.text == case.shape.asked(Conversation(case.conversation.messages[:index], ""))
            assert rendered.text.startswith(asked.text)
            assert not any(segment.trained for segment in asked.segments)


@pytest.mark.slow
def test_every_attack_is_refused_before_memory_is_taken() -> None:
    """Each of these attacks in one expression, sized 100,000,000, is refused for what it is within 16 MB."""
    attacks = every_attack()
    assert len(attacks) == 152
    tracemalloc.start()
    try:
        for attack in attacks:
            tracemalloc.reset_peak()
            message = refusal(attack.source).message
            assert "unsafe" in message, attack
            assert attack.says in message, attack
            assert tracemalloc.get_traced_memory()[1] < 16_000_000, attack
    finally:
        tracemalloc.stop()


@given(hostile_templates())
@examples(0.5)
@example(HostileTemplate("{{ '%999999999d' is even }}", "width", "calculates with a str"))
@example(HostileTemplate("{{ 'x' | round(9, 'floor') }}", "width", "calculates with a str"))
@example(HostileTemplate("{% for a in [1] %}{{ [0] | map(attribute='.' * 9**6) }}{% endfor %}", "size", "more work"))
def test_hostile_template_is_refused(hostile: HostileTemplate) -> None:
    """A template that reaches for Python or for endless work is refused, with the line and what it did."""
    error = refusal(hostile.source)
    assert "unsafe" in error.message
    assert "line 1: " in error.message
    assert hostile.says in error.message


@given(broken_templates())
@examples(0.4)
def test_broken_template_is_refused_with_its_fault(broken: BrokenTemplate) -> None:
    """A template that asks otherwise than it trains, loses, doubles or rewrites text, or never ends, says just that."""
    assert broken.says in refusal(broken.source, broken.conversation).message


_GROW = "{% set ns = namespace(x='a') %}{% for i in range(20) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
_SHARE = "{% set ns = namespace(x=('a',)) %}{% for i in range(22) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
_MANY = "{% for i in range(60000) %}X{% endfor %}" * 9
EXTREMES = {
    "loops": "{% for i in range(9999) %}" * 15 + "{% endfor %}" * 15,
    "filtered loops": "{% for i in range(60000) if false %}{% endfor %}" * 99,
    "long body": "{% for i in range(60000) %}" + "x" * 49_000 + "{% endfor %}",
    "wide body": "{% for i in range(60000) %}" + "{{ i }}" * 500 + "{% endfor %}",
    "macro body": "{% macro f() %}" + "{% set x = 1 %}" * 500 + "{% endmacro %}" + _MANY.replace("X", "{{ f() }}"),
    "caller": "{% macro f() %}"
    + _MANY.replace("X", "{{ caller() }}")
    + "{% endmacro %}{% call f() %}"
    + "x" * 9000
    + "{% endcall %}",
    "tree of macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(39) }}",
    "doubling": _GROW.replace("20", "99").replace("+", "~"),
    "slices": _GROW + _MANY.replace("X", "{% set y = ns.x[1:] %}"),
    "searches": _GROW + _MANY.replace("X", "{% set y = 'b' in ns.x %}"),
    "searches in vain": _GROW + _MANY.replace("X", "{% set y = 'b' not in ns.x %}"),
    "comparisons": _GROW + "{% set z = ns.x ~ '' %}" + _MANY.replace("X", "{% set y = z == ns.x %}"),
    "strips": _GROW + _MANY.replace("X", "{% set y = ns.x.strip() %}"),
    "far search": _GROW + "{{ ns.x.rfind('b' ~ ns.x[9:]) }}",
    "elements": _GROW + "{{ ns.x | list | length }}",
    "wide elements": "{{ ('資料庫' * 9999) | list | list }}",
    "sorting": "{{ range(60000) | sort | unique | sort | list }}",
    "shown": _SHARE + "{{ ns.x }}",
    "hashed": _SHARE + "{{ {ns.x: 1} }}",
    "looked up": _SHARE + "{{ {1: 1}[ns.x] }}",
    "compared": _SHARE + "{{ ns.x == ns.x[:] }}",
    "json": _SHARE.replace("22", "15") + "{{ ns.x | tojson(indent=100) }}",
    "nested": "{% set ns = namespace(x=[]) %}" + _MANY.replace("X", "{% set ns.x = [ns.x] %}") + "{{ ns.x }}",
    "nested in values": "{% set ns = namespace(x=0) %}{% for i in range(99) %}{% set ns.x = {i: ns.x} %}{% endfor %}"
    + "{{ ns.x }}",
    "namespaces": "{% set ns = namespace(x=0) %}" + _MANY.replace("X", "{% set ns.x = namespace(x=ns.x) %}"),
    "arithmetic": _MANY.replace("X", "{% set y = i * 2 + 1 - 1 // 3 %}"),
    "filters": _MANY.replace("X", "{% set y = i | string | trim | upper | length %}"),
    "methods": _MANY.replace("X", "{% set y = 'a'.strip().split('a') %}"),
    "tests": _MANY.replace("X", "{% set y = i is even and i is in [1] %}"),
    "streams": _MANY.replace("X", "{% set y = range(9) | map('string') | select('in', 'abc') | list %}"),
}
TOO_LONG = {
    "deep": "{{ " + "not " * 20_000,
    "brackets": "{{ " + "[" * 60_000,
    "openings": "{{-" * 30_000,
    "digits": "{{ " + "9" * 60_000,
    "conditions": "{% if a %}" + "{% elif b %}" * 8000,
}
CLOSED = {"conditions": "{% endif %}", "brackets": "", "openings": ""}


@pytest.mark.slow
@pytest.mark.parametrize("case", EXTREMES)
def test_most_expensive_attacks_end_soon(case: str) -> None:
    """Each of these attacks ends within 5 seconds of work, for the work that it does; most take a twentieth of one."""
    start = time.process_time()
    error = refusal(EXTREMES[case])
    assert time.process_time() - start < 5
    assert any(words in error.message for words in ("more work", "nests", "looks up a tuple"))


@pytest.mark.parametrize("case", ["doubling", "elements", "wide elements", "long body", "json"])
def test_most_expensive_attacks_take_little_memory(case: str) -> None:
    """Attacks on memory end within 100 MB, where two short messages are allowed 4 MB of text."""
    tracemalloc.start()
    try:
        refusal(EXTREMES[case])
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("case", TOO_LONG)
def test_attacks_on_the_compiler_end_soon(case: str) -> None:
    """Each of these templates, as long as one may be, is refused or stopped within 5 seconds of work."""
    closing = CLOSED.get(case, " }}")
    source = TOO_LONG[case][: MAX_TEMPLATE_CHARS - len(closing)]
    start = time.process_time()
    refusal(source.rsplit("{% elif", 1)[0] + closing)
    assert time.process_time() - start < 5


@pytest.mark.slow
def test_words_outside_the_vocabulary_are_refused() -> None:
    """Each filter, test and method that the vocabulary does not name is refused by its name: at least 100 of them."""
    open_filters = [name for name, entry in FILTER_TABLE.items() if entry.__name__ != "refuse"]
    open_tests = [name for name, entry in TEST_TABLE.items() if getattr(entry, "__name__", "") != "refuse"]
    assert (len(open_filters), len(open_tests)) == (35, 35)
    words = [f"'a' | {name}" for name in set(FILTERS) - set(open_filters)]
    words += [f"'a' is {name}(1)" for name in set(TESTS) - set(open_tests)]
    words += [f"'a'.{name}" for name in dir(str) if name not in STRING_METHODS]
    words += [f"{{}}['{name}']" for name in dir(dict) if name not in DICT_METHODS]
    words += [f"messages.{name}" for name in dir(list)]
    words += [f"{name}()" for name in ("lipsum", "cycler", "joiner", "open", "eval", "self", "loop")]
    assert len(words) >= 100
    for word in words:
        message = refusal(SHOWN + "{{ " + word + " }}").message
        assert "unsafe" in message or "is undefined" in message, word


ALIKE = {
    "'a-b' | replace('-', '+') | upper": "A+B",
    "[3, 1, 2] | sort | join('<')": "1<2<3",
    "'x' * 3": "xxx",
    "'%s=%03d' % ('a', 7)": "a=007",
    "'%5.1f' | format(2.25)": "  2.2",
    "2 ** 10 % 1000": "24",
    "7 // 2 - 1.5": "1.5",
    "{'b': 1, 'a': [none, true]} | tojson": '{"b": 1, "a": [null, true]}',
    "[1, 'é'] | tojson(indent=1)": '[\n 1,\n "é"\n]',
    "{'b': 1, 'a': 2} | dictsort | map('first') | join": "ab",
    "messages[::-1][0].content ~ 1": "Hi1",
    "'a' in 'abc' and 'x' not in ['y', 'a']": "True",
    "1 < 2 < 3 == 3": "True",
    "messages | map(attribute='role') | list": "['user']",
    "messages | selectattr('role', 'equalto', 'user') | list | length": "1",
    "'a</think> b'.split('</think>')[-1].lstrip()": "b",
    "range(3) | reject('odd') | list": "[0, 2]",
    "unknown | default('d')": "d",
    "unknown": "",
    "none": "None",
    "'a\\nb' | indent(2)": "a\n  b",
    "2.567 | round(1)": "2.6",
    "', '.join(messages | map(attribute='content'))": "Hi",
    "{'a': 1}.items() | list": "[('a', 1)]",
    "{'a': 1}.get('b', 2)": "2",
    "dict(a=1, b=2)['b']": "2",
    "strftime_now('%d %b %Y')": "26 Jul 2024",
    "('a' | safe) + '<'": "a&lt;",
    "namespace(a=1).a": "1",
    "[1, 2][5] is undefined": "True",
    "messages[0].content[:1]": "H",
}


@pytest.mark.parametrize("expression", ALIKE, ids=range(len(ALIKE)))  # "::" in a name would cut it
def test_vocabulary_does_what_jinja_does(expression: str) -> None:
    """Paying for a word changes nothing of what it comes to, in each of 31 expressions."""
    assert shows(expression) == ALIKE[expression]


def test_refusal_names_the_line() -> None:
    """What is refused is named with the line it stands in, in a macro and behind line breaks that Jinja drops too."""
    source = "{%- macro f(x) -%}\n\n{{- x.__class__ -}}\n{%- endmacro -%}\n{#- note\n -#}\n{{ f(1) }}"
    assert "line 3: it reads the attribute '__class__' of a int" in refusal(source).message
    assert "line 2: it uses the tag or expression Include" in refusal("\n{% include 'x' %}").message
    assert "line 4: division by zero" in refusal(SHOWN + "\n\n\n{{ 1 / 0 }}").message
