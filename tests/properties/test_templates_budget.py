"""Laws of the account that a template has: all work is paid for, in advance, and real conversations leave room."""

import pytest

from finetune.chat import sandbox
from finetune.chat.budget import MAX_DEPTH, MAX_NESTING, STEP, Meter, UnsafeTemplateError, allowance, weight
from finetune.chat.sandbox import TemplateStoppedError, compile_template

ONE = [{"role": "user", "content": "x" * 1000}]
_X = "{% set x = messages[0].content %}{% set d = {'a': x} %}{% set l = [x] * 9 %}"
_CALLER = "{% macro f() %}{{ caller() }}{% endmacro %}"
PAID = {
    "rounds": ("{% for i in range(1000) %}{{ 1 }}{% endfor %}", 1000 * 3 * STEP),
    "filtered rounds": ("{% for i in range(1000) if false %}{% endfor %}", 1000 * STEP),
    "text in a round": ("{% for i in range(9) %}" + "y" * 1000 + "{% endfor %}", 9000),
    "macro": ("{% macro f() %}" + "{% set y = 1 %}" * 100 + "{% endmacro %}{{ f() ~ f() }}", 600 * STEP),
    "caller": (_CALLER + "{% call f() %}" + "{{ 1 }}" * 100 + "{% endcall %}", 200 * STEP),
    "shown": ("{{ x }}", 1000),
    "list shown": ("{{ l }}", 18_000),
    "joined": ("{{ x ~ x }}", 4000),
    "sum": ("{% set y = x + x %}", 2000),
    "product": ("{% set y = x * 9 %}", 9000),
    "list sum": ("{% set l = [1] * 500 + [1] * 500 %}", 2000 * STEP),
    "format": ("{% set y = '%s' % x %}", 2000),
    "slice": ("{% set y = x[1:] %}", 999),
    "equal": ("{% set y = x == x %}", 1000),
    "in": ("{% set y = x in x %}", 9000),
    "known in": ("{% set y = 'a' in x %}", 1000),
    "key": ("{% set y = {x: 1} %}", 1000),
    "get": ("{% set y = d.get(x) %}", 1000),
    "method": ("{% set y = x.strip() %}", 2000),
    "search": ("{% set y = x.rfind(x) %}", 1000 * 125),
    "split": ("{% set y = x.split('x') %}", 1000 * STEP),
    "filter": ("{% set y = x | upper %}", 2000),
    "list": ("{% set y = x | list %}", 1000 * STEP),
    "stream": ("{% set y = range(999) | map('string') %}", 999 * 2 * STEP),
    "sort": ("{% set y = l | sort %}", 9000 * 4),
    "test": ("{% set y = x is eq(x) %}", 2000),
    "json": ("{% set y = l | tojson %}", 18_000),
    "join": ("{% set y = l | join(x) %}", 27_000),
    "replace": ("{% set y = x | replace('x', 'yy') %}", 3000),
    "dict": ("{% set y = dict([[x, 1]]) %}", 1000),
}


@pytest.mark.parametrize("case", PAID)
def test_work_is_paid_for(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these pieces of work costs at least what it goes through and makes, and at most twenty times that."""
    meters: list[Meter] = []
    monkeypatch.setattr(sandbox, "Meter", lambda *given: meters.append(Meter(*given)) or meters[-1])
    source, least = PAID[case]
    for each in (_X, _X + source):
        compile_template("any.jinja", each)(messages=ONE)
    assert least <= meters[0].left - meters[1].left <= 20 * least


def test_macros_may_call_each_other_so_deep_and_no_deeper() -> None:
    """A macro that calls itself as deep as it may is no attack; one deeper is."""
    source = "{% macro f(n) %}{{ n if n == 0 else f(n - 1) }}{% endmacro %}{{ f(N) }}"
    assert compile_template("any.jinja", source.replace("N", str(MAX_DEPTH - 1)))(messages=ONE) == "0"
    with pytest.raises(TemplateStoppedError, match=f"more than {MAX_DEPTH} deep"):
        compile_template("any.jinja", source.replace("N", str(MAX_DEPTH)))(messages=ONE)


def test_allowance_grows_with_the_messages() -> None:
    """More messages, or longer ones, allow for more work, and a render cannot spend more than it is allowed."""
    few, many = [{"role": "user", "content": "a"}], [{"role": "user", "content": "a"}] * 9
    assert allowance([]) < allowance(few) < allowance(many) < allowance([{"role": "user", "content": "a" * 10**6}])
    meter = Meter(100)
    meter.spend(99)
    meter.afford(1)
    assert meter.left == 1
    with pytest.raises(UnsafeTemplateError, match="over 100 characters"):
        meter.spend(2)
    assert meter.left == 1


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
