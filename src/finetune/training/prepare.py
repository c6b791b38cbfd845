"""From a configuration to token ids: finds the model, reads the data, renders and encodes it, and settles the plan."""

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.adapters.choose import check_patterns, check_rank, choose_layers, choose_rows, choose_saved
from finetune.adapters.kinds import ADAPTER_KINDS, any_of
from finetune.chat.encoder import Encoder
from finetune.chat.fit import Encoded, learned_notes
from finetune.chat.tokenizer import FileTokenizer
from finetune.config import (
    Goal,
    LoadedConfig,
    ModelAndDataFacts,
    Plan,
    TrainingConfig,
    early_stopping_without_validation_problems,
    resolve,
    resolve_steps,
    resolve_training,
)
from finetune.data.batches import fixed_batches, sequences_of
from finetune.data.facts import deranged
from finetune.data.overlap import Overlap, find_overlap
from finetune.data.shape import Example, ShapedRows
from finetune.data.sources import SourceRows, shown_names
from finetune.data.split import hold_out
from finetune.data.stored import Outlines, join, keep, sizes_of
from finetune.data.survey import AnswerKind, answer_kind, survey_repeats
from finetune.errors import ConfigError, DataError, ModelError, Problem, counted
from finetune.memory.estimate import adapter_parameters, weight_bytes
from finetune.models.locate import locate_model
from finetune.models.quantize import kept_in_full, quantize_shape, refuse_schemes, say_quantized
from finetune.models.shape import read_config, read_shape
from finetune.records import (
    AdapterTarget,
    Batch,
    Conversation,
    ModelLocation,
    ModelShape,
    Question,
    TokenizedRow,
)
from finetune.training.loop import steps_per_epoch
from finetune.training.questions import retention_questions, trained_questions, unseen_rows, without_trained
from finetune.training.rows import data_files, read_noted, with_data

_MOST_STEPS = 10**9
FEWEST_UNSEEN = 16
"""From how many unseen rows on a run is judged by them of itself."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that is settled before a weight is loaded."""

    plan: Plan
    location: ModelLocation
    shape: ModelShape
    target: AdapterTarget | None
    encoder: Encoder
    train: Encoded
    rehearsal: Encoded | None
    held_out: Encoded | None
    conversations: Sequence[Conversation]
    answers: AnswerKind
    unseen: tuple[Example, ...]
    questions: tuple[Question, ...]
    retention: tuple[Question, ...]
    total_steps: int
    overlaps: Mapping[str, Overlap]
    files: tuple[Path, ...]
    sources: tuple[SourceRows, ...]
    notes: tuple[str, ...]

    @property
    def training_rows(self) -> Sequence[TokenizedRow]:
        """The rows that are trained on: those to learn and those to rehearse."""
        return join(self.train.rows, self.rehearsal.rows if self.rehearsal else ())

    @property
    def goal(self) -> Goal:
        """What open answers must show, as configured or as the held-out rows allow."""
        goal = self.plan.config.judge.goal
        if goal != "auto" or self.pairs:
            return "rows" if self.pairs else goal
        return "style" if len(self.unseen) >= FEWEST_UNSEEN else "rows"

    @property
    def pairs(self) -> bool:
        """Whether rows are pairs, of which the chosen answer is to gain on the rejected one."""
        return self.plan.config.training.objective == "dpo"

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return adapter_parameters(self.shape, self.target) if self.target else self.shape.parameters


@contextmanager
def _rare_collection() -> Iterator[None]:
    """Rows hold no cycles, and to look for some every 700 objects takes time."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@_rare_collection()
def prepare(loaded: LoadedConfig) -> Prepared:
    """Settle everything that can be settled without loading a weight, and refuse what cannot work.

    Raises:
        FineTuneError: the model, the data, the template or their combination cannot be used.
    """
    location = locate_model(loaded.config.model.path, revision=loaded.config.model.revision)
    shape = planned_shape(loaded.config, location)
    notes = _quantized_notes(loaded.config, shape)
    loaded = with_data(loaded, notes)
    shaped = read_noted(loaded.config, "train", notes)
    tokenizer = FileTokenizer(location.folder, loaded.config.tokens.learned)
    facts = ModelAndDataFacts(shape.context_length, tokenizer.chat_template is not None, len(shaped.examples))
    plan = resolve(loaded, facts)
    config = plan.config
    target = adapter_target(config, shape, tokenizer.learned_ids)
    encoder = Encoder.planned(location, config.template, tokenizer)
    kept, split = hold_out(shaped.examples, config.data.valid_fraction or 0.0, config.training.seed)
    train = encoder.encode(replace(shaped, examples=kept), plan)
    if not train.rows:
        raise DataError(
            f"no row of {shown_names(config.data.train or '')} is left to train on: {train.counts.dropped}",
            hint="raise tokens.max_length, or look at what the rows hold",
        )
    notes += learned_notes(tokenizer, train.rows)
    rehearsed = read_noted(config, "rehearsal", notes)
    rehearsal = encoder.encode(rehearsed, plan) if config.data.rehearsal else None
    learned = join(kept, rehearsed.examples)
    held, seen, held_out = _hold_out(encoder, plan, split, learned, notes)
    conversations = keep(encoder.as_asked(_trained(kept, train)))
    questions = trained_questions(encoder, conversations, plan, count=config.evaluation.questions)
    answers = _answers(config, kept, questions, notes)
    unseen = unseen_rows(encoder, held.examples, held_out, seen) if held_out and answers == "open" else ()
    kept_rows = read_noted(config, "retention", notes).examples
    known = find_overlap(kept_rows, learned)
    retention = retention_questions(encoder, kept_rows, known, plan, notes)
    _check_ids(shape, encoder, (train, rehearsal, held_out), retention)
    plan, total = with_steps(plan, shape, join(train.rows, rehearsal.rows if rehearsal else ()))
    return Prepared(
        plan=plan,
        location=location,
        shape=shape,
        target=target,
        encoder=encoder,
        train=train,
        rehearsal=rehearsal,
        held_out=held_out,
        conversations=conversations,
        answers=answers,
        unseen=unseen,
        questions=questions,
        retention=retention,
        total_steps=total,
        overlaps={"valid": seen, "retention": known},
        files=data_files(config),
        sources=shaped.sources,
        notes=tuple(notes),
    )


def _trained(examples: Sequence[Example], encoded: Encoded) -> Iterator[Example]:
    """Those examples of which rows are left."""
    if encoded.counts.kept == len(examples):
        yield from examples
        return
    left = {row.where for row in encoded.rows}
    yield from (example for example in examples if example.where in left)


def planned_shape(config: TrainingConfig, location: ModelLocation) -> ModelShape:
    """The shape of the model as the run will hold it: quantised where its files are, or where that is asked for.

    Raises:
        ModelError: a file is missing or corrupt, or a quantised base is not what this configuration can train on.
    """
    shape, owner = read_shape(location.folder), f"model {location.name!r}"
    how = config.quantization
    for each in (None, how):
        refuse_schemes(read_config(location.folder), each, config.backend, owner)
    if shape.quantized and config.adapter.kind == "full":
        raise ModelError(
            f"{owner} is quantised ({say_quantized(shape)}), but adapter.kind is full: what is quantised cannot be "
            "trained",
            hint=f"set adapter.kind to {any_of()}, or name the full model that it was made from",
        )
    return quantize_shape(shape, how, owner) if how else shape


def _quantized_notes(config: TrainingConfig, shape: ModelShape) -> list[str]:
    """What of the base is quantised, what it weighs, and what stays as it is."""
    if not shape.quantized:
        return []
    when = "as it is loaded" if config.model.quantize else "in its files"
    full, size = (weight_bytes(each, config.model.dtype) for each in (replace(shape, quantized={}), shape))
    note = (
        f"the base is quantised {when}: {len(shape.quantized)} matrices, {say_quantized(shape)}; its weights take "
        f"{size:,} bytes, in {config.model.dtype} they would take {full:,}"
    )
    kept = kept_in_full(shape)
    if not kept:
        return [note]
    named = ", ".join(kept[:3]) + (", ..." if len(kept) > 3 else "")
    return [f"{note}; {len(kept)} matrices stay in full: {named}"]


def adapter_target(config: TrainingConfig, shape: ModelShape, learned: Sequence[int] = ()) -> AdapterTarget | None:
    """The adapter as configured, on this model, with these tokens to learn; None where the whole model is trained.

    Raises:
        ModelError: a target, a pattern or a module to save matches nothing, or a rank is above a layer's size.
    """
    adapter = config.adapter
    if adapter.kind == "full":
        return None
    modules = choose_layers(shape, adapter.target_modules)
    saved = choose_saved(shape, adapter.modules_to_save or (), modules)
    given = {name: getattr(adapter, name) for name in ADAPTER_KINDS[adapter.kind].settings}
    own = {name: value for name, value in given.items() if value is not None}
    rank, alpha, dropout = own.pop("rank", 1), own.pop("alpha", 1.0), own.pop("dropout", 0.0)
    rows = choose_rows(shape, learned, saved)
    target = AdapterTarget(rank, alpha, dropout, modules, kind=adapter.kind, saved=saved, rows=rows, **own)
    check_patterns(shape, target)
    check_rank(shape, target)
    return target


def shuffled_rows(prepared: Prepared) -> Sequence[TokenizedRow] | None:
    """The training rows with the last answers dealt out among the wrong questions; None where that cannot be.

    Of pairs, the chosen answer and the rejected one change places.
    """
    if prepared.pairs:
        return prepared.encoder.encode(ShapedRows(_flipped(prepared.conversations), {}, {}, ()), prepared.plan).rows
    own = {conversation.answer: conversation.messages[-1] for conversation in prepared.conversations}
    answers = deranged([conversation.answer for conversation in prepared.conversations])
    if not answers:
        return None
    shuffled = tuple(
        replace(conversation, messages=(*conversation.messages[:-1], own[answer]))
        for conversation, answer in zip(prepared.conversations, answers, strict=True)
    )
    encoded = prepared.encoder.encode(ShapedRows(shuffled, {}, {}, ()), prepared.plan)
    return join(encoded.rows, prepared.rehearsal.rows if prepared.rehearsal else ())


def _flipped(pairs: Iterable[Conversation]) -> Sequence[Conversation]:
    return keep(
        replace(pair, messages=(*pair.messages[:-1], pair.rejected), rejected=pair.messages[-1])
        for pair in pairs
        if pair.rejected is not None
    )


def pack_length(plan: Plan) -> int | None:
    """How many tokens a sequence that rows share may have; None when each row has its own."""
    return plan.config.tokens.max_length if plan.config.training.packing else None


def batch_of_all(plan: Plan) -> int:
    """How many rows (with packing: sequences) all processes together take at once."""
    return plan.config.training.batch_size * (plan.config.training.processes or 1)


def held_out_batches(prepared: Prepared) -> Sequence[Batch]:
    """The held-out rows in fixed batches."""
    rows = prepared.held_out.rows if prepared.held_out else ()
    return fixed_batches(rows, prepared.plan.config.training.batch_size)


def packed_sample(prepared: Prepared) -> Batch | None:
    """The first sequence that rows share, as a batch; None when no two rows do."""
    training = prepared.plan.config.training
    found = sequences_of(prepared.training_rows, seed=training.seed, pack_length=pack_length(prepared.plan))
    shared = next((sequence for sequence in found if len(sequence) > 1), None)
    return Batch(shared, (len(shared),)) if shared else None


def _held_out_examples(config: TrainingConfig, split: Sequence[Example], notes: list[str]) -> ShapedRows:
    """The rows to measure on: a file of their own, or those held out of training."""
    if config.data.valid is not None:
        return read_noted(config, "valid", notes)
    if split:
        held = counted(len(split), "row", "was/were")
        notes.append(f"{held} held out of training to measure the loss on (data.valid_fraction)")
    return ShapedRows(split, {}, {}, ())


def _hold_out(
    encoder: Encoder, plan: Plan, split: Sequence[Example], learned: Sequence[Example], notes: list[str]
) -> tuple[ShapedRows, Overlap, Encoded | None]:
    """The rows to measure on, less what is trained on, as examples and as ids; and what training repeats of them."""
    config = plan.config
    name = f"data.valid ({shown_names(config.data.valid)})" if config.data.valid else "held-out rows"
    held, seen = without_trained(_held_out_examples(config, split, notes), learned, name, notes)
    held_out = encode_held_out(encoder, plan, held)
    if not (held_out and held_out.rows):
        why = f"all {seen.rows} rows of {name} stand in the rows trained on" if seen.twins else ""
        if problems := early_stopping_without_validation_problems(config, plan.origins, why):
            raise ConfigError(problems)
    return held, seen, held_out


def _answers(
    config: TrainingConfig, kept: Sequence[Example], questions: Sequence[Question], notes: list[str]
) -> AnswerKind:
    """Whether answers are exact or open, as configured or as the rows show; what they repeat is noted."""
    repeats = survey_repeats(kept)
    notes += repeats.notes(shown_names(config.data.train or ""))
    if config.training.objective == "dpo":
        return "open"
    if config.judge.answers != "auto":
        return config.judge.answers
    # However often they come again, none may be short enough to be compared word for word.
    comparable = bool(questions) or not config.evaluation.questions
    return answer_kind(repeats) if comparable else "open"


def encode_held_out(encoder: Encoder, plan: Plan, held: ShapedRows) -> Encoded | None:
    """The held-out rows as ids; None where there are none."""
    return encoder.encode(held, plan) if held.examples or held.dropped else None


def _check_ids(
    shape: ModelShape, encoder: Encoder, encoded: Iterable[Encoded | None], asked: Iterable[Question]
) -> None:
    """Refuse a tokenizer that gives out ids which the model's embedding table has no row for."""
    tokenizer = encoder.tokenizer
    found = [(tokenizer.pad_id, ", which rows are padded with")]
    for rows in (each.rows for each in encoded if each and each.rows):
        highest = sizes_of(rows)[:, 2]
        first = int((highest >= shape.vocab_size).argmax())
        found.append((int(highest[first]), f" ({rows[first].where})"))
    found += [(max(question.ids), f" ({question.text!r})") for question in asked]
    for number, where in found:
        if number >= shape.vocab_size > 0:
            raise ModelError(
                f"the tokenizer gives {tokenizer.word(number)!r} the id {number}{where}, and the model's embedding "
                f"table has {shape.vocab_size:,} rows",
                hint="use the model's own tokenizer, or resize the model's embeddings for the tokens that were added",
            )


def steps_of_an_epoch(plan: Plan, rows: Sequence[TokenizedRow]) -> int:
    """How many optimizer steps it takes to go through the rows once."""
    training = plan.config.training
    sequences = len(sequences_of(Outlines(rows), seed=training.seed, pack_length=pack_length(plan)))
    return steps_per_epoch(sequences, batch_of_all(plan), training.gradient_accumulation_steps)


def with_steps(plan: Plan, shape: ModelShape, rows: Sequence[TokenizedRow]) -> tuple[Plan, int]:
    """The plan with all that depends on how many steps the rows make, and how many are taken."""
    training, per_epoch = plan.config.training, steps_of_an_epoch(plan, rows)
    plan = resolve_training(plan, parameters=shape.parameters, rows=len(rows), steps_per_epoch=per_epoch)
    epochs, most = plan.config.training.epochs, training.max_steps
    assert epochs is not None
    if epochs * per_epoch > _MOST_STEPS:
        what = f"{epochs:g} epochs of {per_epoch} steps are more than any machine can do"
        raise ConfigError([Problem(what, "training.epochs", "lower it")])
    total = max(1, round(epochs * per_epoch))
    total = total if most is None else min(total, most)
    return resolve_steps(plan, total), total
