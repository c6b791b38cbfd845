"""Turns rendered rows into token ids, each with a mark that says what may happen to it."""

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from finetune.chat.tokenizer import FileTokenizer, Spans
from finetune.errors import TemplateError
from finetune.records import Rendered, TokenizedRow

KEPT, REMOVABLE, TRAINED, REACHING = range(4)
"""What a token is: markup that stays, a word of the prompt that a length limit may cut, something to learn, or one that
reaches from a prompt into an earlier answer, which nobody asked so can say: it stays, and is not learned."""

_TOGETHER = 1000
"""Rows handed to the tokenizer at once: enough to keep every core busy, few enough to hold in memory."""


@dataclass(frozen=True, slots=True)
class Marked:
    """A row's token ids, whatever their number, with a mark each; `document`: plain text, not a conversation."""

    ids: tuple[int, ...]
    marks: bytes
    where: str
    document: bool

    def tokenized(self) -> TokenizedRow:
        """The ids with only the *trained* marks."""
        return TokenizedRow(self.ids, tuple(map(TRAINED.__eq__, self.marks)), self.where)

    def __reduce__(self) -> tuple[Any, ...]:
        """In few bytes, for another process."""
        return _from_bytes, (array("I", self.ids).tobytes(), self.marks, self.where, self.document)


def _from_bytes(ids: bytes, marks: bytes, where: str, document: bool) -> Marked:  # noqa: FBT001
    return Marked(tuple(array("I", ids)), marks, where, document)


def encode_row(row: Rendered, tokenizer: FileTokenizer) -> TokenizedRow:
    """Encode one row, whatever its length; see `mark_rows`."""
    return next(mark_rows([row], tokenizer)).tokenized()


def mark_rows(rows: Iterable[Rendered], tokenizer: FileTokenizer) -> Iterator[Marked]:
    """Encode rows as a server does, many at a time, and mark each token.

    A row is encoded as a whole, earlier answers with it, as the history that they are when the last answer is asked
    for. A token may reach across the place where the last answer begins, which no server sends: such a row is the
    prompt's ids, as it is asked with, and then those of the rest: what is asked with always begins what is trained on.
    """
    waiting = iter(rows)
    while some := list(islice(waiting, _TOGETHER)):
        laid = [_lay_out(row, tokenizer) for row in some]
        whole = tokenizer.encode_spans([each.text for each in laid])
        asked = list(dict.fromkeys(each.question for each in laid if each.question))
        questions = dict(zip(asked, tokenizer.encode_spans(asked), strict=True))
        for row, each, encoded in zip(some, laid, whole, strict=True):
            ids, marks = _marked(each, encoded, questions.get(each.question), tokenizer)
            if tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]:
                assert tokenizer.bos_id is not None
                ids.insert(0, tokenizer.bos_id)
                marks = bytes([KEPT]) + marks
            yield Marked(tuple(ids), marks, row.where, is_document(row))


def is_document(row: Rendered) -> bool:
    """Whether the row is plain text, which may be cut anywhere, and not a conversation."""
    return all(segment.role == "text" for segment in row.segments)


@dataclass(frozen=True, slots=True)
class _Laid:
    """A row as one text, in which control tokens that are meant stand by name, with a mark for each stretch of it."""

    text: str
    stretches: list[tuple[int, int]]
    """Where each ends, and its mark."""
    controls: list[tuple[int, int]]
    """Where each control token begins, and its mark."""
    answer: int
    """Where the last answer begins; 0 where there is none."""
    asked: int
    """How many control tokens stand before the last answer."""
    question: str
    """What stands before the last answer, from the last control token on: no token reaches across one of those."""
    where: str


def _lay_out(row: Rendered, tokenizer: FileTokenizer) -> _Laid:
    parts: list[str] = []
    stretches: list[tuple[int, int]] = []
    controls: list[tuple[int, int]] = []
    at = answer = 0
    before = False
    for segment in row.segments:
        text, trained = segment.text, segment.trained
        said = trained and segment.role == "assistant"
        if said and not before:
            answer = at
        before = said
        mark = TRAINED if trained else KEPT if segment.control else REMOVABLE
        if segment.control:
            text, places = tokenizer.by_name(text)
            controls += [(at + place, mark) for place in places]
        parts.append(text)
        at += len(text)
        stretches.append((at, mark))
    whole, asked = "".join(parts), bisect_left(controls, (answer,))
    question = whole[controls[asked - 1][0] if asked else 0 : answer]
    return _Laid(whole, stretches, controls, answer, asked, question, row.where)


def _marked(laid: _Laid, whole: Spans, question: Spans | None, tokenizer: FileTokenizer) -> tuple[list[int], bytes]:
    """Ids and marks of a row."""
    ids, span = whole
    controls = tokenizer.meant(ids)
    if len(controls) != len(laid.controls):
        raise TemplateError(
            f"{laid.where}: a control token of the template is none to the tokenizer where it stands, beside a letter",
            hint="choose another template: this tokenizer has the rule single_word for its tokens",
        )
    if question:
        # The question begins at a control token or with the text: there it begins in the whole, too.
        first = controls[laid.asked - 1][0] if laid.asked else 0
        if ids[first : first + len(question[0])] != question[0]:
            pieces = [
                ((ids[:first], span), 0),
                (question, laid.answer - len(laid.question)),
                (tokenizer.encode_rest(laid.text[laid.answer :]), laid.answer),
            ]
            ids, span = _joined(pieces)
            controls = tokenizer.meant(ids)
    marks = _marks(laid, len(ids), span)
    for (place, token), (_, mark) in zip(controls, laid.controls, strict=True):
        # It may have taken white space of its neighbours with it: its mark is its own all the same.
        ids[place], marks[place] = token, mark
    return ids, bytes(marks)


def _joined(pieces: Sequence[tuple[Spans, int]]) -> Spans:
    """Pieces of one text, each with its ids and where it begins, as one."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for (some, span), at in pieces:
        ids += some
        spans += [(at + start, at + end) for start, end in map(span, range(len(some)))]
    return ids, spans.__getitem__


def _marks(laid: _Laid, count: int, span: Callable[[int], tuple[int, int]]) -> bytearray:
    """The mark of each token.

    KEPT < REMOVABLE < TRAINED: a token over several stretches takes the most careful mark, so that no token that covers
    markup is cut, and none that covers a prompt is trained. One of no characters takes its place's.
    """
    marks = bytearray(count)
    done = begin = 0
    for end, mark in laid.stretches:
        up_to = count if end == len(laid.text) else _first_from(end, done, count, span)
        marks[done:up_to] = bytes([mark]) * (up_to - done)
        # Those of earlier stretches that reach into this one.
        for place in range(done - 1, -1, -1):
            if span(place)[1] <= begin:
                break
            marks[place] = REACHING if marks[place] < mark == TRAINED else min(marks[place], mark)
        done, begin = up_to, end
    return marks


def _first_from(end: int, done: int, count: int, span: Callable[[int], tuple[int, int]]) -> int:
    """The place of the first token from `done` on that begins at `end` or behind; few are looked at."""
    step = 1
    while done + step < count and span(done + step)[0] < end:
        step *= 2
    return bisect_left(range(count), end, done, min(done + step, count), key=lambda place: span(place)[0])
