"""Renders conversations into segments: markup, somebody's text, and what the model learns to say.

Every template, built in or shipped with a model, is a Jinja template and takes the same path. Each message is
replaced by a marker, the template is rendered, and the result is cut at the markers; so the place of every message
is known and nothing is searched for. The cut text is then compared with what the template makes of the real messages.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Literal

from finetune.chat.budget import DAY
from finetune.chat.catalog import CATALOG, TemplateSource
from finetune.chat.sandbox import TemplateStoppedError, compile_template, variables_read
from finetune.errors import TemplateError
from finetune.records import Conversation, Document, Message, Rendered, Segment

_MARKER = re.compile("\ue000([0-9]+)\ue001")
RESERVED = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token", "tools", "documents"})
"""Variables of a template that every program sets by itself."""
Variable = bool | int | float | str
TrainOn = Literal["all", "last"]

_LOOKED_AT = 8
"""So many answers of a conversation are looked at one by one, however much they repeat each other."""


class ChatTemplate:
    """A compiled template for one tokenizer: `render` for training, `render_prompt` for asking; they always agree.

    Args:
        source: the template.
        control_tokens: every control token of the tokenizer, such as `<|im_end|>`.
        bos: the begin-of-text token, or "" for a model without one.
        eos: the end-of-text token.
        today: what a template prints that asks for the date.
        train_on: all answers of a conversation, or the last alone.
    """

    def __init__(
        self,
        source: TemplateSource,
        control_tokens: Sequence[str],
        *,
        bos: str,
        eos: str,
        today: date = DAY,
        train_on: TrainOn = "all",
    ) -> None:
        missing = [token for token in source.control_tokens if token not in control_tokens]
        if missing:
            raise TemplateError(
                f"template {source.name!r} needs control tokens that this tokenizer lacks: {', '.join(missing)}",
                hint="choose template alpaca, or tokenizer for the model's own",
            )
        self.name = source.name
        self._variables = {"bos_token": bos, "eos_token": eos}
        self._today = today
        self._train_on: TrainOn = train_on
        self._source, self._control_tokens = source, control_tokens
        self._jinja: Callable[..., str] = compile_template(source.name, source.jinja)
        ordered = sorted(control_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, ordered)) if ordered else "(?!)")
        self._eos = eos
        self._skeletons: dict[tuple[tuple[str, ...], bool], str] = {}
        self._spoken: dict[tuple[str, ...], list[int]] = {}
        self._said = re.compile("(?!)")
        self._said = self._tokens_said(source.jinja, {bos, eos})

    def render(self, conversation: Conversation) -> Rendered:
        """The conversation as training text: answers and their terminators are marked trained.

        Raises:
            TemplateError: the template refuses the roles, rewrites the text, loses a message, or would ask at serve
                time with another prompt than the one trained on.
        """
        return self._assemble(conversation, asking=False)

    def render_prompt(self, conversation: Conversation) -> Rendered:
        """The conversation as a question to the model: it ends where the answer would begin.

        Earlier answers keep their own segments, so that they become the same tokens as in training.

        Raises:
            TemplateError: as `render`.
        """
        return self._assemble(conversation, asking=True)

    def _assemble(self, conversation: Conversation, *, asking: bool) -> Rendered:
        messages = self.fit_messages(conversation)
        where = conversation.where
        pieces = self._cut(messages, where, add_generation_prompt=asking)
        spoken = iter(() if asking else self._lengths_spoken(messages, pieces, where))
        last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=-1)
        learned = range(0) if asking else range(last if self._train_on == "last" else 0, last + 1)
        segments: list[Segment] = []
        for index, (markup, text) in enumerate(zip(pieces[0::2], [*pieces[1::2], ""], strict=True)):
            role = messages[index].role if index < len(messages) else "markup"
            answered = index > 0 and messages[index - 1].role == "assistant"
            terminator = self._terminator(markup, where) if answered else ""
            segments.append(Segment(terminator, "assistant", trained=index - 1 in learned, control=True))
            if role == "assistant":
                begin = len(markup) - next(spoken, 0)
                segments.append(Segment(markup[len(terminator) : begin], "markup", trained=False, control=True))
                segments.append(Segment(markup[begin:], "assistant", trained=index in learned, control=True))
                segments += self._answer(text, trained=index in learned)
            else:
                segments.append(Segment(markup[len(terminator) :], "markup", trained=False, control=True))
                segments.append(Segment(text, role, trained=False, control=False))
        return Rendered(tuple(segment for segment in segments if segment.text), where)

    def _answer(self, text: str, *, trained: bool) -> Iterator[Segment]:
        """An answer, in which tokens such as `<think>` are meant: the model must learn to say them."""
        end = 0
        for found in self._said.finditer(text):
            yield Segment(text[end : found.start()], "assistant", trained=trained, control=False)
            yield Segment(found.group(), "assistant", trained=trained, control=True)
            end = found.end()
        yield Segment(text[end:], "assistant", trained=trained, control=False)

    def render_document(self, document: Document) -> Rendered:
        """Plain text as training text: all of it is trained, and the end-of-text token after it."""
        text = Segment(document.text, "text", trained=True, control=False)
        return Rendered((text, Segment(self._eos, "text", trained=True, control=True)), document.where)

    def terminators(self) -> tuple[str, ...]:
        """The control tokens that end an answer: what the model is taught to stop with, so where serving must stop."""
        probe = Conversation((Message("user", "question"), Message("assistant", "answer")), "template probe")
        segments = self.render(probe).segments
        answer = max(index for index, segment in enumerate(segments) if segment.trained and not segment.control)
        ending = "".join(segment.text for segment in segments[answer + 1 :] if segment.trained)
        return tuple(dict.fromkeys(self._control.findall(ending)))

    def fit_messages(self, conversation: Conversation) -> tuple[Message, ...]:
        """The messages with an alpaca input joined to its instruction, for templates that know no such role."""
        if self.name == "alpaca" or all(message.role != "input" for message in conversation.messages):
            return conversation.messages
        joined: list[Message] = []
        for message in conversation.messages:
            if message.role == "input":
                joined[-1] = Message("user", joined[-1].content + "\n\n" + message.content)
            else:
                joined.append(message)
        return tuple(joined)

    def _cut(self, messages: tuple[Message, ...], where: str, *, add_generation_prompt: bool = False) -> list[str]:
        """Markup and message texts in turn: [markup, text, ..., text, markup], each text as the template shows it."""
        shown = self._skeleton(tuple(message.role for message in messages), where, asking=add_generation_prompt)
        pieces = _MARKER.split(shown)
        order = [int(number) for number in pieces[1::2]]
        if order != list(range(len(messages))):
            lost = sorted(set(range(len(messages))) - set(order))
            roles = ", ".join(messages[index].role for index in lost) or "none"
            raise TemplateError(
                f"{where}: template {self.name!r} does not show each message once and in order (lost: {roles})",
                hint="choose a template that knows these roles, or leave those messages out of the data",
            )
        real = self._call(messages, where, add_generation_prompt=add_generation_prompt)
        texts = _texts_between(pieces[0::2], messages, real)
        if texts is None:
            raise TemplateError(
                f"{where}: template {self.name!r} rewrites the text of the messages, so answers cannot be marked",
                hint="choose another template, or one without conditions on the text",
            )
        pieces[1::2] = texts
        return pieces

    def _skeleton(self, roles: tuple[str, ...], where: str, *, asking: bool) -> str:
        """What stands around the texts, a marker in place of each: it depends on the roles alone, so it is kept."""
        if (roles, asking) not in self._skeletons:
            marked = [Message(role, _marker(index)) for index, role in enumerate(roles)]
            self._skeletons[roles, asking] = self._call(marked, where, add_generation_prompt=asking)
        return self._skeletons[roles, asking]

    def _call(self, messages: Sequence[Message], where: str, *, add_generation_prompt: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        # transformers gives every template these two, so templates ask whether they are none, not whether defined.
        variables = {**self._variables, "tools": None, "documents": None, "today": self._today}
        try:
            return self._jinja(messages=turns, add_generation_prompt=add_generation_prompt, **variables)
        except TemplateStoppedError as error:
            raise TemplateError(f"{where}: template {self.name!r} {error}", hint=error.hint) from None

    def _terminator(self, markup: str, where: str) -> str:
        """What follows an answer up to and including its control token; the model must learn to say it."""
        found = self._control.search(markup)
        if found is None or markup[: found.start()].strip():
            raise TemplateError(
                f"{where}: template {self.name!r} ends an answer with {markup[:40]!r} and no control token, "
                "so the model could never learn to stop",
                hint="end answers with the tokenizer's end-of-turn token or {{ eos_token }}",
            )
        return markup[: found.end()]

    def _lengths_spoken(self, messages: tuple[Message, ...], pieces: Sequence[str], where: str) -> list[int]:
        """For each answer, how much of the markup in front of it comes after the prompt's end, and so is learned.

        The last answer's prompt is rendered as it will be served. How earlier ones were asked for depends on the roles,
        and is looked at once for all rows that have the same.
        """
        roles = tuple(message.role for message in messages)
        if roles not in self._spoken:
            self._spoken[roles] = self._spoken_earlier(roles, where)
        served = self._call(messages[:-1], where, add_generation_prompt=True) if roles[-1] == "assistant" else None
        last = [] if served is None else [self._after(served, "".join(pieces[: 2 * len(messages) - 1]), where)]
        return [*self._spoken[roles], *last]

    def _spoken_earlier(self, roles: tuple[str, ...], where: str) -> list[int]:
        """As `_lengths_spoken`, of the answers that something follows; none of it where they are not trained."""
        if self._train_on == "last":
            return [0] * roles[:-1].count("assistant")
        shown = self._skeleton(roles, where, asking=False)
        found: list[int] = []
        opening, at = "", 0
        for index, markup in enumerate(_MARKER.split(shown)[0 : 2 * len(roles) - 2 : 2]):
            at += len(markup)
            if roles[index] == "assistant":
                # Long conversations repeat themselves: once their openings do, no further prompt is rendered.
                if len(found) < _LOOKED_AT or markup != opening:
                    found.append(self._after(self._skeleton(roles[:index], where, asking=True), shown[:at], where))
                else:
                    found.append(found[-1])
                opening = markup
            at += len(_marker(index))
        return found

    def _after(self, served: str, trained_on: str, where: str) -> int:
        """How much stands before an answer in training after the end of the prompt that is served."""
        if not trained_on.startswith(served):
            raise TemplateError(
                f"{where}: template {self.name!r} is not prefix-preserving: at serve time the prompt would end with "
                f"{_MARKER.sub('...', served)[-40:]!r}, but in training the answer follows "
                f"{_MARKER.sub('...', trained_on)[-40:]!r}",
                hint=self._remedy() or "choose another template: this one asks differently from how it trains",
            )
        return len(trained_on) - len(served)

    def _remedy(self) -> str:
        """Which setting would make the template ask as it trains; "" for none."""
        probe = Conversation(tuple(Message(role, "a") for role in ("user", "assistant") * 2), "template probe")
        names = sorted(variables_read(self._source.jinja) - RESERVED)
        tries: list[tuple[str, dict[str, Variable], TrainOn]] = [
            (f"template.variables to {{{name}: {str(value).lower()}}}", {name: value}, self._train_on)
            for name in names
            for value in (False, True)
        ]
        for said, variables, train_on in [*tries, ("template.train_on to last", {}, "last")]:
            with suppress(TemplateError):
                changed = with_variables(self._source, variables)
                bos, eos = self._variables["bos_token"], self._eos
                _Trial(changed, self._control_tokens, bos=bos, eos=eos, train_on=train_on).render(probe)
                return f"set {said}: then it asks as it trains"
        return ""

    def _tokens_said(self, source: str, ends: set[str]) -> re.Pattern[str]:
        """Tokens that the template knows and that mark no turn, such as `<think>`: in an answer they are meant."""
        known = set(self._control.findall(source)) - ends
        turns: set[str] = set()
        for roles in (("user", "assistant"), ("system", "user", "assistant")):
            if known:
                with suppress(TemplateError):
                    turns.update(self._control.findall(self._skeleton(roles, "template probe", asking=False)))
        tags = {token for token in known if {f"<{token.strip('</>')}>", f"</{token.strip('</>')}>"} <= known}
        said = sorted(known - turns | tags, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, said)) if said else "(?!)")


def with_variables(source: TemplateSource, variables: Mapping[str, Variable]) -> TemplateSource:
    """The template with variables set at its head, so that it renders alike wherever it travels.

    Raises:
        TemplateError: a variable that the template does not read, or that is not the user's to set.
    """
    if not variables:
        return source
    read = variables_read(source.jinja) - RESERVED
    if unknown := [name for name in variables if name not in read]:
        raise TemplateError(
            f"template {source.name!r} reads no variable {', '.join(map(repr, unknown))} (template.variables)",
            hint=f"it reads {', '.join(sorted(read)) or 'none that can be set'}",
        )
    # JSON's words for these values are Jinja's, null aside, which is none of them.
    written = {name: json.dumps(value, ensure_ascii=False) for name, value in variables.items()}
    head = "".join(f"{{%- set {name} = {value} -%}}" for name, value in written.items())
    return replace(source, jinja=head + source.jinja)


def _marker(index: int) -> str:
    """What stands in the place of a message."""
    return f"\ue000{index}\ue001"


class _Trial(ChatTemplate):
    """A template that is tried as a remedy, and looks for none itself."""

    def _remedy(self) -> str:
        return ""


def _texts_between(markup: Sequence[str], messages: Sequence[Message], real: str) -> list[str] | None:
    """What `real` shows of each message between the markup: its text, or its text trimmed; None for anything else."""
    if not real.startswith(markup[0]):
        return None
    at = len(markup[0])
    texts: list[str] = []
    for message, after in zip(messages, markup[1:], strict=True):
        shown = [text for text in (message.content, message.content.strip()) if real.startswith(text + after, at)]
        if not shown:
            return None
        texts.append(shown[0])
        at += len(shown[0]) + len(after)
    return texts if at == len(real) else None


def find_template(name: str, own: str | None) -> TemplateSource:
    """The template by its name: one of the catalogue, `tokenizer` for the model's own, or a `.jinja` file.

    Raises:
        TemplateError: no such template; the names that exist are listed.
    """
    if name in CATALOG:
        return CATALOG[name]
    if name == "tokenizer":
        if own is None:
            raise TemplateError(
                "this model's tokenizer ships no chat template", hint=f"choose one of {', '.join(CATALOG)}"
            )
        return TemplateSource("tokenizer", own)
    if name.endswith(".jinja"):
        try:
            return TemplateSource(name, Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
            raise TemplateError(f"template file {name} cannot be read: {error}", hint="check the path") from None
    raise TemplateError(
        f"unknown template {name!r}", hint=f"choose one of {', '.join(CATALOG)}, tokenizer, or a path to a .jinja file"
    )
