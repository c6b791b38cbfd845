"""Gradient checkpointing: blocks compute their activations again in the backward pass, where they would be kept."""

from typing import Any

from finetune.errors import ModelError


def recompute_blocks(model: Any) -> None:
    """Let a model keep only what goes into each block, with or without an adapter on it.

    What dropout draws in a block is drawn again alike, and a frozen embedding before it stops no gradient.

    Raises:
        ModelError: transformers has no way to do so in this architecture.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        base.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"training.gradient_checkpointing is true, but transformers' {type(base).__name__} cannot compute its "
            "blocks again",
            hint="set it to false, and lower training.batch_size instead",
        ) from error
