"""Laws of the estimate of memory: it counts what is there, and more of anything never takes less."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

from hypothesis import strategies as st
from pydantic import Field

from finetune.verify.doors.answers import Estimated, Weights
from finetune.verify.recipes import ModelRecipe, Recipe
from finetune.verify.suite.cases import PLAIN, TINY
from finetune.verify.suite.catalogue import law
from finetune.verify.suite.learned import KINDS, MODELS, WIDE
from finetune.verify.suite.trainer import Trainer
from finetune.verify.suite.verdicts import check

_TORCH: Mapping[str, Any] = {**PLAIN, "backend": "torch", "tokens.max_length": 64, "training.batch_size": 2}


class Counted(Recipe):
    """A model, an adapter, and the number format of the base."""

    model: ModelRecipe = TINY
    kind: Annotated[str, Field(pattern="^(lora|dora|rank-stabilised|of two layers)$")] = "lora"
    rank: Annotated[int, Field(ge=1, le=4)] = 2
    dtype: Annotated[str, Field(pattern="^(float32|bfloat16)$")] = "float32"

    @property
    def settings(self) -> dict[str, Any]:
        """What is estimated, as torch would train it."""
        return {**_TORCH, **KINDS[self.kind], "adapter.rank": self.rank, "model.dtype": self.dtype}


_COUNTED = st.builds(
    Counted,
    model=st.just(WIDE),
    kind=st.sampled_from(["of two layers", "lora", "dora"]),
    rank=st.sampled_from([3, 1]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
)


def _estimate(trainer: Trainer, model: Any, settings: Mapping[str, Any]) -> Estimated:
    return trainer.ask("estimate", Estimated, model=model, settings=dict(settings))


@law(
    "memory.counts",
    "What an adapter takes is counted number by number: in float32, with a gradient and two moments for each.",
    needs=["estimate"],
    oracle="the adapter that training begins with",
    cases=_COUNTED,
    examples=12,
)
def adapter_is_counted(trainer: Trainer, case: Counted) -> None:
    """How many numbers are trained, and the bytes of the parts that follow from it."""
    model = trainer.model(case.model)
    found = _estimate(trainer, model, case.settings)
    plain = {key: value for key, value in case.settings.items() if key not in ("backend", "model.dtype")}
    file = trainer.oracle.ask("initial_adapter", Weights, model=model, settings=plain).file
    count = sum(tensor.size for tensor in trainer.oracle.tensors(file).values())
    check(found.trainable == count, expected=f"{count} numbers", got=f"{found.trainable} numbers")
    for part, each in {"adapter": 4, "gradients": 4, "optimizer": 8}.items():
        check(found.parts[part] == each * count, expected=f"{part}: {each * count} bytes", got=found.parts[part])


class Grown(Counted):
    """Which setting becomes larger."""

    what: Annotated[str, Field(pattern="^(rank|targets|length|rows)$")]


_MORE: Mapping[str, Mapping[str, Any]] = {
    "rank": {"adapter.rank": 4},
    "targets": {"adapter.targets": "all-linear"},
    "length": {"tokens.max_length": 128},
    "rows": {"training.batch_size": 3},
}


@law(
    "memory.grows",
    "A higher rank, more layers, longer rows and more of them take more memory, and never less.",
    needs=["estimate"],
    oracle="the same run with less",
    cases=st.builds(
        Grown,
        model=MODELS,
        kind=st.just("of two layers"),
        what=st.sampled_from(list(_MORE)),
    ),
    examples=8,
)
def more_takes_more(trainer: Trainer, case: Grown) -> None:
    """The total, and where the adapter grows the numbers that are trained."""
    model = trainer.model(case.model)
    less = _estimate(trainer, model, case.settings)
    more = _estimate(trainer, model, {**case.settings, **_MORE[case.what]})
    check(more.total > less.total, expected=f"more than {less.total} bytes", got=more.total)
    if case.what in ("length", "rows"):
        parts = [each.parts["activations"] for each in (less, more)]
        check(parts[1] > parts[0], expected=f"activations of more than {parts[0]} bytes", got=parts[1])
    else:
        check(more.trainable > less.trainable, expected=f"more than {less.trainable} numbers", got=more.trainable)


@law(
    "memory.logits",
    "The logits of a step, or of the slice that is computed at once, are counted.",
    needs=["estimate"],
    oracle="one float32 for each word of the vocabulary and each token, up to what a slice may hold",
    cases=_COUNTED,
    examples=4,
)
def logits_are_counted(trainer: Trainer, case: Counted) -> None:
    """A few rows of a small vocabulary fit any slice."""
    found = _estimate(trainer, trainer.model(case.model), case.settings)
    least = 4 * case.model.vocabulary * 2 * 63
    check(found.parts["logits"] >= least, expected=f"at least {least} bytes", got=found.parts["logits"])
    told = sum(found.parts.values())
    check(math.isfinite(told) and found.total <= told, expected=f"at most {told} bytes in all", got=found.total)
