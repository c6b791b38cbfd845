"""Reads what a chat begins with: tools and messages, from JSON files of a list each, and variables."""

import json
from pathlib import Path

from finetune.data.messages import messages_of, tools_of, variables_of
from finetune.data.read import load_json, unreadable
from finetune.errors import DataError, UsageError
from finetune.files import meant_file
from finetune.reading import read_bytes
from finetune.records import Message, Row

_EXAMPLE = """--variables '{"enable_thinking": false}'"""
_MOST_BYTES = 2**24
"""Far above what any model can read at once; a file that never ends is not read on."""


def read_tools(path: Path) -> str:
    """The tools of a file, as a row's `tools` column has them.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    found = _read_list(path)
    unnamed = [place for place, tool in enumerate(found) if not _has_name(tool)]
    if unnamed:
        raise UsageError(
            f"{path}[{unnamed[0]}]: {str(found[unnamed[0]])[:60]!r} is no tool, which has a name",
            hint='write {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}',
        )
    try:
        return tools_of(Row({"tools": found}, str(path)))
    except DataError as error:
        raise UsageError(error.message) from None


def read_messages(path: Path) -> tuple[Message, ...]:
    """The messages of a file, as a row's `messages` column has them.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    try:
        return messages_of(Row({"messages": _read_list(path)}, str(path)), "messages")
    except DataError as error:
        raise UsageError(error.message, hint='write {"role": "user", "content": ...}, and so on') from None


def read_variables(text: str) -> str:
    """Variables for the template, as a row's `chat_template_kwargs` has them.

    Raises:
        UsageError: the text is no JSON object.
    """
    try:
        found = load_json(text)
        if not isinstance(found, dict):
            raise DataError(f"{text[:60]!r} is no JSON object")
        return variables_of(Row({"chat_template_kwargs": found}, "--variables"))
    except DataError as error:
        problem = error.message
    except (RecursionError, ValueError) as error:
        problem = f"{text[:60]!r} is no JSON object: {error}"
    raise UsageError(f"--variables: {problem.removeprefix('--variables: ')}", hint=f"write {_EXAMPLE}")


def _has_name(tool: object) -> bool:
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    return isinstance(inner, dict) and isinstance(inner.get("name"), str) and bool(inner["name"].strip())


def _read_list(path: Path) -> list[object]:
    try:
        content = read_bytes(path, _MOST_BYTES)
        found = load_json(content.decode("utf-8").removeprefix("\ufeff"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint=meant_file(path, "name a file")) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise UsageError(f"{path}: {unreadable(error)}") from None
    if not isinstance(found, list):
        raise UsageError(f"{path} must hold a JSON list, found {type(found).__name__}")
    return found
