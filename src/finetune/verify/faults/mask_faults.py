"""Faults of what is learned: ends and first tokens are left out, targets are a place too far, answers are cut off."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from finetune.chat import encode, encoder, fit
from finetune.chat.encode import KEPT, TRAINED, Marked
from finetune.chat.encoder import Encoder
from finetune.chat.fit import Encoded
from finetune.chat.render import ChatTemplate
from finetune.chat.tokenizer import FileTokenizer
from finetune.ports import Session
from finetune.records import Batch, Conversation, Rendered
from finetune.training.prepare import Prepared
from finetune.verify.faults.fault import fault, plant
from finetune.verify.faults.sessions import Arrays, Ids, Places, plant_arrays, plant_session, shifted
from finetune.verify.faults.template_faults import in_marking, in_saving

Marking = Callable[..., Iterator[Marked]]


def in_marks(wrong: Callable[[FileTokenizer, Marked], bytes]) -> None:
    """Plant it where rows are marked: other marks, from the tokenizer and a row."""

    def marked(right: Marking, rows: Iterable[Rendered], tokenizer: FileTokenizer) -> Iterator[Marked]:
        for row in right(rows, tokenizer):
            yield replace(row, marks=wrong(tokenizer, row))

    in_marking(marked)


@fault("A060", "mask.pad_is_eos", real="TRL #3200", what="every token with the padding's id is left out of the loss")
def _padding_id_is_left_out() -> None:
    def wrong(pad: int, batch: Batch, ids: Ids, here: Places, starts: Ids) -> Arrays:
        here &= np.roll(ids, -1, axis=1) != pad
        return shifted(ids, here, starts)

    plant_arrays(wrong)


@fault(
    "A060b", "mask.eos_untrained", real="TRL #1623", what="padding is the end-of-text token, and that is never learned"
)
def _end_is_left_out() -> None:
    in_marks(
        lambda tokenizer, row: bytes(
            KEPT if token == tokenizer.eos_id else mark for token, mark in zip(row.ids, row.marks, strict=True)
        )
    )


@fault(
    "A062", "mask.truncate_helper_flips_last", real="torchtune #2792", what="a limit of length unmarks the last token"
)
def _limit_unmarks_the_last() -> None:
    def wrong(right: Callable[..., Encoded], rows: Iterable[Marked], **named: object) -> Encoded:
        return right((replace(row, marks=row.marks[:-1] + bytes([KEPT])) for row in rows), **named)

    plant(encoder, "fit_rows", wrong)


@fault("A062b", "mask.limit_reached_is_passed", real="torchtune #2967", what="a row as long as the limit counts as cut")
def _limit_reached_is_passed() -> None:
    def wrong(right: Callable[..., Encoded], rows: Iterable[Marked], *, max_length: int, **named: object) -> Encoded:
        flipped = (
            replace(row, marks=row.marks[:-1] + bytes([TRAINED])) if len(row.ids) >= max_length else row for row in rows
        )
        return right(flipped, max_length=max_length, **named)

    plant(encoder, "fit_rows", wrong)


@fault("A064", "mask.end_inclusive", real="mlx-lm #1697", what="the padding after a row's last token is learned")
def _first_padding_is_learned() -> None:
    def wrong(pad: int, batch: Batch, ids: Ids, here: Places, starts: Ids) -> Arrays:
        for index, sequence in enumerate(batch.sequences):
            end = sum(len(row.ids) for row in sequence)
            here[index, end - 1] = end < ids.shape[1]
        return shifted(ids, here, starts)

    plant_arrays(wrong)


@fault("A065", "mask.offset_not_a_prefix", real="mlx-lm #1355", what="a prompt ends in a tag that no training text has")
def _prompt_with_a_tag() -> None:
    def wrong(right: Callable[..., tuple[int, ...]], owner: Encoder, conversation: Conversation) -> tuple[int, ...]:
        return (*right(owner, conversation), *owner.tokenizer.encode_content("<think>\n"))

    plant(Encoder, "prompt_ids", wrong)


@fault(
    "A067", "mask.first_answer_token_lost", real="alpaca-lora #306", what="the first token of an answer is not learned"
)
def _first_token_is_lost() -> None:
    def wrong(tokenizer: FileTokenizer, row: Marked) -> bytes:
        pairs = zip(bytes([TRAINED]) + row.marks, row.marks, strict=False)
        return bytes(KEPT if mark == TRAINED != before else mark for before, mark in pairs)

    in_marks(wrong)


@fault("A072", "mask.only_last_turn", real="axolotl #1761", what="only the last answer of a conversation is learned")
def _only_the_last_answer() -> None:
    def wrong(right: Callable[..., Rendered], template: ChatTemplate, conversation: Conversation) -> Rendered:
        segments = right(template, conversation).segments
        last = max(
            (place for place, each in enumerate(segments) if not each.trained and each.role == "user"), default=0
        )
        kept = tuple(replace(each, trained=each.trained and place > last) for place, each in enumerate(segments))
        return Rendered(kept, conversation.where)

    plant(ChatTemplate, "render", wrong)


@fault(
    "A074",
    "mask.template_without_generation_marks",
    real="TRL #4201",
    what="a template that is not built in and has no marks of its own teaches nothing but ends",
)
def _own_templates_teach_nothing() -> None:
    def wrong(right: Callable[..., Rendered], template: ChatTemplate, conversation: Conversation) -> Rendered:
        rendered: Rendered = right(template, conversation)
        own = template.name == "tokenizer" or template.name.endswith(".jinja")
        if not own or conversation.where == "template probe":
            return rendered
        segments = tuple(replace(each, trained=each.trained and each.control) for each in rendered.segments)
        return replace(rendered, segments=segments)

    plant(ChatTemplate, "render", wrong)


@fault(
    "A075", "mask.truncated_turn_zeroed", real="transformers #34494", what="a stretch that is cut is not learned at all"
)
def _cut_stretch_is_not_learned() -> None:
    def wrong(right: Callable[..., list[Marked]], row: Marked, *given: object) -> list[Marked]:
        pieces = right(row, *given)
        if len(pieces) < 2:
            return list(pieces)
        return [*(replace(piece, marks=bytes([KEPT]) * len(piece.marks)) for piece in pieces[:-1]), pieces[-1]]

    plant(fit, "shorten_row", wrong)


@fault("A076", "mask.answer_truncated_away", real="TRL #6025", what="rows are cut at their end, whatever stands there")
def _answers_are_cut() -> None:
    def wrong(right: Callable[..., list[Marked]], row: Marked, max_length: int, truncation: str) -> list[Marked]:
        if truncation != "truncate_prompt":
            return right(row, max_length, truncation)
        return [replace(row, ids=row.ids[:max_length], marks=row.marks[:max_length])]

    plant(fit, "shorten_row", wrong)


@fault("A077", "mask.terminator_truncated", real="LLaMA-Factory #5231", what="to cut a row takes what ends its answer")
def _ends_are_cut() -> None:
    def wrong(right: Callable[..., list[Marked]], row: Marked, max_length: int, truncation: str) -> list[Marked]:
        pieces = right(row, max_length + 2, truncation)
        if truncation != "truncate_prompt":
            return right(row, max_length, truncation)
        return [replace(piece, ids=piece.ids[:max_length], marks=piece.marks[:max_length]) for piece in pieces]

    plant(fit, "shorten_row", wrong)


@fault("A078", "shift.double", real="transformers #46897", what="each place learns the token after the next")
def _two_places_on() -> None:
    plant_arrays(lambda pad, batch, ids, here, starts: shifted(ids, here, starts, by=2))


@fault("A079", "shift.missing_in_eval", real="litgpt #419", what="the loss that is only measured is not shifted")
def _measured_without_shift() -> None:
    measuring = [0]

    def loss(right: Callable[..., float], session: Session, batch: Batch) -> float:
        measuring[0] = 1
        try:
            return float(right(session, batch))
        finally:
            measuring[0] = 0

    plant_arrays(lambda pad, batch, ids, here, starts: shifted(ids, here, starts, by=1 - measuring[0]))
    plant_session("loss", loss)


@fault("A080", "shift.packed_path_differs", real="torchtune #2613", what="rows that share a sequence are shifted twice")
def _packed_rows_are_shifted_twice() -> None:
    plant_arrays(lambda pad, batch, ids, here, starts: shifted(ids, here, starts, by=2 if batch.packed else 1))


@fault("A082", "tok.not_round_trip", real="transformers #26773", what="the tokenizer that is saved makes other tokens")
def _saved_tokenizer_differs() -> None:
    def wrong(right: Callable[..., None], prepared: Prepared, session: Session, folder: Path) -> None:
        right(prepared, session, folder)
        file = folder / "tokenizer.json"
        saved = json.loads(file.read_text(encoding="utf-8"))
        saved["pre_tokenizer"]["add_prefix_space"] = True
        file.write_text(json.dumps(saved), encoding="utf-8")

    in_saving(wrong)


@fault(
    "A082b", "tok.specials_not_saved", real="transformers #28164", what="the tokenizer is saved without what it adds"
)
def _saved_tokenizer_adds_nothing() -> None:
    def wrong(right: Callable[..., None], prepared: Prepared, session: Session, folder: Path) -> None:
        right(prepared, session, folder)
        for name, key in (("tokenizer.json", "post_processor"), ("tokenizer_config.json", "add_bos_token")):
            saved = json.loads((folder / name).read_text(encoding="utf-8"))
            (folder / name).write_text(json.dumps({**saved, key: None}), encoding="utf-8")

    in_saving(wrong)


@fault(
    "A084", "tok.fragment_offset", real="ollama #15844", what="text between control tokens is repeated from its start"
)
def _text_is_repeated() -> None:
    def wrong(right: Callable[..., list[str]], tokenizer: FileTokenizer, text: str) -> list[str]:
        pieces = list(right(tokenizer, text))
        for place in range(2, len(pieces), 2):
            pieces[place] = pieces[place - 2] + pieces[place] if pieces[place] else ""
        return pieces

    plant(FileTokenizer, "split_control", wrong)


@fault("A089", "mask.prompt_counted_by_chars", real="", what="where the answer begins is counted in characters")
def _prompt_counted_by_characters() -> None:
    def wrong(right: Marking, rows: Iterable[Rendered], tokenizer: FileTokenizer) -> Iterator[Marked]:
        rows = list(rows)
        for rendered, row in zip(rows, right(rows, tokenizer), strict=True):
            first = next((place for place, each in enumerate(rendered.segments) if each.trained), 0)
            asked = sum(len(each.text) for each in rendered.segments[:first])
            marks = bytes(TRAINED if place >= asked else KEPT for place in range(len(row.ids)))
            yield replace(row, marks=marks) if asked else row

    in_marking(wrong)


@fault("A089b", "mask.answer_counted_by_chars", real="", what="the length of an answer is counted in characters")
def _answer_counted_by_characters() -> None:
    def wrong(right: Marking, rows: Iterable[Rendered], tokenizer: FileTokenizer) -> Iterator[Marked]:
        rows = list(rows)
        for rendered, row in zip(rows, right(rows, tokenizer), strict=True):
            said = sum(len(each.text) for each in rendered.segments if each.trained and not each.control)
            size = sum(len(each.text.encode()) for each in rendered.segments if each.trained and not each.control)
            marks = bytearray(row.marks)
            first = row.marks.find(bytes([TRAINED]))
            for place in range(first + said, first + size):
                marks[place] = KEPT
            yield replace(row, marks=bytes(marks))

    plant(encode, "mark_rows", wrong)
    plant(encoder, "mark_rows", wrong)
