"""Finds rows that training rows repeat, word for word or nearly: what they show was not learned from others."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np

from finetune.data.shape import Example
from finetune.data.stored import in_parts
from finetune.data.survey import SHORT_ANSWER
from finetune.errors import counted
from finetune.records import Conversation, Document, Message

Likeness = Literal["row", "answer", "prompt", "near"]
LIKENESS: Mapping[Likeness, str] = {
    "row": "word for word",
    "answer": "with the same answer",
    "prompt": "with the same prompt",
    "near": "nearly",
}
"""How a row and a training row may be alike, the most alike first. A letter's case and white space make no other."""
TRAINED: frozenset[Likeness] = frozenset({"row", "answer"})
"""Where what a row would be measured on was trained on itself."""
NEAR_DUPLICATE = 0.4
"""From which share of what two rows say together, rare words weighing more, they say nearly the same.

In a public split of question and answer rows, those above it could be told from training alone. What all rows share
(a pattern, a table's header) weighs next to nothing: rows of one pattern that ask of different things are none.
"""
COMPARED = 512
"""So many rows are compared with every training row; what is the same word for word is looked for among all."""
FEWEST_LEFT = 6
"""With fewer rows that no training row repeats nothing is judged: by chance, all of five get better 3% of the time."""
_WEIGHED = 20_000
"""How rare a word is, so many training rows say."""
_HAN_AND_KANA = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_HAN_AND_KANA}]|[^\W{_HAN_AND_KANA}]+")
"""A word, or a sign of a script that puts no spaces between words."""


@dataclass(frozen=True, slots=True)
class Twin:
    """Where a row and the training row that is like it stand."""

    row: str
    trained: str
    likeness: Likeness


@dataclass(frozen=True, slots=True)
class Overlap:
    """Which of so many rows training rows repeat; `compared`: where those stand that were looked at for all of it."""

    rows: int
    twins: tuple[Twin, ...]
    compared: frozenset[str]

    @property
    def unseen(self) -> frozenset[str]:
        """Where the rows stand that were compared with all training rows and are like none."""
        return self.compared - {twin.row for twin in self.twins}

    @property
    def repeated(self) -> frozenset[str]:
        """Where rows stand of which training says the prompt, the answer or all, and not only nearly."""
        return frozenset(twin.row for twin in self.twins if twin.likeness != "near")

    def trained(self) -> dict[str, str]:
        """Where rows stand whose words were trained on, each with the reason to leave it out."""
        found = {twin.row: twin.likeness for twin in self.twins if twin.likeness in TRAINED}
        return {row: f"stands in the training rows {LIKENESS[likeness]}" for row, likeness in found.items()}

    def values(self) -> dict[str, Any]:
        """As JSON values, with up to three examples of each likeness."""
        named = {likeness: [twin for twin in self.twins if twin.likeness == likeness] for likeness in LIKENESS}
        return {
            "rows": self.rows,
            "compared": len(self.compared),
            "alike": {likeness: len(found) for likeness, found in named.items()},
            "unseen": len(self.unseen),
            "examples": [
                {"row": twin.row, "trained": twin.trained, "alike": likeness}
                for likeness, found in named.items()
                for twin in found[:3]
            ],
        }

    def sentences(self, name: str) -> list[str]:
        """What of a file stands in training, with an example of each likeness; nothing where none of it does."""
        if not self.twins:
            return []
        number = Counter(twin.likeness for twin in self.twins)
        first = {twin.likeness: twin for twin in reversed(self.twins)}
        said = ", ".join(
            f"{number[each]:,} {words} ({first[each].row} as {first[each].trained})"
            for each, words in LIKENESS.items()
            if number[each]
        )
        of = f"; {len(self.compared):,} were compared with all of them" * (len(self.compared) < self.rows)
        left = counted(len(self.unseen), "row", "counts/count")
        return [
            f"{name}: {len(self.twins):,} of {counted(self.rows, 'row', 'stands/stand')} in the rows trained on: "
            f"{said}{of}; {left} as unseen"
        ]


def find_overlap(rows: Sequence[Example], training: Sequence[Example]) -> Overlap:
    """Which rows stand in the training rows: word for word, with their answer or prompt, or nearly.

    An answer stands there where it is too long to be said by chance and not one of a few, as labels are.
    """
    likeness: tuple[Likeness, ...] = ("row", "answer", "prompt")
    homes: dict[Likeness, defaultdict[str, list[int]]] = {each: defaultdict(list) for each in likeness}
    for place, example in enumerate(rows):
        for each, text in zip(likeness, _texts(example), strict=True):
            if text:
                homes[each][text].append(place)
    first: dict[tuple[Likeness, str], str] = {}
    often: Counter[str] = Counter()

    def found_in(some: Sequence[Example], start: int) -> list[tuple[Likeness, str, str]]:
        said = ((each, text, one.where) for one in some for each, text in zip(likeness, _texts(one), strict=True))
        return [(each, text, where) for each, text, where in said if text in homes[each]]

    for each, text, where in chain.from_iterable(in_parts(training, found_in)) if rows else ():
        first.setdefault((each, text), where)
        often[text] += each == "answer"
    label = max(3, len(training) // 20)
    twins: dict[int, Twin] = {}
    for each in likeness:  # the most alike first
        for text, places in homes[each].items():
            if (each, text) in first and not (each == "answer" and often[text] >= label):
                for place in places:
                    twins.setdefault(place, Twin(rows[place].where, first[each, text], each))
    rest = [place for place in range(len(rows)) if place not in twins]
    some = rest[:: max(1, len(rest) // COMPARED)][:COMPARED]
    near = near_twins([rows[place] for place in some], training)
    twins |= {some[at]: Twin(rows[some[at]].where, training[of].where, "near") for at, of in near.items()}
    compared = frozenset(rows[place].where for place in (*some, *twins))
    return Overlap(len(rows), tuple(twin for _, twin in sorted(twins.items())), compared)


def near_twins(rows: Sequence[Example], training: Sequence[Example], limit: float = NEAR_DUPLICATE) -> dict[int, int]:
    """The places of rows that say nearly what a training row says, each with the place of the one most alike.

    Of two rows the weight of the shared words is compared with that of all words (weighted Jaccard). A word that
    `count` of `n` rows have weighs log(1 + n / count), in whole thousandths, so that sums are exact. Where both answers
    are short, as names and numbers are, they must be the same, and the prompts as alike as the rows.

    Rows as alike as `limit` share rarer words: of those of a row down to where the rest weighs half of `limit` of it,
    the other has the other half at least. Only training rows that do are compared.

    Source: Bayardo, Ma and Srikant, 2007, "Scaling up all pairs similarity search".
    """
    words = [_words(_messages(example)) for example in rows]
    sample = training[:: max(1, len(training) // _WEIGHED)] if rows else ()
    weigh = _Weights([*words, *(_words(_messages(example)) for example in sample)])
    whole = [weigh.all(each) for each in words]
    index = _Index(words, weigh, limit)
    found: dict[int, int] = {}
    # Of a row and its twin, the weight of the words that both have, and of all.
    most: defaultdict[int, tuple[int, int]] = defaultdict(lambda: (0, 1))

    def alike(some: Sequence[Example], start: int) -> list[tuple[int, int, int, int]]:
        said = [_words(_messages(example)) for example in some]
        near = []
        for at, place in index.candidates(said):
            both = weigh.all(words[place] & said[at])
            together = whole[place] + weigh.all(said[at]) - both
            if both >= limit * together and _answers_agree(rows[place], some[at], weigh, limit):
                near.append((place, start + at, both, together))
        return near

    for place, at, both, together in chain.from_iterable(in_parts(training, alike)) if index.number else ():
        if both * most[place][1] > most[place][0] * together:
            found[place], most[place] = at, (both, together)
    return dict(sorted(found.items()))


class _Index:
    """Where the rarer words of rows stand: what is as alike as `limit` to a row shares enough of its rarer words."""

    def __init__(self, rows: Sequence[frozenset[str]], weigh: "_Weights", limit: float) -> None:
        self.least = np.full(len(rows), np.inf)
        homes: defaultdict[str, list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            rest = whole = weigh.all(row)
            for word in sorted(row, key=lambda word: (-weigh[word], word)):
                if rest < limit * whole / 2:
                    break
                homes[word].append(place)
                rest -= weigh[word]
            self.least[place] = limit * whole - rest if row else np.inf
        self.number = {word: number for number, word in enumerate(homes)}
        self.places = np.array([place for places in homes.values() for place in places], np.int64)
        self.counts = np.array([len(places) for places in homes.values()], np.int64)
        self.weights = np.array([weigh[word] for word in homes], np.int64)

    def candidates(self, others: Sequence[frozenset[str]]) -> Iterator[tuple[int, int]]:
        """Which of the other rows share enough of their words with which rows."""
        pairs = [(at, self.number[word]) for at, other in enumerate(others) for word in other if word in self.number]
        if not pairs:
            return
        at, number = np.array(pairs, np.int64).T
        times = self.counts[number]
        # Each word's places, one after the other: the places of word n begin where those of the words before it end.
        begins = np.cumsum(self.counts) - self.counts
        within = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        places = self.places[np.repeat(begins[number], times) + within]
        cells = np.repeat(at, times) * len(self.least) + places
        shared = np.bincount(cells, np.repeat(self.weights[number], times), len(others) * len(self.least))
        for cell in np.flatnonzero(shared.reshape(len(others), -1) >= self.least).tolist():
            yield divmod(cell, len(self.least))


class _Weights(dict[str, int]):
    """What each word weighs among these rows; one that none of them has weighs what a row's own word does."""

    def __init__(self, rows: Sequence[frozenset[str]]) -> None:
        counts = Counter(word for row in rows for word in row)
        super().__init__({word: round(1000 * math.log1p(len(rows) / count)) for word, count in counts.items()})
        self._unknown = round(1000 * math.log1p(len(rows)))

    def __missing__(self, word: str) -> int:
        return self._unknown

    def all(self, words: Iterable[str]) -> int:
        """What they weigh together."""
        return sum(map(self.__getitem__, words))


def _answers_agree(one: Example, other: Example, weigh: _Weights, limit: float) -> bool:
    """Whether rows that share words may be twins: short answers tell rows apart that share the rest."""
    if isinstance(one, Document) or isinstance(other, Document):
        return True
    answers = [_plain(each.messages[-1:]) for each in (one, other)]
    if any(map(_is_long, answers)):
        return True
    mine, theirs = (_words(each.messages[:-1]) for each in (one, other))
    return answers[0] == answers[1] and weigh.all(mine & theirs) >= limit * weigh.all(mine | theirs)


def _texts(example: Example) -> tuple[str, str, str]:
    """The whole row, its answer where it is long, and its prompt; "" for what there is none of."""
    if isinstance(example, Document):
        return _plain([Message("text", example.text)]), "", ""
    prompt, answer = _plain(example.messages[:-1]), _plain(example.messages[-1:])
    return f"{prompt}\0{answer}", answer if _is_long(answer) else "", prompt


def _is_long(answer: str) -> bool:
    """Whether an answer is too long to be said twice by chance."""
    return len(answer.split()) > SHORT_ANSWER or len(_WORD.findall(answer)) > SHORT_ANSWER


def _plain(messages: Iterable[Message]) -> str:
    """What is said, whatever its letters' case and white space."""
    return "\0".join(" ".join(f"{each.content} {each.more}".casefold().split()) for each in messages)


def _messages(example: Example) -> Sequence[Message]:
    return example.messages if isinstance(example, Conversation) else (Message("text", example.text),)


def _words(messages: Sequence[Message]) -> frozenset[str]:
    """The words of all turns; a system prompt is the same for most rows and tells none apart."""
    said = (f"{turn.content} {turn.more}" for turn in messages if turn.role != "system")
    return frozenset(_WORD.findall("\n".join(said).casefold()))
