"""Finds out which columns of a row are its prompt, the chosen and the rejected of two answers to it."""

import re

from finetune.data.columns import Layout, Looked, Refusal
from finetune.data.lines import quoted, shown, usable
from finetune.data.names import CHATS, PAIR_FIELDS, QUESTIONS, SIDES

_KNOWN = (
    "pairs have `chosen` and `rejected`: two answers to a `prompt`, or two whole conversations that part at their last "
    "turn"
)


class PairColumns(Looked):
    """Rows that are made alike, looked at as pairs."""

    def layout(self) -> Layout | Refusal:
        """Which column is what."""
        if unknown := [what for what in self.mapped if what not in PAIR_FIELDS]:
            return Refusal(f"data.columns names {', '.join(unknown)}, and pairs have none (objective: dpo)", _KNOWN)
        columns: dict[str, str] = {}
        for what in SIDES:
            found = self._side(what)
            if isinstance(found, Refusal):
                return found
            columns[what] = found
        self.names = {key: name for key, name in self.names.items() if name not in columns.values()}
        if refusal := self._judgements():
            return refusal
        asked = self._asked(columns)
        if isinstance(asked, Refusal):
            return asked
        beside = {what: name for what, name in self._beside().items() if what != "reasoning"}
        marks = {"train": self.mapped["train"]} if "train" in self.mapped else {}
        return self._read("preference", {**columns, **asked, **beside, **marks})

    def _side(self, what: str) -> str | Refusal:
        """The column of one side."""
        if name := self.mapped.get(what, self.names.get(what)):
            return name
        words = {key: {key, *re.split(r"[_.]", key)} for key in self.names}
        found = [self.names[key] for key, said in words.items() if said & {*SIDES[what]}]
        found = [name for name in found if self.kinds[name] not in ("number", "yes", "no")]
        if len(found) == 1:
            return found[0]
        if found:
            lines = " or ".join(self.finder.line(**{what: name}) for name in found if usable(name))
            return Refusal(f"which of {quoted(found)} is the {what} answer is not clear", f"say which it is: {lines}")
        hint = f"{_KNOWN}; other columns are named, such as --set 'data.columns={{{what}: COLUMN}}'"
        return Refusal(f"no pair: no column is the {what} answer (columns: {self._listed()})", hint)

    def _asked(self, sides: dict[str, str]) -> dict[str, str] | Refusal:
        """The column of the prompt, and of what stands beside it; none where both sides are whole conversations."""
        more = {"input": self.mapped["input"]} if "input" in self.mapped else {}
        if name := self.mapped.get("prompt", self.names.get("prompt")):
            return {"prompt": name, **more}
        found = self._filled((*QUESTIONS, *CHATS)) or self._filled((*QUESTIONS, *CHATS), filled=False)
        if "instruction" in found and "input" in found:
            more["input"] = found.pop("input")
        if len(found) > 1:
            lines = " or ".join(self.finder.line(prompt=name) for name in found.values() if usable(name))
            return Refusal(
                f"which of {quoted(found.values())} is the prompt is not clear",
                f"say which it is: {lines}",
            )
        if found:
            return {"prompt": next(iter(found.values())), **more}
        texts = [
            name for name in sides.values() if self.kinds[name].startswith("text") and "turn" not in self.kinds[name]
        ]
        if texts:
            what = f"{shown(texts[0])!r} is a text, and no column is the prompt (columns: {self._listed()})"
            return Refusal(what, f"{_KNOWN}; name its column: --set 'data.columns={{prompt: COLUMN}}'")
        return more
