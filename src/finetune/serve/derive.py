"""Derives a chat template in Ollama's language from what the run's own one renders, and proves the two equal.

The run's template renders a few probe conversations. From these follow the markup between any two messages, by their
roles, and which roles' texts are stripped. A template that does more than that is refused. What is derived renders any
messages at all, for Ollama asks it to: an order of roles that the run's template refuses is rendered as the nearest one
that it does not, and what another role says as a question.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from finetune.chat.markers import texts_between
from finetune.errors import TemplateError
from finetune.records import Conversation, Message
from finetune.serve.go_template import ExecutionError, GoTemplate, literal, quoted

Render = Callable[[Conversation], str]
"""Renders a conversation that ends with a question as the prompt; raises `TemplateError` for roles it refuses.
"""
SPACES = (
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""All characters that Python, and so Jinja, strips."""
_BEGINNING, _ANSWER = "", "the answer"
# A shape is a conversation by the first letters of its roles. Every template must render those of `_MUST`.
_LETTERS = {"s": "system", "u": "user", "a": "assistant"}
_MUST = ("u", "uau", "uauau")
_MAY = ("su", "suau", "suauau", "uasu", "suasu")
# Ollama renders windows of a conversation, too, while it looks for what fits its context: they begin and end anywhere.
_WINDOWS = ("au", "uu", "uaau", "ssu", "sau", "usu", "ua", "s")
# Where the run's template refuses an order of roles, the markup that is shown before a message is what stands there
# after the first of these roles.
_NEAREST = ("user", "assistant", "", "system")
# Space of one, two and three UTF-8 bytes, on both sides.
_PADDING = ("\u2003 \n", "\t\x1f\xa0")
_MOST_DRAWN = 60
_REMEDY = "serve it with llama.cpp (--to llama.cpp), which takes the template as it is; or send Ollama raw prompts"

_Markup = dict[tuple[str, str], str]


def derive_template(render: Render, *, bos: str, texts: Sequence[str]) -> str:
    """Derive the template for Ollama.

    Args:
        render: the run's own template.
        bos: the text that the server itself puts before every prompt, so that the template must not.
        texts: contents of messages; the template is proved on conversations of them.

    Raises:
        TemplateError: Ollama's language cannot express it, or the derived template renders something else.
    """
    markup = _markup(render)
    stripped = {
        role: _strips(render, markup, role) for role in _LETTERS.values() if any(role in pair for pair in markup)
    }
    if bos:
        markup = {pair: text.removeprefix(bos) if pair[0] == _BEGINNING else text for pair, text in markup.items()}
    template = _write(markup, stripped)
    prove_template(template, render, bos=bos, conversations=drawn_conversations(texts))
    return template


def prove_template(template: str, render: Render, *, bos: str, conversations: Sequence[Conversation]) -> int:
    """Count the conversations that both templates render alike, without those that it refuses or shows in part.

    Raises:
        TemplateError: the Go template renders one differently, or none was rendered at all.
    """
    parsed, equal = GoTemplate(template), 0
    for conversation in conversations:
        try:
            wanted = render(conversation).removeprefix(bos)
        except TemplateError:
            continue
        if trims_in_part(render, conversation):
            continue
        try:
            found = parsed.render([{"role": each.role, "content": each.content} for each in conversation.messages])
        except ExecutionError as error:
            found = f"(an error: {error})"
        if found != wanted:
            raise TemplateError(
                f"the chat template cannot be said in Ollama's language: of {_told(conversation)} the run's template "
                f"makes {wanted!r}, and what was derived from it {found!r}",
                hint=_REMEDY,
            )
        equal += 1
    if not equal:
        raise TemplateError("the chat template refuses every conversation that was tried", hint=_REMEDY)
    return equal


def trims_in_part(render: Render, conversation: Conversation) -> bool:
    """Whether it strips one side of a text, or asks whether it is empty, which Ollama's language cannot say."""
    if all(message.content and message.content == message.content.strip() for message in conversation.messages):
        return False
    turns = tuple(replace(message, content=f"Zq{place}x") for place, message in enumerate(conversation.messages))
    named = replace(conversation, messages=turns)
    try:
        between = _between(render(named), named)
    except TemplateError:
        return True
    return texts_between(between, conversation.messages, render(conversation), (str, str.strip)) is None


def drawn_conversations(texts: Sequence[str]) -> list[Conversation]:
    """Sixty conversations of every shape, their contents drawn from texts; the same every time."""
    dice = random.Random(0)
    shapes = [*_MUST, *_MAY]
    return [
        Conversation(
            tuple(Message(_LETTERS[letter], dice.choice(texts)) for letter in shapes[number % len(shapes)]),
            f"drawn conversation {number + 1}",
        )
        for number in range(_MOST_DRAWN)
    ]


def _markup(render: Render) -> _Markup:
    """The markup between neighbouring roles, the beginning and the answer included."""
    found: _Markup = {}
    for shape in (*_MUST, *_MAY):
        conversation = _probe(shape)
        try:
            text = render(conversation)
        except TemplateError:
            if shape in _MUST:
                raise
            continue
        roles = [_BEGINNING, *(message.role for message in conversation.messages), _ANSWER]
        for pair, between in zip(pairwise(roles), _between(text, conversation), strict=True):
            if found.setdefault(pair, between) != between:
                raise TemplateError(
                    f"the chat template cannot be said in Ollama's language: between {pair[0] or 'the beginning'} and "
                    f"{pair[1]} it puts {found[pair]!r} in one conversation and {between!r} in {_told(conversation)}",
                    hint=_REMEDY,
                )
    for shape in _WINDOWS:
        found |= _of_window(render, shape, found)
    return found


def _of_window(render: Render, shape: str, known: _Markup) -> _Markup:
    """The markup of a shape that no conversation has; none where the template refuses it, or contradicts itself."""
    conversation = _probe(shape)
    roles = [_BEGINNING, *(message.role for message in conversation.messages), _ANSWER]
    if not {*roles} <= {role for pair in known for role in pair}:
        return {}
    try:
        pieces = dict(zip(pairwise(roles), _between(render(conversation), conversation), strict=True))
    except TemplateError:
        return {}
    return pieces if all(known.get(pair, between) == between for pair, between in pieces.items()) else {}


def _probe(shape: str, *, around: tuple[str, str] = ("", "")) -> Conversation:
    before, after = around
    messages = (Message(_LETTERS[letter], f"{before}Zq{place}x{after}") for place, letter in enumerate(shape))
    return Conversation(tuple(messages), "probe")


def _between(text: str, conversation: Conversation) -> list[str]:
    """The text before, between and after the messages of a rendered probe."""
    pieces: list[str] = []
    for message in conversation.messages:
        before, said, text = text.partition(message.content)
        if not said or message.content in text:
            raise TemplateError(
                f"the chat template does not show each message of {_told(conversation)} once and in order",
                hint=_REMEDY,
            )
        pieces.append(before)
    return [*pieces, text]


def _strips(render: Render, markup: _Markup, role: str) -> bool:
    """Whether the template strips a role's texts."""
    # The shortest shape in which the role occurs.
    shape = {"system": "su" if (_BEGINNING, "system") in markup else "uasu", "user": "u", "assistant": "uau"}[role]
    conversation = _probe(shape)
    padded = tuple(
        Message(each.role, each.content.join(_PADDING)) if each.role == role else each for each in conversation.messages
    )
    text = render(Conversation(padded, "probe"))
    kept, cut = render(conversation), render(conversation)
    for message in conversation.messages:
        if message.role == role:
            kept = kept.replace(message.content, message.content.join(_PADDING))
    if text not in (kept, cut):
        raise TemplateError(
            f"the chat template strips only a part of the space around what the {role} says, which cannot be said in "
            "Ollama's language",
            hint=_REMEDY,
        )
    return text == cut


def _write(markup: _Markup, stripped: Mapping[str, bool]) -> str:
    branches = []
    for role in sorted(stripped, key=lambda role: role == "user"):  # the last one is for all other roles, too
        shown = '{{ template "stripped" .Content }}' if stripped[role] else "{{ .Content }}"
        condition = f'if eq .Role "{role}" }}}}' if role != "user" else "}}"
        branches.append(f"{condition}{_after(markup, role)}{shown}")
    turns = "{{ " + "{{ else ".join(branches) + "{{ end }}" if len(branches) > 1 else branches[0].removeprefix("}}")
    return (
        f"{_STRIPPED if any(stripped.values()) else ''}"
        f'{{{{ $last := "" }}}}{{{{ range .Messages }}}}{turns}{{{{ $last = .Role }}}}{{{{ end }}}}'
        f"{_after(markup, _ANSWER)}"
    )


def _after(markup: _Markup, role: str) -> str:
    """An action that shows the markup before a message, by the role of the one before it."""
    texts = {before: text for (before, after), text in markup.items() if after == role}
    nearest = next(texts[before] for before in _NEAREST if before in texts)
    cases = [f'if eq $last "{before}" }}}}{literal(text)}' for before, text in texts.items() if text != nearest]
    if not cases:
        return literal(nearest)
    return "{{ " + "{{ else ".join(cases) + f"{{{{ else }}}}{literal(nearest)}{{{{ end }}}}"


def _stripping() -> str:
    """Two templates that together strip a text, for which Ollama's functions have no word.

    Each looks at one, two or three bytes at an end: where they are a space, it calls itself with the rest, or else goes
    on to the other end. The last `size` bytes are `slice . (len (slice . size))`: there is no subtraction.
    """
    sizes = {size: [each for each in SPACES if len(each.encode()) == size] for size in (1, 2, 3)}
    ends = {
        "stripped": ("(slice . 0 {size})", "(slice . {size})", '{{ template "ended" . }}'),
        "ended": ("(slice . (len (slice . {size})))", "(slice . 0 (len (slice . {size})))", "{{ . }}"),
    }
    written = []
    for name, (end, rest, done) in ends.items():
        cases = [
            f"if and (ge (len .) {size}) (eq {end.format(size=size)} {' '.join(map(quoted, each))}) }}}}"
            f'{{{{ template "{name}" {rest.format(size=size)} }}}}'
            for size, each in sizes.items()
        ]
        body = "{{ " + "{{ else ".join(cases)
        written.append(f'{{{{ define "{name}" }}}}{body}{{{{ else }}}}{done}{{{{ end }}}}{{{{ end }}}}')
    return "".join(written)


_STRIPPED = _stripping()


def _told(conversation: Conversation) -> str:
    return " + ".join(f"{message.role} {message.content[:40]!r}" for message in conversation.messages)
