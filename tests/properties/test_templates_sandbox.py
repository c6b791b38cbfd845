"""Laws of templates from anywhere: sound ones become what they say, hostile and broken ones are refused in time."""

import time
import tracemalloc
from functools import cache

import pytest
from hypothesis import example, given
from jinja2.filters import FILTERS
from jinja2.tests import TESTS

from finetune.errors import TemplateError
from finetune.records import Conversation
from finetune.templates import sandbox
from finetune.templates.budget import MAX_DEPTH, MAX_NESTING, STEP, Meter, UnsafeTemplateError, allowance, weight
from finetune.templates.catalog import TemplateSource
from finetune.templates.render import ChatTemplate
from finetune.templates.sandbox import MAX_TEMPLATE_CHARS, compile_template
from finetune.templates.vocabulary import DICT_METHODS, FILTER_TABLE, STRING_METHODS, TEST_TABLE
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
from properties.rendered_text import joined, stretches, talk

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
    """P-MASK, P-TMPL, P-PREFIX: any sound template's text is the one written out by hand, by character spans each
    answer with its stop is trained and nothing else, and the prompt for an answer is what stands before it.
    """  # fmt: skip
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


X1000 = "{% set x = messages[0].content %}{% set d = {'a': x} %}{% set l = [x] * 9 %}"
PAID = {
    "rounds": ("{% for i in range(1000) %}{{ 1 }}{% endfor %}", 1000 * 3 * STEP),
    "filtered rounds": ("{% for i in range(1000) if false %}{% endfor %}", 1000 * STEP),
    "text in a round": ("{% for i in range(9) %}" + "y" * 1000 + "{% endfor %}", 9000),
    "macro": ("{% macro f() %}" + "{% set y = 1 %}" * 100 + "{% endmacro %}{{ f() ~ f() }}", 600 * STEP),
    "caller": ("{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}" + "{{ 1 }}" * 100 + "{% endcall %}", 200 * STEP),
    "shown": (X1000 + "{{ x }}", 1000), "list shown": (X1000 + "{{ l }}", 18_000), "joined": (X1000 + "{{ x ~ x }}", 4000),
    "sum": (X1000 + "{% set y = x + x %}", 2000), "product": (X1000 + "{% set y = x * 9 %}", 9000),
    "list sum": ("{% set l = [1] * 500 + [1] * 500 %}", 2000 * STEP), "format": (X1000 + "{% set y = '%s' % x %}", 2000),
    "slice": (X1000 + "{% set y = x[1:] %}", 999), "equal": (X1000 + "{% set y = x == x %}", 1000),
    "in": (X1000 + "{% set y = x in x %}", 9000), "known in": (X1000 + "{% set y = 'a' in x %}", 1000),
    "key": (X1000 + "{% set y = {x: 1} %}", 1000), "get": (X1000 + "{% set y = d.get(x) %}", 1000),
    "method": (X1000 + "{% set y = x.strip() %}", 2000), "search": (X1000 + "{% set y = x.rfind(x) %}", 1000 * 125),
    "split": (X1000 + "{% set y = x.split('x') %}", 1000 * STEP), "filter": (X1000 + "{% set y = x | upper %}", 2000),
    "list": (X1000 + "{% set y = x | list %}", 1000 * STEP), "stream": ("{% set y = range(999) | map('string') %}", 999 * 2 * STEP),
    "sort": (X1000 + "{% set y = l | sort %}", 9000 * 4), "test": (X1000 + "{% set y = x is eq(x) %}", 2000),
    "json": (X1000 + "{% set y = l | tojson %}", 18_000), "join": (X1000 + "{% set y = l | join(x) %}", 27_000),
    "replace": (X1000 + "{% set y = x | replace('x', 'yy') %}", 3000), "dict": (X1000 + "{% set y = dict(a=x) %}", 1000),
}  # fmt: skip


@pytest.mark.parametrize("case", PAID)
def test_work_is_paid_for(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 32 pieces of work costs at least what it goes through and makes, and at most twenty times that."""
    assert len(PAID) == 32
    meters: list[Meter] = []
    monkeypatch.setattr(sandbox, "Meter", lambda allowed: meters.append(Meter(allowed)) or meters[-1])
    source, least = PAID[case]
    compile_template("any.jinja", source)(messages=[{"role": "user", "content": "x" * 1000}])
    assert least <= meters[0].spent <= 20 * least


def test_every_attack_is_refused_before_memory_is_taken() -> None:
    """Each of 132 attacks in one expression, sized 100,000,000, is refused for what it is within 16 MB."""
    attacks = every_attack()
    assert len(attacks) == 132
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
    """P-SAFE: a template that reaches for Python or for endless work is refused, with the line and what it did."""
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
_SHARE = "{% set ns = namespace(x=('a',)) %}{% for i in range(50) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
_MANY = "{% for i in range(60000) %}X{% endfor %}" * 9
EXTREMES = {
    "loops": "{% for i in range(9999) %}" * 15 + "{% endfor %}" * 15,
    "filtered loops": "{% for i in range(60000) if false %}{% endfor %}" * 99,
    "long body": "{% for i in range(60000) %}" + "x" * 49_000 + "{% endfor %}",
    "wide body": "{% for i in range(60000) %}" + "{{ i }}" * 500 + "{% endfor %}",
    "macro body": "{% macro f() %}" + "{% set x = 1 %}" * 500 + "{% endmacro %}" + _MANY.replace("X", "{{ f() }}"),
    "caller": "{% macro f() %}" + _MANY.replace("X", "{{ caller() }}") + "{% endmacro %}{% call f() %}"
    + "x" * 9000 + "{% endcall %}",
    "tree of macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(39) }}",
    "doubling": _GROW.replace("20", "99").replace("+", "~"),
    "slices": _GROW + _MANY.replace("X", "{% set y = ns.x[1:] %}"),
    "searches": _GROW + _MANY.replace("X", "{% set y = 'b' in ns.x %}"),
    "comparisons": _GROW + "{% set z = ns.x ~ '' %}" + _MANY.replace("X", "{% set y = z == ns.x %}"),
    "strips": _GROW + _MANY.replace("X", "{% set y = ns.x.strip() %}"),
    "far search": _GROW + "{{ ns.x.rfind('b' ~ ns.x[9:]) }}",
    "elements": _GROW + "{{ ns.x | list | length }}",
    "wide elements": "{{ ('資料庫' * 9999) | list | list }}",
    "sorting": "{{ range(60000) | sort | unique | sort | list }}",
    "shown": _SHARE + "{{ ns.x }}",
    "hashed": _SHARE + "{{ {ns.x: 1} }}",
    "compared": _SHARE + "{{ ns.x == ns.x[:] }}",
    "json": _SHARE.replace("50", "15") + "{{ ns.x | tojson(indent=100) }}",
    "nested": "{% set ns = namespace(x=[]) %}" + _MANY.replace("X", "{% set ns.x = [ns.x] %}") + "{{ ns.x }}",
    "namespaces": "{% set ns = namespace(x=0) %}" + _MANY.replace("X", "{% set ns.x = namespace(x=ns.x) %}"),
    "arithmetic": _MANY.replace("X", "{% set y = i * 2 + 1 - 1 // 3 %}"),
    "filters": _MANY.replace("X", "{% set y = i | string | trim | upper | length %}"),
    "methods": _MANY.replace("X", "{% set y = 'a'.strip().split('a') %}"),
    "tests": _MANY.replace("X", "{% set y = i is even and i is in [1] %}"),
    "streams": _MANY.replace("X", "{% set y = range(9) | map('string') | select('in', 'abc') | list %}"),
}  # fmt: skip
TOO_LONG = {
    "deep": "{{ " + "not " * 20_000, "brackets": "{{ " + "[" * 60_000,
    "openings": "{{-" * 30_000, "digits": "{{ " + "9" * 60_000, "conditions": "{% if a %}" + "{% elif b %}" * 8000,
}  # fmt: skip
CLOSED = {"conditions": "{% endif %}", "brackets": "", "openings": ""}


@pytest.mark.parametrize("case", EXTREMES)
def test_most_expensive_attacks_end_soon(case: str) -> None:
    """Each of 27 attacks ends within 5 seconds, for the work that it does; most take a twentieth of one."""
    assert len(EXTREMES) == 27
    start = time.perf_counter()
    error = refusal(EXTREMES[case])
    assert time.perf_counter() - start < 5
    assert "more work" in error.message or "nests" in error.message


@pytest.mark.parametrize("case", ["doubling", "elements", "wide elements", "long body", "json"])
def test_most_expensive_attacks_take_little_memory(case: str) -> None:
    """Attacks on memory end within 100 MB, where two short messages are allowed 4 MB of text."""
    tracemalloc.start()
    try:
        refusal(EXTREMES[case])
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", TOO_LONG)
def test_attacks_on_the_compiler_end_soon(case: str) -> None:
    """Each of 5 templates, as long as one may be, is refused or stopped within 5 seconds."""
    assert len(TOO_LONG) == 5
    closing = CLOSED.get(case, " }}")
    source = TOO_LONG[case][: MAX_TEMPLATE_CHARS - len(closing)]
    start = time.perf_counter()
    refusal(source.rsplit("{% elif", 1)[0] + closing)
    assert time.perf_counter() - start < 5


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
    "'a-b' | replace('-', '+') | upper": "A+B", "[3, 1, 2] | sort | join('<')": "1<2<3", "'x' * 3": "xxx",
    "'%s=%03d' % ('a', 7)": "a=007", "'%5.1f' | format(2.25)": "  2.2", "2 ** 10 % 1000": "24", "7 // 2 - 1.5": "1.5",
    "{'b': 1, 'a': [none, true]} | tojson": '{"b": 1, "a": [null, true]}',
    "[1, 'é'] | tojson(indent=1)": '[\n 1,\n "é"\n]', "{'b': 1, 'a': 2} | dictsort | map('first') | join": "ab",
    "messages[::-1][0].content ~ 1": "Hi1", "'a' in 'abc' and 'x' not in ['y', 'a']": "True",
    "1 < 2 < 3 == 3": "True", "messages | map(attribute='role') | list": "['user']",
    "messages | selectattr('role', 'equalto', 'user') | list | length": "1",
    "'a</think> b'.split('</think>')[-1].lstrip()": "b", "range(3) | reject('odd') | list": "[0, 2]",
    "unknown | default('d')": "d", "unknown": "", "none": "None", "'a\\nb' | indent(2)": "a\n  b",
    "2.567 | round(1)": "2.6", "', '.join(messages | map(attribute='content'))": "Hi",
    "{'a': 1}.items() | list": "[('a', 1)]", "{'a': 1}.get('b', 2)": "2", "dict(a=1, b=2)['b']": "2",
    "strftime_now('%d %b %Y')": "26 Jul 2024", "('a' | safe) + '<'": "a&lt;", "namespace(a=1).a": "1",
    "[1, 2][5] is undefined": "True", "messages[0].content[:1]": "H",
}  # fmt: skip


@pytest.mark.parametrize("expression", ALIKE)
def test_vocabulary_does_what_jinja_does(expression: str) -> None:
    """Paying for a word changes nothing of what it comes to, in each of 31 expressions."""
    assert len(ALIKE) == 31
    assert shows(expression) == ALIKE[expression]


def test_refusal_names_the_line() -> None:
    """What is refused is named with the line it stands in, in a macro and behind line breaks that Jinja drops too."""
    source = "{%- macro f(x) -%}\n\n{{- x.__class__ -}}\n{%- endmacro -%}\n{#- note\n -#}\n{{ f(1) }}"
    assert "line 3: it reads the attribute '__class__' of a int" in refusal(source).message
    assert "line 2: it uses the tag or expression Include" in refusal("\n{% include 'x' %}").message
    assert "line 4: division by zero" in refusal(SHOWN + "\n\n\n{{ 1 / 0 }}").message


def test_macros_may_call_each_other_so_deep_and_no_deeper() -> None:
    """A macro that calls itself as deep as it may is no attack; one deeper is."""
    source = "{% macro f(n) %}{{ n if n == 0 else f(n - 1) }}{% endmacro %}" + SHOWN + "{{ f(N) }}<|end|>"
    assert chat(source.replace("N", str(MAX_DEPTH - 1))).render_prompt(talk("user:Hi")).text == "Hi<|end|>0<|end|>"
    assert f"more than {MAX_DEPTH} deep" in refusal(source.replace("N", str(MAX_DEPTH))).message


def test_allowance_grows_with_the_messages() -> None:
    """More messages, or longer ones, allow for more work, and a render cannot spend more than it is allowed."""
    few, many = [{"role": "user", "content": "a"}], [{"role": "user", "content": "a"}] * 9
    assert allowance([]) < allowance(few) < allowance(many) < allowance([{"role": "user", "content": "a" * 10**6}])
    meter = Meter(100)
    meter.spend(99)
    meter.afford(1)
    assert meter.spent == 99
    with pytest.raises(UnsafeTemplateError, match="over 100 characters"):
        meter.spend(2)
    assert meter.spent == 99


def test_weight_counts_what_going_through_costs() -> None:
    """A list shared ten times weighs ten times, too much weighs more than the limit, and too deep is refused."""
    inner = ["abc"] * 5
    assert weight([inner] * 10, 10**9) == 10 * weight(inner, 10**9) + weight([], 10**9)
    assert weight([inner] * 10**3, 1000) > 1000
    deep: list[object] = []
    for _ in range(MAX_NESTING):
        deep = [deep]
    with pytest.raises(UnsafeTemplateError, match="deep"):
        weight(deep, 10**9)
    assert weight(deep[0], 10**9) > 0
