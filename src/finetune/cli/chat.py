"""`ft chat`: talk to a fine-tuned model as it was trained."""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from finetune.cli.console import print_data, say
from finetune.cli.options import RunPath
from finetune.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from finetune.evidence.talk import ChatAnswer, ChatOpening
    from finetune.ports import ChooseTokens
    from finetune.records import Conversation, Message

T = TypeVar("T")
Prompt = Annotated[str | None, typer.Option("--prompt", help="Ask one question and leave.")]
OldPrompt = Annotated[str | None, typer.Option("--ask", hidden=True)]
System = Annotated[
    str | None,
    typer.Option(
        "--system", help="The system prompt; '' for none. Default: that of all training rows, if they share one."
    ),
]
Tools = Annotated[
    str | None,
    typer.Option(
        "--tools",
        metavar="FILE",
        help="A JSON list of tools, as in a row's tools; '' for none. Default: those of all training rows.",
    ),
]
Variables = Annotated[
    str | None,
    typer.Option(
        "--variables",
        metavar="JSON",
        help="Template variables, as a row's chat_template_kwargs; '' for none. Default: those of all training rows.",
    ),
]
Messages = Annotated[
    Path | None,
    typer.Option(
        "--messages",
        metavar="FILE",
        help="A JSON list of messages to begin with; one that ends with a question or a tool's result is answered.",
    ),
]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="X", help="0: always the likeliest token; 1: as likely as they are.")
]
TopP = Annotated[
    float, typer.Option("--top-p", metavar="X", help="Draw from the likeliest tokens that make up this share.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="The same seed draws the same answers.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="The most tokens one answer may have.")]


def command(
    run: RunPath,
    *,
    prompt: Prompt = None,
    ask: OldPrompt = None,
    system: System = None,
    tools: Tools = None,
    variables: Variables = None,
    messages: Messages = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    max_new_tokens: Tokens = 256,
) -> int:
    """Talk to the fine-tuned model of a run; one line a question, an empty line or end of input leaves.

    At a terminal the conversation goes on: `/reset` begins anew, `/tool TEXT` gives a tool's result. Elsewhere each
    question stands alone, with the same system prompt, tools, variables and messages to begin with. Thoughts and calls
    are shown as the model writes them.
    """
    from finetune.data.opening import read_messages, read_tools, read_variables
    from finetune.evidence.talk import open_chat, talker
    from finetune.records import Message

    problems: list[UsageError] = []
    if ask is not None:
        problems.append(UsageError("--ask is called --prompt now", hint="write --prompt"))
    choose = _tried(problems, lambda: _choice(temperature, top_p, seed))
    known = _tried(problems, lambda: read_tools(Path(tools)) if tools else tools)
    given = _tried(problems, lambda: read_variables(variables) if variables else variables)
    begun = _tried(problems, lambda: read_messages(messages) if messages else ()) or ()
    if system and begun and begun[0].role == "system":
        problems.append(UsageError(f"--system, and {messages} begins with a system prompt", hint="give one of them"))
    if prompt is not None and begun and begun[-1].role in ("user", "tool"):
        problems.append(UsageError(f"--prompt, and {messages} ends with a question", hint="give one of them"))
    _raise_all(problems)
    opening = open_chat(run, begun, system if system is None else _readable(system), known, given)
    for note in opening.notes:
        say(note)
    question = Message("user", "question" if prompt is None else _readable(prompt))
    first = opening.followed_by(*([] if opening.asks else [question]))
    answer = talker(run, max_new_tokens=max_new_tokens, choose=choose, first=first)
    if prompt is not None or opening.asks:
        said = _show(answer(first), max_new_tokens)
        if prompt is not None or not sys.stdin.isatty():
            return 0
        return _converse(answer, opening, (Message("assistant", said),), max_new_tokens)
    return _converse(answer, opening, (), max_new_tokens)


def _converse(
    answer: "Callable[[Conversation], ChatAnswer]", opening: "ChatOpening", begun: "tuple[Message, ...]", most: int
) -> int:
    from finetune.records import Message

    turns, live = list(begun), sys.stdin.isatty()
    if live:
        say("an empty line leaves, /reset begins anew, /tool TEXT gives a tool's result")
    while True:
        try:
            line = _readable(input("> " if live else "")).strip()
        except EOFError:
            return 0
        if not line:
            return 0
        if live and line == "/reset":
            turns = list(begun)
            continue
        result = line.removeprefix("/tool ") if live else line
        asked = [*(turns if live else begun), Message("user" if result == line else "tool", result)]
        try:
            said = _show(answer(opening.followed_by(*asked)), most)
        except RefusedError as error:
            if not live:
                raise
            say(f"error: {error}")  # what was said before still stands
            continue
        turns = [*asked, Message("assistant", said)]


def _show(answer: "ChatAnswer", most: int) -> str:
    print_data(answer.text)
    if not answer.ended:
        say(f"note: cut off: it had not ended within {most} tokens (--max-new-tokens) or the model's context")
    return answer.text


def _choice(temperature: float, top_p: float, seed: int | None) -> "ChooseTokens | None":
    """What draws the tokens of answers; None where the likeliest is taken."""
    from finetune.backends.generate import sampler

    problems = []
    if not 0 <= temperature < math.inf:
        problems.append(UsageError(f"--temperature {temperature:g}", hint="give a number from 0 on"))
    if not 0 < top_p <= 1:
        problems.append(UsageError(f"--top-p {top_p:g}", hint="give a share above 0, up to 1"))
    if top_p < 1 and temperature == 0:
        problems.append(
            UsageError(f"--top-p {top_p:g} at temperature 0, where nothing is drawn", hint="add --temperature 1")
        )
    _raise_all(problems)
    if temperature == 0:
        return None
    if seed is None:
        seed = int.from_bytes(os.urandom(4))
        say(f"drawn with --seed {seed}")
    return sampler(temperature, top_p, seed=seed)


def _tried(problems: list[UsageError], read: Callable[[], T]) -> T | None:
    try:
        return read()
    except UsageError as error:
        problems.append(error)
        return None


def _raise_all(problems: list[UsageError]) -> None:
    if problems:
        raise UsageError(
            "\n".join(error.message for error in problems), hint="; ".join(e.hint for e in problems if e.hint)
        )


def _readable(text: str) -> str:
    """The text with a replacement character for every byte that was no UTF-8: no tokenizer takes those."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
