"""Keeps rows, few of them in memory and many in a file, from which they are read again. Verb: keep."""

import marshal
import os
import pickle
import tempfile
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from math import ceil
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from finetune.processes import on_all_cores
from finetune.records import Conversation, Document, Message, TokenizedRow

T = TypeVar("T")
V = TypeVar("V")
R = TypeVar("R", bound=Conversation | Document | TokenizedRow)
IN_MEMORY = 10_000
"""Fewer rows are kept as they are."""
PART = 1000
"""Rows that one core takes at once."""
_TOGETHER = 16
"""Rows that are read at once: one after the other they are read fast, and any single one soon enough."""


class View(Sequence[T]):
    """What stands at these places, read when it is asked for."""

    _read: Callable[[int], T]

    def __init__(self, places: Sequence[int], read: Callable[[int], T]) -> None:
        self._places, self._read = places, read

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[T]: ...
    def __getitem__(self, at: int | slice) -> T | Sequence[T]:
        return View(self._places[at], self._read) if isinstance(at, slice) else self._read(self._places[at])

    def __iter__(self) -> Iterator[T]:
        return map(self._read, self._places)


class Stored(View[R]):
    """Rows in a file that has no name and is gone with this object; `sizes` has those of rows of tokens."""

    def __init__(self, rows: Iterable[R]) -> None:
        self._file = tempfile.TemporaryFile(prefix="finetune-rows-")  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._ends = array("Q", [0])
        self._block = -1
        self._rows: list[R] = []
        sizes, count, waiting = array("i"), 0, iter(rows)
        while some := [*islice(waiting, _TOGETHER)]:
            count += len(some)
            for row in some:
                if isinstance(row, TokenizedRow):
                    sizes.extend(size_of(row))
            block = marshal.dumps([*map(_plain, some)])
            self._file.write(block)
            self._ends.append(self._ends[-1] + len(block))
        self._file.flush()
        self.sizes = np.frombuffer(sizes, np.int32).reshape(-1, 3)
        self._places = range(count)

    def _read(self, place: int) -> R:
        block, within = divmod(place, _TOGETHER)
        if block != self._block:
            start, end = self._ends[block], self._ends[block + 1]
            self._rows = [*map(_row, marshal.loads(os.pread(self._file.fileno(), end - start, start)))]
            self._block = block
        return self._rows[within]


class Joined(View[T]):
    """Rows of several kinds, one after the other."""

    def __init__(self, *parts: Sequence[T]) -> None:
        self.parts = parts
        starts = [0, *accumulate(map(len, parts))]

        def read(place: int) -> T:
            part = bisect_right(starts, place) - 1
            return parts[part][place - starts[part]]

        super().__init__(range(starts[-1]), read)


def keep(rows: Iterable[R]) -> Sequence[R]:
    """The rows, to be gone through any number of times: up to `IN_MEMORY` as they are, more of them in a file."""
    waiting = iter(rows)
    first = tuple(islice(waiting, IN_MEMORY))
    return first if len(first) < IN_MEMORY else Stored(chain(first, waiting))


def join(*parts: Sequence[T]) -> Sequence[T]:
    """One after the other: as they are where all are in memory."""
    return tuple(chain(*parts)) if all(map(in_memory, parts)) else Joined(*filter(len, parts))


def pick(rows: Sequence[T], places: Sequence[int]) -> Sequence[T]:
    """Those at these places: as they are where they are in memory."""
    return tuple(map(rows.__getitem__, places)) if in_memory(rows) else View(places, rows.__getitem__)


def in_parts(rows: Sequence[T], work: Callable[[Sequence[T], int], V]) -> Iterator[V]:
    """What `work` says of each `PART` of the rows, and where it begins, in order; of many rows, all cores do it."""
    count = ceil(len(rows) / PART)

    def said_of(part: int) -> V:
        return work(rows[part * PART : (part + 1) * PART], part * PART)

    if in_memory(rows):
        yield from map(said_of, range(count))
    else:  # a child of ours writes it
        yield from map(pickle.loads, on_all_cores(lambda part: pickle.dumps(said_of(part)), count))


def in_memory(rows: Sequence[Any]) -> bool:
    """Whether rows are there as they are."""
    return not isinstance(rows, View)


@dataclass(frozen=True, slots=True)
class Outline:
    """How large a row is, and nothing of what it says."""

    ids: range
    target_count: int
    rejected: None = None


class Outlines(View[Any]):
    """In place of rows where nothing but their sizes counts, for they need not be read again."""

    def __init__(self, rows: Sequence[TokenizedRow]) -> None:
        self.sizes = sizes = sizes_of(rows)
        super().__init__(range(len(rows)), lambda at: Outline(range(sizes[at, 0]), int(sizes[at, 1])))


def size_of(row: TokenizedRow) -> tuple[int, int, int]:
    """Tokens, targets and the highest id of a row, and of the one that it is preferred to."""
    size = len(row.ids), row.target_count, max(row.ids)
    if row.rejected is None:
        return size
    tokens, targets, highest = size_of(row.rejected)
    return size[0] + tokens, size[1] + targets, max(size[2], highest)


def sizes_of(rows: Sequence[TokenizedRow]) -> NDArray[np.int32]:
    """(rows, 3): of each row what `size_of` says."""
    if isinstance(rows, Stored | Outlines):
        return rows.sizes
    if isinstance(rows, Joined):
        return np.concatenate([sizes_of(part) for part in rows.parts])
    return np.array([size_of(row) for row in rows], np.int32).reshape(-1, 3)


def _plain(row: Conversation | Document | TokenizedRow) -> tuple[Any, ...]:
    """What `marshal` can write of a row."""
    if isinstance(row, TokenizedRow):
        rejected = None if row.rejected is None else _plain(row.rejected)
        return array("I", row.ids).tobytes(), bytes(row.trained), row.where, rejected
    if isinstance(row, Document):
        return row.text, row.where
    said = [(each.role, each.content, each.more, each.trained) for each in row.messages]
    other = row.rejected and (row.rejected.role, row.rejected.content, row.rejected.more, row.rejected.trained)
    return said, row.where, row.tools, row.variables, row.from_text, other


def _row(plain: tuple[Any, ...]) -> Any:
    """The row that `_plain` made this of: each kind has another number of parts."""
    if len(plain) == 2:
        return Document(*plain)
    if len(plain) == 4:
        raw, trained, where, other = plain
        ids = array("I", raw)
        return TokenizedRow(tuple(ids), tuple(map(bool, trained)), where, None if other is None else _row(other))
    said, where, tools, variables, from_text, other = plain
    rejected = None if other is None else Message(*other)
    return Conversation(tuple(Message(*each) for each in said), where, tools, variables, from_text, rejected)
