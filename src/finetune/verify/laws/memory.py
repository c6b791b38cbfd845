"""Laws of the estimate of memory: it counts what is there, and more of anything never takes less."""

import math
from collections.abc import Mapping

from finetune.verify.catalogue import law, oracle
from finetune.verify.check import check
from finetune.verify.client import SubjectClient
from finetune.verify.subjects.answers import Estimated, Weights
from finetune_strategies.cases import memory as cases


def _estimate(trainer: SubjectClient, model: object, settings: Mapping[str, object]) -> Estimated:
    return trainer.ask("estimate", Estimated, model=model, settings=dict(settings))


@law("memory.counts", ["estimate"], cases.COUNTED, examples=12)
@oracle("the adapter that training begins with")
def adapter_is_counted(trainer: SubjectClient, case: cases.Counted) -> None:
    """What an adapter takes is counted number by number: in float32, with a gradient and two moments for each."""
    model = trainer.model(case.model)
    found = _estimate(trainer, model, case.settings)
    plain = {key: value for key, value in case.settings.items() if key not in ("backend", "model.dtype")}
    file = trainer.oracle.ask("initial_adapter", Weights, model=model, settings=plain).file
    count = sum(tensor.size for tensor in trainer.oracle.tensors(file).values())
    check(found.trainable == count, expected=f"{count} numbers", got=f"{found.trainable} numbers")
    for part, each in {"adapter": 4, "gradients": 4, "optimizer": 8}.items():
        check(found.parts[part] == each * count, expected=f"{part}: {each * count} bytes", got=found.parts[part])


@law("memory.grows", ["estimate"], cases.MEMORY_GROWS, examples=8)
@oracle("the same run with less")
def more_takes_more(trainer: SubjectClient, case: cases.Grown) -> None:
    """A higher rank, more layers, longer rows and more of them take more memory, and never less."""
    model = trainer.model(case.model)
    less = _estimate(trainer, model, case.settings)
    more = _estimate(trainer, model, {**case.settings, **cases.MORE[case.what]})
    check(more.total > less.total, expected=f"more than {less.total} bytes", got=more.total)
    if case.what in ("length", "rows"):
        parts = [each.parts["activations"] for each in (less, more)]
        check(parts[1] > parts[0], expected=f"activations of more than {parts[0]} bytes", got=parts[1])
    else:
        check(more.trainable > less.trainable, expected=f"more than {less.trainable} numbers", got=more.trainable)


@law("memory.logits", ["estimate"], cases.COUNTED, examples=4)
@oracle("one float32 for each word of the vocabulary and each token, up to what a slice may hold")
def logits_are_counted(trainer: SubjectClient, case: cases.Counted) -> None:
    """The logits of a step, or of the slice that is computed at once, are counted."""
    found = _estimate(trainer, trainer.model(case.model), case.settings)
    least = 4 * case.model.vocabulary * 2 * 63
    check(found.parts["logits"] >= least, expected=f"at least {least} bytes", got=found.parts["logits"])
    whole = sum(found.parts.values())
    check(math.isfinite(whole) and found.total <= whole, expected=f"at most {whole} bytes in all", got=found.total)
