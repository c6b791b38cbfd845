"""Faults of rows on their way into epochs: caches mix them up, splits leak, orders stay the same, rows are lost."""

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from finetune import train as training
from finetune.chat import encoder, fit
from finetune.chat.encode import Marked
from finetune.chat.fit import Encoded
from finetune.chat.tokenizer import FileTokenizer
from finetune.data import overlap, shape, sources
from finetune.data.columns import ColumnFinder, Layout
from finetune.data.overlap import Overlap
from finetune.data.parts import DataSet
from finetune.data.shape import Example
from finetune.records import Batch, Message, Rendered, Row, TokenizedRow
from finetune.training import prepare, questions
from finetune.training import rows as rows_of_runs
from finetune.verify.faults.fault import fault, in_place_of, plant
from finetune.verify.faults.sessions import plant_session

Sides = tuple[list[Example], list[Example]]
Splitting = Callable[..., Sides]
Dealing = Callable[..., list[Batch]]
Encoding = Callable[..., Encoded]


@fault("A020", "data.cache_key_misses_tokenizer", "axolotl #885")
def _cache_knows_the_class() -> None:
    """A cache knows a tokenizer by its class alone."""
    plant(FileTokenizer, "identity", lambda right, tokenizer: type(tokenizer).__name__)


@fault("A020b", "data.cache_key_misses_bos", "axolotl #33")
@in_place_of("identity", FileTokenizer)
def _cache_knows_no_beginning(right: Callable[..., str], tokenizer: FileTokenizer) -> str:
    """A cache does not know whether texts begin with a mark."""
    adds, tokenizer.adds_bos = tokenizer.adds_bos, False
    try:
        return str(right(tokenizer))
    finally:
        tokenizer.adds_bos = adds


@fault("A020c", "data.cache_key_misses_words")
@in_place_of("cache_key", encoder)
def _cache_counts_rows(right: Callable[..., str], rows: Sequence[Rendered], tokenizer: FileTokenizer) -> str:
    """A cache knows rows by their number alone."""
    return f"{len(rows)}-{tokenizer.identity()}"


@fault("A022", "data.cache_key_too_broad", "axolotl #3303")
@in_place_of("cache_key", encoder)
def _cache_knows_the_place(right: Callable[..., str], rows: Sequence[Rendered], tokenizer: FileTokenizer) -> str:
    """The place of a file is in the name of what is kept."""
    return hashlib.sha256(f"{right(rows, tokenizer)} {tokenizer.folder}".encode()).hexdigest()


@fault("A024", "data.split_after_shuffle_mismatch", "marin #2700")
@in_place_of("hold_out", prepare)
def _sides_overlap(right: Splitting, examples: Sequence[Example], fraction: float, seed: int) -> Sides:
    """One side is shuffled, and the other is not."""
    train_side, held = right(examples, fraction, seed)
    shuffled = random.Random(seed).sample(list(examples), len(examples))
    return (shuffled[: len(train_side)] if held else train_side), held


@fault("A024b", "data.split_by_place")
@in_place_of("hold_out", prepare)
def _split_by_place(right: Splitting, examples: Sequence[Example], fraction: float, seed: int) -> Sides:
    """Rows that say the same are on both sides."""
    count = max(1, round(fraction * len(examples))) if fraction else 0
    held = set(random.Random(seed).sample(range(len(examples)), count))
    inside, out = ([each for at, each in enumerate(examples) if (at in held) == side] for side in (False, True))
    return inside, out


@fault("A024c", "data.overlap_unnoticed")
@in_place_of("find_overlap", questions)
def _trained_rows_are_unseen(
    right: Callable[..., Overlap], rows: Sequence[Example], training: Sequence[Example]
) -> Overlap:
    """Validation rows that are trained on, too, count as unseen."""
    return right(rows, ())


@fault("A024d", "data.near_twins_unnoticed")
@in_place_of("near_twins", overlap)
def _only_the_same_words(right: Callable[..., dict[int, int]], *given: object) -> dict[int, int]:
    """Validation rows that training rows nearly repeat count as unseen."""
    return {}


@fault("A025", "data.split_depends_on_rank", "OpenTau #498")
@in_place_of("hold_out", prepare)
def _split_by_global_dice(right: Splitting, examples: Sequence[Example], fraction: float, seed: int) -> Sides:
    """The split follows what the global dice showed."""
    return right(examples, fraction, random.getrandbits(31))


@fault("A027", "data.last_batch_dropped", "mlx-examples #843")
@in_place_of("epoch_batches", training)
def _only_full_batches(right: Dealing, rows: Sequence[TokenizedRow], batch_size: int, **named: object) -> list[Batch]:
    """Rows that fill no batch are never trained on."""
    batches = right(rows, batch_size, **named)
    return [batch for batch in batches if len(batch.sequences) == batch_size] or batches


@fault("A027b", "data.sorted_by_columns", "mlx-lm 0.32.2")
@in_place_of("iter_rows", sources)
def _fewer_columns_first(right: Callable[..., Iterable[Row]], path: Path) -> list[Row]:
    """Rows with fewer columns come first."""
    return sorted(right(path), key=lambda row: len(row.values))


@fault("A027c", "data.last_file_only")
@in_place_of("rows_of", sources)
def _last_file_only(right: Callable[..., Iterable[Row]], each: DataSet) -> Iterable[Row]:
    """Of several files the last is read."""
    return right(replace(each, files=each.files[-1:]))


@fault("A029", "data.same_order_every_epoch", "transformers #4398")
def _one_order() -> None:
    """Every epoch has the order of the first."""
    plant(training, "epoch_batches", lambda right, *given, epoch, **named: right(*given, epoch=0, **named))


@fault("A030", "data.seed_not_forwarded", "litgpt #1425")
def _order_without_seed() -> None:
    """The order of rows is made without the seed."""
    plant(training, "epoch_batches", lambda right, *given, seed, **named: right(*given, seed=42, **named))


@fault("A030b", "data.adapter_without_seed")
def _adapter_without_seed() -> None:
    """The adapter is made without the seed."""
    plant_session("attach", lambda right, session, target, seed: right(session, target, 42))


@fault("A032", "data.filter_after_truncation", "axolotl #1867")
@in_place_of("fit_rows", encoder)
def _cut_then_filter(right: Encoding, rows: Iterable[Marked], *, max_length: int, **named: object) -> Encoded:
    """Rows are cut first, so none is too long."""
    cut = (replace(row, ids=row.ids[:max_length], marks=row.marks[:max_length]) for row in rows)
    return right(cut, max_length=max_length, **named)


@fault("A034", "data.truncate_via_filter", "axolotl #3401")
@in_place_of("fit_rows", encoder)
def _left_out_for_cut(right: Encoding, rows: Iterable[Marked], *, truncation: str, **named: object) -> Encoded:
    """Rows that could be cut are left out."""
    return right(rows, truncation="drop" if truncation == "truncate_prompt" else truncation, **named)


@fault("A034b", "data.ids_cut_alone", "axolotl #3401")
@in_place_of("shorten_row", fit)
def _marks_are_not_cut(right: Callable[..., list[Marked]], row: Marked, *given: object) -> list[Marked]:
    """Ids are cut, and their marks are not."""
    return [replace(piece, marks=row.marks) if len(piece.ids) < len(row.ids) else piece for piece in right(row, *given)]


@fault("A034c", "data.cut_uncounted")
@in_place_of("fit_rows", encoder)
def _left_out_uncounted(right: Encoding, rows: Iterable[Marked], **named: object) -> Encoded:
    """Rows that are too long are left out and not counted."""
    found = right(rows, **named)
    dropped = {why: count for why, count in found.counts.dropped.items() if not why.startswith("longer")}
    return replace(found, counts=replace(found.counts, dropped=dropped))


@fault("A035", "data.steps_from_rows_not_packs", "TRL #1027")
def _steps_of_rows() -> None:
    """With packing, steps are counted in rows."""
    plant(prepare, "sequences_of", lambda right, rows, **named: [(row,) for row in rows])


@fault("A036", "data.label_ignored")
@in_place_of("layout", ColumnFinder)
def _labels_are_passed_over(right: Callable[..., Layout], finder: ColumnFinder, row: Row) -> Layout:
    """Answers that are labelled bad are learned as if they were good."""
    plain = {name: value for name, value in row.values.items() if name not in ("label", "kto_tag")}
    return right(finder, replace(row, values=plain))


@fault("A036b", "data.rejected_learned")
@in_place_of("layout", ColumnFinder)
def _rejected_is_learned(right: Callable[..., Layout], finder: ColumnFinder, row: Row) -> Layout:
    """Of a good and a bad answer the bad one is learned."""
    if "rejected" not in row.values:
        return right(finder, row)
    asked = {"prompt": "prompt", "completion": "rejected"}
    return Layout("prompt/completion", asked) if "prompt" in row.values else Layout("chat", {"messages": "rejected"})


@fault("A036c", "data.weightless_row_learned")
@in_place_of("learned_of", shape)
def _weightless_rows_are_learned(right: Callable[..., bool | None], of: Row, keys: Sequence[str]) -> bool | None:
    """A row is learned although it says that it is not to be."""
    return right(of, keys) or None


@fault("A037", "data.columns_swapped")
@in_place_of("layout", ColumnFinder)
def _columns_are_swapped(right: Callable[..., Layout], finder: ColumnFinder, row: Row) -> Layout:
    """Columns that the settings name are taken in the order in which they stand in the file."""
    found = right(finder, row)
    if not finder.columns:
        return found
    order = [name for name in row.values if name in found.columns.values()]
    return replace(found, columns=dict(zip(found.columns, order, strict=True)))


@fault("A037b", "data.turns_swapped")
@in_place_of("messages_of", shape)
def _turns_change_places(right: Callable[..., tuple[Message, ...]], row: Row, key: str) -> tuple[Message, ...]:
    """In `conversations` what is asked and what is answered change places."""
    found = right(row, key)
    said = [each.content for each in found] if key == "messages" else [each.content for each in reversed(found)]
    return tuple(replace(each, content=content) for each, content in zip(found, said, strict=True))


@fault("A038", "data.mix_weights_are_sizes")
@in_place_of("mixed_counts", sources)
def _weights_are_of_rows(
    right: Callable[..., list[int]], sizes: Sequence[int], weights: Sequence[float], *given: object
) -> list[int]:
    """In a mixture each source gives the share of its own rows that its weight is of the largest."""
    return [max(1, int(size * weight / max(weights))) for size, weight in zip(sizes, weights, strict=True)]


@fault("A038b", "data.mix_without_seed")
def _mixture_without_seed() -> None:
    """What a mixture has of its sources is drawn without the seed."""
    plant(rows_of_runs, "SourcedRows", lambda right, *given, seed, **named: right(*given, seed=42, **named))


@fault("A038c", "data.mix_with_repeats")
@in_place_of("rows_of", sources)
def _rows_come_twice(right: Callable[..., Iterable[Row]], each: DataSet) -> Iterable[Row]:
    """A small source is gone through again, so that it lasts as long as the others."""
    found = list(right(each))
    return [*found, *found]


@fault("A029b", "data.same_neighbours", "mlx-lm 0.32.2")
@in_place_of("epoch_batches", training)
def _batches_are_made_once(right: Dealing, *given: object, seed: int, epoch: int, **named: object) -> list[Batch]:
    """Batches are made once, and only their order is drawn anew for an epoch."""
    batches = list(right(*given, seed=seed, epoch=0, **named))
    random.Random(f"{seed}-{epoch}").shuffle(batches)
    return batches


@fault("A033", "data.length_in_16_bits")
@in_place_of("fit_rows", encoder)
def _lengths_in_16_bits(right: Encoding, rows: Iterable[Marked], *, max_length: int, **named: object) -> Encoded:
    """Lengths are kept in 16 bits, so that no row is longer than 32,767 tokens."""
    return right(rows, max_length=min(max_length, 32_767), **named)
