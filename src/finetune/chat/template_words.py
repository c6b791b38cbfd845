"""The words a chat template may use: filters, tests, methods and global functions, each paying for what it does.

What is not named here is refused, whatever a later Jinja may add. The list holds what the templates of model families
use, and what belongs to it; nothing that pads, repeats, formats dates at will or reaches for attributes.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2.filters import FILTERS
from jinja2.runtime import Undefined
from jinja2.tests import TESTS
from jinja2.utils import Namespace, pass_context

from finetune.chat.budget import CALL, MAX_NUMBER, SHOWN_GROWTH, STEP, Meter, UnsafeTemplateError


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_CHEAP_FILTERS = _words("abs count d default first last length")
_TEXT_FILTERS = _words("capitalize float int lower safe string title trim upper")
_STREAM_FILTERS = _words("items list map reject rejectattr reverse select selectattr")
_SORTING_FILTERS = _words("dictsort max min sort unique")
_CHEAP_TESTS = _words(
    "boolean defined false float integer iterable mapping none number sameas sequence string true undefined"
)
_NUMBER_TESTS = _words("divisibleby even odd")
_COMPARING_TESTS = _words("eq == equalto ne != gt > greaterthan ge >= lt < lessthan le <= in lower upper")
STRING_METHODS = _words(
    "capitalize count endswith find format index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle "
    "isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip title upper"
)
DICT_METHODS = _words("get items keys values")
LOOP_ATTRIBUTES = _words("cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0")
_GROWTH = 3
"""The most that a change of case makes of one character."""
_PRINTF = re.compile(r"%(?:\([A-Za-z0-9_]*\))?[-+ #0]?[0-9]{0,3}(?:\.[0-9]{1,2})?[sdifgx%]|[^%]")
_BRACES = re.compile(r"\{[A-Za-z0-9]{0,20}\}|\{\{|\}\}|[^{}]")
_STRFTIME = re.compile(r"(?:%-?[A-Za-z%]|[^%]){0,200}")


class TemplateRefusedError(Exception):
    """The template itself called `raise_exception`: these messages do not fit it."""


class Helper:
    """A function that templates may call; the only kind besides macros, methods named here, and `loop.cycle`."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


class Method:
    """A method of a text or a dict, to be called and nothing else."""

    __slots__ = ("name", "owner")

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def call(self, meter: Meter, *args: Any, **named: Any) -> Any:
        """Pay, call, and pay for what was made."""
        args = tuple(meter.drawn(each) if hasattr(each, "__next__") else each for each in args)
        if isinstance(self.owner, dict):
            meter.look(args[0] if args else None)
        elif self.name == "format":
            args, named = _pay_for_format(meter, self.owner, args, named)
        elif self.name == "join":
            _pay_for_join(meter, self.owner, args[0] if args else ())
        elif self.name == "replace" and len(args) > 1:
            _pay_for_replace(meter, self.owner, meter.shown(args[0]), meter.shown(args[1]))
        else:
            _pay_for_search(meter, self.owner, [*args, *named.values()])
        return meter.keep(getattr(self.owner, self.name)(*args, **named))


def _pay_for_search(meter: Meter, text: str, args: list[object]) -> None:
    """To search for a text, or to strip letters, takes longer, the more of them there are."""
    sought = max((len(arg) for arg in args if isinstance(arg, str)), default=0)
    meter.spend(len(text) * (1 + sought // 8) + sum(meter.look(arg) for arg in args))
    meter.afford(_GROWTH * len(text))


def _pay_for_format(
    meter: Meter, text: str, args: Sequence[Any], named: Mapping[str, Any]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The values as texts; fields that reach into a value, or say how wide it is shown, are refused."""
    if _BRACES.sub("", text):
        raise UnsafeTemplateError("it formats text with fields that are not for chat templates")
    values = tuple(meter.shown(each) for each in args)
    by_name = {name: meter.shown(each) for name, each in named.items()}
    longest = max((len(each) for each in (*values, *by_name.values())), default=0)
    meter.afford(len(text) + text.count("{") * longest)
    return values, by_name


def _pay_for_join(meter: Meter, separator: object, parts: object) -> None:
    count = len(parts) if isinstance(parts, list | tuple | str | dict | range) else 0
    meter.afford(SHOWN_GROWTH * meter.look(parts) + count * meter.look(separator))


def _pay_for_replace(meter: Meter, text: str, old: str, new: str) -> None:
    _pay_for_search(meter, text, [old])
    found = text.count(old)
    meter.afford(len(text) + found * len(new))


def _pay_for_elements(meter: Meter, name: str, value: object, extras: list[object]) -> None:
    """Each element is gone through with the filter's arguments; a path of attributes is a step at each dot."""
    count = len(value) if hasattr(value, "__len__") else 1
    meter.afford(STEP * count)
    for extra in extras:
        path = extra.count(".") + extra.count(",") if isinstance(extra, str) else 0
        meter.spend(count * (meter.look(extra) + CALL * path))
    if name in _SORTING_FILTERS:
        # To sort, each element is compared with as many others as their number has binary digits.
        meter.look(value, count.bit_length() + 1)


def _filter(name: str) -> Callable[..., Any]:
    """Jinja's own filter of this name, paying for what it goes through and makes."""
    function: Any = FILTERS[name]
    kind = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

    @pass_context
    def paying(context: Any, value: Any, *args: Any, **named: Any) -> Any:
        meter: Meter = context.meter
        meter.spend(CALL)
        extras = [*args, *named.values()]
        if name in _TEXT_FILTERS:
            _pay_for_search(meter, meter.shown(value), extras)
        elif name not in _CHEAP_FILTERS:
            value = meter.drawn(value) if hasattr(value, "__next__") else value
            _pay_for_elements(meter, name, value, extras)
        given = {"context": [context], "eval_context": [context.eval_ctx], "environment": [context.environment]}
        made = function(*given.get(kind, []), value, *args, **named)
        return made if name in _CHEAP_FILTERS else meter.keep(made)

    return paying


def _test(name: str) -> Any:
    """Jinja's own test of this name, paying for what it compares."""
    function: Any = TESTS[name]
    if name in _CHEAP_TESTS:
        return function

    @pass_context
    def paying(context: Any, value: object, *args: object) -> Any:
        if name in _NUMBER_TESTS:
            _number(value)
        for each in (value, *args):
            context.meter.look(each, 8 if name == "in" else 1)
        return function(value, *args)

    return paying


@pass_context
def _join(context: Any, value: object, d: Any = "", attribute: Any = None) -> Any:
    meter: Meter = context.meter
    meter.spend(CALL)
    parts = meter.drawn(value) if hasattr(value, "__next__") else value
    _pay_for_elements(meter, "join", parts, [attribute])
    _pay_for_join(meter, d, parts)
    return meter.keep(FILTERS["join"](context.eval_ctx, parts, d, attribute))


@pass_context
def _replace(context: Any, s: Any, old: Any, new: Any, count: Any = None) -> Any:
    meter: Meter = context.meter
    meter.spend(CALL)
    _pay_for_replace(meter, meter.shown(s), meter.shown(old), meter.shown(new))
    return meter.keep(FILTERS["replace"](context.eval_ctx, s, old, new, count))


@pass_context
def _indent(context: Any, s: object, width: object = 4, first: object = False, blank: object = False) -> Any:  # noqa: FBT002
    meter: Meter = context.meter
    meter.spend(CALL)
    added = width if isinstance(width, int) else meter.look(width)
    meter.afford(meter.look(s) + (meter.shown(s).count("\n") + 2) * added)
    return meter.keep(FILTERS["indent"](s, width, first, blank))


@pass_context
def _round(context: Any, value: Any, precision: Any = 0, method: Any = "common") -> Any:
    return context.meter.keep(FILTERS["round"](_number(value), _small(precision, 20), method))


@pass_context
def _format(context: Any, value: Any, *args: Any, **named: Any) -> Any:
    meter: Meter = context.meter
    meter.spend(CALL)
    return printf(meter, value, named or args)


@pass_context
def _tojson(context: Any, x: Any, ensure_ascii: Any = False, indent: Any = None, **more: Any) -> Any:  # noqa: FBT002
    """JSON as transformers writes it, which is not as Jinja does: nothing is escaped for HTML."""
    meter: Meter = context.meter
    meter.spend(CALL)
    width = 0 if indent is None else _small(indent, 100) if isinstance(indent, int) else meter.look(indent)
    width += sum(meter.look(each) for each in more.values())
    meter.afford(SHOWN_GROWTH * meter.look(x, indent=width))
    if unknown := set(more) - {"separators", "sort_keys"}:
        raise UnsafeTemplateError(f"it calls a filter with {', '.join(sorted(unknown))}, which it does not take")
    return meter.keep(json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, **more))


def printf(meter: Meter, template: str, values: object) -> Any:
    """`template % values`, where no field is wider than three digits say."""
    meter.look(template)
    if not isinstance(template, str) or _PRINTF.sub("", template):
        raise UnsafeTemplateError("it formats text with fields that are not for chat templates")
    # A field of two to five characters makes at most 999, besides its value.
    meter.afford(250 * len(template) + SHOWN_GROWTH * meter.look(values))
    return meter.keep(template % values)


def _number(value: object) -> Any:
    if isinstance(value, int | float | Undefined):
        return value
    raise UnsafeTemplateError(f"it calculates with a {type(value).__name__}")


def _small(value: object, most: int) -> int:
    if not isinstance(value, int) or not -most <= value <= most:
        raise UnsafeTemplateError(f"it asks for a width or precision beyond {most}")
    return value


def _range(meter: Meter, *bounds: int) -> range:
    for bound in bounds:
        meter.look(bound)
        if isinstance(bound, int) and abs(bound) > MAX_NUMBER // 4:
            raise UnsafeTemplateError("it counts beyond 62 bits")
    return range(*bounds)


def _dict(meter: Meter, source: Any = (), /, **values: Any) -> Any:
    meter.spend(CALL)
    meter.look(source)
    return meter.keep(dict(source, **values))


def _namespace(meter: Meter, source: object = (), /, **values: object) -> Namespace:
    return Namespace(_dict(meter, source, **values))


def _strftime(meter: Meter, form: str) -> str:
    if not isinstance(form, str) or not _STRFTIME.fullmatch(form):
        raise UnsafeTemplateError("it formats the date with more than letters")
    return str(meter.keep(meter.today.strftime(form)))


def _refuse(meter: Meter, message: object = "") -> None:
    raise TemplateRefusedError(meter.shown(message)[:1000])


def _forbidden(kind: str, name: str) -> Callable[..., Any]:
    def refuse(*args: object, **named: object) -> Any:
        raise UnsafeTemplateError(f"it uses the {kind} {name!r}, which is not for chat templates")

    return refuse


FILTER_TABLE: dict[str, Callable[..., Any]] = {
    **{name: _forbidden("filter", name) for name in FILTERS},
    **{name: _filter(name) for name in (*_CHEAP_FILTERS, *_TEXT_FILTERS, *_STREAM_FILTERS, *_SORTING_FILTERS)},
    "join": _join,
    "replace": _replace,
    "indent": _indent,
    "round": _round,
    "format": _format,
    "tojson": _tojson,
}
TEST_TABLE: dict[str, Callable[..., Any]] = {
    **{name: _forbidden("test", name) for name in TESTS},
    **{name: _test(name) for name in (*_CHEAP_TESTS, *_NUMBER_TESTS, *_COMPARING_TESTS)},
}
GLOBAL_TABLE = {
    "range": Helper(_range),
    "namespace": Helper(_namespace),
    "dict": Helper(_dict),
    "raise_exception": Helper(_refuse),
    "strftime_now": Helper(_strftime),
}
