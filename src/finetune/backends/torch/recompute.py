"""Gradient checkpointing: blocks compute their activations again in the backward pass, where they would be kept."""

import ctypes
import sys
from typing import Any

from finetune.errors import ModelError

_MMAP_THRESHOLD = -3
"""The number by which `mallopt` knows M_MMAP_THRESHOLD (glibc's malloc.h)."""
_LARGE = 1 << 20


def recompute_blocks(model: Any) -> None:
    """Let a model keep only what goes into each block, with or without an adapter on it.

    What dropout draws in a block is drawn again alike, and a frozen embedding before it stops no gradient.

    Raises:
        ModelError: transformers has no way to do so in this architecture.
    """
    give_back_large()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        base.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"training.gradient_checkpointing is true, but transformers' {type(base).__name__} cannot compute its "
            "blocks again",
            hint="set it to false, and lower training.batch_size instead",
        ) from error


def give_back_large() -> None:
    """Let glibc give what is 1 MiB or more back to the system as soon as it is freed, for the rest of the process.

    By itself it learns to keep blocks of up to 32 MiB, and what a block of the model leaves lies in pieces between what
    the next ones keep: on SmolLM2 with 8 x 1,024 tokens that was more than recomputing saves (11.0 GB in place of 2.0).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)
