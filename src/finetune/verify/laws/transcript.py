"""What a model's own files make of a conversation: its template by jinja2, its tokenizer by its library."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.verify.subjects.answers import TokenRow

END = b"<|im_end|>"
Row = Mapping[str, object]
_NOTHING: Row = {}


class _Marks(Extension):
    """`{% generation %}` marks what is said, and writes nothing."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as an instance variable

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(words: str) -> None:
    raise TemplateError(words)


def written_out(model: Path, messages: Sequence[Row], given: Row = _NOTHING, *, prompt: bool = False) -> str:
    """The text of a conversation, with variables as given, by an environment as in transformers."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Marks])
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    template = environment.from_string((model / "chat_template.jinja").read_text(encoding="utf-8"))
    return template.render(messages=messages, add_generation_prompt=prompt, **given)


def said_of(model: Path, messages: Sequence[Row], given: Row) -> list[str]:
    """What the model says in a conversation: what comes after each prompt, up to the line end that closes a turn."""
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    said = []
    for place in answers:
        prompt = written_out(model, messages[:place], given, prompt=True)
        whole = written_out(model, messages[: place + 1], given)
        assert whole.startswith(prompt)
        said.append(whole[len(prompt) :].removesuffix("\n"))
    return said


def learned_text(words: Mapping[int, bytes], row: TokenRow) -> str:
    """The text of what is learned, but for line ends right behind an answer, which some learn and some do not."""
    found, before = b"", b""
    for token, target in zip(row.ids, row.targets, strict=True):
        word = words.get(token, b"?")
        if target and not (word == b"\n" and before == END):
            found += word
        before = word
    return found.decode(errors="replace")


class OwnTokenizer:
    """A model's tokenizer as its library reads it."""

    def __init__(self, model: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def ids(self, text: str) -> list[int]:
        """The ids of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def ids_of_rest(self, text: str) -> list[int]:
        """The ids of a text that goes on, so that no space is put before it: behind a letter that merges with none."""
        return self.ids("|" + text)[len(self.ids("|")) :]
