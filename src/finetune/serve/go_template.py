"""As much of Go's text/template as our templates for Ollama need: written, read and executed as Go does it.

Strings are bytes, as in Go: `len` counts them and `slice` cuts between any two. What Go would not execute raises here.
Source: https://pkg.go.dev/text/template
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from finetune.errors import TemplateError

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<number>\d+)|(?P<variable>\$\w*)|(?P<field>\.(?:\w+)?)"""
    r"""|(?P<word>\w+)|(?P<sign>:=|[=()]))"""
)
_CLOSED = re.compile(r"\s*\}\}")
_ESCAPE = re.compile(r"\\(u[0-9a-f]{4}|U[0-9a-f]{8}|[\\\"ntr])")
_LETTERS = {"\\": "\\", '"': '"', "n": "\n", "t": "\t", "r": "\r"}
_MAX_DEPTH = 100_000
"""How deep Go lets templates call each other."""

_Token: TypeAlias = tuple[str, str]
"""The kind (a group of `_TOKEN`) and the text."""
_Value: TypeAlias = "bytes | int | Mapping[str, _Value] | Sequence[_Value] | None"


class ExecutionError(Exception):
    """Executing the template failed, as it would in Go."""


@dataclass(slots=True)
class _Scope:
    """What `.` means, and the variables; `$` is what `.` was where the template began."""

    dot: _Value
    variables: dict[str, _Value]


_Expression = Callable[[_Scope], _Value]


# The actions; a body is a tuple of them.
class _Text(NamedTuple):
    text: bytes


class _Show(NamedTuple):
    value: _Expression


class _Assign(NamedTuple):
    variable: str
    value: _Expression


class _If(NamedTuple):
    condition: _Expression
    then: "_Nodes"
    otherwise: "_Nodes"


class _Range(NamedTuple):
    values: _Expression
    body: "_Nodes"


class _Call(NamedTuple):
    template: bytes
    dot: _Expression


_Nodes: TypeAlias = "tuple[_Text | _Show | _Assign | _If | _Range | _Call, ...]"


def quoted(text: str) -> str:
    """The text as a Go string of printable characters."""

    def escaped(character: str) -> str:
        if character in '"\\':
            return "\\" + character
        if character.isprintable():
            return character
        number = ord(character)
        return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"

    return '"' + "".join(map(escaped, text)) + '"'


def literal(text: str) -> str:
    """A template that shows the text: what Go would read as an action, or nobody can see, stands in strings."""
    shown: list[str] = []
    for piece in re.findall(r'[^{"]+|\{+|"+', text):
        # A brace could begin an action together with what follows; two quotes could end the Modelfile's own string.
        plain = piece[0] != "{" and '""' not in piece and all(each.isprintable() or each == "\n" for each in piece)
        shown.append(piece if plain else f"{{{{ {quoted(piece)} }}}}")
    return "".join(shown)


class GoTemplate:
    """A template in Go's language.

    Raises:
        TemplateError: the text is no template, or uses more of the language than is known here.
    """

    def __init__(self, text: str) -> None:
        self._pieces = _tokenize(text)
        self._at = 0
        self._defined: dict[bytes, _Nodes] = {}
        self._body, ending = self._parse_block()
        if ending:
            raise TemplateError(f"the Go template has {ending!r} where nothing was begun")

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render a conversation, each message a `role` and a `content`.

        Raises:
            ExecutionError: the template cannot be executed for these messages.
        """
        turns = [{"Role": each["role"].encode(), "Content": each["content"].encode()} for each in messages]
        dot: _Value = {"Messages": turns}
        shown: list[bytes] = []
        self._run(self._body, _Scope(dot, {"$": dot}), shown, depth=0)
        return b"".join(shown).decode()

    def _parse_block(self) -> tuple[_Nodes, str]:
        """The nodes up to the `end` or `else` that ends them, and that action; "" at the end of the text."""
        nodes: list[_Text | _Show | _Assign | _If | _Range | _Call] = []
        while self._at < len(self._pieces):
            piece = self._pieces[self._at]
            self._at += 1
            if isinstance(piece, bytes):
                nodes.append(_Text(piece))
                continue
            match piece:
                case [("word", "end" | "else"), *_]:
                    return tuple(nodes), " ".join(text for _, text in piece)
                case [("word", "if"), *condition]:
                    nodes.append(self._parse_if(condition))
                case [("word", "range"), *values]:
                    nodes.append(_Range(_parse(values), self._parse_body("range")))
                case [("word", "define"), (_, name)]:
                    self._defined[_unquoted(name)] = self._parse_body("define")
                case [("word", "template"), (_, name), *dot]:
                    nodes.append(_Call(_unquoted(name), _parse(dot)))
                case [("variable", variable), (_, ":=" | "="), *value]:
                    nodes.append(_Assign(variable, _parse(value)))
                case _:
                    nodes.append(_Show(_parse(piece)))
        return tuple(nodes), ""

    def _parse_body(self, word: str) -> _Nodes:
        body, ending = self._parse_block()
        if ending != "end":
            raise TemplateError(f"the Go template does not end a {word}")
        return body

    def _parse_if(self, condition: list[_Token]) -> _If:
        body, ending = self._parse_block()
        otherwise: _Nodes = ()
        if ending.startswith("else if "):
            # One `end` closes the whole chain: the inner `if` takes it.
            again = self._pieces[self._at - 1]
            assert not isinstance(again, bytes)
            return _If(_parse(condition), body, (self._parse_if(again[2:]),))
        if ending == "else":
            otherwise, ending = self._parse_block()
        if ending != "end":
            raise TemplateError("the Go template does not end an if")
        return _If(_parse(condition), body, otherwise)

    def _run(self, nodes: _Nodes, scope: _Scope, shown: list[bytes], *, depth: int) -> None:
        for node in nodes:
            match node:
                case _Text(text):
                    shown.append(text)
                case _Show(value):
                    found = value(scope)
                    assert isinstance(found, bytes)
                    shown.append(found)
                case _Assign(variable, value):
                    scope.variables[variable] = value(scope)
                case _If(condition, then, otherwise):
                    self._run(then if condition(scope) else otherwise, scope, shown, depth=depth)
                case _Range(values, body):
                    found = values(scope)
                    assert isinstance(found, Sequence)
                    for each in found:
                        # Go gives the body a scope of its own, but `=` in it changes the variables around it.
                        self._run(body, _Scope(each, scope.variables), shown, depth=depth)
                case _Call():
                    self._call(node, scope, shown, depth)

    def _call(self, call: _Call, scope: _Scope, shown: list[bytes], depth: int) -> None:
        """Execute another template.

        The derived templates strip a text by calling themselves once for each character, far deeper than Python can
        recurse. A call that is all there is to do is therefore followed in this loop, without another frame.
        """
        for _ in range(depth, _MAX_DEPTH):
            dot = call.dot(scope)
            scope = _Scope(dot, {"$": dot})
            body = self._defined[call.template]
            while len(body) == 1 and isinstance(body[0], _If):
                body = body[0].then if body[0].condition(scope) else body[0].otherwise
            if len(body) != 1 or not isinstance(body[0], _Call):
                self._run(body, scope, shown, depth=depth + 1)
                return
            call = body[0]
        raise ExecutionError("exceeded maximum template depth")


def _tokenize(text: str) -> list[bytes | list[_Token]]:
    """Stretches of text, and actions as their tokens."""
    pieces: list[bytes | list[_Token]] = []
    at = 0
    while (begun := text.find("{{", at)) >= 0:
        if begun > at:
            pieces.append(text[at:begun].encode())
        tokens: list[_Token] = []
        at = begun + 2
        while not (closed := _CLOSED.match(text, at)):
            found = _TOKEN.match(text, at)
            if not found or found.lastgroup is None:
                raise TemplateError(f"the Go template cannot be read at {text[at : at + 40]!r}")
            tokens.append((found.lastgroup, found[found.lastgroup]))
            at = found.end()
        at = closed.end()
        pieces.append(tokens)
    return [*pieces, text[at:].encode()]


def _unquoted(string: str) -> bytes:
    """The value of a Go string."""
    return _ESCAPE.sub(lambda found: _LETTERS.get(found[1]) or chr(int(found[1][1:], 16)), string[1:-1]).encode()


def _parse(tokens: list[_Token]) -> _Expression:
    waiting = list(reversed(tokens))
    expression = _parse_call(waiting)
    if waiting or expression is None:
        raise TemplateError(f"the Go template holds an expression that is none: {' '.join(text for _, text in tokens)}")
    return expression


def _parse_call(waiting: list[_Token]) -> _Expression | None:
    """A function with its arguments, or a single value, up to the parenthesis that closes it; takes from `waiting`."""
    function, values = "", list[_Expression]()
    while waiting:
        kind, text = waiting.pop()
        if (kind, text) == ("sign", ")"):
            break
        if kind == "word":
            if text not in _FUNCTIONS and text not in ("and", "or"):
                raise TemplateError(f"the Go template calls {text!r}, which is not known here")
            function = function or text
        elif (kind, text) == ("sign", "("):
            inner = _parse_call(waiting)
            values += [inner] if inner else []
        else:
            values.append(_operand(kind, text))
    if function in ("and", "or"):
        return lambda scope: _decide(values, scope, until=function == "or")
    if function:
        return lambda scope: _FUNCTIONS[function](*(value(scope) for value in values))
    return values[0] if values else None


def _operand(kind: str, text: str) -> _Expression:
    if kind == "variable":
        return lambda scope: scope.variables[text]
    if kind == "field":
        return lambda scope: scope.dot if text == "." else _field(scope.dot, text[1:])
    value = int(text) if kind == "number" else _unquoted(text)
    return lambda scope: value


def _field(value: _Value, name: str) -> _Value:
    assert isinstance(value, Mapping)
    return value[name]


def _decide(values: Sequence[_Expression], scope: _Scope, *, until: bool) -> _Value:
    """The first value that is true (`or`) or false (`and`), else the last; as in Go, none after it is computed."""
    found: _Value = None
    for value in values:
        found = value(scope)
        if bool(found) is until:
            break
    return found


def _slice(value: bytes, *ends: int) -> bytes:
    if any(not 0 <= end <= len(value) for end in ends) or list(ends) != sorted(ends):
        raise ExecutionError(f"error calling slice: index out of range: {max(ends)}: {value.decode(errors='replace')}")
    return value[slice(*ends)] if len(ends) == 2 else value[ends[0] :]


_FUNCTIONS: dict[str, Callable[..., _Value]] = {
    "eq": lambda value, *others: value in others,
    "ge": lambda left, right: left >= right,
    "len": len,
    "slice": _slice,
}
