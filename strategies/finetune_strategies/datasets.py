"""Data sets and how they are dealt out: sizes, seeds, batches that do not come out even, rows as text and as ids."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from hypothesis import strategies as st

from finetune.records import Batch, TokenizedRow
from finetune_strategies.picks import between, pick

RowShape = Literal["alpaca", "chat", "prompt/completion", "text"]
ROW_SHAPES: tuple[RowShape, ...] = ("alpaca", "chat", "prompt/completion", "text")
LARGEST_SEED = 2**32 - 1
"""The largest seed that NumPy and every framework take."""


@cache
def seeds() -> st.SearchStrategy[int]:
    """Any seed there is; 0, which is one, and those of more than 31 bits come often."""
    return st.sampled_from([0, 1, LARGEST_SEED]) | st.integers(0, LARGEST_SEED) | st.integers(2**31, LARGEST_SEED)


@dataclass(frozen=True)
class Dealing:
    """How many rows there are and how they are dealt out; mostly the last batch is short."""

    rows: int
    batch_size: int
    accumulation: int = 1

    @property
    def left_over(self) -> int:
        """How many rows the last batch holds when it is short, else 0."""
        return self.rows % self.batch_size


@st.composite
def dealings(draw: st.DrawFn, *, most_rows: int = 13, most_accumulation: int = 3) -> Dealing:
    """Rows in batches, mostly with a short one at the end; a batch may be larger than all rows together."""
    rows = draw(between(1, most_rows))
    return Dealing(rows, draw(_batch_sizes(rows)), draw(between(1, most_accumulation)))


@cache
def _batch_sizes(rows: int) -> st.SearchStrategy[int]:
    uneven = [size for size in range(2, rows + 2) if rows % size]
    return st.sampled_from(uneven) | st.sampled_from(uneven[::-1]) | st.integers(1, rows)


@dataclass(frozen=True)
class DataSet:
    """The request for a data set made by rule: its size and seed, the shape of its rows, the size of a batch."""

    size: int
    seed: int
    row_shape: RowShape
    batch_size: int


_SIZES = st.sampled_from([12, 1, 13, 48, 100]) | st.integers(1, 120)
_BATCH_SIZES = st.sampled_from([5, 7, 8]) | st.integers(1, 16)


@st.composite
def data_sets(draw: st.DrawFn) -> DataSet:
    """Requests for data sets: twelve rows, one, or any number that no batch divides; any seed, any shape of row."""
    size, batch_size = draw(_SIZES), draw(_BATCH_SIZES)
    return DataSet(size, draw(seeds()), draw(pick(*ROW_SHAPES)), batch_size)


def row_of(question: str, answer: str, shape: RowShape) -> dict[str, Any]:
    """The columns of one row that asks and answers; a text row holds both in one."""
    if shape == "alpaca":
        return {"instruction": question, "output": answer}
    if shape == "chat":
        turns = [("user", question), ("assistant", answer)]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}
    if shape == "prompt/completion":
        return {"prompt": question, "completion": answer}
    return {"text": f"{question}\n{answer}"}


def as_jsonl(rows: Sequence[dict[str, Any]], *, newline: str = "\n", ascii_only: bool = False) -> bytes:
    """Rows as the lines of a file."""
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + newline for row in rows).encode()


@cache
def _words(length: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=2 * length, max_size=2 * length)


@st.composite
def token_rows(draw: st.DrawFn, least: int = 1, most: int = 11, *, vocab_size: int = 97) -> tuple[TokenizedRow, ...]:
    """Rows of very unequal lengths, each with a name of its own and at least one token that carries loss."""
    rows = []
    for number in range(draw(between(least, most))):
        length = draw(pick(2, 3, 5, 17))
        # One choice for all ids of a row and one for all its marks: a choice for each would take ten times as long.
        words, marks = draw(_words(length)), draw(between(0, 2**length - 1))
        ids = tuple(int.from_bytes(words[2 * at : 2 * at + 2]) % vocab_size for at in range(length))
        sure = draw(between(1, length - 1))
        rows.append(
            TokenizedRow(ids, tuple(at == sure or bool(marks >> at & 1) for at in range(length)), f"row {number}")
        )
    return tuple(rows)


def any_tokenized() -> st.SearchStrategy[TokenizedRow]:
    """One row of token ids."""
    return token_rows(1, 1).map(lambda rows: rows[0])


def any_batches() -> st.SearchStrategy[Batch]:
    """One batch of a few rows."""
    return token_rows(1, 5).map(Batch)


@st.composite
def batches(draw: st.DrawFn, *, vocab_size: int = 97) -> tuple[Batch, ...]:
    """All rows of a small data set in batches, mostly with a short one at the end."""
    dealing = draw(dealings(most_rows=7))
    rows = draw(token_rows(dealing.rows, dealing.rows, vocab_size=vocab_size))
    size = dealing.batch_size
    return tuple(Batch(rows[start : start + size]) for start in range(0, len(rows), size))
