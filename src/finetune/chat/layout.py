"""Lays conversations out as segments; of those of the same roles, few are rendered, and the others laid out alike."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.chat.catalog import TemplateSource
from finetune.chat.learned import Learned
from finetune.chat.markers import MARKER, is_marked, marker
from finetune.chat.trace import Leaf, Trace, Tracer
from finetune.records import Conversation, Rendered, Segment

_MOST = 4
"""So many ways to lay out conversations of the same roles are kept, such as with and without `<think>` in an answer."""
_TRIES = 8
"""So often a way is sought for them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the text of a message stands between markup."""

    index: int
    role: str
    trained: bool


def lay_out(talk: Conversation, shown: str, learned: Learned) -> tuple[Segment | Place, ...]:
    """Markup and places of texts in turn, cut wherever something changes in what is learned."""
    pieces: list[Segment | Place] = []
    at = 0
    for number, piece in enumerate(MARKER.split(shown)):
        if number % 2:  # the number of a message stands at the odd places
            index = int(piece)
            pieces.append(Place(index, talk.messages[index].role, learned.at(at)))
            at += len(marker(index))
            continue
        pieces += [
            Segment(shown[begin:end], learned.role(begin), trained=learned.at(begin), control=True)
            for begin, end in learned.pieces(at, at + len(piece))
            if begin < end
        ]
        at += len(piece)
    return tuple(pieces)


def fill(pieces: Sequence[Segment | Place], texts: Mapping[int, str], said: re.Pattern[str], where: str) -> Rendered:
    """The texts in their places. In an answer, tokens such as `<think>` are meant: the model must learn to say them."""
    segments: list[Segment] = []
    for piece in pieces:
        if isinstance(piece, Segment):
            segments.append(piece)
        elif text := texts[piece.index]:
            if piece.role == "assistant" and said.search(text):
                segments += _with_tokens(text, said, trained=piece.trained)
            else:
                segments.append(Segment(text, piece.role, piece.trained, control=False))
    return Rendered(tuple(segments), where)


def _with_tokens(text: str, said: re.Pattern[str], *, trained: bool) -> Iterator[Segment]:
    end = 0
    for found in said.finditer(text):
        if end < found.start():
            yield Segment(text[end : found.start()], "assistant", trained=trained, control=False)
        yield Segment(found.group(), "assistant", trained=trained, control=True)
        end = found.end()
    if end < len(text):
        yield Segment(text[end:], "assistant", trained=trained, control=False)


@dataclass(frozen=True, slots=True)
class _Layout:
    pieces: tuple[Segment | Place, ...]
    leaves: Mapping[int, Leaf]
    traces: tuple[Trace, ...]


@dataclass(slots=True)
class _Known:
    """What is known of conversations of the same roles."""

    layouts: list[_Layout] = field(default_factory=list)
    times: int = 0
    """How many of them came that no way to lay out was known for."""


class Layouts:
    """How one template lays out conversations, by their roles and by what it asks of their texts.

    A way is taken from a conversation that was rendered and looked at, and holds where a trace says that the template
    would show the same markup around any texts of which its questions have the same answers. Others are rendered.

    Args:
        source: the template.
        given: its variables for a conversation.
    """

    def __init__(self, source: TemplateSource, given: Callable[[Conversation], Mapping[str, Any]]) -> None:
        self._source, self._given = source, given
        self._tracer: Tracer | None = None
        self._known: dict[tuple[object, ...], _Known] = {}

    def find(self, talk: Conversation, *, asking: bool) -> tuple[Sequence[Segment | Place], Mapping[int, str]] | None:
        """The pieces and the texts of a conversation; None where it must be rendered."""
        kinds = _kinds(talk, asking=asking)
        if kinds is None:
            return None
        known = self._known.get(kinds)
        if known is None:
            known = self._known[kinds] = _Known()
        texts = [message.content for message in talk.messages]
        for layout in known.layouts if all(map(_is_text, texts)) else ():
            if all(trace.holds_for(texts) for trace in layout.traces):
                return layout.pieces, {index: leaf.of(texts) for index, leaf in layout.leaves.items()}
        known.times += 1
        return None

    def keep(
        self,
        talk: Conversation,
        pieces: tuple[Segment | Place, ...],
        shown: tuple[str, Mapping[int, str]],
        asked: tuple[Conversation, str] | None,
    ) -> None:
        """Remember how a conversation was laid out, if others of its roles came before it.

        Args:
            talk: the conversation.
            pieces: how it is laid out.
            shown: the markup around its texts, a marker in place of each, and the texts as they are shown.
            asked: what the last answer is asked with, and the markup of that; None where the conversation itself asks.
        """
        kinds = _kinds(talk, asking=asked is None)
        known = self._known.get(kinds) if kinds else None
        if known is None or not 1 < known.times <= _TRIES or len(known.layouts) == _MOST:
            return
        markup, texts = shown
        traces = [self._follow(talk, markup, asking=asked is None)]
        traces += [self._follow(*asked, asking=True)] if asked and asked[1] else []
        found = [trace for trace in traces if trace]
        leaves = {leaf for trace in found for leaf in trace.parts if isinstance(leaf, Leaf)}
        by_index = {leaf.index: leaf for leaf in leaves}
        contents = [message.content for message in talk.messages]
        alike = {index: leaf.of(contents) for index, leaf in by_index.items()} == texts
        simple = all(leaf.is_simple for leaf in leaves)
        if alike and simple and len(found) == len(traces) and len(by_index) == len(leaves):
            known.layouts.append(_Layout(pieces, by_index, tuple(found)))

    def _follow(self, talk: Conversation, markup: str, *, asking: bool) -> Trace | None:
        """The trace of a conversation, if it shows the same markup as one of markers."""
        self._tracer = self._tracer or Tracer(self._source.name, self._source.jinja)
        texts, hidden = [message.content for message in talk.messages], list(map(is_marked, talk.messages))
        trace = self._tracer.follow({**self._given(talk), "add_generation_prompt": asking}, texts, hidden)
        return trace if trace and trace.shown(lambda leaf: marker(leaf.index)) == markup else None


def _kinds(talk: Conversation, *, asking: bool) -> tuple[object, ...] | None:
    """What the markup of plain messages depends on, beside what a template asks of their texts."""
    if talk.tools or talk.variables:
        return None
    kinds: list[object] = [asking]
    for message in talk.messages:
        if message.more:
            return None
        kinds.append((message.role, bool(message.content), message.trained))
    return tuple(kinds)


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8, as half of a surrogate pair cannot."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
