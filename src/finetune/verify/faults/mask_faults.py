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
from finetune.records import Batch, Conversation, Rendered, Segment
from finetune.training.prepare import Prepared
from finetune.verify.faults.fault import fault, in_place_of, planted_by
from finetune.verify.faults.sessions import Arrays, Ids, Places, plant_arrays, plant_session, shifted
from finetune.verify.faults.template_faults import in_conversations, in_marking, in_saving

Marking = Callable[..., Iterator[Marked]]
Encoding = Callable[..., Encoded]
Asking = Callable[..., tuple[int, ...]]
Rendering = Callable[..., Rendered]
Doing = Callable[..., None]


def in_marks(wrong: Callable[[FileTokenizer, Marked], bytes]) -> None:
    """Plant it where rows are marked: other marks, from the tokenizer and a row."""

    def marked(right: Marking, rows: Iterable[Rendered], tokenizer: FileTokenizer) -> Iterator[Marked]:
        for row in right(rows, tokenizer):
            yield replace(row, marks=wrong(tokenizer, row))

    in_marking(marked)


@fault("A060", "mask.pad_is_eos", "TRL #3200")
@planted_by(plant_arrays)
def _padding_id_is_left_out(pad: int, batch: Batch, ids: Ids, here: Places, starts: Ids) -> Arrays:
    """Every token with the padding's id is left out of the loss."""
    here &= np.roll(ids, -1, axis=1) != pad
    return shifted(ids, here, starts)


@fault("A060b", "mask.eos_untrained", "TRL #1623")
def _end_is_left_out() -> None:
    """Padding is the end-of-text token, and that is never learned."""
    in_marks(
        lambda tokenizer, row: bytes(
            KEPT if token == tokenizer.eos_id else mark for token, mark in zip(row.ids, row.marks, strict=True)
        )
    )


@fault("A062", "mask.truncate_helper_flips_last", "torchtune #2792")
@in_place_of("fit_rows", encoder)
def _limit_unmarks_the_last(right: Encoding, rows: Iterable[Marked], **named: object) -> Encoded:
    """A limit of length unmarks the last token."""
    return right((replace(row, marks=row.marks[:-1] + bytes([KEPT])) for row in rows), **named)


@fault("A062b", "mask.limit_reached_is_passed", "torchtune #2967")
@in_place_of("fit_rows", encoder)
def _limit_reached_is_passed(right: Encoding, rows: Iterable[Marked], *, max_length: int, **named: object) -> Encoded:
    """A row as long as the limit counts as cut."""
    flipped = (
        replace(row, marks=row.marks[:-1] + bytes([TRAINED])) if len(row.ids) >= max_length else row for row in rows
    )
    return right(flipped, max_length=max_length, **named)


@fault("A064", "mask.end_inclusive", "mlx-lm #1697")
@planted_by(plant_arrays)
def _first_padding_is_learned(pad: int, batch: Batch, ids: Ids, here: Places, starts: Ids) -> Arrays:
    """The padding after a row's last token is learned."""
    for index, sequence in enumerate(batch.sequences):
        end = sum(len(row.ids) for row in sequence)
        here[index, end - 1] = end < ids.shape[1]
    return shifted(ids, here, starts)


@fault("A065", "mask.offset_not_a_prefix", "mlx-lm #1355")
@in_place_of("prompt_ids", Encoder)
def _prompt_with_a_tag(right: Asking, owner: Encoder, conversation: Conversation) -> tuple[int, ...]:
    """A prompt ends in a tag that no training text has."""
    return (*right(owner, conversation), *owner.tokenizer.encode_content("<think>\n"))


@fault("A067", "mask.first_answer_token_lost", "alpaca-lora #306")
@planted_by(in_marks)
def _first_token_is_lost(tokenizer: FileTokenizer, row: Marked) -> bytes:
    """The first token of an answer is not learned."""
    pairs = zip(bytes([TRAINED]) + row.marks, row.marks, strict=False)
    return bytes(KEPT if mark == TRAINED != before else mark for before, mark in pairs)


@fault("A072", "mask.only_last_turn", "axolotl #1761")
@in_place_of("render", ChatTemplate)
def _only_the_last_answer(right: Rendering, template: ChatTemplate, conversation: Conversation) -> Rendered:
    """Only the last answer of a conversation is learned."""
    segments = right(template, conversation).segments
    last = max((place for place, each in enumerate(segments) if not each.trained and each.role == "user"), default=0)
    kept = tuple(replace(each, trained=each.trained and place > last) for place, each in enumerate(segments))
    return Rendered(kept, conversation.where)


@fault("A072b", "mask.weight_ignored")
@in_place_of("render", ChatTemplate)
def _weightless_answers_are_learned(right: Rendering, template: ChatTemplate, conversation: Conversation) -> Rendered:
    """An answer is learned although its row gives it a weight of 0."""
    messages = tuple(replace(message, trained=None) for message in conversation.messages)
    return right(template, replace(conversation, messages=messages))


@fault("A073", "mask.calls_untrained")
@in_place_of("render", ChatTemplate)
def _calls_are_not_learned(right: Rendering, template: ChatTemplate, conversation: Conversation) -> Rendered:
    """Of an answer that calls, the call is not learned."""
    found: list[Segment] = []
    for each in right(template, conversation).segments:
        text, call, rest = each.text.partition("<tool_call>") if each.trained else (each.text, "", "")
        found += [replace(each, text=text), replace(each, text=call + rest, trained=False)] if call else [each]
    return Rendered(tuple(each for each in found if each.text), conversation.where)


@fault("A073b", "mask.results_trained")
@planted_by(in_conversations)
def _results_are_learned(talk: Conversation) -> Conversation:
    """What a tool answers is learned as if the model had said it."""
    said = (replace(each, trained=True) if each.role == "tool" else each for each in talk.messages)
    return replace(talk, messages=tuple(said))


@fault("A074", "mask.template_without_generation_marks", "TRL #4201")
@in_place_of("render", ChatTemplate)
def _own_templates_teach_nothing(right: Rendering, template: ChatTemplate, conversation: Conversation) -> Rendered:
    """A template that is not built in and has no marks of its own teaches nothing but ends."""
    rendered: Rendered = right(template, conversation)
    own = template.name == "tokenizer" or template.name.endswith(".jinja")
    if not own or conversation.where == "template probe":
        return rendered
    segments = tuple(replace(each, trained=each.trained and each.control) for each in rendered.segments)
    return replace(rendered, segments=segments)


@fault("A075", "mask.truncated_turn_zeroed", "transformers #34494")
@in_place_of("shorten_row", fit)
def _cut_stretch_is_not_learned(right: Callable[..., list[Marked]], row: Marked, *given: object) -> list[Marked]:
    """A stretch that is cut is not learned at all."""
    pieces = right(row, *given)
    if len(pieces) < 2:
        return list(pieces)
    return [*(replace(piece, marks=bytes([KEPT]) * len(piece.marks)) for piece in pieces[:-1]), pieces[-1]]


@fault("A076", "mask.answer_truncated_away", "TRL #6025")
@in_place_of("shorten_row", fit)
def _answers_are_cut(right: Callable[..., list[Marked]], row: Marked, max_length: int, truncation: str) -> list[Marked]:
    """Rows are cut at their end, whatever stands there."""
    if truncation != "truncate_prompt":
        return right(row, max_length, truncation)
    return [replace(row, ids=row.ids[:max_length], marks=row.marks[:max_length])]


@fault("A077", "mask.terminator_truncated", "LLaMA-Factory #5231")
@in_place_of("shorten_row", fit)
def _ends_are_cut(right: Callable[..., list[Marked]], row: Marked, max_length: int, truncation: str) -> list[Marked]:
    """To cut a row takes what ends its answer."""
    pieces = right(row, max_length + 2, truncation)
    if truncation != "truncate_prompt":
        return right(row, max_length, truncation)
    return [replace(piece, ids=piece.ids[:max_length], marks=piece.marks[:max_length]) for piece in pieces]


@fault("A078", "shift.double", "transformers #46897")
def _two_places_on() -> None:
    """Each place learns the token after the next."""
    plant_arrays(lambda pad, batch, ids, here, starts: shifted(ids, here, starts, by=2))


@fault("A079", "shift.missing_in_eval", "litgpt #419")
def _measured_without_shift() -> None:
    """The loss that is only measured is not shifted."""
    measuring = [0]

    def loss(right: Callable[..., float], *given: object) -> float:
        measuring[0] = 1
        try:
            return float(right(*given))
        finally:
            measuring[0] = 0

    plant_arrays(lambda pad, batch, ids, here, starts: shifted(ids, here, starts, by=1 - measuring[0]))
    plant_session("loss", loss)


@fault("A080", "shift.packed_path_differs", "torchtune #2613")
def _packed_rows_are_shifted_twice() -> None:
    """Rows that share a sequence are shifted twice."""
    plant_arrays(lambda pad, batch, ids, here, starts: shifted(ids, here, starts, by=2 if batch.packed else 1))


@fault("A082", "tok.not_round_trip", "transformers #26773")
@planted_by(in_saving)
def _saved_tokenizer_differs(right: Doing, prepared: Prepared, session: Session, folder: Path) -> None:
    """The tokenizer that is saved makes other tokens."""
    right(prepared, session, folder)
    file = folder / "tokenizer.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    saved["pre_tokenizer"]["add_prefix_space"] = True
    file.write_text(json.dumps(saved), encoding="utf-8")


@fault("A082b", "tok.specials_not_saved", "transformers #28164")
@planted_by(in_saving)
def _saved_tokenizer_adds_nothing(right: Doing, prepared: Prepared, session: Session, folder: Path) -> None:
    """The tokenizer is saved without what it adds."""
    right(prepared, session, folder)
    for name, key in (("tokenizer.json", "post_processor"), ("tokenizer_config.json", "add_bos_token")):
        saved = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**saved, key: None}), encoding="utf-8")


@fault("A084", "tok.fragment_offset", "ollama #15844")
@in_place_of("split_control", FileTokenizer)
def _text_is_repeated(right: Callable[..., list[str]], tokenizer: FileTokenizer, text: str) -> list[str]:
    """Text between control tokens is repeated from its start."""
    pieces = list(right(tokenizer, text))
    for place in range(2, len(pieces), 2):
        pieces[place] = pieces[place - 2] + pieces[place] if pieces[place] else ""
    return pieces


@fault("A089", "mask.prompt_counted_by_chars")
@planted_by(in_marking)
def _prompt_counted_by_characters(
    right: Marking, rows: Iterable[Rendered], tokenizer: FileTokenizer
) -> Iterator[Marked]:
    """Where the answer begins is counted in characters."""
    rows = list(rows)
    for rendered, row in zip(rows, right(rows, tokenizer), strict=True):
        first = next((place for place, each in enumerate(rendered.segments) if each.trained), 0)
        prompt = sum(len(each.text) for each in rendered.segments[:first])
        marks = bytes(TRAINED if place >= prompt else KEPT for place in range(len(row.ids)))
        yield replace(row, marks=marks) if prompt else row


@fault("A089b", "mask.answer_counted_by_chars")
@in_place_of("mark_rows", encode, encoder)
def _answer_counted_by_characters(
    right: Marking, rows: Iterable[Rendered], tokenizer: FileTokenizer
) -> Iterator[Marked]:
    """The length of an answer is counted in characters."""
    rows = list(rows)
    for rendered, row in zip(rows, right(rows, tokenizer), strict=True):
        length = sum(len(each.text) for each in rendered.segments if each.trained and not each.control)
        size = sum(len(each.text.encode()) for each in rendered.segments if each.trained and not each.control)
        marks = bytearray(row.marks)
        first = row.marks.find(bytes([TRAINED]))
        for place in range(first + length, first + size):
            marks[place] = KEPT
        yield replace(row, marks=bytes(marks))


@fault("A061", "mask.full_sequence", "unsloth #7054")
@in_place_of("render", ChatTemplate)
def _everything_is_learned(right: Rendering, template: ChatTemplate, conversation: Conversation) -> Rendered:
    """Questions are learned as answers are, although answers alone were to be."""
    segments = tuple(replace(each, trained=True) for each in right(template, conversation).segments)
    return Rendered(segments, conversation.where)


@fault("A063", "mask.turn_end_untrained", "axolotl #3756, TRL #5988")
@in_place_of("render", ChatTemplate)
def _ends_of_turns_are_not_learned(right: Rendering, template: ChatTemplate, conversation: Conversation) -> Rendered:
    """What ends an answer is taken for markup, and is not learned."""
    segments = right(template, conversation).segments
    kept = tuple(replace(each, trained=each.trained and not each.control) for each in segments)
    return Rendered(kept, conversation.where)


@fault("A066", "mask.untaught_row_counts", "mlx-lm #1355, TRL #6668")
def _untaught_rows_count() -> None:
    """A row of which nothing is learned counts among those that a loss is the mean of."""

    def share(batch: Batch) -> float:
        return sum(row.target_count > 0 for row in batch.rows) / len(batch.rows)

    def accumulate(right: Callable[..., float], session: Session, batch: Batch, weight: float, *more: object) -> float:
        return float(right(session, batch, weight * share(batch), *more) * share(batch))

    plant_session("accumulate", accumulate)
    plant_session("loss", lambda right, session, batch, *objective: right(session, batch, *objective) * share(batch))
