"""Faults of what goes through the model together: neighbours and padding are seen, rows and places are lost."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from finetune import train as training
from finetune.chat import fit
from finetune.chat.encode import Marked
from finetune.data import batches as batching
from finetune.records import Batch, TokenizedRow
from finetune.verify.faults.fault import fault, in_place_of, plant, planted_by
from finetune.verify.faults.sessions import Arrays, Ids, Places, plant_arrays, shifted

Asked = Callable[..., list[list[int]]]
Sequences = list[tuple[TokenizedRow, ...]]
Packing = Callable[..., Sequences]


@fault("A100", "pack.no_boundary", "TRL #1230")
def _neighbours_are_seen() -> None:
    """Rows that share a sequence see those before them."""
    plant_arrays(lambda pad, batch, ids, here, starts: shifted(ids, here, np.zeros_like(starts)))


@fault("A100b", "pack.boundary_is_learned")
@planted_by(plant_arrays)
def _boundaries_are_learned(pad: int, batch: Batch, ids: Ids, here: Places, starts: Ids) -> Arrays:
    """The last token of a row foretells the first of its neighbour."""
    for index, sequence in enumerate(batch.sequences):
        end = 0
        for row in sequence[:-1]:
            end += len(row.ids)
            here[index, end - 1] = True
    return shifted(ids, here, starts)


@fault("A104", "pack.tail_discarded", "TRL #1621")
@in_place_of("pack_rows", batching)
def _tail_is_discarded(right: Packing, rows: Sequence[TokenizedRow], length: int, **named: object) -> Sequences:
    """A last sequence that is not full is thrown away."""
    sequences = right(rows, length, **named)
    full = sum(len(row.ids) for row in sequences[-1]) == length
    return sequences if full or len(sequences) == 1 else sequences[:-1]


@fault("A105", "pack.fragments_requeued", "TRL #5075")
@in_place_of("shorten_row", fit)
def _pieces_are_rows(right: Callable[..., list[Marked]], row: Marked, *given: object) -> list[Marked]:
    """Pieces of conversations become rows of their own."""
    return right(replace(row, document=True), *given)


@fault("A105b", "pack.cut_to_fill", "TRL #5075")
@in_place_of("pack_rows", batching)
def _rows_are_cut_to_fill(right: Packing, rows: Sequence[TokenizedRow], length: int, **named: object) -> Sequences:
    """Rows are cut where a sequence is full, and their rest goes on."""
    sequences: Sequences = []
    filled: list[TokenizedRow] = []
    for row in rows:
        room = length - sum(len(each.ids) for each in filled)
        if len(row.ids) > room > 0:
            head = replace(row, ids=row.ids[:room], trained=row.trained[:room])
            sequences.append((*filled, head))
            filled = [replace(row, ids=row.ids[room:], trained=row.trained[room:])]
        else:
            filled.append(row)
    return [*sequences, tuple(filled)]


@fault("A109", "pad.length_off_by_one", "unsloth-zoo #672")
@planted_by(plant_arrays)
def _last_place_is_lost(pad: int, batch: Batch, ids: Ids, here: Places, starts: Ids) -> Arrays:
    """The last token of the longest row is lost."""
    here[:, -2:] = False
    return shifted(ids, here, starts)


@fault("A109b", "pad.filled_and_learned", "mlx-lm 0.32.2")
def _filling_is_learned() -> None:
    """Short rows are filled up, and the filling is learned."""

    def filled(row: TokenizedRow, room: int) -> TokenizedRow:
        return replace(row, ids=(*row.ids, *row.ids[-1:] * room), trained=(*row.trained, *[True] * room))

    def wrong(right: Callable[..., list[Batch]], *given: object, **named: object) -> list[Batch]:
        batches = right(*given, **named)
        most = [max(len(row.ids) for row in batch.rows) for batch in batches]
        return [
            replace(batch, rows=tuple(filled(row, size - len(row.ids)) for row in batch.rows))
            for batch, size in zip(batches, most, strict=True)
        ]

    plant(training, "epoch_batches", wrong)


@fault("A110", "pad.attention_on_pads")
@planted_by(plant_arrays)
def _padding_is_seen(pad: int, batch: Batch, ids: Ids, here: Places, starts: Ids) -> Arrays:
    """Rows are padded in front, and see the padding."""
    for index, sequence in enumerate(batch.sequences):
        room = ids.shape[1] - sum(len(row.ids) for row in sequence)
        ids[index], here[index] = np.roll(ids[index], room), np.roll(here[index], room)
    return shifted(ids, here, np.zeros_like(starts))


@fault("A106", "pack.texts_run_together")
@in_place_of("pack_rows", batching)
def _texts_run_together(right: Packing, rows: Sequence[TokenizedRow], length: int, **named: object) -> Sequences:
    """Plain texts that share a sequence are one text in it; conversations are kept apart."""

    def joined(sequence: tuple[TokenizedRow, ...]) -> tuple[TokenizedRow, ...]:
        if not all(isinstance(row, TokenizedRow) and all(row.trained[1:]) for row in sequence):
            return sequence
        ids, marks = (sum(parts, ()) for parts in zip(*((row.ids, row.trained) for row in sequence), strict=True))
        return (replace(sequence[0], ids=ids, trained=marks),)

    return [joined(sequence) for sequence in right(rows, length, **named)]
