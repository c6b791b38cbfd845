"""Turns rendered rows into token ids, each with a mark that says what may happen to it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from finetune.chat.tokenizer import FileTokenizer
from finetune.records import Rendered, TokenizedRow

KEPT, REMOVABLE, TRAINED = range(3)
"""What a token is: markup that stays, a word of the prompt that a length limit may cut, or something to learn."""

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
        return TokenizedRow(self.ids, tuple(mark == TRAINED for mark in self.marks), self.where)


@dataclass(frozen=True, slots=True)
class _Run:
    """A stretch of text encoded as a whole, with a mark for each character; or one control token."""

    text: str
    marks: bytes
    control: int | None = None


def encode_row(row: Rendered, tokenizer: FileTokenizer) -> TokenizedRow:
    """Encode one row, whatever its length.

    The prompt is encoded apart from the answer, because that is how it is encoded when the model is asked; so the
    prompt's ids are always a prefix of the row's ids.
    """
    return next(mark_rows([row], tokenizer)).tokenized()


def mark_rows(rows: Iterable[Rendered], tokenizer: FileTokenizer) -> Iterator[Marked]:
    """Encode rows as `encode_row` does, many at a time, and mark each token."""
    waiting = iter(rows)
    while some := list(islice(waiting, _TOGETHER)):
        runs = [_runs(row, tokenizer) for row in some]
        encoded = _encode_runs([run for of_row in runs for run in of_row], tokenizer)
        for row, of_row in zip(some, runs, strict=True):
            pieces = list(islice(encoded, len(of_row)))
            ids = [token for new, _ in pieces for token in new]
            marks = b"".join(mark for _, mark in pieces)
            if tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]:
                assert tokenizer.bos_id is not None
                ids.insert(0, tokenizer.bos_id)
                marks = bytes([KEPT]) + marks
            yield Marked(tuple(ids), marks, row.where, is_document(row))


def is_document(row: Rendered) -> bool:
    """Whether the row is plain text, which may be cut anywhere, and not a conversation."""
    return all(segment.role == "text" for segment in row.segments)


def _runs(row: Rendered, tokenizer: FileTokenizer) -> list[_Run]:
    """The row cut where no token may reach across: at control tokens, and where an answer begins or ends."""
    runs: list[_Run] = []
    open_: list[tuple[str, int]] = []

    def close() -> None:
        if text := "".join(piece for piece, _ in open_):
            runs.append(_Run(text, b"".join(bytes([mark]) * len(piece) for piece, mark in open_)))
        open_.clear()

    answering = False
    for segment in row.segments:
        # An answer is encoded apart wherever it stands: as history in a prompt it must be the ids it was trained as.
        if (segment.trained or segment.role == "assistant") != answering:
            close()
            answering = not answering
        mark = TRAINED if segment.trained else KEPT if segment.control else REMOVABLE
        pieces = tokenizer.split_control(segment.text) if segment.control else [segment.text]
        for index, piece in enumerate(pieces):
            if index % 2 == 0:  # text; control tokens stand at the odd places
                open_.append((piece, mark))
                continue
            close()
            control = TRAINED if segment.trained else KEPT
            runs.append(_Run(piece, bytes([control]), tokenizer.encode_markup(piece)[0]))
    close()
    return runs


def _encode_runs(runs: Sequence[_Run], tokenizer: FileTokenizer) -> Iterator[tuple[Sequence[int], bytes]]:
    """Ids and marks of each run.

    Character spans take the tokenizer's slow way, so that only runs of several marks go through it.
    """
    uniform = [run.control is None and run.marks.count(run.marks[0]) == len(run.marks) for run in runs]
    plain = iter(tokenizer.encode_many([run.text for run, same in zip(runs, uniform, strict=True) if same]))
    mixed = iter(
        tokenizer.encode_many_spans(
            [run.text for run, same in zip(runs, uniform, strict=True) if not same and run.control is None]
        )
    )
    for run, same in zip(runs, uniform, strict=True):
        if run.control is not None:
            yield (run.control,), run.marks
        elif same:
            ids = next(plain)
            yield ids, run.marks[:1] * len(ids)
        else:
            ids, spans = next(mixed)
            last = len(run.marks) - 1
            # KEPT < REMOVABLE < TRAINED: a token over several marks takes the most careful one, so that no token that
            # covers markup is cut, and none that covers a prompt is trained. One of no characters takes its place's.
            yield ids, bytes(min(run.marks[start:end], default=run.marks[min(start, last)]) for start, end in spans)
