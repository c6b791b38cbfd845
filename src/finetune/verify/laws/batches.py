"""Laws of batches: each row once, padding that changes nothing, packed rows that do not see each other."""

from collections import Counter

from finetune.verify.catalogue import law, oracle
from finetune.verify.check import check
from finetune.verify.client import SubjectClient
from finetune.verify.laws.helpers import check_loss, loss_of, tokenized
from finetune.verify.subjects.answers import Epochs, Loss, TokenRows
from finetune.verify.subjects.subject import UnsupportedError
from finetune_strategies.cases import batches as cases
from finetune_strategies.cases.rows import PLAIN, TINY, Rows


@law("batches.cover", ["tokenize", "batches"], cases.BATCHES_COVER)
@oracle("the rows themselves, as the trainer's own tokenizing gives them")
def every_row_is_trained_on(trainer: SubjectClient, case: cases.Dealt) -> None:
    """Every epoch trains on every row exactly once, whatever the sizes of batches."""
    settings = {
        **PLAIN,
        "training.batch_size": case.batch_size,
        "training.gradient_accumulation_steps": case.accumulation,
        "training.seed": case.seed,
    }
    model = trainer.model(TINY)
    rows = trainer.ask("tokenize", TokenRows, model=model, settings=settings, rows=case.values).rows
    dealt = trainer.ask("batches", Epochs, model=model, settings=settings, rows=case.values, epochs=2)
    check(len(dealt.epochs) == 2, expected="2 epochs", got=f"{len(dealt.epochs)} epochs")
    expected = sorted(row.ids for row in rows)
    for number, epoch in enumerate(dealt.epochs, start=1):
        micro = [batch for step in epoch for batch in step.micro]
        found = sorted(
            [token for token, real in zip(ids, marks, strict=True) if real]
            for batch in micro
            for ids, marks in zip(batch.ids, batch.real, strict=True)
        )
        check(found == expected, expected=f"{len(expected)} rows in epoch {number}", got=f"{len(found)} rows: {found}")


@law("padding.no_target", ["batches"], cases.PADDING_NO_TARGET, examples=8)
@oracle("the trainer's own marks of what is of a row")
def padding_is_no_target(trainer: SubjectClient, case: Rows) -> None:
    """What fills a batch up to its longest row is never what the model is taught to say."""
    settings = {**PLAIN, "training.batch_size": len(case.rows), "training.gradient_accumulation_steps": 1}
    dealt = trainer.ask("batches", Epochs, model=trainer.model(TINY), settings=settings, rows=case.values, epochs=1)
    check(len(dealt.epochs) == 1, expected="1 epoch", got=f"{len(dealt.epochs)} epochs")
    for batch in (micro for epoch in dealt.epochs for step in epoch for micro in step.micro):
        for ids, targets, real in zip(batch.ids, batch.targets, batch.real, strict=True):
            taught = [place for place, target in enumerate(targets) if target and not real[place]]
            check(
                not taught,
                expected="no target beyond the row's last token",
                got=f"a row of {sum(real)} tokens in {len(ids)}, with targets at {taught}: ids {ids}",
            )


@law("padding.same_loss", ["loss"], cases.PADDING_SAME_LOSS, cost=2, examples=8)
@oracle("the loss of each row alone by our trainer in float64, where nothing is filled up, weighted by its tokens")
def padding_changes_no_loss(trainer: SubjectClient, case: cases.Together) -> None:
    """The loss of rows that share a batch is that of their tokens, whatever the batch is filled up with."""
    model, settings = trainer.model(TINY), {**PLAIN, "training.batch_size": 2}
    got = trainer.ask("loss", Loss, model=model, settings=settings, batch=[row.value for row in case.rows]).loss
    alone = [
        trainer.oracle.ask("loss", Loss, model=model, settings=settings, batch=[row.value]).loss for row in case.rows
    ]
    counts = [row.answer for row in case.rows]
    expected = sum(count * loss for count, loss in zip(counts, alone, strict=True)) / sum(counts)
    check(abs(got - expected) <= 1e-3, expected=f"{expected:.5f}", got=f"{got:.5f}")


def _dealt(trainer: SubjectClient, case: cases.Packed) -> Epochs:
    model, rows = trainer.model(TINY), case.values
    dealt = trainer.ask("batches", Epochs, model=model, settings=case.settings, rows=rows, epochs=2)
    check(len(dealt.epochs) == 2, expected="2 epochs", got=f"{len(dealt.epochs)} epochs")
    return dealt


@law("packing.cover", ["tokenize", "batches"], cases.PACKING_COVER, examples=8, cost=3)
@oracle("the rows themselves, as the trainer's own tokenizing gives them")
def packed_epoch_has_every_row(trainer: SubjectClient, case: cases.Packed) -> None:
    """Every epoch trains on every row exactly once and whole where rows share sequences, none of them too long."""
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


@law("packing.texts", ["tokenize", "batches"], cases.PACKING_TEXTS, examples=6, cost=3)
@oracle("the texts themselves, as the trainer's own tokenizing gives them")
def packed_texts_are_rows(trainer: SubjectClient, case: cases.PackedTexts) -> None:
    """Plain texts that share a sequence are rows of their own in it, each with its end, as conversations are."""
    packed_epoch_has_every_row(trainer, case)


@law("packing.shares", ["tokenize", "batches"], cases.PACKING_SHARES, examples=6, cost=3)
@oracle("the lengths of the rows: the two shortest together are within the limit")
def packing_packs(trainer: SubjectClient, case: cases.Packed) -> None:
    """Rows share a sequence where that is asked for and two of them fit into one, whatever else is set."""
    lengths = sorted(len(row.ids) for row in tokenized(trainer, trainer.model(TINY), case.values, case.settings).rows)
    if len(lengths) < 2 or sum(lengths[:2]) > case.length:
        raise UnsupportedError("no two rows fit into one sequence")
    epoch = _dealt(trainer, case).epochs[0]
    count = sum(len(batch.ids) for step in epoch for batch in step.micro)
    check(count < len(lengths), expected=f"fewer sequences than {len(lengths)} rows", got=f"{count} sequences")


@law("packing.apart", ["loss", "packed_loss"], cases.PACKING_APART, examples=8, cost=2)
@oracle("the rows one at a time")
def neighbours_do_not_matter(trainer: SubjectClient, case: cases.Shared) -> None:
    """Rows that share a sequence do not see each other: their loss is that of the rows, each alone."""
    sequences = [[row.value for row in case.rows]]
    given = {"model": trainer.model(TINY), "settings": PLAIN, "sequences": sequences}
    alone = [loss_of(trainer, (row,)) for row in case.rows]
    expected = sum(loss * learned for loss, learned in alone) / sum(learned for _, learned in alone)
    check_loss(trainer.ask("packed_loss", Loss, **given).loss, expected)


@law("batches.sizes", ["batches"], cases.BATCHES_SIZES, examples=8, cost=3)
@oracle("the sizes that were set")
def batches_have_their_sizes(trainer: SubjectClient, case: cases.Packed) -> None:
    """Batches and steps have the sizes that were set; only the last of an epoch may have fewer."""
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
