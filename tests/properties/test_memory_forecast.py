"""Laws of the forecast: counts made by hand, parts that add up, more never takes less, and what NumPy allocates."""

import random
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.adapters.choose import choose_layers
from finetune.backends.reference.backend import ReferenceBackend
from finetune.config.schema import TrainingSpec
from finetune.data.batches import fixed_batches
from finetune.errors import UsageError
from finetune.memory.estimate import estimate_memory
from finetune.memory.forecast import PARTS, Footprint, Forecast, forecast_memory
from finetune.memory.framework import FRAMEWORKS, framework_of
from finetune.memory.kept import ActivationBytes, kept_by_torch
from finetune.memory.kept_reference import kept_by_reference
from finetune.memory.load import StepLoad, full_load, load_of, planned_load
from finetune.models.locate import locate_model
from finetune.models.shape import read_shape
from finetune.records import AdapterTarget, Batch, Optimization, TokenizedRow
from support.transformer_shapes import Job, Sizes, jobs, sizes

LLAMA = Sizes("llama", hidden=5, inner=7, heads=3, kv_heads=1, head_dim=2, layers=2, vocab=11)
GPT2 = Sizes("gpt2", hidden=6, inner=13, heads=3, kv_heads=3, head_dim=2, layers=2, vocab=11, tied=True)
LOAD = StepLoad(rows=2, length=4, targets=3)
COLUMNS = ("low", "expected", "high")


def lora(sizes: Sizes, *, rank: int = 3, dropout: float = 0.0, modules: tuple[str, ...] = ()) -> AdapterTarget:
    """An adapter on these layers, or on all."""
    return AdapterTarget(rank, 7.0, dropout, modules or sizes.names())


def forecast(job: Job) -> Forecast:
    """What the job will take."""
    return forecast_memory(job.sizes.shape, job.target, job.dtype, job.load, FRAMEWORKS[job.backend])


# Numbers per token of a block that wants its input's gradient, in the order in which a block makes them.
LLAMA_LORA = [
    *(5, 1),  # the first norm: its input, its factor
    5,  # what q, k and v read
    *(6, 2, 2, 6, 3),  # queries, one key head's keys and values, the output, a log-sum for each head
    *(5, 1),  # the second norm
    5,  # what gate and up read
    *(7, 7, 7),  # gate, silu(gate), up
    7,  # their product, which down reads
]
LLAMA_FULL = [5, 1, 5, 5, 6, 2, 2, 6, 3, 5, 1, 5, 5, 7, 7, 7, 7]
GPT2_LORA = [6, 1, 1, 6, 18, 6, 3, 6, 1, 1, 6, 13, 13]
GPT2_FULL = [6, 1, 1, 6, 18, 6, 3, 6, 1, 1, 6, 13, 13]
ROPE = 2 * 4 * 2  # cosines and sines of 4 places, as wide as a head
GOLDEN = {
    # Two blocks, the first without its norm's input when the embedding is frozen; then the final norm, RoPE, 8-byte
    # targets and a byte for each token's mark; in full fine-tuning also 8-byte ids, and the hidden states with logits.
    "llama, LoRA": (LLAMA, lora(LLAMA), 2 * sum(LLAMA_LORA) - 6, (8 * 6 + ROPE) * 4 + 3 * 8 + 8),
    "llama, full": (LLAMA, None, 2 * sum(LLAMA_FULL), (8 * 11 + ROPE + 3 * 5) * 4 + 3 * 8 + 8 + 8 * 8),
    "gpt2, LoRA": (GPT2, lora(GPT2), 2 * sum(GPT2_LORA) - 8, 8 * 8 * 4 + 3 * 8 + 8),
    "gpt2, full": (GPT2, None, 2 * sum(GPT2_FULL), (8 * 8 + 3 * 6) * 4 + 3 * 8 + 8 + 8 * 8),
}

BRIEF = {
    # Six tensors as wide as the model in the final norm, a factor, and the normalised input when its gain is trained.
    "llama, LoRA": 6 * 5 + 1,
    "llama, full": 7 * 5 + 1,
    # The MLP's inner tensor and the gradient that flows past it, beside a folded weight of 6 x 13 in all.
    "gpt2, LoRA": 13 + 6 + 6 * 13 / 8,
    "gpt2, full": 13 + 6,
}


@pytest.mark.parametrize("case", GOLDEN)
def test_kept_is_a_hand_count(case: str) -> None:
    """What two small models keep in a batch of 2 x 4 tokens is what a count by hand gives, to the byte."""
    model, target, numbers, outside = GOLDEN[case]
    kept = kept_by_torch(model.shape, target, "float32", LOAD)
    assert kept.blocks == 8 * 4 * numbers
    assert kept.outside == outside
    # Three targets: their logits alone, hidden states and their gradient; or three tables of logits.
    assert kept.logits == (3 * 4 * 3 * 11 if target is None else 4 * 3 * (11 + 2 * model.hidden))
    assert kept.brief == 8 * 4 * BRIEF[case]


CHANGED = {
    "bfloat16 keeps a float32 copy of all that A reads": (
        LLAMA,
        lora(LLAMA),
        "bfloat16",
        LOAD,
        # norms 4 x 12 twice but once in the first block; inputs and A's outputs; attention; gate, silu(gate), up
        8 * (2 * (4 * 6 + 4 * (15 + 6 + 10 + 7) + 4 * 21 + 2 * 16 + 4 * 3 + 2 * 21) + 4 * 6),
    ),
    "dropout keeps a mask and a product for each layer": (
        LLAMA,
        lora(LLAMA, dropout=0.1),
        "float32",
        LOAD,
        8 * 4 * (2 * (6 + 2 * (15 + 6 + 10 + 7) + 19 + 21) + 6),
    ),
    "a mask repeats keys and values, and is kept": (
        LLAMA,
        lora(LLAMA),
        "float32",
        replace(LOAD, masked=True),
        8 * 4 * (2 * (sum(LLAMA_LORA) + 2 * 4 + 4) - 6),
    ),
    "attention dropout keeps three tables and copies": (
        replace(GPT2, attention_dropout=0.1),
        None,
        "float32",
        LOAD,
        8 * 4 * 2 * (sum(GPT2_FULL) - (18 + 6 + 3) + 18 + 6 + 3 * 3 * 4),
    ),
    "hidden dropout keeps two masks": (
        replace(GPT2, hidden_dropout=0.1),
        lora(GPT2),
        "float32",
        LOAD,
        8 * 4 * (2 * (sum(GPT2_LORA) + 12) - 8),
    ),
    "an adapter on the inner layer alone leaves the first block bare": (
        GPT2,
        lora(GPT2, modules=("c_fc",)),
        "float32",
        LOAD,
        8 * 4 * ((6 + 13) + (8 + 27 + 8 + 6 + 13)),
    ),
    "an adapter on down alone leaves the first block bare": (
        LLAMA,
        lora(LLAMA, modules=("down_proj",)),
        "float32",
        LOAD,
        8 * 4 * (7 + (6 + 19 + 6 + 21 + 7)),
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_kept_by_blocks_changes_as_it_does_in_torch(case: str) -> None:
    """Each thing that changes what autograd keeps changes the count by what was seen to be kept."""
    model, target, dtype, load, expected = CHANGED[case]
    assert kept_by_torch(model.shape, target, dtype, load).blocks == expected


@given(jobs())
def test_forecast_adds_up_and_its_columns_are_in_order(job: Job) -> None:
    """Low <= expected <= high; the parts less what is never there at once are the total; what stays is exact."""
    told = forecast(job)
    exact = estimate_memory(job.sizes.shape, job.target, "float64" if job.backend == "reference" else job.dtype)
    for part in (*PARTS, "tensors", "total"):
        low, expected, high = (getattr(getattr(told, column), part) for column in COLUMNS)
        assert 0 <= low <= expected <= high
    for print_ in (told.low, told.expected, told.high):
        assert sum(getattr(print_, part) for part in PARTS) - print_.overlap == print_.total
        assert print_.overlap >= 0
        for part in ("weights", "adapter", "gradients", "optimizer"):
            assert getattr(print_, part) == getattr(exact, part)
        stays = exact.weights + exact.adapter + exact.optimizer
        assert stays <= print_.tensors <= print_.total - print_.framework
    assert told.trainable_parameters == exact.trainable_parameters


def no_part_shrinks(small: Footprint, large: Footprint) -> bool:
    """Whether each part, the tensors and the total are at least as large."""
    return all(getattr(small, name) <= getattr(large, name) for name in (*PARTS, "tensors", "total"))


def _resized(**more: int) -> Callable[[Job], Job]:
    return lambda job: replace(
        job, sizes=replace(job.sizes, **{name: getattr(job.sizes, name) + by for name, by in more.items()})
    )


def _more_heads(job: Job) -> Job:
    heads = 2 * job.sizes.heads
    keys = heads if job.sizes.kv_heads == job.sizes.heads else job.sizes.kv_heads
    hidden = heads * job.sizes.head_dim if job.sizes.kind == "gpt2" else job.sizes.hidden
    return replace(job, sizes=replace(job.sizes, heads=heads, kv_heads=keys, hidden=hidden))


def _more_hidden(job: Job) -> Job:
    if job.sizes.kind != "gpt2":
        return _resized(hidden=3)(job)
    head_dim = job.sizes.head_dim + 2
    return replace(job, sizes=replace(job.sizes, head_dim=head_dim, hidden=job.sizes.heads * head_dim))


def _loaded(**changes: Callable[[StepLoad], int | bool]) -> Callable[[Job], Job]:
    return lambda job: replace(
        job, load=replace(job.load, **{name: change(job.load) for name, change in changes.items()})
    )


def _adapted(**changes: Callable[[AdapterTarget], int | float]) -> Callable[[Job], Job]:
    def grown(job: Job) -> Job:
        if job.target is None:
            return job
        target = replace(job.target, **{name: change(job.target) for name, change in changes.items()})
        return replace(job, target=target)

    return grown


MORE: dict[str, Callable[[Job], Job]] = {
    "rows": _loaded(rows=lambda load: load.rows + 1, targets=lambda load: load.targets + 1),
    "length": _loaded(length=lambda load: load.length + 3),
    "targets": _loaded(targets=lambda load: min(load.targets + 1, load.rows * (load.length - 1))),
    "accumulation": _loaded(accumulation=lambda load: load.accumulation + 1),
    "mask": _loaded(masked=lambda load: load.rows > 1),
    "rank": _adapted(rank=lambda target: target.rank + 1),
    "dropout": _adapted(dropout=lambda target: 0.2),
    "layers": _resized(layers=1),
    "vocab": _resized(vocab=1),
    "inner": _resized(inner=2),
    "hidden": _more_hidden,
    "heads": _more_heads,
    # Not with an adapter: beside a bfloat16 model it keeps float32 copies, which a float32 model need not make.
    "dtype": lambda job: job if job.target else replace(job, dtype="float32"),
    "all layers": lambda job: replace(job, target=job.target and replace(job.target, modules=job.sizes.names())),
}


@given(jobs(), st.sampled_from(sorted(MORE)))
def test_forecast_more_never_takes_less(job: Job, what: str) -> None:
    """A larger batch, adapter or model, or a wider format makes no part smaller, in no column, and no total."""
    small, large = forecast(job), forecast(MORE[what](job))
    for column in COLUMNS:
        assert no_part_shrinks(getattr(small, column), getattr(large, column)), column


def _times(kept: ActivationBytes, factor: int) -> ActivationBytes:
    return ActivationBytes(
        *(factor * getattr(kept, name) for name in ("blocks", "first_block", "outside", "logits", "brief"))
    )


@given(jobs(("llama", "gpt2")), st.integers(2, 5))
def test_kept_is_proportional_to_rows(job: Job, times: int) -> None:
    """So many times the rows keep so many times as much, but for RoPE's angles, which all rows share."""
    many = replace(job.load, rows=times * job.load.rows, targets=times * job.load.targets)
    shape = job.sizes.shape
    if job.backend == "reference":
        assert kept_by_reference(shape, job.target, many) == _times(
            kept_by_reference(shape, job.target, job.load), times
        )
        return
    one, more = (kept_by_torch(shape, job.target, job.dtype, load) for load in (job.load, many))
    size = 4 if job.dtype == "float32" else 2
    angles = 0 if job.sizes.kind == "gpt2" else 2 * size * job.load.length * job.sizes.head_dim
    assert more == replace(_times(one, times), outside=times * (one.outside - angles) + angles)


@given(jobs(("llama", "gpt2")))
def test_kept_by_each_further_block_is_the_same(job: Job) -> None:
    """Each block after the first adds as much as the second did, and the first never keeps more than it."""
    one, two, three = (
        kept_by_torch(replace(job.sizes, layers=layers).shape, job.target, job.dtype, job.load) for layers in (1, 2, 3)
    )
    assert three.blocks - two.blocks == two.blocks - one.blocks >= one.blocks == one.first_block
    assert (one.outside, one.logits, one.brief) == (two.outside, two.logits, two.brief)


@given(jobs(), st.integers(1, 7))
def test_logits_are_of_targets_by_vocabulary_alone(job: Job, times: int) -> None:
    """With a trained head, logits are as many as trained tokens times words: neither length nor format matters."""
    job = replace(job, target=None)
    told = forecast(job).expected.logits
    words = replace(job.sizes, vocab=times * job.sizes.vocab)
    longer = replace(job.load, length=job.load.length + 5)
    other = replace(job, sizes=words, load=longer, dtype="bfloat16")
    assert forecast(other).expected.logits == times * told
    each = 3 * 8 if job.backend == "reference" else 3 * 4
    assert told == each * job.load.targets * job.sizes.vocab


@given(st.sampled_from((LLAMA, GPT2)), st.integers(1, 10**6), st.integers(1, 10**6))
def test_logits_before_a_frozen_head_are_those_of_a_slice(sizes: Sizes, targets: int, words: int) -> None:
    """Of any number of tokens, logits take 64 MiB at most, or what one token's take; hidden states come on top."""
    load = StepLoad(rows=1, length=targets + 1, targets=targets)
    model = replace(sizes, vocab=words)
    kept = kept_by_torch(model.shape, lora(model), "float32", load)
    hidden = 2 * targets * sizes.hidden * 4
    assert kept.logits - hidden == min(4 * targets * words, max(2**26, 4 * words))
    narrow = kept_by_torch(model.shape, lora(model), "bfloat16", load)
    assert narrow.logits == (kept.logits - hidden) * 3 / 2 + hidden / 2


LARGE, TINY = StepLoad(rows=9, length=40, targets=300), StepLoad(rows=1, length=2, targets=1)
MOMENTS = {
    # Which of activations, logits and gradients live at the peak, and how many more tables of the embedding's size.
    "LoRA": (lora(LLAMA), LARGE, False, (1, 1, 0, 0)),
    "LoRA, added up": (lora(LLAMA), replace(LARGE, accumulation=2), False, (1, 1, 1, 0)),
    "full, many tokens": (None, LARGE, False, (1, 1, 0, 0)),
    "full, many tokens, added up": (None, replace(LARGE, accumulation=2), False, (1, 1, 1, 0)),
    "full, few tokens": (None, TINY, False, (0, 0, 1, 0)),
    "full, few tokens, tied": (None, TINY, True, (0, 0, 1, 2)),
    "full, few tokens, tied, added up": (None, replace(TINY, accumulation=2), True, (0, 0, 1, 3)),
}


@pytest.mark.parametrize("case", MOMENTS)
def test_forecast_peak_is_its_largest_moment(case: str) -> None:
    """Activations with logits, or all gradients with the tables that are summed into one: whichever is more."""
    target, load, tied, (activations, logits, gradients, tables) = MOMENTS[case]
    model = replace(LLAMA, vocab=997, tied=tied)
    told = forecast_memory(model.shape, target, "float32", load, FRAMEWORKS["torch"]).expected
    kept = kept_by_torch(model.shape, target, "float32", load)
    held = activations * kept.activations + logits * kept.logits + gradients * told.gradients
    stays = told.weights + told.adapter + told.optimizer
    assert told.tensors == stays + held + tables * 4 * 997 * 5
    resident = max(told.tensors - stays, kept.activations + told.gradients + tables * 4 * 997 * 5)
    assert told.total == stays + resident + told.heap + told.framework
    assert told.heap == round((0.45 if target else 0.2) * kept.activations)


def test_forecast_heap_wastes_no_more_than_blocks_can() -> None:
    """Very large tensors are given back: a very large batch wastes no more than one half as large."""
    model = replace(LLAMA, hidden=500, inner=1400, head_dim=100)
    half, whole = (
        forecast_memory(model.shape, lora(model), "float32", full_load(rows, 500), FRAMEWORKS["torch"]).expected
        for rows in (100, 200)
    )
    assert half.heap == whole.heap == round(0.45 * 2 * 176 * 2**20) < 0.45 * half.activations


@given(sizes(("llama",)), jobs())
def test_forecast_counts_the_moments_of_full_fine_tuning(model: Sizes, job: Job) -> None:
    """Gradients of earlier batches are there from the start, so accumulation leaves them no room that others freed."""
    load = replace(job.load, accumulation=1)
    shape = replace(model, tied=False).shape
    once, often = (
        forecast_memory(shape, None, "float32", each, FRAMEWORKS["torch"]).expected
        for each in (load, replace(load, accumulation=2))
    )
    held = often.tensors - once.tensors
    table = 4 * model.vocab * model.hidden
    assert 0 <= held <= often.gradients + table
    assert often.tensors >= often.weights + often.optimizer + often.gradients + often.logits
    assert once.tensors >= 4 * once.weights


def rows_of(count: int, length: int, vocab: int) -> Batch:
    """Rows of random ids, all of them trained."""
    dice = random.Random(0)
    rows = [tuple(dice.randrange(vocab) for _ in range(length)) for _ in range(count)]
    return Batch(tuple(TokenizedRow(ids, (True,) * length, "row") for ids in rows))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(("rows", "length"), [(2, 120), (11, 17)])
def test_forecast_of_the_reference_backend_is_what_numpy_allocates(method: str, rows: int, length: int) -> None:
    """The peak of live arrays over two real steps, told by Python itself, is within 5% of what is expected."""
    location = locate_model("reference-llama")
    shape = read_shape(location.folder)
    target = AdapterTarget(8, 16.0, 0.0, choose_layers(shape, "all-linear")) if method == "lora" else None
    batch = rows_of(rows, length, shape.vocab_size)
    tracemalloc.start()
    try:
        session = ReferenceBackend().open(location, "float32", 0)
        session.attach(target, 0)
        session.prepare_updates(Optimization(0.0, 1.0))
        for _ in range(2):
            session.accumulate(batch, 1 / batch.target_count)
            session.clip_gradients()
            session.update(1e-4)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    told = forecast_memory(shape, target, "float32", load_of([batch]), FRAMEWORKS["reference"])
    assert told.expected.tensors == pytest.approx(peak, rel=0.05)
    assert told.low.tensors <= peak <= told.high.tensors


def test_load_is_of_the_largest_batch() -> None:
    """The batch with the most tokens counts, padding counted, and it is masked when rows share a sequence."""
    row = {size: TokenizedRow((1,) * size, (False,) + (True,) * (size - 1), "row") for size in (2, 5, 9)}
    small, padded = Batch((row[5], row[5])), Batch((row[9], row[2]))
    packed = Batch((row[9], row[5], row[5]), packed=(1, 2))
    assert load_of([small]) == StepLoad(2, 5, 8)
    assert load_of([small, padded], 3) == StepLoad(2, 9, 9, accumulation=3)
    assert load_of([padded, packed, small]) == StepLoad(2, 10, 16, masked=True)
    assert full_load(3, 7) == StepLoad(3, 7, 18) == load_of([rows_of(3, 7, 2)])


def test_load_of_pairs_that_settings_allow_is_that_of_the_longest_pairs() -> None:
    """Both sides of each of a batch's pairs, as long as they may be, are what rows of that length make of it."""
    training = TrainingSpec(objective="dpo", batch_size=3)
    side = TokenizedRow((1,) * 7, (False,) + (True,) * 6, "row")
    assert planned_load(training, 7) == load_of(fixed_batches([replace(side, rejected=side)] * 3, 3))
    assert planned_load(TrainingSpec(batch_size=3), 7) == full_load(3, 7)


@given(jobs())
def test_load_is_between_its_lightest_and_heaviest(job: Job) -> None:
    """The bracket trains from one token a row to all but the first, on the same rows of the same length."""
    load = job.load
    light, heavy = load.lightest, load.heaviest
    assert {(each.rows, each.length, each.accumulation) for each in (light, load, heavy)} == {
        (load.rows, load.length, load.accumulation)
    }
    assert light.targets == load.rows <= load.targets <= heavy.targets == load.rows * (load.length - 1)
    assert (light.masked, heavy.masked) == (False, load.masked)
    assert light.lightest == light
    assert heavy.heaviest == heavy


@given(st.integers(1, 2**40), st.sampled_from(sorted(FRAMEWORKS)))
def test_framework_measured_here_moves_the_whole_band(here: int, backend: str) -> None:
    """What was measured here is the low end; the band above it stays as wide, and the source is told."""
    documented = framework_of(backend)
    told = documented.measured(here)
    assert told.low == here <= told.expected <= told.high
    assert told.high - told.low == documented.high - documented.low
    assert (told.source, told.backend) == ("measured on this machine", backend)
    assert "measured on Linux" in documented.source


def test_framework_nobody_measured_is_refused() -> None:
    """A backend without figures gets no made-up ones; those that have some are named."""
    with pytest.raises(UsageError, match="mlx") as caught:
        framework_of("mlx")
    assert all(backend in caught.value.hint for backend in ("torch", "reference"))


@given(jobs(("other",)))
def test_forecast_of_an_uncounted_architecture_has_a_wide_band(job: Job) -> None:
    """Where blocks are not counted tensor by tensor, activations may be half or two and a half times as much."""
    job = replace(job, backend="torch", sizes=replace(job.sizes, tied=False), load=replace(job.load, accumulation=1))
    told = forecast(job)
    light = forecast(replace(job, load=job.load.lightest))
    assert told.low.activations == pytest.approx(0.5 * light.expected.activations, abs=4)
    heavy = forecast(replace(job, load=job.load.heaviest))
    assert told.high.activations == pytest.approx(2.5 * heavy.expected.activations, abs=4)
    counted = forecast(replace(job, sizes=replace(job.sizes, kind="llama")))
    # Whether its logits are its head's alone is not known either: they count as if they could not be sliced.
    assert told.expected.logits == 3 * 4 * job.load.targets * job.sizes.vocab
    assert told.expected.optimizer == counted.expected.optimizer
