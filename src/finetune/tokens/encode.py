"""Turns rendered rows into token ids with trained marks, and holds every row to the length limit."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from finetune.records import DataCounts, Rendered, Tokenized
from finetune.tokens.tokenizer import FileTokenizer

Overlong = Literal["drop", "truncate_prompt"]
_KEPT, _REMOVABLE, _TRAINED = range(3)


@dataclass(frozen=True, slots=True)
class Encoded:
    """The rows that fit, with an account of every row that was read."""

    rows: tuple[Tokenized, ...]
    counts: DataCounts


def encode_rows(
    rows: Iterable[Rendered], tokenizer: FileTokenizer, *, max_length: int, overlong: Overlong, dropped: dict[str, int]
) -> Encoded:
    """Encode rows and hold them to `max_length` tokens; `dropped` says what earlier steps already dropped.

    `overlong` is the declared policy: `drop` leaves too long rows out; `truncate_prompt` cuts the oldest words of
    the prompt, never its markup and never the answer, and drops a row only when that is not enough.
    """
    kept: list[Tokenized] = []
    losses = Counter(dropped)
    read = sum(dropped.values())
    truncated = 0
    for row in rows:
        read += 1
        ids, marks = _encode_marked(row, tokenizer)
        excess = len(ids) - max_length
        if excess > 0 and overlong == "truncate_prompt":
            removable = [index for index, mark in enumerate(marks) if mark == _REMOVABLE]
            if len(removable) >= excess:
                gone = set(removable[:excess])
                ids = [token for index, token in enumerate(ids) if index not in gone]
                marks = [mark for index, mark in enumerate(marks) if index not in gone]
                truncated += 1
                excess = 0
        tokenized = Tokenized(tuple(ids), tuple(mark == _TRAINED for mark in marks), row.where)
        if excess > 0:
            losses[f"longer than {max_length} tokens"] += 1
        elif tokenized.target_count == 0:
            losses["no trained token"] += 1
        else:
            kept.append(tokenized)
    counts = DataCounts(
        read=read,
        kept=len(kept),
        dropped=dict(losses),
        truncated=truncated,
        tokens=sum(len(row.ids) for row in kept),
        trained_tokens=sum(row.target_count for row in kept),
    )
    return Encoded(tuple(kept), counts)


def encode_row(row: Rendered, tokenizer: FileTokenizer) -> Tokenized:
    """Encode one row, whatever its length.

    The prompt is encoded apart from the answer, because that is how it is encoded when the model is asked; so the
    prompt's ids are always a prefix of the row's ids.
    """
    ids, marks = _encode_marked(row, tokenizer)
    return Tokenized(tuple(ids), tuple(mark == _TRAINED for mark in marks), row.where)


def _encode_marked(row: Rendered, tokenizer: FileTokenizer) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    marks: list[int] = []
    run: list[tuple[str, int]] = []

    def flush() -> None:
        text = "".join(piece for piece, _ in run)
        if not text:
            run.clear()
            return
        owners = [mark for piece, mark in run for _ in piece]
        run.clear()
        new, spans = tokenizer.encode_spans(text)
        ids.extend(new)
        # A token that also covers a character of the markup is kept with it.
        marks.extend(min(owners[start:end], default=owners[min(start, len(owners) - 1)]) for start, end in spans)

    answering = False
    for segment in row.segments:
        # An answer is encoded apart wherever it stands: as history in a prompt it must be the ids it was trained as.
        if (segment.trained or segment.role == "assistant") != answering:
            flush()
            answering = not answering
        mark = _TRAINED if segment.trained else _KEPT if segment.control else _REMOVABLE
        pieces = tokenizer.split_control(segment.text) if segment.control else [segment.text]
        for index, piece in enumerate(pieces):
            if index % 2 == 0:
                run.append((piece, mark))
                continue
            flush()
            ids.append(tokenizer.encode_markup(piece)[0])
            marks.append(_TRAINED if segment.trained else _KEPT)
    flush()
    if tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]:
        assert tokenizer.bos_id is not None
        ids.insert(0, tokenizer.bos_id)
        marks.insert(0, _KEPT)
    return ids, marks
