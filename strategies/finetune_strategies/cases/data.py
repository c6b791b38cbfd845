"""Rows to account for, to order, to split and to cache."""

import json
from collections.abc import Callable, Mapping
from math import comb, prod
from typing import Annotated, Any, Literal, get_args

from hypothesis import strategies as st
from pydantic import Field

from finetune_strategies.cases.rows import PAIRS, TEXTS, Pair, Rows
from finetune_strategies.recipes import Recipe


class Shuffled(Rows):
    """Rows of one length, and the number that their order is drawn from."""

    seed: Annotated[int, Field(ge=0)]


_TWELVE = tuple(Pair(prompt=f"say {number}", completion=f"{number}") for number in range(10, 22))
SHUFFLED = st.builds(Shuffled, rows=st.just(_TWELVE), seed=st.integers(0, 999))


class Seeded(Recipe):
    """A seed, and how often the rows are gone through."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)]
    epochs: Annotated[int, Field(ge=1, le=2)]


ORDER_SAME = st.builds(Seeded, seed=st.sampled_from((0, 1, 2**31)), epochs=st.integers(1, 2))
_GOOD = Pair(prompt="a", completion="b")

_ODD = st.one_of(
    PAIRS,
    st.builds(Pair, prompt=TEXTS, completion=st.sampled_from(("", " ", "\n"))),
    st.builds(Pair, prompt=TEXTS.map(lambda text: text * 20), completion=TEXTS),
)

DATA_ACCOUNT = st.builds(Rows, rows=st.lists(_ODD, min_size=0, max_size=4).map(lambda rows: (_GOOD, *rows)))
FileKind = Literal[
    "rows.jsonl",
    "rows.ndjson",
    "rows.jsonl.gz",
    "utf16.jsonl",
    "list.json",
    "columns.json",
    "wrapped.json",
    "rows.csv",
    "semicolon.csv",
    "rows.tsv",
    "two shards",
]


class Filed(Rows):
    """Rows, two at least, and what they are kept in."""

    kind: FileKind


DATA_FILES = st.builds(
    Filed,
    rows=st.lists(_ODD, min_size=1, max_size=4).map(lambda rows: (_GOOD, *rows)),
    kind=st.sampled_from(get_args(FileKind)) | st.just("two shards"),
)
Shape = Literal["prompt/completion", "lists", "messages", "alpaca"]


class Shaped(Recipe):
    """A question and its answer, and the shape of the row that they are in."""

    pair: Pair
    shape: Shape


DATA_SHAPES = st.builds(Shaped, pair=PAIRS, shape=st.sampled_from(("prompt/completion", "lists", "alpaca")))


Spelling = Literal["question/answer", "Instruction/Response", "ShareGPT", "conversations", "JSON", "no instruction"]


class Spelled(Recipe):
    """A question and its answer, and the public spelling of the row that they are in."""

    pair: Pair
    spelling: Spelling

    @property
    def value(self) -> dict[str, Any]:
        """The row as data files have it."""
        asked, answered = self.pair.prompt, self.pair.completion
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        rows: dict[Spelling, dict[str, Any]] = {
            "question/answer": {"question": asked, "answer": answered},
            "Instruction/Response": {"Instruction": asked, "Response": answered},
            "ShareGPT": {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]},
            "conversations": {"conversations": turns},
            "JSON": {"messages": json.dumps(turns, ensure_ascii=False)},
            "no instruction": {"instruction": "", "input": asked, "output": answered},
        }
        return rows[self.spelling]


DATA_NAMES = st.builds(Spelled, pair=PAIRS, spelling=st.sampled_from(get_args(Spelling)))


class Mapped(Recipe):
    """A question and its answer in columns of any name."""

    pair: Pair
    asked: Annotated[str, Field(min_length=1, max_length=12)]
    answered: Annotated[str, Field(min_length=1, max_length=12)]

    @property
    def value(self) -> dict[str, str]:
        """The row as data files have it, with a column that means nothing."""
        return {self.answered: self.pair.completion, self.asked: self.pair.prompt, "note to self": "nothing"}


_COLUMN = st.one_of(
    st.sampled_from(("completion", "prompt", "text", "label", "it's", "a: b")), TEXTS.map(lambda t: t[:12])
)
DATA_COLUMNS = st.builds(Mapped, pair=PAIRS, asked=_COLUMN, answered=_COLUMN).filter(
    lambda case: case.asked.strip() != case.answered.strip()
)
Judgement = Literal[
    "label", "label in a table", "kto_tag", "rejected", "rejected messages", "weight", "train", "message"
]


class Judged(Recipe):
    """A good answer and a bad one to a question, and what says which is bad."""

    pair: Pair
    bad: Annotated[str, Field(min_length=8, max_length=40)]
    judgement: Judgement

    @property
    def values(self) -> list[dict[str, Any]]:
        """The rows as data files have them."""
        asked, good, bad = self.pair.prompt, self.pair.completion, self.bad
        user = {"role": "user", "content": asked}
        said = [{"role": "assistant", "content": answer} for answer in (good, bad)]
        both = [{"prompt": asked, "completion": answer} for answer in (good, bad)]
        marks: dict[str, tuple[str, object, object]] = {
            "label": ("label", True, False),
            "label in a table": ("label", "True", "False"),
            "kto_tag": ("kto_tag", True, False),
            "weight": ("weight", 1, 0),
            "train": ("train", True, False),
        }
        if self.judgement in marks:
            name, *values = marks[self.judgement]
            return [{**row, name: value} for row, value in zip(both, values, strict=True)]
        rows: dict[str, dict[str, Any]] = {
            "rejected": {"prompt": asked, "chosen": good, "rejected": bad},
            "rejected messages": {"chosen": [user, said[0]], "rejected": [user, said[1]]},
            "message": {"messages": [user, {**said[1], "train": False}, user, said[0]]},
        }
        return [rows[self.judgement]]


# No letter of a good answer or of markup is in a bad one, so that none of its bytes is learned with them.
_BAD = st.text(st.sampled_from("XYZ"), min_size=8, max_size=12)
_LOWER = st.text(st.sampled_from("abcdefgh "), min_size=1, max_size=12).map(str.strip).filter(bool)
DATA_JUDGED = st.builds(
    Judged,
    pair=st.builds(Pair, prompt=_LOWER, completion=_LOWER),
    bad=_BAD,
    judgement=st.sampled_from(get_args(Judgement)),
)


class Held(Recipe):
    """Rows, some of which say the same, and the share of them that is held out."""

    picks: Annotated[tuple[int, ...], Field(min_length=2, max_length=9, strict=False)]
    fraction: Annotated[float, Field(ge=0, lt=1)]
    seed: Annotated[int, Field(ge=0)]

    @property
    def values(self) -> list[dict[str, str]]:
        """The rows as data files have them."""
        return [{"prompt": f"question {pick}", "completion": f"answer {pick}"} for pick in self.picks]


HELD = st.builds(
    Held,
    picks=st.lists(st.integers(0, 6), min_size=2, max_size=9).filter(lambda picks: len(set(picks)) > 1).map(tuple),
    fraction=st.sampled_from((0.0, 0.21, 0.34, 0.5)),
    seed=st.integers(0, 3),
)

SPLIT_SAME = HELD.filter(lambda case: len(set(case.picks)) > 3 and case.fraction > 0.3)


How = Literal["as it is", "in capitals", "with other spaces", "otherwise"]


class Repeated(Recipe):
    """What training rows say, by number, and what held-out rows say of the same or of others, and how."""

    picks: Annotated[tuple[Annotated[int, Field(ge=0, le=9)], ...], Field(min_length=1, max_length=8, strict=False)]
    held: Annotated[
        tuple[tuple[Annotated[int, Field(ge=0, le=9)], How], ...], Field(min_length=1, max_length=6, strict=False)
    ]

    @property
    def trained(self) -> list[dict[str, str]]:
        """The rows to train on."""
        return [_said(pick, "as it is") for pick in self.picks]

    @property
    def valid(self) -> list[dict[str, str]]:
        """The rows to hold out."""
        return [_said(pick, how) for pick, how in self.held]


def _said(pick: int, how: How) -> dict[str, str]:
    """A row whose words no other number has."""
    name = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"][pick]
    prompt, completion = f"Where do {name}lings and {name}rings live?", f"In {name}land, {name}wood or {name}ton."
    if how == "otherwise":
        return {"prompt": f"Say where {name}rings and {name}lings live!", "completion": completion}
    say: Mapping[How, Callable[[str], str]] = {
        "as it is": str,
        "in capitals": str.upper,
        "with other spaces": lambda text: f" {text.replace(' ', '  ')}",
    }
    return {"prompt": say[how](prompt), "completion": say[how](completion)}


REPEATED = st.builds(
    Repeated,
    picks=st.lists(st.integers(0, 6), min_size=1, max_size=8).map(tuple),
    held=st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from(("as it is", "in capitals", "with other spaces", "otherwise"))),
        min_size=1,
        max_size=6,
    ).map(tuple),
)


class Mixed(Recipe):
    """Sources of so many rows each, and how much each weighs."""

    sizes: Annotated[tuple[Annotated[int, Field(ge=1, le=40)], ...], Field(min_length=2, max_length=3, strict=False)]
    weights: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=2, max_length=3, strict=False)]
    seed: Annotated[int, Field(ge=0)]

    @property
    def sources(self) -> list[list[dict[str, str]]]:
        """The rows of each source as data files have them, no two alike."""
        return [
            [{"prompt": f"{name} {number}", "completion": f"{number}"} for number in range(size)]
            for name, size in zip("abc", self.sizes, strict=False)
        ]

    @property
    def ways(self) -> int:
        """In how many ways at least the rows can be taken."""
        total = min(size * sum(self.weights) / weight for size, weight in zip(self.sizes, self.weights, strict=True))
        taken = (int(weight * total / sum(self.weights)) for weight in self.weights)
        return prod(
            min(comb(size, count), comb(size, count + 1) or 1) for size, count in zip(self.sizes, taken, strict=True)
        )


_WEIGHTS = st.sampled_from((1.0, 2.0, 3.0, 0.5))


@st.composite
def _mixed(draw: st.DrawFn) -> Mixed:
    count = draw(st.integers(2, 3))
    # Small enough shares of large sources leave other rows to another seed; none is so small that no row is left.
    sizes = draw(st.lists(st.integers(8, 40), min_size=count, max_size=count))
    weights = draw(st.lists(_WEIGHTS, min_size=count, max_size=count))
    return Mixed(sizes=sizes, weights=weights, seed=draw(st.integers(0, 3)))  # type: ignore[arg-type]


MIXED = _mixed()


class Cached(Recipe):
    """Rows that are encoded with a cache, and then others, or with another model or other settings."""

    rows: Annotated[tuple[Pair, ...], Field(min_length=1, strict=False)]
    before: Literal["plain", "begins not"]
    after: Literal["plain", "tokenizer", "begins", "begins not"]
    changed: Literal["nothing", "words", "template", "length"]


@st.composite
def _cached(draw: st.DrawFn) -> Cached:
    before, after = draw(st.sampled_from((("plain", "plain"), ("plain", "tokenizer"), ("begins not", "begins"))))
    changes = ("words", "template", "length", "nothing") if before == after else ("nothing",)
    rows = draw(st.lists(PAIRS, min_size=1, max_size=2).map(tuple))
    return Cached(rows=rows, before=before, after=after, changed=draw(st.sampled_from(changes)))  # type: ignore[arg-type]


CACHE_SAME = _cached()
CACHE_FOUND = st.builds(Rows, rows=st.lists(PAIRS, min_size=1, max_size=2).map(tuple))


class Remarked(Rows):
    """Rows, one of which says something besides."""

    remarked: Annotated[int, Field(ge=0)]


@st.composite
def _remarked(draw: st.DrawFn) -> Remarked:
    # All of one length, so that nothing but their order says which share a batch.
    letters = draw(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=6, unique=True))
    rows = tuple(Pair(prompt="q", completion=letter) for letter in letters)
    return Remarked(rows=rows, remarked=draw(st.integers(0, len(rows) - 1)))


ROWS_REMARKS = _remarked()


class Neighbours(Shuffled):
    """Rows of one length, so many of which share a batch."""

    size: Annotated[int, Field(ge=2, le=4)]


NEIGHBOURS = st.builds(Neighbours, rows=st.just(_TWELVE), seed=st.sampled_from([0, 7]), size=st.sampled_from([2, 3]))
