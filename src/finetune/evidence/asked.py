"""Chooses what one look asks: the same of base and tuned model, and as much as the budget of the run allows."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.batches import fixed_batches
from finetune.evidence.budget import LOOKS, Budget, Prices
from finetune.evidence.open_answers import MATCHED_ROWS, OTHER_ROWS, OpenQuestions, often_alike, open_questions
from finetune.records import Batch, Question, TokenizedRow
from finetune.training.prepare import Prepared

FEWEST_ROWS, FEWEST_MATCHED = 16, 24
"""So many rows of each kind are asked whatever it costs: with 14 of 16 that agree an exact test at 1% decides.

Of matched rows a model must gain seven, and none it lost; a base that tells six of ten already leaves it nine of 24.
"""
_FIXED_ROWS = 128
_FIXED_TOKENS = 4096
_FEWEST_FIXED = 8
"""The loss before and after is measured on up to so many rows, and fewer where rows are long."""
_RELOADED_PROMPTS = 8
_RELOADED_TOKENS = 32
"""Of so many rows the first tokens are gone through again by a fresh process."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Everything that one look asks, and what that leaves of the budget.

    `held_out`: rows of which no training row says the prompt or the answer; `alike`: the other held-out rows.
    """

    learning: tuple[Question, ...]
    retention: tuple[Question, ...]
    fixed: tuple[Batch, ...]
    held_out: tuple[Batch, ...]
    alike: tuple[Batch, ...]
    open: OpenQuestions | None
    budget: Budget

    def told(self) -> dict[str, Any]:
        """How much is asked and what it was expected to cost, for the record."""
        openly = self.open
        rows = {
            "questions": len(self.learning),
            "retention questions": len(self.retention),
            "fixed rows": sum(len(batch.sequences) for batch in self.fixed),
        }
        if openly:
            rows |= {
                "matched rows": len(openly.rows.own) if openly.rows else 0,
                "unseen rows": len(openly.unseen),
                "neutral texts": len(openly.text),
                "neutral prompts": len(openly.prompts),
                "answers to their end": len(openly.endings),
            }
        return {"asked": rows, "tokens": self.budget.told()}


def what_to_ask(prepared: Prepared) -> Asked:
    """What to ask of this run's base and tuned model; a function of its plan and data alone."""
    prices = Prices.of(prepared)
    if prepared.answers != "open":
        return _asked(prepared, prices, None, OTHER_ROWS)
    openly = open_questions(prepared)
    # From the dearest to the cheapest. Matched rows go last: a model must gain several of them for a verdict.
    sizes = [(MATCHED_ROWS, others) for others in range(OTHER_ROWS, FEWEST_ROWS, -1)]
    sizes += [(matched, FEWEST_ROWS) for matched in range(MATCHED_ROWS, FEWEST_MATCHED - 1, -1)]

    def ask(place: int) -> Asked:
        matched, others = sizes[place]
        return _asked(prepared, prices, openly.at_most(matched, others), others)

    def fits(place: int) -> bool:
        budget = ask(place).budget
        return budget.looks <= LOOKS * budget.allowed

    return ask(bisect_left(range(len(sizes) - 1), True, key=fits))  # noqa: FBT003


def reloaded(prepared: Prepared) -> list[tuple[int, ...]]:
    """The prompts that a fresh process goes through again with what was saved."""
    return [row.ids[:_RELOADED_TOKENS] for row in prepared.train.rows[:_RELOADED_PROMPTS]]


def _asked(prepared: Prepared, prices: Prices, openly: OpenQuestions | None, rows: int) -> Asked:
    config = prepared.plan.config
    learning, retention, most = prepared.questions, prepared.retention, _FIXED_ROWS
    if openly:  # beside the claims, these are told and do not count
        most = rows // 2
        learning, retention = _cheapest(learning, most), _cheapest(retention, most)
    fixed = fixed_batches(_fixed_rows(prepared, most), config.training.batch_size)
    held_out, alike = (fixed_batches(rows, config.training.batch_size) for rows in _held_out(prepared))
    questions = prices.asking(prepared, learning)
    # A fresh process goes through the prompts with and without what was saved, this one through them twice, and once in
    # float64, which costs as much again.
    check = prices.process + 6 * prices.forward * sum(map(len, reloaded(prepared)))
    look = prices.scoring((*fixed, *held_out, *alike)) + questions + prices.asking(prepared, retention)
    budget = Budget(
        share=config.judge.budget,
        steps=prepared.total_steps,
        step=prices.step,
        allowed=prices.allowed,
        looks=2 * look + check + (openly.price(prices) if openly else 0.0),
        memory=prices.memory(prepared),
        control_look=2 * questions + (prices.reference(prepared) + 2 * look if prepared.pairs else 0.0),
    )
    return Asked(learning, retention, tuple(fixed), tuple(held_out), tuple(alike), openly, budget)


def _cheapest(questions: Sequence[Question], count: int) -> tuple[Question, ...]:
    return tuple(questions[place] for place in often_alike([each.ids for each in questions], count))


def _fixed_rows(prepared: Prepared, most: int) -> Sequence[TokenizedRow]:
    """Training rows, evenly spread over the data when there are many."""
    rows = prepared.train.rows
    most = max(_FEWEST_FIXED, min(most, _FIXED_TOKENS * len(rows) // prepared.train.counts.tokens))
    return rows[:: max(1, len(rows) // most)][:most]


def _held_out(prepared: Prepared) -> tuple[list[TokenizedRow], list[TokenizedRow]]:
    """The held-out rows on which the loss is judged, and those whose words training repeats.

    What is nearly said in training is another row still: rows about one subject are so. It is not unseen, and told.
    """
    sides: tuple[list[TokenizedRow], list[TokenizedRow]] = ([], [])
    repeated = prepared.overlaps["valid"].repeated
    for row in prepared.held_out.rows if prepared.held_out else ():
        sides[row.where.partition(" piece ")[0] in repeated].append(row)
    return sides
