"""As much of Go's text/template as our templates for Ollama need: written, read and executed as Go does it.

Strings are bytes, as in Go: `len` counts them and `slice` cuts between any two. What Go would not execute raises here.
Source: https://pkg.go.dev/text/template
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.errors import TemplateError

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<number>\d+)|(?P<variable>\$\w*)|(?P<field>\.(?:\w+)?)"""
    r"""|(?P<word>\w+)|(?P<sign>:=|[=()]))"""
)
_CLOSED = re.compile(r"\s*\}\}")
_ESCAPE = re.compile(r"\\(u[0-9a-f]{4}|U[0-9a-f]{8}|[\\\"ntr])")
_LETTERS = {"\\": "\\", '"': '"', "n": "\n", "t": "\t", "r": "\r"}
_TRIES = 100_000
"""How deep Go lets templates call each other."""


class ExecutionError(Exception):
    """Executing the template failed, as it would in Go."""


@dataclass(frozen=True, slots=True)
class _Node:
    """Text to show, or what an action does: its word, its expressions, and the bodies that belong to it."""

    word: str
    given: Any = None
    bodies: tuple[tuple["_Node", ...], ...] = ()


def quoted(text: str) -> str:
    """A text as a string of Go, in characters that can be printed."""
    return '"' + "".join(map(_escaped, text)) + '"'


def literal(text: str) -> str:
    """A text as a template that shows it: what Go would read as an action, or nobody can see, stands in strings."""
    pieces = re.findall(r'[^{"]+|\{+|"+', text)
    shown: list[str] = []
    for piece in pieces:
        plain = piece[0] != "{" and '""' not in piece and all(each.isprintable() or each == "\n" for each in piece)
        shown.append(piece if plain else f"{{{{ {quoted(piece)} }}}}")
    return "".join(shown)


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


class GoTemplate:
    """A template in Go's language.

    Raises:
        TemplateError: it is none, or uses more of the language than is known here.
    """

    def __init__(self, text: str) -> None:
        self._pieces = _cut(text)
        self._at = 0
        self._defined: dict[bytes, tuple[_Node, ...]] = {}
        self._body, ended = self._block()
        if ended:
            raise TemplateError(f"the Go template has {ended!r} where nothing was begun")

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """What it makes of a conversation, each message a `role` and a `content`.

        Raises:
            ExecutionError: it cannot be executed for these messages.
        """
        turns = [{"Role": each["role"].encode(), "Content": each["content"].encode()} for each in messages]
        shown: list[bytes] = []
        dot: dict[str, Any] = {"Messages": turns}
        self._run(self._body, dot, {"$": dot}, shown, depth=0)
        return b"".join(shown).decode()

    def _block(self) -> tuple[tuple[_Node, ...], str]:
        """The nodes up to the action that ends them, and that action; empty at the end of the text."""
        nodes: list[_Node] = []
        while self._at < len(self._pieces):
            kind, tokens = self._pieces[self._at]
            self._at += 1
            if kind == "text":
                nodes.append(_Node("text", tokens))
                continue
            word = tokens[0][1] if tokens and tokens[0][0] == "word" else ""
            if word in ("end", "else"):
                return tuple(nodes), " ".join(text for _, text in tokens)
            nodes.append(self._action(word, tokens))
        return tuple(nodes), ""

    def _action(self, word: str, tokens: list[tuple[str, str]]) -> _Node:
        if word == "if":
            return self._branches(tokens[1:])
        if word in ("range", "define"):
            body, ended = self._block()
            if ended != "end":
                raise TemplateError(f"the Go template does not end a {word}")
            if word == "range":
                return _Node(word, _parse(tokens[1:]), (body,))
            self._defined[_text(tokens[1][1])] = body
            return _Node("text", b"")
        if word == "template":
            return _Node(word, (_text(tokens[1][1]), _parse(tokens[2:])))
        if len(tokens) > 2 and tokens[0][0] == "variable" and tokens[1][1] in (":=", "="):
            return _Node("assign", (tokens[0][1], _parse(tokens[2:])))
        return _Node("show", _parse(tokens))

    def _branches(self, condition: list[tuple[str, str]]) -> _Node:
        body, ended = self._block()
        otherwise: tuple[_Node, ...] = ()
        if ended.startswith("else if "):
            _, again = self._pieces[self._at - 1]
            otherwise = (self._branches(again[2:]),)
        elif ended == "else":
            otherwise, ended = self._block()
        if not otherwise and ended != "end":
            raise TemplateError("the Go template does not end an if")
        return _Node("if", _parse(condition), (body, otherwise))

    def _run(
        self, nodes: tuple[_Node, ...], dot: Any, names: dict[str, Any], shown: list[bytes], *, depth: int
    ) -> None:
        for node in nodes:
            if node.word == "text":
                shown.append(node.given)
            elif node.word == "show":
                shown.append(_value(node.given, dot, names))
            elif node.word == "assign":
                name, expression = node.given
                names[name] = _value(expression, dot, names)
            elif node.word == "if":
                body = node.bodies[0] if _value(node.given, dot, names) else node.bodies[1]
                self._run(body, dot, names, shown, depth=depth)
            elif node.word == "range":
                for each in _value(node.given, dot, names):
                    self._run(node.bodies[0], each, names, shown, depth=depth)
            else:
                self._call(node, dot, names, shown, depth)

    def _call(self, node: _Node, dot: Any, names: dict[str, Any], shown: list[bytes], depth: int) -> None:
        """Execute another template; one that ends by calling another takes no more room of Python's."""
        name, expression = node.given
        for _ in range(depth, _TRIES):
            dot = _value(expression, dot, names)
            names = {"$": dot}
            chosen = _chosen(self._defined[name], dot)
            if chosen is None:
                self._run(self._defined[name], dot, names, shown, depth=depth + 1)
                return
            name, expression = chosen.given
        raise ExecutionError("exceeded maximum template depth")


def _chosen(body: tuple[_Node, ...], dot: Any) -> _Node | None:
    """The call that is all a body comes to; None where it does anything else."""
    while len(body) == 1 and body[0].word == "if":
        body = body[0].bodies[0] if _value(body[0].given, dot, {"$": dot}) else body[0].bodies[1]
    return body[0] if len(body) == 1 and body[0].word == "template" else None


def _cut(text: str) -> list[tuple[str, Any]]:
    """Stretches of text, and actions as their tokens."""
    pieces: list[tuple[str, Any]] = []
    at = 0
    while (begun := text.find("{{", at)) >= 0:
        if begun > at:
            pieces.append(("text", text[at:begun].encode()))
        tokens: list[tuple[str, str]] = []
        at = begun + 2
        while not (closed := _CLOSED.match(text, at)):
            found = _TOKEN.match(text, at)
            if not found or found.lastgroup is None:
                raise TemplateError(f"the Go template cannot be read at {text[at : at + 40]!r}")
            tokens.append((found.lastgroup, found[found.lastgroup]))
            at = found.end()
        at = closed.end()
        pieces.append(("action", tokens))
    return [*pieces, ("text", text[at:].encode())]


def _text(string: str) -> bytes:
    """What a string of Go means."""

    def meant(found: re.Match[str]) -> str:
        return _LETTERS.get(found[1]) or chr(int(found[1][1:], 16))

    return _ESCAPE.sub(meant, string[1:-1]).encode()


def _parse(tokens: list[tuple[str, str]]) -> Any:
    """An expression: what each of its words stands for; a list is a call, its first element the function."""
    waiting = list(reversed(tokens))
    parsed = _operands(waiting)
    if waiting or not parsed:
        raise TemplateError(f"the Go template holds an expression that is none: {' '.join(text for _, text in tokens)}")
    return parsed if isinstance(parsed[0], str) else parsed[0]


def _operands(waiting: list[tuple[str, str]]) -> list[Any]:
    found: list[Any] = []
    while waiting:
        kind, text = waiting.pop()
        if text == ")" and kind == "sign":
            break
        if text == "(" and kind == "sign":
            inner = _operands(waiting)
            found.append(inner if isinstance(inner[0], str) else inner[0])
        elif kind == "word":
            if text not in _FUNCTIONS and text not in ("and", "or"):
                raise TemplateError(f"the Go template calls {text!r}, which is not known here")
            found.append(text)
        else:
            found.append((kind, int(text) if kind == "number" else _text(text) if kind == "string" else text))
    return found


def _value(expression: Any, dot: Any, names: Mapping[str, Any]) -> Any:
    if isinstance(expression, list):
        name, *given = expression
        if name in ("and", "or"):
            value: Any = None
            for each in given:  # Go stops at the first that decides
                value = _value(each, dot, names)
                if bool(value) is (name == "or"):
                    break
            return value
        return _FUNCTIONS[name](*(_value(each, dot, names) for each in given))
    kind, text = expression
    if kind == "variable":
        return names[text]
    if kind == "field":
        return dot if text == "." else dot[text[1:]]
    return text


def _slice(value: bytes, *ends: int) -> bytes:
    if any(not 0 <= end <= len(value) for end in ends) or list(ends) != sorted(ends):
        raise ExecutionError(f"error calling slice: index out of range: {max(ends)}: {value.decode(errors='replace')}")
    return value[slice(*ends)] if len(ends) == 2 else value[ends[0] :]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda value, *others: value in others,
    "ge": lambda left, right: left >= right,
    "len": len,
    "slice": _slice,
}
