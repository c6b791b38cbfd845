"""Chat templates that attack whoever renders them: with Python's insides, or with more work than there is time for."""

from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import strategies as st

from finetune_strategies.picks import between, pick


@dataclass(frozen=True)
class HostileTemplate:
    """A template that attacks whoever renders it: its kind, and words that the refusal must hold."""

    source: str
    kind: str
    says: str


_HUGE = st.sampled_from([10**5, 10**6, 10**8, 10**10, 10**18])
_HIDDEN = ("__class__", "__class__.__mro__", "__init__.__globals__", "__subclasses__()", "__doc__", "__dict__", "_x")
_HOLDERS = (
    "''",
    "messages",
    "messages[0]",
    "namespace",
    "raise_exception",
    "1",
    "(1, 2)",
    "self",
    "unknown",
    "''.strip",
)
_FAR = (
    "''.format_map",
    "''.encode",
    "''.ljust",
    "''.center",
    "''.zfill",
    "''.expandtabs",
    "messages.append",
    "messages.sort",
    "messages[0].update",
    "messages[0].pop",
    "messages[0]['clear']",
    "range.index",
    "(1).bit_length",
    "joiner.__call__",
)
_FILTERS = (
    "attr('__class__')",
    "center({n})",
    "wordwrap(1)",
    "xmlattr",
    "batch(1)",
    "slice({n})",
    "groupby('role')",
    "pprint",
    "random",
    "filesizeformat",
    "urlize",
    "truncate({n})",
    "map('attr', '__class__') | list",
    "sum(start=[])",
    "map('center', {n}) | list",
    "forceescape",
    "striptags",
)
_WIDTHS = (
    "'%{n}d' % 1",
    "'%{n}d' | format(1)",
    "'%.{n}f' % 1",
    "'%*d' % ({n}, 1)",
    "'{{:>{n}}}'.format('')",
    "'{{0.__class__}}'.format('')",
    "'{{!r:>{n}}}'.format('')",
    "'a' | indent({n}000)",
    "[1] | tojson(indent={n})",
    "1 | round({n})",
    "1 | round(-{n}, 'ceil')",
    "'%{n}d' is even",
    "'%{n}d' is divisibleby(3)",
    "strftime_now('%{n}Y')",
    "'a' | round(9, 'floor')",
)
_SIZES = (
    "'{long}' * {n}",
    "{n} * '{long}'",
    "[0] * {n}",
    "(0, 0) * {n}",
    "range(90000 + {n}) | list",
    "range({n}) | map('string') | list",
    "range(90000 + {n}) | reverse | list",
    "range(900) | join('{long}' * 900)",
    "('{long}' * 90) | replace('', '{long}' * 90)",
    "('{long}' * 90).replace('a', '{long}' * 90)",
    "('{{}}' * 900).format('{long}' * 90000)",
    "('{long}' * 900).join(range(900) | map('string'))",
    "[1] | tojson(separators=('{long}' * {n}, ''))",
    "('a\\n' * 900) | indent('{long}' * 900)",
    "('{long}' * 90000).rfind('b' + 'a' * 90000)",
    "('{long}' * 90000).strip('b' * 90000)",
    "(['a'] * 900) | map(attribute='.' * 90000, default='a') | list",
    "range(90000) | sort | sort | length",
)
_NUMBERS = (
    "2 ** {n}",
    "10 ** {n} ** 9",
    "(-3) ** {n}",
    "{n} * 10 ** 18 * 10 ** 18",
    "('9' * 4000) | int",
    "range({n} ** 9)",
    "range(10 ** 19) | list",
)
_GROWING = (
    ("'a'", "ns.x ~ ns.x"),
    ("'a'", "ns.x + ns.x"),
    ("[1]", "ns.x + ns.x"),
    ("'a'", "[ns.x, ns.x] | join"),
    ("'a'", "ns.x | replace('', 'aa')"),
    ("'a'", "'%s%s' % (ns.x, ns.x)"),
    ("'a'", "ns.x * 2"),
    ("'a'", "ns.x.join('aaa')"),
)
_SHOWING = (
    "{x}",
    "{x} ~ ''",
    "{x} | string",
    "{x} | tojson",
    "{x} | join",
    "{x} == {x}[:]",
    "{x} in [{x}[:]]",
    "{x} is eq({x}[:])",
    "[{x}, {x}[:]] | sort",
    "[{x}] | unique | list",
    "'%s' % ({x},)",
    "{{{x}: 1}}",
    "{x} in {{1: 1}}",
    "{{1: 1}}.get({x})",
    "{{1: 1}}[{x}]",
    "raise_exception({x})",
    "{x} | length > 1 and [{x}] | max",
)
_SYNTAX = (
    "{% include 'x' %}",
    "{% import 'x' as x %}",
    "{% from 'x' import y %}",
    "{% extends 'x' %}",
    "{% block x %}{{ self.x() }}{% endblock %}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% autoescape true %}{% endautoescape %}",
    "{{ raise_exception(*range(99)) }}",
    "{{ dict(**messages[0]) }}",
    "{{ 'a' | replace(*messages) }}",
    "{{ 99999999999999999999999 }}",
)

_PLACES = (
    "{{ X }}",
    "{% set x = X %}{{ x }}",
    "{% if X %}{% endif %}{{ X }}",
    "{% for m in messages %}{{ X }}{% endfor %}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(X) }}",
    "{% filter trim %}{{ X }}{% endfilter %}",
    "{% set x %}{{ X }}{% endset %}",
    "{{ '' if false else X }}",
    "{{ messages | length and [X] }}",
    "{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}{{ X }}{% endcall %}",
    "{% with x = X %}{{ x }}{% endwith %}",
)


@st.composite
def _placed(draw: st.DrawFn, expression: st.SearchStrategy[str]) -> str:
    return draw(pick(*_PLACES)).replace("X", f"({draw(expression)})")


@st.composite
def _loops(draw: st.DrawFn) -> str:
    """Loops in loops, of which the innermost runs a million times or more, or whose body is long."""
    rounds = draw(pick((10**9,), (20_000, 20_000), (100, 100, 10_000), (30, 30, 30, 30, 30)))
    body = draw(pick("", "x", "{{ i }}", "{% set y = i + 1 %}", "{{ messages[0].content | trim }}", "{{ f() }}"))
    condition = draw(pick("", " if false", " if i is odd"))
    conditions = [""] * (len(rounds) - 1) + [condition]
    opened = "".join(f"{{% for i in range({n}){only} %}}" for n, only in zip(rounds, conditions, strict=True))
    return f"{{% macro f() %}}{'{{ 1 }}' * 9}{{% endmacro %}}{opened}{body}{'{% endfor %}' * len(rounds)}"


def _growth(pair: tuple[str, str]) -> str:
    start, step = pair
    return f"{{% set ns = namespace(x={start}) %}}{{% for i in range(99) %}}{{% set ns.x = {step} %}}{{% endfor %}}"


@st.composite
def _sharing(draw: st.DrawFn) -> str:
    """A list that holds a list twice, which holds a list twice, and so on: small in memory, endless to go through."""
    pair = draw(pick("(ns.x, ns.x)", "[ns.x, ns.x]", "(ns.x, 1, ns.x)"))
    depth = draw(between(20, 55))
    showing = draw(pick(*_SHOWING)).format(x="ns.x")
    grown = (
        f"{{% set ns = namespace(x=('a',)) %}}{{% for i in range({depth}) %}}{{% set ns.x = {pair} %}}{{% endfor %}}"
    )
    return f"{grown}{{{{ {showing} }}}}"


def _recursion(calls: int) -> str:
    return f"{{% macro f(n) %}}{'{{ f(n + 1) }}' * calls}{{% endmacro %}}{{{{ f(0) }}}}"


def _filled(patterns: tuple[str, ...]) -> st.SearchStrategy[str]:
    return _placed(st.builds(_fill, st.sampled_from(patterns), _HUGE, st.integers(90, 120)))


def _fill(pattern: str, number: int, length: int) -> str:
    return pattern.format(n=number, long="a" * length)


ATTACKS: Mapping[str, tuple[str, st.SearchStrategy[str]]] = {
    "hidden attribute": (
        "it reads the attribute",
        _placed(st.tuples(st.sampled_from(_HOLDERS), st.sampled_from(_HIDDEN)).map(".".join)),
    ),
    "far method": ("it reads the attribute", _placed(st.sampled_from(_FAR))),
    "far filter": ("which is not for chat templates", _filled(tuple(f"messages | {name}" for name in _FILTERS))),
    "width": ("", _filled(_WIDTHS)),
    "size": ("more work", _filled(_SIZES)),
    "number": ("", _filled(_NUMBERS)),
    "loops": ("more work", _loops()),
    "growth": ("more work", st.sampled_from(_GROWING).map(_growth)),
    "sharing": ("", _sharing()),
    "recursion": ("deep", st.integers(1, 3).map(_recursion)),
    "syntax": ("", st.sampled_from(_SYNTAX)),
}
"""What hostile templates try: words of the refusal (none where there are several), and templates that try it."""


def every_attack(number: int = 10**8) -> list[HostileTemplate]:
    """Each attack that is a single expression, once, in the plainest place; sizes are about `number`."""
    single = {
        "hidden attribute": tuple(f"{holder}.{hidden}" for holder in _HOLDERS for hidden in _HIDDEN),
        "far method": _FAR,
        "far filter": tuple(_fill(f"messages | {name}", number, 90) for name in _FILTERS),
        "width": tuple(_fill(pattern, number, 90) for pattern in _WIDTHS),
        "size": tuple(_fill(pattern, number, 90) for pattern in _SIZES),
        "number": tuple(_fill(pattern, number, 90) for pattern in _NUMBERS),
    }
    found = [
        HostileTemplate(f"{{{{ {expression} }}}}", kind, ATTACKS[kind][0])
        for kind, expressions in single.items()
        for expression in expressions
    ]
    return found + [HostileTemplate(source, "syntax", ATTACKS["syntax"][0]) for source in _SYNTAX]


def hostile_templates(kind: str | None = None) -> st.SearchStrategy[HostileTemplate]:
    """Templates that reach for Python, or for more time and memory than there is; of one kind of `ATTACKS`, or any."""
    kinds = [kind] if kind else list(ATTACKS)
    return st.one_of(
        [
            source.map(lambda text, name=name, says=says: HostileTemplate(text, name, says))  # type: ignore[misc]
            for name in kinds
            for says, source in [ATTACKS[name]]
        ]
    )
