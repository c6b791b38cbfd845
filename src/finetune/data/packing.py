"""Lets short rows share a sequence, so that little is padded; no token is lost, cut or invented."""

import bisect
import random
from collections.abc import Sequence

from finetune.records import TokenizedRow


def pack_rows(rows: Sequence[TokenizedRow], length: int, *, seed: int) -> list[tuple[TokenizedRow, ...]]:
    """Put rows together into sequences of at most `length` tokens, each row once and whole.

    The longest rows come first, each into the fullest sequence that still has room (best-fit decreasing, which needs
    at most 11/9 of the fewest sequences possible); among rows of one length the seed decides. A row longer than
    `length` has a sequence of its own.
    """
    order = list(range(len(rows)))
    random.Random(f"pack-{seed}").shuffle(order)
    order.sort(key=lambda index: -len(rows[index].ids))
    sequences: list[list[TokenizedRow]] = []
    # (room left, sequence) for each sequence that can take more, the fullest first.
    open_: list[tuple[int, int]] = []
    for index in order:
        size = len(rows[index].ids)
        at = bisect.bisect_left(open_, (size, -1))
        if at < len(open_):
            room, chosen = open_.pop(at)
            sequences[chosen].append(rows[index])
        else:
            room, chosen = length, len(sequences)
            sequences.append([rows[index]])
        if room - size > 0:
            bisect.insort(open_, (room - size, chosen))
    return [tuple(sequence) for sequence in sequences]
