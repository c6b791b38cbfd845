"""`ft chat`: talk to a fine-tuned model."""

import sys
from typing import Annotated

import typer

from finetune.cli.console import print_data, say
from finetune.cli.options import RunPath
from finetune.records import Conversation, Message

Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="The most tokens one answer may have.")]
Asked = Annotated[str | None, typer.Option("--ask", help="Ask one question and leave.")]


def command(run: RunPath, *, ask: Asked = None, max_new_tokens: Tokens = 64) -> int:
    """Talk to the fine-tuned model of a run; one line a question, an empty line or end of input leaves.

    Each question stands alone unless standard input is a terminal, where the conversation goes on.
    """
    from finetune.evidence.reopen import talker

    answer = talker(run, max_new_tokens=max_new_tokens)
    if ask is not None:
        print_data(answer(Conversation((Message("user", _readable(ask)),), "question")))
        return 0
    live = sys.stdin.isatty()
    if live:
        say("an empty line leaves")
    turns: list[Message] = []
    while True:
        try:
            question = _readable(input("> " if live else "")).strip()
        except EOFError:
            return 0
        if not question:
            return 0
        turns = [*(turns if live else []), Message("user", question)]
        turns.append(Message("assistant", answer(Conversation(tuple(turns), "question"))))
        print_data(turns[-1].content)


def _readable(text: str) -> str:
    """The text with a replacement character for every byte that was no UTF-8: no tokenizer takes those."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
