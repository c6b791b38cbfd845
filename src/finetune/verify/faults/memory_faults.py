"""Faults of the estimate of memory."""

from collections.abc import Callable
from dataclasses import replace

from finetune import files as write
from finetune.memory import estimate, forecast
from finetune.memory.estimate import BYTES, Estimate
from finetune.memory.kept import ActivationBytes
from finetune.memory.load import StepLoad
from finetune.records import DEFAULT_KIND, AdapterTarget, ModelShape
from finetune.verify.faults.fault import fault, plant

Keeping = Callable[..., ActivationBytes]


@fault(
    "A280",
    "mem.rank_and_targets_ignored",
    real="gpu_poor #5",
    what="The estimate takes rank 8 on queries and values, whatever is set.",
)
def rank_ignored() -> None:
    """The numbers of a paper."""

    def count(right: Callable[..., int], shape: ModelShape, target: AdapterTarget) -> int:
        return int(right(shape, replace(target, rank=8, modules=("q_proj", "v_proj"))))

    plant(estimate, "layer_parameters", count)


@fault("A280b", "mem.magnitudes_ignored", real="", what="The estimate counts DoRA as LoRA.")
def magnitudes_ignored() -> None:
    """Lengths take nothing."""

    def count(right: Callable[..., int], shape: ModelShape, target: AdapterTarget) -> int:
        return int(right(shape, replace(target, kind=DEFAULT_KIND)))

    plant(estimate, "layer_parameters", count)


def _exact(wrong: Callable[[Estimate, ModelShape, int], Estimate]) -> None:
    """Let the exact parts be others."""

    def parts(right: Callable[..., Estimate], shape: ModelShape, target: AdapterTarget | None, dtype: str) -> Estimate:
        found: Estimate = right(shape, target, dtype)
        return found if target is None else wrong(found, shape, BYTES[dtype])

    plant(forecast, "estimate_memory", parts)


@fault(
    "A282",
    "mem.adapter_upcast_ignored",
    real="PEFT #2421",
    what="The adapter is counted in the format of the base, while it is trained in float32.",
)
def upcast_ignored() -> None:
    """Half of what it takes."""

    def wrong(found: Estimate, shape: ModelShape, size: int) -> Estimate:
        trained = found.trainable_parameters * size
        return replace(found, adapter=trained, gradients=trained, optimizer=2 * trained)

    _exact(wrong)


@fault(
    "A284",
    "mem.eval_logits",
    real="TRL #5069",
    what="The logits of a step are not counted.",
)
def logits_ignored() -> None:
    """Hidden states are all that there is."""

    def kept(right: Keeping, *given: object) -> ActivationBytes:
        found: ActivationBytes = right(*given)
        return replace(found, logits=0)

    plant(forecast, "kept_by_torch", kept)


@fault(
    "A285",
    "mem.flops_for_frozen",
    real="litgpt #192",
    what="Weights that are frozen are counted as if they were trained.",
)
def frozen_counted() -> None:
    """Each has a gradient."""
    _exact(lambda found, shape, size: replace(found, gradients=shape.parameters * size))


@fault("A286", "mem.moments_ignored", real="", what="The optimizer's two moments are counted as one.")
def one_moment() -> None:
    """Half of what AdamW keeps."""
    _exact(lambda found, shape, size: replace(found, optimizer=found.optimizer // 2))


@fault("A286b", "mem.length_ignored", real="", what="The estimate takes every row to be 32 tokens long.")
def length_ignored() -> None:
    """However long they may be."""

    def kept(
        right: Keeping, shape: ModelShape, target: AdapterTarget | None, dtype: str, load: StepLoad
    ) -> ActivationBytes:
        short: ActivationBytes = right(shape, target, dtype, replace(load, length=32, targets=load.rows * 31))
        return replace(short, logits=right(shape, target, dtype, load).logits)

    plant(forecast, "kept_by_torch", kept)


@fault("A287", "mem.merge_peak", real="unsloth #1122", what="Nobody looks whether there is room for what is written.")
def room_ignored() -> None:
    """It fails in the end instead of at the beginning."""
    plant(write, "check_space", lambda right, *given, **named: None)
