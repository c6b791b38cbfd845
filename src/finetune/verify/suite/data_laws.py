"""Laws of rows: each is accounted for, whatever its shape; the seed orders and splits them; a cache changes nothing."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from hypothesis import strategies as st
from pydantic import Field

from finetune.verify.doors.answers import Epochs, Split
from finetune.verify.doors.door import UnsupportedError
from finetune.verify.recipes import FEWEST_WORDS, ModelRecipe, Recipe
from finetune.verify.suite.cases import PAIRS, PLAIN, TEXTS, TINY, Pair, Rows
from finetune.verify.suite.catalogue import law
from finetune.verify.suite.talks import comparable_rows, tokenized, tokenized_row
from finetune.verify.suite.trainer import Trainer
from finetune.verify.suite.verdicts import check

_ORDERED = [{"prompt": "q" * (1 + number % 4), "completion": f"answer {number}"} for number in range(12)]


class Seeded(Recipe):
    """A seed, and how often the rows are gone through."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)]
    epochs: Annotated[int, Field(ge=1, le=2)]


@law(
    "order.same",
    "The same seed deals rows out in the same order, epoch for epoch; 0 is a seed like any.",
    needs=["batches"],
    oracle="the order when it is asked for again",
    cases=st.builds(Seeded, seed=st.sampled_from((0, 1, 2**31)), epochs=st.integers(1, 2)),
    examples=4,
    cost=2,
)
def seed_decides_the_order(trainer: Trainer, case: Seeded) -> None:
    """Asked twice it is the same."""

    def orders() -> list[list[list[list[int]]]]:
        given = {"model": trainer.model(TINY), "settings": {**PLAIN, "training.seed": case.seed}, "rows": _ORDERED}
        dealt = trainer.ask("batches", Epochs, epochs=case.epochs, **given)
        return [[batch.ids for step in epoch for batch in step.micro] for epoch in dealt.epochs]

    first, again = orders(), orders()
    check(first == again, expected=f"one order with seed {case.seed}: {first}", got=again)


_GOOD = Pair(prompt="a", completion="b")
_ODD = st.one_of(
    PAIRS,
    st.builds(Pair, prompt=TEXTS, completion=st.sampled_from(("", " ", "\n"))),
    st.builds(Pair, prompt=TEXTS.map(lambda text: text * 20), completion=TEXTS),
)


@law(
    "data.account",
    "Every row that is read is trained on, or counted among those that are left out.",
    needs=["tokenize"],
    oracle="the number of rows that were given",
    cases=st.builds(Rows, rows=st.lists(_ODD, min_size=0, max_size=4).map(lambda rows: (_GOOD, *rows))),
    examples=10,
)
def every_row_is_accounted_for(trainer: Trainer, case: Rows) -> None:
    """Rows without an answer, and rows that are too long, are among them."""
    found = tokenized(trainer, trainer.model(TINY), case.values, {"tokens.max_length": 70})
    kept, dropped = len({row.row for row in found.rows}), sum(found.dropped.values())
    check(
        kept + dropped == len(case.rows),
        expected=f"{len(case.rows)} rows",
        got=f"{kept} that are trained on and {dropped} left out: {found.dropped}",
    )


Shape = Literal["prompt/completion", "lists", "messages", "alpaca"]


class RowShapeCase(Recipe):
    """A question and its answer, and the shape of the row that they are in."""

    pair: Pair
    shape: Shape


def _row(pair: Pair, shape: Shape) -> dict[str, Any]:
    turns = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.completion}]
    shapes: Mapping[str, dict[str, Any]] = {
        "prompt/completion": pair.model_dump(),
        "lists": {"prompt": turns[:1], "completion": turns[1:]},
        "messages": {"messages": turns},
        "alpaca": {"instruction": pair.prompt, "output": pair.completion},
    }
    return shapes[shape]


@law(
    "data.shapes",
    "What is said becomes the same tokens, and the same of them are learned, whatever shape its row has.",
    needs=["tokenize"],
    oracle="the row that has it as messages",
    cases=st.builds(RowShapeCase, pair=PAIRS, shape=st.sampled_from(("prompt/completion", "lists", "alpaca"))),
    examples=8,
)
def shape_changes_nothing(trainer: Trainer, case: RowShapeCase) -> None:
    """One conversation in two data sets, for there are trainers whose data sets have one shape only."""
    model = trainer.model(TINY)
    found = [tokenized_row(trainer, model, _row(case.pair, shape), {}) for shape in ("messages", case.shape)]
    one, other = ((row.ids, row.targets) for row in found)
    check(one == other, expected=f"as messages: {one}", got=f"as {case.shape}: {other}")


class Held(Recipe):
    """Rows, some of which say the same, and the share of them that is held out."""

    picks: Annotated[tuple[int, ...], Field(min_length=2, max_length=9, strict=False)]
    fraction: Annotated[float, Field(ge=0, lt=1)]
    seed: Annotated[int, Field(ge=0)]

    @property
    def values(self) -> list[dict[str, str]]:
        """The rows as data files have them."""
        return [{"prompt": f"question {pick}", "completion": f"answer {pick}"} for pick in self.picks]

    def split(self, trainer: Trainer) -> Split:
        """What the trainer makes of them."""
        given = {**PLAIN, "data.valid_fraction": self.fraction, "training.seed": self.seed}
        return trainer.ask("split", Split, model=trainer.model(TINY), settings=given, rows=self.values)


_HELD = st.builds(
    Held,
    picks=st.lists(st.integers(0, 6), min_size=2, max_size=9).filter(lambda picks: len(set(picks)) > 1).map(tuple),
    fraction=st.sampled_from((0.0, 0.21, 0.34, 0.5)),
    seed=st.integers(0, 3),
)


@law(
    "split.apart",
    "No row that is held out is trained on, nor is one that says the same; every row is on one of the two sides.",
    needs=["split"],
    oracle="what the rows say",
    cases=_HELD,
    examples=12,
)
def sides_are_apart(trainer: Trainer, case: Held) -> None:
    """Nothing is held out where nothing is to be, and something on either side elsewhere."""
    found = case.split(trainer)
    both = sorted({case.picks[row] for row in found.train} & {case.picks[row] for row in found.held_out})
    check(not both, expected="nothing on both sides", got=[f"question {pick}" for pick in both])
    every = sorted([*found.train, *found.held_out])
    check(every == list(range(len(case.picks))), expected=f"{len(case.picks)} rows, each once", got=every)
    wanted = case.fraction > 0
    check(bool(found.held_out) == wanted, expected=f"{case.fraction:.0%} held out", got=f"held out: {found.held_out}")


@law(
    "split.same",
    "Which rows are held out follows from the rows and the seed alone.",
    needs=["split"],
    oracle="the split when it is asked for again",
    cases=_HELD.filter(lambda case: len(set(case.picks)) > 3 and case.fraction > 0.3),
    examples=6,
)
def split_is_the_same_again(trainer: Trainer, case: Held) -> None:
    """Asked twice, with another question between, it is the same."""
    first = case.split(trainer)
    Held(picks=case.picks, fraction=case.fraction, seed=case.seed + 1).split(trainer)
    again = case.split(trainer)
    check(sorted(first.held_out) == sorted(again.held_out), expected=first.held_out, got=again.held_out)


_ROOM = FEWEST_WORDS + 1
_MODELS: Mapping[str, ModelRecipe] = {
    "plain": TINY,
    "tokenizer": ModelRecipe(turned=True),
    "begins not": ModelRecipe(bos="known", vocabulary=_ROOM),
    "begins": ModelRecipe(bos="configured", vocabulary=_ROOM),
}


class CacheCase(Recipe):
    """Rows that are encoded with a cache, and then others, or with another model or other settings."""

    rows: Annotated[tuple[Pair, ...], Field(min_length=1, strict=False)]
    before: Literal["plain", "begins not"]
    after: Literal["plain", "tokenizer", "begins", "begins not"]
    changed: Literal["nothing", "words", "template", "length"]


@st.composite
def _kept(draw: st.DrawFn) -> CacheCase:
    before, after = draw(st.sampled_from((("plain", "plain"), ("plain", "tokenizer"), ("begins not", "begins"))))
    changes = ("words", "template", "length", "nothing") if before == after else ("nothing",)
    rows = draw(st.lists(PAIRS, min_size=1, max_size=2).map(tuple))
    return CacheCase(rows=rows, before=before, after=after, changed=draw(st.sampled_from(changes)))  # type: ignore[arg-type]


@law(
    "cache.same",
    "Rows that come from a cache are those that come without it, whatever was put into it before.",
    needs=["tokenize"],
    oracle="the rows without a cache",
    cases=_kept(),
    examples=10,
    cost=3,
)
def cache_changes_nothing(trainer: Trainer, case: CacheCase) -> None:
    """Another tokenizer, other words and another template are never taken for what is kept."""
    cache = {"tokens.cache": str(trainer.folder() / "cache")}
    rows, settings = [row.model_dump() for row in case.rows], dict[str, Any]()
    tokenized(trainer, trainer.model(_MODELS[case.before]), rows, cache)
    if case.changed == "words":
        rows = [{**row, "completion": row["completion"][::-1] + "."} for row in rows]
    elif case.changed == "template":
        settings = {"template.name": "alpaca"}
    elif case.changed == "length":
        settings = {"tokens.max_length": 200}
    model = trainer.model(_MODELS[case.after])
    without = comparable_rows(tokenized(trainer, model, rows, settings))
    within = comparable_rows(tokenized(trainer, model, rows, {**settings, **cache}))
    check(within == without, expected=f"without a cache: {without}", got=f"with it: {within}")


@law(
    "cache.found",
    "What is in a cache is found again wherever the model's folder lies.",
    needs=["tokenize"],
    oracle="the number of files in the cache",
    cases=st.builds(Rows, rows=st.lists(PAIRS, min_size=1, max_size=2).map(tuple)),
    examples=2,
    cost=3,
)
def cache_is_found_again(trainer: Trainer, case: Rows) -> None:
    """Nothing new is put into it for the same rows and the same tokenizer at another place."""
    place, cache = trainer.model(TINY), trainer.folder() / "cache"
    moved = trainer.folder() / "moved"
    shutil.copytree(place, moved)
    counts = []
    for model in (place, place, moved):
        tokenized(trainer, model, case.values, {"tokens.cache": str(cache)})
        counts.append(_files(cache))
    if not counts[0]:
        raise UnsupportedError("it keeps nothing in its cache")
    check(counts[0] == counts[1], expected=f"{counts[0]} files when the rows are asked for again", got=counts[1])
    check(counts[0] == counts[2], expected=f"{counts[0]} files when the model lies elsewhere", got=counts[2])


def _files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))
