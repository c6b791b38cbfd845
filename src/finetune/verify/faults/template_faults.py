"""Faults of prompt templates: marks twice or never, words lost, added or eaten, prompts that training never saw."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path

from finetune.chat import encode, encoder
from finetune.chat.catalog import TemplateSource
from finetune.chat.encode import Marked
from finetune.chat.render import ChatTemplate
from finetune.chat.tokenizer import FileTokenizer
from finetune.data.shape import ShapedRows
from finetune.ports import Session
from finetune.records import Conversation, Document, Message, Rendered, Row, Segment
from finetune.training import prepare
from finetune.training.prepare import Prepared
from finetune.verify.faults.fault import fault, plant

Marking = Callable[..., Iterator[Marked]]
Messages = tuple[Message, ...]


def in_marking(wrong: Marking) -> None:
    """Plant it where rows become marked ids: for training, and for prompts."""
    for room in (encoder, encode):
        plant(room, "mark_rows", wrong)


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


@fault("A040", "tmpl.double_bos", real="llama-cpp-python #1501", what="template and tokenizer both put a mark in front")
def _two_beginnings() -> None:
    def wrong(right: Marking, rows: Iterable[Rendered], tokenizer: FileTokenizer) -> Iterator[Marked]:
        for row in right(rows, tokenizer):
            begun = bool(tokenizer.bos) and len(row.ids) > 0 and tokenizer.adds_bos
            templated = tokenizer.chat_template is not None and "bos_token" in tokenizer.chat_template
            if begun and templated and tokenizer.bos_id is not None:
                row = replace(row, ids=(tokenizer.bos_id, *row.ids), marks=bytes([encode.KEPT]) + row.marks)
            yield row

    in_marking(wrong)


@fault("A041", "tmpl.bos_lost_by_the_fix", real="unsloth #10312", what="nobody puts a begin-of-text token in front")
def _no_beginning() -> None:
    plant(FileTokenizer, "prepends_bos", lambda right, *given: False)


@fault(
    "A042",
    "tmpl.bos_rule_from_wrong_key",
    real="litgpt #1328",
    what="that there is a token is taken for that it is added",
)
def _beginning_by_name() -> None:
    plant(FileTokenizer, "prepends_bos", lambda right, tokenizer, settings: bool(settings.get("bos_token")))


@fault(
    "A044",
    "tmpl.train_ne_shipped",
    real="axolotl #1832",
    what="the text to train on has a line break less than the shipped",
)
def _training_text_differs() -> None:
    def wrong(right: Callable[..., Rendered], template: ChatTemplate, conversation: Conversation) -> Rendered:
        segments = list(right(template, conversation).segments)
        for place, (markup, answer) in enumerate(pairwise(segments)):
            if answer.trained and not markup.trained:
                segments[place] = replace(markup, text=markup.text.rstrip("\n"))
        return Rendered(tuple(segments), conversation.where)

    plant(ChatTemplate, "render", wrong)


@fault(
    "A044b", "tmpl.asked_with_a_space", real="", what="a prompt to ask with ends in a space more than one to train on"
)
def _asked_with_a_space() -> None:
    def wrong(right: Callable[..., Rendered], template: ChatTemplate, conversation: Conversation) -> Rendered:
        rendered: Rendered = right(template, conversation)
        return replace(rendered, segments=(*rendered.segments, Segment(" ", "markup", trained=False, control=True)))

    plant(ChatTemplate, "render_prompt", wrong)


@fault("A045", "tmpl.separator_newline", real="axolotl #922", what="turns are set apart by a line break too many")
def _one_line_break_more() -> None:
    in_source("'<|im_end|>' + '\\n'", "'<|im_end|>' + '\\n\\n'")


@fault("A045b", "tmpl.trailing_space", real="unsloth #6008", what="what precedes an answer ends in a space")
def _trailing_space() -> None:
    in_source("'### Response:\\n'", "'### Response: \\n'")


@fault("A046", "tmpl.system_dropped", real="torchtune #1778", what="the system's words are left out")
def _no_system() -> None:
    def wrong(right: Callable[..., Messages], template: ChatTemplate, conversation: Conversation) -> Messages:
        return tuple(message for message in right(template, conversation) if message.role != "system")

    plant(ChatTemplate, "fit_messages", wrong)


@fault(
    "A046b",
    "tmpl.system_dropped_in_dialogues",
    real="LLaMA-Factory e73422237",
    what="the system's words are left out of conversations of several turns",
)
def _no_system_in_dialogues() -> None:
    def wrong(right: Callable[..., Messages], template: ChatTemplate, conversation: Conversation) -> Messages:
        messages = right(template, conversation)
        answers = sum(message.role == "assistant" for message in messages)
        return tuple(message for message in messages if message.role != "system" or answers < 2)

    plant(ChatTemplate, "fit_messages", wrong)


def _with_default_system(messages: Sequence[Message]) -> Messages:
    told = any(message.role == "system" for message in messages)
    return (*([] if told else [Message("system", "You are a helpful assistant.")]), *messages)


@fault(
    "A047",
    "tmpl.default_system_injected",
    real="alignment-handbook #117",
    what="a prompt has system words that nobody wrote",
)
def _system_in_prompts() -> None:
    def wrong(right: Callable[..., Rendered], template: ChatTemplate, conversation: Conversation) -> Rendered:
        told: Rendered = right(template, replace(conversation, messages=_with_default_system(conversation.messages)))
        return told

    plant(ChatTemplate, "render_prompt", wrong)


@fault("A047b", "tmpl.default_system_everywhere", real="", what="every conversation has system words that nobody wrote")
def _system_everywhere() -> None:
    plant(ChatTemplate, "fit_messages", lambda right, *given: _with_default_system(right(*given)))


@fault("A049", "tmpl.not_saved", real="LLaMA-Factory #8399", what="the template does not travel with the adapter")
def _template_stays() -> None:
    def wrong(right: Callable[..., None], prepared: Prepared, session: Session, folder: Path) -> None:
        right(prepared, session, folder)
        (folder / "chat_template.jinja").unlink()

    in_saving(wrong)


@fault(
    "A049b",
    "tmpl.own_saved",
    real="LLaMA-Factory #5836",
    what="the model's own template travels instead",
)
def _own_template_travels() -> None:
    def wrong(right: Callable[..., None], prepared: Prepared, session: Session, folder: Path) -> None:
        right(prepared, session, folder)
        own = prepared.encoder.tokenizer.chat_template
        assert own is not None
        (folder / "chat_template.jinja").write_text(own, encoding="utf-8")

    in_saving(wrong)


@fault("A050", "tmpl.sentinel_leak", real="unsloth #6531", what="a placeholder of the template's stays in the text")
def _placeholder_stays() -> None:
    in_source("'<|im_start|>' + message['role'] + '\\n'", "'<|im_start|>' + message['role'] + '\\n{INPUT}'")


@fault("A050b", "tmpl.braces_eaten", real="", what="the user's braces are read as places to fill in")
def _braces_are_filled() -> None:
    def wrong(right: Callable[..., Messages], template: ChatTemplate, conversation: Conversation) -> Messages:
        texts: Mapping[str, str] = {"{}": "", "{{": "{", "}}": "}"}
        messages = []
        for message in right(template, conversation):
            content = message.content
            for old, new in texts.items():
                content = content.replace(old, new)
            messages.append(replace(message, content=content))
        return tuple(messages)

    plant(ChatTemplate, "fit_messages", wrong)


@fault(
    "A052", "tmpl.content_becomes_control", real="transformers #29279", what="words of the data become control tokens"
)
def _words_become_control() -> None:
    def wrong(right: Callable[..., None], tokenizer: FileTokenizer, folder: Path) -> None:
        right(tokenizer, folder)
        tokenizer._content.encode_special_tokens = False

    plant(FileTokenizer, "__init__", wrong)


@fault(
    "A052b",
    "tmpl.content_is_markup",
    real="ollama #15931",
    what="what is said is searched for control tokens as markup is",
)
def _words_are_markup() -> None:
    def wrong(right: Marking, rows: Iterable[Rendered], tokenizer: FileTokenizer) -> Iterator[Marked]:
        markup = (replace(row, segments=tuple(replace(each, control=True) for each in row.segments)) for row in rows)
        yield from right(markup, tokenizer)

    in_marking(wrong)


@fault(
    "A054", "tmpl.standard_rows_untemplated", real="TRL #3140", what="rows of prompt and completion bypass the template"
)
def _bare_rows() -> None:
    def wrong(right: Callable[..., ShapedRows], rows: Sequence[Row]) -> ShapedRows:
        bare = {row.where for row in rows if isinstance(row.values.get("prompt"), str)}
        shaped = right(rows)
        return replace(
            shaped,
            examples=tuple(
                _bare(each) if isinstance(each, Conversation) and each.where in bare else each
                for each in shaped.examples
            ),
        )

    plant(prepare, "shape_rows", wrong)


def _bare(example: Conversation) -> Document:
    return Document("".join(message.content for message in example.messages), example.where)


@fault("A055", "tmpl.eos_not_appended", real="TRL #1623", what="plain text gets no end")
def _text_without_end() -> None:
    def wrong(right: Callable[..., Rendered], *given: object) -> Rendered:
        rendered: Rendered = right(*given)
        return replace(rendered, segments=rendered.segments[:1])

    plant(ChatTemplate, "render_document", wrong)
