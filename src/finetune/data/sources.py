"""Reads the sources of a run's rows one after the other, or mixed by weights, and counts what each gave."""

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import compress, islice
from pathlib import Path

from finetune.data.parts import DataSet, find_set
from finetune.data.read import iter_rows
from finetune.errors import DataError, counted
from finetune.records import Row

Names = str | Sequence[str]


@dataclass(frozen=True, slots=True)
class SourceRows:
    """A source of rows: its files, how many rows were read, and how many of them its weight left out."""

    name: str
    files: tuple[Path, ...]
    rows: int
    left_out: int = 0


def names_of(given: Names) -> tuple[str, ...]:
    """The sources that a setting names, one or several."""
    return (given,) if isinstance(given, str) else tuple(given)


def shown_names(given: Names) -> str:
    """The sources as a sentence has them."""
    return ", ".join(names_of(given))


def find_sets(given: Names) -> list[DataSet]:
    """The data sets of these names.

    Raises:
        DataError: one cannot be found, or two have a file in common.
    """
    sets = [find_set(name) for name in names_of(given)]
    owners: dict[str, str] = {}
    for each in sets:
        for path in each.files:
            place = os.path.realpath(path)
            if place in owners:
                by = f" (by {owners[place]} and {each.name})" if owners[place] != each.name else ""
                raise DataError(f"{path} is named twice{by}", hint="name each file once; data.mix lets one weigh more")
            owners[place] = each.name
    return sets


def files_of(given: Names) -> tuple[Path, ...]:
    """The files that these sources are read from, in order."""
    return tuple(path for each in find_sets(given) for path in each.files)


class SourcedRows:
    """The rows of several sources; iterating reads them, and `sources` then says how many each gave.

    Without weights they come one after the other, and a limit takes the first. With weights no row comes twice: each
    source gives its share of as many rows as there can be (and as the limit allows), chosen by the seed, in order.
    """

    def __init__(
        self, given: Names, *, limit: int | None = None, weights: Sequence[float] | None = None, seed: int = 0
    ) -> None:
        self.sets = find_sets(given)
        self.limit, self.weights, self.seed = limit, weights, seed
        self.sources: tuple[SourceRows, ...] = ()
        if weights is not None and len(weights) != len(self.sets):
            raise DataError(
                f"data.mix has {counted(len(weights), 'weight')}, and data.train names "
                f"{counted(len(self.sets), 'source')}",
                hint="give each source a weight, in their order",
            )

    def __iter__(self) -> Iterator[Row]:
        return self._in_turn() if self.weights is None else self._mixed(self.weights)

    def _in_turn(self) -> Iterator[Row]:
        found: list[SourceRows] = []
        left = self.limit
        for each in self.sets:
            count = 0
            for row in islice(rows_of(each), left):
                count += 1
                yield row
            left = None if left is None else left - count
            found.append(SourceRows(each.name, each.files, count))
        self.sources = tuple(found)

    def _mixed(self, weights: Sequence[float]) -> Iterator[Row]:
        sizes = [sum(1 for _ in rows_of(each)) for each in self.sets]
        counts = mixed_counts(sizes, weights, self.limit)
        self.sources = tuple(
            SourceRows(each.name, each.files, size, size - count)
            for each, size, count in zip(self.sets, sizes, counts, strict=True)
        )
        if none := [each for each, count in zip(self.sources, counts, strict=True) if not count]:
            raise DataError(
                f"data.mix leaves no row of {none[0].name}, which has {counted(none[0].rows, 'row')}",
                hint="raise its weight, or data.limit, or leave it out",
            )
        for place, (own, size, count) in enumerate(zip(self.sets, sizes, counts, strict=True)):
            taken = bytearray(size)
            for at in random.Random(f"mix-{self.seed}-{place}").sample(range(size), count):
                taken[at] = 1
            yield from compress(rows_of(own), taken)


def rows_of(each: DataSet) -> Iterator[Row]:
    """The rows of all files of a set."""
    for path in each.files:
        yield from iter_rows(path)


def mixed_counts(sizes: Sequence[int], weights: Sequence[float], limit: int | None = None) -> list[int]:
    """How many rows each source gives: shares by weight of the most rows that there can be, within one row each."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    total = min(int(size / share) for size, share in zip(sizes, shares, strict=True))
    total = total if limit is None else min(total, limit)
    counts = [int(share * total) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda at: counts[at] - shares[at] * total)
    for at in by_rest[: total - sum(counts)]:
        counts[at] += 1
    return counts
