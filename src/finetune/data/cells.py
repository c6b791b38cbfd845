"""What a cell of a row holds, as far as that decides what its column can be; conversations that are one text."""

import re
from typing import Any

from finetune.data.names import ANSWERS, QUESTIONS, normal

NOTHING: tuple[Any, ...] = (None, "", [], {})
ROLE_KEYS = ("role", "from", "speaker")

_WORDS = {
    **dict.fromkeys(("true", "1", "1.0"), " yes"),
    **dict.fromkeys(("false", "0", "0.0"), " no"),
    **dict.fromkeys(("on", "off", "yes", "no"), " switch"),
}
_SPEAKERS = {
    **dict.fromkeys(("Human", "HUMAN", "User", "USER", "Prompter"), "user"),
    **dict.fromkeys(("Assistant", "ASSISTANT", "AI", "Bot", "GPT"), "assistant"),
    **dict.fromkeys(("System", "SYSTEM"), "system"),
    **dict.fromkeys(("FUNCTION RESPONSE", "Function Response", "Observation"), "tool"),
}
_NAME = f"({'|'.join(_SPEAKERS)})"
_BEGINS = re.compile(rf"\s*(?:(\[\s*\{{)|(?:###\s*|\[\|)?{_NAME}(?:\|\]|:))")
_MARKS = tuple(
    re.compile(mark)
    for mark in (
        rf"\s*###\s*{_NAME}:",
        rf"\s*\[\|{_NAME}\|\]",
        rf"(?:\A\s*|\n\n\s*){_NAME}:",
        rf"(?:\A\s*|\n){_NAME}:",
    )
)
"""How turns begin in a text, those first that an answer is least likely to hold."""
_ENDS = ("<|endoftext|>", "</s>", "<eoh>", "<eom>")


def kind_of_cell(value: Any) -> str:
    """What a cell holds, as far as that decides what its column can be; "" for nothing."""
    if value in NOTHING:
        return ""
    if isinstance(value, str):
        if len(value) < 12 and (word := _WORDS.get(value.strip().lower())):
            return f"text{word}"
        begins = _BEGINS.match(value)
        if begins and not begins[1]:
            turns = turns_of_script(value)
            return f"text turns script{' open' * is_open(turns)}" if turns else "text"
        return "text turns" if begins else "text"
    if isinstance(value, bool | int | float):
        return "no" if value == 0 else "yes" if value == 1 else "number"
    first = value[0] if isinstance(value, list) else value
    if isinstance(first, str):
        return "texts" if all(isinstance(each, str) for each in value) else "list"
    if not isinstance(first, dict):
        return "list"
    if isinstance(value, dict) and len({"role", "from", "content", "value"} & value.keys()) != 2:
        return "dict"
    if any(first.get(key) in ("assistant", "gpt") for key in ("role", "from")):
        return "turn"
    if any(first.get(key) is not None for key in ROLE_KEYS):
        return "turns"
    names = {normal(name) for name in first}
    return "pairs" if names & {*QUESTIONS} and names & {*ANSWERS} else "dicts"


def turns_of_script(text: str) -> list[dict[str, str]]:
    """The turns of a text that says before each who speaks, as `Human: ...` and `Assistant: ...`; none of any other.

    A name counts where it stands as the first one does: at the beginning of a paragraph or of a line, or behind `###`.
    """
    if not _BEGINS.match(text):
        return []
    for mark in _MARKS:
        found = [(each, _SPEAKERS[each[1]]) for each in mark.finditer(text)]
        first: dict[str, str] = {}
        for each, role in found:
            first.setdefault(role, each[1])
        found = [(each, role) for each, role in found if each[1] == first[role]]
        if not found or found[0][0].start() or not {"user", "assistant"} <= first.keys():
            continue
        ends = [each.start() for each, _ in found[1:]] + [len(text)]
        said = [_bare(text[each.end() : end]) for (each, _), end in zip(found, ends, strict=True)]
        return [{"role": role, "content": each} for (_, role), each in zip(found, said, strict=True)]
    return []


def is_open(turns: list[dict[str, str]]) -> bool:
    """Whether turns end where an assistant is to answer, as those of a prompt do."""
    return bool(turns) and turns[-1] == {"role": "assistant", "content": ""}


def _bare(said: str) -> str:
    said = said.strip()
    for end in _ENDS:
        said = said.removesuffix(end).rstrip()
    return said
