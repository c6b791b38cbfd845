"""Holds every row to the length limit by the declared policy, and accounts for each row that was read."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from finetune.chat.encode import REACHING, REMOVABLE, Marked
from finetune.chat.lengths import Lengths
from finetune.chat.tokenizer import FileTokenizer
from finetune.data.stored import keep, sizes_of
from finetune.errors import counted, raise_all
from finetune.records import TokenizedRow

Truncation = Literal["drop", "truncate_prompt", "split", "refuse"]
MANY_DROPPED = 0.02
"""From which share of rows on that are dropped it is a warning: one in fifty is more than slips in any file."""
_OTHERWISE = "raise tokens.max_length, or choose another tokens.truncation: drop, truncate_prompt or split"
_ROW = re.compile(r"(:\d+|\[\d+\])$")


@dataclass(frozen=True, slots=True)
class DataCounts:
    """What became of the rows: `read` == `kept` + the sum of `dropped`; nothing is lost silently.

    Of those kept, `truncated` lost words of their prompt and `split` were cut into several pieces. `reaching` tokens
    are not learned, because they reach from a prompt into an earlier answer; `unlearned` answers are not, because
    their rows say so. `templated` says by template in how many rows read there are turns already, so that none is put
    around them, and `lookalikes` in how many others some text has a token in it that the template marks turns with.
    `shapes` counts the rows read by their shape, `sources` those kept by their file; `dropped_at` has the first place
    of each reason to drop one; `lengths` are those before rows are held to a limit.
    """

    read: int
    kept: int
    dropped: dict[str, int]
    truncated: int
    tokens: int
    trained_tokens: int
    split: int = 0
    reaching: int = 0
    unlearned: int = 0
    templated: dict[str, int] = field(default_factory=dict)
    lookalikes: int = 0
    shapes: dict[str, int] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    dropped_at: dict[str, str] = field(default_factory=dict)
    lengths: Lengths | None = None

    @property
    def many_dropped(self) -> str:
        """That so many rows are dropped that nobody may miss it; "" where they are few."""
        lost = sum(self.dropped.values())
        if lost <= MANY_DROPPED * self.read:
            return ""
        reasons = ", ".join(
            f"{count:,} {why}" for why, count in sorted(self.dropped.items(), key=lambda item: -item[1])
        )
        return f"{100 * lost / self.read:.1f}% of the rows are dropped ({lost:,} of {self.read:,}): {reasons}"


@dataclass(frozen=True, slots=True)
class Encoded:
    """The rows that fit, with an account of every row that was read."""

    rows: Sequence[TokenizedRow]
    counts: DataCounts


def fit_rows(
    rows: Iterable[Marked], *, max_length: int, truncation: Truncation, dropped: dict[str, int], sides: int = 1
) -> Encoded:
    """Hold rows to `max_length` tokens; `dropped` says what earlier steps already dropped.

    With two `sides` rows come as pairs, as long as the longer side: both are cut alike, or dropped together.

    `truncation` is the declared policy for longer rows:

    - `drop` leaves them out;
    - `truncate_prompt` cuts the oldest words of the prompt, never its markup and never the answer, and drops a row
      only when that is not enough;
    - `split` cuts plain text into pieces that overlap by one token, so that each token is learned exactly once, and
      drops a conversation, which cannot be cut;
    - `refuse` accepts none.

    Raises:
        DataError: a row is too long and the policy is `refuse`; the first twenty are named with their lengths.
    """
    losses = Counter(dropped)
    seen, sources, lengths = Counter[str](), Counter[str](), Counter[int]()
    first: dict[str, str] = {}
    refused: list[str] = []

    def fitted() -> Iterator[TokenizedRow]:
        for row, *others in zip(*[iter(rows)] * sides, strict=True):
            longest = max(len(side.ids) for side in (row, *others))
            lengths[longest] += 1
            refused.extend([f"{row.where}: {longest} tokens"] * (longest > max_length and truncation == "refuse"))
            learned, reason = _learned((row, *others), max_length, truncation)
            if learned:
                sources[_ROW.sub("", row.where)] += 1
                seen["reaching"] += row.marks.count(REACHING)
                seen["truncated"] += len(learned) == 1 and len(learned[0].ids) < len(row.ids)
                seen["split"] += len(learned) > 1
            else:
                losses[reason] += 1
                first.setdefault(reason, row.where)
            yield from learned

    kept = keep(fitted())
    long = f"{counted(len(refused), 'row', 'is/are')} longer than {counted(max_length, 'token')}"
    raise_all(refused, what=long, hint=_OTHERWISE)
    tokens, trained, _ = sizes_of(kept).sum(axis=0, dtype=int).tolist()
    counts = DataCounts(
        read=sum(dropped.values()) + lengths.total(),
        kept=sources.total(),
        dropped=dict(losses),
        truncated=seen["truncated"],
        tokens=tokens,
        trained_tokens=trained,
        split=seen["split"],
        reaching=seen["reaching"],
        sources=dict(sources),
        dropped_at=first,
        lengths=Lengths.of(lengths),
    )
    return Encoded(kept, counts)


def _learned(sides: Sequence[Marked], max_length: int, truncation: Truncation) -> tuple[list[TokenizedRow], str]:
    """What is left of a row to learn, or of both sides of a pair as one row; or nothing, and why."""
    excess = max(len(side.ids) for side in sides) - max_length
    left = [shorten_row(side, len(side.ids) - excess, truncation) if excess > 0 else [side] for side in sides]
    if not all(left):
        return [], f"longer than {max_length} tokens"
    rows, *others = ([row for piece in each if (row := piece.tokenized()).target_count] for each in left)
    if not rows or not all(others):
        return [], "no trained token"
    if not others:
        return rows, ""
    if rows[0].ids == others[0][0].ids:
        return [], "chosen and rejected are the same"
    return [replace(rows[0], rejected=others[0][0])], ""


def shorten_row(row: Marked, max_length: int, truncation: Truncation) -> list[Marked]:
    """What remains of a row that is too long: nothing, one shorter row, or its pieces."""
    if truncation == "truncate_prompt":
        removable = [index for index, mark in enumerate(row.marks) if mark == REMOVABLE]
        excess = len(row.ids) - max_length
        if len(removable) < excess:
            return []
        gone = set(removable[:excess])
        stay = [index for index in range(len(row.ids)) if index not in gone]
        return [Marked(tuple(row.ids[at] for at in stay), bytes(row.marks[at] for at in stay), row.where, row.document)]
    if truncation == "split" and row.document and max_length > 1:
        # A piece's first token is never a target, nothing precedes it: so each piece begins with the last one's end.
        starts = range(0, len(row.ids) - 1, max_length - 1)
        return [
            Marked(row.ids[at : at + max_length], row.marks[at : at + max_length], f"{row.where} piece {index}", True)  # noqa: FBT003
            for index, at in enumerate(starts, start=1)
        ]
    return []


def learned_notes(tokenizer: FileTokenizer, rows: Sequence[TokenizedRow]) -> list[str]:
    """Which tokens are to be learned, and how many of the rows to learn hold each."""
    if not tokenizer.learned:
        return []
    held = Counter(number for row in rows for number in set(row.ids))
    told = [
        f"{token!r} (id {number}) in {held[number]}"
        for token, number in zip(tokenizer.learned, tokenizer.learned_ids, strict=True)
    ]
    return [f"of {len(rows)} training rows, the tokens to learn are in so many: {', '.join(told)}"]
