"""Finds out which column of a row is what: as the settings say, by its name where that is unmistakable, or refused."""

import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from finetune.data.messages import NOTHING, RowError
from finetune.data.names import (
    ANSWERS,
    BESIDE,
    CHATS,
    CONDEMNATIONS,
    JUDGEMENTS,
    KNOWN,
    LABELS_OF_ROWS,
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
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_.]*")
_WORDS_OF_YAML = ("true", "false", "null", "yes", "no", "on", "off", "none", "y", "n")


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
class _Refusal:
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
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    ignored: Collection[str] = ()
    strict: bool = False
    _found: dict[tuple[tuple[str, str], ...], Layout | _Refusal] = field(default_factory=dict)

    def layout(self, row: Row) -> Layout:
        """Which column of a row is what.

        Raises:
            RowError: no shape fits or more than one does, or a column says what is to be learned and is not read; or
                the row holds what is no text.
        """
        kinds = tuple((name, _kind(value)) for name, value in row.values.items())
        if (found := self._found.get(kinds)) is None:
            found = self._found[kinds] = _Looked(self, dict(kinds)).layout()
        if isinstance(found, _Refusal):
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
        return _line("data.columns", {**self.columns, **columns})


def _line(key: str, value: Mapping[str, str] | Sequence[str]) -> str:
    if isinstance(value, Mapping):
        said = "{" + ", ".join(f"{name}: {_as_yaml(column)}" for name, column in value.items()) + "}"
    else:
        said = f"[{', '.join(map(_as_yaml, value))}]"
    return f"--set {shlex.quote(f'{key}={said}')}"


def _as_yaml(name: str) -> str:
    plain = _PLAIN.fullmatch(name) and name.lower() not in _WORDS_OF_YAML
    return name if plain else json.dumps(name, ensure_ascii=False)


def shown(column: str) -> str:
    """A column's name as any terminal and file can show it: half a surrogate pair is spelled out."""
    return column.encode("utf-8", "backslashreplace").decode("utf-8")


def _kind(value: Any) -> str:
    """What a cell holds, as far as that decides what its column can be; "" for nothing."""
    if value in NOTHING:
        return ""
    if isinstance(value, str):
        word = value.strip().lower() if len(value) < 12 else ""
        yes_or_no = {"true": " yes", "1": " yes", "1.0": " yes", "false": " no", "0": " no", "0.0": " no"}
        return "text" + (" turns" if re.match(r"\s*\[\s*\{", value) else yes_or_no.get(word, ""))
    if isinstance(value, bool | int | float):
        return "no" if value == 0 else "yes" if value == 1 else "number"
    first = value[0] if isinstance(value, list) else value
    if not isinstance(first, dict):
        return "list"
    if isinstance(value, dict) and len({"role", "from", "content", "value"} & value.keys()) != 2:
        return "dict"
    return "turn" if any(first.get(key) in ("assistant", "gpt") for key in ("role", "from")) else "turns"


class _Looked:
    """Rows that are made alike, as they are looked at: what each of their columns holds, by the column's name."""

    def __init__(self, finder: ColumnFinder, kinds: dict[str, str]) -> None:
        self.finder = finder
        self.kinds = {name: kind for name, kind in kinds.items() if name not in finder.ignored}
        self.every = frozenset(kinds)
        self.mapped = {what: name for what, name in finder.columns.items() if name in self.kinds}
        free = [name for name in self.kinds if name not in self.mapped.values()]
        self.names = {normal(name): name for name in free} | {name: name for name in free}

    def layout(self) -> Layout | _Refusal:
        """What these rows are."""
        chosen = {SHAPE_OF[what] for what in self.mapped if what in SHAPE_OF}
        refusal = self._preferences() if not chosen else None
        if refusal := refusal or self._judgements():
            return refusal
        found = self._as_chosen(chosen) if chosen else self._by_names()
        if isinstance(found, _Refusal):
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
            return _Refusal(f"{name!r} stands beside 'text', which is learned as it is", self._ignore(name))
        columns = {**columns, **({} if shape == "text" else beside)}
        if "train" in self.mapped:
            columns["train"] = self.mapped["train"]
        return self._read(shape, columns)

    def _read(self, shape: str, columns: Mapping[str, str]) -> Layout:
        read = {*columns.values(), *ROW_MARKS, *(() if shape == "text" else VARIABLES)} - {*self.finder.ignored}
        # In files of several shapes every row may have all columns.
        unread = {name for name in self.every - read if self.kinds.get(name, "-") or normal(name) not in KNOWN}
        told = {name for key, name in self.names.items() if key in SCORES and name in unread and self.kinds[name]}
        media = [name for key, name in self.names.items() if key in MEDIA and self.kinds[name]]
        unfit = f"{media[0]!r} is no text: only text can be trained" if media else ""
        usable = [*self.finder.ignored, *filter(_usable, media)]
        hint = f"to learn the text alone: {_line('data.ignore_columns', usable)}" if media else ""
        return Layout(shape, columns, frozenset(unread), frozenset(told), unfit, hint)

    def _filled(self, names: Iterable[str], *, filled: bool = True) -> dict[str, str]:
        """The columns of these names, by name: those that hold something, or all of them."""
        there = {name: self.names[name] for name in names if name in self.names}
        return {name: column for name, column in there.items() if self.kinds[column] or not filled}

    def _preferences(self) -> _Refusal | None:
        """Rows of a good and a bad answer."""
        words = {name: set(key.split("_")) for key, name in self.names.items()}
        sides = [name for name, said in words.items() if said & {"chosen", "rejected"}]
        sides = [name for name in sides if self.kinds[name] not in ("", "number", "yes", "no")]
        if not sides:
            return None
        what = f"{_quoted(sides)}: a good and a bad answer, and training learns from good ones alone"
        good = next((name for name in sides if "rejected" not in words[name] and _usable(name)), None)
        if good is None:
            return _Refusal(what, "write the good answer to a column `completion`")
        asked = self._filled((*QUESTIONS, *CHATS))
        if "turns" in self.kinds[good]:
            line = self.finder.line(messages=good)
        elif not asked:
            line = self.finder.line(text=good)
        elif "instruction" in asked:
            line = self.finder.line(instruction=asked["instruction"], output=good)
        else:
            line = self.finder.line(prompt=next(iter(asked.values())), completion=good)
        return _Refusal(what, f"to learn the good answers alone: {line}")

    def _judgements(self) -> _Refusal | None:
        """Columns that say what is to be learned, and that nothing reads."""
        found = [(name, key) for key, name in self.names.items() if self._judges(key, self.kinds[name])]
        if not found:
            return None
        name, key = found[0]
        what = f"{name!r} says what is to be learned, and nothing reads it"
        kind, said = self.kinds[name], self.kinds[name].rpartition(" ")[2]
        answered = self._filled((*ANSWERS, *CHATS))
        if key in JUDGEMENTS and said in ("yes", "no") and answered and _usable(name):
            if said == "yes":
                line = self.finder.line(train=name)
                return _Refusal(what, f"to learn the rows alone of which it says yes: {line}")
            only = f"no answer of which it says no is learned; data.columns={{train: {name}}} keeps the others"
            return _Refusal(what, only)
        if key in CONDEMNATIONS:
            return _Refusal(what, "take out the rows of which it says yes: they would be learned")
        lines = [self._ignore(*(each for each, _ in found))]
        asked = [name for name in self._texts() if name not in dict(found)]
        if kind.startswith("text") and key == "label" and not answered and len(asked) == 1:
            lines.insert(0, f"to learn to say it: {self.finder.line(prompt=asked[0], completion=name)}")
        return _Refusal(what, "; ".join(filter(None, lines)) or "write the text to learn to a column of its own")

    @staticmethod
    def _judges(key: str, kind: str) -> bool:
        said = kind.rpartition(" ")[2]
        sure = key in JUDGEMENTS[:3] or said in ("yes", "no")
        return bool(kind) and (key in MASKS or (key in JUDGEMENTS and sure) or (key in CONDEMNATIONS and said == "yes"))

    def _ignore(self, *names: str) -> str:
        """The line that leaves columns unread, where there are rows to learn without them."""
        ignored = [*self.finder.ignored, *names]
        if not all(map(_usable, names)):
            return f"take {shown(names[0])!r} out of the rows"
        rest = _Looked(replace(self.finder, ignored=ignored), {name: self.kinds.get(name, "") for name in self.every})
        unread = "" if isinstance(rest.layout(), _Refusal) else _line("data.ignore_columns", ignored)
        return f"to leave it unread: {unread}" if unread else ""

    def _beside(self) -> dict[str, str]:
        """The columns of what stands beside a conversation."""
        found = {}
        thoughts = not {f"messages.{name}" for name in THOUGHTS} & {*self.finder.ignored}
        for what, names in BESIDE.items():
            if what == "reasoning" and not thoughts:
                continue
            there = [self.mapped[what]] if what in self.mapped else [*self._filled(names).values()]
            if there:
                found[what] = there[0]
        return found

    def _as_chosen(self, chosen: set[str]) -> tuple[str, dict[str, str]] | _Refusal:
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

    def _by_names(self) -> tuple[str, dict[str, str]] | _Refusal:
        """The shape that the columns' names say."""
        found = self._named(filled=True) or self._alike(filled=True)
        if isinstance(found, _Refusal):
            return found
        text = self._filled(SHAPES["text"])
        if text and len(found) == 1 and found[0][2]:
            lines = [self._line_of(*found[0][:2]), self.finder.line(text=text["text"])]
            return self._several(["text", found[0][0]], lines)
        if not found and text:
            return "text", text
        found = found or self._named(filled=False) or self._alike(filled=False)
        if isinstance(found, _Refusal):
            return found
        if len(found) == 1:
            return found[0][:2]
        if found:
            return self._several([shape for shape, *_ in found], [self._line_of(*each[:2]) for each in found])
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
            chats = [name for key, name in self._filled(CHATS[1:]).items() if "turn" in self.kinds[name]]
            found += [("chat", {"messages": name}, False) for name in chats]
        return found

    def _alike(self, *, filled: bool) -> list[tuple[str, dict[str, str], bool]] | _Refusal:
        """A question and its answer by other names, where there is one of each."""
        asked, answered = (self._filled(names, filled=filled) for names in (QUESTIONS, ANSWERS))
        extra = self._filled(("context", "article", "passage"))
        if "instruction" in asked and "input" in asked:
            extra["input"] = asked.pop("input")
        if not asked or not answered:
            return []
        if len(asked) > 1 or len(answered) > 1 or len(extra) > 1:
            one, other = list(asked.values()), list(answered.values())
            pairs = list(product(one, other))[:3]
            lines = [self.finder.line(prompt=each, completion=said) for each, said in pairs]
            return self._unclear(f"which of {_quoted([*one, *other, *extra.values()])} is what is not clear", lines)
        [(key, question)], [answer] = asked.items(), answered.values()
        if extra or key == "instruction":
            more = zip(("input",), extra.values(), strict=False)
            return [("alpaca", {"instruction": question, "output": answer, **dict(more)}, True)]
        return [("prompt/completion", {"prompt": question, "completion": answer}, True)]

    def _line_of(self, shape: str, columns: Mapping[str, str]) -> str:
        return self.finder.line(**columns)

    def _several(self, shapes: Sequence[str], lines: Sequence[str]) -> _Refusal:
        return self._unclear(f"columns ({self._listed()}) fit several shapes: {', '.join(shapes)}", lines)

    def _unclear(self, what: str, lines: Sequence[str]) -> _Refusal:
        return _Refusal(what, "say which it is: " + ", or ".join(lines))

    def _what_lacks(self) -> str:
        for shape, fields in SHAPES.items():
            there = [what for what in fields if what in self.names]
            if there and len(there) < len(fields):
                lacks = next(what for what in fields if what not in there)
                return f"{shape} row without {lacks!r}"
        return "no known shape"

    def _unknown(self, what: str) -> _Refusal:
        """Rows of which no column is known: an example of the setting, with columns that are there."""
        names = [name for name in self.kinds if _usable(name)]
        turns = [name for name in names if "turn" in self.kinds[name]]
        texts = [name for name in names if self.kinds[name].startswith("text")]
        texts = [
            name for name in texts if normal(name) not in LABELS_OF_ROWS and not normal(name).endswith("_id")
        ] or texts
        answers = [name for name in texts if normal(name) in ANSWERS]
        questions = [name for name in texts if normal(name) in QUESTIONS]
        line = ""
        if turns:
            line = _line("data.columns", {"messages": turns[0]})
        elif len(texts) > 1:
            prompt = questions[0] if questions else next(name for name in texts if [name] != answers)
            answer = next((name for name in answers if name != prompt), None)
            answer = answer or texts[(texts.index(prompt) + 1) % len(texts)]
            line = _line("data.columns", {"prompt": prompt, "completion": answer})
        elif texts:
            line = _line("data.columns", {"text": texts[0]})
        known = "rows are alpaca (instruction, output), chat (messages), prompt/completion, or text"
        other = f"; of columns by other names say which is which, such as {line}" if line else ""
        return _Refusal(f"{what} (columns: {self._listed()})", known + other)

    def _texts(self) -> list[str]:
        """The columns of text that a setting can name, less those that only say which row it is."""
        texts = [name for name in self.kinds if _usable(name) and self.kinds[name].startswith("text")]
        said = [name for name in texts if normal(name) not in LABELS_OF_ROWS and not normal(name).endswith("_id")]
        return said or texts

    def _listed(self) -> str:
        names = [shown(name)[:60] for name in sorted(self.every)]
        more = [f"and {len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
        return ", ".join([*names[:_MOST_NAMES], *more]) or "none"


def _quoted(names: Iterable[str]) -> str:
    *others, last = map(repr, names)
    return f"{', '.join(others)} and {last}" if others else last


def _usable(name: str) -> bool:
    """Whether a setting can name this column."""
    return name.isprintable() and name.strip() == name != "" and name != "None"
