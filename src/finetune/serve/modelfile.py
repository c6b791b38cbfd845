"""Ollama's recipe of a model as text, which says what it was given and nothing else.

Ollama reads it character by character: it leaves out what cannot be printed, and ends a value at the first line that
ends with the quotes that the value began with. A value that would not be read back as it is is refused.
Source: `parser/parser.go` of Ollama, and https://docs.ollama.com/modelfile
"""

import re
from dataclasses import dataclass

from finetune.errors import UsageError

Value = str | int | float
_BARE = re.compile(r"[A-Za-z0-9_./:+-]+")
_PARAMETER = re.compile(r"[A-Za-z0-9_]+")
_ENDS_EARLY = re.compile(r'"\s*[\r\n]|\A""')


@dataclass(frozen=True, slots=True)
class Modelfile:
    """What a model of Ollama is made of.

    Attributes:
        source: the GGUF file, or another model, that it is from.
        template: the chat template in Ollama's language; the file's own is taken where it is "".
        system: what stands in front of every conversation; nothing where it is "".
        parameters: names and values, a name as often as it has values.
        licenses: the texts of its licences.
    """

    source: str
    template: str = ""
    system: str = ""
    parameters: tuple[tuple[str, Value], ...] = ()
    licenses: tuple[str, ...] = ()


def write_modelfile(recipe: Modelfile) -> str:
    """The recipe as Ollama reads it.

    Raises:
        UsageError: a value holds what no Modelfile can.
    """
    lines = [f"FROM {quote(recipe.source, 'FROM')}"]
    for name, value in recipe.parameters:
        if not _PARAMETER.fullmatch(name):
            raise UsageError(
                f"a Modelfile cannot hold the parameter {name!r}", hint="names are ASCII letters, digits and _"
            )
        lines.append(f"PARAMETER {name} {quote(str(value), f'PARAMETER {name}')}")
    lines += [f"{word} {quote(text, word)}" for word, text in _texts(recipe)]
    return "\n".join(lines) + "\n"


def _texts(recipe: Modelfile) -> list[tuple[str, str]]:
    named = [("TEMPLATE", recipe.template), ("SYSTEM", recipe.system)]
    return [(word, text) for word, text in named if text] + [("LICENSE", text) for text in recipe.licenses]


def quote(text: str, word: str) -> str:
    """A text in the quotes of a Modelfile; one that would end them, or that nobody can see, is refused."""
    if odd := next((each for each in text if not (each.isprintable() or each in "\t\r\n")), None):
        raise UsageError(
            f"a Modelfile cannot hold the character U+{ord(odd):04X} of {word}: Ollama leaves it out as it reads",
            hint="leave it out, or create the model over Ollama's API, as ft deploy does",
        )
    if _BARE.fullmatch(text):
        return text
    if '"""' not in text:
        return f'"""{text}"""'
    if not _ENDS_EARLY.search(text):
        return f'"{text}"'
    raise UsageError(
        f'a Modelfile cannot hold the text of {word}: it has """ in it and a line that ends with a quote',
        hint="change one of them, or create the model over Ollama's API, as ft deploy does",
    )
