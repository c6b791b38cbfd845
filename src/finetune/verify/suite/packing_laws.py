"""Laws of what goes through the model together: rows of a batch, rows that share a sequence, prompts."""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

from hypothesis import strategies as st
from pydantic import Field

from finetune.verify.doors.answers import Epochs, Loss
from finetune.verify.doors.door import UnsupportedError
from finetune.verify.recipes import Recipe
from finetune.verify.suite.cases import PLAIN, TINY, Rows, TokenRowCase, rows_of, token_rows
from finetune.verify.suite.catalogue import law
from finetune.verify.suite.mask_laws import hold_loss, loss_of
from finetune.verify.suite.talks import tokenized
from finetune.verify.suite.trainer import Trainer
from finetune.verify.suite.verdicts import check


class Packed(Rows):
    """Rows that share sequences, or do not, and how these are dealt out."""

    packing: bool
    length: Annotated[int, Field(ge=8)]
    batch_size: Annotated[int, Field(ge=1)]
    accumulation: Annotated[int, Field(ge=1)]

    @property
    def settings(self) -> dict[str, object]:
        """As the trainer is told."""
        return {
            **PLAIN,
            "training.packing": self.packing,
            "tokens.max_length": self.length,
            "training.batch_size": self.batch_size,
            "training.accumulation": self.accumulation,
        }


def _packed(packing: Sequence[bool]) -> st.SearchStrategy[Packed]:
    return st.builds(
        Packed,
        rows=rows_of(2, 5),
        packing=st.sampled_from(packing),
        length=st.integers(100, 200),
        batch_size=st.integers(1, 2),
        accumulation=st.integers(1, 2),
    )


def _dealt(trainer: Trainer, case: Packed) -> Epochs:
    model, rows = trainer.model(TINY), case.values
    dealt = trainer.ask("batches", Epochs, model=model, settings=case.settings, rows=rows, epochs=2)
    check(len(dealt.epochs) == 2, expected="2 epochs", got=f"{len(dealt.epochs)} epochs")
    return dealt


@law(
    "packing.cover",
    "Every epoch trains on every row exactly once and whole where rows share sequences, none of them too long.",
    needs=["tokenize", "batches"],
    oracle="the rows themselves, as the trainer's own tokenizing gives them",
    cases=_packed([True]),
    examples=8,
    cost=3,
)
def packed_epoch_has_every_row(trainer: Trainer, case: Packed) -> None:
    """By the tokens of each segment, or, where segments are not told, by all tokens together."""
    rows = tokenized(trainer, trainer.model(TINY), case.values, case.settings).rows
    dealt = _dealt(trainer, case)
    for number, epoch in enumerate(dealt.epochs, start=1):
        micro = [batch for step in epoch for batch in step.micro]
        longest = max((sum(marks) for batch in micro for marks in batch.real), default=0)
        check(longest <= case.length, expected=f"at most {case.length} tokens in a sequence", got=longest)
        found: Counter[tuple[int, ...]] = Counter()
        for batch in micro:
            if batch.segments is None:
                raise UnsupportedError("it does not tell which tokens of a sequence are of one row")
            for ids, segments, marks in zip(batch.ids, batch.segments, batch.real, strict=True):
                pieces: dict[int, list[int]] = {}
                for token, segment, real in zip(ids, segments, marks, strict=True):
                    if real:
                        pieces.setdefault(segment, []).append(token)
                found.update(tuple(piece) for piece in pieces.values())
        expected = Counter(tuple(row.ids) for row in rows)
        check(
            found == expected,
            expected=f"{expected.total()} rows in epoch {number}",
            got=f"{found.total()} rows: without {list((expected - found).elements())}, and "
            f"besides {list((found - expected).elements())}",
        )


@law(
    "packing.shares",
    "Rows share a sequence where that is asked for and two of them fit into one, whatever else is set.",
    needs=["tokenize", "batches"],
    oracle="the lengths of the rows: the two shortest together are within the limit",
    cases=_packed([True]),
    examples=6,
    cost=3,
)
def packing_packs(trainer: Trainer, case: Packed) -> None:
    """There are fewer sequences than rows."""
    lengths = sorted(len(row.ids) for row in tokenized(trainer, trainer.model(TINY), case.values, case.settings).rows)
    if len(lengths) < 2 or sum(lengths[:2]) > case.length:
        raise UnsupportedError("no two rows fit into one sequence")
    epoch = _dealt(trainer, case).epochs[0]
    count = sum(len(batch.ids) for step in epoch for batch in step.micro)
    check(count < len(lengths), expected=f"fewer sequences than {len(lengths)} rows", got=f"{count} sequences")


class Shared(Recipe):
    """Rows that share one sequence."""

    rows: Annotated[tuple[TokenRowCase, ...], Field(min_length=2, max_length=3, strict=False)]


def _loss_alone(trainer: Trainer, rows: tuple[TokenRowCase, ...]) -> float:
    """The loss of rows that go through the model one at a time, weighed by their learned tokens."""
    alone = [loss_of(trainer, (row,)) for row in rows]
    return sum(loss * learned for loss, learned in alone) / sum(learned for _, learned in alone)


@law(
    "packing.apart",
    "Rows that share a sequence do not see each other: their loss is that of the rows, each alone.",
    needs=["loss", "packed_loss"],
    oracle="the rows one at a time",
    cases=st.builds(Shared, rows=st.lists(token_rows(9), min_size=2, max_size=3).map(tuple)),
    examples=8,
    cost=2,
)
def neighbours_do_not_matter(trainer: Trainer, case: Shared) -> None:
    """Two or three rows in one sequence."""
    sequences = [[row.value for row in case.rows]]
    given = {"model": trainer.model(TINY), "settings": PLAIN, "sequences": sequences}
    hold_loss(trainer.ask("packed_loss", Loss, **given).loss, _loss_alone(trainer, case.rows))


@law(
    "batches.sizes",
    "A step has no more batches than are accumulated, none of them has more sequences than are asked for, and only the "
    "last of an epoch has fewer.",
    needs=["batches"],
    oracle="the sizes that were set",
    cases=_packed([False, True]),
    examples=8,
    cost=3,
)
def batches_have_their_sizes(trainer: Trainer, case: Packed) -> None:
    """Of rows, and of sequences that rows share."""
    for epoch in _dealt(trainer, case).epochs:
        count = sum(len(batch.ids) for step in epoch for batch in step.micro)
        batches = -(-count // case.batch_size)
        sizes = sorted(len(batch.ids) for step in epoch for batch in step.micro)
        full, rest = divmod(count, case.batch_size)
        expected = sorted([case.batch_size] * full + [rest] * bool(rest))
        check(sizes == expected, expected=f"{batches} batches of {expected} sequences", got=sizes)
        steps = [len(step.micro) for step in epoch]
        full, rest = divmod(batches, case.accumulation)
        expected = [case.accumulation] * full + [rest] * bool(rest)
        check(steps == expected, expected=f"steps of {expected} batches", got=steps)
