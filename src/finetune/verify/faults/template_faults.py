"""Faults of prompt templates: marks twice or never, words lost, added or eaten, prompts that training never saw."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

from finetune.chat import encode, encoder
from finetune.chat.catalog import TemplateSource
from finetune.chat.encode import Marked
from finetune.chat.encoder import Encoder
from finetune.chat.render import ChatTemplate
from finetune.chat.tokenizer import ContentTokenizer, FileTokenizer
from finetune.data.shape import Example, ShapedRows
from finetune.errors import TemplateError
from finetune.ports import Session
from finetune.records import Conversation, Document, Message, Rendered, Row, Segment
from finetune.training import rows as reading
from finetune.training.prepare import Prepared
from finetune.verify.faults.fault import fault, in_place_of, plant, planted_by

Marking = Callable[..., Iterator[Marked]]
Messages = tuple[Message, ...]
Rendering = Callable[..., Rendered]
Fitting = Callable[..., Messages]
Shaping = Callable[..., ShapedRows]
Refusals = list[tuple[str, TemplateError]]


def in_marking(wrong: Marking) -> None:
    """Plant it where rows become marked ids: for training, and for prompts."""
    for room in (encoder, encode):
        plant(room, "mark_rows", wrong)


def in_conversations(wrong: Callable[[Conversation], Conversation]) -> None:
    """Plant it where rows become conversations: another conversation."""

    def shaped(right: Shaping, *given: object, **named: object) -> ShapedRows:
        found = right(*given, **named)
        others = (wrong(each) if isinstance(each, Conversation) else each for each in found.examples)
        return replace(found, examples=tuple(others))

    plant(reading, "shape_rows", shaped)


def without(message: Message, key: str) -> Message:
    """The message without one of the things beside its text."""
    more = json.loads(message.more or "{}")
    more.pop(key, None)
    return replace(message, more=json.dumps(more, ensure_ascii=False) if more else "")


def in_pieces(begins: Callable[[Segment, Segment], bool]) -> None:
    """Plant that a row is encoded in pieces; it is asked of two segments whether the latter begins one."""

    def marked(right: Marking, rows: Iterable[Rendered], tokenizer: FileTokenizer) -> Iterator[Marked]:
        for row in rows:
            starts = [0, *(begins(*pair) for pair in pairwise(row.segments))]
            numbered = zip(accumulate(starts), row.segments, strict=True)
            groups = (tuple(each for _, each in group) for _, group in groupby(numbered, key=lambda pair: pair[0]))
            pieces = list(right([Rendered(group, row.where) for group in groups], tokenizer))
            ids = tuple(token for piece in pieces for token in piece.ids)
            marks = b"".join(piece.marks for piece in pieces)
            yield Marked(ids, marks, row.where, pieces[0].document)

    in_marking(marked)


def in_source(old: str, new: str) -> None:
    """Plant another text in every template."""

    def wrong(right: Callable[..., TemplateSource], *given: object) -> TemplateSource:
        source = right(*given)
        return replace(source, jinja=source.jinja.replace(old, new))

    plant(encoder, "find_template", wrong)


def in_saving(wrong: Callable[..., None]) -> None:
    """Plant it where what was trained is saved."""
    for room in ("finetune.train", "finetune.verify.trainers.ours"):
        plant(import_module(room), "save_trained", wrong)


@fault("A040", "tmpl.double_bos", "llama-cpp-python #1501")
@planted_by(in_marking)
def _two_beginnings(right: Marking, rows: Iterable[Rendered], tokenizer: FileTokenizer) -> Iterator[Marked]:
    """Template and tokenizer both put a mark in front."""
    for row in right(rows, tokenizer):
        begun = bool(tokenizer.bos) and len(row.ids) > 0 and tokenizer.adds_bos
        templated = tokenizer.chat_template is not None and "bos_token" in tokenizer.chat_template
        if begun and templated and tokenizer.bos_id is not None:
            row = replace(row, ids=(tokenizer.bos_id, *row.ids), marks=bytes([encode.KEPT]) + row.marks)
        yield row


@fault("A041", "tmpl.bos_lost_by_the_fix", "unsloth #10312")
def _no_beginning() -> None:
    """Nobody puts a begin-of-text token in front."""
    plant(FileTokenizer, "prepends_bos", lambda right, *given: False)


@fault("A042", "tmpl.bos_rule_from_wrong_key", "litgpt #1328")
def _beginning_by_name() -> None:
    """That there is a token is taken for that it is added."""
    plant(FileTokenizer, "prepends_bos", lambda right, tokenizer, settings: bool(settings.get("bos_token")))


@fault("A044", "tmpl.train_ne_shipped", "axolotl #1832")
@in_place_of("render", ChatTemplate)
def _training_text_differs(right: Rendering, template: ChatTemplate, conversation: Conversation) -> Rendered:
    """The text to train on has a line break less than the shipped."""
    segments = list(right(template, conversation).segments)
    for place, (markup, answer) in enumerate(pairwise(segments)):
        if answer.trained and not markup.trained:
            segments[place] = replace(markup, text=markup.text.rstrip("\n"))
    return Rendered(tuple(segments), conversation.where)


@fault("A044b", "tmpl.asked_with_a_space")
@in_place_of("render_prompt", ChatTemplate)
def _asked_with_a_space(right: Rendering, template: ChatTemplate, conversation: Conversation) -> Rendered:
    """A prompt to ask with ends in a space more than one to train on."""
    rendered: Rendered = right(template, conversation)
    return replace(rendered, segments=(*rendered.segments, Segment(" ", "markup", trained=False, control=True)))


@fault("A045", "tmpl.separator_newline", "axolotl #922")
def _one_line_break_more() -> None:
    """Turns are set apart by a line break too many."""
    in_source("'<|im_end|>' + '\\n'", "'<|im_end|>' + '\\n\\n'")


@fault("A045b", "tmpl.trailing_space", "unsloth #6008")
def _trailing_space() -> None:
    """What precedes an answer ends in a space."""
    in_source("'### Response:\\n'", "'### Response: \\n'")


@fault("A046", "tmpl.system_dropped", "torchtune #1778")
@in_place_of("fit_messages", ChatTemplate)
def _no_system(right: Fitting, template: ChatTemplate, conversation: Conversation) -> Messages:
    """The system's words are left out."""
    return tuple(message for message in right(template, conversation) if message.role != "system")


@fault("A046b", "tmpl.system_dropped_in_dialogues", "LLaMA-Factory e73422237")
@in_place_of("fit_messages", ChatTemplate)
def _no_system_in_dialogues(right: Fitting, template: ChatTemplate, conversation: Conversation) -> Messages:
    """The system's words are left out of conversations of several turns."""
    messages = right(template, conversation)
    answers = sum(message.role == "assistant" for message in messages)
    return tuple(message for message in messages if message.role != "system" or answers < 2)


def _with_default_system(messages: Sequence[Message]) -> Messages:
    has_system = any(message.role == "system" for message in messages)
    return (*([] if has_system else [Message("system", "You are a helpful assistant.")]), *messages)


@fault("A047", "tmpl.default_system_injected", "alignment-handbook #117")
@in_place_of("render_prompt", ChatTemplate)
def _system_in_prompts(right: Rendering, template: ChatTemplate, conversation: Conversation) -> Rendered:
    """A prompt has system words that nobody wrote."""
    rendered: Rendered = right(template, replace(conversation, messages=_with_default_system(conversation.messages)))
    return rendered


@fault("A047b", "tmpl.default_system_everywhere")
def _system_everywhere() -> None:
    """Every conversation has system words that nobody wrote."""
    plant(ChatTemplate, "fit_messages", lambda right, *given: _with_default_system(right(*given)))


@fault("A049", "tmpl.not_saved", "LLaMA-Factory #8399")
@planted_by(in_saving)
def _template_stays(right: Callable[..., None], prepared: Prepared, session: Session, folder: Path) -> None:
    """The template does not travel with the adapter."""
    right(prepared, session, folder)
    (folder / "chat_template.jinja").unlink()


@fault("A049b", "tmpl.own_saved", "LLaMA-Factory #5836")
@planted_by(in_saving)
def _own_template_travels(right: Callable[..., None], prepared: Prepared, session: Session, folder: Path) -> None:
    """The model's own template travels instead."""
    right(prepared, session, folder)
    own = prepared.encoder.tokenizer.chat_template
    assert own is not None
    (folder / "chat_template.jinja").write_text(own, encoding="utf-8")


@fault("A050", "tmpl.sentinel_leak", "unsloth #6531")
def _placeholder_stays() -> None:
    """A placeholder of the template's stays in the text."""
    in_source("'<|im_start|>' + message['role'] + '\\n'", "'<|im_start|>' + message['role'] + '\\n{INPUT}'")


@fault("A050b", "tmpl.braces_eaten")
@in_place_of("fit_messages", ChatTemplate)
def _braces_are_filled(right: Fitting, template: ChatTemplate, conversation: Conversation) -> Messages:
    """The user's braces are read as places to fill in."""
    texts: Mapping[str, str] = {"{}": "", "{{": "{", "}}": "}"}
    messages = []
    for message in right(template, conversation):
        content = message.content
        for old, new in texts.items():
            content = content.replace(old, new)
        messages.append(replace(message, content=content))
    return tuple(messages)


@fault("A052", "tmpl.content_becomes_control", "transformers #29279")
@in_place_of("content", ContentTokenizer)
def _words_become_control(right: Callable[..., Any], tokenizer: ContentTokenizer) -> Any:
    """Words of the data become control tokens."""
    found = right(tokenizer)
    found.encode_special_tokens = False
    return found


@fault("A052b", "tmpl.content_is_markup", "ollama #15931")
@planted_by(in_marking)
def _words_are_markup(right: Marking, rows: Iterable[Rendered], tokenizer: FileTokenizer) -> Iterator[Marked]:
    """What is said is searched for control tokens as markup is."""
    markup = (replace(row, segments=tuple(replace(each, control=True) for each in row.segments)) for row in rows)
    yield from right(markup, tokenizer)


@fault("A054", "tmpl.standard_rows_untemplated", "TRL #3140")
@in_place_of("shape_rows", reading)
def _bare_rows(right: Shaping, rows: Sequence[Row], *given: object, **named: object) -> ShapedRows:
    """Rows of prompt and completion bypass the template."""
    bare = {row.where for row in rows if isinstance(row.values.get("prompt"), str)}
    shaped, examples = right(rows, *given, **named), list[Conversation | Document]()
    for each in shaped.examples:
        if isinstance(each, Conversation) and each.where in bare:
            examples.append(Document("".join(message.content for message in each.messages), each.where))
        else:
            examples.append(each)
    return replace(shaped, examples=tuple(examples))


@fault("A055", "tmpl.eos_not_appended", "TRL #1623")
@in_place_of("render_document", ChatTemplate)
def _text_without_end(right: Rendering, *given: object) -> Rendered:
    """Plain text gets no end."""
    rendered: Rendered = right(*given)
    return replace(rendered, segments=rendered.segments[:1])


@fault("A052c", "tmpl.system_is_markup")
@planted_by(in_marking)
def _system_is_markup(right: Marking, rows: Iterable[Rendered], tokenizer: FileTokenizer) -> Iterator[Marked]:
    """What the system says, and what tools answer, is searched for control tokens as markup is."""

    def opened(segment: Segment) -> Segment:
        return replace(segment, control=segment.control or segment.role in ("system", "tool"))

    yield from right((replace(row, segments=tuple(map(opened, row.segments))) for row in rows), tokenizer)


@fault("A056", "tmpl.thoughts_dropped")
@planted_by(in_conversations)
def _thoughts_are_dropped(talk: Conversation) -> Conversation:
    """What is thought before an answer is left out."""
    return replace(talk, messages=tuple(without(message, "reasoning_content") for message in talk.messages))


@fault("A056b", "tmpl.tools_dropped")
@planted_by(in_conversations)
def _tools_are_dropped(talk: Conversation) -> Conversation:
    """The tools of a row, and with them its calls, are left out."""
    return replace(talk, tools="", messages=tuple(without(message, "tool_calls") for message in talk.messages))


@fault("A057", "tmpl.parts_printed")
@in_place_of("shape_rows", reading)
def _parts_are_printed(right: Shaping, rows: Sequence[Row], *given: object, **named: object) -> ShapedRows:
    """Content in parts is printed as the list that it is."""

    def printed(message: Mapping[str, object]) -> dict[str, object]:
        content = message.get("content")
        return {**message, "content": str(content) if isinstance(content, list) else content}

    return right(
        [
            replace(row, values={**row.values, "messages": [printed(each) for each in row.values["messages"]]})
            if "messages" in row.values
            else row
            for row in rows
        ],
        *given,
        **named,
    )


@fault("A058", "tmpl.refused_row_refuses_all")
@in_place_of("render", Encoder)
def _refused_row_refuses_all(
    right: Callable[..., tuple[list[Rendered], Refusals]], owner: Encoder, examples: Sequence[Example], **named: object
) -> tuple[list[Rendered], Refusals]:
    """One row that the template refuses ends everything."""
    rendered, refused = right(owner, examples, **named)
    for _, error in refused:
        raise error
    return rendered, refused


@fault("A058b", "tmpl.refused_row_uncounted")
@in_place_of("render", Encoder)
def _refused_rows_are_not_counted(
    right: Callable[..., tuple[list[Rendered], Refusals]], owner: Encoder, examples: Sequence[Example], **named: object
) -> tuple[list[Rendered], Refusals]:
    """Rows that the template refuses are missing without a word."""
    return right(owner, examples, **named)[0], []


@fault("A059", "tmpl.variable_ignored")
@planted_by(in_conversations)
def _variables_are_passed_over(talk: Conversation) -> Conversation:
    """What a row sets for its template is passed over."""
    return replace(talk, variables="")


@fault("A083", "tok.pieces_one_by_one")
def _pieces_one_by_one() -> None:
    """Each stretch of a row is encoded by itself, with the space that a tokenizer puts before a text."""
    in_pieces(lambda before, after: True)


@fault("A083b", "tok.cut_before_every_answer")
def _every_answer_is_cut_off() -> None:
    """The text is cut before earlier answers, too, as no server cuts history."""
    in_pieces(lambda before, after: after.trained and not before.trained)


@fault("A043", "tmpl.leading_token_dropped", "TRL #6433")
@planted_by(in_marking)
def _first_token_is_dropped(right: Marking, rows: Iterable[Rendered], tokenizer: FileTokenizer) -> Iterator[Marked]:
    """The first token of the text is taken for one that a tokenizer put there, and taken away."""
    for row in right(rows, tokenizer):
        yield replace(row, ids=row.ids[1:], marks=row.marks[1:])


@fault("A056c", "tmpl.thoughts_corrupted", "TRL #6363")
@planted_by(in_conversations)
def _thoughts_lose_a_letter(talk: Conversation) -> Conversation:
    """What is thought before an answer lacks its last letter."""

    def cut(message: Message) -> Message:
        more = json.loads(message.more or "{}")
        if thought := more.get("reasoning_content"):
            more["reasoning_content"] = thought[:-1]
        return replace(message, more=json.dumps(more, ensure_ascii=False) if more else "")

    return replace(talk, messages=tuple(map(cut, talk.messages)))


@fault("A057b", "tmpl.parts_lost")
@in_place_of("shape_rows", reading)
def _other_parts_are_lost(right: Shaping, rows: Sequence[Row], *given: object, **named: object) -> ShapedRows:
    """Of content in parts those that are no text are left out, and the rest is trained on."""

    def text(part: Any) -> bool:
        return not isinstance(part, dict) or part.get("type") == "text"

    def bare(message: Any) -> Any:
        content = message.get("content")
        return {**message, "content": [*filter(text, content)]} if isinstance(content, list) else message

    def without_parts(row: Row) -> Row:
        messages = row.values.get("messages")
        return row if messages is None else replace(row, values={**row.values, "messages": [*map(bare, messages)]})

    return right([without_parts(row) for row in rows], *given, **named)
