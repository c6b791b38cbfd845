"""Rendered rows as stretches of text, to hold against what somebody wrote out by hand."""

from collections.abc import Iterable

from finetune.records import Conversation, Message, Rendered


def talk(*turns: str) -> Conversation:
    """A conversation from `role:text` words."""
    return Conversation(tuple(Message(*turn.split(":", 1)) for turn in turns), "rows.jsonl:7")


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
