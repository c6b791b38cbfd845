"""Gradient checkpointing: blocks compute their activations again in the backward pass, where they would be kept."""

import contextlib
import functools
from collections.abc import Collection, Iterator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from finetune.errors import ModelError


def blocks_of(model: Any) -> dict[str, Any]:
    """The blocks of a model by their paths.

    Raises:
        ModelError: mlx-lm's model of this architecture does not say which they are.
    """
    own = {id(block) for block in getattr(model, "layers", None) or ()}
    found = {path: module for path, module in model.named_modules() if id(module) in own}
    if not found:
        raise ModelError(
            f"training.gradient_checkpointing is true, but mlx-lm's {model.model_type} names no blocks of its own",
            hint="set it to false, and lower training.batch_size instead",
        )
    return found


@contextlib.contextmanager
def recomputed(model: Any, trained: Collection[str]) -> Iterator[None]:
    """Within this context each block keeps only what goes into it; `trained` are the places that have a gradient."""
    blocks = blocks_of(model)
    kinds: dict[str, type] = {path: type(block) for path, block in blocks.items()}
    for path, block in blocks.items():
        # What a gradient is wanted of must be given to the function that is computed again, not be found inside it.
        vars(block)["recomputed"] = [
            place.removeprefix(f"{path}.") for place in trained if place.startswith(f"{path}.")
        ]
        block.__class__ = _recomputing(kinds[path])
    try:
        yield
    finally:
        for path, block in blocks.items():
            block.__class__ = kinds[path]
            del vars(block)["recomputed"]


@functools.cache
def _recomputing(kind: type) -> Any:
    class Recomputing(kind):  # type: ignore[misc]
        def __call__(self, x: mx.array, *given: Any, **named: Any) -> Any:
            def again(weights: dict[str, mx.array], x: mx.array) -> Any:
                self.update(tree_unflatten(list(weights.items())))
                return kind.__call__(self, x, *given, **named)

            own = dict(tree_flatten(self.parameters()))
            return mx.checkpoint(again)({place: own[place] for place in vars(self)["recomputed"]}, x)

    return Recomputing
