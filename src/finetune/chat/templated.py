"""Which tokens a template marks turns with, and which text holds such turns already."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from finetune.chat.catalog import TemplateSource
from finetune.chat.learned import TrainOn
from finetune.records import Conversation, Document, Rendered, Segment

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
