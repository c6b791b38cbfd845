"""Conversations, rendered and encoded as the product does it, and spelled out without it; data files of them."""

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from finetune.chat.catalog import CATALOG, TemplateSource
from finetune.chat.encode import mark_rows
from finetune.chat.fit import Encoded, Truncation, fit_rows
from finetune.chat.render import ChatTemplate
from finetune.chat.tokenizer import FileTokenizer
from finetune.records import Conversation, Document, Message, Rendered
from finetune_strategies.conversations import Example
from finetune_strategies.scratch import empty_folder
from finetune_strategies.tokenizers import EOS, KINDS, TokenizerKind, all_control_kinds, tokenizer_folder

NAMES = sorted(CATALOG)
TERMINATOR = {"alpaca": EOS, "chatml": "<|im_end|>", "llama2": EOS, "llama3": "<|eot_id|>"}
TIGHT = TemplateSource(
    "tight.jinja",
    "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
)
"""No white space between markup and text, so that a tokenizer is tempted to merge across the border."""

FULL = all_control_kinds()
FIRST = KINDS[0]


@cache
def tokenizer_of(kind: TokenizerKind) -> FileTokenizer:
    """The product's tokenizer of a folder."""
    return FileTokenizer(tokenizer_folder(kind))


@cache
def template_of(kind: TokenizerKind, name: str) -> ChatTemplate:
    """The template as the product puts it together with a tokenizer."""
    tokenizer = tokenizer_of(kind)
    source = TIGHT if name == "tight" else CATALOG[name]
    return ChatTemplate(source, tokenizer.control_tokens, bos=tokenizer.bos, eos=tokenizer.eos)


def spelled(kind: TokenizerKind, ids: Sequence[int]) -> str:
    """Ids as text, control tokens spelled out: independent of what the product skips."""
    out: list[str] = []
    run: list[int] = []
    for token in [*ids, -1]:
        if 0 <= token < len(kind.control_tokens) or token == -1:
            out.append(tokenizer_of(kind).decode(run))
            out.append(kind.control_tokens[token] if token >= 0 else "")
            run = []
        else:
            run.append(token)
    return "".join(out)


def control_ids(kind: TokenizerKind, ids: Sequence[int]) -> list[str]:
    """The control tokens among the ids."""
    return [kind.control_tokens[token] for token in ids if token < len(kind.control_tokens)]


def said(name: str, conversation: Conversation) -> list[str]:
    """For each answer what the model must learn to say, by the public format."""
    answers = [message.content for message in conversation.messages if message.role == "assistant"]
    if name == "llama2":
        return [f" {answer.strip()} {EOS}" for answer in answers]
    end = TERMINATOR.get(name, EOS)
    return [(answer.strip() if name == "llama3" else answer) + end for answer in answers]


def talk(*turns: str) -> Conversation:
    """A conversation from `role:text` words."""
    return Conversation(tuple(Message(*turn.split(":", 1)) for turn in turns), "rows.jsonl:7")


def encoded(kind: TokenizerKind, rows: list[Rendered], length: int, truncation: Truncation = "drop") -> Encoded:
    """The rows held to a length."""
    return fit_rows(mark_rows(rows, tokenizer_of(kind)), max_length=length, truncation=truncation, dropped={})


def joined(parts: Iterable[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Stretches of trained and untrained text, neighbours of one kind made one."""
    merged: list[tuple[str, bool]] = []
    for text, trained in parts:
        if not text:
            continue
        if merged and merged[-1][1] == trained:
            text = merged.pop()[0] + text
        merged.append((text, trained))
    return merged


def stretches(rendered: Rendered) -> list[tuple[str, bool]]:
    """What a rendered row marks as trained and untrained."""
    return joined([(segment.text, segment.trained) for segment in rendered.segments])


@contextmanager
def data_file(content: bytes, suffix: str) -> Iterator[Path]:
    """A data file with these bytes."""
    with empty_folder() as folder:
        path = folder / f"data{suffix}"
        path.write_bytes(content)
        yield path


def said_by(found: Example) -> tuple[str, ...]:
    """The words of an example, with the roles that say them."""
    if isinstance(found, Document):
        return ("text", found.text)
    return tuple(part for message in found.messages for part in (message.role, message.content))


def lines_of(said: str) -> list[str]:
    """The settings that a refusal names, as a shell reads them."""
    found = re.findall(r"--set ('[^']*'(?:\"'\"'[^']*')*)", said)
    return [shlex.split(line)[0] for line in found]
