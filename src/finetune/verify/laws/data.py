"""Laws of rows: each is accounted for, whatever its shape; the seed orders and splits them; a cache changes nothing."""

import csv
import gzip
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.verify.catalogue import law, oracle
from finetune.verify.check import check
from finetune.verify.client import SubjectClient
from finetune.verify.laws.helpers import comparable, refused, text_of, tokenized, tokenized_row
from finetune.verify.subjects.answers import Epochs, Mixture, Split, TokenRows, UnseenRows
from finetune.verify.subjects.subject import UnsupportedError
from finetune_strategies.cases import data as cases
from finetune_strategies.cases.rows import PLAIN, TINY, Pair, Rows
from finetune_strategies.recipes import FEWEST_WORDS, ModelRecipe


@law("order.epochs", ["batches"], cases.SHUFFLED, examples=2, cost=2)
@oracle("two shuffles of twelve rows of one length are alike once in 479 million times")
def epochs_differ(trainer: SubjectClient, case: cases.Shuffled) -> None:
    """Rows come in another order in the next epoch."""
    first, second = _orders(trainer, case, case.seed, epochs=2)
    check(first != second, expected="another order", got=f"{first} twice")


@law("order.seeds", ["batches"], cases.SHUFFLED, examples=2, cost=2)
@oracle("two shuffles of twelve rows of one length are alike once in 479 million times")
def seeds_differ(trainer: SubjectClient, case: cases.Shuffled) -> None:
    """Another seed is another order of rows."""
    [first], [second] = (_orders(trainer, case, seed, epochs=1) for seed in (case.seed, case.seed + 1))
    check(first != second, expected=f"another order with seed {case.seed + 1}", got=f"{first} with both")


def _orders(trainer: SubjectClient, case: cases.Shuffled, seed: int, *, epochs: int) -> list[list[list[int]]]:
    """The sequences of each epoch, in order."""
    settings = {**PLAIN, "training.batch_size": 1, "training.seed": seed}
    given = {"model": trainer.model(TINY), "settings": settings, "rows": case.values}
    dealt = trainer.ask("batches", Epochs, epochs=epochs, **given)
    check(len(dealt.epochs) == epochs, expected=f"{epochs} epochs", got=f"{len(dealt.epochs)} epochs")
    return [[ids for step in epoch for batch in step.micro for ids in batch.ids] for epoch in dealt.epochs]


@law("order.neighbours", ["batches"], cases.NEIGHBOURS, examples=3, cost=2)
@oracle("twelve rows fall into such batches in more than 10,000 ways: thrice alike once in 100 million times")
def neighbours_change(trainer: SubjectClient, case: cases.Neighbours) -> None:
    """Rows that share a batch are not the same in every epoch."""
    settings = {**PLAIN, "training.batch_size": case.size, "training.seed": case.seed}
    given = {"model": trainer.model(TINY), "settings": settings, "rows": case.values}
    dealt = trainer.ask("batches", Epochs, epochs=3, **given)
    check(len(dealt.epochs) == 3, expected="3 epochs", got=f"{len(dealt.epochs)} epochs")
    together = [
        sorted(sorted(batch.ids) for step in epoch for batch in step.micro if len(batch.ids) > 1)
        for epoch in dealt.epochs
    ]
    if not all(together):
        raise UnsupportedError("no two rows share a batch")
    alike = together[0] == together[1] == together[2]
    check(not alike, expected="other rows together in another epoch", got="the same rows together in three epochs")


_ORDERED = [{"prompt": "q" * (1 + number % 4), "completion": f"answer {number}"} for number in range(12)]


@law("order.same", ["batches"], cases.ORDER_SAME, examples=4, cost=2)
@oracle("the order when it is asked for again")
def seed_decides_the_order(trainer: SubjectClient, case: cases.Seeded) -> None:
    """The same seed deals rows out in the same order, epoch for epoch; 0 is a seed like any."""

    def orders() -> list[list[list[list[int]]]]:
        given = {"model": trainer.model(TINY), "settings": {**PLAIN, "training.seed": case.seed}, "rows": _ORDERED}
        dealt = trainer.ask("batches", Epochs, epochs=case.epochs, **given)
        return [[batch.ids for step in epoch for batch in step.micro] for epoch in dealt.epochs]

    first, again = orders(), orders()
    check(first == again, expected=f"one order with seed {case.seed}: {first}", got=again)


@law("data.account", ["tokenize"], cases.DATA_ACCOUNT, examples=10)
@oracle("the number of rows that were given")
def every_row_is_accounted_for(trainer: SubjectClient, case: Rows) -> None:
    """Every row that is read is trained on, or counted among those that are left out."""
    found = tokenized(trainer, trainer.model(TINY), case.values, {"tokens.max_length": 70})
    kept, dropped = len({row.row for row in found.rows}), sum(found.dropped.values())
    check(
        kept + dropped == len(case.rows),
        expected=f"{len(case.rows)} rows",
        got=f"{kept} that are trained on and {dropped} left out: {found.dropped}",
    )


def _row(pair: Pair, shape: cases.Shape) -> dict[str, Any]:
    turns = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.completion}]
    shapes: Mapping[str, dict[str, Any]] = {
        "prompt/completion": pair.model_dump(),
        "lists": {"prompt": turns[:1], "completion": turns[1:]},
        "messages": {"messages": turns},
        "alpaca": {"instruction": pair.prompt, "output": pair.completion},
    }
    return shapes[shape]


@law("data.shapes", ["tokenize"], cases.DATA_SHAPES, examples=8)
@oracle("the row that has it as messages")
def shape_changes_nothing(trainer: SubjectClient, case: cases.Shaped) -> None:
    """What is said becomes the same tokens, and the same of them are learned, whatever shape its row has."""
    model = trainer.model(TINY)
    found = [tokenized_row(trainer, model, _row(case.pair, shape), {}) for shape in ("messages", case.shape)]
    one, other = ((row.ids, row.targets) for row in found)
    check(one == other, expected=f"as messages: {one}", got=f"as {case.shape}: {other}")


@law("data.names", ["tokenize"], cases.DATA_NAMES, examples=8)
@oracle("the row that has it as a prompt and a completion")
def common_names_are_known(trainer: SubjectClient, case: cases.Spelled) -> None:
    """What is said becomes the same tokens, and the same of them are learned, by whatever common names it is given."""
    model = trainer.model(TINY)
    found = [tokenized_row(trainer, model, row, {}) for row in (case.pair.model_dump(), case.value)]
    one, other = ((row.ids, row.targets) for row in found)
    check(one == other, expected=f"as prompt and completion: {one}", got=f"as {case.spelling}: {other}")


@law("data.columns", ["tokenize"], cases.DATA_COLUMNS, examples=8)
@oracle("the row whose columns are called prompt and completion")
def mapped_column_is_what_it_says(trainer: SubjectClient, case: cases.Mapped) -> None:
    """A column that the settings name for a field is that field, whatever it is called."""
    model, mapping = trainer.model(TINY), {"prompt": case.asked, "completion": case.answered}
    named = tokenized_row(trainer, model, case.pair.model_dump(), {})
    mapped = tokenized_row(trainer, model, case.value, {"data.columns": mapping})
    one, other = ((row.ids, row.targets) for row in (named, mapped))
    check(one == other, expected=f"by name: {one}", got=f"mapped: {other}")


@law("data.judged", ["tokenize"], cases.DATA_JUDGED, examples=12)
@oracle("the bytes of the bad answer: no other text has one of them")
def what_is_judged_bad_is_never_learned(trainer: SubjectClient, case: cases.Judged) -> None:
    """An answer that its row or message says is not to be learned never is: it is left out, or its rows are refused."""
    model = trainer.model(TINY)
    found = refused(lambda: tokenized(trainer, model, case.values, {"tokens.max_length": 1000}))
    words = trainer.words(model)
    said = b"".join(text_of(words, row, trained=True) for row in found.rows) if found else b""
    learned = sorted(set(case.bad) & set(said.decode(errors="replace")))
    check(not learned, expected=f"nothing learned of {case.bad!r}", got=f"learned: {said!r}")


def _file_of(folder: Path, rows: Sequence[Mapping[str, str]], kind: cases.FileKind) -> Path:
    """These rows in a file of a kind, or in a folder of two files."""
    lines = [json.dumps(row) + "\n" for row in rows]
    text = "".join(lines)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    if kind == "two shards":
        for at, part in enumerate((lines[:1], lines[1:])):
            (folder / f"train-{at:05d}-of-00002.jsonl").write_text("".join(part), encoding="utf-8")
        return folder
    if kind in ("rows.csv", "rows.tsv", "semicolon.csv"):
        table = io.StringIO(newline="")
        delimiter = {"rows.tsv": "\t", "semicolon.csv": ";"}.get(kind, ",")
        csv.writer(table, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows(
            [list(columns), *zip(*columns.values(), strict=True)]
        )
        text = table.getvalue()
    elif kind.endswith(".json"):
        text = json.dumps({"list.json": rows, "columns.json": columns}.get(kind, {"version": 1, "data": rows}))
    content = text.encode("utf-16" if kind == "utf16.jsonl" else "utf-8")
    (folder / kind).write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    return folder / kind


@law("data.files", ["tokenize", "tokenize_file"], cases.DATA_FILES, examples=16)
@oracle("the same rows, handed over one by one")
def file_changes_nothing(trainer: SubjectClient, case: cases.Filed) -> None:
    """Every row of a file or a folder is trained on, or left out for its reason, as it is whatever it is kept in."""
    model, settings = trainer.model(TINY), {"tokens.max_length": 70}
    file = _file_of(trainer.folder(), case.values, case.kind)
    wanted = tokenized(trainer, model, case.values, settings)
    given = {"settings": {**PLAIN, **settings}, "file": str(file)}
    found = trainer.ask("tokenize_file", TokenRows, model=model, **given)
    one, other = ([(row.ids, row.targets) for row in rows.rows] for rows in (wanted, found))
    check(one == other, expected=f"{len(one)} rows: {one}", got=f"{len(other)} rows of {case.kind}: {other}")
    check(wanted.dropped == found.dropped, expected=f"left out: {wanted.dropped}", got=found.dropped)


def _split(trainer: SubjectClient, case: cases.Held) -> Split:
    given = {**PLAIN, "data.valid_fraction": case.fraction, "training.seed": case.seed}
    return trainer.ask("split", Split, model=trainer.model(TINY), settings=given, rows=case.values)


@law("split.apart", ["split"], cases.HELD, examples=12)
@oracle("what the rows say")
def sides_are_apart(trainer: SubjectClient, case: cases.Held) -> None:
    """No row that is held out is trained on, nor is one that says the same; every row is on one of the two sides."""
    found = _split(trainer, case)
    both = sorted({case.picks[row] for row in found.train} & {case.picks[row] for row in found.held_out})
    check(not both, expected="nothing on both sides", got=[f"question {pick}" for pick in both])
    every = sorted([*found.train, *found.held_out])
    check(every == list(range(len(case.picks))), expected=f"{len(case.picks)} rows, each once", got=every)
    wanted = case.fraction > 0
    check(bool(found.held_out) == wanted, expected=f"{case.fraction:.0%} held out", got=f"held out: {found.held_out}")


@law("split.same", ["split"], cases.SPLIT_SAME, examples=6)
@oracle("the split when it is asked for again")
def split_is_the_same_again(trainer: SubjectClient, case: cases.Held) -> None:
    """Which rows are held out follows from the rows and the seed alone."""
    first = _split(trainer, case)
    _split(trainer, case.model_copy(update={"seed": case.seed + 1}))
    again = _split(trainer, case)
    check(sorted(first.held_out) == sorted(again.held_out), expected=first.held_out, got=again.held_out)


@law("split.unseen", ["unseen"], cases.REPEATED, examples=10)
@oracle("which of the rows were made of the same words")
def trained_rows_are_not_unseen(trainer: SubjectClient, case: cases.Repeated) -> None:
    """Rows that training repeats, word for word or nearly, are not called unseen; on the same no loss is measured."""
    given = {"model": trainer.model(TINY), "settings": PLAIN}
    found = trainer.ask("unseen", UnseenRows, rows=case.trained, valid=case.valid, **given)
    wanted = [place for place, (pick, _) in enumerate(case.held) if pick not in case.picks]
    check(found.unseen == wanted, expected=f"unseen: {wanted}", got=f"unseen: {found.unseen}")
    same = {place for place, (pick, how) in enumerate(case.held) if pick in case.picks and how != "otherwise"}
    both = sorted(same & set(found.measured))
    check(not both, expected="no row is measured that was trained on", got=[case.valid[place] for place in both])
    check(set(wanted) <= set(found.measured), expected=f"measured: {wanted}", got=f"measured: {found.measured}")


@law("data.mix", ["mix"], cases.MIXED, examples=12)
@oracle("the weights and the numbers of rows; another seed draws the same rows once in 100,000 times at most")
def mixture_keeps_its_weights(trainer: SubjectClient, case: cases.Mixed) -> None:
    """A mixture has so many rows of each source as weights say, none twice, and the most there can be, by the seed."""
    first, again, other = (_mixed(trainer, case, seed) for seed in (case.seed, case.seed, case.seed + 1))
    check(len(first) == len(case.sizes), expected=f"rows of {len(case.sizes)} sources", got=first)
    shares = [weight / sum(case.weights) for weight in case.weights]
    total = sum(map(len, first))
    for number, (rows, size, share) in enumerate(zip(first, case.sizes, shares, strict=True)):
        of = f"source {number}, of {size} rows"
        check(len({*rows}) == len(rows) and {*rows} <= {*range(size)}, expected=f"rows of {of}, none twice", got=rows)
        near = bool(rows) and abs(len(rows) - share * total) < 1
        check(near, expected=f"{share * total:.1f} rows of {total} from {of}", got=f"{len(rows)} rows")
    most = min(size / share for size, share in zip(case.sizes, shares, strict=True))
    check(most - 1 < total, expected=f"{int(most)} rows in all", got=f"{total} rows")
    check(first == again, expected=f"again with seed {case.seed}: {first}", got=again)
    if case.ways > 100_000:
        check(first != other, expected=f"other rows with seed {case.seed + 1}", got=f"{first} with both")


def _mixed(trainer: SubjectClient, case: cases.Mixed, seed: int) -> list[list[int]]:
    """The numbers of the rows that are taken of each source."""
    given = {**PLAIN, "data.mix": list(case.weights), "training.seed": seed}
    found = trainer.ask("mix", Mixture, model=trainer.model(TINY), settings=given, sources=case.sources)
    return [sorted(rows) for rows in found.rows]


_ROOM = FEWEST_WORDS + 1

_MODELS: Mapping[str, ModelRecipe] = {
    "plain": TINY,
    "tokenizer": ModelRecipe(turned=True),
    "begins not": ModelRecipe(bos="known", vocabulary=_ROOM),
    "begins": ModelRecipe(bos="configured", vocabulary=_ROOM),
}


@law("cache.same", ["tokenize"], cases.CACHE_SAME, examples=10, cost=3)
@oracle("the rows without a cache")
def cache_changes_nothing(trainer: SubjectClient, case: cases.Cached) -> None:
    """Rows that come from a cache are those that come without it, whatever was put into it before."""
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
    without = comparable(tokenized(trainer, model, rows, settings))
    within = comparable(tokenized(trainer, model, rows, {**settings, **cache}))
    check(within == without, expected=f"without a cache: {without}", got=f"with it: {within}")


@law("cache.found", ["tokenize"], cases.CACHE_FOUND, examples=2, cost=3)
@oracle("the number of files in the cache")
def cache_is_found_again(trainer: SubjectClient, case: Rows) -> None:
    """What is in a cache is found again wherever the model's folder lies."""
    place, cache = trainer.model(TINY), trainer.folder() / "cache"
    moved = trainer.folder() / "moved"
    shutil.copytree(place, moved)
    counts = []
    for model in (place, place, moved):
        tokenized(trainer, model, case.values, {"tokens.cache": str(cache)})
        counts.append(sum(path.is_file() for path in cache.rglob("*")))
    if not counts[0]:
        raise UnsupportedError("it keeps nothing in its cache")
    check(counts[0] == counts[1], expected=f"{counts[0]} files when the rows are asked for again", got=counts[1])
    check(counts[0] == counts[2], expected=f"{counts[0]} files when the model lies elsewhere", got=counts[2])


@law("rows.remarks", ["batches"], cases.ROWS_REMARKS, examples=8)
@oracle("the batches of the same rows without it")
def remarks_change_no_batch(trainer: SubjectClient, case: cases.Remarked) -> None:
    """A key of a row that is not read changes no batch."""
    settings = {**PLAIN, "training.batch_size": 2, "training.gradient_accumulation_steps": 1, "training.seed": 3}
    noted = [{**row, "source": "a note"} if place == case.remarked else row for place, row in enumerate(case.values)]
    model = trainer.model(TINY)
    plain, other = (
        trainer.ask("batches", Epochs, model=model, settings=settings, rows=rows, epochs=1)
        for rows in (case.values, noted)
    )
    before, after = ([sorted(step.micro[0].ids) for step in dealt.epochs[0]] for dealt in (plain, other))
    check(before == after, expected=before, got=after)
