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
from finetune.data.shape import Example
from finetune.records import Batch, Rendered, Row, TokenizedRow
from finetune.training import prepare
from finetune.verify.faults.fault import fault, plant
from finetune.verify.faults.sessions import plant_session

Sides = tuple[list[Example], list[Example]]


@fault(
    "A020", "data.cache_key_misses_tokenizer", real="axolotl #885", what="a cache knows a tokenizer by its class alone"
)
def _cache_knows_the_class() -> None:
    plant(FileTokenizer, "identity", lambda right, tokenizer: type(tokenizer).__name__)


@fault(
    "A020b",
    "data.cache_key_misses_bos",
    real="axolotl #33",
    what="a cache does not know whether texts begin with a mark",
)
def _cache_knows_no_beginning() -> None:
    def wrong(right: Callable[..., str], tokenizer: FileTokenizer) -> str:
        adds, tokenizer.adds_bos = tokenizer.adds_bos, False
        try:
            return str(right(tokenizer))
        finally:
            tokenizer.adds_bos = adds

    plant(FileTokenizer, "identity", wrong)


@fault("A020c", "data.cache_key_misses_words", real="", what="a cache knows rows by their number alone")
def _cache_counts_rows() -> None:
    def wrong(right: Callable[..., str], rows: Sequence[Rendered], tokenizer: FileTokenizer) -> str:
        return f"{len(rows)}-{tokenizer.identity()}"

    plant(encoder, "cache_key", wrong)


@fault(
    "A022", "data.cache_key_too_broad", real="axolotl #3303", what="the place of a file is in the name of what is kept"
)
def _cache_knows_the_place() -> None:
    def wrong(right: Callable[..., str], rows: Sequence[Rendered], tokenizer: FileTokenizer) -> str:
        return hashlib.sha256(f"{right(rows, tokenizer)} {tokenizer.folder}".encode()).hexdigest()

    plant(encoder, "cache_key", wrong)


@fault(
    "A024", "data.split_after_shuffle_mismatch", real="marin #2700", what="one side is shuffled, and the other is not"
)
def _sides_overlap() -> None:
    def wrong(right: Callable[..., Sides], examples: Sequence[Example], fraction: float, seed: int) -> Sides:
        train_side, held = right(examples, fraction, seed)
        shuffled = random.Random(seed).sample(list(examples), len(examples))
        return (shuffled[: len(train_side)] if held else train_side), held

    plant(prepare, "hold_out", wrong)


@fault("A024b", "data.split_by_place", real="", what="rows that say the same are on both sides")
def _split_by_place() -> None:
    def wrong(right: Callable[..., Sides], examples: Sequence[Example], fraction: float, seed: int) -> Sides:
        count = max(1, round(fraction * len(examples))) if fraction else 0
        held = set(random.Random(seed).sample(range(len(examples)), count))
        inside, out = ([each for at, each in enumerate(examples) if (at in held) == side] for side in (False, True))
        return inside, out

    plant(prepare, "hold_out", wrong)


@fault("A025", "data.split_depends_on_rank", real="OpenTau #498", what="the split follows what the global dice showed")
def _split_by_global_dice() -> None:
    def wrong(right: Callable[..., Sides], examples: Sequence[Example], fraction: float, seed: int) -> Sides:
        return right(examples, fraction, random.getrandbits(31))

    plant(prepare, "hold_out", wrong)


@fault("A027", "data.last_batch_dropped", real="mlx-examples #843", what="rows that fill no batch are never trained on")
def _only_full_batches() -> None:
    def wrong(
        right: Callable[..., list[Batch]], rows: Sequence[TokenizedRow], batch_size: int, **named: object
    ) -> list[Batch]:
        batches = right(rows, batch_size, **named)
        return [batch for batch in batches if len(batch.sequences) == batch_size] or batches

    plant(training, "epoch_batches", wrong)


@fault("A027b", "data.sorted_by_columns", real="mlx-lm 0.32.2", what="rows with fewer columns come first")
def _fewer_columns_first() -> None:
    def wrong(right: Callable[..., list[Row]], path: Path, **named: object) -> list[Row]:
        return sorted(right(path, **named), key=lambda row: len(row.values))

    plant(prepare, "read_rows", wrong)


@fault("A029", "data.same_order_every_epoch", real="transformers #4398", what="every epoch has the order of the first")
def _one_order() -> None:
    plant(training, "epoch_batches", lambda right, *given, epoch, **named: right(*given, epoch=0, **named))


@fault("A030", "data.seed_not_forwarded", real="litgpt #1425", what="the order of rows is made without the seed")
def _order_without_seed() -> None:
    plant(training, "epoch_batches", lambda right, *given, seed, **named: right(*given, seed=42, **named))


@fault("A030b", "data.adapter_without_seed", real="", what="the adapter is made without the seed")
def _adapter_without_seed() -> None:
    plant_session("attach", lambda right, session, target, seed: right(session, target, 42))


@fault("A032", "data.filter_after_truncation", real="axolotl #1867", what="rows are cut first, so none is too long")
def _cut_then_filter() -> None:
    def wrong(right: Callable[..., Encoded], rows: Iterable[Marked], *, max_length: int, **named: object) -> Encoded:
        cut = (replace(row, ids=row.ids[:max_length], marks=row.marks[:max_length]) for row in rows)
        return right(cut, max_length=max_length, **named)

    plant(encoder, "fit_rows", wrong)


@fault("A034", "data.truncate_via_filter", real="axolotl #3401", what="rows that could be cut are left out")
def _left_out_for_cut() -> None:
    def wrong(right: Callable[..., Encoded], rows: Iterable[Marked], *, truncation: str, **named: object) -> Encoded:
        return right(rows, truncation="drop" if truncation == "truncate_prompt" else truncation, **named)

    plant(encoder, "fit_rows", wrong)


@fault("A034b", "data.ids_cut_alone", real="axolotl #3401", what="ids are cut, and their marks are not")
def _marks_are_not_cut() -> None:
    def wrong(right: Callable[..., list[Marked]], row: Marked, *given: object) -> list[Marked]:
        return [
            replace(piece, marks=row.marks) if len(piece.ids) < len(row.ids) else piece for piece in right(row, *given)
        ]

    plant(fit, "shorten_row", wrong)


@fault("A034c", "data.cut_uncounted", real="", what="rows that are too long are left out and not counted")
def _left_out_uncounted() -> None:
    def wrong(right: Callable[..., Encoded], rows: Iterable[Marked], **named: object) -> Encoded:
        found = right(rows, **named)
        dropped = {why: count for why, count in found.counts.dropped.items() if not why.startswith("longer")}
        return replace(found, counts=replace(found.counts, dropped=dropped))

    plant(encoder, "fit_rows", wrong)


@fault("A035", "data.steps_from_rows_not_packs", real="TRL #1027", what="with packing, steps are counted in rows")
def _steps_of_rows() -> None:
    plant(prepare, "sequences_of", lambda right, rows, **named: [(row,) for row in rows])
