"""Brings each row into one form, whatever its shape (alpaca, chat messages, prompt/completion, text)."""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from finetune.data.columns import ColumnFinder, Layout
from finetune.data.lines import shown
from finetune.data.messages import (
    RowError,
    as_json,
    calls_of,
    history_of,
    keys_beside,
    learned_of,
    mark_of,
    messages_of,
    said_in,
    script_of,
    side_of,
    text_of,
    tools_of,
    variables_of,
)
from finetune.data.names import ROW_MARKS, THOUGHTS
from finetune.data.pairs import PairColumns
from finetune.data.sources import SourceRows
from finetune.data.stored import keep
from finetune.errors import counted, raise_all
from finetune.records import Conversation, Document, Message, Row

Example = Conversation | Document
_SAID = {"tool_calls", "function_call", *THOUGHTS}
_MOST_PLACES, _MOST_HINTS = 3, 5


@dataclass(frozen=True, slots=True)
class ShapedRows:
    """The rows in one form, with counts of dropped rows and the columns that were ignored.

    `dropped_at` has the first place of each reason; `notes` says what else of the rows is not as it may seem;
    `sources` where they come from.
    """

    examples: Sequence[Example]
    shapes: dict[str, int]
    dropped: dict[str, int]
    ignored_columns: tuple[str, ...]
    dropped_at: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sources: tuple[SourceRows, ...] = ()


def shape_rows(
    rows: Iterable[Row],
    columns: Mapping[str, str] | None = None,
    ignored: Collection[str] = (),
    *,
    named: bool = False,
    pairs: bool = False,
) -> ShapedRows:
    """Turn rows into conversations and documents; what is left out is counted by its reason.

    A row is left out whose answer is empty, that says that it is not to be learned, or that its own content makes
    unusable.

    Args:
        rows: they may have several shapes.
        columns: `data.columns`; a row that has none of these columns is read by the names of its own.
        ignored: `data.ignore_columns`.
        named: whether every column of `columns` must be there, and all that a row's shape needs where one of them is.
        pairs: whether each row is to have two answers, a chosen and a rejected one.

    Raises:
        DataError: rows are made in a way that is not known, or say what is to be learned in one that is not read; or
            more than half of them are unusable. All such rows are named.
    """
    finder = ColumnFinder(columns or {}, ignored, strict=named, look=PairColumns if pairs else None)
    dropped: Counter[str] = Counter()
    account = _Account()

    def shaped() -> Iterator[Example]:
        for row in map(_opened, rows):
            try:
                layout = finder.layout(row)
                example, learned = _read(_without(row, ignored), layout)
                unread = (keys_beside(row, key) for key in _message_columns(row, layout))
                account.ignored |= layout.unread.union(*unread)
            except RowError as error:
                account.wrong.setdefault(error.kind, _Fault(error.what, refuses=error.refuses)).add(error)
                continue
            account.shapes[layout.shape] += 1
            account.told |= layout.told
            reason = "weight 0" if learned is False else _unfit(example) or _other_unfit(example)
            if reason:
                dropped[reason] += 1
                account.places.setdefault(reason, example.where)
            else:
                yield example

    examples = keep(shaped())
    account.refuse(finder.missing() if named else [])
    for reason, fault in account.wrong.items():
        dropped[reason] += fault.rows
        account.places.setdefault(reason, fault.places[0])
    unread, notes = (tuple(sorted(map(shown, said))) for said in (account.ignored, account.told))
    return ShapedRows(examples, dict(account.shapes), dict(dropped), unread, account.places, notes)


def shape_of(row: Row) -> str:
    """Which of the four shapes a row has, by its columns.

    Raises:
        DataError: no shape fits, or more than one does.
    """
    return ColumnFinder().layout(_opened(row)).shape


def _opened(row: Row) -> Row:
    """The row with the texts that stand within a column where columns of their own were meant.

    SQuAD's answers, `{"text": [...], "answer_start": [...]}`, are the first of them; a translation,
    `{"en": "...", "fr": "..."}`, is the columns `translation.en` and `translation.fr`. An `input` that is an object of
    messages and tools, as OpenAI's preferences have it, is these columns.
    """
    answers, pair, asked = (row.values.get(name) for name in ("answers", "translation", "input"))
    if answers is pair is None and not isinstance(asked, dict):
        return row
    values = dict(row.values)
    if isinstance(asked, dict) and isinstance(asked.get("messages"), list):
        del values["input"]
        values = asked | values
    if isinstance(answers, dict) and isinstance(said := answers.get("text"), list):
        values["answers"] = said
    if isinstance(pair, dict) and all(isinstance(text, str) for text in pair.values()):
        del values["translation"]
        values |= {f"translation.{language}": text for language, text in pair.items()}
    return replace(row, values=values)


@dataclass
class _Fault:
    """What is wrong with rows: how many have it, the places of the first, and what mends it."""

    what: str
    refuses: bool
    rows: int = 0
    hint: str = ""
    places: list[str] = field(default_factory=list)

    def add(self, error: RowError) -> None:
        """One more row that has it; a line that mends some rows is said, though others have no way out."""
        self.rows += 1
        self.hint = max(self.hint, error.hint, key=lambda hint: ("--set" in hint, bool(hint)))
        if self.rows <= _MOST_PLACES:
            self.places.append(error.where)

    def __str__(self) -> str:
        more = f" and {counted(self.rows - _MOST_PLACES, 'more row')}" if self.rows > _MOST_PLACES else ""
        return f"{', '.join(self.places)}{more}: {self.what}"


@dataclass
class _Account:
    """What is told of rows besides what they become."""

    shapes: Counter[str] = field(default_factory=Counter)
    ignored: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)
    places: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, _Fault] = field(default_factory=dict)

    def refuse(self, missing: Sequence[str]) -> None:
        """Refuse the file where rows are made wrongly, or more than half of them are unusable: equal lines as one."""
        found = [fault for fault in self.wrong.values() if fault.refuses]
        unusable = sum(fault.rows for fault in self.wrong.values())
        if not found and unusable > self.shapes.total():
            found = list(self.wrong.values())
        hints, lines = [fault.hint for fault in found], [str(fault) for fault in found]
        if missing:
            names = ", ".join(map(repr, missing))
            lines.append(f"data.columns names {names}, which no row has (columns that nothing reads: {self._unread()})")
            hints.append("name columns that are there")
        raise_all(
            lines, hint="; ".join([*filter(None, dict.fromkeys(hints))][:_MOST_HINTS]) or "look at what these rows hold"
        )

    def _unread(self) -> str:
        return ", ".join(sorted(map(shown, self.ignored))) or "none"


def _without(row: Row, ignored: Collection[str]) -> Row:
    """The row without the columns, and the keys of messages, that are not to be read."""
    if not ignored:
        return row
    values = {name: value for name, value in row.values.items() if name not in ignored}
    keys = {name.removeprefix("messages.") for name in ignored if name.startswith("messages.")}
    for name, turns in values.items() if keys else ():
        if isinstance(turns, list):
            values[name] = [_but(turn, keys) if isinstance(turn, dict) else turn for turn in turns]
    return replace(row, values=values)


def _but(turn: Mapping[str, object], keys: Collection[str]) -> dict[str, object]:
    return {name: said for name, said in turn.items() if name not in keys}


def _message_columns(row: Row, layout: Layout) -> list[str]:
    fields = ("messages", "prompt", "completion", "instruction", "output", "chosen", "rejected")
    return [
        name
        for what, name in layout.columns.items()
        if what in fields and (what == "messages" or isinstance(row.values[name], list | dict))
    ]


def _read(row: Row, layout: Layout) -> tuple[Example, bool | None]:
    """What a row says, and whether it says that it is learned."""
    columns = layout.columns
    example = _PARSERS[layout.shape](row, columns)
    if isinstance(example, Conversation):
        tools = tools_of(row, columns["tools"]) if "tools" in columns else ""
        messages = _with_thought(_with_system(example.messages, row, columns), row, columns)
        if tools and layout.shape != "chat":
            messages = _with_calls(messages, tools, row.where)
        variables = variables_of(row)
        if tools or variables or messages is not example.messages:  # most rows have nothing beside them
            example = replace(example, messages=messages, tools=tools, variables=variables)
    learned = learned_of(row, ROW_MARKS)
    if "train" in columns and mark_of(row, columns["train"]) is False:
        learned = False
    return example, learned


def _with_system(messages: tuple[Message, ...], row: Row, columns: Mapping[str, str]) -> tuple[Message, ...]:
    """The messages behind the system prompt that a column holds."""
    said = said_in(row.values.get(columns["system"]), columns["system"], row.where) if "system" in columns else ""
    if not said.strip():
        return messages
    if messages and messages[0].role == "system":
        if messages[0].content.strip() != said.strip():
            what = f"{columns['system']!r} is another system prompt than the first message"
            raise RowError(row.where, what, hint=f"--set 'data.ignore_columns=[{columns['system']}]' keeps the message")
        return messages
    return (Message("system", said), *messages)


def _with_thought(messages: tuple[Message, ...], row: Row, columns: Mapping[str, str]) -> tuple[Message, ...]:
    """The messages with the thought that a column holds before the last answer."""
    name = columns.get("reasoning")
    thought = text_of(row.values.get(name), name, row.where) if name is not None else ""
    if not thought.strip() or not messages or messages[-1].role != "assistant":
        return messages
    *others, last = messages
    more = json.loads(last.more or "{}")
    if more.keys() & THOUGHTS:
        raise RowError(row.where, f"{name!r} is a thought, and the last message has one of its own")
    more["reasoning_content"] = thought
    return (*others, replace(last, more=json.dumps(more, ensure_ascii=False)))


def _with_calls(messages: tuple[Message, ...], tools: str, where: str) -> tuple[Message, ...]:
    """The messages whose answer, where it is the text of a list of calls of these tools, is these calls."""
    if not messages or messages[-1].role != "assistant" or not re.match(r"\s*\[\s*\{", messages[-1].content):
        return messages
    *others, last = messages
    try:
        calls = calls_of(last.content, where)
    except RowError:
        return messages
    if last.more or not all(json.dumps(call["function"]["name"], ensure_ascii=False) in tools for call in calls):
        return messages
    return (*others, replace(last, content="", more=as_json({"tool_calls": calls, "content": None}, where)))


def _unfit(example: Example) -> str:
    """Why a row teaches nothing, or two things at once; "" where it does neither."""
    if isinstance(example, Document):
        return "" if example.text.strip() else "empty text"
    if not example.messages or example.messages[-1].role != "assistant":
        return "no answer at the end"
    said = example.messages[-1].content.strip()
    if not any(message.more for message in example.messages):
        return "" if said else "empty answer"
    more = [json.loads(message.more) if message.more else {} for message in example.messages]
    thinks = (set(THOUGHTS) & each.keys() for each in more)
    if any(beside and "<think>" in each.content for beside, each in zip(thinks, example.messages, strict=True)):
        return "a thought in <think> and one beside it"
    return "" if said or _SAID & more[-1].keys() else "empty answer"


def _other_unfit(example: Example) -> str:
    """Why a pair teaches nothing with its rejected answer as the last turn; "" where it does, or is none."""
    if isinstance(example, Document) or example.rejected is None:
        return ""
    return _unfit(replace(example, messages=(*example.messages[:-1], example.rejected)))


def _parse_preference(row: Row, columns: Mapping[str, str]) -> Conversation:
    """A prompt with two answers, or two whole conversations that part at their last turn."""
    asked = history_of(row, columns["history"]) if "history" in columns else ()
    if "prompt" in columns:
        asked += side_of(row, columns["prompt"], "user")
    if "input" in columns and (extra := text_of(row.values.get(columns["input"]), columns["input"], row.where)).strip():
        asked += (Message("input", extra),)
    if not any(message.content.strip() for message in asked):
        asked = ()
    sides = [side_of(row, columns[name], "assistant") for name in ("chosen", "rejected")]
    if not asked and all(scripts := [script_of(row, columns[name]) for name in ("chosen", "rejected")]):
        sides = scripts  # as Anthropic's HH has them
    chosen, rejected = sides
    if chosen and chosen[0].role != "assistant":
        if not all(message in chosen for message in asked):
            raise RowError(
                row.where, f"{columns.get('prompt', 'history')!r} stands in no turn of {columns['chosen']!r}"
            )
    elif asked:
        chosen, rejected = asked + chosen, asked + rejected
    else:
        raise RowError(row.where, "a pair without a prompt")
    if not chosen or not rejected or chosen[:-1] != rejected[:-1]:
        raise RowError(row.where, "chosen and rejected part before their last turn")
    text = all(isinstance(row.values.get(columns.get(name, "")), str) for name in ("prompt", "chosen", "rejected"))
    from_text = text and "history" not in columns and "input" not in columns
    return Conversation(chosen, row.where, from_text=from_text, rejected=rejected[-1])


def _parse_alpaca(row: Row, columns: Mapping[str, str]) -> Conversation:
    instruction = side_of(row, columns["instruction"], "user")
    extra = text_of(row.values.get(columns["input"]), columns["input"], row.where) if "input" in columns else ""
    asked = [each for each in instruction if each.content.strip()]
    if extra.strip():  # what is empty adds nothing, no blank line either
        asked.append(Message("input" if asked else "user", extra))
    return _asked(row, columns, tuple(asked) or instruction, side_of(row, columns["output"], "assistant"))


def _parse_prompt_completion(row: Row, columns: Mapping[str, str]) -> Conversation:
    prompt, completion = columns["prompt"], columns["completion"]
    text = isinstance(row.values.get(prompt), str) and isinstance(row.values.get(completion), str)
    asked, answer = side_of(row, prompt, "user"), side_of(row, completion, "assistant")
    return _asked(row, columns, asked, answer, from_text=text and "history" not in columns)


def _asked(
    row: Row,
    columns: Mapping[str, str],
    asked: tuple[Message, ...],
    answer: tuple[Message, ...],
    *,
    from_text: bool = False,
) -> Conversation:
    history = history_of(row, columns["history"]) if "history" in columns else ()
    return Conversation(history + asked + answer, row.where, from_text=from_text)


def _parse_chat(row: Row, columns: Mapping[str, str]) -> Conversation:
    return Conversation(messages_of(row, columns["messages"]), row.where)


def _parse_text(row: Row, columns: Mapping[str, str]) -> Document:
    return Document(text_of(row.values.get(columns["text"]), columns["text"], row.where), row.where)


_PARSERS: dict[str, Callable[[Row, Mapping[str, str]], Example]] = {
    "alpaca": _parse_alpaca,
    "chat": _parse_chat,
    "preference": _parse_preference,
    "prompt/completion": _parse_prompt_completion,
    "text": _parse_text,
}
