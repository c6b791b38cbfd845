"""Faults of the estimate of memory."""

from collections.abc import Callable
from dataclasses import replace

from finetune import files as write
from finetune.memory import estimate, forecast
from finetune.memory.estimate import BYTES, Estimate
from finetune.memory.kept import ActivationBytes
from finetune.memory.load import StepLoad
from finetune.records import DEFAULT_KIND, AdapterTarget, ModelShape
from finetune.verify.faults.fault import fault, in_place_of, plant, planted_by

Keeping = Callable[..., ActivationBytes]


@fault("A280", "mem.rank_and_targets_ignored", "gpu_poor #5")
@in_place_of("layer_parameters", estimate)
def _rank_ignored(right: Callable[..., int], shape: ModelShape, target: AdapterTarget) -> int:
    """The estimate takes rank 8 on queries and values, whatever is set."""
    return int(right(shape, replace(target, rank=8, modules=("q_proj", "v_proj"))))


@fault("A280b", "mem.magnitudes_ignored")
@in_place_of("layer_parameters", estimate)
def _magnitudes_ignored(right: Callable[..., int], shape: ModelShape, target: AdapterTarget) -> int:
    """The estimate counts DoRA as LoRA."""
    return int(right(shape, replace(target, kind=DEFAULT_KIND)))


def _exact(wrong: Callable[[Estimate, ModelShape, int], Estimate]) -> None:
    """Let the exact parts be others."""

    def parts(right: Callable[..., Estimate], shape: ModelShape, target: AdapterTarget | None, dtype: str) -> Estimate:
        found: Estimate = right(shape, target, dtype)
        return found if target is None else wrong(found, shape, BYTES[dtype])

    plant(forecast, "estimate_memory", parts)


@fault("A282", "mem.adapter_upcast_ignored", "PEFT #2421")
@planted_by(_exact)
def _upcast_ignored(found: Estimate, shape: ModelShape, size: int) -> Estimate:
    """The adapter is counted in the format of the base, while it is trained in float32."""
    trained = found.trainable_parameters * size
    return replace(found, adapter=trained, gradients=trained, optimizer=2 * trained)


@fault("A284", "mem.eval_logits", "TRL #5069")
@in_place_of("kept_by_torch", forecast)
def _logits_ignored(right: Keeping, *given: object) -> ActivationBytes:
    """The logits of a step are not counted."""
    found: ActivationBytes = right(*given)
    return replace(found, logits=0)


@fault("A285", "mem.flops_for_frozen", "litgpt #192")
def _frozen_counted() -> None:
    """Weights that are frozen are counted as if they were trained."""
    _exact(lambda found, shape, size: replace(found, gradients=shape.parameters * size))


@fault("A286", "mem.moments_ignored")
def _one_moment() -> None:
    """The optimizer's two moments are counted as one."""
    _exact(lambda found, shape, size: replace(found, optimizer=found.optimizer // 2))


@fault("A286b", "mem.length_ignored")
@in_place_of("kept_by_torch", forecast)
def _length_ignored(
    right: Keeping, shape: ModelShape, target: AdapterTarget | None, dtype: str, load: StepLoad
) -> ActivationBytes:
    """The estimate takes every row to be 32 tokens long."""
    short: ActivationBytes = right(shape, target, dtype, replace(load, length=32, targets=load.rows * 31))
    return replace(short, logits=right(shape, target, dtype, load).logits)


@fault("A287", "mem.merge_peak", "unsloth #1122")
def _room_ignored() -> None:
    """Nobody looks whether there is room for what is written."""
    plant(write, "check_space", lambda right, *given, **named: None)
