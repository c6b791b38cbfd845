"""Reads a Modelfile as Ollama does, character by character; written from its published grammar and nothing of ours.

Source: `parser/parser.go` of Ollama. A value ends at a line break where what came so far is whole: unquoted, or ending
with the quotes it began with. What cannot be printed is left out.
"""

COMMANDS = (
    *("from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message"),
    "requires",
)


class NoModelfileError(Exception):
    """It is none."""


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """The commands and their values, in order; a parameter by its own name."""
    commands: list[tuple[str, str]] = []
    state, name, held = "nothing", "", ""
    for character in text:
        if state == "nothing":
            if character == "#":
                state = "comment"
            elif character not in " \t\r\n":
                state, held = "name", character
        elif state == "comment":
            state = "nothing" if character in "\r\n" else state
        elif state in ("name", "parameter"):
            if character in " \t":
                name, state = _named(held, state)
                held = ""
            elif character.isascii() and (
                character.isalpha() or (state == "parameter" and (character in "_0123456789"))
            ):
                held += character
            else:
                raise NoModelfileError(f"{character!r} in a name")
        elif character in "\r\n" and (value := _unquoted(held.strip())) is not None:
            commands.append((name, value))
            state, held = "nothing", ""
        elif character in " \t\r\n" or character.isprintable():
            held += character
    if state == "value":
        value = _unquoted(held.strip())
        if value is None:
            raise NoModelfileError("a quote has no end")
        commands.append((name, value))
    elif state not in ("nothing", "comment"):
        raise NoModelfileError("it ends within a name")
    return commands


def _named(word: str, state: str) -> tuple[str, str]:
    if state == "parameter":
        return word, "value"
    if word.lower() not in COMMANDS:
        raise NoModelfileError(f"{word!r} is no command")
    return word.lower(), "parameter" if word.lower() == "parameter" else "value"


def _unquoted(held: str) -> str | None:
    for quote in ('"""', '"'):
        if held.startswith(quote):
            whole = len(held) >= 2 * len(quote) and held.endswith(quote)
            return held[len(quote) : -len(quote)] if whole else None
    return held
