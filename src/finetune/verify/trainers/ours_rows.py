"""What our trainer tells of rows before they are trained on: prompts, stops, the split, rows that share sequences."""

from collections.abc import Sequence

from finetune.chat.encoder import Encoder
from finetune.models.locate import locate_model
from finetune.records import Batch, Conversation, Message, TokenizedRow
from finetune.training.loop import mean_loss
from finetune.verify.trainers.ours_sessions import Answer, Given, Handler, OurSessions


def row_handlers(trainer: OurSessions) -> dict[str, Handler]:
    """A function for each of these abilities."""

    def encoder_of(model: str, settings: Given) -> Encoder:
        return Encoder(locate_model(model), trainer.loaded(model, settings).config.template.name)

    def prompt(model: str, settings: Given, messages: Sequence[Given]) -> Answer:
        conversation = Conversation(tuple(Message(**message) for message in messages), "asked")
        return {"ids": list(encoder_of(model, settings).prompt_ids(conversation))}

    def stops(model: str, settings: Given) -> Answer:
        return {"ids": list(encoder_of(model, settings).stop_ids)}

    def split(model: str, settings: Given, rows: Sequence[Given]) -> Answer:
        prepared = trainer.prepared(model, settings, rows)
        held_out = prepared.held_out.rows if prepared.held_out else ()
        return {"train": _numbers(prepared.train.rows), "held_out": _numbers(held_out)}

    def unseen(model: str, settings: Given, rows: Sequence[Given], valid: Sequence[Given]) -> Answer:
        file = str(trainer.rows_file(valid))
        prepared = trainer.prepared(model, {**settings, "data.valid": file}, rows)
        measured = _numbers(prepared.held_out.rows) if prepared.held_out else []
        return {"measured": measured, "unseen": sorted(map(line_of, prepared.overlaps["valid"].unseen))}

    def mix(model: str, settings: Given, sources: Sequence[Sequence[Given]]) -> Answer:
        files = [str(trainer.rows_file(rows)) for rows in sources]
        prepared = trainer.prepared_of(model, {**settings, "data.train": files})
        found = [[row for row in prepared.train.rows if row.where.rpartition(":")[0] == file] for file in files]
        return {"rows": [_numbers(rows) for rows in found]}

    def packed_loss(model: str, settings: Given, sequences: Sequence[Sequence[Given]]) -> Answer:
        rows = [
            TokenizedRow(tuple(row["ids"]), tuple(row["targets"]), str(number))
            for number, row in enumerate(row for sequence in sequences for row in sequence)
        ]
        batch = Batch(tuple(rows), tuple(len(sequence) for sequence in sequences))
        value, count = mean_loss(trainer.answering_session(model, settings, None), [batch])
        return {"loss": value, "count": count}

    return {
        "prompt": prompt,
        "stops": stops,
        "split": split,
        "unseen": unseen,
        "mix": mix,
        "packed_loss": packed_loss,
    }


def line_of(where: str) -> int:
    """The number of a row, from 0, by the place it was read at; a piece of a row has that of the row."""
    return int(where.partition(" piece ")[0].rpartition(":")[2]) - 1


def _numbers(rows: Sequence[TokenizedRow]) -> list[int]:
    return [line_of(row.where) for row in rows]
