"""Puts rows into batches of similar length, every row once an epoch, in an order that only the seed decides."""

import random
from collections.abc import Sequence

from finetune.records import Batch, Tokenized

_BATCHES_PER_BUCKET = 16
_BLUR = 1.25


def epoch_batches(rows: Sequence[Tokenized], batch_size: int, *, seed: int, epoch: int) -> list[Batch]:
    """The batches of one epoch: a pure function of its arguments, so that a resumed run sees the same ones.

    Rows are shuffled, then sorted within buckets of sixteen batches by their length, blurred by up to a quarter: so
    little is padded, and yet every epoch puts other rows together. The last batch may be smaller; no row is left out.
    """
    rng = random.Random(f"order-{seed}-{epoch}")
    order = list(range(len(rows)))
    rng.shuffle(order)
    bucket = batch_size * _BATCHES_PER_BUCKET
    batches: list[Batch] = []
    for start in range(0, len(order), bucket):
        blurred = {index: len(rows[index].ids) * rng.uniform(1, _BLUR) for index in order[start : start + bucket]}
        members = sorted(blurred, key=lambda index: blurred[index])
        batches += [
            Batch(tuple(rows[index] for index in members[first : first + batch_size]))
            for first in range(0, len(members), batch_size)
        ]
    rng.shuffle(batches)
    return batches


def fixed_batches(rows: Sequence[Tokenized], batch_size: int) -> list[Batch]:
    """The rows in batches by length, always the same: for losses that are compared before and after."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    return [Batch(tuple(ordered[start : start + batch_size])) for start in range(0, len(ordered), batch_size)]
