"""Looks at a model whose answers have no single right wording: likelihoods, matching, neutral prompts, endings."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import NDArray

from finetune.chat.encode import mark_rows
from finetune.data.batches import shared_start
from finetune.data.overlap import near_twins
from finetune.data.read import read_rows
from finetune.data.shape import Example, shape_rows
from finetune.data.shipped import NEUTRAL, data_path
from finetune.evidence.answers import normalise
from finetune.evidence.budget import Prices
from finetune.objectives.row_sums import batch_sums, row_sums
from finetune.ports import Session
from finetune.records import Batch, Conversation, Document, TokenizedRow
from finetune.training.prepare import Prepared
from finetune.training.rows import read_shaped

CHOICES = 4
"""Among how many answers a row's own must be the likeliest."""
MATCHED_ROWS = 32
_POOL = 64
"""Among so many others, drawn anew for each row, its wrong answers are looked for."""
OTHER_ROWS = 64
_ENDINGS = 16
_OWN_TOKENS = 24
"""Of the answers that a base gives to neutral prompts, so many tokens are kept."""
_ANSWER_HEAD = 32
"""By how much of an answer it is matched: what comes after the first tokens mostly follows from them."""
_RUN = 8
"""From how many words in a row on something is copied and not merely a turn of phrase."""
_COPIED_FROM = 20_000
"""In so many trained answers copies are looked for."""


@dataclass(frozen=True, slots=True)
class Matched:
    """Rows whose own answer was scored beside others', in nats per token: (rows,) and (rows, choices - 1)."""

    own: NDArray[np.float64]
    others: NDArray[np.float64]

    @property
    def first(self) -> tuple[bool, ...]:
        """Whether each row's own answer is the likeliest of all."""
        return tuple((self.own < self.others.min(axis=1)).tolist())


@dataclass(frozen=True, slots=True)
class OpenLook:
    """One look at one model. Losses are in nats per token, one a row; `replies` are ids, `ended` says which end."""

    rows: Matched | None
    losses: tuple[float, ...]
    unseen: tuple[float, ...]
    association: Matched | None
    text: tuple[float, ...]
    own_answers: tuple[float, ...]
    right: tuple[bool, ...]
    ended: tuple[bool, ...]
    copied: tuple[float, ...]
    longest: int
    kept: tuple[tuple[int, ...], ...]
    """The base's own answers to neutral prompts."""


def row_losses(session: Session, rows: Sequence[TokenizedRow]) -> NDArray[np.float64]:
    """The mean loss of each row's trained tokens, (rows,) in nats per token; the model is left as it was."""
    return row_sums(session, rows) / _targets(rows)


def _targets(rows: Sequence[TokenizedRow]) -> NDArray[np.int64]:
    return np.array([row.target_count for row in rows], np.int64)


@dataclass(frozen=True, slots=True)
class Matching:
    """For each row its own answer and others' to the same prompt, as rows whose answer alone is a target."""

    own: tuple[TokenizedRow, ...]
    others: tuple[TokenizedRow, ...]

    def at_most(self, count: int) -> "Matching":
        """The first so many."""
        return Matching(self.own[:count], self.others[: count * (CHOICES - 1)])

    def groups(self) -> list[Batch]:
        """Each row's own answer with the others that are given to the same prompt."""
        width = CHOICES - 1
        others = (self.others[place * width : (place + 1) * width] for place in range(len(self.own)))
        return [Batch((own, *wrong)) for own, wrong in zip(self.own, others, strict=True)]

    def look(self, session: Session) -> Matched:
        """Score all of them: a long prompt goes through the model once for all its answers."""
        groups = self.groups()
        short = [row for group in groups if not shared_start(group) for row in group.rows]
        found = iter(row_losses(session, short).reshape(-1, CHOICES))
        losses = np.array(
            [
                batch_sums(session, group) / _targets(group.rows) if shared_start(group) else next(found)
                for group in groups
            ]
        )
        return Matched(losses[:, 0], losses[:, 1:])


@dataclass(frozen=True, slots=True)
class OpenQuestions:
    """What is asked of a model whose answers are open: the same of the base and of the tuned one."""

    rows: Matching | None
    documents: tuple[TokenizedRow, ...]
    unseen: tuple[TokenizedRow, ...]
    association: Matching | None
    text: tuple[TokenizedRow, ...]
    prompts: tuple[tuple[int, ...], ...]
    expected: tuple[str, ...]
    endings: tuple[tuple[int, ...], ...]
    longest: int
    """Within how many tokens an answer must end: as long as training answers are, the longest twentieth aside."""
    answers: tuple[str, ...]
    """The trained answers that are long enough to be copied from."""

    def at_most(self, matched: int, others: int) -> "OpenQuestions":
        """So many matched rows at most, and so many of every other kind."""
        asked = often_alike(self.prompts, others)
        return replace(
            self,
            rows=self.rows and self.rows.at_most(matched),
            documents=self.documents[:others],
            unseen=self.unseen[:others],
            association=self.association and self.association.at_most(matched),
            text=self.text[:others],
            prompts=tuple(self.prompts[place] for place in asked),
            expected=tuple(self.expected[place] for place in asked),
        )

    def price(self, prices: Prices) -> float:
        """What it costs, at most, to ask all this of a base and of a tuned model."""
        matched = [group for each in (self.rows, self.association) if each for group in each.groups()]
        own = sum(len(prompt) + _OWN_TOKENS for prompt in self.prompts)
        scored = prices.scoring((*matched, *self.documents, *self.unseen, *self.text)) + prices.forward * own
        said = prices.answering(self.prompts, _OWN_TOKENS)
        return 2 * (scored + said) + prices.answering(self.endings, self.longest + 1)


def often_alike(prompts: Sequence[Sequence[int]], count: int) -> list[int]:
    """Places of so many prompts, in order: those of the commonest lengths, since equal ones are asked together."""
    common = Counter(map(len, prompts))
    by_length = sorted(
        range(len(prompts)), key=lambda place: (-common[len(prompts[place])], len(prompts[place]), place)
    )
    return sorted(by_length[:count])


def look(session: Session, prepared: Prepared, questions: OpenQuestions, base: OpenLook | None = None) -> OpenLook:
    """Look at the session as it is now; it is left as it was.

    Args:
        base: the look at the base, whose own answers to neutral prompts are scored; None when this is the base.
    """
    tokenizer, stops = prepared.encoder.tokenizer, prepared.encoder.stop_ids
    # Whether the tuned model still answers is asked only where the base did.
    asked = [place for place in range(len(questions.prompts)) if base is None or base.right[place]]
    answers = session.generate([questions.prompts[place] for place in asked], _OWN_TOKENS, stops)
    said = dict(zip(asked, answers, strict=True))
    kept = base.kept if base else tuple(map(tuple, answers))
    own = [
        TokenizedRow((*prompt, *ids), (False,) * len(prompt) + (True,) * len(ids), "neutral")
        for prompt, ids in zip(questions.prompts, kept, strict=True)
        if ids
    ]
    right = tuple(
        place in said and says(tokenizer.decode(said[place]), expected)
        for place, expected in enumerate(questions.expected)
    )
    endings: list[list[int]] = []
    if base is not None and questions.endings:
        # One token more than a trained answer has: whoever has not ended by then goes on.
        endings = session.generate(questions.endings, questions.longest + 1, stops)
    rows = questions.rows.look(session) if questions.rows else None
    return OpenLook(
        rows=rows,
        losses=tuple(rows.own.tolist() if rows else row_losses(session, questions.documents).tolist()),
        unseen=tuple(row_losses(session, questions.unseen).tolist()),
        association=questions.association.look(session) if questions.association else None,
        text=tuple(row_losses(session, questions.text).tolist()),
        own_answers=tuple(row_losses(session, own).tolist()),
        right=right,
        ended=tuple(len(ids) <= questions.longest for ids in endings),
        copied=tuple(copied_share(tokenizer.decode(ids), questions.answers) for ids in endings if questions.answers),
        longest=questions.longest,
        kept=kept,
    )


def says(text: str, expected: str) -> bool:
    """Whether a text says, as whole words, one of the expected wordings (`|` between them)."""
    said = " ".join(re.findall(r"\w+", normalise(text)))
    return any(f" {normalise(one)} " in f" {said} " for one in expected.split("|"))


def copied_share(text: str, known: Sequence[str]) -> float:
    """The longest run of words that stands in one of the known texts, as a share of the text; 0 below eight words."""
    words = text.split()
    grams = {tuple(words[start : start + _RUN]) for start in range(len(words) - _RUN + 1)}
    longest = 0
    for other in known if grams else ():
        theirs = other.split()
        if not any(tuple(theirs[start : start + _RUN]) in grams for start in range(len(theirs) - _RUN + 1)):
            continue
        match = SequenceMatcher(None, words, theirs, autojunk=False).find_longest_match()
        longest = max(longest, match.size)
    return longest / len(words) if longest else 0.0


def open_questions(prepared: Prepared) -> OpenQuestions:
    """What to ask of this run's base and tuned model; a function of the data and the seed alone."""
    conversations, unseen = prepared.conversations, prepared.unseen[:OTHER_ROWS]
    compared = not prepared.pairs  # whose chosen answers need not get likelier than others' rows
    talks = [example for example in unseen if isinstance(example, Conversation)]
    encoder, rows = prepared.encoder, prepared.train.rows
    everything = prepared.plan.config.template.train_on == "everything"
    answers = _fitting(prepared, conversations) if everything else rows
    lengths = sorted(sum(row.trained[_answer_start(row) :]) for row in answers) if conversations else [0]
    spread = rows[:: max(1, len(rows) // MATCHED_ROWS)][:MATCHED_ROWS]
    neutral = _neutral(prepared)
    asked, _ = encoder.asked(neutral)
    ends = [encoder.prompt_ids(each.prompt) for each in (talks or conversations)[:OTHER_ROWS]]
    return OpenQuestions(
        rows=match_rows(prepared, conversations, "rows") if compared else None,
        documents=() if conversations else tuple(spread),
        unseen=_fitting(prepared, unseen) if compared else (),
        association=match_rows(prepared, talks, "unseen") if prepared.goal == "generalise" else None,
        text=_fitting(prepared, [each for each in neutral if isinstance(each, Document)]),
        prompts=tuple(encoder.prompt_ids(each.prompt) for each in asked),
        expected=tuple(each.answer for each in asked),
        endings=tuple(ends[place] for place in often_alike(ends, _ENDINGS)),
        longest=lengths[(len(lengths) * 19) // 20],
        answers=tuple(each.answer for each in conversations[:_COPIED_FROM] if len(each.answer.split()) >= _RUN),
    )


def _neutral(prepared: Prepared) -> Sequence[Example]:
    data, repeated = prepared.plan.config.data, prepared.overlaps["retention"].repeated
    own = (
        read_shaped(prepared.plan.config, "retention") if data.retention else shape_rows(read_rows(data_path(NEUTRAL)))
    )
    return [each for each in own.examples if not data.retention or each.where not in repeated]


def _fitting(prepared: Prepared, examples: Sequence[Example]) -> tuple[TokenizedRow, ...]:
    """The examples as rows, answers marked, less those that the template refuses or the model cannot read whole."""
    rendered, _ = prepared.encoder.render(examples, answers_alone=True)
    rows = (marked.tokenized() for marked in mark_rows(rendered, prepared.encoder.tokenizer))
    return tuple(row for row in rows if row.target_count and len(row.ids) <= prepared.shape.context_length)


def match_rows(
    prepared: Prepared, conversations: Sequence[Conversation], name: str, most: int = MATCHED_ROWS
) -> Matching | None:
    """So many conversations, each with the answers of others that are no near-duplicates: those could be as right."""
    rng = random.Random(f"matching-{name}-{prepared.plan.config.training.seed}")
    chosen = rng.sample(conversations, min(most, len(conversations)))
    own: list[TokenizedRow] = []
    others: list[TokenizedRow] = []
    for each in chosen:
        drawn = rng.sample(conversations, min(len(conversations), _POOL))
        alike = near_twins([Document(one.answer, "") for one in drawn], [Document(each.answer, "")])
        wrong = [
            one.messages[-1]
            for place, one in enumerate(drawn)
            if place not in alike and one.answer != each.answer and one.prompt.messages != each.prompt.messages
        ]
        said = [each.messages[-1], *wrong[: CHOICES - 1]]
        group = [replace(each, messages=(*each.messages[:-1], message)) for message in said]
        rows = [_answer_only(row) for row in _fitting(prepared, group)]
        if len(rows) == CHOICES:
            own += rows[:1]
            others += rows[1:]
    return Matching(tuple(own), tuple(others)) if own else None


def _answer_only(row: TokenizedRow) -> TokenizedRow:
    """The row up to the head of its last answer, which alone is a target."""
    start = _answer_start(row)
    end = min(len(row.ids), start + _ANSWER_HEAD, start + sum(row.trained[start:]))
    return TokenizedRow(row.ids[:end], (False,) * start + (True,) * (end - start), row.where)


def _answer_start(row: TokenizedRow) -> int:
    """Where the last run of trained tokens begins."""
    end = len(row.trained) - row.trained[::-1].index(True)
    while end and row.trained[end - 1]:
        end -= 1
    return end
