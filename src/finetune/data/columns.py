"""Finds out which column of a row is what: as the settings say, by its name where that is unmistakable, or refused."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from finetune.data.cells import kind_of_cell
from finetune.data.lines import example_line, is_text, quoted, setting_line, shown, texts_of, usable
from finetune.data.messages import RowError
from finetune.data.names import (
    ANSWERS,
    ANSWERS_OF_TEXTS,
    BESIDE,
    CHATS,
    CHOICES,
    CONDEMNATIONS,
    JUDGEMENTS,
    KNOWN,
    MASKS,
    MEDIA,
    QUESTIONS,
    ROW_MARKS,
    SCORES,
    SHAPE_OF,
    SHAPES,
    THOUGHTS,
    VARIABLES,
    normal,
)
from finetune.records import Row

_MOST_NAMES = 30
_TASKS, _INPUTS = ("instruction", "definition"), ("input", "inputs")
_BAD = {"rejected", "dispreferred", "non", "not"}
_SIDES = {"chosen", "preferred", "rejected", "dispreferred"}


@dataclass(frozen=True, slots=True)
class Layout:
    """Which column of a row each field is; `unread` are those that nothing reads, `told` those of them that may matter.

    `unfit` says why a row that is made so cannot be trained on, and `hint` how it could; "" where it can.
    """

    shape: str
    columns: Mapping[str, str]
    unread: frozenset[str] = frozenset()
    told: frozenset[str] = frozenset()
    unfit: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why no row that is made so can be read, and the lines that mend it."""

    what: str
    hint: str


@dataclass
class ColumnFinder:
    """Finds the layout of rows; those that are made alike are looked at once.

    Args:
        columns: `data.columns`: the column for each field that is named there.
        ignored: `data.ignore_columns`: columns that are not read, whatever they say.
        strict: whether a row that has one of `columns` must have all that its shape needs.
        look: how rows that are made alike are looked at, where it is not as single answers.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    ignored: Collection[str] = ()
    strict: bool = False
    look: "type[Looked] | None" = None
    _found: dict[tuple[tuple[str, str], ...], Layout | Refusal] = field(default_factory=dict)

    def layout(self, row: Row) -> Layout:
        """Which column of a row is what.

        Raises:
            RowError: no shape fits or more than one does, or a column says what is to be learned and is not read; or
                the row holds what is no text.
        """
        kinds = tuple((name, kind_of_cell(value)) for name, value in row.values.items())
        if (found := self._found.get(kinds)) is None:
            found = self._found[kinds] = (self.look or Looked)(self, dict(kinds)).layout()
        if isinstance(found, Refusal):
            raise RowError(row.where, found.what, hint=found.hint, refuses=True)
        if found.unfit:
            raise RowError(row.where, found.unfit, hint=found.hint)
        return found

    def missing(self) -> list[str]:
        """The columns that the settings name and no row had."""
        there = {name for kinds in self._found for name, _ in kinds}
        return [name for name in self.columns.values() if name not in there]

    def line(self, **columns: str) -> str:
        """The setting that names these columns beside those named already, as it is typed in a shell."""
        return setting_line("data.columns", {**self.columns, **columns})


class Looked:
    """Rows that are made alike, as they are looked at: what each of their columns holds, by the column's name."""

    def __init__(self, finder: ColumnFinder, kinds: dict[str, str]) -> None:
        self.finder = finder
        self.kinds = {name: kind for name, kind in kinds.items() if name not in finder.ignored}
        self.every = frozenset(kinds)
        self.mapped = {what: name for what, name in finder.columns.items() if name in self.kinds}
        free = [name for name in self.kinds if name not in self.mapped.values()]
        self.names = {normal(name): name for name in free} | {name: name for name in free}

    def layout(self) -> Layout | Refusal:
        """What these rows are."""
        chosen = {SHAPE_OF[what] for what in self.mapped if what in SHAPE_OF}
        refusal = (self._lone_message() or self._preferences()) if not chosen else None
        if refusal := refusal or self._choices(chosen) or self._judgements():
            return refusal
        found = self._as_chosen(chosen) if chosen else self._by_names()
        if isinstance(found, Refusal):
            return found
        shape, columns = found
        if "input" in self.mapped:
            if shape not in ("alpaca", "prompt/completion"):
                return self._unknown(f"data.columns names an input, and {shape} rows have none")
            columns = dict(zip(SHAPES["alpaca"], columns.values(), strict=False))
            shape, columns["input"] = "alpaca", self.mapped["input"]
        beside = self._beside()
        if shape == "text" and (lost := [what for what in ("tools", "reasoning") if what in beside]):
            name = beside[lost[0]]
            return Refusal(f"{name!r} stands beside 'text', which is learned as it is", self._ignore(name))
        columns = {**columns, **({} if shape == "text" else beside)}
        if "train" in self.mapped:
            columns["train"] = self.mapped["train"]
        return self._read(shape, columns)

    def _read(self, shape: str, columns: Mapping[str, str]) -> Layout:
        read = {*columns.values(), *ROW_MARKS, *(() if shape == "text" else VARIABLES)} - {*self.finder.ignored}
        # In files of several shapes every row may have all columns.
        unread = {name for name in self.every - read if self.kinds.get(name, "-") or normal(name) not in KNOWN}
        told = frozenset(self._notes(shape, columns, unread))
        media = [name for key, name in self.names.items() if key in MEDIA and self.kinds[name]]
        unfit = f"{media[0]!r} is no text: only text can be trained" if media else ""
        ignored = [*self.finder.ignored, *filter(usable, media)]
        hint = f"to learn the text alone: {setting_line('data.ignore_columns', ignored)}" if media else ""
        return Layout(shape, columns, frozenset(unread), told, unfit, hint)

    def _notes(self, shape: str, columns: Mapping[str, str], unread: Collection[str]) -> Iterator[str]:
        """What of these columns is not as it may seem."""
        for key, name in self.names.items():
            if key in SCORES and name in unread and self.kinds[name]:
                yield f"{name!r} is not read, and rows count alike whatever it says"
        for what in ("completion", "output"):
            if self.kinds.get(columns.get(what, "")) == "texts":
                yield f"of several answers in {columns[what]!r} the first is learned"
        for what in ("prompt", "instruction"):
            if "open" in self.kinds.get(columns.get(what, ""), ""):
                yield f"{columns[what]!r} ends where an assistant is to answer: it is read as the turns that it holds"
        if shape == "text" and "script" in self.kinds[columns["text"]] and usable(columns["text"]):
            line = self.finder.line(messages=columns["text"])
            yield f"{columns['text']!r} holds turns, and all of them are learned; to learn the answers alone: {line}"

    def _filled(self, names: Iterable[str], *, filled: bool = True) -> dict[str, str]:
        """The columns of these names, by name: those that hold something, or all of them."""
        there = {name: self.names[name] for name in names if name in self.names}
        return {name: column for name, column in there.items() if self.kinds[column] or not filled}

    def _lone_message(self) -> Refusal | None:
        """Rows of which each is one message of a conversation that is spread over them."""
        said = self._filled(("content", "text"))
        spoken = self._filled(("role", "from"))
        if not said or not spoken or self._filled((*CHATS, *QUESTIONS, *ANSWERS)):
            return None
        what = f"each row is one message ({quoted([*spoken.values(), *said.values()])}), and nothing joins rows"
        told = [name for key, name in self.names.items() if self._judges(key, self.kinds[name])]
        lines = ['write each conversation as a row, {"messages": [...]}', self._ignore(*spoken.values(), *told)]
        return Refusal(what, "; ".join(filter(None, lines)))

    def _choices(self, chosen: Collection[str]) -> Refusal | None:
        """Questions whose answer is one of several that nothing shows the model."""
        found = [*self._filled(CHOICES).values()]
        read = {*chosen} & {"chat", "text"} or self._filled(("messages", "text")) or self._turns_by_name()
        if not found or read:
            return None
        what = f"{quoted(found)}: what the answer is chosen from, and nothing reads it"
        own = "write the question with its choices to a column `prompt`, the answer to a column `completion`"
        return Refusal(what, "; ".join(filter(None, [own, self._ignore(*found)])))

    def _turns_by_name(self) -> dict[str, str]:
        """The columns of messages that have one of their names, but `messages`."""
        kinds = ("turn", "turns", "pairs", "dicts", "dict", "texts")
        found = self._filled(CHATS[1:])
        return {key: name for key, name in found.items() if self.kinds[name] in kinds or "turns" in self.kinds[name]}

    def _preferences(self) -> Refusal | None:
        """Rows of a good and a bad answer."""
        words = {name: set(key.split("_")) for key, name in self.names.items()}
        sides = [name for name, said in words.items() if said & _SIDES]
        sides = [name for name in sides if self.kinds[name] not in ("", "number", "yes", "no")]
        if not sides:
            return None
        what = f"{quoted(sides)}: a good and a bad answer, and training learns from good ones alone"
        good = next((name for name in sides if not words[name] & _BAD and usable(name)), None)
        both = "to learn from both: --set training.objective=dpo"
        if good is None:
            return Refusal(what, f"{both}, or write the good answer to a column `completion`")
        asked = self._filled((*QUESTIONS, *CHATS))
        if "turns" in self.kinds[good]:
            line = self.finder.line(messages=good)
        elif not asked:
            line = self.finder.line(text=good)
        elif "instruction" in asked:
            line = self.finder.line(instruction=asked["instruction"], output=good)
        else:
            line = self.finder.line(prompt=next(iter(asked.values())), completion=good)
        return Refusal(what, f"{both}; to learn the good answers alone: {line}")

    def _judgements(self) -> Refusal | None:
        """Columns that say what is to be learned, and that nothing reads."""
        found = [(name, key) for key, name in self.names.items() if self._judges(key, self.kinds[name])]
        if not found:
            return None
        name, key = found[0]
        what = f"{name!r} says what is to be learned, and nothing reads it"
        kind, said = self.kinds[name], self.kinds[name].rpartition(" ")[2]
        answered = self._filled((*ANSWERS, *CHATS))
        if key in JUDGEMENTS and said in ("yes", "no") and answered and usable(name):
            if said == "yes":
                line = self.finder.line(train=name)
                return Refusal(what, f"to learn the rows alone of which it says yes: {line}")
            only = f"no answer of which it says no is learned; data.columns={{train: {name}}} keeps the others"
            return Refusal(what, only)
        if key in CONDEMNATIONS:
            return Refusal(what, "take out the rows of which it says yes: they would be learned")
        lines = [self._ignore(*(each for each, _ in found))]
        asked = [name for name in texts_of(self.kinds) if name not in dict(found)]
        if is_text(kind) and key == "label" and not answered and len(asked) == 1:
            lines.insert(0, f"to learn to say it: {self.finder.line(prompt=asked[0], completion=name)}")
        return Refusal(what, "; ".join(filter(None, lines)) or "write the text to learn to a column of its own")

    @staticmethod
    def _judges(key: str, kind: str) -> bool:
        said = kind.rpartition(" ")[2]
        sure = key in JUDGEMENTS[:3] or said in ("yes", "no")
        return bool(kind) and (key in MASKS or (key in JUDGEMENTS and sure) or (key in CONDEMNATIONS and said == "yes"))

    def _ignore(self, *names: str) -> str:
        """The line that leaves columns unread, where there are rows to learn without them."""
        ignored = [*self.finder.ignored, *names]
        if not all(map(usable, names)):
            return f"take {shown(names[0])!r} out of the rows"
        rest = type(self)(
            replace(self.finder, ignored=ignored), {name: self.kinds.get(name, "") for name in self.every}
        )
        unread = "" if isinstance(rest.layout(), Refusal) else setting_line("data.ignore_columns", ignored)
        return f"to leave it unread: {unread}" if unread else ""

    def _beside(self) -> dict[str, str]:
        """The columns of what stands beside a conversation."""
        found = {}
        thoughts = not {f"messages.{name}" for name in THOUGHTS} & {*self.finder.ignored}
        for what, names in BESIDE.items():
            if what == "reasoning" and not thoughts:
                continue
            there = [self.mapped[what]] if what in self.mapped else [*self._filled(names).values()]
            if what == "reasoning" and what not in self.mapped:  # such as "on" and "off" are no thoughts
                there = [name for name in there if self.kinds[name] == "text"]
            if there:
                found[what] = there[0]
        return found

    def _as_chosen(self, chosen: set[str]) -> tuple[str, dict[str, str]] | Refusal:
        """The shape whose fields the settings name columns for."""
        if len(chosen) > 1:
            return self._unknown(f"data.columns names columns of several shapes: {', '.join(sorted(chosen))}")
        [shape] = chosen
        columns = {}
        for what in SHAPES[shape]:
            others = ANSWERS if what in ("completion", "output") else QUESTIONS if shape != "chat" else ()
            alike = list(self._filled(others).values())
            gone = self.finder.columns.get(what) if what not in self.mapped else None
            name = self.mapped.get(what, self.names.get(what, alike[0] if len(alike) == 1 else None))
            if name is None or (gone and self.finder.strict):
                lacks = f"names {gone!r} the {what}, which the row lacks" if gone else f"names no {what}"
                return self._unknown(f"data.columns {lacks}")
            columns[what] = name
        if shape == "alpaca" and "input" in self.names:
            columns["input"] = self.names["input"]
        return shape, columns

    def _by_names(self) -> tuple[str, dict[str, str]] | Refusal:
        """The shape that the columns' names say."""
        found = self._named(filled=True) or self._alike(filled=True)
        if isinstance(found, Refusal):
            return found
        text = self._filled(SHAPES["text"])
        if text and len(found) == 1 and found[0][2]:
            lines = [self.finder.line(**found[0][1]), self.finder.line(text=text["text"])]
            return self._several(["text", found[0][0]], lines)
        if not found and text:
            answers = [name for name in self._filled(ANSWERS_OF_TEXTS).values() if is_text(self.kinds[name])]
            if not answers:
                return "text", text
            asked = {"prompt": text["text"], "completion": answers[0]}
            lines = [self.finder.line(**asked), self.finder.line(**text)]
            return self._unclear(f"{quoted([*text.values(), *answers])}: a text alone, or what it asks", lines)
        found = found or self._named(filled=False) or self._alike(filled=False)
        if isinstance(found, Refusal):
            return found
        if len(found) == 1:
            return found[0][:2]
        if found:
            return self._several([shape for shape, *_ in found], [self.finder.line(**each[1]) for each in found])
        return self._unknown(self._what_lacks())

    def _named(self, *, filled: bool) -> list[tuple[str, dict[str, str], bool]]:
        """The shapes all of whose fields there are by their own names, or by a name of lists of messages.

        With `filled` one of them holds something: in files of several shapes, every row may have all columns.
        """
        found = []
        for shape, fields in SHAPES.items():
            there = {what: self.names[what] for what in fields if what in self.names}
            if len(there) == len(fields) and any(self.kinds[name] for name in there.values()) == filled:
                if shape == "alpaca" and "input" in self.names:
                    there["input"] = self.names["input"]
                if shape != "text" or not filled:
                    found.append((shape, there, False))
        if filled:
            found += [("chat", {"messages": name}, False) for name in self._turns_by_name().values()]
        return found

    def _alike(self, *, filled: bool) -> list[tuple[str, dict[str, str], bool]] | Refusal:
        """A question and its answer by other names, where there is one of each."""
        asked, answered = (
            {key: name for key, name in self._filled(names, filled=filled).items() if self.kinds[name] != "list"}
            for names in (QUESTIONS, ANSWERS)
        )
        extra = self._filled(("context", "article", "passage"))
        tasks, inputs = ([key for key in keys if key in asked] for keys in (_TASKS, _INPUTS))
        if tasks and inputs:
            extra["input"] = asked.pop(inputs[0])
        if not asked or not answered:
            return []
        if len(asked) > 1 or len(answered) > 1 or len(extra) > 1:
            one, other = list(asked.values()), list(answered.values())
            pairs = list(product(one, other))[:3]
            lines = [self.finder.line(prompt=each, completion=said) for each, said in pairs]
            return self._unclear(f"which of {quoted([*one, *other, *extra.values()])} is what is not clear", lines)
        [(key, question)], [answer] = asked.items(), answered.values()
        if extra or key in _TASKS:
            more = zip(("input",), extra.values(), strict=False)
            return [("alpaca", {"instruction": question, "output": answer, **dict(more)}, True)]
        return [("prompt/completion", {"prompt": question, "completion": answer}, True)]

    def _several(self, shapes: Sequence[str], lines: Sequence[str]) -> Refusal:
        return self._unclear(f"columns ({self._listed()}) fit several shapes: {', '.join(shapes)}", lines)

    def _unclear(self, what: str, lines: Sequence[str]) -> Refusal:
        return Refusal(what, "say which it is: " + ", or ".join(lines))

    def _what_lacks(self) -> str:
        for shape, fields in SHAPES.items():
            there = [what for what in fields if what in self.names]
            if there and len(there) < len(fields):
                lacks = next(what for what in fields if what not in there)
                return f"{shape} row without {lacks!r}"
        return "no known shape"

    def _unknown(self, what: str) -> Refusal:
        """Rows of which no column is known: an example of the setting, with columns that are there."""
        line = example_line(self.kinds)
        known = "rows are alpaca (instruction, output), chat (messages), prompt/completion, or text"
        other = f"; of columns by other names say which is which, such as {line}" if line else ""
        return Refusal(f"{what} (columns: {self._listed()})", known + other)

    def _listed(self) -> str:
        names = [shown(name)[:60] for name in sorted(self.every)]
        more = [f"and {len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
        return ", ".join([*names[:_MOST_NAMES], *more]) or "none"
