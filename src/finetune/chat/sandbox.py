"""Compiles Jinja chat templates in a sandbox: they see plain data, use known words, and pay for every step.

A template may come from anywhere. It can neither reach an attribute nor call a function that is not named in
`vocabulary`, and it is stopped by count, at the same step on every machine, before it takes long or much memory.
"""

from collections.abc import Callable, Iterator, Mapping
from datetime import date
from functools import lru_cache
from types import CodeType
from typing import Any

from jinja2 import Template, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, missing, pass_context

from finetune.chat import template_words as vocabulary
from finetune.chat.budget import CALL, MAX_NUMBER, STEP, Meter, UnsafeTemplateError, allowance
from finetune.chat.rewrite import meter_tree
from finetune.chat.template_words import Helper, Method, TemplateRefusedError
from finetune.config.schema import DAY
from finetune.errors import TemplateError

MAX_TEMPLATE_CHARS = 50_000
"""Of 72 templates in use the longest has 20,000; Jinja takes half a second to compile as many as this."""
_FILE = "<chat template>"
_SAFER = "use a template from a source you trust, or one of alpaca, chatml, llama2, llama3"
_KEYS: Any = str | int | float | None | Undefined
_HOLDERS: Any = str | list | tuple | dict | range
_ESCAPED = 6
"""`&quot;` for one character: adding to a text marked safe escapes the other side."""


class TemplateStoppedError(Exception):
    """Rendering ended early: how, why and in which line of the template; `hint` says how to mend it."""

    def __init__(self, template: Template, error: Exception) -> None:
        line = _line(template, error)
        reason = str(error) or type(error).__name__
        self.hint = (
            "does it need a role or field the data lacks, or a variable? template.variables sets it for all rows, "
            "chat_template_kwargs for one"
        )
        if isinstance(error, TemplateRefusedError):
            message = f"refuses these messages: {reason} (line {line})"
            self.hint = "mend the order of roles in this row, or choose another template"
        elif isinstance(error, UnsafeTemplateError):
            message = f"is unsafe and was stopped in line {line}: {reason}"
            self.hint = _SAFER
        else:
            message = f"fails in line {line}: {reason[:1000]}"
        super().__init__(message)


def _line(template: Template, error: Exception) -> int:
    """The line of the template's own text that was being rendered."""
    found, trace = 1, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _FILE:
            found = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return found


_OF_DICTS = frozenset(dir(dict))


class _GenerationTag(Extension):
    """Accepts `{% generation %}...{% endgeneration %}` and keeps its body: our marks come from the segments."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as an instance variable

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Drop the tag, keep what is inside it in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class MeteredContext(Context):
    """The variables of one render, and its account."""

    meter: Meter


@pass_context
def _finalize(context: Any, value: Any) -> str:
    """What a template shows: plain data as text, paid for."""
    if isinstance(value, str):
        context.meter.spend(len(value))
        return value
    text: str = context.meter.shown(value)
    return text


class _Rounds:
    """What a loop goes over: each round pays for the loop's body."""

    def __init__(self, meter: Meter, rounds: Any, cost: int) -> None:
        self._meter, self._rounds, self._cost = meter, rounds, cost

    def __iter__(self) -> Iterator[Any]:
        spend, cost = self._meter.spend, self._cost
        for each in self._rounds:
            spend(cost)
            yield each

    def __len__(self) -> int:
        return len(self._rounds)


def _concatenated(meter: Meter, *parts: object) -> str:
    texts = [meter.shown(part) for part in parts]
    meter.spend(sum(map(len, texts)))
    return "".join(texts)


def _sliced(meter: Meter, value: Any, *bounds: Any) -> Any:
    if isinstance(value, str | list | tuple):
        meter.afford(len(value))
    return meter.keep(value[slice(*bounds)])


def _looked(meter: Meter, value: object, times: int) -> Any:
    meter.look(value, times)
    return value


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja with the words of `vocabulary` and nothing else; `rewrite` names the helpers that are kept here."""

    context_class = MeteredContext
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    counted = Helper(_Rounds)
    step = Helper(Meter.spend)
    concatenated = Helper(_concatenated)
    sliced = Helper(_sliced)
    looked = Helper(_looked)

    def __init__(self) -> None:
        # Without the optimizer, and with a `finalize` that needs a context, nothing is computed while compiling.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_finalize,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        )
        self.filters = dict(vocabulary.FILTER_TABLE)
        self.tests = dict(vocabulary.TEST_TABLE)
        self.globals = dict(vocabulary.GLOBAL_TABLE)

    def getattr(self, obj: object, attribute: str) -> Any:
        """`obj.attribute`, where a method named in the vocabulary comes before an entry of the same name."""
        if type(obj) is dict and attribute[:1] != "_" and attribute not in _OF_DICTS:  # most of what templates read
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        found = self._own(obj, attribute)
        if found is missing and isinstance(obj, dict) and attribute in obj:
            return obj[attribute]
        return self.undefined(obj=obj, name=attribute) if found is missing else found

    def getitem(self, obj: object, argument: object) -> Any:
        """`obj[argument]`, where an entry comes before a method of the same name."""
        if isinstance(obj, Undefined):
            return obj[argument]
        if not isinstance(argument, _KEYS):
            raise UnsafeTemplateError(f"it looks up a {type(argument).__name__}")
        if isinstance(obj, _HOLDERS):
            try:
                return obj[argument]
            except (TypeError, LookupError):
                pass
        found = self._own(obj, argument) if isinstance(argument, str) else missing
        return self.undefined(obj=obj, name=argument) if found is missing else found

    def _own(self, obj: object, name: str) -> Any:
        """What an object itself offers templates under a name; `missing` if it has nothing of the name."""
        if name.startswith("_"):
            if isinstance(obj, dict) and name in obj:
                return obj[name]
            raise UnsafeTemplateError(f"it reads the attribute {name!r} of a {type(obj).__name__}")
        if isinstance(obj, Undefined | Namespace):
            return getattr(obj, name, missing)
        if isinstance(obj, LoopContext) and name in vocabulary.LOOP_ATTRIBUTES:
            return getattr(obj, name)
        methods = vocabulary.STRING_METHODS if isinstance(obj, str) else vocabulary.DICT_METHODS
        if isinstance(obj, str | dict) and name in methods:
            return Method(obj, name)
        if isinstance(obj, str | dict | list | tuple | int | float | None) and not hasattr(obj, name):
            return missing
        raise UnsafeTemplateError(f"it reads the attribute {name[:100]!r} of a {type(obj).__name__}")

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: object) -> Any:  # noqa: N805
        """Call a macro, a method or a function of the vocabulary; nothing else can be called."""
        kwargs.pop("_loop_vars", None)
        kwargs.pop("_block_vars", None)
        meter: Meter = __context.meter
        if isinstance(__obj, Helper):
            return __obj.function(meter, *args, **kwargs)
        meter.spend(CALL)
        if isinstance(__obj, Method):
            return __obj.call(meter, *args, **kwargs)
        if isinstance(__obj, Macro):
            meter.enter()
            try:
                return __obj(*args, **kwargs)
            finally:
                meter.leave()
        if isinstance(__obj, Undefined):
            return __obj()
        if getattr(__obj, "__func__", None) is LoopContext.cycle:
            return __obj(*args)
        raise UnsafeTemplateError(f"it calls a {type(__obj).__name__}")

    def call_binop(self, context: Any, operator: str, left: object, right: object) -> Any:
        """Arithmetic: the size of a result is known, and paid for, before it is made."""
        meter: Meter = context.meter
        if operator == "+" and type(left) is str and type(right) is str:  # most of what templates calculate
            size = len(left) + len(right)
            if _ESCAPED * size > meter.left:
                meter.afford(_ESCAPED * size)
            meter.left -= size
            return left + right
        if isinstance(left, Undefined) or isinstance(right, Undefined):
            return self.binop_table[operator](left, right)
        if operator == "+":
            if isinstance(left, str) and isinstance(right, str):
                meter.afford(_ESCAPED * (len(left) + len(right)))
            elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
                meter.afford(STEP * (len(left) + len(right)))
        elif operator == "%" and isinstance(left, str):
            return vocabulary.printf(meter, left, right)
        elif operator == "*":
            for seq, times in ((left, right), (right, left)):
                if isinstance(seq, str | list | tuple) and isinstance(times, int):
                    meter.afford((len(seq) if isinstance(seq, str) else STEP * len(seq)) * max(times, 0))
        elif not isinstance(left, int | float) or not isinstance(right, int | float):
            raise UnsafeTemplateError(f"it calculates {type(left).__name__} {operator} {type(right).__name__}")
        elif operator == "**" and isinstance(left, int) and abs(left) > 1 and right > MAX_NUMBER.bit_length():
            raise UnsafeTemplateError("it makes a number of more than 64 bits")
        return meter.keep(self.binop_table[operator](left, right))


def variables_read(source: str) -> set[str]:
    """The names that a template reads and does not set itself; none where it does not parse."""
    try:
        return meta.find_undeclared_variables(Sandbox().parse(source))
    except (TemplateSyntaxError, RecursionError, ValueError):
        return set()


@lru_cache(maxsize=32)
def code_of(name: str, source: str) -> CodeType:
    """The template as Python that pays for what it does.

    Raises:
        TemplateError: the template is too large, does not parse, or uses syntax it may not (with the line).
    """
    if len(source) > MAX_TEMPLATE_CHARS:
        raise TemplateError(
            f"template {name!r} has {len(source)} characters, more than {MAX_TEMPLATE_CHARS}", hint=_SAFER
        )
    environment = Sandbox()
    try:
        return environment.compile(meter_tree(environment.parse(source)), filename=_FILE)
    except UnsafeTemplateError as error:
        raise TemplateError(f"template {name!r} is unsafe and was refused: {error}", hint=_SAFER) from None
    except TemplateSyntaxError as error:
        raise TemplateError(
            f"template {name!r} does not parse: line {error.lineno}: {error.message}", hint="mend the Jinja syntax"
        ) from None
    except (RecursionError, MemoryError, SyntaxError) as error:  # too deep for Jinja, or for the Python it writes
        raise TemplateError(
            f"template {name!r} cannot be compiled: {str(error) or type(error).__name__}",
            hint="nest its tags less deeply",
        ) from None
    except ValueError as error:  # a number of more digits than Python reads
        raise TemplateError(f"template {name!r} does not parse: {error}", hint="mend the Jinja syntax") from None


@lru_cache(maxsize=32)
def compile_template(name: str, source: str) -> Callable[..., str]:
    """A function that renders `source` in the sandbox; keyword arguments are the template's variables.

    The function raises TemplateStoppedError when the template refuses, fails, or is unsafe. `messages` is a list of
    dicts of texts; how much work the template may do is reckoned from it. `today` is the day that it prints.

    Raises:
        TemplateError: as `code_of`.
    """
    environment = Sandbox()
    code = code_of(name, source)
    template = Template.from_code(environment, code, environment.make_globals(None))

    def render(*, messages: list[Mapping[str, str]], today: date = DAY, **variables: object) -> str:
        context = template.new_context({"messages": messages, **variables})
        assert isinstance(context, MeteredContext)
        context.meter = Meter(allowance(messages), today)
        try:
            text = "".join(template.root_render_func(context))
            text.encode("utf-8")  # half of a surrogate pair is no text, and no tokenizer takes it
        except Exception as error:  # filters raise whatever Python does with what they are given
            raise TemplateStoppedError(template, error) from None
        return text

    return render
