"""Turns rendered rows into token ids, each with a mark that says what may happen to it."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from operator import attrgetter
from typing import NamedTuple

from finetune.chat.tokenizer import FileTokenizer, Spans
from finetune.errors import TemplateError
from finetune.records import Rendered, TokenizedRow

KEPT, REMOVABLE, TRAINED, REACHING = range(4)
"""What a token is: markup that stays, a word of the prompt that a length limit may cut, something to learn, or one that
reaches from a prompt into an earlier answer, which nobody asked so can say: it stays, and is not learned."""

_TOGETHER = 1000
"""Rows handed to the tokenizer at once: enough to keep every core busy, few enough to hold in memory."""
_OFTEN, _SHORT = 1000, 2000
"""So many pieces that many rows have are kept, and of so many characters at most."""
_FIELDS = attrgetter("text", "role", "trained", "control")


@dataclass(frozen=True, slots=True)
class Marked:
    """A row's token ids, whatever their number, with a mark each; `document`: plain text, not a conversation."""

    ids: tuple[int, ...]
    marks: bytes
    where: str
    document: bool

    def tokenized(self) -> TokenizedRow:
        """The ids with only the *trained* marks."""
        return TokenizedRow(self.ids, tuple(mark == TRAINED for mark in self.marks), self.where)


def encode_row(row: Rendered, tokenizer: FileTokenizer) -> TokenizedRow:
    """Encode one row, whatever its length; see `mark_rows`."""
    return next(mark_rows([row], tokenizer)).tokenized()


def mark_rows(rows: Iterable[Rendered], tokenizer: FileTokenizer) -> Iterator[Marked]:
    """Encode rows as a server does, many at a time, and mark each token.

    A row is encoded as a whole, earlier answers with it, as the history that they are when the last answer is asked
    for. A token may reach across the place where the last answer begins, which no server sends: such a row is the
    prompt's ids, as it is asked with, and then those of the rest: what is asked with always begins what is trained on.

    No token reaches across a control token, so that rows are cut there: what many rows say is encoded once.
    """
    waiting = iter(rows)
    often: dict[_Piece, _Encoded] = {}
    cut = partial(_cut, tokenizer)
    kept = lru_cache(_OFTEN)(cut)
    while some := list(islice(waiting, _TOGETHER)):
        laid = [_lay_out(row, lambda text, mark: (kept if len(text) <= _SHORT else cut)(text, mark)) for row in some]
        counts = Counter(chain.from_iterable(laid))
        new = [piece for piece in counts if piece not in often]
        found = often | dict(zip(new, _encoded(new, tokenizer), strict=True))
        for row, pieces in zip(some, laid, strict=True):
            both = [found[piece] for piece in pieces]
            if None in both:
                raise TemplateError(
                    f"{row.where}: a control token of the template is none to the tokenizer where it stands, beside a "
                    "letter",
                    hint="choose another template: this tokenizer has the rule single_word for its tokens",
                )
            ids = [*chain.from_iterable([each[0] for each in both if each])]
            marks = b"".join([each[1] for each in both if each])
            if tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]:
                assert tokenizer.bos_id is not None
                ids.insert(0, tokenizer.bos_id)
                marks = bytes([KEPT]) + marks
            yield Marked(tuple(ids), marks, row.where, is_document(row))
        again = {piece: found[piece] for piece in new if counts[piece] > 1 and len(piece.text) <= _SHORT}
        often |= dict(islice(again.items(), _OFTEN - len(often)))


def is_document(row: Rendered) -> bool:
    """Whether the row is plain text, which may be cut anywhere, and not a conversation."""
    return all(segment.role == "text" for segment in row.segments)


class _Piece(NamedTuple):
    """Some of a row as one text, in which control tokens that are meant stand by name, with a mark for each stretch."""

    text: str
    stretches: tuple[tuple[int, int], ...]
    """Where each ends, and its mark."""
    controls: tuple[tuple[int, int], ...]
    """Where each control token begins, and its mark."""
    answer: int
    """Where the row's last answer begins; 0 where it is not in here, or all of it."""

    @property
    def asked(self) -> int:
        """How many control tokens stand before the last answer."""
        return bisect_left(self.controls, (self.answer,))

    @property
    def question(self) -> str:
        """What stands before the last answer, from the last control token on: no token reaches across one of those."""
        return self.text[self.controls[self.asked - 1][0] if self.asked else 0 : self.answer] if self.answer else ""


_Encoded = tuple[list[int], bytes] | None
"""Ids and marks of a piece; None where a control token is none to the tokenizer."""


class _Markup(NamedTuple):
    """Markup, cut before each control token that takes nothing of what stands before it."""

    head: str
    head_controls: Sequence[tuple[int, int]]
    """What stands before the first cut, and where in it control tokens begin, with their mark."""
    pieces: Sequence[_Piece]
    tail: str
    tail_controls: Sequence[tuple[int, int]]
    """What stands after the last cut; "" where there is none."""


def _cut(tokenizer: FileTokenizer, text: str, mark: int) -> _Markup:
    found: list[tuple[str, list[tuple[int, int]]]] = [("", [])]
    for place, part in enumerate(tokenizer.split_control(text)):
        if place % 2:  # control tokens stand at the odd places
            if tokenizer.stands_alone(part):
                found.append(("", []))
            found[-1][1].append((len(found[-1][0]), mark))
            part = tokenizer.name_of(part)
        found[-1] = found[-1][0] + part, found[-1][1]
    head, *pieces, tail = found if len(found) > 1 else [*found, ("", [])]
    whole = [_Piece(said, ((len(said), mark),), tuple(controls), 0) for said, controls in pieces]
    return _Markup(*head, whole, *tail)


def _lay_out(row: Rendered, cut: Callable[[str, int], _Markup]) -> list[_Piece]:
    """The row in the pieces that it is encoded in."""
    pieces: list[_Piece] = []
    parts: list[str] = []
    stretches: list[tuple[int, int]] = []
    controls: list[tuple[int, int]] = []
    at, answer = 0, (0, 0)
    before = False
    for text, role, trained, control in map(_FIELDS, row.segments):
        said = trained and role == "assistant"
        if said and not before:
            answer = len(pieces), at
        before = said
        mark = TRAINED if trained else KEPT if control else REMOVABLE
        if control:
            markup = cut(text, mark)
            controls += [(at + place, of) for place, of in markup.head_controls]
            text = markup.head
        parts.append(text)
        at += len(text)
        if control and markup.tail:
            if at:
                pieces.append(_Piece("".join(parts), (*stretches, (at, mark)), tuple(controls), 0))
            pieces += markup.pieces
            parts, stretches, controls, at = [markup.tail], [], [*markup.tail_controls], len(markup.tail)
        stretches.append((at, mark))
    pieces.append(_Piece("".join(parts), tuple(stretches), tuple(controls), 0))
    place, begin = answer
    if 0 < begin < len(pieces[place].text):
        pieces[place] = pieces[place]._replace(answer=begin)
    return pieces


def _encoded(pieces: Sequence[_Piece], tokenizer: FileTokenizer) -> Iterator[_Encoded]:
    """Ids and marks of pieces, all of them handed to the tokenizer at once."""
    asked = list(dict.fromkeys(question for piece in pieces if (question := piece.question)))
    spans = tokenizer.encode_spans([*asked, *(piece.text for piece in pieces)])
    questions = dict(zip(asked, spans, strict=False))
    for piece, whole in zip(pieces, spans[len(asked) :], strict=True):
        yield _marked(piece, whole, questions.get(piece.question), tokenizer)


def _marked(piece: _Piece, whole: Spans, question: Spans | None, tokenizer: FileTokenizer) -> _Encoded:
    ids, span = whole
    controls = tokenizer.meant(ids)
    if len(controls) != len(piece.controls):
        return None
    if question:
        # The question begins at a control token or with the text: there it begins in the whole, too.
        first = controls[piece.asked - 1][0] if piece.asked else 0
        if ids[first : first + len(question[0])] != question[0]:
            joined = [
                ((ids[:first], span), 0),
                (question, piece.answer - len(piece.question)),
                (tokenizer.encode_rest(piece.text[piece.answer :]), piece.answer),
            ]
            ids, span = _joined(joined)
            controls = tokenizer.meant(ids)
    marks = _marks(piece, len(ids), span)
    for (place, token), (_, mark) in zip(controls, piece.controls, strict=True):
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


def _marks(piece: _Piece, count: int, span: Callable[[int], tuple[int, int]]) -> bytearray:
    """The mark of each token.

    KEPT < REMOVABLE < TRAINED: a token over several stretches takes the most careful mark, so that no token that covers
    markup is cut, and none that covers a prompt is trained. One of no characters takes its place's.
    """
    marks = bytearray(count)
    done = begin = 0
    for end, mark in piece.stretches:
        # Tokens stand in the order of the characters they begin at.
        inside = range(done, count)
        up_to = count if end == len(piece.text) else done + bisect_left(inside, end, key=lambda place: span(place)[0])
        marks[done:up_to] = bytes([mark]) * (up_to - done)
        # Those of earlier stretches that reach into this one.
        for place in range(done - 1, -1, -1):
            if span(place)[1] <= begin:
                break
            marks[place] = REACHING if marks[place] < mark == TRAINED else min(marks[place], mark)
        done, begin = up_to, end
    return marks
