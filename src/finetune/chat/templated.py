"""Which tokens a template marks turns with, where answers end by them, and which text holds such turns already."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile

from finetune.chat.beside import PROBE_CALL, what_is_given
from finetune.chat.catalog import TemplateSource
from finetune.chat.learned import TrainOn
from finetune.chat.markers import marker
from finetune.chat.sandbox import TemplateStoppedError, compile_template
from finetune.records import Conversation, Document, Message, Rendered, Segment

Markup = Callable[..., list[str]]
"""What a template puts around messages of these roles, `asking` or not; nothing where it takes no such roles."""
_SHAPES = (("user", "assistant"), ("system", "user", "assistant"))


@dataclass(frozen=True, slots=True)
class TurnMarks:
    """How a template of this name begins a text, and how it opens an answer."""

    name: str
    begins: tuple[str, ...]
    opening: str
    tokens: re.Pattern[str]
    """The control tokens that it marks turns and ends with."""

    @classmethod
    def of(cls, name: str, markup: Markup, control: re.Pattern[str], ends: Sequence[str]) -> "TurnMarks":
        """Those of a template; `ends` are the begin- and the end-of-text token."""
        trained, system = (markup(roles, asking=False) for roles in _SHAPES)
        tokens = {*control.findall(" ".join([*trained, *system])), *ends} - {""}
        marks = _any_of(tokens)
        asked = markup(("user",), asking=True)
        opening = _shared(trained[1], asked[1]).strip() if trained and len(asked) > 1 else ""
        # Where a begin-of-text token opens turns, too, it is no sign of the beginning alone.
        bos = "" if ends[0] in opening else ends[0]
        # What it says before a question may depend on whether an input follows, and begins alike.
        paired = markup(("user", "input", "assistant"), asking=False) or trained
        heads = [pieces[0].removeprefix(bos).lstrip() for pieces in (trained, paired, system) if pieces]
        heads[:2] = [_shared(*heads[:2])] if len(heads) > 1 else []
        begins = {found.group() if (found := control.match(head)) else head.strip() for head in heads} | {bos}
        begins -= {""}
        return cls(name, tuple(begins), opening, marks)

    def hold(self, text: str) -> bool:
        """Whether a text begins as the template does, and has an answer opened as it does."""
        return bool(self.opening) and self.opening in text and text.lstrip().startswith(self.begins)

    def end(self, text: str) -> bool:
        """Whether a text ends with one of its tokens."""
        return any(text.rstrip().endswith(token) for token in self.tokens.findall(text)[-1:])


def render_document(document: Document, held: TurnMarks | None, eos: str) -> Rendered:
    """Plain text as training text; where it holds turns, control tokens in it are meant, and no end is said twice."""
    text = Segment(document.text, "text", trained=True, control=held is not None)
    end = Segment(eos, "text", trained=True, control=True)
    return Rendered((text,) if held and held.end(document.text) else (text, end), document.where)


def render_as_it_is(talk: Conversation, held: TurnMarks, end: str, *, asking: bool, train_on: TrainOn) -> Rendered:
    """A prompt that holds turns, and its answer, with an end where it has none."""
    prompt, *answers = (message.content for message in talk.messages)
    segments = [Segment(prompt, "markup", trained=train_on == "everything" and not asking, control=True)]
    for answer in answers:
        said = answer if held.end(answer) else answer + end
        segments.append(Segment(said, "assistant", trained=not asking, control=True))
    return Rendered(tuple(segments), talk.where)


def tokens_said(
    source: TemplateSource, markup: Markup, control: re.Pattern[str], ends: Iterable[str]
) -> re.Pattern[str]:
    """Tokens that a template knows and that mark no turn, such as `<think>`: in an answer they are meant."""
    known = {*control.findall(source.jinja), *source.said} - {*ends}
    turns = {token for roles in _SHAPES if known for token in control.findall(" ".join(markup(roles, asking=False)))}
    tags = {token for token in known if {f"<{token.strip('</>')}>", f"</{token.strip('</>')}>"} <= known}
    return _any_of(known - turns | tags)


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _shared(one: str, other: str) -> str:
    """What both begin with."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(letter for letter, _ in same)


def with_turn_ends(
    source: TemplateSource, control: Iterable[str], stops: Collection[str], **ends: str
) -> TemplateSource:
    """The template, which ends a last answer with the token of the next turn, where that is what ends answers.

    A model such as GLM-4 stops at the token of whoever speaks next: `<|user|>`, or `<|observation|>` after a call. Its
    template writes it with the next turn alone, so that nothing ends the last answer, and its settings list it among
    the `stops`. TRL's training templates say the same.

    Args:
        control: the tokenizer's control tokens.
        stops: those at which a server stops.
        ends: `bos_token` and `eos_token`.
    """
    render, tokens = compile_template(source.name, source.jinja), _any_of(control)

    def shown(*messages: Message) -> str:
        with suppress(TemplateStoppedError):
            given = what_is_given(Conversation(messages, "template probe"), as_parts=False)
            return render(add_generation_prompt=False, **ends, **given)
        return ""

    def next_turn(last: str, followed: str) -> str:
        """What the next turn adds to a conversation, up to its own token; "" where none ends an answer."""
        rest = followed.removeprefix(last)
        found = tokens.search(rest)
        fits = last and followed.startswith(last) and found and found.group() in stops
        return rest[: found.end()] if found and fits and not rest[: found.start()].strip() else ""

    turns = (Message("user", "question"), Message("assistant", marker(1)))
    last = shown(*turns)
    end = next_turn(last, shown(*turns, Message("user", "question")))
    if not end or marker(1) not in last or last.partition(marker(1))[2].strip():
        return source
    calls = PROBE_CALL.messages
    called = next_turn(shown(*calls), shown(*calls, Message("tool", "result"))) or end
    said = (
        f"{json.dumps(called)} if messages[-1].tool_calls else {json.dumps(end)}" if called != end else json.dumps(end)
    )
    tail = (
        "{% if not add_generation_prompt and messages and messages[-1].role == 'assistant' %}{{ "
        + said
        + " }}{% endif %}"
    )
    # Jinja leaves out one line break at the end of a template.
    return replace(source, jinja=source.jinja.removesuffix("\n") + tail)
