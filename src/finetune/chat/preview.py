"""Shows a row as its tokens, and which of them are learned, in letters that every terminal prints as they are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finetune.chat.tokenizer import FileTokenizer
from finetune.records import TokenizedRow

MOST = 160
"""So many tokens of a row are shown: half of them from its beginning, half from its end."""
OPEN, CLOSE = "⟦⟧"
"""What stands around learned tokens where there is no colour."""
_SEEN = {" ": "·", "\n": "↵", "\t": "⇥"}
_OURS = {*_SEEN.values(), OPEN, CLOSE, "…", "\\"}
_LONGEST_LETTER = 8
"""More tokens than one letter has, whatever the tokenizer."""


@dataclass(frozen=True, slots=True)
class Shown:
    """So many neighbouring tokens as one text, such as the bytes of a letter, or those that are left out."""

    text: str
    tokens: int
    learned: int
    control: bool = False
    left_out: bool = False


def shown_tokens(row: TokenizedRow, tokenizer: FileTokenizer, most: int = MOST) -> list[Shown]:
    """The tokens of a row; of a long one its beginning and its end, and how many are left out between."""
    found = list(_tokens(row, tokenizer))
    if len(found) <= most:
        return found
    first, last = most // 2, len(found) - (most - most // 2)
    tokens, learned = (sum(getattr(each, name) for each in found[first:last]) for name in ("tokens", "learned"))
    gone = Shown(f"…{tokens:,}·more,·{learned:,}·of·them·learned…", tokens, learned, left_out=True)
    return [*found[:first], gone, *found[last:]]


def laid_out(tokens: Sequence[Shown], *, brackets: bool) -> Iterator[tuple[str, Shown]]:
    """Each token as it is printed: a space between two, a line for each line of the row, brackets where wanted."""
    learned = [bool(each.learned) and not each.left_out for each in tokens]
    for before, inside, after, each in zip([False, *learned], learned, [*learned[1:], False], tokens, strict=False):
        opening = OPEN if brackets and inside and not before else ""
        closing = CLOSE if brackets and inside and not after else ""
        yield f"{opening}{each.text}{closing}" + ("\n" if each.text.endswith(_SEEN["\n"]) else " "), each


def visible(text: str) -> str:
    """A text on one line: white space as signs; what means something here, or what no terminal prints, escaped."""
    return "".join(_SEEN.get(letter) or (_escaped(letter) if letter in _OURS else printable(letter)) for letter in text)


def printable(text: str) -> str:
    """A text in which everything that moves a cursor, turns text round, or is not seen, is escaped."""
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _tokens(row: TokenizedRow, tokenizer: FileTokenizer) -> Iterator[Shown]:
    control = {tokenizer.control_id(token) for token in tokenizer.control_tokens}
    read = tokenizer.reader()
    waiting: list[Shown] = []  # bytes of a letter that is not whole yet
    for place, (number, trained) in enumerate(zip(row.ids, row.trained, strict=True)):
        # Nothing precedes the first token of a row, so it is never learned.
        word = Shown(visible(tokenizer.word(number)), 1, int(trained and place > 0), control=number in control)
        text = read(number)
        if word.control or len(waiting) == _LONGEST_LETTER:
            yield from waiting
            waiting = []
        waiting.append(word)
        if word.control:
            yield from waiting
            waiting = []
        elif text is not None:
            yield Shown(visible(text), len(waiting), sum(each.learned for each in waiting))
            waiting = []
    yield from waiting
