"""Data files on disk, and what the examples read from them say."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.records import Document
from finetune_strategies.conversations import Example
from finetune_strategies.scratch import empty_folder


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
