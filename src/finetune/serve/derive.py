"""A chat template in Ollama's language, derived from what the run's own one makes of probes, and then proved.

What is derived is the markup between any two messages, by their roles, and which texts are stripped. A template that
does more than that cannot be said in Go's language, and is refused.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from finetune.errors import TemplateError
from finetune.records import Conversation, Message
from finetune.serve.go_template import ExecutionError, GoTemplate, literal, quoted

Render = Callable[[Conversation], str]
"""A conversation that ends with a question, as the text that the model is asked with.

It raises `TemplateError` where the template refuses those roles.
"""
SPACES = (
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""What Python, and so Jinja, strips."""
_BEGINNING, _ANSWER = "", "the answer"
_LETTERS = {"s": "system", "u": "user", "a": "assistant"}
_MUST = ("u", "uau", "uauau")
_MAY = ("su", "suau", "suauau", "uasu", "suasu")
_PADDING = ("\u2003 \n", "\t\x1f\xa0")
_MOST_DRAWN = 60
_REMEDY = "serve it with llama.cpp (--to llama.cpp), which takes the template as it is; or send Ollama raw prompts"

_Markup = dict[tuple[str, str], str]


def derive_template(render: Render, *, bos: str, texts: Sequence[str]) -> str:
    """The template for Ollama.

    Args:
        render: the run's own template.
        bos: what the server puts in front of every prompt by itself, so that the template must not; "" for nothing.
        texts: what messages may say; the template is proved on conversations of them.

    Raises:
        TemplateError: it cannot be said in that language, or what was derived is not proved.
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
    """Of how many conversations the Go template makes what the run's own one makes; those that it refuses count not.

    Raises:
        TemplateError: of one of them it makes something else, or none was rendered at all.
    """
    parsed, equal = GoTemplate(template), 0
    for conversation in conversations:
        try:
            wanted = render(conversation).removeprefix(bos)
        except TemplateError:
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


def drawn_conversations(texts: Sequence[str]) -> list[Conversation]:
    """Conversations of every shape that end with a question, their messages drawn from texts; the same every time."""
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
    """The markup between two messages by their roles, from the beginning to where the answer begins."""
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
    return found


def _probe(shape: str, *, around: tuple[str, str] = ("", "")) -> Conversation:
    before, after = around
    messages = (Message(_LETTERS[letter], f"{before}Zq{place}x{after}") for place, letter in enumerate(shape))
    return Conversation(tuple(messages), "probe")


def _between(text: str, conversation: Conversation) -> list[str]:
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
    """Whether the texts of a role are stripped."""
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
    for role, strips in stripped.items():
        shown = '{{ template "stripped" .Content }}' if strips else "{{ .Content }}"
        branches.append(f'if eq .Role "{role}" }}}}{_after(markup, role)}{shown}')
    turns = "{{ else ".join(("{{ " + branches[0], *branches[1:]))
    return (
        f"{_STRIPPED if any(stripped.values()) else ''}"
        f'{{{{ $last := "" }}}}{{{{ range .Messages }}}}{turns}{{{{ else }}}}{_refusal("a role that was not trained")}'
        f"{{{{ end }}}}{{{{ $last = .Role }}}}{{{{ end }}}}{_after(markup, _ANSWER)}"
    )


def _after(markup: _Markup, role: str) -> str:
    """The markup in front of a message, by the role of the one before it."""
    cases = [f'if eq $last "{before}" }}}}{literal(text)}' for (before, after), text in markup.items() if after == role]
    otherwise = _refusal("an order of roles that was not trained")
    return "{{ " + "{{ else ".join(cases) + f"{{{{ else }}}}{otherwise}{{{{ end }}}}"


def _refusal(words: str) -> str:
    """An action that Go cannot execute: what was never trained is refused instead of rendered in some way."""
    return f"{{{{ slice {quoted(words)} 999 }}}}"


def _stripping() -> str:
    """Templates that show a text without the space around it, which Go's language has no word for."""
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
