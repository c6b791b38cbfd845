"""How columns are said: in words, and in the lines that are typed to say what they are."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from finetune.data.names import ANSWERS, ANSWERS_OF_TEXTS, QUESTIONS, labels_rows, normal

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_.]*")
_WORDS_OF_YAML = ("true", "false", "null", "yes", "no", "on", "off", "none", "y", "n")


def setting_line(key: str, value: Mapping[str, str] | Sequence[str]) -> str:
    """The setting as it is typed in a shell."""
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


def quoted(names: Iterable[str]) -> str:
    """Names in a sentence."""
    *others, last = map(repr, names)
    return f"{', '.join(others)} and {last}" if others else last


def usable(name: str) -> bool:
    """Whether a setting can name this column."""
    return name.isprintable() and name.strip() == name != "" and name != "None"


def is_text(kind: str) -> bool:
    """Whether a cell of this kind is a text."""
    return kind.split()[:1] == ["text"]


def texts_of(kinds: Mapping[str, str]) -> list[str]:
    """The columns of text that a setting can name, less those that only say which row it is, by each column's kind."""
    texts = [name for name, kind in kinds.items() if usable(name) and is_text(kind)]
    return [name for name in texts if not labels_rows(name)] or texts


def example_line(kinds: Mapping[str, str]) -> str:
    """A line that may say which columns of these kinds are what; "" where none is likely."""
    turns = [name for name, kind in kinds.items() if usable(name) and "turn" in kind]
    lists = [name for name, kind in kinds.items() if kind in ("texts", "pairs", "dicts", "list")]
    texts = texts_of(kinds)
    several = [name for name in lists if kinds[name] == "texts" and normal(name) in ANSWERS and usable(name)]
    answers = [name for name in [*texts, *several] if normal(name) in ANSWERS_OF_TEXTS]
    questions = [name for ask in QUESTIONS for name in texts if normal(name) == ask]
    if turns:
        return setting_line("data.columns", {"messages": turns[0]})
    if len({*texts, *answers}) > 1:
        prompt = questions[0] if questions else next(name for name in texts if [name] != answers)
        answer = next((name for name in answers if name != prompt), None)
        answer = answer or texts[(texts.index(prompt) + 1) % len(texts)]
        return setting_line("data.columns", {"prompt": prompt, "completion": answer})
    plain = [name for name in texts if not labels_rows(name)]
    if len(lists) == 1 and not plain and kinds[lists[0]] in ("texts", "pairs") and usable(lists[0]):
        asks = normal(lists[0]).removesuffix("s") in QUESTIONS
        return "" if asks else setting_line("data.columns", {"messages": lists[0]})
    if plain and (plain != questions or len(kinds) == 1):
        return setting_line("data.columns", {"text": plain[0]})
    return ""
