"""Faults of losses, accumulation, schedules and the optimizer."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import finetune.train as training
from finetune import objectives
from finetune.adapters.kinds.dora import DoRA
from finetune.adapters.peft_files import layer_tensors
from finetune.backends.reference import session as reference
from finetune.backends.reference.model import Array, Backward, ReferencePass
from finetune.backends.reference.optimizer import ReferenceAdamW
from finetune.backends.reference.session import ReferenceSession
from finetune.events import Event
from finetune.objectives.preference import Preference
from finetune.ports import Objective, Session
from finetune.records import AdapterTarget, Batch, Optimization, TokenizedRow
from finetune.training import loop
from finetune.training.loop import LoopPlan
from finetune.verify.faults.fault import fault, in_place_of, plant, planted_by
from finetune.verify.faults.sessions import Through, gradients_of, plant_session, put_gradients

Stepping = Callable[..., Iterator[Event]]
Planned = Callable[..., LoopPlan]
Losing = Callable[..., float]
Weights = Mapping[str, Array]
Added = tuple[Array, Backward]
Doing = Callable[..., None]
Reference = Callable[..., Mapping[TokenizedRow, float]]


@fault("A120", "accum.mean_of_means", "transformers #34191")
@in_place_of("training_step", loop)
def _mean_of_means(right: Stepping, session: Session, window: Sequence[Batch], *rest: object) -> Iterator[Event]:
    """A step is the mean of its batches' mean losses."""
    targets = sum(batch.target_count for batch in window)

    def accumulate(batch: Batch, weight: float, *objective: Objective) -> float:
        share = 1 / (len(window) * batch.target_count)
        return float(session.accumulate(batch, share, *objective) * share * targets)

    yield from right(Through(session, accumulate=accumulate), window, *rest)


def _at_tail(wrong: Callable[[Session, Sequence[Batch], LoopPlan], Through]) -> None:
    """Let a step of fewer batches than it may have be another."""

    def step(
        right: Stepping, session: Session, window: Sequence[Batch], plan: LoopPlan, *rest: object
    ) -> Iterator[Event]:
        short = len(window) < plan.gradient_accumulation_steps
        yield from right(wrong(session, window, plan) if short else session, window, plan, *rest)

    plant(loop, "training_step", step)


@fault("A124", "accum.tail_never_stepped", "transformers #2995")
@planted_by(_at_tail)
def _tail_never_stepped(session: Session, window: Sequence[Batch], plan: LoopPlan) -> Through:
    """The batches left over at the end of an epoch have gradients and make no step."""

    def update(rate: float) -> None:
        put_gradients(session, {})

    return Through(session, update=update)


# AdamW undoes a factor that never changes: what shows it is the norm that is clipped at.
@fault("A124b", "accum.tail_divided_by_all", "LLaMA-Factory #10705")
@planted_by(_at_tail)
def _tail_divided_by_all(session: Session, window: Sequence[Batch], plan: LoopPlan) -> Through:
    """The batches left over at the end of an epoch are divided by as many as a whole step has."""

    def accumulate(batch: Batch, weight: float, *objective: Objective) -> float:
        return float(session.accumulate(batch, weight * len(window) / plan.gradient_accumulation_steps, *objective))

    return Through(session, accumulate=accumulate)


@fault("A125", "accum.leaks_into_next_epoch", "transformers #22082, torchtune #2745")
@planted_by(_at_tail)
def _leaks_into_next_epoch(session: Session, window: Sequence[Batch], plan: LoopPlan) -> Through:
    """The gradients of an epoch's last step are not cleared and join the next one."""

    def update(rate: float) -> None:
        kept = gradients_of(session)
        session.update(rate)
        put_gradients(session, kept)

    return Through(session, update=update)


@fault("A127", "loss.chunked_mean_counts_masked", "litgpt #751")
def _counts_masked() -> None:
    """The mean of a chunked loss counts tokens that are not trained."""

    def share(batch: Batch) -> float:
        return batch.target_count / batch.token_count

    def accumulate(right: Losing, session: Session, batch: Batch, weight: float, *objective: Objective) -> float:
        return float(right(session, batch, weight * share(batch), *objective) * share(batch))

    plant_session("accumulate", accumulate)
    plant_session("loss", lambda right, session, batch, *objective: right(session, batch, *objective) * share(batch))


@fault("A129", "loss.nan_hidden", "TRL #6702, transformers #13619")
def _nan_hidden() -> None:
    """A loss that is no number is logged as the one before it, and training goes on."""
    last = [1.0]

    def accumulate(right: Losing, session: Session, batch: Batch, weight: float, *objective: Objective) -> float:
        loss = right(session, batch, weight, *objective)
        last[0] = loss if math.isfinite(loss) else last[0]
        return last[0]

    def clipped(right: Losing, session: Session) -> float:
        norm = right(session)
        return float(norm) if math.isfinite(norm) else 0.0

    plant_session("accumulate", accumulate)
    plant_session("clip_gradients", clipped)


@fault("A130", "lr.warmup_in_micro_steps", "litgpt #132")
@in_place_of("LoopPlan", training)
def _warmup_in_batches(
    right: Planned, *, warmup_steps: int, gradient_accumulation_steps: int, **given: object
) -> LoopPlan:
    """Warm-up is counted in batches instead of steps."""
    warmup = warmup_steps * gradient_accumulation_steps
    return right(warmup_steps=warmup, gradient_accumulation_steps=gradient_accumulation_steps, **given)


@fault("A130b", "lr.horizon_in_micro_steps")
@in_place_of("LoopPlan", training)
def _horizon_in_batches(right: Planned, *, total_steps: int, last_step: int | None, **given: object) -> LoopPlan:
    """The schedule is laid out over batches instead of steps, so that it never comes down."""
    count = given["gradient_accumulation_steps"]
    assert isinstance(count, int)
    return right(total_steps=total_steps * count, last_step=last_step or total_steps, **given)


@fault("A132", "lr.schedule_ends_at_init", "mlx-examples #985")
@in_place_of("learning_rate_at", loop)
def _schedule_ends_at_init(right: Losing, step: int, total: int, *, warmup_steps: int, **given: object) -> float:
    """Where warm-up ends it begins again from zero."""
    since = step - warmup_steps if step > warmup_steps else step
    return right(since, total, warmup_steps=warmup_steps, **given)


@fault("A134", "opt.fp16_trainable", "axolotl #1031, PEFT #1249", backends=("reference",))
@in_place_of("step", ReferenceAdamW)
def _half_precision_trainable(right: Doing, optimizer: ReferenceAdamW, *given: object) -> None:
    """What is trained is kept in half precision."""
    right(optimizer, *given)
    for tensor in optimizer.tensors.values():
        tensor[...] = tensor.astype(np.float16)


def _recompute_otherwise(otherwise: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let torch compute blocks again in another way than the right one."""

    def prepare(right: Doing, session: Any, optimization: Optimization) -> None:
        right(session, optimization)
        for module in session.model.modules() if optimization.gradient_checkpointing else ():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = otherwise(module._gradient_checkpointing_func)

    plant_session("prepare_updates", prepare)


@fault(
    "A135", "grad.checkpointing_frozen_input", "transformers #25846, TRL #1006", tier=2, backends=("reference", "torch")
)
@planted_by(_recompute_otherwise)
def _input_detached(right: Callable[..., Any]) -> Callable[..., Any]:
    """With gradient checkpointing no gradient passes from one block to the one before."""
    return lambda block, hidden, *given: right(block, hidden.detach(), *given)


@fault("A135b", "grad.checkpointing_other_dropout", tier=2, backends=("reference", "torch"))
@planted_by(_recompute_otherwise)
def _dropout_redrawn(right: Callable[..., Any]) -> Callable[..., Any]:
    """With gradient checkpointing dropout is drawn anew where a block is computed again."""
    return lambda block, *given: right(block, *given, preserve_rng_state=False)


@fault("A137", "grad.loaded_frozen", "PEFT #282, transformers #24463")
def _frozen_adapter() -> None:
    """The adapter is frozen: the optimizer has nothing to move, and nobody says so."""
    plant_session("update", lambda right, session, rate: right(session, 0.0))


@fault("A139", "grad.module_bypassed", "PEFT #2556", backends=("reference",))
@in_place_of("adapter_output", ReferencePass)
def _module_bypassed(right: Callable[..., Added], trip: ReferencePass, path: str, x: Array, weight: Array) -> Added:
    """A fused path reads a layer's weight itself, and its adapter is passed by."""
    if path.endswith("gate_proj"):
        assert trip.adapter is not None
        names = layer_tensors(trip.adapter.target, path)
        for key, tensor in trip.adapter.layers[path].items():
            trip._add(names[key], np.zeros_like(tensor))
        return x @ weight.T, lambda dy: dy @ weight
    return right(trip, path, x, weight)


@fault("A142", "lora.double_wrap", "TRL #4713, #926", backends=("reference",))
@planted_by(plant_session, "attach")
def _double_wrap(right: Doing, session: ReferenceSession, target: AdapterTarget | None, seed: int) -> None:
    """A second adapter is merged into the base in memory, so that what is saved fits no fresh base."""
    right(session, target, seed)
    name = next(name for name in session.weights if name.endswith("q_proj.weight"))
    session.weights[name] = session.weights[name] * 1.25


@fault("A144", "lora.dora_uninitialised", "torchtune #1909", backends=("reference", "mlx"))
@in_place_of("start", DoRA)
def _dora_uninitialised(right: Any, *given: Any) -> Any:
    """The magnitudes of DoRA are not those of the base's rows at first."""
    parts, xp = right(*given), given[1]
    return {**parts, "m": xp.ones_like(parts["m"])}


@fault("A145", "seed.after_adapter_init", "TRL #4887, LLaMA-Factory #10211")
@planted_by(plant_session, "attach")
def _seed_too_late(right: Doing, session: Session, target: AdapterTarget | None, seed: int) -> None:
    """The adapter is drawn before the seed is set."""
    right(session, target, int.from_bytes(os.urandom(4), "big"))


@fault("A147", "opt.resume_step_dropout_rng")
@planted_by(plant_session, "accumulate")
def _same_dropout(right: Losing, session: Session, *given: object) -> float:
    """Every batch draws the same dropout."""
    session.reseed(0)
    return float(right(session, *given))


@fault("A148", "opt.decay_on_everything_twice", backends=("reference",))
@in_place_of("step", ReferenceAdamW)
def _decay_in_the_gradient(right: Doing, optimizer: ReferenceAdamW, gradients: Weights, rate: float) -> None:
    """Weight decay is added to the gradients as well, as Adam without the W has it."""
    decay = optimizer.optimization.weight_decay
    grown = {name: gradient + decay * optimizer.tensors[name] for name, gradient in gradients.items()}
    right(optimizer, grown, rate)


@fault("A149", "opt.clip_each_tensor", backends=("reference",))
@in_place_of("clip", reference)
def _clip_each_tensor(right: Losing, gradients: Iterable[Array], limit: float) -> float:
    """Gradients are clipped tensor by tensor, not all together."""
    return math.sqrt(sum(right([gradient], limit) ** 2 for gradient in gradients))


@fault("A310", "loss.reference_is_base")
@in_place_of("reference_of", objectives)
def _reference_is_base(
    right: Reference, session: Session, rows: Iterable[TokenizedRow]
) -> Mapping[TokenizedRow, float]:
    """Preferences are measured from the base, although an adapter goes on."""
    with session.adapter_disabled():
        return right(session, rows)


@fault("A311", "loss.reference_left_out")
@in_place_of("reference_of", objectives)
def _reference_left_out(
    right: Reference, session: Session, rows: Iterable[TokenizedRow]
) -> Mapping[TokenizedRow, float]:
    """Preferences are measured from nothing: the rejected answer may be the likelier one from the start."""
    return dict.fromkeys(right(session, rows), 0.0)


@fault("A312", "loss.preference_of_means")
@in_place_of("margin", Preference)
def _preference_of_means(
    right: Callable[..., float], objective: Preference, chosen: TokenizedRow, rejected: TokenizedRow, sums: Array
) -> float:
    """Log p of an answer is a mean over its tokens where the formula has their sum."""
    reference = {row: objective.reference[row] / row.target_count for row in (chosen, rejected)}
    counts = np.array([row.target_count for row in (chosen, rejected)])
    return right(replace(objective, reference=reference), chosen, rejected, sums / counts)


@fault("A313", "loss.preference_turned_round")
@in_place_of("margin", Preference)
def _preference_turned_round(right: Callable[..., float], *given: Any) -> float:
    """The rejected answer is preferred in the value that the loss is made of."""
    return -right(*given)


@fault("A129b", "loss.nan_is_zero", "unsloth #6016, TRL #6668")
def _nan_is_zero() -> None:
    """A loss that is no number is told as 0, and its gradients are dropped."""

    def accumulate(right: Losing, session: Session, *given: object) -> float:
        loss = right(session, *given)
        return float(loss) if math.isfinite(loss) else 0.0

    def clipped(right: Losing, session: Session) -> float:
        norm = right(session)
        if not math.isfinite(norm):
            put_gradients(session, {})
        return float(norm) if math.isfinite(norm) else 0.0

    plant_session("accumulate", accumulate)
    plant_session("clip_gradients", clipped)


@fault("A131", "lr.warmup_ignored", "unsloth #8464")
def _warmup_ignored() -> None:
    """Warm-up is read, and the rate is the highest from the first step on."""
    plant(training, "LoopPlan", lambda right, **given: right(**{**given, "warmup_steps": 0}))


@fault("A143", "lora.dropout_on_base", "axolotl #3806", backends=("reference",))
@in_place_of("adapter_output", ReferencePass)
def _dropout_on_base(right: Callable[..., Added], trip: ReferencePass, path: str, x: Array, weight: Array) -> Added:
    """In a fused kernel dropout takes from what the base's layer reads as well."""
    assert trip.adapter is not None
    drawn, rate = trip.random, trip.adapter.target.dropout
    if drawn is None or rate == 0:
        return right(trip, path, x, weight)
    keep = (drawn.random(x.shape) >= rate) / (1 - rate)
    trip.random = None
    try:
        y, back = right(trip, path, x * keep, weight)
    finally:
        trip.random = drawn
    return y, lambda dy: back(dy) * keep


@fault("A151", "opt.magnitudes_stand_still", "TRL #7268", backends=("reference",))
@in_place_of("step", ReferenceAdamW)
def _magnitudes_stand_still(right: Doing, optimizer: ReferenceAdamW, *given: object) -> None:
    """DoRA's magnitudes are kept in a format that has no number between them and where a step would take them."""
    kept = {name: tensor.copy() for name, tensor in optimizer.tensors.items() if "magnitude" in name}
    right(optimizer, *given)
    for name, tensor in kept.items():
        optimizer.tensors[name][...] = tensor


@fault("A122", "accum.other_loss_ignores_count", "transformers #46731, TRL #6006")
@in_place_of("training_step", loop)
def _smoothed_mean_of_means(
    right: Stepping, session: Session, window: Sequence[Batch], *rest: object
) -> Iterator[Event]:
    """With label smoothing a step is the mean of its batches' mean losses: the second loss has forgotten the count."""
    targets = sum(batch.target_count for batch in window)

    def accumulate(batch: Batch, weight: float, objective: Objective) -> float:
        share = 1 / (len(window) * batch.target_count) if objective.label_smoothing else weight
        return float(session.accumulate(batch, share, objective) * share * targets)

    yield from right(Through(session, accumulate=accumulate), window, *rest)
