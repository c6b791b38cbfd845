"""Puts rows into batches of similar length, every row once an epoch; short rows may share a sequence."""

import bisect
import random
from array import array
from collections.abc import Sequence
from itertools import takewhile

from finetune.data.stored import View, in_memory, sizes_of
from finetune.records import Batch, TokenizedRow

_BATCHES_PER_BUCKET = 16
_BLUR = 1.25


def epoch_batches(
    rows: Sequence[TokenizedRow], batch_size: int, *, seed: int, epoch: int, pack_length: int | None = None
) -> Sequence[Batch]:
    """The batches of one epoch: a pure function of its arguments, so that a resumed run sees the same ones.

    Rows are shuffled, then sorted within buckets of sixteen batches by their length, blurred by up to a quarter: so
    little is padded, and yet every epoch puts other rows together. The last batch may be smaller; no row is left out.

    Args:
        batch_size: how many sequences a batch has.
        pack_length: with it, rows share sequences of at most so many tokens (see `pack_rows`); which rows share one
            is the same in every epoch, so that every epoch has as many steps.
    """
    sequences = sequences_of(rows, seed=seed, pack_length=pack_length)
    whole = pack_length is None
    lengths = sizes_of(rows)[:, 0].tolist() if whole else [sum(len(row.ids) for row in each) for each in sequences]
    rng = random.Random(f"order-{seed}-{epoch}")
    order = list(range(len(sequences)))
    rng.shuffle(order)
    bucket = batch_size * _BATCHES_PER_BUCKET
    batches: list[array[int]] = []
    for start in range(0, len(order), bucket):
        blurred = {index: lengths[index] * rng.uniform(1, _BLUR) for index in order[start : start + bucket]}
        members = sorted(blurred, key=lambda index: blurred[index])
        batches += [array("q", members[first : first + batch_size]) for first in range(0, len(members), batch_size)]
    rng.shuffle(batches)
    return _batches_of(sequences, batches, now=in_memory(rows))


def sequences_of(
    rows: Sequence[TokenizedRow], *, seed: int, pack_length: int | None = None
) -> Sequence[tuple[TokenizedRow, ...]]:
    """The rows as they share sequences: each alone, or packed; the two sides of a pair always share one."""
    if pack_length is None:
        return View(range(len(rows)), lambda at: sides_of(rows[at]))
    return pack_rows(rows, pack_length, seed=seed)


def sides_of(row: TokenizedRow) -> tuple[TokenizedRow, ...]:
    """The row, and the one that it is preferred to where it is a pair: they go through the model together."""
    return (row,) if row.rejected is None else (row, row.rejected)


def fixed_batches(rows: Sequence[TokenizedRow], batch_size: int) -> Sequence[Batch]:
    """The rows in batches by length, always the same: for losses that are compared before and after."""
    lengths = [len(row.ids) for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    together = [array("q", order[at : at + batch_size]) for at in range(0, len(order), batch_size)]
    return _batches_of(sequences_of(rows, seed=0), together, now=in_memory(rows))


def _batches_of(
    sequences: Sequence[tuple[TokenizedRow, ...]], places: Sequence[Sequence[int]], *, now: bool
) -> Sequence[Batch]:
    """Batches of the sequences at these places, made `now` or each when it is asked for."""
    found = View(range(len(places)), lambda at: _batch_of([sequences[place] for place in places[at]]))
    return [*found] if now else found


def _batch_of(sequences: Sequence[tuple[TokenizedRow, ...]]) -> Batch:
    rows = tuple(row for sequence in sequences for row in sequence)
    return Batch(rows, tuple(map(len, sequences)) if len(rows) > len(sequences) else ())


def pack_rows(rows: Sequence[TokenizedRow], length: int, *, seed: int) -> list[tuple[TokenizedRow, ...]]:
    """Put rows together into sequences of at most `length` tokens, each row once and whole.

    The longest rows come first, each into the fullest sequence that still has room (best-fit decreasing, which needs
    at most 11/9 of the fewest sequences possible); among rows of one length the seed decides. A row longer than
    `length` has a sequence of its own. A pair counts as one row, as long as its two sides.
    """
    order = list(range(len(rows)))
    random.Random(f"pack-{seed}").shuffle(order)
    sizes = [sum(len(side.ids) for side in sides_of(row)) for row in rows]
    order.sort(key=lambda index: -sizes[index])
    sequences: list[list[TokenizedRow]] = []
    # (room left, sequence) for each sequence that can take more, the fullest first.
    open_: list[tuple[int, int]] = []
    for index in order:
        size = sizes[index]
        at = bisect.bisect_left(open_, (size, -1))
        if at < len(open_):
            room, chosen = open_.pop(at)
            sequences[chosen] += sides_of(rows[index])
        else:
            room, chosen = length, len(sequences)
            sequences.append([*sides_of(rows[index])])
        if room - size > 0:
            bisect.insort(open_, (room - size, chosen))
    return [tuple(sequence) for sequence in sequences]


def shared_start(batch: Batch) -> int:
    """With how many tokens every row begins, none of them next to a target; 0 where that saves less than half.

    So many may go through the model once.
    """
    if batch.packed or len(batch.rows) < 2:
        return 0
    beginnings = zip(*(row.ids for row in batch.rows), strict=False)
    same = sum(1 for _ in takewhile(lambda ids: len({*ids}) == 1, beginnings))
    # What a target follows is computed for each row.
    most = min(same, min((row.trained[1:].index(True) for row in batch.rows if row.target_count), default=0))
    return most if 2 * most * (len(batch.rows) - 1) >= batch.token_count else 0
