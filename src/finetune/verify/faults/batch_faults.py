"""Faults of what goes through the model together: neighbours and padding are seen, rows and places are lost."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from finetune import train as training
from finetune.chat import fit
from finetune.chat.encode import Marked
from finetune.data import batches as batching
from finetune.ports import Session
from finetune.records import Batch, TokenizedRow
from finetune.verify.faults.fault import fault, plant
from finetune.verify.faults.sessions import Arrays, Ids, Places, pad_of, plant_arrays, plant_session, shifted

Asked = Callable[..., list[list[int]]]
Sequences = list[tuple[TokenizedRow, ...]]


@fault("A100", "pack.no_boundary", real="TRL #1230", what="rows that share a sequence see those before them")
def _neighbours_are_seen() -> None:
    plant_arrays(lambda pad, batch, ids, here, starts: shifted(ids, here, np.zeros_like(starts)))


@fault(
    "A100b", "pack.boundary_is_learned", real="", what="the last token of a row foretells the first of its neighbour"
)
def _boundaries_are_learned() -> None:
    def wrong(pad: int, batch: Batch, ids: Ids, here: Places, starts: Ids) -> Arrays:
        for index, sequence in enumerate(batch.sequences):
            end = 0
            for row in sequence[:-1]:
                end += len(row.ids)
                here[index, end - 1] = True
        return shifted(ids, here, starts)

    plant_arrays(wrong)


@fault("A104", "pack.tail_discarded", real="TRL #1621", what="a last sequence that is not full is thrown away")
def _tail_is_discarded() -> None:
    def wrong(right: Callable[..., Sequences], rows: Sequence[TokenizedRow], length: int, **named: object) -> Sequences:
        sequences = right(rows, length, **named)
        full = sum(len(row.ids) for row in sequences[-1]) == length
        return sequences if full or len(sequences) == 1 else sequences[:-1]

    plant(batching, "pack_rows", wrong)


@fault("A105", "pack.fragments_requeued", real="TRL #5075", what="pieces of conversations become rows of their own")
def _pieces_are_rows() -> None:
    def wrong(right: Callable[..., list[Marked]], row: Marked, *given: object) -> list[Marked]:
        return right(replace(row, document=True), *given)

    plant(fit, "shorten_row", wrong)


@fault(
    "A105b", "pack.cut_to_fill", real="TRL #5075", what="rows are cut where a sequence is full, and their rest goes on"
)
def _rows_are_cut_to_fill() -> None:
    def wrong(right: Callable[..., Sequences], rows: Sequence[TokenizedRow], length: int, **named: object) -> Sequences:
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

    plant(batching, "pack_rows", wrong)


@fault("A108", "pad.side_for_generation", real="transformers #26569", what="prompts are padded where the answer begins")
def _prompts_padded_on_the_right() -> None:
    def wrong(right: Asked, session: Session, prompts: Sequence[Sequence[int]], *given: object) -> list[list[int]]:
        most = max(len(prompt) for prompt in prompts)
        padded = [[*prompt, *[pad_of(session)] * (most - len(prompt))] for prompt in prompts]
        return right(session, padded, *given)

    plant_session("generate", wrong)


@fault("A109", "pad.length_off_by_one", real="unsloth-zoo #672", what="the last token of the longest row is lost")
def _last_place_is_lost() -> None:
    def wrong(pad: int, batch: Batch, ids: Ids, here: Places, starts: Ids) -> Arrays:
        here[:, -2:] = False
        return shifted(ids, here, starts)

    plant_arrays(wrong)


@fault(
    "A109b", "pad.filled_and_learned", real="mlx-lm 0.32.2", what="short rows are filled up, and the filling is learned"
)
def _filling_is_learned() -> None:
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


@fault("A110", "pad.attention_on_pads", real="", what="rows are padded in front, and see the padding")
def _padding_is_seen() -> None:
    def wrong(pad: int, batch: Batch, ids: Ids, here: Places, starts: Ids) -> Arrays:
        for index, sequence in enumerate(batch.sequences):
            room = ids.shape[1] - sum(len(row.ids) for row in sequence)
            ids[index], here[index] = np.roll(ids[index], room), np.roll(here[index], room)
        return shifted(ids, here, np.zeros_like(starts))

    plant_arrays(wrong)
