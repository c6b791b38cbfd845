"""Faults of losses, accumulation, schedules and the optimizer."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import finetune.train as training
from finetune.adapters.kinds.dora import DoRA
from finetune.adapters.peft_files import layer_tensors
from finetune.backends.reference import session as reference
from finetune.backends.reference.model import Array, Backward, ReferencePass
from finetune.backends.reference.optimizer import ReferenceAdamW
from finetune.backends.reference.session import ReferenceSession
from finetune.events import Event
from finetune.ports import Objective, Session
from finetune.records import AdapterTarget, Batch
from finetune.training import loop
from finetune.training.loop import LoopPlan
from finetune.verify.faults.fault import fault, plant
from finetune.verify.faults.sessions import Through, gradients_of, plant_session, put_gradients

Stepping = Callable[..., Iterator[Event]]
Planned = Callable[..., LoopPlan]
Losing = Callable[..., float]
Weights = Mapping[str, Array]
Added = tuple[Array, Backward]


@fault(
    "A120", "accum.mean_of_means", real="transformers #34191", what="A step is the mean of its batches' mean losses."
)
def mean_of_means() -> None:
    """Every batch weighs the same, however many tokens it has."""

    def step(right: Stepping, session: Session, window: Sequence[Batch], *rest: object) -> Iterator[Event]:
        targets = sum(batch.target_count for batch in window)

        def accumulate(batch: Batch, weight: float, *objective: Objective) -> float:
            share = 1 / (len(window) * batch.target_count)
            return float(session.accumulate(batch, share, *objective) * share * targets)

        yield from right(Through(session, accumulate=accumulate), window, *rest)

    plant(loop, "training_step", step)


def _at_tail(wrong: Callable[[Session, Sequence[Batch], LoopPlan], Through]) -> None:
    """Let a step of fewer batches than it may have be another."""

    def step(
        right: Stepping, session: Session, window: Sequence[Batch], plan: LoopPlan, *rest: object
    ) -> Iterator[Event]:
        short = len(window) < plan.gradient_accumulation_steps
        yield from right(wrong(session, window, plan) if short else session, window, plan, *rest)

    plant(loop, "training_step", step)


@fault(
    "A124",
    "accum.tail_never_stepped",
    real="transformers #2995",
    what="The batches left over at the end of an epoch have gradients and make no step.",
)
def tail_never_stepped() -> None:
    """Their gradients are thrown away."""

    def idle(session: Session, window: Sequence[Batch], plan: LoopPlan) -> Through:
        def update(rate: float) -> None:
            put_gradients(session, {})

        return Through(session, update=update)

    _at_tail(idle)


@fault(
    "A124b",
    "accum.tail_divided_by_all",
    real="LLaMA-Factory #10705",
    what="The batches left over at the end of an epoch are divided by as many as a whole step has.",
)
def tail_divided_by_all() -> None:
    """Their step is too short."""

    def short(session: Session, window: Sequence[Batch], plan: LoopPlan) -> Through:
        def accumulate(batch: Batch, weight: float, *objective: Objective) -> float:
            return float(session.accumulate(batch, weight * len(window) / plan.gradient_accumulation_steps, *objective))

        return Through(session, accumulate=accumulate)

    # AdamW undoes a factor that never changes: what shows it is the norm that is clipped at.
    _at_tail(short)


@fault(
    "A125",
    "accum.leaks_into_next_epoch",
    real="transformers #22082, torchtune #2745",
    what="The gradients of an epoch's last step are not cleared and join the next one.",
)
def leaks_into_next_epoch() -> None:
    """What was left over is used twice."""

    def leaky(session: Session, window: Sequence[Batch], plan: LoopPlan) -> Through:
        def update(rate: float) -> None:
            kept = gradients_of(session)
            session.update(rate)
            put_gradients(session, kept)

        return Through(session, update=update)

    _at_tail(leaky)


@fault(
    "A127",
    "loss.chunked_mean_counts_masked",
    real="litgpt #751",
    what="The mean of a chunked loss counts tokens that are not trained.",
)
def counts_masked() -> None:
    """Loss and gradient shrink by the share of trained tokens."""

    def share(batch: Batch) -> float:
        return batch.target_count / batch.token_count

    def accumulate(right: Losing, session: Session, batch: Batch, weight: float, *objective: Objective) -> float:
        return float(right(session, batch, weight * share(batch), *objective) * share(batch))

    plant_session("accumulate", accumulate)
    plant_session("loss", lambda right, session, batch: right(session, batch) * share(batch))


@fault(
    "A129",
    "loss.nan_hidden",
    real="TRL #6702, transformers #13619",
    what="A loss that is no number is logged as the one before it, and training goes on.",
)
def nan_hidden() -> None:
    """The log looks clean and the model is dead."""
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


@fault("A130", "lr.warmup_in_micro_steps", real="litgpt #132", what="Warm-up is counted in batches instead of steps.")
def warmup_in_batches() -> None:
    """It is as many times too long as batches are added up."""

    def planned(right: Planned, *, warmup_steps: int, gradient_accumulation_steps: int, **given: object) -> LoopPlan:
        warmup = warmup_steps * gradient_accumulation_steps
        return right(warmup_steps=warmup, gradient_accumulation_steps=gradient_accumulation_steps, **given)

    plant(training, "LoopPlan", planned)


@fault(
    "A130b",
    "lr.horizon_in_micro_steps",
    real="",
    what="The schedule is laid out over batches instead of steps, so that it never comes down.",
)
def horizon_in_batches() -> None:
    """The rate at the end is that of the middle."""

    def planned(right: Planned, *, total_steps: int, last_step: int | None, **given: object) -> LoopPlan:
        count = given["gradient_accumulation_steps"]
        assert isinstance(count, int)
        return right(total_steps=total_steps * count, last_step=last_step or total_steps, **given)

    plant(training, "LoopPlan", planned)


@fault(
    "A132", "lr.schedule_ends_at_init", real="mlx-examples #985", what="Where warm-up ends it begins again from zero."
)
def schedule_ends_at_init() -> None:
    """The two parts are joined at the wrong place."""

    def rate(right: Losing, step: int, total: int, *, warmup_steps: int, **given: object) -> float:
        since = step - warmup_steps if step > warmup_steps else step
        return right(since, total, warmup_steps=warmup_steps, **given)

    plant(loop, "learning_rate_at", rate)


@fault(
    "A134",
    "opt.fp16_trainable",
    real="axolotl #1031, PEFT #1249",
    what="What is trained is kept in half precision.",
    backends=("reference",),
)
def half_precision_trainable() -> None:
    """Every update is rounded to 11 bits."""

    def step(right: Callable[..., None], optimizer: ReferenceAdamW, *given: object) -> None:
        right(optimizer, *given)
        for tensor in optimizer.tensors.values():
            tensor[...] = tensor.astype(np.float16)

    plant(ReferenceAdamW, "step", step)


@fault(
    "A137",
    "grad.loaded_frozen",
    real="PEFT #282, transformers #24463",
    what="The adapter is frozen: the optimizer has nothing to move, and nobody says so.",
)
def frozen_adapter() -> None:
    """A step of length 0, whatever the rate."""
    plant_session("update", lambda right, session, rate: right(session, 0.0))


@fault(
    "A139",
    "grad.module_bypassed",
    real="PEFT #2556",
    what="A fused path reads a layer's weight itself, and its adapter is passed by.",
    backends=("reference",),
)
def module_bypassed() -> None:
    """The gate of the MLP has an adapter that nothing goes through."""

    def added(right: Callable[..., Added], trip: ReferencePass, path: str, x: Array, weight: Array) -> Added:
        if path.endswith("gate_proj"):
            assert trip.adapter is not None
            names = layer_tensors(trip.adapter.target, path)
            for key, tensor in trip.adapter.layers[path].items():
                trip._add(names[key], np.zeros_like(tensor))
            return x @ weight.T, lambda dy: dy @ weight
        return right(trip, path, x, weight)

    plant(ReferencePass, "adapter_output", added)


@fault(
    "A142",
    "lora.double_wrap",
    real="TRL #4713, #926",
    what="A second adapter is merged into the base in memory, so that what is saved fits no fresh base.",
    backends=("reference",),
)
def double_wrap() -> None:
    """The base is not the one in the files any more."""

    def attach(right: Callable[..., None], session: ReferenceSession, target: AdapterTarget | None, seed: int) -> None:
        right(session, target, seed)
        name = next(name for name in session.weights if name.endswith("q_proj.weight"))
        session.weights[name] = session.weights[name] * 1.25

    plant_session("attach", attach)


@fault(
    "A144",
    "lora.dora_uninitialised",
    real="torchtune #1909",
    what="The magnitudes of DoRA are not those of the base's rows at first.",
    backends=("reference", "mlx"),
)
def dora_uninitialised() -> None:
    """All of them are one."""

    def draw(right: Any, *given: Any) -> Any:
        parts, xp = right(*given), given[1]
        return {**parts, "m": xp.ones_like(parts["m"])}

    plant(DoRA, "start", draw)


@fault(
    "A145",
    "seed.after_adapter_init",
    real="TRL #4887, LLaMA-Factory #10211",
    what="The adapter is drawn before the seed is set.",
)
def seed_too_late() -> None:
    """It is another one each time."""

    def attach(right: Callable[..., None], session: Session, target: AdapterTarget | None, seed: int) -> None:
        right(session, target, int.from_bytes(os.urandom(4), "big"))

    plant_session("attach", attach)


@fault(
    "A145b",
    "seed.zero_is_none",
    real="mlx-lm #1661",
    what="Seed 0 counts as no seed, so that the adapter is drawn from the clock.",
)
def seed_zero_is_none() -> None:
    """`if seed:`, where 0 is the default."""

    def attach(right: Callable[..., None], session: Session, target: AdapterTarget | None, seed: int) -> None:
        right(session, target, seed or int.from_bytes(os.urandom(4), "big"))

    plant_session("attach", attach)


@fault("A147", "opt.resume_step_dropout_rng", real="", what="Every batch draws the same dropout.")
def same_dropout() -> None:
    """The random numbers begin anew within each step."""

    def accumulate(right: Losing, session: Session, *given: object) -> float:
        session.reseed(0)
        return float(right(session, *given))

    plant_session("accumulate", accumulate)


@fault(
    "A148",
    "opt.decay_on_everything_twice",
    real="",
    what="Weight decay is added to the gradients as well, as Adam without the W has it.",
    backends=("reference",),
)
def decay_in_the_gradient() -> None:
    """AdamW is Adam with decay."""

    def step(right: Callable[..., None], optimizer: ReferenceAdamW, gradients: Weights, rate: float) -> None:
        decay = optimizer.optimization.weight_decay
        grown = {name: gradient + decay * optimizer.tensors[name] for name, gradient in gradients.items()}
        right(optimizer, grown, rate)

    plant(ReferenceAdamW, "step", step)


@fault(
    "A149",
    "opt.clip_each_tensor",
    real="",
    what="Gradients are clipped tensor by tensor, not all together.",
    backends=("reference",),
)
def clip_each_tensor() -> None:
    """The direction of a step changes with its length."""

    def clip(right: Losing, gradients: Iterable[Array], limit: float) -> float:
        return math.sqrt(sum(right([gradient], limit) ** 2 for gradient in gradients))

    plant(reference, "clip", clip)
